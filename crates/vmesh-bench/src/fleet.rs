//! `cargo xtask bench fleet`: N xDS clients (delta ADS, ACKing all) against a real control plane over TCP.
//!
//! The control plane is its own process, on S services of E endpoints in files. A change is one endpoint's weight in one
//! file. Four moments are taken on one clock: the file is written, the control plane has seen the change (its metric
//! `vmesh_last_change_timestamp_seconds`), the first and the last client has ACKed.
//!
//! The baseline ([`baseline`]) is a process that does nothing but write the same bytes over HTTP/2 to the same number
//! of connections of the very same clients: no store, no session, no scope. What the fan-out takes beyond that is ours.

mod baseline;
mod fleet_client;

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;
use fleet_client::Fleet;
use vmesh_daemon::fetch::Peer;
use vmesh_daemon::report;
use vmesh_testkit::api::Api;
use vmesh_testkit::place::{Loopback, TempDir, tempdir};
use vmesh_testkit::process::{Daemon, binary};
use vmesh_testkit::{Failed, Result, wait_for};

#[derive(Debug, Clone, Parser)]
#[command(name = "cargo xtask bench fleet")]
struct Options {
    /// xDS clients, each on a connection of its own.
    #[arg(long, default_value_t = 1_000)]
    nodes: usize,
    #[arg(long, default_value_t = 1_000)]
    services: usize,
    /// Endpoints of each service.
    #[arg(long, default_value_t = 10)]
    endpoints: usize,
    /// How many services each node declares; all of them if it is left out. Every node has the one that changes.
    #[arg(long)]
    upstreams: Option<usize>,
    #[arg(long, default_value_t = 50)]
    changes: usize,
    /// Ends non-zero if the fan-out's p99 takes more than so many times the baseline's.
    #[arg(long)]
    at_most: Option<f64>,
    #[arg(long, hide = true)]
    serve_baseline: bool,
}

const BOUND: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return report::failed(&error),
    };
    let done = match options.serve_baseline {
        true => runtime.block_on(baseline::serve(options.endpoints)),
        false => runtime.block_on(run(&options)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failed) => report::failed(&failed),
    }
}

async fn run(options: &Options) -> Result<()> {
    open_files(options.nodes)?;
    let Options { nodes, services, endpoints, changes, .. } = options;
    println!("{nodes} nodes x {services} services x {endpoints} endpoints, {changes} changes");
    let ours = measure_control_plane(options).await?;
    let base = measure_baseline(options).await?;

    println!("\nconnect to synced       {:>9.2} s    all {nodes} nodes", ours.connect.as_secs_f64());
    println!(
        "resident                {:>9.1} MiB  with no node {:.1} MiB",
        mib(ours.resident),
        mib(ours.resident_idle)
    );
    let per_stream = ours.resident.saturating_sub(ours.resident_idle) as f64 / *nodes as f64;
    println!("resident per stream     {:>9.1} KiB", per_stream / 1024.0);
    println!("bytes per push          {:>9.0}      baseline {:.0}", ours.bytes_per_push, base.bytes_per_push);
    println!("pushes per change       {:>9.2}      {nodes} streams", ours.pushes_per_change);
    println!("encodings per change    {:>9.2}", ours.encodings_per_change);
    println!(
        "CPU per push            {:>9.1} us   baseline {:.1} us",
        us(ours.cpu_per_push),
        us(base.cpu_per_push)
    );
    println!("\n                                  p50          p99");
    println!("file written to seen      {}", ours.seen.row());
    println!("file written to last ACK  {}", ours.whole.row());
    println!("change to last ACK        {}", ours.fan_out.row());
    println!("baseline, write only      {}", base.fan_out.row());
    let ratio = ours.fan_out.p(0.99).as_secs_f64() / base.fan_out.p(0.99).as_secs_f64().max(1e-9);
    let median = ours.fan_out.p(0.5).as_secs_f64() / base.fan_out.p(0.5).as_secs_f64().max(1e-9);
    println!("ratio to the baseline     {median:>9.2}    {ratio:>9.2}");
    match options.at_most {
        Some(most) if ratio > most => {
            Err(Failed::new(format!("the p99 is {ratio:.2} times the baseline's, more than {most}")))
        }
        _ => Ok(()),
    }
}

/// Latencies of one kind.
#[derive(Default)]
struct Times(Vec<Duration>);

