//! Sends requests, chooses the address for them, and reads their answers.

use std::fmt;
use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HOST};
use http::response::Parts;
use http::{HeaderMap, HeaderValue, Method, Request, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;
use xxhash_rust::xxh3::xxh3_64;

use crate::config::{Address, Config};
use crate::counters::Counters;
use crate::credentials::{Credentials, Revision};
use crate::error::{ConsulError, ErrorKind};
use crate::pool::{Lease, Pool, unreachable};

/// The limit of one answer, in bytes: about the health of a service with 20,000 instances.
pub const MAX_BODY: usize = 32 << 20;
/// Answers up to this size are read as they arrive, in bytes: about the health of a service with 100 instances.
const SMALL_BODY: usize = 128 << 10;
/// The limit of larger answers in memory, each counted from its first bytes until it is parsed. Further answers
/// stay with the server meanwhile, so the answers of one client take at most this number times [`MAX_BODY`],
/// plus the small ones.
const LARGE_BODIES: usize = 4;
/// The timeout of a request, added to its `wait`. A server without a leader needs 7 s to answer that it has
/// none.
pub const MARGIN: Duration = Duration::from_secs(10);
/// The timeout of the question to a server for the leader of its own datacenter.
const LEADER_TIMEOUT: Duration = Duration::from_secs(2);
/// Consul's own limit for the wait of a blocking query.
pub const MAX_WAIT: Duration = Duration::from_secs(600);

/// The consistency of a read: which servers may answer it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Consistency {
    /// Any server answers from its own data, even without a leader: see [`Meta::last_contact`].
    Stale,
    /// The leader answers.
    #[default]
    Leader,
    /// The leader answers after a majority has confirmed its leadership.
    Consistent,
}

/// The parameters of a read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Query {
    /// Blocks until the path's index exceeds this one, or until `wait` is over. 0 does not block.
    pub index: u64,
    pub wait: Duration,
    /// The [`Meta::origin`] of `index`; 0 matches any. For another origin the query does not block: there the
    /// same index may have another meaning, and a server that started anew would not reach it for a long time.
    pub origin: u64,
    pub consistency: Consistency,
    pub datacenter: Option<Arc<str>>,
    /// Further parameters, such as `recurse`. The client does not escape them, so they may contain only
    /// letters.
    pub flags: &'static [&'static str],
}

/// The metadata of an answer, from its headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// `None` if the header is missing or not a number.
    pub index: Option<u64>,
    /// False if the server reports that it knows no leader. Servers that stream their answers do not report it.
    pub known_leader: bool,
    /// The maximum age of a stale answer.
    pub last_contact: Duration,
    /// True if the answer omits entries that the token may not read. Servers before 1.11 never report it.
    pub filtered: bool,
    /// True if addresses of other datacenters are already their WAN addresses.
    pub translated: bool,
    /// A hash of the body: equal bodies have equal hashes.
    pub hash: u64,
    /// Identifies the token and the server that the answer came from. It changes with the token, with the
    /// address, and with each lost connection, since a restarted server counts its indexes anew.
    pub origin: u64,
}

/// An answer with its metadata.
#[derive(Debug, Clone)]
pub struct Answer<T> {
    pub value: T,
    pub meta: Meta,
}

/// A client of one Consul cluster. Clones share connections, which close with the last clone.
#[derive(Clone)]
pub struct Client(Arc<ClientShared>);

struct ClientShared {
    pools: Vec<Pool>,
    /// The index of the pool that answers reads now.
    current: AtomicUsize,
    credentials: Credentials,
    namespace: Option<String>,
    partition: Option<String>,
    counters: Arc<Counters>,
    /// One permit per answer of more than [`SMALL_BODY`] in memory.
    large_bodies: Arc<Semaphore>,
}

