//! mTLS between two real Envoys, and `Access` documents that they enforce. The configuration comes from the compiler over the
//! real xDS server; certificates come as an agent would deliver them.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test that cannot go on ends")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use tokio::net::TcpListener;
use vmesh_catalog::{Catalog, SourceService, SourceView};
use vmesh_compile::compile;
use vmesh_daemon::fetch::Peer;
use vmesh_identity::grant::Subject;
use vmesh_identity::{Identity, Issuer, Key, Lifetimes, Root, TrustDomain};
use vmesh_model::load::{DocumentFile, Library};
use vmesh_model::node::{Client, NodeCapture, NodeIdentity, Upstream, Upstreams, Workload};
use vmesh_model::{
    Endpoint, Health, Labels, NodeReport, Place, Protocol, Registration, ServiceName, State, Weight,
};
use vmesh_proto::envoy::config::core::v3::data_source::Specifier;
use vmesh_proto::envoy::config::core::v3::{DataSource, Node};
use vmesh_proto::envoy::extensions::transport_sockets::tls::v3::secret::Type;
use vmesh_proto::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, Secret, TlsCertificate,
};
use vmesh_testkit::app::HttpApp;
use vmesh_testkit::envoy::{self, Envoy};
use vmesh_testkit::load::{Load, Plan};
use vmesh_testkit::place::{Loopback, TempDir, tempdir};
use vmesh_testkit::process::Daemon;
use vmesh_testkit::{Failed, Result, wait_for};
use vmesh_tests::BOUND;
use vmesh_xds::server::{
    Admission, Admitted, AdsService, ConnectionLimits, Hub, Observer, PeerInfo, Refusal, serve_connections,
};
use vmesh_xds::{Group, Kind, Resource, Scope, SessionStatus, Store};

const DOMAIN: &str = "mesh.test";
/// The key set of the tokens below: `{"kty": "oct", "k": "a key of the test that is long enough"}`.
const JWKS: &str = r#"{"keys": [{"kty": "oct", "alg": "HS256", "kid": "k", "k": "YSBrZXkgb2YgdGhlIHRlc3QgdGhhdCBpcyBsb25nIGVub3VnaA"}]}"#;
/// Signed with the key: issuer https://login.example, role [reader, admin].
const ADMIN: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCIsImtpZCI6ImsifQ.eyJpc3MiOiJodHRwczovL2xvZ2luLmV4YW1wbGUiLCJzdWIiOiJhbm4iLCJyb2xlIjpbInJlYWRlciIsImFkbWluIl0sImV4cCI6NDEwMjQ0NDgwMH0.Ibrz5M32p9wQVsSE7HXKnCu3RCbudQiEuuQD890NAPg";
/// Signed with the key: role reader.
const READER: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCIsImtpZCI6ImsifQ.eyJpc3MiOiJodHRwczovL2xvZ2luLmV4YW1wbGUiLCJzdWIiOiJhbm4iLCJyb2xlIjoicmVhZGVyIiwiZXhwIjo0MTAyNDQ0ODAwfQ.9Va0dmZbj5pFeP5SRvTueRLPKDKEk0hCrk2MAsSI24k";
/// The claims of `ADMIN`, signed with another key.
const FOREIGN: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCIsImtpZCI6ImsifQ.eyJpc3MiOiJodHRwczovL2xvZ2luLmV4YW1wbGUiLCJzdWIiOiJhbm4iLCJyb2xlIjpbInJlYWRlciIsImFkbWluIl0sImV4cCI6NDEwMjQ0NDgwMH0.ouV3D5204xFzdQj9BNvmTD4vdKLqRDVWXLRvSBGmsNY";
/// The claims of `ADMIN`, without a signature.
const UNSIGNED: &str = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIiwia2lkIjoiayJ9.eyJpc3MiOiJodHRwczovL2xvZ2luLmV4YW1wbGUiLCJzdWIiOiJhbm4iLCJyb2xlIjpbInJlYWRlciIsImFkbWluIl0sImV4cCI6NDEwMjQ0NDgwMH0.";

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

/// Admits every node to the resources of its own name.
struct OwnResources(Hub);

struct NoObserver;

impl Observer for NoObserver {
    fn on_status(&mut self, _: &SessionStatus) {}
}

impl Admission for OwnResources {
    fn admit(&self, node: &Node, _: &PeerInfo) -> std::result::Result<Admitted, Refusal> {
        let feed = self.0.subscribe(node.id.as_str(), Arc::new(Scope::all()));
        Ok(Admitted { feed, observer: Box::new(NoObserver) })
    }
}

