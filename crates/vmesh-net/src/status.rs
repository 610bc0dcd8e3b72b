//! Builds the status for clients from the keeper's last report. This happens on the thread of the socket, so
//! no response waits for a disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, watch};
use tokio::time::timeout;
use vmesh_capture::Direction;
use vmesh_capture::facts::HostPaths;

use crate::heartbeat::{AgentWatch, InstalledTimers, TimerStates, explain_lapse};
use crate::probe::{ProbeResults, ProbedDirections};
use crate::protocol::{Drift, EnvoyHealth, RedirectState, Status};

/// The time for which a count of connections is reused. For each count the kernel walks through all of its
/// sockets.
const COUNTS_EVERY: Duration = Duration::from_secs(1);
/// The time that a client waits for a keeper that is starting.
const STARTS_WITHIN: Duration = Duration::from_secs(30);

/// The keeper's part of a status.
#[derive(Debug, Clone, Default)]
pub struct KeeperReport {
    /// The status without the fields that change over time.
    pub status: Status,
    pub trial_until: Option<Instant>,
    pub drifted_at: Option<Instant>,
    /// The captured directions.
    pub directions: ProbedDirections,
}

/// The sources that a [`Status`] is built from.
#[derive(Debug, Clone)]
pub struct StatusSource {
    pub report: watch::Receiver<KeeperReport>,
    pub timers: watch::Receiver<TimerStates>,
    pub installed: watch::Receiver<Option<InstalledTimers>>,
    pub probe_results: watch::Receiver<ProbeResults>,
    pub agent: AgentWatch,
    pub host_paths: HostPaths,
    pub connections: Arc<ConnectionCount>,
}

/// The number of open connections through a redirect, at the last count.
#[derive(Debug, Default)]
pub struct ConnectionCount {
    /// The last count. It is read without waiting, because responses to the heartbeat include it.
    count: AtomicUsize,
    /// The time of the last count; locked while connections are counted.
    counted: Mutex<Option<Instant>>,
}

impl StatusSource {
    /// Builds the status with the last count of connections, without a new count.
    pub async fn status(&self) -> Status {
        self.started().await;
        self.with_connections(self.connections.count.load(Ordering::Relaxed))
    }

    /// Builds the status, and counts connections again if the last count is old. Concurrent callers share one
    /// count.
    pub async fn counted(&self) -> Status {
        self.started().await;
        let mut counted = self.connections.counted.lock().await;
        if counted.is_none_or(|at| at.elapsed() >= COUNTS_EVERY) {
            let host_paths = self.host_paths.clone();
            if let Ok(count) = tokio::task::spawn_blocking(move || host_paths.count_redirected()).await {
                self.connections.count.store(count, Ordering::Relaxed);
            }
            *counted = Some(Instant::now());
        }
        drop(counted);
        self.with_connections(self.connections.count.load(Ordering::Relaxed))
    }

    /// Waits for the keeper's first report.
    async fn started(&self) {
        let mut report = self.report.clone();
        let published = report.wait_for(|report| !report.status.version.is_empty());
        // After the timeout, the client gets an empty status.
        _ = timeout(STARTS_WITHIN, published).await;
    }

    fn with_connections(&self, connections: usize) -> Status {
        let report = self.report.borrow().clone();
        let (timers, order) = (self.timers.borrow().clone(), self.installed.borrow().clone());
        let probe_results = *self.probe_results.borrow();
        let now = Instant::now();
        let listener =
            |direction| (probe_results.of(direction), timers.redirects(order.as_ref(), direction, now));
        // The status shows the health of the outbound listener if there is one, because names and
        // destinations depend on it.
        let first = if report.directions.outbound { Direction::Outbound } else { Direction::Inbound };
        let (envoy, redirects) = listener(first);
        let mut status = report.status;
        if report.directions.outbound && report.directions.inbound {
            status.notes.extend(note_of_inbound(listener(Direction::Inbound)));
        }
        Status {
            trial_ends_in: report.trial_until.map(|until| until.saturating_duration_since(now).as_secs()),
            envoy: if report.directions.is_empty() { EnvoyHealth::Unknown } else { envoy },
            redirects,
            agent_silent_for: self.agent.silent_for().map(|silent| silent.as_secs()),
            drift: Drift {
                seconds_ago: report.drifted_at.map(|at| now.saturating_duration_since(at).as_secs()),
                ..status.drift
            },
            connections,
            ..status
        }
    }
}

/// Describes a fault of the inbound listener, for a status that shows the outbound one.
fn note_of_inbound((envoy, redirects): (EnvoyHealth, RedirectState)) -> Option<String> {
    match (envoy, redirects) {
        (EnvoyHealth::Well | EnvoyHealth::Unknown, RedirectState::Hold | RedirectState::None) => None,
        (_, RedirectState::Lapsed) => Some(format!(
            "inbound redirects have lapsed ({}): new connections from outside go past Envoy where `on_loss: open` allows it",
            explain_lapse(envoy)
        )),
        (EnvoyHealth::Well | EnvoyHealth::Unknown, _) => None,
        (_, _) => Some(format!("inbound redirects may lapse soon: {}", explain_lapse(envoy))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    /// The kernel's connection table is slow here: a FIFO takes its place, and nothing is written to it until
    /// the end.
    #[tokio::test]
    async fn whoever_says_that_it_is_well_waits_for_no_count_of_connections() {
        let dir = vmesh_testkit::tempdir().unwrap();
        fs::create_dir(dir.join("net")).unwrap();
        let table = dir.join("net/tcp");
        assert!(Command::new("mkfifo").arg(&table).status().unwrap().success());
        let report = KeeperReport {
            status: Status { version: "1".to_owned(), ..Status::default() },
            ..KeeperReport::default()
        };
        let source = StatusSource {
            report: watch::channel(report).1,
            timers: watch::channel(TimerStates::default()).1,
            installed: watch::channel(None).1,
            probe_results: watch::channel(ProbeResults::default()).1,
            agent: AgentWatch::default(),
            host_paths: HostPaths { net: dir.to_path_buf(), ..HostPaths::default() },
            connections: Arc::default(),
        };
        let counts = source.counted();
        let answered = async {
            // The count has started: its lock is taken before the table is opened.
            while source.connections.counted.try_lock().is_ok() {
                tokio::task::yield_now().await;
            }
            let answered = timeout(Duration::from_secs(5), source.status()).await;
            fs::write(&table, "").unwrap();
            answered
        };
        let (_, answered) = tokio::join!(counts, answered);
        assert!(answered.is_ok(), "the answer waited for the count");
    }
}
