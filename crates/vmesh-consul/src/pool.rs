//! The connections to one address.
//!
//! A plaintext connection carries one request at a time, and a blocking query occupies it for minutes; with TLS
//! one connection carries many requests (HTTP/2). The pool limits the connections in both cases.

use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;

use crate::config::Address;
use crate::counters::Counters;
use crate::credentials::Revision;
use crate::error::ErrorKind;

/// The timeout of connecting, including the TLS handshake.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// The limit of streams per HTTP/2 connection. Go's servers, such as Consul, accept 250; requests beyond that
/// would wait unnoticed.
pub(crate) const MAX_STREAMS: usize = 200;
/// How long a connection may be idle before it is not reused: a firewall may have dropped its state.
const MAX_IDLE: Duration = Duration::from_secs(50);
/// The keepalive interval. A vanished peer is detected after three missed answers, long before a blocking query
/// ends.
const KEEPALIVE: Duration = Duration::from_secs(15);

const UNKNOWN: u8 = 0;
const HTTP1: u8 = 1;
const HTTP2: u8 = 2;

/// The tasks that drive connections. The client owns them.
pub(crate) type Drivers = Arc<Mutex<JoinSet<()>>>;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) struct Pool {
    pub(crate) address: Address,
    max: usize,
    /// One permit per HTTP/1.1 connection in use.
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<IdleConnection>>,
    shared: Mutex<Vec<Arc<Http2Connection>>>,
    protocol: AtomicU8,
    /// Locked while an HTTP/2 connection is being made, since all waiting requests will share it. Holds the
    /// time and the reason of the last failure, so that requests that waited during that attempt need not
    /// repeat it.
    connecting: tokio::sync::Mutex<Option<(Instant, ErrorKind)>>,
    /// Changes when the client abandons this address; waiting requests then end.
    abandoned: watch::Sender<u64>,
    /// The position of the address in the client's configuration, starting at 1.
    number: u64,
    /// How often the server ended or lost a connection: it may have been restarted since.
    lost_connections: AtomicU64,
    counters: Arc<Counters>,
    drivers: Drivers,
}

/// An HTTP/1.1 connection that no request uses.
struct IdleConnection {
    sender: http1::SendRequest<Full<Bytes>>,
    tls: u64,
    since: Instant,
}

/// An HTTP/2 connection.
pub(crate) struct Http2Connection {
    sender: http2::SendRequest<Full<Bytes>>,
    tls: u64,
    streams: AtomicUsize,
}

/// The right to send one request.
pub(crate) enum Lease {
    Http1 { sender: http1::SendRequest<Full<Bytes>>, tls: u64, is_new: bool, permit: OwnedSemaphorePermit },
    Http2(Http2Stream),
}

/// One stream of an HTTP/2 connection.
pub(crate) struct Http2Stream(Arc<Http2Connection>);

impl Http2Stream {
    fn of(shared: &Arc<Http2Connection>) -> Http2Stream {
        shared.streams.fetch_add(1, Ordering::Relaxed);
        Http2Stream(shared.clone())
    }

    pub(crate) fn sender(&self) -> http2::SendRequest<Full<Bytes>> {
        self.0.sender.clone()
    }
}

impl Drop for Http2Stream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

enum NewConnection {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl Pool {
    pub(crate) fn new(
        address: Address,
        number: u64,
        max: usize,
        counters: Arc<Counters>,
        drivers: Drivers,
    ) -> Pool {
        let protocol = if address.is_tls() { UNKNOWN } else { HTTP1 };
        Pool {
            address,
            max,
            permits: Arc::new(Semaphore::new(max)),
            idle: Mutex::new(Vec::new()),
            shared: Mutex::new(Vec::new()),
            protocol: AtomicU8::new(protocol),
            connecting: tokio::sync::Mutex::new(None),
            abandoned: watch::Sender::new(0),
            number,
            lost_connections: AtomicU64::new(0),
            counters,
            drivers,
        }
    }

