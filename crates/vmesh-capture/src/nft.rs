//! The nftables backend: one table, `inet vmesh`.
//!
//! Nothing that iptables does changes this table. Neither should reloads of firewalld and Docker, as long as
//! they touch only their own tables (this was not tested). `nft flush ruleset`, which a restart of
//! nftables.service runs, removes it, and vmesh-net then applies it again.
//!
//! The table is replaced in one transaction, so no packet ever sees half of it, and connections through a
//! redirect stay open. If only elements of sets differ, only these are changed.
//!
//! nft finds control groups only below `/sys/fs/cgroup`, so rules by unit need control groups of version 2 to
//! be mounted there.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use serde_json::Value;

use crate::host::Cgroup;
use crate::plan::{Change, ChangeKind, Label, Plan, Step, Tool, compare_rules};
use crate::program::{
    Direction, Directions, Hook, Match, Program, Rule, Verdict, is_family, merged_ports, outermost,
};
use crate::spec::{Cidr, Ports, Seconds};

pub(crate) const TABLE: &str = "inet vmesh";
/// Returns the name of the set that represents the dead-man timer of a direction: while it has its element,
/// redirects hold.
fn alive_set(direction: Direction) -> &'static str {
    match direction {
        Direction::Outbound => "alive",
        Direction::Inbound => "alive_inbound",
    }
}

const PURE_SYN: &str = "tcp flags & (fin|syn|rst|ack)";

/// The content of vmesh's table.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NftRules {
    exists: bool,
    sets: BTreeMap<String, Elements>,
    chains: BTreeMap<String, ActualChain>,
    /// True if a dead-man timer is running.
    pub alive: bool,
}

#[derive(Debug, Clone, Default, PartialEq)]
struct ActualChain {
    hook: Option<String>,
    rules: Vec<Option<Label>>,
}

/// The output of `nft -j list table inet vmesh` is not valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("could not parse the output of `nft -j`: {0}")]
pub struct InvalidListing(String);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Elements {
    Pairs(BTreeSet<SocketAddr>),
    Cidrs(BTreeSet<Cidr>),
    Ports(BTreeSet<Ports>),
    Users(BTreeSet<u32>),
    Groups(BTreeSet<u32>),
    Interfaces(BTreeSet<String>),
    /// Control groups by path. The kernel stores ids, so nft lists one that was removed or created anew as
    /// something other than its path.
    Cgroups(BTreeSet<String>),
    Alive,
    /// Elements of a type that vmesh does not use.
    Unknown,
}

/// A [`Program`] translated to nftables.
struct TargetTable {
    /// The sets by name. The flag says whether a set holds IPv4 addresses.
    sets: BTreeMap<String, (Elements, bool)>,
    chains: Vec<TableChain>,
}

struct TableChain {
    name: String,
    hook: Option<Hook>,
    rules: Vec<(Label, String)>,
}

/// Plans the changes that make the host match `program`. Redirects that lapse hold at once in the directions
/// of `alive`; in others they begin to hold when the dead-man timer is first renewed.
pub fn plan(program: &Program, actual: &NftRules, alive: impl Into<Directions>) -> Plan {
    if program.is_absent() {
        return absent(actual);
    }
    let table = TargetTable::of(program);
    let mut changes = table.structure(actual);
    if changes.is_empty() {
        let mut input = String::new();
        for (name, (wanted, v4)) in &table.sets {
            if let Some(now) = actual.sets.get(name) {
                let (text, change) = elements(name, wanted, now, *v4);
                input.push_str(&text);
                changes.extend(change);
            }
        }
        let steps = if input.is_empty() { Vec::new() } else { vec![Step { tool: Tool::Nft, input }] };
        return Plan { changes, steps };
    }
    if !actual.exists {
        changes = vec![Change { kind: ChangeKind::Missing, place: format!("table {TABLE}") }];
    }
    let alive = alive.into();
    let input = table.text(program.alive.map(|(timeout, directions)| (timeout, directions.and(alive))));
    Plan { changes, steps: vec![Step { tool: Tool::Nft, input }] }
}

