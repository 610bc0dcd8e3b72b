//! Reads documents from ZooKeeper: one text per node below a path.

use std::collections::BTreeSet;

use serde::Deserialize;
use vmesh_zookeeper::{Mirror, Root, View};

use super::DocumentText;

/// The configuration `zookeeper: {path: /vmesh}`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TreeConfig {
    /// The path below which every node with data contains documents. The path is relative to the chroot of the connection.
    pub(crate) path: String,
    /// The address of ZooKeeper. Default: that of the first ZooKeeper source in `discovery`.
    pub(crate) zookeeper: Option<vmesh_zookeeper::Config>,
}

/// Watches the nodes below a path.
pub(super) struct ZookeeperSource {
    path: String,
    /// The nodes that have had data. If one becomes empty, it is a document that lost its text and not a
    /// directory.
    texts: BTreeSet<String>,
    /// The mirror of the subtree, or the reason why there is none, which the check of the configuration rules
    /// out.
    mirror: Result<Mirror, String>,
}

impl ZookeeperSource {
    /// Creates the watch. `known` are the paths of the documents restored from before a restart.
    pub(super) fn new(config: TreeConfig, known: BTreeSet<String>) -> ZookeeperSource {
        let mirror = match (Root::new(config.path.clone()), config.zookeeper) {
            (Ok(root), Some(zookeeper)) => Ok(Mirror::new(zookeeper, vec![root], |_| {})),
            (Err(wrong), _) => Err(wrong),
            (Ok(_), None) => Err("where ZooKeeper is was not said".to_owned()),
        };
        ZookeeperSource { path: config.path, texts: known, mirror }
    }

    pub(super) async fn next(&mut self) -> Result<Vec<DocumentText>, String> {
        match &mut self.mirror {
            Ok(mirror) => {
                let view = mirror.changed().await;
                self.texts(view)
            }
            Err(why) => {
                tokio::time::sleep(std::time::Duration::from_secs(30)).await;
                Err(why.clone())
            }
        }
    }

    pub(super) async fn confirm(&mut self) -> Result<Vec<DocumentText>, String> {
        let view = match &mut self.mirror {
            Ok(mirror) => mirror.confirm().await.map_err(|error| error.line())?,
            Err(why) => return Err(why.clone()),
        };
        self.texts(view)
    }

    fn texts(&mut self, view: View) -> Result<Vec<DocumentText>, String> {
        if let Some(because) = view.stale_because {
            return Err(because.to_string());
        }
        let Some(root) = view.roots.into_iter().next() else { return Err("not read yet".to_owned()) };
        if let Some(failed) = root.failed {
            return Err(failed.to_string());
        }
        let mut texts = Vec::new();
        let Some(tree) = root.tree else { return Ok(texts) };
        tree.walk(&mut |path, node| {
            let path = format!("zookeeper:{}/{path}", self.path.trim_end_matches('/'));
            // A node that never had data is a directory, even if it has no children left.
            let is_empty = node.data.is_empty() && node.unreadable.is_none();
            if is_empty && !self.texts.contains(&path) {
                return;
            }
            let content = match &node.unreadable {
                Some(why) => Err(why.to_string()),
                None => super::reject_empty(node.data.to_vec()),
            };
            texts.push(DocumentText { path, content, is_public: true });
        });
        texts.sort_by(|a, b| a.path.cmp(&b.path));
        self.texts = texts.iter().map(|text| text.path.clone()).collect();
        Ok(texts)
    }
}
