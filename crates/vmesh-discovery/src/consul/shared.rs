//! Follows services by shared blocking queries when connections are scarce.
//!
//! | shared query | causes reads of |
//! |---|---|
//! | `/v1/health/state/any` | services whose checks differ |
//! | `/v1/catalog/services` | services whose tags differ; after a new index without a difference, services with unchecked instances |
//! | neither | all services in turn ([`Sweep`]) |
//!
//! Such a service is read by its own query, and only that answer adds or removes instances.

use super::changes::{CheckChanges, CheckDigest};
use super::*;

/// The limit of concurrent reads. Together with the shared queries of a datacenter this stays below 20
/// connections.
const MAX_SCARCE_READS: usize = 14;
/// A change of the list and the change of checks that explains it arrive within this time of each other.
const SAME_CHANGE: Duration = Duration::from_millis(300);
/// The time that each mebibyte of checks adds to [`SAME_CHANGE`], since Consul has to serialize them.
const SAME_CHANGE_PER_MIB: Duration = Duration::from_millis(150);
/// The limit of services with unchecked instances that are read at once after a possible change. A larger
/// number of services is left to the sweep.
const MAX_UNCHECKED: usize = 64;
/// The pause that each mebibyte of checks causes, so that Consul spends at most about half its time on them.
const PAUSE_PER_MIB: Duration = Duration::from_millis(10);
/// The interval in which a change of the list may end such a pause once.
const HASTENS_EVERY: Duration = Duration::from_secs(1);
/// The first and the longest pause after answers without a difference, for example after checks that only
/// changed their output.
const FRUITLESS_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
const CHECKS: &str = "/v1/health/state/any";

/// All checks of a datacenter; `None` if the body equals the known one.
pub(super) struct ChecksAnswer {
    digest: Option<CheckDigest>,
    bytes: usize,
}

pub(super) async fn read_checks(
    client: &Client,
    query: &Query,
    known: Option<u64>,
    keys: &RandomState,
) -> Result<Answer<ChecksAnswer>, ConsulError> {
    let Answer { value, meta } = client.get_bytes(CHECKS, query).await?;
    let bytes = value.len();
    if known == Some(meta.hash) {
        return Ok(Answer { value: ChecksAnswer { digest: None, bytes }, meta });
    }
    // Parsing megabytes of JSON would block a worker of the runtime.
    let keys = keys.clone();
    let parsed = tokio::task::spawn_blocking(move || CheckDigest::parse(&value, &keys)).await;
    let parsed = parsed
        .map_err(|lost| client.bad_answer(CHECKS, format!("the task that reads it has failed: {lost}")))?;
    match parsed {
        Ok(digest) => Ok(Answer { value: ChecksAnswer { digest: Some(digest), bytes }, meta }),
        Err(wrong) => Err(client.bad_answer(CHECKS, wrong.to_string())),
    }
}

impl<R: Resolve> ConsulSource<R> {
    /// Returns the number of connections for reads of services.
    pub(super) fn read_slots(&self) -> usize {
        match self.plan.is_scarce {
            true => self.slots().saturating_sub(self.plan.datacenters.len()).clamp(1, MAX_SCARCE_READS),
            false => self.slots(),
        }
    }

    /// Chooses between a blocking query for each service and shared ones, as the connections allow.
    pub(super) fn choose_mode(&mut self, now: Instant) {
        let (slots, services) = (self.slots(), self.plan.services.len());
        // Sharing needs connections for the list and the checks of each datacenter, for a read, and for a
        // confirmation.
        let can_share = self.client.capacity() >= self.plan.datacenters.len() * 2 + 2;
        // The source returns to one query per service only well below the limit, so that the mode does not
        // flap.
        let enough = if self.plan.is_scarce { slots / 2 } else { slots };
        let is_scarce = can_share && services > enough;
        if is_scarce == self.plan.is_scarce {
            return;
        }
        self.plan.is_scarce = is_scarce;
        if is_scarce {
            let waiting = self.plan.blocking_queries();
            for (target, task) in self.query_targets.values() {
                if let QueryTarget::Service(key) = target
                    && waiting.contains(key)
                {
                    task.abort();
                }
            }
            self.sweep.start_round(services);
        }
        let keys: Vec<ServiceKey> = self.plan.services.keys().cloned().collect();
        for key in &keys {
            self.plan.enqueue(key);
        }
        self.schedule_view(now);
    }

