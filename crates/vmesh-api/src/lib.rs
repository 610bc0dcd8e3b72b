//! The JSON types of the control plane's HTTP API: the contract between `vmesh-control`, `vmeshctl` and scripts. Fields are added, never
//! renamed or removed.
//!
//! | path | answer |
//! |---|---|
//! | `GET /api/v1/services` | [`Services`] |
//! | `GET /api/v1/nodes` | [`Nodes`] |
//! | `GET /api/v1/problems` | [`Problems`] |
//! | `GET /api/v1/revision` | [`Revision`] |
//! | `GET /api/v1/status` | [`Status`] |
//! | `GET /api/v1/explain?service=S&from=N` | [`Explanation`] |
//! | `GET /api/v1/nodes/N/config` | the node's resources in Envoy's JSON |
//! | `DELETE /api/v1/nodes/N` | removes a node that is offline; [`ActionResult`] |
//! | `DELETE /api/v1/nodes?offline_for=1h` | removes the nodes that have been offline for this long; [`ActionResult`] |
//! | `GET /api/v1/discovery` | [`Discovery`] |
//! | `GET /api/v1/discovery/events` | [`Events`] |
//! | `POST /api/v1/discovery/accept` | accepts the held removals that [`AcceptRequest`] names; [`ActionResult`] |
//! | `POST /api/v1/discovery/evict`, `admit` | evicts the endpoint in [`EndpointRequest`], or admits it again; [`ActionResult`] |
//! | `POST /api/v1/discovery/freeze`, `thaw` | freezes the sources in [`SourceSelector`], or thaws them; [`ActionResult`] |
//!
//! The requests about identities are in [`identity`].
//!
//! An error is a [`Failure`] with a status of 4xx or 5xx.

pub mod identity;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmesh_model::State;
use vmesh_model::node::{Client, Upstreams, Workload};
use vmesh_model::{Endpoint, Health, Labels, NodeName, Problem, Protocol, ServiceName};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Services {
    pub services: Vec<Service>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    pub name: ServiceName,
    /// The effective protocol: from the document, else from discovery, else `tcp`.
    pub protocol: Protocol,
    pub state: State,
    /// The reason why the service is not fresh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub because: Option<Arc<str>>,
    pub endpoints: Vec<ServiceEndpoint>,
}

/// An [`Endpoint`] with every field present.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceEndpoint {
    pub address: SocketAddr,
    pub health: Health,
    pub weight: u32,
    pub zone: Option<Arc<str>>,
    pub version: Option<Arc<str>>,
    pub labels: Labels,
    pub source: Arc<str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<Arc<str>>,
    /// The endpoint's priority level, in an explanation. Envoy uses an endpoint when the levels with lower numbers have too few healthy
    /// endpoints.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u32>,
}

