//! `vmesh-agent envoy`: the supervisor of Envoy where Envoy has a systemd unit of its own (`manage: systemd`).
//!
//! Start reading at [`RunningSupervisor::start`].
//!
//! | task           | wakes on                                              | publishes                                      |
//! |----------------|-------------------------------------------------------|------------------------------------------------|
//! | `envoys`       | SIGHUP, a new bootstrap, an Envoy's exit, a timer     | `watch<SupervisorStatus>`, the record on disk  |
//! | `envoy output` | a line that an Envoy writes                           | our log                                        |
//! | `status`       | requests on `status.sock`                             | `/status`, `/ready`, parts of Envoy's admin API |
//! | `systemd`      | `watch<SupervisorStatus>`                             | readiness, the text of `systemctl status`      |
//!
//! The agent writes Envoy's bootstrap and serves xDS to it. Stopping, upgrading or killing the agent has no effect on the supervisor or on
//! Envoy.
//!
//! A *reload* replaces the serving Envoy by a new one. SIGHUP requests a reload, with the binary and the settings that are on disk at that
//! moment; a changed bootstrap causes one too. A new binary alone does not: a package manager installs in several steps, and sends the
//! signal as the last of them. Until then the status reports that a new binary waits.
//!
//! ```text
//!   reload ──> trial ──> candidate ──> live ──> the old Envoy drains ──> gone
//!                │           │          │
//!                └───────────┴──────────┴────── failed: the old Envoy keeps serving, and the status gives the reason
//! ```
//!
//! The [`trial`] checks, before the old Envoy is touched, that the new one would start. The *candidate* is the new Envoy while it starts.
//! The *handover* to it uses Envoy's hot restart, which passes the listening sockets on, or else the two Envoys bind the same ports
//! ([`plan::HandoverMethod`]). In both cases the candidate becomes live only after it has received its configuration from the agent. A
//! candidate that does not become live in time is killed. By then the old Envoy may have closed its admin interface, so the supervisor
//! replaces it by another Envoy with the *old* binary and bootstrap ([`Supervisor::regain_admin`]).
//!
//! The Envoys that hand over to each other by hot restart form a *line*: they share a `--base-id`, and each one is an *epoch*. Envoy allows
//! two processes of a line at a time; when a third one starts, the second one terminates the first. A reload therefore waits while the
//! first one still has clients.
//!
//! Envoys outlive their supervisor. The record on disk lists them, and the next supervisor adopts them. Only SIGTERM to the supervisor
//! stops the Envoys, and they drain first.
//!
//! | module        | contents                                                                            |
//! |---------------|-------------------------------------------------------------------------------------|
//! | `adopt`       | adopts the Envoys that an earlier supervisor started                                |
//! | `start`       | starts an Envoy when none serves; how each Envoy is started                         |
//! | `monitor`     | polls the serving Envoy, and watches its files on disk                              |
//! | `handover`    | replaces the serving Envoy, or rolls back                                           |
//! | `drain`       | drains old Envoys; stops all of them at the end                                     |
//! | [`plan`]      | the decisions, without I/O                                                          |
//! | [`trial`]     | checks a binary and a bootstrap before they are used                                |
//! | `ports`       | reserves Envoy's capture ports while Envoy is away                                  |
//! | `liveness`    | detects whether an Envoy with a silent admin interface still serves                 |
//! | `supervised`, `orphan`, `shm`, `clients` | one Envoy: its record, its parent process, its shared memory, its clients |

mod adopt;
mod clients;
mod drain;
mod handover;
mod liveness;
mod monitor;
mod orphan;
mod plan;
mod ports;
mod shm;
mod start;
mod status;
mod supervised;
mod trial;

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, error, warn};
use vmesh_daemon::fsx;
use vmesh_daemon::report::one_line;
use vmesh_daemon::{Stop, Tasks, systemd};
use vmesh_net::protocol::Request;

use crate::config::Config;
use crate::envoy::{EnvoyState, double, output, unless_stopped};
use drain::DrainingEnvoy;
use handover::ReloadReason;
use supervised::{EnvoyRecord, Launch, LaunchId, SupervisedEnvoy, SupervisorRecord};
use trial::FileStamp;

