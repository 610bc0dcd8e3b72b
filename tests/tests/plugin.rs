//! The example plug-in, written in Python, between a real DNS server (Consul's) and real Envoys.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmesh_testkit::app::HttpApp;
use vmesh_testkit::consul::Consul;
use vmesh_testkit::load::{Load, Plan};
use vmesh_testkit::place::Loopback;
use vmesh_testkit::registry::{Instance, Registry};
use vmesh_testkit::{Failed, Result, wait_for};
use vmesh_tests::Mesh;

const LONG: Duration = Duration::from_secs(90);

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/plugins/dns_srv.py")
}

fn source(consul: &Consul, guard: &str) -> Result<String> {
    let server = SocketAddr::new(consul.address(0)?.ip(), 8600);
    let command = example().canonicalize().map_err(Failed::to("could not find the example"))?;
    Ok(format!(
        "  - plugin:\n      name: dns\n      command: [{:?}, \"--server\", \"{server}\", \"--protocol\", http, \
         \"--interval\", \"0.5\", \"orders=orders.service.dc1.consul\"]\n      silence: 20s\n      guard: {{{guard}}}",
        command.display().to_string()
    ))
}

#[tokio::test(flavor = "multi_thread")]
async fn services_of_dns_are_fed_by_a_plugin_and_stand_behind_the_same_guard() -> Result<()> {
    let mut registry = Registry::consul(1).await?;
    let (mut apps, mut places) = (Vec::new(), Vec::new());
    for number in 1..=3 {
        let place = Loopback::unique()?;
        let app = HttpApp::start(&format!("orders-{number}"), "v1", SocketAddr::new(place.ip(), 8080))?;
        let instance = Instance::new("orders", app.name(), app.address());
        registry.add(&instance).await?;
        apps.push((app, instance));
        places.push(place);
    }
    let all = {
        let mut all: Vec<_> = apps.iter().map(|(app, _)| app.address()).collect();
        all.sort();
        all.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let Registry::Consul(consul) = &registry else { return Err(Failed::new("it is Consul")) };
    let mut mesh = Mesh::prepare_on(&source(consul, "removal_hold: 2s")?, "", &[])?;
    mesh.start_control().await?;
    mesh.agent("web-1", &["orders"], "").await?;
    mesh.synced("web-1").await?;
    mesh.until_endpoints("orders", &all).await?;
    let target = mesh.upstream("web-1", 0)?;
    mesh.answers(target).await?;
    let load = Load::start(Plan::to(target).rate(200.0))?;

    // All instances disappear at once: the guard holds them, and then they return.
    for (_, instance) in &apps {
        registry.remove(instance).await?;
    }
    wait_for("`vmeshctl discovery` to say that orders is held", LONG, async || {
        let output = mesh.ctl(&["discovery"]).map_err(|failed| failed.to_string())?;
        let message = String::from_utf8_lossy(&output.stdout).into_owned();
        if message.contains("orders of dns has been HELD") { Ok(()) } else { Err(message) }
    })
    .await?;
    mesh.until_endpoints("orders", &all).await?;
    for (_, instance) in &apps {
        registry.add(instance).await?;
    }

    // The name server is down: the plug-in reports it, and its last view stays valid.
    registry.kill(0)?;
    let problem = mesh.problem("could not read its registry").await?;
    assert!(problem.contains("dns"), "{problem}");
    mesh.until_endpoints("orders", &all).await?;
    registry.restart_all().await?;

    wait_for("the source to be fresh again", LONG, async || {
        let status = mesh.get("/api/v1/status").await.map_err(|failed| failed.to_string())?;
        if status["sources"][0]["state"] == "fresh" { Ok(()) } else { Err(status["sources"].to_string()) }
    })
    .await?;
    mesh.until_endpoints("orders", &all).await?;
    let report = load.stop().await;
    assert_eq!(report.failures, 0, "{:?}", report.failed.first());
    assert!(report.ok > 200, "there was no load");
    Ok(())
}
