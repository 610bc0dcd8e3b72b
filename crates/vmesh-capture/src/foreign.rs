//! Rules of others that decide over captured connections: read from what the tools list, and tried with packets in the mind.
//!
//! A redirected packet is not what it was: the host's filter sees it go to Envoy's port, and sees that it was translated. So a filter
//! may refuse what it lets in otherwise (ufw knows nothing of 15006), and let in what it refuses otherwise (firewalld accepts whatever
//! was translated). Both are seen here before a packet is lost: [`inbound`]. Once packets are lost, [`suspects`] names the rules that
//! may have dropped them.
//!
//! Pure: told the text, and bounded in what it follows. What it does not understand of a rule may hold or not.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::Value;

use crate::spec::{INBOUND_PORT, OUTBOUND_PORT, Ports};

/// Rules that are followed for one packet; a ruleset that has more is not judged.
const MAX_STEPS: usize = 100_000;
/// Chains that jump to chains.
const MAX_DEPTH: usize = 16;
/// Bytes of a rule that are shown.
const MAX_TEXT: usize = 200;

/// Where a packet is when a chain sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hook {
    Prerouting,
    Input,
    Output,
}

/// What is known of a packet of a connection over TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    pub is_ipv4: bool,
    pub hook: Hook,
    /// Whether its addresses were translated already, which are those of the connection else.
    pub is_translated: bool,
    pub to_port: Option<u16>,
    pub from_port: Option<u16>,
    /// The first packet of a connection.
    pub is_new: bool,
    /// It comes or leaves over the loopback interface.
    pub over_loopback: bool,
    /// Its source is an address that no interface of this host has.
    pub from_elsewhere: bool,
}

/// Whether a condition holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Truth {
    Yes,
    No,
    Maybe,
}

impl Truth {
    fn of(known: bool) -> Truth {
        if known { Truth::Yes } else { Truth::No }
    }

    fn not(self) -> Truth {
        match self {
            Truth::Yes => Truth::No,
            Truth::No => Truth::Yes,
            Truth::Maybe => Truth::Maybe,
        }
    }

