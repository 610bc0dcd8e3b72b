use crate::kind::PerKind;
use crate::{Kind, Resource};
use foldhash::fast::RandomState;
use rpds::{HashTrieMap, HashTrieMapSync, RedBlackTreeMapSync};
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Resources that are set and removed together, such as those of one service. The key has no meaning in this
/// crate.
#[derive(PartialEq, Eq)]
pub struct Group {
    key: Arc<str>,
    /// Sorted by kind and name, each pair once.
    resources: Box<[Arc<Resource>]>,
}

impl Group {
    /// Makes a group. If two resources have the same kind and name, the later one is kept.
    pub fn new(key: impl Into<Arc<str>>, resources: impl IntoIterator<Item = Arc<Resource>>) -> Arc<Group> {
        let mut resources: Vec<_> = resources.into_iter().collect();
        resources.reverse();
        resources.sort_by(|a, b| place(a).cmp(&place(b)));
        resources.dedup_by(|a, b| place(a) == place(b));
        Arc::new(Group { key: key.into(), resources: resources.into() })
    }

    pub fn key(&self) -> &Arc<str> {
        &self.key
    }

    pub fn resources(&self) -> &[Arc<Resource>] {
        &self.resources
    }

    pub fn get(&self, kind: Kind, name: &str) -> Option<&Arc<Resource>> {
        let at = self.resources.binary_search_by(|resource| place(resource).cmp(&(kind, name))).ok()?;
        self.resources.get(at)
    }

    pub fn of_kind(&self, kind: Kind) -> &[Arc<Resource>] {
        let from = self.resources.partition_point(|resource| resource.kind() < kind);
        let to = self.resources.partition_point(|resource| resource.kind() <= kind);
        self.resources.get(from..to).unwrap_or_default()
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.resources).finish()
    }
}

fn place(resource: &Resource) -> (Kind, &str) {
    (resource.kind(), resource.name())
}

/// All groups at one moment. A store is immutable: a change makes a new store that shares all unchanged groups.
#[derive(Clone)]
pub struct Store {
    /// Identifies the family of stores that derive from one empty store. Only their generations are comparable.
    lineage: u64,
    generation: u64,
    partial: bool,
    groups: RedBlackTreeMapSync<Arc<str>, Arc<Group>>,
    /// For each kind and name, the sorted keys of the groups that have such a resource. Only added and removed
    /// names change this index; new content does not.
    owners: PerKind<HashTrieMapSync<Arc<str>, Vec<Arc<str>>, RandomState>>,
    log: ChangeLog,
}

impl Default for Store {
    fn default() -> Store {
        Store::new(false)
    }
}

impl Store {
    /// Makes an empty store that may be incomplete: resources without a record in the store may exist. A session then waits
    /// instead of answering that the resource does not exist.
    pub fn partial() -> Store {
        Store::new(true)
    }

    fn new(partial: bool) -> Store {
        static LINEAGES: AtomicU64 = AtomicU64::new(0);
        Store {
            lineage: LINEAGES.fetch_add(1, Ordering::Relaxed),
            generation: 0,
            partial,
            groups: RedBlackTreeMapSync::new_sync(),
            owners: PerKind::from_fn(|_| HashTrieMap::new_with_hasher_and_ptr_kind(RandomState::default())),
            log: ChangeLog::default(),
        }
    }

    /// Returns a store with the same groups that is complete: a name that it does not have does not exist.
    pub fn complete(&self) -> Store {
        self.with_partial(false)
    }

    /// Returns a store with the same groups that may be incomplete: the opposite of [`Store::complete`].
    pub fn incomplete(&self) -> Store {
        self.with_partial(true)
    }

    fn with_partial(&self, partial: bool) -> Store {
        if self.partial == partial {
            return self.clone();
        }
        // Every lookup may now give another answer, so no earlier generation can be compared with this one.
        let generation = self.generation + 1;
        Store { partial, generation, log: ChangeLog::starting_at(generation), ..self.clone() }
    }

