//! The compiler's input, [`Change`], and its output: an [`Update`] for each change, and the whole
//! [`Configuration`].

use std::collections::BTreeSet;
use std::sync::Arc;

use rpds::RedBlackTreeMapSync;
use vmesh_catalog::World;
use vmesh_model::{NodeReport, Problem, ServiceName};
use vmesh_xds::{Snapshot, Store};

use crate::class::NodeClass;
use crate::compiler::Compiler;
use crate::node::NodeConfig;
use crate::service::CompiledVariant;

/// The id of a connection of a node. A node that is connected twice has two ids.
pub type NodeId = u64;

/// The input of [`Compiler::apply`]: a new world, and the nodes that connected and disconnected since the
/// last call.
#[derive(Debug, Default)]
pub struct Change {
    pub world: Option<Arc<World>>,
    pub joined: Vec<(NodeId, Arc<NodeReport>)>,
    pub left: Vec<NodeId>,
}

/// The output of [`Compiler::apply`]. The caller publishes all of it in one step.
#[derive(Debug, Default)]
pub struct Update {
    /// The new stores, by the key of their class.
    pub stores: Vec<(Arc<str>, Arc<Store>)>,
    /// The new configurations of nodes whose class or scope changed.
    pub nodes: Vec<(NodeId, Arc<NodeConfig>)>,
    /// The keys of classes whose last node disconnected.
    pub removed_classes: Vec<Arc<str>>,
}

/// An immutable snapshot of everything that a [`Compiler`] compiled. Cloning it copies a few pointers.
#[derive(Debug, Clone)]
pub struct Configuration {
    pub world: Arc<World>,
    pub(crate) classes: RedBlackTreeMapSync<Arc<str>, Arc<CompiledClass>>,
    pub(crate) nodes: RedBlackTreeMapSync<NodeId, Arc<NodeConfig>>,
    pub(crate) problems: RedBlackTreeMapSync<ServiceName, Arc<[Problem]>>,
}

/// The services of one class that at least one of its nodes calls, compiled.
#[derive(Debug, Clone)]
pub struct CompiledClass {
    pub class: Arc<NodeClass>,
    pub services: RedBlackTreeMapSync<ServiceName, Arc<CompiledVariant>>,
    pub store: Arc<Store>,
}

impl Configuration {
    /// Returns the configuration of `world` with no node connected. It contains the problems of documents
    /// only.
    pub fn of(world: Arc<World>) -> Configuration {
        Compiler::new(world).configuration()
    }

    /// Returns the configuration of the connected node `id`.
    pub fn node(&self, id: NodeId) -> Option<&Arc<NodeConfig>> {
        self.nodes.get(&id)
    }

    /// Returns the class with this key.
    pub fn class(&self, key: &str) -> Option<&Arc<CompiledClass>> {
        self.classes.get(key)
    }

    /// Returns the number of classes.
    pub fn classes(&self) -> usize {
        self.classes.size()
    }

    /// Returns the resources that the node `id` receives, or `None` if it is not connected.
    pub fn snapshot(&self, id: NodeId) -> Option<Snapshot> {
        let config = self.node(id)?;
        Some(Snapshot { store: self.class(&config.class)?.store.clone(), scope: config.scope.clone() })
    }

    /// Returns the problems of services and routes without duplicates, followed by those of each connected
    /// node.
    pub fn problems(&self) -> Vec<Problem> {
        let of_services = self.problems.values().flat_map(|problems| problems.iter());
        let of_services: BTreeSet<&Problem> = of_services.collect();
        let of_nodes = self.nodes.values().flat_map(|config| &config.problems);
        of_services.into_iter().chain(of_nodes).cloned().collect()
    }
}

/// The number of entries that a [`Compiler`] keeps for connected nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub nodes: usize,
    pub classes: usize,
    /// The variants of all services together.
    pub variants: usize,
    /// The services of all classes together.
    pub services: usize,
    /// The entries of the indexes from services to classes and nodes.
    pub indexed: usize,
}
