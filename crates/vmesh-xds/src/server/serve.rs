use super::authority::AnyAuthority;
use super::connection::ConnectionUse;
use super::{AdsBody, AdsService, Counters, PeerInfo};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use vmesh_daemon::connections::{Gate, Limits, poll_once};

/// A source of connections.
pub trait Listener: Send {
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    fn accept(&mut self) -> impl Future<Output = io::Result<(Self::Io, PeerInfo)>> + Send;
}

impl Listener for TcpListener {
    type Io = TcpStream;

    async fn accept(&mut self) -> io::Result<(TcpStream, PeerInfo)> {
        let (io, address) = TcpListener::accept(self).await?;
        io.set_nodelay(true)?;
        Ok((io, PeerInfo { address: Some(address), ..PeerInfo::default() }))
    }
}

impl Listener for UnixListener {
    type Io = AnyAuthority<UnixStream>;

    async fn accept(&mut self) -> io::Result<(Self::Io, PeerInfo)> {
        let (io, _) = UnixListener::accept(self).await?;
        let uid = io.peer_cred().ok().map(|credentials| credentials.uid());
        Ok((AnyAuthority::new(io), PeerInfo { uid, ..PeerInfo::default() }))
    }
}

/// Limits for the number and the age of connections.
#[derive(Clone)]
pub struct ConnectionLimits {
    pub gate: Gate,
    /// The age at which a connection asks its client to reconnect, so that a fleet spreads over replicas that
    /// started later. Each connection's limit differs by up to a fifth, or connections that began together
    /// would end together.
    pub max_age: Option<Duration>,
}

/// The default limits fit into the 1,024 descriptors that most systems allow.
const LIMITS: Limits = Limits { total: 768, per_origin: 768, pending: 256 };
/// The deadline of the first request on a connection, including HTTP/2's preface.
const FIRST_REQUEST_WITHIN: Duration = Duration::from_secs(10);
/// How long a connection without streams is kept: gRPC clients may open another stream on it.
const UNUSED_FOR: Duration = Duration::from_secs(60);
/// The time between GOAWAY, which asks the client to open no more streams, and the end of the streams.
const STREAMS_END_AFTER: Duration = Duration::from_secs(1);
/// The grace period between the end of the streams and the close of the connection.
const CLOSED_AFTER: Duration = Duration::from_secs(10);

impl Default for ConnectionLimits {
    fn default() -> ConnectionLimits {
        ConnectionLimits { gate: Gate::new(LIMITS), max_age: None }
    }
}

/// The handshake of a connection, between the accept and the first request.
pub trait Handshake<I>: Clone + Send + Sync + 'static {
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Returns the connection and what the handshake tells about the peer. `None`: the connection is closed. The caller limits the time.
    fn complete(&self, io: I, peer: PeerInfo) -> impl Future<Output = Option<(Self::Io, PeerInfo)>> + Send;
}

/// Plaintext: there is no handshake.
#[derive(Debug, Clone, Copy)]
pub struct NoHandshake;

impl<I: AsyncRead + AsyncWrite + Unpin + Send + 'static> Handshake<I> for NoHandshake {
    type Io = I;

    async fn complete(&self, io: I, peer: PeerInfo) -> Option<(I, PeerInfo)> {
        Some((io, peer))
    }
}

/// Serves every connection of `listener` until `stop`, within default limits: see [`serve_connections`].
pub async fn serve(listener: impl Listener, service: AdsService, stop: impl Future<Output = ()> + Send) {
    serve_connections(listener, service, ConnectionLimits::default(), stop).await;
}

/// Serves every connection of `listener` until `stop`, without a handshake: see [`serve_after_handshake`].
pub async fn serve_connections(
    listener: impl Listener,
    service: AdsService,
    limits: ConnectionLimits,
    stop: impl Future<Output = ()> + Send,
) {
    serve_after_handshake(listener, NoHandshake, service, limits, stop).await;
}

