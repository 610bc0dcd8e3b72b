//! Commit-confirm: a new spec holds on trial, and is rolled back unless a client confirms that the host still
//! works.
//!
//! This module is pure: the caller passes the current time, and gets the wanted spec. The caller saves
//! [`CommitRecord`] to the disk and changes the rules.
//!
//! The order for each change is: change the [`Commit`], write [`Commit::state`] to the disk, apply
//! [`Commit::wanted`]. An agent that dies between any two of these steps rolls back the unconfirmed change at
//! its next start. Until that start the dead-man timer protects the host, since during a trial every redirect
//! lapses with it.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::iptables::Footprint;
use crate::program::{Program, Stage, common_ports};
use crate::spec::{InboundCapture, Outbound, OutboundCapture, Spec};

/// The part of the state that must survive the process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CommitRecord {
    /// The last confirmed spec. Captures nothing to begin with.
    pub confirmed: Spec,
    /// The spec on trial, which waits for its confirmation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trial: Option<Spec>,
    /// The chains and tables from before the first rule of vmesh: see [`crate::apply::Applier::footprint`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub footprint: Option<Footprint>,
}

/// The effect of a proposal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProposalOutcome {
    /// The proposal equals what is already wanted.
    Same,
    /// The spec is in force and needs no confirmation: only endpoints changed, or everything is switched off.
    Routine,
    /// The spec is in force on trial, until it is confirmed or rolled back.
    Trial,
}

/// The confirmed spec, and the trial of the next one. See the [module documentation](self) for the order of
/// calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    state: CommitRecord,
    until: Option<Instant>,
    patience: Duration,
    bypassed: bool,
    nothing: Spec,
}

impl Commit {
    /// Begins with the state from the disk. A trial found there is over, because the client that began it
    /// cannot confirm it any more: it is rolled back, and its spec is returned.
    pub fn start(mut state: CommitRecord, bypassed: bool) -> (Commit, Option<Spec>) {
        let reverted = state.trial.take();
        (
            Commit { state, until: None, patience: Duration::ZERO, bypassed, nothing: Spec::default() },
            reverted,
        )
    }

    /// Proposes `spec`, to be confirmed within `patience`. If another trial is under way, this one replaces
    /// it; a rollback still returns to the confirmed spec.
    pub fn propose(&mut self, spec: Spec, now: Instant, patience: Duration) -> ProposalOutcome {
        let current = self.state.trial.as_ref().unwrap_or(&self.state.confirmed);
        if *current == spec {
            return ProposalOutcome::Same;
        }
        if spec.is_off() || is_routine(&self.state.confirmed, &spec) {
            self.state.confirmed = spec;
            self.state.trial = None;
            self.until = None;
            return ProposalOutcome::Routine;
        }
        // A change of endpoints does not extend the trial.
        let same_trial = self.state.trial.as_ref().is_some_and(|trial| is_routine(trial, &spec));
        if !same_trial {
            self.until = now.checked_add(patience);
            self.patience = patience;
        }
        self.state.trial = Some(spec);
        if same_trial { ProposalOutcome::Routine } else { ProposalOutcome::Trial }
    }

    /// Confirms the spec on trial. Returns `false` if nothing is on trial, or if the host is bypassed: rules
    /// that are not installed prove nothing.
    pub fn confirm(&mut self) -> bool {
        if self.bypassed {
            return false;
        }
        self.until = None;
        let Some(spec) = self.state.trial.take() else { return false };
        self.state.confirmed = spec;
        true
    }

    /// Rolls back the trial, and returns its spec. Called if the host does not work, or if the spec could not
    /// be applied.
    pub fn revert(&mut self) -> Option<Spec> {
        self.until = None;
        self.state.trial.take()
    }

    /// Rolls back a trial whose deadline has passed, and returns its spec. Call this function when
    /// [`Commit::until`] has passed, and periodically before. A bypass extends the trial until it is lifted:
    /// otherwise the change that an operator makes during the bypass would be rolled back without a trial.
    pub fn tick(&mut self, now: Instant) -> Option<Spec> {
        if self.bypassed && self.until.is_some() {
            self.until = now.checked_add(self.patience);
        }
        let over = self.until.is_some_and(|until| until <= now);
        if over { self.revert() } else { None }
    }

    /// Returns the deadline of the trial.
    pub fn until(&self) -> Option<Instant> {
        self.until
    }

    /// Records whether the flag of the bypass is set. While it is set nothing is captured, and proposals
    /// wait.
    pub fn set_bypassed(&mut self, bypassed: bool) {
        self.bypassed = bypassed;
    }

    pub fn is_bypassed(&self) -> bool {
        self.bypassed
    }

    /// Returns the spec that is to be in force now.
    pub fn wanted(&self) -> (&Spec, Stage) {
        match &self.state.trial {
            _ if self.bypassed => (&self.nothing, Stage::Confirmed),
            Some(spec) => (spec, Stage::Trial),
            None => (&self.state.confirmed, Stage::Confirmed),
        }
    }

    /// Returns the state that must be on the disk before [`Commit::wanted`] is applied.
    pub fn state(&self) -> &CommitRecord {
        &self.state
    }