/// A mesh of `web-1`, which calls `orders`, and `orders-1`, which runs it.
struct TwoNodes {
    hub: Hub,
    stores: Mutex<BTreeMap<&'static str, Store>>,
    issuer: Issuer,
    catalog: Mutex<(Catalog, Library, u64)>,
    web: Loopback,
    orders: Loopback,
    app: HttpApp,
    envoys: BTreeMap<&'static str, (Daemon, Envoy)>,
    _dirs: Vec<TempDir>,
}

impl TwoNodes {
    async fn start(protocol: Protocol) -> Result<TwoNodes> {
        TwoNodes::start_as(protocol, "orders").await
    }

    /// Starts a mesh in which `orders-1` shows a certificate of the service `shown`.
    async fn start_as(protocol: Protocol, shown: &str) -> Result<TwoNodes> {
        let (web, orders) = (Loopback::unique()?, Loopback::unique()?);
        let app = HttpApp::start("orders", "v1", SocketAddr::new(orders.ip(), 8080))?;
        let domain: TrustDomain = DOMAIN.parse().unwrap();
        let root = Root::generate(&domain, SystemTime::now(), &Lifetimes::default()).unwrap();
        let issuer = root.issue_intermediate("mesh1", SystemTime::now(), &Lifetimes::default()).unwrap();
        let endpoint = Endpoint {
            address: SocketAddr::new(orders.ip(), 9080),
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
            protocol: Some(protocol),
            port: None,
            endpoints: [endpoint].into(),
            place: Place::file("services.d"),
        };
        let seen = SourceService { registration: Arc::new(registration), state: State::Fresh, because: None };
        let mut catalog = Catalog::new(1).with_trust_domain(DOMAIN);
        catalog.on_view(0, SourceView { services: [(name("orders"), seen)].into(), problems: Vec::new() });
        let hub = Hub::new();
        let listener =
            TcpListener::bind((web.ip(), 0)).await.map_err(Failed::to("could not bind a port for xDS"))?;
        let xds = listener.local_addr().map_err(Failed::to("a listener without an address"))?;
        let service = AdsService::new(hub.clone(), OwnResources(hub.clone()), "vmesh test");
        vmesh_testkit::background()?.spawn(serve_connections(
            listener,
            service,
            ConnectionLimits::default(),
            std::future::pending(),
        ));
        let mut nodes = TwoNodes {
            hub,
            stores: Mutex::default(),
            issuer,
            catalog: Mutex::new((catalog, Library::default(), 0)),
            web,
            orders,
            app,
            envoys: BTreeMap::new(),
            _dirs: Vec::new(),
        };
        for report in [nodes.web_1(), nodes.orders_1()] {
            nodes.catalog.lock().unwrap().0.on_node(report);
        }
        nodes.documents("kind: Service\nname: orders\nmtls: {mode: permissive}\n");
        nodes.secrets("web-1", &[("caller", "web", "web-1")]);
        nodes
            .secrets("orders-1", &[("workload|orders", shown, "orders-1"), ("caller", "orders", "orders-1")]);
        for node in ["web-1", "orders-1"] {
            nodes.start_envoy(node, xds).await?;
        }
        Ok(nodes)
    }

