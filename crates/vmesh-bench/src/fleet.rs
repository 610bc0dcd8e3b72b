//! `cargo xtask bench fleet`: N xDS clients (delta ADS, which ACK everything) against a real control plane
//! over TCP.
//!
//! The control plane is a separate process with S services of E endpoints in files. A change sets one
//! endpoint's weight in one file. Four times are taken on one clock: the file is written, the control plane
//! begins with the change (its metric `vmesh_last_change_timestamp_seconds`), and the first and the last
//! client have ACKed.
//!
//! The baseline ([`baseline`]) is a process that only writes the same bytes over HTTP/2 to the same number of
//! connections of the same clients: no store, no session, no scope. Any time beyond it is the cost of the
//! control plane.

mod baseline;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use clap::Parser;
use vmesh_bench::common::{BOUND, Size, Times, duration_between, mib, run_main};
use vmesh_bench::fleet_client::{DeclaredNode, Fleet, Target};
use vmesh_bench::mesh::{Mesh, Shape, raise_open_files_limit};
use vmesh_bench::usage::cpu_of;
use vmesh_testkit::{Failed, Result};

#[derive(Debug, Clone, Parser)]
#[command(name = "cargo xtask bench fleet")]
struct FleetOptions {
    /// xDS clients, each on a connection of its own.
    #[arg(long, default_value_t = 1_000)]
    nodes: usize,
    #[command(flatten)]
    size: Size,
    /// Services that each node declares; all of them by default. Every node declares the one that changes.
    #[arg(long)]
    upstreams: Option<usize>,
    /// Fail if the fan-out's p99 is more than this many times the baseline's.
    #[arg(long)]
    at_most: Option<f64>,
    /// Also measure the same fleet with mTLS.
    #[arg(long)]
    tls: bool,
    #[arg(long, hide = true)]
    serve_baseline: bool,
}

impl FleetOptions {
    fn shape(&self) -> Shape {
        let Size { services, endpoints, .. } = self.size;
        Shape { services, endpoints, upstreams: self.upstreams, zones: 1, files: None }
    }
}

fn main() -> ExitCode {
    run_main(async |options: FleetOptions| match options.serve_baseline {
        true => baseline::serve(options.size.endpoints).await,
        false => run(&options).await,
    })
}

async fn run(options: &FleetOptions) -> Result<()> {
    raise_open_files_limit(options.nodes)?;
    let (nodes, Size { services, endpoints, changes }) = (&options.nodes, options.size);
    println!("{nodes} nodes x {services} services x {endpoints} endpoints, {changes} changes");
    let control = measure_control_plane(options, false).await?;
    let by_tls = if options.tls { Some(measure_control_plane(options, true).await?) } else { None };
    let base = measure_baseline(options).await?;

    println!("\nconnect to synced       {:>9.2} s    all {nodes} nodes", control.connect.as_secs_f64());
    println!("CPU per connect         {:>9.1} us", us(control.cpu_per_connect));
    println!(
        "resume to synced        {:>9.2} s    with the versions that each node has",
        control.resume.took.as_secs_f64()
    );
    println!(
        "CPU per resume          {:>9.1} us   {:.2} responses",
        us(control.resume.cpu_per_node),
        control.resume.responses_per_node
    );
    println!("idle                    {:>9.2} %    of one core", control.idle * 100.0);
    println!(
        "resident                {:>9.1} MiB  with no node {:.1} MiB",
        mib(control.resident),
        mib(control.resident_idle)
    );
    let per_stream = control.resident.saturating_sub(control.resident_idle) as f64 / *nodes as f64;
    println!("resident per stream     {:>9.1} KiB", per_stream / 1024.0);
    println!(
        "bytes per push          {:>9.0}      baseline {:.0}",
        control.bytes_per_push, base.bytes_per_push
    );
    println!("pushes per change       {:>9.2}      {nodes} streams", control.pushes_per_change);
    println!("encodings per change    {:>9.2}", control.encodings_per_change);
    println!(
        "CPU per push            {:>9.1} us   baseline {:.1} us",
        us(control.cpu_per_push),
        us(base.cpu_per_push)
    );
    println!("\n                                  p50          p99");
    println!("file written to seen      {}", control.detected.row());
    println!("file written to last ACK  {}", control.end_to_end.row());
    println!("change to last ACK        {}", control.fan_out.row());
    println!("baseline, write only      {}", base.fan_out.row());
    if let Some(by_tls) = &by_tls {
        show_tls(&control, by_tls, *nodes);
    }
    let ratio = control.fan_out.p(0.99).as_secs_f64() / base.fan_out.p(0.99).as_secs_f64().max(1e-9);
    let median = control.fan_out.p(0.5).as_secs_f64() / base.fan_out.p(0.5).as_secs_f64().max(1e-9);
    println!("ratio to the baseline     {median:>9.2}    {ratio:>9.2}");
    match options.at_most {
        Some(most) if ratio > most => {
            Err(Failed::new(format!("the p99 is {ratio:.2} times the baseline's, more than {most}")))
        }
        _ => Ok(()),
    }
}

