//! Adopts the Envoys that an earlier supervisor started.

use std::time::SystemTime;

use tracing::{info, warn};

use super::Supervisor;
use super::drain::ends_in_time;
use super::handover::ReloadReason;
use super::supervised::{self, EnvoyRecord, Role, SupervisedEnvoy, SupervisorRecord};
use crate::envoy::process::{Process, ProcessIdentity};
use crate::envoy::{admin, shutdown};

impl Supervisor {
    pub(super) async fn adopt_recorded(&mut self) {
        let saved = SupervisorRecord::load(&self.record_path);
        self.last_number = saved.last_number;
        let mut gone = Vec::new();
        let mut serving: Option<SupervisedEnvoy> = None;
        for mut record in saved.envoys {
            if record.identity.is_none() {
                record.identity = self.find_half_started(&record).await;
            }
            let Some(mut envoy) = SupervisedEnvoy::find(record.clone(), &self.dir) else {
                gone.push(record);
                continue;
            };
            match envoy.record.role {
                Role::Leaving => self.start_draining(envoy),
                Role::Serving => serving = Some(envoy),
                // A candidate that is live has completed its handover.
                Role::Candidate if self.is_live(&envoy.record).await => {
                    if let Some(old) = serving.take() {
                        let hot = old.record.base_id == envoy.record.base_id;
                        envoy.record.parent = hot.then_some(old.record.number);
                        self.start_draining(old);
                    }
                    serving = Some(envoy);
                }
                Role::Candidate => {
                    warn!(
                        pid = envoy.pid(),
                        "killing an Envoy that an earlier supervisor started, since it is not live"
                    );
                    shutdown::kill(&mut envoy.process).await;
                    gone.push(envoy.record);
                }
            }
        }
        self.find_strays(serving.as_ref());
        if let Some(mut envoy) = serving {
            info!(pid = envoy.pid(), "adopted the Envoy of an earlier supervisor");
            envoy.record.role = Role::Serving;
            if envoy.record.admin_closed {
                self.clean_up_after_candidate(&mut envoy.record).await;
            }
            if gone
                .iter()
                .any(|parent| envoy.record.parent == Some(parent.number) && has_crashed_unsupervised(parent))
            {
                self.note_parent_crash(&mut envoy.record);
            }
            self.link_admin_socket(&envoy.record);
            // The Envoy may still be starting, or may hang. `watch_serving` waits for its answer, and kills it after `hung_after`.
            self.set_serving(envoy, true);
        }
        // Removed last, because files that running Envoys of the same line share must stay.
        for record in gone {
            self.remove_files(&record);
        }
        self.save_record(None);
        self.regain_admin().await;
    }

    pub(super) fn note_parent_crash(&mut self, child: &mut EnvoyRecord) {
        warn!(
            pid = child.pid(),
            "the old Envoy crashed while it drained, and this one would abort when it next contacts it: replacing this one"
        );
        child.parent_lost = true;
        self.pending_reload.get_or_insert(ReloadReason::ParentCrashed);
    }

    /// Finds the running Envoys of this directory that the record does not list, because the record could not be written or the whole
    /// directory was removed.
    fn find_strays(&mut self, serving: Option<&SupervisedEnvoy>) {
        let known: Vec<i32> = serving
            .map(SupervisedEnvoy::pid)
            .into_iter()
            .chain(self.draining_records().map(EnvoyRecord::pid))
            .collect();
        self.strays = supervised::envoys_started_in(&self.dir);
        self.strays.retain(|stray| !known.contains(&stray.pid()));
        for stray in &self.strays {
            warn!(
                pid = stray.pid(),
                "found a running Envoy that is not on record; it is drained once another one serves"
            );
        }
        let numbers = self.strays.iter().map(|stray| stray.record.number);
        self.last_number = numbers.fold(self.last_number, u64::max);
    }

    /// Drains the Envoys that are not on record. Called once another Envoy is live.
    pub(super) async fn drain_strays(&mut self) {
        let strays = std::mem::take(&mut self.strays);
        let lines: Vec<_> = strays.iter().map(|stray| (stray.record.base_id, stray.record.epoch)).collect();
        for mut stray in strays {
            let answers = admin::server_info(&stray.record.admin_socket(&self.dir)).await.is_ok();
            stray.record.admin_closed = !answers;
            let is_younger =
                |(line, epoch): &(u32, u32)| *line == stray.record.base_id && *epoch > stray.record.epoch;
            // An Envoy that a younger one of its line took over from drains by itself.
            if answers || lines.iter().any(is_younger) {
                self.start_draining(stray);
            } else {
                // This Envoy cannot be told to drain, and would accept new clients as long as it ran.
                shutdown::kill(&mut stray.process).await;
                self.remove_files(&stray.record);
            }
        }
        self.save_record(None);
    }

    /// Identifies the process that was being started when the supervisor died. Such an Envoy is killed unless it is live.
    async fn find_half_started(&self, record: &EnvoyRecord) -> Option<ProcessIdentity> {
        let path = supervised::bootstrap_path(&self.dir, record.number);
        if self.is_live(record).await
            && let Some(pid) = admin::listening_pid(&record.admin_socket(&self.dir)).await
        {
            return Some(Process::find(pid)?.identity());
        }
        // Repeated, since the intermediate process that is killed may have just spawned the next one.
        for _ in 0..10 {
            let found = supervised::processes_naming(&path);
            if found.is_empty() {
                break;
            }
            for mut process in found {
                shutdown::kill(&mut process).await;
            }
        }
        None
    }

    async fn is_live(&self, record: &EnvoyRecord) -> bool {
        let admin = record.admin_socket(&self.dir);
        admin::server_info(&admin).await.is_ok_and(|info| info.state == "LIVE")
    }
}

/// Reports whether this Envoy crashed while no supervisor ran, rather than being terminated by the Envoy that replaced it.
fn has_crashed_unsupervised(record: &EnvoyRecord) -> bool {
    let left =
        record.until.and_then(|until| until.duration_since(SystemTime::now()).ok()).unwrap_or_default();
    record.role == Role::Leaving && record.admin_closed && !ends_in_time(left)
}
