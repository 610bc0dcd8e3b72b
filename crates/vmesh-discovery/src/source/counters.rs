//! What a source counts.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::guard::Kind;

/// What a source counts, for metrics and `vmeshctl discovery`. Each is a total since the start, but for
/// [`Counters::connections`] and [`Counters::missing`].
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests to the registry, reads of a file, lines of a plug-in.
    pub reads: AtomicU64,
    /// Those that failed.
    pub failed_reads: AtomicU64,
    /// Records that were left out because they make no sense, counted once per reading.
    pub bad_records: AtomicU64,
    /// Consul: the index went back or was missing.
    pub index_resets: AtomicU64,
    /// ZooKeeper: sessions that expired.
    pub sessions_expired: AtomicU64,
    /// Connections that were made, the first included.
    pub connects: AtomicU64,
    /// Connections that are open now.
    pub connections: AtomicU64,
    /// Services of which something was not believed at once; with [`Kind::Fleet`] also the source as a whole.
    pub held: ByKind,
    /// Those of which it was not believed at all: what was missing came back.
    pub rejected: ByKind,
    /// Endpoints that are shown now although the source does not name them.
    pub missing: AtomicU64,
    /// When the source last answered, in milliseconds of Unix time.
    answered: AtomicU64,
}

impl Counters {
    /// The source has answered just now, be it that nothing is new. A source calls it for every good answer;
    /// [`follow`](super::follow) for every view.
    pub fn answered_now(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.answered.store(u64::try_from(now.as_millis()).unwrap_or(u64::MAX), Relaxed);
    }

    /// When it last did since the start.
    pub fn answered(&self) -> Option<SystemTime> {
        match self.answered.load(Relaxed) {
            0 => None,
            millis => Some(UNIX_EPOCH + Duration::from_millis(millis)),
        }
    }
}

/// A count for each [`Kind`].
#[derive(Debug, Default)]
pub struct ByKind([AtomicU64; Kind::ALL.len()]);

impl ByKind {
    pub fn add(&self, kind: Kind) {
        for (_, count) in self.pairs().filter(|(of, _)| *of == kind) {
            count.fetch_add(1, Relaxed);
        }
    }

    pub fn all(&self) -> impl Iterator<Item = (Kind, u64)> {
        self.pairs().map(|(kind, count)| (kind, count.load(Relaxed)))
    }

    fn pairs(&self) -> impl Iterator<Item = (Kind, &AtomicU64)> {
        Kind::ALL.into_iter().zip(&self.0)
    }
}
