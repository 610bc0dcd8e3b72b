//! Attempts: the steps from the facts of the host to the rules in the kernel, or to their removal.

use std::time::Instant;

use super::messages::{Action, ApplyResult, DeadManTimers, LogLevel, RulesetChange};
use super::states::{
    AfterFootprint, Attempt, Drift, KernelRules, Lifecycle, Phase, Refresh, TargetRules, Task,
};
use super::{Machine, TICK, directions};
use crate::confirm::draining_program;
use crate::host::Host;
use crate::iptables::Footprint;
use crate::program::{Directions, Program};
use crate::spec::Spec;

/// The number of changed rules that are listed for one drift.
const MAX_LISTED: usize = 20;

impl Machine {
    pub(super) fn reconcile(&mut self, refresh: Refresh, now: Instant) {
        let host = match (&self.host, refresh) {
            (Some(host), Refresh::Endpoints | Refresh::Rules) => host.clone(),
            (None, _) | (_, Refresh::Host) => {
                self.tasks.push_front(Task::Reconcile(Refresh::Rules));
                return self.read_host(Phase::ReadingHost);
            }
        };
        if refresh == Refresh::Rules {
            self.forget_rules();
        }
        if let Lifecycle::AwaitsAgent { until } = self.life {
            if !self.commit.is_bypassed() && now < until {
                return;
            }
            self.life = Lifecycle::Keeps;
        }
        self.pending.last_attempt = Some(now);
        self.start_attempt(host, false, now);
    }

    pub(super) fn start_attempt(&mut self, host: Host, is_retry: bool, now: Instant) {
        let (spec, stage) = self.wanted();
        self.actions.push(Action::Watch(directions(&spec)));
        let attempt = Attempt { host, spec, stage, is_retry };
        match self.backend {
            Some(_) => self.continue_attempt(attempt, now),
            None => {
                let ipv6 = attempt.host.ipv6;
                self.await_result(Action::Detect { ipv6 }, Phase::Detecting(Box::new(attempt)));
            }
        }
    }

    /// Continues an attempt once the backend is known.
    pub(super) fn continue_attempt(&mut self, attempt: Attempt, now: Instant) {
        if attempt.spec.is_off() {
            self.leaving_since.get_or_insert(now);
            return self
                .await_result(Action::CountConnections, Phase::CountingConnections(Box::new(attempt)));
        }
        self.leaving_since = None;
        let is_judged = !attempt.spec.inbound.ports_under_the_filter().is_empty();
        match is_judged && self.filter.rules().is_none() {
            true => self.await_result(Action::ReadFilter, Phase::ReadingFilter(Box::new(attempt))),
            false => self.compile(attempt, now),
        }
    }

    pub(super) fn compile(&mut self, attempt: Attempt, now: Instant) {
        let mut spec = attempt.spec.clone();
        let left_out = self.remove_conflicting_ports(&mut spec, now);
        let (program, notes) = match Program::new(&spec, &attempt.host, attempt.stage) {
            Ok(compiled) => compiled,
            Err(error) => return self.fail_attempt(attempt, error.to_string()),
        };
        self.report_notes(notes.iter().map(ToString::to_string).chain(left_out).collect());
        self.record_footprint(AfterFootprint::Capture(Box::new(TargetRules { attempt, spec, program })));
    }

    pub(super) fn record_footprint(&mut self, next: AfterFootprint) {
        let has_rules = matches!(self.kernel, KernelRules::Has(_));
        match self.commit.state().footprint.is_none() && !has_rules {
            true => self.await_result(Action::TakeFootprint, Phase::TakingFootprint(next)),
            false => self.continue_with_footprint(next),
        }
    }

    /// Saves the footprint before any rule is added.
    pub(super) fn save_footprint(&mut self, next: AfterFootprint, result: Result<Option<Footprint>, String>) {
        match result {
            Ok(Some(footprint)) => {
                self.commit.set_footprint(Some(footprint));
                self.save(Phase::SavingFootprint(next));
            }
            Ok(None) => self.continue_with_footprint(next),
            Err(why) => self.fail_attempt(next.attempt(), why),
        }
    }

