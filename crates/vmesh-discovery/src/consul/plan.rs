//! The plan of queries: which services are watched, and which query is due next.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use vmesh_consul::Cursor;
use vmesh_model::{Problem, ServiceName};

use super::changes::CheckDigest;
use crate::format::consul::ServiceInstances;

/// The limit of concurrent reads that do not block, for example of the first 2,000 services or after a
/// failure.
const MAX_READS: usize = 64;
/// The longest time before a change is seen, if services take turns.
pub(super) const ROUND: Duration = Duration::from_secs(10);
/// The shortest wait of a blocking query.
const SHORTEST: Duration = Duration::from_millis(250);

/// A service in a datacenter, which is given as an index into `Plan::datacenters`.
pub(super) type ServiceKey = (usize, ServiceName);

/// The target of a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum QueryTarget {
    Catalog(usize),
    Checks(usize),
    Service(ServiceKey),
}

/// The blocking query for all checks of a datacenter, for services without queries of their own.
#[derive(Debug)]
pub(super) struct CheckWatch {
    pub(super) cursor: Cursor,
    pub(super) in_flight: bool,
    /// The last accepted answer.
    pub(super) digest: Option<CheckDigest>,
    /// The size of the last answer. A large answer arrives later than the list of services.
    pub(super) bytes: usize,
    /// When a difference last caused a read of a service.
    pub(super) read_requested_at: Option<Instant>,
    /// When a change of the list of services last ended a pause of this query.
    pub(super) hastened_at: Option<Instant>,
    /// The number of consecutive answers without a difference.
    pub(super) unchanged_answers: u32,
    /// The reason why the checks cannot be read now; meanwhile the sweep reads services in turn.
    pub(super) failure: Option<Arc<str>>,
}

impl CheckWatch {
    /// Creates a watch. All services of a datacenter share this query, so it may be sent more often than that
    /// of one service: ten times per second, after a burst of twenty.
    fn new(now: Instant) -> CheckWatch {
        CheckWatch {
            cursor: Cursor::new(now).with_rate_limit(20, Duration::from_millis(100)),
            in_flight: false,
            digest: None,
            bytes: 0,
            read_requested_at: None,
            hastened_at: None,
            unchanged_answers: 0,
            failure: None,
        }
    }
}

/// The catalogue of one datacenter.
#[derive(Debug)]
pub(super) struct Datacenter {
    /// The name; `None` for the datacenter of the agent.
    pub(super) name: Option<Arc<str>>,
    pub(super) cursor: Cursor,
    pub(super) in_flight: bool,
    /// The catalogue was read successfully at least once.
    pub(super) has_listed: bool,
    /// The last answer listed nothing.
    pub(super) empty: bool,
    /// Entries were filtered from the last answer, because the token may not see them.
    pub(super) filtered: bool,
    /// The reason why the catalogue cannot be read now. Queries of its services wait meanwhile.
    pub(super) failure: Option<Arc<str>>,
    /// Problems of listed services with unusable names.
    pub(super) problems: Vec<Problem>,
    pub(super) checks: CheckWatch,
    /// The hash of each listed service's tags.
    pub(super) tags: BTreeMap<ServiceName, u64>,
    /// Set after an unexplained change of the index of the list: when to read all services.
    pub(super) unexplained: Option<Instant>,
}

impl Datacenter {
    /// Reports whether the checks should be queried once the query is due.
    pub(super) fn needs_checks(&self) -> bool {
        self.has_listed && self.failure.is_none() && !self.checks.in_flight
    }
}

/// One service of one datacenter.
#[derive(Debug)]
pub(super) struct WatchedService {
    /// The name as it is registered.
    pub(super) spelling: Arc<str>,
    pub(super) cursor: Cursor,
    /// The last good answer.
    pub(super) read: Option<Arc<ServiceInstances>>,
    /// The reason why the last good answer is outdated.
    pub(super) failure: Option<Arc<str>>,
    /// The number of consecutive failures.
    pub(super) failures: u32,
    /// The number of consecutive answers without an instance.
    pub(super) empty_answers: u32,
    /// The service is in the catalogue. An unlisted service stays watched while the token may merely lack
    /// rights to see it.
    pub(super) listed: bool,
    /// A difference elsewhere shows that the next read must return something newer.
    pub(super) expects_news: bool,
    /// The running query was sent because of such a difference.
    pub(super) must_be_newer: bool,
    /// The service has to be read again when the running read has ended.
    read_again: bool,
    in_flight: Option<RunningQuery>,
    queued: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RunningQuery {
    /// A query that returns the present state at once.
    Read,
    /// A blocking query that waits for a change.
    Wait,
}

#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) datacenters: Vec<Datacenter>,
    pub(super) services: BTreeMap<ServiceKey, WatchedService>,
    /// Connections are scarce: services have no blocking queries of their own and are read when a difference
    /// points at them.
    pub(super) is_scarce: bool,
    queue: BTreeSet<(Instant, ServiceKey)>,
    /// The running queries, including those of services that are no longer watched.
    running: BTreeMap<ServiceKey, RunningQuery>,
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

