use crate::subscriber::{Ticket, Update};
use crate::{Event, Group, Kind, PerKind, Resource, Store, Subscriber};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmesh_proto::agent::{Refusal, Refusals};
use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

/// Connects the control plane and the Envoy of one node: an xDS client of the former, an xDS server of the
/// latter. It does no I/O.
///
/// What the control plane sends goes into a [store](Relay::store), which sessions serve to Envoy; what Envoy
/// does comes back as [`Event`]s. The relay answers a response of the control plane when Envoy has answered for
/// each resource in it, and rejects it with Envoy's own words. The resources that Envoy took are
/// [accepted](Relay::accepted): an agent that saves them can restart from them and serve Envoy without any
/// control plane.
///
/// Towards the control plane the methods are called in the order of a [`Subscriber`]:
/// [`on_connected`](Relay::on_connected), [`poll_request`](Relay::poll_request) until it returns `None`,
/// [`on_response`](Relay::on_response), [`on_disconnected`](Relay::on_disconnected). Towards Envoy each stream
/// gets a [`ClientId`] from [`on_client_connected`](Relay::on_client_connected), the events of its session go
/// to [`on_client_event`](Relay::on_client_event), and
/// [`on_client_disconnected`](Relay::on_client_disconnected) ends it. After each call the caller passes the
/// current [`store`](Relay::store) to the sessions and polls the requests again.
pub struct Relay {
    upstream: Subscriber,
    store: Arc<Store>,
    clients: BTreeMap<ClientId, PerKind<BTreeSet<Arc<str>>>>,
    next_client: u64,
    kinds: PerKind<KindState>,
    accepted_revision: u64,
    /// The number of retries so far, which makes the fingerprint of each retry unique.
    attempts: u64,
    /// Whether Envoy has taken a resource or removal that the relay had already rejected to the control plane.
    has_recovered: bool,
    /// Validates resources of [`Kind::Local`]. `None` if the owner did not subscribe to them.
    check_local: Option<CheckLocal>,
}

/// Validates a resource of [`Kind::Local`]. The error describes the defect.
pub type CheckLocal = fn(&Resource) -> Result<(), String>;

/// One stream of Envoy. There are two while Envoy hot restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientId(u64);

/// The state of one kind: responses that are not answered yet, and what Envoy rejected.
#[derive(Default)]
struct KindState {
    unanswered: VecDeque<UnansweredResponse>,
    /// The resources that Envoy rejected in the version that the control plane sends now.
    rejected: BTreeMap<Arc<str>, RejectedResource>,
    /// Names whose removal an Envoy rejected, with the reason. That Envoy keeps its resource until it
    /// disconnects.
    unremovable: BTreeMap<Arc<str>, (ClientId, Arc<str>)>,
    /// The fingerprints of rejected resources with the reasons, including names whose resource has changed
    /// since. Envoy's session does not send a rejected resource again, so if the control plane goes back to
    /// one, the relay must reject it without waiting for Envoy.
    known_bad: BTreeMap<Arc<str>, (u64, Arc<str>)>,
    /// Names whose accepted resource was taken by an earlier Envoy and rejected by a later one.
    disputed: BTreeSet<Arc<str>>,
}

struct RejectedResource {
    resource: Arc<Resource>,
    reason: Arc<str>,
    /// Set if the host was the cause and not the resource: the relay then sends the resource again.
    retry: Option<Retry>,
}

struct Retry {
    pause: Duration,
    /// When to send the resource again. `None` until the first [`Relay::on_timeout`] after the rejection, and
    /// while a retry is in flight.
    at: Option<Instant>,
    is_tried: bool,
}

/// The first pause before the relay retries a resource that Envoy rejected because of the host. The pause
/// doubles with each retry.
const RETRY_FIRST: Duration = Duration::from_secs(2);
/// The longest pause: an address that appears late is served within a minute, and Envoy logs one line a minute.
const RETRY_LAST: Duration = Duration::from_secs(60);
/// The limit of one reason in a NACK, in bytes.
const REFUSAL_REASON_MAX: usize = 1024;
/// The limit of refused resources that one NACK lists. The control plane sends the others again and learns
/// about them then.
const REFUSALS_MAX: usize = 256;

