//! The TCP sockets of a host, as the kernel prints them in `/proc/net/tcp` and `tcp6` (proc_net_tcp.rst of
//! the kernel).

use std::net::{IpAddr, SocketAddr};

/// The states of a TCP socket, from the kernel's `tcp_states.h`.
const ESTABLISHED: u8 = 1;
const FIN_WAIT_1: u8 = 4;
const FIN_WAIT_2: u8 = 5;
const TIME_WAIT: u8 = 6;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const LISTEN: u8 = 10;
const CLOSING: u8 = 11;

/// One line of `/proc/net/tcp` or `tcp6`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    /// The local address. IPv4-mapped IPv6 addresses are converted to IPv4.
    pub local: SocketAddr,
    /// The remote address; unspecified for a listening socket.
    pub remote: SocketAddr,
    state: u8,
    /// Sent bytes that the peer has not acknowledged.
    unacknowledged: u32,
    /// The number of retransmissions of unacknowledged data.
    retransmits: u32,
    pub user: u32,
    /// The inode of the socket; 0 once no process has it open.
    pub inode: u64,
}

impl Socket {
    pub fn listens(&self) -> bool {
        self.state == LISTEN
    }

    pub fn is_established(&self) -> bool {
        self.state == ESTABLISHED
    }

    /// Reports whether the local end was closed while the peer may still be open. The kernel does not close a
    /// socket by itself, so a process closed it.
    pub fn is_closed_here(&self) -> bool {
        const CLOSED_HERE: [u8; 5] = [FIN_WAIT_1, FIN_WAIT_2, TIME_WAIT, LAST_ACK, CLOSING];
        CLOSED_HERE.contains(&self.state)
    }

    /// Reports whether the connection carries data in at least one direction.
    pub fn is_open(&self) -> bool {
        [ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2, CLOSE_WAIT].contains(&self.state)
    }

    /// Reports whether sent data is unacknowledged and was retransmitted.
    pub fn is_stuck(&self) -> bool {
        self.unacknowledged > 0 && self.retransmits > 0
    }
}

/// Parses the content of such a file. Skips lines that are not understood.
pub fn parse(text: &str) -> impl Iterator<Item = Socket> {
    text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let local = address(words.nth(1)?)?;
        let remote = address(words.next()?)?;
        let state = u8::from_str_radix(words.next()?, 16).ok()?;
        let (unacknowledged, _) = words.next()?.split_once(':')?;
        let retransmits = u32::from_str_radix(words.nth(1)?, 16).ok()?;
        let user = words.next()?.parse().ok()?;
        let inode = words.nth(1)?.parse().ok()?;
        let unacknowledged = u32::from_str_radix(unacknowledged, 16).ok()?;
        Some(Socket { local, remote, state, unacknowledged, retransmits, user, inode })
    })
}

/// Parses `0100007F:3A99`: 32-bit words in the byte order of the machine, then the port in network order.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |word: &str| u32::from_str_radix(word, 16).map(u32::to_ne_bytes).ok();
    let ip = match ip.len() {
        8 => IpAddr::from(word(ip)?),
        32 => {
            let mut bytes = [0; 16];
            for (number, four) in bytes.chunks_mut(4).enumerate() {
                four.copy_from_slice(&word(ip.get(8 * number..8 * number + 8)?)?);
            }
            IpAddr::from(bytes)
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip.to_canonical(), port))
}

/// Returns the inode in `socket:[12345]`, the link target of a file descriptor that is a socket
/// (proc_pid_fd(5)).
pub fn inode(target: &str) -> Option<u64> {
    target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_read_from_what_the_kernel_prints() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1 0 100 0 0 10 0\n   \
            1: 0100007F:3A99 0100007F:1F90 01 00000030:00000000 01:00000010 00000002  1000        0 777 1 0 100 0 0 10 0\n\
            garbage\n";
        let [ssh, redirected] = parse(text).collect::<Vec<_>>().try_into().unwrap();
        assert_eq!((ssh.local, ssh.user, ssh.inode), ("0.0.0.0:22".parse().unwrap(), 0, 12345));
        assert_eq!((ssh.listens(), ssh.is_open(), ssh.is_stuck()), (true, false, false));
        assert_eq!((redirected.local, redirected.user), ("127.0.0.1:15001".parse().unwrap(), 1000));
        assert!(redirected.is_established() && redirected.is_open() && redirected.is_stuck());
        assert_eq!(parse("").count(), 0);
    }

    #[test]
    fn addresses_are_read_in_the_order_of_the_machine() {
        let read = |text| address(text).map(|address| address.to_string());
        assert_eq!(read("0100007F:3A99").as_deref(), Some("127.0.0.1:15001"));
        assert_eq!(read("00000000000000000000000001000000:1F90").as_deref(), Some("[::1]:8080"));
        assert_eq!(read("0000000000000000FFFF00000100007F:1F90").as_deref(), Some("127.0.0.1:8080"));
        for wrong in ["", "0100007F", "0100007F:XYZ", "01:1", "0000000000000000000000000100000é:1"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_no_socket_has_no_number() {
        assert_eq!(inode("socket:[42]"), Some(42));
        assert_eq!(inode("/dev/null"), None);
    }
}
