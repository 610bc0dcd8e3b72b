//! Formats the API's answers as text, and determines whether something in them needs attention.

use std::collections::BTreeMap;

use vmesh_api::{
    Discovery, DiscoverySource, Event, Events, EvictedEndpoint, Explanation, HeldRemoval, Node, NodeState,
    Nodes, Problems, Service, ServiceEndpoint, Services, Source, SourceState, Status, UnresolvedName,
};
use vmesh_model::State;
use vmesh_model::node::Upstreams;

use crate::table::table;

pub(crate) fn status(status: &Status, evicted: &[EvictedEndpoint]) -> (String, bool) {
    let nodes = &status.nodes;
    let all = nodes.synced + nodes.pushing + nodes.rejected + nodes.offline;
    let ready = match status.ready {
        true => "ready".to_owned(),
        false => format!("NOT READY: waiting for {}", status.waiting_for.join(", ")),
    };
    let mut text = format!(
        "control plane {} ({}), {ready}, up {}\n\
         revision      {}\n\
         services      {} with {} endpoints, {} documents\n\
         nodes         {all}: {} in sync, {} pushing, {} rejected, {} offline\n",
        status.version,
        status.trust_domain,
        age(Some(status.uptime_seconds)),
        status.revision,
        status.services,
        status.endpoints,
        status.documents,
        nodes.synced,
        nodes.pushing,
        nodes.rejected,
        nodes.offline,
    );
    for source in &status.sources {
        text.push_str(&source_line(source));
    }
    for address in &status.insecure {
        text.push_str(&format!(
            "plaintext     {address}: other hosts connect without encryption (`listen.insecure`)\n"
        ));
    }
    if !evicted.is_empty() {
        text.push_str(&format!("evicted       {} endpoints: see `vmeshctl discovery`\n", evicted.len()));
    }
    match status.problems {
        0 => text.push_str("problems      none\n"),
        n => text.push_str(&format!("problems      {n}: see `vmeshctl problems`\n")),
    }
    let stale = status.sources.iter().any(|source| source.state != State::Fresh);
    (text, !status.ready || stale || nodes.rejected > 0 || status.problems > 0 || !evicted.is_empty())
}

fn source_line(source: &Source) -> String {
    let because =
        source.because.as_ref().map_or_else(String::new, |because| format!("\n              {because}"));
    format!(
        "source        {} {}, {} services, answered {} ago{because}\n",
        source.name,
        emphasised(source.state),
        source.services,
        age(source.age_seconds),
    )
}

/// Returns the name of a state, in capitals if it needs attention.
fn emphasised(state: State) -> String {
    match state {
        State::Fresh => state.to_string(),
        State::Stale | State::Held => state.to_string().to_uppercase(),
    }
}

pub(crate) fn services(answer: &Services, evicted: &[EvictedEndpoint]) -> (String, bool) {
    let heading = ["SERVICE", "PROTOCOL", "ENDPOINTS", "VERSIONS", "ZONES", "STATE"].map(str::to_owned);
    let mut rows = vec![heading];
    for service in &answer.services {
        rows.push([
            service.name.to_string(),
            service.protocol.to_string(),
            endpoints(service, evicted.iter().filter(|one| one.service == service.name).count()),
            counted(service.endpoints.iter().map(|endpoint| endpoint.version.as_deref())),
            counted(service.endpoints.iter().map(|endpoint| endpoint.zone.as_deref())),
            emphasised(service.state),
        ]);
    }
    let mut text = table(&rows);
    for service in &answer.services {
        if let Some(because) = &service.because {
            text.push_str(&format!("{}: {because}\n", service.name));
        }
    }
    if answer.services.is_empty() {
        text = "no service: no discovery source names one\n".to_owned();
    }
    (text, !evicted.is_empty() || answer.services.iter().any(|service| service.state != State::Fresh))
}

