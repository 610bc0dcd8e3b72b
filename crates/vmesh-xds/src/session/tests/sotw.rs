use super::*;
use Kind::*;

#[test]
fn r07_a_first_request_with_an_old_nonce_and_version_is_answered_in_full() {
    let mut envoy = Envoy::sotw_connected_to("cluster a=1 b=1");
    let request = envoy.sotw(Cluster, &[]);
    envoy.send(DiscoveryRequest { response_nonce: "5".into(), version_info: "17".into(), ..request });
    envoy.expect("cluster a=1 b=1");
}

#[test]
fn r08_an_opaque_version_does_not_end_the_stream_nor_count_as_up_to_date() {
    let mut envoy = Envoy::sotw_connected_to("listener l=1");
    let request = envoy.sotw(Listener, &[]);
    envoy.send(DiscoveryRequest { version_info: "banana".into(), ..request });
    envoy.expect("listener l=1");
}

#[test]
fn r09_two_servers_give_one_state_one_version() {
    let version = |worlds: &[&str]| {
        let mut envoy = Envoy::sotw_connected_to("");
        worlds.iter().for_each(|world| envoy.server_has(world));
        envoy.names(Cluster, &[]);
        envoy.receive().unwrap();
        envoy.versions[&Cluster].clone()
    };
    assert_eq!(
        version(&["cluster a=1 b=1"]),
        version(&["cluster b=1", "cluster a=2 b=1", "cluster a=1 b=1"])
    );
    assert_ne!(version(&["cluster a=1 b=1"]), version(&["cluster a=1"]));
}

#[test]
fn r10_a_stale_request_is_not_answered_and_the_next_one_is_honoured() {
    let mut envoy = Envoy::sotw_connected_to("endpoints a=1 b=1");
    envoy.names(Endpoint, &["a"]);
    let before = envoy.sotw(Endpoint, &["a", "b"]);
    envoy.expect("endpoints a=1");
    envoy.send(before);
    envoy.expect_silence();
    envoy.names(Endpoint, &["a", "b"]);
    envoy.expect("endpoints b=1");
}

#[test]
fn r10_a_refusal_of_an_older_response_is_still_a_refusal() {
    let mut envoy = Envoy::sotw_connected_to("cluster a=1");
    envoy.names(Cluster, &[]);
    envoy.expect("cluster a=1");
    let late = DiscoveryRequest { error_detail: error("a: bad"), ..envoy.sotw(Cluster, &[]) };
    envoy.server_has("cluster a=1 b=1");
    envoy.passes(30);
    envoy.expect("cluster a=1 b=1");
    envoy.send(late);
    assert!(envoy.session.status().kinds[Cluster].rejected.contains_key("a"));
}

#[test]
fn r13_r17_a_refused_cluster_stays_at_its_last_good_version_and_the_others_move_on() {
    let mut envoy = Envoy::sotw_connected_to("cluster a=1 b=1");
    envoy.names(Cluster, &[]);
    envoy.expect_acked("cluster a=1 b=1");
    envoy.server_has("cluster a=bad b=2");
    envoy.expect("cluster a=bad b=2");
    envoy.sotw_nack(Cluster, &[], "a: bad");
    envoy.expect_acked("cluster a=1 b=2");
    envoy.expect_silence_for(3600);
    assert!(matches!(envoy.state(), State::Rejected { .. }));
    envoy.server_has("cluster a=bad b=3");
    envoy.expect_acked("cluster a=1 b=3");
    envoy.server_has("cluster a=3 b=3");
    envoy.expect_acked("cluster a=3 b=3");
    assert_eq!(*envoy.state(), State::Synced);
}

#[test]
fn r13_a_refused_cluster_that_never_was_good_is_left_out() {
    let mut envoy = Envoy::sotw_connected_to("cluster bad=1");
    envoy.names(Cluster, &[]);
    envoy.expect("cluster bad=1");
    envoy.sotw_nack(Cluster, &[], "bad: bad");
    envoy.expect_acked("cluster");
    envoy.expect_silence_for(3600);
    envoy.server_has("cluster bad=1 c=1");
    envoy.expect("cluster c=1");
}

