//! The identities of the mesh: the certificate authority of this replica, join tokens, and what nodes ask of them at `listen.xds`.
//!
//! ```text
//! vmeshctl ca init ---> Authority ---> TLS settings of listen.xds
//! vmeshctl token create ---> TokenLedger <--- POST /v1/identity/join (no certificate yet)
//!                                             POST /v1/identity/renew (certificate of a node)
//! ```
//!
//! [`IdentityService`] holds the state; `store` is its disk; `requests` answers nodes; `handshake` is the TLS of the port; `rotation`
//! replaces the root, when `trust` shows that every node is ready. No reader
//! waits while a certificate is signed or a file is written; operators' changes wait for each other.

mod authority;
mod handshake;
mod requests;
mod rotation;
mod store;
mod trust;

pub(crate) use authority::{Authority, IdentitySettings};
use authority::{NewAuthority, SavedAuthority};
pub(crate) use handshake::TlsHandshake;
pub(crate) use requests::NodeRequests;
pub(crate) use store::{IdentityStore, StoreError};
pub(crate) use trust::KnownNode;
use trust::TrustReports;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;
use vmesh_api::identity::{
    BundleAnswer, IdentityCounts, IdentityStatus, InitRequest, ListedToken, TokenAnswer, TokenRequest, Tokens,
};
use vmesh_daemon::report::one_line;
use vmesh_daemon::tasks::blocking;
use vmesh_identity::authority::AuthorityError;
use vmesh_identity::rotation::{BlockedStep, Stage};
use vmesh_identity::token::{CreateError, JoinGrant, JoinRefusal, TokenId};
use vmesh_identity::{Certificate, Identity, JoinToken, NodeGrant, TokenLedger, TrustDomain};
use vmesh_model::{Cidr, NodeName, Place, Problem, ServiceName};

use crate::audit::{AuditEvent, AuditLog, Outcome};

/// The reason why an operator's request about identities was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentityError {
    #[error("this control plane has no certificate authority yet: run `vmeshctl ca init`")]
    NoAuthority,
    #[error(
        "this control plane has a certificate authority already (root key {0}); a second one would cut off every node that joined"
    )]
    HasAuthority(String),
    #[error("could not make the certificate authority")]
    Authority(#[source] AuthorityError),
    #[error("could not save it in the state directory")]
    Store(#[source] StoreError),
    #[error("could not create the token")]
    Create(#[source] CreateError),
    #[error("there is no unused token `{0}`: `vmeshctl token list` shows them")]
    UnknownToken(String),
    #[error("no rotation is under way: `vmeshctl ca rotate` begins one")]
    NoRotation,
    #[error(
        "the root is being replaced (stage {0}): go on with `vmeshctl ca rotate`, or step back with `vmeshctl ca rotate --back`"
    )]
    Rotating(Stage),
    #[error("the next step of the rotation cannot be taken")]
    Blocked(#[source] BlockedStep),
    #[error(
        "the key of the root is not on this control plane: make an intermediate where it is, and give it with `--chain-file` and `--key-file`"
    )]
    NoRootKey,
    #[error("{0}")]
    Wrong(String),
}

