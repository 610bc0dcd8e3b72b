//! Builds the status that `net.sock` answers, on the thread of the socket, from the keeper's last publication: an answer waits for no
//! disk.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Mutex, watch};
use tokio::time::timeout;
use vmesh_capture::Direction;
use vmesh_capture::facts::Places;

use crate::probe::{Looks, Verdicts};
use crate::protocol::{Drift, Envoy, Redirects, Status};
use crate::pulse::{AgentWatch, Heartbeat, Order, why_not};

/// How long a count of connections is good for: the kernel walks all of its sockets for one.
const COUNTS_EVERY: Duration = Duration::from_secs(1);
/// How long whoever asks waits for a keeper that starts.
const STARTS_WITHIN: Duration = Duration::from_secs(30);

/// The part of a status that the keeper knows.
#[derive(Debug, Clone, Default)]
pub struct Board {
    /// Without what changes by itself.
    pub status: Status,
    pub trial_until: Option<Instant>,
    pub drifted_at: Option<Instant>,
    /// The directions that are captured.
    pub looks: Looks,
}

/// The sources that a [`Status`] is built from.
#[derive(Debug, Clone)]
pub struct StatusSource {
    pub board: watch::Receiver<Board>,
    pub beats: watch::Receiver<Heartbeat>,
    pub orders: watch::Receiver<Option<Order>>,
    pub verdicts: watch::Receiver<Verdicts>,
    pub agent: AgentWatch,
    pub places: Places,
    pub connections: Arc<Mutex<ConnectionCount>>,
}

/// The open connections through a redirect, as last counted.
#[derive(Debug, Default)]
pub struct ConnectionCount {
    count: usize,
    at: Option<Instant>,
}

impl StatusSource {
    /// Builds the status.
    pub async fn status(&self) -> Status {
        self.started().await;
        let connections = self.connections.lock().await.count;
        self.with_connections(connections)
    }

    /// Builds the status, and counts connections again if the last count is old. Callers that ask meanwhile share one count.
    pub async fn counted(&self) -> Status {
        self.started().await;
        let mut known = self.connections.lock().await;
        if known.at.is_none_or(|at| at.elapsed() >= COUNTS_EVERY) {
            let places = self.places.clone();
            if let Ok(count) = tokio::task::spawn_blocking(move || places.redirected()).await {
                known.count = count;
            }
            known.at = Some(Instant::now());
        }
        let count = known.count;
        drop(known);
        self.with_connections(count)
    }

    /// Waits for the keeper's first publication.
    async fn started(&self) {
        let mut board = self.board.clone();
        let published = board.wait_for(|board| !board.status.version.is_empty());
        // After that the caller gets an empty status.
        _ = timeout(STARTS_WITHIN, published).await;
    }

    fn with_connections(&self, connections: usize) -> Status {
        let board = self.board.borrow().clone();
        let (beats, order) = (self.beats.borrow().clone(), self.orders.borrow().clone());
        let verdicts = *self.verdicts.borrow();
        let now = Instant::now();
        let listener = |direction| (verdicts.of(direction), beats.redirects(order.as_ref(), direction, now));
        // Names and destinations are a matter of outbound capture: the status is its listener's, where there is one.
        let first = if board.looks.outbound { Direction::Outbound } else { Direction::Inbound };
        let (envoy, redirects) = listener(first);
        let mut status = board.status;
        if board.looks.outbound && board.looks.inbound {
            status.notes.extend(note_of_inbound(listener(Direction::Inbound)));
        }
        Status {
            trial_ends_in: board.trial_until.map(|until| until.saturating_duration_since(now).as_secs()),
            envoy: if board.looks.is_empty() { Envoy::Unknown } else { envoy },
            redirects,
            agent_silent_for: self.agent.silent_for().map(|silent| silent.as_secs()),
            drift: Drift {
                seconds_ago: board.drifted_at.map(|at| now.saturating_duration_since(at).as_secs()),
                ..status.drift
            },
            connections,
            ..status
        }
    }
}

/// What is wrong with the listener of inbound connections, where the status itself is that of outbound ones.
fn note_of_inbound((envoy, redirects): (Envoy, Redirects)) -> Option<String> {
    match (envoy, redirects) {
        (Envoy::Well | Envoy::Unknown, Redirects::Hold | Redirects::None) => None,
        (_, Redirects::Lapsed) => Some(format!(
            "inbound redirects have lapsed, since {}: connections from outside go past Envoy where that is allowed",
            why_not(envoy)
        )),
        (Envoy::Well | Envoy::Unknown, _) => None,
        (_, _) => Some(format!("{}, as far as connections from outside go", why_not(envoy))),
    }
}
