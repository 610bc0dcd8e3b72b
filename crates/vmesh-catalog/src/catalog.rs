//! The catalog merges the last view of every source, the documents and the node reports into a [`World`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rpds::RedBlackTreeMapSync;
use vmesh_model::{
    Documents, Endpoint, NodeName, NodeReport, Place, Problem, Registration, ServiceName, State, join,
};

use crate::names::{Names, SharedNames};
use crate::world::{Changes, Revision, Service, World, service_hash};

/// One service as one source lists it, and how far the entry can be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceService {
    pub registration: Arc<Registration>,
    pub state: State,
    pub because: Option<Arc<str>>,
}

impl SourceService {
    /// Compares pointers first, which is cheap: sources keep the pointers of services that did not change.
    fn is_same(&self, other: &SourceService) -> bool {
        self.state == other.state
            && self.because == other.because
            && (Arc::ptr_eq(&self.registration, &other.registration)
                || self.registration == other.registration)
    }
}

/// All services that one source lists, and the problems of entries that it could not use.
#[derive(Debug, Clone, Default)]
pub struct SourceView {
    pub services: BTreeMap<ServiceName, SourceService>,
    pub problems: Vec<Problem>,
}

/// Merges views, documents and node reports into worlds. It neither waits nor reads. The caller calls one of
/// the `on_` methods for each change, and publishes [`Catalog::world`] after it.
#[derive(Debug)]
pub struct Catalog {
    /// In the configured order. If two sources list the same address, the first one's endpoint is used.
    sources: Vec<SourceView>,
    documents: Arc<Documents>,
    document_problems: Vec<Problem>,
    documents_hash: u64,
    services: RedBlackTreeMapSync<ServiceName, Arc<Service>>,
    /// The sum of the hashes of `services`.
    services_hash: u64,
    nodes: RedBlackTreeMapSync<NodeName, Arc<NodeReport>>,
    names: SharedNames,
    name_problems: Vec<Problem>,
    world: Arc<World>,
}

impl Catalog {
    /// Returns a catalog of `sources` sources, none of which has answered yet.
    pub fn new(sources: usize) -> Catalog {
        Catalog {
            sources: vec![SourceView::default(); sources],
            documents: Arc::default(),
            document_problems: Vec::new(),
            documents_hash: 0,
            services: RedBlackTreeMapSync::new_sync(),
            services_hash: 0,
            nodes: RedBlackTreeMapSync::new_sync(),
            names: SharedNames::default(),
            name_problems: Vec::new(),
            world: Arc::new(World::empty()),
        }
    }

    /// Restores the names that were in use before a restart, the earliest first.
    pub fn with_names(mut self, names: impl IntoIterator<Item = ServiceName>) -> Catalog {
        self.names = Arc::new(Names::restored(names));
        self
    }

    /// Sets the trust domain of the mesh.
    pub fn with_trust_domain(mut self, trust_domain: impl Into<Arc<str>>) -> Catalog {
        self.world = Arc::new(World { trust_domain: trust_domain.into(), ..(*self.world).clone() });
        self
    }

    /// Returns the current world.
    pub fn world(&self) -> &Arc<World> {
        &self.world
    }

    /// Replaces the view of the source at `index`. Returns whether the world changed.
    pub fn on_view(&mut self, index: usize, view: SourceView) -> bool {
        let Some(source) = self.sources.get_mut(index) else { return false };
        let names = differing_services(&source.services, &view.services);
        let problems = source.problems != view.problems;
        *source = view;
        let changed: Vec<_> = names.into_iter().filter(|name| self.merge_service(name)).collect();
        if changed.is_empty() && !problems {
            return false;
        }
        self.publish(Changes { services: changed, ..Changes::default() });
        true
    }

