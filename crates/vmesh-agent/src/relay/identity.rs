//! The certificates of the node on Envoy's streams, and whether Envoy accepts mTLS connections with them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::warn;
use vmesh_xds::server::{FeedControl, Hub, Publication};
use vmesh_xds::{Event, Kind, Relay, Resource, Scope};

use super::CLASS;
use super::admission::AdmittedClient;
use crate::credentials::secrets::{self, TRUST_BUNDLE, TakenSecrets};
use crate::credentials::status::IdentityStatus;
use crate::credentials::{ConfiguredServices, CredentialsReceiver, NodeCredentials};

/// The interval of warnings about clients that may not have secrets and ask for them.
const REPORTS_EVERY: Duration = Duration::from_secs(60);

/// The identity of the node, for the relay.
pub struct RelayIdentity {
    pub credentials: CredentialsReceiver,
    pub configured: ConfiguredServices,
    /// The version of the trust bundle that Envoy uses.
    pub bundle_in_use: watch::Sender<Option<String>>,
    pub status: watch::Sender<IdentityStatus>,
    /// The address at which Envoy receives mTLS connections. `None`: it receives none.
    pub mtls_address: Option<SocketAddr>,
}

/// The secrets that Envoy is served, and what Envoy makes of them.
pub(super) struct SecretServer {
    identity: RelayIdentity,
    /// Publishes the scope of clients that may have secrets, for those that connect.
    with_secrets: watch::Sender<Arc<Scope>>,
    served: Vec<Arc<Resource>>,
    bundle: Option<String>,
    taken: TakenSecrets,
    /// The streams of clients that may have secrets.
    feeds: BTreeMap<u64, FeedControl>,
    /// The streams of other clients that have not asked for secrets, with the clients' users.
    strangers: BTreeMap<u64, Option<u32>>,
    reported_at: Option<Instant>,
    /// True if Envoy has the listener for mTLS, whose connections need the trust bundle.
    has_listener: bool,
    /// True if Envoy accepts mTLS connections of other nodes.
    is_ready: bool,
}

impl SecretServer {
    /// Makes a server of secrets. An Envoy that had the listener for mTLS when the agent was stopped is ready: it has its certificates.
    pub(super) fn new(
        identity: RelayIdentity,
        with_secrets: watch::Sender<Arc<Scope>>,
        relay: &Relay,
    ) -> SecretServer {
        let mut server = SecretServer {
            identity,
            with_secrets,
            served: Vec::new(),
            bundle: None,
            taken: TakenSecrets::default(),
            feeds: BTreeMap::new(),
            strangers: BTreeMap::new(),
            reported_at: None,
            has_listener: false,
            is_ready: false,
        };
        server.take_credentials();
        server.has_listener = server.finds_listener(relay);
        server.is_ready = server.has_certificates() && server.has_listener;
        server.publish_state();
        server
    }

    pub(super) fn is_ready(&self) -> bool {
        self.is_ready
    }

    pub(super) fn credentials(&self) -> &CredentialsReceiver {
        &self.identity.credentials
    }

    /// Waits until the credentials have changed. Cancel-safe.
    pub(super) async fn credentials_changed(&mut self) {
        if self.identity.credentials.changed().await.is_err() {
            // The task of the identity has ended, and so will the daemon.
            std::future::pending().await
        }
    }

    /// Serves the present credentials to all clients that may have secrets.
    pub(super) fn serve_credentials(&mut self, hub: &Hub) {
        if !self.take_credentials() {
            return;
        }
        let scope = self.with_secrets.borrow().clone();
        let publish = |publication: Publication, feed| publication.scope(feed, CLASS, scope.clone());
        hub.publish_all(self.feeds.values().fold(Publication::new(), publish));
        self.publish_state();
    }

    /// Reads the present credentials. Returns `false` if the secrets are the same as before.
    fn take_credentials(&mut self) -> bool {
        let credentials = self.identity.credentials.borrow_and_update().clone();
        let Some(credentials) = credentials else { return false };
        let secrets = secrets::secrets(&credentials, &self.identity.configured);
        if secrets == self.served {
            return false;
        }
        self.bundle = Some(credentials.bundle.version());
        self.with_secrets.send_replace(Arc::new(Scope::all().with_own(secrets.iter().cloned())));
        self.served = secrets;
        true
    }

