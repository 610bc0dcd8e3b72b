//! The main scenario on one machine: `examples/quickstart`, three agents with real Envoys on 127.0.1.1 to
//! 127.0.1.3, small HTTP applications behind them, and traffic. Each step prints its claim, measures it, and
//! fails the demo if the claim does not hold. Root is not needed. With `--discovery consul` or `zookeeper`
//! the demo starts that registry, registers the services in it, and adds a step in which the registry is
//! killed.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use vmesh_daemon::fetch::Peer;
use vmesh_testkit::api::{Api, field};
use vmesh_testkit::app::HttpApp;
use vmesh_testkit::load::{Load, Plan, Report};
use vmesh_testkit::process::Daemon;
use vmesh_testkit::registry::{Instance, Registry};
use vmesh_testkit::{Failed, Result, envoy, wait_for};

use crate::build;

#[derive(Debug, clap::Args)]
pub(crate) struct DemoOptions {
    /// Leave everything running at the end, and print the commands to try, until Ctrl-C.
    #[arg(long)]
    keep: bool,
    /// The registry of the services.
    #[arg(long, value_enum, default_value_t = Discovery::File)]
    discovery: Discovery,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Discovery {
    File,
    Consul,
    Zookeeper,
}

const SECONDS: Duration = Duration::from_secs(1);
const API: Api = Api(local(Ipv4Addr::new(127, 0, 0, 1), 15014));
/// The address on which the application on web-1 calls `orders`.
const ORDERS: SocketAddr = local(Ipv4Addr::new(127, 0, 1, 1), 9001);
const AGENTS: [&str; 3] = ["web-1", "orders-1", "orders-2"];

const fn local(ip: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::V4(std::net::SocketAddrV4::new(ip, port))
}

pub(crate) fn run(options: &DemoOptions) -> Result<()> {
    let envoy = envoy::find()?;
    let packages = ["--package", "vmesh-control", "--package", "vmesh-agent", "--package", "vmeshctl"];
    build::cargo("build vmesh", &[&["build"], packages.as_slice()].concat())?;
    let runtime = tokio::runtime::Runtime::new().map_err(Failed::to("could not start a runtime"))?;
    runtime.block_on(async {
        let mut demo = Demo::start(envoy, options.discovery).await?;
        demo.tour().await?;
        if options.keep {
            demo.wait_for_ctrl_c().await?;
        }
        demo.stop().await
    })
}

struct Demo {
    dir: PathBuf,
    binaries: PathBuf,
    control: Daemon,
    agents: BTreeMap<&'static str, Daemon>,
    apps: Vec<HttpApp>,
    /// The registry; `None` for files.
    registry: Option<Registry>,
    step: usize,
}

impl Demo {
    async fn start(envoy: PathBuf, discovery: Discovery) -> Result<Demo> {
        let target = build::target()?;
        let (dir, binaries) = (target.join("demo"), target.join("debug"));
        if dir.exists() {
            fs::remove_dir_all(&dir).map_err(Failed::to(format!("could not clear {}", dir.display())))?;
        }
        copy(&build::root().join("examples/quickstart"), &dir)?;
        println!("\nvmesh on this machine: everything is in {}", dir.display());

        let v1 = HttpApp::start("orders-1", "v1", local(Ipv4Addr::LOCALHOST, 8081))?;
        let v2 = HttpApp::start("orders-2", "v2", local(Ipv4Addr::LOCALHOST, 8082))?;
        let registry = start_registry(discovery, &dir).await?;
        let control = start_control(&binaries, &dir).await?;
        let mut agents = BTreeMap::new();
        for name in AGENTS {
            agents.insert(name, start_agent(&binaries, &dir, &envoy, name)?);
        }
        let mut demo = Demo { dir, binaries, control, agents, apps: vec![v1, v2], registry, step: 0 };
        for name in AGENTS {
            demo.wait_until_in_sync(name).await?;
        }
        let up = wait_for("web-1's Envoy to serve orders", 30 * SECONDS, async || {
            Api(ORDERS).text("/").await.map(|_| ()).map_err(|failed| failed.to_string())
        });
        up.await?;
        if let Some(registry) = &demo.registry {
            println!("  {:<14} {}", registry.name(), registry.source("")?.trim_start_matches("- "));
        }
        println!("  control plane  127.0.0.1:15010 (xDS), http://{} (API)", API.0);
        println!("  web-1          127.0.1.1, its application dials orders on {ORDERS}");
        println!("  orders-1       127.0.1.2, serves orders v1");
        println!("  orders-2       127.0.1.3, serves orders v2");
        Ok(demo)
    }

