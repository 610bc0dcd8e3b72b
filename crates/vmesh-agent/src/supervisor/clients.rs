//! Whether an Envoy that can no longer be asked has clients: from what the kernel says of its sockets.

use std::collections::HashSet;
use std::fmt::Display;
use std::io;

use vmesh_capture::sockets::{self, Socket};

/// The ports of this host at which somebody listens; `None` where that cannot be found out.
pub(super) struct Ports(Option<HashSet<u16>>);

impl Ports {
    pub(super) fn now() -> Ports {
        Ports(table("self").ok().map(|table| listened(&table)))
    }

    /// Whether the process has connections to one of these ports. True where it cannot be found out.
    pub(super) fn has_clients(&self, pid: i32) -> bool {
        let Ports(Some(ports)) = self else { return true };
        numbers(pid).and_then(|sockets| Ok(clients(&table(pid)?, ports, &sockets) > 0)).unwrap_or(true)
    }
}

/// Of the network that the process is in.
pub(super) fn table(process: impl Display) -> io::Result<Vec<Socket>> {
    let read = |name| std::fs::read_to_string(format!("/proc/{process}/net/{name}"));
    // The second is not there where the kernel has no IPv6.
    let (tcp, tcp6) = (read("tcp")?, read("tcp6").unwrap_or_default());
    Ok(sockets::parse(&tcp).chain(sockets::parse(&tcp6)).collect())
}

/// Of the sockets that the process has open.
pub(super) fn numbers(pid: i32) -> io::Result<HashSet<u64>> {
    let mut numbers = HashSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        // One that was closed meanwhile is nobody's.
        let Ok(link) = std::fs::read_link(entry?.path()) else { continue };
        numbers.extend(link.to_str().and_then(sockets::inode));
    }
    Ok(numbers)
}

fn listened(table: &[Socket]) -> HashSet<u16> {
    table.iter().filter(|socket| socket.listens()).map(|socket| socket.local.port()).collect()
}

/// How many of the sockets of these numbers are connections to one of `ports`. The others go from Envoy to endpoints, and stay open
/// although no client is there.
fn clients(table: &[Socket], ports: &HashSet<u16>, numbers: &HashSet<u64>) -> usize {
    let is_client = |socket: &&Socket| {
        !socket.listens() && ports.contains(&socket.local.port()) && numbers.contains(&socket.inode)
    };
    table.iter().filter(is_client).count()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn who_is_connected_to_a_port_where_somebody_listens_is_a_client() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:2329 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 10 1 0 100 0 0 10 0
   1: 0100007F:2329 0100007F:D431 01 00000000:00000000 00:00000000 00000000     0        0 11 1 0 20 4 30 10 -1
   2: 0100007F:D431 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 12 1 0 20 4 30 10 -1
";
        let table: Vec<Socket> = sockets::parse(table).collect();
        for (numbers, expected) in [(vec![11], 1), (vec![10, 12], 0), (vec![10, 11, 12], 1), (vec![13], 0)] {
            assert_eq!(
                clients(&table, &listened(&table), &HashSet::from_iter(numbers.clone())),
                expected,
                "{numbers:?}"
            );
        }
    }

    #[test]
    fn the_kernel_says_so_of_this_process() {
        let pid = std::process::id().cast_signed();
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let ports = Ports::now();
        assert!(!ports.has_clients(pid));
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _accepted = listener.accept().unwrap();
        // Also when nobody new is let in any more.
        drop(listener);
        assert!(ports.has_clients(pid));
        assert!(ports.has_clients(-1));
    }
}
