//! A mirror of real servers that are killed, frozen and restarted.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::timeout;
use vmesh_testkit::zookeeper::{Kind, Options, Version, ZooKeeper};
use vmesh_testkit::{tempdir, wait_for};
use vmesh_zookeeper::config::{Auth, Mechanism, Sasl, Tls, Watch};
use vmesh_zookeeper::{Config, Error, Mirror, Node, Root, SessionEvent, View};
use zookeeper_client as zk;

/// A generous limit, since several JVMs share two cores.
const SOON: Duration = Duration::from_secs(60);
const SESSION: Duration = Duration::from_secs(4);

fn config(connect: &str) -> Config {
    Config { session_timeout: SESSION, ..Config::of(connect.parse().unwrap()) }
}

#[derive(Default)]
struct Counts {
    reads: AtomicU64,
    failed: AtomicU64,
    connected: AtomicU64,
    disconnected: AtomicU64,
    expired: AtomicU64,
}

impl Counts {
    fn count(&self, counted: SessionEvent) {
        let (counter, by) = match counted {
            SessionEvent::Reads(by) => (&self.reads, by),
            SessionEvent::FailedReads(by) => (&self.failed, by),
            SessionEvent::Connected => (&self.connected, 1),
            SessionEvent::Disconnected => (&self.disconnected, 1),
            SessionEvent::Expired => (&self.expired, 1),
        };
        counter.fetch_add(by, Ordering::Relaxed);
    }
}

/// A mirror with its counters and the last view that it returned.
struct TestMirror {
    mirror: Mirror,
    view: View,
    counts: Arc<Counts>,
}

impl TestMirror {
    fn of(config: Config, roots: &[&str]) -> TestMirror {
        let roots = roots.iter().map(|path| Root::new(*path).unwrap()).collect();
        TestMirror::with(config, roots)
    }

    fn with(config: Config, roots: Vec<Root>) -> TestMirror {
        let counts = Arc::new(Counts::default());
        let counter = counts.clone();
        let mirror = Mirror::new(config, roots, move |counted| counter.count(counted));
        TestMirror { mirror, view: View::default(), counts }
    }

    /// Waits until the view, printed by `show`, equals `expected`.
    async fn until(&mut self, expected: &str) {
        self.until_view(expected, |view| show(view) == expected).await;
    }

    async fn until_view(&mut self, what: &str, is: impl Fn(&View) -> bool) {
        let waited = timeout(SOON, async {
            while !is(&self.view) {
                self.view = self.mirror.changed().await;
            }
        });
        if waited.await.is_err() {
            panic!("waited for {what}; last seen: {}: {:?}", show(&self.view), self.view.stale_because);
        }
    }

    fn count(&self, counter: impl Fn(&Counts) -> &AtomicU64) -> u64 {
        counter(&self.counts).load(Ordering::Relaxed)
    }
}

/// Prints a view: `/a [x=1 x/y=2] | /b absent | stale`.
fn show(view: &View) -> String {
    let root = |observed: &vmesh_zookeeper::mirror::RootView| {
        let mut shown = match &observed.tree {
            None => "absent".to_owned(),
            Some(tree) => nodes(tree),
        };
        if observed.failed.is_some() {
            shown += " failed";
        }
        shown
    };
    let mut shown: Vec<_> = view.roots.iter().map(root).collect();
    if view.stale_because.is_some() {
        shown.push("stale".to_owned());
    }
    shown.join(" | ")
}

fn nodes(tree: &Node) -> String {
    let mut all = Vec::new();
    tree.walk(&mut |path, node| {
        let unreadable = if node.unreadable.is_some() { "!" } else { "" };
        all.push(format!("{path}{unreadable}={}", String::from_utf8_lossy(&node.data)));
    });
    format!("[{}]", all.join(" "))
}

