//! Chains and rules, in terms that nftables and iptables share.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::directions::Direction;
use crate::host::Cgroup;
use crate::spec::{Cidr, Percent, Ports};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) name: String,
    pub(crate) hook: Option<Hook>,
    pub(crate) rules: Vec<Rule>,
}

impl Chain {
    pub(super) fn rule(&mut self, name: impl Into<String>, when: impl Into<Vec<Match>>, then: Verdict) {
        self.rules.push(Rule { name: name.into(), when: when.into(), then });
    }

    /// Adds a rule for these ports, if there are any.
    pub(super) fn ports(&mut self, name: &str, ports: BTreeSet<Ports>, then: Verdict) {
        if !ports.is_empty() {
            self.rule(name, [Match::Ports(ports)], then);
        }
    }
}

pub(super) fn chain_at(name: &str, hook: Hook) -> Chain {
    Chain { name: name.to_owned(), hook: Some(hook), rules: Vec::new() }
}

pub(super) fn hold() -> Chain {
    let rule = Rule { name: "hold".to_owned(), when: vec![Match::Untracked], then: Verdict::Nothing };
    Chain { rules: vec![rule], ..chain_at("hold", Hook::Hold) }
}

/// The point in the kernel at which packets enter a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Hook {
    /// Packets that the host sends, where destinations can be rewritten. Pure SYNs only, so open connections
    /// are not touched.
    Outbound,
    /// Packets that the host receives, where destinations can be rewritten. Pure SYNs only.
    Inbound,
    /// Packets that the host receives, before the kernel looks up their socket.
    Tproxy,
    /// Packets that the host accepts for itself. Pure SYNs only.
    Strict,
    /// Packets that the host accepts for itself, before its own filter. Pure SYNs only.
    Arriving,
    /// Packets that the host accepts for itself, after its own filter. Pure SYNs only.
    Arrived,
    /// All packets; the chain has no effect on them. It keeps connection tracking in use: when its last user
    /// is removed, the kernel resets redirected connections.
    Hold,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) name: String,
    pub(crate) when: Vec<Match>,
    pub(crate) then: Verdict,
}

impl Rule {
    /// Returns the ids of the control groups in the sets of this rule, for a backend without sets.
    /// [`Rule::identity`] does not include them.
    pub(crate) fn identity_of_sets(&self) -> String {
        let ids = self.when.iter().filter_map(|condition| match condition {
            Match::AnyCgroup(groups) => {
                Some(groups.iter().map(|group| format!(" {}", group.id)).collect::<String>())
            }
            _ => None,
        });
        ids.collect()
    }

    /// Returns the ids that the kernel matches by and that the text of the rule does not show.
    pub(crate) fn identity(&self) -> String {
        let ids = self.when.iter().filter_map(|condition| match condition {
            Match::Cgroup(group) => Some(format!(" {}", group.id)),
            _ => None,
        });
        ids.collect()
    }
}

/// A condition of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Match {
    Syn,
    /// The packet leaves over the loopback interface.
    OutLoopback,
    /// The packet arrives over the loopback interface.
    InLoopback,
    /// The destination is an address of this host.
    ToThisHost,
    Users(BTreeSet<u32>),
    Groups(BTreeSet<u32>),
    /// The sending process is in this control group or one below it.
    Cgroup(Cgroup),
    /// The sending process is in one of these control groups, all of the same level.
    AnyCgroup(BTreeSet<Cgroup>),
    OutInterfaces(BTreeSet<String>),
    InInterfaces(BTreeSet<String>),
    Destinations(BTreeSet<Cidr>),
    Sources(BTreeSet<Cidr>),
    Ports(BTreeSet<Ports>),
    /// The destination address and port.
    Pairs(BTreeSet<SocketAddr>),
    /// A random choice for each connection. [`Match::Alive`] is the only condition that may follow in a rule.
    Percent(Percent),
    /// The dead-man timer of this direction was renewed in time.
    Alive(Direction),
    /// The connection is not tracked.
    Untracked,
    /// The first packet of a connection that a rule redirected to this port.
    Redirected(u16),
}

/// The action of a rule on the packets that match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Return,
    Goto(String),
    Redirect(u16),
    Tproxy(u16),
    /// The packet is dropped without an answer.
    Drop,
    /// The client gets a TCP reset.
    Reset,
    /// The rule has no effect.
    Nothing,
    /// The packet is counted, and continues.
    Count,
}
