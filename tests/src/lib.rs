//! A whole mesh for one test: a control plane, agents with real Envoys and applications, on addresses and in
//! a directory of the test's own. The tests are in `tests/`.

pub mod vm;

pub mod hosts;

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;
use vmesh_daemon::fetch::Peer;
use vmesh_testkit::api::{Api, field};
use vmesh_testkit::place::{Loopback, TempDir, tempdir};
use vmesh_testkit::process::{Daemon, binary};
use vmesh_testkit::{Failed, Result, envoy, wait_for};

/// The time limit of anything that takes milliseconds on an idle machine.
pub const BOUND: Duration = Duration::from_secs(30);

/// A mesh. Dropping it stops its processes and removes its files.
pub struct Mesh {
    dir: TempDir,
    home: Loopback,
    pub xds: SocketAddr,
    pub api: SocketAddr,
    /// Additional control planes that agents get in their configuration when they are started.
    pub replicas: Vec<SocketAddr>,
    control: Option<Daemon>,
    agents: BTreeMap<String, AgentProcess>,
}

/// A second control plane for the configuration of a [`Mesh`].
pub struct Replica {
    pub xds: SocketAddr,
    pub api: Api,
    pub daemon: Daemon,
    _home: Loopback,
}

struct AgentProcess {
    config: PathBuf,
    daemon: Option<Daemon>,
    place: Loopback,
}

impl Mesh {
    /// Starts a control plane on `services.d` and `mesh.d`, which contain only `files`.
    pub async fn start(files: &[(&str, &str)]) -> Result<Mesh> {
        let mut mesh = Mesh::prepare(files)?;
        mesh.start_control().await?;
        Ok(mesh)
    }

    /// Prepares the same mesh without starting it.
    pub fn prepare(files: &[(&str, &str)]) -> Result<Mesh> {
        Mesh::prepare_on("  - file: {path: services.d}\n", "documents: {dir: mesh.d}\n", files)
    }

    /// Starts a control plane with an authority, which serves nodes at its mTLS port, and whose leaves are valid for `leaf_lifetime`.
    pub async fn secure(files: &[(&str, &str)], leaf_lifetime: &str) -> Result<Mesh> {
        let mut mesh = Mesh::prepare(files)?;
        let config = fs::read_to_string(mesh.path("control.yaml"));
        let config = config.map_err(Failed::to("could not read control.yaml"))?;
        let mtls = mesh.mtls_xds();
        let config = config.replace("listen: {", &format!("listen: {{xds: \"{mtls}\", "));
        let identity = format!("trust_domain: mesh.test\nidentity: {{leaf_lifetime: {leaf_lifetime}}}\n");
        mesh.write("control.yaml", &format!("{config}{identity}"))?;
        mesh.start_control().await?;
        mesh.admin(&["ca", "init"])?;
        Ok(mesh)
    }

    /// Returns the address of the mTLS port.
    pub fn mtls_xds(&self) -> SocketAddr {
        SocketAddr::new(self.home.ip(), 15012)
    }

    /// Runs `vmeshctl` through the control plane's Unix socket, and returns its output.
    pub fn admin(&self, args: &[&str]) -> Result<String> {
        let output = self.admin_output(args)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        match output.status.code() {
            Some(0 | 3) => Ok(text),
            _ => {
                let error = String::from_utf8_lossy(&output.stderr).into_owned();
                Err(Failed::new(format!("vmeshctl {}: {error}", args.join(" "))))
            }
        }
    }

    /// Runs `vmeshctl` through the control plane's Unix socket.
    pub fn admin_output(&self, args: &[&str]) -> Result<Output> {
        let mut command = Command::new(binary("vmeshctl")?);
        let socket = self.path("state/control/api.sock");
        command.args(["--api", &format!("unix:{}", socket.display())]).args(args);
        command.output().map_err(Failed::to("could not start vmeshctl"))
    }

    /// Changes the configuration of an agent, which reads it at its next start.
    pub fn edit_agent(&self, name: &str, from: &str, to: &str) -> Result<()> {
        let agent = self.agents.get(name).ok_or_else(|| Failed::new(format!("there is no agent {name}")))?;
        let file = agent.config.display().to_string();
        let config =
            fs::read_to_string(self.path(&file)).map_err(Failed::to(format!("could not read {file}")))?;
        self.write(&file, &config.replace(from, to))
    }

