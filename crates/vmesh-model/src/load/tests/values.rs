//! Strict reading of one configuration value: YAML syntax, types, and limits.

use std::net::SocketAddr;
use std::num::NonZeroU16;

use expect_test::{Expect, expect};

use super::*;
use crate::text::Time;

/// A configuration with one field of each type that configurations use.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "read for the messages only")]
pub(super) struct Config {
    name: ServiceName,
    listen: SocketAddr,
    port: Option<NonZeroU16>,
    drain_deadline: Option<Time>,
    #[serde(default)]
    enabled: bool,
    share: Option<f64>,
    #[serde(default)]
    peers: Vec<Peer>,
    balance: Option<Balance>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "read for the messages only")]
struct Peer {
    address: String,
    weight: u32,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[expect(dead_code, reason = "read for the messages only")]
enum Balance {
    RoundRobin,
    LeastRequest,
    Hash(String),
    Ring { size: u32 },
}

fn problems_of(text: impl AsRef<[u8]>) -> String {
    match strict_bytes::<Config>("control.yaml", text.as_ref()) {
        Ok(config) => format!("{config:?}\n"),
        Err(problems) => list(&problems),
    }
}

fn refuse(text: impl AsRef<[u8]>, expected: Expect) {
    expected.assert_eq(&problems_of(text));
}

#[test]
fn what_is_right_is_read_and_scalars_stay_text_until_a_field_says_otherwise() {
    refuse(
        "
name: no
listen: '127.0.0.1:80'
port: 8080
drain_deadline: 1m30s
enabled: true
share: 1e-1
peers: [{address: 10, weight: 1}]
balance: {hash: x-user}
labels: {version: 1.10, canary: yes, mode: 0755, empty: ''}
",
        expect![[r#"
            Config { name: "no", listen: 127.0.0.1:80, port: Some(8080), drain_deadline: Some(Time(90s)), enabled: true, share: Some(0.1), peers: [Peer { address: "10", weight: 1 }], balance: Some(Hash("x-user")), labels: {"canary": "yes", "empty": "", "mode": "0755", "version": "1.10"} }
        "#]],
    );
}

#[test]
fn json_is_read_too_also_with_tabs() {
    refuse(
        "{\n\t\"name\": \"a\",\n\t\"listen\": \"[::1]:1\",\n\t\"labels\": {\"a\\/b\": \"\\ud83c\\udfb5\"}\n}\n",
        expect![[r#"
            Config { name: "a", listen: [::1]:1, port: None, drain_deadline: None, enabled: false, share: None, peers: [], balance: None, labels: {"a/b": "🎵"} }
        "#]],
    );
}

#[test]
fn every_problem_of_a_document_is_reported_at_once() {
    refuse(
        "
name: a|b
listen: 10.0.0.1
port: 70000
drain_second: 5s
drain_deadline: 5
enabled: yes
share: most
peers:
  - {address: a, weight: ten}
  - address: b
  - {adress: c, weight: 1, zone: z}
  - seven
balance: {ring: {sice: 5}}
labels: [a]
",
        expect![[r#"
            control.yaml:2:7: `name`: `a|b` is not a service name: 1 to 253 letters, digits, `.`, `_` or `-`, the first and the last a letter or a digit
            control.yaml:3:9: `listen`: `10.0.0.1` is not an IP address and a port, such as 127.0.0.1:8080
            control.yaml:4:7: `port`: expected a whole number from 0 to 65535, found the number 70000
            control.yaml:5:1: unknown field `drain_second`, did you mean `drain_deadline`?
            control.yaml:6:17: `drain_deadline`: `5` is not a duration: a number and a unit, such as 250ms, 2s, 1m30s or 1h
            control.yaml:7:10: `enabled`: expected true or false, found the text `yes`
            control.yaml:8:8: `share`: expected a number, found the text `most`
            control.yaml:10:26: `weight`: expected a whole number from 0 to 4294967295, found the text `ten`
            control.yaml:11:5: `weight` is missing in `peers`
            control.yaml:12:6: unknown field `adress`, did you mean `address`?
            control.yaml:12:28: unknown field `zone`: expected one of `address` or `weight`
            control.yaml:13:5: `peers`: expected a mapping of `address`, `weight`, found the text `seven`
            control.yaml:14:18: unknown field `sice`, did you mean `size`?
            control.yaml:15:9: `labels`: expected a mapping, found a list
        "#]],
    );
}

#[test]
fn a_field_is_not_missing_when_its_value_or_its_spelling_is_wrong() {
    refuse(
        "nmae: a\nlisten: nowhere\n",
        expect![[r#"
        control.yaml:1:1: unknown field `nmae`, did you mean `name`?
        control.yaml:2:9: `listen`: `nowhere` is not an IP address and a port, such as 127.0.0.1:8080
    "#]],
    );
    refuse(
        "name:\nlisten: 127.0.0.1:1\n",
        expect![[r#"
        control.yaml:1:5: `name`: expected a text, found nothing
    "#]],
    );
    refuse(
        "enabled: true\n",
        expect![[r#"
        control.yaml:1:1: `listen` is missing
        control.yaml:1:1: `name` is missing
    "#]],
    );
    refuse(
        "enabled: maybe\n",
        expect![[r#"
        control.yaml:1:1: `listen` is missing
        control.yaml:1:1: `name` is missing
        control.yaml:1:10: `enabled`: expected true or false, found the text `maybe`
    "#]],
    );
    refuse(
        "# nothing yet\n",
        expect![[r#"
        control.yaml:1:1: `listen` is missing
        control.yaml:1:1: `name` is missing
    "#]],
    );
}

#[test]
fn wrong_types_say_what_was_expected_and_what_was_found() {
    let value = |field: &str| problems_of(format!("name: a\nlisten: 127.0.0.1:1\n{field}\n"));
    let all: String = [
        "port: 0",
        "port: -1",
        "port: '8080'",
        "port: 0x1F",
        "port: 010",
        "port: 1.5",
        "port: []",
        "peers: {}",
        "peers: a",
        "peers:",
        "balance: round_robbin",
        "balance: fastest",
        "balance: hash",
        "balance: {round_robin: 1}",
        "balance: {hash: [1]}",
        "balance: {hash: a, ring: {size: 1}}",
        "balance: {}",
        "balance: [hash]",
        "labels: {a: {b: c}}",
        "labels: {a: }",
        "labels: ''",
        "enabled: 'true'",
        "enabled: 1",
        "share: .inf",
        "drain_deadline: 0s",
    ]
    .into_iter()
    .map(value)
    .collect();
    expect![[r#"
        control.yaml:3:7: `port`: expected a whole number from 1 to 65535, found the number 0
        control.yaml:3:7: `port`: expected a whole number from 0 to 65535, found the number -1
        control.yaml:3:7: `port`: expected a whole number from 0 to 65535, found the text `8080` (in quotes)
        control.yaml:3:7: `port`: expected a whole number from 0 to 65535, found the text `0x1F`
        control.yaml:3:7: `port`: expected a whole number from 0 to 65535, found the number 010
        control.yaml:3:7: `port`: expected a whole number from 0 to 65535, found the number 1.5
        control.yaml:3:7: `port`: expected a whole number from 0 to 65535, found a list
        control.yaml:3:8: `peers`: expected a list, found a mapping
        control.yaml:3:8: `peers`: expected a list, found the text `a`
        control.yaml:3:6: `peers`: expected a list, found nothing
        control.yaml:3:10: `balance`: `round_robbin` is not known here, did you mean `round_robin`?
        control.yaml:3:10: `balance`: expected one of `round_robin`, `least_request`, `hash` or `ring`, found `fastest`
        control.yaml:3:10: `balance`: `hash` needs a value: `{hash: ..}`
        control.yaml:3:11: `balance`: `round_robin` takes no value: write only `round_robin`
        control.yaml:3:17: `hash`: expected a text, found a list
        control.yaml:3:10: `balance`: expected exactly one of `round_robin`, `least_request`, `hash` or `ring`, found hash and ring
        control.yaml:3:10: `balance`: expected exactly one of `round_robin`, `least_request`, `hash` or `ring`, found none
        control.yaml:3:10: `balance`: expected one of `round_robin`, `least_request`, `hash` or `ring`, found a list
        control.yaml:3:13: `a`: expected a text, found a mapping
        control.yaml:3:11: `a`: expected a text, found nothing
        control.yaml:3:9: `labels`: expected a mapping, found an empty text
        control.yaml:3:10: `enabled`: expected true or false, found the text `true` (in quotes)
        control.yaml:3:10: `enabled`: expected true or false, found the number 1
        control.yaml:3:8: `share`: expected a number, found the text `.inf`
        control.yaml:3:17: `drain_deadline`: `0s` is no time at all: leave it out
    "#]].assert_eq(&all);
}

#[test]
fn a_text_that_is_not_yaml_says_so_in_plain_words() {
    let all: String = [
        "name: a\n\tlisten: b\n",
        "name: a\n\n\tlisten: b\n",
        "name: a: b\n",
        "name: [a, b\nlisten: c\n",
        "name: {a: 1\n",
        "name: {a: 1]\n",
        "name: ]\n",
        "name: \"a\n",
        "name: 'it's'\n",
        "name: \"a\" b\n",
        "name: \"\\q\"\n",
        "- a\nname: b\n",
        "name: a\n  listen: b\n",
        "peers:\n  - a\n b: 1\n",
        "name: *a\n",
        "name: @a\n",
        "name: %a\n",
        "name: \u{7}\n",
        "name\nlisten: b\n",
        "name: a\nlisten\n",
        "  name: a\nlisten: b\n",
        "name: - a\n",
        "{\"name\": \"a\" \"listen\": 1}",
        "{\"name\" 1}",
        "{\"name\": \"a\", \"listen\": \"127",
        "[1, 2",
        "%YAML 1.2\n---\nname: a\n",
        "name: !vault |\n  0a0b\n",
        "name: a\nname: b\nlisten: 127.0.0.1:1\n",
        "{a: 1}: b\n",
        "name: &a [*a]\n",
        "name: a\nlisten: 127.0.0.1:1\n---\nname: b\n",
        "just text",
        "- name: a",
        "",
    ]
    .into_iter()
    .map(|text| format!("{:?}\n{}", text, problems_of(text)))
    .collect();
    expect![[r#"
        "name: a\n\tlisten: b\n"
        control.yaml:2:1: a tab: lines are indented with spaces
        "name: a\n\n\tlisten: b\n"
        control.yaml:3:1: a tab: lines are indented with spaces
        "name: a: b\n"
        control.yaml:1:8: a `:` where none belongs: is the line indented like those around it, or is it a text that has to be in quotes?
        "name: [a, b\nlisten: c\n"
        control.yaml:2:7: a `:` where none belongs: is a bracket above not closed?
        "name: {a: 1\n"
        control.yaml:1:7: this `{` is never closed
        "name: {a: 1]\n"
        control.yaml:1:7: this `{` is closed by a `]`
        "name: ]\n"
        control.yaml:1:7: a closing bracket without an opening one
        "name: \"a\n"
        control.yaml:1:7: the quote that begins here never ends
        "name: 'it's'\n"
        control.yaml:1:11: more text after the closing quote: a `'` within single quotes is written `''`
        "name: \"a\" b\n"
        control.yaml:1:11: more text after the closing quote: a comma or a colon is missing, or a `"` within the text is to be `\"`
        "name: \"\\q\"\n"
        control.yaml:1:7: this `\` begins nothing known: write `\\`, or put the text in single quotes
        "- a\nname: b\n"
        control.yaml:2:1: this line does not belong to those above it: is it indented like them?
        "name: a\n  listen: b\n"
        control.yaml:2:9: a `:` where none belongs: is the line indented like those around it, or is it a text that has to be in quotes?
        "peers:\n  - a\n b: 1\n"
        control.yaml:3:2: this line does not belong to those above it: is it indented like them?
        "name: *a\n"
        control.yaml:1:7: an alias (`*name`) without its anchor (`&name`) above; a text that starts with `*` has to be in quotes
        "name: @a\n"
        control.yaml:1:7: a text that starts with `@` has to be in quotes
        "name: %a\n"
        control.yaml:1:7: a text that starts with `%` has to be in quotes
        "name: \u{7}\n"
        control.yaml:1:7: the character U+0007 is not allowed in a text
        "name\nlisten: b\n"
        control.yaml:2:7: a `:` where none belongs: is the line indented like those around it, or is it a text that has to be in quotes?
        "name: a\nlisten\n"
        control.yaml:2:1: expected `name: value`, found no `:` after the name
        "  name: a\nlisten: b\n"
        control.yaml:1:3: `listen` is missing
        control.yaml:2:1: this line is indented less than the first one
        "name: - a\n"
        control.yaml:1:7: a `-` where no list can begin: start the list on a line of its own
        "{\"name\": \"a\" \"listen\": 1}"
        control.yaml:1:14: more text after the closing quote: a comma or a colon is missing, or a `"` within the text is to be `\"`
        "{\"name\" 1}"
        control.yaml:1:9: more text after the closing quote: a comma or a colon is missing, or a `"` within the text is to be `\"`
        "{\"name\": \"a\", \"listen\": \"127"
        control.yaml:1:25: the quote that begins here never ends
        "[1, 2"
        control.yaml:1:1: this `[` is never closed
        "%YAML 1.2\n---\nname: a\n"
        control.yaml:1:1: a line that starts with `%`: directives are not supported
        "name: !vault |\n  0a0b\n"
        control.yaml:1:1: `listen` is missing
        control.yaml:1:7: the tag `!vault` means nothing here; a text that starts with `!` has to be in quotes
        control.yaml:2:3: `name`: `0a0b ` is not a service name: 1 to 253 letters, digits, `.`, `_` or `-`, the first and the last a letter or a digit
        "name: a\nname: b\nlisten: 127.0.0.1:1\n"
        control.yaml:2:1: `name` is given twice, first in line 1
        "{a: 1}: b\n"
        control.yaml:1:1: `listen` is missing
        control.yaml:1:1: `name` is missing
        control.yaml:1:1: a key has to be a text, found a mapping
        "name: &a [*a]\n"
        control.yaml:1:1: `listen` is missing
        control.yaml:1:10: `name`: expected a text, found a list
        control.yaml:1:11: an alias inside of what it stands for: that would never end
        "name: a\nlisten: 127.0.0.1:1\n---\nname: b\n"
        control.yaml:4:1: a second document (after `---`): one is read here
        "just text"
        control.yaml:1:1: expected a mapping of `name`, `listen`, `port`, `drain_deadline`, `enabled`, `share`, `peers`, `balance`, `labels`, found the text `just text`
        "- name: a"
        control.yaml:1:1: expected a mapping of `name`, `listen`, `port`, `drain_deadline`, `enabled`, `share`, `peers`, `balance`, `labels`, found a list
        ""
        control.yaml: the file is empty
    "#]].assert_eq(&all);
}

#[test]
fn bytes_that_are_not_text_are_one_problem() {
    refuse(
        b"name: a\nlisten: \xc3\xa4 \xff\n",
        expect![[r#"
        control.yaml:2:11: the text is not UTF-8: byte 0xff belongs to no character
    "#]],
    );
    refuse(
        b"\xff\xfen\0a\0",
        expect![[r#"
        control.yaml: the text is UTF-16: save it as UTF-8
    "#]],
    );
    refuse(
        b"",
        expect![[r#"
        control.yaml: the file is empty
    "#]],
    );
    refuse(
        vec![b' '; MAX_TEXT + 1],
        expect![[r#"
        control.yaml: larger than 16 MiB, the most that is read
    "#]],
    );
    refuse(
        "\u{feff}name: a\nlisten: 127.0.0.1:1\n",
        expect![[r#"
        Config { name: "a", listen: 127.0.0.1:1, port: None, drain_deadline: None, enabled: false, share: None, peers: [], balance: None, labels: {} }
    "#]],
    );
}

#[test]
fn bombs_do_not_go_off() {
    let mut laughs = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
    for i in 1..30 {
        let before = vec![format!("*a{}", i - 1); 10].join(",");
        laughs += &format!("a{i}: &a{i} [{before}]\n");
    }
    refuse(
        laughs,
        expect![[r#"
        control.yaml:6:9: more than a million values, the most that is read of one file
    "#]],
    );

    let merges: String = (1..20_000).map(|i| format!("a{i}: &a{i} {{<<: *a{}, k{i}: 1}}\n", i - 1)).collect();
    refuse(
        format!("a0: &a0 {{k: 1}}\n{merges}"),
        expect![[r#"
        control.yaml:1410:15: more than a million values, the most that is read of one file
    "#]],
    );

    let chain: String = (1..20_000).map(|i| format!("a{i}: &a{i} [*a{}]\n", i - 1)).collect();
    refuse(
        format!("a0: &a0 [x]\n{chain}"),
        expect![[r#"
        control.yaml:65:11: nested deeper than 64 levels
    "#]],
    );

    refuse(
        "[".repeat(100_000),
        expect![[r#"
        control.yaml:1:65: nested deeper than 64 levels
    "#]],
    );
    refuse(
        "a: ".repeat(100_000),
        expect![[r#"
        control.yaml:1:5: a `:` where none belongs: is the line indented like those around it, or is it a text that has to be in quotes?
    "#]],
    );
    refuse(
        "- ".repeat(100_000),
        expect![[r#"
        control.yaml:1:129: nested deeper than 64 levels
    "#]],
    );
    let deep: String = (0..200).map(|i| format!("{}a:\n", " ".repeat(i))).collect();
    refuse(
        deep,
        expect![[r#"
        control.yaml:65:65: nested deeper than 64 levels
    "#]],
    );
    refuse(
        format!("[{}]", "1,".repeat(2_000_000)),
        expect![[r#"
        control.yaml:1:2000002: more than a million values, the most that is read of one file
    "#]],
    );
}

#[test]
fn aliases_and_merges_are_followed() {
    refuse(
        "
labels: &all {a: 1, b: 2}
name: x
listen: 127.0.0.1:1
peers:
  - &peer {address: a, weight: 1}
  - *peer
  - {<<: *peer, weight: 2}
  - {<<: [*peer, *all]}
  - {<<: 5}
",
        expect![[r#"
            control.yaml:2:15: unknown field `a`, did you mean `address`?
            control.yaml:2:21: unknown field `b`: expected one of `address` or `weight`
            control.yaml:10:5: `address` is missing in `peers`
            control.yaml:10:5: `weight` is missing in `peers`
            control.yaml:10:10: `<<` takes a mapping or a list of mappings, found the number 5
        "#]],
    );
}