/// Reports whether Envoy's error text blames the host (an address that is in use or missing) and not the
/// resource: Envoy may take the same resource later.
fn blames_host(reason: &str) -> bool {
    let reason = reason.to_ascii_lowercase();
    const OF_HOST: [&str; 6] = [
        "address already in use",
        "address in use",
        "cannot assign requested address",
        "cannot bind",
        "permission denied",
        "too many open files",
    ];
    OF_HOST.iter().any(|of_host| reason.contains(of_host))
}

struct UnansweredResponse {
    /// `None` after the upstream stream has ended.
    ticket: Option<Ticket>,
    /// The names for which Envoy has not answered, with the fingerprint of the resource; `None` stands for a
    /// removal.
    waiting: BTreeMap<Arc<str>, Option<u64>>,
    reasons: Vec<Arc<str>>,
    refusals: Vec<Refusal>,
    /// The generation of the store that first contained the response.
    generation: u64,
}

/// The limit of unanswered responses per kind. A server sends the next response of a kind after 30 s without an
/// answer, so an older one is never answered.
const UNANSWERED_MAX: usize = 4;

impl Relay {
    /// Makes a relay without any resource: Envoy gets no answer before the control plane has sent one.
    pub fn new(node: Node) -> Relay {
        let mut upstream = Subscriber::new(node);
        upstream.subscribe_all(Kind::Cluster);
        upstream.subscribe_all(Kind::Listener);
        // Sessions answer a subscription to `Kind::Local` at once: no resource of that kind is for Envoy.
        let store = Store::partial().apply([upsert(Resource::absent(Kind::Local, "*"))]);
        Relay {
            upstream,
            store: Arc::new(store),
            clients: BTreeMap::new(),
            next_client: 0,
            kinds: PerKind::default(),
            accepted_revision: 0,
            attempts: 0,
            has_recovered: false,
            check_local: None,
        }
    }

    /// Subscribes also to resources of [`Kind::Local`], which describe the node and not its proxy. A resource
    /// that passes `check` is [accepted](Relay::accepted) at once; sessions never serve it.
    pub fn subscribe_local(&mut self, check: CheckLocal) {
        self.check_local = Some(check);
        self.upstream.subscribe_all(Kind::Local);
    }

    /// Makes a relay that continues with the resources that Envoy [accepted](Relay::accepted) in an earlier run
    /// of the agent.
    pub fn restore(node: Node, accepted: impl IntoIterator<Item = Arc<Resource>>) -> Relay {
        let mut relay = Relay::new(node);
        let mut changes = Vec::new();
        for resource in accepted {
            let kind = resource.kind();
            if !kind.has_wildcard() && !resource.is_absent() {
                relay.upstream.subscribe(kind, resource.name().clone());
            }
            if kind != Kind::Local {
                changes.push(upsert(resource.clone()));
            }
            relay.upstream.hold(resource);
        }
        relay.store = Arc::new(relay.store.apply(changes));
        relay
    }

    /// Returns the store that sessions serve. Each change makes a new store.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Iterates over the resources that Envoy took last, one per name, tombstones included.
    pub fn accepted(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.upstream.all_held()
    }

    /// Returns the resource that Envoy took last under this name, unless a later Envoy rejected that very
    /// resource.
    pub fn in_force(&self, kind: Kind, name: &str) -> Option<&Arc<Resource>> {
        self.upstream.held(kind, name).filter(|_| !self.kinds[kind].disputed.contains(name))
    }

    /// Returns the names for which [`Relay::in_force`] may have changed since the previous call.
    pub fn take_changes(&mut self) -> BTreeSet<(Kind, Arc<str>)> {
        self.upstream.take_changes()
    }

