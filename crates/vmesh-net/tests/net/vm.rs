//! The fixture of these tests: host `a` with vmesh-net and a real Envoy, and host `b` that it calls. The
//! server `mesh` answers connections that came through Envoy; the server `direct` answers all others.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;
use vmesh_capture::Spec;
use vmesh_model::load::strict;
use vmesh_net::client::{self, Client};
use vmesh_net::protocol::{CaptureRequest, EnvoyHealth, Request, Response, State, Status};
use vmesh_testkit::netns::{Host, Iptables, Switch, Tools};
use vmesh_testkit::place::{TempDir, tempdir};
use vmesh_testkit::process::{Daemon, binary};
use vmesh_testkit::{envoy, wait_for};

/// A spec with real addresses and the shortest possible dead-man timeout.
pub(crate) const OPEN: &str =
    "{outbound: {capture: addresses, addresses: {\"SERVER\": {}}}, dead_man: {timeout: 3s}}";
pub(crate) const CLOSED: &str =
    "{outbound: {capture: addresses, on_loss: closed, addresses: {\"SERVER\": {}}}, dead_man: {timeout: 3s}}";
pub(crate) const SOON: Duration = Duration::from_secs(60);
/// The user of the agent and of Envoy.
pub(crate) const MESH: u32 = 4000;
/// The user of an application.
pub(crate) const APP: u32 = 5000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RulesBackend {
    Nft,
    Iptables,
}

pub(crate) struct Vm {
    pub(crate) a: Host,
    pub(crate) b: Host,
    pub(crate) tools: Tools,
    pub(crate) envoy: Option<Daemon>,
    pub(crate) net: Option<Daemon>,
    pub(crate) rules: RulesBackend,
    stay: Arc<AtomicBool>,
    dir: TempDir,
    _switch: Switch,
}

