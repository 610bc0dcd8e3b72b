//! The server's end of one ADS stream.

mod request;
mod response;
mod status;
mod subscription;
#[cfg(test)]
mod tests;

pub use request::{Bounds, Request, SessionError};
pub use response::Response;
pub use status::{KindStatus, Rejection, SessionStatus, State};

use crate::{Kind, PerKind, Resource, Snapshot};
use prost::{Message, Name};
use response::Head;
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use subscription::{Absence, Entry, Held, InFlight, Item, Subscription, Target, Work};
use vmesh_proto::agent;
use vmesh_proto::envoy::config::endpoint::v3::ClusterLoadAssignment;
use vmesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use vmesh_proto::google::rpc;
use xxhash_rust::xxh3::Xxh3Default;

/// The protocol state of one ADS stream at the server. It does no I/O: requests and snapshots go in, responses
/// come out.
///
/// Call the methods in this order: [`on_snapshot`](Session::on_snapshot) for the current snapshot and each
/// later one, [`on_request`](Session::on_request) for each request, then
/// [`poll_response`](Session::poll_response) until it returns `None`; write each response to the stream. Call
/// `poll_response` again at [`poll_timeout`](Session::poll_timeout). If events are
/// [recorded](Session::record_events), drain [`poll_event`](Session::poll_event) after each call.
///
/// For each name that a client subscribed to, the snapshot says which resource the client should have (the
/// *target*), and the session remembers which one it was sent (the client's *copy*). A name whose copy differs
/// from its target is *pending*; the next response takes all pending names that may be sent. So a slow client
/// gets each resource once, in its latest version, and a resource that is no longer needed is not sent at all
/// (R20, R33).
pub struct Session {
    protocol: Protocol,
    control_plane: Arc<str>,
    /// The arrival time of the first request.
    opened: Option<Instant>,
    /// Versions that the client listed as kept from an earlier stream, as (kind, name, version), until the
    /// first snapshot arrives to compare them with.
    kept_versions: Vec<(Kind, Arc<str>, String)>,
    snapshot: Option<Snapshot>,
    subscriptions: PerKind<Subscription>,
    nonce: u64,
    status: SessionStatus,
    events: Option<VecDeque<Event>>,
    /// The generation of the last [`Event::Settled`] of each kind.
    settled: PerKind<Option<u64>>,
}

/// The variants of ADS: delta ("incremental") and SotW ("state of the world").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Delta,
    Sotw,
}

/// An action of the client, for a [`Relay`](crate::Relay) that passes it on. The name `*` stands for a wildcard
/// subscription.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Subscribed {
        kind: Kind,
        name: Arc<str>,
    },
    Unsubscribed {
        kind: Kind,
        name: Arc<str>,
    },
    /// The client ACKed a resource, or its absence if `resource` is `None`.
    Accepted {
        kind: Kind,
        name: Arc<str>,
        resource: Option<Arc<Resource>>,
    },
    Rejected {
        resource: Arc<Resource>,
        reason: Arc<str>,
    },
    /// The client rejected the removal of a resource.
    RemovalRejected {
        kind: Kind,
        name: Arc<str>,
        reason: Arc<str>,
    },
    /// The client has answered for all resources of this kind in this generation of the store. Events name only
    /// resources that were sent; the client already has all others of this generation, or never had them.
    Settled {
        kind: Kind,
        generation: u64,
    },
}

/// How long resources that refer to new clusters wait for the ACK of those clusters (R47), and removals for the
/// ACK of the resources that referred to them. Envoy withholds an ACK for up to 15 s while clusters warm.
const ORDER_CAP: Duration = Duration::from_secs(20);
/// The shorter limit for a resource that the client asked for and never had: Envoy gives up on it after 15 s.
const FIRST_ANSWER_CAP: Duration = Duration::from_secs(10);
/// How long removals wait on a new stream. A client that reconnects subscribes to one kind after another, and
/// the session must know all subscriptions to know what a removed resource is referred to by.
const RESUME_GRACE: Duration = Duration::from_secs(1);
/// The size at which a delta response is split, in bytes. gRPC clients accept 4 MiB by default (R59).
const SPLIT_AT: usize = 2 << 20;
/// The limit of responses that are split in halves to find the resource that one rejection is about.
const ISOLATIONS: u8 = 64;
/// The limit of unanswered responses per kind. A second one is sent only after
/// [`ANSWER_CAP`](subscription::ANSWER_CAP).
const IN_FLIGHT_MAX: usize = 4;

impl Session {
    /// Makes a session for the delta variant. `control_plane` names this instance and its build; Envoy shows it
    /// (R64).
    pub fn delta(control_plane: impl Into<Arc<str>>) -> Session {
        Session::new(Protocol::Delta, control_plane.into())
    }

    pub fn sotw(control_plane: impl Into<Arc<str>>) -> Session {
        Session::new(Protocol::Sotw, control_plane.into())
    }

    fn new(protocol: Protocol, control_plane: Arc<str>) -> Session {
        Session {
            protocol,
            control_plane,
            opened: None,
            kept_versions: Vec::new(),
            snapshot: None,
            subscriptions: PerKind::default(),
            nonce: 0,
            status: SessionStatus::default(),
            events: None,
            settled: PerKind::default(),
        }
    }

    /// Starts to record events for [`Session::poll_event`].
    pub fn record_events(&mut self) {
        self.events.get_or_insert_default();
    }

