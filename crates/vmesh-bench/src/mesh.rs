//! A control plane under measurement, whose services are in files.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::Path;
use std::process::Command;

use vmesh_daemon::fetch::{Peer, post};
use vmesh_testkit::api::Api;
use vmesh_testkit::place::{Loopback, TempDir, tempdir};
use vmesh_testkit::process::{Daemon, binary};
use vmesh_testkit::{Failed, Result, wait_for};

use crate::common::BOUND;
use crate::identities::FleetIdentities;

/// The locality zones, to which endpoints are assigned in turn.
pub const ZONES: [&str; 3] = ["eu-1a", "eu-1b", "eu-1c"];

/// The size of a mesh: its services, and how many of them each node declares. `upstreams: None` declares all
/// of them.
#[derive(Debug, Clone)]
pub struct Shape {
    pub services: usize,
    pub endpoints: usize,
    pub upstreams: Option<usize>,
    /// The number of locality zones with endpoints.
    pub zones: usize,
    /// The number of service files. `None`: one file per service.
    pub files: Option<usize>,
}

impl Shape {
    pub fn files(&self) -> usize {
        self.files.unwrap_or(self.services).clamp(1, self.services.max(1))
    }

    /// Returns the services in file number `file`, in order.
    pub fn services_in(&self, file: usize) -> Range<usize> {
        let begin = |file: usize| file * self.services / self.files();
        begin(file)..begin(file + 1)
    }
}

/// The control plane under measurement, and its files.
pub struct Mesh {
    dir: TempDir,
    _home: Loopback,
    pub control: Daemon,
    pub xds: SocketAddr,
    pub mtls_xds: SocketAddr,
    pub api: Api,
    shape: Shape,
}

impl Mesh {
    /// Starts a control plane. `documents` is the text of its mesh documents; empty for none.
    pub async fn start(shape: &Shape, documents: &str) -> Result<Mesh> {
        let dir = tempdir()?;
        make_dir(&dir.join("services.d"))?;
        make_dir(&dir.join("mesh.d"))?;
        if !documents.is_empty() {
            write(&dir.join("mesh.d/mesh.yaml"), documents)?;
        }
        let home = Loopback::unique()?;
        let (xds, api) = (SocketAddr::new(home.ip(), 15010), Api(SocketAddr::new(home.ip(), 15014)));
        let mtls_xds = SocketAddr::new(home.ip(), 15012);
        for file in 0..shape.files() {
            write(&dir.join(path_of(file)), &file_text(file, shape, 1))?;
        }
        let config = format!(
            "discovery: [{{file: {{path: services.d}}}}]\ndocuments: {{dir: mesh.d}}\nlisten: {{xds: \"{mtls_xds}\", xds_plaintext: \"{xds}\", api: \"{}\"}}\nstate_dir: state\n\
             log: warn\n",
            api.0
        );
        write(&dir.join("control.yaml"), &config)?;
        let mut command = Command::new(binary("vmesh-control")?);
        command.args(["--config", "control.yaml"]).current_dir(&*dir);
        let mut control = Daemon::spawn("vmesh-control", command)?;
        control.wait_http(&Peer::Tcp(api.0), "/readyz", BOUND).await?;
        Ok(Mesh { dir, _home: home, control, xds, mtls_xds, api, shape: shape.clone() })
    }

    /// Makes the certificate authority, and returns certificates of `nodes` nodes.
    pub async fn identities(&self, nodes: usize) -> Result<FleetIdentities> {
        let socket = Peer::Unix(self.dir.join("state/api.sock"));
        let answer = post(&socket, "/api/v1/identity/init", "{}".into(), BOUND).await;
        let (status, body) = answer.map_err(Failed::to("could not make the authority"))?;
        match status.is_success() {
            true => FleetIdentities::issue(&self.dir.join("state"), nodes),
            false => Err(Failed::new(format!("no authority: {}", String::from_utf8_lossy(&body)))),
        }
    }

