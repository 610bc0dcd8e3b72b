use std::net::SocketAddr;

use vmesh_daemon::Tasks;
use vmesh_testkit::consul::Consul;
use vmesh_testkit::wait_for;
use vmesh_testkit::zookeeper::{Client, Kind, ZooKeeper};

use super::*;

const BOUND: Duration = Duration::from_secs(60);
const ORDERS: &str = "kind: Service\nname: orders\nprotocol: http\n";

/// A real registry to which the test writes documents.
enum Store {
    Consul(Consul),
    ZooKeeper(ZooKeeper, Client),
}

impl Store {
    async fn write(&mut self, name: &str, text: &str) {
        match self {
            Store::Consul(consul) => {
                let address: SocketAddr = consul.address(0).unwrap();
                let url = format!("http://{address}/v1/kv/vmesh/{name}");
                let status = std::process::Command::new("python3")
                    .args(["-c", "import sys, urllib.request as u; u.urlopen(u.Request(sys.argv[1], sys.argv[2].encode(), method='PUT'))"])
                    .args([&url, text])
                    .status();
                assert!(status.unwrap().success());
            }
            Store::ZooKeeper(_, client) => {
                client.make(&format!("/vmesh/{name}"), text.as_bytes(), Kind::Persistent).await.unwrap();
            }
        }
    }

    async fn remove(&mut self, name: &str) {
        match self {
            Store::Consul(consul) => {
                consul
                    .put(
                        0,
                        "/v1/txn",
                        &serde_json::json!([{"KV": {"Verb": "delete", "Key": format!("vmesh/{name}")}}]),
                    )
                    .await
                    .unwrap();
            }
            Store::ZooKeeper(_, client) => client.delete(&format!("/vmesh/{name}")).await.unwrap(),
        }
    }

    async fn restart_empty(&mut self) {
        match self {
            Store::Consul(consul) => consul.restart_empty().await.unwrap(),
            Store::ZooKeeper(zookeeper, client) => {
                zookeeper.restart_empty().await.unwrap();
                *client = zookeeper.client(0).await.unwrap();
            }
        }
    }

    fn kill(&mut self) {
        match self {
            Store::Consul(consul) => consul.kill(0).unwrap(),
            Store::ZooKeeper(zookeeper, _) => zookeeper.kill(0).unwrap(),
        }
    }
}

struct FollowedDocuments {
    view: watch::Receiver<DocumentsView>,
    _tasks: Tasks,
}

async fn follow(config: DocumentsConfig, kept: Vec<SavedDocument>) -> FollowedDocuments {
    let (views, view) = watch::channel(DocumentsView::default());
    let follower = DocumentsFollower::new(Some(config), kept).read_once(&views).await;
    let mut tasks = Tasks::new();
    tasks.spawn("documents", follower.follow(views));
    FollowedDocuments { view, _tasks: tasks }
}

impl FollowedDocuments {
    /// Returns the services that have documents, each with its protocol, and the problems.
    fn shown(&self) -> String {
        let view = self.view.borrow();
        let services = view.documents.services.values().map(|service| {
            format!("{} {}", service.name, service.protocol.map_or("", vmesh_model::Protocol::as_str))
        });
        let problems = view.problems.iter().map(|problem| format!("\n{problem}"));
        services.collect::<Vec<_>>().join(", ") + &problems.collect::<String>()
    }

    async fn until(&self, what: impl Fn(&str) -> bool) -> String {
        wait_for("the documents to be as expected", BOUND, async || {
            let shown = self.shown();
            if what(&shown) { Ok(shown) } else { Err(shown) }
        })
        .await
        .unwrap()
    }
}

