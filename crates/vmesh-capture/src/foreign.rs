//! Judges foreign rules: how the host's own filter treats captured connections, from the listings of nft and
//! iptables.
//!
//! A redirected packet reaches the host's filter in another form: its destination is Envoy's port, and its
//! connection has been translated. So a filter may refuse it although it accepts the original packet (ufw
//! does not know port 15006), or accept it although it refuses the original packet (firewalld accepts
//! whatever was translated). [`inbound`] finds both cases before a packet is lost. Once packets are lost,
//! [`suspects`] names the rules that may have dropped them.
//!
//! The rules are evaluated for imagined packets. This module is pure: it works on text, and limits how many
//! rules it follows. An unknown condition may hold or not. Rules that could not be read, and rules beyond the
//! limits, are never treated as "no filter": a port that cannot be judged is reported as
//! [`Conflict::Unjudged`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::program::merged_ports;
use crate::spec::{INBOUND_PORT, OUTBOUND_PORT, Ports, Spec};

/// The limit of rules that are followed for one packet. A longer ruleset is not judged.
const MAX_STEPS: usize = 100_000;
/// The limit of rules that are followed for all packets of one judgement together.
const MAX_STEPS_OF_ALL: usize = 4_000_000;
/// The limit of nested jumps. The kernel allows 16 in nftables.
const MAX_DEPTH: usize = 24;
/// The limit of rules that are stored; each entry of a verdict map counts as one.
const MAX_RULES: usize = 400_000;
/// The limit of inbound port ranges that are judged. Ports that all rules treat alike form one range.
const MAX_JUDGED_RANGES: usize = 256;
/// The time for which the last complete verdict stays valid while the rules cannot be read. With a longer
/// time, a redirect could bypass a firewall that was installed meanwhile. With none, a single slow listing
/// would switch capture off.
const VERDICT_VALID_FOR: Duration = Duration::from_secs(300);
/// The limit of a rule's text in messages, in characters.
const MAX_TEXT: usize = 200;

/// The kernel hook at which a chain sees a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PacketHook {
    Prerouting,
    Input,
    Output,
}

/// An imagined TCP packet, and what is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    pub is_ipv4: bool,
    pub hook: PacketHook,
    /// True if the destination was translated before this hook. If not, the packet has its original
    /// addresses.
    pub is_translated: bool,
    pub to_port: Option<u16>,
    pub from_port: Option<u16>,
    /// True if this packet opens its connection.
    pub is_new: bool,
    /// True if the packet arrives or leaves over the loopback interface.
    pub over_loopback: bool,
    /// True if the source address belongs to no interface of this host.
    pub from_elsewhere: bool,
}

impl Packet {
    /// The first packet of a connection from another host, at the filter's `input` hook.
    fn from_outside(is_ipv4: bool, port: u16, is_translated: bool) -> Packet {
        Packet {
            is_ipv4,
            hook: PacketHook::Input,
            is_translated,
            to_port: Some(port),
            from_port: None,
            is_new: true,
            over_loopback: false,
            from_elsewhere: true,
        }
    }
}

/// The result of a condition, in three-valued logic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tristate {
    Yes,
    No,
    Maybe,
}

impl Tristate {
    fn of(known: bool) -> Tristate {
        if known { Tristate::Yes } else { Tristate::No }
    }

    fn not(self) -> Tristate {
        match self {
            Tristate::Yes => Tristate::No,
            Tristate::No => Tristate::Yes,
            Tristate::Maybe => Tristate::Maybe,
        }
    }

    fn and(self, other: Tristate) -> Tristate {
        match (self, other) {
            (Tristate::No, _) | (_, Tristate::No) => Tristate::No,
            (Tristate::Yes, Tristate::Yes) => Tristate::Yes,
            _ => Tristate::Maybe,
        }
    }
}

/// A condition of a foreign rule.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Condition {
    /// Tests whether the protocol is TCP.
    Tcp(bool),
    ToPorts(Vec<Ports>),
    FromPorts(Vec<Ports>),
    /// The packet's interface has this name.
    Interface {
        incoming: bool,
        name: String,
    },
    /// The conntrack state is one of these: `new`, `established`.
    State(Vec<String>),
    /// The destination was translated (DNAT).
    Translated,
    /// The source is an address of this host.
    FromThisHost,
    /// Tests whether the destination address belongs to this host.
    ToThisHost(bool),
    Not(Box<Condition>),
    Unknown,
}

impl Condition {
    fn holds(&self, packet: &Packet) -> Tristate {
        let among = |ports: &[Ports], port: Option<u16>| match port {
            Some(port) => Tristate::of(ports.iter().any(|ports| ports.contains(port))),
            None => Tristate::Maybe,
        };
        match self {
            Condition::Tcp(tcp) => Tristate::of(*tcp),
            Condition::ToPorts(ports) => among(ports, packet.to_port),
            Condition::FromPorts(ports) => among(ports, packet.from_port),
            Condition::Interface { incoming, name } => {
                let incoming_hook = packet.hook != PacketHook::Output;
                match (*incoming == incoming_hook, name == "lo") {
                    (false, _) => Tristate::Maybe,
                    (true, true) => Tristate::of(packet.over_loopback),
                    (true, false) if packet.over_loopback => Tristate::No,
                    (true, false) => Tristate::Maybe,
                }
            }
            Condition::State(states) => {
                let now = if packet.is_new { "new" } else { "established" };
                Tristate::of(states.iter().any(|state| state == now))
            }
            Condition::Translated => Tristate::of(packet.is_translated),
            Condition::FromThisHost => match packet.from_elsewhere {
                true => Tristate::No,
                false => Tristate::Maybe,
            },
            Condition::ToThisHost(is) if packet.hook == PacketHook::Input => Tristate::of(*is),
            Condition::ToThisHost(_) => Tristate::Maybe,
            Condition::Not(condition) => condition.holds(packet).not(),
            Condition::Unknown => Tristate::Maybe,
        }
    }
}

/// The verdict of a foreign rule, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
enum RuleAction {
    Accept,
    Drop,
    /// The connection is not tracked, so none of its addresses is translated.
    NoTrack,
    Jump(String),
    Goto(String),
    Return,
    /// The rule only counts, logs or marks packets.
    Continue,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct ParsedRule {
    conditions: Vec<Condition>,
    action: RuleAction,
    text: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct ParsedChain {
    /// For a base chain: its hook, its priority, and whether its policy is `drop`.
    base: Option<(PacketHook, i64, bool)>,
    rules: Vec<ParsedRule>,
}

/// The listing that a chain was read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Listing {
    /// `nft -j list ruleset`.
    Nft,
    /// `iptables-save` over nftables. `nft -j list ruleset` shows the same chains, without the parts that
    /// only iptables understands.
    IptablesOverNft,
    /// `iptables-save` with the legacy kernel interface.
    IptablesLegacy,
}

/// The foreign rules, by listing, table and chain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ruleset {
    chains: BTreeMap<(Listing, String, String), ParsedChain>,
    rules: usize,
    /// The reasons why this set may lack rules that the kernel has.
    gaps: BTreeSet<String>,
}

/// The text of a foreign rule or of a chain's policy: `inet firewalld filter_INPUT: reject`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ForeignRule(String);

impl fmt::Display for ForeignRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The possible fates of a packet in a ruleset.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Outcome {
    accepts: Option<ForeignRule>,
    drops: Vec<ForeignRule>,
    /// Whether the packet may reach the end of a chain without a verdict.
    falls_through: bool,
    /// A rule that certainly keeps the connection from being tracked.
    untracked: Option<ForeignRule>,
    /// The limit at which the evaluation stopped. All other fields are meaningless then.
    gave_up: Option<&'static str>,
}