#[tokio::test]
async fn a_subtree_is_mirrored_and_one_change_costs_one_node() {
    let servers = ZooKeeper::one().await.unwrap();
    let mut client = servers.client(0).await.unwrap();
    client.make("/a/x", b"1", Kind::Persistent).await.unwrap();
    client.make("/a/x/y", b"2", Kind::Ephemeral).await.unwrap();
    client.make("/a/z", b"3", Kind::Persistent).await.unwrap();
    let mut mirrored = TestMirror::of(config(&servers.connect()), &["/a", "/b"]);
    mirrored.until("[x=1 x/y=2 z=3] | absent").await;
    let tree = mirrored.view.roots[0].tree.clone().unwrap();
    let before = mirrored.count(|c| &c.reads);

    client.set("/a/x/y", b"22").await.unwrap();
    mirrored.until("[x=1 x/y=22 z=3] | absent").await;
    let now = mirrored.view.roots[0].tree.clone().unwrap();
    assert!(Arc::ptr_eq(&tree.children["z"], &now.children["z"]));
    assert_eq!(mirrored.count(|c| &c.reads), before + 1);

    client.delete("/a/z").await.unwrap();
    client.make("/b/c/d", b"4", Kind::Persistent).await.unwrap();
    mirrored.until("[x=1 x/y=22] | [c= c/d=4]").await;
    client.delete_all("/b").await.unwrap();
    client.delete_all("/a").await.unwrap();
    mirrored.until("absent | absent").await;
    client.make("/a/x", b"5", Kind::Persistent).await.unwrap();
    mirrored.until("[x=5] | absent").await;
    assert_eq!(mirrored.count(|c| &c.connected), 1);
}

#[tokio::test]
async fn a_server_without_persistent_watches_is_watched_node_by_node() {
    let mut servers =
        ZooKeeper::start(Options { version: Version::V3_4, ..Options::default() }).await.unwrap();
    let mut client = servers.client(0).await.unwrap();
    client.make("/a/x", b"1", Kind::Persistent).await.unwrap();
    client.make("/a/x/y", b"2", Kind::Ephemeral).await.unwrap();
    let mut mirrored = TestMirror::of(config(&servers.connect()), &["/a", "/b"]);
    mirrored.until("[x=1 x/y=2] | absent").await;
    client.set("/a/x/y", b"22").await.unwrap();
    mirrored.until("[x=1 x/y=22] | absent").await;
    client.set("/a/x/y", b"23").await.unwrap();
    mirrored.until("[x=1 x/y=23] | absent").await;
    client.make("/a/n/m", b"3", Kind::Persistent).await.unwrap();
    client.make("/b/c", b"4", Kind::Persistent).await.unwrap();
    mirrored.until("[n= n/m=3 x=1 x/y=23] | [c=4]").await;
    client.delete_all("/a/n").await.unwrap();
    client.delete_all("/b").await.unwrap();
    mirrored.until("[x=1 x/y=23] | absent").await;
    client.make("/b/c", b"5", Kind::Persistent).await.unwrap();
    mirrored.until("[x=1 x/y=23] | [c=5]").await;
    // Reading everything again adds no watch: each node keeps one watch of each kind.
    let watches = servers.watches(0).await.unwrap();
    mirrored.mirror.confirm().await.unwrap();
    mirrored.mirror.confirm().await.unwrap();
    assert_eq!(servers.watches(0).await.unwrap(), watches);

    servers.restart(0).await.unwrap();
    mirrored.until("[x=1 x/y=23] | [c=5]").await;
    let mut client = servers.client(0).await.unwrap();
    client.set("/a/x", b"6").await.unwrap();
    mirrored.until("[x=6 x/y=23] | [c=5]").await;

    let wanted = Config { watch: Watch::Persistent, ..config(&servers.connect()) };
    let mut refused = TestMirror::of(wanted, &["/a"]);
    refused.until_view("a refusal", |view| view.stale_because.is_some()).await;
    let why = refused.view.stale_because.clone().unwrap();
    assert!(why.contains("is older than 3.6 and has no persistent watches: set `watch`"), "{why}");
}

