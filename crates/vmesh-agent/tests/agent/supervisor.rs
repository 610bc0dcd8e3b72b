//! Tests of `vmesh-agent envoy`, the supervisor of Envoy, with real Envoys under load.

mod faults;

use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use vmesh_agent::Config;
use vmesh_daemon::fetch::{Peer, fetch};
use vmesh_daemon::tasks::spawn_handle;
use vmesh_proto::any;
use vmesh_proto::envoy::config::listener::v3::filter::ConfigType;
use vmesh_proto::envoy::config::listener::v3::{Filter, FilterChain, Listener};
use vmesh_proto::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use vmesh_proto::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::ClusterSpecifier;
use vmesh_testkit::app::{Behaviour, HttpApp};
use vmesh_testkit::envoy::{self, Envoy};
use vmesh_testkit::load::{Load, Plan, Report};
use vmesh_testkit::process::Daemon;
use vmesh_testkit::wait_for;
use vmesh_xds::{Kind, Resource};

use crate::fixture::{Place, SOON, TestControlPlane, cluster, listener, orders};

/// A host: its address and directories, a private copy of the Envoy binary that tests replace, and the settings of its supervisor.
struct Host {
    place: Place,
    settings: String,
}

impl Host {
    fn new() -> Host {
        Host::with("1.40.0")
    }

    fn with(version: &str) -> Host {
        let host = Host { place: Place::new(), settings: "drain: 2s".to_owned() };
        std::fs::create_dir_all(host.place.run_dir()).unwrap();
        host.install(version);
        host
    }

    fn binary(&self) -> PathBuf {
        self.place.dir.join("bin-envoy")
    }

