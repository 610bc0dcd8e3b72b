//! Requests, and whom they are sent to.

use std::fmt;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_TYPE, HOST};
use http::{HeaderMap, HeaderValue, Method, Request, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;
use xxhash_rust::xxh3::xxh3_64;

use crate::config::{Address, Config};
use crate::credentials::{Credentials, Edition};
use crate::error::{ConsulError, ErrorKind};
use crate::pool::{Lease, Pool, broken};

/// Larger answers are not read: the health of a service of 20,000 instances is about as large.
pub const MAX_BODY: usize = 32 << 20;
/// Answers up to this size are read whenever they come: the health of a service of 100 instances is about as large.
const SMALL_BODY: usize = 128 << 10;
/// So many larger answers are in memory at once, from their first byte until they have been parsed. The others are left
/// with the server meanwhile, so the answers of one client never take more than this times [`MAX_BODY`], and what the
/// small ones do.
const LARGE_BODIES: usize = 4;
/// What a request may take beyond the time that it asks to wait for. A server without a leader alone takes 7 s to say so.
pub const MARGIN: Duration = Duration::from_secs(10);
/// How long a server may take to say who leads its own datacenter.
const IS_WELL_WITHIN: Duration = Duration::from_secs(2);
/// Consul's own bound for blocking queries.
pub const MAX_WAIT: Duration = Duration::from_secs(600);

/// Totals since the start.
#[derive(Debug, Default)]
pub struct Counters {
    pub requests: AtomicU64,
    /// Those without an answer that can be used.
    pub failures: AtomicU64,
    /// Connections that were made.
    pub connects: AtomicU64,
    /// Connections that are open now.
    pub connections: AtomicU64,
    /// How often a server's index went back, or was missing.
    pub index_resets: AtomicU64,
}

/// How much a read may cost, and what it is worth.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Consistency {
    /// Any server answers from what it has, also without a leader: see [`Meta::last_contact`].
    Stale,
    /// The leader answers.
    #[default]
    Leader,
    /// The leader answers after a majority has confirmed that it is one.
    Consistent,
}

/// What to ask for besides the path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Query {
    /// Answer when there is something newer than this, or after `wait`; 0 is at once.
    pub index: u64,
    pub wait: Duration,
    /// What `index` was seen with, as [`Meta::view`] says; 0 is anything. With another one the answer comes at once: the
    /// same index may be something else there, and a server that began anew would not reach it for long.
    pub view: u64,
    pub consistency: Consistency,
    pub datacenter: Option<Arc<str>>,
    /// More parameters, as `recurse`; not escaped, so no more than letters.
    pub flags: &'static [&'static str],
}

/// What the headers of an answer say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// `None`: the header is missing or makes no sense.
    pub index: Option<u64>,
    /// Whether the server knows of a leader. Servers that stream their answers do not say, and then it is true.
    pub known_leader: bool,
    /// How old a stale answer may be.
    pub last_contact: Duration,
    /// Something was left out of the answer because the token may not see it. Servers before 1.11 never say so.
    pub filtered: bool,
    /// Addresses of other datacenters are those of their wide area network already.
    pub translated: bool,
    /// Of the body: equal bodies have equal hashes.
    pub hash: u64,
    /// Another one whenever the token has changed, another address is asked, or a connection to it was lost.
    pub view: u64,
}

/// An answer and what it is worth.
#[derive(Debug, Clone)]
pub struct Answer<T> {
    pub value: T,
    pub meta: Meta,
}

/// A client of one Consul cluster. Clones share connections, which end with the last of them.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

struct Inner {
    pools: Vec<Pool>,
    /// The one that is asked.
    current: AtomicUsize,
    credentials: Credentials,
    namespace: Option<String>,
    partition: Option<String>,
    counters: Arc<Counters>,
    /// One permit for each answer of more than [`SMALL_BODY`] that may be in memory.
    large_bodies: Arc<Semaphore>,
}

/// The bytes of an answer. While they are kept, a large answer keeps others from being read: parse and drop them.
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

/// An answer before it is judged.
struct Reply {
    status: u16,
    headers: HeaderMap,
    body: Body,
    view: u64,
}

