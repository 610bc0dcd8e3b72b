//! `agent.yaml`. [`Config::parse`] is the only constructor, so a `Config` is always valid.

mod values;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use vmesh_capture::spec::{Outbound, Ports};
use vmesh_daemon::fsx::{self, FileError};
use vmesh_model::endpoint::Address;
use vmesh_model::node::{self, MTLS_PORT, Upstream, Upstreams};
use vmesh_model::text::Time;
use vmesh_model::{Labels, NodeName, Place, Problem, Protocol, ServiceName, load};

use vmesh_dns::{Zone, table::Suffix};

use crate::capture::settings::{self, CaptureMode, CaptureSettings};
use crate::credentials::token;
use crate::health::HealthCheck;
use crate::register::{Instance, OnStop, RegisterSettings, RegistrationPlan, RegistrySettings};
use values::{ListenAddress, PortNumber};

/// Port of the local DNS server, unless `listen.dns` is set.
pub const DNS_PORT: u16 = 15053;

/// Port of the first workload's plaintext inbound listener, unless it has a `listen`. The following workloads get the following ports. A
/// node with an identity has no such listener by default: it is called at [`MTLS_PORT`].
pub const INBOUND_PORT: u16 = 15008;

const MAX_CONFIG: u64 = 4 << 20;

/// The agent's configuration, with all defaults resolved and without contradictions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub control_planes: Vec<ControlPlane>,
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    pub envoy: EnvoySettings,
    pub api: SocketAddr,
    /// The address of the DNS server for the names of the mesh. `None` if names are not answered.
    pub dns: Option<SocketAddr>,
    /// The DNS zone: the suffix of the names, and the TTLs of the answers.
    pub zone_of_names: Zone,
    /// The settings of transparent capture.
    pub capture: CaptureSettings,
    /// `join:` of the file. `None`: this node has an identity already, or needs none.
    pub join: Option<JoinSettings>,
    pub name: NodeName,
    pub address: Option<IpAddr>,
    pub zone: Option<Arc<str>>,
    pub labels: Labels,
    pub workloads: Vec<node::Workload>,
    pub upstreams: Upstreams,
    pub registry: RegistrySettings,
    /// The workloads that the agent registers.
    pub registrations: Vec<RegistrationPlan>,
    pub log: Option<String>,
}

/// One replica of the control plane.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ControlPlane {
    pub address: Address,
    /// True for mTLS, false for plaintext.
    pub is_tls: bool,
}

impl fmt::Display for ControlPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.is_tls {
            true => write!(f, "{}", self.address),
            false => write!(f, "http://{}", self.address),
        }
    }
}

/// `join:` of `agent.yaml`: the way to the identity of this node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JoinSettings {
    /// The file with the join token. `None`: the credential `vmesh-join-token` that systemd gives to the agent.
    pub token_file: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EnvoySettings {
    pub path: PathBuf,
    pub manage: EnvoyManager,
    /// Number of worker threads. Default: two, or one on a single core.
    pub concurrency: Option<u16>,
    /// Longest time that Envoy drains when it is stopped.
    pub drain: Time,
    /// Keeps Envoy serving (with `manage: child` only): Envoy serves when the agent is stopped, and the next agent takes it over.
    pub keep_on_stop: bool,
    /// The directory of the supervisor's sockets, with `manage: systemd` only. With `manage: child` they are in the agent's `run_dir`.
    pub run_dir: PathBuf,
    pub hot_restart: HotRestartSettings,
    /// An Envoy that answers nothing for this long is killed and started again.
    pub hung_after: Time,
    /// Limit of open downstream connections. Further ones are refused, before memory or file descriptors run out.
    pub max_connections: u32,
    pub log_level: EnvoyLogLevel,
    pub extra_args: Vec<String>,
}

impl Default for EnvoySettings {
    fn default() -> Self {
        EnvoySettings {
            path: "/usr/bin/envoy".into(),
            manage: EnvoyManager::default(),
            concurrency: None,
            drain: Time(Duration::from_secs(10)),
            keep_on_stop: false,
            run_dir: "/run/vmesh-envoy".into(),
            hot_restart: HotRestartSettings::default(),
            hung_after: Time(Duration::from_secs(60)),
            max_connections: 50_000,
            log_level: EnvoyLogLevel::default(),
            extra_args: Vec::new(),
        }
    }
}