    async fn tour(&mut self) -> Result<()> {
        self.split().await?;
        self.instance_comes_and_goes().await?;
        self.bad_document().await?;
        self.control_plane_dies().await?;
        self.registry_dies().await?;
        self.show_command("What the operator sees", &["nodes"])?;
        self.show_command("And how web-1 reaches orders", &["explain", "orders", "--from", "web-1"])?;
        println!("\nEverything that this demo claims has happened.");
        Ok(())
    }

    fn announce_step(&mut self, what: &str) {
        self.step += 1;
        println!("\n{}. {what}", self.step);
    }

    /// Shows that `mesh.d/orders.yaml` routes one request in ten to v2.
    async fn split(&mut self) -> Result<()> {
        self.announce_step(
            "mesh.d/orders.yaml splits orders 90 to 10 between v1 and v2, and sends x-canary to v2",
        );
        let report = requests(Plan::to(ORDERS), 1000).await?;
        let [v1, v2] = ["v1", "v2"].map(|version| report.by_version.get(version).copied().unwrap_or(0));
        println!("   1,000 requests: {v1} answered by v1, {v2} by v2");
        // Five standard deviations: one demo in a million fails by chance.
        check(
            report.ok >= 1000 && (52..=148).contains(&(1000 * v2 / report.ok.max(1))),
            "the split is 90 to 10",
        )?;
        let report = requests(Plan::to(ORDERS).header("x-canary", "true"), 100).await?;
        let canary = report.by_version.get("v2").copied().unwrap_or(0);
        println!("   {} requests with `x-canary: true`: {canary} answered by v2", report.ok);
        check(canary == report.ok && canary >= 100, "every canary request went to v2")
    }

    async fn instance_comes_and_goes(&mut self) -> Result<()> {
        let by = match &self.registry {
            None => "by editing services.d/orders.yaml".to_owned(),
            Some(registry) => format!("by registering in {}", registry.name()),
        };
        self.announce_step(&format!("A third instance, a plain host without an agent, comes and goes {by}"));
        let address = local(Ipv4Addr::new(127, 0, 1, 4), 8080);
        self.apps.push(HttpApp::start("orders-3", "v1", address)?);
        let load = Load::start(Plan::to(ORDERS).rate(500.0))?;
        let third = Instance::new("orders", "orders-3", address);
        let file = self.dir.join("services.d/orders.yaml");
        let before = read(&file)?;

        let changed = Instant::now();
        match &mut self.registry {
            None => {
                let line = format!("  - {{address: \"{address}\", version: v1, zone: eu-1a}}\n");
                write(&file, &format!("{before}{line}"))?;
            }
            Some(registry) => registry.add(&third).await?,
        }
        wait_for("traffic to reach orders-3", 15 * SECONDS, async || {
            let observed = load.so_far().by_instance.get("orders-3").copied().unwrap_or(0);
            if observed > 0 { Ok(()) } else { Err("no request yet") }
        })
        .await?;
        println!("   added: its first request came {} ms later", changed.elapsed().as_millis());

        let changed = Instant::now();
        match &mut self.registry {
            None => write(&file, &before)?,
            Some(registry) => registry.remove(&third).await?,
        }
        let (mut last, mut quiet) = (0, Instant::now());
        let mut followed = Duration::ZERO;
        let hold = if self.registry.is_some() { 10 * SECONDS } else { Duration::ZERO };
        wait_for("traffic to leave orders-3", hold + 15 * SECONDS, async || {
            let observed = load.so_far().by_instance.get("orders-3").copied().unwrap_or(0);
            if observed != last {
                (last, quiet, followed) = (observed, Instant::now(), changed.elapsed());
            }
            if quiet.elapsed() > SECONDS { Ok(()) } else { Err(format!("{observed} requests so far")) }
        })
        .await?;
        println!("   removed: its last request came {} ms later", followed.as_millis());
        if !hold.is_zero() {
            println!(
                "   (a registry's word that an instance is gone is believed after {} s)",
                hold.as_secs()
            );
            check(followed >= hold - SECONDS, "the removal was held")?;
        }
        let report = load.stop().await;
        println!("   meanwhile {} requests, {} failed", report.sent, report.failures);
        no_failure(&report)
    }

