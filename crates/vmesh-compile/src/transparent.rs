//! Captured connections to a service: the Envoy listeners that receive them, and the `Destination` that tells
//! the node's agent which names to answer and which addresses to capture.
//!
//! ```text
//! program -> 246.94.83.229:80 -> rules of the host -> virtual_outbound -> outbound|246.94.83.229:80 -> routes of the service
//! program -> 10.0.1.11:8080   -> rules of the host -> virtual_outbound -> outbound|10.0.1.11:8080   -> routes of the service
//! ```
//!
//! Each listener is a resource of its own, identical for all nodes of a class. A change to one service, or an
//! endpoint added or removed, therefore never closes connections of another. A connection to the real address
//! of an endpoint is load-balanced over the whole service like any other: it need not reach the endpoint that
//! the program addressed.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use vmesh_catalog::World;
use vmesh_dns::virtual_ips::{Collision, Ranges, VirtualAddresses, VirtualIps};
use vmesh_model::document::{CaptureSettings, OnLoss};
use vmesh_model::{Endpoint, Health, Place, Problem, ServiceName};
use vmesh_proto::agent::{Destination, destination};
use vmesh_xds::{Kind, Resource};

use crate::class::CapturedDestinations;
use crate::listener::{capture_listener, forward_to_service};
use crate::owners::{AddressOwners, can_be_captured};
use crate::service::{Shape, reuse_equal};

/// The SSH port. No host captures it, so that an administrator is never locked out; see `vmesh_capture`.
const SSH: u16 = 22;

/// The virtual address of every service, and the collisions that left a service without one.
#[derive(Debug, Default)]
pub(crate) struct VirtualAddressTable {
    ips: VirtualIps,
    collisions: BTreeMap<Arc<str>, Vec<Collision>>,
}

impl VirtualAddressTable {
    pub(crate) fn new(world: &World) -> VirtualAddressTable {
        let (ips, all) = VirtualIps::new(
            &Ranges::default(),
            // DNS does not distinguish names that differ by case. A service whose DNS name belongs to another
            // service gets no virtual address, because no program could resolve it.
            world
                .names
                .sort(world.service_names().filter(|name| world.names.shadowed_by(name).is_none()))
                .into_iter()
                .map(ServiceName::shared),
        );
        let mut collisions: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for collision in all {
            collisions.entry(collision.name.clone()).or_default().push(collision);
        }
        VirtualAddressTable { ips, collisions }
    }

    /// Returns the names whose addresses or collisions differ from those in `other`.
    pub(crate) fn differing<'a>(
        &'a self,
        other: &'a VirtualAddressTable,
    ) -> impl Iterator<Item = &'a Arc<str>> {
        let moved = self.ips.iter().filter(|(name, addresses)| other.ips.get(name) != Some(*addresses));
        let collided = self.collisions.iter().filter(|(name, all)| other.collisions.get(*name) != Some(*all));
        moved.map(|(name, _)| name).chain(collided.map(|(name, _)| name))
    }
}

/// The inputs for captured connections that depend on all services: virtual addresses and address owners.
#[derive(Debug, Default)]
pub(crate) struct CaptureIndex {
    pub(crate) virtuals: VirtualAddressTable,
    /// The owners of endpoint addresses; `None` unless real addresses are captured.
    pub(crate) owners: Option<AddressOwners>,
}

impl CaptureIndex {
    /// Updates the index to the world `now`. Returns `names` and all other services that their change
    /// affects.
    pub(crate) fn update(
        &mut self,
        before: &World,
        now: &World,
        names: Vec<ServiceName>,
    ) -> Vec<ServiceName> {
        let mut all: BTreeSet<ServiceName> = names.iter().cloned().collect();
        if let Some(owners) = &mut self.owners {
            all.extend(owners.update(before, now, &names));
        }
        let has_other_names = names.iter().any(|name| before.is_known(name) != now.is_known(name));
        // The order of names can change without any name being added or removed.
        if has_other_names || !Arc::ptr_eq(&before.names, &now.names) {
            let renewed = VirtualAddressTable::new(now);
            let differing = renewed.differing(&self.virtuals).chain(self.virtuals.differing(&renewed));
            all.extend(differing.filter_map(|name| name.parse().ok()));
            self.virtuals = renewed;
        }
        all.into_iter().collect()
    }
}

