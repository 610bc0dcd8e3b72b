//! The states of the machine, and the data that they carry.

use std::time::Instant;

use crate::facts::Session;
use crate::host::Host;
use crate::program::{Directions, Program, Stage};
use crate::spec::Spec;

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
pub(super) enum KernelRules {
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
    pub changes: Vec<String>,
    pub by: Option<String>,
}

/// How much of its cached knowledge the machine reads again before it changes rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Refresh {
    /// Nothing is read again, because only endpoints differ.
    Endpoints,
    /// The rules are read again, both vmesh's and foreign ones.
    Rules,
    /// The host's facts are read again, and the rules.
    Host,
}

/// One pass that leads from the facts of the host to its rules.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Attempt {
    pub(super) host: Host,
    pub(super) spec: Spec,
    pub(super) stage: Stage,
    pub(super) is_retry: bool,
}

/// The rules that an attempt is to install.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TargetRules {
    pub(super) attempt: Attempt,
    /// The spec without the ports that conflict with the host's own filter.
    pub(super) spec: Spec,
    pub(super) program: Program,
}

/// The step that follows once the footprint is on the disk.
#[derive(Debug, PartialEq)]
pub(super) enum AfterFootprint {
    Capture(Box<TargetRules>),
    Drain { attempt: Box<Attempt>, program: Program, open: usize },
}

impl AfterFootprint {
    pub(super) fn attempt(self) -> Attempt {
        match self {
            AfterFootprint::Capture(goal) => goal.attempt,
            AfterFootprint::Drain { attempt, .. } => *attempt,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SessionsFor {
    Trial,
    Confirmation,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SaveFor {
    /// Saves a new trial. The trial is given up if this fails.
    Trial,
    /// Saves any other state. An error is logged with this prefix.
    Warn(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PathCheck {
    Confirmation,
    Watch { with_rules: bool, outbound_is_well: bool },
}

/// The action whose result the machine awaits, with the data that the next step needs.
#[derive(Debug, PartialEq)]
pub(super) enum Phase {
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
pub(super) enum Task {
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
pub(super) struct Trial {
    pub(super) number: u64,
    /// The SSH sessions that were open when the trial began.
    pub(super) sessions: Vec<Session>,
    /// The reason why the last confirmation was refused.
    pub(super) doubt: Option<String>,
}

/// Work that is left to a later tick.
#[derive(Debug, Default)]
pub(super) struct PendingWork {
    pub(super) ticks: u64,
    pub(super) refresh: Option<Refresh>,
    pub(super) save_at: Option<Instant>,
    pub(super) path_with_rules: bool,
    /// The start of the last attempt.
    pub(super) last_attempt: Option<Instant>,
}

#[derive(Debug, Default)]
pub(super) struct MachineReport {
    pub(super) notes: Vec<String>,
    pub(super) path_fault: Option<String>,
    pub(super) error: Option<String>,
    pub(super) drift: Drift,
    pub(super) changed_by: Option<(Instant, Option<String>)>,
}