impl Vm {
    pub(crate) async fn new(rules: RulesBackend) -> Vm {
        let switch = Switch::new().unwrap();
        let (a, b) = (switch.host().unwrap(), switch.host().unwrap());
        let dir = tempdir().unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o755)).unwrap();
        let program = dir.join("envoy");
        let cached = envoy::find().unwrap();
        if fs::hard_link(&cached, &program).is_err() {
            fs::copy(&cached, &program).unwrap();
        }
        fs::create_dir(dir.join("net")).unwrap();
        chown(dir.join("net"), None, Some(MESH)).unwrap();
        fs::set_permissions(dir.join("net"), Permissions::from_mode(0o2755)).unwrap();
        fs::create_dir(dir.join("programs")).unwrap();
        let stay = Arc::new(AtomicBool::new(false));
        for (port, name) in [(8080, "direct"), (9999, "mesh")] {
            serve(&b, SocketAddr::from((b.v4, port)), name, stay.clone());
        }
        let tools = a.tools(Iptables::Nft).unwrap();
        let mut vm = Vm { a, b, tools, envoy: None, net: None, rules, stay, dir, _switch: switch };
        vm.start_envoy().await;
        vm.start_net().await;
        vm
    }

    pub(crate) async fn start_envoy(&mut self) {
        let bootstrap = self.dir.join("bootstrap.json");
        fs::write(&bootstrap, bootstrap_of(&self.b.v4.to_string()).to_string()).unwrap();
        let mut command = self.a.command_as(MESH, self.dir.join("envoy"));
        command
            .args(["--disable-hot-restart", "--concurrency", "1", "--log-level", "warning", "-c"])
            .arg(bootstrap);
        self.envoy = Some(Daemon::spawn("envoy", command).unwrap());
        let listens = async || self.a.within(|| TcpStream::connect("127.0.0.1:15001")).unwrap().map(drop);
        wait_for("Envoy to listen", SOON, listens).await.unwrap();
    }

    pub(crate) async fn start_net(&mut self) {
        self.start_net_by(&[]).await;
    }

    /// Starts vmesh-net; if `by` is not empty, through that program with these arguments.
    pub(crate) async fn start_net_by(&mut self, by: &[&str]) {
        let net = binary("vmesh-net").unwrap();
        let mut command = match by.split_first() {
            Some((program, arguments)) => {
                let mut command = self.a.command(program);
                command.args(arguments).arg(net);
                command
            }
            None => self.a.command(net),
        };
        let backend = if self.rules == RulesBackend::Nft { "nft" } else { "iptables" };
        command
            .args([
                "--agent-user",
                &MESH.to_string(),
                "--envoy-user",
                &MESH.to_string(),
                "--backend",
                backend,
            ])
            .args(["--drain", "2s", "--socket"])
            .arg(self.socket())
            .arg("--state-dir")
            .arg(self.state_dir())
            .env("PATH", format!("{}:{}", self.programs().display(), self.tools.path()));
        self.net = Some(Daemon::spawn("vmesh-net", command).unwrap());
        wait_for("vmesh-net to answer", SOON, async || {
            client::ask(&self.socket(), &Request::Status).await.map(drop)
        })
        .await
        .unwrap();
    }

    /// Sets whether the servers keep connections open.
    pub(crate) fn stay(&self, stay: bool) {
        self.stay.store(stay, Ordering::Relaxed);
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.join("net/net.sock")
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.dir.join("net/state")
    }

    /// The first directory on the PATH of vmesh-net.
    pub(crate) fn programs(&self) -> PathBuf {
        self.dir.join("programs")
    }

    /// Installs a shell script in the place of a program that vmesh-net runs.
    pub(crate) fn script(&self, name: &str, text: &str) {
        let path = self.programs().join(name);
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    }

    /// Returns the name of the server that answers.
    pub(crate) fn get(&self, port: u16) -> Result<String, String> {
        self.get_as(APP, port)
    }

    pub(crate) fn get_as(&self, user: u32, port: u16) -> Result<String, String> {
        let to = SocketAddr::from((self.b.v4, port));
        self.a.within_as(user, || get(to)).unwrap().map_err(|error| error.to_string())
    }

    pub(crate) async fn answers(&self, name: &str) {
        let look = async || match self.get(8080) {
            Ok(answer) if answer == name => Ok(()),
            other => Err(format!("{other:?}; {:?}", self.status().await)),
        };
        wait_for(&format!("{name} to answer"), SOON, look).await.unwrap();
    }

    /// Does the same as [`Vm::answers`] while no vmesh-net is running.
    pub(crate) async fn answers_without_net(&self, name: &str) {
        let look = async || match self.get(8080) {
            Ok(answer) if answer == name => Ok(()),
            other => Err(format!("{other:?}")),
        };
        wait_for(&format!("{name} to answer"), SOON, look).await.unwrap();
    }

    pub(crate) async fn status(&self) -> Status {
        status(client::ask(&self.socket(), &Request::Status).await.unwrap())
    }

    pub(crate) async fn until(&self, awaited: &str, mut holds: impl FnMut(&Status) -> bool) -> Status {
        wait_for(awaited, SOON, async || {
            let status = self.status().await;
            if holds(&status) { Ok(status) } else { Err(format!("{status:?}")) }
        })
        .await
        .unwrap()
    }

    /// Waits until vmesh-net has logged this text. Its output arrives with some delay.
    pub(crate) async fn says(&self, text: &str) {
        let net = self.net.as_ref().unwrap();
        wait_for(text, SOON, async || {
            let log = net.output();
            if log.contains(text) { Ok(()) } else { Err(log) }
        })
        .await
        .unwrap();
    }

    pub(crate) fn ruleset(&self) -> String {
        self.tools.ruleset().unwrap()
    }

    pub(crate) fn nft(&self, arguments: &[&str]) -> String {
        printed(Command::new(&self.tools.nft).args(arguments))
    }

    /// Waits until a new vmesh-net process runs, which has not heard from an agent yet.
    pub(crate) async fn begun_anew(&self) {
        let look = async || match client::ask(&self.socket(), &Request::Status).await {
            Ok(Response::Status(status)) if status.agent_silent_for.is_none() => Ok(()),
            other => Err(format!("{other:?}")),
        };
        wait_for("vmesh-net to begin anew", SOON, look).await.unwrap();
    }

    pub(crate) async fn terminate_net(&mut self) {
        let mut net = self.net.take().unwrap();
        net.signal(Signal::TERM).unwrap();
        let ended = wait_for("vmesh-net to end", SOON, async || net.has_exited()).await.unwrap();
        assert!(ended.success(), "{}", net.output());
    }
}

/// A client that plays the agent.
pub(crate) struct FakeAgent {
    pub(crate) client: Client,
    pub(crate) want: CaptureRequest,
}