pub use orphan::step;

/// Checks that `program` is an Envoy that runs on this host. The error gives the reason if the check fails.
pub async fn ask_binary(program: &Path) -> Result<(), String> {
    trial::query_versions(program).await.map(drop).map_err(|unusable| unusable.reason)
}

pub use status::{DrainingEnvoyStatus, SupervisorFailure, SupervisorStatus};

const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LAST_BACKOFF: Duration = Duration::from_secs(10);
/// Uptime after which a crash no longer counts as a failed start.
const STABLE: Duration = Duration::from_secs(60);
/// Interval at which the binary and the bootstrap on disk are checked.
const TICK: Duration = Duration::from_secs(1);
/// Longest wait for vmesh-net's answer. The restart of Envoy does not depend on this answer.
const NOTIFIES_WITHIN: Duration = Duration::from_millis(300);
/// Time beyond the parent shutdown time after which the supervisor kills an old Envoy. Usually the successor terminates its predecessor;
/// the supervisor does so when the successor is gone.
const PARENT_GRACE: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum SupervisorStartError {
    #[error("could not make {} (`envoy.run_dir`)", .path.display())]
    Directory {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("another `vmesh-agent envoy` runs with {}: give each an `envoy.run_dir` of its own", .0.display())]
    InUse(PathBuf),
    #[error("could not make {}", .path.display())]
    Make {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("could not listen for SIGHUP")]
    Signal(#[source] io::Error),
    #[error(
        "`envoy.manage` is `child`: there the agent itself starts Envoy; write `manage: systemd`, or do not run this"
    )]
    Child,
}

/// A running supervisor of Envoy.
pub struct RunningSupervisor {
    pub tasks: Tasks,
    pub status: watch::Receiver<SupervisorStatus>,
    /// The lock on the run directory, held until this value is dropped.
    pub lock: File,
}

impl RunningSupervisor {
    /// Binds the status socket and starts the tasks. `file` is the path that `config` was loaded from; each reload loads it again.
    pub fn start(file: &Path, config: Config) -> Result<RunningSupervisor, SupervisorStartError> {
        if config.envoy.manage == crate::config::EnvoyManager::Child {
            return Err(SupervisorStartError::Child);
        }
        let hangups = signal(SignalKind::hangup()).map_err(SupervisorStartError::Signal)?;
        let dir = config.envoy.run_dir.clone();
        let made = DirBuilder::new().recursive(true).mode(0o750).create(&dir);
        made.map_err(|cause| SupervisorStartError::Directory { path: dir.clone(), cause })?;
        let path = dir.join("supervisor.lock");
        let lock = crate::lock(&path).map_err(|cause| SupervisorStartError::Make { path, cause })?;
        let lock = lock.ok_or_else(|| SupervisorStartError::InUse(dir.clone()))?;
        // Sweep only after locking: from here on, temporary files in the directory belong to this process.
        _ = fsx::sweep(&dir);
        let socket = config.status_socket();
        let listener = vmesh_daemon::sockets::listen(&socket)
            .map_err(|cause| SupervisorStartError::Make { path: socket.clone(), cause })?;
        let fifo = dir.join("envoy.out");
        let failed = |cause| SupervisorStartError::Make { path: fifo.clone(), cause };
        output::fifo(&fifo).map_err(failed)?;
        let reader = output::reader(&fifo).map_err(failed)?;

        let mut tasks = Tasks::new();
        let (sender, status) = watch::channel(SupervisorStatus::default());
        let known = status::StatusContext { status: status.clone(), admin: dir.join("admin.sock") };
        tasks.spawn("envoy output", output::log(reader));
        // The status task is dropped, not drained, at the stop: it reports the progress of the drain until the end, and a client with an
        // unfinished request cannot delay the exit.
        tasks.spawn("status", status::serve(listener, known));
        tasks.spawn("systemd", report_to_systemd(status.clone()));
        tasks.spawn("watchdog", systemd::watchdog());
        let file = file.to_owned();
        tasks.spawn_draining("envoys", |stop| {
            let supervisor = Supervisor {
                file,
                record_path: dir.join("envoys.json"),
                output: fifo,
                dir,
                config: Arc::new(config),
                status: sender,
                hangups,
                stop,
                last_number: 0,
                serving: None,
                draining: Vec::new(),
                drain_tasks: JoinSet::new(),
                strays: Vec::new(),
                pending_reload: None,
                rejected_launch: None,
                is_reload_urgent: false,
                last_good_launch: None,
                live_since: None,
                recent_crashes: None,
                regain_at: Instant::now(),
                regain_pause: FIRST_BACKOFF,
                reported_binary: None,
                version_queries: JoinSet::new(),
                ports: ports::ReservedPorts::default(),
            };
            supervisor.run()
        });
        Ok(RunningSupervisor { tasks, status, lock })
    }

