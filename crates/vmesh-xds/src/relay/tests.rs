mod chain;

use super::*;
use crate::{Scope, Session, Snapshot, State};
use Kind::*;
use chain::{Chain, ChainStep, accepts_all, node, rejects_bad, resource, steps};
use proptest::prelude::*;
use prost::Message;
use std::time::Duration;
use vmesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

fn rejects_missing_address(response: &str) -> Option<String> {
    let bad = response.split(' ').filter_map(|word| word.strip_suffix("=bad"));
    let bad: Vec<_> = bad
        .map(|name| format!("{name}: cannot bind '10.99.0.1:9002': Cannot assign requested address"))
        .collect();
    (!bad.is_empty()).then(|| bad.join(", "))
}

fn rejects_removals(response: &str) -> Option<String> {
    response.contains(" -").then(|| "fewer than the minimum".to_owned())
}

#[test]
fn what_the_host_does_not_let_envoy_do_is_tried_again_and_told_when_it_works() {
    let mut chain = Chain::new("listener l=bad");
    chain.control_starts();
    chain.verdict = Some(rejects_missing_address);
    chain.envoy_starts();
    assert!(matches!(chain.control_state(), State::Rejected { .. }));
    chain.envoy_got();
    let mut now = chain.now;
    let mut tries = 0;
    for _ in 0..600 {
        now += Duration::from_secs(1);
        chain.relay.on_timeout(now);
        chain.run();
        tries += chain.envoy_got().matches("l=bad").count();
    }
    assert!((8..20).contains(&tries), "{tries} in ten minutes");
    assert!(!chain.relay.take_recovered());
    // The missing address appears.
    chain.verdict = Some(accepts_all);
    while !chain.envoy_got().contains("l=bad") {
        now += Duration::from_secs(1);
        chain.relay.on_timeout(now);
        chain.run();
    }
    assert_eq!(chain.relay.rejections().count(), 0);
    assert!(chain.relay.take_recovered() && !chain.relay.take_recovered());
    assert!(chain.accepted().contains("l=bad"));
    chain.control_dies();
    chain.relay_got();
    chain.control_starts();
    assert_eq!(*chain.control_state(), State::Synced);
    assert!(!chain.relay_got().contains("l=bad"), "it is the same");
    assert_eq!(chain.relay.on_timeout(now + Duration::from_secs(3600)), None);
}

#[test]
fn what_one_envoy_refused_another_is_asked() {
    let mut chain = Chain::new("cluster a=bad endpoints a=1");
    chain.control_starts();
    chain.verdict = Some(rejects_bad);
    chain.envoy_starts();
    assert_eq!(chain.relay.rejections().count(), 1);
    chain.envoy_dies();
    chain.verdict = Some(accepts_all);
    chain.envoy_starts();
    assert_eq!(chain.relay.rejections().count(), 0);
    assert!(chain.relay.take_recovered());
    assert!(chain.accepted().contains("a=bad"));
    // A second Envoy that rejects the resource too gets it once, not with every change.
    let mut chain = Chain::new("cluster a=bad b=1");
    chain.control_starts();
    chain.verdict = Some(rejects_bad);
    chain.envoy_starts();
    chain.envoy_dies();
    chain.envoy_got();
    chain.envoy_starts();
    chain.control_has("cluster a=bad b=2");
    assert_eq!(chain.envoy_got().matches("a=bad").count(), 1);
}

#[test]
fn r31_an_envoy_after_one_that_refused_its_first_endpoints_is_answered() {
    let mut chain = Chain::new("cluster a=1 endpoints a=bad");
    chain.control_starts();
    chain.verdict = Some(rejects_bad);
    chain.envoy_starts();
    chain.envoy_dies();
    chain.envoy_got();
    chain.envoy_starts();
    let got = chain.envoy_got();
    assert!(got.contains("endpoints a=bad") || got.contains("endpoints a="), "{got}");
    // The same Envoy gets the cluster again and repeats its subscription.
    chain.subscribe(Endpoint, &["-a"]);
    chain.subscribe(Endpoint, &["a"]);
    assert!(chain.envoy_got().contains("endpoints a="), "no answer");
}

