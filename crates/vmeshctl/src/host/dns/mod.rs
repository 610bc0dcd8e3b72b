//! `vmeshctl dns`: that this host's resolver asks the agent for names of the mesh, and for nothing else.
//!
//! What is written has its own file (or its own marks in `/etc/hosts`), so that it can be taken away whatever happened since.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use http::{Method, StatusCode};
use vmesh_daemon::fetch::{Peer, fetch};
use vmesh_daemon::fsx;
use vmesh_dns::host::{
    DNSMASQ, PLAIN_RESOLV_CONF, RESOLVED_DELEGATE, RESOLVED_DROP_IN, RESOLVED_NEGATIVE_ANCHOR, dnsmasq,
    resolved_delegate, resolved_drop_in, resolved_negative_anchor, with_hosts_block, without_hosts_block,
};
use vmesh_dns::table::Suffix;
use vmesh_dns::{Addresses, Table, Zone};

use super::HostError;
use super::capture::run;

const HOSTS: &str = "/etc/hosts";
const MAX_FILE: u64 = 64 << 20;
/// What keeps the block in `/etc/hosts`.
const HOSTS_UNIT: &str = "vmesh-hosts.service";

#[derive(Debug, Args)]
pub(crate) struct Dns {
    /// Where the agent answers names (`listen.dns`).
    #[arg(long, global = true, value_name = "ADDRESS", default_value = "127.0.0.1:15053")]
    server: SocketAddr,
    /// What names of the mesh end with (`dns.suffix`).
    #[arg(long, global = true, value_name = "DOMAIN", default_value = "mesh")]
    suffix: Suffix,
    /// The agent's API (`listen.api`).
    #[arg(long, global = true, value_name = "ADDRESS", default_value = "127.0.0.1:15020")]
    agent: SocketAddr,
    /// Files are below this directory, and nothing is restarted unless it is `/`.
    #[arg(long, global = true, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    #[command(subcommand)]
    say: Option<Say>,
}

