//! Golden files: `golden/NAME.txt` contains services, documents and a node, `golden/NAME.json` the compiled
//! output. `UPDATE_EXPECT=1 cargo test -p vmesh-compile` rewrites the outputs; review their diff as Envoy
//! configuration.
//!
//! Every output for an Envoy is also validated by the real Envoy, in `--mode validate`.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test that cannot go on ends"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use expect_test::expect_file;
use serde_json::{Map, Value, json};
use vmesh_catalog::{Catalog, SourceService, SourceView};
use vmesh_compile::compile;
use vmesh_identity::{Identity, Key, Lifetimes, Root, TrustDomain};
use vmesh_model::State;
use vmesh_model::load::{DocumentFile, Library};
use vmesh_model::node::{Client, NodeCapture, NodeIdentity, Upstream, Upstreams, Workload};
use vmesh_model::{Endpoint, Health, Labels, NodeReport, Place, Registration, Weight};
use vmesh_proto::json::bytes_to_json;
use vmesh_testkit::{envoy, tempdir};
use vmesh_xds::{Kind, Snapshot};

fn cases() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut cases: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    cases.retain(|path| path.extension().is_some_and(|extension| extension == "txt"));
    cases.sort();
    assert!(cases.len() >= 10, "the golden inputs are gone");
    cases
}

#[test]
fn every_input_compiles_to_its_golden_output() {
    for case in cases() {
        let (snapshot, problems, _) = compiled(&case);
        let mut text = serde_json::to_string_pretty(&shown(&snapshot)).unwrap();
        for problem in problems {
            text.push_str(&format!("\nproblem: {problem}"));
        }
        text.push('\n');
        expect_file![case.with_extension("json")].assert_eq(&text);
    }
}

#[test]
fn envoy_accepts_every_golden_output() {
    let all = [envoy::binary_of(envoy::OLDEST).unwrap(), envoy::find().unwrap()];
    let dir = tempdir().unwrap();
    let confined = [0, 1].map(|at| without_ipv6(&all[at], &dir.join(at.to_string())));
    let mut checked = 0;
    for case in cases() {
        let (snapshot, _, client) = compiled(&case);
        if client == Client::Grpc {
            continue;
        }
        let has_ipv6 = !fs::read_to_string(&case).unwrap().contains("has no IPv6");
        let config = bootstrap(&snapshot);
        // A host may run any of these versions, and upgrade or roll back between them without losing a
        // request.
        for envoy in if has_ipv6 { &all } else { &confined } {
            if let Err(refusal) = envoy::validate_by(envoy, &config.to_string()) {
                panic!("{envoy:?} refuses what {} compiles to:\n{refusal}\n{config:#}", case.display());
            }
        }
        checked += 1;
    }
    assert!(checked >= 10, "only {checked} outputs were for an Envoy");
}

/// Writes a program to `path` that runs `envoy` as on a host without IPv6 (`ipv6.disable=1`), by a seccomp(2)
/// filter.
fn without_ipv6(envoy: &Path, path: &Path) -> PathBuf {
    let text = include_str!("without_ipv6.py").replace("ENVOY", &envoy.display().to_string());
    fs::write(path, text).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    path.to_owned()
}

/// Parses the parts of an input file and compiles them. `== others` are nodes that are not compiled, with an empty line
/// between them.
fn compiled(case: &Path) -> (Snapshot, Vec<vmesh_model::Problem>, Client) {
    let text = fs::read_to_string(case).unwrap();
    let mut parts = text.split("\n== ");
    let services = parts.next().unwrap();
    let mut sections: BTreeMap<&str, &str> = parts.map(|part| part.split_once('\n').unwrap()).collect();
    let documents = sections.remove("documents").unwrap_or_default();
    let node = sections.remove("node").expect("a `== node` section");
    let others = sections.remove("others").unwrap_or_default();
    assert!(sections.is_empty(), "{}: unknown sections {sections:?}", case.display());

    let mut catalog = Catalog::new(1).with_trust_domain("mesh.test");
    catalog.on_view(0, SourceView { services: read_services(services), problems: Vec::new() });
    let file = DocumentFile { path: "mesh.yaml", content: Ok(documents.as_bytes()) };
    let files = if documents.is_empty() { Vec::new() } else { vec![file] };
    let (documents, problems) = Library::default().update(&files);
    assert_eq!(problems, [], "{}", case.display());
    catalog.on_documents(documents, 1, problems);
    for other in others.split("\n\n").filter(|other| !other.trim().is_empty()) {
        catalog.on_node(read_node(other));
    }
    let report = read_node(node);
    let (snapshot, problems) = compile(catalog.world(), &report);
    (snapshot, problems, report.client)
}

