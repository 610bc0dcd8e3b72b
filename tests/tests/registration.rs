//! Workloads that register themselves in a real Consul and a real ZooKeeper; the mesh discovers them from
//! there.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::Value;
use vmesh_testkit::api::{Api, field};
use vmesh_testkit::app::{Behaviour, HttpApp};
use vmesh_testkit::load::{Load, Plan};
use vmesh_testkit::place::Loopback;
use vmesh_testkit::registry::Registry;
use vmesh_testkit::{Failed, Result, wait_for};
use vmesh_tests::Mesh;

const LONG: Duration = Duration::from_secs(90);

/// Two hosts whose agents register `orders`, and one host that calls it.
struct RegistrationSetup {
    mesh: Mesh,
    apps: Vec<HttpApp>,
    registry: Registry,
    _places: Vec<Loopback>,
}

/// Returns the YAML of `registry:` and `register:` for a registry.
fn yaml(registry: &Registry, format: &str) -> Result<(String, String)> {
    Ok(match registry {
        Registry::Consul(consul) => (
            format!("consul: {{address: \"{}\"}}", consul.url(0)?),
            "consul: {tags: [v1], ttl: 6s}".to_owned(),
        ),
        Registry::ZooKeeper(zookeeper, _) => (
            format!("zookeeper: {{connect: \"{}\", session_timeout: 6s}}", zookeeper.connect()),
            format!("zookeeper: {{path: /services/orders, format: {format}}}"),
        ),
    })
}

async fn start(registry: Registry, source: &str, format: &str, more: &str) -> Result<RegistrationSetup> {
    let documents = [("mesh.d/orders.yaml", "kind: Service\nname: orders\nprotocol: http\n")];
    let mut mesh = Mesh::prepare_on(source, "documents: {dir: mesh.d}", &documents)?;
    mesh.start_control().await?;
    let (mut apps, mut places) = (Vec::new(), Vec::new());
    let (where_to, what) = yaml(&registry, format)?;
    for number in 1..=2 {
        let place = Loopback::unique()?;
        let app = HttpApp::start(&format!("orders-{number}"), "v1", SocketAddr::new(place.ip(), 8080))?;
        let config = format!(
            "registry: {{{where_to}, settle: 2s{more}}}\n\
             workloads:\n  - {{service: orders, port: 8080, host: {}, protocol: http, listen: \"{{ip}}:15008\",\n     \
             health: {{http: /healthz, interval: 200ms, fall: 2}},\n     \
             register: {{{what}, port: 15008, version: v1}}}}\n",
            place.ip()
        );
        mesh.agent(&format!("orders-{number}"), &[], &config).await?;
        apps.push(app);
        places.push(place);
    }
    mesh.agent("web-1", &["orders"], "").await?;
    for name in ["orders-1", "orders-2", "web-1"] {
        mesh.synced(name).await?;
    }
    Ok(RegistrationSetup { mesh, apps, registry, _places: places })
}

impl RegistrationSetup {
    /// Returns the address under which the workload of `orders-1` or `orders-2` is registered.
    fn inbound(&self, number: usize) -> Result<String> {
        let ip = self.mesh.agent_api(&format!("orders-{number}"))?.ip();
        Ok(SocketAddr::new(ip, 15008).to_string())
    }

    async fn until(&self, expected: &[String]) -> Result<()> {
        let mut expected = expected.to_vec();
        expected.sort();
        wait_for(format!("orders to be {expected:?}"), LONG, async || {
            let mut now = self.mesh.endpoints("orders").await.map_err(|failed| failed.to_string())?;
            now.sort();
            if now == expected { Ok(()) } else { Err(format!("{now:?}")) }
        })
        .await
    }

    /// Returns the registration state that the agent of `orders-1` reports.
    async fn state(&self) -> Result<String> {
        let status = Api(self.mesh.agent_api("orders-1")?).json("/status").await?;
        let registered = status.pointer("/registered/0").cloned().unwrap_or_default();
        Ok(field(&registered, "state"))
    }

