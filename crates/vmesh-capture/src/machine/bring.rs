//! Attempts: the steps from the facts of the host to the rules in the kernel, or to their removal.

use std::time::Instant;

use super::{
    Action, Applied, Attempt, Change, DeadMen, Drift, FirstRules, Goal, Kernel, Level, Life, Machine,
};
use super::{Phase, Refresh, TICK, Task, directions};
use crate::host::Host;
use crate::program::{Directions, Program};
use crate::spec::Spec;

/// The number of changed rules that are listed for one drift.
const MAX_LISTED: usize = 20;

impl Machine {
    pub(super) fn bring(&mut self, refresh: Refresh, now: Instant) {
        let host = match (&self.host, refresh) {
            (Some(host), Refresh::Endpoints | Refresh::Rules) => host.clone(),
            (None, _) | (_, Refresh::Host) => {
                self.tasks.push_front(Task::Bring(Refresh::Rules));
                return self.read_host(Phase::ReadingHost);
            }
        };
        if refresh == Refresh::Rules {
            self.forget_rules();
        }
        if let Life::AwaitsAgent { until } = self.life {
            if !self.commit.is_bypassed() && now < until {
                return;
            }
            self.life = Life::Keeps;
        }
        self.due.looked = Some(now);
        self.attempt(host, false, now);
    }

    pub(super) fn attempt(&mut self, host: Host, is_retry: bool, now: Instant) {
        let (spec, stage) = self.wanted();
        self.actions.push(Action::Watch(directions(&spec)));
        let attempt = Attempt { host, spec, stage, is_retry };
        match self.backend {
            Some(_) => self.go(attempt, now),
            None => {
                let ipv6 = attempt.host.ipv6;
                self.wait(Action::Detect { ipv6 }, Phase::Detecting(Box::new(attempt)));
            }
        }
    }

    /// Continues an attempt once the backend is known.
    pub(super) fn go(&mut self, attempt: Attempt, now: Instant) {
        if attempt.spec.is_off() {
            self.leaving_since.get_or_insert(now);
            return self.wait(Action::CountConnections, Phase::Counting(Box::new(attempt)));
        }
        self.leaving_since = None;
        let is_judged = !attempt.spec.inbound.ports_under_the_filter().is_empty();
        match is_judged && self.filter.rules().is_none() {
            true => self.wait(Action::ReadFilter, Phase::ReadingFilter(Box::new(attempt))),
            false => self.compile(attempt, now),
        }
    }

    pub(super) fn compile(&mut self, attempt: Attempt, now: Instant) {
        let mut spec = attempt.spec.clone();
        let left_out = self.leave_out_conflicts(&mut spec, now);
        let (program, notes) = match Program::new(&spec, &attempt.host, attempt.stage) {
            Ok(compiled) => compiled,
            Err(error) => return self.failed(attempt, error.to_string()),
        };
        self.take_notes(notes.iter().map(ToString::to_string).chain(left_out).collect());
        self.take_footprint(FirstRules::Capture(Box::new(Goal { attempt, spec, program })));
    }

    pub(super) fn take_footprint(&mut self, next: FirstRules) {
        let has_rules = matches!(self.kernel, Kernel::Has(_));
        match self.commit.state().footprint.is_none() && !has_rules {
            true => self.wait(Action::TakeFootprint, Phase::TakingFootprint(next)),
            false => self.with_footprint(next),
        }
    }

    pub(super) fn with_footprint(&mut self, next: FirstRules) {
        match next {
            FirstRules::Capture(goal) => {
                self.wait(Action::LookAtEnvoy(directions(&goal.spec)), Phase::LookingAtEnvoy(goal));
            }
            FirstRules::Drain { attempt, program, open } => {
                self.actions.push(Action::Order(None));
                self.kernel = Kernel::Unknown;
                let timeout = attempt.spec.dead_man.timeout;
                let action = Action::Apply { program: program.clone(), timeout, well: Directions::NONE };
                self.wait(action, Phase::Draining { attempt, program, open });
            }
        }
    }