/// Prints the costs with mTLS beside those of plaintext.
fn show_tls(plain: &ControlPlaneCost, tls: &ControlPlaneCost, nodes: usize) {
    let per_stream = |cost: &ControlPlaneCost| {
        cost.resident.saturating_sub(cost.resident_idle) as f64 / nodes as f64 / 1024.0
    };
    println!("\nwith mTLS                    plaintext       mTLS");
    for (name, plain, tls, unit) in [
        ("connect to synced", plain.connect.as_secs_f64(), tls.connect.as_secs_f64(), "s"),
        ("resume to synced", plain.resume.took.as_secs_f64(), tls.resume.took.as_secs_f64(), "s"),
        ("CPU per connect", us(plain.cpu_per_connect), us(tls.cpu_per_connect), "us"),
        ("CPU per resume", us(plain.resume.cpu_per_node), us(tls.resume.cpu_per_node), "us"),
        ("CPU per push", us(plain.cpu_per_push), us(tls.cpu_per_push), "us"),
        ("resident per stream", per_stream(plain), per_stream(tls), "KiB"),
        (
            "change to last ACK, p99",
            plain.fan_out.p(0.99).as_secs_f64() * 1e3,
            tls.fan_out.p(0.99).as_secs_f64() * 1e3,
            "ms",
        ),
    ] {
        println!("{name:<28} {plain:>9.2}  {tls:>9.2}  {unit}");
    }
}

struct ControlPlaneCost {
    connect: Duration,
    /// CPU time of the control plane until all nodes are in sync, per node.
    cpu_per_connect: Duration,
    /// CPU usage of the control plane without changes, as a share of one core.
    idle: f64,
    resume: ResumeCost,
    resident_idle: u64,
    resident: u64,
    bytes_per_push: f64,
    pushes_per_change: f64,
    encodings_per_change: f64,
    cpu_per_push: Duration,
    detected: Times,
    end_to_end: Times,
    fan_out: Times,
}

async fn measure_control_plane(options: &FleetOptions, tls: bool) -> Result<ControlPlaneCost> {
    let mesh = Mesh::start(&options.shape(), "").await?;
    let target = match tls {
        true => Target {
            address: mesh.mtls_xds,
            identities: Some(Arc::new(mesh.identities(options.nodes).await?)),
        },
        false => Target::from(mesh.xds),
    };
    let resident_idle = mesh.control.resident_bytes()?;
    let cpu_before = cpu_of(mesh.control.pid())?;
    let started = Instant::now();
    let mut fleet = Fleet::connect(target, options.nodes, |node| DeclaredNode {
        upstreams: mesh.upstreams(node),
        zone: None,
    })
    .await?;
    // Each node receives all of its services once: clusters, endpoints, and an empty response for listeners.
    let expected = options.upstreams.unwrap_or(options.size.services).min(options.size.services);
    fleet.wait_until_received(expected, BOUND).await?;
    let connect = started.elapsed();
    mesh.wait_until_synced(options.nodes).await?;
    let cpu_per_connect = (cpu_of(mesh.control.pid())? - cpu_before).div_f64(options.nodes.max(1) as f64);
    let resident = mesh.control.resident_bytes()?;

    // Warm-up rounds, so that first allocations of streams are not measured.
    for round in 0..3 {
        apply_change(&mesh, &mut fleet, round).await?;
    }
    let before = read_counters(&mesh).await?;
    let cpu = cpu_of(mesh.control.pid())?;
    let (mut detected, mut end_to_end, mut fan_out) = (Times::default(), Times::default(), Times::default());
    for round in 0..options.size.changes {
        let taken = apply_change(&mesh, &mut fleet, round + 3).await?;
        detected.0.push(duration_between(taken.written, taken.detected));
        end_to_end.0.push(duration_between(taken.written, taken.last_ack));
        fan_out.0.push(duration_between(taken.detected, taken.last_ack));
    }
    let cpu = cpu_of(mesh.control.pid())? - cpu;
    let after = read_counters(&mesh).await?;
    let pushes = (after.responses - before.responses).max(1.0);
    let idle = measure_idle(&mesh).await?;
    let resume = measure_resume(&mesh, &fleet, options.nodes).await?;
    Ok(ControlPlaneCost {
        connect,
        cpu_per_connect,
        idle,
        resume,
        resident_idle,
        resident,
        bytes_per_push: (after.bytes - before.bytes) / pushes,
        pushes_per_change: pushes / options.size.changes as f64,
        encodings_per_change: (after.encodings - before.encodings) / options.size.changes as f64,
        cpu_per_push: cpu.div_f64(pushes),
        detected,
        end_to_end,
        fan_out,
    })
}

