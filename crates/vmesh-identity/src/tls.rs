//! The TLS settings of the connections between agents, operators and control planes. Both ends verify SPIFFE ids; host names in
//! certificates mean nothing.
//!
//! Sessions are never resumed: each connection is verified with the bundle that is current when it begins.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};

use crate::bundle::TrustBundle;
use crate::certificate::{Certificate, CertificateChain, RejectedChain, verify};
use crate::key::Key;
use crate::name::Identity;

/// The application protocol of the mTLS port.
const HTTP2: &[u8] = b"h2";

/// A certificate or a key that TLS cannot use.
#[derive(Debug, thiserror::Error)]
#[error("could not use the certificate and its key for TLS")]
pub struct TlsError(#[from] rustls::Error);

/// The proof by which a client accepts a control plane.
#[derive(Debug, Clone)]
pub enum ServerTrust {
    /// The SHA-256 of the public key of a root, which a join token pins.
    Pin([u8; 32]),
    Bundle(TrustBundle),
}

/// Returns the TLS settings of a control plane that shows `chain`. A client without a certificate is let in, and the caller decides
/// what it may do; a certificate that `bundle` does not verify ends the handshake.
pub fn server_config(
    chain: &CertificateChain,
    key: &Key,
    bundle: TrustBundle,
) -> Result<ServerConfig, TlsError> {
    let provider = provider();
    let algorithms = provider.signature_verification_algorithms;
    let verifier = Arc::new(ClientVerifier { bundle, algorithms });
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain.certificates().to_vec(), private_key(key))?;
    config.alpn_protocols = vec![HTTP2.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Returns the TLS settings of a client of a control plane, which shows `identity` if it has one.
pub fn client_config(
    identity: Option<(&CertificateChain, &Key)>,
    trust: ServerTrust,
) -> Result<ClientConfig, TlsError> {
    let provider = provider();
    let algorithms = provider.signature_verification_algorithms;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier { trust, algorithms }));
    let mut config = match identity {
        Some((chain, key)) => {
            builder.with_client_auth_cert(chain.certificates().to_vec(), private_key(key))?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![HTTP2.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// Returns a server name for a TLS client, which needs one and whose peer ignores it.
pub fn any_server_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED).into())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn private_key(key: &Key) -> PrivateKeyDer<'static> {
    PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.to_der().to_vec()))
}

fn time(now: UnixTime) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(now.as_secs())
}

fn chain(
    leaf: &CertificateDer<'_>,
    others: &[CertificateDer<'_>],
) -> Result<CertificateChain, RejectedChain> {
    let all: Vec<CertificateDer<'_>> = std::iter::once(leaf).chain(others).cloned().collect();
    CertificateChain::from_der(&all).map_err(RejectedChain::Bad)
}

/// Returns the TLS alert for a chain that was rejected.
fn tls_error(rejected: RejectedChain) -> rustls::Error {
    let error = match rejected {
        RejectedChain::Expired => CertificateError::Expired,
        RejectedChain::NotYetValid => CertificateError::NotValidYet,
        RejectedChain::UnknownIssuer => CertificateError::UnknownIssuer,
        RejectedChain::AuthorityAsLeaf | RejectedChain::NotAControlPlane | RejectedChain::TrustDomain(_) => {
            CertificateError::ApplicationVerificationFailure
        }
        other => CertificateError::Other(rustls::OtherError(Arc::new(other))),
    };
    rustls::Error::InvalidCertificate(error)
}

/// Verifies the certificates of clients.
#[derive(Debug)]
struct ClientVerifier {
    bundle: TrustBundle,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let chain = chain(leaf, others).map_err(tls_error)?;
        verify(&chain, &self.bundle, time(now)).map_err(tls_error)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Verifies that a server is a control plane.
#[derive(Debug)]
struct ServerVerifier {
    trust: ServerTrust,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerVerifier {
    fn verify(&self, chain: &CertificateChain, now: SystemTime) -> Result<(), RejectedChain> {
        let bundle = match &self.trust {
            ServerTrust::Bundle(bundle) => bundle.clone(),
            ServerTrust::Pin(pin) => pinned(chain, pin)?,
        };
        match verify(chain, &bundle, now)?.identity {
            Identity::ControlPlane(_) => Ok(()),
            Identity::Node(_) | Identity::Service(_) | Identity::Operator(..) => {
                Err(RejectedChain::NotAControlPlane)
            }
        }
    }
}

/// Returns the bundle of the pinned root among the certificates that a server showed.
fn pinned(chain: &CertificateChain, pin: &[u8; 32]) -> Result<TrustBundle, RejectedChain> {
    let trust_domain = chain.leaf().and_then(|leaf| leaf.id()).map_err(RejectedChain::Bad)?.trust_domain;
    let is_pinned =
        |der: &&CertificateDer<'static>| Certificate::read(der).is_ok_and(|root| root.key_hash == *pin);
    let root = chain.certificates().iter().find(is_pinned).ok_or(RejectedChain::UnknownIssuer)?;
    TrustBundle::new(trust_domain, vec![root.clone()]).map_err(|_| RejectedChain::UnknownIssuer)
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let chain = chain(leaf, others).map_err(tls_error)?;
        self.verify(&chain, time(now)).map_err(tls_error)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests;
