//! The downstream end of a relay, towards Envoy.

use super::{ClientId, GroupChange, Relay, removal_of, upsert};
use crate::{Event, Kind, PerKind, Resource};
use std::sync::Arc;

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
            // Secrets are the owner's matter.
            event if event.kind() == Kind::Secret => {}
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
    pub(super) fn last_good(&self, kind: Kind, name: &Arc<str>) -> GroupChange {
        match self.upstream.held(kind, name) {
            Some(held) => upsert(held.clone()),
            None if kind.has_wildcard() => removal_of(kind, name),
            None => upsert(Resource::absent(kind, name.clone())),
        }
    }

    /// Unsubscribes from `name` upstream if no client subscribes to it.
    pub(super) fn unsubscribe_unwanted(&mut self, kind: Kind, name: &Arc<str>) {
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

    /// Unsubscribes from endpoints, filters and routes that only an earlier Envoy asked for. An Envoy that has its
    /// listeners has subscribed to everything that they need.
    fn prune(&mut self) {
        for kind in [Kind::Endpoint, Kind::ExtensionConfig, Kind::Route] {
            let wanted = |name: &Arc<str>| self.clients.values().any(|client| client[kind].contains(name));
            let left: Vec<_> =
                self.upstream.subscriptions(kind).filter(|name| !wanted(name)).cloned().collect();
            left.iter().for_each(|name| self.unsubscribe_unwanted(kind, name));
            self.answer_upstream(kind);
        }
    }
}
