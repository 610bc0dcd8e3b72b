//! Discovery by Consul: blocking queries for the catalogue and for each wanted service.
//!
//! | wakes on | does |
//! |---|---|
//! | the catalogue of a datacenter | begins and ends watches of services |
//! | the health of a service | reads that service, and nothing else |
//! | a query that is due | asks, in a task of its own |
//! | a name that resolves to something else | puts the addresses in |
//!
//! What goes wrong costs as little as possible. A service that cannot be read keeps what was last good of it. A
//! catalogue that cannot be read, or that says that there is nothing at all, is a failure of the source: Consul lists at
//! least itself, and answers whoever has no rights with a success and an empty list.
//!
//! Over TLS all services are watched at once, on few connections (HTTP/2). In plaintext each watch keeps a connection,
//! so with more services than connections they share blocking queries (the module `shared`).

mod changes;
pub mod config;
mod plan;
mod shared;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};
use vmesh_consul::{
    Answer, Client, Consistency, ConsulError, Cursor, ErrorKind, Meta, Pace, Query, Verdict, escaped,
};
use vmesh_model::{Place, Problem, Registration, ServiceName};

use crate::assemble::{Assembler, FIRST_NAMES, Known, Statement, Told};
use crate::format::consul::{Read, Rules, combine, read, remembered};
use crate::format::{ParsedService, subject_of};
use crate::resolve::{Resolve, SystemResolver};
use crate::source::{Counters, Registrations, Source, SourceError, chain};
use changes::{ListDifference, Sweep};
pub use config::ConsulConfig;
use plan::{Ask, Datacenter, Key, Plan, Watched};
use shared::ChecksAnswer;

/// How long the first view waits for a datacenter that cannot be read and of which nothing is known from before: without
/// it every proxy that has endpoints there would lose them.
const FIRST_DATACENTERS: Duration = Duration::from_secs(30);
/// News that come so close together are one view.
const SETTLE: Duration = Duration::from_millis(15);
/// The catalogue is asked more often than `wait` says: it is how one notices that nobody answers any more.
const CATALOG_WAIT: Duration = Duration::from_secs(30);
/// Reads under way at once that a confirmation may add.
const CONFIRM_AT_ONCE: usize = 16;
/// A service that is listed without instances is asked for again after so long, before that is called strange: it may
/// just be going.
const EMPTY_AGAIN: Duration = Duration::from_secs(1);
/// All answers that are kept had no more bytes than this together: the health of 200,000 instances.
const MAX_KEPT: usize = 256 << 20;
/// What a token needs, in messages.
const RIGHTS: &str = "the token needs `service_prefix \"\" { policy = \"read\" }` and `node_prefix \"\" { policy = \"read\" }`";

/// Reads services from Consul.
pub struct ConsulSource<R = SystemResolver> {
    name: Arc<str>,
    config: ConsulConfig,
    rules: Arc<Rules>,
    pace: Pace,
    client: Client,
    counters: Arc<Counters>,
    plan: Plan,
    asks: JoinSet<Outcome>,
    /// Who is asked by which task.
    asked: HashMap<tokio::task::Id, (Ask, AbortHandle)>,
    /// Reads all services in turn, where they have no blocking queries of their own.
    sweep: Sweep,
    /// The keys of the hashes by which answers are compared, which nobody can guess.
    hash_keys: RandomState,
    assembler: Assembler<R>,
    /// What was known before a restart.
    last_good: BTreeMap<ServiceName, Arc<Registration>>,
    parsed: BTreeMap<ServiceName, Arc<ParsedService>>,
    problems: BTreeMap<ServiceName, Vec<Problem>>,
    /// Services of which nothing can be used and nothing is known from before, and why.
    unusable: BTreeMap<ServiceName, Arc<str>>,
    left_out: BTreeMap<ServiceName, Arc<str>>,
    statement: Statement,
    started: Instant,
    /// Since when the first view waits for names.
    first_names: Option<Instant>,
    settle_at: Option<Instant>,
    /// How many bytes the answers had that are kept, and how many they may have.
    kept_bytes: usize,
    max_kept: usize,
    told: Option<Registrations>,
    /// The catalogue could not be read, so the next view is news whatever it says.
    has_failed: bool,
}

/// What came of one query.
struct Outcome {
    ask: Ask,
    was_strong: bool,
    what: What,
}

