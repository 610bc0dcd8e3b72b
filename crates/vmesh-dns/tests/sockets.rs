//! Tests of the sockets: their limits, and the effect of a changed table.

#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;
use vmesh_dns::server::{Limits, MAX_QUERY};
use vmesh_testkit::wait_for;

use common::{Server, table};

mod common;

const BOUND: Duration = Duration::from_secs(60);

/// Builds a query for the addresses of `orders.mesh`.
fn query(id: u16) -> Vec<u8> {
    let mut query = id.to_be_bytes().to_vec();
    query.extend(b"\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x06orders\x04mesh\x00\x00\x01\x00\x01");
    query
}

/// Returns the last byte of the address in a response.
fn last_octet(response: &[u8], id: u16) -> u8 {
    assert_eq!(response[..2], id.to_be_bytes());
    assert_eq!(response[7], 1, "not one answer");
    response[response.len() - 1]
}

async fn udp(server: &Server) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(server.address).await.unwrap();
    socket
}

async fn query_over_udp(socket: &UdpSocket, id: u16) -> u8 {
    socket.send(&query(id)).await.unwrap();
    let mut response = [0; 2000];
    let len = timeout(BOUND, socket.recv(&mut response)).await.unwrap().unwrap();
    last_octet(&response[..len], id)
}

fn framed(query: &[u8]) -> Vec<u8> {
    [u16::try_from(query.len()).unwrap().to_be_bytes().as_slice(), query].concat()
}

async fn response(stream: &mut TcpStream) -> Vec<u8> {
    let len = timeout(BOUND, stream.read_u16()).await.unwrap().unwrap();
    let mut response = vec![0; usize::from(len)];
    timeout(BOUND, stream.read_exact(&mut response)).await.unwrap().unwrap();
    response
}

/// Waits until the server has closed the connection.
async fn wait_until_closed(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    _ = timeout(BOUND, stream.read_to_end(&mut rest)).await.expect("the server keeps the connection");
    assert_eq!(rest, b"");
}

async fn wait_for_count(what: &str, count: &AtomicU64, want: u64) {
    let observed = async || {
        let count = count.load(Ordering::Relaxed);
        if count >= want { Ok(()) } else { Err(count.to_string()) }
    };
    wait_for(format!("{want} {what} or more"), BOUND, observed).await.unwrap();
}

#[tokio::test]
async fn the_next_query_sees_the_table_that_there_is() {
    let server = Server::start(table("orders 240.0.0.1"), Limits::default()).await;
    let socket = udp(&server).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    for round in 1..=50_u8 {
        server.tables.send_replace(Arc::new(table(&format!("orders 240.0.0.{round}"))));
        assert_eq!(query_over_udp(&socket, round.into()).await, round);
        stream.write_all(&framed(&query(round.into()))).await.unwrap();
        assert_eq!(last_octet(&response(&mut stream).await, round.into()), round);
    }
    server.stop().await;
    wait_until_closed(&mut stream).await;
}

#[tokio::test]
async fn queries_on_one_connection_are_answered_in_their_order_however_they_are_cut() {
    let server = Server::start(table("orders 240.0.0.1"), Limits::default()).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let all: Vec<u8> = (0..200).flat_map(|id| framed(&query(id))).collect();
    for part in all.chunks(37) {
        stream.write_all(part).await.unwrap();
    }
    for id in 0..200 {
        assert_eq!(last_octet(&response(&mut stream).await, id), 1);
    }
    wait_for_count("queries over TCP", &server.counts.tcp, 200).await;
    server.stop().await;
}

#[tokio::test]
async fn what_is_no_query_costs_its_sender_alone() {
    let server = Server::start(table("orders 240.0.0.1"), Limits::default()).await;
    let socket = udp(&server).await;
    let mut dropped = 0;
    for len in [0, 1, 11, MAX_QUERY + 1, 9000, 60_000] {
        socket.send(&vec![0; len]).await.unwrap();
        dropped += 1;
        wait_for_count("dropped queries", &server.counts.dropped, dropped).await;
    }
    // Responses are not answered, or two servers would answer each other for ever.
    let mut echo = query(1);
    echo[2] |= 0x80;
    socket.send(&echo).await.unwrap();
    wait_for_count("dropped queries", &server.counts.dropped, dropped + 1).await;
    assert_eq!(query_over_udp(&socket, 2).await, 1);

    for bytes in [&b"\xff\xff"[..], b"\x00\x02ab", b"\x00\x00"] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        wait_until_closed(&mut stream).await;
    }
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(&framed(&query(3))).await.unwrap();
    assert_eq!(last_octet(&response(&mut stream).await, 3), 1);
    server.stop().await;
}

#[tokio::test]
async fn connections_that_keep_others_waiting_are_closed() {
    let limits = Limits { connections: 2, idle: Duration::from_millis(500), queries: 3 };
    let server = Server::start(table("orders 240.0.0.1"), limits).await;
    // One client is silent, and one sends a single byte of its query.
    let mut silent = TcpStream::connect(server.address).await.unwrap();
    let mut slow = TcpStream::connect(server.address).await.unwrap();
    slow.write_all(b"\x00").await.unwrap();
    let mut waits = TcpStream::connect(server.address).await.unwrap();
    waits.write_all(&framed(&query(7))).await.unwrap();
    assert_eq!(last_octet(&response(&mut waits).await, 7), 1);
    wait_until_closed(&mut silent).await;
    wait_until_closed(&mut slow).await;
    wait_for_count("connections cut", &server.counts.cut, 2).await;
    // TCP clients do not delay UDP.
    assert_eq!(query_over_udp(&udp(&server).await, 8).await, 1);

    let mut busy = TcpStream::connect(server.address).await.unwrap();
    for id in 0..3 {
        busy.write_all(&framed(&query(id))).await.unwrap();
        assert_eq!(last_octet(&response(&mut busy).await, id), 1);
    }
    wait_until_closed(&mut busy).await;
    server.stop().await;
}

#[tokio::test]
async fn a_client_that_takes_no_response_is_cut() {
    let limits = Limits { idle: Duration::from_millis(500), queries: usize::MAX, ..Limits::default() };
    let many: String = (0..250).map(|n| format!(" 240.0.0.{n}")).collect();
    let server = Server::start(table(&format!("orders{many}")), limits).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let queries: Vec<u8> = (0..1000).flat_map(|id| framed(&query(id))).collect();
    // The client fills the buffers at both ends, and then the server closes the connection.
    let flood = async { while stream.write_all(&queries).await.is_ok() {} };
    timeout(BOUND, flood).await.expect("the server keeps a client that does not read");
    wait_for_count("connections cut", &server.counts.cut, 1).await;
    server.stop().await;
}
