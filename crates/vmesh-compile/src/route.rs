//! RDS: compiles the `Route` document of a service into a route configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use vmesh_catalog::World;
use vmesh_model::document::{
    HashOn, LoadBalancing, Match, PathMatch, PlacedDocument, Policy, Redirect, Retry, RouteDocument, Rule,
    Scheme, Target, TextMatch,
};
use vmesh_model::node::Client;
use vmesh_model::strict::did_you_mean;
use vmesh_model::{Problem, ServiceName};
use vmesh_proto::envoy::config::core::v3::{DataSource, data_source};
use vmesh_proto::envoy::config::route::v3::header_matcher::HeaderMatchSpecifier;
use vmesh_proto::envoy::config::route::v3::query_parameter_matcher::QueryParameterMatchSpecifier;
use vmesh_proto::envoy::config::route::v3::redirect_action::{
    PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier,
};
use vmesh_proto::envoy::config::route::v3::retry_policy::{RetryHostPredicate, retry_host_predicate};
use vmesh_proto::envoy::config::route::v3::route::Action;
use vmesh_proto::envoy::config::route::v3::route_action::hash_policy::{
    ConnectionProperties, Cookie, Header, PolicySpecifier, QueryParameter,
};
use vmesh_proto::envoy::config::route::v3::route_action::{ClusterSpecifier, HashPolicy};
use vmesh_proto::envoy::config::route::v3::route_match::PathSpecifier;
use vmesh_proto::envoy::config::route::v3::weighted_cluster::ClusterWeight;
use vmesh_proto::envoy::config::route::v3::{
    DirectResponseAction, HeaderMatcher, QueryParameterMatcher, RedirectAction, RetryPolicy,
    Route as EnvoyRoute, RouteAction, RouteConfiguration, RouteMatch, VirtualHost, WeightedCluster,
};
use vmesh_proto::envoy::extensions::retry::host::previous_hosts::v3::PreviousHostsPredicate;
use vmesh_proto::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use vmesh_proto::envoy::r#type::matcher::v3::{RegexMatcher, StringMatcher};
use vmesh_proto::{any, duration, uint32};

use crate::effective::{EffectiveSettings, with_default_conditions};

/// The limit of services that a chain of redirects may pass. The loader already rejects documents with a
/// cycle; this limit guards against a missed one.
const MAX_REDIRECTS: usize = 16;

/// A cluster and its relative share of the requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    pub cluster: String,
    pub weight: u32,
}

/// Returns the name of the cluster, which is also the name of its EDS resource, for `service` or one of its
/// subsets.
pub fn cluster_name(service: &ServiceName, subset: Option<&ServiceName>) -> String {
    match subset {
        Some(subset) => format!("{service}|{subset}"),
        None => service.to_string(),
    }
}

/// Compiles the routes of one service, and collects problems and references meanwhile.
pub(crate) struct RouteCompiler<'a> {
    pub(crate) world: &'a World,
    pub(crate) service: &'a ServiceName,
    pub(crate) effective: &'a EffectiveSettings,
    pub(crate) client: Client,
    pub(crate) problems: Vec<Problem>,
    /// The other services that requests are sent to. They belong to the scope of the nodes that call this
    /// service.
    pub(crate) references: BTreeSet<ServiceName>,
    /// Every service that a rule mentions, and whether it exists.
    pub(crate) mentioned_services: BTreeMap<ServiceName, bool>,
}

