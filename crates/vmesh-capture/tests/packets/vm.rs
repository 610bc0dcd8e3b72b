//! The fixture of these tests: a host whose connections are captured, another host that it calls, and small
//! servers in the roles of Envoy and the applications.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use vmesh_capture::apply::{Applier, Backend, RecentRuns, Tools};
use vmesh_capture::host::NeverCaptured;
use vmesh_capture::spec::Seconds;
use vmesh_capture::{Host, Plan, Program, Spec, Stage};
use vmesh_model::load::strict;
use vmesh_testkit::netns::{self, Iptables, Switch};
use vmesh_testkit::process::Daemon;

/// A generous timeout: what a test waits for happens at once or never.
pub(crate) const SOON: Duration = Duration::from_secs(30);
/// The time after which a connection counts as failed.
pub(crate) const NEVER: Duration = Duration::from_millis(400);
/// The user id of Envoy.
pub(crate) const ENVOY: u32 = 4000;

/// Virtual addresses of both families.
pub(crate) const VIPS: [&str; 2] = ["240.240.0.10:80", "[fdfe::10]:80"];

pub(crate) fn vips() -> [SocketAddr; 2] {
    VIPS.map(|vip| vip.parse().unwrap())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BackendKind {
    Nft,
    IptablesNft,
    IptablesLegacy,
}

pub(crate) struct Vm {
    pub(crate) switch: Switch,
    /// The host whose connections are captured.
    pub(crate) a: netns::Host,
    /// The other host.
    pub(crate) b: netns::Host,
    pub(crate) tools: netns::Tools,
    pub(crate) applier: Applier,
    pub(crate) facts: Host,
    pub(crate) kind: BackendKind,
    /// Keeps `/proc/<pid>/net` of `a` alive.
    _anchor: Daemon,
}

impl Vm {
    pub(crate) fn new(kind: BackendKind) -> Vm {
        let switch = Switch::new().unwrap();
        let (a, b) = (switch.host().unwrap(), switch.host().unwrap());
        let iptables = if kind == BackendKind::IptablesLegacy { Iptables::Legacy } else { Iptables::Nft };
        let tools = a.tools(iptables).unwrap();
        let mut sleep = a.command("sleep");
        sleep.arg("infinity");
        let anchor = Daemon::spawn("anchor", sleep).unwrap();
        let applier = Applier {
            backend: if kind == BackendKind::Nft { Backend::Nft } else { Backend::Iptables },
            tools: Tools {
                nft: tools.nft.clone(),
                iptables_save: tools.iptables_save.clone(),
                iptables_restore: tools.iptables_restore.clone(),
                ip6tables_save: tools.ip6tables_save.clone(),
                ip6tables_restore: tools.ip6tables_restore.clone(),
                recent: format!("/proc/{}/net/xt_recent", anchor.pid()).into(),
                timeout: SOON,
            },
            ipv6: true,
            recent_runs: RecentRuns::default(),
        };
        let never = NeverCaptured { users: [ENVOY].into(), own: [15020].into(), ..NeverCaptured::default() };
        let facts = Host { ipv6: true, never, ..Host::default() };
        Vm { switch, a, b, tools, applier, facts, kind, _anchor: anchor }
    }

    pub(crate) fn program(&self, yaml: &str, stage: Stage) -> Program {
        let spec: Spec = strict("spec.yaml", yaml).unwrap();
        let (program, notes) = Program::new(&spec, &self.facts, stage).unwrap();
        assert_eq!(notes, []);
        program
    }

    /// Captures what the spec `yaml` says, with a dead-man timeout of ten minutes.
    pub(crate) async fn capture(&self, yaml: &str) -> Plan {
        self.bring(&self.program(yaml, Stage::Confirmed)).await
    }

    pub(crate) async fn bring(&self, program: &Program) -> Plan {
        let long: Seconds = "10m".parse().unwrap();
        self.applier.reconcile(program, Some(long)).await.unwrap()
    }

    /// Returns the output of all firewall tools without counters and times.
    pub(crate) fn ruleset(&self) -> String {
        let nft = printed(Command::new(&self.tools.nft).args(["list", "ruleset"]));
        let save = printed(&mut Command::new(&self.tools.iptables_save));
        let save6 = printed(&mut Command::new(&self.tools.ip6tables_save));
        let mut text = String::new();
        for line in [nft, save, save6].iter().flat_map(|text| text.lines()) {
            if line.starts_with('#') {
                continue;
            }
            let words: Vec<&str> = line.split(' ').collect();
            let mut at = 0;
            while let Some(word) = words.get(at) {
                if *word == "packets" || *word == "bytes" {
                    at += 1;
                } else if !(word.starts_with('[') && word.contains(':') && line.starts_with(':')) {
                    text.push_str(word);
                    text.push(' ');
                }
                at += 1;
            }
            text.push('\n');
        }
        text
    }

    /// Returns the addresses of `b` with this port.
    pub(crate) fn at_b(&self, port: u16) -> [SocketAddr; 2] {
        self.b.addresses().map(|ip| SocketAddr::new(ip, port))
    }

    pub(crate) fn at_a(&self, port: u16) -> [SocketAddr; 2] {
        self.a.addresses().map(|ip| SocketAddr::new(ip, port))
    }

    /// Starts servers in the role of Envoy's outbound listener.
    pub(crate) fn outbound_envoy(&self) -> [Server; 2] {
        ["127.0.0.1:15001", "[::1]:15001"].map(|at| Server::new(&self.a, at.parse().unwrap(), "envoy"))
    }

    pub(crate) fn app_at_b(&self, port: u16) -> Server {
        Server::new(&self.b, SocketAddr::new("::".parse::<IpAddr>().unwrap(), port), "app")
    }

    pub(crate) fn app_at_a(&self, port: u16) -> Server {
        Server::new(&self.a, SocketAddr::new("::".parse::<IpAddr>().unwrap(), port), "app")
    }

    /// Returns the name of the server that answers a caller on `a` at `to`.
    pub(crate) fn call(&self, to: SocketAddr) -> String {
        who(self.a.within(|| connect(to)).unwrap())
    }

    pub(crate) fn call_as(&self, id: u32, to: SocketAddr) -> String {
        who(self.a.within_as(id, || connect(to)).unwrap())
    }

    pub(crate) fn call_from_b(&self, to: SocketAddr) -> String {
        who(self.b.within(|| connect(to)).unwrap())
    }

    /// Makes `of` connections to `to`, and counts those that reach Envoy.
    pub(crate) fn share(&self, of: usize, to: SocketAddr) -> usize {
        let answers = self.a.within(|| (0..of).map(|_| who(connect(to))).collect::<Vec<_>>()).unwrap();
        assert!(answers.iter().all(|who| who == "app" || who == "envoy"), "{answers:?}");
        answers.iter().filter(|who| *who == "envoy").count()
    }

    /// Runs a shell script that changes rules like another program would.
    pub(crate) fn damage(&self, script: &str) {
        let path = format!("{}:/usr/bin:/bin", self.tools.dir.display());
        printed(Command::new("sh").args(["-ec", script]).env("PATH", path));
    }
}

pub(crate) fn printed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn connect(to: SocketAddr) -> std::io::Result<TcpStream> {
    TcpStream::connect_timeout(&to, NEVER)
}

fn who(stream: std::io::Result<TcpStream>) -> String {
    match stream.and_then(Connection::new) {
        Ok(call) => call.who,
        Err(error) if error.kind() == std::io::ErrorKind::TimedOut => "nobody".to_owned(),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => "refused".to_owned(),
        Err(error) => format!("{:?}", error.kind()),
    }
}

/// An open connection to a [`Server`].
pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
    pub(crate) who: String,
    /// The client's address, as the server sees it.
    pub(crate) from: IpAddr,
    /// The server's address, as the server sees it.
    pub(crate) to: SocketAddr,
}

