use super::{Protocol, SessionError};
use crate::snapshot::Known;
use crate::{Kind, Resource, Snapshot};
use foldhash::fast::RandomState;
use hashbrown::HashMap;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What one client asked for of one kind, what it has, and what is due to it.
#[derive(Default)]
pub(super) struct Subscription {
    /// A request of this kind came on this stream.
    pub seen: bool,
    pub wildcard: bool,
    /// Some name was sent on this stream, so that an empty list no longer means "all" (R21).
    pub ever_named: bool,
    /// The client came with versions that it holds from an earlier stream.
    pub resumed: bool,
    /// The client waits for an answer, even if there is nothing to put into it.
    pub answer_due: bool,
    pub entries: HashMap<Arc<str>, Entry, RandomState>,
    pub named: usize,
    pub name_bytes: usize,
    /// Which of two marks the entries have that the last SotW request named.
    pub mark: bool,

    pending: BTreeMap<Arc<str>, Work>,
    /// How many of `pending` are [`Work::New`] and [`Work::Gone`].
    new: usize,
    gone: usize,
    /// The generation at which the first of `pending` came to be due.
    pub behind_since: Option<u64>,
    /// The same of what the client has refused.
    pub rejected_since: Option<u64>,

    pub in_flight: VecDeque<InFlight>,
    pub last_nonce: u64,
    /// Parts of a refused response, each to be sent alone so that the client shows which of them it means (R17).
    pub isolated: VecDeque<Vec<Arc<str>>>,
    pub isolations_left: u8,

    /// Since when something is held back that this kind refers to, or that refers to it.
    pub changes_held_since: Option<Instant>,
    pub removals_held_since: Option<Instant>,
    /// When that, or a wait for an answer, has lasted long enough.
    pub wake_at: Option<Instant>,
}

/// One name that the client asked for or was sent.
#[derive(Default)]
pub(super) struct Entry {
    pub held: Held,
    /// Asked for by name, and not only as part of "all".
    pub named: bool,
    /// To be sent even if the client has it (R24, R25, R27, R46).
    pub asked: bool,
    pub mark: bool,
}

/// What the client has of a name, once it has ACKed what is in flight.
#[derive(Clone, Default)]
pub(super) enum Held {
    #[default]
    Nothing,
    /// Some version from an earlier stream that is not the present one.
    Other,
    /// It was told that there is none.
    Absent,
    /// An assignment without endpoints, made for it alone.
    Empty(Arc<Resource>),
    Resource(Arc<Resource>),
    /// It refused a response, and perhaps not for this name; it may have the last good resource.
    Unsure(Option<Arc<Resource>>),
    /// It refused the resource with this fingerprint, and has the last good one if any.
    Rejected(Box<(u64, Option<Arc<Resource>>)>),
    /// It refused that the name be removed, and has the last good resource, if any was known.
    Unremovable(Option<Arc<Resource>>),
}

/// What the client should have of a name.
#[derive(Clone, Copy)]
pub(super) enum Target<'a> {
    Resource(&'a Arc<Resource>),
    /// An assignment without endpoints: the cluster exists, and Envoy waits for an answer (R30, R31).
    Empty,
    /// The same of a cluster that is gone and that the client still has: it keeps the endpoints until then.
    Leaving,
    Absent,
    /// The store cannot tell yet.
    Unknown,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Work {
    /// The client gets to know it.
    New,
    /// The client knows it or asked for it.
    Changed,
    /// The client has it, and is to have it no more.
    Gone,
}

pub(super) struct InFlight {
    pub nonce: u64,
    pub since: Instant,
    /// Whether it has [`Work::New`].
    pub adds: bool,
    /// False after the client asked for more meanwhile: it does not wait for its own answer then (R20).
    pub blocking: bool,
    pub behind_since: Option<u64>,
    pub items: Vec<Item>,
    /// What is in it though the client should have it.
    pub repeated: Vec<Arc<Resource>>,
}

pub(super) struct Item {
    pub name: Arc<str>,
    /// What the client had before.
    pub before: Held,
    /// `None`: it was removed.
    pub sent: Option<Arc<Resource>>,
}

/// Envoy withholds the ACK of clusters until they are warm, which takes up to 15 s. A client that is still silent
/// after this long gets what is new nevertheless (R20).
pub(super) const ANSWER_CAP: Duration = Duration::from_secs(30);

/// More than any node needs, and far less than what would hurt the server.
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

/// How "there is none" is told.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Absence {
    Removed,
    /// The response is the complete set, and the name is not in it.
    Omitted,
    /// SotW has no words for it, but Envoy must have an answer (R31).
    Empty,
    /// Not at all: a client keeps a secret while a live configuration refers to it (R30).
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

/// What is to be done about a name, if anything.
fn work(entry: Option<&Entry>, wildcard: bool, absence: Absence, target: Target<'_>) -> Option<Work> {
    let unknown = Entry::default();
    let Entry { held, named, asked, .. } = entry.unwrap_or(&unknown);
    if !named && !wildcard {
        return None;
    }
    let again = asked.then_some(Work::Changed);
    match (target, held) {
        (Target::Unknown, _) => None,
        // What it refused is not sent again; who asks gets what was good before (R13).
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
        // A removal that it refused is not sent again either, until there was something else under that name.
        (Target::Absent, Held::Absent | Held::Unremovable(_)) => again,
        (Target::Absent, Held::Empty(_)) if absence == Absence::Empty => again,
        (Target::Absent, _) => again.or(Some(Work::Gone)),
    }
}

impl Subscription {
    /// Notes whether `name` is due, as of `generation`.
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

    /// `name` is no longer due.
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

    /// Whether the client gets to know something that it has not ACKed.
    pub(super) fn is_adding(&self, now: Instant) -> bool {
        self.new > 0 || self.answers_awaited(now).any(|response| response.adds)
    }

    /// Whether the client has ACKed everything.
    pub(super) fn is_quiet(&self, now: Instant) -> bool {
        self.pending.is_empty() && self.answers_awaited(now).next().is_none()
    }

    fn answers_awaited(&self, now: Instant) -> impl Iterator<Item = &InFlight> {
        self.in_flight.iter().filter(move |response| now < response.since + ANSWER_CAP)
    }

    /// Until when nothing may be sent, because the client has not answered.
    pub(super) fn blocked_until(&self) -> Option<Instant> {
        self.in_flight.back().filter(|response| response.blocking).map(|response| response.since + ANSWER_CAP)
    }

    /// The client asks for `name`, by name.
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

    /// The client asks for `name` no more. It may still get it as part of "all". False: it never asked (R36).
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

    /// Forgets what the client has of `name`.
    pub(super) fn forget(&mut self, name: &str) {
        self.entries.remove(name);
        self.settle(name);
    }
}
