//! Compiles each new world for the connected nodes, without holding the lock of the [`Fleet`], and publishes
//! the result.
//!
//! ```text
//! worlds -> World ---------------------------+
//!                                            v
//! Fleet -> nodes that (dis)connected -> Compiler -> Hub                (xDS streams)
//!                                                -> Arc<Compilation>   (API, metrics, ACKs)
//! ```

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use rpds::RedBlackTreeMapSync;
use tokio::sync::watch;
use vmesh_catalog::World;
use vmesh_compile::{Change, Compiler, Configuration, NodeId, Update};
use vmesh_xds::server::{FeedControl, Hub, Publication};

use crate::fleet::Fleet;
use crate::worlds::PublishedWorld;

/// The immutable result of the compiler task, for the API, metrics and ACKs.
#[derive(Clone)]
pub(crate) struct Compilation {
    /// True from the first complete world on, even if sources fail later. Clients are served only then.
    pub(crate) is_ready: bool,
    pub(crate) configuration: Configuration,
    /// For each class of nodes, the generation of the last published store, and the time of its publication.
    pub(crate) published_at: RedBlackTreeMapSync<Arc<str>, (u64, Instant)>,
    /// The time when the compiler last began with a world that changed any node's resources.
    pub(crate) changed_at: SystemTime,
    pub(crate) past: PastWorlds,
}

impl Compilation {
    pub(crate) fn new(world: Arc<World>) -> Compilation {
        Compilation {
            is_ready: false,
            configuration: Configuration::of(world),
            published_at: RedBlackTreeMapSync::new_sync(),
            changed_at: SystemTime::UNIX_EPOCH,
            past: PastWorlds::default(),
        }
    }

    pub(crate) fn world(&self) -> &Arc<World> {
        &self.configuration.world
    }
}

/// The latest worlds before each change of documents, the oldest first. A world and a node's report together
/// yield the configuration that the node had.
#[derive(Clone, Default)]
pub(crate) struct PastWorlds(Arc<VecDeque<PastWorld>>);

/// A world that was replaced by one with other documents.
#[derive(Clone)]
pub(crate) struct PastWorld {
    pub(crate) world: Arc<World>,
    pub(crate) replaced_at: SystemTime,
}

impl PastWorlds {
    /// The number of past worlds. Consecutive worlds share their unchanged parts.
    const MAX: usize = 16;

    fn push(&mut self, world: Arc<World>, replaced_at: SystemTime) {
        let past = Arc::make_mut(&mut self.0);
        past.push_back(PastWorld { world, replaced_at });
        if past.len() > PastWorlds::MAX {
            past.pop_front();
        }
    }

    pub(crate) fn worlds(&self) -> impl DoubleEndedIterator<Item = &PastWorld> {
        self.0.iter()
    }
}

/// Compiles worlds and publishes the results, for as long as the future is polled.
pub(crate) async fn run(
    fleet: Arc<Fleet>,
    mut worlds: watch::Receiver<PublishedWorld>,
    compiled: watch::Sender<Arc<Compilation>>,
    hub: Hub,
) {
    let mut compiler = Compiler::new(compiled.borrow().world().clone());
    let mut feeds: HashMap<NodeId, FeedControl> = HashMap::new();
    loop {
        let taken_up = SystemTime::now();
        let nodes = fleet.take_changes();
        let joined = nodes.joined.into_iter().map(|(id, node)| {
            feeds.insert(id, node.feed);
            (id, node.report)
        });
        let joined = joined.collect();
        nodes.left.iter().for_each(|id| _ = feeds.remove(id));
        let (world, is_complete) = {
            let published = worlds.borrow_and_update();
            let is_new = !Arc::ptr_eq(&published.world, compiled.borrow().world());
            (is_new.then(|| published.world.clone()), published.waiting.is_empty())
        };
        let change = Change { world: world.clone(), joined, left: nodes.left };
        // A large change takes a while, during which xDS streams are served.
        let compiling = tokio::task::spawn_blocking(move || {
            let update = compiler.apply(change);
            (compiler, update)
        });
        let update = match compiling.await {
            Ok((back, update)) => {
                compiler = back;
                update
            }
            Err(failed) => match failed.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is shutting down.
                Err(_) => return,
            },
        };
        let mut next = Compilation::clone(&compiled.borrow());
        let before = next.world().clone();
        next.configuration = compiler.configuration();
        next.is_ready |= is_complete;
        if world.is_some() && !(update.stores.is_empty() && update.nodes.is_empty()) {
            next.changed_at = taken_up;
        }
        if !Arc::ptr_eq(&before.documents, &next.world().documents) {
            next.past.push(before, taken_up);
        }
        publish(&hub, &feeds, update, next, &compiled);
        tokio::select! {
            changed = worlds.changed() => if changed.is_err() {
                return;
            },
            () = fleet.nodes_changed() => {}
        }
    }
}

/// Publishes an update in one step, so that no stream gets a new route before the cluster that entered its
/// scope with it.
fn publish(
    hub: &Hub,
    feeds: &HashMap<NodeId, FeedControl>,
    update: Update,
    mut next: Compilation,
    compiled: &watch::Sender<Arc<Compilation>>,
) {
    let Update { stores, nodes, removed_classes } = update;
    let now = Instant::now();
    let mut publication = Publication::new();
    for (class, store) in stores {
        next.published_at.insert_mut(class.clone(), (store.generation(), now));
        publication = publication.store(class, store);
    }
    for (id, config) in nodes {
        if let Some(feed) = feeds.get(&id) {
            publication = publication.scope(feed, config.class.clone(), config.scope.clone());
        }
    }
    removed_classes.iter().for_each(|class| _ = next.published_at.remove_mut(class));
    // The compilation is published before the stores, because the first ACK looks up the time of publication
    // in it.
    compiled.send_replace(Arc::new(next));
    hub.publish_all(publication);
    removed_classes.iter().for_each(|class| hub.forget(class));
}

#[cfg(test)]
mod tests;
