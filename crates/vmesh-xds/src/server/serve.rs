use super::{AdsService, PeerInfo};
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::convert::Infallible;
use std::future::{Future, ready};
use std::io;
use std::pin::pin;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Where connections come from.
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
    type Io = UnixStream;

    async fn accept(&mut self) -> io::Result<(UnixStream, PeerInfo)> {
        let (io, _) = UnixListener::accept(self).await?;
        let uid = io.peer_cred().ok().map(|credentials| credentials.uid());
        Ok((io, PeerInfo { uid, ..PeerInfo::default() }))
    }
}

/// Serves every connection of `listener` until `stop`. Then the streams end with UNAVAILABLE, and this returns when
/// the connections are closed; whoever cannot wait for them drops it.
pub async fn serve(mut listener: impl Listener, service: AdsService, stop: impl Future<Output = ()> + Send) {
    let (stopping, stopped) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut stop = pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((io, peer)) => {
                    let mut stopped = stopped.clone();
                    let stop = async move { _ = stopped.wait_for(|stopped| *stopped).await };
                    connections.spawn(serve_connection(io, peer, service.clone(), stop));
                }
                // Out of file descriptors, most likely: those who wait are served when some are free.
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            },
        }
    }
    drop(listener);
    service.hub().stop();
    stopping.send_replace(true);
    while connections.join_next().await.is_some() {}
}

/// Serves one connection, for those who accept and shake hands themselves. It ends when the connection does: what was
/// wrong with it is of no concern to anyone else.
pub async fn serve_connection<I>(
    io: I,
    peer: PeerInfo,
    service: AdsService,
    stop: impl Future<Output = ()> + Send,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let answer = service_fn(move |mut request: http::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(peer.clone());
        ready(Ok::<_, Infallible>(service.answer(request)))
    });
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new())
        // A path that drops packets is noticed within 40 s (R57).
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10))
        .max_concurrent_streams(16)
        .max_header_list_size(16 << 10)
        .max_send_buf_size(64 << 10);
    let mut connection = pin!(http.serve_connection(TokioIo::new(io), answer));
    tokio::select! {
        _ = connection.as_mut() => return,
        () = stop => connection.as_mut().graceful_shutdown(),
    }
    _ = connection.await;
}
