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

mod config;
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
use crate::resolve::{Resolve, SystemResolver};
use crate::source::{Counters, Registrations, Source, SourceError};
pub use config::FileConfig;
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
    running_scan: Option<JoinHandle<Result<Scan, SourceError>>>,
    scan_at: Option<Instant>,
    verify_at: Instant,
    started: Instant,
    /// The result of a scan was lost, so the next scan has to cover everything.
    is_behind: bool,
    /// The statement of all files, and whether some are being written at present.
    statement: Option<(Statement, bool)>,
    last_view: Option<Registrations>,
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
            running_scan: None,
            scan_at: Some(now),
            verify_at: now,
            started: now,
            is_behind: true,
            statement: None,
            last_view: None,
            has_failed: false,
        }
    }

    /// Starts a scan of the disk.
    fn start_scan(&mut self, now: Instant) {
        let mut request = self.hints.take(now.into_std());
        request.everything |= self.is_behind;
        let verify = self.verify_at <= now;
        if verify {
            self.verify_at = now + self.poll;
        }
        self.scan_at = None;
        let disk = self.disk.clone();
        self.running_scan = Some(tokio::task::spawn_blocking(move || {
            // The mutex is poisoned only if a scan panicked, and each scan starts afresh.
            disk.lock().unwrap_or_else(PoisonError::into_inner).scan(&request, verify)
        }));
    }

    /// Returns when the next scan is due if the kernel reports no change before.
    fn next_scan(&self) -> Instant {
        let heard = self.hints.due().map(Instant::from_std);
        [heard, self.scan_at].into_iter().flatten().fold(self.verify_at, Instant::min)
    }

    /// Returns when work is due without any event.
    fn wake_at(&mut self, now: Instant) -> Instant {
        let names = self.assembler.start_lookups();
        let scan = self.running_scan.is_none().then(|| self.next_scan());
        let first_view = Some(self.started + FIRST_NAMES).filter(|at| self.last_view.is_none() && *at > now);
        let never = now + Duration::from_secs(3600);
        [names, scan, first_view].into_iter().flatten().fold(never, Instant::min)
    }

    fn scan_panicked(&mut self, panicked: JoinError) -> SourceError {
        self.is_behind = true;
        let action = "scan its files".to_owned();
        SourceError::Failed { source_name: self.name.clone(), action, cause: panicked.into() }
    }

    /// Takes the result of a scan. After a failure the next scan is due at once; the caller of
    /// [`Source::next`] applies a back-off.
    fn take_scan(&mut self, found: Result<Scan, SourceError>, now: Instant) -> Result<(), SourceError> {
        let scan = match found {
            Ok(scan) => {
                self.counters.reads.fetch_add(scan.read, Relaxed);
                self.counters.failed_reads.fetch_add(scan.refused, Relaxed);
                self.counters.bad_records.fetch_add(scan.bad_records, Relaxed);
                self.counters.record_answer();
                scan
            }
            Err(error) => {
                self.counters.reads.fetch_add(1, Relaxed);
                self.counters.failed_reads.fetch_add(1, Relaxed);
                self.has_failed = true;
                self.scan_at = Some(now);
                return Err(error);
            }
        };
        self.scan_at = scan.again.map(|wait| now + wait);
        self.is_behind = false;
        let is_unsettled = scan.again.is_some();
        // A partial scan does not tell which host names are no longer needed.
        self.assembler.request_names(scan.statement.services.values(), is_unsettled || scan.only.is_some());
        let statement = match (scan.only, self.statement.take()) {
            (Some(only), Some((mut statement, _))) => {
                statement.replace(only, scan.statement);
                statement
            }
            (_, _) => scan.statement,
        };
        self.statement = Some((statement, is_unsettled));
        Ok(())
    }

    /// Returns the present view; `None` if it equals the last one returned or if it is too early for the
    /// first view.
    fn view(&mut self, now: Instant) -> Option<Registrations> {
        let (statement, is_unsettled) = self.statement.as_ref()?;
        if self.last_view.is_none() {
            let waits_for_names = self.assembler.has_pending() && now < self.started + FIRST_NAMES;
            let waits_for_files = *is_unsettled && now < self.started + FIRST_FILES;
            if waits_for_names || waits_for_files {
                return None;
            }
        }
        let view = self.assembler.view(statement);
        if !self.has_failed && self.last_view.as_ref() == Some(&view) {
            return None;
        }
        self.has_failed = false;
        self.last_view = Some(view.clone());
        Some(view)
    }
}

impl<R: Resolve> Source for FileSource<R> {
    async fn next(&mut self) -> Result<Registrations, SourceError> {
        loop {
            let now = Instant::now();
            if self.running_scan.is_none() && self.next_scan() <= now {
                self.start_scan(now);
            }
            let due = self.wake_at(now);
            let is_news = tokio::select! {
                found = join_scan(&mut self.running_scan) => {
                    self.running_scan = None;
                    self.scan_at = None;
                    let found = found.unwrap_or_else(|panicked| Err(self.scan_panicked(panicked)));
                    self.take_scan(found, Instant::now())?;
                    true
                }
                () = self.assembler.changed() => true,
                () = self.hints.event() => false,
                () = tokio::time::sleep_until(due) => self.last_view.is_none(),
            };
            if is_news && let Some(view) = self.view(Instant::now()) {
                return Ok(view);
            }
        }
    }

    /// Reads every file once more.
    async fn confirm(&mut self, _: &BTreeSet<ServiceName>) -> Result<Registrations, SourceError> {
        // A scan that is running may have begun before the change that is to be confirmed.
        if self.running_scan.is_some() {
            _ = join_scan(&mut self.running_scan).await;
            self.running_scan = None;
            self.is_behind = true;
        }
        let now = Instant::now();
        self.verify_at = now;
        self.start_scan(now);
        let found = join_scan(&mut self.running_scan).await;
        self.running_scan = None;
        let found = found.unwrap_or_else(|panicked| Err(self.scan_panicked(panicked)));
        self.take_scan(found, Instant::now())?;
        match (self.view(Instant::now()), &self.last_view) {
            (Some(view), _) => Ok(view),
            (None, Some(last_view)) => Ok(last_view.clone()),
            (None, None) => Err(SourceError::Suspect {
                source_name: self.name.clone(),
                suspicion: "a file is being written at the moment".to_owned(),
            }),
        }
    }
}

/// Waits for the running scan. Stays pending while no scan is running.
async fn join_scan<T>(running_scan: &mut Option<JoinHandle<T>>) -> Result<T, JoinError> {
    match running_scan {
        Some(handle) => handle.await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