    pub fn status(&self) -> &SessionStatus {
        &self.status
    }

    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.as_mut()?.pop_front()
    }

    /// Processes one request. An error must end the stream; the session tolerates all other mistakes of a
    /// client.
    pub fn on_request(&mut self, now: Instant, request: impl Into<Request>) -> Result<(), SessionError> {
        let request = request.into();
        if self.opened.is_none() {
            request.introduction()?;
            self.opened = Some(now);
        }
        if request.type_url().is_empty() {
            return Err(SessionError::NoTypeUrl);
        }
        let Some(kind) = Kind::from_type_url(request.type_url()) else {
            self.status.unknown_types += 1;
            return Ok(());
        };
        self.status.kinds[kind].subscribed = true;
        match (self.protocol, request) {
            (Protocol::Delta, Request::Delta(request)) => self.on_delta(now, kind, request)?,
            (Protocol::Sotw, Request::Sotw(request)) => self.on_sotw(now, kind, request)?,
            _ => return Err(SessionError::OtherVariant),
        }
        self.refresh_status();
        Ok(())
    }

    /// Replaces the snapshot. The cost is proportional to the changed groups in scope, not to the
    /// subscriptions.
    pub fn on_snapshot(&mut self, _now: Instant, snapshot: Snapshot) {
        let before = self.snapshot.replace(snapshot.clone());
        self.compare_kept_versions();
        match before {
            Some(before) if before.store.is_partial() == snapshot.store.is_partial() => {
                snapshot.changes_since(&before, |changed| {
                    self.weigh(changed.kind(), changed.name());
                    if &**changed.name() == "*" {
                        // A partial store states with the tombstone `*` that it has all resources of the kind,
                        // so missing ones are now absent.
                        self.weigh_all(changed.kind());
                    }
                    if changed.kind() == Kind::Cluster {
                        // A missing assignment is sent as empty while its cluster exists, so it depends on the
                        // cluster.
                        self.weigh(Kind::Endpoint, changed.name());
                    }
                });
            }
            _ => Kind::ALL.into_iter().for_each(|kind| self.weigh_all(kind)),
        }
        self.refresh_status();
    }

    /// Returns the next response, or `None` if nothing may be sent now. Call it until it returns `None`, after
    /// each other call and at [`Session::poll_timeout`].
    pub fn poll_response(&mut self, now: Instant) -> Option<Response> {
        let response = Kind::ALL.into_iter().find_map(|kind| self.respond(now, kind))?;
        self.refresh_status();
        Some(response)
    }

    /// Returns the time at which [`Session::poll_response`] may have a response although nothing else happened.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.subscriptions.iter().filter_map(|(_, subscription)| subscription.wake_at).min()
    }
}

/// Returns the copy of a client that kept `version` of `name` from an earlier stream: the current resource if
/// the version is current.
fn held(snapshot: &Snapshot, kind: Kind, name: &str, version: &str) -> (Arc<str>, Held) {
    match Target::of(snapshot, kind, name) {
        Target::Resource(present) if *present.version() == *version => {
            (present.name().clone(), Held::Resource(present.clone()))
        }
        Target::Empty => {
            let empty = without_endpoints(name);
            let held = if *empty.version() == *version { Held::Empty(empty) } else { Held::Other };
            (name.into(), held)
        }
        _ => (name.into(), Held::Other),
    }
}

/// Requests: subscriptions, and versions from an earlier stream.
impl Session {
    fn on_delta(
        &mut self,
        now: Instant,
        kind: Kind,
        request: DeltaDiscoveryRequest,
    ) -> Result<(), SessionError> {
        self.on_answer(now, kind, &request.response_nonce, request.error_detail);
        let first = !std::mem::replace(&mut self.subscriptions[kind].seen, true);
        // A name that is unsubscribed and subscribed in one request is subscribed anew (R25).
        for name in &request.resource_names_unsubscribe {
            self.unsubscribe(kind, name);
        }
        let (stars, names): (Vec<String>, Vec<String>) =
            request.resource_names_subscribe.into_iter().partition(|name| name == "*");
        if kind.has_wildcard() && (!stars.is_empty() || (first && names.is_empty())) {
            self.subscribe_to_all(kind);
        }
        let mut asked = Vec::with_capacity(names.len());
        for name in names {
            asked.push(self.subscribe(kind, name)?);
        }
        if first {
            // The versions in `initial_resource_versions` are valid only in the first request of a kind (R39).
            self.resume(kind, request.initial_resource_versions)?;
        }
        for name in asked {
            self.weigh(kind, &name);
        }
        if first && self.subscriptions[kind].wildcard {
            self.weigh_all(kind);
        }
        Ok(())
    }

    fn on_sotw(&mut self, now: Instant, kind: Kind, request: DiscoveryRequest) -> Result<(), SessionError> {
        self.on_answer(now, kind, &request.response_nonce, request.error_detail);
        let subscription = &mut self.subscriptions[kind];
        let ever_named = subscription.ever_named;
        subscription.ever_named |= !request.resource_names.is_empty();
        // The client sent this request before it read the last response and will send another one after (R10).
        // Before the first response of a stream, a nonce belongs to an earlier stream (R07).
        if subscription.last_nonce != 0
            && parse_nonce(&request.response_nonce) != Some(subscription.last_nonce)
        {
            return Ok(());
        }
        let first = !std::mem::replace(&mut subscription.seen, true);
        let complete = Absence::of(self.protocol, kind) == Absence::Omitted;
        subscription.answer_due |= first && complete;

        let names = request.resource_names;
        let star = names.iter().any(|name| name == "*") || (names.is_empty() && !ever_named);
        subscription.mark = !subscription.mark;
        let (mark, before) = (subscription.mark, subscription.named);
        let mut kept = 0;
        let mut added = Vec::new();
        for name in names.into_iter().filter(|name| name != "*") {
            match subscription.entries.get_mut(&*name).filter(|entry| entry.named) {
                Some(entry) if entry.mark == mark => {}
                Some(entry) => {
                    entry.mark = mark;
                    kept += 1;
                }
                None => added.push(name),
            }
        }
        let was_all = subscription.wildcard;
        if star && kind.has_wildcard() {
            self.subscribe_to_all(kind);
        }
        if kept < before {
            let unmarked = |(_, entry): &(&Arc<str>, &Entry)| entry.named && entry.mark != mark;
            let entries = &self.subscriptions[kind].entries;
            let dropped: Vec<_> = entries.iter().filter(unmarked).map(|(name, _)| name.clone()).collect();
            dropped.iter().for_each(|name| self.unsubscribe(kind, name));
        }
        for name in added {
            let name = self.subscribe(kind, name)?;
            if let Some(entry) = self.subscriptions[kind].entries.get_mut(&name) {
                entry.mark = mark;
            }
            self.weigh(kind, &name);
        }
        if was_all && !star {
            self.unsubscribe(kind, "*");
        }
        Ok(())
    }

