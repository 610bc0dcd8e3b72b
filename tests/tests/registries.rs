//! Failures of a registry, with real registries, real Envoys and constant traffic. No request fails that a
//! live instance could have answered, and the operator can read which removals are held and why.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmesh_testkit::api::field;
use vmesh_testkit::app::HttpApp;
use vmesh_testkit::consul::{self, Consul};
use vmesh_testkit::load::{Load, Plan};
use vmesh_testkit::place::Loopback;
use vmesh_testkit::registry::{Instance, Registry};
use vmesh_testkit::{Failed, Result, wait_for};
use vmesh_tests::Mesh;

const SECOND: Duration = Duration::from_secs(1);
/// The time limit of an election, the end of a session or the start of a JVM, on a busy machine.
const LONG: Duration = Duration::from_secs(120);

/// A mesh on a registry with instances of `orders`, and one host that calls them.
struct RegistrySetup {
    registry: Registry,
    mesh: Mesh,
    apps: Vec<(HttpApp, Instance)>,
    load: Load,
    _places: Vec<Loopback>,
}

impl RegistrySetup {
    async fn start(mut registry: Registry, more: &str) -> Result<RegistrySetup> {
        let (mut apps, mut places) = (Vec::new(), Vec::new());
        for number in 1..=6 {
            let (app, instance, place) = instance(number)?;
            registry.add(&instance).await?;
            apps.push((app, instance));
            places.push(place);
        }
        let mut mesh = Mesh::prepare_on(&format!("  {}", registry.source(more)?), "", &[])?;
        mesh.start_control().await?;
        mesh.agent("web-1", &["orders"], "").await?;
        mesh.synced("web-1").await?;
        let target = mesh.upstream("web-1", 0)?;
        mesh.answers(target).await?;
        let load = Load::start(Plan::to(target).rate(200.0))?;
        Ok(RegistrySetup { registry, mesh, apps, load, _places: places })
    }

    /// Checks that no request has failed so far; `after` names the last fault.
    fn none_failed(&self, after: &str) {
        let report = self.load.so_far();
        assert_eq!(report.failures, 0, "{after}: {:?}", report.failed.first());
    }

    /// Waits until the source is in `state`, and returns the reason.
    async fn until_source(&self, state: &str) -> Result<String> {
        wait_for(format!("the source to be {state}"), LONG, async || {
            let status = self.mesh.get("/api/v1/status").await.map_err(|failed| failed.to_string())?;
            let source = status.pointer("/sources/0").cloned().unwrap_or_default();
            if field(&source, "state") == state {
                Ok(field(&source, "because"))
            } else {
                Err(source.to_string())
            }
        })
        .await
    }

    /// Waits until `vmeshctl discovery` prints all of `parts`.
    async fn reported(&self, parts: &[&str]) -> Result<String> {
        wait_for(format!("`vmeshctl discovery` to say {parts:?}"), LONG, async || {
            let output = self.mesh.ctl(&["discovery"]).map_err(|failed| failed.to_string())?;
            let message = String::from_utf8_lossy(&output.stdout).into_owned();
            if parts.iter().all(|part| message.contains(part)) { Ok(message) } else { Err(message) }
        })
        .await
    }

    /// Returns the addresses of all instances, as the API lists endpoints.
    fn all(&self) -> Vec<String> {
        let mut all: Vec<SocketAddr> = self.apps.iter().map(|(app, _)| app.address()).collect();
        all.sort();
        all.iter().map(ToString::to_string).collect()
    }

    /// Waits until the service has exactly these endpoints, in any health.
    async fn until(&self, expected: &[String]) -> Result<()> {
        wait_for(format!("orders to be {expected:?}"), LONG, async || {
            let now = self.mesh.endpoints("orders").await.map_err(|failed| failed.to_string())?;
            let addresses: Vec<_> =
                now.iter().filter_map(|shown| shown.split_whitespace().next().map(str::to_owned)).collect();
            if addresses == expected { Ok(()) } else { Err(format!("{now:?}")) }
        })
        .await
    }

    /// Waits until the source is fresh and lists `all`, and checks that no request has failed.
    async fn recovered(&self, all: &[String], after: &str) -> Result<()> {
        self.until_source("fresh").await?;
        self.until(all).await?;
        self.none_failed(after);
        Ok(())
    }

    async fn register_all(&mut self) -> Result<()> {
        for (_, instance) in &self.apps {
            self.registry.add(instance).await?;
        }
        Ok(())
    }
}

fn instance(number: usize) -> Result<(HttpApp, Instance, Loopback)> {
    let place = Loopback::unique()?;
    let id = format!("orders-{number}");
    let app = HttpApp::start(&id, "v1", SocketAddr::new(place.ip(), 8080))?;
    let instance = Instance::new("orders", &id, app.address());
    Ok((app, instance, place))
}