    /// Starts an agent that joins with a token for `services`: see [`Mesh::agent`].
    pub async fn secure_agent(
        &mut self,
        name: &str,
        services: &[&str],
        calls: &[&str],
        more: &str,
    ) -> Result<()> {
        let mut args = vec!["token", "create", "--node", name, "--ttl", "10m"];
        services.iter().for_each(|service| args.extend(["--service", service]));
        let token = self.admin(&args)?;
        let file = format!("agents/{name}.token");
        self.write(&file, &token)?;
        let more = format!("join: {{token_file: {file}}}\n{more}");
        let control_plane = format!("\"{}\"", self.mtls_xds());
        self.agent_of(&control_plane, name, calls, &more).await
    }

    /// Prepares a control plane with these sources (a YAML list) and more YAML for `control.yaml`, without
    /// starting it.
    pub fn prepare_on(discovery: &str, more: &str, files: &[(&str, &str)]) -> Result<Mesh> {
        let (dir, home) = (tempdir()?, Loopback::unique()?);
        // The address belongs to this test, with all its ports.
        let (xds, api) = (SocketAddr::new(home.ip(), 15010), SocketAddr::new(home.ip(), 15014));
        let mesh = Mesh { dir, home, xds, api, replicas: Vec::new(), control: None, agents: BTreeMap::new() };
        for dir in ["services.d", "mesh.d", "agents"] {
            make(&mesh.path(dir))?;
        }
        for (file, text) in files {
            mesh.write(file, text)?;
        }
        let config = format!(
            "discovery:\n{discovery}\n{more}\n\
             listen: {{xds_plaintext: \"{xds}\", api: \"{api}\"}}\nstate_dir: state/control\n"
        );
        mesh.write("control.yaml", &config)?;
        Ok(mesh)
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    /// Returns the text of all state that the next start of the control plane would read.
    pub fn kept_state(&self) -> String {
        let state = self.path("state/control");
        let entries =
            |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
        // The state of a source is incomplete without its head.
        let sources = entries(&state.join("sources")).filter(|source| source.join("head.json").is_file());
        let files = entries(&state).chain(sources.flat_map(|source| entries(&source)));
        // A file that is still being written does not survive a kill.
        let whole = files.filter(|file| file.extension().is_some_and(|extension| extension == "json"));
        whole.filter_map(|file| fs::read_to_string(file).ok()).collect()
    }

    pub fn home(&self) -> &Loopback {
        &self.home
    }

    /// Writes a file atomically: to a temporary file that is then renamed.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.path(file);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = path.with_file_name(format!(".{name}.tmp"));
        let written = fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, &path));
        written.map_err(Failed::to(format!("could not write {}", path.display())))
    }

    pub fn remove(&self, file: &str) -> Result<()> {
        fs::remove_file(self.path(file)).map_err(Failed::to(format!("could not remove {file}")))
    }

    pub async fn start_control(&mut self) -> Result<()> {
        let mut daemon = self.spawn_control()?;
        daemon.wait_http(&Peer::Tcp(self.api), "/readyz", BOUND).await?;
        self.control = Some(daemon);
        Ok(())
    }

    /// Starts a second control plane from the same files, on the same ports of another address.
    pub async fn start_replica(&self) -> Result<Replica> {
        let home = Loopback::unique()?;
        let (xds, api) = (SocketAddr::new(home.ip(), 15010), SocketAddr::new(home.ip(), 15014));
        let config = fs::read_to_string(self.path("control.yaml"))
            .map_err(Failed::to("could not read control.yaml"))?;
        let config = config
            .replace(&self.xds.to_string(), &xds.to_string())
            .replace(&self.api.to_string(), &api.to_string())
            .replace("state/control", "state/replica");
        self.write("replica.yaml", &config)?;
        let mut daemon = self.spawn_replica()?;
        daemon.wait_http(&Peer::Tcp(api), "/readyz", BOUND).await?;
        Ok(Replica { xds, api: Api(api), daemon, _home: home })
    }

    /// Starts the second control plane again, without waiting for it.
    pub fn spawn_replica(&self) -> Result<Daemon> {
        let mut command = Command::new(binary("vmesh-control")?);
        command.args(["--config", "replica.yaml"]).current_dir(&*self.dir);
        Daemon::spawn("the replica", command)
    }

    /// Starts the control plane without waiting for it.
    pub fn spawn_control(&self) -> Result<Daemon> {
        let mut command = Command::new(binary("vmesh-control")?);
        command.args(["--config", "control.yaml"]).current_dir(&*self.dir);
        Daemon::spawn("vmesh-control", command)
    }

    /// Waits until a control plane that the test started is ready, and uses it as the control plane of this
    /// mesh.
    pub async fn adopt_control(&mut self, mut daemon: Daemon) -> Result<()> {
        daemon.wait_http(&Peer::Tcp(self.api), "/readyz", BOUND).await?;
        self.control = Some(daemon);
        Ok(())
    }

    /// Returns the address of the xDS server.
    pub fn xds(&self) -> SocketAddr {
        self.xds
    }

    /// Returns the address of the API.
    pub fn api(&self) -> SocketAddr {
        self.api
    }

    pub fn control(&mut self) -> Result<&mut Daemon> {
        self.control.as_mut().ok_or_else(|| Failed::new("the control plane was not started"))
    }

    /// Starts an agent on an address of its own. Its applications dial their upstreams on this address: the
    /// services of `calls` on ports 9001 and up. `more` is additional YAML for its configuration.
    pub async fn agent(&mut self, name: &str, calls: &[&str], more: &str) -> Result<()> {
        let control_planes: Vec<_> = std::iter::once(self.xds)
            .chain(self.replicas.iter().copied())
            .map(|xds| format!("\"http://{xds}\""))
            .collect();
        self.agent_of(&control_planes.join(", "), name, calls, more).await
    }

    async fn agent_of(&mut self, control_planes: &str, name: &str, calls: &[&str], more: &str) -> Result<()> {
        let place = Loopback::unique()?;
        let ip = place.ip();
        let mut config = format!(
            "control_plane: [{control_planes}]\nstate_dir: state/{name}\nrun_dir: run/{name}\n\
             envoy: {{path: {:?}, manage: child, concurrency: 1, drain: 1s}}\n\
             listen: {{api: \"{ip}:15020\"}}\nnode: {{name: {name}, address: {ip}}}\n",
            envoy::find()?.display().to_string(),
        );
        if !calls.is_empty() {
            config.push_str("upstreams:\n");
        }
        for (at, service) in calls.iter().enumerate() {
            config.push_str(&format!("  - {{service: {service}, listen: \"{ip}:{}\"}}\n", 9001 + at));
        }
        config.push_str(&more.replace("{ip}", &ip.to_string()));
        let file = format!("agents/{name}.yaml");
        self.write(&file, &config)?;
        let daemon = self.spawn_agent(&file, name)?;
        self.agents
            .insert(name.to_owned(), AgentProcess { config: file.into(), daemon: Some(daemon), place });
        Ok(())
    }

    fn spawn_agent(&self, file: &str, name: &str) -> Result<Daemon> {
        let mut command = Command::new(binary("vmesh-agent")?);
        command.args(["--config", file]).current_dir(&*self.dir);
        Daemon::spawn(format!("vmesh-agent {name}"), command)
    }

    fn the(&mut self, name: &str) -> Result<&mut AgentProcess> {
        self.agents.get_mut(name).ok_or_else(|| Failed::new(format!("there is no agent {name}")))
    }

    pub fn agent_daemon(&mut self, name: &str) -> Result<&mut Daemon> {
        let agent = self.the(name)?;
        agent.daemon.as_mut().ok_or_else(|| Failed::new(format!("the agent {name} is not running")))
    }

    /// Starts a killed agent again.
    pub fn restart_agent(&mut self, name: &str) -> Result<()> {
        let file = self.the(name)?.config.display().to_string();
        let daemon = self.spawn_agent(&file, name)?;
        self.the(name)?.daemon = Some(daemon);
        Ok(())
    }

    /// Changes `node.name` in the configuration of an agent that is not running.
    pub fn rename_agent(&mut self, name: &str, node: &str) -> Result<()> {
        let file = self.the(name)?.config.display().to_string();
        let path = self.path(&file);
        let config = fs::read_to_string(&path).map_err(Failed::to(format!("could not read {file}")))?;
        self.write(&file, &config.replace(&format!("name: {name},"), &format!("name: {node},")))
    }

    /// Returns the address at which the node's applications dial the upstream with index `at` in `calls`.
    pub fn upstream(&self, name: &str, at: u16) -> Result<SocketAddr> {
        let agent = self.agents.get(name).ok_or_else(|| Failed::new(format!("there is no agent {name}")))?;
        Ok(SocketAddr::new(agent.place.ip(), 9001 + at))
    }

    pub fn agent_api(&self, name: &str) -> Result<SocketAddr> {
        let agent = self.agents.get(name).ok_or_else(|| Failed::new(format!("there is no agent {name}")))?;
        Ok(SocketAddr::new(agent.place.ip(), 15020))
    }

    pub fn envoy(&self, name: &str) -> envoy::Envoy {
        envoy::Envoy::at_socket(self.path(&format!("run/{name}/admin.sock")))
    }

    /// Waits until the node has accepted all of its resources.
    pub async fn synced(&self, name: &str) -> Result<()> {
        let api = Api(self.api);
        wait_for(format!("{name} to be in sync"), BOUND, async || api.is_synced(name).await).await
    }

    /// Waits until an HTTP request to `address` is answered with 200.
    pub async fn answers(&self, address: SocketAddr) -> Result<()> {
        wait_for(format!("an answer of {address}"), BOUND, async || {
            Api(address).text("/").await.map(|_| ()).map_err(|failed| failed.to_string())
        })
        .await
    }

    pub async fn get(&self, path: &str) -> Result<Value> {
        Api(self.api).json(path).await
    }

    pub async fn metric(&self, name: &str) -> Result<f64> {
        Api(self.api).metric(name).await
    }

    /// Lists all problems as `place: message`, without the path of the test's directory.
    pub async fn problems(&self) -> Result<Vec<String>> {
        let answer = self.get("/api/v1/problems").await?;
        let all = answer.get("problems").and_then(Value::as_array).cloned().unwrap_or_default();
        Ok(all
            .iter()
            .map(|problem| format!("{}: {}", field(problem, "place"), field(problem, "message")))
            .collect())
    }

    /// Waits for a problem that contains `part`, and returns it.
    pub async fn problem(&self, part: &str) -> Result<String> {
        wait_for(format!("a problem with `{part}`"), BOUND, async || {
            let problems = self.problems().await.map_err(|failed| failed.to_string())?;
            problems.iter().find(|problem| problem.contains(part)).cloned().ok_or(problems.join("\n"))
        })
        .await
    }

    /// Returns the addresses of a service's endpoints, each with its health if that is known.
    pub async fn endpoints(&self, service: &str) -> Result<Vec<String>> {
        let answer = self.get("/api/v1/services").await?;
        let all = answer.get("services").and_then(Value::as_array).cloned().unwrap_or_default();
        let Some(service) = all.iter().find(|known| field(known, "name") == service) else {
            return Ok(Vec::new());
        };
        let endpoints = service.get("endpoints").and_then(Value::as_array).cloned().unwrap_or_default();
        let shown = |endpoint: &Value| match field(endpoint, "health").as_str() {
            "unknown" => field(endpoint, "address"),
            health => format!("{} {health}", field(endpoint, "address")),
        };
        Ok(endpoints.iter().map(shown).collect())
    }

    /// Waits until the service has these endpoints.
    pub async fn until_endpoints(&self, service: &str, expected: &[&str]) -> Result<()> {
        wait_for(format!("{service} to be {expected:?}"), BOUND, async || {
            let now = self.endpoints(service).await.map_err(|failed| failed.to_string())?;
            if now == expected { Ok(()) } else { Err(format!("{now:?}")) }
        })
        .await
    }

    /// Runs `vmeshctl` against this control plane.
    pub fn ctl(&self, args: &[&str]) -> Result<Output> {
        let mut command = Command::new(binary("vmeshctl")?);
        command.args(args).env("VMESH_API", format!("http://{}", self.api));
        command.output().map_err(Failed::to("could not start vmeshctl"))
    }
}

fn make(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(Failed::to(format!("could not make {}", dir.display())))
}
