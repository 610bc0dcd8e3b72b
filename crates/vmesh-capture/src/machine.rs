//! The state machine of vmesh-net: decides which capture rules the host has, and when they change.
//!
//! [`Machine`] does no I/O and reads no clock. Its driver (vmesh-net) feeds it events, performs the actions
//! that it returns, and feeds it their results:
//!
//! ```text
//! Event (a want, a tick, a change of rules, the result of an action)
//!   -> Machine::on(event, now) -> actions -> the driver -> Event ...
//! ```
//!
//! # Order of calls
//!
//! Call [`Machine::start`], then [`Machine::on`] with [`Event::Started`]. Perform the returned actions in
//! order. At most one action of a batch has a result ([`Action::awaits_result`]), and it is the last one:
//! pass its result to [`Machine::on`] next. If no action of a batch has a result, the machine is idle
//! ([`Machine::is_idle`]) and takes the next event from outside. An event out of turn changes nothing.
//!
//! # States
//!
//! Three independent states make up the machine: [`Lifecycle`] (the process waits for the agent, runs, or stops),
//! `KernelRules` (what the machine knows of vmesh's rules in the kernel) and `Phase` (the action whose result
//! the machine awaits). [`Machine::on`] is the only function that leaves a phase.
//!
//! ```text
//! an attempt to bring the host's rules to what is wanted:
//!   Idle -> ReadingHost -> [Detecting]
//!     capture is wanted:  [ReadingFilter] -> [TakingFootprint -> SavingFootprint]
//!                           -> CheckingEnvoy -> Applying -> CleaningOtherBackends -> Idle
//!     capture is off:     CountingConnections -> CleaningOtherBackendsFirst -> RemovingRules -> SavingRemoval -> Idle
//!                           or, while connections drain: [TakingFootprint -> SavingFootprint] -> Draining -> Idle
//! a trial of a new spec:
//!   ReadingHost -> ReadingSessions -> Saving -> an attempt
//! a confirmation of the trial:
//!   CheckingListeners -> TryingPath -> [ReadingFilterForPath] -> ReadingHost -> ReadingSessions -> Saving -> an attempt
//! a failure of any step:
//!   Idle with an error, and a later tick tries again; if a unit may have stopped meanwhile, ReadingHostAgain once first
//! ```
//!
//! # Invariants
//!
//! `tests/keeper.rs` checks these against a model host that fails at any action: a trial is on the disk
//! before it is in the kernel; a host ends either with the wanted rules or with those from before vmesh;
//! `off` leaves no rule behind.

mod attempt;
mod events;
mod messages;
mod results;
mod states;
mod trial;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

pub use messages::{
    Action, AgentFacts, ApplyResult, DeadManTimers, Event, LogLevel, PathTest, RulesetChange, SavedState,
};
pub use states::{CaptureState, Drift, Lifecycle};
use states::{KernelRules, MachineReport, PendingWork, Phase, Refresh, SaveFor, Task, Trial};

use crate::apply::Backend;
use crate::confirm::{self, Commit, restrict_to};
use crate::foreign::InboundJudge;
use crate::host::{Host, HostMemory};
use crate::program::{Direction, Directions, Stage};
use crate::spec::{InboundCapture, OutboundCapture, Spec};

/// The interval of [`Event::Tick`].
pub const TICK: Duration = Duration::from_secs(1);
/// Ticks between two full checks of the host where the kernel reports changes of rules.
const CHECK_TICKS: u64 = 60;
/// Ticks between two full checks where more can change unnoticed: with legacy iptables (the kernel reports
/// nothing), with named units (a restarted unit gets a new control group), and while foreign rules cannot be
/// read.
const FREQUENT_CHECK_TICKS: u64 = 10;
/// The shortest time between two checks of a host whose rules or units change all the time.
const MIN_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The delay before a failed attempt is repeated. By then a lock may be free again, or a disk have room.
const RETRY_DELAY: Duration = Duration::from_secs(5);
/// The delay after which changed endpoints are saved, so that many changes cost one write.
const SAVE_DELAY: Duration = Duration::from_secs(10);
/// The time that the agent gets to connect after vmesh-net started without a readable state.
const AGENT_START_TIMEOUT: Duration = Duration::from_secs(120);

/// The state machine. See the [module documentation](self) for the order of calls.
#[derive(Debug)]
pub struct Machine {
    /// The longest time that connections through redirects may take to end once capture is off.
    drain: Duration,
    life: Lifecycle,
    kernel: KernelRules,
    phase: Phase,
    tasks: VecDeque<Task>,
    actions: Vec<Action>,
    commit: Commit,
    trial: Trial,
    agent_facts: AgentFacts,
    memory: HostMemory,
    /// The spec of the last failed trial and the reason of its failure. Only an operator's retry allows
    /// another trial of it.
    failed_trial: Option<(Spec, String)>,
    /// The agent's last requested spec, in force or not.
    agent_spec: Option<Spec>,
    /// The detected backend; `true` if the host has IPv6.
    backend: Option<(Backend, bool)>,
    /// The last facts that were read from the host.
    host: Option<Host>,
    filter: InboundJudge,
    replacements: u64,
    /// The time when capture was switched off; `None` while something is captured, and once the rules are
    /// removed.
    leaving_since: Option<Instant>,
    pending: PendingWork,
    report: MachineReport,
}

