use std::net::SocketAddr;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use vmesh_catalog::{Catalog, SourceService, SourceView};
use vmesh_model::{Endpoint, Health, Place, Registration, ServiceName, State, Weight};
use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_testkit::wait_for;
use vmesh_xds::Kind;
use vmesh_xds::client::BenchClient;
use vmesh_xds::server::{AdsService, serve};

use super::*;
use crate::fleet::{NodeAdmission, NodeIntake};
use crate::identity::IdentityService;
use crate::known_nodes::{KnownNodes, NodeLimits};
use crate::worlds::NodeEvent;

const BOUND: Duration = Duration::from_secs(30);

#[test]
fn few_past_worlds_are_kept() {
    let mut past = PastWorlds::default();
    for generation in 0..100 {
        past.push(Arc::new(World { generation, ..World::empty() }), SystemTime::UNIX_EPOCH);
    }
    let kept: Vec<_> = past.worlds().map(|past| past.world.generation).collect();
    assert_eq!((kept.len(), kept.first(), kept.last()), (PastWorlds::MAX, Some(&84), Some(&99)));
}

/// Returns a view with one service, whose endpoint has this weight.
fn view(weight: u32) -> SourceView {
    let service: ServiceName = "orders".parse().unwrap();
    let endpoint = Endpoint {
        address: "10.0.0.1:80".parse().unwrap(),
        hostname: None,
        weight: Weight::new(weight).unwrap(),
        health: Health::Healthy,
        zone: None,
        version: None,
        labels: Default::default(),
        source: "file".into(),
    };
    let registration = Registration {
        service: service.clone(),
        protocol: None,
        port: None,
        endpoints: Arc::from([endpoint]),
        place: Place::file("services.d"),
    };
    let seen = SourceService { registration: Arc::new(registration), state: State::Fresh, because: None };
    SourceView { services: [(service, seen)].into(), problems: Vec::new() }
}

struct Mesh {
    catalog: Catalog,
    worlds: watch::Sender<PublishedWorld>,
    fleet: Arc<Fleet>,
    compiled: watch::Receiver<Arc<Compilation>>,
    address: SocketAddr,
    /// The receiver of node reports, kept open.
    _reports: mpsc::Receiver<NodeEvent>,
    _tasks: JoinSet<()>,
    _state_dir: vmesh_testkit::TempDir,
}

impl Mesh {
    async fn start() -> Mesh {
        let mut catalog = Catalog::new(1);
        catalog.on_view(0, view(1));
        let published = PublishedWorld { world: catalog.world().clone(), waiting: Arc::from([]) };
        let (worlds, published) = watch::channel(published);
        let (compiled_in, compiled) = watch::channel(Arc::new(Compilation::new(Arc::new(World::empty()))));
        let (reports, of_nodes) = mpsc::channel(64);
        let hub = Hub::new();
        let limits = NodeLimits {
            names: 10,
            names_per_origin: 10,
            offline_bytes: 1 << 20,
            forget_offline_after: Duration::from_secs(3600),
        };
        let nodes = NodeIntake { reports, known: KnownNodes::new(limits, []) };
        let fleet = Arc::new(Fleet::new(hub.clone(), published.clone(), compiled.clone(), nodes));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state_dir = vmesh_testkit::tempdir().unwrap();
        let admission =
            NodeAdmission { fleet: fleet.clone(), identities: IdentityService::for_tests(&state_dir) };
        let service = AdsService::new(hub.clone(), admission, "test");
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, service, std::future::pending()));
        tasks.spawn(run(fleet.clone(), published, compiled_in, hub));
        let mut ready = compiled.clone();
        ready.wait_for(|compiled| compiled.is_ready).await.unwrap();
        Mesh {
            catalog,
            worlds,
            fleet,
            compiled,
            address,
            _reports: of_nodes,
            _tasks: tasks,
            _state_dir: state_dir,
        }
    }

    async fn client(&self, name: &str) -> BenchClient {
        let node = Node { id: name.to_owned(), ..Node::default() };
        BenchClient::connect(&format!("http://{}", self.address), node).await.unwrap()
    }

    fn publish(&mut self, weight: u32) {
        self.catalog.on_view(0, view(weight));
        let world = self.catalog.world().clone();
        self.worlds.send_modify(|published| published.world = world);
    }
}

/// Everything that the control plane compiles, encodes or writes to the disk runs on threads for blocking
/// work. This test has one such thread, and occupies it.
#[test]
fn acks_new_streams_and_reads_go_on_while_nothing_can_be_compiled_encoded_or_written() {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).max_blocking_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let mut mesh = Mesh::start().await;
        let mut first = mesh.client("first").await;
        assert_eq!(first.next().await.unwrap().kind, Some(Kind::Cluster));

        let (release, stalled) = sync_channel::<()>(0);
        let (taken, is_taken) = oneshot::channel();
        let stall = tokio::task::spawn_blocking(move || {
            taken.send(()).unwrap();
            stalled.recv()
        });
        is_taken.await.unwrap();
        let before = mesh.compiled.borrow().world().clone();
        mesh.publish(7);

        // The configuration compiled earlier is sent and ACKed.
        let mut acks = JoinSet::new();
        let (seen, mut saw) = mpsc::unbounded_channel();
        acks.spawn(async move {
            while let Ok(response) = first.next().await {
                _ = seen.send(response.kind);
            }
        });
        let counts = |is_reached: fn(&vmesh_api::NodeCounts) -> bool| {
            let fleet = mesh.fleet.clone();
            wait_for("the fleet to count it", BOUND, async move || {
                let counts = fleet.counts();
                if is_reached(&counts) { Ok(()) } else { Err(format!("{counts:?}")) }
            })
        };
        counts(|counts| counts.synced == 1).await.unwrap();
        assert_eq!(saw.recv().await, Some(Some(Kind::Endpoint)));

        // A new stream is admitted.
        let mut second = mesh.client("second").await;
        let waiting = acks.spawn(async move { _ = second.next().await });
        counts(|counts| counts.synced == 1 && counts.pushing == 1).await.unwrap();
        let connected = mesh.fleet.connections();
        assert_eq!(connected.len(), 2);
        assert!(Arc::ptr_eq(mesh.compiled.borrow().world(), &before), "the compiler was not stalled");
        assert!(!waiting.is_finished());

        release.send(()).unwrap();
        stall.await.unwrap().unwrap();
        let mut compiled = mesh.compiled.clone();
        compiled.wait_for(|compiled| !Arc::ptr_eq(compiled.world(), &before)).await.unwrap();
        counts(|counts| counts.pushing == 0).await.unwrap();
    });
}
