//! Probes Envoy's capture ports.
//!
//! Envoy closes a connection to a capture port itself, because it has no other destination (the guard against
//! loops). If Envoy closes it soon, one of its workers is running. That the kernel accepts a connection
//! proves nothing: it does so even for a stopped Envoy.

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
use crate::protocol::EnvoyHealth;

const EVERY: Duration = Duration::from_secs(1);
const CONNECTS_WITHIN: Duration = Duration::from_secs(1);
/// The time limit for Envoy to close a connection. It is generous, since an overloaded machine is no reason
/// to bypass Envoy.
const CLOSES_WITHIN: Duration = Duration::from_secs(3);

/// The directions whose ports are probed; none while nothing is captured.
pub type ProbedDirections = Directions;

/// The probe's result for each port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProbeResults {
    pub outbound: EnvoyHealth,
    pub inbound: EnvoyHealth,
}

impl ProbeResults {
    pub fn of(self, direction: Direction) -> EnvoyHealth {
        match direction {
            Direction::Outbound => self.outbound,
            Direction::Inbound => self.inbound,
        }
    }

    /// Returns the directions whose listener is well.
    pub fn well(self) -> Directions {
        Direction::BOTH.into_iter().filter(|direction| self.of(*direction) == EnvoyHealth::Well).collect()
    }
}

/// Probes the ports of `looks` once a second, and publishes the results.
pub async fn watch_envoy(
    mut looks: watch::Receiver<ProbedDirections>,
    users: BTreeSet<u32>,
    results: watch::Sender<ProbeResults>,
) {
    loop {
        let at = *looks.borrow_and_update();
        results.send_replace(probe_listeners(at, &users).await);
        tokio::select! {
            () = sleep(EVERY) => {}
            changed = looks.changed() => if changed.is_err() { return },
        }
    }
}

/// Probes the ports of `looks` at the same time.
pub async fn probe_listeners(looks: ProbedDirections, users: &BTreeSet<u32>) -> ProbeResults {
    let probe = async |direction| match looks.contains(direction) {
        true => probe_listener(direction, users).await,
        false => EnvoyHealth::Unknown,
    };
    let (outbound, inbound) = tokio::join!(probe(Direction::Outbound), probe(Direction::Inbound));
    ProbeResults { outbound, inbound }
}

/// Returns Envoy's capture port of a direction.
pub fn port(direction: Direction) -> u16 {
    match direction {
        Direction::Outbound => OUTBOUND_PORT,
        Direction::Inbound => INBOUND_PORT,
    }
}

/// Probes the capture port of a direction, whose socket must belong to one of `users`. Any local program can
/// take the port while Envoy is down, and would receive all captured connections until the redirects lapse.
pub async fn probe_listener(direction: Direction, users: &BTreeSet<u32>) -> EnvoyHealth {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port(direction)));
    match owner::listener(address) {
        Some(user) if !users.contains(&user) => EnvoyHealth::WrongUser,
        _ => dial(address).await,
    }
}

/// Reports whether this host has a route to an IPv6 address. Sends no packet.
pub fn has_ipv6_route(address: SocketAddr) -> bool {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0));
    socket.and_then(|socket| socket.connect(address)).is_ok()
}

/// Dials `address`, which Envoy is to close at once.
pub async fn dial(address: SocketAddr) -> EnvoyHealth {
    let mut stream = match timeout(CONNECTS_WITHIN, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused => return EnvoyHealth::Gone,
        // No route, a timeout or no file descriptor: Envoy does not serve the port, but may still be there.
        _ => return EnvoyHealth::Hangs,
    };
    let mut nothing = [0; 1];
    match timeout(CLOSES_WITHIN, stream.read(&mut nothing)).await {
        // The connection was closed or reset.
        Ok(Ok(0) | Err(_)) => EnvoyHealth::Well,
        // Another program answers on this port.
        Ok(Ok(_)) => EnvoyHealth::Gone,
        Err(_) => EnvoyHealth::Hangs,
    }
}
