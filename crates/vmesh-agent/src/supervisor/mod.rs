//! `vmesh-agent envoy`: the life of Envoy where it has a unit of its own (`manage: systemd`).
//!
//! Start reading at [`Running::start`].
//!
//! | task           | wakes on                                             | publishes                          |
//! |----------------|------------------------------------------------------|------------------------------------|
//! | `envoys`       | SIGHUP, a new bootstrap, the end of an Envoy, a timer | `watch<Status>`, the record on disk |
//! | `envoy output` | a line from an Envoy                                 | our log                            |
//! | `status`       | requests on `status.sock`                            | `/status`, `/ready`, Envoy's own   |
//! | `systemd`      | `watch<Status>`                                      | readiness, `systemctl status`      |
//!
//! The agent writes the bootstrap and feeds Envoy; it may be stopped, upgraded or killed without anything happening here.
//! Another Envoy takes over from the one that serves (an *epoch*) when SIGHUP says so, with the binary and the settings
//! that are on disk then, or when the bootstrap changes. A new binary alone is only spoken of: package managers write in
//! steps, and the last of them is the signal.
//!
//! ```text
//!   reload ──> trial ──> candidate ──> live ──> the one before it leaves ──> gone
//!                │           │          │
//!                └───────────┴──────────┴────── refused: the one that serves goes on, and the status says why
//! ```
//!
//! [`trial`] finds out without touching anything what can be known before. A candidate then takes over by Envoy's hot
//! restart, which hands it the very sockets, or beside the old one where that is not to be had ([`plan::How`]); either
//! becomes live only when it has been told what to serve. One that has not by then is ended, and what it did to the old
//! one is undone: that may have lost its admin interface, so another of the *same* kind takes over from it. A third Envoy
//! of one line ends the first: so a reload waits for the clients that the first one still has.
//!
//! Envoys are not tied to their supervisor: they are on record, and the next one goes on with them. Only SIGTERM ends
//! them, after they have taken leave of their clients.
//!
//! | file          | what is in it                                                                       |
//! |---------------|-------------------------------------------------------------------------------------|
//! | `adopt`       | the Envoys that an earlier supervisor left                                          |
//! | `begin`       | an Envoy where none serves; how each one is started                                 |
//! | `attend`      | the one that serves is asked how it is, and what is on disk is looked at            |
//! | `takeover`    | another one takes over, or does not                                                 |
//! | `farewell`    | those that leave, and the end                                                       |
//! | [`plan`]      | all that is judged without asking anybody: pure                                     |
//! | [`trial`]     | what can be known of a binary and a bootstrap before                                |
//! | `ports`       | Envoy's capture ports, kept from others while it is away                            |
//! | `serving`     | whether one that cannot be asked serves all the same                                |
//! | `member`, `orphan`, `shm`, `clients` | one Envoy: its record, its parents, its memory, who is connected |

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

/// Asks the binary whether it is an Envoy that runs here; says why not.
pub async fn ask_binary(program: &Path) -> Result<(), String> {
    trial::ask(program).await.map(drop).map_err(|unusable| unusable.why)
}

pub use status::{Failure, Leaving, Status};

const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LAST_BACKOFF: Duration = Duration::from_secs(10);
/// An Envoy that ran this long has not crashed because of how it was started.
const STABLE: Duration = Duration::from_secs(60);
/// How often the files are looked at.
const TICK: Duration = Duration::from_secs(1);
/// Another Envoy is started in any case.
const TELLS_WITHIN: Duration = Duration::from_millis(300);
/// A parent is ended by its child; for the case that the child is not there any more.
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

/// A running supervisor.
pub struct Running {
    pub tasks: Tasks,
    pub status: watch::Receiver<Status>,
    /// Held for as long as it runs.
    pub lock: File,
}

impl Running {
    /// `file` is what `config` was read from; it is read again when Envoy is reloaded.
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
        // Only now: what lies in there is ours.
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
        // Dropped at the end: until then it says how the leave goes, and whoever asks half a question holds nothing up.
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

    /// How long the tasks may take to stop: Envoy's leave, and before that the end of a reload, which starts, awaits and
    /// kills an Envoy, and perhaps one more.
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
            // Gone with its task, whose end is seen by its owner.
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
    /// Those that [`Supervisor::leaving`] sees off.
    leavers: Vec<Leaver>,
    leaving: JoinSet<u64>,
    /// Those that are on no record, until another one serves.
    strays: Vec<Member>,
    wanted: Option<Why>,
    /// The bootstrap that was not taken, with the binary that did not take it.
    refused: Option<LaunchId>,
    /// A reload that waits was asked for once more: it is not to wait any longer.
    impatient: bool,
    /// What was live for a good while, or what was live first.
    good: Option<Launch>,
    live_since: Option<Instant>,
    /// What it was that did not come up or ended soon after, and how often in a row.
    crashed: Option<(LaunchId, u32)>,
    /// When an Envoy that cannot be asked any more is next given a successor, and the pause after that.
    regain_at: Instant,
    regain_pause: Duration,
    /// The binary that was last spoken of.
    seen_binary: Option<Stamp>,
    /// Asks a new binary who it is, which it may not answer.
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

    /// Has vmesh-net look at once, which it else does every second: meanwhile calls would be refused that may go past Envoy.
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

    /// Puts on disk which Envoys there are.
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

    /// Removes the files of one that is gone.
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

    /// The settings may have changed with what is to be reloaded.
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
