//! D16 to D21 and D40: the capture rules, and what interferes with them.

use std::collections::BTreeSet;

use vmesh_net::protocol::{EnvoyHealth, RedirectState, State, Status, is_step, would_change};

use super::facts::{Facts, HostCommand, Outline};
use super::{Finding, RootCause, Skip, Verdict, by_hand, run, warning, wrong};

const BYPASS: &str = "/usr/lib/vmesh/bypass";
/// Age in seconds up to which repaired drift is reported.
const RECENT: u64 = 3600;
/// Seconds without a heartbeat after which the agent counts as silent. It sends one every second.
const SILENT: u64 = 5;

fn captures(facts: &Facts) -> Result<&Outline, Skip> {
    let outline = facts.outline()?;
    if outline.captures() { Ok(outline) } else { Err(Skip::NotApplicable) }
}

/// The effect of missing rules.
const PAST_ENVOY: &str =
    "connections go past Envoy to where they are made to; names of the mesh mean the endpoints themselves";

/// D16: the rules are as desired.
pub(super) fn rules(facts: &Facts) -> Verdict {
    captures(facts)?;
    let mut found = Vec::new();
    let status = match &facts.net {
        Ok(status) => status,
        Err(why) => {
            // The rules themselves are visible in the ruleset.
            let there = facts.out(HostCommand::Rules).map(|rules| rules.contains("table inet vmesh {"));
            return match there {
                Ok(false) => Ok(vec![
                    wrong(
                        "the rules of capture are not there",
                        PAST_ENVOY,
                        run("systemctl restart vmesh-net"),
                    )
                    .follows(&[RootCause::Net, RootCause::Envoy]),
                ]),
                _ if is_up(facts) && !why.contains("ermission denied") => Ok(vec![
                    wrong(
                        format!("vmesh-net runs, and does not answer: {why}"),
                        "nobody mends the rules, or refreshes those that lapse",
                        run("systemctl restart vmesh-net"),
                    )
                    .marked_as(RootCause::Net),
                ]),
                _ => Err(Skip::Unavailable(why.clone())),
            };
        }
    };
    if status.state == State::Bypassed {
        let finding =
            wrong("this host is out of the mesh, by its bypass", PAST_ENVOY, run("vmeshctl bypass off"));
        return Ok(vec![finding.marked_as(RootCause::Bypass)]);
    }
    if let Some(error) = &status.error {
        found.push(wrong(
            format!("the rules are not as they are wanted: {error}"),
            PAST_ENVOY,
            by_hand("`journalctl -u vmesh-net -n 50` says what was tried"),
        ));
    }
    add_trial(status, &mut found);
    if status.state == State::Off && status.error.is_none() && status.reverted.is_none() {
        found.push(
            wrong(
                "nothing is captured, although agent.yaml says that something is to be",
                PAST_ENVOY,
                by_hand("the agent captures what Envoy has accepted: `vmeshctl capture` and D9, D26 say what is missing"),
            )
            .follows(&[RootCause::Envoy, RootCause::Agent, RootCause::ControlPlane]),
        );
    }
    add_drift(facts, status, &mut found);
    for note in status.notes.iter().filter(|note| status.path_fault.as_ref() != Some(note)) {
        found.push(warning(
            format!("a part of `capture` has no effect on this host: {note}"),
            "the rest is captured as it is configured",
            by_hand("mend it in /etc/vmesh/agent.yaml, then `systemctl restart vmesh-agent`"),
        ));
    }
    Ok(found)
}

/// Adds the findings about a change that is on trial or was rolled back.
fn add_trial(status: &Status, found: &mut Vec<Finding>) {
    if let Some(why) = &status.reverted {
        found.push(wrong(
            format!("a change of what is captured was taken back: {why}"),
            "what was captured before the change still is, and nothing else",
            run("vmeshctl capture retry"),
        ));
    }
    if status.state == State::Trial {
        let left = status.trial_ends_in.unwrap_or_default();
        found.push(warning(
            format!("a change of what is captured is on trial, and is taken back in {left} s"),
            "unless it is confirmed, it will not hold",
            run("vmeshctl capture confirm"),
        ));
    }
}

