//! Gathers all facts about the host. Each look-up has a timeout, and they run in parallel: at most 5 s in all.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use vmesh_capture::spec::SELF_TESTS;
use vmesh_daemon::fetch::{FetchError, Peer, fetch, fetch_from_users};
use vmesh_daemon::fsx;
use vmesh_daemon::report::one_line;
use vmesh_dns::probe;
use vmesh_net::client;
use vmesh_net::protocol::{Request, Response, Status};

use super::super::host_command;
use super::envoy::clusters;
use super::facts::{
    AgentConfig, CommandOutput, Disk, Facts, HostCommand, HttpQuery, NameFacts, Observed, Outline, Ownership,
    Reachability,
};

/// Timeout of a command. The agent's `--check` runs before all other look-ups.
const BOUND: Duration = Duration::from_millis(1500);
/// Timeout of an answer. At most three are awaited in sequence, to detect warming.
const ANSWERS: Duration = Duration::from_secs(1);
/// Timeout of a connection that should succeed at once.
const DIAL: Duration = Duration::from_millis(500);
/// Maximum number of endpoints that are dialed.
const DIALED: usize = 20;
/// Maximum number of services' virtual addresses that are dialed per family.
const TRIED: usize = 5;
const MAX_FILE: u64 = 16 << 20;

const FILES: [&str; 16] = [
    "/proc/sys/kernel/osrelease",
    "/proc/sys/kernel/hostname",
    "/proc/sys/net/netfilter/nf_conntrack_count",
    "/proc/sys/net/netfilter/nf_conntrack_max",
    "/proc/sys/net/ipv4/ip_local_port_range",
    "/proc/sys/net/ipv4/ip_local_reserved_ports",
    "/proc/net/if_inet6",
    "/proc/net/sockstat",
    "/proc/net/tcp",
    "/proc/net/tcp6",
    "/proc/meminfo",
    "/proc/uptime",
    "/etc/machine-id",
    "/etc/resolv.conf",
    "/run/host/container-manager",
    "/run/systemd/container",
];

const UNITS: [&str; 5] =
    ["vmesh-agent.service", "vmesh-envoy.service", "vmesh-net.service", "vmesh.target", "vmesh.slice"];
const PROPERTIES: &str = "Id,LoadState,ActiveState,SubState,Result,NRestarts,UnitFileState,ControlGroup,MemoryCurrent,MemoryHigh,\
                          MemoryMax,ActiveEnterTimestampMonotonic";

pub(super) async fn facts(config: &Path) -> Facts {
    let agent = agent_program();
    let (version, config) = tokio::join!(command(&agent, &["--version"]), read_config(&agent, config));
    let outline = match &config {
        AgentConfig::Read(outline) => Some(outline.as_ref()),
        _ => None,
    };
    let (
        mut commands,
        (answers, (names, resolved), dialed, envoy_files, limits),
        (net, plan),
        control_planes,
    ) = tokio::join!(commands(), daemons(outline), capture(outline), control_planes(outline));
    let captured = match (outline, &net) {
        (Some(outline), Ok(status)) => try_capture(outline, status).await,
        (_, Err(why)) => Err(why.clone()),
        (None, _) => Err("there is no configuration".to_owned()),
    };
    commands.insert(HostCommand::Version, version);
    if let Some(resolved) = resolved {
        commands.insert(HostCommand::Resolve, resolved);
    }
    let mut files: BTreeMap<String, Observed<String>> =
        FILES.iter().map(|path| ((*path).to_owned(), read(Path::new(path)))).collect();
    files.insert("limits of Envoy".into(), limits);
    let units = commands.get(&HostCommand::Units).and_then(|ran| ran.as_ref().ok());
    for unit in units.into_iter().flat_map(|ran| ran.out.split("\n\n")).map(super::facts::Unit) {
        let events = format!("/sys/fs/cgroup{}/memory.events", unit.get("ControlGroup"));
        files.insert(unit.get("Id").to_owned(), read(Path::new(&events)));
    }
    Facts {
        now: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        disks: outline.map(disks).unwrap_or_default(),
        modes: modes(outline),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        config,
        files,
        commands,
        answers,
        net,
        plan,
        control_planes,
        envoy_files,
        names,
        dialed,
        captured,
    }
}