#[test]
fn a_removal_that_envoy_refuses_is_sent_once_and_told_and_ends_with_that_envoy() {
    let mut chain = Chain::new("cluster a=1 b=1");
    chain.control_starts();
    chain.envoy_starts();
    chain.verdict = Some(rejects_removals);
    chain.envoy_got();
    chain.relay_got();
    chain.control_has("cluster b=1");
    assert_eq!(chain.envoy_got().matches("-a").count(), 1);
    assert_eq!(chain.relay_got().matches("-a").count(), 1);
    let reason = "cluster a cannot be removed: fewer than the minimum";
    assert_eq!(*chain.control_state(), State::Rejected { reason: reason.into() });
    assert!(chain.accepted().contains("a=1"), "Envoy has it");
    // The rejection is reported on the next stream too, without another attempt at Envoy.
    chain.control_dies();
    chain.control_starts();
    chain.step(&ChainStep::Wait);
    assert_eq!(chain.envoy_got(), "");
    assert!(matches!(chain.control_state(), State::Rejected { .. }));
    chain.envoy_dies();
    assert!(!chain.accepted().contains("a=1"));
    assert!(chain.relay.take_recovered());
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn envoy_ends_up_with_what_the_control_plane_has_whatever_happens(steps in steps()) {
        let mut chain = Chain::new("");
        chain.verdict = Some(rejects_bad);
        steps.iter().for_each(|step| chain.step(step));
        chain.settle();
        chain.assert_converged();
    }
}

fn config() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }
}

const WORLD: &str = "cluster a=1 endpoints a=1 listener l=1 route l=1";
const ALL: &str = "cluster a=1, endpoints a=1, listener l=1, route l=1";
const ACCEPTED: &str = "- a=1 a=1 - l=1 l=1";

fn accepted_all() -> String {
    ACCEPTED.replace("- ", "-* ")
}

#[test]
fn envoy_gets_what_the_control_plane_has_and_its_acks_go_back() {
    let mut chain = Chain::new(WORLD);
    chain.envoy_starts();
    assert_eq!(chain.envoy_got(), "", "nothing is known yet");
    chain.control_starts();
    assert_eq!(chain.envoy_got(), ALL);
    assert_eq!(*chain.control_state(), State::Synced);
    assert_eq!(chain.accepted(), accepted_all());
    chain.control_has("cluster a=2 endpoints a=2 listener l=1 route l=2");
    assert_eq!(chain.envoy_got(), "cluster a=2, endpoints a=2, route l=2");
    assert_eq!(*chain.control_state(), State::Synced);
}

#[test]
fn an_empty_world_is_an_answer() {
    let mut chain = Chain::new("");
    chain.control_starts();
    chain.envoy_starts();
    assert_eq!(chain.envoy_got(), "cluster, listener");
    assert_eq!(*chain.control_state(), State::Synced);
}

#[test]
fn nothing_is_acked_before_envoy_has_acked_it() {
    let mut chain = Chain::new(WORLD);
    chain.control_starts();
    assert_eq!(chain.relay_got(), "cluster a=1");
    assert_eq!(*chain.control_state(), State::Pushing, "no Envoy is there");
    assert_eq!(chain.accepted(), "-*");
    chain.verdict = None;
    chain.envoy_starts();
    assert_eq!(chain.envoy_got(), "cluster a=1");
    assert_eq!(*chain.control_state(), State::Pushing);
    chain.verdict = Some(accepts_all);
    chain.run();
    assert_eq!(*chain.control_state(), State::Synced);
    assert_eq!(chain.accepted(), accepted_all());
}

