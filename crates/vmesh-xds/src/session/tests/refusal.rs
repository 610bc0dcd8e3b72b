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
fn a_name_is_blamed_only_where_a_name_stands() {
    for (kind, text, name) in [
        (Cluster, "Error adding/updating cluster(s) orders: bad", "orders"),
        (Cluster, "Error adding/updating cluster(s) a: bad, orders|v2: worse", "orders|v2"),
        (
            Listener,
            "Error adding/updating listener(s) outbound|10.0.0.1:80: duplicate\n",
            "outbound|10.0.0.1:80",
        ),
        (Listener, "Error adding/updating listener(s) a: bad\nb: worse\n", "b"),
        (Route, "xDS response validation errors: [resource index 12: orders: INVALID_ARGUMENT]", "orders"),
        (
            Route,
            "xDS response validation errors: [resource index 1: a: x; resource index 2: orders: y]",
            "orders",
        ),
        (Endpoint, "orders", "orders"),
        (Endpoint, "orders: bad", "orders"),
        // A service may have any name, also `cluster`.
        (Cluster, "Error adding/updating cluster(s) cluster: bad", "cluster"),
    ] {
        assert!(blames(kind, text, name), "{text} / {name}");
    }
    for (kind, text, name) in [
        (Cluster, "Error adding/updating cluster(s) bad: no such cluster", "cluster"),
        (Cluster, "Error adding/updating cluster(s) bad: ring hash: minimum_ring_size (10)", "hash"),
        (Cluster, "Error adding/updating cluster(s) bad: ring hash: minimum_ring_size (10)", "ring"),
        (Cluster, "Error adding/updating cluster(s) bad: ring hash: minimum_ring_size (10)", "Error"),
        (Cluster, "Error adding/updating cluster(s) orders|v2: bad", "orders"),
        (Cluster, "Error adding/updating cluster(s) my-orders: bad", "orders"),
        (Listener, "Error adding/updating cluster(s) orders: bad", "orders"),
        (Route, "Error adding/updating cluster(s) orders: bad", "orders"),
        (Route, "route: unknown cluster 'orders'", "orders"),
        (Route, "route: unknown cluster 'orders'", "cluster"),
        (Listener, "Error adding/updating listener(s) outbound|10.0.0.1:80: bad", "outbound|10.0.0.1:8"),
        (Cluster, "Only 3 of orders: bad", "orders"),
        (Cluster, "anything", ""),
        (Cluster, ": ", ""),
    ] {
        assert!(!blames(kind, text, name), "{text} / {name}");
    }
}

#[test]
fn a_refused_removal_is_not_sent_again_until_there_was_something_else() {
    let mut envoy = Envoy::connected_to("cluster a=1 b=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect_acked("cluster a=1 b=1");
    envoy.server_has("cluster b=2");
    envoy.expect("cluster b=2 -a");
    envoy.nack(Cluster, "CDS update attempts to reduce clusters below configured minimum.");
    let mut responses = 0;
    while let Some(response) = envoy.receive() {
        responses += 1;
        match response.contains("-a") {
            true => envoy.nack(Cluster, "CDS update attempts to reduce clusters below configured minimum."),
            false => envoy.ack(Cluster),
        }
    }
    assert_eq!(responses, 2);
    assert_eq!(rejected(&envoy, Cluster), ["a"]);
    let reason =
        "cluster a cannot be removed: CDS update attempts to reduce clusters below configured minimum.";
    assert_eq!(*envoy.state(), State::Rejected { reason: reason.into() });
    envoy.expect_silence_for(3600);
    envoy.server_has("cluster b=3");
    envoy.expect_acked("cluster b=3");
    assert_eq!(rejected(&envoy, Cluster), ["a"]);
    // The cluster exists again, and is then removed once more.
    envoy.server_has("cluster a=1 b=3");
    envoy.expect_acked("cluster a=1");
    assert_eq!(*envoy.state(), State::Synced);
    envoy.server_has("cluster b=3");
    envoy.expect_acked("cluster -a");
    assert_eq!(*envoy.state(), State::Synced);
}

#[test]
fn that_there_is_none_may_be_refused_as_well() {
    let mut envoy = Envoy::connected_to("cluster a=1");
    envoy.subscribe(Route, &["r"]);
    envoy.expect("route -r");
    envoy.nack(Route, "no");
    envoy.expect_silence_for(3600);
    envoy.server_has("cluster a=1 route r=1");
    envoy.expect_acked("route r=1");
    assert_eq!(*envoy.state(), State::Synced);
}

#[test]
fn a_set_without_a_refused_removal_is_sent_and_an_empty_set_is_refused_once() {
    let mut envoy = Envoy::sotw_connected_to("cluster a=1 b=1");
    envoy.names(Cluster, &[]);
    envoy.expect_acked("cluster a=1 b=1");
    envoy.server_has("cluster b=1");
    envoy.expect("cluster b=1");
    envoy.sotw_nack(Cluster, &[], "fewer than the minimum");
    envoy.expect_silence_for(3600);
    assert_eq!(rejected(&envoy, Cluster), ["a"]);
    envoy.server_has("cluster b=2");
    envoy.expect_acked("cluster a=1 b=2");

    let mut envoy = Envoy::sotw_connected_to("");
    envoy.names(Cluster, &[]);
    envoy.expect("cluster");
    envoy.sotw_nack(Cluster, &[], "fewer than the minimum");
    envoy.expect_silence_for(3600);
    assert_eq!(
        *envoy.state(),
        State::Rejected { reason: "cluster, all there is: fewer than the minimum".into() }
    );
    envoy.server_has("cluster b=2");
    envoy.expect_acked("cluster b=2");
    assert_eq!(*envoy.state(), State::Synced);
}

#[test]
fn an_agent_says_what_is_refused_and_the_rest_is_taken() {
    let mut envoy = Envoy::connected_to("cluster a=1 b=1 cluster=1 d=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect_acked("cluster a=1 b=1 cluster=1 d=1");
    envoy.server_has("cluster a=2 b=2 cluster=2");
    envoy.expect("cluster a=2 b=2 cluster=2 -d");
    let refusal = |name: &str, version: String, removal: bool| agent::Refusal {
        name: name.into(),
        version,
        reason: format!("{name} is bad: no such cluster"),
        removal,
    };
    let refusals = agent::Refusals {
        refusals: vec![
            refusal("a", "another version".into(), false),
            refusal("b", envoy.version(Cluster, "b"), false),
            refusal("d", String::new(), true),
        ],
        others_taken: true,
    };
    let error_detail = Some(rpc::Status {
        code: 3,
        message: "Error adding/updating cluster(s) cluster: words mean nothing then".into(),
        details: vec![vmesh_proto::any(&refusals)],
    });
    let response_nonce = envoy.nonces[&Cluster].clone();
    envoy.send(DeltaDiscoveryRequest { response_nonce, error_detail, ..delta(Cluster, &["-never"]) });
    assert_eq!(rejected(&envoy, Cluster), ["b", "d"]);
    let of_b = &envoy.session.status().kinds[Cluster].rejected["b"];
    assert_eq!(&*of_b.reason, "b is bad: no such cluster");
    envoy.expect_silence_for(3600);
    envoy.server_has("cluster a=2 b=3 cluster=2");
    envoy.expect_acked("cluster b=3");
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
