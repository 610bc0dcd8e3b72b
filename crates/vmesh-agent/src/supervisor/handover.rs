//! Replaces the serving Envoy by a new one, and rolls back if the new one fails.

use std::io;
use std::time::Duration;

use serde_json::Value;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{error, info, warn};
use vmesh_daemon::report::one_line;

use super::plan::{self, DynamicResources, HandoverMethod, MAX_DRAINING, ParentState};
use super::supervised::{EnvoyRecord, HotRestartId, Launch, Role, SupervisedEnvoy};
use super::trial::{self, BinaryVersions};
use super::{Supervisor, shm};
use crate::bootstrap::open_files;
use crate::envoy::admin;
use crate::envoy::shutdown::{self, POLL_SOON};

/// Longest time for a candidate to become live. The candidate must receive its configuration from the agent, and resolve the host names in
/// it.
const LIVE_WITHIN: Duration = Duration::from_secs(60);
/// Longest time for a candidate to become live once the supervisor must stop. The handover may still complete, since the old Envoy's admin
/// interface is closed by then.
const LIVE_WITHIN_AT_STOP: Duration = Duration::from_secs(5);
/// Longest wait for a live candidate to have all resources of the old Envoy.
const SETTLES_WITHIN: Duration = Duration::from_secs(2);

/// Why the serving Envoy is to be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReloadReason {
    /// An operator sent SIGHUP.
    Requested,
    BootstrapChanged,
    /// The Envoy that the serving one took over from crashed before the serving one terminated it.
    ParentCrashed,
}

/// The outcome of one attempt to reload.
enum ReloadOutcome {
    Completed,
    /// The attempt is repeated later.
    Postponed(String),
    /// The reload is given up. The old Envoy keeps serving, or it has exited too (`serving` is then `None`).
    Failed(String),
}

impl Supervisor {
    /// Replaces the serving Envoy. Returns how it exited, if no Envoy serves afterwards.
    pub(super) async fn reload(&mut self) -> Option<String> {
        let outcome = self.try_reload().await;
        let gone = self.serving.is_none();
        match outcome {
            ReloadOutcome::Completed => {
                self.pending_reload = None;
                self.is_reload_urgent = false;
                self.rejected_launch = None;
                self.status.send_modify(|status| {
                    status.reload = None;
                    status.reloads += 1;
                    status.last_failure = None;
                });
                None
            }
            ReloadOutcome::Postponed(why) => {
                let reload_state = format!("a reload waits: {why}");
                if self.status.borrow().reload.as_ref() != Some(&reload_state) {
                    info!("{reload_state}");
                }
                self.status.send_modify(|status| status.reload = Some(reload_state));
                None
            }
            ReloadOutcome::Failed(why) => {
                self.pending_reload = None;
                self.is_reload_urgent = false;
                let what =
                    format!("the reload failed and was rolled back: {why}; fix that and send SIGHUP again");
                error!("{what}");
                self.set_failure(what);
                self.status.send_modify(|status| status.reload = None);
                gone.then(|| "it ended while another one was to take over".to_owned())
            }
        }
    }

