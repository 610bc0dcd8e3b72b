//! The UDP and TCP server. It runs in its caller's task, and [`Limits`] bounds its resources for any number of clients.
//!
//! Queries are answered from the current [`Table`]. The origin and the age of the table are the caller's business.

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

/// Maximum size of a query in bytes: the longest name, and room for EDNS options, which are ignored.
pub const MAX_QUERY: usize = 1232;
/// Pause after a socket error that may repeat at once, such as a lack of memory or file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Limits for TCP clients. UDP uses one buffer for all clients and keeps no state.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Number of concurrent connections. Further ones wait in the listener's queue.
    pub connections: usize,
    /// Time limit for receiving one complete query, and for sending its response. A connection that exceeds it is closed (RFC 7766 section
    /// 6.2.3), even if bytes trickle in.
    pub idle: Duration,
    /// Number of queries per connection. It is then closed, so that waiting clients get their turn.
    pub queries: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { connections: 64, idle: Duration::from_secs(5), queries: 1000 }
    }
}

/// Counters since the start.
#[derive(Debug, Default)]
pub struct Counts {
    pub udp: AtomicU64,
    pub tcp: AtomicU64,
    /// Queries over UDP or TCP without a response: see [`mod@crate::answer`].
    pub dropped: AtomicU64,
    /// Connections closed because of a timeout or an oversized query.
    pub cut: AtomicU64,
    /// Errors of the sockets.
    pub errors: AtomicU64,
}

/// Answers queries on `udp` and `tcp` from the current table of `tables`, until `stop` completes. Open connections are then closed at once,
/// since resolvers retry.
///
/// Bind the sockets to a specific address: a response from a wildcard socket may have another source address than the query's destination.
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
    // One extra byte, to detect queries that are too long.
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
    // The borrow must not be held while answering, or it would block the publisher of the tables.
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

/// Answers the queries of one connection in order.
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
            // The client closed the connection, or an error concerns this connection alone.
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
        // The length prefix and the response go into one segment (RFC 7766 section 8).
        let framed = [len.to_be_bytes().as_slice(), &response].concat();
        match timeout(limits.idle, stream.write_all(&framed)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return,
            Err(_) => return add(&counts.cut),
        }
    }
}

/// Receives the next query. Returns `None` if the client closed the connection.
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
