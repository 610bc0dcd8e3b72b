//! The nouns of vmesh, and the only way to get one: by parsing.
//!
//! | module | what is in it |
//! |---|---|
//! | [`name`] | [`ServiceName`], [`NodeName`]: what may be called a service or a node |
//! | [`endpoint`] | [`Endpoint`], [`Health`], [`Weight`], [`Protocol`]: one instance of a service |
//! | [`registration`] | [`Registration`]: what one discovery source says of one service; [`State`]: how far to trust it |
//! | [`document`] | the mesh documents `Mesh`, `Service`, `Route`, `Node`, and [`Documents`], a consistent set of them |
//! | [`load`] | strict loading of documents: file, line, column, a did-you-mean, every problem at once |
//! | [`yaml`], [`strict`] | under it: text to a tree that knows its positions, tree to type |
//! | [`check`] | what a document must not say although every word of it is known |
//! | [`node`] | [`NodeReport`]: what a node says of itself |
//! | [`join()`] | two maps compared in one walk |
//! | [`problem`] | [`Problem`] and [`Place`]: what an operator has to mend, and where |
//!
//! **Invariant:** no runtime, no Envoy, no clock, no I/O: `cargo tree -p vmesh-model -e normal` lists neither
//! `tokio` nor `vmesh-proto`. Text comes in as an argument.

pub mod check;
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

pub use document::{Documents, Settings};
pub use endpoint::{Address, Endpoint, Health, Host, Labels, Protocol, Weight};
pub use join::join;
pub use name::{NodeName, ServiceName};
pub use node::NodeReport;
pub use problem::{Place, Problem};
pub use registration::{Registration, State};
