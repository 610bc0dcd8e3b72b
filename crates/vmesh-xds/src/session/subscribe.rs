//! Requests: subscriptions, and the versions that a client kept from an earlier stream.

use super::subscription::{NAMES_MAX, NameEntry};
use super::target::{AbsenceSignal, ClientCopy, Target, without_endpoints};
use super::{Event, Session, SessionError, parse_nonce};
use crate::{Kind, Snapshot};
use std::sync::Arc;
use std::time::Instant;
use vmesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};

impl Session {
    pub(super) fn on_delta_request(
        &mut self,
        now: Instant,
        kind: Kind,
        request: DeltaDiscoveryRequest,
    ) -> Result<(), SessionError> {
        self.on_answer(now, kind, &request.response_nonce, request.error_detail);
        let first = !std::mem::replace(&mut self.subscriptions[kind].has_requests, true);
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
            self.reconcile(kind, &name);
        }
        if first && self.subscriptions[kind].wildcard {
            self.reconcile_all(kind);
        }
        Ok(())
    }

    pub(super) fn on_sotw_request(
        &mut self,
        now: Instant,
        kind: Kind,
        request: DiscoveryRequest,
    ) -> Result<(), SessionError> {
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
        let first = !std::mem::replace(&mut subscription.has_requests, true);
        let complete = AbsenceSignal::of(self.protocol, kind) == AbsenceSignal::OmittedFromSet;
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
            let unmarked = |(_, entry): &(&Arc<str>, &NameEntry)| entry.named && entry.mark != mark;
            let entries = &self.subscriptions[kind].entries;
            let dropped: Vec<_> = entries.iter().filter(unmarked).map(|(name, _)| name.clone()).collect();
            dropped.iter().for_each(|name| self.unsubscribe(kind, name));
        }
        for name in added {
            let name = self.subscribe(kind, name)?;
            if let Some(entry) = self.subscriptions[kind].entries.get_mut(&name) {
                entry.mark = mark;
            }
            self.reconcile(kind, &name);
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
                .or_insert_with(|| NameEntry { copy: ClientCopy::Outdated, ..NameEntry::default() });
        }
        self.record(|| Event::Subscribed { kind, name: "*".into() });
        self.reconcile_all(kind);
    }

    /// Subscribes to one name. The caller then calls `reconcile` for the name that this returns.
    fn subscribe(&mut self, kind: Kind, name: String) -> Result<Arc<str>, SessionError> {
        // Sharing the name with the store costs this stream no memory.
        let stored = self.snapshot.as_ref().and_then(|snapshot| snapshot.get(kind, &name));
        let name = stored.map_or_else(|| Arc::from(name), |resource| resource.name().clone());
        let subscription = &mut self.subscriptions[kind];
        let entry = subscription.subscribe(kind, name.clone())?;
        // A client that subscribes again has lost its copy (R25, R26).
        entry.must_send = !matches!(entry.copy, ClientCopy::Nothing);
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
                due.iter().for_each(|name| self.reconcile(kind, name));
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
                entry.must_send = true;
                self.reconcile(kind, &Arc::from(name));
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
            if subscription.entries.len() >= NAMES_MAX {
                return Err(SessionError::TooManyNames { kind, limit: NAMES_MAX });
            }
            let (name, copy) = match &self.snapshot {
                Some(snapshot) => resumed_copy(snapshot, kind, &name, &version),
                None => {
                    let name: Arc<str> = name.into();
                    self.kept_versions.push((kind, name.clone(), version));
                    (name, ClientCopy::Outdated)
                }
            };
            self.record_accepted(kind, &name, &copy);
            let subscription = &mut self.subscriptions[kind];
            subscription.resumed = true;
            subscription.answer_due = false;
            subscription.entries.entry(name).or_default().copy = copy;
        }
        Ok(())
    }

    /// Compares the kept versions with the first snapshot, for a client that sent them before there was a
    /// snapshot.
    pub(super) fn compare_kept_versions(&mut self) {
        let Some(snapshot) = self.snapshot.clone() else { return };
        for (kind, name, version) in std::mem::take(&mut self.kept_versions) {
            let (_, copy) = resumed_copy(&snapshot, kind, &name, &version);
            let Some(entry) = self.subscriptions[kind].entries.get_mut(&name) else { continue };
            // A client that subscribed to the name again meanwhile has lost its copy.
            if matches!(entry.copy, ClientCopy::Outdated) && !entry.must_send {
                entry.copy = copy.clone();
                self.record_accepted(kind, &name, &copy);
            }
        }
    }

    fn record_accepted(&mut self, kind: Kind, name: &Arc<str>, copy: &ClientCopy) {
        if let ClientCopy::Resource(resource) = copy {
            let resource = Some(resource.clone());
            self.record(|| Event::Accepted { kind, name: name.clone(), resource });
        }
    }
}

/// Returns the copy of a client that kept `version` of `name` from an earlier stream: the current resource if
/// the version is current.
fn resumed_copy(snapshot: &Snapshot, kind: Kind, name: &str, version: &str) -> (Arc<str>, ClientCopy) {
    match Target::of(snapshot, kind, name) {
        Target::Resource(present) if *present.version() == *version => {
            (present.name().clone(), ClientCopy::Resource(present.clone()))
        }
        Target::Empty => {
            let empty = without_endpoints(name);
            let copy =
                if *empty.version() == *version { ClientCopy::Empty(empty) } else { ClientCopy::Outdated };
            (name.into(), copy)
        }
        _ => (name.into(), ClientCopy::Outdated),
    }
}
