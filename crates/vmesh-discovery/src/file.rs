//! Discovery by files: a directory of them, or one.
//!
//! A file without a service's name in it is named by its path below the directory: `users/v2.yaml` is `users.v2`.
//! Of two files that name one service the first in the order of their paths counts; the other is a problem.
//!
//! | wakes on | does |
//! |---|---|
//! | a change that the kernel tells of, 20 ms later | looks at the directory, reads what changed |
//! | `poll` | reads everything, and parses what changed |
//! | a name that resolves to something else | puts the addresses in |
//!
//! What goes wrong costs as little as possible: a bad record that record, a bad service that service, a bad file that
//! file, and each keeps what was last good of it, also over a restart. A directory that is gone, or empty and was not
//! before, is an accident until one file in it says otherwise.

mod disk;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::{JoinError, JoinHandle};
use tokio::time::Instant;
use vmesh_model::{Endpoint, Host, Problem, Registration, ServiceName};

pub use crate::config::FileConfig;
use crate::format::{ParsedEndpoint, ParsedService, subject_of};
use crate::resolve::{Names, Resolve, Resolved, SystemResolver};
use vmesh_model::State;

use crate::source::{Registrations, Seen, Source, SourceError};
use disk::{Disk, Known, Scan, Told};
use watch::Hints;

/// How long the first view waits for names to be resolved: without them services would begin without endpoints.
const FIRST_NAMES: Duration = Duration::from_secs(5);
/// How long it waits for files that are being written.
const FIRST_FILES: Duration = Duration::from_millis(500);

/// Reads services from files.
pub struct FileSource<R = SystemResolver> {
    name: Arc<str>,
    poll: Duration,
    disk: Arc<Mutex<Disk>>,
    hints: Arc<Hints>,
    names: Names<R>,
    /// The look that is under way. It goes on when nobody waits for it.
    looking: Option<JoinHandle<Result<Scan, SourceError>>>,
    look_at: Option<Instant>,
    verify_at: Instant,
    started: Instant,
    scan: Option<Scan>,
    /// What was made of the services of `scan`.
    built: BTreeMap<ServiceName, Built>,
    told: Option<Registrations>,
    /// The last look failed, so the next good one is news whatever it says.
    has_failed: bool,
}

/// A service with its names resolved.
#[derive(Debug, Clone)]
struct Built {
    parsed: Arc<ParsedService>,
    has_names: bool,
    seen: Seen,
    problems: Vec<Problem>,
}

impl FileSource {
    /// `last_good` is what was known before a restart: it holds for files that cannot be read now.
    pub fn new(config: FileConfig, last_good: Option<&Registrations>) -> FileSource {
        FileSource::with_resolver(config, last_good, SystemResolver)
    }
}

impl<R: Resolve> FileSource<R> {
    pub fn with_resolver(
        config: FileConfig,
        last_good: Option<&Registrations>,
        resolver: R,
    ) -> FileSource<R> {
        let hints = Arc::new(Hints::below(&config.path));
        let mut names = Names::new(resolver, config.resolve_interval);
        for (host, addresses) in resolved_before(last_good) {
            names.remember(host, addresses.into_iter().map(|address| address.ip()).collect());
        }
        let now = Instant::now();
        FileSource {
            name: config.name(),
            poll: config.poll,
            disk: Arc::new(Mutex::new(Disk::new(config, hints.clone(), last_good))),
            hints,
            names,
            looking: None,
            look_at: Some(now),
            verify_at: now,
            started: now,
            scan: None,
            built: BTreeMap::new(),
            told: None,
            has_failed: false,
        }
    }

    /// Begins to look at the disk.
    fn look(&mut self, now: Instant) {
        let look = self.hints.take(now.into_std());
        let verify = self.verify_at <= now;
        if verify {
            self.verify_at = now + self.poll;
        }
        self.look_at = None;
        let disk = self.disk.clone();
        self.looking = Some(tokio::task::spawn_blocking(move || {
            // Only a look that panicked leaves it poisoned, and every look begins anew.
            disk.lock().unwrap_or_else(PoisonError::into_inner).scan(&look, verify)
        }));
    }

