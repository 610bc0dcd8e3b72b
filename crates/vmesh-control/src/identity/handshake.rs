//! TLS on `listen.xds`.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use vmesh_daemon::connections::Origin;
use vmesh_xds::server::{Handshake, PeerInfo};

use super::IdentityService;
use crate::audit::{AuditEvent, Outcome};

/// Completes the TLS handshake of each connection with the settings that are current when it begins. Without an authority, every
/// connection is closed.
#[derive(Clone)]
pub(crate) struct TlsHandshake(pub(crate) Arc<IdentityService>);

impl Handshake<TcpStream> for TlsHandshake {
    type Io = TlsStream<TcpStream>;

    async fn complete(&self, io: TcpStream, peer: PeerInfo) -> Option<(TlsStream<TcpStream>, PeerInfo)> {
        let acceptor = TlsAcceptor::from(self.0.authority()?.tls());
        match acceptor.accept(io).await {
            Ok(io) => {
                let certificate = io.get_ref().1.peer_certificates().and_then(|shown| shown.first());
                let certificate = certificate.map(|leaf| Arc::from(leaf.as_ref()));
                Some((io, PeerInfo { certificate, is_tls: true, ..peer }))
            }
            Err(error) => {
                self.0.counters.handshakes_failed.fetch_add(1, Relaxed);
                let origin = peer.address.map(|address| Origin::Address(address.ip().to_canonical()));
                let event =
                    AuditEvent::of_request(origin, "xds.handshake", Outcome::Denied, &error.to_string());
                self.0.audit.record(event);
                None
            }
        }
    }
}
