//! The nodes that events named, as a list of reads.

use std::collections::{BTreeMap, BTreeSet};

use zookeeper_client as zk;

use super::{Root, RootView, child};
use crate::bulk_read::{ReadScope, ReadStart};

/// The nodes to read again. Several events for one path lead to one read.
#[derive(Debug, Default)]
pub(super) struct DirtyPaths(BTreeMap<(usize, String), ReadScope>);

impl DirtyPaths {
    /// Adds the node of an event. Returns `false` if the event is the end of the session.
    pub(super) fn add_event(&mut self, roots: &[Root], root: usize, event: zk::WatchedEvent) -> bool {
        let scope = match event.event_type {
            zk::EventType::Session => return !event.session_state.is_terminated(),
            zk::EventType::NodeDataChanged => ReadScope::Data,
            zk::EventType::NodeChildrenChanged => ReadScope::Children,
            zk::EventType::NodeCreated | zk::EventType::NodeDeleted => ReadScope::Subtree,
        };
        if roots.get(root).is_some_and(|root| root.reads(&event.path)) {
            self.add(root, event.path, scope);
        }
        true
    }

    pub(super) fn add(&mut self, root: usize, path: String, scope: ReadScope) {
        let entry = self.0.entry((root, path)).or_insert(scope);
        *entry = entry.and(scope);
    }

    /// Returns the reads to start. Paths inside a subtree that is read completely are dropped, and a path with
    /// unknown parents is replaced by the uppermost unknown one.
    pub(super) fn starts(self, roots: &[Root], copies: &[RootView]) -> Vec<ReadStart> {
        let mut wanted: BTreeMap<(usize, String), ReadScope> = BTreeMap::new();
        for ((index, path), scope) in self.0 {
            let (Some(root), Some(copy)) = (roots.get(index), copies.get(index)) else { continue };
            let (path, scope) = match first_unknown(root, copy, &path) {
                Some(missing) => (missing, ReadScope::Subtree),
                None => (path, scope),
            };
            let entry = wanted.entry((index, path)).or_insert(scope);
            *entry = entry.and(scope);
        }
        let is_covered = |index: usize, path: &str| {
            path.match_indices('/').any(|(at, _)| {
                let above = if at == 0 { "/" } else { path.get(..at).unwrap_or_default() };
                above != path && wanted.get(&(index, above.to_owned())) == Some(&ReadScope::Subtree)
            })
        };
        let known = |index: usize, path: &str| {
            let tree = copies.get(index).and_then(|copy| copy.tree.as_ref());
            let root = roots.get(index);
            let node = tree.zip(root).and_then(|(tree, root)| child(tree, root.relative(path)));
            node.map(|node| node.children.keys().map(|name| name.to_string()).collect()).unwrap_or_default()
        };
        wanted
            .iter()
            .filter(|((index, path), _)| !is_covered(*index, path))
            .map(|((index, path), scope)| ReadStart {
                root: *index,
                path: path.clone(),
                scope: *scope,
                known: if *scope == ReadScope::Children { known(*index, path) } else { BTreeSet::new() },
            })
            .collect()
    }
}

/// Returns the uppermost unknown node above `path`, or `None` if all nodes above are known.
fn first_unknown(root: &Root, copy: &RootView, path: &str) -> Option<String> {
    let relative = root.relative(path);
    let tree = match &copy.tree {
        Some(tree) => tree,
        None => return Some(root.path.clone()),
    };
    let above = relative.match_indices('/').map(|(at, _)| relative.get(..at).unwrap_or_default());
    let missing = above.into_iter().find(|above| tree.at(above).is_none())?;
    Some(crate::tree::join(&root.path, missing))
}
