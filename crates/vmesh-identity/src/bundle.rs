//! The roots that a mesh trusts.

use aws_lc_rs::digest::{Context, SHA256};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::certificate::{BadCertificate, Certificate, hex, pem};
use crate::name::TrustDomain;

/// The most roots of a bundle. A rotation needs two roots; a merger of meshes may need a few more.
const MAX_ROOTS: usize = 8;

/// The reason why certificates make no trust bundle.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadBundle {
    #[error("root {number} of the trust bundle cannot be used")]
    Root {
        /// The position of the root, counted from 1.
        number: usize,
        #[source]
        cause: BadCertificate,
    },
    #[error("root {number} of the trust bundle is not the certificate of an authority")]
    NotAnAuthority { number: usize },
    #[error("a trust bundle has 1 to {MAX_ROOTS} roots")]
    Count,
    #[error("it is not a list of certificates in PEM: {0}")]
    Pem(String),
}

/// The roots that a mesh trusts, each once, in the order of their bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustBundle {
    trust_domain: TrustDomain,
    roots: Vec<CertificateDer<'static>>,
}

impl TrustBundle {
    /// Makes a bundle of `roots`.
    pub fn new(
        trust_domain: TrustDomain,
        mut roots: Vec<CertificateDer<'static>>,
    ) -> Result<TrustBundle, BadBundle> {
        for (at, root) in roots.iter().enumerate() {
            let number = at + 1;
            let read = Certificate::read(root).map_err(|cause| BadBundle::Root { number, cause })?;
            if !read.is_authority {
                return Err(BadBundle::NotAnAuthority { number });
            }
        }
        roots.sort_by(|one, other| one.as_ref().cmp(other.as_ref()));
        roots.dedup();
        match (1..=MAX_ROOTS).contains(&roots.len()) {
            true => Ok(TrustBundle { trust_domain, roots }),
            false => Err(BadBundle::Count),
        }
    }

    /// Reads a bundle in PEM.
    pub fn from_pem(trust_domain: TrustDomain, text: &str) -> Result<TrustBundle, BadBundle> {
        let roots = CertificateDer::pem_slice_iter(text.as_bytes()).take(MAX_ROOTS + 1);
        let roots: Result<Vec<_>, _> = roots.collect();
        TrustBundle::new(trust_domain, roots.map_err(|error| BadBundle::Pem(error.to_string()))?)
    }

    pub fn to_pem(&self) -> String {
        self.roots.iter().map(pem).collect()
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// Returns the bundle with one more root.
    pub fn with(&self, root: CertificateDer<'static>) -> Result<TrustBundle, BadBundle> {
        let mut roots = self.roots.clone();
        roots.push(root);
        TrustBundle::new(self.trust_domain.clone(), roots)
    }

    /// Returns the bundle without `root`. The last root cannot be removed.
    pub fn without(&self, root: &CertificateDer<'_>) -> Result<TrustBundle, BadBundle> {
        let roots = self.roots.iter().filter(|kept| *kept != root).cloned().collect();
        TrustBundle::new(self.trust_domain.clone(), roots)
    }

    /// Returns a hash of the content in hexadecimal digits: what a node reports when it has the bundle.
    pub fn version(&self) -> String {
        let mut context = Context::new(&SHA256);
        for root in &self.roots {
            context.update(root);
        }
        hex(context.finish().as_ref().get(..16).unwrap_or_default())
    }
}