    /// Reports whether [`Relay::accepted`] contains all resources of a wildcard kind: the control plane has
    /// listed them once, now or before a restart, and Envoy has answered for all of them.
    pub fn has_all(&self, kind: Kind) -> bool {
        self.upstream.held(kind, "*").is_some() && self.kinds[kind].unanswered.is_empty()
    }

    /// Returns a counter that grows with each change of [`Relay::accepted`] and of [`Relay::in_force`].
    pub fn accepted_revision(&self) -> u64 {
        self.accepted_revision
    }

    /// Iterates over the names that Envoy rejects, with its reasons: rejected resources first, then rejected
    /// removals.
    pub fn rejections(&self) -> impl Iterator<Item = (Kind, &Arc<str>, &Arc<str>)> {
        self.kinds.iter().flat_map(|(kind, state)| {
            let removals = state.unremovable.iter().map(|(name, (_, reason))| (name, reason));
            let contents = state.rejected.iter().map(|(name, rejected)| (name, &rejected.reason));
            contents.chain(removals).map(move |(name, reason)| (kind, name, reason))
        })
    }

    /// Returns `true` once after Envoy has taken a resource or removal that the relay had rejected. The caller
    /// then reconnects upstream: only a new stream can report an acceptance after a NACK.
    pub fn take_recovered(&mut self) -> bool {
        std::mem::take(&mut self.has_recovered)
    }

    /// Sends resources again whose retry is due. Returns the time of the next retry, when the caller must call
    /// this again.
    pub fn on_timeout(&mut self, now: Instant) -> Option<Instant> {
        let (mut next, mut again) = (None::<Instant>, Vec::new());
        for (_, state) in self.kinds.iter_mut() {
            for rejected in state.rejected.values_mut() {
                let Some(retry) = rejected.retry.as_mut().filter(|retry| !retry.is_tried) else { continue };
                let at = *retry.at.get_or_insert(now + retry.pause);
                if at <= now {
                    (retry.at, retry.is_tried) = (None, true);
                    self.attempts += 1;
                    again.push(upsert(rejected.resource.copy_to_retry(self.attempts)));
                } else {
                    next = next.into_iter().chain([at]).min();
                }
            }
        }
        if !again.is_empty() {
            self.store = Arc::new(self.store.apply(again));
        }
        next
    }

    /// Makes the store complete until the control plane sends a response: sessions then answer that names
    /// without a resource do not exist. Envoy serves no traffic while it waits for its first answer, so after
    /// some time such an answer is better.
    pub fn stop_waiting(&mut self) {
        self.store = Arc::new(self.store.complete());
    }
}

/// The upstream end, towards the control plane.
impl Relay {
    pub fn set_node(&mut self, node: Node) {
        self.upstream.set_node(node);
    }

    pub fn on_connected(&mut self) {
        self.withdraw_unanswered();
        self.has_recovered = false;
        self.upstream.on_connected();
    }

    /// Notes that the upstream stream ended. Envoy keeps being served: responses on their way to Envoy still
    /// arrive, but their answers go to nobody.
    pub fn on_disconnected(&mut self) {
        self.upstream.on_disconnected();
        for (_, state) in self.kinds.iter_mut() {
            state.unanswered.iter_mut().for_each(|entry| entry.ticket = None);
        }
    }

    /// Withdraws resources that Envoy has not answered for and serves the accepted ones instead. A new stream
    /// lists the accepted versions, so the control plane sends the difference to those; serving the unanswered
    /// ones too would let both ends disagree about what Envoy has.
    fn withdraw_unanswered(&mut self) {
        let mut changes = Vec::new();
        for (kind, state) in self.kinds.iter_mut() {
            for entry in state.unanswered.drain(..) {
                changes.extend(entry.waiting.into_keys().map(|name| match self.upstream.held(kind, &name) {
                    Some(held) => upsert(held.clone()),
                    None => removal_of(kind, &name),
                }));
            }
        }
        if !changes.is_empty() {
            self.store = Arc::new(self.store.incomplete().apply(changes));
        }
    }

