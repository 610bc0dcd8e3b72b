//! Certificates and their verification.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::digest::{SHA256, digest};
use pem::{EncodeConfig, LineEnding, Pem};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, SignatureVerificationAlgorithm, UnixTime};
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::extensions::GeneralName;
use x509_parser::oid_registry::Oid;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::bundle::TrustBundle;
use crate::grant::{BadGrant, GRANT_OID, NodeGrant};
use crate::name::{InvalidId, SpiffeId};

/// The most certificates of a chain: a leaf, two intermediates, and a root with its cross-signed copy.
const MAX_CHAIN: usize = 5;
/// The most bytes of a chain in PEM.
const MAX_PEM: usize = 64 << 10;
/// The signature algorithms that a chain may use.
const ALGORITHMS: &[&dyn SignatureVerificationAlgorithm] =
    &[webpki::aws_lc_rs::ECDSA_P256_SHA256, webpki::aws_lc_rs::ECDSA_P384_SHA384];

/// A text or bytes that are no certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadCertificate {
    #[error("there is no `BEGIN CERTIFICATE` in it")]
    Empty,
    #[error("it has more than {MAX_CHAIN} certificates or {MAX_PEM} bytes")]
    TooLong,
    #[error("it is not a chain of certificates in PEM: {0}")]
    Pem(String),
    #[error("it is not an X.509 certificate: {0}")]
    Der(String),
    #[error("it has no URI among its subject alternative names")]
    NoId,
    #[error("it has more than one URI among its subject alternative names")]
    ManyIds,
    #[error("its URI is not an id of the mesh")]
    Id(#[source] InvalidId),
    #[error("its rights cannot be read")]
    Grant(#[source] BadGrant),
}

/// A certificate that was read, and is not verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    pub der: CertificateDer<'static>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    pub is_authority: bool,
    /// The SHA-256 of the subject's public key (`SubjectPublicKeyInfo`): what a pin names.
    pub key_hash: [u8; 32],
    /// The rights of the node, if the certificate is a node's.
    pub grant: Option<NodeGrant>,
    /// The URIs among the subject alternative names.
    uris: Vec<String>,
    /// The DNS names among the subject alternative names.
    pub dns_names: Vec<String>,
}

impl Certificate {
    /// Reads a certificate in DER.
    pub fn read(der: &CertificateDer<'_>) -> Result<Certificate, BadCertificate> {
        let bad = |error: &dyn std::fmt::Display| BadCertificate::Der(error.to_string());
        let (rest, parsed) = X509Certificate::from_der(der).map_err(|error| bad(&error))?;
        if !rest.is_empty() {
            return Err(bad(&"bytes follow it"));
        }
        let time = |at: i64| UNIX_EPOCH + Duration::from_secs(u64::try_from(at).unwrap_or(0));
        let names = parsed.subject_alternative_name().map_err(|error| bad(&error))?;
        let dns_names =
            names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
                GeneralName::DNSName(name) => Some((*name).to_owned()),
                _ => None,
            });
        let dns_names = dns_names.collect();
        let uris = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        });
        let oid = Oid::from(&GRANT_OID).map_err(|_| bad(&"the identifier of its rights is not valid"))?;
        let grant = parsed.get_extension_unique(&oid).map_err(|error| bad(&error))?;
        let grant = grant.map(|extension| NodeGrant::decode(extension.value)).transpose();
        let hash = digest(&SHA256, parsed.tbs_certificate.subject_pki.raw);
        Ok(Certificate {
            not_before: time(parsed.validity().not_before.timestamp()),
            not_after: time(parsed.validity().not_after.timestamp()),
            is_authority: parsed.is_ca(),
            key_hash: hash.as_ref().try_into().unwrap_or_default(),
            grant: grant.map_err(BadCertificate::Grant)?,
            uris: uris.collect(),
            dns_names,
            der: der.clone().into_owned(),
        })
    }

    /// Returns the SPIFFE id, of which a certificate has exactly one.
    pub fn id(&self) -> Result<SpiffeId, BadCertificate> {
        self.uri()?.parse().map_err(BadCertificate::Id)
    }

    /// Returns the SHA-256 of the subject's public key in hexadecimal digits.
    pub fn key_hash_hex(&self) -> String {
        hex(&self.key_hash)
    }

    /// Returns the only URI among the subject alternative names.
    pub(crate) fn uri(&self) -> Result<&str, BadCertificate> {
        match self.uris.as_slice() {
            [] => Err(BadCertificate::NoId),
            [uri] => Ok(uri),
            [..] => Err(BadCertificate::ManyIds),
        }
    }
}

/// A certificate, followed by the ones that signed it. It is never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateChain(Vec<CertificateDer<'static>>);

