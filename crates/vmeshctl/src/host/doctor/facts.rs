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
pub(crate) type Seen<T> = Result<T, String>;

/// All facts about the host, gathered once before the checks run.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    /// Unix time, in seconds.
    pub(crate) now: u64,
    pub(crate) config: Config,
    /// The contents of files, by path.
    pub(crate) files: BTreeMap<String, Seen<String>>,
    pub(crate) commands: BTreeMap<Question, Seen<Ran>>,
    pub(crate) answers: BTreeMap<Socket, Seen<Value>>,
    pub(crate) net: Seen<Status>,
    /// The output of `vmeshctl capture plan`.
    pub(crate) plan: Seen<String>,
    pub(crate) disks: Vec<Disk>,
    /// The modes and owners of files, by path; `None` if a file does not exist.
    pub(crate) modes: BTreeMap<String, Seen<Option<Owned>>>,
    pub(crate) control_planes: Vec<Reach>,
    /// Number of open files of Envoy's process.
    pub(crate) envoy_files: Seen<usize>,
    /// Number of processors that may be used.
    pub(crate) cores: usize,
    pub(crate) names: Names,
    /// The dialed endpoints, with their service and the result.
    pub(crate) dialed: Seen<Vec<(String, SocketAddr, Seen<()>)>>,
    /// The dialed virtual addresses, IPv4 and IPv6, with the result.
    pub(crate) captured: Seen<Vec<(SocketAddr, Seen<()>)>>,
}

#[derive(Debug, Clone)]
pub(crate) enum Config {
    /// No file exists at this path.
    Missing(PathBuf),
    /// vmesh-agent rejects it, for this reason.
    Refused(String),
    /// The file could not be read.
    Unseen(String),
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
    pub(crate) capture: Capture,
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
    pub(crate) manage: Manage,
    pub(crate) run_dir: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Manage {
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
pub(crate) struct Capture {
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
        self.envoy.manage == Manage::Systemd
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
pub(crate) enum Question {
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
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// The HTTP resources that are queried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Socket {
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
pub(crate) struct Owned {
    pub(crate) user: u32,
    pub(crate) mode: u32,
}

/// The reachability of a control plane.
#[derive(Debug, Clone)]
pub(crate) struct Reach {
    pub(crate) address: String,
    /// Duration of the name resolution, in milliseconds.
    pub(crate) resolved: Seen<u128>,
    pub(crate) connected: Seen<u128>,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Names {
    /// All names of the agent.
    pub(crate) all: BTreeMap<String, Vec<IpAddr>>,
    /// The name that was queried.
    pub(crate) asked: Option<String>,
    /// Whether the agent's DNS server answered that query.
    pub(crate) answered: Option<Seen<()>>,
    pub(crate) resolver: String,
    /// The file by which that resolver forwards to the agent.
    pub(crate) wired: Option<String>,
    /// Whether it forwards the configured suffix to the configured address.
    pub(crate) is_wired_as_configured: bool,
}

impl Facts {
    pub(crate) fn outline(&self) -> Result<&Outline, super::Skip> {
        match &self.config {
            Config::Read(outline) => Ok(outline),
            Config::Missing(_) => Err(super::Skip::Unseen("there is no configuration".into())),
            Config::Refused(_) => Err(super::Skip::Unseen("the configuration is refused".into())),
            Config::Unseen(why) => Err(super::Skip::Unseen(why.clone())),
        }
    }

    pub(crate) fn file(&self, path: &str) -> Seen<&str> {
        match self.files.get(path) {
            Some(Ok(text)) => Ok(text),
            Some(Err(why)) => Err(why.clone()),
            None => Err(format!("{path} was not read")),
        }
    }

    pub(crate) fn ran(&self, question: Question) -> Seen<&Ran> {
        match self.commands.get(&question) {
            Some(Ok(ran)) => Ok(ran),
            Some(Err(why)) => Err(why.clone()),
            None => Err("nobody looked".into()),
        }
    }

    /// Returns the output of a command that succeeded.
    pub(crate) fn out(&self, question: Question) -> Seen<&str> {
        let ran = self.ran(question)?;
        match ran.code {
            Some(0) => Ok(&ran.out),
            _ => Err(last_line(&ran.err)),
        }
    }

    pub(crate) fn answer(&self, socket: Socket) -> Seen<&Value> {
        match self.answers.get(&socket) {
            Some(Ok(value)) => Ok(value),
            Some(Err(why)) => Err(why.clone()),
            None => Err(match self.outline() {
                Err(super::Skip::Unseen(why)) => why,
                _ => "nobody asked".into(),
            }),
        }
    }

    /// Returns a unit; `None` if systemd does not know it.
    pub(crate) fn unit(&self, name: &str) -> Seen<Option<Unit<'_>>> {
        let units = self.out(Question::Units)?;
        Ok(units.split("\n\n").map(Unit).find(|unit| unit.get("Id") == name))
    }

    pub(crate) fn listening(&self) -> Seen<Vec<Listener>> {
        let mut all = listeners(self.file("/proc/net/tcp")?);
        // This file does not exist on a kernel without IPv6.
        all.extend(self.file("/proc/net/tcp6").map(listeners).unwrap_or_default());
        Ok(all)
    }

    /// Returns the id of one of vmesh's users.
    pub(crate) fn user(&self, name: &str) -> Option<u32> {
        let users = self.ran(Question::Users).ok()?;
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
