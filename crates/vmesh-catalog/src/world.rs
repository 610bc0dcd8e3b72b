//! The world: everything that a configuration is made from, at one moment.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use rpds::RedBlackTreeMapSync;
use vmesh_model::{Documents, Endpoint, NodeName, NodeReport, Place, Problem, Protocol, ServiceName, State};
use xxhash_rust::xxh3::Xxh3Default;

use crate::names::SharedNames;

/// Immutable, and replaced whole at every change; what did not change keeps its pointer.
#[derive(Debug, Clone)]
pub struct World {
    /// Counts the worlds of this process, for whoever has to know whether one was missed.
    pub generation: u64,
    /// What changed since the world before this one.
    pub changes: Changes,
    pub revision: Revision,
    pub services: RedBlackTreeMapSync<ServiceName, Arc<Service>>,
    pub documents: Arc<Documents>,
    pub nodes: RedBlackTreeMapSync<NodeName, Arc<NodeReport>>,
    /// The generation in which `nodes` last changed.
    pub nodes_generation: u64,
    /// Who owns which DNS name, and the order in which names came into use.
    pub names: SharedNames,
    /// What is wrong with sources and documents; what is wrong between them is for the compiler to say.
    pub problems: Arc<[Problem]>,
}

/// What one world changed against the one before: a hint, so that the work for one changed service does not grow
/// with the number of the others. Who missed a world compares pointers instead.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    pub services: Vec<ServiceName>,
    pub documents: bool,
    pub nodes: Vec<NodeName>,
}

/// One service as all sources together see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub name: ServiceName,
    /// What discovery says is spoken; see [`World::protocol`] for what holds.
    pub protocol: Option<Protocol>,
    pub port: Option<u16>,
    /// Sorted by address, no two with the same one.
    pub endpoints: Arc<[Endpoint]>,
    pub state: State,
    /// Why it is not fresh, in words for an operator.
    pub because: Option<Arc<str>>,
    /// Where each source speaks of it, in the order of the sources.
    pub places: Vec<Place>,
}

/// Names a configuration by its content: equal on every replica that sees the same services and documents, and
/// after a restart. Node reports do not count: a node that joins does not change what the mesh is told to do.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Revision(u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r-{:016x}", self.0)
    }
}

impl fmt::Debug for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Revision {
    /// The sum over services allows to replace one of them without looking at the others.
    pub(crate) fn of(services: u64, documents: u64) -> Revision {
        Revision(services.wrapping_add(documents.rotate_left(1)))
    }
}

/// The hash of what of `service` reaches a proxy; its state and places do not.
pub(crate) fn service_hash(service: &Service) -> u64 {
    let mut hash = Xxh3Default::new();
    let mut text = |part: &str| {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    };
    text(service.name.as_str());
    text(service.protocol.map_or("", Protocol::as_str));
    text(&service.port.unwrap_or_default().to_string());
    for endpoint in service.endpoints.iter() {
        text(&endpoint.address.to_string());
        text(&endpoint.weight.get().to_string());
        text(&endpoint.health.to_string());
        text(endpoint.zone.as_deref().unwrap_or_default());
        text(endpoint.version.as_deref().unwrap_or_default());
        for (key, value) in &endpoint.labels {
            text(key);
            text(value);
        }
        // A document may make a source a fallback.
        text(&endpoint.source);
    }
    hash.digest()
}

impl World {
    /// A world without anything, before the first source has answered.
    pub fn empty() -> World {
        World {
            generation: 0,
            changes: Changes::default(),
            revision: Revision::default(),
            services: RedBlackTreeMapSync::new_sync(),
            documents: Arc::default(),
            nodes: RedBlackTreeMapSync::new_sync(),
            nodes_generation: 0,
            names: SharedNames::default(),
            problems: Arc::from([]),
        }
    }

    /// The name of every service that discovery or a document knows, sorted.
    pub fn known(&self) -> impl Iterator<Item = &ServiceName> {
        let registered = self.services.keys().map(|name| (name, ()));
        let documented =
            self.documents.services.keys().chain(self.documents.routes.keys()).map(|name| (name, ()));
        registered.chain(documented).collect::<BTreeMap<_, _>>().into_keys()
    }

    pub fn is_known(&self, service: &ServiceName) -> bool {
        self.services.contains_key(service)
            || self.documents.services.contains_key(service)
            || self.documents.routes.contains_key(service)
    }

    /// What is spoken with `service`: its document's word, else discovery's, else TCP.
    pub fn protocol(&self, service: &ServiceName) -> Protocol {
        let documented = self.documents.services.get(service).and_then(|document| document.protocol);
        let registered = || self.services.get(service).and_then(|service| service.protocol);
        documented.or_else(registered).unwrap_or_default()
    }

    /// The endpoints of `service`, none if it is not registered.
    pub fn endpoints(&self, service: &ServiceName) -> &[Endpoint] {
        self.services.get(service).map_or(&[], |service| &service.endpoints)
    }
}
