//! Identities: nodes join, renew, are refused and are banned, at a real control plane.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on ends")]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::Serialize;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use vmesh_api::identity::{JOIN_PATH, JoinAnswer, JoinRequest, RENEW_PATH, RenewAnswer, RenewRequest};
use vmesh_identity::tls::{ServerTrust, any_server_name, client_config};
use vmesh_identity::{CertificateChain, JoinToken, Key, TrustBundle};
use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_proto::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use vmesh_proto::google::protobuf::value::Kind;
use vmesh_proto::google::protobuf::{Struct, Value as ProtoValue};
use vmesh_testkit::api::Api;
use vmesh_testkit::app::HttpApp;
use vmesh_testkit::load::{Load, Plan};
use vmesh_testkit::place::Loopback;
use vmesh_testkit::{Failed, Result, wait_for};
use vmesh_tests::{BOUND, Mesh};
use vmesh_xds::client::AdsStream;

const SERVICES: (&str, &str) =
    ("services.d/orders.yaml", "service: orders\nprotocol: http\nendpoints: [\"127.0.0.1:9\"]\n");

/// A client of the mTLS port, with the keys of a node or without.
struct Client {
    address: SocketAddr,
    trust: ServerTrust,
    identity: Option<(CertificateChain, Key)>,
}

impl Client {
    /// Makes a client that trusts the root that `token` pins.
    fn joining(mesh: &Mesh, token: &str) -> Client {
        let token: JoinToken = token.trim().parse().unwrap();
        Client { address: mesh.mtls_xds(), trust: ServerTrust::Pin(token.pin), identity: None }
    }

    async fn post(&self, path: &str, body: &impl Serialize) -> Result<(u16, Value)> {
        let identity = self.identity.as_ref().map(|(chain, key)| (chain, key));
        let config = client_config(identity, self.trust.clone()).map_err(Failed::to("no TLS settings"))?;
        let io = TcpStream::connect(self.address).await.map_err(Failed::to("no connection"))?;
        let io = TlsConnector::from(Arc::new(config)).connect(any_server_name(), io).await;
        let io = io.map_err(Failed::to("no TLS handshake"))?;
        let (mut requests, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(io))
                .await
                .map_err(Failed::to("no HTTP/2"))?;
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(connection);
        let body = Full::new(Bytes::from(serde_json::to_vec(body).map_err(Failed::to("no JSON"))?));
        let request = http::Request::post(format!("https://control{path}")).body(body);
        let request = request.map_err(Failed::to("no request"))?;
        let answer = requests.send_request(request).await.map_err(Failed::to("no answer"))?;
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.map_err(Failed::to("no body"))?.to_bytes();
        Ok((status, serde_json::from_slice(&body).unwrap_or(Value::Null)))
    }
}

fn join_request(token: &str, node: &str, key: &Key) -> JoinRequest {
    JoinRequest {
        token: token.trim().to_owned(),
        node: node.parse().unwrap(),
        services: BTreeSet::new(),
        request: key.request().unwrap(),
    }
}

fn token(mesh: &Mesh, node: &str, services: &[&str]) -> Result<String> {
    let mut args = vec!["token", "create", "--node", node, "--ttl", "10m"];
    services.iter().for_each(|service| args.extend(["--service", service]));
    mesh.admin(&args)
}

/// Joins as `node`, and returns a client with its certificate.
async fn joined(mesh: &Mesh, node: &str, services: &[&str]) -> Result<Client> {
    let (token, key) = (token(mesh, node, services)?, Key::generate().unwrap());
    let (status, answer) =
        Client::joining(mesh, &token).post(JOIN_PATH, &join_request(&token, node, &key)).await?;
    assert_eq!(status, 200, "{answer}");
    let answer: JoinAnswer = serde_json::from_value(answer).unwrap();
    let domain = answer.trust_domain.parse().unwrap();
    let trust = ServerTrust::Bundle(TrustBundle::from_pem(domain, &answer.bundle).unwrap());
    let chain = CertificateChain::from_pem(&answer.node_chain).unwrap();
    Ok(Client { address: mesh.mtls_xds(), trust, identity: Some((chain, key)) })
}

