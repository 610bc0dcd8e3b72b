//! Tests with a fake server, for answers that real servers cannot be made to give: headers of newer versions,
//! outdated answers, invalid bodies.

use std::collections::BTreeMap;
use std::sync::Mutex;

use serde_json::json;
use tokio::net::TcpListener;
use tokio::time::timeout;
use vmesh_model::load::strict;

use super::*;

type Headers = BTreeMap<&'static str, String>;

/// A server that gives the answers a test sets, and blocks queries as Consul does.
struct FakeConsul {
    place: vmesh_testkit::Loopback,
    fake_answers: Arc<Mutex<FakeAnswers>>,
    _task: JoinSet<()>,
}

#[derive(Default)]
struct FakeAnswers {
    index: u64,
    /// Status, headers and body by path. The prefix `leader ` marks the answer of the leader, and `dc2 ` that
    /// of another datacenter.
    answers: BTreeMap<String, (u16, Headers, String)>,
    /// Blocking queries for this path get no answer for now.
    mute: Option<&'static str>,
}

impl FakeConsul {
    async fn start() -> FakeConsul {
        let place = vmesh_testkit::Loopback::unique().unwrap();
        let listener = TcpListener::bind((place.ip(), 8500)).await.unwrap();
        let fake_answers = Arc::new(Mutex::new(FakeAnswers { index: 10, ..FakeAnswers::default() }));
        let mut task = JoinSet::new();
        let state = fake_answers.clone();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                connections.spawn(serve(stream, state.clone()));
                while connections.try_join_next().is_some() {}
            }
        });
        FakeConsul { place, fake_answers, _task: task }
    }

    /// Sets the answer for `path`, at a new index.
    fn set_answer(
        &self,
        path: &str,
        status: u16,
        headers: &[(&'static str, &str)],
        body: &serde_json::Value,
    ) {
        let mut fake_answers = self.fake_answers.lock().unwrap();
        fake_answers.index += 1;
        let headers = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        let body = body.as_str().map_or_else(|| body.to_string(), str::to_owned);
        fake_answers.answers.insert(path.to_owned(), (status, headers, body));
    }

    fn remove_answer(&self, path: &str) {
        let mut fake_answers = self.fake_answers.lock().unwrap();
        fake_answers.index += 1;
        fake_answers.answers.remove(path);
    }

    fn source(&self, last_good: Option<&Registrations>) -> ConsulSource {
        self.source_of("", last_good)
    }

    fn source_of(&self, more: &str, last_good: Option<&Registrations>) -> ConsulSource {
        let text = format!("{{address: \"http://{}:8500\", name: test, wait: 1s{more}}}", self.place);
        let config: ConsulConfig = strict("control.yaml", &text).unwrap();
        ConsulSource::new(config, last_good, Arc::new(Counters::default()))
    }
}

/// Serves one request after another, as in HTTP/1.1.
async fn serve(stream: tokio::net::TcpStream, fake_answers: Arc<Mutex<FakeAnswers>>) {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    let mut stream = BufReader::new(stream);
    loop {
        let (mut first, mut line) = (String::new(), String::new());
        if stream.read_line(&mut first).await.unwrap_or(0) == 0 {
            return;
        }
        while stream.read_line(&mut line).await.unwrap_or(0) > 2 {
            line.clear();
        }
        let target = first.split(' ').nth(1).unwrap();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let asked: u64 = query.split('&').find_map(|q| q.strip_prefix("index=")?.parse().ok()).unwrap_or(0);
        let has = |flag: &str| query.split('&').any(|q| q == flag);
        let path = if has("dc=dc2") { format!("dc2 {path}") } else { path.to_owned() };
        let path = if has("stale") { path } else { format!("leader {path}") };
        let deadline = Instant::now() + Duration::from_secs(1);
        let waits = |fake_answers: &FakeAnswers| {
            (fake_answers.index <= asked && Instant::now() < deadline)
                || (asked > 0 && fake_answers.mute == Some(&*path))
        };
        while waits(&fake_answers.lock().unwrap()) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let answer = {
            let fake_answers = fake_answers.lock().unwrap();
            let plain = path.trim_start_matches("leader ");
            let (status, headers, body) = fake_answers
                .answers
                .get(&path)
                .or_else(|| fake_answers.answers.get(plain))
                .cloned()
                .unwrap_or((200, Headers::new(), "[]".to_owned()));
            let index = format!("X-Consul-Index: {}\r\n", fake_answers.index);
            let index = if headers.contains_key("X-Consul-Index") { "" } else { &index };
            let headers: String =
                headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
            format!("HTTP/1.1 {status} X\r\n{index}{headers}Content-Length: {}\r\n\r\n{body}", body.len())
        };
        if stream.get_mut().write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

const CATALOG: &str = "/v1/catalog/services";
const PAY: &str = "/v1/health/service/pay";
const FILTERED: &[(&str, &str)] = &[("X-Consul-Results-Filtered-By-ACLs", "true")];
const NO_LEADER: &[(&str, &str)] = &[("X-Consul-KnownLeader", "false")];

fn instances(addresses: &[&str]) -> serde_json::Value {
    let one = |address: &&str| {
        json!({"Node": {"Node": "n", "Address": address, "Datacenter": "dc1"},
               "Service": {"ID": address, "Service": "pay", "Port": 80}, "Checks": []})
    };
    addresses.iter().map(one).collect()
}

fn both(orders: bool) -> serde_json::Value {
    if orders { json!({"consul": [], "pay": [], "orders": []}) } else { json!({"consul": [], "pay": []}) }
}

/// Formats a view such as `pay 10.0.0.1:80 10.0.0.2:80 stale`, or the error.
fn line(outcome: &Result<Registrations, SourceError>) -> String {
    match outcome {
        Ok(view) => {
            let services = view.services.iter().map(|(name, observed)| {
                let addresses: Vec<_> =
                    observed.registration.endpoints.iter().map(|e| e.address.to_string()).collect();
                format!("{name} {} {}", addresses.join(" "), observed.state)
            });
            services.collect::<Vec<_>>().join(", ")
        }
        Err(error) => chain(error),
    }
}

/// Returns all lines up to the first that contains `wanted`.
async fn until(source: &mut ConsulSource, wanted: &str) -> Vec<String> {
    let mut all = Vec::new();
    let found = async {
        loop {
            all.push(line(&source.next().await));
            if all.last().unwrap().contains(wanted) {
                break;
            }
        }
    };
    let found = timeout(Duration::from_secs(60), found).await;
    assert!(found.is_ok(), "waited for {wanted}; seen: {all:#?}");
    all
}

#[tokio::test]
async fn a_service_that_only_the_token_hides_is_kept_until_it_is_really_gone() {
    let fake = FakeConsul::start().await;
    fake.set_answer(CATALOG, 200, &[], &both(true));
    fake.set_answer(PAY, 200, &[], &instances(&["10.0.0.1"]));
    fake.set_answer("/v1/health/service/orders", 200, &[], &instances(&["10.0.0.9"]));
    let mut source = fake.source(None);
    assert_eq!(until(&mut source, "pay").await, ["orders 10.0.0.9:80 fresh, pay 10.0.0.1:80 fresh"]);

    fake.set_answer("/v1/health/service/orders", 200, FILTERED, &json!([]));
    fake.set_answer(CATALOG, 200, FILTERED, &both(false));
    let observed = until(&mut source, "orders 10.0.0.9:80 stale").await;
    assert!(observed.iter().all(|line| line.contains("orders 10.0.0.9:80")), "{observed:#?}");

    // The token sees the service again, and it has no instances.
    fake.set_answer("/v1/health/service/orders", 200, &[], &json!([]));
    let observed = until(&mut source, "pay").await;
    assert_eq!(observed.last().unwrap(), "pay 10.0.0.1:80 fresh");
}

#[tokio::test]
async fn an_answer_without_a_leader_is_never_a_removal() {
    let fake = FakeConsul::start().await;
    fake.set_answer(CATALOG, 200, &[], &both(false));
    fake.set_answer(PAY, 200, &[], &instances(&["10.0.0.1", "10.0.0.2"]));
    let mut source = fake.source(None);
    until(&mut source, "pay 10.0.0.1:80 10.0.0.2:80 fresh").await;

    // A partitioned server lists fewer instances, and the leader cannot be asked.
    fake.set_answer(&format!("leader {PAY}"), 500, &[], &json!("No cluster leader"));
    fake.set_answer(PAY, 200, NO_LEADER, &instances(&["10.0.0.1"]));
    let observed = until(&mut source, "stale").await;
    assert!(observed.iter().all(|line| line.contains("10.0.0.2")), "{observed:#?}");
    // The leader reports the same.
    fake.remove_answer(&format!("leader {PAY}"));
    until(&mut source, "pay 10.0.0.1:80 fresh").await;
}

#[tokio::test]
async fn an_index_that_goes_back_or_is_missing_is_asked_of_the_leader() {
    let fake = FakeConsul::start().await;
    fake.set_answer(CATALOG, 200, &[], &both(false));
    fake.set_answer(PAY, 200, &[], &instances(&["10.0.0.1", "10.0.0.2"]));
    let mut source = fake.source(None);
    until(&mut source, "10.0.0.2").await;
    // A server lags behind; the leader has newer data.
    fake.set_answer(&format!("leader {PAY}"), 200, &[], &instances(&["10.0.0.1", "10.0.0.2", "10.0.0.3"]));
    fake.set_answer(PAY, 200, &[("X-Consul-Index", "3")], &instances(&["10.0.0.1"]));
    let observed = until(&mut source, "10.0.0.3").await;
    assert_eq!(observed, ["pay 10.0.0.1:80 10.0.0.2:80 10.0.0.3:80 fresh"]);
    // The answer has no index: only the answer of the leader counts, however often it has to be asked.
    fake.set_answer(&format!("leader {PAY}"), 200, &[("X-Consul-Index", "")], &instances(&["10.0.0.4"]));
    fake.set_answer(PAY, 200, &[("X-Consul-Index", "")], &instances(&["10.0.0.4"]));
    until(&mut source, "pay 10.0.0.4:80 fresh").await;
    assert!(source.counters.index_resets.load(Ordering::Relaxed) >= 1);
}

#[tokio::test]
async fn nonsense_costs_the_service_that_it_is_about() {
    let fake = FakeConsul::start().await;
    fake.set_answer(CATALOG, 200, &[], &both(true));
    fake.set_answer(PAY, 200, &[], &instances(&["10.0.0.1"]));
    fake.set_answer("/v1/health/service/orders", 200, &[], &instances(&["10.0.0.9"]));
    let mut source = fake.source(None);
    until(&mut source, "pay").await;
    let entries = json!([{"Node": 1}, 2, null, "x", {}, {}]);
    for nonsense in [json!("{\"cut\": "), entries] {
        fake.set_answer("/v1/health/service/orders", 200, &[], &nonsense);
        let observed = until(&mut source, "orders 10.0.0.9:80 stale").await;
        assert!(observed.iter().all(|line| line.ends_with("pay 10.0.0.1:80 fresh")), "{observed:#?}");
        fake.set_answer("/v1/health/service/orders", 200, &[], &instances(&["10.0.0.9"]));
        until(&mut source, "orders 10.0.0.9:80 fresh").await;
    }
    // An invalid or empty catalogue only makes the view stale.
    for (status, nonsense, expected) in [
        (200, json!("<html>"), "not in Consul's documented format"),
        (200, json!({}), "not even itself"),
        (500, json!("rpc error"), "HTTP 500"),
        (403, json!("ACL not found"), "refused the token"),
    ] {
        fake.set_answer(CATALOG, status, &[], &nonsense);
        let observed = until(&mut source, expected).await;
        assert!(
            observed.iter().all(|line| line.contains("orders") || line.contains(expected)),
            "{observed:#?}"
        );
        fake.set_answer(CATALOG, 200, &[], &both(true));
        until(&mut source, "orders 10.0.0.9:80 fresh, pay 10.0.0.1:80 fresh").await;
    }
}

#[tokio::test]
async fn what_was_known_before_a_restart_stands_in_for_a_service_that_cannot_be_read() {
    let fake = FakeConsul::start().await;
    fake.set_answer(CATALOG, 200, &[], &both(true));
    fake.set_answer(PAY, 200, &[], &instances(&["10.0.0.1"]));
    fake.set_answer("/v1/health/service/orders", 200, &[], &instances(&["10.0.0.9"]));
    let before = fake.source(None).next().await.unwrap();

    fake.set_answer("/v1/health/service/orders", 500, &[], &json!("rpc error"));
    let mut source = fake.source(Some(&before));
    assert_eq!(until(&mut source, "pay").await, ["orders 10.0.0.9:80 stale, pay 10.0.0.1:80 fresh"]);
    let mut source = fake.source(None);
    assert_eq!(until(&mut source, "pay").await, ["pay 10.0.0.1:80 fresh"]);
    fake.set_answer("/v1/health/service/orders", 200, &[], &instances(&["10.0.0.9"]));
    until(&mut source, "orders 10.0.0.9:80 fresh").await;
}

#[tokio::test]
async fn an_answer_that_was_waited_for_is_news_if_something_else_was_read_meanwhile() {
    let fake = FakeConsul::start().await;
    fake.set_answer(CATALOG, 200, &[], &both(false));
    fake.set_answer(PAY, 200, &[], &instances(&["10.0.0.1", "10.0.0.2"]));
    let mut source = fake.source(None);
    until(&mut source, "pay 10.0.0.1:80 10.0.0.2:80 fresh").await;
    // A blocking query is running.
    fake.fake_answers.lock().unwrap().mute = Some(PAY);
    assert!(timeout(Duration::from_millis(1500), source.next()).await.is_err());

    // An instance disappears briefly, and the service is read again just then.
    fake.set_answer(PAY, 200, &[], &instances(&["10.0.0.1"]));
    let read = source.confirm(&BTreeSet::from(["pay".parse().unwrap()])).await;
    assert_eq!(line(&read), "pay 10.0.0.1:80 fresh");
    fake.set_answer(PAY, 200, &[], &instances(&["10.0.0.1", "10.0.0.2"]));
    fake.fake_answers.lock().unwrap().mute = None;
    until(&mut source, "pay 10.0.0.1:80 10.0.0.2:80 fresh").await;
}

#[tokio::test]
async fn a_token_with_fewer_rights_takes_nothing_away_that_was_known_before_a_restart() {
    let fake = FakeConsul::start().await;
    fake.set_answer(CATALOG, 200, &[], &both(true));
    fake.set_answer(PAY, 200, &[], &instances(&["10.0.0.1"]));
    fake.set_answer("/v1/health/service/orders", 200, &[], &instances(&["10.0.0.9"]));
    let before = fake.source(None).next().await.unwrap();

    fake.set_answer("/v1/health/service/orders", 200, FILTERED, &json!([]));
    fake.set_answer(CATALOG, 200, FILTERED, &both(false));
    let mut source = fake.source(Some(&before));
    assert_eq!(until(&mut source, "pay").await, ["orders 10.0.0.9:80 stale, pay 10.0.0.1:80 fresh"]);
    let read = source.confirm(&BTreeSet::from(["orders".parse().unwrap()])).await;
    assert_eq!(line(&read), "orders 10.0.0.9:80 stale, pay 10.0.0.1:80 fresh");

    // The token may see the service, which has no instances.
    fake.set_answer("/v1/health/service/orders", 200, &[], &json!([]));
    let observed = until(&mut source, "pay").await;
    assert_eq!(observed.last().unwrap(), "pay 10.0.0.1:80 fresh");
}

#[tokio::test]
async fn the_first_view_waits_for_a_datacenter_of_which_nothing_is_known() {
    let fake = FakeConsul::start().await;
    fake.set_answer(CATALOG, 200, &[], &both(false));
    fake.set_answer(PAY, 200, &[], &instances(&["10.0.0.1"]));
    fake.set_answer(&format!("dc2 {CATALOG}"), 500, &[], &json!("No path to datacenter"));
    let mut source = fake.source_of(", datacenters: [dc1, dc2]", None);
    let too_early = timeout(Duration::from_secs(2), source.next()).await;
    assert!(too_early.is_err(), "{}", line(&too_early.unwrap()));
    fake.set_answer(&format!("dc2 {CATALOG}"), 200, &[], &both(false));
    fake.set_answer(&format!("dc2 {PAY}"), 200, &[], &instances(&["10.0.2.1"]));
    assert_eq!(until(&mut source, "pay").await, ["pay 10.0.0.1:80 10.0.2.1:80 fresh"]);

    // The state from before a restart is as good as an answer.
    let mut before = source.last_view.clone().unwrap();
    let pay = before.services.values_mut().next().unwrap();
    let mut endpoints = pay.registration.endpoints.to_vec();
    endpoints[1].labels.insert("datacenter".into(), "dc2".into());
    pay.registration = Arc::new(Registration { endpoints: endpoints.into(), ..(*pay.registration).clone() });
    fake.set_answer(&format!("dc2 {CATALOG}"), 500, &[], &json!("No path to datacenter"));
    let mut source = fake.source_of(", datacenters: [dc1, dc2]", Some(&before));
    let first = timeout(Duration::from_secs(20), source.next()).await.unwrap();
    assert_eq!(line(&first), "pay 10.0.0.1:80 10.0.2.1:80 stale");
}

#[tokio::test]
async fn what_went_since_a_restart_does_not_come_back_when_it_cannot_be_read() {
    let fake = FakeConsul::start().await;
    fake.set_answer(CATALOG, 200, &[], &both(true));
    fake.set_answer(PAY, 200, &[], &instances(&["10.0.0.1"]));
    fake.set_answer("/v1/health/service/orders", 200, &[], &instances(&["10.0.0.9"]));
    let before = fake.source(None).next().await.unwrap();
    fake.set_answer(CATALOG, 200, &[], &both(false));
    let mut source = fake.source(Some(&before));
    assert_eq!(until(&mut source, "pay").await, ["pay 10.0.0.1:80 fresh"]);
    // The service is listed again, but its instances cannot be read.
    fake.set_answer("/v1/health/service/orders", 500, &[], &json!("rpc error"));
    fake.set_answer(CATALOG, 200, &[], &both(true));
    let outcome = timeout(Duration::from_secs(20), source.next()).await.map(|outcome| line(&outcome));
    assert!(outcome.as_ref().is_ok_and(|line| line == "pay 10.0.0.1:80 fresh"), "{outcome:?}");
}

#[tokio::test]
async fn what_is_kept_of_all_answers_together_is_bounded_and_costs_the_service_that_is_too_much() {
    let fake = FakeConsul::start().await;
    fake.set_answer(CATALOG, 200, &[], &both(true));
    fake.set_answer(PAY, 200, &[], &instances(&["10.0.0.1"]));
    fake.set_answer("/v1/health/service/orders", 200, &[], &instances(&["10.0.0.9"]));
    let mut source = fake.source(None);
    source.max_kept = 20_000;
    until(&mut source, "orders 10.0.0.9:80 fresh, pay 10.0.0.1:80 fresh").await;
    let many: Vec<_> = (0..250).map(|n| format!("10.0.1.{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    fake.set_answer("/v1/health/service/orders", 200, &[], &instances(&many));
    until(&mut source, "orders 10.0.0.9:80 stale, pay 10.0.0.1:80 fresh").await;
    // The other services continue, and this one recovers when its answer is small enough again.
    fake.set_answer(PAY, 200, &[], &instances(&["10.0.0.2"]));
    until(&mut source, "orders 10.0.0.9:80 stale, pay 10.0.0.2:80 fresh").await;
    fake.set_answer("/v1/health/service/orders", 200, &[], &instances(&["10.0.0.8"]));
    until(&mut source, "orders 10.0.0.8:80 fresh").await;
}

#[tokio::test]
async fn a_service_that_is_known_from_before_and_not_listed_any_more_is_absent_and_not_stale_for_ever() {
    let fake = FakeConsul::start().await;
    fake.set_answer(CATALOG, 200, &[], &both(false));
    fake.set_answer(PAY, 200, &[], &instances(&["10.0.0.1"]));
    let mut before = fake.source(None);
    let known = timeout(Duration::from_secs(60), before.next()).await.unwrap().unwrap();
    assert_eq!(line(&Ok(known.clone())), "pay 10.0.0.1:80 fresh");
    drop(before);
    // Consul is down when the next control plane starts, and the service is empty when Consul returns.
    fake.set_answer(CATALOG, 500, &[], &json!("rpc error"));
    let mut source = fake.source(Some(&known));
    timeout(Duration::from_secs(60), source.next()).await.unwrap().unwrap_err();
    fake.set_answer(CATALOG, 200, &[], &json!({"consul": [], "orders": []}));
    fake.set_answer("/v1/health/service/orders", 200, &[], &instances(&["10.0.0.7"]));
    let observed = until(&mut source, "orders 10.0.0.7:80 fresh").await;
    assert_eq!(observed.last().unwrap(), "orders 10.0.0.7:80 fresh");
}

#[tokio::test]
async fn bad_records_cost_themselves_and_a_service_of_nothing_else_is_left_out() {
    let fake = FakeConsul::start().await;
    fake.set_answer(CATALOG, 200, &[], &both(true));
    fake.set_answer(
        PAY,
        200,
        &[],
        &instances(&["10.0.0.1", "http://10.0.0.2", "http://10.0.0.3", "10.0.0.4", "x y"]),
    );
    fake.set_answer("/v1/health/service/orders", 200, &[], &instances(&["http://10.0.0.9"]));
    let mut source = fake.source(None);
    let view = timeout(Duration::from_secs(60), source.next()).await.unwrap().unwrap();
    assert_eq!(line(&Ok(view.clone())), "pay 10.0.0.1:80 10.0.0.4:80 fresh");
    assert_eq!(view.unusable, Vec::<Arc<str>>::new());
    assert_eq!(view.left_out.len(), 1);
    assert!(
        view.left_out[0].starts_with("service `orders`: instance `http://10.0.0.9`"),
        "{}",
        view.left_out[0]
    );
    let pay = &view.services[&"pay".parse::<ServiceName>().unwrap()];
    assert_eq!(pay.extent, crate::source::Extent::Part);
}

const STATE: &str = "/v1/health/state/any";

/// A check of `service` on the node `n`.
fn check(service: &str, status: &str) -> serde_json::Value {
    json!({"Node": "n", "CheckID": service, "ServiceID": service, "ServiceName": service, "Status": status})
}

/// Three services, which is one more than four connections can watch, each with a check.
async fn three_services() -> (FakeConsul, ConsulSource) {
    let fake = FakeConsul::start().await;
    fake.set_answer(CATALOG, 200, &[], &json!({"consul": [], "pay": [], "orders": [], "cart": []}));
    for (service, address) in [("pay", "10.0.0.1"), ("orders", "10.0.0.2"), ("cart", "10.0.0.3")] {
        fake.set_answer(&format!("/v1/health/service/{service}"), 200, &[], &instances(&[address]));
    }
    let all = json!([check("pay", "passing"), check("orders", "passing"), check("cart", "passing")]);
    fake.set_answer(STATE, 200, &[], &all);
    // This Consul does not list itself.
    let source = fake.source_of(", max_connections: 4, services: {exclude: [consul]}", None);
    (fake, source)
}

const ALL_THREE: &str = "cart 10.0.0.3:80 fresh, orders 10.0.0.2:80 fresh, pay 10.0.0.1:80 fresh";

#[tokio::test]
async fn a_list_of_checks_that_says_less_points_at_services_and_removes_none() {
    let (fake, mut source) = three_services().await;
    until(&mut source, ALL_THREE).await;
    assert!(source.plan.is_scarce);
    let filtered: (&[(&str, &str)], _) = (FILTERED, json!([]));
    let bodies = [filtered, (&[], json!([])), (&[], json!(null)), (&[], json!([check("pay", "passing")]))];
    for (n, (headers, body)) in bodies.into_iter().enumerate() {
        fake.set_answer(STATE, 200, headers, &body);
        let address = format!("10.0.1.{n}");
        fake.set_answer("/v1/health/service/orders", 200, &[], &instances(&[&address]));
        let observed = until(&mut source, &format!("orders {address}:80 fresh, pay 10.0.0.1:80 fresh")).await;
        assert!(observed.iter().all(|line| line.contains("cart 10.0.0.3:80 fresh")), "{observed:#?}");
    }
    // A check index that went backwards leads to a query of the leader and affects no service.
    fake.set_answer(STATE, 200, &[("X-Consul-Index", "2")], &json!([]));
    fake.set_answer(PAY, 200, &[], &instances(&["10.0.0.7"]));
    let observed = until(&mut source, "pay 10.0.0.7:80 fresh").await;
    assert!(observed.iter().all(|line| line.contains("cart 10.0.0.3:80 fresh")), "{observed:#?}");
}

#[tokio::test]
async fn services_take_turns_while_the_checks_cannot_be_read_and_a_problem_says_so() {
    let (fake, mut source) = three_services().await;
    until(&mut source, ALL_THREE).await;
    for (status, nonsense) in [(403, json!("Permission denied")), (200, json!("{\"cut\": "))] {
        fake.set_answer(STATE, status, &[], &nonsense);
        let address = format!("10.0.2.{}", status % 100);
        fake.set_answer(PAY, 200, &[], &instances(&[&address]));
        until(&mut source, &format!("pay {address}:80 fresh")).await;
        let reported = timeout(Duration::from_secs(60), async {
            loop {
                let problems = source.last_view.iter().flat_map(|view| &view.problems);
                if let Some(problem) = problems.map(|problem| problem.message.clone()).next() {
                    return problem;
                }
                line(&source.next().await);
            }
        });
        let problem = reported.await.unwrap();
        assert!(problem.contains("up to 10 s late: GET /v1/health/state/any"), "{problem}");
        fake.set_answer(STATE, 200, &[], &json!([check("pay", "passing")]));
        let ended = timeout(Duration::from_secs(60), async {
            while source.last_view.as_ref().is_some_and(|view| !view.problems.is_empty()) {
                line(&source.next().await);
            }
        });
        ended.await.unwrap();
    }
}

#[tokio::test]
async fn a_server_that_has_not_heard_of_a_change_is_not_the_last_that_is_asked() {
    let (fake, mut source) = three_services().await;
    fake.set_answer("/v1/health/service/pay", 200, &[("X-Consul-Index", "5")], &instances(&["10.0.0.1"]));
    until(&mut source, ALL_THREE).await;
    fake.set_answer(&format!("leader {PAY}"), 200, &[], &instances(&["10.0.0.9"]));
    fake.set_answer(STATE, 200, &[], &json!([check("pay", "critical")]));
    until(&mut source, "pay 10.0.0.9:80 fresh").await;
}

#[tokio::test]
async fn several_datacenters_share_queries_each_for_itself() {
    let fake = FakeConsul::start().await;
    let list = json!({"consul": [], "pay": [], "orders": [], "cart": []});
    let checks = |pay: &str| json!([check("pay", pay), check("orders", "passing"), check("cart", "passing")]);
    for (dc, net) in [("", 1), ("dc2 ", 2)] {
        fake.set_answer(&format!("{dc}{CATALOG}"), 200, &[], &list);
        for (service, last) in [("pay", 1), ("orders", 2), ("cart", 3)] {
            let address = format!("10.0.{net}.{last}");
            fake.set_answer(&format!("{dc}/v1/health/service/{service}"), 200, &[], &instances(&[&address]));
        }
        fake.set_answer(&format!("{dc}{STATE}"), 200, &[], &checks("passing"));
    }
    let more = ", datacenters: [dc1, dc2], max_connections: 6, services: {exclude: [consul]}";
    let mut source = fake.source_of(more, None);
    let others = "cart 10.0.1.3:80 10.0.2.3:80 fresh, orders 10.0.1.2:80 10.0.2.2:80 fresh";
    until(&mut source, &format!("{others}, pay 10.0.1.1:80 10.0.2.1:80 fresh")).await;
    assert!(source.plan.is_scarce);

    // A change in one datacenter is seen and does not affect the other.
    fake.set_answer(&format!("dc2 {PAY}"), 200, &[], &instances(&["10.0.2.9"]));
    fake.set_answer(&format!("dc2 {STATE}"), 200, &[], &checks("critical"));
    until(&mut source, &format!("{others}, pay 10.0.1.1:80 10.0.2.9:80 fresh")).await;

    // While the checks of one datacenter cannot be read, changes in the other are still found by its checks.
    fake.set_answer(&format!("dc2 {STATE}"), 403, &[], &json!("Permission denied"));
    fake.set_answer(PAY, 200, &[], &instances(&["10.0.1.9"]));
    fake.set_answer(STATE, 200, &[], &checks("critical"));
    let observed = until(&mut source, &format!("{others}, pay 10.0.1.9:80 10.0.2.9:80 fresh")).await;
    assert!(observed.iter().all(|line| line.contains("10.0.2.9:80")), "{observed:#?}");
}

#[tokio::test]
async fn services_have_queries_of_their_own_again_once_there_are_few_and_share_when_there_are_many() {
    let (fake, mut source) = three_services().await;
    until(&mut source, ALL_THREE).await;
    for round in 0..2 {
        assert!(source.plan.is_scarce, "round {round}");
        fake.set_answer(CATALOG, 200, &[], &json!({"consul": [], "pay": []}));
        until(&mut source, &format!("pay 10.0.{round}.1:80 fresh")).await;
        assert!(!source.plan.is_scarce, "round {round}");
        assert_eq!(source.plan.services.len(), 1);
        // No shared query shows this change: the service's own query finds it.
        fake.set_answer(STATE, 403, &[], &json!("Permission denied"));
        let next = format!("10.0.{}.1", round + 1);
        fake.set_answer(PAY, 200, &[], &instances(&[&next]));
        let observed = until(&mut source, &format!("pay {next}:80 fresh")).await;
        assert!(observed.iter().all(|line| !line.contains("stale")), "{observed:#?}");
        assert!(!source.plan.is_scarce);

        let all = json!([check("pay", "passing"), check("orders", "passing"), check("cart", "passing")]);
        fake.set_answer(STATE, 200, &[], &all);
        fake.set_answer(CATALOG, 200, &[], &json!({"consul": [], "pay": [], "orders": [], "cart": []}));
        until(&mut source, &format!("cart 10.0.0.3:80 fresh, orders 10.0.0.2:80 fresh, pay {next}:80 fresh"))
            .await;
    }
}
