//! Drains old Envoys, and stops all Envoys when the supervisor stops.

use std::time::{Duration, SystemTime};

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use super::clients::ListeningPorts;
use super::plan::{self, ParentState};
use super::supervised::{EnvoyRecord, Role, SupervisedEnvoy};
use super::{PARENT_GRACE, Supervisor};
use crate::envoy::EnvoyState;
use crate::envoy::shutdown::{self, LAST_IN, POLL_SOON};

/// An old Envoy that drains.
pub(super) struct DrainingEnvoy {
    record: EnvoyRecord,
    /// `record.until` on the monotonic clock, which nobody can set.
    until: Instant,
}

/// Reports whether an Envoy that exited `left` before its deadline was terminated by the new Envoy of its line, which then knows that its
/// parent is gone. Any earlier exit is a crash that the new Envoy does not know of.
pub(super) fn ends_in_time(left: Duration) -> bool {
    left <= PARENT_GRACE * 2
}

impl DrainingEnvoy {
    /// The clients are counted before the process is looked up: if it exits in between, the count means nothing, and it has no clients.
    fn has_clients(&self, ports: &ListeningPorts) -> bool {
        ports.has_clients(self.record.pid()) && self.record.process().is_some()
    }

    /// Reports whether an exit now would be a crash that the new Envoy of its line does not know of.
    fn ends_too_soon(&self) -> bool {
        self.record.admin_closed && !ends_in_time(self.until.saturating_duration_since(Instant::now()))
    }
}

impl Supervisor {
    pub(super) fn draining_records(&self) -> impl Iterator<Item = &EnvoyRecord> {
        self.draining.iter().map(|envoy| &envoy.record)
    }

    /// Returns the longest time that an old Envoy keeps draining after a handover.
    pub(super) fn max_drain_time(&self) -> Duration {
        plan::drain_limit(self.config.envoy.hot_restart.parent_shutdown.0, self.config.envoy.drain.0)
    }

    /// Drains an old Envoy in a separate task, and kills the process at its deadline. An Envoy that was replaced by hot restart drains by
    /// itself; any other one is told to.
    pub(super) fn start_draining(&mut self, mut envoy: SupervisedEnvoy) {
        let drain = self.config.envoy.drain.0;
        let longest = self.max_drain_time() + PARENT_GRACE;
        // The wall clock may have been set back since the deadline was recorded.
        let now = SystemTime::now();
        let left = envoy.record.until.map_or(longest, |until| until.duration_since(now).unwrap_or_default());
        let left = left.min(longest);
        envoy.record.until = Some(now + left);
        envoy.record.role = Role::Leaving;
        self.draining.push(DrainingEnvoy { record: envoy.record.clone(), until: Instant::now() + left });
        let admin = envoy.record.admin_socket(&self.dir);
        self.drain_tasks.spawn(async move {
            if envoy.record.admin_closed {
                if timeout(left, envoy.process.exited()).await.is_err() {
                    shutdown::kill(&mut envoy.process).await;
                }
            } else {
                shutdown::drain(&mut envoy.process, &admin, drain, left).await;
                // Not SIGTERM: on SIGTERM, this Envoy would terminate its own parent, which may still have connections.
                shutdown::kill(&mut envoy.process).await;
            }
            envoy.record.number
        });
    }

    pub(super) fn remove_drained(&mut self, number: u64) {
        let Some(at) = self.draining.iter().position(|envoy| envoy.record.number == number) else { return };
        let envoy = self.draining.remove(at);
        info!(pid = envoy.record.pid(), "an old Envoy has drained and is gone");
        if envoy.ends_too_soon()
            && let Some(mut child) = self.serving.take()
        {
            if child.record.parent == Some(number) {
                self.note_parent_crash(&mut child.record);
            }
            self.serving = Some(child);
        }
        self.remove_files(&envoy.record);
        self.save_record(None);
    }

