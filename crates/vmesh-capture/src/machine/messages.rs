//! Events, actions, and the state that the process leaves on the disk.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::apply::Backend;
use crate::confirm;
use crate::facts::Session;
use crate::foreign::Ruleset;
use crate::host::{Host, Memory};
use crate::iptables::Footprint;
use crate::program::{Directions, Program};
use crate::spec::{Ports, Seconds, Spec};

/// The state that outlives the process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SavedState {
    pub commit: confirm::State,
    pub known: AgentFacts,
    /// The spec that the last failed trial tried, and why it failed.
    pub refused: Option<(Spec, String)>,
    pub memory: Memory,
}

/// The facts that the agent tells of itself and of Envoy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentFacts {
    pub ports: BTreeSet<u16>,
    pub control_planes: BTreeSet<SocketAddr>,
}

/// The severity of [`Action::Tell`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Info,
    Warn,
    Error,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The process has begun.
    Started,
    /// A [`TICK`] has passed. `bypassed`: the flag of the bypass is there. `outbound_is_well`: Envoy's outbound listener serves.
    Tick {
        bypassed: bool,
        outbound_is_well: bool,
    },
    /// The agent asks for `spec`. Answered by [`Action::Reply`].
    Want {
        spec: Box<Spec>,
        known: AgentFacts,
        patience: Duration,
    },
    /// Somebody says that the trial of this number works. Answered by [`Action::Reply`].
    Confirm {
        trial: u64,
    },
    /// Somebody says that the trial of this number does not work. Answered by [`Action::Reply`].
    Revert {
        trial: u64,
        why: String,
    },
    /// An operator allows the last failed trial to be tried again. Answered by [`Action::Reply`].
    Retry,
    /// Somebody else changed rules: the named program, where the kernel says which.
    RulesChanged {
        by: Option<String>,
        bypassed: bool,
    },
    /// Units have started in a control group that is watched.
    UnitsStarted,
    /// The dead-man could not be refreshed.
    RefreshFailed(String),
    /// The process is to end, and to leave the host as it was.
    Stop,
    /// The process is to end, and to leave the rules to the one that comes next.
    Handover,

    HostRead(Box<Host>),
    /// The result has the backend; `true` if the host has IPv6.
    Detected(Result<(Backend, bool), String>),
    FilterRead(Ruleset),
    FootprintTaken(Result<Option<Footprint>, String>),
    Saved(Result<(), String>),
    SessionsRead(Vec<Session>),
    /// The directions whose redirects may hold at once.
    EnvoySeen(Directions),
    ListenersChecked(Result<(), String>),
    PathTried(Result<(), String>),
    ConnectionsCounted(usize),
    Applied(Applied),
    OthersEnded(Result<(), String>),
    /// The result is `true` if there were rules to take away.
    TakenAway(Result<bool, String>),
}

/// The result of [`Action::Apply`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// What differed before. `None` where nothing was attempted, since nothing differed or the rules could not be read.
    pub changes: Option<Vec<String>>,
    pub outcome: Result<Change, String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing, or only elements of sets.
    Elements,
    /// All rules: dead-men begin anew.
    Replaced,
    /// Nothing: the flag of the bypass is there. See [`Action::Apply`].
    Bypassed,
}

/// The rules that are in the kernel, as far as dead-men go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeadMen {
    pub timeout: Seconds,
    pub directions: Directions,
    /// Counts how often the rules were replaced whole.
    pub replaced: u64,
    /// The dead-men that were refreshed with the change.
    pub refreshed: Directions,
}

/// The connections that show whether captured ones arrive at Envoy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PathTest {
    /// Addresses to dial from end to end, captured as those of services are.
    pub dial: Vec<SocketAddr>,
    /// The inbound ports that are redirected. What strangers open to them is counted on its way: see [`crate::arrivals`].
    pub inbound: BTreeSet<Ports>,
    /// Whether rules changed since the last test, so that what was lost before says nothing.
    pub is_afresh: bool,
}

impl PathTest {
    pub fn is_empty(&self) -> bool {
        self.dial.is_empty() && self.inbound.is_empty()
    }
}

#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// -> [`Event::HostRead`]
    ReadHost {
        spec: Box<Spec>,
        known: AgentFacts,
        memory: Memory,
    },
    /// -> [`Event::Detected`]
    Detect {
        ipv6: bool,
    },
    /// Read the rules of others. -> [`Event::FilterRead`]
    ReadFilter,
    /// -> [`Event::FootprintTaken`]
    TakeFootprint,
    /// Write to the disk. -> [`Event::Saved`]
    Save(Box<SavedState>),
    /// List the sessions at these ports of SSH. -> [`Event::SessionsRead`]
    ReadSessions(BTreeSet<u16>),
    /// Look which of these listeners of Envoy's, and the agent, are well. -> [`Event::EnvoySeen`]
    LookAtEnvoy(Directions),
    /// Look at these listeners of Envoy's for a confirmation, and name the one that does not serve. -> [`Event::ListenersChecked`]
    CheckListeners(Directions),
    /// Look whether captured connections arrive at Envoy. -> [`Event::PathTried`]
    TryPath(PathTest),
    /// Count the open connections through redirects. -> [`Event::ConnectionsCounted`]
    CountConnections,
    /// Make our rules be as `program` says, by this backend. -> [`Event::Applied`]
    ///
    /// A program that captures is not applied where the rules differ from it and the flag of the bypass is there. The script sets its flag
    /// before it changes any rule, so the flag is to be looked for after the rules were read.
    Apply {
        program: Program,
        timeout: Seconds,
        well: Directions,
    },
    /// Make the rules that other backends have of vmesh be as `program` says. -> [`Event::OthersEnded`]
    EndOthers {
        program: Program,
        footprint: Option<Footprint>,
    },
    /// Leave the host as it was. -> [`Event::TakenAway`]
    TakeAway {
        footprint: Option<Footprint>,
    },
    /// Read our rules again before the next change: somebody may have changed them.
    ForgetRules,
    /// Look at these listeners of Envoy's all the time.
    Watch(Directions),
    /// Hold off these dead-men, or none.
    Order(Option<DeadMen>),
    Tell(Level, String),
    Reply(Result<(), String>),
    /// The work is done: end the process.
    Exit,
}

impl Action {
    /// Reports whether the machine waits for the result of this action.
    pub fn awaits_result(&self) -> bool {
        !matches!(
            self,
            Action::ForgetRules
                | Action::Watch(_)
                | Action::Order(_)
                | Action::Tell(..)
                | Action::Reply(_)
                | Action::Exit
        )
    }
}
