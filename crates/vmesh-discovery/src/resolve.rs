//! Periodic resolution of the host names of endpoints: a replaced machine comes back with another address.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

/// The limit of concurrent lookups. Each takes a thread that may wait for a dead name server.
const MAX_LOOKUPS: usize = 16;
/// The limit of concurrent lookups of names whose last lookup failed, so that names of a dead name server
/// leave threads to other names.
const MAX_FAILING_LOOKUPS: usize = MAX_LOOKUPS / 2;
/// The delay before a failed lookup is retried. It doubles after each failure, up to the resolution interval.
const RETRY: Duration = Duration::from_secs(5);
/// A new name without an answer for this long is reported as a problem.
const OVERDUE: Duration = Duration::from_secs(10);
/// A known name whose next lookup is overdue by this long is reported as a problem.
const LATE: Duration = Duration::from_secs(60);

/// A resolver of host names. Its method may block: it is called on a thread for blocking work.
pub trait Resolve: Send + Sync + 'static {
    fn resolve(&self, host: &str) -> io::Result<Vec<IpAddr>>;
}

/// The resolver of the host (`getaddrinfo`): `/etc/hosts`, DNS, and the other sources in `nsswitch.conf`.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve(&self, host: &str) -> io::Result<Vec<IpAddr>> {
        Ok((host, 0).to_socket_addrs()?.map(|address| address.ip()).collect())
    }
}

/// The result of the lookups of one host name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolution {
    /// No lookup has ended yet.
    Pending,
    /// The addresses, sorted. If the last lookup failed, these are the previous addresses, with the reason of
    /// the failure.
    Addresses(Arc<[IpAddr]>, Option<Arc<str>>),
    /// No lookup has ever succeeded; the reason of the last failure.
    Failed(Arc<str>),
}

/// A host name without an address, or one whose last addresses could not be confirmed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnresolvedName {
    pub name: Arc<str>,
    /// The time when the first lookup of the name began, or when its lookups began to fail.
    pub since: std::time::Instant,
    pub because: Arc<str>,
    /// The last addresses of the name stay in use.
    pub is_in_use: bool,
}

/// The host names of a source that do not resolve.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnresolvedNames {
    pub count: usize,
    /// The part of `count` that has had no answer for a while: no name server stated whether the name exists.
    pub without_answer: usize,
    /// The first [`UnresolvedNames::SHOWN`] names: names without an answer first, then the names that have
    /// been waiting longest.
    pub first: Vec<UnresolvedName>,
}

impl UnresolvedNames {
    pub const SHOWN: usize = 100;
}

/// The host names that a source needs.
///
/// Call [`HostNames::request`] or [`HostNames::request_only`] first, then [`HostNames::start_lookups`] to start the lookups that are
/// due. Poll [`HostNames::changed`], and call `look_up` again at the time it returned.
#[derive(Debug)]
pub struct HostNames<R> {
    resolver: Arc<R>,
    interval: Duration,
    names: BTreeMap<Arc<str>, NameState>,
    /// The names that are not being looked up, ordered by the time at which their next lookup is due.
    queue: BTreeSet<(Instant, Arc<str>)>,
    /// The number of running lookups of names whose last lookup failed.
    failing: usize,
    lookups: JoinSet<LookupResult>,
}

/// The result of a lookup.
#[derive(Debug)]
struct LookupResult {
    host: Arc<str>,
    was_failing: bool,
    addresses: io::Result<Vec<IpAddr>>,
}

#[derive(Debug)]
struct NameState {
    resolved: Resolution,
    due: Instant,
    is_under_way: bool,
    /// The number of consecutive failed lookups.
    failures: u32,
    /// The last lookup failed because no name server answered, not because the name does not exist.
    may_exist: bool,
    /// The time from which a missing lookup result is reported as a problem.
    late_at: Instant,
    is_late: bool,
    /// The time at which the name lost its confirmed address; `None` while its address is confirmed.
    unresolved_since: Option<Instant>,
}

