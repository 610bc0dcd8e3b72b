//! The native format.

use super::*;

#[test]
fn a_native_file_is_one_service() {
    check(
        "orders.yaml",
        r#"
service: orders
protocol: http            # tcp (default) | http | http2 | grpc | tls | mysql | ...
port: 80
endpoints:
  - 10.0.1.11:8080
  - {address: "10.0.1.12:8080", zone: eu-1a, version: v2, weight: 2, health: draining, labels: {rack: r7}}
  - address: "[fd00::7]:8080"
  - db.internal:5432
  - 127.1:80
"#,
        expect![[r#"
            native
            orders http port 80 (orders.yaml:2:1)
              10.0.1.11:8080 weight 1 unknown
              10.0.1.12:8080 weight 2 draining zone eu-1a version v2 {"rack": "r7"}
              [fd00::7]:8080 weight 1 unknown
              db.internal:5432 weight 1 unknown
              127.0.0.1:80 weight 1 unknown
        "#]],
    );
    check(
        "team.orders",
        "endpoints: [10.0.0.1:80]\n",
        expect![[r#"
        native
        team.orders (team.orders:1:1)
          10.0.0.1:80 weight 1 unknown
    "#]],
    );
    check(
        "orders.yaml",
        "endpoints: []\n",
        expect![[r#"
        native
        orders (orders.yaml:1:1)
    "#]],
    );
}

#[test]
fn a_native_file_is_several_services() {
    check(
        "all.json",
        r#"[{"service": "a", "endpoints": ["10.0.0.1:80"]}, {"service": "b", "protocol": "grpc", "endpoints": []}]"#,
        expect![[r#"
            native
            a (all.json:1:2)
              10.0.0.1:80 weight 1 unknown
            b grpc (all.json:1:50)
        "#]],
    );
    check(
        "all.yaml",
        "service: a\nendpoints: [10.0.0.1:80]\n---\n- service: b\n  endpoints: []\n",
        expect![[r#"
            native
            a (all.yaml:1:1)
              10.0.0.1:80 weight 1 unknown
            b (all.yaml:4:3)
        "#]],
    );
}

#[test]
fn a_service_with_a_mistake_costs_that_service() {
    check(
        "all.yaml",
        "
- service: a
  protcol: http
  endpoints: [10.0.0.1:80]
- service: b
  protocol: htpp
  port: 0
  endpoints: [10.0.0.2:80]
- service: c
  endpoint: [10.0.0.3:80]
- service: d
  endpoints:
- service: e
  endpoints: {address: 10.0.0.4:80}
- service: f
  endpoints: [10.0.0.5:80]
- service: f
  endpoints: [10.0.0.6:80]
- service: g
  port: 70000
  protocol: soap
  endpoints: 10.0.0.7:80
",
        expect![[r#"
            native
            f (all.yaml:15:3)
              10.0.0.5:80 weight 1 unknown
            a unreadable
            b unreadable
            c unreadable
            d unreadable
            e unreadable
            g unreadable
            all.yaml:3:3: unknown field `protcol`, did you mean `protocol`?
            all.yaml:6:13: `protocol`: `htpp` is not known here, did you mean `http`?
            all.yaml:7:9: `port`: port 0 is not a port: 1 to 65535
            all.yaml:10:3: unknown field `endpoint`, did you mean `endpoints`?
            all.yaml:12:12: `endpoints`: expected a list, found nothing; a service without endpoints has `[]`
            all.yaml:14:14: `endpoints`: expected a list, found a mapping; a service without endpoints has `[]`
            all.yaml:17:3: a second service `f`: only the first one counts, in line 15
            all.yaml:20:9: `port`: port 70000 is out of range: 1 to 65535
            all.yaml:21:13: `protocol`: expected one of `tcp`, `http`, `http2`, `grpc`, `tls`, `mysql`, `postgres`, `redis`, `mongo`, `kafka`, `thrift` or `dubbo`, found `soap`
        "#]],
    );
}

#[test]
fn an_endpoint_with_a_mistake_costs_that_endpoint() {
    check(
        "orders.yaml",
        "
endpoints:
  - 10.0.0.1:80
  - 10.0.0.2:0
  - 10.0.0.3:70000
  - 10.0.0.4
  - 10.0.0.256:80
  - {address: 10.0.0.5:80, weigth: 2}
  - 10.1.0.1:80
  - 10.1.0.2:80
  - 10.1.0.3:80
  - 10.1.0.4:80
  - 10.1.0.5:80
  - 10.1.0.6:80
  - 10.1.0.7:80
  - 10.1.0.8:80
  - 10.1.0.9:80
  - 10.1.0.10:80
  - 10.1.0.11:80
  - 10.1.0.12:80
  - 10.1.0.13:80
  - 10.1.0.14:80
  - 10.1.0.15:80
",
        expect![[r#"
            native
            orders (orders.yaml:2:1)
              10.0.0.1:80 weight 1 unknown
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
              10.1.0.13:80 weight 1 unknown
              10.1.0.14:80 weight 1 unknown
              10.1.0.15:80 weight 1 unknown
            orders.yaml:4:5: port 0 is not a port: 1 to 65535; this endpoint is left out
            orders.yaml:5:5: port 70000 is out of range: 1 to 65535; this endpoint is left out
            orders.yaml:6:5: `10.0.0.4` has no port: write `10.0.0.4:8080`, an address and a port; this endpoint is left out
            orders.yaml:7:5: `10.0.0.256` is neither an IP address nor a host name; this endpoint is left out
            orders.yaml:8:28: unknown field `weigth`, did you mean `weight`? This endpoint is left out
        "#]],
    );
    check(
        "orders.yaml",
        "
endpoints:
  - {address: 10.0.0.1:80, weight: -1}
  - {address: 10.0.0.2:80, weight: heavy, health: ill}
  - {zone: a}
  - {address: 10.0.0.3:80, labels: [a]}
  - 10.0.0.4:80
",
        expect![[r#"
            native
            orders (orders.yaml:2:1)
              10.0.0.4:80 weight 1 unknown
            orders.yaml:3:36: `weight`: `-1` is not a weight: a number from 0 to 1000000; this endpoint is left out
            orders.yaml:4:36: `weight`: `heavy` is not a weight: a number from 0 to 1000000; this endpoint is left out
            orders.yaml:4:51: `health`: expected one of `unknown`, `healthy`, `unhealthy` or `draining`, found `ill`
            orders.yaml:5:5: `address` is missing; this endpoint is left out
            orders.yaml:6:36: `labels`: expected a mapping, found a list; this endpoint is left out
        "#]],
    );
    check(
        "orders.yaml",
        "
endpoints:
  - 10.0.0.1:80
  - [10.0.0.2:80]
  -
  - 8080
",
        expect![[r#"
            native
            orders (orders.yaml:2:1)
              10.0.0.1:80 weight 1 unknown
            orders.yaml:4:5: expected an endpoint, `host:port` or a mapping with `address`, found a list; this endpoint is left out
            orders.yaml:5:4: expected an endpoint, `host:port` or a mapping with `address`, found nothing; this endpoint is left out
            orders.yaml:6:5: `8080` has no port: write `8080:8080`, an address and a port; this endpoint is left out
        "#]],
    );
}

#[test]
fn too_many_bad_endpoints_are_a_bad_file() {
    let bad = |good: usize, bad: usize| {
        let good = (0..good).map(|i| format!("  - 10.0.{}.{}:80\n", i / 200, i % 200));
        let all: String = good.chain((0..bad).map(|i| format!("  - bad{i}\n"))).collect();
        let shown = read_as(Format::Auto, "a.yaml", format!("endpoints:\n{all}"));
        shown.lines().next().unwrap().to_owned()
            + "; "
            + shown.lines().find(|l| l.contains("more than")).unwrap_or("")
    };
    expect![[r#"
        native; 
        native; 
        native; 
        native; 
        native; 
        native; 
    "#]]
    .assert_eq(&format!(
        "{}\n{}\n{}\n{}\n{}\n{}\n",
        bad(0, 1), // All records are bad.
        bad(1, 3), // The file has too few records to judge.
        bad(3, 1),
        bad(3, 2), // 2 bad records of 5 are more than a quarter.
        bad(40, 5),
        bad(400, 6),
    ));
    // In a file of several services, a service without a valid endpoint is unreadable rather than empty.
    check(
        "all.yaml",
        "[{service: a, endpoints: [x, y]}, {service: b, endpoints: [a:1, a:2, a:3, a:4, a:5, a:6]}]",
        expect![[r#"
            native
            b (all.yaml:1:35)
              a:1 weight 1 unknown
              a:2 weight 1 unknown
              a:3 weight 1 unknown
              a:4 weight 1 unknown
              a:5 weight 1 unknown
              a:6 weight 1 unknown
            a unreadable
            all.yaml:1:27: `x` has no port: write `x:8080`, an address and a port
            all.yaml:1:30: `y` has no port: write `y:8080`, an address and a port
        "#]],
    );
}

#[test]
fn weights_are_scaled_per_service_and_nothing_is_a_drain() {
    check(
        "all.yaml",
        "
- service: whole
  endpoints: [{address: a:1, weight: 3}, {address: a:2, weight: 0}, a:3]
- service: fractions
  endpoints: [{address: a:1, weight: 0.5}, {address: a:2, weight: 2}, a:3, {address: a:4, weight: 0.001}, {address: a:5, weight: 0.0}]
- service: wrong
  endpoints: [a:1, a:2, a:3, a:4, a:5, a:6, {address: b:1, weight: 1e3}, {address: b:2, weight: 1000001}]
",
        expect![[r#"
            native
            whole (all.yaml:2:3)
              a:1 weight 3 unknown
              a:2 weight 1 draining
              a:3 weight 1 unknown
            fractions (all.yaml:4:3)
              a:1 weight 500 unknown
              a:2 weight 2000 unknown
              a:3 weight 1000 unknown
              a:4 weight 1 unknown
              a:5 weight 1 draining
            wrong (all.yaml:6:3)
              a:1 weight 1 unknown
              a:2 weight 1 unknown
              a:3 weight 1 unknown
              a:4 weight 1 unknown
              a:5 weight 1 unknown
              a:6 weight 1 unknown
            all.yaml:7:68: `weight`: `1e3` is not a weight: a number from 0 to 1000000; this endpoint is left out
            all.yaml:7:97: `weight`: `1000001` is not a weight: a number from 0 to 1000000; this endpoint is left out
        "#]],
    );
}

#[test]
fn of_two_endpoints_with_one_address_the_last_counts() {
    check(
        "orders.yaml",
        "endpoints:\n- 10.0.0.1:80\n- {address: 10.0.0.1:80, weight: 2}\n- Web:80\n- web:80\n",
        expect![[r#"
            native
            orders (orders.yaml:1:1)
              10.0.0.1:80 weight 2 unknown
              web:80 weight 1 unknown
            orders.yaml:3:3: `10.0.0.1:80` is also in line 2: this one, the last, counts
            orders.yaml:5:3: `web:80` is also in line 4: this one, the last, counts
        "#]],
    );
}

#[test]
fn a_file_that_is_not_a_service_is_refused_whole() {
    for (text, expected) in [
        (
            "",
            expect![[r#"
            ? FAILED
            a.yaml: the file is empty
        "#]],
        ),
        (
            "\n\n",
            expect![[r#"
            ? FAILED
            a.yaml: the file is empty: if it has no service on purpose, write `[]` or a comment
        "#]],
        ),
        (
            "---\n",
            expect![[r#"
            ? FAILED
            a.yaml: the file is empty: if it has no service on purpose, write `[]` or a comment
        "#]],
        ),
        (
            "service: a\nendpoints: [10.0.0.1:80\n",
            expect![[r#"
            native FAILED
            a.yaml:2:12: this `[` is never closed
        "#]],
        ),
        (
            "service: a\n",
            expect![[r#"
            native
            a unreadable
            a.yaml:1:1: `endpoints` is missing
        "#]],
        ),
        (
            "service: a|b\nendpoints: []\n",
            expect![[r#"
            native FAILED
            a.yaml:1:10: `service`: `a|b` is not a service name: 1 to 253 letters, digits, `.`, `_` or `-`, the first and the last a letter or a digit
        "#]],
        ),
        (
            "- endpoints: []\n- service: a\n  endpoints: []\n",
            expect![[r#"
                native
                a (a.yaml:2:3)
                a.yaml:1:3: `service` is missing: in a file of several services each needs its name
            "#]],
        ),
        (
            "text",
            expect![[r#"
            native FAILED
            a.yaml:1:1: expected a service, a mapping with `endpoints`, found the text `text`
        "#]],
        ),
        (
            "- 10.0.0.1:80\n",
            expect![[r#"
            native FAILED
            a.yaml:1:3: expected a service, a mapping with `endpoints`, found the text `10.0.0.1:80`
        "#]],
        ),
        (
            "version_info: '7'\nresources: []\n",
            expect![[r#"
            native
            a unreadable
            a.yaml:1:1: `endpoints` is missing
            a.yaml:1:1: unknown field `version_info`: expected one of `service`, `protocol`, `port` or `endpoints`
            a.yaml:2:1: unknown field `resources`: expected one of `service`, `protocol`, `port` or `endpoints`
        "#]],
        ),
    ] {
        check("a.yaml", text, expected);
    }
    check(
        "a.yaml",
        b"service: a\nendpoints: [\xff]\n",
        expect![[r#"
        ? FAILED
        a.yaml:2:13: the text is not UTF-8: byte 0xff belongs to no character
    "#]],
    );
    check(
        "-bad-.yaml",
        "endpoints: [a:1]",
        expect![[r#"
        native FAILED
        -bad-.yaml:1:1: `service` is missing, and the name of the file cannot replace it: `-bad-` is not a service name: 1 to 253 letters, digits, `.`, `_` or `-`, the first and the last a letter or a digit
    "#]],
    );
    check(
        "a.yaml",
        vec![b'#'; yaml::MAX_TEXT + 1],
        expect![[r#"
        ? FAILED
        a.yaml: larger than 16 MiB, the most that is read
    "#]],
    );
}

#[test]
fn nothing_is_meant_only_if_it_is_said() {
    check(
        "a.yaml",
        "[]\n",
        expect![[r#"
        ? says nothing
    "#]],
    );
    check(
        "a.json",
        "[ ]",
        expect![[r#"
        ? says nothing
    "#]],
    );
    check(
        "a.yaml",
        "# none at the moment\n",
        expect![[r#"
        ? says nothing
    "#]],
    );
    check(
        "a",
        "# none at the moment\n",
        expect![[r#"
        linkerd
        a (a)
    "#]],
    );
    check(
        "a",
        "",
        expect![[r#"
        ? FAILED
        a: the file is empty
    "#]],
    );
    check(
        "a",
        "\n \n",
        expect![[r#"
        ? FAILED
        a: the file is empty: if it has no service on purpose, write `[]` or a comment
    "#]],
    );
    expect![[r#"
        smartstack
        a (a.json)
    "#]]
    .assert_eq(&read_as(Format::SmartStack, "a.json", "[]"));
    expect![[r#"
        prometheus says nothing
    "#]]
    .assert_eq(&read_as(Format::Prometheus, "a.json", "[]"));
    expect![[r#"
        linkerd
        a (a.json)
    "#]]
    .assert_eq(&read_as(Format::Linkerd, "a.json", "#\n"));
}
