//! A hostile server: the client does not trust the sizes that it announces, and loses at most its connection.
//!
//! The server is a fake, since a real one sends none of this.

#![expect(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests")]

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use vmesh_testkit::wait_for;
use vmesh_zookeeper::{Config, Mirror, Root};

const BOUND: Duration = Duration::from_secs(60);

const GET_DATA: i32 = 4;
const GET_CHILDREN: i32 = 8;
const SYNC: i32 = 9;

/// How the server answers requests of one type.
#[derive(Clone, Copy)]
enum Attack {
    /// Announces a reply of this many bytes to every read of data, and sends as many as the client reads.
    Announce(u32),
    /// Lists this many children in a reply that has room for none.
    Count(i32),
    /// Has endless children, each with this much data.
    Pour(usize),
}

struct Server {
    address: SocketAddr,
    /// The most bytes of one reply that the client has read.
    taken: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

async fn server(attack: Attack) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (mut tasks, taken) = (JoinSet::new(), Arc::new(AtomicUsize::new(0)));
    let counted = taken.clone();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            connections.spawn(serve(stream, attack, counted.clone()));
        }
    });
    Server { address, taken, _tasks: tasks }
}

async fn serve(mut stream: TcpStream, attack: Attack, taken: Arc<AtomicUsize>) -> io::Result<()> {
    frame(&mut stream).await?;
    let mut connected = [0_i32.to_be_bytes(), 10_000_i32.to_be_bytes()].concat();
    connected.extend(7_i64.to_be_bytes());
    connected.extend(16_i32.to_be_bytes());
    connected.extend([0; 17]);
    send(&mut stream, &connected).await?;
    loop {
        let request = frame(&mut stream).await?;
        let number = |at: usize| i32::from_be_bytes(request[at..at + 4].try_into().unwrap());
        let (xid, kind) = (number(0), number(4));
        let mut reply =
            [xid.to_be_bytes(), 0_i32.to_be_bytes(), 1_i32.to_be_bytes(), 0_i32.to_be_bytes()].concat();
        match (kind, attack) {
            (GET_DATA, Attack::Announce(length)) => {
                stream.write_all(&length.to_be_bytes()).await?;
                stream.write_all(&reply).await?;
                let zeroes = vec![0; 1 << 16];
                for sent in (0..length as usize).step_by(zeroes.len()) {
                    taken.fetch_max(sent, Ordering::Relaxed);
                    stream.write_all(&zeroes).await?;
                }
            }
            (GET_CHILDREN, Attack::Count(count)) => {
                reply.extend(count.to_be_bytes());
                send(&mut stream, &reply).await?;
            }
            (GET_DATA, _) => {
                let data = if let Attack::Pour(bytes) = attack { vec![b'x'; bytes] } else { Vec::new() };
                reply.extend(i32::try_from(data.len()).unwrap().to_be_bytes());
                reply.extend(&data);
                reply.extend([0; 68]);
                // The number of children stands before the last field of the node's `Stat`, which has eight
                // bytes.
                let at = reply.len() - 12;
                reply[at..at + 4].copy_from_slice(&1_i32.to_be_bytes());
                taken.fetch_add(data.len(), Ordering::Relaxed);
                send(&mut stream, &reply).await?;
            }
            (GET_CHILDREN, Attack::Pour(_)) => {
                reply.extend(100_i32.to_be_bytes());
                for child in 0..100 {
                    let name = format!("{child:04}");
                    reply.extend(4_i32.to_be_bytes());
                    reply.extend(name.as_bytes());
                }
                send(&mut stream, &reply).await?;
            }
            (SYNC, _) => {
                reply.extend([0, 0, 0, 1, b'/']);
                send(&mut stream, &reply).await?;
            }
            _ => send(&mut stream, &reply).await?,
        }
    }
}

async fn frame(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let length = stream.read_i32().await?;
    let mut frame = vec![0; usize::try_from(length).unwrap()];
    stream.read_exact(&mut frame).await?;
    Ok(frame)
}

async fn send(stream: &mut TcpStream, frame: &[u8]) -> io::Result<()> {
    let length = i32::try_from(frame.len()).unwrap();
    stream.write_all(&[&length.to_be_bytes(), frame].concat()).await
}

fn mirror(server: &Server, max_bytes: usize) -> Mirror {
    let mut root = Root::new("/services").unwrap();
    root.max_bytes = max_bytes;
    Mirror::new(Config::of(server.address.to_string().parse().unwrap()), vec![root], |_| {})
}

/// Waits until the mirror reports a reason that contains `expected`, for the view or for its root.
async fn says(mirror: &mut Mirror, expected: &str) {
    let message = async {
        loop {
            let view = mirror.changed().await;
            let failed = view.roots.iter().find_map(|root| root.failed.clone());
            if [view.stale_because, failed].into_iter().flatten().any(|message| message.contains(expected)) {
                return;
            }
        }
    };
    tokio::time::timeout(BOUND, message).await.unwrap_or_else(|_| panic!("it never says `{expected}`"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_is_not_taken_that_is_longer_than_any_should_be() {
    for length in [u32::try_from(i32::MAX).unwrap(), 9 << 20, u32::MAX] {
        let server = server(Attack::Announce(length)).await;
        let mut mirror = mirror(&server, 1 << 20);
        says(&mut mirror, &format!("the server announces a reply of {length} bytes")).await;
        // The server can write no more than the sockets buffer.
        let taken = server.taken.load(Ordering::Relaxed);
        assert!(taken <= 16 << 20, "{taken} bytes of a reply of {length} were taken");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_count_that_a_reply_has_no_room_for_reserves_nothing() {
    let server = server(Attack::Count(i32::MAX)).await;
    let mut mirror = mirror(&server, 1 << 20);
    says(&mut mirror, "/services").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_is_not_kept_that_has_more_bytes_than_it_may() {
    let server = server(Attack::Pour(100_000)).await;
    let mut mirror = mirror(&server, 1 << 20);
    says(&mut mirror, "there are more than 1048576 bytes in the nodes below /services").await;
    assert!(mirror.view().roots[0].tree.is_none());
    // The requests in flight may still bring their replies.
    let taken = server.taken.load(Ordering::Relaxed);
    wait_for("the reading to have ended", BOUND, async || {
        let more = server.taken.load(Ordering::Relaxed);
        if more <= 32 << 20 { Ok(()) } else { Err(format!("{taken} and then {more} bytes were read")) }
    })
    .await
    .unwrap();
}