/// Settings of Envoy's hot restart.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HotRestartSettings {
    /// Limit for connections that stay open in the old Envoy after a handover. Meant for long-lived ones, as of a database or a message
    /// queue.
    pub parent_shutdown: Time,
}

impl Default for HotRestartSettings {
    fn default() -> Self {
        HotRestartSettings { parent_shutdown: Time(Duration::from_secs(600)) }
    }
}

/// The process that starts Envoy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EnvoyManager {
    /// A systemd unit: the agent writes the bootstrap and polls the unit's supervisor.
    #[default]
    Systemd,
    /// The agent itself, on hosts without systemd and in tests.
    Child,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EnvoyLogLevel {
    Trace,
    Debug,
    Info,
    #[default]
    Warning,
    Error,
}

impl EnvoyLogLevel {
    pub fn as_str(self) -> &'static str {
        match self {
            EnvoyLogLevel::Trace => "trace",
            EnvoyLogLevel::Debug => "debug",
            EnvoyLogLevel::Info => "info",
            EnvoyLogLevel::Warning => "warning",
            EnvoyLogLevel::Error => "error",
        }
    }
}

/// All errors in a configuration, one line each.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error(transparent)]
    Read(FileError),
    #[error("{}", lines(.0))]
    Wrong(Vec<Problem>),
}

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
}

impl Config {
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = fsx::read_capped(path, MAX_CONFIG).map_err(ConfigError::Read)?;
        Config::parse(&path.display().to_string(), &text, &host_name())
    }

    /// Parses the text of `file`. `host_name` is the node's name if the text gives none.
    pub fn parse(file: &str, text: &[u8], host_name: &str) -> Result<Config, ConfigError> {
        let fields: ConfigFile = load::strict_bytes(file, text).map_err(ConfigError::Wrong)?;
        let mut problems = ProblemList { file: file.into(), all: Vec::new() };
        let config = fields.complete(host_name, &mut problems);
        match config {
            Some(config) if problems.all.is_empty() => Ok(config),
            _ => Err(ConfigError::Wrong(problems.all)),
        }
    }

    /// Returns the path of the API socket that root's tools use. Unlike `listen.api`, no other user can bind it.
    pub fn api_socket(&self) -> PathBuf {
        self.run_dir.join("agent.sock")
    }

    /// Returns the path of the socket on which Envoy is served xDS. Other programs rely on this path.
    pub fn xds_socket(&self) -> PathBuf {
        self.run_dir.join("xds.sock")
    }

    pub fn admin_socket(&self) -> PathBuf {
        self.run_dir.join("admin.sock")
    }

    /// Returns the path of the supervisor's status socket. Only with `manage: systemd`.
    pub fn status_socket(&self) -> PathBuf {
        self.envoy.run_dir.join("status.sock")
    }

    /// Returns the path of the configuration that Envoy accepted last.
    pub fn cache(&self) -> PathBuf {
        self.state_dir.join("accepted.bin")
    }

    /// Reports whether workloads are withdrawn from their registries when the agent stops. The default is to withdraw if Envoy stops with
    /// the agent, since the workloads can then not be reached through Envoy.
    pub fn withdraws_on_stop(&self) -> bool {
        match self.registry.on_stop {
            Some(on_stop) => on_stop == OnStop::Withdraw,
            None => self.envoy.manage == EnvoyManager::Child && !self.envoy.keep_on_stop,
        }
    }

    pub fn bootstrap(&self) -> PathBuf {
        self.run_dir.join("bootstrap.json")
    }

    /// Reports whether this node needs an identity: it reaches its control planes by mTLS.
    pub fn needs_identity(&self) -> bool {
        self.control_planes.iter().any(|control_plane| control_plane.is_tls)
    }

    /// Returns the file of the join token. `None`: neither the configuration nor systemd names one.
    pub fn token_path(&self) -> Option<PathBuf> {
        let token_file = self.join.as_ref()?.token_file.as_deref();
        token::token_path(token_file, token::credentials_directory().as_deref())
    }

    /// Returns the address at which Envoy receives mTLS connections of other nodes. `None`: it receives none.
    pub fn mtls_address(&self) -> Option<SocketAddr> {
        let address = self.address.filter(|_| self.needs_identity())?;
        Some(SocketAddr::new(address, MTLS_PORT))
    }
}