    /// Sends the check queries that are due, and requests the next read of the sweep.
    pub(super) fn start_shared(&mut self, now: Instant) {
        if !self.plan.is_scarce {
            return;
        }
        let services = self.plan.services.len();
        for at in 0..self.plan.datacenters.len() {
            let Some(dc) = self.plan.datacenters.get_mut(at) else { continue };
            if dc.unexplained.is_some_and(|deadline| deadline <= now) {
                dc.unexplained = None;
                self.sweep.start_hurried_round(services, now);
            }
            if dc.needs_checks() && dc.checks.cursor.due() <= now {
                self.query_checks(at);
            }
        }
        let slots = self.read_slots();
        // While the checks cannot be read, the sweep starts over and over.
        if self.plan.datacenters.iter().any(|dc| dc.checks.failure.is_some()) {
            self.sweep.start_round(services);
        }
        if self.plan.has_room(slots, now)
            && let Some(key) = self.sweep.take(&self.plan.services, now)
        {
            self.plan.request_read(&key, false);
        }
    }

    /// Returns when the next read of the sweep is due, unless it waits for a read to end.
    pub(super) fn sweep_due(&self, now: Instant) -> Option<Instant> {
        let can_read = self.plan.is_scarce && self.plan.has_room(self.read_slots(), now);
        can_read.then(|| self.sweep.due(self.plan.services.len()))
    }

    fn query_checks(&mut self, at: usize) {
        let Some(dc) = self.plan.datacenters.get_mut(at) else { return };
        dc.checks.in_flight = true;
        let cursor = &dc.checks.cursor;
        let query = Query { datacenter: dc.name.clone(), ..self.pace.query(cursor, CATALOG_WAIT) };
        let was_strong = query.consistency != Consistency::Stale;
        let (client, known, keys) = (self.client.clone(), cursor.hash(), self.hash_keys.clone());
        let target = QueryTarget::Checks(at);
        let task = async move {
            let answer = QueryAnswer::Checks(read_checks(&client, &query, known, &keys).await);
            FinishedQuery { target: QueryTarget::Checks(at), was_strong, answer }
        };
        self.spawn_query(target, task);
    }

    pub(super) fn handle_checks(
        &mut self,
        at: usize,
        answer: Result<Answer<ChecksAnswer>, ConsulError>,
        was_strong: bool,
        now: Instant,
    ) {
        let max_stale = self.pace.max_stale;
        let Some(dc) = self.plan.datacenters.get_mut(at) else { return };
        dc.checks.in_flight = false;
        let Answer { value, meta } = match answer {
            Ok(answer) => answer,
            Err(error) => {
                self.checks_failed(at, &chain(&error), now);
                return;
            }
        };
        if !Self::accept_answer(&mut dc.checks.cursor, &meta, was_strong, max_stale, now, &self.counters) {
            return;
        }
        dc.checks.bytes = value.bytes;
        let had_failure = dc.checks.failure.take().is_some();
        let mut pause = PAUSE_PER_MIB.mul_f64(value.bytes as f64 / f64::from(1 << 20));
        let Some(digest) = value.digest else {
            if had_failure {
                self.schedule_view(now);
            }
            return;
        };
        let changes = dc.checks.digest.as_ref().map(|before| digest.changes_since(before));
        dc.checks.digest = Some(digest);
        if changes.as_ref().is_some_and(CheckChanges::is_empty) {
            let (first, longest) = FRUITLESS_PAUSE;
            pause = pause.max((first * 2u32.pow(dc.checks.unchanged_answers.min(6))).min(longest));
            dc.checks.unchanged_answers += 1;
        } else {
            dc.checks.unchanged_answers = 0;
        }
        dc.checks.cursor.postpone(now + pause);
        match changes {
            Some(changes) => self.handle_check_changes(at, &changes, now),
            // Services may have changed between their own read and this first answer.
            None => self.sweep.start_round(self.plan.services.len()),
        }
        if had_failure {
            self.sweep.start_round(self.plan.services.len());
            self.schedule_view(now);
        }
    }

