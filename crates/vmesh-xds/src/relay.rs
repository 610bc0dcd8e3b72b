use crate::subscriber::{Ticket, Update};
use crate::{Event, Group, Kind, PerKind, Resource, Store, Subscriber};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmesh_proto::agent::{Refusal, Refusals};
use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

/// Stands between a control plane and the Envoy of one node.
///
/// What the control plane sends goes into a [store](Relay::store), which sessions serve to Envoy; what Envoy does comes
/// back as [`Event`]s. A response of the control plane is answered when Envoy has answered for each resource in it,
/// with Envoy's own words. What Envoy took is [accepted](Relay::accepted): whoever keeps that can start again from it
/// and serve Envoy with no control plane at all.
pub struct Relay {
    upstream: Subscriber,
    store: Arc<Store>,
    clients: BTreeMap<ClientId, PerKind<BTreeSet<Arc<str>>>>,
    next_client: u64,
    transits: PerKind<Transit>,
    accepted_revision: u64,
    /// Counts what is sent again.
    attempts: u64,
    /// Envoy has taken what the control plane was told that it refuses.
    has_recovered: bool,
    /// Whether it can be made out. `None`: nobody here takes what is not for Envoy.
    check_local: Option<CheckLocal>,
}

/// Says what is wrong with a resource of [`Kind::Local`].
pub type CheckLocal = fn(&Resource) -> Result<(), String>;

/// One connection of Envoy's. There are two while it restarts without a gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ClientId(u64);

/// What of one kind is on its way.
#[derive(Default)]
struct Transit {
    unanswered: VecDeque<Unanswered>,
    /// What Envoy refused of what is meant now.
    refused: BTreeMap<Arc<str>, Refused>,
    /// Names whose removal an Envoy refused, and why. It keeps what it has of them for as long as it is connected.
    unremovable: BTreeMap<Arc<str>, (ClientId, Arc<str>)>,
    /// The same, also of what has been something else since: Envoy's session does not ask it twice, so what comes back
    /// must be known to be bad without its answer.
    known_bad: BTreeMap<Arc<str>, (u64, Arc<str>)>,
    /// What was taken by an earlier Envoy, and is refused by one that came since.
    lacking: BTreeSet<Arc<str>>,
}

struct Refused {
    resource: Arc<Resource>,
    reason: Arc<str>,
    /// The host was at fault and not the content: it is tried again.
    retry: Option<Retry>,
}

struct Retry {
    pause: Duration,
    /// `None`: not known yet, or it is being tried.
    at: Option<Instant>,
    is_tried: bool,
}

/// What the host did not let Envoy do is tried again after so long, then after twice as long each time, up to
const RETRY_FIRST: Duration = Duration::from_secs(2);
/// so long: an address that comes late is served within a minute, and Envoy's log has a line a minute.
const RETRY_LAST: Duration = Duration::from_secs(60);
/// One refusal's words in a NACK, in bytes,
const REFUSAL_REASON_MAX: usize = 1024;
/// and how many refusals it has. The control plane sends again what is not among them, and hears of it then.
const REFUSALS_MAX: usize = 256;