    fn subscribe_to_all(&mut self, kind: Kind) {
        let subscription = &mut self.subscriptions[kind];
        if std::mem::replace(&mut subscription.wildcard, true) {
            return;
        }
        subscription.answer_due = true;
        // The client dropped its subscription to these names before it read the responses in flight. With the
        // wildcard subscription it will keep the resources.
        for item in subscription.in_flight.iter().flat_map(|response| &response.items) {
            subscription
                .entries
                .entry(item.name.clone())
                .or_insert_with(|| Entry { held: Held::Other, ..Entry::default() });
        }
        self.record(|| Event::Subscribed { kind, name: "*".into() });
        self.weigh_all(kind);
    }

    /// Subscribes to one name. The caller then calls `reconcile` for the name that this returns.
    fn subscribe(&mut self, kind: Kind, name: String) -> Result<Arc<str>, SessionError> {
        // Sharing the name with the store costs this stream no memory.
        let stored = self.snapshot.as_ref().and_then(|snapshot| snapshot.get(kind, &name));
        let name = stored.map_or_else(|| Arc::from(name), |resource| resource.name().clone());
        let subscription = &mut self.subscriptions[kind];
        let entry = subscription.subscribe(kind, name.clone())?;
        // A client that subscribes again has lost its copy (R25, R26).
        entry.asked = !matches!(entry.held, Held::Nothing);
        // The client may no longer wait for older responses, so this kind is not blocked until it answers one
        // (R20).
        if let Some(response) = subscription.in_flight.back_mut() {
            response.blocking = false;
        }
        self.record(|| Event::Subscribed { kind, name: name.clone() });
        Ok(name)
    }

    fn unsubscribe(&mut self, kind: Kind, name: &str) {
        let subscription = &mut self.subscriptions[kind];
        if name == "*" {
            if std::mem::replace(&mut subscription.wildcard, false) {
                subscription.answer_due = false;
                let covered = subscription.entries.iter().filter(|(_, entry)| !entry.named);
                let covered: Vec<_> = covered.map(|(name, _)| name.clone()).collect();
                // Names without any copy may be pending as part of the wildcard.
                let due: Vec<_> = subscription.pending().keys().cloned().collect();
                covered.iter().for_each(|name| self.forget(kind, name));
                due.iter().for_each(|name| self.weigh(kind, name));
                self.record(|| Event::Unsubscribed { kind, name: "*".into() });
            }
            return;
        }
        if !subscription.unsubscribe(name) {
            return;
        }
        match subscription.entries.get_mut(name) {
            // The client drops its copy unless the server answers that the name still belongs to the wildcard
            // (R24).
            Some(entry) => {
                entry.asked = true;
                self.weigh(kind, &Arc::from(name));
            }
            None => self.forget(kind, name),
        }
        self.record(|| Event::Unsubscribed { kind, name: name.into() });
    }

    /// Takes the versions that the client kept from an earlier stream. Current ones are not sent again, and
    /// kept resources that no longer exist are removed (R37, R38).
    fn resume(
        &mut self,
        kind: Kind,
        versions: impl IntoIterator<Item = (String, String)>,
    ) -> Result<(), SessionError> {
        for (name, version) in versions {
            let subscription = &self.subscriptions[kind];
            let named = subscription.entries.get(&*name).is_some_and(|entry| entry.named);
            if !named && !subscription.wildcard {
                continue;
            }
            if subscription.entries.len() >= subscription::NAMES_MAX {
                return Err(SessionError::TooManyNames { kind, limit: subscription::NAMES_MAX });
            }
            let (name, held) = match &self.snapshot {
                Some(snapshot) => held(snapshot, kind, &name, &version),
                None => {
                    let name: Arc<str> = name.into();
                    self.kept_versions.push((kind, name.clone(), version));
                    (name, Held::Other)
                }
            };
            self.record_accepted(kind, &name, &held);
            let subscription = &mut self.subscriptions[kind];
            subscription.resumed = true;
            subscription.answer_due = false;
            subscription.entries.entry(name).or_default().held = held;
        }
        Ok(())
    }

    /// Compares the kept versions with the first snapshot, for a client that sent them before there was a
    /// snapshot.
    fn compare_kept_versions(&mut self) {
        let Some(snapshot) = self.snapshot.clone() else { return };
        for (kind, name, version) in std::mem::take(&mut self.kept_versions) {
            let (_, held) = held(&snapshot, kind, &name, &version);
            let Some(entry) = self.subscriptions[kind].entries.get_mut(&name) else { continue };
            // A client that subscribed to the name again meanwhile has lost its copy.
            if matches!(entry.held, Held::Other) && !entry.asked {
                entry.held = held.clone();
                self.record_accepted(kind, &name, &held);
            }
        }
    }