/// Serves every connection of `listener` until `stop`. Then all streams end with UNAVAILABLE, and the future
/// completes when the connections are closed. Dropping it closes them at once.
pub async fn serve_after_handshake<L, H>(
    mut listener: L,
    handshake: H,
    service: AdsService,
    limits: ConnectionLimits,
    stop: impl Future<Output = ()> + Send,
) where
    L: Listener,
    H: Handshake<L::Io>,
{
    let (stopping, stopped) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut stop = pin!(stop);
    let mut accepted = 0u64;
    loop {
        let accept = async {
            limits.gate.room().await;
            listener.accept().await
        };
        let (io, peer) = tokio::select! {
            () = &mut stop => break,
            Some(_) = connections.join_next() => continue,
            accepted = accept => match accepted {
                Ok(accepted) => accepted,
                Err(_) => {
                    // The usual cause is a lack of file descriptors: waiting clients are served when some are
                    // closed.
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let counters = service.counters();
        match limits.gate.enter(peer.origin()) {
            Ok(permit) => {
                accepted += 1;
                let age = limits.max_age.map(|age| jittered(age, accepted));
                let ends_at = age.map(|age| Instant::now() + age + STREAMS_END_AFTER);
                let connection_use = ConnectionUse::new(Some(permit), ends_at);
                let mut stopped = stopped.clone();
                let stop = async move { _ = stopped.wait_for(|stopped| *stopped).await };
                let (handshake, service) = (handshake.clone(), service.clone());
                connections.spawn(async move {
                    if let Some((io, peer)) =
                        shake_hands(&handshake, io, peer, &service, &connection_use).await
                    {
                        drive_connection(io, peer, service, connection_use, stop).await;
                    }
                });
            }
            Err(_) => _ = counters.connections_refused.fetch_add(1, Relaxed),
        }
    }
    drop(listener);
    service.hub().stop();
    stopping.send_replace(true);
    while connections.join_next().await.is_some() {}
}

/// Completes the handshake of a connection, within [`FIRST_REQUEST_WITHIN`]. The gate may evict the connection meanwhile.
async fn shake_hands<I, H: Handshake<I>>(
    handshake: &H,
    io: I,
    peer: PeerInfo,
    service: &AdsService,
    connection_use: &ConnectionUse,
) -> Option<(H::Io, PeerInfo)> {
    let mut handshake = pin!(handshake.complete(io, peer));
    if let Poll::Ready(done) = poll_once(handshake.as_mut()).await {
        return done;
    }
    connection_use.set_silent();
    tokio::select! {
        done = timeout(FIRST_REQUEST_WITHIN, handshake) => if let Ok(done) = done { return done },
        () = connection_use.evicted() => {}
    }
    service.counters().connections_silent.fetch_add(1, Relaxed);
    None
}

/// Returns four to six fifths of `age`. Consecutive connection numbers give ages that are far apart.
fn jittered(age: Duration, number: u64) -> Duration {
    // Multiples of 2^32 divided by the golden ratio are spread evenly.
    let share = (number.wrapping_mul(0x9e37_79b9) & 0xffff_ffff) as f64 / f64::from(u32::MAX);
    age.mul_f64(0.8 + 0.4 * share)
}

/// Serves one connection that the caller has accepted, for callers with a handshake of their own. Completes
/// when the connection ends, whatever the reason.
pub async fn serve_connection<I>(
    io: I,
    peer: PeerInfo,
    service: AdsService,
    stop: impl Future<Output = ()> + Send,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    drive_connection(io, peer, service, ConnectionUse::new(None, None), stop).await;
}

async fn drive_connection<I>(
    io: I,
    peer: PeerInfo,
    service: AdsService,
    connection_use: Arc<ConnectionUse>,
    stop: impl Future<Output = ()> + Send,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let counters = service.counters().clone();
    let _count = ConnectionCount::new(counters.clone());
    let stream_use = connection_use.clone();
    let answer = service_fn(move |mut request: http::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(peer.clone());
        stream_use.show_request();
        request.extensions_mut().insert(stream_use.clone());
        let (service, peer) = (service.clone(), peer.clone());
        async move {
            Ok::<_, Infallible>(match service.other_requests(request.uri().path()) {
                Some(other) => other.answer(request, peer).await.map(AdsBody::whole),
                None => service.answer(request),
            })
        }
    });
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new())
        // HTTP/2 keepalive detects a path that drops packets within 40 s (R57).
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10))
        .max_concurrent_streams(16)
        // The receive windows bound the unread bytes of a client. Requests are small, and an untrusted client
        // costs at most this much.
        .initial_stream_window_size(64 << 10)
        .initial_connection_window_size(128 << 10)
        .max_header_list_size(16 << 10)
        .max_send_buf_size(64 << 10);
    let mut connection = pin!(http.serve_connection(TokioIo::new(io), answer));
    let aged = async {
        match connection_use.ends_at() {
            Some(ends_at) => sleep_until(ends_at - STREAMS_END_AFTER).await,
            None => std::future::pending().await,
        }
    };
    if poll_once(connection.as_mut()).await.is_ready() {
        return;
    }
    connection_use.set_silent();
    let drains_within = tokio::select! {
        _ = connection.as_mut() => Duration::ZERO,
        () = stop => Duration::MAX,
        () = connection_use.unused(FIRST_REQUEST_WITHIN, UNUSED_FOR) => {
            counters.connections_silent.fetch_add(1, Relaxed);
            Duration::ZERO
        }
        () = connection_use.evicted() => {
            counters.connections_silent.fetch_add(1, Relaxed);
            Duration::ZERO
        }
        () = aged => STREAMS_END_AFTER + CLOSED_AFTER,
    };
    if !drains_within.is_zero() {
        connection.as_mut().graceful_shutdown();
        _ = timeout(drains_within, connection).await;
    }
}

/// One connection in the counters, as long as it exists.
struct ConnectionCount(Arc<Counters>);

impl ConnectionCount {
    fn new(counters: Arc<Counters>) -> ConnectionCount {
        counters.connections.fetch_add(1, Relaxed);
        ConnectionCount(counters)
    }
}

impl Drop for ConnectionCount {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_that_began_together_do_not_end_together() {
        let age = Duration::from_secs(3600);
        let mut ages: Vec<_> = (0..1000).map(|number| jittered(age, number).as_secs()).collect();
        assert!(ages.iter().all(|age| (2880..=4320).contains(age)));
        ages.sort_unstable();
        let at_once = ages.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
        assert!(at_once <= 10, "{at_once} s without any");
    }
}
