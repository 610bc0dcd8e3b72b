//! Envoys that leave, and the end of them all.

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

/// One that takes leave of its clients.
pub(super) struct Leaver {
    kept: Kept,
    /// `kept.until`, by a clock that nobody sets.
    until: Instant,
}

/// Whether one that has ended `left` before it would have been killed has been ended by its child, which sets it down as
/// ended: of any other end it does not know.
pub(super) fn ends_in_time(left: Duration) -> bool {
    left <= PARENT_GRACE * 2
}

impl Leaver {
    /// In this order: of one that ends meanwhile nothing can be found out, and nobody is its client.
    fn has_clients(&self, ports: &Ports) -> bool {
        ports.has_clients(self.kept.pid()) && self.kept.process().is_some()
    }

    /// Whether its end, now, is one that its child does not know of.
    fn ends_too_soon(&self) -> bool {
        self.kept.admin_closed && !ends_in_time(self.until.saturating_duration_since(Instant::now()))
    }
}

impl Supervisor {
    pub(super) fn leavers(&self) -> impl Iterator<Item = &Kept> {
        self.leavers.iter().map(|leaver| &leaver.kept)
    }

    /// How long one stays at most that another took over from.
    pub(super) fn stay(&self) -> Duration {
        plan::stay(self.config.envoy.hot_restart.parent_shutdown.0, self.config.envoy.drain.0)
    }

    /// Lets one end in its own time: its child has made it take its leave, or it is told to.
    pub(super) fn see_off(&mut self, mut member: Member) {
        let drain = self.config.envoy.drain.0;
        let longest = self.stay() + PARENT_GRACE;
        // The clock may have been set since that was put on record.
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
                // Not by SIGTERM: that makes it end the one that it took over from, which may still have connections.
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

    /// What became of the Envoy that the serving one took over from.
    pub(super) fn parent(&self) -> Parent {
        let Some(serving) = &self.serving else { return Parent::Gone };
        let parent = self.leavers.iter().find(|leaver| serving.kept.parent == Some(leaver.kept.number));
        match parent {
            _ if serving.kept.parent_lost => Parent::Lost,
            Some(parent) if parent.has_clients(&Ports::now()) => Parent::Leaves,
            Some(parent) if parent.kept.process().is_some() => Parent::Idle,
            // It has ended this very moment.
            Some(parent) if parent.ends_too_soon() => Parent::Lost,
            Some(_) | None => Parent::Gone,
        }
    }

    /// Ends the leaving Envoys that have no clients any more.
    pub(super) async fn end_idle_leavers(&mut self) {
        let ports = Ports::now();
        let idle: Vec<Kept> = self
            .leavers
            .iter()
            .filter(|leaver| !leaver.has_clients(&ports))
            .map(|leaver| leaver.kept.clone())
            .collect();
        for kept in idle {
            // The serving Envoy ends its own parent, and aborts if the parent is gone by then.
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

    /// Lets all of them leave, and ends them.
    pub(super) async fn end(mut self) {
        self.set(State::Draining, |status| status.reload = None);
        if let Some(mut serving) = self.serving.take() {
            let admin = serving.kept.admin(&self.dir);
            if serving.kept.admin_closed {
                warn!(pid = serving.pid(), "this Envoy cannot be told to take its leave and is ended");
                leave::end(&mut serving.process).await;
            } else {
                // On record before it closes its listeners: a supervisor that is killed meanwhile leaves nothing that the
                // next one would serve with.
                let until = SystemTime::now() + self.config.envoy.drain.0 + PARENT_GRACE;
                serving.kept.role = Role::Leaving;
                serving.kept.until = Some(until);
                self.keep(Some(&serving.kept));
                let deadline = Instant::now() + self.config.envoy.drain.0;
                let ports = Ports::now();
                leave::take_leave(&mut serving.process, &admin, self.config.envoy.drain.0, LAST_IN).await;
                // Those that leave since before may still answer, and the younger one would end the older one.
                while Instant::now() < deadline
                    && self.leavers.iter().any(|leaver| leaver.has_clients(&ports))
                {
                    sleep(LOOK_SOON).await;
                }
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
