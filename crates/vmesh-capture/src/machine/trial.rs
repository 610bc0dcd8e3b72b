//! Trials: a change of the spec, from the agent's want to its confirmation or rollback.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::messages::{Action, AgentFacts, LogLevel, PathTest};
use super::states::{KernelRules, Lifecycle, PathCheck, Phase, Refresh, SaveFor, SessionsFor, Task};
use super::{Machine, SAVE_DELAY};
use crate::confirm::{ProposalOutcome, is_routine};
use crate::facts::Session;
use crate::foreign;
use crate::program::Stage;
use crate::spec::{InboundCapture, OutboundCapture, SELF_TESTS, Spec};

/// The number of ports of virtual addresses that are checked against foreign rules.
const MAX_JUDGED_PORTS: usize = 256;

impl Machine {
    pub(super) fn handle_want(
        &mut self,
        spec: Spec,
        agent_facts: AgentFacts,
        patience: Duration,
        now: Instant,
    ) {
        if let Err(error) = spec.limits() {
            return self.reply(Err(format!(
                "the new capture spec is refused, and the current one stays in force: {error}"
            )));
        }
        // The kernel may have rules that no saved state mentions. So the first want is applied in any case,
        // even if it equals the current spec.
        let is_first_want = matches!(self.life, Lifecycle::AwaitsAgent { .. });
        if is_first_want {
            self.life = Lifecycle::Keeps;
        }
        let before = self.wanted().0;
        self.agent_spec = Some(spec.clone());
        let facts_changed = self.agent_facts != agent_facts;
        self.agent_facts = agent_facts;
        let is_refused = self.failed_trial.as_ref().is_some_and(|(refused, _)| is_routine(refused, &spec));
        let spec = if is_refused { self.confirmed_with_endpoints_of(spec) } else { spec };
        let proposed = self.commit.propose(spec, now, patience);
        // Only the part of the confirmed spec that the agent still wants is in force. So a proposal that
        // changes nothing can still change the rules.
        let after = self.wanted().0;
        let is_routine = !is_first_want && !facts_changed && is_routine(&before, &after);
        match proposed {
            ProposalOutcome::Same if is_routine && before == after => return self.reply(Ok(())),
            // After a restart the agent reports its endpoints again at once, so a change of endpoints is
            // saved later.
            ProposalOutcome::Routine if is_routine && !after.is_off() => {
                self.pending.save_at.get_or_insert(now + SAVE_DELAY);
                self.tasks.extend([Task::Reconcile(Refresh::Endpoints), Task::Reply(Ok(()))]);
            }
            ProposalOutcome::Same | ProposalOutcome::Routine => {
                let save = SaveFor::Warn("could not save the state, so a restart would use an older one: ");
                self.tasks.extend([Task::Save(save), Task::Reconcile(Refresh::Host), Task::AnswerWant]);
            }
            ProposalOutcome::Trial => {
                self.trial.number += 1;
                self.trial.doubt = None;
                self.failed_trial = None;
                self.tasks.extend([
                    Task::ReadHost,
                    Task::ReadSessions(SessionsFor::Trial),
                    Task::Save(SaveFor::Trial),
                    Task::Reconcile(Refresh::Rules),
                    Task::AnswerWant,
                ]);
            }
        }
        self.leaving_since = None;
    }

    /// Returns the confirmed spec with the endpoints of `spec`, which is the one that was rolled back.
    pub(super) fn confirmed_with_endpoints_of(&self, spec: Spec) -> Spec {
        let mut confirmed = self.commit.state().confirmed.clone();
        if confirmed.outbound.capture != OutboundCapture::Off {
            confirmed.outbound.vips = spec.outbound.vips;
            confirmed.outbound.addresses = spec.outbound.addresses;
        }
        confirmed
    }

