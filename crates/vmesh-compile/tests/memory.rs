//! That the compiler's memory changes nothing: after any sequence of worlds it holds what the last one gives alone.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on ends")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proptest::prelude::*;
use vmesh_catalog::{Catalog, Seen, SourceView};
use vmesh_compile::{Compiler, compile};
use vmesh_model::State;
use vmesh_model::load::{DocumentFile, Library};
use vmesh_model::node::{Capture, Client, Inward, Outward, Upstream, Upstreams};
use vmesh_model::{
    Endpoint, Health, Labels, NodeReport, Place, Problem, Protocol, Registration, ServiceName, Weight,
};
use vmesh_xds::{Kind, Snapshot};

#[derive(Debug, Clone)]
enum Step {
    /// Service, protocol (none: it goes), and the version of each of its endpoints.
    Services(Vec<(usize, Option<bool>, Vec<u8>)>),
    /// For each of `DOCUMENTS`: absent, or which version of it.
    Documents(Vec<Option<usize>>),
}

/// The last two want the same virtual address.
const NAMES: &[&str] = &["s0", "s1", "s2", "s3", "svc-318", "svc-19226"];

/// Documents, each in the two versions of it that follow one another.
const DOCUMENTS: &[[&str; 2]] = &[
    [
        "kind: Service\nname: s0\nsubsets: {v1: {version: v1}, v2: {version: v2}}\n",
        "kind: Service\nname: s0\nsubsets: {v1: {version: v2}}\n",
    ],
    [
        "kind: Route\nservice: s0\nrules:\n  - split: [{subset: v1, weight: 1}, {service: s1, weight: 1}]\n",
        "kind: Route\nservice: s0\nrules:\n  - split: [{service: s1}]\n",
    ],
    [
        "kind: Route\nservice: s2\nrules:\n  - match: {path: {prefix: /a}}\n    redirect: {service: s0}\n",
        "kind: Route\nservice: s2\nrules:\n  - match: {path: {prefix: /b}}\n    split: [{service: s3}]\n",
    ],
    [
        "kind: Service\nname: s1\nprotocol: tcp\nload_balancing: {policy: maglev, hash_on: source_ip}\n",
        "kind: Service\nname: s1\nload_balancing: {policy: random}\n",
    ],
    ["kind: Mesh\ntimeouts: {connect: 1s}\n", "kind: Mesh\ntimeouts: {connect: 2s}\n"],
    [
        "kind: Node\nname: n\nload_balancing: {policy: random, locality: prefer_local}\n",
        "kind: Node\nname: n\nload_balancing: {policy: round_robin}\ntimeouts: {connect: 3s}\n",
    ],
    [
        "kind: Service\nname: s3\nload_balancing: {fallback: [{zone: a}]}\n",
        "kind: Service\nname: s3\nload_balancing: {fallback: [{zone: b}]}\n",
    ],
    [
        "kind: Node\nlabels: {role: web}\nupstreams: [{service: s3}]\n",
        "kind: Node\nlabels: {role: web}\nupstreams: [{service: s2}]\ntimeouts: {connect: 4s}\n",
    ],
    [
        "kind: Service\nname: svc-19226\nport: 8080\ncapture: {percent: 10}\n",
        "kind: Service\nname: svc-19226\nport: 8081\n",
    ],
    [
        "kind: Node\nlabels: {role: web, rack: r1}\noutbound: registry-only\ncapture: {on_loss: closed}\n",
        "kind: Node\nlabels: {role: web, rack: r1}\noutbound: allow-any\nload_balancing: {policy: random}\n",
    ],
];

fn step() -> impl Strategy<Value = Step> {
    let service =
        (0..NAMES.len(), prop::option::weighted(0.8, any::<bool>()), prop::collection::vec(0u8..3, 0..4));
    prop_oneof![
        3 => prop::collection::vec(service, 1..3).prop_map(Step::Services),
        1 => prop::collection::vec(prop::option::of(0usize..2), DOCUMENTS.len()).prop_map(Step::Documents),
    ]
}

fn seen(name: &ServiceName, http: bool, versions: &[u8]) -> Seen {
    let endpoints = versions.iter().enumerate().map(|(at, version)| Endpoint {
        // The same addresses for every service, and ports that are not always the same.
        address: format!("10.0.0.{}:8{version}", at + 1).parse().unwrap(),
        hostname: (at == 3).then(|| "db.example".into()),
        weight: Weight::ONE,
        health: Health::Unknown,
        zone: Some(if at % 2 == 0 { "a" } else { "b" }.into()),
        version: Some(format!("v{version}").into()),
        labels: Labels::new(),
        source: "file".into(),
    });
    let registration = Registration {
        service: name.clone(),
        protocol: Some(if http { Protocol::Http } else { Protocol::Tcp }),
        port: None,
        endpoints: endpoints.collect(),
        place: Place::file("services.d"),
    };
    Seen { registration: Arc::new(registration), state: State::Fresh, because: None }
}

/// A node of each class that captures, and one that does not.
fn reports() -> [NodeReport; 4] {
    let captures = |outbound: Option<Outward>, upstreams: Upstreams| NodeReport {
        capture: Capture {
            outbound,
            inbound: outbound.map(|_| Inward::Tproxy),
            without_ipv6: outbound == Some(Outward::Vip),
        },
        upstreams,
        ..report()
    };
    let declared = report().upstreams;
    [
        captures(None, declared.clone()),
        captures(Some(Outward::Vip), Upstreams::All),
        captures(Some(Outward::Addresses), declared),
        NodeReport {
            labels: [("role".into(), "web".into()), ("rack".into(), "r1".into())].into(),
            ..captures(Some(Outward::All), Upstreams::All)
        },
    ]
}

