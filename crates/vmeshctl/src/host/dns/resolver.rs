//! Detects the host's resolver, and produces the settings that make it forward one zone to the agent.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use vmesh_capture::sockets;
use vmesh_dns::host::{
    DNSMASQ, RESOLVED_DELEGATE, RESOLVED_DROP_IN, RESOLVED_NEGATIVE_ANCHOR, dnsmasq, resolved_delegate,
    resolved_drop_in, resolved_negative_anchor,
};
use vmesh_dns::table::Suffix;

use super::super::capture::run;
use super::super::{HostError, host_program};
use super::{HOSTS, path_below, read};

/// The port of DNS servers.
const DNS_PORT: u16 = 53;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Resolver {
    Auto,
    Resolved,
    Dnsmasq,
    Hosts,
}

impl Resolver {
    pub(super) fn name(self) -> &'static str {
        match self {
            Resolver::Resolved => "systemd-resolved",
            Resolver::Dnsmasq => "dnsmasq",
            Resolver::Hosts | Resolver::Auto => "the C library alone, by /etc/resolv.conf",
        }
    }
}

/// The files to write, and the unit to restart afterwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wiring {
    pub(super) files: Vec<(&'static str, String)>,
    pub(super) unit: &'static str,
}

/// Every file that a wiring may contain, with the unit that reads it.
pub(super) const FILES: [(&str, &str); 4] = [
    (RESOLVED_DELEGATE, "systemd-resolved"),
    (RESOLVED_DROP_IN, "systemd-resolved"),
    (RESOLVED_NEGATIVE_ANCHOR, "systemd-resolved"),
    (DNSMASQ, "dnsmasq"),
];

/// Reports whether vmesh wrote this text of one of [`FILES`]. Each starts with a mark.
pub(super) fn is_ours(text: &str) -> bool {
    text.lines()
        .next()
        .is_some_and(|line| line.trim_start_matches(['#', ';', ' ']).starts_with("Written by vmesh"))
}

/// Returns the resolver of the host, and the file by which it forwards to the agent, if there is one.
pub(crate) fn wiring(root: &Path) -> (&'static str, Option<String>) {
    let ours = |file: &&str| read(root, file).is_some_and(|text| is_ours(&text));
    let written: Vec<_> = FILES.into_iter().map(|(file, _)| file).filter(ours).collect();
    let hosts = read(root, HOSTS).is_some_and(|hosts| hosts.contains("# vmesh begin"));
    let by = match (written.is_empty(), hosts) {
        (false, _) => Some(written.join(", ")),
        (true, true) => Some(format!("the block of vmesh in {HOSTS}")),
        (true, false) => None,
    };
    (detect(root).name(), by)
}

/// Reports whether the host's resolver forwards this suffix to this server. The block in the hosts file is not checked, because its unit
/// reads the configuration itself.
pub(crate) fn is_wired_for(root: &Path, server: SocketAddr, suffix: &str) -> bool {
    let Ok(suffix) = suffix.parse::<Suffix>() else { return false };
    let texts = [
        (RESOLVED_DELEGATE, resolved_delegate(server, &suffix)),
        (RESOLVED_DROP_IN, resolved_drop_in(server, &suffix)),
        (DNSMASQ, dnsmasq(server, &suffix)),
    ];
    let mut written = texts.iter().filter_map(|(file, wanted)| Some((read(root, file)?, wanted)));
    written.all(|(text, wanted)| !is_ours(&text) || text.starts_with(wanted))
}

/// Returns the resolver that this host uses.
pub(super) fn detect(root: &Path) -> Resolver {
    let resolv = read(root, "/etc/resolv.conf").unwrap_or_default();
    let asks = |server: &str| {
        resolv.lines().any(|line| line.split_whitespace().collect::<Vec<_>>() == ["nameserver", server])
    };
    let nss = read(root, "/etc/nsswitch.conf").unwrap_or_default();
    let by_nss = nss.lines().any(|line| line.starts_with("hosts:") && line.contains("resolve"));
    let runs = path_below(root, "/run/systemd/resolve/stub-resolv.conf").exists();
    if runs && (asks("127.0.0.53") || asks("127.0.0.54") || by_nss) {
        Resolver::Resolved
    } else if path_below(root, "/etc/dnsmasq.d").is_dir()
        && (asks("127.0.0.1") || asks("::1"))
        // Unbound, BIND and others may listen there too, and do not read dnsmasq's files.
        && (root != Path::new("/") || dnsmasq_answers())
    {
        Resolver::Dnsmasq
    } else {
        Resolver::Hosts
    }
}

