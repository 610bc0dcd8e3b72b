//! The copy of a subtree. Unchanged nodes keep their pointers, so a reader finds the differences between two
//! views by comparing pointers.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

/// A node with its subtree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub data: Bytes,
    pub stat: Stat,
    /// The reason why the node cannot be read now. The other fields then keep the node's last known content.
    pub unreadable: Option<Arc<str>>,
    pub children: BTreeMap<Arc<str>, Arc<Node>>,
    /// The number of nodes in the subtree, this one included.
    size: usize,
    /// The bytes of the subtree: all data, and the names of all nodes below this one.
    bytes: usize,
}

/// The part of ZooKeeper's `Stat` that changes only together with the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// The transactions that created the node and that last changed its data: greater is later.
    pub created: i64,
    pub modified: i64,
    /// The time of the last change of the data, in milliseconds since 1970 according to the leader's clock.
    pub modified_at: i64,
    pub owner: Owner,
}

/// The owner of a node, which decides about the node's lifetime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// Exists until it is deleted; it tells nothing about a living process.
    Nobody,
    /// Exists as long as this session.
    Session(i64),
    /// Exists until its last child is deleted.
    Container,
    /// Exists until its time to live passes without a modification.
    Ttl,
}

impl Owner {
    /// Decodes ZooKeeper's field `ephemeralOwner`, which encodes all variants (`EphemeralType` in its source).
    pub(crate) fn of(ephemeral_owner: i64) -> Owner {
        match ephemeral_owner {
            0 => Owner::Nobody,
            i64::MIN => Owner::Container,
            // The highest byte of a session is the number of its server; 255 is reserved if TTL nodes are
            // enabled.
            owner if owner >> 56 == -1 => Owner::Ttl,
            owner => Owner::Session(owner),
        }
    }

    pub fn is_session(self) -> bool {
        matches!(self, Owner::Session(_))
    }
}

/// The result of reading one path.
#[derive(Debug, Clone)]
pub(crate) enum PathContent {
    Absent,
    Present(NodeContent),
}

#[derive(Debug, Clone)]
pub(crate) struct NodeContent {
    /// `None` if the data was not requested.
    pub(crate) data: Option<Result<(Bytes, Stat), Arc<str>>>,
    pub(crate) children: ChildrenUpdate,
}

#[derive(Debug, Clone)]
pub(crate) enum ChildrenUpdate {
    /// Unchanged: the list was not requested or could not be read.
    Unchanged,
    None,
    List(Vec<String>),
}

impl Node {
    pub fn new(data: Bytes, stat: Stat, children: BTreeMap<Arc<str>, Arc<Node>>) -> Node {
        let (size, bytes) = measure(&data, &children);
        Node { data, stat, unreadable: None, children, size, bytes }
    }

    /// Reports whether the node's content was ever read. An unreadable node may be known from its parent only.
    pub fn was_read(&self) -> bool {
        self.stat.created != 0
    }

    /// Returns the number of nodes in the subtree, this one included.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Returns the bytes of the subtree: all data, and the names of all nodes below this one.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the node at a path relative to this one, such as `a/b`. The empty path is this node.
    pub fn at(&self, path: &str) -> Option<&Node> {
        segments(path).try_fold(self, |node, segment| node.children.get(segment).map(|child| &**child))
    }

    /// Calls `each` for all nodes below this one with their relative paths (`a/b`), parents first.
    pub fn walk(&self, each: &mut impl FnMut(&str, &Node)) {
        fn below(node: &Node, path: &mut String, each: &mut impl FnMut(&str, &Node)) {
            for (name, child) in &node.children {
                let length = path.len();
                if length > 0 {
                    path.push('/');
                }
                path.push_str(name);
                each(path, child);
                below(child, path, each);
                path.truncate(length);
            }
        }
        below(self, &mut String::new(), each);
    }

    #[cfg(test)]
    pub(crate) fn leaf(data: &'static str, modified: i64) -> Node {
        let stat = Stat { created: 1, modified, modified_at: 0, owner: Owner::Nobody };
        Node {
            data: Bytes::from_static(data.as_bytes()),
            stat,
            unreadable: None,
            children: BTreeMap::new(),
            size: 1,
            bytes: data.len(),
        }
    }
}

/// Returns the number of nodes and of bytes of a node with this data and these children.
fn measure(data: &Bytes, children: &BTreeMap<Arc<str>, Arc<Node>>) -> (usize, usize) {
    let of = |(name, child): (&Arc<str>, &Arc<Node>)| (child.size, name.len() + child.bytes);
    let add = |sum: (usize, usize), of: (usize, usize)| (sum.0 + of.0, sum.1 + of.1);
    children.iter().map(of).fold((1, data.len()), add)
}

/// Returns the names in a relative path.
pub(crate) fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|segment| !segment.is_empty())
}

/// Returns the path of the child `name` of the node at `path`; both paths are absolute.
pub(crate) fn join(path: &str, name: &str) -> String {
    if path == "/" { format!("/{name}") } else { format!("{path}/{name}") }
}

