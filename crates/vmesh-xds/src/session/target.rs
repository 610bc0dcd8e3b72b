//! The client's copy of a resource, the target for it, and the pending change from copy to target.

use super::Protocol;
use super::subscription::{NameEntry, Subscription};
use crate::snapshot::Lookup;
use crate::{Kind, PerKind, Resource, Snapshot};
use std::sync::Arc;
use vmesh_proto::envoy::config::endpoint::v3::ClusterLoadAssignment;

/// The client's copy of a resource, assuming that it ACKs the responses in flight.
#[derive(Clone, Default)]
pub(super) enum ClientCopy {
    #[default]
    Nothing,
    /// Some version from an earlier stream, other than the current one.
    Outdated,
    /// The client was told that the resource does not exist.
    Absent,
    /// An assignment without endpoints, made for this client.
    Empty(Arc<Resource>),
    Resource(Arc<Resource>),
    /// The client rejected a response that contained the resource, perhaps because of another one. The client
    /// may still have the last good resource.
    Uncertain(Option<Arc<Resource>>),
    /// The client rejected a resource and keeps the last good resource, if there was any.
    Rejected(Box<RejectedCopy>),
    /// The client rejected the removal and still has the last good resource, if the session knows it.
    Unremovable(Option<Arc<Resource>>),
}

/// A resource that the client rejected.
#[derive(Clone)]
pub(super) struct RejectedCopy {
    /// The fingerprint of the rejected resource.
    pub fingerprint: u64,
    /// The resource that the client accepted last under the same name.
    pub last_good: Option<Arc<Resource>>,
}

/// The resource that the client should have of a name.
#[derive(Clone, Copy)]
pub(super) enum Target<'a> {
    Resource(&'a Arc<Resource>),
    /// An assignment without endpoints: its cluster exists, and Envoy waits for an answer (R30, R31).
    Empty,
    /// The endpoints of a removed cluster that the client still has: they stay until the client has dropped the
    /// cluster.
    Leaving,
    Absent,
    /// The store is partial and has no record of the name yet.
    Unknown,
}

/// A change that the client must be sent to bring its copy to the target.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PendingChange {
    /// The resource is missing at the client.
    Add,
    /// The client has or asked for the resource and gets its current version.
    Update,
    /// The client has the resource and must drop it.
    Remove,
}

impl ClientCopy {
    /// Returns the resource that the client has, as far as it is known.
    pub(super) fn resource(&self) -> Option<&Arc<Resource>> {
        match self {
            ClientCopy::Resource(resource) => Some(resource),
            ClientCopy::Uncertain(good) | ClientCopy::Unremovable(good) => good.as_ref(),
            ClientCopy::Rejected(rejected) => rejected.last_good.as_ref(),
            ClientCopy::Nothing | ClientCopy::Outdated | ClientCopy::Absent | ClientCopy::Empty(_) => None,
        }
    }

    /// Reports whether this copy is the resource `sent`.
    pub(super) fn is(&self, sent: Option<&Arc<Resource>>) -> bool {
        match (self, sent) {
            (ClientCopy::Resource(copy) | ClientCopy::Empty(copy), Some(sent)) => {
                copy.fingerprint() == sent.fingerprint()
            }
            _ => false,
        }
    }
}

impl<'a> Target<'a> {
    /// Returns the target of a name, as the snapshot says.
    pub(super) fn of(snapshot: &'a Snapshot, kind: Kind, name: &str) -> Target<'a> {
        match snapshot.find(kind, name) {
            Lookup::Present(resource) => Target::Resource(resource),
            Lookup::Unknown => Target::Unknown,
            Lookup::Absent => match kind {
                Kind::Endpoint if snapshot.get(Kind::Cluster, name).is_some() => Target::Empty,
                _ => Target::Absent,
            },
        }
    }

    /// Returns the target of a name, given that endpoints stay while the client still has their cluster.
    pub(super) fn with_leaving(
        snapshot: &'a Snapshot,
        subscriptions: &PerKind<Subscription>,
        kind: Kind,
        name: &str,
    ) -> Target<'a> {
        match Target::of(snapshot, kind, name) {
            Target::Absent if kind == Kind::Endpoint => {
                let cluster = subscriptions[Kind::Cluster].entries.get(name).map(|entry| &entry.copy);
                match cluster {
                    Some(
                        ClientCopy::Resource(_)
                        | ClientCopy::Rejected(_)
                        | ClientCopy::Uncertain(_)
                        | ClientCopy::Unremovable(_)
                        | ClientCopy::Outdated,
                    ) => Target::Leaving,
                    _ => Target::Absent,
                }
            }
            target => target,
        }
    }
}

