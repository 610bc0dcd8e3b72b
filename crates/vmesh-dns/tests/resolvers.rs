//! Tests with third-party resolvers: ldns's drill, and dnsmasq and systemd-resolved forwarding to the server.

#![expect(clippy::indexing_slicing, clippy::panic, clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use expect_test::{Expect, expect};
use tokio::net::{TcpListener, UdpSocket};
use vmesh_dns::host;
use vmesh_dns::server::Limits;
use vmesh_dns::table::Suffix;
use vmesh_testkit::debian::{self, Deb};
use vmesh_testkit::netns::{Host, Switch};
use vmesh_testkit::process::Daemon;
use vmesh_testkit::{Loopback, TempDir, tempdir, wait_for};

use common::{Server, table};

mod common;

const BOUND: Duration = Duration::from_secs(60);

const fn deb(path: &'static str, sha256: &'static str) -> Deb {
    Deb { path, sha256 }
}

const DRILL: &[Deb] = &[
    deb(
        "pool/main/l/ldns/ldnsutils_1.8.3-1+b1_amd64.deb",
        "6970a1efc922d6c4167afb261cf4db71814119a6d76613da70a82fd6fe63f949",
    ),
    deb(
        "pool/main/l/ldns/libldns3_1.8.3-1+b1_amd64.deb",
        "6eff5c921118198306274008fa49f4015fdfcb562dd7416df0eee04a0ab1100d",
    ),
];

const DNSMASQ: &[Deb] = &[
    deb(
        "pool/main/d/dnsmasq/dnsmasq-base_2.90-4~deb12u2_amd64.deb",
        "77f56034a23b200c9787d3d9b423030a1e95618f476e011d988daacc19919bc1",
    ),
    deb(
        "pool/main/d/dbus/libdbus-1-3_1.14.10-1~deb12u1_amd64.deb",
        "18ee0ce5fab9f7b671e87da1e9fa18660e36e04a3402f24bdb8635e0ba1d35f6",
    ),
    deb(
        "pool/main/libn/libnetfilter-conntrack/libnetfilter-conntrack3_1.0.9-3_amd64.deb",
        "65f1539238f60fcc85d115acd640474f45c77bfddcf402eb7d75965a783c2bc8",
    ),
    deb(
        "pool/main/libn/libnfnetlink/libnfnetlink0_1.0.2-2_amd64.deb",
        "ae5cbba417ea48f34c1f72c27e8146a81f20614c1296bca2cd7234c8215fddcc",
    ),
    deb(
        "pool/main/n/nftables/libnftables1_1.0.6-2+deb12u2_amd64.deb",
        "3a8223f9bfba99d97bf25296ac83de307ab036e1df63e5965f88809266851947",
    ),
    deb(
        "pool/main/libn/libnftnl/libnftnl11_1.2.4-2_amd64.deb",
        "9e619e1470a1915264e906020f3bfc046fd8458043b1342686d997b5078213af",
    ),
    deb(
        "pool/main/libm/libmnl/libmnl0_1.0.4-3_amd64.deb",
        "4581f42e3373cb72f9ea4e88163b17873afca614a6c6f54637e95aa75983ea7c",
    ),
    deb(
        "pool/main/j/jansson/libjansson4_2.14-2_amd64.deb",
        "3fc9742f9f1a37bcb9931df6074b4d1483419ef832ad5349f47323e75fc27864",
    ),
    deb(
        "pool/main/g/gmp/libgmp10_6.2.1+dfsg1-1.1_amd64.deb",
        "187aedef2ed763f425c1e523753b9719677633c7eede660401739e9c893482bd",
    ),
    deb(
        "pool/main/n/nettle/libhogweed6_3.8.1-2_amd64.deb",
        "ed8185c28b2cb519744a5a462dcd720d3b332c9b88a1d0002eac06dc8550cb94",
    ),
    deb(
        "pool/main/n/nettle/libnettle8_3.8.1-2_amd64.deb",
        "45922e6e289ffd92f0f92d2bb9159e84236ff202d552a461bf10e5335b3f0261",
    ),
];

