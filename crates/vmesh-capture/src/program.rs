//! Compiles a spec and the facts of a host into a [`Program`]: the chains of rules that the kernel is to
//! have, in terms that nftables and iptables share. Both backends translate the same program, so they capture
//! the same traffic.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use crate::host::{AccountNumber, Cgroup, Host, ParentCgroup};
use crate::spec::{
    Account, BypassFilter, Cidr, DeadMan, INBOUND_PORT, InboundCapture, OUTBOUND_PORT, OnLoss,
    OutboundCapture, Percent, Ports, Seconds, Selection, Spec, Unit,
};

/// Chains of rules. The kernel sends packets to the chains with a hook. The first rule that matches a packet
/// decides.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Program {
    pub(crate) chains: Vec<Chain>,
    /// The timeout of the dead-man timers, and the directions that have one.
    pub(crate) alive: Option<(Seconds, Directions)>,
    pub(crate) ipv6: bool,
}

/// The direction of a connection, as seen from this host. Each direction has its own listener in Envoy and
/// its own dead-man timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    Outbound,
    Inbound,
}

impl Direction {
    pub const BOTH: [Direction; 2] = [Direction::Outbound, Direction::Inbound];
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Direction::Outbound => "outbound",
            Direction::Inbound => "inbound",
        })
    }
}

/// A set of directions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Directions {
    pub outbound: bool,
    pub inbound: bool,
}

impl Directions {
    pub const NONE: Directions = Directions { outbound: false, inbound: false };
    pub const BOTH: Directions = Directions { outbound: true, inbound: true };

    pub fn only(direction: Direction) -> Directions {
        Directions::NONE.with(direction)
    }

    #[must_use]
    pub fn with(mut self, direction: Direction) -> Directions {
        match direction {
            Direction::Outbound => self.outbound = true,
            Direction::Inbound => self.inbound = true,
        }
        self
    }

    pub fn contains(self, direction: Direction) -> bool {
        match direction {
            Direction::Outbound => self.outbound,
            Direction::Inbound => self.inbound,
        }
    }

    pub fn is_empty(self) -> bool {
        self == Directions::NONE
    }

    /// Returns the directions that both sets contain.
    #[must_use]
    pub fn and(self, other: Directions) -> Directions {
        Directions { outbound: self.outbound && other.outbound, inbound: self.inbound && other.inbound }
    }

    pub fn iter(self) -> impl Iterator<Item = Direction> {
        Direction::BOTH.into_iter().filter(move |direction| self.contains(*direction))
    }
}

impl From<bool> for Directions {
    fn from(all: bool) -> Directions {
        if all { Directions::BOTH } else { Directions::NONE }
    }
}

impl FromIterator<Direction> for Directions {
    fn from_iter<I: IntoIterator<Item = Direction>>(directions: I) -> Directions {
        directions.into_iter().fold(Directions::NONE, Directions::with)
    }
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
        "outbound connections cannot be captured: it is not known which are Envoy's own, and they would go round in circles; \
         run Envoy as a user of its own, or in a slice of its own"
    )]
    NoLoopGuard,
    #[error(
        "outbound connections cannot be captured: {subject} has `{account}`, and the host does not say which number that is; \
         does `getent {database} {account}` answer? A number in its place needs no answer"
    )]
    Unanswered { subject: &'static str, database: &'static str, account: String },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    pub(crate) name: String,
    pub(crate) hook: Option<Hook>,
    pub(crate) rules: Vec<Rule>,
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

const INCLUDE: &str = "outbound.include";
/// The port of DNS over TCP. Name resolution must not depend on names, so it is not captured.
const DNS: u16 = 53;
const SSH: u16 = 22;
/// The chains that count redirected connections from outside, before and after the host's own filter: see
/// [`crate::arrivals`].
pub(crate) const ARRIVING: &str = "arriving";
pub(crate) const ARRIVED: &str = "arrived";
/// The link-local networks, which are never routed. Clouds have their metadata service in one of them.
const LINK_LOCAL: [Cidr; 2] = [Cidr::v4(169, 254, 0, 0, 16), Cidr::v6(0xfe80, 10)];

impl Program {
    /// Returns the program without any rule, which is the host as it was before vmesh.
    pub fn absent() -> Program {
        Program::default()
    }

