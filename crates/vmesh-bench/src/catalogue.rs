//! `cargo xtask bench catalogue`: the cost of one changed endpoint for a control plane, by the number of
//! services.
//!
//! The control plane reads services from files: first with one file per service, then with a few large files.
//! One client subscribes to all services. Every 1.5 s the weight of one endpoint changes. The CPU time and
//! the bytes written until the next change are the cost of the change, including the state on disk.

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::Parser;
use vmesh_bench::common::{BOUND, Samples, Size, Times, duration_between, millis, run_main};
use vmesh_bench::fleet_client::{DeclaredNode, Fleet};
use vmesh_bench::mesh::{Mesh, Shape};
use vmesh_bench::usage::{cpu_of, cpu_of_threads, written_by};
use vmesh_testkit::{Failed, Result};

/// `--services` is the largest catalogue: 100, 1,000 and 10,000 services are measured up to it.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "cargo xtask bench catalogue",
    mut_arg("services", |services| services.default_value("10000")),
    mut_arg("changes", |changes| changes.default_value("30"))
)]
struct CatalogueOptions {
    #[command(flatten)]
    size: Size,
    /// Files in the second case of each catalogue.
    #[arg(long, default_value_t = 10)]
    files: usize,
    /// Measure only the largest catalogue.
    #[arg(long)]
    alone: bool,
    /// Fail if a change of the largest catalogue, with one file per service, takes more CPU (p50, in
    /// milliseconds).
    #[arg(long)]
    at_most_cpu: Option<f64>,
    /// Fail if such a change writes more (p50, in kilobytes).
    #[arg(long)]
    at_most_written: Option<f64>,
}

/// The pause after a change. The state is written within 300 ms.
const BETWEEN: Duration = Duration::from_millis(1_500);

/// The first changes, which allocate memory and are not counted.
const WARM: usize = 3;

fn main() -> ExitCode {
    run_main(async |options: CatalogueOptions| run(&options).await)
}

async fn run(options: &CatalogueOptions) -> Result<()> {
    let Size { services: most, endpoints, changes } = options.size;
    println!("services of {endpoints} endpoints, {changes} changes of one endpoint\n");
    println!(
        "services   files     CPU p50      mean   written p50       mean   to disk mean      ACK p50       p99   idle CPU/s"
    );
    let mut sizes: Vec<usize> =
        [100, 1_000, 10_000].into_iter().filter(|size| *size < most && !options.alone).collect();
    sizes.push(most);
    for services in sizes {
        for files in [None, Some(options.files)] {
            let shape = Shape { services, endpoints, upstreams: None, zones: 1, files };
            let cost = measure(&shape, changes).await?;
            println!("{}", cost.row(&shape));
            if services == most && files.is_none() {
                cost.judge(options)?;
            }
        }
    }
    Ok(())
}

/// The cost of one change.
struct ChangeCost {
    cpu: Times,
    cpu_mean: Duration,
    written: Samples<u64>,
    /// Bytes per change that reached the file system, in whole pages.
    to_disk_mean: f64,
    ack: Times,
    /// CPU time per second without changes.
    idle: Duration,
}

impl ChangeCost {
    fn row(&self, shape: &Shape) -> String {
        let kb = |bytes: f64| bytes / 1e3;
        let mean = self.written.0.iter().sum::<u64>() as f64 / self.written.0.len().max(1) as f64;
        format!(
            "{:>8} {:>7}  {:>7.1} ms {:>6.1} ms {:>10.1} kB {:>7.1} kB {:>11.1} kB {:>9.1} ms {:>6.1} ms {:>9.1} ms",
            shape.services,
            shape.files(),
            millis(self.cpu.p(0.5)),
            millis(self.cpu_mean),
            kb(self.written.p(0.5) as f64),
            kb(mean),
            kb(self.to_disk_mean),
            millis(self.ack.p(0.5)),
            millis(self.ack.p(0.99)),
            millis(self.idle),
        )
    }

    fn judge(&self, options: &CatalogueOptions) -> Result<()> {
        let cpu = millis(self.cpu.p(0.5));
        let written = self.written.p(0.5) as f64 / 1e3;
        match (options.at_most_cpu, options.at_most_written) {
            (Some(most), _) if cpu > most => {
                Err(Failed::new(format!("a change takes {cpu:.1} ms of CPU, more than {most}")))
            }
            (_, Some(most)) if written > most => {
                Err(Failed::new(format!("a change writes {written:.1} kB, more than {most}")))
            }
            _ => Ok(()),
        }
    }
}

async fn measure(shape: &Shape, changes: usize) -> Result<ChangeCost> {
    let mesh = Mesh::start(shape, "").await?;
    let pid = mesh.control.pid();
    let mut fleet = Fleet::connect(mesh.xds, 1, |_| DeclaredNode::default()).await?;
    fleet.wait_until_received(shape.services, BOUND).await?;
    mesh.wait_until_synced(1).await?;
    tokio::time::sleep(BETWEEN * 2).await;
    let (before, idle) = (cpu_of(pid)?, BETWEEN * 8);
    tokio::time::sleep(idle).await;
    let idle = (cpu_of(pid)? - before).div_f64(idle.as_secs_f64());

    let (mut cpu, mut written, mut ack) = (Times::default(), Samples::default(), Times::default());
    let (mut cpu_began, mut disk_began) = (Duration::ZERO, 0);
    for round in 0..changes + WARM {
        if round == WARM {
            (cpu_began, disk_began) = (cpu_of(pid)?, written_by(pid)?.to_disk);
        }
        let (cpu_before, written_before) = (cpu_of_threads(pid)?, written_by(pid)?.by_calls);
        fleet.reset_acks();
        let changed_at = SystemTime::now();
        mesh.change_file(round * 7 % shape.files(), 2 + round % 50)?;
        let acked = fleet.wait_until_all_acked(BOUND).await?;
        tokio::time::sleep(BETWEEN).await;
        if round >= WARM {
            cpu.0.push(cpu_of_threads(pid)?.saturating_sub(cpu_before));
            written.0.push(written_by(pid)?.by_calls - written_before);
            ack.0.push(duration_between(changed_at, acked));
        }
    }
    let count = changes.max(1) as f64;
    Ok(ChangeCost {
        cpu,
        cpu_mean: (cpu_of(pid)? - cpu_began).div_f64(count),
        written,
        to_disk_mean: (written_by(pid)?.to_disk - disk_began) as f64 / count,
        ack,
        idle,
    })
}
