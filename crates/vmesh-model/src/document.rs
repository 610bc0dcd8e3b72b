//! The mesh documents: what operators and owners say of services, on top of what discovery says.
//!
//! Precedence, the strongest first: `Node`, `Service`, `Mesh`, built in. [`Settings`] is what the three have in
//! common, so that the precedence is one function ([`Documents::settings`]).

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use crate::text::{Time, one_or_many};
use crate::{Labels, NodeName, NodeReport, Place, Protocol, ServiceName};

/// A document together with where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed<T> {
    pub place: Place,
    pub document: T,
}

impl<T> Deref for Placed<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.document
    }
}

/// A consistent set of documents: no two of one kind and name, and what they say of each other holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Documents {
    pub mesh: Option<Arc<Placed<Mesh>>>,
    pub services: BTreeMap<ServiceName, Arc<Placed<Service>>>,
    pub routes: BTreeMap<ServiceName, Arc<Placed<Route>>>,
    /// The more precise outrank the less precise and stand behind them: those by labels, few before many, then
    /// those by name; equals in the order of their selectors.
    pub nodes: Vec<Arc<Placed<Node>>>,
}

/// `kind: Mesh`: defaults for the whole fleet. There is at most one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mesh {
    /// How an endpoint of every service is chosen.
    pub load_balancing: Option<LoadBalancing>,
    /// How long to wait for what.
    pub timeouts: Option<Timeouts>,
    /// When a failed request is tried again; a rule of a [`Route`] outranks it.
    pub retry: Option<Retry>,
    /// When an endpoint that fails is left out.
    pub outlier_detection: Option<OutlierDetection>,
    /// How much one caller may have under way at once.
    pub connection_limits: Option<ConnectionLimits>,
    /// Which connections to real addresses go through the mesh, where a node captures them.
    pub capture: Option<Capture>,
    /// What becomes of captured connections that are to no service. Built in: `allow-any`.
    pub outbound: Option<Outbound>,
}

/// `kind: Service`: what the owner says of a service.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    /// The service that it speaks of, as discovery names it.
    pub name: ServiceName,
    /// What its instances speak; outranks what discovery says.
    pub protocol: Option<Protocol>,
    /// What clients dial in transparent mode.
    pub port: Option<u16>,
    /// Named parts of the service, each the endpoints that match all that it asks for.
    #[serde(default)]
    pub subsets: BTreeMap<SubsetName, Subset>,
    /// How an endpoint of this service is chosen.
    pub load_balancing: Option<LoadBalancing>,
    /// How long to wait for what.
    pub timeouts: Option<Timeouts>,
    /// When a failed request is tried again; a rule of a [`Route`] outranks it.
    pub retry: Option<Retry>,
    /// When an endpoint that fails is left out.
    pub outlier_detection: Option<OutlierDetection>,
    /// How much one caller may have under way at once.
    pub connection_limits: Option<ConnectionLimits>,
    /// Which connections to real addresses go through the mesh, where a node captures them.
    pub capture: Option<Capture>,
}

/// `kind: Node`: the same settings for chosen nodes, by name or by labels.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// The node that it speaks of. One of `name` and `labels` is needed.
    pub name: Option<NodeName>,
    /// A node has to have all of them.
    #[serde(default)]
    pub labels: Labels,
    /// Services that these nodes call on top of those that their agents declare.
    #[serde(default)]
    pub upstreams: Vec<crate::node::Upstream>,
    /// How an endpoint of every service that these nodes call is chosen.
    pub load_balancing: Option<LoadBalancing>,
    /// How long to wait for what.
    pub timeouts: Option<Timeouts>,
    /// When a failed request is tried again; a rule of a [`Route`] outranks it.
    pub retry: Option<Retry>,
    /// When an endpoint that fails is left out.
    pub outlier_detection: Option<OutlierDetection>,
    /// How much one caller may have under way at once.
    pub connection_limits: Option<ConnectionLimits>,
    /// Which connections to real addresses go through the mesh, where a node captures them.
    pub capture: Option<Capture>,
    /// What becomes of captured connections that are to no service. Built in: `allow-any`.
    pub outbound: Option<Outbound>,
}

