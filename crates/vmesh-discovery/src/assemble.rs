//! From what a format says to what can be dialled: names are resolved, and what did not change keeps its pointer.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use vmesh_model::endpoint::dialable;
use vmesh_model::yaml::short;
use vmesh_model::{Endpoint, Host, Problem, Registration, ServiceName, State};
use vmesh_text::printable;

use crate::format::{ParsedEndpoint, ParsedService, subject_of, too_many};
use crate::resolve::{Names, Resolve, Resolved};
use crate::source::{Extent, Registrations, Seen, shown};

/// How long the first view of a source waits for names to be resolved: without them services would begin without
/// endpoints, and a control plane that knows nothing from before would take them from every proxy. A name server that is
/// dead costs a lookup 5 to 30 s.
pub(crate) const FIRST_NAMES: Duration = Duration::from_secs(30);

/// What is known of a service.
#[derive(Debug, Clone)]
pub enum Known {
    Parsed(Arc<ParsedService>),
    /// From before a restart, and it could not be read since. Its names are resolved already.
    Restored(Arc<Registration>),
}

/// A service, and why what its source says of it now cannot be used.
#[derive(Debug, Clone)]
pub struct Told {
    pub known: Known,
    pub stale_because: Option<Arc<str>>,
    /// Why it may have more endpoints than can be read.
    pub partial_because: Option<Arc<str>>,
}

impl Told {
    /// What the source says now.
    pub fn fresh(service: Arc<ParsedService>) -> Told {
        let partial_because = service.partial_because.clone();
        Told { known: Known::Parsed(service), stale_because: None, partial_because }
    }

    /// What was known before, because what the source says now cannot be used.
    pub fn stale(known: Known, because: impl Into<Arc<str>>) -> Told {
        Told { known, stale_because: Some(because.into()), partial_because: None }
    }
}

/// All that a source says, names not resolved.
#[derive(Debug, Clone, Default)]
pub struct Statement {
    pub services: BTreeMap<ServiceName, Told>,
    pub problems: Vec<Problem>,
    /// Services that are absent because the source says in as many words that there is nothing.
    pub emptied: BTreeSet<ServiceName>,
    /// See [`Registrations::unusable`].
    pub unusable: Vec<Arc<str>>,
    /// See [`Registrations::left_out`].
    pub left_out: Vec<Arc<str>>,
}

impl Statement {
    /// Takes what is told of the services in `only`, and all that is not of one service. One of these that is not told is gone.
    pub fn replace(&mut self, only: BTreeSet<ServiceName>, told: Statement) {
        let mut services = std::mem::take(&mut self.services);
        for name in only {
            services.remove(&name);
        }
        services.extend(told.services);
        *self = Statement { services, ..told };
    }
}

/// Makes [`Registrations`] of [`Statement`]s, for one source.
pub struct Assembler<R> {
    source: Arc<str>,
    names: Names<R>,
    built: BTreeMap<ServiceName, Built>,
}

/// A service with its names resolved.
#[derive(Debug, Clone)]
struct Built {
    parsed: Arc<ParsedService>,
    has_names: bool,
    /// A name of it has no address, and may have one: it has not been looked up yet, or no name server answered.
    is_unresolved: bool,
    seen: Seen,
    problems: Vec<Problem>,
}

impl<R: Resolve> Assembler<R> {
    /// `interval` is how often names are resolved again; `last_good` what was known before a restart, whose names
    /// are known until they are resolved again.
    pub fn new(
        source: Arc<str>,
        resolver: R,
        interval: Duration,
        last_good: Option<&Registrations>,
    ) -> Assembler<R> {
        let mut names = Names::new(resolver, interval);
        for (host, addresses) in resolved_before(last_good) {
            names.remember(host, addresses.into_iter().map(|address| address.ip()).collect());
        }
        Assembler { source, names, built: BTreeMap::new() }
    }

