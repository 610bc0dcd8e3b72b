//! What the control plane's HTTP API says, in JSON: the contract between `vmesh-control`, `vmeshctl` and anybody's
//! script. Fields are added, never renamed or removed.
//!
//! | path | answer |
//! |---|---|
//! | `GET /api/v1/services` | [`Services`] |
//! | `GET /api/v1/nodes` | [`Nodes`] |
//! | `GET /api/v1/problems` | [`Problems`] |
//! | `GET /api/v1/revision` | [`Revision`] |
//! | `GET /api/v1/status` | [`Status`] |
//! | `GET /api/v1/explain?service=S&from=N` | [`Explanation`] |
//! | `GET /api/v1/nodes/N/config` | the node's resources as Envoy would print them |
//! | `DELETE /api/v1/nodes/N` | forgets a node that is offline; [`Done`] |
//! | `DELETE /api/v1/nodes?offline_for=1h` | forgets the nodes that have been offline for so long; [`Done`] |
//! | `GET /api/v1/discovery` | [`Discovery`] |
//! | `GET /api/v1/discovery/events` | [`Events`] |
//! | `POST /api/v1/discovery/accept` | [`Accept`] is believed; [`Done`] |
//! | `POST /api/v1/discovery/evict`, `admit` | [`EndpointOf`] is not used, or is again; [`Done`] |
//! | `POST /api/v1/discovery/freeze`, `thaw` | no change of [`Which`] is taken, or is again; [`Done`] |
//!
//! An error is [`Failure`], with a status of 4xx or 5xx.

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
    /// What holds: the document's word, else discovery's, else `tcp`.
    pub protocol: Protocol,
    pub state: State,
    /// Why it is not fresh.
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
    /// Of an explanation: how many others come before it. Envoy uses it when those are too few or too ill.
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
    /// For `rejected`, the proxy's own words; for `pushing`, what it is waited for.
    #[serde(default)]
    pub reason: Option<String>,
    pub client: Client,
    pub address: Option<IpAddr>,
    pub zone: Option<Arc<str>>,
    pub labels: Labels,
    pub workloads: Vec<Workload>,
    pub upstreams: Upstreams,
    pub build: Arc<str>,
    /// For how long it has been offline; `None` while it is connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offline_seconds: Option<u64>,
}

/// How a node stands towards the configuration of now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// It has accepted all that concerns it.
    Synced,
    /// It has been sent something that it has not answered yet.
    Pushing,
    /// It refused something, and keeps what it had.
    Rejected,
    /// No stream of it is open.
    Offline,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problems {
    pub problems: Vec<ListedProblem>,
}

/// A [`Problem`], its place in one text: `file:line:column`.
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
    /// The content hash of services and documents: equal on replicas that see the same.
    pub revision: String,
    /// How many worlds this process has seen.
    pub generation: u64,
    /// The latest revisions before a change of documents, the oldest first.
    #[serde(default)]
    pub past: Vec<PastRevision>,
}

/// A revision that was in force until documents changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastRevision {
    pub revision: String,
    pub generation: u64,
    /// When documents changed, in Unix time.
    pub until: u64,
    pub services: usize,
    pub documents: usize,
}

/// One screen's worth: what `vmeshctl status` shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub trust_domain: String,
    pub revision: String,
    pub uptime_seconds: u64,
    pub ready: bool,
    /// What is still awaited, if not ready.
    pub waiting_for: Vec<String>,
    pub sources: Vec<Source>,
    pub services: usize,
    pub endpoints: usize,
    pub documents: usize,
    pub nodes: NodeCounts,
    pub problems: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    pub name: Arc<str>,
    pub state: State,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub because: Option<Arc<str>>,
    /// Since it last answered.
    pub age_seconds: Option<u64>,
    pub services: usize,
}

