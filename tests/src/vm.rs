//! Hosts whose connections are captured: network namespaces on a switch, each with a real agent, Envoy and
//! vmesh-net. The control plane has a host of its own.
//!
//! vmesh-net has the privileges. The agent and its Envoy run as [`MESH`], applications as [`APP`].

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;
use vmesh_testkit::app::HttpApp;
use vmesh_testkit::netns::{Host, Iptables, Switch, Tools};
use vmesh_testkit::place::{TempDir, tempdir};
use vmesh_testkit::process::{Daemon, binary};
use vmesh_testkit::{Failed, Result, envoy, wait_for};

use crate::BOUND;

/// The user of the agent and of its Envoy.
pub const MESH: u32 = 4000;
/// The user of applications.
pub const APP: u32 = 5000;

/// A switch with a control plane.
pub struct Site {
    dir: TempDir,
    switch: Switch,
    control_host: Host,
    control: Option<Daemon>,
    envoy: PathBuf,
}

/// A host in the mesh.
pub struct Vm {
    pub host: Host,
    pub name: String,
    pub agent: Option<Daemon>,
    pub net: Option<Daemon>,
    pub tools: Tools,
    dir: PathBuf,
    backend: Rules,
}

/// The tool that changes the rules of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rules {
    Nft,
    Iptables,
}

impl Site {
    /// Starts a control plane with these files, which are below `services.d` and `mesh.d`.
    pub async fn start(files: &[(&str, &str)]) -> Result<Site> {
        let dir = tempdir()?;
        fs::set_permissions(&dir, Permissions::from_mode(0o755))
            .map_err(Failed::to("could not open a directory"))?;
        for below in ["services.d", "mesh.d"] {
            make(&dir.join(below))?;
        }
        // Other users cannot read the cache directory.
        let envoy = dir.join("envoy");
        let cached = envoy::find()?;
        if fs::hard_link(&cached, &envoy).is_err() {
            fs::copy(&cached, &envoy).map_err(Failed::to("could not copy Envoy"))?;
        }
        let switch = Switch::new()?;
        let control_host = switch.host()?;
        let mut site = Site { dir, switch, control_host, control: None, envoy };
        for (file, text) in files {
            site.write(file, text)?;
        }
        let ip = site.control_host.v4;
        let config = format!(
            "discovery:\n  - file: {{path: services.d}}\ndocuments: {{dir: mesh.d}}\n\
             listen: {{xds_plaintext: \"{ip}:15010\", insecure: true, api: \"127.0.0.1:15014\"}}\n\
             state_dir: state\n"
        );
        site.write("control.yaml", &config)?;
        site.start_control().await?;
        Ok(site)
    }

    /// Writes a file of the control plane atomically.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.dir.join(file);
        let temporary = path.with_extension("tmp");
        let written = fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, &path));
        written.map_err(Failed::to(format!("could not write {file}")))
    }

    pub async fn start_control(&mut self) -> Result<()> {
        let mut command = self.control_host.command(binary("vmesh-control")?);
        command.args(["--config", "control.yaml"]).current_dir(&*self.dir);
        self.control = Some(Daemon::spawn("vmesh-control", command)?);
        wait_for("the control plane", BOUND, async || self.control_api("/readyz").map(drop)).await
    }

    /// Returns a response of the control plane's API.
    pub fn control_api(&self, path: &str) -> Result<String> {
        self.control_host.within(|| get("127.0.0.1:15014", path))?
    }

    /// Returns the log of the control plane.
    pub fn control_output(&self) -> String {
        self.control.as_ref().map(Daemon::output).unwrap_or_default()
    }

    /// Kills the control plane, as a power cut would.
    pub fn kill_control(&mut self) {
        self.control = None;
    }

    /// Creates a host outside the mesh.
    pub fn outsider(&self) -> Result<Host> {
        self.switch.host()
    }

    pub fn switch(&self) -> &Switch {
        &self.switch
    }

    /// Creates a host with vmesh-net and an agent. `more` is YAML for `agent.yaml`: `upstreams`, `workloads`,
    /// `capture`.
    pub async fn vm(&self, name: &str, rules: Rules, more: &str) -> Result<Vm> {
        let host = self.switch.host()?;
        let dir = self.dir.join(name);
        make(&dir)?;
        for (below, owner, mode) in
            [("net", None, 0o755), ("run", Some(MESH), 0o755), ("state", Some(MESH), 0o700)]
        {
            let path = dir.join(below);
            make(&path)?;
            let set = chown(&path, owner, Some(MESH))
                .and_then(|()| fs::set_permissions(&path, Permissions::from_mode(mode)));
            set.map_err(Failed::to(format!("could not give {} to its user", path.display())))?;
        }
        // With this mode, the socket in the directory belongs to the agent's group.
        let set = fs::set_permissions(dir.join("net"), Permissions::from_mode(0o2755));
        set.map_err(Failed::to("could not set a mode"))?;
        let tools = host.tools(Iptables::Nft)?;
        let vm = Vm { host, name: name.to_owned(), agent: None, net: None, tools, dir, backend: rules };
        vm.configure(&self.xds(), &self.envoy, more)?;
        Ok(vm)
    }

    fn xds(&self) -> String {
        format!("{}:15010", self.control_host.v4)
    }

    /// Writes another configuration for a host; its agent reads it at its next start.
    pub fn configure(&self, vm: &Vm, more: &str) -> Result<()> {
        vm.configure(&self.xds(), &self.envoy, more)
    }
}

