//! Finds the user of a listening socket with sock_diag(7). It asks the kernel about a single socket; reading
//! `/proc/net/tcp` would take time in proportion to the host's connections.

use std::io;
use std::net::SocketAddr;

use netlink_packet_core::{NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage, Parseable};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags};
use netlink_packet_sock_diag::{AF_INET, AF_INET6, IPPROTO_TCP, SOCK_DIAG_BY_FAMILY, SockDiagMessage};
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};

/// The cookie that matches any socket (`INET_DIAG_NOCOOKIE` of linux/inet_diag.h).
const NO_COOKIE: [u8; 8] = [0xff; 8];

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

/// Builds a request for the listening socket at `address`.
fn question(address: SocketAddr) -> Vec<u8> {
    let (family, id) = match address {
        SocketAddr::V4(_) => (AF_INET, SocketId::new_v4()),
        SocketAddr::V6(_) => (AF_INET6, SocketId::new_v6()),
    };
    let socket_id =
        SocketId { source_address: address.ip(), source_port: address.port(), cookie: NO_COOKIE, ..id };
    let request = InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id,
    };
    let mut message = NetlinkMessage::from(SockDiagMessage::InetRequest(request));
    message.header.flags = NLM_F_REQUEST;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// Returns the user in an answer. The attributes after the fixed part are not parsed, because a later kernel may
/// add some.
fn uid(answer: &[u8]) -> Option<u32> {
    let message = NetlinkBuffer::new_checked(answer).ok()?;
    if message.message_type() != SOCK_DIAG_BY_FAMILY {
        return None;
    }
    Some(InetResponseHeader::parse(message.payload()).ok()?.uid)
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