    pub fn is_connected(&self) -> bool {
        self.upstream.is_connected()
    }

    pub fn poll_request(&mut self) -> Option<DeltaDiscoveryRequest> {
        self.upstream.poll_request()
    }

    pub fn on_response(&mut self, response: DeltaDiscoveryResponse) {
        let Some(update) = self.upstream.on_response(response) else { return };
        if update.ticket.kind() == Kind::Local {
            return self.on_local(update);
        }
        let Update { ticket, resources, removed } = update;
        let kind = ticket.kind();
        let (mut changes, mut rejected_before, mut others) = (Vec::new(), Vec::new(), Vec::new());
        let mut entry = UnansweredResponse {
            ticket: Some(ticket),
            waiting: BTreeMap::new(),
            reasons: Vec::new(),
            refusals: Vec::new(),
            generation: 0,
        };
        for resource in resources {
            let name = resource.name().clone();
            self.kinds[kind].supersede(&name);
            let bad = self.kinds[kind].known_bad.get(&name).cloned();
            if let Some((_, reason)) = bad.filter(|(bad, _)| *bad == resource.fingerprint()) {
                // Envoy's session does not repeat a rejected resource, so the last good one stays in the store.
                changes.push(self.last_good(kind, &name));
                rejected_before.push((resource.clone(), reason.clone()));
                self.kinds[kind].record_rejection(resource, reason);
                continue;
            }
            self.kinds[kind].rejected.remove(&name);
            self.kinds[kind].unremovable.remove(&name);
            others.push(name.clone());
            let is_held = self.upstream.held(kind, &name).is_some_and(|held| *held == resource);
            if !is_held {
                entry.waiting.insert(name, Some(resource.fingerprint()));
            }
            changes.push(upsert(resource));
        }
        for (resource, reason) in rejected_before {
            let name = resource.name();
            entry.add_refusal(name, resource.version(), &reason, false);
            // One error text of Envoy may blame several resources. The text is not repeated once one of those
            // resources has changed.
            let is_of_others = others.iter().any(|other| reason.contains(&**other));
            entry.add_reason(match is_of_others {
                true => format!("{name}: refused before, and the same since").into(),
                false => reason,
            });
        }
        for name in removed {
            self.kinds[kind].supersede(&name);
            self.kinds[kind].rejected.remove(&name);
            if let Some((_, reason)) = self.kinds[kind].unremovable.get(&name) {
                // Envoy has already rejected this removal and still has the resource.
                entry.add_refusal(&name, "", reason, true);
                entry.add_reason(format!("{name}: {reason}").into());
                continue;
            }
            let served = self.store.get(kind, &name).is_some();
            changes.push(match kind.has_wildcard() {
                true => removal_of(kind, &name),
                false => upsert(Resource::absent(kind, name.clone())),
            });
            // Sessions never announce the removal of a secret to Envoy (R30).
            if served && kind != Kind::Secret {
                entry.waiting.insert(name, None);
            } else {
                self.accept_removal(kind, &name);
            }
        }
        if self.upstream.is_subscribed_to_all(kind) {
            let all = Resource::absent(kind, "*");
            if self.upstream.held(kind, "*").is_none() {
                self.upstream.hold(all.clone());
                self.accepted_revision += 1;
            }
            changes.push(upsert(all));
        }
        self.store = Arc::new(self.store.incomplete().apply(changes));
        entry.generation = self.store.generation();
        let state = &mut self.kinds[kind];
        state.unanswered.push_back(entry);
        if state.unanswered.len() > UNANSWERED_MAX {
            state.unanswered.pop_front();
        }
        self.answer_upstream(kind);
    }