impl FakeAgent {
    pub(crate) async fn new(vm: &Vm, spec: &str) -> FakeAgent {
        let client = Client::connect(&vm.socket()).await.unwrap();
        FakeAgent { client, want: want(vm, spec) }
    }

    pub(crate) async fn want(&mut self) -> Response {
        self.client.ask(&Request::Want(self.want.clone())).await.unwrap()
    }

    pub(crate) async fn well(&mut self) -> Status {
        status(self.client.ask(&Request::Well).await.unwrap())
    }

    pub(crate) async fn confirm(&mut self, trial: u64) -> Response {
        self.client.ask(&Request::Confirm { trial }).await.unwrap()
    }

    /// Requests the capture, and confirms the trial.
    pub(crate) async fn capture(&mut self) -> Status {
        let status = status(self.want().await);
        let trial = status.trial.unwrap_or_else(|| panic!("{status:?}"));
        let confirmed = self::status(self.confirm(trial).await);
        assert_eq!(confirmed.state, State::Confirmed, "{confirmed:?}");
        confirmed
    }

    /// Keeps up the heartbeat until `holds` returns `true`.
    pub(crate) async fn well_until(
        &mut self,
        awaited: &str,
        mut holds: impl FnMut(&Status) -> bool,
    ) -> Status {
        let mut last = String::new();
        let deadline = tokio::time::Instant::now() + SOON;
        while tokio::time::Instant::now() < deadline {
            let status = self.well().await;
            if holds(&status) {
                return status;
            }
            last = format!("{status:?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        panic!("{awaited}: {last}");
    }
}

pub(crate) fn want(vm: &Vm, spec: &str) -> CaptureRequest {
    let spec: Spec = strict("spec.yaml", &spec.replace("SERVER", &format!("{}:8080", vm.b.v4))).unwrap();
    CaptureRequest { spec, ports: [15020].into(), control_planes: Default::default(), confirm_within: 60 }
}

pub(crate) fn status(answer: Response) -> Status {
    match answer {
        Response::Status(status) => *status,
        other => panic!("{other:?}"),
    }
}

pub(crate) fn is_well(status: &Status) -> bool {
    status.envoy == EnvoyHealth::Well && status.captures()
}

fn printed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn get(to: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    match answer.is_empty() {
        true => Err(std::io::ErrorKind::UnexpectedEof.into()),
        false => Ok(answer),
    }
}

/// Starts a server that sends its name; while `stay` is set, it then echoes.
fn serve(on: &Host, address: SocketAddr, name: &'static str, stay: Arc<AtomicBool>) {
    let listener = on.within(|| TcpListener::bind(address)).unwrap().unwrap();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let stays = stay.load(Ordering::Relaxed);
            std::thread::spawn(move || {
                _ = stream.write_all(name.as_bytes());
                if stays && let Ok(mut reader) = stream.try_clone() {
                    _ = std::io::copy(&mut reader, &mut stream);
                }
            });
        }
    });
}

/// Returns a bootstrap with which Envoy sends captured connections to `mesh`, and closes those to the capture
/// port itself.
fn bootstrap_of(server: &str) -> serde_json::Value {
    let proxy = |cluster: &str| {
        json!([{"name": "tcp", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": cluster, "cluster": cluster,
        }}])
    };
    let at = |address: &str, port: u16| json!({"socket_address": {"address": address, "port_value": port}});
    json!({"static_resources": {
        "listeners": [{
            "name": "virtual_outbound",
            "address": at("127.0.0.1", 15001),
            "additional_addresses": [{"address": at("::1", 15001)}],
            "listener_filters": [{"name": "original_dst", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst",
            }}],
            "filter_chains": [
                {"filter_chain_match": {"destination_port": 15001}, "filters": proxy("nowhere")},
                {"filter_chain_match": {"prefix_ranges": [
                    {"address_prefix": "240.0.0.0", "prefix_len": 5},
                    {"address_prefix": "fd76:6d65:7368::", "prefix_len": 64},
                ]},
                 "filters": proxy("nowhere")},
                {"filters": proxy("mesh")},
            ],
        }],
        "clusters": [
            {"name": "nowhere", "type": "STATIC", "connect_timeout": "1s"},
            {"name": "mesh", "type": "STATIC", "connect_timeout": "1s", "load_assignment": {
                "cluster_name": "mesh",
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": at(server, 9999)}}]}],
            }},
        ],
    }})
}
