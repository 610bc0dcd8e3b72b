//! Property tests: generated requests, stores, rejections and disconnects, against a client that is as simple
//! as the protocol allows.

use super::*;
use Kind::*;
use proptest::collection::vec;
use proptest::prelude::*;
use std::collections::{BTreeSet, VecDeque};

const NAMES: [&str; 3] = ["a", "b", "c"];

/// A model of a client: its subscriptions, its resources, and the responses that it has not answered.
struct Client {
    protocol: Protocol,
    session: Session,
    now: Instant,
    introduced: bool,
    wants: PerKind<ClientInterest>,
    view: PerKind<BTreeMap<String, ClientItem>>,
    /// Responses that the server sent and the client has not read.
    wire: VecDeque<WireResponse>,
    /// Answers to responses that the client has read, not sent yet.
    unanswered: VecDeque<ClientAnswer>,
    nonces: PerKind<String>,
    world: Store,
    scope: Scope,
    /// When the last response of each kind was sent, if the client has not subscribed to more names since.
    pushed: PerKind<Option<Instant>>,
}

#[derive(Default, Clone)]
struct ClientInterest {
    asked: bool,
    all: bool,
    ever_named: bool,
    names: BTreeSet<String>,
}

#[derive(Clone, Debug, PartialEq)]
struct ClientItem {
    content: String,
    version: String,
}

struct WireResponse {
    kind: Kind,
    nonce: String,
    items: Vec<(String, ClientItem)>,
    removed: Vec<String>,
}

struct ClientAnswer {
    kind: Kind,
    nonce: String,
    error: Option<String>,
}

