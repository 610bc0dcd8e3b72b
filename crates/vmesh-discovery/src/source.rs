//! What a discovery source is, and how its views are followed.

mod counters;
mod events;
mod follow;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use vmesh_model::{Problem, Registration, ServiceName, State};
use vmesh_text::printable;

use crate::guard::Held;
use crate::resolve::UnresolvedNames;
pub use counters::{ByKind, Counters};
pub use events::{Event, Events};
pub use follow::{Command, Handle, Link, follow, link};

/// One discovery system. One implementation per file: `file.rs`.
pub trait Source: Send + 'static {
    /// Waits for the next view. Always the complete view, never a delta: after an error, a restart or a missed event
    /// there is nothing to resynchronise. Dropping the future loses no data. How often a registry that fails is asked is
    /// for the source to say; after an error it is left alone for 2 s at most.
    fn next(&mut self) -> impl Future<Output = Result<Registrations, SourceError>> + Send;

    /// Reads `services` again, which lost most or all of what they had, as strongly as the source can: Consul
    /// `consistent`, ZooKeeper `sync`, a file once more. The answer is the complete view that follows from it.
    fn confirm(
        &mut self,
        services: &BTreeSet<ServiceName>,
    ) -> impl Future<Output = Result<Registrations, SourceError>> + Send;
}

/// All that one source says. What did not change since its last view keeps its pointer.
///
/// A reading has more than two outcomes, and each service has its own: it is here with endpoints; it is here without
/// one, which may be meant ([`Seen::empty_on_purpose`]); it is absent, which may be meant too (`emptied`); or it could
/// not be read, and then the last that was read is here, marked [`State::Stale`]. A source that cannot be read at all,
/// or that looks as if it had lost its content, is a [`SourceError`] and no view.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registrations {
    pub services: BTreeMap<ServiceName, Seen>,
    pub problems: Vec<Problem>,
    /// Services that are absent because the source says in as many words that there is nothing.
    #[serde(skip)]
    pub emptied: BTreeSet<ServiceName>,
    /// Parts of the source (files, directories, services, host names) that could not be read and of which nothing is known from before,
    /// each with the reason. A view with unread parts must not be the first that is served: it would take services away that other
    /// replicas still serve.
    #[serde(skip)]
    pub unusable: Vec<Arc<str>>,
    /// Records that were read and left out, because they make no sense or their service's name is none, and of which nothing is known
    /// from before, each with the reason. Such a record costs itself, unless the source has nothing else.
    #[serde(skip)]
    pub left_out: Vec<Arc<str>>,
    /// Host names of the source that are not resolved now.
    #[serde(skip)]
    pub unresolved: UnresolvedNames,
}

/// One service as one source says it, and how far that can be trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    pub registration: Arc<Registration>,
    #[serde(default)]
    pub state: State,
    /// Why it is not fresh, in words for an operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub because: Option<Arc<str>>,
    /// It has no endpoints, and the source says so in as many words: `endpoints: []`.
    #[serde(default)]
    pub empty_on_purpose: bool,
    /// How much of it the source says now.
    #[serde(skip)]
    pub extent: Extent,
}

/// How much of a service its source says now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Extent {
    /// All of it.
    #[default]
    Whole,
    /// What is here is right, and more may be there that cannot be read: nothing may be taken for removed.
    Part,
    /// Nothing that can be used: this is what was read of it last.
    Nothing,
}

impl Seen {
    pub fn fresh(registration: Arc<Registration>) -> Seen {
        Seen {
            registration,
            state: State::Fresh,
            because: None,
            empty_on_purpose: false,
            extent: Extent::Whole,
        }
    }

    pub fn stale(registration: Arc<Registration>, because: impl Into<Arc<str>>) -> Seen {
        Seen { state: State::Stale, because: Some(because.into()), ..Seen::fresh(registration) }
    }
}

/// Why a source has no view to give.
///
/// What it quotes is escaped where it is displayed: a registry's answer may have characters that a terminal acts on.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("discovery source `{}` could not {}", printable(source_name), printable(what))]
    Failed {
        source_name: Arc<str>,
        /// `read /etc/vmesh/services.d`
        what: String,
        #[source]
        cause: Box<dyn Error + Send + Sync>,
    },
    /// It answered, and the answer looks like an accident.
    #[error("discovery source `{}`: {}", printable(source_name), printable(what))]
    Suspect { source_name: Arc<str>, what: String },
}

/// What is known of a source: the last good view, and whether it is still that of now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// `None` until the source has answered once: until then nothing may be served.
    pub last_good: Option<Arc<Registrations>>,
    /// Why the source does not answer; `None` if it does.
    pub stale_because: Option<Arc<str>>,
    /// What the guard holds: the source as a whole first, then by service.
    pub held: Arc<[Held]>,
    /// Since when no change of the source is taken, by the operator's word.
    pub frozen: Option<SystemTime>,
    /// Why what the source has said since the start may not be served yet: a part of it cannot be used, and nothing is
    /// known of that part from before.
    pub unusable: Option<Arc<str>>,
    /// Host names of the source that are not resolved now.
    pub unresolved: Arc<UnresolvedNames>,
}

/// Why a [`View::restored`] is stale until the source answers, or fails and says why.
pub const NOT_ANSWERED_YET: &str = "the source has not answered since the start; this is from before";

impl View {
    /// What was good before a restart. It is served until the source answers, however long that takes.
    pub fn restored(last_good: Arc<Registrations>) -> View {
        View { last_good: Some(last_good), stale_because: Some(NOT_ANSWERED_YET.into()), ..View::default() }
    }

    /// The services, each as stale as the whole source is.
    pub fn services(&self) -> impl Iterator<Item = (&ServiceName, Seen)> {
        let services = self.last_good.iter().flat_map(|last_good| &last_good.services);
        services.map(|(name, seen)| {
            let mut seen = seen.clone();
            if let (State::Fresh, Some(because)) = (seen.state, &self.stale_because) {
                seen.state = State::Stale;
                seen.because = Some(because.clone());
            }
            (name, seen)
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
pub(crate) fn shown(text: &Arc<str>) -> Arc<str> {
    match printable(text) {
        Cow::Borrowed(_) => text.clone(),
        Cow::Owned(escaped) => escaped.into(),
    }
}

/// How long to leave a source alone that fails: from 100 ms, twice as long each time, up to 2 s. It keeps one that fails
/// at once from spinning, and no more: sources pace themselves, and what they have heard meanwhile waits to be taken.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(100);
    const LONGEST: Duration = Duration::from_secs(2);

    /// How long to wait now. Half of it is drawn, so that what failed together does not come back together.
    pub fn draw(&mut self) -> Duration {
        let whole = self.next;
        self.next = (whole * 2).min(Self::LONGEST);
        whole / 2 + jitter(whole / 2)
    }

    pub async fn wait(&mut self) {
        tokio::time::sleep(self.draw()).await;
    }

    pub fn reset(&mut self) {
        self.next = Self::FIRST;
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Backoff { next: Self::FIRST }
    }
}

/// A time between nothing and `most`.
pub(crate) fn jitter(most: Duration) -> Duration {
    // The seed of a std hash map is random; nothing here depends on how random.
    let random = RandomState::new().hash_one(0u8) >> 32;
    let share = u32::try_from(random).unwrap_or_default();
    most.mul_f64(f64::from(share) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests;
