//! The compiler: a world and a node in, the node's Envoy configuration out.
//!
//! [`compile`] is the whole of it. [`Compiler`] is the same function with a memory: it keeps what it made, and makes
//! anew only what a change concerns. Nodes that see services alike share what is compiled for their [`class`];
//! a node's own is its scope and its listeners ([`node`]).
//!
//! **Invariant:** it never fails, waits, or reads a clock. A bad service becomes a `Problem`, not an error, and
//! costs that service, never the rest of a node's configuration. `cargo tree -p vmesh-compile -e normal` lists no
//! `tokio`. That the memory changes nothing is a property test: any sequence of worlds gives what the last one
//! gives alone.

pub mod class;
mod cluster;
pub mod effective;
mod endpoints;
mod gate;
mod listener;
mod node;
mod owners;
mod route;
mod service;
mod transparent;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use vmesh_catalog::World;
use vmesh_model::document::Documents;
use vmesh_model::{NodeReport, Problem, ServiceName};
use vmesh_xds::{Snapshot, Store};

use owners::Owners;
use transparent::{Index, Virtuals};

pub use class::{Captured, Class, Reshaped, Shared};
pub use endpoints::priorities;
pub use node::NodeConfig;
pub use route::cluster_name;
pub use service::{Compiled, Shape};

/// Everything that `report`'s proxy needs, and what is wrong with what it was made from.
pub fn compile(world: &Arc<World>, report: &NodeReport) -> (Snapshot, Vec<Problem>) {
    let mut compiler = Compiler::new(world.clone());
    let config = compiler.node(report);
    let store = compiler.store(&config.class).unwrap_or_default();
    let mut problems = compiler.problems();
    problems.extend(config.problems);
    (Snapshot { store, scope: config.scope }, problems)
}

/// [`compile`] with a memory.
#[derive(Debug)]
pub struct Compiler {
    world: Arc<World>,
    classes: BTreeMap<Arc<str>, Shared>,
    /// `None` as long as no class captures anything.
    index: Option<Index>,
    zones: Zones,
}

/// How many endpoints are in each zone. A zone without any decides nothing: there a node sees services as a node without
/// a zone does, and is of its class. Or every client that invents a zone would cost a compilation.
#[derive(Debug, Default)]
struct Zones(BTreeMap<Arc<str>, usize>);

impl Zones {
    /// Takes over what differs in the services `names`. True: there is a zone more or less.
    fn update(&mut self, before: Option<&World>, now: &World, names: &[ServiceName]) -> bool {
        let mut differ = false;
        for name in names {
            let zones = |world: &World| -> Vec<Arc<str>> {
                world.endpoints(name).iter().filter_map(|endpoint| endpoint.zone.clone()).collect()
            };
            for zone in zones(now) {
                let count = self.0.entry(zone).or_insert(0);
                differ |= *count == 0;
                *count += 1;
            }
            for zone in before.map(zones).unwrap_or_default() {
                let Some(count) = self.0.get_mut(&zone) else { continue };
                *count -= 1;
                if *count == 0 {
                    self.0.remove(&zone);
                    differ = true;
                }
            }
        }
        differ
    }
}

/// What a new world changed for one class.
#[derive(Debug, Clone)]
pub struct ClassUpdate {
    pub class: Arc<str>,
    pub store: Arc<Store>,
    /// Nodes with one of these in their scope need a new [`NodeConfig`].
    pub reshaped: BTreeSet<ServiceName>,
}

/// What a new world changed.
#[derive(Debug, Clone, Default)]
pub struct Update {
    pub classes: Vec<ClassUpdate>,
    /// Every node needs a new [`NodeConfig`]: documents changed, and with them maybe its class.
    pub documents: bool,
    /// Every node needs a new [`NodeConfig`]: a zone got its first endpoint or lost its last, and classes follow zones.
    pub zones: bool,
}

impl Update {
    /// Reports whether every node may be of another class now.
    pub fn regroups(&self) -> bool {
        self.documents || self.zones
    }
}

impl Compiler {
    /// Begins with the class of an Envoy that no document speaks of: what is wrong with services and routes is known
    /// before the first node has come.
    pub fn new(world: Arc<World>) -> Compiler {
        let class = Class::default();
        let classes = BTreeMap::from([(class.key(), Shared::new(&world, &Index::default(), class))]);
        let mut zones = Zones::default();
        zones.update(None, &world, &world.known().cloned().collect::<Vec<_>>());
        Compiler { world, classes, index: None, zones }
    }

    pub fn world(&self) -> &Arc<World> {
        &self.world
    }

