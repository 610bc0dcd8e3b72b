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
use vmesh_daemon::connections::{Gate, Limits};
use vmesh_proto::envoy::config::cluster::v3::Cluster;
use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use vmesh_xds::client::{AdsStream, BenchClient};
use vmesh_xds::server::{
    Admission, Admitted, AdsService, ConnectionLimits, Counters, FeedControl, Hub, Observer, PeerInfo,
    Refusal, serve_connections,
};
use vmesh_xds::{Failure, Group, Kind, Resource, Scope, SessionStatus, State, Store};

/// An admission that rejects the node `stranger`, and every node while it is `unready`.
struct TestAdmission {
    hub: Hub,
    admission: Arc<Mutex<AdmissionState>>,
    status: watch::Sender<Option<SessionStatus>>,
}

#[derive(Default)]
struct AdmissionState {
    unready: bool,
    peer: Option<PeerInfo>,
    control: Option<FeedControl>,
}

struct StatusObserver(watch::Sender<Option<SessionStatus>>);

impl Observer for StatusObserver {
    fn on_status(&mut self, status: &SessionStatus) {
        self.0.send_replace(Some(status.clone()));
    }
}

impl Drop for StatusObserver {
    fn drop(&mut self) {
        self.0.send_replace(None);
    }
}

impl Admission for TestAdmission {
    fn admit(&self, node: &Node, peer: &PeerInfo) -> Result<Admitted, Refusal> {
        let mut admission = self.admission.lock().unwrap();
        if admission.unready {
            return Err(Refusal::NotReady("no registry has answered yet".into()));
        }
        if node.id == "stranger" {
            return Err(Refusal::Invalid("there is no node `stranger`: 100 % sure".into()));
        }
        let feed = self.hub.subscribe("class", Arc::new(Scope::all()));
        admission.peer = Some(peer.clone());
        admission.control = Some(feed.control());
        Ok(Admitted { feed, observer: Box::new(StatusObserver(self.status.clone())) })
    }
}

