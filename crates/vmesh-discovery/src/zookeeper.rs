//! The ZooKeeper source: services whose instances register below some root paths.
//!
//! | event | reaction |
//! |---|---|
//! | a change below a root | reads the directories that changed, and nothing else |
//! | a connection or session is lost or restored | reports that the source is stale, or fresh again |
//! | a host name resolves to other addresses | updates the endpoints |
//!
//! An error affects as little as possible: a bad record only that record, a bad directory only that service,
//! an unreadable root only that root. Each keeps its last good state. An empty directory or a missing root is
//! not an explicit removal; the guard decides when to believe it.

pub mod config;
mod state;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use vmesh_model::ServiceName;
use vmesh_zookeeper::{Mirror, SessionEvent, View};

use crate::assemble::{Assembler, FIRST_NAMES, Statement};
use crate::resolve::{Resolve, SystemResolver};
use crate::source::{Counters, Registrations, Source, SourceError};
pub use config::{RootConfig, ZookeeperConfig};
use state::ZookeeperState;

/// The interval at which a live session without changes counts as an answer.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// Changes within this time become one view.
const SETTLE: Duration = Duration::from_millis(15);
/// The limit of errors reported during one outage. The caller applies a back-off after each, and must still
/// see the end of the outage.
const REASONS: u32 = 4;

/// A source that reads services from ZooKeeper.
pub struct ZookeeperSource<R = SystemResolver> {
    name: Arc<str>,
    mirror: Mirror,
    counters: Arc<Counters>,
    state: ZookeeperState,
    assembler: Assembler<R>,
    statement: Statement,
    /// A view from before a restart exists.
    is_restored: bool,
    /// Everything was read once.
    has_read: bool,
    /// The reason why the present state may be outdated. It has been reported.
    stale_because: Option<Arc<str>>,
    reasons: u32,
    first_names: Option<Instant>,
    view_at: Option<Instant>,
    last_view: Option<Registrations>,
    /// The last result was an error, so the next view is returned even if it equals the one before.
    has_failed: bool,
    /// The error of an invalid root path, which the configuration should have rejected.
    invalid_root: Option<String>,
}

impl ZookeeperSource {
    /// Creates a ZooKeeper source. `last_good` is the view from before a restart; it is used for what cannot
    /// be read now.
    pub fn new(
        config: ZookeeperConfig,
        last_good: Option<&Registrations>,
        counters: Arc<Counters>,
    ) -> ZookeeperSource {
        ZookeeperSource::with_resolver(config, last_good, counters, SystemResolver)
    }
}

impl<R: Resolve> ZookeeperSource<R> {
    pub fn with_resolver(
        config: ZookeeperConfig,
        last_good: Option<&Registrations>,
        counters: Arc<Counters>,
        resolver: R,
    ) -> ZookeeperSource<R> {
        let name = config.name();
        let roots: Result<Vec<_>, String> = config.roots.iter().map(RootConfig::root).collect();
        let (roots, invalid_root) = match roots {
            Ok(roots) => (roots, None),
            Err(wrong) => (Vec::new(), Some(wrong)),
        };
        let counted = counters.clone();
        ZookeeperSource {
            mirror: Mirror::new(config.client(), roots, move |event| count(&counted, event)),
            counters,
            state: ZookeeperState::new(name.clone(), config.roots, last_good),
            assembler: Assembler::new(name.clone(), resolver, config.resolve_interval, last_good),
            statement: Statement::default(),
            is_restored: last_good.is_some(),
            has_read: false,
            stale_because: None,
            reasons: 0,
            first_names: None,
            view_at: None,
            last_view: None,
            has_failed: false,
            invalid_root,
            name,
        }
    }

