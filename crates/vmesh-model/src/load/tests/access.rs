//! `Access` documents, and the mode of mTLS.

use expect_test::expect;

use super::*;
use crate::document::{AccessAction, AccessMode, AccessPath, MtlsMode};

#[test]
fn every_part_of_a_rule_can_be_written() {
    let text = r#"
== access.yaml
kind: Access
service: orders
mode: enforce
default: deny
jwt_providers: [{issuer: "https://login.example", audiences: [orders], jwks: '{"keys": []}'}]
rules:
  - from: {services: [web], nodes: {role: x}, cidrs: [10.0.0.0/8, "fd00::1"]}
    to: {paths: [{prefix: /x}, {exact: /y}], methods: [GET], headers: {x-a: "1", x-b: {present: true}}, ports: [8080]}
    action: allow
  - {from: {jwt: {issuer: "https://login.example", claims: {role: admin, team: [a, b]}}}, action: allow}
  - {from: {anyone: true}, to: {paths: [{prefix: /admin}]}, action: deny}
---
kind: Access
service: orders
name: audited
mode: audit
rules: [{action: deny}]
"#;
    let (documents, problems) = update(&mut Library::default(), text);
    assert_eq!(problems, "");
    let orders: ServiceName = "orders".parse().unwrap();
    let [first, second] = documents.access_of(&orders) else { panic!("not two documents") };
    assert_eq!((first.mode, second.mode), (AccessMode::Enforce, AccessMode::Audit));
    let rule = &first.rules[0];
    let paths = rule.to.paths.clone().unwrap();
    assert_eq!(paths, [AccessPath::Prefix("/x".into()), AccessPath::Exact("/y".into())]);
    assert_eq!(rule.from.cidrs.as_ref().unwrap()[1].to_string(), "fd00::1");
    let jwt = first.rules[1].from.jwt.as_ref().unwrap();
    assert_eq!(jwt.claims["team"].0.len(), 2);
    assert_eq!(jwt.claims["role"].0.len(), 1);
    let policy = documents.access_policy(&orders, AccessMode::Enforce).unwrap();
    assert_eq!((policy.default, policy.rules.len()), (AccessAction::Deny, 3));
    let policy = documents.access_policy(&orders, AccessMode::Audit).unwrap();
    assert_eq!((policy.default, policy.rules.len()), (AccessAction::Deny, 4));
}

/// The default action: a document's own, else `deny` if there is an `allow` rule, else that of the mesh, else `allow`.
#[test]
fn the_default_is_the_one_that_the_documentation_says() {
    let default = |mesh: &str, access: &[&str]| {
        let mesh = if mesh.is_empty() {
            String::new()
        } else {
            format!("kind: Mesh\naccess: {{default: {mesh}}}\n")
        };
        let documents = access.iter().enumerate();
        let documents =
            documents.map(|(i, text)| format!("kind: Access\nservice: orders\nname: n{i}\n{text}\n"));
        let all: Vec<_> = documents.chain([mesh].into_iter().filter(|text| !text.is_empty())).collect();
        if all.is_empty() {
            return Documents::default()
                .access_policy(&"orders".parse().unwrap(), AccessMode::Enforce)
                .unwrap()
                .default;
        }
        let text = format!("\n== a.yaml\n{}", all.join("---\n"));
        let (documents, problems) = update(&mut Library::default(), &text);
        assert_eq!(problems, "", "{text}");
        documents.access_policy(&"orders".parse().unwrap(), AccessMode::Enforce).unwrap().default
    };
    let (allows, denies) = ("rules: [{action: allow}]", "rules: [{action: deny}]");
    assert_eq!(default("", &[]), AccessAction::Allow);
    assert_eq!(default("", &[denies]), AccessAction::Allow);
    assert_eq!(default("", &[denies, allows]), AccessAction::Deny);
    assert_eq!(default("deny", &[]), AccessAction::Deny);
    assert_eq!(default("deny", &[denies]), AccessAction::Deny);
    assert_eq!(default("allow", &[allows]), AccessAction::Deny);
    assert_eq!(default("deny", &["default: allow"]), AccessAction::Allow);
    assert_eq!(default("allow", &["default: allow", "default: deny"]), AccessAction::Deny);
    assert_eq!(default("", &["mode: audit\ndefault: deny"]), AccessAction::Allow);
}

