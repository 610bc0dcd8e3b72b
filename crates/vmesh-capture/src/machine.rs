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
//! [`KernelRules`] (what the machine knows of vmesh's rules in the kernel) and [`Phase`] (the action whose result
//! the machine awaits). [`Machine::on`] is the only function that leaves a phase.
//!
//! ```text
//! an attempt to bring the host's rules to what is wanted:
//!   Idle -> ReadingHost -> [Detecting]
//!     capture is wanted:  [ReadingFilter] -> [TakingFootprint -> SavingFootprint]
//!                           -> LookingAtEnvoy -> Applying -> EndingOthers -> Idle
//!     capture is off:     Counting -> EndingOthersFirst -> TakingAway -> SavingAbsence -> Idle
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

mod bring;
mod messages;
mod trial;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

pub use messages::{
    Action, AgentFacts, ApplyResult, DeadManTimers, Event, LogLevel, PathTest, RulesetChange, SavedState,
};

use crate::apply::Backend;
use crate::confirm::{self, Commit, draining_program, restrict_to};
use crate::facts::Session;
use crate::foreign::InboundJudge;
use crate::host::{Host, HostMemory};
use crate::program::{Direction, Directions, Program, Stage};
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

/// The lifecycle of the process: waits for the agent, runs, or stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifecycle {
    /// The state on the disk could not be read. The kernel's rules stay unchanged until the agent reports its
    /// spec, or until this deadline.
    AwaitsAgent { until: Instant },
    /// The process keeps the rules as the wanted spec says.
    Keeps,
    /// The process removes the rules, and ends once they are gone.
    Stops { since: Instant },
}

/// What the machine knows of vmesh's rules in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
enum KernelRules {
    /// The rules were not read yet, or a failed change left an unknown part of itself in the kernel.
    Unknown,
    /// The kernel was verified to have no rule of vmesh.
    Absent,
    /// The kernel was verified to have no rule of vmesh, but another program changed rules since. A saved
    /// ruleset that was loaded again may contain rules of vmesh.
    AbsentBefore,
    /// The kernel has the rules of this program.
    Has(Program),
}

/// The capture state that `vmeshctl capture` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CaptureState {
    /// Nothing is captured, and no rule is left.
    Off,
    /// Nothing is captured any more. Connections drain, or the rules could not be removed yet.
    Leaving,
    /// A new spec is in force on trial.
    Trial,
    /// A confirmed spec is in force.
    Confirmed,
    /// The operator's bypass is set: nothing is captured.
    Bypassed,
}

/// Changes of vmesh's rules by other programs, which the machine has repaired.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Drift {
    pub count: u64,
    pub at: Option<Instant>,
    pub what: Vec<String>,
    pub by: Option<String>,
}

/// How much of its cached knowledge the machine reads again before it changes rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Refresh {
    /// Nothing is read again, because only endpoints differ.
    Endpoints,
    /// The rules are read again, both vmesh's and foreign ones.
    Rules,
    /// The host's facts are read again, and the rules.
    Host,
}

/// One pass that leads from the facts of the host to its rules.
#[derive(Debug, Clone, PartialEq)]
struct Attempt {
    host: Host,
    spec: Spec,
    stage: Stage,
    is_retry: bool,
}

/// The rules that an attempt is to install.
#[derive(Debug, Clone, PartialEq)]
struct TargetRules {
    attempt: Attempt,
    /// The spec without the ports that conflict with the host's own filter.
    spec: Spec,
    program: Program,
}

/// The step that follows once the footprint is on the disk.
#[derive(Debug, PartialEq)]
enum AfterFootprint {
    Capture(Box<TargetRules>),
    Drain { attempt: Box<Attempt>, program: Program, open: usize },
}

