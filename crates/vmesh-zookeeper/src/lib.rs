//! ZooKeeper for vmesh: mirrored subtrees, and a held ephemeral node.
//!
//! | module | responsibility |
//! |---|---|
//! | [`config`] | [`Config`]: servers, credentials and TLS, as they are written in YAML |
//! | [`mirror`] | [`Mirror`]: keeps a complete and current copy of subtrees across lost servers and sessions |
//! | [`tree`] | [`Node`]: the copy of one subtree; unchanged nodes keep their pointers |
//! | [`holder`] | [`Holder`]: keeps one ephemeral node in existence until it is withdrawn |
//! | [`session`] | opens a session and counts its events |
//! | `bulk_read` | reads many nodes over one connection |
//!
//! This is the only crate that names `zookeeper-client`, a large dependency with three peculiarities:
//!
//! - It loses persistent watches at every reconnect, without an error (`session/watch.rs` of 0.11.2 restores
//!   only one-shot watches). ZooKeeper would not replay the events missed meanwhile anyway. So after each
//!   reconnect a [`Mirror`] sets new watches, drops the old watches, and reads all nodes again.
//!   (`mirror::the_client_alone_loses_its_watch_when_its_server_is_killed`)
//! - It bounds each reply (8 MiB), but not the number of nodes; [`Root`] does that.
//! - It panics if its own session task has ended; a [`Mirror`] or a [`Holder`] then opens a new session.
//!
//! **Invariant:** no noun of the mesh, and no other crate of vmesh than `vmesh-backoff`: `cargo tree -p
//! vmesh-zookeeper -e normal` shows it.

mod bulk_read;
pub mod config;
pub mod holder;
pub mod mirror;
mod root;
pub mod session;
pub mod tree;

pub use config::Config;
pub use holder::Holder;
pub use mirror::{Mirror, View};
pub use root::Root;
pub use session::{Error, SessionEvent};
pub use tree::{Node, Owner, Stat};
