use super::{Protocol, SessionError};
use crate::snapshot::Known;
use crate::{Kind, Resource, Snapshot};
use foldhash::fast::RandomState;
use hashbrown::HashMap;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// One client's subscription to one kind: its names, the client's copy of each, and the names that are pending.
#[derive(Default)]
pub(super) struct Subscription {
    /// Whether the stream has carried a request of this kind.
    pub seen: bool,
    pub wildcard: bool,
    /// Whether a request of this stream named a resource; from then on an empty list no longer means "all"
    /// (R21).
    pub ever_named: bool,
    /// Whether the client listed versions that it kept from an earlier stream.
    pub resumed: bool,
    /// Whether the client waits for a response, even an empty one.
    pub answer_due: bool,
    pub entries: HashMap<Arc<str>, Entry, RandomState>,
    pub named: usize,
    pub name_bytes: usize,
    /// The mark of the entries that the last SotW request named. It alternates between two values.
    pub mark: bool,

    pending: BTreeMap<Arc<str>, Work>,
    /// The numbers of [`PendingChange::Add`] and [`PendingChange::Remove`] in `pending`.
    new: usize,
    gone: usize,
    /// The generation at which the oldest name in `pending` became pending.
    pub behind_since: Option<u64>,
    /// The generation at which the oldest rejected resource became pending.
    pub rejected_since: Option<u64>,

    pub in_flight: VecDeque<InFlight>,
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
pub(super) struct Entry {
    pub held: Held,
    /// Whether the client subscribed to this name explicitly; otherwise only the wildcard covers it.
    pub named: bool,
    /// Whether the resource is sent even if the client has it (R24, R25, R27, R46).
    pub asked: bool,
    pub mark: bool,
}

/// The client's copy of a resource, assuming that it ACKs the responses in flight.
#[derive(Clone, Default)]
pub(super) enum Held {
    #[default]
    Nothing,
    /// Some version from an earlier stream, other than the current one.
    Other,
    /// The client was told that the resource does not exist.
    Absent,
    /// An assignment without endpoints, made for this client.
    Empty(Arc<Resource>),
    Resource(Arc<Resource>),
    /// The client rejected a response that contained the resource, perhaps because of another one. The client
    /// may still have the last good resource.
    Unsure(Option<Arc<Resource>>),
    /// The client rejected the resource with this fingerprint and has the last good one, if any.
    Rejected(Box<(u64, Option<Arc<Resource>>)>),
    /// The client rejected the removal and still has the last good resource, if the session knows it.
    Unremovable(Option<Arc<Resource>>),
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

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Work {
    /// The resource is missing at the client.
    New,
    /// The client has or asked for the resource and gets its current version.
    Changed,
    /// The client has the resource and must drop it.
    Gone,
}

pub(super) struct InFlight {
    pub nonce: u64,
    pub since: Instant,
    /// Whether the response contains a [`PendingChange::Add`].
    pub adds: bool,
    /// Whether the next response of this kind waits for the answer. `false` once the client has subscribed to
    /// more names (R20).
    pub blocking: bool,
    pub behind_since: Option<u64>,
    pub items: Vec<Item>,
    /// Resources that a complete SotW set repeats although the client should have them.
    pub repeated: Vec<Arc<Resource>>,
}

pub(super) struct Item {
    pub name: Arc<str>,
    /// The client's copy before this response.
    pub before: Held,
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

impl<'a> Target<'a> {
    pub(super) fn of(snapshot: &'a Snapshot, kind: Kind, name: &str) -> Target<'a> {
        match snapshot.find(kind, name) {
            Known::Present(resource) => Target::Resource(resource),
            Known::Unknown => Target::Unknown,
            Known::Absent => match kind {
                Kind::Endpoint if snapshot.get(Kind::Cluster, name).is_some() => Target::Empty,
                _ => Target::Absent,
            },
        }
    }
}

/// How the absence of a resource is announced to a client.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Absence {
    Removed,
    /// The response is the complete set, and the name is not in it.
    Omitted,
    /// SotW has no field for removed names, but Envoy needs an answer: an assignment without endpoints (R31).
    Empty,
    /// The absence is not announced: a client keeps a secret while a live configuration refers to it (R30).
    Untold,
}

impl Absence {
    pub(super) fn of(protocol: Protocol, kind: Kind) -> Absence {
        match (protocol, kind) {
            (_, Kind::Secret) => Absence::Untold,
            (Protocol::Delta, _) => Absence::Removed,
            (Protocol::Sotw, Kind::Cluster | Kind::Listener | Kind::Local) => Absence::Omitted,
            (Protocol::Sotw, Kind::Endpoint) => Absence::Empty,
            (Protocol::Sotw, Kind::Route) => Absence::Untold,
        }
    }
}

/// Compares the target of a name with the client's copy and returns the change to send, if any.
fn work(entry: Option<&Entry>, wildcard: bool, absence: Absence, target: Target<'_>) -> Option<Work> {
    let unknown = Entry::default();
    let Entry { held, named, asked, .. } = entry.unwrap_or(&unknown);
    if !named && !wildcard {
        return None;
    }
    let again = asked.then_some(Work::Changed);
    match (target, held) {
        (Target::Unknown, _) => None,
        // A rejected resource is not sent again. A client that subscribes again gets the last good one (R13).
        (Target::Resource(new), Held::Rejected(rejected)) if rejected.0 == new.fingerprint() => {
            again.filter(|_| rejected.1.is_some() || new.kind() == Kind::Endpoint)
        }
        (
            Target::Resource(_),
            Held::Nothing | Held::Absent | Held::Unsure(None) | Held::Unremovable(None),
        ) => Some(Work::New),
        (Target::Resource(_), Held::Rejected(rejected)) if rejected.1.is_none() => Some(Work::New),
        (Target::Resource(new), Held::Resource(old)) if new.fingerprint() == old.fingerprint() => again,
        (Target::Resource(_), _) => Some(Work::Changed),

        (Target::Empty, Held::Nothing | Held::Absent) => Some(Work::New),
        (Target::Empty, Held::Empty(_)) => again,
        (Target::Empty, _) => Some(Work::Changed),

        (Target::Leaving, Held::Nothing | Held::Absent) => Some(Work::New),
        (Target::Leaving, _) => again,

        (Target::Absent, _) if absence == Absence::Untold => None,
        (Target::Absent, Held::Nothing) => (*named || *asked).then_some(Work::Changed),
        // A rejected removal is not repeated before the name had another resource.
        (Target::Absent, Held::Absent | Held::Unremovable(_)) => again,
        (Target::Absent, Held::Empty(_)) if absence == Absence::Empty => again,
        (Target::Absent, _) => again.or(Some(Work::Gone)),
    }
}

impl Subscription {
    /// Updates `pending` after the target or the copy of `name` changed. `generation` is the store's.
    pub(super) fn weigh(&mut self, name: &Arc<str>, absence: Absence, target: Target<'_>, generation: u64) {
        match work(self.entries.get(name), self.wildcard, absence, target) {
            Some(work) => {
                let before = self.pending.insert(name.clone(), work);
                self.count(before, Some(work));
                self.behind_since.get_or_insert(generation);
            }
            None => self.settle(name),
        }
    }