/// Formats a number of endpoints, such as `3` or `3 (1 draining, 1 evicted)`. Evicted endpoints are not part of the first number.
fn endpoints(service: &Service, evicted: usize) -> String {
    use vmesh_model::Health::{Draining, Healthy, Unhealthy, Unknown};
    let ill = |health| service.endpoints.iter().filter(|endpoint| endpoint.health == health).count();
    let marks: Vec<_> = [Unhealthy, Draining]
        .into_iter()
        .filter(|health| !matches!(health, Healthy | Unknown) && ill(*health) > 0)
        .map(|health| format!("{} {health}", ill(health)))
        .chain((evicted > 0).then(|| format!("{evicted} evicted")))
        .collect();
    match marks.as_slice() {
        [] => service.endpoints.len().to_string(),
        marks => format!("{} ({})", service.endpoints.len(), marks.join(", ")),
    }
}

/// Formats the distinct values, such as `v1 x2, v2`.
fn counted<'a>(values: impl Iterator<Item = Option<&'a str>>) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for value in values.flatten() {
        *counts.entry(value).or_default() += 1;
    }
    if counts.is_empty() {
        return "-".to_owned();
    }
    let shown =
        counts.iter().map(|(value, n)| if *n == 1 { (*value).to_owned() } else { format!("{value} x{n}") });
    shown.collect::<Vec<_>>().join(", ")
}

pub(crate) fn service(answer: &Services, evicted: &[EvictedEndpoint]) -> (String, bool) {
    let mut text = String::new();
    for service in &answer.services {
        text.push_str(&format!("{}  {}  {}\n", service.name, service.protocol, emphasised(service.state)));
        if let Some(because) = &service.because {
            text.push_str(&format!("{because}\n"));
        }
        text.push_str(&endpoint_table(&service.endpoints));
    }
    evicted.iter().for_each(|evicted| text.push_str(&one_evicted(evicted)));
    (text, !evicted.is_empty() || answer.services.iter().any(|service| service.state != State::Fresh))
}

fn endpoint_table(endpoints: &[ServiceEndpoint]) -> String {
    let or_dash = |text: Option<&str>| text.unwrap_or("-").to_owned();
    // A column of priorities is shown only if some endpoint has one.
    let ranked = endpoints.iter().any(|endpoint| endpoint.priority.is_some());
    let heading = ["ENDPOINT", "HEALTH", "WEIGHT", "VERSION", "ZONE", "SOURCE"].into_iter();
    let heading = heading.chain(ranked.then_some("PRIORITY")).map(str::to_owned).collect();
    let mut cells: Vec<Vec<String>> = vec![heading];
    for endpoint in endpoints {
        let mut row = vec![
            endpoint.address.to_string(),
            endpoint.health.to_string(),
            endpoint.weight.to_string(),
            or_dash(endpoint.version.as_deref()),
            or_dash(endpoint.zone.as_deref()),
            endpoint.source.to_string(),
        ];
        if ranked {
            row.push(endpoint.priority.map_or_else(|| "-".to_owned(), |priority| priority.to_string()));
        }
        cells.push(row);
    }
    table(&cells)
}

pub(crate) fn nodes(answer: &Nodes) -> (String, bool) {
    let heading = ["NODE", "STATE", "ADDRESS", "ZONE", "SERVES", "CALLS", "RUNS"].map(str::to_owned);
    let mut rows = vec![heading];
    for node in &answer.nodes {
        rows.push([
            node.name.to_string(),
            node_state(node.state).to_owned(),
            node.address.map_or_else(|| "-".to_owned(), |address| address.to_string()),
            node.zone.as_deref().unwrap_or("-").to_owned(),
            joined(node.workloads.iter().map(|workload| workload.service.to_string())),
            calls(node),
            if node.build.is_empty() { "-".to_owned() } else { node.build.to_string() },
        ]);
    }
    let mut text = table(&rows);
    for node in &answer.nodes {
        if let (NodeState::Rejected | NodeState::Pushing, Some(reason)) = (node.state, &node.reason) {
            text.push_str(&format!("{}: {reason}\n", node.name));
        }
    }
    if answer.nodes.is_empty() {
        text = "no node has connected yet\n".to_owned();
    }
    (text, answer.nodes.iter().any(|node| node.state == NodeState::Rejected))
}

fn node_state(state: NodeState) -> &'static str {
    match state {
        NodeState::Synced => "in sync",
        NodeState::Pushing => "stale",
        NodeState::Rejected => "REJECTED",
        NodeState::Offline => "offline",
    }
}

fn calls(node: &Node) -> String {
    match &node.upstreams {
        Upstreams::All => "*".to_owned(),
        Upstreams::Declared(declared) => joined(declared.iter().map(|upstream| upstream.service.to_string())),
    }
}