    fn record_accepted(&mut self, kind: Kind, name: &Arc<str>, held: &Held) {
        if let Held::Resource(resource) = held {
            let resource = Some(resource.clone());
            self.record(|| Event::Accepted { kind, name: name.clone(), resource });
        }
    }

    fn on_answer(&mut self, now: Instant, kind: Kind, nonce: &str, error: Option<rpc::Status>) {
        let subscription = &mut self.subscriptions[kind];
        let Some(nonce) = parse_nonce(nonce) else { return };
        let Some(at) = subscription.in_flight.iter().position(|response| response.nonce == nonce) else {
            return;
        };
        // A client answers responses in order, so it will never answer the older ones.
        let Some(response) = subscription.in_flight.drain(..=at).next_back() else { return };
        match error {
            None => self.on_ack(now, kind, response),
            Some(error) => match refusals(&error) {
                Some(refusals) => self.on_refusals(kind, response, &error.message, &refusals),
                None => self.on_nack(kind, response, &error.message),
            },
        }
    }

    /// Counts a NACK. Returns the client's error text in printable form.
    fn note_nack(&mut self, kind: Kind, error: &str) -> Arc<str> {
        let reason: Arc<str> = shown(error).into();
        let status = &mut self.status.kinds[kind];
        status.nacks += 1;
        status.last_error = Some(reason.clone());
        reason
    }

    /// Processes a NACK of an agent, which lists the refused resources with version and reason in the details
    /// of its error.
    fn on_refusals(&mut self, kind: Kind, mut response: InFlight, error: &str, refusals: &agent::Refusals) {
        let of_item = |item: &Item| {
            let mut of_name = refusals.refusals.iter().filter(|refusal| *refusal.name == *item.name);
            of_name.find(|refusal| match &item.sent {
                Some(sent) => !refusal.removal && *refusal.version == *sent.version(),
                None => refusal.removal,
            })
        };
        let guilty: Vec<bool> = response.items.iter().map(|item| of_item(item).is_some()).collect();
        if !guilty.contains(&true) {
            // The list names only resources that were not in this response, so the error text decides.
            return self.on_nack(kind, response, error);
        }
        self.note_nack(kind, error);
        let subscription = &mut self.subscriptions[kind];
        let known = subscription.rejected_since.into_iter().chain(response.behind_since);
        subscription.rejected_since = known.min();
        self.answer_first_set(kind, &response);
        let items = std::mem::take(&mut response.items);
        for (item, guilty) in items.into_iter().zip(guilty) {
            if !guilty && refusals.others_taken {
                let Item { name, sent, .. } = item;
                self.status.kinds[kind].rejected.remove(&name);
                self.record(|| Event::Accepted { kind, name, resource: sent });
                continue;
            }
            let reason = of_item(&item).map_or_else(String::new, |refusal| shown(&refusal.reason));
            self.on_refused(kind, item, guilty, &reason.into());
        }
    }

    /// Makes the session send a complete SotW set again after a NACK, until the client has ACKed a first one:
    /// before that, its resources from an earlier stream are unknown.
    fn answer_first_set(&mut self, kind: Kind, refused: &InFlight) {
        let complete = Absence::of(self.protocol, kind) == Absence::Omitted;
        self.subscriptions[kind].answer_due |=
            complete && !refused.items.is_empty() && self.status.kinds[kind].acks == 0;
    }

    fn on_ack(&mut self, now: Instant, kind: Kind, response: InFlight) {
        let status = &mut self.status.kinds[kind];
        status.acks += 1;
        status.last_acked = Some(now);
        status.last_error = None;
        status.refused_set = None;
        for Item { name, sent, .. } in response.items {
            self.status.kinds[kind].rejected.remove(&name);
            self.record(|| Event::Accepted { kind, name, resource: sent });
        }
    }

    /// Processes a NACK that has only an error text. Clients may have applied parts of the response, and rarely
    /// reject every resource in it (R17). Resources that the text names are blamed and not sent again (R13);
    /// the others are sent once more without those. If the text names none, the response is sent in halves
    /// until the rejected resource is found.
    fn on_nack(&mut self, kind: Kind, response: InFlight, error: &str) {
        let reason = self.note_nack(kind, error);
        if response.items.is_empty() && response.repeated.is_empty() {
            // An empty response has no resource to leave out.
            self.status.kinds[kind].refused_set = Some(reason);
            return;
        }
        let subscription = &mut self.subscriptions[kind];
        let mut guilty = names_in(kind, &reason, response.items.iter().map(|item| &*item.name));
        let mut repeated = response.repeated.clone();
        let alone = response.items.len() == 1 && repeated.is_empty();
        let named = names_in(kind, &reason, repeated.iter().map(|resource| &**resource.name()));
        let mut named = named.into_iter().map(|named| named && !guilty.contains(&true));
        repeated.retain(|_| named.next().unwrap_or(false));
        if !guilty.contains(&true) && repeated.is_empty() {
            if alone || subscription.isolations_left == 0 {
                guilty.fill(true);
            } else {
                subscription.isolate(response.items.iter().map(|item| item.name.clone()).collect());
            }
        }
        if guilty.contains(&true) {
            let known = subscription.rejected_since.into_iter().chain(response.behind_since);
            subscription.rejected_since = known.min();
        }
        self.answer_first_set(kind, &response);
        for (item, guilty) in response.items.into_iter().zip(guilty) {
            self.on_refused(kind, item, guilty, &reason);
        }
        for resource in repeated {
            self.on_repeated_refused(kind, &resource, &reason);
        }
    }