const RESOLVED: &[Deb] = &[
    deb(
        "pool/main/s/systemd/systemd-resolved_252.39-1~deb12u2_amd64.deb",
        "40c94e9ce1a1f77806eeccfaf701392acb60df51412be9e8f124f5ebf4443335",
    ),
    deb(
        "pool/main/s/systemd/libsystemd-shared_252.39-1~deb12u2_amd64.deb",
        "01458465c816b9eb63b92241869ddb46f332b8f498cf7a5979b84ec293cfdfda",
    ),
];

/// Returns the installed `program`, or else one unpacked from `debs`.
fn program(name: &str, cached: &str, path: &str, debs: &[Deb]) -> Command {
    if let (false, Some(program)) = (debian::is_provided(debs), debian::on_path(name)) {
        return Command::new(program);
    }
    let root = debian::unpacked(cached, debs).unwrap_or_else(|failed| {
        panic!("{failed}; or, where it is not systemd-resolved: `apt-get install ldnsutils dnsmasq-base`")
    });
    let mut command = Command::new(root.join(path));
    let libraries: Vec<PathBuf> =
        ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].iter().map(|dir| root.join(dir)).collect();
    command.env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap());
    command
}

/// Returns the command to be run on another host.
fn on_host(host: &Host, command: Command) -> Command {
    let mut there = host.command(command.get_program());
    there.args(command.get_args());
    there.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    there
}

/// Returns drill's output without its variable parts: status, flags and records, with TTLs of 1 to 5 normalised.
fn drill(server: SocketAddr, arguments: &str) -> String {
    drilled(server, arguments, |drill| drill)
}

fn drilled(server: SocketAddr, arguments: &str, place: impl FnOnce(Command) -> Command) -> String {
    let mut drill = program("drill", "ldnsutils-1.8.3", "usr/bin/drill", DRILL);
    drill.args(["-p", &server.port().to_string(), &format!("@{}", server.ip())]).args(arguments.split(' '));
    let output = place(drill).output().unwrap();
    let (message, complained) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "drill {arguments}: {message}{complained}");
    let mut shown = String::new();
    for line in message.lines() {
        let line = line.trim();
        if let Some((_, status)) = line.split_once("rcode: ") {
            shown.push_str(status.split(',').next().unwrap());
        } else if let Some(flags) = line.strip_prefix(";; flags: ") {
            shown.push_str(&format!(" [{}]\n", flags.split(" ;").next().unwrap()));
        } else if let Some(edns) = line.strip_prefix(";; EDNS: ") {
            shown.push_str(&format!("  EDNS {edns}\n"));
        } else if !line.starts_with(';') && !line.is_empty() {
            let words: Vec<_> = line.split_whitespace().collect();
            let ttl: u32 = words[1].parse().unwrap();
            let ttl = if ttl <= 5 { "t".to_owned() } else { ttl.to_string() };
            shown.push_str(&format!("  {} {ttl} {}\n", words[0], words[2..].join(" ")));
        }
    }
    shown
}

fn check(server: SocketAddr, questions: &[&str], expected: Expect) {
    let shown = questions.iter().map(|question| format!("{question}\n{}", drill(server, question)));
    expected.assert_eq(&shown.collect::<String>());
}

