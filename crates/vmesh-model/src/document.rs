//! The mesh documents: settings that operators and service owners add to the data from discovery.
//!
//! Precedence, from highest to lowest: `Node`, `Service`, `Mesh`, built-in default. [`Settings`] are the
//! fields that the three kinds share; [`Documents::settings`] applies the precedence.

mod access;
mod settings;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

pub use self::access::{
    AccessAction, AccessCallers, AccessDocument, AccessMode, AccessPath, AccessPolicy, AccessRequests,
    AccessRule, ClaimValues, JwtCondition, JwtProvider, MeshAccess,
};
pub use self::settings::{Origin, Settings};
use crate::text::{Time, one_or_many};
use crate::{Labels, NodeName, NodeReport, Place, Protocol, ServiceName};

/// A document and its location.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedDocument<T> {
    pub place: Place,
    pub document: T,
}

impl<T> Deref for PlacedDocument<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.document
    }
}

/// A consistent set of documents: kind and name are unique, and every reference between documents is valid.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Documents {
    pub mesh: Option<Arc<PlacedDocument<MeshDocument>>>,
    pub services: BTreeMap<ServiceName, Arc<PlacedDocument<ServiceDocument>>>,
    pub routes: BTreeMap<ServiceName, Arc<PlacedDocument<RouteDocument>>>,
    /// Sorted by precedence, the lowest first: documents that select by labels, fewer labels before more,
    /// then documents that select by name. Equal ones are in the order of their selectors.
    pub nodes: Vec<Arc<PlacedDocument<NodeDocument>>>,
    /// The documents of each service, sorted by name.
    pub access: BTreeMap<ServiceName, Vec<Arc<PlacedDocument<AccessDocument>>>>,
    /// The key sets of token issuers that stand in files, by the name of the file.
    pub key_sets: BTreeMap<Arc<str>, Arc<str>>,
}

/// `kind: Mesh`: defaults for all nodes and services. There is at most one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeshDocument {
    /// The way in which Envoy chooses an endpoint of any service.
    pub load_balancing: Option<LoadBalancing>,
    /// The timeouts for connections and requests.
    pub timeouts: Option<Timeouts>,
    /// The conditions for a retry of a failed request. A rule of a [`RouteDocument`] takes precedence.
    pub retry: Option<Retry>,
    /// The conditions under which a failing endpoint is ejected.
    pub outlier_detection: Option<OutlierDetection>,
    /// The limits of concurrent connections and requests of one caller.
    pub connection_limits: Option<ConnectionLimits>,
    /// The connections to real addresses that are captured, on nodes that capture them.
    pub capture: Option<CaptureSettings>,
    /// The use of mTLS between the Envoys of enrolled nodes.
    pub mtls: Option<MtlsSettings>,
    /// The policy for captured connections to addresses of no service. Default: `allow-any`.
    pub outbound: Option<Outbound>,
    /// The defaults for the callers of services, which [`AccessDocument`]s override.
    pub access: Option<MeshAccess>,
}

/// `kind: Service`: the settings of one service, made by its owner.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServiceDocument {
    /// The name of the service in discovery.
    pub name: ServiceName,
    /// The protocol of the instances. Takes precedence over discovery.
    pub protocol: Option<Protocol>,
    /// The port at the service's virtual address.
    pub port: Option<u16>,
    /// Named subsets of the service, each with the conditions that its endpoints match.
    #[serde(default)]
    pub subsets: BTreeMap<SubsetName, Subset>,
    /// The way in which Envoy chooses an endpoint of this service.
    pub load_balancing: Option<LoadBalancing>,
    /// The timeouts for connections and requests.
    pub timeouts: Option<Timeouts>,
    /// The conditions for a retry of a failed request. A rule of a [`RouteDocument`] takes precedence.
    pub retry: Option<Retry>,
    /// The conditions under which a failing endpoint is ejected.
    pub outlier_detection: Option<OutlierDetection>,
    /// The limits of concurrent connections and requests of one caller.
    pub connection_limits: Option<ConnectionLimits>,
    /// The connections to real addresses that are captured, on nodes that capture them.
    pub capture: Option<CaptureSettings>,
    /// The use of mTLS between the Envoys of enrolled nodes.
    pub mtls: Option<MtlsSettings>,
}