/// Reports whether dnsmasq's unit listens on port 53 of a loopback address.
fn dnsmasq_answers() -> bool {
    let show =
        host_program("systemctl").args(["show", "-p", "MainPID", "--value", "dnsmasq.service"]).output();
    let pid = show.ok().and_then(|output| String::from_utf8_lossy(&output.stdout).trim().parse::<u32>().ok());
    let Some(pid) = pid.filter(|pid| *pid > 0) else { return false };
    // Only root sees the sockets of other processes. For others, a running dnsmasq is assumed to listen there.
    let Ok(links) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return true };
    let links = links.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
    let open: Vec<u64> = links.filter_map(|link| sockets::inode(link.to_str()?)).collect();
    ["udp", "udp6"].iter().any(|table| {
        let text = std::fs::read_to_string(format!("/proc/net/{table}")).unwrap_or_default();
        sockets::parse(&text).any(|socket| {
            let ip = socket.local.ip();
            socket.local.port() == DNS_PORT
                && (ip.is_loopback() || ip.is_unspecified())
                && open.contains(&socket.inode)
        })
    })
}

/// Returns the settings for servers (`DNS=`, `FallbackDNS=`, `DNSSEC=`) in systemd-resolved's configuration, by file, without vmesh's own
/// file.
pub(super) fn resolved_settings(root: &Path) -> Vec<(PathBuf, String)> {
    let dirs =
        ["/usr/lib/systemd/resolved.conf.d", "/run/systemd/resolved.conf.d", "/etc/systemd/resolved.conf.d"];
    let mut files = vec![path_below(root, "/etc/systemd/resolved.conf")];
    for dir in dirs {
        let entries = std::fs::read_dir(path_below(root, dir)).into_iter().flatten().flatten();
        files.extend(
            entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "conf")),
        );
    }
    let ours = path_below(root, RESOLVED_DROP_IN);
    files.retain(|file| *file != ours);
    files.sort();
    let mut settings = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap_or_default();
        let lines = text.lines().map(str::trim);
        let lines = lines.filter(|line| line.starts_with("DNS") || line.starts_with("FallbackDNS"));
        settings.extend(lines.map(|line| (file.clone(), line.to_owned())));
    }
    settings
}

/// The servers of systemd-resolved, from `resolvectl status`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ResolvedServers {
    /// Servers of resolved's configuration, or of an `/etc/resolv.conf` that resolved did not write.
    global: Vec<String>,
    /// Servers that resolved uses only while it has no others.
    fallback: Vec<String>,
    /// The servers of all links.
    links: Vec<String>,
}

impl ResolvedServers {
    /// Parses the output of `resolvectl status`.
    pub(super) fn parse(status: &str) -> ResolvedServers {
        let mut servers = ResolvedServers::default();
        let mut of_link = false;
        let mut list = None;
        for line in status.lines() {
            let text = line.trim();
            if text.is_empty() {
                list = None;
                continue;
            }
            // Section headings are not indented.
            if line.starts_with("Global") || line.starts_with("Link ") || line.starts_with("Delegate ") {
                of_link = !line.starts_with("Global");
                list = None;
                continue;
            }
            let values = match text.split_once(": ") {
                Some(("DNS Servers", values)) => {
                    list = Some(false);
                    values
                }
                Some(("Fallback DNS Servers", values)) => {
                    list = Some(true);
                    values
                }
                Some(_) => {
                    list = None;
                    continue;
                }
                // A further server of the list above.
                None => text,
            };
            let Some(is_fallback) = list else { continue };
            let to = match (is_fallback, of_link) {
                (true, _) => &mut servers.fallback,
                (false, true) => &mut servers.links,
                (false, false) => &mut servers.global,
            };
            to.extend(values.split_whitespace().map(str::to_owned));
        }
        servers
    }

    /// Removes the servers that vmesh's drop-in names.
    pub(super) fn without_those_of(mut self, drop_in: &str) -> ResolvedServers {
        let ours: Vec<&str> = drop_in.lines().filter_map(|line| line.trim().strip_prefix("DNS=")).collect();
        self.global.retain(|server| !ours.contains(&server.as_str()));
        self
    }
}

