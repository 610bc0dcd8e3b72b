use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use vmesh_daemon::connections::Permit;

/// Counts the admitted streams of one connection. The server closes a connection that has had none for a while.
pub(super) struct ConnectionUse {
    permit: Option<Permit>,
    admitted: AtomicUsize,
    changed: Notify,
    ends_at: Option<Instant>,
}

/// One admitted stream, for as long as it exists.
pub(super) struct InUse(Arc<ConnectionUse>);

impl ConnectionUse {
    /// `ends_at`: when streams that still exist end by themselves.
    pub(super) fn new(permit: Option<Permit>, ends_at: Option<Instant>) -> Arc<ConnectionUse> {
        Arc::new(ConnectionUse { permit, admitted: AtomicUsize::new(0), changed: Notify::new(), ends_at })
    }

    pub(super) fn ends_at(&self) -> Option<Instant> {
        self.ends_at
    }

    pub(super) fn begin(self: &Arc<ConnectionUse>) -> InUse {
        if self.admitted.fetch_add(1, Ordering::AcqRel) == 0 {
            if let Some(permit) = &self.permit {
                permit.set_busy();
            }
            self.changed.notify_one();
        }
        InUse(self.clone())
    }

    /// Waits until the connection has had no admitted stream for `first`, or later for `later`.
    pub(super) async fn unused(&self, first: Duration, later: Duration) {
        let mut patience = first;
        loop {
            if self.admitted.load(Ordering::Acquire) > 0 {
                patience = later;
                self.changed.notified().await;
                continue;
            }
            tokio::select! {
                () = sleep(patience) => if self.admitted.load(Ordering::Acquire) == 0 { return },
                () = self.changed.notified() => {}
            }
        }
    }

    /// Waits until the connection has to make room for others.
    pub(super) async fn evicted(&self) {
        match &self.permit {
            Some(permit) => permit.evicted().await,
            None => std::future::pending().await,
        }
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        if self.0.admitted.fetch_sub(1, Ordering::AcqRel) == 1 {
            if let Some(permit) = &self.0.permit {
                permit.set_idle();
            }
            self.0.changed.notify_one();
        }
    }
}
