//! Merges source views, documents and node reports into one immutable [`World`] per change.
//!
//! | module | contents |
//! |---|---|
//! | [`world`] | [`World`], its [`Revision`], and [`Service`], the merged state of one service |
//! | [`catalog`] | [`Catalog`], which takes views, documents and reports and builds worlds |
//! | [`names`] | [`Names`]: the owner of a DNS name that several service names fold to, and the order in which names came into use |
//! | [`state`] | the encoding of the last good state, which a restarted control plane serves |
//!
//! **Invariant:** this crate knows neither Envoy nor gRPC, and reads no clock, file or socket: `cargo tree -p
//! vmesh-catalog -e normal` lists neither `vmesh-proto` nor `tonic` nor `tokio`.

pub mod catalog;
pub mod names;
pub mod state;
pub mod world;

pub use catalog::{Catalog, SourceService, SourceView};
pub use names::Names;
pub use world::{Changes, Revision, Service, World};