impl NameState {
    fn new(resolved: Resolution, now: Instant) -> NameState {
        let is_pending = resolved == Resolution::Pending;
        let late = if is_pending { OVERDUE } else { LATE };
        NameState {
            resolved,
            due: now,
            is_under_way: false,
            failures: 0,
            may_exist: false,
            late_at: now + late,
            is_late: false,
            unresolved_since: is_pending.then_some(now),
        }
    }
}

impl<R: Resolve> HostNames<R> {
    pub fn new(resolver: R, interval: Duration) -> HostNames<R> {
        HostNames {
            resolver: Arc::new(resolver),
            interval,
            names: BTreeMap::new(),
            queue: BTreeSet::new(),
            failing: 0,
            lookups: JoinSet::new(),
        }
    }

    /// Adds a name with the addresses that were known before a restart.
    pub fn add_known(&mut self, host: Arc<str>, mut addresses: Vec<IpAddr>) {
        addresses.sort();
        addresses.dedup();
        self.insert(host, Resolution::Addresses(addresses.into(), None));
    }

    fn insert(&mut self, host: Arc<str>, resolved: Resolution) {
        let name = NameState::new(resolved, Instant::now());
        self.queue.insert((name.due, host.clone()));
        if let Some(before) = self.names.insert(host.clone(), name) {
            self.queue.remove(&(before.due, host));
        }
    }

    /// Requests these names and forgets all others.
    pub fn request_only(&mut self, hosts: &BTreeSet<Arc<str>>) {
        self.names.retain(|host, _| hosts.contains(host));
        self.queue.retain(|(_, host)| hosts.contains(host));
        self.request(hosts);
    }

    /// Requests these names in addition to the present ones.
    pub fn request(&mut self, hosts: &BTreeSet<Arc<str>>) {
        for host in hosts {
            if !self.names.contains_key(host) {
                self.insert(host.clone(), Resolution::Pending);
            }
        }
    }

    pub fn get(&self, host: &str) -> Resolution {
        match self.names.get(host) {
            None => Resolution::Pending,
            Some(NameState { resolved: Resolution::Addresses(addresses, None), is_late: true, .. }) => {
                let why = format!("no lookup has ended for {} s after it was due", LATE.as_secs());
                Resolution::Addresses(addresses.clone(), Some(why.into()))
            }
            Some(name) => name.resolved.clone(),
        }
    }

    /// Reports whether a name has been without an answer for so long that the operator should know.
    pub fn is_overdue(&self, host: &str) -> bool {
        self.names.get(host).is_some_and(|name| name.is_late)
    }

    /// Reports whether a name without an address may still have one, because no name server answered.
    pub fn may_exist(&self, host: &str) -> bool {
        self.names.get(host).is_none_or(|name| name.may_exist)
    }

    /// Returns the names that do not resolve.
    pub fn unresolved(&self) -> UnresolvedNames {
        let mut all: Vec<(bool, Instant, &Arc<str>)> = Vec::new();
        for (host, name) in &self.names {
            let since = name.unresolved_since.or(name.is_late.then_some(name.due));
            let has_no_answer = name.is_late || (name.failures > 0 && name.may_exist);
            all.extend(since.map(|since| (!has_no_answer, since, host)));
        }
        let without_answer = all.iter().filter(|(has_answer, ..)| !has_answer).count();
        all.sort_unstable();
        let shown = |(_, since, host): &(bool, Instant, &Arc<str>)| {
            let (because, is_in_use) = match self.get(host) {
                Resolution::Pending if self.is_overdue(host) => {
                    ("no name server has answered yet".into(), false)
                }
                Resolution::Pending => ("it is being looked up".into(), false),
                Resolution::Addresses(_, why) => {
                    (why.unwrap_or_else(|| "it is being looked up".into()), true)
                }
                Resolution::Failed(why) => (why, false),
            };
            UnresolvedName { name: (*host).clone(), since: since.into_std(), because, is_in_use }
        };
        let first = all.iter().take(UnresolvedNames::SHOWN).map(shown).collect();
        UnresolvedNames { count: all.len(), without_answer, first }
    }

