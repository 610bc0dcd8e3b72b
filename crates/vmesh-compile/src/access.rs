//! The policies of `Access` documents as Envoy's RBAC filters.
//!
//! Each filter chain of a workload has one RBAC filter whose configuration comes by ECDS under the name
//! [`filter_name`]. An edit of a document replaces that configuration only: it touches no listener and closes no
//! connection.
//!
//! A policy becomes one expression: no `deny` rule matches, the path has one spelling only, and, if the default is
//! `deny`, an `allow` rule matches. Envoy's RBAC has permissions (about requests) and principals (about callers),
//! and joins one of each by *and*. Principals can express everything that a rule can say, so the whole expression is
//! one principal. Ports are decided here, because a workload's ports are known.

pub(crate) mod jwt;

use std::collections::{BTreeMap, BTreeSet};

use vmesh_catalog::World;
use vmesh_model::document::{
    AccessAction, AccessCallers, AccessDocument, AccessMode, AccessPath, AccessPolicy, AccessRequests,
    AccessRule, MtlsMode, TextMatch,
};
use vmesh_model::{Cidr, NodeName, Problem, ServiceName};
use vmesh_proto::envoy::config::core::v3::{CidrRange, TypedExtensionConfig};
use vmesh_proto::envoy::config::rbac::v3::principal::{Identifier, Set};
use vmesh_proto::envoy::config::rbac::v3::rbac::Action;
use vmesh_proto::envoy::config::rbac::v3::{Permission, Policy, Principal, Rbac, permission};
use vmesh_proto::envoy::extensions::filters::http::rbac::v3::Rbac as HttpRbac;
use vmesh_proto::envoy::extensions::filters::network::rbac::v3::Rbac as NetworkRbac;
use vmesh_proto::envoy::extensions::rbac::principals::mtls_authenticated::v3::Config as MtlsAuthenticated;
use vmesh_proto::envoy::extensions::transport_sockets::tls::v3::SubjectAltNameMatcher;
use vmesh_proto::envoy::extensions::transport_sockets::tls::v3::subject_alt_name_matcher::SanType;
use vmesh_proto::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use vmesh_proto::envoy::r#type::matcher::v3::{PathMatcher, RegexMatcher, StringMatcher, path_matcher};
use vmesh_proto::{any, uint32};

use crate::peers::Peers;
use crate::route::header_matcher;
use crate::tls::{exact, service_id};

/// The most nodes that one rule names by their labels: each costs Envoy about 200 bytes, and a comparison per request.
const MAX_NODES_PER_RULE: usize = 4_000;

/// The characters of paths that every server reads alike: no parameters (`;`), backslashes and control characters, and no
/// percent-encoding of a character that needs none or that separates segments. RE2, for the whole path. The expression lists
/// what is allowed: `.` matches no invalid UTF-8, so an expression of what is not allowed could be evaded. Envoy limits the size of
/// an expression, so dot segments are apart.
const PLAIN_CHARACTERS: &str = concat!(
    r"/(?:[!-$&-:<-\[\]-~]|%(?:2[0-46-9A-Ca-c]|3[AaC-Fc-f]|40|5[BbDdEe]|60|7[B-Db-d]",
    r"|[89ABDEabde][0-9A-Fa-f]|[Cc][2-9A-Fa-f]|[Ff][0-4]))*"
);

/// The protocol of a filter chain, which decides the kind of its RBAC filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum FilterLevel {
    Http,
    Tcp,
}

impl FilterLevel {
    /// Returns the type URL of the filter's configuration.
    pub(crate) fn type_url(self) -> String {
        match self {
            FilterLevel::Http => any(&HttpRbac::default()).type_url,
            FilterLevel::Tcp => any(&NetworkRbac::default()).type_url,
        }
    }
}

/// Returns the name of the filter configuration of `service`.
pub(crate) fn filter_name(service: &ServiceName, level: FilterLevel) -> String {
    match level {
        FilterLevel::Http => format!("access|{service}"),
        FilterLevel::Tcp => format!("access|{service}|tcp"),
    }
}