impl Node {
    /// Whether it speaks of the node `report`.
    pub fn selects(&self, report: &NodeReport) -> bool {
        self.name.as_ref().is_none_or(|name| *name == report.name)
            && self.labels.iter().all(|(key, value)| report.labels.get(key) == Some(value))
            && (self.name.is_some() || !self.labels.is_empty())
    }

    /// What tells it from other `Node` documents: ``web-17`` or ``{rack: r7, role: web}``.
    pub fn selector(&self) -> String {
        selector(self.name.as_ref().map(NodeName::as_str), &self.labels)
    }
}

pub(crate) fn selector(name: Option<&str>, labels: &Labels) -> String {
    match name {
        Some(name) => name.to_owned(),
        None => {
            let pairs: Vec<_> = labels.iter().map(|(k, v)| format!("{k}: {v}")).collect();
            format!("{{{}}}", pairs.join(", "))
        }
    }
}

/// The name of a part of a service: `v2`.
pub type SubsetName = ServiceName;

/// The endpoints that match all that is given here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subset {
    /// The endpoints of this version.
    pub version: Option<Arc<str>>,
    /// The endpoints in this zone.
    pub zone: Option<Arc<str>>,
    /// The endpoints that have all of these.
    #[serde(default)]
    pub labels: Labels,
}

impl Subset {
    pub fn contains(&self, endpoint: &crate::Endpoint) -> bool {
        self.version.as_ref().is_none_or(|v| endpoint.version.as_ref() == Some(v))
            && self.zone.as_ref().is_none_or(|z| endpoint.zone.as_ref() == Some(z))
            && self.labels.iter().all(|(key, value)| endpoint.labels.get(key) == Some(value))
    }
}

/// How an endpoint is chosen for a request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadBalancing {
    /// The algorithm.
    #[serde(default)]
    pub policy: Policy,
    /// What `ring_hash` and `maglev` hash; without it every request goes anywhere.
    pub hash_on: Option<HashOn>,
    /// Which endpoints come first: those of the caller's own zone, or all alike.
    #[serde(default)]
    pub locality: Locality,
    /// Endpoints that are only used where those before them are too few or too ill, in this order: the datacenter on
    /// the other side of the sea, the registry that is being left.
    #[serde(default)]
    pub fallback: Vec<Fallback>,
}

/// Endpoints that are a fallback: those that match all that is given here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fallback {
    /// The endpoints that this discovery source names: `zookeeper:zk1:2181`, or a whole kind of sources, `zookeeper`.
    pub source: Option<Arc<str>>,
    /// The endpoints in this zone.
    pub zone: Option<Arc<str>>,
    /// The endpoints that have all of these: `datacenter: dc2` say.
    #[serde(default)]
    pub labels: Labels,
}

impl Fallback {
    pub fn contains(&self, endpoint: &crate::Endpoint) -> bool {
        let is_of = |source: &Arc<str>| {
            *source == endpoint.source
                || endpoint.source.split_once(':').is_some_and(|(kind, _)| kind == &**source)
        };
        self.source.as_ref().is_none_or(is_of)
            && self.zone.as_ref().is_none_or(|z| endpoint.zone.as_ref() == Some(z))
            && self.labels.iter().all(|(key, value)| endpoint.labels.get(key) == Some(value))
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// In turn.
    RoundRobin,
    /// The less busy of two that are drawn.
    #[default]
    LeastRequest,
    /// Drawn.
    Random,
    /// By hash, on a ring: few requests move when endpoints come and go.
    RingHash,
    /// By hash, through a table: faster than the ring, and more requests move.
    Maglev,
}

impl Policy {
    pub fn as_str(self) -> &'static str {
        match self {
            Policy::RoundRobin => "round_robin",
            Policy::LeastRequest => "least_request",
            Policy::Random => "random",
            Policy::RingHash => "ring_hash",
            Policy::Maglev => "maglev",
        }
    }
}

