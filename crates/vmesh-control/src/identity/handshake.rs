//! TLS on `listen.xds`.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use vmesh_xds::server::{Handshake, PeerInfo};

use super::IdentityService;

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
                let from = peer.address.map(|address| address.ip().to_canonical().to_string());
                tracing::info!(from, "a TLS handshake at listen.xds failed: {error}");
                None
            }
        }
    }
}