#[derive(Clone, Debug)]
enum Step {
    /// The contents of every kind and name; 0 stands for no resource, 3 for a bad one.
    World([[u8; 3]; 5]),
    Scope([bool; 3]),
    Subscribe(Kind, BTreeSet<&'static str>),
    Unsubscribe(Kind, BTreeSet<&'static str>),
    /// The server writes one response, if it has one.
    Poll,
    /// The client reads one response.
    Read(RejectionStyle),
    /// The client answers the response that it read first.
    Answer,
    Reconnect,
    Wait(u64),
}

/// How a client rejects a response with a bad resource.
#[derive(Clone, Copy, Debug)]
enum RejectionStyle {
    /// The client takes the good resources and names the bad ones, as Envoy does.
    Precise,
    /// The client rejects the whole response and names the bad resource, as for a message that it cannot
    /// decode.
    Strict,
    /// The client rejects the whole response and names no resource.
    Mute,
    /// The client rejects every response that would remove one of its resources, as Envoy's validator of a
    /// minimum does, and every response with a bad resource.
    Clinging,
}

impl Client {
    fn new(protocol: Protocol) -> Client {
        let mut client = Client {
            protocol,
            session: Session::delta(""),
            now: Instant::now(),
            introduced: false,
            wants: PerKind::default(),
            view: PerKind::default(),
            wire: VecDeque::new(),
            unanswered: VecDeque::new(),
            nonces: PerKind::default(),
            world: Store::default(),
            scope: Scope::all(),
            pushed: PerKind::default(),
        };
        client.connect();
        client
    }

    fn connect(&mut self) {
        self.session = match self.protocol {
            Protocol::Delta => Session::delta("model"),
            Protocol::Sotw => Session::sotw("model"),
        };
        self.introduced = false;
        self.wire.clear();
        self.unanswered.clear();
        self.nonces = PerKind::default();
        self.pushed = PerKind::default();
        self.show();
        for kind in Kind::ALL.into_iter().filter(|kind| self.wants[*kind].asked).collect::<Vec<_>>() {
            let wants = &mut self.wants[kind];
            wants.ever_named = !wants.names.is_empty();
            if !wants.all && wants.names.is_empty() {
                // A client does not subscribe to a kind of which it needs no resource.
                wants.asked = false;
                continue;
            }
            let star = (wants.all && !wants.names.is_empty()).then_some("*");
            let names: Vec<String> =
                star.into_iter().map(str::to_owned).chain(wants.names.iter().cloned()).collect();
            wants.ever_named |= star.is_some();
            match self.protocol {
                Protocol::Delta => {
                    let held =
                        self.view[kind].iter().map(|(name, item)| (name.clone(), item.version.clone()));
                    let initial_resource_versions = held.collect();
                    self.send(DeltaDiscoveryRequest {
                        resource_names_subscribe: names,
                        initial_resource_versions,
                        ..delta(kind, &[])
                    });
                }
                Protocol::Sotw => self.send_names(kind, None),
            }
        }
    }

    fn show(&mut self) {
        let snapshot = Snapshot { store: Arc::new(self.world.clone()), scope: Arc::new(self.scope.clone()) };
        self.session.on_snapshot(self.now, snapshot);
    }

    fn send(&mut self, request: impl Into<Request>) {
        let mut request = request.into();
        if !std::mem::replace(&mut self.introduced, true) {
            let node = Some(Node { id: "web-1".into(), ..Node::default() });
            match &mut request {
                Request::Delta(request) => request.node = node,
                Request::Sotw(request) => request.node = node,
            }
        }
        self.session.on_request(self.now, request).unwrap();
    }

    fn send_names(&mut self, kind: Kind, error: Option<String>) {
        let wants = &self.wants[kind];
        let star = (wants.all && wants.ever_named).then(|| "*".to_owned());
        self.send(DiscoveryRequest {
            type_url: kind.type_url().into(),
            resource_names: star.into_iter().chain(wants.names.iter().cloned()).collect(),
            response_nonce: self.nonces[kind].clone(),
            error_detail: error.and_then(|message| super::error(&message)),
            ..DiscoveryRequest::default()
        });
    }

    /// Subscribes to names, or to all resources if `names` is empty and the kind has a wildcard.
    fn subscribe(&mut self, kind: Kind, names: &BTreeSet<&'static str>) {
        let wants = &mut self.wants[kind];
        let first = !std::mem::replace(&mut wants.asked, true);
        let all = names.is_empty() && kind.has_wildcard();
        if names.is_empty() && !all {
            return;
        }
        wants.all |= all;
        wants.ever_named |= !names.is_empty() || (!first && all);
        wants.names.extend(names.iter().map(|name| name.to_string()));
        self.pushed[kind] = None;
        match self.protocol {
            Protocol::Delta => {
                let star = (all && !first).then_some("*");
                let names: Vec<&str> = names.iter().copied().chain(star).collect();
                self.send(delta(kind, &names));
            }
            Protocol::Sotw => self.send_names(kind, None),
        }
    }

    fn unsubscribe(&mut self, kind: Kind, names: &BTreeSet<&'static str>) {
        let wants = &mut self.wants[kind];
        // Two cases are excluded for SotW: before the first name, an empty list means "all"; and a client that
        // drops a name before it has answered, and then subscribes again, has discarded a resource that the
        // server thinks it has.
        let answers = self.unanswered.iter().map(|answer| answer.kind);
        let mut waiting = self.wire.iter().map(|sent| sent.kind).chain(answers);
        let cannot = !wants.ever_named || waiting.any(|waiting| waiting == kind);
        if !wants.asked || (self.protocol == Protocol::Sotw && cannot) {
            return;
        }
        if names.is_empty() {
            wants.all = false;
            wants.ever_named = true;
        }
        names.iter().for_each(|name| _ = wants.names.remove(*name));
        if !wants.all {
            let kept = wants.names.clone();
            self.view[kind].retain(|name, _| kept.contains(name));
        }
        match self.protocol {
            Protocol::Delta => {
                let names: Vec<String> = match names.is_empty() {
                    true => vec!["*".to_owned()],
                    false => names.iter().map(|name| name.to_string()).collect(),
                };
                self.send(DeltaDiscoveryRequest { resource_names_unsubscribe: names, ..delta(kind, &[]) });
            }
            Protocol::Sotw => self.send_names(kind, None),
        }
    }

    fn poll(&mut self) -> bool {
        let Some(response) = self.session.poll_response(self.now) else { return false };
        let (kind, nonce) = (response.kind, response.nonce.to_string());
        let message = unframed(response);
        let item = |kind, version: String, value: &Bytes| ClientItem {
            content: content(value),
            version: if version.is_empty() { resource(kind, "", "").version().into() } else { version },
        };
        let (items, removed): (Vec<(String, ClientItem)>, Vec<String>) = match self.protocol {
            Protocol::Delta => {
                let message = DeltaDiscoveryResponse::decode(message).unwrap();
                let items = message.resources.into_iter().map(|resource| {
                    let item = item(kind, resource.version, &resource.resource.unwrap().value);
                    (resource.name, item)
                });
                (items.collect(), message.removed_resources)
            }
            Protocol::Sotw => {
                let message = DiscoveryResponse::decode(message).unwrap();
                let items = message.resources.into_iter();
                let items =
                    items.map(|any| (name_of(kind, &any.value), item(kind, String::new(), &any.value)));
                (items.collect(), Vec::new())
            }
        };
        let sent = WireResponse { kind, nonce, items, removed };
        self.check(&sent);
        self.pushed[kind] = Some(self.now);
        self.wire.push_back(sent);
        true
    }

    fn check(&self, sent: &WireResponse) {
        let WireResponse { kind, items, removed, .. } = sent;
        let wants = &self.wants[*kind];
        let waiting = self.wire.iter().any(|sent| sent.kind == *kind)
            || self.unanswered.iter().any(|answer| answer.kind == *kind);
        // In SotW the server applies new names only with the answer to the last response (R10).
        let is_known = self.protocol == Protocol::Delta || !waiting;
        let mut names = BTreeSet::new();
        for name in items.iter().map(|(name, _)| name).chain(removed) {
            assert!(names.insert(name), "R41, R42: {kind} {name} twice");
            let is_wanted = wants.all || wants.names.contains(name) || removed.contains(name);
            assert!(is_wanted || !is_known, "R32, R33: {kind} {name}");
        }
        assert!(wants.asked, "R48");
        if let Some(before) = self.pushed[*kind] {
            assert!(!waiting || self.now >= before + Duration::from_secs(30), "R20: {kind}");
        }
    }

    fn read(&mut self, style: RejectionStyle) {
        let Some(WireResponse { kind, nonce, items, removed }) = self.wire.pop_front() else { return };
        let bad: Vec<&String> =
            items.iter().filter(|(_, item)| item.content == "bad").map(|(name, _)| name).collect();
        let named = bad.iter().map(|name| format!("{name}: cannot take it")).collect::<Vec<_>>().join(", ");
        let complete = self.protocol == Protocol::Sotw && matches!(kind, Cluster | Listener);
        let is_less = match complete {
            true => self.view[kind].keys().any(|name| !items.iter().any(|(there, _)| there == name)),
            false => removed.iter().any(|name| self.view[kind].contains_key(name)),
        };
        let error = match style {
            RejectionStyle::Clinging if is_less => Some("fewer than the minimum".to_owned()),
            RejectionStyle::Clinging if !bad.is_empty() => Some("no".to_owned()),
            _ if bad.is_empty() => None,
            RejectionStyle::Clinging => None,
            RejectionStyle::Precise | RejectionStyle::Strict => Some(named),
            RejectionStyle::Mute => Some("no".to_owned()),
        };
        if error.is_none() || matches!(style, RejectionStyle::Precise) {
            let wants = &self.wants[kind];
            let view = &mut self.view[kind];
            if complete {
                view.retain(|name, _| items.iter().any(|(there, _)| there == name));
            }
            for (name, item) in items.iter().filter(|(_, item)| item.content != "bad") {
                if wants.all || wants.names.contains(name) {
                    view.insert(name.clone(), item.clone());
                }
            }
            removed.iter().for_each(|name| _ = view.remove(name));
        }
        self.unanswered.push_back(ClientAnswer { kind, nonce, error });
    }

    fn answer(&mut self) {
        let Some(ClientAnswer { kind, nonce, error }) = self.unanswered.pop_front() else { return };
        match self.protocol {
            Protocol::Delta => {
                let error_detail = error.and_then(|message| super::error(&message));
                self.send(DeltaDiscoveryRequest {
                    response_nonce: nonce,
                    error_detail,
                    ..delta(kind, &["-never"])
                });
            }
            Protocol::Sotw => {
                self.nonces[kind] = nonce;
                self.send_names(kind, error);
            }
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::World(contents) => {
                self.world = self.world.apply(world(contents));
                self.show();
            }
            Step::Scope(sees) => {
                self.scope =
                    Scope::named(NAMES.iter().zip(sees).filter(|(_, sees)| **sees).map(|(name, _)| *name));
                self.show();
            }
            Step::Subscribe(kind, names) => self.subscribe(*kind, names),
            Step::Unsubscribe(kind, names) => self.unsubscribe(*kind, names),
            Step::Poll => _ = self.poll(),
            Step::Read(style) => self.read(*style),
            Step::Answer => self.answer(),
            Step::Reconnect => self.connect(),
            Step::Wait(seconds) => self.now += Duration::from_secs(*seconds),
        }
    }

    /// Sends, reads and answers until neither end has anything left to do.
    fn settle(&mut self, style: RejectionStyle) {
        let mut rounds = 0;
        loop {
            let mut busy = self.poll();
            while !self.wire.is_empty() || !self.unanswered.is_empty() {
                self.read(style);
                self.answer();
                busy = true;
            }
            if !busy {
                let Some(timeout) = self.session.poll_timeout() else { return };
                assert!(timeout > self.now, "a timer that fires at once");
                self.now = timeout;
            }
            rounds += 1;
            assert!(rounds < 500, "it never ends");
        }
    }

    fn assert_converged(&self) {
        let snapshot = Snapshot { store: Arc::new(self.world.clone()), scope: Arc::new(self.scope.clone()) };
        for (kind, wants) in self.wants.iter() {
            let of_world = snapshot.of_kind(kind).map(|resource| resource.name().to_string());
            let names: BTreeSet<String> = match wants.all {
                true => of_world
                    .chain(self.view[kind].keys().cloned())
                    .chain(wants.names.iter().cloned())
                    .collect(),
                false => self.view[kind].keys().chain(&wants.names).cloned().collect(),
            };
            for name in names {
                let expected = snapshot.get(kind, &name).map(|resource| content(&resource.value()));
                let observed = self.view[kind].get(&name).map(|item| item.content.clone());
                let place = format!("{:?} {kind} {name}: {observed:?} and not {expected:?}", self.protocol);
                match expected.as_deref() {
                    Some("bad") => assert_ne!(observed.as_deref(), Some("bad"), "{place}"),
                    Some(_) => assert_eq!(observed, expected, "{place}"),
                    None => match AbsenceSignal::of(self.protocol, kind) {
                        AbsenceSignal::Silence => {}
                        AbsenceSignal::EmptyAssignment => {
                            assert!(observed.is_none_or(|observed| observed == "empty"), "{place}")
                        }
                        _ if kind == Endpoint && snapshot.get(Cluster, &name).is_some() => {
                            assert_eq!(observed.as_deref(), Some("empty"), "{place}");
                        }
                        _ => assert_eq!(observed, None, "{place}"),
                    },
                }
            }
        }
    }
}

fn world(contents: &[[u8; 3]; 5]) -> Vec<(Arc<str>, Option<Arc<Group>>)> {
    let group = |at: usize| {
        let resources = Kind::ALL.into_iter().zip(contents).filter(|(_, contents)| contents[at] > 0);
        let resources = resources.map(|(kind, contents)| {
            let content = if contents[at] == 3 { "bad".to_owned() } else { contents[at].to_string() };
            resource(kind, NAMES[at], &content)
        });
        (NAMES[at].into(), Some(Group::new(NAMES[at], resources)))
    };
    (0..3).map(group).collect()
}

/// Replaces the rejection style of some steps by [`RejectionStyle::Clinging`].
fn clinging(steps: &[Step]) -> Vec<Step> {
    let cling = |(at, step): (usize, &Step)| match step {
        Step::Read(_) if at % 2 == 0 => Step::Read(RejectionStyle::Clinging),
        step => step.clone(),
    };
    steps.iter().enumerate().map(cling).collect()
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let kind = prop::sample::select(&Kind::ALL[..]);
    let names = prop::sample::subsequence(&NAMES[..], 0..=3).prop_map(|names| names.into_iter().collect());
    let world = prop::array::uniform5(prop::array::uniform3(0u8..=3)).prop_map(Step::World);
    let step = prop_oneof![
        3 => world,
        1 => prop::array::uniform3(any::<bool>()).prop_map(Step::Scope),
        3 => (kind.clone(), names.clone()).prop_map(|(kind, names)| Step::Subscribe(kind, names)),
        2 => (kind, names).prop_map(|(kind, names)| Step::Unsubscribe(kind, names)),
        8 => Just(Step::Poll),
        8 => style().prop_map(Step::Read),
        6 => Just(Step::Answer),
        1 => Just(Step::Reconnect),
        1 => prop_oneof![Just(1), Just(12), Just(31)].prop_map(Step::Wait),
    ];
    vec(step, 1..60)
}

fn style() -> impl Strategy<Value = RejectionStyle> {
    prop_oneof![Just(RejectionStyle::Precise), Just(RejectionStyle::Strict), Just(RejectionStyle::Mute)]
}

fn converges(protocol: Protocol, steps: &[Step], style: RejectionStyle) {
    let mut client = Client::new(protocol);
    steps.iter().for_each(|step| client.step(step));
    client.settle(style);
    client.assert_converged();
    let state = client.session.status().state.clone();
    assert_ne!(state, State::Pushing);
    if state == State::Synced {
        let asked = client.wants.iter().any(|(_, wants)| wants.asked);
        let observed = client.session.status().generation_acked;
        assert!(!asked || observed == client.world.generation() || observed == 0, "{observed}");
    }
    // R19: neither time nor an unchanged snapshot causes a response.
    client.show();
    assert!(!client.poll());
    client.now += Duration::from_secs(3600);
    assert!(!client.poll());
    assert_eq!(client.session.poll_timeout(), None);
}

/// A client as careful as Envoy: it ACKs clusters when it has their endpoints, and asserts that each of its
/// routes leads to a cluster that it has. The content of a route is the name of its cluster.
struct CarefulClient {
    client: Client,
    /// Answers to cluster responses that wait for endpoints.
    warming: VecDeque<ClientAnswer>,
}

#[derive(Clone, Debug)]
enum CarefulStep {
    /// The clusters of the server, and for each of the two routes the index of its cluster, modulo their
    /// number.
    World(BTreeSet<&'static str>, [usize; 2]),
    Poll,
    Read,
    Answer,
    Reconnect,
}

impl CarefulClient {
    fn new() -> CarefulClient {
        let mut careful = CarefulClient { client: Client::new(Protocol::Delta), warming: VecDeque::new() };
        careful.client.subscribe(Cluster, &BTreeSet::new());
        careful.client.subscribe(Listener, &BTreeSet::new());
        careful.client.subscribe(Route, &BTreeSet::from(["r", "s"]));
        careful
    }

    fn step(&mut self, step: &CarefulStep) {
        let client = &mut self.client;
        match step {
            CarefulStep::World(clusters, routes) => {
                let clusters: Vec<_> = clusters.iter().copied().collect();
                let mut world = String::from("route ");
                if let Some(modulus) = std::num::NonZero::new(clusters.len()) {
                    world +=
                        &format!("r={} s={} ", clusters[routes[0] % modulus], clusters[routes[1] % modulus]);
                }
                for kind in ["cluster", "endpoints"] {
                    world += &format!("{kind} {}=1 ", clusters.join("=1 ")).replace(" =1", "");
                }
                let groups = groups(&world);
                let gone: Vec<_> = client.world.groups().map(|group| group.key().clone()).collect();
                let gone = gone.into_iter().filter(|key| !groups.contains_key(key)).map(|key| (key, None));
                let there = groups.clone().into_iter().map(|(key, group)| (key, Some(group)));
                client.world = client.world.apply(gone.chain(there));
                client.show();
            }
            CarefulStep::Poll => _ = client.poll(),
            CarefulStep::Read => self.read(),
            CarefulStep::Answer => client.answer(),
            CarefulStep::Reconnect => {
                self.warming.clear();
                client.connect();
            }
        }
    }

    fn read(&mut self) {
        let client = &mut self.client;
        client.read(RejectionStyle::Precise);
        let Some(answer) = client.unanswered.pop_back() else { return };
        let has: BTreeSet<String> = client.view[Cluster].keys().cloned().collect();
        if answer.kind == Cluster {
            let named: BTreeSet<String> = client.wants[Endpoint].names.clone();
            let new: BTreeSet<_> =
                NAMES.into_iter().filter(|name| has.contains(*name) && !named.contains(*name)).collect();
            let old: BTreeSet<_> =
                NAMES.into_iter().filter(|name| !has.contains(*name) && named.contains(*name)).collect();
            if !new.is_empty() {
                client.subscribe(Endpoint, &new);
            }
            if !old.is_empty() {
                client.unsubscribe(Endpoint, &old);
            }
            self.warming.push_back(answer);
        } else {
            client.unanswered.push_back(answer);
        }
        if has.iter().all(|name| client.view[Endpoint].contains_key(name)) {
            client.unanswered.extend(self.warming.drain(..));
        }
        for (route, item) in &client.view[Route] {
            let target = &item.content;
            assert!(
                client.view[Cluster].contains_key(target),
                "route {route} leads to {target}, which is not there"
            );
            assert!(
                client.view[Endpoint].contains_key(target),
                "route {route} leads to {target}, which is cold"
            );
        }
    }
}

fn careful_steps() -> impl Strategy<Value = Vec<CarefulStep>> {
    let clusters = prop::sample::subsequence(&NAMES[..], 0..=3).prop_map(|names| names.into_iter().collect());
    let world = (clusters, prop::array::uniform2(0usize..3))
        .prop_map(|(names, routes)| CarefulStep::World(names, routes));
    let step = prop_oneof![
        2 => world,
        6 => Just(CarefulStep::Poll),
        6 => Just(CarefulStep::Read),
        5 => Just(CarefulStep::Answer),
        1 => Just(CarefulStep::Reconnect),
    ];
    vec(step, 1..80)
}

/// Generates requests that no real client sends.
fn nonsense() -> impl Strategy<Value = (bool, DeltaDiscoveryRequest)> {
    let name =
        prop_oneof![Just(String::new()), Just("*".into()), Just("a".into()), Just("-".into()), "\\PC{0,9}"];
    let nonce = prop_oneof![Just(String::new()), (0u64..20).prop_map(|nonce| nonce.to_string()), "\\PC{0,9}"];
    let names = vec(name.clone(), 0..5);
    let versions = prop::collection::btree_map(name, "[0-9a-f]{0,3}", 0..5);
    let kind = prop::sample::select(&Kind::ALL[..]);
    let known = (any::<bool>(), kind, prop::option::of("\\PC{0,30}"), nonce);
    (known, names.clone(), names, versions).prop_map(
        |((poll, kind, error, response_nonce), subscribe, unsubscribe, initial_resource_versions)| {
            let request = DeltaDiscoveryRequest {
                resource_names_subscribe: subscribe,
                resource_names_unsubscribe: unsubscribe,
                initial_resource_versions,
                response_nonce,
                error_detail: error.and_then(|message| super::error(&message)),
                ..delta(kind, &[])
            };
            (poll, request)
        },
    )
}

/// Runs at least 1,500 cases; `PROPTEST_CASES` raises the number.
fn config() -> ProptestConfig {
    let more = ProptestConfig::default();
    ProptestConfig { cases: more.cases.max(1500), failure_persistence: None, ..more }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_delta_client_ends_up_with_what_it_asked_for_whatever_happens(steps in steps(), style in style()) {
        converges(Protocol::Delta, &steps, style);
    }

    #[test]
    fn a_sotw_client_ends_up_with_what_it_asked_for_whatever_happens(steps in steps(), style in style()) {
        converges(Protocol::Sotw, &steps, style);
    }

    #[test]
    fn a_client_that_keeps_what_it_has_is_soon_left_alone_and_gets_all_else(steps in steps(), sotw in any::<bool>()) {
        let mut client = Client::new(if sotw { Protocol::Sotw } else { Protocol::Delta });
        clinging(&steps).iter().for_each(|step| client.step(step));
        client.settle(RejectionStyle::Clinging);
        prop_assert_ne!(&client.session.status().state, &State::Pushing);
        // The check covers delta only: a SotW client rejects a set that lacks a resource together with every
        // new resource in it.
        let snapshot = Snapshot { store: Arc::new(client.world.clone()), scope: Arc::new(client.scope.clone()) };
        for (kind, wants) in client.wants.iter().filter(|_| !sotw) {
            for resource in snapshot.of_kind(kind).filter(|resource| wants.all || wants.names.contains(&**resource.name())) {
                let expected = content(&resource.value());
                let observed = client.view[kind].get(&**resource.name()).map(|item| item.content.as_str());
                prop_assert!(expected == "bad" || observed == Some(&expected), "{kind} {}: {observed:?}", resource.name());
            }
        }
        client.show();
        prop_assert!(!client.poll());
        client.now += Duration::from_secs(3600);
        prop_assert!(!client.poll());
        prop_assert_eq!(client.session.poll_timeout(), None);
    }

    #[test]
    fn nonsense_neither_panics_nor_is_answered_without_end(requests in vec(nonsense(), 1..40), sotw in any::<bool>()) {
        let mut client = Client::new(if sotw { Protocol::Sotw } else { Protocol::Delta });
        client.step(&Step::World([[1, 2, 3]; 5]));
        for (poll, request) in requests {
            match sotw {
                false => client.send(request),
                true => client.send(DiscoveryRequest {
                    type_url: request.type_url,
                    resource_names: request.resource_names_subscribe,
                    response_nonce: request.response_nonce,
                    error_detail: request.error_detail,
                    ..DiscoveryRequest::default()
                }),
            }
            if poll {
                _ = client.session.poll_response(client.now);
            }
            client.step(&Step::World([[2, 1, 0]; 5]));
        }
        let responses = std::iter::from_fn(|| client.session.poll_response(client.now)).count();
        prop_assert!(responses < 20, "{responses}");
    }

    #[test]
    fn r47_no_route_ever_leads_to_a_cluster_that_is_not_there(steps in careful_steps()) {
        let mut careful = CarefulClient::new();
        steps.iter().for_each(|step| careful.step(step));
        for _ in 0..200 {
            for step in [CarefulStep::Poll, CarefulStep::Read, CarefulStep::Answer] {
                careful.step(&step);
            }
        }
        careful.client.now += Duration::from_secs(1);
        for _ in 0..200 {
            for step in [CarefulStep::Poll, CarefulStep::Read, CarefulStep::Answer] {
                careful.step(&step);
            }
        }
        careful.client.assert_converged();
    }
}