/// A disagreement between the host's own filter and an inbound redirect of some ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Conflict {
    /// The redirect would let in connections that the filter refuses.
    Opens { ports: Ports, refused_by: ForeignRule },
    /// The filter would refuse redirected connections although it accepts the original ones.
    Closes { ports: Ports, refused_by: ForeignRule },
    /// The effect is unknown, because rules could not be read or exceed the limits.
    Unjudged { ports: Ports, why: String },
}

impl Conflict {
    pub fn ports(&self) -> Ports {
        match self {
            Conflict::Opens { ports, .. }
            | Conflict::Closes { ports, .. }
            | Conflict::Unjudged { ports, .. } => *ports,
        }
    }

    fn ports_mut(&mut self) -> &mut Ports {
        match self {
            Conflict::Opens { ports, .. }
            | Conflict::Closes { ports, .. }
            | Conflict::Unjudged { ports, .. } => ports,
        }
    }

    /// Extends this conflict by `next` if `next` is the same conflict for the adjacent ports.
    fn absorb(&mut self, next: &Conflict) -> bool {
        let (mine, theirs) = (self.ports(), next.ports());
        let follows = mine.last().checked_add(1) == Some(theirs.first());
        let Some(both) = Ports::range(mine.first(), theirs.last()).filter(|_| follows) else { return false };
        let widened = |conflict: &Conflict| {
            let mut conflict = conflict.clone();
            *conflict.ports_mut() = both;
            conflict
        };
        let is_same = widened(self) == widened(next);
        if is_same {
            *self = widened(self);
        }
        is_same
    }
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Conflict::Opens { ports, refused_by } => write!(
                f,
                "port {ports} is kept closed by this host's own filter ({refused_by}), which lets translated connections in: a redirect \
                 would open the port to the network. Take `capture.inbound: {{capture: tproxy}}`, open the port, or allow it by \
                 `capture.inbound: {{capture: redirect, bypass_filter: {}}}`",
                bypass(*ports)
            ),
            Conflict::Closes { ports, refused_by } => write!(
                f,
                "this host's own filter lets connections in to port {ports}, and refuses them once they are redirected to Envoy's port \
                 {INBOUND_PORT} ({refused_by}): let TCP port {INBOUND_PORT} in there, or take `capture.inbound: {{capture: tproxy}}`"
            ),
            Conflict::Unjudged { ports, why } => write!(
                f,
                "whether this host's own filter keeps port {ports} closed is not known ({why}), and a redirect could open the port to the \
                 network. Take `capture.inbound: {{capture: tproxy}}`, or allow it by `capture.inbound: {{capture: redirect, \
                 bypass_filter: {}}}`",
                bypass(*ports)
            ),
        }
    }
}

/// Formats `bypass_filter` for these ports as YAML.
fn bypass(ports: Ports) -> String {
    if ports.first() == ports.last() { format!("[{ports}]") } else { format!("[\"{ports}\"]") }
}

/// Finds the ports that an inbound redirect would certainly open or close, and those that cannot be judged.
pub fn inbound_conflicts(rules: &Ruleset, ports: &BTreeSet<Ports>) -> Vec<Conflict> {
    let packet = Packet::from_outside;
    if let Some(why) = rules.gaps() {
        return ports.iter().map(|ports| Conflict::Unjudged { ports: *ports, why: why.clone() }).collect();
    }
    let mut left = MAX_STEPS_OF_ALL;
    let redirected =
        [true, false].map(|is_ipv4| (is_ipv4, rules.judge(&packet(is_ipv4, INBOUND_PORT, true), &mut left)));
    let mut conflicts: Vec<Conflict> = Vec::new();
    for (number, range) in rules.split_by_rules(ports).enumerate() {
        let conflict = if number < MAX_JUDGED_RANGES {
            let of_family = |(is_ipv4, redirected): &(bool, Outcome)| {
                let direct = rules.judge(&packet(*is_ipv4, range.first(), false), &mut left);
                conflict(range, &direct, redirected)
            };
            redirected.iter().find_map(of_family)
        } else {
            let why =
                format!("its rules tell more than {MAX_JUDGED_RANGES} ranges of the captured ports apart");
            Some(Conflict::Unjudged { ports: range, why })
        };
        let Some(conflict) = conflict else { continue };
        if !conflicts.last_mut().is_some_and(|last| last.absorb(&conflict)) {
            conflicts.push(conflict);
        }
    }
    conflicts
}

fn conflict(ports: Ports, direct: &Outcome, redirected: &Outcome) -> Option<Conflict> {
    if let Some(bound) = direct.gave_up.or(redirected.gave_up) {
        return Some(Conflict::Unjudged { ports, why: bound.to_owned() });
    }
    match (direct.drops.first(), &direct.accepts, redirected.drops.first(), &redirected.accepts) {
        // The filter refuses some or all sources today. A redirect would make it accept all sources.
        (Some(refused_by), _, None, _) => Some(Conflict::Opens { ports, refused_by: refused_by.clone() }),
        (_, Some(_), Some(refused_by), None) => {
            Some(Conflict::Closes { ports, refused_by: refused_by.clone() })
        }
        _ => None,
    }
}

/// Judges inbound ports against the foreign rules, once for each reading of the rules, however often
/// endpoints change.
///
/// Call [`InboundJudge::forget`] when another program has changed rules. If [`InboundJudge::rules`] then
/// returns `None`, read the rules and pass them to [`InboundJudge::set_rules`]. Then call [`InboundJudge::judge`].
#[derive(Debug, Default)]
pub struct InboundJudge {
    rules: Option<Ruleset>,
    verdict: Option<(BTreeSet<Ports>, Arc<Judgement>)>,
    /// The last verdict on a complete reading of the rules, and the time of that reading.
    last_complete: Option<(BTreeSet<Ports>, Arc<Judgement>, Instant)>,
}

/// The result of one judgement.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    pub conflicts: Vec<Conflict>,
    /// The reason why the verdict is based on an earlier reading, if it is.
    pub outdated: Option<String>,
}

impl Judgement {
    /// Removes the conflicting ports from `spec`. Returns a note for each conflict.
    pub fn remove_conflicts(&self, spec: &mut Spec) -> Vec<String> {
        let outdated = self.outdated.iter().map(|why| {
            format!("inbound.ports: this host's own filter counts as it was last read, for 5 minutes at most: {why}")
        });
        let mut notes: Vec<String> = outdated.collect();
        for conflict in &self.conflicts {
            spec.inbound.remove_ports(conflict.ports());
            notes.push(format!("inbound.ports: {} is not captured: {conflict}", conflict.ports()));
        }
        notes
    }
}

impl InboundJudge {
    /// Judges `ports` by another reading of the rules, as this judge would, without recording that reading.
    pub fn judge_with(&self, rules: Ruleset, ports: &BTreeSet<Ports>, now: Instant) -> Arc<Judgement> {
        let mut other = InboundJudge { last_complete: self.last_complete.clone(), ..InboundJudge::default() };
        other.set_rules(rules);
        other.judge(ports, now)
    }

    /// Forgets the rules, because they have changed or may have.
    pub fn forget(&mut self) {
        self.rules = None;
        self.verdict = None;
    }

    /// Returns the rules, if they were read since the last change.
    pub fn rules(&self) -> Option<&Ruleset> {
        self.rules.as_ref()
    }

