//! The domain types of vmesh. Text is parsed into them, and an invalid value cannot be constructed.
//!
//! | module | contents |
//! |---|---|
//! | [`name`] | [`ServiceName`], [`NodeName`]: valid names of services and nodes |
//! | [`endpoint`] | [`Endpoint`], [`Health`], [`Weight`], [`Protocol`]: one instance of a service |
//! | [`registration`] | [`Registration`]: one service as one discovery source lists it; [`State`]: how far to trust it |
//! | [`cidr`] | [`Cidr`]: a network, or a single address |
//! | [`document`] | the mesh documents `Mesh`, `Service`, `Route`, `Node`, and [`Documents`], a consistent set of them |
//! | [`load`] | strict loading of documents: file, line, column, a did-you-mean, every problem at once |
//! | [`yaml`], [`strict`] | the layers below: text to a tree with positions, tree to a typed value |
//! | [`check`] | checks of a document's meaning, such as contradictions between fields |
//! | [`node`] | [`NodeReport`]: what a node reports of itself |
//! | [`join()`] | the comparison of two maps in one pass |
//! | [`problem`] | [`Problem`] and [`Place`]: an error for the operator to fix, and its location |
//!
//! **Invariant:** no runtime, no Envoy, no clock, no I/O: `cargo tree -p vmesh-model -e normal` lists neither
//! `tokio` nor `vmesh-proto`. Text comes in as an argument.

pub mod check;
pub mod cidr;
pub mod document;
pub mod endpoint;
pub mod join;
pub mod load;
pub mod name;
pub mod node;
pub mod problem;
pub mod registration;
pub mod strict;
pub mod text;
pub mod yaml;

pub use cidr::Cidr;
pub use document::{Documents, Settings};
pub use endpoint::{Address, Endpoint, Health, Host, Labels, Protocol, Weight};
pub use join::join;
pub use name::{NodeName, ServiceName};
pub use node::NodeReport;
pub use problem::{Place, Problem};
pub use registration::{Registration, State};
