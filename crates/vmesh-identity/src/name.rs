//! Trust domains and SPIFFE ids (<https://spiffe.io/docs/latest/spiffe-specs/spiffe-id/>).

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use vmesh_model::{NodeName, ServiceName};

/// The longest trust domain, and the longest id, in bytes (SPIFFE ID, section 2).
const MAX_TRUST_DOMAIN: usize = 255;
const MAX_ID: usize = 2048;

/// A text that is no trust domain or no SPIFFE id of a mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidId {
    #[error("a trust domain has 1 to {MAX_TRUST_DOMAIN} characters of a-z, 0-9, `.`, `-` and `_`")]
    TrustDomain,
    #[error(
        "a SPIFFE id of a mesh is `spiffe://TRUST_DOMAIN/` and `node/NAME`, `service/NAME`, `control-plane/NAME` or `operator/ROLE/NAME`"
    )]
    Id,
}

/// The name of a mesh as the issuer of identities: all its SPIFFE ids begin with it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl Default for TrustDomain {
    fn default() -> TrustDomain {
        TrustDomain(Arc::from("mesh.internal"))
    }
}

impl TrustDomain {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns `spiffe://TRUST_DOMAIN`, the id of a certificate authority.
    pub fn uri(&self) -> String {
        format!("spiffe://{}", self.0)
    }

    /// Returns the id of `identity` in this trust domain.
    pub fn id(&self, identity: Identity) -> SpiffeId {
        SpiffeId { trust_domain: self.clone(), identity }
    }
}

impl FromStr for TrustDomain {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b);
        let fits = (1..=MAX_TRUST_DOMAIN).contains(&text.len());
        if fits && text.bytes().all(allowed) {
            Ok(TrustDomain(text.into()))
        } else {
            Err(InvalidId::TrustDomain)
        }
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for TrustDomain {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for TrustDomain {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// The part of a SPIFFE id that names its holder within a trust domain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Identity {
    /// `/node/NAME`: the agent of a node, towards control planes.
    Node(NodeName),
    /// `/service/NAME`: a workload, towards other workloads.
    Service(ServiceName),
    /// `/control-plane/NAME`: a replica of the control plane, towards agents and operators.
    ControlPlane(NodeName),
    /// `/operator/ROLE/NAME`: a person or a program that calls the control plane's API.
    Operator(Role, NodeName),
}

/// The rights of an operator; each role includes the ones before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads everything but secrets.
    Viewer,
    /// Accepts, evicts, freezes, drains and forgets.
    Operator,
    /// Creates tokens, rotates the authority, bans nodes.
    Admin,
}

impl Role {
    pub const ALL: [Role; 3] = [Role::Viewer, Role::Operator, Role::Admin];

    pub fn as_str(self) -> &'static str {
        match self {
            Role::Viewer => "viewer",
            Role::Operator => "operator",
            Role::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A SPIFFE id of a mesh: `spiffe://mesh.example/service/orders`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    pub trust_domain: TrustDomain,
    pub identity: Identity,
}

impl FromStr for SpiffeId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        if text.len() > MAX_ID {
            return Err(InvalidId::Id);
        }
        let path = text.strip_prefix("spiffe://").ok_or(InvalidId::Id)?;
        let (trust_domain, path) = path.split_once('/').ok_or(InvalidId::Id)?;
        let (kind, name) = path.split_once('/').ok_or(InvalidId::Id)?;
        let identity = match kind {
            "node" => name.parse().map(Identity::Node),
            "service" => name.parse().map(Identity::Service),
            "control-plane" => name.parse().map(Identity::ControlPlane),
            "operator" => {
                let (role, name) = name.split_once('/').ok_or(InvalidId::Id)?;
                let role = Role::ALL.into_iter().find(|known| known.as_str() == role).ok_or(InvalidId::Id)?;
                name.parse().map(|name| Identity::Operator(role, name))
            }
            _ => return Err(InvalidId::Id),
        };
        Ok(SpiffeId { trust_domain: trust_domain.parse()?, identity: identity.map_err(|_| InvalidId::Id)? })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/", self.trust_domain)?;
        match &self.identity {
            Identity::Node(name) => write!(f, "node/{name}"),
            Identity::Service(name) => write!(f, "service/{name}"),
            Identity::ControlPlane(name) => write!(f, "control-plane/{name}"),
            Identity::Operator(role, name) => write!(f, "operator/{role}/{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_read_as_it_is_written() {
        for text in [
            "spiffe://mesh.example/node/web-17",
            "spiffe://a_b-c.9/service/payments.v2_x",
            "spiffe://mesh/control-plane/mesh1",
            "spiffe://mesh/operator/admin/alice",
        ] {
            assert_eq!(text.parse::<SpiffeId>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn only_ids_of_nodes_and_services_are_ids_of_a_mesh() {
        let long = format!("spiffe://mesh/service/{}", "a".repeat(254));
        for text in [
            "",
            "spiffe://",
            "spiffe://mesh",
            "spiffe://mesh/",
            "spiffe://mesh/node",
            "spiffe://mesh/node/",
            "spiffe://mesh/Node/web",
            "spiffe://mesh/ns/default/sa/web",
            "spiffe://mesh/node/web/x",
            "spiffe://mesh/node/..",
            "spiffe://mesh/operator/alice",
            "spiffe://mesh/operator/root/alice",
            "spiffe://mesh/node/a%2fb",
            "spiffe://mesh/node/web?x",
            "spiffe://mesh/node/web#x",
            "spiffe://Mesh/node/web",
            "spiffe://mesh:1/node/web",
            "spiffe://u@mesh/node/web",
            "SPIFFE://mesh/node/web",
            "https://mesh/node/web",
            " spiffe://mesh/node/web",
            "spiffe://mesh/node/web\n",
            "spiffe://mesh//node/web",
            &long,
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text:?} was accepted");
        }
    }
}