    /// Records that the checks cannot be read. The sweep reads services in turn until they can.
    pub(super) fn checks_failed(&mut self, at: usize, failure: &str, now: Instant) {
        let Some(dc) = self.plan.datacenters.get_mut(at) else { return };
        dc.checks.in_flight = false;
        dc.checks.cursor.on_failure(now);
        // A failure is logged once, not on each retry.
        if dc.checks.failure.replace(failure.into()).is_none() {
            tracing::debug!("{}: {failure}", self.name);
        }
        self.schedule_view(now);
    }

    /// Requests a read of the services whose checks differ.
    fn handle_check_changes(&mut self, at: usize, changes: &CheckChanges, now: Instant) {
        let mut any = false;
        for name in changes.services.iter().filter_map(|name| name.parse::<ServiceName>().ok()) {
            let key = (at, name);
            any |= self.plan.services.contains_key(&key);
            self.plan.request_read(&key, true);
        }
        if changes.nodes {
            self.request_unchecked(at);
        }
        if any && let Some(dc) = self.plan.datacenters.get_mut(at) {
            dc.checks.read_requested_at = Some(now);
            dc.unexplained = None;
        }
    }

    /// Requests a read of each service with unchecked instances. If there are more than
    /// [`MAX_UNCHECKED`], the sweep reads them.
    fn request_unchecked(&mut self, at: usize) {
        let digest = self.plan.datacenters.get(at).and_then(|dc| dc.checks.digest.as_ref());
        let is_unchecked = |(key, watched): &(&ServiceKey, &WatchedService)| {
            let checked = digest.map_or(0, |digest| digest.checked_instances(key.1.as_str()));
            key.0 == at && watched.read.as_ref().is_some_and(|read| read.listed > checked)
        };
        let unchecked = self.plan.services.iter().filter(is_unchecked).map(|(key, _)| key.clone());
        let unchecked: Vec<ServiceKey> = unchecked.take(MAX_UNCHECKED + 1).collect();
        if unchecked.len() > MAX_UNCHECKED {
            self.sweep.start_round(self.plan.services.len());
            return;
        }
        for key in &unchecked {
            self.plan.request_read(key, false);
        }
    }

    /// Handles a new list of services. `has_moved` is set if its index changed.
    pub(super) fn handle_list_changes(
        &mut self,
        at: usize,
        difference: &ListDifference,
        has_moved: bool,
        now: Instant,
    ) {
        if !self.plan.is_scarce || !has_moved {
            return;
        }
        for name in &difference.retagged {
            self.plan.request_read(&(at, name.clone()), true);
        }
        // A second change may hide behind the visible one.
        self.sweep.start_round(self.plan.services.len());
        if difference.is_visible {
            return;
        }
        self.request_unchecked(at);
        let Some(dc) = self.plan.datacenters.get_mut(at) else { return };
        let mebibytes = dc.checks.bytes as f64 / f64::from(1 << 20);
        let same_change = SAME_CHANGE + SAME_CHANGE_PER_MIB.mul_f64(mebibytes);
        if dc.checks.read_requested_at.is_none_or(|pointed| now > pointed + SAME_CHANGE) {
            dc.unexplained.get_or_insert(now + same_change);
            let is_paused = !dc.checks.in_flight && dc.checks.failure.is_none();
            if is_paused && dc.checks.hastened_at.is_none_or(|at| now > at + HASTENS_EVERY) {
                dc.checks.hastened_at = Some(now);
                dc.checks.cursor.hasten(now);
            }
        }
    }

    /// Returns a problem for the operator if changes are seen late.
    pub(super) fn lateness_problem(&self) -> Option<String> {
        let services = self.plan.services.len();
        if !self.plan.is_scarce {
            let slots = self.slots();
            let late = self.plan.lateness(slots, self.config.wait)?.as_secs_f64().ceil();
            return Some(format!(
                "{services} services take turns on {slots} connections in plaintext, so a change is seen up to {late} s \
                 late: use `https://` addresses, which need few connections, or raise `max_connections` here and \
                 `http_max_conns_per_client` of Consul",
            ));
        }
        let failure = self.plan.datacenters.iter().find_map(|dc| dc.checks.failure.as_ref())?;
        let late = Sweep::lateness(services).as_secs();
        Some(format!(
            "Consul does not list the checks of all services, so a change of one of {services} services is seen up to \
             {late} s late: {failure}"
        ))
    }
}