    /// Returns the longest time that the tasks may take to stop: the drain of Envoy, preceded by the end of a reload in progress, which
    /// starts, awaits and kills one or two Envoys.
    pub fn stops_within(config: &Config) -> Duration {
        config.envoy.drain.0 + Duration::from_secs(60)
    }
}

async fn report_to_systemd(mut status: watch::Receiver<SupervisorStatus>) {
    let mut ready = false;
    loop {
        let (line, live) = {
            let status = status.borrow_and_update();
            (status.line(), status.envoy.state == EnvoyState::Live)
        };
        if live && !ready {
            ready = true;
            systemd::ready(&line);
        } else {
            systemd::status(&line);
        }
        if status.changed().await.is_err() {
            // The sender is dropped with its task, and the owner of the tasks sees that task end.
            return std::future::pending().await;
        }
    }
}

struct Supervisor {
    file: PathBuf,
    config: Arc<Config>,
    dir: PathBuf,
    record_path: PathBuf,
    output: PathBuf,
    status: watch::Sender<SupervisorStatus>,
    hangups: Signal,
    stop: Stop,
    last_number: u64,
    serving: Option<SupervisedEnvoy>,
    /// The Envoys that drain, each with a task in `drain_tasks`.
    draining: Vec<DrainingEnvoy>,
    drain_tasks: JoinSet<u64>,
    /// Running Envoys of this directory that the record does not list. They are drained once another Envoy is live.
    strays: Vec<SupervisedEnvoy>,
    pending_reload: Option<ReloadReason>,
    /// The launch (bootstrap and binary) that failed in a reload, so that it is not tried again until it changes.
    rejected_launch: Option<LaunchId>,
    /// SIGHUP arrived while a reload was waiting: the reload must not wait any longer.
    is_reload_urgent: bool,
    /// The launch that was live for [`STABLE`], or the first one that became live.
    last_good_launch: Option<Launch>,
    live_since: Option<Instant>,
    /// The launch that failed to start or crashed early, and the number of such failures in a row.
    recent_crashes: Option<(LaunchId, u32)>,
    /// Time of the next attempt to replace an Envoy whose admin interface is closed, and the pause after that attempt.
    regain_at: Instant,
    regain_pause: Duration,
    /// The binary on disk that the status last reported as waiting.
    reported_binary: Option<FileStamp>,
    /// Runs a new binary with `--version`. The binary may hang, so this runs beside the main loop.
    version_queries: JoinSet<(FileStamp, String)>,
    ports: ports::ReservedPorts,
}

impl Supervisor {
    async fn run(mut self) {
        self.ports.reserve_for(&self.config.capture);
        self.adopt_recorded().await;
        let mut backoff = FIRST_BACKOFF;
        while !self.stop.is_requested() {
            let began = Instant::now();
            if self.serving.is_none() {
                self.start_first().await;
            }
            if self.serving.is_some() {
                let Some(ended) = self.watch_serving().await else { break };
                self.record_exit(&ended);
                self.notify_vmesh_net().await;
                if began.elapsed() > STABLE {
                    backoff = FIRST_BACKOFF;
                }
            }
            let mut stop = self.stop.clone();
            if unless_stopped(&mut stop, sleep(backoff)).await.is_none() {
                break;
            }
            backoff = double(backoff).min(LAST_BACKOFF);
        }
        self.stop_all().await;
    }

