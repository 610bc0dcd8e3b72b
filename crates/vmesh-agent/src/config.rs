//! `agent.yaml`. [`Config::parse`] is the only constructor, so a `Config` is always valid.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use vmesh_capture::spec::{Outbound, Ports};
use vmesh_daemon::fsx::{self, FileError};
use vmesh_model::endpoint::{Address, Host};
use vmesh_model::node::{self, Upstream, Upstreams};
use vmesh_model::text::Time;
use vmesh_model::{Labels, NodeName, Place, Problem, Protocol, ServiceName, load};

use vmesh_dns::{Zone, table::Suffix};

use crate::capture::settings::{self, CaptureMode, CaptureSettings};
use crate::health::HealthCheck;
use crate::register::{Instance, OnStop, RegisterSettings, RegistrationPlan, RegistrySettings};

/// Port of the local DNS server, unless `listen.dns` is set.
pub const DNS_PORT: u16 = 15053;

/// Port of the first workload's inbound listener, unless it has a `listen`. The following workloads get the following ports.
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

/// One replica of the control plane, reached in plaintext: this version has no TLS.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ControlPlane {
    pub address: Address,
}

impl fmt::Display for ControlPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.address)
    }
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
    /// With `manage: child` only: Envoy keeps serving when the agent is stopped, and the next agent takes it over.
    pub keep_on_stop: bool,
    /// With `manage: systemd` only: the directory of the supervisor's sockets. With `manage: child` they are in the agent's `run_dir`.
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
    fn complete(self, host_name: &str, problems: &mut ProblemList) -> Option<Config> {
        if self.control_plane.is_empty() {
            problems.add(
                "control_plane",
                "`control_plane` is empty: name at least one, as \"http://127.0.0.1:15010\"",
            );
        }
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
            CaptureMode::Explicit => workloads(self.workloads, self.node.address, true, problems),
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

fn workloads(
    fields: Vec<WorkloadFields>,
    address: Option<IpAddr>,
    explicit: bool,
    problems: &mut ProblemList,
) -> Vec<node::Workload> {
    // Beyond loopback, the inbound listener is plaintext in this version, so it needs an explicit `listen`.
    let ip = address.filter(IpAddr::is_loopback).unwrap_or(Ipv4Addr::LOCALHOST.into());
    let mut workloads = Vec::new();
    for (index, workload) in fields.into_iter().enumerate() {
        let port = u16::try_from(index).ok().and_then(|index| INBOUND_PORT.checked_add(index));
        let listen = workload.listen.map(|socket| socket.0);
        let listen = listen.or_else(|| port.filter(|_| explicit).map(|port| SocketAddr::new(ip, port)));
        if explicit && listen.is_none() {
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

/// An IP address and a port, with an error message that shows an example.
#[derive(Debug, Clone, Copy)]
struct ListenAddress(SocketAddr);

impl<'de> Deserialize<'de> for ListenAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.parse::<SocketAddr>() {
            Ok(address) if address.port() == 0 => {
                Err(de::Error::custom(format!("`{text}`: port 0 is not a port: 1 to 65535")))
            }
            Ok(address) => Ok(ListenAddress(address)),
            Err(_) => Err(de::Error::custom(format!(
                "`{text}` is not an IP address and a port, as \"127.0.0.1:9001\""
            ))),
        }
    }
}

#[derive(Debug)]
struct PortNumber(u16);

impl<'de> Deserialize<'de> for PortNumber {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match u16::deserialize(deserializer)? {
            0 => Err(de::Error::custom("port 0 is not a port: 1 to 65535")),
            port => Ok(PortNumber(port)),
        }
    }
}

impl FromStr for ControlPlane {
    type Err = String;

    fn from_str(text: &str) -> Result<ControlPlane, String> {
        let Some(address) = text.strip_prefix("http://") else {
            return Err(format!(
                "`{text}`: TLS to the control plane comes with a later version; write http:// for a loopback control \
                 plane, as \"http://127.0.0.1:15010\""
            ));
        };
        let address: Address = address.trim_end_matches('/').parse()?;
        if let Host::Ip(ip) = address.host {
            vmesh_model::endpoint::dialable(ip)?;
        }
        Ok(ControlPlane { address })
    }
}

impl ControlPlane {
    fn is_loopback(&self) -> bool {
        match &self.address.host {
            Host::Ip(ip) => ip.is_loopback(),
            Host::Name(name) => **name == *"localhost",
        }
    }
}

/// Reads `"http://127.0.0.1:15010"`, or `{address: "http://10.0.0.5:15010", insecure: true}`.
impl<'de> Deserialize<'de> for ControlPlane {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct ControlPlaneFields {
            address: String,
            #[serde(default)]
            insecure: bool,
        }

        struct ControlPlaneVisitor;

        impl<'de> Visitor<'de> for ControlPlaneVisitor {
            type Value = ControlPlane;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the address of a control plane, as \"http://127.0.0.1:15010\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ControlPlane, E> {
                plaintext(text, false)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ControlPlane, A::Error> {
                let full = ControlPlaneFields::deserialize(MapAccessDeserializer::new(map))?;
                plaintext(&full.address, full.insecure)
            }
        }

        fn plaintext<E: de::Error>(text: &str, insecure: bool) -> Result<ControlPlane, E> {
            let control_plane: ControlPlane = text.parse().map_err(E::custom)?;
            if !control_plane.is_loopback() && !insecure {
                return Err(E::custom(format!(
                    "`{text}` is plaintext and leaves this host: anybody on the way can read and change the \
                     configuration. If that is acceptable, write {{address: \"{text}\", insecure: true}}"
                )));
            }
            Ok(control_plane)
        }

        deserializer.deserialize_any(ControlPlaneVisitor)
    }
}