    /// Returns the program that captures nothing and keeps redirected connections alive. Apply it before
    /// [`Program::absent`], which resets them.
    pub fn drained(ipv6: bool) -> Program {
        Program { chains: vec![chain("outbound", Hook::Outbound), hold()], alive: None, ipv6 }
    }

    /// Reports whether this program may stay on a host that leaves the mesh: it has no rules, or only those
    /// that let connections drain.
    pub fn is_absent_or_drained(&self) -> bool {
        self.is_absent() || *self == Program::drained(self.ipv6)
    }

    /// Returns a program with every kind of rule, which captures no real traffic. It tests whether a kernel
    /// supports them.
    pub(crate) fn sample(ipv6: bool) -> Program {
        let mut outbound = chain("outbound", Hook::Outbound);
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

fn chain(name: &str, hook: Hook) -> Chain {
    Chain { name: name.to_owned(), hook: Some(hook), rules: Vec::new() }
}

fn hold() -> Chain {
    let rule = Rule { name: "hold".to_owned(), when: vec![Match::Untracked], then: Verdict::Nothing };
    Chain { rules: vec![rule], ..chain("hold", Hook::Hold) }
}

impl Chain {
    fn rule(&mut self, name: impl Into<String>, when: impl Into<Vec<Match>>, then: Verdict) {
        self.rules.push(Rule { name: name.into(), when: when.into(), then });
    }

    /// Adds a rule for these ports, if there are any.
    fn ports(&mut self, name: &str, ports: BTreeSet<Ports>, then: Verdict) {
        if !ports.is_empty() {
            self.rule(name, [Match::Ports(ports)], then);
        }
    }
}

struct ProgramBuilder<'a> {
    spec: &'a Spec,
    host: &'a Host,
    stage: Stage,
    notes: Vec<Note>,
    chains: Vec<Chain>,
    refused: Option<UnsafeCapture>,
}

/// The callers of a rule as user ids, group ids and control groups.
#[derive(Default)]
struct Callers {
    users: BTreeSet<u32>,
    groups: BTreeSet<u32>,
    cgroups: BTreeSet<Cgroup>,
}

impl Callers {
    fn rules(self, chain: &mut Chain, name: &str, then: &Verdict) {
        if !self.users.is_empty() {
            chain.rule(format!("{name}_users"), [Match::Users(self.users)], then.clone());
        }
        if !self.groups.is_empty() {
            chain.rule(format!("{name}_groups"), [Match::Groups(self.groups)], then.clone());
        }
        cgroups(self.cgroups, chain, name, then);
    }
}

/// Adds one rule for each control group, since older kernels have no sets of control groups.
fn cgroups(groups: BTreeSet<Cgroup>, chain: &mut Chain, name: &str, then: &Verdict) {
    for (number, group) in groups.into_iter().enumerate() {
        chain.rule(format!("{name}_unit_{number}"), [Match::Cgroup(group)], then.clone());
    }
}

impl ProgramBuilder<'_> {
    fn note(&mut self, subject: &'static str, message: impl Into<String>) {
        self.notes.push(Note { subject, message: message.into() });
    }

    fn alive(&self, direction: Direction, on_loss: OnLoss) -> Option<Match> {
        (on_loss == OnLoss::Open || self.stage == Stage::Trial).then_some(Match::Alive(direction))
    }

    fn ssh(&self) -> BTreeSet<u16> {
        self.host.never.ssh.iter().copied().chain([SSH]).collect()
    }

    fn own(&self) -> BTreeSet<u16> {
        self.host.never.own.iter().copied().chain([OUTBOUND_PORT, INBOUND_PORT]).collect()
    }