/// The faults that both kinds of registries have in common.
async fn a_bad_day(bench: &mut RegistrySetup) -> Result<()> {
    let all = bench.all();
    bench.until(&all).await?;
    bench.until_source("fresh").await?;

    // The leader dies, the others elect a new one, and later registrations are seen.
    let leader = bench.registry.leader().await?;
    bench.registry.kill(leader)?;
    let (app, new, place) = instance(7)?;
    wait_for("a new instance to be registered", LONG, async || {
        bench.registry.add(&new).await.map_err(|failed| failed.to_string())
    })
    .await?;
    bench.apps.push((app, new));
    bench._places.push(place);
    let all = bench.all();
    bench.until(&all).await?;
    bench.registry.restart(leader).await?;
    bench.none_failed("the leader was killed");

    // All servers are down for a minute: the last view stays valid, and the operator sees since when.
    bench.registry.kill_all()?;
    let since = Instant::now();
    let because = bench.until_source("stale").await?;
    assert!(!because.is_empty());
    bench.reported(&["registry is STALE", "last good view stays in force"]).await?;
    tokio::time::sleep((60 * SECOND).saturating_sub(since.elapsed())).await;
    bench.until(&all).await?;
    bench.registry.restart_all().await?;
    bench.recovered(&all, "all servers were killed for a minute").await?;

    // All servers keep their connections and stop answering.
    bench.registry.freeze_all()?;
    bench.until_source("stale").await?;
    bench.until(&all).await?;
    bench.registry.thaw_all()?;
    bench.recovered(&all, "all servers were frozen").await?;

    // Most instances are deregistered by accident while they are alive: their removal is held until they
    // return.
    let gone: Vec<Instance> = bench.apps.iter().take(5).map(|(_, instance)| instance.clone()).collect();
    for instance in &gone {
        bench.registry.remove(instance).await?;
    }
    bench.reported(&["orders of registry has been HELD", "discovery accept registry"]).await?;
    bench.until(&all).await?;
    for instance in &gone {
        bench.registry.add(instance).await?;
    }
    bench.recovered(&all, "five of seven instances were deregistered").await?;

    // A real removal takes effect after the hold of 10 s, and not earlier.
    let removed = Instant::now();
    let (app, instance) = bench.apps.pop().ok_or_else(|| Failed::new("no instance is left"))?;
    bench.registry.remove(&instance).await?;
    let all = bench.all();
    bench.until(&all).await?;
    let took = removed.elapsed();
    assert!(took > 8 * SECOND && took < 20 * SECOND, "it took {took:?}");
    bench.mesh.synced("web-1").await?;
    tokio::time::sleep(2 * SECOND).await;
    drop(app);
    tokio::time::sleep(2 * SECOND).await;
    bench.none_failed("an instance was removed");

    // The registry returns without data: all removals are held, and instances that register again are fresh.
    bench.registry.restart_empty().await?;
    let message = bench.reported(&["orders of registry has been HELD", "discovery accept registry"]).await?;
    bench.until(&all).await?;
    bench.none_failed("the registry came back empty");
    bench.register_all().await?;
    bench.recovered(&all, "the registry was filled again").await?;
    assert!(message.contains("no longer lists this service, which had 6 endpoints"), "{message}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_day_of_consul_fails_no_request() -> Result<()> {
    let mut bench = RegistrySetup::start(Registry::consul(3).await?, "").await?;
    a_bad_day(&mut bench).await?;

    // An invalid registration affects only itself.
    let all = bench.all();
    let Registry::Consul(consul) = &bench.registry else { return Err(Failed::new("it is Consul")) };
    let garbage = json!({"Node": "garbage", "Address": "not an address!", "Service": {"ID": "x", "Service": "orders", "Port": 70000}});
    let refused = consul.put(0, "/v1/catalog/register", &garbage).await;
    let strange = json!({"Node": "strange", "Address": "no such host.", "Service": {"ID": "x", "Service": "orders", "Port": 0}});
    consul.put(0, "/v1/catalog/register", &strange).await?;
    let problem = bench.mesh.problem("orders").await?;
    assert!(problem.contains("left out"), "{problem} ({refused:?})");
    bench.until(&all).await?;
    bench.none_failed("a record made no sense");
    let report = bench.load.stop().await;
    assert!(report.ok > 1000, "there was no load");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_day_of_zookeeper_fails_no_request() -> Result<()> {
    let mut bench = RegistrySetup::start(Registry::zookeeper(3).await?, "session_timeout: 4s").await?;
    a_bad_day(&mut bench).await?;

    // The servers are frozen for longer than a session lasts: the session expires, and a new one reads
    // everything again.
    let all = bench.all();
    let expired = async |bench: &RegistrySetup| -> Result<f64> {
        let discovery = bench.mesh.get("/api/v1/discovery").await?;
        Ok(discovery
            .pointer("/sources/0/counters/sessions_expired")
            .and_then(Value::as_f64)
            .unwrap_or_default())
    };
    let before = expired(&bench).await?;
    bench.registry.freeze_all()?;
    tokio::time::sleep(15 * SECOND).await;
    bench.registry.thaw_all()?;
    wait_for("the session to expire", LONG, async || {
        let now = expired(&bench).await.map_err(|failed| failed.to_string())?;
        if now > before { Ok(()) } else { Err(format!("{now} expired so far")) }
    })
    .await?;
    bench.recovered(&all, "the session expired").await?;

    // Nodes without a valid record affect only themselves.
    bench.registry.make("/services/orders/garbage", b"\xff\xfe\x00garbage").await?;
    let problem = bench.mesh.problem("garbage").await?;
    assert!(problem.contains("left out"), "{problem}");
    bench.until(&all).await?;
    // A directory with more than 1 MiB of names is a service like any other.
    for number in 0..9_000 {
        let id = format!("{number:05}-{}", "x".repeat(110));
        let data = json!({"host": format!("10.{}.{}.1", number / 250, number % 250), "port": 80}).to_string();
        bench.registry.make(&format!("/services/large/{id}"), data.as_bytes()).await?;
    }
    wait_for("9,000 endpoints of one service", LONG, async || {
        let now = bench.mesh.endpoints("large").await.map_err(|failed| failed.to_string())?.len();
        if now == 9_000 { Ok(()) } else { Err(format!("{now} are there")) }
    })
    .await?;
    bench.until(&all).await?;
    bench.none_failed("a service had more than 1 MiB of names");
    let report = bench.load.stop().await;
    assert!(report.ok > 1000, "there was no load");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consul_token_that_is_revoked_takes_nothing_away() -> Result<()> {
    let server = Consul::start(consul::Options { acl: true, ..consul::Options::default() }).await?;
    let rules = "service_prefix \"\" { policy = \"read\" } node_prefix \"\" { policy = \"read\" }";
    let (accessor, secret) = server.token(rules).await?;
    let token_file = vmesh_testkit::tempdir()?;
    let token = token_file.join("token");
    std::fs::write(&token, &secret).map_err(Failed::to("could not write the token"))?;
    let more = format!("token_file: {:?}", token.display().to_string());
    let mut bench = RegistrySetup::start(Registry::Consul(server), &more).await?;
    let all = bench.all();
    bench.until(&all).await?;
    let Registry::Consul(server) = &bench.registry else { return Err(Failed::new("it is Consul")) };
    server.revoke(&accessor).await?;
    let because = bench.until_source("stale").await?;
    assert!(because.contains("token"), "{because}");
    bench.reported(&["registry is STALE", "token", "last good view stays in force"]).await?;
    bench.until(&all).await?;
    bench.none_failed("the token was revoked");

    // A token without permissions gets an empty list, which is held as well.
    let (_, nothing) = server.token("key_prefix \"x\" { policy = \"read\" }").await?;
    std::fs::write(&token, nothing).map_err(Failed::to("could not write the token"))?;
    tokio::time::sleep(5 * SECOND).await;
    bench.until_source("stale").await?;
    bench.until(&all).await?;
    bench.none_failed("the token may see nothing");

    // A new token in the file is used without a restart.
    let (_, secret) = server.token(rules).await?;
    std::fs::write(&token, secret).map_err(Failed::to("could not write the token"))?;
    bench.until_source("fresh").await?;
    let (app, new, place) = instance(7)?;
    bench.registry.add(&new).await?;
    bench.apps.push((app, new));
    bench._places.push(place);
    bench.until(&bench.all()).await?;
    bench.none_failed("the token was replaced");
    Ok(())
}

/// The services move from ZooKeeper to Consul, one instance after the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_migration_from_zookeeper_to_consul_under_load_fails_no_request() -> Result<()> {
    let mut old = Registry::zookeeper(1).await?;
    let mut new = Registry::consul(1).await?;
    let (mut apps, mut places) = (Vec::new(), Vec::new());
    for number in 1..=4 {
        let (app, instance, place) = instance(number)?;
        old.add(&instance).await?;
        apps.push((app, instance));
        places.push(place);
    }
    let sources = format!(
        "  {}\n  {}",
        old.source("")?.replace("name: registry", "name: old"),
        new.source("guard: {removal_hold: 2s}")?.replace("name: registry", "name: new")
    );
    // Consul has no service yet, which must not keep the mesh from starting.
    let documents =
        "kind: Service\nname: orders\nprotocol: http\nload_balancing: {fallback: [{source: old}]}\n";
    let mut mesh =
        Mesh::prepare_on(&sources, "documents: {dir: mesh.d}", &[("mesh.d/orders.yaml", documents)])?;
    mesh.start_control().await?;
    mesh.agent("web-1", &["orders"], "").await?;
    mesh.synced("web-1").await?;
    let target = mesh.upstream("web-1", 0)?;
    mesh.answers(target).await?;
    let load = Load::start(Plan::to(target).rate(300.0))?;
    let sources_of = async |mesh: &Mesh| -> Result<Vec<String>> {
        let services = mesh.get("/api/v1/services").await?;
        let endpoints = services.pointer("/services/0/endpoints").and_then(Value::as_array).cloned();
        let mut all: Vec<_> = endpoints.unwrap_or_default().iter().map(|e| field(e, "source")).collect();
        all.sort();
        Ok(all)
    };
    for (_, instance) in &apps {
        new.add(instance).await?;
        tokio::time::sleep(SECOND).await;
    }
    for (_, instance) in &apps {
        old.remove(instance).await?;
        tokio::time::sleep(SECOND).await;
    }
    wait_for("every endpoint to come from Consul", LONG, async || {
        let now = sources_of(&mesh).await.map_err(|failed| failed.to_string())?;
        if now == ["new"; 4] { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await?;
    let report = load.stop().await;
    assert_eq!(report.failures, 0, "{:?}", report.failed.first());
    assert!(report.ok > 1000, "there was no load");
    assert_eq!(report.by_instance.len(), 4, "{:?}", report.by_instance);
    Ok(())
}

/// The fallback source is used while the first source has no instance, and no longer once it has one.
#[tokio::test(flavor = "multi_thread")]
async fn a_fallback_registry_takes_over_when_the_first_has_no_instance() -> Result<()> {
    let (mut first, mut second) = (Registry::consul(1).await?, Registry::zookeeper(1).await?);
    let (a, of_first, _a) = instance(1)?;
    let (_b, of_second, _b_place) = instance(2)?;
    first.add(&of_first).await?;
    second.add(&of_second).await?;
    let guard = "guard: {removal_hold: 1s, confirm_empty: 2s, confirm_unhealthy: 1s}";
    let sources = format!(
        "  {}\n  {}",
        first.source(guard)?.replace("name: registry", "name: first"),
        second.source(guard)?.replace("name: registry", "name: second")
    );
    let documents =
        "kind: Service\nname: orders\nprotocol: http\nload_balancing: {fallback: [{source: second}]}\n";
    let mut mesh =
        Mesh::prepare_on(&sources, "documents: {dir: mesh.d}", &[("mesh.d/orders.yaml", documents)])?;
    mesh.start_control().await?;
    mesh.agent("web-1", &["orders"], "").await?;
    mesh.synced("web-1").await?;
    let target = mesh.upstream("web-1", 0)?;
    mesh.answers(target).await?;
    let load = Load::start(Plan::to(target).rate(200.0))?;
    let reached = |id: &str| load.so_far().by_instance.get(id).copied().unwrap_or_default();
    wait_for(
        "traffic to orders-1",
        LONG,
        async || if reached("orders-1") > 50 { Ok(()) } else { Err("none") },
    )
    .await?;
    assert_eq!(reached("orders-2"), 0, "the fallback was used");
    let explained = mesh.ctl(&["explain", "orders", "--from", "web-1"])?;
    let explained = String::from_utf8_lossy(&explained.stdout).into_owned();
    let ranks = [(of_first.address, 0), (of_second.address, 1)].map(|(address, priority)| {
        let line = explained.lines().find(|line| line.contains(&address.to_string()));
        line.is_some_and(|line| line.ends_with(&format!(" {priority}")))
    });
    assert!(explained.contains("PRIORITY") && ranks == [true; 2], "{explained}");
    first.remove(&of_first).await?;
    wait_for(
        "traffic to orders-2",
        LONG,
        async || if reached("orders-2") > 50 { Ok(()) } else { Err("none") },
    )
    .await?;
    drop(a);
    let (_a, of_first, _a_place) = instance(1)?;
    first.add(&of_first).await?;
    let before = reached("orders-1");
    wait_for("traffic to orders-1 again", LONG, async || {
        if reached("orders-1") > before + 50 { Ok(()) } else { Err("none") }
    })
    .await?;
    let report = load.stop().await;
    assert_eq!(report.failures, 0, "{:?}", report.failed.first());
    Ok(())
}