impl AfterFootprint {
    fn attempt(self) -> Attempt {
        match self {
            AfterFootprint::Capture(goal) => goal.attempt,
            AfterFootprint::Drain { attempt, .. } => *attempt,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SessionsFor {
    Trial,
    Confirmation,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SaveFor {
    /// Saves a new trial. The trial is given up if this fails.
    Trial,
    /// Saves any other state. An error is logged with this prefix.
    Warn(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PathCheck {
    Confirmation,
    Watch { with_rules: bool, outbound_is_well: bool },
}

/// The action whose result the machine awaits, with the data that the next step needs.
#[derive(Debug, PartialEq)]
enum Phase {
    Idle,
    ReadingHost,
    ReadingHostAgain,
    ReadingSessions(SessionsFor),
    Saving(SaveFor),
    CheckingListeners,
    TryingPath(PathCheck),
    ReadingFilterForPath(PathCheck),
    Detecting(Box<Attempt>),
    ReadingFilter(Box<Attempt>),
    TakingFootprint(AfterFootprint),
    SavingFootprint(AfterFootprint),
    CheckingEnvoy(Box<TargetRules>),
    Applying { goal: Box<TargetRules>, before: KernelRules, well: Directions },
    CleaningOtherBackends(Box<Attempt>),
    CountingConnections(Box<Attempt>),
    CleaningOtherBackendsFirst { attempt: Box<Attempt>, program: Program, open: usize },
    Draining { attempt: Box<Attempt>, program: Program, open: usize },
    RemovingRules(Box<Attempt>),
    SavingRemoval,
}

/// One step of the response to an event. The machine runs queued tasks in order, one whenever it is idle.
#[derive(Debug)]
enum Task {
    ReadHost,
    Reconcile(Refresh),
    ReadSessions(SessionsFor),
    Save(SaveFor),
    SaveIfDue,
    CheckListeners,
    CheckPath(PathCheck),
    /// Replies to a want. A trial that could not be applied is rolled back.
    AnswerWant,
    Reply(Result<(), String>),
    ExitIfRemoved,
    Exit,
}

/// The change that is on trial.
#[derive(Debug, Default)]
struct Trial {
    number: u64,
    /// The SSH sessions that were open when the trial began.
    sessions: Vec<Session>,
    /// The reason why the last confirmation was refused.
    doubt: Option<String>,
}

/// Work that is left to a later tick.
#[derive(Debug, Default)]
struct PendingWork {
    ticks: u64,
    refresh: Option<Refresh>,
    save_at: Option<Instant>,
    path_with_rules: bool,
    /// The time when the last attempt began.
    last_attempt: Option<Instant>,
}

#[derive(Debug, Default)]
struct MachineReport {
    notes: Vec<String>,
    path_fault: Option<String>,
    error: Option<String>,
    drift: Drift,
    changed_by: Option<(Instant, Option<String>)>,
}

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
                "what was on trial when vmesh-net ended is taken back".to_owned(),
            ));
            // The trial may be the reason why the process ended.
            failed_trial = Some((spec, "vmesh-net ended while it was on trial".to_owned()));
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
        match (std::mem::replace(&mut self.phase, Phase::Idle), event) {
            (Phase::ReadingHost, Event::HostRead(host)) => self.remember_host(*host, now),
            (Phase::ReadingHostAgain, Event::HostRead(host)) => {
                self.remember_host((*host).clone(), now);
                self.start_attempt(*host, true, now);
            }
            (Phase::ReadingSessions(purpose), Event::SessionsRead(sessions)) => {
                self.handle_sessions(purpose, sessions);
            }
            (Phase::Saving(purpose), Event::Saved(result)) => self.handle_saved(purpose, result),
            (Phase::CheckingListeners, Event::ListenersChecked(result)) => {
                self.refuse_confirmation_on_error(result);
            }
            (Phase::TryingPath(purpose), Event::PathTried(result)) => {
                self.handle_path_result(purpose, result)
            }
            (Phase::ReadingFilterForPath(purpose), Event::FilterRead(rules)) => {
                self.filter.set_rules(rules);
                let result = self.check_tracking();
                self.finish_path_check(purpose, result);
            }
            (Phase::Detecting(attempt), Event::Detected(result)) => match result {
                Ok(backend) => {
                    self.backend = Some(backend);
                    self.continue_attempt(*attempt, now);
                }
                Err(why) => self.fail_attempt(*attempt, why),
            },
            (Phase::ReadingFilter(attempt), Event::FilterRead(rules)) => {
                self.filter.set_rules(rules);
                self.compile(*attempt, now);
            }
            (Phase::TakingFootprint(next), Event::FootprintTaken(result)) => match result {
                Ok(Some(footprint)) => {
                    self.commit.set_footprint(Some(footprint));
                    self.save(Phase::SavingFootprint(next));
                }
                Ok(None) => self.continue_with_footprint(next),
                Err(why) => self.fail_attempt(next.attempt(), why),
            },
            (Phase::SavingFootprint(next), Event::Saved(result)) => match result {
                Ok(()) => self.continue_with_footprint(next),
                Err(why) => {
                    // The next attempt must save the footprint again, before any rule is added.
                    self.commit.set_footprint(None);
                    self.fail_attempt(next.attempt(), why);
                }
            },
            (Phase::CheckingEnvoy(goal), Event::EnvoyChecked(well)) => {
                // A change that fails may leave any part of itself in the kernel.
                let before = std::mem::replace(&mut self.kernel, KernelRules::Unknown);
                let (program, timeout) = (goal.program.clone(), goal.spec.dead_man.timeout);
                self.await_result(
                    Action::Apply { program, timeout, well },
                    Phase::Applying { goal, before, well },
                );
            }
            (Phase::Applying { goal, before, well }, Event::Applied(applied)) => {
                self.finish_apply(*goal, before, well, applied, now);
            }
            (Phase::CleaningOtherBackends(attempt), Event::OtherBackendsCleaned(result)) => match result {
                Ok(()) => self.report.error = None,
                Err(why) => self.fail_attempt(*attempt, why),
            },
            (Phase::CountingConnections(attempt), Event::ConnectionsCounted(open)) => {
                let since = *self.leaving_since.get_or_insert(now);
                let ipv6 = self.backend.is_some_and(|(_, ipv6)| ipv6);
                let program = draining_program(open, since, now, self.drain, ipv6);
                let footprint = self.commit.state().footprint.clone();
                let action = Action::CleanOtherBackends { program: program.clone(), footprint };
                self.await_result(action, Phase::CleaningOtherBackendsFirst { attempt, program, open });
            }
            (
                Phase::CleaningOtherBackendsFirst { attempt, program, open },
                Event::OtherBackendsCleaned(result),
            ) => match result {
                Ok(()) => self.drain_or_remove(attempt, program, open),
                Err(why) => self.fail_attempt(*attempt, why),
            },
            (Phase::Draining { attempt, program, open }, Event::Applied(applied)) => match applied.outcome {
                Ok(_) => {
                    if applied.changes.is_some() {
                        let text = format!(
                            "nothing new is captured; {open} connections through redirects are left to end"
                        );
                        self.log(LogLevel::Info, text);
                    }
                    self.kernel = KernelRules::Has(program);
                    self.clear_report();
                }
                Err(why) => self.fail_attempt(*attempt, why),
            },
            (Phase::RemovingRules(attempt), Event::RulesRemoved(result)) => match result {
                Ok(changed) => {
                    if changed {
                        self.log(LogLevel::Info, "the host's rules are as they were before vmesh");
                    }
                    self.kernel = KernelRules::Absent;
                    self.leaving_since = None;
                    self.commit.set_footprint(None);
                    self.clear_report();
                    self.save(Phase::SavingRemoval);
                }
                Err(why) => self.fail_attempt(*attempt, why),
            },
            (Phase::SavingRemoval, Event::Saved(result)) => {
                if let Err(why) = result {
                    self.log(LogLevel::Warn, why);
                }
            }
            (Phase::Idle, event) => self.handle_outside_event(event, now),
            (phase, event) => {
                self.phase = phase;
                self.log(LogLevel::Error, format!("an event out of turn is left out: {event:?}"));
            }
        }
        while self.phase == Phase::Idle
            && let Some(task) = self.tasks.pop_front()
        {
            self.run_task(task, now);
        }
        std::mem::take(&mut self.actions)
    }

    fn handle_outside_event(&mut self, event: Event, now: Instant) {
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
                    None => self.reply(Err("nothing of that number is on trial".to_owned())),
                }
            }
            Event::Retry => {
                // Until the agent connects again, the machine treats this spec as what the agent wants.
                if let Some((spec, _)) = self.failed_trial.take() {
                    self.agent_spec.get_or_insert(spec);
                }
                let save = Task::Save(SaveFor::Warn("after a restart it would not be tried again: "));
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
                self.log(LogLevel::Error, format!("a result that nobody waits for is left out: {result:?}"))
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
            let doubt = self.trial.doubt.take().unwrap_or_else(|| "nobody confirmed it in time".to_owned());
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

    fn run_task(&mut self, task: Task, now: Instant) {
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
                    let before =
                        "after a restart what was known before would be in force, until the agent speaks: ";
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
                let text = format!("a change of capture is on trial (number {})", self.trial.number);
                self.log(LogLevel::Info, text);
            }
            (SaveFor::Trial, Err(why)) => {
                // The disk has no record of this trial, so a process that died in it could not roll it back.
                self.commit.revert();
                self.tasks.clear();
                let refusal = Err(format!("the change is not tried: {why}"));
                // The kernel may have the rules of an earlier trial that this one was to replace.
                self.tasks.extend([Task::Reconcile(Refresh::Rules), Task::Reply(refusal)]);
            }
            (SaveFor::Warn(before), Err(why)) => self.log(LogLevel::Warn, format!("{before}{why}")),
            (SaveFor::Warn(_), Ok(())) => {}
        }
    }

