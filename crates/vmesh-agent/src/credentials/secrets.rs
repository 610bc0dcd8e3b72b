//! The certificates of this node as resources for Envoy (SDS), and which of them Envoy has taken.
//!
//! The agent itself answers Envoy's subscriptions to secrets. No control plane is asked for a secret, none is in the saved configuration,
//! and only Envoy's user gets one.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use vmesh_identity::{CertificateChain, TrustBundle};
use vmesh_model::ServiceName;
use vmesh_proto::envoy::config::core::v3::{DataSource, data_source};
use vmesh_proto::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret, TlsCertificate, secret,
};
use vmesh_xds::{Event, Kind, Resource};

use super::{ConfiguredServices, Credential, NodeCredentials};
use crate::config::{Config, EnvoyManager};

/// The name of the secret with the roots of the mesh. The compiler's configuration refers to these names.
pub const TRUST_BUNDLE: &str = "trust_bundle";
/// The name of the certificate with which this node calls others.
pub const CALLER: &str = "caller";

/// Returns the name of a service's certificate.
pub fn workload(service: &ServiceName) -> String {
    format!("workload|{service}")
}

/// Returns the secrets that Envoy may ask for.
pub fn secrets(credentials: &NodeCredentials, configured: &ConfiguredServices) -> Vec<Arc<Resource>> {
    let bundle = &credentials.bundle;
    let context = CertificateValidationContext {
        trusted_ca: Some(inline(bundle.to_pem())),
        ..CertificateValidationContext::default()
    };
    let mut secrets = vec![resource(TRUST_BUNDLE.to_owned(), secret::Type::ValidationContext(context))];
    for (service, credential) in &credentials.services {
        secrets.push(certificate(workload(service), credential, bundle));
    }
    let caller = configured.caller(&credentials.granted);
    match caller.map(|service| credentials.services.get(&service)) {
        // A node that waits for the certificate of a service does not call as itself meanwhile.
        None => secrets.push(certificate(CALLER.to_owned(), &credentials.node, bundle)),
        Some(Some(credential)) => secrets.push(certificate(CALLER.to_owned(), credential, bundle)),
        Some(None) => {}
    }
    secrets
}

fn certificate(name: String, credential: &Credential, bundle: &TrustBundle) -> Arc<Resource> {
    let certificate = TlsCertificate {
        certificate_chain: Some(inline(without_roots(&credential.chain, bundle))),
        private_key: Some(inline(credential.key.to_pem().to_string())),
        ..TlsCertificate::default()
    };
    resource(name, secret::Type::TlsCertificate(certificate))
}

/// Returns the chain in PEM without the roots, which the peer has.
fn without_roots(chain: &CertificateChain, bundle: &TrustBundle) -> String {
    let kept: Vec<_> =
        chain.certificates().iter().filter(|one| !bundle.roots().contains(one)).cloned().collect();
    CertificateChain::from_der(&kept).map_or_else(|_| chain.to_pem(), |chain| chain.to_pem())
}

