//! Answers of the client: ACKs and NACKs of responses.
//!
//! After a NACK the session finds out which resources the client rejects (R17). Rejected resources are not sent again until
//! they change (R13); the others are.

use super::error_text::{blamed_names, decode_refusals, sanitized};
use super::subscription::{InFlightResponse, SentItem, Subscription};
use super::target::{AbsenceSignal, ClientCopy, RejectedCopy};
use super::{Event, Rejection, Session, parse_nonce};
use crate::{Kind, Resource};
use std::sync::Arc;
use std::time::Instant;
use vmesh_proto::agent;
use vmesh_proto::google::rpc;

impl Session {
    /// Processes the answer that a request contains, if any. `nonce` is that of the answered response.
    pub(super) fn on_answer(&mut self, now: Instant, kind: Kind, nonce: &str, error: Option<rpc::Status>) {
        let subscription = &mut self.subscriptions[kind];
        let Some(nonce) = parse_nonce(nonce) else { return };
        let Some(at) = subscription.in_flight.iter().position(|response| response.nonce == nonce) else {
            return;
        };
        // A client answers responses in order, so it will never answer the older ones.
        let Some(response) = subscription.in_flight.drain(..=at).next_back() else { return };
        match error {
            None => self.on_ack(now, kind, response),
            Some(error) => match decode_refusals(&error) {
                Some(refusals) => self.on_nack_with_refusals(kind, response, &error.message, &refusals),
                None => self.on_nack(kind, response, &error.message),
            },
        }
    }

    /// Counts a NACK. Returns the client's error text in printable form.
    fn count_nack(&mut self, kind: Kind, error: &str) -> Arc<str> {
        let reason: Arc<str> = sanitized(error).into();
        let status = &mut self.status.kinds[kind];
        status.nacks += 1;
        status.last_error = Some(reason.clone());
        reason
    }

    /// Processes a NACK of an agent, which lists the refused resources with version and reason in the details
    /// of its error.
    fn on_nack_with_refusals(
        &mut self,
        kind: Kind,
        mut response: InFlightResponse,
        error: &str,
        refusals: &agent::Refusals,
    ) {
        let of_item = |item: &SentItem| {
            let mut of_name = refusals.refusals.iter().filter(|refusal| *refusal.name == *item.name);
            of_name.find(|refusal| match &item.sent {
                Some(sent) => !refusal.removal && *refusal.version == *sent.version(),
                None => refusal.removal,
            })
        };
        let blamed: Vec<bool> = response.items.iter().map(|item| of_item(item).is_some()).collect();
        if !blamed.contains(&true) {
            // The list names only resources that were not in this response, so the error text decides.
            return self.on_nack(kind, response, error);
        }
        self.count_nack(kind, error);
        let subscription = &mut self.subscriptions[kind];
        let known = subscription.rejected_since.into_iter().chain(response.behind_since);
        subscription.rejected_since = known.min();
        self.repeat_first_set(kind, &response);
        let items = std::mem::take(&mut response.items);
        for (item, blamed) in items.into_iter().zip(blamed) {
            if !blamed && refusals.others_taken {
                let SentItem { name, sent, .. } = item;
                self.status.kinds[kind].rejected.remove(&name);
                self.record(|| Event::Accepted { kind, name, resource: sent });
                continue;
            }
            let reason = of_item(&item).map_or_else(String::new, |refusal| sanitized(&refusal.reason));
            self.on_item_rejected(kind, item, blamed, &reason.into());
        }
    }

    /// Makes the session send a complete SotW set again after a NACK, until the client has ACKed a first one:
    /// before that, its resources from an earlier stream are unknown.
    fn repeat_first_set(&mut self, kind: Kind, refused: &InFlightResponse) {
        let complete = AbsenceSignal::of(self.protocol, kind) == AbsenceSignal::OmittedFromSet;
        self.subscriptions[kind].answer_due |=
            complete && !refused.items.is_empty() && self.status.kinds[kind].acks == 0;
    }

    fn on_ack(&mut self, now: Instant, kind: Kind, response: InFlightResponse) {
        let status = &mut self.status.kinds[kind];
        status.acks += 1;
        status.last_acked = Some(now);
        status.last_error = None;
        status.refused_set = None;
        for SentItem { name, sent, .. } in response.items {
            self.status.kinds[kind].rejected.remove(&name);
            self.record(|| Event::Accepted { kind, name, resource: sent });
        }
    }