/// Pins the client's bug that makes mirrors set their watches anew. When the bug is fixed, this test fails, and
/// the workaround may be removed.
#[tokio::test]
async fn the_client_alone_loses_its_watch_when_its_server_is_killed() {
    let mut servers = ZooKeeper::three().await.unwrap();
    let mut writer = servers.client(0).await.unwrap();
    writer.make("/a", b"", Kind::Persistent).await.unwrap();
    let alone =
        zk::Client::connector().with_session_timeout(SESSION).connect(&servers.connect()).await.unwrap();
    let mut watcher = alone.watch("/a", zk::AddWatchMode::PersistentRecursive).await.unwrap();
    let mut mirrored = TestMirror::of(config(&servers.connect()), &["/a"]);
    mirrored.until("[]").await;

    writer.make("/a/before", b"", Kind::Persistent).await.unwrap();
    let event = timeout(SOON, watcher.changed()).await.unwrap();
    assert_eq!(event.path, "/a/before");
    mirrored.until("[before=]").await;

    let session = i64::from_str_radix(alone.session_id().to_string().trim_start_matches("0x"), 16).unwrap();
    let held_by = servers.server_of(session).await.unwrap();
    servers.kill(held_by).unwrap();
    let mut states = Vec::new();
    while states.last() != Some(&zk::SessionState::SyncConnected) {
        let event = timeout(SOON, watcher.changed()).await.unwrap();
        assert_eq!(event.event_type, zk::EventType::Session);
        states.push(event.session_state);
    }
    assert_eq!(states, [zk::SessionState::Disconnected, zk::SessionState::SyncConnected]);
    let other = (held_by + 1) % 3;
    servers.wait_serving(other).await.unwrap();
    let mut writer = servers.client(other).await.unwrap();
    writer.make("/a/after", b"", Kind::Persistent).await.unwrap();
    // The client is connected and can read the node, but gets no event.
    wait_for("the other to be read", SOON, async || {
        let children = alone.list_children("/a").await;
        children.is_ok_and(|children| children.contains(&"after".to_owned())).then_some(())
    })
    .await
    .unwrap();
    mirrored.until("[after= before=]").await;
    assert!(
        timeout(Duration::from_secs(2), watcher.changed()).await.is_err(),
        "zookeeper-client restores persistent watches now: see the crate's documentation"
    );
}

#[tokio::test]
async fn events_flow_again_after_whichever_server_is_killed() {
    let mut servers = ZooKeeper::three().await.unwrap();
    let mut writer = servers.client(0).await.unwrap();
    writer.make("/a", b"", Kind::Persistent).await.unwrap();
    let mut mirrored = TestMirror::of(config(&servers.connect()), &["/a"]);
    mirrored.until("[]").await;
    let mut expected = Vec::new();
    // Each server is killed in turn, so the leader and the mirror's own server are among them.
    for killed in 0..3 {
        servers.kill(killed).unwrap();
        let other = (killed + 1) % 3;
        servers.wait_serving(other).await.unwrap();
        let mut writer = servers.client(other).await.unwrap();
        writer.make(&format!("/a/{killed}-during"), b"", Kind::Persistent).await.unwrap();
        expected.push(format!("{killed}-during="));
        mirrored.until(&format!("[{}]", expected.join(" "))).await;
        servers.restart(killed).await.unwrap();
        let mut writer = servers.client(other).await.unwrap();
        writer.make(&format!("/a/{killed}-later"), b"", Kind::Persistent).await.unwrap();
        expected.push(format!("{killed}-later="));
        mirrored.until(&format!("[{}]", expected.join(" "))).await;
    }
}

