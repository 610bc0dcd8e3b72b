//! Faults on booted hosts that capture under load: parts die, hang, run out of disk or are reloaded; and a
//! wrong capture setting is made over SSH.

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use vmesh_testkit::app::HttpApp;
use vmesh_testkit::load::{Load, Plan, Report};
use vmesh_testkit::{Failed, Result, wait_for};
use vmesh_tests::BOUND;
use vmesh_tests::hosts::{BootedMesh, BootedNode, UNITS, ruleset};

fn kill(vm: &BootedNode, signal: &str, unit: &str) -> Result<()> {
    vm.host.systemctl(&["kill", "--kill-who=main", "-s", signal, unit]).map(drop)
}

fn signal_envoy(vm: &BootedNode, signal: &str) -> Result<()> {
    let pid = vm.envoy()?.ok_or_else(|| Failed::new("there is no Envoy"))?;
    vm.host.exec(&["kill", "-s", signal, &pid.to_string()]).map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_dies_hangs_fills_up_or_is_reloaded_costs_what_could_not_be_saved() -> Result<()> {
    let began = Instant::now();
    let vms = BootedMesh::new().await?;
    let server = vms.fleet.switch().host()?;
    let orders = server.within(|| HttpApp::start("orders-1", "v1", (server.v4, 8080)))??;
    let to = orders.address();
    vms.service("orders", "http", &[to])?;
    let host = vms.fleet.host("web")?;
    // The host has a firewall, which is loaded at boot and by a reload.
    host.write("/etc/nftables.conf", FIREWALL)?;
    host.systemctl(&["enable", "--now", "nftables"])?;
    let before = ruleset(&host)?;
    let more = "upstreams: [orders]\ncapture: {outbound: {capture: addresses}, dead_man: {timeout: 5s}}\n";
    host.write("/etc/vmesh/agent.yaml", vms.agent_yaml(&host, more))?;
    host.install(&[&vms.packages.agent])?;
    let vm = BootedNode { host };
    vm.wait_up()?;
    vm.captured(to).await?;

    // The load uses new and persistent connections, four at a time, with a hundred requests a second. Each
    // may take 10 s.
    let under_load = async |what: &str, work: &dyn Fn() -> Result<()>, back: bool| -> Result<Report> {
        let load = Load::start(Plan::to(to).host("orders").rate(100.0).from(&vm.host.net)?)?;
        wait_for("some load", BOUND, async || (load.so_far().ok > 20).then_some(())).await?;
        let done = work();
        if back {
            vm.captured(to).await?;
        }
        let ok = load.so_far().ok;
        wait_for("more load", BOUND, async || (load.so_far().ok > ok + 50).then_some(())).await?;
        done?;
        let report = load.stop().await;
        eprintln!(
            "{:5.1} s: {what}: {} requests, {} failed, {} raced",
            began.elapsed().as_secs_f64(),
            report.sent,
            report.failures,
            report.raced
        );
        Ok(report)
    };
    let none =
        |what: &str, report: &Report| assert_eq!(report.failures, 0, "{what}: {:?}", report.failed.first());

    let report = under_load("the agent is killed", &|| kill(&vm, "KILL", "vmesh-agent"), true).await?;
    none("the agent is killed", &report);

    let report = under_load(
        "the agent is stopped by a signal until redirects lapse, and goes on",
        &|| {
            kill(&vm, "STOP", "vmesh-agent")?;
            thread::sleep(Duration::from_secs(12));
            assert!(!vm.goes_through_envoy(to)?, "the redirects have not lapsed");
            kill(&vm, "CONT", "vmesh-agent")
        },
        true,
    )
    .await?;
    none("the agent hangs", &report);

    // The requests in Envoy are lost with it, and so are those sent to it until its supervisor has reported
    // its end.
    let report = under_load("Envoy is killed", &|| signal_envoy(&vm, "KILL"), true).await?;
    assert!(report.failures <= 150, "{:?}", report.failed.first());

    let both = || {
        signal_envoy(&vm, "KILL")?;
        kill(&vm, "KILL", "vmesh-envoy")?;
        kill(&vm, "KILL", "vmesh-agent")
    };
    let report = under_load("Envoy, its supervisor and the agent are killed", &both, true).await?;
    assert!(report.failures <= 350, "{:?}", report.failed.first());
    vm.wait_up()?;

    // An Envoy that hangs keeps its connections. New ones go past it once the dead-man timer lapses.
    let report = under_load(
        "Envoy is stopped by a signal, and goes on",
        &|| {
            signal_envoy(&vm, "STOP")?;
            let lapsed = Instant::now();
            while !vm.goes_through_envoy(to).is_ok_and(|through| !through) {
                if lapsed.elapsed() > BOUND {
                    return Err(Failed::new("the redirects have not lapsed"));
                }
                thread::sleep(Duration::from_millis(200));
            }
            eprintln!("{:.1} s until connections go past it", lapsed.elapsed().as_secs_f64());
            signal_envoy(&vm, "CONT")
        },
        true,
    )
    .await?;
    assert!(report.failures <= 60, "{:?}", report.failed.first());

    // A firewall that flushes the whole ruleset also removes the redirects of open connections. Open
    // connections are reset; new connections work.
    let report = under_load(
        "the firewall is reloaded",
        &|| vm.host.systemctl(&["restart", "nftables"]).map(drop),
        true,
    )
    .await?;
    assert!(report.failures <= 10, "{:?}", report.failed.first());
    let said = vm.host.sh("vmeshctl capture || :")?;
    assert!(said.contains("drift") && said.contains("changed"), "{said}");

    // A full disk: the configuration in force stays, and new endpoints are captured all the same.
    let more = server.within(|| HttpApp::start("orders-2", "v1", (server.v4, 8081)))??;
    let full = || {
        for dir in ["/var/lib/vmesh-agent", "/var/lib/vmesh-net"] {
            vm.host.small_disk(dir, "256k")?;
            vm.host.fill_disk(dir)?;
        }
        vm.host.systemctl(&["restart", "vmesh-agent"])?;
        vm.host.systemctl(&["restart", "vmesh-net"])?;
        vms.service("orders", "http", &[to, more.address()])
    };
    let report = under_load("the disks of vmesh are full", &full, true).await?;
    none("the disks of vmesh are full", &report);
    vm.captured(more.address()).await?;
    let empty = || {
        for dir in ["/var/lib/vmesh-agent", "/var/lib/vmesh-net"] {
            vm.host.sh(&format!("rm -f {dir}/.full && umount {dir}"))?;
        }
        vm.host.systemctl(&["restart", "vmesh-agent"])?;
        vm.host.systemctl(&["restart", "vmesh-net"]).map(drop)
    };
    let report = under_load("there is room again", &empty, true).await?;
    none("there is room again", &report);

    // A bypass takes less than a second while all daemons hang; then the operator lifts it.
    kill(&vm, "STOP", "vmesh-net")?;
    let report = under_load(
        "the bypass, while vmesh-net hangs",
        &|| {
            let switched = Instant::now();
            vm.host.exec(&["/usr/lib/vmesh/bypass", "--keep-connections"])?;
            let took = switched.elapsed();
            eprintln!("the bypass took {} ms", took.as_millis());
            assert!(!vm.goes_through_envoy(to)?);
            Ok(())
        },
        false,
    )
    .await?;
    none("the bypass", &report);
    kill(&vm, "CONT", "vmesh-net")?;
    let report = under_load(
        "the bypass is lifted",
        &|| vm.host.exec(&["/usr/lib/vmesh/bypass", "--lift"]).map(drop),
        true,
    )
    .await?;
    none("the bypass is lifted", &report);

    // systemd's watchdog replaces a process that hangs forever, without affecting Envoy, the rules or the
    // other units.
    for unit in UNITS {
        let drop_in = format!("/etc/systemd/system/{unit}.d/soon.conf");
        vm.host.write(&drop_in, "[Service]\nWatchdogSec=4s\n")?;
    }
    vm.host.systemctl(&["daemon-reload"])?;
    UNITS.iter().try_for_each(|unit| vm.host.systemctl(&["restart", unit]).map(drop))?;
    vm.captured(to).await?;
    let envoy = vm.envoy()?;
    for unit in UNITS {
        let restarts = || vm.host.systemctl(&["show", "--value", "--property=NRestarts", unit]);
        let before = restarts()?;
        let hang = || {
            kill(&vm, "STOP", unit)?;
            let hung = Instant::now();
            while restarts()? == before {
                if hung.elapsed() > BOUND {
                    return Err(Failed::new(format!("{unit} hangs, and nobody has replaced it")));
                }
                thread::sleep(Duration::from_millis(200));
            }
            eprintln!("{unit} was replaced after {:.1} s", hung.elapsed().as_secs_f64());
            Ok(())
        };
        let what = format!("{unit} hangs for good");
        none(&what, &under_load(&what, &hang, true).await?);
        assert_eq!(vm.envoy()?, envoy, "{unit}");
    }

    // No other program takes Envoy's port while Envoy is down.
    let envoy = vm.envoy()?.ok_or_else(|| Failed::new("there is no Envoy"))?;
    kill(&vm, "STOP", "vmesh-envoy")?;
    vm.host.exec(&["kill", "-s", "KILL", &envoy.to_string()])?;
    let bind = || std::net::TcpListener::bind("127.0.0.1:15001").map(drop).map_err(|error| error.kind());
    assert_eq!(vm.host.net.within_as(5000, bind)?, Err(std::io::ErrorKind::AddrInUse));
    kill(&vm, "CONT", "vmesh-envoy")?;
    vm.captured(to).await?;

    let report =
        under_load("all is stopped", &|| vm.host.systemctl(&["stop", "vmesh.target"]).map(drop), false)
            .await?;
    none("all is stopped", &report);
    // The target is stopped before the units that belong to it.
    UNITS.iter().try_for_each(|unit| vm.host.wait_unit(unit, "inactive", 2 * BOUND))?;
    assert_eq!(vm.ruleset()?, before);
    Ok(())
}

/// A ruleset as Debian's nftables.service loads it: it begins with a flush.
const FIREWALL: &str = "#!/usr/sbin/nft -f\nflush ruleset\ntable inet filter {\n\tchain input {\n\t\ttype filter hook input priority \
                        filter; policy accept;\n\t\ttcp dport 25 drop\n\t}\n}\n";

/// A logged-in user who watches output, with the arrival time of each line.
struct SshSession {
    child: std::process::Child,
    seen: Arc<Mutex<Vec<Instant>>>,
}

impl SshSession {
    fn open(vm: &BootedNode) -> Result<SshSession> {
        let mut command = vm.host.ssh("while sleep 0.2; do echo tick; done");
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(Failed::to("could not start ssh"))?;
        let stdout = child.stdout.take().ok_or_else(|| Failed::new("ssh without an output"))?;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let told = seen.clone();
        thread::spawn(move || {
            for _ in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
                told.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
            }
        });
        Ok(SshSession { child, seen })
    }

    fn ticks(&self) -> usize {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Returns the longest silence so far.
    fn gap(&self) -> Duration {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let next = seen.iter().skip(1).copied().chain([now]);
        seen.iter().zip(next).map(|(one, next)| next - *one).max().unwrap_or_default()
    }
}

impl Drop for SshSession {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mistake_that_is_made_over_ssh_locks_nobody_out_and_is_taken_back() -> Result<()> {
    let (vms, _orders, _) = BootedMesh::with_orders().await?;
    let vm = vms.node("web", "upstreams: [orders]\n").await?;
    let before = vm.ruleset()?;
    let session = SshSession::open(&vm)?;
    wait_for("the session", BOUND, async || (session.ticks() > 5).then_some(())).await?;

    // Everything is captured in both directions, every other port is closed, and no redirect may lapse. And
    // Envoy is stopped, so no captured connection works.
    let wrong = "upstreams: [orders]\nworkloads: [{service: orders, port: 8080}]\n\
        capture:\n  outbound: {capture: all, on_loss: closed}\n  inbound: {capture: redirect, on_loss: closed, strict: [1-65535]}\n  \
        confirm: {within: 10s}\n";
    let config = vms.agent_yaml(&vm.host, wrong);
    let apply = format!("cat > /etc/vmesh/agent.yaml <<'EOF'\n{config}\nEOF\nsystemctl restart vmesh-agent");
    let output = vm.host.ssh(&apply).output().map_err(Failed::to("could not run ssh"))?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // Envoy is stopped right after the agent's first check of the capture. One script on the host does both,
    // because a working trial is confirmed after 2 s. It stops every Envoy, since the agent's report changes
    // the bootstrap, which starts another one.
    let said = vm.host.sh(
        "for try in $(seq 600); do\n\
           if vmeshctl capture --json | grep -q '\"state\": \"trial\"'; then pkill -STOP -x envoy; echo stopped; exit 0; fi\n\
           sleep 0.05\n\
         done",
    )?;
    assert_eq!(said.trim(), "stopped", "{}", vm.host.sh("vmeshctl capture || :")?);
    let new_session = || {
        let output = vm.host.ssh("echo in").output();
        output.is_ok_and(|output| output.stdout == b"in\n")
    };
    assert!(new_session(), "a new session in the middle of it");
    wait_for("the rules to be as before", 2 * BOUND, async || match vm.ruleset() {
        Ok(now) if now == before => Ok(()),
        Ok(_) => Err(vm.host.sh("vmeshctl capture || :").unwrap_or_default()),
        Err(failed) => Err(failed.to_string()),
    })
    .await?;
    assert!(new_session(), "a new session after it");
    let said = vm.host.sh("vmeshctl capture || :")?;
    assert!(said.contains("TAKEN BACK") && said.contains("vmeshctl capture retry"), "{said}");
    assert!(session.gap() < Duration::from_secs(5), "the session was silent for {:?}", session.gap());
    eprintln!("the longest silence of the session: {} ms; {said}", session.gap().as_millis());
    vm.host.exec(&["pkill", "-CONT", "-x", "envoy"])?;
    Ok(())
}