/// Parses services: a line `orders http port=80`, and indented below it its endpoints, such as
/// `10.0.1.11:8080 version=v1 zone=eu-1a weight=2 health=draining source=zk:a rack=r7`.
fn read_services(text: &str) -> BTreeMap<vmesh_model::ServiceName, SourceService> {
    let mut services: BTreeMap<_, Registration> = BTreeMap::new();
    let mut current: Option<vmesh_model::ServiceName> = None;
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap();
        if !line.starts_with(' ') {
            let name: vmesh_model::ServiceName = first.parse().unwrap();
            let (ports, protocols): (Vec<_>, Vec<_>) = words.partition(|word| word.starts_with("port="));
            let registration = Registration {
                service: name.clone(),
                protocol: protocols.first().map(|protocol| protocol.parse().unwrap()),
                port: ports.first().map(|port| port["port=".len()..].parse().unwrap()),
                endpoints: Arc::new([]),
                place: Place::file("services.d"),
            };
            services.insert(name.clone(), registration);
            current = Some(name);
            continue;
        }
        let mut endpoint = Endpoint {
            address: first.parse().unwrap(),
            hostname: None,
            weight: Weight::ONE,
            health: Health::Unknown,
            zone: None,
            version: None,
            labels: Labels::new(),
            source: "file".into(),
        };
        for word in words {
            let (key, value) = word.split_once('=').unwrap();
            match key {
                "version" => endpoint.version = Some(value.into()),
                "zone" => endpoint.zone = Some(value.into()),
                "weight" => endpoint.weight = Weight::new(value.parse().unwrap()).unwrap(),
                "health" => endpoint.health = serde_json::from_value(json!(value)).unwrap(),
                "source" => endpoint.source = value.into(),
                "hostname" => endpoint.hostname = Some(value.into()),
                label => _ = endpoint.labels.insert(label.into(), value.into()),
            }
        }
        let registration = services.get_mut(current.as_ref().unwrap()).unwrap();
        registration.endpoints = registration.endpoints.iter().cloned().chain([endpoint]).collect();
    }
    let seen = |registration| SourceService {
        registration: Arc::new(registration),
        state: State::Fresh,
        because: None,
    };
    services.into_iter().map(|(name, registration)| (name, seen(registration))).collect()
}

/// Parses a node: a line `web-1 zone=eu-1a label.role=web address=10.0.0.7 grants=orders,web granted.role=web
/// mtls=ready`, and below it any of `calls orders 127.0.0.1:9001`, `calls orders as web`, `calls *`, `serves orders 8080 127.0.0.1:15008`, `client grpc`, `captures outbound vip`,
/// `captures inbound tproxy` and `has no IPv6`.
fn read_node(text: &str) -> NodeReport {
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let mut head = lines.next().unwrap().split_whitespace();
    let mut report = NodeReport {
        name: head.next().unwrap().parse().unwrap(),
        client: Client::Envoy,
        address: None,
        zone: None,
        labels: Labels::new(),
        workloads: Vec::new(),
        upstreams: Upstreams::Declared(Vec::new()),
        capture: NodeCapture::default(),
        build: "".into(),
        identity: None,
        mtls_ready: false,
    };
    for word in head {
        match word.split_once('=').unwrap() {
            ("zone", zone) => report.zone = Some(zone.into()),
            ("address", address) => report.address = Some(address.parse().unwrap()),
            ("mtls", "ready") => report.mtls_ready = true,
            ("grants", services) => {
                let services = services.split(',').filter(|name| !name.is_empty());
                let services = services.map(|name| name.parse().unwrap()).collect();
                report.identity = Some(NodeIdentity { services, ..NodeIdentity::default() });
            }
            (granted, value) if granted.starts_with("granted.") => {
                let labels = &mut report.identity.as_mut().unwrap().labels;
                labels.insert(granted.strip_prefix("granted.").unwrap().into(), value.into());
            }
            (label, value) => {
                _ = report.labels.insert(label.strip_prefix("label.").unwrap().into(), value.into());
            }
        }
    }
    for line in lines {
        let words: Vec<_> = line.split_whitespace().collect();
        match words.as_slice() {
            ["calls", "*"] => report.upstreams = Upstreams::All,
            ["calls", service, rest @ ..] => {
                let (rest, as_) = match rest {
                    [listen @ .., "as", workload] => (listen, Some(workload.parse().unwrap())),
                    rest => (rest, None),
                };
                let Upstreams::Declared(declared) = &mut report.upstreams else { panic!("calls * and more") };
                let listen = rest.first().map(|listen| listen.parse().unwrap());
                declared.push(Upstream { service: service.parse().unwrap(), listen, as_ });
            }
            ["serves", service, application, rest @ ..] => {
                let (host, port) = match application.parse::<SocketAddr>() {
                    Ok(at) => (Some(at.ip()), at.port()),
                    Err(_) => (None, application.parse().unwrap()),
                };
                report.workloads.push(Workload {
                    service: service.parse().unwrap(),
                    port,
                    host,
                    protocol: None,
                    listen: rest.first().map(|listen| listen.parse().unwrap()),
                });
            }
            ["client", "grpc"] => report.client = Client::Grpc,
            ["captures", "outbound", what] => {
                report.capture.outbound = Some(serde_json::from_value(json!(what)).unwrap());
            }
            ["captures", "inbound", how] => {
                report.capture.inbound = Some(serde_json::from_value(json!(how)).unwrap());
            }
            ["has", "no", "IPv6"] => report.capture.without_ipv6 = true,
            other => panic!("{other:?}"),
        }
    }
    report
}

