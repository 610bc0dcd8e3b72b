//! Nodes on booted hosts, with packages installed as an operator would: how systemd, dpkg and the parts of a
//! node interact.

use std::net::SocketAddr;
use std::time::Instant;

use vmesh_testkit::app::HttpApp;
use vmesh_testkit::hosts::Suite;
use vmesh_testkit::load::{Load, Plan, Report};
use vmesh_testkit::{Result, wait_for};
use vmesh_tests::BOUND;
use vmesh_tests::hosts::{BootedMesh, BootedNode, Packages, UNITS, difference, ruleset, trace};

/// The address at which `web` dials `orders`.
const UPSTREAM: &str = "127.0.0.1:9001";

fn upstream() -> Result<SocketAddr> {
    UPSTREAM.parse().map_err(vmesh_testkit::Failed::to("an address"))
}

/// Sends requests of this host's application to `orders`.
fn load(vm: &BootedNode) -> Result<Load> {
    Load::start(Plan::to(upstream()?).host("orders").rate(200.0).from(&vm.host.net)?)
}

async fn answers(vm: &BootedNode) -> Result<()> {
    wait_for("orders to answer on web", 2 * BOUND, async || {
        let plan = Plan::to(SocketAddr::from(([127, 0, 0, 1], 9001))).host("orders").connections(1);
        let load = plan.from(&vm.host.net).and_then(Load::start).map_err(|failed| failed.to_string())?;
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        let report = load.stop().await;
        match report.failed.first() {
            None if report.ok > 0 => Ok(()),
            failed => Err(format!("{failed:?}")),
        }
    })
    .await
}

