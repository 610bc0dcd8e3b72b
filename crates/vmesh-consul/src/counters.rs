//! [`Counters`] of a client.

use std::sync::atomic::AtomicU64;

/// Counters since the start.
#[derive(Debug, Default)]
pub struct Counters {
    pub requests: AtomicU64,
    /// Requests without a usable answer.
    pub failures: AtomicU64,
    /// Connections made.
    pub connects: AtomicU64,
    /// Connections that are open now.
    pub connections: AtomicU64,
    /// The number of answers with an index that went back or was missing.
    pub index_resets: AtomicU64,
}