/// Resolves a path against the working directory: other processes, with other working directories, read it too.
fn absolute(path: PathBuf) -> PathBuf {
    std::path::absolute(&path).unwrap_or(path)
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}

struct ProblemList {
    file: Arc<str>,
    all: Vec<Problem>,
}

impl ProblemList {
    fn add(&mut self, subject: &str, message: impl Into<String>) {
        self.all.push(Problem::new(Place::file(self.file.clone()), subject, message));
    }
}

/// The fields of the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigFile {
    control_plane: Vec<ControlPlane>,
    join: Option<JoinSettings>,
    #[serde(default = "default_state_dir")]
    state_dir: PathBuf,
    #[serde(default = "default_run_dir")]
    run_dir: PathBuf,
    #[serde(default)]
    envoy: EnvoySettings,
    #[serde(default)]
    listen: ListenFields,
    #[serde(default)]
    node: NodeFields,
    #[serde(default)]
    workloads: Vec<WorkloadFields>,
    #[serde(default)]
    upstreams: Vec<UpstreamEntry>,
    #[serde(default)]
    registry: RegistrySettings,
    #[serde(default)]
    capture: settings::CaptureFields,
    #[serde(default)]
    dns: DnsFields,
    log: Option<String>,
}

fn default_state_dir() -> PathBuf {
    "/var/lib/vmesh-agent".into()
}

