//! A host with a supervisor and its Envoys, and the clients of these.

use super::*;

/// A host: its address and directories, a private copy of the Envoy binary that tests replace, and the settings of its supervisor.
pub(super) struct Host {
    pub(super) place: Place,
    pub(super) settings: String,
}

impl Host {
    pub(super) fn new() -> Host {
        Host::with("1.40.0")
    }

    pub(super) fn with(version: &str) -> Host {
        let host = Host { place: Place::new(), settings: "drain: 2s".to_owned() };
        std::fs::create_dir_all(host.place.run_dir()).unwrap();
        host.install(version);
        host
    }

    pub(super) fn binary(&self) -> PathBuf {
        self.place.dir.join("bin-envoy")
    }

    /// Installs the Envoy of this version at `envoy.path` as a package manager does: under a temporary name, then renamed.
    pub(super) fn install(&self, version: &str) {
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

    pub(super) fn install_script(&self, text: &str) {
        let new = self.place.dir.join("bin-envoy.new");
        std::fs::write(&new, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&new, PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::rename(&new, self.binary()).unwrap();
    }

    pub(super) fn text(&self, control_plane: SocketAddr) -> String {
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

    pub(super) fn file(&self) -> PathBuf {
        self.place.dir.join("agent.yaml")
    }

    pub(super) fn configure(&self) -> Config {
        let text = self.text(self.control_plane());
        std::fs::write(self.file(), &text).unwrap();
        Config::parse("agent.yaml", text.as_bytes(), "").unwrap()
    }

    pub(super) fn control_plane(&self) -> SocketAddr {
        self.place.at(15010)
    }

    /// Writes the bootstrap, as the agent does when it starts.
    pub(super) fn write_bootstrap(&self) {
        let config = self.configure();
        let text = format!("{:#}\n", vmesh_agent::bootstrap::bootstrap(&config));
        vmesh_daemon::fsx::write_atomically(&config.bootstrap(), text.as_bytes(), 0o640).unwrap();
    }

    pub(super) fn dir(&self) -> PathBuf {
        self.place.dir.join("envoy")
    }

    pub(super) fn envoy(&self) -> Envoy {
        Envoy::at_socket(self.dir().join("admin.sock"))
    }

    pub(super) fn supervise(&self) -> SupervisorProcess {
        self.write_bootstrap();
        self.supervise_as_it_is()
    }

    pub(super) fn supervise_as_it_is(&self) -> SupervisorProcess {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmesh-agent"));
        command.arg("envoy").arg("--config").arg(self.file());
        let daemon = Daemon::spawn("vmesh-agent envoy", command).unwrap();
        SupervisorProcess { daemon, socket: Peer::Unix(self.dir().join("status.sock")) }
    }

    /// Returns the pids of the Envoys that run on this host.
    pub(super) fn envoys(&self) -> Vec<Pid> {
        vmesh_testkit::process::naming(&self.dir())
    }

    pub(super) async fn one_is_left(&self) {
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

pub(super) struct SupervisorProcess {
    pub(super) daemon: Daemon,
    pub(super) socket: Peer,
}

impl SupervisorProcess {
    pub(super) async fn wait_for_status(&mut self, what: &str, is: impl Fn(&Value) -> bool) -> Value {
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

    pub(super) async fn is_live(&mut self) -> Value {
        self.wait_for_status("a live Envoy", |status| status["state"] == "live").await
    }

    pub(super) async fn reloaded(&mut self, times: u64) -> Value {
        self.wait_for_status("another Envoy", |status| {
            status["reloads"] == times && status["state"] == "live"
        })
        .await
    }

    pub(super) async fn failed(&mut self, why: &str) -> Value {
        self.wait_for_status(&format!("a failure that says `{why}`"), |status| {
            let what = status["last_failure"]["what"].as_str();
            what.is_some_and(|what| what.contains(why))
                && status["state"] == "live"
                && status["reload"].is_null()
        })
        .await
    }

    pub(super) fn hang_up(&self) {
        self.daemon.signal(Signal::HUP).unwrap();
    }

    pub(super) async fn get(&self, path: &str) -> (u16, String) {
        let (status, body) = fetch(&self.socket, http::Method::GET, path, SOON).await.unwrap();
        (status.as_u16(), String::from_utf8_lossy(&body).into_owned())
    }
}

pub(super) fn pid(status: &Value) -> Pid {
    Pid::from_raw(i32::try_from(status["pid"].as_i64().unwrap()).unwrap()).unwrap()
}

/// Starts an HTTP application `orders`, a TCP echo application, and a control plane that serves both to Envoy.
pub(super) async fn serving(host: &Host) -> (TestControlPlane, HttpApp) {
    let app = HttpApp::start("one", "v1", host.place.at(8080)).unwrap();
    let control_plane = TestControlPlane::on_socket(host.place.run_dir().join("xds.sock")).await;
    control_plane.publish(resources(host, app.address()));
    echo(host).await;
    (control_plane, app)
}

pub(super) fn resources(host: &Host, app: SocketAddr) -> Vec<std::sync::Arc<Resource>> {
    let mut all = orders(host.place.upstream(), app);
    all.push(Resource::new(Kind::Cluster, "echo", &cluster("echo", &[echo_at(host)])));
    all.push(Resource::new(Kind::Listener, "echo", &tcp_listener(host)));
    all
}

pub(super) fn echo_at(host: &Host) -> SocketAddr {
    host.place.at(7070)
}

pub(super) fn echo_through_envoy(host: &Host) -> SocketAddr {
    host.place.at(9002)
}

pub(super) fn tcp_listener(host: &Host) -> Listener {
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
pub(super) async fn echo(host: &Host) {
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
pub(super) struct EchoStream {
    pub(super) stream: TcpStream,
}

impl EchoStream {
    pub(super) async fn open(host: &Host) -> EchoStream {
        let stream = TcpStream::connect(echo_through_envoy(host)).await.unwrap();
        let mut stream = EchoStream { stream };
        stream.lives().await;
        stream
    }

    pub(super) async fn lives(&mut self) {
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
pub(super) struct Clients {
    pub(super) kept: Load,
    pub(super) new: Option<Load>,
}

impl Clients {
    pub(super) async fn start(host: &Host) -> Clients {
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
    pub(super) async fn start_persistent(host: &Host) -> Clients {
        let kept = Load::start(Plan::to(host.place.upstream()).rate(300.0)).unwrap();
        let clients = Clients { kept, new: None };
        clients.are_served().await;
        clients
    }

    pub(super) fn loads(&self) -> impl Iterator<Item = &Load> {
        std::iter::once(&self.kept).chain(&self.new)
    }

    pub(super) async fn are_served(&self) {
        self.by("answers", |report| report.ok).await;
    }

    pub(super) async fn by_instance(&self, instance: &str) {
        self.by(instance, |report| report.by_instance.get(instance).copied().unwrap_or(0)).await;
    }

    pub(super) async fn by(&self, what: &str, count: impl Fn(&Report) -> u64) {
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

    pub(super) fn failures(&self) -> u64 {
        self.loads().map(|load| load.so_far().failures).sum()
    }

    pub(super) async fn lost_nothing(self) {
        for load in std::iter::once(self.kept).chain(self.new) {
            let report = load.stop().await;
            assert_eq!((report.failures, report.raced), (0, 0), "{report}");
        }
    }
}
