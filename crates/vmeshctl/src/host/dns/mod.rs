//! `vmeshctl dns`: makes this host's resolver forward the names of the mesh, and nothing else, to the agent.
//!
//! vmesh writes only files of its own, or between its own markers in `/etc/hosts`, so that `disable` can remove them at any time. The
//! suffix, the server and the agent's socket come from `agent.yaml`, by `vmesh-agent --check --json`.

mod change;
mod resolver;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};
use http::{Method, StatusCode};
use vmesh_daemon::fetch::{Peer, fetch, fetch_from_users};
use vmesh_daemon::fsx;
use vmesh_dns::host::{PLAIN_RESOLV_CONF, with_hosts_block, without_hosts_block};
use vmesh_dns::table::Suffix;
use vmesh_dns::{Addresses, Table, Zone};

use super::capture::run;
use super::doctor::{AgentConfig, read_configuration};
use super::{HostError, host_program};
use change::{DesiredFile, ResolverChange, foreign_names};
use resolver::{FILES, Resolver};

pub(crate) use resolver::{is_wired_for, wiring};

const HOSTS: &str = "/etc/hosts";
const MAX_FILE: u64 = 64 << 20;
/// The unit that keeps the block in `/etc/hosts` up to date.
const HOSTS_UNIT: &str = "vmesh-hosts.service";
/// The user of the agent. Answers from this user, from root and from the current user are trusted.
const AGENT_USER: &str = "vmesh-agent";
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// Interval at which `sync --watch` checks for changed names.
const SYNC_EVERY: Duration = Duration::from_secs(2);

/// The address of the agent's API.
#[derive(Debug, Clone, PartialEq, Eq)]
enum AgentAddress {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl std::str::FromStr for AgentAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<AgentAddress, String> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(AgentAddress::Unix(path.into())),
            _ => match text.parse() {
                Ok(address) => Ok(AgentAddress::Tcp(address)),
                Err(_) => Err("`unix:PATH` or an IP address and a port".to_owned()),
            },
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct DnsArgs {
    /// The agent's DNS server, if not `listen.dns` of its configuration.
    #[arg(long, global = true, value_name = "ADDRESS")]
    server: Option<SocketAddr>,
    /// The suffix of the mesh's names, if not `dns.suffix` of the agent's configuration.
    #[arg(long, global = true, value_name = "DOMAIN")]
    suffix: Option<Suffix>,
    /// The agent's API, if not the socket of its configuration: `unix:PATH`, or `ADDRESS:PORT`. A port is trusted only if it is root's, the
    /// agent's user's or your own.
    #[arg(long, global = true, value_name = "ADDRESS")]
    agent: Option<AgentAddress>,
    /// The configuration of the agent.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        default_value = "/etc/vmesh/agent.yaml",
        env = "VMESH_AGENT_CONFIG"
    )]
    config: PathBuf,
    /// The directory below which files are read and written. Nothing is restarted unless it is `/`.
    #[arg(long, global = true, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    #[command(subcommand)]
    action: Option<DnsAction>,
}

#[derive(Debug, Subcommand)]
enum DnsAction {
    /// Make the host's resolver forward names of the mesh to the agent.
    Enable {
        /// The resolver of this host.
        #[arg(long, value_enum, default_value = "auto")]
        resolver: Resolver,
        /// A name outside the mesh to check. The command rolls its change back if the host found the name before and does not afterwards.
        /// The host's control planes, time servers and package sources are always checked.
        #[arg(long, value_name = "NAME")]
        keep: Vec<String>,
    },
    /// Remove what `enable` and `sync` wrote.
    Disable {
        /// A name outside the mesh to check. The command rolls its change back if the host found the name before and does not afterwards.
        #[arg(long, value_name = "NAME")]
        keep: Vec<String>,
    },
    /// Write the agent's current names to /etc/hosts, for hosts with a plain resolv.conf.
    Sync {
        /// Keep running, and update the names every two seconds.
        #[arg(long)]
        watch: bool,
    },
}

