//! Compiles the outbound chains.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::builder::ProgramBuilder;
use super::callers::cgroups;
use super::ranges::singles;
use super::rules::{Chain, Hook, Match, Verdict, chain_at};
use super::{Direction, INCLUDE};
use crate::host::ParentCgroup;
use crate::spec::{Cidr, OUTBOUND_PORT, OnLoss, OutboundCapture, Percent};

/// The port of DNS over TCP. Name resolution must not depend on names, so it is not captured.
const DNS: u16 = 53;
/// The link-local networks, which are never routed. Clouds have their metadata service in one of them.
const LINK_LOCAL: [Cidr; 2] = [Cidr::v4(169, 254, 0, 0, 16), Cidr::v6(0xfe80, 10)];

impl ProgramBuilder<'_> {
    /// Compiles the outbound chains. A packet passes `outbound` (callers and ports that are never captured),
    /// `captured` (virtual addresses), then `captured_known` and `included_*` (real addresses that may be
    /// captured), then `to_<percent>` (redirects).
    pub(super) fn outbound(&mut self) {
        let gate = self.caller_chain();
        self.note_ssh_addresses();
        let captured = self.virtual_addresses();
        if self.spec.outbound.capture == OutboundCapture::Vip {
            self.chains.extend([gate, captured]);
            return;
        }
        let mut chains = vec![gate];
        let mut captured = self.exclude_unknown_cgroups(captured, &mut chains);
        self.exclude_destinations(&mut captured);
        let last = self.include_destinations(captured, &mut chains);
        self.share_chains(last, &mut chains);
        self.chains.extend(chains);
    }

    /// Compiles the chain `outbound`: the traffic that is never captured, and the callers that may be.
    fn caller_chain(&mut self) -> Chain {
        let out = &self.spec.outbound;
        let mut gate = chain_at("outbound", Hook::Outbound);
        let never = &self.host.never;
        if !never.users.is_empty() {
            gate.rule("envoy", [Match::Users(never.users.clone())], Verdict::Return);
        }
        cgroups(never.slices.clone(), &mut gate, "envoy", &Verdict::Return);
        gate.ports("ssh", singles(&self.ssh()), Verdict::Return);
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
        gate
    }

    /// Adds a note for each address that is not captured because its port is SSH.
    fn note_ssh_addresses(&mut self) {
        let ssh = self.ssh();
        let addresses = &self.spec.outbound.addresses;
        for address in addresses.keys().filter(|address| ssh.contains(&address.port())) {
            let message =
                format!("{address} is not captured: port {} is SSH, which never is", address.port());
            self.note("outbound.addresses", message);
        }
    }

    /// Begins the chain `captured` with the redirect of the virtual addresses.
    fn virtual_addresses(&mut self) -> Chain {
        let mut captured = Chain { name: "captured".to_owned(), hook: None, rules: Vec::new() };
        let vips = self.vips();
        if !vips.is_empty() {
            // This redirect lapses during a trial only. Later it must not: a connection to a virtual address
            // that is not captured has nowhere to go.
            let mut when = vec![Match::Pairs(vips)];
            when.extend(self.alive(Direction::Outbound, OnLoss::Closed));
            captured.rule("vips", when, Verdict::Redirect(OUTBOUND_PORT));
        }
        captured
    }

    /// Adds the rules for real addresses that are not captured.
    fn exclude_destinations(&self, captured: &mut Chain) {
        captured.rule("loopback", [Match::OutLoopback], Verdict::Return);
        captured.rule("this_host", [Match::ToThisHost], Verdict::Return);
        captured.rule("link_local", [Match::Destinations(LINK_LOCAL.into())], Verdict::Return);
        captured.ports("dns", singles(&[DNS].into()), Verdict::Return);
        let exclude = &self.spec.outbound.exclude;
        captured.ports("exclude_ports", exclude.ports.clone(), Verdict::Return);
        if !exclude.cidrs.is_empty() {
            captured.rule("exclude_cidrs", [Match::Destinations(exclude.cidrs.clone())], Verdict::Return);
        }
        if !exclude.interfaces.is_empty() {
            let interfaces = exclude.interfaces.iter().map(ToString::to_string).collect();
            captured.rule("exclude_interfaces", [Match::OutInterfaces(interfaces)], Verdict::Return);
        }
    }

    /// Adds the rules for the destinations in `include`. A destination must match every list that is given, so
    /// each list gets its own chain, which continues to the next list. Returns the chain to continue with.
    fn include_destinations(&self, captured: Chain, chains: &mut Vec<Chain>) -> Chain {
        let include = &self.spec.outbound.include;
        let interfaces = include.interfaces.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
        let lists = [
            ("ports", (!include.ports.is_empty()).then(|| Match::Ports(include.ports.clone()))),
            ("cidrs", (!include.cidrs.is_empty()).then(|| Match::Destinations(include.cidrs.clone()))),
            ("interfaces", (!interfaces.is_empty()).then_some(Match::OutInterfaces(interfaces))),
        ];
        let mut last = captured;
        for (kind, list) in lists.into_iter().filter_map(|(kind, list)| Some((kind, list?))) {
            let next = format!("included_{kind}");
            last.rule(format!("include_{kind}"), [list], Verdict::Goto(next.clone()));
            chains.push(last);
            last = Chain { name: next, hook: None, rules: Vec::new() };
        }
        last
    }

    /// Adds a chain for each share. The last chain sends a caller to the chain of its own share, or else to the
    /// chain of the whole.
    fn share_chains(&mut self, mut last: Chain, chains: &mut Vec<Chain>) {
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
                self.note(
                    "outbound.vips",
                    format!(
                        "{vip} is not captured: a virtual address must be one that another host could have"
                    ),
                );
            } else {
                vips.insert(*vip);
            }
        }
        vips
    }
}

fn to(share: Percent) -> String {
    format!("to_{}", share.get())
}
