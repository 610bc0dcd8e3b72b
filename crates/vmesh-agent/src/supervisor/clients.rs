//! Whether an Envoy that can no longer be asked has clients: from what the kernel says of its sockets.

use std::collections::HashSet;
use std::io;

/// proc(5), `/proc/net/tcp`: the state of a socket that listens.
const LISTEN: &str = "0A";

/// True where it cannot be found out.
pub(super) fn has_clients(pid: i32) -> bool {
    find(pid).unwrap_or(true)
}

fn find(pid: i32) -> io::Result<bool> {
    let mut table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp"))?;
    // Not there where the kernel has no IPv6.
    table += &std::fs::read_to_string(format!("/proc/{pid}/net/tcp6")).unwrap_or_default();
    let mut sockets = HashSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        // One that was closed meanwhile is nobody's.
        let Ok(link) = std::fs::read_link(entry?.path()) else { continue };
        let inode: Option<u64> =
            link.to_str().and_then(|link| link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        sockets.extend(inode);
    }
    Ok(clients(&table, &sockets) > 0)
}

struct Socket<'a> {
    /// In hexadecimal, as it is in the table.
    port: &'a str,
    state: &'a str,
    inode: u64,
}

fn socket(line: &str) -> Option<Socket<'_>> {
    let mut fields = line.split_whitespace().skip(1);
    let (_, port) = fields.next()?.rsplit_once(':')?;
    let state = fields.nth(1)?;
    // Between the two: the queues, the timer, the retransmits, the user, the timeout.
    Some(Socket { port, state, inode: fields.nth(5)?.parse().ok()? })
}

/// How many of `sockets` are connections to a port at which somebody listens. The others go from Envoy to endpoints, and
/// stay open although no client is there.
fn clients(table: &str, sockets: &HashSet<u64>) -> usize {
    let all = || table.lines().filter_map(socket);
    let ports: HashSet<&str> = all().filter(|one| one.state == LISTEN).map(|one| one.port).collect();
    all()
        .filter(|one| one.state != LISTEN && ports.contains(one.port) && sockets.contains(&one.inode))
        .count()
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
        for (sockets, expected) in [(vec![11], 1), (vec![10, 12], 0), (vec![10, 11, 12], 1), (vec![13], 0)] {
            assert_eq!(clients(table, &HashSet::from_iter(sockets.clone())), expected, "{sockets:?}");
        }
    }

    #[test]
    fn the_kernel_says_so_of_this_process() {
        let pid = std::process::id().cast_signed();
        let listener = TcpListener::bind("[::1]:0").unwrap();
        assert!(!has_clients(pid));
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _accepted = listener.accept().unwrap();
        assert!(has_clients(pid));
        assert!(has_clients(-1));
    }
}
