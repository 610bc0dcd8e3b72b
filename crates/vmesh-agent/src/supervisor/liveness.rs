//! Detects from the kernel's socket tables whether an Envoy whose admin interface is silent still serves connections.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};
use vmesh_capture::sockets::Socket;

use super::clients;
use crate::envoy::shutdown::POLL_SOON;

/// Time in which one of Envoy's workers must accept a connection.
const ACCEPTS_WITHIN: Duration = Duration::from_secs(2);
/// Largest number of listeners that a probe dials, one after the other.
const DIALED: usize = 3;
/// With fewer free file descriptors than this, a process may be unable to accept an admin connection or to answer it.
const SPARE_FILES: usize = 4;

/// Evidence that an Envoy with a silent admin interface still serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ServingEvidence {
    /// A worker accepted a new connection.
    AcceptsConnections,
    /// Envoy has no file descriptors left, but serves the open connections.
    OutOfDescriptors,
}

impl ServingEvidence {
    pub(super) fn reason(self) -> &'static str {
        match self {
            ServingEvidence::AcceptsConnections => "it still accepts connections, so it is not killed",
            ServingEvidence::OutOfDescriptors => {
                "it has no file descriptors left (`LimitNOFILE=` of its unit), but serves its open connections, so it is not killed"
            }
        }
    }
}

/// Looks for evidence that the process serves connections.
pub(super) async fn find_evidence(pid: i32) -> Option<ServingEvidence> {
    // The kernel completes connections to a stopped process (SIGSTOP), which does not serve them.
    if is_stopped(pid) {
        return None;
    }
    if is_out_of_files(pid).unwrap_or(false) {
        return Some(ServingEvidence::OutOfDescriptors);
    }
    for address in listeners(pid).unwrap_or_default().into_iter().take(DIALED) {
        if is_accepted(pid, address).await {
            return Some(ServingEvidence::AcceptsConnections);
        }
    }
    None
}

fn is_stopped(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_whitespace().next());
    matches!(state, None | Some("T" | "t" | "Z" | "X"))
}

fn is_out_of_files(pid: i32) -> Option<bool> {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    let limit = line.split_whitespace().next()?.parse::<usize>().ok()?;
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
    Some(open + SPARE_FILES > limit)
}

/// Returns the addresses on which the process listens, without duplicates.
fn listeners(pid: i32) -> io::Result<Vec<SocketAddr>> {
    let own = clients::socket_inodes(pid)?;
    let mut all: Vec<SocketAddr> = clients::socket_table(pid)?
        .iter()
        .filter(|socket| socket.listens() && own.contains(&socket.inode))
        .map(|socket| socket.local)
        .collect();
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

/// Connects to `listener`, and waits until the process accepts the connection. Before that, the kernel lists the socket without an inode.
async fn is_accepted(pid: i32, listener: SocketAddr) -> bool {
    let ip = match listener.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let to = SocketAddr::new(ip, listener.port());
    let Ok(Ok(stream)) = timeout(ACCEPTS_WITHIN, TcpStream::connect(to)).await else { return false };
    let Ok(from) = stream.local_addr() else { return false };
    let deadline = Instant::now() + ACCEPTS_WITHIN;
    let is_ours = |socket: &&Socket| {
        !socket.listens()
            && socket.local.port() == to.port()
            && socket.remote == SocketAddr::new(from.ip().to_canonical(), from.port())
    };
    while Instant::now() < deadline {
        sleep(POLL_SOON).await;
        let Ok(table) = clients::socket_table(pid) else { return false };
        match table.iter().find(is_ours) {
            // The server's end is gone: the process accepted the connection and closed it.
            None => return true,
            // After the process closed its end, the kernel lists the socket without an inode until the client closes too.
            Some(socket) if socket.inode != 0 || socket.is_closed_here() => return true,
            Some(_) => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_that_only_the_kernel_has_taken_is_no_sign_of_life() {
        let pid = std::process::id().cast_signed();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        assert!(listeners(pid).unwrap().contains(&address));
        assert!(!is_accepted(pid, address).await);
        // On a busy machine an attempt may time out before this process is scheduled.
        let is_accepted_in_the_end = async || {
            for _ in 0..10 {
                if is_accepted(pid, address).await {
                    return true;
                }
            }
            false
        };
        let serve = async {
            let mut open = Vec::new();
            loop {
                open.push(listener.accept().await.unwrap());
            }
        };
        tokio::select! {
            taken = is_accepted_in_the_end() => assert!(taken),
            () = serve => {}
        }
        let closes = async {
            loop {
                drop(listener.accept().await.unwrap());
            }
        };
        tokio::select! {
            taken = is_accepted_in_the_end() => assert!(taken),
            () = closes => {}
        }
        assert_eq!(is_out_of_files(pid), Some(false));
        assert!(!is_stopped(pid) && is_stopped(-1));
    }
}