    /// When to look next, if nothing is heard until then.
    fn next_look(&self) -> Instant {
        let heard = self.hints.due().map(Instant::from_std);
        [heard, self.look_at].into_iter().flatten().fold(self.verify_at, Instant::min)
    }

    /// When there is something to do although nothing was heard.
    fn wake_at(&mut self, now: Instant) -> Instant {
        let names = self.names.look_up();
        let look = self.looking.is_none().then(|| self.next_look());
        let first_view = Some(self.started + FIRST_NAMES).filter(|at| self.told.is_none() && *at > now);
        let never = now + Duration::from_secs(3600);
        [names, look, first_view].into_iter().flatten().fold(never, Instant::min)
    }

    fn panicked(&self, panicked: JoinError) -> SourceError {
        let what = "look at its files".to_owned();
        SourceError::Failed { source_name: self.name.clone(), what, cause: panicked.into() }
    }

    /// Takes what a look found. After one that failed the next is due at once: whoever waits for it decides when.
    fn found(&mut self, found: Result<Scan, SourceError>, now: Instant) -> Result<(), SourceError> {
        let scan = match found {
            Ok(scan) => scan,
            Err(error) => {
                self.has_failed = true;
                self.look_at = Some(now);
                return Err(error);
            }
        };
        self.look_at = scan.again.map(|wait| now + wait);
        let hosts: BTreeSet<Arc<str>> = scan.services.values().flat_map(hosts).collect();
        match scan.again {
            // A file that has not been read yet may need a name that was known before.
            Some(_) => self.names.want(&hosts),
            None => self.names.want_only(&hosts),
        }
        self.scan = Some(scan);
        Ok(())
    }

    /// The view as of now, unless it is the one that was told last or it is too early for the first.
    fn view(&mut self, now: Instant) -> Option<Registrations> {
        let scan = self.scan.as_ref()?;
        if self.told.is_none() {
            let waits_for_names = self.names.any_pending() && now < self.started + FIRST_NAMES;
            let waits_for_files = scan.again.is_some() && now < self.started + FIRST_FILES;
            if waits_for_names || waits_for_files {
                return None;
            }
        }
        let mut view = Registrations {
            services: BTreeMap::new(),
            problems: scan.problems.clone(),
            emptied: scan.emptied.clone(),
        };
        let mut built = BTreeMap::new();
        for (name, told) in &scan.services {
            let before = self.built.remove(name);
            let seen = match &told.known {
                Known::Restored(registration) => Seen::fresh(registration.clone()),
                Known::Parsed(parsed) => {
                    let Some(now) = build(parsed, before, &self.names, &self.name) else { continue };
                    view.problems.extend(now.problems.iter().cloned());
                    let seen = now.seen.clone();
                    built.insert(name.clone(), now);
                    seen
                }
            };
            let seen = match &told.stale_because {
                None => seen,
                Some(because) => Seen { state: State::Stale, because: Some(because.clone()), ..seen },
            };
            view.services.insert(name.clone(), seen);
        }
        self.built = built;
        view.problems.sort();
        view.problems.dedup();
        if !self.has_failed && self.told.as_ref() == Some(&view) {
            return None;
        }
        self.has_failed = false;
        self.told = Some(view.clone());
        Some(view)
    }
}

impl<R: Resolve> Source for FileSource<R> {
    async fn next(&mut self) -> Result<Registrations, SourceError> {
        loop {
            let now = Instant::now();
            if self.looking.is_none() && self.next_look() <= now {
                self.look(now);
            }
            let due = self.wake_at(now);
            let is_news = tokio::select! {
                found = finished(&mut self.looking) => {
                    self.looking = None;
                    self.look_at = None;
                    let found = found.unwrap_or_else(|panicked| Err(self.panicked(panicked)));
                    self.found(found, Instant::now())?;
                    true
                }
                () = self.names.changed() => true,
                () = self.hints.news() => false,
                () = tokio::time::sleep_until(due) => self.told.is_none(),
            };
            if is_news && let Some(view) = self.view(Instant::now()) {
                return Ok(view);
            }
        }
    }
}

/// The end of the look that is under way; never, if none is.
async fn finished<T>(looking: &mut Option<JoinHandle<T>>) -> Result<T, JoinError> {
    match looking {
        Some(handle) => handle.await,
        None => std::future::pending().await,
    }
}