#[test]
fn what_envoy_refuses_is_refused_in_its_own_words_and_the_last_good_one_stays() {
    let mut chain = Chain::new(WORLD);
    chain.verdict = Some(rejects_bad);
    chain.control_starts();
    chain.envoy_starts();
    chain.envoy_got();
    chain.control_has("cluster a=bad b=1 endpoints a=1 b=1 listener l=1 route l=1");
    assert_eq!(*chain.control_state(), State::Rejected { reason: "cluster a: a: this is bad".into() });
    assert_eq!(chain.accepted(), "-* a=1 b=1 a=1 b=1 -* l=1 l=1");
    assert_eq!(chain.relay.rejections().count(), 1);

    // Another Envoy gets the rejected resource once, followed by the good one. Another control plane learns of
    // the rejection at once.
    chain.envoy_dies();
    chain.envoy_got();
    chain.envoy_starts();
    let got = chain.envoy_got();
    assert!(got.starts_with("cluster a=bad b=1") && got.contains("cluster a=1"), "{got}");
    assert_eq!(chain.accepted(), "-* a=1 b=1 a=1 b=1 -* l=1 l=1");
    chain.control_dies();
    chain.control_starts();
    assert_eq!(*chain.control_state(), State::Rejected { reason: "cluster a: a: this is bad".into() });
    assert!(!chain.envoy_got().contains("bad"));

    chain.control_has("cluster a=3 b=1 endpoints a=1 b=1 listener l=1 route l=1");
    assert_eq!(*chain.control_state(), State::Synced);
    assert_eq!(chain.relay.rejections().count(), 0);
}

#[test]
fn what_a_later_envoy_refuses_of_what_an_earlier_one_took_is_not_in_force_until_one_takes_it() {
    let mut chain = Chain::new("cluster a=1 listener l=bad m=1");
    chain.control_starts();
    chain.envoy_starts();
    let in_force = |chain: &Chain| ["l", "m"].map(|name| chain.relay.in_force(Listener, name).is_some());
    assert_eq!(in_force(&chain), [true, true]);
    chain.relay.take_changes();

    // The next Envoy has another version, or the host has lost IPv6.
    chain.envoy_dies();
    chain.verdict = Some(rejects_bad);
    let before = chain.relay.accepted_revision();
    chain.envoy_starts();
    assert_eq!(in_force(&chain), [false, true]);
    assert!(chain.relay.accepted_revision() > before);
    assert!(chain.relay.take_changes().contains(&(Listener, "l".into())));
    // The agent's disk keeps the resource that the earlier Envoy accepted, in case the host recovers.
    assert!(chain.accepted().contains("l=bad"), "{}", chain.accepted());

    chain.envoy_dies();
    chain.verdict = Some(accepts_all);
    chain.envoy_starts();
    assert_eq!(in_force(&chain), [true, true]);
    assert!(chain.relay.take_changes().contains(&(Listener, "l".into())));
}

#[test]
fn what_was_never_good_is_not_accepted() {
    let mut chain = Chain::new("cluster a=bad");
    chain.verdict = Some(rejects_bad);
    chain.control_starts();
    chain.envoy_starts();
    assert!(matches!(chain.control_state(), State::Rejected { .. }));
    assert!(!chain.accepted().contains("bad"), "{}", chain.accepted());
}

#[test]
fn a_node_that_starts_without_a_control_plane_serves_what_envoy_had() {
    let mut chain = Chain::new(WORLD);
    chain.control_starts();
    chain.envoy_starts();
    let mut chain = chain.restart(WORLD);
    chain.envoy_starts();
    assert_eq!(chain.envoy_got(), ALL);
    assert_eq!(chain.accepted(), accepted_all());
    // Nothing changed meanwhile, so no response is sent to either end.
    chain.control_starts();
    assert_eq!(chain.relay_got(), "");
    assert_eq!(chain.envoy_got(), "");
    assert_eq!(*chain.control_state(), State::Synced);
}

#[test]
fn what_changed_while_the_control_plane_was_away_is_all_that_is_sent() {
    let mut chain = Chain::new("cluster a=1 b=1 endpoints a=1 b=1 listener l=1 route l=1");
    chain.control_starts();
    chain.envoy_starts();
    let mut chain = chain.restart("cluster b=1 endpoints b=2 listener l=1 route l=2");
    chain.envoy_starts();
    chain.envoy_got();
    chain.control_starts();
    assert_eq!(chain.relay_got(), "endpoints b=2, route l=2");
    chain.now += Duration::from_secs(1);
    chain.run();
    assert_eq!(chain.relay_got(), "cluster -a");
    assert_eq!(chain.envoy_got(), "endpoints b=2, route l=2, cluster -a");
    assert_eq!(chain.accepted(), "-* b=1 b=2 -* l=1 l=2");
    assert_eq!(*chain.control_state(), State::Synced);
}