    /// Records the current rules.
    pub fn set_rules(&mut self, rules: Ruleset) {
        self.verdict = None;
        self.rules = Some(rules);
    }

    /// Judges `ports`. If the current reading has gaps, the last complete verdict on the same ports stays
    /// valid for five minutes. Without such a verdict, the ports are [`Conflict::Unjudged`].
    pub fn judge(&mut self, ports: &BTreeSet<Ports>, now: Instant) -> Arc<Judgement> {
        let Some(rules) = &self.rules else {
            let why = "its rules have not been read";
            let unjudged = |ports: &Ports| Conflict::Unjudged { ports: *ports, why: why.to_owned() };
            return Arc::new(Judgement { conflicts: ports.iter().map(unjudged).collect(), outdated: None });
        };
        if let Some((judged, verdict)) = &self.verdict
            && judged == ports
        {
            return Arc::clone(verdict);
        }
        let last = self.last_complete.as_ref().filter(|(judged, _, read)| {
            judged == ports && now.saturating_duration_since(*read) < VERDICT_VALID_FOR
        });
        let verdict = match (rules.gaps(), last) {
            (None, _) => {
                let verdict =
                    Arc::new(Judgement { conflicts: inbound_conflicts(rules, ports), outdated: None });
                self.last_complete = Some((ports.clone(), Arc::clone(&verdict), now));
                verdict
            }
            // This verdict is not cached, because it expires.
            (Some(why), Some((_, verdict, _))) => {
                return Arc::new(Judgement { conflicts: verdict.conflicts.clone(), outdated: Some(why) });
            }
            (Some(_), None) => {
                Arc::new(Judgement { conflicts: inbound_conflicts(rules, ports), outdated: None })
            }
        };
        self.verdict = Some((ports.clone(), Arc::clone(&verdict)));
        verdict
    }
}

/// Names a rule that keeps connections to `port` from being tracked. Such connections are not captured, so
/// those to a virtual address lead nowhere.
pub fn untracking_rule(rules: &Ruleset, port: u16) -> Option<ForeignRule> {
    let packet = |is_ipv4| Packet {
        is_ipv4,
        hook: PacketHook::Output,
        is_translated: false,
        to_port: Some(port),
        from_port: None,
        is_new: true,
        over_loopback: false,
        from_elsewhere: false,
    };
    let mut left = MAX_STEPS_OF_ALL;
    [true, false].into_iter().find_map(|is_ipv4| rules.judge(&packet(is_ipv4), &mut left).untracked)
}

/// The explanation that the host's own filter gives for lost redirected connections from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InboundSuspects {
    /// Rules that may drop the redirected connections, and would accept the original ones. Empty if no such
    /// rule is known.
    Rules(Vec<ForeignRule>),
    /// Every rule that may drop the redirected connections may also drop the original ones: the host refuses
    /// these clients.
    Unwanted,
}

/// Names the rules that may drop connections from outside, of one address family, because they are
/// redirected.
pub fn inbound_suspects(rules: &Ruleset, ports: &BTreeSet<Ports>, is_ipv4: bool) -> InboundSuspects {
    let packet = |port, is_translated| Packet::from_outside(is_ipv4, port, is_translated);
    let mut left = MAX_STEPS_OF_ALL;
    let redirected = rules.judge(&packet(INBOUND_PORT, true), &mut left).drops;
    if redirected.is_empty() {
        return InboundSuspects::Rules(Vec::new());
    }
    let mut otherwise: BTreeSet<ForeignRule> = BTreeSet::new();
    for range in rules.split_by_rules(ports).take(MAX_JUDGED_RANGES) {
        otherwise.extend(rules.judge(&packet(range.first(), false), &mut left).drops);
    }
    let own: Vec<ForeignRule> = redirected.into_iter().filter(|rule| !otherwise.contains(rule)).collect();
    if own.is_empty() { InboundSuspects::Unwanted } else { InboundSuspects::Rules(own) }
}

/// Names the rules that may drop a captured outbound connection of one address family to `to_port`, or
/// Envoy's replies, or that keep the connection from being translated.
pub fn outbound_suspects(rules: &Ruleset, to_port: u16, is_ipv4: bool) -> Vec<ForeignRule> {
    let new = |hook, is_translated, to_port, over_loopback| Packet {
        is_ipv4,
        hook,
        is_translated,
        to_port: Some(to_port),
        from_port: None,
        is_new: true,
        over_loopback,
        from_elsewhere: false,
    };
    // The reply comes from the virtual address, which no interface has.
    let answer = |hook, from_port| Packet {
        is_ipv4,
        hook,
        is_translated: true,
        to_port: None,
        from_port: Some(from_port),
        is_new: false,
        over_loopback: true,
        from_elsewhere: true,
    };
    let packets = [
        new(PacketHook::Output, false, to_port, false),
        // The packet has the interface of the route to the virtual address.
        new(PacketHook::Output, true, OUTBOUND_PORT, false),
        new(PacketHook::Prerouting, true, OUTBOUND_PORT, true),
        new(PacketHook::Input, true, OUTBOUND_PORT, true),
        answer(PacketHook::Output, OUTBOUND_PORT),
        answer(PacketHook::Prerouting, to_port),
        answer(PacketHook::Input, to_port),
    ];
    let mut found: Vec<ForeignRule> = Vec::new();
    let mut left = MAX_STEPS_OF_ALL;
    for rule in packets.iter().flat_map(|packet| rules.judge(packet, &mut left).drops) {
        if !found.contains(&rule) {
            found.push(rule);
        }
    }
    found
}

impl Ruleset {
    /// Records that some rules could not be read, and why.
    pub fn add_gap(&mut self, why: impl Into<String>) {
        self.gaps.insert(why.into());
    }

    /// Explains which rules could not be read. `None` if the set is complete.
    pub fn gaps(&self) -> Option<String> {
        let gaps: Vec<&str> = self.gaps.iter().take(3).map(String::as_str).collect();
        (!gaps.is_empty()).then(|| gaps.join("; "))
    }

    /// Splits `ports` into ranges that all rules treat alike.
    fn split_by_rules(&self, ports: &BTreeSet<Ports>) -> impl Iterator<Item = Ports> {
        let mut starts = BTreeSet::new();
        for condition in self.chains.values().flat_map(|chain| &chain.rules).flat_map(|rule| &rule.conditions)
        {
            let mut condition = condition;
            while let Condition::Not(inner) = condition {
                condition = inner;
            }
            if let Condition::ToPorts(ports) = condition {
                starts.extend(ports.iter().map(|ports| ports.first()));
                starts.extend(ports.iter().filter_map(|ports| ports.last().checked_add(1)));
            }
        }
        merged_ports(ports).into_iter().flat_map(move |wanted| {
            let mut ranges = Vec::new();
            let mut first = wanted.first();
            for start in starts.range(first..=wanted.last()).copied().filter(|start| *start > wanted.first())
            {
                ranges.extend(Ports::range(first, start - 1));
                first = start;
            }
            ranges.extend(Ports::range(first, wanted.last()));
            ranges
        })
    }

    /// Reports whether `iptables-save` lists this chain of nft's listing completely.
    fn is_listed_by_iptables(&self, (listing, table, name): &(Listing, String, String)) -> bool {
        *listing == Listing::Nft
            && self.chains.contains_key(&(Listing::IptablesOverNft, table.clone(), name.clone()))
    }

