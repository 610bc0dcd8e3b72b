//! `kind: Access`: the callers that may call a service, and the requests that they may make.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::Deserialize;

use super::{Documents, Method, PlacedDocument, TextMatch};
use crate::text::one_or_many;
use crate::{Cidr, Labels, ServiceName};

/// `kind: Access`: rules for the callers of one service. A service may have several documents, whose rules apply
/// together. A matching `deny` rule of any of them takes precedence.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessDocument {
    /// The service whose callers the rules concern.
    pub service: ServiceName,
    /// Distinguishes several documents of one service.
    pub name: Option<ServiceName>,
    /// Decides whether a refusal is enforced, or only counted.
    #[serde(default)]
    pub mode: AccessMode,
    /// The action for requests that no rule matches. Default: see [`Documents::access_policy`].
    pub default: Option<AccessAction>,
    /// The rules. Their order does not matter.
    #[serde(default)]
    pub rules: Vec<AccessRule>,
    /// The issuers of the tokens that rules of this document refer to, in addition to those of the `Mesh` document.
    #[serde(default)]
    pub jwt_providers: Vec<JwtProvider>,
}

/// The defaults of a [`MeshDocument`](super::MeshDocument) for services.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeshAccess {
    /// The action for requests to services that have neither an `allow` rule nor a `default` of their own.
    pub default: Option<AccessAction>,
    /// Decides whether the default is enforced, or only counted.
    #[serde(default)]
    pub mode: AccessMode,
    /// The issuers of the tokens that `jwt` conditions of any document refer to.
    #[serde(default)]
    pub jwt_providers: Vec<JwtProvider>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessMode {
    /// Refused requests are counted, and go through.
    Audit,
    /// Refused requests fail.
    #[default]
    Enforce,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessAction {
    Allow,
    Deny,
}

impl AccessAction {
    pub fn as_str(self) -> &'static str {
        match self {
            AccessAction::Allow => "allow",
            AccessAction::Deny => "deny",
        }
    }
}

impl fmt::Display for AccessAction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One rule of an [`AccessDocument`]. It matches a request if both parts match.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessRule {
    /// The callers. Default: anyone.
    #[serde(default)]
    pub from: AccessCallers,
    /// The requests. Default: every request.
    #[serde(default)]
    pub to: AccessRequests,
    /// The action for matching requests.
    pub action: AccessAction,
}

/// A condition on callers. A caller must match every part that is set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessCallers {
    /// Every caller, also without a certificate. Excludes the other fields.
    #[serde(default)]
    pub anyone: bool,
    /// The services in the caller's certificate, one of which matches. Only mTLS connections have one.
    #[serde(default)]
    pub services: Option<Vec<ServiceName>>,
    /// Labels that the caller's node has according to its certificate. Only mTLS connections match.
    #[serde(default)]
    pub nodes: Labels,
    /// Networks, one of which contains the address from which the connection comes.
    #[serde(default)]
    pub cidrs: Option<Vec<Cidr>>,
    /// A valid token of the request. Only HTTP requests have one.
    pub jwt: Option<JwtCondition>,
}

/// A condition on the JSON web token of a request.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JwtCondition {
    /// The issuer of the token, one of the `jwt_providers`.
    pub issuer: Arc<str>,
    /// Claims of the token, each with its accepted values. Of a claim that is a list, one member must be accepted.
    #[serde(default)]
    pub claims: BTreeMap<Arc<str>, ClaimValues>,
}

/// The accepted values of a claim: a text, or a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct ClaimValues(#[serde(deserialize_with = "one_or_many")] pub Vec<Arc<str>>);

/// An issuer of JSON web tokens, and the keys with which it signs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JwtProvider {
    /// The `iss` of the tokens.
    pub issuer: Arc<str>,
    /// The accepted `aud` of the tokens; empty accepts tokens for every audience.
    #[serde(default)]
    pub audiences: Vec<Arc<str>>,
    /// The public keys of the issuer: a JSON Web Key Set, as text.
    pub jwks: Option<Arc<str>>,
    /// The name of a file with these keys, beside the documents: `login.jwks`. Either `jwks` or `jwks_file` is required.
    pub jwks_file: Option<Arc<str>>,
}

/// A condition on requests. A request must match every part that is set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessRequests {
    /// Paths without the query, one of which matches. Only HTTP requests have one.
    #[serde(default)]
    pub paths: Option<Vec<AccessPath>>,
    /// The accepted methods. Only HTTP requests have one.
    #[serde(default)]
    pub methods: Option<Vec<Method>>,
    /// The headers by name. All of them must match. Only HTTP requests have any.
    #[serde(default)]
    pub headers: BTreeMap<Arc<str>, TextMatch>,
    /// Ports of the called application, one of which matches.
    #[serde(default)]
    pub ports: Option<Vec<u16>>,
}

