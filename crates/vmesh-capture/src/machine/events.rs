//! The events from outside, and the tasks that they queue.

use std::time::{Duration, Instant};

use super::messages::{Action, Event, LogLevel};
use super::states::{KernelRules, Lifecycle, PathCheck, Phase, Refresh, SaveFor, Task};
use super::{CHECK_TICKS, FREQUENT_CHECK_TICKS, MIN_CHECK_INTERVAL, Machine, RETRY_DELAY, directions};
use crate::apply::Backend;

impl Machine {
    pub(super) fn handle_outside_event(&mut self, event: Event, now: Instant) {
        match event {
            Event::Started => self.tasks.push_back(Task::Reconcile(Refresh::Host)),
            Event::Tick { bypassed, outbound_is_well } => self.tick(bypassed, outbound_is_well, now),
            Event::Want { spec, agent_facts, patience } => {
                self.handle_want(*spec, agent_facts, patience, now)
            }
            Event::Confirm { trial } => self.handle_confirm(trial),
            Event::Revert { trial, why } => {
                let on_trial = if trial == self.trial.number { self.commit.revert() } else { None };
                match on_trial {
                    Some(spec) => {
                        self.record_rollback(spec, why);
                        self.tasks.extend([Task::Reconcile(Refresh::Host), Task::Reply(Ok(()))]);
                    }
                    None => self.reply(Err("no trial has this number; it may have ended".to_owned())),
                }
            }
            Event::Retry => {
                // Until the agent connects again, the machine treats this spec as what the agent wants.
                if let Some((spec, _)) = self.failed_trial.take() {
                    self.agent_spec.get_or_insert(spec);
                }
                let save = Task::Save(SaveFor::Warn(
                    "could not save the state, so a restart would forget this retry: ",
                ));
                self.tasks.extend([save, Task::Reply(Ok(()))]);
            }
            Event::RulesChanged { by, bypassed } => {
                self.forget_rules();
                self.pending.path_with_rules = true;
                self.report.changed_by = Some((now, by));
                // The bypass script sets its flag before it changes any rule. So the machine sees the flag
                // here, and does not repair the rules that the script is removing.
                if self.set_bypassed(bypassed) {
                    self.tasks.push_back(Task::Reconcile(Refresh::Host));
                } else {
                    self.reconcile_after_rest(Refresh::Rules, now);
                }
            }
            Event::UnitsStarted => {
                if !self.wanted().0.is_off() {
                    self.reconcile_after_rest(Refresh::Host, now);
                }
            }
            Event::RefreshFailed(why) => {
                self.log(LogLevel::Warn, why.clone());
                self.report.error = Some(why);
                self.tasks.push_back(Task::Reconcile(Refresh::Host));
            }
            Event::Stop => {
                self.abandon_trial();
                self.life = Lifecycle::Stops { since: now };
                self.leaving_since.get_or_insert(now);
                self.tasks.extend([Task::Reconcile(Refresh::Host), Task::ExitIfRemoved]);
            }
            Event::Handover => {
                self.abandon_trial();
                self.tasks.push_back(Task::Exit);
            }
            result => {
                self.log(LogLevel::Error, format!("ignored a result that no phase waits for: {result:?}"))
            }
        }
    }

    fn tick(&mut self, bypassed: bool, outbound_is_well: bool, now: Instant) {
        if matches!(self.life, Lifecycle::Stops { .. }) {
            self.tasks.extend([Task::Reconcile(Refresh::Host), Task::ExitIfRemoved]);
            return;
        }
        self.pending.ticks = self.pending.ticks.wrapping_add(1);
        let looks = self.pending.ticks.is_multiple_of(self.check_interval());
        let again = self.report.error.is_some() && !self.reconciled_within(RETRY_DELAY, now);
        let waited = matches!(self.life, Lifecycle::AwaitsAgent { until } if now >= until);
        let refresh = self.pending.refresh.take();
        let is_leaving = self.leaving_since.is_some();
        let mut bring = self.set_bypassed(bypassed)
            || refresh == Some(Refresh::Host)
            || looks
            || again
            || waited
            || is_leaving;
        if refresh.is_some() && !bring {
            self.tasks.push_back(Task::Reconcile(Refresh::Rules));
        }
        if let Some(spec) = self.commit.tick(now) {
            let doubt =
                self.trial.doubt.take().unwrap_or_else(|| "no client confirmed it in time".to_owned());
            self.record_rollback(spec, doubt);
            bring = true;
        }
        if bring {
            self.tasks.push_back(Task::Reconcile(Refresh::Host));
        }
        self.tasks.push_back(Task::SaveIfDue);
        let with_rules = std::mem::take(&mut self.pending.path_with_rules);
        if looks || with_rules {
            self.tasks.push_back(Task::CheckPath(PathCheck::Watch { with_rules, outbound_is_well }));
        }
    }

