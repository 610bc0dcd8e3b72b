//! The task that joins the mesh, and keeps the certificates of this node valid.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};
use vmesh_api::identity::{JOIN_PATH, JoinAnswer, JoinRequest, RENEW_PATH, RenewAnswer, RenewRequest};
use vmesh_backoff::{Backoff, jitter, shuffle};
use vmesh_daemon::Tasks;
use vmesh_daemon::fsx::FileError;
use vmesh_daemon::report::one_line;
use vmesh_daemon::tasks::blocking;
use vmesh_identity::bundle::BadBundle;
use vmesh_identity::key::KeyError;
use vmesh_identity::name::InvalidId;
use vmesh_identity::tls::{ServerTrust, TlsError, client_config};
use vmesh_identity::{Identity, JoinToken, Key, TrustBundle, TrustDomain};
use vmesh_model::{NodeName, ServiceName};

use super::client::{RequestError, TimedAnswer, post};
use super::status::{ExpiryAlarm, IdentityStage, IdentityStatus, SKEW_TOLERATED};
use super::store::{CredentialStore, LoadError};
use super::token::{self, TokenError};
use super::{BadCredential, ConfiguredServices, Credential, NodeCredentials};
use crate::config::{Config, ControlPlane};
use crate::relay::RelayIdentity;

/// The interval of requests for the trust bundle, until a control plane says another one. A new root must reach each node within a
/// minute.
const BUNDLE_EVERY: Duration = Duration::from_secs(30);
/// The random part of the pause before a renewal that the control plane asks for.
const BUNDLE_JITTER: Duration = Duration::from_secs(10);
/// The longest interval that a control plane may say.
const BUNDLE_AT_LAST: Duration = Duration::from_secs(600);
/// The pause after Envoy has taken a trust bundle, until the control planes are told: the random part of it spreads the fleet.
const TELLS_AFTER: Duration = Duration::from_millis(500);
/// The interval of looks at a token file or an identity that does not exist yet.
const LOOKS_EVERY: Duration = Duration::from_secs(5);
/// The pause after a control plane has refused.
const REFUSED_PAUSE: Duration = Duration::from_secs(60);
/// The pauses between attempts that fail for other reasons.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LAST: Duration = Duration::from_secs(60);
/// Certificates are renewed when a third of their validity has passed, and at the latest an eighth of it later.
const RENEWS_AFTER: u32 = 3;
const RENEWS_WITHIN: u32 = 8;

