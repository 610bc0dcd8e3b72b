//! The cost of capture: requests through explicit ports, REDIRECT and TPROXY, compared with requests that
//! bypass Envoy, in one run on the same hosts.
//!
//! With `--services`, the bench instead measures endpoints that are added and removed, and the cost of
//! updating the rules.
//!
//! Hosts are network namespaces with real agents, Envoys and rules. The rounds of all paths are interleaved,
//! and the median is shown. Client, Envoy and server share the machine's cores, so compare the ratios rather
//! than the absolute values.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use vmesh_testkit::app::HttpApp;
use vmesh_testkit::netns::Host;
use vmesh_testkit::{Failed, Result, wait_for};
use vmesh_tests::vm::{APP, Rules, Site, Vm};

#[derive(Debug, Parser)]
struct CaptureOptions {
    /// Seconds for which each path is measured in a round.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Persistent connections, each with one request in flight.
    #[arg(long, default_value_t = 8)]
    connections: usize,
    /// Clients that open a connection for each request.
    #[arg(long, default_value_t = 4)]
    clients: usize,
    /// Instead, add and remove endpoints on a host that captures this many services by real address.
    #[arg(long)]
    services: Option<usize>,
    /// Endpoints of each of these services.
    #[arg(long, default_value_t = 10)]
    endpoints: usize,
    /// With `--services`: changes per second, for half a minute.
    #[arg(long, default_value_t = 100)]
    per_second: u32,
}

/// A network path to the application.
struct NetworkPath<'a> {
    name: &'static str,
    from: &'a Host,
    to: SocketAddr,
}