/// Adds the findings about rules that differ from the wanted ones, now or recently.
fn add_drift(facts: &Facts, status: &Status, found: &mut Vec<Finding>) {
    if let Ok(plan) = &facts.plan
        && would_change(plan)
        && status.error.is_none()
        && status.state == State::Confirmed
    {
        let mut steps = plan.lines().map(str::trim).filter(|line| is_step(line));
        let what = steps.next().unwrap_or_default();
        found.push(wrong(
            format!("the rules are not as they are wanted; to do: {what}"),
            "some connections go past Envoy, or to where they should not",
            run("systemctl restart vmesh-net"),
        ));
    }
    if let Some(ago) = status.drift.seconds_ago.filter(|ago| *ago < RECENT) {
        let by = status.drift.by.as_deref().unwrap_or("somebody");
        found.push(warning(
            format!("{by} changed the rules {ago} s ago; they were mended ({} times since vmesh-net began)", status.drift.count),
            "until they were mended, connections went past Envoy; those through a redirect were reset",
            by_hand("let it load its rules without `flush ruleset`, or less often; the finding goes away after an hour"),
        ));
    }
}

fn is_up(facts: &Facts) -> bool {
    facts.unit("vmesh-net.service").ok().flatten().is_some_and(|unit| unit.get("ActiveState") == "active")
}

/// Chains of other meshes, by the prefix of their names.
const MESHES: [(&str, &str); 6] = [
    ("ISTIO_", "Istio"),
    ("KUMA_", "Kuma"),
    ("MESH_", "Kuma"),
    ("CONSUL_", "Consul"),
    ("PROXY_INIT_", "Linkerd"),
    ("LINKERD_", "Linkerd"),
];

/// A priority before all of vmesh's redirects.
const OURS: i64 = -101;

/// D17: no foreign rule handles connections before vmesh's rules.
pub(super) fn foreign_rules(facts: &Facts) -> Verdict {
    captures(facts)?;
    let mut found = Vec::new();
    let nft = facts.out(HostCommand::Rules)?;
    let legacy = facts.out(HostCommand::LegacyRules).unwrap_or_default();
    // A chain without rules has no effect.
    let chains = legacy.lines().filter_map(|line| line.strip_prefix("-A ")?.split_whitespace().next());
    let mut foreign_chains: BTreeSet<(String, &str, String)> = BTreeSet::new();
    let mesh =
        |chain: &str| MESHES.iter().find(|(prefix, _)| chain.starts_with(prefix)).map(|(_, mesh)| *mesh);
    for chain in chains {
        if let Some(mesh) = mesh(chain) {
            foreign_chains.insert((chain.to_owned(), mesh, "iptables-legacy -t nat -F CHAIN".to_owned()));
        }
    }
    for chain in chains_of(nft) {
        if chain.table == "inet vmesh" {
            continue;
        }
        if let Some(mesh) = mesh(chain.name).filter(|_| chain.has_rules()) {
            let delete = format!("nft flush chain {} {}", chain.table, chain.name);
            foreign_chains.insert((chain.name.to_owned(), mesh, delete));
        } else if chain.hooked_before(OURS) && chain.redirects() {
            found.push(wrong(
                format!(
                    "chain {} of table {} redirects connections before vmesh does",
                    chain.name, chain.table
                ),
                "what it takes does not go through Envoy",
                by_hand(format!(
                    "is it meant to? `nft list chain {} {}`; else have its owner take it away",
                    chain.table, chain.name
                )),
            ));
        }
    }
    // Report one chain per mesh, since the same fix removes the other chains.
    let mut reported_meshes = BTreeSet::new();
    for (chain, mesh, delete) in &foreign_chains {
        if reported_meshes.insert(*mesh) {
            let others = foreign_chains.iter().filter(|(_, other, _)| other == mesh).count() - 1;
            let more = if others == 0 { String::new() } else { format!(" and {others} more") };
            found.push(wrong(
                format!("{mesh}'s chain {chain}{more} is on this host"),
                "two meshes capture the same connections: which one gets them is chance",
                match others {
                    0 => run(delete.replace("CHAIN", chain)),
                    _ => by_hand(format!(
                        "remove the other mesh by its own means; rule by rule: `{}`",
                        delete.replace("CHAIN", chain)
                    )),
                },
            ));
        }
    }
    let by_legacy = legacy.lines().any(|line| line.starts_with("-A "));
    if by_legacy
        && nft.contains("hook output")
        && !foreign_chains.iter().any(|(_, _, fix)| fix.starts_with("iptables-legacy"))
    {
        found.push(warning(
            "rules of iptables-legacy are there beside those of nftables",
            "`nft list ruleset` and `iptables-save` each show a part of what the kernel does",
            by_hand("see them with `iptables-legacy-save`; move them with `iptables-restore-translate`, or have their owner use iptables-nft"),
        ));
    }
    Ok(found)
}

