//! A thin client of Consul's HTTP API: blocking queries, the KV store, service registration.
//!
//! | module | responsibility |
//! |---|---|
//! | [`config`] | [`Config`]: addresses, token file, TLS; other crates embed it in their YAML |
//! | [`client`] | [`Client`]: GET with the metadata of Consul's headers, failover between addresses, a limit on connections |
//! | [`cursor`] | [`Cursor`]: decides what a sequence of blocking queries asks next, and which answers to trust. Pure |
//! | [`watch`] | [`Watch`]: a sequence of blocking queries for one path |
//! | [`kv`] | watches a prefix of the KV store |
//! | [`agent`] | registers services with the local agent |
//! | [`error`] | [`ConsulError`]: the request, the address, and the reason of a failure, typed where callers distinguish reasons |
//!
//! The client owns the tasks that drive its connections; they end with it.
//!
//! **Invariant:** no noun of the mesh is in here, and no other crate of vmesh than `vmesh-backoff`: see `cargo
//! tree -p vmesh-consul -e normal`.

pub mod agent;
pub mod client;
pub mod config;
mod counters;
mod credentials;
pub mod cursor;
pub mod error;
pub mod kv;
mod pool;
pub mod watch;

pub use agent::{Check, CheckStatus, Registration, Weights};
pub use client::{Answer, Body, Client, Consistency, Meta, Query, escaped};
pub use config::{Address, Addresses, Config, MaxConnections, Tls};
pub use counters::Counters;
pub use cursor::{Cursor, Verdict};
pub use error::{ConsulError, ErrorKind};
pub use kv::{Entries, Entry};
pub use watch::{Watch, WatchOptions};