/// The body of an answer. A large one prevents others from being read until it is dropped, so parse it soon.
#[derive(Debug)]
pub struct Body {
    bytes: Bytes,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// An HTTP response of any status.
struct Reply {
    status: u16,
    headers: HeaderMap,
    body: Body,
    origin: u64,
}

impl Client {
    /// Makes a client. It reads no file and opens no connection before its first request.
    pub fn new(config: &Config) -> Client {
        let counters = Arc::new(Counters::default());
        let drivers = Arc::new(Mutex::new(JoinSet::new()));
        let max = config.max_connections.get();
        let pool = |(number, address): (u64, &Address)| {
            Pool::new(address.clone(), number, max, counters.clone(), drivers.clone())
        };
        Client(Arc::new(ClientShared {
            pools: (1..).zip(config.address.iter()).map(pool).collect(),
            current: AtomicUsize::new(0),
            credentials: Credentials::new(config),
            namespace: config.namespace.clone(),
            partition: config.partition.clone(),
            counters,
            large_bodies: Arc::new(Semaphore::new(LARGE_BODIES)),
        }))
    }

    pub fn counters(&self) -> &Arc<Counters> {
        &self.0.counters
    }

    /// Returns warnings for operators that do not stop the client: a token file that others may read, a file
    /// that cannot be read now.
    pub fn warnings(&self) -> Vec<Arc<str>> {
        self.0.credentials.warnings()
    }

    /// Returns the address that answers reads now.
    pub fn address(&self) -> String {
        let current = self.0.pools.get(self.0.current.load(Ordering::Relaxed));
        current.map(|pool| pool.address.to_string()).unwrap_or_default()
    }

    /// Returns how many requests may be in flight without waiting for each other. The number is final after the
    /// first answer: TLS with a server that does not support HTTP/2 allows one request per connection, as
    /// plaintext does.
    pub fn capacity(&self) -> usize {
        self.0.pools.iter().map(Pool::capacity).min().unwrap_or_default()
    }

    /// Sends GET `path` and parses the JSON answer. `path` must be escaped: see [`escaped`].
    pub async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &Query,
    ) -> Result<Answer<T>, ConsulError> {
        let answer = self.get_bytes(path, query).await?;
        match serde_json::from_slice(&answer.value) {
            Ok(value) => Ok(Answer { value, meta: answer.meta }),
            Err(wrong) => Err(self.bad_body(path, &wrong)),
        }
    }

    /// Returns the error for an answer to GET `path` that the caller cannot use.
    pub fn bad_answer(&self, path: &str, wrong: String) -> ConsulError {
        self.bad_body(path, &wrong)
    }

    pub(crate) fn bad_body(&self, path: &str, wrong: &dyn fmt::Display) -> ConsulError {
        let address =
            self.0.pools.get(self.0.current.load(Ordering::Relaxed)).map(|pool| pool.address.clone());
        let address = address.unwrap_or(Address::Unix("?".into()));
        let kind = ErrorKind::BadBody(wrong.to_string());
        ConsulError { method: "GET", path: path.to_owned(), address, kind }
    }

    /// Sends GET `path` and returns the body. 404 is an error.
    pub async fn get_bytes(&self, path: &str, query: &Query) -> Result<Answer<Body>, ConsulError> {
        self.read(path, query, false).await
    }

    /// Sends GET `path`. 404 means that there is no such value and supports blocking as any other answer does:
    /// the convention of the KV store.
    pub(crate) async fn get_or_nothing(
        &self,
        path: &str,
        query: &Query,
    ) -> Result<Answer<Option<Body>>, ConsulError> {
        let Answer { value, meta } = self.read(path, query, true).await?;
        let value = if meta.hash == NOT_FOUND_HASH { None } else { Some(value) };
        Ok(Answer { value, meta })
    }