/// The identities of this replica.
pub(crate) struct IdentityService {
    trust_domain: TrustDomain,
    /// The name of this replica in its certificates.
    replica: NodeName,
    listen: Option<SocketAddr>,
    insecure: Vec<SocketAddr>,
    settings: IdentitySettings,
    store: IdentityStore,
    authority: watch::Sender<Option<Arc<Authority>>>,
    ledger: Mutex<TokenLedger>,
    banned: watch::Sender<BTreeSet<NodeName>>,
    /// The trust of each node, as it last reported.
    trust: TrustReports,
    counters: Counters,
    pub(crate) audit: AuditLog,
    /// Held while an authority is made, so that two requests do not make two.
    changing: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Counters {
    joined: AtomicU64,
    join_refused: AtomicU64,
    renewed: AtomicU64,
    renew_refused: AtomicU64,
    handshakes_failed: AtomicU64,
    admissions_denied: AtomicU64,
}

/// The parts of a replica that its identities need.
pub(crate) struct IdentityConfig {
    pub(crate) trust_domain: TrustDomain,
    pub(crate) replica: NodeName,
    pub(crate) listen: Option<SocketAddr>,
    /// The plaintext listeners beyond loopback.
    pub(crate) insecure: Vec<SocketAddr>,
    pub(crate) settings: IdentitySettings,
}

impl IdentityService {
    /// Loads the authority, the tokens and the bans from the state directory.
    pub(crate) fn open(
        config: IdentityConfig,
        store: IdentityStore,
        audit: AuditLog,
    ) -> Result<Arc<IdentityService>, IdentityError> {
        let now = SystemTime::now();
        let IdentityConfig { trust_domain, replica, listen, insecure, settings } = config;
        let authority = match store.load_authority(&trust_domain).map_err(IdentityError::Store)? {
            Some(saved) => Some(Arc::new(
                Authority::start(saved, &replica, now, &settings).map_err(IdentityError::Authority)?,
            )),
            None => None,
        };
        let ledger = TokenLedger::from_records(store.load_tokens().map_err(IdentityError::Store)?);
        let banned = store.load_bans().map_err(IdentityError::Store)?;
        Ok(Arc::new(IdentityService {
            trust_domain,
            replica,
            listen,
            insecure,
            settings,
            store,
            authority: watch::Sender::new(authority),
            ledger: Mutex::new(ledger),
            banned: watch::Sender::new(banned),
            trust: TrustReports::default(),
            counters: Counters::default(),
            audit,
            changing: tokio::sync::Mutex::default(),
        }))
    }

    pub(crate) fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Returns the plaintext listeners that other hosts reach.
    pub(crate) fn insecure(&self) -> &[SocketAddr] {
        &self.insecure
    }

    /// Returns the current authority, or `None` before `vmeshctl ca init`.
    pub(crate) fn authority(&self) -> Option<Arc<Authority>> {
        self.authority.borrow().clone()
    }

    pub(crate) fn is_banned(&self, node: &NodeName) -> bool {
        self.banned.borrow().contains(node)
    }

    pub(crate) fn bans(&self) -> watch::Receiver<BTreeSet<NodeName>> {
        self.banned.subscribe()
    }

    fn ledger(&self) -> MutexGuard<'_, TokenLedger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the authority, or takes over the intermediate of `request`.
    pub(crate) async fn init(
        self: &Arc<Self>,
        request: InitRequest,
    ) -> Result<IdentityStatus, IdentityError> {
        let _one_at_a_time = self.changing.lock().await;
        if let Some(authority) = self.authority() {
            return Err(IdentityError::HasAuthority(authority.root_key()));
        }
        let this = self.clone();
        let made = blocking(move || {
            let now = SystemTime::now();
            let current = this.store.save_set(this.make(&request, now)?).map_err(IdentityError::Store)?;
            let saved = SavedAuthority { current: Arc::new(current), rotation: None };
            this.store.save_authority(&saved).map_err(IdentityError::Store)?;
            Authority::start(saved, &this.replica, now, &this.settings).map_err(IdentityError::Authority)
        })
        .await?;
        tracing::info!(
            root_key = made.root_key(),
            "the certificate authority exists; listen.xds serves nodes"
        );
        self.authority.send_replace(Some(Arc::new(made)));
        Ok(self.status())
    }

    /// Makes a root and an intermediate, or takes over the intermediate of `request`.
    fn make(&self, request: &InitRequest, now: SystemTime) -> Result<NewAuthority, IdentityError> {
        match &request.chain {
            Some(chain) => {
                let key_file = request.key_file.as_deref();
                let issuer = self.store.read_supplied(chain, key_file, &self.trust_domain)?;
                Ok(NewAuthority { root: None, issuer })
            }
            None => authority::generate(&self.trust_domain, &self.replica, now, &self.settings)
                .map_err(IdentityError::Authority),
        }
    }