impl Vm {
    fn configure(&self, xds: &str, envoy: &Path, more: &str) -> Result<()> {
        let Vm { host, name, dir, .. } = self;
        let (dir, more) = (
            dir.display(),
            more.replace("capture: {", &format!("capture: {{socket: {}/net/net.sock, ", dir.display())),
        );
        let config = format!(
            "control_plane: [{{address: \"http://{xds}\", insecure: true}}]\nstate_dir: {dir}/state\nrun_dir: {dir}/run\n\
             envoy: {{path: {:?}, manage: child, concurrency: 1, drain: 1s}}\n\
             node: {{name: {name}, address: {}}}\n{more}\n",
            envoy, host.v4
        );
        let path = self.dir.join("agent.yaml");
        fs::write(&path, config).map_err(Failed::to(format!("could not write {}", path.display())))
    }

    pub fn start_net(&mut self) -> Result<()> {
        let mut command = self.host.command(binary("vmesh-net")?);
        let backend = match self.backend {
            Rules::Nft => "nft",
            Rules::Iptables => "iptables",
        };
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
            .arg(self.dir.join("net/net.sock"))
            .arg("--state-dir")
            .arg(self.dir.join("net/state"))
            .env("PATH", self.tools.path());
        self.net = Some(Daemon::spawn(format!("vmesh-net of {}", self.name), command)?);
        Ok(())
    }

    pub fn start_agent(&mut self) -> Result<()> {
        let agent = binary("vmesh-agent")?;
        // Envoy is a child of the agent, and may need to bind transparently. On a real host a drop-in of its
        // unit allows that.
        let (id, caps) = (MESH.to_string(), "+net_admin");
        let mut command = self.host.command("setpriv");
        command.args([
            "--reuid",
            &id,
            "--regid",
            &id,
            "--clear-groups",
            "--inh-caps",
            caps,
            "--ambient-caps",
            caps,
            "--",
        ]);
        command.arg(agent).arg("--config").arg(self.dir.join("agent.yaml"));
        self.agent = Some(Daemon::spawn(format!("the agent of {}", self.name), command)?);
        Ok(())
    }

    /// Starts vmesh-net and the agent, and waits until the configured traffic is captured.
    pub async fn start(&mut self) -> Result<()> {
        self.start_net()?;
        self.start_agent()?;
        self.captures().await
    }

    pub async fn captures(&self) -> Result<()> {
        let look = async || {
            let status = self.status()?;
            let captures = status.pointer("/capture/captures").is_some_and(|captures| *captures == true);
            match status.pointer("/capture/net/state") {
                Some(state) if captures && *state == "confirmed" => Ok(()),
                _ => Err(Failed::new(format!("{:?}", status.get("capture")))),
            }
        };
        wait_for(&format!("{} to capture", self.name), BOUND, look).await
    }

    /// Returns the status of the agent.
    pub fn status(&self) -> Result<Value> {
        let text = self.agent_api("/status")?;
        serde_json::from_str(&text).map_err(Failed::to("the agent's status is no JSON"))
    }

    pub fn agent_api(&self, path: &str) -> Result<String> {
        self.host.within(|| get("127.0.0.1:15020", path))?
    }

    /// Runs a program of vmesh on this host as root. Returns its output and its exit code.
    pub fn program(&self, name: &str, arguments: &[&str]) -> Result<(String, i32)> {
        let mut command = self.host.command(binary(name)?);
        command.args(arguments).env("PATH", self.tools.path());
        let output = command.env("VMESH_NET", self.socket()).output();
        let output = output.map_err(Failed::to(format!("could not run {name}")))?;
        let text = [output.stdout, output.stderr].concat();
        Ok((String::from_utf8_lossy(&text).into_owned(), output.status.code().unwrap_or(-1)))
    }

    /// Returns the path of the agent's configuration.
    pub fn config_file(&self) -> PathBuf {
        self.dir.join("agent.yaml")
    }