    fn failed(
        &mut self,
        action: &str,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> SourceError {
        self.has_failed = true;
        SourceError::Failed { source_name: self.name.clone(), action: action.to_owned(), cause: cause.into() }
    }

    /// Handles a view of the mirror.
    fn handle_view(&mut self, view: &View) -> Result<(), SourceError> {
        if let Some(because) = &view.stale_because {
            let is_news = self.stale_because.as_ref() != Some(because);
            self.stale_because = Some(because.clone());
            // The data of a server without a quorum is used only if no other state exists: this data may be
            // older than the view from before a restart, so a missing service is no removal.
            if !self.has_read && !self.is_restored && !view.roots.is_empty() {
                self.take_view(view)?;
                return Ok(());
            }
            if is_news && self.reasons < REASONS {
                self.reasons += 1;
                return Err(self.failed("read from ZooKeeper", because.to_string()));
            }
            return Ok(());
        }
        self.stale_because = None;
        self.reasons = 0;
        self.counters.record_answer();
        self.take_view(view)
    }

    fn take_view(&mut self, view: &View) -> Result<(), SourceError> {
        self.state.take(&view.roots);
        self.counters.bad_records.fetch_add(self.state.take_bad_records(), Relaxed);
        if let Some((path, why)) = self.state.unknown_root() {
            // Serving the other roots would claim that this root has no services.
            let (action, why) = (format!("read {path}, which has not been read yet"), why.to_string());
            return Err(self.failed(&action, why));
        }
        self.has_read = true;
        self.statement = self.state.statement();
        self.assembler.request_names(self.statement.services.values(), false);
        self.schedule_view(Instant::now());
        Ok(())
    }

    fn schedule_view(&mut self, now: Instant) {
        self.view_at.get_or_insert(now + SETTLE);
    }

    /// Reports whether the session is alive: the servers answer its heartbeats even if nothing changes.
    fn is_alive(&self) -> bool {
        self.has_read && self.stale_because.is_none()
    }

    /// Returns when work is due without any event.
    fn wake_at(&mut self, now: Instant) -> Instant {
        let names = self.assembler.start_lookups();
        let first_view = self
            .first_names
            .map(|since| since + FIRST_NAMES)
            .filter(|at| self.last_view.is_none() && *at > now);
        let never = now + Duration::from_secs(3600);
        let heartbeat = self.is_alive().then_some(now + HEARTBEAT);
        [names, first_view, self.view_at, heartbeat].into_iter().flatten().fold(never, Instant::min)
    }

    /// Returns the present view; `None` if it equals the last one returned or if it is too early for the
    /// first view.
    fn view(&mut self, now: Instant) -> Option<Registrations> {
        if !self.has_read {
            return None;
        }
        if self.last_view.is_none() {
            let since = *self.first_names.get_or_insert(now);
            self.assembler.start_lookups();
            if self.assembler.has_pending() && now < since + FIRST_NAMES {
                return None;
            }
        }
        let mut statement = None;
        if let Some(because) = &self.stale_because {
            let mut stale = self.statement.clone();
            for statement in stale.services.values_mut() {
                statement.stale_because.get_or_insert_with(|| because.clone());
            }
            statement = Some(stale);
        }
        let view = self.assembler.view(statement.as_ref().unwrap_or(&self.statement));
        if !self.has_failed && self.last_view.as_ref() == Some(&view) {
            return None;
        }
        self.has_failed = false;
        self.last_view = Some(view.clone());
        Some(view)
    }
}

fn count(counters: &Counters, event: SessionEvent) {
    match event {
        SessionEvent::Reads(by) => _ = counters.reads.fetch_add(by, Relaxed),
        SessionEvent::FailedReads(by) => _ = counters.failed_reads.fetch_add(by, Relaxed),
        SessionEvent::Connected => {
            counters.connects.fetch_add(1, Relaxed);
            counters.connections.fetch_add(1, Relaxed);
        }
        SessionEvent::Disconnected => _ = counters.connections.fetch_sub(1, Relaxed),
        SessionEvent::Expired => _ = counters.sessions_expired.fetch_add(1, Relaxed),
    }
}

impl<R: Resolve> Source for ZookeeperSource<R> {
    async fn next(&mut self) -> Result<Registrations, SourceError> {
        if let Some(wrong) = self.invalid_root.clone() {
            return Err(self.failed("read its roots", wrong));
        }
        loop {
            let now = Instant::now();
            if self.view_at.is_some_and(|at| at <= now) {
                self.view_at = None;
                // During an outage the last view stays, as it has been returned already.
                if (self.stale_because.is_none() || self.last_view.is_none())
                    && let Some(view) = self.view(now)
                {
                    return Ok(view);
                }
            }
            let due = self.wake_at(now);
            tokio::select! {
                view = self.mirror.changed() => self.handle_view(&view)?,
                () = self.assembler.changed() => self.schedule_view(Instant::now()),
                () = sleep_until(due) => {
                    if self.is_alive() {
                        self.counters.record_answer();
                    }
                    if self.last_view.is_none() {
                        self.schedule_view(Instant::now());
                    }
                }
            }
        }
    }

    /// Reads everything again, from a server that has caught up with its leader (`sync`).
    async fn confirm(&mut self, _: &BTreeSet<ServiceName>) -> Result<Registrations, SourceError> {
        let view = match self.mirror.confirm().await {
            Ok(view) => view,
            Err(error) => return Err(self.failed("read everything again", error)),
        };
        self.handle_view(&view)?;
        match (self.view(Instant::now()), &self.last_view) {
            (Some(view), _) => Ok(view),
            (None, Some(last_view)) => Ok(last_view.clone()),
            (None, None) => Err(SourceError::Suspect {
                source_name: self.name.clone(),
                suspicion: "not everything has been read yet".to_owned(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use vmesh_model::load::strict;
    use vmesh_zookeeper::mirror::RootView;

    use super::*;

    fn source(last_good: Option<&Registrations>) -> ZookeeperSource {
        let config =
            strict("control.yaml", "{connect: \"127.0.0.1:1\", roots: [{path: /services}]}").unwrap();
        ZookeeperSource::new(config, last_good, Arc::new(Counters::default()))
    }

    #[tokio::test]
    async fn a_server_without_a_quorum_is_better_than_nothing_and_worse_than_what_was_known() {
        let because = Some("it has lost its quorum".into());
        let cut_off = View { roots: vec![RootView::default()], stale_because: because };
        let mut knows_nothing = source(None);
        knows_nothing.handle_view(&cut_off).unwrap();
        assert!(knows_nothing.view(Instant::now()).is_some());
        let mut knows = source(Some(&Registrations::default()));
        let failure = knows.handle_view(&cut_off).unwrap_err();
        assert!(crate::source::chain(&failure).ends_with("it has lost its quorum"));
        assert!(knows.view(Instant::now()).is_none());
    }
}