/// The inputs of the policy of one service on one node.
pub(crate) struct AccessInput<'a> {
    pub(crate) world: &'a World,
    pub(crate) peers: &'a Peers,
    pub(crate) service: &'a ServiceName,
    /// The ports of the node's workloads of this service.
    pub(crate) ports: &'a [u16],
    pub(crate) level: FilterLevel,
}

/// Returns the filter configuration of a service's policy. Without `Access` documents the filter lets everything through.
pub(crate) fn filter_config(input: &AccessInput<'_>) -> TypedExtensionConfig {
    let documents = &input.world.documents;
    let rules = |mode| {
        let policy = documents.access_policy(input.service, mode);
        policy.and_then(|policy| input.rules(&policy))
    };
    let (enforced, audited) = (rules(AccessMode::Enforce), rules(AccessMode::Audit));
    let config = match input.level {
        FilterLevel::Http => any(&HttpRbac { rules: enforced, shadow_rules: audited, ..HttpRbac::default() }),
        FilterLevel::Tcp => any(&NetworkRbac {
            rules: enforced,
            shadow_rules: audited,
            stat_prefix: format!("inbound_{}.", input.service),
            ..NetworkRbac::default()
        }),
    };
    TypedExtensionConfig { name: filter_name(input.service, input.level), typed_config: Some(config) }
}

/// Returns the problems in the `Access` documents of `service`.
pub(crate) fn find_problems(world: &World, service: &ServiceName) -> Vec<Problem> {
    let documents = &world.documents;
    let mut problems = Vec::new();
    let mode = documents.settings(service, &[]).mtls_mode();
    let protocol = world.protocol(service);
    for document in documents.access_of(service) {
        let mut report = |message: String| {
            problems.push(Problem::new(document.place.clone(), format!("Access `{service}`"), message));
        };
        let denied = document.rules.iter().filter(|rule| rule.action == AccessAction::Deny);
        let by_certificate = |rule: &AccessRule| rule.from.services.is_some() || !rule.from.nodes.is_empty();
        if mode != MtlsMode::Strict && denied.clone().any(by_certificate) {
            report(format!(
                "a `deny` rule by `services` or `nodes` does not stop callers that use plaintext, which `{service}` accepts: set \
                 `mtls: {{mode: strict}}`, or allow the others instead"
            ));
        }
        let needs_http = |rule: &AccessRule| rule.to.needs_http() || rule.from.jwt.is_some();
        if !protocol.is_http() && document.rules.iter().any(needs_http) {
            report(format!(
                "`{service}` speaks {}, which has no paths, methods, headers or tokens: an `allow` rule with one of them never \
                 matches, and a `deny` rule matches whatever that part says",
                protocol.as_str()
            ));
        }
        let issuers: BTreeSet<_> =
            document.rules.iter().filter_map(|rule| rule.from.jwt.as_ref()).map(|jwt| &jwt.issuer).collect();
        for issuer in issuers {
            let provider = documents.jwt_provider(document, issuer);
            let missing = match provider.map(|provider| (documents.key_set(provider), &provider.jwks_file)) {
                Some((Some(_), _)) => continue,
                Some((None, Some(file))) => {
                    format!("the key set `{file}` of issuer `{issuer}` is not among the documents")
                }
                _ => format!("no `jwt_providers` entry has the issuer `{issuer}`"),
            };
            report(format!(
                "{missing}: an `allow` rule with it never matches, and a `deny` rule matches whatever the token"
            ));
        }
    }
    problems
}