/// The addresses and the suffix from the agent's configuration. Options of the command line take precedence.
#[derive(Debug, Clone)]
struct Settings {
    /// `None` if the agent's configuration has no DNS server.
    server: Option<SocketAddr>,
    suffix: Suffix,
    agent: AgentAddress,
    control_planes: Vec<String>,
}

impl Settings {
    /// Returns the agent's defaults, for a host without `agent.yaml`.
    fn built_in() -> Settings {
        Settings {
            server: Some(SocketAddr::from(([127, 0, 0, 1], 15053))),
            suffix: Suffix::default(),
            agent: AgentAddress::Unix("/run/vmesh/agent.sock".into()),
            control_planes: Vec::new(),
        }
    }

    async fn load(args: &DnsArgs) -> Result<Settings, HostError> {
        let mut settings = match read_configuration(&args.config).await {
            AgentConfig::Missing(_) => Settings::built_in(),
            AgentConfig::Refused(why) => {
                return Err(HostError::Cannot(format!(
                    "vmesh-agent refuses {}, which says the suffix and where names are answered: {why}",
                    args.config.display()
                )));
            }
            AgentConfig::Unreadable(why) => {
                return Err(HostError::Cannot(format!(
                    "{} says the suffix and where names are answered, and could not be read: {why}",
                    args.config.display()
                )));
            }
            AgentConfig::Read(outline) => Settings {
                server: outline.dns,
                suffix: outline.suffix.parse().map_err(|error| HostError::Cannot(format!("{error}")))?,
                agent: AgentAddress::Unix(outline.api_socket()),
                control_planes: outline.control_planes.clone(),
            },
        };
        settings.server = args.server.or(settings.server);
        if let Some(suffix) = &args.suffix {
            settings.suffix = suffix.clone();
        }
        if let Some(agent) = &args.agent {
            settings.agent = agent.clone();
        }
        Ok(settings)
    }
}

pub(crate) async fn dns(args: &DnsArgs) -> Result<String, HostError> {
    match &args.action {
        None => Ok(status(args)),
        Some(DnsAction::Enable { resolver, keep }) => {
            enable(args, &Settings::load(args).await?, *resolver, keep).await
        }
        // `disable` needs no configuration, since it removes the files that vmesh wrote.
        Some(DnsAction::Disable { keep }) => disable(args, keep),
        Some(DnsAction::Sync { watch: false }) => sync(&args.root, &Settings::load(args).await?).await,
        Some(DnsAction::Sync { watch: true }) => watch(args).await,
    }
}

/// Keeps the names in the hosts file up to date until the process is stopped. While the agent does not answer, the names stay.
async fn watch(args: &DnsArgs) -> Result<String, HostError> {
    let mut settings = Settings::load(args).await?;
    let mut read = modified(&args.config);
    let mut last = String::new();
    loop {
        let now = modified(&args.config);
        if now != read {
            match Settings::load(args).await {
                Ok(changed) => (settings, read) = (changed, now),
                Err(error) => print_once(&mut last, vmesh_daemon::report::one_line(&error)),
            }
        }
        match sync(&args.root, &settings).await {
            Ok(report) => {
                if !report.is_empty() {
                    print!("{report}");
                }
                last.clear();
            }
            Err(error) => print_once(&mut last, vmesh_daemon::report::one_line(&error)),
        }
        tokio::time::sleep(SYNC_EVERY).await;
    }
}

/// Prints a message, unless it is equal to the previous one.
fn print_once(last: &mut String, report: String) {
    if *last != report {
        eprintln!("{report}");
        *last = report;
    }
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}