#[tokio::test]
async fn an_expired_session_is_replaced_and_everything_is_read_again() {
    let mut servers = ZooKeeper::one().await.unwrap();
    let mut writer = servers.client(0).await.unwrap();
    writer.make("/a/x", b"1", Kind::Persistent).await.unwrap();
    let mut mirrored = TestMirror::of(config(&servers.connect()), &["/a"]);
    mirrored.until("[x=1]").await;
    let tree = mirrored.view.roots[0].tree.clone().unwrap();
    servers.freeze(0).unwrap();
    mirrored.until("[x=1] | stale").await;
    wait_for("the session to expire", SOON, async || match mirrored.count(|c| &c.expired) {
        0 => Err("not yet"),
        _ => Ok(()),
    })
    .await
    .unwrap();
    servers.thaw(0).unwrap();
    mirrored.until("[x=1]").await;
    assert!(Arc::ptr_eq(&tree, mirrored.view.roots[0].tree.as_ref().unwrap()), "nothing has changed");
    writer.set("/a/x", b"2").await.unwrap();
    mirrored.until("[x=2]").await;
    assert_eq!(mirrored.count(|c| &c.connected), 2);
    assert_eq!(mirrored.count(|c| &c.disconnected), 1);
}

#[tokio::test]
async fn what_was_known_stays_while_no_server_is_there_and_says_why() {
    let mut servers = ZooKeeper::one().await.unwrap();
    let mut writer = servers.client(0).await.unwrap();
    writer.make("/a/x", b"1", Kind::Ephemeral).await.unwrap();
    let mut mirrored = TestMirror::of(config(&servers.connect()), &["/a"]);
    mirrored.until("[x=1]").await;
    servers.kill(0).unwrap();
    mirrored.until("[x=1] | stale").await;
    let address = servers.address(0).unwrap();
    let expected = format!("could not open a session with ZooKeeper: {address}: connection refused");
    mirrored.until_view(&expected, |view| view.stale_because.as_deref() == Some(&*expected)).await;
    assert!(matches!(mirrored.mirror.confirm().await, Err(Error::Lost { .. })));
    servers.restart(0).await.unwrap();
    mirrored.until("[x=1]").await;
    servers.restart_empty().await.unwrap();
    mirrored.until("absent").await;
    let mut writer = servers.client(0).await.unwrap();
    writer.make("/a/x", b"2", Kind::Ephemeral).await.unwrap();
    mirrored.until("[x=2]").await;
}

#[tokio::test]
async fn a_server_without_a_quorum_is_read_and_what_it_says_is_stale() {
    let mut servers =
        ZooKeeper::start(Options { servers: 3, read_only: true, ..Options::default() }).await.unwrap();
    let mut writer = servers.client(0).await.unwrap();
    writer.make("/a/x", b"1", Kind::Persistent).await.unwrap();
    let mut early = TestMirror::of(config(&servers.connect()), &["/a"]);
    early.until("[x=1]").await;
    let leader = servers.leader().await.unwrap();
    // The remaining server must have the write: a client has read it there.
    let stays = (leader + 1) % 3;
    let mut reader = servers.client(stays).await.unwrap();
    wait_for("the follower", SOON, async || reader.get("/a/x").await).await.unwrap();
    for index in (0..3).filter(|index| *index != stays) {
        servers.kill(index).unwrap();
    }
    let mut late = TestMirror::of(config(&servers.connect()), &["/a"]);
    late.until("[x=1] | stale").await;
    let is_read_only = |view: &View| view.stale_because.as_deref().is_some_and(|why| why.contains("quorum"));
    late.until_view("read-only", is_read_only).await;
    early.until_view("read-only", is_read_only).await;
    assert_eq!(show(&early.view), "[x=1] | stale");
    assert!(matches!(late.mirror.confirm().await, Err(Error::ReadOnly)));

    let strict = Config { read_only: false, ..config(&servers.connect()) };
    let mut strict = TestMirror::of(strict, &["/a"]);
    strict.until_view("a reason", |view| view.stale_because.is_some()).await;
    assert!(strict.view.roots.is_empty());

    for index in (0..3).filter(|index| *index != stays) {
        servers.launch_again(index).unwrap();
    }
    servers.wait_serving(leader).await.unwrap();
    let mut writer = servers.client(leader).await.unwrap();
    writer.set("/a/x", b"2").await.unwrap();
    for mirrored in [&mut early, &mut late, &mut strict] {
        mirrored.until("[x=2]").await;
    }
}

