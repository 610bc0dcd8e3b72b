//! The identity of this node: its keys and certificates, how the node gets and renews them, and who uses them.
//!
//! ```text
//! join token -> join -> NodeCredentials -> watch -> TLS to control planes, SDS for Envoy, /status
//!                           ^    |
//!                   renewal +----+-> state_dir/identity/identity.json
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`store`] | keys, certificates and the trust bundle on disk |
//! | [`token`] | the join token and its file |
//! | [`client`] | TLS connections to control planes, and requests on them |
//! | [`task`] | the task that joins, and keeps the certificates valid |
//! | [`command`] | `vmesh-agent join` |
//! | [`secrets`] | the certificates as resources for Envoy (SDS), and which of them Envoy has taken |
//! | [`status`] | the part of `/status` and the metrics that is about identity |
//!
//! This node makes new keys for each renewal, and no key leaves the node. An expired certificate stays: only a newer one replaces it.

pub mod client;
pub mod command;
pub mod secrets;
pub mod status;
pub mod store;
pub mod task;
#[cfg(test)]
pub(crate) mod testing;
pub mod token;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use vmesh_identity::certificate::{BadCertificate, RejectedChain};
use vmesh_identity::tls::{self, ServerTrust, TlsError};
use vmesh_identity::{
    Certificate, CertificateChain, Identity, Key, SpiffeId, TrustBundle, TrustDomain, verify,
};
use vmesh_model::ServiceName;
use vmesh_model::node::Upstreams;

use crate::config::Config;

/// Publishes the credentials of this node to those who use them. `None`: this node has no identity yet.
pub type CredentialsReceiver = watch::Receiver<Option<Arc<NodeCredentials>>>;

/// The most services whose certificates a node asks for, which is the most that a control plane issues for one request.
pub const MAX_SERVICES: usize = 64;

/// A key, and the chain of its certificate.
#[derive(Debug)]
pub struct Credential {
    pub id: SpiffeId,
    pub key: Key,
    pub chain: CertificateChain,
    pub not_after: SystemTime,
}

/// The reason why a certificate that a control plane issued, or that was saved, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BadCredential {
    #[error("the certificate of {holder} cannot be read")]
    Unreadable {
        holder: SpiffeId,
        #[source]
        cause: BadCertificate,
    },
    #[error(
        "the certificate of {holder} does not prove its identity; compare the clocks of this host and of the control plane"
    )]
    Rejected {
        holder: SpiffeId,
        #[source]
        cause: RejectedChain,
    },
    #[error("the certificate of {holder} names `{named}`")]
    WrongId { holder: SpiffeId, named: SpiffeId },
    #[error("the certificate of {holder} is for another key")]
    WrongKey { holder: SpiffeId },
}

impl Credential {
    /// Makes a credential of `key` and the chain of its certificate in PEM. The certificate may have expired.
    pub fn new(holder: SpiffeId, key: Key, chain: &str) -> Result<Credential, BadCredential> {
        let unreadable = |cause| BadCredential::Unreadable { holder: holder.clone(), cause };
        let chain = CertificateChain::from_pem(chain).map_err(unreadable)?;
        let leaf = chain.leaf().map_err(unreadable)?;
        let named = leaf.id().map_err(unreadable)?;
        if named != holder {
            return Err(BadCredential::WrongId { holder, named });
        }
        if leaf.key_hash != key.public_hash() {
            return Err(BadCredential::WrongKey { holder });
        }
        Ok(Credential { id: holder, key, chain, not_after: leaf.not_after })
    }

    /// Makes a credential of a chain that a control plane has just issued, and verifies the chain.
    pub fn verified(
        holder: SpiffeId,
        key: Key,
        chain: &str,
        bundle: &TrustBundle,
        now: SystemTime,
    ) -> Result<Credential, BadCredential> {
        let credential = Credential::new(holder, key, chain)?;
        match verify(&credential.chain, bundle, now) {
            Ok(_) => Ok(credential),
            Err(cause) => Err(BadCredential::Rejected { holder: credential.id, cause }),
        }
    }

    pub fn is_expired(&self, now: SystemTime) -> bool {
        self.not_after <= now
    }
}

/// All keys and certificates of this node, and the roots that it trusts.
#[derive(Debug, Clone)]
pub struct NodeCredentials {
    pub trust_domain: TrustDomain,
    pub bundle: TrustBundle,
    /// The services whose certificates the node may ask for.
    pub granted: BTreeSet<ServiceName>,
    pub node: Arc<Credential>,
    pub services: BTreeMap<ServiceName, Arc<Credential>>,
    /// The time at which the certificates were issued, by this host's clock.
    pub issued: SystemTime,
}

impl NodeCredentials {
    /// Returns the validity of the certificates, as long as it was when they were issued.
    pub fn lifetime(&self) -> Duration {
        self.not_after().duration_since(self.issued).unwrap_or_default()
    }

    /// Returns the end of the shortest validity among the certificates.
    pub fn not_after(&self) -> SystemTime {
        let services = self.services.values().map(|credential| credential.not_after);
        services.fold(self.node.not_after, SystemTime::min)
    }

    /// Returns the end of the longest validity among the certificates.
    pub fn last_not_after(&self) -> SystemTime {
        let services = self.services.values().map(|credential| credential.not_after);
        services.fold(self.node.not_after, SystemTime::max)
    }

