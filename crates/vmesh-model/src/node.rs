//! The report of a node about itself.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{Labels, NodeName, Protocol, ServiceName};

/// One node as its agent, or its plain xDS client, reports it. The report can only reduce what the node
/// receives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    pub name: NodeName,
    pub client: Client,
    pub address: Option<IpAddr>,
    pub zone: Option<Arc<str>>,
    #[serde(default)]
    pub labels: Labels,
    #[serde(default)]
    pub workloads: Vec<Workload>,
    pub upstreams: Upstreams,
    /// The connections that reach Envoy by capture rather than by a declared listener.
    #[serde(default)]
    pub capture: NodeCapture,
    /// The software versions, for `vmeshctl nodes`: `vmesh-agent/0.1.0 envoy/1.40.0`.
    #[serde(default)]
    pub build: Arc<str>,
    /// The rights in the node's certificate. `None`: the node connected without one, and is not enrolled.
    /// Only admission sets this field; no report of a client does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<NodeIdentity>,
    /// The node's Envoy listens on [`MTLS_PORT`] and has its certificates.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub mtls_ready: bool,
}

/// The rights that a node's certificate grants.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NodeIdentity {
    /// The services of which the node may run workloads.
    #[serde(default)]
    pub services: BTreeSet<ServiceName>,
    /// The labels that rules of access may rely on. The labels of a report are the node's own claim.
    #[serde(default)]
    pub labels: Labels,
}

/// The kind of xDS client. Each kind supports a different subset of the resources.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Client {
    #[default]
    Envoy,
    Grpc,
}

/// A local instance of a service, behind the node's inbound listener.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    pub service: ServiceName,
    /// The port of the application, on loopback unless `host` is set.
    pub port: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// The address on which Envoy listens for the workload; `None` if only captured connections reach it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
}

/// The connections that the host's kernel rules redirect to Envoy. The variants are named as in the
/// specification of the rules.
///
/// Fields that only a newer agent sends are ignored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NodeCapture {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outbound: Option<OutboundCapture>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inbound: Option<InboundCapture>,
    /// The host has no IPv6, or it captures connections and has no `::1`. Envoy would then reject every
    /// resource with an IPv6 address.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub without_ipv6: bool,
}

/// The port on loopback where Envoy receives captured outbound connections, which programs of the host open.
pub const OUTBOUND_PORT: u16 = 15001;
/// The port where the Envoy of an enrolled node receives mTLS connections from other Envoys.
pub const MTLS_PORT: u16 = 15008;
/// The port where Envoy receives captured inbound connections, which programs of the host accept.
pub const INBOUND_PORT: u16 = 15006;

/// The captured connections among those that programs of the host open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutboundCapture {
    /// Connections to virtual addresses.
    Vip,
    /// Connections to virtual addresses and to real addresses of endpoints.
    Addresses,
    /// All connections.
    All,
}

/// The kernel mechanism by which inbound connections reach Envoy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InboundCapture {
    Redirect,
    /// TPROXY, which preserves the original destination address. Envoy's listener must be transparent.
    Tproxy,
}

/// The services that a node calls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Upstreams {
    /// Every service, without local listeners.
    All,
    Declared(Vec<Upstream>),
}

/// A service that a node calls, and the local address on which its applications call it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    pub service: ServiceName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// The workload of this node on whose behalf the calls are made. Its certificate is shown to the service.
    #[serde(rename = "as", default, skip_serializing_if = "Option::is_none")]
    pub as_: Option<ServiceName>,
}