/// Parses a version such as `systemd 252 (252.38-1~deb12u1)`.
fn resolved_version(printed: &str) -> Option<u32> {
    printed.split_whitespace().nth(1)?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn value<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let value = line.strip_prefix(key)?.trim_start().strip_prefix('=')?.trim();
    (!value.is_empty()).then_some(value)
}

/// Returns the settings for this host's systemd-resolved. With `live`, `resolvectl` may be run.
pub(super) fn for_this_resolved(
    root: &Path,
    live: bool,
    server: SocketAddr,
    suffix: &Suffix,
) -> Result<Wiring, HostError> {
    let (mut version, mut servers) = (Some(252), ResolvedServers::default());
    if live {
        version = resolved_version(&run(host_program("resolvectl").arg("--version"))?);
        let status = run(host_program("resolvectl").args(["status", "--no-pager"]))?;
        let drop_in = read(root, RESOLVED_DROP_IN).unwrap_or_default();
        servers = ResolvedServers::parse(&status).without_those_of(&drop_in);
    }
    let version =
        version.ok_or_else(|| HostError::Cannot("resolvectl does not say its version".to_owned()))?;
    for_resolved(version, &resolved_settings(root), &servers, server, suffix)
}

/// Returns the settings for a systemd-resolved of this version. Before version 258 the settings are a server in resolved's configuration.
/// With such a server, resolved uses neither `FallbackDNS=` nor the servers of an `/etc/resolv.conf` that it did not write
/// (resolved.conf(5)), so a host that needs those gets an error.
fn for_resolved(
    version: u32,
    settings: &[(PathBuf, String)],
    servers: &ResolvedServers,
    server: SocketAddr,
    suffix: &Suffix,
) -> Result<Wiring, HostError> {
    let mut files = Vec::new();
    if version >= 258 {
        files.push((RESOLVED_DELEGATE, resolved_delegate(server, suffix)));
    } else {
        let cannot = |why: String| {
            Err(HostError::Cannot(format!(
                "{why}: move that server to a link (a .network file, `DNS=` there), or use systemd 258, or dnsmasq, or \
                 `--resolver hosts`"
            )))
        };
        if let Some((file, line)) = settings.iter().find(|(_, line)| value(line, "DNS").is_some()) {
            return cannot(format!(
                "systemd-resolved {version} asks one server of its configuration for everything, and {} has `{line}`",
                file.display()
            ));
        }
        if let Some(global) = servers.global.first() {
            return cannot(format!(
                "systemd-resolved {version} asks {global}, a server of no link, which it would not ask any more once its \
                 configuration names a server"
            ));
        }
        let fallback = settings.iter().find_map(|(_, line)| value(line, "FallbackDNS"));
        let fallback = servers.fallback.first().map(String::as_str).or(fallback);
        if let (Some(fallback), true) = (fallback, servers.links.is_empty()) {
            return cannot(format!(
                "systemd-resolved {version} has no servers but those of `FallbackDNS=` ({fallback}), which it would not ask any \
                 more once its configuration names another"
            ));
        }
        files.push((RESOLVED_DROP_IN, resolved_drop_in(server, suffix)));
    }
    let validates = |line: &str| value(line, "DNSSEC").is_some_and(|value| ["yes", "true"].contains(&value));
    if settings.iter().any(|(_, line)| validates(line)) {
        files.push((RESOLVED_NEGATIVE_ANCHOR, resolved_negative_anchor(suffix)));
    }
    Ok(Wiring { files, unit: "systemd-resolved" })
}

/// Returns the settings for dnsmasq.
pub(super) fn for_dnsmasq(server: SocketAddr, suffix: &Suffix) -> Wiring {
    Wiring { files: vec![(DNSMASQ, dnsmasq(server, suffix))], unit: "dnsmasq" }
}

#[cfg(test)]
mod tests {
    use super::super::tests::root;
    use super::*;

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

    fn with(version: u32, lines: &[&str], servers: &ResolvedServers) -> Result<Wiring, HostError> {
        let file = PathBuf::from("/etc/systemd/resolved.conf");
        let settings: Vec<_> = lines.iter().map(|line| (file.clone(), (*line).to_owned())).collect();
        for_resolved(version, &settings, servers, "127.0.0.1:15053".parse().unwrap(), &Suffix::default())
    }

