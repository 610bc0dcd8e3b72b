//! The drivers over real sockets, with decoded messages.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

use prost::Message;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic::Code;
use vmesh_proto::envoy::config::cluster::v3::Cluster;
use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use vmesh_xds::client::{AdsStream, BenchClient};
use vmesh_xds::server::{
    Admission, Admitted, AdsService, Counters, FeedControl, Hub, Observer, PeerInfo, Refusal, serve,
};
use vmesh_xds::{Failure, Group, Kind, Resource, Scope, SessionStatus, State, Store};

/// A control plane that admits everyone but the node `stranger`, and nobody while it is `unready`.
struct Control {
    hub: Hub,
    seen: Arc<Mutex<Seen>>,
    status: watch::Sender<Option<SessionStatus>>,
}

#[derive(Default)]
struct Seen {
    unready: bool,
    peer: Option<PeerInfo>,
    control: Option<FeedControl>,
}

struct Watcher(watch::Sender<Option<SessionStatus>>);

impl Observer for Watcher {
    fn on_status(&mut self, status: &SessionStatus) {
        self.0.send_replace(Some(status.clone()));
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.send_replace(None);
    }
}

impl Admission for Control {
    fn admit(&self, node: &Node, peer: &PeerInfo) -> Result<Admitted, Refusal> {
        let mut seen = self.seen.lock().unwrap();
        if seen.unready {
            return Err(Refusal::NotReady("no registry has answered yet".into()));
        }
        if node.id == "stranger" {
            return Err(Refusal::Invalid("there is no node `stranger`: 100 % sure".into()));
        }
        let feed = self.hub.subscribe("class", Arc::new(Scope::all()));
        seen.peer = Some(peer.clone());
        seen.control = Some(feed.control());
        Ok(Admitted { feed, observer: Box::new(Watcher(self.status.clone())) })
    }
}

struct Server {
    hub: Hub,
    counters: Arc<Counters>,
    seen: Arc<Mutex<Seen>>,
    status: watch::Receiver<Option<SessionStatus>>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    task: JoinHandle<()>,
    address: String,
    port: u16,
    store: Store,
}

impl Server {
    async fn start() -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        Server::on(listener, format!("http://127.0.0.1:{port}"), port)
    }

    fn on(listener: impl vmesh_xds::server::Listener + 'static, address: String, port: u16) -> Server {
        let hub = Hub::new();
        let seen = Arc::<Mutex<Seen>>::default();
        let (sender, status) = watch::channel(None);
        let control = Control { hub: hub.clone(), seen: seen.clone(), status: sender };
        let service = AdsService::new(hub.clone(), control, "vmesh test");
        let counters = service.counters().clone();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        #[expect(clippy::disallowed_methods, reason = "a test owns it")]
        let task = tokio::spawn(serve(listener, service, async move { _ = stopped.await }));
        let mut server = Server {
            hub,
            counters,
            seen,
            status,
            stop: Some(stop),
            task,
            address,
            port,
            store: Store::default(),
        };
        server.has("orders", 1);
        server
    }

    /// Publishes a cluster of this name and size.
    fn has(&mut self, name: &str, size: usize) {
        let cluster = Cluster { name: name.into(), alt_stat_name: "x".repeat(size), ..Cluster::default() };
        let group = Group::new(name, [Resource::new(Kind::Cluster, name, &cluster)]);
        self.store = self.store.apply([(name.into(), Some(group))]);
        self.hub.publish("class", Arc::new(self.store.clone()));
    }

    async fn connect(&self) -> AdsStream {
        AdsStream::connect(&self.address).await.unwrap()
    }

    async fn wait_for_status(&mut self, test: impl FnMut(&Option<SessionStatus>) -> bool) {
        within(self.status.wait_for(test)).await.unwrap();
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("nothing happened for 20 s")
}

fn request(kind: Kind, node: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        node: Some(Node { id: node.into(), ..Node::default() }),
        type_url: kind.type_url().into(),
        ..DeltaDiscoveryRequest::default()
    }
}

fn ack(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: response.type_url.clone(),
        response_nonce: response.nonce.clone(),
        ..DeltaDiscoveryRequest::default()
    }
}

async fn end_of(stream: &mut AdsStream) -> Failure {
    within(stream.next()).await.expect_err("the stream should have ended")
}

