//! Whose endpoint an address is: where several services have it, a captured connection to it can only count as a call
//! to one of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use vmesh_catalog::World;
use vmesh_model::ServiceName;

/// The services that have an endpoint at an address, in the order of their names.
#[derive(Debug, Default)]
pub(crate) struct Owners(BTreeMap<SocketAddr, Vec<ServiceName>>);

impl Owners {
    pub(crate) fn new(world: &World) -> Owners {
        let mut owners = Owners::default();
        for (name, service) in world.services.iter() {
            service.endpoints.iter().for_each(|endpoint| owners.add(endpoint.address, name));
        }
        owners
    }

    /// The service that connections to `address` count as calls to: the first by name, so that it depends on nothing but
    /// what there is.
    pub(crate) fn first(&self, address: SocketAddr) -> Option<&ServiceName> {
        self.0.get(&address)?.first()
    }

    /// Takes over what `now` says of `names`. Returns the services that share an address with one of them which came or
    /// went: theirs may be the first name now, or no longer.
    pub(crate) fn update(
        &mut self,
        before: &World,
        now: &World,
        names: &[ServiceName],
    ) -> BTreeSet<ServiceName> {
        let mut concerned = BTreeSet::new();
        for name in names {
            let of = |world: &World| world.services.get(name).map(|service| service.endpoints.clone());
            let (old, new) = (of(before).unwrap_or_default(), of(now).unwrap_or_default());
            if Arc::ptr_eq(&old, &new) {
                continue;
            }
            let addresses = |endpoints: &[vmesh_model::Endpoint]| {
                endpoints.iter().map(|e| e.address).collect::<BTreeSet<_>>()
            };
            let (old, new) = (addresses(&old), addresses(&new));
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