    async fn start_envoy(&mut self, node: &'static str, xds: SocketAddr) -> Result<()> {
        let dir = tempdir()?;
        let admin = dir.join("admin.sock");
        let ads = serde_json::json!({"ads": {}, "resource_api_version": "V3"});
        let bootstrap = serde_json::json!({
            "node": {"id": node, "cluster": "test"},
            "admin": {"address": {"pipe": {"path": admin}}},
            "dynamic_resources": {
                "ads_config": {"api_type": "DELTA_GRPC", "transport_api_version": "V3",
                    "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}]},
                "cds_config": ads, "lds_config": ads,
            },
            "static_resources": {"clusters": [{
                "name": "xds", "type": "STATIC", "connect_timeout": "1s",
                "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": {"http2_protocol_options": {}}}},
                "load_assignment": {"cluster_name": "xds", "endpoints": [{"lb_endpoints": [{"endpoint": {"address":
                    {"socket_address": {"address": xds.ip().to_string(), "port_value": xds.port()}}}}]}]},
            }]},
        });
        let path = dir.join("bootstrap.json");
        std::fs::write(&path, bootstrap.to_string()).map_err(Failed::to("could not write the bootstrap"))?;
        let mut command = Command::new(envoy::find()?);
        command.args([
            "--disable-hot-restart",
            "--concurrency",
            "1",
            "--log-level",
            "warning",
            "--config-path",
        ]);
        let daemon = Daemon::spawn(format!("envoy {node}"), {
            command.arg(&path);
            command
        })?;
        let envoy = Envoy::at(Peer::Unix(admin));
        envoy.wait_live(BOUND).await?;
        self.envoys.insert(node, (daemon, envoy));
        self._dirs.push(dir);
        Ok(())
    }

    fn web_1(&self) -> NodeReport {
        let listen = Some(SocketAddr::new(self.web.ip(), 9001));
        NodeReport {
            name: "web-1".parse().unwrap(),
            client: Client::Envoy,
            address: Some(self.web.ip()),
            zone: None,
            labels: Labels::new(),
            workloads: Vec::new(),
            upstreams: Upstreams::Declared(vec![Upstream { service: name("orders"), listen, as_: None }]),
            capture: NodeCapture::default(),
            build: "".into(),
            identity: Some(NodeIdentity {
                services: [name("web")].into(),
                labels: [("tier".into(), "gold".into())].into(),
            }),
            mtls_ready: false,
        }
    }

    fn orders_1(&self) -> NodeReport {
        let workload = Workload {
            service: name("orders"),
            port: 8080,
            host: Some(self.orders.ip()),
            protocol: None,
            listen: Some(SocketAddr::new(self.orders.ip(), 9080)),
        };
        NodeReport {
            name: "orders-1".parse().unwrap(),
            address: Some(self.orders.ip()),
            workloads: vec![workload],
            upstreams: Upstreams::Declared(Vec::new()),
            identity: Some(NodeIdentity { services: [name("orders")].into(), ..NodeIdentity::default() }),
            mtls_ready: true,
            ..self.web_1()
        }
    }

    /// Replaces the documents, and publishes what they compile to.
    fn documents(&self, text: &str) {
        let world = {
            let mut catalog = self.catalog.lock().unwrap();
            let (catalog, library, hash) = &mut *catalog;
            let files = [("mesh.yaml", text), ("login.jwks", JWKS)];
            let (documents, problems) = library
                .update(&files.map(|(path, text)| DocumentFile { path, content: Ok(text.as_bytes()) }));
            assert_eq!(problems, [], "{text}");
            *hash += 1;
            catalog.on_documents(documents, *hash, problems);
            catalog.world().clone()
        };
        for report in [self.web_1(), self.orders_1()] {
            let (snapshot, _) = compile(&world, &report);
            let resources: Vec<_> =
                Kind::ALL.into_iter().flat_map(|kind| snapshot.of_kind(kind)).cloned().collect();
            let node = if report.name.as_str() == "web-1" { "web-1" } else { "orders-1" };
            self.publish(node, "configuration", resources);
        }
    }

    /// Delivers certificates: the name of the secret, the service that it names, and the node.
    fn secrets(&self, node: &'static str, secrets: &[(&str, &str, &str)]) {
        let domain: TrustDomain = DOMAIN.parse().unwrap();
        let text = |text: &str| DataSource {
            specifier: Some(Specifier::InlineString(text.to_owned())),
            ..DataSource::default()
        };
        let secret = |name: &str, content: Type| {
            let secret = Secret { name: name.to_owned(), r#type: Some(content) };
            Resource::new(Kind::Secret, name, &secret)
        };
        let mut resources: Vec<_> = secrets
            .iter()
            .map(|(secret_name, service, node)| {
                let key = Key::generate().unwrap();
                let subject = Subject {
                    id: domain.id(Identity::Service(name(service))),
                    node: Some(node.parse().unwrap()),
                    grant: None,
                };
                let (now, lifetimes) = (SystemTime::now(), Lifetimes::default());
                let chain = self.issuer.issue(&key.request().unwrap(), &subject, now, &lifetimes).unwrap();
                let certificate = TlsCertificate {
                    certificate_chain: Some(text(&chain.to_pem())),
                    private_key: Some(text(&key.to_pem())),
                    ..TlsCertificate::default()
                };
                secret(secret_name, Type::TlsCertificate(certificate))
            })
            .collect();
        let roots = CertificateValidationContext {
            trusted_ca: Some(text(&self.issuer.bundle().unwrap().to_pem())),
            ..CertificateValidationContext::default()
        };
        resources.push(secret("trust_bundle", Type::ValidationContext(roots)));
        self.publish(node, "secrets", resources);
    }

    fn publish(&self, node: &'static str, group: &str, resources: Vec<Arc<Resource>>) {
        let mut stores = self.stores.lock().unwrap();
        let store = stores.entry(node).or_default();
        *store = store.apply([(group.into(), Some(Group::new(group, resources)))]);
        self.hub.publish(node, Arc::new(store.clone()));
    }

    fn envoy(&self, node: &str) -> &Envoy {
        &self.envoys[node].1
    }

    async fn stat(&self, node: &str, stat: &str) -> Result<u64> {
        Ok(self.envoy(node).stat(stat).await?.unwrap_or_default())
    }

    /// Sends one request from the application beside `web-1`, and returns the status of the answer.
    fn call(&self, request: &str) -> u16 {
        status(SocketAddr::new(self.web.ip(), 9001), request).unwrap_or_default()
    }

    /// Waits until a request is answered with `expected`.
    async fn wait_status(&self, request: &str, expected: u16) -> Result<()> {
        let answered = async || match self.call(request) {
            status if status == expected => Ok(()),
            status => Err(format!("it was answered with {status}")),
        };
        wait_for(&format!("`{request}` to be answered with {expected}"), BOUND, answered).await
    }
}

