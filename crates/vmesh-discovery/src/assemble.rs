//! Assembles the view of a source from parsed services: resolves host names, and keeps the pointer of each
//! service that did not change.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use vmesh_model::endpoint::dialable;
use vmesh_model::yaml::short;
use vmesh_model::{Endpoint, Host, Problem, Registration, ServiceName, State};
use vmesh_text::printable;

use crate::format::{ParsedEndpoint, ParsedService, subject_of, too_many_bad};
use crate::resolve::{HostNames, Resolution, Resolve};
use crate::source::{Extent, Registrations, ServiceView, escape_text};

/// The time that the first view of a source waits for host names to resolve. Without it, services would start
/// without endpoints, and a control plane without a last good view would remove them from every proxy. One
/// lookup at a dead name server takes 5 to 30 s.
pub(crate) const FIRST_NAMES: Duration = Duration::from_secs(30);

/// The content of a service.
#[derive(Debug, Clone)]
pub enum ServiceContent {
    Parsed(Arc<ParsedService>),
    /// The content from before a restart, because the service has not been read since. Its host names are
    /// already resolved.
    Restored(Arc<Registration>),
}

/// One service as its source states it, and the reason if the present statement of the source is not usable.
#[derive(Debug, Clone)]
pub struct ServiceStatement {
    pub content: ServiceContent,
    pub stale_because: Option<Arc<str>>,
    /// The reason why the service may have endpoints that could not be read.
    pub partial_because: Option<Arc<str>>,
}

impl ServiceStatement {
    /// Returns a service as the source states it at present.
    pub fn fresh(service: Arc<ParsedService>) -> ServiceStatement {
        let partial_because = service.partial_because.clone();
        ServiceStatement { content: ServiceContent::Parsed(service), stale_because: None, partial_because }
    }

    /// Returns the last good content of a service whose present statement is not usable, with the reason.
    pub fn stale(known: ServiceContent, because: impl Into<Arc<str>>) -> ServiceStatement {
        ServiceStatement { content: known, stale_because: Some(because.into()), partial_because: None }
    }
}

/// Everything that a source states, before host names are resolved.
#[derive(Debug, Clone, Default)]
pub struct Statement {
    pub services: BTreeMap<ServiceName, ServiceStatement>,
    pub problems: Vec<Problem>,
    /// Services that are absent because the source states explicitly that they have nothing.
    pub emptied: BTreeSet<ServiceName>,
    /// See [`Registrations::unusable`].
    pub unusable: Vec<Arc<str>>,
    /// See [`Registrations::left_out`].
    pub left_out: Vec<Arc<str>>,
}

impl Statement {
    /// Replaces the services in `only` and everything that does not belong to one service by the content of
    /// `newer`. A service in `only` that is not in `newer` is removed.
    pub fn replace(&mut self, only: BTreeSet<ServiceName>, newer: Statement) {
        let mut services = std::mem::take(&mut self.services);
        for name in only {
            services.remove(&name);
        }
        services.extend(newer.services);
        *self = Statement { services, ..newer };
    }
}

/// Makes [`Registrations`] out of [`Statement`]s, for one source.
///
/// Call [`Assembler::request_names`] for each new statement, then [`Assembler::start_lookups`] to start the lookups, then
/// [`Assembler::view`]. While waiting, poll [`Assembler::changed`] and call `look_up` again at the time it
/// returned; build a new view after each change.
pub struct Assembler<R> {
    source: Arc<str>,
    names: HostNames<R>,
    assembled: BTreeMap<ServiceName, AssembledService>,
}

/// A service with its host names resolved.
#[derive(Debug, Clone)]
struct AssembledService {
    parsed: Arc<ParsedService>,
    has_names: bool,
    /// A host name of the service has no address but may have one: it has not been looked up yet, or no name
    /// server answered.
    is_unresolved: bool,
    service_view: ServiceView,
    problems: Vec<Problem>,
}

impl<R: Resolve> Assembler<R> {
    /// Creates an assembler for the source called `source`.
    ///
    /// Host names are resolved again after `interval`. The addresses in `last_good`, the view from before a
    /// restart, are used until the first lookup.
    pub fn new(
        source: Arc<str>,
        resolver: R,
        interval: Duration,
        last_good: Option<&Registrations>,
    ) -> Assembler<R> {
        let mut names = HostNames::new(resolver, interval);
        for (host, addresses) in addresses_before(last_good) {
            names.add_known(host, addresses.into_iter().map(|address| address.ip()).collect());
        }
        Assembler { source, names, assembled: BTreeMap::new() }
    }

