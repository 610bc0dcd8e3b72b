use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use vmesh_daemon::connections::Permit;

/// Counts the admitted streams of one connection. The server closes a connection that has had no admitted
/// stream for a while.
pub(super) struct ConnectionUse {
    permit: Option<Permit>,
    streams: Mutex<Streams>,
    changed: Notify,
    ends_at: Option<Instant>,
}

#[derive(Default)]
struct Streams {
    admitted: usize,
    has_shown_request: bool,
}

/// One admitted stream in the count. Dropping the guard removes it.
pub(super) struct StreamGuard(Arc<ConnectionUse>);

impl ConnectionUse {
    /// `ends_at` is the time at which the streams of this connection end by themselves.
    pub(super) fn new(permit: Option<Permit>, ends_at: Option<Instant>) -> Arc<ConnectionUse> {
        Arc::new(ConnectionUse { permit, streams: Mutex::default(), changed: Notify::new(), ends_at })
    }

    pub(super) fn ends_at(&self) -> Option<Instant> {
        self.ends_at
    }

    /// Notes that the client has sent a request. A busy server may need seconds to admit its stream, and the
    /// gate evicts only connections without a request; a connection whose request is never admitted is closed
    /// by [`ConnectionUse::unused`].
    pub(super) fn show_request(&self) {
        let mut streams = self.streams();
        if !std::mem::replace(&mut streams.has_shown_request, true)
            && let Some(permit) = &self.permit
        {
            permit.set_busy();
        }
    }

    /// Notes that the server has read everything that the client has sent so far.
    pub(super) fn set_silent(&self) {
        if let Some(permit) = &self.permit {
            permit.set_silent();
        }
    }

    pub(super) fn begin_stream(self: &Arc<ConnectionUse>) -> StreamGuard {
        let mut streams = self.streams();
        streams.admitted += 1;
        if streams.admitted == 1 {
            if let Some(permit) = &self.permit {
                permit.set_busy();
            }
            self.changed.notify_one();
        }
        drop(streams);
        StreamGuard(self.clone())
    }

    fn is_admitted(&self) -> bool {
        self.streams().admitted > 0
    }

    /// Locks the count. No code panics while it holds this lock.
    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the connection has had no admitted stream for `first`, or, after its first stream, for
    /// `later`.
    pub(super) async fn unused(&self, first: Duration, later: Duration) {
        let mut limit = first;
        loop {
            if self.is_admitted() {
                limit = later;
                self.changed.notified().await;
                continue;
            }
            tokio::select! {
                () = sleep(limit) => if !self.is_admitted() { return },
                () = self.changed.notified() => {}
            }
        }
    }

    /// Waits until the gate evicts the connection to make room for others.
    pub(super) async fn evicted(&self) {
        match &self.permit {
            Some(permit) => permit.evicted().await,
            None => std::future::pending().await,
        }
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        // The count and the permit change under one lock, since another stream of the connection may begin at
        // the same moment.
        let mut streams = self.0.streams();
        streams.admitted = streams.admitted.saturating_sub(1);
        if streams.admitted == 0 {
            if let Some(permit) = &self.0.permit {
                permit.set_idle();
            }
            self.0.changed.notify_one();
        }
    }
}
