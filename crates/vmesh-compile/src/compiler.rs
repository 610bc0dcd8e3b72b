//! Compiles worlds for all connected nodes.
//!
//! [`Compiler::apply`] takes a new world and the nodes that connected and disconnected, in this order:
//!
//! 1. It removes the nodes that disconnected.
//! 2. It replaces the world, and recompiles each affected service in every class that contains it
//!    ([`Compiler::recompile`]).
//! 3. It computes the class and the scope of each node that connected or may have changed
//!    ([`Compiler::place_node`]), and compiles the services that no node of the class called before.
//! 4. It builds the stores of the classes that changed ([`Compiler::publish`]).
//!
//! Every structure is counted, so that the last node that leaves a class removes what only it needed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rpds::RedBlackTreeMapSync;
use vmesh_catalog::World;
use vmesh_model::document::{AccessDocument, Documents, NodeDocument, NodeFinder, PlacedDocument};
use vmesh_model::node::{Upstream, Upstreams};
use vmesh_model::{Labels, NodeReport, Problem, Protocol, ServiceName};
use vmesh_xds::{Groups, Scope, Store};

use crate::class::{CapturedDestinations, NodeClass, Variant, zones_matter};
use crate::configuration::{Change, CompiledClass, Configuration, Counts, NodeId, Update};
use crate::node::{self, NodeConfig};
use crate::owners::AddressOwners;
use crate::peers::Peers;
use crate::service::{self, CompiledVariant, CompilerInput, Reuse};
use crate::transparent::{CaptureIndex, VirtualAddressTable};
use crate::zones::Zones;

/// A compiler for all connected nodes. It compiles each variant of a service once, and drops a variant when
/// the last class that contains it no longer needs it.
///
/// The owner calls [`apply`](Compiler::apply) with each new world and with the nodes that connected and
/// disconnected, and publishes the returned [`Update`]. [`configuration`](Compiler::configuration) returns
/// the state after the last call.
#[derive(Debug)]
pub struct Compiler {
    configuration: Configuration,
    /// `None` while no class captures connections.
    index: Option<CaptureIndex>,
    zones: Zones,
    zones_matter: bool,
    peers: Peers,
    uses_mtls: bool,
    classes: BTreeMap<Arc<str>, ClassState>,
    variants: BTreeMap<ServiceName, BTreeMap<Arc<str>, CountedVariant>>,
    nodes: BTreeMap<NodeId, NodeState>,
    /// For each service name, the classes in which at least one node calls it by name. The service need not
    /// exist.
    classes_by_upstream: BTreeMap<Arc<str>, BTreeSet<Arc<str>>>,
    /// The classes in which at least one node subscribes to all services.
    classes_with_all_services: BTreeSet<Arc<str>>,
    /// For each service name, the nodes that run a workload of that service.
    nodes_by_workload: BTreeMap<ServiceName, BTreeSet<NodeId>>,
}

/// A compiled variant and the number of classes that contain it.
#[derive(Debug)]
struct CountedVariant {
    compiled: Arc<CompiledVariant>,
    classes: usize,
}

#[derive(Debug)]
struct ClassState {
    class: Arc<NodeClass>,
    nodes: BTreeSet<NodeId>,
    /// The number of nodes in this class that subscribe to all services.
    subscribers_to_all: usize,
    /// For each service name, the number of nodes in this class that call it by name.
    callers: BTreeMap<Arc<str>, usize>,
    services: RedBlackTreeMapSync<ServiceName, Arc<CompiledVariant>>,
    store: Arc<Store>,
    /// The services that changed since `store` was built.
    changed: BTreeSet<ServiceName>,
}

#[derive(Debug)]
struct NodeState {
    report: Arc<NodeReport>,
    documents: Vec<Arc<PlacedDocument<NodeDocument>>>,
    config: Option<Arc<NodeConfig>>,
}

