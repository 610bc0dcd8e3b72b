//! The client's end of an ADS stream over HTTP/2: on TCP, on a Unix socket, or on a connection that the caller
//! opened.

use crate::grpc::{Failure, Messages, framed};
use crate::{Kind, ResponseSummary};
use bytes::Bytes;
use http::{HeaderMap, Request, header};
use http_body::{Body, Frame};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
pub use tonic::Code;
use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

/// One delta ADS stream on an HTTP/2 connection of its own. Dropping it closes the stream and the connection.
pub struct AdsStream {
    requests: mpsc::Sender<Bytes>,
    state: StreamState,
    connection: JoinHandle<()>,
}

enum StreamState {
    /// The request headers are sent; the response headers may not arrive before the server has read a request.
    Sent(Pin<Box<dyn Future<Output = hyper::Result<http::Response<Incoming>>> + Send>>),
    Open(Box<Messages<Incoming>>),
    Ended(Failure),
}

/// The limit of one response, in bytes. A server sends at most 2 MiB per response, or a single larger resource;
/// 16 MiB is one service with a hundred thousand endpoints. A client holds a response twice while it decodes
/// it, and an agent's unit may have a memory limit of 512 MiB.
const RESPONSE_MAX: usize = 16 << 20;
const PATH: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

impl AdsStream {
    /// Connects to `http://host:port` or `unix:/path` and starts the stream.
    ///
    /// Fails with [`io::ErrorKind::InvalidInput`] for any other URI.
    pub async fn connect(uri: &str) -> io::Result<AdsStream> {
        if let Some(path) = uri.strip_prefix("unix:") {
            return AdsStream::connect_unix(path.trim_start_matches("//")).await;
        }
        let invalid = |why: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("{uri}: {why}"));
        let parsed: http::Uri = uri.parse().map_err(|_| invalid("not a URI"))?;
        if parsed.scheme_str() != Some("http") {
            return Err(invalid("only http://host:port and unix:/path are connected to here"));
        }
        let host = parsed.host().ok_or_else(|| invalid("there is no host in it"))?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let tcp = TcpStream::connect((host, parsed.port_u16().unwrap_or(80))).await?;
        tcp.set_nodelay(true)?;
        AdsStream::over(tcp).await
    }

    pub async fn connect_unix(path: impl AsRef<Path>) -> io::Result<AdsStream> {
        AdsStream::over(UnixStream::connect(path).await?).await
    }

    /// Starts the stream on a connection that is already open, such as a TLS connection that agreed on `h2`.
    pub async fn over<I>(io: I) -> io::Result<AdsStream>
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut http = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        http.timer(TokioTimer::new())
            // HTTP/2 keepalive detects a path that drops packets within 40 s (R57).
            .keep_alive_interval(Duration::from_secs(30))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(1 << 20)
            .max_send_buf_size(64 << 10);
        let (mut http, connection) = http.handshake(TokioIo::new(io)).await.map_err(io::Error::other)?;
        #[expect(
            clippy::disallowed_methods,
            reason = "the connection belongs to this stream, and ends with it"
        )]
        let connection = tokio::spawn(async move { _ = connection.await });

        let (requests, body) = mpsc::channel(16);
        let mut request = Request::new(RequestBody(body));
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = http::Uri::builder()
            .scheme("http")
            .authority("vmesh")
            .path_and_query(PATH)
            .build()
            .map_err(io::Error::other)?;
        let headers = request.headers_mut();
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/grpc"));
        headers.insert(header::TE, header::HeaderValue::from_static("trailers"));
        let response = Box::pin(async move { http.send_request(request).await });
        Ok(AdsStream { requests, state: StreamState::Sent(response), connection })
    }

    /// Sends a request. Waits while the server's flow control blocks. An error means that the stream has ended;
    /// [`AdsStream::next`] returns the reason.
    pub fn send(
        &self,
        request: &DeltaDiscoveryRequest,
    ) -> impl Future<Output = Result<(), Failure>> + Send + use<> {
        // The future borrows nothing from the stream, which is not `Sync`.
        let (requests, request) = (self.requests.clone(), framed(request));
        let gone = |_| Failure::new(Code::Unavailable, "the stream has ended");
        async move { requests.send(request).await.map_err(gone) }
    }

    /// Waits for the next response. Dropping the future loses no data.
    pub async fn next(&mut self) -> Result<DeltaDiscoveryResponse, Failure> {
        let message = self.next_bytes().await?;
        let malformed = |error| Failure::new(Code::Internal, format!("not a response: {error}"));
        DeltaDiscoveryResponse::decode(message).map_err(malformed)
    }

    /// Waits for the next response and returns it undecoded: often a [`ResponseSummary`] of it is enough.
    pub async fn next_bytes(&mut self) -> Result<Bytes, Failure> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// Waits until the server has accepted the stream. The first response may come much later, when something
    /// changes.
    pub async fn opened(&mut self) -> Result<(), Failure> {
        poll_fn(|cx| self.poll_open(cx)).await;
        match &self.state {
            StreamState::Ended(failure) => Err(failure.clone()),
            _ => Ok(()),
        }
    }

    fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let StreamState::Sent(response) = &mut self.state {
            self.state = match std::task::ready!(response.as_mut().poll(cx)) {
                Ok(response) => match error_status(&response) {
                    Some(failure) => StreamState::Ended(failure),
                    None => StreamState::Open(Box::new(Messages::new(response.into_body(), RESPONSE_MAX))),
                },
                Err(error) => StreamState::Ended(Failure::new(Code::Unavailable, error.to_string())),
            };
        }
        Poll::Ready(())
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, Failure>> {
        std::task::ready!(self.poll_open(cx));
        let failure = match &mut self.state {
            StreamState::Open(messages) => match std::task::ready!(messages.poll_message(cx)) {
                Some(Ok(message)) => return Poll::Ready(Ok(message)),
                Some(Err(failure)) => failure,
                None => messages
                    .trailers()
                    .and_then(status_in)
                    .unwrap_or_else(|| Failure::new(Code::Unavailable, "the server ended the stream")),
            },
            StreamState::Ended(failure) => failure.clone(),
            StreamState::Sent(_) => return Poll::Pending,
        };
        self.state = StreamState::Ended(failure.clone());
        Poll::Ready(Err(failure))
    }
}

