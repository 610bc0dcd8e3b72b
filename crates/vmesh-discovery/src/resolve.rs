//! Host names of endpoints: resolved, and resolved again, because a machine that came back has another address.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::source::jitter;

/// Lookups under way at once; each takes a thread that may wait for a dead name server.
const AT_ONCE: usize = 16;
/// A name that could not be resolved is tried again sooner.
const RETRY: Duration = Duration::from_secs(5);

/// Names to addresses. May block: it is called on a thread that is there for that.
pub trait Resolve: Send + Sync + 'static {
    fn resolve(&self, host: &str) -> io::Result<Vec<IpAddr>>;
}

/// As the host resolves: `/etc/hosts`, DNS, whatever `nsswitch.conf` says.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve(&self, host: &str) -> io::Result<Vec<IpAddr>> {
        Ok((host, 0).to_socket_addrs()?.map(|address| address.ip()).collect())
    }
}

/// What is known of one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resolved {
    /// Not tried yet.
    Pending,
    /// The addresses, sorted; after a failure those of before, and why it failed.
    Addresses(Arc<[IpAddr]>, Option<Arc<str>>),
    /// It never could be.
    Failed(Arc<str>),
}

/// The names that a source needs.
#[derive(Debug)]
pub struct Names<R> {
    resolver: Arc<R>,
    interval: Duration,
    names: BTreeMap<Arc<str>, Name>,
    lookups: JoinSet<(Arc<str>, io::Result<Vec<IpAddr>>)>,
}

#[derive(Debug)]
struct Name {
    resolved: Resolved,
    due: Instant,
    is_under_way: bool,
}

impl<R: Resolve> Names<R> {
    pub fn new(resolver: R, interval: Duration) -> Names<R> {
        Names { resolver: Arc::new(resolver), interval, names: BTreeMap::new(), lookups: JoinSet::new() }
    }

    /// Begins with what was known before a restart.
    pub fn remember(&mut self, host: Arc<str>, mut addresses: Vec<IpAddr>) {
        addresses.sort();
        addresses.dedup();
        let resolved = Resolved::Addresses(addresses.into(), None);
        self.names.insert(host, Name { resolved, due: Instant::now(), is_under_way: false });
    }

    /// Needs these names and no others.
    pub fn want_only(&mut self, hosts: &BTreeSet<Arc<str>>) {
        self.names.retain(|host, _| hosts.contains(host));
        self.want(hosts);
    }

    /// Needs these names too.
    pub fn want(&mut self, hosts: &BTreeSet<Arc<str>>) {
        let now = Instant::now();
        for host in hosts {
            self.names.entry(host.clone()).or_insert_with(|| Name {
                resolved: Resolved::Pending,
                due: now,
                is_under_way: false,
            });
        }
    }

    pub fn get(&self, host: &str) -> Resolved {
        self.names.get(host).map_or(Resolved::Pending, |name| name.resolved.clone())
    }

    /// Whether there are names that were never tried.
    pub fn any_pending(&self) -> bool {
        self.names.values().any(|name| name.resolved == Resolved::Pending)
    }

    /// Begins the lookups that are due, and returns when the next is.
    pub fn look_up(&mut self) -> Option<Instant> {
        let now = Instant::now();
        for (host, name) in &mut self.names {
            if self.lookups.len() >= AT_ONCE {
                break;
            }
            if !name.is_under_way && name.due <= now {
                name.is_under_way = true;
                let (resolver, host) = (self.resolver.clone(), host.clone());
                self.lookups.spawn_blocking(move || {
                    let addresses = resolver.resolve(&host);
                    (host, addresses)
                });
            }
        }
        // With all threads busy the next one begins when one of them is done.
        let is_full = self.lookups.len() >= AT_ONCE;
        self.names.values().filter(|name| !is_full && !name.is_under_way).map(|name| name.due).min()
    }

    /// Waits until something else is known of a name. Dropping the future loses nothing.
    pub async fn changed(&mut self) {
        loop {
            let Some(done) = self.lookups.join_next().await else { return std::future::pending().await };
            if let Ok((host, addresses)) = done
                && self.learn(&host, addresses)
            {
                return;
            }
            self.look_up();
        }
    }