    /// Takes note of the names that `told` needs. Those that it does not need are forgotten, unless it `may_grow`:
    /// what has not been read yet may need a name that was known before.
    pub fn want<'a>(&mut self, told: impl IntoIterator<Item = &'a Told>, may_grow: bool) {
        let hosts: BTreeSet<Arc<str>> = told.into_iter().flat_map(hosts).collect();
        if may_grow { self.names.want(&hosts) } else { self.names.want_only(&hosts) }
    }

    /// Whether there are names that were never tried: services would begin without endpoints.
    pub fn any_pending(&self) -> bool {
        self.names.any_pending()
    }

    /// Begins the lookups that are due, and returns when the next is.
    pub fn look_up(&mut self) -> Option<Instant> {
        self.names.look_up()
    }

    /// Waits until something else is known of a name. Dropping the future loses nothing.
    pub async fn changed(&mut self) {
        self.names.changed().await;
    }

    /// The view of `statement` as of now. A service whose names are looked up for the first time is not in it.
    pub fn view(&mut self, statement: &Statement) -> Registrations {
        let mut view = Registrations {
            services: BTreeMap::new(),
            problems: statement.problems.clone(),
            emptied: statement.emptied.clone(),
            unusable: statement.unusable.iter().map(shown).collect(),
            left_out: statement.left_out.iter().map(shown).collect(),
            unresolved: self.names.unresolved(),
        };
        // Both are sorted by name, and so is what comes out.
        let mut known_before = std::mem::take(&mut self.built).into_iter().peekable();
        let mut built = Vec::with_capacity(statement.services.len());
        let mut services = Vec::with_capacity(statement.services.len());
        for (name, told) in &statement.services {
            while known_before.next_if(|(before, _)| before < name).is_some() {}
            let before = known_before.next_if(|(before, _)| before == name).map(|(_, before)| before);
            let seen = match &told.known {
                Known::Restored(registration) => Seen::fresh(registration.clone()),
                Known::Parsed(parsed) => {
                    let known = before.as_ref().map(|before| before.seen.registration.clone());
                    let mut now = build(parsed, before, &self.names, &self.source);
                    view.problems.extend(now.problems.iter().cloned());
                    let is_unknown = now.is_unresolved && now.seen.registration.endpoints.is_empty();
                    match known.filter(|known| !known.endpoints.is_empty()) {
                        Some(known) if is_unknown => {
                            now.seen.registration = known;
                            now.seen.extent = Extent::Nothing;
                        }
                        _ => {}
                    }
                    let seen = now.seen.clone();
                    built.push((name.clone(), now));
                    if is_unknown && seen.registration.endpoints.is_empty() {
                        let because = seen.because.as_deref().unwrap_or("its names are not resolved");
                        view.unusable.push(format!("service `{name}`: {because}").into());
                        // Nothing is known of where it is: that it has no endpoints is nobody's word.
                        continue;
                    }
                    seen
                }
            };
            let seen = match (&told.stale_because, &told.partial_because) {
                (None, None) => seen,
                (Some(because), _) => Seen {
                    state: State::Stale,
                    because: Some(shown(because)),
                    extent: Extent::Nothing,
                    ..seen
                },
                (None, Some(because)) => {
                    let because = seen.because.or_else(|| Some(shown(because)));
                    Seen { because, extent: Extent::Part, ..seen }
                }
            };
            services.push((name.clone(), seen));
        }
        view.services = services.into_iter().collect();
        self.built = built.into_iter().collect();
        view.unusable.sort();
        view.unusable.dedup();
        view.left_out.sort();
        view.left_out.dedup();
        view.problems.sort();
        view.problems.dedup();
        view
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

/// Puts addresses for names. A name that has none yet withholds itself, and not its service; what was known of a service
/// that is looked up again stays until its names are. What comes out as it was keeps its pointer.
fn build<R: Resolve>(
    parsed: &Arc<ParsedService>,
    before: Option<Built>,
    names: &Names<R>,
    source: &Arc<str>,
) -> Built {
    let before = match before {
        Some(before) if !before.has_names && Arc::ptr_eq(&before.parsed, parsed) => return before,
        before => before,
    };
    let subject = subject_of(&parsed.name);
    let mut endpoints: BTreeMap<SocketAddr, Endpoint> = BTreeMap::new();
    let (mut problems, mut unresolved, mut has_names, mut is_unresolved) = (Vec::new(), None, false, false);
    let (mut is_pending, mut is_overdue) = (false, false);
    // Records without an address that other hosts can dial.
    let mut undialable = 0;
    for endpoint in &parsed.endpoints {
        let port = endpoint.address.port.get();
        match &endpoint.address.host {
            Host::Ip(ip) => match dialable(*ip) {
                Ok(ip) => {
                    let address = SocketAddr::new(ip, port);
                    endpoints.insert(address, resolved(endpoint, address, None, source));
                }
                Err(why) => {
                    undialable += 1;
                    let node = endpoint.labels.get("node").map(|node| format!("node `{}`: ", short(node)));
                    let message = format!("{}{why}; this endpoint is left out", node.unwrap_or_default());
                    problems.push(Problem::new(endpoint.place.clone(), subject.clone(), message));
                }
            },
            Host::Name(host) => {
                has_names = true;
                let (addresses, failure, outcome) = match names.get(host) {
                    Resolved::Pending => {
                        is_unresolved = true;
                        is_pending = true;
                        is_overdue |= names.is_overdue(host);
                        let overdue =
                            names.is_overdue(host).then(|| "no name server has answered yet".into());
                        // A lookup that has only just begun is nothing to be told of.
                        unresolved.get_or_insert_with(|| format!("`{host}` is being looked up"));
                        (Arc::from([]), overdue, "this endpoint is left out until then")
                    }
                    Resolved::Addresses(addresses, failure) => {
                        (addresses, failure, "its last addresses stay in force")
                    }
                    Resolved::Failed(why) => {
                        is_unresolved |= names.may_come(host);
                        (Arc::from([]), Some(why), "this endpoint is left out")
                    }
                };
                let before = problems.len();
                for ip in addresses.iter() {
                    let ip = match dialable_for(host, *ip) {
                        Ok(ip) => ip,
                        Err(why) => {
                            let message = format!("`{host}`: {why}; this endpoint is left out");
                            problems.push(Problem::new(endpoint.place.clone(), subject.clone(), message));
                            continue;
                        }
                    };
                    let address = SocketAddr::new(ip, port);
                    // One that is given by its address is described better than one that is found by a name.
                    let named = || resolved(endpoint, address, Some(host.clone()), source);
                    endpoints.entry(address).or_insert_with(named);
                }
                undialable +=
                    usize::from(!addresses.is_empty() && problems.len() == before + addresses.len());
                if let Some(why) = failure {
                    let message = format!("`{host}` cannot be resolved: {why}; {outcome}");
                    unresolved.get_or_insert_with(|| message.clone());
                    problems.push(Problem::new(endpoint.place.clone(), subject.clone(), message));
                }
            }
        }
    }
    if is_pending && !is_overdue {
        // Its new names will be known in a moment: until then nothing of it goes.
        for known in before.iter().flat_map(|before| before.seen.registration.endpoints.iter()) {
            endpoints.entry(known.address).or_insert_with(|| known.clone());
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
        Some(why) => Seen::stale(registration, printable(&why).as_ref()),
        None => Seen::fresh(registration),
    };
    seen.empty_on_purpose = parsed.endpoints.is_empty();
    let records = parsed.endpoints.len();
    if too_many(undialable, records) {
        // As with records that make no sense: what is missing is likely to be among these, so nothing is taken away.
        let why = format!("{undialable} of {records} records have no address that can be dialled");
        let is_nothing = undialable == records;
        seen.extent = if is_nothing { Extent::Nothing } else { Extent::Part };
        if is_nothing {
            seen.state = State::Stale;
        }
        seen.because.get_or_insert_with(|| why.into());
    }
    if is_overdue {
        // What its new name stands for may be what is missing now.
        seen.extent = Extent::Part;
    }
    Built { parsed: parsed.clone(), has_names, is_unresolved, seen, problems }
}

/// Returns the address for which `host` stands on every host, or why it is none: what a name means on this host alone says
/// nothing to others.
fn dialable_for(host: &str, ip: IpAddr) -> Result<IpAddr, String> {
    let ip = dialable(ip)?;
    let is_local = host == "localhost" || host.ends_with(".localhost");
    if ip.is_loopback() && !is_local {
        return Err(format!("it stands for {ip} on this host only, see its /etc/hosts"));
    }
    Ok(ip)
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
