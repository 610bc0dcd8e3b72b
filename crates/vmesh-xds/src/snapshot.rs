use crate::{Group, Kind, Resource, Store};
use std::collections::BTreeSet;
use std::sync::Arc;

/// The groups that a client may see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Groups {
    All,
    Named(BTreeSet<Arc<str>>),
}

/// The part of a store that one client may see. The server answers a client as if resources outside its scope
/// did not exist (R35).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    pub groups: Groups,
    /// Resources for this client alone. They replace resources of the store that have the same kind and name.
    pub own: Arc<Group>,
}

impl Scope {
    pub fn all() -> Scope {
        Scope { groups: Groups::All, own: Group::new("", []) }
    }

    pub fn named(keys: impl IntoIterator<Item = impl Into<Arc<str>>>) -> Scope {
        Scope { groups: Groups::Named(keys.into_iter().map(Into::into).collect()), ..Scope::all() }
    }

    pub fn with_own(self, resources: impl IntoIterator<Item = Arc<Resource>>) -> Scope {
        Scope { own: Group::new("", resources), ..self }
    }

    pub fn contains(&self, key: &str) -> bool {
        match &self.groups {
            Groups::All => true,
            Groups::Named(keys) => keys.contains(key),
        }
    }
}

/// All resources that one client may see, at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub store: Arc<Store>,
    pub scope: Arc<Scope>,
}

/// The result of looking up a name in a snapshot.
pub(crate) enum Lookup<'a> {
    Present(&'a Arc<Resource>),
    Absent,
    /// The store is partial and has no record of the name: the resource may exist.
    Unknown,
}

impl Snapshot {
    pub fn get(&self, kind: Kind, name: &str) -> Option<&Arc<Resource>> {
        match self.find(kind, name) {
            Lookup::Present(resource) => Some(resource),
            Lookup::Absent | Lookup::Unknown => None,
        }
    }

    pub(crate) fn find(&self, kind: Kind, name: &str) -> Lookup<'_> {
        let found = match self.scope.own.get(kind, name) {
            Some(own) => Some(own),
            None => self.store.find(kind, name, |key| self.scope.contains(key)),
        };
        match found {
            Some(resource) if !resource.is_absent() => Lookup::Present(resource),
            None if self.store.is_partial() && !self.has_all(kind) => Lookup::Unknown,
            _ => Lookup::Absent,
        }
    }

    /// Reports whether [`Snapshot::of_kind`] lists all resources of the kind that exist.
    pub(crate) fn knows_all(&self, kind: Kind) -> bool {
        !self.store.is_partial() || self.has_all(kind)
    }

    /// Reports whether a partial store has the tombstone `*`, which states that it has all resources of the
    /// kind.
    fn has_all(&self, kind: Kind) -> bool {
        kind.has_wildcard()
            && self.store.find(kind, "*", |key| self.scope.contains(key)).is_some_and(|star| star.is_absent())
    }

    /// Iterates over all resources of a kind that the client may see, each name once.
    pub fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Arc<Resource>> {
        let own = self.scope.own.of_kind(kind).iter();
        let shared = self.groups().flat_map(move |group| group.of_kind(kind));
        let has_own = !self.scope.own.of_kind(kind).is_empty();
        let shared = shared.filter(move |resource| {
            if !has_own && self.store.is_unique(kind, resource.name()) {
                return true;
            }
            let visible = self.get(kind, resource.name());
            visible.is_some_and(|visible| Arc::ptr_eq(visible, resource))
        });
        own.chain(shared).filter(|resource| !resource.is_absent())
    }

    fn groups(&self) -> Box<dyn Iterator<Item = &Arc<Group>> + '_> {
        match &self.scope.groups {
            Groups::All => Box::new(self.store.groups()),
            Groups::Named(keys) => Box::new(keys.iter().filter_map(|key| self.store.group(key))),
        }
    }

    /// Calls `changed` with a resource of each name that may differ from `before`, perhaps more than once for
    /// one name. The cost is that of the changed groups in scope, as long as both stores have the same lineage.
    pub(crate) fn changes_since(&self, before: &Snapshot, mut changed: impl FnMut(&Arc<Resource>)) {
        diff(Some(&before.scope.own), Some(&self.scope.own), &mut changed);
        let old = |key: &str| before.store.group(key).filter(|_| before.scope.contains(key));
        let new = |key: &str| self.store.group(key).filter(|_| self.scope.contains(key));
        let mut compare = |key: &str| diff(old(key), new(key), &mut changed);

        let same_scope = Arc::ptr_eq(&before.scope, &self.scope) || before.scope.groups == self.scope.groups;
        let logged = || match same_scope && self.store.shares_lineage(&before.store) {
            true => self.store.changed_since(before.store.generation()),
            false => None,
        };
        let logged_at_most = |most: usize| logged().is_some_and(|mut keys| keys.nth(most).is_none());
        match (&before.scope.groups, &self.scope.groups) {
            // Comparing the pointers of a few groups is cheaper than reading a long log.
            (_, Groups::Named(names)) if logged_at_most(names.len()) => {
                let in_scope = logged().into_iter().flatten().filter(|key| names.contains(*key));
                in_scope.for_each(|key| compare(key));
            }
            (Groups::Named(old), Groups::Named(new)) => old.union(new).for_each(|key| compare(key)),
            (Groups::All, Groups::All) if logged().is_some() => {
                logged().into_iter().flatten().for_each(|key| compare(key));
            }
            _ => {
                before.groups().for_each(|group| compare(group.key()));
                self.groups().for_each(|group| compare(group.key()));
            }
        }
    }
}

