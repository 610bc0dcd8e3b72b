//! Installations on booted hosts that are interrupted, that find files and users made by others, or that are
//! removed while processes hang.

use vmesh_testkit::hosts::Host;
use vmesh_testkit::{Result, wait_for};
use vmesh_tests::BOUND;
use vmesh_tests::hosts::{BootedMesh, BootedNode, Packages, difference, ruleset, trace};

const CAPTURES: &str = "upstreams: [\"*\"]\ncapture: {outbound: {capture: addresses}}\n";

/// Runs a script, whatever its exit status is.
fn try_sh(host: &Host, script: &str) -> Result<String> {
    let output = host.output(&["sh", "-c", script])?;
    Ok(String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_installation_that_is_cut_off_is_completed_by_dpkg() -> Result<()> {
    let (vms, _orders, to) = BootedMesh::with_orders().await?;
    let host = vms.fleet.host("web")?;
    host.write("/etc/vmesh/agent.yaml", vms.agent_yaml(&host, CAPTURES))?;
    // The policy script kills the maintainer script that calls it, once.
    host.write(
        "/usr/sbin/policy-rc.d",
        "#!/bin/sh\nrm -f /usr/sbin/policy-rc.d\nkill -9 \"$PPID\"\nexit 0\n",
    )?;
    host.sh("chmod 755 /usr/sbin/policy-rc.d")?;
    host.copy_in(&vms.packages.agent, "/root/agent.deb")?;
    let said = try_sh(&host, "dpkg --install /root/agent.deb")?;
    assert!(said.contains("killed"), "{said}");
    host.sh("dpkg --configure --pending")?;
    let vm = BootedNode { host };
    assert_eq!(vm.host.systemctl(&["is-enabled", "vmesh.target"])?.trim(), "enabled");
    vm.wait_up()?;
    vm.captured(to).await?;

    // A power cut after the files were unpacked: once as in a first installation, once as after a removal.
    for how in ["purge", "remove"] {
        vm.host.remove(how, &["vmesh-agent"])?;
        vm.host.write("/etc/vmesh/agent.yaml", vms.agent_yaml(&vm.host, CAPTURES))?;
        vm.host.sh("dpkg --unpack /root/agent.deb")?;
        vm.host.reboot()?;
        vm.host.sh("dpkg --configure --pending")?;
        assert_eq!(vm.host.systemctl(&["is-enabled", "vmesh.target"])?.trim(), "enabled", "{how}");
        vm.wait_up()?;
        vm.captured(to).await?;
    }

    // An interrupted upgrade neither starts stopped units nor enables disabled ones.
    vm.host.systemctl(&["disable", "--now", "vmesh.target"])?;
    vm.host.wait_unit("vmesh-envoy", "inactive", 4 * BOUND)?;
    let next = Packages::make("0.1.1")?;
    vm.host.copy_in(&next.agent, "/root/next.deb")?;
    vm.host.sh("dpkg --unpack /root/next.deb && dpkg --configure --pending")?;
    assert_eq!(try_sh(&vm.host, "systemctl is-enabled vmesh.target")?.trim(), "disabled");
    assert_eq!(vm.host.show("vmesh-agent", "ActiveState")?, "inactive");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_operator_has_made_outlives_upgrade_downgrade_and_purge() -> Result<()> {
    let (vms, _orders, to) = BootedMesh::with_orders().await?;
    let host = vms.fleet.host("web")?;
    // The site has chosen the ids of these users.
    host.sh("groupadd --gid 4321 vmesh; groupadd --gid 4322 vmesh-agent\n\
         useradd --uid 4322 --gid 4322 --home-dir /srv/agent --shell /usr/sbin/nologin vmesh-agent\n\
         useradd --system ops; usermod --append --groups vmesh ops")?;
    let users = "getent passwd vmesh-agent vmesh-envoy; getent group vmesh vmesh-agent";
    host.write("/etc/vmesh/agent.yaml", vms.agent_yaml(&host, CAPTURES))?;
    host.install(&[&vms.packages.agent])?;
    let vm = BootedNode { host };
    vm.wait_up()?;
    vm.captured(to).await?;
    let owner = vm.host.exec(&["stat", "-c", "%u", "/var/lib/vmesh-agent"])?;
    assert_eq!(owner.trim(), "4322");
    let seen = vm.host.sh(users)?;
    assert!(seen.contains("vmesh-agent:x:4322:") && seen.contains("vmesh-envoy:"), "{seen}");

    // Local settings and a bypass: neither an upgrade nor the downgrade changes them.
    let settings = "VMESH_NET_OPTIONS=\"--drain 2s\"\n# mine\n";
    vm.host.write("/etc/default/vmesh-agent", settings)?;
    vm.host.exec(&["vmeshctl", "bypass", "on"])?;
    let bypassed = vm.ruleset()?;
    assert!(!bypassed.contains("vmesh"), "{bypassed}");
    let next = Packages::make("0.1.1")?;
    for deb in [&next.agent, &vms.packages.agent] {
        vm.host.install(&[deb])?;
        vm.wait_up()?;
        assert_eq!(vm.host.read("/etc/default/vmesh-agent")?, settings);
        let said = vm.host.sh("vmeshctl capture --json || :")?;
        assert!(said.contains("\"state\": \"bypassed\""), "{said}");
        assert_eq!(vm.ruleset()?, bypassed);
        assert!(!vm.goes_through_envoy(to)?);
    }
    vm.host.exec(&["vmeshctl", "bypass", "off"])?;
    vm.captured(to).await?;

    // A purge removes what the package has created, and nothing else.
    vm.host.remove("purge", &["vmesh-agent"])?;
    let left = try_sh(&vm.host, users)?;
    assert!(left.contains("vmesh-agent:x:4322:4322:") && left.contains("vmesh:x:4321:"), "{left}");
    assert!(!left.contains("vmesh-envoy:x:"), "{left}");
    assert!(left.contains(":ops"), "who was in the group still is: {left}");

    // The package can be installed again.
    vm.host.write("/etc/vmesh/agent.yaml", vms.agent_yaml(&vm.host, CAPTURES))?;
    vm.host.install(&[&vms.packages.agent])?;
    vm.wait_up()?;
    vm.captured(to).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_takes_back_what_the_resolver_was_told_and_ends_what_hangs() -> Result<()> {
    let (vms, _orders, to) = BootedMesh::with_orders().await?;
    let host = vms.fleet.host("web")?;
    let before = trace(&host)?;
    host.write("/etc/vmesh/agent.yaml", vms.agent_yaml(&host, CAPTURES))?;
    host.install(&[&vms.packages.agent])?;
    let vm = BootedNode { host };
    vm.wait_up()?;
    vm.captured(to).await?;
    // The operator enables first one and then another method for the resolver, because the host has changed.
    let said = vm.host.exec(&["vmeshctl", "dns", "enable", "--resolver", "hosts"])?;
    assert!(said.contains("vmesh-hosts.service keeps the block"), "{said}");
    vm.host.exec(&["vmeshctl", "dns", "enable", "--resolver", "resolved"])?;
    wait_for("the block of names", BOUND, async || match vm.host.sh("grep orders.mesh /etc/hosts || :") {
        Ok(said) if !said.is_empty() => Ok(()),
        said => Err(format!("{said:?}")),
    })
    .await?;

    // All daemons hang. A short timeout replaces their two minutes here.
    for unit in ["vmesh-agent", "vmesh-envoy", "vmesh-net"] {
        vm.host.sh(&format!(
            "mkdir -p /run/systemd/system/{unit}.service.d\n\
             printf '[Service]\\nTimeoutStopSec=3s\\n' >/run/systemd/system/{unit}.service.d/test.conf"
        ))?;
    }
    vm.host.systemctl(&["daemon-reload"])?;
    for unit in ["vmesh-agent", "vmesh-envoy", "vmesh-net"] {
        vm.host.systemctl(&["kill", "--kill-who=all", "-s", "STOP", unit])?;
    }
    vm.host.remove("remove", &["vmesh-agent"])?;
    assert_eq!(try_sh(&vm.host, "pgrep -a envoy; pgrep -a vmesh")?, "", "what ran still does");
    assert_eq!(ruleset(&vm.host)?, before["rules"]);
    let hosts = vm.host.read("/etc/hosts")?;
    assert!(!hosts.contains("orders.mesh") && !hosts.contains("vmesh"), "{hosts}");

    vm.host.remove("purge", &["vmesh-agent"])?;
    vm.host.sh("rm -f /root/*.deb; rm -rf /run/systemd/system/vmesh-*.d")?;
    let left = difference(&before, &trace(&vm.host)?);
    assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_without_ipv6_captures_and_calls_services_that_have_it() -> Result<()> {
    let (vms, _orders, to) = BootedMesh::with_orders().await?;
    let v6 = "[fd88::77]:8080".parse().map_err(vmesh_testkit::Failed::to("an address"))?;
    vms.service("orders", "http", &[to, v6])?;
    let host = vms.fleet.host("web")?;
    // This has the effect of `ipv6.disable=1`, which needs a reboot of a real machine: IPv6 sockets do not
    // exist.
    for unit in ["vmesh-agent", "vmesh-envoy"] {
        host.write(
            &format!("/etc/systemd/system/{unit}.service.d/test.conf"),
            "[Service]\nRestrictAddressFamilies=\nRestrictAddressFamilies=AF_INET AF_UNIX AF_NETLINK\n",
        )?;
    }
    host.systemctl(&["daemon-reload"])?;
    for more in [CAPTURES, "upstreams: [{service: orders, listen: \"127.0.0.1:9001\"}]\n"] {
        host.write("/etc/vmesh/agent.yaml", vms.agent_yaml(&host, more))?;
        host.install(&[&vms.packages.agent])?;
        host.systemctl(&["restart", "vmesh-agent"])?;
        host.wait_unit("vmesh-envoy", "active", 2 * BOUND)?;
        let called = if more == CAPTURES { to.to_string() } else { "127.0.0.1:9001".to_owned() };
        wait_for("a request to go through Envoy", 2 * BOUND, async || {
            let said = try_sh(
                &host,
                &format!("curl -sS --max-time 5 http://{called}/; curl -s 127.0.0.1:15020/status"),
            )
            .map_err(|failed| failed.to_string())?;
            match said.contains("x-forwarded-proto") && said.contains("\"rejections\":0") {
                true => Ok(()),
                false => Err(said),
            }
        })
        .await?;
    }
    Ok(())
}
