//! Reads documents from Consul's key-value store: one text per key below a prefix.

use serde::Deserialize;
use vmesh_consul::{Answer, Client, Entries, Entry, Watch, WatchOptions};
use vmesh_daemon::report::one_line;

use super::DocumentText;

/// The configuration `consul_kv: {prefix: vmesh/}`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KvConfig {
    /// The prefix of the keys that contain documents. Keys that end with `/` are folders and are skipped.
    pub(crate) prefix: String,
    /// The address of Consul. Default: that of the first Consul source in `discovery`.
    pub(crate) consul: Option<vmesh_consul::Config>,
}

/// Watches the keys below a prefix.
pub(super) struct ConsulSource {
    watch: Watch<Entries>,
}

impl ConsulSource {
    pub(super) fn new(config: KvConfig) -> ConsulSource {
        let client = Client::new(&config.consul.unwrap_or_default());
        ConsulSource { watch: client.watch_keys(&config.prefix, WatchOptions::default()) }
    }

    pub(super) async fn next(&mut self) -> Result<Vec<DocumentText>, String> {
        texts(self.watch.next().await.map_err(|error| one_line(&error))?)
    }

    pub(super) async fn confirm(&mut self) -> Result<Vec<DocumentText>, String> {
        texts(self.watch.confirm().await.map_err(|error| one_line(&error))?)
    }
}

fn texts(answer: Answer<Entries>) -> Result<Vec<DocumentText>, String> {
    if answer.meta.filtered {
        // Keys that the token may not read must not be mistaken for removed documents.
        return Err("Consul leaves out keys that the token may not read: it needs `key_prefix \"..\" { policy = \"read\" }` \
                    for all of the prefix"
            .to_owned());
    }
    let keys = answer.value.entries.into_iter().filter(|entry| !entry.key.ends_with('/'));
    let raw = |entry: Entry| DocumentText {
        path: format!("consul-kv:{}", entry.key),
        content: super::reject_empty(entry.value),
        is_public: true,
    };
    Ok(keys.map(raw).collect())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use vmesh_consul::Meta;

    use super::*;

    #[test]
    fn what_the_token_may_not_see_is_no_removal() {
        let answer = |filtered| Answer {
            value: Entries::default(),
            meta: Meta {
                index: Some(7),
                known_leader: true,
                last_contact: Duration::ZERO,
                filtered,
                translated: false,
                hash: 1,
                origin: 1,
            },
        };
        assert!(texts(answer(false)).unwrap().is_empty());
        assert!(texts(answer(true)).unwrap_err().contains("key_prefix"));
    }
}
