//! The rights of a node, which its certificate carries: replicas that share nothing know from the certificate alone what a node may run.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use vmesh_model::{Labels, NodeName, ServiceName};

use crate::name::{SpiffeId, TrustDomain};

/// The object identifier of the certificate extension that holds a [`NodeGrant`] in JSON. Arc 2.25 needs no registration (ITU-T X.667).
pub(crate) const GRANT_OID: [u64; 3] = [2, 25, 6_817_203_557_918_245_193];
/// The most bytes of a grant in a certificate: 256 services with names of 120 bytes.
const MAX_BYTES: usize = 32 << 10;

/// The rights of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeGrant {
    /// The services that the node may run.
    pub services: BTreeSet<ServiceName>,
    /// Labels that the node has whatever it reports.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
}

/// An invalid grant in a certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the certificate's grant is not valid: {0}")]
pub struct BadGrant(String);

impl NodeGrant {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, BadGrant> {
        let bytes = serde_json::to_vec(self).map_err(|error| BadGrant(error.to_string()))?;
        match bytes.len() <= MAX_BYTES {
            true => Ok(bytes),
            false => Err(BadGrant(format!("it has more than {MAX_BYTES} bytes; grant fewer services"))),
        }
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<NodeGrant, BadGrant> {
        if bytes.len() > MAX_BYTES {
            return Err(BadGrant(format!("it has more than {MAX_BYTES} bytes")));
        }
        serde_json::from_slice(bytes).map_err(|error| BadGrant(error.to_string()))
    }
}

/// The names and rights that the authority writes into a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    pub id: SpiffeId,
    /// The node that holds a service's certificate. It becomes a DNS name: see [`node_dns_name`].
    pub node: Option<NodeName>,
    /// The rights of a node's own certificate.
    pub grant: Option<NodeGrant>,
}

impl From<SpiffeId> for Subject {
    fn from(id: SpiffeId) -> Subject {
        Subject { id, node: None, grant: None }
    }
}

/// Returns the DNS name by which the certificate of a service names the node that holds it: `web-17.node.mesh.example`. Access rules
/// for nodes compare it.
pub fn node_dns_name(node: &NodeName, trust_domain: &TrustDomain) -> String {
    format!("{}.node.{trust_domain}", node.as_str().to_ascii_lowercase())
}