fn diff(old: Option<&Arc<Group>>, new: Option<&Arc<Group>>, changed: &mut impl FnMut(&Arc<Resource>)) {
    if let (Some(old), Some(new)) = (old, new)
        && Arc::ptr_eq(old, new)
    {
        return;
    }
    let old = old.map(|group| group.resources()).unwrap_or_default();
    let new = new.map(|group| group.resources()).unwrap_or_default();
    let (mut olds, mut news) = (old.iter().peekable(), new.iter().peekable());
    // Both lists are sorted, so one pass visits every name of either list once.
    loop {
        let order = match (olds.peek(), news.peek()) {
            (None, None) => return,
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (Some(old), Some(new)) => (old.kind(), old.name()).cmp(&(new.kind(), new.name())),
        };
        let old = if order.is_le() { olds.next() } else { None };
        let new = if order.is_ge() { news.next() } else { None };
        if old != new
            && let Some(resource) = new.or(old)
        {
            changed(resource);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(key: &str, version: &str) -> (Arc<str>, Option<Arc<Group>>) {
        let cluster = Resource::from_bytes(Kind::Cluster, key, version.as_bytes());
        let endpoints = Resource::from_bytes(Kind::Endpoint, key, b"endpoints");
        (key.into(), Some(Group::new(key, [cluster, endpoints])))
    }

    fn snapshot(store: &Store, scope: Scope) -> Snapshot {
        Snapshot { store: Arc::new(store.clone()), scope: Arc::new(scope) }
    }

    fn changes(before: &Snapshot, after: &Snapshot) -> Vec<String> {
        let mut changes_seen = Vec::new();
        after.changes_since(before, |resource| {
            changes_seen.push(format!("{} {}", resource.kind(), resource.name()))
        });
        changes_seen
    }

    #[test]
    fn only_what_changed_in_scope_is_a_change() {
        let one = Store::default().apply([group("a", "1"), group("b", "1")]);
        let two = one.apply([group("a", "2")]);
        let named = |store, keys: &[&str]| snapshot(store, Scope::named(keys.iter().copied()));
        assert_eq!(changes(&snapshot(&one, Scope::all()), &snapshot(&two, Scope::all())), ["cluster a"]);
        assert_eq!(changes(&named(&one, &["a"]), &named(&two, &["a"])), ["cluster a"]);
        assert_eq!(changes(&named(&one, &["b"]), &named(&two, &["b"])), [""; 0]);
        assert_eq!(changes(&named(&one, &["b"]), &named(&two, &["a", "b"])), ["cluster a", "endpoints a"]);
        assert_eq!(
            changes(&named(&one, &["a", "b"]), &snapshot(&two, Scope::all())),
            ["cluster a", "cluster a"]
        );
    }

    #[test]
    fn stores_of_different_lines_are_compared_by_content() {
        let one = Store::default().apply([group("a", "1"), group("b", "1")]);
        let other = Store::default().apply([group("b", "1")]).apply([group("a", "2")]);
        let changes_seen = changes(&snapshot(&one, Scope::all()), &snapshot(&other, Scope::all()));
        assert!(
            !changes_seen.is_empty() && changes_seen.iter().all(|change| change == "cluster a"),
            "{changes_seen:?}"
        );
    }

    #[test]
    fn own_resources_win_over_shared_ones() {
        let store = Store::default().apply([group("a", "1")]);
        let own = Resource::from_bytes(Kind::Cluster, "a", b"mine");
        let plain = snapshot(&store, Scope::all());
        let with_own = snapshot(&store, Scope::all().with_own([own.clone()]));
        assert_eq!(with_own.get(Kind::Cluster, "a"), Some(&own));
        assert_eq!(with_own.of_kind(Kind::Cluster).collect::<Vec<_>>(), [&own]);
        assert_eq!(changes(&plain, &with_own), ["cluster a"]);
    }

    #[test]
    fn what_is_out_of_scope_does_not_exist() {
        let store = Store::default().apply([group("a", "1"), group("b", "1")]);
        let snapshot = snapshot(&store, Scope::named(["b"]));
        assert!(snapshot.get(Kind::Cluster, "a").is_none());
        assert_eq!(snapshot.of_kind(Kind::Cluster).count(), 1);
    }
}