impl Times {
    fn p(&self, share: f64) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort();
        let at = ((sorted.len() as f64 * share).ceil() as usize).saturating_sub(1);
        sorted.get(at).copied().unwrap_or_default()
    }

    fn row(&self) -> String {
        let ms = |time: Duration| format!("{:>9.2} ms", time.as_secs_f64() * 1e3);
        format!("{} {}", ms(self.p(0.5)), ms(self.p(0.99)))
    }
}

struct Ours {
    connect: Duration,
    resident_idle: u64,
    resident: u64,
    bytes_per_push: f64,
    pushes_per_change: f64,
    encodings_per_change: f64,
    cpu_per_push: Duration,
    seen: Times,
    whole: Times,
    fan_out: Times,
}

async fn measure_control_plane(options: &Options) -> Result<Ours> {
    let mesh = Mesh::start(options).await?;
    let resident_idle = mesh.control.resident_bytes()?;
    let started = Instant::now();
    let mut fleet = Fleet::connect(mesh.xds, options.nodes, |node| mesh.upstreams(node)).await?;
    // All services of a node, once: the clusters, their endpoints and an empty answer for listeners.
    let expected = options.upstreams.unwrap_or(options.services).min(options.services);
    fleet.until_held(expected, BOUND).await?;
    let connect = started.elapsed();
    wait_for("all nodes to be in sync", BOUND, async || {
        let synced =
            mesh.api.metric("vmesh_nodes{state=\"synced\"}").await.map_err(|failed| failed.to_string())?;
        if synced as usize == options.nodes { Ok(()) } else { Err(format!("{synced} are")) }
    })
    .await?;
    let resident = mesh.control.resident_bytes()?;

    // Warm, so that the first allocation of every stream is not what is measured.
    for round in 0..3 {
        change(&mesh, &mut fleet, round).await?;
    }
    let before = mesh.counted().await?;
    let cpu = cpu_of(mesh.control.pid())?;
    let (mut seen, mut whole, mut fan_out) = (Times::default(), Times::default(), Times::default());
    for round in 0..options.changes {
        let taken = change(&mesh, &mut fleet, round + 3).await?;
        seen.0.push(since(taken.written, taken.seen));
        whole.0.push(since(taken.written, taken.last_ack));
        fan_out.0.push(since(taken.seen, taken.last_ack));
    }
    let cpu = cpu_of(mesh.control.pid())? - cpu;
    let after = mesh.counted().await?;
    let pushes = (after.responses - before.responses).max(1.0);
    Ok(Ours {
        connect,
        resident_idle,
        resident,
        bytes_per_push: (after.bytes - before.bytes) / pushes,
        pushes_per_change: pushes / options.changes as f64,
        encodings_per_change: (after.encodings - before.encodings) / options.changes as f64,
        cpu_per_push: cpu.div_f64(pushes),
        seen,
        whole,
        fan_out,
    })
}

struct Taken {
    written: SystemTime,
    seen: SystemTime,
    last_ack: SystemTime,
}

/// One endpoint of the first service gets another weight.
async fn change(mesh: &Mesh, fleet: &mut Fleet, round: usize) -> Result<Taken> {
    fleet.expect_one_each();
    let written = SystemTime::now();
    mesh.write_service(0, 2 + round % 50)?;
    let last_ack = fleet.until_all_acked(BOUND).await?;
    let seen = mesh.api.metric("vmesh_last_change_timestamp_seconds").await?;
    Ok(Taken { written, seen: UNIX_EPOCH + Duration::from_secs_f64(seen), last_ack })
}

struct Base {
    bytes_per_push: f64,
    cpu_per_push: Duration,
    fan_out: Times,
}

async fn measure_baseline(options: &Options) -> Result<Base> {
    let mut server = baseline::Server::start(options.endpoints).await?;
    let mut fleet = Fleet::connect(server.address, options.nodes, |_| Vec::new()).await?;
    server.until_connected(options.nodes, BOUND).await?;
    for _ in 0..3 {
        fleet.expect_one_each();
        server.push().await?;
        fleet.until_all_acked(BOUND).await?;
    }
    let cpu = cpu_of(server.pid())?;
    let mut fan_out = Times::default();
    for _ in 0..options.changes {
        fleet.expect_one_each();
        let began = server.push().await?;
        fan_out.0.push(since(began, fleet.until_all_acked(BOUND).await?));
    }
    let cpu = cpu_of(server.pid())? - cpu;
    let pushes = (options.changes * options.nodes).max(1) as f64;
    Ok(Base { bytes_per_push: server.bytes as f64, cpu_per_push: cpu.div_f64(pushes), fan_out })
}