fn none_failed(what: &str, report: &Report) {
    eprintln!("{what}: {} requests, {} failed, {} raced", report.sent, report.failures, report.raced);
    assert_eq!(report.failures, 0, "{what}: {:?}", report.failed.first());
    assert!(report.ok > 20, "{what}: there was no load");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_installed_lives_is_upgraded_reboots_and_is_removed_without_a_trace() -> Result<()> {
    let began = Instant::now();
    let step = |what: &str| eprintln!("{:5.1} s: {what}", began.elapsed().as_secs_f64());
    let vms = BootedMesh::new().await?;
    step("a control plane is ready");
    let pid = vms.control.main_pid("vmesh-control")?.unwrap_or_default();
    let status = vms.control.exec(&["cat", &format!("/proc/{pid}/status")])?;
    for line in ["CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "vmesh-control: {status}");
    }
    let seen = vms.control.exec(&["stat", "-c", "%a %U", "/run/vmesh-control/api.sock"])?;
    assert_eq!(seen.trim(), "660 vmesh-control");
    let client = vms.fleet.switch().host()?;
    let orders = client.within(|| HttpApp::start("orders-1", "v1", (client.v4, 8080)))??;
    vms.service("orders", "http", &[orders.address()])?;

    // Install the package on a host that is not configured.
    let host = vms.fleet.host("web")?;
    host.sh(
        "nft add table inet filter; nft add chain inet filter input '{ type filter hook input priority 0; }'",
    )?;
    host.sh("nft add rule inet filter input tcp dport 25 drop")?;
    let before = trace(&host)?;
    let said = host.install(&[&vms.packages.agent])?;
    assert!(said.contains("this host is not configured, so no unit was started"), "{said}");
    for unit in UNITS {
        assert_eq!(host.show(unit, "ActiveState")?, "inactive", "{unit}");
    }
    assert_eq!(host.systemctl(&["is-enabled", "vmesh.target"])?.trim(), "enabled");
    host.systemctl(&["start", "vmesh.target"])?;
    assert_eq!(host.show("vmesh-agent", "ConditionResult")?, "no");
    host.systemctl(&["stop", "vmesh.target"])?;
    step("installed, not configured");

    // Configure the node, which then serves.
    let more = format!("upstreams: [{{service: orders, listen: \"{UPSTREAM}\"}}]\n");
    host.write("/etc/vmesh/agent.yaml", vms.agent_yaml(&host, &more))?;
    host.exec(&["vmesh-agent", "--check"])?;
    host.systemctl(&["start", "--no-block", "vmesh.target"])?;
    let vm = BootedNode { host };
    vm.wait_up()?;
    answers(&vm).await?;
    step("it serves");
    is_confined(&vm)?;

    // Restart and kill the agent: Envoy stays.
    let running = load(&vm)?;
    let (pids, envoy) = (vm.main_pids()?, vm.envoy()?);
    assert!(envoy.is_some() && vm.envoys()? == 1);
    vm.host.systemctl(&["restart", "vmesh-agent"])?;
    vm.kill("vmesh-agent")?;
    let now = vm.main_pids()?;
    assert_ne!(now["vmesh-agent.service"], pids["vmesh-agent.service"]);
    assert_eq!(now["vmesh-envoy.service"], pids["vmesh-envoy.service"]);
    assert_eq!(vm.envoy()?, envoy);
    none_failed("the agent was restarted and killed", &running.stop().await);
    step("the agent was restarted and killed");

    // Kill Envoy's supervisor: Envoy stays, and so does vmesh-net.
    let running = load(&vm)?;
    vm.kill("vmesh-envoy")?;
    vm.wait_up()?;
    assert_eq!(vm.envoy()?, envoy);
    assert_eq!(vm.main_pids()?["vmesh-net.service"], pids["vmesh-net.service"]);
    none_failed("the supervisor was killed", &running.stop().await);
    step("the supervisor was killed");

    // Reload: another Envoy takes over, and no request fails.
    let running = load(&vm)?;
    vm.host.systemctl(&["reload", "vmesh-envoy"])?;
    let other = vm.wait_other_envoy(envoy).await?;
    none_failed("Envoy was reloaded", &running.stop().await);
    step("Envoy was reloaded");

    // Upgrade: the agent is replaced; the supervisor, Envoy and the rules stay.
    let next = Packages::make("0.1.1")?;
    let running = load(&vm)?;
    let pids = vm.main_pids()?;
    vm.host.install(&[&next.agent])?;
    vm.wait_up()?;
    let now = vm.main_pids()?;
    assert_ne!(now["vmesh-agent.service"], pids["vmesh-agent.service"]);
    assert_eq!(now["vmesh-envoy.service"], pids["vmesh-envoy.service"]);
    // vmesh-net replaced its program in the same process.
    assert_eq!(now["vmesh-net.service"], pids["vmesh-net.service"]);
    let program =
        vm.host.sh(&format!("readlink /proc/{}/exe", now["vmesh-net.service"].unwrap_or_default()))?;
    assert_eq!(program.trim(), "/usr/sbin/vmesh-net");
    assert_eq!(vm.envoy()?, other);
    none_failed("the package was upgraded", &running.stop().await);
    step("upgraded");

    // Kill the supervisor: its successor takes over the running Envoy.
    let running = load(&vm)?;
    vm.kill("vmesh-envoy")?;
    assert_eq!(vm.envoy()?, other);
    none_failed("the new supervisor took over", &running.stop().await);

    // Reboot the host while there is no control plane.
    vms.control.power_cut();
    vm.host.reboot()?;
    vm.wait_up()?;
    answers(&vm).await?;
    step("it serves after a reboot without a control plane");

    // Remove the package, then purge it.
    vm.host.sh(
        "nft add table inet filter; nft add chain inet filter input '{ type filter hook input priority 0; }'",
    )?;
    vm.host.sh("nft add rule inet filter input tcp dport 25 drop")?;
    vm.host.remove("remove", &["vmesh-agent"])?;
    assert_eq!(vm.envoys()?, 0);
    assert!(!ruleset(&vm.host)?.contains("vmesh"));
    assert!(vm.host.path("/etc/vmesh/agent.yaml").exists());
    vm.host.remove("purge", &["vmesh-agent"])?;
    vm.host.sh("rm -f /root/*.deb")?;
    let left = difference(&before, &trace(&vm.host)?);
    assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
    step("removed without a trace");
    Ok(())
}

/// Checks that the restrictions of the units apply to the processes.
fn is_confined(vm: &BootedNode) -> Result<()> {
    let expected = [
        ("vmesh-agent.service", "vmesh-agent", "0000000000000000"),
        ("vmesh-envoy.service", "vmesh-envoy", "0000000000000000"),
        // CAP_NET_ADMIN (12) and CAP_SYS_PTRACE (19).
        ("vmesh-net.service", "root", "0000000000081000"),
    ];
    for (unit, user, capabilities) in expected {
        let pid = vm.host.main_pid(unit)?.unwrap_or_default();
        let status = vm.host.exec(&["cat", &format!("/proc/{pid}/status")])?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_default().trim().to_owned()
        };
        assert_eq!(field("CapEff"), capabilities, "{unit}");
        assert_eq!(field("CapBnd"), capabilities, "{unit}");
        assert_eq!((field("NoNewPrivs"), field("Seccomp")), ("1".to_owned(), "2".to_owned()), "{unit}");
        let owner = vm.host.exec(&["stat", "-c", "%U %G", &format!("/proc/{pid}")])?;
        assert_eq!(owner.trim(), format!("{user} vmesh"), "{unit}");
        let group = vm.host.exec(&["cat", &format!("/proc/{pid}/cgroup")])?;
        assert_eq!(group.contains("/vmesh.slice/"), unit != "vmesh-net.service", "{unit}: {group}");
        // The system is read-only except for the directories of the unit.
        let inside = ["nsenter", "--target", &pid.to_string(), "--mount", "--", "touch", "/usr/x"];
        let refused = vm.host.output(&inside)?;
        assert!(String::from_utf8_lossy(&refused.stderr).contains("Read-only file system"), "{unit}");
        let score = vm.host.exec(&["systemd-analyze", "--no-pager", "security", unit])?;
        let score = score.lines().rev().find(|line| line.contains("exposure level")).unwrap_or_default();
        eprintln!("{}", score.trim());
    }
    for (path, wanted) in [
        ("/run/vmesh", "750 vmesh-agent:vmesh"),
        ("/run/vmesh/xds.sock", "660 vmesh-agent:vmesh"),
        ("/run/vmesh/bootstrap.json", "640 vmesh-agent:vmesh"),
        ("/run/vmesh-envoy", "750 vmesh-envoy:vmesh"),
        ("/run/vmesh-envoy/status.sock", "660 vmesh-envoy:vmesh"),
        ("/run/vmesh-net", "750 root:vmesh"),
        ("/run/vmesh-net/net.sock", "660 root:vmesh"),
        ("/var/lib/vmesh-agent", "700 vmesh-agent:vmesh"),
    ] {
        let seen = vm.host.exec(&["stat", "-c", "%a %U:%G", path])?;
        assert_eq!(seen.trim(), wanted, "{path}");
    }
    let admin = vm.host.sh("stat -Lc '%a %U' /run/vmesh-envoy/admin.sock")?;
    assert_eq!(admin.trim(), "600 vmesh-envoy", "Envoy's admin interface");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_captures_is_stopped_restarted_upgraded_and_cleaned_without_a_failed_request()
-> Result<()> {
    let began = Instant::now();
    let (vms, _orders, to) = BootedMesh::with_orders().await?;
    let host = vms.fleet.host("web")?;
    host.sh(
        "nft add table inet filter; nft add chain inet filter input '{ type filter hook input priority 0; }'",
    )?;
    let before = ruleset(&host)?;
    let more = "upstreams: [orders]\ncapture: {outbound: {capture: addresses}}\n";
    host.write("/etc/vmesh/agent.yaml", vms.agent_yaml(&host, more))?;
    // The load keeps connections open, which the drain would wait for.
    host.write("/etc/default/vmesh-agent", "VMESH_NET_OPTIONS=\"--drain 3s\"\n")?;
    host.install(&[&vms.packages.agent])?;
    let vm = BootedNode { host };
    vm.wait_up()?;
    vm.captured(to).await?;
    eprintln!("{:5.1} s: captured", began.elapsed().as_secs_f64());

    let under_load = async |what: &str, work: &dyn Fn() -> Result<()>| -> Result<()> {
        let load = Load::start(Plan::to(to).host("orders").rate(200.0).from(&vm.host.net)?)?;
        wait_for("some load", BOUND, async || (load.so_far().ok > 20).then_some(())).await?;
        let done = work();
        let ok = load.so_far().ok;
        wait_for("more load", BOUND, async || (load.so_far().ok > ok + 50).then_some(())).await?;
        done?;
        none_failed(&format!("{:5.1} s: {what}", began.elapsed().as_secs_f64()), &load.stop().await);
        Ok(())
    };
    let systemctl = |words: &[&str]| vm.host.systemctl(words).map(drop);

    under_load("Envoy is reloaded", &|| systemctl(&["reload", "vmesh-envoy"])).await?;
    vm.captured(to).await?;

    // Stop Envoy by hand: it keeps serving until the redirects are removed.
    under_load("Envoy is stopped", &|| systemctl(&["stop", "vmesh-envoy"])).await?;
    assert_eq!(vm.host.show("vmesh-net", "ActiveState")?, "inactive");
    assert_eq!(vm.envoys()?, 0);
    assert_eq!(vm.ruleset()?, before);
    assert!(!vm.goes_through_envoy(to)?);
    under_load("Envoy is started", &|| systemctl(&["start", "vmesh-envoy"])).await?;
    vm.wait_up()?;
    vm.captured(to).await?;
    under_load("Envoy is restarted", &|| systemctl(&["restart", "vmesh-envoy"])).await?;
    vm.wait_up()?;
    vm.captured(to).await?;

    // A crash of the supervisor changes neither Envoy nor the rules.
    let (net, rules, envoy) = (vm.host.main_pid("vmesh-net")?, vm.ruleset()?, vm.envoy()?);
    under_load("the supervisor is killed", &|| vm.kill("vmesh-envoy")).await?;
    assert_eq!((vm.host.main_pid("vmesh-net")?, vm.ruleset()?, vm.envoy()?), (net, rules.clone(), envoy));

    // vmesh-net may be replaced and may die: the rules stay.
    under_load("what keeps the rules is reloaded", &|| systemctl(&["reload", "vmesh-net"])).await?;
    assert_eq!((vm.host.main_pid("vmesh-net")?, vm.ruleset()?), (net, rules.clone()));
    under_load("what keeps the rules is killed", &|| {
        systemctl(&["kill", "--kill-who=main", "-s", "KILL", "vmesh-net"])?;
        assert_eq!(vm.ruleset()?, rules);
        Ok(())
    })
    .await?;
    vm.wait_up()?;
    under_load("what keeps the rules is restarted", &|| systemctl(&["restart", "vmesh-net"])).await?;
    vm.captured(to).await?;

    let next = Packages::make("0.1.1")?;
    under_load("the package is upgraded", &|| vm.host.install(&[&next.agent]).map(drop)).await?;
    vm.captured(to).await?;

    // Reboot without the rest of the mesh.
    vms.control.power_cut();
    vm.host.reboot()?;
    vm.host.sh(
        "nft add table inet filter; nft add chain inet filter input '{ type filter hook input priority 0; }'",
    )?;
    vm.wait_up()?;
    vm.captured(to).await?;
    eprintln!("{:5.1} s: captured after a reboot", began.elapsed().as_secs_f64());

    under_load("all is stopped", &|| {
        systemctl(&["stop", "vmesh.target"])?;
        // Stopping the target does not wait for its units.
        UNITS.iter().try_for_each(|unit| vm.host.wait_unit(unit, "inactive", 2 * BOUND))
    })
    .await?;
    assert_eq!(vm.ruleset()?, before);
    // The slice outlives Envoy, so that the next Envoy in it is recognised.
    assert_eq!(vm.host.show("vmesh.slice", "ActiveState")?, "active");
    systemctl(&["start", "vmesh.target"])?;
    vm.wait_up()?;
    vm.captured(to).await?;
    under_load("the package is removed", &|| vm.host.remove("remove", &["vmesh-agent"]).map(drop)).await?;
    assert_eq!(vm.ruleset()?, before);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_packages_work_on_the_next_release_of_debian_too() -> Result<()> {
    let vms = BootedMesh::of(Suite::Trixie).await?;
    let client = vms.fleet.switch().host()?;
    let orders = client.within(|| HttpApp::start("orders-1", "v1", (client.v4, 8080)))??;
    vms.service("orders", "http", &[orders.address()])?;
    let more = "upstreams: [orders]\ncapture: {outbound: {capture: addresses}}\n";
    let host = vms.fleet.host("web")?;
    let before = ruleset(&host)?;
    host.write("/etc/vmesh/agent.yaml", vms.agent_yaml(&host, more))?;
    host.install(&[&vms.packages.agent])?;
    let vm = BootedNode { host };
    vm.wait_up()?;
    vm.captured(orders.address()).await?;
    is_confined(&vm)?;
    vm.host.remove("purge", &["vmesh-agent"])?;
    assert_eq!(vm.ruleset()?, before);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_do_not_outlive_what_keeps_them_and_drop_ins_do_what_they_say() -> Result<()> {
    let (vms, _orders, to) = BootedMesh::with_orders().await?;
    let vm = vms.node("web", "upstreams: [orders]\ncapture: {outbound: {capture: addresses}}\n").await?;
    let host = &vm.host;
    vm.captured(to).await?;
    let drop_in = |unit: &str, text: &str| {
        let dir = format!("/run/systemd/system/{unit}.d");
        match text {
            "" => host.sh(&format!("rm -r {dir}"))?,
            _ => host.sh(&format!("mkdir -p {dir}; printf '%s' '{text}' >{dir}/test.conf"))?,
        };
        host.systemctl(&["daemon-reload"])
    };

    // vmesh-net ignores the stop signal.
    drop_in("vmesh-net.service", "[Service]\nTimeoutStopSec=1s\nKillSignal=SIGURG\n")?;
    host.systemctl(&["stop", "vmesh-net"])?;
    assert_eq!(host.show("vmesh-net", "Result")?, "timeout");
    assert!(!vm.ruleset()?.contains("vmesh"), "{}", host.journal("vmesh-net")?);
    assert!(!vm.goes_through_envoy(to)?);
    assert!(!host.path("/var/lib/vmesh-net/bypass").exists(), "the operator's flag is the operator's");
    drop_in("vmesh-net.service", "")?;
    host.systemctl(&["reset-failed", "vmesh-net"])?;
    host.systemctl(&["start", "vmesh-net"])?;
    vm.captured(to).await?;

    // vmesh-net can no longer be started.
    let broken = "[Unit]\nStartLimitBurst=2\n[Service]\nExecStart=\nExecStart=/bin/false\nRestartSec=100ms\n";
    drop_in("vmesh-net.service", broken)?;
    host.systemctl(&["kill", "--kill-who=main", "-s", "KILL", "vmesh-net"])?;
    host.wait_unit("vmesh-net", "failed", BOUND)?;
    wait_for("the rules to be taken away", BOUND, async || match vm.ruleset() {
        Ok(rules) if !rules.contains("vmesh") => Ok(()),
        Ok(rules) => Err(rules),
        Err(failed) => Err(failed.to_string()),
    })
    .await?;
    assert_eq!(host.show("vmesh-net-failed", "Result")?, "success");
    assert!(!vm.goes_through_envoy(to)?);
    drop_in("vmesh-net.service", "")?;
    host.systemctl(&["reset-failed", "vmesh-net"])?;
    host.systemctl(&["start", "vmesh-net"])?;
    vm.captured(to).await?;

    // Envoy and its supervisor have the capability for TPROXY, and no other process has it.
    let example = "/usr/share/doc/vmesh-agent/examples/vmesh-envoy-tproxy.conf";
    host.sh(&format!(
        "mkdir -p /etc/systemd/system/vmesh-envoy.service.d; cp {example} /etc/systemd/system/vmesh-envoy.service.d/tproxy.conf"
    ))?;
    host.systemctl(&["daemon-reload"])?;
    host.systemctl(&["restart", "vmesh-envoy"])?;
    let envoy = vm.envoy()?.unwrap_or_default();
    let effective = host.sh(&format!("sed -n 's/^CapEff:[[:space:]]*//p' /proc/{envoy}/status"))?;
    assert_eq!(effective.trim(), "0000000000001000", "CAP_NET_ADMIN");
    vm.wait_up()?;
    vm.captured(to).await?;

    // The package detects that it may not be on a host: in a chroot it sees the rules of a host, and leaves
    // them alone.
    let rules = vm.ruleset()?;
    host.sh("mkdir -p /srv/other /srv/up /srv/work")?;
    host.sh("mount -t tmpfs tmpfs /srv/up; mkdir /srv/up/u /srv/up/w; \
         mount -t overlay -o lowerdir=/,upperdir=/srv/up/u,workdir=/srv/up/w overlay /srv/other; \
         mount -t proc proc /srv/other/proc; mount -t tmpfs tmpfs /srv/other/run")?;
    host.sh("chroot /srv/other env DEBIAN_FRONTEND=noninteractive dpkg --purge vmesh-agent")?;
    host.sh("chroot /srv/other env DEBIAN_FRONTEND=noninteractive dpkg --install /root/vmesh-agent_0.1.0_amd64.deb")?;
    assert_eq!(
        host.exec(&["chroot", "/srv/other", "systemctl", "is-enabled", "vmesh.target"])?.trim(),
        "enabled"
    );
    assert_eq!(vm.ruleset()?, rules);
    vm.wait_up()
}

#[tokio::test(flavor = "multi_thread")]
async fn other_firewalls_come_and_go_and_reload_beside_what_is_captured() -> Result<()> {
    let (vms, _orders, to) = BootedMesh::with_orders().await?;
    let vm = vms.node("web", "upstreams: [orders]\ncapture: {outbound: {capture: addresses}}\n").await?;
    vm.captured(to).await?;
    let systemctl = |words: &[&str]| vm.host.systemctl(words).map(drop);
    let under_load = async |what: &str, most: u64, work: &dyn Fn() -> Result<()>| -> Result<()> {
        let load = Load::start(Plan::to(to).host("orders").rate(200.0).from(&vm.host.net)?)?;
        wait_for("some load", BOUND, async || (load.so_far().ok > 20).then_some(())).await?;
        let done = work();
        let ok = load.so_far().ok;
        wait_for("more load", BOUND, async || (load.so_far().ok > ok + 50).then_some(())).await?;
        done?;
        let report = load.stop().await;
        eprintln!("{what}: {} requests, {} failed, {} raced", report.sent, report.failures, report.raced);
        assert!(report.failures <= most, "{what}: {:?}", report.failed);
        vm.captured(to).await?;
        Ok(())
    };
    under_load("firewalld is started", 0, &|| systemctl(&["start", "firewalld"])).await?;
    let reload = || vm.host.exec(&["firewall-cmd", "--reload"]).map(drop);
    under_load("firewalld is reloaded", 0, &reload).await?;
    // The next changes may cut connections through a redirect: at most one request for each connection.
    let cut = 4;
    let forget = || {
        vm.host.exec(&["firewall-cmd", "--add-port=8080/tcp"])?;
        vm.host.exec(&["firewall-cmd", "--complete-reload"]).map(drop)
    };
    under_load("firewalld forgets its state", cut, &forget).await?;
    under_load("firewalld is stopped", 0, &|| systemctl(&["stop", "firewalld"])).await?;
    // These flush the whole ruleset; vmesh-net restores its own rules.
    under_load("nftables.service is restarted", cut, &|| systemctl(&["restart", "nftables"])).await?;
    let flush = || vm.host.exec(&["nft", "flush", "ruleset"]).map(drop);
    under_load("all rules are flushed", cut, &flush).await?;
    assert!(vm.ruleset()?.contains("table inet vmesh"));
    // The iptables rules of other programs are kept.
    let docker =
        "iptables -t nat -N DOCKER; iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER";
    under_load("iptables of others", 0, &|| vm.host.sh(docker).map(drop)).await?;
    vm.host.remove("remove", &["vmesh-agent"])?;
    let left = vm.ruleset()?;
    assert!(left.contains("DOCKER") && !left.contains("vmesh"), "{left}");
    Ok(())
}

/// Rules match a control group by an id that changes at each start of the unit.
#[tokio::test(flavor = "multi_thread")]
async fn a_unit_is_captured_by_its_name_and_again_after_each_of_its_starts() -> Result<()> {
    let (vms, _orders, to) = BootedMesh::with_orders().await?;
    let host = vms.fleet.host("web")?;
    let more =
        "upstreams: [orders]\ncapture: {outbound: {capture: addresses, include: {units: [shop.service]}}}\n";
    host.write("/etc/vmesh/agent.yaml", vms.agent_yaml(&host, more))?;
    host.install(&[&vms.packages.agent])?;
    let vm = BootedNode { host };
    vm.wait_up()?;
    for unit in ["shop", "other"] {
        let text = format!(
            "[Service]\nExecStart=/bin/sh -c 'while sleep 0.3; do curl -sS --max-time 5 http://{to}/ >/run/{unit}.next 2>&1; \
             mv /run/{unit}.next /run/{unit}.said; done'\n"
        );
        vm.host.write(&format!("/etc/systemd/system/{unit}.service"), text)?;
    }
    vm.host.systemctl(&["daemon-reload"])?;
    for how in ["start", "restart"] {
        vm.host.systemctl(&[how, "shop", "other"])?;
        vm.host.sh("rm -f /run/shop.said /run/other.said")?;
        wait_for(format!("shop to be captured after its {how}"), 4 * BOUND, async || {
            let said =
                vm.host.sh("cat /run/shop.said; nft list chain inet vmesh outbound; vmeshctl capture || :");
            let said = said.map_err(|failed| failed.to_string())?;
            if said.contains("x-forwarded-proto") { Ok(()) } else { Err(said) }
        })
        .await?;
        let other = vm.host.sh("cat /run/other.said")?;
        assert!(other.contains("orders-1") && !other.contains("x-forwarded-proto"), "{other}");
        assert!(!vm.goes_through_envoy(to)?, "nor is root at a terminal");
    }
    Ok(())
}

/// Features that need more privileges than the units have are in drop-ins, which are copied as the
/// documentation says.
#[tokio::test(flavor = "multi_thread")]
async fn the_drop_ins_that_are_shipped_let_tproxy_and_legacy_iptables_work() -> Result<()> {
    let (vms, _orders, to) = BootedMesh::with_orders().await?;
    let host = vms.fleet.host("web")?;
    let shop = host.net.within(|| HttpApp::start("shop-1", "v1", (host.v4(), 8080)))??;
    vms.service("shop", "http", &[shop.address()])?;
    let before = ruleset(&host)?;
    let drop_in = |unit: &str, name: &str| {
        let dir = format!("/etc/systemd/system/{unit}.service.d");
        host.sh(&format!(
            "mkdir -p {dir}; cp /usr/share/doc/vmesh-agent/examples/{unit}-{name}.conf {dir}/{name}.conf; systemctl daemon-reload"
        ))
    };
    // The package is not configured yet, so nothing is started.
    host.install(&[&vms.packages.agent])?;
    drop_in("vmesh-envoy", "tproxy")?;
    let more = "upstreams: [orders]\nworkloads: [{service: shop, port: 8080}]\n\
        capture: {outbound: {capture: addresses}, inbound: {capture: tproxy}}\n";
    host.write("/etc/vmesh/agent.yaml", vms.agent_yaml(&host, more))?;
    host.systemctl(&["start", "vmesh.target"])?;
    let vm = BootedNode { host };
    vm.wait_up()?;
    vm.captured(to).await?;
    // Calls of other hosts arrive through Envoy. The application sees the client's address.
    let arrives = async || {
        wait_for("calls to arrive by Envoy", 2 * BOUND, async || {
            let said =
                vms.control.exec(&["curl", "-sS", "--max-time", "5", &format!("http://{}/", shop.address())]);
            let said = said.map_err(|failed| failed.to_string())?;
            if said.contains("shop-1") && said.contains("x-forwarded-proto") { Ok(()) } else { Err(said) }
        })
        .await
    };
    arrives().await?;
    assert!(vm.ruleset()?.contains("tproxy"), "{}", vm.ruleset()?);

    // The same host with legacy iptables in place of nf_tables for vmesh.
    vm.host.sh("update-alternatives --set iptables /usr/sbin/iptables-legacy; \
         update-alternatives --set ip6tables /usr/sbin/ip6tables-legacy")?;
    let dir = "/etc/systemd/system/vmesh-net.service.d";
    let example = "/usr/share/doc/vmesh-agent/examples/vmesh-net-iptables-legacy.conf";
    vm.host
        .sh(&format!("mkdir -p {dir}; cp {example} {dir}/iptables-legacy.conf; systemctl daemon-reload"))?;
    vm.host.sh(
        "sed -i 's/^VMESH_NET_OPTIONS=.*/VMESH_NET_OPTIONS=--backend iptables/' /etc/default/vmesh-agent",
    )?;
    let redirect = more.replace("tproxy", "redirect");
    vm.host.write("/etc/vmesh/agent.yaml", vms.agent_yaml(&vm.host, &redirect))?;
    vm.host.systemctl(&["restart", "vmesh-net", "vmesh-agent"])?;
    vm.captured(to).await?;
    arrives().await?;
    let legacy = vm.host.sh("iptables-legacy-save; ip6tables-legacy-save")?;
    assert!(legacy.contains("VMESH_"), "{legacy}");
    assert_eq!(vm.ruleset()?, before, "nothing of ours is left in nf_tables");

    // Switch to iptables over nftables, which does not list the rules of legacy iptables.
    vm.host.sh("update-alternatives --set iptables /usr/sbin/iptables-nft; \
         update-alternatives --set ip6tables /usr/sbin/ip6tables-nft")?;
    vm.host.systemctl(&["kill", "--kill-who=main", "-s", "KILL", "vmesh-net"])?;
    wait_for("the other kind to take over", 2 * BOUND, async || {
        let legacy = vm.host.sh("iptables-legacy-save; ip6tables-legacy-save; vmeshctl capture || :")?;
        let taken_over = !legacy.contains("VMESH_") && vm.ruleset()?.contains("VMESH_");
        if taken_over { Ok(()) } else { Err(vmesh_testkit::Failed::new(legacy)) }
    })
    .await?;
    vm.captured(to).await?;
    vm.host.remove("remove", &["vmesh-agent"])?;
    let legacy = vm.host.sh("iptables-legacy-save; ip6tables-legacy-save")?;
    assert!(!legacy.contains("VMESH_"), "{legacy}");
    assert_eq!(vm.ruleset()?, before);
    Ok(())
}
