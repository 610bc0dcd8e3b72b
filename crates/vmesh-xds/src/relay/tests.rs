use super::*;
use crate::{Scope, Session, Snapshot, State};
use Kind::*;
use proptest::prelude::*;
use prost::Message;
use std::time::{Duration, Instant};

/// A control plane, the relay, and an Envoy that answers each response according to `verdict`.
struct Chain {
    now: Instant,
    world: Store,
    control: Option<Session>,
    relay: Relay,
    envoy: Option<(ClientId, Session, bool)>,
    /// Returns the error with which Envoy rejects a response, if any. `None`: Envoy does not answer for now.
    verdict: Option<fn(&str) -> Option<String>>,
    unanswered: Vec<(Kind, String, String)>,
    /// The endpoints and routes that Envoy subscribed to because of its clusters and listeners.
    dependencies: BTreeSet<(Kind, String)>,
    /// The resources that Envoy has.
    view: BTreeMap<(Kind, String), String>,
    /// The responses that Envoy received, and those that the control plane sent.
    envoy_got: Vec<String>,
    relay_got: Vec<String>,
}

fn accepts_all(_: &str) -> Option<String> {
    None
}

fn rejects_bad(response: &str) -> Option<String> {
    let bad = response.split(' ').filter_map(|word| word.strip_suffix("=bad"));
    let bad: Vec<_> = bad.map(|name| format!("{name}: this is bad")).collect();
    (!bad.is_empty()).then(|| bad.join(", "))
}

fn node() -> Node {
    Node { id: "web-1".into(), ..Node::default() }
}

fn resource(kind: Kind, name: &str, content: &str) -> Arc<Resource> {
    Resource::from_bytes(kind, name, format!("{name}={content}").as_bytes())
}

impl Chain {
    fn new(world: &str) -> Chain {
        Chain::with(Relay::new(node()), world)
    }

    fn with(relay: Relay, world: &str) -> Chain {
        let mut chain = Chain {
            now: Instant::now(),
            world: Store::default(),
            control: None,
            relay,
            envoy: None,
            verdict: Some(accepts_all),
            unanswered: Vec::new(),
            dependencies: BTreeSet::new(),
            view: BTreeMap::new(),
            envoy_got: Vec::new(),
            relay_got: Vec::new(),
        };
        chain.control_has(world);
        chain
    }

    fn control_has(&mut self, world: &str) {
        let mut kind = Cluster;
        let mut groups = BTreeMap::new();
        for word in world.split_whitespace() {
            match word.split_once('=') {
                Some((name, content)) => {
                    _ = groups.insert(group_key(kind, name), upsert(resource(kind, name, content)).1)
                }
                None => kind = Kind::ALL.into_iter().find(|kind| kind.to_string() == word).unwrap(),
            }
        }
        let gone: Vec<_> = self.world.groups().map(|group| (group.key().clone(), None)).collect();
        let gone = gone.into_iter().filter(|(key, _)| !groups.contains_key(key)).collect::<Vec<_>>();
        self.world = self.world.apply(gone.into_iter().chain(groups));
        self.run();
    }

    fn control_starts(&mut self) {
        self.control = Some(Session::delta("control"));
        self.relay.on_connected();
        self.run();
    }

    fn control_dies(&mut self) {
        self.control = None;
        self.relay.on_disconnected();
        self.run();
    }

    /// Subscribes as a starting Envoy does: to all clusters, their endpoints, all listeners, and the routes
    /// with the names of the listeners.
    fn envoy_starts(&mut self) {
        self.envoy_connects();
        self.subscribe(Cluster, &[]);
    }

    fn envoy_connects(&mut self) {
        let mut session = Session::delta("agent");
        session.record_events();
        self.envoy = Some((self.relay.on_client_connected(), session, false));
        self.dependencies.clear();
        self.view.clear();
        self.run();
    }

    fn envoy_dies(&mut self) {
        let (id, ..) = self.envoy.take().unwrap();
        self.unanswered.clear();
        self.relay.on_client_disconnected(id);
        self.run();
    }

    fn subscribe(&mut self, kind: Kind, names: &[&str]) {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        let (plus, minus) = names.into_iter().partition(|name| !name.starts_with('-'));
        self.send_request(DeltaDiscoveryRequest {
            type_url: kind.type_url().into(),
            resource_names_subscribe: plus,
            resource_names_unsubscribe: minus.iter().map(|name: &String| name[1..].into()).collect(),
            ..DeltaDiscoveryRequest::default()
        });
    }

    fn send_request(&mut self, mut request: DeltaDiscoveryRequest) {
        let Some((_, session, introduced)) = &mut self.envoy else { return };
        if !std::mem::replace(introduced, true) {
            request.node = Some(node());
        }
        session.on_request(self.now, request).unwrap();
        self.run();
    }

