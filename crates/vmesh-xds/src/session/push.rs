//! Responses: which pending names are sent, and when.
//!
//! The session keeps three rules that are about time: a response waits for the answer to the previous one of its kind (R20),
//! changes wait for the ACK of the clusters that they may refer to, and removals for the ACK of the changes that end a
//! reference (R45, R47). Every wait has a limit, and [`Subscription::wake_at`] says when the first one ends.

use super::response::ResponseHead;
use super::subscription::{InFlightResponse, SentItem, Subscription};
use super::target::{AbsenceSignal, ClientCopy, PendingChange, Target, without_endpoints};
use super::{Response, Session};
use crate::{Kind, Resource, second_assignment};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::Xxh3Default;

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
/// [`ANSWER_CAP`](super::subscription::ANSWER_CAP).
const IN_FLIGHT_MAX: usize = 4;

impl Session {
    /// Makes the next response of a kind, if one may be sent now.
    pub(super) fn next_response(&mut self, now: Instant, kind: Kind) -> Option<Response> {
        let due = self.due_parts(now, kind)?;
        let batch = self.select_batch(kind, due);
        if batch.is_empty() && !due.answer {
            return None;
        }
        self.nonce += 1;
        let is_complete_set = AbsenceSignal::of(self.protocol, kind) == AbsenceSignal::OmittedFromSet;
        let mut sent = self.update_copies(now, kind, batch);
        let subscription = &mut self.subscriptions[kind];
        subscription.answer_due = false;
        if is_complete_set {
            sent.complete_set(subscription);
        }
        let SentBatch { response, resources, mut removed, changed_clusters } = sent;
        subscription.last_nonce = self.nonce;
        subscription.in_flight.push_back(response);
        if subscription.in_flight.len() > IN_FLIGHT_MAX {
            subscription.in_flight.pop_front();
        }
        if kind == Kind::Cluster {
            // The endpoints of a removed cluster stay until the client has dropped the cluster.
            removed.iter().for_each(|name| self.reconcile(Kind::Endpoint, name));
        }
        changed_clusters.iter().for_each(|name| self.resend_endpoints(name));
        if is_complete_set {
            removed.clear();
        }
        let status = &mut self.status.kinds[kind];
        status.responses += 1;
        status.last_sent = Some(now);
        let head = ResponseHead {
            protocol: self.protocol,
            kind,
            nonce: self.nonce,
            version: response_version(&resources, &removed),
            removed: &removed,
            control_plane: &self.control_plane,
        };
        Some(Response::new(head, &resources))
    }

    /// Moves a batch from the pending names to the client's copies.
    fn update_copies(&mut self, now: Instant, kind: Kind, batch: Vec<(Arc<str>, Payload)>) -> SentBatch {
        let generation = self.snapshot.as_ref().map(|snapshot| snapshot.store.generation());
        let subscription = &mut self.subscriptions[kind];
        let mut response = InFlightResponse {
            nonce: self.nonce,
            since: now,
            adds: false,
            blocking: true,
            behind_since: subscription.behind_since.or(generation),
            items: Vec::with_capacity(batch.len()),
            repeated: Vec::new(),
        };
        let (mut resources, mut removed, mut changed_clusters) = (Vec::new(), Vec::new(), Vec::new());
        for (name, payload) in batch {
            let change = subscription.pending().get(&name).copied();
            subscription.clear_pending(&name);
            let wildcard = subscription.wildcard;
            let entry = subscription.entries.entry(name.clone()).or_default();
            entry.must_send = false;
            let (copy, sent) = match payload {
                Payload::Resource(resource) => {
                    response.adds |= change == Some(PendingChange::Add);
                    (ClientCopy::Resource(resource.clone()), Some(resource))
                }
                Payload::Empty(resource) => (ClientCopy::Empty(resource.clone()), Some(resource)),
                Payload::Absent => (ClientCopy::Absent, None),
                Payload::LastGood(resource) => {
                    response.repeated.push(resource.clone());
                    resources.push(resource);
                    continue;
                }
            };
            match &sent {
                Some(resource) => resources.push(resource.clone()),
                None => removed.push(name.clone()),
            }
            let before = std::mem::replace(&mut entry.copy, copy);
            if kind == Kind::Cluster && sent.is_some() && !before.is(sent.as_ref()) {
                changed_clusters.push(name.clone());
            }
            if sent.is_none() && !entry.named && wildcard {
                subscription.entries.remove(&name);
            }
            response.items.push(SentItem { name, before, sent });
        }
        SentBatch { response, resources, removed, changed_clusters }
    }

    /// Sends the endpoints of a changed cluster again: Envoy warms the cluster until they arrive, but does not ask for
    /// them again (R46).
    fn resend_endpoints(&mut self, cluster: &Arc<str>) {
        for assignment in [cluster.clone(), second_assignment(cluster).into()] {
            if let Some(entry) = self.subscriptions[Kind::Endpoint].entries.get_mut(&assignment)
                && !matches!(entry.copy, ClientCopy::Nothing)
            {
                entry.must_send = true;
                self.reconcile(Kind::Endpoint, &assignment);
            }
        }
    }