    /// Compiles the outbound chains. A packet passes `outbound` (callers and ports that are never captured),
    /// `captured` (virtual addresses), then `captured_known` and `included_*` (real addresses that may be
    /// captured), then `to_<percent>` (redirects).
    fn outbound(&mut self) {
        let out = &self.spec.outbound;
        let mut gate = chain("outbound", Hook::Outbound);
        let never = &self.host.never;
        if !never.users.is_empty() {
            gate.rule("envoy", [Match::Users(never.users.clone())], Verdict::Return);
        }
        cgroups(never.slices.clone(), &mut gate, "envoy", &Verdict::Return);
        let ssh = singles(&self.ssh());
        gate.ports("ssh", ssh, Verdict::Return);
        if !never.control_planes.is_empty() {
            gate.rule("control_planes", [Match::Pairs(never.control_planes.clone())], Verdict::Return);
        }
        self.callers("outbound.exclude", &out.exclude).rules(&mut gate, "exclude", &Verdict::Return);
        let captured = Verdict::Goto("captured".to_owned());
        if out.include.names_callers() {
            self.callers(INCLUDE, &out.include).rules(&mut gate, "include", &captured);
        } else {
            gate.rule("all", [], captured);
        }
        let mut chains = vec![gate];
        let ssh = self.ssh();
        for address in out.addresses.keys().filter(|address| ssh.contains(&address.port())) {
            let message =
                format!("{address} is not captured: port {} is SSH, which never is", address.port());
            self.notes.push(Note { subject: "outbound.addresses", message });
        }

        let mut captured = Chain { name: "captured".to_owned(), hook: None, rules: Vec::new() };
        let vips = self.vips();
        if !vips.is_empty() {
            // This redirect lapses during a trial only. Later it must not: a connection to a virtual address
            // that is not captured has nowhere to go.
            let mut when = vec![Match::Pairs(vips)];
            when.extend(self.alive(Direction::Outbound, OnLoss::Closed));
            captured.rule("vips", when, Verdict::Redirect(OUTBOUND_PORT));
        }
        if out.capture == OutboundCapture::Vip {
            chains.push(captured);
            self.chains.extend(chains);
            return;
        }
        let mut captured = self.exclude_unknown_cgroups(captured, &mut chains);
        captured.rule("loopback", [Match::OutLoopback], Verdict::Return);
        captured.rule("this_host", [Match::ToThisHost], Verdict::Return);
        captured.rule("link_local", [Match::Destinations(LINK_LOCAL.into())], Verdict::Return);
        captured.ports("dns", singles(&[DNS].into()), Verdict::Return);
        let (exclude, include) = (&out.exclude, &out.include);
        captured.ports("exclude_ports", exclude.ports.clone(), Verdict::Return);
        if !exclude.cidrs.is_empty() {
            captured.rule("exclude_cidrs", [Match::Destinations(exclude.cidrs.clone())], Verdict::Return);
        }
        if !exclude.interfaces.is_empty() {
            let interfaces = exclude.interfaces.iter().map(ToString::to_string).collect();
            captured.rule("exclude_interfaces", [Match::OutInterfaces(interfaces)], Verdict::Return);
        }
        // A destination must match every list that is given. So each list gets its own chain, which continues
        // to the next list.
        let interfaces = include.interfaces.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
        let lists = [
            ("ports", (!include.ports.is_empty()).then(|| Match::Ports(include.ports.clone()))),
            ("cidrs", (!include.cidrs.is_empty()).then(|| Match::Destinations(include.cidrs.clone()))),
            ("interfaces", (!interfaces.is_empty()).then_some(Match::OutInterfaces(interfaces))),
        ];
        let mut last = captured;
        for (what, list) in lists.into_iter().filter_map(|(what, list)| Some((what, list?))) {
            let next = format!("included_{what}");
            last.rule(format!("include_{what}"), [list], Verdict::Goto(next.clone()));
            chains.push(last);
            last = Chain { name: next, hook: None, rules: Vec::new() };
        }
        let caller_shares = self.caller_shares();
        let mut shares: BTreeSet<Percent> = caller_shares.keys().copied().collect();
        shares.insert(Percent::ALL);
        // The smallest share comes first, so a caller that is listed twice gets the smaller share.
        for (share, callers) in caller_shares {
            let then = if share.get() == 0 { Verdict::Return } else { Verdict::Goto(to(share)) };
            callers.rules(&mut last, &format!("dial_{}", share.get()), &then);
        }
        last.rule("dial", [], Verdict::Goto(to(Percent::ALL)));
        chains.push(last);
        for share in shares.into_iter().filter(|share| share.get() > 0) {
            chains.push(self.destinations(share));
        }
        self.chains.extend(chains);
    }