    /// Processes a NACK that has only an error text. Clients may have applied parts of the response, and rarely
    /// reject every resource in it (R17). Resources that the text names are blamed and not sent again (R13);
    /// the others are sent once more without those. If the text names none, the response is sent in halves
    /// until the rejected resource is found.
    fn on_nack(&mut self, kind: Kind, response: InFlightResponse, error: &str) {
        let reason = self.count_nack(kind, error);
        if response.items.is_empty() && response.repeated.is_empty() {
            // An empty response has no resource to leave out.
            self.status.kinds[kind].refused_set = Some(reason);
            return;
        }
        let subscription = &mut self.subscriptions[kind];
        let mut blamed = blamed_names(kind, &reason, response.items.iter().map(|item| &*item.name));
        let mut repeated = response.repeated.clone();
        let alone = response.items.len() == 1 && repeated.is_empty();
        let named = blamed_names(kind, &reason, repeated.iter().map(|resource| &**resource.name()));
        let mut named = named.into_iter().map(|named| named && !blamed.contains(&true));
        repeated.retain(|_| named.next().unwrap_or(false));
        if !blamed.contains(&true) && repeated.is_empty() {
            if alone || subscription.isolations_left == 0 {
                blamed.fill(true);
            } else {
                subscription.isolate(response.items.iter().map(|item| item.name.clone()).collect());
            }
        }
        if blamed.contains(&true) {
            let known = subscription.rejected_since.into_iter().chain(response.behind_since);
            subscription.rejected_since = known.min();
        }
        self.repeat_first_set(kind, &response);
        for (item, blamed) in response.items.into_iter().zip(blamed) {
            self.on_item_rejected(kind, item, blamed, &reason);
        }
        for resource in repeated {
            self.on_repeated_item_rejected(kind, &resource, &reason);
        }
    }

    fn on_item_rejected(&mut self, kind: Kind, item: SentItem, blamed: bool, reason: &Arc<str>) {
        let subscription = &mut self.subscriptions[kind];
        let is_last = subscription.is_latest(&item);
        let SentItem { name, before, sent } = item;
        let good = before.resource().cloned();
        let copy = match (before, &sent) {
            (_, None) if blamed => ClientCopy::Unremovable(good),
            (_, Some(resource)) if blamed => ClientCopy::Rejected(Box::new(RejectedCopy {
                fingerprint: resource.fingerprint(),
                last_good: good,
            })),
            (rejected @ ClientCopy::Rejected(_), _) => rejected,
            _ => ClientCopy::Uncertain(good),
        };
        if is_last {
            let entry = subscription.entries.entry(name.clone()).or_default();
            // An empty assignment is the smallest possible content: after its rejection nothing else can be
            // sent.
            if !(blamed && matches!(entry.copy, ClientCopy::Empty(_))) {
                entry.copy = copy;
            }
            self.reconcile(kind, &name);
        } else if let Some(later) = subscription.later_item(&name, sent.as_ref()) {
            later.before = copy;
        }
        if !blamed {
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
    fn on_repeated_item_rejected(&mut self, kind: Kind, resource: &Arc<Resource>, reason: &Arc<str>) {
        let name = resource.name();
        let Subscription { entries, in_flight, .. } = &mut self.subscriptions[kind];
        let is_last = !in_flight.iter().flat_map(|later| &later.items).any(|item| item.name == *name);
        let Some(entry) = entries.get_mut(name).filter(|_| is_last) else { return };
        if entry.copy.resource().is_none_or(|copy| copy.fingerprint() != resource.fingerprint()) {
            return;
        }
        let rejected = match &entry.copy {
            ClientCopy::Rejected(rejected) => rejected.fingerprint,
            _ => {
                let rejection = Rejection { version: resource.version().into(), reason: reason.clone() };
                self.status.kinds[kind].rejected.insert(name.clone(), rejection);
                resource.fingerprint()
            }
        };
        entry.copy = ClientCopy::Rejected(Box::new(RejectedCopy { fingerprint: rejected, last_good: None }));
        self.reconcile(kind, name);
    }
}

impl Subscription {
    /// Splits the names of a rejected response in halves, each to be sent in a response of its own.
    fn isolate(&mut self, names: Vec<Arc<str>>) {
        self.isolations_left -= 1;
        let (left, right) = names.split_at(names.len() / 2);
        self.isolated.push_front(right.to_vec());
        self.isolated.push_front(left.to_vec());
    }

    /// Returns the unanswered item of `name` that replaced `sent`.
    fn later_item(&mut self, name: &str, sent: Option<&Arc<Resource>>) -> Option<&mut SentItem> {
        let mut items = self.in_flight.iter_mut().flat_map(|response| &mut response.items);
        items.find(|item| *item.name == *name && item.before.is(sent))
    }

    /// Reports whether `item` is the latest that was sent of its name.
    fn is_latest(&self, item: &SentItem) -> bool {
        let copy = self.entries.get(&item.name).map(|entry| &entry.copy);
        match &item.sent {
            Some(_) => copy.is_some_and(|copy| copy.is(item.sent.as_ref())),
            None => match copy {
                Some(copy) => matches!(copy, ClientCopy::Absent),
                None => self.wildcard,
            },
        }
    }
}
