//! [`Root`]: a subtree to mirror, and its limits.

use std::fmt;
use std::sync::Arc;

use crate::config::check_path;
use crate::tree::depth;

/// The default limit of the data and names of one root, in bytes: 200,000 nodes of 1 KiB fit.
const MAX_BYTES: usize = 256 << 20;

/// A subtree to mirror.
#[derive(Clone)]
pub struct Root {
    pub(crate) path: String,
    /// The limit of levels below the root. Deeper nodes are ignored.
    pub max_depth: usize,
    /// The limit of nodes. A larger subtree counts as a wrong root and is not mirrored.
    pub max_nodes: usize,
    /// The limit of the nodes' data and names together, in bytes; applied like `max_nodes`.
    pub max_bytes: usize,
    filter: NodeFilter,
}

/// A filter for nodes, called with the path relative to the root, such as `a/b`.
type NodeFilter = Arc<dyn Fn(&str) -> bool + Send + Sync>;

impl Root {
    /// Makes a root with the default limits: 16 levels, 200,000 nodes, 256 MiB. `path` is absolute, below the
    /// chroot if there is one.
    pub fn new(path: impl Into<String>) -> Result<Root, String> {
        let path = path.into();
        check_path(&path)?;
        Ok(Root { path, max_depth: 16, max_nodes: 200_000, max_bytes: MAX_BYTES, filter: Arc::new(|_| true) })
    }

    /// Ignores each node for which `filter` returns `false`, with all nodes below it. The filter gets paths
    /// relative to the root.
    pub fn with_filter(mut self, filter: impl Fn(&str) -> bool + Send + Sync + 'static) -> Root {
        self.filter = Arc::new(filter);
        self
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    /// Returns the path relative to the root, which is empty for the root itself.
    pub(crate) fn relative<'a>(&self, path: &'a str) -> &'a str {
        let rest = if self.path == "/" { path } else { path.strip_prefix(&*self.path).unwrap_or(path) };
        rest.trim_start_matches('/')
    }

    pub(crate) fn is_deepest(&self, path: &str) -> bool {
        depth(&self.path, path) >= self.max_depth
    }

    pub(crate) fn accepts(&self, path: &str) -> bool {
        (self.filter)(self.relative(path))
    }

    /// Reports whether the mirror reads the node at `path`.
    pub(crate) fn reads(&self, path: &str) -> bool {
        let relative = self.relative(path);
        let mut above = relative.match_indices('/').map(|(at, _)| relative.get(..at).unwrap_or_default());
        depth(&self.path, path) <= self.max_depth
            && above.all(|above| (self.filter)(above))
            && (relative.is_empty() || (self.filter)(relative))
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}
