//! Compiles a spec and the facts of a host into a [`Program`]: the chains of rules that the kernel is to
//! have, in terms that nftables and iptables share. Both backends translate the same program, so they capture
//! the same traffic.

mod builder;
mod callers;
mod directions;
mod inbound;
mod outbound;
mod ranges;
mod rules;

use std::fmt;
use std::net::SocketAddr;

use builder::ProgramBuilder;
pub use directions::{Direction, Directions};
pub(crate) use ranges::{common_ports, is_family, merged_ports, outermost, ports_without};
pub(crate) use rules::{Chain, Hook, Match, Rule, Verdict};
use rules::{chain_at, hold};

use crate::host::Host;
use crate::spec::{DeadMan, OUTBOUND_PORT, OutboundCapture, Seconds, Spec};

/// Chains of rules. The kernel sends packets to the chains with a hook. The first rule that matches a packet
/// decides.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Program {
    pub(crate) chains: Vec<Chain>,
    /// The timeout of the dead-man timers, and the directions that have one.
    pub(crate) alive: Option<(Seconds, Directions)>,
    pub(crate) ipv6: bool,
}

/// The stage of a program: on trial, or confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Every redirect lapses with the dead-man timer, even one that is to fail closed. So a program whose
    /// author dies during the trial has no lasting effect.
    Trial,
    /// Redirects lapse as the spec says.
    Confirmed,
}

/// An ineffective part of a spec, or one with another effect than intended on this host. The rest of the spec
/// is in force.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Note {
    /// The field of the spec: `outbound.exclude.users`.
    pub subject: &'static str,
    pub message: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.message)
    }
}

/// The reason why nothing is captured outbound: traffic would be captured that must not be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnsafeCapture {
    #[error(
        "outbound connections are not captured: vmesh cannot tell Envoy's own connections from others, and would send them \
         back to Envoy; run Envoy as a user of its own, or in a slice of its own"
    )]
    NoLoopGuard,
    #[error(
        "outbound connections are not captured: the name service of the host does not answer for `{account}` in {subject}; \
         check that `getent {database} {account}` answers, or write the number in place of the name"
    )]
    Unanswered { subject: &'static str, database: &'static str, account: String },
}

const INCLUDE: &str = "outbound.include";

/// The chains that count redirected connections from outside, before and after the host's own filter: see
/// [`crate::arrivals`].
pub(crate) const ARRIVING: &str = "arriving";
pub(crate) const ARRIVED: &str = "arrived";

impl Program {
    /// Returns the program without any rule, which is the host as it was before vmesh.
    pub fn absent() -> Program {
        Program::default()
    }

    /// Returns the program that captures nothing and keeps redirected connections alive. Apply it before
    /// [`Program::absent`], which resets them.
    pub fn drained(ipv6: bool) -> Program {
        Program { chains: vec![chain_at("outbound", Hook::Outbound), hold()], alive: None, ipv6 }
    }

    /// Reports whether this program may stay on a host that leaves the mesh: it has no rules, or only those
    /// that let connections drain.
    pub fn is_absent_or_drained(&self) -> bool {
        self.is_absent() || *self == Program::drained(self.ipv6)
    }

    /// Returns a program with every kind of rule, which captures no real traffic. It tests whether a kernel
    /// supports them.
    pub(crate) fn sample(ipv6: bool) -> Program {
        let mut outbound = chain_at("outbound", Hook::Outbound);
        let nowhere = [SocketAddr::from(([0, 0, 0, 0], 1)), SocketAddr::from(([0_u16; 8], 1))];
        outbound.rule(
            "vips",
            [Match::Pairs(nowhere.into()), Match::Alive(Direction::Outbound)],
            Verdict::Redirect(OUTBOUND_PORT),
        );
        Program {
            chains: vec![outbound, hold()],
            alive: Some((DeadMan::default().timeout, Directions::only(Direction::Outbound))),
            ipv6,
        }
    }

    pub fn is_absent(&self) -> bool {
        self.chains.is_empty()
    }

    /// Reports whether the program has a dead-man timer to renew.
    pub fn has_dead_man(&self) -> bool {
        self.alive.is_some()
    }

    /// Returns the directions that have a dead-man timer to renew.
    pub fn dead_man_timers(&self) -> Directions {
        self.alive.map_or(Directions::NONE, |(_, directions)| directions)
    }

    /// Compiles `spec` for `host`. Returns the program, and notes on the parts of the spec that have no
    /// effect.
    ///
    /// # Errors
    /// If outbound connections are to be captured, and the traffic that must never be captured cannot be told
    /// from the rest.
    pub fn new(spec: &Spec, host: &Host, stage: Stage) -> Result<(Program, Vec<Note>), UnsafeCapture> {
        let captures = spec.outbound.capture != OutboundCapture::Off;
        if captures && host.never.users.is_empty() && host.never.slices.is_empty() {
            return Err(UnsafeCapture::NoLoopGuard);
        }
        let mut build =
            ProgramBuilder { spec, host, stage, notes: Vec::new(), chains: Vec::new(), refused: None };
        if captures {
            build.outbound();
        }
        build.inbound();
        let ProgramBuilder { mut chains, mut notes, refused, .. } = build;
        if let Some(refused) = refused {
            return Err(refused);
        }
        if chains.iter().any(|chain| matches!(chain.hook, Some(Hook::Outbound | Hook::Inbound))) {
            chains.push(hold());
        }
        let conditions = chains.iter().flat_map(|chain| &chain.rules).flat_map(|rule| &rule.when);
        let alive: Directions = conditions
            .filter_map(|condition| match condition {
                Match::Alive(direction) => Some(*direction),
                _ => None,
            })
            .collect();
        notes.sort();
        let alive = (!alive.is_empty()).then_some((spec.dead_man.timeout, alive));
        Ok((Program { chains, alive, ipv6: host.ipv6 }, notes))
    }
}