fn absent(actual: &NftRules) -> Plan {
    if !actual.exists {
        return Plan::default();
    }
    Plan {
        changes: vec![Change { kind: ChangeKind::Unwanted, place: format!("table {TABLE}") }],
        steps: vec![Step { tool: Tool::Nft, input: format!("delete table {TABLE}\n") }],
    }
}

/// Returns the transaction that renews the dead-man timers for another `timeout`. Adding an element that
/// exists would not renew its timeout, so the element is deleted first.
pub(crate) fn renew(timeout: Seconds, directions: Directions) -> String {
    let one = |direction| {
        let set = alive_set(direction);
        format!(
            "add element {TABLE} {set} {{ tcp }}\ndelete element {TABLE} {set} {{ tcp }}\n\
             add element {TABLE} {set} {{ tcp timeout {timeout} }}\n"
        )
    };
    directions.iter().map(one).collect()
}

/// Returns the transaction that lets the dead-man timers lapse now.
pub(crate) fn expire(directions: Directions) -> String {
    directions.iter().map(|direction| format!("flush set {TABLE} {}\n", alive_set(direction))).collect()
}

impl TargetTable {
    fn of(program: &Program) -> TargetTable {
        let mut table = TargetTable { sets: BTreeMap::new(), chains: Vec::new() };
        for direction in program.dead_man_timers().iter() {
            table.sets.insert(alive_set(direction).to_owned(), (Elements::Alive, true));
        }
        for chain in &program.chains {
            let mut rules: Vec<(Label, String)> = Vec::new();
            let mut push = |name: &str, text: String, identity: &str| {
                rules.push((Label::of(name, &format!("{text}{identity}")), text));
            };
            if matches!(
                chain.hook,
                Some(Hook::Outbound | Hook::Inbound | Hook::Strict | Hook::Arriving | Hook::Arrived)
            ) {
                push("not_tcp", "meta l4proto != tcp return".to_owned(), "");
                push("not_syn", format!("{PURE_SYN} != syn return"), "");
            }
            for rule in &chain.rules {
                let identity = rule.identity();
                if rule.when.iter().any(is_of_one_family) {
                    for (v4, digit) in [(true, '4'), (false, '6')] {
                        let name = format!("{}{digit}", rule.name);
                        push(&name, table_rule(&mut table.sets, &chain.name, &name, rule, v4), &identity);
                    }
                } else {
                    push(
                        &rule.name,
                        table_rule(&mut table.sets, &chain.name, &rule.name, rule, true),
                        &identity,
                    );
                }
            }
            table.chains.push(TableChain { name: chain.name.clone(), hook: chain.hook, rules });
        }
        table
    }

    /// Returns the differences that cannot be repaired by changing set elements.
    fn structure(&self, actual: &NftRules) -> Vec<Change> {
        let mut changes = Vec::new();
        let mut change = |kind, place: String| changes.push(Change { kind, place });
        for (name, (wanted, _)) in &self.sets {
            match actual.sets.get(name) {
                None => change(ChangeKind::Missing, format!("set {name}")),
                Some(now) if std::mem::discriminant(now) != std::mem::discriminant(wanted) => {
                    change(ChangeKind::Different, format!("set {name}: its type"));
                }
                Some(_) => {}
            }
        }
        for name in actual.sets.keys().filter(|name| !self.sets.contains_key(*name)) {
            change(ChangeKind::Unwanted, format!("set {name}"));
        }
        for name in
            actual.chains.keys().filter(|name| !self.chains.iter().any(|wanted| wanted.name == **name))
        {
            change(ChangeKind::Unwanted, format!("chain {name}"));
        }
        for TableChain { name, hook, rules } in &self.chains {
            let Some(now) = actual.chains.get(name) else {
                changes.push(Change { kind: ChangeKind::Missing, place: format!("chain {name}") });
                continue;
            };
            if now.hook != hook.map(place) {
                changes
                    .push(Change { kind: ChangeKind::Different, place: format!("chain {name}: its hook") });
            }
            let wanted: Vec<Label> = rules.iter().map(|(label, _)| label.clone()).collect();
            changes.extend(compare_rules(name, &wanted, &now.rules));
        }
        changes
    }

