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
//! | `watch`       | polls the serving Envoy, and watches its files on disk                              |
//! | `handover`    | replaces the serving Envoy, or rolls back                                           |
//! | `drain`       | drains old Envoys; stops all of them at the end                                     |
//! | [`plan`]      | the decisions, without I/O                                                          |
//! | [`trial`]     | checks a binary and a bootstrap before they are used                                |
//! | `ports`       | reserves Envoy's capture ports while Envoy is away                                  |
//! | `liveness`    | detects whether an Envoy with a silent admin interface still serves                 |
//! | `supervised`, `orphan`, `shm`, `clients` | one Envoy: its record, its parent process, its shared memory, its clients |

mod adopt;
mod attend;
mod begin;
mod clients;
mod farewell;
mod member;
mod orphan;
mod plan;
mod ports;
mod serving;
mod shm;
mod status;
mod takeover;
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
use vmesh_net::protocol::Ask;

use crate::config::Config;
use crate::envoy::{State, next, output, until};
use farewell::Leaver;
use member::{Kept, Launch, LaunchId, Member, Record};
use takeover::Why;
use trial::Stamp;

pub use orphan::step;

/// Checks that `program` is an Envoy that runs on this host. The error gives the reason if the check fails.
pub async fn ask_binary(program: &Path) -> Result<(), String> {
    trial::ask(program).await.map(drop).map_err(|unusable| unusable.why)
}

pub use status::{Failure, Leaving, Status};

const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LAST_BACKOFF: Duration = Duration::from_secs(10);
/// Uptime after which a crash no longer counts as a failed start.
const STABLE: Duration = Duration::from_secs(60);
/// Interval at which the binary and the bootstrap on disk are checked.
const TICK: Duration = Duration::from_secs(1);
/// Longest wait for vmesh-net's answer. The restart of Envoy does not depend on this answer.
const TELLS_WITHIN: Duration = Duration::from_millis(300);
/// Time beyond the parent shutdown time after which the supervisor kills an old Envoy. Usually the successor terminates its predecessor;
/// the supervisor does so when the successor is gone.
const PARENT_GRACE: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("could not make {} (`envoy.run_dir`)", .path.display())]
    Directory {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("another `vmesh-agent envoy` runs with {}: give each an `envoy.run_dir` of its own", .0.display())]
    Taken(PathBuf),
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
pub struct Running {
    pub tasks: Tasks,
    pub status: watch::Receiver<Status>,
    /// The lock on the run directory, held until this value is dropped.
    pub lock: File,
}

impl Running {
    /// Binds the status socket and starts the tasks. `file` is the path that `config` was loaded from; each reload loads it again.
    pub fn start(file: &Path, config: Config) -> Result<Running, StartError> {
        if config.envoy.manage == crate::config::Manage::Child {
            return Err(StartError::Child);
        }
        let hangups = signal(SignalKind::hangup()).map_err(StartError::Signal)?;
        let dir = config.envoy.run_dir.clone();
        let made = DirBuilder::new().recursive(true).mode(0o750).create(&dir);
        made.map_err(|cause| StartError::Directory { path: dir.clone(), cause })?;
        let path = dir.join("supervisor.lock");
        let lock = crate::lock(&path).map_err(|cause| StartError::Make { path, cause })?;
        let lock = lock.ok_or_else(|| StartError::Taken(dir.clone()))?;
        // Sweep only after locking: from here on, temporary files in the directory belong to this process.
        _ = fsx::sweep(&dir);
        let socket = config.status_socket();
        let listener = vmesh_daemon::sockets::listen(&socket)
            .map_err(|cause| StartError::Make { path: socket.clone(), cause })?;
        let fifo = dir.join("envoy.out");
        let failed = |cause| StartError::Make { path: fifo.clone(), cause };
        output::fifo(&fifo).map_err(failed)?;
        let reader = output::reader(&fifo).map_err(failed)?;

        let mut tasks = Tasks::new();
        let (sender, status) = watch::channel(Status::default());
        let known = status::Known { status: status.clone(), admin: dir.join("admin.sock") };
        tasks.spawn("envoy output", output::log(reader));
        // The status task is dropped, not drained, at the stop: it reports the progress of the drain until the end, and a client with an
        // unfinished request cannot delay the exit.
        tasks.spawn("status", status::serve(listener, known));
        tasks.spawn("systemd", tell_systemd(status.clone()));
        tasks.spawn("watchdog", systemd::watchdog());
        let file = file.to_owned();
        tasks.spawn_draining("envoys", |stop| {
            let supervisor = Supervisor {
                file,
                record: dir.join("envoys.json"),
                output: fifo,
                dir,
                config: Arc::new(config),
                status: sender,
                hangups,
                stop,
                last_number: 0,
                serving: None,
                leavers: Vec::new(),
                leaving: JoinSet::new(),
                strays: Vec::new(),
                wanted: None,
                refused: None,
                impatient: false,
                good: None,
                live_since: None,
                crashed: None,
                regain_at: Instant::now(),
                regain_pause: FIRST_BACKOFF,
                seen_binary: None,
                asking: JoinSet::new(),
                ports: ports::Held::default(),
            };
            supervisor.run()
        });
        Ok(Running { tasks, status, lock })
    }

    /// Returns the longest time that the tasks may take to stop: the drain of Envoy, preceded by the end of a reload in progress, which
    /// starts, awaits and kills one or two Envoys.
    pub fn stops_within(config: &Config) -> Duration {
        config.envoy.drain.0 + Duration::from_secs(60)
    }
}

