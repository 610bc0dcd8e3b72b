//! The compiler's memory never changes the result: after any sequence of worlds and nodes it holds what the
//! last world gives each node alone, and nothing remains of nodes that left.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on ends")]

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use vmesh_catalog::{Catalog, SourceService, SourceView};
use vmesh_compile::{Change, Compiler, Counts, NodeId, Update, compile};
use vmesh_model::State;
use vmesh_model::load::{DocumentFile, Library};
use vmesh_model::node::{
    Client, InboundCapture, NodeCapture, NodeIdentity, OutboundCapture, Upstream, Upstreams, Workload,
};
use vmesh_model::{
    Endpoint, Health, Labels, NodeReport, Place, Problem, Protocol, Registration, ServiceName, Weight,
};
use vmesh_xds::{Kind, Scope, Snapshot, Store};

#[derive(Debug, Clone)]
enum Step {
    /// Sets services: index, protocol (`None` removes the service), and the version of each endpoint.
    Services(Vec<(usize, Option<bool>, Vec<u8>)>),
    /// Sets documents: for each entry of `DOCUMENTS` its version, or `None` if it is absent.
    Documents(Vec<Option<usize>>),
    /// Sets the report of a node of the world: which node, and the index of its report, or `None` if it is forgotten.
    Peer(usize, Option<usize>),
    /// Connects a node, or disconnects it if it is connected: its id, and the index of its report.
    Node(NodeId, usize),
}

/// The service names. The last two hash to the same virtual address.
const NAMES: &[&str] = &["s0", "s1", "s2", "s3", "svc-318", "svc-19226"];

/// The documents, each in two successive versions.
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
    [
        "kind: Service\nname: s2\nmtls: {mode: permissive}\n",
        "kind: Service\nname: s2\nmtls: {mode: strict}\ntimeouts: {connect: 5s}\n",
    ],
    [
        "kind: Node\nlabels: {peer: \"yes\"}\nmtls: {mode: strict}\n",
        "kind: Node\nlabels: {peer: \"yes\"}\nmtls: {mode: \"off\"}\n",
    ],
    [
        "kind: Access\nservice: s2\nrules: [{from: {nodes: {tier: gold}}, action: allow}]\n",
        "kind: Access\nservice: s2\nmode: audit\nrules: [{from: {services: [s0]}, to: {paths: [{prefix: /a}]}, action: deny}]\n",
    ],
    [
        "kind: Access\nservice: s1\nname: other\nrules: [{from: {nodes: {tier: gold}}, action: deny}]\n",
        "kind: Access\nservice: s1\nname: other\nrules: [{from: {nodes: {tier: iron}}, action: deny}]\n",
    ],
];

fn step() -> impl Strategy<Value = Step> {
    let service =
        (0..NAMES.len(), prop::option::weighted(0.8, any::<bool>()), prop::collection::vec(0u8..3, 0..4));
    prop_oneof![
        3 => prop::collection::vec(service, 1..3).prop_map(Step::Services),
        1 => prop::collection::vec(prop::option::of(0usize..2), DOCUMENTS.len()).prop_map(Step::Documents),
        2 => (0..PEERS, prop::option::weighted(0.8, 0..peers(0).len())).prop_map(|(peer, report)| Step::Peer(peer, report)),
        3 => (0u64..6, 0..reports().len()).prop_map(|(id, report)| Step::Node(id, report)),
    ]
}