/// Every source, how it stands, and what of it is not believed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Discovery {
    pub sources: Vec<DiscoverySource>,
    /// Endpoints that are not used, by the operator's word.
    pub evicted: Vec<Evicted>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiscoverySource {
    pub name: Arc<str>,
    pub state: SourceState,
    /// Why it is not fresh.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub because: Option<Arc<str>>,
    /// Whether nothing is served before it has answered.
    pub required: bool,
    /// Since it last answered; `None` if it has not since the start.
    pub age_seconds: Option<u64>,
    /// When that was, in Unix time.
    pub answered_at: Option<u64>,
    /// Since when it is frozen, in Unix time, and the command that ends it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_at: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    pub services: usize,
    pub endpoints: usize,
    /// Endpoints in use that it does not name any more.
    pub missing: u64,
    /// The source as a whole first, then by service.
    pub held: Vec<Held>,
    /// How many of its host names are not resolved, and the first hundred of them.
    #[serde(default)]
    pub unresolved: usize,
    #[serde(default)]
    pub unresolved_names: Vec<UnresolvedName>,
    pub counters: SourceCounters,
}

/// A host name that has no address now, or whose last addresses could not be confirmed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnresolvedName {
    pub name: Arc<str>,
    /// Since its first lookup began, or since its lookups fail.
    pub age_seconds: u64,
    pub because: Arc<str>,
    /// Whether its last addresses stay in use.
    pub in_use: bool,
}

/// How a discovery source stands; of several that hold, the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceState {
    Fresh,
    /// It answers, and no name server answers for some of its host names.
    Unresolved,
    /// Something that it says is not believed yet.
    Held,
    /// It does not answer; what it said last holds.
    Stale,
    /// No change of it is taken, by the operator's word.
    Frozen,
}

/// Something that a source says and that is not believed yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// `None`: the source as a whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
    /// `empty`, `shrunk`, `absent`, `unhealthy` or `fleet`.
    pub kind: Arc<str>,
    /// For how long it has been held.
    pub age_seconds: u64,
    /// When it may be believed at the earliest; `None`: when it is accepted, or the source names enough again.
    pub remaining_seconds: Option<u64>,
    /// How many endpoints there were, and how many the source names now.
    pub had: usize,
    pub has: usize,
    /// How many readings that were asked for said the same, and how many have to.
    pub confirmed: u32,
    pub confirmations: u32,
    pub because: Arc<str>,
    /// What makes it believed at once.
    pub command: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evicted {
    pub service: ServiceName,
    pub address: SocketAddr,
    pub age_seconds: u64,
    /// What makes it used again.
    pub command: String,
}

/// Totals since the start, but for `connections`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceCounters {
    pub reads: u64,
    pub failed_reads: u64,
    pub bad_records: u64,
    pub index_resets: u64,
    pub sessions_expired: u64,
    pub connects: u64,
    pub connections: u64,
    /// By kind: what was not believed at once, and what was not believed at all because it came back.
    pub held: BTreeMap<Arc<str>, u64>,
    pub rejected: BTreeMap<Arc<str>, u64>,
}

/// What happened, the oldest first; the last 256 of each source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    pub events: Vec<Event>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Unix time, in milliseconds.
    pub at_millis: u64,
    pub age_seconds: u64,
    /// `None`: all sources.
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

/// What is to be believed: one service of a source, or all that is held of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accept {
    pub source: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceName>,
}

/// An endpoint of a service, whichever source names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointOf {
    pub service: ServiceName,
    pub address: SocketAddr,
}

/// One source, or all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Which {
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

/// How requests from one node reach one service, step by step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    pub service: ServiceName,
    pub from: NodeName,
    pub node: NodeState,
    #[serde(default)]
    pub reason: Option<String>,
    pub protocol: Protocol,
    pub state: State,
    /// Whether requests can get there at all.
    pub reachable: bool,
    /// The first thing that stands in the way.
    #[serde(default)]
    pub obstacle: Option<String>,
    /// Where the application dials; none without a declared upstream.
    pub listeners: Vec<String>,
    pub routes: Vec<Hop>,
    pub clusters: Vec<Cluster>,
    pub settings: Vec<Setting>,
    pub problems: Vec<ListedProblem>,
}

/// One rule, in the order in which they are tried.
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

/// A value that holds, and who set it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    pub name: String,
    pub value: String,
    pub set_by: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    pub done: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What was attempted, on what, why it failed, what to do next.
    pub error: String,
}
