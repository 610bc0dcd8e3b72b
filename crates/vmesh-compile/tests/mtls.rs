//! Calls by mTLS and rules of access: which resources a change touches, and what the operator is told.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on ends")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use vmesh_catalog::{Catalog, SourceService, SourceView};
use vmesh_compile::{ConnectionSecurity, compile, tls};
use vmesh_model::load::{DocumentFile, Library};
use vmesh_model::node::{Client, InboundCapture, NodeCapture, NodeIdentity, Upstream, Upstreams, Workload};
use vmesh_model::{
    Endpoint, Health, Labels, NodeReport, Place, Protocol, Registration, ServiceName, State, Weight,
};
use vmesh_xds::Kind;

struct Mesh {
    catalog: Catalog,
    library: Library,
    hash: u64,
}

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

impl Mesh {
    /// A mesh in which `orders` has an endpoint on each of `orders-1` to `orders-4`.
    fn new() -> Mesh {
        let endpoint = |number: u8| Endpoint {
            address: ([10, 0, 0, number], 8080).into(),
            hostname: None,
            weight: Weight::ONE,
            health: Health::Unknown,
            zone: None,
            version: None,
            labels: Labels::new(),
            source: "file".into(),
        };
        let registration = Registration {
            service: name("orders"),
            protocol: Some(Protocol::Http),
            port: None,
            endpoints: (1..=4).map(endpoint).collect(),
            place: Place::file("services.d"),
        };
        let seen = SourceService { registration: Arc::new(registration), state: State::Fresh, because: None };
        let mut catalog = Catalog::new(1).with_trust_domain("mesh.test");
        catalog.on_view(0, SourceView { services: [(name("orders"), seen)].into(), problems: Vec::new() });
        Mesh { catalog, library: Library::default(), hash: 0 }
    }

    fn documents(&mut self, text: &str) {
        let file = DocumentFile { path: "mesh.yaml", content: Ok(text.as_bytes()) };
        let (documents, problems) = self.library.update(&[file]);
        assert_eq!(problems, []);
        self.hash += 1;
        self.catalog.on_documents(documents, self.hash, problems);
    }

    /// Returns the versions of the node's resources.
    fn versions(&self, report: &NodeReport) -> BTreeMap<(Kind, String), String> {
        let (snapshot, _) = compile(self.catalog.world(), report);
        let of = |kind| {
            snapshot.of_kind(kind).map(move |one| ((kind, one.name().to_string()), one.version().to_owned()))
        };
        Kind::ALL.into_iter().flat_map(of).collect()
    }
}

/// Returns what differs between two sets of versions.
fn differing(
    one: &BTreeMap<(Kind, String), String>,
    other: &BTreeMap<(Kind, String), String>,
) -> BTreeSet<(Kind, String)> {
    let names = one.keys().chain(other.keys());
    names.filter(|name| one.get(*name) != other.get(*name)).cloned().collect()
}

fn orders(number: u8, services: &[&str]) -> NodeReport {
    let workload = |service: &str, port: u16| Workload {
        service: name(service),
        port,
        host: None,
        protocol: None,
        listen: None,
    };
    NodeReport {
        name: format!("orders-{number}").parse().unwrap(),
        client: Client::Envoy,
        address: Some([10, 0, 0, number].into()),
        zone: None,
        labels: Labels::new(),
        workloads: vec![workload("orders", 8080), workload("billing", 7000)],
        upstreams: Upstreams::Declared(Vec::new()),
        capture: NodeCapture { inbound: Some(InboundCapture::Redirect), ..NodeCapture::default() },
        build: "".into(),
        identity: Some(NodeIdentity {
            services: services.iter().map(|service| name(service)).collect(),
            ..NodeIdentity::default()
        }),
        mtls_ready: true,
    }
}

fn web() -> NodeReport {
    NodeReport {
        name: "web-1".parse().unwrap(),
        workloads: Vec::new(),
        upstreams: Upstreams::Declared(vec![Upstream {
            service: name("orders"),
            listen: Some(([127, 0, 0, 1], 9001).into()),
            as_: None,
        }]),
        ..orders(9, &["web"])
    }
}

const RULE: &str =
    "kind: Service\nname: orders\nmtls: {mode: permissive}\n---\nkind: Access\nservice: orders\n";

#[test]
fn an_edit_of_an_access_document_touches_no_listener_and_only_nodes_that_run_the_service() {
    let mut mesh = Mesh::new();
    mesh.documents(&format!("{RULE}rules: [{{from: {{services: [web]}}, action: allow}}]\n"));
    let nodes = [orders(1, &["orders", "billing"]), orders(2, &[]), web()];
    let before = nodes.each_ref().map(|node| mesh.versions(node));
    mesh.documents(&format!(
        "{RULE}mode: audit\ndefault: deny\nrules: [{{from: {{nodes: {{a: b}}}}, to: {{paths: [{{prefix: /x}}]}}, action: deny}}]\n"
    ));
    let after = nodes.each_ref().map(|node| mesh.versions(node));
    let filter = BTreeSet::from([(Kind::ExtensionConfig, "access|orders".to_owned())]);
    assert_eq!(differing(&before[0], &after[0]), filter);
    assert_eq!(
        differing(&before[1], &after[1]),
        filter,
        "a node without a certificate for it has the rules too"
    );
    assert_eq!(differing(&before[2], &after[2]), BTreeSet::new());
}

