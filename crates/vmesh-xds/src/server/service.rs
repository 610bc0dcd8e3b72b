use super::body::{AdsBody, Stream, trailers};
use super::connection::ConnectionUse;
use super::{Feed, Hub};
use crate::grpc::Budget;
use crate::{Event, Protocol, SessionStatus};
use bytes::Bytes;
use http::{HeaderValue, header};
use std::convert::Infallible;
use std::future::{Ready, ready};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::task::{Context, Poll};
use tonic::Code;
use vmesh_daemon::connections::Origin;
use vmesh_proto::envoy::config::core::v3::Node;

/// Decides which clients are served, and what each of them sees.
pub trait Admission: Send + Sync + 'static {
    fn admit(&self, node: &Node, peer: &PeerInfo) -> Result<Admitted, Refusal>;
}

pub struct Admitted {
    pub feed: Feed,
    pub observer: Box<dyn Observer>,
}

/// Follows one stream. The server drops it when the stream ends.
pub trait Observer: Send + 'static {
    /// Called at each ACK and NACK, and whenever the state or the generation changes. It must not block.
    fn on_status(&mut self, status: &SessionStatus);

    /// Called for each action of the client, if the observer [asks for events](Observer::wants_events).
    fn on_event(&mut self, event: Event) {
        _ = event;
    }

    fn wants_events(&self) -> bool {
        false
    }
}

/// The reason why a client is not served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The server is not ready; the client should try again (R51, R62).
    #[error("{0}")]
    NotReady(String),
    /// The client's node is malformed or unknown.
    #[error("{0}")]
    Invalid(String),
    /// The client has no permission.
    #[error("{0}")]
    Denied(String),
}

impl Refusal {
    pub(super) fn code(&self) -> Code {
        match self {
            Refusal::NotReady(_) => Code::Unavailable,
            Refusal::Invalid(_) => Code::InvalidArgument,
            Refusal::Denied(_) => Code::PermissionDenied,
        }
    }
}

/// Facts about the client that the server knows independently of its requests. The code that accepts
/// connections puts them into the extensions of each request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerInfo {
    pub address: Option<SocketAddr>,
    /// The user at the other end of a Unix socket.
    pub uid: Option<u32>,
    /// The certificate that the client proved to own, in DER. The handshake has verified it.
    pub certificate: Option<Arc<[u8]>>,
    /// True if the connection is encrypted, whether or not the client showed a certificate.
    pub is_tls: bool,
}

impl PeerInfo {
    /// Returns the origin by which connections are counted.
    pub fn origin(&self) -> Origin {
        match (self.address, self.uid) {
            (Some(address), _) => Origin::of_address(address.ip()),
            (None, Some(uid)) => Origin::User(uid),
            (None, None) => Origin::Unknown,
        }
    }
}

/// Answers requests on the connections of the xDS port that are not xDS, such as those of a node that joins.
pub trait OtherRequests: Send + Sync + 'static {
    /// Reports whether the requests with `path` are answered here.
    fn has(&self, path: &str) -> bool;

    fn answer(
        &self,
        request: http::Request<hyper::body::Incoming>,
        peer: PeerInfo,
    ) -> Pin<Box<dyn Future<Output = http::Response<Bytes>> + Send>>;
}

/// Counters of all streams since the start, unless a field says otherwise.
#[derive(Debug, Default)]
pub struct Counters {
    /// The number of open connections.
    pub connections: AtomicU64,
    /// Connections that were closed as soon as they were accepted, because a limit was reached.
    pub connections_refused: AtomicU64,
    /// Connections that were closed because they sent no request in time, or to make room for others.
    pub connections_silent: AtomicU64,
    /// The number of open streams.
    pub streams: AtomicU64,
    pub streams_opened: AtomicU64,
    pub streams_refused: AtomicU64,
    pub requests: AtomicU64,
    pub responses: AtomicU64,
    /// The bytes of the responses, including gRPC's framing.
    pub bytes: AtomicU64,
    pub resources: AtomicU64,
    pub acks: AtomicU64,
    pub nacks: AtomicU64,
    pub unknown_types: AtomicU64,
}