impl Compiler {
    /// Returns a compiler of `world` with no node connected.
    pub fn new(world: Arc<World>) -> Compiler {
        let mut zones = Zones::default();
        let known: Vec<_> = world.service_names().cloned().collect();
        zones.update(None, &world, &known);
        let configuration = Configuration {
            world: world.clone(),
            classes: RedBlackTreeMapSync::new_sync(),
            nodes: RedBlackTreeMapSync::new_sync(),
            problems: RedBlackTreeMapSync::new_sync(),
        };
        let mut compiler = Compiler {
            configuration,
            index: None,
            zones,
            zones_matter: zones_matter(&world.documents),
            peers: Peers::new(&world),
            uses_mtls: world.documents.uses_mtls(),
            classes: BTreeMap::new(),
            variants: BTreeMap::new(),
            nodes: BTreeMap::new(),
            classes_by_upstream: BTreeMap::new(),
            classes_with_all_services: BTreeSet::new(),
            nodes_by_workload: BTreeMap::new(),
        };
        known.iter().for_each(|name| compiler.update_problems(name));
        compiler
    }

    /// Returns the configuration after the last change.
    pub fn configuration(&self) -> Configuration {
        self.configuration.clone()
    }

    /// Applies `change`, and compiles the services and nodes that it affects.
    pub fn apply(&mut self, change: Change) -> Update {
        for id in &change.left {
            self.disconnect(*id);
        }
        let mut nodes: BTreeSet<NodeId> = BTreeSet::new();
        if let Some(world) = change.world {
            nodes = self.replace_world(world);
        }
        let documents = self.world().documents.clone();
        // After a restart all nodes connect at once, so the documents are indexed by node instead of searched
        // for each node.
        let finder = match change.joined.is_empty() {
            true => NodeFinder::default(),
            false => documents.node_finder(),
        };
        for (id, report) in change.joined {
            self.disconnect(id);
            for workload in &report.workloads {
                self.nodes_by_workload.entry(workload.service.clone()).or_default().insert(id);
            }
            let documents = finder.find(&report);
            self.nodes.insert(id, NodeState { report, documents, config: None });
            nodes.insert(id);
        }
        let mut update = Update::default();
        for id in nodes {
            if let Some(config) = self.place_node(id) {
                update.nodes.push((id, config));
            }
        }
        self.publish(&mut update);
        update
    }

    /// Returns the number of entries kept for connected nodes.
    pub fn counts(&self) -> Counts {
        let indexed = self.classes_with_all_services.len()
            + self.classes_by_upstream.values().map(BTreeSet::len).sum::<usize>()
            + self.nodes_by_workload.values().map(BTreeSet::len).sum::<usize>();
        Counts {
            nodes: self.nodes.len().max(self.configuration.nodes.size()),
            classes: self.classes.len().max(self.configuration.classes.size()),
            variants: self.variants.values().map(BTreeMap::len).sum(),
            services: self.classes.values().map(|state| state.services.size()).sum(),
            indexed,
        }
    }

    fn world(&self) -> &Arc<World> {
        &self.configuration.world
    }

    /// Replaces the world. Returns the nodes whose own configuration may have changed.
    fn replace_world(&mut self, world: Arc<World>) -> BTreeSet<NodeId> {
        let before = std::mem::replace(&mut self.configuration.world, world.clone());
        let documents_differ = !Arc::ptr_eq(&before.documents, &world.documents);
        let mut names = affected_services(&before, &world);
        let zones_differ = self.zones.update(Some(&before), &world, &names);
        let mut nodes = BTreeSet::new();
        for name in &names {
            let protocol = |world: &World| -> Protocol { world.protocol(name) };
            if protocol(&before) != protocol(&world) {
                nodes.extend(self.nodes_by_workload.get(name).into_iter().flatten());
            }
        }
        if let Some(index) = &mut self.index {
            names = index.update(&before, &world, names.into_iter().collect()).into_iter().collect();
        }
        let differing = self.peers.update(&before, &world);
        names.extend(differing.endpoints);
        nodes.extend(self.nodes_with_label_rules(&differing.labels));
        if documents_differ {
            self.uses_mtls = world.documents.uses_mtls();
            for name in names.iter().filter(|name| called_side_differs(&before, &world, name)) {
                nodes.extend(self.nodes_by_workload.get(name).into_iter().flatten());
            }
        }
        if documents_differ || zones_differ {
            self.zones_matter = zones_matter(&world.documents);
            nodes.extend(self.match_documents(&before.documents));
        }
        for name in &names {
            nodes.extend(self.recompile(name));
        }
        nodes
    }