/// Reports whether Envoy's words are about the host (an address that somebody else has or that is not there) and not about
/// the content: the same content may be taken later.
fn is_of_host(reason: &str) -> bool {
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

struct Unanswered {
    /// Gone with its stream.
    ticket: Option<Ticket>,
    /// For which names Envoy has not answered; `None` is a removal.
    waiting: BTreeMap<Arc<str>, Option<u64>>,
    reasons: Vec<Arc<str>>,
    refusals: Vec<Refusal>,
    /// Of the store that has it.
    generation: u64,
}

/// A server sends the next response of a kind after 30 s without an answer; one that is older is never answered.
const UNANSWERED_MAX: usize = 4;

impl Relay {
    /// Nothing is known: Envoy gets no answer before the control plane has given one.
    pub fn new(node: Node) -> Relay {
        let mut upstream = Subscriber::new(node);
        upstream.subscribe_all(Kind::Cluster);
        upstream.subscribe_all(Kind::Listener);
        // Whoever asks below is told that there is nothing that is not for Envoy.
        let store = Store::partial().apply([present(Resource::absent(Kind::Local, "*"))]);
        Relay {
            upstream,
            store: Arc::new(store),
            clients: BTreeMap::new(),
            next_client: 0,
            transits: PerKind::default(),
            accepted_revision: 0,
            attempts: 0,
            has_recovered: false,
            check_local: None,
        }
    }

    /// Asks also for what concerns the node and not its proxy. What `check` can make out is [accepted](Relay::accepted)
    /// at once, and no session ever serves it.
    pub fn take_local(&mut self, check: CheckLocal) {
        self.check_local = Some(check);
        self.upstream.subscribe_all(Kind::Local);
    }

    /// Goes on with what Envoy [accepted](Relay::accepted) before.
    pub fn restore(node: Node, accepted: impl IntoIterator<Item = Arc<Resource>>) -> Relay {
        let mut relay = Relay::new(node);
        let mut changes = Vec::new();
        for resource in accepted {
            let kind = resource.kind();
            if !kind.has_wildcard() && !resource.is_absent() {
                relay.upstream.subscribe(kind, resource.name().clone());
            }
            if kind != Kind::Local {
                changes.push(present(resource.clone()));
            }
            relay.upstream.hold(resource);
        }
        relay.store = Arc::new(relay.store.apply(changes));
        relay
    }

    /// What sessions are to serve. It is another one whenever there is something new to serve.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// What Envoy took last of each name, tombstones included.
    pub fn accepted(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.upstream.all_held()
    }

    /// What Envoy took last of one name, unless one that came since refuses just that.
    pub fn in_force(&self, kind: Kind, name: &str) -> Option<&Arc<Resource>> {
        self.upstream.held(kind, name).filter(|_| !self.transits[kind].lacking.contains(name))
    }

    /// The names of which [`Relay::in_force`] may be another since this was called last.
    pub fn take_changes(&mut self) -> BTreeSet<(Kind, Arc<str>)> {
        self.upstream.take_changes()
    }

    /// Whether [`Relay::accepted`] has all that there is of a kind which is asked for as a whole: the control plane has told it once,
    /// now or before a restart, and nothing waits for Envoy's answer.
    pub fn has_all(&self, kind: Kind) -> bool {
        self.upstream.held(kind, "*").is_some() && self.transits[kind].unanswered.is_empty()
    }

    /// Grows with each change of [`Relay::accepted`] and of [`Relay::in_force`].
    pub fn accepted_revision(&self) -> u64 {
        self.accepted_revision
    }

    /// What Envoy refused, and why.
    pub fn refused(&self) -> impl Iterator<Item = (Kind, &Arc<str>, &Arc<str>)> {
        self.transits.iter().flat_map(|(kind, transit)| {
            let removals = transit.unremovable.iter().map(|(name, (_, reason))| (name, reason));
            let contents = transit.refused.iter().map(|(name, refused)| (name, &refused.reason));
            contents.chain(removals).map(move |(name, reason)| (kind, name, reason))
        })
    }

    /// Reports, once, that Envoy has taken what the control plane was told that it refuses. A new stream tells it so.
    pub fn take_recovered(&mut self) -> bool {
        std::mem::take(&mut self.has_recovered)
    }

    /// Sends again what is due, and returns when more will be.
    pub fn on_time(&mut self, now: Instant) -> Option<Instant> {
        let (mut next, mut again) = (None::<Instant>, Vec::new());
        for (_, transit) in self.transits.iter_mut() {
            for refused in transit.refused.values_mut() {
                let Some(retry) = refused.retry.as_mut().filter(|retry| !retry.is_tried) else { continue };
                let at = *retry.at.get_or_insert(now + retry.pause);
                if at <= now {
                    (retry.at, retry.is_tried) = (None, true);
                    self.attempts += 1;
                    again.push(present(refused.resource.again(self.attempts)));
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

    /// Answers Envoy as if what is not known did not exist, until the control plane speaks. Envoy serves nothing while
    /// it waits, so there comes a time when this is better.
    pub fn stop_waiting(&mut self) {
        self.store = Arc::new(self.store.complete());
    }
}

/// Upstream.
impl Relay {
    pub fn set_node(&mut self, node: Node) {
        self.upstream.set_node(node);
    }

    pub fn on_connected(&mut self) {
        self.take_back();
        self.has_recovered = false;
        self.upstream.on_connected();
    }

    /// Envoy does not notice. What is on its way to it still goes there, though nobody waits for the answer.
    pub fn on_disconnected(&mut self) {
        self.upstream.on_disconnected();
        for (_, transit) in self.transits.iter_mut() {
            transit.unanswered.iter_mut().for_each(|entry| entry.ticket = None);
        }
    }

    /// The control plane is told what was accepted, and sends what differs from that: so what Envoy has not answered for
    /// by now is served no longer, or the two would take different things for the same.
    fn take_back(&mut self) {
        let mut changes = Vec::new();
        for (kind, transit) in self.transits.iter_mut() {
            for entry in transit.unanswered.drain(..) {
                changes.extend(entry.waiting.into_keys().map(|name| match self.upstream.held(kind, &name) {
                    Some(held) => present(held.clone()),
                    None => gone(kind, &name),
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
        let (mut changes, mut refused_before, mut others) = (Vec::new(), Vec::new(), Vec::new());
        let mut entry = Unanswered {
            ticket: Some(ticket),
            waiting: BTreeMap::new(),
            reasons: Vec::new(),
            refusals: Vec::new(),
            generation: 0,
        };
        for resource in resources {
            let name = resource.name().clone();
            self.transits[kind].supersede(&name);
            let bad = self.transits[kind].known_bad.get(&name).cloned();
            if let Some((_, reason)) = bad.filter(|(bad, _)| *bad == resource.fingerprint()) {
                // Envoy need not be asked twice, and goes on with the last one it took.
                changes.push(self.last_good(kind, &name));
                refused_before.push((resource.clone(), reason.clone()));
                self.transits[kind].refuse(resource, reason);
                continue;
            }
            self.transits[kind].refused.remove(&name);
            self.transits[kind].unremovable.remove(&name);
            others.push(name.clone());
            let is_held = self.upstream.held(kind, &name).is_some_and(|held| *held == resource);
            if !is_held {
                entry.waiting.insert(name, Some(resource.fingerprint()));
            }
            changes.push(present(resource));
        }
        for (resource, reason) in refused_before {
            let name = resource.name();
            entry.refuse(name, resource.version(), &reason, false);
            // What Envoy said of two at once must not be said again of the one that has changed since.
            let is_of_others = others.iter().any(|other| reason.contains(&**other));
            entry.blame(match is_of_others {
                true => format!("{name}: refused before, and the same since").into(),
                false => reason,
            });
        }
        for name in removed {
            self.transits[kind].supersede(&name);
            self.transits[kind].refused.remove(&name);
            if let Some((_, reason)) = self.transits[kind].unremovable.get(&name) {
                // It has it still, and was asked before.
                entry.refuse(&name, "", reason, true);
                entry.blame(format!("{name}: {reason}").into());
                continue;
            }
            let served = self.store.get(kind, &name).is_some();
            changes.push(match kind.has_wildcard() {
                true => gone(kind, &name),
                false => present(Resource::absent(kind, name.clone())),
            });
            // Of a secret Envoy is never told that it is gone (R30).
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
            changes.push(present(all));
        }
        self.store = Arc::new(self.store.incomplete().apply(changes));
        entry.generation = self.store.generation();
        let transit = &mut self.transits[kind];
        transit.unanswered.push_back(entry);
        if transit.unanswered.len() > UNANSWERED_MAX {
            transit.unanswered.pop_front();
        }
        self.answer(kind);
    }

    /// What is not for Envoy is answered here. What is bad costs itself: what is held of that name stays.
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
            false => self.upstream.reject_some(ticket, &reasons.join("\n"), Some(&bounded(refusals))),
        }
    }

    /// Answers what Envoy has answered for, in the order in which it came.
    fn answer(&mut self, kind: Kind) {
        if !kind.has_wildcard() && !self.clients.is_empty() {
            // What no Envoy asks for, none answers for: it is let go of, and had anew when one asks.
            let wanted: Vec<_> = self.clients.values().map(|client| &client[kind]).collect();
            let mut unwanted = Vec::new();
            for entry in &mut self.transits[kind].unanswered {
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
                self.leave(kind, &name);
            }
        }
        let unanswered = &mut self.transits[kind].unanswered;
        while unanswered.front().is_some_and(|entry| entry.waiting.is_empty()) {
            let Some(Unanswered { ticket, reasons, refusals, .. }) = unanswered.pop_front() else { return };
            match (ticket, reasons.is_empty()) {
                (Some(ticket), true) => self.upstream.acknowledge(ticket),
                (Some(ticket), false) => {
                    self.upstream.reject_some(ticket, &reasons.join("\n"), Some(&bounded(refusals)));
                }
                (None, _) => {}
            }
        }
    }

    fn accept_removal(&mut self, kind: Kind, name: &Arc<str>) {
        self.transits[kind].lacking.remove(name);
        match kind.has_wildcard() {
            true => self.upstream.forget(kind, name),
            false => self.upstream.hold(Resource::absent(kind, name.clone())),
        }
        self.accepted_revision += 1;
    }
}

/// Downstream.
impl Relay {
    pub fn on_client_connected(&mut self) -> ClientId {
        let id = ClientId(self.next_client);
        self.next_client += 1;
        self.clients.insert(id, PerKind::default());
        // It may be another Envoy, or the cause may be gone: it is asked itself what it refuses. One that has refused it
        // already is not asked again.
        let mut changes = Vec::new();
        for (_, transit) in self.transits.iter_mut() {
            transit.known_bad.clear();
            changes.extend(transit.refused.values().map(|refused| present(refused.resource.clone())));
        }
        if !changes.is_empty() {
            self.store = Arc::new(self.store.apply(changes));
        }
        id
    }

    /// What it asked for stays asked for: an Envoy that comes next wants the same.
    pub fn on_client_disconnected(&mut self, client: ClientId) {
        self.clients.remove(&client);
        for kind in Kind::ALL {
            let of_client = |(_, (by, _)): &(&Arc<str>, &(ClientId, Arc<str>))| *by == client;
            let removed: Vec<_> = self.transits[kind]
                .unremovable
                .iter()
                .filter(of_client)
                .map(|(name, _)| name.clone())
                .collect();
            for name in removed {
                // Nobody has it any more.
                self.transits[kind].unremovable.remove(&name);
                self.accept_removal(kind, &name);
                self.has_recovered = true;
            }
        }
    }

    /// An event of the session that serves this client.
    pub fn on_client_event(&mut self, client: ClientId, event: Event) {
        match event {
            // What it asks for and never gets is nobody's business above.
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
                self.leave(kind, &name);
                self.answer(kind);
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
        // Endpoints whose removal is due may be taken as an assignment without any.
        let removed = self.transits[kind].take(name, |waiting| waiting.is_none() || waiting == fingerprint)
            == Some(None);
        let served = self.store.get(kind, name).map(|served| served.fingerprint());
        let mut resource = resource;
        if let Some(taken) = &mut resource {
            self.is_lacking(kind, name, false);
            let refused = &mut self.transits[kind].refused;
            if refused.get(name).is_some_and(|refused| refused.resource.is_again(taken))
                && let Some(refused) = refused.remove(name)
            {
                *taken = refused.resource;
                self.transits[kind].known_bad.remove(name);
                self.has_recovered = true;
            }
        }
        match resource {
            // Also what is served no longer: it is what Envoy has, and goes back to if it refuses what came since.
            // But not what it has let go of in the same breath.
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
        self.answer(kind);
        if kind == Kind::Listener && self.is_connected() {
            self.prune();
        }
    }

    /// Whether what is held of `name` is refused by an Envoy that came since.
    fn is_lacking(&mut self, kind: Kind, name: &Arc<str>, now: bool) {
        let lacking = &mut self.transits[kind].lacking;
        if if now { lacking.insert(name.clone()) } else { lacking.remove(name) } {
            self.upstream.note_change(kind, name);
            self.accepted_revision += 1;
        }
    }

    fn is_wanted(&self, kind: Kind, name: &Arc<str>) -> bool {
        kind.has_wildcard() || self.clients.values().any(|client| client[kind].contains(name))
    }

    /// Nothing more will be said of what came with `generation` or before: Envoy has what the store has of it.
    fn on_settled(&mut self, kind: Kind, generation: u64) {
        let mut settled = Vec::new();
        for entry in &mut self.transits[kind].unanswered {
            if entry.generation <= generation {
                settled.extend(std::mem::take(&mut entry.waiting));
            }
        }
        for (name, waiting) in settled {
            // What nobody asked for by name, nobody was told.
            if !self.is_wanted(kind, &name) {
                continue;
            }
            let served = self.store.get(kind, &name).cloned();
            match (waiting, served) {
                (None, None) => self.accept_removal(kind, &name),
                (Some(fingerprint), Some(served)) if served.fingerprint() == fingerprint => {
                    self.is_lacking(kind, &name, false);
                    self.upstream.hold(served);
                    self.accepted_revision += 1;
                }
                _ => {}
            }
        }
        self.answer(kind);
    }

    fn on_rejected(&mut self, resource: &Arc<Resource>, reason: &Arc<str>) {
        let (kind, name) = (resource.kind(), resource.name());
        let fingerprint = resource.fingerprint();
        for entry in &mut self.transits[kind].unanswered {
            if entry.waiting.get(name) == Some(&Some(fingerprint)) {
                entry.waiting.remove(name);
                entry.refuse(name, resource.version(), reason, false);
                entry.blame(reason.clone());
            }
        }
        let original = self.transits[kind].refuse(resource.clone(), reason.clone());
        let known_bad = (original.fingerprint(), reason.clone());
        self.transits[kind].known_bad.insert(name.clone(), known_bad);
        if self.upstream.held(kind, name).is_some_and(|held| held == resource) {
            self.is_lacking(kind, name, true);
        }
        // An Envoy that starts now must not get what this one refused.
        let is_served = self.store.get(kind, name).is_some_and(|served| served == resource);
        if is_served {
            let change = self.last_good(kind, name);
            self.store = Arc::new(self.store.apply([change]));
        }
        self.answer(kind);
    }

    /// Envoy keeps what it has, though the store has it no more: that is what it is told from now on, and nobody asks again.
    fn on_removal_rejected(&mut self, client: ClientId, kind: Kind, name: &Arc<str>, reason: &Arc<str>) {
        let mut is_of_control_plane = false;
        for entry in &mut self.transits[kind].unanswered {
            if entry.waiting.get(name) == Some(&None) {
                entry.waiting.remove(name);
                entry.refuse(name, "", reason, true);
                entry.blame(format!("{name}: {reason}").into());
                is_of_control_plane = true;
            }
        }
        if is_of_control_plane {
            self.transits[kind].unremovable.insert(name.clone(), (client, reason.clone()));
        }
        self.answer(kind);
    }

    /// What is served in place of what was refused: the last that Envoy took, or that there is none. An Envoy that asks is
    /// answered in any case, since it serves nothing while it waits (R31).
    fn last_good(&self, kind: Kind, name: &Arc<str>) -> Change {
        match self.upstream.held(kind, name) {
            Some(held) => present(held.clone()),
            None if kind.has_wildcard() => gone(kind, name),
            None => present(Resource::absent(kind, name.clone())),
        }
    }

    /// No client wants `name` any more, perhaps.
    fn leave(&mut self, kind: Kind, name: &Arc<str>) {
        let wanted = self.clients.values().any(|client| client[kind].contains(name));
        // While no control plane answers, what is thrown away could not be had again.
        if wanted || &**name == "*" || !self.is_connected() {
            return;
        }
        self.upstream.unsubscribe(kind, name);
        if !kind.has_wildcard() {
            self.transits[kind].refused.remove(name);
            self.transits[kind].known_bad.remove(name);
            self.store = Arc::new(self.store.apply([gone(kind, name)]));
            self.accepted_revision += 1;
        }
    }

    /// An Envoy that has its listeners has asked for all that they need. What only an earlier one asked for goes.
    fn prune(&mut self) {
        for kind in [Kind::Endpoint, Kind::Route] {
            let wanted = |name: &Arc<str>| self.clients.values().any(|client| client[kind].contains(name));
            let left: Vec<_> =
                self.upstream.subscriptions(kind).filter(|name| !wanted(name)).cloned().collect();
            left.iter().for_each(|name| self.leave(kind, name));
            self.answer(kind);
        }
    }
}

impl Transit {
    /// Notes what Envoy refused, and returns what the control plane sent of it.
    fn refuse(&mut self, resource: Arc<Resource>, reason: Arc<str>) -> Arc<Resource> {
        let before =
            self.refused.remove(resource.name()).filter(|before| before.resource.is_again(&resource));
        let (resource, retry) = match before {
            Some(before) => (before.resource, before.retry),
            None => (resource, None),
        };
        let retry = is_of_host(&reason).then(|| match retry {
            Some(retry) if retry.is_tried => {
                Retry { pause: (retry.pause * 2).min(RETRY_LAST), at: None, is_tried: false }
            }
            Some(retry) => retry,
            None => Retry { pause: RETRY_FIRST, at: None, is_tried: false },
        });
        self.refused.insert(resource.name().clone(), Refused { resource: resource.clone(), reason, retry });
        resource
    }

    /// A newer response decides about `name`.
    fn supersede(&mut self, name: &str) {
        self.unanswered.iter_mut().for_each(|entry| _ = entry.waiting.remove(name));
    }

    /// Takes what was waited for, if it is `this`.
    fn take(&mut self, name: &str, this: impl Fn(Option<u64>) -> bool) -> Option<Option<u64>> {
        let mut taken = None;
        for entry in &mut self.unanswered {
            if entry.waiting.get(name).is_some_and(|waiting| this(*waiting)) {
                taken = entry.waiting.remove(name);
            }
        }
        taken
    }
}

impl Unanswered {
    fn refuse(&mut self, name: &str, version: &str, reason: &str, removal: bool) {
        self.refusals.push(refusal(name, version, reason, removal));
    }

    fn blame(&mut self, reason: Arc<str>) {
        if !self.reasons.contains(&reason) {
            self.reasons.push(reason);
        }
    }
}

fn refusal(name: &str, version: &str, reason: &str, removal: bool) -> Refusal {
    let reason = reason.get(..reason.floor_char_boundary(REFUSAL_REASON_MAX)).unwrap_or(reason);
    Refusal { name: name.to_owned(), version: version.to_owned(), reason: reason.to_owned(), removal }
}

fn bounded(mut refusals: Vec<Refusal>) -> Refusals {
    let others_taken = refusals.len() <= REFUSALS_MAX;
    refusals.truncate(REFUSALS_MAX);
    Refusals { refusals, others_taken }
}

type Change = (Arc<str>, Option<Arc<Group>>);

/// Each resource comes and goes alone.
fn key(kind: Kind, name: &str) -> Arc<str> {
    format!("{kind} {name}").into()
}

fn present(resource: Arc<Resource>) -> Change {
    let key = key(resource.kind(), resource.name());
    (key.clone(), Some(Group::new(key, [resource])))
}

fn gone(kind: Kind, name: &str) -> Change {
    (key(kind, name), None)
}

#[cfg(test)]
mod tests;