/// Dials virtual addresses. If capture works from end to end, Envoy accepts these connections. Uses vmesh-net's own test addresses and some
/// of services, in each address family that Envoy uses.
async fn try_capture(outline: &Outline, status: &Status) -> Observed<Vec<(SocketAddr, Observed<()>)>> {
    let (include, exclude) = (&status.spec.outbound.include, &status.spec.outbound.exclude);
    let is_everybody = include.users.is_empty() && include.groups.is_empty() && include.units.is_empty();
    let is_nobody = exclude.users.is_empty() && exclude.groups.is_empty() && exclude.units.is_empty();
    if !outline.captures_outbound() || !status.captures() {
        return Err("no outbound connection is captured now".to_owned());
    }
    if !is_everybody || !is_nobody {
        return Err("only connections of some programs are captured, perhaps not this one's".to_owned());
    }
    let mut addresses: Vec<SocketAddr> = Vec::new();
    if outline.by_systemd() {
        let envoy = Peer::Unix(outline.envoy.run_dir.join("status.sock"));
        let listeners = get(&envoy, "/listeners?format=json").await.unwrap_or_default();
        let all = listeners.get("listener_statuses").and_then(Value::as_array);
        let virtual_of = all.into_iter().flatten().filter_map(|listener| {
            let at = listener.pointer("/local_address/socket_address")?;
            let ip = at.get("address")?.as_str()?.parse::<IpAddr>().ok()?;
            let port = u16::try_from(at.get("port_value")?.as_u64()?).ok()?;
            is_virtual(ip).then(|| SocketAddr::new(ip, port))
        });
        let (v4, v6): (Vec<_>, Vec<_>) = virtual_of.partition(SocketAddr::is_ipv4);
        addresses.extend(v4.into_iter().take(TRIED).chain(v6.into_iter().take(TRIED)));
    }
    let has_ipv6 = addresses.iter().any(SocketAddr::is_ipv6);
    addresses.extend(SELF_TESTS.into_iter().filter(|address| address.is_ipv4() || has_ipv6));
    let mut dials = JoinSet::new();
    for at in addresses {
        dials.spawn(async move {
            let result = match timeout(ANSWERS, TcpStream::connect(at)).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("no answer in {} s", ANSWERS.as_secs())),
            };
            (at, result)
        });
    }
    let mut tried = dials.join_all().await;
    tried.sort_by_key(|(at, _)| *at);
    Ok(tried)
}

/// Reports whether vmesh may have assigned this address to a service.
fn is_virtual(ip: IpAddr) -> bool {
    match ip {
        // The range 240.0.0.0/5.
        IpAddr::V4(ip) => ip.octets().first().is_some_and(|first| first & 0xf8 == 240),
        // The prefix fd76:6d65:7368::/48.
        IpAddr::V6(ip) => ip.segments().starts_with(&[0xfd76, 0x6d65, 0x7368]),
    }
}

/// Returns the vmesh-agent that was installed with this program, or else the one on the `PATH`.
fn agent_program() -> String {
    let own = std::env::current_exe().ok().map(|own| own.with_file_name("vmesh-agent"));
    own.filter(|own| own.exists()).map_or_else(|| "vmesh-agent".into(), |own| own.display().to_string())
}

/// Reads the agent's configuration, as interpreted by the agent itself.
pub(crate) async fn read_configuration(path: &Path) -> AgentConfig {
    read_config(&agent_program(), path).await
}

async fn read_config(agent: &str, path: &Path) -> AgentConfig {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return AgentConfig::Missing(path.to_owned());
        }
        _ => {}
    }
    if let Err(error) = std::fs::File::open(path) {
        return AgentConfig::Unreadable(format!("{} cannot be read by this user: {error}", path.display()));
    }
    let file = path.display().to_string();
    match command(agent, &["--config", &file, "--check", "--json"]).await {
        Err(why) => AgentConfig::Unreadable(why),
        Ok(ran) => match serde_json::from_str::<Outline>(&ran.out) {
            // Valid output wins over the exit code, which also signals problems of the host.
            Ok(outline) => AgentConfig::Read(Box::new(outline)),
            Err(_) if ran.code != Some(0) => AgentConfig::Refused(ran.err.trim().to_owned()),
            Err(error) => {
                AgentConfig::Unreadable(format!("{agent} is of another version than vmeshctl: {error}"))
            }
        },
    }
}

fn read(path: &Path) -> Observed<String> {
    match fsx::read_capped(path, MAX_FILE) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) => Err(one_line(&error)),
    }
}