    /// Returns the nodes that run workloads of a service with a rule for one of these sets of labels.
    fn nodes_with_label_rules(&self, labels: &BTreeSet<Labels>) -> Vec<NodeId> {
        if labels.is_empty() {
            return Vec::new();
        }
        let names_one = |document: &Arc<PlacedDocument<AccessDocument>>| {
            document.rules.iter().any(|rule| labels.contains(&rule.from.nodes))
        };
        let governed = self.world().documents.access.iter();
        let services =
            governed.filter(|(_, documents)| documents.iter().any(names_one)).map(|(name, _)| name);
        services.filter_map(|name| self.nodes_by_workload.get(name)).flatten().copied().collect()
    }

    /// Updates the documents that select each node. Returns the nodes for which these changed, and those
    /// whose class changed.
    fn match_documents(&mut self, before: &Documents) -> Vec<NodeId> {
        let documents = self.world().documents.clone();
        let mesh = |documents: &Documents| documents.mesh.as_ref().map(Arc::as_ptr);
        let mesh_differs = mesh(before) != mesh(&documents);
        let mut nodes = Vec::new();
        let finder = documents.node_finder();
        for (id, node) in &mut self.nodes {
            let now = finder.find(&node.report);
            let is_changed = now.len() != node.documents.len()
                || now.iter().zip(&node.documents).any(|(now, before)| !Arc::ptr_eq(now, before));
            node.documents = now;
            if is_changed || mesh_differs {
                nodes.push(*id);
            }
        }
        let moved = self.nodes.iter().filter(|(_, node)| {
            node.config.as_ref().is_none_or(|config| *self.class_of(node).key() != *config.class)
        });
        nodes.extend(moved.map(|(id, _)| *id));
        nodes
    }

    fn class_of(&self, node: &NodeState) -> NodeClass {
        let zone = node.report.zone.clone();
        let zone = zone.filter(|zone| self.zones_matter && self.zones.has_endpoints(zone));
        NodeClass::of(&node.report, &node.documents, zone, self.uses_mtls)
    }

