//! The world: the complete input of the compiler at one moment.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use rpds::RedBlackTreeMapSync;
use vmesh_model::{Documents, Endpoint, NodeName, NodeReport, Place, Problem, Protocol, ServiceName, State};
use xxhash_rust::xxh3::Xxh3Default;

use crate::names::SharedNames;

/// The immutable input of the compiler. Every change builds a new world, in which unchanged parts keep their
/// pointers.
#[derive(Debug, Clone)]
pub struct World {
    /// The number of this world within the process. A gap between two numbers means that a world was missed.
    pub generation: u64,
    /// The differences from the previous world.
    pub changes: Changes,
    pub revision: Revision,
    pub services: RedBlackTreeMapSync<ServiceName, Arc<Service>>,
    pub documents: Arc<Documents>,
    pub nodes: RedBlackTreeMapSync<NodeName, Arc<NodeReport>>,
    /// The generation in which `nodes` last changed.
    pub nodes_generation: u64,
    /// The trust domain of the mesh, with which every SPIFFE id begins.
    pub trust_domain: Arc<str>,
    /// The owner of each DNS name, and the order in which names came into use.
    pub names: SharedNames,
    /// The problems of sources and documents. The compiler finds the problems between them.
    pub problems: Arc<[Problem]>,
}

/// The services, documents and nodes that differ from the previous world. With them, the work for one changed service does
/// not grow with the number of services. A reader that missed a world compares pointers instead.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    pub services: Vec<ServiceName>,
    pub documents: bool,
    pub nodes: Vec<NodeName>,
}

/// One service, merged from all sources.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub name: ServiceName,
    /// The protocol from discovery; [`World::protocol`] returns the effective one.
    pub protocol: Option<Protocol>,
    pub port: Option<u16>,
    /// Sorted by address, without duplicates.
    pub endpoints: Arc<[Endpoint]>,
    pub state: State,
    /// The reason, for an operator, why the service is not fresh.
    pub because: Option<Arc<str>>,
    /// The place where each source defines the service, in the order of the sources.
    pub places: Vec<Place>,
}

/// A hash of the services and documents of a world: equal on every replica that has the same ones, and after
/// a restart. Node reports are not included, because a node that connects does not change the configuration
/// of the mesh.
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
    /// Combines the hashes. `services` is a sum, so that one service can be replaced without hashing the
    /// others again.
    pub(crate) fn of(services: u64, documents: u64) -> Revision {
        Revision(services.wrapping_add(documents.rotate_left(1)))
    }
}

/// Returns the hash of the fields of `service` that reach a proxy. State and places are excluded.
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
        // The source is hashed because a document can declare a source a fallback.
        text(&endpoint.source);
    }
    hash.digest()
}

impl World {
    /// Returns a world without content, as before the first source has answered.
    pub fn empty() -> World {
        World {
            generation: 0,
            changes: Changes::default(),
            revision: Revision::default(),
            services: RedBlackTreeMapSync::new_sync(),
            documents: Arc::default(),
            nodes: RedBlackTreeMapSync::new_sync(),
            nodes_generation: 0,
            trust_domain: Arc::default(),
            names: SharedNames::default(),
            problems: Arc::from([]),
        }
    }

    /// Returns the name of every service that discovery or a document defines, sorted.
    pub fn service_names(&self) -> impl Iterator<Item = &ServiceName> {
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

    /// Returns the effective protocol of `service`: that of its document, else the one from discovery, else
    /// TCP.
    pub fn protocol(&self, service: &ServiceName) -> Protocol {
        let documented = self.documents.services.get(service).and_then(|document| document.protocol);
        let registered = || self.services.get(service).and_then(|service| service.protocol);
        documented.or_else(registered).unwrap_or_default()
    }

    /// Returns the endpoints of `service`; empty if it is not registered.
    pub fn endpoints(&self, service: &ServiceName) -> &[Endpoint] {
        self.services.get(service).map_or(&[], |service| &service.endpoints)
    }
}