    /// Sends a read to the current address. If the address fails, the next one becomes current, and a read that
    /// does not block is repeated there. A blocking query is not: its caller should first read the current
    /// value.
    async fn read(&self, path: &str, query: &Query, or_nothing: bool) -> Result<Answer<Body>, ConsulError> {
        let pools = &self.0.pools;
        let attempts = if query.index == 0 { pools.len() } else { 1 };
        let mut attempt = 1;
        loop {
            let at = self.0.current.load(Ordering::Relaxed);
            let Some(pool) = pools.get(at) else {
                return Err(self.bad_body(path, &"no address is configured"));
            };
            let outcome = self.exchange(pool, "GET", path, query, None, true).await;
            let kind = match outcome {
                Ok(reply) => match ErrorKind::from_response(reply.status, &reply.body) {
                    None => return Ok(answer(reply)),
                    Some(ErrorKind::NotFound(_)) if or_nothing => {
                        let mut nothing = answer(reply);
                        nothing.meta.hash = NOT_FOUND_HASH;
                        return Ok(nothing);
                    }
                    Some(kind) => kind,
                },
                Err(kind) => kind,
            };
            self.0.counters.failures.fetch_add(1, Ordering::Relaxed);
            if kind.is_server_specific()
                && pools.len() > 1
                && !self.is_failure_of_datacenter(pool, query, &kind).await
            {
                self.use_next_address(at, &kind);
                if attempt < attempts {
                    attempt += 1;
                    continue;
                }
            }
            return Err(ConsulError {
                method: "GET",
                path: path.to_owned(),
                address: pool.address.clone(),
                kind,
            });
        }
    }

    /// Reports whether the failure is that of the datacenter `query` asked about, while the server that
    /// forwarded the query is healthy. Leaving that server would disturb the queries for other datacenters for
    /// as long as this datacenter fails.
    async fn is_failure_of_datacenter(&self, pool: &Pool, query: &Query, kind: &ErrorKind) -> bool {
        if query.datacenter.is_none() || matches!(kind, ErrorKind::Unreachable(_) | ErrorKind::Limited(_)) {
            return false;
        }
        let query = Query::default();
        let asked = self.exchange(pool, "GET", "/v1/status/leader", &query, None, true);
        match timeout(LEADER_TIMEOUT, asked).await {
            // The body is the quoted address of the leader of the server's own datacenter.
            Ok(Ok(reply)) => reply.status == 200 && reply.body.len() > 2,
            Ok(Err(_)) | Err(_) => false,
        }
    }