    /// Recompiles `name` in every class that contains it. Returns the nodes whose own configuration may have
    /// changed.
    fn recompile(&mut self, name: &ServiceName) -> Vec<NodeId> {
        let is_known = self.world().is_known(name);
        let stale = self.variants.remove(name).unwrap_or_default();
        let mut nodes = Vec::new();
        let by_name = self.classes_by_upstream.get(name.as_str()).into_iter().flatten();
        let keys: BTreeSet<Arc<str>> = by_name.chain(&self.classes_with_all_services).cloned().collect();
        let mut fresh: BTreeMap<Arc<str>, CountedVariant> = BTreeMap::new();
        for key in keys {
            let Some(state) = self.classes.get_mut(&key) else { continue };
            let before = state.services.get(name).cloned();
            let now = is_known.then(|| {
                let world = &self.configuration.world;
                let variant = state.class.variant(world, &self.peers, name);
                // A variant compiled from the new endpoints is preferred, because it shares the most
                // resources.
                let sibling =
                    fresh.values().next().or(stale.values().next()).map(|counted| counted.compiled.clone());
                let counted = fresh.entry(variant.key()).or_insert_with_key(|key| {
                    let earlier = stale.get(key).map(|counted| &counted.compiled).or(before.as_ref());
                    let reuse =
                        Reuse { earlier: earlier.map(|earlier| &**earlier), sibling: sibling.as_deref() };
                    compile_variant((world, &self.peers), self.index.as_ref(), name, (key, &variant), reuse)
                });
                counted.classes += 1;
                counted.compiled.clone()
            });
            let reshaped = match (&before, &now) {
                (Some(before), Some(now)) => before.shape.needs_rescoping(&now.shape),
                (None, None) => false,
                _ => true,
            };
            match now {
                Some(now) => state.services.insert_mut(name.clone(), now),
                None => _ = state.services.remove_mut(name),
            }
            state.changed.insert(name.clone());
            if reshaped {
                let concerned = state.nodes.iter().filter(|id| {
                    let Some(node) = self.nodes.get(id) else { return false };
                    node.config.as_ref().is_none_or(|config| config.scope.contains(name.as_str()))
                });
                nodes.extend(concerned);
            }
        }
        if !fresh.is_empty() {
            self.variants.insert(name.clone(), fresh);
        }
        self.update_problems(name);
        nodes
    }

    /// Compiles the service `name` for the class `key`, unless it is compiled there already. Returns `None` if
    /// the service does not exist.
    fn ensure_compiled(&mut self, key: &Arc<str>, name: &ServiceName) -> Option<Arc<CompiledVariant>> {
        let state = self.classes.get_mut(key)?;
        if let Some(compiled) = state.services.get(name) {
            return Some(compiled.clone());
        }
        let world = &self.configuration.world;
        if !world.is_known(name) {
            return None;
        }
        let variant = state.class.variant(world, &self.peers, name);
        let variants = self.variants.entry(name.clone()).or_default();
        let sibling = variants.values().next().map(|counted| counted.compiled.clone());
        let counted = variants.entry(variant.key()).or_insert_with_key(|key| {
            let reuse = Reuse { earlier: None, sibling: sibling.as_deref() };
            compile_variant((world, &self.peers), self.index.as_ref(), name, (key, &variant), reuse)
        });
        counted.classes += 1;
        let (compiled, is_new) = (counted.compiled.clone(), counted.classes == 1);
        state.services.insert_mut(name.clone(), compiled.clone());
        state.changed.insert(name.clone());
        if is_new {
            self.update_problems(name);
        }
        Some(compiled)
    }

    /// Removes the service `name` from the class `key`, in which no node calls it any more. The variant is
    /// dropped when no class contains it.
    fn remove_service(&mut self, key: &Arc<str>, name: &ServiceName) {
        let Some(state) = self.classes.get_mut(key) else { return };
        let Some(compiled) = state.services.get(name).cloned() else { return };
        state.services.remove_mut(name);
        state.changed.insert(name.clone());
        let Some(variants) = self.variants.get_mut(name) else { return };
        let Some(counted) = variants.get_mut(&compiled.variant) else { return };
        counted.classes -= 1;
        if counted.classes > 0 {
            return;
        }
        variants.remove(&compiled.variant);
        if variants.is_empty() {
            self.variants.remove(name);
        }
        self.update_problems(name);
    }

