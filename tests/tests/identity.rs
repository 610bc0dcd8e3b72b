//! Identities: nodes join, renew, are refused and are banned, at a real control plane.

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
use vmesh_testkit::{Failed, Result};
use vmesh_tests::Mesh;

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
        now: 0,
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
    let chain = CertificateChain::from_pem(&answer.services[&"orders".parse().unwrap()]).unwrap();
    let leaf = chain.leaf().unwrap();
    assert_eq!(leaf.id().unwrap().to_string(), "spiffe://mesh.test/service/orders");
    assert_eq!(leaf.dns_names, ["web-1.node.mesh.test"]);
    let (status, answer) = client.post(RENEW_PATH, &ask(&["payments"])).await?;
    assert_eq!(status, 403);
    assert!(error(&answer).contains("may not run `payments`, only `orders`, `web`"), "{answer}");
    // The certificate of a service is not that of a node.
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
    vmesh_testkit::wait_for("the token to expire", vmesh_tests::BOUND, async || {
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
    let audit = vmesh_testkit::wait_for("the audit log", vmesh_tests::BOUND, async || {
        let audit =
            std::fs::read_to_string(mesh.path("state/control/audit.jsonl")).map_err(|e| e.to_string())?;
        if audit.contains("10.9.0.0/16") { Ok(audit) } else { Err(audit) }
    })
    .await?;
    for reason in ["was redeemed before", "with a wrong secret", "has expired", "not from", "\"denied\""] {
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