#[derive(Debug, Clone, Copy)]
struct LatencySummary {
    per_second: f64,
    p50: Duration,
    p99: Duration,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = CaptureOptions::parse();
    let done = match arguments.services {
        Some(services) => measure_changes(services, arguments.endpoints, arguments.per_second).await,
        None => measure_paths(arguments).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn service(name: &str, protocol: &str, address: SocketAddr) -> String {
    format!("service: {name}\nprotocol: {protocol}\nport: 80\nendpoints: [\"{address}\"]\n")
}

async fn measure_paths(arguments: CaptureOptions) -> Result<()> {
    let site = Site::start(&[]).await?;
    let (client, server) = (site.outsider()?, site.outsider()?);
    let app = |on: &Host, port: u16| {
        let address = SocketAddr::from((on.v4, port));
        on.within(|| HttpApp::start("bench", "v1", address))?
    };
    let (http, tcp) = (app(&server, 8080)?, app(&server, 8081)?);
    site.write("services.d/http.yaml", &service("by-http", "http", http.address()))?;
    site.write("services.d/tcp.yaml", &service("by-tcp", "tcp", tcp.address()))?;

    let upstreams = "upstreams: [{service: by-http, listen: \"127.0.0.1:9001\"}, {service: by-tcp, listen: \"127.0.0.1:9002\"}]\n";
    let outbound = format!("{upstreams}capture: {{outbound: {{capture: addresses}}}}");
    let mut nft = site.vm("nft", Rules::Nft, &outbound).await?;
    nft.start().await?;
    let mut iptables = site.vm("iptables", Rules::Iptables, &outbound).await?;
    iptables.start().await?;

    let inbound = start_inbound_hosts(&site).await?;
    let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
    let paths = [
        NetworkPath { name: "direct", from: &client, to: http.address() },
        NetworkPath { name: "explicit port, TCP", from: &nft.host, to: local(9002) },
        NetworkPath {
            name: "nft REDIRECT, virtual address, TCP",
            from: &nft.host,
            to: virtual_address(&nft, "by-tcp")?,
        },
        NetworkPath { name: "nft REDIRECT, real address, TCP", from: &nft.host, to: tcp.address() },
        NetworkPath {
            name: "iptables REDIRECT, virtual address, TCP",
            from: &iptables.host,
            to: virtual_address(&iptables, "by-tcp")?,
        },
        NetworkPath { name: "iptables REDIRECT, real address, TCP", from: &iptables.host, to: tcp.address() },
        NetworkPath { name: "explicit port, HTTP", from: &nft.host, to: local(9001) },
        NetworkPath {
            name: "nft REDIRECT, virtual address, HTTP",
            from: &nft.host,
            to: virtual_address(&nft, "by-http")?,
        },
        NetworkPath {
            name: "iptables REDIRECT, virtual address, HTTP",
            from: &iptables.host,
            to: virtual_address(&iptables, "by-http")?,
        },
    ];
    let mut paths = Vec::from(paths);
    for InboundHost { path, vm, .. } in &inbound {
        paths.push(NetworkPath { name: path, from: &client, to: SocketAddr::from((vm.host.v4, 8080)) });
    }

    let span = Duration::from_secs(arguments.seconds);
    let mut persistent: Vec<Vec<LatencySummary>> = vec![Vec::new(); paths.len()];
    let mut per_request = persistent.clone();
    for round in 0..arguments.rounds {
        eprintln!("round {} of {}", round + 1, arguments.rounds);
        for (path, (persistent, per_request)) in paths.iter().zip(persistent.iter_mut().zip(&mut per_request))
        {
            persistent.push(measure(path, arguments.connections, span, true)?);
            per_request.push(measure(path, arguments.clients, span, false)?);
        }
    }
    print("connections kept open", arguments.connections, &paths, &persistent);
    print("a connection for each request", arguments.clients, &paths, &per_request);
    Ok(())
}

/// A host that captures inbound connections to its application.
struct InboundHost {
    /// The name of the network path to it.
    path: &'static str,
    vm: Vm,
    _app: HttpApp,
}

/// Starts one host for each backend and each kind of inbound capture.
async fn start_inbound_hosts(site: &Site) -> Result<Vec<InboundHost>> {
    let mut hosts = Vec::new();
    for (path, name, rules, capture) in [
        ("nft REDIRECT, inbound, TCP", "in-nft", Rules::Nft, "redirect"),
        ("nft TPROXY, inbound, TCP", "in-nft-tproxy", Rules::Nft, "tproxy"),
        ("iptables REDIRECT, inbound, TCP", "in-iptables", Rules::Iptables, "redirect"),
        ("iptables TPROXY, inbound, TCP", "in-iptables-tproxy", Rules::Iptables, "tproxy"),
    ] {
        let more = format!(
            "workloads: [{{service: {name}, port: 8080, protocol: tcp}}]\ncapture: {{inbound: {{capture: {capture}}}}}"
        );
        let mut vm = site.vm(name, rules, &more).await?;
        let app = vm.app(name, "0.0.0.0:8080")?;
        let address = SocketAddr::from((vm.host.v4, 8080));
        site.write(&format!("services.d/{name}.yaml"), &service(name, "tcp", address))?;
        vm.start().await?;
        hosts.push(InboundHost { path, vm, _app: app });
    }
    Ok(hosts)
}

/// The time for which changes are written at a steady rate.
const STORM: Duration = Duration::from_secs(30);

/// Measures the time from writing an endpoint to a file until the rule that captures it exists, and the cost
/// for the host.
async fn measure_changes(services: usize, endpoints: usize, per_second: u32) -> Result<()> {
    const CHANGES: usize = 30;
    let write = |site: &Site, number: usize, extra: bool| {
        let all: Vec<_> = (0..endpoints + usize::from(extra))
            .map(|at| format!("\"10.{}.{}.{}:8080\"", 100 + number / 200, number % 200, at + 1))
            .collect();
        let text = format!("service: s{number}\nprotocol: tcp\nport: 80\nendpoints: [{}]\n", all.join(", "));
        site.write(&format!("services.d/s{number}.yaml"), &text)
    };
    let site = Site::start(&[]).await?;
    (0..services).try_for_each(|number| write(&site, number, false))?;
    let mut vm =
        site.vm("many", Rules::Nft, "upstreams: [\"*\"]\ncapture: {outbound: {capture: addresses}}").await?;
    let took = start_capturing(&mut vm, services * endpoints).await?;
    println!("{services} services of {endpoints} endpoints");
    println!("start to captured              {:.1} s", took.as_secs_f64());
    let daemons = [("vmesh-net", &vm.net), ("vmesh-agent", &vm.agent)];
    let cpu = || daemons.map(|(_, daemon)| daemon.as_ref().map_or(0.0, |daemon| cpu_seconds(daemon.pid())));
    let before = cpu();
    let mut times = Vec::new();
    for round in 0..CHANGES {
        let extra = round % 2 == 0;
        let began = Instant::now();
        write(&site, 0, extra)?;
        wait_until_captured(&vm, services * endpoints + usize::from(extra)).await?;
        times.push(began.elapsed());
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    times.sort_unstable();
    let at = |share: f64| times.get((times.len() as f64 * share) as usize).copied().unwrap_or_default();
    println!("file written to rule, p50 / p99  {} / {} ms", at(0.5).as_millis(), at(0.99).as_millis());
    for (((name, daemon), before), after) in daemons.iter().zip(before).zip(cpu()) {
        let resident = daemon.as_ref().map_or(Ok(0), |daemon| daemon.resident_bytes())?;
        println!(
            "{name:<14} CPU per change {:.1} ms (its tools included), resident {} MiB",
            (after - before) * 1000.0 / CHANGES as f64,
            resident >> 20
        );
    }
    let (began, before) = (Instant::now(), cpu());
    let (added, lapses) =
        write_storm(&vm, services, per_second, |number, extra| write(&site, number, extra)).await?;
    let wrote = began.elapsed();
    wait_until_captured(&vm, services * endpoints + added).await?;
    println!(
        "{per_second} a second for {:.0} s: all in force {} ms after the last; the dead-man had lapsed in {lapses} of {} looks",
        wrote.as_secs_f64(),
        (began.elapsed() - wrote).as_millis(),
        STORM.as_secs(),
    );
    for (((name, _), before), after) in daemons.iter().zip(before).zip(cpu()) {
        println!(
            "{name:<14} meanwhile: {:.0} % of a core",
            (after - before) / began.elapsed().as_secs_f64() * 100.0
        );
    }
    let before = cpu();
    tokio::time::sleep(Duration::from_secs(20)).await;
    for (((name, _), before), after) in daemons.iter().zip(before).zip(cpu()) {
        println!("{name:<14} idle: {:.2} % of a core", (after - before) / 20.0 * 100.0);
    }
    Ok(())
}

/// Starts the daemons of `vm` and waits until `addresses` are captured. Returns the time from the start until then.
async fn start_capturing(vm: &mut Vm, addresses: usize) -> Result<Duration> {
    let began = Instant::now();
    vm.start_net()?;
    wait_for("vmesh-net", Duration::from_secs(30), async || match vm.socket().exists() {
        true => Ok(()),
        false => Err("no socket"),
    })
    .await?;
    vm.start_agent()?;
    wait_until_captured(vm, addresses).await?;
    Ok(began.elapsed())
}

/// Adds or removes an endpoint of one service after another for [`STORM`]. Returns the number of endpoints that are
/// added at the end, and the number of seconds in which the redirects had lapsed.
async fn write_storm(
    vm: &Vm,
    services: usize,
    per_second: u32,
    write: impl Fn(usize, bool) -> Result<()>,
) -> Result<(usize, u32)> {
    let began = Instant::now();
    let mut extra = vec![false; services];
    let mut lapses = 0;
    for at in 0.. {
        let due = STORM.min(Duration::from_secs(1) * at / per_second.max(1));
        if let Some(left) = due.checked_sub(began.elapsed()) {
            tokio::time::sleep(left).await;
        }
        if due == STORM {
            break;
        }
        // Consecutive changes affect different services.
        let number = usize::try_from(at).unwrap_or_default() * 7 % services;
        if let Some(extra) = extra.get_mut(number) {
            *extra = !*extra;
            write(number, *extra)?;
        }
        if at % per_second.max(1) == 0 && !are_redirects_in_force(vm).await? {
            lapses += 1;
        }
    }
    Ok((extra.iter().filter(|extra| **extra).count(), lapses))
}

/// Reports whether redirects are in force and the agent sends heartbeats.
async fn are_redirects_in_force(vm: &Vm) -> Result<bool> {
    use vmesh_net::protocol::{RedirectState, Request, Response};
    let status = vmesh_net::client::ask(&vm.socket(), &Request::Status).await;
    match status.map_err(Failed::to("vmesh-net did not answer"))? {
        Response::Status(status) => Ok(status.redirects == RedirectState::Hold),
        _ => Ok(false),
    }
}

async fn wait_until_captured(vm: &Vm, addresses: usize) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let status = vmesh_net::client::ask(&vm.socket(), &vmesh_net::protocol::Request::Status).await;
        let status = status.map_err(Failed::to("vmesh-net did not answer"))?;
        if let vmesh_net::protocol::Response::Status(status) = &status
            && status.real_addresses == addresses
            && status.error.is_none()
            && status.trial.is_none()
        {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Failed::new(format!("{addresses} addresses are not captured: {status:?}")));
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Returns the CPU time of a process and its reaped children, in seconds: see proc_pid_stat(5).
fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
    let ticks: u64 =
        after.split_whitespace().skip(11).take(4).filter_map(|word| word.parse::<u64>().ok()).sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}

fn virtual_address(vm: &Vm, service: &str) -> Result<SocketAddr> {
    let v4 = vm.names(service)?.into_iter().find(IpAddr::is_ipv4);
    let v4 = v4.ok_or_else(|| Failed::new(format!("{service} has no virtual address on {}", vm.name)))?;
    Ok(SocketAddr::new(v4, 80))
}

/// Sends requests from `clients` threads on the path's host, each one request after the other.
fn measure(path: &NetworkPath<'_>, clients: usize, span: Duration, keep: bool) -> Result<LatencySummary> {
    let (stop, start) = (Arc::new(AtomicBool::new(false)), Arc::new(Barrier::new(clients + 1)));
    let threads: Vec<_> = (0..clients)
        .map(|_| {
            let (enter, to, stop, start) = (path.from.entrance(), path.to, stop.clone(), start.clone());
            thread::spawn(move || -> Result<Vec<Duration>> {
                let entered = enter(APP);
                start.wait();
                entered?;
                let mut times = Vec::new();
                let mut open = None;
                while !stop.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    let mut stream = match open.take() {
                        Some(stream) => stream,
                        None => connect(to)?,
                    };
                    request(&mut stream).map_err(Failed::to(format!("a request to {to} failed")))?;
                    times.push(began.elapsed());
                    open = Some(stream).filter(|_| keep);
                }
                Ok(times)
            })
        })
        .collect();
    start.wait();
    let began = Instant::now();
    thread::sleep(span);
    stop.store(true, Ordering::Relaxed);
    let took = began.elapsed();
    let mut times = Vec::new();
    for thread in threads {
        let outcome = thread.join().map_err(|_| Failed::new("a client panicked"))?;
        times.extend(outcome.map_err(|error| Failed::new(format!("{}: {error}", path.name)))?);
    }
    times.sort_unstable();
    let at = |share: f64| times.get((times.len() as f64 * share) as usize).copied().unwrap_or_default();
    Ok(LatencySummary { per_second: times.len() as f64 / took.as_secs_f64(), p50: at(0.5), p99: at(0.99) })
}

fn connect(to: SocketAddr) -> Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5));
    let stream = stream.map_err(Failed::to(format!("could not connect to {to}")))?;
    let set = stream.set_nodelay(true).and_then(|()| stream.set_read_timeout(Some(Duration::from_secs(10))));
    set.map_err(Failed::to("could not set up a connection"))?;
    Ok(BufReader::new(stream))
}

/// Sends one request, and reads the complete response.
fn request(stream: &mut BufReader<TcpStream>) -> std::io::Result<()> {
    stream.get_mut().write_all(b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n")?;
    let mut length = 0;
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end().to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
        if line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)
}

fn print(what: &str, clients: usize, paths: &[NetworkPath<'_>], measured: &[Vec<LatencySummary>]) {
    println!("\n{what}, {clients} clients:\n");
    println!("| path | requests/s | ratio | p50 | p99 |\n|---|---|---|---|---|");
    let mut direct = None;
    for (path, rounds) in paths.iter().zip(measured) {
        let mut rounds = rounds.clone();
        rounds.sort_by(|a, b| a.per_second.total_cmp(&b.per_second));
        let Some(median) = rounds.get(rounds.len() / 2) else { continue };
        let direct = *direct.get_or_insert(median.per_second);
        println!(
            "| {} | {:.0} | {:.2} | {} µs | {} µs |",
            path.name,
            median.per_second,
            median.per_second / direct,
            median.p50.as_micros(),
            median.p99.as_micros()
        );
    }
}