    /// Computes the class and the scope of a node. Returns its new configuration, or `None` if it did not
    /// change.
    fn place_node(&mut self, id: NodeId) -> Option<Arc<NodeConfig>> {
        let node = self.nodes.get(&id)?;
        let (report, documents, before) = (node.report.clone(), node.documents.clone(), node.config.clone());
        let class = self.class_of(node);
        let key = class.key();
        self.add_to_class(&key, class, id);
        let upstreams = node::upstreams(&report, &documents);
        let sees_all = report.upstreams == Upstreams::All;
        let groups = match sees_all {
            true => {
                self.subscribe_to_all(&key, before.as_deref());
                Groups::All
            }
            false => Groups::Named(self.subscribe_to_upstreams(&key, &upstreams, before.as_deref())),
        };
        let (own, problems) = {
            let state = self.classes.get(&key)?;
            let world = &self.configuration.world;
            let (services, captured) = (&state.services, state.class.captured);
            let input = node::NodeInput {
                world,
                peers: &self.peers,
                report: &report,
                documents: &documents,
                services,
                captured,
            };
            node::compile(&input, &upstreams)
        };
        if let Some(before) = &before
            && before.class != key
        {
            self.remove_from_class(id, before);
        }
        let same = before.as_ref().filter(|before| {
            before.class == key && before.scope.groups == groups && *before.scope.own == *own
        });
        let scope = match same {
            Some(before) => before.scope.clone(),
            None => Arc::new(Scope { groups, own }),
        };
        if let Some(before) = same
            && before.problems == problems
        {
            return None;
        }
        let is_same = same.is_some();
        let config = Arc::new(NodeConfig { class: key, scope, problems });
        if let Some(node) = self.nodes.get_mut(&id) {
            node.config = Some(config.clone());
        }
        self.configuration.nodes.insert_mut(id, config.clone());
        (!is_same).then_some(config)
    }

    fn add_to_class(&mut self, key: &Arc<str>, class: NodeClass, id: NodeId) {
        let world = &self.configuration.world;
        if let Some(captured) = class.captured {
            let index = self.index.get_or_insert_with(|| CaptureIndex {
                virtuals: VirtualAddressTable::new(world),
                owners: None,
            });
            if captured == CapturedDestinations::VirtualAndReal {
                index.owners.get_or_insert_with(|| AddressOwners::new(world));
            }
        }
        let state = self.classes.entry(key.clone()).or_insert_with(|| ClassState {
            class: Arc::new(class),
            nodes: BTreeSet::new(),
            subscribers_to_all: 0,
            callers: BTreeMap::new(),
            services: RedBlackTreeMapSync::new_sync(),
            store: Arc::default(),
            changed: BTreeSet::new(),
        });
        state.nodes.insert(id);
    }

    /// Counts a node of the class `key` that subscribes to all services, unless `before` shows that it is
    /// counted already.
    fn subscribe_to_all(&mut self, key: &Arc<str>, before: Option<&NodeConfig>) {
        if before.is_some_and(|before| before.class == *key) {
            return;
        }
        let Some(state) = self.classes.get_mut(key) else { return };
        state.subscribers_to_all += 1;
        if state.subscribers_to_all == 1 {
            self.classes_with_all_services.insert(key.clone());
            let known: Vec<_> = self.configuration.world.service_names().cloned().collect();
            for name in &known {
                self.ensure_compiled(key, name);
            }
        }
    }

    /// Returns the names of the services that a node can reach: its upstreams, and the services that their
    /// routes lead to. Counts the node as a caller of each, and no longer as a caller of those that `before`
    /// lists in addition.
    fn subscribe_to_upstreams(
        &mut self,
        key: &Arc<str>,
        upstreams: &[Upstream],
        before: Option<&NodeConfig>,
    ) -> BTreeSet<Arc<str>> {
        let mut reachable = BTreeSet::new();
        let mut next: Vec<ServiceName> = upstreams.iter().map(|upstream| upstream.service.clone()).collect();
        while let Some(service) = next.pop() {
            if !reachable.insert(service.shared()) {
                continue;
            }
            if let Some(compiled) = self.ensure_compiled(key, &service) {
                next.extend(compiled.shape.references.iter().cloned());
            }
        }
        let none = BTreeSet::new();
        let counted = match before.filter(|before| before.class == *key).map(|before| &before.scope.groups) {
            Some(Groups::Named(names)) => names,
            _ => &none,
        };
        if let Some(state) = self.classes.get_mut(key) {
            for name in reachable.difference(counted) {
                *state.callers.entry(name.clone()).or_default() += 1;
                self.classes_by_upstream.entry(name.clone()).or_default().insert(key.clone());
            }
        }
        let dropped: Vec<_> = counted.difference(&reachable).cloned().collect();
        self.remove_caller(key, dropped);
        reachable
    }

