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
//! one is undone: that takes the serving Envoy's admin interface away, so another of the *same* kind takes over from it.
//!
//! Envoys are not tied to their supervisor: they are on record, and the next one goes on with them. Only SIGTERM ends
//! them, after they have taken leave of their clients.

mod member;
mod orphan;
mod plan;
mod shm;
mod status;
mod trial;

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{error, info, warn};
use vmesh_daemon::fsx;
use vmesh_daemon::report::one_line;
use vmesh_daemon::{Stop, Tasks, systemd};

use crate::bootstrap::{self, Takeover};
use crate::config::Config;
use crate::envoy::leave::{self, EXITS_WITHIN, LAST_IN, LOOK_SOON};
use crate::envoy::process::{Identity, Process};
use crate::envoy::{State, admin, next, output, until};
use member::{Kept, Launch, Line, Member, Record, Role};
use plan::{Holdings, How, MOST_LEAVING, Parent};
use trial::{Binary, Stamp};

pub use orphan::step;
pub use status::{Failure, Leaving, Status};

const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LAST_BACKOFF: Duration = Duration::from_secs(10);
/// An Envoy that ran this long has not crashed because of how it was started.
const STABLE: Duration = Duration::from_secs(60);
/// A candidate has to be told by the agent what to serve, and to look up the names in it.
const LIVE_WITHIN: Duration = Duration::from_secs(60);
/// When the supervisor is to stop, a candidate may become live all the same: the old one cannot be asked any more.
const LIVE_WITHIN_AT_STOP: Duration = Duration::from_secs(5);
/// How often a live Envoy is asked whether it still is; its end is seen at once.
const LOOK: Duration = Duration::from_secs(5);
/// How often the files are looked at.
const TICK: Duration = Duration::from_secs(1);
/// For the resources that a live Envoy does not have yet.
const SETTLES_WITHIN: Duration = Duration::from_secs(2);
/// A parent is ended by its child; for the case that the child is not there any more.
const PARENT_GRACE: Duration = Duration::from_secs(5);
const MAX_BOOTSTRAP: u64 = 16 << 20;

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
        let lock = lock(&dir)?;
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
        tasks.spawn_draining("status", |stop| status::serve(listener, known, stop));
        tasks.spawn("systemd", tell_systemd(status.clone()));
        tasks.spawn("watchdog", systemd::watchdog());
        let file = file.to_owned();
        tasks.spawn_draining("envoys", |stop| {
            let supervisor = Supervisor {
                file,
                network: network(),
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
                wanted: None,
                refused: None,
                good: None,
                failures: 0,
                seen_binary: None,
                asking: JoinSet::new(),
            };
            supervisor.run()
        });
        Ok(Running { tasks, status, lock })
    }

    /// How long the tasks may take to stop.
    pub fn stops_within(config: &Config) -> Duration {
        config.envoy.drain.0 + LIVE_WITHIN_AT_STOP + Duration::from_secs(15)
    }
}

fn lock(dir: &Path) -> Result<File, StartError> {
    let path = dir.join("supervisor.lock");
    let failed = |cause| StartError::Make { path: path.clone(), cause };
    let file = File::options().create(true).write(true).truncate(false).open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(StartError::Taken(dir.to_owned())),
        Err(std::fs::TryLockError::Error(cause)) => Err(failed(cause)),
    }
}

/// The number of the network namespace that this process is in.
fn network() -> u64 {
    std::fs::metadata("/proc/self/ns/net").map_or(0, |metadata| metadata.ino())
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

/// Why another Envoy is to take over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    /// SIGHUP.
    Asked,
    Bootstrap,
    /// The one that it took over from died before it was told to end.
    ParentLost,
}

/// What became of a reload.
enum Reload {
    Done,
    /// It is to be tried again.
    Later(String),
    /// The one that served goes on, or is gone (`serving` says which).
    Failed(String),
}

struct Supervisor {
    file: PathBuf,
    config: Arc<Config>,
    dir: PathBuf,
    record: PathBuf,
    output: PathBuf,
    network: u64,
    status: watch::Sender<Status>,
    hangups: Signal,
    stop: Stop,
    last_number: u64,
    serving: Option<Member>,
    /// Those that [`Supervisor::leaving`] sees off.
    leavers: Vec<Kept>,
    leaving: JoinSet<u64>,
    wanted: Option<Why>,
    /// The bootstrap that was not taken, with the binary that did not take it.
    refused: Option<(String, Option<Stamp>)>,
    /// What was live last.
    good: Option<Launch>,
    /// How many Envoys in a row ended before they were live.
    failures: u32,
    /// The binary that was last spoken of.
    seen_binary: Option<Stamp>,
    /// Asks a new binary who it is, which it may not answer.
    asking: JoinSet<(Stamp, String)>,
}