    /// Reports whether a name has never been looked up.
    pub fn has_pending(&self) -> bool {
        self.names.values().any(|name| name.resolved == Resolution::Pending)
    }

    /// Starts the lookups that are due, the most overdue first, and returns when the next one is due.
    pub fn start_lookups(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let mut passed_over = Vec::new();
        while self.lookups.len() < MAX_LOOKUPS
            && let Some((due, _)) = self.queue.first()
            && *due <= now
            && let Some((due, host)) = self.queue.pop_first()
        {
            let Some(name) = self.names.get_mut(&host) else { continue };
            let is_failing = name.failures > 0;
            if is_failing && self.failing >= MAX_FAILING_LOOKUPS {
                passed_over.push((due, host));
                continue;
            }
            name.is_under_way = true;
            self.failing += usize::from(is_failing);
            let resolver = self.resolver.clone();
            self.lookups.spawn_blocking(move || {
                let addresses = resolver.resolve(&host);
                LookupResult { host, was_failing: is_failing, addresses }
            });
        }
        // When all lookup threads are busy, the remaining names are looked up as soon as a lookup ends.
        let next = self.queue.first().map(|(due, _)| *due).filter(|_| self.lookups.len() < MAX_LOOKUPS);
        self.queue.extend(passed_over);
        next
    }

