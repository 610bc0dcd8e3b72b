//! A control plane that serves the resources a test publishes, and a separate node for each test.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use vmesh_agent::Config;
use vmesh_daemon::tasks::spawn_handle;
use vmesh_proto::envoy::config::cluster::v3::Cluster;
use vmesh_proto::envoy::config::core::v3::address::Address as AddressKind;
use vmesh_proto::envoy::config::core::v3::socket_address::PortSpecifier;
use vmesh_proto::envoy::config::core::v3::{Address, Node, SocketAddress};
use vmesh_proto::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use vmesh_proto::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints,
};
use vmesh_proto::envoy::config::listener::v3::filter::ConfigType;
use vmesh_proto::envoy::config::listener::v3::{Filter, FilterChain, Listener};
use vmesh_proto::envoy::config::route::v3::route::Action;
use vmesh_proto::envoy::config::route::v3::route_action::ClusterSpecifier;
use vmesh_proto::envoy::config::route::v3::route_match::PathSpecifier;
use vmesh_proto::envoy::config::route::v3::{
    Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost,
};
use vmesh_proto::envoy::extensions::filters::http::router::v3::Router;
use vmesh_proto::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::RouteSpecifier;
use vmesh_proto::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, HttpFilter, http_filter,
};
use vmesh_proto::{any, duration};
use vmesh_testkit::{Loopback, TempDir, envoy, tempdir};
use vmesh_xds::server::{Admission, Admitted, AdsService, Hub, Observer, PeerInfo, Refusal, serve};
use vmesh_xds::{Group, Kind, Resource, Scope, SessionStatus, Store};

pub(crate) const SOON: Duration = Duration::from_secs(30);

/// A node with an address and directories of its own.
pub(crate) struct Place {
    pub(crate) address: Loopback,
    pub(crate) dir: TempDir,
}

impl Place {
    pub(crate) fn new() -> Place {
        Place { address: Loopback::unique().unwrap(), dir: tempdir().unwrap() }
    }

    pub(crate) fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.address.ip(), port)
    }

    /// Returns the address at which the node's applications dial `orders`.
    pub(crate) fn upstream(&self) -> SocketAddr {
        self.at(9001)
    }

    pub(crate) fn api(&self) -> SocketAddr {
        self.at(15020)
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    pub(crate) fn text(&self, control_planes: &[SocketAddr], envoy_settings: &str) -> String {
        let control_planes: Vec<String> =
            control_planes.iter().map(|address| format!("\"http://{address}\"")).collect();
        format!(
            r#"
control_plane: [{control_planes}]
state_dir: {dir}/state
run_dir: {dir}/run
envoy: {{path: "{envoy}", manage: child, concurrency: 1, drain: 3s{envoy_settings}}}
listen: {{api: "{api}"}}
node: {{name: web-1, address: {ip}, zone: eu-1a, labels: {{role: web}}}}
upstreams: [{{service: orders, listen: "{upstream}"}}]
"#,
            control_planes = control_planes.join(", "),
            dir = self.dir.display(),
            envoy = envoy::find().unwrap().display(),
            api = self.api(),
            ip = self.address,
            upstream = self.upstream(),
        )
    }

    pub(crate) fn config(&self, control_planes: &[SocketAddr], envoy_settings: &str) -> Config {
        let text = self.text(control_planes, envoy_settings);
        Config::parse("agent.yaml", text.as_bytes(), "").unwrap()
    }
}

/// The nodes and streams that the test's control plane has seen.
#[derive(Debug, Clone, Default)]
pub(crate) struct SeenStreams {
    pub(crate) nodes: Vec<Node>,
    pub(crate) streams: usize,
    pub(crate) status: SessionStatus,
}

/// A control plane that serves one store to every client. Dropping it closes all connections.
pub(crate) struct TestControlPlane {
    hub: Hub,
    store: Mutex<Store>,
    pub(crate) seen: watch::Receiver<SeenStreams>,
    task: tokio::task::JoinHandle<()>,
}

struct TestAdmission {
    hub: Hub,
    seen: watch::Sender<SeenStreams>,
}

struct StreamObserver(watch::Sender<SeenStreams>);

impl Admission for TestAdmission {
    fn admit(&self, node: &Node, _: &PeerInfo) -> Result<Admitted, Refusal> {
        self.seen.send_modify(|seen| {
            seen.nodes.push(node.clone());
            seen.streams += 1;
        });
        let feed = self.hub.subscribe("", Arc::new(Scope::all()));
        Ok(Admitted { feed, observer: Box::new(StreamObserver(self.seen.clone())) })
    }
}

