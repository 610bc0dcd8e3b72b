//! The baseline: a process that writes the same bytes over HTTP/2 to the same clients, without any xDS logic.

use std::convert::Infallible;
use std::io::{BufRead, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{BufMut, Bytes, BytesMut};
use http_body::{Body, Frame};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use vmesh_proto::any;
use vmesh_proto::envoy::config::core::v3::address::Address as AddressKind;
use vmesh_proto::envoy::config::core::v3::socket_address::PortSpecifier;
use vmesh_proto::envoy::config::core::v3::{Address, ControlPlane, Locality, SocketAddress};
use vmesh_proto::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use vmesh_proto::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints,
};
use vmesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use vmesh_proto::uint32;
use vmesh_testkit::{Failed, Result, wait_for};
use vmesh_xds::Kind;

/// The handle with which the bench controls the baseline process.
pub(crate) struct BaselineServer {
    child: Child,
    stdin: ChildStdin,
    stdout: std::io::BufReader<ChildStdout>,
    pub(crate) address: SocketAddr,
    /// The size of one push, including gRPC's framing.
    pub(crate) bytes: usize,
}

impl BaselineServer {
    pub(crate) async fn start(endpoints: usize) -> Result<BaselineServer> {
        let bench = std::env::current_exe().map_err(Failed::to("could not find the bench"))?;
        let mut command = Command::new(bench);
        command.args(["--serve-baseline", "--endpoints", &endpoints.to_string()]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(Failed::to("could not start the baseline"))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Failed::new("the baseline has no pipes"));
        };
        let mut server = BaselineServer {
            child,
            stdin,
            stdout: std::io::BufReader::new(stdout),
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            bytes: 0,
        };
        let answer = server.read_answer()?;
        let mut words = answer.split(' ');
        let parsed = (|| Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?)))();
        (server.address, server.bytes) =
            parsed.ok_or_else(|| Failed::new(format!("the baseline said `{answer}`")))?;
        Ok(server)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) async fn wait_until_connected(&mut self, nodes: usize, bound: Duration) -> Result<()> {
        let bound = bound.min(Duration::from_secs(120));
        let server = Mutex::new(self);
        wait_for(format!("{nodes} connections"), bound, async || {
            let mut server = server.lock().unwrap_or_else(PoisonError::into_inner);
            let connected = server.send_command("connected").map_err(|failed| failed.to_string())?;
            if connected.parse() == Ok(nodes) { Ok(()) } else { Err(connected) }
        })
        .await
    }

    /// Writes to all clients. Returns the time when the first write began.
    pub(crate) async fn push(&mut self) -> Result<SystemTime> {
        let began = self.send_command("push")?;
        let nanos = began.parse().map_err(Failed::to(format!("the baseline said `{began}`")))?;
        Ok(UNIX_EPOCH + Duration::from_nanos(nanos))
    }

    fn send_command(&mut self, what: &str) -> Result<String> {
        writeln!(self.stdin, "{what}").map_err(Failed::to("the baseline does not listen"))?;
        self.read_answer()
    }

    fn read_answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line).map_err(Failed::to("the baseline does not answer"))?;
        Ok(line.trim().to_owned())
    }
}

