//! Detects from the kernel's socket tables whether an Envoy without an admin interface still has clients.

use std::collections::HashSet;
use std::fmt::Display;
use std::io;

use vmesh_capture::sockets::{self, Socket};

/// The ports with a listener on this host; `None` if the socket table could not be read.
pub(super) struct ListeningPorts(Option<HashSet<u16>>);

impl ListeningPorts {
    pub(super) fn now() -> ListeningPorts {
        ListeningPorts(socket_table("self").ok().map(|table| listening_ports(&table)))
    }

    /// Reports whether the process has connections to one of these ports. Returns true if the socket table cannot be read.
    pub(super) fn has_clients(&self, pid: i32) -> bool {
        let ListeningPorts(Some(ports)) = self else { return true };
        socket_inodes(pid)
            .and_then(|sockets| Ok(count_clients(&socket_table(pid)?, ports, &sockets) > 0))
            .unwrap_or(true)
    }
}

/// Reads the TCP sockets, IPv4 and IPv6, of the network namespace of `process` (a pid or `self`).
pub(super) fn socket_table(process: impl Display) -> io::Result<Vec<Socket>> {
    let read = |name| std::fs::read_to_string(format!("/proc/{process}/net/{name}"));
    // `tcp6` does not exist on kernels without IPv6.
    let (tcp, tcp6) = (read("tcp")?, read("tcp6").unwrap_or_default());
    Ok(sockets::parse(&tcp).chain(sockets::parse(&tcp6)).collect())
}

/// Returns the inode numbers of the sockets that the process has open.
pub(super) fn socket_inodes(pid: i32) -> io::Result<HashSet<u64>> {
    let mut inodes = HashSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        // The descriptor may have been closed since the directory was read.
        let Ok(link) = std::fs::read_link(entry?.path()) else { continue };
        inodes.extend(link.to_str().and_then(sockets::inode));
    }
    Ok(inodes)
}

fn listening_ports(table: &[Socket]) -> HashSet<u16> {
    table.iter().filter(|socket| socket.listens()).map(|socket| socket.local.port()).collect()
}

/// Counts the sockets in `inodes` that are connections to one of `ports`. Other connections go from Envoy to endpoints, and stay open
/// without any client.
fn count_clients(table: &[Socket], ports: &HashSet<u16>, inodes: &HashSet<u64>) -> usize {
    let is_client = |socket: &&Socket| {
        !socket.listens() && ports.contains(&socket.local.port()) && inodes.contains(&socket.inode)
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
                count_clients(&table, &listening_ports(&table), &HashSet::from_iter(numbers.clone())),
                expected,
                "{numbers:?}"
            );
        }
    }

    #[test]
    fn the_kernel_says_so_of_this_process() {
        let pid = std::process::id().cast_signed();
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let ports = ListeningPorts::now();
        assert!(!ports.has_clients(pid));
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _accepted = listener.accept().unwrap();
        // A connection still counts after its listener has closed.
        drop(listener);
        assert!(ports.has_clients(pid));
        assert!(ports.has_clients(-1));
    }
}