impl RouteCompiler<'_> {
    /// Returns the route configuration of the service: its rules in order, then a route to the whole service.
    pub(crate) fn compile_configuration(&mut self) -> RouteConfiguration {
        let mut routes = self.compile_rules(self.service, &Match::default(), 0);
        let all = Rule::default();
        routes.push(self.compile_route(self.service, &Match::default(), &all, None));
        RouteConfiguration {
            name: self.service.to_string(),
            virtual_hosts: vec![VirtualHost {
                name: self.service.to_string(),
                domains: vec!["*".to_owned()],
                routes,
                ..VirtualHost::default()
            }],
            ..RouteConfiguration::default()
        }
    }

    /// Returns the split for connections whose requests Envoy cannot inspect: that of the first rule.
    pub(crate) fn compile_shares(&mut self) -> Vec<Share> {
        let world = self.world;
        let whole = vec![Share { cluster: self.service.to_string(), weight: 1 }];
        let Some(route) = world.documents.routes.get(self.service) else { return whole };
        let Some(rule) = route.rules.first() else { return whole };
        if rule.matches != Match::default() || rule.redirect.is_some() || route.rules.len() > 1 {
            self.report(
                route,
                format!(
                    "`{}` speaks {}, so its connections cannot be told apart by path, header, query or method, nor \
                     redirected: only the first rule's split is in force; declare `protocol: http` if it speaks HTTP",
                    self.service, self.effective.protocol
                ),
            );
        }
        let shares = self.compile_split(self.service, &rule.split, route);
        if shares.is_empty() { whole } else { shares }
    }

    /// Compiles the rules of `service`, each combined with the condition `under`.
    fn compile_rules(&mut self, service: &ServiceName, under: &Match, depth: usize) -> Vec<EnvoyRoute> {
        let world = self.world;
        let Some(document) = world.documents.routes.get(service) else { return Vec::new() };
        let mut routes = Vec::new();
        for rule in &document.rules {
            let Some(matches) = intersect(under, &rule.matches) else { continue };
            if self.client == Client::Grpc && !matches.query.is_empty() {
                self.report(
                    document,
                    format!(
                        "a rule of `{service}` matches on query parameters, which proxyless gRPC clients do not \
                         have: for them the rule is left out"
                    ),
                );
                continue;
            }
            match &rule.redirect {
                Some(Redirect { service: Some(other), .. }) => {
                    if depth >= MAX_REDIRECTS {
                        continue;
                    }
                    if !self.note_mention(other) {
                        self.report(document, unknown_service(world, "a redirect goes to", other));
                    }
                    self.references.insert(other.clone());
                    routes.extend(self.compile_rules(other, &matches, depth + 1));
                    routes.push(self.compile_route(other, &matches, rule, None));
                }
                _ => routes.push(self.compile_route(service, &matches, rule, Some(document))),
            }
        }
        routes
    }

    fn compile_route(
        &mut self,
        service: &ServiceName,
        matches: &Match,
        rule: &Rule,
        document: Option<&Arc<PlacedDocument<RouteDocument>>>,
    ) -> EnvoyRoute {
        let action = match &rule.redirect {
            Some(redirect) if redirect.service.is_none() => Action::Redirect(redirect_action(redirect)),
            _ => self.forward_action(service, rule, document),
        };
        EnvoyRoute { r#match: Some(route_match(matches)), action: Some(action), ..EnvoyRoute::default() }
    }

    fn forward_action(
        &mut self,
        service: &ServiceName,
        rule: &Rule,
        document: Option<&Arc<PlacedDocument<RouteDocument>>>,
    ) -> Action {
        let specifier = match document {
            Some(document) if !rule.split.is_empty() => {
                let shares = self.compile_split(service, &rule.split, document);
                match shares.as_slice() {
                    [] => return unavailable_action(service),
                    [only] => ClusterSpecifier::Cluster(only.cluster.clone()),
                    several => ClusterSpecifier::WeightedClusters(WeightedCluster {
                        clusters: several
                            .iter()
                            .map(|share| ClusterWeight {
                                name: share.cluster.clone(),
                                weight: Some(uint32(share.weight)),
                                ..ClusterWeight::default()
                            })
                            .collect(),
                        ..WeightedCluster::default()
                    }),
                }
            }
            _ => ClusterSpecifier::Cluster(service.to_string()),
        };
        let effective = self.effective;
        let request = rule.timeout.map(|time| time.0).or(effective.request);
        let retry = rule.retry.as_ref().map_or_else(|| effective.retry.clone(), with_default_conditions);
        Action::Route(RouteAction {
            cluster_specifier: Some(specifier),
            // Zero is Envoy's encoding of "no limit"; an absent timeout means 15 s.
            timeout: Some(duration(request.unwrap_or(Duration::ZERO))),
            retry_policy: retry_policy(&retry, self.client),
            hash_policy: hash_policy(&effective.load_balancing),
            ..RouteAction::default()
        })
    }

    /// Returns the clusters of a split. The share of a target that does not exist goes to the remaining
    /// targets.
    fn compile_split(
        &mut self,
        service: &ServiceName,
        targets: &[Target],
        document: &Arc<PlacedDocument<RouteDocument>>,
    ) -> Vec<Share> {
        let world = self.world;
        let mut shares = Vec::new();
        for target in targets {
            let to = target.service.as_ref().unwrap_or(service);
            if !self.note_mention(to) {
                self.report(document, unknown_service(world, "a split has a share for", to));
                continue;
            }
            let defines = |subset: &ServiceName| {
                world.documents.services.get(to).is_some_and(|s| s.subsets.contains_key(subset))
            };
            if let Some(subset) = target.subset.as_ref().filter(|&subset| !defines(subset)) {
                self.report(
                    document,
                    format!(
                        "a split has a share for `{to}|{subset}`, a subset that no `Service` document defines"
                    ),
                );
                continue;
            }
            if to != self.service {
                self.references.insert(to.clone());
            }
            shares.push(Share { cluster: cluster_name(to, target.subset.as_ref()), weight: target.weight });
        }
        // Envoy rejects a split whose weights sum to zero.
        if shares.iter().all(|share| share.weight == 0) { Vec::new() } else { shares }
    }

    fn note_mention(&mut self, service: &ServiceName) -> bool {
        let known = self.world.is_known(service);
        self.mentioned_services.insert(service.clone(), known);
        known
    }

    fn report(&mut self, document: &Arc<PlacedDocument<RouteDocument>>, message: String) {
        let subject = format!("Route `{}`", document.service);
        self.problems.push(Problem::new(document.place.clone(), subject, message));
    }
}