    /// Makes the next address current, unless another request has already done so.
    fn use_next_address(&self, at: usize, kind: &ErrorKind) {
        let next = (at + 1) % self.0.pools.len();
        if self.0.current.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return;
        }
        if let (Some(previous), Some(taken)) = (self.0.pools.get(at), self.0.pools.get(next)) {
            tracing::info!("{} failed ({kind}): {} is used from now on", previous.address, taken.address);
            // After a timeout or a lost connection, further requests to the address would fail too. After other
            // errors the address may still answer the requests that it has.
            if matches!(kind, ErrorKind::Timeout(_) | ErrorKind::Unreachable(_)) {
                previous.abandon();
            }
        }
    }

    /// Sends PUT `path` to the first address, since a registration is meant for that agent only.
    pub(crate) async fn put(&self, path: &str, body: Bytes, within: Duration) -> Result<Bytes, ConsulError> {
        let Some(pool) = self.0.pools.first() else {
            return Err(self.bad_body(path, &"no address is configured"));
        };
        let query = Query { wait: within.saturating_sub(MARGIN), ..Query::default() };
        let outcome = self.exchange(pool, "PUT", path, &query, Some(body), false).await;
        let kind = match outcome {
            Ok(reply) => match ErrorKind::from_response(reply.status, &reply.body) {
                None => return Ok(reply.body.bytes),
                Some(kind) => kind,
            },
            Err(kind) => kind,
        };
        self.0.counters.failures.fetch_add(1, Ordering::Relaxed);
        Err(ConsulError { method: "PUT", path: path.to_owned(), address: pool.address.clone(), kind })
    }

    /// Sends one request with the current token. If the token was rejected and its file has changed since,
    /// sends it once more.
    async fn exchange(
        &self,
        pool: &Pool,
        method: &'static str,
        path: &str,
        query: &Query,
        body: Option<Bytes>,
        may_abandon: bool,
    ) -> Result<Reply, ErrorKind> {
        let credentials = &self.0.credentials;
        let token = credentials.token(false).await.map_err(ErrorKind::Credentials)?;
        let used = token.as_ref().map(|token| token.number);
        let reply = self.try_exchange(pool, method, path, query, body.clone(), token, may_abandon).await;
        let reply = reply.map_err(|kind| self.with_certificate_hint(pool, kind))?;
        if reply.status != 403 {
            return Ok(reply);
        }
        match credentials.token(true).await.map_err(ErrorKind::Credentials)? {
            Some(token) if used != Some(token.number) => {
                self.try_exchange(pool, method, path, query, body, Some(token), may_abandon).await
            }
            _ => Ok(reply),
        }
    }

    /// Adds a hint about client certificates: with TLS 1.3 a server rejects a missing one only after the
    /// handshake, and its message is often lost.
    fn with_certificate_hint(&self, pool: &Pool, kind: ErrorKind) -> ErrorKind {
        match kind {
            ErrorKind::Unreachable(why) if pool.address.is_tls() && !self.0.credentials.has_certificate() => {
                ErrorKind::Unreachable(format!(
                    "{why} (if it wants a client certificate, set `tls.cert_file` and `tls.key_file`)"
                ))
            }
            kind => kind,
        }
    }

    #[expect(clippy::too_many_arguments, reason = "one request, taken apart once, and private")]
    async fn try_exchange(
        &self,
        pool: &Pool,
        method: &'static str,
        path: &str,
        query: &Query,
        body: Option<Bytes>,
        token: Option<Revision<HeaderValue>>,
        may_abandon: bool,
    ) -> Result<Reply, ErrorKind> {
        let mut abandoned = pool.abandoned();
        // Consul may add a sixteenth to the wait, to spread the answers.
        let within = query.wait + query.wait / 16 + MARGIN;
        loop {
            let tls = match pool.address.is_tls() {
                true => Some(self.0.credentials.tls().await.map_err(ErrorKind::Credentials)?),
                false => None,
            };
            let mut lease = pool.lease(tls.as_ref(), self.0.credentials.server_name()).await?;
            // For another token, or on a server that was restarted, the same index may have another meaning, so
            // the query must not block.
            let origin = pool.origin(token.as_ref().map_or(0, |token| token.number));
            let target = if query.origin == 0 || query.origin == origin {
                self.target(path, query)
            } else {
                self.target(path, &Query { index: 0, ..query.clone() })
            };
            self.0.counters.requests.fetch_add(1, Ordering::Relaxed);
            let is_http2 = matches!(lease, Lease::Http2(_));
            let request = request(method, &pool.address, &target, body.clone(), token.as_ref(), is_http2)?;
            let outcome = tokio::select! {
                outcome = timeout(within, self.send(&mut lease, request)) => outcome,
                Ok(()) = abandoned.changed(), if may_abandon => {
                    return Err(ErrorKind::Unreachable("the client has turned to another server since".to_owned()));
                }
            };
            return match outcome {
                Ok(Ok((parts, body))) => {
                    pool.give_back(lease);
                    Ok(Reply { status: parts.status.as_u16(), headers: parts.headers, body, origin })
                }
                // The server may have closed an idle connection at the moment of its reuse.
                Ok(Err(ExchangeFailure::BeforeResponse(_)))
                    if matches!(lease, Lease::Http1 { is_new: false, .. }) && method == "GET" =>
                {
                    pool.count_lost_connection();
                    continue;
                }
                Ok(Err(ExchangeFailure::BeforeResponse(error))) => {
                    pool.count_lost_connection();
                    Err(unreachable(error))
                }
                Ok(Err(ExchangeFailure::InBody(kind))) => {
                    pool.count_lost_connection();
                    Err(kind)
                }
                Err(_) => Err(ErrorKind::Timeout(within)),
            };
        }
    }

    /// Sends a request and reads its whole answer.
    async fn send(
        &self,
        lease: &mut Lease,
        request: Request<Full<Bytes>>,
    ) -> Result<(Parts, Body), ExchangeFailure> {
        let response = match lease {
            Lease::Http1 { sender, .. } => sender.send_request(request).await,
            Lease::Http2(stream) => {
                let mut sender = stream.sender();
                match sender.ready().await {
                    Ok(()) => sender.send_request(request).await,
                    Err(error) => Err(error),
                }
            }
        };
        let (parts, body) = response.map_err(ExchangeFailure::BeforeResponse)?.into_parts();
        let body = read_body(body, &self.0.large_bodies).await.map_err(ExchangeFailure::InBody)?;
        Ok((parts, body))
    }

    fn target(&self, path: &str, query: &Query) -> String {
        let mut target = path.to_owned();
        let mut separator = if path.contains('?') { '&' } else { '?' };
        let mut add = |text: &str| {
            target.push(separator);
            target.push_str(text);
            separator = '&';
        };
        match query.consistency {
            Consistency::Stale => add("stale"),
            Consistency::Leader => {}
            Consistency::Consistent => add("consistent"),
        }
        if query.index > 0 {
            add(&format!("index={}&wait={}ms", query.index, query.wait.min(MAX_WAIT).as_millis()));
        }
        query.flags.iter().for_each(|flag| add(flag));
        if let Some(datacenter) = &query.datacenter {
            add(&format!("dc={}", escaped(datacenter)));
        }
        if let Some(namespace) = &self.0.namespace {
            add(&format!("ns={}", escaped(namespace)));
        }
        if let Some(partition) = &self.0.partition {
            add(&format!("partition={}", escaped(partition)));
        }
        target
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Client").field(&self.address()).finish()
    }
}

