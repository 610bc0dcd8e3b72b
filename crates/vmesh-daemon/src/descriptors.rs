//! The limit of open file descriptors, and the share of it that connections may use.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors that no connection of a client may take: for the daemon's own files, its state, its registries, its
/// children and its other sockets.
pub const RESERVED: usize = 256;
/// Stands for "no limit". No host reaches this number of connections.
const UNLIMITED: u64 = 1 << 20;

/// Raises the soft limit of open files to the hard one, and returns the limit that holds then. The soft limit of most
/// systems is 1,024, which a fleet exceeds; children inherit it.
pub fn raise_limit() -> usize {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!("the limit of open files stays at {:?}: {error}", limit.current);
    }
    usize::try_from(getrlimit(Resource::Nofile).current.unwrap_or(UNLIMITED)).unwrap_or(usize::MAX)
}

/// Returns the number of descriptors that connections may use under `limit`. Connections get at least half of a small limit.
pub fn for_connections(limit: usize) -> usize {
    limit.saturating_sub(RESERVED.min(limit / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_to_the_daemon() {
        assert_eq!(for_connections(1024), 768);
        assert_eq!(for_connections(100), 50);
        assert_eq!(for_connections(0), 0);
    }

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let hard = getrlimit(Resource::Nofile).maximum;
        let raised = raise_limit();
        assert_eq!(getrlimit(Resource::Nofile).current, hard);
        assert_eq!(raised as u64, hard.unwrap_or(UNLIMITED));
    }
}
