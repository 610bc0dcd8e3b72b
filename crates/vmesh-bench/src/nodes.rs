//! `cargo xtask bench nodes`: the cost of `Node` documents for a control plane, and how long a change of
//! documents delays other changes.
//!
//! The same fleet connects to control planes that differ only in their documents. The ratios compare each
//! with the fleet without documents, in the same run.

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use clap::Parser;
use vmesh_bench::common::{BOUND, Size, Times, duration_between, mib, run_main};
use vmesh_bench::fleet_client::{DeclaredNode, Fleet};
use vmesh_bench::mesh::{Mesh, Shape, name, raise_open_files_limit, zone};
use vmesh_bench::usage::cpu_of;
use vmesh_testkit::Result;

#[derive(Debug, Clone, Parser)]
#[command(name = "cargo xtask bench nodes", mut_arg("changes", |changes| changes.default_value("20")))]
struct NodesOptions {
    #[arg(long, default_value_t = 1_000)]
    nodes: usize,
    // `--changes`: of an endpoint, with and without a simultaneous change of documents.
    #[command(flatten)]
    size: Size,
    /// Services that each node declares.
    #[arg(long, default_value_t = 20)]
    upstreams: usize,
}

fn main() -> ExitCode {
    run_main(async |options: NodesOptions| run(&options).await)
}

/// A set of documents for a fleet, with one or several for each node.
struct DocumentsCase {
    title: &'static str,
    zones: usize,
    documents: String,
}

fn cases(nodes: usize) -> Vec<DocumentsCase> {
    let each = |body: &dyn Fn(usize) -> String| -> String {
        let one = |number| format!("kind: Node\nname: node-{number:05}\n{}\n", body(number));
        (0..nodes).map(one).collect::<Vec<_>>().join("---\n")
    };
    let near = "---\nkind: Mesh\nload_balancing: {locality: prefer_local}\n";
    let settings = |number: usize| format!("timeouts: {{connect: {}s}}", 1 + number % 10);
    vec![
        DocumentsCase { title: "no documents", zones: 1, documents: String::new() },
        DocumentsCase {
            title: "an upstream each",
            zones: 1,
            documents: each(&|_| format!("upstreams: [{{service: {}}}]", name(0))),
        },
        DocumentsCase {
            title: "the same settings each",
            zones: 1,
            documents: each(&|_| "timeouts: {connect: 3s}".to_owned()),
        },
        DocumentsCase { title: "ten different settings", zones: 1, documents: each(&settings) },
        DocumentsCase {
            title: "three zones",
            zones: 3,
            documents: near.trim_start_matches("---\n").to_owned(),
        },
        DocumentsCase {
            title: "three zones, same settings",
            zones: 3,
            documents: each(&|_| "timeouts: {connect: 3s}".to_owned()) + near,
        },
        DocumentsCase { title: "three zones, ten settings", zones: 3, documents: each(&settings) + near },
    ]
}

async fn run(options: &NodesOptions) -> Result<()> {
    raise_open_files_limit(options.nodes)?;
    let NodesOptions { nodes, size: Size { services, endpoints, .. }, upstreams } = options;
    println!("{nodes} nodes of {upstreams} upstreams x {services} services x {endpoints} endpoints\n");
    println!(
        "Node documents                connect to synced        CPU      resident  classes  ratio to no documents"
    );
    let mut plain = None;
    for case in cases(*nodes) {
        let cost = measure(options, &case).await?;
        let base = plain.get_or_insert(cost);
        println!(
            "{:<28} {:>10.2} s     {:>7.2} s  {:>8.1} MiB  {:>6}   CPU {:>5.2}  resident {:>5.2}",
            case.title,
            cost.connect.as_secs_f64(),
            cost.cpu.as_secs_f64(),
            mib(cost.resident),
            cost.classes,
            cost.cpu.as_secs_f64() / base.cpu.as_secs_f64().max(1e-9),
            cost.resident as f64 / (base.resident as f64).max(1.0),
        );
    }
    edits(options).await
}

#[derive(Clone, Copy)]
struct FleetCost {
    connect: Duration,
    cpu: Duration,
    resident: u64,
    classes: usize,
}

async fn connect(options: &NodesOptions, mesh: &Mesh, zones: usize) -> Result<Fleet> {
    let declared = |node| DeclaredNode {
        upstreams: mesh.upstreams(node),
        zone: (zones > 1).then(|| zone(node % zones)),
    };
    let mut fleet = Fleet::connect(mesh.xds, options.nodes, declared).await?;
    fleet.wait_until_received(options.upstreams.min(options.size.services), BOUND).await?;
    mesh.wait_until_synced(options.nodes).await?;
    Ok(fleet)
}

fn shape(options: &NodesOptions, zones: usize) -> Shape {
    let NodesOptions { size: Size { services, endpoints, .. }, upstreams, .. } = *options;
    Shape { services, endpoints, upstreams: Some(upstreams), zones, files: None }
}

async fn measure(options: &NodesOptions, case: &DocumentsCase) -> Result<FleetCost> {
    let mesh = Mesh::start(&shape(options, case.zones), &case.documents).await?;
    let cpu = cpu_of(mesh.control.pid())?;
    let started = Instant::now();
    let _fleet = connect(options, &mesh, case.zones).await?;
    let connect = started.elapsed();
    Ok(FleetCost {
        connect,
        cpu: cpu_of(mesh.control.pid())? - cpu,
        resident: mesh.control.resident_bytes()?,
        classes: mesh.api.metric("vmesh_classes").await? as usize,
    })
}

/// Measures changes of a service's endpoint: first alone, then with a simultaneous edit of another service's
/// document. Every node calls both services, so each node's own listeners depend on the edit.
async fn edits(options: &NodesOptions) -> Result<()> {
    let document = |seconds: usize| {
        format!(
            "kind: Node\nlabels: {{none: such}}\nupstreams: []\n---\nkind: Service\nname: {}\ntimeouts: {{idle: {}s}}\n",
            name(1),
            60 + seconds
        )
    };
    let mesh = Mesh::start(&shape(options, 1), &document(0)).await?;
    let declared = |node| {
        let mut upstreams = mesh.upstreams(node);
        upstreams.push(name(1));
        DeclaredNode { upstreams, zone: None }
    };
    let mut fleet = Fleet::connect(mesh.xds, options.nodes, declared).await?;
    fleet.wait_until_received(options.upstreams.min(options.size.services), BOUND).await?;
    let (mut alone, mut beside) = (Times::default(), Times::default());
    for round in 0..options.size.changes + 3 {
        for (times, edited) in [(&mut alone, false), (&mut beside, true)] {
            fleet.reset_acks();
            if edited {
                mesh.replace("mesh.d/mesh.yaml", &document(1 + round))?;
            }
            let written = SystemTime::now();
            mesh.change_file(0, 2 + (2 * round + usize::from(edited)) % 50)?;
            let last_ack = fleet.wait_until_all_acked(BOUND).await?;
            if round >= 3 {
                times.0.push(duration_between(written, last_ack));
            }
        }
    }
    println!("\nan endpoint of one service          p50          p99");
    println!("file written to last ACK  {}", alone.row());
    println!("beside a document's edit  {}", beside.row());
    Ok(())
}