    fn run(&mut self) {
        loop {
            let mut busy = false;
            let scope = Arc::new(Scope::all());
            if let Some(control) = &mut self.control {
                control.on_snapshot(
                    self.now,
                    Snapshot { store: Arc::new(self.world.clone()), scope: scope.clone() },
                );
                while let Some(request) = self.relay.poll_request() {
                    control.on_request(self.now, request).unwrap();
                    busy = true;
                }
                while let Some(response) = control.poll_response(self.now) {
                    let response = decoded(response);
                    self.relay_got.push(printed(&response));
                    self.relay.on_response(response);
                    busy = true;
                }
            }
            if let Some((id, session, _)) = &mut self.envoy {
                session.on_snapshot(self.now, Snapshot { store: self.relay.store().clone(), scope });
                while let Some(event) = session.poll_event() {
                    self.relay.on_client_event(*id, event);
                    busy = true;
                }
                while let Some(response) = session.poll_response(self.now) {
                    let (kind, response) = (response.kind, decoded(response));
                    for word in printed(&response).split(' ').skip(1) {
                        match word.split_once('=') {
                            Some((_, "bad")) => {}
                            Some((name, content)) => {
                                _ = self.view.insert((kind, name.to_owned()), content.to_owned());
                            }
                            None => _ = self.view.remove(&(kind, word[1..].to_owned())),
                        }
                    }
                    self.envoy_got.push(printed(&response));
                    self.unanswered.push((kind, response.nonce.clone(), printed(&response)));
                    busy = true;
                }
            }
            busy |= self.envoy_answers();
            if !busy {
                return;
            }
        }
    }

    fn envoy_answers(&mut self) -> bool {
        let Some(verdict) = self.verdict else { return false };
        let Some((_, session, _)) = &mut self.envoy else { return false };
        let busy = !self.unanswered.is_empty();
        for (kind, nonce, response) in std::mem::take(&mut self.unanswered) {
            let request = |kind: Kind| DeltaDiscoveryRequest {
                type_url: kind.type_url().into(),
                resource_names_unsubscribe: vec!["never".into()],
                ..DeltaDiscoveryRequest::default()
            };
            let names = |mark: fn(&&str) -> bool| {
                let words = response.split(' ').skip(1).filter(mark);
                words
                    .map(|word| word.trim_start_matches('-').split('=').next().unwrap().to_owned())
                    .collect::<Vec<_>>()
            };
            let follow = match kind {
                Cluster => Some(Endpoint),
                Listener => Some(Route),
                _ => None,
            };
            if let Some(follow) = follow {
                let mut resource_names_subscribe =
                    names(|word| !word.starts_with('-') && !word.ends_with("=bad"));
                resource_names_subscribe.retain(|name| self.dependencies.insert((follow, name.clone())));
                let resource_names_unsubscribe = names(|word| word.starts_with('-'));
                for name in &resource_names_unsubscribe {
                    self.dependencies.remove(&(follow, name.clone()));
                    self.view.remove(&(follow, name.clone()));
                }
                session
                    .on_request(
                        self.now,
                        DeltaDiscoveryRequest {
                            resource_names_subscribe,
                            resource_names_unsubscribe,
                            ..request(follow)
                        },
                    )
                    .unwrap();
            }
            let error = verdict(&response)
                .map(|message| vmesh_proto::google::rpc::Status { message, ..Default::default() });
            let answer =
                DeltaDiscoveryRequest { response_nonce: nonce, error_detail: error, ..request(kind) };
            session.on_request(self.now, answer).unwrap();
            if kind == Cluster {
                session
                    .on_request(
                        self.now,
                        DeltaDiscoveryRequest { type_url: Listener.type_url().into(), ..Default::default() },
                    )
                    .unwrap();
            }
        }
        busy
    }

    fn envoy_got(&mut self) -> String {
        std::mem::take(&mut self.envoy_got).join(", ")
    }

    fn relay_got(&mut self) -> String {
        std::mem::take(&mut self.relay_got).join(", ")
    }

    fn accepted(&self) -> String {
        let words = self.relay.accepted().map(|resource| match resource.is_absent() {
            true => format!("-{}", resource.name()),
            false => String::from_utf8_lossy(&resource.value()).into_owned(),
        });
        words.collect::<Vec<_>>().join(" ")
    }

    fn control_state(&self) -> &State {
        &self.control.as_ref().unwrap().status().state
    }

    /// Restarts the agent: a new relay continues with the resources that the old one had accepted.
    fn restart(self, world: &str) -> Chain {
        Chain::with(Relay::restore(node(), self.relay.accepted().cloned().collect::<Vec<_>>()), world)
    }

