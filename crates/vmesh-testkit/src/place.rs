//! Addresses, ports and directories that no other test uses.

use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::{Failed, Result};

/// A loopback address (127.x.y.z) that belongs to this test while the value exists. So two tests, even in two
/// processes, can both use port 15008 on their own address.
#[derive(Debug)]
pub struct Loopback {
    ip: Ipv4Addr,
    /// A socket that marks the address as taken. Another test fails to bind it, and tries the next address.
    _claim: UdpSocket,
}

const CLAIM_PORT: u16 = 58_999;

impl Loopback {
    pub fn unique() -> Result<Loopback> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let start = std::process::id().wrapping_mul(977);
        for _ in 0..10_000 {
            let number = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
            let [_, a, b, c] = number.to_be_bytes();
            // 127.0.0.0/16 is used by people and resolvers.
            let ip = Ipv4Addr::new(127, a.clamp(1, 254), b, c.clamp(1, 254));
            if let Ok(claim) = UdpSocket::bind((ip, CLAIM_PORT)) {
                return Ok(Loopback { ip, _claim: claim });
            }
        }
        Err(Failed::new("found no free address in 127.0.0.0/8: is the loopback interface up?"))
    }

    pub fn ip(&self) -> IpAddr {
        self.ip.into()
    }

    /// Returns a free port of this address. It stays free, because no other test uses the address.
    pub fn port(&self) -> Result<u16> {
        free_port(self.ip())
    }
}

impl std::fmt::Display for Loopback {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.ip.fmt(f)
    }
}

/// Returns a TCP port that is free on `ip` now.
pub fn free_port(ip: IpAddr) -> Result<u16> {
    let bound = TcpListener::bind((ip, 0)).and_then(|listener| listener.local_addr());
    Ok(bound.map_err(Failed::to(format!("could not bind a port on {ip}")))?.port())
}

/// A directory of the test. Dropping it removes it with its content, unless `VMESH_KEEP` is set.
///
/// Processes that outlive their parent by design (an Envoy whose agent was killed) have a file of this
/// directory on their command line. They are killed before the directory is removed.
#[derive(Debug)]
pub struct TempDir(PathBuf);

/// Creates a new [`TempDir`]. Its path is short, because the path of a Unix socket may have at most 107
/// bytes.
pub fn tempdir() -> Result<TempDir> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("vmesh-{}-{number}", std::process::id()));
    // A leftover of an earlier process with the same id.
    _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir(&path).map_err(Failed::to(format!("could not create {}", path.display())))?;
    Ok(TempDir(path))
}

impl Deref for TempDir {
    type Target = Path;
    fn deref(&self) -> &Path {
        &self.0
    }
}

impl AsRef<Path> for TempDir {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        crate::process::kill_those_naming(&self.0);
        if std::env::var_os("VMESH_KEEP").is_some() {
            eprintln!("kept {}", self.0.display());
        } else {
            _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_tests_get_two_addresses() {
        let (one, two) = (Loopback::unique().unwrap(), Loopback::unique().unwrap());
        assert_ne!(one.ip(), two.ip());
        assert!(one.ip().is_loopback() && two.ip().is_loopback());
        let port = one.port().unwrap();
        let _both =
            (TcpListener::bind((one.ip(), port)).unwrap(), TcpListener::bind((two.ip(), port)).unwrap());
    }

    #[test]
    fn a_directory_is_gone_after_its_test() {
        let dir = tempdir().unwrap();
        let path = dir.to_owned();
        std::fs::write(dir.join("file"), "").unwrap();
        drop(dir);
        assert_eq!(path.exists(), std::env::var_os("VMESH_KEEP").is_some());
    }
}