#[test]
fn the_first_access_document_touches_no_listener_for_mtls() {
    let mut mesh = Mesh::new();
    mesh.documents("kind: Service\nname: orders\nmtls: {mode: permissive}\n");
    let node = NodeReport { capture: NodeCapture::default(), ..orders(1, &["orders"]) };
    let before = mesh.versions(&node);
    mesh.documents(&format!("{RULE}default: deny\n"));
    let filter = BTreeSet::from([(Kind::ExtensionConfig, "access|orders".to_owned())]);
    assert_eq!(differing(&before, &mesh.versions(&node)), filter);
}

#[test]
fn a_change_of_mode_touches_callers_and_the_plaintext_of_that_service() {
    let mut mesh = Mesh::new();
    for number in 1..=4 {
        mesh.catalog.on_node(orders(number, &["orders", "billing"]));
    }
    let mode = |mode: &str| format!("kind: Service\nname: orders\nmtls: {{mode: \"{mode}\"}}\n");
    mesh.documents(&mode("off"));
    let nodes = [orders(1, &["orders", "billing"]), web()];
    let off = nodes.each_ref().map(|node| mesh.versions(node));
    mesh.documents(&mode("permissive"));
    let permissive = nodes.each_ref().map(|node| mesh.versions(node));
    assert_eq!(differing(&off[0], &permissive[0]), BTreeSet::new());
    let of_orders = |kind| (kind, "orders".to_owned());
    // The plaintext cluster keeps its endpoints until the new one is warm.
    let cluster = BTreeSet::from([of_orders(Kind::Cluster), (Kind::Endpoint, "orders||mtls".to_owned())]);
    assert_eq!(differing(&off[1], &permissive[1]), cluster);
    mesh.documents(&mode("strict"));
    let strict = nodes.each_ref().map(|node| mesh.versions(node));
    let plaintext: BTreeSet<_> = differing(&permissive[0], &strict[0])
        .into_iter()
        .filter(|(kind, _)| *kind == Kind::Listener)
        .map(|(_, name)| name)
        .collect();
    assert_eq!(plaintext, BTreeSet::from(["virtual_inbound".to_owned()]));
    assert_eq!(differing(&permissive[1], &strict[1]), BTreeSet::new());
    mesh.documents(&mode("off"));
    assert_eq!(nodes.each_ref().map(|node| mesh.versions(node)), off);
}

/// The explanation and the compiler must agree about each endpoint.
#[test]
fn the_operator_is_told_how_each_endpoint_is_called_and_why() {
    let mut mesh = Mesh::new();
    mesh.catalog.on_node(orders(1, &["orders"]));
    mesh.catalog.on_node(NodeReport { mtls_ready: false, ..orders(2, &["orders"]) });
    mesh.catalog.on_node(NodeReport { identity: None, ..orders(3, &[]) });
    let mut told = String::new();
    for mode in ["off", "permissive", "strict"] {
        mesh.documents(&format!("kind: Service\nname: orders\nmtls: {{mode: \"{mode}\"}}\n"));
        let world = mesh.catalog.world();
        let all = tls(world, &name("orders"), &web());
        for endpoint in &all {
            told.push_str(&format!(
                "{mode}: {} {}: {}\n",
                endpoint.address,
                endpoint.connection.as_str(),
                endpoint.reason
            ));
        }
        let (snapshot, problems) = compile(world, &web());
        let assignment = if mode == "off" { "orders" } else { "orders||mtls" };
        let listed = format!("{:?}", snapshot.get(Kind::Endpoint, assignment).unwrap().value());
        for endpoint in all {
            // The address stands in the encoded message as text.
            let ip = endpoint.address.ip().to_string();
            assert_eq!(
                listed.contains(&ip),
                endpoint.connection != ConnectionSecurity::LeftOut,
                "{mode} {ip}"
            );
        }
        for problem in problems {
            told.push_str(&format!("{mode}: {problem}\n"));
        }
    }
    let stranger = NodeReport { identity: None, ..web() };
    told.push_str(&tls(mesh.catalog.world(), &name("orders"), &stranger)[0].reason);
    expect_test::expect![[r#"
        off: 10.0.0.1:8080 plaintext: its mode is off
        off: 10.0.0.2:8080 plaintext: its mode is off
        off: 10.0.0.3:8080 plaintext: its mode is off
        off: 10.0.0.4:8080 plaintext: its mode is off
        permissive: 10.0.0.1:8080 mtls: its mode is permissive, and node `orders-1` is ready for it
        permissive: 10.0.0.2:8080 plaintext: node `orders-2` is not ready: its Envoy has not accepted its listener for mTLS yet
        permissive: 10.0.0.3:8080 plaintext: node `orders-3` is not enrolled: its agent has no certificate
        permissive: 10.0.0.4:8080 plaintext: no node has the address 10.0.0.4
        strict: 10.0.0.1:8080 mtls: its mode is strict, and node `orders-1` is ready for it
        strict: 10.0.0.2:8080 mtls: its mode is strict, but node `orders-2` is not ready: its Envoy has not accepted its listener for mTLS yet
        strict: 10.0.0.3:8080 left out: node `orders-3` is not enrolled: its agent has no certificate
        strict: 10.0.0.4:8080 left out: no node has the address 10.0.0.4
        strict: mesh.yaml:1:1: 2 of 4 endpoints are left out (10.0.0.3:8080, 10.0.0.4:8080): its mode of mTLS is strict, and no enrolled node runs them; `vmeshctl explain` says why for each
        `web-1` is not enrolled: its agent has no certificate"#]].assert_eq(&told);
}