    /// Evaluates all chains that see the packet, and takes at most `left` steps.
    fn judge(&self, packet: &Packet, left: &mut usize) -> Outcome {
        let budget = MAX_STEPS.min(*left);
        let mut steps = 0;
        let mut whole = Outcome { falls_through: true, ..Outcome::default() };
        let sees = |hook: PacketHook, priority: i64| {
            // Addresses are translated at priority -100. On `output`, a new packet has its original
            // destination before that priority and the translated one after it.
            hook == packet.hook
                && (hook != PacketHook::Output || !packet.is_new || (priority > -100) == packet.is_translated)
        };
        let mut all_accept = true;
        let mut accepts = None;
        for (key, chain) in &self.chains {
            let (_, table, name) = key;
            let Some((hook, priority, drops)) = chain.base else { continue };
            let other_family = if packet.is_ipv4 { "ip6 " } else { "ip " };
            if !sees(hook, priority) || table.starts_with(other_family) || self.is_listed_by_iptables(key) {
                continue;
            }
            let mut outcome = self.walk(key, packet, 0, &mut steps, budget);
            if outcome.falls_through {
                let policy =
                    ForeignRule(format!("{table} {name}: policy {}", if drops { "drop" } else { "accept" }));
                match drops {
                    true => outcome.drops.push(policy),
                    false => _ = outcome.accepts.get_or_insert(policy),
                }
            }
            // Every chain must accept a packet, or it is dropped.
            all_accept &= outcome.accepts.is_some();
            accepts = accepts.or(outcome.accepts);
            whole.untracked = whole.untracked.or(outcome.untracked);
            whole.drops.extend(outcome.drops);
            whole.gave_up = whole.gave_up.or(outcome.gave_up);
            if whole.gave_up.is_some() {
                break;
            }
        }
        *left = left.saturating_sub(steps);
        let untouched = accepts.is_none() && whole.drops.is_empty();
        whole.accepts = match all_accept {
            true if untouched => Some(ForeignRule("no filter".to_owned())),
            true => accepts,
            false => None,
        };
        whole
    }

    fn walk(
        &self,
        key: &(Listing, String, String),
        packet: &Packet,
        depth: usize,
        steps: &mut usize,
        budget: usize,
    ) -> Outcome {
        let mut outcome = Outcome::default();
        let Some(chain) = self.chains.get(key) else {
            return Outcome { falls_through: true, ..outcome };
        };
        if depth >= MAX_DEPTH {
            return Outcome { gave_up: Some("its chains jump too deep"), ..outcome };
        }
        let (listing, table, name) = key;
        for rule in &chain.rules {
            *steps += 1;
            if *steps > budget {
                outcome.gave_up = Some("it has more rules than are followed");
                return outcome;
            }
            let holds = rule.conditions.iter().fold(Tristate::Yes, |all, one| all.and(one.holds(packet)));
            if holds == Tristate::No {
                continue;
            }
            let named = || ForeignRule(format!("{table} {name}: {}", rule.text));
            let mut goes_on = holds == Tristate::Maybe;
            match &rule.action {
                RuleAction::Accept => _ = outcome.accepts.get_or_insert_with(named),
                RuleAction::Drop => outcome.drops.push(named()),
                // An untracked connection is lost to capture, but its packets continue to the next rule.
                RuleAction::NoTrack => {
                    if holds == Tristate::Yes && depth == 0 {
                        outcome.untracked = Some(named());
                    }
                    outcome.drops.push(named());
                    goes_on = true;
                }
                RuleAction::Return => outcome.falls_through = true,
                RuleAction::Continue => goes_on = true,
                RuleAction::Jump(to) | RuleAction::Goto(to) => {
                    let to = (*listing, table.clone(), to.clone());
                    let inner = self.walk(&to, packet, depth + 1, steps, budget);
                    outcome.accepts = outcome.accepts.or(inner.accepts);
                    outcome.drops.extend(inner.drops);
                    outcome.gave_up = inner.gave_up;
                    if outcome.gave_up.is_some() {
                        return outcome;
                    }
                    let comes_back = inner.falls_through;
                    match rule.action {
                        RuleAction::Goto(_) => outcome.falls_through |= comes_back,
                        _ => goes_on |= comes_back,
                    }
                }
            }
            if !goes_on {
                return outcome;
            }
        }
        Outcome { falls_through: true, ..outcome }
    }

    fn add_rules(&mut self, key: (Listing, String, String), rules: Vec<ParsedRule>) {
        if self.rules + rules.len() > MAX_RULES {
            self.add_gap(format!("it has more than {MAX_RULES} rules"));
            return;
        }
        self.rules += rules.len();
        self.chains.entry(key).or_default().rules.extend(rules);
    }

    /// Adds the rules that `nft -j list ruleset` prints, except for vmesh's own table. Chains that
    /// `iptables-save` lists too are evaluated from that listing, since nft shows only parts of what iptables
    /// adds.
    pub fn add_nft(&mut self, json: &str) {
        let value: Value = serde_json::from_str(json).unwrap_or(Value::Null);
        let Some(items) = value.get("nftables").and_then(Value::as_array) else {
            return self.add_gap("what `nft -j list ruleset` printed is not understood");
        };
        let verdict_maps: BTreeMap<(String, String), &[Value]> = items
            .iter()
            .filter_map(|item| {
                let map = item.get("map")?;
                let elements = map.get("elem").and_then(Value::as_array).map(Vec::as_slice);
                Some((place(map, "name")?, elements.unwrap_or_default()))
            })
            .collect();
        for item in items {
            if let Some(chain) = item.get("chain") {
                let Some((table, name)) = place(chain, "name") else { continue };
                let hook = match text(chain, "hook") {
                    Some("prerouting") => Some(PacketHook::Prerouting),
                    Some("input") => Some(PacketHook::Input),
                    Some("output") => Some(PacketHook::Output),
                    _ => None,
                };
                let priority = chain.get("prio").and_then(Value::as_i64).unwrap_or_default();
                let base = hook.map(|hook| (hook, priority, text(chain, "policy") == Some("drop")));
                self.chains.entry((Listing::Nft, table, name)).or_default().base = base;
            } else if let Some(rule) = item.get("rule") {
                let Some((table, chain)) = place(rule, "chain") else { continue };
                let expressions = rule.get("expr").and_then(Value::as_array).map(Vec::as_slice);
                let map = |name: &str| verdict_maps.get(&(table.clone(), name.to_owned())).copied();
                let rules = nft_rules(expressions.unwrap_or_default(), map);
                self.add_rules((Listing::Nft, table, chain), rules);
            }
        }
    }

    /// Adds the rules that `iptables-save` or `ip6tables-save` prints, except for vmesh's own chains.
    pub fn add_iptables(&mut self, family: &str, saved: &str) {
        let listing = match is_iptables_over_nft(saved) {
            true => Listing::IptablesOverNft,
            false => Listing::IptablesLegacy,
        };
        let mut table = String::new();
        for line in saved.lines() {
            if let Some(name) = line.strip_prefix('*') {
                name.trim().clone_into(&mut table);
            } else if let Some(declared) = line.strip_prefix(':') {
                let mut words = declared.split_whitespace();
                let (Some(name), Some(policy)) = (words.next(), words.next()) else { continue };
                let hook = match name {
                    "PREROUTING" => Some(PacketHook::Prerouting),
                    "INPUT" => Some(PacketHook::Input),
                    "OUTPUT" => Some(PacketHook::Output),
                    _ => None,
                };
                let priority = match table.as_str() {
                    "raw" => -300,
                    "mangle" => -150,
                    "nat" => -100,
                    _ => 0,
                };
                let base = hook.map(|hook| (hook, priority, policy == "DROP"));
                let key = (listing, format!("{family} {table}"), name.to_owned());
                self.chains.entry(key).or_default().base = base;
            } else if let Some(rule) = line.strip_prefix("-A ") {
                let Some((chain, rest)) = rule.split_once(' ') else { continue };
                if chain.starts_with("VMESH_") || rest.contains("-j VMESH_") || rest.contains("-g VMESH_") {
                    continue;
                }
                let key = (listing, format!("{family} {table}"), chain.to_owned());
                self.add_rules(key, vec![iptables_rule(rest)]);
            }
        }
    }
}