struct NftChain<'a> {
    table: &'a str,
    name: &'a str,
    lines: Vec<&'a str>,
}

impl NftChain<'_> {
    /// Reports whether this NAT chain sees outgoing connections before `priority`.
    fn hooked_before(&self, priority: i64) -> bool {
        let hook = self.lines.iter().find(|line| line.starts_with("type nat hook output priority "));
        let words = hook.and_then(|hook| hook.split("priority ").nth(1)?.split(';').next());
        words.and_then(number_of).is_some_and(|own| own <= priority)
    }

    fn has_rules(&self) -> bool {
        { self.lines.iter() }
            .any(|line| !line.is_empty() && !line.starts_with('}') && !line.starts_with("type "))
    }

    fn redirects(&self) -> bool {
        { self.lines.iter() }.any(|line| line.contains("redirect to") || line.contains("dnat "))
    }
}

/// Parses a priority such as `-150`, `dstnat` or `mangle - 5` (nft(8)).
fn number_of(priority: &str) -> Option<i64> {
    let mut words = priority.split_whitespace();
    let first = words.next()?;
    let base = match first {
        "raw" => -300,
        "mangle" => -150,
        "dstnat" => -100,
        "filter" => 0,
        "security" => 50,
        "srcnat" => 100,
        number => return number.parse().ok(),
    };
    match (words.next(), words.next().and_then(|number| number.parse::<i64>().ok())) {
        (Some("-"), Some(number)) => Some(base - number),
        (Some("+"), Some(number)) => Some(base + number),
        _ => Some(base),
    }
}

/// Splits the output of `nft list ruleset` into chains.
fn chains_of(ruleset: &str) -> Vec<NftChain<'_>> {
    let (mut table, mut chains) = ("", Vec::<NftChain<'_>>::new());
    for line in ruleset.lines() {
        let trimmed = line.trim();
        if let Some(name) = trimmed.strip_prefix("table ").and_then(|rest| rest.strip_suffix(" {")) {
            table = name;
        } else if let Some(name) = trimmed.strip_prefix("chain ").and_then(|rest| rest.strip_suffix(" {")) {
            chains.push(NftChain { table, name, lines: Vec::new() });
        } else if let Some(chain) = chains.last_mut() {
            chain.lines.push(trimmed);
        }
    }
    chains
}

/// D40: captured connections reach Envoy, in both families and directions.
pub(super) fn end_to_end(facts: &Facts) -> Verdict {
    captures(facts)?;
    let fault = facts.net.as_ref().ok().and_then(|status| status.path_fault.as_ref());
    let tried = match (&facts.captured, fault) {
        (Ok(tried), _) => tried.as_slice(),
        (Err(_), Some(_)) => &[],
        (Err(why), None) => return Err(Skip::Unavailable(why.clone())),
    };
    let mut found: Vec<Finding> = Vec::new();
    for (family, is_v4) in [("IPv4", true), ("IPv6", false)] {
        let of_family = || tried.iter().filter(|(at, _)| at.is_ipv4() == is_v4);
        let failed: Vec<_> =
            of_family().filter_map(|(at, result)| result.as_ref().err().map(|why| (at, why))).collect();
        let Some((at, why)) = failed.first() else { continue };
        let rule = facts.out(HostCommand::Rules).ok().and_then(rule_in_the_way);
        let of = of_family().count();
        let (what, fix) = match rule {
            Some((rule, fix)) => (format!("; {rule} is in the way"), fix),
            None => (
                String::new(),
                "a firewall has to let tcp to port 15001 out (by the interface of the original route) and back: `nft list ruleset`, \
                 `ip rule`"
                    .to_owned(),
            ),
        };
        found.push(
            wrong(
                format!(
                    "captured connections of {family} do not arrive at Envoy: {at} cannot be reached: {why} ({} of {of} addresses){what}",
                    failed.len()
                ),
                "connections to names of the mesh hang or fail, and captured ones to real addresses may, too",
                by_hand(fix),
            )
            .follows(&[RootCause::Envoy, RootCause::Net, RootCause::Agent]),
        );
    }
    // A loss that the doctor has observed itself is not reported twice. Only vmesh-net observes connections from outside.
    if let Some(fault) = fault
        && (found.is_empty() || fault.contains("from outside"))
    {
        found.push(of_vmesh_net(fault));
    }
    Ok(found)
}

