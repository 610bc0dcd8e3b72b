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
//!
//! An error is [`Failure`], with a status of 4xx or 5xx.

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
