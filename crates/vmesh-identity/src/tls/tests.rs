use std::collections::BTreeSet;

use super::*;
use crate::authority::{Issuer, Lifetimes, Root};
use crate::grant::{NodeGrant, Subject};
use crate::name::TrustDomain;
use rustls::{ClientConnection, ServerConnection};

struct Mesh {
    root: Root,
    issuer: Issuer,
}

impl Mesh {
    fn new(trust_domain: &str) -> Mesh {
        let trust_domain: TrustDomain = trust_domain.parse().unwrap();
        let root = Root::generate(&trust_domain, SystemTime::now(), &Lifetimes::default()).unwrap();
        let issuer = root.issue_intermediate("mesh1", SystemTime::now(), &Lifetimes::default()).unwrap();
        Mesh { root, issuer }
    }

    fn leaf(&self, identity: Identity) -> (CertificateChain, Key) {
        self.leaf_at(identity, SystemTime::now())
    }

    fn leaf_at(&self, identity: Identity, now: SystemTime) -> (CertificateChain, Key) {
        let key = Key::generate().unwrap();
        let node = match &identity {
            Identity::Node(name) => Some(name.clone()),
            _ => None,
        };
        let grant = node.is_some().then(|| NodeGrant {
            services: BTreeSet::from(["web".parse().unwrap()]),
            ..NodeGrant::default()
        });
        let id = self.issuer.trust_domain().id(identity);
        let subject = Subject { id, node, grant };
        let chain = self.issuer.issue(&key.request().unwrap(), &subject, now, &Lifetimes::default()).unwrap();
        (chain, key)
    }
}

fn control_plane() -> Identity {
    Identity::ControlPlane("mesh1".parse().unwrap())
}

fn node() -> Identity {
    Identity::Node("web-1".parse().unwrap())
}

/// Runs a handshake without a network. Returns the client's certificate as the server sees it.
fn connect(server: ServerConfig, client: ClientConfig) -> Result<Option<Certificate>, rustls::Error> {
    let mut server = ServerConnection::new(Arc::new(server)).unwrap();
    let mut client = ClientConnection::new(Arc::new(client), any_server_name()).unwrap();
    for _ in 0..10 {
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        server.read_tls(&mut bytes.as_slice()).unwrap();
        server.process_new_packets()?;
        let mut bytes = Vec::new();
        server.write_tls(&mut bytes).unwrap();
        client.read_tls(&mut bytes.as_slice()).unwrap();
        client.process_new_packets()?;
    }
    assert!(!server.is_handshaking() && !client.is_handshaking());
    let leaf = server.peer_certificates().and_then(|certificates| certificates.first());
    Ok(leaf.map(|leaf| Certificate::read(leaf).unwrap()))
}

#[test]
fn a_node_and_a_control_plane_know_each_other_after_the_handshake() {
    let mesh = Mesh::new("mesh.example");
    let bundle = mesh.issuer.bundle().unwrap();
    let (chain, key) = mesh.leaf(control_plane());
    let server = server_config(&chain, &key, bundle.clone()).unwrap();
    let (chain, key) = mesh.leaf(node());
    let client = client_config(Some((&chain, &key)), ServerTrust::Bundle(bundle)).unwrap();
    let seen = connect(server, client).unwrap().unwrap();
    assert_eq!(seen.id().unwrap().to_string(), "spiffe://mesh.example/node/web-1");
    assert_eq!(seen.grant.unwrap().services, BTreeSet::from(["web".parse().unwrap()]));
    assert_eq!(seen.dns_names, ["web-1.node.mesh.example"]);
}

#[test]
fn a_node_that_joins_trusts_the_pinned_root_only() {
    let (mesh, other) = (Mesh::new("mesh.example"), Mesh::new("mesh.example"));
    let (chain, key) = mesh.leaf(control_plane());
    let server = || server_config(&chain, &key, mesh.issuer.bundle().unwrap()).unwrap();
    let pin = |mesh: &Mesh| ServerTrust::Pin(mesh.root.key().public_hash());
    assert!(connect(server(), client_config(None, pin(&mesh)).unwrap()).unwrap().is_none());
    let error = connect(server(), client_config(None, pin(&other)).unwrap()).unwrap_err();
    assert_eq!(error, rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer));
}

#[test]
fn neither_end_accepts_a_certificate_that_is_not_what_it_has_to_be() {
    let (mesh, other) = (Mesh::new("mesh.example"), Mesh::new("mesh.example"));
    let foreign = Mesh::new("other.example");
    let bundle = mesh.issuer.bundle().unwrap();
    let (chain, key) = mesh.leaf(control_plane());
    let server = || server_config(&chain, &key, bundle.clone()).unwrap();
    let day = Duration::from_secs(24 * 3600);
    let now = SystemTime::now();
    let clients = [
        ("another root", other.leaf(node())),
        ("another trust domain", foreign.leaf(node())),
        ("expired", mesh.leaf_at(node(), now - 3 * day)),
        ("not yet valid", mesh.leaf_at(node(), now + day)),
    ];
    for (name, (chain, key)) in &clients {
        let client = client_config(Some((chain, key)), ServerTrust::Bundle(bundle.clone())).unwrap();
        assert!(connect(server(), client).is_err(), "a client with {name} was accepted");
    }
    let authority = CertificateChain::from_pem(&mesh.issuer.chain().to_pem()).unwrap();
    let client =
        client_config(Some((&authority, mesh.issuer.key())), ServerTrust::Bundle(bundle.clone())).unwrap();
    assert!(connect(server(), client).is_err(), "an authority was accepted as a client");

    for (name, identity) in [("a node", node()), ("a service", Identity::Service("web".parse().unwrap()))] {
        let (chain, key) = mesh.leaf(identity);
        let server = server_config(&chain, &key, bundle.clone()).unwrap();
        let client = client_config(None, ServerTrust::Bundle(bundle.clone())).unwrap();
        assert!(connect(server, client).is_err(), "{name} was accepted as a control plane");
    }
}