fn report() -> NodeReport {
    let upstream = |name: &str, port: u16| Upstream {
        service: name.parse().unwrap(),
        listen: Some(([127, 0, 0, 1], port).into()),
    };
    NodeReport {
        name: "n".parse().unwrap(),
        client: Client::Envoy,
        address: None,
        zone: Some("a".into()),
        labels: [("role".into(), "web".into())].into(),
        workloads: Vec::new(),
        upstreams: Upstreams::Declared(vec![
            upstream("s0", 9000),
            upstream("s1", 9001),
            upstream("s2", 9002),
        ]),
        capture: Capture::default(),
        build: "".into(),
    }
}

fn content(snapshot: &Snapshot) -> Vec<(Kind, String, String)> {
    let of = |kind| snapshot.of_kind(kind).map(move |r| (kind, r.name().to_string(), r.version().to_owned()));
    Kind::ALL.into_iter().flat_map(of).collect()
}

/// Those of services. What is said of a route may hint at a name that has gone since.
fn problems(compiler: &Compiler) -> Vec<Problem> {
    let mut problems = compiler.problems();
    problems.retain(|problem| problem.subject.starts_with("Service"));
    problems
}

/// A client says itself in which zone it is.
#[test]
fn a_zone_that_no_endpoint_is_in_costs_no_class_and_one_that_gets_an_endpoint_has_one() {
    let mut catalog = Catalog::new(1);
    let document = DOCUMENTS.iter().flatten().find(|document| document.contains("prefer_local")).unwrap();
    let mut library = Library::default();
    let (documents, problems) =
        library.update(&[DocumentFile { path: "mesh.yaml", content: Ok(document.as_bytes()) }]);
    catalog.on_documents(documents, 1, problems);
    let service = |versions: &[u8]| {
        let name: ServiceName = "s0".parse().unwrap();
        let services = [(name.clone(), seen(&name, true, versions))].into();
        SourceView { services, problems: Vec::new() }
    };
    // One endpoint, in zone `a`.
    catalog.on_view(0, service(&[1]));
    let mut compiler = Compiler::new(catalog.world().clone());
    let of = |zone: &str| NodeReport { zone: Some(zone.into()), ..report() };
    let in_a = compiler.node(&of("a")).class;
    let classes: BTreeSet<_> = (0..100).map(|i| compiler.node(&of(&format!("invented-{i}"))).class).collect();
    assert_eq!(classes.len(), 1);
    assert_eq!(classes, [compiler.node(&NodeReport { zone: None, ..report() }).class].into());
    assert!(!classes.contains(&in_a));
    assert!(classes.contains(&compiler.node(&of("b")).class));
    // And now one in zone `b`.
    catalog.on_view(0, service(&[1, 1]));
    let update = compiler.update(catalog.world().clone());
    assert!(update.regroups());
    assert!(!classes.contains(&compiler.node(&of("b")).class));
    catalog.on_view(0, service(&[1, 2]));
    assert!(!compiler.update(catalog.world().clone()).regroups(), "no zone more or less");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_way_to_a_world_gives_what_the_world_gives_alone(steps in prop::collection::vec(step(), 1..8)) {
        let mut catalog = Catalog::new(1);
        let mut compiler = Compiler::new(catalog.world().clone());
        let mut services: BTreeMap<ServiceName, Seen> = BTreeMap::new();
        let mut library = Library::default();
        let mut hash = 0;
        for step in steps {
            match step {
                Step::Services(changes) => {
                    for (service, http, versions) in changes {
                        let name: ServiceName = NAMES[service].parse().unwrap();
                        match http {
                            None => _ = services.remove(&name),
                            Some(http) => _ = services.insert(name.clone(), seen(&name, http, &versions)),
                        }
                    }
                    catalog.on_view(0, SourceView { services: services.clone(), problems: Vec::new() });
                }
                Step::Documents(which) => {
                    let versions = DOCUMENTS.iter().zip(which);
                    let text: Vec<_> = versions.filter_map(|(versions, which)| Some(versions[which?])).collect();
                    let text = text.join("---\n");
                    let file = DocumentFile { path: "mesh.yaml", content: Ok(text.as_bytes()) };
                    let files = if text.is_empty() { Vec::new() } else { vec![file] };
                    let (documents, problems) = library.update(&files);
                    hash += 1;
                    catalog.on_documents(documents, hash, problems);
                }
            }
            compiler.update(catalog.world().clone());
            let (mut used, mut fresh) = (BTreeSet::new(), Compiler::new(catalog.world().clone()));
            for report in reports() {
                let config = compiler.node(&report);
                let store = compiler.store(&config.class).unwrap();
                used.insert(config.class);
                let remembered = Snapshot { store, scope: config.scope };
                let (alone, _) = compile(catalog.world(), &report);
                prop_assert_eq!(content(&remembered), content(&alone));
                fresh.node(&report);
            }
            compiler.retain(&used);
            prop_assert_eq!(problems(&compiler), problems(&fresh));
        }
    }
}
