//! The server's end of one ADS stream.
//!
//! | module | responsibility |
//! |---|---|
//! | here | [`Session`]: its inputs and outputs, and its status |
//! | `request` | decodes requests within limits |
//! | `subscribe` | subscriptions, and the versions that a client kept from an earlier stream |
//! | `answer` | ACKs and NACKs |
//! | `error_text` | which resources the error text of a NACK blames |
//! | `push` | which pending names are sent, and when |
//! | `response` | encodes a response |
//! | `subscription` | the state of one kind: names, copies, pending changes, responses in flight |
//! | `target` | what the client has, what it should have, and the change between the two |
//! | `status` | the state of a stream, for operators |

mod answer;
mod error_text;
mod push;
mod request;
mod response;
mod status;
mod subscribe;
mod subscription;
mod target;
#[cfg(test)]
mod tests;

pub use request::{Bounds, Request, SessionError};
pub use response::Response;
pub use status::{KindStatus, Rejection, SessionStatus, State};

use crate::{Kind, PerKind, Resource, Snapshot};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;
use subscription::Subscription;
use target::{AbsenceSignal, Target};

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
    /// The time at which the stream's first request arrived.
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

impl Event {
    pub fn kind(&self) -> Kind {
        match self {
            Event::Subscribed { kind, .. }
            | Event::Unsubscribed { kind, .. }
            | Event::Accepted { kind, .. }
            | Event::RemovalRejected { kind, .. }
            | Event::Settled { kind, .. } => *kind,
            Event::Rejected { resource, .. } => resource.kind(),
        }
    }
}

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
            (Protocol::Delta, Request::Delta(request)) => self.on_delta_request(now, kind, request)?,
            (Protocol::Sotw, Request::Sotw(request)) => self.on_sotw_request(now, kind, request)?,
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
                    self.reconcile(changed.kind(), changed.name());
                    if &**changed.name() == "*" {
                        // A partial store states with the tombstone `*` that it has all resources of the kind,
                        // so missing ones are now absent.
                        self.reconcile_all(changed.kind());
                    }
                    if changed.kind() == Kind::Cluster {
                        // A missing assignment is sent as empty while its cluster exists, so it depends on the
                        // cluster.
                        self.reconcile(Kind::Endpoint, changed.name());
                    }
                });
            }
            _ => Kind::ALL.into_iter().for_each(|kind| self.reconcile_all(kind)),
        }
        self.refresh_status();
    }

    /// Returns the next response, or `None` if nothing may be sent now. Call it until it returns `None`, after
    /// each other call and at [`Session::poll_timeout`].
    pub fn poll_response(&mut self, now: Instant) -> Option<Response> {
        let response = Kind::ALL.into_iter().find_map(|kind| self.next_response(now, kind))?;
        self.refresh_status();
        Some(response)
    }

    /// Returns the time at which [`Session::poll_response`] may have a response although nothing else happened.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.subscriptions.iter().filter_map(|(_, subscription)| subscription.wake_at).min()
    }
}

/// Bookkeeping for all parts.
impl Session {
    fn reconcile(&mut self, kind: Kind, name: &Arc<str>) {
        let Some(snapshot) = &self.snapshot else { return };
        let absence = AbsenceSignal::of(self.protocol, kind);
        let target = Target::with_leaving(snapshot, &self.subscriptions, kind, name);
        self.subscriptions[kind].reconcile(name, absence, target, snapshot.store.generation());
    }

    fn reconcile_all(&mut self, kind: Kind) {
        let Some(snapshot) = self.snapshot.clone() else { return };
        let names: Vec<_> = self.subscriptions[kind].entries.keys().cloned().collect();
        names.iter().for_each(|name| self.reconcile(kind, name));
        if self.subscriptions[kind].wildcard {
            let (absence, generation) = (AbsenceSignal::of(self.protocol, kind), snapshot.store.generation());
            for resource in snapshot.of_kind(kind) {
                let target = Target::Resource(resource);
                self.subscriptions[kind].reconcile(resource.name(), absence, target, generation);
            }
        }
    }

    fn forget(&mut self, kind: Kind, name: &str) {
        self.subscriptions[kind].forget(name);
        self.status.kinds[kind].rejected.remove(name);
        if kind == Kind::Cluster {
            self.reconcile(Kind::Endpoint, &Arc::from(name));
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
        let mut has_requests = false;
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
            has_requests |= subscription.has_requests;
            let in_flight = subscription.in_flight.iter().filter_map(|response| response.behind_since);
            let behind = [subscription.behind_since, subscription.rejected_since];
            behind_since = behind.into_iter().flatten().chain(in_flight).chain(behind_since).min();
        }
        self.status.generation_acked = match behind_since {
            _ if !has_requests => 0,
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

fn parse_nonce(nonce: &str) -> Option<u64> {
    nonce.parse().ok()
}
