//! A change to one service leaves the capture listeners of all others untouched. Replacing a listener's
//! resource would close its connections.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on ends")]

use std::collections::BTreeMap;
use std::sync::Arc;

use vmesh_catalog::{Catalog, SourceService, SourceView};
use vmesh_compile::{ALONE, Change, Compiler};
use vmesh_model::State;
use vmesh_model::load::{DocumentFile, Library};
use vmesh_model::node::{Client, NodeCapture, OutboundCapture, Upstreams};
use vmesh_model::{Endpoint, Health, NodeReport, Place, Problem, Registration, ServiceName, Weight};
use vmesh_xds::{Kind, Resource};

/// A mesh, and the compiler of a node that captures real addresses.
struct Mesh {
    catalog: Catalog,
    compiler: Compiler,
    library: Library,
    services: BTreeMap<ServiceName, SourceService>,
    documents: u64,
    has: BTreeMap<(Kind, Arc<str>), Arc<Resource>>,
}

impl Mesh {
    fn new(services: &[(&str, &str)]) -> Mesh {
        let catalog = Catalog::new(1);
        let mut compiler = Compiler::new(catalog.world().clone());
        compiler.apply(Change { joined: vec![(ALONE, Arc::new(report()))], ..Change::default() });
        let (library, services_now) = (Library::default(), BTreeMap::new());
        let mut mesh =
            Mesh { catalog, compiler, library, services: services_now, documents: 0, has: BTreeMap::new() };
        for (name, endpoints) in services {
            mesh.register(name, endpoints);
        }
        mesh.changes();
        mesh
    }

    fn register(&mut self, name: &str, endpoints: &str) {
        let name: ServiceName = name.parse().unwrap();
        let endpoints = endpoints.split_whitespace().map(|word| Endpoint {
            address: word.trim_end_matches('!').parse().unwrap(),
            hostname: None,
            weight: Weight::ONE,
            health: if word.ends_with('!') { Health::Unhealthy } else { Health::Healthy },
            zone: None,
            version: None,
            labels: Default::default(),
            source: "file".into(),
        });
        let registration = Registration {
            service: name.clone(),
            protocol: None,
            port: None,
            endpoints: endpoints.collect(),
            place: Place::file("services.d"),
        };
        let seen = SourceService { registration: Arc::new(registration), state: State::Fresh, because: None };
        self.services.insert(name, seen);
        self.catalog.on_view(0, SourceView { services: self.services.clone(), problems: Vec::new() });
        self.compiler.apply(Change { world: Some(self.catalog.world().clone()), ..Change::default() });
    }

    fn documents(&mut self, text: &str) {
        let file = DocumentFile { path: "mesh.yaml", content: Ok(text.as_bytes()) };
        let (documents, problems) = self.library.update(&[file]);
        assert_eq!(problems, []);
        self.documents += 1;
        self.catalog.on_documents(documents, self.documents, Vec::new());
        self.compiler.apply(Change { world: Some(self.catalog.world().clone()), ..Change::default() });
    }

    /// Returns the node's listeners and `Local` resources that changed since the last call. `-` marks a
    /// removed resource.
    fn changes(&mut self) -> String {
        let snapshot = self.compiler.configuration().snapshot(ALONE).unwrap();
        let kinds = [Kind::Listener, Kind::Local].into_iter();
        let now: BTreeMap<_, _> = kinds
            .flat_map(|kind| snapshot.of_kind(kind).map(move |r| ((kind, r.name().clone()), r.clone())))
            .collect();
        let shown = |(kind, name): &(Kind, Arc<str>)| match kind {
            Kind::Local => format!("[{name}]"),
            _ => name.to_string(),
        };
        // The node's own listeners are encoded again each time, so they are compared by content.
        let same = |a: &Arc<Resource>, b: &Arc<Resource>| match a.name().starts_with("virtual_") {
            true => a == b,
            false => Arc::ptr_eq(a, b),
        };
        let changed = now.iter().filter(|(key, new)| !self.has.get(*key).is_some_and(|old| same(old, new)));
        let gone = self.has.keys().filter(|key| !now.contains_key(*key));
        let mut words: Vec<_> = changed.map(|(key, _)| shown(key)).collect();
        words.extend(gone.map(|key| format!("-{}", shown(key))));
        self.has = now;
        words.join(" ")
    }
}