impl Machine {
    /// Begins with the state that was on the disk. If `is_complete` is false, the state could not be read: the
    /// machine then changes no rule until the agent says what it wants.
    pub fn start(
        saved: SavedState,
        is_complete: bool,
        bypassed: bool,
        drain: Duration,
        now: Instant,
    ) -> Machine {
        let (commit, reverted) = Commit::start(saved.commit, bypassed);
        let mut failed_trial = saved.failed_trial;
        let mut actions = Vec::new();
        if let Some(spec) = reverted {
            actions.push(Action::Log(
                LogLevel::Warn,
                "rolled back the trial that was under way when vmesh-net ended".to_owned(),
            ));
            // The trial may be the reason why the process ended.
            failed_trial = Some((spec, "vmesh-net ended during the trial".to_owned()));
        }
        let life = match is_complete {
            true => Lifecycle::Keeps,
            false => Lifecycle::AwaitsAgent { until: now + AGENT_START_TIMEOUT },
        };
        Machine {
            drain,
            life,
            kernel: KernelRules::Unknown,
            phase: Phase::Idle,
            tasks: VecDeque::new(),
            actions,
            commit,
            trial: Trial::default(),
            agent_facts: saved.agent_facts,
            memory: saved.memory,
            failed_trial,
            agent_spec: None,
            backend: None,
            host: None,
            filter: InboundJudge::default(),
            replacements: 0,
            leaving_since: None,
            pending: PendingWork::default(),
            report: MachineReport::default(),
        }
    }

