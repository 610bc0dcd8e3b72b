//! A registry of either kind, for what is to work alike with both: the demo, the benches, faults under load.

use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};

use serde_json::json;

use crate::Result;
use crate::consul::{self, Consul};
use crate::servers::Servers;
use crate::zookeeper::{self, Client, ZooKeeper};

/// One instance of a service, as its owner registers it.
#[derive(Debug, Clone)]
pub struct Instance {
    pub service: String,
    pub id: String,
    pub address: SocketAddr,
    pub version: String,
    pub zone: String,
    /// Consul: whether it is registered with a check of its own, which passes.
    pub has_check: bool,
}

impl Instance {
    /// An HTTP instance `orders-1` of `orders`.
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

/// The check of an instance, as the catalogue takes it.
fn check_of(instance: &Instance) -> serde_json::Value {
    let Instance { service, id, .. } = instance;
    json!({"Node": id, "CheckID": format!("service:{id}"), "Name": "tcp", "Status": "passing",
           "ServiceID": id, "ServiceName": service, "Output": "TCP connect: Success"})
}

/// A server of ZooKeeper that has lost its leader may have taken a write that nobody answers: clients say it again.
const TRIES: usize = 3;

/// Real servers, and whoever registers with them.
pub enum Registry {
    Consul(Consul),
    /// Nodes in SmartStack's format below `/services`. They are not ephemeral: who registers in a test is one process.
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

    /// The source for `discovery:` in `control.yaml`, in one line; `more` is YAML for it, as `guard: {..}`.
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

    /// Registers `instance`, or replaces what is registered under its id.
    pub async fn add(&mut self, instance: &Instance) -> Result<()> {
        let Instance { service, id, address, version, zone, has_check } = instance;
        let (host, port) = (address.ip().to_string(), address.port());
        match self {
            Registry::Consul(consul) => {
                let meta = json!({"version": version, "zone": zone, "protocol": "http"});
                let registered = json!({"ID": id, "Service": service, "Port": port, "Meta": meta});
                // A node of its own, as every VM is: it does not become ill with the server that was told of it.
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

    /// Registers many instances as fast as the registry takes them.
    pub async fn fill(&mut self, instances: &[Instance]) -> Result<()> {
        match self {
            Registry::Consul(consul) => {
                // A transaction may have 64 operations: a node, its service and a check each.
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
                let mut said = Ok(());
                for first in 0..TRIES {
                    // What an earlier try has deleted is no error.
                    said = self.client(first).await?.delete_all(&path).await;
                    if said.is_ok() {
                        break;
                    }
                    self.disconnect();
                }
                said
            }
        }
    }

    /// Makes a node of ZooKeeper, with those above it.
    pub async fn make(&mut self, path: &str, data: &[u8]) -> Result<()> {
        let mut said = Ok(());
        for first in 0..TRIES {
            said = self.client(first).await?.make(path, data, zookeeper::Kind::Persistent).await.map(drop);
            if said.is_ok() {
                break;
            }
            self.disconnect();
        }
        said
    }

    fn disconnect(&mut self) {
        if let Registry::ZooKeeper(_, client) = self {
            *client = None;
        }
    }

    /// A session to write with: the one of before, if its server is still there, or with server `first` or one after it.
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

    /// Starts one server again on the data that it had, and waits until it serves.
    pub async fn restart(&mut self, index: usize) -> Result<()> {
        match self {
            Registry::Consul(consul) => consul.restart(index).await,
            Registry::ZooKeeper(zookeeper, _) => zookeeper.restart(index).await,
        }
    }

    /// Starts all servers again, on the data that they had, and waits until they serve.
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

    /// Every server is killed and starts again without its data.
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

/// Whatever server takes it.
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
