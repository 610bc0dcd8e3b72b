//! A control plane under measurement, on services in files.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use vmesh_daemon::fetch::Peer;
use vmesh_testkit::api::Api;
use vmesh_testkit::place::{Loopback, TempDir, tempdir};
use vmesh_testkit::process::{Daemon, binary};
use vmesh_testkit::{Failed, Result};

/// Limit for everything that a bench waits for.
pub(crate) const BOUND: Duration = Duration::from_secs(300);

/// The zones of endpoints, in turns.
pub(crate) const ZONES: [&str; 3] = ["eu-1a", "eu-1b", "eu-1c"];

/// The services of a mesh, and how many of them each node declares: all of them if that is left out.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    pub(crate) services: usize,
    pub(crate) endpoints: usize,
    pub(crate) upstreams: Option<usize>,
    /// The number of zones that endpoints are in.
    pub(crate) zones: usize,
}

/// The control plane under measurement, and its files.
pub(crate) struct Mesh {
    dir: TempDir,
    _home: Loopback,
    pub(crate) control: Daemon,
    pub(crate) xds: SocketAddr,
    pub(crate) api: Api,
    shape: Shape,
}

impl Mesh {
    /// Starts a control plane with the text of `documents`, if there is any.
    pub(crate) async fn start(shape: &Shape, documents: &str) -> Result<Mesh> {
        let dir = tempdir()?;
        make(&dir.join("services.d"))?;
        make(&dir.join("mesh.d"))?;
        if !documents.is_empty() {
            write(&dir.join("mesh.d/mesh.yaml"), documents)?;
        }
        let home = Loopback::unique()?;
        let (xds, api) = (SocketAddr::new(home.ip(), 15010), Api(SocketAddr::new(home.ip(), 15014)));
        for service in 0..shape.services {
            write(&dir.join(format!("services.d/{}.yaml", name(service))), &registered(service, shape, 1))?;
        }
        let config = format!(
            "discovery: [{{file: {{path: services.d}}}}]\ndocuments: {{dir: mesh.d}}\nlisten: {{xds_plaintext: \"{xds}\", api: \"{}\"}}\nstate_dir: state\n\
             log: warn\n",
            api.0
        );
        write(&dir.join("control.yaml"), &config)?;
        let mut command = Command::new(binary("vmesh-control")?);
        command.args(["--config", "control.yaml"]).current_dir(&*dir);
        let mut control = Daemon::spawn("vmesh-control", command)?;
        control.wait_http(&Peer::Tcp(api.0), "/readyz", BOUND).await?;
        Ok(Mesh { dir, _home: home, control, xds, api, shape: shape.clone() })
    }

    pub(crate) fn write_service(&self, service: usize, weight: usize) -> Result<()> {
        self.replace(&format!("services.d/{}.yaml", name(service)), &registered(service, &self.shape, weight))
    }

    /// Writes a file beside the old one, and renames it: no reader sees a part of it.
    pub(crate) fn replace(&self, file: &str, text: &str) -> Result<()> {
        let temporary = self.dir.join(".new");
        write(&temporary, text)?;
        let file = self.dir.join(file);
        std::fs::rename(&temporary, &file).map_err(Failed::to(format!("could not write {}", file.display())))
    }

    /// The services that node `node` declares, the one that changes among them; none is all.
    pub(crate) fn upstreams(&self, node: usize) -> Vec<String> {
        let Some(count) = self.shape.upstreams else { return Vec::new() };
        let others =
            (0..count.saturating_sub(1)).map(|at| 1 + (node * 7 + at) % (self.shape.services - 1).max(1));
        std::iter::once(0).chain(others).map(name).collect()
    }
}

pub(crate) fn zone(number: usize) -> &'static str {
    ZONES.get(number % ZONES.len()).copied().unwrap_or_default()
}

pub(crate) fn name(service: usize) -> String {
    format!("service-{service:05}")
}

/// A service's file; `weight` is that of its first endpoint.
fn registered(service: usize, shape: &Shape, weight: usize) -> String {
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

pub(crate) fn since(from: SystemTime, to: SystemTime) -> Duration {
    to.duration_since(from).unwrap_or_default()
}

/// User and system time of a process so far.
pub(crate) fn cpu_of(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let stat = std::fs::read_to_string(&path).map_err(Failed::to(format!("could not read {path}")))?;
    // The second field is in parentheses and may hold anything.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or_default();
    let per_second = rustix::param::clock_ticks_per_second();
    Ok(Duration::from_secs_f64((ticks(11) + ticks(12)) as f64 / per_second as f64))
}

/// Two descriptors for each node: one end here, one in a child that inherits the limit.
pub(crate) fn open_files(nodes: usize) -> Result<()> {
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

fn make(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Failed::to(format!("could not make {}", dir.display())))
}

fn write(file: &Path, text: &str) -> Result<()> {
    std::fs::write(file, text).map_err(Failed::to(format!("could not write {}", file.display())))
}

pub(crate) fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Latencies of one kind.
#[derive(Default)]
pub(crate) struct Times(pub(crate) Vec<Duration>);

impl Times {
    pub(crate) fn p(&self, share: f64) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort();
        let at = ((sorted.len() as f64 * share).ceil() as usize).saturating_sub(1);
        sorted.get(at).copied().unwrap_or_default()
    }

    pub(crate) fn row(&self) -> String {
        let ms = |time: Duration| format!("{:>9.2} ms", time.as_secs_f64() * 1e3);
        format!("{} {}", ms(self.p(0.5)), ms(self.p(0.99)))
    }
}