    fn on_refused(&mut self, kind: Kind, item: Item, guilty: bool, reason: &Arc<str>) {
        let subscription = &mut self.subscriptions[kind];
        let is_last = subscription.has(&item);
        let Item { name, before, sent } = item;
        let good = before.resource().cloned();
        let held = match (before, &sent) {
            (_, None) if guilty => Held::Unremovable(good),
            (_, Some(resource)) if guilty => Held::Rejected(Box::new((resource.fingerprint(), good))),
            (rejected @ Held::Rejected(_), _) => rejected,
            _ => Held::Unsure(good),
        };
        if is_last {
            let entry = subscription.entries.entry(name.clone()).or_default();
            // An empty assignment is the smallest possible content: after its rejection nothing else can be
            // sent.
            if !(guilty && matches!(entry.held, Held::Empty(_))) {
                entry.held = held;
            }
            self.weigh(kind, &name);
        } else if let Some(later) = subscription.sent_after(&name, sent.as_ref()) {
            later.before = held;
        }
        if !guilty {
            return;
        }
        if is_last {
            let version = sent.as_ref().map_or("", |resource| resource.version()).into();
            let rejection = Rejection { version, reason: reason.clone() };
            self.status.kinds[kind].rejected.insert(name.clone(), rejection);
        }
        let reason = reason.clone();
        self.record(|| match sent {
            Some(resource) => Event::Rejected { resource, reason },
            None => Event::RemovalRejected { kind, name, reason },
        });
    }

    /// Processes the rejection of a resource that was repeated in a SotW set although the client seemed to have
    /// it.
    fn on_repeated_refused(&mut self, kind: Kind, resource: &Arc<Resource>, reason: &Arc<str>) {
        let name = resource.name();
        let Subscription { entries, in_flight, .. } = &mut self.subscriptions[kind];
        let is_last = !in_flight.iter().flat_map(|later| &later.items).any(|item| item.name == *name);
        let Some(entry) = entries.get_mut(name).filter(|_| is_last) else { return };
        if entry.held.resource().is_none_or(|held| held.fingerprint() != resource.fingerprint()) {
            return;
        }
        let refused = match &entry.held {
            Held::Rejected(rejected) => rejected.0,
            _ => {
                let rejection = Rejection { version: resource.version().into(), reason: reason.clone() };
                self.status.kinds[kind].rejected.insert(name.clone(), rejection);
                resource.fingerprint()
            }
        };
        entry.held = Held::Rejected(Box::new((refused, None)));
        self.weigh(kind, name);
    }
}

/// Responses: which pending names are sent, and when.
impl Session {
    fn respond(&mut self, now: Instant, kind: Kind) -> Option<Response> {
        let due = self.due(now, kind)?;
        let batch = self.batch(kind, due);
        if batch.is_empty() && !due.answer {
            return None;
        }
        self.nonce += 1;
        let absence = Absence::of(self.protocol, kind);
        let generation = self.snapshot.as_ref().map(|snapshot| snapshot.store.generation());
        let subscription = &mut self.subscriptions[kind];
        let mut response = InFlight {
            nonce: self.nonce,
            since: now,
            adds: false,
            blocking: true,
            behind_since: subscription.behind_since.or(generation),
            items: Vec::with_capacity(batch.len()),
            repeated: Vec::new(),
        };
        let (mut resources, mut removed, mut touched) = (Vec::new(), Vec::new(), Vec::new());
        for (name, outgoing) in batch {
            let work = subscription.pending().get(&name).copied();
            subscription.settle(&name);
            let wildcard = subscription.wildcard;
            let entry = subscription.entries.entry(name.clone()).or_default();
            entry.asked = false;
            let (held, sent) = match outgoing {
                Outgoing::Resource(resource) => {
                    response.adds |= work == Some(Work::New);
                    (Held::Resource(resource.clone()), Some(resource))
                }
                Outgoing::Empty(resource) => (Held::Empty(resource.clone()), Some(resource)),
                Outgoing::Absent => (Held::Absent, None),
                Outgoing::Good(resource) => {
                    response.repeated.push(resource.clone());
                    resources.push(resource);
                    continue;
                }
            };
            match &sent {
                Some(resource) => resources.push(resource.clone()),
                None => removed.push(name.clone()),
            }
            let before = std::mem::replace(&mut entry.held, held);
            if kind == Kind::Cluster && sent.is_some() && !same(&before, sent.as_ref()) {
                touched.push(name.clone());
            }
            if sent.is_none() && !entry.named && wildcard {
                subscription.entries.remove(&name);
            }
            response.items.push(Item { name, before, sent });
        }
        subscription.answer_due = false;
        if absence == Absence::Omitted {
            // A SotW response of this kind is the complete set, so it repeats the unchanged resources (R28).
            resources =
                subscription.entries.values().filter_map(|entry| entry.held.resource().cloned()).collect();
            resources.sort_by(|a, b| a.name().cmp(b.name()));
            if !subscription.in_flight.is_empty() {
                // A NACK of this response may be about resources of an older response that is not answered
                // either.
                let new: HashSet<&Arc<str>> = response.items.iter().map(|item| &item.name).collect();
                let repeated = resources.iter().filter(|resource| !new.contains(resource.name()));
                response.repeated = repeated.cloned().collect();
            }
        }
        subscription.last_nonce = self.nonce;
        subscription.in_flight.push_back(response);
        if subscription.in_flight.len() > IN_FLIGHT_MAX {
            subscription.in_flight.pop_front();
        }
        if kind == Kind::Cluster {
            // The endpoints of a removed cluster stay until the client has dropped the cluster.
            removed.iter().for_each(|name| self.weigh(Kind::Endpoint, name));
        }
        // Envoy warms a cluster that it gets again until the endpoints arrive, but does not ask for them again
        // (R46).
        for name in touched {
            if let Some(entry) = self.subscriptions[Kind::Endpoint].entries.get_mut(&name)
                && !matches!(entry.held, Held::Nothing)
            {
                entry.asked = true;
                self.weigh(Kind::Endpoint, &name);
            }
        }
        if absence == Absence::Omitted {
            removed.clear();
        }
        let status = &mut self.status.kinds[kind];
        status.responses += 1;
        status.last_sent = Some(now);
        let head = Head {
            protocol: self.protocol,
            kind,
            nonce: self.nonce,
            version: version_of(&resources, &removed),
            removed: &removed,
            control_plane: &self.control_plane,
        };
        Some(Response::new(head, &resources))
    }

