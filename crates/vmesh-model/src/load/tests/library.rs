//! Successive versions of documents: the last good version stays in force.

use expect_test::expect;

use super::values::Config;
use super::*;

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
        mesh.d/orders.yaml:10:6: a `,` or `}` is missing here; the last good content of this file stays in force
    "#]]
    .assert_eq(&show(&mut library, &broken));
    expect![[r#"
        Service orders [v1 v2] (mesh.d/orders.yaml:1:1)
        Route orders with 2 rules (mesh.d/orders.yaml:7:1)
        mesh.d/orders.yaml: the file is empty; the last good content of this file stays in force
    "#]]
    .assert_eq(&show(&mut library, "== mesh.d/orders.yaml\n"));
    expect![[r#"
        Service orders [v1 v2] (mesh.d/orders.yaml:1:1)
        Route orders with 2 rules (mesh.d/orders.yaml:7:1)
        mesh.d/orders.yaml: permission denied; the last good content of this file stays in force
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
        mesh.d/orders.yaml:8:7: unknown kind `Rout`, did you mean `Route`? The last good content of this file stays in force
        more.json:1:5: this `{` is closed by a `]`; the last good content of this file stays in force
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
