//! A thin client of Consul's HTTP API: blocking queries, KV, registration.
//!
//! | module | what is in it |
//! |---|---|
//! | [`config`] | [`Config`]: addresses, token file, TLS; made to stand in other crates' YAML |
//! | [`client`] | [`Client`]: GET with what its headers say, failover between addresses, a bound on connections |
//! | [`cursor`] | [`Cursor`]: what to ask next in a row of blocking queries, and what to believe. Pure |
//! | [`watch`] | [`Watch`]: one such row, for whoever wants to know of one thing |
//! | [`kv`] | a prefix of the key-value store as a watch |
//! | [`agent`] | registration of a service with the local agent |
//! | [`error`] | [`ConsulError`]: what was asked, whom, and why it failed, typed where that makes a difference |
//!
//! Connections are moved by tasks that the client owns; they end with it.
//!
//! **Invariant:** no noun of the mesh is in here: `cargo tree -p vmesh-consul -e normal` lists no other `vmesh-` crate.

pub mod agent;
pub mod client;
pub mod config;
mod credentials;
pub mod cursor;
pub mod error;
pub mod kv;
mod pool;
pub mod watch;

pub use agent::{Check, CheckStatus, Registration, Weights};
pub use client::{Answer, Body, Client, Consistency, Counters, Meta, Query, escaped};
pub use config::{Address, Addresses, Config, MaxConnections, Tls};
pub use cursor::{Cursor, Verdict};
pub use error::{ConsulError, ErrorKind};
pub use kv::{Entries, Entry};
pub use watch::{Pace, Watch};