fn seen(name: &ServiceName, http: bool, versions: &[u8]) -> SourceService {
    let endpoints = versions.iter().enumerate().map(|(at, version)| Endpoint {
        // All services use the same addresses, while the ports vary.
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
    SourceService { registration: Arc::new(registration), state: State::Fresh, because: None }
}

/// The number of nodes of the world that run workloads.
const PEERS: usize = 3;

/// Reports of the node `number` of the world, at different stages of its enrolment.
fn peers(number: usize) -> [NodeReport; 5] {
    let all: Vec<_> = NAMES.iter().flat_map(|name| [80, 81, 82].map(|port| workload(name, port))).collect();
    let peer = NodeReport {
        name: format!("peer-{number}").parse().unwrap(),
        address: Some(format!("10.0.0.{}", number + 1).parse().unwrap()),
        labels: Labels::new(),
        workloads: all,
        ..report()
    };
    let granted = |services: &[&str], tier: &str| {
        let services = services.iter().map(|name| name.parse().unwrap()).collect();
        Some(NodeIdentity { services, labels: [("tier".into(), tier.into())].into() })
    };
    let ready = NodeReport { identity: granted(&["s1", "s2"], "gold"), mtls_ready: true, ..peer.clone() };
    [
        peer.clone(),
        NodeReport { identity: granted(&["s1", "s2"], "gold"), ..peer },
        NodeReport { labels: [("peer".into(), "yes".into())].into(), ..ready.clone() },
        NodeReport {
            identity: granted(&["s2"], "iron"),
            address: Some([10, 0, 0, 1].into()),
            ..ready.clone()
        },
        ready,
    ]
}

/// Reports of nodes of different classes and with different scopes.
fn reports() -> [NodeReport; 9] {
    let captures = |outbound: Option<OutboundCapture>, upstreams: Upstreams| NodeReport {
        capture: NodeCapture {
            outbound,
            inbound: outbound.map(|_| InboundCapture::Tproxy),
            without_ipv6: outbound == Some(OutboundCapture::Vip),
        },
        upstreams,
        ..report()
    };
    let declared = report().upstreams;
    let services = ["s0", "s1", "s2"].map(|name| name.parse().unwrap()).into();
    let enrolled = Some(NodeIdentity { services, ..NodeIdentity::default() });
    [
        captures(None, declared.clone()),
        captures(Some(OutboundCapture::Vip), Upstreams::All),
        captures(Some(OutboundCapture::Addresses), declared),
        NodeReport {
            labels: [("role".into(), "web".into()), ("rack".into(), "r1".into())].into(),
            ..captures(Some(OutboundCapture::All), Upstreams::All)
        },
        // This node runs workloads of one upstream (`s2`) and of one service that is no upstream (`s1`).
        NodeReport {
            name: "m".parse().unwrap(),
            zone: Some("b".into()),
            labels: Labels::new(),
            upstreams: Upstreams::Declared(vec![upstream("s2", 9000), upstream("nobody", 9001)]),
            workloads: vec![workload("s2", 8080), workload("s1", 8081)],
            ..report()
        },
        NodeReport { client: Client::Grpc, upstreams: Upstreams::All, ..report() },
        // Enrolled nodes: two callers with different certificates, and one that is called.
        NodeReport { identity: enrolled.clone(), ..report() },
        NodeReport {
            identity: enrolled.clone(),
            workloads: vec![workload("s0", 8080)],
            upstreams: Upstreams::Declared(vec![Upstream {
                as_: Some("s0".parse().unwrap()),
                ..upstream("s2", 9000)
            }]),
            ..captures(Some(OutboundCapture::Addresses), Upstreams::All)
        },
        NodeReport {
            identity: enrolled,
            address: Some([10, 0, 0, 1].into()),
            workloads: vec![workload("s2", 8080), workload("s1", 8081), workload("s3", 8082)],
            mtls_ready: true,
            ..report()
        },
    ]
}

fn upstream(name: &str, port: u16) -> Upstream {
    Upstream { service: name.parse().unwrap(), listen: Some(([127, 0, 0, 1], port).into()), as_: None }
}

fn workload(name: &str, port: u16) -> Workload {
    let listen = Some(([127, 0, 0, 1], port + 1000).into());
    Workload { service: name.parse().unwrap(), port, host: None, protocol: None, listen }
}

fn report() -> NodeReport {
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
        capture: NodeCapture::default(),
        build: "".into(),
        identity: None,
        mtls_ready: false,
    }
}

fn content(snapshot: &Snapshot) -> Vec<(Kind, String, String)> {
    let of = |kind| snapshot.of_kind(kind).map(move |r| (kind, r.name().to_string(), r.version().to_owned()));
    Kind::ALL.into_iter().flat_map(of).collect()
}

/// Returns the problems of services. Problems of routes are left out, because they may suggest a name that
/// was removed since.
fn problems(compiler: &Compiler) -> Vec<Problem> {
    let mut problems = compiler.configuration().problems();
    problems.retain(|problem| problem.subject.starts_with("Service"));
    problems
}

/// A model of the hub. After each update it must hold the same content as the compiler's configuration.
#[derive(Default)]
struct HubModel {
    stores: BTreeMap<Arc<str>, Arc<Store>>,
    nodes: BTreeMap<NodeId, (Arc<str>, Arc<Scope>)>,
}

impl HubModel {
    fn apply(&mut self, update: Update) {
        self.stores.extend(update.stores);
        self.nodes.extend(
            update.nodes.into_iter().map(|(id, config)| (id, (config.class.clone(), config.scope.clone()))),
        );
        update.removed_classes.iter().for_each(|class| _ = self.stores.remove(class));
    }

    fn snapshot(&self, id: NodeId) -> Option<Snapshot> {
        let (class, scope) = self.nodes.get(&id)?;
        Some(Snapshot { store: self.stores.get(class)?.clone(), scope: scope.clone() })
    }
}

fn join(id: NodeId, report: NodeReport) -> Change {
    Change { joined: vec![(id, Arc::new(report))], ..Change::default() }
}

fn world(catalog: &Catalog) -> Change {
    Change { world: Some(catalog.world().clone()), ..Change::default() }
}

/// A node reports its own locality zone, so made-up zones must not add classes.
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
    let zones = ["a", "b"].into_iter().map(ToOwned::to_owned);
    let zones = zones.chain((0..100).map(|i| format!("invented-{i}")));
    let joined = zones.enumerate().map(|(id, zone)| (id as NodeId, Arc::new(of(&zone))));
    compiler.apply(Change { joined: joined.collect(), ..Change::default() });
    let class = |compiler: &Compiler, id| compiler.configuration().node(id).unwrap().class.clone();
    assert_eq!(compiler.counts().classes, 2, "zone `a`, and all other zones");
    assert_eq!(class(&compiler, 1), class(&compiler, 2));
    let in_a = class(&compiler, 0);
    // A second endpoint, in zone `b`.
    catalog.on_view(0, service(&[1, 1]));
    let update = compiler.apply(world(&catalog));
    assert_eq!((compiler.counts().classes, update.nodes.len()), (3, 1));
    assert_ne!(class(&compiler, 1), class(&compiler, 2));
    assert_eq!(class(&compiler, 0), in_a);
    catalog.on_view(0, service(&[1, 2]));
    assert_eq!(compiler.apply(world(&catalog)).nodes.len(), 0, "no zone more or less");
}