    async fn try_reload(&mut self) -> ReloadOutcome {
        let may_be_hot = self.serving.as_ref().is_some_and(|serving| serving.record.hot_restart.is_some());
        if may_be_hot
            && !self.is_reload_urgent
            && !kernel_migrates_connections()
            && self.parent_state() == ParentState::Draining
        {
            let longest = self.max_drain_time();
            return ReloadOutcome::Postponed(format!(
                "the old Envoy still has connections, which may stay for {longest:?} after the last handover; another SIGHUP \
                 reloads without waiting, and may reset a connection"
            ));
        }
        self.read_config();
        let launch = match self.read_launch() {
            Ok(launch) => launch,
            Err(why) => return ReloadOutcome::Failed(why),
        };
        if self.draining.len() >= MAX_DRAINING {
            self.stop_idle_envoys().await;
        }
        // The next Envoy of the line terminates an idle parent, which therefore does not count.
        let ended_by_next = usize::from(self.parent_state() == ParentState::Idle);
        // Repeated SIGHUPs do not override this limit: a reload cuts no connection.
        if self.draining.len() - ended_by_next.min(self.draining.len()) >= MAX_DRAINING {
            return ReloadOutcome::Postponed(format!(
                "{} old Envoys still drain, for at most {:?} after their handover, and each takes the memory of a whole Envoy; \
                 `systemctl restart vmesh-envoy` does not wait, and cuts connections",
                self.draining.len(),
                self.max_drain_time()
            ));
        }
        // The candidate needs the agent to receive its configuration.
        if let Err(error) = self.check_agent_listens().await {
            let socket = self.config.xds_socket();
            return ReloadOutcome::Postponed(format!(
                "the agent does not listen on {}: {error}",
                socket.display()
            ));
        }
        self.status.send_modify(|status| {
            status.reload = Some("checking whether a new Envoy would start".to_owned())
        });
        let Some(mut serving) = self.serving.take() else {
            return ReloadOutcome::Failed("no Envoy serves any more".to_owned());
        };
        let mut stop = self.stop.clone();
        let tried = tokio::select! {
            tried = self.run_trial(&launch, &serving.record) => Some(tried),
            ended = serving.process.exited() => Some(Err(format!("the Envoy that served ended meanwhile: {ended}"))),
            () = stop.requested() => None,
        };
        self.serving = Some(serving);
        let (binary, before) = match tried {
            None => return ReloadOutcome::Postponed("the supervisor stops".to_owned()),
            Some(Ok(tried)) => tried,
            Some(Err(why)) => {
                self.rejected_launch = Some(launch.id());
                return ReloadOutcome::Failed(why);
            }
        };
        let done = self.hand_over(&launch, false, &binary, &before).await;
        if let Err(why) = done {
            self.rejected_launch = Some(launch.id());
            self.regain_admin().await;
            return ReloadOutcome::Failed(why);
        }
        ReloadOutcome::Completed
    }

    async fn check_agent_listens(&self) -> io::Result<()> {
        UnixStream::connect(self.config.xds_socket()).await.map(drop)
    }

    /// Checks, without affecting the serving Envoy, whether an Envoy would start with `launch`.
    async fn run_trial(
        &self,
        launch: &Launch,
        serving: &EnvoyRecord,
    ) -> Result<(BinaryVersions, DynamicResources), String> {
        let binary = trial::query_versions(&launch.program)
            .await
            .map_err(|unusable| format!("{} does not run: {}", launch.program.display(), unusable.reason))?;
        let bootstrap =
            plan::bootstrap(&launch.bootstrap, &self.dir.join("admin.trial.sock"), false, open_files())
                .map_err(|why| format!("{} is of no use: {why}", self.config.bootstrap().display()))?;
        let (dump, before) = match serving.admin_closed {
            false => self.fetch_resources(serving).await?,
            true => (Value::Null, DynamicResources::default()),
        };
        let scratch = self.dir.join("trial.json");
        trial::validate(&launch.program, &launch.arguments, &bootstrap, Some(&dump), &scratch).await?;
        Ok((binary, before))
    }

    async fn fetch_resources(&self, record: &EnvoyRecord) -> Result<(Value, DynamicResources), String> {
        let admin = record.admin_socket(&self.dir);
        let dump = admin::config_dump(&admin).await.map_err(|error| one_line(&error))?;
        let rejected = admin::rejected(&admin).await.map_err(|error| one_line(&error))?;
        let resources = plan::dynamic_resources(&dump, rejected);
        Ok((dump, resources))
    }