#[test]
fn r17_the_fault_is_searched_for_and_what_was_good_stays() {
    let mut envoy = Envoy::sotw_connected_to("cluster a=1 b=1 c=1 d=1");
    envoy.names(Cluster, &[]);
    envoy.expect_acked("cluster a=1 b=1 c=1 d=1");
    envoy.server_has("cluster a=2 b=2 c=2 d=1");
    let mut responses = 0;
    while let Some(response) = envoy.receive() {
        responses += 1;
        assert!(response.contains(" d=1"), "the set is complete: {response}");
        match response.contains("b=2") {
            true => envoy.sotw_nack(Cluster, &[], "?"),
            false => envoy.names(Cluster, &[]),
        }
        if responses == 5 {
            assert_eq!(response, "cluster a=2 b=1 c=2 d=1");
        }
    }
    assert!(responses <= 5, "{responses}");
}

#[test]
fn r14_a_refusal_may_ask_for_more() {
    let mut envoy = Envoy::sotw_connected_to("endpoints a=1 b=1");
    envoy.names(Endpoint, &["a"]);
    envoy.expect("endpoints a=1");
    envoy.sotw_nack(Endpoint, &["a", "b"], "a: bad");
    envoy.expect("endpoints b=1");
}

#[test]
fn r12_the_version_alone_does_not_make_a_refusal() {
    let mut envoy = Envoy::sotw_connected_to("endpoints a=1 b=1");
    envoy.names(Endpoint, &["a"]);
    envoy.expect_acked("endpoints a=1");
    let version = envoy.versions[&Endpoint].clone();
    envoy.names(Endpoint, &["a", "b"]);
    envoy.expect("endpoints b=1");
    let request = envoy.sotw(Endpoint, &["a", "b"]);
    envoy.send(DiscoveryRequest { version_info: version, ..request });
    assert_eq!(*envoy.state(), State::Synced);
}

#[test]
fn r21_r22_the_four_steps_from_all_to_nothing() {
    let mut envoy = Envoy::sotw_connected_to("cluster a=1 b=1");
    envoy.names(Cluster, &[]);
    envoy.expect("cluster a=1 b=1");
    envoy.names(Cluster, &["*", "a"]);
    envoy.expect("cluster a=1 b=1");
    envoy.names(Cluster, &["*", "a"]);
    envoy.expect_silence();
    envoy.names(Cluster, &["a"]);
    envoy.server_has("cluster a=2 b=2");
    envoy.expect("cluster a=2");
    envoy.names(Cluster, &[]);
    envoy.server_has("cluster a=3 b=3");
    envoy.expect_silence_for(3600);
}

#[test]
fn r21_an_empty_list_of_another_kind_is_no_subscription() {
    let mut envoy = Envoy::sotw_connected_to("endpoints a=1 filter f=1 route r=1 secret s=1");
    for kind in [Endpoint, ExtensionConfig, Route, Secret] {
        envoy.names(kind, &[]);
    }
    envoy.expect_silence_for(3600);
}

#[test]
fn r26_a_name_that_was_dropped_and_added_is_sent_again() {
    let mut envoy = Envoy::sotw_connected_to("endpoints a=1");
    envoy.names(Endpoint, &["a"]);
    envoy.expect_acked("endpoints a=1");
    envoy.names(Endpoint, &[]);
    envoy.expect_silence();
    envoy.names(Endpoint, &["a"]);
    envoy.expect("endpoints a=1");
}

#[test]
fn r27_a_name_that_is_added_is_sent_at_the_same_version_of_the_whole() {
    let mut envoy = Envoy::sotw_connected_to("cluster a=1 b=1");
    envoy.names(Cluster, &["a"]);
    envoy.expect_acked("cluster a=1");
    envoy.names(Cluster, &["a", "b"]);
    envoy.expect_acked("cluster a=1 b=1");
    envoy.expect_silence();
}

#[test]
fn r28_clusters_and_listeners_come_complete_and_the_other_kinds_as_they_change() {
    let mut envoy = Envoy::sotw_connected_to("cluster a=1 b=1 endpoints a=1 b=1 listener l=1 m=1");
    envoy.names(Cluster, &[]);
    envoy.expect_acked("cluster a=1 b=1");
    envoy.names(Endpoint, &["a", "b"]);
    envoy.expect_acked("endpoints a=1 b=1");
    envoy.names(Listener, &[]);
    envoy.expect_acked("listener l=1 m=1");
    envoy.server_has("cluster a=1 b=1 endpoints a=1 b=2 listener l=2 m=1");
    envoy.expect_acked("endpoints b=2");
    envoy.expect_acked("listener l=2 m=1");
    envoy.expect_silence();
}

#[test]
fn r29_what_did_not_exist_is_sent_when_it_does() {
    let mut envoy = Envoy::sotw_connected_to("");
    envoy.names(Route, &["r"]);
    envoy.expect_silence_for(3600);
    envoy.server_has("route r=1");
    envoy.expect_acked("route r=1");
    envoy.names(Listener, &["l"]);
    envoy.expect_acked("listener");
    envoy.server_has("route r=1 listener l=1");
    envoy.expect_acked("listener l=1");
}

