//! The certificates of a simulated fleet, issued with the authority of the control plane under measurement.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use vmesh_identity::tls::{ServerTrust, any_server_name, client_config};
use vmesh_identity::{Identity, Issuer, Key, Lifetimes, NodeGrant, Subject};
use vmesh_testkit::{Failed, Result};
use vmesh_xds::client::AdsStream;

/// Returns the name of node number `number`.
pub fn node_name(number: usize) -> String {
    format!("node-{number:05}")
}

/// The TLS settings of each node.
pub struct FleetIdentities {
    nodes: Vec<Arc<ClientConfig>>,
}

impl FleetIdentities {
    /// Issues certificates for `nodes` nodes with the intermediate in the state directory of a control plane.
    pub fn issue(state_dir: &Path, nodes: usize) -> Result<FleetIdentities> {
        let read = |name: &str| {
            let path = state_dir.join("identity/ca-1").join(name);
            std::fs::read_to_string(&path).map_err(Failed::to(format!("could not read {}", path.display())))
        };
        let issuer = Issuer::from_pem(&read("issuer.crt")?, &read("issuer.key")?);
        let issuer = issuer.map_err(Failed::to("the authority cannot be used"))?;
        let bundle = issuer.bundle().map_err(Failed::to("there is no trust bundle"))?;
        let (now, lifetimes) = (SystemTime::now(), Lifetimes::default());
        let one = |number: usize| {
            let name = node_name(number).parse().map_err(Failed::to("a node has no name"))?;
            let key = Key::generate().map_err(Failed::to("no key was made"))?;
            let id = issuer.trust_domain().id(Identity::Node(name));
            let subject = Subject { id, node: None, grant: Some(NodeGrant::default()) };
            let request = key.request().map_err(Failed::to("no request was made"))?;
            let chain = issuer.issue(&request, &subject, now, &lifetimes);
            let chain = chain.map_err(Failed::to("no certificate was issued"))?;
            let config = client_config(Some((&chain, &key)), ServerTrust::Bundle(bundle.clone()));
            config.map(Arc::new).map_err(Failed::to("the certificate cannot be used"))
        };
        Ok(FleetIdentities { nodes: (0..nodes).map(one).collect::<Result<_>>()? })
    }

    /// Connects node number `number` by mTLS.
    pub async fn connect(&self, number: usize, to: SocketAddr) -> std::io::Result<AdsStream> {
        let config = self.nodes.get(number).cloned().ok_or(std::io::ErrorKind::NotFound)?;
        let tcp = TcpStream::connect(to).await?;
        tcp.set_nodelay(true)?;
        let io = TlsConnector::from(config).connect(any_server_name(), tcp).await?;
        AdsStream::over(io).await
    }
}