    /// Answers a response with resources of [`Kind::Local`]. An invalid resource is rejected, and the held one
    /// of that name stays.
    fn on_local(&mut self, Update { ticket, resources, removed }: Update) {
        let Some(check) = self.check_local else {
            return self.upstream.reject(ticket, "nobody asked for this type");
        };
        let (mut reasons, mut refusals) = (Vec::new(), Vec::new());
        for resource in resources {
            match check(&resource) {
                Ok(()) => self.upstream.hold(resource),
                Err(why) => {
                    refusals.push(refusal(resource.name(), resource.version(), &why, false));
                    reasons.push(format!("{}: {why}", resource.name()));
                }
            }
        }
        removed.iter().for_each(|name| self.upstream.forget(Kind::Local, name));
        self.upstream.hold(Resource::absent(Kind::Local, "*"));
        self.accepted_revision += 1;
        match reasons.is_empty() {
            true => self.upstream.acknowledge(ticket),
            false => self.upstream.reject_with_refusals(
                ticket,
                &reasons.join("\n"),
                Some(&limited_refusals(refusals)),
            ),
        }
    }

    /// Answers the responses whose resources Envoy has all answered for, in the order in which they arrived.
    fn answer_upstream(&mut self, kind: Kind) {
        if !kind.has_wildcard() && !self.clients.is_empty() {
            // Envoy never answers for a name that no client subscribes to. The relay unsubscribes from it; the
            // next subscription fetches it again.
            let wanted: Vec<_> = self.clients.values().map(|client| &client[kind]).collect();
            let mut unwanted = Vec::new();
            for entry in &mut self.kinds[kind].unanswered {
                entry.waiting.retain(|name, waiting| {
                    let is_wanted = wanted.iter().any(|names| names.contains(name));
                    if !is_wanted {
                        unwanted.push((name.clone(), waiting.is_none()));
                    }
                    is_wanted
                });
            }
            for (name, is_removal) in unwanted {
                if is_removal {
                    self.accept_removal(kind, &name);
                }
                self.unsubscribe_unwanted(kind, &name);
            }
        }
        let unanswered = &mut self.kinds[kind].unanswered;
        while unanswered.front().is_some_and(|entry| entry.waiting.is_empty()) {
            let Some(UnansweredResponse { ticket, reasons, refusals, .. }) = unanswered.pop_front() else {
                return;
            };
            match (ticket, reasons.is_empty()) {
                (Some(ticket), true) => self.upstream.acknowledge(ticket),
                (Some(ticket), false) => {
                    self.upstream.reject_with_refusals(
                        ticket,
                        &reasons.join("\n"),
                        Some(&limited_refusals(refusals)),
                    );
                }
                (None, _) => {}
            }
        }
    }

    fn accept_removal(&mut self, kind: Kind, name: &Arc<str>) {
        self.kinds[kind].disputed.remove(name);
        match kind.has_wildcard() {
            true => self.upstream.forget(kind, name),
            false => self.upstream.hold(Resource::absent(kind, name.clone())),
        }
        self.accepted_revision += 1;
    }
}

/// The downstream end, towards Envoy.
impl Relay {
    pub fn on_client_connected(&mut self) -> ClientId {
        let id = ClientId(self.next_client);
        self.next_client += 1;
        self.clients.insert(id, PerKind::default());
        // The new client may be another Envoy, or the cause of a rejection may have disappeared, so the client
        // gets the rejected resources once. Sessions that rejected them before do not send them again.
        let mut changes = Vec::new();
        for (_, state) in self.kinds.iter_mut() {
            state.known_bad.clear();
            changes.extend(state.rejected.values().map(|rejected| upsert(rejected.resource.clone())));
        }
        if !changes.is_empty() {
            self.store = Arc::new(self.store.apply(changes));
        }
        id
    }