#[test]
fn r31_endpoints_are_always_answered() {
    let mut envoy = Envoy::sotw_connected_to("cluster a=1");
    envoy.names(Endpoint, &["a", "unknown"]);
    envoy.expect_acked("endpoints a=empty unknown=empty");
    envoy.expect_silence();
}

#[test]
fn r34_a_subset_of_what_there_is_is_answered() {
    let mut envoy = Envoy::sotw_connected_to("endpoints a=1 b=1 c=1");
    envoy.names(Endpoint, &["b"]);
    envoy.expect("endpoints b=1");
}

#[test]
fn r45_clusters_are_removed_last() {
    let mut envoy = Envoy::sotw_connected_to("cluster a=1 b=1 endpoints a=1 b=1 listener l=1 route r=1");
    envoy.names(Cluster, &[]);
    envoy.expect_acked("cluster a=1 b=1");
    envoy.names(Endpoint, &["a", "b"]);
    envoy.expect_acked("endpoints a=1 b=1");
    envoy.names(Listener, &[]);
    envoy.expect_acked("listener l=1");
    envoy.names(Route, &["r"]);
    envoy.expect_acked("route r=1");
    envoy.server_has("cluster b=2 c=1 endpoints b=1 c=1 listener l=1 route r=2");
    envoy.expect("cluster a=1 b=2 c=1");
    envoy.expect("endpoints b=1");
    envoy.expect_silence();
    envoy.names(Endpoint, &["a", "b", "c"]);
    envoy.expect_acked("endpoints c=1");
    envoy.names(Cluster, &[]);
    envoy.expect("route r=2");
    envoy.expect_silence();
    envoy.names(Route, &["r"]);
    envoy.expect_acked("cluster b=2 c=1");
    envoy.names(Endpoint, &["b", "c"]);
    envoy.expect_silence();
    assert_eq!(*envoy.state(), State::Synced);
}

#[test]
fn r46_endpoints_follow_their_cluster() {
    let mut envoy = Envoy::sotw_connected_to("cluster a=1 b=1 endpoints a=1 b=1");
    envoy.names(Cluster, &[]);
    envoy.expect_acked("cluster a=1 b=1");
    envoy.names(Endpoint, &["a", "b"]);
    envoy.expect_acked("endpoints a=1 b=1");
    envoy.server_has("cluster a=2 b=1 endpoints a=1 b=1");
    envoy.expect("cluster a=2 b=1");
    envoy.expect("endpoints a=1");
}

#[test]
fn r47_a_grpc_client_asks_from_the_listener_down_and_is_never_kept_waiting() {
    let mut envoy = Envoy::sotw_connected_to("cluster a=1 b=1 endpoints a=1 b=1 listener l=1 route r=1");
    envoy.names(Listener, &["l"]);
    envoy.expect_acked("listener l=1");
    envoy.names(Route, &["r"]);
    envoy.expect_acked("route r=1");
    envoy.names(Cluster, &["a"]);
    envoy.expect_acked("cluster a=1");
    envoy.names(Endpoint, &["a"]);
    envoy.expect_acked("endpoints a=1");
    // The route's new cluster is unknown to the client, which needs it first.
    envoy.server_has("cluster a=1 b=1 c=1 endpoints a=1 b=1 c=1 listener l=1 route r=2");
    envoy.expect_acked("route r=2");
    envoy.names(Cluster, &["a", "c"]);
    envoy.expect_acked("cluster a=1 c=1");
    envoy.names(Endpoint, &["a", "c"]);
    envoy.expect_acked("endpoints c=1");
    envoy.names(Cluster, &["c"]);
    envoy.names(Endpoint, &["c"]);
    envoy.expect_silence();
    assert_eq!(*envoy.state(), State::Synced);
}

#[test]
fn r59_a_large_answer_comes_in_parts_unless_it_must_be_complete() {
    let long = "x".repeat(1_500_000);
    let mut envoy =
        Envoy::sotw_connected_to(&format!("cluster a={long} b={long} endpoints a={long} b={long}"));
    envoy.names(Cluster, &[]);
    envoy.expect_acked("cluster a=long b=long");
    envoy.names(Endpoint, &["a", "b"]);
    envoy.expect_acked("endpoints a=long");
    envoy.expect_acked("endpoints b=long");
    envoy.expect_silence();
}