    /// Waits until the result of a name changes or a lookup becomes late. Dropping the future loses nothing.
    pub async fn changed(&mut self) {
        loop {
            let late_at = self.names.values().filter(|name| !name.is_late).map(|name| name.late_at).min();
            let late = async {
                match late_at {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let done = tokio::select! {
                Some(done) = self.lookups.join_next() => done,
                () = late => {
                    let now = Instant::now();
                    for name in self.names.values_mut().filter(|name| name.late_at <= now) {
                        name.is_late = true;
                    }
                    return;
                }
            };
            // A lookup that panicked may have been counted in `failing`; its limit is then only stricter than
            // intended.
            let Ok(LookupResult { host, was_failing, addresses }) = done else { continue };
            self.failing = self.failing.saturating_sub(usize::from(was_failing));
            if self.record_result(&host, addresses) {
                return;
            }
            self.start_lookups();
        }
    }

    fn record_result(&mut self, host: &str, addresses: io::Result<Vec<IpAddr>>) -> bool {
        let Some(name) = self.names.get_mut(host) else { return false };
        let addresses = addresses.and_then(|addresses| match addresses.is_empty() {
            true => Err(io::Error::other("it has no address")),
            false => Ok(addresses),
        });
        let interval = match &addresses {
            Ok(_) => {
                name.failures = 0;
                name.unresolved_since = None;
                self.interval
            }
            Err(error) => {
                name.may_exist = !is_missing_name(error);
                name.failures = name.failures.saturating_add(1);
                name.unresolved_since.get_or_insert_with(Instant::now);
                (RETRY * 2_u32.pow((name.failures - 1).min(8))).min(self.interval)
            }
        };
        let was_late = std::mem::take(&mut name.is_late);
        name.is_under_way = false;
        name.due = Instant::now() + interval + vmesh_backoff::jitter(interval / 10);
        name.late_at = name.due + LATE;
        self.queue.insert((name.due, host.into()));
        let resolved = match addresses {
            Ok(mut addresses) => {
                addresses.sort();
                addresses.dedup();
                Resolution::Addresses(addresses.into(), None)
            }
            Err(error) => {
                let why: Arc<str> = without_prefix(&error).into();
                match &name.resolved {
                    Resolution::Addresses(before, _) => Resolution::Addresses(before.clone(), Some(why)),
                    Resolution::Pending | Resolution::Failed(_) => Resolution::Failed(why),
                }
            }
        };
        let before = std::mem::replace(&mut name.resolved, resolved);
        was_late || before != name.resolved
    }
}

/// Reports whether a failed lookup means that the name does not exist, judged by the messages of glibc and
/// musl. Any other failure may be temporary.
fn is_missing_name(error: &io::Error) -> bool {
    let message = error.to_string().to_lowercase();
    ["not known", "no address", "does not resolve"].iter().any(|words| message.contains(words))
}

/// Strips the prefix that the standard library adds to the message of `getaddrinfo`.
fn without_prefix(error: &io::Error) -> String {
    let text = error.to_string();
    let message = text.strip_prefix("failed to lookup address information: ").unwrap_or(&text);
    message.to_lowercase()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct FakeResolver(Mutex<BTreeMap<String, Vec<&'static str>>>);

    impl FakeResolver {
        fn set(&self, host: &str, addresses: &[&'static str]) {
            self.0.lock().unwrap().insert(host.to_owned(), addresses.to_vec());
        }
    }

    impl Resolve for Arc<FakeResolver> {
        fn resolve(&self, host: &str) -> io::Result<Vec<IpAddr>> {
            match self.0.lock().unwrap().get(host) {
                Some(addresses) => Ok(addresses.iter().map(|a| a.parse().unwrap()).collect()),
                None => {
                    Err(io::Error::other("failed to lookup address information: Name or service not known"))
                }
            }
        }
    }

    fn hosts(hosts: &[&str]) -> BTreeSet<Arc<str>> {
        hosts.iter().map(|host| Arc::from(*host)).collect()
    }

    /// Advances time until the result of `host` is `expected`.
    async fn until(names: &mut HostNames<Arc<FakeResolver>>, host: &str, expected: &str) {
        let deadline = Instant::now() + Duration::from_secs(600);
        while format!("{:?}", names.get(host)) != expected {
            assert!(Instant::now() < deadline, "{host} is {:?}, not {expected}", names.get(host));
            let due = names.start_lookups().unwrap_or(deadline);
            _ = tokio::time::timeout_at(due, names.changed()).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_resolved_again_and_keeps_its_addresses_when_that_fails() {
        let dns = Arc::new(FakeResolver::default());
        let mut names = HostNames::new(dns.clone(), Duration::from_secs(30));
        names.request(&hosts(&["db", "web"]));
        assert!(names.has_pending());
        dns.set("db", &["10.0.0.2", "10.0.0.1", "10.0.0.2"]);
        until(&mut names, "db", "Addresses([10.0.0.1, 10.0.0.2], None)").await;
        until(&mut names, "web", r#"Failed("name or service not known")"#).await;
        assert!(!names.has_pending());
        let unresolved = names.unresolved();
        assert_eq!(
            (unresolved.count, unresolved.without_answer),
            (1, 0),
            "a name that does not exist has its answer"
        );
        assert_eq!(&*unresolved.first[0].name, "web");

        let before = Instant::now();
        dns.set("db", &["10.0.0.3"]);
        until(&mut names, "db", "Addresses([10.0.0.3], None)").await;
        let waited = before.elapsed().as_secs();
        assert!((30..=33).contains(&waited), "{waited} s");
        dns.set("db", &[]);
        until(&mut names, "db", r#"Addresses([10.0.0.3], Some("it has no address"))"#).await;

        names.request_only(&hosts(&["web"]));
        assert_eq!(names.get("db"), Resolution::Pending);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_known_before_a_restart_is_known() {
        let mut names = HostNames::new(Arc::new(FakeResolver::default()), Duration::from_secs(30));
        names.add_known("db".into(), vec!["10.0.0.1".parse().unwrap()]);
        names.request(&hosts(&["db"]));
        assert!(!names.has_pending());
        let expected = r#"Addresses([10.0.0.1], Some("name or service not known"))"#;
        until(&mut names, "db", expected).await;
    }

    #[tokio::test]
    async fn localhost_is_resolved_by_the_host() {
        let mut names = HostNames::new(SystemResolver, Duration::from_secs(30));
        names.request(&hosts(&["localhost"]));
        names.start_lookups();
        tokio::time::timeout(Duration::from_secs(30), names.changed()).await.unwrap();
        match names.get("localhost") {
            Resolution::Addresses(addresses, None) => assert!(addresses.iter().all(IpAddr::is_loopback)),
            other => panic!("{other:?}"),
        }
    }

    /// A name server that never answers for `*.dead`, and answers for any other name after a while.
    struct SlowResolver {
        answers_after: Duration,
    }

    impl Resolve for Arc<SlowResolver> {
        fn resolve(&self, host: &str) -> io::Result<Vec<IpAddr>> {
            if host.ends_with(".dead") {
                std::thread::sleep(Duration::from_millis(150));
                return Err(io::Error::other(
                    "failed to lookup address information: Temporary failure in name resolution",
                ));
            }
            std::thread::sleep(self.answers_after);
            Ok(vec!["10.0.0.1".parse().unwrap()])
        }
    }

    #[tokio::test]
    async fn names_that_are_due_for_longest_come_first_whatever_they_are_called() {
        let dns = Arc::new(SlowResolver { answers_after: Duration::from_millis(20) });
        // Names become due again long before every name had its first lookup.
        let mut names = HostNames::new(dns, Duration::from_millis(60));
        let all: Vec<String> = (0..200).map(|n| format!("vm-{n:03}.x")).collect();
        names.request(&hosts(&all.iter().map(String::as_str).collect::<Vec<_>>()));
        let deadline = Instant::now() + Duration::from_secs(30);
        while names.has_pending() {
            assert!(Instant::now() < deadline, "some names never had their turn");
            let due = names.start_lookups().unwrap_or(deadline);
            _ = tokio::time::timeout_at(due, names.changed()).await;
        }
    }

    #[tokio::test]
    async fn names_of_a_dead_zone_leave_places_for_the_others_and_are_told_of() {
        let dns = Arc::new(SlowResolver { answers_after: Duration::ZERO });
        let mut names = HostNames::new(dns, Duration::from_millis(50));
        let dead: Vec<String> = (0..40).map(|n| format!("a-{n:02}.dead")).collect();
        names.request(&hosts(&dead.iter().map(String::as_str).collect::<Vec<_>>()));
        let deadline = Instant::now() + Duration::from_secs(30);
        while names.has_pending() {
            let due = names.start_lookups().unwrap_or(deadline);
            _ = tokio::time::timeout_at(due, names.changed()).await;
        }
        assert!(names.may_exist("a-00.dead"));
        let unresolved = names.unresolved();
        assert_eq!((unresolved.count, unresolved.without_answer, unresolved.first.len()), (40, 40, 40));
        assert_eq!(&*unresolved.first[0].because, "temporary failure in name resolution");
        assert!(!unresolved.first[0].is_in_use);
        names.request(&hosts(&["shop.x"]));
        let since = Instant::now();
        while names.get("shop.x") == Resolution::Pending {
            let due = names.start_lookups().unwrap_or(deadline);
            assert!(names.failing <= MAX_FAILING_LOOKUPS, "{} places wait for a dead zone", names.failing);
            _ = tokio::time::timeout_at(due, names.changed()).await;
            assert!(since.elapsed() < Duration::from_secs(30), "`shop.x` has no turn");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_name_without_an_answer_is_overdue_and_whoever_waits_hears_of_it() {
        struct NoResolver;
        impl Resolve for NoResolver {
            fn resolve(&self, _: &str) -> io::Result<Vec<IpAddr>> {
                Err(io::Error::other("no"))
            }
        }
        let mut names = HostNames::new(NoResolver, Duration::from_secs(30));
        names.request(&hosts(&["db"]));
        assert!(!names.is_overdue("db"));
        assert_eq!((names.unresolved().count, names.unresolved().without_answer), (1, 0));
        // No lookup is started, as when all lookup threads are busy.
        names.changed().await;
        assert!(names.is_overdue("db"));
        assert_eq!(names.unresolved().without_answer, 1);
        assert_eq!(names.get("db"), Resolution::Pending);
    }
}
