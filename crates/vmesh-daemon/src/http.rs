//! An HTTP/1.1 server for a daemon's own API that no client can exhaust.
//!
//! Every phase of a connection has a time-out: request head, request body, idle time, response write, and total age. [`Gate`]
//! limits the number of connections; while a client is slow to send its request or to read its response, its connection can
//! be evicted for others. A streamed response body is polled only as fast as the client reads, so a slow client costs one
//! chunk of memory.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, Version};
use http_body::Body;
use http_body_util::{BodyExt, Either, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep, sleep, timeout};

use crate::Stop;
use crate::connections::{Gate, Limits, Origin, Permit, poll_once};

/// Several times the connections that an operator, a dashboard and a metrics scraper need together.
pub const LIMITS: Limits = Limits { total: 64, per_origin: 24, pending: 48 };
/// Limits on a loopback address, which all users of a host share.
pub const LOOPBACK_LIMITS: Limits = Limits { per_origin: LIMITS.total, ..LIMITS };

/// Time limit for the head of each request on a connection.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// Time limit for the body of a request.
const BODY_WITHIN: Duration = Duration::from_secs(10);
/// Maximum size of a request body. The longest request of the APIs has a few hundred bytes.
const BODY_MAX: usize = 64 << 10;
/// The server closes a connection whose client reads nothing of a response for this long.
const TAKES_WITHIN: Duration = Duration::from_secs(5);
/// Size of the kernel's send buffer per connection. By default it grows to megabytes for a client that reads nothing, and each byte would
/// be JSON that the server generated for nobody.
const SEND_BUFFER: usize = 128 << 10;
/// After this age a connection finishes its current response and closes.
const AGE_MAX: Duration = Duration::from_secs(60);
/// Limit for that last response.
const LAST_ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// A source of connections: a TCP or a Unix listener.
pub trait Listener: Send + 'static {
    type Io: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    fn accept(&mut self) -> impl Future<Output = io::Result<(Self::Io, Origin)>> + Send;

    /// Returns the host names that requests may name.
    fn hosts(&self) -> Hosts;

    /// The limits for a [`Gate`] before this listener.
    fn limits(&self) -> Limits {
        LIMITS
    }
}

impl Listener for TcpListener {
    type Io = tokio::net::TcpStream;

    async fn accept(&mut self) -> io::Result<(Self::Io, Origin)> {
        let (io, address) = TcpListener::accept(self).await?;
        // Responses are written in large pieces, so Nagle's algorithm would only delay them.
        _ = io.set_nodelay(true);
        _ = sockopt::set_socket_send_buffer_size(&io, SEND_BUFFER);
        Ok((io, Origin::of_address(address.ip())))
    }

    fn hosts(&self) -> Hosts {
        let is_loopback = self.local_addr().is_ok_and(|address| address.ip().is_loopback());
        if is_loopback { Hosts::Loopback } else { Hosts::Any }
    }

    fn limits(&self) -> Limits {
        match self.hosts() {
            Hosts::Loopback => LOOPBACK_LIMITS,
            Hosts::Any => LIMITS,
        }
    }
}

impl Listener for UnixListener {
    type Io = tokio::net::UnixStream;

    async fn accept(&mut self) -> io::Result<(Self::Io, Origin)> {
        let (io, _) = UnixListener::accept(self).await?;
        _ = sockopt::set_socket_send_buffer_size(&io, SEND_BUFFER);
        let user = io.peer_cred().map_or(Origin::Unknown, |peer| Origin::User(peer.uid()));
        Ok((io, user))
    }

    fn hosts(&self) -> Hosts {
        Hosts::Any
    }
}

/// The permitted values of `Host` in a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hosts {
    /// `localhost` and loopback addresses. This defeats DNS rebinding: a web page whose name was made to resolve to loopback could
    /// otherwise read the API, but its browser sends the page's own name.
    Loopback,
    Any,
}

