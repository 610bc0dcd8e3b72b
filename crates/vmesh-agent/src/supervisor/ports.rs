//! Reserves Envoy's capture ports while Envoy is away. Another process on such a port would receive all captured connections of this host.
//!
//! A bound socket that does not listen accepts no connection. With `SO_REUSEPORT` (socket(7)) the kernel lets only sockets of the same user
//! share its port, and Envoy runs as the supervisor's user.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::net::sockopt::{set_ipv6_v6only, set_socket_reuseport};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
use tracing::warn;
use vmesh_capture::spec::{INBOUND_PORT, OUTBOUND_PORT};

use crate::capture::settings::CaptureSettings;

/// The reserved sockets by address. An address that could not be bound is `None`: it is tried again at each call, and logged once.
#[derive(Debug, Default)]
pub(super) struct ReservedPorts(BTreeMap<SocketAddr, Option<OwnedFd>>);

impl ReservedPorts {
    /// Reserves the ports that captured connections are redirected to, and releases all others.
    pub(super) fn reserve_for(&mut self, capture: &CaptureSettings) {
        let mut wanted: Vec<(IpAddr, u16)> = Vec::new();
        if capture.outbound() {
            wanted.extend([
                (Ipv4Addr::LOCALHOST.into(), OUTBOUND_PORT),
                (Ipv6Addr::LOCALHOST.into(), OUTBOUND_PORT),
            ]);
        }
        if capture.inbound() {
            wanted.extend([
                (Ipv4Addr::UNSPECIFIED.into(), INBOUND_PORT),
                (Ipv6Addr::UNSPECIFIED.into(), INBOUND_PORT),
            ]);
        }
        let without_ipv6 = capture.report().without_ipv6;
        wanted.retain(|(ip, _)| ip.is_ipv4() || !without_ipv6);
        self.reserve(wanted.into_iter().map(SocketAddr::from).collect());
    }

    fn reserve(&mut self, wanted: Vec<SocketAddr>) {
        self.0.retain(|address, _| wanted.contains(address));
        for address in wanted {
            if matches!(self.0.get(&address), Some(Some(_))) {
                continue;
            }
            let socket = bind_without_listening(address).map_err(|error| {
                if !self.0.contains_key(&address) {
                    warn!(
                        "{address} could not be kept for Envoy: {error}; if another user's program has it, Envoy cannot \
                         listen there (`ss -ltnp`)"
                    );
                }
            });
            self.0.insert(address, socket.ok());
        }
    }
}

fn bind_without_listening(address: SocketAddr) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    if address.is_ipv6() {
        set_ipv6_v6only(&socket, true)?;
    }
    set_socket_reuseport(&socket, true)?;
    bind(&socket, &address)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;
    use std::net::{TcpListener, TcpStream};

    use vmesh_testkit::netns::Switch;

    use super::*;

    #[test]
    fn a_port_that_is_held_is_nobody_elses_and_takes_nothing_from_envoy() {
        const ENVOY: u32 = 4000;
        let switch = Switch::new().unwrap();
        let host = switch.host().unwrap();
        for local in ["127.0.0.1:15001", "[::1]:15001", "0.0.0.0:15006", "[::]:15006"] {
            let address: SocketAddr = local.parse().unwrap();
            let hold = || {
                let mut reserved = ReservedPorts::default();
                reserved.reserve(vec![address]);
                assert!(reserved.0.values().all(Option::is_some), "{address}");
                reserved
            };
            let mut reserved = host.within_as(ENVOY, hold).unwrap();
            let others = || {
                let plain = TcpListener::bind(address).map(drop);
                let shared = bind_without_listening(address).map(drop);
                [plain, shared].map(|bound| bound.unwrap_err().kind())
            };
            assert_eq!(host.within_as(5000, others).unwrap(), [ErrorKind::AddrInUse; 2]);
            assert_eq!(host.within(others).unwrap(), [ErrorKind::AddrInUse; 2], "nor root's");
            let to = match address.ip().is_unspecified() {
                true if address.is_ipv4() => SocketAddr::from((Ipv4Addr::LOCALHOST, address.port())),
                true => SocketAddr::from((Ipv6Addr::LOCALHOST, address.port())),
                false => address,
            };
            let refused = host.within(|| TcpStream::connect(to)).unwrap().unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
            let listen = || {
                let socket = bind_without_listening(address).unwrap();
                rustix::net::listen(&socket, 8).unwrap();
                TcpListener::from(socket)
            };
            let envoy = host.within_as(ENVOY, listen).unwrap();
            for _ in 0..20 {
                host.within(|| TcpStream::connect(to)).unwrap().unwrap();
                envoy.accept().unwrap();
            }
            drop(envoy);
            reserved.reserve(Vec::new());
            // A port that another process took first is reserved as soon as that process releases it.
            let stranger = host.within_as(5000, || TcpListener::bind(address)).unwrap().unwrap();
            let mut try_again = || {
                let hold = || {
                    reserved.reserve(vec![address]);
                    reserved.0.values().all(Option::is_some)
                };
                host.within_as(ENVOY, hold).unwrap()
            };
            assert!(!try_again());
            drop(stranger);
            assert!(try_again());
        }
    }
}
