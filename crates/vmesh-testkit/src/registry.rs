//! A registry of either kind, for what must work alike with both: the demo, the benchmarks, faults under
//! load.

use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};

use serde_json::json;

use crate::Result;
use crate::consul::{self, Consul};
use crate::servers::Servers;
use crate::zookeeper::{self, Client, ZooKeeper};

/// An instance of a service, as its owner registers it.
#[derive(Debug, Clone)]
pub struct Instance {
    pub service: String,
    pub id: String,
    pub address: SocketAddr,
    pub version: String,
    pub zone: String,
    /// Consul: whether the instance has a check, which passes.
    pub has_check: bool,
}

impl Instance {
    /// Creates the HTTP instance `orders-1` of `orders`.
    pub fn new(service: &str, id: &str, address: SocketAddr) -> Instance {
        Instance {
            service: service.to_owned(),
            id: id.to_owned(),
            address,
            version: "v1".to_owned(),
            zone: "eu-1a".to_owned(),
            has_check: false,
        }
    }
}

/// Returns the check of an instance in the format of Consul's catalogue.
fn check_of(instance: &Instance) -> serde_json::Value {
    let Instance { service, id, .. } = instance;
    json!({"Node": id, "CheckID": format!("service:{id}"), "Name": "tcp", "Status": "passing",
           "ServiceID": id, "ServiceName": service, "Output": "TCP connect: Success"})
}

/// The number of attempts of a write. A ZooKeeper server that has lost its leader may accept a write and
/// never answer, so clients repeat it.
const TRIES: usize = 3;

/// Real servers, and the client that registers instances with them.
pub enum Registry {
    Consul(Consul),
    /// Nodes in SmartStack's format below `/services`. They are not ephemeral, because all instances of a
    /// test are registered by one process.
    ZooKeeper(ZooKeeper, Option<Client>),
}

impl Deref for Registry {
    type Target = Servers;
    fn deref(&self) -> &Servers {
        match self {
            Registry::Consul(consul) => consul,
            Registry::ZooKeeper(zookeeper, _) => zookeeper,
        }
    }
}

impl DerefMut for Registry {
    fn deref_mut(&mut self) -> &mut Servers {
        match self {
            Registry::Consul(consul) => consul,
            Registry::ZooKeeper(zookeeper, _) => zookeeper,
        }
    }
}

impl Registry {
    pub async fn consul(servers: usize) -> Result<Registry> {
        Ok(Registry::Consul(Consul::start(consul::Options { servers, ..consul::Options::default() }).await?))
    }

    pub async fn zookeeper(servers: usize) -> Result<Registry> {
        let options = zookeeper::Options { servers, ..zookeeper::Options::default() };
        Ok(Registry::ZooKeeper(ZooKeeper::start(options).await?, None))
    }

