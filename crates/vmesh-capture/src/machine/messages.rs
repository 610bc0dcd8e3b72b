//! The events and actions of the state machine, and the state that the process saves to the disk.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::apply::Backend;
use crate::confirm;
use crate::facts::Session;
use crate::foreign::Ruleset;
use crate::host::{Host, HostMemory};
use crate::iptables::Footprint;
use crate::program::{Directions, Program};
use crate::spec::{Ports, Seconds, Spec};

/// The state that outlives the process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedState {
    pub commit: confirm::CommitRecord,
    #[serde(rename = "known")]
    pub agent_facts: AgentFacts,
    /// The spec that the last failed trial tried, and the reason of the failure.
    #[serde(rename = "refused")]
    pub failed_trial: Option<(Spec, String)>,
    pub memory: HostMemory,
}

/// The facts that the agent reports of itself and of Envoy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentFacts {
    pub ports: BTreeSet<u16>,
    pub control_planes: BTreeSet<SocketAddr>,
}

/// The severity of [`Action::Log`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    Info,
    Warn,
    Error,
}

/// An input of the state machine. The variants from `HostRead` on are results of actions; all others come
/// from outside.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The process has started.
    Started,
    /// A [`TICK`](super::TICK) has passed. `bypassed`: the flag of the bypass is set. `outbound_is_well`:
    /// Envoy's outbound listener accepts connections.
    Tick {
        bypassed: bool,
        outbound_is_well: bool,
    },
    /// The agent asks for `spec`. The machine answers with [`Action::Reply`].
    Want {
        spec: Box<Spec>,
        agent_facts: AgentFacts,
        patience: Duration,
    },
    /// A client confirms that the trial of this number works. The machine answers with [`Action::Reply`].
    Confirm {
        trial: u64,
    },
    /// A client reports that the trial of this number does not work. The machine answers with
    /// [`Action::Reply`].
    Revert {
        trial: u64,
        why: String,
    },
    /// An operator allows the last failed trial to be tried again. The machine answers with
    /// [`Action::Reply`].
    Retry,
    /// Another program changed rules. `by` names it if the kernel reports which one.
    RulesChanged {
        by: Option<String>,
        bypassed: bool,
    },
    /// A unit has started in one of the watched control groups.
    UnitsStarted,
    /// The heartbeat could not renew the dead-man timer.
    RefreshFailed(String),
    /// The process is to end and to remove all rules.
    Stop,
    /// The process is to end and to leave the rules to its successor.
    Handover,

    HostRead(Box<Host>),
    /// The detected backend; `true` if the host has IPv6.
    Detected(Result<(Backend, bool), String>),
    FilterRead(Ruleset),
    FootprintTaken(Result<Option<Footprint>, String>),
    Saved(Result<(), String>),
    SessionsRead(Vec<Session>),
    /// The directions whose redirects may hold at once.
    EnvoyChecked(Directions),
    ListenersChecked(Result<(), String>),
    PathTried(Result<(), String>),
    ConnectionsCounted(usize),
    Applied(ApplyResult),
    OtherBackendsCleaned(Result<(), String>),
    /// `true` if there were rules to remove.
    RulesRemoved(Result<bool, String>),
}

/// The result of [`Action::Apply`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApplyResult {
    /// The differences that were found before the change. `None` if nothing was attempted, because nothing
    /// differed or the rules could not be read.
    pub changes: Option<Vec<String>>,
    pub outcome: Result<RulesetChange, String>,
}

/// The change that [`Action::Apply`] made in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RulesetChange {
    /// Nothing, or only set elements.
    Elements,
    /// The whole ruleset was replaced. All dead-man timers start anew.
    Replaced,
    /// Nothing, because the flag of the bypass is set: see [`Action::Apply`].
    Bypassed,
}

/// The dead-man timers in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeadManTimers {
    pub timeout: Seconds,
    pub directions: Directions,
    /// Counts how often the whole ruleset was replaced.
    pub replaced: u64,
    /// The timers that were renewed together with the change.
    pub refreshed: Directions,
}

/// The connections that show whether captured traffic arrives at Envoy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PathTest {
    /// The addresses to dial. Connections to these addresses are captured like connections to services.
    pub dial: Vec<SocketAddr>,
    /// The redirected inbound ports. Connections of other hosts to them are counted on their way: see
    /// [`crate::arrivals`].
    pub inbound: BTreeSet<Ports>,
    /// `true` if rules changed since the last test. Losses that were counted before then mean nothing.
    pub is_afresh: bool,
}

impl PathTest {
    pub fn is_empty(&self) -> bool {
        self.dial.is_empty() && self.inbound.is_empty()
    }
}

/// An output of the state machine, to be performed by the driver. `-> Event` names the event that carries the
/// result.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Read the facts of the host. -> [`Event::HostRead`]
    ReadHost { spec: Box<Spec>, agent_facts: AgentFacts, memory: HostMemory },
    /// Find out which backend works here. -> [`Event::Detected`]
    Detect { ipv6: bool },
    /// Read the foreign rules. -> [`Event::FilterRead`]
    ReadFilter,
    /// List the chains and tables that exist before the first rule of vmesh. -> [`Event::FootprintTaken`]
    TakeFootprint,
    /// Write the state to the disk. -> [`Event::Saved`]
    Save(Box<SavedState>),
    /// List the SSH sessions at these ports. -> [`Event::SessionsRead`]
    ReadSessions(BTreeSet<u16>),
    /// Check which of these listeners of Envoy accept connections, and whether the agent is alive. ->
    /// [`Event::EnvoyChecked`]
    CheckEnvoy(Directions),
    /// Check these listeners of Envoy for a confirmation. The error names the one that accepts no connection.
    /// -> [`Event::ListenersChecked`]
    CheckListeners(Directions),
    /// Test whether captured connections arrive at Envoy. -> [`Event::PathTried`]
    TryPath(PathTest),
    /// Count the open connections through redirects. -> [`Event::ConnectionsCounted`]
    CountConnections,
    /// Make the rules of the detected backend match `program`. -> [`Event::Applied`]
    ///
    /// The driver must not apply a program that captures while the flag of the bypass is set and the rules
    /// differ from the program. The bypass script sets its flag before it changes any rule, so the driver
    /// looks for the flag after it has read the rules.
    Apply { program: Program, timeout: Seconds, well: Directions },
    /// Make the rules of vmesh that other backends may hold match `program`. -> [`Event::OtherBackendsCleaned`]
    CleanOtherBackends { program: Program, footprint: Option<Footprint> },
    /// Remove all rules of vmesh. -> [`Event::RulesRemoved`]
    RemoveRules { footprint: Option<Footprint> },
    /// Read vmesh's rules again before the next change, because another program may have changed them.
    ForgetRules,
    /// Check these listeners of Envoy continuously from now on.
    Watch(Directions),
    /// Renew these dead-man timers from now on; `None` renews none.
    SetTimers(Option<DeadManTimers>),
    /// Write a line to the log.
    Log(LogLevel, String),
    /// Answer the client whose event is being handled.
    Reply(Result<(), String>),
    /// End the process: the work is done.
    Exit,
}

impl Action {
    /// Reports whether the machine waits for the result of this action.
    pub fn awaits_result(&self) -> bool {
        !matches!(
            self,
            Action::ForgetRules
                | Action::Watch(_)
                | Action::SetTimers(_)
                | Action::Log(..)
                | Action::Reply(_)
                | Action::Exit
        )
    }
}
