//! Views, documents and node reports, merged into one immutable [`World`] per change.
//!
//! | module | what is in it |
//! |---|---|
//! | [`world`] | [`World`], its [`Revision`], and a [`Service`] as all sources together see it |
//! | [`catalog`] | [`Catalog`]: takes views, documents and reports, gives worlds |
//! | [`names`] | [`Names`]: who owns a DNS name that several names fold to; the order in which names came into use |
//! | [`state`] | the last good state as text, from which a restarted control plane serves what it served |
//!
//! **Invariant:** it knows neither Envoy nor gRPC, and reads no clock, file or socket: `cargo tree -p vmesh-catalog
//! -e normal` lists neither `vmesh-proto` nor `tonic` nor `tokio`.

pub mod catalog;
pub mod names;
pub mod state;
pub mod world;

pub use catalog::{Catalog, Seen, SourceView};
pub use names::Names;
pub use world::{Changes, Revision, Service, World};