fn report() -> NodeReport {
    NodeReport {
        name: "web-1".parse().unwrap(),
        client: Client::Envoy,
        address: None,
        zone: None,
        labels: Default::default(),
        workloads: Vec::new(),
        upstreams: Upstreams::All,
        capture: NodeCapture { outbound: Some(OutboundCapture::All), ..NodeCapture::default() },
        build: "".into(),
        identity: None,
        mtls_ready: false,
    }
}

fn problems(mesh: &Mesh) -> Vec<Problem> {
    let mut problems = mesh.compiler.configuration().problems();
    problems.retain(|problem| problem.subject.starts_with("Service"));
    problems
}

fn check(mesh: &mut Mesh, expected: &str) {
    let changes = mesh.changes();
    if changes != expected {
        panic!("changed:  {changes}\nexpected: {expected}");
    }
}

#[test]
fn an_endpoint_that_comes_or_goes_is_its_own_listener_alone() {
    let mut mesh = Mesh::new(&[("orders", "10.0.1.1:80 10.0.1.2:80"), ("payments", "10.0.2.1:80")]);
    mesh.register("orders", "10.0.1.1:80 10.0.1.2:80 10.0.1.3:80");
    check(&mut mesh, "outbound|10.0.1.3:80 [orders]");
    mesh.register("orders", "10.0.1.1:80! 10.0.1.3:80");
    check(&mut mesh, "[orders] -outbound|10.0.1.2:80");
}

#[test]
fn turning_capture_up_or_down_touches_no_listener() {
    let mut mesh = Mesh::new(&[("orders", "10.0.1.1:80"), ("payments", "10.0.2.1:80")]);
    mesh.documents("kind: Mesh\ncapture: {percent: 10}\n");
    check(&mut mesh, "[orders] [payments]");
    mesh.documents("kind: Mesh\ncapture: {percent: 20, on_loss: closed}\n");
    check(&mut mesh, "[orders] [payments]");
    mesh.documents("kind: Service\nname: orders\ncapture: {percent: 30}\n");
    check(&mut mesh, "[orders] [payments]");
    mesh.documents(
        "kind: Service\nname: orders\ncapture: {percent: 30}\n---\nkind: Mesh\noutbound: registry-only\n",
    );
    check(&mut mesh, "virtual_outbound");
}

#[test]
fn a_change_to_how_one_service_is_called_touches_the_listeners_of_no_other() {
    let mut mesh = Mesh::new(&[("orders", "10.0.1.1:80"), ("payments", "10.0.2.1:80")]);
    mesh.documents("kind: Service\nname: orders\ntimeouts: {idle: 1m}\n");
    check(&mut mesh, "outbound|10.0.1.1:80 outbound|246.94.83.229:80");
    mesh.register("reports", "10.0.3.1:80");
    check(&mut mesh, "outbound|10.0.3.1:80 outbound|245.178.26.139:80 [reports]");
}

#[test]
fn an_address_of_two_services_is_the_first_one_s_and_the_other_s_when_that_goes() {
    let mut mesh = Mesh::new(&[("orders", "10.0.1.1:80"), ("payments", "10.0.1.1:80 10.0.2.1:80")]);
    assert_eq!(problems(&mesh).len(), 1);
    mesh.register("orders", "10.0.1.2:80");
    // One new listener, and the listener of the shared address now leads to the other service.
    check(&mut mesh, "outbound|10.0.1.1:80 outbound|10.0.1.2:80 [orders] [payments]");
    assert_eq!(problems(&mesh), []);
    mesh.register("orders", "10.0.1.2:80 10.0.1.1:80");
    check(&mut mesh, "outbound|10.0.1.1:80 [orders] [payments]");
}

#[test]
fn a_name_that_comes_later_takes_no_virtual_address_and_no_name_from_one_that_was_there() {
    // In alphabetical order the new service would come first.
    let mut mesh = Mesh::new(&[("svc-318", "10.0.1.1:80"), ("orders", "10.0.2.1:80")]);
    mesh.register("svc-19226", "10.0.3.1:80");
    check(&mut mesh, "outbound|10.0.3.1:80 outbound|[fd76:6d65:7368:0:ee66:83fb:d98d:f194]:80 [svc-19226]");
    // In DNS the name equals `orders`, so the service is reachable by its real address only.
    mesh.register("Orders", "10.0.4.1:80");
    check(&mut mesh, "outbound|10.0.4.1:80 [Orders]");
}
