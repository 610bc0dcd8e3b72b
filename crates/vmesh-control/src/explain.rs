//! Explains how requests from a node reach a service, for `vmeshctl explain`.
//!
//! The explanation is derived from the compiled configuration rather than from the documents, so it describes
//! what the node actually receives.

use std::collections::BTreeSet;
use std::sync::Arc;

use vmesh_api::{
    Cluster, EndpointSecurity, Explanation, Hop, ListedProblem, NodeState, ServiceEndpoint, Setting,
};
use vmesh_catalog::World;
use vmesh_compile::effective::EffectiveSettings;
use vmesh_compile::{CompiledClass, NodeClass, NodeConfig, Shape};
use vmesh_model::document::{self, Match, OnLoss, PathMatch, PlacedDocument, Retry, Rule, TextMatch};
use vmesh_model::node::{Client, Upstreams};
use vmesh_model::text::show_duration;
use vmesh_model::{Endpoint, Health, NodeReport, ServiceName, Settings};

/// The properties of a node that decide how it calls services.
struct Caller<'a> {
    documents: Vec<Arc<PlacedDocument<document::NodeDocument>>>,
    class: &'a NodeClass,
}

/// The xDS state of a node.
#[derive(Debug, Clone)]
pub(crate) struct NodeStatus {
    pub(crate) state: NodeState,
    pub(crate) reason: Option<String>,
    /// The Unix time, in seconds, since which the node has no stream, and the seconds that passed since then.
    pub(crate) offline_since: Option<u64>,
    pub(crate) offline_for: Option<u64>,
}

/// The state of a node without a stream.
impl Default for NodeStatus {
    fn default() -> Self {
        NodeStatus { state: NodeState::Offline, reason: None, offline_since: None, offline_for: None }
    }
}

/// Explains how `report`'s node reaches `service`. The error is a message for the operator: the service does
/// not exist.
pub(crate) fn explain(
    world: &World,
    class: &CompiledClass,
    config: &NodeConfig,
    report: &NodeReport,
    service: &ServiceName,
    node: NodeStatus,
) -> Result<Explanation, String> {
    let Some(compiled) = class.services.get(service) else {
        return Err(format!(
            "there is no service `{service}`: no discovery source and no document knows it; `vmeshctl services` lists \
             those that there are"
        ));
    };
    let caller = Caller { documents: world.documents.nodes_for(report), class: &class.class };
    let shape = &compiled.shape;
    let declared = config.scope.contains(service.as_str());
    let mut listeners =
        declared_listeners(report, service, config.scope.own.resources().iter().map(|r| &**r.name()));
    if declared {
        listeners.extend(compiled.virtual_addresses().iter().map(ToString::to_string));
    }
    let routes = describe_routes(world, service);
    let names: BTreeSet<ServiceName> =
        std::iter::once(service.clone()).chain(shape.references.iter().cloned()).collect();
    let clusters: Vec<_> = names.iter().flat_map(|name| describe_clusters(world, name, &caller)).collect();
    let obstacle = find_obstacle(world, report, service, shape, node.state, declared, listeners.is_empty());
    let concerns = |place: &str| {
        place.contains(&format!("`{service}`")) || place.contains(&format!("`{}`", report.name))
    };
    let problems = compiled
        .problems
        .iter()
        .chain(config.problems.iter().filter(|problem| problem.message.contains(&format!("`{service}`"))))
        .chain(world.problems.iter().filter(|problem| concerns(&problem.subject)))
        .map(ListedProblem::from)
        .collect();
    let registered = world.services.get(service);
    let tls = if world.documents.uses_mtls() { describe_tls(world, service, report) } else { Vec::new() };
    Ok(Explanation {
        service: service.clone(),
        from: report.name.clone(),
        node: node.state,
        reason: node.reason,
        protocol: shape.effective.protocol,
        state: registered.map(|service| service.state).unwrap_or_default(),
        reachable: obstacle.is_none(),
        obstacle,
        listeners,
        routes,
        clusters,
        tls,
        settings: describe_settings(world, service, &caller, &shape.effective),
        problems,
    })
}

fn describe_tls(world: &World, service: &ServiceName, report: &NodeReport) -> Vec<EndpointSecurity> {
    let endpoints = vmesh_compile::tls(world, service, report).into_iter();
    let shown = endpoints.map(|endpoint| EndpointSecurity {
        address: endpoint.address,
        connection: endpoint.connection.as_str().to_owned(),
        reason: endpoint.reason,
    });
    shown.collect()
}

