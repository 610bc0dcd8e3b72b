use super::*;
use Kind::*;

#[test]
fn r01_the_node_is_needed_once() {
    let mut envoy = Envoy::connected_to("cluster a=1 listener l=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect_acked("cluster a=1");
    envoy.subscribe(Listener, &[]);
    envoy.expect("listener l=1");
}

#[test]
fn r02_a_first_request_without_a_node_ends_the_stream() {
    let mut envoy = Envoy::connected_to("");
    envoy.introduced = true;
    assert_eq!(envoy.try_send(delta(Cluster, &[])), Err(SessionError::NoNode));
    let nameless = DeltaDiscoveryRequest { node: Some(Node::default()), ..delta(Cluster, &[]) };
    assert_eq!(envoy.try_send(nameless), Err(SessionError::NoNode));
    assert_eq!(SessionError::NoNode.code(), 3, "INVALID_ARGUMENT");
}

#[test]
fn r03_any_kind_may_come_first() {
    let mut envoy = Envoy::connected_to("cluster a=1 endpoints a=1 secret s=1");
    envoy.subscribe(Secret, &["s"]);
    envoy.expect_acked("secret s=1");
    envoy.subscribe(Endpoint, &["a"]);
    envoy.expect_acked("endpoints a=1");
    envoy.reconnect();
    envoy.subscribe(Endpoint, &["a"]);
    envoy.expect("endpoints a=1");
}

#[test]
fn r04_a_request_without_a_type_ends_the_stream_and_an_unknown_type_does_not() {
    let mut envoy = Envoy::connected_to("cluster a=1");
    let banana =
        DeltaDiscoveryRequest { type_url: "type.googleapis.com/Banana".into(), ..delta(Cluster, &["x"]) };
    envoy.send(banana);
    envoy.expect_silence();
    assert_eq!(envoy.session.status().unknown_types, 1);
    envoy.subscribe(Cluster, &[]);
    envoy.expect_acked("cluster a=1");
    let typeless = DeltaDiscoveryRequest { type_url: String::new(), ..delta(Cluster, &[]) };
    assert_eq!(envoy.try_send(typeless), Err(SessionError::NoTypeUrl));
}

#[test]
fn r05_each_kind_has_its_own_nonces_and_may_be_acked_in_any_order() {
    let mut envoy = Envoy::connected_to("cluster a=1 endpoints a=1 secret s=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect("cluster a=1");
    envoy.subscribe(Endpoint, &["a"]);
    envoy.subscribe(Secret, &["s"]);
    envoy.expect("endpoints a=1");
    envoy.expect("secret s=1");
    let nonces: std::collections::BTreeSet<_> = envoy.nonces.values().cloned().collect();
    assert_eq!(nonces.len(), 3);
    assert!(!nonces.contains(""));
    for kind in [Secret, Cluster, Endpoint] {
        assert_eq!(*envoy.state(), State::Pushing);
        envoy.ack(kind);
    }
    assert_eq!(*envoy.state(), State::Synced);
}

#[test]
fn r06_an_ack_that_comes_at_once_is_never_stale() {
    let mut envoy = Envoy::connected_to("");
    envoy.subscribe(Cluster, &[]);
    envoy.expect_acked("cluster");
    for i in 0..1000 {
        envoy.server_has(&format!("cluster a={i}"));
        envoy.expect_acked(&format!("cluster a={i}"));
        assert_eq!(*envoy.state(), State::Synced);
    }
    assert_eq!(envoy.session.status().kinds[Cluster].acks, 1001);
}

#[test]
fn r07_a_nonce_of_an_earlier_stream_means_nothing() {
    let mut envoy = Envoy::connected_to("cluster a=1");
    let old = DeltaDiscoveryRequest { response_nonce: "1".into(), ..delta(Cluster, &[]) };
    envoy.send(old.clone());
    envoy.expect("cluster a=1");
    envoy.send(DeltaDiscoveryRequest { response_nonce: "77".into(), ..delta(Cluster, &["-never"]) });
    assert_eq!(*envoy.state(), State::Pushing);
    envoy.ack(Cluster);
    assert_eq!(*envoy.state(), State::Synced);
}

#[test]
fn r08_a_version_that_the_server_never_had_is_simply_another_version() {
    let mut envoy = Envoy::connected_to("cluster a=1 b=1 c=1");
    let held = [("a", "banana".into()), ("b", "17".into()), ("c", envoy.version(Cluster, "c"))];
    envoy.resume(Cluster, &[], &held);
    envoy.expect("cluster a=1 b=1");
}

#[test]
fn r09_a_restarted_server_sends_nothing_that_the_client_has() {
    let world = "cluster a=1 endpoints a=1 listener l=1 route r=1 secret s=1";
    let mut envoy = Envoy::connected_to(world);
    let version = |kind, name| resource(kind, name, "1").version().to_owned();
    envoy.resume(Cluster, &[], &[("a", version(Cluster, "a"))]);
    envoy.resume(Endpoint, &["a"], &[("a", version(Endpoint, "a"))]);
    envoy.resume(Listener, &[], &[("l", version(Listener, "l"))]);
    envoy.resume(Route, &["r"], &[("r", version(Route, "r"))]);
    envoy.resume(Secret, &["s"], &[("s", version(Secret, "s"))]);
    envoy.expect_silence_for(3600);
    assert_eq!(*envoy.state(), State::Synced);
    assert_eq!(envoy.session.status().generation_acked, 1);
}

#[test]
fn r09_a_client_that_resumes_before_there_is_a_snapshot_is_sent_nothing_that_it_has() {
    let mut envoy = Envoy::connected_to("cluster a=1 endpoints a=1 listener l=2");
    let version = |kind, name| resource(kind, name, "1").version().to_owned();
    envoy.session = Session::delta("vmesh test");
    envoy.resume(Cluster, &[], &[("a", version(Cluster, "a"))]);
    envoy.resume(Endpoint, &["a"], &[("a", version(Endpoint, "a"))]);
    envoy.resume(Listener, &[], &[("l", version(Listener, "l"))]);
    envoy.expect_silence_for(5);
    assert_eq!(*envoy.state(), State::Pushing, "nobody knows yet whether it has what it is to have");
    envoy.show();
    envoy.expect_acked("listener l=2");
    envoy.expect_silence_for(3600);
    assert_eq!(*envoy.state(), State::Synced);
}

#[test]
fn r11_a_stale_nonce_does_not_hold_back_a_subscription() {
    let mut envoy = Envoy::connected_to("endpoints a=1 b=1");
    envoy.subscribe(Endpoint, &["a"]);
    envoy.expect_acked("endpoints a=1");
    envoy.send(DeltaDiscoveryRequest { response_nonce: "0".into(), ..delta(Endpoint, &["b"]) });
    envoy.expect("endpoints b=1");
}

#[test]
fn r15_a_kind_that_was_never_asked_for_is_not_behind() {
    let mut envoy = Envoy::connected_to("cluster a=1 listener l=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect("cluster a=1");
    let status = envoy.session.status();
    assert!(status.kinds[Cluster].subscribed && status.kinds[Cluster].in_flight_since.is_some());
    assert!(!status.kinds[Listener].subscribed && status.kinds[Listener].last_sent.is_none());
    assert_eq!(status.generation_acked, 0);
    envoy.passes(1);
    envoy.ack(Cluster);
    let status = envoy.session.status();
    assert_eq!(status.kinds[Cluster].last_acked, Some(envoy.now));
    assert_eq!(status.generation_acked, 1);
}

#[test]
fn r18_what_was_not_answered_is_answered_when_it_can_be() {
    let mut envoy = Envoy::connected_to("");
    envoy.subscribe(Secret, &["s"]);
    envoy.expect_silence();
    envoy.server_has("secret s=1");
    envoy.expect("secret s=1");
}

#[test]
fn r19_nothing_is_sent_when_nothing_changed() {
    let mut envoy = Envoy::connected_to("cluster a=1 endpoints a=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect_acked("cluster a=1");
    envoy.subscribe(Endpoint, &["a"]);
    envoy.expect_acked("endpoints a=1");
    envoy.expect_silence_for(3600);
    envoy.server_has("cluster a=1 endpoints a=1");
    envoy.show();
    envoy.expect_silence_for(3600);
}

#[test]
fn r20_a_slow_client_gets_the_latest_and_not_what_it_missed() {
    let mut envoy = Envoy::connected_to("cluster a=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect("cluster a=1");
    for i in 2..100 {
        envoy.server_has(&format!("cluster a={i} b={i}"));
        envoy.expect_silence();
    }
    envoy.server_has("cluster a=100");
    envoy.ack(Cluster);
    envoy.expect_acked("cluster a=100");
    envoy.expect_silence();
}

#[test]
fn r20_a_client_that_never_acks_is_still_served_every_thirty_seconds() {
    let mut envoy = Envoy::connected_to("cluster a=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect("cluster a=1");
    for i in 2..50 {
        envoy.server_has(&format!("cluster a={i}"));
        envoy.expect_silence_for(29);
        envoy.passes(1);
        assert_eq!(envoy.session.poll_timeout(), Some(envoy.now));
        envoy.expect(&format!("cluster a={i}"));
    }
    assert!(envoy.session.subscriptions[Cluster].in_flight.len() <= 4, "memory stays flat");
    envoy.ack(Cluster);
    assert_eq!(*envoy.state(), State::Synced, "the last ACK says it all");
}

#[test]
fn r20_a_client_that_asks_for_more_need_not_ack_first() {
    let mut envoy = Envoy::connected_to("endpoints a=1 b=1");
    envoy.subscribe(Endpoint, &["a"]);
    envoy.expect("endpoints a=1");
    envoy.subscribe(Endpoint, &["b"]);
    envoy.expect("endpoints b=1");
}

#[test]
fn r21_only_clusters_and_listeners_come_without_a_name() {
    let mut envoy =
        Envoy::connected_to("cluster a=1 endpoints a=1 filter f=1 listener l=1 route r=1 secret s=1");
    for kind in [Endpoint, ExtensionConfig, Route, Secret] {
        envoy.subscribe(kind, &[]);
        envoy.subscribe(kind, &["*"]);
    }
    envoy.expect_silence_for(3600);
    envoy.subscribe(Cluster, &[]);
    envoy.expect_acked("cluster a=1");
    envoy.subscribe(Listener, &[]);
    envoy.expect("listener l=1");
}

#[test]
fn r21_all_of_nothing_is_answered_too() {
    let mut envoy = Envoy::connected_to("");
    envoy.subscribe(Cluster, &[]);
    envoy.expect_acked("cluster");
    envoy.subscribe(Listener, &[]);
    envoy.expect_acked("listener");
    envoy.expect_silence();
}

#[test]
fn r22_a_star_may_come_with_names() {
    let mut envoy = Envoy::connected_to("cluster a=1 b=1");
    envoy.subscribe(Cluster, &["*", "a"]);
    envoy.expect_acked("cluster a=1 b=1");
    envoy.subscribe(Cluster, &["-*"]);
    envoy.server_has("cluster a=2 b=2");
    envoy.expect_acked("cluster a=2");
    envoy.subscribe(Cluster, &["-a"]);
    envoy.server_has("cluster a=3 b=3");
    envoy.expect_silence();
}

#[test]
fn r23_a_name_added_to_all_outlives_it() {
    let mut envoy = Envoy::connected_to("cluster a=1 b=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect_acked("cluster a=1 b=1");
    envoy.subscribe(Cluster, &["a"]);
    envoy.expect_acked("cluster a=1");
    envoy.server_has("cluster a=2 b=2");
    envoy.expect_acked("cluster a=2 b=2");
    envoy.subscribe(Cluster, &["-*"]);
    envoy.server_has("cluster a=3 b=3");
    envoy.expect_acked("cluster a=3");
    envoy.subscribe(Cluster, &["-a"]);
    envoy.server_has("cluster a=4 b=4");
    envoy.expect_silence();
}

#[test]
fn r24_a_name_taken_back_from_all_is_answered() {
    let mut envoy = Envoy::connected_to("cluster a=1");
    envoy.subscribe(Cluster, &["*", "a", "ghost"]);
    envoy.expect_acked("cluster a=1 -ghost");
    envoy.subscribe(Cluster, &["-a", "-ghost"]);
    envoy.expect_acked("cluster a=1 -ghost");
    envoy.expect_silence();
    envoy.server_has("cluster a=2 ghost=2");
    envoy.expect("cluster a=2 ghost=2");
}

#[test]
fn r25_a_name_asked_for_again_is_sent_again() {
    let mut envoy = Envoy::connected_to("endpoints a=1 b=1");
    envoy.subscribe(Endpoint, &["a", "b"]);
    envoy.expect_acked("endpoints a=1 b=1");
    envoy.subscribe(Endpoint, &["a"]);
    envoy.expect_acked("endpoints a=1");
    envoy.subscribe(Endpoint, &["-a", "a"]);
    envoy.expect_acked("endpoints a=1");
    envoy.expect_silence();
}

#[test]
fn r29_what_did_not_exist_is_sent_when_it_does() {
    let mut envoy = Envoy::connected_to("");
    envoy.subscribe(Cluster, &["z"]);
    envoy.expect_acked("cluster -z");
    envoy.subscribe(Route, &["r"]);
    envoy.expect_acked("route -r");
    envoy.server_has("cluster z=1 route r=1");
    envoy.expect_acked("cluster z=1");
    envoy.expect_acked("route r=1");
}

#[test]
fn r30_that_something_does_not_exist_is_told_once() {
    let mut envoy = Envoy::connected_to("cluster known=1");
    envoy.subscribe(Cluster, &["x"]);
    envoy.expect_acked("cluster -x");
    envoy.subscribe(Endpoint, &["known", "x"]);
    envoy.expect_acked("endpoints known=empty -x");
    envoy.subscribe(Listener, &["x"]);
    envoy.expect_acked("listener -x");
    envoy.subscribe(Route, &["x"]);
    envoy.expect_acked("route -x");
    envoy.subscribe(Secret, &["x"]);
    envoy.expect_silence_for(3600);
}

#[test]
fn r30_a_secret_in_use_is_never_removed() {
    let mut envoy = Envoy::connected_to("secret s=1");
    envoy.subscribe(Secret, &["s"]);
    envoy.expect_acked("secret s=1");
    envoy.server_has("");
    envoy.expect_silence_for(3600);
    envoy.server_has("secret s=1");
    envoy.expect_silence();
    envoy.server_has("secret s=2");
    envoy.expect("secret s=2");
}

#[test]
fn r31_endpoints_that_are_missing_are_answered_at_once_and_sent_when_they_come() {
    let mut envoy = Envoy::connected_to("cluster a=1");
    envoy.subscribe(Endpoint, &["a"]);
    envoy.expect_acked("endpoints a=empty");
    envoy.server_has("cluster a=1 endpoints a=1");
    envoy.expect_acked("endpoints a=1");
    envoy.server_has("cluster a=1");
    envoy.expect_acked("endpoints a=empty");
    envoy.expect_silence();
}

#[test]
fn r32_nothing_is_sent_of_a_kind_that_is_no_longer_asked_for() {
    let mut envoy = Envoy::connected_to("endpoints a=1");
    envoy.subscribe(Endpoint, &["a"]);
    envoy.expect_acked("endpoints a=1");
    envoy.subscribe(Endpoint, &["-a"]);
    envoy.server_has("endpoints a=2");
    envoy.expect_silence();
    envoy.server_has("");
    envoy.expect_silence_for(3600);
}

#[test]
fn r33_what_the_client_left_meanwhile_is_not_sent() {
    let mut envoy = Envoy::connected_to("endpoints a=1 b=1");
    envoy.subscribe(Endpoint, &["a", "b"]);
    envoy.expect("endpoints a=1 b=1");
    envoy.server_has("endpoints a=2 b=2");
    envoy.subscribe(Endpoint, &["-a"]);
    envoy.ack(Endpoint);
    envoy.expect("endpoints b=2");
}

#[test]
fn r35_what_a_client_may_not_see_does_not_exist_for_it() {
    let mut envoy = Envoy::connected_to("cluster a=1 b=1 endpoints a=1 b=1 secret b=1");
    envoy.server_lets_see(Scope::named(["a"]));
    envoy.subscribe(Cluster, &["*", "b"]);
    envoy.expect_acked("cluster a=1 -b");
    envoy.subscribe(Endpoint, &["a", "b"]);
    envoy.expect_acked("endpoints a=1 -b");
    envoy.subscribe(Secret, &["b"]);
    envoy.expect_silence();
    envoy.server_lets_see(Scope::named(["a", "b"]));
    envoy.expect_acked("cluster b=1");
    envoy.expect_acked("endpoints b=1");
    envoy.expect_acked("secret b=1");
    envoy.server_lets_see(Scope::named(["a"]));
    envoy.expect_acked("cluster -b");
    envoy.expect_acked("endpoints -b");
    envoy.expect_silence();
}

#[test]
fn r35_resources_of_its_own_reach_one_client() {
    let mut envoy = Envoy::connected_to("cluster a=1");
    envoy
        .server_lets_see(Scope::all().with_own([resource(Secret, "id", "1"), resource(Cluster, "a", "own")]));
    envoy.subscribe(Cluster, &[]);
    envoy.expect_acked("cluster a=own");
    envoy.subscribe(Secret, &["id"]);
    envoy.expect_acked("secret id=1");
    envoy.server_has("cluster a=2");
    envoy.expect_silence();
    envoy.server_lets_see(Scope::all().with_own([resource(Secret, "id", "2")]));
    envoy.expect_acked("cluster a=2");
    envoy.expect_acked("secret id=2");
}

#[test]
fn r36_to_leave_what_one_never_had_is_nothing() {
    let mut envoy = Envoy::connected_to("cluster a=1 endpoints a=1");
    envoy.subscribe(Endpoint, &["-a", "-x"]);
    envoy.expect_silence();
    envoy.subscribe(Cluster, &[]);
    envoy.expect_acked("cluster a=1");
    envoy.subscribe(Cluster, &["-a", "-x"]);
    envoy.expect_silence();
}

#[test]
fn r37_what_went_away_while_the_client_was_away_is_removed() {
    let mut envoy = Envoy::connected_to("cluster a=1");
    envoy.resume(Cluster, &[], &[("a", envoy.version(Cluster, "a")), ("x", "1".into())]);
    envoy.expect_silence();
    assert_eq!(
        envoy.session.poll_timeout(),
        Some(envoy.now + Duration::from_secs(1)),
        "first see what refers to it"
    );
    envoy.passes(1);
    envoy.expect_acked("cluster -x");
    envoy.expect_silence();
    assert_eq!(*envoy.state(), State::Synced);
}

#[test]
fn r37_a_listener_moves_before_the_cluster_that_it_used_is_removed() {
    let mut envoy = Envoy::connected_to("listener l=2");
    envoy.resume(Cluster, &[], &[("x", "1".into())]);
    envoy.expect_silence();
    envoy.resume(Listener, &[], &[("l", "1".into())]);
    envoy.expect("listener l=2");
    envoy.expect_silence_for(2);
    envoy.ack(Listener);
    envoy.expect("cluster -x");
}

#[test]
fn r38_after_a_restart_the_endpoints_follow_the_next_change_of_their_cluster() {
    let mut envoy = Envoy::connected_to("cluster a=1 endpoints a=1");
    envoy.resume(Cluster, &[], &[("a", envoy.version(Cluster, "a"))]);
    envoy.resume(Endpoint, &["a"], &[("a", envoy.version(Endpoint, "a"))]);
    envoy.expect_silence();
    envoy.server_has("cluster a=2 endpoints a=1");
    envoy.expect("cluster a=2");
    envoy.expect("endpoints a=1");
}

#[test]
fn r39_versions_that_come_later_are_not_believed() {
    let mut envoy = Envoy::connected_to("endpoints a=1 b=1");
    envoy.subscribe(Endpoint, &["a"]);
    envoy.expect_acked("endpoints a=1");
    envoy.resume(Endpoint, &["b"], &[("b", envoy.version(Endpoint, "b"))]);
    envoy.expect("endpoints b=1");
}

#[test]
fn r40_one_change_in_a_thousand_is_one_resource() {
    let world = |changed: usize| {
        (0..1000)
            .map(|i| format!("c{i:03}={}", if i == 7 { changed } else { 1 }))
            .collect::<Vec<_>>()
            .join(" ")
    };
    let mut envoy = Envoy::connected_to(&format!("cluster {}", world(1)));
    envoy.subscribe(Cluster, &[]);
    envoy.expect_acked(&format!("cluster {}", world(1)));
    let encoded = crate::encodings();
    envoy.server_has(&format!("cluster {}", world(2)));
    envoy.expect_acked("cluster c007=2");
    envoy.expect_silence();
    assert!(crate::encodings() - encoded < 100, "other tests may run meanwhile");
}

#[test]
fn r41_a_resource_that_went_and_came_back_is_only_sent() {
    let mut envoy = Envoy::connected_to("cluster a=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect_acked("cluster a=1");
    envoy.server_has("");
    envoy.server_has("cluster a=2");
    envoy.expect_acked("cluster a=2");
    envoy.server_has("");
    envoy.server_has("cluster a=2");
    envoy.expect_silence();
    envoy.server_has("");
    envoy.expect_acked("cluster -a");
    envoy.server_has("cluster a=2");
    envoy.expect_acked("cluster a=2");
    envoy.expect_silence();
}

#[test]
fn r42_a_name_asked_for_twice_is_sent_once() {
    let mut envoy = Envoy::connected_to("endpoints a=1");
    envoy.subscribe(Endpoint, &["a", "a", "a"]);
    envoy.expect_acked("endpoints a=1");
    envoy.expect_silence();
}

#[test]
fn r44_a_cluster_asked_for_on_demand_is_answered_at_once_whether_it_exists_or_not() {
    let mut envoy = Envoy::connected_to("cluster a=1");
    envoy.subscribe(Cluster, &["a"]);
    envoy.expect_acked("cluster a=1");
    envoy.subscribe(Cluster, &["b"]);
    envoy.expect_acked("cluster -b");
}

#[test]
fn r49_secrets_need_no_clusters() {
    let mut envoy = Envoy::connected_to("cluster a=1 secret s=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect("cluster a=1");
    envoy.subscribe(Secret, &["s"]);
    envoy.expect("secret s=1");
}

#[test]
fn r50_endpoints_of_a_static_cluster_are_kept_up_to_date() {
    let mut envoy = Envoy::connected_to("endpoints static=1");
    envoy.subscribe(Endpoint, &["static"]);
    envoy.expect_acked("endpoints static=1");
    envoy.subscribe(Endpoint, &["other"]);
    envoy.expect_acked("endpoints -other");
    envoy.server_has("endpoints static=2");
    envoy.expect_acked("endpoints static=2");
}

#[test]
fn r51_before_there_is_a_snapshot_there_is_no_answer() {
    let mut session = Session::delta("vmesh test");
    let now = Instant::now();
    let node = Some(Node { id: "web-1".into(), ..Node::default() });
    session.on_request(now, DeltaDiscoveryRequest { node, ..delta(Cluster, &[]) }).unwrap();
    assert!(session.poll_response(now).is_none());
    assert_eq!(session.status().state, State::Pushing);
    let store = Store::default().apply([("a".into(), Some(Group::new("a", [resource(Cluster, "a", "1")])))]);
    session.on_snapshot(now, Snapshot { store: Arc::new(store), scope: Arc::new(Scope::all()) });
    assert_eq!(session.poll_response(now).unwrap().resources, 1);
}

#[test]
fn r51_a_store_that_does_not_know_says_nothing() {
    let mut envoy = Envoy::connected_to("");
    envoy.store = Store::partial();
    envoy.show();
    envoy.subscribe(Cluster, &[]);
    envoy.subscribe(Endpoint, &["a"]);
    envoy.subscribe(Route, &["r"]);
    envoy.expect_silence_for(3600);
    let reported = [resource(Cluster, "a", "1"), Resource::absent(Cluster, "*")];
    envoy.store = envoy.store.apply([("told".into(), Some(Group::new("told", reported)))]);
    envoy.show();
    envoy.expect_acked("cluster a=1");
    envoy.expect_silence_for(3600);
    let reported = Group::new("more", [resource(Endpoint, "a", "1"), Resource::absent(Route, "r")]);
    envoy.store = envoy.store.apply([("more".into(), Some(reported))]);
    envoy.show();
    envoy.expect_acked("endpoints a=1");
    envoy.expect_acked("route -r");
}

#[test]
fn r51_a_store_that_has_all_knows_what_there_is_not() {
    let mut envoy = Envoy::connected_to("");
    envoy.store = Store::partial();
    envoy.show();
    envoy.subscribe(Cluster, &["a"]);
    envoy.expect_silence_for(3600);
    let all = Group::new("all", [Resource::absent(Cluster, "*")]);
    envoy.store = envoy.store.apply([("all".into(), Some(all))]);
    envoy.show();
    envoy.expect_acked("cluster -a");
}

#[test]
fn r51_a_store_that_gives_up_answers_what_is_left() {
    let mut envoy = Envoy::connected_to("");
    envoy.store = Store::partial();
    envoy.show();
    envoy.subscribe(Cluster, &[]);
    envoy.subscribe(Route, &["r"]);
    envoy.expect_silence();
    envoy.store = envoy.store.complete();
    envoy.show();
    envoy.expect_acked("cluster");
    envoy.expect_acked("route -r");
}

#[test]
fn r59_a_large_answer_comes_in_parts() {
    let long = "x".repeat(500_000);
    let names = ["a", "b", "c", "d", "e", "f", "g"];
    let world: String = names.map(|name| format!("{name}={long} ")).concat();
    let mut envoy = Envoy::connected_to(&format!("cluster {world}"));
    envoy.subscribe(Cluster, &[]);
    envoy.expect_acked("cluster a=long b=long c=long d=long");
    assert_eq!(envoy.session.status().generation_acked, 0);
    envoy.expect_acked("cluster e=long f=long g=long");
    envoy.expect_silence();
    assert_eq!(envoy.session.status().generation_acked, 1);
}

#[test]
fn r59_names_without_end_are_refused() {
    let mut envoy = Envoy::connected_to("");
    let request = |from: usize, to: usize| DeltaDiscoveryRequest {
        resource_names_subscribe: (from..to).map(|i| format!("name-{i}")).collect(),
        ..delta(Endpoint, &[])
    };
    envoy.send(request(0, 10_000));
    envoy.send(request(0, 100_000));
    assert_eq!(
        envoy.try_send(request(100_000, 100_001)),
        Err(SessionError::TooManyNames { kind: Endpoint, limit: 100_000 })
    );
    assert_eq!(SessionError::TooManyNames { kind: Endpoint, limit: 1 }.code(), 8, "RESOURCE_EXHAUSTED");

    let mut envoy = Envoy::connected_to("");
    let long = (0..20).map(|i| format!("{i}{}", "x".repeat(1 << 20))).collect();
    let request = DeltaDiscoveryRequest { resource_names_subscribe: long, ..delta(Endpoint, &[]) };
    assert!(matches!(envoy.try_send(request), Err(SessionError::NamesTooLong { .. })));

    let mut envoy = Envoy::connected_to("");
    let held: Vec<_> = (0..100_001).map(|i| (format!("name-{i}"), "1".to_owned())).collect();
    let request = DeltaDiscoveryRequest {
        initial_resource_versions: held.into_iter().collect(),
        ..delta(Cluster, &[])
    };
    assert!(matches!(envoy.try_send(request), Err(SessionError::TooManyNames { .. })));
}

#[test]
fn small_resources_travel_in_one_frame_and_large_ones_are_not_copied() {
    let long = "x".repeat(10_000);
    let mut envoy = Envoy::connected_to(&format!("cluster a=1 b=1 c={long} d=1"));
    envoy.subscribe(Cluster, &[]);
    let frames = envoy.session.poll_response(envoy.now).unwrap().into_frames();
    assert_eq!(frames.len(), 3);
    let shared = envoy.store.get(Cluster, "c").unwrap().delta();
    assert_eq!(frames[1].as_ptr(), shared.as_ptr());
}

#[test]
fn a_change_is_acked_when_all_that_concerns_the_client_is() {
    let mut envoy = Envoy::connected_to("cluster a=1 endpoints a=1 b=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect_acked("cluster a=1");
    envoy.subscribe(Endpoint, &["a"]);
    envoy.expect_acked("endpoints a=1");
    assert_eq!(envoy.session.status().generation_acked, 1);

    envoy.server_has("cluster a=1 endpoints a=2 b=1");
    assert_eq!(envoy.session.status().generation_acked, 1);
    envoy.expect("endpoints a=2");
    envoy.server_has("cluster a=1 endpoints a=3 b=1");
    assert_eq!(envoy.session.status().generation_acked, 1);
    envoy.ack(Endpoint);
    assert_eq!(envoy.session.status().generation_acked, 2);
    envoy.expect_acked("endpoints a=3");
    assert_eq!(envoy.session.status().generation_acked, 3);

    envoy.server_has("cluster a=1 endpoints a=3 b=2");
    assert_eq!(envoy.session.status().generation_acked, 4, "no concern of this client");
    envoy.expect_silence();
}

#[test]
fn the_other_variant_is_refused() {
    let mut envoy = Envoy::connected_to("");
    let sotw = envoy.sotw(Cluster, &[]);
    assert_eq!(envoy.try_send(sotw), Err(SessionError::OtherVariant));
}