impl AccessInput<'_> {
    /// Returns the rules of `policy`, or `None` if it allows every request.
    fn rules(&self, policy: &AccessPolicy<'_>) -> Option<Rbac> {
        if policy.allows_everything() {
            return None;
        }
        let of = |action: AccessAction| {
            let rules = policy.rules.iter().filter(move |(_, rule)| rule.action == action);
            rules.filter_map(move |(document, rule)| self.rule(document, rule))
        };
        let denied: Vec<Principal> = of(AccessAction::Deny).collect();
        let mut conditions = Vec::new();
        if !denied.is_empty() {
            conditions.push(not(any_of(denied)));
        }
        if self.level == FilterLevel::Http && policy.rules.iter().any(|(_, rule)| rule.to.paths.is_some()) {
            conditions.push(unambiguous_path());
        }
        if policy.default == AccessAction::Deny {
            let allowed: Vec<Principal> = of(AccessAction::Allow).collect();
            if allowed.is_empty() {
                return Some(Rbac { action: Action::Allow.into(), ..Rbac::default() });
            }
            conditions.push(any_of(allowed));
        }
        if conditions.is_empty() {
            return None;
        }
        let policy = Policy {
            permissions: vec![Permission { rule: Some(permission::Rule::Any(true)) }],
            principals: vec![all_of(conditions)],
            ..Policy::default()
        };
        let policies = BTreeMap::from([("allowed".to_owned(), policy)]);
        Some(Rbac { action: Action::Allow.into(), policies, ..Rbac::default() })
    }

    /// Returns the requests that `rule` matches, or `None` if it can match none here. Where a part of a rule cannot be
    /// decided here, an `allow` rule does not match and a `deny` rule does.
    fn rule(&self, document: &AccessDocument, rule: &AccessRule) -> Option<Principal> {
        let is_deny = rule.action == AccessAction::Deny;
        let mut parts = Vec::new();
        self.add_callers(document, &rule.from, is_deny, &mut parts)?;
        self.add_requests(&rule.to, is_deny, &mut parts)?;
        Some(all_of(parts))
    }

    fn add_callers(
        &self,
        document: &AccessDocument,
        from: &AccessCallers,
        is_deny: bool,
        parts: &mut Vec<Principal>,
    ) -> Option<()> {
        let trust_domain = &self.world.trust_domain;
        let undecided = is_deny.then_some(());
        if let Some(services) = &from.services {
            let ids = services
                .iter()
                .map(|service| certificate_name(SanType::Uri, service_id(trust_domain, service)));
            parts.push(any_of(ids.collect()));
        }
        if !from.nodes.is_empty() {
            let nodes: Vec<_> = self.peers.labelled(&from.nodes).take(MAX_NODES_PER_RULE + 1).collect();
            match nodes.len() {
                0 => return None,
                1..=MAX_NODES_PER_RULE => {
                    let names = nodes
                        .into_iter()
                        .map(|node| certificate_name(SanType::Dns, node_name(trust_domain, node)));
                    parts.push(any_of(names.collect()));
                }
                _ => undecided?,
            }
        }
        if let Some(networks) = &from.cidrs {
            let networks = networks.iter().map(|cidr| principal(Identifier::DirectRemoteIp(range(cidr))));
            parts.push(any_of(networks.collect()));
        }
        if let Some(condition) = &from.jwt {
            let documents = &self.world.documents;
            let provider = documents.jwt_provider(document, &condition.issuer);
            let provider = provider.filter(|provider| documents.key_set(provider).is_some());
            match provider.filter(|_| self.level == FilterLevel::Http) {
                Some(_) => parts.push(jwt::token_principal(condition)),
                None => undecided?,
            }
        }
        Some(())
    }

    fn add_requests(&self, to: &AccessRequests, is_deny: bool, parts: &mut Vec<Principal>) -> Option<()> {
        if let Some(ports) = &to.ports {
            let is_named = |port: &u16| ports.contains(port);
            let applies = match is_deny {
                true => self.ports.iter().any(is_named),
                false => !self.ports.is_empty() && self.ports.iter().all(is_named),
            };
            applies.then_some(())?;
        }
        if self.level == FilterLevel::Tcp && to.needs_http() {
            return is_deny.then_some(());
        }
        if let Some(paths) = &to.paths {
            parts.push(any_of(paths.iter().flat_map(|path| path_principals(path, is_deny)).collect()));
        }
        if let Some(methods) = &to.methods {
            let methods = methods.iter().map(|method| TextMatch::Exact(method.0.clone()));
            parts.push(any_of(methods.map(|method| header(":method", &method)).collect()));
        }
        parts.extend(to.headers.iter().map(|(name, text)| header(name, text)));
        Some(())
    }
}