#[tokio::test]
async fn a_client_follows_the_server_over_tcp() {
    let mut server = Server::start().await;
    server.has("large", 3_000_000);
    let mut envoy = server.connect().await;
    envoy.send(&request(Kind::Cluster, "web-1")).await.unwrap();
    let mut names = Vec::new();
    for _ in 0..2 {
        let response = within(envoy.next()).await.unwrap();
        assert_eq!(response.control_plane.as_ref().unwrap().identifier, "vmesh test");
        for resource in &response.resources {
            let cluster = Cluster::decode(resource.resource.as_ref().unwrap().value.clone()).unwrap();
            assert_eq!(cluster.name, resource.name);
            names.push(cluster.name);
        }
        envoy.send(&ack(&response)).await.unwrap();
    }
    assert_eq!(names, ["large", "orders"]);
    server.wait_for_status(|status| status.as_ref().is_some_and(|status| status.generation_acked == 2)).await;

    server.has("orders", 2);
    let response = within(envoy.next()).await.unwrap();
    assert_eq!(response.resources.len(), 1);
    let mut nack = ack(&response);
    nack.error_detail =
        Some(vmesh_proto::google::rpc::Status { message: "orders: no".into(), ..Default::default() });
    envoy.send(&nack).await.unwrap();
    let rejected = State::Rejected { reason: "cluster orders: orders: no".into() };
    server.wait_for_status(|status| status.as_ref().is_some_and(|status| status.state == rejected)).await;
    assert!(server.seen.lock().unwrap().peer.as_ref().unwrap().address.is_some());

    assert_eq!(server.counters.streams.load(Relaxed), 1);
    drop(envoy);
    server.wait_for_status(Option::is_none).await;
    assert_eq!(server.counters.streams.load(Relaxed), 0);
    assert_eq!(server.counters.nacks.load(Relaxed), 1);
    assert_eq!(server.counters.acks.load(Relaxed), 2);
}

#[tokio::test]
async fn a_client_follows_the_server_over_a_unix_socket() {
    let path = std::env::temp_dir().join(format!("vmesh-xds-{}.sock", std::process::id()));
    _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let server = Server::on(listener, format!("unix:{}", path.display()), 0);
    let mut envoy = server.connect().await;
    envoy.send(&request(Kind::Cluster, "web-1")).await.unwrap();
    assert_eq!(within(envoy.next()).await.unwrap().resources[0].name, "orders");
    assert!(server.seen.lock().unwrap().peer.as_ref().unwrap().uid.is_some());
    std::fs::remove_file(&path).unwrap();
}

#[tokio::test]
async fn a_connected_client_sees_its_scope_change() {
    let mut server = Server::start().await;
    server.has("payments", 1);
    let mut envoy = server.connect().await;
    envoy.send(&request(Kind::Cluster, "web-1")).await.unwrap();
    let response = within(envoy.next()).await.unwrap();
    assert_eq!(response.resources.len(), 2);
    envoy.send(&ack(&response)).await.unwrap();
    let control = server.seen.lock().unwrap().control.clone().unwrap();
    control.set_scope("class", Arc::new(Scope::named(["orders"])));
    assert_eq!(within(envoy.next()).await.unwrap().removed_resources, ["payments"]);
}

#[tokio::test]
async fn a_client_that_may_not_come_in_is_told_why() {
    let server = Server::start().await;
    server.seen.lock().unwrap().unready = true;
    let mut envoy = server.connect().await;
    envoy.send(&request(Kind::Cluster, "web-1")).await.unwrap();
    let end = end_of(&mut envoy).await;
    assert_eq!((end.code, &*end.message), (Code::Unavailable, "no registry has answered yet"));

    server.seen.lock().unwrap().unready = false;
    let mut envoy = server.connect().await;
    envoy.send(&request(Kind::Cluster, "stranger")).await.unwrap();
    let end = end_of(&mut envoy).await;
    assert_eq!((end.code, &*end.message), (Code::InvalidArgument, "there is no node `stranger`: 100 % sure"));

    let mut envoy = server.connect().await;
    envoy.send(&DeltaDiscoveryRequest { node: None, ..request(Kind::Cluster, "") }).await.unwrap();
    assert_eq!(end_of(&mut envoy).await.code, Code::InvalidArgument);
    assert_eq!(server.counters.streams_refused.load(Relaxed), 2);
}

#[tokio::test]
async fn an_unknown_type_is_counted_and_the_stream_lives() {
    let mut server = Server::start().await;
    let mut envoy = server.connect().await;
    let banana = DeltaDiscoveryRequest {
        type_url: "type.googleapis.com/Banana".into(),
        ..request(Kind::Cluster, "web-1")
    };
    envoy.send(&banana).await.unwrap();
    envoy.send(&request(Kind::Cluster, "web-1")).await.unwrap();
    let response = within(envoy.next()).await.unwrap();
    assert_eq!(response.type_url, Kind::Cluster.type_url());
    envoy.send(&ack(&response)).await.unwrap();
    server
        .wait_for_status(|status| status.as_ref().is_some_and(|status| status.state == State::Synced))
        .await;
    assert_eq!(server.counters.unknown_types.load(Relaxed), 1);
}

#[tokio::test]
async fn a_request_with_ten_thousand_names_is_answered_and_one_with_too_many_is_refused() {
    let server = Server::start().await;
    let mut envoy = server.connect().await;
    let names =
        |count: usize| (0..count).map(|i| format!("a-service-with-a-name-that-is-not-short-{i}")).collect();
    let mut large = request(Kind::Endpoint, "web-1");
    large.resource_names_subscribe = names(10_000);
    envoy.send(&large).await.unwrap();
    assert_eq!(within(envoy.next()).await.unwrap().removed_resources.len(), 10_000);
    large.resource_names_subscribe = names(100_001);
    envoy.send(&large).await.unwrap();
    assert_eq!(end_of(&mut envoy).await.code, Code::ResourceExhausted);
}