    pub(super) fn finish_saving_footprint(&mut self, next: AfterFootprint, result: Result<(), String>) {
        match result {
            Ok(()) => self.continue_with_footprint(next),
            Err(why) => {
                // The next attempt must save the footprint again, before any rule is added.
                self.commit.set_footprint(None);
                self.fail_attempt(next.attempt(), why);
            }
        }
    }

    pub(super) fn continue_with_footprint(&mut self, next: AfterFootprint) {
        match next {
            AfterFootprint::Capture(goal) => {
                self.await_result(Action::CheckEnvoy(directions(&goal.spec)), Phase::CheckingEnvoy(goal));
            }
            AfterFootprint::Drain { attempt, program, open } => {
                self.actions.push(Action::SetTimers(None));
                self.kernel = KernelRules::Unknown;
                let timeout = attempt.spec.dead_man.timeout;
                let action = Action::Apply { program: program.clone(), timeout, well: Directions::NONE };
                self.await_result(action, Phase::Draining { attempt, program, open });
            }
        }
    }

    /// Removes the inbound ports from `spec` that a redirect would open or close against the host's own
    /// filter, and those whose effect is unknown. Returns a note for each.
    pub(super) fn remove_conflicting_ports(&mut self, spec: &mut Spec, now: Instant) -> Vec<String> {
        let judged = spec.inbound.ports_under_the_filter();
        if judged.is_empty() {
            return Vec::new();
        }
        self.filter.judge(&judged, now).remove_conflicts(spec)
    }

    pub(super) fn report_notes(&mut self, notes: Vec<String>) {
        let new: Vec<String> =
            notes.iter().filter(|note| !self.report.notes.contains(note)).cloned().collect();
        for note in new {
            self.log(LogLevel::Warn, note);
        }
        self.report.notes = notes;
    }

    pub(super) fn apply(&mut self, goal: Box<TargetRules>, well: Directions) {
        // A change that fails may leave any part of itself in the kernel.
        let before = std::mem::replace(&mut self.kernel, KernelRules::Unknown);
        let (program, timeout) = (goal.program.clone(), goal.spec.dead_man.timeout);
        self.await_result(Action::Apply { program, timeout, well }, Phase::Applying { goal, before, well });
    }

    pub(super) fn finish_apply(
        &mut self,
        goal: TargetRules,
        before: KernelRules,
        well: Directions,
        applied: ApplyResult,
        now: Instant,
    ) {
        let TargetRules { attempt, spec, program } = goal;
        let ApplyResult { changes, outcome } = applied;
        if outcome == Ok(RulesetChange::Bypassed) {
            self.set_bypassed(true);
            return self.tasks.push_front(Task::Reconcile(Refresh::Host));
        }
        let is_attempted = changes.is_some();
        if let Some(changes) = changes
            && before == KernelRules::Has(program.clone())
        {
            self.record_drift(changes, now);
        }
        let change = match outcome {
            Ok(change) => change,
            Err(why) => {
                if !is_attempted {
                    self.kernel = before;
                }
                return self.fail_attempt(attempt, why);
            }
        };
        let mut refreshed = Directions::NONE;
        if change == RulesetChange::Replaced {
            self.replacements += 1;
            refreshed = well;
        }
        let dead_man_timers = DeadManTimers {
            timeout: spec.dead_man.timeout,
            directions: program.dead_man_timers(),
            replaced: self.replacements,
            refreshed,
        };
        self.actions
            .push(Action::SetTimers((!dead_man_timers.directions.is_empty()).then_some(dead_man_timers)));
        self.kernel = KernelRules::Has(program);
        // Rules of other backends are removed only after the new rules are in place: a redirected connection
        // lives only as long as some rule translates its addresses.
        let footprint = self.commit.state().footprint.clone();
        let action = Action::CleanOtherBackends { program: Program::absent(), footprint };
        self.await_result(action, Phase::CleaningOtherBackends(Box::new(attempt)));
    }