    pub(super) fn run_task(&mut self, task: Task, now: Instant) {
        match task {
            Task::ReadHost => self.read_host(Phase::ReadingHost),
            Task::Reconcile(refresh) => self.reconcile(refresh, now),
            Task::ReadSessions(purpose) => {
                let ports = self.host.as_ref().map(|host| host.never.ssh.clone()).unwrap_or_default();
                self.await_result(Action::ReadSessions(ports), Phase::ReadingSessions(purpose));
            }
            Task::Save(purpose) => {
                if self.may_save() {
                    self.save(Phase::Saving(purpose));
                }
            }
            Task::SaveIfDue => {
                if self.may_save() && self.pending.save_at.is_some_and(|at| at <= now) {
                    let before = "could not save the state, so a restart would use the older endpoints until the agent connects: ";
                    self.save(Phase::Saving(SaveFor::Warn(before)));
                }
            }
            Task::CheckListeners => {
                let directions = directions(&self.wanted().0);
                self.await_result(Action::CheckListeners(directions), Phase::CheckingListeners);
            }
            Task::CheckPath(purpose) => self.check_path(purpose),
            Task::AnswerWant => self.answer_want(),
            Task::Reply(result) => self.reply(result),
            Task::ExitIfRemoved => self.exit_if_removed(now),
            Task::Exit => self.actions.push(Action::Exit),
        }
    }

    /// Gives up a trial because the process ends. The spec is not recorded as failed.
    fn abandon_trial(&mut self) {
        self.commit.revert();
        let save = SaveFor::Warn("could not save the state, so the next start would use an older one: ");
        self.tasks.push_back(Task::Save(save));
    }

    fn exit_if_removed(&mut self, now: Instant) {
        let Lifecycle::Stops { since } = self.life else { return };
        if self.kernel == KernelRules::Absent {
            self.log(LogLevel::Info, "no rule of vmesh is left: stopping");
            self.actions.push(Action::Exit);
        } else if let Some(error) = &self.report.error
            && now.saturating_duration_since(since) > 2 * self.drain
        {
            let text = format!("could not remove the rules of vmesh; run /usr/lib/vmesh/bypass: {error}");
            self.log(LogLevel::Error, text);
            self.actions.push(Action::Exit);
        }
    }

    /// Records whether the bypass is set. Returns `true` if that changed.
    pub(super) fn set_bypassed(&mut self, bypassed: bool) -> bool {
        let changed = self.commit.is_bypassed() != bypassed;
        if changed {
            self.log(
                LogLevel::Info,
                if bypassed {
                    "the bypass is set: nothing is captured"
                } else {
                    "the bypass is lifted: capture starts again"
                },
            );
            self.commit.set_bypassed(bypassed);
        }
        changed
    }

    fn reconciled_within(&self, time: Duration, now: Instant) -> bool {
        self.pending.last_attempt.is_some_and(|looked| now.saturating_duration_since(looked) < time)
    }

    fn reconcile_after_rest(&mut self, refresh: Refresh, now: Instant) {
        match self.reconciled_within(MIN_CHECK_INTERVAL, now) {
            true => self.pending.refresh = self.pending.refresh.max(Some(refresh)),
            false => self.tasks.push_back(Task::Reconcile(refresh)),
        }
    }

    fn check_interval(&self) -> u64 {
        let is_told = self.backend.is_none_or(|(backend, _)| backend == Backend::Nft);
        let out = &self.commit.wanted().0.outbound;
        let no_units =
            out.include.units.is_empty() && out.exclude.units.is_empty() && out.dial.units.is_empty();
        let is_read = self.filter.rules().is_none_or(|rules| rules.gaps().is_none());
        if is_told && no_units && is_read { CHECK_TICKS } else { FREQUENT_CHECK_TICKS }
    }

    pub(super) fn forget_rules(&mut self) {
        self.filter.forget();
        self.actions.push(Action::ForgetRules);
        // While rules are wanted, the machine remembers the last program: a difference from it is drift.
        if self.kernel == KernelRules::Absent {
            self.kernel = KernelRules::AbsentBefore;
        } else if matches!(self.kernel, KernelRules::Has(_)) && self.wanted().0.is_off() {
            self.kernel = KernelRules::Unknown;
        }
    }
}
