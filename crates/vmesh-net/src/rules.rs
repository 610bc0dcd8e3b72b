//! The kernel's word that rules of nftables changed, and whose doing it was. Legacy iptables changes nothing of nftables, and is
//! looked at on a timer.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::netlink::{self, SocketAddrNetlink};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

/// Who changed rules: `firewalld (pid 812)`. Empty where the kernel does not say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    pub by: String,
    pub pid: u32,
}

/// `NFNLGRP_NFTABLES` of linux/netfilter/nfnetlink.h, as a bit of the mask.
const GROUP: u32 = 1 << (7 - 1);
/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN`: what ends each transaction.
const NEW_GENERATION: u16 = (10 << 8) | 15;
const NFTA_GEN_PROC_PID: u16 = 2;
const NFTA_GEN_PROC_NAME: u16 = 3;

/// Tells of each transaction; those that come while nobody listens are told as one.
pub async fn watch(told: mpsc::Sender<Changed>) {
    let socket = match open() {
        Ok(socket) => socket,
        Err(error) => {
            tracing::warn!(
                "changes of rules by others are noticed within 10 s and not at once: no socket for the kernel's notices: {error}"
            );
            return std::future::pending().await;
        }
    };
    let mut buffer = vec![0; 64 << 10];
    loop {
        let changed = match receive(&socket, &mut buffer).await {
            Ok(len) => generation(buffer.get(..len).unwrap_or_default()),
            // ENOBUFS: so many changes that some were lost; one will do.
            Err(_) => Some(Changed { by: String::new(), pid: 0 }),
        };
        if let Some(changed) = changed {
            // One that waits already says as much.
            _ = told.try_send(changed);
        }
    }
}

#[expect(deprecated, reason = "what is registered is owned by what registers it, and closed after it")]
fn open() -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::NETFILTER))?;
    bind(&socket, &SocketAddrNetlink::new(0, GROUP))?;
    AsyncFd::new(socket)
}

async fn receive(socket: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut ready = socket.readable().await?;
        let received = ready.try_io(|socket| Ok(recv(socket, &mut *buffer, RecvFlags::empty())?.0));
        match received {
            Ok(done) => return done,
            Err(_) => continue,
        }
    }
}

/// The end of a transaction among these netlink messages (RFC 3549 section 2.2), and who made it.
fn generation(mut bytes: &[u8]) -> Option<Changed> {
    let mut found = None;
    while let Some((message, kind, rest)) = message(bytes) {
        if kind == NEW_GENERATION {
            // After the header of nfnetlink, four bytes.
            found = Some(who(message.get(4..).unwrap_or_default()));
        }
        bytes = rest;
    }
    found
}

/// The payload and the kind of the first message, and what follows it.
fn message(bytes: &[u8]) -> Option<(&[u8], u16, &[u8])> {
    let len = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()?;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let payload = bytes.get(16..len)?;
    let rest = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    Some((payload, kind, rest))
}

fn who(mut attributes: &[u8]) -> Changed {
    let mut changed = Changed { by: String::new(), pid: 0 };
    while let Some((value, kind, rest)) = attribute(attributes) {
        match kind {
            NFTA_GEN_PROC_PID => {
                changed.pid = value.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
            }
            NFTA_GEN_PROC_NAME => {
                let name = value.split(|byte| *byte == 0).next().unwrap_or_default();
                changed.by = String::from_utf8_lossy(name).into_owned();
            }
            _ => {}
        }
        attributes = rest;
    }
    changed
}

fn attribute(bytes: &[u8]) -> Option<(&[u8], u16, &[u8])> {
    let len = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
    // The two high bits are flags.
    let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & 0x3fff;
    let value = bytes.get(4..len)?;
    Some((value, kind, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
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
        assert_eq!(generation(&bytes), Some(Changed { by: "firewalld".into(), pid: 812 }));
        for len in 0..bytes.len() {
            _ = generation(&bytes[..len]);
        }
        assert_eq!(generation(&[0; 64]), None);
        assert_eq!(generation(&[255; 64]), None);
    }
}