/// The control plane under measurement, and its files.
struct Mesh {
    dir: TempDir,
    _home: Loopback,
    control: Daemon,
    xds: SocketAddr,
    api: Api,
    options: Options,
}

struct Counted {
    responses: f64,
    bytes: f64,
    encodings: f64,
}

impl Mesh {
    async fn start(options: &Options) -> Result<Mesh> {
        let dir = tempdir()?;
        make(&dir.join("services.d"))?;
        let home = Loopback::unique()?;
        let (xds, api) = (SocketAddr::new(home.ip(), 15010), Api(SocketAddr::new(home.ip(), 15014)));
        for service in 0..options.services {
            write(&dir.join(format!("services.d/{}.yaml", name(service))), &registered(service, options, 1))?;
        }
        let config = format!(
            "discovery: [{{file: {{path: services.d}}}}]\nlisten: {{xds_plaintext: \"{xds}\", api: \"{}\"}}\nstate_dir: state\n\
             log: warn\n",
            api.0
        );
        write(&dir.join("control.yaml"), &config)?;
        let mut command = Command::new(binary("vmesh-control")?);
        command.args(["--config", "control.yaml"]).current_dir(&*dir);
        let mut control = Daemon::spawn("vmesh-control", command)?;
        control.wait_http(&Peer::Tcp(api.0), "/readyz", BOUND).await?;
        Ok(Mesh { dir, _home: home, control, xds, api, options: options.clone() })
    }

    fn write_service(&self, service: usize, weight: usize) -> Result<()> {
        let file = self.dir.join(format!("services.d/{}.yaml", name(service)));
        let temporary = self.dir.join("services.d/.new");
        write(&temporary, &registered(service, &self.options, weight))?;
        std::fs::rename(&temporary, &file).map_err(Failed::to(format!("could not write {}", file.display())))
    }

    /// The services that node `node` declares, the one that changes among them; none is all.
    fn upstreams(&self, node: usize) -> Vec<String> {
        let Some(count) = self.options.upstreams else { return Vec::new() };
        let others =
            (0..count.saturating_sub(1)).map(|at| 1 + (node * 7 + at) % (self.options.services - 1).max(1));
        std::iter::once(0).chain(others).map(name).collect()
    }

    async fn counted(&self) -> Result<Counted> {
        Ok(Counted {
            responses: self.api.metric("vmesh_xds_responses_total").await?,
            bytes: self.api.metric("vmesh_xds_bytes_sent_total").await?,
            encodings: self.api.metric("vmesh_xds_encodings_total").await?,
        })
    }
}

fn name(service: usize) -> String {
    format!("service-{service:05}")
}

/// A service's file; `weight` is that of its first endpoint.
fn registered(service: usize, options: &Options, weight: usize) -> String {
    let mut text = format!("service: {}\nprotocol: http\nendpoints:\n", name(service));
    for endpoint in 0..options.endpoints {
        let [a, b] = u16::try_from(service % 65_536).unwrap_or_default().to_be_bytes();
        let weight = if endpoint == 0 { weight } else { 1 };
        _ = writeln!(
            text,
            "  - {{address: \"10.{a}.{b}.{}:{}\", zone: eu-1a, version: v1, weight: {weight}}}",
            endpoint % 250 + 1,
            8000 + endpoint / 250
        );
    }
    text
}

fn since(from: SystemTime, to: SystemTime) -> Duration {
    to.duration_since(from).unwrap_or_default()
}

/// User and system time of a process so far.
fn cpu_of(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let stat = std::fs::read_to_string(&path).map_err(Failed::to(format!("could not read {path}")))?;
    // The second field is in parentheses and may hold anything.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or_default();
    let per_second = rustix::param::clock_ticks_per_second();
    Ok(Duration::from_secs_f64((ticks(11) + ticks(12)) as f64 / per_second as f64))
}

/// Two descriptors for each node: one end here, one in a child that inherits the limit.
fn open_files(nodes: usize) -> Result<()> {
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

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
