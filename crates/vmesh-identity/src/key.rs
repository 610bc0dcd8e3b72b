//! Private keys: ECDSA on P-256, as PKCS #8. A key is zeroized when it is dropped, and neither printed nor cloned.

use std::fmt;

use aws_lc_rs::digest::{SHA256, digest};
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PublicKeyData};
use zeroize::{Zeroize, Zeroizing};

/// A key that could not be made, read or used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("could not generate a P-256 key")]
    Generate(#[source] rcgen::Error),
    #[error("the key is not a P-256 private key in PKCS #8 (`BEGIN PRIVATE KEY`)")]
    NotAKey(#[source] rcgen::Error),
    #[error("the key is an ECDSA P-256 key in vmesh, and this one has another algorithm")]
    Algorithm,
    #[error("could not sign a certificate request")]
    Request(#[source] rcgen::Error),
}

/// A private key.
pub struct Key {
    pair: KeyPair,
}

impl Key {
    /// Generates a key from the operating system's randomness.
    pub fn generate() -> Result<Key, KeyError> {
        KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map(|pair| Key { pair }).map_err(KeyError::Generate)
    }

    /// Reads a key in PEM.
    pub fn from_pem(pem: &str) -> Result<Key, KeyError> {
        let pair = KeyPair::from_pem(pem).map_err(KeyError::NotAKey)?;
        match pair.is_compatible(&PKCS_ECDSA_P256_SHA256) {
            true => Ok(Key { pair }),
            false => Err(KeyError::Algorithm),
        }
    }

    /// Returns the key in PEM, for a file that only its owner may read.
    pub fn to_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.pair.serialize_pem())
    }

    /// Returns the key as PKCS #8 in DER, for a TLS library.
    pub fn to_der(&self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(self.pair.serialize_der())
    }

    /// Returns a certificate request (PKCS #10, in PEM) that proves possession of the key. It names nobody: the authority decides whose
    /// certificate it issues.
    pub fn request(&self) -> Result<String, KeyError> {
        let request =
            CertificateParams::default().serialize_request(&self.pair).map_err(KeyError::Request)?;
        request.pem().map_err(KeyError::Request)
    }

    /// Returns the SHA-256 of the public key (`SubjectPublicKeyInfo`).
    pub fn public_hash(&self) -> [u8; 32] {
        let info = self.pair.subject_public_key_info();
        digest(&SHA256, &info).as_ref().try_into().unwrap_or_default()
    }

    pub(crate) fn pair(&self) -> &KeyPair {
        &self.pair
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.pair.zeroize();
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}
