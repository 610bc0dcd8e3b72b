//! The chain under test: a control plane, a relay and an Envoy, connected without any I/O.

use super::*;

/// A control plane, the relay, and an Envoy that answers each response according to `verdict`.
pub(super) struct Chain {
    pub(super) now: Instant,
    pub(super) world: Store,
    pub(super) control: Option<Session>,
    pub(super) relay: Relay,
    pub(super) envoy: Option<(ClientId, Session, bool)>,
    /// Returns the error with which Envoy rejects a response, if any. `None`: Envoy does not answer for now.
    pub(super) verdict: Option<fn(&str) -> Option<String>>,
    pub(super) unanswered: Vec<(Kind, String, String)>,
    /// The endpoints and routes that Envoy subscribed to because of its clusters and listeners.
    pub(super) dependencies: BTreeSet<(Kind, String)>,
    /// The resources that Envoy has.
    pub(super) view: BTreeMap<(Kind, String), String>,
    /// The responses that Envoy received, and those that the control plane sent.
    pub(super) envoy_got: Vec<String>,
    pub(super) relay_got: Vec<String>,
}

pub(super) fn accepts_all(_: &str) -> Option<String> {
    None
}

pub(super) fn rejects_bad(response: &str) -> Option<String> {
    let bad = response.split(' ').filter_map(|word| word.strip_suffix("=bad"));
    let bad: Vec<_> = bad.map(|name| format!("{name}: this is bad")).collect();
    (!bad.is_empty()).then(|| bad.join(", "))
}

pub(super) fn node() -> Node {
    Node { id: "web-1".into(), ..Node::default() }
}

pub(super) fn resource(kind: Kind, name: &str, content: &str) -> Arc<Resource> {
    Resource::from_bytes(kind, name, format!("{name}={content}").as_bytes())
}

impl Chain {
    pub(super) fn new(world: &str) -> Chain {
        Chain::with(Relay::new(node()), world)
    }

    pub(super) fn with(relay: Relay, world: &str) -> Chain {
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

    pub(super) fn control_has(&mut self, world: &str) {
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

    pub(super) fn control_starts(&mut self) {
        self.control = Some(Session::delta("control"));
        self.relay.on_connected();
        self.run();
    }

    pub(super) fn control_dies(&mut self) {
        self.control = None;
        self.relay.on_disconnected();
        self.run();
    }

    /// Subscribes as a starting Envoy does: to all clusters, their endpoints, all listeners, and the routes
    /// with the names of the listeners.
    pub(super) fn envoy_starts(&mut self) {
        self.envoy_connects();
        self.subscribe(Cluster, &[]);
    }

    pub(super) fn envoy_connects(&mut self) {
        let mut session = Session::delta("agent");
        session.record_events();
        self.envoy = Some((self.relay.on_client_connected(), session, false));
        self.dependencies.clear();
        self.view.clear();
        self.run();
    }

    pub(super) fn envoy_dies(&mut self) {
        let (id, ..) = self.envoy.take().unwrap();
        self.unanswered.clear();
        self.relay.on_client_disconnected(id);
        self.run();
    }

    pub(super) fn subscribe(&mut self, kind: Kind, names: &[&str]) {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        let (plus, minus) = names.into_iter().partition(|name| !name.starts_with('-'));
        self.send_request(DeltaDiscoveryRequest {
            type_url: kind.type_url().into(),
            resource_names_subscribe: plus,
            resource_names_unsubscribe: minus.iter().map(|name: &String| name[1..].into()).collect(),
            ..DeltaDiscoveryRequest::default()
        });
    }

    pub(super) fn send_request(&mut self, mut request: DeltaDiscoveryRequest) {
        let Some((_, session, introduced)) = &mut self.envoy else { return };
        if !std::mem::replace(introduced, true) {
            request.node = Some(node());
        }
        session.on_request(self.now, request).unwrap();
        self.run();
    }

    pub(super) fn run(&mut self) {
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

    pub(super) fn envoy_answers(&mut self) -> bool {
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

    pub(super) fn envoy_got(&mut self) -> String {
        std::mem::take(&mut self.envoy_got).join(", ")
    }

    pub(super) fn relay_got(&mut self) -> String {
        std::mem::take(&mut self.relay_got).join(", ")
    }

    pub(super) fn accepted(&self) -> String {
        let words = self.relay.accepted().map(|resource| match resource.is_absent() {
            true => format!("-{}", resource.name()),
            false => String::from_utf8_lossy(&resource.value()).into_owned(),
        });
        words.collect::<Vec<_>>().join(" ")
    }

    pub(super) fn control_state(&self) -> &State {
        &self.control.as_ref().unwrap().status().state
    }

    /// Restarts the agent: a new relay continues with the resources that the old one had accepted.
    pub(super) fn restart(self, world: &str) -> Chain {
        Chain::with(Relay::restore(node(), self.relay.accepted().cloned().collect::<Vec<_>>()), world)
    }

    pub(super) fn step(&mut self, step: &ChainStep) {
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

    pub(super) fn settle(&mut self) {
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

    pub(super) fn assert_converged(&mut self) {
        let world = |kind: Kind, name: &str| self.world.get(kind, name).map(|resource| resource.value());
        let content = |kind: Kind, name: &str| {
            world(kind, name)
                .map(|value| String::from_utf8_lossy(&value).split_once('=').unwrap().1.to_owned())
        };
        for (kind, follow) in [(Cluster, Endpoint), (Listener, Route)] {
            for name in ["a", "b"] {
                let observed = self.view.get(&(kind, name.to_owned()));
                let expected = content(kind, name);
                if expected.as_deref() != Some("bad") {
                    assert_eq!(observed, expected.as_ref(), "{kind} {name}");
                }
                if expected.is_none_or(|expected| expected == "bad") {
                    continue;
                }
                let observed = self.view.get(&(follow, name.to_owned()));
                match content(follow, name) {
                    Some(expected) if expected == "bad" => {}
                    None if follow == Endpoint => assert_eq!(observed.map(String::as_str), Some("empty")),
                    expected => assert_eq!(observed, expected.as_ref(), "{follow} {name}"),
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
pub(super) enum ChainStep {
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

pub(super) fn steps() -> impl Strategy<Value = Vec<ChainStep>> {
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

pub(super) fn decoded(response: crate::Response) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse::decode(&response.into_frames().concat()[5..]).unwrap()
}

pub(super) fn printed(response: &DeltaDiscoveryResponse) -> String {
    let mut words = vec![Kind::from_type_url(&response.type_url).unwrap().to_string()];
    words.extend(response.resources.iter().map(|resource| {
        let value = &resource.resource.as_ref().unwrap().value;
        let text = String::from_utf8_lossy(value).into_owned();
        if text.contains('=') { text } else { format!("{}=empty", resource.name) }
    }));
    words.extend(response.removed_resources.iter().map(|name| format!("-{name}")));
    words.join(" ")
}