    /// Starts a new Envoy and hands over to it. On failure the old Envoy keeps serving, and its record says whether it has lost its admin
    /// interface.
    async fn hand_over(
        &mut self,
        launch: &Launch,
        again: bool,
        binary: &BinaryVersions,
        before: &DynamicResources,
    ) -> Result<(), String> {
        let parent = self.parent_state();
        let Some(mut old) = self.serving.take() else { return Err("no Envoy serves any more".to_owned()) };
        let line = match choose_line(&old.record, binary, parent) {
            Ok(line) => line,
            Err(why) => {
                self.serving = Some(old);
                return Err(why);
            }
        };
        let hot = line.base_id == old.record.base_id;
        self.status.send_modify(|status| status.reload = Some("a new Envoy is starting".to_owned()));
        let began = Instant::now();
        // Recorded as without an admin interface from the start, since the candidate closes it.
        let admin_was_closed = old.record.admin_closed;
        old.record.admin_closed |= hot;
        self.serving = Some(old);
        let started = self.start(launch, again, line, Some(binary), true).await;
        let Some(mut old) = self.serving.take() else { return Err("no Envoy serves any more".to_owned()) };
        let mut new = match started {
            Ok(new) => new,
            Err(why) => {
                old.record.admin_closed = admin_was_closed;
                self.serving = Some(old);
                self.save_record(None);
                return Err(why);
            }
        };
        let live = match self.wait_until_live(&mut new, &mut old).await {
            Ok(()) => self.check_resources(&new.record, before).await.map_err(|why| (why, true)),
            Err(why) => Err((why, false)),
        };
        match live {
            Ok(()) => {
                info!(pid = new.pid(), "Envoy took over after {} ms", began.elapsed().as_millis());
                new.record.role = Role::Serving;
                new.record.parent = hot.then_some(old.record.number);
                self.link_admin_socket(&new.record);
                self.start_draining(old);
                self.set_serving(new, false);
                Ok(())
            }
            Err((why, true)) if hot => {
                self.roll_back_handover(old, new, &why).await;
                Err(why)
            }
            Err((why, _)) => {
                self.give_up_candidate(old, new, hot, &why).await;
                Err(why)
            }
        }
    }

    /// Kills a candidate that did not become live. `old` keeps serving.
    async fn give_up_candidate(
        &mut self,
        mut old: SupervisedEnvoy,
        mut new: SupervisedEnvoy,
        hot: bool,
        why: &str,
    ) {
        let pid = new.pid();
        shutdown::kill(&mut new.process).await;
        warn!(pid, "killed the new Envoy, the old one keeps serving: {why}");
        if hot {
            self.clean_up_after_candidate(&mut old.record).await;
        }
        self.serving = Some(old);
        self.remove_files(&new.record);
        self.save_record(None);
    }

    /// Rolls a completed handover back. `new` is live but must not stay, and `old` has already closed its listeners. So `new` serves until
    /// another Envoy with the binary and bootstrap of `old` has taken over.
    async fn roll_back_handover(&mut self, old: SupervisedEnvoy, mut new: SupervisedEnvoy, why: &str) {
        warn!(
            pid = new.pid(),
            "rolling the handover back to an Envoy with the old binary and bootstrap: {why}"
        );
        let (launch, binary) = (old.launch.clone(), versions_of(&old.record));
        new.record.role = Role::Serving;
        new.record.parent = Some(old.record.number);
        self.link_admin_socket(&new.record);
        self.start_draining(old);
        self.set_serving(new, false);
        let again = launch.is_startable();
        let before = DynamicResources::default();
        let takes_over = self.hand_over(&launch, again, &binary, &before);
        // Boxed, since this function is called by `hand_over`.
        if let Err(why) = Box::pin(takes_over).await {
            error!("the rollback failed, the new Envoy keeps serving: {why}");
        }
    }

    /// Cleans up after a candidate of a hot restart that is gone without having become live. Its parent serves on.
    pub(super) async fn clean_up_after_candidate(&self, parent: &mut EnvoyRecord) {
        if let Err(why) = shm::forget_child(parent.base_id, parent.hot_restart.as_deref().unwrap_or_default())
        {
            warn!("the next handover cannot use hot restart: {why}");
            parent.hot_restart = None;
        }
        // The candidate may have died before the old Envoy closed its admin interface. Asked twice, since a closing interface still answers
        // a request that was already queued.
        let admin = parent.admin_socket(&self.dir);
        parent.admin_closed =
            admin::server_info(&admin).await.is_err() || admin::server_info(&admin).await.is_err();
        if parent.admin_closed {
            // Together with the admin interface, this Envoy closed its connection to its own parent.
            parent.parent = None;
        }
    }

