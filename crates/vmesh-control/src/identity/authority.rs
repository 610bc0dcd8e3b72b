//! The certificate authority of this replica, with what follows from it: the trust bundle and the TLS settings of `listen.xds`.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use vmesh_api::identity::AuthorityStatus;
use vmesh_identity::authority::AuthorityError;
use vmesh_identity::rotation::Generation;
use vmesh_identity::{
    Certificate, CertificateChain, Identity, Issuer, Key, Lifetimes, Root, Rotation, Subject, TrustBundle,
    TrustDomain, tls,
};
use vmesh_model::NodeName;
use vmesh_model::text::{Time, show_duration};

use super::unix;

/// The settings of the authority in `control.yaml` (`identity`).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct IdentitySettings {
    /// The validity of the certificates of nodes and services.
    pub(crate) leaf_lifetime: Time,
    pub(crate) intermediate_lifetime: Time,
    pub(crate) root_lifetime: Time,
}

impl Default for IdentitySettings {
    fn default() -> IdentitySettings {
        let Lifetimes { root, intermediate, leaf, .. } = Lifetimes::default();
        IdentitySettings {
            leaf_lifetime: Time(leaf),
            intermediate_lifetime: Time(intermediate),
            root_lifetime: Time(root),
        }
    }
}

/// The shortest validity of a certificate: nodes have time to renew it.
const SHORTEST_LEAF: Duration = Duration::from_secs(10);

impl IdentitySettings {
    pub(crate) fn lifetimes(&self) -> Lifetimes {
        Lifetimes {
            root: self.root_lifetime.0,
            intermediate: self.intermediate_lifetime.0,
            leaf: self.leaf_lifetime.0,
            ..Lifetimes::default()
        }
    }

    /// Returns the settings that cannot be used, each with the reason.
    pub(crate) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.leaf_lifetime.0 < SHORTEST_LEAF {
            problems.push(format!(
                "`identity.leaf_lifetime` is shorter than {} s: nodes could not renew their certificates in time",
                SHORTEST_LEAF.as_secs()
            ));
        }
        for (field, shorter, longer) in [
            ("intermediate_lifetime", self.leaf_lifetime.0, self.intermediate_lifetime.0),
            ("root_lifetime", self.intermediate_lifetime.0, self.root_lifetime.0),
        ] {
            if longer < shorter {
                problems.push(format!("`identity.{field}` is shorter than the validity of what it signs"));
            }
        }
        problems
    }
}

/// A root and the intermediate of this replica that it signed, before they are on the disk.
#[derive(Debug)]
pub(crate) struct NewAuthority {
    /// The root with its key. `None`: the root was made elsewhere.
    pub(crate) root: Option<Arc<Root>>,
    pub(crate) issuer: Issuer,
}

impl NewAuthority {
    /// Returns the SHA-256 of the root's public key, in hexadecimal digits.
    pub(crate) fn root_key(&self) -> Result<String, AuthorityError> {
        Ok(root_certificate(&self.issuer)?.key_hash_hex())
    }
}

/// A root and the intermediate of this replica that it signed, in a directory of their own.
#[derive(Debug)]
pub(crate) struct AuthoritySet {
    /// The number of the directory.
    pub(crate) number: u32,
    /// The root with its key. `None`: the key is elsewhere.
    pub(crate) root: Option<Arc<Root>>,
    pub(crate) issuer: Issuer,
}

/// Returns the root's certificate, which ends the chain of the intermediate.
fn root_certificate(issuer: &Issuer) -> Result<Certificate, AuthorityError> {
    let root = issuer.chain().certificates().last().ok_or(AuthorityError::NotAnAuthority)?;
    Certificate::read(root).map_err(AuthorityError::Certificate)
}

/// The authority as the disk holds it: the one in use, and while the root is replaced, the new one with the stage of the rotation.
#[derive(Debug, Clone)]
pub(crate) struct SavedAuthority {
    pub(crate) current: Arc<AuthoritySet>,
    pub(crate) rotation: Option<(Arc<AuthoritySet>, Rotation)>,
}

impl SavedAuthority {
    /// Returns the roots that nodes are to trust.
    fn bundle(&self) -> Result<TrustBundle, AuthorityError> {
        let bundle = self.current.issuer.bundle()?;
        match &self.rotation {
            Some((next, rotation)) if rotation.trusts(Generation::New) => {
                bundle.with(root_certificate(&next.issuer)?.der).map_err(AuthorityError::Bundle)
            }
            _ => Ok(bundle),
        }
    }

    /// Returns the intermediate that issues the certificates of nodes and services.
    fn issuer(&self) -> &Issuer {
        match &self.rotation {
            Some((next, rotation)) if rotation.issuer() == Generation::New => &next.issuer,
            _ => &self.current.issuer,
        }
    }
}

/// Makes a root and the intermediate of this replica.
pub(crate) fn generate(
    trust_domain: &TrustDomain,
    replica: &NodeName,
    now: SystemTime,
    settings: &IdentitySettings,
) -> Result<NewAuthority, AuthorityError> {
    let lifetimes = settings.lifetimes();
    let root = Root::generate(trust_domain, now, &lifetimes)?;
    let issuer = root.issue_intermediate(replica.as_str(), now, &lifetimes)?;
    Ok(NewAuthority { root: Some(Arc::new(root)), issuer })
}