impl CertificateChain {
    /// Returns the chain that begins with `leaf`.
    pub fn new(leaf: CertificateDer<'static>, issuers: &[CertificateDer<'static>]) -> CertificateChain {
        let mut chain = vec![leaf];
        chain.extend_from_slice(issuers);
        CertificateChain(chain)
    }

    /// Makes a chain of the certificates that a peer showed, the leaf first.
    pub fn from_der(certificates: &[CertificateDer<'_>]) -> Result<CertificateChain, BadCertificate> {
        match certificates.len() {
            0 => Err(BadCertificate::Empty),
            1..=MAX_CHAIN => {
                Ok(CertificateChain(certificates.iter().map(|der| der.clone().into_owned()).collect()))
            }
            _ => Err(BadCertificate::TooLong),
        }
    }

    /// Reads a chain in PEM: the leaf first, at most [`MAX_CHAIN`] certificates.
    pub fn from_pem(pem: &str) -> Result<CertificateChain, BadCertificate> {
        if pem.len() > MAX_PEM {
            return Err(BadCertificate::TooLong);
        }
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
        let certificates = certificates.map_err(|error| BadCertificate::Pem(error.to_string()))?;
        match certificates.len() {
            0 => Err(BadCertificate::Empty),
            1..=MAX_CHAIN => Ok(CertificateChain(certificates)),
            _ => Err(BadCertificate::TooLong),
        }
    }

    pub fn to_pem(&self) -> String {
        self.0.iter().map(pem).collect()
    }

    /// Returns the certificates in DER, the leaf first.
    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.0
    }

    /// Reads the first certificate.
    pub fn leaf(&self) -> Result<Certificate, BadCertificate> {
        Certificate::read(self.0.first().ok_or(BadCertificate::Empty)?)
    }
}

/// Returns the bytes of a certificate as a certificate in DER, which is not checked.
pub fn der(bytes: &[u8]) -> CertificateDer<'static> {
    CertificateDer::from(bytes.to_vec())
}

/// Returns bytes in hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns one certificate in PEM, as OpenSSL writes it.
pub fn pem(der: &CertificateDer<'_>) -> String {
    let config = EncodeConfig::new().set_line_ending(LineEnding::LF);
    pem::encode_config(&Pem::new("CERTIFICATE", der.to_vec()), config)
}

/// The reason why a chain proves no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RejectedChain {
    #[error("the certificate cannot be used")]
    Bad(#[source] BadCertificate),
    #[error("the certificate has expired")]
    Expired,
    #[error("the certificate is not valid yet; compare the clocks of both hosts")]
    NotYetValid,
    #[error("a certificate authority's certificate was shown as a leaf")]
    AuthorityAsLeaf,
    #[error("no root of the trust bundle signed it")]
    UnknownIssuer,
    #[error("it is not the certificate of a control plane")]
    NotAControlPlane,
    #[error("its trust domain `{0}` is not that of the mesh")]
    TrustDomain(String),
    #[error("the chain is not valid: {0}")]
    Invalid(String),
}

/// Verifies that `chain` leads to a root of `bundle`, is valid at `now`, and names one identity of the bundle's trust domain. Returns
/// that identity.
pub fn verify(
    chain: &CertificateChain,
    bundle: &TrustBundle,
    now: SystemTime,
) -> Result<SpiffeId, RejectedChain> {
    let leaf = chain.leaf().map_err(RejectedChain::Bad)?;
    if leaf.is_authority {
        return Err(RejectedChain::AuthorityAsLeaf);
    }
    let (first, issuers) =
        chain.certificates().split_first().ok_or(RejectedChain::Bad(BadCertificate::Empty))?;
    let invalid = |error: webpki::Error| match error {
        webpki::Error::CertExpired { .. } => RejectedChain::Expired,
        webpki::Error::CertNotValidYet { .. } => RejectedChain::NotYetValid,
        webpki::Error::CaUsedAsEndEntity => RejectedChain::AuthorityAsLeaf,
        webpki::Error::UnknownIssuer => RejectedChain::UnknownIssuer,
        other => RejectedChain::Invalid(format!("{other:?}")),
    };
    let anchors: Result<Vec<_>, _> = bundle.roots().iter().map(webpki::anchor_from_trusted_cert).collect();
    let anchors = anchors.map_err(invalid)?;
    let since_epoch = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let end_entity = EndEntityCert::try_from(first).map_err(invalid)?;
    for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
        let time = UnixTime::since_unix_epoch(since_epoch);
        end_entity
            .verify_for_usage(ALGORITHMS, &anchors, issuers, time, usage, None, None)
            .map_err(invalid)?;
    }
    let id = leaf.id().map_err(RejectedChain::Bad)?;
    match id.trust_domain == *bundle.trust_domain() {
        true => Ok(id),
        false => Err(RejectedChain::TrustDomain(id.trust_domain.to_string())),
    }
}