/// `kind: Node`: the settings of the nodes that it selects by name or by labels.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeDocument {
    /// The name of the selected node. Either `name` or `labels` is required.
    pub name: Option<NodeName>,
    /// Labels that every selected node has.
    #[serde(default)]
    pub labels: Labels,
    /// Services that these nodes call, in addition to those that their agents declare.
    #[serde(default)]
    pub upstreams: Vec<crate::node::Upstream>,
    /// The way in which Envoy chooses an endpoint of the services that these nodes call.
    pub load_balancing: Option<LoadBalancing>,
    /// The timeouts for connections and requests.
    pub timeouts: Option<Timeouts>,
    /// The conditions for a retry of a failed request. A rule of a [`RouteDocument`] takes precedence.
    pub retry: Option<Retry>,
    /// The conditions under which a failing endpoint is ejected.
    pub outlier_detection: Option<OutlierDetection>,
    /// The limits of concurrent connections and requests of one caller.
    pub connection_limits: Option<ConnectionLimits>,
    /// The connections to real addresses that are captured, on nodes that capture them.
    pub capture: Option<CaptureSettings>,
    /// The use of mTLS, for the services that these nodes call and for the workloads that they run.
    pub mtls: Option<MtlsSettings>,
    /// The policy for captured connections to addresses of no service. Default: `allow-any`.
    pub outbound: Option<Outbound>,
}

impl NodeDocument {
    /// Reports whether this document selects the node of `report`.
    pub fn selects(&self, report: &NodeReport) -> bool {
        self.name.as_ref().is_none_or(|name| *name == report.name)
            && self.labels.iter().all(|(key, value)| report.labels.get(key) == Some(value))
            && (self.name.is_some() || !self.labels.is_empty())
    }

    /// Returns the selector as text, which identifies the document: ``web-17`` or ``{rack: r7, role: web}``.
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

/// The name of a subset of a service, such as `v2`.
pub type SubsetName = ServiceName;

/// The conditions on the endpoints of a subset. An endpoint must match all that are set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Subset {
    /// The version of the endpoint.
    pub version: Option<Arc<str>>,
    /// The locality zone of the endpoint.
    pub zone: Option<Arc<str>>,
    /// Labels that every matching endpoint has.
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

/// The way in which Envoy chooses an endpoint for a request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadBalancing {
    /// The load-balancing algorithm.
    #[serde(default)]
    pub policy: Policy,
    /// The property of a request that `ring_hash` and `maglev` hash. Without it, requests are distributed at
    /// random.
    pub hash_on: Option<HashOn>,
    /// Decides whether endpoints in the caller's locality zone are preferred.
    #[serde(default)]
    pub locality: Locality,
    /// Endpoints that are used only if fewer than the panic threshold of all earlier ones are healthy, in
    /// this order. For example another datacenter, or the registry that is being migrated away from.
    #[serde(default)]
    pub fallback: Vec<Fallback>,
}

/// The conditions on the endpoints of a fallback. An endpoint must match all that are set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fallback {
    /// The discovery source that lists the endpoint: `zookeeper:zk1:2181`, or all sources of a kind,
    /// `zookeeper`.
    pub source: Option<Arc<str>>,
    /// The locality zone of the endpoint.
    pub zone: Option<Arc<str>>,
    /// Labels that every matching endpoint has, such as `datacenter: dc2`.
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
    /// Each endpoint in turn.
    RoundRobin,
    /// The endpoint with fewer active requests, of two chosen at random.
    #[default]
    LeastRequest,
    /// An endpoint at random.
    Random,
    /// Chooses by hash, on a ring. Few requests move to other endpoints when endpoints are added or removed.
    RingHash,
    /// Chooses by hash, through a table. Faster than the ring, but more requests move.
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

/// The property of a request that is hashed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HashOn {
    /// The value of this header.
    Header(Arc<str>),
    /// The value of this cookie.
    Cookie(Arc<str>),
    /// The value of this query parameter of the URL.
    Query(Arc<str>),
    /// The IP address of the caller.
    SourceIp,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Locality {
    /// Endpoints of all zones are treated alike.
    #[default]
    Any,
    /// Endpoints in the caller's zone are preferred while enough of them are healthy.
    PreferLocal,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timeouts {
    /// The timeout for establishing a connection to an endpoint. Default: 5 s.
    pub connect: Option<Time>,
    /// The timeout from the end of the request to the end of the response. Default: 15 s for HTTP, none for
    /// TCP.
    pub request: Option<Time>,
    /// The time without traffic after which a connection (TCP) or stream (HTTP) is closed. Default: 5 m for
    /// HTTP, 1 h for TCP.
    pub idle: Option<Time>,
}

/// The conditions and the number of retries of a failed request.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retry {
    /// The number of retries after the first attempt. 0 disables retries.
    pub attempts: u32,
    /// The failures that are retried.
    #[serde(default)]
    pub on: Vec<RetryOn>,
    /// The timeout of one attempt, within the timeout of the whole request.
    pub per_try_timeout: Option<Time>,
}