    /// Decides which pending names of a kind may be sent now, and sets the time at which the next ones may be.
    fn due(&mut self, now: Instant, kind: Kind) -> Option<Due> {
        let adding = self.is_adding_clusters(now);
        let referred_to = self.is_referred_to(now, kind);
        let snapshot = self.snapshot.as_ref()?;
        let subscription = &mut self.subscriptions[kind];
        subscription.wake_at = None;
        let answer = subscription.answer_due && (!subscription.wildcard || snapshot.knows_all(kind));
        let mut due =
            Due { answer, changes: subscription.has_changes(), removals: subscription.has_removals() };
        if let Some(until) = subscription.blocked_until().filter(|until| now < *until && due.any()) {
            subscription.wake_at = Some(until);
            return None;
        }

        let mut wake_at = None;
        let waits = matches!(kind, Kind::Listener | Kind::Route) && adding;
        if !waits || !(due.changes || due.answer) {
            subscription.changes_held_since = None;
        } else {
            let is_asked = due.answer || (subscription.has_new() && !subscription.wildcard);
            let cap = if is_asked { FIRST_ANSWER_CAP } else { ORDER_CAP };
            let until = *subscription.changes_held_since.get_or_insert(now) + cap;
            if now < until {
                (due.changes, due.answer) = (false, false);
                wake_at = Some(until);
            }
        }
        let grace = self.opened.filter(|_| subscription.resumed && kind != Kind::Listener);
        let grace = grace.map(|opened| opened + RESUME_GRACE).filter(|end| now < *end);
        if !due.removals || !(referred_to || grace.is_some()) {
            subscription.removals_held_since = None;
        } else {
            let until = *subscription.removals_held_since.get_or_insert(now) + ORDER_CAP;
            let until = grace.unwrap_or(until);
            if now < until {
                due.removals = false;
                wake_at = wake_at.into_iter().chain([until]).min();
            }
        }
        subscription.wake_at = wake_at;
        due.any().then_some(due)
    }

    /// Reports whether an ACK is missing for some new cluster or for the first endpoints of a cluster. After a
    /// NACK the rest is not held back.
    fn is_adding_clusters(&self, now: Instant) -> bool {
        [Kind::Cluster, Kind::Endpoint].into_iter().any(|kind| self.subscriptions[kind].is_adding(now))
    }

    /// Reports whether resources that the client has of other kinds may still refer to a pending removal of
    /// this kind (R45).
    fn is_referred_to(&self, now: Instant, kind: Kind) -> bool {
        let by: &[Kind] = match kind {
            Kind::Cluster => &[Kind::Listener, Kind::Route],
            Kind::Endpoint => &[Kind::Cluster],
            Kind::Route => &[Kind::Listener],
            Kind::Listener | Kind::Secret | Kind::Local => &[],
        };
        by.iter()
            .any(|by| !self.subscriptions[*by].is_quiet(now) || !self.status.kinds[*by].rejected.is_empty())
    }

    /// Takes the pending names for the next response, up to its size limit.
    fn batch(&mut self, kind: Kind, due: Due) -> Vec<(Arc<str>, Outgoing)> {
        let Some(snapshot) = &self.snapshot else { return Vec::new() };
        let absence = Absence::of(self.protocol, kind);
        let subscription = &mut self.subscriptions[kind];
        let is_due = |work: &Work| if *work == Work::Gone { due.removals } else { due.changes };

        let mut alone = None;
        while let Some(mut names) = subscription.isolated.pop_front() {
            names.retain(|name| subscription.pending().get(name).is_some_and(is_due));
            if !names.is_empty() {
                alone = Some(names);
                break;
            }
        }
        if alone.is_none() {
            subscription.isolations_left = ISOLATIONS;
        }
        let subscription = &self.subscriptions[kind];
        let mut size = 0;
        let mut batch = Vec::new();
        let mut take = |name: &Arc<str>| {
            let target = target(snapshot, &self.subscriptions, kind, name);
            let Some(outgoing) = subscription.outgoing(name, absence, target) else { return true };
            size += outgoing.len() + name.len();
            if size > SPLIT_AT && absence != Absence::Omitted && !batch.is_empty() {
                return false;
            }
            batch.push((name.clone(), outgoing));
            true
        };
        match alone {
            Some(names) => _ = names.iter().all(&mut take),
            None => {
                let mut names =
                    subscription.pending().iter().filter(|(_, work)| is_due(work)).map(|(name, _)| name);
                _ = names.all(&mut take);
            }
        }
        batch
    }
}