/// Returns the first reason why requests of the node to the service fail or may be outdated, or `None`.
fn find_obstacle(
    world: &World,
    report: &NodeReport,
    service: &ServiceName,
    shape: &Shape,
    state: NodeState,
    is_declared: bool,
    has_no_listener: bool,
) -> Option<String> {
    let usable = |health: Health| matches!(health, Health::Unknown | Health::Healthy);
    let endpoints = world.endpoints(service);
    if !is_declared {
        Some(format!("`{}` does not declare `{service}` among its upstreams", report.name))
    } else if state == NodeState::Offline {
        Some(format!(
            "`{}` is offline: its proxy continues with the last configuration it received",
            report.name
        ))
    } else if state == NodeState::Rejected {
        Some(format!("`{}` rejected its configuration and continues with the previous one", report.name))
    } else if endpoints.is_empty() && shape.references.is_empty() {
        Some("it has no endpoint: requests fail with 503".to_owned())
    } else if !endpoints.is_empty() && !endpoints.iter().any(|endpoint| usable(endpoint.health)) {
        Some("none of its endpoints is healthy: Envoy tries them all the same".to_owned())
    } else if report.client == Client::Envoy && has_no_listener {
        Some(format!("`{}` has no port for it: give the upstream a `listen`", report.name))
    } else {
        None
    }
}

/// Returns the addresses on which the node's Envoy listens for `service`: those declared, except rejected
/// ones.
fn declared_listeners<'a>(
    report: &NodeReport,
    service: &ServiceName,
    own: impl Iterator<Item = &'a str>,
) -> Vec<String> {
    let made: BTreeSet<_> = own.filter_map(|name| name.strip_prefix("outbound|")).collect();
    let Upstreams::Declared(declared) = &report.upstreams else { return Vec::new() };
    let ports = declared.iter().filter(|upstream| upstream.service == *service);
    ports
        .filter_map(|upstream| upstream.listen)
        .map(|address| address.to_string())
        .filter(|address| made.contains(address.as_str()))
        .collect()
}

fn describe_routes(world: &World, service: &ServiceName) -> Vec<Hop> {
    let mut hops = Vec::new();
    if let Some(route) = world.documents.routes.get(service) {
        hops.extend(
            route.rules.iter().map(|rule| Hop {
                when: describe_match(&rule.matches),
                then: describe_action(service, rule),
            }),
        );
    }
    hops.push(Hop { when: "anything else".to_owned(), then: format!("all of {service}") });
    hops
}

fn describe_match(matches: &Match) -> String {
    let mut parts = Vec::new();
    if !matches.method.is_empty() {
        parts.push(matches.method.iter().map(|method| &*method.0).collect::<Vec<_>>().join(" or "));
    }
    match &matches.path {
        None => {}
        Some(PathMatch::Exact(path)) => parts.push(format!("path {path}")),
        Some(PathMatch::Prefix(path)) => parts.push(format!("path {path}*")),
        Some(PathMatch::Regex(regex)) => parts.push(format!("path ~ {regex}")),
    }
    parts.extend(
        matches.headers.iter().map(|(name, text)| format!("header {name} {}", describe_text_match(text))),
    );
    parts.extend(
        matches.query.iter().map(|(name, text)| format!("query {name} {}", describe_text_match(text))),
    );
    if parts.is_empty() { "any request".to_owned() } else { parts.join(", ") }
}

fn describe_text_match(text: &TextMatch) -> String {
    match text {
        TextMatch::Exact(text) => format!("= {text}"),
        TextMatch::Prefix(text) => format!("= {text}*"),
        TextMatch::Suffix(text) => format!("= *{text}"),
        TextMatch::Contains(text) => format!("= *{text}*"),
        TextMatch::Regex(regex) => format!("~ {regex}"),
        TextMatch::Present(true) => "is there".to_owned(),
        TextMatch::Present(false) => "is not there".to_owned(),
    }
}

