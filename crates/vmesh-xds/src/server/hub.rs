use crate::{Groups, Scope, Snapshot, Store};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::task::{Context, Poll, Waker};

/// Distributes stores to streams. A publication wakes only the streams whose scope contains a changed group.
#[derive(Clone, Default)]
pub struct Hub {
    registry: Arc<RwLock<Registry>>,
}

/// Stores and scopes that are published in one step: no stream sees a part of them. If a client moves to a
/// wider scope together with a new route, it never sees the route without the cluster that the wider scope
/// adds.
#[derive(Default)]
pub struct Publication {
    stores: Vec<(Arc<str>, Arc<Store>)>,
    moves: Vec<(FeedControl, Arc<str>, Arc<Scope>)>,
}

impl Publication {
    pub fn new() -> Publication {
        Publication::default()
    }

    /// Adds a store, which becomes the latest of its class.
    pub fn store(mut self, class: impl Into<Arc<str>>, store: Arc<Store>) -> Publication {
        self.stores.push((class.into(), store));
        self
    }

    /// Adds a new class and scope for a connected client. A client whose stream has ended is ignored.
    pub fn scope(mut self, feed: &FeedControl, class: impl Into<Arc<str>>, scope: Arc<Scope>) -> Publication {
        self.moves.push((feed.clone(), class.into(), scope));
        self
    }
}

impl Hub {
    pub fn new() -> Hub {
        Hub::default()
    }

    /// Makes `store` the latest store of a class. The first publication creates the class.
    pub fn publish(&self, class: impl Into<Arc<str>>, store: Arc<Store>) {
        self.publish_all(Publication::new().store(class, store));
    }

    pub fn publish_all(&self, publication: Publication) {
        let mut registry = self.write();
        let mut concerned = HashSet::new();
        for (class, store) in publication.stores {
            registry.publish(class, store, &mut concerned);
        }
        for (feed, class, scope) in publication.moves {
            if feed.registry.ptr_eq(&Arc::downgrade(&self.registry)) && registry.remove_from_class(feed.id) {
                registry.add_to_class(feed.id, class, scope);
                concerned.insert(feed.id);
            }
        }
        let signals: Vec<_> =
            concerned.iter().filter_map(|feed| registry.feeds.get(feed)).map(FeedEntry::signal).collect();
        // The lock is released first: a woken stream reads the registry.
        drop(registry);
        signals.iter().for_each(|signal| wake(signal));
    }

    /// Removes a class and its store, unless a client is in the class.
    pub fn forget(&self, class: &str) {
        let mut registry = self.write();
        if registry.classes.get(class).is_some_and(|class| class.feeds == 0) {
            registry.classes.remove(class);
        }
    }

    /// Returns the number of classes that have a store.
    pub fn classes(&self) -> usize {
        self.read().classes.values().filter(|class| class.latest.is_some()).count()
    }

    /// Returns the latest store of a class.
    pub fn latest(&self, class: &str) -> Option<Arc<Store>> {
        self.read().classes.get(class)?.latest.clone()
    }

    /// Subscribes a stream to the store of a class, seen through `scope`. The class need not be published yet.
    pub fn subscribe(&self, class: impl Into<Arc<str>>, scope: Arc<Scope>) -> Feed {
        let mut registry = self.write();
        let id = registry.next_feed;
        registry.next_feed += 1;
        let signal =
            Arc::new(Mutex::new(FeedSignal { is_stopped: registry.stopping, ..FeedSignal::default() }));
        let class = class.into();
        registry
            .feeds
            .insert(id, FeedEntry { class: class.clone(), scope: scope.clone(), signal: signal.clone() });
        registry.add_to_class(id, class, scope);
        Feed { control: FeedControl { id, registry: Arc::downgrade(&self.registry) }, signal }
    }

    /// Stops all streams, also those that begin later.
    pub fn stop(&self) {
        let mut registry = self.write();
        registry.stopping = true;
        let signals: Vec<_> = registry.feeds.values().map(FeedEntry::signal).collect();
        drop(registry);
        for signal in signals {
            lock(&signal).is_stopped = true;
            wake(&signal);
        }
    }