    /// Shows that an unreachable registry removes no endpoint.
    async fn registry_dies(&mut self) -> Result<()> {
        let Some(mut registry) = self.registry.take() else { return Ok(()) };
        self.announce_step(&format!(
            "{} is killed (SIGKILL); traffic goes on, and the operator is told",
            registry.name()
        ));
        let load = Load::start(Plan::to(ORDERS).rate(500.0))?;
        registry.kill_all()?;
        wait_for("the source to be stale", 30 * SECONDS, async || {
            let status = API.json("/api/v1/status").await.map_err(|failed| failed.to_string())?;
            let state = status.pointer("/sources/0/state").cloned().unwrap_or_default();
            if state == "stale" { Ok(()) } else { Err(state.to_string()) }
        })
        .await?;
        self.run_vmeshctl(&["discovery"])?;
        registry.restart_all().await?;
        wait_for("the source to be fresh", 60 * SECONDS, async || {
            let status = API.json("/api/v1/status").await.map_err(|failed| failed.to_string())?;
            let state = status.pointer("/sources/0/state").cloned().unwrap_or_default();
            if state == "fresh" { Ok(()) } else { Err(state.to_string()) }
        })
        .await?;
        let report = load.stop().await;
        println!("   it is back and fresh; {} requests, {} failed", report.sent, report.failures);
        self.registry = Some(registry);
        no_failure(&report)
    }

    async fn bad_document(&mut self) -> Result<()> {
        self.announce_step("A mistake in a document costs nothing: the last good version stays in force, and the place is named");
        let file = self.dir.join("mesh.d/orders.yaml");
        let before = read(&file)?;
        write(
            &file,
            &before.replace("split: [{subset: v1, weight: 90}", "spilt: [{subset: v1, weight: 90}"),
        )?;
        let listed = wait_for("the problem to be listed", 15 * SECONDS, async || {
            let problems = API.json("/api/v1/problems").await.map_err(|failed| failed.to_string())?;
            let first = problems.pointer("/problems/0");
            match first {
                Some(problem) => Ok((field(problem, "place"), field(problem, "message"))),
                None => Err("no problem listed".to_owned()),
            }
        });
        let (place, message) = listed.await?;
        println!("   $ vmeshctl problems\n   {place}: {message}");
        check(
            place.ends_with("orders.yaml:13:5") && message.contains("did you mean `split`"),
            "the mistake is named",
        )?;
        let report = requests(Plan::to(ORDERS), 200).await?;
        println!("   {} requests meanwhile, {} failed", report.sent, report.failures);
        no_failure(&report)?;
        write(&file, &before)?;
        wait_for("the problem to be gone", 15 * SECONDS, async || {
            let problems = API.json("/api/v1/problems").await.map_err(|failed| failed.to_string())?;
            match problems.pointer("/problems/0") {
                None => Ok(()),
                Some(problem) => Err(field(problem, "message")),
            }
        })
        .await
    }

    async fn control_plane_dies(&mut self) -> Result<()> {
        self.announce_step("The control plane is killed (SIGKILL); traffic goes on");
        let load = Load::start(Plan::to(ORDERS).rate(500.0))?;
        self.control.kill()?;
        tokio::time::sleep(3 * SECONDS).await;
        let without = load.so_far();
        println!("   3 s without a control plane: {} requests, {} failed", without.sent, without.failures);
        no_failure(&without)?;

        self.announce_step(
            "The control plane is back; nobody notices, and nothing is sent that did not change",
        );
        let started = Instant::now();
        self.control = start_control(&self.binaries, &self.dir).await?;
        for name in AGENTS {
            self.wait_until_in_sync(name).await?;
        }
        let report = load.stop().await;
        println!(
            "   all three nodes in sync {} ms after it was started; {} requests, {} failed",
            started.elapsed().as_millis(),
            report.sent,
            report.failures
        );
        no_failure(&report)?;
        let sent = API.metric("vmesh_xds_resources_sent_total").await?;
        println!("   resources sent since it is back: {sent}");
        check(sent == 0.0, "nothing was sent again")
    }

    async fn wait_until_in_sync(&mut self, name: &str) -> Result<()> {
        let agents = &mut self.agents;
        wait_for(format!("{name} to be in sync"), 30 * SECONDS, async || {
            if let Some((ended, agent)) =
                agents.iter_mut().find_map(|(name, agent)| agent.has_exited().map(|_| (*name, agent)))
            {
                return Err(format!("the agent of {ended} has ended:\n{}", agent.output()));
            }
            API.is_synced(name).await
        })
        .await
    }

    fn show_command(&mut self, what: &str, args: &[&str]) -> Result<()> {
        self.announce_step(what);
        let fine = self.run_vmeshctl(args)?;
        check(fine, &format!("vmeshctl {} finds nothing to mend", args.join(" ")))
    }

    /// Prints the output of a `vmeshctl` command. Returns whether it succeeded.
    fn run_vmeshctl(&self, args: &[&str]) -> Result<bool> {
        println!("   $ vmeshctl {}", args.join(" "));
        let output = Command::new(self.binaries.join("vmeshctl"))
            .args(args)
            .output()
            .map_err(Failed::to("could not start vmeshctl"))?;
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            println!("   {line}");
        }
        Ok(output.status.success())
    }