/// The cost of reconnecting: all connections are closed, and the clients reconnect with the versions that
/// they have.
struct ResumeCost {
    /// The duration from the first connection until all nodes are in sync.
    took: Duration,
    cpu_per_node: Duration,
    responses_per_node: f64,
}

const IDLE: Duration = Duration::from_secs(5);

/// Samples the CPU usage of a control plane without changes.
async fn measure_idle(mesh: &Mesh) -> Result<f64> {
    // The state is still written after the last change.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = cpu_of(mesh.control.pid())?;
    tokio::time::sleep(IDLE).await;
    Ok((cpu_of(mesh.control.pid())? - before).as_secs_f64() / IDLE.as_secs_f64())
}

async fn measure_resume(mesh: &Mesh, fleet: &Fleet, nodes: usize) -> Result<ResumeCost> {
    fleet.disconnect_all();
    mesh.wait_until_state("offline", nodes).await?;
    let (before, cpu) = (read_counters(mesh).await?, cpu_of(mesh.control.pid())?);
    let started = Instant::now();
    fleet.reconnect_all();
    mesh.wait_until_synced(nodes).await?;
    let took = started.elapsed();
    let cpu = cpu_of(mesh.control.pid())? - cpu;
    let nodes = nodes.max(1) as f64;
    let responses_per_node = (read_counters(mesh).await?.responses - before.responses) / nodes;
    Ok(ResumeCost { took, cpu_per_node: cpu.div_f64(nodes), responses_per_node })
}

struct ChangeTimes {
    written: SystemTime,
    detected: SystemTime,
    last_ack: SystemTime,
}

/// Changes the weight of one endpoint of the first service.
async fn apply_change(mesh: &Mesh, fleet: &mut Fleet, round: usize) -> Result<ChangeTimes> {
    fleet.reset_acks();
    let written = SystemTime::now();
    mesh.change_file(0, 2 + round % 50)?;
    let last_ack = fleet.wait_until_all_acked(BOUND).await?;
    let detected = mesh.api.metric("vmesh_last_change_timestamp_seconds").await?;
    Ok(ChangeTimes { written, detected: UNIX_EPOCH + Duration::from_secs_f64(detected), last_ack })
}

struct BaselineCost {
    bytes_per_push: f64,
    cpu_per_push: Duration,
    fan_out: Times,
}

async fn measure_baseline(options: &FleetOptions) -> Result<BaselineCost> {
    let mut server = baseline::BaselineServer::start(options.size.endpoints).await?;
    let mut fleet = Fleet::connect(server.address, options.nodes, |_| DeclaredNode::default()).await?;
    server.wait_until_connected(options.nodes, BOUND).await?;
    for _ in 0..3 {
        fleet.reset_acks();
        server.push().await?;
        fleet.wait_until_all_acked(BOUND).await?;
    }
    let cpu = cpu_of(server.pid())?;
    let mut fan_out = Times::default();
    for _ in 0..options.size.changes {
        fleet.reset_acks();
        let began = server.push().await?;
        fan_out.0.push(duration_between(began, fleet.wait_until_all_acked(BOUND).await?));
    }
    let cpu = cpu_of(server.pid())? - cpu;
    let pushes = (options.size.changes * options.nodes).max(1) as f64;
    Ok(BaselineCost { bytes_per_push: server.bytes as f64, cpu_per_push: cpu.div_f64(pushes), fan_out })
}

/// Counters of the control plane.
struct XdsCounters {
    responses: f64,
    bytes: f64,
    encodings: f64,
}

async fn read_counters(mesh: &Mesh) -> Result<XdsCounters> {
    Ok(XdsCounters {
        responses: mesh.api.metric("vmesh_xds_responses_total").await?,
        bytes: mesh.api.metric("vmesh_xds_bytes_sent_total").await?,
        encodings: mesh.api.metric("vmesh_xds_encodings_total").await?,
    })
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