fn names() -> vmesh_dns::Table {
    let many: String = (1..=100).map(|n| format!(" 240.9.9.{n}")).collect();
    table(&format!(
        "orders 240.0.0.1 fd76:6d65:7368::1\npayments.v2 240.0.0.2\nv6only fd76:6d65:7368::3\nmany{many}"
    ))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_resolver_understands_what_it_is_told_over_udp_and_tcp() {
    let server = Server::start(names(), Limits::default()).await;
    check(
        server.address,
        &[
            "-u orders.mesh A",
            "-t orders.mesh A",
            "-u OrDeRs.mEsH AAAA",
            "-t orders.mesh AAAA",
            "-u -b 4096 -D orders.mesh A",
            "-u payments.v2.mesh AAAA",
            "-u v2.mesh A",
            "-u v6only.mesh A",
            "-t orders.mesh HTTPS",
            "-u orders.mesh ANY",
            "-u nope.mesh A",
            "-t nope.mesh AAAA",
            "-u mesh SOA",
            "-u example.com A",
            "-t example.com AAAA",
            "-u mesh.example.com A",
        ],
        expect![[r#"
            -u orders.mesh A
            NOERROR [qr aa rd]
              orders.mesh. t IN A 240.0.0.1
            -t orders.mesh A
            NOERROR [qr aa rd]
              orders.mesh. t IN A 240.0.0.1
            -u OrDeRs.mEsH AAAA
            NOERROR [qr aa rd]
              OrDeRs.mEsH. t IN AAAA fd76:6d65:7368::1
            -t orders.mesh AAAA
            NOERROR [qr aa rd]
              orders.mesh. t IN AAAA fd76:6d65:7368::1
            -u -b 4096 -D orders.mesh A
            NOERROR [qr aa rd]
              orders.mesh. t IN A 240.0.0.1
              EDNS version 0; flags: do ; udp: 1232
            -u payments.v2.mesh AAAA
            NOERROR [qr aa rd]
              mesh. t IN SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            -u v2.mesh A
            NOERROR [qr aa rd]
              mesh. t IN SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            -u v6only.mesh A
            NOERROR [qr aa rd]
              mesh. t IN SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            -t orders.mesh HTTPS
            NOERROR [qr aa rd]
              mesh. t IN SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            -u orders.mesh ANY
            NOERROR [qr aa rd]
              orders.mesh. t IN A 240.0.0.1
            -u nope.mesh A
            NXDOMAIN [qr aa rd]
              mesh. t IN SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            -t nope.mesh AAAA
            NXDOMAIN [qr aa rd]
              mesh. t IN SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            -u mesh SOA
            NOERROR [qr aa rd]
              mesh. t IN SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            -u example.com A
            REFUSED [qr rd]
            -t example.com AAAA
            REFUSED [qr rd]
            -u mesh.example.com A
            REFUSED [qr rd]
        "#]],
    );
    // The answer does not fit into a datagram: the TC bit is set over UDP, and the resolver repeats its query over TCP.
    assert_eq!(drill(server.address, "-u many.mesh A"), "NOERROR [qr aa tc rd]\n");
    let counted = server.counts.tcp.load(Ordering::Relaxed);
    for arguments in ["-t many.mesh A", "-a many.mesh A"] {
        let whole = drill(server.address, arguments);
        assert_eq!(whole.matches(" t IN A 240.9.9.").count(), 100, "{arguments}: {whole}");
    }
    assert!(server.counts.tcp.load(Ordering::Relaxed) > counted);
    server.stop().await;
}

async fn started(dnsmasq: &Daemon) {
    let started = async || {
        let message = dnsmasq.output();
        if message.contains("started, version") { Ok(()) } else { Err(message) }
    };
    wait_for("dnsmasq to start", BOUND, started).await.unwrap();
}

/// A dnsmasq that knows one name of its own, with the configuration `lines`.
struct Dnsmasq {
    address: SocketAddr,
    daemon: Daemon,
    _place: Loopback,
    _dir: TempDir,
}

impl Dnsmasq {
    async fn start(lines: &str) -> Dnsmasq {
        let (place, dir) = (Loopback::unique().unwrap(), tempdir().unwrap());
        let address = SocketAddr::new(place.ip(), place.port().unwrap());
        let path = dir.join("dnsmasq.conf");
        let text = format!(
            "port={}\nlisten-address={}\nbind-interfaces\nno-resolv\nno-hosts\nno-daemon\nuser=root\ngroup=root\n\
             stop-dns-rebind\nlog-queries\nlog-facility=-\nhost-record=db.example.com,192.0.2.7\n{lines}",
            address.port(),
            address.ip()
        );
        std::fs::write(&path, text).unwrap();
        let mut command = program("dnsmasq", "dnsmasq-2.90", "usr/sbin/dnsmasq", DNSMASQ);
        command.arg(format!("--conf-file={}", path.display()));
        let daemon = Daemon::spawn("dnsmasq", command).unwrap();
        let dnsmasq = Dnsmasq { address, daemon, _place: place, _dir: dir };
        started(&dnsmasq.daemon).await;
        dnsmasq
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dnsmasq_forwards_the_zone_and_nothing_else() {
    let server = Server::start(names(), Limits::default()).await;
    let dnsmasq = Dnsmasq::start(&host::dnsmasq(server.address, &Suffix::default())).await;
    check(
        dnsmasq.address,
        &[
            "-u orders.mesh A",
            "-t orders.mesh AAAA",
            "-u V6Only.mesh AAAA",
            "-u v6only.mesh A",
            "-u nope.mesh A",
            "-u db.example.com A",
            "-u example.com A",
        ],
        expect![[r#"
            -u orders.mesh A
            NOERROR [qr aa rd ra]
              orders.mesh. t IN A 240.0.0.1
            -t orders.mesh AAAA
            NOERROR [qr aa rd ra]
              orders.mesh. t IN AAAA fd76:6d65:7368::1
            -u V6Only.mesh AAAA
            NOERROR [qr aa rd ra]
              V6Only.mesh. t IN AAAA fd76:6d65:7368::3
            -u v6only.mesh A
            NOERROR [qr aa rd ra]
              mesh. t IN SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            -u nope.mesh A
            NXDOMAIN [qr aa rd ra]
              mesh. t IN SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            -u db.example.com A
            NOERROR [qr aa rd ra]
              db.example.com. t IN A 192.0.2.7
            -u example.com A
            REFUSED [qr rd ra]
        "#]],
    );
    let whole = drill(dnsmasq.address, "-t many.mesh A");
    assert_eq!(whole.matches(" t IN A 240.9.9.").count(), 100, "{whole}");
    let forwarded = dnsmasq.daemon.output();
    let others = forwarded.lines().filter(|line| line.contains("forwarded ") && !line.contains(".mesh to "));
    assert_eq!(others.collect::<Vec<_>>(), <[&str; 0]>::default());

    // A change becomes visible once dnsmasq's cached answer has expired.
    server.tables.send_replace(Arc::new(table("orders 240.0.0.77")));
    let moved = async || {
        let shown = drill(dnsmasq.address, "-u orders.mesh A");
        if shown.contains(" A 240.0.0.77") { Ok(()) } else { Err(shown) }
    };
    wait_for("the change behind dnsmasq", BOUND, moved).await.unwrap();
    server.stop().await;
}

/// Shows the purpose of the second line that [`host::dnsmasq`] returns.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dnsmasq_drops_virtual_addresses_for_rebinding_unless_it_is_told() {
    let server = Server::start(names(), Limits::default()).await;
    let ours = host::dnsmasq(server.address, &Suffix::default());
    let without: String = ours
        .lines()
        .filter(|line| !line.starts_with("rebind-domain-ok"))
        .map(|line| format!("{line}\n"))
        .collect();
    let dnsmasq = Dnsmasq::start(&without).await;
    let v6: IpAddr = "fd76:6d65:7368::1".parse().unwrap();
    assert!(!drill(dnsmasq.address, "-u orders.mesh AAAA").contains(&v6.to_string()));
    // dnsmasq answers before it logs the reason.
    let says_why = async || {
        let message = dnsmasq.daemon.output();
        if message.contains("possible DNS-rebind attack") { Ok(()) } else { Err(message) }
    };
    wait_for("dnsmasq to say why", BOUND, says_why).await.unwrap();
    server.stop().await;
}

/// A host with its own systemd-resolved, our server at 127.0.0.1:15053, and a foreign name server that knows `db.example.com` and answers
/// NXDOMAIN for any other name.
struct ResolvedHost {
    host: Host,
    ours: Server,
    resolved: Daemon,
    dir: TempDir,
    _elsewhere: (Switch, Host, Daemon, TempDir),
}

/// The place where the foreign name server is configured.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ForeignServer {
    /// The server is set on the link, as by DHCP or a `.network` file.
    Link,
    /// `DNS=` in `/etc/systemd/resolved.conf`.
    Global,
}

impl ResolvedHost {
    /// Starts the host. `main` is added to resolved.conf, and `files` are created below /etc.
    async fn start(other: ForeignServer, main: &str, files: &[(&str, String)]) -> ResolvedHost {
        let switch = Switch::new().unwrap();
        let (host, elsewhere) = (switch.host().unwrap(), switch.host().unwrap());
        let [other_ip, _] = elsewhere.addresses();
        let other_dir = tempdir().unwrap();
        let conf = other_dir.join("dnsmasq.conf");
        let text = "port=53\nno-resolv\nno-hosts\nno-daemon\nuser=root\ngroup=root\nlog-queries\nlog-facility=-\n\
                    host-record=db.example.com,192.0.2.7\naddress=/#/\nlocal-ttl=1\n";
        std::fs::write(&conf, text).unwrap();
        let mut dnsmasq = program("dnsmasq", "dnsmasq-2.90", "usr/sbin/dnsmasq", DNSMASQ);
        dnsmasq.arg(format!("--conf-file={}", conf.display()));
        let dnsmasq = Daemon::spawn("dnsmasq", on_host(&elsewhere, dnsmasq)).unwrap();
        started(&dnsmasq).await;

        let bind = || {
            let udp = std::net::UdpSocket::bind("127.0.0.1:15053").unwrap();
            (udp, std::net::TcpListener::bind("127.0.0.1:15053").unwrap())
        };
        let (udp, tcp) = host.within(bind).unwrap();
        udp.set_nonblocking(true).unwrap();
        tcp.set_nonblocking(true).unwrap();
        let (udp, tcp) = (UdpSocket::from_std(udp).unwrap(), TcpListener::from_std(tcp).unwrap());
        let ours = Server::of(udp, tcp, names(), Limits::default());

        let dir = tempdir().unwrap();
        for below in ["etc/systemd", "run/systemd/netif/links", "run/systemd/resolve"] {
            std::fs::create_dir_all(dir.join(below)).unwrap();
        }
        let global = if other == ForeignServer::Global { format!("DNS={other_ip}\n") } else { String::new() };
        let main = format!("[Resolve]\nLLMNR=no\nMulticastDNS=no\n{global}{main}");
        std::fs::write(dir.join("etc/systemd/resolved.conf"), main).unwrap();
        for (path, text) in files {
            let path = dir.join(path.strip_prefix('/').unwrap());
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        if other == ForeignServer::Link {
            let links = host.run("ip", &["-o", "-4", "addr", "show", "up", "scope", "global"]).unwrap();
            let index = links.split(':').next().unwrap().trim().to_owned();
            let state = format!("ADMIN_STATE=configured\nOPER_STATE=routable\nDNS={other_ip}\n");
            std::fs::write(dir.join("run/systemd/netif/links").join(index), state).unwrap();
        }
        for (file, entry) in
            [("passwd", "systemd-resolve:x:0:0::/:/bin/false\n"), ("group", "systemd-resolve:x:0:\n")]
        {
            std::fs::write(dir.join("etc").join(file), entry).unwrap();
        }
        // A mount namespace of its own makes its files private; `exec` ties its lifetime to the test.
        let script = "set -e; d=$1; shift; mount --bind $d/etc /etc; mount --bind $d/run /run; exec \"$@\"";
        let resolved =
            program("systemd-resolved", "systemd-resolved-252", "lib/systemd/systemd-resolved", RESOLVED);
        let mut command = host.command("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]);
        command.arg(&*dir).arg(resolved.get_program());
        let root = PathBuf::from(resolved.get_program()).ancestors().nth(3).unwrap().to_owned();
        let libraries =
            ["usr/lib/x86_64-linux-gnu/systemd", "lib/x86_64-linux-gnu/systemd"].map(|dir| root.join(dir));
        command.env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap());
        command.env("SYSTEMD_LOG_TARGET", "console").env("SYSTEMD_LOG_LEVEL", "debug");
        let resolved = Daemon::spawn("systemd-resolved", command).unwrap();
        let host =
            ResolvedHost { host, ours, resolved, dir, _elsewhere: (switch, elsewhere, dnsmasq, other_dir) };
        let up = async || {
            // systemd-resolved logs this once its stub listens and all its files are read.
            let up = host.resolved.output().contains("Using system hostname");
            if up && host.dir.join("run/systemd/resolve/stub-resolv.conf").exists() {
                Ok(())
            } else {
                Err(host.resolved.output())
            }
        };
        wait_for("systemd-resolved to start", BOUND, up).await.unwrap();
        host
    }

    fn check(&self, questions: &[&str], expected: Expect) {
        let shown = questions.iter().map(|question| format!("{question}\n{}", self.drill(question)));
        expected.assert_eq(&shown.collect::<String>());
    }

    fn drill(&self, arguments: &str) -> String {
        let stub = "127.0.0.53:53".parse().unwrap();
        drilled(stub, arguments, |drill| on_host(&self.host, drill))
    }
}

fn drop_in() -> (&'static str, String) {
    (host::RESOLVED_DROP_IN, host::resolved_drop_in("127.0.0.1:15053".parse().unwrap(), &Suffix::default()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn systemd_resolved_asks_us_for_the_zone_and_its_links_for_the_rest() {
    let host = ResolvedHost::start(ForeignServer::Link, "", &[drop_in()]).await;
    host.check(
        &[
            "-u orders.mesh A",
            "-t orders.mesh AAAA",
            "-u OrDeRs.mEsH A",
            "-u v6only.mesh A",
            "-u v6only.mesh AAAA",
            "-u v2.mesh A",
            "-u nope.mesh A",
            "-u db.example.com A",
            "-u nope.example.com A",
        ],
        expect![[r#"
            -u orders.mesh A
            NOERROR [qr rd ra]
              orders.mesh. t IN A 240.0.0.1
            -t orders.mesh AAAA
            NOERROR [qr rd ra]
              orders.mesh. t IN AAAA fd76:6d65:7368::1
            -u OrDeRs.mEsH A
            NOERROR [qr rd ra]
              OrDeRs.mEsH. t IN A 240.0.0.1
            -u v6only.mesh A
            NOERROR [qr rd ra]
              mesh. t IN SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            -u v6only.mesh AAAA
            NOERROR [qr rd ra]
              v6only.mesh. t IN AAAA fd76:6d65:7368::3
            -u v2.mesh A
            NOERROR [qr rd ra]
              mesh. t IN SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            -u nope.mesh A
            NXDOMAIN [qr rd ra]
              mesh. t IN SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            -u db.example.com A
            NOERROR [qr rd ra]
              db.example.com. t IN A 192.0.2.7
            -u nope.example.com A
            NXDOMAIN [qr rd ra]
        "#]],
    );
    let whole = host.drill("-t many.mesh A");
    assert_eq!(whole.matches(" t IN A 240.9.9.").count(), 100, "{whole}");
    host.ours.tables.send_replace(Arc::new(table("orders 240.0.0.77")));
    let moved = async || {
        let shown = host.drill("-u orders.mesh A");
        if shown.contains(" A 240.0.0.77") { Ok(()) } else { Err(shown) }
    };
    wait_for("the change behind systemd-resolved", BOUND, moved).await.unwrap();
}

/// Shows the side effect that the drop-in's documentation warns of: the servers form one list, and the first one is believed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn systemd_resolved_does_not_keep_apart_servers_in_its_own_files() {
    let host = ResolvedHost::start(ForeignServer::Global, "", &[drop_in()]).await;
    host.check(
        &["-u orders.mesh A", "-u db.example.com A"],
        expect![[r#"
        -u orders.mesh A
        NXDOMAIN [qr rd ra]
        -u db.example.com A
        NOERROR [qr rd ra]
          db.example.com. t IN A 192.0.2.7
    "#]],
    );
    assert_eq!(host.ours.counts.udp.load(Ordering::Relaxed), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn systemd_resolved_that_validates_needs_to_know_that_the_zone_is_not_signed() {
    let host = ResolvedHost::start(ForeignServer::Link, "DNSSEC=yes\n", &[drop_in()]).await;
    assert!(host.drill("-u orders.mesh A").starts_with("SERVFAIL"));
    let anchor = (host::RESOLVED_NEGATIVE_ANCHOR, host::resolved_negative_anchor(&Suffix::default()));
    let host = ResolvedHost::start(ForeignServer::Link, "DNSSEC=yes\n", &[drop_in(), anchor]).await;
    host.check(
        &["-u orders.mesh A", "-u nope.mesh A"],
        expect![[r#"
        -u orders.mesh A
        NOERROR [qr rd ra]
          orders.mesh. t IN A 240.0.0.1
        -u nope.mesh A
        NXDOMAIN [qr rd ra]
          mesh. t IN SOA mesh. nobody.invalid. 1 3600 1200 604800 5
    "#]],
    );
}
