//! The iptables and ip6tables backend, for hosts without nft: chains of vmesh's own, and one jump to each of
//! them at the top of a built-in chain.
//!
//! Each table of each family is changed in one transaction, with `--noflush` and under the lock that all
//! programs share. There are no sets: each address gets a rule, so nftables is better for thousands of
//! addresses. The dead-man timer is a list of the `recent` match with one entry, which stands for all
//! clients.
//!
//! One difference from nftables: TPROXY to an Envoy that does not listen loses packets until the dead-man
//! timer lapses. While the kernel sends SYN cookies, connections through TPROXY are expected to fail (this
//! was not tested).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::plan::{Change, ChangeKind, Label, Plan, Step, Tool, compare_rules};
use crate::program::{
    Chain, Direction, Hook, Match, Program, Rule, Verdict, is_family, merged_ports, outermost,
};
use crate::spec::Ports;

const PREFIX: &str = "VMESH_";
/// The number of ports that one `multiport` match takes; a range counts as two.
const MAX_PORTS: usize = 15;
const TABLES: [&str; 3] = ["nat", "mangle", "filter"];

/// The rules of vmesh that iptables and ip6tables have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IptablesRules {
    pub(crate) v4: FamilyRules,
    /// The rules for IPv6; `None` if the host has none.
    pub(crate) v6: Option<FamilyRules>,
}

/// The rules of one address family, read from `iptables-save`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FamilyRules(BTreeMap<String, ActualTable>);

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct ActualTable {
    /// The chains of vmesh.
    chains: BTreeMap<String, Vec<Option<Label>>>,
    jumps: Vec<ActualJump>,
    /// For each built-in chain: the number of foreign rules, and whether the policy is `ACCEPT`.
    base: BTreeMap<String, (usize, bool)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct ActualJump {
    chain: String,
    /// The number of rules before the jump in its chain.
    before: usize,
    /// The text of the rule, without `-A`.
    text: String,
    label: Option<Label>,
}

/// The chains and tables that existed before the first rule of vmesh. With iptables over nftables, chains and
/// tables appear with their first rule and stay when it is removed. This list is kept on the disk with the
/// rest of the state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Footprint {
    /// Family, table and chain, separated by spaces: `ip nat OUTPUT`.
    chains: BTreeSet<String>,
    /// Family and table: `ip nat`.
    tables: BTreeSet<String>,
}

impl IptablesRules {
    /// Returns the state of a host without rules of vmesh.
    pub fn absent(ipv6: bool) -> IptablesRules {
        IptablesRules { v4: FamilyRules::default(), v6: ipv6.then(FamilyRules::default) }
    }
}

impl FamilyRules {
    /// Parses the output of `iptables-save`.
    pub fn parse(text: &str) -> FamilyRules {
        let mut family = FamilyRules::default();
        let mut table = None;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = Some(family.0.entry(name.trim().to_owned()).or_default());
                continue;
            }
            let Some(table) = table.as_deref_mut() else { continue };
            if let Some(declared) = line.strip_prefix(':') {
                let mut words = declared.split_whitespace();
                let (Some(name), policy) = (words.next(), words.next()) else { continue };
                if name.starts_with(PREFIX) {
                    table.chains.entry(name.to_owned()).or_default();
                } else if policy != Some("-") {
                    table.base.insert(name.to_owned(), (0, policy == Some("ACCEPT")));
                }
            } else if let Some(rule) = line.strip_prefix("-A ") {
                table.add(rule);
            }
        }
        family
    }
}

impl ActualTable {
    fn add(&mut self, rule: &str) {
        let chain = rule.split(' ').next().unwrap_or_default();
        let label = comment(rule).and_then(Label::parse);
        if let Some(rules) = self.chains.get_mut(chain) {
            rules.push(label);
            return;
        }
        let before = self.base.get(chain).map_or(0, |(rules, _)| *rules)
            + self.jumps.iter().filter(|jump| jump.chain == chain).count();
        let mut words = rule.split(' ');
        let goes = words.any(|word| word == "-j" || word == "-g");
        if goes && words.next().is_some_and(|to| to.starts_with(PREFIX)) {
            self.jumps.push(ActualJump { chain: chain.to_owned(), before, text: rule.to_owned(), label });
        } else if let Some((rules, _)) = self.base.get_mut(chain) {
            *rules += 1;
        }
    }
}

fn comment(rule: &str) -> Option<&str> {
    let (_, rest) = rule.split_once("--comment \"")?;
    Some(rest.split_once('"')?.0)
}

