//! The relay of an agent: an xDS client of the control plane and an xDS server of Envoy.

mod downstream;
mod state;
#[cfg(test)]
mod tests;
mod upstream;

use crate::{Group, Kind, PerKind, Resource, Store, Subscriber};
use state::KindState;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;
use vmesh_proto::envoy::config::core::v3::Node;

/// Connects the control plane and the Envoy of one node: an xDS client of the former, an xDS server of the
/// latter. It does no I/O.
///
/// What the control plane sends goes into a [store](Relay::store), which sessions serve to Envoy; what Envoy
/// does comes back as [`Event`]s. The relay answers a response of the control plane when Envoy has answered for
/// each resource in it, and rejects it with Envoy's own words. The resources that Envoy took are
/// [accepted](Relay::accepted): an agent that saves them can restart from them and serve Envoy without any
/// control plane.
///
/// [`Kind::Secret`] is not relayed: no subscription to a secret goes to the control plane, and no secret is in the store. An owner
/// that has secrets serves them to its clients as [their own](crate::Scope::with_own).
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
            if kind == Kind::Secret {
                continue;
            }
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

/// A change of one group in the store.
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