#[derive(Debug, Subcommand)]
enum Say {
    /// Make the host's resolver ask the agent.
    Enable {
        /// Which one the host has.
        #[arg(long, value_enum, default_value = "auto")]
        resolver: Resolver,
    },
    /// Take away what `enable` and `sync` wrote.
    Disable,
    /// Write the names that the agent has now to /etc/hosts, for hosts with nothing but a plain resolv.conf.
    Sync {
        /// Go on doing so, every two seconds, where they change.
        #[arg(long)]
        watch: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Resolver {
    Auto,
    Resolved,
    Dnsmasq,
    Hosts,
}

/// What is to be written, and what is to be restarted then.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wiring {
    files: Vec<(&'static str, String)>,
    unit: &'static str,
}

pub(crate) async fn dns(ask: &Dns) -> Result<String, HostError> {
    match &ask.say {
        None => Ok(status(ask)),
        Some(Say::Enable { resolver }) => enable(ask, *resolver).await,
        Some(Say::Disable) => disable(ask),
        Some(Say::Sync { watch: false }) => sync(ask).await,
        Some(Say::Sync { watch: true }) => loop {
            // An agent that is away for a while leaves the names as they are.
            match sync(ask).await {
                Ok(said) if said.is_empty() => {}
                Ok(said) => print!("{said}"),
                Err(error) => eprintln!("{}", vmesh_daemon::report::one_line(&error)),
            }
            tokio::time::sleep(Duration::from_secs(2)).await;
        },
    }
}

fn at(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}

fn read(root: &Path, path: &str) -> Option<String> {
    let bytes = fsx::read_capped(&at(root, path), MAX_FILE).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn status(ask: &Dns) -> String {
    let (resolver, by) = wiring(&ask.root);
    let by = by.map_or_else(|| "no: `vmeshctl dns enable`".to_owned(), |by| format!("by {by}"));
    format!("resolver      {resolver}\nasks vmesh    {by}\n")
}

/// Which resolver the host has, and by what it is told to ask the agent.
pub(crate) fn wiring(root: &Path) -> (&'static str, Option<String>) {
    let files = [RESOLVED_DELEGATE, RESOLVED_DROP_IN, RESOLVED_NEGATIVE_ANCHOR, DNSMASQ];
    let written: Vec<_> = files.into_iter().filter(|file| at(root, file).exists()).collect();
    let hosts = read(root, HOSTS).is_some_and(|hosts| hosts.contains("# vmesh begin"));
    let by = match (written.is_empty(), hosts) {
        (false, _) => Some(written.join(", ")),
        (true, true) => Some(format!("the block of vmesh in {HOSTS}")),
        (true, false) => None,
    };
    (name(detect(root)), by)
}

fn name(resolver: Resolver) -> &'static str {
    match resolver {
        Resolver::Resolved => "systemd-resolved",
        Resolver::Dnsmasq => "dnsmasq",
        Resolver::Hosts | Resolver::Auto => "the C library alone, by /etc/resolv.conf",
    }
}

/// Which resolver this host asks.
fn detect(root: &Path) -> Resolver {
    let resolv = read(root, "/etc/resolv.conf").unwrap_or_default();
    let asks = |server: &str| {
        resolv.lines().any(|line| line.split_whitespace().collect::<Vec<_>>() == ["nameserver", server])
    };
    let nss = read(root, "/etc/nsswitch.conf").unwrap_or_default();
    let by_nss = nss.lines().any(|line| line.starts_with("hosts:") && line.contains("resolve"));
    let runs = at(root, "/run/systemd/resolve/stub-resolv.conf").exists();
    if runs && (asks("127.0.0.53") || asks("127.0.0.54") || by_nss) {
        Resolver::Resolved
    } else if at(root, "/etc/dnsmasq.d").is_dir() && (asks("127.0.0.1") || asks("::1")) {
        Resolver::Dnsmasq
    } else {
        Resolver::Hosts
    }
}

/// What the `DNS=` and `DNSSEC=` of resolved's configuration say, by file.
fn resolved_settings(root: &Path) -> Vec<(PathBuf, String)> {
    let dirs =
        ["/usr/lib/systemd/resolved.conf.d", "/run/systemd/resolved.conf.d", "/etc/systemd/resolved.conf.d"];
    let mut files = vec![at(root, "/etc/systemd/resolved.conf")];
    for dir in dirs {
        let entries = std::fs::read_dir(at(root, dir)).into_iter().flatten().flatten();
        files.extend(
            entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "conf")),
        );
    }
    let ours = at(root, RESOLVED_DROP_IN);
    files.retain(|file| *file != ours);
    files.sort();
    let mut settings = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        let lines = text.lines().map(str::trim).filter(|line| line.starts_with("DNS"));
        settings.extend(lines.map(|line| (file.clone(), line.to_owned())));
    }
    settings
}

/// `systemd 252 (252.38-1~deb12u1)`
fn resolved_version(said: &str) -> Option<u32> {
    said.split_whitespace().nth(1)?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// What makes systemd-resolved of this version, with these settings, ask for the zone.
fn for_resolved(
    version: u32,
    settings: &[(PathBuf, String)],
    server: SocketAddr,
    suffix: &Suffix,
) -> Result<Wiring, HostError> {
    let value = |line: &str, key: &str| {
        let value = line.strip_prefix(key)?.trim_start().strip_prefix('=')?.trim();
        (!value.is_empty()).then(|| value.to_owned())
    };
    let mut files = Vec::new();
    if version >= 258 {
        files.push((RESOLVED_DELEGATE, resolved_delegate(server, suffix)));
    } else {
        if let Some((file, line)) = settings.iter().find(|(_, line)| value(line, "DNS").is_some()) {
            return Err(HostError::Cannot(format!(
                "systemd-resolved {version} asks one server of its configuration for everything, and {} has `{line}`: move that \
                 server to a link (a .network file, `DNS=` there), or use systemd 258, or dnsmasq, or `--resolver hosts`",
                file.display()
            )));
        }
        files.push((RESOLVED_DROP_IN, resolved_drop_in(server, suffix)));
    }
    let validates =
        |line: &str| value(line, "DNSSEC").is_some_and(|value| ["yes", "true"].contains(&&*value));
    if settings.iter().any(|(_, line)| validates(line)) {
        files.push((RESOLVED_NEGATIVE_ANCHOR, resolved_negative_anchor(suffix)));
    }
    Ok(Wiring { files, unit: "systemd-resolved" })
}

async fn enable(ask: &Dns, resolver: Resolver) -> Result<String, HostError> {
    let resolver = if resolver == Resolver::Auto { detect(&ask.root) } else { resolver };
    let wiring = match resolver {
        Resolver::Resolved => {
            let version = match live(ask) {
                true => resolved_version(&run(Command::new("resolvectl").arg("--version"))?),
                false => Some(252),
            };
            let version =
                version.ok_or_else(|| HostError::Cannot("resolvectl does not say its version".to_owned()))?;
            for_resolved(version, &resolved_settings(&ask.root), ask.server, &ask.suffix)?
        }
        Resolver::Dnsmasq => {
            Wiring { files: vec![(DNSMASQ, dnsmasq(ask.server, &ask.suffix))], unit: "dnsmasq" }
        }
        Resolver::Hosts | Resolver::Auto => {
            let said = sync(ask).await?;
            if live(ask) {
                run(Command::new("systemctl").args(["enable", "--now", HOSTS_UNIT]))?;
            }
            return Ok(format!("{PLAIN_RESOLV_CONF}\n{said}{HOSTS_UNIT} keeps the block up to date\n"));
        }
    };
    let mut said = String::new();
    let mut changed = false;
    for (file, text) in &wiring.files {
        let path = at(&ask.root, file);
        if read(&ask.root, file).as_ref() == Some(text) {
            continue;
        }
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)
                .map_err(|cause| HostError::Run { command: format!("mkdir {}", dir.display()), cause })?;
        }
        // Resolvers have users of their own.
        fsx::write_atomically(&path, text.as_bytes(), 0o644)?;
        said += &format!("wrote {}\n", path.display());
        changed = true;
    }
    if changed && live(ask) {
        run(Command::new("systemctl").args(["restart", wiring.unit]))?;
        said += &format!("restarted {}\n", wiring.unit);
    }
    said += &format!("{} asks {} for names below {}\n", name(resolver), ask.server, ask.suffix);
    Ok(said)
}