    /// Requests the host names of the services in `statements`. Other names are forgotten, unless `may_grow` is set: a
    /// service that has not been read yet may need a name that was known before.
    pub fn request_names<'a>(
        &mut self,
        statements: impl IntoIterator<Item = &'a ServiceStatement>,
        may_grow: bool,
    ) {
        let hosts: BTreeSet<Arc<str>> = statements.into_iter().flat_map(host_names_of).collect();
        if may_grow { self.names.request(&hosts) } else { self.names.request_only(&hosts) }
    }

    /// Reports whether a host name has never been looked up, so that a service might start without endpoints.
    pub fn has_pending(&self) -> bool {
        self.names.has_pending()
    }

    /// Starts the lookups that are due and returns when the next one is due.
    pub fn start_lookups(&mut self) -> Option<Instant> {
        self.names.start_lookups()
    }

    /// Waits until the result of a lookup changes. Dropping the future loses nothing.
    pub async fn changed(&mut self) {
        self.names.changed().await;
    }

    /// Returns the view of `statement` at present. The view leaves out a service while the first lookup of
    /// all its host names is running.
    pub fn view(&mut self, statement: &Statement) -> Registrations {
        let mut view = Registrations {
            services: BTreeMap::new(),
            problems: statement.problems.clone(),
            emptied: statement.emptied.clone(),
            unusable: statement.unusable.iter().map(escape_text).collect(),
            left_out: statement.left_out.iter().map(escape_text).collect(),
            unresolved: self.names.unresolved(),
        };
        // Both inputs are sorted by name, and so is the result.
        let mut known_before = std::mem::take(&mut self.assembled).into_iter().peekable();
        let mut assembled = Vec::with_capacity(statement.services.len());
        let mut services = Vec::with_capacity(statement.services.len());
        for (name, service_statement) in &statement.services {
            while known_before.next_if(|(before, _)| before < name).is_some() {}
            let before = known_before.next_if(|(before, _)| before == name).map(|(_, before)| before);
            let service_view = match &service_statement.content {
                ServiceContent::Restored(registration) => ServiceView::fresh(registration.clone()),
                ServiceContent::Parsed(parsed) => {
                    let known = before.as_ref().map(|before| before.service_view.registration.clone());
                    let mut now = resolve_service(parsed, before, &self.names, &self.source);
                    view.problems.extend(now.problems.iter().cloned());
                    let is_unknown = now.is_unresolved && now.service_view.registration.endpoints.is_empty();
                    match known.filter(|known| !known.endpoints.is_empty()) {
                        Some(known) if is_unknown => {
                            now.service_view.registration = known;
                            now.service_view.extent = Extent::Nothing;
                        }
                        _ => {}
                    }
                    let service_view = now.service_view.clone();
                    assembled.push((name.clone(), now));
                    if is_unknown && service_view.registration.endpoints.is_empty() {
                        let because = service_view.because.as_deref().unwrap_or("its names are not resolved");
                        view.unusable.push(format!("service `{name}`: {because}").into());
                        // No address of the service is known yet, so it must not be served as a service
                        // without endpoints.
                        continue;
                    }
                    service_view
                }
            };
            let service_view = match (&service_statement.stale_because, &service_statement.partial_because) {
                (None, None) => service_view,
                (Some(because), _) => ServiceView {
                    state: State::Stale,
                    because: Some(escape_text(because)),
                    extent: Extent::Nothing,
                    ..service_view
                },
                (None, Some(because)) => {
                    let because = service_view.because.or_else(|| Some(escape_text(because)));
                    ServiceView { because, extent: Extent::Part, ..service_view }
                }
            };
            services.push((name.clone(), service_view));
        }
        view.services = services.into_iter().collect();
        self.assembled = assembled.into_iter().collect();
        view.unusable.sort();
        view.unusable.dedup();
        view.left_out.sort();
        view.left_out.dedup();
        view.problems.sort();
        view.problems.dedup();
        view
    }
}

