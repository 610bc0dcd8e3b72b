//! The clients of the agent's xDS socket: Envoys, and programs that look at the configuration.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{mpsc, watch};
use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_xds::server::{Admission, Admitted, FeedControl, Hub, Observer, PeerInfo, Refusal};
use vmesh_xds::{Event, Scope, SessionStatus};

use super::CLASS;
use crate::credentials::secrets::SecretReaders;

/// An event on one of the xDS streams of Envoy, with the number of the stream.
pub(super) enum DownstreamEvent {
    Connected(u64, AdmittedClient),
    Event(u64, Event),
    Disconnected(u64),
}

/// The rights of a client.
pub(super) enum AdmittedClient {
    /// The client may have secrets, which are put into its scope.
    WithSecrets(FeedControl),
    /// The client is of another user, whose number is known on a Unix socket.
    WithoutSecrets(Option<u32>),
}

/// Admits every client: the mode of the socket decides who may connect. Secrets are for Envoy's user, for root, and for the agent's user.
pub(super) struct EnvoyAdmission {
    pub hub: Hub,
    pub events: mpsc::UnboundedSender<DownstreamEvent>,
    pub streams: AtomicU64,
    pub readers: SecretReaders,
    /// Publishes the scope of clients that may have secrets.
    pub with_secrets: watch::Receiver<Arc<Scope>>,
}

impl Admission for EnvoyAdmission {
    fn admit(&self, _: &Node, peer: &PeerInfo) -> Result<Admitted, Refusal> {
        let number = self.streams.fetch_add(1, Ordering::Relaxed);
        let may_have_secrets = self.readers.include(peer.uid);
        let scope = match may_have_secrets {
            true => self.with_secrets.borrow().clone(),
            false => Arc::new(Scope::all()),
        };
        let feed = self.hub.subscribe(CLASS, scope);
        let client = match may_have_secrets {
            true => AdmittedClient::WithSecrets(feed.control()),
            false => AdmittedClient::WithoutSecrets(peer.uid),
        };
        _ = self.events.send(DownstreamEvent::Connected(number, client));
        Ok(Admitted { feed, observer: Box::new(EnvoyObserver { number, events: self.events.clone() }) })
    }
}

struct EnvoyObserver {
    number: u64,
    events: mpsc::UnboundedSender<DownstreamEvent>,
}

impl Observer for EnvoyObserver {
    fn on_status(&mut self, _: &SessionStatus) {}

    fn on_event(&mut self, event: Event) {
        _ = self.events.send(DownstreamEvent::Event(self.number, event));
    }

    fn wants_events(&self) -> bool {
        true
    }
}

impl Drop for EnvoyObserver {
    fn drop(&mut self) {
        _ = self.events.send(DownstreamEvent::Disconnected(self.number));
    }
}
