//! The local Envoy: starts, watches and drains it.
//!
//! With `manage: systemd`, Envoy has a systemd unit and a [supervisor](crate::supervisor) of its own. The agent writes Envoy's bootstrap,
//! and polls the supervisor for Envoy's status.
//!
//! With `manage: child`, the agent starts Envoy, and starts it again after a crash. Envoy survives its agent, because killing or upgrading
//! an agent must not fail a request: the next agent takes over the running Envoy, which it identifies by a record on disk (see
//! [`process`]). If Envoy's command line or bootstrap has changed meanwhile, a second Envoy starts beside the first one and binds the same
//! ports (`SO_REUSEPORT`); the first one drains once the second one is live. The cost: when a listener closes, the kernel resets the
//! connections that wait in its queue, unless `net.ipv4.tcp_migrate_req` is 1.
//!
//! Stopping the agent drains Envoy for at most `envoy.drain` and stops it, unless `keep_on_stop` is set: on a host without a service
//! manager nothing else would stop it.

pub(crate) mod admin;
pub(crate) mod output;
pub(crate) mod process;
pub(crate) mod shutdown;

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::{error, info, warn};
use vmesh_daemon::fsx::{self, FileError};
use vmesh_daemon::report::one_line;
use vmesh_daemon::{Stop, Tasks};

use crate::bootstrap;
use crate::config::{Config, EnvoyManager};
use process::{ChildLaunch, ChildRecord, Process};
use shutdown::{EXITS_WITHIN, POLL_SOON, kill, wait_until_answers};

const LIVE_WITHIN: Duration = Duration::from_secs(30);
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const LAST_BACKOFF: Duration = Duration::from_secs(10);
/// Uptime after which a crash no longer counts as a failed start.
const STABLE: Duration = Duration::from_secs(60);
/// Interval at which a live Envoy's admin interface is polled. The exit of the process is noticed at once.
const LOOK: Duration = Duration::from_secs(5);

/// The status of the local Envoy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvoyStatus {
    pub state: EnvoyState,
    pub pid: Option<i32>,
    pub version: Option<String>,
    /// Timestamp of the most recent change of `state`.
    #[serde(
        serialize_with = "crate::status::epoch_seconds",
        deserialize_with = "crate::status::from_epoch_seconds"
    )]
    pub since: SystemTime,
    /// Number of times that Envoy exited unexpectedly.
    pub restarts: u64,
    /// Reports whether an earlier agent started this Envoy.
    pub adopted: bool,
    /// The reason why Envoy is not live.
    pub reason: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EnvoyState {
    /// The agent has no configuration for Envoy yet.
    Waiting,
    Starting,
    Live,
    /// Envoy runs, and its admin interface does not answer.
    Silent,
    /// Envoy exited and is about to be started again.
    Down,
    Draining,
    Stopped,
}