#[test]
fn envoy_does_not_notice_that_the_control_plane_is_gone() {
    let mut chain = Chain::new(WORLD);
    chain.control_starts();
    chain.envoy_starts();
    chain.envoy_got();
    chain.control_dies();
    chain.subscribe(Endpoint, &["-a"]);
    chain.subscribe(Endpoint, &["a"]);
    assert_eq!(chain.envoy_got(), "endpoints a=1", "what Envoy dropped is still there");
    chain.control_starts();
    assert_eq!(chain.envoy_got(), "");
    assert_eq!(
        chain.relay_got(),
        "cluster a=1, endpoints a=1, listener l=1, route l=1",
        "only the first time"
    );
}

#[test]
fn what_was_on_its_way_when_the_control_plane_died_is_accepted_when_envoy_acks_it() {
    let mut chain = Chain::new(WORLD);
    chain.control_starts();
    chain.envoy_starts();
    chain.verdict = None;
    chain.control_has("cluster a=2 endpoints a=1 listener l=1 route l=1");
    chain.control_dies();
    assert_eq!(chain.accepted(), accepted_all());
    chain.verdict = Some(accepts_all);
    chain.run();
    assert_eq!(chain.accepted(), "-* a=2 a=1 -* l=1 l=1");
}

#[test]
fn what_was_on_its_way_and_is_gone_when_the_control_plane_is_back_is_removed() {
    let mut chain = Chain::new("cluster a=1");
    chain.control_starts();
    chain.control_dies();
    chain.control_has("cluster b=1");
    chain.envoy_starts();
    assert!(chain.envoy_got().starts_with("cluster a=1"));
    chain.control_starts();
    chain.now += Duration::from_secs(1);
    chain.run();
    assert_eq!(*chain.control_state(), State::Synced);
    assert_eq!(chain.accepted().split(' ').filter(|word| word.contains('=')).collect::<Vec<_>>(), ["b=1"]);
}

#[test]
fn an_envoy_that_outlives_the_agent_is_not_sent_what_it_has() {
    let mut chain = Chain::new(WORLD);
    chain.control_starts();
    chain.envoy_starts();
    let mut chain = chain.restart(WORLD);
    chain.envoy_connects();
    let version = |kind: Kind, name: &str| (name.to_owned(), resource(kind, name, "1").version().to_owned());
    for (kind, name, by_name) in
        [(Cluster, "a", false), (Endpoint, "a", true), (Listener, "l", false), (Route, "l", true)]
    {
        chain.send_request(DeltaDiscoveryRequest {
            type_url: kind.type_url().into(),
            resource_names_subscribe: by_name.then(|| name.to_owned()).into_iter().collect(),
            initial_resource_versions: [version(kind, name)].into(),
            ..DeltaDiscoveryRequest::default()
        });
    }
    chain.control_starts();
    assert_eq!(chain.envoy_got(), "");
    assert_eq!(chain.relay_got(), "");
    chain.control_has("cluster a=1 endpoints a=2 listener l=1 route l=1");
    assert_eq!(chain.envoy_got(), "endpoints a=2");
    assert_eq!(*chain.control_state(), State::Synced);
}

#[test]
fn an_envoy_that_already_has_what_is_on_its_way_counts_as_an_ack() {
    let mut chain = Chain::new("cluster a=2");
    chain.control_starts();
    assert_eq!(*chain.control_state(), State::Pushing);
    chain.envoy_connects();
    chain.send_request(DeltaDiscoveryRequest {
        type_url: Cluster.type_url().into(),
        initial_resource_versions: [("a".to_owned(), resource(Cluster, "a", "2").version().to_owned())]
            .into(),
        ..DeltaDiscoveryRequest::default()
    });
    assert_eq!(chain.envoy_got(), "");
    assert!(chain.accepted().contains("a=2"));
}

#[test]
fn what_only_an_earlier_envoy_asked_for_is_left_when_the_next_one_has_its_listeners() {
    let mut chain = Chain::new("cluster a=1 endpoints a=1 listener l=1 route l=1 old=1");
    chain.control_starts();
    chain.envoy_starts();
    chain.subscribe(Route, &["old"]);
    assert!(chain.accepted().contains("old=1"));
    chain.envoy_dies();
    assert!(chain.accepted().contains("old=1"));
    chain.envoy_starts();
    assert!(!chain.accepted().contains("old=1"));
    chain.relay_got();
    chain.control_has("cluster a=1 endpoints a=1 listener l=1 route l=1 old=2");
    assert_eq!(chain.relay_got(), "");
}