    /// Records the chains and tables from before the first rule of vmesh; `None` once no rule of vmesh is
    /// left.
    pub fn set_footprint(&mut self, footprint: Option<Footprint>) {
        self.state.footprint = footprint;
    }
}

/// Reports whether two specs differ in endpoints only. Endpoints change all day, and no change of endpoints
/// can cut a host off, since the other fields decide which traffic may be captured.
pub fn is_routine(from: &Spec, to: &Spec) -> bool {
    let without = |spec: &Spec| {
        let mut spec = spec.clone();
        spec.outbound.vips.clear();
        spec.outbound.addresses.clear();
        spec
    };
    without(from) == without(to)
}

/// Returns the part of `spec` that `wants` has as well: without the directions that `wants` does not capture,
/// and without the inbound ports that it does not name. Envoy has listeners for `wants` only.
pub fn restrict_to(spec: &Spec, wants: &Spec) -> Spec {
    let mut spec = spec.clone();
    if wants.outbound.capture == OutboundCapture::Off {
        spec.outbound = Outbound::default();
    }
    spec.outbound.capture = spec.outbound.capture.min(wants.outbound.capture);
    if wants.inbound.capture == InboundCapture::Off {
        spec.inbound.capture = InboundCapture::Off;
        spec.inbound.ports.clear();
    }
    spec.inbound.ports = common_ports(&spec.inbound.ports, &wants.inbound.ports);
    let named = &wants.inbound.ports | &wants.inbound.strict;
    spec.inbound.strict = common_ports(&spec.inbound.strict, &named);
    spec
}

/// The heartbeat: decides when to renew a dead-man timer. While Envoy is well, that is after each fifth of
/// the timeout.
///
/// Call [`Heartbeat::due`] and do what it returns; after a renewal, call [`Heartbeat::refreshed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    timeout: Duration,
    last: Option<Instant>,
}

/// The next step of the heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeartbeatStep {
    /// Renew the timer with [`crate::apply::Applier::renew_all_timers`], then call [`Heartbeat::refreshed`].
    Refresh,
    /// Nothing is due; call [`Heartbeat::due`] again after this time.
    Wait(Duration),
    /// Envoy is not well. The redirects lapse after this time, or have lapsed if it is zero.
    Lapses(Duration),
}

impl Heartbeat {
    pub fn new(timeout: Duration) -> Heartbeat {
        Heartbeat { timeout, last: None }
    }

    /// Returns the next step. `healthy`: Envoy has just accepted a connection at its capture port.
    pub fn due(&self, now: Instant, healthy: bool) -> HeartbeatStep {
        let since = self.last.map(|last| now.saturating_duration_since(last));
        let age = since.unwrap_or(self.timeout);
        let every = self.timeout / 5;
        match healthy {
            true if age >= every => HeartbeatStep::Refresh,
            true => HeartbeatStep::Wait(every - age),
            false => HeartbeatStep::Lapses(self.timeout.saturating_sub(age)),
        }
    }

    pub fn refreshed(&mut self, now: Instant) {
        self.last = Some(now);
    }
}

