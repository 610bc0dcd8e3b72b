//! Discovery sources, and the guard that keeps a dead or confused source from emptying the mesh.
//!
//! | module | content |
//! |---|---|
//! | [`source`] | trait [`Source`], which gives complete views and never deltas; [`follow`], which keeps the last good view |
//! | [`registrations`] | [`Registrations`]: the complete view of a source |
//! | [`guard`] | [`Guard`], which decides when to believe that services or endpoints are gone; evictions |
//! | [`config`] | [`SourceConfig`]: the `discovery:` part of `control.yaml` |
//! | [`file`](mod@file) | [`FileSource`]: a directory of files |
//! | [`consul`] | [`ConsulSource`]: the services of a Consul cluster |
//! | [`zookeeper`] | [`ZookeeperSource`]: the znodes that service instances register in ZooKeeper |
//! | [`plugin`] | [`PluginSource`]: an external program that reads another kind of registry |
//! | [`format`](mod@format) | pure parsers of the supported formats, from bytes to services |
//! | [`assemble`] | from parsed services to endpoints with addresses that a proxy can dial |
//! | [`resolve`] | periodic resolution of host names of endpoints |
//!
//! Each source runs at most two tasks. [`follow`] is one of them, and the caller of [`open`] owns it; lookups
//! and disk scans are short-lived tasks that the source owns.
//!
//! **Invariant:** this crate knows neither Envoy nor xDS: `cargo tree -p vmesh-discovery -e normal` lists
//! neither `vmesh-proto` nor `vmesh-xds`.

pub mod assemble;
pub mod config;
mod config_values;
pub mod consul;
pub mod file;
pub mod format;
pub mod guard;
pub mod pattern;
pub mod plugin;
pub mod registrations;
pub mod resolve;
pub mod source;
pub mod zookeeper;

use std::sync::Arc;
use std::time::SystemTime;

pub use config::SourceConfig;
pub use consul::{ConsulConfig, ConsulSource};
pub use file::{FileConfig, FileSource};
pub use guard::{Guard, GuardConfig};
pub use plugin::{PluginConfig, PluginSource};
pub use resolve::{UnresolvedName, UnresolvedNames};
pub use source::{Command, Counters, Handle, Registrations, ServiceView, Source, SourceError, View, follow};
pub use vmesh_model::State;
pub use zookeeper::{ZookeeperConfig, ZookeeperSource};

/// Opens the source that `config` describes. Returns its handle and the task that reads the source and
/// publishes its views.
///
/// `last_good` is the view persisted before a restart; it is the first view and is served until the source
/// answers. `frozen` is the time at which the operator froze the source, if it was frozen before the restart;
/// it stays frozen.
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