/// Bookkeeping for both directions.
impl Session {
    fn weigh(&mut self, kind: Kind, name: &Arc<str>) {
        let Some(snapshot) = &self.snapshot else { return };
        let absence = Absence::of(self.protocol, kind);
        let target = target(snapshot, &self.subscriptions, kind, name);
        self.subscriptions[kind].weigh(name, absence, target, snapshot.store.generation());
    }

    fn weigh_all(&mut self, kind: Kind) {
        let Some(snapshot) = self.snapshot.clone() else { return };
        let names: Vec<_> = self.subscriptions[kind].entries.keys().cloned().collect();
        names.iter().for_each(|name| self.weigh(kind, name));
        if self.subscriptions[kind].wildcard {
            let (absence, generation) = (Absence::of(self.protocol, kind), snapshot.store.generation());
            for resource in snapshot.of_kind(kind) {
                let target = Target::Resource(resource);
                self.subscriptions[kind].weigh(resource.name(), absence, target, generation);
            }
        }
    }

    fn forget(&mut self, kind: Kind, name: &str) {
        self.subscriptions[kind].forget(name);
        self.status.kinds[kind].rejected.remove(name);
        if kind == Kind::Cluster {
            self.weigh(Kind::Endpoint, &Arc::from(name));
        }
    }

    fn generation(&self) -> u64 {
        self.snapshot.as_ref().map_or(0, |snapshot| snapshot.store.generation())
    }

    fn record(&mut self, event: impl FnOnce() -> Event) {
        if let Some(events) = &mut self.events {
            events.push_back(event());
        }
    }

    fn refresh_status(&mut self) {
        let mut behind_since: Option<u64> = None;
        let mut quiet = self.snapshot.is_some();
        let mut seen = false;
        let generation = self.generation();
        for (kind, subscription) in self.subscriptions.iter_mut() {
            let status = &mut self.status.kinds[kind];
            status.in_flight_since = subscription.in_flight.back().map(|response| response.since);
            if status.rejected.is_empty() {
                subscription.rejected_since = None;
            }
            let is_quiet = subscription.pending().is_empty() && subscription.in_flight.is_empty();
            if let (Some(events), true) = (&mut self.events, is_quiet && status.subscribed)
                && self.settled[kind] != Some(generation)
            {
                self.settled[kind] = Some(generation);
                events.push_back(Event::Settled { kind, generation });
            }
            quiet &= is_quiet;
            seen |= subscription.seen;
            let in_flight = subscription.in_flight.iter().filter_map(|response| response.behind_since);
            let behind = [subscription.behind_since, subscription.rejected_since];
            behind_since = behind.into_iter().flatten().chain(in_flight).chain(behind_since).min();
        }
        self.status.generation_acked = match behind_since {
            _ if !seen => 0,
            Some(generation) => generation.saturating_sub(1),
            None => self.generation(),
        };
        self.status.state = match self.status.rejection() {
            Some(reason) => State::Rejected { reason: reason.into() },
            None if quiet => State::Synced,
            None => State::Pushing,
        };
    }
}

#[derive(Clone, Copy)]
struct Due {
    answer: bool,
    changes: bool,
    removals: bool,
}

impl Due {
    fn any(self) -> bool {
        self.answer || self.changes || self.removals
    }
}

enum Outgoing {
    Resource(Arc<Resource>),
    /// The last version that the client did not reject.
    Good(Arc<Resource>),
    /// An assignment without endpoints.
    Empty(Arc<Resource>),
    Absent,
}

impl Outgoing {
    fn len(&self) -> usize {
        match self {
            Outgoing::Resource(resource) | Outgoing::Good(resource) | Outgoing::Empty(resource) => {
                resource.delta().len()
            }
            Outgoing::Absent => 0,
        }
    }
}

impl Subscription {
    fn outgoing(&self, name: &str, absence: Absence, target: Target<'_>) -> Option<Outgoing> {
        let held = self.entries.get(name).map(|entry| &entry.held);
        Some(match (target, absence, held) {
            (Target::Resource(new), _, Some(Held::Rejected(rejected))) if rejected.0 == new.fingerprint() => {
                Outgoing::Good(rejected.1.clone().unwrap_or_else(|| without_endpoints(name)))
            }
            (Target::Resource(new), ..) => Outgoing::Resource(new.clone()),
            (Target::Leaving, _, Some(Held::Resource(held))) => Outgoing::Good(held.clone()),
            (Target::Leaving, ..) => Outgoing::Empty(without_endpoints(name)),
            (Target::Empty, ..) | (Target::Absent, Absence::Empty, _) => {
                Outgoing::Empty(without_endpoints(name))
            }
            (Target::Absent, Absence::Removed | Absence::Omitted, _) => Outgoing::Absent,
            (Target::Absent, Absence::Untold, _) | (Target::Unknown, ..) => return None,
        })
    }

    /// Splits the names of a rejected response in halves, each to be sent in a response of its own.
    fn isolate(&mut self, names: Vec<Arc<str>>) {
        self.isolations_left -= 1;
        let (left, right) = names.split_at(names.len() / 2);
        self.isolated.push_front(right.to_vec());
        self.isolated.push_front(left.to_vec());
    }

    /// Returns the unanswered item of `name` that replaced `sent`.
    fn sent_after(&mut self, name: &str, sent: Option<&Arc<Resource>>) -> Option<&mut Item> {
        let mut items = self.in_flight.iter_mut().flat_map(|response| &mut response.items);
        items.find(|item| *item.name == *name && same(&item.before, sent))
    }

    /// Reports whether `item` is the latest that was sent of its name.
    fn has(&self, item: &Item) -> bool {
        let held = self.entries.get(&item.name).map(|entry| &entry.held);
        match &item.sent {
            Some(_) => held.is_some_and(|held| same(held, item.sent.as_ref())),
            None => match held {
                Some(held) => matches!(held, Held::Absent),
                None => self.wildcard,
            },
        }
    }
}

