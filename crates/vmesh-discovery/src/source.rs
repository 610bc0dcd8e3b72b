//! The trait [`Source`], the view of a source, and [`follow`], the task that publishes it.

mod counters;
mod events;
mod follow;

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use vmesh_backoff::Backoff;
use vmesh_model::{ServiceName, State};
use vmesh_text::printable;

use crate::guard::HeldChange;
pub use crate::registrations::{Extent, Registrations, ServiceView};
use crate::resolve::UnresolvedNames;
pub use counters::{Counters, HoldCounts};
pub use events::{Event, Events};
pub use follow::{Command, Handle, Link, follow, link};

/// A discovery system that vmesh reads services from. Each implementation has its own module.
pub trait Source: Send + 'static {
    /// Waits for the next view and returns it.
    ///
    /// A view is always complete, never a delta, so nothing has to be resynchronised after an error, a
    /// restart or a missed event. Dropping the future loses no data. A source paces its own requests to a
    /// failing registry; after an error, [`follow`] waits at most 2 s before it calls `next` again.
    fn next(&mut self) -> impl Future<Output = Result<Registrations, SourceError>> + Send;

    /// Reads `services` again with the strongest consistency the source offers and returns the complete view
    /// that results.
    ///
    /// The guard asks for this when a service lost most or all of its endpoints. Consul reads with
    /// `consistent`, ZooKeeper sends a `sync` first, and a file is read once more.
    fn confirm(
        &mut self,
        services: &BTreeSet<ServiceName>,
    ) -> impl Future<Output = Result<Registrations, SourceError>> + Send;
}

/// The error of a source that has no view to give.
///
/// `Display` escapes text quoted from a registry, which may contain control characters that a terminal acts
/// on.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("discovery source `{}` could not {}", printable(source_name), printable(action))]
    Failed {
        source_name: Arc<str>,
        /// The attempted action, for example `read /etc/vmesh/services.d`.
        action: String,
        #[source]
        cause: Box<dyn Error + Send + Sync>,
    },
    /// The source answered, but the answer looks like an accident.
    #[error("discovery source `{}`: {}", printable(source_name), printable(suspicion))]
    Suspect { source_name: Arc<str>, suspicion: String },
}

/// The state of a source: its last good view, and whether that view is current.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// The last good view. `None` until the source first answers; nothing may be served before that.
    pub last_good: Option<Arc<Registrations>>,
    /// The reason why the source does not answer; `None` if it answers.
    pub stale_because: Option<Arc<str>>,
    /// The changes that the guard holds: those of the source as a whole first, then each service.
    pub held: Arc<[HeldChange]>,
    /// The time when the operator froze the source; `None` if changes of the source are applied.
    pub frozen: Option<SystemTime>,
    /// The reason why the first view since the start may not be served: a part of it cannot be read and has
    /// no last good state.
    pub unusable: Option<Arc<str>>,
    /// Host names of endpoints that do not resolve at present.
    pub unresolved: Arc<UnresolvedNames>,
}

/// The reason why a [`View::restored`] is stale, until the source answers or fails with a reason of its own.
pub const NOT_ANSWERED_YET: &str = "the source has not answered since the start; its view from before the \
                                    start is in force";

impl View {
    /// Returns the view that was good before a restart. It is served until the source answers, however long
    /// that takes.
    pub fn restored(last_good: Arc<Registrations>) -> View {
        View { last_good: Some(last_good), stale_because: Some(NOT_ANSWERED_YET.into()), ..View::default() }
    }

    /// Returns the services. A fresh service is marked stale while the source as a whole is stale.
    pub fn services(&self) -> impl Iterator<Item = (&ServiceName, ServiceView)> {
        let services = self.last_good.iter().flat_map(|last_good| &last_good.services);
        services.map(|(name, service_view)| {
            let mut service_view = service_view.clone();
            if let (State::Fresh, Some(because)) = (service_view.state, &self.stale_because) {
                service_view.state = State::Stale;
                service_view.because = Some(because.clone());
            }
            (name, service_view)
        })
    }
}

/// Returns an error and its causes in one line, escaped for terminals and logs.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    printable(&line).into_owned()
}

/// Returns `text` escaped for terminals and logs; a clean text keeps its pointer.
pub(crate) fn escape_text(text: &Arc<str>) -> Arc<str> {
    match printable(text) {
        Cow::Borrowed(_) => text.clone(),
        Cow::Owned(escaped) => escaped.into(),
    }
}

/// Makes the back-off between calls of a failing [`Source`]: 100 ms at first, doubled after each failure up to 2 s.
///
/// It only keeps a source that fails at once from spinning: sources pace their own requests, and events that
/// arrive during the wait are not lost.
pub(crate) fn call_backoff() -> Backoff {
    Backoff::doubling(Duration::from_millis(100), Duration::from_secs(2))
}

#[cfg(test)]
mod tests;
