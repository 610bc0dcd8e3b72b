//! Runs the server under test.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use vmesh_dns::server::{Counts, Limits, serve};
use vmesh_dns::{Addresses, Table, Zone};

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) tables: watch::Sender<Arc<Table>>,
    pub(crate) counts: Arc<Counts>,
    task: JoinSet<()>,
    stop: oneshot::Sender<()>,
}

impl Server {
    pub(crate) async fn start(table: Table, limits: Limits) -> Server {
        // Find a port that is free for both protocols.
        let (udp, tcp) = loop {
            let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            if let Ok(udp) = UdpSocket::bind(tcp.local_addr().unwrap()).await {
                break (udp, tcp);
            }
        };
        Server::of(udp, tcp, table, limits)
    }

    pub(crate) fn of(udp: UdpSocket, tcp: TcpListener, table: Table, limits: Limits) -> Server {
        let address = tcp.local_addr().unwrap();
        let (tables, watched) = watch::channel(Arc::new(table));
        let counts = Arc::new(Counts::default());
        let (stop, stopped) = oneshot::channel();
        let mut task = JoinSet::new();
        let until = async move { _ = stopped.await };
        task.spawn(serve(udp, tcp, watched, limits, counts.clone(), until));
        Server { address, tables, counts, task, stop }
    }

    /// Stops the server, and waits for its end.
    pub(crate) async fn stop(mut self) {
        _ = self.stop.send(());
        self.task.join_next().await.unwrap().unwrap();
    }
}

/// Parses a table with lines of the form `name address address ...`.
pub(crate) fn table(text: &str) -> Table {
    let entries = text.lines().map(|line| {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap();
        (name, words.map(|word| word.parse::<IpAddr>().unwrap()).collect::<Addresses>())
    });
    let (table, problems) = Table::new(Zone::default(), entries);
    assert_eq!(problems, []);
    table
}
