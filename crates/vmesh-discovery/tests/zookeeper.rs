//! Discovery with real ZooKeeper servers: registrations are seen, and failures of the servers are reported
//! and remove nothing.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use expect_test::expect;
use tokio::time::{Instant, timeout, timeout_at};
use vmesh_discovery::source::{Counters, Registrations, Source, SourceError};
use vmesh_discovery::zookeeper::{ZookeeperConfig, ZookeeperSource};
use vmesh_model::load::strict;
use vmesh_testkit::tempdir;
use vmesh_testkit::zookeeper::{Client, Kind, Options, Version, ZooKeeper};

/// Long enough for elections, restarts and timeouts on a busy machine.
const BOUND: Duration = Duration::from_secs(90);

/// A source under test, and its last view or error.
struct ObservedSource {
    source: ZookeeperSource,
    counters: Arc<Counters>,
    last: String,
}

impl ObservedSource {
    fn new(config: &str) -> ObservedSource {
        ObservedSource::restored(config, None)
    }

    fn restored(config: &str, last_good: Option<&Registrations>) -> ObservedSource {
        let config: ZookeeperConfig = strict("control.yaml", config).unwrap();
        let counters = Arc::new(Counters::default());
        let source = ZookeeperSource::new(config, last_good, counters.clone());
        ObservedSource { source, counters, last: "nothing".to_owned() }
    }

    /// Reads views and errors of the source until `wanted` returns `true`.
    async fn until(
        &mut self,
        what: &str,
        mut wanted: impl FnMut(&Result<Registrations, SourceError>, &str) -> bool,
    ) -> Result<Registrations, SourceError> {
        let deadline = Instant::now() + BOUND;
        loop {
            let Ok(message) = timeout_at(deadline, self.source.next()).await else {
                panic!("waited {BOUND:?} for {what}; last seen:\n{}", self.last);
            };
            self.last = match &message {
                Ok(view) => shown(view),
                Err(error) => chain(error),
            };
            if wanted(&message, &self.last) {
                return message;
            }
        }
    }

    /// Waits for a view that is formatted exactly as `expected`.
    async fn view(&mut self, expected: &str) -> Registrations {
        self.until(expected, |message, shown| message.is_ok() && shown == expected).await.unwrap()
    }