    fn step(&mut self, step: &ChainStep) {
        match step {
            ChainStep::World(contents) => {
                let mut world = String::new();
                for (kind, contents) in [Cluster, Endpoint, Listener, Route].into_iter().zip(contents) {
                    world += &format!("{kind} ");
                    for (name, content) in
                        ["a", "b"].into_iter().zip(contents).filter(|(_, content)| **content > 0)
                    {
                        world += &match content {
                            3 => format!("{name}=bad "),
                            content => format!("{name}={content} "),
                        };
                    }
                }
                self.control_has(&world);
            }
            ChainStep::ControlStarts => self.control_starts(),
            ChainStep::ControlDies => self.control_dies(),
            ChainStep::EnvoyStarts if self.envoy.is_none() => self.envoy_starts(),
            ChainStep::EnvoyDies if self.envoy.is_some() => self.envoy_dies(),
            ChainStep::EnvoyStarts | ChainStep::EnvoyDies => {}
            ChainStep::EnvoyAnswers(answers) => {
                self.verdict = answers.then_some(rejects_bad);
                self.run();
            }
            ChainStep::AgentRestarts => {
                self.step(&ChainStep::EnvoyDies);
                self.control = None;
                self.relay = Relay::restore(node(), self.relay.accepted().cloned().collect::<Vec<_>>());
            }
            ChainStep::Wait => {
                self.now += Duration::from_secs(31);
                self.run();
            }
        }
    }

    fn settle(&mut self) {
        self.step(&ChainStep::EnvoyAnswers(true));
        self.step(&ChainStep::EnvoyStarts);
        if self.control.is_none() {
            self.control_starts();
        }
        for _ in 0..60 {
            self.now += Duration::from_secs(5);
            self.run();
        }
    }

    fn assert_converged(&mut self) {
        let world = |kind: Kind, name: &str| self.world.get(kind, name).map(|resource| resource.value());
        let content = |kind: Kind, name: &str| {
            world(kind, name)
                .map(|value| String::from_utf8_lossy(&value).split_once('=').unwrap().1.to_owned())
        };
        for (kind, follow) in [(Cluster, Endpoint), (Listener, Route)] {
            for name in ["a", "b"] {
                let seen = self.view.get(&(kind, name.to_owned()));
                let expected = content(kind, name);
                if expected.as_deref() != Some("bad") {
                    assert_eq!(seen, expected.as_ref(), "{kind} {name}");
                }
                if expected.is_none_or(|expected| expected == "bad") {
                    continue;
                }
                let seen = self.view.get(&(follow, name.to_owned()));
                match content(follow, name) {
                    Some(expected) if expected == "bad" => {}
                    None if follow == Endpoint => assert_eq!(seen.map(String::as_str), Some("empty")),
                    expected => assert_eq!(seen, expected.as_ref(), "{follow} {name}"),
                }
            }
        }
        assert_ne!(*self.control_state(), State::Pushing);
        for resource in self.relay.accepted().filter(|resource| !resource.is_absent()) {
            let text = String::from_utf8_lossy(&resource.value()).into_owned();
            assert!(!text.ends_with("=bad"), "{text}");
        }
        // A relay that restarts with the accepted resources serves the same configuration.
        let served = |chain: &Chain| {
            let view = chain.view.iter().filter(|((kind, name), content)| match kind {
                Endpoint => *content != "empty" && chain.view.contains_key(&(Cluster, name.clone())),
                Route => chain.view.contains_key(&(Listener, name.clone())),
                _ => true,
            });
            view.map(|((kind, name), content)| format!("{kind} {name}={content}")).collect::<Vec<_>>()
        };
        let before = served(self);
        self.step(&ChainStep::AgentRestarts);
        self.step(&ChainStep::EnvoyStarts);
        self.step(&ChainStep::Wait);
        assert_eq!(served(self), before);
    }
}

#[derive(Clone, Debug)]
enum ChainStep {
    /// The clusters, endpoints, listeners and routes with the names `a` and `b`; 0 stands for no resource, 3
    /// for a bad one.
    World([[u8; 2]; 4]),
    ControlStarts,
    ControlDies,
    EnvoyStarts,
    EnvoyDies,
    EnvoyAnswers(bool),
    AgentRestarts,
    Wait,
}

fn steps() -> impl Strategy<Value = Vec<ChainStep>> {
    let world = prop::array::uniform4(prop::array::uniform2(0u8..=3)).prop_map(ChainStep::World);
    prop::collection::vec(
        prop_oneof![
            4 => world,
            2 => Just(ChainStep::ControlStarts),
            1 => Just(ChainStep::ControlDies),
            2 => Just(ChainStep::EnvoyStarts),
            1 => Just(ChainStep::EnvoyDies),
            2 => any::<bool>().prop_map(ChainStep::EnvoyAnswers),
            1 => Just(ChainStep::AgentRestarts),
            1 => Just(ChainStep::Wait),
        ],
        1..25,
    )
}

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

fn decoded(response: crate::Response) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse::decode(&response.into_frames().concat()[5..]).unwrap()
}

fn printed(response: &DeltaDiscoveryResponse) -> String {
    let mut words = vec![Kind::from_type_url(&response.type_url).unwrap().to_string()];
    words.extend(response.resources.iter().map(|resource| {
        let value = &resource.resource.as_ref().unwrap().value;
        let text = String::from_utf8_lossy(value).into_owned();
        if text.contains('=') { text } else { format!("{}=empty", resource.name) }
    }));
    words.extend(response.removed_resources.iter().map(|name| format!("-{name}")));
    words.join(" ")
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

    // Another Envoy gets the rejected resource once and then the good one. Another control plane learns of the
    // rejection at once.
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