    /// Gives up a trial because the process ends. The spec is not recorded as failed.
    fn abandon_trial(&mut self) {
        self.commit.revert();
        let save = SaveFor::Warn("after the next start an older state would be in force: ");
        self.tasks.push_back(Task::Save(save));
    }

    fn exit_if_removed(&mut self, now: Instant) {
        let Lifecycle::Stops { since } = self.life else { return };
        if self.kernel == KernelRules::Absent {
            self.log(LogLevel::Info, "the host's rules are as they were");
            self.actions.push(Action::Exit);
        } else if let Some(error) = &self.report.error
            && now.saturating_duration_since(since) > 2 * self.drain
        {
            let text =
                format!("the rules of vmesh could not be taken away: run /usr/lib/vmesh/bypass ({error})");
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
                if bypassed { "bypassed: nothing is captured" } else { "the bypass is lifted" },
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

    fn forget_rules(&mut self) {
        self.filter.forget();
        self.actions.push(Action::ForgetRules);
        // While rules are wanted, the machine remembers the last program: a difference from it is drift.
        if self.kernel == KernelRules::Absent {
            self.kernel = KernelRules::AbsentBefore;
        } else if matches!(self.kernel, KernelRules::Has(_)) && self.wanted().0.is_off() {
            self.kernel = KernelRules::Unknown;
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