struct Server {
    hub: Hub,
    counters: Arc<Counters>,
    admission: Arc<Mutex<AdmissionState>>,
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
        Server::bounded(listener, address, port, ConnectionLimits::default())
    }

    fn bounded(
        listener: impl vmesh_xds::server::Listener + 'static,
        address: String,
        port: u16,
        bounded: ConnectionLimits,
    ) -> Server {
        let hub = Hub::new();
        let admission = Arc::<Mutex<AdmissionState>>::default();
        let (sender, status) = watch::channel(None);
        let control = TestAdmission { hub: hub.clone(), admission: admission.clone(), status: sender };
        let service = AdsService::new(hub.clone(), control, "vmesh test");
        let counters = service.counters().clone();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        #[expect(clippy::disallowed_methods, reason = "a test owns it")]
        let task =
            tokio::spawn(serve_connections(listener, service, bounded, async move { _ = stopped.await }));
        let mut server = Server {
            hub,
            counters,
            admission,
            status,
            stop: Some(stop),
            task,
            address,
            port,
            store: Store::default(),
        };
        server.publish("orders", 1);
        server
    }

    /// Publishes a cluster of this name and size.
    fn publish(&mut self, name: &str, size: usize) {
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
async fn a_response_that_no_server_of_a_mesh_sends_is_not_read_into_memory() {
    let mut server = Server::start().await;
    server.publish("huge", 17 << 20);
    let mut envoy = server.connect().await;
    envoy.send(&request(Kind::Cluster, "web-1")).await.unwrap();
    let failure = end_of(&mut envoy).await;
    assert!(failure.message.contains("the limit is 16777216"), "{failure:?}");
}

#[tokio::test]
async fn a_client_follows_the_server_over_tcp() {
    let mut server = Server::start().await;
    server.publish("large", 3_000_000);
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

    server.publish("orders", 2);
    let response = within(envoy.next()).await.unwrap();
    assert_eq!(response.resources.len(), 1);
    let mut nack = ack(&response);
    nack.error_detail =
        Some(vmesh_proto::google::rpc::Status { message: "orders: no".into(), ..Default::default() });
    envoy.send(&nack).await.unwrap();
    let rejected = State::Rejected { reason: "cluster orders: orders: no".into() };
    server.wait_for_status(|status| status.as_ref().is_some_and(|status| status.state == rejected)).await;
    assert!(server.admission.lock().unwrap().peer.as_ref().unwrap().address.is_some());

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
    assert!(server.admission.lock().unwrap().peer.as_ref().unwrap().uid.is_some());
    std::fs::remove_file(&path).unwrap();
}

#[tokio::test]
async fn a_connected_client_sees_its_scope_change() {
    let mut server = Server::start().await;
    server.publish("payments", 1);
    let mut envoy = server.connect().await;
    envoy.send(&request(Kind::Cluster, "web-1")).await.unwrap();
    let response = within(envoy.next()).await.unwrap();
    assert_eq!(response.resources.len(), 2);
    envoy.send(&ack(&response)).await.unwrap();
    let control = server.admission.lock().unwrap().control.clone().unwrap();
    control.set_scope("class", Arc::new(Scope::named(["orders"])));
    assert_eq!(within(envoy.next()).await.unwrap().removed_resources, ["payments"]);
}

#[tokio::test]
async fn a_client_that_may_not_come_in_is_told_why() {
    let server = Server::start().await;
    server.admission.lock().unwrap().unready = true;
    let mut envoy = server.connect().await;
    envoy.send(&request(Kind::Cluster, "web-1")).await.unwrap();
    let end = end_of(&mut envoy).await;
    assert_eq!((end.code, &*end.message), (Code::Unavailable, "no registry has answered yet"));

    server.admission.lock().unwrap().unready = false;
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

/// Makes a call that no gRPC library would send.
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
async fn a_request_that_would_be_large_in_memory_is_not_decoded() {
    let server = Server::start().await;
    // Before its admission a client sends more than a mebibyte, and then a mebibyte of empty strings.
    for (names, len) in [(1, 1_100_000), (500_000, 0)] {
        let mut envoy = server.connect().await;
        let mut large = request(Kind::Endpoint, "web-1");
        large.resource_names_subscribe = vec!["x".repeat(len); names];
        envoy.send(&large).await.unwrap();
        assert_eq!(end_of(&mut envoy).await.code, Code::ResourceExhausted, "{names} names");
    }
    // After its admission a client sends 8 MB of empty strings.
    let mut envoy = server.connect().await;
    envoy.send(&request(Kind::Cluster, "web-1")).await.unwrap();
    within(envoy.next()).await.unwrap();
    let mut large = request(Kind::Endpoint, "web-1");
    large.resource_names_subscribe = vec![String::new(); 4_000_000];
    envoy.send(&large).await.unwrap();
    assert_eq!(end_of(&mut envoy).await.code, Code::ResourceExhausted);
}

#[tokio::test]
async fn incomplete_requests_of_strangers_share_a_bounded_memory() {
    let server = Server::start().await;
    // 160 streams each send most of a mebibyte and never the rest. Their common budget is 64 MiB.
    let half: &'static [u8] = [&[0, 0, 0x0f, 0xff, 0xff][..], &vec![0; 900_000]].concat().leak();
    let mut ended = tokio::task::JoinSet::new();
    let (held, holding) = watch::channel(0);
    for _ in 0..10 {
        let tcp = TcpStream::connect(("127.0.0.1", server.port)).await.unwrap();
        let executor = hyper_util::rt::TokioExecutor::new();
        let io = hyper_util::rt::TokioIo::new(tcp);
        let (http, connection) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
        #[expect(clippy::disallowed_methods, reason = "it ends with the test")]
        tokio::spawn(async move { _ = connection.await });
        for _ in 0..16 {
            let (mut http, held) = (http.clone(), held.clone());
            ended.spawn(async move {
                let (end, body) = tokio::sync::mpsc::channel::<Result<http_body::Frame<bytes::Bytes>, _>>(1);
                let body = http_body_util::StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(body));
                _ = end.send(Ok::<_, std::convert::Infallible>(http_body::Frame::data(half.into()))).await;
                let request = http::Request::post(format!("http://vmesh{DELTA}"));
                let request = request.header("content-type", "application/grpc").body(body).unwrap();
                let response = http.send_request(request).await.unwrap();
                held.send_modify(|held| *held += 1);
                let status = status_of(response).await;
                drop(end);
                status.0
            });
        }
    }
    let mut refused = 0;
    while refused < 80 {
        match within(ended.join_next()).await.unwrap().unwrap().as_str() {
            // "8" is RESOURCE_EXHAUSTED. "4" is DEADLINE_EXCEEDED, for streams that got a share of the budget
            // and then sent nothing more.
            "8" => refused += 1,
            other => assert_eq!(other, "4"),
        }
    }
    drop(holding);
    let mut envoy = server.connect().await;
    envoy.send(&request(Kind::Cluster, "web-1")).await.unwrap();
    assert_eq!(within(envoy.next()).await.unwrap().resources.len(), 1, "a small request is heard meanwhile");
}

#[tokio::test]
async fn connections_that_show_nothing_are_closed_and_keep_nobody_out() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let limits = Limits { total: 40, per_origin: 40, pending: 20 };
    let bounded = ConnectionLimits { gate: Gate::new(limits), max_age: None };
    let server = Server::bounded(listener, format!("http://127.0.0.1:{port}"), port, bounded.clone());
    let mut silent = Vec::new();
    for i in 0..200 {
        let mut tcp = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        // The second half of the connections begins HTTP/2 and then stays silent.
        if i >= 100 {
            _ = tcp.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
        }
        silent.push(tcp);
    }
    let mut envoy = server.connect().await;
    envoy.send(&request(Kind::Cluster, "web-1")).await.unwrap();
    assert_eq!(within(envoy.next()).await.unwrap().resources.len(), 1);
    assert!(bounded.gate.counts().connections <= 40);
    // Silent connections are closed even when no new ones arrive.
    for mut tcp in silent {
        _ = within(tcp.read_to_end(&mut Vec::new())).await;
    }
    envoy.send(&request(Kind::Listener, "web-1")).await.unwrap();
    assert_eq!(
        within(envoy.next()).await.unwrap().type_url,
        Kind::Listener.type_url(),
        "it is used and stays"
    );
}

