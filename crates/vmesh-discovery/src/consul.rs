//! The Consul source: blocking queries for the catalogue and for each wanted service.
//!
//! | event | reaction |
//! |---|---|
//! | the catalogue of a datacenter answers | starts and stops watching services |
//! | the health of a service answers | updates that service alone |
//! | a query is due | sends it, in a task of its own |
//! | a host name resolves to other addresses | updates the endpoints |
//!
//! An error affects as little as possible. A service that cannot be read keeps its last good state. A
//! catalogue that cannot be read, or that is empty, is a failure of the source: Consul always lists at least
//! itself, but gives a token without rights an empty list instead of an error.
//!
//! | module | content |
//! |---|---|
//! | `plan` | which services are watched, and which query is due next |
//! | `answers` | handles each answer of Consul |
//! | `shared`, `changes` | blocking queries shared by many services, and the differences between their answers |
//! | `statement` | the statement of the source about each service |
//!
//! Over TLS, all services are watched at once on few connections (HTTP/2). In plaintext each watch occupies a
//! connection, so with more services than connections they share blocking queries (module `shared`).

mod answers;
mod changes;
pub mod config;
mod plan;
mod shared;
mod statement;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};
use vmesh_consul::{
    Answer, Client, Consistency, ConsulError, Cursor, ErrorKind, Meta, Query, Verdict, WatchOptions, escaped,
};
use vmesh_model::{Place, Problem, Registration, ServiceName};

use crate::assemble::{Assembler, FIRST_NAMES, ServiceContent, ServiceStatement, Statement};
use crate::format::consul::{InstanceRules, ServiceInstances, combine, read, restored_instances};
use crate::format::{ParsedService, subject_of};
use crate::resolve::{Resolve, SystemResolver};
use crate::source::{Counters, Registrations, Source, SourceError, chain};
use changes::{ListDifference, Sweep};
pub use config::ConsulConfig;
use plan::{Datacenter, Plan, QueryTarget, ServiceKey, WatchedService};
use shared::ChecksAnswer;

/// The time that the first view waits for a datacenter that cannot be read and has no last good state:
/// without it every proxy would lose the endpoints of that datacenter.
const FIRST_DATACENTERS: Duration = Duration::from_secs(30);
/// Changes within this time become one view.
const SETTLE: Duration = Duration::from_millis(15);
/// The wait of catalogue queries. It is shorter than `wait`, because a catalogue query without an answer
/// reveals an outage.
const CATALOG_WAIT: Duration = Duration::from_secs(30);
/// The limit of concurrent reads for one confirmation.
const MAX_CONFIRMING_READS: usize = 16;
/// The delay before a listed service without instances is read again. A second empty answer is reported as a
/// problem; a single one may come from a service that is being deregistered.
const EMPTY_AGAIN: Duration = Duration::from_secs(1);
/// The limit of the bytes of all answers that are kept: enough for the health of 200,000 instances.
const MAX_KEPT: usize = 256 << 20;
/// The rights that a token needs, for messages.
const RIGHTS: &str = "the token needs `service_prefix \"\" { policy = \"read\" }` and `node_prefix \"\" { policy = \"read\" }`";

/// A source that reads services from Consul.
pub struct ConsulSource<R = SystemResolver> {
    name: Arc<str>,
    config: ConsulConfig,
    rules: Arc<InstanceRules>,
    pace: WatchOptions,
    client: Client,
    counters: Arc<Counters>,
    plan: Plan,
    queries: JoinSet<FinishedQuery>,
    /// The target of each running query, by task.
    query_targets: HashMap<tokio::task::Id, (QueryTarget, AbortHandle)>,
    /// Reads all services in turn when they have no blocking queries of their own.
    sweep: Sweep,
    /// The random keys of the hashes that compare answers, so that no client can provoke a collision.
    hash_keys: RandomState,
    assembler: Assembler<R>,
    /// The services from before a restart.
    last_good: BTreeMap<ServiceName, Arc<Registration>>,
    parsed: BTreeMap<ServiceName, Arc<ParsedService>>,
    problems: BTreeMap<ServiceName, Vec<Problem>>,
    /// Services without a usable answer and without a last good state, with the reason.
    unusable: BTreeMap<ServiceName, Arc<str>>,
    left_out: BTreeMap<ServiceName, Arc<str>>,
    statement: Statement,
    started: Instant,
    /// Since when the first view has been waiting for host names.
    first_names: Option<Instant>,
    view_at: Option<Instant>,
    /// The total size of the kept answers in bytes, and its limit.
    kept_bytes: usize,
    max_kept: usize,
    last_view: Option<Registrations>,
    /// The catalogue could not be read, so the next view is returned even if it equals the one before.
    has_failed: bool,
}