impl Supervisor {
    async fn run(mut self) {
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
        if self.status.borrow().envoy.state != State::Live {
            self.failures += 1;
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

    /// Puts on disk which Envoys there are.
    fn keep(&self, candidate: Option<&Kept>) {
        let serving = self.serving.as_ref().map(|member| &member.kept);
        let envoys = serving.into_iter().chain(candidate).chain(&self.leavers).cloned().collect();
        Record { last_number: self.last_number, envoys }.save(&self.record);
        let leaving = self.leavers.iter().map(|kept| Leaving {
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
        let others = self.serving.as_ref().map(|member| &member.kept).into_iter().chain(&self.leavers);
        if others.filter(|other| other.number != kept.number).all(|other| other.base_id != kept.base_id) {
            shm::remove(kept.base_id);
        }
    }

    // --- Those that an earlier supervisor left.

    async fn adopt(&mut self) {
        let record = Record::load(&self.record);
        self.last_number = record.last_number;
        let mut gone = Vec::new();
        let mut serving: Option<Member> = None;
        for mut kept in record.envoys {
            if kept.identity.is_none() {
                kept.identity = self.half_started(&kept).await;
            }
            let Some(mut member) = Member::find(kept.clone(), &self.dir) else {
                gone.push(kept);
                continue;
            };
            match member.kept.role {
                Role::Leaving => self.see_off(member),
                Role::Serving => serving = Some(member),
                // One that was to take over has, if it is live.
                Role::Candidate if self.is_live(&member.kept).await => {
                    if let Some(old) = serving.take() {
                        let hot = old.kept.base_id == member.kept.base_id;
                        member.kept.parent = hot.then_some(old.kept.number);
                        self.see_off(old);
                    }
                    serving = Some(member);
                }
                Role::Candidate => {
                    warn!(
                        pid = member.pid(),
                        "an Envoy that an earlier supervisor started is not live, and is ended"
                    );
                    leave::kill(&mut member.process).await;
                    gone.push(member.kept);
                }
            }
        }
        if let Some(mut member) = serving {
            // Asked for patiently: right after a boot or under load it may take its time.
            let patience = if member.kept.admin_closed { Duration::ZERO } else { EXITS_WITHIN };
            let deadline = Instant::now() + patience.max(LOOK_SOON);
            let answers = leave::answers(&member.kept.admin(&self.dir), member.pid(), deadline).await;
            if answers || member.kept.admin_closed {
                info!(pid = member.pid(), "took over the Envoy of an earlier supervisor");
                member.kept.role = Role::Serving;
                member.kept.admin_closed = !answers;
                if !answers {
                    self.candidate_is_gone(&mut member.kept);
                }
                self.link(&member.kept);
                self.now_serving(member, true);
            } else {
                warn!(
                    pid = member.pid(),
                    "the Envoy of an earlier supervisor does not answer and is replaced"
                );
                leave::kill(&mut member.process).await;
                gone.push(member.kept);
            }
        }
        // Only now: what those that are still there share with them is not removed.
        for kept in gone {
            self.forget(&kept);
        }
        self.keep(None);
        self.regain().await;
    }

    /// Which one it is that was being started when the supervisor died. One that is not live is ended.
    async fn half_started(&self, kept: &Kept) -> Option<Identity> {
        let path = member::bootstrap(&self.dir, kept.number);
        if self.is_live(kept).await
            && let Some(pid) = admin::listening_pid(&kept.admin(&self.dir)).await
        {
            return Some(Process::find(pid)?.identity());
        }
        // More than once: the first of them may just be starting the next.
        for _ in 0..10 {
            let found = member::naming(&path);
            if found.is_empty() {
                break;
            }
            for mut process in found {
                leave::kill(&mut process).await;
            }
        }
        None
    }

    async fn is_live(&self, kept: &Kept) -> bool {
        let admin = kept.admin(&self.dir);
        admin::server_info(&admin).await.is_ok_and(|info| info.state == "LIVE")
    }

    // --- An Envoy where none serves.

    /// Starts an Envoy of a line of its own, as soon as there is something to start it with.
    async fn begin(&mut self) {
        let launch = loop {
            self.read_config();
            match self.launch() {
                Ok(launch) => break launch,
                Err(why) => {
                    self.set(State::Waiting, |status| status.envoy.reason = Some(why));
                    let mut stop = self.stop.clone();
                    if until(&mut stop, sleep(TICK / 4)).await.is_none() {
                        return;
                    }
                }
            }
        };
        self.wanted = None;
        // What ended before it was live, twice, is not what this host should depend on if there is something else.
        let good =
            self.good.clone().filter(|good| self.failures >= 2 && !same(good, &launch) && is_startable(good));
        let again = good.is_some();
        if again {
            warn!(
                "Envoy ended {} times before it was live: started as it was when it last was",
                self.failures
            );
            self.refused = Some((plan::digest(&launch.bootstrap), launch.stamp.clone()));
        }
        self.fresh(&good.unwrap_or(launch), again).await;
    }

    async fn fresh(&mut self, launch: &Launch, again: bool) {
        let mut stop = self.stop.clone();
        let Some(binary) = until(&mut stop, trial::ask(&launch.program)).await else { return };
        let number = self.last_number + 1;
        let line = Line { base_id: plan::base_id(&self.dir, self.network, number), epoch: 0 };
        match self.start(launch, again, line, binary.as_ref().ok(), false).await {
            Ok(mut member) => {
                member.kept.role = Role::Serving;
                self.link(&member.kept);
                self.now_serving(member, false);
            }
            Err(why) => {
                error!("{why}; `envoy.path` in the configuration says where Envoy is");
                self.failed(why.clone());
                self.set(State::Down, |status| status.envoy.reason = Some(why));
            }
        }
    }

    fn now_serving(&mut self, member: Member, adopted: bool) {
        self.set(State::Starting, |status| {
            status.envoy.pid = Some(member.pid());
            status.envoy.version = member.kept.version.clone();
            status.envoy.adopted = adopted;
            status.epoch = Some(member.kept.epoch);
            status.base_id = Some(member.kept.base_id);
            status.waiting_binary = None;
        });
        self.seen_binary = member.kept.stamp.clone();
        self.asking.abort_all();
        self.serving = Some(member);
        self.keep(None);
    }

    /// What is on disk now.
    fn launch(&self) -> Result<Launch, String> {
        let path = self.config.bootstrap();
        let text = match fsx::read_capped(&path, MAX_BOOTSTRAP) {
            Ok(text) => String::from_utf8(text).map_err(|_| format!("{} is not text", path.display()))?,
            Err(error) if error.is_not_found() => {
                return Err(format!(
                    "the agent has not written {} yet: is vmesh-agent running?",
                    path.display()
                ));
            }
            Err(error) => return Err(one_line(&error)),
        };
        Ok(Launch {
            program: self.config.envoy.path.clone(),
            file: None,
            stamp: Stamp::of(&self.config.envoy.path),
            arguments: bootstrap::settings(&self.config),
            bootstrap: text.into(),
        })
    }

    /// Starts an Envoy. `waits`: it becomes live only when it has been told what to serve.
    async fn start(
        &mut self,
        launch: &Launch,
        again: bool,
        line: Line,
        binary: Option<&Binary>,
        waits: bool,
    ) -> Result<Member, String> {
        self.last_number += 1;
        let number = self.last_number;
        let path = member::bootstrap(&self.dir, number);
        let bootstrap = plan::bootstrap(&launch.bootstrap, &member::admin(&self.dir, number), waits)
            .map_err(|why| format!("{} is of no use: {why}", self.config.bootstrap().display()))?;
        for (path, text) in [
            (&path, bootstrap.to_string().as_bytes()),
            (&member::source(&self.dir, number), launch.bootstrap.as_bytes()),
        ] {
            fsx::write_atomically(path, text, fsx::PRIVATE).map_err(|error| one_line(&error))?;
        }
        let takeover = match binary {
            Some(Binary { hot_restart: None, .. }) => Takeover::None,
            _ => Takeover::Hot {
                base_id: line.base_id,
                epoch: line.epoch,
                parent_shutdown_s: self.config.envoy.hot_restart.parent_shutdown.0.as_secs(),
            },
        };
        let mut arguments = bootstrap::started_with(&path, takeover, self.config.envoy.drain.0);
        arguments.extend_from_slice(&launch.arguments);
        // On record before it is there: a supervisor that dies in between leaves nobody whom the next does not find.
        let kept = Kept::new(launch, number, line, binary);
        self.keep(Some(&kept));
        let member = Member::start(launch, &arguments, again, &self.output, kept)
            .await
            .map_err(|error| format!("could not start {}: {error}", launch.program.display()))?;
        info!(pid = member.pid(), epoch = line.epoch, "started {}", launch.program.display());
        self.keep(Some(&member.kept));
        Ok(member)
    }

    /// Gives the admin interface of the Envoy that serves its stable name.
    fn link(&self, kept: &Kept) {
        let name = self.dir.join("admin.sock");
        let aside = self.dir.join("admin.sock.new");
        _ = std::fs::remove_file(&aside);
        let target = kept.admin(&self.dir);
        let Some(target) = target.file_name() else { return };
        let linked = std::os::unix::fs::symlink(target, &aside).and_then(|()| std::fs::rename(&aside, &name));
        if let Err(error) = linked {
            warn!("Envoy cannot be asked at {}: {error}", name.display());
        }
    }

    // --- The one that serves.

    /// Looks after the Envoy that serves until it ends, and says how; `None` when the supervisor is to stop.
    async fn attend(&mut self) -> Option<String> {
        let mut silent_since: Option<Instant> = None;
        let mut look_at = Instant::now();
        let mut tick_at = Instant::now() + TICK;
        loop {
            let serving = self.serving.as_mut()?;
            let mut hung_up = false;
            tokio::select! {
                biased;
                () = self.stop.requested() => return None,
                ended = serving.process.exited() => return Some(ended),
                Some(()) = self.hangups.recv() => hung_up = true,
                Some(answer) = self.asking.join_next() => {
                    if let Ok((stamp, what)) = answer
                        && self.seen_binary.as_ref() == Some(&stamp)
                    {
                        self.waits(Some(format!("another Envoy ({what}) is installed and waits for a reload (SIGHUP)")));
                    }
                    continue;
                }
                Some(gone) = self.leaving.join_next() => {
                    if let Ok(number) = gone {
                        self.has_left(number);
                        tick_at = tick_at.min(Instant::now());
                    }
                    continue;
                }
                () = tokio::time::sleep_until(look_at.min(tick_at)) => {}
            }
            let now = Instant::now();
            if hung_up {
                info!("SIGHUP: another Envoy is to take over");
                self.wanted = Some(Why::Asked);
                tick_at = now;
            }
            if now >= look_at {
                let pause = self.look(&mut silent_since).await;
                look_at = Instant::now() + pause;
                let hung_after = self.config.envoy.hung_after.0;
                if silent_since.is_some_and(|since| since.elapsed() >= hung_after)
                    && let Some(ended) = self.kill_hung(&format!("no answer for {hung_after:?}")).await
                {
                    return Some(ended);
                }
            }
            if now >= tick_at {
                tick_at = now + TICK;
                self.look_at_files();
                if let Some(why) = self.wanted {
                    // Whoever asks for another Envoy because this one hangs is not told to wait for it.
                    if why == Why::Asked && silent_since.is_some() {
                        return self.kill_hung("it did not answer when it was to be reloaded").await;
                    }
                    if self.status.borrow().envoy.state == State::Live {
                        if let Some(ended) = self.reload(why).await {
                            return Some(ended);
                        }
                        silent_since = None;
                        look_at = Instant::now();
                    }
                }
            }
        }
    }

    async fn kill_hung(&mut self, why: &str) -> Option<String> {
        let serving = self.serving.as_mut()?;
        error!(pid = serving.pid(), "Envoy hangs and is killed: {why}");
        leave::kill(&mut serving.process).await;
        Some(format!("it hung and was killed: {why}"))
    }

    /// Asks Envoy how it is, and says when to ask again.
    async fn look(&mut self, silent_since: &mut Option<Instant>) -> Duration {
        let Some(serving) = &self.serving else { return LOOK };
        if serving.kept.admin_closed {
            self.set(State::Live, |status| {
                status.envoy.reason = Some(
                    "its admin interface is closed since another Envoy was to take over and did not"
                        .to_owned(),
                );
            });
            return LOOK;
        }
        let launch = serving.launch.clone();
        let was = self.status.borrow().envoy.state;
        match admin::server_info(&serving.kept.admin(&self.dir)).await {
            Ok(info) if info.state == "LIVE" => {
                *silent_since = None;
                if was != State::Live {
                    info!(pid = serving.pid(), version = info.version(), "Envoy is live");
                    self.failures = 0;
                    self.good = Some(launch);
                }
                self.set(State::Live, |status| {
                    status.envoy.version = Some(info.version().to_owned());
                    status.envoy.reason = None;
                });
                LOOK
            }
            Ok(info) => {
                *silent_since = None;
                self.set(State::Starting, |status| status.envoy.reason = Some(info.state));
                LOOK_SOON
            }
            Err(error) => {
                let since = *silent_since.get_or_insert_with(Instant::now);
                let reason = one_line(&error);
                // Before it has bound its socket that is no news.
                if was != State::Starting || since.elapsed() > Duration::from_secs(5) {
                    if was != State::Silent {
                        warn!(
                            "Envoy does not answer; it is killed if that lasts {:?}: {reason}",
                            self.config.envoy.hung_after.0
                        );
                    }
                    self.set(State::Silent, |status| status.envoy.reason = Some(reason));
                }
                LOOK_SOON
            }
        }
    }

    /// What of the files that Envoy was started from is another one by now.
    fn look_at_files(&mut self) {
        let Some(serving) = &self.serving else { return };
        let stamp = Stamp::of(&self.config.envoy.path);
        if let Ok(launch) = self.launch()
            && launch.bootstrap != serving.launch.bootstrap
            && self.refused != Some((plan::digest(&launch.bootstrap), stamp.clone()))
            && self.wanted.is_none()
        {
            info!("{} has changed: another Envoy is to take over", self.config.bootstrap().display());
            self.wanted = Some(Why::Bootstrap);
        }
        let runs = serving.kept.stamp.clone();
        if stamp != self.seen_binary {
            self.seen_binary = stamp.clone();
            self.asking.abort_all();
            match stamp {
                stamp if stamp == runs => self.waits(None),
                None => {
                    self.waits(Some(format!("there is no {} any more", self.config.envoy.path.display())))
                }
                Some(stamp) => {
                    self.asking.spawn(async move {
                        let version = trial::ask(&stamp.path).await;
                        let what =
                            version.map_or_else(|why| format!("not usable: {why}"), |binary| binary.version);
                        (stamp, what)
                    });
                }
            }
        }
    }

    fn waits(&self, what: Option<String>) {
        if let Some(what) = &what {
            info!("{what}");
        }
        self.status.send_modify(|status| status.waiting_binary = what);
    }

    // --- Another one takes over.

    /// Lets another Envoy take over. Returns how the serving one ended, if none serves afterwards.
    async fn reload(&mut self, why: Why) -> Option<String> {
        let outcome = self.replace(why).await;
        let gone = self.serving.is_none();
        match outcome {
            Reload::Done => {
                self.wanted = None;
                self.refused = None;
                self.status.send_modify(|status| {
                    status.reload = None;
                    status.reloads += 1;
                    status.last_failure = None;
                });
                None
            }
            Reload::Later(why) => {
                let said = format!("a reload waits: {why}");
                if self.status.borrow().reload.as_ref() != Some(&said) {
                    info!("{said}");
                }
                self.status.send_modify(|status| status.reload = Some(said));
                None
            }
            Reload::Failed(why) => {
                self.wanted = None;
                let what =
                    format!("the reload failed and was rolled back: {why}; mend that and send SIGHUP again");
                error!("{what}");
                self.failed(what);
                self.status.send_modify(|status| status.reload = None);
                gone.then(|| "it ended while another one was to take over".to_owned())
            }
        }
    }

    async fn replace(&mut self, why: Why) -> Reload {
        self.read_config();
        let launch = match self.launch() {
            Ok(launch) => launch,
            Err(why) => return Reload::Failed(why),
        };
        if self.leavers.len() >= MOST_LEAVING {
            if why != Why::Asked {
                return Reload::Later(format!(
                    "{} Envoys still take leave of their clients",
                    self.leavers.len()
                ));
            }
            self.end_oldest().await;
        }
        // Whoever takes over has to be told what to serve.
        let socket = self.config.xds_socket();
        if let Err(error) = tokio::net::UnixStream::connect(&socket).await {
            return Reload::Later(format!("the agent does not listen on {}: {error}", socket.display()));
        }
        self.status.send_modify(|status| status.reload = Some("another Envoy is tried out".to_owned()));
        let Some(mut serving) = self.serving.take() else {
            return Reload::Failed("no Envoy serves any more".to_owned());
        };
        let mut stop = self.stop.clone();
        let tried = tokio::select! {
            tried = self.try_out(&launch, &serving.kept) => Some(tried),
            ended = serving.process.exited() => Some(Err(format!("the Envoy that served ended meanwhile: {ended}"))),
            () = stop.requested() => None,
        };
        self.serving = Some(serving);
        let (binary, before) = match tried {
            None => return Reload::Later("the supervisor stops".to_owned()),
            Some(Ok(tried)) => tried,
            Some(Err(why)) => {
                self.refused = Some((plan::digest(&launch.bootstrap), launch.stamp.clone()));
                return Reload::Failed(why);
            }
        };
        let done = self.take_over(&launch, false, &binary, &before).await;
        if let Err(why) = done {
            self.refused = Some((plan::digest(&launch.bootstrap), launch.stamp.clone()));
            self.regain().await;
            return Reload::Failed(why);
        }
        Reload::Done
    }

    /// Finds out, without touching anything, whether an Envoy would come up with `launch`.
    async fn try_out(&self, launch: &Launch, serving: &Kept) -> Result<(Binary, Holdings), String> {
        let binary = trial::ask(&launch.program)
            .await
            .map_err(|why| format!("{} does not run: {why}", launch.program.display()))?;
        let bootstrap = plan::bootstrap(&launch.bootstrap, &self.dir.join("admin.trial.sock"), false)
            .map_err(|why| format!("{} is of no use: {why}", self.config.bootstrap().display()))?;
        let (dump, before) = match serving.admin_closed {
            false => self.dump(serving).await?,
            true => (Value::Null, Holdings::default()),
        };
        let scratch = self.dir.join("trial.json");
        trial::validate(&launch.program, &launch.arguments, &bootstrap, Some(&dump), &scratch).await?;
        Ok((binary, before))
    }

    async fn dump(&self, kept: &Kept) -> Result<(Value, Holdings), String> {
        let admin = kept.admin(&self.dir);
        let dump = admin::config_dump(&admin).await.map_err(|error| one_line(&error))?;
        let rejected = admin::rejected(&admin).await.map_err(|error| one_line(&error))?;
        let holdings = plan::holdings(&dump, rejected);
        Ok((dump, holdings))
    }

    /// Starts an Envoy that takes over from the one that serves. If it does not, that one goes on, and is on record with
    /// what it has lost.
    async fn take_over(
        &mut self,
        launch: &Launch,
        again: bool,
        binary: &Binary,
        before: &Holdings,
    ) -> Result<(), String> {
        let Some(mut old) = self.serving.take() else { return Err("no Envoy serves any more".to_owned()) };
        let parent = match old.kept.parent {
            _ if old.kept.parent_lost => Parent::Lost,
            Some(number) if self.leavers.iter().any(|kept| kept.number == number) => Parent::Leaves,
            _ => Parent::Gone,
        };
        let how = plan::how(old.kept.hot_restart.as_deref(), binary.hot_restart.as_deref(), parent);
        let hot = how == How::Hot;
        let line = match &how {
            How::Hot => Line { base_id: old.kept.base_id, epoch: old.kept.epoch + 1 },
            How::Beside(why) => {
                info!("another Envoy takes over by binding the same ports: {why}");
                if std::fs::read_to_string("/proc/sys/net/ipv4/tcp_migrate_req")
                    .is_ok_and(|text| text.trim() == "0")
                {
                    info!(
                        "a connection that waits at that moment may be reset; `sysctl net.ipv4.tcp_migrate_req=1` prevents it"
                    );
                }
                Line { base_id: plan::base_id(&self.dir, self.network, self.last_number + 1), epoch: 0 }
            }
        };
        self.status.send_modify(|status| status.reload = Some("another Envoy starts".to_owned()));
        let began = Instant::now();
        // On record from its first moment as one that may not be asked any more.
        let admin_was_closed = old.kept.admin_closed;
        old.kept.admin_closed |= hot;
        self.serving = Some(old);
        let started = self.start(launch, again, line, Some(binary), true).await;
        let Some(mut old) = self.serving.take() else { return Err("no Envoy serves any more".to_owned()) };
        let mut new = match started {
            Ok(new) => new,
            Err(why) => {
                old.kept.admin_closed = admin_was_closed;
                self.serving = Some(old);
                self.keep(None);
                return Err(why);
            }
        };
        let live = match self.becomes_live(&mut new, &mut old).await {
            Ok(()) => self.has_all(&new.kept, before).await.map_err(|why| (why, true)),
            Err(why) => Err((why, false)),
        };
        match live {
            Ok(()) => {
                info!(pid = new.pid(), "Envoy took over after {} ms", began.elapsed().as_millis());
                new.kept.role = Role::Serving;
                new.kept.parent = hot.then_some(old.kept.number);
                self.link(&new.kept);
                self.see_off(old);
                self.now_serving(new, false);
                Ok(())
            }
            Err((why, was_live)) => {
                let pid = new.pid();
                leave::kill(&mut new.process).await;
                warn!(pid, "the Envoy that was to take over is ended: {why}");
                if was_live && hot {
                    // The old one has closed its listeners for it, and nobody else has them: at once, as it was.
                    let launch = old.launch.clone();
                    self.see_off(old);
                    self.forget(&new.kept);
                    self.fresh(&launch, is_startable(&launch)).await;
                } else {
                    if hot {
                        self.candidate_is_gone(&mut old.kept);
                    } else {
                        old.kept.admin_closed = admin_was_closed;
                    }
                    self.serving = Some(old);
                    self.forget(&new.kept);
                }
                self.keep(None);
                Err(why)
            }
        }
    }

    /// A child that was not live is gone; its parent serves on.
    fn candidate_is_gone(&self, parent: &mut Kept) {
        if let Err(why) = shm::forget_child(parent.base_id, parent.hot_restart.as_deref().unwrap_or_default())
        {
            warn!("no other Envoy can take over hot from this one: {why}");
            parent.hot_restart = None;
        }
    }

    /// Waits until `new` is live.
    async fn becomes_live(&mut self, new: &mut Member, old: &mut Member) -> Result<(), String> {
        let admin = new.kept.admin(&self.dir);
        let mut deadline = Instant::now() + LIVE_WITHIN;
        let mut stopping = self.stop.is_requested();
        if stopping {
            deadline = Instant::now() + LIVE_WITHIN_AT_STOP;
        }
        let hung_after = self.config.envoy.hung_after.0;
        let mut last_answer = Instant::now();
        let mut last = "no answer".to_owned();
        loop {
            tokio::select! {
                biased;
                ended = new.process.exited() => {
                    return Err(format!("it ended before it was live: {ended}"));
                }
                ended = old.process.exited() => {
                    return Err(format!("the Envoy that served ended meanwhile: {ended}"));
                }
                () = self.stop.requested(), if !stopping => {
                    stopping = true;
                    deadline = deadline.min(Instant::now() + LIVE_WITHIN_AT_STOP);
                }
                () = sleep(LOOK_SOON / 5) => {}
            }
            // Envoy binds its admin interface under a name of its own: nobody else answers there.
            match timeout_at(deadline, admin::server_info(&admin)).await {
                Ok(Ok(info)) if info.state == "LIVE" => return Ok(()),
                Ok(Ok(info)) => {
                    last = format!("it is {}", info.state);
                    last_answer = Instant::now();
                }
                Ok(Err(error)) => last = one_line(&error),
                Err(_) => {}
            }
            if last_answer.elapsed() >= hung_after {
                return Err(format!("it hangs: no answer for {hung_after:?}"));
            }
            if Instant::now() >= deadline {
                return Err(format!("it was not live after {} s: {last}", LIVE_WITHIN.as_secs()));
            }
        }
    }

    /// Whether it has what the Envoy before it had.
    async fn has_all(&self, kept: &Kept, before: &Holdings) -> Result<(), String> {
        let deadline = Instant::now() + SETTLES_WITHIN;
        loop {
            let verdict = match self.dump(kept).await {
                Ok((_, after)) => plan::lacks(before, &after),
                // It was live a moment ago: whoever looks after it will see.
                Err(_) => return Ok(()),
            };
            if verdict.is_ok() || Instant::now() >= deadline {
                return verdict;
            }
            sleep(LOOK_SOON).await;
        }
    }

    /// Gets back what the serving Envoy lost to one that did not take over, by letting another of its own kind do it.
    async fn regain(&mut self) {
        let Some(serving) = self.serving.as_mut().filter(|serving| serving.kept.admin_closed) else { return };
        if let Ok(ended) = timeout(Duration::ZERO, serving.process.exited()).await {
            self.ended(&ended);
            return;
        }
        let launch = serving.launch.clone();
        let again = is_startable(&launch);
        let binary = Binary {
            version: serving.kept.version.clone().unwrap_or_default(),
            hot_restart: serving.kept.hot_restart.clone(),
        };
        if binary.hot_restart.is_none() {
            return;
        }
        info!(pid = serving.pid(), "another Envoy like the one that serves takes over from it");
        if let Err(why) = self.take_over(&launch, again, &binary, &Holdings::default()).await {
            warn!("the Envoy that serves goes on and can no longer be asked how it is: {why}");
            if let Some(serving) = self.serving.as_mut()
                && let Ok(ended) = timeout(Duration::ZERO, serving.process.exited()).await
            {
                self.ended(&ended);
            }
        }
    }

    /// Lets one end in its own time: its child has made it take its leave, or it is told to.
    fn see_off(&mut self, mut member: Member) {
        let (drain, stay) = (self.config.envoy.drain.0, self.config.envoy.hot_restart.parent_shutdown.0);
        let until = *member.kept.until.get_or_insert_with(|| SystemTime::now() + stay + PARENT_GRACE);
        member.kept.role = Role::Leaving;
        self.leavers.push(member.kept.clone());
        let left = until.duration_since(SystemTime::now()).unwrap_or_default();
        let admin = member.kept.admin(&self.dir);
        self.leaving.spawn(async move {
            if member.kept.admin_closed {
                if timeout(left, member.process.exited()).await.is_err() {
                    leave::kill(&mut member.process).await;
                }
            } else {
                leave::take_leave(&mut member.process, &admin, drain, left).await;
                // Not by SIGTERM: that makes it end the one that it took over from, which may still have connections.
                leave::kill(&mut member.process).await;
            }
            member.kept.number
        });
    }

    fn has_left(&mut self, number: u64) {
        let Some(at) = self.leavers.iter().position(|kept| kept.number == number) else { return };
        let kept = self.leavers.remove(at);
        info!(pid = kept.pid(), "an Envoy that took its leave is gone");
        // Its child ends it at that time, and sets it down as ended; any other end it does not know of.
        let in_time = kept.until.is_some_and(|until| SystemTime::now() + PARENT_GRACE * 2 >= until);
        let child = self.serving.as_mut().filter(|serving| serving.kept.parent == Some(number));
        if let Some(child) = child.filter(|_| kept.admin_closed && !in_time) {
            warn!(
                pid = child.pid(),
                "the Envoy before this one died before its time, and this one would abort with it: another one takes over"
            );
            child.kept.parent_lost = true;
            self.wanted.get_or_insert(Why::ParentLost);
        }
        self.forget(&kept);
        self.keep(None);
    }

    /// Ends the one that has been leaving for longest, with the connections that it still has.
    async fn end_oldest(&mut self) {
        let Some(kept) = self.leavers.first().cloned() else { return };
        warn!(
            pid = kept.pid(),
            "this Envoy is ended, with the connections that it still has: it is the third"
        );
        if let Some(mut process) = kept.process() {
            leave::end(&mut process).await;
        }
        self.has_left(kept.number);
    }

    /// The settings may have changed with what is to be reloaded.
    fn read_config(&mut self) {
        match Config::load(&self.file) {
            Ok(config) if config.envoy.run_dir == self.dir => self.config = Arc::new(config),
            Ok(_) => warn!("`envoy.run_dir` has changed: that takes a restart of this unit"),
            Err(error) => warn!("the settings of Envoy stay as they are: {}", one_line(&error)),
        }
    }

    // --- The end.

    async fn end(mut self) {
        self.set(State::Draining, |status| status.reload = None);
        if let Some(mut serving) = self.serving.take() {
            let admin = serving.kept.admin(&self.dir);
            if serving.kept.admin_closed {
                warn!(pid = serving.pid(), "this Envoy cannot be told to take its leave and is ended");
                leave::end(&mut serving.process).await;
            } else {
                leave::take_leave(&mut serving.process, &admin, self.config.envoy.drain.0, LAST_IN).await;
                if serving.kept.parent_lost {
                    // By SIGTERM it would look for the one that it took over from, for ten seconds, and abort.
                    leave::kill(&mut serving.process).await;
                } else {
                    leave::end(&mut serving.process).await;
                }
            }
            self.forget(&serving.kept);
        }
        self.leaving.abort_all();
        let mut last: JoinSet<()> = JoinSet::new();
        for mut process in self.leavers.iter().filter_map(Kept::process) {
            last.spawn(async move { leave::end(&mut process).await });
        }
        while last.join_next().await.is_some() {}
        for kept in std::mem::take(&mut self.leavers) {
            self.forget(&kept);
        }
        _ = std::fs::remove_file(self.dir.join("admin.sock"));
        self.keep(None);
        self.set(State::Stopped, |status| {
            status.envoy.pid = None;
            status.epoch = None;
        });
    }
}

/// Whether two would be the same Envoy.
fn same(one: &Launch, other: &Launch) -> bool {
    one.stamp == other.stamp && one.arguments == other.arguments && one.bootstrap == other.bootstrap
}

/// Whether an Envoy can be started from the file that this one was started from. Not from a script: the kernel starts
/// its interpreter, which then opens a path.
fn is_startable(launch: &Launch) -> bool {
    use std::os::unix::fs::FileExt;
    let mut magic = [0; 2];
    launch.file.as_ref().is_some_and(|file| file.read_exact_at(&mut magic, 0).is_ok() && magic != *b"#!")
}