#[test]
fn no_secret_goes_through_a_relay() {
    let mut chain = Chain::new("cluster a=1 secret s=1");
    chain.control_starts();
    chain.envoy_starts();
    chain.relay_got();
    chain.subscribe(Secret, &["s"]);
    assert!(!chain.envoy_got().contains("secret") && !chain.relay_got().contains("secret"));
    chain.relay.stop_waiting();
    chain.run();
    assert_eq!(chain.envoy_got(), "", "the absence of a secret is not announced");

    // A control plane that sends one nevertheless is refused, and a file that has one is read without it.
    let secret = vmesh_proto::envoy::service::discovery::v3::Resource {
        name: "s".into(),
        resource: Some(vmesh_proto::google::protobuf::Any {
            type_url: Secret.type_url().into(),
            value: "s=1".into(),
        }),
        ..Default::default()
    };
    chain.relay.on_response(DeltaDiscoveryResponse {
        type_url: Secret.type_url().into(),
        nonce: "7".into(),
        resources: vec![secret],
        ..Default::default()
    });
    assert!(chain.relay.poll_request().unwrap().error_detail.is_some());
    let restored = Relay::restore(node(), [resource(Secret, "s", "1"), resource(Cluster, "a", "1")]);
    assert_eq!(restored.accepted().count(), 1);
    assert!(restored.store().get(Secret, "s").is_none());
}

#[test]
fn a_filter_is_subscribed_to_when_envoy_asks_for_it_and_is_part_of_what_it_accepted() {
    let world = "cluster a=1 filter f=1 g=1 listener l=1";
    let mut chain = Chain::new(world);
    chain.control_starts();
    chain.envoy_starts();
    assert!(!chain.envoy_got().contains("filter"));
    chain.subscribe(ExtensionConfig, &["f"]);
    assert_eq!(chain.envoy_got(), "filter f=1");
    chain.control_has("cluster a=1 filter f=2 g=2 listener l=1");
    assert_eq!(chain.envoy_got(), "filter f=2");
    assert!(chain.accepted().contains("f=2") && !chain.accepted().contains("g="), "{}", chain.accepted());
    assert_eq!(*chain.control_state(), State::Synced);

    let mut chain = chain.restart(world);
    chain.envoy_starts();
    chain.subscribe(ExtensionConfig, &["f"]);
    assert!(chain.envoy_got().contains("filter f=2"), "from the disk");
    chain.envoy_dies();
    chain.control_starts();
    // The next Envoy has a listener without the filter.
    chain.envoy_starts();
    assert!(!chain.accepted().contains("f="), "{}", chain.accepted());
}

#[test]
fn an_envoy_need_not_wait_for_ever() {
    let mut chain = Chain::new(WORLD);
    chain.envoy_starts();
    assert_eq!(chain.envoy_got(), "");
    chain.relay.stop_waiting();
    chain.run();
    assert_eq!(chain.envoy_got(), "cluster, listener");
    chain.control_starts();
    assert_eq!(chain.envoy_got(), "cluster a=1, endpoints a=1, listener l=1, route l=1");
    assert_eq!(*chain.control_state(), State::Synced);
}

#[test]
fn a_name_that_the_control_plane_does_not_know_is_told_to_envoy() {
    let mut chain = Chain::new(WORLD);
    chain.control_starts();
    chain.envoy_starts();
    chain.envoy_got();
    chain.subscribe(Route, &["x"]);
    assert_eq!(chain.envoy_got(), "route -x");
    assert_eq!(*chain.control_state(), State::Synced);
    chain.subscribe(Route, &["-x"]);
    assert_eq!(chain.accepted(), accepted_all());
}