    /// Waits until `new` is live. Fails if either Envoy exits, if `new` hangs, or at the deadline.
    async fn wait_until_live(
        &mut self,
        new: &mut SupervisedEnvoy,
        old: &mut SupervisedEnvoy,
    ) -> Result<(), String> {
        let admin = new.record.admin_socket(&self.dir);
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
                () = sleep(POLL_SOON / 5) => {}
            }
            // No other process answers at this path: each Envoy binds a socket of its own name.
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

    /// Waits, for a limited time, until the new Envoy has all resources of its predecessor.
    async fn check_resources(&self, record: &EnvoyRecord, before: &DynamicResources) -> Result<(), String> {
        let deadline = Instant::now() + SETTLES_WITHIN;
        loop {
            let verdict = match self.fetch_resources(record).await {
                Ok((_, after)) => plan::check_complete(before, &after),
                // The Envoy was live a moment ago; `watch_serving` deals with its silence.
                Err(_) => return Ok(()),
            };
            if verdict.is_ok() || Instant::now() >= deadline {
                return verdict;
            }
            sleep(POLL_SOON).await;
        }
    }

    /// Restores the admin interface that the serving Envoy closed for a failed candidate, by handing over to another Envoy of the same
    /// binary and bootstrap.
    pub(super) async fn regain_admin(&mut self) {
        let Some(serving) = self.serving.as_mut().filter(|serving| serving.record.admin_closed) else {
            return;
        };
        if let Ok(ended) = timeout(Duration::ZERO, serving.process.exited()).await {
            self.record_exit(&ended);
            return;
        }
        let launch = serving.launch.clone();
        let again = launch.is_startable();
        let binary = versions_of(&serving.record);
        if binary.hot_restart.is_none() {
            return;
        }
        let pid = serving.pid();
        // Without the agent, the next Envoy would receive no configuration.
        if self.check_agent_listens().await.is_err() {
            return;
        }
        info!(
            pid,
            "replacing Envoy by one with the same binary and bootstrap, to get an admin interface again"
        );
        let taken = self.hand_over(&launch, again, &binary, &DynamicResources::default()).await;
        self.status.send_modify(|status| status.reload = None);
        if let Err(why) = taken {
            warn!("Envoy keeps serving with its admin interface closed: {why}");
            if let Some(serving) = self.serving.as_mut()
                && let Ok(ended) = timeout(Duration::ZERO, serving.process.exited()).await
            {
                self.record_exit(&ended);
            }
        }
    }
}

/// Chooses the line of the next Envoy: that of `old` for a hot restart, or else a new one.
fn choose_line(
    old: &EnvoyRecord,
    binary: &BinaryVersions,
    parent: ParentState,
) -> Result<HotRestartId, String> {
    match plan::choose_method(old.hot_restart.as_deref(), binary.hot_restart.as_deref(), parent) {
        HandoverMethod::HotRestart => Ok(HotRestartId { base_id: old.base_id, epoch: old.epoch + 1 }),
        HandoverMethod::SharedPorts(why) => {
            info!("a new Envoy takes over by binding the same ports, without hot restart: {why}");
            if !kernel_migrates_connections() {
                info!(
                    "connections in the queue of a closing listener may be reset; `sysctl net.ipv4.tcp_migrate_req=1` prevents that"
                );
            }
            Ok(HotRestartId { base_id: shm::new_base_id()?, epoch: 0 })
        }
    }
}

/// Returns the versions of the running binary, from its record.
fn versions_of(record: &EnvoyRecord) -> BinaryVersions {
    BinaryVersions {
        version: record.version.clone().unwrap_or_default(),
        hot_restart: record.hot_restart.clone(),
    }
}

/// Reports whether the kernel moves the connections that wait at a closed listener to another listener of the same port.
fn kernel_migrates_connections() -> bool {
    std::fs::read_to_string("/proc/sys/net/ipv4/tcp_migrate_req").is_ok_and(|text| text.trim() == "1")
}
