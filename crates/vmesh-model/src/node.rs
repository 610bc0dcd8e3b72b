//! What a node says of itself.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{Labels, NodeName, Protocol, ServiceName};

/// One node as its agent (or its bare xDS client) reports it. What it claims may only narrow what it is sent.
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
    /// What reaches Envoy although nobody dials it.
    #[serde(default)]
    pub capture: Capture,
    /// What it runs, for `vmeshctl nodes`: `vmesh-agent/0.1.0 envoy/1.40.0`.
    #[serde(default)]
    pub build: Arc<str>,
}

/// Which xDS client a node is: they accept different subsets of the same resources.
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
    /// Where the application listens, on loopback unless `host` says otherwise.
    pub port: u16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<IpAddr>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// Where Envoy listens for it; `None` where only captured connections reach it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
}

/// Which connections the host hands to Envoy by rules of the kernel. The words are those of the rules' own spec.
///
/// A newer agent may say more; what this version does not know here is none of its business.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Capture {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outbound: Option<Outward>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inbound: Option<Inward>,
    /// The host has no IPv6, or captures and has no `::1`: Envoy would refuse whatever has an address of it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub without_ipv6: bool,
}

/// Where Envoy takes captured connections that programs of the host open, on loopback.
pub const OUTBOUND_PORT: u16 = 15001;
/// Where Envoy takes captured connections that programs of the host are to accept.
pub const INBOUND_PORT: u16 = 15006;

/// Which connections that programs of the host open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outward {
    /// Those to virtual addresses.
    Vip,
    /// And those to the real addresses of endpoints.
    Addresses,
    /// And all the others.
    All,
}

/// How connections that programs of the host accept reach Envoy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Inward {
    Redirect,
    /// With the address that was called; Envoy's listener has to be transparent.
    Tproxy,
}

/// Which services a node calls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Upstreams {
    /// Every service, and a local port for none.
    All,
    Declared(Vec<Upstream>),
}

/// A service that a node calls, and the local port where its applications dial it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upstream {
    pub service: ServiceName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
}
