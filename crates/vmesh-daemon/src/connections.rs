//! Limits for the connections of one listener: in total, from one origin, and of those without a request.
//!
//! Callers wait for [`Gate::room`], accept, call [`Gate::enter`] with the origin, call [`Permit::set_silent`] when they have read
//! what the client sent, and close the connection when [`Permit::evicted`] returns. The [`Permit`] is kept for as long as the
//! connection is open.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::future::poll_fn;
use std::net::{IpAddr, Ipv6Addr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// Limits of one listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub total: usize,
    pub per_origin: usize,
    /// Connections without a request in progress, including those that wait for their next request.
    pub pending: usize,
}

/// A connection may be silent this long before other clients can evict it.
pub const GRACE: Duration = Duration::from_secs(1);

/// The client host or user that a connection belongs to; limits count per origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    Address(IpAddr),
    /// The user at the other end of a Unix socket.
    User(u32),
    Unknown,
}

impl Origin {
    /// An IPv6 host has a whole /64 to itself, so that is what counts as one address.
    pub fn of_address(address: IpAddr) -> Origin {
        Origin::Address(match address.to_canonical() {
            IpAddr::V6(v6) if !v6.is_loopback() => {
                let [a, b, c, d, ..] = v6.segments();
                IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
            }
            canonical => canonical,
        })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Address(address) => address.fmt(f),
            Origin::User(uid) => write!(f, "user {uid}"),
            Origin::Unknown => f.write_str("an unknown origin"),
        }
    }
}

/// The limit that refused a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitReached {
    #[error("there are {0} connections, and no more are taken")]
    Total(usize),
    #[error("there are {1} connections from {0}, and no more are taken from there")]
    Origin(Origin, usize),
}

/// Counts the connections of one listener and admits new ones. Clones share their counts.
#[derive(Clone)]
pub struct Gate {
    shared: Arc<Shared>,
}

struct Shared {
    limits: Limits,
    grace: Duration,
    state: Mutex<State>,
    /// Notified when a connection closes or stops being pending.
    freed: Notify,
}

#[derive(Default)]
struct State {
    next: u64,
    total: usize,
    origins: HashMap<Origin, OriginCount>,
    /// In the order in which they became pending.
    pending: BTreeMap<u64, Pending>,
    refused: u64,
    evicted: u64,
}

#[derive(Default)]
struct OriginCount {
    all: usize,
    pending: usize,
}

struct Pending {
    origin: Origin,
    /// Since when the server has read all that the client sent. `None`: a busy server has not looked yet.
    silent_since: Option<Instant>,
    evict: Arc<Notify>,
}

/// The counts of a [`Gate`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub connections: usize,
    pub pending: usize,
    /// Connections that were closed as soon as they were accepted, since the start.
    pub refused: u64,
    /// Connections that were closed while they were pending to make room for others, since the start.
    pub evicted: u64,
}

impl Gate {
    pub fn new(limits: Limits) -> Gate {
        Gate::with_grace(limits, GRACE)
    }