/// Reports whether this output of `iptables-save` comes from iptables over nftables, by the comment before
/// each table.
pub(crate) fn is_iptables_over_nft(saved: &str) -> bool {
    let mut generated = saved.lines().filter(|line| line.starts_with("# Generated by "));
    // Before 1.8.3 the program was called xtables-save.
    generated.any(|line| line.contains("(nf_tables)") || line.contains("xtables-save"))
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key)?.as_str()
}

/// Returns the table and the chain or map of an item, unless it belongs to vmesh.
fn place(value: &Value, name: &str) -> Option<(String, String)> {
    let (family, table) = (text(value, "family")?, text(value, "table")?);
    let is_ours = family == "inet" && table == "vmesh";
    // Tables of the `bridge` and `netdev` families see other packets.
    if is_ours || !matches!(family, "ip" | "ip6" | "inet") {
        return None;
    }
    Some((format!("{family} {table}"), text(value, name)?.to_owned()))
}

/// Converts a rule of nftables to one rule, or to one for each entry of its verdict map. `map` returns the
/// entries of a named map.
fn nft_rules<'a>(expressions: &'a [Value], map: impl Fn(&str) -> Option<&'a [Value]>) -> Vec<ParsedRule> {
    let words: Vec<String> = expressions.iter().map(compact).collect();
    let text = shortened(&words.join(" "));
    let mut conditions = Vec::new();
    let mut action = RuleAction::Continue;
    for expression in expressions {
        let Some((name, value)) = expression.as_object().and_then(|object| object.iter().next()) else {
            continue;
        };
        match name.as_str() {
            "match" => conditions.push(nft_match(value)),
            "counter" | "log" | "comment" => {}
            "vmap" => return verdict_map(value, map, &conditions, &text),
            "xt" if text_of_xt(value) == Some(("target", "REJECT")) => action = RuleAction::Drop,
            _ => match nft_verdict(name, value) {
                Some(verdict) => action = verdict,
                // A limit or a match of iptables applies to some packets only.
                None => conditions.push(Condition::Unknown),
            },
        }
    }
    vec![ParsedRule { conditions, action, text }]
}

fn text_of_xt(value: &Value) -> Option<(&str, &str)> {
    Some((text(value, "type")?, text(value, "name")?))
}

fn nft_verdict(name: &str, value: &Value) -> Option<RuleAction> {
    let target = || text(value, "target").unwrap_or_default().to_owned();
    Some(match name {
        "accept" => RuleAction::Accept,
        "drop" | "reject" => RuleAction::Drop,
        "notrack" => RuleAction::NoTrack,
        "return" => RuleAction::Return,
        "continue" => RuleAction::Continue,
        "jump" => RuleAction::Jump(target()),
        "goto" => RuleAction::Goto(target()),
        _ => return None,
    })
}

/// Converts a verdict map (`ct state vmap { invalid : drop }`) to one rule for each entry. A packet takes at
/// most one entry; the entry for all other values (`*`) comes last.
fn verdict_map<'a>(
    value: &'a Value,
    map: impl Fn(&str) -> Option<&'a [Value]>,
    conditions: &[Condition],
    text: &str,
) -> Vec<ParsedRule> {
    let data = value.get("data");
    let entries = match data.and_then(Value::as_str).and_then(|name| name.strip_prefix('@')) {
        Some(name) => map(name),
        None => data.and_then(|data| data.get("set")).and_then(Value::as_array).map(Vec::as_slice),
    };
    let rule = |last: Option<Condition>, action| ParsedRule {
        conditions: conditions.iter().cloned().chain(last).collect(),
        action,
        text: text.to_owned(),
    };
    let (mut rules, mut others) = (Vec::new(), Vec::new());
    for entry in entries.unwrap_or_default() {
        let Some([key, verdict]) = entry.as_array().map(Vec::as_slice) else { continue };
        let verdict = verdict.as_object().and_then(|verdict| verdict.iter().next());
        let Some(action) = verdict.and_then(|(name, value)| nft_verdict(name, value)) else { continue };
        let key = key.get("elem").and_then(|element| element.get("val")).unwrap_or(key);
        if key.as_str() == Some("*") {
            others.push(rule(None, action));
            continue;
        }
        let condition = value.get("key").map_or(Condition::Unknown, |left| nft_compare(left, key, None));
        rules.push(rule(Some(condition), action));
    }
    rules.extend(others);
    if rules.is_empty() {
        // The map is empty, or none of its entries is understood.
        rules.push(rule(Some(Condition::Unknown), RuleAction::Continue));
    }
    rules
}

/// Formats an expression roughly like `nft list ruleset`.
fn compact(expression: &Value) -> String {
    let side = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Object(object) if object.contains_key("payload") => {
            let payload = value.get("payload");
            let part = |key| payload.and_then(|payload| text(payload, key)).unwrap_or_default().to_owned();
            format!("{} {}", part("protocol"), part("field"))
        }
        Value::Object(object) if object.len() == 1 => {
            let (name, inner) =
                object.iter().next().map_or(("", &Value::Null), |(name, inner)| (name, inner));
            match (name, text(inner, "key")) {
                (_, Some(key)) => format!("{name} {key}"),
                ("set", None) => inner.to_string().replace('"', ""),
                _ => value.to_string(),
            }
        }
        other => other.to_string(),
    };
    let Some((name, value)) = expression.as_object().and_then(|object| object.iter().next()) else {
        return String::new();
    };
    match name.as_str() {
        "match" => {
            let part = |key| value.get(key).map(side).unwrap_or_default();
            let op = text(value, "op").filter(|op| !matches!(*op, "==" | "in")).unwrap_or_default();
            [part("left"), op.to_owned(), part("right")].join(" ").replace("  ", " ")
        }
        "jump" | "goto" => format!("{name} {}", text(value, "target").unwrap_or_default()),
        "vmap" => {
            let data = value.get("data").map(side).unwrap_or_default();
            format!("{} vmap {data}", value.get("key").map(side).unwrap_or_default())
        }
        "counter" | "log" => name.clone(),
        _ => name.clone(),
    }
}

fn nft_match(value: &Value) -> Condition {
    match (value.get("left"), value.get("right")) {
        (Some(left), Some(right)) => nft_compare(left, right, text(value, "op")),
        _ => Condition::Unknown,
    }
}