impl Drop for BaselineServer {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// The streams of the baseline. Each waits for the next round, and then writes the same bytes.
#[derive(Default)]
struct BaselineStreams {
    round: AtomicUsize,
    open: AtomicUsize,
    wakers: Mutex<Vec<Waker>>,
}

struct BaselineStream {
    streams: Arc<BaselineStreams>,
    written: usize,
    message: Bytes,
    requests: hyper::body::Incoming,
}

impl Body for BaselineStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, Infallible>>> {
        // Requests are read and discarded, because otherwise flow control would stop the client.
        while let Poll::Ready(Some(Ok(_))) = Pin::new(&mut self.requests).poll_frame(context) {}
        let round = self.streams.round.load(Ordering::Acquire);
        if self.written < round {
            self.written += 1;
            return Poll::Ready(Some(Ok(Frame::data(self.message.clone()))));
        }
        let mut wakers = self.streams.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        wakers.push(context.waker().clone());
        drop(wakers);
        if self.streams.round.load(Ordering::Acquire) > round {
            context.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

/// Runs the baseline process. Commands arrive on stdin, one per line, and are answered on stdout.
pub(crate) async fn serve(endpoints: usize) -> Result<()> {
    let message = message(endpoints);
    let listener =
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(Failed::to("could not listen"))?;
    let address = listener.local_addr().map_err(Failed::to("could not listen"))?;
    println!("{address} {}", message.len());
    let streams = Arc::new(BaselineStreams::default());
    let commands = streams.clone();
    let reader = tokio::task::spawn_blocking(move || {
        for line in std::io::stdin().lines().map_while(std::result::Result::ok) {
            match line.trim() {
                "connected" => println!("{}", commands.open.load(Ordering::Acquire)),
                "push" => {
                    let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                    commands.round.fetch_add(1, Ordering::AcqRel);
                    let wakers: Vec<_> =
                        std::mem::take(&mut *commands.wakers.lock().unwrap_or_else(PoisonError::into_inner));
                    wakers.into_iter().for_each(Waker::wake);
                    println!("{}", began.as_nanos());
                }
                _ => return,
            }
        }
    });
    let mut connections = JoinSet::new();
    let accept = async {
        loop {
            let Ok((io, _)) = listener.accept().await else { continue };
            _ = io.set_nodelay(true);
            let (streams, message) = (streams.clone(), message.clone());
            connections.spawn(async move {
                let answer = service_fn(move |request: http::Request<hyper::body::Incoming>| {
                    let (streams, message) = (streams.clone(), message.clone());
                    let written = streams.round.load(Ordering::Acquire);
                    streams.open.fetch_add(1, Ordering::AcqRel);
                    let body = BaselineStream { streams, written, message, requests: request.into_body() };
                    let response =
                        http::Response::builder().header("content-type", "application/grpc").body(body);
                    std::future::ready(response)
                });
                http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(io), answer).await
            });
        }
    };
    tokio::select! {
        () = accept => {}
        _ = reader => {}
    }
    Ok(())
}

/// Returns a response with one assignment of `endpoints` endpoints, encoded as the control plane would.
fn message(endpoints: usize) -> Bytes {
    let endpoint = |at: usize| LbEndpoint {
        load_balancing_weight: Some(uint32(1)),
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
            address: Some(Address {
                address: Some(AddressKind::SocketAddress(SocketAddress {
                    address: format!("10.0.0.{}", at % 250 + 1),
                    port_specifier: Some(PortSpecifier::PortValue(8000)),
                    ..SocketAddress::default()
                })),
            }),
            ..Endpoint::default()
        })),
        ..LbEndpoint::default()
    };
    let assignment = ClusterLoadAssignment {
        cluster_name: "service-00000".to_owned(),
        endpoints: vec![LocalityLbEndpoints {
            locality: Some(Locality { zone: "eu-1a".to_owned(), ..Locality::default() }),
            lb_endpoints: (0..endpoints).map(endpoint).collect(),
            load_balancing_weight: Some(uint32(u32::try_from(endpoints).unwrap_or(1).max(1))),
            ..LocalityLbEndpoints::default()
        }],
        ..ClusterLoadAssignment::default()
    };
    let response = DeltaDiscoveryResponse {
        type_url: Kind::Endpoint.type_url().to_owned(),
        nonce: "1".to_owned(),
        resources: vec![Resource {
            name: "service-00000".to_owned(),
            version: "0123456789abcdef".to_owned(),
            resource: Some(any(&assignment)),
            ..Resource::default()
        }],
        control_plane: Some(ControlPlane { identifier: "vmesh-control/0.1.0 baseline".to_owned() }),
        system_version_info: "0123456789abcdef".to_owned(),
        ..DeltaDiscoveryResponse::default()
    };
    let body = response.encode_to_vec();
    let mut framed = BytesMut::with_capacity(5 + body.len());
    framed.put_u8(0);
    framed.put_u32(u32::try_from(body.len()).unwrap_or(u32::MAX));
    framed.put_slice(&body);
    framed.freeze()
}