async fn documents_follow_their_registry(mut store: Store, config: DocumentsConfig, place: &str) {
    // Consul's index of a prefix starts with its first key, so the first document is written before the
    // follower starts.
    store.write("orders.yaml", ORDERS).await;
    let followed = follow(config.clone(), Vec::new()).await;
    followed.until(|shown| shown == "orders http").await;

    store.write("team/pay.yaml", "kind: Service\nname: pay\nprotocol: tcp\n").await;
    followed.until(|shown| shown == "orders http, pay tcp").await;
    store.write("orders.yaml", &ORDERS.replace("http", "grpc")).await;
    followed.until(|shown| shown == "orders grpc, pay tcp").await;

    // After an unknown field or an empty value, the last good version stays in force and the problem names
    // the place.
    store.write("orders.yaml", "kind: Service\nname: orders\nprotocl: http\n").await;
    let shown = followed.until(|shown| shown.contains("did you mean")).await;
    assert!(shown.starts_with("orders grpc, pay tcp\n"), "{shown}");
    assert!(shown.contains(&format!("{place}orders.yaml:3:1: unknown field `protocl`")), "{shown}");
    store.write("orders.yaml", "").await;
    let shown = followed.until(|shown| shown.contains("it is empty")).await;
    assert!(shown.starts_with("orders grpc, pay tcp\n"), "{shown}");
    store.write("orders.yaml", ORDERS).await;
    followed.until(|shown| shown == "orders http, pay tcp").await;

    store.remove("team/pay.yaml").await;
    followed.until(|shown| shown == "orders http").await;

    // An emptied registry is taken for an accident, until an operator writes a document.
    store.restart_empty().await;
    let shown = followed.until(|shown| shown.contains("looks like an accident")).await;
    assert!(shown.starts_with("orders http\n") && shown.contains("all 1 documents are gone"), "{shown}");
    store.write("nothing.yaml", "# nothing is meant\n").await;
    followed.until(|shown| shown.is_empty()).await;
    store.write("orders.yaml", ORDERS).await;
    followed.until(|shown| shown == "orders http").await;

    // If the registry does not answer, the documents stay in force, and a restarted control plane serves the
    // saved ones.
    store.kill();
    let shown = followed.until(|shown| shown.contains("could not be read")).await;
    assert!(shown.starts_with("orders http\n"), "{shown}");
    let kept = followed.view.borrow().kept.to_vec();
    let restarted = follow(config.clone(), kept).await;
    assert!(restarted.shown().starts_with("orders http\n"), "{}", restarted.shown());
    assert_eq!(restarted.view.borrow().waiting, None);
    let fresh = follow(config, Vec::new()).await;
    let waiting = fresh.view.borrow().waiting.clone().unwrap();
    assert!(waiting.starts_with("the documents of `"), "{waiting}");
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_are_read_from_consul_and_outlive_it() {
    let consul = Consul::one().await.unwrap();
    let text = format!("consul_kv: {{prefix: vmesh/, consul: {{address: \"{}\"}}}}", consul.url(0).unwrap());
    let config = vmesh_model::load::strict("control.yaml", &text).unwrap();
    documents_follow_their_registry(Store::Consul(consul), config, "consul-kv:vmesh/").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_are_read_from_zookeeper_and_outlive_it() {
    let zookeeper = ZooKeeper::one().await.unwrap();
    let client = zookeeper.client(0).await.unwrap();
    let text = format!("zookeeper: {{path: /vmesh, zookeeper: {{connect: \"{}\"}}}}", zookeeper.connect());
    let config = vmesh_model::load::strict("control.yaml", &text).unwrap();
    documents_follow_their_registry(Store::ZooKeeper(zookeeper, client), config, "zookeeper:/vmesh/").await;
}

#[test]
fn most_documents_gone_from_a_registry_are_held_until_that_is_confirmed() {
    let config: DocumentsConfig =
        vmesh_model::load::strict("control.yaml", "consul_kv: {prefix: vmesh/}").unwrap();
    let mut follower = DocumentsFollower::new(Some(config), Vec::new());
    let files = |range: std::ops::Range<u32>| -> Vec<DocumentText> {
        range
            .map(|n| DocumentText {
                path: format!("consul-kv:vmesh/{n}"),
                content: Ok(b"# x".to_vec()),
                is_public: true,
            })
            .collect()
    };
    let start = Instant::now();
    assert_eq!(follower.check_for_loss(files(0..6), start).unwrap().len(), 6);
    // Removing half of the documents is accepted, and more if fewer than five are left. Replaced documents count as removed.
    assert_eq!(follower.check_for_loss(files(0..3), start).unwrap().len(), 3);
    assert_eq!(follower.check_for_loss(files(0..1), start).unwrap().len(), 1);
    assert_eq!(follower.check_for_loss(files(0..10), start).unwrap().len(), 10);
    let why = follower.check_for_loss(files(8..12), start).unwrap_err();
    assert!(why.starts_with("2 of 10 documents are left, which looks like an accident"), "{why}");
    assert_eq!(follower.missing_since, Some(start));
    // Documents that return are accepted at once.
    assert_eq!(follower.check_for_loss(files(0..9), start).unwrap().len(), 9);
    assert_eq!(follower.missing_since, None);
    // A confirmed removal is accepted.
    follower.check_for_loss(files(0..1), start).unwrap_err();
    follower.accept(&files(0..1));
    assert_eq!(follower.check_for_loss(files(0..1), start).unwrap().len(), 1);
    let why = follower.check_for_loss(Vec::new(), start).unwrap_err();
    assert!(why.contains("to remove them on purpose, leave one"), "{why}");

    // Ten documents, then four, then none: an empty registry is never confirmed by time, so no confirming
    // read is scheduled.
    let mut follower = DocumentsFollower::new(follower_config(), Vec::new());
    follower.check_for_loss(files(0..10), start).unwrap();
    follower.check_for_loss(files(0..4), start).unwrap_err();
    assert_eq!(follower.missing_since, Some(start));
    follower.check_for_loss(Vec::new(), start).unwrap_err();
    assert_eq!(follower.missing_since, None);
}

fn follower_config() -> Option<DocumentsConfig> {
    vmesh_model::load::strict("control.yaml", "consul_kv: {prefix: vmesh/}").ok()
}

/// A document may be a link to a file that only the control plane's user can read, or be such a file itself.
/// Its problems name the place without quoting content. `--check` runs as the operator's own user and quotes
/// it.
#[tokio::test]
async fn what_documents_say_that_not_everybody_may_read_is_not_quoted() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    const SECRET: &str = "s3cr3t-t0k3n";
    let mode = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let (dir, elsewhere) = (vmesh_testkit::tempdir().unwrap(), vmesh_testkit::tempdir().unwrap());
    let text = format!("kind: Service\nname: pay\n{SECRET}: 1\n");
    std::fs::write(elsewhere.join("token"), SECRET).unwrap();
    mode(&elsewhere.join("token"), 0o600);
    std::fs::create_dir(elsewhere.join("private")).unwrap();
    std::fs::write(elsewhere.join("private/open"), &text).unwrap();
    mode(&elsewhere.join("private/open"), 0o644);
    mode(&elsewhere.join("private"), 0o700);
    symlink(elsewhere.join("token"), dir.join("a.yaml")).unwrap();
    symlink(elsewhere.join("private/open"), dir.join("b.yaml")).unwrap();
    std::fs::write(dir.join("c.yaml"), text.replace("pay", "orders")).unwrap();
    mode(&dir.join("c.yaml"), 0o640);
    std::fs::write(
        dir.join("open.yaml"),
        text.replace("pay", "web").replace(SECRET, "everybody-may-see-this"),
    )
    .unwrap();
    mode(&dir.join("open.yaml"), 0o644);
    let config: DocumentsConfig =
        vmesh_model::load::strict("control.yaml", &format!("dir: {}", dir.display())).unwrap();
    let (views, view) = watch::channel(DocumentsView::default());
    DocumentsFollower::new(Some(config.clone()), Vec::new()).read_once(&views).await;
    let view = view.borrow();
    let shown = format!("{:?} {:?}", view.problems, view.waiting);
    assert!(!shown.contains(SECRET), "{shown}");
    assert!(shown.contains("everybody-may-see-this"), "{shown}");
    for file in ["a.yaml", "b.yaml", "c.yaml"] {
        let place = dir.join(file).display().to_string();
        assert!(view.problems.iter().any(|problem| *problem.place.file == *place), "{file}: {shown}");
    }
    let checked = format!("{:?}", check(Some(config)).await);
    assert!(checked.contains(SECRET), "{checked}");
}
