//! Names of the mesh on booted hosts: the host's own resolver finds them, other names still work, they
//! survive the loss of the control plane, and they are removed without a trace.

use std::net::SocketAddr;

use vmesh_testkit::app::HttpApp;
use vmesh_testkit::hosts::Host;
use vmesh_testkit::{Result, wait_for};
use vmesh_tests::BOUND;
use vmesh_tests::hosts::{BootedMesh, difference, trace};

/// Waits until the C library of the host resolves a name to these addresses, in both families.
async fn resolves(host: &Host, name: &str, wanted: &[&str]) -> Result<()> {
    wait_for(format!("{name} to be {wanted:?}"), 2 * BOUND, async || {
        let said = host.sh(&format!("getent ahosts {name} | cut -d' ' -f1 | sort -u"));
        let said = said.map_err(|failed| failed.to_string())?;
        let starts = |wanted: &&str| said.lines().any(|line| line.starts_with(*wanted));
        if wanted.iter().all(starts) && (!wanted.is_empty() || said.trim().is_empty()) {
            return Ok(());
        }
        let why =
            host.sh("resolvectl status; vmeshctl dns; curl -s 127.0.0.1:15020/names; vmeshctl capture || :");
        Err(format!("{said}\n{}", why.unwrap_or_default()))
    })
    .await
}