/// A failure that is retried. The names are those of Envoy's `retry_on`.
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
    /// Returns the name in Envoy's `retry_on`.
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

    /// Reports whether this is a gRPC status. Proxyless gRPC clients support only these.
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

/// The conditions under which a failing endpoint is ejected for a while.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutlierDetection {
    /// The number of consecutive 5xx responses that eject an endpoint. Default: 5.
    pub consecutive_5xx: Option<u32>,
    /// The interval between checks. Default: 10 s.
    pub interval: Option<Time>,
    /// The duration of the first ejection; later ones are longer. Default: 30 s.
    pub base_ejection: Option<Time>,
    /// The largest share of ejected endpoints, in percent. Default: 50.
    pub max_ejection_percent: Option<u32>,
}

/// Limits per calling Envoy, not per fleet. Requests beyond a limit fail at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectionLimits {
    /// Connections to all endpoints together.
    pub max_connections: Option<u32>,
    /// Requests that wait for a connection.
    pub max_pending_requests: Option<u32>,
    /// Active requests.
    pub max_requests: Option<u32>,
    /// Active retries. 0 disables retries.
    pub max_retries: Option<u32>,
}

/// The connections to the real addresses of a service that are captured. The host's rules implement this rather
/// than Envoy, so a change closes no established connection. Virtual addresses exist only in Envoy, so
/// connections to them are always captured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptureSettings {
    /// The share of new connections that are captured, 0 to 100. Default: the host's setting, and without one
    /// all of them.
    pub percent: Option<u32>,
    /// The behaviour for new connections while the host's Envoy or agent is down. Default: the host's
    /// setting, and without one `open`.
    pub on_loss: Option<OnLoss>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnLoss {
    /// Connections bypass Envoy.
    Open,
    /// Connections fail, so that no policy of the mesh can be bypassed.
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

/// The use of mTLS between Envoys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MtlsSettings {
    /// The connections that a workload accepts, and that its callers open.
    pub mode: MtlsMode,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MtlsMode {
    /// Callers use plaintext.
    #[default]
    Off,
    /// Callers use mTLS to workloads that are ready for it. Workloads also accept plaintext.
    Permissive,
    /// Workloads accept only mTLS.
    Strict,
}

impl MtlsMode {
    pub fn as_str(self) -> &'static str {
        match self {
            MtlsMode::Off => "off",
            MtlsMode::Permissive => "permissive",
            MtlsMode::Strict => "strict",
        }
    }
}

/// The policy for captured connections to addresses of no service.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outbound {
    /// Connections are passed through to their original destination.
    #[default]
    AllowAny,
    /// Connections are closed.
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

/// `kind: Route`: how requests to a service are routed. The first matching rule applies. A request that
/// matches no rule goes to the service as if there were no document.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteDocument {
    /// The service to which the requests are addressed.
    pub service: ServiceName,
    /// The rules in order; the first matching one applies.
    pub rules: Vec<Rule>,
}

/// One rule of a [`RouteDocument`]. Without `split` and `redirect`, its requests go to the whole service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The condition on requests. Default: every request matches.
    #[serde(default, rename = "match")]
    pub matches: Match,
    /// The subsets or other services among which the requests are split.
    #[serde(default)]
    pub split: Vec<Target>,
    /// Redirects the requests instead.
    pub redirect: Option<Redirect>,
    /// The timeout of the whole request, including all attempts.
    pub timeout: Option<Time>,
    /// The conditions for a retry of a failed request. They take precedence over `Mesh`, `Service` and `Node`.
    pub retry: Option<Retry>,
}

/// A condition on requests. A request must match every part that is set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Match {
    /// The path, without the query.
    pub path: Option<PathMatch>,
    /// The headers by name. All of them must match.
    #[serde(default)]
    pub headers: BTreeMap<Arc<str>, TextMatch>,
    /// The query parameters of the URL by name. All of them must match.
    #[serde(default)]
    pub query: BTreeMap<Arc<str>, TextMatch>,
    /// The accepted methods; empty accepts every method.
    #[serde(default, deserialize_with = "one_or_many")]
    pub method: Vec<Method>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PathMatch {
    /// The exact path.
    Exact(Arc<str>),
    /// A text prefix: `/v2` also matches `/v2beta`; write `/v2/` to match only paths below `/v2`.
    Prefix(Arc<str>),
    /// An RE2 expression that matches the whole path.
    Regex(Arc<str>),
}

