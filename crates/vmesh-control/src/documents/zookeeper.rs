//! Documents in ZooKeeper: one text per node below a path, for fleets without configuration management.

use std::collections::BTreeSet;

use serde::Deserialize;
use vmesh_zookeeper::{Mirror, Root, View};

use super::Raw;

/// `zookeeper: {path: /vmesh}`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TreeConfig {
    /// Every node below it that has data is a text of documents; below the chroot, if there is one.
    pub(crate) path: String,
    /// Where ZooKeeper is. Built in: where the first ZooKeeper source of `discovery` is.
    pub(crate) zookeeper: Option<vmesh_zookeeper::Config>,
}

/// The nodes below a path.
pub(super) struct Tree {
    path: String,
    /// The nodes that have had data: one of them without is not a directory.
    texts: BTreeSet<String>,
    /// Why there is none: the configuration was checked, so there is one.
    mirror: Result<Mirror, String>,
}

impl Tree {
    /// `known` are the places that were texts before a restart.
    pub(super) fn new(config: TreeConfig, known: BTreeSet<String>) -> Tree {
        let mirror = match (Root::new(config.path.clone()), config.zookeeper) {
            (Ok(root), Some(zookeeper)) => Ok(Mirror::new(zookeeper, vec![root], |_| {})),
            (Err(wrong), _) => Err(wrong),
            (Ok(_), None) => Err("where ZooKeeper is was not said".to_owned()),
        };
        Tree { path: config.path, texts: known, mirror }
    }

    pub(super) async fn next(&mut self) -> Result<Vec<Raw>, String> {
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

    pub(super) async fn confirm(&mut self) -> Result<Vec<Raw>, String> {
        let view = match &mut self.mirror {
            Ok(mirror) => mirror.confirm().await.map_err(|error| error.line())?,
            Err(why) => return Err(why.clone()),
        };
        self.texts(view)
    }

    fn texts(&mut self, view: View) -> Result<Vec<Raw>, String> {
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
            // A node that never said anything is a directory, also where nothing is left below it.
            let is_empty = node.data.is_empty() && node.unreadable.is_none();
            if is_empty && !self.texts.contains(&path) {
                return;
            }
            let content = match &node.unreadable {
                Some(why) => Err(why.to_string()),
                None => super::not_empty(node.data.to_vec()),
            };
            texts.push(Raw { path, content, is_public: true });
        });
        texts.sort_by(|a, b| a.path.cmp(&b.path));
        self.texts = texts.iter().map(|text| text.path.clone()).collect();
        Ok(texts)
    }
}
