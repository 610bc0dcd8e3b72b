use super::*;
use Kind::*;

/// Makes a client in the state of an Envoy after its start: it subscribes to endpoints before it ACKs the
/// clusters, and to listeners afterwards.
fn started(world: &str, routes: &[&str], endpoints: &[&str]) -> Envoy {
    let mut envoy = Envoy::connected_to(world);
    envoy.subscribe(Cluster, &[]);
    envoy.receive().unwrap();
    if !endpoints.is_empty() {
        envoy.subscribe(Endpoint, endpoints);
        envoy.receive().unwrap();
        envoy.ack(Endpoint);
    }
    envoy.ack(Cluster);
    envoy.subscribe(Listener, &[]);
    envoy.receive().unwrap();
    envoy.ack(Listener);
    if !routes.is_empty() {
        envoy.subscribe(Route, routes);
        envoy.receive().unwrap();
        envoy.ack(Route);
    }
    envoy.expect_silence();
    assert_eq!(*envoy.state(), State::Synced);
    envoy
}

#[test]
fn r45_what_is_referred_to_goes_first() {
    let mut envoy = started("cluster a=1 endpoints a=1 listener l=1 route r=1 secret s=1", &["r"], &["a"]);
    envoy.subscribe(Secret, &["s"]);
    envoy.expect_acked("secret s=1");
    envoy.server_has("cluster a=2 endpoints a=2 listener l=2 route r=2 secret s=2");
    for response in ["cluster a=2", "endpoints a=2", "listener l=2", "route r=2", "secret s=2"] {
        envoy.expect_acked(response);
    }
}

#[test]
fn r45_clusters_are_removed_last() {
    let mut envoy = started("cluster a=1 b=1 endpoints a=1 b=1 listener l=1 route r=1", &["r"], &["a", "b"]);
    envoy.server_has("cluster b=1 endpoints b=1 listener l=2 route r=2");
    envoy.expect("listener l=2");
    envoy.expect("route r=2");
    envoy.expect_silence();
    envoy.ack(Listener);
    envoy.expect_silence();
    envoy.ack(Route);
    envoy.expect("cluster -a");
    envoy.expect_silence();
    envoy.ack(Cluster);
    envoy.subscribe(Endpoint, &["-a"]);
    envoy.expect_silence();
    assert_eq!(*envoy.state(), State::Synced);
}

#[test]
fn r45_a_removal_waits_twenty_seconds_and_no_longer() {
    let mut envoy = started("cluster a=1 endpoints a=1 listener l=1", &[], &["a"]);
    envoy.server_has("listener l=2");
    envoy.expect("listener l=2");
    envoy.expect_silence_for(19);
    envoy.passes(1);
    assert_eq!(envoy.session.poll_timeout(), Some(envoy.now));
    envoy.expect("cluster -a");
}

#[test]
fn r45_a_route_is_removed_after_the_listener_that_uses_it() {
    let mut envoy = started("listener l=1 route r=1", &["r"], &[]);
    envoy.server_has("listener l=2");
    envoy.expect("listener l=2");
    envoy.expect_silence();
    envoy.ack(Listener);
    envoy.expect("route -r");
}

#[test]
fn r45_a_filter_is_sent_before_listeners_and_removed_after_the_listener_that_uses_it() {
    let mut envoy = started("filter f=1 listener l=1", &[], &[]);
    envoy.subscribe(ExtensionConfig, &["f"]);
    envoy.expect_acked("filter f=1");
    envoy.server_has("filter f=2 listener l=2");
    envoy.expect_acked("filter f=2");
    envoy.expect_acked("listener l=2");
    // A filter refers to no cluster, so a change of access does not wait for clusters that become warm.
    envoy.server_has("cluster a=1 filter f=3 listener l=2");
    envoy.expect("cluster a=1");
    envoy.expect_acked("filter f=3");
    envoy.ack(Cluster);
    envoy.server_has("cluster a=1 listener l=3");
    envoy.expect("listener l=3");
    envoy.expect_silence();
    envoy.ack(Listener);
    envoy.expect("filter -f");
}

#[test]
fn r46_endpoints_follow_their_cluster_even_if_they_are_the_same() {
    let mut envoy = started("cluster a=1 b=1 endpoints a=1 b=1", &[], &["a", "b"]);
    envoy.server_has("cluster a=2 b=1 endpoints a=1 b=1");
    envoy.expect("cluster a=2");
    envoy.expect("endpoints a=1");
    envoy.ack(Endpoint);
    envoy.ack(Cluster);
    envoy.expect_silence();
}