    /// Notes that a connection was lost.
    pub(crate) fn count_lost_connection(&self) {
        self.lost_connections.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns a number that identifies this server, as long as it is certain to be the same, together with a
    /// token: see [`Meta::origin`](crate::Meta::origin).
    pub(crate) fn origin(&self, token: u64) -> u64 {
        (token << 40)
            | (self.number << 32)
            | (self.lost_connections.load(Ordering::Relaxed) & u64::from(u32::MAX))
    }

    /// Returns how many requests may be in flight at once.
    pub(crate) fn capacity(&self) -> usize {
        match self.protocol.load(Ordering::Relaxed) {
            HTTP1 => self.max,
            _ => self.max.saturating_mul(MAX_STREAMS),
        }
    }

    /// Returns a receiver that changes when the client abandons this address.
    pub(crate) fn abandoned(&self) -> watch::Receiver<u64> {
        self.abandoned.subscribe()
    }

    /// Ends all requests to this address and closes its connections.
    pub(crate) fn abandon(&self) {
        locked(&self.idle).clear();
        locked(&self.shared).clear();
        self.abandoned.send_modify(|times| *times += 1);
    }

    /// Waits for the right to send a request, and connects if needed.
    pub(crate) async fn lease(
        &self,
        tls: Option<&Revision<Arc<ClientConfig>>>,
        server_name: Option<&str>,
    ) -> Result<Lease, ErrorKind> {
        if self.protocol.load(Ordering::Relaxed) == HTTP1 {
            return self.lease_http1(tls, server_name).await;
        }
        let revision = tls.map_or(0, |tls| tls.number);
        if let Some(stream) = self.stream(revision) {
            return Ok(Lease::Http2(stream));
        }
        let asked = Instant::now();
        let mut last_failure = self.connecting.lock().await;
        if let Some(stream) = self.stream(revision) {
            return Ok(Lease::Http2(stream));
        }
        if self.protocol.load(Ordering::Relaxed) == HTTP1 {
            drop(last_failure);
            return self.lease_http1(tls, server_name).await;
        }
        if let Some((at, failure)) = &*last_failure
            && *at >= asked
        {
            return Err(failure.clone());
        }
        match self.connect(tls, server_name).await {
            Ok(NewConnection::Http2(sender)) => {
                self.protocol.store(HTTP2, Ordering::Relaxed);
                let shared =
                    Arc::new(Http2Connection { sender, tls: revision, streams: AtomicUsize::new(0) });
                let stream = Http2Stream::of(&shared);
                locked(&self.shared).push(shared);
                Ok(Lease::Http2(stream))
            }
            Ok(NewConnection::Http1(sender)) => {
                self.protocol.store(HTTP1, Ordering::Relaxed);
                drop(last_failure);
                let permit = self.permit().await?;
                Ok(Lease::Http1 { sender, tls: revision, is_new: true, permit })
            }
            Err(failure) => {
                *last_failure = Some((Instant::now(), failure.clone()));
                Err(failure)
            }
        }
    }

    /// Returns a stream of an HTTP/2 connection with room for it. At the limit of connections, returns a stream
    /// of the least used connection.
    fn stream(&self, revision: u64) -> Option<Http2Stream> {
        let mut all = locked(&self.shared);
        if all.iter().any(|shared| shared.sender.is_closed()) {
            self.count_lost_connection();
        }
        all.retain(|shared| !shared.sender.is_closed() && shared.tls == revision);
        let streams = |shared: &&Arc<Http2Connection>| shared.streams.load(Ordering::Relaxed);
        let least = all.iter().min_by_key(streams)?;
        // Filling one connection before the next keeps their number small.
        let open = all.iter().filter(|shared| streams(shared) < MAX_STREAMS).max_by_key(streams);
        match open {
            Some(shared) => Some(Http2Stream::of(shared)),
            None if all.len() >= self.max => Some(Http2Stream::of(least)),
            None => None,
        }
    }

    async fn permit(&self) -> Result<OwnedSemaphorePermit, ErrorKind> {
        let closed = |_| ErrorKind::Unreachable("the client is closed".to_owned());
        self.permits.clone().acquire_owned().await.map_err(closed)
    }

    async fn lease_http1(
        &self,
        tls: Option<&Revision<Arc<ClientConfig>>>,
        server_name: Option<&str>,
    ) -> Result<Lease, ErrorKind> {
        let revision = tls.map_or(0, |tls| tls.number);
        let permit = self.permit().await?;
        while let Some(mut sender) = self.idle(revision) {
            if sender.ready().await.is_ok() {
                return Ok(Lease::Http1 { sender, tls: revision, is_new: false, permit });
            }
            self.count_lost_connection();
        }
        match self.connect(tls, server_name).await? {
            NewConnection::Http1(sender) => Ok(Lease::Http1 { sender, tls: revision, is_new: true, permit }),
            // The server has been reconfigured to HTTP/2, which is used from now on.
            NewConnection::Http2(sender) => {
                self.protocol.store(HTTP2, Ordering::Relaxed);
                let shared =
                    Arc::new(Http2Connection { sender, tls: revision, streams: AtomicUsize::new(0) });
                let stream = Http2Stream::of(&shared);
                locked(&self.shared).push(shared);
                Ok(Lease::Http2(stream))
            }
        }
    }

    /// Returns the idle connection that was used last, so that surplus connections reach their idle limit.
    fn idle(&self, revision: u64) -> Option<http1::SendRequest<Full<Bytes>>> {
        let mut all = locked(&self.idle);
        let now = Instant::now();
        if all.iter().any(|idle| idle.sender.is_closed()) {
            self.count_lost_connection();
        }
        all.retain(|idle| !idle.sender.is_closed() && idle.tls == revision && now < idle.since + MAX_IDLE);
        all.pop().map(|idle| idle.sender)
    }

    /// Returns a connection to the pool after its answer was read to the end.
    pub(crate) fn give_back(&self, lease: Lease) {
        if let Lease::Http1 { sender, tls, permit, .. } = lease {
            if !sender.is_closed() {
                locked(&self.idle).push(IdleConnection { sender, tls, since: Instant::now() });
            }
            drop(permit);
        }
    }

    async fn connect(
        &self,
        tls: Option<&Revision<Arc<ClientConfig>>>,
        server_name: Option<&str>,
    ) -> Result<NewConnection, ErrorKind> {
        match timeout(CONNECT_WITHIN, self.connect_unbounded(tls, server_name)).await {
            Ok(connected) => connected,
            Err(_) => Err(ErrorKind::Unreachable(format!(
                "no connection within {} s: is there a firewall on the way?",
                CONNECT_WITHIN.as_secs()
            ))),
        }
    }

    async fn connect_unbounded(
        &self,
        tls: Option<&Revision<Arc<ClientConfig>>>,
        server_name: Option<&str>,
    ) -> Result<NewConnection, ErrorKind> {
        let failed = |error: io::Error| ErrorKind::Unreachable(error.to_string());
        match &self.address {
            Address::Unix(path) => {
                let stream = UnixStream::connect(path).await.map_err(failed)?;
                self.handshake_http1(stream).await
            }
            Address::Http { host, port } => {
                self.handshake_http1(dial(host, *port).await.map_err(failed)?).await
            }
            Address::Https { host, port } => {
                let Some(tls) = tls else {
                    return Err(ErrorKind::Credentials("TLS is not set up".to_owned()));
                };
                let name = server_name.unwrap_or(host);
                let name = ServerName::try_from(name.to_owned()).map_err(|_| {
                    ErrorKind::Credentials(format!("`{name}` is not a name that a certificate can have"))
                })?;
                let stream = dial(host, *port).await.map_err(failed)?;
                let connector = TlsConnector::from(tls.value.clone());
                let stream = connector.connect(name.clone(), stream).await.map_err(|error| {
                    ErrorKind::Unreachable(format!(
                        "the TLS handshake with `{}` failed: {error}",
                        name.to_str()
                    ))
                })?;
                if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
                    self.handshake_http2(stream).await
                } else {
                    self.handshake_http1(stream).await
                }
            }
        }
    }

