//! The file source: discovery by a directory of files, or by one file.
//!
//! A file that does not name its service is named by its path below the directory: `users/v2.yaml` is
//! `users.v2`. If two files name the same service, the first in path order counts, and the other is reported
//! as a problem.
//!
//! | event | reaction |
//! |---|---|
//! | the kernel reports changed files, 20 ms ago | scans these files, reads those that changed |
//! | the kernel reports changed directories or links, or events may have been lost | scans everything, reads what changed |
//! | `poll` elapses | reads everything, parses what changed |
//! | a host name resolves to other addresses | updates the endpoints |
//!
//! An error affects as little as possible: a bad record only that record, a bad service only that service, a
//! bad file only that file. Each keeps its last good state, also across a restart. A directory that
//! disappeared, or is empty and was not before, is treated as an accident; a file that states `[]` makes the
//! emptiness explicit.

mod disk;
pub mod privacy;
mod watch;

use std::collections::BTreeSet;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::{JoinError, JoinHandle};
use tokio::time::Instant;
use vmesh_model::ServiceName;

use crate::assemble::{Assembler, FIRST_NAMES, Statement};
pub use crate::config::FileConfig;
use crate::resolve::{Resolve, SystemResolver};
use crate::source::{Counters, Registrations, Source, SourceError};
use disk::{Disk, Scan};
use watch::Hints;

/// The time that the first view waits for files that are being written.
const FIRST_FILES: Duration = Duration::from_millis(500);

/// A source that reads services from files.
pub struct FileSource<R = SystemResolver> {
    name: Arc<str>,
    counters: Arc<Counters>,
    poll: Duration,
    disk: Arc<Mutex<Disk>>,
    hints: Arc<Hints>,
    assembler: Assembler<R>,
    /// The scan that is running. It continues when the future of [`Source::next`] is dropped.
    looking: Option<JoinHandle<Result<Scan, SourceError>>>,
    look_at: Option<Instant>,
    verify_at: Instant,
    started: Instant,
    /// The result of a scan was lost, so the next scan has to cover everything.
    is_behind: bool,
    /// The statement of all files, and whether some are being written at present.
    statement: Option<(Statement, bool)>,
    told: Option<Registrations>,
    /// The last scan failed, so the next good view is returned even if it equals the one before.
    has_failed: bool,
}

impl FileSource {
    /// Creates a file source. `last_good` is the view from before a restart; it is used for files that cannot
    /// be read now.
    pub fn new(config: FileConfig, last_good: Option<&Registrations>, counters: Arc<Counters>) -> FileSource {
        FileSource::with_resolver(config, last_good, counters, SystemResolver)
    }
}

impl<R: Resolve> FileSource<R> {
    pub fn with_resolver(
        config: FileConfig,
        last_good: Option<&Registrations>,
        counters: Arc<Counters>,
        resolver: R,
    ) -> FileSource<R> {
        let hints = Arc::new(Hints::below(&config.path));
        let assembler = Assembler::new(config.name(), resolver, config.resolve_interval, last_good);
        let now = Instant::now();
        FileSource {
            name: config.name(),
            counters,
            poll: config.poll,
            disk: Arc::new(Mutex::new(Disk::new(config, hints.clone(), last_good))),
            hints,
            assembler,
            looking: None,
            look_at: Some(now),
            verify_at: now,
            started: now,
            is_behind: true,
            statement: None,
            told: None,
            has_failed: false,
        }
    }

    /// Starts a scan of the disk.
    fn look(&mut self, now: Instant) {
        let mut look = self.hints.take(now.into_std());
        look.everything |= self.is_behind;
        let verify = self.verify_at <= now;
        if verify {
            self.verify_at = now + self.poll;
        }
        self.look_at = None;
        let disk = self.disk.clone();
        self.looking = Some(tokio::task::spawn_blocking(move || {
            // The mutex is poisoned only if a scan panicked, and each scan starts afresh.
            disk.lock().unwrap_or_else(PoisonError::into_inner).scan(&look, verify)
        }));
    }

    /// Returns when the next scan is due if the kernel reports no change before.
    fn next_look(&self) -> Instant {
        let heard = self.hints.due().map(Instant::from_std);
        [heard, self.look_at].into_iter().flatten().fold(self.verify_at, Instant::min)
    }

    /// Returns when work is due without any event.
    fn wake_at(&mut self, now: Instant) -> Instant {
        let names = self.assembler.look_up();
        let look = self.looking.is_none().then(|| self.next_look());
        let first_view = Some(self.started + FIRST_NAMES).filter(|at| self.told.is_none() && *at > now);
        let never = now + Duration::from_secs(3600);
        [names, look, first_view].into_iter().flatten().fold(never, Instant::min)
    }

