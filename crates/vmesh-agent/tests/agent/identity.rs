//! Tests of a node's identity: the agent and the real Envoy against a control plane with mTLS in the test process.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use axum::body::Body;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use vmesh_api::identity::{JOIN_PATH, JoinAnswer, JoinRequest, RENEW_PATH, RenewRequest};
use vmesh_daemon::fetch::{Peer, fetch};
use vmesh_daemon::tasks::spawn_handle;
use vmesh_identity::tls::{any_server_name, server_config};
use vmesh_identity::{
    Certificate, CertificateChain, Identity, Issuer, JoinGrant, Key, Lifetimes, NodeGrant, Root, Subject,
    TokenLedger, TrustBundle, TrustDomain, verify,
};
use vmesh_model::{Labels, ServiceName};
use vmesh_proto::any;
use vmesh_proto::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
use vmesh_proto::envoy::config::core::v3::{
    AggregatedConfigSource, ApiVersion, ConfigSource, Node, TransportSocket, transport_socket,
};
use vmesh_proto::envoy::extensions::transport_sockets::tls::v3::common_tls_context::ValidationContextType;
use vmesh_proto::envoy::extensions::transport_sockets::tls::v3::{
    CommonTlsContext, DownstreamTlsContext, SdsSecretConfig,
};
use vmesh_proto::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use vmesh_proto::google::protobuf::BoolValue;
use vmesh_proto::google::protobuf::value::Kind as ValueKind;
use vmesh_testkit::app::HttpApp;
use vmesh_testkit::envoy;
use vmesh_testkit::process::Daemon;
use vmesh_testkit::wait_for;
use vmesh_xds::client::AdsStream;
use vmesh_xds::server::{Admission, Admitted, AdsService, Hub, Observer, PeerInfo, Refusal};
use vmesh_xds::{Group, Kind, Resource, Scope, SessionStatus, Store};

use crate::fixture::{Place, SOON, cluster, listener};

/// What the control plane of a test decides, and what it has seen.
struct MeshState {
    ledger: TokenLedger,
    lifetimes: Lifetimes,
    /// Roots that are trusted beside the issuer's.
    more_roots: Vec<Root>,
    /// Seconds by which the clock of the control plane is ahead.
    clock_skew: u64,
    joins: usize,
    renewals: usize,
    bundles_in_use: BTreeSet<String>,
    /// The nodes of the xDS streams, with the identity of the client's certificate.
    nodes: Vec<(Option<String>, Node)>,
}

/// A control plane with mTLS. Dropping it closes the port and all connections.
struct Mesh {
    address: SocketAddr,
    root: Root,
    issuer: Arc<Issuer>,
    state: Arc<Mutex<MeshState>>,
    hub: Hub,
    task: Option<tokio::task::JoinHandle<()>>,
}

struct MeshAdmission {
    hub: Hub,
    state: Arc<Mutex<MeshState>>,
}

struct NoObserver;

impl Observer for NoObserver {
    fn on_status(&mut self, _: &SessionStatus) {}
}

impl Admission for MeshAdmission {
    fn admit(&self, node: &Node, peer: &PeerInfo) -> Result<Admitted, Refusal> {
        let id =
            |der: &[u8]| Certificate::read(&vmesh_identity::certificate::der(der)).unwrap().id().unwrap();
        let identity = peer.certificate.as_deref().map(|der| id(der).to_string());
        if identity.is_none() {
            return Err(Refusal::Denied("a client without a certificate".to_owned()));
        }
        self.state.lock().unwrap().nodes.push((identity, node.clone()));
        let feed = self.hub.subscribe("", Arc::new(Scope::all()));
        Ok(Admitted { feed, observer: Box::new(NoObserver) })
    }
}