fn default_run_dir() -> PathBuf {
    "/run/vmesh".into()
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ListenFields {
    api: ListenAddress,
    dns: Option<ListenAddress>,
}

impl Default for ListenFields {
    fn default() -> Self {
        ListenFields { api: ListenAddress(SocketAddr::from((Ipv4Addr::LOCALHOST, 15020))), dns: None }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct NodeFields {
    name: Option<NodeName>,
    address: Option<IpAddr>,
    zone: Option<Arc<str>>,
    labels: Labels,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WorkloadFields {
    service: ServiceName,
    port: PortNumber,
    host: Option<IpAddr>,
    protocol: Option<Protocol>,
    health: Option<HealthCheck>,
    listen: Option<ListenAddress>,
    register: Option<RegisterSettings>,
}

#[derive(Debug)]
enum UpstreamEntry {
    All,
    Service(Upstream),
}

/// `dns:` of `agent.yaml`: the DNS zone of the mesh.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct DnsFields {
    suffix: Option<String>,
    ttl: Option<Time>,
}

impl DnsFields {
    fn zone(&self, problems: &mut ProblemList) -> Zone {
        let mut zone = Zone::default();
        match self.suffix.as_deref().map(str::parse::<Suffix>) {
            Some(Ok(suffix)) => zone.suffix = suffix,
            Some(Err(wrong)) => problems.add("dns", format!("`dns.suffix`: {wrong}")),
            None => {}
        }
        if let Some(ttl) = self.ttl {
            match u32::try_from(ttl.0.as_secs()) {
                Ok(seconds @ 1..=3600) if ttl.0.subsec_nanos() == 0 => {
                    zone.ttl = seconds;
                    zone.negative_ttl = seconds;
                }
                _ => problems.add("dns", "`dns.ttl` is from 1s to 1h, in whole seconds"),
            }
        }
        zone
    }
}

impl ConfigFile {
    /// Checks the control planes. Returns whether this node has an identity.
    fn check_control_planes(&self, problems: &mut ProblemList) -> bool {
        if self.control_plane.is_empty() {
            problems.add(
                "control_plane",
                "`control_plane` is empty: name at least one, as \"mesh1.example:15012\"",
            );
        }
        let has_identity = self.control_plane.iter().any(|control_plane| control_plane.is_tls);
        if has_identity && self.control_plane.iter().any(|control_plane| !control_plane.is_tls) {
            problems.add(
                "control_plane",
                "`control_plane` has entries with mTLS and entries with http://: this node has an identity at all replicas, or at none",
            );
        }
        if self.join.is_some() && !has_identity && !self.control_plane.is_empty() {
            problems.add(
                "join",
                "`join` needs control planes with mTLS: write `control_plane` without http://, as \"mesh1.example:15012\"",
            );
        }
        has_identity
    }

    fn complete(self, host_name: &str, problems: &mut ProblemList) -> Option<Config> {
        let has_identity = self.check_control_planes(problems);
        let name = match self.node.name.clone() {
            Some(name) => Some(name),
            None => match host_name.parse() {
                Ok(name) => Some(name),
                Err(wrong) => {
                    problems.add(
                        "node",
                        format!("`node.name` is missing, and the host's name is of no use: {wrong}"),
                    );
                    None
                }
            },
        };
        let registrations = registrations(&self, name.as_ref(), problems);
        let mut capture =
            self.capture.complete(|field, wrong| problems.add(field, format!("`{field}` {wrong}")));
        let upstreams = upstreams(self.upstreams, &self.capture.outbound, problems);
        let workloads = match self.capture.inbound {
            CaptureMode::Off => Vec::new(),
            CaptureMode::Explicit => workloads(self.workloads, self.node.address, !has_identity, problems),
            CaptureMode::Transparent(_) => workloads(self.workloads, self.node.address, false, problems),
        };
        if capture.inbound() {
            let ports = workloads.iter().filter_map(|workload| Ports::range(workload.port, workload.port));
            capture.spec.inbound.ports = ports.collect();
            if workloads.is_empty() {
                problems.add(
                    "capture.inbound",
                    "`capture.inbound` captures what workloads accept: there are no `workloads`",
                );
            }
        }
        let dns = self.listen.dns.map(|socket| socket.0);
        let dns =
            dns.or_else(|| capture.outbound().then_some(SocketAddr::from((Ipv4Addr::LOCALHOST, DNS_PORT))));
        let config = Config {
            control_planes: self.control_plane,
            state_dir: absolute(self.state_dir),
            run_dir: absolute(self.run_dir),
            envoy: EnvoySettings { run_dir: absolute(self.envoy.run_dir), ..self.envoy },
            api: self.listen.api.0,
            dns,
            zone_of_names: self.dns.zone(problems),
            capture,
            join: self.join.map(|join| JoinSettings { token_file: join.token_file.map(absolute) }),
            name: name?,
            address: self.node.address,
            zone: self.node.zone,
            labels: self.node.labels,
            workloads,
            upstreams,
            registry: self.registry,
            registrations,
            log: self.log,
        };
        config.check(problems);
        Some(config)
    }
}

fn upstreams(
    fields: Vec<UpstreamEntry>,
    mode: &CaptureMode<Outbound>,
    problems: &mut ProblemList,
) -> Upstreams {
    let mut declared = Vec::new();
    let mut all = false;
    for upstream in fields {
        match upstream {
            UpstreamEntry::All => all = true,
            UpstreamEntry::Service(one) => declared.push(one),
        }
    }
    if all && !declared.is_empty() {
        problems.add(
            "upstreams",
            "`upstreams`: \"*\" stands alone: it is every service, and a local port for none",
        );
    }
    match mode {
        CaptureMode::Off => Upstreams::Declared(Vec::new()),
        _ if all => Upstreams::All,
        _ => Upstreams::Declared(declared),
    }
}

/// Returns the registrations that the workloads ask for.
fn registrations(
    fields: &ConfigFile,
    name: Option<&NodeName>,
    problems: &mut ProblemList,
) -> Vec<RegistrationPlan> {
    let mut plans = Vec::new();
    for workload in &fields.workloads {
        let Some(register) = &workload.register else { continue };
        let who = format!("workload `{}`", workload.service);
        let mut wrong = |message: &str| problems.add("workloads", format!("{who}: {message}"));
        if register.consul.is_none() && register.zookeeper.is_none() {
            wrong("`register` names no registry: `consul`, `zookeeper`, or both");
        }
        if register.zookeeper.is_some() && fields.registry.zookeeper.is_none() {
            wrong(
                "to register in ZooKeeper, say where it is: `registry: {zookeeper: {connect: \"zk1:2181\"}}`",
            );
        }
        if register.zookeeper.as_ref().is_some_and(|there| !is_znode_path(&there.path)) {
            wrong("`register.zookeeper.path` is the path of the service, as `/services/orders`");
        }
        let Some(address) = register.address.or(fields.node.address) else {
            wrong("which address is to be registered? give `node.address`, or `register.address`");
            continue;
        };
        if address.is_unspecified() {
            wrong("an address that others can dial is to be registered, and not all of them");
        }
        let Some(name) = name else { continue };
        let port = register.port.unwrap_or(workload.port.0);
        let instance = Instance {
            service: workload.service.clone(),
            id: format!("{name}-{}-{port}", workload.service),
            address,
            port,
            protocol: workload.protocol.map(|protocol| protocol.as_str().into()),
            weight: register.weight,
            version: register.version.clone(),
            zone: fields.node.zone.clone(),
            labels: register.labels.clone(),
        };
        let host = workload.host.unwrap_or(Ipv4Addr::LOCALHOST.into());
        plans.push(RegistrationPlan {
            instance,
            consul: register.consul.clone(),
            zookeeper: register.zookeeper.clone(),
            application: SocketAddr::new(host, workload.port.0),
            check: workload.health.clone(),
        });
    }
    plans
}

/// Reports whether `path` is a ZooKeeper path other than the root.
fn is_znode_path(path: &str) -> bool {
    path.starts_with('/') && !path.ends_with('/') && !path.contains("//") && !path.contains('\0')
}

/// Returns the workloads. `needs_listener`: each workload has a plaintext listener of its own, also without a `listen`.
fn workloads(
    fields: Vec<WorkloadFields>,
    address: Option<IpAddr>,
    needs_listener: bool,
    problems: &mut ProblemList,
) -> Vec<node::Workload> {
    // Beyond loopback, such a listener is plaintext on the network, so it needs an explicit `listen`.
    let ip = address.filter(IpAddr::is_loopback).unwrap_or(Ipv4Addr::LOCALHOST.into());
    let mut workloads = Vec::new();
    for (index, workload) in fields.into_iter().enumerate() {
        let port = u16::try_from(index).ok().and_then(|index| INBOUND_PORT.checked_add(index));
        let listen = workload.listen.map(|socket| socket.0);
        let listen = listen.or_else(|| port.filter(|_| needs_listener).map(|port| SocketAddr::new(ip, port)));
        if needs_listener && listen.is_none() {
            problems.add(
                "workloads",
                format!("workload `{}` has no port left: give it a `listen`", workload.service),
            );
            continue;
        }
        workloads.push(node::Workload {
            service: workload.service,
            port: workload.port.0,
            host: workload.host,
            protocol: workload.protocol,
            listen,
        });
    }
    workloads
}

impl Config {
    fn check(&self, problems: &mut ProblemList) {
        let mut taken: BTreeMap<SocketAddr, String> = BTreeMap::new();
        let mut take = |address: SocketAddr, who: String, problems: &mut ProblemList| {
            if let Some(other) = taken.insert(address, who.clone()) {
                problems.add(&who, format!("{other} and {who} both listen on {address}"));
            }
        };
        take(self.api, "`listen.api`".to_owned(), problems);
        if let Some(dns) = self.dns {
            take(dns, "`listen.dns`".to_owned(), problems);
        }
        if let Some(address) = self.mtls_address() {
            take(address, "the port for mTLS".to_owned(), problems);
        }
        for workload in &self.workloads {
            let who = format!("workload `{}`", workload.service);
            let application =
                SocketAddr::new(workload.host.unwrap_or(Ipv4Addr::LOCALHOST.into()), workload.port);
            let Some(listen) = workload.listen else { continue };
            if listen == application {
                let wrong = format!("{who} listens on {application} itself: give Envoy another `listen`");
                problems.add(&who, wrong);
            }
            take(listen, who, problems);
        }
        if let Upstreams::Declared(upstreams) = &self.upstreams {
            for upstream in upstreams {
                if let Some(listen) = upstream.listen {
                    take(listen, format!("upstream `{}`", upstream.service), problems);
                }
            }
        }
        if self.envoy.keep_on_stop && self.envoy.manage == EnvoyManager::Systemd {
            problems.add(
                "envoy",
                "`envoy.keep_on_stop` is for `manage: child`: under systemd Envoy's unit is its own",
            );
        }
        if self.envoy.concurrency == Some(0) {
            problems.add("envoy", "`envoy.concurrency` is 0: Envoy needs at least one worker");
        }
        // The path of a Unix socket (unix(7)) is limited to 108 bytes with the final NUL. The longest name in the directory is that of a
        // hot restart socket; `admin.1234567890.sock` is shorter.
        let longest = "/hr_parent_udp_4294967295".len();
        for (field, dir) in [("run_dir", &self.run_dir), ("envoy.run_dir", &self.envoy.run_dir)] {
            if dir.as_os_str().len() + longest > 107 {
                let wrong = format!("`{field}` is too long for Unix sockets in it: {}", dir.display());
                problems.add(field, wrong);
            }
        }
    }
}

#[cfg(test)]
mod tests;