fn nft_compare(left: &Value, right: &Value, operator: Option<&str>) -> Condition {
    let meta = left.get("meta").and_then(|meta| text(meta, "key"));
    let ct = left.get("ct").and_then(|ct| text(ct, "key"));
    let payload =
        left.get("payload").and_then(|payload| Some((text(payload, "protocol")?, text(payload, "field")?)));
    let condition = match (meta, ct, payload) {
        (Some("l4proto"), _, _) => {
            Condition::Tcp(words(right).iter().any(|word| word == "tcp" || word == "6"))
        }
        (Some(key @ ("iifname" | "iif" | "oifname" | "oif")), _, _) => match right.as_str() {
            Some(name) if !name.ends_with('*') => {
                Condition::Interface { incoming: key.starts_with('i'), name: name.to_owned() }
            }
            _ => Condition::Unknown,
        },
        (_, Some("state"), _) => Condition::State(words(right)),
        (_, Some("status"), _) => match words(right).iter().any(|word| word == "dnat") {
            true => Condition::Translated,
            false => Condition::Unknown,
        },
        (_, _, Some(("tcp" | "th", "dport"))) => ports(right).map_or(Condition::Unknown, Condition::ToPorts),
        (_, _, Some(("tcp" | "th", "sport"))) => {
            ports(right).map_or(Condition::Unknown, Condition::FromPorts)
        }
        (_, _, Some(("udp" | "icmp" | "icmpv6" | "sctp" | "dccp" | "ah" | "esp", _))) => {
            Condition::Tcp(false)
        }
        _ => Condition::Unknown,
    };
    match (operator, condition) {
        (_, Condition::Unknown) => Condition::Unknown,
        (Some("!="), condition) => Condition::Not(Box::new(condition)),
        (Some("==" | "in") | None, condition) => condition,
        (Some(_), _) => Condition::Unknown,
    }
}

/// Returns the words of a single value, a set or a list.
fn words(value: &Value) -> Vec<String> {
    match value {
        Value::String(word) => vec![word.clone()],
        Value::Number(number) => vec![number.to_string()],
        Value::Array(all) => all.iter().flat_map(words).collect(),
        Value::Object(object) => object.get("set").map(words).unwrap_or_default(),
        _ => Vec::new(),
    }
}

/// Returns the ports of a value; `None` if it is not a list of ports, for example a named set.
fn ports(value: &Value) -> Option<Vec<Ports>> {
    let port = |value: &Value| u16::try_from(value.as_u64()?).ok();
    match value {
        Value::Number(_) => port(value).and_then(|port| Ports::range(port, port)).map(|ports| vec![ports]),
        Value::Array(all) => all.iter().map(ports).collect::<Option<Vec<_>>>().map(|all| all.concat()),
        Value::Object(object) => match (object.get("set"), object.get("range").and_then(Value::as_array)) {
            (Some(set), _) => ports(set),
            (None, Some(range)) => match range.as_slice() {
                [first, last] => Ports::range(port(first)?, port(last)?).map(|ports| vec![ports]),
                _ => None,
            },
            (None, None) => None,
        },
        _ => None,
    }
}

fn iptables_rule(rest: &str) -> ParsedRule {
    let mut words = rest.split_whitespace().peekable();
    let mut conditions = Vec::new();
    let mut action = RuleAction::Continue;
    let mut negated = false;
    while let Some(word) = words.next() {
        if word == "!" {
            negated = true;
            continue;
        }
        let mut value = || words.next().unwrap_or_default();
        let condition = match word {
            "-m" => {
                value();
                continue;
            }
            "--comment" => {
                skip_comment(&mut words);
                continue;
            }
            "-p" => Some(Condition::Tcp(matches!(value(), "tcp" | "6" | "all"))),
            "-i" | "-o" => {
                let name = value();
                match name.ends_with('+') {
                    true => Some(Condition::Unknown),
                    false => Some(Condition::Interface { incoming: word == "-i", name: name.to_owned() }),
                }
            }
            "--dport" | "--dports" => {
                Some(iptables_ports(value()).map_or(Condition::Unknown, Condition::ToPorts))
            }
            "--sport" | "--sports" => {
                Some(iptables_ports(value()).map_or(Condition::Unknown, Condition::FromPorts))
            }
            "--ctstate" | "--state" => {
                let states: Vec<String> = value().split(',').map(str::to_ascii_lowercase).collect();
                match states.iter().any(|state| state == "dnat") {
                    true => Some(Condition::Translated),
                    false => Some(Condition::State(states)),
                }
            }
            "--ctstatus" => {
                value();
                Some(Condition::Unknown)
            }
            "--src-type" => match value() {
                "LOCAL" => Some(Condition::FromThisHost),
                _ => Some(Condition::Unknown),
            },
            "--dst-type" => Some(Condition::ToThisHost(value().split(',').any(|kind| kind == "LOCAL"))),
            "-j" | "-g" => {
                let to = value().to_owned();
                action = match (word, to.as_str()) {
                    ("-g", _) => RuleAction::Goto(to),
                    (_, "ACCEPT") => RuleAction::Accept,
                    (_, "DROP" | "REJECT" | "TARPIT") => RuleAction::Drop,
                    (_, "NOTRACK") => RuleAction::NoTrack,
                    (_, "RETURN") => RuleAction::Return,
                    // The arguments of the `CT` target decide whether the connection is tracked.
                    (_, "CT") if rest.contains("--notrack") => RuleAction::NoTrack,
                    // Targets of the kernel have names in capitals, and so may chains. A jump to a target
                    // that is no chain falls through.
                    (_, _) => RuleAction::Jump(to),
                };
                // The remaining words belong to the target.
                break;
            }
            _ if word.starts_with('-') => Some(Condition::Unknown),
            // The value of an unknown option.
            _ => None,
        };
        if let Some(condition) = condition {
            let is_unknown = condition == Condition::Unknown;
            conditions.push(if negated && !is_unknown {
                Condition::Not(Box::new(condition))
            } else {
                condition
            });
        }
        negated = false;
    }
    ParsedRule { conditions, action, text: shortened(rest) }
}

fn skip_comment<'a>(words: &mut impl Iterator<Item = &'a str>) {
    let Some(first) = words.next() else { return };
    if first.starts_with('"') && !(first.len() > 1 && first.ends_with('"')) {
        // A quoted comment ends at the word with the closing quote.
        _ = words.find(|word| word.ends_with('"'));
    }
}

fn iptables_ports(text: &str) -> Option<Vec<Ports>> {
    let one = |text: &str| {
        let (first, last) = text.split_once(':').unwrap_or((text, text));
        Ports::range(first.parse().ok()?, last.parse().ok()?)
    };
    text.split(',').map(one).collect()
}

