use expect_test::expect;
use zookeeper_client as zk;

use super::dirty_paths::DirtyPaths;
use super::*;
use crate::bulk_read::ReadStart;
use crate::tree::put;

fn event(kind: zk::EventType, path: &str) -> zk::WatchedEvent {
    zk::WatchedEvent::new(kind, path)
}

fn tree(paths: &[&str]) -> Option<Arc<Node>> {
    let mut tree = Some(Arc::new(Node::leaf("", 1)));
    for path in paths {
        put(&mut tree, path, Some(Arc::new(Node::leaf("", 1))));
    }
    tree
}

fn starts(roots: &[Root], observed: &[RootView], events: &[(usize, zk::EventType, &str)]) -> String {
    let mut dirty = DirtyPaths::default();
    for (root, kind, path) in events {
        assert!(dirty.add_event(roots, *root, event(*kind, path)));
    }
    let starts = dirty.starts(roots, observed);
    let known = |start: &ReadStart| {
        let known = start.known.iter().map(|name| format!(" {name}"));
        known.collect::<String>()
    };
    starts.iter().map(|s| format!("{} {} {:?}{}\n", s.root, s.path, s.scope, known(s))).collect()
}

#[test]
fn events_for_one_path_are_one_reading_of_it() {
    use zk::EventType::*;
    let roots = [Root::new("/services").unwrap(), Root::new("/").unwrap()];
    let observed = [
        RootView { tree: tree(&["pay", "pay/a", "orders"]), failed: None },
        RootView { tree: tree(&["x"]), failed: None },
    ];
    let reported = starts(
        &roots,
        &observed,
        &[
            (0, NodeDataChanged, "/services/pay/a"),
            (0, NodeDataChanged, "/services/pay/a"),
            (0, NodeCreated, "/services/orders/1"),
            // Created, filled and changed: one read of the whole subtree.
            (0, NodeCreated, "/services/new"),
            (0, NodeCreated, "/services/new/1"),
            (0, NodeDataChanged, "/services/new/1"),
            // Sorts between a node and the nodes below it.
            (0, NodeCreated, "/services/new-er"),
            // No event named the parents of this node.
            (0, NodeCreated, "/services/deep/er/1"),
            (0, NodeDataChanged, "/services/orders"),
            (0, NodeChildrenChanged, "/services/orders"),
            (0, NodeChildrenChanged, "/services/pay"),
            (1, NodeDeleted, "/x"),
            (1, NodeCreated, "/y"),
        ],
    );
    expect![[r#"
        0 /services/deep Subtree
        0 /services/new Subtree
        0 /services/new-er Subtree
        0 /services/orders Subtree
        0 /services/pay Children a
        0 /services/pay/a Data
        1 /x Subtree
        1 /y Subtree
    "#]]
    .assert_eq(&reported);
}

#[test]
fn a_root_that_is_not_there_is_read_whole_when_anything_is_heard_of_it() {
    let roots = [Root::new("/a").unwrap()];
    let reported = starts(&roots, &[RootView::default()], &[(0, zk::EventType::NodeCreated, "/a/b/c")]);
    assert_eq!(reported, "0 /a Subtree\n");
}

#[test]
fn what_is_too_deep_or_not_wanted_is_not_read() {
    let mut root = Root::new("/dubbo").unwrap().with_filter(|path| !path.ends_with("consumers"));
    root.max_depth = 3;
    for (path, covered) in [
        ("/dubbo", true),
        ("/dubbo/com.acme.Pay/providers/x", true),
        ("/dubbo/com.acme.Pay/providers/x/y", false),
        ("/dubbo/com.acme.Pay/consumers", false),
        ("/dubbo/com.acme.Pay/consumers/x", false),
    ] {
        assert_eq!(root.reads(path), covered, "{path}");
    }
    assert!(root.is_deepest("/dubbo/a/b/c") && !root.is_deepest("/dubbo/a/b"));
    let mut top = Root::new("/").unwrap();
    top.max_depth = 1;
    assert!(top.reads("/") && top.reads("/a") && !top.reads("/a/b"));
}

#[test]
fn a_path_that_no_node_can_have_is_no_root() {
    assert_eq!(
        Root::new("services").unwrap_err(),
        "`services` is not the path of a node: it does not begin with `/`"
    );
}