/// Builds the node at the absolute `path` from the read results at and below it, and from its earlier copy.
pub(crate) fn build(
    path: &str,
    found: &BTreeMap<String, PathContent>,
    before: Option<&Arc<Node>>,
) -> Option<Arc<Node>> {
    let here = match found.get(path)? {
        PathContent::Absent => return None,
        PathContent::Present(here) => here,
    };
    let (data, stat, unreadable) = match (&here.data, before) {
        (Some(Ok((data, stat))), _) => (data.clone(), *stat, None),
        (Some(Err(why)), Some(before)) => (before.data.clone(), before.stat, Some(why.clone())),
        (None, Some(before)) => (before.data.clone(), before.stat, before.unreadable.clone()),
        (Some(Err(why)), None) => {
            let stat = Stat { created: 0, modified: 0, modified_at: 0, owner: Owner::Nobody };
            (Bytes::new(), stat, Some(why.clone()))
        }
        // The list of children arrived for a node that was never read: an event came too late.
        (None, None) => return None,
    };
    let children: BTreeMap<Arc<str>, Arc<Node>> = match &here.children {
        ChildrenUpdate::None => BTreeMap::new(),
        ChildrenUpdate::Unchanged => before.map(|before| before.children.clone()).unwrap_or_default(),
        ChildrenUpdate::List(names) => {
            let child = |name: &String| {
                let known = before.and_then(|before| before.children.get_key_value(name.as_str()));
                let path = join(path, name);
                let node = if found.contains_key(&path) {
                    build(&path, found, known.map(|(_, node)| node))?
                } else {
                    known?.1.clone()
                };
                let name = known.map_or_else(|| Arc::from(name.as_str()), |(name, _)| name.clone());
                Some((name, node))
            };
            names.iter().filter_map(child).collect()
        }
    };
    if let Some(before) = before
        && before.stat == stat
        && before.unreadable == unreadable
        && before.data == data
        && have_same_pointers(&before.children, &children)
    {
        return Some(before.clone());
    }
    let (size, bytes) = measure(&data, &children);
    Some(Arc::new(Node { data, stat, unreadable, children, size, bytes }))
}

fn have_same_pointers(before: &BTreeMap<Arc<str>, Arc<Node>>, now: &BTreeMap<Arc<str>, Arc<Node>>) -> bool {
    let pairs = before.iter().zip(now);
    before.len() == now.len() && pairs.fold(true, |same, (a, b)| same && a.0 == b.0 && Arc::ptr_eq(a.1, b.1))
}

/// Puts `node` at the relative `path` in `tree`, or removes the node there. Does nothing if the parent is
/// missing or `node` is unchanged.
pub(crate) fn put(tree: &mut Option<Arc<Node>>, path: &str, node: Option<Arc<Node>>) {
    let before = tree
        .as_ref()
        .and_then(|tree| segments(path).try_fold(tree, |node, segment| node.children.get(segment)));
    match (before, &node) {
        (None, None) => return,
        (Some(before), Some(node)) if Arc::ptr_eq(before, node) => return,
        _ => {}
    }
    let mut names = segments(path).peekable();
    if names.peek().is_none() {
        *tree = node;
        return;
    }
    // The name of a node counts towards its parent's bytes.
    let name = segments(path).last().map_or(0, str::len);
    let of = |node: Option<&Arc<Node>>| node.map_or((0, 0), |node| (node.size, node.bytes + name));
    let (less, more) = (of(before), of(node.as_ref()));
    let parents = || segments(path).take(segments(path).count().saturating_sub(1));
    let has_parent =
        tree.as_ref().is_some_and(|tree| tree.at(&parents().collect::<Vec<_>>().join("/")).is_some());
    let (true, Some(tree)) = (has_parent, tree) else { return };
    let resize = |parent: &mut Node| {
        parent.size = parent.size + more.0 - less.0;
        parent.bytes = parent.bytes + more.1 - less.1;
    };
    let mut parent = Arc::make_mut(tree);
    resize(parent);
    while let Some(name) = names.next() {
        if names.peek().is_none() {
            match node {
                Some(node) => _ = parent.children.insert(Arc::from(name), node),
                None => _ = parent.children.remove(name),
            }
            return;
        }
        let Some(child) = parent.children.get_mut(name) else { return };
        parent = Arc::make_mut(child);
        resize(parent);
    }
}