/// Returns a finding for a loss that vmesh-net observed: of its own connections, or of untrusted clients' connections that were dropped.
fn of_vmesh_net(fault: &str) -> Finding {
    wrong(
        format!("vmesh-net sees captured connections that do not arrive at Envoy: {fault}"),
        "these connections hang or fail",
        by_hand("have the owner of the rule that is named let them through; `vmesh-net` looks again at each change of rules"),
    )
    .follows(&[RootCause::Envoy, RootCause::Net, RootCause::Agent])
}

/// Returns the foreign rule that most likely drops captured connections, and its fix.
fn rule_in_the_way(ruleset: &str) -> Option<(String, String)> {
    let chains = chains_of(ruleset);
    let foreign = || chains.iter().filter(|chain| !chain.table.ends_with(" vmesh"));
    for chain in foreign() {
        if let Some(rule) = chain.lines.iter().find(|line| line.contains("notrack")) {
            let what = format!("`{rule}` in chain {} of table {}", chain.name, chain.table);
            let fix = format!(
                "what is not tracked cannot be redirected: have `notrack` leave out what is captured (`nft list chain {} {}`)",
                chain.table, chain.name
            );
            return Some((what, fix));
        }
    }
    let hooked = |chain: &&NftChain<'_>| {
        let hook = chain.lines.iter().find(|line| line.starts_with("type filter hook "));
        hook.is_some_and(|hook| ["output", "postrouting"].iter().any(|name| hook.contains(name)))
    };
    for chain in foreign().filter(hooked) {
        let drops = chain.lines.iter().find(|line| {
            line.contains("policy drop")
                || line.ends_with("drop")
                || line.split_whitespace().any(|word| word == "reject")
        });
        if let Some(rule) = drops {
            let rule = if rule.starts_with("type ") { "policy drop" } else { rule };
            let what = format!("`{rule}` in chain {} of table {}", chain.name, chain.table);
            let fix = format!(
                "let captured connections through, there and in the firewall's own configuration: `nft insert rule {} {} tcp dport 15001 accept`",
                chain.table, chain.name
            );
            return Some((what, fix));
        }
    }
    for chain in foreign() {
        if let Some(rule) = chain.lines.iter().find(|line| line.contains(" fib ") && line.ends_with("drop")) {
            let what = format!("`{rule}` in chain {} of table {}", chain.name, chain.table);
            let fix = "it drops what comes back for an address that it takes for spoofed, as wg-quick's rule does: let it leave out \
                       the loopback interface";
            return Some((what, fix.to_owned()));
        }
    }
    None
}

/// D19: Envoy's own connections are not captured.
pub(super) fn loop_guard(facts: &Facts) -> Verdict {
    let outline = captures(facts)?;
    let mut found = Vec::new();
    let loops = "Envoy's own connections are captured again, and go round in circles";
    if !outline.by_systemd() {
        // Only vmesh-net knows the user of the agent.
        return Err(Skip::NotApplicable);
    }
    facts.ran(HostCommand::Users)?;
    let ours = [("vmesh-agent", facts.user("vmesh-agent")), ("vmesh-envoy", facts.user("vmesh-envoy"))];
    for (name, user) in ours {
        match user {
            None => found.push(wrong(
                format!("there is no user {name}"),
                loops,
                run("systemd-sysusers /usr/lib/sysusers.d/vmesh.conf"),
            )),
            Some(0) => found.push(wrong(
                format!("the user {name} is root"),
                "no connection of any program of root is captured",
                by_hand(format!(
                    "give it an id of its own: `usermod -u 998 {name}`, then reinstall the package"
                )),
            )),
            Some(_) => {}
        }
    }
    let listening = facts.listening()?;
    for workload in &outline.workloads {
        let at = std::net::SocketAddr::new(
            workload.host.unwrap_or(std::net::Ipv4Addr::LOCALHOST.into()),
            workload.port,
        );
        let application = listening.iter().find(|listener| listener.takes(at));
        if let Some((name, _)) =
            ours.iter().find(|(_, user)| user.is_some() && application.map(|a| a.user) == *user)
        {
            found.push(wrong(
                format!("the application of `{}` runs as {name}", workload.service),
                "what it calls is taken for Envoy's own, and never captured",
                by_hand("run it as a user of its own (`User=` of its unit)"),
            ));
        }
    }
    if let Ok(Some(slice)) = facts.unit("vmesh.slice")
        && slice.get("ActiveState") != "active"
    {
        found.push(
            wrong("vmesh.slice is not active", loops, run("systemctl start vmesh.slice"))
                .follows(&[RootCause::Envoy]),
        );
    }
    Ok(found)
}