#[tokio::test]
async fn one_address_does_not_take_every_place() {
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let limits = Limits { total: 40, per_origin: 3, pending: 20 };
    let bounded = ConnectionLimits { gate: Gate::new(limits), max_age: None };
    let server = Server::bounded(listener, format!("http://127.0.0.1:{port}"), port, bounded);
    let mut admitted = Vec::new();
    for _ in 0..3 {
        let mut envoy = server.connect().await;
        envoy.send(&request(Kind::Cluster, "web-1")).await.unwrap();
        within(envoy.next()).await.unwrap();
        admitted.push(envoy);
    }
    let fourth = async {
        let mut envoy = AdsStream::connect(&server.address).await.map_err(drop)?;
        envoy.send(&request(Kind::Cluster, "web-1")).await.map_err(drop)?;
        envoy.next().await.map_err(drop)
    };
    assert!(within(fourth).await.is_err());
    let mut elsewhere = AdsStream::connect(&format!("http://127.0.0.2:{port}")).await.unwrap();
    elsewhere.send(&request(Kind::Cluster, "web-1")).await.unwrap();
    // Connections are counted by the client's address, not the server's: this client too comes from 127.0.0.1.
    assert!(within(elsewhere.next()).await.is_err());
    assert_eq!(server.counters.connections_refused.load(Relaxed), 2);
}

#[tokio::test]
async fn a_connection_of_its_maximum_age_takes_leave_of_its_client() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let bounded =
        ConnectionLimits { max_age: Some(Duration::from_millis(100)), ..ConnectionLimits::default() };
    let server = Server::bounded(listener, format!("http://127.0.0.1:{port}"), port, bounded);
    let mut envoy = server.connect().await;
    envoy.send(&request(Kind::Cluster, "web-1")).await.unwrap();
    within(envoy.next()).await.unwrap();
    let end = end_of(&mut envoy).await;
    assert_eq!((end.code, &*end.message), (Code::Ok, ""), "no error: it connects again");
}

#[tokio::test]
async fn an_authority_that_is_the_path_of_the_socket_is_served() {
    let path = std::env::temp_dir().join(format!("vmesh-xds-authority-{}.sock", std::process::id()));
    _ = std::fs::remove_file(&path);
    let server = Server::on(UnixListener::bind(&path).unwrap(), format!("unix:{}", path.display()), 0);
    let mut unix = tokio::net::UnixStream::connect(&path).await.unwrap();
    let authority = b"run%2Fvmesh%2Fxds.sock";
    let path_field = [&[0x04, u8::try_from(DELTA.len()).unwrap()], DELTA.as_bytes()].concat();
    let content_type = [&[0x0f, 0x10, 16][..], b"application/grpc"].concat();
    // The C core of gRPC writes the block like this: `:method POST`, `:scheme http`, and the rest as literals.
    let block = [
        &[0x83, 0x86][..],
        &path_field,
        &[0x41, 22],
        authority,
        &content_type,
        &[0x40, 2],
        b"te\x08trailers",
    ]
    .concat();
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&len[1..], &[kind, flags, 0, 0, 0, stream], payload].concat()
    };
    let body = {
        let message = request(Kind::Cluster, "web-1").encode_to_vec();
        [&[0], &u32::try_from(message.len()).unwrap().to_be_bytes()[..], &message].concat()
    };
    let sent = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, b""),
        frame(1, 4, 1, &block),
        frame(0, 0, 1, &body),
        // The same request once more, with the authority as an index into HPACK's dynamic table.
        frame(1, 4, 3, &[&[0x83, 0x86][..], &path_field, &[0xbf], &content_type].concat()),
        frame(0, 0, 3, &body),
    ];
    unix.write_all(&sent.concat()).await.unwrap();
    let mut answered = Vec::new();
    while answered.len() < 2 {
        let mut head = [0; 9];
        within(unix.read_exact(&mut head)).await.unwrap();
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        within(unix.read_exact(&mut payload)).await.unwrap();
        assert!(!matches!(head[3], 3 | 7), "reset, or the connection given up: {head:?} {payload:?}");
        if head[3] == 0 {
            answered.push(head[8]);
        }
    }
    assert_eq!(answered, [1, 3]);
    assert_eq!(server.counters.streams_opened.load(Relaxed), 2);
    std::fs::remove_file(&path).unwrap();
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
        server.publish(&format!("service-{i}"), 100);
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
    server.publish("service-7", 200);
    for client in &mut clients {
        assert_eq!(within(client.next()).await.unwrap().resources, ["service-7"]);
        assert_eq!(within(client.next()).await.unwrap().kind, Some(Kind::Endpoint), "R46");
    }
    // Each stream encodes its own empty assignments for clusters without endpoints.
    assert!(vmesh_xds::encodings() - encodings >= 1);
}