/// What of a request decides where it goes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HashOn {
    /// The value of this header.
    Header(Arc<str>),
    /// The value of this cookie.
    Cookie(Arc<str>),
    /// The value of this parameter of the URL.
    Query(Arc<str>),
    /// The address of the caller.
    SourceIp,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Locality {
    /// Zones do not matter.
    #[default]
    Any,
    /// The caller's zone first, the others when it has too few healthy endpoints.
    PreferLocal,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timeouts {
    /// Until a connection to an endpoint stands. Built in: 5 s.
    pub connect: Option<Time>,
    /// From the whole request to the whole response. Built in: 15 s for HTTP, none for TCP.
    pub request: Option<Time>,
    /// A connection (TCP) or stream (HTTP) without a byte for so long is closed. Built in: 5 m for HTTP, 1 h for TCP.
    pub idle: Option<Time>,
}

/// When and how often a failed request is tried again.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retry {
    /// How many more times, after the first; 0 turns retries off.
    pub attempts: u32,
    /// What counts as failed.
    #[serde(default)]
    pub on: Vec<RetryOn>,
    /// How long one try may take; it is part of the timeout of the whole request.
    pub per_try_timeout: Option<Time>,
}

/// What counts as failed. The names are Envoy's, without `-` for those that have a short form here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RetryOn {
    #[serde(rename = "5xx")]
    ServerError,
    GatewayError,
    Reset,
    ResetBeforeRequest,
    ConnectFailure,
    RefusedStream,
    #[serde(rename = "retriable-4xx")]
    Retriable4xx,
    Cancelled,
    DeadlineExceeded,
    ResourceExhausted,
    Unavailable,
    Internal,
}

impl RetryOn {
    /// Envoy's spelling in `retry_on`.
    pub fn as_str(self) -> &'static str {
        match self {
            RetryOn::ServerError => "5xx",
            RetryOn::GatewayError => "gateway-error",
            RetryOn::Reset => "reset",
            RetryOn::ResetBeforeRequest => "reset-before-request",
            RetryOn::ConnectFailure => "connect-failure",
            RetryOn::RefusedStream => "refused-stream",
            RetryOn::Retriable4xx => "retriable-4xx",
            RetryOn::Cancelled => "cancelled",
            RetryOn::DeadlineExceeded => "deadline-exceeded",
            RetryOn::ResourceExhausted => "resource-exhausted",
            RetryOn::Unavailable => "unavailable",
            RetryOn::Internal => "internal",
        }
    }

    /// Whether it is a gRPC status: proxyless gRPC clients know only these.
    pub fn is_grpc_status(self) -> bool {
        matches!(
            self,
            RetryOn::Cancelled
                | RetryOn::DeadlineExceeded
                | RetryOn::ResourceExhausted
                | RetryOn::Unavailable
                | RetryOn::Internal
        )
    }
}

/// An endpoint that keeps failing is left out for a while.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutlierDetection {
    /// So many 5xx in a row eject. Built in: 5.
    pub consecutive_5xx: Option<u32>,
    /// How often it is looked at. Built in: 10 s.
    pub interval: Option<Time>,
    /// How long the first time; longer every time after. Built in: 30 s.
    pub base_ejection: Option<Time>,
    /// At most this share of the endpoints, in percent. Built in: 50.
    pub max_ejection_percent: Option<u32>,
}

/// Per calling Envoy, not per fleet. What exceeds them fails at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectionLimits {
    /// Connections to all endpoints together.
    pub max_connections: Option<u32>,
    /// Requests that wait for a connection.
    pub max_pending_requests: Option<u32>,
    /// Requests under way.
    pub max_requests: Option<u32>,
    /// Retries under way; 0 allows none.
    pub max_retries: Option<u32>,
}

/// Which connections to the real addresses of a service are captured. It is the rules of the host that act on it and not
/// its Envoy, so that turning it up or down touches no connection that stands. Virtual addresses exist nowhere but in
/// Envoy: connections to them are always captured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capture {
    /// The share of new connections, 0 to 100. Built in: what the host says, all of them if it says nothing.
    pub percent: Option<u32>,
    /// What becomes of new connections when the host's Envoy or agent is gone. Built in: what the host says, `open` if it
    /// says nothing.
    pub on_loss: Option<OnLoss>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnLoss {
    /// They go past Envoy.
    Open,
    /// They fail: what the mesh enforces is not passed by.
    Closed,
}

impl OnLoss {
    pub fn as_str(self) -> &'static str {
        match self {
            OnLoss::Open => "open",
            OnLoss::Closed => "closed",
        }
    }
}

/// What becomes of captured connections that are to no service.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outbound {
    /// They go on to where they were going.
    #[default]
    AllowAny,
    /// They are closed.
    RegistryOnly,
}