enum What {
    /// Every service and its tags; `None` if the body is the one that is known.
    Catalog(Result<Answer<Option<Names>>, ConsulError>),
    Checks(Result<Answer<ChecksAnswer>, ConsulError>),
    Service(ServiceAnswer),
}

/// `None` if the body is the one that is known.
type ServiceAnswer = Result<Answer<Option<Read>>, ConsulError>;
type Names = BTreeMap<String, Option<Vec<String>>>;

impl ConsulSource {
    /// `last_good` is what was known before a restart: it holds for what cannot be read now.
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
            rules: Arc::new(Rules::of(&config)),
            pace: config.pace(),
            client: Client::new(&config.client()),
            counters,
            plan: Plan::new(&config.datacenters, Instant::now()),
            asks: JoinSet::new(),
            asked: HashMap::new(),
            sweep: Sweep::new(Instant::now()),
            hash_keys: RandomState::new(),
            assembler,
            last_good: known.map(|(name, seen)| (name.clone(), seen.registration.clone())).collect(),
            parsed: BTreeMap::new(),
            problems: BTreeMap::new(),
            unusable: BTreeMap::new(),
            left_out: BTreeMap::new(),
            statement: Statement::default(),
            started: Instant::now(),
            first_names: None,
            settle_at: None,
            kept_bytes: 0,
            max_kept: MAX_KEPT,
            told: None,
            has_failed: false,
            name,
            config,
        }
    }

    /// The connections that services may use; some are left for the catalogues and for confirmations.
    fn slots(&self) -> usize {
        let capacity = self.client.capacity();
        capacity.saturating_sub((capacity / 4).clamp(1, 8) + self.plan.datacenters.len()).max(1)
    }

    /// Asks whatever is due.
    fn start_due(&mut self, now: Instant) {
        for at in 0..self.plan.datacenters.len() {
            if self.plan.datacenters.get(at).is_some_and(|dc| !dc.in_flight && dc.cursor.due() <= now) {
                self.ask_catalog(at);
            }
        }
        self.choose_mode(now);
        self.start_shared(now);
        let slots = self.read_slots();
        let wait = self.plan.turn(slots, self.config.wait);
        while let Some(key) = self.plan.take_due(now, slots) {
            self.ask_service(key, wait);
        }
    }

    fn ask_catalog(&mut self, at: usize) {
        let Some(dc) = self.plan.datacenters.get_mut(at) else { return };
        dc.in_flight = true;
        let query = Query { datacenter: dc.name.clone(), ..self.pace.query(&dc.cursor, CATALOG_WAIT) };
        let was_strong = query.consistency != Consistency::Stale;
        let (client, known) = (self.client.clone(), dc.cursor.hash());
        let ask = Ask::Catalog(at);
        let task = async move {
            Outcome {
                ask: Ask::Catalog(at),
                was_strong,
                what: What::Catalog(read_catalog(&client, &query, known).await),
            }
        };
        self.spawn(ask, task);
    }

    fn spawn(&mut self, ask: Ask, task: impl Future<Output = Outcome> + Send + 'static) {
        let task = self.asks.spawn(task);
        self.asked.insert(task.id(), (ask, task));
    }

    fn ask_service(&mut self, key: Key, wait: Duration) {
        let Some(watched) = self.plan.services.get_mut(&key) else { return };
        watched.must_be_newer = std::mem::take(&mut watched.expects_news);
        let Some(watched) = self.plan.services.get(&key) else { return };
        let datacenter = self.plan.datacenters.get(key.0).and_then(|dc| dc.name.clone());
        let query = Query { datacenter, ..self.pace.query(&watched.cursor, wait) };
        let was_strong = query.consistency != Consistency::Stale;
        let reader = self.reader(&key.1, watched);
        let ask = Ask::Service(key.clone());
        let task = async move {
            Outcome { ask: Ask::Service(key), was_strong, what: What::Service(reader.read(&query).await) }
        };
        self.spawn(ask, task);
    }

    fn reader(&self, name: &ServiceName, watched: &Watched) -> ServiceReader {
        ServiceReader {
            client: self.client.clone(),
            rules: self.rules.clone(),
            source: self.name.clone(),
            name: name.clone(),
            path: format!("/v1/health/service/{}", escaped(&watched.spelling)),
            known: watched.cursor.hash(),
        }
    }

    fn done(&mut self, outcome: Outcome, now: Instant) -> Result<(), SourceError> {
        let Outcome { ask, was_strong, what } = outcome;
        match (ask, what) {
            (Ask::Catalog(at), What::Catalog(answer)) => self.heard_catalog(at, answer, was_strong, now),
            (Ask::Checks(at), What::Checks(answer)) => {
                self.heard_checks(at, answer, was_strong, now);
                Ok(())
            }
            (Ask::Service(key), What::Service(answer)) => {
                self.plan.back(&key);
                self.heard_service(&key, answer, was_strong, now);
                self.plan.enqueue(&key);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// A query that panicked has failed like any other.
    fn lost(&mut self, ask: Option<Ask>, now: Instant) -> Result<(), SourceError> {
        match ask {
            Some(Ask::Catalog(at)) => {
                let failure = "the task that reads it has failed".to_owned();
                if let Some(dc) = self.plan.datacenters.get_mut(at) {
                    dc.cursor.failed(now);
                }
                self.catalog_failed(at, failure.clone(), failure.into())
            }
            Some(Ask::Checks(at)) => {
                self.checks_failed(at, "the task that reads them has failed", now);
                Ok(())
            }
            Some(Ask::Service(key)) => {
                self.plan.back(&key);
                if let Some(watched) = self.plan.services.get_mut(&key) {
                    watched.cursor.failed(now);
                    watched.failures += 1;
                    watched.failure = Some("the task that reads it has failed".into());
                }
                self.plan.enqueue(&key);
                self.judge(&key.1);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Takes the cursor's word on an answer; `false`: it is not to be believed.
    fn believe(
        cursor: &mut Cursor,
        meta: &Meta,
        was_strong: bool,
        max_stale: Duration,
        now: Instant,
        counters: &Counters,
    ) -> bool {
        let mut resets = 0;
        let verdict = cursor.took(meta, was_strong, max_stale, now, &mut resets);
        counters.index_resets.fetch_add(resets, Ordering::Relaxed);
        match verdict {
            Verdict::Doubtful(doubt) => {
                tracing::debug!("{doubt}: the leader is asked");
                false
            }
            Verdict::News | Verdict::Same => {
                counters.answered_now();
                true
            }
        }
    }

    fn heard_catalog(
        &mut self,
        at: usize,
        answer: Result<Answer<Option<Names>>, ConsulError>,
        was_strong: bool,
        now: Instant,
    ) -> Result<(), SourceError> {
        let max_stale = self.pace.max_stale;
        let Some(dc) = self.plan.datacenters.get_mut(at) else { return Ok(()) };
        dc.in_flight = false;
        let Answer { value, meta } = match answer {
            Ok(answer) if is_outdated(&dc.cursor, &answer) => {
                dc.cursor.start_over(now);
                return Ok(());
            }
            Ok(answer) => answer,
            Err(error) => {
                dc.cursor.failed(now);
                let failure = chain(&error);
                return self.catalog_failed(at, failure, error.into());
            }
        };
        let seen = dc.cursor.seen();
        if !Self::believe(&mut dc.cursor, &meta, was_strong, max_stale, now, &self.counters) {
            return Ok(());
        }
        let has_moved = seen > 0 && dc.cursor.seen() != seen;
        let mut difference = ListDifference::default();
        dc.filtered = meta.filtered;
        match value {
            Some(names) if names.is_empty() => {
                dc.empty = true;
                // It has to be looked at again, also if it stays as it is: nothing was learnt.
                dc.cursor.failed(now);
                return self.catalog_empty(at);
            }
            Some(names) => {
                dc.empty = false;
                difference = self.list(at, names, now);
            }
            None if dc.empty => {
                dc.cursor.failed(now);
                return self.catalog_empty(at);
            }
            None => {}
        }
        self.follow_list(at, &difference, has_moved, now);
        let Some(dc) = self.plan.datacenters.get_mut(at) else { return Ok(()) };
        if dc.failure.take().is_some() {
            self.plan.unpark(at);
            self.judge_all();
        }
        Ok(())
    }

    /// A datacenter of which nothing can be said. If that is all of them, the source has failed.
    fn catalog_failed(
        &mut self,
        at: usize,
        failure: String,
        cause: Box<dyn std::error::Error + Send + Sync>,
    ) -> Result<(), SourceError> {
        let refused =
            cause.downcast_ref::<ConsulError>().is_some_and(|e| matches!(e.kind, ErrorKind::Forbidden(_)));
        let hint = if refused { format!(" ({RIGHTS})") } else { String::new() };
        let of = self.shown(at);
        if let Some(dc) = self.plan.datacenters.get_mut(at) {
            dc.in_flight = false;
            let failure = format!("Consul does not list the services{of}{hint}: {failure}");
            dc.failure = Some(failure.into());
        }
        self.judge_all();
        if self.plan.datacenters.iter().all(|dc| dc.failure.is_some()) {
            self.has_failed = true;
            let what = format!("list the services{of}{hint}");
            return Err(SourceError::Failed { source_name: self.name.clone(), what, cause });
        }
        Ok(())
    }

    /// Not even itself: no Consul is like that, but this is what it says to whoever has no rights.
    fn catalog_empty(&mut self, at: usize) -> Result<(), SourceError> {
        let of = self.shown(at);
        let what = format!(
            "Consul lists no service{of}, not even itself: it answers so if the token may not read. {RIGHTS}; see \
             `token_file`, and `consul acl token read -self`"
        );
        if let Some(dc) = self.plan.datacenters.get_mut(at) {
            dc.failure = Some(what.as_str().into());
        }
        self.judge_all();
        if self.plan.datacenters.iter().all(|dc| dc.failure.is_some()) {
            self.has_failed = true;
            return Err(SourceError::Suspect { source_name: self.name.clone(), what });
        }
        Ok(())
    }

    /// ` of dc1`, where it is one of those that were named.
    fn shown(&self, at: usize) -> String {
        let name = self.plan.datacenters.get(at).and_then(|dc| dc.name.as_ref());
        name.map(|name| format!(" of `{name}`")).unwrap_or_default()
    }

    /// Takes note of the services of a datacenter.
    fn list(&mut self, at: usize, names: Names, now: Instant) -> ListDifference {
        let is_first = self.plan.datacenters.get(at).is_some_and(|dc| !dc.has_listed);
        let mut listed: BTreeMap<ServiceName, Arc<str>> = BTreeMap::new();
        let mut problems = Vec::new();
        let mut all_tags = BTreeMap::new();
        for (spelling, tags) in names {
            let lower = spelling.to_lowercase();
            if !self.config.services.has(&lower) || !self.rules.may_want(tags.as_deref().unwrap_or_default())
            {
                continue;
            }
            match lower.parse::<ServiceName>() {
                Ok(name) => {
                    let mut tags = tags.unwrap_or_default();
                    tags.sort_unstable();
                    all_tags.insert(name.clone(), self.hash_keys.hash_one(tags));
                    _ = listed.entry(name).or_insert_with(|| spelling.into());
                }
                Err(wrong) => {
                    let place = Place::file(self.name.clone());
                    let message = format!(
                        "{wrong}; this service is left out, `services.exclude` takes it off this list"
                    );
                    problems.push(Problem::new(place, self.name.clone(), message));
                }
            }
        }
        let difference = match self.plan.datacenters.get_mut(at) {
            Some(dc) => {
                let before = std::mem::replace(&mut dc.tags, all_tags);
                ListDifference::between(&before, &dc.tags)
            }
            None => ListDifference::default(),
        };
        let mut changed = self.plan.list(at, listed, problems, now);
        self.count_kept();
        if is_first {
            for name in self.hidden(at) {
                self.plan.watch_hidden(at, &name, now);
                changed.push(name);
            }
        }
        if self.plan.datacenters.iter().all(|dc| dc.has_listed) {
            // What none of them lists is gone: it is not to come back from before a restart when it cannot be read.
            let plan = &self.plan;
            let gone = self.last_good.extract_if(.., |name, _| !plan.watches(name));
            changed.extend(gone.map(|(name, _)| name));
        }
        for name in changed {
            self.judge(&name);
        }
        let all_read = self.plan.services.values().all(|watched| watched.read.is_some());
        self.assembler.want(self.statement.services.values(), !all_read);
        self.settle(now);
        difference
    }

    /// The services that were known before a restart and are not listed, where the token may not see everything.
    fn hidden(&self, at: usize) -> Vec<ServiceName> {
        let Some(dc) = self.plan.datacenters.get(at).filter(|dc| dc.filtered) else { return Vec::new() };
        let was_here = |registration: &Registration| {
            let of = dc.name.as_ref().filter(|_| self.plan.datacenters.len() > 1);
            of.is_none_or(|dc| remembered(registration, dc).listed > 0)
        };
        let is_hidden = |(name, registration): &(&ServiceName, &Arc<Registration>)| {
            !self.plan.services.contains_key(&(at, (*name).clone()))
                && self.config.services.has(name.as_str())
                && was_here(registration)
        };
        self.last_good.iter().filter(is_hidden).map(|(name, _)| name.clone()).collect()
    }

    fn heard_service(&mut self, key: &Key, answer: ServiceAnswer, was_strong: bool, now: Instant) {
        let max_stale = self.pace.max_stale;
        // It may be one that is not listed any more.
        let Some(watched) = self.plan.services.get_mut(key) else { return };
        let had_failure = watched.failure.is_some();
        let answer = match answer {
            Ok(answer) if is_outdated(&watched.cursor, &answer) => {
                watched.cursor.start_over(now);
                return;
            }
            Ok(answer) => answer,
            Err(error) => {
                watched.cursor.failed(now);
                watched.failures += 1;
                // One may be a server that goes: the next has taken over by the second.
                if watched.failures > 1 || watched.read.is_none() {
                    watched.failure = Some(chain(&error).into());
                    self.judge(&key.1);
                    self.settle(now);
                }
                return;
            }
        };
        let seen = watched.cursor.seen();
        if !Self::believe(&mut watched.cursor, &answer.meta, was_strong, max_stale, now, &self.counters) {
            return;
        }
        let must_be_newer = std::mem::take(&mut watched.must_be_newer);
        if must_be_newer && answer.value.is_none() && watched.cursor.seen() == seen && !was_strong {
            // The server that answered has not heard of the change that another one showed.
            watched.cursor.ask_leader();
            return;
        }
        watched.failures = 0;
        let was_empty = watched.empties;
        let is_empty = match &answer.value {
            Some(read) => read.listed == 0,
            None => watched.empties > 0,
        };
        if is_empty {
            watched.empties += 1;
            if !watched.listed && !answer.meta.filtered {
                // Nothing was kept from us: it is gone.
                self.plan.forget(key);
                self.count_kept();
                self.judge(&key.1);
                self.settle(now);
                return;
            }
            if was_empty == 0 && watched.listed && !answer.meta.filtered {
                watched.cursor.start_over(now + EMPTY_AGAIN);
                return;
            }
            let where_it_is = if watched.listed { "lists it" } else { "hides something from this token" };
            let why: Arc<str> = format!("Consul {where_it_is}, and shows no instance of it: {RIGHTS}").into();
            // It is looked at again, and not waited for: nothing was learnt.
            watched.cursor.failed(now);
            if watched.failure.as_ref() != Some(&why) {
                watched.failure = Some(why);
                self.judge(&key.1);
                self.settle(now);
            }
            return;
        }
        watched.empties = 0;
        let had_bytes = watched.read.as_ref().map_or(0, |read| read.bytes);
        if let Some(read) = &answer.value
            && (self.kept_bytes + read.bytes).saturating_sub(had_bytes) > self.max_kept
        {
            let why = format!(
                "Consul's answers have more than {} bytes together, which is more than is kept: see what its services \
                 register (`services.include` chooses those that are wanted)",
                self.max_kept
            );
            watched.cursor.refused(now);
            watched.failure = Some(why.into());
            self.judge(&key.1);
            self.settle(now);
            return;
        }
        if let Some(read) = &answer.value {
            self.kept_bytes = (self.kept_bytes + read.bytes).saturating_sub(had_bytes);
        }
        watched.failure = None;
        let is_news = match answer.value {
            Some(read) if watched.read.as_deref() == Some(&read) => false,
            Some(read) => {
                watched.read = Some(Arc::new(read));
                true
            }
            None => false,
        };
        if is_news || had_failure {
            self.judge(&key.1);
            self.settle(now);
        }
    }

    /// Counts the bytes of what is kept anew, after services were forgotten.
    fn count_kept(&mut self) {
        let reads = self.plan.services.values().filter_map(|watched| watched.read.as_ref());
        self.kept_bytes = reads.map(|read| read.bytes).sum();
    }

    fn settle(&mut self, now: Instant) {
        self.settle_at.get_or_insert(now + SETTLE);
    }

    fn judge_all(&mut self) {
        let mut names: BTreeSet<ServiceName> =
            self.plan.services.keys().map(|(_, name)| name.clone()).collect();
        names.extend(self.last_good.keys().cloned());
        for name in names {
            self.judge(&name);
        }
        self.settle(Instant::now());
    }

    /// Puts together what all datacenters say of a service. It costs what that service costs.
    fn judge(&mut self, name: &ServiceName) {
        let (told, problems) = self.judged(name);
        match told {
            Some(told) => {
                self.assembler.want([&told], true);
                self.statement.services.insert(name.clone(), told);
            }
            None => {
                self.statement.services.remove(name);
                self.parsed.remove(name);
            }
        }
        if problems.is_empty() {
            self.problems.remove(name);
        } else {
            self.problems.insert(name.clone(), problems);
        }
    }

    fn judged(&mut self, name: &ServiceName) -> (Option<Told>, Vec<Problem>) {
        self.unusable.remove(name);
        self.left_out.remove(name);
        let restored = self.last_good.get(name).cloned();
        let (mut reads, mut stale_because, mut unread): (Vec<Arc<Read>>, Option<Arc<str>>, bool) =
            (Vec::new(), None, false);
        for (at, dc) in self.plan.datacenters.iter().enumerate() {
            let watched = self.plan.services.get(&(at, name.clone()));
            let failure = watched.and_then(|watched| watched.failure.as_ref()).or(dc.failure.as_ref());
            match watched.map(|watched| watched.read.clone()) {
                Some(Some(read)) => reads.push(read),
                // Nobody knows whether this datacenter has it.
                None if dc.has_listed => continue,
                _ => {
                    let known =
                        restored.as_ref().zip(dc.name.as_ref()).filter(|_| self.plan.datacenters.len() > 1);
                    match known {
                        Some((registration, dc)) => reads.push(Arc::new(remembered(registration, dc))),
                        None => unread = true,
                    }
                    if restored.is_none() && watched.is_none() {
                        continue;
                    }
                    let waiting = "Consul has not said anything of it since the start";
                    stale_because.get_or_insert_with(|| failure.cloned().unwrap_or_else(|| waiting.into()));
                }
            }
            if let Some(failure) = failure {
                stale_because.get_or_insert_with(|| failure.clone());
            }
        }
        let mut problems = Vec::new();
        let place = || Place::file(format!("{}/{name}", self.name));
        if reads.is_empty() {
            if !unread {
                return (None, problems);
            }
            let told = restored.map(|restored| Told {
                known: Known::Restored(restored),
                stale_because: stale_because.clone(),
                partial_because: None,
            });
            let has_failed = self.plan.datacenters.iter().enumerate().any(|(at, _)| {
                self.plan.services.get(&(at, name.clone())).is_some_and(|watched| watched.failure.is_some())
            });
            if let (true, Some(because)) = (has_failed, stale_because) {
                if told.is_none() {
                    self.unusable.insert(name.clone(), format!("service `{name}`: {because}").into());
                }
                let outcome = if told.is_some() { "what was known stays" } else { "nothing is known of it" };
                problems.push(Problem::new(place(), subject_of(name), format!("{because}; {outcome}")));
            }
            return (told, problems);
        }
        let read: Vec<&Read> = reads.iter().map(|read| &**read).collect();
        let parsed = combine(&self.name, name, &read);
        problems.extend(parsed.problems);
        if let (true, Some(because)) =
            (self.plan.datacenters.len() > 1 || stale_because.is_some(), &stale_because)
        {
            problems.push(Problem::new(
                place(),
                subject_of(name),
                format!("{because}; what was known stays"),
            ));
        }
        let before = self.parsed.get(name).cloned();
        let known = match parsed.services.into_iter().next() {
            Some(service) if service.endpoints.is_empty() => return (None, problems),
            Some(service) => match before {
                Some(before) if *before == service => Known::Parsed(before),
                _ => {
                    let service = Arc::new(service);
                    self.parsed.insert(name.clone(), service.clone());
                    Known::Parsed(service)
                }
            },
            None => {
                let unusable = "what Consul says of it cannot be used, see the problems";
                stale_because.get_or_insert_with(|| unusable.into());
                match (before, restored) {
                    (Some(before), _) => Known::Parsed(before),
                    (None, Some(restored)) => Known::Restored(restored),
                    (None, None) => {
                        let why =
                            problems.first().map(|problem| problem.message.as_str()).unwrap_or(unusable);
                        self.left_out.insert(name.clone(), format!("service `{name}`: {why}").into());
                        return (None, problems);
                    }
                }
            }
        };
        let partial_because = match &known {
            Known::Parsed(service) => service.partial_because.clone(),
            Known::Restored(_) => None,
        };
        (Some(Told { known, stale_because, partial_because }), problems)
    }

    /// Whether nothing is known of a datacenter, neither from now nor from before a restart.
    fn is_unknown(&self, dc: &Datacenter) -> bool {
        let was_in =
            |name: &Arc<str>| self.last_good.values().any(|known| remembered(known, name).listed > 0);
        !dc.has_listed && !dc.name.as_ref().is_some_and(was_in)
    }

    /// Why it is too early for the first view, or that there will be none.
    fn is_ready(&mut self, now: Instant) -> Result<bool, SourceError> {
        if self.told.is_some() {
            return Ok(true);
        }
        let answered = |dc: &Datacenter| dc.has_listed || dc.failure.is_some();
        if !self.plan.datacenters.iter().all(answered)
            || !self.plan.datacenters.iter().any(|dc| dc.has_listed)
        {
            return Ok(false);
        }
        if now < self.started + FIRST_DATACENTERS
            && self.plan.datacenters.iter().any(|dc| self.is_unknown(dc))
        {
            return Ok(false);
        }
        let mut failure = None;
        for watched in self.plan.services.values() {
            match (&watched.read, &watched.failure) {
                (Some(_), _) => {}
                (None, Some(because)) => failure = Some(because.clone()),
                (None, None) => return Ok(false),
            }
        }
        if let Some(because) = failure
            && self.plan.services.values().all(|watched| watched.read.is_none())
        {
            self.has_failed = true;
            let what = format!("no service that Consul lists can be read: {because}");
            return Err(SourceError::Suspect { source_name: self.name.clone(), what });
        }
        if self.assembler.any_pending() {
            let since = *self.first_names.get_or_insert(now);
            return Ok(now >= since + FIRST_NAMES);
        }
        Ok(true)
    }

    /// The view as of now, unless it is the one that was told last or it is too early for the first.
    fn view(&mut self, now: Instant) -> Result<Option<Registrations>, SourceError> {
        if self.plan.datacenters.iter().all(|dc| dc.failure.is_some()) || !self.is_ready(now)? {
            return Ok(None);
        }
        self.statement.problems = self.all_problems();
        self.statement.unusable = self.unusable.values().cloned().collect();
        self.statement.left_out = self.left_out.values().cloned().collect();
        let view = self.assembler.view(&self.statement);
        if !self.has_failed && self.told.as_ref() == Some(&view) {
            return Ok(None);
        }
        self.has_failed = false;
        self.told = Some(view.clone());
        Ok(Some(view))
    }

    fn all_problems(&self) -> Vec<Problem> {
        let of_all =
            |message: String| Problem::new(Place::file(self.name.clone()), self.name.clone(), message);
        let mut problems: Vec<_> = self.problems.values().flatten().cloned().collect();
        for dc in &self.plan.datacenters {
            problems.extend(dc.problems.iter().cloned());
            if let Some(failure) = &dc.failure {
                problems.push(of_all(failure.to_string()));
            }
        }
        problems.extend(self.client.complaints().iter().map(ToString::to_string).map(of_all));
        problems.extend(self.lateness_problem().map(of_all));
        problems
    }

    fn count(&self) {
        let (theirs, ours) = (self.client.counters(), &self.counters);
        let copy = |from: &std::sync::atomic::AtomicU64, to: &std::sync::atomic::AtomicU64| {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        };
        copy(&theirs.requests, &ours.reads);
        copy(&theirs.failures, &ours.failed_reads);
        copy(&theirs.connects, &ours.connects);
        copy(&theirs.connections, &ours.connections);
    }

    /// When there is something to do although nothing was heard.
    fn wake_at(&mut self, now: Instant) -> Instant {
        let names = self.assembler.look_up();
        let ask = self.plan.next_due(self.read_slots());
        let sweep = self.sweep_due(now);
        let is_first = |at: &Instant| self.told.is_none() && *at > now;
        let first_names = self.first_names.map(|since| since + FIRST_NAMES).filter(is_first);
        let first_datacenters = Some(self.started + FIRST_DATACENTERS).filter(is_first);
        let never = now + Duration::from_secs(3600);
        [names, ask, sweep, first_names, first_datacenters, self.settle_at]
            .into_iter()
            .flatten()
            .fold(never, Instant::min)
    }

    /// The services of a datacenter and what is said of those in `wanted`, as strongly as Consul can.
    async fn confirm_in(&mut self, at: usize, wanted: &BTreeSet<ServiceName>) -> Result<(), SourceError> {
        let datacenter = self.plan.datacenters.get(at).and_then(|dc| dc.name.clone());
        let query = Query { consistency: Consistency::Consistent, datacenter, ..Query::default() };
        let answer = read_catalog(&self.client, &query, None).await;
        let in_flight = self.plan.datacenters.get(at).is_some_and(|dc| dc.in_flight);
        let heard = self.heard_catalog(at, answer, true, Instant::now());
        if let Some(dc) = self.plan.datacenters.get_mut(at) {
            dc.in_flight = in_flight;
        }
        heard?;
        if let Some(failure) = self.plan.datacenters.get(at).and_then(|dc| dc.failure.clone()) {
            return Err(SourceError::Suspect { source_name: self.name.clone(), what: failure.to_string() });
        }
        let mut left: Vec<Key> = wanted.iter().map(|name| (at, name.clone())).collect();
        let mut reads: JoinSet<(Key, ServiceAnswer)> = JoinSet::new();
        loop {
            while reads.len() < CONFIRM_AT_ONCE
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
            // What is empty now was so before, if this is to be a confirmation.
            if let Some(watched) = self.plan.services.get_mut(&key) {
                watched.empties = watched.empties.max(1);
            }
            self.heard_service(&key, answer, true, Instant::now());
            self.plan.enqueue(&key);
        }
    }

    fn failed(&self, what: &str, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> SourceError {
        SourceError::Failed { source_name: self.name.clone(), what: what.to_owned(), cause: cause.into() }
    }
}

impl<R: Resolve> Source for ConsulSource<R> {
    async fn next(&mut self) -> Result<Registrations, SourceError> {
        loop {
            let now = Instant::now();
            self.start_due(now);
            if self.settle_at.is_some_and(|at| at <= now) {
                self.settle_at = None;
                if let Some(view) = self.view(now)? {
                    return Ok(view);
                }
            }
            let due = self.wake_at(now);
            tokio::select! {
                Some(done) = self.asks.join_next_with_id() => {
                    self.count();
                    let now = Instant::now();
                    match done {
                        Ok((id, outcome)) => {
                            self.asked.remove(&id);
                            if let What::Service(Ok(Answer { value: Some(read), .. })) = &outcome.what {
                                self.counters.bad_records.fetch_add(read.bad(), Ordering::Relaxed);
                            }
                            self.done(outcome, now)?;
                        }
                        Err(lost) => {
                            let ask = self.asked.remove(&lost.id()).map(|(ask, _)| ask);
                            match ask {
                                // Its connection is wanted for queries that services share.
                                Some(Ask::Service(key)) if lost.is_cancelled() => {
                                    self.plan.back(&key);
                                    self.plan.enqueue(&key);
                                }
                                ask => {
                                    tracing::error!("{}: {lost}", self.name);
                                    self.lost(ask, now)?;
                                }
                            }
                        }
                    }
                }
                () = self.assembler.changed() => self.settle_at = Some(Instant::now()),
                () = sleep_until(due) => {
                    if self.told.is_none() {
                        self.settle(Instant::now());
                    }
                }
            }
        }
    }

    async fn confirm(&mut self, services: &BTreeSet<ServiceName>) -> Result<Registrations, SourceError> {
        for at in 0..self.plan.datacenters.len() {
            self.confirm_in(at, services).await?;
        }
        self.count();
        let now = Instant::now();
        match (self.view(now)?, &self.told) {
            (Some(view), _) => Ok(view),
            (None, Some(told)) => Ok(told.clone()),
            (None, None) => Err(SourceError::Suspect {
                source_name: self.name.clone(),
                what: "not every service has been read yet".to_owned(),
            }),
        }
    }
}

/// Whether an answer was found to be as before, and what was before is not what is known now: something else was read
/// while it was waited for.
fn is_outdated<T>(cursor: &Cursor, answer: &Answer<Option<T>>) -> bool {
    answer.value.is_none() && cursor.hash() != Some(answer.meta.hash)
}

/// What a task needs to read one service.
struct ServiceReader {
    client: Client,
    rules: Arc<Rules>,
    source: Arc<str>,
    name: ServiceName,
    path: String,
    /// The hash of what is known.
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
) -> Result<Answer<Option<Names>>, ConsulError> {
    const PATH: &str = "/v1/catalog/services";
    let Answer { value, meta } = client.get_bytes(PATH, query).await?;
    if known == Some(meta.hash) {
        return Ok(Answer { value: None, meta });
    }
    match serde_json::from_slice::<Option<Names>>(&value) {
        Ok(names) => Ok(Answer { value: Some(names.unwrap_or_default()), meta }),
        Err(wrong) => Err(client.bad_answer(PATH, wrong.to_string())),
    }
}

#[cfg(test)]
mod tests;
