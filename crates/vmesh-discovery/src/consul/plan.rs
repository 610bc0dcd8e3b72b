//! Who is watched, and whose turn it is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use vmesh_consul::Cursor;
use vmesh_model::{Problem, ServiceName};

use super::changes::CheckDigest;
use crate::format::consul::Read;

/// Reads of what there is, under way at once: the first of 2,000 services, say, or all after a failure.
const AT_ONCE: usize = 64;
/// How late a change may be seen, if services have to take turns.
pub(super) const ROUND: Duration = Duration::from_secs(10);
/// A shorter wait than this is no wait.
const SHORTEST: Duration = Duration::from_millis(250);

/// A service in a datacenter, by its place in the list of those.
pub(super) type Key = (usize, ServiceName);

/// What a query is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ask {
    Catalog(usize),
    Checks(usize),
    Service(Key),
}

/// The blocking query for all checks of a datacenter, where services have none of their own.
#[derive(Debug)]
pub(super) struct CheckWatch {
    pub(super) cursor: Cursor,
    pub(super) in_flight: bool,
    /// The last answer that was believed.
    pub(super) digest: Option<CheckDigest>,
    /// The size of the last answer: a large one comes later than the list of services.
    pub(super) bytes: usize,
    /// When a difference pointed at a service last.
    pub(super) pointed_at: Option<Instant>,
    /// When a change of the list of services last ended a pause of this query.
    pub(super) hastened_at: Option<Instant>,
    /// How many answers in a row pointed at nothing.
    pub(super) fruitless: u32,
    /// Why they cannot be read now: services take turns meanwhile.
    pub(super) failure: Option<Arc<str>>,
}

impl CheckWatch {
    /// All services of a datacenter share this query, so it may be sent more often than that of one service: ten times
    /// in a second, after twenty at once.
    fn new(now: Instant) -> CheckWatch {
        CheckWatch {
            cursor: Cursor::new(now).with_allowance(20, Duration::from_millis(100)),
            in_flight: false,
            digest: None,
            bytes: 0,
            pointed_at: None,
            hastened_at: None,
            fruitless: 0,
            failure: None,
        }
    }
}

/// One datacenter's catalogue.
#[derive(Debug)]
pub(super) struct Datacenter {
    /// `None`: the one that the agent is in.
    pub(super) name: Option<Arc<str>>,
    pub(super) cursor: Cursor,
    pub(super) in_flight: bool,
    /// It has been read, at least once.
    pub(super) has_listed: bool,
    /// The last answer listed nothing at all.
    pub(super) empty: bool,
    /// The last answer had things left out, because the token may not see them.
    pub(super) filtered: bool,
    /// Why it cannot be read now. Its services wait meanwhile.
    pub(super) failure: Option<Arc<str>>,
    /// Services that cannot be services here.
    pub(super) problems: Vec<Problem>,
    pub(super) checks: CheckWatch,
    /// The hash of each listed service's tags.
    pub(super) tags: BTreeMap<ServiceName, u64>,
    /// The list of services has a new index that nothing visible explains: when all services are to be read for it.
    pub(super) unexplained: Option<Instant>,
}

impl Datacenter {
    /// Whether its checks are to be asked for when that is due.
    pub(super) fn wants_checks(&self) -> bool {
        self.has_listed && self.failure.is_none() && !self.checks.in_flight
    }
}