/// Sends a request exactly as written: `METHOD PATH`, and lines of headers.
fn status(address: SocketAddr, request: &str) -> std::io::Result<u16> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let (line, headers) = request.split_once('\n').unwrap_or((request, ""));
    let headers = headers.lines().map(|header| format!("{header}\r\n")).collect::<String>();
    stream.write_all(
        format!("{line} HTTP/1.1\r\nhost: orders\r\nconnection: close\r\n{headers}\r\n").as_bytes(),
    )?;
    let mut answer = String::new();
    _ = stream.read_to_string(&mut answer);
    Ok(answer.split_whitespace().nth(1).and_then(|status| status.parse().ok()).unwrap_or_default())
}

const PERMISSIVE: &str = "kind: Service\nname: orders\nmtls: {mode: permissive}\n";

fn with(access: &str) -> String {
    format!("{PERMISSIVE}---\nkind: Access\nservice: orders\n{access}")
}

#[tokio::test(flavor = "multi_thread")]
async fn two_envoys_call_each_other_by_mtls_and_know_each_other() -> Result<()> {
    // A node with a valid certificate of another service is not `orders`.
    let nodes = TwoNodes::start_as(Protocol::Http, "billing").await?;
    let refused = async || match nodes.stat("web-1", "cluster.orders.ssl.fail_verify_san").await {
        Ok(refused) if refused > 0 => Ok(()),
        other => Err(format!("{other:?}, and a call was answered with {}", nodes.call("GET /"))),
    };
    wait_for("web-1 to refuse the certificate", BOUND, refused).await?;
    assert_eq!((nodes.call("GET /"), nodes.app.requests()), (503, 0));
    nodes.secrets("orders-1", &[("workload|orders", "orders", "orders-1"), ("caller", "orders", "orders-1")]);
    nodes.wait_status("GET /", 200).await?;
    assert!(nodes.stat("web-1", "cluster.orders.ssl.handshake").await? > 0, "the call went by plaintext");

    // Plaintext is refused on the port for mTLS. The plaintext port accepts it while the mode is permissive.
    let ip = nodes.orders.ip();
    assert_eq!(status(SocketAddr::new(ip, 15_008), "GET /").unwrap_or_default(), 0);
    assert_eq!(status(SocketAddr::new(ip, 9080), "GET /").unwrap_or_default(), 200);

    // Off: plaintext again.
    nodes.documents("kind: Service\nname: orders\nmtls: {mode: \"off\"}\n");
    let plain = async || match nodes.envoy("web-1").endpoints("orders").await {
        Ok(Some(endpoints)) if endpoints.iter().all(|(address, _)| address.ends_with(":9080")) => Ok(()),
        other => Err(format!("{other:?}")),
    };
    wait_for("web-1 to call the plaintext port", BOUND, plain).await?;
    assert_eq!(nodes.call("GET /"), 200);
    Ok(())
}