    fn and(self, other: Truth) -> Truth {
        match (self, other) {
            (Truth::No, _) | (_, Truth::No) => Truth::No,
            (Truth::Yes, Truth::Yes) => Truth::Yes,
            _ => Truth::Maybe,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Condition {
    /// The protocol is TCP, or is another.
    Tcp(bool),
    ToPorts(Vec<Ports>),
    FromPorts(Vec<Ports>),
    /// By its name.
    Interface {
        incoming: bool,
        name: String,
    },
    /// One of these: `new`, `established`.
    State(Vec<String>),
    /// The destination was translated.
    Translated,
    /// The source is an address of this host's.
    FromThisHost,
    /// The destination is one.
    ToThisHost(bool),
    Not(Box<Condition>),
    Unknown,
}

impl Condition {
    fn holds(&self, packet: &Packet) -> Truth {
        let among = |ports: &[Ports], port: Option<u16>| match port {
            Some(port) => Truth::of(ports.iter().any(|ports| ports.contains(port))),
            None => Truth::Maybe,
        };
        match self {
            Condition::Tcp(tcp) => Truth::of(*tcp),
            Condition::ToPorts(ports) => among(ports, packet.to_port),
            Condition::FromPorts(ports) => among(ports, packet.from_port),
            Condition::Interface { incoming, name } => {
                let incoming_hook = packet.hook != Hook::Output;
                match (*incoming == incoming_hook, name == "lo") {
                    (false, _) => Truth::Maybe,
                    (true, true) => Truth::of(packet.over_loopback),
                    (true, false) if packet.over_loopback => Truth::No,
                    (true, false) => Truth::Maybe,
                }
            }
            Condition::State(states) => {
                let now = if packet.is_new { "new" } else { "established" };
                Truth::of(states.iter().any(|state| state == now))
            }
            Condition::Translated => Truth::of(packet.is_translated),
            Condition::FromThisHost => match packet.from_elsewhere {
                true => Truth::No,
                false => Truth::Maybe,
            },
            Condition::ToThisHost(is) if packet.hook == Hook::Input => Truth::of(*is),
            Condition::ToThisHost(_) => Truth::Maybe,
            Condition::Not(condition) => condition.holds(packet).not(),
            Condition::Unknown => Truth::Maybe,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    Accept,
    Drop,
    /// The connection is not tracked: nothing of it is translated.
    NoTrack,
    Jump(String),
    Goto(String),
    Return,
    /// Counts, logs, marks.
    Continue,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    conditions: Vec<Condition>,
    action: Action,
    text: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Chain {
    /// For one that the kernel calls: where, in which order, and whether it drops what no rule of it decides.
    base: Option<(Hook, i64, bool)>,
    rules: Vec<Rule>,
}

/// The rules of others, by table and chain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ruleset {
    chains: BTreeMap<(String, String), Chain>,
}

/// A rule of somebody's, or the policy of a chain: `inet firewalld filter_INPUT: reject`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ForeignRule(String);

impl fmt::Display for ForeignRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a ruleset may do with a packet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Outcome {
    accepts: Option<ForeignRule>,
    drops: Vec<ForeignRule>,
    /// It may leave a chain undecided.
    falls_through: bool,
    /// A rule that certainly keeps the connection from being tracked.
    untracked: Option<ForeignRule>,
}

/// What a filter of the host's would do with captured inbound connections to a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Conflict {
    /// Captured connections come in that are refused otherwise.
    Opens { port: u16, refused_by: ForeignRule },
    /// Captured connections are refused, that come in otherwise.
    Closes { port: u16, refused_by: ForeignRule },
}

impl Conflict {
    pub fn port(&self) -> u16 {
        match self {
            Conflict::Opens { port, .. } | Conflict::Closes { port, .. } => *port,
        }
    }
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Conflict::Opens { port, refused_by } => write!(
                f,
                "port {port} is kept closed by this host's own filter ({refused_by}), which lets translated connections in: a redirect \
                 would open the port to the network. Take `capture.inbound: {{capture: tproxy}}`, open the port, or allow it by \
                 `capture.inbound: {{capture: redirect, bypass_filter: true}}`"
            ),
            Conflict::Closes { port, refused_by } => write!(
                f,
                "this host's own filter lets connections in to port {port}, and refuses them once they are redirected to Envoy's port \
                 {INBOUND_PORT} ({refused_by}): let TCP port {INBOUND_PORT} in there, or take `capture.inbound: {{capture: tproxy}}`"
            ),
        }
    }
}

/// Finds the ports that a redirect of inbound connections would open or close, as far as the rules say it for certain.
pub fn inbound(rules: &Ruleset, ports: impl IntoIterator<Item = u16>) -> Vec<Conflict> {
    let packet = |is_ipv4, port, is_translated| Packet {
        is_ipv4,
        hook: Hook::Input,
        is_translated,
        to_port: Some(port),
        from_port: None,
        is_new: true,
        over_loopback: false,
        from_elsewhere: true,
    };
    let families = [true, false];
    let redirected = families.map(|is_ipv4| (is_ipv4, rules.judge(&packet(is_ipv4, INBOUND_PORT, true))));
    let mut conflicts: Vec<Conflict> = Vec::new();
    let ports: Vec<u16> = ports.into_iter().collect();
    for (port, (is_ipv4, redirected)) in
        ports.iter().flat_map(|port| redirected.iter().map(move |family| (*port, family)))
    {
        if conflicts.last().is_some_and(|last| last.port() == port) {
            continue;
        }
        let direct = rules.judge(&packet(*is_ipv4, port, false));
        match (direct.drops.first(), &direct.accepts, redirected.drops.first(), &redirected.accepts) {
            // Some sources, or all, are kept out today, and none would be.
            (Some(refused_by), _, None, _) => {
                conflicts.push(Conflict::Opens { port, refused_by: refused_by.clone() });
            }
            (_, Some(_), Some(refused_by), None) => {
                conflicts.push(Conflict::Closes { port, refused_by: refused_by.clone() });
            }
            _ => {}
        }
    }
    conflicts
}

/// Names a rule that keeps connections to `port` from being tracked: they are not captured, and to a virtual address lead nowhere.
pub fn untracked(rules: &Ruleset, port: u16) -> Option<ForeignRule> {
    let packet = |is_ipv4| Packet {
        is_ipv4,
        hook: Hook::Output,
        is_translated: false,
        to_port: Some(port),
        from_port: None,
        is_new: true,
        over_loopback: false,
        from_elsewhere: false,
    };
    [true, false].into_iter().find_map(|is_ipv4| rules.judge(&packet(is_ipv4)).untracked)
}

/// Names the rules that may drop a captured outbound connection to `to_port`, or the answers of Envoy, or keep them from being
/// translated.
pub fn suspects(rules: &Ruleset, to_port: u16) -> Vec<ForeignRule> {
    let new = |hook, is_translated, to_port, over_loopback| Packet {
        is_ipv4: true,
        hook,
        is_translated,
        to_port: Some(to_port),
        from_port: None,
        is_new: true,
        over_loopback,
        from_elsewhere: false,
    };
    // The answer comes from the address that was called, which no interface has.
    let answer = |hook, from_port| Packet {
        is_ipv4: true,
        hook,
        is_translated: true,
        to_port: None,
        from_port: Some(from_port),
        is_new: false,
        over_loopback: true,
        from_elsewhere: true,
    };
    let packets = [
        new(Hook::Output, false, to_port, false),
        // The interface is that of the route of the address that was called.
        new(Hook::Output, true, OUTBOUND_PORT, false),
        new(Hook::Prerouting, true, OUTBOUND_PORT, true),
        new(Hook::Input, true, OUTBOUND_PORT, true),
        answer(Hook::Output, OUTBOUND_PORT),
        answer(Hook::Prerouting, to_port),
        answer(Hook::Input, to_port),
    ];
    let mut found: Vec<ForeignRule> = Vec::new();
    let of_ipv6 = packets.iter().map(|packet| Packet { is_ipv4: false, ..*packet });
    for rule in packets.iter().copied().chain(of_ipv6).flat_map(|packet| rules.judge(&packet).drops) {
        if !found.contains(&rule) {
            found.push(rule);
        }
    }
    found
}

impl Ruleset {
    /// What all chains that see the packet may do with it.
    fn judge(&self, packet: &Packet) -> Outcome {
        let mut steps = 0;
        let mut whole = Outcome { falls_through: true, ..Outcome::default() };
        let sees = |hook: Hook, priority: i64| {
            // Addresses are translated at -100, for what is sent and what comes.
            hook == packet.hook
                && (hook != Hook::Output || !packet.is_new || (priority > -100) == packet.is_translated)
        };
        let mut all_accept = true;
        let mut accepts = None;
        for ((table, name), chain) in &self.chains {
            let Some((hook, priority, drops)) = chain.base else { continue };
            let other_family = if packet.is_ipv4 { "ip6 " } else { "ip " };
            if !sees(hook, priority) || table.starts_with(other_family) {
                continue;
            }
            let mut outcome = self.walk(table, name, packet, 0, &mut steps);
            if outcome.falls_through {
                let policy =
                    ForeignRule(format!("{table} {name}: policy {}", if drops { "drop" } else { "accept" }));
                match drops {
                    true => outcome.drops.push(policy),
                    false => _ = outcome.accepts.get_or_insert(policy),
                }
            }
            // A packet has to be accepted by each.
            all_accept &= outcome.accepts.is_some();
            accepts = accepts.or(outcome.accepts);
            whole.untracked = whole.untracked.or(outcome.untracked);
            whole.drops.extend(outcome.drops);
        }
        let untouched = accepts.is_none() && whole.drops.is_empty();
        whole.accepts = match all_accept {
            true if untouched => Some(ForeignRule("no filter".to_owned())),
            true => accepts,
            false => None,
        };
        whole
    }

    fn walk(&self, table: &str, name: &str, packet: &Packet, depth: usize, steps: &mut usize) -> Outcome {
        let mut outcome = Outcome::default();
        let key = (table.to_owned(), name.to_owned());
        let Some(chain) = self.chains.get(&key).filter(|_| depth < MAX_DEPTH) else {
            return Outcome { falls_through: true, ..outcome };
        };
        for rule in &chain.rules {
            *steps += 1;
            if *steps > MAX_STEPS {
                break;
            }
            let holds = rule.conditions.iter().fold(Truth::Yes, |all, one| all.and(one.holds(packet)));
            if holds == Truth::No {
                continue;
            }
            let named = || ForeignRule(format!("{table} {name}: {}", rule.text));
            let mut goes_on = holds == Truth::Maybe;
            match &rule.action {
                Action::Accept => _ = outcome.accepts.get_or_insert_with(named),
                Action::Drop => outcome.drops.push(named()),
                // It is as good as lost to capture, and goes on.
                Action::NoTrack => {
                    if holds == Truth::Yes && depth == 0 {
                        outcome.untracked = Some(named());
                    }
                    outcome.drops.push(named());
                    goes_on = true;
                }
                Action::Return => outcome.falls_through = true,
                Action::Continue => goes_on = true,
                Action::Jump(to) | Action::Goto(to) => {
                    let inner = self.walk(table, to, packet, depth + 1, steps);
                    outcome.accepts = outcome.accepts.or(inner.accepts);
                    outcome.drops.extend(inner.drops);
                    let comes_back = inner.falls_through;
                    match rule.action {
                        Action::Goto(_) => outcome.falls_through |= comes_back,
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

    /// Adds what `nft -j list ruleset` prints, without our own table and without those of iptables, which nft shows in part only.
    pub fn add_nft(&mut self, json: &str) {
        let value: Value = serde_json::from_str(json).unwrap_or(Value::Null);
        let items = value.get("nftables").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        for item in items {
            if let Some(chain) = item.get("chain") {
                let Some((table, name)) = place(chain, "name") else { continue };
                let hook = match text(chain, "hook") {
                    Some("prerouting") => Some(Hook::Prerouting),
                    Some("input") => Some(Hook::Input),
                    Some("output") => Some(Hook::Output),
                    _ => None,
                };
                let priority = chain.get("prio").and_then(Value::as_i64).unwrap_or_default();
                let base = hook.map(|hook| (hook, priority, text(chain, "policy") == Some("drop")));
                self.chains.entry((table, name)).or_default().base = base;
            } else if let Some(rule) = item.get("rule") {
                let Some(key) = place(rule, "chain") else { continue };
                let expressions = rule.get("expr").and_then(Value::as_array).map(Vec::as_slice);
                let rule = nft_rule(expressions.unwrap_or_default());
                self.chains.entry(key).or_default().rules.push(rule);
            }
        }
    }

    /// Adds what `iptables-save` or `ip6tables-save` prints, without our own chains.
    pub fn add_iptables(&mut self, family: &str, saved: &str) {
        let mut table = String::new();
        for line in saved.lines() {
            if let Some(name) = line.strip_prefix('*') {
                name.trim().clone_into(&mut table);
            } else if let Some(declared) = line.strip_prefix(':') {
                let mut words = declared.split_whitespace();
                let (Some(name), Some(policy)) = (words.next(), words.next()) else { continue };
                let hook = match name {
                    "PREROUTING" => Some(Hook::Prerouting),
                    "INPUT" => Some(Hook::Input),
                    "OUTPUT" => Some(Hook::Output),
                    _ => None,
                };
                let priority = match table.as_str() {
                    "raw" => -300,
                    "mangle" => -150,
                    "nat" => -100,
                    _ => 0,
                };
                let base = hook.map(|hook| (hook, priority, policy == "DROP"));
                let key = (format!("{family} {table}"), name.to_owned());
                self.chains.entry(key).or_default().base = base;
            } else if let Some(rule) = line.strip_prefix("-A ") {
                let Some((chain, rest)) = rule.split_once(' ') else { continue };
                if chain.starts_with("VMESH_") || rest.contains("-j VMESH_") || rest.contains("-g VMESH_") {
                    continue;
                }
                let key = (format!("{family} {table}"), chain.to_owned());
                self.chains.entry(key).or_default().rules.push(iptables_rule(rest));
            }
        }
    }
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key)?.as_str()
}

/// The table and the chain, where these are neither ours nor iptables'.
fn place(value: &Value, chain: &str) -> Option<(String, String)> {
    const OF_IPTABLES: [&str; 5] = ["filter", "nat", "mangle", "raw", "security"];
    let (family, table) = (text(value, "family")?, text(value, "table")?);
    let is_of_iptables = matches!(family, "ip" | "ip6") && OF_IPTABLES.contains(&table);
    let is_ours = family == "inet" && table == "vmesh";
    // Those of bridges and devices see other packets.
    if is_of_iptables || is_ours || !matches!(family, "ip" | "ip6" | "inet") {
        return None;
    }
    Some((format!("{family} {table}"), text(value, chain)?.to_owned()))
}

fn nft_rule(expressions: &[Value]) -> Rule {
    let mut conditions = Vec::new();
    let mut action = Action::Continue;
    for expression in expressions {
        let Some((name, value)) = expression.as_object().and_then(|object| object.iter().next()) else {
            continue;
        };
        match name.as_str() {
            "match" => conditions.push(nft_match(value)),
            "accept" => action = Action::Accept,
            "drop" | "reject" => action = Action::Drop,
            "notrack" => action = Action::NoTrack,
            "return" => action = Action::Return,
            "jump" => action = Action::Jump(text(value, "target").unwrap_or_default().to_owned()),
            "goto" => action = Action::Goto(text(value, "target").unwrap_or_default().to_owned()),
            "counter" | "log" | "comment" => {}
            // A map of verdicts, a limit, a match of iptables: it may do anything or nothing.
            _ => conditions.push(Condition::Unknown),
        }
    }
    let words: Vec<String> = expressions.iter().map(compact).collect();
    Rule { conditions, action, text: shortened(&words.join(" ")) }
}

/// About what `nft list ruleset` shows of an expression.
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
        "counter" | "log" => name.clone(),
        _ => name.clone(),
    }
}

fn nft_match(value: &Value) -> Condition {
    let (Some(left), Some(right)) = (value.get("left"), value.get("right")) else {
        return Condition::Unknown;
    };
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
    match (text(value, "op"), condition) {
        (_, Condition::Unknown) => Condition::Unknown,
        (Some("!="), condition) => Condition::Not(Box::new(condition)),
        (Some("==" | "in") | None, condition) => condition,
        (Some(_), _) => Condition::Unknown,
    }
}

/// The words of one value, of a set or of a list.
fn words(value: &Value) -> Vec<String> {
    match value {
        Value::String(word) => vec![word.clone()],
        Value::Number(number) => vec![number.to_string()],
        Value::Array(all) => all.iter().flat_map(words).collect(),
        Value::Object(object) => object.get("set").map(words).unwrap_or_default(),
        _ => Vec::new(),
    }
}

/// `None` for what is no list of ports, such as a named set.
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

fn iptables_rule(rest: &str) -> Rule {
    let mut words = rest.split_whitespace().peekable();
    let mut conditions = Vec::new();
    let mut action = Action::Continue;
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
                    ("-g", _) => Action::Goto(to),
                    (_, "ACCEPT") => Action::Accept,
                    (_, "DROP" | "REJECT" | "TARPIT") => Action::Drop,
                    (_, "NOTRACK") => Action::NoTrack,
                    (_, "RETURN") => Action::Return,
                    // Its argument says whether it is this.
                    (_, "CT") if rest.contains("--notrack") => Action::NoTrack,
                    // Targets of the kernel's have names in capitals, as chains may: one that is no chain falls through.
                    (_, _) => Action::Jump(to),
                };
                // What follows belongs to the target.
                break;
            }
            _ if word.starts_with('-') => Some(Condition::Unknown),
            // The value of an option that is not known here.
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
    Rule { conditions, action, text: shortened(rest) }
}

fn skip_comment<'a>(words: &mut impl Iterator<Item = &'a str>) {
    let Some(first) = words.next() else { return };
    if first.starts_with('"') && !(first.len() > 1 && first.ends_with('"')) {
        // Until the word that ends it.
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
            Conflict::Opens { port, refused_by } => format!("opens {port}: {refused_by}"),
            Conflict::Closes { port, refused_by } => format!("closes {port}: {refused_by}"),
        };
        conflicts.iter().map(short).collect()
    }