    pub fn name(&self) -> &'static str {
        match self {
            Registry::Consul(_) => "Consul",
            Registry::ZooKeeper(..) => "ZooKeeper",
        }
    }

    /// Returns the source for `discovery:` in `control.yaml`, on one line. `more` is additional YAML, such as
    /// `guard: {..}`.
    pub fn source(&self, more: &str) -> Result<String> {
        let more = if more.is_empty() { String::new() } else { format!(", {more}") };
        Ok(match self {
            Registry::Consul(consul) => {
                let urls: Result<Vec<_>> = (0..consul.len()).map(|index| consul.url(index)).collect();
                let urls: Vec<_> = urls?.iter().map(|url| format!("\"{url}\"")).collect();
                format!("- consul: {{name: registry, address: [{}]{more}}}", urls.join(", "))
            }
            Registry::ZooKeeper(zookeeper, _) => format!(
                "- zookeeper: {{name: registry, connect: \"{}\", roots: [{{path: /services, format: nerve}}]{more}}}",
                zookeeper.connect()
            ),
        })
    }

    /// Registers `instance`, or replaces the one with the same id.
    pub async fn add(&mut self, instance: &Instance) -> Result<()> {
        let Instance { service, id, address, version, zone, has_check } = instance;
        let (host, port) = (address.ip().to_string(), address.port());
        match self {
            Registry::Consul(consul) => {
                let meta = json!({"version": version, "zone": zone, "protocol": "http"});
                let registered = json!({"ID": id, "Service": service, "Port": port, "Meta": meta});
                // Each instance has a node of its own, like a VM. Otherwise it would become unhealthy
                // together with the server that accepted the registration.
                let mut node = json!({"Node": id, "Address": host, "Service": registered});
                if let (true, Some(node)) = (*has_check, node.as_object_mut()) {
                    node.insert("Check".to_owned(), check_of(instance));
                }
                put(consul, "/v1/catalog/register", &node).await
            }
            Registry::ZooKeeper(..) => {
                let labels = json!({"version": version, "az": zone, "protocol": "http"});
                let data = json!({"host": host, "port": port, "name": id, "labels": labels}).to_string();
                let path = format!("/services/{service}/{id}");
                self.make(&path, data.as_bytes()).await
            }
        }
    }

    /// Registers many instances in as few requests as possible.
    pub async fn fill(&mut self, instances: &[Instance]) -> Result<()> {
        match self {
            Registry::Consul(consul) => {
                // A transaction may have 64 operations. Each instance needs a node, a service and a check.
                for some in instances.chunks(21) {
                    let operations = some.iter().flat_map(|instance| {
                        let Instance { service, id, address, version, zone, has_check } = instance;
                        let meta = json!({"version": version, "zone": zone, "protocol": "http"});
                        let node = json!({"Node": id, "Address": address.ip().to_string()});
                        let of = json!({"ID": id, "Service": service, "Port": address.port(), "Meta": meta});
                        let check = json!({"Check": {"Verb": "set", "Check": check_of(instance)}});
                        [
                            Some(json!({"Node": {"Verb": "set", "Node": node}})),
                            Some(json!({"Service": {"Verb": "set", "Node": id, "Service": of}})),
                            has_check.then_some(check),
                        ]
                        .into_iter()
                        .flatten()
                    });
                    put(consul, "/v1/txn", &operations.collect::<Vec<_>>().into()).await?;
                }
                Ok(())
            }
            Registry::ZooKeeper(..) => {
                for instance in instances {
                    self.add(instance).await?;
                }
                Ok(())
            }
        }
    }

    pub async fn remove(&mut self, instance: &Instance) -> Result<()> {
        match self {
            Registry::Consul(consul) => {
                put(consul, "/v1/catalog/deregister", &json!({"Node": instance.id})).await
            }
            Registry::ZooKeeper(..) => {
                let path = format!("/services/{}/{}", instance.service, instance.id);
                let mut result = Ok(());
                for first in 0..TRIES {
                    // An earlier attempt may already have deleted the nodes.
                    result = self.client(first).await?.delete_all(&path).await;
                    if result.is_ok() {
                        break;
                    }
                    self.disconnect();
                }
                result
            }
        }
    }

    /// Creates a ZooKeeper node, with its parents.
    pub async fn make(&mut self, path: &str, data: &[u8]) -> Result<()> {
        let mut result = Ok(());
        for first in 0..TRIES {
            result = self.client(first).await?.make(path, data, zookeeper::Kind::Persistent).await.map(drop);
            if result.is_ok() {
                break;
            }
            self.disconnect();
        }
        result
    }

    fn disconnect(&mut self) {
        if let Registry::ZooKeeper(_, client) = self {
            *client = None;
        }
    }

    /// Returns a session for writes: the existing one if its server still runs, else one with server `first`
    /// or a later one.
    async fn client(&mut self, first: usize) -> Result<&mut Client> {
        match self {
            Registry::ZooKeeper(zookeeper, client) => {
                let mut last = client.take();
                if let Some(before) = &mut last
                    && before.children("/").await.is_err()
                {
                    last = None;
                }
                let now = match last {
                    Some(alive) => alive,
                    None => reconnect(zookeeper, first).await?,
                };
                Ok(client.insert(now))
            }
            Registry::Consul(_) => Err(crate::Failed::new("Consul has no sessions to write with")),
        }
    }

    pub async fn leader(&self) -> Result<usize> {
        match self {
            Registry::Consul(consul) => consul.leader().await,
            Registry::ZooKeeper(zookeeper, _) => zookeeper.leader().await,
        }
    }

    /// Starts one server again with its data, and waits until it answers.
    pub async fn restart(&mut self, index: usize) -> Result<()> {
        match self {
            Registry::Consul(consul) => consul.restart(index).await,
            Registry::ZooKeeper(zookeeper, _) => zookeeper.restart(index).await,
        }
    }

    /// Starts all servers again with their data, and waits until they answer.
    pub async fn restart_all(&mut self) -> Result<()> {
        for index in 0..self.len() {
            match self {
                Registry::Consul(consul) => consul.launch_again(index)?,
                Registry::ZooKeeper(zookeeper, _) => zookeeper.launch_again(index)?,
            }
        }
        for index in 0..self.len() {
            match self {
                Registry::Consul(consul) => consul.wait_serving(index).await?,
                Registry::ZooKeeper(zookeeper, _) => zookeeper.wait_serving(index).await?,
            }
        }
        Ok(())
    }

    /// Kills all servers, and starts them again without their data.
    pub async fn restart_empty(&mut self) -> Result<()> {
        match self {
            Registry::Consul(consul) => consul.restart_empty().await,
            Registry::ZooKeeper(zookeeper, client) => {
                *client = None;
                zookeeper.restart_empty().await
            }
        }
    }
}

async fn reconnect(zookeeper: &ZooKeeper, first: usize) -> Result<Client> {
    let mut last = crate::Failed::new("there is no ZooKeeper");
    for index in first..first + zookeeper.len() {
        match zookeeper.client(index % zookeeper.len()).await {
            Ok(client) => return Ok(client),
            Err(failed) => last = failed,
        }
    }
    Err(last)
}

/// Sends a PUT to the first server that accepts it.
async fn put(consul: &Consul, path: &str, body: &serde_json::Value) -> Result<()> {
    let mut last = crate::Failed::new("there is no Consul");
    for index in 0..consul.len() {
        match consul.put(index, path, body).await {
            Ok(_) => return Ok(()),
            Err(failed) => last = failed,
        }
    }
    Err(last)
}
