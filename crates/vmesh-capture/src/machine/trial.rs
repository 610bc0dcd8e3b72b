//! Trials: a change of the spec, from the agent's want to its confirmation or rollback.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{Action, AgentFacts, Level, PathTest};
use super::{Kernel, Life, Machine, PathCheck, Phase, Refresh, SAVES_AFTER, SaveFor, SessionsFor, Task};
use crate::confirm::{Proposed, is_routine};
use crate::facts::Session;
use crate::foreign;
use crate::program::Stage;
use crate::spec::{Inward, Outward, SELF_TESTS, Spec};

/// The number of ports of virtual addresses that are checked against foreign rules.
const MAX_JUDGED_PORTS: usize = 256;

impl Machine {
    pub(super) fn want(&mut self, spec: Spec, known: AgentFacts, patience: Duration, now: Instant) {
        if let Err(error) = spec.limits() {
            return self.reply(Err(format!("this is not captured, and what was is as before: {error}")));
        }
        // The kernel may have rules that no saved state mentions. So the first want is applied in any case,
        // even if it equals the current spec.
        let is_first_word = matches!(self.life, Life::AwaitsAgent { .. });
        if is_first_word {
            self.life = Life::Keeps;
        }
        let before = self.wanted().0;
        self.agent_wants = Some(spec.clone());
        let known_changed = self.known != known;
        self.known = known;
        let is_refused = self.refused.as_ref().is_some_and(|(refused, _)| is_routine(refused, &spec));
        let spec = if is_refused { self.confirmed_with_endpoints_of(spec) } else { spec };
        let proposed = self.commit.propose(spec, now, patience);
        // Only the part of the confirmed spec that the agent still wants is in force. So a proposal that
        // changes nothing can still change the rules.
        let after = self.wanted().0;
        let is_routine = !is_first_word && !known_changed && is_routine(&before, &after);
        match proposed {
            Proposed::Same if is_routine && before == after => return self.reply(Ok(())),
            // After a restart the agent reports its endpoints again at once, so a change of endpoints is
            // saved later.
            Proposed::Routine if is_routine && !after.is_off() => {
                self.due.save_at.get_or_insert(now + SAVES_AFTER);
                self.tasks.extend([Task::Bring(Refresh::Endpoints), Task::Reply(Ok(()))]);
            }
            Proposed::Same | Proposed::Routine => {
                let save = SaveFor::Warn("after a restart an older state would be in force: ");
                self.tasks.extend([Task::Save(save), Task::Bring(Refresh::Host), Task::SettleWant]);
            }
            Proposed::Trial => {
                self.trial.number += 1;
                self.trial.doubt = None;
                self.refused = None;
                self.tasks.extend([
                    Task::ReadHost,
                    Task::ReadSessions(SessionsFor::Trial),
                    Task::Save(SaveFor::Trial),
                    Task::Bring(Refresh::Rules),
                    Task::SettleWant,
                ]);
            }
        }
        self.leaving_since = None;
    }

    /// Returns the confirmed spec with the endpoints of `spec`, which is the one that was rolled back.
    pub(super) fn confirmed_with_endpoints_of(&self, spec: Spec) -> Spec {
        let mut confirmed = self.commit.state().confirmed.clone();
        if confirmed.outbound.capture != Outward::Off {
            confirmed.outbound.vips = spec.outbound.vips;
            confirmed.outbound.addresses = spec.outbound.addresses;
        }
        confirmed
    }

    pub(super) fn confirm(&mut self, trial: u64) {
        if trial != self.trial.number || self.commit.until().is_none() {
            return self.not_confirmed("nothing of that number is on trial".to_owned());
        }
        if self.commit.is_bypassed() {
            let why = "the host is out of the mesh by its bypass: what is not on the host shows nothing";
            return self.not_confirmed(why.to_owned());
        }
        self.tasks.push_back(Task::CheckListeners);
        if !self.path_test(&self.wanted().0).is_empty() {
            self.filter.forget();
            self.tasks.push_back(Task::CheckPath(PathCheck::Confirmation));
        }
        self.tasks.extend([Task::ReadHost, Task::ReadSessions(SessionsFor::Confirmation)]);
    }

    pub(super) fn not_confirmed(&mut self, why: String) {
        self.tasks.clear();
        self.trial.doubt = Some(why.clone());
        self.reply(Err(why));
    }

    pub(super) fn or_not_confirmed(&mut self, result: Result<(), String>) {
        if let Err(why) = result {
            self.not_confirmed(why);
        }
    }

    pub(super) fn sessions_read(&mut self, purpose: SessionsFor, sessions: Vec<Session>) {
        match purpose {
            SessionsFor::Trial => self.trial.sessions = sessions,
            SessionsFor::Confirmation => match sessions_live(&self.trial.sessions, &sessions) {
                Ok(()) => {
                    self.commit.confirm();
                    self.refused = None;
                    self.trial.doubt = None;
                    self.tell(Level::Info, format!("the change is confirmed (number {})", self.trial.number));
                    let save = SaveFor::Warn("a restart would take back what was just confirmed: ");
                    self.tasks.extend([Task::Save(save), Task::Bring(Refresh::Rules), Task::Reply(Ok(()))]);
                }
                Err(why) => self.not_confirmed(why),
            },
        }
    }