async fn tell_systemd(mut status: watch::Receiver<Status>) {
    let mut ready = false;
    loop {
        let (line, live) = {
            let status = status.borrow_and_update();
            (status.line(), status.envoy.state == State::Live)
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
    record: PathBuf,
    output: PathBuf,
    status: watch::Sender<Status>,
    hangups: Signal,
    stop: Stop,
    last_number: u64,
    serving: Option<Member>,
    /// The Envoys that drain, each with a task in `drain_tasks`.
    leavers: Vec<Leaver>,
    leaving: JoinSet<u64>,
    /// Running Envoys of this directory that the record does not list. They are drained once another Envoy is live.
    strays: Vec<Member>,
    wanted: Option<Why>,
    /// The launch (bootstrap and binary) that failed in a reload, so that it is not tried again until it changes.
    refused: Option<LaunchId>,
    /// SIGHUP arrived while a reload was waiting: the reload must not wait any longer.
    impatient: bool,
    /// The launch that was live for [`STABLE`], or the first one that became live.
    good: Option<Launch>,
    live_since: Option<Instant>,
    /// The launch that failed to start or crashed early, and the number of such failures in a row.
    crashed: Option<(LaunchId, u32)>,
    /// Time of the next attempt to replace an Envoy whose admin interface is closed, and the pause after that attempt.
    regain_at: Instant,
    regain_pause: Duration,
    /// The binary on disk that the status last reported as waiting.
    seen_binary: Option<Stamp>,
    /// Runs a new binary with `--version`. The binary may hang, so this runs beside the main loop.
    asking: JoinSet<(Stamp, String)>,
    ports: ports::Held,
}

impl Supervisor {
    async fn run(mut self) {
        self.ports.hold_those_of(&self.config.capture);
        self.adopt().await;
        let mut backoff = FIRST_BACKOFF;
        while !self.stop.is_requested() {
            let began = Instant::now();
            if self.serving.is_none() {
                self.begin().await;
            }
            if self.serving.is_some() {
                let Some(ended) = self.attend().await else { break };
                self.ended(&ended);
                self.tell_net().await;
                if began.elapsed() > STABLE {
                    backoff = FIRST_BACKOFF;
                }
            }
            let mut stop = self.stop.clone();
            if until(&mut stop, sleep(backoff)).await.is_none() {
                break;
            }
            backoff = next(backoff).min(LAST_BACKOFF);
        }
        self.end().await;
    }

    fn set(&self, state: State, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(|status| {
            if status.envoy.state != state {
                status.envoy.state = state;
                status.envoy.since = SystemTime::now();
                status.envoy.reason = None;
            }
            change(status);
        });
    }

    fn failed(&self, what: String) {
        self.status.send_modify(|status| {
            status.last_failure = Some(Failure { at: SystemTime::now(), what });
        });
    }

    fn ended(&mut self, how: &str) {
        let Some(member) = self.serving.take() else { return };
        error!(pid = member.pid(), "Envoy ended: {how}");
        if self.live_since.is_none_or(|since| since.elapsed() < STABLE) {
            self.has_crashed(&member.launch);
        }
        self.set(State::Down, |status| {
            status.envoy.restarts += 1;
            status.envoy.pid = None;
            status.envoy.adopted = false;
            status.envoy.reason = Some(how.to_owned());
            status.epoch = None;
        });
        self.failed(format!("Envoy ended: {how}"));
        self.forget(&member.kept);
        self.keep(None);
    }

    /// Asks vmesh-net to check Envoy now. Otherwise vmesh-net notices the exit at its next check, up to a second later, and until then
    /// connections that may bypass Envoy would be refused.
    async fn tell_net(&self) {
        let capture = &self.config.capture;
        if capture.outbound() || capture.inbound() {
            let told = vmesh_net::client::ask(&capture.socket, &Ask::Look);
            if !matches!(timeout(TELLS_WITHIN, told).await, Ok(Ok(_))) {
                debug!("vmesh-net was not told that Envoy has ended, and sees it by itself");
            }
        }
    }

    fn has_crashed(&mut self, launch: &Launch) {
        let id = launch.id();
        let before = self.crashed.take().filter(|(crashed, _)| *crashed == id).map_or(0, |(_, times)| times);
        self.crashed = Some((id, before + 1));
    }

    /// Writes the record of all Envoys to disk, with `candidate` if one is starting.
    fn keep(&self, candidate: Option<&Kept>) {
        let serving = self.serving.as_ref().map(|member| &member.kept);
        let envoys = serving.into_iter().chain(candidate).chain(self.leavers()).cloned().collect();
        Record { last_number: self.last_number, envoys }.save(&self.record);
        let leaving = self.leavers().map(|kept| Leaving {
            pid: kept.pid(),
            epoch: kept.epoch,
            version: kept.version.clone(),
            until: kept.until.unwrap_or(SystemTime::now()),
        });
        self.status.send_modify(|status| status.leaving = leaving.collect());
    }

    /// Removes the files of an Envoy that is gone.
    fn forget(&self, kept: &Kept) {
        for path in [
            kept.admin(&self.dir),
            member::bootstrap(&self.dir, kept.number),
            member::source(&self.dir, kept.number),
        ] {
            _ = std::fs::remove_file(path);
        }
        let others = self.serving.as_ref().map(|member| &member.kept).into_iter().chain(self.leavers());
        if others.filter(|other| other.number != kept.number).all(|other| other.base_id != kept.base_id) {
            shm::remove(kept.base_id, &self.dir);
        }
    }

    /// Loads the configuration again. On failure, the old settings stay in force.
    fn read_config(&mut self) {
        match Config::load(&self.file) {
            Ok(config) if config.envoy.run_dir == self.dir => {
                self.ports.hold_those_of(&config.capture);
                self.config = Arc::new(config);
            }
            Ok(_) => warn!("`envoy.run_dir` has changed: that takes a restart of this unit"),
            Err(error) => warn!("the settings of Envoy stay as they are: {}", one_line(&error)),
        }
    }
}
