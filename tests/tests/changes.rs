//! Real Envoys under constant load: changes of files fail no request.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use vmesh_testkit::app::HttpApp;
use vmesh_testkit::load::{Load, Plan, Report};
use vmesh_testkit::place::Loopback;
use vmesh_testkit::{Result, wait_for};
use vmesh_tests::{BOUND, Mesh};

struct App {
    app: HttpApp,
    version: &'static str,
    weight: u32,
    health: &'static str,
}

fn orders(apps: &[App]) -> String {
    let mut text = "service: orders\nprotocol: http\nendpoints:\n".to_owned();
    for App { app, version, weight, health } in apps {
        let address = app.address();
        text.push_str(&format!(
            "  - {{address: \"{address}\", version: {version}, weight: {weight}, health: {health}}}\n"
        ));
    }
    text
}

fn split(v1: u32, v2: u32) -> String {
    format!(
        "kind: Service\nname: orders\nsubsets: {{v1: {{version: v1}}, v2: {{version: v2}}}}\n---\n\
         kind: Route\nservice: orders\nrules:\n  - match: {{headers: {{x-canary: \"true\"}}}}\n    split: [{{subset: v2}}]\n  \
         - split: [{{subset: v1, weight: {v1}}}, {{subset: v2, weight: {v2}}}]\n"
    )
}

fn no_failure(report: &Report, during: &str) {
    let shown: Vec<_> = report.failed.iter().take(5).map(|failure| format!("{failure:?}")).collect();
    assert_eq!(report.failures, 0, "{} requests failed {during}: {}", report.failures, shown.join("\n"));
    assert!(report.ok > 100, "there was no load {during}: {report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_changes_of_files_fail_no_request() -> Result<()> {
    let place = Loopback::unique()?;
    let start = |name: &str, version: &'static str| -> Result<App> {
        let address = SocketAddr::new(place.ip(), place.port()?);
        Ok(App { app: HttpApp::start(name, version, address)?, version, weight: 1, health: "unknown" })
    };
    let mut apps = vec![start("a", "v1")?, start("b", "v1")?, start("c", "v2")?, start("d", "v2")?];
    let files = [("services.d/orders.yaml", orders(&apps)), ("mesh.d/orders.yaml", split(50, 50))];
    let mut mesh = Mesh::start(&[(files[0].0, &files[0].1), (files[1].0, &files[1].1)]).await?;
    mesh.agent("web-1", &["orders"], "").await?;
    mesh.synced("web-1").await?;
    let target = mesh.upstream("web-1", 0)?;
    mesh.answers(target).await?;

    let load = Load::start(Plan::to(target).rate(300.0))?;
    let canary = Load::start(Plan::to(target).rate(50.0).header("x-canary", "true"))?;
    let mut spare = Vec::new();
    let mut observed = in_envoy(&mesh).await?;
    for round in 0..25u32 {
        // Each round makes four changes, and waits after each one until Envoy has it in force. The first: an
        // instance is added or removed.
        match spare.pop() {
            Some(back) => apps.push(back),
            None => {
                let at = 1 + usize::try_from(round).unwrap_or(0) % (apps.len() - 2);
                spare.push(apps.remove(at));
            }
        }
        mesh.write("services.d/orders.yaml", &orders(&apps))?;
        observed = changed_in_envoy(&mesh, observed, "which instances there are").await?;
        // The second: a weight changes.
        apps[0].weight = 2 + round % 7;
        mesh.write("services.d/orders.yaml", &orders(&apps))?;
        observed = changed_in_envoy(&mesh, observed, "a weight").await?;
        // The third: an instance is drained, or no longer.
        let last = apps.len() - 1;
        apps[last].health = if apps[last].health == "draining" { "healthy" } else { "draining" };
        mesh.write("services.d/orders.yaml", &orders(&apps))?;
        observed = changed_in_envoy(&mesh, observed, "a drain").await?;
        // The fourth: the split between the versions changes.
        mesh.write("mesh.d/orders.yaml", &split(round % 5 * 20 + 10, 100))?;
        observed = changed_in_envoy(&mesh, observed, "the split").await?;
    }
    no_failure(&load.stop().await, "while files changed a hundred times");
    let canary = canary.stop().await;
    no_failure(&canary, "with x-canary");
    assert_eq!(canary.by_version.keys().collect::<Vec<_>>(), ["v2"], "a canary request went to v1");
    mesh.synced("web-1").await?;
    assert_eq!(mesh.problems().await?, Vec::<String>::new());
    assert!(mesh.metric("vmesh_xds_nacks_total").await? == 0.0, "Envoy refused something");
    Ok(())
}