    /// Records a rolled-back trial, and why it failed.
    pub(super) fn take_back(&mut self, spec: Spec, why: String) {
        self.tell(Level::Warn, format!("a change of capture is taken back: {why}"));
        self.refused = Some((spec, why));
        self.tasks.push_back(Task::Save(SaveFor::Warn("")));
    }

    pub(super) fn settle_want(&mut self) {
        let Some(error) = self.report.error.clone() else { return self.reply(Ok(())) };
        match self.commit.revert() {
            Some(spec) => {
                let why = format!("it could not be applied: {error}");
                self.take_back(spec, why.clone());
                self.tasks.extend([Task::Bring(Refresh::Host), Task::Reply(Err(why))]);
            }
            None => self.reply(Ok(())),
        }
    }

    pub(super) fn check_path(&mut self, purpose: PathCheck) {
        let (spec, stage) = self.wanted();
        let mut test = self.path_test(&spec);
        if let PathCheck::Watch { with_rules, outbound_is_well } = purpose {
            let has_rules = matches!(&self.kernel, Kernel::Has(program) if !program.is_absent());
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
        self.wait(Action::TryPath(test), Phase::TryingPath(purpose));
    }

    /// Returns the test connections that show whether the traffic that `spec` captures arrives at Envoy, in
    /// each direction and address family.
    fn path_test(&self, spec: &Spec) -> PathTest {
        let has_ipv6 = self.host.as_ref().is_some_and(|host| host.ipv6);
        let is_dialed =
            |address: &SocketAddr| spec.outbound.vips.contains(address) && (address.is_ipv4() || has_ipv6);
        let dial = match proves_itself(spec) {
            true => SELF_TESTS.into_iter().filter(is_dialed).collect(),
            false => Vec::new(),
        };
        let inbound = match spec.inbound.capture {
            Inward::Redirect => spec.inbound.ports.clone(),
            Inward::Off | Inward::Tproxy => BTreeSet::new(),
        };
        PathTest { dial, inbound, is_afresh: false }
    }

    pub(super) fn path_tried(&mut self, purpose: PathCheck, result: Result<(), String>) {
        let with_rules = match purpose {
            PathCheck::Confirmation => true,
            PathCheck::Watch { with_rules, .. } => with_rules,
        };
        if result.is_err() || !with_rules {
            return self.path_checked(purpose, result);
        }
        if self.filter.rules().is_none() {
            return self.wait(Action::ReadFilter, Phase::ReadingFilterForPath(purpose));
        }
        let result = self.untracked();
        self.path_checked(purpose, result);
    }

    /// Names a foreign rule that keeps connections to virtual addresses from being captured.
    pub(super) fn untracked(&self) -> Result<(), String> {
        let (spec, _) = self.wanted();
        if !proves_itself(&spec) {
            return Ok(());
        }
        let ports: BTreeSet<u16> =
            spec.outbound.vips.iter().map(SocketAddr::port).take(MAX_JUDGED_PORTS).collect();
        let untracked = |port| Some((port, foreign::untracked(self.filter.rules()?, port)?));
        match ports.into_iter().find_map(untracked) {
            None => Ok(()),
            Some((port, rule)) => Err(format!(
                "connections to port {port} of virtual addresses lead nowhere: a rule keeps them from being tracked, and so from \
                 being captured ({rule})"
            )),
        }
    }

    pub(super) fn path_checked(&mut self, purpose: PathCheck, result: Result<(), String>) {
        match purpose {
            PathCheck::Confirmation => self.or_not_confirmed(result),
            PathCheck::Watch { .. } => {
                let fault = result.err();
                if let Some(why) = fault.as_ref().filter(|why| self.report.path_fault.as_ref() != Some(why)) {
                    self.tell(Level::Warn, why.clone());
                }
                self.report.path_fault = fault;
            }
        }
    }
}

/// Reports whether connections of this process are captured, that is, whether `spec` captures those of all
/// users.
fn proves_itself(spec: &Spec) -> bool {
    let (include, exclude) = (&spec.outbound.include, &spec.outbound.exclude);
    let everybody = include.users.is_empty() && include.groups.is_empty() && include.units.is_empty();
    let nobody = exclude.users.is_empty() && exclude.groups.is_empty() && exclude.units.is_empty();
    spec.outbound.capture != Outward::Off && everybody && nobody
}

/// Checks that the SSH sessions from before the change still work. Some may have ended meanwhile. If all have
/// ended, or if one gets no answer, the change counts as the cause.
fn sessions_live(before: &[Session], now: &[Session]) -> Result<(), String> {
    let still = |session: &&Session| now.iter().find(|later| later.inode == session.inode);
    let living: Vec<_> = before.iter().filter_map(|session| still(&session)).collect();
    if !before.is_empty() && living.is_empty() {
        return Err(format!(
            "the SSH sessions that were open ({}) have all ended since; if they were closed on purpose, try again",
            before.len()
        ));
    }
    let stuck = living.iter().filter(|session| session.stuck).count();
    if stuck > 0 {
        return Err(format!("{stuck} SSH sessions get no answer since"));
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
        assert_eq!(sessions_live(&[], &[]), Ok(()));
        assert_eq!(sessions_live(&[session(1, false), session(2, true)], &[session(1, false)]), Ok(()));
        assert_eq!(sessions_live(&[], &[session(1, true)]), Ok(()));
        assert!(sessions_live(&[session(1, false)], &[session(3, false)]).unwrap_err().contains("all ended"));
        assert!(sessions_live(&[session(1, false)], &[session(1, true)]).unwrap_err().contains("no answer"));
    }
}