    /// Installs the Envoy of this version at `envoy.path` as a package manager does: under a temporary name, then renamed.
    fn install(&self, version: &str) {
        let from = match version {
            envoy::VERSION => envoy::find().unwrap(),
            other => envoy::binary_of(other).unwrap(),
        };
        let new = self.place.dir.join("bin-envoy.new");
        // Copied rather than linked, so that the rename really deletes the running binary.
        std::fs::copy(from, &new).unwrap();
        std::fs::set_permissions(&new, PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::rename(&new, self.binary()).unwrap();
    }

    fn install_script(&self, text: &str) {
        let new = self.place.dir.join("bin-envoy.new");
        std::fs::write(&new, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&new, PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::rename(&new, self.binary()).unwrap();
    }

    fn text(&self, control_plane: SocketAddr) -> String {
        let place = &self.place;
        format!(
            r#"
control_plane: ["http://{control_plane}"]
state_dir: {dir}/state
run_dir: {dir}/run
envoy: {{path: "{envoy}", run_dir: {dir}/envoy, concurrency: 2, {settings}}}
listen: {{api: "{api}"}}
node: {{name: web-1, address: {ip}}}
upstreams: [{{service: orders, listen: "{upstream}"}}]
"#,
            dir = place.dir.display(),
            envoy = self.binary().display(),
            settings = self.settings,
            api = place.api(),
            ip = place.address,
            upstream = place.upstream(),
        )
    }

    fn file(&self) -> PathBuf {
        self.place.dir.join("agent.yaml")
    }

    fn configure(&self) -> Config {
        let text = self.text(self.control_plane());
        std::fs::write(self.file(), &text).unwrap();
        Config::parse("agent.yaml", text.as_bytes(), "").unwrap()
    }

    fn control_plane(&self) -> SocketAddr {
        self.place.at(15010)
    }

    /// Writes the bootstrap, as the agent does when it starts.
    fn write_bootstrap(&self) {
        let config = self.configure();
        let text = format!("{:#}\n", vmesh_agent::bootstrap::bootstrap(&config));
        vmesh_daemon::fsx::write_atomically(&config.bootstrap(), text.as_bytes(), 0o640).unwrap();
    }

    fn dir(&self) -> PathBuf {
        self.place.dir.join("envoy")
    }

    fn envoy(&self) -> Envoy {
        Envoy::at_socket(self.dir().join("admin.sock"))
    }

    fn supervise(&self) -> SupervisorProcess {
        self.write_bootstrap();
        self.supervise_as_it_is()
    }

    fn supervise_as_it_is(&self) -> SupervisorProcess {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmesh-agent"));
        command.arg("envoy").arg("--config").arg(self.file());
        let daemon = Daemon::spawn("vmesh-agent envoy", command).unwrap();
        SupervisorProcess { daemon, socket: Peer::Unix(self.dir().join("status.sock")) }
    }

    /// Returns the pids of the Envoys that run on this host.
    fn envoys(&self) -> Vec<Pid> {
        vmesh_testkit::process::naming(&self.dir())
    }

    async fn one_is_left(&self) {
        let one = async || match self.envoys().len() {
            1 => Ok(()),
            other => Err(format!("{other} run")),
        };
        wait_for("the others to have left", SOON, one).await.unwrap();
    }
}

/// Kills the remaining Envoys and removes their shared memory.
impl Drop for Host {
    fn drop(&mut self) {
        for pid in self.envoys() {
            _ = kill_process(pid, Signal::KILL);
        }
        let record = std::fs::read(self.dir().join("envoys.json")).unwrap_or_default();
        let record: Value = serde_json::from_slice(&record).unwrap_or_default();
        for envoy in record["envoys"].as_array().into_iter().flatten() {
            let number = envoy["base_id"].as_u64().unwrap_or_default() * 10;
            _ = std::fs::remove_file(format!("/dev/shm/envoy_shared_memory_{number}"));
        }
    }
}

struct SupervisorProcess {
    daemon: Daemon,
    socket: Peer,
}

impl SupervisorProcess {
    async fn is(&mut self, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let seen = wait_for(what, SOON, async || {
            if let Some(status) = self.daemon.has_exited() {
                return Err(format!("it ended: {status}"));
            }
            let (_, body) = fetch(&self.socket, http::Method::GET, "/status", SOON)
                .await
                .map_err(|error| vmesh_daemon::report::one_line(&error))?;
            let status: Value = serde_json::from_slice(&body).unwrap();
            if is(&status) { Ok(status) } else { Err(status.to_string()) }
        });
        seen.await.map_err(|failed| panic!("{failed}\n{}", self.daemon.output())).unwrap()
    }

    async fn is_live(&mut self) -> Value {
        self.is("a live Envoy", |status| status["state"] == "live").await
    }

    async fn reloaded(&mut self, times: u64) -> Value {
        self.is("another Envoy", |status| status["reloads"] == times && status["state"] == "live").await
    }

    async fn failed(&mut self, why: &str) -> Value {
        self.is(&format!("a failure that says `{why}`"), |status| {
            let what = status["last_failure"]["what"].as_str();
            what.is_some_and(|what| what.contains(why))
                && status["state"] == "live"
                && status["reload"].is_null()
        })
        .await
    }

    fn hang_up(&self) {
        self.daemon.signal(Signal::HUP).unwrap();
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let (status, body) = fetch(&self.socket, http::Method::GET, path, SOON).await.unwrap();
        (status.as_u16(), String::from_utf8_lossy(&body).into_owned())
    }
}

fn pid(status: &Value) -> Pid {
    Pid::from_raw(i32::try_from(status["pid"].as_i64().unwrap()).unwrap()).unwrap()
}

/// Starts an HTTP application `orders`, a TCP echo application, and a control plane that serves both to Envoy.
async fn serving(host: &Host) -> (TestControlPlane, HttpApp) {
    let app = HttpApp::start("one", "v1", host.place.at(8080)).unwrap();
    let control_plane = TestControlPlane::on_socket(host.place.run_dir().join("xds.sock")).await;
    control_plane.publish(resources(host, app.address()));
    echo(host).await;
    (control_plane, app)
}

fn resources(host: &Host, app: SocketAddr) -> Vec<std::sync::Arc<Resource>> {
    let mut all = orders(host.place.upstream(), app);
    all.push(Resource::new(Kind::Cluster, "echo", &cluster("echo", &[echo_at(host)])));
    all.push(Resource::new(Kind::Listener, "echo", &tcp_listener(host)));
    all
}

fn echo_at(host: &Host) -> SocketAddr {
    host.place.at(7070)
}

fn echo_through_envoy(host: &Host) -> SocketAddr {
    host.place.at(9002)
}

fn tcp_listener(host: &Host) -> Listener {
    let proxy = TcpProxy {
        stat_prefix: "echo".to_owned(),
        cluster_specifier: Some(ClusterSpecifier::Cluster("echo".to_owned())),
        ..TcpProxy::default()
    };
    let filter = Filter {
        name: "envoy.filters.network.tcp_proxy".to_owned(),
        config_type: Some(ConfigType::TypedConfig(any(&proxy))),
    };
    Listener {
        filter_chains: vec![FilterChain { filters: vec![filter], ..FilterChain::default() }],
        ..listener("echo", echo_through_envoy(host), "echo")
    }
}

/// Starts an application that sends back what it receives.
async fn echo(host: &Host) {
    let listener = TcpListener::bind(echo_at(host)).await.unwrap();
    spawn_handle(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            spawn_handle(async move {
                let (mut read, mut write) = stream.split();
                _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
}

/// An open connection to the echo application through Envoy.
struct EchoStream {
    stream: TcpStream,
}

impl EchoStream {
    async fn open(host: &Host) -> EchoStream {
        let stream = TcpStream::connect(echo_through_envoy(host)).await.unwrap();
        let mut stream = EchoStream { stream };
        stream.lives().await;
        stream
    }

    async fn lives(&mut self) {
        let mut answer = [0; 5];
        let exchange = async {
            self.stream.write_all(b"hello").await.unwrap();
            self.stream.read_exact(&mut answer).await.unwrap();
        };
        tokio::time::timeout(SOON, exchange).await.unwrap();
        assert_eq!(&answer, b"hello");
    }
}

/// Load on Envoy: requests over persistent connections, and requests over a new connection each.
struct Clients {
    kept: Load,
    new: Option<Load>,
}

impl Clients {
    async fn start(host: &Host) -> Clients {
        let to = || Plan::to(host.place.upstream());
        let clients = Clients {
            kept: Load::start(to().rate(300.0)).unwrap(),
            new: Some(Load::start(to().rate(200.0).header("connection", "close")).unwrap()),
        };
        clients.are_served().await;
        clients
    }

    /// Starts clients with persistent connections alone. For tests in which an Envoy closes listeners without a hot restart: the kernel
    /// then resets connections in the queue of the listener (`tcp_migrate_req` is 0), and persistent connections are rarely in a queue.
    async fn start_persistent(host: &Host) -> Clients {
        let kept = Load::start(Plan::to(host.place.upstream()).rate(300.0)).unwrap();
        let clients = Clients { kept, new: None };
        clients.are_served().await;
        clients
    }

    fn loads(&self) -> impl Iterator<Item = &Load> {
        std::iter::once(&self.kept).chain(&self.new)
    }

    async fn are_served(&self) {
        self.by("answers", |report| report.ok).await;
    }

    async fn by_instance(&self, instance: &str) {
        self.by(instance, |report| report.by_instance.get(instance).copied().unwrap_or(0)).await;
    }

    async fn by(&self, what: &str, count: impl Fn(&Report) -> u64) {
        for load in self.loads() {
            let before = count(&load.so_far());
            wait_for(what, SOON, async || {
                let report = load.so_far();
                if count(&report) >= before + 50 {
                    Ok(())
                } else {
                    Err(format!("{report} {:?}", report.failed.last()))
                }
            })
            .await
            .unwrap();
        }
    }

    fn failures(&self) -> u64 {
        self.loads().map(|load| load.so_far().failures).sum()
    }

    async fn lost_nothing(self) {
        for load in std::iter::once(self.kept).chain(self.new) {
            let report = load.stop().await;
            assert_eq!((report.failures, report.raced), (0, 0), "{report}");
        }
    }
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().mode() & 0o777
}

#[tokio::test(flavor = "multi_thread")]
async fn envoy_starts_when_the_agent_has_written_its_bootstrap_and_what_it_says_may_be_read_by_its_group() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    host.configure();
    let mut supervisor = host.supervise_as_it_is();
    let status = supervisor
        .is("a reason", |status| status["state"] == "waiting" && status["reason"].is_string())
        .await;
    assert!(status["reason"].as_str().unwrap().ends_with("is vmesh-agent running?"), "{status}");
    assert_eq!(supervisor.get("/ready").await.0, 503);
    host.write_bootstrap();
    let status = supervisor.is_live().await;
    assert_eq!((status["version"].as_str(), status["epoch"].as_u64()), (Some(envoy::VERSION), Some(0)));
    assert_eq!(supervisor.get("/ready").await, (200, "LIVE\n".to_owned()));
    assert_eq!(mode(&host.dir().join("admin.sock")), 0o600);
    assert_eq!(mode(&host.dir().join("status.sock")), 0o660);
    for (path, has) in [
        ("/stats/prometheus", "envoy_server_live"),
        ("/clusters", "orders::"),
        ("/listeners", "outbound::"),
        ("/config_dump", "ClustersConfigDump"),
        ("/server_info", "\"LIVE\""),
    ] {
        let (code, body) = supervisor.get(path).await;
        assert!(code == 200 && body.contains(has), "{path}: {code} {body}");
    }
    assert_eq!(supervisor.get("/config_dump?resource=dynamic_active_secrets").await.0, 400);
    assert_eq!(supervisor.get("/quitquitquit").await.0, 404);
    let (code, _) = fetch(&supervisor.socket, http::Method::POST, "/clusters", SOON).await.unwrap();
    assert_eq!(code.as_u16(), 405);
    assert!(supervisor.daemon.terminate(SOON).await.unwrap().success());
    assert!(host.envoys().is_empty());
    let left =
        std::fs::read_dir(host.dir()).unwrap().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let left: Vec<String> =
        left.filter(|name| name.contains("admin") || name.contains("bootstrap")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_with_nothing_changed_costs_no_request_and_no_connection() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let mut stream = EchoStream::open(&host).await;
    let clients = Clients::start(&host).await;
    let began = Instant::now();
    supervisor.hang_up();
    let second = supervisor.reloaded(1).await;
    eprintln!("from SIGHUP to live: {:?}", began.elapsed());
    for pid in host.envoys() {
        let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap();
        let of = |name: &str| status.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
        eprintln!("{} {} {}", pid.as_raw_nonzero(), of("VmRSS:"), of("RssAnon:"));
    }
    assert_ne!(pid(&first), pid(&second));
    assert_eq!(second["epoch"], 1);
    assert_eq!(second["leaving"][0]["pid"], first["pid"]);
    clients.are_served().await;
    // By now the old Envoy has closed its listeners; the open stream stays with it.
    tokio::time::sleep(Duration::from_secs(3)).await;
    clients.are_served().await;
    stream.lives().await;
    clients.lost_nothing().await;
    assert_eq!(host.envoys().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_reload_waits_until_the_first_envoy_has_no_clients_and_costs_nothing_either() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let stream = EchoStream::open(&host).await;
    let clients = Clients::start(&host).await;
    supervisor.hang_up();
    let second = supervisor.reloaded(1).await;
    supervisor.hang_up();
    let status = supervisor.is("a reload that waits", waits_for_the_first).await;
    assert_eq!((&status["pid"], &status["leaving"][0]["pid"]), (&second["pid"], &first["pid"]));
    clients.are_served().await;
    drop(stream);
    let third = supervisor.reloaded(2).await;
    assert_eq!((&third["epoch"], &third["restarts"]), (&2.into(), &0.into()), "{third}");
    clients.are_served().await;
    clients.lost_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_reload_waits_no_longer_than_the_first_envoy_may_stay() {
    let mut host = Host::new();
    host.settings += ", hot_restart: {parent_shutdown: 6s}";
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    supervisor.is_live().await;
    let _stream = EchoStream::open(&host).await;
    let clients = Clients::start(&host).await;
    supervisor.hang_up();
    supervisor.reloaded(1).await;
    supervisor.hang_up();
    supervisor.is("a reload that waits", waits_for_the_first).await;
    assert_eq!(supervisor.reloaded(2).await["epoch"], 2);
    clients.are_served().await;
    host.one_is_left().await;
    clients.are_served().await;
    clients.lost_nothing().await;
}

fn waits_for_the_first(status: &Value) -> bool {
    status["reload"].as_str().is_some_and(|reload| reload.contains("still has connections"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_that_is_asked_for_twice_does_not_wait_and_keeps_the_connections_of_both() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let mut stream = EchoStream::open(&host).await;
    let clients = Clients::start_persistent(&host).await;
    supervisor.hang_up();
    supervisor.reloaded(1).await;
    supervisor.hang_up();
    supervisor.is("a reload that waits", waits_for_the_first).await;
    supervisor.hang_up();
    let status = supervisor.reloaded(2).await;
    // A third epoch of the same line would terminate the first Envoy, so a new line was begun.
    assert_eq!(status["epoch"], 0, "{status}");
    assert_eq!(status["leaving"][0]["pid"], first["pid"]);
    clients.are_served().await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    stream.lives().await;
    clients.are_served().await;
    assert!(clients.failures() <= 1, "{}", clients.kept.so_far());
    drop(stream);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_with_other_settings_has_another_envoy_take_over_and_one_that_only_restarts_has_not() {
    let mut host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let clients = Clients::start(&host).await;
    host.write_bootstrap();
    host.settings += ", max_connections: 1000, hot_restart: {parent_shutdown: 4s}";
    host.write_bootstrap();
    let second = supervisor.reloaded(1).await;
    assert_ne!(first["pid"], second["pid"]);
    host.write_bootstrap();
    clients.are_served().await;
    host.one_is_left().await;
    clients.are_served().await;
    assert_eq!(supervisor.is_live().await["pid"], second["pid"]);
    clients.lost_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_of_envoy_and_the_way_back_cost_no_request_and_no_connection() {
    let mut host = Host::with(envoy::OLDEST);
    host.settings += ", hot_restart: {parent_shutdown: 4s}";
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    assert_eq!(supervisor.is_live().await["version"], envoy::OLDEST);
    let clients = Clients::start(&host).await;
    for (reloads, version) in [(1, envoy::VERSION), (2, envoy::OLDEST)] {
        let mut stream = EchoStream::open(&host).await;
        host.install(version);
        let status =
            supervisor.is("the binary that waits", |status| status["waiting_binary"].is_string()).await;
        assert_ne!(status["version"], version);
        assert!(status["waiting_binary"].as_str().unwrap().contains(version), "{status}");
        supervisor.hang_up();
        let status = supervisor.reloaded(reloads).await;
        assert_eq!((status["version"].as_str(), &status["waiting_binary"]), (Some(version), &Value::Null));
        assert_eq!(status["epoch"], reloads);
        clients.are_served().await;
        stream.lives().await;
        host.one_is_left().await;
        clients.are_served().await;
    }
    clients.lost_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_cannot_take_over_is_not_let_to_and_the_status_says_why() {
    let mut host = Host::new();
    host.settings += ", hot_restart: {parent_shutdown: 4s}";
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await["pid"].clone();
    let real = envoy::find().unwrap();
    let real = real.display();
    let clients = Clients::start(&host).await;
    for (script, why) in [
        ("echo out of luck; exit 3".to_owned(), "exit status: 3: out of luck"),
        (format!("case \"$*\" in *--mode*) exit 9;; *) exec {real} \"$@\";; esac"), "refuses the bootstrap"),
        // This failure shows only when the new Envoy is really started.
        (
            format!("case \"$*\" in *--restart-epoch*) exit 7;; *) exec {real} \"$@\";; esac"),
            "it ended before it was live",
        ),
    ] {
        host.install_script(&script);
        supervisor.hang_up();
        let status = supervisor.failed(why).await;
        assert_eq!(status["pid"], first, "{status}");
        assert_eq!(status["version"], envoy::VERSION);
        host.envoy().wait_live(SOON).await.unwrap();
        clients.are_served().await;
    }
    host.one_is_left().await;

    // A repaired binary is accepted.
    host.install(envoy::VERSION);
    supervisor.hang_up();
    supervisor.reloaded(1).await;
    clients.are_served().await;
    clients.lost_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bootstrap_that_envoy_refuses_is_not_taken_and_is_tried_once() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await["pid"].clone();
    let clients = Clients::start(&host).await;
    let path = host.place.run_dir().join("bootstrap.json");
    let good = std::fs::read_to_string(&path).unwrap();
    for (bad, why) in [("{", "is not JSON"), ("{\"no_such_field\": 1}", "no_such_field")] {
        std::fs::write(&path, bad).unwrap();
        let status = supervisor.failed(why).await;
        assert_eq!(status["pid"], first);
        let at = status["last_failure"]["at"].clone();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(supervisor.failed(why).await["last_failure"]["at"], at);
    }
    std::fs::write(&path, good).unwrap();
    clients.are_served().await;
    assert_eq!(supervisor.is_live().await["reloads"], 0);
    clients.lost_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_envoy_that_hangs_is_ended_and_another_like_the_old_one_takes_over_instead() {
    let mut host = Host::new();
    host.settings += ", hung_after: 4s, hot_restart: {parent_shutdown: 60s}";
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let mut stream = EchoStream::open(&host).await;
    let clients = Clients::start(&host).await;
    supervisor.hang_up();
    let candidate = candidate(&host, &first).await;
    kill_process(candidate, Signal::STOP).unwrap();
    clients.are_served().await;
    supervisor.failed("it hangs: no answer for 4s").await;
    clients.are_served().await;
    host.envoy().wait_live(SOON).await.unwrap();
    assert!(!host.envoys().contains(&candidate));
    stream.lives().await;
    clients.lost_nothing().await;
}

/// Returns the pid of the Envoy that is starting beside the serving one, before it is live.
async fn candidate(host: &Host, serving: &Value) -> Pid {
    let known = [serving["pid"].clone(), serving["leaving"][0]["pid"].clone()];
    let deadline = Instant::now() + SOON;
    while Instant::now() < deadline {
        for other in host.envoys() {
            let number = other.as_raw_nonzero();
            let program = std::fs::read_link(format!("/proc/{number}/exe")).unwrap_or_default();
            let line = std::fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
            let takes_over = String::from_utf8_lossy(&line).contains("--restart-epoch");
            if program == host.binary() && takes_over && !known.contains(&number.get().into()) {
                return other;
            }
        }
    }
    panic!("no candidate");
}

#[tokio::test(flavor = "multi_thread")]
async fn while_one_takes_over_from_another_both_get_what_the_control_plane_says() {
    let host = Host::new();
    let (control_plane, _one) = serving(&host).await;
    let two = HttpApp::start("two", "v2", host.place.at(8082)).unwrap();
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let clients = Clients::start(&host).await;
    supervisor.hang_up();
    let candidate = candidate(&host, &first).await;
    kill_process(candidate, Signal::STOP).unwrap();
    // The old Envoy serves with its admin interface closed, so its configuration shows in its answers alone.
    control_plane.publish(resources(&host, two.address()));
    clients.by_instance("two").await;
    assert!(supervisor.get("/status").await.1.contains("\"reloads\":0"));
    kill_process(candidate, Signal::CONT).unwrap();
    let second = supervisor.reloaded(1).await;
    assert_eq!(pid(&second), candidate);
    clients.by_instance("two").await;
    let endpoints = host.envoy().endpoints("orders").await.unwrap().unwrap();
    assert_eq!(endpoints, [(two.address().to_string(), true)]);
    clients.lost_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_dies_is_back_at_once_and_so_is_one_whose_parent_had_just_closed_its_listeners() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let clients = Clients::start(&host).await;
    kill_process(pid(&first), Signal::KILL).unwrap();
    let second =
        supervisor.is("a second Envoy", |status| status["restarts"] == 1 && status["state"] == "live").await;
    clients.are_served().await;
    supervisor.hang_up();
    let third = supervisor.reloaded(1).await;
    assert_ne!(second["pid"], third["pid"]);
    kill_process(pid(&third), Signal::KILL).unwrap();
    supervisor.is("a fourth Envoy", |status| status["restarts"] == 2 && status["state"] == "live").await;
    let failures = clients.failures();
    clients.are_served().await;
    eprintln!("requests that failed around two deaths of Envoy: {failures}");
    assert_eq!(clients.failures(), failures);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_that_dies_while_it_takes_its_leave_does_not_take_its_child_along() {
    let mut host = Host::new();
    host.settings += ", hot_restart: {parent_shutdown: 20s}";
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    supervisor.hang_up();
    let second = supervisor.reloaded(1).await;
    // By now, all clients use the new Envoy.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let clients = Clients::start_persistent(&host).await;
    kill_process(pid(&first), Signal::KILL).unwrap();
    // The new Envoy would abort as soon as it sent a message to its dead parent.
    let third = supervisor.reloaded(2).await;
    assert_eq!((&third["epoch"], &third["restarts"]), (&0.into(), &0.into()), "{third}");
    clients.are_served().await;
    wait_for("the child to have left", SOON, async || (!host.envoys().contains(&pid(&second))).then_some(()))
        .await
        .unwrap();
    clients.are_served().await;
    assert!(clients.failures() <= 1, "{}", clients.kept.so_far());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_supervisor_that_is_killed_costs_no_request_and_the_next_goes_on_with_its_envoys() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    supervisor.is_live().await;
    let mut stream = EchoStream::open(&host).await;
    let clients = Clients::start(&host).await;
    supervisor.hang_up();
    let second = supervisor.reloaded(1).await;
    supervisor.daemon.kill().unwrap();
    clients.are_served().await;
    let mut supervisor = host.supervise_as_it_is();
    let adopted = supervisor.is_live().await;
    assert_eq!((&adopted["pid"], &adopted["adopted"]), (&second["pid"], &Value::Bool(true)));
    assert_eq!(adopted["leaving"], second["leaving"]);

    // Killed during a reload, with a candidate that is not live. The next supervisor kills that candidate.
    supervisor.hang_up();
    supervisor.is("a reload that waits", waits_for_the_first).await;
    supervisor.hang_up();
    let candidate = candidate(&host, &adopted).await;
    kill_process(candidate, Signal::STOP).unwrap();
    supervisor.daemon.kill().unwrap();
    clients.are_served().await;
    let mut supervisor = host.supervise_as_it_is();
    let adopted = supervisor.is_live().await;
    assert_eq!(adopted["pid"], second["pid"]);
    assert!(!host.envoys().contains(&candidate));
    clients.are_served().await;
    stream.lives().await;
    clients.lost_nothing().await;
    assert!(supervisor.daemon.terminate(SOON).await.unwrap().success());
    assert!(host.envoys().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_answers_nobody_is_spoken_of_and_in_the_end_replaced() {
    let mut host = Host::new();
    host.settings += ", hung_after: 6s";
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    kill_process(pid(&first), Signal::STOP).unwrap();
    supervisor.is("a silent Envoy", |status| status["state"] == "silent").await;
    // An Envoy that was only slow is kept.
    kill_process(pid(&first), Signal::CONT).unwrap();
    assert_eq!(supervisor.is_live().await["pid"], first["pid"]);
    kill_process(pid(&first), Signal::STOP).unwrap();
    let status =
        supervisor.is("another Envoy", |status| status["state"] == "live" && status["restarts"] == 1).await;
    assert!(status["last_failure"]["what"].as_str().unwrap().contains("it hung and was killed"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_under_load_answers_everything_that_was_accepted() {
    let host = Host::new();
    let (_control_plane, app) = serving(&host).await;
    let mut supervisor = host.supervise();
    supervisor.is_live().await;
    app.behave(Behaviour::Slow(Duration::from_millis(300)));
    let load = Load::start(Plan::to(host.place.upstream()).closed_loop().connections(4)).unwrap();
    wait_for("requests under way", SOON, async || (app.requests() >= 4).then_some(())).await.unwrap();
    let (report, status) = tokio::join!(load.stop(), supervisor.daemon.terminate(SOON));
    assert!(status.unwrap().success());
    assert_eq!(report.failures, 0, "{report}");
    assert!(host.envoys().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_not_there_is_waited_for_and_nothing_takes_over_meanwhile() {
    let host = Host::new();
    let (control_plane, app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let clients = Clients::start(&host).await;
    control_plane.crash().await;
    _ = std::fs::remove_file(host.place.run_dir().join("xds.sock"));
    supervisor.hang_up();
    let status = supervisor.is("a reload that waits", |status| status["reload"].is_string()).await;
    assert_eq!(status["pid"], first["pid"]);
    let waits = |status: &Value| {
        status["reload"].as_str().is_some_and(|reload| reload.contains("the agent does not listen"))
    };
    supervisor.is("the reason", waits).await;
    clients.are_served().await;
    let control_plane = TestControlPlane::on_socket(host.place.run_dir().join("xds.sock")).await;
    control_plane.publish(resources(&host, app.address()));
    supervisor.reloaded(1).await;
    clients.are_served().await;
    clients.lost_nothing().await;
}

/// Starts the agent that serves the Envoy of `host`.
fn agent(host: &Host) -> Daemon {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmesh-agent"));
    command.arg("--config").arg(host.file());
    Daemon::spawn("vmesh-agent", command).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_stopped_and_started_touches_no_envoy_also_while_one_takes_over() {
    let host = Host::new();
    let app = HttpApp::start("one", "v1", host.place.at(8080)).unwrap();
    let control_plane = TestControlPlane::on(host.control_plane()).await;
    control_plane.publish(resources(&host, app.address()));
    host.configure();
    let api = Peer::Tcp(host.place.api());
    let mut supervisor = host.supervise_as_it_is();
    let mut first_agent = agent(&host);
    first_agent.wait_http(&api, "/readyz", SOON).await.unwrap();
    let first = supervisor.is_live().await;
    let clients = Clients::start(&host).await;
    // The agent reports the supervisor's status of Envoy.
    let said = first_agent.wait_http(&api, "/status", SOON).await.unwrap();
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&said["envoy"]["pid"], &said["envoy"]["state"]), (&first["pid"], &first["state"]));

    first_agent.kill().unwrap();
    clients.are_served().await;
    let mut second_agent = agent(&host);
    second_agent.wait_http(&api, "/readyz", SOON).await.unwrap();
    clients.are_served().await;
    assert!(second_agent.terminate(SOON).await.unwrap().success());
    clients.are_served().await;
    let mut third_agent = agent(&host);
    third_agent.wait_http(&api, "/readyz", SOON).await.unwrap();
    assert_eq!(supervisor.is_live().await["pid"], first["pid"]);

    // Killed during a reload: the candidate waits for the next agent, and does not become live without a configuration.
    supervisor.hang_up();
    let candidate = candidate(&host, &first).await;
    kill_process(candidate, Signal::STOP).unwrap();
    third_agent.kill().unwrap();
    kill_process(candidate, Signal::CONT).unwrap();
    clients.are_served().await;
    let mut fourth_agent = agent(&host);
    let second = supervisor.reloaded(1).await;
    fourth_agent.wait_http(&api, "/readyz", SOON).await.unwrap();
    assert_eq!(pid(&second), candidate);
    clients.are_served().await;
    clients.lost_nothing().await;
}
