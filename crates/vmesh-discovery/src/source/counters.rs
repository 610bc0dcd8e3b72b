//! Counters of a source.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::guard::HoldKind;

/// Counters of a source, for metrics and `vmeshctl discovery`. Each is a total since the start, except the
/// gauges [`Counters::connections`] and [`Counters::missing`].
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests to the registry, reads of a file, or lines of a plug-in.
    pub reads: AtomicU64,
    /// The reads that failed.
    pub failed_reads: AtomicU64,
    /// Records that were left out because they are invalid, counted once per read.
    pub bad_records: AtomicU64,
    /// Consul: blocking queries whose index went backwards or was missing.
    pub index_resets: AtomicU64,
    /// ZooKeeper: sessions that expired.
    pub sessions_expired: AtomicU64,
    /// Connections that were established, including the first.
    pub connects: AtomicU64,
    /// Connections that are open at present.
    pub connections: AtomicU64,
    /// Services with a change that the guard held; with [`HoldKind::Fleet`] also the source as a whole.
    pub held: HoldCounts,
    /// Held changes that were never believed, because the missing services or endpoints came back.
    pub rejected: HoldCounts,
    /// Endpoints that are served at present although the source no longer lists them.
    pub missing: AtomicU64,
    /// The timestamp of the last answer, in Unix milliseconds; 0 before the first answer.
    answered_millis: AtomicU64,
}

impl Counters {
    /// Records that the source has just answered, whether or not the answer differs from the previous one. A
    /// source calls this for every good answer; [`follow`](super::follow) calls it for every view.
    pub fn record_answer(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.answered_millis.store(u64::try_from(now.as_millis()).unwrap_or(u64::MAX), Relaxed);
    }

    /// Returns when the source last answered, or `None` if it has not answered since the start.
    pub fn last_answer(&self) -> Option<SystemTime> {
        match self.answered_millis.load(Relaxed) {
            0 => None,
            millis => Some(UNIX_EPOCH + Duration::from_millis(millis)),
        }
    }
}

/// A count for each [`HoldKind`].
#[derive(Debug, Default)]
pub struct HoldCounts([AtomicU64; HoldKind::ALL.len()]);

impl HoldCounts {
    pub fn add(&self, kind: HoldKind) {
        for (_, count) in self.pairs().filter(|(of, _)| *of == kind) {
            count.fetch_add(1, Relaxed);
        }
    }

    pub fn all(&self) -> impl Iterator<Item = (HoldKind, u64)> {
        self.pairs().map(|(kind, count)| (kind, count.load(Relaxed)))
    }

    fn pairs(&self) -> impl Iterator<Item = (HoldKind, &AtomicU64)> {
        HoldKind::ALL.into_iter().zip(&self.0)
    }
}