    fn text(&self, alive: Option<(Seconds, Directions)>) -> String {
        let mut text = format!("add table {TABLE}\ndelete table {TABLE}\ntable {TABLE} {{\n");
        for (name, (elements, v4)) in &self.sets {
            _ = writeln!(text, "\tset {name} {{\n\t\t{}", elements.kind(*v4));
            let list = match (elements, alive) {
                (Elements::Alive, Some((timeout, directions)))
                    if directions.iter().any(|direction| alive_set(direction) == name) =>
                {
                    vec![format!("tcp timeout {timeout}")]
                }
                _ => elements.list(),
            };
            if !list.is_empty() {
                _ = writeln!(text, "\t\telements = {{ {} }}", list.join(", "));
            }
            text.push_str("\t}\n");
        }
        // The chains are written in reverse, because a chain must exist before a rule can go to it.
        for TableChain { name, hook, rules } in self.chains.iter().rev() {
            _ = writeln!(text, "\tchain {name} {{");
            if let Some(hook) = hook {
                _ = writeln!(text, "\t\t{}", hooked(*hook));
            }
            for (label, rule) in rules {
                _ = writeln!(text, "\t\t{rule} comment \"{label}\"");
            }
            text.push_str("\t}\n");
        }
        text.push_str("}\n");
        text
    }
}

fn is_of_one_family(condition: &Match) -> bool {
    matches!(condition, Match::Destinations(_) | Match::Sources(_) | Match::Pairs(_) | Match::Redirected(_))
}

/// The priority of translating chains: before those of iptables, at -100.
const BEFORE_IPTABLES: i64 = -101;
/// The priority before every chain that may drop a connection at `input` (the mangle table of iptables is at
/// -150), and the one after them (`security` is at 50).
const BEFORE_FILTERS: i64 = -400;
const AFTER_FILTERS: i64 = 30_000;

/// Returns the type, the hook and the priority of a chain.
fn parts(hook: Hook) -> (&'static str, &'static str, i64) {
    match hook {
        Hook::Outbound => ("nat", "output", BEFORE_IPTABLES),
        Hook::Inbound => ("nat", "prerouting", BEFORE_IPTABLES),
        Hook::Tproxy => ("filter", "prerouting", -150),
        Hook::Strict => ("filter", "input", 0),
        Hook::Hold => ("filter", "output", 0),
        Hook::Arriving => ("filter", "input", BEFORE_FILTERS),
        Hook::Arrived => ("filter", "input", AFTER_FILTERS),
    }
}

fn hooked(hook: Hook) -> String {
    let (kind, hook, priority) = parts(hook);
    format!("type {kind} hook {hook} priority {priority}; policy accept;")
}

fn place(hook: Hook) -> String {
    let (kind, hook, priority) = parts(hook);
    format!("{kind} {hook} {priority} accept")
}

