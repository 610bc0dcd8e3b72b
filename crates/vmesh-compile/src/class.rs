//! Classes and variants. Nodes whose services are compiled with the same settings share a [`NodeClass`]. A service
//! that compiles to the same resources in several classes is compiled once, as one variant.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use vmesh_catalog::World;
use vmesh_model::document::{Documents, LoadBalancing, Locality, MtlsMode, NodeDocument, PlacedDocument};
use vmesh_model::node::{Client, OutboundCapture};
use vmesh_model::{NodeReport, ServiceName, Settings};

use crate::node;
use crate::peers::Peers;

/// The properties of a node that decide how services are compiled for it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NodeClass {
    pub client: Client,
    /// The `Node` documents that set anything for the services that the node calls; later ones override
    /// earlier ones.
    pub nodes: Vec<Arc<PlacedDocument<NodeDocument>>>,
    /// The node's locality zone, or `None` if no document makes load balancing depend on it.
    pub zone: Option<Arc<str>>,
    /// The connections to services that the node captures. `None`: the node captures none.
    pub captured: Option<CapturedDestinations>,
    /// The host has no IPv6. Envoy then rejects every IPv6 address, even in a listener that binds no socket.
    pub without_ipv6: bool,
    /// The certificates with which the node calls services. `None`: the node is not enrolled, or no document turns
    /// mTLS on.
    pub mtls: Option<CallerCertificates>,
}

/// The certificates with which a node calls services: its default, except where an upstream names a workload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CallerCertificates {
    /// The called services, each with the workload on whose behalf it is called.
    pub by_service: BTreeMap<ServiceName, ServiceName>,
}

/// The destination addresses whose connections are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CapturedDestinations {
    /// Only virtual addresses of services.
    Virtual,
    /// Virtual addresses and the real addresses of endpoints.
    VirtualAndReal,
}

impl CapturedDestinations {
    /// Returns what the node of `report` captures. Connections to addresses of no service are not part of a
    /// class: the node's own listeners handle them.
    fn by(report: &NodeReport) -> Option<CapturedDestinations> {
        // A gRPC client has no listener that could receive a captured connection.
        if report.client != Client::Envoy {
            return None;
        }
        report.capture.outbound.map(|outward| match outward {
            OutboundCapture::Vip => CapturedDestinations::Virtual,
            OutboundCapture::Addresses | OutboundCapture::All => CapturedDestinations::VirtualAndReal,
        })
    }

    fn as_str(self) -> &'static str {
        match self {
            CapturedDestinations::Virtual => "vip",
            CapturedDestinations::VirtualAndReal => "addresses",
        }
    }
}

impl NodeClass {
    /// Returns the class of `report`'s node. `nodes` are the documents that select the node; `zone` is its
    /// locality zone, or `None` if zones do not matter; `uses_mtls` tells whether any document turns mTLS on.
    pub(crate) fn of(
        report: &NodeReport,
        nodes: &[Arc<PlacedDocument<NodeDocument>>],
        zone: Option<Arc<str>>,
        uses_mtls: bool,
    ) -> NodeClass {
        let is_enrolled = report.identity.is_some() && report.client == Client::Envoy;
        let certificates =
            || CallerCertificates { by_service: node::certificates(report, &node::upstreams(report, nodes)) };
        NodeClass {
            client: report.client,
            nodes: nodes.iter().filter(|node| overrides_settings(node)).cloned().collect(),
            zone,
            captured: CapturedDestinations::by(report),
            without_ipv6: report.client == Client::Envoy && report.capture.without_ipv6,
            mtls: (uses_mtls && is_enrolled).then(certificates),
        }
    }

    /// Returns a key that is equal for classes in which every service compiles to the same resources. Names and
    /// selectors of documents are not part of it.
    pub fn key(&self) -> Arc<str> {
        let mut key = key(self.client, self.captured, self.without_ipv6, self.zone.as_deref());
        if let Some(certificates) = &self.mtls {
            key.push_str(" mtls");
            for (service, workload) in &certificates.by_service {
                _ = write!(key, " {service} as {workload}");
            }
        }
        if !self.nodes.is_empty() {
            _ = write!(key, " settings {}", Settings::of_nodes(&self.nodes).content_key());
        }
        key.into()
    }