fn path_below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn read(root: &Path, path: &str) -> Option<String> {
    let bytes = fsx::read_capped(&path_below(root, path), MAX_FILE).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn status(args: &DnsArgs) -> String {
    let (resolver, by) = wiring(&args.root);
    let by = by.map_or_else(|| "no: `vmeshctl dns enable`".to_owned(), |by| format!("by {by}"));
    format!("resolver      {resolver}\nasks vmesh    {by}\n")
}

async fn enable(
    args: &DnsArgs,
    settings: &Settings,
    resolver: Resolver,
    keep: &[String],
) -> Result<String, HostError> {
    let suffix = &settings.suffix;
    let Some(server) = settings.server else {
        return Err(HostError::Cannot(format!(
            "by {} the agent answers no names: let it capture outbound connections, or give it `listen: {{dns: \"127.0.0.1:15053\"}}`",
            args.config.display()
        )));
    };
    let wiring = match if resolver == Resolver::Auto { resolver::detect(&args.root) } else { resolver } {
        Resolver::Resolved => match resolver::for_this_resolved(&args.root, live(args), server, suffix) {
            // A resolver that cannot forward a single zone keeps its configuration: the names go into the hosts file instead.
            Err(HostError::Cannot(why)) if resolver == Resolver::Auto => {
                let report = enable_hosts(args, settings).await?;
                return Ok(format!("{why}\nSo the names go to {HOSTS}, as by `--resolver hosts`.\n{report}"));
            }
            wiring => wiring?,
        },
        Resolver::Dnsmasq => resolver::for_dnsmasq(server, suffix),
        Resolver::Hosts | Resolver::Auto => {
            return Ok(format!("{PLAIN_RESOLV_CONF}\n{}", enable_hosts(args, settings).await?));
        }
    };
    let names = live(args).then(|| foreign_names(&args.root, keep, &settings.control_planes));
    let files =
        wiring.files.into_iter().map(|(file, text)| (path_below(&args.root, file), DesiredFile::Text(text)));
    let report =
        ResolverChange { files: files.collect(), unit: wiring.unit, names: names.as_ref() }.apply()?;
    Ok(format!("{report}{} asks {server} for names below {suffix}\n", name_of(wiring.unit)))
}

fn name_of(unit: &str) -> &str {
    if unit == "dnsmasq" { Resolver::Dnsmasq.name() } else { Resolver::Resolved.name() }
}

async fn enable_hosts(args: &DnsArgs, settings: &Settings) -> Result<String, HostError> {
    let report = sync(&args.root, settings).await?;
    if live(args) {
        run(host_program("systemctl").args(["enable", "--now", HOSTS_UNIT]))?;
    }
    Ok(format!("{report}{HOSTS_UNIT} keeps the block up to date\n"))
}

fn live(args: &DnsArgs) -> bool {
    args.root == Path::new("/")
}

fn disable(args: &DnsArgs, keep: &[String]) -> Result<String, HostError> {
    let mut report = String::new();
    if live(args) {
        // Disabling fails if the unit is not enabled, which is fine.
        _ = run(host_program("systemctl").args(["disable", "--now", HOSTS_UNIT]));
    }
    let path = path_below(&args.root, HOSTS);
    if let Ok(hosts) = fsx::read_capped(&path, MAX_FILE) {
        let without =
            without_hosts_block(&hosts).map_err(|cause| HostError::Marks { path: path.clone(), cause })?;
        if without != hosts {
            replace(&path, &without)?;
            report += &format!("took the block of vmesh out of {}\n", path.display());
        }
    }
    let names = live(args).then(|| foreign_names(&args.root, keep, &[]));
    let mut failed = None;
    for unit in FILES.map(|(_, unit)| unit).into_iter().collect::<BTreeSet<_>>() {
        let files = FILES.into_iter().filter(|(_, of)| *of == unit);
        let files = files.map(|(file, _)| (path_below(&args.root, file), DesiredFile::Absent)).collect();
        match (ResolverChange { files, unit, names: names.as_ref() }).apply() {
            Ok(done) => report += &done,
            Err(error) => failed = Some(error),
        }
    }
    if let Some(error) = failed {
        print!("{report}");
        return Err(error);
    }
    if report.is_empty() {
        report.push_str("there was nothing of vmesh to take away\n");
    }
    Ok(report)
}

/// Replaces a file of the host. Follows a symbolic link, and keeps the owner and the mode.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), HostError> {
    let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let before = std::fs::metadata(&path).ok();
    let mode = before.as_ref().map_or(0o644, |before| before.permissions().mode() & 0o7777);
    fsx::write_atomically(&path, bytes, mode)?;
    if let Some(before) = before {
        // Only root may change the owner. Another user who can replace the file owns it already.
        _ = chown(&path, Some(before.uid()), Some(before.gid()));
    }
    Ok(())
}