    pub(super) fn on_connected(&mut self, stream: u64, client: AdmittedClient, hub: &Hub) {
        let feed = match client {
            AdmittedClient::WithSecrets(feed) => feed,
            AdmittedClient::WithoutSecrets(uid) => {
                self.strangers.insert(stream, uid);
                return;
            }
        };
        // The secrets may have changed since the client was admitted.
        let scope = self.with_secrets.borrow().clone();
        hub.publish_all(Publication::new().scope(&feed, CLASS, scope));
        self.feeds.insert(stream, feed);
    }

    pub(super) fn on_event(&mut self, stream: u64, event: &Event) {
        if event.kind() != Kind::Secret {
            return;
        }
        // A client without secrets may subscribe to them, and waits for ever.
        if let Some(uid) = self.strangers.remove(&stream) {
            self.report_stranger(uid);
        } else if self.feeds.contains_key(&stream) {
            self.taken.on_event(stream, event);
            self.publish_state();
        }
    }

    /// Reports a client of another user that asks for secrets, at most once in a minute.
    fn report_stranger(&mut self, uid: Option<u32>) {
        if self.reported_at.is_none_or(|at| at.elapsed() >= REPORTS_EVERY) {
            self.reported_at = Some(Instant::now());
            warn!(
                uid,
                "a client of xds.sock asks for certificates and gets none: they are for Envoy's user alone"
            );
        }
    }

    pub(super) fn on_disconnected(&mut self, stream: u64) {
        self.feeds.remove(&stream);
        self.strangers.remove(&stream);
        self.taken.on_disconnected(stream);
        self.publish_state();
    }

    /// Iterates over the secrets that Envoy rejects, with its reasons.
    pub(super) fn rejections(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<str>)> {
        self.taken.rejections()
    }

    /// Decides anew whether Envoy accepts mTLS connections. Returns `true` if that has changed.
    pub(super) fn update_readiness(&mut self, relay: &Relay) -> bool {
        self.has_listener = self.finds_listener(relay);
        let is_ready = self.has_listener
            && match self.is_ready {
                // Envoy serves with the previous certificate until it has taken the renewed one.
                true => self.has_certificates(),
                false => self.has_certificates() && self.envoy_has_certificates(),
            };
        let is_changed = std::mem::replace(&mut self.is_ready, is_ready) != is_ready;
        if is_changed {
            self.publish_state();
        }
        is_changed
    }

    fn finds_listener(&self, relay: &Relay) -> bool {
        let Some(address) = self.identity.mtls_address else { return false };
        relay.in_force(Kind::Listener, &format!("mtls|{address}")).is_some()
    }

    /// Reports whether the node has a certificate for each of its workloads that it may run.
    fn has_certificates(&self) -> bool {
        let credentials = self.identity.credentials.borrow();
        credentials.as_deref().is_some_and(|credentials: &NodeCredentials| {
            let mut workloads = self.identity.configured.workloads.iter();
            workloads.all(|service| {
                !credentials.granted.contains(service) || credentials.services.contains_key(service)
            })
        })
    }

    /// Reports whether Envoy has taken the trust bundle and the certificates of the workloads.
    fn envoy_has_certificates(&self) -> bool {
        let workloads = self.identity.configured.workloads.iter().map(secrets::workload);
        let of_listener: BTreeSet<_> = workloads.chain([TRUST_BUNDLE.to_owned()]).collect();
        let mut served =
            self.served.iter().filter(|secret| of_listener.contains(&**secret.name())).peekable();
        served.peek().is_some() && served.all(|secret| self.taken.have_all(secret, true))
    }

    fn publish_state(&self) {
        let bundle = self.served.iter().find(|secret| **secret.name() == *TRUST_BUNDLE);
        // The agent does not know which bundle Envoy uses while Envoy is not connected.
        if bundle.is_some_and(|bundle| self.taken.have_all(bundle, self.has_listener)) {
            self.identity.bundle_in_use.send_if_modified(|in_use| {
                let is_news = *in_use != self.bundle;
                in_use.clone_from(&self.bundle);
                is_news
            });
        }
        self.identity.status.send_if_modified(|status| {
            std::mem::replace(&mut status.mtls_ready, self.is_ready) != self.is_ready
        });
    }
}