    /// Returns the inputs with which `service` is compiled in this class.
    pub(crate) fn variant(&self, world: &World, peers: &Peers, service: &ServiceName) -> Variant {
        let settings = world.documents.settings(service, &self.nodes);
        let zone = self.zone.as_ref().filter(|zone| {
            let is_local = |balancing: &LoadBalancing| balancing.locality == Locality::PreferLocal;
            settings.load_balancing.as_ref().is_some_and(is_local)
                && world.endpoints(service).iter().any(|endpoint| endpoint.zone.as_ref() == Some(zone))
        });
        let is_used = settings.mtls_mode() != MtlsMode::Off || peers.has_override(service);
        let mtls = self.mtls.as_ref().filter(|_| is_used);
        Variant {
            mtls: mtls.map(|of| CallerCertificate { workload: of.by_service.get(service).cloned() }),
            client: self.client,
            zone: zone.cloned(),
            captured: self.captured,
            without_ipv6: self.without_ipv6,
            settings,
        }
    }
}

/// The inputs, besides the world, from which a service is compiled.
#[derive(Debug, Clone)]
pub(crate) struct Variant {
    pub(crate) client: Client,
    pub(crate) settings: Settings,
    /// The caller's locality zone, if the service prefers local endpoints and has endpoints in that zone.
    pub(crate) zone: Option<Arc<str>>,
    pub(crate) captured: Option<CapturedDestinations>,
    pub(crate) without_ipv6: bool,
    /// The certificate with which the service is called; `None` if it is called by plaintext only.
    pub(crate) mtls: Option<CallerCertificate>,
}

/// The certificate with which a service is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CallerCertificate {
    /// The workload whose certificate it is. `None`: the node's default.
    pub(crate) workload: Option<ServiceName>,
}

impl Variant {
    /// Returns a key that is equal for variants that compile to the same resources.
    pub(crate) fn key(&self) -> Arc<str> {
        let mut key = key(self.client, self.captured, self.without_ipv6, self.zone.as_deref());
        if let Some(certificate) = &self.mtls {
            key.push_str(" mtls");
            if let Some(workload) = &certificate.workload {
                _ = write!(key, " as {workload}");
            }
        }
        _ = write!(key, " settings {}", self.settings.content_key());
        key.into()
    }
}

fn key(
    client: Client,
    captured: Option<CapturedDestinations>,
    without_ipv6: bool,
    zone: Option<&str>,
) -> String {
    let mut key = match client {
        Client::Envoy => "envoy".to_owned(),
        Client::Grpc => "grpc".to_owned(),
    };
    if let Some(captured) = captured {
        _ = write!(key, " capture {}", captured.as_str());
    }
    if without_ipv6 {
        key.push_str(" without IPv6");
    }
    if let Some(zone) = zone {
        _ = write!(key, " zone {zone:?}");
    }
    key
}

/// Reports whether `node` overrides any setting of services. A document that only adds upstreams does not.
fn overrides_settings(node: &NodeDocument) -> bool {
    node.load_balancing.is_some()
        || node.timeouts.is_some()
        || node.retry.is_some()
        || node.outlier_detection.is_some()
        || node.connection_limits.is_some()
        || node.capture.is_some()
        || node.mtls.is_some()
}

/// Reports whether any document makes load balancing depend on the caller's locality zone.
pub(crate) fn zones_matter(documents: &Documents) -> bool {
    let near = |balancing: &Option<LoadBalancing>| {
        balancing.as_ref().is_some_and(|balancing| balancing.locality == Locality::PreferLocal)
    };
    documents.mesh.iter().any(|mesh| near(&mesh.load_balancing))
        || documents.services.values().any(|service| near(&service.load_balancing))
        || documents.nodes.iter().any(|node| near(&node.load_balancing))
}