async fn command(program: &str, arguments: &[&str]) -> Observed<CommandOutput> {
    let mut command = match host_command(program) {
        Ok(command) => command,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(format!("there is no `{program}` on this host"));
        }
        Err(error) => return Err(error.to_string()),
    };
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    match timeout(BOUND, command.output()).await {
        Err(_) => Err(format!("`{program}` has not ended in {} s", BOUND.as_secs_f32())),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(format!("there is no `{program}` on this host"))
        }
        Ok(Err(error)) => Err(format!("`{program}` could not be run: {error}")),
        Ok(Ok(output)) => Ok(CommandOutput {
            code: output.status.code(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }),
    }
}

async fn commands() -> BTreeMap<HostCommand, Observed<CommandOutput>> {
    let units = [&["show", "--no-pager", "-p", PROPERTIES][..], &UNITS].concat();
    let root = rustix::process::geteuid().is_root();
    let as_root = async |program: &str, arguments: &[&str]| match root {
        true => command(program, arguments).await,
        false => Err("only root may".to_owned()),
    };
    // `iptables-legacy` would load kernel modules if they are not loaded yet, and the doctor must change nothing.
    let has_legacy = read(Path::new("/proc/net/ip_tables_names")).is_ok_and(|names| !names.trim().is_empty());
    let legacy = async || match has_legacy {
        true => as_root("iptables-legacy-save", &[]).await,
        false => Ok(CommandOutput { code: Some(0), ..CommandOutput::default() }),
    };
    let (systemd, units, clock, route4, route6, rules, legacy, syntax, users) = tokio::join!(
        command("systemctl", &["--version"]),
        command("systemctl", &units),
        command("timedatectl", &["show", "-p", "NTPSynchronized"]),
        command("ip", &["-4", "route", "get", "240.0.0.1"]),
        command("ip", &["-6", "route", "get", "fd76:6d65:7368::1"]),
        as_root("nft", &["list", "ruleset"]),
        legacy(),
        command("sh", &["-n", "/usr/lib/vmesh/bypass"]),
        command("getent", &["passwd", "vmesh-agent", "vmesh-envoy"]),
    );
    [
        (HostCommand::Systemd, systemd),
        (HostCommand::Units, units),
        (HostCommand::Clock, clock),
        (HostCommand::Route4, route4),
        (HostCommand::Route6, route6),
        (HostCommand::Rules, rules),
        (HostCommand::LegacyRules, legacy),
        (HostCommand::BypassSyntax, syntax),
        (HostCommand::Users, users),
    ]
    .into()
}

async fn get(peer: &Peer, path: &str) -> Observed<Value> {
    answer_of(peer, path, fetch(peer, Method::GET, path, ANSWERS).await)
}

fn answer_of(peer: &Peer, path: &str, answer: Result<(StatusCode, Bytes), FetchError>) -> Observed<Value> {
    let (status, body) = answer.map_err(|error| {
        // The path is left out, so that one reason is reported once for all requests.
        let why = one_line(&error);
        format!("{peer}: {}", why.split_once("; because: ").map_or(why.as_str(), |(_, because)| because))
    })?;
    if status != StatusCode::OK {
        let answer_text = String::from_utf8_lossy(&body);
        return Err(format!("{peer}{path} answered {status}: {}", answer_text.trim()));
    }
    serde_json::from_slice(&body).map_err(|error| format!("{peer}{path} answered no JSON: {error}"))
}

/// Queries the agent at its socket. Trusts only programs of root, of the agent's user and of this user.
async fn agent_says(outline: &Outline, path: &str) -> Observed<Value> {
    let socket = outline.api_socket();
    let answer = fetch_from_users(&socket, &super::super::dns::trusted_users(), path, ANSWERS).await;
    // A user without access to the socket falls back to the TCP port. Root always has access.
    if let Err(error) = &answer
        && error.is_denied()
        && !rustix::process::geteuid().is_root()
    {
        return get(&Peer::Tcp(outline.api), path).await;
    }
    answer_of(&Peer::Unix(socket), path, answer)
}

type DaemonAnswers = (
    BTreeMap<HttpQuery, Observed<Value>>,
    (NameFacts, Option<Observed<CommandOutput>>),
    Observed<Vec<(String, SocketAddr, Observed<()>)>>,
    Observed<usize>,
    Observed<String>,
);

