//! Discovery with real Consul servers: registrations are seen, and failures of the servers are reported and
//! remove nothing.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use expect_test::expect;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};
use vmesh_discovery::consul::{ConsulConfig, ConsulSource};
use vmesh_discovery::source::{Counters, Registrations, Source, SourceError};
use vmesh_model::ServiceName;
use vmesh_model::load::strict;
use vmesh_testkit::consul::{Consul, MANAGEMENT_TOKEN, Options};
use vmesh_testkit::{TempDir, tempdir};

/// Long enough for elections, restarts and timeouts on a busy machine.
const BOUND: Duration = Duration::from_secs(90);

/// A source under test, and its last view or error.
struct ObservedSource {
    source: ConsulSource,
    counters: Arc<Counters>,
    last: String,
}

impl ObservedSource {
    fn new(config: &str) -> ObservedSource {
        ObservedSource::restored(config, None)
    }

    fn restored(config: &str, last_good: Option<&Registrations>) -> ObservedSource {
        let config: ConsulConfig = strict("control.yaml", config).unwrap();
        let counters = Arc::new(Counters::default());
        let source = ConsulSource::new(config, last_good, counters.clone());
        ObservedSource { source, counters, last: "nothing".to_owned() }
    }

    /// Reads views and errors of the source until `wanted` returns a value.
    async fn until<T>(
        &mut self,
        what: &str,
        mut wanted: impl FnMut(&Result<Registrations, SourceError>, &str) -> Option<T>,
    ) -> T {
        let deadline = Instant::now() + BOUND;
        loop {
            let Ok(message) = timeout_at(deadline, self.source.next()).await else {
                panic!("waited {BOUND:?} for {what}; last seen:\n{}", self.last);
            };
            self.last = match &message {
                Ok(view) => shown(view),
                Err(error) => chain(error),
            };
            if let Some(found) = wanted(&message, &self.last) {
                return found;
            }
        }
    }

    /// Waits for a view that contains `text`.
    async fn view_with(&mut self, text: &str) -> Registrations {
        self.until(text, |message, shown| message.as_ref().ok().filter(|_| shown.contains(text)).cloned())
            .await
    }

    async fn view_without(&mut self, text: &str) -> Registrations {
        self.until(&format!("no {text}"), |message, shown| {
            message.as_ref().ok().filter(|_| !shown.contains(text)).cloned()
        })
        .await
    }

    /// Waits for an error that contains `text`.
    async fn failure_with(&mut self, text: &str) -> String {
        self.until(text, |message, shown| {
            (message.is_err() && shown.contains(text)).then(|| shown.to_owned())
        })
        .await
    }
}

fn chain(error: &SourceError) -> String {
    let mut line = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    line
}

/// Formats a view with a line for each endpoint and each problem.
fn shown(view: &Registrations) -> String {
    let mut shown = String::new();
    for (name, observed) in &view.services {
        _ = write!(shown, "{name}");
        if let Some(protocol) = observed.registration.protocol {
            _ = write!(shown, " {protocol}");
        }
        if let Some(because) = &observed.because {
            _ = write!(shown, " ({}: {because})", observed.state);
        }
        shown.push('\n');
        for endpoint in observed.registration.endpoints.iter() {
            _ = write!(shown, "  {} weight {} {}", endpoint.address, endpoint.weight.get(), endpoint.health);
            for (what, value) in [("zone", &endpoint.zone), ("version", &endpoint.version)] {
                if let Some(value) = value {
                    _ = write!(shown, " {what} {value}");
                }
            }
            shown.push('\n');
        }
    }
    for problem in &view.problems {
        _ = writeln!(shown, "{problem}");
    }
    shown
}

fn endpoints(view: &Registrations, service: &str) -> usize {
    view.services.get(service).map_or(0, |observed| observed.registration.endpoints.len())
}

/// An instance with a passing check.
fn instance(service: &str, id: &str, address: &str) -> Value {
    json!({
        "ID": id, "Name": service, "Address": address, "Port": 8080,
        "Check": {"CheckID": format!("{id}:ttl"), "TTL": "1h", "Status": "passing"},
    })
}

fn names(of: &[&str]) -> BTreeSet<ServiceName> {
    of.iter().map(|name| name.parse().unwrap()).collect()
}