/// The names that a service needs, also those that it was made of before a restart: their addresses will be wanted
/// when its file can be read again.
fn hosts(told: &Told) -> Vec<Arc<str>> {
    match &told.known {
        Known::Parsed(service) => {
            let hosts = service.endpoints.iter().filter_map(|endpoint| match &endpoint.address.host {
                Host::Name(name) => Some(name.clone()),
                Host::Ip(_) => None,
            });
            hosts.collect()
        }
        Known::Restored(registration) => {
            registration.endpoints.iter().filter_map(|endpoint| endpoint.hostname.clone()).collect()
        }
    }
}

fn resolved_before(last_good: Option<&Registrations>) -> BTreeMap<Arc<str>, Vec<SocketAddr>> {
    let mut before: BTreeMap<Arc<str>, Vec<SocketAddr>> = BTreeMap::new();
    let services = last_good.into_iter().flat_map(|last_good| last_good.services.values());
    for endpoint in services.flat_map(|seen| seen.registration.endpoints.iter()) {
        if let Some(host) = &endpoint.hostname {
            before.entry(host.clone()).or_default().push(endpoint.address);
        }
    }
    before
}

/// Puts addresses for names; `None` while a name is looked up for the first time and nothing is known of the service.
/// What comes out as it was keeps its pointer.
fn build<R: Resolve>(
    parsed: &Arc<ParsedService>,
    before: Option<Built>,
    names: &Names<R>,
    source: &Arc<str>,
) -> Option<Built> {
    if let Some(before) = &before
        && !before.has_names
        && Arc::ptr_eq(&before.parsed, parsed)
    {
        return Some(before.clone());
    }
    let subject = subject_of(&parsed.name);
    let mut endpoints: BTreeMap<SocketAddr, Endpoint> = BTreeMap::new();
    let (mut problems, mut unresolved, mut has_names) = (Vec::new(), None, false);
    for endpoint in &parsed.endpoints {
        let port = endpoint.address.port.get();
        match &endpoint.address.host {
            Host::Ip(ip) => {
                let address = SocketAddr::new(*ip, port);
                endpoints.insert(address, resolved(endpoint, address, None, source));
            }
            Host::Name(host) => {
                has_names = true;
                let (addresses, failure, outcome) = match names.get(host) {
                    Resolved::Pending => return before,
                    Resolved::Addresses(addresses, failure) => {
                        (addresses, failure, "its last addresses stay in force")
                    }
                    Resolved::Failed(why) => (Arc::from([]), Some(why), "this endpoint is left out"),
                };
                for ip in addresses.iter() {
                    let address = SocketAddr::new(*ip, port);
                    // One that is given by its address is described better than one that is found by a name.
                    let named = || resolved(endpoint, address, Some(host.clone()), source);
                    endpoints.entry(address).or_insert_with(named);
                }
                if let Some(why) = failure {
                    let message = format!("`{host}` cannot be resolved: {why}; {outcome}");
                    unresolved.get_or_insert_with(|| message.clone());
                    problems.push(Problem::new(endpoint.place.clone(), subject.clone(), message));
                }
            }
        }
    }
    let registration = Registration {
        service: parsed.name.clone(),
        protocol: parsed.protocol,
        port: parsed.port.map(Into::into),
        endpoints: endpoints.into_values().collect(),
        place: parsed.place.clone(),
    };
    let registration = match before {
        Some(before) if *before.seen.registration == registration => before.seen.registration,
        _ => Arc::new(registration),
    };
    let mut seen = match unresolved {
        Some(why) => Seen::stale(registration, why),
        None => Seen::fresh(registration),
    };
    seen.empty_on_purpose = parsed.endpoints.is_empty();
    Some(Built { parsed: parsed.clone(), has_names, seen, problems })
}

fn resolved(
    endpoint: &ParsedEndpoint,
    address: SocketAddr,
    hostname: Option<Arc<str>>,
    source: &Arc<str>,
) -> Endpoint {
    Endpoint {
        address,
        hostname,
        weight: endpoint.weight,
        health: endpoint.health,
        zone: endpoint.zone.clone(),
        version: endpoint.version.clone(),
        labels: endpoint.labels.clone(),
        source: source.clone(),
    }
}

#[cfg(test)]
mod tests;