/// How the absence of a resource is announced to a client.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum AbsenceSignal {
    RemovedList,
    /// The response is the complete set, and the name is not in it.
    OmittedFromSet,
    /// SotW has no field for removed names, but Envoy needs an answer: an assignment without endpoints (R31).
    EmptyAssignment,
    /// The absence is not announced: a client keeps a secret while a live configuration refers to it (R30).
    Silence,
}

impl AbsenceSignal {
    pub(super) fn of(protocol: Protocol, kind: Kind) -> AbsenceSignal {
        match (protocol, kind) {
            (_, Kind::Secret) => AbsenceSignal::Silence,
            (Protocol::Delta, _) => AbsenceSignal::RemovedList,
            (Protocol::Sotw, Kind::Cluster | Kind::Listener | Kind::Local) => AbsenceSignal::OmittedFromSet,
            (Protocol::Sotw, Kind::Endpoint) => AbsenceSignal::EmptyAssignment,
            (Protocol::Sotw, Kind::Route | Kind::ExtensionConfig) => AbsenceSignal::Silence,
        }
    }
}

/// Compares the target of a name with the client's copy and returns the change to send, if any.
pub(super) fn pending_change(
    entry: Option<&NameEntry>,
    wildcard: bool,
    absence: AbsenceSignal,
    target: Target<'_>,
) -> Option<PendingChange> {
    let unknown = NameEntry::default();
    let NameEntry { copy, named, must_send, .. } = entry.unwrap_or(&unknown);
    if !named && !wildcard {
        return None;
    }
    let again = must_send.then_some(PendingChange::Update);
    match (target, copy) {
        (Target::Unknown, _) => None,
        // A rejected resource is not sent again. A client that subscribes again gets the last good one (R13).
        (Target::Resource(new), ClientCopy::Rejected(rejected))
            if rejected.fingerprint == new.fingerprint() =>
        {
            again.filter(|_| rejected.last_good.is_some() || new.kind() == Kind::Endpoint)
        }
        (
            Target::Resource(_),
            ClientCopy::Nothing
            | ClientCopy::Absent
            | ClientCopy::Uncertain(None)
            | ClientCopy::Unremovable(None),
        ) => Some(PendingChange::Add),
        (Target::Resource(_), ClientCopy::Rejected(rejected)) if rejected.last_good.is_none() => {
            Some(PendingChange::Add)
        }
        (Target::Resource(new), ClientCopy::Resource(old)) if new.fingerprint() == old.fingerprint() => again,
        (Target::Resource(_), _) => Some(PendingChange::Update),

        (Target::Empty, ClientCopy::Nothing | ClientCopy::Absent) => Some(PendingChange::Add),
        (Target::Empty, ClientCopy::Empty(_)) => again,
        (Target::Empty, _) => Some(PendingChange::Update),

        (Target::Leaving, ClientCopy::Nothing | ClientCopy::Absent) => Some(PendingChange::Add),
        (Target::Leaving, _) => again,

        (Target::Absent, _) if absence == AbsenceSignal::Silence => None,
        (Target::Absent, ClientCopy::Nothing) => (*named || *must_send).then_some(PendingChange::Update),
        // A rejected removal is not repeated before the name had another resource.
        (Target::Absent, ClientCopy::Absent | ClientCopy::Unremovable(_)) => again,
        (Target::Absent, ClientCopy::Empty(_)) if absence == AbsenceSignal::EmptyAssignment => again,
        (Target::Absent, _) => again.or(Some(PendingChange::Remove)),
    }
}

/// Makes an assignment without endpoints for the cluster `name`.
pub(super) fn without_endpoints(name: &str) -> Arc<Resource> {
    let empty = ClusterLoadAssignment { cluster_name: name.to_owned(), ..ClusterLoadAssignment::default() };
    Resource::new(Kind::Endpoint, name, &empty)
}