    pub(super) fn handle_confirm(&mut self, trial: u64) {
        if trial != self.trial.number || self.commit.until().is_none() {
            return self.refuse_confirmation("no trial has this number; it may have ended".to_owned());
        }
        if self.commit.is_bypassed() {
            let why = "the trial cannot be confirmed while the bypass is set, because its rules are not installed; lift the bypass first";
            return self.refuse_confirmation(why.to_owned());
        }
        self.tasks.push_back(Task::CheckListeners);
        if !self.path_test(&self.wanted().0).is_empty() {
            self.filter.forget();
            self.tasks.push_back(Task::CheckPath(PathCheck::Confirmation));
        }
        self.tasks.extend([Task::ReadHost, Task::ReadSessions(SessionsFor::Confirmation)]);
    }

    pub(super) fn refuse_confirmation(&mut self, why: String) {
        self.tasks.clear();
        self.trial.doubt = Some(why.clone());
        self.reply(Err(why));
    }

    pub(super) fn refuse_confirmation_on_error(&mut self, result: Result<(), String>) {
        if let Err(why) = result {
            self.refuse_confirmation(why);
        }
    }

    pub(super) fn handle_sessions(&mut self, purpose: SessionsFor, sessions: Vec<Session>) {
        match purpose {
            SessionsFor::Trial => self.trial.sessions = sessions,
            SessionsFor::Confirmation => match check_sessions(&self.trial.sessions, &sessions) {
                Ok(()) => {
                    self.commit.confirm();
                    self.failed_trial = None;
                    self.trial.doubt = None;
                    self.log(LogLevel::Info, format!("trial {} is confirmed", self.trial.number));
                    let save = SaveFor::Warn(
                        "could not save the confirmation, so a restart would roll the trial back: ",
                    );
                    self.tasks.extend([
                        Task::Save(save),
                        Task::Reconcile(Refresh::Rules),
                        Task::Reply(Ok(())),
                    ]);
                }
                Err(why) => self.refuse_confirmation(why),
            },
        }
    }

    /// Records a rolled-back trial, and why it failed.
    pub(super) fn record_rollback(&mut self, spec: Spec, why: String) {
        self.log(LogLevel::Warn, format!("rolled back the trial: {why}"));
        self.failed_trial = Some((spec, why));
        self.tasks.push_back(Task::Save(SaveFor::Warn("")));
    }

    pub(super) fn answer_want(&mut self) {
        let Some(error) = self.report.error.clone() else { return self.reply(Ok(())) };
        match self.commit.revert() {
            Some(spec) => {
                let why = format!("its rules could not be applied: {error}");
                self.record_rollback(spec, why.clone());
                self.tasks.extend([Task::Reconcile(Refresh::Host), Task::Reply(Err(why))]);
            }
            None => self.reply(Ok(())),
        }
    }

    pub(super) fn check_path(&mut self, purpose: PathCheck) {
        let (spec, stage) = self.wanted();
        let mut test = self.path_test(&spec);
        if let PathCheck::Watch { with_rules, outbound_is_well } = purpose {
            let has_rules = matches!(&self.kernel, KernelRules::Has(program) if !program.is_absent());
            let is_trial = stage == Stage::Trial;
            if is_trial || !outbound_is_well {
                test.dial.clear();
            }
            // During a trial only the counters start anew when rules changed, because the confirmation reads
            // them.
            test.is_afresh = with_rules;
            if test.is_empty() || !has_rules || (is_trial && !with_rules) {
                self.report.path_fault = None;
                return;
            }
        }
        self.await_result(Action::TryPath(test), Phase::TryingPath(purpose));
    }

    /// Returns the test connections that show whether the traffic that `spec` captures arrives at Envoy, in
    /// each direction and address family.
    fn path_test(&self, spec: &Spec) -> PathTest {
        let has_ipv6 = self.host.as_ref().is_some_and(|host| host.ipv6);
        let is_dialed =
            |address: &SocketAddr| spec.outbound.vips.contains(address) && (address.is_ipv4() || has_ipv6);
        let dial = match captures_all_users(spec) {
            true => SELF_TESTS.into_iter().filter(is_dialed).collect(),
            false => Vec::new(),
        };
        let inbound = match spec.inbound.capture {
            InboundCapture::Redirect => spec.inbound.ports.clone(),
            InboundCapture::Off | InboundCapture::Tproxy => BTreeSet::new(),
        };
        PathTest { dial, inbound, is_afresh: false }
    }