impl Outbound {
    pub fn as_str(self) -> &'static str {
        match self {
            Outbound::AllowAny => "allow-any",
            Outbound::RegistryOnly => "registry-only",
        }
    }
}

/// `kind: Route`: how requests to a service are routed. The first rule that matches decides; a request that none
/// matches goes to the service as if there were no document.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// The service that the requests are made to.
    pub service: ServiceName,
    /// In order: the first that matches decides.
    pub rules: Vec<Rule>,
}

/// One rule of a [`Route`]. Without `split` and `redirect` its requests go to the whole service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Which requests; all of them if left out.
    #[serde(default, rename = "match")]
    pub matches: Match,
    /// Shares of the requests for subsets or other services.
    #[serde(default)]
    pub split: Vec<Target>,
    /// Sends the requests elsewhere instead.
    pub redirect: Option<Redirect>,
    /// For the whole request, all tries together.
    pub timeout: Option<Time>,
    /// Outranks what `Mesh`, `Service` and `Node` say.
    pub retry: Option<Retry>,
}

/// All that is given has to hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Match {
    /// The path, without the query.
    pub path: Option<PathMatch>,
    /// By name; every one of them.
    #[serde(default)]
    pub headers: BTreeMap<Arc<str>, TextMatch>,
    /// Parameters of the URL by name; every one of them.
    #[serde(default)]
    pub query: BTreeMap<Arc<str>, TextMatch>,
    /// One of these.
    #[serde(default, deserialize_with = "one_or_many")]
    pub method: Vec<Method>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PathMatch {
    /// The whole path.
    Exact(Arc<str>),
    /// Whole text prefix: `/v2` also matches `/v2beta`; write `/v2/` to match below `/v2` only.
    Prefix(Arc<str>),
    /// RE2, against the whole path.
    Regex(Arc<str>),
}

/// How a header's or a parameter's value is matched: a text stands for `exact`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TextMatch {
    /// The whole value.
    Exact(Arc<str>),
    /// How the value begins.
    Prefix(Arc<str>),
    /// How the value ends.
    Suffix(Arc<str>),
    /// What is somewhere in the value.
    Contains(Arc<str>),
    /// RE2, against the whole value.
    Regex(Arc<str>),
    /// Whether there is one at all, whatever its value.
    Present(bool),
}

/// An HTTP method, in capitals as on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Method(pub Arc<str>);

/// Where a share of a rule's requests goes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// Another service; the routed one if left out.
    pub service: Option<ServiceName>,
    /// A part of it, as its `Service` document defines; all of it if left out.
    pub subset: Option<SubsetName>,
    /// The share, relative to the other targets of the rule. 1 if left out, and 0 sends nothing.
    #[serde(default = "whole")]
    pub weight: u32,
}

fn whole() -> u32 {
    1
}

/// Sends a rule's requests elsewhere: to another service and its own routes, or the client to another URL.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Redirect {
    /// As if the request had been made to this service: its `Route` decides. Excludes the other fields.
    pub service: Option<ServiceName>,
    /// The scheme of the new URL.
    pub scheme: Option<Scheme>,
    /// The host of the new URL.
    pub host: Option<Arc<str>>,
    /// The port of the new URL.
    pub port: Option<u16>,
    /// The whole path.
    pub path: Option<Arc<str>>,
    /// What the matched prefix becomes.
    pub prefix: Option<Arc<str>>,
    /// 301 (default), 302, 303, 307 or 308.
    pub code: Option<u16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    Http,
    Https,
}

/// What `Mesh`, `Service` and `Node` can all say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    pub load_balancing: Option<LoadBalancing>,
    pub timeouts: Timeouts,
    pub retry: Option<Retry>,
    pub outlier_detection: Option<OutlierDetection>,
    pub connection_limits: Option<ConnectionLimits>,
    pub capture: Capture,
    /// Which document set each value, by the value's name; what is missing is built in.
    pub origins: BTreeMap<&'static str, Origin>,
}

/// The document that set a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    pub document: String,
    pub place: Place,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.document, self.place)
    }
}