    /// Returns the path of vmesh-net's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("net/net.sock")
    }

    pub fn bypass_flag(&self) -> PathBuf {
        self.dir.join("net/state/bypass")
    }

    pub fn state_file(&self) -> PathBuf {
        self.dir.join("net/state/state.json")
    }

    /// Starts an HTTP application on this host.
    pub fn app(&self, name: &str, address: &str) -> Result<HttpApp> {
        let address: SocketAddr = address.parse().map_err(Failed::to(format!("{address} is no address")))?;
        self.host.within_as(APP, || HttpApp::start(name, "v1", address))?
    }

    /// Returns the virtual addresses of a service, as this host resolves them.
    pub fn names(&self, service: &str) -> Result<Vec<IpAddr>> {
        let text = self.agent_api("/names")?;
        let names: Value = serde_json::from_str(&text).map_err(Failed::to("names are no JSON"))?;
        let addresses =
            names.get(format!("{service}.mesh")).and_then(Value::as_array).cloned().unwrap_or_default();
        Ok(addresses.iter().filter_map(|address| address.as_str()?.parse().ok()).collect())
    }

    /// Returns the output of all firewall tools, without counters and times.
    pub fn ruleset(&self) -> Result<String> {
        self.tools.ruleset()
    }

    /// Sends `GET path` as an application on this host, and returns the body.
    pub fn get(&self, to: &str, path: &str) -> Result<String> {
        self.host.within_as(APP, || get(to, path))?
    }
}

fn make(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(Failed::to(format!("could not create {}", path.display())))
}

/// Sends a request on a new connection, and returns the body of a 200.
pub fn get(to: &str, path: &str) -> Result<String> {
    let failed = || Failed::to(format!("GET {path} at {to} failed"));
    let address: SocketAddr = to.parse().map_err(Failed::to(format!("{to} is no address")))?;
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5)).map_err(failed())?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).map_err(failed())?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {to}\r\nConnection: close\r\n\r\n").map_err(failed())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(failed())?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer.as_str(), ""));
    match head.split(' ').nth(1) {
        Some("200") if head.to_ascii_lowercase().contains("transfer-encoding: chunked") => {
            Ok(unchunked(body))
        }
        Some("200") => Ok(body.to_owned()),
        _ => Err(Failed::new(format!("GET {path} at {to}: {answer}"))),
    }
}

fn unchunked(mut body: &str) -> String {
    let mut text = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size.trim(), 16).unwrap_or(0);
        let (Some(chunk), Some(rest)) = (rest.get(..size), rest.get(size..)) else { break };
        if size == 0 {
            break;
        }
        text += chunk;
        body = rest.trim_start_matches("\r\n");
    }
    text
}

/// A TCP server that speaks first, like MySQL, and then echoes.
pub struct Greeter {
    pub address: SocketAddr,
}

impl Greeter {
    /// Starts the server on the host of the calling thread.
    pub fn start(address: SocketAddr, greeting: &'static str) -> Result<Greeter> {
        let listener =
            TcpListener::bind(address).map_err(Failed::to(format!("could not listen on {address}")))?;
        let address = listener.local_addr().map_err(Failed::to("a listener without an address"))?;
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || {
                    let mut stream = stream;
                    if stream.write_all(greeting.as_bytes()).is_ok()
                        && let Ok(mut reader) = stream.try_clone()
                    {
                        _ = std::io::copy(&mut reader, &mut stream);
                    }
                });
            }
        });
        Ok(Greeter { address })
    }
}

/// Requests from one host, half of them on new connections, until they are stopped.
pub struct Traffic {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<TrafficReport>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Clone, Default)]
pub struct TrafficReport {
    pub requests: u64,
    /// The failed requests, with the time since the start.
    pub failed: Vec<(Duration, String)>,
}

impl Traffic {
    /// Starts sending twenty requests a second to `to`, as [`APP`]. A request that takes longer than 5 s
    /// counts as failed.
    pub fn start(host: &Host, to: &str) -> Traffic {
        let (stop, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(TrafficReport::default())));
        let (stopped, told, to) = (stop.clone(), seen.clone(), to.to_owned());
        // The thread must not borrow the host, so it gets a function that enters it.
        let enter = host.entrance();
        let thread = thread::spawn(move || {
            if let Err(error) = enter(APP) {
                told.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .failed
                    .push((Duration::ZERO, error.to_string()));
                return;
            }
            let began = Instant::now();
            while !stopped.load(Ordering::Relaxed) {
                let outcome = get(&to, "/");
                let mut seen = told.lock().unwrap_or_else(PoisonError::into_inner);
                seen.requests += 1;
                if let Err(error) = outcome {
                    seen.failed.push((began.elapsed(), error.to_string()));
                }
                drop(seen);
                thread::sleep(Duration::from_millis(50));
            }
        });
        Traffic { stop, seen, thread: Some(thread) }
    }

    pub fn so_far(&self) -> TrafficReport {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn stop(mut self) -> TrafficReport {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            _ = thread.join();
        }
        self.so_far()
    }
}
