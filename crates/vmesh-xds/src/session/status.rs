//! The state of a stream, for operators.

use crate::PerKind;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// The state of a client as its server sees it: per kind the answers and rejections, and over all kinds one
/// state and one generation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SessionStatus {
    pub state: State,
    /// The last generation of the store of which the client has ACKed everything in its scope. Zero before its
    /// first subscription.
    pub generation_acked: u64,
    pub kinds: PerKind<KindStatus>,
    /// The number of requests for types that vmesh does not serve (R04).
    pub unknown_types: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// The client has ACKed all resources that it subscribed to.
    Synced,
    /// Some resource is not sent yet, or not ACKed yet.
    #[default]
    Pushing,
    /// The client rejected a resource and keeps the last version that it accepted. The reason quotes the
    /// client.
    Rejected { reason: Arc<str> },
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct KindStatus {
    /// True once the client has subscribed to this kind. A kind without a subscription is not out of date
    /// (R15).
    pub subscribed: bool,
    /// The time at which the latest unanswered response was sent.
    pub in_flight_since: Option<Instant>,
    pub last_sent: Option<Instant>,
    pub last_acked: Option<Instant>,
    pub last_error: Option<Arc<str>>,
    /// The names whose current resource the client rejected.
    pub rejected: BTreeMap<Arc<str>, Rejection>,
    /// The reason of the client's last NACK, if the rejected response had no resource: Envoy's validators may
    /// reject an empty set.
    pub refused_set: Option<Arc<str>>,
    pub responses: u64,
    pub acks: u64,
    pub nacks: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The rejected version. Empty if the client rejected the removal of the name.
    pub version: Arc<str>,
    pub reason: Arc<str>,
}

impl SessionStatus {
    /// Describes one rejection for an operator.
    pub(super) fn rejection(&self) -> Option<String> {
        self.kinds.iter().find_map(|(kind, status)| {
            let of_name = status.rejected.first_key_value().map(|(name, Rejection { version, reason })| {
                let removal = if version.is_empty() { " cannot be removed" } else { "" };
                format!("{kind} {name}{removal}: {reason}")
            });
            of_name.or_else(|| Some(format!("{kind}, all there is: {}", status.refused_set.as_ref()?)))
        })
    }
}