impl Default for EnvoyStatus {
    fn default() -> Self {
        EnvoyStatus {
            state: EnvoyState::Waiting,
            pid: None,
            version: None,
            since: SystemTime::now(),
            restarts: 0,
            adopted: false,
            reason: None,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum EnvoyError {
    #[error("could not write Envoy's bootstrap")]
    Bootstrap(#[source] FileError),
    #[error("could not make {} for Envoy's output", .path.display())]
    Output {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
}

/// Writes the bootstrap and starts the tasks that look after Envoy. Envoy is started once `has_config` is true: an Envoy that starts before
/// that would become live without any listener.
pub fn spawn(
    tasks: &mut Tasks,
    config: &Arc<Config>,
    status: watch::Sender<EnvoyStatus>,
    has_config: watch::Receiver<bool>,
) -> Result<(), EnvoyError> {
    let mut text = bootstrap::bootstrap(config);
    if config.envoy.manage == EnvoyManager::Child {
        // With `manage: systemd`, Envoy's unit has its own limit of open files, and its supervisor applies that.
        bootstrap::fit_to_open_files(&mut text, bootstrap::open_files());
    }
    let text = format!("{text:#}\n");
    let path = config.bootstrap();
    // Readable for the group of the run directory: with `manage: systemd`, Envoy runs as another user.
    fsx::write_atomically(&path, text.as_bytes(), 0o640).map_err(EnvoyError::Bootstrap)?;
    let launch = ChildLaunch {
        program: config.envoy.path.clone(),
        arguments: bootstrap::arguments(config, &path, bootstrap::HotRestart::Disabled),
        bootstrap: text,
    };
    let supervisor = ChildSupervisor { config: config.clone(), launch, status };
    match config.envoy.manage {
        EnvoyManager::Systemd => tasks.spawn("envoy", supervisor.poll_supervisor()),
        EnvoyManager::Child => {
            let fifo = supervisor.output_path();
            let failed = |cause| EnvoyError::Output { path: fifo.clone(), cause };
            output::fifo(&fifo).map_err(failed)?;
            let reader = output::reader(&fifo).map_err(failed)?;
            tasks.spawn("envoy output", output::log(reader));
            tasks.spawn_draining("envoy", |stop| supervisor.supervise(has_config, stop));
        }
    }
    Ok(())
}

struct ChildSupervisor {
    config: Arc<Config>,
    launch: ChildLaunch,
    status: watch::Sender<EnvoyStatus>,
}

impl ChildSupervisor {
    fn output_path(&self) -> PathBuf {
        self.config.run_dir.join("envoy.out")
    }

    fn record_path(&self) -> PathBuf {
        self.config.run_dir.join("envoy.json")
    }

    fn set_state(&self, state: EnvoyState, change: impl FnOnce(&mut EnvoyStatus)) {
        self.status.send_modify(|status| {
            if status.state != state {
                status.state = state;
                status.since = SystemTime::now();
                status.reason = None;
            }
            change(status);
        });
    }

    /// Publishes the status that Envoy's supervisor reports (`manage: systemd`).
    async fn poll_supervisor(self) {
        let socket = self.config.status_socket();
        loop {
            match admin::supervisor_status(&socket).await {
                Ok(now) => {
                    self.status.send_if_modified(|status| {
                        let changed = *status != now;
                        *status = now;
                        changed
                    });
                }
                Err(error) => self.set_state(EnvoyState::Down, |status| {
                    status.pid = None;
                    status.reason = Some(format!("is vmesh-envoy.service running? {}", one_line(&error)));
                }),
            }
            sleep(Duration::from_millis(500)).await;
        }
    }

    /// Starts Envoy, restarts it after a crash, and drains it at the stop (`manage: child`).
    async fn supervise(self, mut has_config: watch::Receiver<bool>, mut stop: Stop) {
        let Some(first) = unless_stopped(&mut stop, self.adopt_or_start(&mut has_config)).await else {
            // Stopped before an Envoy was adopted or started. Envoys on record still belong to this agent.
            if !self.config.envoy.keep_on_stop {
                self.stop_recorded().await;
            }
            self.set_state(EnvoyState::Stopped, |status| status.pid = None);
            return;
        };
        let mut running = first;
        let mut backoff = FIRST_BACKOFF;
        loop {
            let Some(mut envoy) = running.take() else {
                running = self.start(None).await;
                if running.is_none() && unless_stopped(&mut stop, sleep(backoff)).await.is_none() {
                    break;
                }
                backoff = double(backoff);
                continue;
            };
            let began = Instant::now();
            match unless_stopped(&mut stop, self.watch(&mut envoy)).await {
                Some(ended) => {
                    error!(pid = envoy.pid(), "Envoy ended: {ended}");
                    self.record_exit(&ended);
                    if began.elapsed() > STABLE {
                        backoff = FIRST_BACKOFF;
                    }
                    if unless_stopped(&mut stop, sleep(backoff)).await.is_none() {
                        break;
                    }
                }
                None if self.config.envoy.keep_on_stop => {
                    info!(pid = envoy.pid(), "Envoy keeps serving while the agent is stopped");
                    return;
                }
                None => {
                    self.set_state(EnvoyState::Draining, |_| {});
                    self.drain_and_stop(&mut envoy, &self.config.admin_socket()).await;
                    _ = std::fs::remove_file(self.record_path());
                    break;
                }
            }
        }
        self.set_state(EnvoyState::Stopped, |status| status.pid = None);
    }

    fn record_exit(&self, how: &str) {
        self.set_state(EnvoyState::Down, |status| {
            status.restarts += 1;
            status.pid = None;
            status.adopted = false;
            status.reason = Some(how.to_owned());
        });
    }

    /// Returns the first Envoy: one that an earlier agent left, or a new one once there is a configuration to serve.
    async fn adopt_or_start(&self, has_config: &mut watch::Receiver<bool>) -> Option<Process> {
        let left = ChildRecord::load(&self.record_path());
        let left = match left {
            Some(record) => Some(self.complete_handover(record).await),
            None => None,
        };
        if let Some((record, mut envoy)) =
            left.and_then(|record| Some((record.clone(), Process::recorded(&record)?)))
        {
            let socket = self.config.admin_socket();
            // A long wait: right after a boot or under load, Envoy may take its time to answer.
            let answers = wait_until_answers(&socket, envoy.pid(), Instant::now() + EXITS_WITHIN).await;
            if !answers {
                warn!(pid = envoy.pid(), "the Envoy of an earlier agent does not answer and is replaced");
                kill(&mut envoy).await;
            } else if record.launch == self.launch {
                info!(pid = envoy.pid(), "adopted the Envoy of an earlier agent");
                self.set_state(EnvoyState::Starting, |status| {
                    status.pid = Some(envoy.pid());
                    status.adopted = true;
                });
                return Some(envoy);
            } else {
                info!(
                    pid = envoy.pid(),
                    "the Envoy of an earlier agent was started with another configuration"
                );
                // The new Envoy could not become live without a configuration.
                _ = has_config.wait_for(|has| *has).await;
                return Some(self.hand_over(envoy).await);
            }
        }
        self.set_state(EnvoyState::Waiting, |status| {
            status.reason = Some("there is no configuration to serve yet".to_owned())
        });
        _ = has_config.wait_for(|has| *has).await;
        self.start(None).await
    }

    /// Completes a handover that an earlier agent left unfinished. The younger of the two Envoys on record is kept if it is live; otherwise
    /// the older one is kept.
    async fn complete_handover(&self, record: ChildRecord) -> ChildRecord {
        let (socket, aside) = (self.config.admin_socket(), self.old_admin_socket());
        if let Some(mut old) = record.before.as_ref().and_then(Process::identified) {
            let mut new = Process::recorded(&record);
            let is_live = admin::server_info(&socket).await.is_ok_and(|info| info.state == "LIVE")
                && new.as_ref().map(Process::pid) == admin::listening_pid(&socket).await;
            if is_live {
                warn!(
                    pid = old.pid(),
                    "draining the old Envoy of a handover that an earlier agent did not complete"
                );
                self.drain_and_stop(&mut old, &aside).await;
            } else {
                if let Some(new) = &mut new {
                    warn!(
                        pid = new.pid(),
                        "killing the new Envoy of a handover that an earlier agent did not complete, since it is not live"
                    );
                    kill(new).await;
                }
                _ = std::fs::rename(&aside, &socket);
                return self.record_old(&old, record);
            }
        } else if let Some(old) = Process::recorded(&record)
            && admin::listening_pid(&aside).await == Some(old.pid())
        {
            _ = std::fs::rename(&aside, &socket);
        }
        let record = ChildRecord { before: None, ..record };
        _ = record.save(&self.record_path());
        record
    }

    /// Records that `old` keeps serving. Its launch is recorded with an empty bootstrap, so that the next agent replaces it.
    fn record_old(&self, old: &Process, record: ChildRecord) -> ChildRecord {
        let record = old.record(&ChildLaunch { bootstrap: String::new(), ..record.launch });
        _ = record.save(&self.record_path());
        record
    }

    /// Drains and stops the Envoys on record.
    async fn stop_recorded(&self) {
        let Some(record) = ChildRecord::load(&self.record_path()) else { return };
        let aside = self.old_admin_socket();
        if let Some(mut old) = record.before.as_ref().and_then(Process::identified) {
            self.drain_and_stop(&mut old, &aside).await;
        }
        if let Some(mut envoy) = Process::recorded(&record) {
            let socket = self.config.admin_socket();
            let is_aside = admin::listening_pid(&aside).await == Some(envoy.pid());
            self.drain_and_stop(&mut envoy, if is_aside { &aside } else { &socket }).await;
        }
        _ = std::fs::remove_file(&aside);
        _ = std::fs::remove_file(self.record_path());
    }

    /// Returns the path to which the old Envoy's admin socket is moved during a handover.
    fn old_admin_socket(&self) -> PathBuf {
        self.config.admin_socket().with_extension("sock.old")
    }

    async fn start(&self, before: Option<&Process>) -> Option<Process> {
        let started =
            output::writer(&self.output_path()).and_then(|output| Process::start(&self.launch, output));
        match started {
            Ok(envoy) => {
                info!(pid = envoy.pid(), "started {}", self.launch.program.display());
                let record =
                    ChildRecord { before: before.map(Process::identity), ..envoy.record(&self.launch) };
                if let Err(error) = record.save(&self.record_path()) {
                    warn!(
                        "could not write the record of Envoy, so the next agent will not adopt it: {}",
                        one_line(&error)
                    );
                }
                self.set_state(EnvoyState::Starting, |status| {
                    status.pid = Some(envoy.pid());
                    status.adopted = false;
                });
                Some(envoy)
            }
            Err(error) => {
                let program = self.launch.program.display();
                error!(
                    "could not start {program}: {error}; `envoy.path` in the configuration says where Envoy is"
                );
                self.set_state(EnvoyState::Down, |status| {
                    status.reason = Some(format!("could not start {program}: {error}"))
                });
                None
            }
        }
    }

    /// Replaces `old` by an Envoy with the current configuration. If the new one does not become live, `old` stays.
    async fn hand_over(&self, mut old: Process) -> Process {
        let socket = self.config.admin_socket();
        let aside = self.old_admin_socket();
        // A bound Unix socket keeps listening after a rename. The new Envoy creates its own socket at the original path.
        _ = std::fs::rename(&socket, &aside);
        let mut new = self.start(Some(&old)).await;
        let live = match &mut new {
            Some(new) => tokio::select! {
                live = self.wait_until_live(Instant::now() + LIVE_WITHIN) => live,
                ended = new.exited() => Err(ended),
            },
            None => Err("it could not be started".to_owned()),
        };
        match (new, live) {
            (Some(new), Ok(())) => {
                self.drain_and_stop(&mut old, &aside).await;
                _ = std::fs::remove_file(&aside);
                _ = new.record(&self.launch).save(&self.record_path());
                new
            }
            (new, live) => {
                let why = live.err().unwrap_or_default();
                error!("Envoy does not become live with its new bootstrap, the old one keeps serving: {why}");
                if let Some(mut new) = new {
                    kill(&mut new).await;
                }
                _ = std::fs::rename(&aside, &socket);
                if let Some(record) = ChildRecord::load(&self.record_path()) {
                    self.record_old(&old, record);
                }
                self.set_state(EnvoyState::Starting, |status| {
                    status.pid = Some(old.pid());
                    status.adopted = true;
                });
                old
            }
        }
    }

    async fn wait_until_live(&self, deadline: Instant) -> Result<(), String> {
        let mut last = "no answer".to_owned();
        while Instant::now() < deadline {
            match admin::server_info(&self.config.admin_socket()).await {
                Ok(info) if info.state == "LIVE" => return Ok(()),
                Ok(info) => last = info.state,
                Err(error) => last = one_line(&error),
            }
            sleep(POLL_SOON).await;
        }
        Err(format!("not live after {} s: {last}", LIVE_WITHIN.as_secs()))
    }

    /// Keeps the status up to date until the process exits, and returns how it exited.
    async fn watch(&self, envoy: &mut Process) -> String {
        let looks = async {
            loop {
                let pause = self.poll().await;
                sleep(pause).await;
            }
        };
        tokio::select! {
            ended = envoy.exited() => ended,
            never = looks => never,
        }
    }

    /// Polls Envoy's admin interface and updates the status. Returns the pause until the next poll.
    async fn poll(&self) -> Duration {
        let was = self.status.borrow().state;
        match admin::server_info(&self.config.admin_socket()).await {
            Ok(info) if info.state == "LIVE" => {
                if was != EnvoyState::Live {
                    info!(version = info.version(), "Envoy is live");
                }
                self.set_state(EnvoyState::Live, |status| status.version = Some(info.version().to_owned()));
                LOOK
            }
            Ok(info) => {
                self.set_state(EnvoyState::Starting, |status| {
                    status.version = Some(info.version().to_owned());
                    status.reason = Some(info.state);
                });
                POLL_SOON
            }
            Err(error) => {
                // A starting Envoy has not bound its admin socket yet, so silence is expected.
                if was != EnvoyState::Starting {
                    self.set_state(EnvoyState::Silent, |status| status.reason = Some(one_line(&error)));
                }
                POLL_SOON
            }
        }
    }

    async fn drain_and_stop(&self, envoy: &mut Process, socket: &Path) {
        shutdown::drain_and_stop(envoy, socket, self.config.envoy.drain.0).await;
    }
}

pub(crate) fn double(backoff: Duration) -> Duration {
    (backoff * 2).min(LAST_BACKOFF)
}

/// Runs `work`; returns `None` if the daemon is told to stop before `work` completes.
pub(crate) async fn unless_stopped<T>(stop: &mut Stop, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        done = work => Some(done),
        () = stop.requested() => None,
    }
}
