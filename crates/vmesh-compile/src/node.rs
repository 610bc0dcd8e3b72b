//! The configuration of one node: its upstreams, and the listeners that only this node receives.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rpds::RedBlackTreeMapSync;
use vmesh_catalog::World;
use vmesh_model::document::{self, PlacedDocument};
use vmesh_model::node::{Client, Upstream, Upstreams, Workload};
use vmesh_model::strict::did_you_mean;
use vmesh_model::{NodeReport, Place, Problem, Protocol, ServiceName};
use vmesh_proto::duration;
use vmesh_proto::envoy::config::listener::v3::{FilterChain, Listener};
use vmesh_proto::envoy::config::route::v3::route::Action;
use vmesh_proto::envoy::config::route::v3::route_action::ClusterSpecifier;
use vmesh_proto::envoy::config::route::v3::route_match::PathSpecifier;
use vmesh_proto::envoy::config::route::v3::{
    Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost,
};
use vmesh_xds::{Group, Kind, Resource, Scope};

use crate::class::CapturedDestinations;
use crate::cluster::{captured_application_cluster, local_cluster};
use crate::endpoints::local_assignment;
use crate::gate;
use crate::listener::{
    Direction, NetworkFilter, Routes, chain, forward_to_service, http, listener, outbound_name, tcp,
};
use crate::route::Share;
use crate::service::CompiledVariant;

/// The number of services above which a node that subscribes to all of them gets a problem that states the
/// cost.
const MANY_SERVICES: usize = 200;

/// The part of a node's configuration that it does not share with the other nodes of its class.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// The key of the node's [`NodeClass`](crate::NodeClass).
    pub class: Arc<str>,
    pub scope: Arc<Scope>,
    pub problems: Vec<Problem>,
}

/// The inputs from which a node's own resources are compiled.
pub(crate) struct NodeInput<'a> {
    pub(crate) world: &'a World,
    pub(crate) report: &'a NodeReport,
    /// The `Node` documents that select the node; later ones override earlier ones.
    pub(crate) documents: &'a [Arc<PlacedDocument<document::NodeDocument>>],
    /// The services compiled in the node's class, at least those that the node calls.
    pub(crate) services: &'a RedBlackTreeMapSync<ServiceName, Arc<CompiledVariant>>,
    pub(crate) captured: Option<CapturedDestinations>,
}

/// Returns the services that a node calls: those that its agent declares, and those that `Node` documents
/// add.
pub(crate) fn upstreams(
    report: &NodeReport,
    documents: &[Arc<PlacedDocument<document::NodeDocument>>],
) -> Vec<Upstream> {
    let declared = match &report.upstreams {
        Upstreams::All => &[],
        Upstreams::Declared(declared) => declared.as_slice(),
    };
    let added = documents.iter().flat_map(|document| &document.upstreams);
    declared.iter().chain(added).cloned().collect()
}

/// Compiles the resources that only this node receives; it calls `upstreams`. Returns them and the node's
/// problems.
pub(crate) fn compile(subject: &NodeInput<'_>, upstreams: &[Upstream]) -> (Arc<Group>, Vec<Problem>) {
    let NodeInput { world, report, documents, services, captured } = *subject;
    let mut node = NodeBuilder {
        world,
        services,
        documents,
        captured,
        report,
        claimed: BTreeMap::new(),
        resources: Vec::new(),
        problems: Vec::new(),
    };
    if report.upstreams == Upstreams::All && services.size() > MANY_SERVICES {
        node.report(format!(
            "asks for every service ({}): declare `upstreams`, each service costs its Envoy about 50 KiB",
            services.size()
        ));
    }
    if report.client == Client::Envoy {
        node.add_capture_listeners();
        for workload in &report.workloads {
            node.add_inbound(workload);
        }
        for upstream in upstreams {
            node.add_outbound(upstream);
        }
    }
    let NodeBuilder { resources, problems, .. } = node;
    (Group::new(Arc::from(format!("node {}", report.name)), resources), problems)
}