    /// Sets groups or, with `None`, removes them. The cost is proportional to the change. The generation grows
    /// only if a group differs.
    pub fn apply(&self, changes: impl IntoIterator<Item = (Arc<str>, Option<Arc<Group>>)>) -> Store {
        let mut next = self.clone();
        let mut changed = BTreeSet::new();
        for (key, group) in changes {
            let before = next.groups.get(&key).cloned();
            let same = match (&before, &group) {
                (Some(before), Some(group)) => Arc::ptr_eq(before, group) || before == group,
                (None, None) => true,
                _ => false,
            };
            if same {
                continue;
            }
            next.index(&key, before.as_deref(), group.as_deref());
            match group {
                Some(group) => next.groups.insert_mut(key.clone(), group),
                None => _ = next.groups.remove_mut(&key),
            }
            changed.insert(key);
        }
        if !changed.is_empty() {
            next.generation += 1;
            next.log.record(next.generation, changed);
        }
        next
    }

    fn index(&mut self, key: &Arc<str>, before: Option<&Group>, after: Option<&Group>) {
        let names = |group: Option<&Group>, without: Option<&Group>| -> Vec<(Kind, Arc<str>)> {
            group
                .map(Group::resources)
                .unwrap_or_default()
                .iter()
                .filter(|r| without.is_none_or(|group| group.get(r.kind(), r.name()).is_none()))
                .map(|r| (r.kind(), r.name().clone()))
                .collect()
        };
        for (kind, name) in names(before, after) {
            let owners = &mut self.owners[kind];
            let mut keys = owners.get(&name).cloned().unwrap_or_default();
            keys.retain(|owner| owner != key);
            if keys.is_empty() {
                owners.remove_mut(&name);
            } else {
                owners.insert_mut(name, keys);
            }
        }
        for (kind, name) in names(after, before) {
            let owners = &mut self.owners[kind];
            let mut keys = owners.get(&name).cloned().unwrap_or_default();
            if let Err(at) = keys.binary_search(key) {
                keys.insert(at, key.clone());
            }
            owners.insert_mut(name, keys);
        }
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub fn is_partial(&self) -> bool {
        self.partial
    }

    /// Reports whether the generations of the two stores count the same changes.
    pub fn shares_lineage(&self, other: &Store) -> bool {
        self.lineage == other.lineage
    }

    pub fn group(&self, key: &str) -> Option<&Arc<Group>> {
        self.groups.get(key)
    }

    /// Iterates over the groups in the order of their keys.
    pub fn groups(&self) -> impl Iterator<Item = &Arc<Group>> {
        self.groups.values()
    }

    pub fn len(&self) -> usize {
        self.groups.size()
    }

    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Looks up a resource. If several groups have it, the group with the smallest key wins.
    pub fn get(&self, kind: Kind, name: &str) -> Option<&Arc<Resource>> {
        self.find(kind, name, |_| true).filter(|resource| !resource.is_absent())
    }

    /// As [`Store::get`], but searches only the groups that are `visible` and returns tombstones too.
    pub(crate) fn find(
        &self,
        kind: Kind,
        name: &str,
        visible: impl Fn(&Arc<str>) -> bool,
    ) -> Option<&Arc<Resource>> {
        let key = self.owners[kind].get(name)?.iter().find(|key| visible(key))?;
        self.groups.get(key)?.get(kind, name)
    }

    /// Reports whether exactly one group has a resource of that name.
    pub(crate) fn is_unique(&self, kind: Kind, name: &str) -> bool {
        self.owners[kind].get(name).is_some_and(|owners| owners.len() == 1)
    }

    /// Returns the keys of the groups that changed after `generation`, some perhaps twice. Returns `None` if
    /// the log no longer reaches back to that generation or if the generation is in the future: then the caller
    /// must compare all groups.
    pub fn changed_since(&self, generation: u64) -> Option<impl Iterator<Item = &Arc<str>>> {
        let known = (self.log.from..=self.generation).contains(&generation);
        known.then(|| self.log.changes.range(generation + 1..).flat_map(|(_, keys)| keys.iter()))
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "generation {} of {} groups", self.generation, self.groups.size())
    }
}

/// Which groups changed in each generation after `from`.
#[derive(Clone)]
struct ChangeLog {
    from: u64,
    keys: usize,
    changes: RedBlackTreeMapSync<u64, Arc<[Arc<str>]>>,
}

impl ChangeLog {
    /// Limits of the log. A reader that is further behind compares all groups, which costs no more by then.
    const GENERATIONS: usize = 1024;
    const KEYS: usize = 16 * 1024;

    fn starting_at(from: u64) -> ChangeLog {
        ChangeLog { from, keys: 0, changes: RedBlackTreeMapSync::new_sync() }
    }

