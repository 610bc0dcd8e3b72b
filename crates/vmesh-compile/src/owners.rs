//! The owner of each endpoint address. If several services have an endpoint at one address, a captured
//! connection to it counts as a call to only one of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use vmesh_catalog::World;
use vmesh_dns::Ranges;
use vmesh_model::{Endpoint, ServiceName};

/// Reports whether connections to the address of `endpoint` can be captured. Loopback, link-local and similar
/// addresses are excluded because they mean another destination on each host, and virtual addresses because
/// Envoy has listeners for them anyway. An endpoint given by hostname is excluded because the name may
/// resolve to another address by the time a program connects.
pub(crate) fn can_be_captured(endpoint: &Endpoint) -> bool {
    let (ip, ranges) = (endpoint.address.ip(), Ranges::default());
    let is_unfit = match ip {
        IpAddr::V4(ip) => {
            ip.is_loopback()
                || ip.is_unspecified()
                || ip.is_link_local()
                || ip.is_broadcast()
                || ranges.v4.contains(ip)
        }
        IpAddr::V6(ip) => {
            ip.is_loopback()
                || ip.is_unspecified()
                || ip.is_unicast_link_local()
                || ip.to_ipv4_mapped().is_some()
                || ranges.v6.contains(ip)
        }
    };
    endpoint.hostname.is_none() && !is_unfit && !ip.is_multicast()
}

/// The services that have an endpoint at each address, sorted by name.
#[derive(Debug, Default)]
pub(crate) struct AddressOwners(BTreeMap<SocketAddr, Vec<ServiceName>>);

impl AddressOwners {
    pub(crate) fn new(world: &World) -> AddressOwners {
        let mut owners = AddressOwners::default();
        for (name, service) in world.services.iter() {
            addresses(&service.endpoints).for_each(|address| owners.add(address, name));
        }
        owners
    }

    /// Returns the service to which connections to `address` are attributed: the first by name, so that all
    /// replicas attribute them alike.
    pub(crate) fn first_owner(&self, address: SocketAddr) -> Option<&ServiceName> {
        self.0.get(&address)?.first()
    }

    /// Updates the entries of the services `names` from the world `now`. Returns the other services at each
    /// address that was added or removed, because the first name at that address may have changed.
    pub(crate) fn update(
        &mut self,
        before: &World,
        now: &World,
        names: &[ServiceName],
    ) -> BTreeSet<ServiceName> {
        let mut concerned = BTreeSet::new();
        for name in names {
            let endpoints = |world: &World| world.services.get(name).map(|service| service.endpoints.clone());
            let (old, new) = (endpoints(before).unwrap_or_default(), endpoints(now).unwrap_or_default());
            if Arc::ptr_eq(&old, &new) {
                continue;
            }
            let (old, new): (BTreeSet<_>, BTreeSet<_>) =
                (addresses(&old).collect(), addresses(&new).collect());
            for address in old.difference(&new) {
                self.remove(*address, name);
                concerned.extend(self.0.get(address).into_iter().flatten().cloned());
            }
            for address in new.difference(&old) {
                concerned.extend(self.0.get(address).into_iter().flatten().cloned());
                self.add(*address, name);
            }
        }
        concerned
    }

    fn add(&mut self, address: SocketAddr, name: &ServiceName) {
        let names = self.0.entry(address).or_default();
        if let Err(at) = names.binary_search(name) {
            names.insert(at, name.clone());
        }
    }

    fn remove(&mut self, address: SocketAddr, name: &ServiceName) {
        let Some(names) = self.0.get_mut(&address) else { return };
        names.retain(|other| other != name);
        if names.is_empty() {
            self.0.remove(&address);
        }
    }
}

fn addresses(endpoints: &[Endpoint]) -> impl Iterator<Item = SocketAddr> {
    endpoints.iter().filter(|endpoint| can_be_captured(endpoint)).map(|endpoint| endpoint.address)
}