/// The authority in use. A rotation replaces the whole value.
#[derive(Debug)]
pub(crate) struct Authority {
    saved: SavedAuthority,
    bundle: TrustBundle,
    root: Certificate,
    /// The SHA-256 of the public key of the root that replaces the current one.
    next_root: Option<String>,
    tls: Arc<rustls::ServerConfig>,
    /// The certificate that `listen.xds` shows.
    server: Certificate,
    lifetimes: Lifetimes,
}

impl Authority {
    /// Makes the authority usable: issues the certificate of this replica. The current root signs it until a rotation has ended, so that
    /// a node that was away can come back.
    pub(crate) fn start(
        saved: SavedAuthority,
        replica: &NodeName,
        now: SystemTime,
        settings: &IdentitySettings,
    ) -> Result<Authority, AuthorityError> {
        let lifetimes = settings.lifetimes();
        let issuer = &saved.current.issuer;
        let key = Key::generate().map_err(AuthorityError::Key)?;
        let request = key.request().map_err(AuthorityError::Key)?;
        let id = issuer.trust_domain().id(Identity::ControlPlane(replica.clone()));
        let chain = issuer.issue(&request, &Subject::from(id), now, &lifetimes)?;
        let server = chain.leaf().map_err(AuthorityError::Certificate)?;
        let bundle = saved.bundle()?;
        let tls = tls::server_config(&chain, &key, bundle.clone()).map_err(AuthorityError::Tls)?;
        let root = root_certificate(&saved.current.issuer)?;
        let next_root = match &saved.rotation {
            Some((next, _)) => Some(root_certificate(&next.issuer)?.key_hash_hex()),
            None => None,
        };
        Ok(Authority { saved, bundle, root, next_root, tls: Arc::new(tls), server, lifetimes })
    }

    /// Returns the authority as the disk holds it.
    pub(crate) fn saved(&self) -> &SavedAuthority {
        &self.saved
    }

    pub(crate) fn rotation(&self) -> Option<&Rotation> {
        self.saved.rotation.as_ref().map(|(_, rotation)| rotation)
    }

    /// Returns the SHA-256 of the public key of the new root, in hexadecimal digits, while the root is replaced.
    pub(crate) fn next_root_key(&self) -> Option<String> {
        self.next_root.clone()
    }

    /// Makes a new intermediate under the current root. `None`: the key of the root is elsewhere. Nodes trust the root already, so the
    /// caller can use the intermediate at once.
    pub(crate) fn new_intermediate(
        &self,
        replica: &NodeName,
        now: SystemTime,
    ) -> Result<Option<NewAuthority>, AuthorityError> {
        let Some(root) = self.saved.current.root.clone() else { return Ok(None) };
        let issuer = root.issue_intermediate(replica.as_str(), now, &self.lifetimes)?;
        Ok(Some(NewAuthority { root: Some(root), issuer }))
    }

    pub(crate) fn leaf_lifetime(&self) -> Duration {
        self.lifetimes.leaf
    }

    pub(crate) fn tls(&self) -> Arc<rustls::ServerConfig> {
        self.tls.clone()
    }

    pub(crate) fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    /// Returns the SHA-256 of the root's public key, which join tokens pin.
    pub(crate) fn pin(&self) -> [u8; 32] {
        self.root.key_hash
    }

    /// Returns the pin in hexadecimal digits.
    pub(crate) fn root_key(&self) -> String {
        self.root.key_hash_hex()
    }

    pub(crate) fn issue(
        &self,
        request: &str,
        subject: &Subject,
        now: SystemTime,
    ) -> Result<CertificateChain, AuthorityError> {
        self.saved.issuer().issue(request, subject, now, &self.lifetimes)
    }

    /// Returns how long the certificate of `listen.xds` stays in use.
    pub(crate) fn renew_server_in(&self, now: SystemTime) -> Duration {
        let left = self.server.not_after.duration_since(now).unwrap_or_default();
        left.saturating_sub(self.lifetimes.leaf * 2 / 3)
    }

    pub(crate) fn status(&self) -> AuthorityStatus {
        AuthorityStatus {
            root_key: self.root_key(),
            root_expires: unix(self.root.not_after),
            has_root_key: self.saved.current.root.is_some(),
            intermediate_expires: unix(self.saved.issuer().not_after()),
            bundle: self.bundle.version(),
            roots: self.bundle.roots().len(),
        }
    }

    /// Returns what ends soon, each with its subject and what to do.
    pub(crate) fn expiry_warnings(&self, now: SystemTime) -> Vec<(&'static str, String)> {
        let ends = [
            ("the root certificate", self.root.not_after, self.lifetimes.root, "run `vmeshctl ca rotate`"),
            (
                "the intermediate certificate",
                self.saved.issuer().not_after(),
                self.lifetimes.intermediate,
                "run `vmeshctl ca rotate --intermediate`",
            ),
        ];
        let soon = ends.into_iter().filter_map(|(subject, end, lifetime, fix)| {
            let left = end.duration_since(now).unwrap_or_default();
            (left < lifetime / 4).then(|| {
                let when = match left.is_zero() {
                    true => "has expired".to_owned(),
                    false => format!("expires in {}", show_duration(left)),
                };
                (
                    subject,
                    format!("{subject} of this control plane {when}; nodes then get no certificates: {fix}"),
                )
            })
        });
        soon.collect()
    }
}