impl Mesh {
    async fn start(address: SocketAddr, leaf: Duration) -> Mesh {
        let trust_domain: TrustDomain = "mesh.example".parse().unwrap();
        let now = SystemTime::now();
        let root = Root::generate(&trust_domain, now, &Lifetimes::default()).unwrap();
        let issuer = Arc::new(root.issue_intermediate("mesh1", now, &Lifetimes::default()).unwrap());
        let state = Arc::new(Mutex::new(MeshState {
            ledger: TokenLedger::from_records([]),
            lifetimes: Lifetimes { leaf, ..Lifetimes::default() },
            more_roots: Vec::new(),
            clock_skew: 0,
            joins: 0,
            renewals: 0,
            bundles_in_use: BTreeSet::new(),
            nodes: Vec::new(),
        }));
        let mut mesh = Mesh { address, root, issuer, state, hub: Hub::new(), task: None };
        mesh.listen().await;
        mesh
    }

    async fn listen(&mut self) {
        let id = self.issuer.trust_domain().id(Identity::ControlPlane("mesh1".parse().unwrap()));
        let (chain, key) = issue(&self.issuer, Subject::from(id), &Lifetimes::default());
        let config = server_config(&chain, &key, self.issuer.bundle().unwrap()).unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind(self.address).await.unwrap();
        let admission = MeshAdmission { hub: self.hub.clone(), state: self.state.clone() };
        let ads = AdsService::new(self.hub.clone(), admission, "test");
        let (issuer, state) = (self.issuer.clone(), self.state.clone());
        self.task = Some(spawn_handle(async move {
            let mut connections = JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, ads) = (acceptor.clone(), ads.clone());
                let (issuer, state) = (issuer.clone(), state.clone());
                connections.spawn(async move {
                    let Ok(tls) = acceptor.accept(tcp).await else { return };
                    let client = tls.get_ref().1.peer_certificates().and_then(|chain| chain.first());
                    let client = client.map(|leaf| Certificate::read(leaf).unwrap());
                    let answer = service_fn(move |request| {
                        answer(request, client.clone(), ads.clone(), issuer.clone(), state.clone())
                    });
                    let http = http2::Builder::new(TokioExecutor::new());
                    _ = http.serve_connection(TokioIo::new(tls), answer).await;
                });
            }
        }));
    }

    async fn stop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            _ = task.await;
        }
    }

    fn token(&self, node: &str, services: &[&str]) -> String {
        let grant = JoinGrant {
            node: node.parse().unwrap(),
            services: services.iter().map(|name| name.parse().unwrap()).collect(),
            labels: Labels::default(),
            network: None,
        };
        let mut state = self.state.lock().unwrap();
        let pin = self.root.key().public_hash();
        let lifetime = Duration::from_secs(600);
        state.ledger.create(grant, lifetime, pin, SystemTime::now()).unwrap().reveal().to_string()
    }

    fn publish(&self, resources: Vec<Arc<Resource>>) {
        self.hub.publish(
            "",
            Arc::new(Store::default().apply([("all".into(), Some(Group::new("all", resources)))])),
        );
    }

    fn seen<T>(&self, look: impl FnOnce(&MeshState) -> T) -> T {
        look(&self.state.lock().unwrap())
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// Makes a key, and issues a certificate for that key.
fn issue(issuer: &Issuer, subject: Subject, lifetimes: &Lifetimes) -> (CertificateChain, Key) {
    let key = Key::generate().unwrap();
    (issuer.issue(&key.request().unwrap(), &subject, SystemTime::now(), lifetimes).unwrap(), key)
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

async fn answer(
    request: Request<Incoming>,
    client: Option<Certificate>,
    ads: AdsService,
    issuer: Arc<Issuer>,
    state: Arc<Mutex<MeshState>>,
) -> Result<Response<Body>, Infallible> {
    let path = request.uri().path().to_owned();
    if path != JOIN_PATH && path != RENEW_PATH {
        let mut request = request;
        let certificate = client.map(|client| client.der.as_ref().into());
        request.extensions_mut().insert(PeerInfo { certificate, ..PeerInfo::default() });
        return Ok(ads.answer(request).map(Body::new));
    }
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let mut state = state.lock().unwrap();
    let answered = match (path == JOIN_PATH, client) {
        (true, _) => join(&body, &issuer, &mut state),
        (false, Some(client)) => renew(&body, &client, &issuer, &mut state),
        (false, None) => Err("a client without a certificate".to_owned()),
    };
    let (status, body) = match answered {
        Ok(body) => (StatusCode::OK, body),
        Err(error) => (StatusCode::FORBIDDEN, serde_json::json!({"error": error}).to_string()),
    };
    Ok(Response::builder().status(status).body(Body::from(body)).unwrap())
}

fn bundle(issuer: &Issuer, state: &MeshState) -> TrustBundle {
    let roots = state.more_roots.iter().map(|root| root.certificate().clone());
    roots.fold(issuer.bundle().unwrap(), |bundle, root| bundle.with(root).unwrap())
}

fn join(body: &Bytes, issuer: &Issuer, state: &mut MeshState) -> Result<String, String> {
    let request: JoinRequest = serde_json::from_slice(body).unwrap();
    let (token, from) = (request.token.parse().unwrap(), [127, 0, 0, 1].into());
    let grant = state.ledger.redeem(&token, &request.node, &request.services, from, SystemTime::now());
    let grant = grant.map_err(|refusal| refusal.public().to_owned())?;
    state.joins += 1;
    let chain = node_chain(issuer, &request.request, &request.node.to_string(), &grant.services, state);
    let answer = JoinAnswer {
        node_chain: chain,
        granted: grant.services,
        bundle: bundle(issuer, state).to_pem(),
        trust_domain: issuer.trust_domain().to_string(),
        now: unix_now() + state.clock_skew,
    };
    Ok(serde_json::to_string(&answer).unwrap())
}

fn node_chain(
    issuer: &Issuer,
    request: &str,
    node: &str,
    services: &BTreeSet<ServiceName>,
    state: &MeshState,
) -> String {
    let subject = Subject {
        id: issuer.trust_domain().id(Identity::Node(node.parse().unwrap())),
        node: Some(node.parse().unwrap()),
        grant: Some(NodeGrant { services: services.clone(), ..NodeGrant::default() }),
    };
    issuer.issue(request, &subject, SystemTime::now(), &state.lifetimes).unwrap().to_pem()
}

fn renew(
    body: &Bytes,
    client: &Certificate,
    issuer: &Issuer,
    state: &mut MeshState,
) -> Result<String, String> {
    let request: RenewRequest = serde_json::from_slice(body).unwrap();
    let Identity::Node(node) = client.id().unwrap().identity else { return Err("not a node".to_owned()) };
    let granted = client.grant.clone().unwrap().services;
    state.bundles_in_use.extend(request.bundle);
    let chain = request.node_request.map(|request| {
        state.renewals += 1;
        node_chain(issuer, &request, node.as_str(), &granted, state)
    });
    let services = request.services.into_iter().map(|(service, request)| {
        assert!(granted.contains(&service));
        let id = issuer.trust_domain().id(Identity::Service(service.clone()));
        let subject = Subject { id, node: Some(node.clone()), grant: None };
        let chain = issuer.issue(&request, &subject, SystemTime::now(), &state.lifetimes).unwrap();
        (service, chain.to_pem())
    });
    let answer = serde_json::json!({
        "node_chain": chain,
        "services": services.collect::<BTreeMap<_, _>>(),
        "granted": granted,
        "bundle": bundle(issuer, state).to_pem(),
        "trust_domain": issuer.trust_domain(),
        "now": unix_now() + state.clock_skew,
    });
    Ok(answer.to_string())
}

/// A node with the workload `orders`, whose agent is told to join.
struct MeshNode {
    place: Place,
    daemon: Option<Daemon>,
    api: Peer,
}

impl MeshNode {
    fn new() -> MeshNode {
        let place = Place::new();
        let api = Peer::Tcp(place.api());
        MeshNode { place, daemon: None, api }
    }

    fn control_plane(&self) -> SocketAddr {
        self.place.at(15012)
    }

    fn token_file(&self) -> std::path::PathBuf {
        self.place.dir.join("token")
    }

    fn command(&self) -> Command {
        let path = self.place.dir.join("agent.yaml");
        let text = format!(
            r#"
control_plane: ["{control_plane}"]
join: {{token_file: {token}}}
state_dir: {dir}/state
run_dir: {dir}/run
envoy: {{path: "{envoy}", manage: child, concurrency: 1, drain: 1s}}
listen: {{api: "{api}"}}
node: {{name: web-1, address: {ip}}}
workloads: [{{service: orders, port: 8080, protocol: http}}]
"#,
            control_plane = self.control_plane(),
            token = self.token_file().display(),
            dir = self.place.dir.display(),
            envoy = envoy::find().unwrap().display(),
            api = self.place.api(),
            ip = self.place.address,
        );
        std::fs::write(&path, text).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmesh-agent"));
        command.env("VMESH_LOG", "debug").env("VMESH_AGENT_CONFIG", path);
        command
    }

    fn start(&mut self) {
        self.daemon = Some(Daemon::spawn("vmesh-agent", self.command()).unwrap());
    }

    async fn status(&mut self, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let seen = wait_for(what, SOON, async || {
            let (_, body) =
                fetch(&self.api, http::Method::GET, "/status", SOON).await.map_err(|e| e.to_string())?;
            let status: Value = serde_json::from_slice(&body).unwrap();
            if is(&status) { Ok(status) } else { Err(status.to_string()) }
        });
        let output = || self.daemon.as_ref().unwrap().output();
        seen.await.map_err(|failed| panic!("{failed}\n{}", output())).unwrap()
    }

    /// Returns what Envoy serves: a cluster for the application, and the listener for mTLS.
    fn resources(&self, app: &HttpApp) -> Vec<Arc<Resource>> {
        let address = self.place.at(15008);
        let name = format!("mtls|{address}");
        let mut listener = listener(&name, address, "orders");
        let secret = |name: &str| SdsSecretConfig {
            name: name.to_owned(),
            sds_config: Some(ConfigSource {
                resource_api_version: ApiVersion::V3.into(),
                config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource::default())),
                ..ConfigSource::default()
            }),
        };
        let context = DownstreamTlsContext {
            common_tls_context: Some(CommonTlsContext {
                tls_certificate_sds_secret_configs: vec![secret("workload|orders")],
                validation_context_type: Some(ValidationContextType::ValidationContextSdsSecretConfig(
                    secret("trust_bundle"),
                )),
                ..CommonTlsContext::default()
            }),
            require_client_certificate: Some(BoolValue { value: true }),
            ..DownstreamTlsContext::default()
        };
        listener.filter_chains[0].transport_socket = Some(TransportSocket {
            name: "envoy.transport_sockets.tls".to_owned(),
            config_type: Some(transport_socket::ConfigType::TypedConfig(any(&context))),
        });
        vec![
            Resource::new(Kind::Cluster, "orders", &cluster("orders", &[app.address()])),
            Resource::new(Kind::Listener, name.as_str(), &listener),
        ]
    }

    /// Connects to the port for mTLS as the service `web`, and returns the id and the expiry of the certificate that is shown there.
    async fn dial(&self, mesh: &Mesh) -> Result<(String, SystemTime), String> {
        let id = mesh.issuer.trust_domain().id(Identity::Service("web".parse().unwrap()));
        let (chain, key) = issue(&mesh.issuer, Subject::from(id), &Lifetimes::default());
        let config = any_server_config(&chain, &key);
        let tcp = TcpStream::connect(self.place.at(15008)).await.map_err(|error| error.to_string())?;
        let tls = TlsConnector::from(Arc::new(config)).connect(any_server_name(), tcp).await;
        let tls = tls.map_err(|error| error.to_string())?;
        let shown = CertificateChain::from_der(tls.get_ref().1.peer_certificates().unwrap()).unwrap();
        let id = verify(&shown, &mesh.issuer.bundle().unwrap(), SystemTime::now()).unwrap();
        Ok((id.to_string(), shown.leaf().unwrap().not_after))
    }
}