    pub(super) fn record_drift(&mut self, changes: Vec<String>, now: Instant) {
        let recent = self.report.changed_by.take();
        let by =
            recent.filter(|(when, _)| now.saturating_duration_since(*when) < TICK).and_then(|(_, by)| by);
        let changes: Vec<String> = changes.into_iter().take(MAX_LISTED).collect();
        let who = by.as_deref().unwrap_or("another program");
        let text =
            format!("{who} changed rules of vmesh, and vmesh-net restored them: {}", changes.join("; "));
        self.log(LogLevel::Warn, text);
        let count = self.report.drift.count + 1;
        self.report.drift = Drift { count, at: Some(now), changes, by };
    }

    /// Begins to remove the rules: those of other backends first.
    pub(super) fn begin_removal(&mut self, attempt: Box<Attempt>, open: usize, now: Instant) {
        let since = *self.leaving_since.get_or_insert(now);
        let ipv6 = self.backend.is_some_and(|(_, ipv6)| ipv6);
        let program = draining_program(open, since, now, self.drain, ipv6);
        let footprint = self.commit.state().footprint.clone();
        let action = Action::CleanOtherBackends { program: program.clone(), footprint };
        self.await_result(action, Phase::CleaningOtherBackendsFirst { attempt, program, open });
    }

    /// Drains or removes the rules of the backend in use. The rules of other backends were removed before.
    pub(super) fn drain_or_remove(&mut self, attempt: Box<Attempt>, program: Program, open: usize) {
        if program.is_absent() {
            if self.kernel == KernelRules::Absent {
                self.leaving_since = None;
                return self.clear_report();
            }
            self.actions.push(Action::SetTimers(None));
            self.kernel = KernelRules::Unknown;
            let footprint = self.commit.state().footprint.clone();
            self.await_result(Action::RemoveRules { footprint }, Phase::RemovingRules(attempt));
        } else if self.kernel == KernelRules::Has(program.clone()) {
            self.clear_report();
        } else {
            self.record_footprint(AfterFootprint::Drain { attempt, program, open });
        }
    }

    pub(super) fn finish_draining(
        &mut self,
        attempt: Attempt,
        program: Program,
        open: usize,
        applied: ApplyResult,
    ) {
        if let Err(why) = applied.outcome {
            return self.fail_attempt(attempt, why);
        }
        if applied.changes.is_some() {
            let text =
                format!("capture is off: {open} redirected connections drain before the rules are removed");
            self.log(LogLevel::Info, text);
        }
        self.kernel = KernelRules::Has(program);
        self.clear_report();
    }

    pub(super) fn finish_removal(&mut self, attempt: Attempt, result: Result<bool, String>) {
        match result {
            Ok(changed) => {
                if changed {
                    self.log(LogLevel::Info, "removed all rules of vmesh");
                }
                self.kernel = KernelRules::Absent;
                self.leaving_since = None;
                self.commit.set_footprint(None);
                self.clear_report();
                self.save(Phase::SavingRemoval);
            }
            Err(why) => self.fail_attempt(attempt, why),
        }
    }

    pub(super) fn clear_report(&mut self) {
        self.report.notes.clear();
        self.report.error = None;
    }

    pub(super) fn fail_attempt(&mut self, attempt: Attempt, why: String) {
        if !attempt.is_retry && !attempt.host.parent_cgroups.is_empty() {
            // A unit may have stopped since its control group was read, so the machine reads the host again,
            // once.
            self.forget_rules();
            return self.read_host(Phase::ReadingHostAgain);
        }
        if self.report.error.as_ref() != Some(&why) {
            self.log(
                LogLevel::Error,
                format!(
                    "could not bring the rules of the host to the wanted state; vmesh-net tries again: {why}"
                ),
            );
        }
        self.report.error = Some(why);
    }
}