/// Returns Envoy's own view of `orders`: the instances of each version with weight and health, and the split.
async fn in_envoy(mesh: &Mesh) -> Result<Vec<String>> {
    let envoy = mesh.envoy("web-1");
    let clusters = envoy.clusters().await?;
    let mut lines = Vec::new();
    for cluster in clusters.pointer("/cluster_statuses").and_then(Value::as_array).into_iter().flatten() {
        let name = cluster.pointer("/name").and_then(Value::as_str).unwrap_or_default();
        for host in cluster.pointer("/host_statuses").and_then(Value::as_array).into_iter().flatten() {
            let [port, health, weight] =
                ["/address/socket_address/port_value", "/health_status/eds_health_status", "/weight"]
                    .map(|path| host.pointer(path).cloned().unwrap_or_default());
            lines.push(format!("{name}: port {port}, weight {weight}, {health}"));
        }
    }
    lines.sort();
    let routes = envoy.get("/config_dump?resource=dynamic_route_configs").await?;
    let weights =
        routes.lines().filter(|line| line.contains("\"weight\":") || line.contains("\"name\": \"orders|"));
    lines.extend(weights.map(|line| line.trim().to_owned()));
    Ok(lines)
}

/// Waits until Envoy's view of `orders` differs from `before`, and returns it.
async fn changed_in_envoy(mesh: &Mesh, before: Vec<String>, what: &str) -> Result<Vec<String>> {
    wait_for(format!("a change of {what} to reach Envoy"), BOUND, async || {
        let now = in_envoy(mesh).await.map_err(|failed| failed.to_string())?;
        if now == before { Err(now.join("\n")) } else { Ok(now) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_instance_gets_traffic_and_a_drained_one_gets_no_more() -> Result<()> {
    let place = Loopback::unique()?;
    let start = |name: &str| -> Result<App> {
        let address = SocketAddr::new(place.ip(), place.port()?);
        Ok(App { app: HttpApp::start(name, "v1", address)?, version: "v1", weight: 1, health: "healthy" })
    };
    let mut apps = vec![start("a")?];
    let mut mesh = Mesh::start(&[("services.d/orders.yaml", &orders(&apps))]).await?;
    mesh.agent("web-1", &["orders"], "").await?;
    let target = mesh.upstream("web-1", 0)?;
    mesh.answers(target).await?;
    let load = Load::start(Plan::to(target).rate(300.0))?;

    apps.push(start("b")?);
    mesh.write("services.d/orders.yaml", &orders(&apps))?;
    wait_for("traffic at b", BOUND, async || match load.so_far().by_instance.get("b") {
        Some(_) => Ok(()),
        None => Err("none"),
    })
    .await?;

    apps[0].health = "draining";
    mesh.write("services.d/orders.yaml", &orders(&apps))?;
    let mut last = (u64::MAX, std::time::Instant::now());
    wait_for("no traffic at a", BOUND, async || {
        let observed = load.so_far().by_instance.get("a").copied().unwrap_or(0);
        if observed != last.0 {
            last = (observed, std::time::Instant::now());
        }
        if last.1.elapsed() > Duration::from_secs(1) { Ok(()) } else { Err(format!("{observed} so far")) }
    })
    .await?;
    // The drained instance may be killed now.
    let drained = apps.remove(0);
    drained.app.kill();
    mesh.write("services.d/orders.yaml", &orders(&apps))?;
    // The load continues until Envoy, too, has only the new instance.
    let address = apps[0].app.address().to_string();
    wait_for("Envoy to have b alone", BOUND, async || {
        let endpoints = mesh.envoy("web-1").endpoints("orders").await.map_err(|failed| failed.to_string())?;
        let alone = endpoints.as_deref() == Some(&[(address.clone(), true)][..]);
        if alone { Ok(()) } else { Err(format!("{endpoints:?}")) }
    })
    .await?;
    no_failure(&load.stop().await, "while one instance replaced another");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn tcp_and_inbound_listeners_carry_bytes_both_ways() -> Result<()> {
    let place = Loopback::unique()?;
    let application = HttpApp::start("a", "v1", SocketAddr::new(place.ip(), place.port()?))?;
    let mut mesh = Mesh::start(&[]).await?;
    let workload = format!(
        "workloads:\n  - {{service: raw, port: {}, host: {}, protocol: tcp}}\n",
        application.address().port(),
        application.address().ip()
    );
    mesh.agent("raw-1", &[], &workload).await?;
    let inbound = SocketAddr::new(mesh.upstream("raw-1", 0)?.ip(), 15008);
    mesh.write("services.d/raw.yaml", &format!("service: raw\nendpoints: [\"{inbound}\"]\n"))?;
    mesh.agent("web-1", &["raw"], "").await?;
    mesh.answers(mesh.upstream("web-1", 0)?).await?;
    assert_eq!(application.requests(), 1);
    Ok(())
}