fn error(answer: &Value) -> &str {
    answer["error"].as_str().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_served_at_the_mtls_port_before_there_is_an_authority() -> Result<()> {
    let mut mesh = Mesh::prepare(&[SERVICES])?;
    let config = std::fs::read_to_string(mesh.path("control.yaml")).unwrap();
    let mtls = mesh.mtls_xds();
    mesh.write("control.yaml", &config.replace("listen: {", &format!("listen: {{xds: \"{mtls}\", ")))?;
    mesh.start_control().await?;
    let failed = token(&mesh, "web-1", &[]).unwrap_err().to_string();
    assert!(failed.contains("run `vmeshctl ca init`"), "{failed}");
    assert!(mesh.problem("serves nobody").await?.contains("run `vmeshctl ca init`"));
    let client = Client { address: mtls, trust: ServerTrust::Pin([0; 32]), identity: None };
    assert!(client.post(RENEW_PATH, &RenewRequest::default()).await.is_err());

    let shown = mesh.admin(&["ca", "init"])?;
    assert!(shown.contains("trust bundle"), "{shown}");
    let second = mesh.admin(&["ca", "init"]).unwrap_err().to_string();
    assert!(second.contains("has a certificate authority already"), "{second}");
    // What the contract promises: the token alone, on standard output.
    let token = token(&mesh, "web-1", &["orders"])?;
    assert!(token.starts_with("vmj1.") && token.lines().count() == 1, "{token}");
    assert!(mesh.problems().await?.iter().all(|problem| !problem.contains("listen.xds")));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_joins_once_and_gets_the_certificates_that_its_token_grants() -> Result<()> {
    let mesh = Mesh::secure(&[SERVICES], "48h").await?;
    let client = joined(&mesh, "web-1", &["orders", "web"]).await?;
    let ask = |services: &[&str]| RenewRequest {
        services: services
            .iter()
            .map(|service| (service.parse().unwrap(), Key::generate().unwrap().request().unwrap()))
            .collect(),
        ..RenewRequest::default()
    };
    let (status, answer) = client.post(RENEW_PATH, &ask(&["orders"])).await?;
    assert_eq!(status, 200, "{answer}");
    let answer: RenewAnswer = serde_json::from_value(answer).unwrap();
    let chain = CertificateChain::from_pem(&answer.services["orders"]).unwrap();
    let leaf = chain.leaf().unwrap();
    assert_eq!(leaf.id().unwrap().to_string(), "spiffe://mesh.test/service/orders");
    assert_eq!(leaf.dns_names, ["web-1.node.mesh.test"]);
    let (status, answer) = client.post(RENEW_PATH, &ask(&["payments"])).await?;
    assert_eq!(status, 403);
    assert!(error(&answer).contains("may not run `payments`, only `orders`, `web`"), "{answer}");
    // A service's certificate proves no node.
    let impostor =
        Client { identity: Some((chain, Key::generate().unwrap())), ..joined(&mesh, "web-2", &[]).await? };
    assert!(impostor.post(RENEW_PATH, &ask(&["orders"])).await.is_err());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_refused_when_it_is_used_again_guessed_or_not_for_the_node_and_the_operator_learns_why()
-> Result<()> {
    let mesh = Mesh::secure(&[SERVICES], "48h").await?;
    let key = Key::generate().unwrap();
    let good = token(&mesh, "web-1", &["orders"])?;
    let client = Client::joining(&mesh, &good);
    let try_join = async |token: &str, node: &str, services: &[&str]| -> Result<(u16, String)> {
        let mut request = join_request(token, node, &key);
        request.services = services.iter().map(|service| service.parse().unwrap()).collect();
        let (status, answer) = client.post(JOIN_PATH, &request).await?;
        Ok((status, error(&answer).to_owned()))
    };
    assert_eq!(try_join(&good, "web-2", &[]).await?.0, 403);
    assert_eq!(try_join(&good, "web-1", &["payments"]).await?.0, 403);
    let secret = good.split('.').nth(2).unwrap();
    let flipped: String = secret.chars().map(|c| if c == 'A' { 'B' } else { 'A' }).collect();
    let (status, guessed) = try_join(&good.replace(secret, &flipped), "web-1", &[]).await?;
    assert_eq!(status, 403);
    assert_eq!(try_join("nonsense", "web-1", &[]).await?.0, 403);
    assert_eq!(try_join(&good, "web-1", &["orders"]).await?.0, 200);
    let (status, reused) = try_join(&good, "web-1", &["orders"]).await?;
    assert_eq!((status, &reused), (403, &guessed), "the answer tells reuse from guessing");
    let expired = mesh.admin(&["token", "create", "--node", "web-1", "--ttl", "1s"])?;
    wait_for("the token to expire", BOUND, async || {
        match mesh.admin(&["token", "list"]).map_err(|failed| failed.to_string())? {
            list if list.contains("expired") => Ok(()),
            list => Err(list),
        }
    })
    .await?;
    assert_eq!(try_join(&expired, "web-1", &[]).await?.0, 403);
    let elsewhere = mesh.admin(&["token", "create", "--node", "web-1", "--from", "10.9.0.0/16"])?;
    assert_eq!(try_join(&elsewhere, "web-1", &[]).await?.0, 403);

    let status: Value = mesh.get("/api/v1/identity").await?;
    assert_eq!((&status["counts"]["joined"], &status["counts"]["join_refused"]), (&1.into(), &7.into()));
    assert_eq!(mesh.metric("vmesh_identity_join_refusals_total").await?, 7.0);
    let audit = wait_for("the audit log", BOUND, async || {
        let audit =
            std::fs::read_to_string(mesh.path("state/control/audit.jsonl")).map_err(|e| e.to_string())?;
        if audit.contains("10.9.0.0/16") { Ok(audit) } else { Err(audit) }
    })
    .await?;
    for reason in
        ["was redeemed before", "with a wrong secret", "has expired", "is for nodes in", "\"denied\""]
    {
        assert!(audit.contains(reason), "no `{reason}` in {audit}");
    }
    assert!(!audit.contains(secret), "the audit log has the secret of a token");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_is_replaced_step_by_step_and_a_node_that_is_not_ready_is_named() -> Result<()> {
    let mesh = Mesh::secure(&[SERVICES], "48h").await?;
    let shown = mesh.admin(&["ca", "rotate", "--status"])?;
    assert!(shown.contains("no rotation is under way"), "{shown}");
    let before = mesh.admin(&["ca", "bundle"])?;
    assert!(mesh.admin(&["ca", "rotate"])?.contains("prepared"));
    assert_eq!(mesh.admin(&["ca", "bundle"])?, before, "nobody trusts the new root yet");
    assert!(mesh.admin(&["ca", "rotate"])?.contains("distributing"));
    assert_eq!(mesh.admin(&["ca", "bundle"])?.matches("BEGIN CERTIFICATE").count(), 2);
    assert!(mesh.admin(&["ca", "rotate", "--back"])?.contains("no rotation is under way"));
    assert_eq!(mesh.admin(&["ca", "bundle"])?, before);
    for stage in ["prepared", "distributing", "active", "no rotation is under way"] {
        let shown = mesh.admin(&["ca", "rotate"])?;
        assert!(shown.contains(stage), "{shown}");
    }
    let after = mesh.admin(&["ca", "bundle"])?;
    assert_eq!(after.matches("BEGIN CERTIFICATE").count(), 1);
    assert_ne!(after, before);
    assert!(mesh.admin(&["ca", "rotate", "--intermediate"])?.contains("no rotation is under way"));
    assert_eq!(mesh.admin(&["ca", "bundle"])?, after, "the root stays");
    Ok(())
}

/// A mesh in which `web-1` calls `orders`, which runs on `orders-1` and `orders-2`.
struct Callers {
    mesh: Mesh,
    target: SocketAddr,
    apps: Vec<HttpApp>,
    _place: Loopback,
}

impl Callers {
    async fn start(leaf_lifetime: &str) -> Result<Callers> {
        let place = Loopback::unique()?;
        let mut mesh = Mesh::secure(&[], leaf_lifetime).await?;
        let (mut apps, mut endpoints) = (Vec::new(), Vec::new());
        for node in ["orders-1", "orders-2"] {
            let workloads = "workloads: [{service: orders, port: 8080, protocol: http, host: \"{ip}\"}]\n";
            mesh.secure_agent(node, &["orders"], &[], workloads).await?;
            let address = SocketAddr::new(mesh.agent_api(node)?.ip(), 8080);
            apps.push(HttpApp::start(node, "v1", address)?);
            endpoints.push(format!("\"{address}\""));
        }
        let services = format!("service: orders\nprotocol: http\nendpoints: [{}]\n", endpoints.join(", "));
        mesh.write("services.d/orders.yaml", &services)?;
        mesh.secure_agent("web-1", &["web"], &["orders"], "").await?;
        for node in ["orders-1", "orders-2", "web-1"] {
            mesh.synced(node).await?;
        }
        let target = mesh.upstream("web-1", 0)?;
        mesh.answers(target).await?;
        Ok(Callers { mesh, target, apps, _place: place })
    }

    fn mode(&self, mode: &str) -> Result<()> {
        self.mesh
            .write("mesh.d/orders.yaml", &format!("kind: Service\nname: orders\nmtls: {{mode: {mode}}}\n"))
    }

    /// Returns the SPIFFE id that an instance of `orders` sees in one request, or an empty text for a plaintext call.
    async fn caller(&self) -> Result<(String, String)> {
        let answer = Api(self.target).json("/").await?;
        let text = |pointer: &str| answer.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let shown = text("/headers/x-forwarded-client-cert");
        let id = shown.split("URI=").nth(1).unwrap_or_default().to_owned();
        Ok((text("/app").to_owned(), id))
    }

    /// Waits until every call of ten in a row reaches `orders` with the SPIFFE id `id`, and both instances are called.
    async fn until_called_by(&self, id: &str) -> Result<()> {
        wait_for(format!("calls by `{id}`"), BOUND, async || {
            let mut instances = BTreeSet::new();
            for _ in 0..10 {
                let (instance, seen) = fail(self.caller().await)?;
                if seen != id {
                    return Err(format!("{instance} is called by `{seen}`"));
                }
                instances.insert(instance);
            }
            if instances.len() == self.apps.len() {
                Ok(())
            } else {
                Err(format!("only {instances:?} are called"))
            }
        })
        .await
    }
}

const WEB: &str = "spiffe://mesh.test/service/web";

#[tokio::test(flavor = "multi_thread")]
async fn a_service_goes_from_off_to_strict_and_back_under_load_and_fails_no_request() -> Result<()> {
    let callers = Callers::start("48h").await?;
    callers.until_called_by("").await?;
    let load = Load::start(Plan::to(callers.target).rate(200.0))?;
    while load.so_far().ok < 1000 {
        for (mode, id) in [
            ("permissive", WEB),
            ("strict", WEB),
            ("permissive", WEB),
            ("off", ""),
            ("strict", WEB),
            ("off", ""),
        ] {
            callers.mode(mode)?;
            callers.until_called_by(id).await?;
            let expected = match mode {
                "off" => "its mode is off".to_owned(),
                on => format!("its mode is {on}, and node `orders-1` is ready for it"),
            };
            wait_for(format!("explain to say `{expected}`"), BOUND, async || {
                let explained = fail(callers.mesh.admin(&["explain", "orders", "--from", "web-1"]))?;
                // Without any document that turns mTLS on, there is nothing to say of it.
                let is_said =
                    explained.contains(&expected) || (mode == "off" && !explained.contains("TLS\n"));
                if is_said { Ok(()) } else { Err(explained) }
            })
            .await?;
        }
    }
    let report = load.stop().await;
    assert_eq!(report.failures, 0, "{:?}", report.failed.first());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_thirty_seconds_are_renewed_and_the_root_is_replaced_under_load() -> Result<()> {
    let callers = Callers::start("30s").await?;
    callers.mode("strict")?;
    callers.until_called_by(WEB).await?;
    let load = Load::start(Plan::to(callers.target).rate(100.0))?;
    let before = callers.mesh.admin(&["ca", "bundle"])?;
    for stage in ["prepared", "distributing", "active", "no rotation is under way"] {
        let shown = wait_for(format!("the rotation to be {stage}"), 2 * BOUND, async || {
            fail(callers.mesh.admin(&["ca", "rotate"]))
        })
        .await?;
        assert!(shown.contains(stage), "{shown}");
    }
    assert_ne!(callers.mesh.admin(&["ca", "bundle"])?, before);
    let renewals = wait_for("two renewals of each node", 2 * BOUND, async || {
        let status = fail(callers.mesh.get("/api/v1/identity").await)?;
        match status["counts"]["renewed"].as_u64() {
            Some(renewed) if renewed >= 12 => Ok(renewed),
            renewed => Err(format!("{renewed:?} renewals")),
        }
    })
    .await?;
    callers.until_called_by(WEB).await?;
    let report = load.stop().await;
    assert_eq!(report.failures, 0, "after {renewals} renewals: {:?}", report.failed.first());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn access_is_audited_and_then_enforced_by_the_callers_identity() -> Result<()> {
    let callers = Callers::start("48h").await?;
    let mtls = "kind: Service\nname: orders\nmtls: {mode: strict}\n---\n";
    let access = |mode: &str, rules: &str| {
        let access =
            format!("kind: Access\nservice: orders\nmode: {mode}\ndefault: deny\nrules: [{rules}]\n");
        callers.mesh.write("mesh.d/orders.yaml", &format!("{mtls}{access}"))
    };
    let until_status = async |path: &str, expected: u16| {
        wait_for(format!("{path} to be answered with {expected}"), BOUND, async || {
            for _ in 0..6 {
                match fail(Api(callers.target).status(path).await)? {
                    status if status == expected => {}
                    status => return Err(format!("{path}: {status}")),
                }
            }
            Ok(())
        })
        .await
    };
    let to_x = "{from: {services: [web]}, to: {paths: [{prefix: /x}], methods: [GET]}, action: allow}";
    access("audit", to_x)?;
    callers.until_called_by(WEB).await?;
    until_status("/y", 200).await?;
    access("enforce", to_x)?;
    until_status("/y", 403).await?;
    until_status("/x", 200).await?;
    until_status("/x/1", 200).await?;
    until_status("/xy", 403).await?;
    for trick in ["//y", "/x/../y", "/x/%2e%2e/y", "/%78y"] {
        let status = Api(callers.target).status(trick).await?;
        assert!(status == 403 || status == 400, "{trick} was answered with {status}");
    }
    access("enforce", "{from: {services: [payments]}, action: allow}")?;
    until_status("/x", 403).await?;
    access("enforce", "{from: {services: [web]}, action: allow}")?;
    until_status("/y", 200).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn traffic_and_reboots_go_on_without_a_control_plane_for_longer_than_a_third_of_a_lifetime()
-> Result<()> {
    let mut callers = Callers::start("60s").await?;
    callers.mode("strict")?;
    callers.until_called_by(WEB).await?;
    for (node, part) in [("orders-2", "mtls|"), ("web-1", "||mtls")] {
        let file = callers.mesh.path(&format!("state/{node}/accepted.bin"));
        wait_for("the configuration to be on the disk", BOUND, async || {
            let saved = std::fs::read(&file).map_err(|error| error.to_string())?;
            let is_saved = saved.windows(part.len()).any(|window| window == part.as_bytes());
            if is_saved { Ok(()) } else { Err(format!("{part} is not in {}", file.display())) }
        })
        .await?;
    }
    callers.mesh.control()?.kill()?;
    let stopped = std::time::Instant::now();
    let load = Load::start(Plan::to(callers.target).rate(100.0))?;
    callers.mesh.agent_daemon("orders-2")?.kill()?;
    callers.mesh.restart_agent("orders-2")?;
    wait_for("the outage to last for longer than a third of a lifetime", BOUND, async || {
        if stopped.elapsed().as_secs() > 22 { Ok(()) } else { Err(format!("{:?}", stopped.elapsed())) }
    })
    .await?;
    let report = load.stop().await;
    assert_eq!(report.failures, 0, "{:?}", report.failed.first());
    // The host of the caller reboots: its agent and its Envoy start from what is on the disk.
    callers.mesh.agent_daemon("web-1")?.terminate(BOUND).await?;
    callers.mesh.restart_agent("web-1")?;
    callers.until_called_by(WEB).await?;
    callers.mesh.start_control().await?;
    callers.mesh.synced("web-1").await?;
    callers.until_called_by(WEB).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_banned_node_loses_its_stream_and_a_forged_name_is_denied() -> Result<()> {
    let callers = Callers::start("48h").await?;
    let state = async |node: &str| {
        let nodes = fail(callers.mesh.get("/api/v1/nodes").await)?;
        let found =
            nodes["nodes"].as_array().and_then(|nodes| nodes.iter().find(|known| known["name"] == node));
        Ok::<_, String>(found.map(|found| found["state"].as_str().unwrap_or_default().to_owned()))
    };
    callers.mesh.admin(&["node", "ban", "orders-1"])?;
    wait_for("the banned node to be offline", BOUND, async || match state("orders-1").await? {
        Some(state) if state == "offline" => Ok(()),
        state => Err(format!("{state:?}")),
    })
    .await?;
    callers.mesh.admin(&["node", "unban", "orders-1"])?;
    callers.mesh.synced("orders-1").await?;
    // A plaintext client may not take the name of a node that has joined.
    let node = vmesh_proto::envoy::config::core::v3::Node { id: "orders-1".to_owned(), ..Default::default() };
    let mut stream = vmesh_xds::client::AdsStream::connect(&format!("http://{}", callers.mesh.xds())).await;
    let stream = stream.as_mut().map_err(|error| Failed::new(error.to_string()))?;
    let request = vmesh_proto::envoy::service::discovery::v3::DeltaDiscoveryRequest {
        node: Some(node),
        type_url: "type.googleapis.com/envoy.config.cluster.v3.Cluster".to_owned(),
        ..Default::default()
    };
    stream.send(&request).await.map_err(|failure| Failed::new(failure.to_string()))?;
    let denied = loop {
        match stream.next_bytes().await {
            Ok(_) => {}
            Err(failure) => break failure.to_string(),
        }
    };
    assert!(denied.contains("`orders-1` has joined"), "{denied}");
    let counts = callers.mesh.get("/api/v1/identity").await?;
    assert!(counts["counts"]["admissions_denied"].as_u64().unwrap_or_default() > 0, "{counts}");
    Ok(())
}

fn fail<T>(result: Result<T>) -> std::result::Result<T, String> {
    result.map_err(|failed| failed.to_string())
}

/// Opens an xDS stream as `node`, which says that it is at `address`, and returns the reason why it ends, if that is soon.
async fn report_as(client: &Client, node: &str, address: &str) -> Result<(AdsStream, Option<String>)> {
    let identity = client.identity.as_ref().map(|(chain, key)| (chain, key));
    let config = client_config(identity, client.trust.clone()).map_err(Failed::to("no TLS settings"))?;
    let io = TcpStream::connect(client.address).await.map_err(Failed::to("no connection"))?;
    let io = TlsConnector::from(Arc::new(config)).connect(any_server_name(), io).await;
    let mut stream =
        AdsStream::over(io.map_err(Failed::to("no TLS"))?).await.map_err(Failed::to("no HTTP/2"))?;
    let text = |text: &str| ProtoValue { kind: Some(Kind::StringValue(text.to_owned())) };
    let vmesh = Struct { fields: [("address".to_owned(), text(address))].into() };
    let vmesh = ProtoValue { kind: Some(Kind::StructValue(vmesh)) };
    let node = Node {
        id: node.to_owned(),
        metadata: Some(Struct { fields: [("vmesh".to_owned(), vmesh)].into() }),
        ..Node::default()
    };
    let request = DeltaDiscoveryRequest {
        node: Some(node),
        type_url: "type.googleapis.com/envoy.config.cluster.v3.Cluster".to_owned(),
        ..DeltaDiscoveryRequest::default()
    };
    stream.send(&request).await.map_err(|failure| Failed::new(failure.to_string()))?;
    let ended = stream.next_bytes().await.err().map(|failure| failure.to_string());
    Ok((stream, ended))
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_hosts_with_one_identity_the_newer_waits_and_a_node_cannot_be_another() -> Result<()> {
    let mesh = Mesh::secure(&[SERVICES], "48h").await?;
    let client = joined(&mesh, "web-1", &["web"]).await?;
    let (first, ended) = report_as(&client, "web-1", "10.0.0.1").await?;
    assert_eq!(ended, None);
    let (_, refused) = report_as(&client, "web-1", "10.0.0.2").await?;
    let refused = refused.unwrap_or_default();
    assert!(refused.contains("10.0.0.1") && refused.contains("10.0.0.2"), "{refused}");
    let (_, forged) = report_as(&client, "web-2", "10.0.0.1").await?;
    assert!(forged.unwrap_or_default().contains("not the node of the certificate"));
    drop(first);
    wait_for("the newer host to be let in", BOUND, async || {
        fail(report_as(&client, "web-1", "10.0.0.2").await)?.1.map_or(Ok(()), Err)
    })
    .await
}

/// The test follows `docs/identity.md`, "From plaintext to identities", step by step.
#[tokio::test(flavor = "multi_thread")]
async fn a_plaintext_fleet_gets_identities_node_by_node_and_goes_back_and_no_request_fails() -> Result<()> {
    let mut mesh = Mesh::start(&[]).await?;
    let (mut apps, mut endpoints) = (Vec::new(), Vec::new());
    for node in ["orders-1", "orders-2"] {
        mesh.agent(node, &[], "workloads: [{service: orders, port: 8080, protocol: http, host: \"{ip}\"}]\n")
            .await?;
        let address = SocketAddr::new(mesh.agent_api(node)?.ip(), 8080);
        apps.push(HttpApp::start(node, "v1", address)?);
        endpoints.push(format!("\"{address}\""));
    }
    let services = format!("service: orders\nprotocol: http\nendpoints: [{}]\n", endpoints.join(", "));
    mesh.write("services.d/orders.yaml", &services)?;
    mesh.agent("web-1", &["orders"], "").await?;
    let target = mesh.upstream("web-1", 0)?;
    mesh.answers(target).await?;
    let (plaintext, mtls) = (format!("\"http://{}\"", mesh.xds()), format!("\"{}\"", mesh.mtls_xds()));
    let load = Load::start(Plan::to(target).rate(100.0))?;

    // Step 1: the control plane serves nodes with mTLS, beside plaintext.
    let config = std::fs::read_to_string(mesh.path("control.yaml")).map_err(Failed::to("no control.yaml"))?;
    let config = config.replace("listen: {", &format!("listen: {{xds: {mtls}, "));
    mesh.write("control.yaml", &format!("{config}trust_domain: mesh.test\n"))?;
    mesh.control()?.kill()?;
    mesh.start_control().await?;
    mesh.admin(&["ca", "init"])?;
    // Step 2: node by node.
    for (node, service) in [("orders-1", "orders"), ("web-1", "web"), ("orders-2", "orders")] {
        mesh.write(&format!("agents/{node}.token"), &token(&mesh, node, &[service])?)?;
        let join = format!("control_plane: [{mtls}]\njoin: {{token_file: agents/{node}.token}}\n");
        mesh.edit_agent(node, &format!("control_plane: [{plaintext}]\n"), &join)?;
        mesh.agent_daemon(node)?.kill()?;
        mesh.restart_agent(node)?;
        mesh.synced(node).await?;
        wait_for(format!("{node} to have joined"), BOUND, async || {
            match fail(Api(fail(mesh.agent_api(node))?).json("/status").await)?
                .pointer("/identity/mtls_ready")
            {
                Some(Value::Bool(ready)) if *ready || node == "web-1" => Ok(()),
                ready => Err(format!("{ready:?}")),
            }
        })
        .await?;
    }
    // Step 3: service by service.
    let callers = Callers { mesh, target, apps, _place: Loopback::unique()? };
    for (mode, id) in [("permissive", WEB), ("strict", WEB), ("off", "")] {
        callers.mode(mode)?;
        callers.until_called_by(id).await?;
    }
    // One node goes back.
    let Callers { mut mesh, .. } = callers;
    let join = format!("control_plane: [{mtls}]\njoin: {{token_file: agents/orders-1.token}}\n");
    mesh.edit_agent("orders-1", &join, &format!("control_plane: [{plaintext}]\n"))?;
    mesh.agent_daemon("orders-1")?.kill()?;
    wait_for("the node to be forgotten", BOUND, async || {
        mesh.admin(&["forget", "orders-1"]).map_err(|failed| failed.to_string())
    })
    .await?;
    mesh.restart_agent("orders-1")?;
    mesh.synced("orders-1").await?;
    let report = load.stop().await;
    assert_eq!(report.failures, 0, "{:?}", report.failed.first());
    Ok(())
}

/// Asks for a page over TLS with Python's own TLS. Prints the URIs of the server's certificate, and the answer.
const PYTHON: &str = r#"
import socket, ssl, sys
address, name, bundle, certificate = sys.argv[1:5]
context = ssl.create_default_context(cafile=bundle)
context.check_hostname = False
if certificate:
    context.load_cert_chain(certificate)
host, port = address.rsplit(":", 1)
with context.wrap_socket(socket.create_connection((host, int(port)), 10), server_hostname=name) as tls:
    print([value for kind, value in tls.getpeercert()["subjectAltName"] if kind == "URI"])
    tls.sendall(b"GET / HTTP/1.1\r\nHost: orders\r\nConnection: close\r\n\r\n")
    answer = b""
    while chunk := tls.recv(65536):
        answer += chunk
    print(answer.decode())
"#;

#[tokio::test(flavor = "multi_thread")]
async fn other_tls_libraries_verify_the_port_for_mtls_and_get_in_with_a_certificate_only() -> Result<()> {
    let callers = Callers::start("48h").await?;
    callers.mode("strict")?;
    callers.until_called_by(WEB).await?;
    let client = joined(&callers.mesh, "web-9", &["web"]).await?;
    let key = Key::generate().unwrap();
    let services = [("web".parse().unwrap(), key.request().unwrap())].into();
    let (status, answer) =
        client.post(RENEW_PATH, &RenewRequest { services, ..RenewRequest::default() }).await?;
    assert_eq!(status, 200, "{answer}");
    let answer: RenewAnswer = serde_json::from_value(answer).unwrap();
    callers.mesh.write("bundle.pem", &answer.bundle)?;
    callers.mesh.write("web.pem", &format!("{}{}", answer.services["web"], *key.to_pem()))?;
    let address = SocketAddr::new(callers.mesh.agent_api("orders-1")?.ip(), 15008).to_string();
    let ask = |certificate: &str| {
        let mut python = std::process::Command::new("python3");
        python.args(["-c", PYTHON, &address, "orders.mesh", "bundle.pem", certificate]);
        python.current_dir(callers.mesh.path("."));
        python.output().map_err(Failed::to("could not start python3"))
    };
    let output = ask("web.pem")?;
    let shown =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(shown.contains("['spiffe://mesh.test/service/orders']"), "{shown}");
    assert!(shown.contains("200 OK") && shown.contains(WEB), "{shown}");
    let without = ask("")?;
    assert!(!without.status.success() && !String::from_utf8_lossy(&without.stdout).contains("200 OK"));

    let openssl = |args: &[&str]| {
        let mut openssl = std::process::Command::new("openssl");
        openssl.args([
            "s_client",
            "-connect",
            &address,
            "-servername",
            "orders.mesh",
            "-CAfile",
            "bundle.pem",
        ]);
        openssl.args(["-verify_return_error"]).args(args).current_dir(callers.mesh.path("."));
        openssl.stdin(std::process::Stdio::null());
        openssl.output().map_err(Failed::to("could not start openssl; install the package openssl"))
    };
    let verified = openssl(&["-cert", "web.pem", "-key", "web.pem"])?;
    let shown = String::from_utf8_lossy(&verified.stdout);
    assert!(shown.contains("Verify return code: 0 (ok)"), "{shown}");
    // Plaintext gets no answer.
    assert!(Api(address.parse().unwrap()).status("/").await.is_err());
    Ok(())
}