    #[test]
    fn a_resolved_with_a_server_of_its_own_is_told_apart_and_one_that_validates_gets_an_anchor() {
        let wiring = |version, line: &str| with(version, &[line], &ResolvedServers::default());
        let refused = wiring(252, "DNS=10.0.0.2").unwrap_err().to_string();
        assert!(refused.contains("resolved.conf has `DNS=10.0.0.2`"), "{refused}");
        assert_eq!(wiring(258, "DNS=10.0.0.2").unwrap().files.len(), 1);
        assert_eq!(wiring(252, "DNS=").unwrap().files.len(), 1);
        assert_eq!(wiring(252, "DNSSEC=yes").unwrap().files.len(), 2);
        assert_eq!(wiring(252, "DNSSEC=no").unwrap().files.len(), 1);
    }

    const OF_LINK: &str = "Global
         Protocols: +LLMNR +mDNS -DNSOverTLS DNSSEC=no/unsupported
  resolv.conf mode: stub
Current DNS Server: 127.0.0.1:15053
       DNS Servers: 127.0.0.1:15053
Fallback DNS Servers: 9.9.9.9 2620:fe::9

Link 2 (host0)
    Current Scopes: DNS LLMNR/IPv4
Current DNS Server: 10.0.0.2
       DNS Servers: 10.0.0.2
                    fd00::53
        DNS Domain: ~consul
";

    #[test]
    fn a_server_that_resolved_would_not_ask_any_more_is_no_place_for_a_drop_in() {
        let servers = ResolvedServers::parse(OF_LINK);
        let drop_in = resolved_drop_in("127.0.0.1:15053".parse().unwrap(), &Suffix::default());
        assert_eq!(servers.global, ["127.0.0.1:15053"]);
        assert_eq!(servers.fallback, ["9.9.9.9", "2620:fe::9"]);
        assert_eq!(servers.links, ["10.0.0.2", "fd00::53"]);
        // The links have servers, and the only configured server is ours.
        with(252, &["FallbackDNS=9.9.9.9"], &servers.clone().without_those_of(&drop_in)).unwrap();
        let refused = |lines: &[&str], servers: ResolvedServers| {
            let why = with(252, lines, &servers).unwrap_err().to_string();
            with(258, lines, &servers).unwrap();
            why
        };
        let foreign = ResolvedServers::parse("Global\nresolv.conf mode: foreign\nDNS Servers: 10.0.0.2\n");
        assert!(refused(&[], foreign).contains("asks 10.0.0.2, a server of no link"));
        let last = ResolvedServers::parse("Global\nFallback DNS Servers: 10.0.0.2\n\nLink 2 (eth0)\n");
        assert!(refused(&[], last).contains("`FallbackDNS=` (10.0.0.2)"));
        assert!(refused(&["FallbackDNS=10.0.0.3"], ResolvedServers::default()).contains("(10.0.0.3)"));
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(resolved_version("systemd 252 (252.38-1~deb12u1)\n+PAM"), Some(252));
        assert_eq!(resolved_version("systemd 258~rc1"), Some(258));
        assert_eq!(resolved_version(""), None);
    }

    #[test]
    fn a_resolver_that_is_told_of_another_suffix_or_server_is_told_apart() {
        let server = "127.0.0.1:15053".parse().unwrap();
        let text = dnsmasq(server, &Suffix::default()) + "# more\n";
        let root =
            root(&[(DNSMASQ, &text), (RESOLVED_DROP_IN, "# somebody else's\n[Resolve]\nDNS=10.0.0.2\n")]);
        assert!(is_wired_for(&root, server, "mesh"));
        assert!(!is_wired_for(&root, server, "svc.corp"));
        assert!(!is_wired_for(&root, "127.0.0.1:5454".parse().unwrap(), "mesh"));
        // By the block in the hosts file alone.
        std::fs::remove_file(root.join(&DNSMASQ[1..])).unwrap();
        assert!(is_wired_for(&root, server, "svc.corp"));
    }

    #[test]
    fn what_somebody_else_wrote_is_not_taken_for_ours() {
        let server = "127.0.0.1:15053".parse().unwrap();
        let suffix = Suffix::default();
        for ours in [
            dnsmasq(server, &suffix),
            resolved_drop_in(server, &suffix),
            resolved_delegate(server, &suffix),
            resolved_negative_anchor(&suffix),
        ] {
            assert!(is_ours(&ours), "{ours}");
        }
        for other in ["", "server=/corp/10.0.0.1\n# Written by vmesh", "# by Puppet, for vmesh\n"] {
            assert!(!is_ours(other), "{other}");
        }
    }
}