/// Returns the settings of a client that shows a certificate, and looks at that of the server afterwards.
fn any_server_config(chain: &CertificateChain, key: &Key) -> rustls::ClientConfig {
    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
    use rustls::{DigitallySignedStruct, Error, SignatureScheme};

    #[derive(Debug)]
    struct AnyServer;

    impl ServerCertVerifier for AnyServer {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            vec![SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::ECDSA_NISTP384_SHA384]
        }
    }

    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.to_der().to_vec()));
    rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer))
        .with_client_auth_cert(chain.certificates().to_vec(), key)
        .unwrap()
}

fn is_valid(status: &Value) -> bool {
    status["identity"]["stage"] == "valid" && !status["identity"]["services"]["orders"].is_null()
}

/// Reports whether a node's report says that its Envoy accepts mTLS connections.
fn says_ready(node: &Node) -> bool {
    let metadata = node.metadata.as_ref().unwrap();
    let Some(ValueKind::StructValue(vmesh)) = &metadata.fields["vmesh"].kind else { panic!() };
    vmesh.fields.get("mtls_ready").is_some_and(|ready| ready.kind == Some(ValueKind::BoolValue(true)))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_joins_and_its_envoy_is_called_by_mtls_also_after_a_restart_without_a_control_plane() {
    let mut node = MeshNode::new();
    let mut mesh = Mesh::start(node.control_plane(), Duration::from_secs(3600)).await;
    let app = HttpApp::start("one", "v1", node.place.at(8080)).unwrap();
    mesh.publish(node.resources(&app));
    let token = mesh.token("web-1", &["orders"]);
    std::fs::write(node.token_file(), &token).unwrap();
    node.start();
    node.status("a valid identity", is_valid).await;
    let status = node.status("readiness", |status| status["identity"]["mtls_ready"] == true).await;
    assert_eq!(status["identity"]["node"]["id"], "spiffe://mesh.example/node/web-1");
    assert_eq!(status["identity"]["services"]["orders"]["id"], "spiffe://mesh.example/service/orders");
    let in_use = node.control_plane().to_string();
    node.status("a stream", |status| status["control_plane"]["in_use"] == *in_use).await;
    let expected = "spiffe://mesh.example/service/orders";
    assert_eq!(node.dial(&mesh).await.unwrap().0, expected);

    // The control plane knows the node by its certificate, and hears that its Envoy is ready on a second stream.
    wait_for("a report of readiness", SOON, async || {
        mesh.seen(|state| match state.nodes.last() {
            Some((_, node)) if says_ready(node) => Ok(()),
            _ => Err(format!("{} streams", state.nodes.len())),
        })
    })
    .await
    .unwrap();
    mesh.seen(|state| {
        assert!(!says_ready(&state.nodes[0].1));
        assert!(state.nodes.iter().all(|(id, _)| id.as_deref() == Some("spiffe://mesh.example/node/web-1")));
        assert_eq!(state.joins, 1);
    });

    // The agent has deleted the token, and keys are in one private file alone.
    assert!(!node.token_file().exists());
    let state = node.place.dir.join("state");
    let identity = std::fs::metadata(state.join("identity/identity.json")).unwrap();
    assert_eq!(identity.mode() & 0o777, 0o600);
    assert!(!state.join("identity/joining.key").exists());
    let saved = node.status("a saved configuration", |status| status["accepted"]["saved"].is_u64()).await;
    assert!(
        !saved.to_string().contains("PRIVATE KEY")
            && !saved["accepted"]["resources"].to_string().contains("secret")
    );
    let accepted = std::fs::read(state.join("accepted.bin")).unwrap();
    assert!(!String::from_utf8_lossy(&accepted).contains("PRIVATE KEY"));
    let output = node.daemon.as_ref().unwrap().output();
    assert!(!output.contains(&token) && !output.contains("PRIVATE KEY"), "{output}");
    let metrics = node.daemon.as_mut().unwrap().wait_http(&node.api, "/metrics", SOON).await.unwrap();
    assert!(metrics.contains("vmesh_agent_mtls_ready 1.0\n"), "{metrics}");
    assert!(
        metrics.contains(r#"vmesh_agent_certificate_expires_seconds{id="spiffe://mesh.example/node/web-1"}"#)
    );

    // A restart without any control plane.
    mesh.stop().await;
    assert!(node.daemon.take().unwrap().terminate(SOON).await.unwrap().success());
    node.start();
    node.status("the identity from the disk", |status| is_valid(status) && status["ready"] == true).await;
    assert_eq!(node.dial(&mesh).await.unwrap().0, expected);

    // The first stream to a control plane that is back says that the node is ready.
    let before = mesh.seen(|state| state.nodes.len());
    mesh.listen().await;
    wait_for("a stream", SOON, async || {
        mesh.seen(|state| state.nodes.get(before).map(|(_, node)| says_ready(node)).ok_or("none"))
    })
    .await
    .map(|is_ready| assert!(is_ready))
    .unwrap();
    assert!(mesh.seen(|state| state.joins == 1 && state.renewals == 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn short_certificates_are_renewed_and_a_new_root_is_used_and_reported() {
    let mut node = MeshNode::new();
    let mesh = Mesh::start(node.control_plane(), Duration::from_secs(12)).await;
    let app = HttpApp::start("one", "v1", node.place.at(8080)).unwrap();
    mesh.publish(node.resources(&app));
    std::fs::write(node.token_file(), mesh.token("web-1", &["orders"])).unwrap();
    node.start();
    node.status("readiness", |status| status["identity"]["mtls_ready"] == true).await;
    let first = node.dial(&mesh).await.unwrap().1;
    let other = Root::generate(mesh.issuer.trust_domain(), SystemTime::now(), &Lifetimes::default()).unwrap();
    mesh.state.lock().unwrap().more_roots.push(other);
    let version = mesh.seen(|state| bundle(&mesh.issuer, state).version());
    // Envoy takes the renewed certificate and the new bundle, and the control plane is told so, without a restart of anything.
    wait_for("renewed certificates", SOON, async || {
        let (id, not_after) = node.dial(&mesh).await?;
        assert_eq!(id, "spiffe://mesh.example/service/orders");
        match mesh.seen(|state| (state.renewals, state.bundles_in_use.contains(&version))) {
            (2.., true) if not_after > first => Ok(()),
            seen => Err(format!("{seen:?}")),
        }
    })
    .await
    .unwrap();
    let status = node.status("two roots", |status| status["identity"]["roots"] == 2).await;
    assert_eq!(status["identity"]["bundle"], *version);
    assert_eq!(status["identity"]["clock_skew"], 0);
    assert_eq!(mesh.seen(|state| state.joins), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_shown_and_an_identity_that_the_command_writes_is_found() {
    let mut node = MeshNode::new();
    let mesh = Mesh::start(node.control_plane(), Duration::from_secs(3600)).await;
    mesh.publish(Vec::new());
    std::fs::write(node.token_file(), mesh.token("web-2", &["orders"])).unwrap();
    node.start();
    let is_refused =
        |status: &Value| status["identity"]["problem"].as_str().is_some_and(|text| text.contains("refuses"));
    let status = node.status("a refusal", is_refused).await;
    let problem = status["identity"]["problem"].as_str().unwrap();
    assert!(problem.contains("the token is not for this node"), "{problem}");
    assert!(node.token_file().exists(), "the token of another node is not used up");
    assert!(status["control_plane"]["reason"].as_str().unwrap().contains("no identity yet"));

    let path = node.place.dir.join("agent.yaml");
    let run = |token: String| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmesh-agent"));
        command
            .env("VMESH_AGENT_CONFIG", &path)
            .args(["join", "--stdin"])
            .stdin(std::process::Stdio::piped());
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), token.as_bytes()).unwrap();
        tokio::task::spawn_blocking(move || child.wait_with_output().unwrap())
    };
    let output = run("vmj1.nonsense".to_owned()).await.unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("standard input holds no join token") && !text.contains("nonsense"), "{text}");
    let output = run(mesh.token("web-1", &["orders"])).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(text, "this node is spiffe://mesh.example/node/web-1 now\n", "{output:?}");
    node.status("the identity that the command has written", is_valid).await;
    let output = run(mesh.token("web-1", &["orders"])).await.unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("already; no token was used"), "{output:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_identity_stays_until_a_new_token_gives_another() {
    let mut node = MeshNode::new();
    let mut mesh = Mesh::start(node.control_plane(), Duration::from_secs(4)).await;
    mesh.state.lock().unwrap().clock_skew = 100;
    let app = HttpApp::start("one", "v1", node.place.at(8080)).unwrap();
    mesh.publish(node.resources(&app));
    std::fs::write(node.token_file(), mesh.token("web-1", &["orders"])).unwrap();
    node.start();
    let status = node.status("readiness", |status| status["identity"]["mtls_ready"] == true).await;
    let skew = status["identity"]["clock_skew"].as_i64().unwrap();
    assert!((95..=105).contains(&skew), "{skew}");

    mesh.stop().await;
    let status = node.status("the expiry", |status| status["identity"]["stage"] == "expired").await;
    assert_eq!(status["identity"]["percent_left"], 0);
    let needs_token = |status: &Value| {
        status["identity"]["problem"].as_str().is_some_and(|text| text.contains("a new token is needed"))
    };
    node.status("a call for a token", needs_token).await;
    let file = node.place.dir.join("state/identity/identity.json");
    assert!(file.exists(), "the expired certificate stays");
    let output = node.daemon.as_ref().unwrap().output();
    assert!(output.contains("less than 10 % of their validity is left"), "{output}");
    assert!(output.contains("s ahead of this host's"), "{output}");

    mesh.listen().await;
    mesh.state.lock().unwrap().lifetimes.leaf = Duration::from_secs(3600);
    std::fs::write(node.token_file(), mesh.token("web-1", &["orders"])).unwrap();
    node.status("another identity", is_valid).await;
    let in_use = node.control_plane().to_string();
    node.status("a stream", |status| status["control_plane"]["in_use"] == *in_use).await;
    assert_eq!(mesh.seen(|state| state.joins), 2);
    assert_eq!(node.dial(&mesh).await.unwrap().0, "spiffe://mesh.example/service/orders");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_user_gets_no_secret() {
    let mut node = MeshNode::new();
    let mesh = Mesh::start(node.control_plane(), Duration::from_secs(3600)).await;
    mesh.publish(Vec::new());
    std::fs::write(node.token_file(), mesh.token("web-1", &["orders"])).unwrap();
    node.start();
    node.status("a valid identity", is_valid).await;
    // The modes of the socket and its directory keep other users out. Secrets do not depend on them.
    let socket = node.place.run_dir().join("xds.sock");
    for (path, mode) in
        [(node.place.dir.to_path_buf(), 0o755), (node.place.run_dir(), 0o755), (socket.clone(), 0o666)]
    {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let (own, path) = (std::os::unix::net::UnixStream::connect(&socket).unwrap(), socket.clone());
    let other = std::thread::spawn(move || {
        rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(4242)).unwrap();
        std::os::unix::net::UnixStream::connect(path).unwrap()
    });
    for (connection, expected) in [(own, 3), (other.join().unwrap(), 0)] {
        connection.set_nonblocking(true).unwrap();
        let stream = AdsStream::over(tokio::net::UnixStream::from_std(connection).unwrap());
        assert_eq!(secrets_of(stream.await.unwrap(), expected).await.len(), expected);
    }
    let output = node.daemon.as_ref().unwrap().output();
    assert!(
        output.contains("asks for certificates and gets none") && output.contains("uid=4242"),
        "{output}"
    );
}

/// Subscribes to all secrets of the node, and returns the names of those that come before `expected` have come and another question is
/// answered twice.
async fn secrets_of(mut stream: AdsStream, expected: usize) -> BTreeSet<String> {
    let request = |kind: Kind| DeltaDiscoveryRequest {
        node: Some(Node { id: "x".to_owned(), ..Node::default() }),
        type_url: kind.type_url().to_owned(),
        ..DeltaDiscoveryRequest::default()
    };
    let names = ["caller", "workload|orders", "trust_bundle"].map(str::to_owned).to_vec();
    stream
        .send(&DeltaDiscoveryRequest { resource_names_subscribe: names, ..request(Kind::Secret) })
        .await
        .unwrap();
    let (mut secrets, mut answers) = (BTreeSet::new(), 0);
    stream.send(&request(Kind::Cluster)).await.unwrap();
    while answers < 2 || secrets.len() < expected {
        let response = stream.next().await.unwrap();
        if response.type_url == Kind::Secret.type_url() {
            secrets.extend(response.resources.into_iter().map(|resource| resource.name));
            continue;
        }
        answers += 1;
        let again = DeltaDiscoveryRequest {
            response_nonce: response.nonce,
            resource_names_subscribe: vec!["x".to_owned()],
            ..request(Kind::Cluster)
        };
        stream.send(&again).await.unwrap();
    }
    secrets
}
