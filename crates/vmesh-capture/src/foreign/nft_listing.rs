//! Reads the output of `nft -j list ruleset` into a [`Ruleset`].

use std::collections::BTreeMap;

use serde_json::Value;

use super::packet::{Condition, PacketHook};
use super::ruleset::{Listing, ParsedRule, RuleAction, Ruleset, shortened};
use crate::spec::Ports;

impl Ruleset {
    /// Adds the rules that `nft -j list ruleset` prints, except for vmesh's own table. Chains that
    /// `iptables-save` lists too are evaluated from that listing, since nft shows only parts of what iptables
    /// adds.
    pub fn add_nft(&mut self, json: &str) {
        let value: Value = serde_json::from_str(json).unwrap_or(Value::Null);
        let Some(items) = value.get("nftables").and_then(Value::as_array) else {
            return self.add_gap("the output of `nft -j list ruleset` could not be parsed");
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