/// The answers of the agent, and of Envoy through its supervisor.
async fn daemons(outline: Option<&Outline>) -> DaemonAnswers {
    let Some(outline) = outline else {
        let nobody = || "there is no configuration".to_owned();
        return (BTreeMap::new(), (NameFacts::default(), None), Err(nobody()), Err(nobody()), Err(nobody()));
    };
    let envoy = Peer::Unix(match outline.by_systemd() {
        true => outline.envoy.run_dir.join("status.sock"),
        false => outline.admin_socket(),
    });
    let supervisor = async || match outline.by_systemd() {
        true => get(&envoy, "/status").await,
        false => Err("the agent starts Envoy".to_owned()),
    };
    let (status, (supervisor, server, all, unready, memory), warming, names) = tokio::join!(
        agent_says(outline, "/status"),
        async {
            tokio::join!(
                supervisor(),
                get(&envoy, "/server_info"),
                get(&envoy, "/clusters?format=json"),
                get(&envoy, "/init_dump"),
                get(&envoy, "/memory"),
            )
        },
        warming(&envoy),
        names(outline),
    );
    let pid = [(&supervisor, "/pid"), (&status, "/envoy/pid")]
        .into_iter()
        .find_map(|(answer, path)| answer.as_ref().ok()?.pointer(path)?.as_u64());
    let process = |file: &str| match pid {
        Some(pid) => Ok(PathBuf::from(format!("/proc/{pid}/{file}"))),
        None => Err("it is not known which process Envoy is".to_owned()),
    };
    let open = process("fd").and_then(|dir| {
        std::fs::read_dir(&dir)
            .map(Iterator::count)
            .map_err(|error| format!("could not read {}: {error}", dir.display()))
    });
    let limits = process("limits").and_then(|file| read(&file));
    let dialed = match (&all, outline.capture.outbound.as_str()) {
        (Ok(all), "off" | "vip") => Ok(dial(all).await),
        (Ok(_), _) => Err("connections to real addresses are captured".to_owned()),
        (Err(why), _) => Err(why.clone()),
    };
    let answers = [
        (HttpQuery::Agent, status),
        (HttpQuery::Supervisor, supervisor),
        (HttpQuery::Server, server),
        (HttpQuery::Clusters, all),
        (HttpQuery::Unready, unready),
        (HttpQuery::Memory, memory),
        (HttpQuery::Warming, warming),
    ];
    (answers.into(), names, dialed, open, limits)
}

/// Reads the number of warming resources; a second time if it is not zero. Warming that ends within a second is normal.
async fn warming(envoy: &Peer) -> Observed<Value> {
    let read = async || -> Observed<u64> {
        let answer = get(envoy, "/stats?filter=warming&format=json").await?;
        let stats = answer.get("stats").and_then(Value::as_array);
        Ok(stats.into_iter().flatten().filter_map(|stat| stat.get("value")?.as_u64()).sum())
    };
    let first = read().await?;
    if first == 0 {
        return Ok(json!([0]));
    }
    sleep(Duration::from_secs(1)).await;
    Ok(json!([first, read().await?]))
}

/// Dials some endpoints of each service in parallel.
async fn dial(all: &Value) -> Vec<(String, SocketAddr, Observed<()>)> {
    let clusters = clusters(all);
    // Subset clusters contain the same endpoints as their service.
    let whole = clusters.iter().filter(|(name, _)| !name.contains('|'));
    let endpoints = whole
        .flat_map(|(name, all)| all.iter().filter_map(|endpoint| Some(((*name).to_owned(), endpoint.at?))));
    let mut dials = JoinSet::new();
    for (name, at) in endpoints.take(DIALED) {
        dials.spawn(async move {
            let result = match timeout(DIAL, TcpStream::connect(at)).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err(format!("no answer in {} ms", DIAL.as_millis())),
            };
            (name, at, result)
        });
    }
    let mut dialed = dials.join_all().await;
    dialed.sort_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
    dialed
}

