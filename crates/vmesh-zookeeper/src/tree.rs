//! What was read of a subtree. What did not change keeps its pointer, so that whoever looks at a view sees at once
//! where it differs from the last.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

/// A node and all below it, as far as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub data: Bytes,
    pub stat: Stat,
    /// Why the node cannot be read now; the rest is what was last known of it, if anything.
    pub unreadable: Option<Arc<str>>,
    pub children: BTreeMap<Arc<str>, Arc<Node>>,
    /// How many nodes there are, this one included.
    size: usize,
    /// How many bytes the data of all of them and the names of all below this one have.
    bytes: usize,
}

/// What ZooKeeper says of a node, as far as it changes only when the node does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// The transactions that made it and that last changed its data: greater is later.
    pub created: i64,
    pub modified: i64,
    /// When its data last changed, in milliseconds since 1970, by the clock of the leader of then.
    pub modified_at: i64,
    pub owner: Owner,
}

/// For how long a node stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// Until it is deleted: it says nothing about whether anybody is alive.
    Nobody,
    /// For as long as this session.
    Session(i64),
    /// Until its last child is gone.
    Container,
    /// Until it was not touched for some time.
    Ttl,
}

impl Owner {
    /// From `ephemeralOwner`, in which ZooKeeper keeps all of this (`EphemeralType` there).
    pub(crate) fn of(ephemeral_owner: i64) -> Owner {
        match ephemeral_owner {
            0 => Owner::Nobody,
            i64::MIN => Owner::Container,
            // The topmost byte is the server's number, and 255 is reserved where there are such nodes.
            owner if owner >> 56 == -1 => Owner::Ttl,
            owner => Owner::Session(owner),
        }
    }

    pub fn is_session(self) -> bool {
        matches!(self, Owner::Session(_))
    }
}

/// What a reading found at a path.
#[derive(Debug, Clone)]
pub(crate) enum Found {
    Gone,
    Here(Here),
}

#[derive(Debug, Clone)]
pub(crate) struct Here {
    /// `None` if it was not asked for.
    pub(crate) data: Option<Result<(Bytes, Stat), Arc<str>>>,
    pub(crate) children: Children,
}

#[derive(Debug, Clone)]
pub(crate) enum Children {
    /// Not asked for, or it could not be told: those that are known.
    AsKnown,
    None,
    Are(Vec<String>),
}

impl Node {
    pub fn new(data: Bytes, stat: Stat, children: BTreeMap<Arc<str>, Arc<Node>>) -> Node {
        let (size, bytes) = measured(&data, &children);
        Node { data, stat, unreadable: None, children, size, bytes }
    }

    /// Whether anything was ever read of it: a node that may not be read is known by its parent only.
    pub fn was_read(&self) -> bool {
        self.stat.created != 0
    }

    /// How many nodes there are, this one included.
    pub fn size(&self) -> usize {
        self.size
    }

    /// How many bytes the data of all of them and the names of all below this one have.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The node at a path relative to this one: `a/b`; this one at the empty path.
    pub fn at(&self, path: &str) -> Option<&Node> {
        segments(path).try_fold(self, |node, segment| node.children.get(segment).map(|child| &**child))
    }

    /// All nodes below this one, each with its relative path (`a/b`), parents first.
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

/// How many nodes, and how many bytes, a node with this data and these children has.
fn measured(data: &Bytes, children: &BTreeMap<Arc<str>, Arc<Node>>) -> (usize, usize) {
    let of = |(name, child): (&Arc<str>, &Arc<Node>)| (child.size, name.len() + child.bytes);
    let add = |sum: (usize, usize), of: (usize, usize)| (sum.0 + of.0, sum.1 + of.1);
    children.iter().map(of).fold((1, data.len()), add)
}

/// The names in a relative path.
pub(crate) fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|segment| !segment.is_empty())
}

/// Where the child `name` of the node at `path` is; both absolute.
pub(crate) fn join(path: &str, name: &str) -> String {
    if path == "/" { format!("/{name}") } else { format!("{path}/{name}") }
}

/// The node at the absolute `path`, of what was found there and below, and of what was known of it.
pub(crate) fn build(
    path: &str,
    found: &BTreeMap<String, Found>,
    before: Option<&Arc<Node>>,
) -> Option<Arc<Node>> {
    let here = match found.get(path)? {
        Found::Gone => return None,
        Found::Here(here) => here,
    };
    let (data, stat, unreadable) = match (&here.data, before) {
        (Some(Ok((data, stat))), _) => (data.clone(), *stat, None),
        (Some(Err(why)), Some(before)) => (before.data.clone(), before.stat, Some(why.clone())),
        (None, Some(before)) => (before.data.clone(), before.stat, before.unreadable.clone()),
        (Some(Err(why)), None) => {
            let stat = Stat { created: 0, modified: 0, modified_at: 0, owner: Owner::Nobody };
            (Bytes::new(), stat, Some(why.clone()))
        }
        // Its children were asked for, and it was never read: what asked was told of it too late.
        (None, None) => return None,
    };
    let children: BTreeMap<Arc<str>, Arc<Node>> = match &here.children {
        Children::None => BTreeMap::new(),
        Children::AsKnown => before.map(|before| before.children.clone()).unwrap_or_default(),
        Children::Are(names) => {
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
        && same(&before.children, &children)
    {
        return Some(before.clone());
    }
    let (size, bytes) = measured(&data, &children);
    Some(Arc::new(Node { data, stat, unreadable, children, size, bytes }))
}

fn same(before: &BTreeMap<Arc<str>, Arc<Node>>, now: &BTreeMap<Arc<str>, Arc<Node>>) -> bool {
    let pairs = before.iter().zip(now);
    before.len() == now.len() && pairs.fold(true, |same, (a, b)| same && a.0 == b.0 && Arc::ptr_eq(a.1, b.1))
}

/// Puts `node` at the relative `path` in `tree`, or takes away what is there. Nothing happens if its parent is not
/// there, or if it is the one that is there.
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
    // A node's name is one of its parent's bytes.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn here(data: &'static str, modified: i64, children: &[&str]) -> Found {
        let node = Node::leaf(data, modified);
        let children = if children.is_empty() {
            Children::None
        } else {
            Children::Are(children.iter().map(|name| (*name).to_owned()).collect())
        };
        Found::Here(Here { data: Some(Ok((node.data, node.stat))), children })
    }

    fn found<const N: usize>(found: [(&str, Found); N]) -> BTreeMap<String, Found> {
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

    fn whole() -> BTreeMap<String, Found> {
        found([
            ("/r", here("root", 1, &["a", "b", "late"])),
            ("/r/a", here("A", 2, &["x", "y"])),
            ("/r/a/x", here("X", 3, &[])),
            ("/r/a/y", here("Y", 4, &[])),
            ("/r/b", here("B", 5, &[])),
            // Gone between the list and the look.
            ("/r/late", Found::Gone),
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
        let refused = Found::Here(Here { data: Some(Err("no".into())), children: Children::AsKnown });
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
            Found::Here(Here { data: None, children: Children::Are(names) })
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
        // The session of a server whose number has the topmost bit.
        assert!(Owner::of(0x9000_0000_0000_0001_u64.cast_signed()).is_session());
    }
}
