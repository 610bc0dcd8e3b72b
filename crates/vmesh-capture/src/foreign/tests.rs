use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use super::conflicts::VERDICT_VALID_FOR;
use super::ruleset::MAX_STEPS;
use super::*;
use crate::spec::Ports;

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
    let loopback =
        r#"{"match": {"op": "==", "left": {"meta": {"key": "oifname"}}, "right": "lo"}}, {"accept": null}"#;
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
    assert_eq!(names(&outbound_suspects(&nft(FIREWALLD), 80, true)), [""; 0], "firewalld is in nobody's way");
}

#[test]
fn rules_that_go_round_in_circles_end_and_garbage_is_no_rule() {
    let circle =
        "*filter\n:INPUT DROP [0:0]\n:a - [0:0]\n-A INPUT -j a\n-A a -j a\n-A a -j a\n-A a -j a\nCOMMIT\n";
    assert_eq!(judged(&iptables(circle), "80"), ["unjudged 80: its chains jump too deeply"]);
    for garbage in ["", "[]", "{\"nftables\": 7}", "\0", "*\n-A\n-A x\n:\n"] {
        assert_eq!(judged(&iptables(garbage), "80"), [""; 0]);
        let mut rules = Ruleset::default();
        rules.add_nft(garbage);
        assert_eq!(
            judged(&rules, "80"),
            ["unjudged 80: the output of `nft -j list ruleset` could not be parsed"]
        );
    }
}

#[test]
fn more_rules_than_are_followed_are_not_taken_for_no_filter() {
    let accepts = "-A INPUT -p udp -j ACCEPT\n".repeat(MAX_STEPS + 1);
    let rules = iptables(&format!(
        "*filter\n:INPUT ACCEPT [0:0]\n{accepts}-A INPUT -p tcp --dport 80 -j DROP\nCOMMIT\n"
    ));
    assert_eq!(judged(&rules, "80"), ["unjudged 80: it has more rules than vmesh evaluates"]);
}

#[test]
fn ports_that_no_rule_tells_apart_are_judged_together_and_those_beyond_the_bound_are_not_captured() {
    let rules = iptables(
        "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp --dport 8000:8010 -m conntrack ! --ctstate DNAT -j DROP\nCOMMIT\n",
    );
    let drops = "ip filter INPUT: -p tcp --dport 8000:8010 -m conntrack ! --ctstate DNAT -j DROP";
    assert_eq!(judged(&rules, "1-65535"), [format!("opens 8000-8010: {drops}")]);
    assert_eq!(judged(&rules, "1-7999 8011-65535"), [""; 0]);
    let each: String = (1..=300).map(|port| format!("-A INPUT -p tcp --dport {port} -j ACCEPT\n")).collect();
    let rules = iptables(&format!("*filter\n:INPUT ACCEPT [0:0]\n{each}COMMIT\n"));
    let why = "its rules split the captured ports into more than 256 ranges";
    assert_eq!(judged(&rules, "1-400"), [format!("unjudged 257-400: {why}")]);
}

const NFT_INPUT: &str = r#"{"chain": {"family": "ip", "table": "filter", "name": "input", "type": "filter", "hook": "input", "prio": 0, "policy": "drop"}}"#;

fn in_input(expressions: &str) -> String {
    format!(r#"{{"rule": {{"family": "ip", "table": "filter", "chain": "input", "expr": [{expressions}]}}}}"#)
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
    let saved =
        "# Generated by iptables-nft-save v1.8.9 (nf_tables) on Sat\n*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n";
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
        ["unjudged 80: its rules were not read yet"]
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