    /// Takes over `world`, compiling what it changed for every class that there is.
    pub fn update(&mut self, world: Arc<World>) -> Update {
        let before = std::mem::replace(&mut self.world, world);
        let world = &self.world;
        let documents = !Arc::ptr_eq(&before.documents, &world.documents);
        let names = if documents { everything(&before, world) } else { changed(&before, world) };
        let mut update = Update { classes: Vec::new(), documents, zones: false };
        if names.is_empty() {
            return update;
        }
        update.zones = self.zones.update(Some(&before), world, &names);
        let names = match &mut self.index {
            Some(index) => index.update(&before, world, names),
            None => names,
        };
        let unindexed = Index::default();
        let index = self.index.as_ref().unwrap_or(&unindexed);
        for (key, shared) in &mut self.classes {
            if documents {
                renew(&mut shared.class, &world.documents);
            }
            let reshaped = shared.recompile(world, index, &names).into_iter().collect();
            update.classes.push(ClassUpdate { class: key.clone(), store: shared.store.clone(), reshaped });
        }
        update
    }

    /// Forgets the classes that are not among `used`, but for the first one.
    pub fn retain(&mut self, used: &BTreeSet<Arc<str>>) {
        let kept = Class::default().key();
        self.classes.retain(|key, _| used.contains(key) || *key == kept);
        let captured = |this| self.classes.values().any(|shared| shared.class.captured == Some(this));
        let (virtuals, addresses) = (captured(Captured::Virtual), captured(Captured::Addresses));
        match &mut self.index {
            Some(index) if !addresses && virtuals => index.owners = None,
            Some(_) if !addresses => self.index = None,
            _ => {}
        }
    }

    /// The configuration of `report`'s node; compiles its class first, if it is the first of it.
    pub fn node(&mut self, report: &NodeReport) -> NodeConfig {
        let class = self.class_of(report);
        let world = &self.world;
        if let Some(captured) = class.captured {
            let index =
                self.index.get_or_insert_with(|| Index { virtuals: Virtuals::new(world), owners: None });
            if captured == Captured::Addresses {
                index.owners.get_or_insert_with(|| Owners::new(world));
            }
        }
        let unindexed = Index::default();
        let index = self.index.as_ref().unwrap_or(&unindexed);
        let shared = self.classes.entry(class.key()).or_insert_with(|| Shared::new(world, index, class));
        node::compile(world, shared, report)
    }

    fn class_of(&self, report: &NodeReport) -> Class {
        let mut class = Class::of(&self.world.documents, report);
        class.zone = class.zone.filter(|zone| self.zones.0.contains_key(zone));
        class
    }

    /// Returns the configuration of `report`'s node if its class is compiled, and compiles nothing but the node's own.
    pub fn known_node(&self, report: &NodeReport) -> Option<NodeConfig> {
        let shared = self.classes.get(&self.class_of(report).key())?;
        Some(node::compile(&self.world, shared, report))
    }

    /// Forgets one class, unless it is the first one.
    pub fn forget(&mut self, class: &str) {
        if *class != *Class::default().key() {
            self.classes.remove(class);
        }
    }

    pub fn store(&self, class: &str) -> Option<Arc<Store>> {
        self.classes.get(class).map(|shared| shared.store.clone())
    }

    pub fn class(&self, class: &str) -> Option<&Shared> {
        self.classes.get(class)
    }

    /// What is wrong with services and routes, each once.
    pub fn problems(&self) -> Vec<Problem> {
        let all: BTreeSet<_> = self.classes.values().flat_map(Shared::problems).cloned().collect();
        all.into_iter().collect()
    }
}

/// A class is named by the selectors of its `Node` documents; what those say may have changed.
fn renew(class: &mut Class, documents: &Documents) {
    for node in &mut class.nodes {
        let selector = node.selector();
        if let Some(now) = documents.nodes.iter().find(|now| now.selector() == selector) {
            *node = now.clone();
        }
    }
}

/// Every service of either world.
fn everything(before: &World, now: &World) -> Vec<ServiceName> {
    let all: BTreeSet<_> = before.known().chain(now.known()).cloned().collect();
    all.into_iter().collect()
}

/// The services that differ, and when one comes or goes also those whose routes may speak of it.
fn changed(before: &World, now: &World) -> Vec<ServiceName> {
    let mut names: BTreeSet<_> = if now.generation == before.generation + 1 {
        now.changes.services.iter().cloned().collect()
    } else {
        let differs = |a: &World, b: &World| -> Vec<ServiceName> {
            let other = |(name, service): &(&ServiceName, &Arc<vmesh_catalog::Service>)| {
                b.services.get(*name).is_none_or(|other| !Arc::ptr_eq(other, service))
            };
            a.services.iter().filter(other).map(|(name, _)| name.clone()).collect()
        };
        differs(before, now).into_iter().chain(differs(now, before)).collect()
    };
    if names.iter().any(|name| before.is_known(name) != now.is_known(name)) {
        names.extend(now.documents.routes.keys().cloned());
    }
    names.into_iter().collect()
}