    /// Creates a join token, and saves it before it is shown.
    pub(crate) async fn create_token(
        self: &Arc<Self>,
        request: TokenRequest,
    ) -> Result<TokenAnswer, IdentityError> {
        let authority = self.authority().ok_or(IdentityError::NoAuthority)?;
        let network: Option<Cidr> = match &request.network {
            Some(text) => {
                Some(text.parse().map_err(|error| IdentityError::Wrong(format!("network: {error}")))?)
            }
            None => None,
        };
        let TokenRequest { node, services, labels, ttl, .. } = request;
        let (now, ttl) = (SystemTime::now(), Duration::from_secs(ttl));
        let grant = JoinGrant { node, services, labels, network };
        let (token, record, forgotten) = {
            let mut ledger = self.ledger();
            let token = ledger.create(grant, ttl, authority.pin(), now).map_err(IdentityError::Create)?;
            let record = ledger.record(token.id).cloned();
            (token, record, ledger.take_forgotten())
        };
        let (this, id) = (self.clone(), token.id);
        blocking(move || {
            this.store.remove_tokens(&forgotten);
            match record {
                Some(record) => this.store.save_token(id, &record).map_err(IdentityError::Store),
                None => Ok(()),
            }
        })
        .await?;
        let text = token.reveal();
        Ok(TokenAnswer { token: text.to_string(), id: id.to_string(), expires: unix_end(now + ttl) })
    }

    /// Lists the tokens of this replica, without their secrets.
    pub(crate) fn tokens(&self) -> Tokens {
        let ledger = self.ledger();
        let tokens = ledger.records().map(|(id, record)| ListedToken {
            id: id.to_string(),
            node: record.grant.node.clone(),
            services: record.grant.services.clone(),
            network: record.grant.network.map(|network| network.to_string()),
            expires: unix_end(record.expires),
            redeemed: record.redeemed.as_ref().map(|redeemed| unix(redeemed.at)),
            redeemed_from: record.redeemed.as_ref().map(|redeemed| redeemed.from.to_string().into()),
        });
        Tokens { tokens: tokens.collect() }
    }

    pub(crate) async fn revoke_token(self: &Arc<Self>, id: &str) -> Result<String, IdentityError> {
        let unknown = || IdentityError::UnknownToken(vmesh_text::escaped(id, 64));
        let id: TokenId = id.parse().map_err(|_| unknown())?;
        let record = self.ledger().revoke(id).ok_or_else(unknown)?;
        let this = self.clone();
        blocking(move || this.store.remove_tokens(&[id])).await;
        Ok(format!("token {id} for node `{}` is revoked", record.grant.node))
    }

    /// Bans or admits a node, and saves that. Returns whether it changed anything.
    pub(crate) async fn set_ban(
        self: &Arc<Self>,
        node: &NodeName,
        is_banned: bool,
    ) -> Result<bool, IdentityError> {
        let _one_at_a_time = self.changing.lock().await;
        let mut banned = self.banned.borrow().clone();
        let changed = if is_banned { banned.insert(node.clone()) } else { banned.remove(node) };
        if changed {
            let (this, saved) = (self.clone(), banned.clone());
            blocking(move || this.store.save_bans(&saved).map_err(IdentityError::Store)).await?;
            self.banned.send_replace(banned);
        }
        Ok(changed)
    }

    /// Redeems a token once: the record is on the disk before the node has its certificate.
    async fn redeem(
        self: &Arc<Self>,
        token: &JoinToken,
        node: &NodeName,
        services: &BTreeSet<ServiceName>,
        from: IpAddr,
    ) -> Result<NodeGrant, RedeemError> {
        let (grant, record) = {
            let mut ledger = self.ledger();
            let grant = ledger
                .redeem(token, node, services, from, SystemTime::now())
                .map_err(RedeemError::Refused)?;
            (grant, ledger.record(token.id).cloned())
        };
        let (this, id) = (self.clone(), token.id);
        if let Some(record) = record {
            blocking(move || this.store.save_token(id, &record)).await.map_err(RedeemError::Unsaved)?;
        }
        Ok(NodeGrant { services: grant.services, labels: grant.labels })
    }

    pub(crate) fn status(&self) -> IdentityStatus {
        IdentityStatus {
            trust_domain: self.trust_domain.to_string(),
            authority: self.authority().map(|authority| authority.status()),
            listen: self.listen.map(|listen| listen.to_string()),
            counts: self.counts(),
            banned: self.banned.borrow().clone(),
        }
    }