/// The gRPC service `envoy.service.discovery.v3.AggregatedDiscoveryService`, for hyper or for tonic's router.
#[derive(Clone)]
pub struct AdsService {
    pub(super) shared: Arc<ServiceShared>,
    others: Option<Arc<dyn OtherRequests>>,
}

pub(super) struct ServiceShared {
    pub hub: Hub,
    pub admission: Box<dyn Admission>,
    pub control_plane: Arc<str>,
    pub counters: Arc<Counters>,
    pub budgets: Budgets,
}

/// Budgets for the incomplete requests of all streams together.
pub(super) struct Budgets {
    pub before_admission: Arc<Budget>,
    pub admitted: Arc<Budget>,
}

/// The limit for clients before their admission, in bytes: the largest first requests of 64 clients at the same
/// moment.
const BEFORE_ADMISSION_BYTES: usize = 64 << 20;
const ADMITTED_BYTES: usize = 256 << 20;

impl AdsService {
    /// `control_plane` names this instance and its build (R64).
    pub fn new(hub: Hub, admission: impl Admission, control_plane: impl Into<Arc<str>>) -> AdsService {
        let control_plane = control_plane.into();
        let budgets = Budgets {
            before_admission: Budget::new(BEFORE_ADMISSION_BYTES),
            admitted: Budget::new(ADMITTED_BYTES),
        };
        let (admission, counters) = (Box::new(admission), Arc::default());
        let shared = ServiceShared { hub, admission, control_plane, counters, budgets };
        AdsService { shared: Arc::new(shared), others: None }
    }

    /// Returns the same service, which also answers `others`.
    pub fn with_other_requests(&self, others: Arc<dyn OtherRequests>) -> AdsService {
        AdsService { shared: self.shared.clone(), others: Some(others) }
    }

    /// Returns what answers the requests with `path`, if they are not xDS.
    pub(super) fn other_requests(&self, path: &str) -> Option<Arc<dyn OtherRequests>> {
        self.others.as_ref().filter(|others| others.has(path)).cloned()
    }

    pub fn counters(&self) -> &Arc<Counters> {
        &self.shared.counters
    }

    pub fn hub(&self) -> &Hub {
        &self.shared.hub
    }

    /// Answers one call. It never fails: errors are part of the response.
    pub fn answer<B>(&self, request: http::Request<B>) -> http::Response<AdsBody<B>>
    where
        B: http_body::Body,
    {
        let protocol = match request.uri().path() {
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources" => {
                Protocol::Delta
            }
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources" => {
                Protocol::Sotw
            }
            path => return refused(Code::Unimplemented, &format!("there is no method {path} here")),
        };
        let content_type = request.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
        if !content_type.is_some_and(|content_type| content_type.starts_with(b"application/grpc")) {
            let mut response = http::Response::new(AdsBody::empty());
            *response.status_mut() = http::StatusCode::UNSUPPORTED_MEDIA_TYPE;
            return response;
        }
        if self.shared.hub.is_stopping() {
            return refused(Code::Unavailable, "shutting down");
        }
        let (mut parts, body) = request.into_parts();
        let peer = parts.extensions.remove::<PeerInfo>().unwrap_or_default();
        let connection = parts.extensions.remove::<Arc<ConnectionUse>>();
        let stream = Stream::new(self.shared.clone(), protocol, peer, connection, body);
        grpc(http::Response::new(AdsBody::streaming(stream)))
    }
}

fn refused<B>(code: Code, message: &str) -> http::Response<AdsBody<B>> {
    let mut response = grpc(http::Response::new(AdsBody::empty()));
    response.headers_mut().extend(trailers(code, message));
    response
}

fn grpc<B>(mut response: http::Response<AdsBody<B>>) -> http::Response<AdsBody<B>> {
    let content_type = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(header::CONTENT_TYPE, content_type);
    response
}

impl<B> tower::Service<http::Request<B>> for AdsService
where
    B: http_body::Body,
{
    type Response = http::Response<AdsBody<B>>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        ready(Ok(self.answer(request)))
    }
}

impl tonic::server::NamedService for AdsService {
    const NAME: &'static str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
}