/// Returns the host names of a service. For a restored service these are the names before the restart, whose
/// addresses are needed once its file can be read again.
fn host_names_of(service_statement: &ServiceStatement) -> Vec<Arc<str>> {
    match &service_statement.content {
        ServiceContent::Parsed(service) => {
            let hosts = service.endpoints.iter().filter_map(|endpoint| match &endpoint.address.host {
                Host::Name(name) => Some(name.clone()),
                Host::Ip(_) => None,
            });
            hosts.collect()
        }
        ServiceContent::Restored(registration) => {
            registration.endpoints.iter().filter_map(|endpoint| endpoint.hostname.clone()).collect()
        }
    }
}

fn addresses_before(last_good: Option<&Registrations>) -> BTreeMap<Arc<str>, Vec<SocketAddr>> {
    let mut before: BTreeMap<Arc<str>, Vec<SocketAddr>> = BTreeMap::new();
    let services = last_good.into_iter().flat_map(|last_good| last_good.services.values());
    for endpoint in services.flat_map(|service_view| service_view.registration.endpoints.iter()) {
        if let Some(host) = &endpoint.hostname {
            before.entry(host.clone()).or_default().push(endpoint.address);
        }
    }
    before
}

/// Resolves the host names of a service. An endpoint whose name has no address yet is left out, without
/// delaying the rest of the service; endpoints from the previous view stay while a new name is being looked
/// up. An unchanged result keeps its pointer.
fn resolve_service<R: Resolve>(
    parsed: &Arc<ParsedService>,
    before: Option<AssembledService>,
    names: &HostNames<R>,
    source: &Arc<str>,
) -> AssembledService {
    let before = match before {
        Some(before) if !before.has_names && Arc::ptr_eq(&before.parsed, parsed) => return before,
        before => before,
    };
    let mut resolution = ServiceResolution::new(parsed, names, source);
    for endpoint in &parsed.endpoints {
        match &endpoint.address.host {
            Host::Ip(ip) => resolution.add_ip(endpoint, *ip),
            Host::Name(host) => resolution.add_name(endpoint, host),
        }
    }
    if resolution.is_pending && !resolution.is_overdue {
        // The lookup of the new names ends soon; until then every endpoint of the previous view stays.
        for known in before.iter().flat_map(|before| before.service_view.registration.endpoints.iter()) {
            resolution.endpoints.entry(known.address).or_insert_with(|| known.clone());
        }
    }
    let registration = Registration {
        service: parsed.name.clone(),
        protocol: parsed.protocol,
        port: parsed.port.map(Into::into),
        endpoints: std::mem::take(&mut resolution.endpoints).into_values().collect(),
        place: parsed.place.clone(),
    };
    let registration = match before {
        Some(before) if *before.service_view.registration == registration => before.service_view.registration,
        _ => Arc::new(registration),
    };
    let service_view = resolution.view_of(registration);
    let ServiceResolution { has_names, is_unresolved, problems, .. } = resolution;
    AssembledService { parsed: parsed.clone(), has_names, is_unresolved, service_view, problems }
}

/// The endpoints of one service, collected while its host names are resolved.
struct ServiceResolution<'a, R> {
    parsed: &'a ParsedService,
    names: &'a HostNames<R>,
    source: &'a Arc<str>,
    subject: Arc<str>,
    endpoints: BTreeMap<SocketAddr, Endpoint>,
    problems: Vec<Problem>,
    has_names: bool,
    /// See [`AssembledService::is_unresolved`].
    is_unresolved: bool,
    /// The first lookup of a host name has not ended yet.
    is_pending: bool,
    /// The first lookup of a host name is late.
    is_overdue: bool,
    /// The reason why the first unresolved host name has no current address.
    unresolved: Option<String>,
    /// The number of records without an address that other hosts can dial.
    undialable: usize,
}