struct NodeBuilder<'a> {
    world: &'a World,
    services: &'a RedBlackTreeMapSync<ServiceName, Arc<CompiledVariant>>,
    documents: &'a [Arc<PlacedDocument<document::NodeDocument>>],
    captured: Option<CapturedDestinations>,
    report: &'a NodeReport,
    /// The users of each listening address. Envoy rejects a second listener on the same address, and the
    /// whole response with it.
    claimed: BTreeMap<SocketAddr, String>,
    resources: Vec<Arc<Resource>>,
    problems: Vec<Problem>,
}

impl NodeBuilder<'_> {
    fn add_outbound(&mut self, upstream: &Upstream) {
        let service = &upstream.service;
        let shape = match self.services.get(service) {
            Some(compiled) => compiled.shape.clone(),
            None => {
                let near =
                    did_you_mean(service.as_str(), self.world.service_names().map(ServiceName::as_str));
                let hint = near.map_or_else(String::new, |near| format!(", did you mean `{near}`?"));
                self.report(format!(
                    "calls `{service}`, which no discovery source and no document knows{hint}: its port stays closed"
                ));
                return;
            }
        };
        let Some(address) = upstream.listen else { return };
        let name = outbound_name(address);
        if !self.claim_address(address, format!("upstream `{service}`")) {
            return;
        }
        let filter = forward_to_service(&name, service, &shape.effective, &shape.shares);
        self.add(&listener(&name, address, Direction::Outbound, filter));
    }

    /// Adds the listeners for captured connections. They are added before the declared
    /// listeners and so win a conflict over an address, because without them every captured connection would fail.
    fn add_capture_listeners(&mut self) {
        let capture = self.report.capture;
        if capture.outbound.is_none() && capture.inbound.is_none() {
            return;
        }
        for cluster in gate::clusters() {
            self.resources.push(Resource::new(Kind::Cluster, cluster.name.as_str(), &cluster));
        }
        if capture.outbound.is_some() {
            for address in gate::outbound_addresses(capture) {
                self.claim_address(address, "transparent capture".to_owned());
            }
            self.add(&gate::outbound(capture, self.world.documents.outbound(self.documents)));
        }
        if let Some(inward) = capture.inbound {
            // The first address is the IPv4 wildcard, which overlaps with every address.
            if let Some(address) = gate::inbound_addresses(capture).first() {
                self.claim_address(*address, "transparent capture".to_owned());
            }
            let chains = self.workload_chains();
            self.add(&gate::inbound(capture, inward, chains));
        }
    }

    /// Returns one filter chain per workload, which matches the port of its application.
    fn workload_chains(&mut self) -> Vec<FilterChain> {
        let report = self.report;
        let mut by_port: BTreeMap<(Option<IpAddr>, u16), &ServiceName> = BTreeMap::new();
        let mut chains = Vec::new();
        for workload in &report.workloads {
            let service = &workload.service;
            // Captured connections to an application on loopback are addressed to the host's other addresses.
            let host = workload.host.filter(|host| !host.is_loopback() && !host.is_unspecified());
            let port = workload.port;
            if let Some(first) = by_port.get(&(host, port)) {
                self.report(format!(
                    "workloads `{first}` and `{service}` have one port, {port}: captured connections to it count as calls to \
                     `{first}`"
                ));
                continue;
            }
            by_port.insert((host, port), service);
            let at = match workload.host {
                Some(host) => SocketAddr::new(host, port).to_string(),
                None => port.to_string(),
            };
            let name = format!("inbound|{service}|{at}|captured");
            let protocol = workload.protocol.unwrap_or_else(|| self.world.protocol(service));
            let cluster = match workload.host {
                Some(host) => {
                    local_cluster(&name, protocol, local_assignment(&name, SocketAddr::new(host, port)))
                }
                None => captured_application_cluster(&name, protocol),
            };
            self.resources.push(Resource::new(Kind::Cluster, name.as_str(), &cluster));
            let filter = forward_to_application(&name, &format!("inbound|{service}"), protocol);
            chains.push(chain(&name, Some(gate::match_destination(host, port)), filter));
        }
        chains
    }

    fn add_inbound(&mut self, workload: &Workload) {
        let service = &workload.service;
        let mut name = format!("inbound|{service}");
        if self.resources.iter().any(|known| **known.name() == *name) {
            name = format!("{name}|{}", workload.port);
        }
        let application =
            SocketAddr::new(workload.host.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)), workload.port);
        let Some(listen) = workload.listen else {
            if self.report.capture.inbound.is_none() {
                self.report(format!(
                    "workload `{service}` has no `listen`, and no inbound connection is captured: Envoy serves it to nobody"
                ));
            }
            return;
        };
        if application == listen {
            self.report(format!(
                "workload `{service}`: Envoy cannot listen on {application}, where the application listens: give it \
                 another `listen`"
            ));
            return;
        }
        if !self.claim_address(listen, format!("workload `{service}`")) {
            return;
        }
        let protocol = workload.protocol.unwrap_or_else(|| self.world.protocol(service));
        let cluster = local_cluster(&name, protocol, local_assignment(&name, application));
        self.resources.push(Resource::new(Kind::Cluster, name.as_str(), &cluster));
        let filter = forward_to_application(&name, &name, protocol);
        self.add_bound(&listener(&name, listen, Direction::Inbound, filter), listen);
    }

    fn claim_address(&mut self, address: SocketAddr, user: String) -> bool {
        let clash = self
            .claimed
            .iter()
            .find(|(claimed, _)| addresses_conflict(**claimed, address))
            .map(|(_, other)| other.clone());
        if let Some(other) = clash {
            self.report(format!("{user} and {other} both listen on {address}: {user} is left out"));
            return false;
        }
        self.claimed.insert(address, user);
        true
    }

    /// Adds a listener that binds `address`. Envoy accepts only one listener per address, bound or not. If
    /// this host is itself an endpoint at `address`, the shared class has a capture listener for it; this node
    /// receives that listener as absent.
    fn add_bound(&mut self, listener: &Listener, address: SocketAddr) {
        if self.captured == Some(CapturedDestinations::VirtualAndReal) && !address.ip().is_unspecified() {
            self.resources.push(Resource::absent(Kind::Listener, outbound_name(address)));
        }
        self.add(listener);
    }

    fn add(&mut self, listener: &Listener) {
        self.resources.push(Resource::new(Kind::Listener, listener.name.as_str(), listener));
    }

    fn report(&mut self, message: String) {
        let place = Place::file(format!("node {}", self.report.name));
        self.problems.push(Problem::new(place, format!("Node `{}`", self.report.name), message));
    }
}