#[tokio::test]
async fn what_is_registered_is_seen_at_once_and_costs_nothing_else() {
    let consul = Consul::one().await.unwrap();
    for service in ["pay", "orders"] {
        consul.register(0, &instance(service, service, "10.0.0.1")).await.unwrap();
    }
    let mut watched =
        ObservedSource::new(&format!("{{address: \"{}\", name: test}}", consul.url(0).unwrap()));
    let first = watched.view_with("pay").await;
    assert_eq!(
        watched.last,
        "orders\n  10.0.0.1:8080 weight 1 healthy zone dc1\npay\n  10.0.0.1:8080 weight 1 healthy zone dc1\n"
    );

    consul.register(0, &instance("pay", "pay-2", "10.0.0.2")).await.unwrap();
    let second = watched.view_with("10.0.0.2").await;
    let pointer = |view: &Registrations| Arc::as_ptr(&view.services.get("orders").unwrap().registration);
    assert_eq!(pointer(&first), pointer(&second));

    // A service is registered, and another is deregistered.
    consul.register(0, &instance("search", "search", "10.0.0.3")).await.unwrap();
    watched.view_with("search").await;
    consul.deregister(0, "orders").await.unwrap();
    watched.view_without("orders").await;
    consul.deregister(0, "pay").await.unwrap();
    let view = watched.view_without("10.0.0.1:8080").await;
    assert_eq!(endpoints(&view, "pay"), 1);
    let last = watched.source.confirm(&names(&["pay", "orders"])).await.unwrap();
    assert_eq!(last, view);
    assert_eq!(watched.counters.failed_reads.load(Ordering::Relaxed), 0);
    assert_eq!(watched.counters.index_resets.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn each_kind_of_registration_is_read_as_it_is_meant() {
    let consul = Consul::one().await.unwrap();
    let register = async |service: Value| consul.register(0, &service).await.unwrap();
    let with = |service: &str, id: &str, address: &str, more: Value| {
        let mut base = instance(service, id, address);
        base.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        base
    };
    let check = |status: &str| json!({"Check": {"CheckID": "c", "TTL": "1h", "Status": status}});
    register(with("health", "passing", "10.0.0.1", check("passing"))).await;
    let mut warning = check("warning");
    warning["Check"]["CheckID"] = json!("w");
    warning["Weights"] = json!({"Passing": 10, "Warning": 3});
    register(with("health", "warning", "10.0.0.2", warning.clone())).await;
    warning["Check"]["CheckID"] = json!("w0");
    warning["Weights"] = json!({"Passing": 10, "Warning": 0});
    register(with("health", "warning-0", "10.0.0.3", warning)).await;
    let mut critical = check("critical");
    critical["Check"]["CheckID"] = json!("cr");
    register(with("health", "critical", "10.0.0.4", critical)).await;
    register(instance("health", "maintained", "10.0.0.5")).await;
    consul
        .put(0, "/v1/agent/service/maintenance/maintained?enable=true&reason=x", &Value::Null)
        .await
        .unwrap();

    register(with(
        "meta",
        "m",
        "10.0.1.1",
        json!({"Meta": {"version": "7", "zone": "a1", "protocol": "grpc", "weight": "20"}, "Tags": ["v1"]}),
    ))
    .await;
    register(with("Tagged", "t", "10.0.2.1", json!({"Tags": ["v3", "proto=h2c", "weight:5"]}))).await;
    register(with(
        "fabio",
        "f",
        "10.0.3.1",
        json!({"Tags": ["urlprefix-a.example/ proto=grpc weight=0.25"]}),
    ))
    .await;
    register(with("fabio", "f2", "10.0.3.2", json!({"Tags": ["urlprefix-a.example/ proto=grpc"]}))).await;
    register(with(
        "traefik",
        "tr",
        "10.0.4.1",
        json!({"Tags": ["traefik.http.services.x.loadbalancer.server.port=9090"]}),
    ))
    .await;
    register(with("portless", "p", "10.0.5.1", json!({"Port": 0}))).await;
    register(with(
        "sidecar-proxy",
        "s",
        "10.0.6.1",
        json!({"Kind": "connect-proxy", "Proxy": {"DestinationServiceName": "pay"}}),
    ))
    .await;
    register(with("no such name!", "n", "10.0.7.1", json!({}))).await;
    register(with("name/with?odd", "o", "10.0.7.2", json!({}))).await;

    // External registrations: no agent checks these instances, and one has a host name as its address.
    let external = |node: &str, address: &str, more: Value| {
        let mut base = json!({"Node": node, "Address": address, "NodeMeta": {"az": "b1"}});
        base.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        base
    };
    for body in [
        external("ext-1", "10.0.8.1", json!({"Service": {"ID": "web", "Service": "external", "Port": 80}})),
        external("ext-2", "localhost", json!({"Service": {"ID": "web", "Service": "external", "Port": 80}})),
        external(
            "ext-3",
            "10.0.8.3",
            json!({
                "Service": {"ID": "web", "Service": "external", "Port": 80},
                "Check": {"CheckID": "_node_maintenance", "Status": "critical"}
            }),
        ),
        external(
            "ext-4",
            "not an address",
            json!({"Service": {"ID": "web", "Service": "external", "Port": 80}}),
        ),
        external("ext-5", "10.0.8.5", json!({"Service": {"ID": "web", "Service": "external", "Port": 80}})),
    ] {
        consul.put(0, "/v1/catalog/register", &body).await.unwrap();
    }

    let mut watched =
        ObservedSource::new(&format!("{{address: \"{}\", name: test}}", consul.url(0).unwrap()));
    watched.view_with("traefik").await;
    let normal = watched.last.replace("[::1]", "127.0.0.1");
    let mut lines: Vec<_> = normal.lines().collect();
    lines.dedup();
    expect![[r#"
        external
          10.0.8.1:80 weight 1 unknown zone b1
          10.0.8.3:80 weight 1 draining zone b1
          10.0.8.5:80 weight 1 unknown zone b1
          127.0.0.1:80 weight 1 unknown zone b1
        fabio grpc
          10.0.3.1:8080 weight 250000 healthy zone dc1
          10.0.3.2:8080 weight 750000 healthy zone dc1
        health
          10.0.0.1:8080 weight 1 healthy zone dc1
          10.0.0.2:8080 weight 3 healthy zone dc1
          10.0.0.3:8080 weight 1 draining zone dc1
          10.0.0.4:8080 weight 1 unhealthy zone dc1
          10.0.0.5:8080 weight 1 draining zone dc1
        meta grpc
          10.0.1.1:8080 weight 20 healthy zone a1 version 7
        tagged http2
          10.0.2.1:8080 weight 5 healthy zone dc1 version v3
        traefik
          10.0.4.1:9090 weight 1 healthy zone dc1
        test: `name/with?odd` is not a service name: 1 to 253 letters, digits, `.`, `_` or `-`, the first and the last a letter or a digit; this service is left out; add it to `services.exclude` to hide this problem
        test: `no such name!` is not a service name: 1 to 253 letters, digits, `.`, `_` or `-`, the first and the last a letter or a digit; this service is left out; add it to `services.exclude` to hide this problem
        test/external: instance `web` on node `ext-4`: `not an address` is neither an IP address nor a host name; this endpoint is left out
        test/portless: instance `p` on node `dc1-1`: it is registered without a port, and `default_port` is not set; this endpoint is left out"#]].assert_eq(&lines.join("\n"));
}

#[tokio::test]
async fn what_the_configuration_chooses_is_all_there_is() {
    let consul = Consul::one().await.unwrap();
    for (service, id, address, tags) in [
        ("pay", "p1", "10.0.0.1", json!(["prod"])),
        ("pay", "p2", "10.0.0.2", json!(["test"])),
        ("pay-management", "p3", "10.0.0.3", json!(["prod"])),
        ("orders", "o1", "10.0.0.4", json!(["test"])),
    ] {
        let mut service = instance(service, id, address);
        service["Tags"] = tags;
        consul.register(0, &service).await.unwrap();
    }
    let mut watched = ObservedSource::new(&format!(
        "{{address: \"{}\", services: {{exclude: [\"*-management\"]}}, require_tags: [prod]}}",
        consul.url(0).unwrap()
    ));
    watched.view_with("pay").await;
    assert_eq!(watched.last, "pay\n  10.0.0.1:8080 weight 1 healthy zone dc1\n");
    // A service without any wanted instance is never queried.
    let reads = watched.counters.reads.load(Ordering::Relaxed);
    assert!((2..=4).contains(&reads), "{reads}");
}

fn token_file(dir: &Path, token: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.join("token");
    let new = dir.join("token.new");
    std::fs::write(&new, token).unwrap();
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::rename(&new, &path).unwrap();
    path
}

async fn with_acl() -> (Consul, TempDir) {
    let consul = Consul::start(Options { acl: true, ..Options::default() }).await.unwrap();
    for service in ["pay", "orders"] {
        consul.register(0, &instance(service, service, "10.0.0.1")).await.unwrap();
    }
    (consul, tempdir().unwrap())
}

#[tokio::test]
async fn without_the_right_to_read_there_is_no_view_and_the_policy_is_named() {
    let (consul, dir) = with_acl().await;
    let url = consul.url(0).unwrap();
    let mut watched = ObservedSource::new(&format!("{{address: \"{url}\"}}"));
    let failure = watched.failure_with("not even itself").await;
    assert!(failure.contains(r#"`service_prefix "" { policy = "read" }`"#), "{failure}");

    let path = token_file(&dir, "5a7c1e2d-0000-4000-8000-00000000dead");
    let config = format!("{{address: \"{url}\", token_file: {}}}", path.display());
    let mut watched = ObservedSource::new(&config);
    let failure = watched.failure_with("Consul refused the token").await;
    assert!(failure.contains("ACL not found") && failure.contains("node_prefix"), "{failure}");

    // The token may read services but no nodes: each service is listed without instances.
    let (_, secret) = consul.token(r#"service_prefix "" { policy = "read" }"#).await.unwrap();
    token_file(&dir, &secret);
    let mut watched = ObservedSource::new(&config);
    watched.failure_with("shows none of its instances").await;

    // The token is replaced by a sufficient one while the source runs.
    token_file(&dir, MANAGEMENT_TOKEN);
    watched.view_with("pay").await;
}

#[tokio::test]
async fn a_token_is_read_again_and_one_that_is_revoked_removes_nothing() {
    let (consul, dir) = with_acl().await;
    let rules = r#"service "pay" { policy = "read" } node_prefix "" { policy = "read" }"#;
    let (narrow, secret) = consul.token(rules).await.unwrap();
    let path = token_file(&dir, &secret);
    let url = consul.url(0).unwrap();
    let mut watched =
        ObservedSource::new(&format!("{{address: \"{url}\", token_file: {}, wait: 1s}}", path.display()));
    let view = watched.view_with("pay").await;
    assert_eq!(view.services.len(), 1);

    let rules = r#"service_prefix "" { policy = "read" } node_prefix "" { policy = "read" }"#;
    let (wide, secret) = consul.token(rules).await.unwrap();
    token_file(&dir, &secret);
    let view = watched.view_with("orders").await;
    assert_eq!(view.services.len(), 2);

    consul.revoke(&narrow).await.unwrap();
    consul.revoke(&wide).await.unwrap();
    // No view in between lists fewer services.
    watched
        .until("a refusal", |message, shown| match message {
            Ok(view) => {
                assert_eq!(view.services.len(), 2, "{shown}");
                None
            }
            Err(_) => shown.contains("ACL not found").then_some(()),
        })
        .await;
    token_file(&dir, MANAGEMENT_TOKEN);
    let view = watched.view_with("orders").await;
    assert_eq!(view.services.len(), 2);
}

#[tokio::test]
async fn over_tls_many_services_are_watched_on_one_connection() {
    let consul = Consul::start(Options { tls: true, ..Options::default() }).await.unwrap();
    for n in 0..150 {
        let service = format!("s{n:03}");
        consul.register(0, &instance(&service, &service, "10.0.0.1")).await.unwrap();
    }
    let (url, tls) = (consul.https_url(0).unwrap(), consul.tls());
    let config = |files: &str| {
        format!(
            "{{address: \"{url}\", tls: {{ca_file: {}, server_name: server.dc1.consul{files}}}}}",
            tls.ca.display()
        )
    };
    let mut watched = ObservedSource::new(&config(&format!(
        ", cert_file: {}, key_file: {}",
        tls.cert.display(),
        tls.key.display()
    )));
    let view = watched.view_with("s149").await;
    assert_eq!(view.services.len(), 150);
    assert!(view.problems.is_empty(), "{:?}", view.problems);
    consul.register(0, &instance("s077", "another", "10.0.0.2")).await.unwrap();
    watched.view_with("10.0.0.2").await;
    assert_eq!(watched.counters.connections.load(Ordering::Relaxed), 1);

    // The server requires a client certificate.
    let mut watched = ObservedSource::new(&config(""));
    let failure = watched.failure_with("cannot be reached").await;
    assert!(failure.contains("`tls.cert_file`"), "{failure}");
}

/// Starts forty services `s000` to `s039`, a service `plain` without checks, and a source with twelve
/// connections.
async fn more_services_than_connections() -> (Consul, ObservedSource) {
    let consul = Consul::start(Options { max_connections: Some(40), ..Options::default() }).await.unwrap();
    for n in 0..40 {
        let service = format!("s{n:03}");
        consul.register(0, &instance(&service, &service, "10.0.0.1")).await.unwrap();
    }
    let plain = json!({"ID": "plain", "Name": "plain", "Address": "10.0.0.1", "Port": 8080});
    consul.register(0, &plain).await.unwrap();
    let url = consul.url(0).unwrap();
    let mut watched = ObservedSource::new(&format!("{{address: \"{url}\", max_connections: 12}}"));
    let view = watched.view_with("s039").await;
    assert_eq!(view.services.len(), 41);
    assert!(view.problems.is_empty(), "{}", watched.last);
    (consul, watched)
}

#[tokio::test]
async fn more_services_than_connections_share_queries_and_each_kind_of_change_is_seen() {
    let (consul, mut watched) = more_services_than_connections().await;
    // Finding a change by comparison takes fewer reads than there are services.
    let reads = watched.counters.reads.load(Ordering::Relaxed);
    consul.put(0, "/v1/agent/check/fail/s005:ttl", &Value::Null).await.unwrap();
    watched.view_with("s005\n  10.0.0.1:8080 weight 1 unhealthy").await;
    consul.put(0, "/v1/agent/check/pass/s005:ttl", &Value::Null).await.unwrap();
    watched.view_without("unhealthy").await;
    let cost = watched.counters.reads.load(Ordering::Relaxed) - reads;
    assert!(cost < 40, "{cost} reads for two changes");

    consul.register(0, &instance("s006", "s006-2", "10.0.0.2")).await.unwrap();
    watched.view_with("10.0.0.2:8080").await;
    consul.deregister(0, "s006-2").await.unwrap();
    watched.view_without("10.0.0.2:8080").await;

    // Instances without checks are added to a service of such instances, to a service with checks, and as a
    // new service.
    for (service, address) in [("plain", "10.0.1.1"), ("s007", "10.0.1.2"), ("new", "10.0.1.3")] {
        let id = format!("{service}-unchecked");
        let body = json!({"ID": id, "Name": service, "Address": address, "Port": 8080});
        consul.register(0, &body).await.unwrap();
        watched.view_with(&format!("{address}:8080")).await;
    }
    // The port of an instance changes, and its check does not.
    let mut moved = instance("s008", "s008", "10.0.0.1");
    moved["Port"] = json!(9090);
    consul.register(0, &moved).await.unwrap();
    watched.view_with("s008\n  10.0.0.1:9090").await;
    for service in ["plain", "s007", "new"] {
        consul.deregister(0, &format!("{service}-unchecked")).await.unwrap();
    }
    watched.view_without("10.0.1.").await;
    consul.deregister(0, "s009").await.unwrap();
    let view = watched.view_without("s009").await;
    assert_eq!(view.services.len(), 40);

    let confirmed = watched.source.confirm(&names(&["s006", "plain"])).await.unwrap();
    assert_eq!(confirmed.services, view.services);
    assert!(watched.counters.connects.load(Ordering::Relaxed) <= 12);
    assert_eq!(watched.counters.failed_reads.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn many_changes_at_once_are_all_seen_on_few_connections() {
    let (consul, mut watched) = more_services_than_connections().await;
    for n in 0..40 {
        let service = format!("s{n:03}");
        consul.register(0, &instance(&service, &format!("{service}-2"), "10.0.0.2")).await.unwrap();
    }
    watched
        .until("all changes", |message, _| {
            let view = message.as_ref().unwrap();
            let all = (0..40).all(|n| endpoints(view, &format!("s{n:03}")) == 2);
            all.then_some(())
        })
        .await;
    assert!(watched.counters.connects.load(Ordering::Relaxed) <= 12);
    assert_eq!(watched.counters.failed_reads.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_leader_that_is_killed_costs_nothing_and_is_left_for_another_server() {
    let mut consul = Consul::three().await.unwrap();
    let leader = consul.leader().await.unwrap();
    let others: Vec<_> = (0..3).filter(|index| *index != leader).collect();
    consul.register(others[0], &instance("pay", "pay-1", "10.0.0.1")).await.unwrap();
    consul.register(others[0], &instance("orders", "orders-1", "10.0.0.1")).await.unwrap();
    let url = |index: usize| consul.url(index).unwrap();
    let config =
        format!("{{address: [\"{}\", \"{}\", \"{}\"]}}", url(leader), url(others[0]), url(others[1]));
    let mut watched = ObservedSource::new(&config);
    let view = watched.view_with("pay").await;
    assert_eq!(view.services.len(), 2);

    consul.kill(leader).unwrap();
    consul.wait_serving(others[0]).await.unwrap();
    consul.register(others[0], &instance("pay", "pay-2", "10.0.0.2")).await.unwrap();
    watched
        .until("the new instance", |message, shown| match message {
            Ok(view) => {
                assert_eq!(view.services.len(), 2, "{shown}");
                assert!(endpoints(view, "pay") >= 1, "{shown}");
                (endpoints(view, "pay") == 2).then_some(())
            }
            Err(_) => None,
        })
        .await;
}

#[tokio::test]
async fn a_frozen_server_is_a_failure_and_its_thaw_is_news() {
    let mut consul = Consul::one().await.unwrap();
    consul.register(0, &instance("pay", "pay-1", "10.0.0.1")).await.unwrap();
    let mut watched = ObservedSource::new(&format!("{{address: \"{}\", wait: 1s}}", consul.url(0).unwrap()));
    let before = watched.view_with("pay").await;
    consul.freeze(0).unwrap();
    let failure = watched.failure_with("no answer within").await;
    assert!(failure.starts_with("discovery source `consul:127."), "{failure}");
    consul.thaw(0).unwrap();
    let after = watched.view_without("stale").await;
    assert_eq!(before.services, after.services);
}

#[tokio::test]
async fn three_frozen_servers_are_a_failure_and_their_thaw_is_news() {
    let mut consul = Consul::three().await.unwrap();
    consul.register(0, &instance("pay", "pay-1", "10.0.0.1")).await.unwrap();
    let url = |index: usize| consul.url(index).unwrap();
    let config = format!("{{address: [\"{}\", \"{}\", \"{}\"], wait: 1s}}", url(0), url(1), url(2));
    let mut watched = ObservedSource::new(&config);
    let before = watched.view_with("pay").await;
    for index in 0..3 {
        consul.freeze(index).unwrap();
    }
    watched.failure_with("no answer within").await;
    for index in 0..3 {
        consul.thaw(index).unwrap();
    }
    let after = watched.view_without("stale").await;
    assert_eq!(before.services, after.services);
}

#[tokio::test]
async fn without_a_quorum_nothing_is_removed_and_the_words_say_so() {
    let mut consul = Consul::three().await.unwrap();
    consul.register(0, &instance("pay", "pay-1", "10.0.0.1")).await.unwrap();
    let mut watched = ObservedSource::new(&format!("{{address: \"{}\", wait: 1s}}", consul.url(0).unwrap()));
    watched.view_with("pay").await;
    consul.kill(1).unwrap();
    consul.kill(2).unwrap();
    let failure = watched.failure_with("no leader").await;
    assert!(failure.contains("raft list-peers"), "{failure}");
    for index in [1, 2] {
        consul.launch_again(index).unwrap();
    }
    let view = watched.view_without("stale").await;
    assert_eq!(endpoints(&view, "pay"), 1);
}

#[tokio::test]
async fn a_server_that_comes_back_empty_is_believed_by_its_leader_and_counted() {
    let mut consul = Consul::one().await.unwrap();
    for n in 0..30 {
        consul
            .register(0, &instance("pay", &format!("pay-{n}"), &format!("10.0.0.{}", n + 1)))
            .await
            .unwrap();
    }
    let mut watched = ObservedSource::new(&format!("{{address: \"{}\"}}", consul.url(0).unwrap()));
    watched.view_with("10.0.0.30").await;
    consul.restart_empty().await.unwrap();
    watched.view_without("pay").await;
    assert!(watched.counters.index_resets.load(Ordering::Relaxed) >= 1);
    let confirmed = watched.source.confirm(&names(&["pay"])).await.unwrap();
    assert!(confirmed.services.is_empty());
    // New registrations are seen: the source does not wait for the old index.
    consul.register(0, &instance("pay", "pay-1", "10.0.0.1")).await.unwrap();
    watched.view_with("10.0.0.1").await;
}

#[tokio::test]
async fn maintenance_is_a_drain_and_its_end_is_the_end_of_it() {
    let consul = Consul::one().await.unwrap();
    consul.register(0, &instance("pay", "pay-1", "10.0.0.1")).await.unwrap();
    let mut watched = ObservedSource::new(&format!("{{address: \"{}\"}}", consul.url(0).unwrap()));
    watched.view_with("healthy").await;
    for (path, expected) in [
        ("/v1/agent/service/maintenance/pay-1?enable=true", "draining"),
        ("/v1/agent/service/maintenance/pay-1?enable=false", " healthy"),
        ("/v1/agent/maintenance?enable=true", "draining"),
        ("/v1/agent/maintenance?enable=false", " healthy"),
        ("/v1/agent/check/fail/pay-1:ttl", "unhealthy"),
        ("/v1/agent/check/warn/pay-1:ttl", " healthy"),
    ] {
        consul.put(0, path, &Value::Null).await.unwrap();
        watched.view_with(expected).await;
    }
}

#[tokio::test]
async fn a_consul_that_is_gone_at_the_start_is_a_failure_and_no_empty_view() {
    let consul = Consul::one().await.unwrap();
    consul.register(0, &instance("pay", "pay-1", "10.0.0.1")).await.unwrap();
    let config = format!("{{address: \"{}\", wait: 1s}}", consul.url(0).unwrap());
    let before = ObservedSource::new(&config).view_with("pay").await;
    drop(consul);
    let mut watched = ObservedSource::restored(&config, Some(&before));
    watched.failure_with("cannot be reached").await;
}

#[tokio::test]
async fn two_datacenters_are_one_service_in_two_places() {
    let one = Consul::one().await.unwrap();
    let mut two = Consul::start(Options { datacenter: "dc2", ..Options::default() }).await.unwrap();
    one.join_wan(&two).await.unwrap();
    one.register(0, &instance("pay", "pay-1", "10.0.0.1")).await.unwrap();
    two.register(0, &instance("pay", "pay-1", "10.0.0.2")).await.unwrap();
    two.register(0, &instance("orders", "orders-1", "10.0.0.3")).await.unwrap();
    let url = one.url(0).unwrap();
    let config = format!("{{address: \"{url}\", datacenters: [dc1, dc2], wait: 1s}}");
    let mut watched = ObservedSource::new(&config);
    watched.view_with("orders").await;
    expect![[r#"
        orders
          10.0.0.3:8080 weight 1 healthy zone dc2
        pay
          10.0.0.1:8080 weight 1 healthy zone dc1
          10.0.0.2:8080 weight 1 healthy zone dc2
    "#]]
    .assert_eq(&watched.last);

    // One datacenter fails: its last good state stays and is marked stale; the other continues.
    two.kill(0).unwrap();
    let before = watched.view_with("stale").await;
    assert_eq!((endpoints(&before, "pay"), endpoints(&before, "orders")), (2, 1));
    one.register(0, &instance("pay", "pay-9", "10.0.0.9")).await.unwrap();
    let view = watched.view_with("10.0.0.9").await;
    assert_eq!((endpoints(&view, "pay"), endpoints(&view, "orders")), (3, 1));

    // The same holds across a restart of the source.
    let mut watched = ObservedSource::restored(&config, Some(&view));
    let again = watched.view_with("pay").await;
    let addresses = |view: &Registrations| -> BTreeMap<String, Vec<String>> {
        let of = |observed: &vmesh_discovery::ServiceView| {
            observed.registration.endpoints.iter().map(|e| e.address.to_string()).collect()
        };
        view.services.iter().map(|(name, observed)| (name.to_string(), of(observed))).collect()
    };
    assert_eq!(addresses(&again), addresses(&view), "{}", watched.last);
}