/// Writes the agent's names to the hosts file, if they differ.
async fn sync(root: &Path, settings: &Settings) -> Result<String, HostError> {
    let names = names_of_agent(&settings.agent).await?;
    let path = path_below(root, HOSTS);
    let hosts = match fsx::read_capped(&path, MAX_FILE) {
        Ok(hosts) => hosts,
        Err(error) if error.is_not_found() => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let table = table(&settings.suffix, &names);
    let written = table.iter().count();
    if let (0, Some(other)) = (written, names.keys().next()) {
        return Err(HostError::Cannot(format!(
            "none of the agent's {} names ends with `.{}`: `{}` does not; the agent runs with another `dns.suffix` than its \
             configuration says by now (`systemctl restart vmesh-agent`), or `--suffix` is another",
            names.len(),
            settings.suffix,
            other.escape_default()
        )));
    }
    let with =
        with_hosts_block(&hosts, &table).map_err(|cause| HostError::Marks { path: path.clone(), cause })?;
    if with == hosts {
        return Ok(String::new());
    }
    replace(&path, &with)?;
    Ok(format!("wrote {written} names to {}\n", path.display()))
}

/// Returns the agent's names. Only an agent of root, of `vmesh-agent` or of this user is trusted: any user of the host could listen on a
/// port, and would control where the host's programs connect.
async fn names_of_agent(agent: &AgentAddress) -> Result<BTreeMap<String, Vec<IpAddr>>, HostError> {
    let users = trusted_users();
    let (peer, answer) = match agent {
        AgentAddress::Unix(path) => {
            (Peer::Unix(path.clone()), fetch_from_users(path, &users, "/names", ANSWERS_WITHIN).await)
        }
        AgentAddress::Tcp(address) => {
            let before = listeners_at(*address, &users)?;
            let answer = fetch(&Peer::Tcp(*address), Method::GET, "/names", ANSWERS_WITHIN).await;
            // The sockets whose owner was checked have answered, and no others.
            if listeners_at(*address, &users)? != before {
                return Err(HostError::Foreign(address.to_string()));
            }
            (Peer::Tcp(*address), answer)
        }
    };
    let (status, body) = answer.map_err(|error| HostError::Agent(Box::new(error)))?;
    match status {
        StatusCode::OK => serde_json::from_slice(&body).map_err(|_| HostError::Foreign(peer.to_string())),
        _ => Err(HostError::Foreign(peer.to_string())),
    }
}

/// Returns the ids of the users whose agent is trusted.
pub(crate) fn trusted_users() -> Vec<u32> {
    let mut users = vec![0, rustix::process::geteuid().as_raw()];
    let of_agent = |passwd: &str| {
        let fields = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
        fields
            .filter(|fields| fields.first() == Some(&AGENT_USER))
            .find_map(|fields| fields.get(2)?.parse::<u32>().ok())
    };
    // The package creates a local user. A user directory on the network could name another one, and could hang.
    let known = read(Path::new("/"), "/etc/passwd").as_deref().and_then(of_agent);
    users.extend(known.or_else(|| {
        let asked = run(host_program("timeout").args(["1", "getent", "passwd", AGENT_USER])).ok()?;
        of_agent(&asked)
    }));
    users.sort_unstable();
    users.dedup();
    users
}

/// Returns the inode numbers of the sockets that listen on `address`. Fails if another user owns one of them.
fn listeners_at(address: SocketAddr, users: &[u32]) -> Result<Vec<u64>, HostError> {
    let mut numbers = Vec::new();
    for file in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let table = std::fs::read_to_string(file).unwrap_or_default();
        for socket in vmesh_capture::sockets::parse(&table) {
            let ip = socket.local.ip();
            let takes = socket.listens()
                && socket.local.port() == address.port()
                && (ip.is_unspecified() || ip.to_canonical() == address.ip().to_canonical());
            if !takes {
                continue;
            }
            if !users.contains(&socket.user) {
                return Err(HostError::Cannot(format!(
                    "a program of user {} listens at {address}, who is not believed: only users {users:?} are; the agent is \
                     asked at `unix:PATH`, its `agent.sock`",
                    socket.user
                )));
            }
            numbers.push(socket.inode);
        }
    }
    Ok(numbers)
}

