//! Suspects: the foreign rules that may have dropped a captured connection.

use std::collections::BTreeSet;

use super::packet::{Packet, PacketHook};
use super::ruleset::{ForeignRule, Ruleset};
use super::{MAX_JUDGED_RANGES, MAX_STEPS_OF_ALL};
use crate::spec::{INBOUND_PORT, OUTBOUND_PORT, Ports};

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