    /// Removes a client. The upstream subscriptions stay: the next Envoy needs the same resources.
    pub fn on_client_disconnected(&mut self, client: ClientId) {
        self.clients.remove(&client);
        for kind in Kind::ALL {
            let of_client = |(_, (by, _)): &(&Arc<str>, &(ClientId, Arc<str>))| *by == client;
            let removed: Vec<_> =
                self.kinds[kind].unremovable.iter().filter(of_client).map(|(name, _)| name.clone()).collect();
            for name in removed {
                // No Envoy has the removed resource any more.
                self.kinds[kind].unremovable.remove(&name);
                self.accept_removal(kind, &name);
                self.has_recovered = true;
            }
        }
    }

    /// Processes an event of the session that serves this client.
    pub fn on_client_event(&mut self, client: ClientId, event: Event) {
        match event {
            // Sessions never serve `Kind::Local`, so subscriptions to it are not passed on.
            Event::Subscribed { kind: Kind::Local, .. } | Event::Unsubscribed { kind: Kind::Local, .. } => {}
            Event::Subscribed { kind, name } => {
                if let Some(client) = self.clients.get_mut(&client) {
                    client[kind].insert(name.clone());
                }
                match &*name {
                    "*" => self.upstream.subscribe_all(kind),
                    _ => self.upstream.subscribe(kind, name),
                }
            }
            Event::Unsubscribed { kind, name } => {
                if let Some(client) = self.clients.get_mut(&client) {
                    client[kind].remove(&name);
                }
                self.unsubscribe_unwanted(kind, &name);
                self.answer_upstream(kind);
            }
            Event::Accepted { kind, name, resource } => self.on_accepted(kind, &name, resource),
            Event::Rejected { resource, reason } => self.on_rejected(&resource, &reason),
            Event::RemovalRejected { kind, name, reason } => {
                self.on_removal_rejected(client, kind, &name, &reason);
            }
            Event::Settled { kind, generation } => self.on_settled(kind, generation),
        }
    }

    fn on_accepted(&mut self, kind: Kind, name: &Arc<str>, resource: Option<Arc<Resource>>) {
        if kind == Kind::Local {
            return;
        }
        let fingerprint = resource.as_ref().map(|resource| resource.fingerprint());
        // Envoy may take an assignment without endpoints while the removal of that assignment is due.
        let removed = self.kinds[kind]
            .stop_waiting_for(name, |waiting| waiting.is_none() || waiting == fingerprint)
            == Some(None);
        let served = self.store.get(kind, name).map(|served| served.fingerprint());
        let mut resource = resource;
        if let Some(taken) = &mut resource {
            self.set_disputed(kind, name, false);
            let rejected = &mut self.kinds[kind].rejected;
            if rejected.get(name).is_some_and(|rejected| rejected.resource.is_same_content(taken))
                && let Some(rejected) = rejected.remove(name)
            {
                *taken = rejected.resource;
                self.kinds[kind].known_bad.remove(name);
                self.has_recovered = true;
            }
        }
        match resource {
            // The accepted resource may no longer be in the store: Envoy still has it, and keeps it if it
            // rejects a later version. Names without any subscriber are excluded.
            Some(resource)
                if self.is_wanted(kind, name)
                    && self.upstream.held(kind, name).is_none_or(|held| *held != resource) =>
            {
                self.upstream.hold(resource);
                self.accepted_revision += 1;
            }
            _ if removed || (fingerprint.is_none() && served.is_none()) => self.accept_removal(kind, name),
            _ => {}
        }
        self.answer_upstream(kind);
        if kind == Kind::Listener && self.is_connected() {
            self.prune();
        }
    }

    /// Notes whether the accepted resource of `name` is rejected by an Envoy that connected later.
    fn set_disputed(&mut self, kind: Kind, name: &Arc<str>, is_disputed: bool) {
        let disputed = &mut self.kinds[kind].disputed;
        if if is_disputed { disputed.insert(name.clone()) } else { disputed.remove(name) } {
            self.upstream.note_change(kind, name);
            self.accepted_revision += 1;
        }
    }

    fn is_wanted(&self, kind: Kind, name: &Arc<str>) -> bool {
        kind.has_wildcard() || self.clients.values().any(|client| client[kind].contains(name))
    }

