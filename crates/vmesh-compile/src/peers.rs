//! The endpoints that can be called by mTLS: workloads of enrolled nodes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use vmesh_catalog::World;
use vmesh_model::document::{Documents, MtlsMode, NodeDocument, PlacedDocument};
use vmesh_model::node::{Client, Workload};
use vmesh_model::{Labels, NodeName, NodeReport, ServiceName, join};

/// A node that runs a workload which can be called by mTLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Peer {
    /// The node's Envoy accepts mTLS connections.
    pub(crate) is_ready: bool,
    /// The mode that `Node` documents set for the node's workloads.
    pub(crate) mode: Option<MtlsMode>,
}

/// The peers at one address. Several nodes at one address are one host whose name changed.
type Claims = BTreeMap<NodeName, Peer>;

/// An index of the enrolled nodes of a world: the addresses of their workloads, and the nodes with the labels that rules of
/// access name. One changed node costs as much as its workloads and these labels.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    endpoints: BTreeMap<ServiceName, BTreeMap<SocketAddr, Claims>>,
    /// The enrolled nodes with each set of labels that a rule names.
    labelled: BTreeMap<Labels, BTreeSet<NodeName>>,
}

/// The effect of a change on services.
#[derive(Debug, Default)]
pub(crate) struct PeerChanges {
    /// The services with endpoints that are called differently now.
    pub(crate) endpoints: BTreeSet<ServiceName>,
    /// The sets of labels that other nodes have now.
    pub(crate) labels: BTreeSet<Labels>,
}

impl Peers {
    /// Returns the index of `world`; empty if no document needs it.
    pub(crate) fn new(world: &World) -> Peers {
        let labelled = label_sets(&world.documents).into_iter().map(|labels| (labels, BTreeSet::new()));
        let mut peers = Peers { endpoints: BTreeMap::new(), labelled: labelled.collect() };
        let has_mtls = world.documents.uses_mtls();
        if !has_mtls && peers.labelled.is_empty() {
            return peers;
        }
        let finder = world.documents.node_finder();
        for report in world.nodes.values() {
            if has_mtls {
                peers.add_endpoints(report, &finder.find(report));
            }
            for (labels, nodes) in &mut peers.labelled {
                if has_labels(report, labels) {
                    nodes.insert(report.name.clone());
                }
            }
        }
        peers
    }

    /// Updates the index to the world `now`.
    pub(crate) fn update(&mut self, before: &World, now: &World) -> PeerChanges {
        let mut changes = PeerChanges::default();
        if !Arc::ptr_eq(&before.documents, &now.documents) {
            let renewed = Peers::new(now);
            let differs = |(name, old, new): (&ServiceName, _, _)| (old != new).then(|| name.clone());
            changes.endpoints.extend(join(&self.endpoints, &renewed.endpoints).filter_map(differs));
            let differs = |(labels, old, new): (&Labels, _, _)| (old != new).then(|| labels.clone());
            changes.labels.extend(join(&self.labelled, &renewed.labelled).filter_map(differs));
            *self = renewed;
            return changes;
        }
        let has_mtls = now.documents.uses_mtls();
        if before.nodes_generation == now.nodes_generation || (!has_mtls && self.labelled.is_empty()) {
            return changes;
        }
        let finder = now.documents.node_finder();
        for name in changed_nodes(before, now) {
            let (old, new) = (before.nodes.get(&name), now.nodes.get(&name));
            if has_mtls {
                let keys = |report: Option<&Arc<NodeReport>>| {
                    report.map(|report| entries(report, &finder.find(report))).unwrap_or_default()
                };
                let (old, new) = (keys(old), keys(new));
                for (service, address, _) in old.difference(&new) {
                    self.remove_endpoint(service, *address, &name);
                    changes.endpoints.insert(service.clone());
                }
                for (service, address, peer) in new.difference(&old) {
                    self.add_endpoint(service, *address, &name, *peer);
                    changes.endpoints.insert(service.clone());
                }
            }
            for (labels, nodes) in &mut self.labelled {
                let differs = match new.is_some_and(|report| has_labels(report, labels)) {
                    true => nodes.insert(name.clone()),
                    false => nodes.remove(&name),
                };
                if differs {
                    changes.labels.insert(labels.clone());
                }
            }
        }
        changes
    }

    /// Returns the peer that runs the endpoint, or `None` if the endpoint cannot be called by mTLS. A peer that is ready takes
    /// precedence over others at the same address.
    pub(crate) fn endpoint(&self, service: &ServiceName, address: SocketAddr) -> Option<Peer> {
        self.endpoints.get(service)?.get(&address)?.values().max().copied()
    }

