mod native;

use expect_test::{Expect, expect};

use super::*;

fn show(parsed: &ParseResult, format: Option<Format>) -> String {
    let mut shown = format.map_or_else(|| "?".to_owned(), |format| format.to_string());
    if parsed.has_failed() {
        shown += " FAILED";
    }
    if parsed.says_nothing {
        shown += " says nothing";
    }
    shown += "\n";
    for service in &parsed.services {
        shown += &format!("{}", service.name);
        shown += &service.protocol.map(|protocol| format!(" {protocol}")).unwrap_or_default();
        shown += &service.port.map(|port| format!(" port {port}")).unwrap_or_default();
        shown += &format!(" ({})\n", service.place);
        for endpoint in &service.endpoints {
            shown += &format!("  {} weight {} {}", endpoint.address, endpoint.weight.get(), endpoint.health);
            shown += &endpoint.zone.as_ref().map(|zone| format!(" zone {zone}")).unwrap_or_default();
            shown +=
                &endpoint.version.as_ref().map(|version| format!(" version {version}")).unwrap_or_default();
            if !endpoint.labels.is_empty() {
                shown += &format!(" {:?}", endpoint.labels);
            }
            shown += "\n";
        }
    }
    for name in &parsed.unreadable {
        shown += &format!("{name} unreadable\n");
    }
    for problem in &parsed.problems {
        shown += &format!("{problem}\n");
    }
    shown
}

fn read_as(format: Format, file: &str, text: impl AsRef<[u8]>) -> String {
    let stem = file.trim_end_matches(".yaml").trim_end_matches(".json");
    let is_yaml = stem != file;
    let (parsed, found) = parse(&file.into(), stem, is_yaml, text.as_ref(), yaml::MAX_TEXT, format, None);
    show(&parsed, found)
}

fn check(file: &str, text: impl AsRef<[u8]>, expected: Expect) {
    expected.assert_eq(&read_as(Format::Auto, file, text));
}