/// One service of one datacenter.
#[derive(Debug)]
pub(super) struct Watched {
    /// As it is registered.
    pub(super) spelling: Arc<str>,
    pub(super) cursor: Cursor,
    /// The last good answer.
    pub(super) read: Option<Arc<Read>>,
    /// Why the last answer is not of now.
    pub(super) failure: Option<Arc<str>>,
    /// Failures in a row.
    pub(super) failures: u32,
    /// Answers without an instance, in a row.
    pub(super) empties: u32,
    /// It is in the catalogue. One that is not is watched for as long as that may be for lack of rights.
    pub(super) listed: bool,
    /// A difference elsewhere says that the next read must have something newer.
    pub(super) expects_news: bool,
    /// The query that is under way was sent for such a difference.
    pub(super) must_be_newer: bool,
    /// It is to be read once more when the read that is under way has ended.
    read_again: bool,
    in_flight: Option<Flight>,
    queued: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flight {
    /// It asks for what there is.
    Read,
    /// It waits for news.
    Wait,
}

#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) datacenters: Vec<Datacenter>,
    pub(super) services: BTreeMap<Key, Watched>,
    /// Services have no blocking queries of their own: they are read when something points at them.
    pub(super) is_scarce: bool,
    queue: BTreeSet<(Instant, Key)>,
    /// Queries under way, also of services that are not watched any more.
    flights: BTreeMap<Key, Flight>,
    reads: usize,
}

impl Plan {
    pub(super) fn new(datacenters: &[Arc<str>], now: Instant) -> Plan {
        let one = |name: Option<&Arc<str>>| Datacenter {
            name: name.cloned(),
            cursor: Cursor::new(now),
            in_flight: false,
            has_listed: false,
            empty: false,
            filtered: false,
            failure: None,
            problems: Vec::new(),
            checks: CheckWatch::new(now),
            tags: BTreeMap::new(),
            unexplained: None,
        };
        let datacenters = if datacenters.is_empty() {
            vec![one(None)]
        } else {
            datacenters.iter().map(|dc| one(Some(dc))).collect()
        };
        Plan { datacenters, ..Plan::default() }
    }

    /// Takes note of what a datacenter lists; returns the services that are not watched any more, or are gone from the
    /// list for reasons that are not clear.
    pub(super) fn list(
        &mut self,
        at: usize,
        listed: BTreeMap<ServiceName, Arc<str>>,
        problems: Vec<Problem>,
        now: Instant,
    ) -> Vec<ServiceName> {
        let Some(dc) = self.datacenters.get_mut(at) else { return Vec::new() };
        let first = !std::mem::replace(&mut dc.has_listed, true);
        dc.problems = problems;
        let filtered = dc.filtered;
        let of_it: Vec<Key> = self.services.keys().filter(|(dc, _)| *dc == at).cloned().collect();
        let mut changed = Vec::new();
        for key in of_it.into_iter().filter(|(_, name)| !listed.contains_key(name)) {
            let is_known =
                self.services.get(&key).is_some_and(|watched| watched.read.is_some() || !watched.listed);
            if filtered && is_known {
                if let Some(watched) = self.services.get_mut(&key) {
                    watched.listed = false;
                    // Whether it is gone or hidden is what a read of it says.
                    watched.cursor.start_over(now);
                }
                self.enqueue(&key);
            } else {
                self.forget(&key);
                changed.push(key.1);
            }
        }
        for (name, spelling) in listed {
            let key = (at, name);
            match self.services.get_mut(&key) {
                Some(watched) => watched.listed = true,
                None => {
                    self.watch(key.clone(), spelling, true, now);
                    if first {
                        changed.push(key.1);
                    }
                }
            }
        }
        changed
    }

    /// Whether a service is watched, in whichever datacenter.
    pub(super) fn watches(&self, name: &ServiceName) -> bool {
        (0..self.datacenters.len()).any(|at| self.services.contains_key(&(at, name.clone())))
    }

    /// Watches a service that is not listed, perhaps because the token may not see it.
    pub(super) fn watch_hidden(&mut self, at: usize, name: &ServiceName, now: Instant) {
        self.watch((at, name.clone()), name.as_str().into(), false, now);
    }

    fn watch(&mut self, key: Key, spelling: Arc<str>, listed: bool, now: Instant) {
        let watched = Watched {
            spelling,
            cursor: Cursor::new(now),
            read: None,
            failure: None,
            failures: 0,
            empties: 0,
            listed,
            expects_news: false,
            must_be_newer: false,
            read_again: false,
            in_flight: self.flights.get(&key).copied(),
            queued: None,
        };
        self.services.insert(key.clone(), watched);
        self.enqueue(&key);
    }