#[tokio::test]
async fn garbage_costs_its_connection_and_nothing_else() {
    let server = Server::start().await;
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 4096],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        b"",
    ] {
        let mut tcp = TcpStream::connect(("127.0.0.1", server.port)).await.unwrap();
        _ = tcp.write_all(garbage).await;
        _ = tcp.shutdown().await;
        _ = within(tcp.read_to_end(&mut Vec::new())).await;
    }
    let mut envoy = server.connect().await;
    envoy.send(&request(Kind::Cluster, "web-1")).await.unwrap();
    assert_eq!(within(envoy.next()).await.unwrap().resources.len(), 1);
    assert!(!server.task.is_finished());
}

/// Calls by hand: what a gRPC library would not send.
async fn call(
    server: &Server,
    path: &str,
    content_type: &str,
    body: &'static [u8],
) -> http::Response<hyper::body::Incoming> {
    let tcp = TcpStream::connect(("127.0.0.1", server.port)).await.unwrap();
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut http, connection) =
        hyper::client::conn::http2::handshake(executor, hyper_util::rt::TokioIo::new(tcp)).await.unwrap();
    #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
    tokio::spawn(async move { _ = connection.await });
    let request = http::Request::post(format!("http://vmesh{path}")).header("content-type", content_type);
    within(
        http.send_request(request.body(http_body_util::Full::new(bytes::Bytes::from_static(body))).unwrap()),
    )
    .await
    .unwrap()
}

async fn status_of(response: http::Response<hyper::body::Incoming>) -> (String, String) {
    use http_body_util::BodyExt;
    let (parts, body) = response.into_parts();
    let trailers = within(body.collect()).await.unwrap().trailers().cloned();
    let headers = trailers.unwrap_or(parts.headers);
    let header = |name| headers.get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
    (header("grpc-status"), header("grpc-message"))
}

const DELTA: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const SOTW: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources";

#[tokio::test]
async fn a_call_that_makes_no_sense_is_answered_with_a_status() {
    let server = Server::start().await;
    let unknown = call(
        &server,
        "/envoy.service.discovery.v3.AggregatedDiscoveryService/Banana",
        "application/grpc",
        b"",
    )
    .await;
    assert_eq!(status_of(unknown).await.0, "12");
    let json = call(&server, DELTA, "application/json", b"{}").await;
    assert_eq!(json.status(), 415);
    for (path, body, status) in [
        (DELTA, &b""[..], "0"),
        (DELTA, b"\0\0\0\0\x03\xff\xff\xff", "3"),
        (SOTW, b"\0\0\0\0\x03\xff\xff\xff", "3"),
        (DELTA, b"\0\0\0\0\0", "3"),
        (DELTA, b"\0\0\0\0\x10short", "3"),
        (DELTA, b"\x01\0\0\0\0", "12"),
        (DELTA, b"\0\xff\xff\xff\xff", "8"),
        (DELTA, b"\0\0", "3"),
    ] {
        let response = call(&server, path, "application/grpc+proto", body).await;
        assert_eq!(status_of(response).await.0, status, "{body:?}");
    }
}

#[tokio::test]
async fn a_server_that_stops_takes_leave_of_its_clients() {
    let mut server = Server::start().await;
    let mut envoy = server.connect().await;
    envoy.send(&request(Kind::Cluster, "web-1")).await.unwrap();
    within(envoy.next()).await.unwrap();
    server.stop.take().unwrap().send(()).unwrap();
    let end = end_of(&mut envoy).await;
    assert_eq!((end.code, &*end.message), (Code::Unavailable, "shutting down"));
    drop(envoy);
    within(&mut server.task).await.unwrap();
}

#[tokio::test]
async fn one_change_is_encoded_once_for_a_hundred_clients() {
    let mut server = Server::start().await;
    for i in 0..20 {
        server.has(&format!("service-{i}"), 100);
    }
    let mut clients = Vec::new();
    for i in 0..100 {
        let node = Node { id: format!("web-{i}"), ..Node::default() };
        let mut client = BenchClient::connect(&server.address, node).await.unwrap();
        let clusters = within(client.next()).await.unwrap();
        assert_eq!(clusters.resources.len(), 21);
        for kind in [Kind::Endpoint, Kind::Listener] {
            assert_eq!(within(client.next()).await.unwrap().kind, Some(kind));
        }
        clients.push(client);
    }
    let encodings = vmesh_xds::encodings();
    server.has("service-7", 200);
    for client in &mut clients {
        assert_eq!(within(client.next()).await.unwrap().resources, ["service-7"]);
        assert_eq!(within(client.next()).await.unwrap().kind, Some(Kind::Endpoint), "R46");
    }
    // The empty assignments of a cluster without endpoints are each stream's own.
    assert!(vmesh_xds::encodings() - encodings >= 1);
}
