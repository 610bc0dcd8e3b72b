//! Watches for changes of nftables rules, which the kernel reports together with the process that made them.
//! Legacy iptables does not change nftables, so its rules are checked on a timer.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{RecvFlags, recv};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use vmesh_capture::generations::{self, Generation};

/// `NFNLGRP_NFTABLES` of linux/netfilter/nfnetlink.h, as a bit of the group mask.
const GROUP: u32 = 1 << (7 - 1);

/// The most transactions that wait for the keeper.
pub const MAX_PENDING: usize = 64;

/// Reports each transaction to `transactions`. None is left out because another one waits: the one that waits may be vmesh's own, which the keeper
/// ignores. While the channel is full, the kernel keeps reports, and drops them when its buffer is full; a dropped report counts as a
/// change by an unknown process.
pub async fn watch(transactions: mpsc::Sender<Generation>) {
    let socket = match open() {
        Ok(socket) => socket,
        Err(error) => {
            tracing::warn!(
                "could not open a netlink socket, so vmesh-net sees a change of rules by another program after up to 10 s: {error}"
            );
            return std::future::pending().await;
        }
    };
    let mut buffer = vec![0; 64 << 10];
    loop {
        let changed = match receive(&socket, &mut buffer).await {
            Ok(len) => generations::last_generation(buffer.get(..len).unwrap_or_default()),
            // ENOBUFS: the kernel dropped some reports. One report is enough.
            Err(_) => Some(Generation { number: None, by: String::new(), pid: 0 }),
        };
        if let Some(changed) = changed
            && transactions.send(changed).await.is_err()
        {
            // The keeper has ended.
            return std::future::pending().await;
        }
    }
}

#[expect(deprecated, reason = "AsyncFd owns the descriptor, and closes it after it is deregistered")]
fn open() -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(generations::open_socket(GROUP)?)
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
