//! The requests of an agent that joins the mesh and renews its certificates, at `listen.xds` (TLS, HTTP/2, JSON), and the part of the
//! operator's API that concerns identities.
//!
//! | path at `listen.xds` | client | request and answer |
//! |---|---|---|
//! | `POST /v1/identity/join` | no certificate | [`JoinRequest`], [`JoinAnswer`] |
//! | `POST /v1/identity/renew` | the certificate of a node | [`RenewRequest`], [`RenewAnswer`] |
//!
//! A refusal has status 403, a control plane without an authority answers 503, both with a [`Failure`](crate::Failure).
//!
//! | path of the API | answer |
//! |---|---|
//! | `GET /api/v1/identity` | [`IdentityStatus`] |
//! | `POST /api/v1/identity/init` | makes a root and an intermediate, or takes those of [`InitRequest`]; [`IdentityStatus`] |
//! | `GET /api/v1/identity/bundle` | [`BundleAnswer`] |
//! | `GET /api/v1/identity/rotation` | [`RotationStatus`] |
//! | `POST /api/v1/identity/rotation` | begins a rotation of the root, or takes the step of [`RotationRequest`]; [`RotationStatus`] |
//! | `GET /api/v1/tokens` | [`Tokens`] |
//! | `POST /api/v1/tokens` | creates a join token for [`TokenRequest`]; [`TokenAnswer`] |
//! | `DELETE /api/v1/tokens/ID` | revokes a token; [`ActionResult`](crate::ActionResult) |
//! | `POST /api/v1/nodes/N/ban`, `unban` | bans a node, or admits it again; [`ActionResult`](crate::ActionResult) |

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmesh_model::{Labels, NodeName, ServiceName};

pub const JOIN_PATH: &str = "/v1/identity/join";
pub const RENEW_PATH: &str = "/v1/identity/renew";

/// The request of a node that joins with a token.
#[derive(Clone, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The token, with its secret.
    pub token: String,
    pub node: NodeName,
    /// The services of the workloads that the node is configured to run.
    #[serde(default)]
    pub services: BTreeSet<ServiceName>,
    /// The certificate request (PKCS #10, PEM) of the node's key.
    pub request: String,
}

impl fmt::Debug for JoinRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinRequest")
            .field("node", &self.node)
            .field("services", &self.services)
            .finish_non_exhaustive()
    }
}

/// The answer to a [`JoinRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinAnswer {
    /// The chain of the node's certificate, in PEM.
    pub node_chain: String,
    /// The services whose certificates the node may ask for.
    pub granted: BTreeSet<ServiceName>,
    /// The roots that the mesh trusts, in PEM.
    pub bundle: String,
    pub trust_domain: String,
    /// The control plane's clock, in Unix seconds.
    pub now: u64,
}

/// The request of a node for certificates. A request without any certificate request asks for the trust bundle.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewRequest {
    /// The certificate request of the node's key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_request: Option<String>,
    /// The certificate request for each service.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub services: BTreeMap<ServiceName, String>,
    /// The version of the trust bundle that the node uses (`TrustBundle::version`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bundle: Option<String>,
    /// The roots that signed the node's certificates in use: the SHA-256 of each root's public key, in hexadecimal digits.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub roots: BTreeSet<String>,
    /// The end of the longest validity among these certificates, in Unix seconds.
    #[serde(default)]
    pub expires: u64,
}

/// The answer to a [`RenewRequest`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewAnswer {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_chain: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub services: BTreeMap<ServiceName, String>,
    pub granted: BTreeSet<ServiceName>,
    pub bundle: String,
    pub trust_domain: String,
    /// True if the node's certificates should be renewed now, whatever their age.
    #[serde(default)]
    pub renew_now: bool,
    /// The pause, in seconds, after which the node asks for the trust bundle again.
    #[serde(default)]
    pub ask_again_in: u64,
    /// The control plane's clock, in Unix seconds.
    pub now: u64,
}

/// The request to initialise the certificate authority.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct InitRequest {
    /// The chain of an intermediate that was made elsewhere, in PEM: the intermediate first, the root last. Its key is in `key_file`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chain: Option<String>,
    /// The file with the key of the intermediate, on the host of the control plane, readable by its user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_file: Option<String>,
}

/// The state of the certificate authority of one replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityStatus {
    pub trust_domain: String,
    /// `None`: there is no authority, and `listen.xds` serves nobody.
    pub authority: Option<AuthorityStatus>,
    /// The address of the mTLS port, if it is configured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
    #[serde(default)]
    pub counts: IdentityCounts,
    #[serde(default)]
    pub banned: BTreeSet<NodeName>,
}

/// The certificates of an authority. Times are in Unix seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityStatus {
    /// The SHA-256 of the root's public key, in hexadecimal digits.
    pub root_key: String,
    pub root_expires: u64,
    /// True if this replica has the root's key.
    pub has_root_key: bool,
    pub intermediate_expires: u64,
    /// The version of the trust bundle.
    pub bundle: String,
    pub roots: usize,
}

/// Security events since the start of the process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IdentityCounts {
    pub joined: u64,
    pub join_refused: u64,
    pub renewed: u64,
    pub renew_refused: u64,
    pub handshakes_failed: u64,
    pub admissions_denied: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BundleAnswer {
    /// The roots that the mesh trusts, in PEM.
    pub bundle: String,
    pub version: String,
}

/// The request for a join token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    pub node: NodeName,
    #[serde(default)]
    pub services: BTreeSet<ServiceName>,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    /// The network that the node must connect from, such as `10.0.0.0/8`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// The token's validity, in seconds.
    pub ttl: u64,
}

/// A new join token.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenAnswer {
    /// The token with its secret.
    pub token: String,
    pub id: String,
    /// The end of its validity, in Unix seconds.
    pub expires: u64,
}

impl fmt::Debug for TokenAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenAnswer").field("id", &self.id).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tokens {
    pub tokens: Vec<ListedToken>,
}

/// A join token without its secret. Times are in Unix seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedToken {
    pub id: String,
    pub node: NodeName,
    pub services: BTreeSet<ServiceName>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    pub expires: u64,
    /// The time of its use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redeemed: Option<u64>,
    /// The address that redeemed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redeemed_from: Option<Arc<str>>,
}

/// A step of a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RotationStep {
    /// Begins a rotation of the root, or takes the next step of a running one.
    Next,
    /// Steps back, or ends a rotation whose new root issued nothing.
    Back,
    /// Replaces the intermediate of this control plane under the same root, at once.
    Intermediate,
}

/// The request for a step of a rotation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RotationRequest {
    pub step: RotationStep,
    /// Nodes that no step waits for.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub exempt: BTreeSet<NodeName>,
    /// The chain of an intermediate of the new root that was made elsewhere, as in [`InitRequest`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chain: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_file: Option<String>,
}

/// The progress of a rotation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationStatus {
    /// `prepared`, `distributing`, `active`; `None`: no rotation is under way.
    pub stage: Option<String>,
    /// A sentence about the stage, and about what comes next.
    pub summary: String,
    /// The Unix time when the stage began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<u64>,
    /// The live nodes, and those that have the trust bundle and certificates of the new root.
    pub live: usize,
    pub with_bundle: usize,
    pub with_new_certificates: usize,
    /// The nodes that the next step waits for; at most 20 are listed.
    pub waiting_for: Vec<NodeName>,
}