    pub fn is_stopping(&self) -> bool {
        self.read().stopping
    }

    fn read(&self) -> RwLockReadGuard<'_, Registry> {
        self.registry.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Registry> {
        self.registry.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
struct Registry {
    classes: HashMap<Arc<str>, Class>,
    feeds: HashMap<u64, FeedEntry>,
    next_feed: u64,
    stopping: bool,
}

/// The clients that are served from one store.
#[derive(Default)]
struct Class {
    latest: Option<Arc<Store>>,
    feeds: usize,
    see_all: HashSet<u64>,
    see_many: HashMap<u64, Arc<Scope>>,
    see_few: HashMap<Arc<str>, HashSet<u64>>,
}

/// A scope with at most this many groups is indexed by group. Wider scopes are searched instead, because the
/// memory of the index would grow with the product of clients and groups.
const INDEXED_GROUPS_MAX: usize = 64;

struct FeedEntry {
    class: Arc<str>,
    scope: Arc<Scope>,
    signal: Arc<Mutex<FeedSignal>>,
}

impl FeedEntry {
    fn signal(&self) -> Arc<Mutex<FeedSignal>> {
        self.signal.clone()
    }
}

#[derive(Default)]
struct FeedSignal {
    is_pending: bool,
    is_stopped: bool,
    waker: Option<Waker>,
}

impl Registry {
    fn publish(&mut self, key: Arc<str>, store: Arc<Store>, concerned: &mut HashSet<u64>) {
        let class = self.classes.entry(key.clone()).or_default();
        let before = class.latest.replace(store.clone());
        let changed: Option<BTreeSet<&Arc<str>>> = match &before {
            Some(before) if store.shares_lineage(before) && store.is_partial() == before.is_partial() => {
                store.changed_since(before.generation()).map(Iterator::collect)
            }
            _ => None,
        };
        let Some(changed) = changed else {
            let of_class = self.feeds.iter().filter(|(_, entry)| entry.class == key);
            concerned.extend(of_class.map(|(id, _)| *id));
            return;
        };
        if changed.is_empty() {
            return;
        }
        concerned.extend(&class.see_all);
        let sees_one = |scope: &Scope| changed.iter().any(|key| scope.contains(key));
        concerned.extend(class.see_many.iter().filter(|(_, scope)| sees_one(scope)).map(|(id, _)| *id));
        concerned.extend(changed.iter().filter_map(|key| class.see_few.get(*key)).flatten());
    }

    fn add_to_class(&mut self, id: u64, key: Arc<str>, scope: Arc<Scope>) {
        let class = self.classes.entry(key.clone()).or_default();
        class.feeds += 1;
        match &scope.groups {
            Groups::All => _ = class.see_all.insert(id),
            Groups::Named(keys) if keys.len() > INDEXED_GROUPS_MAX => {
                _ = class.see_many.insert(id, scope.clone())
            }
            Groups::Named(keys) => keys.iter().for_each(|key| {
                class.see_few.entry(key.clone()).or_default().insert(id);
            }),
        }
        if let Some(entry) = self.feeds.get_mut(&id) {
            (entry.class, entry.scope) = (key, scope);
        }
    }

    /// Removes a feed from its class. Returns `false` if the feed no longer exists.
    fn remove_from_class(&mut self, id: u64) -> bool {
        let Some(entry) = self.feeds.get(&id) else { return false };
        let Some(class) = self.classes.get_mut(&entry.class) else { return true };
        class.feeds -= 1;
        match &entry.scope.groups {
            Groups::All => _ = class.see_all.remove(&id),
            Groups::Named(keys) if keys.len() > INDEXED_GROUPS_MAX => _ = class.see_many.remove(&id),
            Groups::Named(keys) => keys.iter().for_each(|key| {
                if let Some(feeds) = class.see_few.get_mut(key) {
                    feeds.remove(&id);
                    if feeds.is_empty() {
                        class.see_few.remove(key);
                    }
                }
            }),
        }
        true
    }
}

fn wake(signal: &Mutex<FeedSignal>) {
    let waker = {
        let mut signal = lock(signal);
        signal.is_pending = true;
        signal.waker.take()
    };
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// One stream's subscription to a [`Hub`].
pub struct Feed {
    control: FeedControl,
    signal: Arc<Mutex<FeedSignal>>,
}

impl Feed {
    /// Returns the client's current snapshot, or `None` until the class of the client is published.
    pub fn latest(&self) -> Option<Snapshot> {
        let hub = Hub { registry: self.control.registry.upgrade()? };
        let registry = hub.read();
        let entry = registry.feeds.get(&self.control.id)?;
        let store = registry.classes.get(&entry.class)?.latest.clone()?;
        Some(Snapshot { store, scope: entry.scope.clone() })
    }

    /// Waits until [`Feed::latest`] may have changed, or the hub stops.
    pub async fn changed(&mut self) {
        poll_fn(|cx| self.poll_changed(cx)).await;
    }

    pub(super) fn poll_changed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut signal = lock(&self.signal);
        if std::mem::take(&mut signal.is_pending) {
            return Poll::Ready(());
        }
        match &signal.waker {
            Some(waker) if waker.will_wake(cx.waker()) => {}
            _ => signal.waker = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    pub fn is_stopped(&self) -> bool {
        lock(&self.signal).is_stopped
    }

    /// Returns a handle that can change the client's class and scope while its stream goes on.
    pub fn control(&self) -> FeedControl {
        self.control.clone()
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        if let Some(registry) = self.control.registry.upgrade() {
            let hub = Hub { registry };
            let mut registry = hub.write();
            registry.remove_from_class(self.control.id);
            registry.feeds.remove(&self.control.id);
        }
    }
}

impl fmt::Debug for Feed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "feed {}", self.control.id)
    }
}

/// A handle on the [`Feed`] of a stream. It may outlive the stream.
#[derive(Clone, Debug)]
pub struct FeedControl {
    id: u64,
    registry: Weak<RwLock<Registry>>,
}

impl FeedControl {
    /// Ends the stream as if the server stopped: the client reconnects, and its admission decides anew.
    pub fn end(&self) {
        let Some(registry) = self.registry.upgrade() else { return };
        let signal = {
            let registry = registry.read().unwrap_or_else(PoisonError::into_inner);
            registry.feeds.get(&self.id).map(FeedEntry::signal)
        };
        if let Some(signal) = signal {
            lock(&signal).is_stopped = true;
            wake(&signal);
        }
    }

