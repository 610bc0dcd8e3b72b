//! Real Consul servers: one or three, with ACLs and TLS, which tests can kill, stop and restart.
//!
//! Each server has its own address and the standard ports (8500, 8501 for TLS). The servers run from Debian's
//! package, which is identified by its hash: 1.8.7, the last version in Debian. If `$VMESH_TOOLS_CACHE` does
//! not have it, a `consul` of that version on the PATH is used.

use std::fs;
use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::debian::{self, Deb};
use crate::place::{TempDir, tempdir};
use crate::process::Daemon;
use crate::servers::{Server, Servers, TlsFiles};
use crate::{Failed, Result, cache, wait_for};

const DEB: Deb = Deb {
    path: "pool/main/c/consul/consul_1.8.7+dfsg1-2+b3_amd64.deb",
    sha256: "e4e888bba104daba1d9161f49bfc52649a7e4efd45b1a7ead5bc54f2cb9c89d9",
};
const VERSION: &str = "1.8.7";
const HTTP_PORT: u16 = 8500;
const HTTPS_PORT: u16 = 8501;
/// The time limit for the election of a leader on a busy machine.
const SERVING: Duration = Duration::from_secs(60);
const ANSWER: Duration = Duration::from_secs(20);

/// The token with all rights, if ACLs are on.
pub const MANAGEMENT_TOKEN: &str = "5a7c1e2d-0000-4000-8000-000000000001";

/// The configuration of the servers.
#[derive(Debug, Clone)]
pub struct Options {
    pub servers: usize,
    pub datacenter: &'static str,
    /// Denies everything without a token; [`MANAGEMENT_TOKEN`] has all rights.
    pub acl: bool,
    /// Opens a TLS port that asks for a client certificate: see [`Consul::tls`].
    pub tls: bool,
    /// `limits.http_max_conns_per_client`; Consul's own default is 200.
    pub max_connections: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Options { servers: 1, datacenter: "dc1", acl: false, tls: false, max_connections: None }
    }
}

/// A single server or a cluster, in one datacenter.
pub struct Consul {
    options: Options,
    program: PathBuf,
    servers: Servers,
    dir: TempDir,
}

/// Returns the Consul to test with: the package in `$VMESH_TOOLS_CACHE`, else a `consul` of the pinned
/// version on the PATH, else the package, which is fetched on first use and checked against its hash.
pub fn program() -> Result<PathBuf> {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(found.clone());
    }
    let there = if debian::is_provided(&[DEB]) { None } else { on_path() };
    let found = match there {
        Some(path) => path,
        None => debian::unpacked(&format!("consul-{VERSION}"), &[DEB])?.join("usr/bin/consul"),
    };
    Ok(FOUND.get_or_init(|| found).clone())
}

fn on_path() -> Option<PathBuf> {
    let path = debian::on_path("consul")?;
    let answer_text =
        Command::new(&path).arg("version").output().map(|output| output.stdout).unwrap_or_default();
    let is_pinned = is_pinned(&String::from_utf8_lossy(&answer_text));
    if !is_pinned {
        eprintln!("{} is not Consul {VERSION} and is left alone", path.display());
    }
    is_pinned.then_some(path)
}

/// Reports whether this output of `consul version` names the pinned version. Its first line is
/// `Consul v1.8.7`, and Debian appends a revision.
fn is_pinned(answer_text: &str) -> bool {
    let version = answer_text.lines().next().and_then(|line| line.trim().strip_prefix("Consul v"));
    version.is_some_and(|version| version.split(['+', '-', ' ']).next() == Some(VERSION))
}

impl Deref for Consul {
    type Target = Servers;
    fn deref(&self) -> &Servers {
        &self.servers
    }
}

impl DerefMut for Consul {
    fn deref_mut(&mut self) -> &mut Servers {
        &mut self.servers
    }
}

impl Consul {
    /// Starts one server without ACLs.
    pub async fn one() -> Result<Consul> {
        Consul::start(Options::default()).await
    }

    /// Starts three servers without ACLs.
    pub async fn three() -> Result<Consul> {
        Consul::start(Options { servers: 3, ..Options::default() }).await
    }