fn table(suffix: &Suffix, names: &BTreeMap<String, Vec<IpAddr>>) -> Table {
    let zone = Zone { suffix: suffix.clone(), ..Zone::default() };
    let ending = format!(".{suffix}");
    let entries = names.iter().filter_map(|(name, addresses)| {
        Some((name.strip_suffix(&ending)?, addresses.iter().copied().collect::<Addresses>()))
    });
    Table::new(zone, entries).0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(root: &Path) -> DnsArgs {
        DnsArgs {
            server: None,
            suffix: None,
            agent: None,
            config: "/no/such.yaml".into(),
            root: root.to_owned(),
            action: None,
        }
    }

    pub(super) fn root(files: &[(&str, &str)]) -> vmesh_testkit::TempDir {
        let root = vmesh_testkit::tempdir().unwrap();
        for (file, text) in files {
            let path = path_below(&root, file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    /// Returns every file below `root`, with its content.
    fn files(root: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let mut found = Vec::new();
        let mut dirs = vec![root.to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    dirs.push(path)
                } else {
                    found.push((path.clone(), std::fs::read(path).unwrap()))
                }
            }
        }
        found.sort();
        found
    }

    const STUB: &str = "nameserver 127.0.0.53\noptions edns0\n";

    #[tokio::test]
    async fn what_is_enabled_is_taken_away_without_a_trace() {
        for (resolver, dir) in
            [(Resolver::Resolved, "/etc/systemd/resolved.conf"), (Resolver::Dnsmasq, "/etc/dnsmasq.conf")]
        {
            let root =
                root(&[("/etc/resolv.conf", STUB), (dir, ""), ("/etc/hosts", "127.0.0.1 localhost\n")]);
            let before = files(&root);
            let settings = Settings::built_in();
            let report = enable(&ask(&root), &settings, resolver, &[]).await.unwrap();
            assert!(report.contains("wrote"), "{report}");
            assert!(files(&root).len() > before.len());
            let again = enable(&ask(&root), &settings, resolver, &[]).await.unwrap();
            assert!(!again.contains("wrote"), "{again}");
            disable(&ask(&root), &[]).unwrap();
            assert_eq!(files(&root), before);
            assert!(disable(&ask(&root), &[]).unwrap().contains("nothing"));
        }
    }

    #[test]
    fn a_hosts_file_that_is_a_link_stays_one_and_keeps_owner_and_mode() {
        let root = root(&[("/etc/real.hosts", "127.0.0.1 localhost\n")]);
        let (link, real) = (root.join("etc/hosts"), root.join("etc/real.hosts"));
        std::os::unix::fs::symlink("real.hosts", &link).unwrap();
        std::fs::set_permissions(&real, PermissionsExt::from_mode(0o664)).unwrap();
        replace(&link, b"127.0.0.1 other\n").unwrap();
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(std::fs::read(&real).unwrap(), b"127.0.0.1 other\n");
        assert_eq!(std::fs::metadata(&real).unwrap().permissions().mode() & 0o777, 0o664);
    }

    #[tokio::test]
    async fn suffix_and_server_are_those_of_the_settings() {
        let root = root(&[("/etc/dnsmasq.d/x", "")]);
        let settings = Settings {
            server: Some("127.0.0.1:5454".parse().unwrap()),
            suffix: "svc.corp".parse().unwrap(),
            ..Settings::built_in()
        };
        enable(&ask(&root), &settings, Resolver::Dnsmasq, &[]).await.unwrap();
        let written = std::fs::read_to_string(root.join("etc/dnsmasq.d/vmesh.conf")).unwrap();
        assert!(written.contains("server=/svc.corp/127.0.0.1#5454\n"), "{written}");
        let silent = Settings { server: None, ..settings };
        let report = enable(&ask(&root), &silent, Resolver::Dnsmasq, &[]).await.unwrap_err().to_string();
        assert!(report.contains("answers no names"), "{report}");
    }

    /// Answers one request with `body`.
    async fn answer(mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin, body: &str) {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut request = [0; 1024];
        _ = stream.read(&mut request).await;
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
        _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
    }

    #[tokio::test]
    async fn names_come_from_an_agent_of_a_user_who_is_believed_and_from_no_other() {
        let root = root(&[("/etc/hosts", "127.0.0.1 localhost\n")]);
        let path = root.join("agent.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        let me = rustix::process::geteuid().as_raw();
        let refused = listeners_at(address, &[me + 1]).unwrap_err().to_string();
        assert!(refused.contains(&format!("a program of user {me} listens at {address}")), "{refused}");
        let other = fetch_from_users(&path, &[me + 1], "/names", ANSWERS_WITHIN).await.unwrap_err();
        assert!(vmesh_daemon::report::one_line(&other).contains("who is not believed"));
        drop(listener.accept().await.unwrap());
        let names = r#"{"orders.mesh": ["240.0.0.1"], "a.b.mesh": ["240.0.0.2"]}"#;
        for agent in [AgentAddress::Unix(path), AgentAddress::Tcp(address)] {
            let settings = Settings { agent: agent.clone(), ..Settings::built_in() };
            let serve = async {
                match &agent {
                    AgentAddress::Unix(_) => answer(listener.accept().await.unwrap().0, names).await,
                    AgentAddress::Tcp(_) => answer(tcp.accept().await.unwrap().0, names).await,
                }
            };
            std::fs::write(root.join("etc/hosts"), "127.0.0.1 localhost\n").unwrap();
            let (report, ()) = tokio::join!(sync(&root, &settings), serve);
            assert!(report.unwrap().starts_with("wrote 2 names"));
            let hosts = std::fs::read_to_string(root.join("etc/hosts")).unwrap();
            assert!(hosts.contains("240.0.0.1 orders.mesh\n"), "{hosts}");
        }
        let settings = Settings {
            agent: AgentAddress::Tcp(address),
            suffix: "svc.corp".parse().unwrap(),
            ..Settings::built_in()
        };
        let (report, ()) = tokio::join!(sync(&root, &settings), async {
            answer(tcp.accept().await.unwrap().0, names).await;
        });
        assert!(
            report.unwrap_err().to_string().contains("none of the agent's 2 names ends with `.svc.corp`")
        );
    }

    #[test]
    fn an_agent_is_at_a_socket_or_at_a_port() {
        let parse = |text: &str| text.parse::<AgentAddress>();
        assert_eq!(parse("unix:/a.sock"), Ok(AgentAddress::Unix("/a.sock".into())));
        assert_eq!(parse("127.0.0.1:15020"), Ok(AgentAddress::Tcp("127.0.0.1:15020".parse().unwrap())));
        parse("unix:").unwrap_err();
        parse("localhost:1").unwrap_err();
    }

    #[test]
    fn the_names_of_an_agent_become_a_table() {
        let names = [
            ("orders.mesh".to_owned(), vec!["240.0.0.1".parse().unwrap()]),
            ("foreign.org".to_owned(), vec![]),
        ];
        let hosts = with_hosts_block(b"", &table(&Suffix::default(), &names.into())).unwrap();
        let hosts = String::from_utf8(hosts).unwrap();
        assert!(hosts.contains("240.0.0.1 orders.mesh\n") && !hosts.contains("foreign"), "{hosts}");
    }
}