fn live(ask: &Dns) -> bool {
    ask.root == Path::new("/")
}

fn disable(ask: &Dns) -> Result<String, HostError> {
    let mut said = String::new();
    let units = [
        (RESOLVED_DELEGATE, "systemd-resolved"),
        (RESOLVED_DROP_IN, "systemd-resolved"),
        (RESOLVED_NEGATIVE_ANCHOR, "systemd-resolved"),
        (DNSMASQ, "dnsmasq"),
    ];
    let mut restart = std::collections::BTreeSet::new();
    for (file, unit) in units {
        let path = at(&ask.root, file);
        match std::fs::remove_file(&path) {
            Ok(()) => {
                said += &format!("removed {}\n", path.display());
                restart.insert(unit);
                // The directory may have been made for it. One with something else in it stays.
                _ = path.parent().map(std::fs::remove_dir);
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(cause) => return Err(HostError::Remove { path, cause }),
        }
    }
    if live(ask) {
        // Where it never was enabled, that is what was wanted.
        _ = run(Command::new("systemctl").args(["disable", "--now", HOSTS_UNIT]));
    }
    let path = at(&ask.root, HOSTS);
    if let Ok(hosts) = fsx::read_capped(&path, MAX_FILE) {
        let without =
            without_hosts_block(&hosts).map_err(|cause| HostError::Marks { path: path.clone(), cause })?;
        if without != hosts {
            fsx::write_atomically(&path, &without, 0o644)?;
            said += &format!("took the block of vmesh out of {}\n", path.display());
        }
    }
    if live(ask) {
        for unit in restart {
            run(Command::new("systemctl").args(["try-restart", unit]))?;
            said += &format!("restarted {unit}\n");
        }
    }
    if said.is_empty() {
        said.push_str("there was nothing of vmesh to take away\n");
    }
    Ok(said)
}

/// Writes the agent's names to the hosts file, if they differ.
async fn sync(ask: &Dns) -> Result<String, HostError> {
    let peer = Peer::Tcp(ask.agent);
    let (status, body) = fetch(&peer, Method::GET, "/names", Duration::from_secs(5))
        .await
        .map_err(|error| HostError::Agent(Box::new(error)))?;
    let names: std::collections::BTreeMap<String, Vec<IpAddr>> = match status {
        StatusCode::OK => serde_json::from_slice(&body).map_err(|_| HostError::Foreign(peer.to_string()))?,
        _ => return Err(HostError::Foreign(peer.to_string())),
    };
    let path = at(&ask.root, HOSTS);
    let hosts = match fsx::read_capped(&path, MAX_FILE) {
        Ok(hosts) => hosts,
        Err(error) if error.is_not_found() => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let with = with_hosts_block(&hosts, &table(&ask.suffix, &names))
        .map_err(|cause| HostError::Marks { path: path.clone(), cause })?;
    if with == hosts {
        return Ok(String::new());
    }
    fsx::write_atomically(&path, &with, 0o644)?;
    Ok(format!("wrote {} names to {}\n", names.len(), path.display()))
}

fn table(suffix: &Suffix, names: &std::collections::BTreeMap<String, Vec<IpAddr>>) -> Table {
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

    fn ask(root: &Path) -> Dns {
        Dns {
            server: "127.0.0.1:15053".parse().unwrap(),
            suffix: Suffix::default(),
            agent: "127.0.0.1:1".parse().unwrap(),
            root: root.to_owned(),
            say: None,
        }
    }

    fn root(files: &[(&str, &str)]) -> PathBuf {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("vmeshctl-dns-{}-{number}", std::process::id()));
        _ = std::fs::remove_dir_all(&root);
        for (file, text) in files {
            let path = at(&root, file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    /// Every file below, with what is in it.
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

    #[test]
    fn the_resolver_of_a_host_is_told_by_what_it_asks() {
        let run = ("/run/systemd/resolve/stub-resolv.conf", STUB);
        assert_eq!(detect(&root(&[run, ("/etc/resolv.conf", STUB)])), Resolver::Resolved);
        let nss = ("/etc/nsswitch.conf", "hosts: files resolve [!UNAVAIL=return] dns\n");
        assert_eq!(
            detect(&root(&[run, nss, ("/etc/resolv.conf", "nameserver 10.0.0.2\n")])),
            Resolver::Resolved
        );
        let own = ("/etc/resolv.conf", "nameserver 127.0.0.1\n");
        assert_eq!(detect(&root(&[own, ("/etc/dnsmasq.d/README", "")])), Resolver::Dnsmasq);
        assert_eq!(detect(&root(&[("/etc/resolv.conf", "nameserver 10.0.0.2\n")])), Resolver::Hosts);
    }

    #[tokio::test]
    async fn what_is_enabled_is_taken_away_without_a_trace() {
        for (resolver, dir) in
            [(Resolver::Resolved, "/etc/systemd/resolved.conf"), (Resolver::Dnsmasq, "/etc/dnsmasq.conf")]
        {
            let root =
                root(&[("/etc/resolv.conf", STUB), (dir, ""), ("/etc/hosts", "127.0.0.1 localhost\n")]);
            let before = files(&root);
            let said = enable(&ask(&root), resolver).await.unwrap();
            assert!(said.contains("wrote"), "{said}");
            assert!(files(&root).len() > before.len());
            let again = enable(&ask(&root), resolver).await.unwrap();
            assert!(!again.contains("wrote"), "{again}");
            disable(&ask(&root)).unwrap();
            assert_eq!(files(&root), before);
            assert!(disable(&ask(&root)).unwrap().contains("nothing"));
        }
    }

    #[test]
    fn a_resolved_with_a_server_of_its_own_is_told_apart_and_one_that_validates_gets_an_anchor() {
        let server = "127.0.0.1:15053".parse().unwrap();
        let setting = |line: &str| vec![(PathBuf::from("/etc/systemd/resolved.conf"), line.to_owned())];
        let wiring = |version, line: &str| for_resolved(version, &setting(line), server, &Suffix::default());
        let refused = wiring(252, "DNS=10.0.0.2").unwrap_err().to_string();
        assert!(refused.contains("resolved.conf has `DNS=10.0.0.2`"), "{refused}");
        assert_eq!(wiring(258, "DNS=10.0.0.2").unwrap().files.len(), 1);
        assert_eq!(wiring(252, "DNS=").unwrap().files.len(), 1);
        assert_eq!(wiring(252, "DNSSEC=yes").unwrap().files.len(), 2);
        assert_eq!(wiring(252, "DNSSEC=no").unwrap().files.len(), 1);
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(resolved_version("systemd 252 (252.38-1~deb12u1)\n+PAM"), Some(252));
        assert_eq!(resolved_version("systemd 258~rc1"), Some(258));
        assert_eq!(resolved_version(""), None);
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