    /// Replaces the documents; `hash` identifies their content. Returns whether the world changed.
    pub fn on_documents(&mut self, documents: Arc<Documents>, hash: u64, problems: Vec<Problem>) -> bool {
        let changed = self.documents_hash != hash || *self.documents != *documents;
        if !changed && self.document_problems == problems {
            return false;
        }
        self.document_problems = problems;
        if changed {
            self.documents = documents;
            self.documents_hash = hash;
        }
        self.publish(Changes { documents: changed, ..Changes::default() });
        true
    }

    /// Replaces the report of a node. Returns whether the world changed.
    pub fn on_node(&mut self, report: NodeReport) -> bool {
        if self.nodes.get(&report.name).is_some_and(|known| **known == report) {
            return false;
        }
        let name = report.name.clone();
        self.nodes.insert_mut(name.clone(), Arc::new(report));
        self.publish(Changes { nodes: vec![name], ..Changes::default() });
        true
    }

    /// Removes the report of a node that will not reconnect. Returns whether the world changed.
    pub fn forget_node(&mut self, name: &NodeName) -> bool {
        if !self.nodes.remove_mut(name) {
            return false;
        }
        self.publish(Changes { nodes: vec![name.clone()], ..Changes::default() });
        true
    }

    /// Merges the entries of `name` again. Returns whether the result changed.
    fn merge_service(&mut self, name: &ServiceName) -> bool {
        let before = self.services.get(name);
        let merged = merge_entries(name, self.sources.iter().filter_map(|source| source.services.get(name)));
        if before.map(|service| &**service) == merged.as_ref() {
            return false;
        }
        let hash = |service: Option<&Service>| service.map_or(0, service_hash);
        self.services_hash = self
            .services_hash
            .wrapping_sub(hash(before.map(|service| &**service)))
            .wrapping_add(hash(merged.as_ref()));
        match merged {
            Some(service) => self.services.insert_mut(name.clone(), Arc::new(service)),
            None => _ = self.services.remove_mut(name),
        }
        true
    }

    /// Updates the names in use after `changes`, and their problems.
    fn update_names(&mut self, changes: &Changes, before: &World) {
        let mut candidates: BTreeSet<&ServiceName> = changes.services.iter().collect();
        if changes.documents {
            for documents in [&before.documents, &self.documents] {
                candidates.extend(documents.services.keys().chain(documents.routes.keys()));
            }
        }
        let touched: Vec<ServiceName> = candidates.iter().map(|name| (*name).clone()).collect();
        let is_known = |name: &ServiceName| {
            self.services.contains_key(name)
                || self.documents.services.contains_key(name)
                || self.documents.routes.contains_key(name)
        };
        let (now, gone): (Vec<_>, Vec<_>) = candidates
            .into_iter()
            .filter(|name| before.is_known(name) != is_known(name))
            .cloned()
            .partition(|name| is_known(name));
        // A document's problem depends on whether its service is registered, even if the name was in use
        // before.
        let differs =
            |name: &&ServiceName| before.services.contains_key(*name) != self.services.contains_key(*name);
        if now.is_empty()
            && gone.is_empty()
            && !changes.documents
            && !changes.services.iter().any(|name| differs(&name))
        {
            return;
        }
        if !now.is_empty() || !gone.is_empty() {
            let names = Arc::make_mut(&mut self.names);
            names.add(now);
            gone.iter().for_each(|name| names.remove(name));
        }
        let services = &self.services;
        let is_registered = |name: &ServiceName| services.contains_key(name);
        for name in &touched {
            if let Some(owner) = self.names.new_owner(name, is_registered) {
                Arc::make_mut(&mut self.names).set_owner(owner);
            }
        }
        let place_of = |name: &ServiceName| {
            let registered = self.services.get(name).and_then(|service| service.places.first().cloned());
            registered.or_else(|| self.documents.services.get(name).map(|document| document.place.clone()))
        };
        let registered: Vec<&str> = self.services.keys().map(ServiceName::as_str).collect();
        self.name_problems = self.names.problems(&self.documents, place_of, is_registered, &registered);
    }