    /// Reports whether a node sets a mode for its workloads of `service` by which they are called by mTLS.
    pub(crate) fn has_override(&self, service: &ServiceName) -> bool {
        let endpoints = self.endpoints.get(service).into_iter().flat_map(BTreeMap::values);
        endpoints.flat_map(BTreeMap::values).any(|peer| peer.mode.is_some_and(|mode| mode != MtlsMode::Off))
    }

    /// Returns the enrolled nodes with all of `labels`, which a rule of an `Access` document names.
    pub(crate) fn labelled(&self, labels: &Labels) -> impl Iterator<Item = &NodeName> {
        self.labelled.get(labels).into_iter().flatten()
    }

    fn add_endpoints(&mut self, report: &NodeReport, documents: &[Arc<PlacedDocument<NodeDocument>>]) {
        for (service, address, peer) in entries(report, documents) {
            self.add_endpoint(&service, address, &report.name, peer);
        }
    }

    fn add_endpoint(&mut self, service: &ServiceName, address: SocketAddr, node: &NodeName, peer: Peer) {
        let addresses = self.endpoints.entry(service.clone()).or_default();
        addresses.entry(address).or_default().insert(node.clone(), peer);
    }

    fn remove_endpoint(&mut self, service: &ServiceName, address: SocketAddr, node: &NodeName) {
        let Some(addresses) = self.endpoints.get_mut(service) else { return };
        let Some(claims) = addresses.get_mut(&address) else { return };
        claims.remove(node);
        if claims.is_empty() {
            addresses.remove(&address);
        }
        if addresses.is_empty() {
            self.endpoints.remove(service);
        }
    }
}

/// Returns the addresses at which discovery may list a workload of the node at `address`.
pub(crate) fn registered_addresses(workload: &Workload, address: IpAddr) -> impl Iterator<Item = SocketAddr> {
    let listened = workload.listen.map(|listen| listen.port());
    std::iter::once(workload.port).chain(listened).map(move |port| SocketAddr::new(address, port))
}

/// Reports whether the certificate of the node lets it run `service`.
pub(crate) fn is_granted(report: &NodeReport, service: &ServiceName) -> bool {
    report.identity.as_ref().is_some_and(|identity| identity.services.contains(service))
}

/// Returns the endpoints of a node that can be called by mTLS.
fn entries(
    report: &NodeReport,
    documents: &[Arc<PlacedDocument<NodeDocument>>],
) -> BTreeSet<(ServiceName, SocketAddr, Peer)> {
    let Some(address) = report.address.filter(|_| report.client == Client::Envoy) else {
        return BTreeSet::new();
    };
    let mode = documents.iter().rev().find_map(|document| document.mtls).map(|mtls| mtls.mode);
    let peer = Peer { is_ready: report.mtls_ready, mode };
    let granted = report.workloads.iter().filter(|workload| is_granted(report, &workload.service));
    granted
        .flat_map(|workload| {
            registered_addresses(workload, address.to_canonical())
                .map(|address| (workload.service.clone(), address, peer))
        })
        .collect()
}

fn has_labels(report: &NodeReport, labels: &Labels) -> bool {
    report
        .identity
        .as_ref()
        .is_some_and(|identity| labels.iter().all(|(key, value)| identity.labels.get(key) == Some(value)))
}

/// Returns the sets of labels that rules of access name.
fn label_sets(documents: &Documents) -> BTreeSet<Labels> {
    let rules = documents.access.values().flatten().flat_map(|document| &document.rules);
    rules.map(|rule| rule.from.nodes.clone()).filter(|labels| !labels.is_empty()).collect()
}

fn changed_nodes(before: &World, now: &World) -> BTreeSet<NodeName> {
    if now.generation == before.generation + 1 {
        return now.changes.nodes.iter().cloned().collect();
    }
    // Worlds were missed, so all reports are compared by their pointers.
    let differing = |one: &World, other: &World| -> Vec<NodeName> {
        let differs = |(name, report): &(&NodeName, &Arc<NodeReport>)| {
            other.nodes.get(*name).is_none_or(|other| !Arc::ptr_eq(other, report))
        };
        one.nodes.iter().filter(differs).map(|(name, _)| name.clone()).collect()
    };
    differing(before, now).into_iter().chain(differing(now, before)).collect()
}