    /// Decides which pending names of a kind may be sent now, and sets the time at which the next ones may be.
    fn due_parts(&mut self, now: Instant, kind: Kind) -> Option<DueParts> {
        let adding = self.is_adding_clusters(now);
        let referred_to = self.is_referred_to(now, kind);
        let snapshot = self.snapshot.as_ref()?;
        let subscription = &mut self.subscriptions[kind];
        subscription.wake_at = None;
        let answer = subscription.answer_due && (!subscription.wildcard || snapshot.knows_all(kind));
        let mut due =
            DueParts { answer, changes: subscription.has_changes(), removals: subscription.has_removals() };
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
            Kind::Route | Kind::ExtensionConfig => &[Kind::Listener],
            Kind::Listener | Kind::Secret | Kind::Local => &[],
        };
        by.iter()
            .any(|by| !self.subscriptions[*by].is_quiet(now) || !self.status.kinds[*by].rejected.is_empty())
    }

    /// Takes the pending names for the next response, up to its size limit.
    fn select_batch(&mut self, kind: Kind, due: DueParts) -> Vec<(Arc<str>, Payload)> {
        let Some(snapshot) = &self.snapshot else { return Vec::new() };
        let absence = AbsenceSignal::of(self.protocol, kind);
        let subscription = &mut self.subscriptions[kind];
        let is_due = |change: &PendingChange| {
            if *change == PendingChange::Remove { due.removals } else { due.changes }
        };

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
            let target = Target::with_leaving(snapshot, &self.subscriptions, kind, name);
            let Some(payload) = subscription.payload(name, absence, target) else { return true };
            size += payload.len() + name.len();
            if size > SPLIT_AT && absence != AbsenceSignal::OmittedFromSet && !batch.is_empty() {
                return false;
            }
            batch.push((name.clone(), payload));
            true
        };
        match alone {
            Some(names) => _ = names.iter().all(&mut take),
            None => {
                let mut names =
                    subscription.pending().iter().filter(|(_, change)| is_due(change)).map(|(name, _)| name);
                _ = names.all(&mut take);
            }
        }
        batch
    }
}

/// The parts of a subscription that may be sent now.
#[derive(Clone, Copy)]
struct DueParts {
    /// A response that the client waits for, even without resources.
    answer: bool,
    changes: bool,
    removals: bool,
}

impl DueParts {
    fn any(self) -> bool {
        self.answer || self.changes || self.removals
    }
}

/// The content that a response has for one name.
enum Payload {
    Resource(Arc<Resource>),
    /// The last version that the client did not reject.
    LastGood(Arc<Resource>),
    /// An assignment without endpoints.
    Empty(Arc<Resource>),
    Absent,
}

impl Payload {
    fn len(&self) -> usize {
        match self {
            Payload::Resource(resource) | Payload::LastGood(resource) | Payload::Empty(resource) => {
                resource.delta().len()
            }
            Payload::Absent => 0,
        }
    }
}

/// A batch after it was moved to the client's copies.
struct SentBatch {
    response: InFlightResponse,
    resources: Vec<Arc<Resource>>,
    removed: Vec<Arc<str>>,
    /// Clusters whose content differs from the client's previous copy.
    changed_clusters: Vec<Arc<str>>,
}

impl SentBatch {
    /// Extends the resources to the complete set: a SotW response of clusters or listeners repeats the unchanged ones (R28).
    fn complete_set(&mut self, subscription: &Subscription) {
        let copies = subscription.entries.values().filter_map(|entry| entry.copy.resource().cloned());
        self.resources = copies.collect();
        self.resources.sort_by(|a, b| a.name().cmp(b.name()));
        if !subscription.in_flight.is_empty() {
            // A NACK of this response may be about resources of an older response that is not answered either.
            let items = &self.response.items;
            let new: HashSet<&Arc<str>> = items.iter().map(|item| &item.name).collect();
            let repeated = self.resources.iter().filter(|resource| !new.contains(resource.name()));
            self.response.repeated = repeated.cloned().collect();
        }
    }
}

impl Subscription {
    /// Returns the content to send for a pending name, or `None` if nothing can be sent.
    fn payload(&self, name: &str, absence: AbsenceSignal, target: Target<'_>) -> Option<Payload> {
        let copy = self.entries.get(name).map(|entry| &entry.copy);
        Some(match (target, absence, copy) {
            (Target::Resource(new), _, Some(ClientCopy::Rejected(rejected)))
                if rejected.fingerprint == new.fingerprint() =>
            {
                Payload::LastGood(rejected.last_good.clone().unwrap_or_else(|| without_endpoints(name)))
            }
            (Target::Resource(new), ..) => Payload::Resource(new.clone()),
            (Target::Leaving, _, Some(ClientCopy::Resource(copy))) => Payload::LastGood(copy.clone()),
            (Target::Leaving, ..) => Payload::Empty(without_endpoints(name)),
            (Target::Empty, ..) | (Target::Absent, AbsenceSignal::EmptyAssignment, _) => {
                Payload::Empty(without_endpoints(name))
            }
            (Target::Absent, AbsenceSignal::RemovedList | AbsenceSignal::OmittedFromSet, _) => {
                Payload::Absent
            }
            (Target::Absent, AbsenceSignal::Silence, _) | (Target::Unknown, ..) => return None,
        })
    }
}

/// Hashes the content of a response, so that equal responses have equal versions (R09).
fn response_version(resources: &[Arc<Resource>], removed: &[Arc<str>]) -> u64 {
    let mut hash = Xxh3Default::new();
    resources.iter().for_each(|resource| hash.update(&resource.fingerprint().to_le_bytes()));
    removed.iter().for_each(|name| hash.update(name.as_bytes()));
    hash.digest()
}
