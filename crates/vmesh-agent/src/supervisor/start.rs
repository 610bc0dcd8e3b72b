//! Starts an Envoy when none serves.

use tokio::time::{Instant, sleep};
use tracing::{error, info, warn};
use vmesh_daemon::fsx;
use vmesh_daemon::report::one_line;

use super::supervised::{self, EnvoyRecord, HotRestartId, Launch, Role, SupervisedEnvoy};
use super::trial::{self, BinaryVersions, FileStamp};
use super::{FIRST_BACKOFF, Supervisor, TICK, plan, shm};
use crate::bootstrap::{self, HotRestart};
use crate::envoy::{EnvoyState, unless_stopped};

const MAX_BOOTSTRAP: u64 = 16 << 20;

impl Supervisor {
    /// Starts the first Envoy of a new line, as soon as there is a bootstrap to start it with.
    pub(super) async fn start_first(&mut self) {
        let launch = loop {
            self.read_config();
            match self.read_launch() {
                Ok(launch) => break launch,
                Err(why) => {
                    self.set_state(EnvoyState::Waiting, |status| status.envoy.reason = Some(why));
                    let mut stop = self.stop.clone();
                    if unless_stopped(&mut stop, sleep(TICK / 4)).await.is_none() {
                        return;
                    }
                }
            }
        };
        self.pending_reload = None;
        // Fall back to the last good launch if the configured one keeps crashing.
        let (crashed, refused) = (self.recent_crashes.as_ref(), self.rejected_launch.as_ref());
        let good = self.last_good_launch.clone().filter(|good| {
            !good.is_same(&launch)
                && good.is_startable()
                && plan::is_better(&good.id(), &launch.id(), crashed, refused)
        });
        let again = good.is_some();
        if again {
            warn!(
                "the installed binary or bootstrap crashed repeatedly or was rejected: starting Envoy with the last good ones"
            );
            self.rejected_launch = Some(launch.id());
        }
        let launch = good.unwrap_or(launch);
        self.start_new_line(&launch, again).await;
        if self.serving.is_none() && !self.stop.is_requested() {
            self.count_crash(&launch);
        }
    }

    pub(super) async fn start_new_line(&mut self, launch: &Launch, again: bool) {
        let mut stop = self.stop.clone();
        let executable = launch.executable(again);
        let Some(binary) = unless_stopped(&mut stop, trial::query_versions(&executable)).await else {
            return;
        };
        let started = match (binary, shm::new_base_id()) {
            // A timeout is not an error here: on a busy host a good binary may take too long to print its version.
            (Err(unusable), _) if !unusable.has_timed_out => {
                // The failed attempt counts, so that its number is not used again.
                self.last_number += 1;
                self.save_record(None);
                Err(unusable.reason)
            }
            (binary, Ok(base_id)) => {
                let line = HotRestartId { base_id, epoch: 0 };
                self.start(launch, again, line, binary.as_ref().ok(), false).await
            }
            (_, Err(why)) => Err(why),
        };
        match started {
            Ok(mut envoy) => {
                envoy.record.role = Role::Serving;
                self.link_admin_socket(&envoy.record);
                self.set_serving(envoy, false);
            }
            Err(why) => {
                error!("{why}; `envoy.path` in the configuration says where Envoy is");
                self.set_failure(why.clone());
                self.set_state(EnvoyState::Down, |status| status.envoy.reason = Some(why));
            }
        }
    }

    pub(super) fn set_serving(&mut self, envoy: SupervisedEnvoy, adopted: bool) {
        self.set_state(EnvoyState::Starting, |status| {
            status.envoy.pid = Some(envoy.pid());
            status.envoy.version = envoy.record.version.clone();
            status.envoy.adopted = adopted;
            status.epoch = Some(envoy.record.epoch);
            status.base_id = Some(envoy.record.base_id);
            status.waiting_binary = None;
        });
        self.reported_binary = envoy.record.stamp.clone();
        self.version_queries.abort_all();
        self.live_since = None;
        (self.regain_at, self.regain_pause) = (Instant::now() + FIRST_BACKOFF, FIRST_BACKOFF);
        self.serving = Some(envoy);
        self.save_record(None);
    }

    /// Reads the binary's stamp and the bootstrap that are on disk now.
    pub(super) fn read_launch(&self) -> Result<Launch, String> {
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
            stamp: FileStamp::of(&self.config.envoy.path),
            arguments: bootstrap::settings_arguments(&self.config),
            bootstrap: text.into(),
        })
    }

    /// Starts an Envoy. With `waits`, it becomes live only after it has received its configuration from the agent.
    pub(super) async fn start(
        &mut self,
        launch: &Launch,
        again: bool,
        line: HotRestartId,
        binary: Option<&BinaryVersions>,
        waits: bool,
    ) -> Result<SupervisedEnvoy, String> {
        self.last_number += 1;
        let record = EnvoyRecord::new(launch, self.last_number, line, binary);
        let started = self.start_recorded(&record, launch, again, waits).await;
        if started.is_err() {
            self.remove_files(&record);
            self.save_record(None);
        }
        started
    }

    async fn start_recorded(
        &self,
        record: &EnvoyRecord,
        launch: &Launch,
        again: bool,
        waits: bool,
    ) -> Result<SupervisedEnvoy, String> {
        let path = supervised::bootstrap_path(&self.dir, record.number);
        let bootstrap = plan::bootstrap(
            &launch.bootstrap,
            &record.admin_socket(&self.dir),
            waits,
            bootstrap::open_files(),
        )
        .map_err(|why| format!("{} is of no use: {why}", self.config.bootstrap().display()))?;
        for (path, text) in [
            (&path, bootstrap.to_string().as_bytes()),
            (&supervised::source_path(&self.dir, record.number), launch.bootstrap.as_bytes()),
        ] {
            fsx::write_atomically(path, text, fsx::PRIVATE).map_err(|error| one_line(&error))?;
        }
        let hot_restart = match (&record.version, &record.hot_restart) {
            (Some(_), None) => HotRestart::Disabled,
            _ => HotRestart::Enabled {
                base_id: record.base_id,
                epoch: record.epoch,
                socket: shm::socket(&self.dir),
                parent_shutdown_s: self.max_drain_time().as_secs(),
            },
        };
        let mut arguments = bootstrap::path_and_hot_restart(&path, hot_restart);
        arguments.extend_from_slice(&launch.arguments);
        // Recorded before it is started: if the supervisor dies in between, the next one still finds this Envoy.
        self.save_record(Some(record));
        let envoy = SupervisedEnvoy::start(launch, &arguments, again, &self.output, record.clone())
            .await
            .map_err(|error| format!("could not start {}: {error}", launch.program.display()))?;
        info!(pid = envoy.pid(), epoch = record.epoch, "started {}", launch.program.display());
        self.save_record(Some(&envoy.record));
        Ok(envoy)
    }

    /// Points the stable name `admin.sock` at the admin socket of the serving Envoy.
    pub(super) fn link_admin_socket(&self, record: &EnvoyRecord) {
        let name = self.dir.join("admin.sock");
        let aside = self.dir.join("admin.sock.new");
        _ = std::fs::remove_file(&aside);
        let target = record.admin_socket(&self.dir);
        let Some(target) = target.file_name() else { return };
        let linked = std::os::unix::fs::symlink(target, &aside).and_then(|()| std::fs::rename(&aside, &name));
        if let Err(error) = linked {
            warn!("could not link Envoy's admin socket to {}: {error}", name.display());
        }
    }
}