impl Connection {
    fn new(stream: TcpStream) -> std::io::Result<Connection> {
        stream.set_read_timeout(Some(SOON))?;
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let [who, from, to] = words.as_slice() else { return Err(std::io::ErrorKind::UnexpectedEof.into()) };
        let (who, from, to) = ((*who).to_owned(), from.parse().unwrap(), to.parse().unwrap());
        Ok(Connection { stream, who, from, to })
    }

    pub(crate) fn open(host: &netns::Host, to: SocketAddr) -> Connection {
        let stream = host.within(|| TcpStream::connect_timeout(&to, SOON)).unwrap();
        Connection::new(stream.unwrap()).unwrap()
    }

    /// Reports whether the connection still carries data in both directions.
    pub(crate) fn works(&mut self) -> bool {
        let mut byte = [0];
        let asked = self.stream.get_mut().write_all(b"x");
        asked.and_then(|()| self.stream.read_exact(&mut byte)).is_ok()
    }
}

/// A server that sends its name, the client's address and its own address, and then echoes. Dropping it stops
/// the listener; connections stay open.
pub(crate) struct Server {
    listener: Arc<TcpListener>,
}

impl Server {
    pub(crate) fn new(host: &netns::Host, at: SocketAddr, name: &'static str) -> Server {
        let listener = Arc::new(host.within(|| TcpListener::bind(at)).unwrap().unwrap());
        let accepting = listener.clone();
        thread::spawn(move || {
            while let Ok((stream, from)) = accepting.accept() {
                thread::spawn(move || serve(stream, from, name));
            }
        });
        Server { listener }
    }
}

fn serve(mut stream: TcpStream, from: SocketAddr, name: &str) -> std::io::Result<()> {
    let local = stream.local_addr()?;
    let local = SocketAddr::new(local.ip().to_canonical(), local.port());
    writeln!(stream, "{name} {} {local}", from.ip().to_canonical())?;
    let mut buffer = [0; 64];
    loop {
        match stream.read(&mut buffer)? {
            0 => return stream.shutdown(Shutdown::Both),
            count => stream.write_all(buffer.get(..count).unwrap_or_default())?,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The shutdown ends the blocking `accept`.
        _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

/// Starts a process in the role of Envoy's inbound listener, with a socket that accepts connections to any
/// address. A separate process can be stopped and killed.
pub(crate) async fn transparent_envoy(host: &netns::Host) -> Daemon {
    const SCRIPT: &str = r#"
import ipaddress, socket, threading
def plain(ip): ip = ipaddress.ip_address(ip); return getattr(ip, "ipv4_mapped", None) or ip
def serve(conn, peer):
    me = conn.getsockname(); ip = plain(me[0])
    at = f"{ip}:{me[1]}" if ip.version == 4 else f"[{ip}]:{me[1]}"
    conn.sendall(f"envoy {plain(peer[0])} {at}\n".encode())
    while data := conn.recv(64): conn.sendall(data)
server = socket.socket(socket.AF_INET6)
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.setsockopt(socket.SOL_IP, 19, 1)      # IP_TRANSPARENT
server.setsockopt(socket.IPPROTO_IPV6, 75, 1)  # IPV6_TRANSPARENT
server.bind(("::", 15006)); server.listen(100); print("listening", flush=True)
while True:
    conn, peer = server.accept()
    threading.Thread(target=serve, args=(conn, peer), daemon=True).start()
"#;
    let mut python = host.command("python3");
    python.args(["-c", SCRIPT]);
    let mut envoy = Daemon::spawn("envoy", python).unwrap();
    envoy.wait_line("listening", SOON).await.unwrap();
    envoy
}