impl Documents {
    /// What holds for `service` as called by a node: `Node` over `Service` over `Mesh`, value by value.
    ///
    /// `nodes` are the `Node` documents that select the caller, the strongest last.
    pub fn settings(&self, service: &ServiceName, nodes: &[Arc<Placed<Node>>]) -> Settings {
        let mut settings = Settings::default();
        if let Some(mesh) = &self.mesh {
            let said = Said::of(&mesh.load_balancing, &mesh.timeouts, &mesh.retry).with(
                &mesh.outlier_detection,
                &mesh.connection_limits,
                &mesh.capture,
            );
            settings.overlay(said, || Origin { document: "Mesh".to_owned(), place: mesh.place.clone() });
        }
        if let Some(service) = self.services.get(service) {
            let said = Said::of(&service.load_balancing, &service.timeouts, &service.retry).with(
                &service.outlier_detection,
                &service.connection_limits,
                &service.capture,
            );
            let document = format!("Service `{}`", service.name);
            settings.overlay(said, || Origin { document: document.clone(), place: service.place.clone() });
        }
        settings.overlay_nodes(nodes);
        settings
    }

    /// What becomes of captured connections of a node that are to no service: `Node` over `Mesh` over built in.
    ///
    /// `nodes` are the `Node` documents that select it, the strongest last.
    pub fn outbound(&self, nodes: &[Arc<Placed<Node>>]) -> Outbound {
        let said = nodes.iter().rev().find_map(|node| node.outbound);
        said.or(self.mesh.as_ref().and_then(|mesh| mesh.outbound)).unwrap_or_default()
    }

    /// The `Node` documents that speak of `report`, the strongest last.
    pub fn nodes_for(&self, report: &NodeReport) -> Vec<Arc<Placed<Node>>> {
        self.nodes.iter().filter(|node| node.selects(report)).cloned().collect()
    }

    /// For [`Documents::nodes_for`] many nodes.
    pub fn node_finder(&self) -> NodeFinder<'_> {
        let mut finder = NodeFinder::default();
        for (at, node) in self.nodes.iter().enumerate() {
            match &node.name {
                Some(name) => finder.by_name.entry(name).or_default().push((at, node)),
                None => finder.by_labels.push((at, node)),
            }
        }
        finder
    }

    /// How many documents there are.
    pub fn len(&self) -> usize {
        usize::from(self.mesh.is_some()) + self.services.len() + self.routes.len() + self.nodes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Finds the `Node` documents of a node without a look at those of all other nodes.
#[derive(Debug, Default)]
pub struct NodeFinder<'a> {
    by_name: HashMap<&'a NodeName, Vec<Ranked<'a>>>,
    by_labels: Vec<Ranked<'a>>,
}

/// A document and its place in the order of strength.
type Ranked<'a> = (usize, &'a Arc<Placed<Node>>);

impl NodeFinder<'_> {
    /// The same as [`Documents::nodes_for`].
    pub fn find(&self, report: &NodeReport) -> Vec<Arc<Placed<Node>>> {
        let named = self.by_name.get(&report.name).into_iter().flatten();
        let candidates = self.by_labels.iter().chain(named);
        let mut found: Vec<_> = candidates.filter(|(_, node)| node.selects(report)).collect();
        found.sort_by_key(|(at, _)| *at);
        found.into_iter().map(|(_, node)| (*node).clone()).collect()
    }
}

/// The settings that one document gives; `None` leaves what a weaker document said.
#[derive(Default)]
struct Said<'a> {
    load_balancing: Option<&'a LoadBalancing>,
    timeouts: Timeouts,
    retry: Option<&'a Retry>,
    outlier_detection: Option<OutlierDetection>,
    connection_limits: Option<ConnectionLimits>,
    capture: Capture,
}

impl<'a> Said<'a> {
    fn of(balancing: &'a Option<LoadBalancing>, times: &Option<Timeouts>, retry: &'a Option<Retry>) -> Self {
        Said {
            load_balancing: balancing.as_ref(),
            timeouts: times.unwrap_or_default(),
            retry: retry.as_ref(),
            ..Said::default()
        }
    }

    fn with(
        mut self,
        outliers: &Option<OutlierDetection>,
        limits: &Option<ConnectionLimits>,
        capture: &Option<Capture>,
    ) -> Self {
        self.outlier_detection = *outliers;
        self.connection_limits = *limits;
        self.capture = capture.unwrap_or_default();
        self
    }
}