#[test]
fn what_makes_no_sense_is_refused_at_its_place() {
    check(
        r#"
== a.yaml
kind: Access
service: orders
---
kind: Access
service: web
rules:
  - {from: {anyone: true, services: []}, action: allow}
  - {from: {cidrs: [10.0.0.1/8]}, action: allow}
  - {from: {service: [web]}, action: allow}
  - {to: {paths: [{prefix: x}, {exact: "/a//b"}, {prefix: "/a/../b"}, {prefix: "/a;b"}, {exact: "/%61"}]}, action: deny}
  - {to: {ports: [0], methods: [], headers: {":path": /x}}, action: deny}
  - {to: {}}
---
kind: Mesh
mtls: {mode: on}
access: {jwt_providers: [{issuer: a, jwks: https://login.example/keys}]}
"#,
        expect![[r#"
            a.yaml:1:1: neither `rules` nor `default`: this document decides nothing; it is not in force
            a.yaml:8:21: `cidrs`: `10.0.0.1/8` has bits beyond its length: did you mean 10.0.0.0/8, or 10.0.0.1? It is not in force
            a.yaml:9:13: unknown field `service`, did you mean `services`? It is not in force
            a.yaml:12:5: `action` is missing in `rules`; it is not in force
            a.yaml:15:14: `mode`: expected one of `off`, `permissive` or `strict`, found `on`; it is not in force
        "#]],
    );
}

#[test]
fn a_rule_that_can_never_match_is_refused() {
    check(
        r#"
== a.yaml
kind: Access
service: web
rules:
  - {from: {anyone: true, services: [a]}, action: allow}
  - {from: {services: []}, action: allow}
  - {to: {paths: [{prefix: x}, {exact: "/a//b"}, {prefix: "/a/../b"}, {prefix: "/a;b"}, {exact: "/%61"}, {exact: "/x?y"}]}, action: deny}
  - {to: {ports: [0], methods: [], headers: {":path": /x}}, action: deny}
jwt_providers: [{issuer: a, jwks: https://login.example/keys}, {issuer: a, jwks: '{"keys": []}'}, {issuer: b}, {issuer: c, jwks_file: a/b.jwks}]
"#,
        expect![[r#"
            a.yaml:4:27: `anyone` and `services` together: leave one of them out; it is not in force
            a.yaml:5:13: `services: []` matches no caller: leave it out to match every caller; it is not in force
            a.yaml:6:28: `x` is not a path: it starts with `/`; it is not in force
            a.yaml:6:40: `/a//b`: write the plain path, without `//`, `.` and `..` segments, `;`, `\`, `%` and characters beyond ASCII; it is not in force
            a.yaml:6:59: `/a/../b`: write the plain path, without `//`, `.` and `..` segments, `;`, `\`, `%` and characters beyond ASCII; it is not in force
            a.yaml:6:80: `/a;b`: write the plain path, without `//`, `.` and `..` segments, `;`, `\`, `%` and characters beyond ASCII; it is not in force
            a.yaml:6:97: `/%61`: write the plain path, without `//`, `.` and `..` segments, `;`, `\`, `%` and characters beyond ASCII; it is not in force
            a.yaml:6:114: `/x?y` is not a path: a path ends before `?` and `#`; it is not in force
            a.yaml:7:19: port 0 is not a port: 1 to 65535; it is not in force
            a.yaml:7:23: `methods: []` matches no request: leave it out to match every request; it is not in force
            a.yaml:7:46: `:path` is not the name of a header; it is not in force
            a.yaml:8:35: expected a JSON Web Key Set, such as {"keys": [..]}; it is not in force
            a.yaml:8:73: issuer `a` is listed twice; it is not in force
            a.yaml:8:99: no keys: give `jwks` or `jwks_file`; it is not in force
            a.yaml:8:135: expected the name of a file beside the documents that ends in `.jwks`, without a directory; it is not in force
        "#]],
    );
}

/// A key set is a file beside the documents, and has a last good version as they have.
#[test]
fn a_key_set_in_a_file_is_read_kept_and_replaced() {
    let text = |keys: &str| {
        format!(
            "\n== mesh.d/a.yaml\nkind: Access\nservice: web\ndefault: deny\njwt_providers: [{{issuer: a, jwks_file: a.jwks}}]\n{keys}"
        )
    };
    let mut library = Library::default();
    let keys = |documents: &Documents| {
        let access = documents.access_of(&"web".parse().unwrap())[0].clone();
        let provider = documents.jwt_provider(&access, "a").unwrap();
        documents.key_set(provider).map(ToString::to_string)
    };
    let good = text("== mesh.d/a.jwks\n{\"keys\": [1]}\n");
    let (documents, problems) = update(&mut library, &good);
    assert_eq!((keys(&documents).unwrap().trim(), problems.as_str()), ("{\"keys\": [1]}", ""));
    let (documents, problems) = update(&mut library, &text("== mesh.d/a.jwks\nnone\n"));
    assert_eq!(keys(&documents).unwrap().trim(), "{\"keys\": [1]}");
    assert!(problems.contains("mesh.d/a.jwks: expected a JSON Web Key Set"), "{problems}");
    let restored = Library::restored(library.last_good());
    assert_eq!(keys(&restored.documents()).unwrap().trim(), "{\"keys\": [1]}");
    let (documents, _) = update(&mut library, &text(""));
    assert_eq!(keys(&documents), None);
}

#[test]
fn the_mode_of_mtls_is_that_of_the_nearest_document() {
    let text = r#"
== a.yaml
kind: Mesh
mtls: {mode: permissive}
---
kind: Service
name: orders
mtls: {mode: strict}
---
kind: Node
name: web-1
mtls: {mode: "off"}
"#;
    let (documents, problems) = update(&mut Library::default(), text);
    assert_eq!(problems, "");
    let mode = |service: &str, nodes: &[Arc<PlacedDocument<NodeDocument>>]| {
        let settings = documents.settings(&service.parse().unwrap(), nodes);
        (settings.mtls_mode(), settings.origins["mtls.mode"].document.clone())
    };
    assert_eq!(mode("web", &[]), (MtlsMode::Permissive, "Mesh".to_owned()));
    assert_eq!(mode("orders", &[]), (MtlsMode::Strict, "Service `orders`".to_owned()));
    assert_eq!(mode("orders", &documents.nodes), (MtlsMode::Off, "Node `web-1`".to_owned()));
    assert!(documents.uses_mtls());
}