    async fn wait_for_ctrl_c(&self) -> Result<()> {
        let ctl = self.binaries.join("vmeshctl");
        let (ctl, dir) = (ctl.display(), self.dir.display());
        println!("\nAll is running until Ctrl-C. Try, in another terminal:");
        println!("  curl -s http://{ORDERS}/");
        println!("  {ctl} status");
        println!("  {ctl} services orders");
        println!("  {ctl} explain orders --from web-1");
        match &self.registry {
            None => println!(
                "  $EDITOR {dir}/services.d/orders.yaml    # add, drain (health: draining) or remove an endpoint"
            ),
            Some(_) => println!("  {ctl} discovery"),
        }
        println!("  $EDITOR {dir}/mesh.d/orders.yaml        # move the split, then watch: {ctl} problems");
        println!("  curl -s http://127.0.1.1:15020/status");
        tokio::signal::ctrl_c().await.map_err(Failed::to("could not wait for Ctrl-C"))
    }

    /// Stops everything in order: the agents drain their Envoys, then the control plane stops.
    async fn stop(mut self) -> Result<()> {
        for (name, agent) in &mut self.agents {
            let status = agent.terminate(30 * SECONDS).await?;
            check(status.success(), &format!("the agent of {name} stopped in order ({status})"))?;
        }
        let status = self.control.terminate(15 * SECONDS).await?;
        check(status.success(), &format!("the control plane stopped in order ({status})"))
    }
}

/// Starts a real registry, registers the instances of `services.d/orders.yaml` in it, and points the control
/// plane at it.
async fn start_registry(discovery: Discovery, dir: &Path) -> Result<Option<Registry>> {
    let mut registry = match discovery {
        Discovery::File => return Ok(None),
        Discovery::Consul => Registry::consul(1).await?,
        Discovery::Zookeeper => Registry::zookeeper(1).await?,
    };
    for (id, last, version, zone) in [("orders-1", 2, "v1", "eu-1a"), ("orders-2", 3, "v2", "eu-1b")] {
        let address = local(Ipv4Addr::new(127, 0, 1, last), 15008);
        let (version, zone) = (version.to_owned(), zone.to_owned());
        registry.add(&Instance { version, zone, ..Instance::new("orders", id, address) }).await?;
    }
    let file = dir.join("control.yaml");
    let config = read(&file)?.replace("- file: {path: services.d}", &registry.source("")?);
    write(&file, &config)?;
    Ok(Some(registry))
}

async fn start_control(binaries: &Path, dir: &Path) -> Result<Daemon> {
    let mut command = Command::new(binaries.join("vmesh-control"));
    command.args(["--config", "control.yaml"]).current_dir(dir);
    let mut control = Daemon::spawn("vmesh-control", command)?;
    control.wait_http(&Peer::Tcp(API.0), "/readyz", 20 * SECONDS).await?;
    Ok(control)
}

fn start_agent(binaries: &Path, dir: &Path, envoy: &Path, name: &str) -> Result<Daemon> {
    let file = format!("agents/{name}.yaml");
    // The path of Envoy depends on the machine, so the example does not contain it.
    let config = read(&dir.join(&file))?;
    let with_path = format!("envoy: {{path: {:?}, ", envoy.display().to_string());
    write(&dir.join(&file), &config.replace("envoy: {", &with_path))?;
    let mut command = Command::new(binaries.join("vmesh-agent"));
    command.args(["--config", &file]).current_dir(dir);
    Daemon::spawn(format!("vmesh-agent {name}"), command)
}

/// Sends at least `count` requests as fast as they are answered.
async fn requests(plan: Plan, count: u64) -> Result<Report> {
    let load = Load::start(plan.rate(1000.0))?;
    wait_for(format!("{count} answers"), 30 * SECONDS, async || {
        let report = load.so_far();
        if report.ok >= count {
            Ok(())
        } else {
            Err(format!("{} so far, {} failed", report.ok, report.failures))
        }
    })
    .await?;
    Ok(load.stop().await)
}

fn no_failure(report: &Report) -> Result<()> {
    match report.failed.first() {
        None => Ok(()),
        Some(first) => Err(Failed::new(format!("a request failed after {:?}: {}", first.at, first.what))),
    }
}

fn check(holds: bool, what: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(Failed::new(format!("this did not happen: {what}"))) }
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).map_err(Failed::to(format!("could not read {}", file.display())))
}

/// Writes in place, like an editor without backup files.
fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).map_err(Failed::to(format!("could not write {}", file.display())))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let failed = || format!("could not copy {} to {}", from.display(), to.display());
    fs::create_dir_all(to).map_err(Failed::to(failed()))?;
    for entry in fs::read_dir(from).map_err(Failed::to(failed()))? {
        let entry = entry.map_err(Failed::to(failed()))?;
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target).map_err(Failed::to(failed()))?;
        }
    }
    Ok(())
}