/// Reports whether two sockets cannot be bound at the same time. A wildcard address conflicts with every
/// address on the same port.
fn addresses_conflict(one: SocketAddr, other: SocketAddr) -> bool {
    one.port() == other.port()
        && (one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified())
}

/// Returns the filter that forwards inbound connections to the application behind `cluster`. Its statistics
/// are named `stat`.
fn forward_to_application(cluster: &str, stat: &str, protocol: Protocol) -> NetworkFilter {
    let idle = Duration::from_secs(3600);
    if protocol.is_http() {
        return http(stat, Routes::Inline(Box::new(route_all_to(cluster))), idle);
    }
    tcp(stat, &[Share { cluster: cluster.to_owned(), weight: 1 }], idle, false)
}

/// Returns a route configuration that sends every request to `cluster`, without timeout and retries. Those
/// are applied by the caller's Envoy, and a second set here would multiply them.
fn route_all_to(cluster: &str) -> RouteConfiguration {
    let action = RouteAction {
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        timeout: Some(duration(Duration::ZERO)),
        ..RouteAction::default()
    };
    let route = Route {
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
            ..RouteMatch::default()
        }),
        action: Some(Action::Route(action)),
        ..Route::default()
    };
    RouteConfiguration {
        name: cluster.to_owned(),
        virtual_hosts: vec![VirtualHost {
            name: cluster.to_owned(),
            domains: vec!["*".to_owned()],
            routes: vec![route],
            ..VirtualHost::default()
        }],
        ..RouteConfiguration::default()
    }
}