#[test]
fn r46_endpoints_that_do_not_exist_follow_their_cluster_too() {
    let mut envoy = started("cluster a=1", &[], &["a"]);
    envoy.server_has("cluster a=2");
    envoy.expect("cluster a=2");
    envoy.expect("endpoints a=empty");
}

#[test]
fn r47_routes_wait_for_new_clusters() {
    let mut envoy = started("cluster a=1 endpoints a=1 b=1 listener l=1 route r=1", &["r"], &["a"]);
    envoy.server_has("cluster a=1 b=1 endpoints a=1 b=1 listener l=2 route r=2");
    envoy.expect("cluster b=1");
    envoy.expect_silence();
    envoy.subscribe(Endpoint, &["b"]);
    envoy.expect("endpoints b=1");
    envoy.expect_silence();
    envoy.ack(Cluster);
    envoy.expect_silence();
    envoy.ack(Endpoint);
    envoy.expect("listener l=2");
    envoy.expect("route r=2");
}

#[test]
fn r47_routes_wait_twenty_seconds_and_no_longer() {
    let mut envoy = started("listener l=1 route r=1", &["r"], &[]);
    envoy.server_has("cluster b=1 listener l=1 route r=2");
    envoy.expect("cluster b=1");
    envoy.expect_silence_for(19);
    envoy.passes(1);
    assert_eq!(envoy.session.poll_timeout(), Some(envoy.now));
    envoy.expect("route r=2");
}

#[test]
fn r47_a_route_that_envoy_waits_for_comes_before_envoy_gives_up() {
    let mut envoy = started("listener l=1 route r=1 s=1", &["r"], &[]);
    envoy.server_has("cluster b=1 listener l=1 route r=1 s=1");
    envoy.expect("cluster b=1");
    envoy.subscribe(Route, &["s"]);
    envoy.expect_silence_for(9);
    envoy.passes(1);
    envoy.expect("route s=1");
}

#[test]
fn r47_a_refused_cluster_does_not_hold_back_the_routes() {
    let mut envoy = started("listener l=1 route r=1", &["r"], &[]);
    envoy.server_has("cluster b=1 listener l=1 route r=2");
    envoy.expect("cluster b=1");
    envoy.expect_silence();
    envoy.nack(Cluster, "b: bad");
    envoy.expect("route r=2");
}

#[test]
fn r47_a_changed_cluster_holds_back_nothing() {
    let mut envoy = started("cluster a=1 endpoints a=1 listener l=1 route r=1", &["r"], &["a"]);
    envoy.server_has("cluster a=2 endpoints a=1 listener l=1 route r=2");
    envoy.expect("cluster a=2");
    envoy.expect("endpoints a=1");
    envoy.expect("route r=2");
}

#[test]
fn r48_nothing_is_sent_before_it_is_asked_for() {
    let mut envoy = Envoy::connected_to("cluster a=1 endpoints a=1 listener l=1 route r=1 secret s=1");
    envoy.expect_silence();
    envoy.subscribe(Cluster, &[]);
    envoy.expect_acked("cluster a=1");
    envoy.server_has("cluster a=2 endpoints a=2 listener l=2 route r=2 secret s=2");
    envoy.expect_acked("cluster a=2");
    envoy.expect_silence_for(3600);
}

#[test]
fn r54_endpoints_never_wait_for_the_ack_of_their_cluster() {
    let mut envoy = Envoy::connected_to("cluster a=1");
    envoy.subscribe(Cluster, &[]);
    envoy.expect("cluster a=1");
    envoy.subscribe(Endpoint, &["a"]);
    envoy.expect("endpoints a=empty");
    envoy.ack(Endpoint);
    envoy.server_has("cluster a=1 endpoints a=1");
    envoy.expect("endpoints a=1");
}

#[test]
fn r55_endpoints_bear_the_name_of_their_cluster() {
    let mut envoy = Envoy::connected_to("cluster orders=1 orders|v2=1 endpoints orders=1");
    envoy.subscribe(Endpoint, &["orders", "orders|v2"]);
    envoy.expect("endpoints orders=1 orders|v2=empty");
}
