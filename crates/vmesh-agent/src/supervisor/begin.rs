//! Starts an Envoy when none serves.

use tokio::time::{Instant, sleep};
use tracing::{error, info, warn};
use vmesh_daemon::fsx;
use vmesh_daemon::report::one_line;

use super::member::{self, Kept, Launch, Line, Member, Role};
use super::trial::{self, Binary, Stamp};
use super::{FIRST_BACKOFF, Supervisor, TICK, plan, shm};
use crate::bootstrap::{self, Takeover};
use crate::envoy::{State, until};

const MAX_BOOTSTRAP: u64 = 16 << 20;

impl Supervisor {
    /// Starts the first Envoy of a new line, as soon as there is a bootstrap to start it with.
    pub(super) async fn begin(&mut self) {
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
        // Fall back to the last good launch if the configured one keeps crashing.
        let (crashed, refused) = (self.crashed.as_ref(), self.refused.as_ref());
        let good = self.good.clone().filter(|good| {
            !good.is_same(&launch)
                && good.is_startable()
                && plan::is_better(&good.id(), &launch.id(), crashed, refused)
        });
        let again = good.is_some();
        if again {
            warn!(
                "what is to be started did not come up, or not for long: Envoy is started as it was before"
            );
            self.refused = Some(launch.id());
        }
        let launch = good.unwrap_or(launch);
        self.fresh(&launch, again).await;
        if self.serving.is_none() && !self.stop.is_requested() {
            self.has_crashed(&launch);
        }
    }

    pub(super) async fn fresh(&mut self, launch: &Launch, again: bool) {
        let mut stop = self.stop.clone();
        let executable = launch.executable(again);
        let Some(binary) = until(&mut stop, trial::ask(&executable)).await else { return };
        let started = match (binary, shm::new_base_id()) {
            // A timeout is not an error here: on a busy host a good binary may take too long to print its version.
            (Err(unusable), _) if !unusable.hangs => {
                // The failed attempt counts, so that its number is not used again.
                self.last_number += 1;
                self.keep(None);
                Err(unusable.why)
            }
            (binary, Ok(base_id)) => {
                let line = Line { base_id, epoch: 0 };
                self.start(launch, again, line, binary.as_ref().ok(), false).await
            }
            (_, Err(why)) => Err(why),
        };
        match started {
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

    pub(super) fn now_serving(&mut self, member: Member, adopted: bool) {
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
        self.live_since = None;
        (self.regain_at, self.regain_pause) = (Instant::now() + FIRST_BACKOFF, FIRST_BACKOFF);
        self.serving = Some(member);
        self.keep(None);
    }

    /// Reads the binary's stamp and the bootstrap that are on disk now.
    pub(super) fn launch(&self) -> Result<Launch, String> {
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

    /// Starts an Envoy. With `waits`, it becomes live only after it has received its configuration from the agent.
    pub(super) async fn start(
        &mut self,
        launch: &Launch,
        again: bool,
        line: Line,
        binary: Option<&Binary>,
        waits: bool,
    ) -> Result<Member, String> {
        self.last_number += 1;
        let kept = Kept::new(launch, self.last_number, line, binary);
        let started = self.start_as(&kept, launch, again, waits).await;
        if started.is_err() {
            self.forget(&kept);
            self.keep(None);
        }
        started
    }

    async fn start_as(
        &self,
        kept: &Kept,
        launch: &Launch,
        again: bool,
        waits: bool,
    ) -> Result<Member, String> {
        let path = member::bootstrap(&self.dir, kept.number);
        let bootstrap =
            plan::bootstrap(&launch.bootstrap, &kept.admin(&self.dir), waits, bootstrap::open_files())
                .map_err(|why| format!("{} is of no use: {why}", self.config.bootstrap().display()))?;
        for (path, text) in [
            (&path, bootstrap.to_string().as_bytes()),
            (&member::source(&self.dir, kept.number), launch.bootstrap.as_bytes()),
        ] {
            fsx::write_atomically(path, text, fsx::PRIVATE).map_err(|error| one_line(&error))?;
        }
        let takeover = match (&kept.version, &kept.hot_restart) {
            (Some(_), None) => Takeover::None,
            _ => Takeover::Hot {
                base_id: kept.base_id,
                epoch: kept.epoch,
                socket: shm::socket(&self.dir),
                parent_shutdown_s: self.stay().as_secs(),
            },
        };
        let mut arguments = bootstrap::started_with(&path, takeover);
        arguments.extend_from_slice(&launch.arguments);
        // Recorded before it is started: if the supervisor dies in between, the next one still finds this Envoy.
        self.keep(Some(kept));
        let member = Member::start(launch, &arguments, again, &self.output, kept.clone())
            .await
            .map_err(|error| format!("could not start {}: {error}", launch.program.display()))?;
        info!(pid = member.pid(), epoch = kept.epoch, "started {}", launch.program.display());
        self.keep(Some(&member.kept));
        Ok(member)
    }

    /// Points the stable name `admin.sock` at the admin socket of the serving Envoy.
    pub(super) fn link(&self, kept: &Kept) {
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
}