    fn record(&mut self, generation: u64, keys: BTreeSet<Arc<str>>) {
        self.keys += keys.len();
        self.changes.insert_mut(generation, keys.into_iter().collect());
        while self.keys > ChangeLog::KEYS || self.changes.size() > ChangeLog::GENERATIONS {
            let Some((&oldest, keys)) = self.changes.first() else { return };
            self.keys -= keys.len();
            self.changes.remove_mut(&oldest);
            self.from = oldest;
        }
    }
}

impl Default for ChangeLog {
    fn default() -> ChangeLog {
        ChangeLog::starting_at(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(key: &str, resources: &[(Kind, &str, &str)]) -> (Arc<str>, Option<Arc<Group>>) {
        let resources =
            resources.iter().map(|(kind, name, value)| Resource::from_bytes(*kind, *name, value.as_bytes()));
        (key.into(), Some(Group::new(key, resources)))
    }

    fn gone(key: &str) -> (Arc<str>, Option<Arc<Group>>) {
        (key.into(), None)
    }

    fn changed(store: &Store, since: u64) -> Option<Vec<&str>> {
        store.changed_since(since).map(|keys| keys.map(|key| &**key).collect())
    }

    #[test]
    fn a_store_that_is_told_what_it_knows_stays_the_same_generation() {
        let orders = group("orders", &[(Kind::Cluster, "orders", "1")]);
        let store = Store::default().apply([orders.clone()]);
        assert_eq!(store.generation(), 1);
        assert_eq!(store.apply([orders]).generation(), 1, "the same pointer");
        assert_eq!(store.apply([group("orders", &[(Kind::Cluster, "orders", "1")])]).generation(), 1);
        assert_eq!(store.apply([gone("payments")]).generation(), 1);
        assert_eq!(store.apply([gone("orders")]).generation(), 2);
    }

    #[test]
    fn a_store_remembers_which_groups_changed() {
        let one = Store::default().apply([group("a", &[(Kind::Cluster, "a", "1")]), group("b", &[])]);
        let two = one.apply([group("a", &[(Kind::Cluster, "a", "2")])]);
        let three = two.apply([gone("b")]);
        assert_eq!(changed(&three, 0), Some(vec!["a", "b", "a", "b"]));
        assert_eq!(changed(&three, 1), Some(vec!["a", "b"]));
        assert_eq!(changed(&three, 3), Some(vec![]));
        assert_eq!(changed(&three, 4), None, "a generation that is still to come is another store's");
        assert_eq!(changed(&one, 0), Some(vec!["a", "b"]), "a store never changes");
    }

    #[test]
    fn what_changed_too_long_ago_is_forgotten() {
        let mut store = Store::default();
        for i in 0..2000 {
            store = store.apply([group("a", &[(Kind::Cluster, "a", &i.to_string())])]);
        }
        assert_eq!(changed(&store, 100), None);
        assert_eq!(changed(&store, 1990).unwrap().len(), 10);
        let many = (0..20_000).map(|i| group(&format!("g{i}"), &[]));
        let store = store.apply(many);
        assert_eq!(changed(&store, 2000), None);
        assert_eq!(changed(&store, 2001), Some(vec![]));
    }

    #[test]
    fn a_name_in_two_groups_is_found_in_the_first_and_then_in_the_other() {
        let store = Store::default().apply([
            group("b", &[(Kind::Cluster, "orders", "b")]),
            group("a", &[(Kind::Cluster, "orders", "a")]),
        ]);
        let value = |store: &Store| store.get(Kind::Cluster, "orders").map(|resource| resource.value());
        assert_eq!(value(&store).unwrap(), "a");
        assert_eq!(value(&store.apply([gone("a")])).unwrap(), "b");
        assert_eq!(value(&store.apply([gone("a"), gone("b")])), None);
        assert_eq!(value(&store.apply([group("a", &[(Kind::Route, "orders", "a")])])).unwrap(), "b");
    }

    #[test]
    fn the_later_of_two_equal_names_in_a_group_counts() {
        let (_, group) =
            group("a", &[(Kind::Route, "r", "1"), (Kind::Cluster, "c", "1"), (Kind::Route, "r", "2")]);
        let group = group.unwrap();
        assert_eq!(group.resources().len(), 2);
        assert_eq!(group.get(Kind::Route, "r").unwrap().value(), "2");
        assert_eq!(group.of_kind(Kind::Cluster).len(), 1);
        assert!(group.of_kind(Kind::Secret).is_empty());
    }
}