    /// A session has told Envoy everything up to `generation`: Envoy has what the store has, so all responses
    /// up to that generation count as answered.
    fn on_settled(&mut self, kind: Kind, generation: u64) {
        let mut settled = Vec::new();
        for entry in &mut self.kinds[kind].unanswered {
            if entry.generation <= generation {
                settled.extend(std::mem::take(&mut entry.waiting));
            }
        }
        for (name, waiting) in settled {
            // Sessions do not send names that no client subscribed to.
            if !self.is_wanted(kind, &name) {
                continue;
            }
            let served = self.store.get(kind, &name).cloned();
            match (waiting, served) {
                (None, None) => self.accept_removal(kind, &name),
                (Some(fingerprint), Some(served)) if served.fingerprint() == fingerprint => {
                    self.set_disputed(kind, &name, false);
                    self.upstream.hold(served);
                    self.accepted_revision += 1;
                }
                _ => {}
            }
        }
        self.answer_upstream(kind);
    }

    fn on_rejected(&mut self, resource: &Arc<Resource>, reason: &Arc<str>) {
        let (kind, name) = (resource.kind(), resource.name());
        let fingerprint = resource.fingerprint();
        for entry in &mut self.kinds[kind].unanswered {
            if entry.waiting.get(name) == Some(&Some(fingerprint)) {
                entry.waiting.remove(name);
                entry.add_refusal(name, resource.version(), reason, false);
                entry.add_reason(reason.clone());
            }
        }
        let original = self.kinds[kind].record_rejection(resource.clone(), reason.clone());
        let known_bad = (original.fingerprint(), reason.clone());
        self.kinds[kind].known_bad.insert(name.clone(), known_bad);
        if self.upstream.held(kind, name).is_some_and(|held| held == resource) {
            self.set_disputed(kind, name, true);
        }
        // An Envoy that connects now must not get the rejected resource.
        let is_served = self.store.get(kind, name).is_some_and(|served| served == resource);
        if is_served {
            let change = self.last_good(kind, name);
            self.store = Arc::new(self.store.apply([change]));
        }
        self.answer_upstream(kind);
    }

    /// Records that Envoy keeps a resource whose removal it rejected. The removal stays in the store, and
    /// Envoy's session does not repeat it.
    fn on_removal_rejected(&mut self, client: ClientId, kind: Kind, name: &Arc<str>, reason: &Arc<str>) {
        let mut is_of_control_plane = false;
        for entry in &mut self.kinds[kind].unanswered {
            if entry.waiting.get(name) == Some(&None) {
                entry.waiting.remove(name);
                entry.add_refusal(name, "", reason, true);
                entry.add_reason(format!("{name}: {reason}").into());
                is_of_control_plane = true;
            }
        }
        if is_of_control_plane {
            self.kinds[kind].unremovable.insert(name.clone(), (client, reason.clone()));
        }
        self.answer_upstream(kind);
    }

    /// The replacement of a rejected resource in the store: the one that Envoy took last, or its absence. A
    /// client that asks gets an answer in either case, since Envoy serves nothing while it waits (R31).
    fn last_good(&self, kind: Kind, name: &Arc<str>) -> GroupChange {
        match self.upstream.held(kind, name) {
            Some(held) => upsert(held.clone()),
            None if kind.has_wildcard() => removal_of(kind, name),
            None => upsert(Resource::absent(kind, name.clone())),
        }
    }

    /// Unsubscribes from `name` upstream if no client subscribes to it.
    fn unsubscribe_unwanted(&mut self, kind: Kind, name: &Arc<str>) {
        let wanted = self.clients.values().any(|client| client[kind].contains(name));
        // Without a control plane a dropped resource could not be fetched again.
        if wanted || &**name == "*" || !self.is_connected() {
            return;
        }
        self.upstream.unsubscribe(kind, name);
        if !kind.has_wildcard() {
            self.kinds[kind].rejected.remove(name);
            self.kinds[kind].known_bad.remove(name);
            self.store = Arc::new(self.store.apply([removal_of(kind, name)]));
            self.accepted_revision += 1;
        }
    }

