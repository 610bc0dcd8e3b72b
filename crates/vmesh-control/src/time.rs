//! The clock and timers of the control plane.

use std::time::{SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// Returns the current Unix time, in seconds.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Waits until `deadline`, or indefinitely if it is `None`.
pub(crate) async fn wait_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