/// Reads `"*"`, or `{service: payments, listen: "127.0.0.1:9001"}`.
impl<'de> Deserialize<'de> for UpstreamEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct UpstreamFields {
            service: ServiceName,
            listen: Option<ListenAddress>,
        }

        struct UpstreamVisitor;

        impl<'de> Visitor<'de> for UpstreamVisitor {
            type Value = UpstreamEntry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an upstream, as {service: payments, listen: \"127.0.0.1:9001\"} or `payments`")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<UpstreamEntry, E> {
                match text {
                    "*" => Ok(UpstreamEntry::All),
                    name => match name.parse() {
                        Ok(service) => Ok(UpstreamEntry::Service(Upstream { service, listen: None })),
                        Err(wrong) => Err(E::custom(wrong)),
                    },
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<UpstreamEntry, A::Error> {
                let full = UpstreamFields::deserialize(MapAccessDeserializer::new(map))?;
                let listen = full.listen.map(|socket| socket.0);
                Ok(UpstreamEntry::Service(Upstream { service: full.service, listen }))
            }
        }

        deserializer.deserialize_any(UpstreamVisitor)
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse("agent.yaml", text.as_bytes(), "web-17").map_err(|error| error.to_string())
    }

    fn refused(text: &str, expected: Expect) {
        expected.assert_eq(&parse(text).unwrap_err());
    }

    const SMALL: &str = "control_plane: [\"http://127.0.0.1:15010\"]\n";

    #[test]
    fn the_small_configuration_has_a_default_for_everything_else() {
        let config = parse(SMALL).unwrap();
        assert_eq!(config.name.as_str(), "web-17");
        assert_eq!(config.api.to_string(), "127.0.0.1:15020");
        assert_eq!(config.state_dir, Path::new("/var/lib/vmesh-agent"));
        assert_eq!(config.xds_socket(), Path::new("/run/vmesh/xds.sock"));
        assert_eq!(config.envoy.manage, EnvoyManager::Systemd);
        assert_eq!(config.upstreams, Upstreams::Declared(Vec::new()));
    }

    #[test]
    fn the_full_configuration_is_read_as_it_is_written() {
        let config = parse(
            r#"
control_plane:
  - "http://127.0.0.1:15010"
  - {address: "http://mesh2.example:15010", insecure: true}
state_dir: /s
run_dir: /r
envoy: {path: /opt/envoy, manage: child, concurrency: 1, drain: 3s, keep_on_stop: true, extra_args: [--log-format-escaped]}
listen: {api: "127.0.0.1:16020", dns: "127.0.0.1:16053"}
node: {name: web-18, address: 10.0.1.17, zone: eu-1a, labels: {role: web}}
workloads:
  - {service: orders, port: 8080, protocol: http, health: {http: /healthz}}
  - {service: cache, port: 6379, listen: "0.0.0.0:7379"}
upstreams:
  - {service: payments, listen: "127.0.0.1:9001"}
capture: {outbound: explicit, inbound: explicit}
log: debug
"#,
        )
        .unwrap();
        assert_eq!(config.control_planes[1].to_string(), "http://mesh2.example:15010");
        assert_eq!(config.workloads[0].listen.unwrap().to_string(), "127.0.0.1:15008");
        assert_eq!(config.workloads[1].listen.unwrap().to_string(), "0.0.0.0:7379");
        assert_eq!(config.envoy.drain.0, Duration::from_secs(3));
        assert!(matches!(&config.upstreams, Upstreams::Declared(all) if all.len() == 1));
    }

    #[test]
    fn an_inbound_listener_is_on_the_node_s_address_only_where_that_is_loopback() {
        let workloads = "workloads: [{service: a, port: 80}, {service: b, port: 81}]\n";
        let on = |address: &str| {
            let config = parse(&format!("{SMALL}node: {{address: {address}}}\n{workloads}")).unwrap();
            config.workloads.iter().map(|workload| workload.listen.unwrap().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(on("127.0.3.7"), ["127.0.3.7:15008", "127.0.3.7:15009"]);
        assert_eq!(on("10.0.3.7"), ["127.0.0.1:15008", "127.0.0.1:15009"]);
    }

    #[test]
    fn all_upstreams_are_a_star() {
        assert_eq!(parse(&format!("{SMALL}upstreams: [\"*\"]")).unwrap().upstreams, Upstreams::All);
    }

    #[test]
    fn capture_that_is_off_reports_nothing() {
        let text = format!(
            "{SMALL}capture: {{outbound: off, inbound: off}}\nupstreams: [\"*\"]\nworkloads: [{{service: a, port: 80}}]"
        );
        let config = parse(&text).unwrap();
        assert_eq!(config.upstreams, Upstreams::Declared(Vec::new()));
        assert!(config.workloads.is_empty());
    }

    #[test]
    fn what_this_version_cannot_do_is_refused_with_what_it_can() {
        refused(
            "control_plane: [\"mesh1.example:15012\"]",
            expect![[
                r#"agent.yaml:1:17: `control_plane`: `mesh1.example:15012`: TLS to the control plane comes with a later version; write http:// for a loopback control plane, as "http://127.0.0.1:15010""#
            ]],
        );
        refused(
            "control_plane: [\"http://10.0.0.5:15010\"]",
            expect![[
                r#"agent.yaml:1:17: `control_plane`: `http://10.0.0.5:15010` is plaintext and leaves this host: anybody on the way can read and change the configuration. If that is acceptable, write {address: "http://10.0.0.5:15010", insecure: true}"#
            ]],
        );
    }

    #[test]
    fn transparent_alone_is_what_changes_least() {
        let config = parse(&format!(
            "{SMALL}capture: {{outbound: transparent, inbound: transparent}}\nupstreams: [payments]\n\
             workloads: [{{service: web, port: 8080}}]"
        ))
        .unwrap();
        assert_eq!(config.capture.spec.outbound.capture, vmesh_capture::spec::OutboundCapture::Vip);
        assert_eq!(config.capture.spec.inbound.capture, vmesh_capture::spec::InboundCapture::Redirect);
        assert!(config.capture.spec.inbound.ports.iter().all(|ports| ports.contains(8080)));
        assert_eq!(config.workloads[0].listen, None);
        assert_eq!(config.dns.unwrap().to_string(), "127.0.0.1:15053");
        let config = parse(&format!(
            "{SMALL}capture: {{outbound: {{capture: addresses, percent: 5, dial: {{units: {{app.service: 50}}}}}}, \
             dead_man: {{timeout: 5s}}, confirm: {{by: operator, within: 2m}}}}\ndns: {{suffix: Mesh.Example, ttl: 2s}}"
        ))
        .unwrap();
        assert_eq!(config.capture.confirm.by, settings::Confirmer::Operator);
        assert_eq!(config.capture.spec.outbound.percent.get(), 5);
        assert_eq!(config.zone_of_names.suffix.as_str(), "mesh.example");
    }

    #[test]
    fn what_cannot_be_captured_is_refused_with_the_place() {
        refused(
            &format!(
                "{SMALL}capture: {{outbound: all, inbound: {{capture: tproxi}}, dead_man: {{timeout: 1s}}}}"
            ),
            expect![[r#"
                agent.yaml:2:21: `outbound`: `all` is not a capture mode: `off`, `explicit`, `transparent`, or a map as {capture: addresses, percent: 5}
                agent.yaml:2:45: `capture`: `tproxi` is not known here, did you mean `tproxy`?
                agent.yaml:2:74: `timeout`: 1s is not from 3s to 10m, in whole seconds"#]],
        );
        refused(
            &format!(
                "{SMALL}capture: {{outbound: {{percent: 5, vips: [\"240.0.0.1:80\"]}}, inbound: {{capture: redirect, ports: [80]}}, \
                 confirm: {{within: 1s}}}}\ndns: {{suffix: local, ttl: 2h}}"
            ),
            expect![[r#"
                agent.yaml: `capture.outbound` says neither `vip`, `addresses` nor `all`: what is to be captured?
                agent.yaml: `capture.outbound` has `vips` or `addresses`: these come from the control plane
                agent.yaml: `capture.inbound` has `ports`: these are the workloads'
                agent.yaml: `capture.confirm` is `within` less than 5s or more than 1h
                agent.yaml: `capture.inbound` captures what workloads accept: there are no `workloads`
                agent.yaml: `dns.suffix`: `local` cannot be the suffix of names: resolvers ask the local network for `local`, by multicast (RFC 6762); built in is `mesh`
                agent.yaml: `dns.ttl` is from 1s to 1h, in whole seconds"#]],
        );
    }

    #[test]
    fn every_mistake_is_shown_where_it_is() {
        refused(
            "control_plane: []\nnode: {nme: web-1, labels: {a: b}}\nlisten: {api: localhost}\nenvoy: {manage: docker, drain: 5}\n\
             upstreams: [payments]\nworkloads: [{service: a b, port: 0}]",
            expect![[r#"
                agent.yaml:2:8: unknown field `nme`, did you mean `name`?
                agent.yaml:3:15: `api`: `localhost` is not an IP address and a port, as "127.0.0.1:9001"
                agent.yaml:4:17: `manage`: expected one of `systemd` or `child`, found `docker`
                agent.yaml:4:32: `drain`: `5` is not a duration: a number and a unit, such as 250ms, 2s, 1m30s or 1h
                agent.yaml:6:23: `service`: `a b` is not a service name: 1 to 253 letters, digits, `.`, `_` or `-`, the first and the last a letter or a digit
                agent.yaml:6:34: `port`: port 0 is not a port: 1 to 65535"#]],
        );
    }

    #[test]
    fn two_listeners_on_one_address_are_refused() {
        refused(
            &format!("{SMALL}upstreams: [{{service: a, listen: \"127.0.0.1:15020\"}}]"),
            expect!["agent.yaml: `listen.api` and upstream `a` both listen on 127.0.0.1:15020"],
        );
        refused(
            &format!("{SMALL}workloads: [{{service: b, port: 15008}}]"),
            expect![
                "agent.yaml: workload `b` listens on 127.0.0.1:15008 itself: give Envoy another `listen`"
            ],
        );
    }

    #[test]
    fn contradictions_are_refused() {
        refused(
            &format!(
                "{SMALL}upstreams: [{{service: a}}, \"*\"]\nenvoy: {{keep_on_stop: true, concurrency: 0}}"
            ),
            expect![[r#"
                agent.yaml: `upstreams`: "*" stands alone: it is every service, and a local port for none
                agent.yaml: `envoy.keep_on_stop` is for `manage: child`: under systemd Envoy's unit is its own
                agent.yaml: `envoy.concurrency` is 0: Envoy needs at least one worker"#]],
        );
    }
}