#[tokio::test]
async fn a_node_that_may_not_be_read_costs_that_node_and_is_read_with_the_right_credentials() {
    let servers = ZooKeeper::one().await.unwrap();
    let mut writer = servers.client(0).await.unwrap();
    writer.make("/a/open", b"1", Kind::Persistent).await.unwrap();
    writer.authenticate("mesh:secret").await.unwrap();
    writer.make("/a/closed", b"2", Kind::Persistent).await.unwrap();
    writer.make("/closed/x", b"3", Kind::Persistent).await.unwrap();

    let mut nobody = TestMirror::of(config(&servers.connect()), &["/a", "/closed"]);
    nobody.until("[closed!= open=1] | absent failed").await;
    let why = nobody.view.roots[1].failed.clone().unwrap();
    assert!(why.starts_with("could not read /closed: not allowed; the node's ACL has to give READ"), "{why}");

    let dir = tempdir().unwrap();
    let file = dir.join("digest");
    std::fs::write(&file, "mesh:wrong\n").unwrap();
    let auth = Some(Auth { digest_file: file.clone() });
    let mut mirrored = TestMirror::of(Config { auth, ..config(&servers.connect()) }, &["/a", "/closed"]);
    mirrored.until("[closed!= open=1] | absent failed").await;
    // Unreadable nodes are read again without an event, with the credentials that the file has then.
    std::fs::write(&file, "mesh:secret\n").unwrap();
    mirrored.until("[closed=2 open=1] | [x=3]").await;
}

#[tokio::test]
async fn a_client_certificate_opens_the_secure_port() {
    let servers = ZooKeeper::start(Options { tls: true, ..Options::default() }).await.unwrap();
    let mut writer = servers.client(0).await.unwrap();
    writer.make("/a/x", b"1", Kind::Persistent).await.unwrap();
    let files = servers.tls();
    let tls = Tls { ca_file: files.ca, cert_file: Some(files.cert), key_file: Some(files.key) };
    let secure = Config { tls: Some(tls.clone()), ..config(&servers.secure_connect()) };
    let mut mirrored = TestMirror::of(secure.clone(), &["/a"]);
    mirrored.until("[x=1]").await;
    let without = Config {
        tls: Some(Tls { cert_file: None, key_file: None, ..tls.clone() }),
        ..config(&servers.secure_connect())
    };
    let mut refused = TestMirror::of(without, &["/a"]);
    refused.until_view("a refusal", |view| view.stale_because.is_some()).await;
    let why = refused.view.stale_because.clone().unwrap();
    assert!(why.contains("accepts connections but no session") && why.contains("certificate"), "{why}");
    let no_key = Config { tls: Some(Tls { key_file: None, ..tls }), ..secure };
    let mut refused = TestMirror::of(no_key, &["/a"]);
    refused.until_view("a refusal", |view| view.stale_because.is_some()).await;
    assert!(refused.view.stale_because.unwrap().contains("set both"));
}

#[tokio::test]
async fn sasl_opens_a_server_that_wants_it_and_a_wrong_password_is_not_tried_in_a_tight_loop() {
    let sasl = Some(("mesh", "secret"));
    let servers = ZooKeeper::start(Options { sasl, ..Options::default() }).await.unwrap();
    let dir = tempdir().unwrap();
    let file = dir.join("sasl");
    std::fs::write(&file, "mesh:wrong\n").unwrap();
    let sasl = Sasl { mechanism: Mechanism::DigestMd5, credentials_file: file.clone() };
    let with = Config { sasl: Some(sasl), ..config(&servers.connect()) };
    let mut mirrored = TestMirror::of(with, &["/zookeeper"]);
    mirrored.until_view("a refusal", |view| view.stale_because.is_some()).await;
    assert!(mirrored.view.roots.is_empty());
    let mut nobody = TestMirror::of(config(&servers.connect()), &["/zookeeper"]);
    nobody.until_view("a refusal", |view| view.stale_because.is_some()).await;
    let why = nobody.view.stale_because.clone().unwrap();
    assert!(why.contains("refused the credentials, or requires another kind"), "{why}");
    std::fs::write(&file, "mesh:secret\n").unwrap();
    mirrored.until_view("everything", |view| view.stale_because.is_none() && !view.roots.is_empty()).await;
}