    /// Excludes processes in unknown control groups next to units that have an exclusion or a share of their
    /// own. Such a unit opens its first connection before a rule for its new control group can be made.
    /// Virtual addresses are captured before this point. Returns the chain to continue with.
    fn exclude_unknown_cgroups(&self, mut captured: Chain, chains: &mut Vec<Chain>) -> Chain {
        if self.host.parent_cgroups.is_empty() {
            return captured;
        }
        let known = Chain { name: "captured_known".to_owned(), hook: None, rules: Vec::new() };
        let mut entries = Vec::new();
        let mut has_root = false;
        for (number, ParentCgroup { cgroup, children }) in self.host.parent_cgroups.iter().enumerate() {
            let mut entry = Chain { name: format!("begun_{number}"), hook: None, rules: Vec::new() };
            if !children.is_empty() {
                entry.rule("known", [Match::AnyCgroup(children.clone())], Verdict::Goto(known.name.clone()));
            }
            let when: Vec<Match> = cgroup.iter().cloned().map(Match::Cgroup).collect();
            has_root |= when.is_empty();
            captured.rule(format!("begun_{number}"), when, Verdict::Goto(entry.name.clone()));
            entries.push(entry);
        }
        if !has_root {
            captured.rule("known", [], Verdict::Goto(known.name.clone()));
        }
        chains.push(captured);
        chains.extend(entries);
        known
    }

    /// Compiles the redirects for callers of whose connections at most `share` is captured.
    fn destinations(&self, share: Percent) -> Chain {
        let out = &self.spec.outbound;
        let mut groups: BTreeMap<(Percent, OnLoss), BTreeSet<SocketAddr>> = BTreeMap::new();
        for (address, own) in &out.addresses {
            let percent = own.percent.unwrap_or(out.percent);
            let key = (percent.min(share), own.on_loss.unwrap_or(out.on_loss));
            groups.entry(key).or_default().insert(*address);
        }
        let mut chain = Chain { name: to(share), hook: None, rules: Vec::new() };
        for ((percent, on_loss), pairs) in groups {
            let name =
                format!("{}_{}", percent.get(), if on_loss == OnLoss::Open { "open" } else { "closed" });
            self.redirect(&mut chain, &name, vec![Match::Pairs(pairs.clone())], percent, on_loss);
            if out.capture == OutboundCapture::All && percent < Percent::ALL {
                // Connections that this random choice left out must not get a second chance from the rules
                // below.
                chain.rule(format!("{name}_rest"), [Match::Pairs(pairs)], Verdict::Return);
            }
        }
        if out.capture == OutboundCapture::All {
            self.redirect(&mut chain, "everything", Vec::new(), out.percent.min(share), out.on_loss);
        }
        chain
    }

    fn redirect(
        &self,
        chain: &mut Chain,
        name: &str,
        mut when: Vec<Match>,
        percent: Percent,
        on_loss: OnLoss,
    ) {
        if percent.get() == 0 {
            return;
        }
        if percent < Percent::ALL {
            when.push(Match::Percent(percent));
        }
        when.extend(self.alive(Direction::Outbound, on_loss));
        chain.rule(name, when, Verdict::Redirect(OUTBOUND_PORT));
    }

    fn vips(&mut self) -> BTreeSet<SocketAddr> {
        let ssh = self.ssh();
        let mut vips = BTreeSet::new();
        for vip in &self.spec.outbound.vips {
            if ssh.contains(&vip.port()) {
                self.note(
                    "outbound.vips",
                    format!("{vip} is not captured: port {} is SSH, which never is", vip.port()),
                );
            } else if vip.ip().is_loopback()
                || vip.ip().is_unspecified()
                || vip.ip().is_multicast()
                || vip.port() == 0
            {
                self.note("outbound.vips", format!("{vip} is not captured: no other host could have it"));
            } else {
                vips.insert(*vip);
            }
        }
        vips
    }

    fn callers(&mut self, subject: &'static str, of: &Selection) -> Callers {
        let mut callers = Callers::default();
        for account in &of.users {
            callers.users.extend(self.user(subject, account));
        }
        for account in &of.groups {
            callers.groups.extend(self.group(subject, account));
        }
        for unit in &of.units {
            callers.cgroups.extend(self.unit(subject, unit));
        }
        callers
    }

    fn caller_shares(&mut self) -> BTreeMap<Percent, Callers> {
        let subject = "outbound.dial";
        let dial = &self.spec.outbound.dial;
        let mut caller_shares: BTreeMap<Percent, Callers> = BTreeMap::new();
        for (account, percent) in &dial.users {
            caller_shares.entry(*percent).or_default().users.extend(self.user(subject, account));
        }
        for (account, percent) in &dial.groups {
            caller_shares.entry(*percent).or_default().groups.extend(self.group(subject, account));
        }
        for (unit, percent) in &dial.units {
            caller_shares.entry(*percent).or_default().cgroups.extend(self.unit(subject, unit));
        }
        caller_shares.retain(|percent, _| *percent < Percent::ALL);
        caller_shares
    }

