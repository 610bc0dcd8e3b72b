//! The subscriptions of one client: names, the client's copies of their resources, and pending changes.

use super::SessionError;
use super::target::{AbsenceSignal, ClientCopy, PendingChange, Target, pending_change};
use crate::{Kind, Resource};
use foldhash::fast::RandomState;
use hashbrown::HashMap;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One client's subscription to one kind: its names, the client's copy of each, and the names that are pending.
#[derive(Default)]
pub(super) struct Subscription {
    /// True after the first request of this kind on the stream.
    pub has_requests: bool,
    pub wildcard: bool,
    /// True after the first request with a name; from then on an empty list no longer means "all" (R21).
    pub ever_named: bool,
    /// True if the client listed versions that it kept from an earlier stream.
    pub resumed: bool,
    /// True while the client waits for a response, even an empty one.
    pub answer_due: bool,
    pub entries: HashMap<Arc<str>, NameEntry, RandomState>,
    pub named: usize,
    pub name_bytes: usize,
    /// The mark of the entries that the last SotW request named. It alternates between two values.
    pub mark: bool,

    pending: BTreeMap<Arc<str>, PendingChange>,
    /// The numbers of [`PendingChange::Add`] and [`PendingChange::Remove`] in `pending`.
    additions: usize,
    removals: usize,
    /// The generation at which the oldest name in `pending` became pending.
    pub behind_since: Option<u64>,
    /// The generation at which the oldest rejected resource became pending.
    pub rejected_since: Option<u64>,

    pub in_flight: VecDeque<InFlightResponse>,
    pub last_nonce: u64,
    /// Parts of a rejected response. Each is sent in a response of its own, to find the resource that the
    /// client rejects (R17).
    pub isolated: VecDeque<Vec<Arc<str>>>,
    pub isolations_left: u8,

    /// The time since when changes wait for new clusters, and removals for the resources that refer to them.
    pub changes_held_since: Option<Instant>,
    pub removals_held_since: Option<Instant>,
    /// The time at which the session must poll again, because such a wait or the wait for an answer ends.
    pub wake_at: Option<Instant>,
}

/// A name that the client subscribed to or was sent.
#[derive(Default)]
pub(super) struct NameEntry {
    pub copy: ClientCopy,
    /// True if the client subscribed to this name explicitly; otherwise only the wildcard covers it.
    pub named: bool,
    /// True if the resource must be sent even to a client that has it (R24, R25, R27, R46).
    pub must_send: bool,
    pub mark: bool,
}

/// A response that the client has not answered.
pub(super) struct InFlightResponse {
    pub nonce: u64,
    pub since: Instant,
    /// True if the response contains a [`PendingChange::Add`].
    pub adds: bool,
    /// True while the next response of this kind waits for the answer; false once the client has subscribed to
    /// more names (R20).
    pub blocking: bool,
    pub behind_since: Option<u64>,
    pub items: Vec<SentItem>,
    /// Resources that a complete SotW set repeats although the client should have them.
    pub repeated: Vec<Arc<Resource>>,
}

/// A resource or a removal in a response.
pub(super) struct SentItem {
    pub name: Arc<str>,
    /// The client's copy before this response.
    pub before: ClientCopy,
    /// The resource that was sent, or `None` for a removal.
    pub sent: Option<Arc<Resource>>,
}

/// How long a response blocks the next one of its kind. Envoy withholds the ACK of clusters until they are
/// warm, which takes up to 15 s; a client that is silent for longer than this gets new resources nevertheless
/// (R20).
pub(super) const ANSWER_CAP: Duration = Duration::from_secs(30);

/// The limit of names per kind: more than any node needs, and too few to hurt the server.
pub(super) const NAMES_MAX: usize = 100_000;
const NAME_BYTES_MAX: usize = 16 << 20;

impl Subscription {
    /// Updates `pending` after the target or the copy of `name` changed. `generation` is the store's.
    pub(super) fn reconcile(
        &mut self,
        name: &Arc<str>,
        absence: AbsenceSignal,
        target: Target<'_>,
        generation: u64,
    ) {
        match pending_change(self.entries.get(name), self.wildcard, absence, target) {
            Some(change) => {
                let before = self.pending.insert(name.clone(), change);
                self.count(before, Some(change));
                self.behind_since.get_or_insert(generation);
            }
            None => self.clear_pending(name),
        }
    }

    /// Removes `name` from `pending`.
    pub(super) fn clear_pending(&mut self, name: &str) {
        let before = self.pending.remove(name);
        self.count(before, None);
        if self.pending.is_empty() {
            self.behind_since = None;
        }
    }

    fn count(&mut self, before: Option<PendingChange>, after: Option<PendingChange>) {
        self.additions -= usize::from(before == Some(PendingChange::Add));
        self.removals -= usize::from(before == Some(PendingChange::Remove));
        self.additions += usize::from(after == Some(PendingChange::Add));
        self.removals += usize::from(after == Some(PendingChange::Remove));
    }

    pub(super) fn pending(&self) -> &BTreeMap<Arc<str>, PendingChange> {
        &self.pending
    }

    pub(super) fn has_changes(&self) -> bool {
        self.pending.len() > self.removals
    }

    pub(super) fn has_removals(&self) -> bool {
        self.removals > 0
    }

    pub(super) fn has_new(&self) -> bool {
        self.additions > 0
    }

    /// Reports whether some resource new to the client is pending or not ACKed.
    pub(super) fn is_adding(&self, now: Instant) -> bool {
        self.additions > 0 || self.answers_awaited(now).any(|response| response.adds)
    }

    /// Reports whether the client has ACKed everything.
    pub(super) fn is_quiet(&self, now: Instant) -> bool {
        self.pending.is_empty() && self.answers_awaited(now).next().is_none()
    }

    fn answers_awaited(&self, now: Instant) -> impl Iterator<Item = &InFlightResponse> {
        self.in_flight.iter().filter(move |response| now < response.since + ANSWER_CAP)
    }

    /// Returns the time until which the unanswered response blocks this kind.
    pub(super) fn blocked_until(&self) -> Option<Instant> {
        self.in_flight.back().filter(|response| response.blocking).map(|response| response.since + ANSWER_CAP)
    }

    /// Adds a subscription by name.
    pub(super) fn subscribe(&mut self, kind: Kind, name: Arc<str>) -> Result<&mut NameEntry, SessionError> {
        let len = name.len();
        let entry = self.entries.entry(name).or_default();
        if !entry.named {
            if self.named >= NAMES_MAX {
                return Err(SessionError::TooManyNames { kind, limit: NAMES_MAX });
            }
            if self.name_bytes + len > NAME_BYTES_MAX {
                return Err(SessionError::NamesTooLong { kind, limit: NAME_BYTES_MAX });
            }
            entry.named = true;
            self.named += 1;
            self.name_bytes += len;
        }
        Ok(entry)
    }

    /// Ends a subscription by name; the wildcard may still cover the name. Returns `false` if there was none
    /// (R36).
    pub(super) fn unsubscribe(&mut self, name: &str) -> bool {
        let Some(entry) = self.entries.get_mut(name).filter(|entry| entry.named) else { return false };
        entry.named = false;
        self.named -= 1;
        self.name_bytes -= name.len();
        if !self.wildcard {
            self.forget(name);
        }
        true
    }

    /// Drops the client's copy of `name` and the pending change.
    pub(super) fn forget(&mut self, name: &str) {
        self.entries.remove(name);
        self.clear_pending(name);
    }
}