    /// Removes `name` from `pending`.
    pub(super) fn settle(&mut self, name: &str) {
        let before = self.pending.remove(name);
        self.count(before, None);
        if self.pending.is_empty() {
            self.behind_since = None;
        }
    }

    fn count(&mut self, before: Option<Work>, after: Option<Work>) {
        self.new -= usize::from(before == Some(Work::New));
        self.gone -= usize::from(before == Some(Work::Gone));
        self.new += usize::from(after == Some(Work::New));
        self.gone += usize::from(after == Some(Work::Gone));
    }

    pub(super) fn pending(&self) -> &BTreeMap<Arc<str>, Work> {
        &self.pending
    }

    pub(super) fn has_changes(&self) -> bool {
        self.pending.len() > self.gone
    }

    pub(super) fn has_removals(&self) -> bool {
        self.gone > 0
    }

    pub(super) fn has_new(&self) -> bool {
        self.new > 0
    }

    /// Reports whether some resource new to the client is pending or not ACKed.
    pub(super) fn is_adding(&self, now: Instant) -> bool {
        self.new > 0 || self.answers_awaited(now).any(|response| response.adds)
    }

    /// Reports whether the client has ACKed everything.
    pub(super) fn is_quiet(&self, now: Instant) -> bool {
        self.pending.is_empty() && self.answers_awaited(now).next().is_none()
    }

    fn answers_awaited(&self, now: Instant) -> impl Iterator<Item = &InFlight> {
        self.in_flight.iter().filter(move |response| now < response.since + ANSWER_CAP)
    }

    /// Returns the time until which the unanswered response blocks this kind.
    pub(super) fn blocked_until(&self) -> Option<Instant> {
        self.in_flight.back().filter(|response| response.blocking).map(|response| response.since + ANSWER_CAP)
    }

    /// Adds a subscription by name.
    pub(super) fn subscribe(&mut self, kind: Kind, name: Arc<str>) -> Result<&mut Entry, SessionError> {
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
        self.settle(name);
    }
}