pub(crate) fn discovery(answer: &Discovery) -> (String, bool) {
    let heading = ["SOURCE", "STATE", "ANSWERED", "SERVICES", "ENDPOINTS", "HELD", "MISSING"];
    let mut rows = vec![heading.map(str::to_owned)];
    for source in &answer.sources {
        let answered = match source.age_seconds {
            None => "never".to_owned(),
            seconds => format!("{} ago", age(seconds)),
        };
        rows.push([
            source.name.to_string(),
            source_state(source.state).to_owned(),
            answered,
            source.services.to_string(),
            source.endpoints.to_string(),
            source.held.iter().filter(|held| held.service.is_some()).count().to_string(),
            source.missing.to_string(),
        ]);
    }
    let mut text = table(&rows);
    answer.sources.iter().for_each(|source| text.push_str(&of_source(source)));
    answer.evicted.iter().for_each(|evicted| text.push_str(&one_evicted(evicted)));
    let is_fresh = answer.sources.iter().all(|source| source.state == SourceState::Fresh);
    (text, !is_fresh || !answer.evicted.is_empty())
}

fn one_evicted(evicted: &EvictedEndpoint) -> String {
    format!(
        "\n{} of {} is evicted: it has not been used for {}\n  to use it again: {}\n",
        evicted.address,
        evicted.service,
        age(Some(evicted.age_seconds)),
        evicted.command
    )
}

/// Maximum number of held services shown per source.
const HELD_SHOWN: usize = 20;

fn of_source(source: &DiscoverySource) -> String {
    let mut text = String::new();
    let why = |because: &str| format!("\n{} is {}: {because}\n", source.name, source_state(source.state));
    // Held removals are listed in detail below.
    if let (Some(because), true) = (&source.because, source.state != SourceState::Held) {
        text.push_str(&why(because));
        if source.state == SourceState::Stale && source.services > 0 {
            text.push_str("  its last good view stays in force, however long this lasts; traffic goes on\n");
        }
    }
    if let Some(command) = &source.command {
        text.push_str(&format!("  to take its changes again: {command}\n"));
    }
    for held in source.held.iter().take(HELD_SHOWN) {
        text.push_str(&one_held(source, held));
    }
    if let Some(more) = source.held.len().checked_sub(HELD_SHOWN)
        && more > 0
    {
        text.push_str(&format!("\nand {more} more of {}: `--json` lists them all\n", source.name));
    }
    text.push_str(&unresolved(source));
    text
}

/// Maximum number of unresolved host names shown per source.
const NAMES_SHOWN: usize = 10;

fn unresolved(source: &DiscoverySource) -> String {
    if source.unresolved == 0 {
        return String::new();
    }
    let mut text = format!("\n{} host names of {} are not resolved\n", source.unresolved, source.name);
    let shown: Vec<_> = source.unresolved_names.iter().take(NAMES_SHOWN).collect();
    for UnresolvedName { name, age_seconds, because, in_use } in &shown {
        let in_use = if *in_use { "; its last addresses stay in use" } else { "" };
        text.push_str(&format!("  {name}, for {}: {because}{in_use}\n", age(Some(*age_seconds))));
    }
    if let Some(more) = source.unresolved.checked_sub(shown.len())
        && more > 0
    {
        text.push_str(&format!("  and {more} more\n"));
    }
    text
}

fn one_held(source: &DiscoverySource, held: &HeldRemoval) -> String {
    let what = match &held.service {
        Some(service) => format!("{service} of {}", source.name),
        None => format!("all that is gone of {}", source.name),
    };
    if let ("fleet", Some(_)) = (&*held.kind, &held.service) {
        // The reason and the age are in the line of the whole source.
        return format!(
            "\n{what} has been HELD with it: {} of its {} endpoints are named\n  to believe it now: {}\n",
            held.has, held.had, held.command
        );
    }
    let readings = match (held.confirmations, held.confirmed) {
        (0, _) => String::new(),
        (of, confirmed) => format!(", and {of} more readings have to say the same ({confirmed} so far)"),
    };
    let until = match held.remaining_seconds {
        None => "until the operator accepts it or the source lists enough again".to_owned(),
        Some(seconds) => format!("{} more at least{readings}", age(Some(seconds))),
    };
    format!(
        "\n{what} has been HELD ({}) for {}; {until}\n  why: {}\n  to believe it now: {}\n",
        held.kind,
        age(Some(held.age_seconds)),
        held.because,
        held.command
    )
}

