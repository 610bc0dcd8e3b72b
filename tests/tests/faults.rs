//! Parts of the mesh die, and traffic continues.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use vmesh_testkit::api::Api;
use vmesh_testkit::app::HttpApp;
use vmesh_testkit::load::{Load, Plan};
use vmesh_testkit::place::Loopback;
use vmesh_testkit::process::{Daemon, naming};
use vmesh_testkit::{Result, wait_for};
use vmesh_tests::{BOUND, Mesh};

async fn mesh_with_orders(place: &Loopback) -> Result<(Mesh, HttpApp, SocketAddr)> {
    let app = HttpApp::start("a", "v1", SocketAddr::new(place.ip(), place.port()?))?;
    let services = format!("service: orders\nprotocol: http\nendpoints: [\"{}\"]\n", app.address());
    let mut mesh = Mesh::start(&[("services.d/orders.yaml", &services)]).await?;
    mesh.agent("web-1", &["orders"], "").await?;
    mesh.synced("web-1").await?;
    let target = mesh.upstream("web-1", 0)?;
    mesh.answers(target).await?;
    Ok((mesh, app, target))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_killed_ten_times_fails_no_request_and_sends_nothing_again() -> Result<()> {
    let place = Loopback::unique()?;
    let (mut mesh, _app, target) = mesh_with_orders(&place).await?;
    let revision = mesh.get("/api/v1/revision").await?["revision"].clone();
    let updates = async |mesh: &Mesh| -> Result<Vec<Option<u64>>> {
        let envoy = mesh.envoy("web-1");
        let mut all = Vec::new();
        for name in ["cluster_manager.cds.update_success", "listener_manager.lds.update_success"] {
            all.push(envoy.stat(name).await?);
        }
        Ok(all)
    };
    let before = updates(&mesh).await?;
    let load = Load::start(Plan::to(target).rate(300.0))?;
    for round in 0..10 {
        mesh.control()?.kill()?;
        mesh.start_control().await?;
        mesh.synced("web-1").await?;
        assert_eq!(mesh.get("/api/v1/revision").await?["revision"], revision, "in round {round}");
        assert_eq!(mesh.metric("vmesh_xds_resources_sent_total").await?, 0.0, "in round {round}");
    }
    let report = load.stop().await;
    assert_eq!(report.failures, 0, "{:?}", report.failed.first());
    assert!(report.ok > 100, "there was no load");
    assert_eq!(updates(&mesh).await?, before, "Envoy was sent something again");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_restarted_without_a_control_plane_serves_its_envoy_within_two_seconds() -> Result<()> {
    let place = Loopback::unique()?;
    let (mut mesh, _app, target) = mesh_with_orders(&place).await?;
    mesh.control()?.kill()?;
    // The host reboots, so neither the agent nor its Envoy is left.
    mesh.agent_daemon("web-1")?.terminate(BOUND).await?;
    wait_for("Envoy to be gone", BOUND, async || match tokio::net::TcpStream::connect(target).await {
        Ok(_) => Err("it accepts"),
        Err(_) => Ok(()),
    })
    .await?;
    let started = Instant::now();
    mesh.restart_agent("web-1")?;
    mesh.answers(target).await?;
    let took = started.elapsed();
    assert!(took < Duration::from_secs(2), "the first request was answered after {took:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_killed_under_load_fails_no_request() -> Result<()> {
    let place = Loopback::unique()?;
    let (mut mesh, _app, target) = mesh_with_orders(&place).await?;
    let load = Load::start(Plan::to(target).rate(300.0))?;
    mesh.agent_daemon("web-1")?.kill()?;
    mesh.restart_agent("web-1")?;
    mesh.synced("web-1").await?;
    let app = HttpApp::start("b", "v1", SocketAddr::new(place.ip(), place.port()?))?;
    let services = format!("service: orders\nprotocol: http\nendpoints: [\"{}\"]\n", app.address());
    mesh.write("services.d/orders.yaml", &services)?;
    wait_for("the new instance to get traffic", BOUND, async || match load.so_far().by_instance.get("b") {
        Some(_) => Ok(()),
        None => Err("none yet"),
    })
    .await?;
    let report = load.stop().await;
    assert_eq!(report.failures, 0, "{:?}", report.failed.first());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_vmesh_is_needed_for_traffic_to_flow() -> Result<()> {
    let place = Loopback::unique()?;
    let (mut mesh, _app, target) = mesh_with_orders(&place).await?;
    let load = Load::start(Plan::to(target).rate(300.0))?;
    mesh.control()?.kill()?;
    mesh.agent_daemon("web-1")?.kill()?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let without = load.so_far();
    assert_eq!(without.failures, 0, "{:?}", without.failed.first());
    assert!(without.ok > 300, "there was no load");
    mesh.restart_agent("web-1")?;
    mesh.start_control().await?;
    mesh.synced("web-1").await?;
    let report = load.stop().await;
    assert_eq!(report.failures, 0, "{:?}", report.failed.first());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_moves_to_another_replica_is_sent_nothing_that_it_has() -> Result<()> {
    let place = Loopback::unique()?;
    let app = HttpApp::start("a", "v1", SocketAddr::new(place.ip(), place.port()?))?;
    let services = format!("service: orders\nprotocol: http\nendpoints: [\"{}\"]\n", app.address());
    let mut mesh = Mesh::start(&[("services.d/orders.yaml", &services)]).await?;
    let mut replica = mesh.start_replica().await?;
    assert_eq!(
        replica.api.json("/api/v1/revision").await?["revision"],
        mesh.get("/api/v1/revision").await?["revision"]
    );
    mesh.replicas.push(replica.xds);
    mesh.agent("web-1", &["orders"], "").await?;
    let target = mesh.upstream("web-1", 0)?;
    mesh.answers(target).await?;
    // Both replicas know the node, and one of them configures it.
    let known = async |api: Api| {
        wait_for("the node to be known", BOUND, async || {
            let nodes = api.json("/api/v1/nodes").await.map_err(|failed| failed.to_string())?;
            if nodes["nodes"][0]["connected"] == true { Ok(()) } else { Err(nodes.to_string()) }
        })
        .await
    };
    known(Api(mesh.api)).await?;
    known(replica.api).await?;
    let sent = async |api: Api| api.metric("vmesh_xds_resources_sent_total").await;
    let (first, second) = (sent(Api(mesh.api)).await?, sent(replica.api).await?);
    assert!((first > 0.0) != (second > 0.0), "{first} and {second}: one of them configures it");

    let load = Load::start(Plan::to(target).rate(300.0))?;
    let left = if first > 0.0 {
        mesh.control()?.kill()?;
        replica.api
    } else {
        replica.daemon.kill()?;
        Api(mesh.api)
    };
    // The replica serves the node once it sends changes to it.
    mesh.write("mesh.d/orders.yaml", "kind: Service\nname: orders\ntimeouts: {request: 3s}\n")?;
    wait_for("the change to be sent", BOUND, async || {
        let sent = sent(left).await.map_err(|failed| failed.to_string())?;
        if sent > 0.0 { Ok(()) } else { Err("nothing yet".to_owned()) }
    })
    .await?;
    wait_for("web-1 to be in sync", BOUND, async || left.is_synced("web-1").await).await?;
    assert_eq!(sent(left).await?, 1.0, "the route changed, and nothing else was sent");
    let report = load.stop().await;
    assert_eq!(report.failures, 0, "{:?}", report.failed.first());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_envoy_is_started_again() -> Result<()> {
    let place = Loopback::unique()?;
    let (mesh, _app, target) = mesh_with_orders(&place).await?;
    // Of the agent's processes, only Envoy has the run directory on its command line.
    let run = mesh.path("run/web-1");
    let killed = naming(&run);
    assert!(!killed.is_empty(), "no process names {}", run.display());
    for envoy in &killed {
        kill_process(*envoy, Signal::KILL).expect("Envoy is killed");
    }
    wait_for("another Envoy", BOUND, async || {
        let running = naming(&run);
        let is_another = !running.is_empty() && running.iter().all(|envoy| !killed.contains(envoy));
        if is_another { Ok(()) } else { Err(format!("{running:?} after {killed:?}")) }
    })
    .await?;
    mesh.answers(target).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_control_plane_serves_what_it_served_though_its_source_is_unreadable() -> Result<()> {
    let place = Loopback::unique()?;
    let (mut mesh, app, target) = mesh_with_orders(&place).await?;
    let address = app.address().to_string();
    mesh.write("mesh.d/orders.yaml", "kind: Service\nname: orders\ntimeouts: {request: 3s}\n")?;
    wait_for("the document to be in force", BOUND, async || {
        let status = mesh.get("/api/v1/status").await.map_err(|failed| failed.to_string())?;
        if status["documents"] == 1 { Ok(()) } else { Err(status.to_string()) }
    })
    .await?;
    mesh.synced("web-1").await?;
    // The state is written a moment after a change.
    wait_for("the state to be kept", BOUND, async || {
        let kept = mesh.kept_state();
        if kept.contains(&address) && kept.contains("request: 3s") { Ok(()) } else { Err(kept) }
    })
    .await?;
    let now = mesh.get("/api/v1/revision").await?;
    let revision = now["revision"].clone();
    // The world before the document is still known.
    let before = now["past"].as_array().and_then(|past| past.last()).cloned().unwrap_or_default();
    assert_eq!(before["documents"], 0, "{now}");
    assert_ne!(before["revision"], revision, "{now}");
    mesh.control()?.kill()?;
    for dir in ["services.d", "mesh.d"] {
        // A loop of symbolic links cannot be read, not even by root.
        fs::rename(mesh.path(dir), mesh.path(&format!("{dir}.away"))).expect("renamed");
        symlink(mesh.path(dir), mesh.path(dir)).expect("linked");
    }
    mesh.start_control().await?;
    mesh.until_endpoints("orders", &[&address]).await?;
    assert_eq!(mesh.get("/api/v1/revision").await?["revision"], revision);
    mesh.synced("web-1").await?;
    mesh.answers(target).await?;
    let services = mesh.get("/api/v1/services").await?;
    assert_eq!(services["services"][0]["state"], "stale", "{services}");
    assert_eq!(mesh.metric("vmesh_xds_resources_sent_total").await?, 0.0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_without_state_and_with_an_unreadable_source_serves_nobody() -> Result<()> {
    let mesh = Mesh::prepare(&[])?;
    fs::remove_dir(mesh.path("services.d")).expect("removed");
    symlink(mesh.path("services.d"), mesh.path("services.d")).expect("linked");
    let _control: Daemon = mesh.spawn_control()?;
    let waiting = wait_for("a word on what it waits for", BOUND, async || {
        let answer = vmesh_daemon::fetch::fetch(
            &vmesh_daemon::fetch::Peer::Tcp(mesh.api),
            http::Method::GET,
            "/readyz",
            BOUND,
        )
        .await
        .map_err(|error| error.to_string())?;
        let text = String::from_utf8_lossy(&answer.1).into_owned();
        if answer.0.as_u16() == 503 && text.contains("services.d") { Ok(text) } else { Err(text) }
    })
    .await?;
    assert!(waiting.contains("file:services.d"), "{waiting}");
    Ok(())
}

/// Returns the reason that `/readyz` gives while it is not ready.
async fn waits_for(mesh: &Mesh) -> std::result::Result<String, String> {
    readiness(mesh.api()).await
}

/// Does the same as [`waits_for`] for any control plane.
async fn readiness(api: SocketAddr) -> std::result::Result<String, String> {
    let api = vmesh_daemon::fetch::Peer::Tcp(api);
    let answer = vmesh_daemon::fetch::fetch(&api, http::Method::GET, "/readyz", BOUND).await;
    let (status, body) = answer.map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&body).into_owned();
    if status.as_u16() == 503 { Ok(text) } else { Err(format!("{status}: {text}")) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_replica_is_not_ready_while_a_part_of_its_input_cannot_be_read() -> Result<()> {
    const PAY: &str = "service: pay\nprotocol: http\nendpoints: [\"10.0.0.2:80\"]\n";
    const ROUTE: &str = "kind: Route\nservice: pay\nrules: [{timeout: 1s}]\n";
    let broken = [
        ("services.d/pay.yaml", "service: pay\nendpoints: [\"10.0.0.2:80\"\n", PAY),
        ("mesh.d/pay.yaml", "kind: Route\nservice: pay\nrules: [{timeout: soon}]\n", ROUTE),
    ];
    for (file, text, mended) in broken {
        let orders = "service: orders\nendpoints: [\"10.0.0.1:80\"]\n";
        let mesh = Mesh::prepare(&[("services.d/orders.yaml", orders), ("services.d/pay.yaml", PAY)])?;
        mesh.write(file, text)?;
        let mut control = mesh.spawn_control()?;
        let waiting = wait_for("a word on what it waits for", BOUND, async || {
            let message = waits_for(&mesh).await?;
            if message.contains(file) { Ok(message) } else { Err(message) }
        });
        waiting.await?;
        mesh.write(file, mended)?;
        control.wait_http(&vmesh_daemon::fetch::Peer::Tcp(mesh.api()), "/readyz", BOUND).await?;
        // From now on the file affects only itself.
        mesh.write(file, text)?;
        wait_for("the problem to be listed", BOUND, async || {
            let problems = mesh.get("/api/v1/problems").await.map_err(|error| error.to_string())?.to_string();
            if problems.contains(file) { Ok(()) } else { Err(problems) }
        })
        .await?;
        assert!(waits_for(&mesh).await.is_err(), "it stays ready");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_new_replica_what_was_read_and_makes_no_sense_costs_itself() -> Result<()> {
    const ORDERS: (&str, &str) =
        ("services.d/orders.yaml", "service: orders\nendpoints: [\"10.0.0.1:80\"]\n");
    const UNDIALABLE: (&str, &str) = ("services.d/pay.yaml", "service: pay\nendpoints: [\"0.0.0.0:80\"]\n");
    let bad = [
        ("services.d/web.yaml", "service: web\nendpoints: [\"10.0.0.2\", \"http://10.0.0.3\"]\n"),
        ("services.d/what is this", "10.0.0.4 80\n"),
        ("services.d/named.yaml", "service: \"no name\"\nendpoints: [\"10.0.0.5:80\"]\n"),
    ];
    let mesh = Mesh::start(&[&[ORDERS, UNDIALABLE], &bad[..]].concat()).await?;
    mesh.until_endpoints("orders", &["10.0.0.1:80"]).await?;
    mesh.until_endpoints("pay", &[]).await?;
    for (file, _) in [&[UNDIALABLE], &bad[..]].concat() {
        mesh.problem(file).await?;
    }
    // A record without a usable address still counts as a record. An unknown file name never had a service.
    for lonely in [UNDIALABLE, bad[1]] {
        Mesh::start(&[lonely]).await?.problem(lonely.0).await?;
    }
    // Without any usable input, the replica serves nothing.
    for lonely in [bad[0], bad[2]] {
        let mesh = Mesh::prepare(&[lonely])?;
        let _control = mesh.spawn_control()?;
        wait_for("a word on what it waits for", BOUND, async || {
            let message = waits_for(&mesh).await?;
            if message.contains(lonely.0) && message.contains("nothing in the source is usable") {
                Ok(())
            } else {
                Err(message)
            }
        })
        .await?;
    }
    Ok(())
}

/// A replica starts without state next to one that serves, while a file is broken. The serving one dies: the
/// agent and its Envoy keep their configuration until the file is repaired.
#[tokio::test(flavor = "multi_thread")]
async fn a_fresh_replica_with_a_broken_file_takes_nothing_from_nodes_that_another_replica_served()
-> Result<()> {
    const REFUSED: &str = "vmesh_xds_streams_refused_total";
    let place = Loopback::unique()?;
    let app = HttpApp::start("a", "v1", SocketAddr::new(place.ip(), place.port()?))?;
    let services = format!("service: orders\nprotocol: http\nendpoints: [\"{}\"]\n", app.address());
    let mut mesh = Mesh::start(&[("services.d/all.yaml", &services)]).await?;
    // The agent must know the replica's address. Its state is discarded.
    let mut replica = mesh.start_replica().await?;
    replica.daemon.kill()?;
    fs::remove_dir_all(mesh.path("state/replica")).expect("removed");
    mesh.replicas.push(replica.xds);
    mesh.agent("web-1", &["orders"], "").await?;
    mesh.synced("web-1").await?;
    let target = mesh.upstream("web-1", 0)?;
    mesh.answers(target).await?;

    let load = Load::start(Plan::to(target).rate(100.0))?;
    mesh.write("services.d/all.yaml", &format!("{services}---\nservice: pay\nendpoints: [\n"))?;
    mesh.problem("is never closed").await?;
    replica.daemon = mesh.spawn_replica()?;
    let fresh = replica.api;
    wait_for("a word on what the replica waits for", BOUND, async || {
        let message = readiness(fresh.0).await?;
        if message.contains("all.yaml") { Ok(()) } else { Err(message) }
    })
    .await?;
    mesh.control()?.kill()?;
    // The agent connects to the replica and is rejected.
    let refused = fresh.metric(REFUSED).await?;
    wait_for("the agent to be refused", BOUND, async || {
        let now = fresh.metric(REFUSED).await.map_err(|failed| failed.to_string())?;
        if now > refused { Ok(()) } else { Err(format!("{now}")) }
    })
    .await?;
    Api(target).text("/").await?;
    let nodes = fresh.json("/api/v1/nodes").await?;
    assert_eq!(nodes["nodes"].as_array().map(Vec::len), Some(0), "{nodes}");
    mesh.write("services.d/all.yaml", &services)?;
    wait_for("web-1 to be in sync with the replica", BOUND, async || fresh.is_synced("web-1").await).await?;
    let report = load.stop().await;
    assert_eq!(report.failures, 0, "{:?}", report.failed.first());
    assert!(report.ok > 10, "there was no load");
    Ok(())
}

/// Waits until the agent of `node` resolves a name to this address.
async fn until_named(mesh: &Mesh, node: &str, name: &str, address: &str) -> Result<()> {
    let agent = Api(mesh.agent_api(node)?);
    wait_for(format!("{name} to be {address}"), BOUND, async || {
        let names = agent.json("/names").await.map_err(|failed| failed.to_string())?;
        if names.get(name) == Some(&serde_json::json!([address])) { Ok(()) } else { Err(names.to_string()) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dns_name_that_two_services_fold_to_has_the_same_owner_over_restarts_and_on_a_replica_without_state()
-> Result<()> {
    let file = |name: &str, last: u8| format!("service: {name}\nendpoints: [\"10.0.0.{last}:80\"]\n");
    // Capitals sort before lower-case letters, so both orders are tried.
    let first = [("services.d/orders.yaml", file("orders", 1)), ("services.d/P.yaml", file("Pay", 3))];
    let first: Vec<_> = first.iter().map(|(path, text)| (*path, text.as_str())).collect();
    let mut mesh = Mesh::start(&first).await?;
    let every = "upstreams: [\"*\"]\ncapture: {outbound: {capture: vip}, socket: no-net.sock}\n";
    mesh.agent("web-1", &[], every).await?;
    mesh.synced("web-1").await?;
    let later = [("services.d/O.yaml", file("Orders", 2)), ("services.d/p.yaml", file("pay", 4))];
    for (path, text) in &later {
        mesh.write(path, text)?;
    }
    for round in 0..2 {
        mesh.problem("`orders` has the DNS name").await?;
        mesh.problem("`pay` has the DNS name").await?;
        mesh.synced("web-1").await?;
        until_named(&mesh, "web-1", "orders.mesh", "10.0.0.1").await?;
        until_named(&mesh, "web-1", "pay.mesh", "10.0.0.4").await?;
        if round == 0 {
            mesh.control()?.kill()?;
            mesh.start_control().await?;
        }
    }
    let replica = mesh.start_replica().await?;
    let problems = replica.api.text("/api/v1/problems").await?;
    assert!(problems.contains("`orders` has the DNS name"), "{problems}");
    assert!(problems.contains("`pay` has the DNS name"), "{problems}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_an_agent_reports_in_another_case_is_a_problem_that_names_the_service() -> Result<()>
{
    let mut mesh =
        Mesh::start(&[("services.d/o.yaml", "service: orderservice\nendpoints: [\"10.0.0.1:80\"]\n")])
            .await?;
    mesh.agent("web-1", &["OrderService"], "").await?;
    mesh.problem(
        "calls `OrderService`, which no discovery source and no document knows, did you mean `orderservice`?",
    )
    .await?;
    // A document defines a service with the name but without an endpoint.
    mesh.write("mesh.d/o.yaml", "kind: Service\nname: OrderService\nprotocol: http\n")?;
    mesh.problem("no source names `OrderService`, and `orderservice` is there").await?;
    Ok(())
}