/// Returns the text of a rule, and adds the sets that it uses to `sets`.
fn table_rule(
    sets: &mut BTreeMap<String, (Elements, bool)>,
    chain: &str,
    name: &str,
    rule: &Rule,
    v4: bool,
) -> String {
    let set_name = format!("{chain}_{name}");
    let mut set = |elements: Elements| {
        sets.insert(set_name.clone(), (elements, v4));
        format!("@{set_name}")
    };
    let ip = if v4 { "ip" } else { "ip6" };
    let mut words: Vec<String> = Vec::new();
    for condition in &rule.when {
        words.push(match condition {
            Match::Syn => format!("{PURE_SYN} == syn"),
            Match::OutLoopback => "oifname \"lo\"".to_owned(),
            Match::InLoopback => "iifname \"lo\"".to_owned(),
            Match::ToThisHost => "fib daddr type local".to_owned(),
            Match::Users(users) => format!("meta skuid {}", set(Elements::Users(users.clone()))),
            Match::Groups(groups) => format!("meta skgid {}", set(Elements::Groups(groups.clone()))),
            Match::Cgroup(Cgroup { path, .. }) => {
                format!("socket cgroupv2 level {} \"{path}\"", path.level())
            }
            Match::AnyCgroup(groups) => {
                let level = groups.first().map_or(1, |group| group.path.level());
                let paths = groups.iter().map(|group| group.path.to_string()).collect();
                format!("socket cgroupv2 level {level} {}", set(Elements::Cgroups(paths)))
            }
            Match::OutInterfaces(names) => format!("oifname {}", set(Elements::Interfaces(names.clone()))),
            Match::InInterfaces(names) => format!("iifname {}", set(Elements::Interfaces(names.clone()))),
            Match::Destinations(cidrs) => format!("{ip} daddr {}", set(of_family(cidrs, v4))),
            Match::Sources(cidrs) => format!("{ip} saddr {}", set(of_family(cidrs, v4))),
            Match::Ports(ports) => format!("tcp dport {}", set(Elements::Ports(merged_ports(ports)))),
            Match::Pairs(pairs) => {
                let pairs = pairs.iter().filter(|pair| is_family(pair.ip(), v4)).copied().collect();
                format!("{ip} daddr . tcp dport {}", set(Elements::Pairs(pairs)))
            }
            Match::Percent(percent) => format!("numgen random mod 100 < {}", percent.get()),
            Match::Alive(direction) => {
                format!("meta l4proto tcp meta l4proto @{}", alive_set(*direction))
            }
            Match::Untracked => "ct state invalid".to_owned(),
            Match::Redirected(port) => {
                let family = if v4 { "ipv4" } else { "ipv6" };
                format!("meta nfproto {family} tcp dport {port} ct state new ct status dnat")
            }
        });
    }
    let is_tcp = rule.when.iter().any(|condition| {
        matches!(condition, Match::Syn | Match::Ports(_) | Match::Pairs(_) | Match::Alive(_))
    });
    words.push(match &rule.then {
        Verdict::Return => "return".to_owned(),
        Verdict::Goto(chain) => format!("goto {chain}"),
        // nft requires that the rule itself matches TCP.
        Verdict::Redirect(port) if is_tcp => format!("counter redirect to :{port}"),
        Verdict::Redirect(port) => format!("meta l4proto tcp counter redirect to :{port}"),
        Verdict::Tproxy(port) => format!("tproxy to :{port} counter accept"),
        Verdict::Drop => "counter drop".to_owned(),
        Verdict::Reset => "counter reject with tcp reset".to_owned(),
        Verdict::Nothing => "continue".to_owned(),
        Verdict::Count => "counter".to_owned(),
    });
    words.join(" ")
}

fn of_family(cidrs: &BTreeSet<Cidr>, v4: bool) -> Elements {
    Elements::Cidrs(outermost(cidrs).into_iter().filter(|cidr| cidr.is_ipv4() == v4).collect())
}

impl Elements {
    fn kind(&self, v4: bool) -> &'static str {
        match (self, v4) {
            (Elements::Pairs(_), true) => "type ipv4_addr . inet_service",
            (Elements::Pairs(_), false) => "type ipv6_addr . inet_service",
            (Elements::Cidrs(_), true) => "type ipv4_addr\n\t\tflags interval",
            (Elements::Cidrs(_), false) => "type ipv6_addr\n\t\tflags interval",
            (Elements::Ports(_), _) => "type inet_service\n\t\tflags interval",
            (Elements::Users(_), _) => "type uid",
            (Elements::Groups(_), _) => "type gid",
            (Elements::Interfaces(_), _) => "type ifname",
            (Elements::Cgroups(_), _) => "type cgroupsv2",
            (Elements::Alive | Elements::Unknown, _) => "type inet_proto\n\t\tflags timeout",
        }
    }

    fn list(&self) -> Vec<String> {
        match self {
            Elements::Pairs(pairs) => {
                pairs.iter().map(|pair| format!("{} . {}", pair.ip(), pair.port())).collect()
            }
            Elements::Cidrs(cidrs) => cidrs.iter().map(ToString::to_string).collect(),
            Elements::Ports(ports) => ports.iter().map(ToString::to_string).collect(),
            Elements::Users(ids) | Elements::Groups(ids) => ids.iter().map(ToString::to_string).collect(),
            Elements::Cgroups(names) | Elements::Interfaces(names) => {
                names.iter().map(|name| format!("\"{name}\"")).collect()
            }
            Elements::Alive | Elements::Unknown => Vec::new(),
        }
    }

    /// Returns the covered intervals. Versions of nft and the kernel split them differently, so only the
    /// union is comparable.
    fn cover(&self) -> Option<Vec<(u128, u128)>> {
        let mut spans: Vec<(u128, u128)> = match self {
            Elements::Cidrs(cidrs) => cidrs.iter().map(Cidr::span).collect(),
            Elements::Ports(ports) => {
                ports.iter().map(|ports| (ports.first().into(), ports.last().into())).collect()
            }
            _ => return None,
        };
        spans.sort_unstable();
        let mut merged: Vec<(u128, u128)> = Vec::new();
        for (first, end) in spans {
            match merged.last_mut() {
                Some((_, last)) if first <= last.saturating_add(1) => *last = (*last).max(end),
                _ => merged.push((first, end)),
            }
        }
        Some(merged)
    }
}