/// Returns the name of a node in the certificates of its workloads.
fn node_name(trust_domain: &str, node: &NodeName) -> String {
    format!("{node}.node.{trust_domain}").to_ascii_lowercase()
}

/// Returns the paths that `path` matches. A `deny` rule ignores case, because some servers do.
fn path_principals(path: &AccessPath, is_deny: bool) -> Vec<Principal> {
    match path {
        AccessPath::Exact(path) => vec![path_text(MatchPattern::Exact(path.to_string()), is_deny)],
        AccessPath::Prefix(path) if path.ends_with('/') => {
            vec![path_text(MatchPattern::Prefix(path.to_string()), is_deny)]
        }
        AccessPath::Prefix(path) => vec![
            path_text(MatchPattern::Exact(path.to_string()), is_deny),
            path_text(MatchPattern::Prefix(format!("{path}/")), is_deny),
        ],
    }
}

/// Matches paths that every server reads alike.
fn unambiguous_path() -> Principal {
    let characters = RegexMatcher { regex: PLAIN_CHARACTERS.to_owned(), ..RegexMatcher::default() };
    let inside = ["//", "/./", "/../"].map(|text| MatchPattern::Contains(text.to_owned()));
    let last = ["/.", "/.."].map(|text| MatchPattern::Suffix(text.to_owned()));
    let segments = inside.into_iter().chain(last).map(|pattern| path_text(pattern, false));
    all_of(vec![path_text(MatchPattern::SafeRegex(characters), false), not(any_of(segments.collect()))])
}

fn path_text(pattern: MatchPattern, ignore_case: bool) -> Principal {
    let text = StringMatcher { match_pattern: Some(pattern), ignore_case };
    principal(Identifier::UrlPath(PathMatcher { rule: Some(path_matcher::Rule::Path(text)) }))
}

fn header(name: &str, text: &TextMatch) -> Principal {
    principal(Identifier::Header(header_matcher(name, text)))
}

/// Matches callers whose certificate was verified and has this name.
fn certificate_name(san_type: SanType, name: String) -> Principal {
    let san_matcher = Some(SubjectAltNameMatcher {
        san_type: san_type.into(),
        matcher: Some(exact(name)),
        ..SubjectAltNameMatcher::default()
    });
    let config = MtlsAuthenticated { san_matcher, ..MtlsAuthenticated::default() };
    principal(Identifier::Custom(TypedExtensionConfig {
        name: "envoy.rbac.principals.mtls_authenticated".to_owned(),
        typed_config: Some(any(&config)),
    }))
}

fn range(cidr: &Cidr) -> CidrRange {
    CidrRange { address_prefix: cidr.address().to_string(), prefix_len: Some(uint32(cidr.length().into())) }
}

pub(crate) fn principal(identifier: Identifier) -> Principal {
    Principal { identifier: Some(identifier) }
}

/// Matches if all of `parts` do. Envoy rejects a set without members.
pub(crate) fn all_of(mut parts: Vec<Principal>) -> Principal {
    match parts.len() {
        0 => principal(Identifier::Any(true)),
        1 => parts.remove(0),
        _ => principal(Identifier::AndIds(Set { ids: parts })),
    }
}

/// Matches if one of `parts` does. Envoy rejects a set without members.
pub(crate) fn any_of(mut parts: Vec<Principal>) -> Principal {
    match parts.len() {
        0 => not(principal(Identifier::Any(true))),
        1 => parts.remove(0),
        _ => principal(Identifier::OrIds(Set { ids: parts })),
    }
}

fn not(part: Principal) -> Principal {
    principal(Identifier::NotId(Box::new(part)))
}
