//! Keeps complete and current copies of ZooKeeper subtrees, across lost servers and sessions.
//!
//! One task keeps one session for all roots of a mirror. After each connection, including the first, it sets
//! new watches, then drops the old ones, lets the server catch up with its leader (`sync`), reads everything
//! and compares. From then on each event leads to one read of the affected nodes; events that arrive during a
//! read are processed together. At intervals of minutes the mirror reads all nodes even without an event.
//!
//! | event | reaction |
//! |---|---|
//! | the connection is lost | keeps the view, marks it stale, connects to another server |
//! | the session expires | the same, with a new session |
//! | no server has a quorum | reads once from a server that still answers reads, if there is no view yet; the view is stale in any case |
//! | a node may not be read | keeps the node's last content with the reason; tries again every half minute |
//! | a root does not exist | the root is absent; a watch reports its creation |
//! | credentials or certificates change | opens a new session, when a connection is lost or within half a minute |

mod dirty_paths;
mod driver;
#[cfg(test)]
mod tests;
mod watches;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::sleep;
use vmesh_backoff::Backoff;

use crate::config::Config;
pub use crate::root::Root;
use crate::session::{Error, EventSink, SessionEvent, session_backoff};
use crate::tree::Node;
use driver::Driver;

/// A mirror's copy of all its roots.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View {
    /// One entry per root, in the order of [`Mirror::new`]; empty until everything was read once.
    pub roots: Vec<RootView>,
    /// The reason why the copy may be out of date.
    pub stale_because: Option<Arc<str>>,
}

/// A mirror's copy of one root.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RootView {
    /// `None` if the root node does not exist or was never readable.
    pub tree: Option<Arc<Node>>,
    /// The reason why the root cannot be read now; `tree` is then its last known content.
    pub failed: Option<Arc<str>>,
}

type ConfirmReply = oneshot::Sender<Result<View, Error>>;

/// Mirrors some roots. Dropping the mirror ends its task and its session.
pub struct Mirror {
    shared: Arc<MirrorShared>,
    views: watch::Receiver<View>,
    confirms: mpsc::Sender<ConfirmReply>,
    driver: JoinSet<()>,
    backoff: Backoff,
}

struct MirrorShared {
    config: Config,
    roots: Vec<Root>,
    count: EventSink,
    views: watch::Sender<View>,
}

impl Mirror {
    /// Makes a mirror. It connects when [`Mirror::changed`] or [`Mirror::confirm`] is first polled, which needs
    /// a tokio runtime.
    pub fn new(
        config: Config,
        roots: Vec<Root>,
        count: impl Fn(SessionEvent) + Send + Sync + 'static,
    ) -> Mirror {
        let (publish, views) = watch::channel(View::default());
        let shared = Arc::new(MirrorShared { config, roots, count: Arc::new(count), views: publish });
        let (confirms, _) = mpsc::channel(1);
        Mirror { shared, views, confirms, driver: JoinSet::new(), backoff: session_backoff() }
    }

    /// Waits for a view that differs from the last one that this returned. Dropping the future loses no change.
    pub async fn changed(&mut self) -> View {
        loop {
            self.drive(Duration::ZERO);
            tokio::select! {
                changed = self.views.changed() => {
                    if changed.is_ok() {
                        return self.views.borrow_and_update().clone();
                    }
                }
                _ = self.driver.join_next() => self.restart(),
            }
        }
    }

    /// Returns the current view.
    pub fn view(&self) -> View {
        self.views.borrow().clone()
    }

    /// Reads everything again, after the server has caught up with its leader, and returns the resulting view.
    pub async fn confirm(&mut self) -> Result<View, Error> {
        self.drive(Duration::ZERO);
        let (reply, answer) = oneshot::channel();
        self.confirms.send(reply).await.map_err(|_| Error::Ended)?;
        answer.await.map_err(|_| Error::Ended)?
    }

    fn drive(&mut self, wait: Duration) {
        if !self.driver.is_empty() {
            return;
        }
        let (confirms, asked) = mpsc::channel(1);
        self.confirms = confirms;
        let driver = Driver::new(self.shared.clone(), asked);
        self.driver.spawn(async move {
            sleep(wait).await;
            driver.run().await;
        });
    }

    /// Starts a new driver. A driver ends only by a panic, its own or the client's.
    fn restart(&mut self) {
        let because: Arc<str> = Error::Ended.line().into();
        self.shared.views.send_modify(|view| view.stale_because = Some(because));
        let wait = self.backoff.next_pause();
        self.drive(wait);
    }
}

/// Returns the node at the `relative` path in `tree`.
fn child<'a>(tree: &'a Arc<Node>, relative: &str) -> Option<&'a Arc<Node>> {
    crate::tree::segments(relative).try_fold(tree, |node, segment| node.children.get(segment))
}