    /// Takes the list of services of a datacenter. Returns the services that are no longer watched; for the
    /// first list, also the new services.
    pub(super) fn take_list(
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
        let of_it: Vec<ServiceKey> = self.services.keys().filter(|(dc, _)| *dc == at).cloned().collect();
        let mut changed = Vec::new();
        for key in of_it.into_iter().filter(|(_, name)| !listed.contains_key(name)) {
            let is_known =
                self.services.get(&key).is_some_and(|watched| watched.read.is_some() || !watched.listed);
            if filtered && is_known {
                if let Some(watched) = self.services.get_mut(&key) {
                    watched.listed = false;
                    // The next read shows whether the service is gone or hidden.
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

    /// Reports whether a service is watched in any datacenter.
    pub(super) fn is_watched(&self, name: &ServiceName) -> bool {
        (0..self.datacenters.len()).any(|at| self.services.contains_key(&(at, name.clone())))
    }

    /// Watches a service that is not listed, possibly because the token may not see it.
    pub(super) fn watch_hidden(&mut self, at: usize, name: &ServiceName, now: Instant) {
        self.watch((at, name.clone()), name.as_str().into(), false, now);
    }

    fn watch(&mut self, key: ServiceKey, spelling: Arc<str>, listed: bool, now: Instant) {
        let watched = WatchedService {
            spelling,
            cursor: Cursor::new(now),
            read: None,
            failure: None,
            failures: 0,
            empty_answers: 0,
            listed,
            expects_news: false,
            must_be_newer: false,
            read_again: false,
            in_flight: self.running.get(&key).copied(),
            queued: None,
        };
        self.services.insert(key.clone(), watched);
        self.enqueue(&key);
    }

    pub(super) fn forget(&mut self, key: &ServiceKey) {
        if let Some(watched) = self.services.remove(key)
            && let Some(at) = watched.queued
        {
            self.queue.remove(&(at, key.clone()));
        }
    }

    /// Queues the next query of a service, unless a query is running.
    pub(super) fn enqueue(&mut self, key: &ServiceKey) {
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

    /// Requests a read of a service as soon as its rate limit allows. If `expects_news` is set and the answer
    /// is no newer than the last one, the leader is asked again.
    pub(super) fn request_read(&mut self, key: &ServiceKey, expects_news: bool) {
        let Some(watched) = self.services.get_mut(key) else { return };
        watched.expects_news |= expects_news;
        watched.read_again = true;
        self.enqueue(key);
    }

    /// Returns the services with a blocking query that waits for a change.
    pub(super) fn blocking_queries(&self) -> BTreeSet<ServiceKey> {
        let waits = self.running.iter().filter(|(_, flight)| **flight == RunningQuery::Wait);
        waits.map(|(key, _)| key.clone()).collect()
    }

    /// Reports whether a connection is free for a read of the sweep, besides the reads that are due.
    pub(super) fn has_room(&self, slots: usize, now: Instant) -> bool {
        self.running.len() < (slots * 3 / 4).max(1) && self.queue.first().is_none_or(|(at, _)| *at > now)
    }

    /// Requests a read of all services of a datacenter that has become readable again.
    pub(super) fn requeue_all(&mut self, at: usize) {
        let now = Instant::now();
        let of_it: Vec<ServiceKey> = self.services.keys().filter(|(dc, _)| *dc == at).cloned().collect();
        for key in of_it {
            if let Some(watched) = self.services.get_mut(&key)
                && watched.in_flight.is_none()
            {
                watched.cursor.start_over(now);
                self.enqueue(&key);
            }
        }
    }

    /// Returns the next service whose query may be sent now.
    pub(super) fn take_due(&mut self, now: Instant, slots: usize) -> Option<ServiceKey> {
        loop {
            let key = self.queue.first().filter(|(at, _)| *at <= now).map(|(_, key)| key.clone())?;
            let is_down = self.datacenters.get(key.0).is_none_or(|dc| dc.failure.is_some());
            let watched = self.services.get_mut(&key)?;
            if is_down {
                // Querying each service of an unresponsive Consul would only add load; `unpark` queues them
                // again.
                if let Some(at) = watched.queued.take() {
                    self.queue.remove(&(at, key));
                }
                continue;
            }
            let flight = if watched.cursor.index() == 0 { RunningQuery::Read } else { RunningQuery::Wait };
            if self.running.len() >= slots || (flight == RunningQuery::Read && self.reads >= MAX_READS) {
                return None;
            }
            if let Some(at) = watched.queued.take() {
                self.queue.remove(&(at, key.clone()));
            }
            watched.in_flight = Some(flight);
            self.running.insert(key.clone(), flight);
            self.reads += usize::from(flight == RunningQuery::Read);
            return Some(key);
        }
    }

    /// Records that a query has ended.
    pub(super) fn end_query(&mut self, key: &ServiceKey) {
        if self.running.remove(key) == Some(RunningQuery::Read) {
            self.reads -= 1;
        }
        if let Some(watched) = self.services.get_mut(key) {
            watched.in_flight = None;
        }
    }

    /// Returns when the next query may be sent.
    pub(super) fn next_due(&self, slots: usize) -> Option<Instant> {
        let catalogs = self.datacenters.iter().filter(|dc| !dc.in_flight).map(|dc| dc.cursor.due());
        let shared = self.datacenters.iter().filter(|_| self.is_scarce).flat_map(|dc| {
            [dc.needs_checks().then(|| dc.checks.cursor.due()), dc.unexplained].into_iter().flatten()
        });
        let service = self.queue.first().filter(|(_, key)| {
            let reads = self.services.get(key).is_some_and(|watched| watched.cursor.index() == 0);
            self.running.len() < slots && !(reads && self.reads >= MAX_READS)
        });
        catalogs.chain(shared).chain(service.map(|(at, _)| *at)).min()
    }

    /// Returns the number of rounds until each service had its turn.
    fn rounds(&self, slots: usize) -> u32 {
        u32::try_from(self.services.len().div_ceil(slots.max(1))).unwrap_or(u32::MAX)
    }

    /// Returns how long a query may block, so that each service has its turn.
    pub(super) fn block_time(&self, slots: usize, wait: Duration) -> Duration {
        match self.rounds(slots) {
            0 | 1 => wait,
            rounds => (ROUND / rounds).clamp(SHORTEST, wait),
        }
    }

    /// Returns the longest time before a change is seen; `None` if changes are seen at once.
    pub(super) fn lateness(&self, slots: usize, wait: Duration) -> Option<Duration> {
        let rounds = self.rounds(slots);
        // Consul adds up to a sixteenth to the wait.
        (rounds > 1).then(|| self.block_time(slots, wait).mul_f64(17.0 / 16.0) * (rounds - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(services: usize) -> Plan {
        let now = Instant::now();
        let mut plan = Plan::new(&[], now);
        let listed = (0..services).map(|n| (format!("s{n:04}").parse().unwrap(), "s".into())).collect();
        plan.take_list(0, listed, Vec::new(), now);
        plan
    }

    #[tokio::test]
    async fn the_first_reads_are_bounded_and_each_service_has_its_turn() {
        let mut plan = plan(200);
        let now = Instant::now();
        let mut taken: Vec<ServiceKey> = Vec::new();
        while let Some(key) = plan.take_due(now, 1000) {
            taken.push(key);
        }
        assert_eq!(taken.len(), MAX_READS);
        assert_eq!(plan.next_due(1000), Some(plan.datacenters[0].cursor.due()));
        let mut observed = BTreeSet::new();
        while let Some(key) = taken.pop() {
            assert!(observed.insert(key.clone()), "{key:?} has had its turn");
            plan.end_query(&key);
            plan.services.get_mut(&key).unwrap().cursor.on_failure(now);
            plan.enqueue(&key);
            taken.extend(plan.take_due(now, 1000));
        }
        assert_eq!(observed.len(), 200);
    }

    #[tokio::test]
    async fn services_that_take_turns_wait_for_less() {
        let minute = Duration::from_secs(60);
        for (services, turn, late) in [(8, 60_000, None), (9, 5_000, Some(5_312)), (80, 1_000, Some(9_562))] {
            let plan = plan(services);
            assert_eq!(plan.block_time(8, minute).as_millis(), turn);
            assert_eq!(plan.lateness(8, minute).map(|late| late.as_millis()), late);
        }
        assert_eq!(plan(2000).block_time(8, minute), SHORTEST);
    }

    #[tokio::test]
    async fn nobody_is_asked_while_the_catalogue_cannot_be_read() {
        let mut plan = plan(3);
        plan.datacenters[0].failure = Some("down".into());
        assert_eq!(plan.take_due(Instant::now(), 1000), None);
        plan.datacenters[0].failure = None;
        plan.requeue_all(0);
        assert!(plan.take_due(Instant::now(), 1000).is_some());
    }

    #[tokio::test]
    async fn a_service_that_comes_back_while_its_query_is_under_way_is_not_asked_twice() {
        let mut plan = plan(1);
        let now = Instant::now();
        let key = plan.take_due(now, 10).unwrap();
        plan.take_list(0, BTreeMap::new(), Vec::new(), now);
        assert!(plan.services.is_empty());
        plan.take_list(0, BTreeMap::from([(key.1.clone(), "s".into())]), Vec::new(), now);
        assert_eq!(plan.take_due(now, 10), None);
        plan.end_query(&key);
        plan.enqueue(&key);
        assert_eq!(plan.take_due(now, 10), Some(key));
    }
}
