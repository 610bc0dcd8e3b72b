//! The infrastructure that both daemons share.
//!
//! | module | contents |
//! |---|---|
//! | [`tasks`] | [`Tasks`]: every task has a name, an owner and an observed end |
//! | [`signals`] | the signals that stop the daemon, and those that it ignores |
//! | [`descriptors`] | the limit of open files |
//! | [`listen`], [`connections`], [`http`] | listeners that clients cannot exhaust |
//! | [`systemd`] | readiness, stopping and watchdog messages; no-ops outside systemd |
//! | [`logs`] | the journal under systemd, readable text on stderr elsewhere |
//! | [`report`] | the printer of error chains, and the exit codes |
//! | [`fsx`] | atomic writes and limited reads of files |
//! | [`sockets`] | Unix sockets for a user and a group |
//! | [`fetch`] | one HTTP request to a server on this host |
//! | [`metrics`] | the `/metrics` text, and the metrics of the process |
//!
//! **Invariant:** the crate knows no noun of the mesh: `cargo tree -p vmesh-daemon -e normal` lists no other crate of this workspace.

pub mod connections;
pub mod descriptors;
pub mod fetch;
pub mod fsx;
pub mod http;
pub mod listen;
pub mod logs;
pub mod metrics;
pub mod report;
pub mod signals;
pub mod sockets;
pub mod systemd;
pub mod tasks;

pub use tasks::{Stop, Tasks};