/// A condition on the value of a header or parameter. A plain text means `exact`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TextMatch {
    /// The exact value.
    Exact(Arc<str>),
    /// A prefix of the value.
    Prefix(Arc<str>),
    /// A suffix of the value.
    Suffix(Arc<str>),
    /// A substring of the value.
    Contains(Arc<str>),
    /// An RE2 expression that matches the whole value.
    Regex(Arc<str>),
    /// Matches if the header or parameter is present, with any value.
    Present(bool),
}

/// An HTTP method, in capitals as on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Method(pub Arc<str>);

/// The destination of a share of a rule's requests.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// The destination service. Default: the service of the route.
    pub service: Option<ServiceName>,
    /// The subset of the service, defined in its `Service` document. Default: the whole service.
    pub subset: Option<SubsetName>,
    /// The share, relative to the other targets of the rule. Default: 1. A target of weight 0 receives
    /// nothing.
    #[serde(default = "default_weight")]
    pub weight: u32,
}

fn default_weight() -> u32 {
    1
}

/// Redirects requests: internally to another service and its routes, or the client to another URL.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Redirect {
    /// The service that receives the request as if it had been addressed to it, so its own `Route` applies.
    /// Excludes the other fields.
    pub service: Option<ServiceName>,
    /// The scheme of the new URL.
    pub scheme: Option<Scheme>,
    /// The host of the new URL.
    pub host: Option<Arc<str>>,
    /// The port of the new URL.
    pub port: Option<u16>,
    /// The whole path of the new URL.
    pub path: Option<Arc<str>>,
    /// The replacement of the matched prefix.
    pub prefix: Option<Arc<str>>,
    /// The status code: 301 (default), 302, 303, 307 or 308.
    pub code: Option<u16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    Http,
    Https,
}

impl Documents {
    /// Returns the `Node` documents that select the node of `report`; later ones take precedence.
    pub fn nodes_for(&self, report: &NodeReport) -> Vec<Arc<PlacedDocument<NodeDocument>>> {
        self.nodes.iter().filter(|node| node.selects(report)).cloned().collect()
    }

    /// Returns an index that answers [`Documents::nodes_for`] faster for many nodes.
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

    /// Reports whether any document turns mTLS on.
    pub fn uses_mtls(&self) -> bool {
        let is_on = |mtls: &Option<MtlsSettings>| mtls.is_some_and(|mtls| mtls.mode != MtlsMode::Off);
        self.mesh.iter().any(|mesh| is_on(&mesh.mtls))
            || self.services.values().any(|service| is_on(&service.mtls))
            || self.nodes.iter().any(|node| is_on(&node.mtls))
    }

    /// Returns the number of documents.
    pub fn len(&self) -> usize {
        usize::from(self.mesh.is_some())
            + self.services.len()
            + self.routes.len()
            + self.nodes.len()
            + self.access.values().map(Vec::len).sum::<usize>()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Finds the `Node` documents that select a node, without visiting documents that select other nodes by name.
#[derive(Debug, Default)]
pub struct NodeFinder<'a> {
    by_name: HashMap<&'a NodeName, Vec<RankedDocument<'a>>>,
    by_labels: Vec<RankedDocument<'a>>,
}

/// A document and its position in the order of precedence.
type RankedDocument<'a> = (usize, &'a Arc<PlacedDocument<NodeDocument>>);

impl NodeFinder<'_> {
    /// Returns the same documents as [`Documents::nodes_for`].
    pub fn find(&self, report: &NodeReport) -> Vec<Arc<PlacedDocument<NodeDocument>>> {
        let named = self.by_name.get(&report.name).into_iter().flatten();
        let candidates = self.by_labels.iter().chain(named);
        let mut found: Vec<_> = candidates.filter(|(_, node)| node.selects(report)).collect();
        found.sort_by_key(|(at, _)| *at);
        found.into_iter().map(|(_, node)| (*node).clone()).collect()
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
        struct TextMatchVisitor;

        impl<'de> Visitor<'de> for TextMatchVisitor {
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

        deserializer.deserialize_any(TextMatchVisitor)
    }
}
