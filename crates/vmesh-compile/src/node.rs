//! The configuration of one node: its upstreams, and the listeners that only this node receives.

mod mtls;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use rpds::RedBlackTreeMapSync;
use vmesh_catalog::World;
use vmesh_model::document::{self, MtlsMode, PlacedDocument};
use vmesh_model::node::{Client, Upstream, Upstreams, Workload};
use vmesh_model::strict::did_you_mean;
use vmesh_model::{NodeReport, Place, Problem, Protocol, ServiceName};
use vmesh_proto::envoy::config::listener::v3::{FilterChain, Listener};
use vmesh_xds::{Group, Kind, Resource, Scope};

use crate::access::{self, AccessInput, FilterLevel, jwt};
use crate::class::CapturedDestinations;
use crate::cluster::{captured_application_cluster, local_cluster};
use crate::endpoints::local_assignment;
use crate::gate;
use crate::listener::{
    Direction, InboundChecks, chain, forward_to_application, forward_to_service, listener, outbound_name,
};
use crate::peers::{Peers, is_granted};
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
    pub(crate) peers: &'a Peers,
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

/// Returns the called services for which an upstream names the workload that calls, each with that workload. The first
/// upstream of a service counts.
pub(crate) fn certificates(
    report: &NodeReport,
    upstreams: &[Upstream],
) -> BTreeMap<ServiceName, ServiceName> {
    let mut certificates = BTreeMap::new();
    for upstream in upstreams {
        if let Some(workload) = upstream.as_.as_ref().filter(|workload| has_certificate(report, workload)) {
            certificates.entry(upstream.service.clone()).or_insert_with(|| workload.clone());
        }
    }
    certificates
}

/// Reports whether the node of `report` has a certificate for the workload `service`.
fn has_certificate(report: &NodeReport, service: &ServiceName) -> bool {
    is_granted(report, service) && report.workloads.iter().any(|workload| workload.service == *service)
}

/// Compiles the resources that only this node receives; it calls `upstreams`. Returns them and the node's
/// problems.
pub(crate) fn compile(subject: &NodeInput<'_>, upstreams: &[Upstream]) -> (Arc<Group>, Vec<Problem>) {
    let NodeInput { world, peers, report, documents, services, captured } = *subject;
    let mut node = NodeBuilder {
        world,
        peers,
        checked: BTreeSet::new(),
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
        mtls::add_listener(&mut node);
        node.add_filter_configs();
        for upstream in upstreams {
            node.add_outbound(upstream);
        }
    }
    let NodeBuilder { resources, problems, .. } = node;
    (Group::new(Arc::from(format!("node {}", report.name)), resources), problems)
}

