//! The upstream end of a relay, towards the control plane.

use super::state::{UNANSWERED_MAX, UnansweredResponse, limited_refusals, refusal};
use super::{GroupChange, Relay, removal_of, upsert};
use crate::subscriber::Update;
use crate::{Kind, Resource};
use std::sync::Arc;
use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};

/// The reason for rejecting resources of a kind that the relay did not ask for.
const NOT_SUBSCRIBED: &str = "the client has no subscription to this type";

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

    /// Puts a response into the store and answers it, as far as Envoy has answered for its resources.
    pub fn on_response(&mut self, response: DeltaDiscoveryResponse) {
        let Some(update) = self.upstream.on_response(response) else { return };
        match update.ticket.kind() {
            Kind::Local => return self.on_local(update),
            Kind::Secret => return self.upstream.reject(update.ticket, NOT_SUBSCRIBED),
            Kind::Cluster | Kind::Endpoint | Kind::ExtensionConfig | Kind::Listener | Kind::Route => {}
        }
        let Update { ticket, resources, removed } = update;
        let kind = ticket.kind();
        let mut entry = UnansweredResponse::new(ticket);
        let mut changes = self.add_resources(kind, resources, &mut entry);
        changes.extend(self.remove_resources(kind, removed, &mut entry));
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

    /// Returns the changes that add `resources` to the store. `entry` waits for Envoy's answers, and refuses resources that
    /// Envoy has already rejected.
    fn add_resources(
        &mut self,
        kind: Kind,
        resources: Vec<Arc<Resource>>,
        entry: &mut UnansweredResponse,
    ) -> Vec<GroupChange> {
        let (mut changes, mut rejected_before, mut others) = (Vec::new(), Vec::new(), Vec::new());
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
            // One error text of Envoy may blame several resources. The text is not repeated once one of those resources has
            // changed.
            let is_of_others = others.iter().any(|other| reason.contains(&**other));
            entry.add_reason(match is_of_others {
                true => format!("{name}: rejected before, and unchanged since").into(),
                false => reason,
            });
        }
        changes
    }

    /// Returns the changes that remove names from the store. `entry` waits for Envoy's answers, and refuses removals that
    /// Envoy has already rejected.
    fn remove_resources(
        &mut self,
        kind: Kind,
        removed: Vec<Arc<str>>,
        entry: &mut UnansweredResponse,
    ) -> Vec<GroupChange> {
        let mut changes = Vec::new();
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
            if served {
                entry.waiting.insert(name, None);
            } else {
                self.accept_removal(kind, &name);
            }
        }
        changes
    }

    /// Answers a response with resources of [`Kind::Local`]. An invalid resource is rejected, and the held one
    /// of that name stays.
    fn on_local(&mut self, Update { ticket, resources, removed }: Update) {
        let Some(check) = self.check_local else {
            return self.upstream.reject(ticket, NOT_SUBSCRIBED);
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
    pub(super) fn answer_upstream(&mut self, kind: Kind) {
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

    pub(super) fn accept_removal(&mut self, kind: Kind, name: &Arc<str>) {
        self.kinds[kind].disputed.remove(name);
        match kind.has_wildcard() {
            true => self.upstream.forget(kind, name),
            false => self.upstream.hold(Resource::absent(kind, name.clone())),
        }
        self.accepted_revision += 1;
    }
}