/// The resources of a service for captured connections.
#[derive(Debug, Clone)]
pub(crate) struct CaptureResources {
    /// The virtual addresses with the service's port. The first one names the listener.
    pub(crate) at: Vec<SocketAddr>,
    listener: Option<Arc<Resource>>,
    by_endpoint: BTreeMap<SocketAddr, Arc<Resource>>,
    destination: Arc<Resource>,
}

/// A service to compile for captured connections.
pub(crate) struct CaptureInput<'a> {
    pub(crate) world: &'a World,
    pub(crate) index: &'a CaptureIndex,
    pub(crate) name: &'a ServiceName,
    pub(crate) shape: &'a Arc<Shape>,
    /// All endpoints of the service, including those that its callers cannot use. The default port is
    /// derived from all of them, so every caller gets the same port.
    pub(crate) endpoints: &'a [Endpoint],
    pub(crate) capture: CaptureSettings,
    /// Whether the callers' hosts have IPv6.
    pub(crate) ipv6: bool,
}

impl CaptureResources {
    /// Compiles the resources for nodes that capture `captured`. `before` is the previous result, and whether
    /// it was compiled from the same shape.
    pub(crate) fn of(
        subject: &CaptureInput<'_>,
        captured: CapturedDestinations,
        before: Option<(&CaptureResources, bool)>,
        problems: &mut Vec<Problem>,
    ) -> CaptureResources {
        let CaptureInput { name, shape, index, .. } = *subject;
        let port = subject.port(problems);
        let at: Vec<_> = port.map(|port| subject.virtual_addresses(port, problems)).unwrap_or_default();
        let stat = format!("outbound|{name}");
        let filter = OnceCell::new();
        let make_filter = || forward_to_service(&stat, name, &shape.effective, &shape.shares);
        // A resource of the same name compiled from the same shape is identical, so it is reused.
        let reusable = before.filter(|(_, same_shape)| *same_shape).map(|(before, _)| before);
        let listener = |addresses: &[SocketAddr], before: Option<&Arc<Resource>>| {
            let listener = capture_listener(addresses, &stat, filter.get_or_init(make_filter).clone())?;
            let new = Resource::new(Kind::Listener, listener.name.as_str(), &listener);
            Some(reuse_equal(before.map(std::slice::from_ref).unwrap_or_default(), new))
        };
        let of_the_service = match reusable.filter(|before| before.at == at) {
            Some(before) => before.listener.clone(),
            None => listener(&at, before.and_then(|(before, _)| before.listener.as_ref())),
        };
        let mut by_endpoint = BTreeMap::new();
        if let (CapturedDestinations::VirtualAndReal, Some(owners)) = (captured, &index.owners) {
            let mut shared = BTreeMap::new();
            for endpoint in subject.usable().filter(|endpoint| can_be_captured(endpoint)) {
                let address = endpoint.address;
                if let Some(first) = owners.first_owner(address).filter(|first| *first != name) {
                    shared.entry(first).or_insert_with(Vec::new).push(address);
                    continue;
                }
                let old = before.and_then(|(before, _)| before.by_endpoint.get(&address));
                let resource = match old.filter(|_| reusable.is_some()) {
                    Some(same) => Some(same.clone()),
                    None => listener(&[address], old),
                };
                by_endpoint.extend(resource.map(|resource| (address, resource)));
            }
            problems.extend(
                shared
                    .into_iter()
                    .map(|(first, addresses)| subject.shared_address_problem(first, &addresses)),
            );
        }
        let message = subject.destination(captured, port, &at, &by_endpoint);
        let destination = Resource::new(Kind::Local, name.as_str(), &message);
        let destination = reuse_equal(
            before.map(|(before, _)| std::slice::from_ref(&before.destination)).unwrap_or_default(),
            destination,
        );
        CaptureResources { at, listener: of_the_service, by_endpoint, destination }
    }

    pub(crate) fn resources(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.listener.iter().chain(self.by_endpoint.values()).chain([&self.destination])
    }
}