/// Returns the program for a host on which capture is off while `open` connections still go through
/// redirects. The connections may drain until `patience` after `since`, the time when capture was switched
/// off.
pub fn draining_program(
    open: usize,
    since: Instant,
    now: Instant,
    patience: Duration,
    ipv6: bool,
) -> Program {
    if open > 0 && now.saturating_duration_since(since) < patience {
        Program::drained(ipv6)
    } else {
        Program::absent()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn spec(port: &str) -> Spec {
        let mut spec = Spec::default();
        spec.inbound.capture = InboundCapture::Redirect;
        spec.inbound.ports.insert(port.parse().unwrap());
        spec
    }

    fn with_vip(mut spec: Spec) -> Spec {
        spec.outbound.vips.insert("240.240.0.1:80".parse().unwrap());
        spec
    }

    /// The state that the next start of the process finds on the disk.
    fn restarted(commit: &Commit) -> (Commit, Option<Spec>) {
        let json = serde_json::to_string(commit.state()).unwrap();
        Commit::start(serde_json::from_str(&json).unwrap(), false)
    }

    #[test]
    fn a_spec_that_is_confirmed_stays_and_outlives_the_agent() {
        let now = Instant::now();
        let (mut commit, _) = Commit::start(CommitRecord::default(), false);
        assert_eq!(commit.propose(spec("80"), now, MINUTE), ProposalOutcome::Trial);
        assert_eq!(commit.wanted(), (&spec("80"), Stage::Trial));
        assert!(commit.confirm());
        assert_eq!(commit.tick(now + 2 * MINUTE), None);
        let (commit, reverted) = restarted(&commit);
        assert_eq!((commit.wanted(), reverted), ((&spec("80"), Stage::Confirmed), None));
    }

    #[test]
    fn a_spec_that_nobody_confirms_is_taken_back_in_time() {
        let now = Instant::now();
        let (mut commit, _) =
            Commit::start(CommitRecord { confirmed: spec("80"), ..CommitRecord::default() }, false);
        commit.propose(spec("81"), now, MINUTE);
        commit.propose(spec("82"), now + MINUTE / 2, MINUTE);
        assert_eq!(commit.until(), Some(now + MINUTE + MINUTE / 2));
        assert_eq!(commit.tick(now + MINUTE), None);
        assert_eq!(commit.tick(now + MINUTE + MINUTE / 2), Some(spec("82")));
        assert_eq!(commit.wanted(), (&spec("80"), Stage::Confirmed));
        assert!(!commit.confirm(), "too late");
        assert_eq!(commit.wanted().0, &spec("80"));
    }

    #[test]
    fn an_agent_that_dies_in_a_trial_goes_back_at_its_next_start() {
        let now = Instant::now();
        let (mut commit, _) =
            Commit::start(CommitRecord { confirmed: spec("80"), ..CommitRecord::default() }, false);
        commit.propose(spec("81"), now, MINUTE);
        let (commit, reverted) = restarted(&commit);
        assert_eq!((commit.wanted(), reverted), ((&spec("80"), Stage::Confirmed), Some(spec("81"))));
    }

    #[test]
    fn endpoints_that_come_and_go_need_no_trial_and_do_not_lengthen_one() {
        let now = Instant::now();
        let (mut commit, _) =
            Commit::start(CommitRecord { confirmed: spec("80"), ..CommitRecord::default() }, false);
        assert_eq!(commit.propose(with_vip(spec("80")), now, MINUTE), ProposalOutcome::Routine);
        assert_eq!(commit.wanted(), (&with_vip(spec("80")), Stage::Confirmed));
        assert_eq!(commit.propose(spec("81"), now, MINUTE), ProposalOutcome::Trial);
        assert_eq!(commit.propose(with_vip(spec("81")), now + MINUTE / 2, MINUTE), ProposalOutcome::Routine);
        assert_eq!((commit.wanted().1, commit.until()), (Stage::Trial, Some(now + MINUTE)));
        assert_eq!(commit.propose(with_vip(spec("81")), now, MINUTE), ProposalOutcome::Same);
    }

    #[test]
    fn switching_off_needs_nobodys_leave() {
        let now = Instant::now();
        let (mut commit, _) =
            Commit::start(CommitRecord { confirmed: spec("80"), ..CommitRecord::default() }, false);
        assert_eq!(commit.propose(Spec::default(), now, MINUTE), ProposalOutcome::Routine);
        assert_eq!(commit.wanted(), (&Spec::default(), Stage::Confirmed));
    }

    #[test]
    fn a_bypass_outranks_everything_and_forgets_nothing() {
        let (mut commit, _) =
            Commit::start(CommitRecord { confirmed: spec("80"), ..CommitRecord::default() }, true);
        assert_eq!(commit.wanted().0, &Spec::default());
        commit.propose(spec("81"), Instant::now(), MINUTE);
        assert_eq!(commit.wanted().0, &Spec::default());
        commit.set_bypassed(false);
        assert_eq!(commit.wanted(), (&spec("81"), Stage::Trial));
    }

    #[test]
    fn a_trial_that_is_bypassed_is_neither_confirmed_nor_taken_back() {
        let now = Instant::now();
        let (mut commit, _) =
            Commit::start(CommitRecord { confirmed: spec("80"), ..CommitRecord::default() }, true);
        commit.propose(spec("81"), now, MINUTE);
        assert!(!commit.confirm(), "it was never on the host");
        assert_eq!(commit.tick(now + 2 * MINUTE), None);
        commit.set_bypassed(false);
        assert_eq!(commit.wanted(), (&spec("81"), Stage::Trial));
        assert_eq!(commit.tick(now + 2 * MINUTE + MINUTE / 2), None);
        assert_eq!(commit.tick(now + 3 * MINUTE), Some(spec("81")));
    }

    #[test]
    fn the_dead_man_is_refreshed_in_time_and_only_while_envoy_is_well() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let mut beat = Heartbeat::new(30 * second);
        assert_eq!(beat.due(now, false), HeartbeatStep::Lapses(Duration::ZERO));
        assert_eq!(beat.due(now, true), HeartbeatStep::Refresh);
        beat.refreshed(now);
        assert_eq!(beat.due(now + second, true), HeartbeatStep::Wait(5 * second));
        assert_eq!(beat.due(now + 6 * second, true), HeartbeatStep::Refresh);
        assert_eq!(beat.due(now + 6 * second, false), HeartbeatStep::Lapses(24 * second));
        assert_eq!(beat.due(now + 31 * second, false), HeartbeatStep::Lapses(Duration::ZERO));
        // An `Instant` is monotonic, but a faulty clock must not cause a panic.
        assert_eq!(beat.due(now.checked_sub(second).unwrap_or(now), true), HeartbeatStep::Wait(6 * second));
    }

    #[test]
    fn leave_is_taken_when_nobody_is_left_or_patience_ends() {
        let now = Instant::now();
        assert!(draining_program(0, now, now, MINUTE, true).is_absent());
        assert!(!draining_program(3, now, now + MINUTE / 2, MINUTE, true).is_absent());
        assert!(draining_program(3, now, now + MINUTE, MINUTE, true).is_absent());
    }
}
