//! The client with real servers: watching the KV store, registration, and failover between addresses.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;
use vmesh_consul::{
    Check, CheckStatus, Client, Config, Entries, ErrorKind, Query, Registration, Watch, WatchOptions,
};
use vmesh_testkit::Loopback;
use vmesh_testkit::consul::{Consul, Options};

const BOUND: Duration = Duration::from_secs(60);

fn client(addresses: &[&str]) -> Client {
    Client::new(&Config::of(addresses.iter().map(|address| address.parse().unwrap())))
}

async fn next(watch: &mut Watch<Entries>) -> String {
    let answer = timeout(BOUND, watch.next()).await.unwrap().unwrap();
    let entries = answer.value.entries.iter();
    let shown: Vec<_> =
        entries.map(|entry| format!("{}={}", entry.key, String::from_utf8_lossy(&entry.value))).collect();
    if answer.value.absent { "absent".to_owned() } else { shown.join(" ") }
}

#[tokio::test]
async fn a_prefix_of_keys_is_watched_from_nothing_to_nothing() {
    let consul = Consul::one().await.unwrap();
    let client = client(&[&consul.url(0).unwrap()]);
    let mut watch = client.watch_keys("mesh/docs/", WatchOptions::default());
    assert_eq!(next(&mut watch).await, "absent");
    consul.put(0, "/v1/kv/mesh/docs/a%20b", &json!(1)).await.unwrap();
    assert_eq!(next(&mut watch).await, "mesh/docs/a b=1");
    // The query stays in flight although no caller waits for it, and its answer is not lost.
    assert!(timeout(Duration::from_millis(50), watch.next()).await.is_err());
    consul.put(0, "/v1/kv/mesh/docs/b", &Value::Null).await.unwrap();
    assert_eq!(next(&mut watch).await, "mesh/docs/a b=1 mesh/docs/b=");
    // A write to another key is not a change.
    consul.put(0, "/v1/kv/other", &json!(2)).await.unwrap();
    consul.put(0, "/v1/kv/mesh/docs/c", &json!(3)).await.unwrap();
    assert_eq!(next(&mut watch).await, "mesh/docs/a b=1 mesh/docs/b= mesh/docs/c=3");
    assert_eq!(timeout(BOUND, watch.confirm()).await.unwrap().unwrap().value.entries.len(), 3);
}

#[tokio::test]
async fn the_end_of_an_outage_is_news_although_nothing_has_changed() {
    let mut consul = Consul::one().await.unwrap();
    let client = client(&[&consul.url(0).unwrap()]);
    let mut watch = client.watch_keys("mesh/docs/", WatchOptions::default());
    consul.put(0, "/v1/kv/mesh/docs/a", &json!(1)).await.unwrap();
    assert_eq!(next(&mut watch).await, "mesh/docs/a=1");
    consul.kill(0).unwrap();
    timeout(BOUND, watch.next()).await.unwrap().unwrap_err();
    consul.restart(0).await.unwrap();
    let again = async {
        loop {
            if let Ok(answer) = watch.next().await {
                return answer.value.entries.len();
            }
        }
    };
    assert_eq!(timeout(BOUND, again).await.unwrap(), 1);
}

#[tokio::test]
async fn a_service_is_registered_kept_alive_maintained_and_taken_away() {
    let consul = Consul::one().await.unwrap();
    let client = client(&[&consul.url(0).unwrap()]);
    let registration = Registration {
        id: "pay 1/x".to_owned(),
        name: "pay".to_owned(),
        port: 8080,
        checks: vec![Check {
            id: "pay-ttl".to_owned(),
            name: "agent".to_owned(),
            ttl: Some(Duration::from_secs(3600)),
            ..Check::default()
        }],
        ..Registration::default()
    };
    client.register(&registration).await.unwrap();
    client.register(&registration).await.unwrap();
    let state = async || -> String {
        let checks = consul.get(0, "/v1/agent/checks").await.unwrap();
        let mut all: Vec<_> = checks
            .as_object()
            .unwrap()
            .iter()
            .map(|(id, check)| format!("{id} {}", check["Status"]))
            .collect();
        all.sort();
        all.join(", ")
    };
    assert_eq!(state().await, r#"pay-ttl "critical""#);
    client.update_check("pay-ttl", CheckStatus::Passing, "all is well").await.unwrap();
    assert_eq!(state().await, r#"pay-ttl "passing""#);
    client.maintenance("pay 1/x", true, "a & b").await.unwrap();
    assert!(state().await.contains("_service_maintenance:pay 1/x"));
    client.maintenance("pay 1/x", false, "").await.unwrap();
    client.deregister("pay 1/x").await.unwrap();
    assert_eq!(state().await, "");
    assert!(client.update_check("pay-ttl", CheckStatus::Passing, "").await.is_err());
}

/// Starts a server that answers every request with this head. Returns its address.
fn always(head: &'static str) -> (Loopback, String) {
    let place = Loopback::unique().unwrap();
    let listener = TcpListener::bind((place.ip(), 8500)).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            for line in lines.map_while(Result::ok) {
                if line.is_empty() {
                    _ = stream
                        .write_all(format!("HTTP/1.1 {head}\r\nContent-Length: 2\r\n\r\n{{}}").as_bytes());
                }
            }
        }
    });
    let url = format!("http://{place}:8500");
    (place, url)
}

#[tokio::test]
async fn an_address_that_fails_is_left_for_the_next_and_not_gone_back_to() {
    let consul = Consul::one().await.unwrap();
    let (_limited, limited) = always("429 Too Many Requests");
    let (_broken, broken) = always("503 Service Unavailable");
    let nobody = Loopback::unique().unwrap();
    let client = client(&[&limited, &broken, &format!("http://{nobody}:8500"), &consul.url(0).unwrap()]);
    for _ in 0..3 {
        let answer = client.get::<Value>("/v1/catalog/services", &Query::default()).await.unwrap();
        assert_eq!(answer.value, json!({"consul": []}));
        assert!(answer.meta.known_leader && answer.meta.index.is_some_and(|index| index > 0));
    }
    assert_eq!(client.counters().failures.load(Ordering::Relaxed), 3);
    assert_eq!(client.address(), consul.url(0).unwrap());
    // The client made one connection to each address that accepted one.
    assert_eq!(client.counters().connects.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn what_a_refusal_means_is_told_apart() {
    let consul = Consul::start(Options { acl: true, ..Options::default() }).await.unwrap();
    let client = client(&[&consul.url(0).unwrap()]);
    let kind = async |path: &str| match client.get::<Value>(path, &Query::default()).await {
        Ok(answer) => panic!("{path}: {}", answer.value),
        Err(error) => error.kind,
    };
    assert!(matches!(kind("/v1/agent/self").await, ErrorKind::Forbidden(_)));
    assert!(matches!(kind("/v1/no/such").await, ErrorKind::NotFound(_)));
    assert!(matches!(kind("/v1/catalog/services?dc=nowhere").await, ErrorKind::Server { status: 500, .. }));
    assert!(matches!(kind("/v1/catalog/services?wait=x").await, ErrorKind::Server { status: 400, .. }));
}