/// Plans the changes that make the host match `program`. The dead-man timer is not part of a plan: see
/// [`crate::apply::Applier::renew_all_timers`].
pub fn plan(program: &Program, actual: &IptablesRules) -> Plan {
    let mut plan = Plan::default();
    let families = [(true, Some(&actual.v4)), (false, actual.v6.as_ref())];
    for (v4, now) in families.into_iter().filter_map(|(v4, now)| Some((v4, now?))) {
        let mut input = String::new();
        for table in TABLES {
            let wanted = if v4 || program.ipv6 {
                TargetTables::of(program, table, v4)
            } else {
                TargetTables::default()
            };
            let nothing = ActualTable::default();
            let (text, changes) = wanted.transaction(table, now.0.get(table).unwrap_or(&nothing), v4);
            input.push_str(&text);
            plan.changes.extend(changes);
        }
        if !input.is_empty() {
            let tool = if v4 { Tool::IptablesRestore } else { Tool::Ip6tablesRestore };
            plan.steps.push(Step { tool, input });
        }
    }
    plan
}

/// The chains and jumps that one table is to have.
#[derive(Default)]
struct TargetTables {
    chains: Vec<(String, Vec<(Label, String)>)>,
    /// For each jump: the built-in chain that contains it, its label and its text.
    jumps: Vec<(&'static str, Label, String)>,
}

/// Returns the table of a chain, and the built-in chain that jumps to it.
fn home(chain: &Chain) -> (&'static str, Option<&'static str>) {
    match chain.hook {
        Some(Hook::Outbound) => ("nat", Some("OUTPUT")),
        Some(Hook::Inbound) => ("nat", Some("PREROUTING")),
        Some(Hook::Tproxy) => ("mangle", Some("PREROUTING")),
        Some(Hook::Strict) => ("filter", Some("INPUT")),
        Some(Hook::Arriving) => ("mangle", Some("INPUT")),
        // `nat` comes after the tables `filter` and `security`.
        Some(Hook::Arrived) => ("nat", Some("INPUT")),
        // The chain has an effect by its mere existence.
        Some(Hook::Hold) | None => ("nat", None),
    }
}

impl TargetTables {
    fn of(program: &Program, table: &str, v4: bool) -> TargetTables {
        let mut wanted = TargetTables::default();
        let seconds = program.alive.map_or(0, |(timeout, _)| timeout.get());
        for chain in &program.chains {
            let (home, base) = home(chain);
            if home != table {
                continue;
            }
            let name = chain_name(&chain.name);
            let mut rules = Vec::new();
            for rule in &chain.rules {
                let texts = spelled(rule, v4, seconds);
                let several = texts.len() > 1;
                for (number, text) in texts.into_iter().enumerate() {
                    let rule_name =
                        if several { format!("{}#{number}", rule.name) } else { rule.name.clone() };
                    rules.push((
                        Label::of(
                            &rule_name,
                            &format!("{text}{}{}", rule.identity(), rule.identity_of_sets()),
                        ),
                        text,
                    ));
                }
            }
            if let Some(base) = base {
                // Only pure SYNs enter the chain, so open connections are not touched.
                let text = format!("-p tcp --syn -j {name}");
                wanted.jumps.push((base, Label::of("jump", &text), text));
            }
            wanted.chains.push((name, rules));
        }
        wanted
    }

    /// Compares the chains and their rules. `unwanted` are the chains of `now` that the program does not have.
    fn chain_changes(
        &self,
        family: &str,
        table: &str,
        now: &ActualTable,
        unwanted: &[&String],
    ) -> Vec<Change> {
        let mut changes = Vec::new();
        for (name, rules) in &self.chains {
            let place = format!("{family} {table} {name}");
            match now.chains.get(name) {
                None => changes.push(Change { kind: ChangeKind::Missing, place }),
                Some(there) => {
                    let labels: Vec<Label> = rules.iter().map(|(label, _)| label.clone()).collect();
                    changes.extend(compare_rules(&place, &labels, there));
                }
            }
        }
        let gone =
            |name: &&String| Change { kind: ChangeKind::Unwanted, place: format!("{family} {table} {name}") };
        changes.extend(unwanted.iter().map(gone));
        changes
    }

