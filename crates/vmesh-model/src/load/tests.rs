use std::net::SocketAddr;
use std::num::NonZeroU16;

use expect_test::{Expect, expect};

use super::*;
use crate::document::{CaptureSettings, NodeDocument, PlacedDocument};
use crate::text::Time;

/// A configuration with one field of each type that configurations use.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "read for the messages only")]
struct Config {
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

fn list(problems: &[Problem]) -> String {
    problems.iter().map(|problem| format!("{problem}\n")).collect()
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

/// Splits a text into files. Each begins with a line `== path`.
fn files(text: &str) -> Vec<(&str, &str)> {
    let mut files = Vec::new();
    for part in text.trim_start().split("== ").skip(1) {
        let (path, content) = part.split_once('\n').unwrap();
        files.push((path, content));
    }
    files
}

fn update(library: &mut Library, text: &str) -> (Arc<Documents>, String) {
    let files = files(text);
    let files: Vec<_> = files
        .iter()
        .map(|(path, content)| DocumentFile {
            path,
            content: content
                .strip_prefix("unreadable: ")
                .map_or(Ok(content.as_bytes()), |why| Err(why.trim())),
        })
        .collect();
    let (documents, problems) = library.update(&files);
    (documents, list(&problems))
}

/// Lists the documents in force, one per line, and then the problems.
fn show(library: &mut Library, text: &str) -> String {
    let (documents, problems) = update(library, text);
    let mut shown = String::new();
    let mut line = |what: String, place: &Place| shown.push_str(&format!("{what} ({place})\n"));
    if let Some(mesh) = &documents.mesh {
        line("Mesh".to_owned(), &mesh.place);
    }
    for service in documents.services.values() {
        let subsets: Vec<_> = service.subsets.keys().map(|s| s.as_str()).collect();
        line(format!("Service {} [{}]", service.name, subsets.join(" ")), &service.place);
    }
    for route in documents.routes.values() {
        line(format!("Route {} with {} rules", route.service, route.rules.len()), &route.place);
    }
    for node in &documents.nodes {
        line(format!("Node {}", node.selector()), &node.place);
    }
    shown + &problems
}

fn check(text: &str, expected: Expect) {
    expected.assert_eq(&show(&mut Library::default(), text));
}

const DESIGN: &str = r#"
== mesh.d/orders.yaml
kind: Service
name: orders
subsets: {v1: {version: v1}, v2: {version: v2}}
load_balancing: {policy: least_request}      # round_robin | least_request | latency_aware | random | ring_hash | maglev
outlier_detection: {consecutive_5xx: 5, base_ejection: 30s}
---
kind: Route
service: orders
rules:
  - match: {path: {prefix: /v2}, headers: {x-canary: "true"}}
    split: [{subset: v2, weight: 100}]
  - split: [{subset: v1, weight: 90}, {subset: v2, weight: 10}]
    timeout: 2s
    retry: {attempts: 3, on: [5xx, reset], per_try_timeout: 500ms}
"#;

#[test]
fn the_documents_that_the_design_shows_are_taken() {
    check(
        DESIGN,
        expect![[r#"
        Service orders [v1 v2] (mesh.d/orders.yaml:1:1)
        Route orders with 2 rules (mesh.d/orders.yaml:7:1)
    "#]],
    );
}

#[test]
fn every_field_there_is_can_be_written() {
    check(
        r#"
== all.yaml
kind: Mesh
load_balancing: {policy: maglev, hash_on: {cookie: session}, locality: prefer_local, fallback: [{source: zookeeper}, {zone: b, labels: {dc: dc2}}]}
timeouts: {connect: 1s, request: 10s, idle: 5m}
retry: {attempts: 2, on: [5xx, gateway-error, retriable-4xx, deadline-exceeded], per_try_timeout: 1s}
outlier_detection: {consecutive_5xx: 3, interval: 10s, base_ejection: 30s, max_ejection_percent: 100}
connection_limits: {max_connections: 10, max_pending_requests: 10, max_requests: 10, max_retries: 0}
capture: {percent: 0, on_loss: open}
outbound: allow-any
---
kind: Service
name: orders
protocol: http
port: 80
subsets: {v1: {version: v1, zone: a, labels: {rack: r7}}}
load_balancing: {policy: ring_hash, hash_on: source_ip}
capture: {percent: 100, on_loss: closed}
---
kind: Route
service: orders
rules:
  - match:
      path: {regex: "/a/[^/]+(?:/x)?"}
      headers: {":authority": {suffix: .example}, x-a: {regex: "[[:digit:]]{2,3}"}, x-b: {present: false}}
      query: {debug: "1", x: {contains: y}}
      method: [GET, HEAD]
    split: [{subset: v1, weight: 9}, {service: other}]
  - match: {path: {exact: /old}, method: POST}
    redirect: {scheme: https, host: example.com, port: 8443, path: /new, code: 308}
  - match: {path: {prefix: /legacy/}}
    redirect: {service: legacy}
  - match: {path: {prefix: /v1/}}
    redirect: {prefix: /v2/}
---
kind: Node
name: web-17
upstreams: [{service: orders, listen: "127.0.0.1:9001"}, {service: payments}]
---
kind: Node
labels: {role: web, rack: r7}
retry: {attempts: 0}
capture: {on_loss: closed}
outbound: registry-only
---
kind: Node
labels: {role: web}
== more.json
[{"kind": "Service", "name": "payments"},
 {"kind": "Service", "name": "legacy", "port": 81}]
== one.json
{"kind": "Route", "service": "payments", "rules": [{}]}
"#,
        expect![[r#"
            Mesh (all.yaml:1:1)
            Service legacy [] (more.json:2:2)
            Service orders [v1] (all.yaml:10:1)
            Service payments [] (more.json:1:2)
            Route orders with 4 rules (all.yaml:18:1)
            Route payments with 1 rules (one.json:1:1)
            Node {role: web} (all.yaml:44:1)
            Node {rack: r7, role: web} (all.yaml:38:1)
            Node web-17 (all.yaml:34:1)
        "#]],
    );
}

#[test]
fn what_a_document_is_comes_first() {
    check(
        "
== a.yaml
kind: Rout
service: a
rules: []
---
kind: VirtualService
---
kind: Gateway
hosts: [a]
---
name: orders
---
- a
---
text
---
kind: [Route]
---
kind: Route
rules: [{}]
---
kind: Service
nmae: a
---
kind: Service
name: good
",
        expect![[r#"
            Service good [] (a.yaml:24:1)
            a.yaml:1:7: unknown kind `Rout`, did you mean `Route`? It is not in force
            a.yaml:5:7: unknown kind `VirtualService`: expected one of `Mesh`, `Service`, `Route` or `Node`; it is not in force
            a.yaml:7:7: `Gateway` documents are not supported by this version
            a.yaml:10:1: `kind` is missing: one of `Mesh`, `Service`, `Route` or `Node`; it is not in force
            a.yaml:12:3: expected a document, which begins with `kind: ..`, found the text `a`; it is not in force
            a.yaml:14:1: expected a document, which begins with `kind: ..`, found the text `text`; it is not in force
            a.yaml:16:7: `kind`: expected one of `Mesh`, `Service`, `Route` or `Node`, found a list; it is not in force
            a.yaml:18:1: `service` is missing; it is not in force
            a.yaml:22:1: unknown field `nmae`, did you mean `name`? It is not in force
        "#]],
    );
}

#[test]
fn typed_problems_are_at_their_place_in_the_whole_file() {
    check(
        "
== a.yaml
kind: Service
name: a
protcol: http
port: 70000
---
kind: Route
service: a
rules:
  - match: {path: {prefx: /v2}, headers: {x-a: {exact: a, prefix: b}, x-b: {foo: 1}, x-c: {}, x-d: [1]}}
    splt: []
    retry: {on: [5xy]}
  - timeout: 0s
    split: [{weight: -1}]
    match: {method: get}
---
kind: Mesh
load_balancing: {policy: least_conn, hash_on: header}
---
kind: Service
name: b
name: c
",
        expect![[r#"
            a.yaml:3:1: unknown field `protcol`, did you mean `protocol`? It is not in force
            a.yaml:4:7: `port`: expected a whole number from 0 to 65535, found the number 70000; it is not in force
            a.yaml:9:20: `path`: `prefx` is not known here, did you mean `prefix`? It is not in force
            a.yaml:9:48: `x-a`: `exact` and `prefix` together: give one of exact, prefix, suffix, contains, regex or present; it is not in force
            a.yaml:9:77: unknown field `foo`: expected one of `exact`, `prefix`, `suffix`, `contains`, `regex` or `present`; it is not in force
            a.yaml:9:91: `x-c`: an empty match: give one of exact, prefix, suffix, contains, regex or present; it is not in force
            a.yaml:9:100: `x-d`: expected a text, or one of exact, prefix, suffix, contains, regex or present, found a list; it is not in force
            a.yaml:10:5: unknown field `splt`, did you mean `split`? It is not in force
            a.yaml:11:12: `attempts` is missing in `retry`; it is not in force
            a.yaml:11:18: `on`: `5xy` is not known here, did you mean `5xx`? It is not in force
            a.yaml:12:14: `timeout`: `0s` is no time at all: leave it out; it is not in force
            a.yaml:13:22: `weight`: expected a whole number from 0 to 4294967295, found the number -1; it is not in force
            a.yaml:14:21: `method`: `get` is not an HTTP method: capitals, such as GET or POST; it is not in force
            a.yaml:17:26: `policy`: expected one of `round_robin`, `least_request`, `random`, `ring_hash` or `maglev`, found `least_conn`; it is not in force
            a.yaml:17:47: `hash_on`: `header` needs a value: `{header: ..}`; it is not in force
            a.yaml:21:1: `name` is given twice, first in line 20; it is not in force
        "#]],
    );
}

#[test]
fn contradictions_are_at_their_place() {
    check(
        r#"
== a.yaml
kind: Service
name: a
port: 0
subsets: {v1: {}}
load_balancing: {policy: random, hash_on: source_ip, fallback: [{}]}
outlier_detection: {max_ejection_percent: 101}
retry: {attempts: 100, per_try_timeout: 2s}
timeouts: {request: 1s}
connection_limits: {max_connections: 0, max_retries: 0}
---
kind: Service
name: b
load_balancing:
  hash_on: {header: x-user}
---
kind: Node
retry: {attempts: 1}
---
kind: Node
name: n
upstreams:
  - {service: a, listen: "127.0.0.1:1"}
  - {service: a, listen: "127.0.0.1:1"}
  - {service: b, listen: "127.0.0.1:0"}
---
kind: Route
service: a
rules: []
---
kind: Route
service: b
rules:
  - match: {path: {prefix: v1}}
  - match: {path: {exact: ""}}
  - match: {headers: {"x y": a, x-a: {prefix: ""}, x-b: "a\nb"}}
  - split: [{weight: 0}, {service: c, weight: 0}]
    match: {method: PUT}
  - split:
      - {weight: 4000000000}
      - {weight: 4000000000}
    redirect: {path: /x}
    match: {method: POST}
  - match: {method: DELETE}
    redirect:
      service: c
      host: example.com
      code: 301
  - match: {path: {exact: /r}}
    redirect: {code: 304}
  - match: {path: {exact: /s}}
    redirect: {prefix: s, path: /t, port: 0, host: "http://x", code: 200}
  - match: {path: {exact: /u}}
    timeout: 1s
    retry: {attempts: 3, per_try_timeout: 1500ms}
---
kind: Service
name: d
capture: {percent: 101}
---
kind: Mesh
capture: {percent: -1, on_loss: fail, share: 10}
outbound: deny
---
kind: Service
name: e
outbound: allow-any
"#,
        expect![[r#"
            a.yaml:3:7: port 0 is not a port: 1 to 65535; it is not in force
            a.yaml:4:11: subset `v1` asks for nothing, which is the whole service: give `version`, `zone` or `labels`; it is not in force
            a.yaml:5:34: `hash_on` needs the policy `ring_hash` or `maglev`: `random` does not hash; it is not in force
            a.yaml:5:65: this fallback is every endpoint: give `source`, `zone` or `labels`; it is not in force
            a.yaml:6:43: 101 percent is more than all of them; it is not in force
            a.yaml:7:19: 100 retries would multiply an outage instead of bridging it: 10 at most; it is not in force
            a.yaml:7:41: `per_try_timeout` (2s) is longer than `timeouts.request` (1s), which ends them all; it is not in force
            a.yaml:9:38: `max_connections: 0` would let nothing through: leave it out for no limit; it is not in force
            a.yaml:14:3: `hash_on` needs the policy `ring_hash` or `maglev`: `least_request` does not hash; it is not in force
            a.yaml:16:1: which nodes? give `name` or `labels`; what holds for all of them belongs into `kind: Mesh`; it is not in force
            a.yaml:23:15: `a` is listed twice; it is not in force
            a.yaml:23:26: 127.0.0.1:1 is listed twice; it is not in force
            a.yaml:24:26: port 0 is not a port: 1 to 65535; it is not in force
            a.yaml:28:1: `rules` is empty: without rules leave the document out; it is not in force
            a.yaml:33:28: `v1` is not a path: it starts with `/`; it is not in force
            a.yaml:34:27: `` is not a path: it starts with `/`; it is not in force
            a.yaml:35:23: `x y` is not the name of a header; it is not in force
            a.yaml:35:47: an empty `prefix` matches everything: write `present: true` for any value; it is not in force
            a.yaml:35:57: a value of several lines never comes; it is not in force
            a.yaml:36:5: all weights are 0: no request would go anywhere; it is not in force
            a.yaml:38:5: `split` and `redirect` together: a request goes one way or the other; it is not in force
            a.yaml:38:5: the weights add up to 8000000000, more than 4294967295; it is not in force
            a.yaml:41:5: these redirects lead back to themselves: / -> /x; it is not in force
            a.yaml:46:7: `service` and `host` together: a service is reached without telling the client; it is not in force
            a.yaml:47:7: `service` and `code` together: a service is reached without telling the client; it is not in force
            a.yaml:49:5: a redirect to where the request came from: give one of `service`, `scheme`, `host`, `port`, `path` or `prefix`; it is not in force
            a.yaml:49:22: 304 is not a redirect: 301, 302, 303, 307 or 308; it is not in force
            a.yaml:51:16: `path` and `prefix` together: replace all of the path, or its beginning; it is not in force
            a.yaml:51:16: `prefix` replaces what `match: {path: {prefix: ..}}` matched, and this rule has none; it is not in force
            a.yaml:51:24: `s` is not a path: it starts with `/`; it is not in force
            a.yaml:51:43: port 0 is not a port: 1 to 65535; it is not in force
            a.yaml:51:52: `http://x` is not a host: no scheme, no port, no path; it is not in force
            a.yaml:51:70: 200 is not a redirect: 301, 302, 303, 307 or 308; it is not in force
            a.yaml:54:43: `per_try_timeout` (1500ms) is longer than `timeout` (1s), which ends them all; it is not in force
            a.yaml:58:20: 101 percent is more than all of them: 0 to 100; it is not in force
            a.yaml:61:20: `percent`: expected a whole number from 0 to 4294967295, found the number -1; it is not in force
            a.yaml:61:33: `on_loss`: expected one of `open` or `closed`, found `fail`; it is not in force
            a.yaml:61:39: unknown field `share`: expected one of `percent` or `on_loss`; it is not in force
            a.yaml:62:11: `outbound`: expected one of `allow-any` or `registry-only`, found `deny`; it is not in force
            a.yaml:66:1: unknown field `outbound`: expected one of `name`, `protocol`, `port`, `subsets`, `load_balancing`, `timeouts`, `retry`, `outlier_detection`, `connection_limits` or `capture`; it is not in force
        "#]],
    );
}

#[test]
fn what_is_captured_is_said_value_by_value_and_the_strongest_word_counts() {
    let (documents, problems) = update(
        &mut Library::default(),
        "
== a.yaml
kind: Mesh
capture: {percent: 10, on_loss: open}
outbound: registry-only
---
kind: Service
name: orders
capture: {percent: 50}
---
kind: Node
labels: {role: web}
capture: {on_loss: closed}
---
kind: Node
name: web-1
outbound: allow-any
",
    );
    assert_eq!(problems, "");
    let said = |service: &str, nodes: &[Arc<PlacedDocument<NodeDocument>>]| {
        let settings = documents.settings(&service.parse().unwrap(), nodes);
        let CaptureSettings { percent, on_loss } = settings.capture;
        let by: Vec<_> = settings.origins.iter().map(|(name, by)| format!("{name} by {by}")).collect();
        format!("{percent:?} {on_loss:?} {:?}: {}", documents.outbound(nodes), by.join(", "))
    };
    expect!["Some(50) Some(Closed) AllowAny: capture.on_loss by Node `{role: web}` (a.yaml:9:1), capture.percent by Service `orders` (a.yaml:5:1)"]
        .assert_eq(&said("orders", &documents.nodes));
    expect!["Some(10) Some(Open) RegistryOnly: capture.on_loss by Mesh (a.yaml:1:1), capture.percent by Mesh (a.yaml:1:1)"]
        .assert_eq(&said("payments", &[]));
}

#[test]
fn a_rule_that_can_never_match_is_reported() {
    check(
        "
== a.yaml
kind: Route
service: a
rules:
  - match: {path: {prefix: /v2}, headers: {x-canary: 'true'}}
  - match: {path: {prefix: /v2}}
  - match: {path: {exact: /v2/x}}
  - match: {path: {prefix: /v2/}, method: GET}
  - match: {path: {exact: /y}}
  - match: {path: {exact: /y}, method: PUT}
  - match: {path: {prefix: /}}
  - match: {headers: {x-late: 'true'}}
  - timeout: 5s
",
        expect![[r#"
            a.yaml:6:5: this rule can never match: the rule in line 5 takes every path below `/v2`; it is not in force
            a.yaml:7:5: this rule can never match: the rule in line 5 takes every path below `/v2`; it is not in force
            a.yaml:9:5: this rule can never match: the rule in line 8 takes every request for `/y`; it is not in force
            a.yaml:11:5: this rule can never match: the rule in line 10 takes every request; it is not in force
            a.yaml:12:5: this rule can never match: the rule in line 10 takes every request; it is not in force
        "#]],
    );
}

#[test]
fn redirects_that_lead_back_to_themselves_are_reported() {
    check(
        "
== a.yaml
kind: Route
service: a
rules:
  - match: {path: {exact: /a}}
    redirect: {path: /b}
  - match: {path: {exact: /b}}
    redirect: {path: /a}
  - match: {path: {prefix: /v1}}
    redirect: {prefix: /v1/new}
  - match: {path: {prefix: /x/}}
    redirect: {prefix: /y/}
  - match: {path: {prefix: /canary}, headers: {x-done: {present: false}}}
    redirect: {path: /canary/done}
  - match: {path: {prefix: /tls}}
    redirect: {scheme: https}
  - redirect: {path: /login}
",
        expect![[r#"
            a.yaml:5:5: these redirects lead back to themselves: /a -> /b -> /a; it is not in force
            a.yaml:7:5: these redirects lead back to themselves: /b -> /a -> /b; it is not in force
            a.yaml:9:5: these redirects lead back to themselves: /v1 -> /v1/new; it is not in force
            a.yaml:13:5: these redirects lead back to themselves: /canary -> /canary/done; it is not in force
            a.yaml:16:5: these redirects lead back to themselves: / -> /login; it is not in force
        "#]],
    );
}

#[test]
fn expressions_that_re2_lacks_are_reported() {
    let all: String = [
        "/a/(?P<name>[^/]+)", "(?i)abc", "a{2,3}?", "[]a]", "[^]]", "\\d+\\.\\w*?", "a{x}", "(?i:a)|b", "[[:alpha:]\\]]", "^*",
        "", "(?=a)", "a(?!b)", "(?<=a)b", "(?<!a)b", "(?>a)", "(a)\\1", "(?P=n)", "\\k<n>", "a++", "a**", "*a", "a|+",
        "(a", "a)", "[a", "a\\", "a{1001}", "a{3,1}", "{2}",
    ]
    .into_iter()
    .map(|regex| {
        let text = serde_json::json!({"kind": "Route", "service": "a", "rules": [{"match": {"path": {"regex": regex}}}]});
        let (_, problems) = update(&mut Library::default(), &format!("== a\n{text}"));
        let said = problems.split_once(": ").map_or("taken", |(_, said)| said.split(';').next().unwrap());
        format!("{regex}   {}\n", said.trim())
    })
    .collect();
    expect![[r#"
        /a/(?P<name>[^/]+)   taken
        (?i)abc   taken
        a{2,3}?   taken
        []a]   taken
        [^]]   taken
        \d+\.\w*?   taken
        a{x}   taken
        (?i:a)|b   taken
        [[:alpha:]\]]   taken
        ^*   taken
           an empty expression
        (?=a)   RE2, which Envoy uses, has no look-ahead
        a(?!b)   RE2, which Envoy uses, has no look-ahead
        (?<=a)b   RE2, which Envoy uses, has no look-behind
        (?<!a)b   RE2, which Envoy uses, has no look-behind
        (?>a)   RE2, which Envoy uses, has no atomic groups
        (a)\1   RE2, which Envoy uses, has no back-references
        (?P=n)   RE2, which Envoy uses, has no back-references
        \k<n>   RE2, which Envoy uses, has no back-references
        a++   RE2, which Envoy uses, has no possessive repetition
        a**   a `*` that repeats nothing
        *a   a `*` that repeats nothing
        a|+   a `+` that repeats nothing
        (a   a `(` that is never closed
        a)   a `)` without a `(`
        [a   a `[` that is never closed
        a\   it ends with a `\` that escapes nothing
        a{1001}   more than 1000 repetitions
        a{3,1}   at least 3 and at most 1 repetitions
        {2}   a `{..}` that repeats nothing
    "#]]
    .assert_eq(&all);
    let long =
        format!("== a\nkind: Route\nservice: a\nrules: [match: {{path: {{regex: {}}}}}]", "a".repeat(2000));
    check(
        &long,
        expect![[r#"
        a:3:31: an expression of 2000 bytes: 1024 at most; it is not in force
    "#]],
    );
}

#[test]
fn the_last_good_version_of_a_bad_document_stays_in_force() {
    let mut library = Library::default();
    expect![[r#"
        Service orders [v1 v2] (mesh.d/orders.yaml:1:1)
        Route orders with 2 rules (mesh.d/orders.yaml:7:1)
    "#]]
    .assert_eq(&show(&mut library, DESIGN));
    let typo = DESIGN.replace("outlier_detection", "outlyer_detection");
    expect![[r#"
        Service orders [v1 v2] (mesh.d/orders.yaml:1:1)
        Route orders with 2 rules (mesh.d/orders.yaml:7:1)
        mesh.d/orders.yaml:5:1: unknown field `outlyer_detection`, did you mean `outlier_detection`? Its last good version stays in force
    "#]].assert_eq(&show(&mut library, &typo));
    let broken = DESIGN.replace("kind: Route", "kind: Route\nrules: [");
    expect![[r#"
        Service orders [v1 v2] (mesh.d/orders.yaml:1:1)
        Route orders with 2 rules (mesh.d/orders.yaml:7:1)
        mesh.d/orders.yaml:10:6: a `,` or `}` is missing here; what was last read of this file stays in force
    "#]]
    .assert_eq(&show(&mut library, &broken));
    expect![[r#"
        Service orders [v1 v2] (mesh.d/orders.yaml:1:1)
        Route orders with 2 rules (mesh.d/orders.yaml:7:1)
        mesh.d/orders.yaml: the file is empty; what was last read of this file stays in force
    "#]]
    .assert_eq(&show(&mut library, "== mesh.d/orders.yaml\n"));
    expect![[r#"
        Service orders [v1 v2] (mesh.d/orders.yaml:1:1)
        Route orders with 2 rules (mesh.d/orders.yaml:7:1)
        mesh.d/orders.yaml: permission denied; what was last read of this file stays in force
    "#]]
    .assert_eq(&show(&mut library, "== mesh.d/orders.yaml\nunreadable: permission denied"));
    expect![[r#"
        Service orders [v1 v2] (mesh.d/orders.yaml:1:1)
        Route orders with 2 rules (mesh.d/orders.yaml:7:1)
    "#]]
    .assert_eq(&show(&mut library, DESIGN));
    expect![].assert_eq(&show(&mut library, "== mesh.d/orders.yaml\n# moved elsewhere\n"));
    expect![[r#"
        mesh.d/orders.yaml:5:1: unknown field `outlyer_detection`, did you mean `outlier_detection`? It is not in force
        mesh.d/orders.yaml:11:22: no Service document for `orders` says what its subset `v2` is; it is not in force
        mesh.d/orders.yaml:12:22: no Service document for `orders` says what its subset `v1` is; it is not in force
        mesh.d/orders.yaml:12:48: no Service document for `orders` says what its subset `v2` is; it is not in force
    "#]].assert_eq(&show(&mut library, &typo));
}

#[test]
fn a_deleted_document_is_gone_and_a_moved_one_is_not() {
    let mut library = Library::default();
    show(&mut library, "== a.yaml\nkind: Service\nname: a\n---\nkind: Service\nname: b\n");
    expect![[r#"
        Service b [] (a.yaml:1:1)
    "#]]
    .assert_eq(&show(&mut library, "== a.yaml\nkind: Service\nname: b\n"));
    expect![[r#"
        Service b [] (a.yaml:1:1)
        c.yaml:3:7: `port`: expected a whole number from 0 to 65535, found the text `x`; its last good version stays in force
    "#]].assert_eq(&show(&mut library, "== c.yaml\nkind: Service\nname: b\nport: x\n"));
    expect![].assert_eq(&show(&mut library, ""));
}

#[test]
fn the_first_of_two_documents_of_one_name_is_in_force() {
    let mut library = Library::default();
    let two = "
== b.yaml
kind: Service
name: a
port: 2
---
kind: Mesh
---
kind: Node
name: n
---
kind: Node
labels: {b: 1, a: 2}
== a.yaml
kind: Service
name: a
port: 1
---
kind: Mesh
---
kind: Node
name: n
---
kind: Node
labels: {a: 2, b: 1}
";
    expect![[r#"
        Mesh (a.yaml:5:1)
        Service a [] (a.yaml:1:1)
        Node {a: 2, b: 1} (a.yaml:10:1)
        Node n (a.yaml:7:1)
        b.yaml:1:1: a second Service `a`: the one at a.yaml:1:1 counts
        b.yaml:5:1: a second Mesh: the one at a.yaml:5:1 counts
        b.yaml:7:1: a second Node `n`: the one at a.yaml:7:1 counts
        b.yaml:10:1: a second Node `{a: 2, b: 1}`: the one at a.yaml:10:1 counts
    "#]]
    .assert_eq(&show(&mut library, two));
    assert_eq!(library.documents().services["a"].port, Some(1));
    // The first document is chosen even if it is bad: the choice must not depend on which one is good.
    let bad = two.replace("port: 1", "port: 0");
    expect![[r#"
        Mesh (a.yaml:5:1)
        Service a [] (a.yaml:1:1)
        Node {a: 2, b: 1} (a.yaml:10:1)
        Node n (a.yaml:7:1)
        a.yaml:3:7: port 0 is not a port: 1 to 65535; its last good version stays in force
        b.yaml:1:1: a second Service `a`: the one at a.yaml:1:1 counts
        b.yaml:5:1: a second Mesh: the one at a.yaml:5:1 counts
        b.yaml:7:1: a second Node `n`: the one at a.yaml:7:1 counts
        b.yaml:10:1: a second Node `{a: 2, b: 1}`: the one at a.yaml:10:1 counts
    "#]]
    .assert_eq(&show(&mut library, &bad));
    assert_eq!(library.documents().services["a"].port, Some(1));
}

const SUBSETS: &str = "
== a.yaml
kind: Service
name: a
subsets: {stable: {version: v1}, canary: {version: v2}}
== r.yaml
kind: Route
service: a
rules:
  - split: [{subset: stable}, {subset: canary}]
";

#[test]
fn a_route_whose_subset_does_not_exist_keeps_its_last_good_version() {
    let mut library = Library::default();
    expect![[r#"
        Service a [canary stable] (a.yaml:1:1)
        Route a with 1 rules (r.yaml:1:1)
    "#]]
    .assert_eq(&show(&mut library, SUBSETS));
    let typo = SUBSETS.replace("subset: canary", "subset: canarry");
    expect![[r#"
        Service a [canary stable] (a.yaml:1:1)
        Route a with 1 rules (r.yaml:1:1)
        r.yaml:4:40: `a` has no subset `canarry`, did you mean `canary`? Its last good version stays in force
    "#]]
    .assert_eq(&show(&mut library, &typo));
    expect![[r#"
        Service a [canary stable] (a.yaml:1:1)
        r.yaml:4:40: `a` has no subset `canarry`, did you mean `canary`? It is not in force
    "#]]
    .assert_eq(&show(&mut Library::default(), &typo));
    // The service loses the subset to which the route refers.
    let taken = SUBSETS.replace(", canary: {version: v2}", "");
    expect![[r#"
        Service a [stable] (a.yaml:1:1)
        r.yaml:4:40: `a` has no subset `canary`: it has `stable`; it is not in force
    "#]]
    .assert_eq(&show(&mut library, &taken));
    expect![[r#"
        Service a [canary stable] (a.yaml:1:1)
        Route a with 1 rules (r.yaml:1:1)
    "#]]
    .assert_eq(&show(&mut library, SUBSETS));
    let none = SUBSETS.replace("subsets:", "#");
    expect![[r#"
        Service a [] (a.yaml:1:1)
        r.yaml:4:22: `a` has no subsets, so no `stable`; it is not in force
        r.yaml:4:40: `a` has no subsets, so no `canary`; it is not in force
    "#]]
    .assert_eq(&show(&mut library, &none));
    let alone = SUBSETS.replace("name: a", "name: b");
    expect![[r#"
        Service b [canary stable] (a.yaml:1:1)
        r.yaml:4:22: no Service document for `a` says what its subset `stable` is; it is not in force
        r.yaml:4:40: no Service document for `a` says what its subset `canary` is; it is not in force
    "#]]
    .assert_eq(&show(&mut library, &alone));
    let other = SUBSETS.replace("{subset: canary}", "{service: b, subset: v2}");
    expect![[r#"
        Service a [canary stable] (a.yaml:1:1)
        Route a with 1 rules (r.yaml:1:1)
        r.yaml:4:52: no Service document for `b` says what its subset `v2` is; its last good version stays in force
    "#]].assert_eq(&show(&mut library, &other));
}

#[test]
fn a_new_redirect_that_closes_a_circle_gives_way_to_what_was_there() {
    let route = |from: &str, to: &str| {
        format!(
            "== {from}.yaml\nkind: Route\nservice: {from}\nrules:\n  - match: {{path: {{prefix: /x}}}}\n    redirect: {{service: {to}}}\n"
        )
    };
    let mut library = Library::default();
    expect![[r#"
        Route a with 1 rules (a.yaml:1:1)
        Route b with 1 rules (b.yaml:1:1)
        Route d with 1 rules (d.yaml:1:1)
    "#]]
    .assert_eq(&show(&mut library, &(route("a", "b") + &route("b", "c") + &route("d", "a"))));
    expect![[r#"
        Route a with 1 rules (a.yaml:1:1)
        Route b with 1 rules (b.yaml:1:1)
        Route d with 1 rules (d.yaml:1:1)
        c.yaml:5:25: redirects in a circle: c -> a -> b -> c; it is not in force
    "#]]
    .assert_eq(&show(
        &mut library,
        &(route("a", "b") + &route("b", "c") + &route("c", "a") + &route("d", "a")),
    ));
    expect![[r#"
        Route a with 1 rules (a.yaml:1:1)
        Route b with 1 rules (b.yaml:1:1)
        Route d with 1 rules (d.yaml:1:1)
        b.yaml:5:25: redirects in a circle: b -> a -> b; its last good version stays in force
        d.yaml:5:25: redirects in a circle: d -> d; its last good version stays in force
    "#]]
    .assert_eq(&show(&mut library, &(route("a", "b") + &route("b", "a") + &route("d", "d"))));
    expect![[r#"
        Route c with 1 rules (c.yaml:1:1)
        a.yaml:5:25: redirects in a circle: a -> b -> a; it is not in force
        b.yaml:5:25: redirects in a circle: b -> a -> b; it is not in force
    "#]]
    .assert_eq(&show(&mut Library::default(), &(route("a", "b") + &route("b", "a") + &route("c", "a"))));
}

#[test]
fn documents_that_did_not_change_keep_their_pointer() {
    let mut library = Library::default();
    let (before, _) = update(&mut library, SUBSETS);
    let (same, _) = update(&mut library, SUBSETS);
    assert!(Arc::ptr_eq(&before, &same));
    let (after, _) =
        update(&mut library, &SUBSETS.replace("stable}, {subset", "stable, weight: 9}, {subset"));
    assert!(!Arc::ptr_eq(&before, &after));
    assert!(Arc::ptr_eq(&before.services["a"], &after.services["a"]));
    assert!(!Arc::ptr_eq(&before.routes["a"], &after.routes["a"]));
    let (commented, _) = update(&mut library, &(SUBSETS.to_owned() + "# a comment\n"));
    assert!(Arc::ptr_eq(&before.services["a"], &commented.services["a"]));
}

#[test]
fn the_last_good_versions_outlive_a_restart() {
    let mut before = Library::default();
    let json = r#"
== more.json
  [ {"kind": "Service", "name": "payments", "port": 80},
    {"kind": "Mesh"} ]
"#;
    show(&mut before, &(DESIGN.to_owned() + json));
    let saved = serde_json::to_string(&before.last_good()).unwrap();
    let kept: Vec<SavedDocument> = serde_json::from_str(&saved).unwrap();
    let mut after = Library::restored(kept);
    let broken =
        (DESIGN.to_owned() + json).replace("name: orders", "name: orders\nport: 0").replace("Route", "Rout");
    let broken = broken.replace("80}", "80");
    expect![[r#"
        Mesh (more.json:2:5)
        Service orders [v1 v2] (mesh.d/orders.yaml:1:1)
        Service payments [] (more.json:1:5)
        Route orders with 2 rules (mesh.d/orders.yaml:7:1)
        mesh.d/orders.yaml:3:7: port 0 is not a port: 1 to 65535; its last good version stays in force
        mesh.d/orders.yaml:8:7: unknown kind `Rout`, did you mean `Route`? What was last read of this file stays in force
        more.json:1:5: this `{` is closed by a `]`; what was last read of this file stays in force
    "#]].assert_eq(&show(&mut after, &broken));
    assert_eq!(after.last_good(), before.last_good());
}

#[test]
fn a_saved_document_may_stand_far_to_the_right() {
    for column in [1, 65_537, u32::MAX] {
        let kept = serde_json::json!([{"file": "a.json", "line": 1, "column": column, "text": "{}"}]);
        let kept: Vec<SavedDocument> = serde_json::from_value(kept).unwrap();
        assert_eq!(Library::restored(kept).last_good(), []);
    }
}

#[test]
fn no_text_breaks_the_reader() {
    let text = DESIGN.as_bytes();
    let mut library = Library::default();
    let mut read = |bytes: &[u8]| {
        let (_, problems) = library.update(&[DocumentFile { path: "a", content: Ok(bytes) }]);
        assert!(problems.iter().all(|p| !p.message.is_empty() && !p.message.contains('\n')), "{problems:?}");
        _ = strict_bytes::<Config>("a", bytes);
    };
    for cut in 0..text.len() {
        read(&text[..cut]);
        read(&text[cut..]);
        for byte in b"\0\t\n :-{}[]\"'&*!|>%#,\xff\x80<" {
            let mut changed = text.to_vec();
            changed[cut] = *byte;
            read(&changed);
        }
    }
}

#[test]
fn a_document_that_comes_later_does_not_take_over_from_one_in_force() {
    let mut library = Library::default();
    let incumbent: &[u8] = b"kind: Service\nname: orders\nport: 80\n";
    let newcomer: &[u8] = b"kind: Service\nname: orders\nport: 81\n";
    let file = |path, content| DocumentFile { path, content: Ok(content) };
    library.update(&[file("z.yaml", incumbent)]);
    let (documents, problems) = library.update(&[file("a.yaml", newcomer), file("z.yaml", incumbent)]);
    let orders: ServiceName = "orders".parse().unwrap();
    assert_eq!(documents.services[&orders].port, Some(80));
    let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
    assert_eq!(problems, ["a.yaml:1:1: a second Service `orders`: the one at z.yaml:1:1 counts"]);
    // The document in force is also preferred after a restart.
    let mut library = Library::restored(library.last_good());
    let (documents, _) = library.update(&[file("a.yaml", newcomer), file("z.yaml", incumbent)]);
    assert_eq!(documents.services[&orders].port, Some(80));
}