/// Returns every resource, by kind and name, as JSON in Envoy's notation.
fn shown(snapshot: &Snapshot) -> Value {
    let mut all = Map::new();
    for kind in Kind::ALL {
        let resources: BTreeMap<_, _> = snapshot
            .of_kind(kind)
            .map(|resource| {
                (resource.name().to_string(), bytes_to_json(kind.type_url(), &resource.value()).unwrap())
            })
            .collect();
        if !resources.is_empty() {
            all.insert(format!("{kind:?}"), resources.into_iter().collect::<Map<_, _>>().into());
        }
    }
    all.into()
}

/// Returns the secrets that an agent would deliver by SDS: any certificate, and the root that issued it.
fn secrets(names: &BTreeSet<String>) -> Vec<Value> {
    let domain: TrustDomain = "mesh.test".parse().unwrap();
    let (now, lifetimes) = (SystemTime::now(), Lifetimes::default());
    let root = Root::generate(&domain, now, &lifetimes).unwrap();
    let issuer = root.issue_intermediate("mesh1", now, &lifetimes).unwrap();
    let key = Key::generate().unwrap();
    let id = domain.id(Identity::Service("orders".parse().unwrap()));
    let chain = issuer.issue(&key.request().unwrap(), &id.into(), now, &lifetimes).unwrap();
    let inline = |text: &str| json!({ "inline_string": text });
    let secret = |name: &String| match name.as_str() {
        "trust_bundle" => {
            json!({"name": name, "validation_context": {"trusted_ca": inline(&issuer.bundle().unwrap().to_pem())}})
        }
        _ => {
            let certificate =
                json!({"certificate_chain": inline(&chain.to_pem()), "private_key": inline(&key.to_pem())});
            json!({"name": name, "tls_certificate": certificate})
        }
    };
    names.iter().map(secret).collect()
}

/// Makes the resources that a listener or cluster takes from ADS static: secrets by their names, of which it returns the
/// list, and filters by their configuration.
fn inline(value: &mut Value, filters: &Map<String, Value>, secrets: &mut BTreeSet<String>) {
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| inline(item, filters, secrets)),
        Value::Object(fields) => {
            if fields.remove("sds_config").is_some() {
                secrets.insert(fields["name"].as_str().unwrap().to_owned());
            }
            if fields.remove("config_discovery").is_some() {
                let name = fields["name"].as_str().unwrap();
                fields.insert("typed_config".to_owned(), filters[name]["typed_config"].clone());
            }
            fields.values_mut().for_each(|field| inline(field, filters, secrets));
        }
        _ => {}
    }
}

/// Returns the snapshot as a static Envoy configuration, with the EDS, RDS, SDS and ECDS resources inlined.
fn bootstrap(snapshot: &Snapshot) -> Value {
    let all = shown(snapshot);
    let of = |kind: &str| all.get(kind).and_then(Value::as_object).cloned().unwrap_or_default();
    let (assignments, routes) = (of("Endpoint"), of("Route"));
    let mut clusters: Vec<_> = of("Cluster").into_iter().map(|(_, cluster)| cluster).collect();
    for cluster in &mut clusters {
        if cluster["type"] == "EDS" {
            let second = cluster["eds_cluster_config"]["service_name"].as_str();
            let name = second.or(cluster["name"].as_str()).unwrap().to_owned();
            let fields = cluster.as_object_mut().unwrap();
            fields.remove("eds_cluster_config");
            fields.insert("type".to_owned(), json!("STATIC"));
            fields.insert("load_assignment".to_owned(), assignments[&name].clone());
        }
    }
    let mut listeners: Vec<_> = of("Listener").into_iter().map(|(_, listener)| listener).collect();
    for listener in &mut listeners {
        let chains = listener["filter_chains"].as_array_mut().unwrap();
        let filters = chains.iter_mut().flat_map(|chain| chain["filters"].as_array_mut().unwrap());
        for config in filters.filter_map(|filter| filter.get_mut("typed_config")) {
            if let Some(rds) = config.as_object_mut().unwrap().remove("rds") {
                config["route_config"] = routes[rds["route_config_name"].as_str().unwrap()].clone();
            }
        }
    }
    let (filters, mut names) = (of("ExtensionConfig"), BTreeSet::new());
    clusters.iter_mut().chain(&mut listeners).for_each(|resource| inline(resource, &filters, &mut names));
    json!({"static_resources": {"clusters": clusters, "listeners": listeners, "secrets": secrets(&names)}})
}