    fn learn(&mut self, host: &str, addresses: io::Result<Vec<IpAddr>>) -> bool {
        let Some(name) = self.names.get_mut(host) else { return false };
        let interval = match &addresses {
            Ok(_) => self.interval,
            Err(_) => self.interval.min(RETRY),
        };
        name.is_under_way = false;
        name.due = Instant::now() + interval + jitter(interval / 10);
        let resolved = match addresses {
            Ok(mut addresses) if !addresses.is_empty() => {
                addresses.sort();
                addresses.dedup();
                Resolved::Addresses(addresses.into(), None)
            }
            failed => {
                let why: Arc<str> = match failed {
                    Ok(_) => "it has no address".into(),
                    Err(error) => plain(&error).into(),
                };
                match &name.resolved {
                    Resolved::Addresses(before, _) => Resolved::Addresses(before.clone(), Some(why)),
                    Resolved::Pending | Resolved::Failed(_) => Resolved::Failed(why),
                }
            }
        };
        std::mem::replace(&mut name.resolved, resolved) != name.resolved
    }
}

/// std prefixes what `getaddrinfo` says.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    let said = text.strip_prefix("failed to lookup address information: ").unwrap_or(&text);
    said.to_lowercase()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Fake(Mutex<BTreeMap<String, Vec<&'static str>>>);

    impl Fake {
        fn set(&self, host: &str, addresses: &[&'static str]) {
            self.0.lock().unwrap().insert(host.to_owned(), addresses.to_vec());
        }
    }

    impl Resolve for Arc<Fake> {
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

    /// Lets time pass until `host` is known as `expected`.
    async fn until(names: &mut Names<Arc<Fake>>, host: &str, expected: &str) {
        let deadline = Instant::now() + Duration::from_secs(600);
        while format!("{:?}", names.get(host)) != expected {
            assert!(Instant::now() < deadline, "{host} is {:?}, not {expected}", names.get(host));
            let due = names.look_up().unwrap_or(deadline);
            _ = tokio::time::timeout_at(due, names.changed()).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_resolved_again_and_keeps_its_addresses_when_that_fails() {
        let dns = Arc::new(Fake::default());
        let mut names = Names::new(dns.clone(), Duration::from_secs(30));
        names.want(&hosts(&["db", "web"]));
        assert!(names.any_pending());
        dns.set("db", &["10.0.0.2", "10.0.0.1", "10.0.0.2"]);
        until(&mut names, "db", "Addresses([10.0.0.1, 10.0.0.2], None)").await;
        until(&mut names, "web", r#"Failed("name or service not known")"#).await;
        assert!(!names.any_pending());

        let before = Instant::now();
        dns.set("db", &["10.0.0.3"]);
        until(&mut names, "db", "Addresses([10.0.0.3], None)").await;
        let waited = before.elapsed().as_secs();
        assert!((30..=33).contains(&waited), "{waited} s");
        dns.set("db", &[]);
        until(&mut names, "db", r#"Addresses([10.0.0.3], Some("it has no address"))"#).await;

        names.want_only(&hosts(&["web"]));
        assert_eq!(names.get("db"), Resolved::Pending);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_known_before_a_restart_is_known() {
        let mut names = Names::new(Arc::new(Fake::default()), Duration::from_secs(30));
        names.remember("db".into(), vec!["10.0.0.1".parse().unwrap()]);
        names.want(&hosts(&["db"]));
        assert!(!names.any_pending());
        let expected = r#"Addresses([10.0.0.1], Some("name or service not known"))"#;
        until(&mut names, "db", expected).await;
    }

    #[tokio::test]
    async fn localhost_is_resolved_by_the_host() {
        let mut names = Names::new(SystemResolver, Duration::from_secs(30));
        names.want(&hosts(&["localhost"]));
        names.look_up();
        tokio::time::timeout(Duration::from_secs(30), names.changed()).await.unwrap();
        match names.get("localhost") {
            Resolved::Addresses(addresses, None) => assert!(addresses.iter().all(IpAddr::is_loopback)),
            other => panic!("{other:?}"),
        }
    }
}