/// The test migrates a service to mTLS and back under load. Each stage begins when the caller has followed the last.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_mode_or_of_certificates_fails_no_request() -> Result<()> {
    let nodes = TwoNodes::start(Protocol::Http).await?;
    nodes.wait_status("GET /", 200).await?;
    let load = Load::start(Plan::to(SocketAddr::new(nodes.web.ip(), 9001)))?;
    for (stage, mode) in ["off", "permissive", "strict", "permissive", "off", "permissive"]
        .into_iter()
        .cycle()
        .take(12)
        .enumerate()
    {
        nodes.documents(&format!("kind: Service\nname: orders\nmtls: {{mode: \"{mode}\"}}\n"));
        let port = if mode == "off" { ":9080" } else { ":15008" };
        let followed = async || match nodes.envoy("web-1").endpoints("orders").await {
            Ok(Some(endpoints)) if endpoints.iter().all(|(address, _)| address.ends_with(port)) => Ok(()),
            other => Err(format!("{other:?}")),
        };
        wait_for(&format!("web-1 to follow stage {stage}, {mode}"), BOUND, followed).await?;
        nodes.secrets("web-1", &[("caller", "web", "web-1")]);
        nodes.secrets(
            "orders-1",
            &[("workload|orders", "orders", "orders-1"), ("caller", "orders", "orders-1")],
        );
        let sent = load.so_far().sent;
        wait_for("a few more requests", BOUND, async || match load.so_far().sent {
            now if now > sent + 60 => Ok(()),
            now => Err(format!("{now} requests")),
        })
        .await?;
    }
    let report = load.stop().await;
    assert!(report.sent > 500, "{} requests", report.sent);
    assert_eq!(report.failures, 0, "{:?}", report.failed.iter().take(5).collect::<Vec<_>>());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn access_documents_decide_who_calls_what_and_an_edit_touches_no_listener() -> Result<()> {
    let nodes = TwoNodes::start(Protocol::Http).await?;
    nodes.documents(&with("rules: [{from: {services: [web]}, action: allow}]\n"));
    nodes.wait_status("GET /", 200).await?;
    let plaintext = SocketAddr::new(nodes.orders.ip(), 9080);
    let refused = async || match status(plaintext, "GET /") {
        Ok(403) => Ok(()),
        other => Err(format!("{other:?}")),
    };
    wait_for("a plaintext caller to be refused", BOUND, refused).await?;
    let modified = nodes.stat("orders-1", "listener_manager.listener_modified").await?;
    let in_place = nodes.stat("orders-1", "listener_manager.listener_in_place_updated").await?;

    let allowed = [
        "from: {nodes: {tier: gold}}",
        "from: {services: [shop, web], nodes: {tier: gold}}",
        "to: {methods: [GET]}",
        "to: {ports: [8080]}",
        "to: {paths: [{exact: /}]}",
        "from: {anyone: true}",
    ];
    let refused = [
        "from: {nodes: {tier: iron}}",
        "from: {services: [shop]}",
        "from: {services: [shop], nodes: {tier: gold}}",
        "from: {cidrs: [10.0.0.0/8]}",
        "to: {methods: [POST]}",
        "to: {ports: [8081]}",
        "to: {headers: {x-a: \"1\"}}",
        "to: {paths: [{prefix: /x}]}",
    ];
    for (good, bad) in allowed.iter().zip(refused.iter().cycle()) {
        nodes.documents(&with(&format!("rules: [{{{bad}, action: allow}}]\n")));
        nodes.wait_status("GET /", 403).await?;
        nodes.documents(&with(&format!("rules: [{{{good}, action: allow}}]\n")));
        nodes.wait_status("GET /", 200).await?;
    }
    // Deny takes precedence.
    nodes.documents(&with("rules: [{action: allow}, {from: {services: [web]}, action: deny}]\n"));
    nodes.wait_status("GET /", 403).await?;
    // Audit refuses nothing, and counts.
    nodes.documents(&with("mode: audit\nrules: [{from: {services: [shop]}, action: allow}]\n"));
    nodes.wait_status("GET /", 200).await?;
    let shadow = async || match nodes.stat("orders-1", "http.inbound_orders_mtls.rbac.shadow_denied").await {
        Ok(denied) if denied > 0 => Ok(()),
        other => {
            _ = nodes.call("GET /");
            Err(format!("{other:?}"))
        }
    };
    wait_for("the audit to count", BOUND, shadow).await?;
    // The output of Envoy names the callers who were or would have been refused.
    let listed = async || match nodes.envoys["orders-1"].0.output() {
        output if output.contains(r#""audit":"denied""#) => Ok(output),
        output => Err(output),
    };
    let output = wait_for("the refusal to be logged", BOUND, listed).await?;
    let lines: Vec<_> = output.lines().filter(|line| line.contains(r#""vmesh":"access""#)).collect();
    let audited = lines.iter().find(|line| line.contains(r#""audit":"denied""#)).copied().unwrap_or_default();
    for part in
        [r#""caller":"spiffe://mesh.test/service/web""#, r#""node":"web-1.node.mesh.test""#, r#""path":"/""#]
    {
        assert!(audited.contains(part), "{audited}");
    }
    assert!(lines.iter().any(|line| line.contains(r#""enforced":"denied""#)), "{output}");
    assert_eq!(nodes.stat("orders-1", "listener_manager.listener_modified").await?, modified);
    assert_eq!(nodes.stat("orders-1", "listener_manager.listener_in_place_updated").await?, in_place);
    assert!(nodes.app.requests() > 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_of_a_path_gets_around_a_rule() -> Result<()> {
    let nodes = TwoNodes::start(Protocol::Http).await?;
    nodes.documents(&with(
        "default: allow\nrules: [{to: {paths: [{prefix: /admin}, {exact: /secret/key}]}, action: deny}]\n",
    ));
    nodes.wait_status("GET /admin", 403).await?;
    for path in [
        "/",
        "/adminx",
        "/x/admin",
        "/secret",
        "/secret/keys",
        "/a%20b",
        "/%c3%a4",
        "/.well-known/x",
        "/a?x=//;../%2e",
    ] {
        assert_eq!(nodes.call(&format!("GET {path}")), 200, "{path}");
    }
    let tricks = [
        "/admin/",
        "/admin/x",
        "/admin?x",
        "/ADMIN",
        "/Admin/x",
        "/secret/KEY",
        "//admin",
        "/x//admin",
        "/./admin",
        "/x/../admin",
        "/x/..;/admin",
        "/admin;x=1",
        "/admin;",
        "/%61dmin",
        "/%2561dmin",
        "/x/%2e%2e/admin",
        "/x/%2E%2e/admin",
        "/x%2f..%2fadmin",
        "/x%2Fadmin",
        "/x%5c..%5cadmin",
        "/x\\..\\admin",
        "/admin%00",
        "/admin%2f",
        "/secret%2fkey",
        "/secret/./key",
        "/%c0%ae%c0%ae/admin",
        "/admin/..",
        "/%",
        "/%zz",
    ];
    for path in tricks {
        let status = nodes.call(&format!("GET {path}"));
        assert!(status == 403 || status == 400, "{path} was answered with {status}");
    }
    // An allowed prefix is no way to other paths.
    nodes.documents(&with("rules: [{to: {paths: [{prefix: /public}]}, action: allow}]\n"));
    nodes.wait_status("GET /", 403).await?;
    nodes.wait_status("GET /public/x", 200).await?;
    for path in [
        "/publicx",
        "/Public",
        "/public/../admin",
        "/public/..;/admin",
        "/public/%2e%2e/admin",
        "/public//../admin",
        "/public%2f..%2fadmin",
    ] {
        let status = nodes.call(&format!("GET {path}"));
        assert!(status == 403 || status == 400, "{path} was answered with {status}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_token_that_the_issuer_signed_counts() -> Result<()> {
    let nodes = TwoNodes::start(Protocol::Http).await?;
    nodes.documents(&with(
        "jwt_providers: [{issuer: \"https://login.example\", jwks_file: login.jwks}]\n\
         rules: [{from: {jwt: {issuer: \"https://login.example\", claims: {role: admin}}}, action: allow}]\n",
    ));
    let with_token = |token: &str| format!("GET /\nauthorization: Bearer {token}");
    nodes.wait_status("GET /", 403).await?;
    nodes.wait_status(&with_token(ADMIN), 200).await?;
    assert_eq!(nodes.call(&with_token(READER)), 403);
    for (kind, token) in [("foreign key", FOREIGN), ("alg none", UNSIGNED), ("garbage", "x.y.z")] {
        assert_eq!(nodes.call(&with_token(token)), 401, "{kind}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_hold_for_tcp_services_too() -> Result<()> {
    let nodes = TwoNodes::start(Protocol::Tcp).await?;
    nodes.wait_status("GET /", 200).await?;
    nodes.documents(&with("rules: [{from: {services: [shop]}, action: allow}]\n"));
    nodes.wait_status("GET /", 0).await?;
    nodes.documents(&with("rules: [{from: {services: [web], nodes: {tier: gold}}, action: allow}]\n"));
    nodes.wait_status("GET /", 200).await?;
    assert!(nodes.stat("web-1", "cluster.orders.ssl.handshake").await? > 0);
    Ok(())
}
