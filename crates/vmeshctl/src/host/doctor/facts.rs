//! The facts about a host that the checks work on: contents of files, outputs of commands, answers of sockets, or why these could not be
//! had.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;
use vmesh_capture::sockets;
use vmesh_net::protocol::Status;

/// An observation, or the reason why the observation failed.
pub(crate) type Observed<T> = Result<T, String>;

/// All facts about the host, gathered once before the checks run.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    /// Unix time, in seconds.
    pub(crate) now: u64,
    pub(crate) config: AgentConfig,
    /// The contents of files, by path.
    pub(crate) files: BTreeMap<String, Observed<String>>,
    pub(crate) commands: BTreeMap<HostCommand, Observed<CommandOutput>>,
    pub(crate) answers: BTreeMap<HttpQuery, Observed<Value>>,
    pub(crate) net: Observed<Status>,
    /// The output of `vmeshctl capture plan`.
    pub(crate) plan: Observed<String>,
    pub(crate) disks: Vec<Disk>,
    /// The modes and owners of files, by path; `None` if a file does not exist.
    pub(crate) modes: BTreeMap<String, Observed<Option<Ownership>>>,
    pub(crate) control_planes: Vec<Reachability>,
    /// Number of open files of Envoy's process.
    pub(crate) envoy_files: Observed<usize>,
    /// Number of processors that may be used.
    pub(crate) cores: usize,
    pub(crate) names: NameFacts,
    /// The dialed endpoints, with their service and the result.
    pub(crate) dialed: Observed<Vec<(String, SocketAddr, Observed<()>)>>,
    /// The dialed virtual addresses, IPv4 and IPv6, with the result.
    pub(crate) captured: Observed<Vec<(SocketAddr, Observed<()>)>>,
}

#[derive(Debug, Clone)]
pub(crate) enum AgentConfig {
    /// No file exists at this path.
    Missing(PathBuf),
    /// vmesh-agent rejects it, for this reason.
    Refused(String),
    /// The file could not be read.
    Unreadable(String),
    Read(Box<Outline>),
}