    fn remove_caller(&mut self, key: &Arc<str>, names: Vec<Arc<str>>) {
        for name in names {
            let Some(state) = self.classes.get_mut(key) else { return };
            let Some(callers) = state.callers.get_mut(&name) else { continue };
            *callers -= 1;
            if *callers > 0 {
                continue;
            }
            state.callers.remove(&name);
            let is_seen = state.subscribers_to_all > 0;
            if let Some(classes) = self.classes_by_upstream.get_mut(&name) {
                classes.remove(key);
                if classes.is_empty() {
                    self.classes_by_upstream.remove(&name);
                }
            }
            if !is_seen && let Ok(name) = name.parse() {
                self.remove_service(key, &name);
            }
        }
    }

    /// Removes the node `id` from the class of `config`.
    fn remove_from_class(&mut self, id: NodeId, config: &NodeConfig) {
        let key = &config.class;
        match &config.scope.groups {
            Groups::Named(names) => self.remove_caller(key, names.iter().cloned().collect()),
            Groups::All => {
                let Some(state) = self.classes.get_mut(key) else { return };
                state.subscribers_to_all -= 1;
                if state.subscribers_to_all == 0 {
                    self.classes_with_all_services.remove(key);
                    let uncalled =
                        state.services.keys().filter(|name| !state.callers.contains_key(name.as_str()));
                    let uncalled: Vec<_> = uncalled.cloned().collect();
                    uncalled.iter().for_each(|name| self.remove_service(key, name));
                }
            }
        }
        if let Some(state) = self.classes.get_mut(key) {
            state.nodes.remove(&id);
        }
    }

    fn disconnect(&mut self, id: NodeId) {
        let Some(NodeState { report, config, .. }) = self.nodes.remove(&id) else { return };
        for workload in &report.workloads {
            if let Some(nodes) = self.nodes_by_workload.get_mut(&workload.service) {
                nodes.remove(&id);
                if nodes.is_empty() {
                    self.nodes_by_workload.remove(&workload.service);
                }
            }
        }
        if let Some(config) = config {
            self.remove_from_class(id, &config);
        }
        self.configuration.nodes.remove_mut(&id);
    }

    /// Builds the stores of the classes that changed, and drops the classes without nodes.
    fn publish(&mut self, update: &mut Update) {
        let classes = &mut self.configuration.classes;
        self.classes.retain(|key, state| {
            if state.nodes.is_empty() {
                classes.remove_mut(key);
                update.removed_classes.push(key.clone());
                return false;
            }
            let is_new = !classes.contains_key(key);
            if state.changed.is_empty() && !is_new {
                return true;
            }
            let services = &state.services;
            let changes = std::mem::take(&mut state.changed).into_iter().map(|name| {
                let group = services.get(&name).map(|compiled| compiled.group.clone());
                (name.shared(), group)
            });
            let store = state.store.apply(changes);
            if is_new || store.generation() != state.store.generation() {
                state.store = Arc::new(store);
                update.stores.push((key.clone(), state.store.clone()));
            }
            let class = CompiledClass {
                class: state.class.clone(),
                services: state.services.clone(),
                store: state.store.clone(),
            };
            classes.insert_mut(key.clone(), Arc::new(class));
            true
        });
        if !update.removed_classes.is_empty() {
            let captured = |this| self.classes.values().any(|state| state.class.captured == Some(this));
            let (virtuals, addresses) =
                (captured(CapturedDestinations::Virtual), captured(CapturedDestinations::VirtualAndReal));
            match &mut self.index {
                Some(index) if !addresses && virtuals => index.owners = None,
                Some(_) if !addresses => self.index = None,
                _ => {}
            }
        }
    }

