//! Adopts the Envoys that an earlier supervisor started.

use std::time::SystemTime;

use tracing::{info, warn};

use super::Supervisor;
use super::farewell::ends_in_time;
use super::member::{self, Kept, Member, Record, Role};
use super::takeover::Why;
use crate::envoy::process::{Identity, Process};
use crate::envoy::{admin, leave};

impl Supervisor {
    pub(super) async fn adopt(&mut self) {
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
                // A candidate that is live has completed its handover.
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
        self.find_strays(serving.as_ref());
        if let Some(mut member) = serving {
            info!(pid = member.pid(), "took over the Envoy of an earlier supervisor");
            member.kept.role = Role::Serving;
            if member.kept.admin_closed {
                self.candidate_is_gone(&mut member.kept).await;
            }
            if gone.iter().any(|parent| member.kept.parent == Some(parent.number) && died(parent)) {
                self.parent_is_lost(&mut member.kept);
            }
            self.link(&member.kept);
            // The Envoy may still be starting, or may hang. `watch_serving` waits for its answer, and kills it after `hung_after`.
            self.now_serving(member, true);
        }
        // Removed last, because files that running Envoys of the same line share must stay.
        for kept in gone {
            self.forget(&kept);
        }
        self.keep(None);
        self.regain().await;
    }

    pub(super) fn parent_is_lost(&mut self, child: &mut Kept) {
        warn!(
            pid = child.pid(),
            "the Envoy before this one died before its time, and this one would abort with it: another one takes over"
        );
        child.parent_lost = true;
        self.wanted.get_or_insert(Why::ParentLost);
    }

    /// Finds the running Envoys of this directory that the record does not list, because the record could not be written or the whole
    /// directory was removed.
    fn find_strays(&mut self, serving: Option<&Member>) {
        let known: Vec<i32> =
            serving.map(Member::pid).into_iter().chain(self.leavers().map(Kept::pid)).collect();
        self.strays = member::started_in(&self.dir);
        self.strays.retain(|stray| !known.contains(&stray.pid()));
        for stray in &self.strays {
            warn!(
                pid = stray.pid(),
                "an Envoy that is on no record serves here: it is to leave when another one serves"
            );
        }
        let numbers = self.strays.iter().map(|stray| stray.kept.number);
        self.last_number = numbers.fold(self.last_number, u64::max);
    }

    /// Drains the Envoys that are not on record. Called once another Envoy is live.
    pub(super) async fn see_off_strays(&mut self) {
        let strays = std::mem::take(&mut self.strays);
        let lines: Vec<_> = strays.iter().map(|stray| (stray.kept.base_id, stray.kept.epoch)).collect();
        for mut stray in strays {
            let answers = admin::server_info(&stray.kept.admin(&self.dir)).await.is_ok();
            stray.kept.admin_closed = !answers;
            let is_younger =
                |(line, epoch): &(u32, u32)| *line == stray.kept.base_id && *epoch > stray.kept.epoch;
            // An Envoy that a younger one of its line took over from drains by itself.
            if answers || lines.iter().any(is_younger) {
                self.see_off(stray);
            } else {
                // This Envoy cannot be told to drain, and would accept new clients as long as it ran.
                leave::kill(&mut stray.process).await;
                self.forget(&stray.kept);
            }
        }
        self.keep(None);
    }

    /// Identifies the process that was being started when the supervisor died. Such an Envoy is killed unless it is live.
    async fn half_started(&self, kept: &Kept) -> Option<Identity> {
        let path = member::bootstrap(&self.dir, kept.number);
        if self.is_live(kept).await
            && let Some(pid) = admin::listening_pid(&kept.admin(&self.dir)).await
        {
            return Some(Process::find(pid)?.identity());
        }
        // Repeated, since the intermediate process that is killed may have just spawned the next one.
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
}

/// Reports whether this Envoy crashed while no supervisor ran, rather than being terminated by the Envoy that replaced it.
fn died(kept: &Kept) -> bool {
    let left = kept.until.and_then(|until| until.duration_since(SystemTime::now()).ok()).unwrap_or_default();
    kept.role == Role::Leaving && kept.admin_closed && !ends_in_time(left)
}
