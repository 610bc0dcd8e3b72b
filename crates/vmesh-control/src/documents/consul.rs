//! Documents in Consul's key-value store: one text per key below a prefix, for fleets without configuration management.

use serde::Deserialize;
use vmesh_consul::{Client, Entries, Pace, Watch};
use vmesh_daemon::report::one_line;

use super::Raw;

/// `consul_kv: {prefix: vmesh/}`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KvConfig {
    /// Every key that begins with it is a text of documents, but for those that end with `/`.
    pub(crate) prefix: String,
    /// Where Consul is. Built in: where the first Consul source of `discovery` is.
    pub(crate) consul: Option<vmesh_consul::Config>,
}

/// The keys below a prefix.
pub(super) struct Keys {
    watch: Watch<Entries>,
}

impl Keys {
    pub(super) fn new(config: KvConfig) -> Keys {
        let client = Client::new(&config.consul.unwrap_or_default());
        Keys { watch: client.watch_keys(&config.prefix, Pace::default()) }
    }

    pub(super) async fn next(&mut self) -> Result<Vec<Raw>, String> {
        self.watch.next().await.map(|answer| texts(answer.value)).map_err(|error| one_line(&error))
    }

    pub(super) async fn confirm(&mut self) -> Result<Vec<Raw>, String> {
        self.watch.confirm().await.map(|answer| texts(answer.value)).map_err(|error| one_line(&error))
    }
}

fn texts(entries: Entries) -> Vec<Raw> {
    let keys = entries.entries.into_iter().filter(|entry| !entry.key.ends_with('/'));
    keys.map(|entry| Raw { path: format!("consul-kv:{}", entry.key), content: super::not_empty(entry.value) })
        .collect()
}
