//! The checks of mesh documents, one version at a time.

use expect_test::expect;

use super::*;
use crate::document::{CaptureSettings, NodeDocument, PlacedDocument};

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
            a.yaml:5:7: unknown kind `VirtualService`: expected one of `Mesh`, `Service`, `Route`, `Node` or `Access`; it is not in force
            a.yaml:7:7: `Gateway` documents are not supported by this version
            a.yaml:10:1: `kind` is missing: one of `Mesh`, `Service`, `Route`, `Node` or `Access`; it is not in force
            a.yaml:12:3: expected a document, which begins with `kind: ..`, found the text `a`; it is not in force
            a.yaml:14:1: expected a document, which begins with `kind: ..`, found the text `text`; it is not in force
            a.yaml:16:7: `kind`: expected one of `Mesh`, `Service`, `Route`, `Node` or `Access`, found a list; it is not in force
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
            a.yaml:66:1: unknown field `outbound`: expected one of `name`, `protocol`, `port`, `subsets`, `load_balancing`, `timeouts`, `retry`, `outlier_detection`, `connection_limits`, `capture` or `mtls`; it is not in force
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
    let settings_of = |service: &str, nodes: &[Arc<PlacedDocument<NodeDocument>>]| {
        let settings = documents.settings(&service.parse().unwrap(), nodes);
        let CaptureSettings { percent, on_loss } = settings.capture;
        let by: Vec<_> = settings.origins.iter().map(|(name, by)| format!("{name} by {by}")).collect();
        format!("{percent:?} {on_loss:?} {:?}: {}", documents.outbound(nodes), by.join(", "))
    };
    expect!["Some(50) Some(Closed) AllowAny: capture.on_loss by Node `{role: web}` (a.yaml:9:1), capture.percent by Service `orders` (a.yaml:5:1)"]
        .assert_eq(&settings_of("orders", &documents.nodes));
    expect!["Some(10) Some(Open) RegistryOnly: capture.on_loss by Mesh (a.yaml:1:1), capture.percent by Mesh (a.yaml:1:1)"]
        .assert_eq(&settings_of("payments", &[]));
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
