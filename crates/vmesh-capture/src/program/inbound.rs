//! Compiles the inbound chains.

use std::collections::BTreeSet;

use super::builder::ProgramBuilder;
use super::ranges::{common_ports, ports_without, singles};
use super::rules::{Chain, Hook, Match, Rule, Verdict, chain_at};
use super::{ARRIVED, ARRIVING, Direction};
use crate::spec::{BypassFilter, INBOUND_PORT, InboundCapture, OnLoss};

impl ProgramBuilder<'_> {
    /// Compiles the inbound chains: those that capture, and those that refuse strict ports.
    pub(super) fn inbound(&mut self) {
        self.note_inbound_ports();
        let inbound = &self.spec.inbound;
        let rules = self.captured_ports();
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
                    let mut counts = chain_at(name, hook);
                    counts.rule("new", [Match::Redirected(INBOUND_PORT)], Verdict::Count);
                    self.chains.push(counts);
                }
            }
            InboundCapture::Tproxy => {
                let mut chain = self.inbound_chain("inbound", Hook::Tproxy);
                for (name, when) in rules {
                    chain.rule(name, when, Verdict::Tproxy(INBOUND_PORT));
                }
                if !inbound.strict.is_empty() {
                    // The refusal belongs into this chain. In the `input` chain, a packet that TPROXY sent to
                    // Envoy would look the same.
                    chain.rules.push(self.refusal(Verdict::Drop));
                }
                self.chains.push(chain);
                return;
            }
        }
        if !inbound.strict.is_empty() {
            let mut chain = self.inbound_chain("strict", Hook::Strict);
            chain.rules.push(self.refusal(Verdict::Reset));
            self.chains.push(chain);
        }
    }

    /// Adds a note for each port of the spec that has no effect.
    fn note_inbound_ports(&mut self) {
        let inbound = &self.spec.inbound;
        let never: BTreeSet<u16> = self.ssh().into_iter().chain(self.own()).collect();
        for (subject, ports) in [("inbound.ports", &inbound.ports), ("inbound.strict", &inbound.strict)] {
            for port in never.iter().filter(|port| ports.iter().any(|ports| ports.contains(**port))) {
                let owner = if self.own().contains(port) { "a port of Envoy or of the agent" } else { "SSH" };
                self.note(subject, format!("{port} is not captured: it is {owner}"));
            }
        }
        if let BypassFilter::Ports(ports) = &inbound.bypass_filter {
            for ports in ports_without(ports, &inbound.ports) {
                let message = format!("{ports} has no effect: it is not among the captured ports");
                self.note("inbound.bypass_filter", message);
            }
        }
    }

    /// Returns the conditions of the captured ports: of those that may fail open, and of those that fail
    /// closed.
    fn captured_ports(&self) -> Vec<(&'static str, Vec<Match>)> {
        let inbound = &self.spec.inbound;
        let captured =
            if inbound.capture == InboundCapture::Off { BTreeSet::new() } else { inbound.ports.clone() };
        // Strict ports are captured by the rule that does not lapse.
        let closed = if inbound.on_loss == OnLoss::Closed {
            captured.clone()
        } else {
            common_ports(&captured, &inbound.strict)
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
        rules
    }

    /// Returns the rule that refuses connections to strict ports.
    fn refusal(&self, then: Verdict) -> Rule {
        let mut when = vec![Match::ToThisHost, Match::Syn, Match::Ports(self.spec.inbound.strict.clone())];
        when.extend(self.alive(Direction::Inbound, OnLoss::Closed));
        Rule { name: "strict".to_owned(), when, then }
    }

    /// Creates an inbound chain, which begins with the traffic that is never captured.
    fn inbound_chain(&self, name: &str, hook: Hook) -> Chain {
        let mut chain = chain_at(name, hook);
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