/// A join or a renewal that failed.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    #[error("no control plane gave this node certificates")]
    Request(#[source] RequestError),
    #[error("could not make a key")]
    Key(#[source] KeyError),
    #[error("could not use this node's certificate for TLS")]
    Tls(#[source] TlsError),
    #[error("the control plane has issued a certificate that cannot be used")]
    Credential(#[source] BadCredential),
    #[error("the trust bundle of the control plane cannot be used")]
    Bundle(#[source] BadBundle),
    #[error("the trust domain `{0}` of the control plane is not one")]
    TrustDomain(String, #[source] InvalidId),
    #[error("the control plane has the trust domain `{theirs}`, and this node belongs to `{ours}`")]
    OtherTrustDomain { theirs: String, ours: TrustDomain },
    #[error("the control plane has issued no certificate for {0}")]
    Missing(String),
    #[error("`control_plane` names no replica with mTLS, as \"mesh1.example:15012\"")]
    NoReplica,
}

impl RenewError {
    fn is_refusal(&self) -> bool {
        matches!(self, RenewError::Request(RequestError::Refused { .. }))
    }
}

/// The parts that join and renewal share: who this node is, and whom it asks.
#[derive(Debug, Clone)]
pub struct Enrolment {
    pub node: NodeName,
    pub configured: ConfiguredServices,
    /// The replicas with mTLS, in the order in which the node asks them.
    pub replicas: Vec<ControlPlane>,
    pub store: CredentialStore,
    /// The seconds by which the clock of the control plane that answered last is ahead of this host's.
    clock_skew: Option<i64>,
}

impl Enrolment {
    pub fn of(config: &Config) -> Enrolment {
        let mut replicas: Vec<_> = config.control_planes.iter().filter(|one| one.is_tls).cloned().collect();
        shuffle(&mut replicas);
        Enrolment {
            node: config.name.clone(),
            configured: ConfiguredServices::of(config),
            replicas,
            store: CredentialStore::new(&config.state_dir),
            clock_skew: None,
        }
    }

    /// Redeems `token`. A token belongs to the replica that created it, so each replica is asked until one knows it.
    pub async fn join(&mut self, token: &JoinToken) -> Result<TimedAnswer<NodeCredentials>, RenewError> {
        let store = self.store.clone();
        let key = blocking(move || store.key_for_join()).await.map_err(RenewError::Key)?;
        let request = JoinRequest {
            token: token.reveal().to_string(),
            node: self.node.clone(),
            services: self.configured.workloads.iter().cloned().collect(),
            request: key.request().map_err(RenewError::Key)?,
        };
        let trust = || ServerTrust::Pin(token.pin);
        let asked = self.ask::<_, JoinAnswer>(JOIN_PATH, &request, || client_config(None, trust())).await?;
        self.clock_skew = Some(asked.clock_skew(asked.answer.now));
        let TimedAnswer { answer, asked_at, answered_at } = asked;
        let trust_domain: TrustDomain = answer
            .trust_domain
            .parse()
            .map_err(|cause| RenewError::TrustDomain(answer.trust_domain.clone(), cause))?;
        let bundle =
            TrustBundle::from_pem(trust_domain.clone(), &answer.bundle).map_err(RenewError::Bundle)?;
        let holder = trust_domain.id(Identity::Node(self.node.clone()));
        let node = Credential::verified(holder, key, &answer.node_chain, &bundle, answered_at)
            .map_err(RenewError::Credential)?;
        let credentials = NodeCredentials {
            trust_domain,
            bundle,
            granted: answer.granted,
            node: Arc::new(node),
            services: BTreeMap::new(),
            issued: answered_at,
        };
        let store = self.store.clone();
        blocking(move || store.forget_key_for_join()).await;
        Ok(TimedAnswer { answer: credentials, asked_at, answered_at })
    }

    /// Asks for new certificates of the node and of its services if `needs_certificates`, and else for the trust bundle alone.
    /// `bundle_in_use` is the version of the trust bundle that Envoy uses. The second value is the control plane's clock.
    async fn renew(
        &mut self,
        old: &NodeCredentials,
        needs_certificates: bool,
        bundle_in_use: Option<String>,
    ) -> Result<(TimedAnswer<NodeCredentials>, RenewAnswer), RenewError> {
        let mut request = RenewRequest {
            bundle: bundle_in_use,
            roots: old.root_keys(),
            expires: unix_seconds(old.last_not_after()),
            ..RenewRequest::default()
        };
        let mut keys: BTreeMap<ServiceName, Key> = BTreeMap::new();
        let mut node_key = None;
        if needs_certificates {
            let key = Key::generate().map_err(RenewError::Key)?;
            request.node_request = Some(key.request().map_err(RenewError::Key)?);
            node_key = Some(key);
            for service in self.configured.needed(&old.granted) {
                let key = Key::generate().map_err(RenewError::Key)?;
                request.services.insert(service.clone(), key.request().map_err(RenewError::Key)?);
                keys.insert(service, key);
            }
        }
        let asked = self.ask::<_, RenewAnswer>(RENEW_PATH, &request, || old.client_config()).await?;
        self.clock_skew = Some(asked.clock_skew(asked.answer.now));
        let TimedAnswer { answer, asked_at, answered_at } = asked;
        if answer.trust_domain != old.trust_domain.as_str() {
            let (theirs, ours) = (answer.trust_domain.clone(), old.trust_domain.clone());
            return Err(RenewError::OtherTrustDomain { theirs, ours });
        }
        let bundle =
            TrustBundle::from_pem(old.trust_domain.clone(), &answer.bundle).map_err(RenewError::Bundle)?;
        let mut new = NodeCredentials { bundle, granted: answer.granted.clone(), ..old.clone() };
        let issued = |id: Identity, key: Key, chain: Option<&String>| {
            let holder = new.trust_domain.id(id);
            let chain = chain.ok_or_else(|| RenewError::Missing(holder.to_string()))?;
            Credential::verified(holder, key, chain, &new.bundle, answered_at)
                .map(Arc::new)
                .map_err(RenewError::Credential)
        };
        if let Some(key) = node_key {
            let node = issued(Identity::Node(self.node.clone()), key, answer.node_chain.as_ref())?;
            let mut services = BTreeMap::new();
            for (service, key) in keys {
                // The rights may have shrunk since the request.
                if !new.granted.contains(&service) {
                    continue;
                }
                let chain = answer.services.get(&service);
                services.insert(service.clone(), issued(Identity::Service(service), key, chain)?);
            }
            (new.node, new.services, new.issued) = (node, services, answered_at);
        } else {
            new.services.retain(|service, _| answer.granted.contains(service));
        }
        Ok((TimedAnswer { answer: new, asked_at, answered_at }, answer))
    }

    /// Sends a request to one replica after the other until one answers, which is the first of the next request. Of several failures, a
    /// refusal is returned; not so for a join, because each replica that did not create the token refuses it.
    async fn ask<Q: Serialize, A: DeserializeOwned>(
        &mut self,
        path: &str,
        request: &Q,
        config: impl Fn() -> Result<rustls::ClientConfig, TlsError>,
    ) -> Result<TimedAnswer<A>, RenewError> {
        let mut failure = None;
        for at in 0..self.replicas.len() {
            let Some(replica) = self.replicas.get(at) else { break };
            let config = config().map_err(RenewError::Tls)?;
            match post(replica, config, path, request).await {
                Ok(answer) => {
                    self.replicas.rotate_left(at);
                    return Ok(answer);
                }
                Err(error) => {
                    debug!("{}", one_line(&error));
                    let is_refusal = matches!(error, RequestError::Refused { .. });
                    if failure.is_none() || is_refusal == (path != JOIN_PATH) {
                        failure = Some(error);
                    }
                }
            }
        }
        Err(failure.map_or(RenewError::NoReplica, RenewError::Request))
    }

    /// Saves `credentials`. Returns the reason if that failed.
    pub async fn save(&self, credentials: &Arc<NodeCredentials>) -> Result<(), FileError> {
        let (store, node, credentials) = (self.store.clone(), self.node.clone(), Arc::clone(credentials));
        blocking(move || store.open().and_then(|()| store.save(&node, &credentials))).await
    }

    pub async fn load(&self) -> Result<Option<NodeCredentials>, LoadError> {
        let (store, node) = (self.store.clone(), self.node.clone());
        blocking(move || store.load(&node)).await
    }
}

/// Loads the identity of this node, and starts the task that obtains or renews it, if the configuration needs one.
pub fn spawn(tasks: &mut Tasks, config: &Config) -> RelayIdentity {
    let enrolment = Enrolment::of(config);
    let configured = enrolment.configured.clone();
    let mut status = IdentityStatus::default();
    let mut loaded = None;
    if config.needs_identity() {
        let opened = enrolment.store.open().map_err(LoadError::File);
        match opened.and_then(|()| enrolment.store.load(&enrolment.node)) {
            Ok(found) => loaded = found.map(Arc::new),
            Err(error) => {
                let text = one_line(&error);
                warn!("{text}");
                status.problem = Some(text);
            }
        }
    }
    let (credentials, received) = watch::channel(loaded);
    let (status, _) = watch::channel(status);
    let (bundle_in_use, in_use) = watch::channel(None);
    if config.needs_identity() {
        let channels = IdentityChannels { credentials, status: status.clone(), bundle_in_use: in_use };
        tasks.spawn("identity", IdentityTask::new(enrolment, config.token_path(), channels).run());
    }
    let mtls_address = config.mtls_address();
    RelayIdentity { credentials: received, configured, bundle_in_use, status, mtls_address }
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// The channels of the task.
pub struct IdentityChannels {
    pub credentials: watch::Sender<Option<Arc<NodeCredentials>>>,
    pub status: watch::Sender<IdentityStatus>,
    /// The version of the trust bundle that Envoy uses.
    pub bundle_in_use: watch::Receiver<Option<String>>,
}

/// The task that joins the mesh and renews certificates. Start it with [`IdentityTask::run`]; it ends with the daemon.
pub struct IdentityTask {
    enrolment: Enrolment,
    /// The file of the join token. `None`: the configuration names none.
    token: Option<PathBuf>,
    channels: IdentityChannels,
    alarm: ExpiryAlarm,
    renew_at: SystemTime,
    bundle_every: Duration,
    /// Saved identity that is older than the present one.
    unsaved: bool,
    skew_is_reported: bool,
    /// The reason why the saved identity is not used.
    load_problem: Option<String>,
}

impl IdentityTask {
    pub fn new(enrolment: Enrolment, token: Option<PathBuf>, channels: IdentityChannels) -> IdentityTask {
        let load_problem = channels.status.borrow().problem.clone();
        IdentityTask {
            load_problem,
            enrolment,
            token,
            channels,
            alarm: ExpiryAlarm::default(),
            renew_at: SystemTime::UNIX_EPOCH,
            bundle_every: BUNDLE_EVERY,
            unsaved: false,
            skew_is_reported: false,
        }
    }

    pub async fn run(mut self) {
        if let Some(credentials) = self.credentials() {
            self.renew_at = renewal_time(&credentials);
            self.show(&credentials);
        }
        loop {
            match self.credentials() {
                Some(credentials) if !credentials.node.is_expired(SystemTime::now()) => {
                    self.keep_valid(&credentials).await;
                }
                expired => {
                    if let Some(expired) = &expired {
                        self.report_time(expired);
                    }
                    self.obtain(expired).await;
                }
            }
        }
    }

    fn credentials(&self) -> Option<Arc<NodeCredentials>> {
        self.channels.credentials.borrow().clone()
    }

    /// Waits until the trust bundle or the certificates are due, and asks for them.
    async fn keep_valid(&mut self, credentials: &Arc<NodeCredentials>) {
        self.report_time(credentials);
        let mut backoff = Backoff::decorrelated(RETRY_FIRST, retry_longest(credentials));
        let mut in_use = self.channels.bundle_in_use.clone();
        let reported = in_use.borrow_and_update().clone();
        if !self.needs_certificates(credentials) {
            let until_renewal = self.renew_at.duration_since(SystemTime::now()).unwrap_or_default();
            let pause = until_renewal.min(self.bundle_every + jitter(self.bundle_every / 3));
            tokio::select! {
                () = sleep(pause) => {}
                Ok(()) = in_use.changed() => sleep(jitter(TELLS_AFTER)).await,
            }
        }
        loop {
            let needs_certificates = self.needs_certificates(credentials);
            let in_use = in_use.borrow().clone().or_else(|| reported.clone());
            match self.enrolment.renew(credentials, needs_certificates, in_use).await {
                Ok((renewed, answer)) => return self.on_renewed(credentials, renewed, &answer).await,
                Err(error) => {
                    self.report_failure(&error);
                    self.report_time(credentials);
                    if !needs_certificates {
                        // The next request for the bundle is soon enough.
                        return;
                    }
                    let pause = if error.is_refusal() { REFUSED_PAUSE } else { backoff.next_pause() };
                    sleep(pause).await;
                    if credentials.node.is_expired(SystemTime::now()) {
                        return;
                    }
                }
            }
        }
    }

    fn needs_certificates(&self, credentials: &NodeCredentials) -> bool {
        let needed = self.enrolment.configured.needed(&credentials.granted);
        let lacks_one = needed.iter().any(|service| !credentials.services.contains_key(service));
        lacks_one || self.renew_at <= SystemTime::now()
    }

    async fn on_renewed(
        &mut self,
        old: &NodeCredentials,
        renewed: TimedAnswer<NodeCredentials>,
        answer: &RenewAnswer,
    ) {
        self.report_clock();
        if answer.ask_again_in > 0 {
            self.bundle_every = Duration::from_secs(answer.ask_again_in).min(BUNDLE_AT_LAST);
        }
        let has_certificates = renewed.answer.issued != old.issued;
        let is_changed =
            has_certificates || renewed.answer.bundle != old.bundle || renewed.answer.granted != old.granted;
        if has_certificates {
            self.renew_at = renewal_time(&renewed.answer);
            self.alarm.reset();
            self.channels.status.send_modify(|status| status.renewals += 1);
            debug!("renewed the certificates of this node");
        }
        if answer.renew_now && !has_certificates {
            // The authority has changed, and a random delay spreads the renewals of the fleet.
            self.renew_at = SystemTime::now() + jitter(BUNDLE_JITTER);
        }
        if renewed.answer.bundle != old.bundle {
            info!(bundle = renewed.answer.bundle.version(), "the trust bundle has changed");
        }
        let credentials = Arc::new(renewed.answer);
        if is_changed || self.unsaved {
            self.save(&credentials).await;
        }
        self.channels.status.send_modify(|status| {
            status.problem = None;
            status.bundle_confirmed = Some(renewed.answered_at);
        });
        if is_changed {
            self.publish(&credentials);
        }
        self.report_time(&credentials);
    }

    /// Waits for an identity: from a join, or from `vmesh-agent join`.
    async fn obtain(&mut self, expired: Option<Arc<NodeCredentials>>) {
        let mut backoff = Backoff::decorrelated(RETRY_FIRST, RETRY_LAST);
        let (mut last_tried, mut retry_at) = (None, Instant::now());
        loop {
            match self.read_token().await {
                Err(error) => self.report_no_token(&error, expired.as_deref()),
                // A token that differs from the last one needs no pause.
                Ok((token, path)) if last_tried != Some(token.id) || retry_at <= Instant::now() => {
                    match self.join(&token, path).await {
                        Ok(()) => return,
                        Err(error) => {
                            self.report_failure(&error);
                            let pause = if error.is_refusal() { REFUSED_PAUSE } else { backoff.next_pause() };
                            (last_tried, retry_at) = (Some(token.id), Instant::now() + pause);
                        }
                    }
                }
                Ok(_) => {}
            }
            let until_retry = retry_at.saturating_duration_since(Instant::now());
            sleep(if until_retry.is_zero() { LOOKS_EVERY } else { until_retry.min(LOOKS_EVERY) }).await;
            if let Ok(Some(saved)) = self.enrolment.load().await
                && !saved.node.is_expired(SystemTime::now())
            {
                info!(id = %saved.node.id, "this node has an identity now");
                self.channels.status.send_modify(|status| status.problem = None);
                self.renew_at = renewal_time(&saved);
                return self.publish(&Arc::new(saved));
            }
        }
    }

    async fn read_token(&self) -> Result<(JoinToken, PathBuf), TokenError> {
        let path = self.token.clone().ok_or(TokenError::NoFile)?;
        blocking(move || token::read_token(&path).map(|token| (token, path))).await
    }

    async fn join(&mut self, token: &JoinToken, path: PathBuf) -> Result<(), RenewError> {
        self.channels.status.send_modify(|status| status.stage = IdentityStage::Joining);
        let joined = self.enrolment.join(token).await?;
        self.report_clock();
        let credentials = Arc::new(joined.answer);
        info!(id = %credentials.node.id, "joined the mesh");
        self.save(&credentials).await;
        if !self.unsaved {
            info!("{}", blocking(move || token::delete_token(&path)).await);
        }
        self.channels.status.send_modify(|status| {
            status.problem = None;
            status.bundle_confirmed = Some(joined.answered_at);
        });
        self.renew_at = renewal_time(&credentials);
        self.publish(&credentials);
        Ok(())
    }

    async fn save(&mut self, credentials: &Arc<NodeCredentials>) {
        let saved = self.enrolment.save(credentials).await;
        self.unsaved = saved.is_err();
        let why_not = saved.err().map(|error| one_line(&error));
        if let Some(why) = &why_not {
            warn!("could not save the identity of this node, which is lost at the next restart: {why}");
        }
        self.channels.status.send_modify(|status| status.why_not_saved = why_not);
    }

    fn publish(&mut self, credentials: &Arc<NodeCredentials>) {
        self.show(credentials);
        self.channels.credentials.send_replace(Some(Arc::clone(credentials)));
    }

    fn show(&self, credentials: &NodeCredentials) {
        let not_granted = self.enrolment.configured.not_granted(&credentials.granted);
        self.channels.status.send_modify(|status| {
            if !not_granted.is_empty() && status.not_granted != not_granted {
                let names: Vec<_> = not_granted.iter().map(ServiceName::to_string).collect();
                warn!(
                    "this node may not run or call as {}: create a join token with `--service`, and join again",
                    names.join(", ")
                );
            }
            status.show(credentials, &self.enrolment.configured);
        });
    }

    /// Warns when little of the validity is left.
    fn report_time(&mut self, credentials: &NodeCredentials) {
        let now = SystemTime::now();
        if let Some(percent) = self.alarm.check(credentials.share_left(now)) {
            let problem = self.channels.status.borrow().problem.clone().unwrap_or_default();
            let left = credentials.not_after().duration_since(now).unwrap_or_default().as_secs();
            warn!(
                "the certificates of this node expire in {left} s: less than {percent} % of their validity is left, and they were not renewed: {problem}"
            );
        }
    }

    fn report_failure(&mut self, error: &RenewError) {
        // A wrong clock is a likely cause.
        self.report_clock();
        let text = one_line(error);
        let mut is_news = false;
        self.channels.status.send_modify(|status| {
            status.failures += 1;
            is_news = status.problem.as_ref() != Some(&text);
            status.problem = Some(text.clone());
        });
        if is_news {
            warn!("{text}");
        }
    }

    /// Reports that the node waits for a token.
    fn report_no_token(&self, error: &TokenError, expired: Option<&NodeCredentials>) {
        let text = match expired {
            Some(_) => format!(
                "the certificate of this node has expired, and a new token is needed: {}",
                one_line(error)
            ),
            None => match &self.load_problem {
                Some(problem) => format!("{problem}; {}", one_line(error)),
                None => format!("this node has no identity: {}", one_line(error)),
            },
        };
        let mut is_news = false;
        self.channels.status.send_modify(|status| {
            status.stage = match expired {
                Some(_) => IdentityStage::Expired,
                None => IdentityStage::WaitingForToken,
            };
            is_news = status.problem.as_ref() != Some(&text);
            status.problem = Some(text.clone());
        });
        if is_news {
            warn!("{text}");
        }
    }

    fn report_clock(&mut self) {
        let Some(skew) = self.enrolment.clock_skew else { return };
        let is_far = skew.unsigned_abs() > SKEW_TOLERATED.as_secs();
        if is_far && !self.skew_is_reported {
            warn!(
                "the clock of the control plane is {skew} s ahead of this host's: correct the wrong one, since certificates are valid by the clock"
            );
        }
        self.skew_is_reported = is_far;
        self.channels.status.send_modify(|status| status.clock_skew = Some(skew));
    }
}

/// Returns the time at which the certificates are renewed: when a third of their validity has passed, and a random time later.
fn renewal_time(credentials: &NodeCredentials) -> SystemTime {
    let lifetime = credentials.lifetime();
    credentials.issued + lifetime / RENEWS_AFTER + jitter(lifetime / RENEWS_WITHIN)
}

/// Returns the longest pause between attempts to renew: short certificates allow for a short one only.
fn retry_longest(credentials: &NodeCredentials) -> Duration {
    (credentials.lifetime() / 20).clamp(RETRY_FIRST, RETRY_LAST)
}
