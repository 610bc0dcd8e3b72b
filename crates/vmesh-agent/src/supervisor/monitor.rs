//! Watches the Envoy that serves until it exits, and starts reloads.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{error, info, warn};
use vmesh_daemon::report::one_line;

use super::handover::ReloadReason;
use super::trial::{self, FileStamp};
use super::{STABLE, Supervisor, TICK, liveness};
use crate::envoy::shutdown::{self, POLL_SOON};
use crate::envoy::{EnvoyState, admin};

/// Interval at which a live Envoy's admin interface is polled. The exit of the process is noticed at once.
const LOOK: Duration = Duration::from_secs(5);
/// An Envoy that has been silent for this long when a reload is requested counts as hung, rather than as busy or still starting.
const HANGS_AFTER: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The times that [`Supervisor::watch_serving`] keeps of the serving Envoy.
struct Schedule {
    /// Start of the current period without an answer from the admin interface.
    silent_since: Option<Instant>,
    /// A silent Envoy that still accepts connections is not checked again before this time.
    spared_until: Instant,
    poll_at: Instant,
    tick_at: Instant,
}

impl Schedule {
    fn is_silent_for(&self, duration: Duration) -> bool {
        self.silent_since.is_some_and(|since| since.elapsed() >= duration)
    }
}

impl Supervisor {
    /// Watches the serving Envoy until it exits, and returns how it exited. Returns `None` when the supervisor is to stop.
    pub(super) async fn watch_serving(&mut self) -> Option<String> {
        let now = Instant::now();
        let mut schedule =
            Schedule { silent_since: None, spared_until: now, poll_at: now, tick_at: now + TICK };
        loop {
            let serving = self.serving.as_mut()?;
            let mut is_hangup = false;
            tokio::select! {
                biased;
                () = self.stop.requested() => return None,
                ended = serving.process.exited() => return Some(ended),
                Some(()) = self.hangups.recv() => is_hangup = true,
                Some(answer) = self.version_queries.join_next() => {
                    if let Ok((stamp, what)) = answer
                        && self.reported_binary.as_ref() == Some(&stamp)
                    {
                        self.set_waiting_binary(Some(format!("another Envoy ({what}) is installed and waits for a reload (SIGHUP)")));
                    }
                    continue;
                }
                Some(gone) = self.drain_tasks.join_next() => {
                    if let Ok(number) = gone {
                        self.remove_drained(number);
                        schedule.tick_at = schedule.tick_at.min(Instant::now());
                    }
                    continue;
                }
                () = tokio::time::sleep_until(schedule.poll_at.min(schedule.tick_at)) => {}
            }
            let now = Instant::now();
            if is_hangup {
                info!("SIGHUP: reloading Envoy");
                self.is_reload_urgent = self.status.borrow().reload.is_some();
                self.pending_reload = Some(ReloadReason::Requested);
                schedule.tick_at = now;
            }
            if now >= schedule.poll_at
                && let Some(ended) = self.poll_and_kill_hung(&mut schedule).await
            {
                return Some(ended);
            }
            if now >= schedule.tick_at {
                schedule.tick_at = now + TICK;
                self.check_files();
                if let Some(ended) = self.reload_if_needed(&mut schedule, now).await {
                    return Some(ended);
                }
            }
        }
    }

    /// Polls Envoy, and kills it if it is hung. Returns how it exited in that case.
    async fn poll_and_kill_hung(&mut self, schedule: &mut Schedule) -> Option<String> {
        let pause = self.poll_serving(&mut schedule.silent_since).await;
        schedule.poll_at = Instant::now() + pause;
        let hung_after = self.config.envoy.hung_after.0;
        if !schedule.is_silent_for(hung_after) || Instant::now() < schedule.spared_until {
            return None;
        }
        if self.is_still_serving().await {
            schedule.spared_until = Instant::now() + LOOK;
            return None;
        }
        self.kill_hung(&format!("no answer for {hung_after:?}, and it accepts no connections")).await
    }

    /// Starts the pending reload, if there is one and Envoy's state permits it. Otherwise replaces an Envoy whose admin interface is closed.
    /// Returns how Envoy exited, if none serves afterwards.
    async fn reload_if_needed(&mut self, schedule: &mut Schedule, now: Instant) -> Option<String> {
        if let Some(reason) = self.pending_reload {
            // A reload that is requested because this Envoy hangs must not wait for this Envoy.
            if reason == ReloadReason::Requested && schedule.is_silent_for(HANGS_AFTER) {
                return self.kill_hung("it did not answer when it was to be reloaded").await;
            }
            let state = self.status.borrow().envoy.state;
            // An Envoy whose health checks were made to fail by an operator is replaced only on request.
            if state == EnvoyState::Live
                || (state == EnvoyState::Draining && reason == ReloadReason::Requested)
            {
                if let Some(ended) = self.reload().await {
                    return Some(ended);
                }
                schedule.silent_since = None;
                schedule.poll_at = Instant::now();
            }
        } else if self.serving.as_ref().is_some_and(|serving| serving.record.admin_closed)
            && now >= self.regain_at
        {
            let pause = (self.regain_pause * 2).min(LONGEST_PAUSE);
            self.regain_admin().await;
            if self.serving.is_none() {
                return Some("it ended while another one was to take over".to_owned());
            }
            // A successful handover has reset both fields.
            (self.regain_at, self.regain_pause) = (Instant::now() + pause, pause);
            schedule.poll_at = Instant::now();
        }
        None
    }