    /// Changes the weight of the first endpoint in file number `file`.
    pub fn change_file(&self, file: usize, weight: usize) -> Result<()> {
        self.replace(&path_of(file), &file_text(file, &self.shape, weight))
    }

    /// Waits until `nodes` nodes have ACKed everything that they received.
    pub async fn wait_until_synced(&self, nodes: usize) -> Result<()> {
        self.wait_until_state("synced", nodes).await
    }

    /// Waits until `nodes` nodes are in this state of the metric `vmesh_nodes`.
    pub async fn wait_until_state(&self, state: &str, nodes: usize) -> Result<()> {
        let metric = format!("vmesh_nodes{{state=\"{state}\"}}");
        wait_for(format!("{nodes} nodes to be {state}"), BOUND, async || {
            let now = self.api.metric(&metric).await.map_err(|failed| failed.to_string())?;
            if now as usize == nodes { Ok(()) } else { Err(format!("{now} are")) }
        })
        .await
    }

    /// Replaces a file atomically, so that no reader sees a partial one.
    pub fn replace(&self, file: &str, text: &str) -> Result<()> {
        let temporary = self.dir.join(".new");
        write(&temporary, text)?;
        let file = self.dir.join(file);
        std::fs::rename(&temporary, &file).map_err(Failed::to(format!("could not write {}", file.display())))
    }

    /// Returns the services that node number `node` declares, including the one that changes. Empty means all
    /// services.
    pub fn upstreams(&self, node: usize) -> Vec<String> {
        let Some(count) = self.shape.upstreams else { return Vec::new() };
        let others =
            (0..count.saturating_sub(1)).map(|at| 1 + (node * 7 + at) % (self.shape.services - 1).max(1));
        std::iter::once(0).chain(others).map(name).collect()
    }
}

pub fn zone(number: usize) -> &'static str {
    ZONES.get(number % ZONES.len()).copied().unwrap_or_default()
}

pub fn name(service: usize) -> String {
    format!("service-{service:05}")
}

fn path_of(file: usize) -> String {
    format!("services.d/{}.yaml", name(file))
}

/// Returns the text of a file, in which the first endpoint has this weight.
fn file_text(file: usize, shape: &Shape, weight: usize) -> String {
    let services = shape.services_in(file);
    let first = services.start;
    let text = |service| registration_text(service, shape, if service == first { weight } else { 1 });
    services.map(text).collect::<Vec<_>>().join("---\n")
}

/// Returns the registration of a service, in which the first endpoint has this weight.
fn registration_text(service: usize, shape: &Shape, weight: usize) -> String {
    let mut text = format!("service: {}\nprotocol: http\nendpoints:\n", name(service));
    for endpoint in 0..shape.endpoints {
        let [a, b] = u16::try_from(service % 65_536).unwrap_or_default().to_be_bytes();
        let weight = if endpoint == 0 { weight } else { 1 };
        _ = writeln!(
            text,
            "  - {{address: \"10.{a}.{b}.{}:{}\", zone: {}, version: v1, weight: {weight}}}",
            endpoint % 250 + 1,
            8000 + endpoint / 250,
            zone(endpoint % shape.zones.max(1))
        );
    }
    text
}

/// Raises the limit of open files. Each node needs two descriptors: one in this process, and one in the
/// child, which inherits the limit.
pub fn raise_open_files_limit(nodes: usize) -> Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let wanted = nodes as u64 + 1_000;
    let now = getrlimit(Resource::Nofile);
    if now.current.is_some_and(|limit| limit < wanted) {
        let maximum = now.maximum.map(|limit| limit.max(wanted));
        setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum }).map_err(Failed::to(
            format!("{nodes} nodes need {wanted} open files: raise the limit with `ulimit -n {wanted}`"),
        ))?;
    }
    Ok(())
}

fn make_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Failed::to(format!("could not make {}", dir.display())))
}

fn write(file: &Path, text: &str) -> Result<()> {
    std::fs::write(file, text).map_err(Failed::to(format!("could not write {}", file.display())))
}