    fn set_state(&self, state: EnvoyState, change: impl FnOnce(&mut SupervisorStatus)) {
        self.status.send_modify(|status| {
            if status.envoy.state != state {
                status.envoy.state = state;
                status.envoy.since = SystemTime::now();
                status.envoy.reason = None;
            }
            change(status);
        });
    }

    fn set_failure(&self, what: String) {
        self.status.send_modify(|status| {
            status.last_failure = Some(SupervisorFailure { at: SystemTime::now(), what });
        });
    }

    fn record_exit(&mut self, how: &str) {
        let Some(envoy) = self.serving.take() else { return };
        error!(pid = envoy.pid(), "Envoy ended: {how}");
        if self.live_since.is_none_or(|since| since.elapsed() < STABLE) {
            self.count_crash(&envoy.launch);
        }
        self.set_state(EnvoyState::Down, |status| {
            status.envoy.restarts += 1;
            status.envoy.pid = None;
            status.envoy.adopted = false;
            status.envoy.reason = Some(how.to_owned());
            status.epoch = None;
        });
        self.set_failure(format!("Envoy ended: {how}"));
        self.remove_files(&envoy.record);
        self.save_record(None);
    }

    /// Asks vmesh-net to check Envoy now. Otherwise vmesh-net notices the exit at its next check, up to a second later, and until then
    /// connections that may bypass Envoy would be refused.
    async fn notify_vmesh_net(&self) {
        let capture = &self.config.capture;
        if capture.outbound() || capture.inbound() {
            let notified = vmesh_net::client::ask(&capture.socket, &Request::Look);
            if !matches!(timeout(NOTIFIES_WITHIN, notified).await, Ok(Ok(_))) {
                debug!("could not notify vmesh-net that Envoy exited; it notices by itself within a second");
            }
        }
    }

    fn count_crash(&mut self, launch: &Launch) {
        let id = launch.id();
        let before =
            self.recent_crashes.take().filter(|(crashed, _)| *crashed == id).map_or(0, |(_, times)| times);
        self.recent_crashes = Some((id, before + 1));
    }

    /// Writes the record of all Envoys to disk, with `candidate` if one is starting.
    fn save_record(&self, candidate: Option<&EnvoyRecord>) {
        let serving = self.serving.as_ref().map(|envoy| &envoy.record);
        let envoys = serving.into_iter().chain(candidate).chain(self.draining_records()).cloned().collect();
        SupervisorRecord { last_number: self.last_number, envoys }.save(&self.record_path);
        let leaving = self.draining_records().map(|record| DrainingEnvoyStatus {
            pid: record.pid(),
            epoch: record.epoch,
            version: record.version.clone(),
            until: record.until.unwrap_or(SystemTime::now()),
        });
        self.status.send_modify(|status| status.leaving = leaving.collect());
    }

    /// Removes the files of an Envoy that is gone.
    fn remove_files(&self, record: &EnvoyRecord) {
        for path in [
            record.admin_socket(&self.dir),
            supervised::bootstrap_path(&self.dir, record.number),
            supervised::source_path(&self.dir, record.number),
        ] {
            _ = std::fs::remove_file(path);
        }
        let others =
            self.serving.as_ref().map(|envoy| &envoy.record).into_iter().chain(self.draining_records());
        if others.filter(|other| other.number != record.number).all(|other| other.base_id != record.base_id) {
            shm::remove(record.base_id, &self.dir);
        }
    }

    /// Loads the configuration again. On failure, the old settings stay in force.
    fn read_config(&mut self) {
        match Config::load(&self.file) {
            Ok(config) if config.envoy.run_dir == self.dir => {
                self.ports.reserve_for(&config.capture);
                self.config = Arc::new(config);
            }
            Ok(_) => warn!("`envoy.run_dir` has changed: restart this unit to apply that"),
            Err(error) => warn!("Envoy keeps its current settings: {}", one_line(&error)),
        }
    }
}