    /// Returns the state of the Envoy that the serving one took over from.
    pub(super) fn parent_state(&self) -> ParentState {
        let Some(serving) = &self.serving else { return ParentState::Gone };
        let parent = self.draining.iter().find(|envoy| serving.record.parent == Some(envoy.record.number));
        match parent {
            _ if serving.record.parent_lost => ParentState::Crashed,
            Some(parent) if parent.has_clients(&ListeningPorts::now()) => ParentState::Draining,
            Some(parent) if parent.record.process().is_some() => ParentState::Idle,
            // The parent exited just now.
            Some(parent) if parent.ends_too_soon() => ParentState::Crashed,
            Some(_) | None => ParentState::Gone,
        }
    }

    /// Stops the draining Envoys that have no clients left.
    pub(super) async fn stop_idle_envoys(&mut self) {
        let ports = ListeningPorts::now();
        let idle: Vec<EnvoyRecord> = self
            .draining
            .iter()
            .filter(|envoy| !envoy.has_clients(&ports))
            .map(|envoy| envoy.record.clone())
            .collect();
        for record in idle {
            // The serving Envoy terminates its parent by itself, and aborts if the parent is already gone.
            let is_parent =
                self.serving.as_ref().is_some_and(|serving| serving.record.parent == Some(record.number));
            if is_parent && record.process().is_some() {
                continue;
            }
            info!(
                pid = record.pid(),
                "stopping an old Envoy that has no clients left, to make room for another one"
            );
            if let Some(mut process) = record.process() {
                shutdown::stop(&mut process).await;
            }
            self.remove_drained(record.number);
        }
    }

    /// Drains all Envoys, then stops them.
    pub(super) async fn stop_all(mut self) {
        self.set_state(EnvoyState::Draining, |status| status.reload = None);
        if let Some(mut serving) = self.serving.take() {
            let admin = serving.record.admin_socket(&self.dir);
            if serving.record.admin_closed {
                warn!(
                    pid = serving.pid(),
                    "stopping Envoy without a drain, since its admin interface is closed"
                );
                shutdown::stop(&mut serving.process).await;
            } else {
                // Recorded as leaving before its listeners close: if the supervisor is killed meanwhile, the next one does not adopt this
                // Envoy as the serving one.
                let until = SystemTime::now() + self.config.envoy.drain.0 + PARENT_GRACE;
                serving.record.role = Role::Leaving;
                serving.record.until = Some(until);
                self.save_record(Some(&serving.record));
                let deadline = Instant::now() + self.config.envoy.drain.0;
                let ports = ListeningPorts::now();
                shutdown::drain(&mut serving.process, &admin, self.config.envoy.drain.0, LAST_IN).await;
                // Older Envoys may still serve clients, and stopping a younger one would terminate the older one.
                while Instant::now() < deadline && self.draining.iter().any(|envoy| envoy.has_clients(&ports))
                {
                    sleep(POLL_SOON).await;
                }
                if serving.record.parent_lost {
                    // On SIGTERM it would try to reach its dead parent for ten seconds, then abort.
                    shutdown::kill(&mut serving.process).await;
                } else {
                    shutdown::stop(&mut serving.process).await;
                }
            }
            self.remove_files(&serving.record);
        }
        self.drain_tasks.abort_all();
        let mut last: JoinSet<()> = JoinSet::new();
        for mut process in self.draining_records().filter_map(EnvoyRecord::process) {
            last.spawn(async move { shutdown::stop(&mut process).await });
        }
        for mut stray in std::mem::take(&mut self.strays) {
            last.spawn(async move { shutdown::stop(&mut stray.process).await });
        }
        while last.join_next().await.is_some() {}
        for envoy in std::mem::take(&mut self.draining) {
            self.remove_files(&envoy.record);
        }
        _ = std::fs::remove_file(self.dir.join("admin.sock"));
        self.save_record(None);
        self.set_state(EnvoyState::Stopped, |status| {
            status.envoy.pid = None;
            status.epoch = None;
        });
    }
}