    /// Handles an event, and returns the actions to perform. See the [module documentation](self) for the
    /// order.
    pub fn on(&mut self, event: Event, now: Instant) -> Vec<Action> {
        match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Idle => self.handle_outside_event(event, now),
            phase => self.handle_result(phase, event, now),
        }
        while self.phase == Phase::Idle
            && let Some(task) = self.tasks.pop_front()
        {
            self.run_task(task, now);
        }
        std::mem::take(&mut self.actions)
    }

    fn await_result(&mut self, action: Action, phase: Phase) {
        self.actions.push(action);
        self.phase = phase;
    }

    fn log(&mut self, level: LogLevel, text: impl Into<String>) {
        self.actions.push(Action::Log(level, text.into()));
    }

    fn reply(&mut self, result: Result<(), String>) {
        self.actions.push(Action::Reply(result));
    }

    fn read_host(&mut self, phase: Phase) {
        let (agent_facts, memory) = (self.agent_facts.clone(), self.memory.clone());
        self.await_result(Action::ReadHost { spec: Box::new(self.wanted().0), agent_facts, memory }, phase);
    }

    fn remember_host(&mut self, host: Host, now: Instant) {
        let before = self.memory.clone();
        self.memory.remember(&host);
        self.host = Some(host);
        if self.memory != before {
            self.pending.save_at.get_or_insert(now + SAVE_DELAY);
        }
    }

    /// Reports whether the machine may save its state. After a start without a readable state it must not:
    /// the next process would read that nothing was captured.
    fn may_save(&self) -> bool {
        !matches!(self.life, Lifecycle::AwaitsAgent { .. })
    }

    fn save(&mut self, phase: Phase) {
        self.pending.save_at = None;
        let state = SavedState {
            commit: self.commit.state().clone(),
            agent_facts: self.agent_facts.clone(),
            failed_trial: self.failed_trial.clone(),
            memory: self.memory.clone(),
        };
        self.await_result(Action::Save(Box::new(state)), phase);
    }

    fn handle_saved(&mut self, purpose: SaveFor, result: Result<(), String>) {
        match (purpose, result) {
            (SaveFor::Trial, Ok(())) => {
                let text = format!("trial {} of a new capture spec begins", self.trial.number);
                self.log(LogLevel::Info, text);
            }
            (SaveFor::Trial, Err(why)) => {
                // The disk has no record of this trial, so a process that died in it could not roll it back.
                self.commit.revert();
                self.tasks.clear();
                let refusal =
                    Err(format!("the trial is not begun, because its record could not be saved: {why}"));
                // The kernel may have the rules of an earlier trial that this one was to replace.
                self.tasks.extend([Task::Reconcile(Refresh::Rules), Task::Reply(refusal)]);
            }
            (SaveFor::Warn(before), Err(why)) => self.log(LogLevel::Warn, format!("{before}{why}")),
            (SaveFor::Warn(_), Ok(())) => {}
        }
    }

    /// Returns the spec that is to be in force now, and its stage.
    pub fn wanted(&self) -> (Spec, Stage) {
        if matches!(self.life, Lifecycle::Stops { .. }) {
            return (Spec::default(), Stage::Confirmed);
        }
        match self.commit.wanted() {
            (spec, Stage::Trial) => (spec.clone(), Stage::Trial),
            (spec, Stage::Confirmed) => (self.served_part_of(spec), Stage::Confirmed),
        }
    }

    /// Returns the part of the confirmed spec that the agent's configuration still covers. After a rollback
    /// the agent keeps its new configuration, so Envoy has listeners for the new configuration only.
    fn served_part_of(&self, confirmed: &Spec) -> Spec {
        let failed = self.failed_trial.as_ref().map(|(spec, _)| spec);
        match self.agent_spec.as_ref().or(failed) {
            Some(wants) => restrict_to(confirmed, wants),
            None => confirmed.clone(),
        }
    }

    /// Returns the capture state that `vmeshctl capture` shows.
    pub fn state(&self) -> CaptureState {
        let (spec, stage) = self.commit.wanted();
        // A host whose old rules resist removal is not off.
        let may_have_rules = !matches!(self.life, Lifecycle::AwaitsAgent { .. })
            && self.backend.is_some()
            && !matches!(self.kernel, KernelRules::Absent | KernelRules::AbsentBefore);
        match (self.commit.is_bypassed(), spec.is_off(), stage) {
            _ if self.leaving_since.is_some() => CaptureState::Leaving,
            (true, _, _) => CaptureState::Bypassed,
            (false, true, _) if may_have_rules => CaptureState::Leaving,
            (false, true, _) => CaptureState::Off,
            (false, false, Stage::Trial) => CaptureState::Trial,
            (false, false, Stage::Confirmed) => CaptureState::Confirmed,
        }
    }

    /// Reports whether the next event may come from outside.
    pub fn is_idle(&self) -> bool {
        self.phase == Phase::Idle
    }

    /// Returns the lifecycle state of the process.
    pub fn life(&self) -> Lifecycle {
        self.life
    }

    /// Returns the number of the current trial, and its deadline.
    pub fn trial(&self) -> Option<(u64, Instant)> {
        Some((self.trial.number, self.commit.until()?))
    }

    /// Returns the part of the state that must be saved, without the remembered facts of the host.
    pub fn commit(&self) -> &confirm::CommitRecord {
        self.commit.state()
    }

    /// Returns the facts that the agent last reported of itself and of Envoy.
    pub fn agent_facts(&self) -> &AgentFacts {
        &self.agent_facts
    }

    /// Returns the judge that holds the last reading of foreign rules.
    pub fn filter(&self) -> &InboundJudge {
        &self.filter
    }

    /// Returns the remembered facts of the host.
    pub fn memory(&self) -> &HostMemory {
        &self.memory
    }

    /// Returns the reason why the last trial was rolled back, if it was.
    pub fn reverted(&self) -> Option<&str> {
        self.failed_trial.as_ref().map(|(_, why)| why.as_str())
    }

    /// Returns the error of the last attempt, if it failed.
    pub fn error(&self) -> Option<&str> {
        self.report.error.as_deref()
    }

    /// Returns the drift that was repaired since the start.
    pub fn drift(&self) -> &Drift {
        &self.report.drift
    }

    /// Returns the parts of the spec that have no effect on this host, with reasons.
    pub fn notes(&self) -> impl Iterator<Item = &String> {
        self.report.notes.iter().chain(&self.report.path_fault)
    }

    /// Explains which captured connections do not arrive at Envoy. [`Machine::notes`] includes this text.
    pub fn path_fault(&self) -> Option<&str> {
        self.report.path_fault.as_deref()
    }
}

/// Returns the directions that `spec` captures.
pub fn directions(spec: &Spec) -> Directions {
    let outbound = (spec.outbound.capture != OutboundCapture::Off).then_some(Direction::Outbound);
    let inbound = (spec.inbound.capture != InboundCapture::Off).then_some(Direction::Inbound);
    outbound.into_iter().chain(inbound).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_out_of_turn_changes_nothing() {
        let now = Instant::now();
        let mut machine = Machine::start(SavedState::default(), true, false, Duration::ZERO, now);
        let result = machine.on(Event::RulesRemoved(Ok(true)), now);
        assert!(matches!(result.as_slice(), [Action::Log(LogLevel::Error, _)]), "{result:?}");
        let started = machine.on(Event::Started, now);
        assert!(started.last().is_some_and(Action::awaits_result), "{started:?}");
        for event in [Event::Stop, Event::Saved(Ok(())), Event::Started] {
            let result = machine.on(event, now);
            assert!(matches!(result.as_slice(), [Action::Log(LogLevel::Error, _)]), "{result:?}");
            assert_eq!((machine.life(), machine.is_idle()), (Lifecycle::Keeps, false));
        }
        machine.on(Event::HostRead(Box::default()), now);
        assert!(matches!(machine.phase, Phase::Detecting(_)));
    }
}