#[test]
fn prometheus_groups_are_services_by_label() {
    check(
        "targets.json",
        r#"[
  {"targets": ["10.1.0.4:8080", "10.1.0.5:8080"], "labels": {"service": "pay", "zone": "dc1-a", "version": "v3", "team": "x", "__meta_y": "z"}},
  {"targets": ["10.1.0.6:8080"], "labels": {"service": "pay", "az": "dc1-b", "weight": "0.5", "protocol": "http"}},
  {"targets": ["10.2.0.1:443"], "labels": {"job": "web", "__scheme__": "https", "weight": "0"}},
  {"targets": ["node:9100"]},
  {"targets": [], "labels": {"service": "gone"}}
]"#,
        expect![[r#"
            prometheus
            gone (targets.json:6:3)
            pay http (targets.json:2:3)
              10.1.0.4:8080 weight 100 unknown zone dc1-a version v3 {"team": "x"}
              10.1.0.5:8080 weight 100 unknown zone dc1-a version v3 {"team": "x"}
              10.1.0.6:8080 weight 50 unknown zone dc1-b
            targets (targets.json:5:3)
              node:9100 weight 1 unknown
            web tls (targets.json:4:3)
              10.2.0.1:443 weight 1 draining
        "#]],
    );
}

#[test]
fn bad_prometheus_groups() {
    check(
        "targets.yaml",
        "
- targets: [10.1.0.4, 'http://a:80/x', 10.1.0.5:80, 10.1.0.6:80, 10.1.0.7:80, 10.1.0.8:80, 10.1.0.9:80, 10.1.0.10:80]
  labels: {service: pay}
- targets: [10.2.0.4:80]
  labels: {service: web, protocol: soap}
- targets: [10.3.0.4:80]
  labels: {service: api, weight: many}
- targets: [10.4.0.4:80]
  labels: {service: x, protocol: http}
- targets: [10.4.0.5:80]
  labels: {service: x, protocol: grpc}
",
        expect![[r#"
            prometheus
            api (targets.yaml:6:3)
              10.3.0.4:80 weight 1 unknown
            pay (targets.yaml:2:3)
              10.1.0.5:80 weight 1 unknown
              10.1.0.6:80 weight 1 unknown
              10.1.0.7:80 weight 1 unknown
              10.1.0.8:80 weight 1 unknown
              10.1.0.9:80 weight 1 unknown
              10.1.0.10:80 weight 1 unknown
            web (targets.yaml:4:3)
              10.2.0.4:80 weight 1 unknown
            x http (targets.yaml:8:3)
              10.4.0.4:80 weight 1 unknown
              10.4.0.5:80 weight 1 unknown
            targets.yaml:2:13: `10.1.0.4` has no port: write `10.1.0.4:8080`, an address and a port; this endpoint is left out
            targets.yaml:2:23: `http://a:80/x`: only a host and a port, without scheme and path; this endpoint is left out
            targets.yaml:5:36: `soap` is not a protocol that vmesh knows; it is ignored
            targets.yaml:7:34: `many` is not a weight: a number from 0 to 1000000; it is ignored
            targets.yaml:10:3: grpc here and http in line 8: the first is used
        "#]],
    );
    check(
        "targets.yaml",
        "- targets: [a:1]\n  label: {service: a}\n-\n",
        expect![[r#"
            prometheus FAILED
            targets.yaml:2:3: unknown field `label`, did you mean `labels`?
        "#]],
    );
    check(
        "targets.yaml",
        "- targets: [a:1]\n  labels: {service: a b}\n",
        expect![[r#"
            prometheus
            targets.yaml:2:21: the label `service` names the service, and `a b` is not a service name: 1 to 253 letters, digits, `.`, `_` or `-`, the first and the last a letter or a digit; this group is left out
        "#]],
    );
    expect![[r#"
        prometheus FAILED
        a.yaml:1:1: a file of Prometheus is a list of groups: write `- targets: ..`, or `[{"targets": ..}]`
    "#]]
    .assert_eq(&read_as(Format::Prometheus, "a.yaml", "targets: [a:1]"));
}

#[test]
fn linkerd_lists_are_lines() {
    check(
        "pay",
        "# payment pool\r\n10.1.0.4 8080\r\n10.1.0.5 8080 * 2.5     # new box\r\npay-old.internal 8080\r\n127.1 8888\r\n::1 80\r\n10.1.0.6:80\r\n10.1.0.7:80 * 0\r\n\r\n",
        expect![[r#"
            linkerd
            pay (pay)
              10.1.0.4:8080 weight 100 unknown
              10.1.0.5:8080 weight 250 unknown
              pay-old.internal:8080 weight 100 unknown
              127.0.0.1:8888 weight 100 unknown
              [::1]:80 weight 100 unknown
              10.1.0.6:80 weight 100 unknown
              10.1.0.7:80 weight 1 draining
        "#]],
    );
    check(
        "pay",
        "10.1.0.1 80\n10.1.0.2 80\n10.1.0.3 80\n10.1.0.4 80\n10.1.0.5 80\n10.1.0.6 80\n10.1.0.7 80\n10.1.0.8 80\n10.1.0.9 80\n10.1.0.10 80\n10.1.0.11 80\n10.1.0.12 80\n\
         10.1.2.310.4.5.6:9000\n10.2.0.1 0\n\t10.2.0.2  80  x 3\n10.2.0.3 80 * NaN\n",
        expect![[r#"
            linkerd
            pay (pay)
              10.1.0.1:80 weight 1 unknown
              10.1.0.2:80 weight 1 unknown
              10.1.0.3:80 weight 1 unknown
              10.1.0.4:80 weight 1 unknown
              10.1.0.5:80 weight 1 unknown
              10.1.0.6:80 weight 1 unknown
              10.1.0.7:80 weight 1 unknown
              10.1.0.8:80 weight 1 unknown
              10.1.0.9:80 weight 1 unknown
              10.1.0.10:80 weight 1 unknown
              10.1.0.11:80 weight 1 unknown
              10.1.0.12:80 weight 1 unknown
            pay:13:1: `10.1.2.310.4.5.6` is neither an IP address nor a host name; this endpoint is left out
            pay:14:10: port 0 is not a port: 1 to 65535; this endpoint is left out
            pay:15:16: `x` after the endpoint: expected `host port * weight`; this endpoint is left out
            pay:16:15: `NaN` is not a weight: a number from 0 to 1000000; this endpoint is left out
        "#]],
    );
    expect![[r#"
        linkerd FAILED
        pay.v2: the file is empty: if it has no service on purpose, write `[]` or a comment
    "#]]
    .assert_eq(&read_as(Format::Linkerd, "pay.v2", "just words here\n"));
}

#[test]
fn a_list_whose_lines_end_with_carriage_returns_alone_is_a_list() {
    check(
        "pay",
        "# payment pool\r10.1.0.4 8080\r10.1.0.5 x\r",
        expect![[r#"
            linkerd
            pay (pay)
              10.1.0.4:8080 weight 1 unknown
            pay:3:10: `x` is not a port: 1 to 65535; this endpoint is left out
        "#]],
    );
}

#[test]
fn smartstack_lists_are_instances() {
    check(
        "pay.json",
        r#"[{"name":"web1","host":"10.1.0.4","port":8080,"id":3,"weight":20,"haproxy_server_options":"","labels":{"az":"a1","rack":"r1"}},
 {"name":"web2","host":"web2.internal","port":"8081"},
 {"host":"10.1.0.6","port":8080,"weight":0},
 {"host":"10.1.0.7","port":8080,"disabled":true}]"#,
        expect![[r#"
            smartstack
            pay (pay.json)
              10.1.0.4:8080 weight 20 unknown zone a1 {"rack": "r1"}
              web2.internal:8081 weight 10 unknown
              10.1.0.6:8080 weight 1 draining
              10.1.0.7:8080 weight 10 draining
        "#]],
    );
    check(
        "pay.json",
        r#"[{"host":"10.1.0.4","port":8080}, {"host":"10.1.0.5","port":null}, {"host":"10.1.0 6","port":1}, {"host":"10.1.0.7","port":99999}, {"port":1}]"#,
        expect![[r#"
            smartstack
            pay (pay.json)
              10.1.0.4:8080 weight 1 unknown
            pay.json:1:61: `port`: expected a text, found nothing; this endpoint is left out
            pay.json:1:76: `10.1.0 6` is neither an IP address nor a host name; this endpoint is left out
            pay.json:1:124: port 99999 is out of range: 1 to 65535; this endpoint is left out
            pay.json:1:132: `host` is missing; this endpoint is left out
        "#]],
    );
    expect![[r#"
        smartstack FAILED
        pay.json:1:1: expected a list of instances (`host`, `port`), found a mapping
    "#]]
    .assert_eq(&read_as(Format::SmartStack, "pay.json", r#"{"host": "a", "port": 1}"#));
}

#[test]
fn a_file_keeps_its_format_unless_all_is_right_in_another() {
    let again = |sticky, text: &str| {
        let (parsed, found) =
            parse(&"pay".into(), "pay", false, text.as_bytes(), yaml::MAX_TEXT, Format::Auto, Some(sticky));
        show(&parsed, found)
    };
    expect![[r#"
        linkerd
        pay (pay)
          10.0.0.1:80 weight 1 unknown
    "#]]
    .assert_eq(&again(Format::Linkerd, "10.0.0.1 80\n"));
    expect![[r#"
        linkerd says nothing
    "#]]
    .assert_eq(&again(Format::Linkerd, "service: pay\nendpoints: [10.0.0.1:80]\n"));
    expect![[r#"
        linkerd
        pay (pay)
          10.0.0.1:80 weight 1 unknown
          10.0.0.0:80 weight 1 unknown
    "#]]
    .assert_eq(&again(Format::Native, "10.0.0.1 80\n10.0.0 80\n"));
    expect![[r#"
        smartstack says nothing
    "#]]
    .assert_eq(&again(Format::SmartStack, "[]"));
}

#[test]
fn no_bytes_break_a_parser() {
    let samples: [&[u8]; 4] = [
        b"service: a\nport: 80\nendpoints:\n- 10.0.0.1:80\n- {address: \"b:1\", weight: 0.5, labels: {a: b}}\n",
        b"- targets: ['a:1', 'b:2']\n  labels: {job: x, weight: '2', __scheme__: https}\n",
        b"# pool\n10.0.0.1 80 * 2.5\n::1 80\nb:1\n",
        b"[{\"host\": \"a\", \"port\": 1, \"weight\": 3, \"labels\": {\"az\": \"z\"}}]",
    ];
    let formats = [Format::Auto, Format::Native, Format::Prometheus, Format::Linkerd, Format::SmartStack];
    let read = |bytes: &[u8]| {
        for format in formats {
            let (parsed, _) =
                parse(&"a".into(), "a", false, bytes, yaml::MAX_TEXT, format, Some(Format::Native));
            assert!(parsed.problems.iter().all(|problem| !problem.message.contains('\n')), "{parsed:?}");
            let is_silent = parsed.has_failed() && parsed.problems.is_empty();
            assert!(!is_silent, "{} fails without a word", String::from_utf8_lossy(bytes));
        }
    };
    for sample in samples {
        for cut in 0..sample.len() {
            read(&sample[..cut]);
            read(&sample[cut..]);
            for byte in b"\0\t\n :-{}[]\"'&*!|>%#,.\xff0" {
                let mut changed = sample.to_vec();
                changed[cut] = *byte;
                read(&changed);
            }
        }
    }
}

/// Returns the content of a file as `format service [addresses, weights] partial | ..`, and its problems.
fn parse_outcome(name: &str, text: &str) -> String {
    let (stem, is_yaml) = match name.rsplit_once('.') {
        Some((stem, _)) => (stem, true),
        None => (name, false),
    };
    let (parsed, format) = parse(&name.into(), stem, is_yaml, text.as_bytes(), 1 << 20, Format::Auto, None);
    let services = parsed.services.iter().map(|service| {
        let endpoints = service.endpoints.iter();
        let endpoints: Vec<_> =
            endpoints.map(|e| format!("{} *{} {}", e.address, e.weight.get(), e.health)).collect();
        let partial =
            service.partial_because.as_ref().map(|why| format!(" PARTIAL {why}")).unwrap_or_default();
        let protocol = service.protocol.map(|protocol| format!(" {protocol}")).unwrap_or_default();
        format!("{}{protocol} {endpoints:?}{partial}\n", service.name)
    });
    let problems = parsed.problems.iter().map(|problem| format!("{problem}\n"));
    let failed = if parsed.has_failed() { "FAILED\n" } else { "" };
    let format = format.map_or("none".to_owned(), |format| format.to_string());
    format!("{format}\n{failed}{}", services.chain(problems).collect::<String>())
}

#[test]
fn null_is_nothing_wherever_the_writers_own_tool_takes_it_so() {
    let prometheus = r#"[{"targets": ["10.0.0.1:80", null], "labels": {"job": "web", "owner": null}},
        {"targets": null, "labels": {"job": "batch"}}, null, {"targets": ["10.0.0.2:80"], "labels": null}]"#;
    expect![[r#"
        prometheus
        b ["10.0.0.2:80 *1 unknown"]
        batch []
        web ["10.0.0.1:80 *1 unknown"]
    "#]]
    .assert_eq(&parse_outcome("b.json", prometheus));
    let synapse = r#"[{"haproxy_server_options": null, "host": "10.0.1.2", "id": 205, "labels": null, "port": 9090, "weight": null},
        {"haproxy_server_options": "check inter 2s disabled", "host": "10.0.1.3", "labels": {"az": null}, "port": 9090, "disabled": null}]"#;
    expect![[r#"
        smartstack
        pay ["10.0.1.2:9090 *1 unknown", "10.0.1.3:9090 *1 draining"]
    "#]]
    .assert_eq(&parse_outcome("pay.json", synapse));
}

#[test]
fn a_label_that_cannot_be_used_costs_itself_and_a_name_its_group() {
    let text = r#"
- {targets: ["10.0.0.8:161"], labels: {job: switches, protocol: snmp}}
- {targets: ["10.0.0.9:443"], labels: {job: portal, protocol: https}}
- {targets: ["10.0.0.10:80"], labels: {job: scale, weight: heavy}}
- {targets: ["10.0.0.5:9100"], labels: {job: "Node Exporter"}}
"#;
    expect![[r#"
        prometheus
        portal tls ["10.0.0.9:443 *1 unknown"]
        scale ["10.0.0.10:80 *1 unknown"]
        switches ["10.0.0.8:161 *1 unknown"]
        e.yml:2:65: `snmp` is not a protocol that vmesh knows; it is ignored
        e.yml:4:60: `heavy` is not a weight: a number from 0 to 1000000; it is ignored
        e.yml:5:46: the label `job` names the service, and `Node Exporter` is not a service name: 1 to 253 letters, digits, `.`, `_` or `-`, the first and the last a letter or a digit; this group is left out
    "#]].assert_eq(&parse_outcome("e.yml", text));
    let text =
        r#"[{"host": "10.0.1.2", "port": 9090, "weight": "heavy"}, {"host": "10.0.1.3", "port": 9090}]"#;
    expect![[r#"
        smartstack
        pay ["10.0.1.2:9090 *1 unknown", "10.0.1.3:9090 *1 unknown"]
        pay.json:1:47: `heavy` is not a weight: a number from 0 to 1000000; it is ignored
    "#]]
    .assert_eq(&parse_outcome("pay.json", text));
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_text_in_any_format() {
    for (name, text) in [
        ("web", "\u{feff}10.0.0.1 8080\r\n10.0.0.2 8080\r\n"),
        ("api", "\u{feff}# pool\r\n10.0.0.1 8080\r\n10.0.0.2 8080\r\n"),
        ("a.yaml", "\u{feff}service: a\nendpoints: [10.0.0.1:8080, 10.0.0.2:8080]\n"),
        (
            "b.json",
            "\u{feff}[{\"host\": \"10.0.0.1\", \"port\": 8080}, {\"host\": \"10.0.0.2\", \"port\": 8080}]",
        ),
        ("c.json", "\u{feff}[{\"targets\": [\"10.0.0.1:8080\", \"10.0.0.2:8080\"]}]"),
    ] {
        let outcome = parse_outcome(name, text);
        assert!(
            outcome.contains(r#"["10.0.0.1:8080 *1 unknown", "10.0.0.2:8080 *1 unknown"]"#),
            "{name}: {outcome}"
        );
    }
}

#[test]
fn an_address_that_can_be_read_in_two_ways_is_left_out_in_every_format() {
    let addresses = ["010.0.0.1", "10.0.0.010", "0x7f.1", "10.0.0.0x1", "1"];
    for address in addresses {
        let bracketed = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
        for (name, text) in [
            ("pay.yaml", format!("endpoints: [\"{bracketed}:80\", \"10.9.9.9:80\"]\n")),
            ("pay", format!("10.9.9.9 80\n{address} 80\n")),
            (
                "pay.json",
                format!("[{{\"host\":\"{address}\",\"port\":80}},{{\"host\":\"10.9.9.9\",\"port\":80}}]"),
            ),
            ("pay.yml", format!("- targets: [\"{bracketed}:80\", \"10.9.9.9:80\"]\n")),
        ] {
            let outcome = parse_outcome(name, &text);
            assert!(
                outcome.contains(r#"pay ["10.9.9.9:80 *1 unknown"]"#) && outcome.contains("left out"),
                "{name}: {outcome}"
            );
        }
    }
    // One address in two spellings is one endpoint.
    let outcome = parse_outcome("pay.yaml", "endpoints: [\"[::ffff:10.0.0.1]:80\", \"10.0.0.1:80\"]\n");
    assert!(outcome.contains(r#"pay ["10.0.0.1:80 *1 unknown"]"#), "{outcome}");
}

#[test]
fn what_is_wrong_is_said_of_what_was_meant() {
    expect![[r#"
        native
        FAILED
        v6.yaml:3:5: a text that begins with `[` has to be in quotes: "[fd00::1]:8080"
    "#]]
    .assert_eq(&parse_outcome("v6.yaml", "service: v6\nendpoints:\n  - [fd00::1]:8080\n"));
    expect![[r#"
        native
        two.yaml:1:13: `10.0.0.1:8080,10.0.0.2:8080`: one address each, `host:port`: make a list of several
    "#]]
    .assert_eq(&parse_outcome("two.yaml", "endpoints: [\"10.0.0.1:8080,10.0.0.2:8080\"]\n"));
    expect![[r#"
        prometheus
        FAILED
        map.yaml:1:1: a file of Prometheus is a list of groups: write `- targets: ..`, or `[{"targets": ..}]`
    "#]]
    .assert_eq(&parse_outcome("map.yaml", "targets:\n  - a1.example:9103\nlabels:\n  job: zk\n"));
    expect![[r#"
        prometheus
        FAILED
        typo.json:1:24: unknown field `target`, did you mean `targets`?
    "#]]
    .assert_eq(&parse_outcome("typo.json", "[{\"labels\":{\"job\":\"x\"},\"target\":[\"10.0.0.3:80\"]}]"));
    let lines = "{\"service\":\"a\",\"endpoints\":[\"10.0.0.1:80\"]}\n{\"service\":\"b\",\"endpoints\":[\"10.0.0.2:80\"]}\n";
    expect![[r#"
        native
        FAILED
        lines.json:2:1: a second JSON value: a file has one, so put them in a list, `[{..}, {..}]`
    "#]]
    .assert_eq(&parse_outcome("lines.json", lines));
    expect![[r#"
        native
        port.yaml:1:7: `port`: port 70000 is out of range: 1 to 65535
    "#]]
    .assert_eq(&parse_outcome("port.yaml", "port: 70000\nendpoints: [10.0.0.1:80]\n"));
    expect![[r#"
        native
        escape.yaml:1:13: ` [31mred` has no port: write ` [31mred:8080`, an address and a port
    "#]]
    .assert_eq(&parse_outcome("escape.yaml", "endpoints: [\"\\e[31mred\"]\n"));
}

#[test]
fn bad_records_cost_themselves_and_leave_the_rest_of_their_service_in_doubt_if_they_are_many() {
    let bad = "a1, a2, a3, a4, a5, a6, 10.8.0.1:80, 10.8.0.2:80";
    let text = format!(
        "- {{service: broken, endpoints: [{bad}]}}\n- {{service: s1, endpoints: [10.0.0.1:80]}}\n- {{endpoints: [10.0.0.9:80]}}\n"
    );
    let (parsed, _) = parse(&"all.yaml".into(), "all", true, text.as_bytes(), 1 << 20, Format::Auto, None);
    let services: Vec<_> = parsed
        .services
        .iter()
        .map(|s| (s.name.as_str(), s.endpoints.len(), s.partial_because.is_some()))
        .collect();
    assert_eq!(services, [("broken", 2, true), ("s1", 1, false)]);
    assert!(!parsed.has_failed() && parsed.has_unnamed);
    let many: Vec<_> =
        (0..206).map(|n| if n < 6 { format!("x{n}") } else { format!("10.0.0.{n}:80") }).collect();
    let text = format!("endpoints: [{}]\n", many.join(", "));
    let (parsed, _) = parse(&"a.yaml".into(), "a", true, text.as_bytes(), 1 << 20, Format::Auto, None);
    assert_eq!((parsed.services[0].endpoints.len(), &parsed.services[0].partial_because), (200, &None));
}

#[test]
fn a_weight_is_what_it_is_written_as_and_a_small_one_is_no_drain() {
    expect![[r#"
        linkerd
        web ["10.0.0.1:80 *1000 unknown", "10.0.0.2:80 *1000 unknown", "10.0.0.3:80 *1 unknown", "10.0.0.4:80 *1 draining"]
    "#]]
        .assert_eq(&parse_outcome("web", "10.0.0.1 80\n10.0.0.2 80\n10.0.0.3 80 * 0.001\n10.0.0.4 80 * 0\n"));
    expect![[r#"
        linkerd
        api ["10.0.0.1:80 *1000000 unknown", "10.0.0.3:80 *1 unknown"]
    "#]]
    .assert_eq(&parse_outcome("api", "10.0.0.1 80 * 1000000\n10.0.0.3 80 * 0.5\n"));
}
