//! The certificate authority of a mesh: a root that may be offline, and an intermediate for each replica of the control plane.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CustomExtension, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;

use crate::bundle::{BadBundle, TrustBundle};
use crate::certificate::{BadCertificate, Certificate, CertificateChain};
use crate::grant::{BadGrant, GRANT_OID, Subject, node_dns_name};
use crate::key::{Key, KeyError};
use crate::name::TrustDomain;
use crate::tls::TlsError;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// The most bytes of a certificate request in PEM; a request with a P-256 key has about 400.
const MAX_REQUEST: usize = 8 << 10;

/// The validity of certificates, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetimes {
    pub root: Duration,
    pub intermediate: Duration,
    pub leaf: Duration,
    /// The time by which each validity begins in the past, for hosts whose clocks are slow.
    pub backdate: Duration,
}

impl Default for Lifetimes {
    fn default() -> Self {
        Lifetimes {
            root: DAY * 3650,
            intermediate: DAY * 90,
            leaf: DAY * 2,
            backdate: Duration::from_secs(300),
        }
    }
}

/// An error of the certificate authority: in issuing a certificate, or in making or reading the authority.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("could not use the key of the certificate authority")]
    Key(#[source] KeyError),
    #[error("could not read the certificate of the authority")]
    Certificate(#[source] BadCertificate),
    #[error("could not make the trust bundle")]
    Bundle(#[source] BadBundle),
    #[error("the first certificate is not that of an authority: it was issued for a workload or a server")]
    NotAnAuthority,
    #[error("the key does not belong to the first certificate")]
    WrongKey,
    #[error("the authority is for the trust domain `{found}`, and the mesh is `{expected}`")]
    TrustDomain { found: String, expected: TrustDomain },
    #[error("the certificate request is larger than {MAX_REQUEST} bytes")]
    LargeRequest,
    #[error("the certificate request is not valid, or its signature is not that of its key")]
    Request(#[source] rcgen::Error),
    #[error(
        "the intermediate certificate of this control plane has expired: run `vmeshctl ca rotate --intermediate`"
    )]
    Expired,
    #[error("could not sign a certificate")]
    Sign(#[source] rcgen::Error),
    #[error("could not write the node's rights into its certificate")]
    Grant(#[source] BadGrant),
    #[error("could not make the TLS settings of `listen.xds`")]
    Tls(#[source] TlsError),
    #[error("could not get random bytes from the operating system")]
    Random,
}

/// The root of a mesh, with its key.
#[derive(Debug)]
pub struct Root {
    trust_domain: TrustDomain,
    key: Key,
    certificate: CertificateDer<'static>,
}

impl Root {
    /// Makes a root that is valid from `now`.
    pub fn generate(
        trust_domain: &TrustDomain,
        now: SystemTime,
        lifetimes: &Lifetimes,
    ) -> Result<Root, AuthorityError> {
        let key = Key::generate().map_err(AuthorityError::Key)?;
        let validity = Validity::from(now, lifetimes.root, lifetimes);
        let params = authority_params(trust_domain, "root", BasicConstraints::Unconstrained, validity)?;
        let certificate = params.self_signed(key.pair()).map_err(AuthorityError::Sign)?;
        Ok(Root { trust_domain: trust_domain.clone(), key, certificate: certificate.der().clone() })
    }

    /// Reads a root from its certificate and its key, both in PEM.
    pub fn from_pem(certificate: &str, key: &str) -> Result<Root, AuthorityError> {
        let chain = CertificateChain::from_pem(certificate).map_err(AuthorityError::Certificate)?;
        let key = Key::from_pem(key).map_err(AuthorityError::Key)?;
        let (trust_domain, certificate) = authority(&chain, &key)?;
        Ok(Root { trust_domain, key, certificate })
    }

    pub fn key(&self) -> &Key {
        &self.key
    }

    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Makes the intermediate of the replica `name`. It signs leaves only, and no further authorities.
    pub fn issue_intermediate(
        &self,
        name: &str,
        now: SystemTime,
        lifetimes: &Lifetimes,
    ) -> Result<Issuer, AuthorityError> {
        let key = Key::generate().map_err(AuthorityError::Key)?;
        let root = Certificate::read(&self.certificate).map_err(AuthorityError::Certificate)?;
        let validity = Validity::from(now, lifetimes.intermediate, lifetimes).until(root.not_after);
        let params = authority_params(&self.trust_domain, name, BasicConstraints::Constrained(0), validity)?;
        let signer = rcgen::Issuer::from_ca_cert_der(&self.certificate, self.key.pair());
        let signer = signer.map_err(AuthorityError::Sign)?;
        let certificate = params.signed_by(key.pair(), &signer).map_err(AuthorityError::Sign)?;
        Issuer::new(
            key,
            &CertificateChain::new(certificate.der().clone(), std::slice::from_ref(&self.certificate)),
        )
    }
}

/// The intermediate of one replica, with its key: it issues the certificates of nodes, workloads, control planes and operators.
#[derive(Debug)]
pub struct Issuer {
    trust_domain: TrustDomain,
    key: Key,
    /// The intermediate, and what signed it, up to the root.
    chain: CertificateChain,
    not_after: SystemTime,
}

impl Issuer {
    /// Makes an issuer of a key and the chain of its certificate.
    pub fn new(key: Key, chain: &CertificateChain) -> Result<Issuer, AuthorityError> {
        let (trust_domain, _) = authority(chain, &key)?;
        let not_after = chain.leaf().map_err(AuthorityError::Certificate)?.not_after;
        Ok(Issuer { trust_domain, key, chain: chain.clone(), not_after })
    }

    /// Reads an issuer from the chain of its certificate (the intermediate first, the root last) and its key, both in PEM.
    pub fn from_pem(chain: &str, key: &str) -> Result<Issuer, AuthorityError> {
        let chain = CertificateChain::from_pem(chain).map_err(AuthorityError::Certificate)?;
        Issuer::new(Key::from_pem(key).map_err(AuthorityError::Key)?, &chain)
    }

    pub fn key(&self) -> &Key {
        &self.key
    }

    pub fn chain(&self) -> &CertificateChain {
        &self.chain
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Returns the end of the intermediate's validity.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Returns the bundle with the root of this issuer alone.
    pub fn bundle(&self) -> Result<TrustBundle, AuthorityError> {
        let root = self.chain.certificates().last().cloned().into_iter().collect();
        TrustBundle::new(self.trust_domain.clone(), root).map_err(AuthorityError::Bundle)
    }

    /// Issues a certificate for the key that signed `request` (a CSR in PEM), with the names of `subject`. Names, key usages and validity
    /// that the request asks for are ignored. The certificate does not outlive the intermediate.
    pub fn issue(
        &self,
        request: &str,
        subject: &Subject,
        now: SystemTime,
        lifetimes: &Lifetimes,
    ) -> Result<CertificateChain, AuthorityError> {
        let id = &subject.id;
        if id.trust_domain != self.trust_domain {
            let (found, expected) = (id.trust_domain.to_string(), self.trust_domain.clone());
            return Err(AuthorityError::TrustDomain { found, expected });
        }
        if now >= self.not_after {
            return Err(AuthorityError::Expired);
        }
        let mut request = read_request(request)?;
        let validity = Validity::from(now, lifetimes.leaf, lifetimes).until(self.not_after);
        let mut params = params(&id.to_string(), "leaf", validity)?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        if let Some(node) = &subject.node {
            let name = node_dns_name(node, &self.trust_domain);
            let name = name.try_into().map_err(AuthorityError::Sign)?;
            params.subject_alt_names.push(SanType::DnsName(name));
        }
        if let Some(grant) = &subject.grant {
            let bytes = grant.encode().map_err(AuthorityError::Grant)?;
            params.custom_extensions = vec![CustomExtension::from_oid_content(&GRANT_OID, bytes)];
        }
        request.params = params;
        let intermediate = self.chain.certificates().first().ok_or(AuthorityError::NotAnAuthority)?;
        let signer = rcgen::Issuer::from_ca_cert_der(intermediate, self.key.pair());
        let certificate =
            request.signed_by(&signer.map_err(AuthorityError::Sign)?).map_err(AuthorityError::Sign)?;
        // The root is the peer's to know, but a node that joins finds its pin there.
        Ok(CertificateChain::new(certificate.der().clone(), self.chain.certificates()))
    }
}

/// Checks that `request` (a CSR in PEM) is signed by its key, so that [`Issuer::issue`] accepts it.
pub fn check_request(request: &str) -> Result<(), AuthorityError> {
    read_request(request).map(drop)
}

fn read_request(request: &str) -> Result<CertificateSigningRequestParams, AuthorityError> {
    match request.len() <= MAX_REQUEST {
        true => CertificateSigningRequestParams::from_pem(request).map_err(AuthorityError::Request),
        false => Err(AuthorityError::LargeRequest),
    }
}

/// Checks that the first certificate of a chain is an authority's, and that `key` is its key. Returns its trust domain.
fn authority(
    chain: &CertificateChain,
    key: &Key,
) -> Result<(TrustDomain, CertificateDer<'static>), AuthorityError> {
    let first = chain.leaf().map_err(AuthorityError::Certificate)?;
    if !first.is_authority {
        return Err(AuthorityError::NotAnAuthority);
    }
    if first.key_hash != key.public_hash() {
        return Err(AuthorityError::WrongKey);
    }
    let uri = first.uri().map_err(AuthorityError::Certificate)?;
    let id = uri.strip_prefix("spiffe://").unwrap_or_default().parse();
    let id = id.map_err(|cause| AuthorityError::Certificate(BadCertificate::Id(cause)))?;
    Ok((id, first.der))
}

#[derive(Clone, Copy)]
struct Validity {
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
}

impl Validity {
    fn from(now: SystemTime, lifetime: Duration, lifetimes: &Lifetimes) -> Validity {
        let now = OffsetDateTime::from(now);
        Validity { not_before: now - lifetimes.backdate, not_after: now + lifetime }
    }

    /// Ends the validity at `end` at the latest.
    fn until(self, end: SystemTime) -> Validity {
        Validity { not_after: self.not_after.min(OffsetDateTime::from(end)), ..self }
    }
}

fn authority_params(
    trust_domain: &TrustDomain,
    name: &str,
    constraints: BasicConstraints,
    validity: Validity,
) -> Result<CertificateParams, AuthorityError> {
    let mut params = params(&trust_domain.uri(), name, validity)?;
    params.is_ca = IsCa::Ca(constraints);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

/// The most characters of a common name (RFC 5280, appendix A.1).
const MAX_COMMON_NAME: usize = 64;

fn params(uri: &str, name: &str, validity: Validity) -> Result<CertificateParams, AuthorityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "vmesh");
    let common_name: String = name.chars().take(MAX_COMMON_NAME).collect();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.subject_alt_names = vec![SanType::URI(uri.try_into().map_err(AuthorityError::Sign)?)];
    params.not_before = validity.not_before;
    params.not_after = validity.not_after;
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(serial_number()?);
    Ok(params)
}

/// Returns a random serial number of 127 bits, which is positive.
fn serial_number() -> Result<SerialNumber, AuthorityError> {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| AuthorityError::Random)?;
    bytes[0] &= 0x7f;
    bytes[0] |= 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

#[cfg(test)]
mod tests;