    async fn handshake_http1(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> Result<NewConnection, ErrorKind> {
        let io = TokioIo::new(stream);
        let (sender, connection) = http1::handshake(io).await.map_err(unreachable)?;
        self.drive(async move { drop(connection.await) });
        Ok(NewConnection::Http1(sender))
    }

    async fn handshake_http2(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> Result<NewConnection, ErrorKind> {
        let io = TokioIo::new(stream);
        let (sender, connection) = http2::Builder::new(Executor(Arc::downgrade(&self.drivers)))
            .timer(TokioTimer::new())
            .keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            // Large windows keep hundreds of concurrent answers from blocking each other.
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(16 << 20)
            .handshake(io)
            .await
            .map_err(unreachable)?;
        self.drive(async move { drop(connection.await) });
        Ok(NewConnection::Http2(sender))
    }

    /// Spawns the task that drives a connection until it ends.
    fn drive(&self, connection: impl Future<Output = ()> + Send + 'static) {
        let open = OpenConnection::new(&self.counters);
        let mut drivers = locked(&self.drivers);
        while drivers.try_join_next().is_some() {}
        drivers.spawn(async move {
            connection.await;
            drop(open);
        });
    }
}

pub(crate) fn unreachable(error: hyper::Error) -> ErrorKind {
    use std::error::Error;
    let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
    ErrorKind::Unreachable(format!("{error}{cause}"))
}

/// A connection in the counters, as long as the value exists.
struct OpenConnection(Arc<Counters>);

impl OpenConnection {
    fn new(counters: &Arc<Counters>) -> OpenConnection {
        counters.connects.fetch_add(1, Ordering::Relaxed);
        counters.connections.fetch_add(1, Ordering::Relaxed);
        OpenConnection(counters.clone())
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Spawns the additional tasks of an HTTP/2 connection among the client's own.
#[derive(Clone)]
struct Executor(Weak<Mutex<JoinSet<()>>>);

impl<F> hyper::rt::Executor<F> for Executor
where
    F: Future + Send + 'static,
    F::Output: Send,
{
    fn execute(&self, future: F) {
        if let Some(drivers) = self.0.upgrade() {
            locked(&drivers).spawn(async move { drop(future.await) });
        }
    }
}

async fn dial(host: &str, port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, KEEPALIVE)?;
    sockopt::set_tcp_keepintvl(&stream, KEEPALIVE / 3)?;
    sockopt::set_tcp_keepcnt(&stream, 3)?;
    // Sent data that is not acknowledged for this long breaks the connection. Without this the kernel would
    // retry for a quarter of an hour.
    let within = u32::try_from((KEEPALIVE * 2).as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(&stream, within)?;
    Ok(stream)
}
