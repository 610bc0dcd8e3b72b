//! The state of a relay per kind: responses that are not answered yet, and what Envoy rejected.

use super::ClientId;
use crate::Resource;
use crate::subscriber::Ticket;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmesh_proto::agent::{Refusal, Refusals};

/// The state of one kind: responses that are not answered yet, and what Envoy rejected.
#[derive(Default)]
pub(super) struct KindState {
    pub unanswered: VecDeque<UnansweredResponse>,
    /// The resources that Envoy rejected in the version that the control plane sends now.
    pub rejected: BTreeMap<Arc<str>, RejectedResource>,
    /// Names whose removal an Envoy rejected, with the reason. That Envoy keeps its resource until it
    /// disconnects.
    pub unremovable: BTreeMap<Arc<str>, (ClientId, Arc<str>)>,
    /// The fingerprints of rejected resources with the reasons, including names whose resource has changed
    /// since. Envoy's session does not send a rejected resource again, so if the control plane goes back to
    /// one, the relay must reject it without waiting for Envoy.
    pub known_bad: BTreeMap<Arc<str>, (u64, Arc<str>)>,
    /// Names whose accepted resource was taken by an earlier Envoy and rejected by a later one.
    pub disputed: BTreeSet<Arc<str>>,
}

/// A resource that Envoy rejected, with its reason.
pub(super) struct RejectedResource {
    pub resource: Arc<Resource>,
    pub reason: Arc<str>,
    /// Set if the host was the cause and not the resource: the relay then sends the resource again.
    pub retry: Option<Retry>,
}

/// The next attempt to send a rejected resource again.
pub(super) struct Retry {
    pub pause: Duration,
    /// The time at which to send the resource again. `None` until the first [`Relay::on_timeout`] after the rejection, and
    /// while a retry is in flight.
    pub at: Option<Instant>,
    pub is_tried: bool,
}

/// The first pause before the relay retries a resource that Envoy rejected because of the host. The pause
/// doubles with each retry.
const RETRY_FIRST: Duration = Duration::from_secs(2);
/// The longest pause: an address that appears late is served within a minute, and Envoy logs one line a minute.
const RETRY_LAST: Duration = Duration::from_secs(60);
/// The limit of one reason in a NACK, in bytes.
const REFUSAL_REASON_MAX: usize = 1024;
/// The limit of refused resources that one NACK lists. The control plane sends the others again and learns
/// about them then.
const REFUSALS_MAX: usize = 256;

/// Reports whether Envoy's error text blames the host (an address that is in use or missing) and not the
/// resource: Envoy may take the same resource later.
fn blames_host(reason: &str) -> bool {
    let reason = reason.to_ascii_lowercase();
    const HOST_ERRORS: [&str; 6] = [
        "address already in use",
        "address in use",
        "cannot assign requested address",
        "cannot bind",
        "permission denied",
        "too many open files",
    ];
    HOST_ERRORS.iter().any(|error| reason.contains(error))
}

/// A response of the control plane that the relay has not answered.
pub(super) struct UnansweredResponse {
    /// `None` after the upstream stream has ended.
    pub ticket: Option<Ticket>,
    /// The names for which Envoy has not answered, with the fingerprint of the resource; `None` stands for a
    /// removal.
    pub waiting: BTreeMap<Arc<str>, Option<u64>>,
    pub reasons: Vec<Arc<str>>,
    pub refusals: Vec<Refusal>,
    /// The generation of the store that first contained the response.
    pub generation: u64,
}

/// The limit of unanswered responses per kind. A server sends the next response of a kind after 30 s without an
/// answer, so an older one is never answered.
pub(super) const UNANSWERED_MAX: usize = 4;

impl KindState {
    /// Records that Envoy rejected a resource. Returns the resource as the control plane sent it, which differs
    /// from `resource` if that was a retry.
    pub(super) fn record_rejection(&mut self, resource: Arc<Resource>, reason: Arc<str>) -> Arc<Resource> {
        let before =
            self.rejected.remove(resource.name()).filter(|before| before.resource.is_same_content(&resource));
        let (resource, retry) = match before {
            Some(before) => (before.resource, before.retry),
            None => (resource, None),
        };
        let retry = blames_host(&reason).then(|| match retry {
            Some(retry) if retry.is_tried => {
                Retry { pause: (retry.pause * 2).min(RETRY_LAST), at: None, is_tried: false }
            }
            Some(retry) => retry,
            None => Retry { pause: RETRY_FIRST, at: None, is_tried: false },
        });
        self.rejected
            .insert(resource.name().clone(), RejectedResource { resource: resource.clone(), reason, retry });
        resource
    }

    /// Stops waiting for an answer about `name`: a newer response replaces its resource.
    pub(super) fn supersede(&mut self, name: &str) {
        self.unanswered.iter_mut().for_each(|entry| _ = entry.waiting.remove(name));
    }

    /// Stops waiting for `name` if `matches` accepts the awaited fingerprint, and returns that fingerprint.
    pub(super) fn stop_waiting_for(
        &mut self,
        name: &str,
        matches: impl Fn(Option<u64>) -> bool,
    ) -> Option<Option<u64>> {
        let mut taken = None;
        for entry in &mut self.unanswered {
            if entry.waiting.get(name).is_some_and(|waiting| matches(*waiting)) {
                taken = entry.waiting.remove(name);
            }
        }
        taken
    }
}

impl UnansweredResponse {
    pub(super) fn new(ticket: Ticket) -> UnansweredResponse {
        UnansweredResponse {
            ticket: Some(ticket),
            waiting: BTreeMap::new(),
            reasons: Vec::new(),
            refusals: Vec::new(),
            generation: 0,
        }
    }

    pub(super) fn add_refusal(&mut self, name: &str, version: &str, reason: &str, removal: bool) {
        self.refusals.push(refusal(name, version, reason, removal));
    }

    pub(super) fn add_reason(&mut self, reason: Arc<str>) {
        if !self.reasons.contains(&reason) {
            self.reasons.push(reason);
        }
    }
}

pub(super) fn refusal(name: &str, version: &str, reason: &str, removal: bool) -> Refusal {
    let reason = reason.get(..reason.floor_char_boundary(REFUSAL_REASON_MAX)).unwrap_or(reason);
    Refusal { name: name.to_owned(), version: version.to_owned(), reason: reason.to_owned(), removal }
}

pub(super) fn limited_refusals(mut refusals: Vec<Refusal>) -> Refusals {
    let others_taken = refusals.len() <= REFUSALS_MAX;
    refusals.truncate(REFUSALS_MAX);
    Refusals { refusals, others_taken }
}
