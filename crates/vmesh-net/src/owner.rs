//! Finds the user of a listening socket with sock_diag(7). It asks the kernel about a single socket; reading
//! `/proc/net/tcp` would take time in proportion to the host's connections.

use std::io;
use std::net::{IpAddr, SocketAddr};

use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
/// From linux/sock_diag.h and linux/netlink.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
/// The length of `nlmsghdr` (RFC 3549 section 2.2).
const HEADER: usize = 16;
/// The offset of the uid in `inet_diag_msg` of linux/inet_diag.h: four bytes, the socket's identity (48),
/// three numbers.
const UID: usize = 4 + 48 + 12;

/// Returns the user whose socket accepts TCP connections to `address`. `None` if the port is closed, or if
/// the kernel does not report a user.
pub(crate) fn listener(address: SocketAddr) -> Option<u32> {
    ask(&question(address)).ok().as_deref().and_then(uid)
}

fn ask(question: &[u8]) -> io::Result<Vec<u8>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(netlink::SOCK_DIAG))?;
    sendto(&socket, question, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    // The kernel replies before `sendto` returns, so this does not block.
    let mut answer = vec![0; 4096];
    let (len, _) = recv(&socket, &mut answer, RecvFlags::empty())?;
    answer.truncate(len);
    Ok(answer)
}

/// Builds a request: `nlmsghdr` and `inet_diag_req_v2`, for the listening socket at `address`.
fn question(address: SocketAddr) -> Vec<u8> {
    let (family, ip) = match address.ip() {
        IpAddr::V4(ip) => (AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (AF_INET6, ip.octets().to_vec()),
    };
    let mut body = vec![family, IPPROTO_TCP, 0, 0];
    // All states.
    body.extend(u32::MAX.to_ne_bytes());
    body.extend(address.port().to_be_bytes());
    body.extend([0; 2]);
    body.extend(&ip);
    body.resize(body.len() + (16 - ip.len()) + 16 + 4, 0);
    // INET_DIAG_NOCOOKIE, twice.
    body.extend([0xff; 8]);
    let mut bytes = u32::try_from(HEADER + body.len()).unwrap_or_default().to_ne_bytes().to_vec();
    bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(body);
    bytes
}

fn uid(answer: &[u8]) -> Option<u32> {
    let kind = u16::from_ne_bytes(*answer.get(4..)?.first_chunk()?);
    let uid = answer.get(HEADER + UID..)?.first_chunk()?;
    (kind == SOCK_DIAG_BY_FAMILY).then(|| u32::from_ne_bytes(*uid))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn the_kernel_says_whose_a_listener_is_and_nothing_of_one_that_is_not_there() {
        for local in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(local).unwrap();
            let address = listener.local_addr().unwrap();
            assert_eq!(super::listener(address), Some(rustix::process::getuid().as_raw()));
            // The same holds for a listener with pending connections.
            let _open = std::net::TcpStream::connect(address).unwrap();
            assert_eq!(super::listener(address), Some(rustix::process::getuid().as_raw()));
            drop(listener);
            assert_eq!(super::listener(address), None);
        }
    }

    #[test]
    fn an_answer_that_is_none_says_nothing() {
        assert_eq!(uid(&[]), None);
        assert_eq!(uid(&[0; 200]), None);
        assert_eq!(uid(&[20; 40]), None);
    }
}