    /// Starts the servers and waits until they have a leader.
    pub async fn start(options: Options) -> Result<Consul> {
        let program = program()?;
        let dir = tempdir()?;
        let servers = Servers::new("Consul", options.servers, &dir)?;
        let mut consul = Consul { options, program, servers, dir };
        if consul.options.tls {
            consul.make_certificates()?;
        }
        for index in 0..consul.servers.len() {
            consul.configure(index)?;
            consul.launch(index)?;
        }
        for index in 0..consul.servers.len() {
            consul.wait_serving(index).await?;
        }
        Ok(consul)
    }

    fn configure(&self, index: usize) -> Result<()> {
        let member = self.servers.server(index)?;
        let all: Vec<_> = self.servers.iter().map(|member| member.place.to_string()).collect();
        let https = if self.options.tls { i32::from(HTTPS_PORT) } else { -1 };
        let mut config = json!({
            "node_name": format!("{}-{}", self.options.datacenter, index + 1),
            "datacenter": self.options.datacenter,
            "data_dir": member.dir.join("data"),
            "server": true,
            "bootstrap_expect": all.len(),
            "retry_join": all,
            "retry_interval": "200ms",
            "bind_addr": member.place.to_string(),
            "client_addr": member.place.to_string(),
            "ports": {"http": HTTP_PORT, "https": https, "dns": 8600, "grpc": -1},
            "disable_update_check": true,
            "disable_host_node_id": true,
            "leave_on_terminate": false,
            "log_level": "info",
            // The shortest election timeouts.
            "performance": {"raft_multiplier": 1},
            "connect": {"enabled": false},
        });
        let mut set = |key: &str, value: Value| {
            if let Some(config) = config.as_object_mut() {
                config.insert(key.to_owned(), value);
            }
        };
        if self.options.acl {
            set(
                "acl",
                json!({
                    "enabled": true,
                    "default_policy": "deny",
                    "down_policy": "extend-cache",
                    "tokens": {"master": MANAGEMENT_TOKEN, "agent": MANAGEMENT_TOKEN},
                }),
            );
        }
        if self.options.tls {
            let file = |name: &str| self.dir.join(name);
            set("ca_file", json!(file("consul-agent-ca.pem")));
            set("cert_file", json!(file(&format!("{}-server-consul-0.pem", self.options.datacenter))));
            set("key_file", json!(file(&format!("{}-server-consul-0-key.pem", self.options.datacenter))));
            set("verify_incoming", json!(true));
            set("verify_outgoing", json!(true));
        }
        if let Some(connections) = self.options.max_connections {
            set("limits", json!({"http_max_conns_per_client": connections}));
        }
        let path = member.dir.join("consul.json");
        fs::write(&path, config.to_string())
            .map_err(Failed::to(format!("could not write {}", path.display())))
    }

    fn launch(&mut self, index: usize) -> Result<()> {
        let member = self.servers.server(index)?;
        let mut command = Command::new(&self.program);
        command.arg("agent").arg("-config-file").arg(member.dir.join("consul.json"));
        let daemon = Daemon::spawn(format!("Consul {index} ({})", member.place), command)?;
        self.servers.started(index, daemon);
        Ok(())
    }

    /// Waits until server `index` answers with a leader's consent.
    pub async fn wait_serving(&mut self, index: usize) -> Result<()> {
        let address = self.address(index)?;
        let asked = async || {
            // With ACLs, the management token becomes known a moment later.
            let asked = call(address, Method::GET, "/v1/catalog/services", Some(MANAGEMENT_TOKEN), "");
            match asked.await {
                Ok((StatusCode::OK, answer_text)) if answer_text.contains("\"consul\"") => Ok(()),
                Ok((status, answer_text)) => Err(format!("{status} {answer_text}")),
                Err(error) => Err(error.to_string()),
            }
        };
        self.servers.wait(index, asked).await
    }

    /// Returns the plaintext address of server `index`.
    pub fn address(&self, index: usize) -> Result<SocketAddr> {
        Ok(SocketAddr::new(self.servers.server(index)?.place.ip(), HTTP_PORT))
    }

    /// Returns a URL like `http://127.1.2.3:8500`.
    pub fn url(&self, index: usize) -> Result<String> {
        Ok(format!("http://{}", self.address(index)?))
    }

    /// Returns a URL like `https://127.1.2.3:8501`.
    pub fn https_url(&self, index: usize) -> Result<String> {
        Ok(format!("https://{}:{HTTPS_PORT}", self.servers.server(index)?.place))
    }