/// Returns the names, with the resolver's result for one of them.
async fn names(outline: &Outline) -> (NameFacts, Option<Observed<CommandOutput>>) {
    let (resolver, wired) = super::super::dns::wiring(Path::new("/"));
    let mut names = NameFacts { resolver: resolver.to_owned(), wired, ..NameFacts::default() };
    let Some(server) = outline.dns else { return (names, None) };
    names.is_wired_as_configured = super::super::dns::is_wired_for(Path::new("/"), server, &outline.suffix);
    if let Ok(all) = agent_says(outline, "/names").await {
        names.all = serde_json::from_value(all).unwrap_or_default();
    }
    let with_address = { names.all.iter() }.find(|(_, addresses)| !addresses.is_empty());
    names.asked = with_address.map(|(name, _)| name.clone());
    let name = names.asked.clone().unwrap_or_else(|| format!("vmesh-doctor.{}", outline.suffix));
    let (answered, resolved) = tokio::join!(timeout(ANSWERS, probe::check_server(server, &name)), async {
        match &names.asked {
            Some(name) => Some(command("getent", &["ahosts", name]).await),
            None => None,
        }
    });
    names.answered = Some(match answered {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer in {} s", ANSWERS.as_secs())),
    });
    (names, resolved)
}

async fn capture(outline: Option<&Outline>) -> (Observed<Status>, Observed<String>) {
    let Some(outline) = outline.filter(|outline| outline.captures()) else {
        return (Err("nothing is to be captured".into()), Err("nothing is to be captured".into()));
    };
    let ask = async |ask: Request| match timeout(ANSWERS, client::ask(&outline.capture.socket, &ask)).await {
        Ok(Ok(Response::Refused(why))) => Err(format!("vmesh-net refused: {why}")),
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(one_line(&error)),
        Err(_) => Err(format!("vmesh-net has not answered in {} s", ANSWERS.as_secs())),
    };
    let (status, plan) = tokio::join!(ask(Request::Status), ask(Request::Plan { want: None }));
    let other = || "vmesh-net answered something else".to_owned();
    let status = status.and_then(|answer| match answer {
        Response::Status(status) => Ok(*status),
        _ => Err(other()),
    });
    let plan = plan.and_then(|answer| match answer {
        Response::Plan(plan) => Ok(plan),
        _ => Err(other()),
    });
    (status, plan)
}

async fn control_planes(outline: Option<&Outline>) -> Vec<Reachability> {
    let mut reaches = JoinSet::new();
    for (index, address) in outline.into_iter().flat_map(|outline| &outline.control_planes).enumerate() {
        let address = address.clone();
        reaches.spawn(async move { (index, reach(address).await) });
    }
    let mut reached = reaches.join_all().await;
    reached.sort_by_key(|(index, _)| *index);
    reached.into_iter().map(|(_, reach)| reach).collect()
}

async fn reach(address: String) -> Reachability {
    let slow = |what: &str| format!("{what} in {} s", BOUND.as_secs_f32());
    let began = Instant::now();
    let found = match timeout(BOUND, lookup_host(address.clone())).await {
        Ok(Ok(found)) => Ok(found.collect::<Vec<_>>()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(slow("not found")),
    };
    let found = match found {
        Ok(found) => found,
        Err(why) => return Reachability { address, resolved: Err(why), connected: Err("not tried".into()) },
    };
    let resolved = Ok(began.elapsed().as_millis());
    let began = Instant::now();
    let connected = match timeout(BOUND, TcpStream::connect(found.as_slice())).await {
        Ok(Ok(_)) => Ok(began.elapsed().as_millis()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(slow("none")),
    };
    Reachability { address, resolved, connected }
}

fn disks(outline: &Outline) -> Vec<Disk> {
    let mut dirs = vec![outline.state_dir.clone(), outline.run_dir.clone()];
    if outline.captures() {
        dirs.push("/var/lib/vmesh-net".into());
    }
    let disk = |dir: &PathBuf| {
        let stat = rustix::fs::statvfs(dir).ok()?;
        Some(Disk {
            path: dir.display().to_string(),
            free: stat.f_bavail.saturating_mul(stat.f_frsize),
            files_free: stat.f_ffree,
            files: stat.f_files,
            read_only: stat.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY),
        })
    };
    dirs.iter().filter_map(disk).collect()
}

fn modes(outline: Option<&Outline>) -> BTreeMap<String, Observed<Option<Ownership>>> {
    let mut paths = vec![PathBuf::from("/usr/lib/vmesh/bypass")];
    paths.extend(outline.map(Outline::admin_socket));
    let mode = |path: &PathBuf| match std::fs::metadata(path) {
        Ok(metadata) => {
            Ok(Some(Ownership { user: metadata.uid(), mode: metadata.permissions().mode() & 0o7777 }))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("could not look at {}: {error}", path.display())),
    };
    paths.iter().map(|path| (path.display().to_string(), mode(path))).collect()
}