    /// Moves the client to another class and scope, unless its stream has ended. Use [`Publication::scope`] for
    /// a move that belongs to a publication.
    pub fn set_scope(&self, class: impl Into<Arc<str>>, scope: Arc<Scope>) {
        if let Some(registry) = self.registry.upgrade() {
            Hub { registry }.publish_all(Publication::new().scope(self, class, scope));
        }
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} feeds of {} classes", self.feeds.len(), self.classes.len())
    }
}

/// Locks a mutex. No code panics while it holds one of these locks, and a panic would leave the data
/// consistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Group, Kind, Resource};

    fn store(before: &Store, key: &str, content: &str) -> Store {
        let group = Group::new(key, [Resource::from_bytes(Kind::Cluster, key, content.as_bytes())]);
        before.apply([(key.into(), Some(group))])
    }

    fn is_woken(feed: &mut Feed) -> bool {
        feed.poll_changed(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    fn sees(feed: &Feed, name: &str) -> bool {
        feed.latest().is_some_and(|snapshot| snapshot.get(Kind::Cluster, name).is_some())
    }

    #[test]
    fn a_publication_wakes_those_whom_it_concerns() {
        let hub = Hub::new();
        let one = store(&Store::default(), "a", "1");
        hub.publish("class", Arc::new(one.clone()));
        let many = |key: &str| (0..100).map(|i| format!("x{i}")).chain([key.to_owned()]);
        let mut feeds = [
            hub.subscribe("class", Arc::new(Scope::all())),
            hub.subscribe("class", Arc::new(Scope::named(["a"]))),
            hub.subscribe("class", Arc::new(Scope::named(many("a")))),
            hub.subscribe("class", Arc::new(Scope::named(["b"]))),
            hub.subscribe("class", Arc::new(Scope::named(many("b")))),
            hub.subscribe("other", Arc::new(Scope::all())),
        ];
        let mut is_pending = |store: &Store| {
            hub.publish("class", Arc::new(store.clone()));
            feeds.iter_mut().map(|feed| if is_woken(feed) { '!' } else { '.' }).collect::<String>()
        };
        assert_eq!(is_pending(&one), "......");
        let two = store(&one, "a", "2");
        assert_eq!(is_pending(&two), "!!!...");
        assert_eq!(is_pending(&store(&two, "c", "1")), "!.....");
        assert_eq!(is_pending(&store(&Store::default(), "b", "1")), "!!!!!.", "another line of stores");
    }

    #[test]
    fn a_class_is_forgotten_when_nobody_is_in_it() {
        let hub = Hub::new();
        hub.publish("class", Arc::new(Store::default()));
        let (all, own) = (hub.subscribe("class", Arc::new(Scope::all())), Scope::named([""; 0]));
        let own = hub.subscribe("class", Arc::new(own));
        drop(all);
        hub.forget("class");
        assert_eq!(hub.classes(), 1, "one that sees nothing shared is in it");
        own.control().set_scope("other", Arc::new(Scope::all()));
        hub.forget("class");
        assert_eq!((hub.classes(), hub.latest("class").is_some()), (0, false));
        hub.publish("class", Arc::new(Store::default()));
        assert!(hub.latest("class").is_some(), "it may come again");
    }

    #[test]
    fn a_client_that_sees_only_its_own_hears_that_its_class_is_there() {
        let hub = Hub::new();
        let mut feed = hub.subscribe("class", Arc::new(Scope::named([""; 0])));
        assert!(feed.latest().is_none());
        hub.publish("class", Arc::new(Store::default()));
        assert!(is_woken(&mut feed) && feed.latest().is_some());
    }

    #[test]
    fn a_scope_can_change_while_the_stream_goes_on() {
        let hub = Hub::new();
        let one = store(&store(&Store::default(), "a", "1"), "b", "1");
        hub.publish("class", Arc::new(one.clone()));
        let mut feed = hub.subscribe("class", Arc::new(Scope::named(["a"])));
        assert!(sees(&feed, "a") && !sees(&feed, "b"));
        let control = feed.control();
        control.set_scope("class", Arc::new(Scope::named(["b"])));
        assert!(is_woken(&mut feed));
        assert!(!sees(&feed, "a") && sees(&feed, "b"));
        let two = store(&one, "a", "2");
        hub.publish("class", Arc::new(two.clone()));
        assert!(!is_woken(&mut feed));
        hub.publish("class", Arc::new(store(&two, "b", "2")));
        assert!(is_woken(&mut feed));
        control.set_scope("unborn", Arc::new(Scope::all()));
        assert!(feed.latest().is_none());
        hub.publish("unborn", Arc::new(one));
        assert!(sees(&feed, "a"));
        drop(feed);
        control.set_scope("class", Arc::new(Scope::all()));
        let registry = hub.read();
        assert!(registry.feeds.is_empty());
        assert!(registry.classes.values().all(|class| class.see_few.is_empty() && class.see_all.is_empty()));
    }

    #[test]
    fn stores_and_moves_are_published_at_once() {
        let hub = Hub::new();
        let feed = hub.subscribe("class", Arc::new(Scope::named(["a"])));
        let both = store(&store(&Store::default(), "a", "1"), "b", "1");
        let wider = Publication::new()
            .store("class", Arc::new(both.clone()))
            .store("other", Arc::new(both))
            .scope(&feed.control(), "class", Arc::new(Scope::named(["a", "b"])));
        hub.publish_all(wider);
        assert!(sees(&feed, "a") && sees(&feed, "b"));
        assert!(hub.latest("other").is_some() && hub.latest("third").is_none());
    }

    #[test]
    fn a_hub_that_stops_tells_every_stream() {
        let hub = Hub::new();
        let mut early = hub.subscribe("class", Arc::new(Scope::all()));
        hub.stop();
        assert!(is_woken(&mut early) && early.is_stopped());
        assert!(hub.subscribe("class", Arc::new(Scope::all())).is_stopped());
    }
}