    fn publish(&mut self, changes: Changes) {
        if !changes.services.is_empty() || changes.documents {
            let before = self.world.clone();
            self.update_names(&changes, &before);
        }
        let problems = if changes.services.is_empty() && !changes.documents && !changes.nodes.is_empty() {
            self.world.problems.clone()
        } else {
            let sources = self.sources.iter().flat_map(|source| &source.problems);
            let all: BTreeSet<_> =
                sources.chain(&self.document_problems).chain(&self.name_problems).cloned().collect();
            all.into_iter().collect()
        };
        let generation = self.world.generation + 1;
        let nodes_generation =
            if changes.nodes.is_empty() { self.world.nodes_generation } else { generation };
        self.world = Arc::new(World {
            generation,
            nodes_generation,
            changes,
            revision: Revision::of(self.services_hash, self.documents_hash),
            services: self.services.clone(),
            documents: self.documents.clone(),
            nodes: self.nodes.clone(),
            trust_domain: self.world.trust_domain.clone(),
            names: self.names.clone(),
            problems,
        });
    }
}

/// Returns the services that the two views list differently.
fn differing_services(
    before: &BTreeMap<ServiceName, SourceService>,
    now: &BTreeMap<ServiceName, SourceService>,
) -> Vec<ServiceName> {
    let differs = |before: Option<&SourceService>, now: Option<&SourceService>| match (before, now) {
        (Some(before), Some(now)) => !before.is_same(now),
        _ => true,
    };
    join(before, now)
        .filter(|(_, before, now)| differs(*before, *now))
        .map(|(name, ..)| name.clone())
        .collect()
}

