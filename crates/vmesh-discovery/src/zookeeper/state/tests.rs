use std::fmt::Write as _;

use bytes::Bytes;
use expect_test::{Expect, expect};
use vmesh_model::load::strict;
use vmesh_zookeeper::{Owner, Stat};

use super::*;
use crate::assemble::Assembler;
use crate::resolve::SystemResolver;
use crate::source::Registrations;

/// Builds a tree from lines with a path below the root, a blank, and the data. The prefix `~` marks an
/// ephemeral node, and `?` a node that has never been readable.
fn tree(text: &str) -> RootView {
    let mut root = NodeBuilder::default();
    for (line, created) in text.trim().lines().map(str::trim).filter(|line| !line.is_empty()).zip(1..) {
        let (path, data) = line.split_once(' ').unwrap_or((line, ""));
        let (path, is_session) = path.strip_prefix('~').map_or((path, false), |path| (path, true));
        let (path, is_unread) = path.strip_prefix('?').map_or((path, false), |path| (path, true));
        let mut node = &mut root;
        for name in path.split('/') {
            node = node.children.entry(name.into()).or_default();
        }
        (node.data, node.is_session, node.is_unread) = (data.to_owned(), is_session, is_unread);
        node.created = created;
    }
    RootView { tree: Some(Arc::new(root.grown())), failed: None }
}

#[derive(Default)]
struct NodeBuilder {
    data: String,
    is_session: bool,
    is_unread: bool,
    created: i64,
    children: BTreeMap<Arc<str>, NodeBuilder>,
}

impl NodeBuilder {
    fn grown(self) -> Node {
        let owner = if self.is_session { Owner::Session(7) } else { Owner::Nobody };
        let created = if self.is_unread { 0 } else { self.created + 1 };
        let stat = Stat { created, modified: 1, modified_at: 0, owner };
        let children = self.children.into_iter().map(|(name, child)| (name, Arc::new(child.grown())));
        let mut node = Node::new(Bytes::from(self.data), stat, children.collect());
        node.unreadable = self.is_unread.then(|| "it may not be read".into());
        node
    }
}

/// Builds the next tree as a mirror does: an unchanged node keeps its pointer.
fn then(before: &RootView, text: &str) -> RootView {
    fn kept(before: Option<&Arc<Node>>, now: &Arc<Node>) -> Arc<Node> {
        let mut node = (**now).clone();
        for (name, child) in &mut node.children {
            *child = kept(before.and_then(|before| before.children.get(name)), child);
        }
        let is_same = |before: &&Arc<Node>| {
            let pairs = before.children.values().zip(node.children.values());
            before.data == node.data
                && before.stat.owner == node.stat.owner
                && before.unreadable == node.unreadable
                && before.children.keys().eq(node.children.keys())
                && pairs.into_iter().all(|(a, b)| Arc::ptr_eq(a, b))
        };
        before.filter(is_same).cloned().unwrap_or_else(|| Arc::new(node))
    }
    let now = tree(text);
    RootView { tree: now.tree.map(|now| kept(before.tree.as_ref(), &now)), failed: None }
}

fn roots(yaml: &str) -> Vec<RootConfig> {
    strict("zk.yaml", yaml).unwrap()
}

fn reading(yaml: &str) -> ZookeeperState {
    ZookeeperState::new("zk".into(), roots(yaml), None)
}

fn show(reading: &ZookeeperState) -> String {
    let mut shown = String::new();
    let statement = reading.statement();
    for (name, reported) in &statement.services {
        _ = write!(shown, "{name}");
        match &reported.content {
            ServiceContent::Parsed(parsed) => {
                if let Some(protocol) = parsed.protocol {
                    _ = write!(shown, " {protocol}");
                }
                _ = write!(shown, " ({})", parsed.place);
                for endpoint in &parsed.endpoints {
                    _ = write!(shown, " {}", endpoint.address);
                }
            }
            ServiceContent::Restored(_) => shown += " restored",
        }
        if let Some(because) = &reported.stale_because {
            _ = write!(shown, " STALE {because}");
        }
        shown += "\n";
    }
    for problem in &statement.problems {
        _ = writeln!(shown, "{}: {problem}", problem.subject);
    }
    shown
}

fn check(reading: &ZookeeperState, expected: Expect) {
    expected.assert_eq(&show(reading));
}