/// The result of one query.
struct FinishedQuery {
    target: QueryTarget,
    was_strong: bool,
    answer: QueryAnswer,
}

enum QueryAnswer {
    /// The services and their tags; `None` if the body equals the known one.
    Catalog(Result<Answer<Option<CatalogNames>>, ConsulError>),
    Checks(Result<Answer<ChecksAnswer>, ConsulError>),
    Service(ServiceAnswer),
}

/// `None` if the body equals the known one.
type ServiceAnswer = Result<Answer<Option<ServiceInstances>>, ConsulError>;
type CatalogNames = BTreeMap<String, Option<Vec<String>>>;

impl ConsulSource {
    /// Creates a Consul source. `last_good` is the view from before a restart; it is used for services that
    /// cannot be read now.
    pub fn new(
        config: ConsulConfig,
        last_good: Option<&Registrations>,
        counters: Arc<Counters>,
    ) -> ConsulSource {
        ConsulSource::with_resolver(config, last_good, counters, SystemResolver)
    }
}

impl<R: Resolve> ConsulSource<R> {
    pub fn with_resolver(
        config: ConsulConfig,
        last_good: Option<&Registrations>,
        counters: Arc<Counters>,
        resolver: R,
    ) -> ConsulSource<R> {
        let name = config.name();
        let assembler = Assembler::new(name.clone(), resolver, config.resolve_interval, last_good);
        let known = last_good.into_iter().flat_map(|last_good| &last_good.services);
        ConsulSource {
            rules: Arc::new(config.instance_rules()),
            pace: config.pace(),
            client: Client::new(&config.client()),
            counters,
            plan: Plan::new(&config.datacenters, Instant::now()),
            queries: JoinSet::new(),
            query_targets: HashMap::new(),
            sweep: Sweep::new(Instant::now()),
            hash_keys: RandomState::new(),
            assembler,
            last_good: known
                .map(|(name, service_view)| (name.clone(), service_view.registration.clone()))
                .collect(),
            parsed: BTreeMap::new(),
            problems: BTreeMap::new(),
            unusable: BTreeMap::new(),
            left_out: BTreeMap::new(),
            statement: Statement::default(),
            started: Instant::now(),
            first_names: None,
            view_at: None,
            kept_bytes: 0,
            max_kept: MAX_KEPT,
            last_view: None,
            has_failed: false,
            name,
            config,
        }
    }

    /// Returns the number of connections for services. The others are reserved for catalogues and
    /// confirmations.
    fn slots(&self) -> usize {
        let capacity = self.client.capacity();
        capacity.saturating_sub((capacity / 4).clamp(1, 8) + self.plan.datacenters.len()).max(1)
    }

    /// Sends every query that is due.
    fn start_due(&mut self, now: Instant) {
        for at in 0..self.plan.datacenters.len() {
            if self.plan.datacenters.get(at).is_some_and(|dc| !dc.in_flight && dc.cursor.due() <= now) {
                self.query_catalog(at);
            }
        }
        self.choose_mode(now);
        self.start_shared(now);
        let slots = self.read_slots();
        let wait = self.plan.block_time(slots, self.config.wait);
        while let Some(key) = self.plan.take_due(now, slots) {
            self.query_service(key, wait);
        }
    }

    fn query_catalog(&mut self, at: usize) {
        let Some(dc) = self.plan.datacenters.get_mut(at) else { return };
        dc.in_flight = true;
        let query = Query { datacenter: dc.name.clone(), ..self.pace.query(&dc.cursor, CATALOG_WAIT) };
        let was_strong = query.consistency != Consistency::Stale;
        let (client, known) = (self.client.clone(), dc.cursor.hash());
        let target = QueryTarget::Catalog(at);
        let task = async move {
            FinishedQuery {
                target: QueryTarget::Catalog(at),
                was_strong,
                answer: QueryAnswer::Catalog(read_catalog(&client, &query, known).await),
            }
        };
        self.spawn_query(target, task);
    }

    fn spawn_query(
        &mut self,
        target: QueryTarget,
        task: impl Future<Output = FinishedQuery> + Send + 'static,
    ) {
        let task = self.queries.spawn(task);
        self.query_targets.insert(task.id(), (target, task));
    }

    fn query_service(&mut self, key: ServiceKey, wait: Duration) {
        let Some(watched) = self.plan.services.get_mut(&key) else { return };
        watched.must_be_newer = std::mem::take(&mut watched.expects_news);
        let Some(watched) = self.plan.services.get(&key) else { return };
        let datacenter = self.plan.datacenters.get(key.0).and_then(|dc| dc.name.clone());
        let query = Query { datacenter, ..self.pace.query(&watched.cursor, wait) };
        let was_strong = query.consistency != Consistency::Stale;
        let reader = self.reader(&key.1, watched);
        let target = QueryTarget::Service(key.clone());
        let task = async move {
            FinishedQuery {
                target: QueryTarget::Service(key),
                was_strong,
                answer: QueryAnswer::Service(reader.read(&query).await),
            }
        };
        self.spawn_query(target, task);
    }

