//! What the daemons share, so that `main` in each reads as the list of its tasks.
//!
//! | module | what is in it |
//! |---|---|
//! | [`tasks`] | [`Tasks`]: every task has a name, an owner and an observed end |
//! | [`signals`] | the signal that ends the daemon |
//! | [`descriptors`] | how many files this process may have open |
//! | [`listen`], [`connections`], [`http`] | listeners that a crowd or an attacker does not exhaust |
//! | [`systemd`] | readiness, stopping and watchdog messages; nothing outside systemd |
//! | [`logs`] | the journal under systemd, readable text on stderr elsewhere |
//! | [`report`] | the one printer of error chains, and the exit codes |
//! | [`fsx`] | files that are whole after a crash |
//! | [`sockets`] | Unix sockets for a user and a group |
//! | [`fetch`] | one HTTP request to something on this host |
//! | [`metrics`] | `/metrics` text and what every process tells of itself |
//!
//! **Invariant:** no mesh noun: `cargo tree -p vmesh-daemon -e normal` lists no other crate of this workspace.

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