#[test]
fn a_service_is_named_by_its_path_below_the_root() {
    let mut reading = reading(
        "- {path: /services}\n- {path: /discovery/prod, format: serverset}\n- {path: /leader/db, format: hostport}\n",
    );
    reading.take(&[
        tree(
            r#"
            pay/0f3c {"address":"10.0.0.1","port":80,"serviceType":"STATIC"}
            a/b/orders/1 {"address":"10.0.0.2","port":80,"serviceType":"STATIC"}
            a/b/orders/2 {"address":"10.0.0.3","port":80,"serviceType":"STATIC"}
            a/b/c d/1 {"address":"10.0.0.4","port":80,"serviceType":"STATIC"}
            empty 10.0.0.9
            "#,
        ),
        tree(
            r#"
            role/job/member_0000000001 {"serviceEndpoint":{"host":"10.0.0.5","port":80}}
            role/job/vector_0000000002 {"vector":[]}
            role/other/lock_0000000001 x
            "#,
        ),
        tree("~c_0000000001 10.0.0.6:80"),
    ]);
    check(
        &reading,
        expect![[r#"
        a.b.orders (zk/services/a/b/orders) 10.0.0.2:80 10.0.0.3:80
        db (zk/leader/db) 10.0.0.6:80
        pay (zk/services/pay) 10.0.0.1:80
        role.job (zk/discovery/prod/role/job) 10.0.0.5:80
    "#]],
    );
}

#[test]
fn only_what_changed_is_read_again() {
    let first = r#"
        pay/1 {"host":"10.0.0.1","port":80}
        orders/1 {"host":"10.0.0.2","port":80}
        "#;
    let before = tree(first);
    let mut reading = reading("- {path: /s}\n");
    reading.take(std::slice::from_ref(&before));
    let parsed =
        |reading: &ZookeeperState, name: &str| match &reading.statement().services.get(name).unwrap().content
        {
            ServiceContent::Parsed(parsed) => parsed.clone(),
            ServiceContent::Restored(_) => panic!("restored"),
        };
    let (pay, orders) = (parsed(&reading, "pay"), parsed(&reading, "orders"));
    let more = format!("{first}\n pay/2 {{\"host\":\"10.0.0.3\",\"port\":80}}");
    let after = then(&before, &more);
    reading.take(std::slice::from_ref(&after));
    check(
        &reading,
        expect![[r#"
        orders (zk/s/orders) 10.0.0.2:80
        pay (zk/s/pay) 10.0.0.1:80 10.0.0.3:80
    "#]],
    );
    assert!(Arc::ptr_eq(&orders, &parsed(&reading, "orders")));
    assert!(!Arc::ptr_eq(&pay, &parsed(&reading, "pay")));
    let pay = parsed(&reading, "pay");
    // The data changed, but not its meaning.
    let touched = then(&after, &more.replace("\"port\":80}", "\"port\":80 }"));
    reading.take(std::slice::from_ref(&touched));
    assert!(Arc::ptr_eq(&pay, &parsed(&reading, "pay")));
}

#[test]
fn a_directory_that_became_garbage_keeps_what_was_last_good() {
    let good = r#"
        pay/1 {"host":"10.0.0.1","port":80}
        pay/2 {"host":"10.0.0.2","port":80}
        orders/1 {"host":"10.0.0.3","port":80}
        "#;
    let before = tree(good);
    let mut reading = reading("- {path: /s, format: nerve}\n");
    reading.take(std::slice::from_ref(&before));
    let garbage = then(
        &before,
        r#"
        pay/1 garbage
        pay/2 {"host":"10.0.0.2"}
        orders/1 {"host":"10.0.0.3","port":80}
        "#,
    );
    reading.take(std::slice::from_ref(&garbage));
    check(
        &reading,
        expect![[r#"
            orders (zk/s/orders) 10.0.0.3:80
            pay (zk/s/pay) 10.0.0.1:80 10.0.0.2:80 STALE 2 of 2 records are bad, which is more than single mistakes
            service `pay`: zk/s/pay/1: its data is not JSON (Thrift's binary form is not read): expected value at line 1 column 1
            service `pay`: zk/s/pay/2: there is no port in it
            service `pay`: zk/s/pay: 2 of 2 records are bad, which is more than single mistakes; the last good state stays in force
        "#]],
    );
    assert_eq!(reading.take_bad_records(), 2);
    reading.take(&[then(&garbage, good)]);
    check(
        &reading,
        expect![[r#"
        orders (zk/s/orders) 10.0.0.3:80
        pay (zk/s/pay) 10.0.0.1:80 10.0.0.2:80
    "#]],
    );
}

#[test]
fn a_directory_without_records_is_no_service_so_that_the_guard_decides() {
    let before = tree(r#"pay/1 {"host":"10.0.0.1","port":80}"#);
    let mut reading = reading("- {path: /s}\n");
    reading.take(std::slice::from_ref(&before));
    reading.take(&[then(&before, "pay")]);
    check(&reading, expect![[""]]);
    reading.take(&[RootView::default()]);
    check(
        &reading,
        expect![[r#"
        zk: zk/s: there is no such node; vmesh reads it as soon as it is created
    "#]],
    );
}

#[test]
fn a_format_is_told_once_and_kept() {
    let nerve = tree("pay");
    let mut reading = reading("- {path: /s}\n");
    reading.take(std::slice::from_ref(&nerve));
    check(&reading, expect![[""]]);
    let unknown = then(&nerve, "pay/1 something\npay/2 else");
    reading.take(std::slice::from_ref(&unknown));
    check(
        &reading,
        expect![[r#"
        zk: zk/s: its nodes are in no format that vmesh recognises: set `format`
    "#]],
    );
    let known = then(&unknown, r#"pay/1 {"host":"10.0.0.1","port":80}"#);
    reading.take(std::slice::from_ref(&known));
    check(
        &reading,
        expect![[r#"
        pay (zk/s/pay) 10.0.0.1:80
    "#]],
    );
    // Most nodes look like another format now.
    let other = then(
        &known,
        r#"
        pay/1 {"host":"10.0.0.1","port":80}
        orders/member_1 {"serviceEndpoint":{"host":"10.0.0.2","port":80}}
        orders/member_2 {"serviceEndpoint":{"host":"10.0.0.3","port":80}}
        "#,
    );
    reading.take(std::slice::from_ref(&other));
    check(
        &reading,
        expect![[r#"
            orders (zk/s/orders) 10.0.0.2:80 10.0.0.3:80
            zk: zk/s: it is read as `serverset`, as 2 of its nodes look, and those are left out that look otherwise (1 like `nerve`): set `format`
        "#]],
    );
}

/// A lock that was there first must not make later services be left out, and a restart leads to the same
/// decision.
#[test]
fn a_stray_node_does_not_decide_the_format() {
    let lock = tree("locks/leader 10.0.0.7:2888");
    let mut before = reading("- {path: /services}\n");
    before.take(std::slice::from_ref(&lock));
    check(
        &before,
        expect![[r#"
        locks (zk/services/locks) 10.0.0.7:2888
    "#]],
    );
    let six: String = (1..=6)
        .map(|n| {
            format!("~billing/i{n} {{\"name\":\"billing\",\"address\":\"10.0.0.{n}\",\"port\":80,\"serviceType\":\"DYNAMIC\"}}\n")
        })
        .collect();
    let all = then(&lock, &format!("locks/leader 10.0.0.7:2888\n{six}"));
    before.take(std::slice::from_ref(&all));
    check(
        &before,
        expect![[r#"
        billing (zk/services/billing) 10.0.0.1:80 10.0.0.2:80 10.0.0.3:80 10.0.0.4:80 10.0.0.5:80 10.0.0.6:80
        zk: zk/services: it is read as `curator`, as 6 of its nodes look, and those are left out that look otherwise (1 like `hostport`): set `format`
    "#]],
    );
    let mut restarted = reading("- {path: /services}\n");
    restarted.take(std::slice::from_ref(&all));
    assert_eq!(show(&restarted), show(&before));
}

/// The root has nodes, but none is an instance of the configured format.
#[test]
fn a_root_of_which_nothing_is_read_says_so_for_every_format() {
    let foreign = [
        ("curator", "a/instance-1 10.0.0.1:80\na/instance-2 instance-2\nb/instance-1 instance-1"),
        ("nerve", "a/one 10.0.0.1:80\nb/two text"),
        ("serverset", "a/one {\"host\":\"10.0.0.1\",\"port\":80}"),
        ("dubbo", "a/one {\"host\":\"10.0.0.1\",\"port\":80}"),
        ("hostport", "a/one {\"host\":\"10.0.0.1\",\"port\":80}"),
    ];
    for (format, nodes) in foreign {
        let mut reading = reading(&format!("- {{path: /disc, format: {format}}}\n"));
        reading.take(&[tree(nodes)]);
        let shown = show(&reading);
        assert!(shown.starts_with("zk: zk/disc: of the "), "{format}: {shown}");
        assert!(
            shown.contains(&format!("none is an instance in the format `{format}`")),
            "{format}: {shown}"
        );
        // A root without content is no problem: its nodes are read as soon as they appear.
        let mut empty = self::reading(&format!("- {{path: /disc, format: {format}}}\n"));
        empty.take(&[tree("a")]);
        assert_eq!(show(&empty), "", "{format}");
    }
}

#[test]
fn dubbo_is_grouped_over_all_interfaces_and_roots() {
    let url = |host: &str, interface: &str, more: &str| {
        format!(
            "{interface}/providers/dubbo%3A%2F%2F{host}%3A20880%2F{interface}%3Fapplication%3Dpay%26interface%3D{interface}{more}\n"
        )
    };
    let dubbo = [
        url("10.0.0.1", "com.acme.A", ""),
        url("10.0.0.1", "com.acme.B", ""),
        url("10.0.0.2", "com.acme.B", ""),
        "com.acme.C/configurators/override%3A%2F%2F0.0.0.0%2Fcom.acme.C%3Fweight%3D1\n".to_owned(),
        "com.acme.C/providers\n".to_owned(),
    ];
    let services = r#"
        pay/10.0.0.3:20880 {"address":"10.0.0.3","port":20880,"payload":{"metadata":{"dubbo.endpoints":"[{\"port\":20880,\"protocol\":\"dubbo\"}]","dubbo.metadata.revision":"1"}},"serviceType":"DYNAMIC"}
        pay/10.0.0.1:20880 {"address":"10.0.0.1","port":20880,"payload":{"metadata":{"dubbo.endpoints":"[{\"port\":20880,\"protocol\":\"dubbo\"}]","dubbo.metadata.revision":"1"}},"serviceType":"DYNAMIC"}
        "#;
    let (first, second) = (tree(&dubbo.concat()), tree(services));
    let mut reading = reading("- {path: /dubbo}\n- {path: /services}\n");
    reading.take(&[first.clone(), second.clone()]);
    check(
        &reading,
        expect![[r#"
        pay dubbo (zk/dubbo) 10.0.0.1:20880 10.0.0.2:20880 10.0.0.3:20880
    "#]],
    );
    // The endpoint stays while one of its records exists.
    let less = [&dubbo[1], &dubbo[2]].map(String::as_str).concat();
    reading.take(&[then(&first, &less), second.clone()]);
    check(
        &reading,
        expect![[r#"
        pay dubbo (zk/dubbo) 10.0.0.1:20880 10.0.0.2:20880 10.0.0.3:20880
    "#]],
    );
    reading.take(&[then(&first, &dubbo[2]), then(&second, "pay")]);
    check(
        &reading,
        expect![[r#"
        pay dubbo (zk/dubbo) 10.0.0.2:20880
    "#]],
    );
}

#[test]
fn services_are_chosen_by_their_names_and_misnamed_ones_cost_themselves() {
    let mut reading = reading(
        "- {path: /s, format: nerve, services: ['pay*', '*!'], exclude: ['*.internal'], recurse: false}\n",
    );
    reading.take(&[tree(
        r#"
        pay/1 {"host":"10.0.0.1","port":80}
        pay.internal/1 {"host":"10.0.0.1","port":80}
        orders/1 {"host":"10.0.0.1","port":80}
        wow!/1 {"host":"10.0.0.1","port":80}
        pay-a/b/1 {"host":"10.0.0.1","port":80}
        "#,
    )]);
    check(
        &reading,
        expect![[r#"
        pay (zk/s/pay) 10.0.0.1:80
        zk: zk/s/wow!: `wow!` is not a service name: 1 to 253 letters, digits, `.`, `_` or `-`, the first and the last a letter or a digit; this service is left out; add it to `exclude` to hide this problem
    "#]],
    );
}

#[test]
fn what_cannot_be_read_after_a_restart_is_what_was_known_before() {
    let yaml = "- {path: /s, format: nerve}\n- {path: /dubbo, format: dubbo}\n- {path: /gone}\n";
    let mut before = reading(yaml);
    let url = "com.acme.A/providers/dubbo%3A%2F%2F10.0.0.9%3A20880%2Fcom.acme.A%3Fapplication%3Dshop\n";
    before.take(&[
        tree(
            r#"
            pay/1 {"host":"10.0.0.1","port":80}
            orders/1 {"host":"10.0.0.2","port":80}
            team/a/1 {"host":"10.0.0.3","port":80}
            left/1 {"host":"10.0.0.4","port":80}
            "#,
        ),
        tree(url),
        tree(r#"x/1 {"host":"10.0.0.5","port":80}"#),
    ]);
    let mut assembler = Assembler::new("zk".into(), SystemResolver, std::time::Duration::from_secs(30), None);
    let last_good: Registrations = assembler.view(&before.statement());

    let mut after = ZookeeperState::new("zk".into(), roots(yaml), Some(&last_good));
    let failed = RootView { tree: None, failed: Some("could not read /gone: not allowed".into()) };
    after.take(&[
        tree(
            r#"
            pay/1 garbage
            ?orders
            ?team
            other/1 {"host":"10.0.0.6","port":80}
            "#,
        ),
        tree(&url.replace("application", "app")),
        failed.clone(),
    ]);
    check(
        &after,
        expect![[r#"
            orders restored STALE it may not be read
            other (zk/s/other) 10.0.0.6:80
            pay restored STALE 1 of 1 records are bad, which is more than single mistakes
            shop restored STALE 1 of 1 records are bad, which is more than single mistakes
            team.a restored STALE it may not be read
            x restored STALE could not read /gone: not allowed
            zk: zk/s/orders: it may not be read; the last good state of the services below it stays in force
            zk: zk/s/team: it may not be read; the last good state of the services below it stays in force
            service `pay`: zk/s/pay/1: its data is not JSON (Thrift's binary form is not read): expected value at line 1 column 1
            service `pay`: zk/s/pay: 1 of 1 records are bad, which is more than single mistakes; the last good state stays in force
            service `com.acme.A`: zk/dubbo/com.acme.A/providers/dubbo%3A%2F%2F10.0.0.9%3A20880%2Fcom.acme.A%3Fapp%3Dshop: its URL names no `application`
            service `com.acme.A`: zk/dubbo/com.acme.A/providers: 1 of 1 records are bad, which is more than single mistakes; the last good state stays in force
            zk: zk/gone: could not read /gone: not allowed; the last good state stays in force
        "#]],
    );
    assert!(after.unknown_root().is_none());

    let mut fresh = reading(yaml);
    fresh.take(&[tree("a"), tree("b"), failed]);
    let (path, why) = fresh.unknown_root().unwrap();
    assert_eq!((path, &**why), ("/gone", "could not read /gone: not allowed"));
}

#[test]
fn what_went_since_a_restart_does_not_come_back_when_something_cannot_be_read() {
    let yaml = "- {path: /s, format: nerve}\n";
    let (orders, pay) =
        (r#"orders/1 {"host":"10.0.0.2","port":80}"#, r#"pay/1 {"host":"10.0.0.1","port":80}"#);
    let both = tree(&format!("{orders}\n{pay}"));
    let mut before = reading(yaml);
    before.take(std::slice::from_ref(&both));
    let mut assembler = Assembler::new("zk".into(), SystemResolver, std::time::Duration::from_secs(30), None);
    let last_good: Registrations = assembler.view(&before.statement());

    let mut after = ZookeeperState::new("zk".into(), roots(yaml), Some(&last_good));
    // The service is unreadable from the start: its last good state stays, even while others are read.
    let hidden = then(&both, &format!("{orders}\n?pay"));
    after.take(std::slice::from_ref(&hidden));
    assert!(show(&after).contains("pay restored"), "{}", show(&after));
    let less = then(&hidden, "other");
    after.take(std::slice::from_ref(&less));
    after.take(&[RootView { failed: Some("could not read /s: not allowed".into()), ..less }]);
    assert!(after.unknown_root().is_none());
    check(
        &after,
        expect![[r#"
            zk: zk/s: could not read /s: not allowed; the last good state stays in force
        "#]],
    );
}

#[test]
fn garbage_costs_itself_and_what_could_not_be_read_is_unknown() {
    let mut reading = reading("- {path: /services, format: curator}\n");
    reading.take(&[tree(
        r#"
        pay/i1 {"name":"pay","id":"i1","address":"10.0.0.1","port":80}
        ~web/i1 garbage
        "#,
    )]);
    let statement = reading.statement();
    assert_eq!(statement.unusable, Vec::<Arc<str>>::new());
    assert_eq!(
        statement.left_out,
        [Arc::from("zk/services/web: 1 of 1 records are bad, which is more than single mistakes")]
    );
    assert!(statement.problems.iter().any(|problem| problem.to_string().contains("zk/services/web/i1")));

    reading.take(&[tree("?~web/i1 x")]);
    let statement = reading.statement();
    assert_eq!((statement.unusable.len(), statement.left_out.len()), (1, 0));
}
