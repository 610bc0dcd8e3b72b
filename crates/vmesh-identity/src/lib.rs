//! SPIFFE identities, the certificate authority of a mesh, join tokens, trust bundles, and the rotation of a root. Pure.
//!
//! ```text
//! agent: Key::generate -> Key::request --CSR--> Issuer::issue(CSR, the ids that policy grants) -> chain --> agent
//! any peer: verify(chain, &TrustBundle, now) -> SpiffeId
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`name`] | trust domains and SPIFFE ids |
//! | [`key`] | private keys, and what is signed with them |
//! | [`authority`] | the root and the intermediate of a mesh; CSR to leaf |
//! | [`certificate`] | certificates that a peer showed, and their verification |
//! | [`bundle`] | the roots that a mesh trusts |
//! | [`grant`] | what a node may run, as its certificate says |
//! | [`tls`] | the TLS settings of both ends of a connection |
//! | [`token`] | join tokens, and the ledger that redeems each once |
//! | [`rotation`] | the order in which a root or an intermediate is replaced |
//!
//! Callers pass the time in. Only keys and tokens use randomness, from the operating system. Where keys are kept is the caller's matter.

pub mod authority;
pub mod bundle;
pub mod certificate;
pub mod grant;
pub mod key;
pub mod name;
pub mod rotation;
pub mod tls;
pub mod token;

pub use authority::{Issuer, Lifetimes, Root};
pub use bundle::TrustBundle;
pub use certificate::{Certificate, CertificateChain, verify};
pub use grant::{NodeGrant, Subject, node_dns_name};
pub use key::Key;
pub use name::{Identity, Role, SpiffeId, TrustDomain};
pub use rotation::Rotation;
pub use token::{JoinGrant, JoinToken, TokenLedger};