    /// Returns the input of `iptables-restore` that brings this table to the program, and the differences.
    fn transaction(&self, table: &str, now: &ActualTable, v4: bool) -> (String, Vec<Change>) {
        let family = if v4 { "ip" } else { "ip6" };
        let unwanted: Vec<&String> =
            now.chains.keys().filter(|name| !self.chains.iter().any(|(wanted, _)| wanted == *name)).collect();
        let mut changes = self.chain_changes(family, table, now, &unwanted);
        let right = |jump: &ActualJump, base: &str, label: &Label| {
            jump.chain == base && jump.label.as_ref() == Some(label) && jump.before == 0
        };
        let mut missing = Vec::new();
        for (base, label, text) in &self.jumps {
            if !now.jumps.iter().any(|jump| right(jump, base, label)) {
                let elsewhere = now.jumps.iter().any(|jump| jump.label.as_ref() == Some(label));
                let (kind, fault) = if elsewhere {
                    (ChangeKind::Different, "is not the first rule")
                } else {
                    (ChangeKind::Missing, "is missing")
                };
                changes.push(Change {
                    kind,
                    place: format!("{family} {table} {base}: the jump to vmesh's chain {fault}"),
                });
                missing.push((base, label, text));
            }
        }
        let wrong = |jump: &&ActualJump| !self.jumps.iter().any(|(base, label, _)| right(jump, base, label));
        let wrong: Vec<&ActualJump> = now.jumps.iter().filter(wrong).collect();
        if missing.is_empty() {
            changes.extend(wrong.iter().map(|jump| Change {
                kind: ChangeKind::Unwanted,
                place: format!("{family} {table} {}: a jump to vmesh's chain", jump.chain),
            }));
        }
        if changes.is_empty() {
            return (String::new(), changes);
        }
        let mut text = format!("*{table}\n");
        for (name, _) in &self.chains {
            // This line creates the chain, or empties it.
            _ = writeln!(text, ":{name} - [0:0]");
        }
        for jump in wrong {
            _ = writeln!(text, "-D {}", jump.text);
        }
        for verb in ["-F", "-X"] {
            for name in &unwanted {
                _ = writeln!(text, "{verb} {name}");
            }
        }
        for (name, rules) in &self.chains {
            for (label, rule) in rules {
                _ = writeln!(text, "-A {name} -m comment --comment \"{label}\" {rule}");
            }
        }
        for (base, label, jump) in missing {
            _ = writeln!(text, "-I {base} 1 -m comment --comment \"{label}\" {jump}");
        }
        text.push_str("COMMIT\n");
        (text, changes)
    }
}

pub(crate) fn chain_name(name: &str) -> String {
    format!("{PREFIX}{}", name.to_ascii_uppercase())
}

/// Returns the rules of iptables that together have the effect of `rule` in one family.
fn spelled(rule: &Rule, v4: bool, seconds: u32) -> Vec<String> {
    let mut texts = vec![if rule.then == Verdict::Nothing { String::new() } else { "-p tcp".to_owned() }];
    for condition in &rule.when {
        let ways = ways(condition, v4, seconds);
        texts = texts.iter().flat_map(|text| ways.iter().map(move |way| format!("{text}{way}"))).collect();
    }
    let verdict = match &rule.then {
        Verdict::Return | Verdict::Nothing | Verdict::Count => "-j RETURN".to_owned(),
        Verdict::Goto(chain) => format!("-g {}", chain_name(chain)),
        Verdict::Redirect(port) => format!("-j REDIRECT --to-ports {port}"),
        Verdict::Tproxy(port) => format!("-j TPROXY --on-port {port}"),
        Verdict::Drop => "-j DROP".to_owned(),
        Verdict::Reset => "-j REJECT --reject-with tcp-reset".to_owned(),
    };
    texts.into_iter().map(|text| format!("{text} {verdict}").trim_start().to_owned()).collect()
}

/// Returns the alternatives under which a condition holds, each as arguments with a leading space.
fn ways(condition: &Match, v4: bool, seconds: u32) -> Vec<String> {
    let one = |text: &str| vec![text.to_owned()];
    match condition {
        // The jump to the chain already matches SYNs only.
        Match::Syn => one(""),
        Match::OutLoopback => one(" -o lo"),
        Match::InLoopback => one(" -i lo"),
        Match::ToThisHost => one(" -m addrtype --dst-type LOCAL"),
        Match::Users(users) => users.iter().map(|user| format!(" -m owner --uid-owner {user}")).collect(),
        Match::Groups(groups) => {
            groups.iter().map(|group| format!(" -m owner --gid-owner {group}")).collect()
        }
        Match::Cgroup(group) => vec![format!(" -m cgroup --path {}", group.path)],
        Match::AnyCgroup(groups) => {
            groups.iter().map(|group| format!(" -m cgroup --path {}", group.path)).collect()
        }
        Match::OutInterfaces(names) => names.iter().map(|name| format!(" -o {name}")).collect(),
        Match::InInterfaces(names) => names.iter().map(|name| format!(" -i {name}")).collect(),
        Match::Destinations(cidrs) | Match::Sources(cidrs) => {
            let flag = if matches!(condition, Match::Sources(_)) { "-s" } else { "-d" };
            let cidrs = outermost(cidrs).into_iter().filter(|cidr| cidr.is_ipv4() == v4);
            cidrs.map(|cidr| format!(" {flag} {cidr}")).collect()
        }
        Match::Ports(ports) => multiport(&merged_ports(ports)),
        Match::Pairs(pairs) => {
            let pairs = pairs.iter().filter(|pair| is_family(pair.ip(), v4));
            pairs.map(|pair| format!(" -d {} -m tcp --dport {}", pair.ip(), pair.port())).collect()
        }
        Match::Percent(percent) => {
            vec![format!(" -m statistic --mode random --probability 0.{:02}", percent.get())]
        }
        Match::Alive(direction) => {
            let (name, mask) = recent(*direction, v4);
            vec![format!(" -m recent --name {name} --mask {mask} --rcheck --seconds {seconds}")]
        }
        Match::Untracked => one(" -m conntrack --ctstate INVALID"),
        Match::Redirected(port) => {
            let conntrack = " -m conntrack --ctstate NEW -m conntrack --ctstate DNAT";
            vec![format!(" -m tcp --dport {port}{conntrack}")]
        }
    }
}

fn multiport(ports: &BTreeSet<Ports>) -> Vec<String> {
    let mut lists: Vec<(usize, String)> = Vec::new();
    for ports in ports {
        let (cost, text) = if ports.first() == ports.last() {
            (1, ports.first().to_string())
        } else {
            (2, format!("{}:{}", ports.first(), ports.last()))
        };
        match lists.last_mut() {
            Some((count, list)) if *count + cost <= MAX_PORTS => {
                *count += cost;
                _ = write!(list, ",{text}");
            }
            _ => lists.push((cost, text)),
        }
    }
    lists.into_iter().map(|(_, list)| format!(" -m multiport --dports {list}")).collect()
}

/// Returns the name of a direction's dead-man list, and the mask that maps all clients to one entry.
pub(crate) fn recent(direction: Direction, v4: bool) -> (&'static str, &'static str) {
    match (direction, v4) {
        (Direction::Outbound, true) => ("vmesh4", "0.0.0.0"),
        (Direction::Outbound, false) => ("vmesh6", "::"),
        (Direction::Inbound, true) => ("vmesh_inbound4", "0.0.0.0"),
        (Direction::Inbound, false) => ("vmesh_inbound6", "::"),
    }
}

impl Footprint {
    /// Parses the output of `nft -j list chains` and `nft -j list tables`. `None` if it is not valid JSON of
    /// nft.
    pub fn parse(listings: &[&str]) -> Option<Footprint> {
        let mut footprint = Footprint::default();
        let text = |value: &Value, key: &str| Some(value.get(key)?.as_str()?.to_owned());
        let is_iptables =
            |family: &str, table: &str| (family == "ip" || family == "ip6") && TABLES.contains(&table);
        for listing in listings {
            let value: Value = serde_json::from_str(listing).ok()?;
            for item in value.get("nftables")?.as_array()? {
                if let Some(chain) = item.get("chain") {
                    let (family, table) = (text(chain, "family")?, text(chain, "table")?);
                    let name = text(chain, "name")?;
                    // The name may be used in a command of nft, so a name with special characters is ignored.
                    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
                    if is_iptables(&family, &table) && name.chars().all(plain) {
                        footprint.chains.insert(format!("{family} {table} {name}"));
                    }
                } else if let Some(table) = item.get("table") {
                    let (family, name) = (text(table, "family")?, text(table, "name")?);
                    if is_iptables(&family, &name) {
                        footprint.tables.insert(format!("{family} {name}"));
                    }
                }
            }
        }
        Some(footprint)
    }
}

/// Plans the removal of the chains and tables that came with the first rule of vmesh: those that `before`
/// does not contain and that are empty now. Apply it after vmesh's own chains are removed.
pub fn leftovers(before: &Footprint, now: &Footprint, actual: &IptablesRules) -> Plan {
    let mut plan = Plan::default();
    let mut input = String::new();
    let is_empty = |family: &str, table: &str, chain: &str| {
        let family = if family == "ip" { Some(&actual.v4) } else { actual.v6.as_ref() };
        let table = family.and_then(|family| family.0.get(table));
        table.and_then(|table| table.base.get(chain)).is_some_and(|(rules, accepts)| *rules == 0 && *accepts)
    };
    let mut left: BTreeSet<&str> = BTreeSet::new();
    let mut remove = |kind: &str, name: &str| {
        _ = writeln!(input, "delete {kind} {name}");
        plan.changes
            .push(Change { kind: ChangeKind::Unwanted, place: format!("{kind} {name}, which is empty") });
    };
    for chain in &now.chains {
        let mut words = chain.split(' ');
        let (Some(family), Some(table), Some(name)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        if !before.chains.contains(chain) && is_empty(family, table, name) {
            remove("chain", chain);
        } else if let Some((table, _)) = chain.rsplit_once(' ') {
            left.insert(table);
        }
    }
    for table in &now.tables {
        if !before.tables.contains(table) && !left.contains(table.as_str()) {
            remove("table", table);
        }
    }
    if !input.is_empty() {
        plan.steps.push(Step { tool: Tool::Nft, input });
    }
    plan
}