impl AccessRequests {
    /// Reports whether a part is set that only HTTP requests have.
    pub fn needs_http(&self) -> bool {
        self.paths.is_some() || self.methods.is_some() || !self.headers.is_empty()
    }
}

/// A condition on a path.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AccessPath {
    /// The exact path.
    Exact(Arc<str>),
    /// The path and all paths below it: `/x` matches `/x` and `/x/y`, but not `/xy`.
    Prefix(Arc<str>),
}

impl AccessPath {
    pub fn as_str(&self) -> &str {
        match self {
            AccessPath::Exact(path) | AccessPath::Prefix(path) => path,
        }
    }
}

/// The rules of all documents of a service that apply together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessPolicy<'a> {
    /// The action for requests that no rule matches.
    pub default: AccessAction,
    /// The rules, each with its document.
    pub rules: Vec<(&'a Arc<PlacedDocument<AccessDocument>>, &'a AccessRule)>,
}

impl AccessPolicy<'_> {
    /// Reports whether the policy allows every request.
    pub fn allows_everything(&self) -> bool {
        self.default == AccessAction::Allow
            && !self.rules.iter().any(|(_, rule)| rule.action == AccessAction::Deny)
    }
}

impl Documents {
    /// Returns the `Access` documents of `service`.
    pub fn access_of(&self, service: &ServiceName) -> &[Arc<PlacedDocument<AccessDocument>>] {
        self.access.get(service).map(Vec::as_slice).unwrap_or_default()
    }

    fn mesh_access(&self) -> Option<&MeshAccess> {
        self.mesh.as_ref().and_then(|mesh| mesh.access.as_ref())
    }

    /// Reports whether any document governs the callers of `service`.
    pub fn governs_access(&self, service: &ServiceName) -> bool {
        self.access.contains_key(service) || self.mesh_access().is_some_and(|access| access.default.is_some())
    }

    /// Returns the policy of `service` that is enforced (`Enforce`), or the one that would be if every document in
    /// audit mode were enforced (`Audit`). The latter is `None` if no document is in audit mode.
    ///
    /// The default action is, in this order: `deny` if a document says so, `allow` if a document says so, `deny` if there is an
    /// `allow` rule, the default of the `Mesh` document, `allow`.
    pub fn access_policy(&self, service: &ServiceName, mode: AccessMode) -> Option<AccessPolicy<'_>> {
        let mesh = self.mesh_access().filter(|access| access.default.is_some());
        let documents = self.access_of(service);
        if mode == AccessMode::Audit
            && !documents.iter().any(|document| document.mode == AccessMode::Audit)
            && mesh.is_none_or(|mesh| mesh.mode != AccessMode::Audit)
        {
            return None;
        }
        let applies = |of: AccessMode| mode == AccessMode::Audit || of == AccessMode::Enforce;
        let documents: Vec<_> = documents.iter().filter(|document| applies(document.mode)).collect();
        let rules: Vec<_> = documents
            .iter()
            .flat_map(|document| document.rules.iter().map(|rule| (*document, rule)))
            .collect();
        let has_allow_rule = || {
            let is_allow = |rule: &AccessRule| rule.action == AccessAction::Allow;
            rules.iter().any(|(_, rule)| is_allow(rule)).then_some(AccessAction::Deny)
        };
        let own = documents.iter().filter_map(|document| document.default).max();
        let of_mesh = || mesh.filter(|mesh| applies(mesh.mode)).and_then(|mesh| mesh.default);
        let default = own.or_else(has_allow_rule).or_else(of_mesh).unwrap_or(AccessAction::Allow);
        Some(AccessPolicy { default, rules })
    }

    /// Returns the provider of the tokens of `issuer` for the rules of `document`: its own, else that of the `Mesh` document.
    pub fn jwt_provider<'a>(&'a self, document: &'a AccessDocument, issuer: &str) -> Option<&'a JwtProvider> {
        let of_mesh = self.mesh_access().into_iter().flat_map(|access| &access.jwt_providers);
        document.jwt_providers.iter().chain(of_mesh).find(|provider| *provider.issuer == *issuer)
    }

    /// Returns the key set of `provider`, or `None` if its file is missing.
    pub fn key_set<'a>(&'a self, provider: &'a JwtProvider) -> Option<&'a Arc<str>> {
        let in_file = || self.key_sets.get(provider.jwks_file.as_ref()?);
        provider.jwks.as_ref().or_else(in_file)
    }
}