/// Merges the entries of all sources for `name`; `None` if no source lists it.
///
/// The endpoints are those of every source, by address. Protocol and port are the first that a source gives.
/// The state is the worst of all entries.
fn merge_entries<'a>(
    name: &ServiceName,
    entries: impl Iterator<Item = &'a SourceService>,
) -> Option<Service> {
    let entries: Vec<_> = entries.collect();
    if entries.is_empty() {
        return None;
    }
    let endpoints: Arc<[Endpoint]> = match entries.as_slice() {
        // The common case, which must not copy the endpoints.
        [only] => only.registration.endpoints.clone(),
        several => {
            let mut by_address = BTreeMap::new();
            for endpoint in several.iter().flat_map(|entry| entry.registration.endpoints.iter()) {
                by_address.entry(endpoint.address).or_insert(endpoint);
            }
            by_address.into_values().cloned().collect()
        }
    };
    let worst = entries.iter().max_by_key(|entry| entry.state);
    let places: Vec<Place> = entries.iter().map(|entry| entry.registration.place.clone()).collect();
    Some(Service {
        name: name.clone(),
        protocol: entries.iter().find_map(|entry| entry.registration.protocol),
        port: entries.iter().find_map(|entry| entry.registration.port),
        endpoints,
        state: worst.map(|entry| entry.state).unwrap_or_default(),
        because: worst.and_then(|entry| entry.because.clone()),
        places,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmesh_model::{Health, Weight};

    fn entry(service: &str, addresses: &[&str]) -> (ServiceName, SourceService) {
        let endpoint = |address: &&str| Endpoint {
            address: address.parse().unwrap(),
            hostname: None,
            weight: Weight::ONE,
            health: Health::Unknown,
            zone: None,
            version: None,
            labels: Default::default(),
            source: "file".into(),
        };
        let name: ServiceName = service.parse().unwrap();
        let registration = Registration {
            service: name.clone(),
            protocol: None,
            port: None,
            endpoints: addresses.iter().map(endpoint).collect(),
            place: Place::file("services.d"),
        };
        (name, SourceService { registration: Arc::new(registration), state: State::Fresh, because: None })
    }

    fn view(services: &[(&str, &[&str])]) -> SourceView {
        SourceView { services: services.iter().map(|(n, a)| entry(n, a)).collect(), problems: Vec::new() }
    }

    fn addresses(catalog: &Catalog, service: &str) -> Vec<String> {
        let name = service.parse().unwrap();
        catalog.world().endpoints(&name).iter().map(|e| e.address.to_string()).collect()
    }

    #[test]
    fn a_service_is_the_union_of_its_sources() {
        let mut catalog = Catalog::new(2);
        catalog.on_view(0, view(&[("orders", &["10.0.0.1:80", "10.0.0.2:80"])]));
        catalog.on_view(1, view(&[("orders", &["10.0.0.2:80", "10.0.0.3:80"])]));
        assert_eq!(addresses(&catalog, "orders"), ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"]);
        catalog.on_view(0, SourceView::default());
        assert_eq!(addresses(&catalog, "orders"), ["10.0.0.2:80", "10.0.0.3:80"]);
    }

    #[test]
    fn a_view_that_says_the_same_changes_nothing() {
        let mut catalog = Catalog::new(1);
        assert!(catalog.on_view(0, view(&[("orders", &["10.0.0.1:80"])])));
        assert!(!catalog.on_view(0, view(&[("orders", &["10.0.0.1:80"])])));
    }

    /// The worst entry determines the state and its reason: another source's reason makes no difference.
    #[test]
    fn a_view_that_makes_no_difference_to_the_merged_service_changes_no_pointer() {
        let mut catalog = Catalog::new(2);
        let of = |state: State, because: Option<&str>| {
            let (name, entry) = entry("orders", &["10.0.0.1:80"]);
            let entry = SourceService { state, because: because.map(Into::into), ..entry };
            SourceView { services: [(name, entry)].into(), problems: Vec::new() }
        };
        catalog.on_view(0, of(State::Stale, Some("consul does not answer")));
        catalog.on_view(1, of(State::Fresh, None));
        let orders: ServiceName = "orders".parse().unwrap();
        let before = catalog.world().services.get(&orders).unwrap().clone();
        assert!(!catalog.on_view(1, of(State::Fresh, Some("it answers again"))));
        assert!(Arc::ptr_eq(&before, catalog.world().services.get(&orders).unwrap()));
    }

    #[test]
    fn what_did_not_change_keeps_its_pointer() {
        let mut catalog = Catalog::new(1);
        catalog.on_view(0, view(&[("orders", &["10.0.0.1:80"]), ("payments", &["10.0.0.2:80"])]));
        let payments: ServiceName = "payments".parse().unwrap();
        let before = catalog.world().services.get(&payments).unwrap().clone();
        catalog.on_view(0, view(&[("orders", &["10.0.0.9:80"]), ("payments", &["10.0.0.2:80"])]));
        assert!(Arc::ptr_eq(&before, catalog.world().services.get(&payments).unwrap()));
        let orders: ServiceName = "orders".parse().unwrap();
        assert_eq!(catalog.world().changes.services, [orders]);
    }

    #[test]
    fn equal_content_has_an_equal_revision_by_any_way() {
        let mut one = Catalog::new(1);
        one.on_view(0, view(&[("orders", &["10.0.0.1:80"])]));
        one.on_view(0, view(&[("orders", &["10.0.0.1:80"]), ("payments", &["10.0.0.2:80"])]));
        let mut other = Catalog::new(2);
        other.on_view(1, view(&[("payments", &["10.0.0.2:80"])]));
        assert_ne!(one.world().revision, other.world().revision);
        other.on_view(0, view(&[("orders", &["10.0.0.1:80"])]));
        assert_eq!(one.world().revision, other.world().revision);
    }

    fn problems(catalog: &Catalog) -> String {
        catalog.world().problems.iter().map(|problem| format!("{problem}\n")).collect()
    }

    #[test]
    fn of_two_names_that_are_one_in_dns_the_same_is_a_problem_on_every_replica() {
        let mut catalog = Catalog::new(1);
        catalog.on_view(0, view(&[("Orders", &["10.0.0.1:80"])]));
        assert_eq!(problems(&catalog), "");
        catalog.on_view(0, view(&[("Orders", &["10.0.0.1:80"]), ("orders", &["10.0.0.2:80"])]));
        let listed = problems(&catalog);
        assert!(
            listed.contains("`orders` has the DNS name")
                && listed.contains("`Orders` is reached by upstreams"),
            "{listed}"
        );
        // A replica without state has never used either name.
        let mut fresh = Catalog::new(1);
        fresh.on_view(0, view(&[("Orders", &["10.0.0.1:80"]), ("orders", &["10.0.0.2:80"])]));
        assert_eq!(problems(&fresh), listed);
        let mut restarted = Catalog::new(1).with_names(catalog.world().names.in_order());
        restarted.on_view(0, view(&[("Orders", &["10.0.0.1:80"]), ("orders", &["10.0.0.2:80"])]));
        assert_eq!(problems(&restarted), listed);
        restarted.on_view(0, view(&[("orders", &["10.0.0.2:80"])]));
        assert_eq!(problems(&restarted), "");
    }

    #[test]
    fn a_document_of_a_service_that_no_source_names_is_a_problem_also_without_a_guess() {
        let text = "kind: Service\nname: zzz\nprotocol: http\n---\nkind: Node\nname: web-1\nupstreams: [{service: qqq}]\n---\n\
                    kind: Route\nservice: front\nrules: [{split: [{service: payments}]}]\n---\nkind: Service\nname: front\nprotocol: http\n";
        let file = vmesh_model::load::DocumentFile { path: "a.yaml", content: Ok(text.as_bytes()) };
        let (documents, wrong) = vmesh_model::load::Library::default().update(&[file]);
        assert_eq!(wrong, []);
        let mut catalog = Catalog::new(1);
        catalog.on_view(0, view(&[("payments", &["10.0.0.2:80"])]));
        catalog.on_documents(documents, 7, Vec::new());
        let listed = problems(&catalog);
        assert!(listed.contains("a.yaml:1:1: no source names `zzz`"), "{listed}");
        assert!(listed.contains("a.yaml:5:1: no source names `qqq`"), "{listed}");
        // The route of `front` sends all requests to other services.
        assert!(!listed.contains("front"), "{listed}");
        assert_eq!(listed.lines().count(), 2, "{listed}");
    }

    #[test]
    fn a_document_of_a_service_that_no_source_names_is_a_problem_with_a_guess() {
        let text = "kind: Service\nname: OrderService\nprotocol: http\n---\nkind: Route\nservice: paymnets\nrules: [{timeout: 1s}]\n";
        let file = vmesh_model::load::DocumentFile { path: "a.yaml", content: Ok(text.as_bytes()) };
        let (documents, wrong) = vmesh_model::load::Library::default().update(&[file]);
        assert_eq!(wrong, []);
        let mut catalog = Catalog::new(1);
        catalog.on_documents(documents, 7, Vec::new());
        catalog.on_view(0, view(&[("orderservice", &["10.0.0.1:80"]), ("payments", &["10.0.0.2:80"])]));
        let listed = problems(&catalog);
        assert!(listed.contains("Did you mean `orderservice`?") && listed.contains("a.yaml:1:1"), "{listed}");
        assert!(listed.contains("no source names `paymnets`: did you mean `payments`?"), "{listed}");
        // The document came first but is not registered, so the registered service that it means owns the DNS
        // name.
        let name = |text: &str| text.parse::<ServiceName>().unwrap();
        let names = &catalog.world().names;
        assert_eq!(names.shadowed_by(&name("orderservice")), None);
        assert_eq!(names.shadowed_by(&name("OrderService")), Some(&name("orderservice")));
        assert!(!listed.contains("`OrderService` has the DNS name"), "{listed}");
        catalog.on_view(0, view(&[("OrderService", &["10.0.0.1:80"]), ("paymnets", &["10.0.0.2:80"])]));
        assert_eq!(problems(&catalog), "");
    }
}