impl<'a, R: Resolve> ServiceResolution<'a, R> {
    fn new(
        parsed: &'a ParsedService,
        names: &'a HostNames<R>,
        source: &'a Arc<str>,
    ) -> ServiceResolution<'a, R> {
        ServiceResolution {
            parsed,
            names,
            source,
            subject: subject_of(&parsed.name),
            endpoints: BTreeMap::new(),
            problems: Vec::new(),
            has_names: false,
            is_unresolved: false,
            is_pending: false,
            is_overdue: false,
            unresolved: None,
            undialable: 0,
        }
    }

    fn add_problem(&mut self, endpoint: &ParsedEndpoint, message: String) {
        self.problems.push(Problem::new(endpoint.place.clone(), self.subject.clone(), message));
    }

    /// Adds an endpoint with an explicit address.
    fn add_ip(&mut self, endpoint: &ParsedEndpoint, ip: IpAddr) {
        match dialable(ip) {
            Ok(ip) => {
                let address = SocketAddr::new(ip, endpoint.address.port.get());
                self.endpoints.insert(address, endpoint_at(endpoint, address, None, self.source));
            }
            Err(why) => {
                self.undialable += 1;
                let node = endpoint.labels.get("node").map(|node| format!("node `{}`: ", short(node)));
                let message = format!("{}{why}; this endpoint is left out", node.unwrap_or_default());
                self.add_problem(endpoint, message);
            }
        }
    }

    /// Adds an endpoint for each address of the host name `host`.
    fn add_name(&mut self, endpoint: &ParsedEndpoint, host: &Arc<str>) {
        self.has_names = true;
        let (addresses, failure, outcome) = self.look_up(host);
        let mut dialled = 0;
        for ip in addresses.iter() {
            match dialable_for(host, *ip) {
                Ok(ip) => {
                    dialled += 1;
                    let address = SocketAddr::new(ip, endpoint.address.port.get());
                    // A record with an explicit address describes the endpoint better than one found through
                    // a host name.
                    let named = || endpoint_at(endpoint, address, Some(host.clone()), self.source);
                    self.endpoints.entry(address).or_insert_with(named);
                }
                Err(why) => self.add_problem(endpoint, format!("`{host}`: {why}; this endpoint is left out")),
            }
        }
        self.undialable += usize::from(!addresses.is_empty() && dialled == 0);
        if let Some(why) = failure {
            let message = format!("`{host}` cannot be resolved: {why}; {outcome}");
            self.unresolved.get_or_insert_with(|| message.clone());
            self.add_problem(endpoint, message);
        }
    }

    /// Returns the addresses of `host`, the reason if they are not current, and the consequence for the endpoint.
    fn look_up(&mut self, host: &Arc<str>) -> (Arc<[IpAddr]>, Option<Arc<str>>, &'static str) {
        match self.names.get(host) {
            Resolution::Pending => {
                let is_overdue = self.names.is_overdue(host);
                self.is_unresolved = true;
                self.is_pending = true;
                self.is_overdue |= is_overdue;
                // A lookup that has only just begun is not worth a problem.
                self.unresolved.get_or_insert_with(|| format!("`{host}` is being looked up"));
                let failure = is_overdue.then(|| "no name server has answered yet".into());
                (Arc::from([]), failure, "this endpoint is left out until then")
            }
            Resolution::Addresses(addresses, failure) => {
                (addresses, failure, "its last addresses stay in force")
            }
            Resolution::Failed(why) => {
                self.is_unresolved |= self.names.may_exist(host);
                (Arc::from([]), Some(why), "this endpoint is left out")
            }
        }
    }

    /// Returns the view of the service with these endpoints.
    fn view_of(&self, registration: Arc<Registration>) -> ServiceView {
        let mut view = match &self.unresolved {
            Some(why) => ServiceView::stale(registration, printable(why).as_ref()),
            None => ServiceView::fresh(registration),
        };
        let (undialable, records) = (self.undialable, self.parsed.endpoints.len());
        view.empty_on_purpose = records == 0;
        if too_many_bad(undialable, records) {
            // As with invalid records: the missing endpoints are probably among these records, so no endpoint
            // is removed.
            let why = format!("{undialable} of {records} records have no address that can be dialled");
            let is_nothing = undialable == records;
            view.extent = if is_nothing { Extent::Nothing } else { Extent::Part };
            if is_nothing {
                view.state = State::Stale;
            }
            view.because.get_or_insert_with(|| why.into());
        }
        if self.is_overdue {
            // The missing endpoints may be the addresses of the new name.
            view.extent = Extent::Part;
        }
        view
    }
}

/// Returns the address of `host` in the form that every host can dial. Returns the reason if there is none:
/// an address that the name has on this host alone (loopback) is useless to other hosts.
fn dialable_for(host: &str, ip: IpAddr) -> Result<IpAddr, String> {
    let ip = dialable(ip)?;
    let is_local = host == "localhost" || host.ends_with(".localhost");
    if ip.is_loopback() && !is_local {
        return Err(format!("it resolves to {ip} on this host only, see /etc/hosts"));
    }
    Ok(ip)
}

fn endpoint_at(
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