impl Hosts {
    /// Checks the host that `request` names. The error is the status and the text of the answer.
    fn check<B>(self, request: &Request<B>) -> Result<(), (StatusCode, String)> {
        let named = named_hosts(request.uri(), request.headers()).ok_or((
            StatusCode::BAD_REQUEST,
            "the request has more than one `Host`, or none that is a host".to_owned(),
        ))?;
        // HTTP/1.0 has no `Host`, and no browser uses it.
        if named.is_empty() && request.version() >= Version::HTTP_11 {
            return Err((StatusCode::BAD_REQUEST, "a request of HTTP/1.1 needs a `Host`".to_owned()));
        }
        let foreign = named.iter().find(|host| self == Hosts::Loopback && !is_loopback(host.host()));
        foreign.map_or(Ok(()), |host| {
            let why = format!(
                "`{host}` is not served here: ask for `localhost` or a loopback address, as this listener is on one"
            );
            Err((StatusCode::FORBIDDEN, why))
        })
    }
}

/// Returns the hosts named by the request target and by `Host`. Returns `None` if a host name cannot be parsed.
fn named_hosts(uri: &Uri, headers: &HeaderMap) -> Option<Vec<Authority>> {
    let mut named: Vec<Authority> = uri.authority().cloned().into_iter().collect();
    let mut hosts = headers.get_all(HOST).iter();
    if let Some(host) = hosts.next() {
        named.push(Authority::try_from(host.as_bytes()).ok().filter(|host| !host.as_str().contains('@'))?);
    }
    hosts.next().is_none().then_some(named)
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host.trim_end_matches('.').eq_ignore_ascii_case("localhost")
        || bare.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

/// Calls `answer` for the requests on every connection of `listener` until `stop`, then completes the requests in progress. `answer` gets
/// each request with its complete body, and with the [`Origin`] of its connection among its extensions.
pub async fn serve<L, A, F, B>(mut listener: L, gate: Gate, answer: A, mut stop: Stop) -> io::Result<()>
where
    L: Listener,
    A: Fn(Request<Full<Bytes>>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let hosts = listener.hosts();
    let (stopping, stopped) = watch::channel(false);
    let mut connections = JoinSet::new();
    let accept = async |listener: &mut L| {
        gate.room().await;
        listener.accept().await
    };
    loop {
        tokio::select! {
            () = stop.requested() => break,
            Some(_) = connections.join_next() => {}
            accepted = accept(&mut listener) => match accepted {
                Ok((io, origin)) => match gate.enter(origin) {
                    Ok(permit) => {
                        let connection = Connection { origin, permit, hosts };
                        connections.spawn(serve_connection(io, connection, answer.clone(), stopped.clone()));
                    }
                    Err(refused) => tracing::debug!("a connection to the API was closed: {refused}"),
                },
                // Most likely no file descriptors are left. Waiting clients are served once some are free.
                Err(_) => sleep(Duration::from_millis(100)).await,
            },
        }
    }
    drop(listener);
    stopping.send_replace(true);
    while connections.join_next().await.is_some() {}
    Ok(())
}

/// An accepted connection.
struct Connection {
    origin: Origin,
    permit: Permit,
    hosts: Hosts,
}

async fn serve_connection<I, A, F, B>(
    io: I,
    connection: Connection,
    answer: A,
    mut stopped: watch::Receiver<bool>,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    A: Fn(Request<Full<Bytes>>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let Connection { origin, permit, hosts } = connection;
    let permit = Arc::new(permit);
    let of_requests = permit.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let (answer, permit) = (answer.clone(), of_requests.clone());
        async move {
            Ok::<_, Infallible>(match read(hosts, request).await {
                Ok(mut request) => {
                    request.extensions_mut().insert(origin);
                    let _busy = BusyGuard::new(&permit);
                    answer(request).await.map(Either::Left)
                }
                Err((status, why)) => failure(status, &why).map(Either::Right),
            })
        }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN).max_buf_size(64 << 10).half_close(false);
    let mut connection = pin!(http.serve_connection(TokioIo::new(WriteTimeout::new(io)), service));
    if poll_once(connection.as_mut()).await.is_ready() {
        return;
    }
    permit.set_silent();
    tokio::select! {
        _ = connection.as_mut() => return,
        () = permit.evicted() => return,
        _ = stopped.wait_for(|stopped| *stopped) => {}
        () = sleep(AGE_MAX) => {}
    }
    connection.as_mut().graceful_shutdown();
    _ = timeout(LAST_ANSWER_WITHIN, connection).await;
}

/// Reads a complete request. The error is the response to an invalid one.
async fn read(
    hosts: Hosts,
    request: Request<Incoming>,
) -> Result<Request<Full<Bytes>>, (StatusCode, String)> {
    hosts.check(&request)?;
    let (parts, body) = request.into_parts();
    match timeout(BODY_WITHIN, Limited::new(body, BODY_MAX).collect()).await {
        Ok(Ok(body)) => Ok(Request::from_parts(parts, Full::new(body.to_bytes()))),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            Err((StatusCode::PAYLOAD_TOO_LARGE, format!("the body is larger than {BODY_MAX} bytes")))
        }
        Ok(Err(error)) => Err((StatusCode::BAD_REQUEST, format!("the body could not be read: {error}"))),
        Err(_) => {
            let why = format!("the body did not come within {} s", BODY_WITHIN.as_secs());
            Err((StatusCode::REQUEST_TIMEOUT, why))
        }
    }
}