impl From<&Endpoint> for ServiceEndpoint {
    fn from(endpoint: &Endpoint) -> Self {
        ServiceEndpoint {
            address: endpoint.address,
            health: endpoint.health,
            weight: endpoint.weight.get(),
            zone: endpoint.zone.clone(),
            version: endpoint.version.clone(),
            labels: endpoint.labels.clone(),
            source: endpoint.source.clone(),
            hostname: endpoint.hostname.clone(),
            priority: None,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nodes {
    pub nodes: Vec<Node>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    pub name: NodeName,
    pub connected: bool,
    pub state: NodeState,
    /// The reason of the state: Envoy's own message for `rejected`, the awaited event for `pushing`.
    #[serde(default)]
    pub reason: Option<String>,
    pub client: Client,
    pub address: Option<IpAddr>,
    pub zone: Option<Arc<str>>,
    pub labels: Labels,
    pub workloads: Vec<Workload>,
    pub upstreams: Upstreams,
    pub build: Arc<str>,
    /// Seconds since the node went offline; `None` while it is connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offline_seconds: Option<u64>,
}

/// The state of a node relative to the current configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// The node has accepted its configuration.
    Synced,
    /// The control plane has pushed resources that the node has not answered yet.
    Pushing,
    /// The node has rejected something, and keeps its earlier version.
    Rejected,
    /// The node has no open stream.
    Offline,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problems {
    pub problems: Vec<ListedProblem>,
}

/// A [`Problem`] with its place as text: `file:line:column`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedProblem {
    pub place: String,
    pub message: String,
    pub subject: Arc<str>,
}

impl From<&Problem> for ListedProblem {
    fn from(problem: &Problem) -> Self {
        ListedProblem {
            place: problem.place.to_string(),
            message: problem.message.clone(),
            subject: problem.subject.clone(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// Hash of the content of services and documents. Replicas with the same content have the same revision.
    pub revision: String,
    /// Number of worlds since this process started.
    pub generation: u64,
    /// The latest revisions that a change of documents ended, oldest first.
    #[serde(default)]
    pub past: Vec<PastRevision>,
}

/// A revision that was in force until documents changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastRevision {
    pub revision: String,
    pub generation: u64,
    /// Unix time of that change.
    pub until: u64,
    pub services: usize,
    pub documents: usize,
}

/// The summary that `vmeshctl status` shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub trust_domain: String,
    pub revision: String,
    pub uptime_seconds: u64,
    pub ready: bool,
    /// The sources and documents that the control plane waits for before it is ready.
    pub waiting_for: Vec<String>,
    pub sources: Vec<Source>,
    pub services: usize,
    pub endpoints: usize,
    pub documents: usize,
    pub nodes: NodeCounts,
    pub problems: usize,
    /// The addresses that other hosts reach without encryption, which `listen.insecure` permits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub insecure: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    pub name: Arc<str>,
    pub state: State,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub because: Option<Arc<str>>,
    /// Seconds since the source last answered.
    pub age_seconds: Option<u64>,
    pub services: usize,
}

/// All sources, with their state and their held removals.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Discovery {
    pub sources: Vec<DiscoverySource>,
    /// The endpoints that an operator has evicted.
    pub evicted: Vec<EvictedEndpoint>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiscoverySource {
    pub name: Arc<str>,
    pub state: SourceState,
    /// The reason why the source is not fresh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub because: Option<Arc<str>>,
    /// True if the control plane serves nothing before this source has answered.
    pub required: bool,
    /// Seconds since the last answer; `None` if there was none since the start.
    pub age_seconds: Option<u64>,
    /// Unix time of the last answer.
    pub answered_at: Option<u64>,
    /// Unix time at which the source was frozen. The next field has the command that thaws it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_at: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    pub services: usize,
    pub endpoints: usize,
    /// Number of endpoints in use that the source no longer lists.
    pub missing: u64,
    /// The held removals: first that of the whole source, then by service.
    pub held: Vec<HeldRemoval>,
    /// Number of unresolved host names. The first hundred follow.
    #[serde(default)]
    pub unresolved: usize,
    #[serde(default)]
    pub unresolved_names: Vec<UnresolvedName>,
    pub counters: SourceCounters,
}

/// A host name without an address, or one whose last addresses could not be confirmed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnresolvedName {
    pub name: Arc<str>,
    /// Seconds since the first look-up began, or since look-ups began to fail.
    pub age_seconds: u64,
    pub because: Arc<str>,
    /// True if the addresses of the last successful look-up stay in use.
    pub in_use: bool,
}

/// The state of a discovery source. If several apply, the last one in this list counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceState {
    Fresh,
    /// The source answers, but some of its host names cannot be resolved.
    Unresolved,
    /// A removal by the source is held.
    Held,
    /// The source does not answer, and its last view is served.
    Stale,
    /// An operator has frozen the source, so no change of it is applied.
    Frozen,
}

/// A held removal: endpoints that a source no longer lists, and that stay in use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldRemoval {
    /// `None` for the whole source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
    /// `empty`, `shrunk`, `absent`, `unhealthy` or `fleet`.
    pub kind: Arc<str>,
    /// Seconds since the removal was first held.
    pub age_seconds: u64,
    /// Seconds until the removal may be believed. `None` if it needs an operator, or enough endpoints listed again.
    pub remaining_seconds: Option<u64>,
    /// Number of endpoints before, and number that the source lists now.
    pub had: usize,
    pub has: usize,
    /// Number of readings that confirmed the removal so far, and number required.
    pub confirmed: u32,
    pub confirmations: u32,
    pub because: Arc<str>,
    /// The command that accepts the removal at once.
    pub command: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvictedEndpoint {
    pub service: ServiceName,
    pub address: SocketAddr,
    pub age_seconds: u64,
    /// The command that admits the endpoint again.
    pub command: String,
}

/// Counters since the start, except for `connections`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceCounters {
    pub reads: u64,
    pub failed_reads: u64,
    pub bad_records: u64,
    pub index_resets: u64,
    pub sessions_expired: u64,
    pub connects: u64,
    pub connections: u64,
    /// The counts by kind: removals that were held, and held removals that were dropped since the endpoints came back.
    pub held: BTreeMap<Arc<str>, u64>,
    pub rejected: BTreeMap<Arc<str>, u64>,
}

/// The last 256 events of each source, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    pub events: Vec<Event>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Unix time, in milliseconds.
    pub at_millis: u64,
    pub age_seconds: u64,
    /// `None` for all sources.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Arc<str>>,
    /// `held`, `confirmed`, `believed`, `returned`, `accepted`, `frozen`, `thawed`, `failing`, `answering`, `given up`,
    /// `evicted` or `admitted`.
    pub what: Arc<str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<Arc<str>>,
    pub text: Arc<str>,
}

/// The held removals to accept: those of one service of a source, or all of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AcceptRequest {
    pub source: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
}

/// An endpoint of a service, whichever source lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointRequest {
    pub service: ServiceName,
    pub address: SocketAddr,
}

/// A source; `None` selects all sources.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceSelector {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeCounts {
    pub synced: usize,
    pub pushing: usize,
    pub rejected: usize,
    pub offline: usize,
}

/// The way of requests from one node to one service, step by step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    pub service: ServiceName,
    pub from: NodeName,
    pub node: NodeState,
    #[serde(default)]
    pub reason: Option<String>,
    pub protocol: Protocol,
    pub state: State,
    /// True if requests reach the service at all.
    pub reachable: bool,
    /// The obstacle nearest to the caller, if requests do not reach the service.
    #[serde(default)]
    pub obstacle: Option<String>,
    /// The addresses that the application dials. Empty without a declared upstream.
    pub listeners: Vec<String>,
    pub routes: Vec<Hop>,
    pub clusters: Vec<Cluster>,
    /// The security of the connections to each endpoint. Empty while no document uses mTLS.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tls: Vec<EndpointSecurity>,
    pub settings: Vec<Setting>,
    pub problems: Vec<ListedProblem>,
}

/// One routing rule, in the order of evaluation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hop {
    pub when: String,
    pub then: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    pub name: String,
    pub endpoints: Vec<ServiceEndpoint>,
}

/// The security of the connections to an endpoint, and its reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointSecurity {
    pub address: SocketAddr,
    /// `mtls`, `plaintext`, or `left out`: the endpoint is not called.
    pub connection: String,
    pub reason: String,
}

/// An effective value, and its origin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    pub name: String,
    pub value: String,
    pub set_by: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActionResult {
    pub done: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The failed operation, its object, the cause, and the next step.
    pub error: String,
}