    /// Unsubscribes from endpoints and routes that only an earlier Envoy asked for. An Envoy that has its
    /// listeners has subscribed to everything that they need.
    fn prune(&mut self) {
        for kind in [Kind::Endpoint, Kind::Route] {
            let wanted = |name: &Arc<str>| self.clients.values().any(|client| client[kind].contains(name));
            let left: Vec<_> =
                self.upstream.subscriptions(kind).filter(|name| !wanted(name)).cloned().collect();
            left.iter().for_each(|name| self.unsubscribe_unwanted(kind, name));
            self.answer_upstream(kind);
        }
    }
}

impl KindState {
    /// Records that Envoy rejected a resource. Returns the resource as the control plane sent it, which differs
    /// from `resource` if that was a retry.
    fn record_rejection(&mut self, resource: Arc<Resource>, reason: Arc<str>) -> Arc<Resource> {
        let before =
            self.rejected.remove(resource.name()).filter(|before| before.resource.is_same_content(&resource));
        let (resource, retry) = match before {
            Some(before) => (before.resource, before.retry),
            None => (resource, None),
        };
        let retry = blames_host(&reason).then(|| match retry {
            Some(retry) if retry.is_tried => {
                Retry { pause: (retry.pause * 2).min(RETRY_LAST), at: None, is_tried: false }
            }
            Some(retry) => retry,
            None => Retry { pause: RETRY_FIRST, at: None, is_tried: false },
        });
        self.rejected
            .insert(resource.name().clone(), RejectedResource { resource: resource.clone(), reason, retry });
        resource
    }

    /// Stops waiting for an answer about `name`: a newer response replaces its resource.
    fn supersede(&mut self, name: &str) {
        self.unanswered.iter_mut().for_each(|entry| _ = entry.waiting.remove(name));
    }

    /// Stops waiting for `name` if `matches` accepts the awaited fingerprint, and returns that fingerprint.
    fn stop_waiting_for(&mut self, name: &str, matches: impl Fn(Option<u64>) -> bool) -> Option<Option<u64>> {
        let mut taken = None;
        for entry in &mut self.unanswered {
            if entry.waiting.get(name).is_some_and(|waiting| matches(*waiting)) {
                taken = entry.waiting.remove(name);
            }
        }
        taken
    }
}

impl UnansweredResponse {
    fn add_refusal(&mut self, name: &str, version: &str, reason: &str, removal: bool) {
        self.refusals.push(refusal(name, version, reason, removal));
    }

    fn add_reason(&mut self, reason: Arc<str>) {
        if !self.reasons.contains(&reason) {
            self.reasons.push(reason);
        }
    }
}

fn refusal(name: &str, version: &str, reason: &str, removal: bool) -> Refusal {
    let reason = reason.get(..reason.floor_char_boundary(REFUSAL_REASON_MAX)).unwrap_or(reason);
    Refusal { name: name.to_owned(), version: version.to_owned(), reason: reason.to_owned(), removal }
}

fn limited_refusals(mut refusals: Vec<Refusal>) -> Refusals {
    let others_taken = refusals.len() <= REFUSALS_MAX;
    refusals.truncate(REFUSALS_MAX);
    Refusals { refusals, others_taken }
}

type GroupChange = (Arc<str>, Option<Arc<Group>>);

/// The key of a resource's group. Each resource has a group of its own, which the relay can replace alone.
fn group_key(kind: Kind, name: &str) -> Arc<str> {
    format!("{kind} {name}").into()
}

fn upsert(resource: Arc<Resource>) -> GroupChange {
    let key = group_key(resource.kind(), resource.name());
    (key.clone(), Some(Group::new(key, [resource])))
}

fn removal_of(kind: Kind, name: &str) -> GroupChange {
    (group_key(kind, name), None)
}

#[cfg(test)]
mod tests;