    /// Returns the files that a client of the TLS ports needs.
    pub fn tls(&self) -> TlsFiles {
        let client = format!("{}-client-consul-0", self.options.datacenter);
        TlsFiles {
            ca: self.dir.join("consul-agent-ca.pem"),
            cert: self.dir.join(format!("{client}.pem")),
            key: self.dir.join(format!("{client}-key.pem")),
        }
    }

    /// Starts server `index` again with its data. The server answers once there is a leader.
    pub fn launch_again(&mut self, index: usize) -> Result<()> {
        self.servers.kill(index)?;
        self.launch(index)
    }

    /// Starts server `index` again with its data, and waits until it answers.
    pub async fn restart(&mut self, index: usize) -> Result<()> {
        self.launch_again(index)?;
        self.wait_serving(index).await
    }

    /// Starts all servers again without their data. Their indexes restart as well.
    pub async fn restart_empty(&mut self) -> Result<()> {
        for index in 0..self.servers.len() {
            self.servers.wipe(index)?;
        }
        for index in 0..self.servers.len() {
            self.launch(index)?;
        }
        for index in 0..self.servers.len() {
            self.wait_serving(index).await?;
        }
        Ok(())
    }

    /// Returns the current leader, according to the servers that answer.
    pub async fn leader(&self) -> Result<usize> {
        wait_for("a leader", SERVING, async || {
            for index in 0..self.servers.len() {
                let address = self.address(index).map_err(|failed| failed.to_string())?;
                let Ok((_, answer_text)) = call(address, Method::GET, "/v1/status/leader", None, "").await
                else {
                    continue;
                };
                let leads = |member: &Server| {
                    answer_text.trim_matches(['"', '\n']).starts_with(&format!("{}:", member.place))
                };
                if let Some(leader) = self.servers.iter().position(leads) {
                    return Ok(leader);
                }
            }
            Err("none".to_owned())
        })
        .await
    }

    /// Joins the two datacenters over their wide area network.
    pub async fn join_wan(&self, other: &Consul) -> Result<()> {
        let path = format!("/v1/agent/join/{}?wan=1", other.servers.server(0)?.place);
        self.put(0, &path, &Value::Null).await?;
        wait_for("the datacenters to know each other", SERVING, async || {
            let path = format!("/v1/catalog/services?dc={}", other.options.datacenter);
            self.get(0, &path).await
        })
        .await
        .map(drop)
    }

    /// Sends a GET to server `index`, with all rights.
    pub async fn get(&self, index: usize, path: &str) -> Result<Value> {
        let (status, answer_text) =
            call(self.address(index)?, Method::GET, path, Some(MANAGEMENT_TOKEN), "").await?;
        if !status.is_success() {
            return Err(Failed::new(format!("GET {path}: {status} {answer_text}")));
        }
        serde_json::from_str(&answer_text).map_err(Failed::to(format!("GET {path}: {answer_text}")))
    }