/// Builds an error response: `{"error": "..."}`, as everywhere in the APIs.
fn failure(status: StatusCode, why: &str) -> Response<Full<Bytes>> {
    let mut quoted = String::with_capacity(why.len());
    for c in why.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    let mut response = Response::new(Full::new(Bytes::from(format!("{{\"error\":\"{quoted}\"}}"))));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    // The rest of the request is not read.
    response.headers_mut().insert(http::header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// Marks a connection as busy while its answer is computed.
struct BusyGuard<'a>(&'a Permit);

impl BusyGuard<'_> {
    fn new(permit: &Permit) -> BusyGuard<'_> {
        permit.set_busy();
        BusyGuard(permit)
    }
}

impl Drop for BusyGuard<'_> {
    fn drop(&mut self) {
        self.0.set_idle();
    }
}

/// A connection whose writes fail if the client reads nothing for [`TAKES_WITHIN`].
struct WriteTimeout<I> {
    io: I,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<I> WriteTimeout<I> {
    fn new(io: I) -> WriteTimeout<I> {
        WriteTimeout { io, stalled: None }
    }

    fn bounded<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stalled = self
            .stalled
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + TAKES_WITHIN)));
        match stalled.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for WriteTimeout<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for WriteTimeout<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(cx, bytes);
        self.bounded(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        self.bounded(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.io).poll_flush(cx);
        self.bounded(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.io).poll_shutdown(cx);
        self.bounded(cx, shut)
    }
}

#[cfg(test)]
mod tests {
    use http_body::Frame;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;
    use crate::Tasks;

    /// Starts a server that answers with the requested path, and with an endless body for `/endless`.
    async fn server(limits: Limits) -> (std::net::SocketAddr, Gate, Tasks) {
        let listener = crate::listen::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let gate = Gate::new(limits);
        let mut tasks = Tasks::new();
        let of_server = gate.clone();
        tasks.spawn_draining("http", move |stop| {
            let answer = async |request: Request<Full<Bytes>>| match request.uri().path() {
                "/endless" => Response::new(Either::Left(Endless)),
                path => Response::new(Either::Right(Full::new(Bytes::from(format!("{path}\n"))))),
            };
            serve(listener, of_server, move |request| Box::pin(answer(request)), stop)
        });
        (address, gate, tasks)
    }

    struct Endless;