fn source_state(state: SourceState) -> &'static str {
    match state {
        SourceState::Fresh => "fresh",
        SourceState::Unresolved => "UNRESOLVED",
        SourceState::Held => "HELD",
        SourceState::Stale => "STALE",
        SourceState::Frozen => "FROZEN",
    }
}

pub(crate) fn events(answer: &Events) -> (String, bool) {
    if answer.events.is_empty() {
        return ("nothing has happened since the control plane started\n".to_owned(), false);
    }
    let mut rows = vec![["AGO", "SOURCE", "SERVICE", "WHAT", "WHY"].map(str::to_owned)];
    for event in &answer.events {
        let kind = event.kind.as_ref().map_or_else(String::new, |kind| format!(" ({kind})"));
        rows.push([
            age(Some(event.age_seconds)),
            event.source.as_deref().unwrap_or("-").to_owned(),
            event.service.as_ref().map_or("-", |service| service.as_str()).to_owned(),
            format!("{}{kind}", event.what),
            event.text.to_string(),
        ]);
    }
    (
        table(&rows),
        answer.events.iter().enumerate().any(|(at, event)| is_in_force(event, answer.events.get(at + 1..))),
    )
}

/// The events that begin a state, with the events that end it.
const ENDS: [(&str, &[&str]); 4] = [
    ("frozen", &["thawed"]),
    ("evicted", &["admitted"]),
    ("failing", &["answering", "given up"]),
    ("held", &["believed", "returned", "accepted", "held"]),
];

/// Reports whether the state that `event` began still lasts, since no later event ended it.
fn is_in_force(event: &Event, later: Option<&[Event]>) -> bool {
    let refused = ["refused", "rejected"].contains(&&*event.what);
    let Some((_, ends)) = ENDS.iter().find(|(what, _)| *what == &*event.what) else { return refused };
    let is_end = |other: &&Event| {
        let same_source = other.source.is_none() || other.source == event.source;
        // An event for a whole source applies to each of its services.
        let same_service = other.service.is_none() || other.service == event.service;
        let same_endpoint = event.what.as_ref() != "evicted"
            || other.text.split(": ").next() == event.text.split(": ").next();
        ends.contains(&&*other.what) && same_source && same_service && same_endpoint
    };
    let ended = later.into_iter().flatten().find(is_end);
    ended.is_none()
}

fn joined(names: impl Iterator<Item = String>) -> String {
    let names: Vec<_> = names.collect();
    match names.len() {
        0 => "-".to_owned(),
        1..=4 => names.join(", "),
        n => format!("{}, and {} more", names.get(..3).unwrap_or_default().join(", "), n - 3),
    }
}

pub(crate) fn problems(answer: &Problems) -> (String, bool) {
    if answer.problems.is_empty() {
        return ("no problems\n".to_owned(), false);
    }
    let mut text = String::new();
    for problem in &answer.problems {
        text.push_str(&format!("{}: {}\n", problem.place, problem.message));
    }
    (text, true)
}