    /// Sends a PUT to server `index`, with all rights, and returns the body.
    pub async fn put(&self, index: usize, path: &str, body: &Value) -> Result<String> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (status, answer_text) =
            call(self.address(index)?, Method::PUT, path, Some(MANAGEMENT_TOKEN), &body).await?;
        if status.is_success() {
            Ok(answer_text)
        } else {
            Err(Failed::new(format!("PUT {path}: {status} {answer_text}")))
        }
    }

    /// Registers a service with the agent of server `index`, in Consul's own format
    /// (`/v1/agent/service/register`).
    pub async fn register(&self, index: usize, service: &Value) -> Result<()> {
        self.put(index, "/v1/agent/service/register", service).await.map(drop)
    }

    /// Deregisters the service with this id from the agent of server `index`.
    pub async fn deregister(&self, index: usize, id: &str) -> Result<()> {
        self.put(index, &format!("/v1/agent/service/deregister/{id}"), &Value::Null).await.map(drop)
    }

    /// Creates a token with these rules (`service_prefix "" { policy = "read" }`). Returns its accessor and
    /// its secret.
    pub async fn token(&self, rules: &str) -> Result<(String, String)> {
        let at = self.leader().await?;
        let name =
            format!("policy-{}", self.get(at, "/v1/acl/policies").await?.as_array().map_or(0, Vec::len));
        self.put(at, "/v1/acl/policy", &json!({"Name": name, "Rules": rules})).await?;
        let answer_text = self.put(at, "/v1/acl/token", &json!({"Policies": [{"Name": name}]})).await?;
        let answer: Value = serde_json::from_str(&answer_text).map_err(Failed::to("reading the token"))?;
        let field = |name: &str| answer.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        Ok((field("AccessorID"), field("SecretID")))
    }

    /// Deletes a token.
    pub async fn revoke(&self, accessor: &str) -> Result<()> {
        let path = format!("/v1/acl/token/{accessor}");
        let (status, answer_text) =
            call(self.address(self.leader().await?)?, Method::DELETE, &path, Some(MANAGEMENT_TOKEN), "")
                .await?;
        if status.is_success() {
            Ok(())
        } else {
            Err(Failed::new(format!("DELETE {path}: {status} {answer_text}")))
        }
    }

    fn make_certificates(&self) -> Result<()> {
        let run = |arguments: &[String]| {
            let mut command = Command::new(&self.program);
            command.arg("tls").args(arguments).current_dir(&*self.dir);
            cache::run(&mut command, "Consul makes its own certificates")
        };
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        run(&words("ca create"))?;
        let datacenter = self.options.datacenter;
        let mut server = words(&format!("cert create -server -dc {datacenter}"));
        for member in self.servers.iter() {
            server.push(format!("-additional-ipaddress={}", member.place));
        }
        run(&server)?;
        run(&words(&format!("cert create -client -dc {datacenter}")))
    }
}

/// Sends one request on a new connection.
async fn call(
    address: SocketAddr,
    method: Method,
    path: &str,
    token: Option<&str>,
    body: &str,
) -> Result<(StatusCode, String)> {
    let what = format!("{method} {path} at {address}");
    let exchange = async {
        let stream = TcpStream::connect(address).await.map_err(Failed::to(what.clone()))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(Failed::to(what.clone()))?;
        let mut request = Request::builder().method(method).uri(path).header(HOST, address.to_string());
        if let Some(token) = token {
            request = request.header("x-consul-token", token);
        }
        let body = Full::new(Bytes::copy_from_slice(body.as_bytes()));
        let request = request.body(body).map_err(Failed::to(what.clone()))?;
        let answer = async {
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = response.into_body().collect().await?.to_bytes();
            Ok::<_, hyper::Error>((status, String::from_utf8_lossy(&body).into_owned()))
        };
        tokio::pin!(connection, answer);
        tokio::select! {
            answer = &mut answer => answer.map_err(Failed::to(what.clone())),
            // The connection task may end before the response was read.
            _ = &mut connection => answer.await.map_err(Failed::to(what.clone())),
        }
    };
    timeout(ANSWER, exchange).await.map_err(Failed::to(format!("{what}: no answer within {ANSWER:?}")))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn three_servers_with_acls_and_tls_elect_another_leader() {
        let options = Options { servers: 3, acl: true, tls: true, ..Options::default() };
        let mut consul = Consul::start(options).await.unwrap();
        consul.register(0, &json!({"Name": "pay", "Port": 80})).await.unwrap();
        let leader = consul.leader().await.unwrap();
        consul.kill(leader).unwrap();
        let other = (leader + 1) % 3;
        consul.wait_serving(other).await.unwrap();
        assert_ne!(consul.leader().await.unwrap(), leader);
        let (accessor, secret) = consul.token(r#"service_prefix "" { policy = "read" }"#).await.unwrap();
        assert_eq!(secret.len(), 36);
        consul.revoke(&accessor).await.unwrap();
        assert!(consul.tls().ca.is_file() && consul.tls().cert.is_file() && consul.tls().key.is_file());
    }

    #[tokio::test]
    async fn a_server_that_starts_empty_knows_nothing() {
        let mut consul = Consul::one().await.unwrap();
        let service = json!({"Name": "pay", "Port": 80});
        consul.register(0, &service).await.unwrap();
        let listed = async |consul: &Consul| consul.get(0, "/v1/catalog/services").await.unwrap().to_string();
        wait_for("pay", SERVING, async || listed(&consul).await.contains("pay").then_some(())).await.unwrap();
        consul.restart_empty().await.unwrap();
        assert_eq!(listed(&consul).await, r#"{"consul":[]}"#);
    }
}