    impl Body for Endless {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[b'x'; 4096])))))
        }
    }

    async fn ask(address: std::net::SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        timeout(Duration::from_secs(20), read).await.unwrap().unwrap();
        answer
    }

    #[tokio::test]
    async fn only_loopback_is_asked_for_on_loopback() {
        let (address, _gate, _tasks) = server(LIMITS).await;
        for (request, status) in [
            ("GET /a HTTP/1.1\r\nHost: localhost:15014\r\n", "200"),
            ("GET /a HTTP/1.1\r\nHost: LOCALHOST.\r\n", "200"),
            ("GET /a HTTP/1.1\r\nHost: 127.0.0.1:1\r\n", "200"),
            ("GET /a HTTP/1.1\r\nHost: 127.9.9.9\r\n", "200"),
            ("GET /a HTTP/1.1\r\nHost: [::1]:15014\r\n", "200"),
            ("GET http://127.0.0.1/a HTTP/1.1\r\nHost: 127.0.0.1\r\n", "200"),
            ("GET /a HTTP/1.0\r\n", "200"),
            ("GET /a HTTP/1.1\r\n", "400"),
            ("GET /a HTTP/1.1\r\nHost: \r\n", "400"),
            ("GET /a HTTP/1.1\r\nHost: a b\r\n", "400"),
            ("GET /a HTTP/1.1\r\nHost: x@127.0.0.1\r\n", "400"),
            ("GET /a HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n", "400"),
            ("GET /a HTTP/1.1\r\nHost: evil.example\r\n", "403"),
            ("GET /a HTTP/1.1\r\nHost: 127.0.0.1.evil.example:15014\r\n", "403"),
            ("GET /a HTTP/1.1\r\nHost: localhost.evil.example\r\n", "403"),
            ("GET /a HTTP/1.1\r\nHost: 10.0.0.1\r\n", "403"),
            ("GET /a HTTP/1.0\r\nHost: evil.example\r\n", "403"),
            ("GET http://evil.example/a HTTP/1.1\r\nHost: 127.0.0.1\r\n", "403"),
        ] {
            let answer = ask(address, &format!("{request}Connection: close\r\n\r\n")).await;
            assert_eq!(answer.split(' ').nth(1), Some(status), "{request}: {answer}");
        }
    }

    #[tokio::test]
    async fn a_body_that_is_too_large_is_refused() {
        let (address, _gate, _tasks) = server(LIMITS).await;
        let head = format!("POST /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", BODY_MAX + 1);
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        _ = stream.write_all(&vec![b'x'; BODY_MAX + 1]).await;
        let mut answer = vec![0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&answer), "HTTP/1.1 413");
    }

    #[tokio::test]
    async fn connections_that_send_nothing_keep_nobody_out() {
        let (address, gate, _tasks) = server(Limits { total: 8, per_origin: 8, pending: 6 }).await;
        let mut silent = Vec::new();
        for _ in 0..100 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let answer = ask(address, "GET /a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await;
        assert!(answer.ends_with("/a\n"), "{answer}");
        assert!(gate.counts().connections <= 8, "{:?}", gate.counts());
    }

    /// Each connection makes some progress, so that no time-out closes it.
    #[tokio::test]
    async fn clients_that_are_slow_keep_nobody_out() {
        let (address, gate, _tasks) = server(Limits { total: 8, per_origin: 8, pending: 6 }).await;
        let requests = [
            "GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "POST /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\n",
        ];
        let mut slow = JoinSet::new();
        for request in requests.into_iter().cycle().take(100) {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            slow.spawn(async move {
                let mut some = [0; 16 << 10];
                let (mut read, mut write) = stream.split();
                while write.write_all(b"x").await.is_ok() {
                    _ = timeout(Duration::from_millis(100), read.read(&mut some)).await;
                    sleep(Duration::from_millis(100)).await;
                }
            });
        }
        let answer = ask(address, "GET /a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await;
        assert!(answer.ends_with("/a\n"), "{answer}");
        assert!(gate.counts().connections <= 8, "{:?}", gate.counts());
    }

    #[tokio::test]
    async fn an_answer_that_nobody_takes_is_given_up() {
        let (address, gate, _tasks) = server(LIMITS).await;
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).await.unwrap();
        let given_up = async {
            while gate.counts().connections > 0 {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(TAKES_WITHIN * 3, given_up).await.unwrap();
    }

    #[tokio::test]
    async fn a_head_and_a_body_that_trickle_are_given_up() {
        let (address, _gate, _tasks) = server(LIMITS).await;
        let trickle = async |request: &'static str, answer: &'static str| {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            let (mut read, mut write) = stream.split();
            let mut message = String::new();
            let drip = async {
                while write.write_all(b"x").await.is_ok() {
                    sleep(Duration::from_millis(200)).await;
                }
            };
            tokio::select! {
                _ = timeout(HEAD_WITHIN * 3, read.read_to_string(&mut message)) => {}
                () = drip => {}
            }
            assert!(message.starts_with(answer), "{request}: {message}");
        };
        let head = "GET /a HTTP/1.1\r\nHost: localhost\r\nX-Long: ";
        let body = "POST /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\n";
        tokio::join!(trickle(head, ""), trickle(body, "HTTP/1.1 408"));
    }
}