/// The hash of an answer with status 404.
const NOT_FOUND_HASH: u64 = 0;

enum ExchangeFailure {
    BeforeResponse(hyper::Error),
    InBody(ErrorKind),
}

fn request(
    method: &str,
    address: &Address,
    target: &str,
    body: Option<Bytes>,
    token: Option<&Revision<HeaderValue>>,
    is_http2: bool,
) -> Result<Request<Full<Bytes>>, ErrorKind> {
    let authority = match address {
        Address::Unix(_) => "localhost".to_owned(),
        address => address.authority(),
    };
    let method = Method::from_bytes(method.as_bytes()).unwrap_or_default();
    let mut request = Request::builder().method(method);
    request = if is_http2 {
        request.version(Version::HTTP_2).uri(format!("https://{authority}{target}"))
    } else {
        request.uri(target).header(HOST, authority)
    };
    if let Some(token) = token {
        request = request.header("x-consul-token", token.value.clone());
    }
    if body.is_some() {
        request = request.header(CONTENT_TYPE, "application/json");
    }
    request.body(Full::new(body.unwrap_or_default())).map_err(|error| ErrorKind::BadBody(error.to_string()))
}

/// Reads a body to its end. Once it exceeds [`SMALL_BODY`], it waits for a permit before it reads on.
async fn read_body(mut body: Incoming, large_bodies: &Arc<Semaphore>) -> Result<Body, ErrorKind> {
    let too_large = || ErrorKind::BadBody(format!("it is larger than {MAX_BODY} bytes"));
    let (mut bytes, mut permit) = (BytesMut::new(), None);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            ErrorKind::Unreachable(format!("the connection broke within the answer: {error}"))
        })?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > MAX_BODY {
            return Err(too_large());
        }
        if permit.is_none() && bytes.len() + data.len() > SMALL_BODY {
            let closed = |_| ErrorKind::Unreachable("the client is closed".to_owned());
            permit = Some(large_bodies.clone().acquire_owned().await.map_err(closed)?);
        }
        bytes.extend_from_slice(&data);
    }
    Ok(Body { bytes: bytes.freeze(), _permit: permit })
}

fn answer(reply: Reply) -> Answer<Body> {
    let text = |name: &str| reply.headers.get(name).and_then(|value| value.to_str().ok());
    let is_true = |name: &str| text(name).is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let meta = Meta {
        index: text("x-consul-index").and_then(|index| index.parse().ok()),
        known_leader: text("x-consul-knownleader").is_none_or(|value| !value.eq_ignore_ascii_case("false")),
        last_contact: Duration::from_millis(
            text("x-consul-lastcontact").and_then(|millis| millis.parse().ok()).unwrap_or_default(),
        ),
        filtered: is_true("x-consul-results-filtered-by-acls"),
        translated: is_true("x-consul-translate-addresses"),
        hash: xxh3_64(&reply.body).max(NOT_FOUND_HASH + 1),
        origin: reply.origin,
    };
    Answer { value: reply.body, meta }
}

/// Escapes `text` for use as a path segment or a query value (RFC 3986, 2.1): all bytes except the unreserved
/// ones.
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            escaped.push(byte.into());
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests;