    /// Removes the inbound ports from `spec` that a redirect would open or close against the host's own
    /// filter, and those whose effect is unknown. Returns a note for each.
    pub(super) fn leave_out_conflicts(&mut self, spec: &mut Spec, now: Instant) -> Vec<String> {
        let judged = spec.inbound.ports_under_the_filter();
        if judged.is_empty() {
            return Vec::new();
        }
        self.filter.judge(&judged, now).leave_out(spec)
    }

    pub(super) fn take_notes(&mut self, notes: Vec<String>) {
        let new: Vec<String> =
            notes.iter().filter(|note| !self.report.notes.contains(note)).cloned().collect();
        for note in new {
            self.tell(Level::Warn, note);
        }
        self.report.notes = notes;
    }

    pub(super) fn applied(
        &mut self,
        goal: Goal,
        before: Kernel,
        well: Directions,
        applied: Applied,
        now: Instant,
    ) {
        let Goal { attempt, spec, program } = goal;
        let Applied { changes, outcome } = applied;
        if outcome == Ok(Change::Bypassed) {
            self.set_bypassed(true);
            return self.tasks.push_front(Task::Bring(Refresh::Host));
        }
        let is_attempted = changes.is_some();
        if let Some(changes) = changes
            && before == Kernel::Has(program.clone())
        {
            self.drifted(changes, now);
        }
        let change = match outcome {
            Ok(change) => change,
            Err(why) => {
                if !is_attempted {
                    self.kernel = before;
                }
                return self.failed(attempt, why);
            }
        };
        let mut refreshed = Directions::NONE;
        if change == Change::Replaced {
            self.replaced += 1;
            refreshed = well;
        }
        let dead_men = DeadMen {
            timeout: spec.dead_man.timeout,
            directions: program.dead_men(),
            replaced: self.replaced,
            refreshed,
        };
        self.actions.push(Action::Order((!dead_men.directions.is_empty()).then_some(dead_men)));
        self.kernel = Kernel::Has(program);
        // Rules of other backends are removed only after the new rules are in place: a redirected connection
        // lives only as long as some rule translates its addresses.
        let footprint = self.commit.state().footprint.clone();
        let action = Action::EndOthers { program: Program::absent(), footprint };
        self.wait(action, Phase::EndingOthers(Box::new(attempt)));
    }

    pub(super) fn drifted(&mut self, changes: Vec<String>, now: Instant) {
        let recent = self.report.changed_by.take();
        let by =
            recent.filter(|(when, _)| now.saturating_duration_since(*when) < TICK).and_then(|(_, by)| by);
        let what: Vec<String> = changes.into_iter().take(MAX_LISTED).collect();
        let who = by.as_deref().unwrap_or("somebody");
        let text = format!("rules of vmesh were changed by {who} and are mended: {}", what.join("; "));
        self.tell(Level::Warn, text);
        let count = self.report.drift.count + 1;
        self.report.drift = Drift { count, at: Some(now), what, by };
    }

    /// Drains or removes the rules of the backend in use. The rules of other backends were removed before.
    pub(super) fn leave(&mut self, attempt: Box<Attempt>, program: Program, open: usize) {
        if program.is_absent() {
            if self.kernel == Kernel::Absent {
                self.leaving_since = None;
                return self.left();
            }
            self.actions.push(Action::Order(None));
            self.kernel = Kernel::Unknown;
            let footprint = self.commit.state().footprint.clone();
            self.wait(Action::TakeAway { footprint }, Phase::TakingAway(attempt));
        } else if self.kernel == Kernel::Has(program.clone()) {
            self.left();
        } else {
            self.take_footprint(FirstRules::Drain { attempt, program, open });
        }
    }

    pub(super) fn left(&mut self) {
        self.report.notes.clear();
        self.report.error = None;
    }

    pub(super) fn failed(&mut self, attempt: Attempt, why: String) {
        if !attempt.is_retry && !attempt.host.nurseries.is_empty() {
            // A unit may have stopped since its control group was read, so the machine reads the host again,
            // once.
            self.forget_rules();
            return self.read_host(Phase::ReadingHostAgain);
        }
        if self.report.error.as_ref() != Some(&why) {
            self.tell(Level::Error, format!("the host is not as it is wanted: {why}"));
        }
        self.report.error = Some(why);
    }
}