/// The part of `vmesh-agent --check --json` that the checks need.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Outline {
    pub(crate) node: String,
    pub(crate) control_planes: Vec<String>,
    pub(crate) state_dir: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) api: SocketAddr,
    /// Absent in the output of agents before 0.1.
    #[serde(default)]
    pub(crate) api_socket: Option<PathBuf>,
    pub(crate) dns: Option<SocketAddr>,
    pub(crate) suffix: String,
    pub(crate) envoy: EnvoyOutline,
    pub(crate) workloads: Vec<Workload>,
    pub(crate) upstreams: Vec<Upstream>,
    pub(crate) capture: CaptureOutline,
    /// The problems of this host with this configuration.
    #[serde(default)]
    pub(crate) problems: Vec<HostProblem>,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct HostProblem {
    /// `file` or `envoy`.
    pub(crate) concerns: String,
    pub(crate) what: String,
    pub(crate) fix: String,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct EnvoyOutline {
    pub(crate) manage: EnvoyManager,
    pub(crate) run_dir: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum EnvoyManager {
    Systemd,
    Child,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Workload {
    pub(crate) service: String,
    pub(crate) port: u16,
    pub(crate) host: Option<IpAddr>,
    pub(crate) protocol: Option<String>,
    pub(crate) listen: Option<SocketAddr>,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Upstream {
    pub(crate) service: String,
    pub(crate) listen: Option<SocketAddr>,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct CaptureOutline {
    pub(crate) outbound: String,
    pub(crate) inbound: String,
    pub(crate) socket: PathBuf,
}

impl Outline {
    pub(crate) fn captures(&self) -> bool {
        self.captures_outbound() || self.captures_inbound()
    }

    pub(crate) fn captures_outbound(&self) -> bool {
        self.capture.outbound != "off"
    }

    pub(crate) fn captures_inbound(&self) -> bool {
        self.capture.inbound != "off"
    }

    pub(crate) fn by_systemd(&self) -> bool {
        self.envoy.manage == EnvoyManager::Systemd
    }

    pub(crate) fn api_socket(&self) -> PathBuf {
        self.api_socket.clone().unwrap_or_else(|| self.run_dir.join("agent.sock"))
    }

    pub(crate) fn admin_socket(&self) -> PathBuf {
        if self.by_systemd() { &self.envoy.run_dir } else { &self.run_dir }.join("admin.sock")
    }
}

/// The commands that are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum HostCommand {
    Version,
    Systemd,
    Units,
    Clock,
    Route4,
    Route6,
    Rules,
    LegacyRules,
    BypassSyntax,
    Users,
    Resolve,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct CommandOutput {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// The HTTP resources that are queried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum HttpQuery {
    Agent,
    Supervisor,
    Server,
    Clusters,
    Unready,
    /// The numbers of warming resources in Envoy at two times, a second apart: `[first, second]`.
    Warming,
    Memory,
}

#[derive(Debug, Clone)]
pub(crate) struct Disk {
    pub(crate) path: String,
    /// Number of bytes that may be written.
    pub(crate) free: u64,
    pub(crate) files_free: u64,
    /// 0 if the file system does not count inodes.
    pub(crate) files: u64,
    pub(crate) read_only: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ownership {
    pub(crate) user: u32,
    pub(crate) mode: u32,
}

/// The reachability of a control plane.
#[derive(Debug, Clone)]
pub(crate) struct Reachability {
    pub(crate) address: String,
    /// Duration of the name resolution, in milliseconds.
    pub(crate) resolved: Observed<u128>,
    pub(crate) connected: Observed<u128>,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct NameFacts {
    /// All names of the agent.
    pub(crate) all: BTreeMap<String, Vec<IpAddr>>,
    /// The name that was queried.
    pub(crate) asked: Option<String>,
    /// Whether the agent's DNS server answered that query.
    pub(crate) answered: Option<Observed<()>>,
    pub(crate) resolver: String,
    /// The file by which that resolver forwards to the agent.
    pub(crate) wired: Option<String>,
    /// Whether it forwards the configured suffix to the configured address.
    pub(crate) is_wired_as_configured: bool,
}

impl Facts {
    pub(crate) fn outline(&self) -> Result<&Outline, super::Skip> {
        match &self.config {
            AgentConfig::Read(outline) => Ok(outline),
            AgentConfig::Missing(_) => Err(super::Skip::Unavailable("there is no configuration".into())),
            AgentConfig::Refused(_) => Err(super::Skip::Unavailable("the configuration is refused".into())),
            AgentConfig::Unreadable(why) => Err(super::Skip::Unavailable(why.clone())),
        }
    }

    pub(crate) fn file(&self, path: &str) -> Observed<&str> {
        match self.files.get(path) {
            Some(Ok(text)) => Ok(text),
            Some(Err(why)) => Err(why.clone()),
            None => Err(format!("{path} was not read")),
        }
    }

    pub(crate) fn ran(&self, question: HostCommand) -> Observed<&CommandOutput> {
        match self.commands.get(&question) {
            Some(Ok(ran)) => Ok(ran),
            Some(Err(why)) => Err(why.clone()),
            None => Err("nobody looked".into()),
        }
    }

    /// Returns the output of a command that succeeded.
    pub(crate) fn out(&self, question: HostCommand) -> Observed<&str> {
        let ran = self.ran(question)?;
        match ran.code {
            Some(0) => Ok(&ran.out),
            _ => Err(last_line(&ran.err)),
        }
    }

    pub(crate) fn answer(&self, socket: HttpQuery) -> Observed<&Value> {
        match self.answers.get(&socket) {
            Some(Ok(value)) => Ok(value),
            Some(Err(why)) => Err(why.clone()),
            None => Err(match self.outline() {
                Err(super::Skip::Unavailable(why)) => why,
                _ => "nobody asked".into(),
            }),
        }
    }

    /// Returns a unit; `None` if systemd does not know it.
    pub(crate) fn unit(&self, name: &str) -> Observed<Option<Unit<'_>>> {
        let units = self.out(HostCommand::Units)?;
        Ok(units.split("\n\n").map(Unit).find(|unit| unit.get("Id") == name))
    }

    pub(crate) fn listening(&self) -> Observed<Vec<Listener>> {
        let mut all = listeners(self.file("/proc/net/tcp")?);
        // This file does not exist on a kernel without IPv6.
        all.extend(self.file("/proc/net/tcp6").map(listeners).unwrap_or_default());
        Ok(all)
    }

    /// Returns the id of one of vmesh's users.
    pub(crate) fn user(&self, name: &str) -> Option<u32> {
        let users = self.ran(HostCommand::Users).ok()?;
        let mut fields = users.out.lines().map(|line| line.split(':'));
        fields.find_map(|mut fields| (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?)
    }
}

pub(crate) fn last_line(text: &str) -> String {
    text.trim().lines().last().unwrap_or("it failed and said nothing").trim().to_owned()
}

/// The output of `systemctl show` for one unit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unit<'a>(pub(crate) &'a str);

impl<'a> Unit<'a> {
    pub(crate) fn get(&self, property: &str) -> &'a str {
        let values = self.0.lines().filter_map(|line| line.split_once('='));
        { values }.find(|(name, _)| *name == property).map_or("", |(_, value)| value)
    }

    pub(crate) fn number(&self, property: &str) -> Option<u64> {
        self.get(property).parse().ok()
    }
}

/// A listening TCP socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Listener {
    pub(crate) at: SocketAddr,
    pub(crate) user: u32,
}

impl Listener {
    /// Reports whether a connection to `address` reaches this socket.
    pub(crate) fn takes(&self, address: SocketAddr) -> bool {
        let same_family = self.at.is_ipv4() == address.is_ipv4();
        let everywhere = self.at.ip().is_unspecified() && (same_family || self.at.is_ipv6());
        self.at.port() == address.port() && (everywhere || self.at.ip() == address.ip())
    }
}

/// Returns the listening sockets in the text of `/proc/net/tcp` or `tcp6`.
pub(crate) fn listeners(text: &str) -> Vec<Listener> {
    let listening = sockets::parse(text).filter(sockets::Socket::listens);
    listening.map(|socket| Listener { at: socket.local, user: socket.user }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_on_every_address_takes_what_goes_to_any() {
        let listener = |at: &str| Listener { at: at.parse().unwrap(), user: 0 };
        let takes = |at: &str, to: &str| listener(at).takes(to.parse().unwrap());
        assert!(takes("[::]:80", "10.0.0.1:80") && takes("0.0.0.0:80", "127.0.0.1:80"));
        assert!(!takes("0.0.0.0:80", "[::1]:80") && !takes("127.0.0.1:80", "10.0.0.1:80"));
        assert!(!takes("0.0.0.0:81", "10.0.0.1:80"));
    }
}