    fn user(&mut self, subject: &'static str, account: &Account) -> Option<u32> {
        self.number(subject, "passwd", "user", account, self.host.user(account))
    }

    fn group(&mut self, subject: &'static str, account: &Account) -> Option<u32> {
        self.number(subject, "group", "group", account, self.host.group(account))
    }

    fn number(
        &mut self,
        subject: &'static str,
        database: &'static str,
        what: &str,
        account: &Account,
        number: Option<AccountNumber>,
    ) -> Option<u32> {
        match number {
            Some(AccountNumber::Now(number)) => Some(number),
            Some(AccountNumber::Last(number)) => {
                let message = format!(
                    "the host does not know the {what} `{account}` any more, or not now: its last number, {number}, counts"
                );
                self.note(subject, message);
                Some(number)
            }
            // An unknown name in `include` captures too little, which is harmless. An unknown name in
            // `exclude` or `dial` would capture too much.
            Some(AccountNumber::Unanswered) if subject == INCLUDE => {
                self.note(
                    subject,
                    format!(
                        "`getent {database} {account}` does not answer: it selects nothing until it does"
                    ),
                );
                None
            }
            Some(AccountNumber::Unanswered) => {
                let account = account.to_string();
                self.refused.get_or_insert(UnsafeCapture::Unanswered { subject, database, account });
                None
            }
            None => {
                self.note(
                    subject,
                    format!("there is no {what} `{account}`: it selects nothing until there is"),
                );
                None
            }
        }
    }

    fn unit(&mut self, subject: &'static str, unit: &Unit) -> Option<Cgroup> {
        let found = self.host.units.get(unit).cloned();
        if found.is_none() {
            self.note(subject, format!("{unit} does not run: it selects nothing until it does"));
        }
        found
    }

    fn inbound(&mut self) {
        let inbound = &self.spec.inbound;
        let never: BTreeSet<u16> = self.ssh().into_iter().chain(self.own()).collect();
        for (subject, ports) in [("inbound.ports", &inbound.ports), ("inbound.strict", &inbound.strict)] {
            for port in never.iter().filter(|port| ports.iter().any(|ports| ports.contains(**port))) {
                let whose = if self.own().contains(port) { "Envoy's or the agent's own" } else { "SSH" };
                self.note(subject, format!("{port} is left out: it is {whose}"));
            }
        }
        if let BypassFilter::Ports(ports) = &inbound.bypass_filter {
            for ports in ports_without(ports, &inbound.ports) {
                let message = format!("{ports} changes nothing: it is not among the ports that are captured");
                self.note("inbound.bypass_filter", message);
            }
        }
        let strict = &inbound.strict;
        let captured =
            if inbound.capture == InboundCapture::Off { BTreeSet::new() } else { inbound.ports.clone() };
        // Strict ports are captured by the rule that does not lapse.
        let closed = if inbound.on_loss == OnLoss::Closed {
            captured.clone()
        } else {
            common_ports(&captured, strict)
        };
        let open = ports_without(&captured, &closed);
        let mut rules = Vec::new();
        for (name, ports, on_loss) in [("open", open, OnLoss::Open), ("closed", closed, OnLoss::Closed)] {
            if !ports.is_empty() {
                let mut when = vec![Match::ToThisHost, Match::Ports(ports)];
                when.extend(self.alive(Direction::Inbound, on_loss));
                rules.push((name, when));
            }
        }
        let refusal = |then: Verdict, build: &Self| {
            let mut when = vec![Match::ToThisHost, Match::Syn, Match::Ports(strict.clone())];
            when.extend(build.alive(Direction::Inbound, OnLoss::Closed));
            Rule { name: "strict".to_owned(), when, then }
        };
        match inbound.capture {
            _ if rules.is_empty() => {}
            InboundCapture::Off => {}
            InboundCapture::Redirect => {
                let mut chain = self.inbound_chain("inbound", Hook::Inbound);
                for (name, when) in rules {
                    chain.rule(name, when, Verdict::Redirect(INBOUND_PORT));
                }
                self.chains.push(chain);
                for (name, hook) in [(ARRIVING, Hook::Arriving), (ARRIVED, Hook::Arrived)] {
                    let mut counts = self::chain(name, hook);
                    counts.rule("new", [Match::Redirected(INBOUND_PORT)], Verdict::Count);
                    self.chains.push(counts);
                }
            }
            InboundCapture::Tproxy => {
                let mut chain = self.inbound_chain("inbound", Hook::Tproxy);
                for (name, when) in rules {
                    chain.rule(name, when, Verdict::Tproxy(INBOUND_PORT));
                }
                if !strict.is_empty() {
                    // The refusal belongs into this chain. In the `input` chain, a packet that TPROXY sent to
                    // Envoy would look the same.
                    chain.rules.push(refusal(Verdict::Drop, self));
                }
                self.chains.push(chain);
                return;
            }
        }
        if !strict.is_empty() {
            let mut chain = self.inbound_chain("strict", Hook::Strict);
            chain.rules.push(refusal(Verdict::Reset, self));
            self.chains.push(chain);
        }
    }

