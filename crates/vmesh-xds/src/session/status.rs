use crate::PerKind;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// What a server knows of its client: what it has, what it refused, and since when.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SessionStatus {
    pub state: State,
    /// The last generation of the store of which the client has ACKed all that concerns it. Zero before it has
    /// asked for anything.
    pub generation_acked: u64,
    pub kinds: PerKind<KindStatus>,
    /// Requests for types that are not served (R04).
    pub unknown_types: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// The client has ACKed all that it asked for.
    Synced,
    /// Something is still to be sent or to be ACKed.
    #[default]
    Pushing,
    /// The client refused something, in its own words. It goes on with the last version that it took.
    Rejected { reason: Arc<str> },
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct KindStatus {
    /// Whether the client asked for this kind: a kind that it never asked for is not stale (R15).
    pub subscribed: bool,
    /// The last response that is not answered yet.
    pub in_flight_since: Option<Instant>,
    pub last_sent: Option<Instant>,
    pub last_acked: Option<Instant>,
    pub last_error: Option<Arc<str>>,
    /// The names whose present content the client refused.
    pub rejected: BTreeMap<Arc<str>, Rejection>,
    /// Why the client refused its last response, where that was about no name: an empty set, such as a validator of Envoy's
    /// refuses.
    pub refused_set: Option<Arc<str>>,
    pub responses: u64,
    pub acks: u64,
    pub nacks: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// Empty: it refused the removal of the name.
    pub version: Arc<str>,
    pub reason: Arc<str>,
}

impl SessionStatus {
    /// Says one thing that the client refused, in an operator's words.
    pub(super) fn rejection(&self) -> Option<String> {
        self.kinds.iter().find_map(|(kind, status)| {
            let of_name = status.rejected.first_key_value().map(|(name, Rejection { version, reason })| {
                let what = if version.is_empty() { " cannot be removed" } else { "" };
                format!("{kind} {name}{what}: {reason}")
            });
            of_name.or_else(|| Some(format!("{kind}, all there is: {}", status.refused_set.as_ref()?)))
        })
    }
}