    pub(crate) fn counts(&self) -> IdentityCounts {
        let Counters { joined, join_refused, renewed, renew_refused, handshakes_failed, admissions_denied } =
            &self.counters;
        IdentityCounts {
            joined: joined.load(Relaxed),
            join_refused: join_refused.load(Relaxed),
            renewed: renewed.load(Relaxed),
            renew_refused: renew_refused.load(Relaxed),
            handshakes_failed: handshakes_failed.load(Relaxed),
            admissions_denied: admissions_denied.load(Relaxed),
        }
    }

    pub(crate) fn bundle(&self) -> Result<BundleAnswer, IdentityError> {
        let authority = self.authority().ok_or(IdentityError::NoAuthority)?;
        Ok(BundleAnswer { bundle: authority.bundle().to_pem(), version: authority.bundle().version() })
    }

    /// Counts and records that a client was not admitted.
    pub(crate) fn deny_admission(&self, node: &NodeName, from: Option<IpAddr>, why: &str) {
        self.counters.admissions_denied.fetch_add(1, Relaxed);
        self.audit.record(AuditEvent::of_node(node, from, "xds.connect", Outcome::Denied, why));
    }

    /// Returns a problem for each certificate of the authority that ends soon.
    pub(crate) fn problems(&self) -> Vec<Problem> {
        let place = || Place::file("identity");
        let mut problems = Vec::new();
        match (self.authority(), self.listen) {
            (None, Some(listen)) => {
                let message = format!(
                    "`listen.xds: {listen}` serves nobody, because there is no certificate authority: run `vmeshctl ca init`"
                );
                problems.push(Problem::new(place(), "listen.xds", message));
            }
            (Some(authority), _) => {
                let now = SystemTime::now();
                problems.extend(
                    authority
                        .expiry_warnings(now)
                        .into_iter()
                        .map(|(subject, message)| Problem::new(place(), subject, message)),
                );
            }
            (None, None) => {}
        }
        problems
    }

    /// Issues the certificate of this replica anew in time, for as long as the future is polled.
    pub(crate) async fn renew_own_certificate(self: Arc<Self>) {
        let mut authorities = self.authority.subscribe();
        loop {
            let Some(authority) = authorities.borrow_and_update().clone() else {
                if authorities.changed().await.is_err() {
                    return std::future::pending().await;
                }
                continue;
            };
            tokio::select! {
                changed = authorities.changed() => if changed.is_err() { return std::future::pending().await },
                () = tokio::time::sleep(authority.renew_server_in(SystemTime::now())) => {
                    let (replica, settings) = (self.replica.clone(), self.settings.clone());
                    let renewed = blocking(move || {
                        Authority::start(authority.saved().clone(), &replica, SystemTime::now(), &settings)
                    });
                    match renewed.await {
                        Ok(renewed) => _ = self.authority.send_replace(Some(Arc::new(renewed))),
                        Err(error) => {
                            tracing::error!("the certificate of this control plane was not renewed: {}", one_line(&error));
                            tokio::time::sleep(RETRY).await;
                        }
                    }
                }
            }
        }
    }
}

/// Returns the node that owns the certificate `der`, which the handshake has verified, with its rights.
pub(crate) fn node_of(der: &[u8]) -> Result<(NodeName, NodeGrant), String> {
    let der = vmesh_identity::certificate::der(der);
    let certificate = Certificate::read(&der).map_err(|error| one_line(&error))?;
    match certificate.id().map_err(|error| one_line(&error))?.identity {
        Identity::Node(name) => Ok((name, certificate.grant.unwrap_or_default())),
        Identity::Service(name) => {
            Err(format!("the certificate is that of the service `{name}`, not of a node"))
        }
        Identity::ControlPlane(_) | Identity::Operator(..) => {
            Err("the certificate is not that of a node".to_owned())
        }
    }
}

/// The pause after a failed renewal of the control plane's own certificate.
const RETRY: Duration = Duration::from_secs(10);

/// The reason why a token was not redeemed.
enum RedeemError {
    Refused(JoinRefusal),
    Unsaved(StoreError),
}

fn unix(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Returns the first full second, in Unix time, at which a validity that ends at `end` is over.
fn unix_end(end: SystemTime) -> u64 {
    let since_epoch = end.duration_since(UNIX_EPOCH).unwrap_or_default();
    since_epoch.as_secs() + u64::from(since_epoch.subsec_nanos() > 0)
}

#[cfg(test)]
mod tests;
