//! The sockets. One task, its caller's; what it may use is bounded by [`Limits`], whoever asks.
//!
//! What is served is whatever the table is: where it comes from, and how old it is, are not known here.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::answer::{Transport, answer};
use crate::table::Table;

/// Bytes of a query at most: the longest name, and room for options of EDNS that are not used here.
pub const MAX_QUERY: usize = 1232;
/// After an error of a socket that may be there again at once, such as no memory or no file descriptors left.
const PAUSE: Duration = Duration::from_millis(100);

/// What clients may use over TCP. UDP needs one buffer, and nothing is kept.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at a time; more wait with the kernel until one ends.
    pub connections: usize,
    /// For the whole of one query to come, and for its response to be taken. Then the connection is closed (RFC 7766 section
    /// 6.2.3), however slowly bytes trickle.
    pub idle: Duration,
    /// Queries on one connection, after which it is closed: those who wait have their turn.
    pub queries: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { connections: 64, idle: Duration::from_secs(5), queries: 1000 }
    }
}

/// What became of queries, since the start.
#[derive(Debug, Default)]
pub struct Counts {
    pub udp: AtomicU64,
    pub tcp: AtomicU64,
    /// Of both, those without a response: see [`mod@crate::answer`].
    pub dropped: AtomicU64,
    /// Connections that were closed for the time they took or the size of a query.
    pub cut: AtomicU64,
    /// Errors of the sockets themselves.
    pub errors: AtomicU64,
}

/// Answers on `udp` and `tcp` from whatever `tables` has when a query comes, until `stop` is ready. Then connections are closed
/// where they are: resolvers ask again elsewhere.
///
/// The sockets should be bound to one address: a response from a wildcard socket may leave from another than was asked.
pub async fn serve(
    udp: UdpSocket,
    tcp: TcpListener,
    tables: watch::Receiver<Arc<Table>>,
    limits: Limits,
    counts: Arc<Counts>,
    stop: impl Future<Output = ()>,
) {
    tokio::select! {
        () = stop => {}
        () = serve_udp(&udp, &tables, &counts) => {}
        () = serve_tcp(&tcp, &tables, limits, &counts) => {}
    }
}

fn add(to: &AtomicU64) {
    to.fetch_add(1, Ordering::Relaxed);
}

async fn serve_udp(socket: &UdpSocket, tables: &watch::Receiver<Arc<Table>>, counts: &Counts) {
    // One byte more than a query may have, to see that it has more.
    let mut buffer = [0; MAX_QUERY + 1];
    loop {
        match socket.recv_from(&mut buffer).await {
            Ok((len, from)) => {
                add(&counts.udp);
                let response = buffer.get(..len).and_then(|query| respond(tables, query, Transport::Udp));
                match response {
                    Some(response) => send(socket, &response, from, counts).await,
                    None => add(&counts.dropped),
                }
            }
            Err(error) => pause(counts, "receive a query over UDP", &error).await,
        }
    }
}

async fn send(socket: &UdpSocket, response: &[u8], to: SocketAddr, counts: &Counts) {
    if let Err(error) = socket.send_to(response, to).await {
        add(&counts.errors);
        tracing::debug!(%to, %error, "could not send a DNS response");
    }
}

fn respond(tables: &watch::Receiver<Arc<Table>>, query: &[u8], transport: Transport) -> Option<Vec<u8>> {
    if query.len() > MAX_QUERY {
        return None;
    }
    // Not held while answering: whoever publishes a table does not wait for us.
    let table = tables.borrow().clone();
    answer(&table, query, transport)
}

async fn serve_tcp(
    listener: &TcpListener,
    tables: &watch::Receiver<Arc<Table>>,
    limits: Limits,
    counts: &Arc<Counts>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < limits.connections => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(converse(stream, tables.clone(), limits, counts.clone()));
                }
                Err(error) => pause(counts, "accept a connection", &error).await,
            },
        }
    }
}

/// The queries of one connection, in their order.
async fn converse(
    mut stream: TcpStream,
    tables: watch::Receiver<Arc<Table>>,
    limits: Limits,
    counts: Arc<Counts>,
) {
    _ = stream.set_nodelay(true);
    for _ in 0..limits.queries {
        let query = match timeout(limits.idle, receive(&mut stream)).await {
            Ok(Ok(Some(query))) => query,
            // Its end, or an error that is only about it.
            Ok(Ok(None)) => return,
            Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => return add(&counts.cut),
            Ok(Err(_)) => return,
            Err(_) => return add(&counts.cut),
        };
        add(&counts.tcp);
        let Some(response) = respond(&tables, &query, Transport::Tcp) else {
            return add(&counts.dropped);
        };
        let Ok(len) = u16::try_from(response.len()) else { return add(&counts.errors) };
        // In one segment with its length: RFC 7766 section 8.
        let framed = [len.to_be_bytes().as_slice(), &response].concat();
        match timeout(limits.idle, stream.write_all(&framed)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return,
            Err(_) => return add(&counts.cut),
        }
    }
}

/// The next query, or that there is none any more.
async fn receive(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let mut len = [0; 2];
    match stream.read_exact(&mut len).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let len = usize::from(u16::from_be_bytes(len));
    if len > MAX_QUERY {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the query is too long"));
    }
    let mut query = vec![0; len];
    stream.read_exact(&mut query).await?;
    Ok(Some(query))
}

async fn pause(counts: &Counts, what: &str, error: &io::Error) {
    add(&counts.errors);
    tracing::warn!(%error, "the DNS server could not {what}; it goes on");
    sleep(PAUSE).await;
}