impl Settings {
    /// What the `Node` documents `nodes`, the strongest last, say of every service.
    pub fn of_nodes(nodes: &[Arc<Placed<Node>>]) -> Settings {
        let mut settings = Settings::default();
        settings.overlay_nodes(nodes);
        settings
    }

    /// A text that is equal for equal values, whichever documents set them.
    pub fn content_key(&self) -> String {
        let Settings {
            load_balancing,
            timeouts,
            retry,
            outlier_detection,
            connection_limits,
            capture,
            origins: _,
        } = self;
        format!(
            "{load_balancing:?} {timeouts:?} {retry:?} {outlier_detection:?} {connection_limits:?} {capture:?}"
        )
    }

    fn overlay_nodes(&mut self, nodes: &[Arc<Placed<Node>>]) {
        for node in nodes {
            let said = Said::of(&node.load_balancing, &node.timeouts, &node.retry).with(
                &node.outlier_detection,
                &node.connection_limits,
                &node.capture,
            );
            let document = format!("Node `{}`", node.selector());
            self.overlay(said, || Origin { document: document.clone(), place: node.place.clone() });
        }
    }

    fn overlay(&mut self, said: Said<'_>, origin: impl Fn() -> Origin) {
        let Settings {
            load_balancing,
            timeouts,
            retry,
            outlier_detection,
            connection_limits,
            capture,
            origins,
        } = self;
        let mut take = |name: &'static str, given: bool| {
            if given {
                origins.insert(name, origin());
            }
            given
        };
        if take("load_balancing", said.load_balancing.is_some()) {
            *load_balancing = said.load_balancing.cloned();
        }
        if take("timeouts.connect", said.timeouts.connect.is_some()) {
            timeouts.connect = said.timeouts.connect;
        }
        if take("timeouts.request", said.timeouts.request.is_some()) {
            timeouts.request = said.timeouts.request;
        }
        if take("timeouts.idle", said.timeouts.idle.is_some()) {
            timeouts.idle = said.timeouts.idle;
        }
        if take("retry", said.retry.is_some()) {
            *retry = said.retry.cloned();
        }
        if take("outlier_detection", said.outlier_detection.is_some()) {
            *outlier_detection = said.outlier_detection;
        }
        if take("connection_limits", said.connection_limits.is_some()) {
            *connection_limits = said.connection_limits;
        }
        if take("capture.percent", said.capture.percent.is_some()) {
            capture.percent = said.capture.percent;
        }
        if take("capture.on_loss", said.capture.on_loss.is_some()) {
            capture.on_loss = said.capture.on_loss;
        }
    }
}

impl<'de> Deserialize<'de> for Method {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if !text.is_empty() && text.bytes().all(|b| b.is_ascii_uppercase() || b == b'-') {
            Ok(Method(text.into()))
        } else {
            Err(de::Error::custom(format!("`{text}` is not an HTTP method: capitals, such as GET or POST")))
        }
    }
}

impl<'de> Deserialize<'de> for TextMatch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visit;

        impl<'de> Visitor<'de> for Visit {
            type Value = TextMatch;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, or one of exact, prefix, suffix, contains, regex or present")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<TextMatch, E> {
                Ok(TextMatch::Exact(text.into()))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TextMatch, A::Error> {
                const KINDS: &[&str] = &["exact", "prefix", "suffix", "contains", "regex", "present"];
                let expected = "one of exact, prefix, suffix, contains, regex or present";
                let Some(kind) = map.next_key::<String>()? else {
                    return Err(de::Error::custom(format!("an empty match: give {expected}")));
                };
                let matched = match kind.as_str() {
                    "exact" => TextMatch::Exact(map.next_value()?),
                    "prefix" => TextMatch::Prefix(map.next_value()?),
                    "suffix" => TextMatch::Suffix(map.next_value()?),
                    "contains" => TextMatch::Contains(map.next_value()?),
                    "regex" => TextMatch::Regex(map.next_value()?),
                    "present" => TextMatch::Present(map.next_value()?),
                    other => return Err(de::Error::unknown_field(other, KINDS)),
                };
                match map.next_key::<String>()? {
                    None => Ok(matched),
                    Some(second) => {
                        Err(de::Error::custom(format!("`{kind}` and `{second}` together: give {expected}")))
                    }
                }
            }
        }

        deserializer.deserialize_any(Visit)
    }
}