    fn names(rules: &[ForeignRule]) -> Vec<String> {
        rules.iter().map(ToString::to_string).collect()
    }

    /// What firewalld 1.3 has, in short, with port 22 open.
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
        assert_eq!(shown(&inbound(&rules, [22, 8005, 8081, 9000])), some);
        assert_eq!(shown(&inbound(&Ruleset::default(), [8081])), [""; 0]);
    }

    /// What ufw has, in short, with ports 22 and 8081 open.
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
            shown(&inbound(&rules, [22, 8081, 9999])),
            ["closes 22: ip filter INPUT: policy drop", "closes 8081: ip filter INPUT: policy drop"]
        );
        let open = iptables(&UFW.replace("--dport 22 ", "--dport 15006 "));
        assert_eq!(shown(&inbound(&open, [8081])), [""; 0]);
        assert_eq!(
            shown(&inbound(&open, [9999])),
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
        // Nothing leaves but to two ports.
        let loopback = r#"{"match": {"op": "==", "left": {"meta": {"key": "oifname"}}, "right": "lo"}}, {"accept": null}"#;
        let egress = [
            chain("eg", "output", 0, "drop"),
            rule("eg", loopback),
            rule("eg", &format!("{dports}, {{\"accept\": null}}")),
        ];
        assert_eq!(names(&suspects(&nft(&egress.join(",")), 1)), ["inet eg o: policy drop"]);
        // Nothing is tracked that goes to two ports.
        let raw =
            [chain("nt", "output", -300, "accept"), rule("nt", &format!("{dports}, {{\"notrack\": null}}"))];
        let raw = nft(&raw.join(","));
        assert_eq!(untracked(&raw, 80).unwrap().to_string(), "inet nt o: tcp dport [80,8080] notrack");
        assert_eq!(untracked(&raw, 81), None);
        // Of wg-quick.
        let wireguard = iptables(
            "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -d 10.200.0.2/32 ! -i wg0 -m addrtype ! --src-type LOCAL -j DROP\nCOMMIT\n",
        );
        assert_eq!(
            names(&suspects(&wireguard, 80)),
            ["ip raw PREROUTING: -d 10.200.0.2/32 ! -i wg0 -m addrtype ! --src-type LOCAL -j DROP"]
        );
        assert_eq!(names(&suspects(&nft(FIREWALLD), 80)), [""; 0], "firewalld is in nobody's way");
    }

    #[test]
    fn rules_that_go_round_in_circles_end_and_garbage_is_no_rule() {
        let circle = "*filter\n:INPUT DROP [0:0]\n:a - [0:0]\n-A INPUT -j a\n-A a -j a\n-A a -j a\n-A a -j a\nCOMMIT\n";
        assert_eq!(inbound(&iptables(circle), [80]), []);
        for garbage in ["", "[]", "{\"nftables\": 7}", "\0", "*\n-A\n-A x\n:\n"] {
            assert_eq!(inbound(&iptables(garbage), [80]), []);
            let mut rules = Ruleset::default();
            rules.add_nft(garbage);
            assert_eq!(rules, Ruleset::default());
        }
    }
}