impl Drop for AdsStream {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

fn error_status<B>(response: &http::Response<B>) -> Option<Failure> {
    if response.status() != http::StatusCode::OK {
        return Some(Failure::new(Code::Unavailable, format!("HTTP {}", response.status())));
    }
    status_in(response.headers())
}

fn status_in(headers: &HeaderMap) -> Option<Failure> {
    let status = tonic::Status::from_header_map(headers)?;
    Some(Failure::new(status.code(), status.message()))
}

/// The request body of the stream: each message is one HTTP/2 data frame.
struct RequestBody(mpsc::Receiver<Bytes>);

impl Body for RequestBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|message| message.map(|message| Ok(Frame::data(message))))
    }
}

/// The version of each resource that a client has, by kind and name.
pub type Versions = BTreeMap<Kind, BTreeMap<String, String>>;

/// A client for benches: it subscribes as Envoy does, ACKs every response, and keeps only the versions, so that
/// ten thousand clients fit in one process. Its subscriptions are all clusters, then their endpoints, then all
/// listeners.
pub struct BenchClient {
    stream: AdsStream,
    node: Option<Node>,
    has: Versions,
    subscribed: BTreeSet<Kind>,
}

impl BenchClient {
    pub async fn connect(uri: &str, node: Node) -> io::Result<BenchClient> {
        BenchClient::resume(uri, node, Versions::new()).await
    }

    /// Connects as a client that still has the resources in `has` from an earlier stream, and lists them in its
    /// first requests.
    pub async fn resume(uri: &str, node: Node, has: Versions) -> io::Result<BenchClient> {
        Ok(BenchClient::over(AdsStream::connect(uri).await?, node, has))
    }

    /// Makes a client of a stream that is open already.
    pub fn over(stream: AdsStream, node: Node, has: Versions) -> BenchClient {
        BenchClient { stream, node: Some(node), has, subscribed: BTreeSet::new() }
    }

    /// Closes the stream and returns the versions that the client had.
    pub fn into_versions(self) -> Versions {
        self.has
    }

    /// Waits for the next response, updates the client's versions, and ACKs the response.
    pub async fn next(&mut self) -> Result<ResponseSummary, Failure> {
        if let Some(node) = self.node.take() {
            self.subscribe(Kind::Cluster, Vec::new(), Some(node)).await?;
            let clusters: Vec<String> =
                self.has.get(&Kind::Cluster).into_iter().flatten().map(name).collect();
            if !clusters.is_empty() {
                self.subscribe(Kind::Endpoint, clusters, None).await?;
                self.subscribe(Kind::Listener, Vec::new(), None).await?;
            }
        }
        let message = self.stream.next_bytes().await?;
        let malformed = || Failure::new(Code::Internal, "not a response");
        let summary = ResponseSummary::parse(&message).ok_or_else(malformed)?;
        let kind = summary.kind.ok_or_else(malformed)?;
        let has = self.has.entry(kind).or_default();
        summary.removed.iter().for_each(|name| _ = has.remove(name));
        let mut new = Vec::new();
        for (name, version) in summary.resources.iter().zip(&summary.versions) {
            if has.insert(name.clone(), version.clone()).is_none() {
                new.push(name.clone());
            }
        }
        if kind == Kind::Cluster && !new.is_empty() {
            self.subscribe(Kind::Endpoint, new, None).await?;
        }
        let ack = DeltaDiscoveryRequest {
            type_url: kind.type_url().to_owned(),
            response_nonce: summary.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        };
        self.stream.send(&ack).await?;
        if kind == Kind::Cluster && !self.subscribed.contains(&Kind::Listener) {
            self.subscribe(Kind::Listener, Vec::new(), None).await?;
        }
        Ok(summary)
    }

    /// Subscribes to more names, or to all when `names` is empty. The first request of a kind lists the
    /// versions that the client has.
    async fn subscribe(&mut self, kind: Kind, names: Vec<String>, node: Option<Node>) -> Result<(), Failure> {
        let versions = match self.subscribed.insert(kind) {
            true => self.has.get(&kind).cloned().unwrap_or_default(),
            false => BTreeMap::new(),
        };
        let request = DeltaDiscoveryRequest {
            node,
            type_url: kind.type_url().to_owned(),
            resource_names_subscribe: names,
            initial_resource_versions: versions.into_iter().collect(),
            ..DeltaDiscoveryRequest::default()
        };
        self.stream.send(&request).await
    }
}

fn name((name, _): (&String, &String)) -> String {
    name.clone()
}