#[test]
fn a_response_that_makes_no_sense_is_refused() {
    let mut relay = Relay::new(node());
    relay.on_connected();
    while relay.poll_request().is_some() {}
    let nonce = || "7".to_owned();
    relay.on_response(DeltaDiscoveryResponse {
        type_url: "banana".into(),
        nonce: nonce(),
        ..Default::default()
    });
    let refusal = relay.poll_request().unwrap();
    assert!(refusal.error_detail.is_some() && refusal.type_url == "banana" && refusal.response_nonce == "7");
    let empty =
        vmesh_proto::envoy::service::discovery::v3::Resource { name: "x".into(), ..Default::default() };
    relay.on_response(DeltaDiscoveryResponse {
        type_url: Cluster.type_url().into(),
        nonce: nonce(),
        resources: vec![empty],
        ..Default::default()
    });
    assert!(relay.poll_request().unwrap().error_detail.unwrap().message.starts_with("x: "));
}

fn check_local(resource: &Resource) -> Result<(), String> {
    match resource.value().ends_with(b"=bad") {
        true => Err("this is bad".to_owned()),
        false => Ok(()),
    }
}

fn agent(mut relay: Relay, world: &str) -> Chain {
    relay.subscribe_local(check_local);
    Chain::with(relay, world)
}

#[test]
fn what_is_not_for_envoy_is_answered_by_the_relay_and_never_served() {
    let mut chain = agent(Relay::new(node()), "cluster a=1 endpoints a=1 local a=1 b=1");
    chain.envoy_starts();
    chain.control_starts();
    assert_eq!(chain.accepted(), "-* a=1 a=1 -* -* a=1 b=1");
    assert_eq!(chain.envoy_got(), "cluster a=1, endpoints a=1, listener");
    assert_eq!(*chain.control_state(), State::Synced);

    // A client that subscribes gets an empty answer at once, with or without a control plane.
    chain.control_dies();
    chain.subscribe(Local, &[]);
    assert_eq!(chain.envoy_got(), "local");
    chain.subscribe(Local, &["a"]);
    assert_eq!(chain.envoy_got(), "local -a");
    assert_eq!(chain.accepted(), "-* a=1 a=1 -* -* a=1 b=1");

    // The control plane does not send these resources again to an agent that has them.
    let mut chain = chain.restart("cluster a=1 endpoints a=1 local b=2");
    chain.relay.subscribe_local(check_local);
    chain.relay_got();
    chain.control_starts();
    assert!(chain.relay_got().contains("local b=2"));
    chain.now += Duration::from_secs(31);
    chain.run();
    assert_eq!(chain.relay_got(), "local -a");
    assert_eq!(chain.accepted(), "-* a=1 a=1 -* -* b=2");
}

#[test]
fn what_cannot_be_made_out_costs_itself() {
    let mut chain = agent(Relay::new(node()), "local a=1 b=1");
    chain.control_starts();
    chain.control_has("local a=bad b=2 c=bad");
    assert_eq!(chain.accepted(), "-* -* -* a=1 b=2");
    let state = format!("{:?}", chain.control_state());
    assert!(state.contains("Rejected") && state.contains("a: this is bad"), "{state}");
    chain.control_has("local a=3 b=2");
    assert_eq!(chain.accepted(), "-* -* -* a=3 b=2");
    assert_eq!(*chain.control_state(), State::Synced);
}

#[test]
fn what_is_accepted_is_all_there_is_once_it_was_told_and_answered_for() {
    let mut chain = agent(Relay::new(node()), "cluster a=1 endpoints a=1 local a=1");
    assert!(!chain.relay.has_all(Local));
    chain.control_starts();
    assert!(chain.relay.has_all(Local));
    assert!(!chain.relay.has_all(Listener), "nobody has asked for listeners");
    chain.envoy_starts();
    assert!(chain.relay.has_all(Listener));
    // The relay still has all resources after a restart from the disk.
    let mut chain = chain.restart("cluster a=1");
    chain.relay.subscribe_local(check_local);
    assert!(chain.relay.has_all(Local) && chain.relay.has_all(Listener));
}

#[test]
fn a_relay_that_does_not_take_it_does_not_ask_for_it() {
    let mut chain = Chain::new("cluster a=1 endpoints a=1 local a=1");
    chain.envoy_starts();
    chain.control_starts();
    chain.subscribe(Local, &[]);
    assert_eq!(chain.accepted(), "-* a=1 a=1 -*");
    assert_eq!(*chain.control_state(), State::Synced);
    assert!(!chain.relay_got().contains("local"));
}