impl<'a> CaptureInput<'a> {
    fn usable(&self) -> impl Iterator<Item = &'a Endpoint> {
        let ipv6 = self.ipv6;
        self.endpoints.iter().filter(move |endpoint| ipv6 || endpoint.address.is_ipv4())
    }

    /// Returns the port at the service's virtual addresses: the port of its document, else the one from
    /// discovery, else the most common port of its endpoints.
    fn port(&self, problems: &mut Vec<Problem>) -> Option<u16> {
        let documented = self.world.documents.services.get(self.name).and_then(|document| document.port);
        let registered = || self.world.services.get(self.name).and_then(|service| service.port);
        if let Some(port) = documented.or_else(registered) {
            return Some(port);
        }
        let mut counts: BTreeMap<u16, usize> = BTreeMap::new();
        for endpoint in self.endpoints {
            *counts.entry(endpoint.address.port()).or_default() += 1;
        }
        // The lowest port wins a tie.
        let (port, count) = counts.iter().rev().max_by_key(|(_, count)| **count)?;
        if counts.len() > 1 {
            let all: Vec<_> = counts.keys().take(5).map(u16::to_string).collect();
            let more = if counts.len() > 5 { " and more" } else { "" };
            problems.push(self.problem(format!(
                "its endpoints listen on ports {}{more}, so at its virtual address it has port {port}, that of {count} of \
                 {}; say which with `port`, or it changes when they do",
                all.join(", "),
                self.endpoints.len()
            )));
        }
        Some(*port)
    }

    fn virtual_addresses(&self, port: u16, problems: &mut Vec<Problem>) -> Vec<SocketAddr> {
        if port == SSH {
            problems.push(self.problem(
                "its port is 22, SSH, which is never captured: it has no virtual address; its name means its endpoints, where \
                 these have that port"
                    .to_owned(),
            ));
            return Vec::new();
        }
        let collisions = self.index.virtuals.collisions.get(self.name.as_str());
        problems
            .extend(collisions.into_iter().flatten().map(|collision| self.problem(collision.to_string())));
        let Some(VirtualAddresses { v4, v6 }) = self.index.virtuals.ips.get(self.name.as_str()) else {
            return Vec::new();
        };
        let v6 = v6.filter(|_| self.ipv6);
        let addresses = v4.map(IpAddr::from).into_iter().chain(v6.map(IpAddr::from));
        addresses.map(|ip| SocketAddr::new(ip, port)).collect()
    }

    fn destination(
        &self,
        captured: CapturedDestinations,
        port: Option<u16>,
        at: &[SocketAddr],
        listeners: &BTreeMap<SocketAddr, Arc<Resource>>,
    ) -> Destination {
        let text = |v4: bool| at.iter().find(|at| at.is_ipv4() == v4).map(|at| at.ip().to_string());
        let on_port = !self.endpoints.is_empty()
            && self.endpoints.iter().all(|endpoint| Some(endpoint.address.port()) == port);
        // An agent that neither captures real addresses nor answers DNS queries with them does not need the
        // endpoint list, so it is not woken by every endpoint change.
        let is_named = self.world.names.shadowed_by(self.name).is_none();
        let lists_endpoints = is_named && (captured == CapturedDestinations::VirtualAndReal || on_port);
        let endpoint = |endpoint: &Endpoint| destination::Endpoint {
            address: endpoint.address.to_string(),
            capture: listeners.contains_key(&endpoint.address),
            out_of_service: matches!(endpoint.health, Health::Unhealthy | Health::Draining),
        };
        let on_loss = match self.capture.on_loss {
            None => destination::OnLoss::Unspecified,
            Some(OnLoss::Open) => destination::OnLoss::Open,
            Some(OnLoss::Closed) => destination::OnLoss::Closed,
        };
        Destination {
            service: self.name.to_string(),
            port: port.unwrap_or_default().into(),
            virtual_v4: text(true).unwrap_or_default(),
            virtual_v6: text(false).unwrap_or_default(),
            endpoints: self.usable().filter(|_| lists_endpoints).map(endpoint).collect(),
            endpoints_on_port: on_port,
            percent: self.capture.percent,
            on_loss: on_loss.into(),
        }
    }

    fn shared_address_problem(&self, first: &ServiceName, addresses: &[SocketAddr]) -> Problem {
        let one = addresses.iter().min().map(SocketAddr::to_string).unwrap_or_default();
        let which = match addresses.len() {
            1 => one,
            n => format!("{n} addresses ({one} is one of them)"),
        };
        self.problem(format!(
            "{which} of `{}` and of `{first}`: a captured connection to a real address counts as a call to the first by \
             name, `{first}`; call `{}` by its own name",
            self.name, self.name
        ))
    }

    fn problem(&self, message: String) -> Problem {
        let documented = self.world.documents.services.get(self.name).map(|document| document.place.clone());
        let registered =
            || self.world.services.get(self.name).and_then(|service| service.places.first().cloned());
        let place = documented.or_else(registered).unwrap_or_else(|| Place::file("documents"));
        Problem::new(place, format!("Service `{}`", self.name), message)
    }
}
