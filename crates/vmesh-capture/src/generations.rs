//! The generation number of the kernel's nftables state. The number grows by one with each transaction of any
//! process.

use std::io;
use std::os::fd::OwnedFd;

use netlink_packet_core::{Emitable, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, NlasIterator};
use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with,
};

/// The message that ends each transaction and answers `GET_GENERATION`
/// (`NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN` of linux/netfilter).
const NEW_GENERATION: u16 = (10 << 8) | 15;
const GET_GENERATION: u16 = (10 << 8) | 16;
/// The length of the header of nfnetlink (`nfgenmsg`), which precedes the attributes.
const NFNETLINK_HEADER: usize = 4;
/// The length of a netlink message: two headers and no attribute.
const GET_GENERATION_LENGTH: u8 = 20;
const NFTA_GEN_ID: u16 = 1;
const NFTA_GEN_PROC_PID: u16 = 2;
const NFTA_GEN_PROC_NAME: u16 = 3;
/// The inode of the initial pid namespace (`PROC_PID_INIT_INO` of linux/proc_ns.h).
const INITIAL_PROCESSES: u64 = 0xEFFF_FFFC;

/// A transaction of nftables and the process that made it, such as `firewalld (pid 812)`. Fields that the
/// kernel does not report are empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    pub number: Option<u32>,
    pub by: String,
    /// The process id, in the initial pid namespace.
    pub pid: u32,
}

/// Opens a netlink socket for messages of nftables: those of the multicast `groups` (a bit set), and replies.
///
/// # Errors
/// If the kernel has no netfilter, or refuses access.
pub fn open_socket(groups: u32) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::NETFILTER))?;
    bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    Ok(socket)
}

/// Asks the kernel for its current generation number. Needs CAP_NET_ADMIN. `None` if the kernel has no
/// nftables.
pub fn current() -> Option<u32> {
    let socket = open_socket(0).ok()?;
    let mut header = NetlinkHeader::default();
    header.length = GET_GENERATION_LENGTH.into();
    header.message_type = GET_GENERATION;
    header.flags = NLM_F_REQUEST;
    // All fields of the nfnetlink header are zero.
    let mut question = [0; GET_GENERATION_LENGTH as usize];
    header.emit(&mut question);
    send(&socket, &question, SendFlags::empty()).ok()?;
    let mut answer = [0; 1024];
    // The kernel replies before `send` returns, so this does not block.
    let (len, _) = recv(&socket, &mut answer, RecvFlags::empty()).ok()?;
    last_generation(answer.get(..len)?)?.number
}

/// Reports whether this process is in the initial pid namespace, whose ids the kernel reports.
pub fn has_initial_pids() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self/ns/pid").is_ok_and(|namespace| namespace.ino() == INITIAL_PROCESSES)
}

/// Returns the last end of a transaction among these netlink messages (RFC 3549 section 2.2).
pub fn last_generation(mut bytes: &[u8]) -> Option<Generation> {
    let mut found = None;
    while let Ok(message) = NetlinkBuffer::new_checked(bytes) {
        if message.message_type() == NEW_GENERATION {
            found = Some(generation(message.payload().get(NFNETLINK_HEADER..).unwrap_or_default()));
        }
        let length = usize::try_from(message.length()).ok()?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

fn generation(attributes: &[u8]) -> Generation {
    let mut generation = Generation { number: None, by: String::new(), pid: 0 };
    let number = |value: &[u8]| value.first_chunk().map(|bytes| u32::from_be_bytes(*bytes));
    for attribute in NlasIterator::new(attributes).map_while(Result::ok) {
        let value = attribute.value();
        match attribute.kind() {
            NFTA_GEN_ID => generation.number = number(value),
            NFTA_GEN_PROC_PID => generation.pid = number(value).unwrap_or_default(),
            NFTA_GEN_PROC_NAME => {
                let name = value.split(|byte| *byte == 0).next().unwrap_or_default();
                generation.by = String::from_utf8_lossy(name).into_owned();
            }
            _ => {}
        }
    }
    generation
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let len = u16::try_from(4 + value.len()).unwrap();
        let mut bytes = [len.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn the_end_of_a_transaction_says_whose_it_was_and_garbage_says_nothing() {
        let mut payload = vec![0; 4];
        payload.extend(attribute(1, &[0, 0, 0, 9]));
        payload.extend(attribute(2, &812_u32.to_be_bytes()));
        payload.extend(attribute(3, b"firewalld\0"));
        let len = u32::try_from(16 + payload.len()).unwrap();
        let mut bytes = len.to_ne_bytes().to_vec();
        bytes.extend(NEW_GENERATION.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(payload);
        let expected = Generation { number: Some(9), by: "firewalld".into(), pid: 812 };
        assert_eq!(last_generation(&bytes), Some(expected));
        for len in 0..bytes.len() {
            _ = last_generation(&bytes[..len]);
        }
        assert_eq!(last_generation(&[0; 64]), None);
        assert_eq!(last_generation(&[255; 64]), None);
    }
}