    /// Creates an inbound chain, which begins with the traffic that is never captured.
    fn inbound_chain(&self, name: &str, hook: Hook) -> Chain {
        let mut chain = chain(name, hook);
        chain.rule("loopback", [Match::InLoopback], Verdict::Return);
        chain.ports("ssh", singles(&self.ssh()), Verdict::Return);
        chain.ports("own", singles(&self.own()), Verdict::Return);
        let exclude = &self.spec.inbound.exclude;
        if !exclude.cidrs.is_empty() {
            chain.rule("exclude_cidrs", [Match::Sources(exclude.cidrs.clone())], Verdict::Return);
        }
        if !exclude.interfaces.is_empty() {
            let interfaces = exclude.interfaces.iter().map(ToString::to_string).collect();
            chain.rule("exclude_interfaces", [Match::InInterfaces(interfaces)], Verdict::Return);
        }
        chain
    }
}

fn to(share: Percent) -> String {
    format!("to_{}", share.get())
}

fn singles(ports: &BTreeSet<u16>) -> BTreeSet<Ports> {
    ports.iter().filter_map(|port| Ports::range(*port, *port)).collect()
}

/// Returns the ports that both sets contain.
pub(crate) fn common_ports(one: &BTreeSet<Ports>, other: &BTreeSet<Ports>) -> BTreeSet<Ports> {
    let pairs = one.iter().flat_map(|a| other.iter().map(move |b| (a, b)));
    pairs.filter_map(|(a, b)| Ports::range(a.first().max(b.first()), a.last().min(b.last()))).collect()
}

/// Returns the ports of `these` that are not in `those`.
pub(crate) fn ports_without(these: &BTreeSet<Ports>, those: &BTreeSet<Ports>) -> BTreeSet<Ports> {
    let mut left: Vec<Ports> = these.iter().copied().collect();
    for cut in those {
        let parts = |ports: Ports| {
            if cut.last() < ports.first() || ports.last() < cut.first() {
                return [Some(ports), None];
            }
            [
                Ports::range(ports.first(), cut.first().saturating_sub(1))
                    .filter(|_| ports.first() < cut.first()),
                cut.last().checked_add(1).and_then(|first| Ports::range(first, ports.last())),
            ]
        };
        left = left.into_iter().flat_map(parts).flatten().collect();
    }
    left.into_iter().collect()
}

/// Returns the same ports in as few ranges as possible. nftables refuses sets with overlapping elements.
pub(crate) fn merged_ports(ports: &BTreeSet<Ports>) -> BTreeSet<Ports> {
    let mut merged: Vec<Ports> = Vec::new();
    for ports in ports {
        match merged.last_mut() {
            Some(last) if ports.first() <= last.last().saturating_add(1) => {
                let end = last.last().max(ports.last());
                *last = Ports::range(last.first(), end).unwrap_or(*last);
            }
            _ => merged.push(*ports),
        }
    }
    merged.into_iter().collect()
}

/// Returns the networks that are not inside another one of the set.
pub(crate) fn outermost(cidrs: &BTreeSet<Cidr>) -> BTreeSet<Cidr> {
    let inside = |inner: &Cidr, outer: &Cidr| {
        let ((a, b), (c, d)) = (inner.span(), outer.span());
        inner != outer && inner.is_ipv4() == outer.is_ipv4() && c <= a && b <= d
    };
    cidrs.iter().filter(|cidr| !cidrs.iter().any(|other| inside(cidr, other))).copied().collect()
}

pub(crate) fn is_family(ip: IpAddr, v4: bool) -> bool {
    ip.is_ipv4() == v4
}