pub(crate) fn explanation(answer: &Explanation) -> (String, bool) {
    let mut text = match &answer.obstacle {
        None => format!("{} -> {}  {}: requests get through\n", answer.from, answer.service, answer.protocol),
        Some(obstacle) => format!("{} -> {}  {}: {obstacle}\n", answer.from, answer.service, answer.protocol),
    };
    let reason = answer.reason.as_ref().map_or_else(String::new, |reason| format!(": {reason}"));
    text.push_str(&format!("\nnode {}  {}{reason}\n", answer.from, node_state(answer.node)));
    match answer.listeners.as_slice() {
        [] => text.push_str("port  none: it declares no `listen` for this upstream\n"),
        listeners => text.push_str(&format!("port  applications dial {}\n", listeners.join(", "))),
    }
    text.push_str("\nroutes, the first that matches decides\n");
    for (at, hop) in answer.routes.iter().enumerate() {
        text.push_str(&format!("  {}. {}  ->  {}\n", at + 1, hop.when, hop.then));
    }
    for cluster in &answer.clusters {
        text.push_str(&format!("\ncluster {} ({} endpoints)\n", cluster.name, cluster.endpoints.len()));
        for line in endpoint_table(&cluster.endpoints).lines() {
            text.push_str(&format!("  {line}\n"));
        }
    }
    if !answer.tls.is_empty() {
        text.push_str("\nTLS\n");
        let rows: Vec<_> = answer
            .tls
            .iter()
            .map(|endpoint| {
                [endpoint.address.to_string(), endpoint.connection.clone(), endpoint.reason.clone()]
            })
            .collect();
        for line in table(&rows).lines() {
            text.push_str(&format!("  {line}\n"));
        }
    }
    text.push_str("\nsettings\n");
    let rows: Vec<_> =
        answer.settings.iter().map(|s| [s.name.clone(), s.value.clone(), s.set_by.clone()]).collect();
    for line in table(&rows).lines() {
        text.push_str(&format!("  {line}\n"));
    }
    if !answer.problems.is_empty() {
        text.push_str("\nproblems\n");
        for problem in &answer.problems {
            text.push_str(&format!("  {}: {}\n", problem.place, problem.message));
        }
    }
    (text, !answer.reachable || !answer.problems.is_empty())
}

