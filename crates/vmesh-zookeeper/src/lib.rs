//! ZooKeeper for vmesh: a subtree mirrored, and an ephemeral node kept.
//!
//! | module | what is in it |
//! |---|---|
//! | [`config`] | [`Config`]: servers, credentials, TLS, as they are written in YAML |
//! | [`mirror`] | [`Mirror`]: subtrees, whole and up to date, whatever happens to servers and sessions |
//! | [`tree`] | [`Node`]: what was read; what did not change keeps its pointer |
//! | [`holder`] | [`Holder`]: one ephemeral node that stands for as long as it is wanted |
//! | [`session`] | a session, and how often to try for one |
//! | `pass` | reading many nodes at once |
//!
//! This is the only crate that names `zookeeper-client`, which is heavy, and of which three things have to be known:
//!
//! - It loses persistent watches at every reconnect, without an error (`session/watch.rs` of 0.11.2 restores only
//!   one-shot watches). ZooKeeper would not replay the events missed meanwhile anyway. So a [`Mirror`] watches anew
//!   after each reconnect, drops the old watch after that, and then reads everything again.
//!   (`mirror::the_client_alone_loses_its_watch_when_its_server_is_killed`)
//! - It has no limit for what a server answers with, so neither has this: the limit is on the number of nodes.
//! - It panics where its own session task has ended; a [`Mirror`] or a [`Holder`] then begins anew.
//!
//! **Invariant:** no noun of the mesh, and no other crate of vmesh: `cargo tree -p vmesh-zookeeper -e normal` lists none.

pub mod config;
pub mod holder;
pub mod mirror;
mod pass;
pub mod session;
pub mod tree;

pub use config::Config;
pub use holder::Holder;
pub use mirror::{Mirror, Root, View};
pub use session::{Counted, Error};
pub use tree::{Node, Owner, Stat};
