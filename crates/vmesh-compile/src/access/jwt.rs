//! JSON web tokens in rules of access: the filter that verifies them, and the condition on their claims.

use std::collections::BTreeMap;
use std::sync::Arc;

use vmesh_catalog::World;
use vmesh_model::ServiceName;
use vmesh_model::document::{AccessMode, JwtCondition, JwtProvider};
use vmesh_proto::any;
use vmesh_proto::envoy::config::core::v3::data_source::Specifier;
use vmesh_proto::envoy::config::core::v3::{DataSource, TypedExtensionConfig};
use vmesh_proto::envoy::config::rbac::v3::principal::Identifier;
use vmesh_proto::envoy::config::rbac::v3::{MetadataSource, Principal, SourcedMetadata};
use vmesh_proto::envoy::config::route::v3::RouteMatch;
use vmesh_proto::envoy::config::route::v3::route_match::PathSpecifier;
use vmesh_proto::envoy::extensions::filters::http::jwt_authn::v3::jwt_provider::JwksSourceSpecifier;
use vmesh_proto::envoy::extensions::filters::http::jwt_authn::v3::jwt_requirement::RequiresType;
use vmesh_proto::envoy::extensions::filters::http::jwt_authn::v3::requirement_rule::RequirementType;
use vmesh_proto::envoy::extensions::filters::http::jwt_authn::v3::{
    JwtAuthentication, JwtProvider as EnvoyProvider, JwtRequirement, JwtRequirementOrList, RequirementRule,
};
use vmesh_proto::envoy::r#type::matcher::v3::metadata_matcher::{PathSegment, path_segment};
use vmesh_proto::envoy::r#type::matcher::v3::value_matcher::MatchPattern;
use vmesh_proto::envoy::r#type::matcher::v3::{ListMatcher, MetadataMatcher, ValueMatcher, list_matcher};
use vmesh_proto::google::protobuf::Empty;

use super::{all_of, any_of, principal};
use crate::tls::exact;

const FILTER: &str = "envoy.filters.http.jwt_authn";

/// Returns the name of the filter that verifies the tokens of requests to `service`.
pub(crate) fn filter_name(service: &ServiceName) -> String {
    format!("jwt|{service}")
}

/// Returns the type URL of the filter's configuration.
pub(crate) fn type_url() -> String {
    any(&JwtAuthentication::default()).type_url
}

/// Reports whether a rule for the callers of `service` needs a token.
pub(crate) fn is_used(world: &World, service: &ServiceName) -> bool {
    let documents = world.documents.access_of(service);
    documents.iter().flat_map(|document| &document.rules).any(|rule| rule.from.jwt.is_some())
}

/// Returns the filter that verifies the tokens of requests to `service`. A request without a token passes; a request with an
/// invalid token fails, unless every document with a condition on tokens is in audit mode.
pub(crate) fn filter_config(world: &World, service: &ServiceName) -> TypedExtensionConfig {
    let mut providers: BTreeMap<String, EnvoyProvider> = BTreeMap::new();
    let mut is_enforced = false;
    for document in world.documents.access_of(service) {
        for condition in document.rules.iter().filter_map(|rule| rule.from.jwt.as_ref()) {
            is_enforced |= document.mode == AccessMode::Enforce;
            let provider = world.documents.jwt_provider(document, &condition.issuer);
            let with_keys = provider.and_then(|one| Some((one, world.documents.key_set(one)?)));
            if let Some((provider, keys)) = with_keys {
                providers
                    .entry(provider.issuer.to_string())
                    .or_insert_with(|| envoy_provider(provider, keys));
            }
        }
    }
    let requirement = |requires_type| JwtRequirement { requires_type: Some(requires_type) };
    let optional = match is_enforced {
        true => RequiresType::AllowMissing(Empty {}),
        false => RequiresType::AllowMissingOrFailed(Empty {}),
    };
    let named = providers.keys().cloned().map(RequiresType::ProviderName);
    let requirements: Vec<_> = named.chain([optional]).map(requirement).collect();
    let rule = RequirementRule {
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
            ..RouteMatch::default()
        }),
        requirement_type: Some(RequirementType::Requires(requirement(RequiresType::RequiresAny(
            JwtRequirementOrList { requirements },
        )))),
    };
    let rules = if providers.is_empty() { Vec::new() } else { vec![rule] };
    let config = JwtAuthentication { providers, rules, ..JwtAuthentication::default() };
    TypedExtensionConfig { name: filter_name(service), typed_config: Some(any(&config)) }
}

fn envoy_provider(provider: &JwtProvider, keys: &str) -> EnvoyProvider {
    let keys =
        DataSource { specifier: Some(Specifier::InlineString(keys.to_owned())), ..DataSource::default() };
    EnvoyProvider {
        issuer: provider.issuer.to_string(),
        audiences: provider.audiences.iter().map(ToString::to_string).collect(),
        // The application may want the token too.
        forward: true,
        payload_in_metadata: provider.issuer.to_string(),
        jwks_source_specifier: Some(JwksSourceSpecifier::LocalJwks(keys)),
        ..EnvoyProvider::default()
    }
}

/// Returns the requests with a verified token that meets `condition`.
pub(crate) fn token_principal(condition: &JwtCondition) -> Principal {
    let mut parts = vec![claim(condition, "iss", &condition.issuer, false)];
    for (name, values) in &condition.claims {
        let of = |value: &Arc<str>| [false, true].map(|in_list| claim(condition, name, value, in_list));
        parts.push(any_of(values.0.iter().flat_map(of).collect()));
    }
    all_of(parts)
}

/// Matches tokens whose claim `name` is `value`, or is a list with that member.
fn claim(condition: &JwtCondition, name: &str, value: &str, in_list: bool) -> Principal {
    let text = ValueMatcher { match_pattern: Some(MatchPattern::StringMatch(exact(value.to_owned()))) };
    let value = match in_list {
        false => text,
        true => {
            let list = ListMatcher { match_pattern: Some(list_matcher::MatchPattern::OneOf(Box::new(text))) };
            ValueMatcher { match_pattern: Some(MatchPattern::ListMatch(Box::new(list))) }
        }
    };
    let segment = |key: &str| PathSegment { segment: Some(path_segment::Segment::Key(key.to_owned())) };
    let metadata_matcher = Some(MetadataMatcher {
        filter: FILTER.to_owned(),
        path: vec![segment(&condition.issuer), segment(name)],
        value: Some(value),
        ..MetadataMatcher::default()
    });
    principal(Identifier::SourcedMetadata(SourcedMetadata {
        metadata_matcher,
        metadata_source: MetadataSource::Dynamic.into(),
    }))
}