    pub(super) fn forget(&mut self, key: &Key) {
        if let Some(watched) = self.services.remove(key)
            && let Some(at) = watched.queued
        {
            self.queue.remove(&(at, key.clone()));
        }
    }

    /// Puts a service in the line for when its next query is due; not while one is under way.
    pub(super) fn enqueue(&mut self, key: &Key) {
        let Some(watched) = self.services.get_mut(key) else { return };
        if let Some(at) = watched.queued.take() {
            self.queue.remove(&(at, key.clone()));
        }
        if watched.in_flight.is_none() {
            if std::mem::take(&mut watched.read_again) {
                watched.cursor.read_again();
            }
            if self.is_scarce && watched.cursor.index() > 0 {
                return;
            }
            let at = watched.cursor.due();
            watched.queued = Some(at);
            self.queue.insert((at, key.clone()));
        }
    }

    /// Reads a service as soon as that is decent. With `expects_news`, an answer as old as the last one is asked for again,
    /// of the leader.
    pub(super) fn point_at(&mut self, key: &Key, expects_news: bool) {
        let Some(watched) = self.services.get_mut(key) else { return };
        watched.expects_news |= expects_news;
        watched.read_again = true;
        self.enqueue(key);
    }

    /// The services of which a query waits for news.
    pub(super) fn waiting(&self) -> BTreeSet<Key> {
        let waits = self.flights.iter().filter(|(_, flight)| **flight == Flight::Wait);
        waits.map(|(key, _)| key.clone()).collect()
    }

    /// Whether there is a connection for reads that nothing has pointed at, besides those that are due.
    pub(super) fn has_room(&self, slots: usize, now: Instant) -> bool {
        self.flights.len() < (slots * 3 / 4).max(1) && self.queue.first().is_none_or(|(at, _)| *at > now)
    }

    /// All services of a datacenter that can be read again are asked for what there is.
    pub(super) fn unpark(&mut self, at: usize) {
        let now = Instant::now();
        let of_it: Vec<Key> = self.services.keys().filter(|(dc, _)| *dc == at).cloned().collect();
        for key in of_it {
            if let Some(watched) = self.services.get_mut(&key)
                && watched.in_flight.is_none()
            {
                watched.cursor.start_over(now);
                self.enqueue(&key);
            }
        }
    }

    /// The next service whose query may be sent now.
    pub(super) fn take_due(&mut self, now: Instant, slots: usize) -> Option<Key> {
        loop {
            let key = self.queue.first().filter(|(at, _)| *at <= now).map(|(_, key)| key.clone())?;
            let is_down = self.datacenters.get(key.0).is_none_or(|dc| dc.failure.is_some());
            let watched = self.services.get_mut(&key)?;
            if is_down {
                // Asking every service of a Consul that does not answer is no help to it; `unpark` brings it back.
                if let Some(at) = watched.queued.take() {
                    self.queue.remove(&(at, key));
                }
                continue;
            }
            let flight = if watched.cursor.index() == 0 { Flight::Read } else { Flight::Wait };
            if self.flights.len() >= slots || (flight == Flight::Read && self.reads >= AT_ONCE) {
                return None;
            }
            if let Some(at) = watched.queued.take() {
                self.queue.remove(&(at, key.clone()));
            }
            watched.in_flight = Some(flight);
            self.flights.insert(key.clone(), flight);
            self.reads += usize::from(flight == Flight::Read);
            return Some(key);
        }
    }

    /// A query has ended.
    pub(super) fn back(&mut self, key: &Key) {
        if self.flights.remove(key) == Some(Flight::Read) {
            self.reads -= 1;
        }
        if let Some(watched) = self.services.get_mut(key) {
            watched.in_flight = None;
        }
    }

    /// When the next query may be sent.
    pub(super) fn next_due(&self, slots: usize) -> Option<Instant> {
        let catalogs = self.datacenters.iter().filter(|dc| !dc.in_flight).map(|dc| dc.cursor.due());
        let shared = self.datacenters.iter().filter(|_| self.is_scarce).flat_map(|dc| {
            [dc.wants_checks().then(|| dc.checks.cursor.due()), dc.unexplained].into_iter().flatten()
        });
        let service = self.queue.first().filter(|(_, key)| {
            let reads = self.services.get(key).is_some_and(|watched| watched.cursor.index() == 0);
            self.flights.len() < slots && !(reads && self.reads >= AT_ONCE)
        });
        catalogs.chain(shared).chain(service.map(|(at, _)| *at)).min()
    }

