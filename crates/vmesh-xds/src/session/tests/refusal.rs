use super::*;
use Kind::*;

fn rejected(envoy: &Envoy, kind: Kind) -> Vec<&str> {
    envoy.session.status().kinds[kind].rejected.keys().map(|name| &**name).collect()
}

#[test]
fn r12_only_an_error_makes_a_refusal() {
    let mut envoy = Envoy::connected_to("endpoints a=1 b=1");
    envoy.subscribe(Endpoint, &["a"]);
    envoy.expect_acked("endpoints a=1");
    envoy.subscribe(Endpoint, &["b"]);
    envoy.expect("endpoints b=1");
    envoy.nack(Endpoint, "");
    assert_eq!(rejected(&envoy, Endpoint), ["b"]);
}

#[test]
fn r13_a_refused_version_is_not_sent_again_until_it_changes() {
    let mut envoy = Envoy::connected_to("cluster payments=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect("cluster payments=1");
    envoy.nack(Cluster, "payments: unknown TLS context");
    assert_eq!(
        *envoy.state(),
        State::Rejected { reason: "cluster payments: payments: unknown TLS context".into() }
    );
    assert_eq!(envoy.session.status().generation_acked, 0);
    envoy.expect_silence_for(3600);
    envoy.server_has("cluster payments=1 users=1");
    envoy.expect_acked("cluster users=1");
    envoy.server_has("cluster payments=2 users=1");
    envoy.expect_acked("cluster payments=2");
    assert_eq!(*envoy.state(), State::Synced);
    assert_eq!(envoy.session.status().generation_acked, 3);
}

#[test]
fn r13_what_was_good_before_is_sent_when_it_is_back() {
    let mut envoy = Envoy::connected_to("cluster a=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect_acked("cluster a=1");
    envoy.server_has("cluster a=bad");
    envoy.expect("cluster a=bad");
    envoy.nack(Cluster, "a");
    envoy.server_has("cluster a=1");
    envoy.expect_acked("cluster a=1");
    assert_eq!(*envoy.state(), State::Synced);
    envoy.server_has("cluster a=bad");
    envoy.expect("cluster a=bad");
}

#[test]
fn r13_a_client_that_asks_again_for_what_it_refused_gets_what_was_good_before() {
    let mut envoy = Envoy::connected_to("cluster a=1 endpoints a=1 b=bad");
    envoy.subscribe(Endpoint, &["a"]);
    envoy.expect_acked("endpoints a=1");
    envoy.server_has("cluster a=1 endpoints a=bad b=bad");
    envoy.expect("endpoints a=bad");
    envoy.nack(Endpoint, "a: bad");
    envoy.subscribe(Endpoint, &["a"]);
    envoy.expect_acked("endpoints a=1");
    assert_eq!(rejected(&envoy, Endpoint), ["a"], "it still has not taken the present one");
    envoy.subscribe(Endpoint, &["b"]);
    envoy.expect("endpoints b=bad");
    envoy.nack(Endpoint, "b: bad");
    envoy.subscribe(Endpoint, &["b"]);
    envoy.expect_acked("endpoints b=empty");
    envoy.expect_silence();
}

#[test]
fn r14_a_refusal_may_ask_for_more() {
    let mut envoy = Envoy::connected_to("endpoints a=1 b=1");
    envoy.subscribe(Endpoint, &["a"]);
    envoy.expect("endpoints a=1");
    let response_nonce = envoy.nonces[&Endpoint].clone();
    envoy.send(DeltaDiscoveryRequest { response_nonce, error_detail: error("a"), ..delta(Endpoint, &["b"]) });
    envoy.expect_acked("endpoints b=1");
    envoy.expect_silence();
    assert_eq!(rejected(&envoy, Endpoint), ["a"]);
}

#[test]
fn r16_a_later_ack_clears_the_error() {
    let mut envoy = Envoy::connected_to("cluster a=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect("cluster a=1");
    envoy.nack(Cluster, "a: bad");
    assert_eq!(envoy.session.status().kinds[Cluster].last_error.as_deref(), Some("a: bad"));
    envoy.server_has("cluster a=2");
    envoy.expect_acked("cluster a=2");
    assert_eq!(envoy.session.status().kinds[Cluster].last_error, None);
    assert_eq!(*envoy.state(), State::Synced);
}

#[test]
fn r16_an_ack_of_what_was_left_meanwhile_is_accepted() {
    let mut envoy = Envoy::connected_to("endpoints a=1");
    envoy.subscribe(Endpoint, &["a"]);
    envoy.expect("endpoints a=1");
    envoy.subscribe(Endpoint, &["-a"]);
    envoy.ack(Endpoint);
    assert_eq!(*envoy.state(), State::Synced);
    envoy.subscribe(Endpoint, &["a"]);
    envoy.expect("endpoints a=1");
    envoy.subscribe(Endpoint, &["-a"]);
    envoy.nack(Endpoint, "a");
    assert_eq!(*envoy.state(), State::Synced);
}

#[test]
fn r17_what_the_error_does_not_name_is_sent_once_more_without_what_it_names() {
    let mut envoy = Envoy::connected_to("cluster a=1 bad=1 c=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect("cluster a=1 bad=1 c=1");
    envoy.nack(Cluster, "Error adding/updating cluster(s) bad: ring hash: minimum_ring_size (10)");
    assert_eq!(rejected(&envoy, Cluster), ["bad"]);
    envoy.expect_acked("cluster a=1 c=1");
    envoy.expect_silence_for(3600);
}

#[test]
fn r17_when_the_error_names_nothing_the_fault_is_searched_for() {
    let names: Vec<String> = (0..100).map(|i| format!("c{i:02}=1")).collect();
    let mut envoy = Envoy::connected_to(&format!("cluster {}", names.join(" ")));
    envoy.subscribe(Cluster, &[]);
    let mut responses = 0;
    while let Some(response) = envoy.receive() {
        responses += 1;
        match response.contains("c42=") {
            true => envoy.nack(Cluster, "Invalid duration"),
            false => envoy.ack(Cluster),
        }
    }
    assert_eq!(rejected(&envoy, Cluster), ["c42"]);
    assert!(responses < 20, "{responses}");
    envoy.expect_silence_for(3600);
}

#[test]
fn r17_a_client_that_refuses_everything_is_soon_left_alone() {
    let names: Vec<String> = (0..1000).map(|i| format!("c{i:03}=1")).collect();
    let mut envoy = Envoy::connected_to(&format!("cluster {}", names.join(" ")));
    envoy.subscribe(Cluster, &[]);
    let mut responses = 0;
    while envoy.receive().is_some() {
        responses += 1;
        envoy.nack(Cluster, "I am broken");
    }
    assert_eq!(rejected(&envoy, Cluster).len(), 1000);
    assert!(responses < 150, "{responses}");
    envoy.expect_silence_for(3600);
    envoy.server_has(&format!("cluster new=1 {}", names.join(" ")));
    envoy.expect_acked("cluster new=1");
}

#[test]
fn a_short_name_is_not_found_in_a_longer_one() {
    for (text, name) in [
        ("cluster orders: bad", "orders"),
        ("orders", "orders"),
        ("no good: 'orders|v2'.", "orders|v2"),
        ("listener(s) outbound|10.0.0.1:80: duplicate", "outbound|10.0.0.1:80"),
        ("(orders)", "orders"),
        ("orders.", "orders"),
    ] {
        assert!(mentions(text, name), "{text} / {name}");
    }
    for (text, name) in [
        ("cluster orders|v2: bad", "orders"),
        ("my-orders: bad", "orders"),
        ("orders_2", "orders"),
        ("orders.eu", "orders"),
        ("outbound|10.0.0.1:80", "outbound|10.0.0.1:8"),
        ("anything", ""),
        ("äorders", "orders"),
    ] {
        assert!(!mentions(text, name), "{text} / {name}");
    }
}

#[test]
fn an_endless_error_text_is_cut() {
    let mut envoy = Envoy::connected_to("cluster a=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect("cluster a=1");
    envoy.nack(Cluster, &"ä".repeat(1 << 20));
    let status = envoy.session.status();
    assert!(status.kinds[Cluster].last_error.as_ref().unwrap().len() <= 4096);
}