    /// Reports whether an Envoy whose admin interface is silent still serves: killing it would cut connections that are in use.
    async fn is_still_serving(&self) -> bool {
        let Some(serving) = &self.serving else { return false };
        let Some(evidence) = liveness::find_evidence(serving.pid()).await else { return false };
        let reason = format!("its admin interface does not answer; {}", evidence.reason());
        if self.status.borrow().envoy.reason.as_ref() != Some(&reason) {
            warn!(pid = serving.pid(), "{reason}");
        }
        self.set_state(EnvoyState::Silent, |status| status.envoy.reason = Some(reason));
        true
    }

    async fn kill_hung(&mut self, why: &str) -> Option<String> {
        let serving = self.serving.as_mut()?;
        error!(pid = serving.pid(), "Envoy hangs and is killed: {why}");
        shutdown::kill(&mut serving.process).await;
        Some(format!("it hung and was killed: {why}"))
    }

    /// Polls Envoy's admin interface and updates the status. Returns the pause until the next poll.
    async fn poll_serving(&mut self, silent_since: &mut Option<Instant>) -> Duration {
        let Some(serving) = &self.serving else { return LOOK };
        if serving.record.admin_closed {
            self.set_state(EnvoyState::Live, |status| {
                status.envoy.reason = Some(
                    "its admin interface is closed since another Envoy was to take over and did not"
                        .to_owned(),
                );
            });
            return LOOK;
        }
        let launch = serving.launch.clone();
        let was = self.status.borrow().envoy.state;
        match admin::server_info(&serving.record.admin_socket(&self.dir)).await {
            Ok(info) if info.state == "LIVE" => {
                *silent_since = None;
                if was != EnvoyState::Live {
                    info!(pid = serving.pid(), version = info.version(), "Envoy is live");
                }
                let is_stable = self.live_since.get_or_insert_with(Instant::now).elapsed() >= STABLE;
                if is_stable || self.last_good_launch.is_none() {
                    self.last_good_launch = Some(launch);
                }
                self.set_state(EnvoyState::Live, |status| {
                    status.envoy.version = Some(info.version().to_owned());
                    status.envoy.reason = None;
                });
                if !self.strays.is_empty() {
                    self.drain_strays().await;
                }
                LOOK
            }
            Ok(info) if info.state == "DRAINING" => {
                *silent_since = None;
                self.set_state(EnvoyState::Draining, |status| {
                    status.envoy.reason = Some("it has been told to fail its health checks".to_owned());
                });
                LOOK
            }
            Ok(info) => {
                *silent_since = None;
                self.set_state(EnvoyState::Starting, |status| status.envoy.reason = Some(info.state));
                POLL_SOON
            }
            Err(error) => {
                let since = *silent_since.get_or_insert_with(Instant::now);
                let reason = one_line(&error);
                // A starting Envoy has not bound its admin socket yet, so silence is expected.
                if was != EnvoyState::Starting || since.elapsed() > Duration::from_secs(5) {
                    if was != EnvoyState::Silent {
                        warn!(
                            "Envoy does not answer; it is killed after {:?} without an answer, unless it still accepts connections: {reason}",
                            self.config.envoy.hung_after.0
                        );
                    }
                    // Keep the reason that `is_still_serving` set.
                    let is_spared =
                        silent_since.is_some_and(|since| since.elapsed() >= self.config.envoy.hung_after.0);
                    self.set_state(EnvoyState::Silent, |status| {
                        if !is_spared || status.envoy.reason.is_none() {
                            status.envoy.reason = Some(reason);
                        }
                    });
                }
                POLL_SOON
            }
        }
    }

    /// Checks the bootstrap and the binary on disk against those of the running Envoy. A changed bootstrap requests a reload; a changed
    /// binary is only reported.
    fn check_files(&mut self) {
        let Some(serving) = &self.serving else { return };
        let stamp = FileStamp::of(&self.config.envoy.path);
        if let Ok(launch) = self.read_launch()
            && launch.bootstrap != serving.launch.bootstrap
            && self.rejected_launch != Some(launch.id())
            && self.pending_reload.is_none()
        {
            info!("{} has changed: reloading Envoy", self.config.bootstrap().display());
            self.pending_reload = Some(ReloadReason::BootstrapChanged);
        }
        let runs = serving.record.stamp.clone();
        if stamp != self.reported_binary {
            self.reported_binary = stamp.clone();
            self.version_queries.abort_all();
            match stamp {
                stamp if stamp == runs => self.set_waiting_binary(None),
                None => self.set_waiting_binary(Some(format!(
                    "there is no {} any more",
                    self.config.envoy.path.display()
                ))),
                Some(stamp) => {
                    self.version_queries.spawn(async move {
                        let version = trial::query_versions(&stamp.path).await;
                        let what = version.map_or_else(
                            |unusable| format!("not usable: {}", unusable.reason),
                            |binary| binary.version,
                        );
                        (stamp, what)
                    });
                }
            }
        }
    }

    fn set_waiting_binary(&self, what: Option<String>) {
        if let Some(what) = &what {
            info!("{what}");
        }
        self.status.send_modify(|status| status.waiting_binary = what);
    }
}