async fn answers(host: &Host, url: &str, what: &str) -> Result<()> {
    wait_for(format!("{url} to answer"), 2 * BOUND, async || {
        let said = host.sh(&format!("curl -sS --max-time 5 {url}")).map_err(|failed| failed.to_string())?;
        if said.contains(what) { Ok(()) } else { Err(said) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_found_by_the_hosts_own_resolver_beside_those_of_others() -> Result<()> {
    let vms = BootedMesh::new().await?;
    let server = vms.fleet.switch().host()?;
    let orders = server.within(|| HttpApp::start("orders-1", "v1", (server.v4, 80)))??;
    vms.service("orders", "http", &[orders.address()])?;
    let more = "upstreams: [\"*\"]\ncapture: {outbound: transparent}\n";
    let vm = vms.node("web", more).await?;
    let host = &vm.host;
    answers(host, "127.0.0.1:15020/names", "orders.mesh").await?;

    // The link of the host has its own resolver: a server for `.consul` and one more name.
    let consul = vmesh_testkit::consul::program()?;
    host.copy_in(&consul, "/usr/local/bin/consul")?;
    host.sh("systemd-run --unit consul /usr/local/bin/consul agent -dev -client 127.0.0.1 -bind 127.0.0.1")?;
    host.sh("resolvectl dns eth0 127.0.0.1:8600 && resolvectl domain eth0 '~consul'")?;
    resolves(host, "consul.service.consul", &["127.0.0.1"]).await?;
    let before = trace(host)?;

    let said = host.exec(&["vmeshctl", "dns", "enable"])?;
    assert!(said.contains("systemd-resolved asks 127.0.0.1:15053"), "{said}");
    resolves(host, "orders.mesh", &["24", "fd76:6d65:7368:"]).await?;
    answers(host, "http://orders.mesh/", "x-forwarded-proto").await?;
    answers(host, "-6 http://ORDERS.mesh/", "x-forwarded-proto").await?;
    resolves(host, "nobody.mesh", &[]).await?;
    resolves(host, "consul.service.consul", &["127.0.0.1"]).await?;
    resolves(host, "localhost", &["127.0.0.1"]).await?;
    // The stub resolver also answers over TCP.
    let tcp = host.sh("resolvectl query --type=A orders.mesh")?;
    assert!(tcp.contains("orders.mesh IN A 24"), "{tcp}");

    // The names survive the loss of the control plane and a restart of the agent.
    vms.control.power_cut();
    host.systemctl(&["restart", "vmesh-agent"])?;
    resolves(host, "orders.mesh", &["24"]).await?;
    answers(host, "http://orders.mesh/", "x-forwarded-proto").await?;

    // During a bypass, a name resolves to the endpoints themselves.
    host.exec(&["vmeshctl", "bypass", "on"])?;
    resolves(host, "orders.mesh", &[&server.v4.to_string()]).await?;
    let said = host.exec(&["curl", "-sS", "--max-time", "5", "http://orders.mesh/"])?;
    assert!(said.contains("orders-1") && !said.contains("x-forwarded-proto"), "{said}");
    host.exec(&["vmeshctl", "bypass", "off"])?;
    resolves(host, "orders.mesh", &["24"]).await?;

    let said = host.exec(&["vmeshctl", "dns", "disable"])?;
    assert!(said.contains("removed"), "{said}");
    let left: Vec<_> = difference(&before, &trace(host)?)
        .into_iter()
        // A running vmesh changes its own state.
        .filter(|line| !["/var/lib/vmesh", "/run/", "rules"].iter().any(|own| line.contains(own)))
        .collect();
    assert!(left.is_empty(), "left behind:\n{}", left.join("\n"));
    resolves(host, "orders.mesh", &[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_with_a_plain_resolv_conf_has_the_names_in_its_hosts_file() -> Result<()> {
    let vms = BootedMesh::new().await?;
    let server = vms.fleet.switch().host()?;
    let orders = server.within(|| HttpApp::start("orders-1", "v1", (server.v4, 80)))??;
    vms.service("orders", "http", &[orders.address()])?;
    let vm = vms.node("web", "upstreams: [\"*\"]\ncapture: {outbound: transparent}\n").await?;
    let host = &vm.host;
    answers(host, "127.0.0.1:15020/names", "orders.mesh").await?;
    host.sh(
        "systemctl disable --now systemd-resolved; rm -f /etc/resolv.conf; echo 'nameserver 192.0.2.1' > /etc/resolv.conf\n\
         sed -i 's/^hosts:.*/hosts: files dns/' /etc/nsswitch.conf",
    )?;
    let before = host.read("/etc/hosts")?;
    let said = host.exec(&["vmeshctl", "dns", "enable"])?;
    assert!(said.contains("vmesh-hosts.service keeps the block"), "{said}");
    resolves(host, "orders.mesh", &["24", "fd76:6d65:7368:"]).await?;
    answers(host, "http://orders.mesh/", "x-forwarded-proto").await?;
    let second = SocketAddr::from((server.v4, 80));
    vms.service("payments", "http", &[second])?;
    resolves(host, "payments.mesh", &["24"]).await?;
    host.exec(&["vmeshctl", "dns", "disable"])?;
    assert_eq!(host.read("/etc/hosts")?, before);
    assert_eq!(host.show("vmesh-hosts", "ActiveState")?, "inactive");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_the_resolver_that_would_cost_other_names_is_not_made_or_taken_back() -> Result<()> {
    let vms = BootedMesh::new().await?;
    let server = vms.fleet.switch().host()?;
    let orders = server.within(|| HttpApp::start("orders-1", "v1", (server.v4, 80)))??;
    vms.service("orders", "http", &[orders.address()])?;
    let vm = vms.node("web", "upstreams: [\"*\"]\ncapture: {outbound: transparent}\n").await?;
    let host = &vm.host;
    answers(host, "127.0.0.1:15020/names", "orders.mesh").await?;
    let consul = vmesh_testkit::consul::program()?;
    host.copy_in(&consul, "/usr/local/bin/consul")?;
    host.sh("systemd-run --unit consul /usr/local/bin/consul agent -dev -client 127.0.0.1 -bind 127.0.0.1 -dns-port 53")?;

    // The only server of systemd-resolved comes from `FallbackDNS=`. Next to a server of vmesh it would not
    // be asked.
    host.sh("mkdir -p /etc/systemd/resolved.conf.d\n\
         printf '[Resolve]\\nFallbackDNS=127.0.0.1\\n' > /etc/systemd/resolved.conf.d/10-corp.conf\n\
         systemctl restart systemd-resolved")?;
    resolves(host, "consul.service.consul", &["127.0.0.1"]).await?;
    let said = host.exec(&["vmeshctl", "dns", "enable"])?;
    assert!(said.contains("FallbackDNS") && said.contains("vmesh-hosts.service keeps the block"), "{said}");
    resolves(host, "orders.mesh", &["24"]).await?;
    resolves(host, "consul.service.consul", &["127.0.0.1"]).await?;
    let refused = host.output(&["vmeshctl", "dns", "enable", "--resolver", "resolved"])?;
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    host.exec(&["vmeshctl", "dns", "disable"])?;
    resolves(host, "consul.service.consul", &["127.0.0.1"]).await?;
    // The directory existed before.
    host.sh("rm /etc/systemd/resolved.conf.d/10-corp.conf; test -d /etc/systemd/resolved.conf.d")?;

    // Now the server belongs to a link. If the resolver does not start with the change, the change is
    // reverted.
    host.sh("systemctl restart systemd-resolved; resolvectl dns eth0 127.0.0.1")?;
    host.sh(
        "mkdir -p /run/systemd/system/systemd-resolved.service.d\n\
         printf '[Service]\\nExecStartPre=+/bin/sh -c \"! test -e /etc/systemd/resolved.conf.d/vmesh.conf\"\\n' \
         > /run/systemd/system/systemd-resolved.service.d/picky.conf\n\
         systemctl daemon-reload",
    )?;
    let taken_back = host.output(&["vmeshctl", "dns", "enable"])?;
    let said = String::from_utf8_lossy(&taken_back.stderr).into_owned();
    assert!(taken_back.status.code() == Some(1) && said.contains("change is taken back"), "{said}");
    host.sh("! test -e /etc/systemd/resolved.conf.d/vmesh.conf; systemctl is-active systemd-resolved")?;

    // A file of another program under vmesh's name is neither replaced nor removed.
    host.sh("rm -r /run/systemd/system/systemd-resolved.service.d; systemctl daemon-reload")?;
    host.write("/etc/systemd/resolved.conf.d/vmesh.conf", "[Resolve]\nCache=yes\n")?;
    assert_eq!(host.output(&["vmeshctl", "dns", "enable"])?.status.code(), Some(1));
    host.exec(&["vmeshctl", "dns", "disable"])?;
    assert_eq!(host.read("/etc/systemd/resolved.conf.d/vmesh.conf")?, "[Resolve]\nCache=yes\n");
    Ok(())
}
