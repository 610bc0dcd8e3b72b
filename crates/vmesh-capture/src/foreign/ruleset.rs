//! The foreign rules of a host, and their evaluation for one packet.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::packet::{Condition, Packet, PacketHook, Tristate};
use crate::program::merged_ports;
use crate::spec::Ports;

/// The limit of rules that are followed for one packet. A longer ruleset is not judged.
pub(super) const MAX_STEPS: usize = 100_000;
/// The limit of nested jumps. The kernel allows 16 in nftables.
const MAX_DEPTH: usize = 24;
/// The limit of rules that are stored; each entry of a verdict map counts as one.
const MAX_RULES: usize = 400_000;
/// The limit of a rule's text in messages, in characters.
const MAX_TEXT: usize = 200;

/// The verdict of a foreign rule, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum RuleAction {
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
pub(super) struct ParsedRule {
    pub(super) conditions: Vec<Condition>,
    pub(super) action: RuleAction,
    pub(super) text: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ParsedChain {
    /// For a base chain: its hook, its priority, and whether its policy is `drop`.
    pub(super) base: Option<(PacketHook, i64, bool)>,
    pub(super) rules: Vec<ParsedRule>,
}

/// The listing that a chain was read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Listing {
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
    pub(super) chains: BTreeMap<(Listing, String, String), ParsedChain>,
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
pub(super) struct Outcome {
    pub(super) accepts: Option<ForeignRule>,
    pub(super) drops: Vec<ForeignRule>,
    /// Whether the packet may reach the end of a chain without a verdict.
    pub(super) falls_through: bool,
    /// A rule that certainly keeps the connection from being tracked.
    pub(super) untracked: Option<ForeignRule>,
    /// The limit at which the evaluation stopped. All other fields are meaningless then.
    pub(super) gave_up: Option<&'static str>,
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
    pub(super) fn split_by_rules(&self, ports: &BTreeSet<Ports>) -> impl Iterator<Item = Ports> {
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
    pub(super) fn judge(&self, packet: &Packet, left: &mut usize) -> Outcome {
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
            return Outcome { gave_up: Some("its chains jump too deeply"), ..outcome };
        }
        let (listing, table, name) = key;
        for rule in &chain.rules {
            *steps += 1;
            if *steps > budget {
                outcome.gave_up = Some("it has more rules than vmesh evaluates");
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

    pub(super) fn add_rules(&mut self, key: (Listing, String, String), rules: Vec<ParsedRule>) {
        if self.rules + rules.len() > MAX_RULES {
            self.add_gap(format!("it has more than {MAX_RULES} rules"));
            return;
        }
        self.rules += rules.len();
        self.chains.entry(key).or_default().rules.extend(rules);
    }
}

pub(super) fn shortened(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_TEXT).collect()
}
