//! Drains old Envoys, and stops all Envoys when the supervisor stops.

use std::time::{Duration, SystemTime};

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use super::clients::Ports;
use super::member::{Kept, Member, Role};
use super::plan::{self, Parent};
use super::{PARENT_GRACE, Supervisor};
use crate::envoy::State;
use crate::envoy::leave::{self, LAST_IN, LOOK_SOON};

/// An old Envoy that drains.
pub(super) struct Leaver {
    kept: Kept,
    /// `record.until` on the monotonic clock, which nobody can set.
    until: Instant,
}

/// Reports whether an Envoy that exited `left` before its deadline was terminated by the new Envoy of its line, which then knows that its
/// parent is gone. Any earlier exit is a crash that the new Envoy does not know of.
pub(super) fn ends_in_time(left: Duration) -> bool {
    left <= PARENT_GRACE * 2
}

impl Leaver {
    /// The clients are counted before the process is looked up: if it exits in between, the count means nothing, and it has no clients.
    fn has_clients(&self, ports: &Ports) -> bool {
        ports.has_clients(self.kept.pid()) && self.kept.process().is_some()
    }

    /// Reports whether an exit now would be a crash that the new Envoy of its line does not know of.
    fn ends_too_soon(&self) -> bool {
        self.kept.admin_closed && !ends_in_time(self.until.saturating_duration_since(Instant::now()))
    }
}

impl Supervisor {
    pub(super) fn leavers(&self) -> impl Iterator<Item = &Kept> {
        self.leavers.iter().map(|leaver| &leaver.kept)
    }

    /// Returns the longest time that an old Envoy keeps draining after a handover.
    pub(super) fn stay(&self) -> Duration {
        plan::stay(self.config.envoy.hot_restart.parent_shutdown.0, self.config.envoy.drain.0)
    }

    /// Drains an old Envoy in a separate task, and kills the process at its deadline. An Envoy that was replaced by hot restart drains by
    /// itself; any other one is told to.
    pub(super) fn see_off(&mut self, mut member: Member) {
        let drain = self.config.envoy.drain.0;
        let longest = self.stay() + PARENT_GRACE;
        // The wall clock may have been set back since the deadline was recorded.
        let now = SystemTime::now();
        let left = member.kept.until.map_or(longest, |until| until.duration_since(now).unwrap_or_default());
        let left = left.min(longest);
        member.kept.until = Some(now + left);
        member.kept.role = Role::Leaving;
        self.leavers.push(Leaver { kept: member.kept.clone(), until: Instant::now() + left });
        let admin = member.kept.admin(&self.dir);
        self.leaving.spawn(async move {
            if member.kept.admin_closed {
                if timeout(left, member.process.exited()).await.is_err() {
                    leave::kill(&mut member.process).await;
                }
            } else {
                leave::take_leave(&mut member.process, &admin, drain, left).await;
                // Not SIGTERM: on SIGTERM, this Envoy would terminate its own parent, which may still have connections.
                leave::kill(&mut member.process).await;
            }
            member.kept.number
        });
    }

    pub(super) fn has_left(&mut self, number: u64) {
        let Some(at) = self.leavers.iter().position(|leaver| leaver.kept.number == number) else { return };
        let leaver = self.leavers.remove(at);
        info!(pid = leaver.kept.pid(), "an Envoy that took its leave is gone");
        if leaver.ends_too_soon()
            && let Some(mut child) = self.serving.take()
        {
            if child.kept.parent == Some(number) {
                self.parent_is_lost(&mut child.kept);
            }
            self.serving = Some(child);
        }
        self.forget(&leaver.kept);
        self.keep(None);
    }

    /// Returns the state of the Envoy that the serving one took over from.
    pub(super) fn parent(&self) -> Parent {
        let Some(serving) = &self.serving else { return Parent::Gone };
        let parent = self.leavers.iter().find(|leaver| serving.kept.parent == Some(leaver.kept.number));
        match parent {
            _ if serving.kept.parent_lost => Parent::Lost,
            Some(parent) if parent.has_clients(&Ports::now()) => Parent::Leaves,
            Some(parent) if parent.kept.process().is_some() => Parent::Idle,
            // The parent exited just now.
            Some(parent) if parent.ends_too_soon() => Parent::Lost,
            Some(_) | None => Parent::Gone,
        }
    }

    /// Stops the draining Envoys that have no clients left.
    pub(super) async fn end_idle_leavers(&mut self) {
        let ports = Ports::now();
        let idle: Vec<Kept> = self
            .leavers
            .iter()
            .filter(|leaver| !leaver.has_clients(&ports))
            .map(|leaver| leaver.kept.clone())
            .collect();
        for kept in idle {
            // The serving Envoy terminates its parent by itself, and aborts if the parent is already gone.
            let is_parent =
                self.serving.as_ref().is_some_and(|serving| serving.kept.parent == Some(kept.number));
            if is_parent && kept.process().is_some() {
                continue;
            }
            info!(
                pid = kept.pid(),
                "this Envoy has no clients any more and is ended: another one takes over"
            );
            if let Some(mut process) = kept.process() {
                leave::end(&mut process).await;
            }
            self.has_left(kept.number);
        }
    }

    /// Drains all Envoys, then stops them.
    pub(super) async fn end(mut self) {
        self.set(State::Draining, |status| status.reload = None);
        if let Some(mut serving) = self.serving.take() {
            let admin = serving.kept.admin(&self.dir);
            if serving.kept.admin_closed {
                warn!(pid = serving.pid(), "this Envoy cannot be told to take its leave and is ended");
                leave::end(&mut serving.process).await;
            } else {
                // Recorded as leaving before its listeners close: if the supervisor is killed meanwhile, the next one does not adopt this
                // Envoy as the serving one.
                let until = SystemTime::now() + self.config.envoy.drain.0 + PARENT_GRACE;
                serving.kept.role = Role::Leaving;
                serving.kept.until = Some(until);
                self.keep(Some(&serving.kept));
                let deadline = Instant::now() + self.config.envoy.drain.0;
                let ports = Ports::now();
                leave::take_leave(&mut serving.process, &admin, self.config.envoy.drain.0, LAST_IN).await;
                // Older Envoys may still serve clients, and stopping a younger one would terminate the older one.
                while Instant::now() < deadline
                    && self.leavers.iter().any(|leaver| leaver.has_clients(&ports))
                {
                    sleep(LOOK_SOON).await;
                }
                if serving.kept.parent_lost {
                    // On SIGTERM it would try to reach its dead parent for ten seconds, then abort.
                    leave::kill(&mut serving.process).await;
                } else {
                    leave::end(&mut serving.process).await;
                }
            }
            self.forget(&serving.kept);
        }
        self.leaving.abort_all();
        let mut last: JoinSet<()> = JoinSet::new();
        for mut process in self.leavers().filter_map(Kept::process) {
            last.spawn(async move { leave::end(&mut process).await });
        }
        for mut stray in std::mem::take(&mut self.strays) {
            last.spawn(async move { leave::end(&mut stray.process).await });
        }
        while last.join_next().await.is_some() {}
        for leaver in std::mem::take(&mut self.leavers) {
            self.forget(&leaver.kept);
        }
        _ = std::fs::remove_file(self.dir.join("admin.sock"));
        self.keep(None);
        self.set(State::Stopped, |status| {
            status.envoy.pid = None;
            status.epoch = None;
        });
    }
}