fn resource(name: String, r#type: secret::Type) -> Arc<Resource> {
    let secret = Secret { name: name.clone(), r#type: Some(r#type) };
    Resource::new(Kind::Secret, name, &secret)
}

fn inline(text: String) -> DataSource {
    let bytes = data_source::Specifier::InlineBytes(Bytes::from(text));
    DataSource { specifier: Some(bytes), ..DataSource::default() }
}

/// The users that get secrets: root, the agent's user, and Envoy's user.
#[derive(Debug, Clone)]
pub struct SecretReaders {
    own: u32,
    /// A directory that belongs to Envoy's user. `None`: the agent starts Envoy, as its own user.
    envoy_dir: Option<PathBuf>,
}

impl SecretReaders {
    pub fn of(config: &Config) -> SecretReaders {
        SecretReaders {
            own: rustix::process::geteuid().as_raw(),
            envoy_dir: match config.envoy.manage {
                EnvoyManager::Systemd => Some(config.envoy.run_dir.clone()),
                EnvoyManager::Child => None,
            },
        }
    }

    /// Reports whether the user `uid`, at the other end of a socket, may have secrets.
    pub fn include(&self, uid: Option<u32>) -> bool {
        let Some(uid) = uid else { return false };
        // systemd makes the directory for the unit's user, in /run, where no other user can make one.
        let owns =
            |dir: &PathBuf| std::fs::symlink_metadata(dir).is_ok_and(|dir| dir.is_dir() && dir.uid() == uid);
        uid == 0 || uid == self.own || self.envoy_dir.as_ref().is_some_and(owns)
    }
}

/// The secrets that the clients of the agent's xDS socket have subscribed to and taken.
#[derive(Debug, Default)]
pub struct TakenSecrets {
    /// For each stream and name: the version that the client took last, and the reason if it rejected a later one.
    streams: BTreeMap<u64, BTreeMap<Arc<str>, TakenSecret>>,
}

#[derive(Debug, Default)]
struct TakenSecret {
    version: Option<String>,
    rejection: Option<Arc<str>>,
}

impl TakenSecrets {
    /// Processes an event of a stream. Events of other kinds are ignored.
    pub fn on_event(&mut self, stream: u64, event: &Event) {
        match event {
            Event::Subscribed { kind: Kind::Secret, name } => {
                self.streams.entry(stream).or_default().entry(name.clone()).or_default();
            }
            Event::Unsubscribed { kind: Kind::Secret, name } => {
                self.streams.entry(stream).or_default().remove(name);
            }
            Event::Accepted { kind: Kind::Secret, name, resource: Some(resource) } => {
                let version = Some(resource.version().to_owned());
                let taken = TakenSecret { version, rejection: None };
                self.streams.entry(stream).or_default().insert(name.clone(), taken);
            }
            Event::Rejected { resource, reason } if resource.kind() == Kind::Secret => {
                let taken = self.streams.entry(stream).or_default().entry(resource.name().clone());
                taken.or_default().rejection = Some(reason.clone());
            }
            _ => {}
        }
    }

    pub fn on_disconnected(&mut self, stream: u64) {
        self.streams.remove(&stream);
    }

    /// Reports whether every client that subscribes to `secret` has taken this version of it. `needs_client`: and there is one.
    pub fn have_all(&self, secret: &Resource, needs_client: bool) -> bool {
        let mut taken = self.streams.values().filter_map(|names| names.get(secret.name())).peekable();
        (!needs_client || taken.peek().is_some())
            && taken.all(|taken| taken.version.as_deref() == Some(secret.version()))
    }

    /// Iterates over the secrets that a client rejects, with its reasons.
    pub fn rejections(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<str>)> {
        let all = self.streams.values().flatten();
        all.filter_map(|(name, taken)| Some((name, taken.rejection.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message;
    use vmesh_identity::Key;

    use super::super::testing::credentials;
    use super::*;

    fn configured(workloads: &[&str]) -> ConfiguredServices {
        ConfiguredServices {
            workloads: workloads.iter().map(|name| name.parse().unwrap()).collect(),
            callers: BTreeSet::new(),
        }
    }

    fn leaf_of(secrets: &[Arc<Resource>], name: &str) -> Option<String> {
        let resource = secrets.iter().find(|resource| **resource.name() == *name)?;
        let secret = Secret::decode(resource.value()).unwrap();
        assert_eq!(secret.name, name);
        let Some(secret::Type::TlsCertificate(certificate)) = secret.r#type else { panic!("{name}") };
        let text = |source: Option<DataSource>| match source.unwrap().specifier.unwrap() {
            data_source::Specifier::InlineBytes(bytes) => String::from_utf8(bytes.to_vec()).unwrap(),
            other => panic!("{other:?}"),
        };
        let key = Key::from_pem(&text(certificate.private_key)).unwrap();
        let chain = CertificateChain::from_pem(&text(certificate.certificate_chain)).unwrap();
        assert_eq!(chain.certificates().len(), 2, "the leaf and the intermediate");
        let leaf = chain.leaf().unwrap();
        assert_eq!(leaf.key_hash, key.public_hash());
        Some(leaf.id().unwrap().to_string())
    }

    #[test]
    fn envoy_gets_a_certificate_for_each_workload_and_one_to_call_others_with() {
        let credentials = credentials(&["orders", "web"], &["orders", "web"]);
        let secrets = secrets(&credentials, &configured(&["web", "orders"]));
        assert_eq!(secrets.len(), 4);
        assert_eq!(leaf_of(&secrets, "workload|web").unwrap(), "spiffe://mesh.example/service/web");
        assert_eq!(leaf_of(&secrets, "caller").unwrap(), "spiffe://mesh.example/service/web");
        let bundle = Secret::decode(secrets[0].value()).unwrap();
        assert!(matches!(bundle.r#type, Some(secret::Type::ValidationContext(_))));
    }

    #[test]
    fn a_node_without_services_calls_as_itself_and_one_that_waits_for_a_certificate_does_not_call() {
        let none = secrets(&credentials(&[], &[]), &configured(&[]));
        assert_eq!(leaf_of(&none, "caller").unwrap(), "spiffe://mesh.example/node/web-1");
        let joined = secrets(&credentials(&[], &["web"]), &configured(&["web"]));
        assert_eq!(leaf_of(&joined, "caller"), None);
    }

    #[test]
    fn only_root_the_agent_and_the_owner_of_envoys_directory_get_secrets() {
        let dir = vmesh_testkit::tempdir().unwrap();
        let readers = SecretReaders { own: 4711, envoy_dir: Some(dir.to_path_buf()) };
        let owner = std::fs::metadata(&*dir).unwrap().uid();
        assert!(readers.include(Some(0)) && readers.include(Some(4711)) && readers.include(Some(owner)));
        assert!(!readers.include(Some(4712)) && !readers.include(None));
        std::os::unix::fs::symlink(&*dir, dir.join("link")).unwrap();
        let linked = SecretReaders { own: 4711, envoy_dir: Some(dir.join("link")) };
        assert_eq!(linked.include(Some(owner)), owner == 0);
    }

    #[test]
    fn a_bundle_is_in_use_when_every_envoy_that_asks_for_it_has_taken_it() {
        let secret = |content: &str| Resource::from_bytes(Kind::Secret, TRUST_BUNDLE, content.as_bytes());
        let name = || Arc::<str>::from(TRUST_BUNDLE);
        let (old, new) = (secret("1"), secret("2"));
        let mut taken = TakenSecrets::default();
        assert!(taken.have_all(&new, false) && !taken.have_all(&new, true));
        let accepted = |resource: &Arc<Resource>| Event::Accepted {
            kind: Kind::Secret,
            name: name(),
            resource: Some(resource.clone()),
        };
        taken.on_event(1, &Event::Subscribed { kind: Kind::Secret, name: name() });
        assert!(!taken.have_all(&new, false));
        taken.on_event(1, &accepted(&old));
        assert!(taken.have_all(&old, true) && !taken.have_all(&new, false));
        taken.on_event(2, &accepted(&new));
        assert!(!taken.have_all(&new, true), "the old Envoy of a hot restart");
        taken.on_event(1, &Event::Rejected { resource: new.clone(), reason: "bad".into() });
        assert_eq!(taken.rejections().count(), 1);
        taken.on_disconnected(1);
        assert!(taken.have_all(&new, true));
        assert_eq!(taken.rejections().count(), 0);
    }
}