impl Client {
    /// Reads nothing and connects to nothing until it is used.
    pub fn new(config: &Config) -> Client {
        let counters = Arc::new(Counters::default());
        let drivers = Arc::new(Mutex::new(JoinSet::new()));
        let max = config.max_connections.get();
        let pool = |(number, address): (u64, &Address)| {
            Pool::new(address.clone(), number, max, counters.clone(), drivers.clone())
        };
        Client(Arc::new(Inner {
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

    /// What an operator should know although it works: a token that others may read, a file that cannot be read now.
    pub fn complaints(&self) -> Vec<Arc<str>> {
        self.0.credentials.complaints()
    }

    /// The address that is asked now.
    pub fn address(&self) -> String {
        let current = self.0.pools.get(self.0.current.load(Ordering::Relaxed));
        current.map(|pool| pool.address.to_string()).unwrap_or_default()
    }

    /// How many requests may be under way at once without waiting for each other. It is known for sure after the
    /// first answer: TLS with a server that does not speak HTTP/2 has one request per connection, as plaintext has.
    pub fn capacity(&self) -> usize {
        self.0.pools.iter().map(Pool::capacity).min().unwrap_or_default()
    }

    /// GET `path`, as JSON. `path` is escaped already: see [`escaped`].
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

    /// The error of an answer to GET `path` that makes no sense to whoever asked.
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

    /// GET `path`, as it comes. 404 is an error.
    pub async fn get_bytes(&self, path: &str, query: &Query) -> Result<Answer<Body>, ConsulError> {
        self.read(path, query, false).await
    }

    /// GET `path`, where 404 means that there is nothing, and blocks as any other answer: the KV store's convention.
    pub(crate) async fn get_or_nothing(
        &self,
        path: &str,
        query: &Query,
    ) -> Result<Answer<Option<Body>>, ConsulError> {
        let Answer { value, meta } = self.read(path, query, true).await?;
        let value = if meta.hash == NOTHING { None } else { Some(value) };
        Ok(Answer { value, meta })
    }

    /// Asks the address that worked last. One that fails is left for the next. What can be asked again at once is:
    /// a blocking query is not, since whoever waits for it should first look what there is.
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
                Ok(reply) => match ErrorKind::of(reply.status, &reply.body) {
                    None => return Ok(answer(reply)),
                    Some(ErrorKind::NotFound(_)) if or_nothing => {
                        let mut nothing = answer(reply);
                        nothing.meta.hash = NOTHING;
                        return Ok(nothing);
                    }
                    Some(kind) => kind,
                },
                Err(kind) => kind,
            };
            self.0.counters.failures.fetch_add(1, Ordering::Relaxed);
            if kind.is_the_servers() && pools.len() > 1 && !self.is_of_datacenter(pool, query, &kind).await {
                self.leave(at, &kind);
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

    /// Whether it is the datacenter that was asked about that fails, and not the server that passed the question on:
    /// leaving that one would cost the other datacenters their queries, again and again for as long as this one is away.
    async fn is_of_datacenter(&self, pool: &Pool, query: &Query, kind: &ErrorKind) -> bool {
        if query.datacenter.is_none() || matches!(kind, ErrorKind::Unreachable(_) | ErrorKind::Limited(_)) {
            return false;
        }
        let query = Query::default();
        let asked = self.exchange(pool, "GET", "/v1/status/leader", &query, None, true);
        match timeout(IS_WELL_WITHIN, asked).await {
            // The address of the leader of its own datacenter, in quotes.
            Ok(Ok(reply)) => reply.status == 200 && reply.body.len() > 2,
            Ok(Err(_)) | Err(_) => false,
        }
    }

    /// From now on the next address is asked, unless that is so already.
    fn leave(&self, at: usize, kind: &ErrorKind) {
        let next = (at + 1) % self.0.pools.len();
        if self.0.current.compare_exchange(at, next, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return;
        }
        if let (Some(left), Some(taken)) = (self.0.pools.get(at), self.0.pools.get(next)) {
            tracing::info!("{} is left for {}: {kind}", left.address, taken.address);
            // Who still waits for a server that does not answer waits in vain; others it may still serve.
            if matches!(kind, ErrorKind::Timeout(_) | ErrorKind::Unreachable(_)) {
                left.leave();
            }
        }
    }

    /// PUT `path` to the first address: what an agent is told concerns that agent, and no other will do.
    pub(crate) async fn put(&self, path: &str, body: Bytes, within: Duration) -> Result<Bytes, ConsulError> {
        let Some(pool) = self.0.pools.first() else {
            return Err(self.bad_body(path, &"no address is configured"));
        };
        let query = Query { wait: within.saturating_sub(MARGIN), ..Query::default() };
        let outcome = self.exchange(pool, "PUT", path, &query, Some(body), false).await;
        let kind = match outcome {
            Ok(reply) => match ErrorKind::of(reply.status, &reply.body) {
                None => return Ok(reply.body.bytes),
                Some(kind) => kind,
            },
            Err(kind) => kind,
        };
        self.0.counters.failures.fetch_add(1, Ordering::Relaxed);
        Err(ConsulError { method: "PUT", path: path.to_owned(), address: pool.address.clone(), kind })
    }

    /// One request and its answer, with the token as of now; once more if the token was refused and is another now.
    async fn exchange(
        &self,
        pool: &Pool,
        method: &'static str,
        path: &str,
        query: &Query,
        body: Option<Bytes>,
        may_leave: bool,
    ) -> Result<Reply, ErrorKind> {
        let credentials = &self.0.credentials;
        let token = credentials.token(false).await.map_err(ErrorKind::Credentials)?;
        let used = token.as_ref().map(|token| token.number);
        let reply = self.try_exchange(pool, method, path, query, body.clone(), token, may_leave).await;
        let reply = reply.map_err(|kind| self.explained(pool, kind))?;
        if reply.status != 403 {
            return Ok(reply);
        }
        match credentials.token(true).await.map_err(ErrorKind::Credentials)? {
            Some(token) if used != Some(token.number) => {
                self.try_exchange(pool, method, path, query, body, Some(token), may_leave).await
            }
            _ => Ok(reply),
        }
    }

    /// A server that wants a certificate says so after the handshake (TLS 1.3), and closes: often nobody hears it.
    fn explained(&self, pool: &Pool, kind: ErrorKind) -> ErrorKind {
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
        token: Option<Edition<HeaderValue>>,
        may_leave: bool,
    ) -> Result<Reply, ErrorKind> {
        let mut left = pool.left();
        // A full sixteenth is what the server may add, so that not all come back at once.
        let within = query.wait + query.wait / 16 + MARGIN;
        loop {
            let tls = match pool.address.is_tls() {
                true => Some(self.0.credentials.tls().await.map_err(ErrorKind::Credentials)?),
                false => None,
            };
            let mut lease = pool.lease(tls.as_ref(), self.0.credentials.server_name()).await?;
            // What another token may see, and what a server that was started again has, may be something else at the same
            // index: there is no waiting for its successor.
            let view = pool.view_of(token.as_ref().map_or(0, |token| token.number));
            let target = if query.view == 0 || query.view == view {
                self.target(path, query)
            } else {
                self.target(path, &Query { index: 0, ..query.clone() })
            };
            self.0.counters.requests.fetch_add(1, Ordering::Relaxed);
            let is_many = matches!(lease, Lease::Many(_));
            let request = request(method, &pool.address, &target, body.clone(), token.as_ref(), is_many)?;
            let sent = async {
                match &mut lease {
                    Lease::One { sender, .. } => sender.send_request(request).await,
                    Lease::Many(stream) => {
                        let mut sender = stream.sender();
                        sender.ready().await?;
                        sender.send_request(request).await
                    }
                }
            };
            let whole = async {
                let response = sent.await.map_err(Broken::BeforeTheAnswer)?;
                let (parts, body) = response.into_parts();
                Ok((parts, collected(body, &self.0.large_bodies).await.map_err(Broken::After)?))
            };
            let outcome = tokio::select! {
                outcome = timeout(within, whole) => outcome,
                Ok(()) = left.changed(), if may_leave => {
                    return Err(ErrorKind::Unreachable("it was left for another server".to_owned()));
                }
            };
            return match outcome {
                Ok(Ok((parts, body))) => {
                    pool.give_back(lease);
                    Ok(Reply { status: parts.status.as_u16(), headers: parts.headers, body, view })
                }
                // A connection that was kept may have been closed by the server just then.
                Ok(Err(Broken::BeforeTheAnswer(_)))
                    if matches!(lease, Lease::One { is_new: false, .. }) && method == "GET" =>
                {
                    pool.broke();
                    continue;
                }
                Ok(Err(Broken::BeforeTheAnswer(error))) => {
                    pool.broke();
                    Err(broken(error))
                }
                Ok(Err(Broken::After(kind))) => {
                    pool.broke();
                    Err(kind)
                }
                Err(_) => Err(ErrorKind::Timeout(within)),
            };
        }
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

/// The hash of an answer 404.
const NOTHING: u64 = 0;

enum Broken {
    BeforeTheAnswer(hyper::Error),
    After(ErrorKind),
}

fn request(
    method: &str,
    address: &Address,
    target: &str,
    body: Option<Bytes>,
    token: Option<&Edition<HeaderValue>>,
    is_many: bool,
) -> Result<Request<Full<Bytes>>, ErrorKind> {
    let authority = match address {
        Address::Unix(_) => "localhost".to_owned(),
        address => address.authority(),
    };
    let method = Method::from_bytes(method.as_bytes()).unwrap_or_default();
    let mut request = Request::builder().method(method);
    request = if is_many {
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

/// Reads a body to its end. One that turns out to be large waits for its turn before more of it is read.
async fn collected(mut body: Incoming, large_bodies: &Arc<Semaphore>) -> Result<Body, ErrorKind> {
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
    let says = |name: &str| text(name).is_some_and(|said| said.eq_ignore_ascii_case("true"));
    let meta = Meta {
        index: text("x-consul-index").and_then(|index| index.parse().ok()),
        known_leader: text("x-consul-knownleader").is_none_or(|said| !said.eq_ignore_ascii_case("false")),
        last_contact: Duration::from_millis(
            text("x-consul-lastcontact").and_then(|millis| millis.parse().ok()).unwrap_or_default(),
        ),
        filtered: says("x-consul-results-filtered-by-acls"),
        translated: says("x-consul-translate-addresses"),
        hash: xxh3_64(&reply.body).max(NOTHING + 1),
        view: reply.view,
    };
    Answer { value: reply.body, meta }
}

/// `text` as one segment of a path, or as a value of a query (RFC 3986, 2.1): all but the unreserved is escaped.
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
mod tests {
    use super::*;

    #[test]
    fn a_query_is_what_is_set_and_nothing_more() {
        let plain = Client::new(&Config::default());
        assert_eq!(plain.target("/v1/catalog/services", &Query::default()), "/v1/catalog/services");
        let config = Config {
            namespace: Some("team a".to_owned()),
            partition: Some("p".to_owned()),
            ..Config::default()
        };
        let query = Query {
            index: 7,
            wait: Duration::from_secs(3600),
            view: 0,
            consistency: Consistency::Stale,
            datacenter: Some("dc1".into()),
            flags: &["recurse"],
        };
        assert_eq!(
            Client::new(&config).target("/v1/kv/a", &query),
            "/v1/kv/a?stale&index=7&wait=600000ms&recurse&dc=dc1&ns=team%20a&partition=p"
        );
        assert_eq!(escaped("a b/ö?&-._~"), "a%20b%2F%C3%B6%3F%26-._~");
    }

    /// A server that announces an answer of `length` bytes to every request, and sends as many as are taken.
    async fn pouring(tasks: &mut JoinSet<()>, length: usize, sent: Arc<AtomicUsize>) -> Address {
        use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let mut stream = BufReader::new(listener.accept().await.unwrap().0);
                let sent = sent.clone();
                connections.spawn(async move {
                    let mut line = String::new();
                    while stream.read_line(&mut line).await.unwrap_or(0) > 2 {
                        line.clear();
                    }
                    let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
                    let chunk = [&b"10000\r\n"[..], &[b' '; 1 << 16], b"\r\n"].concat();
                    _ = stream.get_mut().write_all(head.as_bytes()).await;
                    for _ in 0..length >> 16 {
                        if stream.get_mut().write_all(&chunk).await.is_err() {
                            return;
                        }
                        sent.fetch_add(1 << 16, Ordering::Relaxed);
                    }
                    _ = stream.get_mut().write_all(b"0\r\n\r\n").await;
                });
            }
        });
        address
    }

    #[tokio::test]
    async fn an_answer_without_end_is_not_read_to_its_end() {
        let (mut tasks, sent) = (JoinSet::new(), Arc::new(AtomicUsize::new(0)));
        let address = pouring(&mut tasks, 1 << 30, sent.clone()).await;
        let client = Client::new(&Config::of([address]));
        let failed = client.get_bytes("/v1/health/service/a", &Query::default()).await.unwrap_err();
        assert_eq!(failed.kind, ErrorKind::BadBody(format!("it is larger than {MAX_BODY} bytes")));
        let sent = sent.load(Ordering::Relaxed);
        assert!(sent <= MAX_BODY + (16 << 20), "{sent} bytes were taken");
    }

    #[tokio::test]
    async fn only_a_few_large_answers_are_in_memory_at_once_and_all_come_in_time() {
        const LARGE: usize = 16 << 20;
        let (mut tasks, sent) = (JoinSet::new(), Arc::new(AtomicUsize::new(0)));
        let address = pouring(&mut tasks, LARGE, sent.clone()).await;
        let client = Client::new(&Config::of([address]));
        let mut asked = JoinSet::new();
        for _ in 0..24 {
            let client = client.clone();
            asked.spawn(async move { client.get_bytes("/v1/health/service/a", &Query::default()).await });
        }
        let mut kept = Vec::new();
        while kept.len() < LARGE_BODIES {
            kept.push(asked.join_next().await.unwrap().unwrap().unwrap());
        }
        // The others wait with the server for as long as these are kept: what sockets and buffers hold is little.
        let more = tokio::time::timeout(Duration::from_millis(300), asked.join_next()).await;
        assert!(more.is_err(), "a fifth large answer was read");
        let sent_now = sent.load(Ordering::Relaxed);
        assert!(sent_now < LARGE_BODIES * LARGE + 20 * (8 << 20), "{sent_now} bytes were taken");
        drop(kept);
        while let Some(answer) = asked.join_next().await {
            assert_eq!(answer.unwrap().unwrap().value.len(), LARGE);
        }
    }

    type Says = &'static [(&'static str, &'static str, &'static str)];
    const WELL: Says = &[
        ("/v1/status/leader", "200", "\"10.0.0.1:8300\""),
        ("dc=dc2", "500", "No path to datacenter"),
        ("", "200", "{}"),
    ];
    const ILL: Says = &[("/v1/status/leader", "200", "\"\""), ("", "500", "No cluster leader")];

    /// A server that answers every request by the first of `says` whose text is in its first line.
    async fn server(tasks: &mut JoinSet<()>, says: Says) -> Address {
        use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        tasks.spawn(async move {
            loop {
                let mut stream = BufReader::new(listener.accept().await.unwrap().0);
                let (mut first, mut line) = (String::new(), String::new());
                stream.read_line(&mut first).await.unwrap();
                while stream.read_line(&mut line).await.unwrap_or(0) > 2 {
                    line.clear();
                }
                let (_, status, body) = says.iter().find(|(asked, ..)| first.contains(asked)).unwrap();
                let answer = format!(
                    "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                );
                _ = stream.get_mut().write_all(answer.as_bytes()).await;
            }
        });
        address
    }

    #[tokio::test]
    async fn a_server_is_not_left_for_what_ails_another_datacenter() {
        let mut tasks = JoinSet::new();
        for (says, stays) in [(WELL, true), (ILL, false)] {
            let first = server(&mut tasks, says).await;
            let second = server(&mut tasks, WELL).await;
            let config = Config::of([first.clone(), second.clone()]);
            let client = Client::new(&config);
            let query = Query { datacenter: Some("dc2".into()), ..Query::default() };
            let failed = client.get_bytes("/v1/catalog/services", &query).await.unwrap_err();
            assert!(failed.to_string().starts_with("GET /v1/catalog/services at"), "{failed}");
            let asked = if stays { first } else { second };
            assert_eq!(client.address(), asked.to_string());
        }
    }
}