/// Returns the commands that give the set its wanted elements.
fn elements(name: &str, wanted: &Elements, now: &Elements, v4: bool) -> (String, Option<Change>) {
    let mut text = String::new();
    if let (Elements::Cgroups(to), Elements::Cgroups(from)) = (wanted, now) {
        if to == from {
            return (text, None);
        }
        // A removed control group has no name by which it could be deleted from the set.
        _ = writeln!(text, "flush set {TABLE} {name}");
        if !to.is_empty() {
            _ = writeln!(text, "add element {TABLE} {name} {{ {} }}", wanted.list().join(", "));
        }
    } else if let (Some(to), Some(from)) = (wanted.cover(), now.cover()) {
        if to == from {
            return (text, None);
        }
        // Overlapping intervals cannot be exchanged one by one.
        _ = writeln!(text, "flush set {TABLE} {name}");
        if !to.is_empty() {
            _ = writeln!(text, "add element {TABLE} {name} {{ {} }}", wanted.list().join(", "));
        }
    } else {
        let (to, from) = (BTreeSet::from_iter(wanted.list()), BTreeSet::from_iter(now.list()));
        for (verb, list) in [("delete", from.difference(&to)), ("add", to.difference(&from))] {
            let list: Vec<&str> = list.map(String::as_str).collect();
            if !list.is_empty() {
                _ = writeln!(text, "{verb} element {TABLE} {name} {{ {} }}", list.join(", "));
            }
        }
    }
    let family = if matches!(wanted, Elements::Pairs(_) | Elements::Cidrs(_)) {
        if v4 { " (IPv4)" } else { " (IPv6)" }
    } else {
        ""
    };
    let place = format!("set {name}: its elements{family}");
    let change = (!text.is_empty()).then_some(Change { kind: ChangeKind::Different, place });
    (text, change)
}

impl NftRules {
    /// Returns the state of a host without vmesh's table.
    pub fn absent() -> NftRules {
        NftRules::default()
    }

    /// Parses the output of `nft -j list table inet vmesh` (libnftables-json(5)).
    pub fn parse(json: &str) -> Result<NftRules, InvalidListing> {
        let unreadable = |fault: &str| InvalidListing(fault.to_owned());
        let value: Value = serde_json::from_str(json).map_err(|error| InvalidListing(error.to_string()))?;
        let list =
            value.get("nftables").and_then(Value::as_array).ok_or_else(|| unreadable("no `nftables`"))?;
        let mut actual = NftRules::default();
        for item in list {
            if item.get("table").is_some() {
                actual.exists = true;
            } else if let Some(set) = item.get("set") {
                let name = text(set, "name").ok_or_else(|| unreadable("a set without a name"))?;
                let elements = parse_set(set).unwrap_or(Elements::Unknown);
                if elements == Elements::Alive {
                    actual.alive |=
                        set.get("elem").and_then(Value::as_array).is_some_and(|all| !all.is_empty());
                }
                actual.sets.insert(name.to_owned(), elements);
            } else if let Some(chain) = item.get("chain") {
                let name = text(chain, "name").ok_or_else(|| unreadable("a chain without a name"))?;
                let hook = text(chain, "hook").map(|hook| {
                    let word = |key| text(chain, key).unwrap_or_default();
                    let priority = chain.get("prio").and_then(Value::as_i64).unwrap_or_default();
                    format!("{} {hook} {priority} {}", word("type"), word("policy"))
                });
                actual.chains.insert(name.to_owned(), ActualChain { hook, ..ActualChain::default() });
            } else if let Some(rule) = item.get("rule") {
                let chain = text(rule, "chain").and_then(|name| actual.chains.get_mut(name));
                let chain = chain.ok_or_else(|| unreadable("a rule before its chain"))?;
                let label = text(rule, "comment").and_then(Label::parse);
                chain.rules.push(label);
            }
        }
        Ok(actual)
    }