    async fn until_state(&self, state: &str) -> Result<()> {
        wait_for(format!("the registration to be {state}"), LONG, async || {
            let now = self.state().await.map_err(|failed| failed.to_string())?;
            if now == state { Ok(()) } else { Err(now) }
        })
        .await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_registers_in_consul_says_how_it_is_drains_and_takes_its_leave_in_order() -> Result<()> {
    let registry = Registry::consul(1).await?;
    let Registry::Consul(consul) = &registry else { return Err(Failed::new("it is Consul")) };
    let source = format!(
        "  - consul: {{address: \"{}\", guard: {{removal_hold: 1s, confirm_unhealthy: 1s}}}}",
        consul.url(0)?
    );
    let mut bench = start(registry, &source, "", "").await?;
    let (one, two) = (bench.inbound(1)?, bench.inbound(2)?);
    let healthy = |address: &str| format!("{address} healthy");
    bench.until(&[healthy(&one), healthy(&two)]).await?;
    bench.until_state("registered").await?;
    let target = bench.mesh.upstream("web-1", 0)?;
    bench.mesh.answers(target).await?;
    let load = Load::start(Plan::to(target).rate(200.0))?;

    // A failing workload becomes unhealthy without being removed, then healthy again.
    bench.apps[0].behave(Behaviour::Slow(Duration::from_secs(2)));
    bench.until(&[format!("{one} unhealthy"), healthy(&two)]).await?;
    bench.apps[0].behave(Behaviour::Well);
    bench.until(&[healthy(&one), healthy(&two)]).await?;

    // A file drains the workload, and its removal ends the drain.
    let drain = bench.mesh.path("run/orders-1/drain");
    std::fs::create_dir_all(&drain).map_err(Failed::to("could not make the drain directory"))?;
    let file = drain.join("orders");
    std::fs::write(&file, "").map_err(Failed::to("could not write the drain file"))?;
    bench.until(&[format!("{one} draining"), healthy(&two)]).await?;
    bench.until_state("draining").await?;
    std::fs::remove_file(&file).map_err(Failed::to("could not remove the drain file"))?;
    bench.until(&[healthy(&one), healthy(&two)]).await?;

    // Consul's agent loses the registration: the workload is registered again.
    let Registry::Consul(consul) = &bench.registry else { return Err(Failed::new("it is Consul")) };
    let services = consul.get(0, "/v1/agent/services").await?;
    let ids: Vec<String> = services.as_object().map(|all| all.keys().cloned().collect()).unwrap_or_default();
    let id = ids
        .iter()
        .find(|id| id.starts_with("orders-1"))
        .cloned()
        .ok_or_else(|| Failed::new(format!("{ids:?}")))?;
    consul.deregister(0, &id).await?;
    wait_for("it to be registered again", LONG, async || {
        let services = consul.get(0, "/v1/agent/services").await.map_err(|failed| failed.to_string())?;
        services.get(&id).map(|_| ()).ok_or_else(|| services.to_string())
    })
    .await?;
    bench.until(&[healthy(&one), healthy(&two)]).await?;

    // The agent stops, together with Envoy: the instance first gets no new requests, and is then
    // deregistered. No request fails.
    bench.mesh.agent_daemon("orders-1")?.terminate(LONG).await?;
    bench.until(&[healthy(&two)]).await?;
    let report = load.stop().await;
    assert_eq!(report.failures, 0, "{:?}", report.failed.first());
    assert!(report.by_instance.get("orders-1").is_some_and(|count| *count > 50), "{:?}", report.by_instance);
    Ok(())
}

/// Checks how the readers of each format understand what the agent writes.
async fn a_workload_in_zookeeper(format: &str) -> Result<()> {
    let registry = Registry::zookeeper(1).await?;
    let Registry::ZooKeeper(zookeeper, _) = &registry else { return Err(Failed::new("it is ZooKeeper")) };
    let read_as = if format == "spring" { "curator" } else { format };
    // An instance in a format that can express a drain gets no new requests at once. In other formats, the
    // guard holds the removed instance for a while.
    let can_drain = !["curator", "hostport"].contains(&format);
    let hold = if can_drain { "10s" } else { "1s" };
    let source = format!(
        "  - zookeeper: {{connect: \"{}\", roots: [{{path: /services, format: {read_as}}}], guard: {{removal_hold: {hold}}}}}",
        zookeeper.connect()
    );
    let mut bench = start(registry, &source, format, "").await?;
    let (one, two) = (bench.inbound(1)?, bench.inbound(2)?);
    // Waits until exactly these instances take new requests.
    let until = async |bench: &RegistrationSetup, expected: &[&String]| -> Result<Vec<Value>> {
        wait_for(format!("{expected:?} to take requests"), LONG, async || {
            let services = bench.mesh.get("/api/v1/services").await.map_err(|failed| failed.to_string())?;
            let all = services.pointer("/services/0/endpoints").and_then(Value::as_array).cloned();
            let mut all = all.unwrap_or_default();
            all.retain(|endpoint| field(endpoint, "health") != "draining");
            let mut now: Vec<_> = all.iter().map(|endpoint| field(endpoint, "address")).collect();
            now.sort();
            let mut expected: Vec<_> = expected.iter().map(|address| (*address).clone()).collect();
            expected.sort();
            if now == expected { Ok(all) } else { Err(services.to_string()) }
        })
        .await
    };
    let there = until(&bench, &[&one, &two]).await?;
    if format != "hostport" {
        let versions: Vec<_> = there.iter().map(|endpoint| field(endpoint, "version")).collect();
        assert_eq!(versions, ["v1", "v1"], "{format}");
    }
    bench.until_state("registered").await?;
    let target = bench.mesh.upstream("web-1", 0)?;
    bench.mesh.answers(target).await?;
    let load = Load::start(Plan::to(target).rate(100.0))?;
    let drain = bench.mesh.path("run/orders-1/drain");
    std::fs::create_dir_all(&drain).map_err(Failed::to("could not make the drain directory"))?;
    let asked = Instant::now();
    std::fs::write(drain.join("all"), "").map_err(Failed::to("could not write the drain file"))?;
    until(&bench, &[&two]).await?;
    bench.until_state("draining").await?;
    let took = asked.elapsed();
    assert!(!can_drain || took < Duration::from_secs(8), "{format}: it took {took:?}, as long as a removal");
    std::fs::remove_file(drain.join("all")).map_err(Failed::to("could not remove the drain file"))?;
    until(&bench, &[&one, &two]).await?;
    bench.mesh.agent_daemon("orders-1")?.terminate(LONG).await?;
    until(&bench, &[&two]).await?;
    let report = load.stop().await;
    assert_eq!(report.failures, 0, "{format}: {:?}", report.failed.first());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_registers_in_zookeeper_as_a_serverset_member() -> Result<()> {
    a_workload_in_zookeeper("serverset").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_registers_in_zookeeper_as_curator_and_spring_do() -> Result<()> {
    a_workload_in_zookeeper("curator").await?;
    a_workload_in_zookeeper("spring").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_registers_in_zookeeper_as_nerve_did_and_as_plain_text() -> Result<()> {
    a_workload_in_zookeeper("nerve").await?;
    a_workload_in_zookeeper("hostport").await
}

/// During an upgrade of the agent, the node of the old session stays until the new session takes it over.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_keeps_its_registration_is_replaced_without_a_gap() -> Result<()> {
    let registry = Registry::zookeeper(1).await?;
    let Registry::ZooKeeper(zookeeper, _) = &registry else { return Err(Failed::new("it is ZooKeeper")) };
    let source = format!(
        "  - zookeeper: {{connect: \"{}\", roots: [{{path: /services, format: nerve}}], guard: {{removal_hold: 0s}}}}",
        zookeeper.connect()
    );
    let mut watcher = zookeeper.client(0).await?;
    let mut bench = start(registry, &source, "nerve", ", on_stop: keep").await?;
    bench.until_state("registered").await?;
    wait_for("two members", LONG, async || {
        let children = watcher.children("/services/orders").await.map_err(|failed| failed.to_string())?;
        if children.len() == 2 { Ok(()) } else { Err(format!("{children:?}")) }
    })
    .await?;
    bench.mesh.agent_daemon("orders-1")?.terminate(LONG).await?;
    bench.mesh.restart_agent("orders-1")?;
    // The loop lasts longer than the old session.
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(12) {
        let mut children = watcher.children("/services/orders").await?;
        children.retain(|child| child.starts_with("orders-1"));
        assert!(!children.is_empty(), "it was gone after {:?}", since.elapsed());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bench.until_state("registered").await?;
    let mut children = watcher.children("/services/orders").await?;
    children.retain(|child| child.starts_with("orders-1"));
    assert_eq!(children.len(), 1, "{children:?}");
    Ok(())
}
