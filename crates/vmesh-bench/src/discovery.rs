//! `cargo xtask bench discovery`: the time from registering an instance in a real Consul or ZooKeeper to the
//! ACK of an xDS client, and the load on the registry.
//!
//! A change adds one instance of a service, each time of another one. The clock starts when the registry has
//! confirmed the registration. The control plane and the registry are separate processes on the same machine
//! as the client.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant, SystemTime};

use clap::{Parser, ValueEnum};
use vmesh_bench::common::{BOUND, Size, Times, duration_between, mib, millis, run_main};
use vmesh_bench::fleet_client::{DeclaredNode, Fleet};
use vmesh_daemon::fetch::Peer;
use vmesh_testkit::api::Api;
use vmesh_testkit::consul::{self, Consul};
use vmesh_testkit::place::{Loopback, tempdir};
use vmesh_testkit::process::{Daemon, binary};
use vmesh_testkit::registry::{Instance, Registry};
use vmesh_testkit::{Failed, Result};

#[derive(Debug, Clone, Parser)]
#[command(name = "cargo xtask bench discovery", mut_arg("services", |services| services.default_value("10")))]
struct DiscoveryOptions {
    #[arg(value_enum)]
    registry: RegistryKind,
    #[command(flatten)]
    size: Size,
    /// Consul only: use plaintext HTTP/1.1, where each concurrent query needs a connection.
    #[arg(long)]
    plaintext: bool,
    /// Consul only: register instances without a health check.
    #[arg(long)]
    unchecked: bool,
    /// Fail if the p99 is more than this many milliseconds.
    #[arg(long)]
    at_most: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RegistryKind {
    Consul,
    Zookeeper,
}

fn main() -> ExitCode {
    run_main(async |options: DiscoveryOptions| run(&options).await)
}

/// Returns instance number `endpoint` of service number `service`.
fn instance(service: usize, endpoint: usize, has_check: bool) -> Instance {
    let [_, _, a, b] = u32::try_from(service).unwrap_or_default().to_be_bytes();
    let ip = IpAddr::V4(Ipv4Addr::new(10, a, b, u8::try_from(endpoint % 250 + 1).unwrap_or(1)));
    let port = 8000 + u16::try_from(endpoint / 250).unwrap_or_default();
    let name = format!("service-{service:05}");
    let instance = Instance::new(&name, &format!("{name}-{endpoint:05}"), SocketAddr::new(ip, port));
    Instance { has_check, ..instance }
}

async fn run(options: &DiscoveryOptions) -> Result<()> {
    let Size { services, endpoints, changes } = options.size;
    let mut registry = match options.registry {
        RegistryKind::Consul => {
            let tls = !options.plaintext;
            Registry::Consul(Consul::start(consul::Options { tls, ..consul::Options::default() }).await?)
        }
        RegistryKind::Zookeeper => Registry::zookeeper(1).await?,
    };
    println!("{}: {services} services x {endpoints} endpoints, {changes} changes", registry.name());
    let began = Instant::now();
    let has_check = !options.unchecked;
    let of_one = |service| (0..endpoints).map(move |at| instance(service, at, has_check));
    let all: Vec<_> = (0..services).flat_map(of_one).collect();
    registry.fill(&all).await?;
    println!("registered in           {:>9.2} s", began.elapsed().as_secs_f64());

    let dir = tempdir()?;
    let home = Loopback::unique()?;
    let (xds, api) = (SocketAddr::new(home.ip(), 15010), Api(SocketAddr::new(home.ip(), 15014)));
    let config = format!(
        "discovery:\n  {}\nlisten: {{xds_plaintext: \"{xds}\", api: \"{}\"}}\nstate_dir: state\nlog: warn\n",
        source_config(options, &registry)?,
        api.0
    );
    let file = dir.join("control.yaml");
    std::fs::write(&file, config).map_err(Failed::to("could not write control.yaml"))?;
    let mut command = Command::new(binary("vmesh-control")?);
    command.args(["--config", "control.yaml"]).current_dir(&*dir);
    let started = Instant::now();
    let mut control = Daemon::spawn("vmesh-control", command)?;
    control.wait_http(&Peer::Tcp(api.0), "/readyz", BOUND).await?;
    println!("start to ready          {:>9.2} s", started.elapsed().as_secs_f64());
    let mut fleet = Fleet::connect(xds, 1, |_| DeclaredNode::default()).await?;
    fleet.wait_until_received(services, BOUND).await?;
    let first = read_counters(&api).await?;
    println!("reads until then        {:>9.0}", first.reads);

    // Every blocking query is waiting by now.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = read_counters(&api).await?;
    let mut times = Times::default();
    for change in 0..changes + 3 {
        let new = instance(change * 7 % services, endpoints + change, has_check);
        fleet.reset_acks();
        registry.add(&new).await?;
        let registered = SystemTime::now();
        let acked = fleet.wait_until_all_acked(BOUND).await?;
        // The first changes allocate memory and are not counted.
        if change >= 3 {
            times.0.push(duration_between(registered, acked));
        }
        // A pause, because a registry under constant change would be another measurement.
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    let after = read_counters(&api).await?;
    let p = |share: f64| millis(times.p(share));
    println!("registered to last ACK  p50 {:.1} ms, p99 {:.1} ms", p(0.5), p(0.99));
    println!("reads per change        {:>9.2}", (after.reads - before.reads) / (changes + 3) as f64);
    println!("connections             {:>9.0}    made {:.0}", after.connections, after.connects);
    println!("resident                {:>9.1} MiB", mib(control.resident_bytes()?));
    match options.at_most {
        Some(most) if p(0.99) > most => {
            Err(Failed::new(format!("the p99 is {:.1} ms, more than {most}", p(0.99))))
        }
        _ => Ok(()),
    }
}

fn source_config(options: &DiscoveryOptions, registry: &Registry) -> Result<String> {
    match registry {
        Registry::Consul(consul) if !options.plaintext => {
            let files = consul.tls();
            Ok(format!(
                "- consul: {{name: registry, address: \"{}\", tls: {{ca_file: {:?}, cert_file: {:?}, key_file: {:?}, \
                 server_name: server.dc1.consul}}}}",
                consul.https_url(0)?,
                files.ca.display().to_string(),
                files.cert.display().to_string(),
                files.key.display().to_string()
            ))
        }
        other => other.source(""),
    }
}

struct DiscoveryCounters {
    reads: f64,
    connects: f64,
    connections: f64,
}

async fn read_counters(api: &Api) -> Result<DiscoveryCounters> {
    let discovery = api.json("/api/v1/discovery").await?;
    let counter = |name: &str| {
        let value = discovery.pointer(&format!("/sources/0/counters/{name}"));
        value
            .and_then(serde_json::Value::as_f64)
            .ok_or_else(|| Failed::new(format!("no counter {name} in {discovery}")))
    };
    Ok(DiscoveryCounters {
        reads: counter("reads")?,
        connects: counter("connects")?,
        connections: counter("connections")?,
    })
}
