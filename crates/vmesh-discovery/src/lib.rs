//! Discovery sources, and what keeps a dead or a confused one from emptying the mesh.
//!
//! | module | what is in it |
//! |---|---|
//! | [`source`] | trait [`Source`]: whole views, never deltas; [`follow`], which keeps the last good one |
//! | [`guard`] | [`Guard`]: whether to believe a source that says less than it did |
//! | [`config`] | [`SourceConfig`]: the `discovery:` part of `control.yaml` |
//! | [`file`](mod@file) | [`FileSource`]: a directory of files |
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
pub mod file;
pub mod format;
pub mod guard;
pub mod plugin;
pub mod resolve;
pub mod source;

use std::sync::Arc;

use tokio::sync::watch;

pub use config::{FileConfig, SourceConfig};
pub use file::FileSource;
pub use guard::{Guard, GuardConfig};
pub use plugin::{PluginConfig, PluginSource};
pub use source::{Registrations, Seen, Source, SourceError, View, follow};
pub use vmesh_model::State;

/// The source that `config` describes: its views, and the task that has to be run for them to come.
///
/// `last_good` is what was known before a restart. It is the first view, and stands until the source answers.
pub fn open(
    config: SourceConfig,
    last_good: Option<Arc<Registrations>>,
) -> (watch::Receiver<View>, impl Future<Output = ()> + Send + 'static) {
    let (name, guard) = (config.name(), config.guard());
    let (guard, view) = match &last_good {
        Some(last_good) => (Guard::restored(name, guard, last_good), View::restored(last_good.clone())),
        None => (Guard::new(name, guard), View::default()),
    };
    let (publish, views) = watch::channel(view);
    let task = async move {
        match config {
            SourceConfig::File(config) => {
                follow(FileSource::new(config, last_good.as_deref()), guard, publish).await;
            }
        }
    };
    (views, task)
}