    fn reader(&self, name: &ServiceName, watched: &WatchedService) -> ServiceReader {
        ServiceReader {
            client: self.client.clone(),
            rules: self.rules.clone(),
            source: self.name.clone(),
            name: name.clone(),
            path: format!("/v1/health/service/{}", escaped(&watched.spelling)),
            known: watched.cursor.hash(),
        }
    }

    fn handle_answer(&mut self, outcome: FinishedQuery, now: Instant) -> Result<(), SourceError> {
        let FinishedQuery { target, was_strong, answer } = outcome;
        match (target, answer) {
            (QueryTarget::Catalog(at), QueryAnswer::Catalog(answer)) => {
                self.handle_catalog(at, answer, was_strong, now)
            }
            (QueryTarget::Checks(at), QueryAnswer::Checks(answer)) => {
                self.handle_checks(at, answer, was_strong, now);
                Ok(())
            }
            (QueryTarget::Service(key), QueryAnswer::Service(answer)) => {
                self.plan.end_query(&key);
                self.handle_service(&key, answer, was_strong, now);
                self.plan.enqueue(&key);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Handles a query whose task panicked, like any failed query.
    fn handle_panic(&mut self, target: Option<QueryTarget>, now: Instant) -> Result<(), SourceError> {
        match target {
            Some(QueryTarget::Catalog(at)) => {
                let failure = "the task that reads it has failed".to_owned();
                if let Some(dc) = self.plan.datacenters.get_mut(at) {
                    dc.cursor.on_failure(now);
                }
                self.catalog_failed(at, failure.clone(), failure.into())
            }
            Some(QueryTarget::Checks(at)) => {
                self.checks_failed(at, "the task that reads them has failed", now);
                Ok(())
            }
            Some(QueryTarget::Service(key)) => {
                self.plan.end_query(&key);
                if let Some(watched) = self.plan.services.get_mut(&key) {
                    watched.cursor.on_failure(now);
                    watched.failures += 1;
                    watched.failure = Some("the task that reads it has failed".into());
                }
                self.plan.enqueue(&key);
                self.update_service(&key.1);
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn copy_counters(&self) {
        let (theirs, ours) = (self.client.counters(), &self.counters);
        let copy = |from: &std::sync::atomic::AtomicU64, to: &std::sync::atomic::AtomicU64| {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        };
        copy(&theirs.requests, &ours.reads);
        copy(&theirs.failures, &ours.failed_reads);
        copy(&theirs.connects, &ours.connects);
        copy(&theirs.connections, &ours.connections);
    }

    /// Returns when work is due without any answer.
    fn wake_at(&mut self, now: Instant) -> Instant {
        let names = self.assembler.start_lookups();
        let query = self.plan.next_due(self.read_slots());
        let sweep = self.sweep_due(now);
        let is_first = |at: &Instant| self.last_view.is_none() && *at > now;
        let first_names = self.first_names.map(|since| since + FIRST_NAMES).filter(is_first);
        let first_datacenters = Some(self.started + FIRST_DATACENTERS).filter(is_first);
        let never = now + Duration::from_secs(3600);
        [names, query, sweep, first_names, first_datacenters, self.view_at]
            .into_iter()
            .flatten()
            .fold(never, Instant::min)
    }

    /// Reads the catalogue of a datacenter and the services in `wanted` with the consistency `consistent`.
    async fn confirm_in(&mut self, at: usize, wanted: &BTreeSet<ServiceName>) -> Result<(), SourceError> {
        let datacenter = self.plan.datacenters.get(at).and_then(|dc| dc.name.clone());
        let query = Query { consistency: Consistency::Consistent, datacenter, ..Query::default() };
        let answer = read_catalog(&self.client, &query, None).await;
        let in_flight = self.plan.datacenters.get(at).is_some_and(|dc| dc.in_flight);
        let heard = self.handle_catalog(at, answer, true, Instant::now());
        if let Some(dc) = self.plan.datacenters.get_mut(at) {
            dc.in_flight = in_flight;
        }
        heard?;
        if let Some(failure) = self.plan.datacenters.get(at).and_then(|dc| dc.failure.clone()) {
            return Err(SourceError::Suspect {
                source_name: self.name.clone(),
                suspicion: failure.to_string(),
            });
        }
        let mut left: Vec<ServiceKey> = wanted.iter().map(|name| (at, name.clone())).collect();
        let mut reads: JoinSet<(ServiceKey, ServiceAnswer)> = JoinSet::new();
        loop {
            while reads.len() < MAX_CONFIRMING_READS
                && let Some(key) = left.pop()
            {
                let Some(watched) = self.plan.services.get(&key) else { continue };
                let reader = ServiceReader { known: None, ..self.reader(&key.1, watched) };
                let query = query.clone();
                reads.spawn(async move { (key, reader.read(&query).await) });
            }
            let Some(done) = reads.join_next().await else { return Ok(()) };
            let (key, answer) = done.map_err(|lost| self.failed("read a service", lost))?;
            if let Err(error) = &answer {
                return Err(self.failed(&format!("read service `{}` again", key.1), error.clone()));
            }
            // A confirmation repeats an earlier answer, so an empty service counts as empty before.
            if let Some(watched) = self.plan.services.get_mut(&key) {
                watched.empty_answers = watched.empty_answers.max(1);
            }
            self.handle_service(&key, answer, true, Instant::now());
            self.plan.enqueue(&key);
        }
    }

    fn failed(
        &self,
        action: &str,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> SourceError {
        SourceError::Failed { source_name: self.name.clone(), action: action.to_owned(), cause: cause.into() }
    }
}

impl<R: Resolve> Source for ConsulSource<R> {
    async fn next(&mut self) -> Result<Registrations, SourceError> {
        loop {
            let now = Instant::now();
            self.start_due(now);
            if self.view_at.is_some_and(|at| at <= now) {
                self.view_at = None;
                if let Some(view) = self.view(now)? {
                    return Ok(view);
                }
            }
            let due = self.wake_at(now);
            tokio::select! {
                Some(done) = self.queries.join_next_with_id() => {
                    self.copy_counters();
                    let now = Instant::now();
                    match done {
                        Ok((id, outcome)) => {
                            self.query_targets.remove(&id);
                            if let QueryAnswer::Service(Ok(Answer { value: Some(read), .. })) = &outcome.answer {
                                self.counters.bad_records.fetch_add(read.bad(), Ordering::Relaxed);
                            }
                            self.handle_answer(outcome, now)?;
                        }
                        Err(lost) => {
                            let target = self.query_targets.remove(&lost.id()).map(|(target, _)| target);
                            match target {
                                // The query was cancelled because its connection is needed for shared
                                // queries.
                                Some(QueryTarget::Service(key)) if lost.is_cancelled() => {
                                    self.plan.end_query(&key);
                                    self.plan.enqueue(&key);
                                }
                                target => {
                                    tracing::error!("{}: {lost}", self.name);
                                    self.handle_panic(target, now)?;
                                }
                            }
                        }
                    }
                }
                () = self.assembler.changed() => self.view_at = Some(Instant::now()),
                () = sleep_until(due) => {
                    if self.last_view.is_none() {
                        self.schedule_view(Instant::now());
                    }
                }
            }
        }
    }

    async fn confirm(&mut self, services: &BTreeSet<ServiceName>) -> Result<Registrations, SourceError> {
        for at in 0..self.plan.datacenters.len() {
            self.confirm_in(at, services).await?;
        }
        self.copy_counters();
        let now = Instant::now();
        match (self.view(now)?, &self.last_view) {
            (Some(view), _) => Ok(view),
            (None, Some(last_view)) => Ok(last_view.clone()),
            (None, None) => Err(SourceError::Suspect {
                source_name: self.name.clone(),
                suspicion: "not every service has been read yet".to_owned(),
            }),
        }
    }
}

/// Everything that a task needs to read one service.
struct ServiceReader {
    client: Client,
    rules: Arc<InstanceRules>,
    source: Arc<str>,
    name: ServiceName,
    path: String,
    /// The hash of the known body.
    known: Option<u64>,
}

impl ServiceReader {
    async fn read(&self, query: &Query) -> ServiceAnswer {
        let Answer { value, meta } = self.client.get_bytes(&self.path, query).await?;
        if self.known == Some(meta.hash) {
            return Ok(Answer { value: None, meta });
        }
        match read(&value, &self.source, &self.name, meta.translated, &self.rules) {
            Ok(read) => Ok(Answer { value: Some(read), meta }),
            Err(wrong) => Err(self.client.bad_answer(&self.path, wrong)),
        }
    }
}

async fn read_catalog(
    client: &Client,
    query: &Query,
    known: Option<u64>,
) -> Result<Answer<Option<CatalogNames>>, ConsulError> {
    const PATH: &str = "/v1/catalog/services";
    let Answer { value, meta } = client.get_bytes(PATH, query).await?;
    if known == Some(meta.hash) {
        return Ok(Answer { value: None, meta });
    }
    match serde_json::from_slice::<Option<CatalogNames>>(&value) {
        Ok(names) => Ok(Answer { value: Some(names.unwrap_or_default()), meta }),
        Err(wrong) => Err(client.bad_answer(PATH, wrong.to_string())),
    }
}

#[cfg(test)]
mod tests;