    pub fn exists(&self) -> bool {
        self.exists
    }

    /// Returns the table with the set elements of `program`; `None` if more than set elements differ.
    pub fn with_elements_of(&self, program: &Program) -> Option<NftRules> {
        let table = TargetTable::of(program);
        if !self.exists || program.is_absent() || !table.structure(self).is_empty() {
            return None;
        }
        let mut actual = self.clone();
        for (name, (elements, _)) in table.sets {
            if elements != Elements::Alive {
                actual.sets.insert(name, elements);
            }
        }
        Some(actual)
    }

    pub(crate) fn dead_man_timers(&self) -> Directions {
        Direction::BOTH
            .into_iter()
            .filter(|direction| self.sets.contains_key(alive_set(*direction)))
            .collect()
    }
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key)?.as_str()
}

fn parse_set(set: &Value) -> Option<Elements> {
    let none = Vec::new();
    let elements = set.get("elem").and_then(Value::as_array).unwrap_or(&none);
    // An element with a comment or a timeout is wrapped in an object.
    let elements = elements.iter().map(|element| element.pointer("/elem/val").unwrap_or(element));
    let kind = set.get("type")?;
    if kind.is_array() {
        return elements.map(pair).collect::<Option<_>>().map(Elements::Pairs);
    }
    match kind.as_str()? {
        "ipv4_addr" | "ipv6_addr" => elements.map(cidr).collect::<Option<_>>().map(Elements::Cidrs),
        "inet_service" => elements.map(ports).collect::<Option<_>>().map(Elements::Ports),
        "uid" => elements.map(id).collect::<Option<_>>().map(Elements::Users),
        "gid" => elements.map(id).collect::<Option<_>>().map(Elements::Groups),
        "ifname" => elements
            .map(|name| name.as_str().map(str::to_owned))
            .collect::<Option<_>>()
            .map(Elements::Interfaces),
        "cgroupsv2" => Some(Elements::Cgroups(elements.map(listed).collect())),
        "inet_proto" => Some(Elements::Alive),
        _ => None,
    }
}

/// Returns a control group as nft lists it: its path, or another value if it was removed.
fn listed(element: &Value) -> String {
    element.as_str().map_or_else(|| element.to_string(), str::to_owned)
}

fn pair(element: &Value) -> Option<SocketAddr> {
    let parts = element.get("concat")?.as_array()?;
    let [ip, port] = parts.as_slice() else { return None };
    let ip: IpAddr = ip.as_str()?.parse().ok()?;
    Some(SocketAddr::new(ip, u16::try_from(port.as_u64()?).ok()?))
}

fn cidr(element: &Value) -> Option<Cidr> {
    match element.get("prefix") {
        Some(prefix) => format!("{}/{}", text(prefix, "addr")?, prefix.get("len")?.as_u64()?).parse().ok(),
        None => element.as_str()?.parse().ok(),
    }
}

fn ports(element: &Value) -> Option<Ports> {
    let port = |value: &Value| u16::try_from(value.as_u64()?).ok();
    match element.get("range").and_then(Value::as_array).map(Vec::as_slice) {
        Some([first, last]) => Ports::range(port(first)?, port(last)?),
        _ => port(element).and_then(|port| Ports::range(port, port)),
    }
}

fn id(element: &Value) -> Option<u32> {
    element.as_u64().and_then(|id| u32::try_from(id).ok()).or_else(|| element.as_str()?.parse().ok())
}
