//! Nodes that see the same services in the same way are one class: what they share is compiled once.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use vmesh_catalog::World;
use vmesh_model::document::{Documents, LoadBalancing, Locality, Node, Placed};
use vmesh_model::node::{Client, Outward};
use vmesh_model::{NodeReport, Problem, ServiceName};
use vmesh_xds::Store;

use crate::service::{self, Compiled};
use crate::transparent::Index;

/// What of a node decides how it sees services.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Class {
    pub client: Client,
    /// The `Node` documents that select it, the strongest last.
    pub nodes: Vec<Arc<Placed<Node>>>,
    /// Its zone, where any document makes that matter.
    pub zone: Option<Arc<str>>,
    /// Which connections to services are captured on their nodes. `None`: none.
    pub captured: Option<Captured>,
    /// Their hosts have no IPv6: Envoy takes no address of it there, not even for a listener that no socket is bound for.
    pub without_ipv6: bool,
}

/// Which connections to services are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Captured {
    /// Those to virtual addresses.
    Virtual,
    /// And those to the real addresses of endpoints.
    Addresses,
}

impl Captured {
    /// What becomes of connections to no service is each node's own.
    fn by(report: &NodeReport) -> Option<Captured> {
        // A gRPC client has no listener that a connection could come by.
        if report.client != Client::Envoy {
            return None;
        }
        report.capture.outbound.map(|outward| match outward {
            Outward::Vip => Captured::Virtual,
            Outward::Addresses | Outward::All => Captured::Addresses,
        })
    }
}

impl Class {
    pub fn of(documents: &Documents, report: &NodeReport) -> Class {
        Class {
            client: report.client,
            nodes: documents.nodes_for(report),
            zone: report.zone.clone().filter(|_| zones_matter(documents)),
            captured: Captured::by(report),
            without_ipv6: report.client == Client::Envoy && report.capture.without_ipv6,
        }
    }

    /// Equal for equal classes, whatever the documents say inside.
    pub fn key(&self) -> Arc<str> {
        let mut key = match self.client {
            Client::Envoy => "envoy".to_owned(),
            Client::Grpc => "grpc".to_owned(),
        };
        match self.captured {
            None => {}
            Some(Captured::Virtual) => key.push_str(" capture vip"),
            Some(Captured::Addresses) => key.push_str(" capture addresses"),
        }
        if self.without_ipv6 {
            key.push_str(" without IPv6");
        }
        for node in &self.nodes {
            _ = write!(key, " node {}", node.selector());
        }
        if let Some(zone) = &self.zone {
            _ = write!(key, " zone {zone}");
        }
        key.into()
    }
}

fn zones_matter(documents: &Documents) -> bool {
    let near = |balancing: &Option<LoadBalancing>| {
        balancing.as_ref().is_some_and(|balancing| balancing.locality == Locality::PreferLocal)
    };
    documents.mesh.iter().any(|mesh| near(&mesh.load_balancing))
        || documents.services.values().any(|service| near(&service.load_balancing))
        || documents.nodes.iter().any(|node| near(&node.load_balancing))
}

/// The services of one class, compiled.
#[derive(Debug)]
pub struct Shared {
    pub class: Class,
    pub services: BTreeMap<ServiceName, Compiled>,
    pub store: Arc<Store>,
}

/// The services whose callers need a new scope or new listeners.
pub type Reshaped = Vec<ServiceName>;

impl Shared {
    pub(crate) fn new(world: &World, index: &Index, class: Class) -> Shared {
        let mut shared = Shared { class, services: BTreeMap::new(), store: Arc::new(Store::default()) };
        let all: Vec<_> = world.known().cloned().collect();
        shared.recompile(world, index, &all);
        shared
    }

    /// Compiles `names` anew, and removes those that are no longer known.
    pub(crate) fn recompile(&mut self, world: &World, index: &Index, names: &[ServiceName]) -> Reshaped {
        let mut changes = Vec::new();
        let mut reshaped = Vec::new();
        for name in names {
            if !world.is_known(name) {
                if self.services.remove(name).is_some() {
                    changes.push((name.shared(), None));
                    reshaped.push(name.clone());
                }
                continue;
            }
            let before = self.services.get(name);
            let compiled = service::compile(world, index, name, &self.class, before);
            if before.is_none_or(|before| before.shape.calls_for_rescoping(&compiled.shape)) {
                reshaped.push(name.clone());
            }
            changes.push((name.shared(), Some(compiled.group.clone())));
            self.services.insert(name.clone(), compiled);
        }
        self.store = Arc::new(self.store.apply(changes));
        reshaped
    }

    pub fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.services.values().flat_map(|compiled| &compiled.problems)
    }
}