impl Held {
    fn resource(&self) -> Option<&Arc<Resource>> {
        match self {
            Held::Resource(resource) => Some(resource),
            Held::Unsure(good) | Held::Unremovable(good) => good.as_ref(),
            Held::Rejected(rejected) => rejected.1.as_ref(),
            Held::Nothing | Held::Other | Held::Absent | Held::Empty(_) => None,
        }
    }
}

/// Returns the target of a name. Endpoints stay while the client still has their cluster.
fn target<'a>(
    snapshot: &'a Snapshot,
    subscriptions: &PerKind<Subscription>,
    kind: Kind,
    name: &str,
) -> Target<'a> {
    match Target::of(snapshot, kind, name) {
        Target::Absent if kind == Kind::Endpoint => {
            let cluster = subscriptions[Kind::Cluster].entries.get(name).map(|entry| &entry.held);
            match cluster {
                Some(
                    Held::Resource(_)
                    | Held::Rejected(_)
                    | Held::Unsure(_)
                    | Held::Unremovable(_)
                    | Held::Other,
                ) => Target::Leaving,
                _ => Target::Absent,
            }
        }
        target => target,
    }
}

fn same(held: &Held, sent: Option<&Arc<Resource>>) -> bool {
    match (held, sent) {
        (Held::Resource(held) | Held::Empty(held), Some(sent)) => held.fingerprint() == sent.fingerprint(),
        _ => false,
    }
}

fn without_endpoints(name: &str) -> Arc<Resource> {
    let empty = ClusterLoadAssignment { cluster_name: name.to_owned(), ..ClusterLoadAssignment::default() };
    Resource::new(Kind::Endpoint, name, &empty)
}

/// Hashes the content of a response, so that equal responses have equal versions (R09).
fn version_of(resources: &[Arc<Resource>], removed: &[Arc<str>]) -> u64 {
    let mut hash = Xxh3Default::new();
    resources.iter().for_each(|resource| hash.update(&resource.fingerprint().to_le_bytes()));
    removed.iter().for_each(|name| hash.update(name.as_bytes()));
    hash.digest()
}

fn parse_nonce(nonce: &str) -> Option<u64> {
    nonce.parse().ok()
}

/// The limit of a stored error text, in bytes. Envoy's errors can quote whole resources.
const REASON_MAX: usize = 4096;
/// The limit of the search for names in an error text, as the number of names times the bytes of the text.
const SEARCH_MAX: usize = 64 << 20;

/// Returns a client's error text, cut to a limit and without characters that would control a terminal or a log.
fn shown(error: &str) -> String {
    let mut shown = String::new();
    for c in error.chars() {
        match c {
            // Envoy writes one line per error.
            '\n' => shown.push(c),
            c if c.is_control()
                || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}') =>
            {
                shown.extend(c.escape_default());
            }
            c => shown.push(c),
        }
        if shown.len() > REASON_MAX {
            break;
        }
    }
    shown.truncate(shown.floor_char_boundary(REASON_MAX));
    shown
}

/// Limits of the refusals that a NACK may list. A relay lists at most 256. Longer lists are ignored, since each
/// resource of a response is compared with each refusal.
const REFUSALS_BYTES: usize = 256 << 10;
const REFUSALS_USED: usize = 1024;

/// Decodes the list of refused resources that an agent adds to its error text.
fn refusals(error: &rpc::Status) -> Option<agent::Refusals> {
    let type_url = agent::Refusals::type_url();
    let any = error.details.iter().find(|any| any.type_url == type_url)?;
    if any.value.len() > REFUSALS_BYTES {
        return None;
    }
    agent::Refusals::decode(any.value.clone()).ok().filter(|said| said.refusals.len() <= REFUSALS_USED)
}

/// Returns, for each name, whether the error text blames it.
fn names_in<'a>(kind: Kind, text: &str, names: impl ExactSizeIterator<Item = &'a str>) -> Vec<bool> {
    if names.len().saturating_mul(text.len()) > SEARCH_MAX {
        return vec![false; names.len()];
    }
    names.map(|name| blames(kind, text, name)).collect()
}

/// Reports whether the error text blames `name`, a resource of this kind. A blamed name stands where Envoy and
/// gRPC write the name, followed by the error. Elsewhere in the text it may be a common word, a part of another
/// name, or a resource of another kind.
///
/// Envoy writes `Error adding/updating cluster(s) a: why, b: why`, and the same with `listener(s)` and one
/// resource per line. gRPC writes `[resource index 0: a: why]`. A text that is only the name blames it too.
fn blames(kind: Kind, text: &str, name: &str) -> bool {
    let of_kind = match kind {
        Kind::Cluster => "cluster(s) ",
        Kind::Listener => "listener(s) ",
        _ => "\n",
    };
    let begins = |before: &str| {
        before.is_empty()
            || before.ends_with(['\n', '['])
            || before.ends_with(", ")
            || before.ends_with("; ")
            || before.ends_with(of_kind)
            || before.strip_suffix(": ").is_some_and(|before| {
                before.trim_end_matches(|c: char| c.is_ascii_digit()).ends_with("resource index ")
            })
    };
    !name.is_empty()
        && text.match_indices(name).any(|(at, _)| {
            let before = text.get(..at).unwrap_or_default();
            let after = text.get(at + name.len()..).unwrap_or_default();
            begins(before) && (after.starts_with(": ") || (before.is_empty() && after.is_empty()))
        })
}