struct NodeBuilder<'a> {
    world: &'a World,
    peers: &'a Peers,
    /// The services with a filter chain that checks its callers.
    checked: BTreeSet<(&'a ServiceName, FilterLevel)>,
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

impl<'a> NodeBuilder<'a> {
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
        self.check_caller(upstream);
        let Some(address) = upstream.listen else { return };
        let name = outbound_name(address);
        if !self.claim_address(address, format!("upstream `{service}`")) {
            return;
        }
        let filter = forward_to_service(&name, service, &shape.effective, &shape.shares);
        self.add(&listener(&name, address, Direction::Outbound, filter));
    }

    /// Reports an upstream for which the node lacks the certificate that the upstream or the called service demands.
    fn check_caller(&mut self, upstream: &Upstream) {
        let (report, service) = (self.report, &upstream.service);
        if let Some(workload) = &upstream.as_ {
            let known = certificates(report, std::slice::from_ref(upstream));
            if report.identity.is_some() && known.is_empty() {
                self.report(format!(
                    "calls `{service}` as `{workload}`, for which it has no certificate: `{workload}` must be among its workloads \
                     and among the services of its join token; it calls with its default certificate"
                ));
            }
        }
        let mode = self.world.documents.settings(service, self.documents).mtls_mode();
        if mode == MtlsMode::Strict && report.identity.is_none() {
            self.report(format!(
                "calls `{service}`, which accepts only mTLS, and is not enrolled: calls fail; give its agent a join token"
            ));
        }
    }

    /// Returns the checks of inbound connections to a workload of `service`. mTLS connections are always checked, so that the
    /// first document about a service touches no listener for mTLS.
    fn checks(&mut self, service: &'a ServiceName, protocol: Protocol, by_mtls: bool) -> InboundChecks {
        if !by_mtls && !self.world.documents.governs_access(service) {
            return InboundChecks::default();
        }
        let level = if protocol.is_http() { FilterLevel::Http } else { FilterLevel::Tcp };
        self.checked.insert((service, level));
        let of_tokens = level == FilterLevel::Http && jwt::is_used(self.world, service);
        let of_tokens = of_tokens.then(|| (jwt::filter_name(service), jwt::type_url()));
        let of_rules = (access::filter_name(service, level), level.type_url());
        let filters = of_tokens.into_iter().chain([of_rules]).collect();
        InboundChecks { filters, service: Some(service.clone()), tells_caller: by_mtls }
    }

    /// Adds the configuration of the filters that check callers. An edit of an `Access` document changes only these.
    fn add_filter_configs(&mut self) {
        for (service, level) in std::mem::take(&mut self.checked) {
            let of_service = self.report.workloads.iter().filter(|workload| workload.service == *service);
            let ports: Vec<u16> = of_service.map(|workload| workload.port).collect();
            let input = AccessInput { world: self.world, peers: self.peers, service, ports: &ports, level };
            let rules = access::filter_config(&input);
            let tokens = level == FilterLevel::Http && jwt::is_used(self.world, service);
            let tokens = tokens.then(|| jwt::filter_config(self.world, service));
            for config in tokens.into_iter().chain([rules]) {
                self.resources.push(Resource::new(Kind::ExtensionConfig, config.name.as_str(), &config));
            }
        }
    }

    /// Returns the mode of mTLS for the node's workloads of `service`.
    fn mode(&self, service: &ServiceName) -> MtlsMode {
        self.world.documents.settings(service, self.documents).mtls_mode()
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
            if self.mode(service) == MtlsMode::Strict {
                let name = format!("inbound|{service}|{port}|strict");
                chains.push(gate::closing_chain(&name, gate::match_destination(host, port)));
                continue;
            }
            let at = match workload.host {
                Some(host) => SocketAddr::new(host, port).to_string(),
                None => port.to_string(),
            };
            let name = format!("inbound|{service}|{at}|captured");
            let protocol = workload.protocol.unwrap_or_else(|| self.world.protocol(service));
            let cluster = match workload.host {
                Some(host) => {
                    local_cluster(&name, protocol, local_assignment(&name, &[SocketAddr::new(host, port)]))
                }
                None => captured_application_cluster(&name, protocol),
            };
            self.resources.push(Resource::new(Kind::Cluster, name.as_str(), &cluster));
            let checks = self.checks(service, protocol, false);
            let filter = forward_to_application(&name, &format!("inbound|{service}"), protocol, &checks);
            chains.push(chain(&name, Some(gate::match_destination(host, port)), filter));
        }
        chains
    }

    fn add_inbound(&mut self, workload: &'a Workload) {
        let service = &workload.service;
        let mut name = format!("inbound|{service}");
        if self.resources.iter().any(|known| **known.name() == *name) {
            name = format!("{name}|{}", workload.port);
        }
        let application =
            SocketAddr::new(workload.host.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)), workload.port);
        let Some(listen) = workload.listen else {
            if self.report.capture.inbound.is_none() && !is_granted(self.report, service) {
                self.report(format!(
                    "workload `{service}` has no `listen`, and no inbound connection is captured: Envoy serves it to nobody"
                ));
            }
            return;
        };
        if self.mode(service) == MtlsMode::Strict && !listen.ip().is_loopback() {
            return;
        }
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
        let cluster = local_cluster(&name, protocol, local_assignment(&name, &[application]));
        self.resources.push(Resource::new(Kind::Cluster, name.as_str(), &cluster));
        let checks = self.checks(service, protocol, false);
        let filter = forward_to_application(&name, &name, protocol, &checks);
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
