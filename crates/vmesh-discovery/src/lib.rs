//! Discovery sources, and what keeps a dead or a confused one from emptying the mesh.
//!
//! | module | what is in it |
//! |---|---|
//! | [`source`] | trait [`Source`]: whole views, never deltas; [`follow`], which keeps the last good one |
//! | [`guard`] | [`Guard`]: whether to believe a source that says less than it did; evictions |
//! | [`config`] | [`SourceConfig`]: the `discovery:` part of `control.yaml` |
//! | [`file`](mod@file) | [`FileSource`]: a directory of files |
//! | [`consul`] | [`ConsulSource`]: the services of a Consul cluster |
//! | [`zookeeper`] | [`ZookeeperSource`]: what services leave in ZooKeeper |
//! | [`plugin`] | [`PluginSource`]: a program that reads a registry of another kind |
//! | [`format`](mod@format) | what files say: pure parsers, from text to services |
//! | [`assemble`] | from what a format says to what can be dialled |
//! | [`resolve`] | host names of endpoints, resolved and resolved again |
//!
//! Two tasks per source at most: [`follow`] is one, for whoever starts it to own; lookups and looks at the disk are
//! short-lived, and belong to the source.
//!
//! **Invariant:** it knows neither Envoy nor xDS: `cargo tree -p vmesh-discovery -e normal` lists neither
//! `vmesh-proto` nor `vmesh-xds`.

pub mod assemble;
pub mod config;
pub mod consul;
pub mod file;
pub mod format;
pub mod guard;
pub mod plugin;
pub mod resolve;
pub mod source;
pub mod zookeeper;

use std::sync::Arc;
use std::time::SystemTime;

pub use config::{FileConfig, SourceConfig};
pub use consul::{ConsulConfig, ConsulSource};
pub use file::FileSource;
pub use guard::{Guard, GuardConfig};
pub use plugin::{PluginConfig, PluginSource};
pub use resolve::{UnresolvedName, UnresolvedNames};
pub use source::{Command, Counters, Handle, Registrations, Seen, Source, SourceError, View, follow};
pub use vmesh_model::State;
pub use zookeeper::{ZookeeperConfig, ZookeeperSource};

/// The source that `config` describes: a handle of it, and the task that has to be run for its views to come.
///
/// `last_good` is what was known before a restart. It is the first view, and stands until the source answers. A source
/// that was `frozen` still is.
pub fn open(
    config: SourceConfig,
    last_good: Option<Arc<Registrations>>,
    frozen: Option<SystemTime>,
) -> (Handle, impl Future<Output = ()> + Send + 'static) {
    let name = config.name();
    let (mut guard, view) = match &last_good {
        Some(last_good) => {
            (Guard::restored(name.clone(), config.guard(), last_good), View::restored(last_good.clone()))
        }
        None => (Guard::new(name.clone(), config.guard()), View::default()),
    };
    if let Some(since) = frozen {
        guard.freeze(since);
    }
    let (handle, link) = source::link(name, view);
    let counters = handle.counters.clone();
    let task = async move {
        let last_good = last_good.as_deref();
        match config {
            SourceConfig::File(config) => {
                follow(FileSource::new(*config, last_good, counters), guard, link).await;
            }
            SourceConfig::Consul(config) => {
                follow(ConsulSource::new(*config, last_good, counters), guard, link).await;
            }
            SourceConfig::Plugin(config) => {
                follow(PluginSource::new(*config, last_good, counters), guard, link).await;
            }
            SourceConfig::Zookeeper(config) => {
                follow(ZookeeperSource::new(*config, last_good, counters), guard, link).await;
            }
        }
    };
    (handle, task)
}
