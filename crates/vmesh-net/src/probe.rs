//! Whether Envoy takes what is redirected to it.
//!
//! Envoy closes a connection that is made to its capture ports themselves: they lead nowhere (the guard against loops). So
//! that it does, and soon, shows that a worker of it runs. That the kernel alone takes a connection shows nothing: it does for
//! an Envoy that is stopped, too.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use vmesh_capture::spec::{INBOUND_PORT, OUTBOUND_PORT};
use vmesh_capture::{Direction, Directions};

use crate::owner;
use crate::protocol::Envoy;

const EVERY: Duration = Duration::from_secs(1);
const CONNECTS_WITHIN: Duration = Duration::from_secs(1);
/// On a machine that is out of breath an Envoy may take its time: this is no reason to bypass it.
const CLOSES_WITHIN: Duration = Duration::from_secs(3);

/// Which of the two ports to look at; none while nothing is captured.
pub type Looks = Directions;

/// What was seen at each port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Verdicts {
    pub outbound: Envoy,
    pub inbound: Envoy,
}

impl Verdicts {
    pub fn of(self, direction: Direction) -> Envoy {
        match direction {
            Direction::Outbound => self.outbound,
            Direction::Inbound => self.inbound,
        }
    }

    /// The directions whose listener is well.
    pub fn well(self) -> Directions {
        Direction::BOTH.into_iter().filter(|direction| self.of(*direction) == Envoy::Well).collect()
    }
}

/// Looks at the ports that `looks` has, once a second, and tells what it saw.
pub async fn watch_envoy(
    mut looks: watch::Receiver<Looks>,
    users: BTreeSet<u32>,
    told: watch::Sender<Verdicts>,
) {
    loop {
        let at = *looks.borrow_and_update();
        let seen = look_at_all(at, &users).await;
        told.send_replace(seen);
        tokio::select! {
            () = sleep(EVERY) => {}
            changed = looks.changed() => if changed.is_err() { return },
        }
    }
}

/// What it sees at the ports that `looks` has. One listener that is gone says nothing of the other.
pub async fn look_at_all(looks: Looks, users: &BTreeSet<u32>) -> Verdicts {
    let look = async |direction| match looks.contains(direction) {
        true => look_at(direction, users).await,
        false => Envoy::Unknown,
    };
    let (outbound, inbound) = tokio::join!(look(Direction::Outbound), look(Direction::Inbound));
    Verdicts { outbound, inbound }
}

/// Envoy's capture port of a direction.
pub fn port(direction: Direction) -> u16 {
    match direction {
        Direction::Outbound => OUTBOUND_PORT,
        Direction::Inbound => INBOUND_PORT,
    }
}

/// Looks at the capture port of a direction, which one of `users` is to have. Whoever else has it gets what others send, until the
/// redirects are taken back: any program may take a port while Envoy is away.
pub async fn look_at(direction: Direction, users: &BTreeSet<u32>) -> Envoy {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port(direction)));
    match owner::listener(address) {
        Some(user) if !users.contains(&user) => Envoy::Stranger,
        _ => look(address).await,
    }
}

/// Reports whether this host has a route to an address of IPv6. Sends nothing.
pub fn has_ipv6_route(address: SocketAddr) -> bool {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0));
    socket.and_then(|socket| socket.connect(address)).is_ok()
}

/// Dials `address`, which Envoy is to close at once.
pub async fn look(address: SocketAddr) -> Envoy {
    let mut stream = match timeout(CONNECTS_WITHIN, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => return Envoy::Gone,
        // No route, no answer, no file descriptor: it is not served, and not known to be gone.
        _ => return Envoy::Hangs,
    };
    let mut nothing = [0; 1];
    match timeout(CLOSES_WITHIN, stream.read(&mut nothing)).await {
        // Closed or reset.
        Ok(Ok(0) | Err(_)) => Envoy::Well,
        // Somebody else's port.
        Ok(Ok(_)) => Envoy::Gone,
        Err(_) => Envoy::Hangs,
    }
}