    /// How many rounds it takes until each service had its turn.
    fn rounds(&self, slots: usize) -> u32 {
        u32::try_from(self.services.len().div_ceil(slots.max(1))).unwrap_or(u32::MAX)
    }

    /// How long a query may wait for news, so that everybody has a turn.
    pub(super) fn turn(&self, slots: usize, wait: Duration) -> Duration {
        match self.rounds(slots) {
            0 | 1 => wait,
            rounds => (ROUND / rounds).clamp(SHORTEST, wait),
        }
    }

    /// How late a change may be seen; `None` if it is seen at once.
    pub(super) fn lateness(&self, slots: usize, wait: Duration) -> Option<Duration> {
        let rounds = self.rounds(slots);
        // Consul adds up to a sixteenth.
        (rounds > 1).then(|| self.turn(slots, wait).mul_f64(17.0 / 16.0) * (rounds - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(services: usize) -> Plan {
        let now = Instant::now();
        let mut plan = Plan::new(&[], now);
        let listed = (0..services).map(|n| (format!("s{n:04}").parse().unwrap(), "s".into())).collect();
        plan.list(0, listed, Vec::new(), now);
        plan
    }

    #[tokio::test]
    async fn the_first_reads_are_bounded_and_each_service_has_its_turn() {
        let mut plan = plan(200);
        let now = Instant::now();
        let mut taken: Vec<Key> = Vec::new();
        while let Some(key) = plan.take_due(now, 1000) {
            taken.push(key);
        }
        assert_eq!(taken.len(), AT_ONCE);
        assert_eq!(plan.next_due(1000), Some(plan.datacenters[0].cursor.due()));
        let mut seen = BTreeSet::new();
        while let Some(key) = taken.pop() {
            assert!(seen.insert(key.clone()), "{key:?} has had its turn");
            plan.back(&key);
            plan.services.get_mut(&key).unwrap().cursor.failed(now);
            plan.enqueue(&key);
            taken.extend(plan.take_due(now, 1000));
        }
        assert_eq!(seen.len(), 200);
    }

    #[tokio::test]
    async fn services_that_take_turns_wait_for_less() {
        let minute = Duration::from_secs(60);
        for (services, turn, late) in [(8, 60_000, None), (9, 5_000, Some(5_312)), (80, 1_000, Some(9_562))] {
            let plan = plan(services);
            assert_eq!(plan.turn(8, minute).as_millis(), turn);
            assert_eq!(plan.lateness(8, minute).map(|late| late.as_millis()), late);
        }
        assert_eq!(plan(2000).turn(8, minute), SHORTEST);
    }

    #[tokio::test]
    async fn nobody_is_asked_while_the_catalogue_cannot_be_read() {
        let mut plan = plan(3);
        plan.datacenters[0].failure = Some("down".into());
        assert_eq!(plan.take_due(Instant::now(), 1000), None);
        plan.datacenters[0].failure = None;
        plan.unpark(0);
        assert!(plan.take_due(Instant::now(), 1000).is_some());
    }

    #[tokio::test]
    async fn a_service_that_comes_back_while_its_query_is_under_way_is_not_asked_twice() {
        let mut plan = plan(1);
        let now = Instant::now();
        let key = plan.take_due(now, 10).unwrap();
        plan.list(0, BTreeMap::new(), Vec::new(), now);
        assert!(plan.services.is_empty());
        plan.list(0, BTreeMap::from([(key.1.clone(), "s".into())]), Vec::new(), now);
        assert_eq!(plan.take_due(now, 10), None);
        plan.back(&key);
        plan.enqueue(&key);
        assert_eq!(plan.take_due(now, 10), Some(key));
    }
}