    async fn failure_with(&mut self, text: &str) {
        _ = self.until(text, |message, shown| message.is_err() && shown.contains(text)).await;
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

/// Formats a view with a line for each service and each problem.
fn shown(view: &Registrations) -> String {
    let mut shown = String::new();
    for (name, observed) in &view.services {
        _ = write!(shown, "{name}");
        if let Some(protocol) = observed.registration.protocol {
            _ = write!(shown, " {protocol}");
        }
        for endpoint in observed.registration.endpoints.iter() {
            _ = write!(shown, " {} {}", endpoint.address, endpoint.health);
            if endpoint.weight.get() != 1 {
                _ = write!(shown, " x{}", endpoint.weight.get());
            }
        }
        if let Some(because) = &observed.because {
            _ = write!(shown, " ({}: {because})", observed.state);
        }
        shown.push('\n');
    }
    for problem in &view.problems {
        _ = writeln!(shown, "{problem}");
    }
    shown
}

const NERVE: &str = "roots: [{path: /smartstack, format: nerve}]";

/// Registers an instance as nerve does.
async fn register(client: &mut Client, service: &str, host: &str) -> String {
    let data = format!(r#"{{"host":"{host}","port":80,"name":"{host}"}}"#);
    client
        .make(&format!("/smartstack/{service}/{host}_"), data.as_bytes(), Kind::EphemeralSequential)
        .await
        .unwrap()
}

fn config(connect: &str, more: &str) -> String {
    format!("name: zk\nconnect: \"{connect}\"\nsession_timeout: 4s\n{more}\n")
}

#[tokio::test]
async fn every_format_is_read_as_its_writers_leave_it() {
    let expected = expect![[r#"
        cache.prod 10.1.0.9:9000 healthy
        db 10.1.0.7:5432 healthy
        pay http 10.1.0.4:8080 healthy
        pay-svc dubbo 10.1.0.17:20880 healthy x200
        pay.main 10.1.0.3:31002 healthy x7
        role.prod.job http 10.1.0.1:31003 healthy x2 10.1.0.2:31003 draining
        shop grpc 10.1.0.6:50051 healthy
        team.a.orders 10.1.0.5:8080 draining
    "#]];
    for version in [Version::V3_8, Version::V3_4] {
        let servers = ZooKeeper::start(Options { version, ..Options::default() }).await.unwrap();
        let mut client = servers.client(0).await.unwrap();
        let url = "dubbo%3A%2F%2F10.1.0.17%3A20880%2Fcom.acme.Pay%3Fapplication%3Dpay-svc%26interface%3Dcom.acme.Pay%26weight%3D200";
        let nodes: &[(&str, &str, Kind)] = &[
            (
                "/discovery/role/prod/job/member_",
                r#"{"serviceEndpoint":{"host":"10.1.0.1","port":31002},"additionalEndpoints":{"http":{"host":"10.1.0.1","port":31003}},"status":"ALIVE","shard":0}"#,
                Kind::EphemeralSequential,
            ),
            (
                "/discovery/role/prod/job/member_",
                r#"{"serviceEndpoint":{"host":"10.1.0.2","port":31002},"additionalEndpoints":{"http":{"host":"10.1.0.2","port":31003}},"status":"STOPPING","shard":1}"#,
                Kind::EphemeralSequential,
            ),
            (
                "/discovery/role/prod/job/vector_",
                r#"{"vector":[{"select":"shard=0","weight":2.0}]}"#,
                Kind::PersistentSequential,
            ),
            (
                "/smartstack/global/pay.main/vm-17_",
                r#"{"host":"10.1.0.3","port":"31002","name":"vm-17","weight":7}"#,
                Kind::EphemeralSequential,
            ),
            ("/smartstack/global/pay.main", r#"{"haproxy":{"listen":["mode http"]}}"#, Kind::Persistent),
            (
                "/services/pay/0f3c",
                r#"{"name":"pay","id":"0f3c","address":"10.1.0.4","port":8080,"payload":{"@class":"org.springframework.cloud.zookeeper.discovery.ZookeeperInstance","metadata":{"instance_status":"UP"}},"serviceType":"DYNAMIC","uriSpec":{"parts":[{"value":"scheme","variable":true}]}}"#,
                Kind::Ephemeral,
            ),
            (
                "/services/team/a/orders/1",
                r#"{"address":"10.1.0.5","port":8080,"payload":{"metadata":{"instance_status":"OUT_OF_SERVICE"}},"serviceType":"DYNAMIC"}"#,
                Kind::Ephemeral,
            ),
            (
                "/services/shop/10.1.0.6:20880",
                r#"{"address":"10.1.0.6","port":20880,"payload":{"metadata":{"dubbo.endpoints":"[{\"port\":50051,\"protocol\":\"tri\"}]","dubbo.metadata.revision":"a1"}},"serviceType":"DYNAMIC"}"#,
                Kind::Ephemeral,
            ),
            (&format!("/dubbo/com.acme.Pay/providers/{url}"), "10.1.0.17", Kind::Ephemeral),
            ("/dubbo/com.acme.Pay/consumers/consumer%3A%2F%2F10.1.0.99", "", Kind::Ephemeral),
            ("/leader/db/candidate_", "10.1.0.7:5432", Kind::EphemeralSequential),
            ("/leader/db/candidate_", "10.1.0.8:5432", Kind::EphemeralSequential),
            ("/kingpin/cache/prod/8a7f-10.1.0.9:9000", "", Kind::Ephemeral),
        ];
        for (path, data, kind) in nodes {
            client.make(path, data.as_bytes(), *kind).await.unwrap();
        }
        let roots = "roots: [{path: /discovery, endpoint: http}, {path: /smartstack/global}, {path: /services}, \
                     {path: /dubbo}, {path: /leader}, {path: /kingpin}]";
        let mut watched = ObservedSource::new(&config(&servers.connect(), roots));
        let view = watched.until("a view", |message, _| message.is_ok()).await.unwrap();
        expected.assert_eq(&shown(&view));
        // The leader's node is deleted, and the next candidate leads.
        client.delete("/leader/db/candidate_0000000000").await.unwrap();
        let has = |shown: &str| shown.contains("db 10.1.0.8:5432");
        watched.until("the next leader", |message, shown| message.is_ok() && has(shown)).await.unwrap();
    }
}

#[tokio::test]
async fn one_service_changes_and_the_others_keep_their_pointer() {
    let servers = ZooKeeper::one().await.unwrap();
    let mut client = servers.client(0).await.unwrap();
    register(&mut client, "pay", "10.1.0.1").await;
    let order = register(&mut client, "orders", "10.1.0.2").await;
    let mut watched = ObservedSource::new(&config(&servers.connect(), NERVE));
    let first = watched.view("orders 10.1.0.2:80 healthy\npay 10.1.0.1:80 healthy\n").await;
    client.delete(&order).await.unwrap();
    register(&mut client, "orders", "10.1.0.3").await;
    let second = watched.view("orders 10.1.0.3:80 healthy\npay 10.1.0.1:80 healthy\n").await;
    let registration =
        |view: &Registrations, name: &str| view.services.get(name).unwrap().registration.clone();
    assert!(Arc::ptr_eq(&registration(&first, "pay"), &registration(&second, "pay")));
    assert_eq!(watched.counters.connections.load(Ordering::Relaxed), 1);
    assert_eq!(watched.counters.connects.load(Ordering::Relaxed), 1);
    assert!(watched.counters.reads.load(Ordering::Relaxed) > 0);
}

#[tokio::test]
async fn garbage_costs_a_record_and_then_its_service_and_never_more() {
    let servers = ZooKeeper::one().await.unwrap();
    let mut client = servers.client(0).await.unwrap();
    for host in 1..=5 {
        register(&mut client, "pay", &format!("10.1.0.{host}")).await;
    }
    register(&mut client, "orders", "10.1.1.1").await;
    let mut watched = ObservedSource::new(&config(&servers.connect(), NERVE));
    let all: String = (1..=5).map(|host| format!(" 10.1.0.{host}:80 healthy")).collect();
    watched.view(&format!("orders 10.1.1.1:80 healthy\npay{all}\n")).await;

    let garbage = [0x80, 0x01, 0x00, 0xff];
    let bad = client.make("/smartstack/pay/bad", &garbage, Kind::Ephemeral).await.unwrap();
    watched
        .view(&format!(
            "orders 10.1.1.1:80 healthy\npay{all}\nzk/smartstack/pay/bad: its data is not JSON (Thrift's binary form is \
             not read): expected value at line 1 column 1; this endpoint is left out\n"
        ))
        .await;
    assert!(watched.counters.bad_records.load(Ordering::Relaxed) >= 1);
    client.delete(&bad).await.unwrap();
    watched.view(&format!("orders 10.1.1.1:80 healthy\npay{all}\n")).await;
    for child in client.children("/smartstack/pay").await.unwrap() {
        client.set(&format!("/smartstack/pay/{child}"), &garbage).await.unwrap();
    }
    // The last readable state was a part of the service; whether the rest is removed is up to the guard.
    let because = " healthy (stale: 5 of 5 records are bad, which is more than single mistakes)";
    let is_held = |message: &Result<Registrations, SourceError>, shown: &str| {
        let pay =
            shown.strip_prefix("orders 10.1.1.1:80 healthy\npay 10.1.0.").and_then(|pay| pay.lines().next());
        message.is_ok() && pay.is_some_and(|pay| pay.ends_with(because))
    };
    watched.until("what was last good", is_held).await.unwrap();
}

#[tokio::test]
async fn while_no_server_is_there_the_source_fails_and_then_says_the_same_again() {
    let mut servers = ZooKeeper::three().await.unwrap();
    let mut client = servers.client(0).await.unwrap();
    register(&mut client, "pay", "10.1.0.1").await;
    let mut watched = ObservedSource::new(&config(&servers.connect(), NERVE));
    let expected = "pay 10.1.0.1:80 healthy\n";
    let first = watched.view(expected).await;
    for index in 0..3 {
        servers.kill(index).unwrap();
    }
    watched.failure_with("discovery source `zk` could not read from ZooKeeper").await;
    assert!(watched.source.confirm(&BTreeSet::new()).await.is_err());
    for index in 0..3 {
        servers.launch_again(index).unwrap();
    }
    for index in 0..3 {
        servers.wait_serving(index).await.unwrap();
    }
    let again = watched.view(expected).await;
    let registration = |view: &Registrations| view.services.get("pay").unwrap().registration.clone();
    assert!(Arc::ptr_eq(&registration(&first), &registration(&again)));
    // The leader and the connected server are killed in turn, and writes after that are seen.
    for killed in 0..3 {
        servers.kill(killed).unwrap();
        servers.wait_serving((killed + 1) % 3).await.unwrap();
        let mut client = servers.client((killed + 1) % 3).await.unwrap();
        let host = format!("10.2.0.{killed}");
        register(&mut client, "pay", &host).await;
        watched
            .until(&host, |message, shown| message.is_ok() && shown.contains(&format!("{host}:80 healthy")))
            .await
            .unwrap();
        servers.restart(killed).await.unwrap();
    }
}

#[tokio::test]
async fn a_session_that_expires_is_replaced() {
    let mut servers = ZooKeeper::one().await.unwrap();
    let mut client = servers.client(0).await.unwrap();
    register(&mut client, "pay", "10.1.0.1").await;
    let mut watched = ObservedSource::new(&config(&servers.connect(), NERVE));
    watched.view("pay 10.1.0.1:80 healthy\n").await;
    servers.freeze(0).unwrap();
    watched.failure_with("lost its connection").await;
    let counters = watched.counters.clone();
    let expired = async || counters.sessions_expired.load(Ordering::Relaxed) > 0;
    let waiting = vmesh_testkit::wait_for("expiry", BOUND, async || expired().await.then_some(()));
    // No view is requested meanwhile.
    waiting.await.unwrap();
    servers.thaw(0).unwrap();
    watched.view("pay 10.1.0.1:80 healthy\n").await;
    register(&mut client, "pay", "10.1.0.2").await;
    watched.view("pay 10.1.0.1:80 healthy 10.1.0.2:80 healthy\n").await;
    assert_eq!(watched.counters.connections.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_registry_that_forgot_everything_says_nothing_and_names_no_service_empty() {
    let mut servers = ZooKeeper::one().await.unwrap();
    let mut client = servers.client(0).await.unwrap();
    let node = register(&mut client, "pay", "10.1.0.1").await;
    register(&mut client, "orders", "10.1.0.2").await;
    let mut watched = ObservedSource::new(&config(&servers.connect(), NERVE));
    watched.view("orders 10.1.0.2:80 healthy\npay 10.1.0.1:80 healthy\n").await;
    // An empty directory is not an explicit removal: the service is absent, and the guard may hold it.
    client.delete(&node).await.unwrap();
    let view = watched.view("orders 10.1.0.2:80 healthy\n").await;
    assert!(view.emptied.is_empty());
    servers.restart_empty().await.unwrap();
    let absent = "zk/smartstack: there is no such node; vmesh reads it as soon as it is created\n";
    let view = watched.view(absent).await;
    assert!(view.services.is_empty() && view.emptied.is_empty());
    assert_eq!(shown(&watched.source.confirm(&BTreeSet::new()).await.unwrap()), absent);
    let mut client = servers.client(0).await.unwrap();
    register(&mut client, "pay", "10.1.0.1").await;
    watched.view("pay 10.1.0.1:80 healthy\n").await;
}

#[tokio::test]
async fn digest_tls_and_a_chroot_go_together_and_what_may_not_be_read_is_what_was_known() {
    let servers = ZooKeeper::start(Options { tls: true, ..Options::default() }).await.unwrap();
    let mut client = servers.client(0).await.unwrap();
    client.authenticate("mesh:secret").await.unwrap();
    let data = br#"{"host":"10.1.0.1","port":80}"#;
    client.make("/prod/smartstack/pay/1", data, Kind::Ephemeral).await.unwrap();
    let dir = tempdir().unwrap();
    let (digest, files) = (dir.join("digest"), servers.tls());
    std::fs::write(&digest, "mesh:secret").unwrap();
    let more = |digest: &std::path::Path| {
        format!(
            "auth: {{digest_file: {}}}\ntls: {{ca_file: {}, cert_file: {}, key_file: {}}}\n{NERVE}",
            digest.display(),
            files.ca.display(),
            files.cert.display(),
            files.key.display()
        )
    };
    let connect = format!("{}/prod", servers.secure_connect());
    let mut watched = ObservedSource::new(&config(&connect, &more(&digest)));
    let view = watched.view("pay 10.1.0.1:80 healthy\n").await;

    let wrong = dir.join("wrong");
    std::fs::write(&wrong, "mesh:wrong").unwrap();
    // With nothing known of this root, serving the others would claim that it has no services.
    let mut fresh = ObservedSource::new(&config(&connect, &more(&wrong)));
    fresh.failure_with("could not read /smartstack, which has not been read yet").await;
    fresh.last.contains("the node's ACL has to give READ").then_some(()).unwrap();
    let mut restored = ObservedSource::restored(&config(&connect, &more(&wrong)), Some(&view));
    let is_stale = |message: &Result<Registrations, SourceError>, shown: &str| {
        message.is_ok()
            && shown.starts_with("pay 10.1.0.1:80 healthy (stale: could not read /smartstack: not allowed")
    };
    restored.until("the last good state stays", is_stale).await.unwrap();
}

#[tokio::test]
async fn a_server_without_a_quorum_gives_a_first_view_that_is_stale() {
    let mut servers =
        ZooKeeper::start(Options { servers: 3, read_only: true, ..Options::default() }).await.unwrap();
    let leader = servers.leader().await.unwrap();
    let stays = (leader + 1) % 3;
    let mut client = servers.client(stays).await.unwrap();
    let data = br#"{"host":"10.1.0.1","port":80}"#;
    client.make("/smartstack/pay/1", data, Kind::Persistent).await.unwrap();
    for index in (0..3).filter(|index| *index != stays) {
        servers.kill(index).unwrap();
    }
    let mut watched = ObservedSource::new(&config(&servers.connect(), NERVE));
    let is_stale = |message: &Result<Registrations, SourceError>, shown: &str| {
        message.is_ok()
            && shown.starts_with("pay 10.1.0.1:80 unknown x1 (stale: ZooKeeper has lost its quorum")
            || message.is_ok()
                && shown.starts_with("pay 10.1.0.1:80 unknown (stale: ZooKeeper has lost its quorum")
    };
    watched.until("a stale view", is_stale).await.unwrap();
    for index in (0..3).filter(|index| *index != stays) {
        servers.launch_again(index).unwrap();
    }
    watched.view("pay 10.1.0.1:80 unknown\n").await;
}

#[tokio::test]
async fn two_thousand_services_are_read_and_one_change_is_seen_at_once() {
    let servers = ZooKeeper::one().await.unwrap();
    let mut client = servers.client(0).await.unwrap();
    let data = |host: usize| {
        let (a, b) = (host / 250, host % 250);
        format!(r#"{{"host":"10.1.{a}.{b}","port":80}}"#)
    };
    for service in 0..2000 {
        for instance in 0..2 {
            let path = format!("/smartstack/service-{service:04}/{instance}");
            client.make(&path, data(service).as_bytes(), Kind::Persistent).await.unwrap();
        }
    }
    let mut watched = ObservedSource::new(&config(&servers.connect(), NERVE));
    let began = Instant::now();
    let first = timeout(BOUND, watched.source.next()).await.unwrap().unwrap();
    assert_eq!(first.services.len(), 2000);
    let all = began.elapsed();
    let reads = watched.counters.reads.load(Ordering::Relaxed);
    let began = Instant::now();
    client.set("/smartstack/service-1000/0", br#"{"host":"10.9.9.9","port":80}"#).await.unwrap();
    let second = timeout(BOUND, watched.source.next()).await.unwrap().unwrap();
    eprintln!("2,000 services in {all:?} by {reads} reads; one change in {:?}", began.elapsed());
    let changed = first.services.iter().filter(|(name, observed)| {
        !Arc::ptr_eq(&observed.registration, &second.services.get(*name).unwrap().registration)
    });
    assert_eq!(changed.count(), 1);
    assert_eq!(watched.counters.reads.load(Ordering::Relaxed), reads + 1);
}