    /// Returns the roots that signed the certificates: the SHA-256 of each root's public key, in hexadecimal digits.
    pub fn root_keys(&self) -> BTreeSet<String> {
        let all = std::iter::once(&self.node).chain(self.services.values());
        let roots = all.filter_map(|credential| credential.chain.certificates().last());
        roots.filter_map(|root| Certificate::read(root).ok()).map(|root| root.key_hash_hex()).collect()
    }

    /// Returns the rest of the validity as a share of all of it: 1 when the certificates were issued, 0 when the first has expired.
    pub fn share_left(&self, now: SystemTime) -> f64 {
        status::share_left(self.not_after(), self.lifetime(), now)
    }

    /// Returns the TLS settings of connections to control planes.
    pub fn client_config(&self) -> Result<rustls::ClientConfig, TlsError> {
        let identity = Some((&self.node.chain, &self.node.key));
        tls::client_config(identity, ServerTrust::Bundle(self.bundle.clone()))
    }

    /// Returns the SPIFFE id of `identity` in the trust domain of this node.
    pub fn id(&self, identity: Identity) -> SpiffeId {
        self.trust_domain.id(identity)
    }
}

/// The services on whose behalf this node receives and makes connections, by its configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConfiguredServices {
    /// The services of the workloads, in the order of the file, each once.
    pub workloads: Vec<ServiceName>,
    /// The services that `upstreams[].as` names.
    pub callers: BTreeSet<ServiceName>,
}

impl ConfiguredServices {
    pub fn of(config: &Config) -> ConfiguredServices {
        let mut workloads: Vec<ServiceName> = Vec::new();
        for workload in &config.workloads {
            if !workloads.contains(&workload.service) {
                workloads.push(workload.service.clone());
            }
        }
        let callers = match &config.upstreams {
            Upstreams::All => BTreeSet::new(),
            Upstreams::Declared(declared) => {
                declared.iter().filter_map(|upstream| upstream.as_.clone()).collect()
            }
        };
        ConfiguredServices { workloads, callers }
    }

    /// Returns the service on whose behalf this node calls others, unless an upstream names another one. `None`: the node calls as itself.
    ///
    /// The service is the only workload; else the only granted service; else the first workload; else the first granted service by name.
    pub fn caller(&self, granted: &BTreeSet<ServiceName>) -> Option<ServiceName> {
        let workloads: Vec<_> = self.workloads.iter().filter(|service| granted.contains(*service)).collect();
        match (workloads.as_slice(), granted.len()) {
            ([only], _) if self.workloads.len() == 1 => Some((*only).clone()),
            (_, 1) => granted.first().cloned(),
            ([first, ..], _) => Some((*first).clone()),
            ([], _) => granted.first().cloned(),
        }
    }

    /// Returns the services whose certificates this node needs, of those that it is granted: at most [`MAX_SERVICES`].
    pub fn needed(&self, granted: &BTreeSet<ServiceName>) -> BTreeSet<ServiceName> {
        let caller = self.caller(granted);
        let wanted = caller.iter().chain(&self.workloads).chain(&self.callers);
        let mut needed = BTreeSet::new();
        for service in wanted.filter(|service| granted.contains(*service)) {
            if needed.len() < MAX_SERVICES {
                needed.insert(service.clone());
            }
        }
        needed
    }

    /// Returns the configured services that the node may not run or call as.
    pub fn not_granted(&self, granted: &BTreeSet<ServiceName>) -> BTreeSet<ServiceName> {
        let all = self.workloads.iter().chain(&self.callers);
        all.filter(|service| !granted.contains(*service)).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn services(names: &[&str]) -> Vec<ServiceName> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    fn caller(workloads: &[&str], granted: &[&str]) -> String {
        let configured =
            ConfiguredServices { workloads: services(workloads), ..ConfiguredServices::default() };
        let caller = configured.caller(&services(granted).into_iter().collect());
        caller.map_or_else(|| "the node".to_owned(), |service| service.to_string())
    }

    #[test]
    fn a_node_calls_as_its_only_workload_else_as_its_only_service_else_as_the_first() {
        assert_eq!(caller(&["web"], &["a", "web"]), "web");
        assert_eq!(caller(&["z", "web"], &["web"]), "web");
        assert_eq!(caller(&[], &["batch"]), "batch");
        assert_eq!(caller(&["z", "web"], &["a", "web", "z"]), "z");
        assert_eq!(caller(&["z", "web"], &["a", "b"]), "a");
        assert_eq!(caller(&["web"], &[]), "the node");
    }

    #[test]
    fn a_node_asks_for_the_certificates_that_it_uses_and_is_granted() {
        let configured = ConfiguredServices {
            workloads: services(&["orders", "web"]),
            callers: services(&["batch", "other"]).into_iter().collect(),
        };
        let granted = services(&["batch", "orders", "unused"]).into_iter().collect();
        assert_eq!(configured.needed(&granted), services(&["batch", "orders"]).into_iter().collect());
        assert_eq!(configured.not_granted(&granted), services(&["other", "web"]).into_iter().collect());
        let many: BTreeSet<ServiceName> = (0..200).map(|n| format!("s{n}").parse().unwrap()).collect();
        let configured =
            ConfiguredServices { workloads: many.iter().cloned().collect(), ..ConfiguredServices::default() };
        assert_eq!(configured.needed(&many).len(), MAX_SERVICES);
    }
}