/// Returns how many levels `path` is below `root`; both are absolute. The root itself has depth 0.
pub(crate) fn depth(root: &str, path: &str) -> usize {
    segments(path).count().saturating_sub(segments(root).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here(data: &'static str, modified: i64, children: &[&str]) -> PathContent {
        let node = Node::leaf(data, modified);
        let children = if children.is_empty() {
            ChildrenUpdate::None
        } else {
            ChildrenUpdate::List(children.iter().map(|name| (*name).to_owned()).collect())
        };
        PathContent::Present(NodeContent { data: Some(Ok((node.data, node.stat))), children })
    }

    fn found<const N: usize>(found: [(&str, PathContent); N]) -> BTreeMap<String, PathContent> {
        found.into_iter().map(|(path, found)| (path.to_owned(), found)).collect()
    }

    fn show(tree: Option<&Arc<Node>>) -> String {
        let Some(tree) = tree else { return "absent".to_owned() };
        let mut lines = vec![format!("{} ({})", String::from_utf8_lossy(&tree.data), tree.size())];
        tree.walk(&mut |path, node| {
            let unreadable = node.unreadable.as_ref().map(|why| format!(" {why}")).unwrap_or_default();
            lines.push(format!("{path}={}{unreadable}", String::from_utf8_lossy(&node.data)));
        });
        lines.join(" ")
    }

    fn whole() -> BTreeMap<String, PathContent> {
        found([
            ("/r", here("root", 1, &["a", "b", "late"])),
            ("/r/a", here("A", 2, &["x", "y"])),
            ("/r/a/x", here("X", 3, &[])),
            ("/r/a/y", here("Y", 4, &[])),
            ("/r/b", here("B", 5, &[])),
            // Deleted between the list and the read.
            ("/r/late", PathContent::Absent),
        ])
    }

    #[test]
    fn what_did_not_change_keeps_its_pointer() {
        let first = build("/r", &whole(), None).unwrap();
        assert_eq!(show(Some(&first)), "root (5) a=A a/x=X a/y=Y b=B");
        let again = build("/r", &whole(), Some(&first)).unwrap();
        assert!(Arc::ptr_eq(&first, &again));

        let mut changed = whole();
        changed.insert("/r/a/x".to_owned(), here("X2", 9, &[]));
        let second = build("/r", &changed, Some(&first)).unwrap();
        assert_eq!(show(Some(&second)), "root (5) a=A a/x=X2 a/y=Y b=B");
        assert!(Arc::ptr_eq(&first.children["b"], &second.children["b"]));
        assert!(Arc::ptr_eq(&first.children["a"].children["y"], &second.children["a"].children["y"]));
        assert!(!Arc::ptr_eq(&first.children["a"], &second.children["a"]));
    }

    #[test]
    fn one_node_is_put_in_without_touching_the_others() {
        let first = build("/r", &whole(), None).unwrap();
        let mut tree = Some(first.clone());
        put(&mut tree, "a/z", Some(Arc::new(Node::leaf("Z", 9))));
        assert_eq!(show(tree.as_ref()), "root (6) a=A a/x=X a/y=Y a/z=Z b=B");
        assert!(Arc::ptr_eq(&first.children["b"], &tree.as_ref().unwrap().children["b"]));
        put(&mut tree, "a", None);
        assert_eq!(show(tree.as_ref()), "root (2) b=B");
        put(&mut tree, "a/x", Some(Arc::new(Node::leaf("X", 9))));
        put(&mut tree, "c", None);
        assert_eq!(show(tree.as_ref()), "root (2) b=B", "without a parent there is no child");
        put(&mut tree, "", None);
        assert_eq!(show(tree.as_ref()), "absent");
        assert_eq!(show(Some(&first)), "root (5) a=A a/x=X a/y=Y b=B", "a view stays as it was");
    }

    #[test]
    fn a_node_that_cannot_be_read_is_what_was_known_of_it() {
        let first = build("/r", &whole(), None).unwrap();
        let refused = PathContent::Present(NodeContent {
            data: Some(Err("no".into())),
            children: ChildrenUpdate::Unchanged,
        });
        let mut now = whole();
        now.insert("/r/a".to_owned(), refused.clone());
        now.insert("/r/b".to_owned(), refused.clone());
        let second = build("/r", &now, Some(&first)).unwrap();
        assert_eq!(show(Some(&second)), "root (5) a=A no a/x=X a/y=Y b=B no");
        let fresh = build("/r", &found([("/r", here("root", 1, &["a"])), ("/r/a", refused)]), None).unwrap();
        assert_eq!(show(Some(&fresh)), "root (2) a= no");
    }

    #[test]
    fn a_list_of_children_alone_keeps_those_that_stay() {
        let first = build("/r", &whole(), None).unwrap();
        let listed = |names: &[&str]| {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            PathContent::Present(NodeContent { data: None, children: ChildrenUpdate::List(names) })
        };
        let now = found([("/r/a", listed(&["y", "z"])), ("/r/a/z", here("Z", 8, &[]))]);
        let a = build("/r/a", &now, first.children.get("a")).unwrap();
        assert_eq!(show(Some(&a)), "A (3) y=Y z=Z");
        assert!(Arc::ptr_eq(&a.children["y"], &first.children["a"].children["y"]));
    }

    #[test]
    fn an_owner_is_a_session_or_none() {
        assert_eq!(Owner::of(0), Owner::Nobody);
        assert_eq!(Owner::of(i64::MIN), Owner::Container);
        assert_eq!(Owner::of(0xff00_0000_0000_03e8_u64.cast_signed()), Owner::Ttl);
        assert_eq!(Owner::of(0x1_0000_1234), Owner::Session(0x1_0000_1234));
        // A session of a server whose number has its highest bit set.
        assert!(Owner::of(0x9000_0000_0000_0001_u64.cast_signed()).is_session());
    }
}