    /// Updates the list of problems of the service `name`, from its documents and its compiled variants.
    fn update_problems(&mut self, name: &ServiceName) {
        let mut problems: BTreeSet<Problem> = BTreeSet::new();
        let world = &self.configuration.world;
        problems.extend(service::find_problems(world, name));
        let variants = self.variants.get(name).into_iter().flatten();
        problems.extend(variants.flat_map(|(_, counted)| &counted.compiled.problems).cloned());
        let listed = &mut self.configuration.problems;
        match problems.is_empty() {
            true if listed.contains_key(name) => _ = listed.remove_mut(name),
            true => {}
            false => listed.insert_mut(name.clone(), problems.into_iter().collect()),
        }
    }
}

/// Compiles a variant that no class contains yet.
fn compile_variant(
    (world, peers): (&World, &Peers),
    index: Option<&CaptureIndex>,
    name: &ServiceName,
    variant: (&Arc<str>, &Variant),
    reuse: Reuse<'_>,
) -> CountedVariant {
    let none = CaptureIndex::default();
    let input = CompilerInput { world, index: index.unwrap_or(&none), peers };
    let compiled = service::compile(input, name, variant, reuse);
    CountedVariant { compiled: Arc::new(compiled), classes: 0 }
}

/// Returns the services that must be recompiled: those that differ between the two worlds, and those whose
/// routes may depend on a document that changed or on whether a service exists.
fn affected_services(before: &World, now: &World) -> BTreeSet<ServiceName> {
    let mut names: BTreeSet<ServiceName> = if now.generation == before.generation + 1 {
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
    let (old, new) = (&before.documents, &now.documents);
    if !Arc::ptr_eq(old, new) {
        let mesh = |documents: &Documents| documents.mesh.as_ref().map(Arc::as_ptr);
        if mesh(old) != mesh(new) {
            names.extend(before.service_names().chain(now.service_names()).cloned());
        }
        add_changed_documents(&old.services, &new.services, &mut names);
        add_changed_documents(&old.routes, &new.routes, &mut names);
        let governed = old.access.keys().chain(new.access.keys());
        names.extend(governed.filter(|name| access_differs(old, new, name)).cloned());
        names.extend(new.routes.keys().cloned());
    }
    if names.iter().any(|name| before.is_known(name) != now.is_known(name)) {
        names.extend(new.routes.keys().cloned());
    }
    names
}

/// Reports whether documents change how nodes that run workloads of `name` receive calls.
fn called_side_differs(before: &World, now: &World, name: &ServiceName) -> bool {
    let mtls = |world: &World| world.documents.services.get(name).and_then(|service| service.mtls);
    mtls(before) != mtls(now) || access_differs(&before.documents, &now.documents, name)
}

fn access_differs(old: &Documents, new: &Documents, name: &ServiceName) -> bool {
    let keys_differ = old.key_sets != new.key_sets;
    let (old, new) = (old.access_of(name), new.access_of(name));
    (keys_differ && !new.is_empty())
        || old.len() != new.len()
        || old.iter().zip(new).any(|(old, new)| !Arc::ptr_eq(old, new))
}

/// Adds to `names` each service whose document was added, removed or replaced.
fn add_changed_documents<T>(
    old: &BTreeMap<ServiceName, Arc<T>>,
    new: &BTreeMap<ServiceName, Arc<T>>,
    names: &mut BTreeSet<ServiceName>,
) {
    names.extend(old.keys().filter(|name| !new.contains_key(*name)).cloned());
    let differs = |(name, document): &(&ServiceName, &Arc<T>)| {
        old.get(*name).is_none_or(|before| !Arc::ptr_eq(before, document))
    };
    names.extend(new.iter().filter(differs).map(|(name, _)| name.clone()));
}