#[tokio::test]
async fn paths_are_below_the_chroot_and_a_chroot_that_is_not_there_is_said() {
    let servers = ZooKeeper::one().await.unwrap();
    let mut writer = servers.client(0).await.unwrap();
    let mut mirrored = TestMirror::of(config(&format!("{}/prod/mesh", servers.connect())), &["/a"]);
    mirrored.until("absent failed").await;
    assert_eq!(
        mirrored.view.roots[0].failed.as_deref(),
        Some("the chroot /prod/mesh does not exist: see `connect`")
    );
    writer.make("/prod/mesh/a/x", b"1", Kind::Persistent).await.unwrap();
    mirrored.until("[x=1]").await;
    writer.set("/prod/mesh/a/x", b"2").await.unwrap();
    mirrored.until("[x=2]").await;
}

#[tokio::test]
async fn more_than_a_mebibyte_of_children_is_read() {
    let servers = ZooKeeper::one().await.unwrap();
    let mut writer = servers.client(0).await.unwrap();
    let long = "n".repeat(400);
    writer.make("/a", b"", Kind::Persistent).await.unwrap();
    for index in 0..3000 {
        writer.create(&format!("/a/{long}-{index:05}"), b"x", Kind::Persistent).await.unwrap();
    }
    let mut mirrored = TestMirror::of(config(&servers.connect()), &["/a"]);
    let size = |size: usize| {
        move |view: &View| {
            view.roots.iter().filter_map(|observed| observed.tree.as_ref()).any(|tree| tree.size() == size)
        }
    };
    mirrored.until_view("3,000 nodes", size(3001)).await;
    writer.delete(&format!("/a/{long}-00000")).await.unwrap();
    mirrored.until_view("2,999 nodes", size(3000)).await;

    let mut few = Root::new("/a").unwrap();
    few.max_nodes = 100;
    let mut limited = TestMirror::with(config(&servers.connect()), vec![few]);
    limited.until("absent failed").await;
    let why = limited.view.roots[0].failed.clone().unwrap();
    assert!(why.starts_with("there are more than 100 nodes below /a"), "{why}");
}

#[tokio::test]
async fn confirm_reads_everything_again() {
    let servers = ZooKeeper::one().await.unwrap();
    let mut writer = servers.client(0).await.unwrap();
    writer.make("/a/x", b"1", Kind::Persistent).await.unwrap();
    let mut mirrored = TestMirror::of(config(&servers.connect()), &["/a"]);
    mirrored.until("[x=1]").await;
    let before = mirrored.count(|c| &c.reads);
    writer.set("/a/x", b"2").await.unwrap();
    assert_eq!(show(&mirrored.mirror.confirm().await.unwrap()), "[x=2]");
    assert!(mirrored.count(|c| &c.reads) >= before + 3, "the root, its children, the child");
}

/// The server closes each connection, as an overloaded one does, or one that rejects the client.
#[tokio::test]
async fn a_server_that_throws_us_out_is_left_alone_for_longer_each_time() {
    let place = vmesh_testkit::Loopback::unique().unwrap();
    let listener = tokio::net::TcpListener::bind((place.ip(), 2181)).await.unwrap();
    let mut mirrored = TestMirror::of(config(&format!("{place}:2181")), &["/a"]);
    let mut accepted = 0;
    let began = tokio::time::Instant::now();
    while began.elapsed() < Duration::from_secs(3) {
        tokio::select! {
            _ = listener.accept() => accepted += 1,
            _ = mirrored.mirror.changed() => {}
            () = tokio::time::sleep(Duration::from_millis(100)) => {}
        }
    }
    // Connections arrive at the earliest after 50, 150, 350, 750 and 1550 ms, and each is followed by one for
    // the diagnosis.
    assert!((2..=14).contains(&accepted), "{accepted} connections within 3 s");
    let why = mirrored.mirror.view().stale_because.unwrap();
    assert!(why.contains("accepts connections but no session"), "{why}");
}