    pub(super) fn handle_path_result(&mut self, purpose: PathCheck, result: Result<(), String>) {
        let with_rules = match purpose {
            PathCheck::Confirmation => true,
            PathCheck::Watch { with_rules, .. } => with_rules,
        };
        if result.is_err() || !with_rules {
            return self.finish_path_check(purpose, result);
        }
        if self.filter.rules().is_none() {
            return self.await_result(Action::ReadFilter, Phase::ReadingFilterForPath(purpose));
        }
        let result = self.check_tracking();
        self.finish_path_check(purpose, result);
    }

    /// Names a foreign rule that keeps connections to virtual addresses from being captured.
    pub(super) fn check_tracking(&self) -> Result<(), String> {
        let (spec, _) = self.wanted();
        if !captures_all_users(&spec) {
            return Ok(());
        }
        let ports: BTreeSet<u16> =
            spec.outbound.vips.iter().map(SocketAddr::port).take(MAX_JUDGED_PORTS).collect();
        let untracking = |port| Some((port, foreign::untracking_rule(self.filter.rules()?, port)?));
        match ports.into_iter().find_map(untracking) {
            None => Ok(()),
            Some((port, rule)) => Err(format!(
                "connections to port {port} of virtual addresses fail: a rule excludes them from connection tracking, so they cannot \
                 be captured ({rule}); exclude the virtual addresses from that rule"
            )),
        }
    }

    pub(super) fn finish_path_check(&mut self, purpose: PathCheck, result: Result<(), String>) {
        match purpose {
            PathCheck::Confirmation => self.refuse_confirmation_on_error(result),
            PathCheck::Watch { .. } => {
                let fault = result.err();
                if let Some(why) = fault.as_ref().filter(|why| self.report.path_fault.as_ref() != Some(why)) {
                    self.log(LogLevel::Warn, why.clone());
                }
                self.report.path_fault = fault;
            }
        }
    }
}

/// Reports whether connections of this process are captured, that is, whether `spec` captures those of all
/// users.
fn captures_all_users(spec: &Spec) -> bool {
    let (include, exclude) = (&spec.outbound.include, &spec.outbound.exclude);
    let everybody = include.users.is_empty() && include.groups.is_empty() && include.units.is_empty();
    let nobody = exclude.users.is_empty() && exclude.groups.is_empty() && exclude.units.is_empty();
    spec.outbound.capture != OutboundCapture::Off && everybody && nobody
}

/// Checks that the SSH sessions from before the change still work. Some may have ended meanwhile. If all have
/// ended, or if one gets no answer, the change counts as the cause.
fn check_sessions(before: &[Session], now: &[Session]) -> Result<(), String> {
    let still = |session: &&Session| now.iter().find(|later| later.inode == session.inode);
    let living: Vec<_> = before.iter().filter_map(|session| still(&session)).collect();
    if !before.is_empty() && living.is_empty() {
        return Err(format!(
            "all SSH sessions that were open when the trial began ({}) have ended; if they were closed on purpose, confirm again",
            before.len()
        ));
    }
    let stuck = living.iter().filter(|session| session.stuck).count();
    if stuck > 0 {
        return Err(format!("{stuck} SSH sessions get no answer since the trial began"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(inode: u64, stuck: bool) -> Session {
        Session { inode, stuck }
    }

    #[test]
    fn sessions_that_end_one_by_one_are_nobodys_fault_and_all_at_once_are() {
        assert_eq!(check_sessions(&[], &[]), Ok(()));
        assert_eq!(check_sessions(&[session(1, false), session(2, true)], &[session(1, false)]), Ok(()));
        assert_eq!(check_sessions(&[], &[session(1, true)]), Ok(()));
        assert!(
            check_sessions(&[session(1, false)], &[session(3, false)]).unwrap_err().contains("have ended")
        );
        assert!(check_sessions(&[session(1, false)], &[session(1, true)]).unwrap_err().contains("no answer"));
    }
}