/// Formats an age with one unit: `3s`, `5m`, `2h`, `4d`.
fn age(seconds: Option<u64>) -> String {
    match seconds {
        None => "never".to_owned(),
        Some(s @ 0..=119) => format!("{s}s"),
        Some(s @ 120..=7_199) => format!("{}m", s / 60),
        Some(s @ 7_200..=172_799) => format!("{}h", s / 3_600),
        Some(s) => format!("{}d", s / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use serde::de::DeserializeOwned;

    use super::*;

    fn check<T: DeserializeOwned>(show: impl Fn(&T) -> (String, bool), answer: &str, expected: Expect) {
        let (text, attention) = show(&serde_json::from_str(answer).unwrap());
        expected.assert_eq(&format!("{text}attention: {attention}\n"));
    }

    #[test]
    fn a_rejection_is_shown_in_envoys_own_words() {
        check(
            nodes,
            r#"{"nodes": [
                {"name": "web-1", "connected": true, "state": "synced", "reason": null, "client": "envoy",
                 "address": "10.0.1.17", "zone": "eu-1a", "labels": {}, "workloads": [],
                 "upstreams": {"declared": [{"service": "orders", "listen": "127.0.0.1:9001"}]}, "build": ""},
                {"name": "web-2", "connected": true, "state": "rejected",
                 "reason": "cluster payments: unknown TLS context", "client": "envoy", "address": null, "zone": null,
                 "labels": {}, "workloads": [], "upstreams": "all", "build": "envoy/1.40.0"}]}"#,
            expect![[r#"
                NODE   STATE     ADDRESS    ZONE   SERVES  CALLS   RUNS
                web-1  in sync   10.0.1.17  eu-1a  -       orders  -
                web-2  REJECTED  -          -      -       *       envoy/1.40.0
                web-2: cluster payments: unknown TLS context
                attention: true
            "#]],
        );
    }

    #[test]
    fn an_ill_endpoint_is_counted_and_a_stale_service_says_why() {
        check(
            |answer| services(answer, &[]),
            r#"{"services": [
                {"name": "orders", "protocol": "http", "state": "stale", "because": "cannot read services.d",
                 "endpoints": [
                    {"address": "10.0.1.11:8080", "health": "unknown", "weight": 1, "zone": "eu-1a", "version": "v1",
                     "labels": {}, "source": "file"},
                    {"address": "10.0.1.12:8080", "health": "draining", "weight": 1, "zone": "eu-1a", "version": "v1",
                     "labels": {}, "source": "file"}]}]}"#,
            expect![[r#"
                SERVICE  PROTOCOL  ENDPOINTS       VERSIONS  ZONES     STATE
                orders   http      2 (1 draining)  v1 x2     eu-1a x2  STALE
                orders: cannot read services.d
                attention: true
            "#]],
        );
    }

    #[test]
    fn what_is_held_is_shown_with_why_and_what_releases_it() {
        let counters = r#"{"reads": 1, "failed_reads": 0, "bad_records": 0, "index_resets": 0, "sessions_expired": 0,
            "connects": 1, "connections": 1, "held": {}, "rejected": {}}"#;
        let answer = format!(
            r#"{{"sources": [
                {{"name": "file:services.d", "state": "fresh", "required": true, "age_seconds": 2, "answered_at": 1,
                  "services": 2, "endpoints": 5, "missing": 0, "held": [], "counters": {counters}}},
                {{"name": "dns", "state": "unresolved", "because": "no name server answers for 11 of its host names",
                  "required": true, "age_seconds": 2, "answered_at": 1, "services": 1, "endpoints": 0, "missing": 0,
                  "held": [], "counters": {counters}, "unresolved": 12, "unresolved_names": [
                    {{"name": "a.dead.x", "age_seconds": 75, "because": "no name server has answered yet", "in_use": false}},
                    {{"name": "b.dead.x", "age_seconds": 5, "because": "temporary failure", "in_use": true}}]}},
                {{"name": "consul:dc1", "state": "held", "because": "2 services", "required": true, "age_seconds": 1,
                  "answered_at": 1, "services": 9, "endpoints": 80, "missing": 3, "counters": {counters}, "held": [
                    {{"service": "orders", "kind": "absent", "age_seconds": 12, "remaining_seconds": 18, "had": 3, "has": 0,
                      "confirmed": 0, "confirmations": 2, "because": "`consul:dc1` no longer lists this service",
                      "command": "vmeshctl --api unix:/s discovery accept consul:dc1 orders"}},
                    {{"kind": "fleet", "age_seconds": 300, "remaining_seconds": null, "had": 80, "has": 40,
                      "confirmed": 0, "confirmations": 0, "because": "half of it is gone",
                      "command": "vmeshctl --api unix:/s discovery accept consul:dc1"}},
                    {{"service": "pay", "kind": "fleet", "age_seconds": 300, "remaining_seconds": null, "had": 6, "has": 2,
                      "confirmed": 0, "confirmations": 0, "because": "half of it is gone",
                      "command": "vmeshctl --api unix:/s discovery accept consul:dc1 pay"}}]}},
                {{"name": "zk", "state": "frozen", "because": "its changes are not applied", "required": false,
                  "age_seconds": null, "answered_at": null, "frozen_at": 1,
                  "command": "vmeshctl --api unix:/s discovery thaw zk", "services": 0, "endpoints": 0, "missing": 0,
                  "held": [], "counters": {counters}}}],
              "evicted": [{{"service": "orders", "address": "10.0.0.1:80", "age_seconds": 60,
                           "command": "vmeshctl --api unix:/s discovery admit orders 10.0.0.1:80"}}]}}"#
        );
        check(
            discovery,
            &answer,
            expect![[r#"
                SOURCE           STATE       ANSWERED  SERVICES  ENDPOINTS  HELD  MISSING
                file:services.d  fresh       2s ago    2         5          0     0
                dns              UNRESOLVED  2s ago    1         0          0     0
                consul:dc1       HELD        1s ago    9         80         2     3
                zk               FROZEN      never     0         0          0     0

                dns is UNRESOLVED: no name server answers for 11 of its host names

                12 host names of dns are not resolved
                  a.dead.x, for 75s: no name server has answered yet
                  b.dead.x, for 5s: temporary failure; its last addresses stay in use
                  and 10 more

                orders of consul:dc1 has been HELD (absent) for 12s; 18s more at least, and 2 more readings have to say the same (0 so far)
                  why: `consul:dc1` no longer lists this service
                  to believe it now: vmeshctl --api unix:/s discovery accept consul:dc1 orders

                all that is gone of consul:dc1 has been HELD (fleet) for 5m; until the operator accepts it or the source lists enough again
                  why: half of it is gone
                  to believe it now: vmeshctl --api unix:/s discovery accept consul:dc1

                pay of consul:dc1 has been HELD with it: 2 of its 6 endpoints are named
                  to believe it now: vmeshctl --api unix:/s discovery accept consul:dc1 pay

                zk is FROZEN: its changes are not applied
                  to take its changes again: vmeshctl --api unix:/s discovery thaw zk

                10.0.0.1:80 of orders is evicted: it has not been used for 60s
                  to use it again: vmeshctl --api unix:/s discovery admit orders 10.0.0.1:80
                attention: true
            "#]],
        );
    }

    #[test]
    fn what_happened_is_a_line_each() {
        check(
            events,
            r#"{"events": [
                {"at_millis": 1, "age_seconds": 90, "source": "consul:dc1", "what": "held", "kind": "absent",
                 "service": "orders", "text": "`consul:dc1` no longer lists this service"},
                {"at_millis": 2, "age_seconds": 3, "what": "evicted", "service": "orders", "text": "10.0.0.1:80: not used"}]}"#,
            expect![[r#"
                AGO  SOURCE      SERVICE  WHAT           WHY
                90s  consul:dc1  orders   held (absent)  `consul:dc1` no longer lists this service
                3s   -           orders   evicted        10.0.0.1:80: not used
                attention: true
            "#]],
        );
    }

    #[test]
    fn what_is_evicted_stays_visible_and_wants_attention() {
        let evicted: Vec<EvictedEndpoint> = serde_json::from_str(
            r#"[{"service": "orders", "address": "[fd00::1]:80", "age_seconds": 60, "command": "vmeshctl discovery admit orders [fd00::1]:80"}]"#,
        )
        .unwrap();
        let answer =
            r#"{"services": [{"name": "orders", "protocol": "http", "state": "fresh", "endpoints": []}]}"#;
        check(
            |answer| services(answer, &evicted),
            answer,
            expect![[r#"
                SERVICE  PROTOCOL  ENDPOINTS      VERSIONS  ZONES  STATE
                orders   http      0 (1 evicted)  -         -      fresh
                attention: true
            "#]],
        );
        check(
            |answer| service(answer, &evicted),
            answer,
            expect![[r#"
                orders  http  fresh
                ENDPOINT  HEALTH  WEIGHT  VERSION  ZONE  SOURCE

                [fd00::1]:80 of orders is evicted: it has not been used for 60s
                  to use it again: vmeshctl discovery admit orders [fd00::1]:80
                attention: true
            "#]],
        );
    }

    #[test]
    fn what_began_and_has_not_ended_wants_attention() {
        let of = |all: &[(&str, &str)]| {
            let list: Vec<_> = all
                .iter()
                .map(|(what, text)| {
                    serde_json::json!({"at_millis": 1, "age_seconds": 1, "source": "a", "what": what, "service": "orders", "text": text})
                })
                .collect();
            events(&serde_json::from_value(serde_json::json!({ "events": list })).unwrap()).1
        };
        for (all, attention) in [
            (&[("frozen", "")][..], true),
            (&[("frozen", ""), ("thawed", "")], false),
            (&[("failing", ""), ("answering", ""), ("failing", "")], true),
            (&[("evicted", "10.0.0.1:80: x"), ("admitted", "10.0.0.2:80: x")], true),
            (&[("evicted", "10.0.0.1:80: x"), ("admitted", "10.0.0.1:80: x")], false),
            (&[("held", ""), ("believed", "")], false),
            (&[("refused", "")], true),
            (&[("confirmed", "")], false),
        ] {
            assert_eq!(of(all), attention, "{all:?}");
        }
    }

    #[test]
    fn names_and_reasons_that_act_on_a_terminal_are_shown_as_what_they_are() {
        let answer: Nodes = serde_json::from_str(
            r#"{"nodes": [{"name": "web-1", "connected": true, "state": "rejected", "reason": "a\nweb-2  in sync\u001b[2J",
                "client": "envoy", "address": null, "zone": "eu\u202e1", "labels": {}, "workloads": [], "upstreams": "all",
                "build": "envoy\u001b]0;x\u0007"}]}"#,
        )
        .unwrap();
        let (text, _) = nodes(&crate::print::printable_answer(&answer).unwrap());
        expect![[r#"
            NODE   STATE     ADDRESS  ZONE         SERVES  CALLS  RUNS
            web-1  REJECTED  -        eu\u{202e}1  -       *      envoy\u{1b}]0;x\u{7}
            web-1: a\nweb-2  in sync\u{1b}[2J
        "#]]
        .assert_eq(&text);
    }

    #[test]
    fn nothing_to_mend_is_said_and_is_success() {
        check(
            problems,
            r#"{"problems": []}"#,
            expect![[r#"
            no problems
            attention: false
        "#]],
        );
    }
}