fn shortened(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_TEXT).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nft(items: &str) -> Ruleset {
        let mut rules = Ruleset::default();
        rules.add_nft(&format!("{{\"nftables\": [{items}]}}"));
        rules
    }

    fn iptables(saved: &str) -> Ruleset {
        let mut rules = Ruleset::default();
        rules.add_iptables("ip", saved);
        rules
    }

    fn shown(conflicts: &[Conflict]) -> Vec<String> {
        let short = |conflict: &Conflict| match conflict {
            Conflict::Opens { ports, refused_by } => format!("opens {ports}: {refused_by}"),
            Conflict::Closes { ports, refused_by } => format!("closes {ports}: {refused_by}"),
            Conflict::Unjudged { ports, why } => format!("unjudged {ports}: {why}"),
        };
        conflicts.iter().map(short).collect()
    }

    fn ports(text: &str) -> BTreeSet<Ports> {
        text.split_whitespace().map(|ports| ports.parse().unwrap()).collect()
    }

    fn judged(rules: &Ruleset, text: &str) -> Vec<String> {
        shown(&inbound_conflicts(rules, &ports(text)))
    }

    fn names(rules: &[ForeignRule]) -> Vec<String> {
        rules.iter().map(ToString::to_string).collect()
    }

    /// A short form of the rules of firewalld 1.3 with port 22 open.
    const FIREWALLD: &str = r#"
        {"chain": {"family": "inet", "table": "firewalld", "name": "filter_INPUT", "type": "filter", "hook": "input", "prio": 10, "policy": "accept"}},
        {"chain": {"family": "inet", "table": "firewalld", "name": "zones"}},
        {"chain": {"family": "inet", "table": "firewalld", "name": "public"}},
        {"rule": {"family": "inet", "table": "firewalld", "chain": "filter_INPUT", "expr": [{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": {"set": ["established", "related"]}}}, {"accept": null}]}},
        {"rule": {"family": "inet", "table": "firewalld", "chain": "filter_INPUT", "expr": [{"match": {"op": "in", "left": {"ct": {"key": "status"}}, "right": "dnat"}}, {"accept": null}]}},
        {"rule": {"family": "inet", "table": "firewalld", "chain": "filter_INPUT", "expr": [{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "lo"}}, {"accept": null}]}},
        {"rule": {"family": "inet", "table": "firewalld", "chain": "filter_INPUT", "expr": [{"jump": {"target": "zones"}}]}},
        {"rule": {"family": "inet", "table": "firewalld", "chain": "filter_INPUT", "expr": [{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "invalid"}}, {"drop": null}]}},
        {"rule": {"family": "inet", "table": "firewalld", "chain": "filter_INPUT", "expr": [{"reject": {"type": "icmpx", "expr": "admin-prohibited"}}]}},
        {"rule": {"family": "inet", "table": "firewalld", "chain": "zones", "expr": [{"goto": {"target": "public"}}]}},
        {"rule": {"family": "inet", "table": "firewalld", "chain": "public", "expr": [{"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 22}}, {"accept": null}]}},
        {"rule": {"family": "inet", "table": "firewalld", "chain": "public", "expr": [{"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": {"range": [8000, 8010]}}}, {"accept": null}]}},
        {"rule": {"family": "inet", "table": "firewalld", "chain": "public", "expr": [{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": "10.0.0.9"}}, {"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 9000}}, {"accept": null}]}},
        {"rule": {"family": "inet", "table": "firewalld", "chain": "public", "expr": [{"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": {"set": ["icmp", "ipv6-icmp"]}}}, {"accept": null}]}}"#;

    #[test]
    fn a_redirect_that_would_open_what_firewalld_keeps_closed_is_seen() {
        let rules = nft(FIREWALLD);
        let closed = "inet firewalld filter_INPUT: reject";
        let some = [format!("opens 8081: {closed}"), format!("opens 9000: {closed}")];
        assert_eq!(judged(&rules, "22 8005 8081 9000"), some);
        assert_eq!(judged(&Ruleset::default(), "8081"), [""; 0]);
    }

    /// A short form of the rules of ufw with ports 22 and 8081 open.
    const UFW: &str = "*filter\n:INPUT DROP [0:0]\n:OUTPUT ACCEPT [0:0]\n:ufw-before-input - [0:0]\n:ufw-not-local - [0:0]\n\
        :ufw-user-input - [0:0]\n-A INPUT -j ufw-before-input\n-A INPUT -j ufw-after-logging-input\n\
        -A ufw-before-input -i lo -j ACCEPT\n-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
        -A ufw-before-input -m conntrack --ctstate INVALID -j DROP\n-A ufw-before-input -p icmp -m icmp --icmp-type 3 -j ACCEPT\n\
        -A ufw-before-input -p udp -m udp --sport 67 --dport 68 -j ACCEPT\n-A ufw-before-input -j ufw-not-local\n\
        -A ufw-before-input -j ufw-user-input\n-A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN\n\
        -A ufw-not-local -m addrtype --dst-type MULTICAST -j RETURN\n-A ufw-not-local -j DROP\n\
        -A ufw-user-input -p tcp -m tcp --dport 22 -j ACCEPT\n\
        -A ufw-user-input -p tcp -m tcp --dport 8081 -m comment --comment \"the shop\" -j ACCEPT\nCOMMIT\n";

    #[test]
    fn a_redirect_that_ufw_would_drop_is_seen() {
        let rules = iptables(UFW);
        assert_eq!(
            judged(&rules, "22 8081 9999"),
            ["closes 22: ip filter INPUT: policy drop", "closes 8081: ip filter INPUT: policy drop"]
        );
        let open = iptables(&UFW.replace("--dport 22 ", "--dport 15006 "));
        assert_eq!(judged(&open, "8081"), [""; 0]);
        assert_eq!(
            judged(&open, "9999"),
            ["opens 9999: ip filter INPUT: policy drop"],
            "whoever opens 15006 opens all that is redirected"
        );
    }

    #[test]
    fn the_rules_that_lose_captured_connections_are_named() {
        let chain = |table: &str, hook: &str, prio: i32, policy: &str| {
            format!(
                r#"{{"chain": {{"family": "inet", "table": "{table}", "name": "o", "type": "filter", "hook": "{hook}", "prio": {prio}, "policy": "{policy}"}}}}"#
            )
        };
        let dports = r#"{"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": {"set": [80, 8080]}}}"#;
        let rule = |table: &str, expressions: &str| {
            format!(
                r#"{{"rule": {{"family": "inet", "table": "{table}", "chain": "o", "expr": [{expressions}]}}}}"#
            )
        };
        // A filter that lets out connections to two ports only.
        let loopback = r#"{"match": {"op": "==", "left": {"meta": {"key": "oifname"}}, "right": "lo"}}, {"accept": null}"#;
        let egress = [
            chain("eg", "output", 0, "drop"),
            rule("eg", loopback),
            rule("eg", &format!("{dports}, {{\"accept\": null}}")),
        ];
        assert_eq!(names(&outbound_suspects(&nft(&egress.join(",")), 1, true)), ["inet eg o: policy drop"]);
        // A rule that excludes connections to two ports from tracking.
        let raw =
            [chain("nt", "output", -300, "accept"), rule("nt", &format!("{dports}, {{\"notrack\": null}}"))];
        let raw = nft(&raw.join(","));
        assert_eq!(untracking_rule(&raw, 80).unwrap().to_string(), "inet nt o: tcp dport [80,8080] notrack");
        assert_eq!(untracking_rule(&raw, 81), None);
        // A rule of wg-quick.
        let wireguard = iptables(
            "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -d 10.200.0.2/32 ! -i wg0 -m addrtype ! --src-type LOCAL -j DROP\nCOMMIT\n",
        );
        assert_eq!(
            names(&outbound_suspects(&wireguard, 80, true)),
            ["ip raw PREROUTING: -d 10.200.0.2/32 ! -i wg0 -m addrtype ! --src-type LOCAL -j DROP"]
        );
        assert_eq!(
            names(&outbound_suspects(&nft(FIREWALLD), 80, true)),
            [""; 0],
            "firewalld is in nobody's way"
        );
    }

    #[test]
    fn rules_that_go_round_in_circles_end_and_garbage_is_no_rule() {
        let circle = "*filter\n:INPUT DROP [0:0]\n:a - [0:0]\n-A INPUT -j a\n-A a -j a\n-A a -j a\n-A a -j a\nCOMMIT\n";
        assert_eq!(judged(&iptables(circle), "80"), ["unjudged 80: its chains jump too deep"]);
        for garbage in ["", "[]", "{\"nftables\": 7}", "\0", "*\n-A\n-A x\n:\n"] {
            assert_eq!(judged(&iptables(garbage), "80"), [""; 0]);
            let mut rules = Ruleset::default();
            rules.add_nft(garbage);
            assert_eq!(
                judged(&rules, "80"),
                ["unjudged 80: what `nft -j list ruleset` printed is not understood"]
            );
        }
    }

    #[test]
    fn more_rules_than_are_followed_are_not_taken_for_no_filter() {
        let accepts = "-A INPUT -p udp -j ACCEPT\n".repeat(MAX_STEPS + 1);
        let rules = iptables(&format!(
            "*filter\n:INPUT ACCEPT [0:0]\n{accepts}-A INPUT -p tcp --dport 80 -j DROP\nCOMMIT\n"
        ));
        assert_eq!(judged(&rules, "80"), ["unjudged 80: it has more rules than are followed"]);
    }

    #[test]
    fn ports_that_no_rule_tells_apart_are_judged_together_and_those_beyond_the_bound_are_not_captured() {
        let rules = iptables(
            "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp --dport 8000:8010 -m conntrack ! --ctstate DNAT -j DROP\nCOMMIT\n",
        );
        let drops = "ip filter INPUT: -p tcp --dport 8000:8010 -m conntrack ! --ctstate DNAT -j DROP";
        assert_eq!(judged(&rules, "1-65535"), [format!("opens 8000-8010: {drops}")]);
        assert_eq!(judged(&rules, "1-7999 8011-65535"), [""; 0]);
        let each: String =
            (1..=300).map(|port| format!("-A INPUT -p tcp --dport {port} -j ACCEPT\n")).collect();
        let rules = iptables(&format!("*filter\n:INPUT ACCEPT [0:0]\n{each}COMMIT\n"));
        let why = "its rules tell more than 256 ranges of the captured ports apart";
        assert_eq!(judged(&rules, "1-400"), [format!("unjudged 257-400: {why}")]);
    }

    const NFT_INPUT: &str = r#"{"chain": {"family": "ip", "table": "filter", "name": "input", "type": "filter", "hook": "input", "prio": 0, "policy": "drop"}}"#;

    fn in_input(expressions: &str) -> String {
        format!(
            r#"{{"rule": {{"family": "ip", "table": "filter", "chain": "input", "expr": [{expressions}]}}}}"#
        )
    }

    #[test]
    fn a_table_of_nftables_that_is_called_as_one_of_iptables_counts_unless_iptables_lists_it() {
        let dnat = in_input(
            r#"{"match": {"op": "in", "left": {"ct": {"key": "status"}}, "right": "dnat"}}, {"accept": null}"#,
        );
        let native = format!("{NFT_INPUT}, {dnat}");
        assert_eq!(judged(&nft(&native), "80"), ["opens 80: ip filter input: policy drop"]);
        // iptables over nftables prints a comment for a table that it cannot list.
        let mut rules = nft(&native);
        rules.add_iptables("ip", "# Table `filter' is incompatible, use 'nft' tool.\n");
        assert_eq!(judged(&rules, "80"), ["opens 80: ip filter input: policy drop"]);
        // If iptables lists the chain, that listing is used.
        let chain =
            native.replace("\"input\"", "\"INPUT\"").replace("\"hook\": \"INPUT\"", "\"hook\": \"input\"");
        let saved = "# Generated by iptables-nft-save v1.8.9 (nf_tables) on Sat\n*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n";
        let mut rules = nft(&chain);
        rules.add_iptables("ip", saved);
        assert_eq!(judged(&rules, "80"), [""; 0]);
        // Legacy iptables has a separate table of the same name.
        let mut rules = nft(&chain);
        rules.add_iptables("ip", &saved.replace("-nft", "").replace(" (nf_tables)", ""));
        assert_eq!(judged(&rules, "80"), ["opens 80: ip filter INPUT: policy drop"]);
    }

    #[test]
    fn verdict_maps_are_followed_to_where_they_lead() {
        let state = in_input(
            r#"{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [["established", {"accept": null}], ["invalid", {"drop": null}]]}}}"#,
        );
        let from = in_input(
            r#"{"vmap": {"key": {"meta": {"key": "iifname"}}, "data": {"set": [["lo", {"accept": null}], ["*", {"jump": {"target": "world"}}]]}}}"#,
        );
        let world = r#"{"chain": {"family": "ip", "table": "filter", "name": "world"}}"#;
        let ports = r#"{"map": {"family": "ip", "name": "m", "table": "filter", "type": "inet_service", "map": "verdict", "elem": [[22, {"accept": null}], [{"range": [80, 90]}, {"drop": null}], [{"elem": {"val": 99, "timeout": 9}}, {"goto": {"target": "closed"}}]]}}"#;
        let closed = r#"{"chain": {"family": "ip", "table": "filter", "name": "closed"}}"#;
        let rule = |chain: &str, expressions: &str| {
            in_input(expressions).replace("\"chain\": \"input\"", &format!("\"chain\": \"{chain}\""))
        };
        let by_port = rule(
            "world",
            r#"{"vmap": {"key": {"payload": {"protocol": "tcp", "field": "dport"}}, "data": "@m"}}"#,
        );
        let rejects = rule("closed", r#"{"reject": null}"#);
        let open = NFT_INPUT.replace("\"drop\"", "\"accept\"");
        let items = [open.as_str(), world, closed, &state, &from, &by_port, &rejects, ports].join(", ");
        let by_map = "ip filter world: tcp dport vmap @m";
        assert_eq!(
            judged(&nft(&items), "22 70 80-90 91 99"),
            [format!("opens 80-90: {by_map}"), "opens 99: ip filter closed: reject".to_owned()]
        );
        // Without the default entry, packets of other interfaces continue.
        let items = items.replace(
            "[\"*\", {\"jump\": {\"target\": \"world\"}}]",
            "[\"eth7\", {\"jump\": {\"target\": \"world\"}}]",
        );
        assert_eq!(judged(&nft(&items), "80"), [format!("opens 80: {by_map}")]);
    }

    #[test]
    fn rules_that_cannot_be_read_keep_the_last_complete_verdict_for_a_while_and_are_judged_once() {
        let now = Instant::now();
        let mut judge = InboundJudge::default();
        let mut gap = Ruleset::default();
        gap.add_gap("nft is slow");
        judge.set_rules(gap.clone());
        assert_eq!(shown(&judge.judge(&ports("80"), now).conflicts), ["unjudged 80: nft is slow"]);
        judge.forget();
        assert_eq!(
            shown(&judge.judge(&ports("80"), now).conflicts),
            ["unjudged 80: its rules have not been read"]
        );
        judge.set_rules(nft(FIREWALLD));
        let closed = "opens 80: inet firewalld filter_INPUT: reject";
        let first = judge.judge(&ports("22 80"), now);
        assert_eq!(shown(&first.conflicts), [closed]);
        assert!(Arc::ptr_eq(&first, &judge.judge(&ports("22 80"), now)), "judged once");
        assert!(!Arc::ptr_eq(&first, &judge.judge(&ports("22"), now)));
        judge.judge(&ports("22 80"), now);
        judge.forget();
        judge.set_rules(gap);
        let kept = judge.judge(&ports("22 80"), now + VERDICT_VALID_FOR / 2);
        assert_eq!(
            (shown(&kept.conflicts), kept.outdated.as_deref()),
            (vec![closed.to_owned()], Some("nft is slow"))
        );
        assert_eq!(
            shown(&judge.judge(&ports("22"), now).conflicts),
            ["unjudged 22: nft is slow"],
            "never judged"
        );
        let after = judge.judge(&ports("22 80"), now + VERDICT_VALID_FOR);
        assert_eq!(shown(&after.conflicts), ["unjudged 22: nft is slow", "unjudged 80: nft is slow"]);
    }
}