fn unknown_service(world: &World, what: &str, service: &ServiceName) -> String {
    let near = did_you_mean(service.as_str(), world.service_names().map(ServiceName::as_str));
    let hint = near.map_or_else(
        || "register it, or take it out of the route".to_owned(),
        |near| format!("did you mean `{near}`?"),
    );
    format!("{what} `{service}`, which no discovery source and no document knows: {hint}")
}

/// Returns a 503 response for a rule none of whose targets exists. The request must not fall through to
/// another rule.
fn unavailable_action(service: &ServiceName) -> Action {
    let body = format!("vmesh: no target of this route of `{service}` exists\n");
    Action::DirectResponse(DirectResponseAction {
        status: 503,
        body: Some(DataSource {
            specifier: Some(data_source::Specifier::InlineString(body)),
            ..DataSource::default()
        }),
        ..DirectResponseAction::default()
    })
}

fn redirect_action(redirect: &Redirect) -> RedirectAction {
    let code = match redirect.code {
        Some(302) => RedirectResponseCode::Found,
        Some(303) => RedirectResponseCode::SeeOther,
        Some(307) => RedirectResponseCode::TemporaryRedirect,
        Some(308) => RedirectResponseCode::PermanentRedirect,
        _ => RedirectResponseCode::MovedPermanently,
    };
    let path = match (&redirect.path, &redirect.prefix) {
        (Some(path), _) => Some(PathRewriteSpecifier::PathRedirect(path.to_string())),
        (None, Some(prefix)) => Some(PathRewriteSpecifier::PrefixRewrite(prefix.to_string())),
        (None, None) => None,
    };
    RedirectAction {
        host_redirect: redirect.host.as_deref().unwrap_or_default().to_owned(),
        port_redirect: redirect.port.unwrap_or_default().into(),
        response_code: code.into(),
        scheme_rewrite_specifier: redirect.scheme.map(|scheme| match scheme {
            Scheme::Http => SchemeRewriteSpecifier::SchemeRedirect("http".to_owned()),
            Scheme::Https => SchemeRewriteSpecifier::SchemeRedirect("https".to_owned()),
        }),
        path_rewrite_specifier: path,
        ..RedirectAction::default()
    }
}

fn retry_policy(retry: &Retry, client: Client) -> Option<RetryPolicy> {
    let on: Vec<_> = retry
        .on
        .iter()
        .filter(|on| client == Client::Envoy || on.is_grpc_status())
        .map(|on| on.as_str())
        .collect();
    if retry.attempts == 0 || on.is_empty() {
        return None;
    }
    let elsewhere = RetryHostPredicate {
        name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
        config_type: Some(retry_host_predicate::ConfigType::TypedConfig(any(&PreviousHostsPredicate {}))),
    };
    let envoy = client == Client::Envoy;
    Some(RetryPolicy {
        retry_on: on.join(","),
        num_retries: Some(uint32(retry.attempts)),
        per_try_timeout: retry.per_try_timeout.filter(|_| envoy).map(|time| duration(time.0)),
        // The endpoint that just failed a request is the worst choice for its retry.
        retry_host_predicate: if envoy { vec![elsewhere] } else { Vec::new() },
        host_selection_retry_max_attempts: if envoy { 3 } else { 0 },
        ..RetryPolicy::default()
    })
}

fn hash_policy(balancing: &LoadBalancing) -> Vec<HashPolicy> {
    if !matches!(balancing.policy, Policy::RingHash | Policy::Maglev) {
        return Vec::new();
    }
    let Some(on) = &balancing.hash_on else { return Vec::new() };
    let specifier = match on {
        HashOn::Header(name) => {
            PolicySpecifier::Header(Header { header_name: name.to_string(), ..Header::default() })
        }
        HashOn::Cookie(name) => {
            PolicySpecifier::Cookie(Cookie { name: name.to_string(), ..Cookie::default() })
        }
        HashOn::Query(name) => PolicySpecifier::QueryParameter(QueryParameter { name: name.to_string() }),
        HashOn::SourceIp => PolicySpecifier::ConnectionProperties(ConnectionProperties { source_ip: true }),
    };
    vec![HashPolicy { policy_specifier: Some(specifier), ..HashPolicy::default() }]
}