#[test]
fn a_service_is_compiled_once_for_all_nodes_that_see_it_alike_and_not_at_all_for_none() {
    let mut catalog = Catalog::new(1);
    let documents = "kind: Node\nname: a\nupstreams: [{service: s1}]\n---\n\
                     kind: Node\nname: b\ntimeouts: {connect: 9s}\n---\n\
                     kind: Node\nname: c\ntimeouts: {connect: 9s}\n---\n\
                     kind: Mesh\nload_balancing: {locality: prefer_local}\n";
    let mut library = Library::default();
    let (documents, problems) =
        library.update(&[DocumentFile { path: "mesh.yaml", content: Ok(documents.as_bytes()) }]);
    catalog.on_documents(documents, 1, problems);
    // The endpoint of `s0` is in zone `a`; the endpoints of `s1` are in zones `a` and `b`.
    let view = |s1: &[u8]| {
        let services: [(&str, &[u8]); 3] = [("s0", &[1]), ("s1", s1), ("s2", &[1, 1])];
        let services = services.into_iter().map(|(name, versions)| {
            let name: ServiceName = name.parse().unwrap();
            (name.clone(), seen(&name, true, versions))
        });
        SourceView { services: services.collect(), problems: Vec::new() }
    };
    catalog.on_view(0, view(&[1, 1]));
    let mut compiler = Compiler::new(catalog.world().clone());
    let count = |compiler: &Compiler| (compiler.counts().classes, compiler.counts().variants);
    assert_eq!(count(&compiler), (0, 0));
    let of = |name: &str, zone: Option<&str>, upstreams: &[&str]| NodeReport {
        name: name.parse().unwrap(),
        zone: zone.map(Into::into),
        upstreams: Upstreams::Declared(upstreams.iter().map(|name| upstream(name, 9000)).collect()),
        ..report()
    };
    compiler.apply(join(1, of("x", None, &["s0"])));
    assert_eq!(count(&compiler), (1, 1));
    // The `Node` document of this node only adds an upstream.
    compiler.apply(join(2, of("a", None, &["s0"])));
    assert_eq!(count(&compiler), (1, 2));
    compiler.apply(join(3, of("b", None, &["s0"])));
    compiler.apply(join(4, of("c", None, &["s0"])));
    assert_eq!(count(&compiler), (2, 3));
    // `s0` has no endpoint in zone `b`, so it compiles as for a node without a zone; `s1` does not.
    compiler.apply(join(5, of("y", Some("b"), &["s0", "s1"])));
    assert_eq!(count(&compiler), (3, 4));
    catalog.on_view(0, view(&[1]));
    let update = compiler.apply(world(&catalog));
    assert_eq!(update.stores.len(), 2, "those of the classes in which `s1` is called");
    // Two variants share each resource that is equal in both, also after a change.
    let changed = ["s0", "s1", "s2"].map(|name| {
        let name: ServiceName = name.parse().unwrap();
        (name.clone(), seen(&name, true, &[2, 2]))
    });
    catalog.on_view(0, SourceView { services: changed.into(), problems: Vec::new() });
    compiler.apply(world(&catalog));
    let of_s0 = |id, kind| compiler.configuration().snapshot(id).unwrap().get(kind, "s0").unwrap().clone();
    assert!(Arc::ptr_eq(&of_s0(1, Kind::Endpoint), &of_s0(3, Kind::Endpoint)));
    assert!(!Arc::ptr_eq(&of_s0(1, Kind::Cluster), &of_s0(3, Kind::Cluster)));
    compiler.apply(Change { left: vec![1, 3, 4, 5], ..Change::default() });
    assert_eq!(count(&compiler), (1, 2));
    compiler.apply(Change { left: vec![2], ..Change::default() });
    assert_eq!(compiler.counts(), Counts::default());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_way_to_a_world_gives_each_node_what_the_world_gives_it_alone_and_leaves_nothing(steps in prop::collection::vec(step(), 1..16)) {
        let mut catalog = Catalog::new(1).with_trust_domain("mesh.test");
        let mut compiler = Compiler::new(catalog.world().clone());
        let mut services: BTreeMap<ServiceName, SourceService> = BTreeMap::new();
        let mut library = Library::default();
        let mut hash = 0;
        let mut connected: BTreeMap<NodeId, NodeReport> = BTreeMap::new();
        let mut published = HubModel::default();
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
                    published.apply(compiler.apply(world(&catalog)));
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
                    published.apply(compiler.apply(world(&catalog)));
                }
                Step::Peer(number, which) => {
                    match which {
                        Some(which) => _ = catalog.on_node(peers(number)[which].clone()),
                        None => _ = catalog.forget_node(&peers(number)[0].name),
                    }
                    // Worlds of node reports are often missed.
                    if number > 0 {
                        published.apply(compiler.apply(world(&catalog)));
                    } else {
                        catalog.on_node(peers(1)[which.unwrap_or_default()].clone());
                        published.apply(compiler.apply(world(&catalog)));
                    }
                }
                Step::Node(id, which) => {
                    if connected.remove(&id).is_some() {
                        published.apply(compiler.apply(Change { left: vec![id], ..Change::default() }));
                        published.nodes.remove(&id);
                    } else {
                        let report = reports()[which].clone();
                        connected.insert(id, report.clone());
                        published.apply(compiler.apply(join(id, report)));
                    }
                }
            }
            let mut fresh = Compiler::new(catalog.world().clone());
            for (id, report) in &connected {
                let remembered = compiler.configuration().snapshot(*id).unwrap();
                let (alone, _) = compile(catalog.world(), report);
                prop_assert_eq!(content(&remembered), content(&alone));
                prop_assert_eq!(content(&published.snapshot(*id).unwrap()), content(&alone));
                fresh.apply(join(*id, report.clone()));
            }
            prop_assert_eq!(problems(&compiler), problems(&fresh));
            prop_assert_eq!(compiler.counts(), fresh.counts(), "nothing is kept that nobody sees");
            prop_assert_eq!(published.stores.len(), fresh.counts().classes);
        }
        let left = connected.into_keys().collect();
        published.apply(compiler.apply(Change { left, ..Change::default() }));
        prop_assert_eq!((compiler.counts(), published.stores.len()), (Counts::default(), 0));
    }
}