fn describe_action(service: &ServiceName, rule: &Rule) -> String {
    let mut text = match &rule.redirect {
        Some(redirect) => match &redirect.service {
            Some(other) => format!("as {other}'s routes say"),
            None => {
                let host = redirect.host.as_deref().unwrap_or_default();
                let path = redirect.path.as_deref().or(redirect.prefix.as_deref()).unwrap_or_default();
                format!("redirect {} to {host}{path}", redirect.code.unwrap_or(301))
            }
        },
        None if rule.split.is_empty() => format!("all of {service}"),
        None => {
            let total: u32 = rule.split.iter().map(|target| target.weight).fold(0, u32::saturating_add);
            let share = |weight: u32| f64::from(weight) * 100.0 / f64::from(total.max(1));
            let targets = rule.split.iter().map(|target| {
                let to = target.service.as_ref().unwrap_or(service);
                let name = vmesh_compile::cluster_name(to, target.subset.as_ref());
                format!("{:.0}% {name}", share(target.weight))
            });
            targets.collect::<Vec<_>>().join(", ")
        }
    };
    if let Some(timeout) = rule.timeout {
        text.push_str(&format!(", timeout {timeout}"));
    }
    if let Some(retry) = &rule.retry {
        text.push_str(&format!(", retry {}", describe_retry(retry)));
    }
    text
}

fn describe_retry(retry: &Retry) -> String {
    let on: Vec<_> = retry.on.iter().map(|on| on.as_str()).collect();
    match (retry.attempts, on.is_empty()) {
        (0, _) => "never".to_owned(),
        (n, true) => format!("{n} times"),
        (n, false) => format!("{n} times on {}", on.join(", ")),
    }
}

fn describe_clusters(world: &World, service: &ServiceName, caller: &Caller<'_>) -> Vec<Cluster> {
    let endpoints: Vec<&Endpoint> = world.endpoints(service).iter().collect();
    let settings = world.documents.settings(service, &caller.documents);
    let balancing = EffectiveSettings::of(&settings, world.protocol(service)).load_balancing;
    let cluster = |name: String, endpoints: &[&Endpoint]| {
        let priorities = vmesh_compile::priorities(endpoints, &balancing, caller.class.zone.as_deref());
        // Priorities are shown only if they differ.
        let several = priorities.iter().any(|priority| *priority > 0);
        let endpoints = endpoints.iter().zip(priorities).map(|(endpoint, priority)| ServiceEndpoint {
            priority: several.then_some(priority),
            ..ServiceEndpoint::from(*endpoint)
        });
        Cluster { name, endpoints: endpoints.collect() }
    };
    let mut clusters = vec![cluster(service.to_string(), &endpoints)];
    if let Some(document) = world.documents.services.get(service) {
        clusters.extend(document.subsets.iter().map(|(name, subset)| {
            let part: Vec<_> = endpoints.iter().copied().filter(|e| subset.contains(e)).collect();
            cluster(vmesh_compile::cluster_name(service, Some(name)), &part)
        }));
    }
    clusters
}

fn describe_settings(
    world: &World,
    service: &ServiceName,
    caller: &Caller<'_>,
    effective: &EffectiveSettings,
) -> Vec<Setting> {
    let settings = world.documents.settings(service, &caller.documents);
    let mtls = settings.mtls_mode();
    let Settings { capture, origins, .. } = settings;
    let outliers = &effective.outlier_detection;
    let mut values = vec![
        ("load_balancing", effective.load_balancing.policy.as_str().to_owned()),
        ("timeouts.connect", show_duration(effective.connect)),
        ("timeouts.request", effective.request.map_or_else(|| "none".to_owned(), show_duration)),
        ("timeouts.idle", show_duration(effective.idle)),
        ("retry", describe_retry(&effective.retry)),
        (
            "outlier_detection",
            outliers.consecutive_5xx.map_or_else(
                || "5 failed connections".to_owned(),
                |n| format!("5 failed connections, {n} times 5xx"),
            ),
        ),
    ];
    if caller.class.captured.is_some() {
        let percent =
            capture.percent.map_or_else(|| "as the host says".to_owned(), |share| format!("{share} %"));
        values.push(("capture.percent", percent));
        values
            .push(("capture.on_loss", capture.on_loss.map_or("as the host says", OnLoss::as_str).to_owned()));
    }
    if world.documents.uses_mtls() {
        values.push(("mtls.mode", mtls.as_str().to_owned()));
    }
    let built_in = || "built in".to_owned();
    let setting = |(name, value): (&str, String)| Setting {
        name: name.to_owned(),
        value,
        set_by: origins.get(name).map_or_else(built_in, ToString::to_string),
    };
    values.into_iter().map(setting).collect()
}