/// Returns the condition that requires both `one` and `other`, or `None` if no request can match both.
fn intersect(one: &Match, other: &Match) -> Option<Match> {
    use PathMatch::{Exact, Prefix};
    let path = match (&one.path, &other.path) {
        (None, path) | (path, None) => path.clone(),
        (Some(a), Some(b)) if a == b => Some(a.clone()),
        (Some(Prefix(a)), Some(Prefix(b))) if b.starts_with(&**a) => Some(Prefix(b.clone())),
        (Some(Prefix(a)), Some(Prefix(b))) if a.starts_with(&**b) => Some(Prefix(a.clone())),
        (Some(Exact(a)), Some(Prefix(b))) | (Some(Prefix(b)), Some(Exact(a))) if a.starts_with(&**b) => {
            Some(Exact(a.clone()))
        }
        // Envoy cannot match a regular expression and another path condition in the same route.
        _ => return None,
    };
    let merge = |a: &BTreeMap<Arc<str>, TextMatch>, b: &BTreeMap<Arc<str>, TextMatch>| {
        let clash = b.iter().any(|(key, value)| a.get(key).is_some_and(|other| other != value));
        (!clash).then(|| a.iter().chain(b).map(|(k, v)| (k.clone(), v.clone())).collect())
    };
    let method = match (one.method.as_slice(), other.method.as_slice()) {
        ([], methods) | (methods, []) => methods.to_vec(),
        (a, b) => {
            let common: Vec<_> = a.iter().filter(|method| b.contains(method)).cloned().collect();
            if common.is_empty() {
                return None;
            }
            common
        }
    };
    Some(Match {
        path,
        headers: merge(&one.headers, &other.headers)?,
        query: merge(&one.query, &other.query)?,
        method,
    })
}

fn route_match(matches: &Match) -> RouteMatch {
    let path = match &matches.path {
        None => PathSpecifier::Prefix("/".to_owned()),
        Some(PathMatch::Prefix(prefix)) => PathSpecifier::Prefix(prefix.to_string()),
        Some(PathMatch::Exact(path)) => PathSpecifier::Path(path.to_string()),
        Some(PathMatch::Regex(regex)) => PathSpecifier::SafeRegex(self::regex(regex)),
    };
    let methods: Vec<_> = matches.method.iter().map(|method| &*method.0).collect();
    let method = match methods.as_slice() {
        [] => None,
        [one] => Some(TextMatch::Exact((*one).into())),
        several => Some(TextMatch::Regex(several.join("|").into())),
    };
    let method = method.iter().map(|method| header_matcher(":method", method));
    RouteMatch {
        path_specifier: Some(path),
        headers: matches
            .headers
            .iter()
            .map(|(name, text)| header_matcher(name, text))
            .chain(method)
            .collect(),
        query_parameters: matches.query.iter().map(|(name, text)| query_matcher(name, text)).collect(),
        ..RouteMatch::default()
    }
}

pub(crate) fn header_matcher(name: &str, text: &TextMatch) -> HeaderMatcher {
    let specifier = match text {
        TextMatch::Present(present) => HeaderMatchSpecifier::PresentMatch(*present),
        text => HeaderMatchSpecifier::StringMatch(string_matcher(text)),
    };
    HeaderMatcher {
        name: name.to_ascii_lowercase(),
        header_match_specifier: Some(specifier),
        ..HeaderMatcher::default()
    }
}

fn query_matcher(name: &str, text: &TextMatch) -> QueryParameterMatcher {
    let specifier = match text {
        TextMatch::Present(present) => QueryParameterMatchSpecifier::PresentMatch(*present),
        text => QueryParameterMatchSpecifier::StringMatch(string_matcher(text)),
    };
    QueryParameterMatcher { name: name.to_owned(), query_parameter_match_specifier: Some(specifier) }
}

fn string_matcher(text: &TextMatch) -> StringMatcher {
    let pattern = match text {
        TextMatch::Exact(text) => MatchPattern::Exact(text.to_string()),
        TextMatch::Prefix(text) => MatchPattern::Prefix(text.to_string()),
        TextMatch::Suffix(text) => MatchPattern::Suffix(text.to_string()),
        TextMatch::Contains(text) => MatchPattern::Contains(text.to_string()),
        TextMatch::Regex(text) => MatchPattern::SafeRegex(regex(text)),
        TextMatch::Present(_) => MatchPattern::Prefix(String::new()),
    };
    StringMatcher { match_pattern: Some(pattern), ..StringMatcher::default() }
}

fn regex(text: &str) -> RegexMatcher {
    RegexMatcher { regex: text.to_owned(), ..RegexMatcher::default() }
}