    fn with_grace(limits: Limits, grace: Duration) -> Gate {
        Gate { shared: Arc::new(Shared { limits, grace, state: Mutex::default(), freed: Notify::new() }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until one more connection may be accepted. While too many connections are pending, this evicts silent ones (silent for at
    /// least [`GRACE`]), oldest first, from the origin with the most pending connections. Cancel-safe.
    pub async fn room(&self) {
        loop {
            let freed = self.shared.freed.notified();
            let wake_at = {
                let mut state = self.lock();
                if state.pending.len() < self.shared.limits.pending {
                    return;
                }
                match state.evict_one(None, self.shared.grace, Instant::now()) {
                    Ok(()) => return,
                    Err(wake_at) => wake_at,
                }
            };
            tokio::select! {
                () = freed => {}
                () = sleep_until(wake_at) => {}
            }
        }
    }

    /// Counts an accepted connection as pending. At a limit, this evicts a connection that has been silent for [`GRACE`]; without
    /// such a connection it refuses the new one.
    pub fn enter(&self, origin: Origin) -> Result<Permit, LimitReached> {
        let Limits { total, per_origin, .. } = self.shared.limits;
        let grace = self.shared.grace;
        let mut state = self.lock();
        let now = Instant::now();
        let of_origin = state.origins.get(&origin).map_or(0, |count| count.all);
        let refused = if of_origin >= per_origin && state.evict_one(Some(origin), grace, now).is_err() {
            Some(LimitReached::Origin(origin, per_origin))
        } else if state.total >= total && state.evict_one(None, grace, now).is_err() {
            Some(LimitReached::Total(total))
        } else {
            None
        };
        if let Some(refused) = refused {
            state.refused += 1;
            return Err(refused);
        }
        let id = state.next;
        state.next += 1;
        state.total += 1;
        let count = state.origins.entry(origin).or_default();
        count.all += 1;
        count.pending += 1;
        let evict = Arc::new(Notify::new());
        state.pending.insert(id, Pending { origin, silent_since: None, evict: evict.clone() });
        drop(state);
        Ok(Permit { gate: self.clone(), origin, slot: Mutex::new(Slot { id, is_pending: true }), evict })
    }

    pub fn counts(&self) -> Counts {
        let state = self.lock();
        Counts {
            connections: state.total,
            pending: state.pending.len(),
            refused: state.refused,
            evicted: state.evicted,
        }
    }
}

impl State {
    /// Tells the oldest pending connection to close, from `origin` or else from the origin that has the most of them, and frees its slot
    /// at once. Fails with the time at which a connection will have been silent long enough.
    fn evict_one(&mut self, origin: Option<Origin>, grace: Duration, now: Instant) -> Result<(), Instant> {
        let heaviest = || {
            let origins = self.origins.iter().filter(|(_, count)| count.pending > 0);
            origins.max_by_key(|(origin, count)| (count.pending, **origin)).map(|(origin, _)| *origin)
        };
        let Some(origin) = origin.or_else(heaviest) else { return Err(now + grace) };
        let mut of_origin = self.pending.iter().filter(|(_, pending)| pending.origin == origin);
        let oldest = of_origin.find_map(|(id, pending)| Some((*id, pending.silent_since?)));
        let Some((id, since)) = oldest else { return Err(now + grace) };
        if now < since + grace {
            return Err(since + grace);
        }
        if let Some(pending) = self.pending.remove(&id) {
            pending.evict.notify_one();
            self.evicted += 1;
            self.leave(origin, true);
        }
        Ok(())
    }

    fn leave(&mut self, origin: Origin, was_pending: bool) {
        self.total = self.total.saturating_sub(1);
        if let Some(count) = self.origins.get_mut(&origin) {
            count.all = count.all.saturating_sub(1);
            count.pending = count.pending.saturating_sub(usize::from(was_pending));
            if count.all == 0 {
                self.origins.remove(&origin);
            }
        }
    }
}

/// The slot of one connection. Dropping it frees the slot.
pub struct Permit {
    gate: Gate,
    origin: Origin,
    slot: Mutex<Slot>,
    evict: Arc<Notify>,
}

#[derive(Clone, Copy)]
struct Slot {
    id: u64,
    is_pending: bool,
}

impl Permit {
    /// Records that the server has read everything the client sent so far. The connection counts as silent from now until it is busy.
    pub fn set_silent(&self) {
        let slot = self.slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pending) = self.gate.lock().pending.get_mut(&slot.id) {
            pending.silent_since.get_or_insert_with(Instant::now);
        }
    }

    /// Marks the connection as serving a request: the gate no longer evicts it.
    pub fn set_busy(&self) {
        let mut slot = self.slot.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut slot.is_pending, false) {
            return;
        }
        let mut state = self.gate.lock();
        if state.pending.remove(&slot.id).is_none() {
            // The gate evicted this connection just now; `evicted` returns next.
            slot.is_pending = true;
            return;
        }
        if let Some(count) = state.origins.get_mut(&self.origin) {
            count.pending = count.pending.saturating_sub(1);
        }
        drop(state);
        self.gate.shared.freed.notify_one();
    }

    /// Marks the connection as pending again, until its next request.
    pub fn set_idle(&self) {
        let mut slot = self.slot.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut slot.is_pending, true) {
            return;
        }
        let mut state = self.gate.lock();
        slot.id = state.next;
        state.next += 1;
        let pending =
            Pending { origin: self.origin, silent_since: Some(Instant::now()), evict: self.evict.clone() };
        state.pending.insert(slot.id, pending);
        if let Some(count) = state.origins.get_mut(&self.origin) {
            count.pending += 1;
        }
    }

    /// Waits until the gate evicts this connection. Close the connection then: the gate has already given its slot to a client that waits.
    pub async fn evicted(&self) {
        self.evict.notified().await;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let slot = *self.slot.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.gate.lock();
        let was_pending = state.pending.remove(&slot.id).is_some();
        // The slot of an evicted connection was freed when it was told to close.
        if was_pending || !slot.is_pending {
            state.leave(self.origin, was_pending);
        }
        drop(state);
        self.gate.shared.freed.notify_one();
    }
}

/// Polls `connection` once: it reads what its client has sent.
pub async fn poll_once<F: Future>(mut connection: Pin<&mut F>) -> Poll<F::Output> {
    poll_fn(|cx| Poll::Ready(connection.as_mut().poll(cx))).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(last: u8) -> Origin {
        Origin::of_address(IpAddr::from([10, 0, 0, last]))
    }

    fn gate(total: usize, per_origin: usize, pending: usize, grace: Duration) -> Gate {
        Gate::with_grace(Limits { total, per_origin, pending }, grace)
    }

    const NEVER: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn a_limit_is_kept_and_a_place_that_is_left_is_free() {
        let gate = gate(3, 2, 10, NEVER);
        let first = gate.enter(origin(1)).unwrap();
        let second = gate.enter(origin(1)).unwrap();
        assert_eq!(gate.enter(origin(1)).err(), Some(LimitReached::Origin(origin(1), 2)));
        let _third = gate.enter(origin(2)).unwrap();
        assert_eq!(gate.enter(origin(3)).err(), Some(LimitReached::Total(3)));
        drop(first);
        let fourth = gate.enter(origin(3)).unwrap();
        fourth.set_busy();
        drop((second, fourth));
        assert_eq!(gate.counts(), Counts { connections: 1, pending: 1, refused: 2, evicted: 0 });
    }

    #[tokio::test]
    async fn silent_connections_make_room_and_busy_ones_do_not() {
        let gate = gate(3, 3, 10, Duration::ZERO);
        let busy = gate.enter(origin(1)).unwrap();
        busy.set_busy();
        let silent = gate.enter(origin(1)).unwrap();
        let other = gate.enter(origin(2)).unwrap();
        assert_eq!(
            gate.enter(origin(3)).err(),
            Some(LimitReached::Total(3)),
            "the server has not looked at them"
        );
        silent.set_silent();
        other.set_silent();
        let new = gate.enter(origin(3)).unwrap();
        // Two origins had one silent connection each: the larger address gave way.
        other.evicted().await;
        drop(other);
        assert_eq!(gate.counts().connections, 3);
        new.set_silent();
        new.set_busy();
        let newer = gate.enter(origin(4)).unwrap();
        silent.evicted().await;
        newer.set_busy();
        assert!(gate.enter(origin(5)).is_err(), "all are busy");
        // A connection that waits for its next request is pending again.
        busy.set_idle();
        let newest = gate.enter(origin(5)).unwrap();
        busy.evicted().await;
        assert_eq!(gate.counts().evicted, 3);
        drop((busy, silent, new, newer, newest));
        assert_eq!(gate.counts(), Counts { refused: 2, evicted: 3, ..Counts::default() });
    }

    #[tokio::test]
    async fn an_origin_with_many_silent_connections_cannot_keep_others_out() {
        let gate = gate(1000, 1000, 10, Duration::from_millis(1));
        let silent: Vec<_> = (0..10).map(|_| gate.enter(origin(1)).unwrap()).collect();
        silent.iter().for_each(Permit::set_silent);
        gate.room().await;
        let other = gate.enter(origin(2)).unwrap();
        silent[0].evicted().await;
        gate.room().await;
        silent[1].evicted().await;
        drop(other);
        assert_eq!(gate.counts().pending, 8);
    }

    #[tokio::test]
    async fn there_is_room_as_soon_as_a_connection_shows_a_request() {
        let gate = gate(1000, 1000, 1, NEVER);
        let one = gate.enter(origin(1)).unwrap();
        tokio::join!(gate.room(), async { one.set_busy() });
    }

    #[test]
    fn a_host_with_ipv6_is_one_origin() {
        let of = |text: &str| Origin::of_address(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("::1"), of("::2"));
    }
}