    fn panicked(&mut self, panicked: JoinError) -> SourceError {
        self.is_behind = true;
        let what = "look at its files".to_owned();
        SourceError::Failed { source_name: self.name.clone(), what, cause: panicked.into() }
    }

    /// Takes the result of a scan. After a failure the next scan is due at once; the caller of
    /// [`Source::next`] applies a back-off.
    fn found(&mut self, found: Result<Scan, SourceError>, now: Instant) -> Result<(), SourceError> {
        let scan = match found {
            Ok(scan) => {
                self.counters.reads.fetch_add(scan.read, Relaxed);
                self.counters.failed_reads.fetch_add(scan.refused, Relaxed);
                self.counters.bad_records.fetch_add(scan.bad_records, Relaxed);
                self.counters.answered_now();
                scan
            }
            Err(error) => {
                self.counters.reads.fetch_add(1, Relaxed);
                self.counters.failed_reads.fetch_add(1, Relaxed);
                self.has_failed = true;
                self.look_at = Some(now);
                return Err(error);
            }
        };
        self.look_at = scan.again.map(|wait| now + wait);
        self.is_behind = false;
        let is_unsettled = scan.again.is_some();
        // A partial scan does not tell which host names are no longer needed.
        self.assembler.want(scan.told.services.values(), is_unsettled || scan.only.is_some());
        let statement = match (scan.only, self.statement.take()) {
            (Some(only), Some((mut statement, _))) => {
                statement.replace(only, scan.told);
                statement
            }
            (_, _) => scan.told,
        };
        self.statement = Some((statement, is_unsettled));
        Ok(())
    }

    /// Returns the present view; `None` if it equals the last one returned or if it is too early for the
    /// first view.
    fn view(&mut self, now: Instant) -> Option<Registrations> {
        let (statement, is_unsettled) = self.statement.as_ref()?;
        if self.told.is_none() {
            let waits_for_names = self.assembler.any_pending() && now < self.started + FIRST_NAMES;
            let waits_for_files = *is_unsettled && now < self.started + FIRST_FILES;
            if waits_for_names || waits_for_files {
                return None;
            }
        }
        let view = self.assembler.view(statement);
        if !self.has_failed && self.told.as_ref() == Some(&view) {
            return None;
        }
        self.has_failed = false;
        self.told = Some(view.clone());
        Some(view)
    }
}

impl<R: Resolve> Source for FileSource<R> {
    async fn next(&mut self) -> Result<Registrations, SourceError> {
        loop {
            let now = Instant::now();
            if self.looking.is_none() && self.next_look() <= now {
                self.look(now);
            }
            let due = self.wake_at(now);
            let is_news = tokio::select! {
                found = finished(&mut self.looking) => {
                    self.looking = None;
                    self.look_at = None;
                    let found = found.unwrap_or_else(|panicked| Err(self.panicked(panicked)));
                    self.found(found, Instant::now())?;
                    true
                }
                () = self.assembler.changed() => true,
                () = self.hints.news() => false,
                () = tokio::time::sleep_until(due) => self.told.is_none(),
            };
            if is_news && let Some(view) = self.view(Instant::now()) {
                return Ok(view);
            }
        }
    }

    /// Reads every file once more.
    async fn confirm(&mut self, _: &BTreeSet<ServiceName>) -> Result<Registrations, SourceError> {
        // A scan that is running may have begun before the change that is to be confirmed.
        if self.looking.is_some() {
            _ = finished(&mut self.looking).await;
            self.looking = None;
            self.is_behind = true;
        }
        let now = Instant::now();
        self.verify_at = now;
        self.look(now);
        let found = finished(&mut self.looking).await;
        self.looking = None;
        let found = found.unwrap_or_else(|panicked| Err(self.panicked(panicked)));
        self.found(found, Instant::now())?;
        match (self.view(Instant::now()), &self.told) {
            (Some(view), _) => Ok(view),
            (None, Some(told)) => Ok(told.clone()),
            (None, None) => Err(SourceError::Suspect {
                source_name: self.name.clone(),
                what: "a file is just being written".to_owned(),
            }),
        }
    }
}

/// Waits for the running scan. Stays pending while no scan is running.
async fn finished<T>(looking: &mut Option<JoinHandle<T>>) -> Result<T, JoinError> {
    match looking {
        Some(handle) => handle.await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
