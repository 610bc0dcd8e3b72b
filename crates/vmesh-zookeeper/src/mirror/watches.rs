//! The events of a connection, from watches of either kind.

use std::future::{Future, poll_fn};
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::task::Poll;

use zookeeper_client as zk;

use crate::bulk_read::OneShots;

/// The source of events: watches of either kind.
pub(super) enum Watches {
    Persistent(Vec<zk::PersistentWatcher>),
    OneShot(OneShots),
}

impl Watches {
    /// Waits for the next event and returns it with the index of its root. Dropping the future loses no event.
    pub(super) async fn next(&mut self) -> (usize, zk::WatchedEvent) {
        match self {
            Watches::Persistent(watchers) => next_event(watchers).await,
            Watches::OneShot(armed) => match armed.join_next().await {
                Some(Ok(event)) => event,
                // The watch ended without an event because the client's own task has ended.
                Some(Err(_)) => (0, zk::WatchedEvent::new_session(zk::SessionState::Closed)),
                None => std::future::pending().await,
            },
        }
    }

    /// Returns an event that has already arrived.
    pub(super) fn try_next(&mut self) -> Option<(usize, zk::WatchedEvent)> {
        match self {
            Watches::Persistent(watchers) => poll_now(next_event(watchers)),
            Watches::OneShot(armed) => match armed.try_join_next()? {
                Ok(event) => Some(event),
                Err(_) => Some((0, zk::WatchedEvent::new_session(zk::SessionState::Closed))),
            },
        }
    }
}

async fn next_event(watchers: &mut [zk::PersistentWatcher]) -> (usize, zk::WatchedEvent) {
    let mut waiting: Vec<_> = watchers.iter_mut().map(|watcher| Box::pin(watcher.changed())).collect();
    poll_fn(|context| {
        for (root, waiting) in waiting.iter_mut().enumerate() {
            // The client panics if its own task has ended. Here this counts as the end of the session.
            let polled = std::panic::catch_unwind(AssertUnwindSafe(|| waiting.as_mut().poll(context)));
            match polled {
                Ok(Poll::Ready(event)) => return Poll::Ready((root, event)),
                Ok(Poll::Pending) => {}
                Err(_) => {
                    let closed = zk::WatchedEvent::new_session(zk::SessionState::Closed);
                    return Poll::Ready((root, closed));
                }
            }
        }
        Poll::Pending
    })
    .await
}

/// Polls a future once and returns its result if it is ready.
fn poll_now<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match pin!(future).poll(&mut context) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}