/// D20: redirects hold, or the reason why not.
pub(super) fn dead_man(facts: &Facts) -> Verdict {
    captures(facts)?;
    let status = facts.net.as_ref().map_err(|why| Skip::Unavailable(why.clone()))?;
    if matches!(status.state, State::Off | State::Bypassed) {
        return Ok(Vec::new());
    }
    let mut found: Vec<Finding> = Vec::new();
    if let Some(silent) = status.agent_silent_for.filter(|silent| *silent > SILENT) {
        found.push(
            wrong(
                format!("the agent has said nothing to vmesh-net for {silent} s"),
                "redirects that may lapse do so when the dead-man runs out",
                run("systemctl restart vmesh-agent"),
            )
            .marked_as(RootCause::Agent)
            .follows(&[RootCause::Agent]),
        );
    }
    let gone = match status.envoy {
        EnvoyHealth::WrongUser => Some(
            "a program of another user listens at Envoy's capture ports (`ss -ltnp 'sport = 15001 or sport = 15006'`)",
        ),
        EnvoyHealth::Gone => Some("nobody listens at Envoy's capture ports"),
        EnvoyHealth::Hangs => Some("Envoy's capture ports are open, and nobody serves them"),
        EnvoyHealth::Unknown | EnvoyHealth::Well | EnvoyHealth::Other => None,
    };
    if let Some(what) = gone {
        let fix = run("systemctl restart vmesh-envoy");
        let effect = "connections to virtual addresses fail; those to real ones too, until redirects lapse";
        found.push(wrong(what, effect, fix).marked_as(RootCause::Envoy).follows(&[RootCause::Envoy]));
    }
    if status.redirects == RedirectState::Lapsed {
        found.push(
            wrong(
                "redirects have lapsed",
                "new connections go past Envoy where that is allowed (`on_loss: open`), and fail where it is not",
                by_hand("they hold again by themselves once the agent speaks and Envoy serves"),
            )
            .follows(&[RootCause::Envoy, RootCause::Agent, RootCause::Net]),
        );
    }
    Ok(found)
}

/// D21: the bypass works.
pub(super) fn bypass(facts: &Facts) -> Verdict {
    let outline = facts.outline()?;
    if !(outline.by_systemd() || outline.captures()) {
        return Err(Skip::NotApplicable);
    }
    let effect = "in a hurry this host could not be taken out of the mesh";
    let Some(owned) = facts.modes.get(BYPASS).cloned().unwrap_or(Ok(None))? else {
        if !outline.captures() {
            return Err(Skip::NotApplicable);
        }
        let fix = run("apt-get install --reinstall vmesh-agent");
        return Ok(vec![wrong(format!("{BYPASS} is not there"), effect, fix)]);
    };
    let mut found = Vec::new();
    if owned.user != 0 {
        let what = format!("{BYPASS} belongs to user {}, and root runs it", owned.user);
        let effect = "whoever may write it is root at the next bypass, or when vmesh-net fails";
        found.push(wrong(what, effect, run(format!("chown root:root {BYPASS}"))));
    }
    if owned.mode & 0o022 != 0 {
        let what = format!("{BYPASS} may be written by others than root (mode {:o})", owned.mode & 0o7777);
        let effect = "whoever may write it is root at the next bypass, or when vmesh-net fails";
        found.push(wrong(what, effect, run(format!("chmod 755 {BYPASS}"))));
    } else if owned.mode & 0o111 == 0 {
        found.push(wrong(format!("{BYPASS} cannot be run"), effect, run(format!("chmod 755 {BYPASS}"))));
    }
    if let Ok(ran) = facts.ran(HostCommand::BypassSyntax)
        && ran.code != Some(0)
    {
        let what = format!("{BYPASS} is no script that sh accepts: {}", super::facts::last_line(&ran.err));
        found.push(wrong(what, effect, run("apt-get install --reinstall vmesh-agent")));
    }
    Ok(found)
}