impl Observer for StreamObserver {
    fn on_status(&mut self, status: &SessionStatus) {
        self.0.send_modify(|seen| seen.status = status.clone());
    }
}

impl Drop for StreamObserver {
    fn drop(&mut self) {
        self.0.send_modify(|seen| seen.streams -= 1);
    }
}

impl TestControlPlane {
    pub(crate) async fn on_socket(path: PathBuf) -> TestControlPlane {
        _ = std::fs::remove_file(&path);
        TestControlPlane::start(UnixListener::bind(path).unwrap())
    }

    pub(crate) async fn on(address: SocketAddr) -> TestControlPlane {
        TestControlPlane::start(TcpListener::bind(address).await.unwrap())
    }

    fn start(listener: impl vmesh_xds::server::Listener + 'static) -> TestControlPlane {
        let hub = Hub::new();
        let (seen, seen_by_tests) = watch::channel(SeenStreams::default());
        let service = AdsService::new(hub.clone(), TestAdmission { hub: hub.clone(), seen }, "test");
        let task = spawn_handle(serve(listener, service, std::future::pending()));
        TestControlPlane { hub, store: Mutex::default(), seen: seen_by_tests, task }
    }

    pub(crate) fn publish(&self, resources: Vec<Arc<Resource>>) {
        let mut store = self.store.lock().unwrap();
        *store = store.apply([("all".into(), Some(Group::new("all", resources)))]);
        self.hub.publish("", Arc::new(store.clone()));
    }

    /// Closes every connection and the port without sending anything.
    pub(crate) async fn crash(mut self) {
        self.task.abort();
        _ = (&mut self.task).await;
    }
}

impl Drop for TestControlPlane {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Returns an HTTP listener on `listen` and the cluster `orders` with one endpoint, `to`.
pub(crate) fn orders(listen: SocketAddr, to: SocketAddr) -> Vec<Arc<Resource>> {
    vec![
        Resource::new(Kind::Cluster, "orders", &cluster("orders", &[to])),
        Resource::new(Kind::Listener, "outbound", &listener("outbound", listen, "orders")),
    ]
}

/// Returns a cluster with these endpoints, of about the size of a compiled one.
pub(crate) fn cluster(name: &str, instances: &[SocketAddr]) -> Cluster {
    let endpoint = |instance: &SocketAddr| LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
            address: Some(address(*instance)),
            ..Endpoint::default()
        })),
        ..LbEndpoint::default()
    };
    let endpoints =
        LocalityLbEndpoints { lb_endpoints: instances.iter().map(endpoint).collect(), ..Default::default() };
    Cluster {
        name: name.to_owned(),
        connect_timeout: Some(duration(Duration::from_secs(1))),
        load_assignment: Some(ClusterLoadAssignment {
            cluster_name: name.to_owned(),
            endpoints: vec![endpoints],
            ..Default::default()
        }),
        ..Cluster::default()
    }
}

fn address(socket: SocketAddr) -> Address {
    let socket = SocketAddress {
        address: socket.ip().to_string(),
        port_specifier: Some(PortSpecifier::PortValue(socket.port().into())),
        ..SocketAddress::default()
    };
    Address { address: Some(AddressKind::SocketAddress(socket)) }
}

pub(crate) fn listener(name: &str, listen: SocketAddr, cluster: &str) -> Listener {
    let route = Route {
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
            ..RouteMatch::default()
        }),
        action: Some(Action::Route(RouteAction {
            cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
            ..RouteAction::default()
        })),
        ..Route::default()
    };
    let routes = RouteConfiguration {
        name: name.to_owned(),
        virtual_hosts: vec![VirtualHost {
            name: name.to_owned(),
            domains: vec!["*".to_owned()],
            routes: vec![route],
            ..VirtualHost::default()
        }],
        ..RouteConfiguration::default()
    };
    let manager = HttpConnectionManager {
        stat_prefix: name.to_owned(),
        route_specifier: Some(RouteSpecifier::RouteConfig(routes)),
        http_filters: vec![HttpFilter {
            name: "envoy.filters.http.router".to_owned(),
            config_type: Some(http_filter::ConfigType::TypedConfig(any(&Router::default()))),
            ..HttpFilter::default()
        }],
        ..HttpConnectionManager::default()
    };
    let filter = Filter {
        name: "envoy.filters.network.http_connection_manager".to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(&manager))),
    };
    Listener {
        name: name.to_owned(),
        address: Some(address(listen)),
        filter_chains: vec![FilterChain { filters: vec![filter], ..FilterChain::default() }],
        ..Listener::default()
    }
}
