//! EDS: the endpoints of a cluster, grouped by locality zone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use vmesh_model::document::{LoadBalancing, Locality, Subset};
use vmesh_model::node::MTLS_PORT;
use vmesh_model::{Endpoint, Health};
use vmesh_proto::envoy::config::core::v3::address::Address as AddressKind;
use vmesh_proto::envoy::config::core::v3::socket_address::PortSpecifier;
use vmesh_proto::envoy::config::core::v3::{Address, HealthStatus, Locality as EnvoyLocality, SocketAddress};
use vmesh_proto::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use vmesh_proto::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint as EnvoyEndpoint, LbEndpoint, LocalityLbEndpoints,
};
use vmesh_proto::uint32;

use crate::tls::mtls_metadata;

/// The endpoints of a cluster, some of which are called by mTLS.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct CalledEndpoints {
    pub(crate) endpoints: Arc<[Endpoint]>,
    /// The addresses among them that are called by mTLS.
    pub(crate) by_mtls: BTreeSet<SocketAddr>,
}

/// A host that Envoy calls. Several endpoints of a service that are called by mTLS at one node are one host.
struct Target<'a> {
    endpoint: &'a Endpoint,
    by_mtls: bool,
    weight: u32,
    health: Health,
}

impl CalledEndpoints {
    /// Returns the endpoints in `subset`, or all of them if it is `None`.
    pub(crate) fn of_subset(&self, subset: Option<&Subset>) -> CalledEndpoints {
        let Some(subset) = subset else { return self.clone() };
        let members: Arc<[Endpoint]> =
            self.endpoints.iter().filter(|endpoint| subset.contains(endpoint)).cloned().collect();
        let of_members = members.iter().map(|member| member.address);
        let by_mtls = of_members.filter(|address| self.by_mtls.contains(address)).collect();
        CalledEndpoints { endpoints: members, by_mtls }
    }

    fn targets(&self) -> Vec<Target<'_>> {
        let mut targets: Vec<Target<'_>> = Vec::with_capacity(self.endpoints.len());
        let mut at_node: BTreeMap<IpAddr, usize> = BTreeMap::new();
        for endpoint in self.endpoints.iter() {
            let by_mtls = self.by_mtls.contains(&endpoint.address);
            let weight = endpoint.weight.get();
            if by_mtls {
                let known = at_node.entry(endpoint.address.ip()).or_insert(targets.len());
                if let Some(target) = targets.get_mut(*known) {
                    // The node's own Envoy balances among its workloads, so one that can serve is enough.
                    target.weight = target.weight.saturating_add(weight);
                    target.health = better_health(target.health, endpoint.health);
                    continue;
                }
            }
            targets.push(Target { endpoint, by_mtls, weight, health: endpoint.health });
        }
        targets
    }
}

fn better_health(one: Health, other: Health) -> Health {
    let rank = |health: Health| match health {
        Health::Healthy => 0,
        Health::Unknown => 1,
        Health::Draining => 2,
        Health::Unhealthy => 3,
    };
    if rank(other) < rank(one) { other } else { one }
}

/// Returns Envoy's priority of each endpoint for a caller in `zone`: primary endpoints before fallbacks, and
/// within each step local ones before remote ones. Priorities start at 0 and have no gaps, as Envoy requires.
pub fn priorities(endpoints: &[&Endpoint], balancing: &LoadBalancing, zone: Option<&str>) -> Vec<u32> {
    let rank = |endpoint: &Endpoint| {
        let fallback = balancing.fallback.iter().position(|fallback| fallback.contains(endpoint));
        let is_far = balancing.locality == Locality::PreferLocal
            && zone.is_some_and(|zone| endpoint.zone.as_deref() != Some(zone));
        (fallback.map_or(0, |at| at + 1), is_far)
    };
    let all: Vec<_> = endpoints.iter().map(|endpoint| rank(endpoint)).collect();
    let ranks: BTreeSet<_> = all.iter().copied().collect();
    all.iter().map(|rank| u32::try_from(ranks.range(..rank).count()).unwrap_or(u32::MAX)).collect()
}

/// Returns the region of an endpoint: its datacenter, if its source has several.
fn region(endpoint: &Endpoint) -> &str {
    endpoint.labels.get("datacenter").map(|datacenter| &**datacenter).unwrap_or_default()
}

/// Returns the cluster load assignment `name` for `endpoints`. Without endpoints it is empty rather than
/// absent: Envoy keeps its last assignment if the resource is removed, but answers 503 if it is empty.
///
/// Every locality has a weight, the sum of its endpoints' weights. gRPC ignores a locality without a weight
/// (gRFC A27); Envoy uses it only with a locality-weighted policy, which vmesh does not configure.
pub(crate) fn assignment(
    name: &str,
    called: &CalledEndpoints,
    balancing: &LoadBalancing,
    zone: Option<&str>,
) -> ClusterLoadAssignment {
    let targets = called.targets();
    let endpoints: Vec<&Endpoint> = targets.iter().map(|target| target.endpoint).collect();
    let mut groups: BTreeMap<(u32, &str, &str), Vec<&Target<'_>>> = BTreeMap::new();
    for (target, priority) in targets.iter().zip(priorities(&endpoints, balancing, zone)) {
        let zone = target.endpoint.zone.as_deref().unwrap_or_default();
        groups.entry((priority, region(target.endpoint), zone)).or_default().push(target);
    }
    let localities = groups
        .into_iter()
        .map(|((priority, region, zone), targets)| locality(region, zone, priority, &targets));
    ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints: localities.collect(),
        ..Default::default()
    }
}

fn locality(region: &str, zone: &str, priority: u32, targets: &[&Target<'_>]) -> LocalityLbEndpoints {
    let weight = targets.iter().map(|target| target.weight).fold(0, u32::saturating_add);
    LocalityLbEndpoints {
        locality: Some(EnvoyLocality {
            region: region.to_owned(),
            zone: zone.to_owned(),
            ..EnvoyLocality::default()
        }),
        lb_endpoints: targets.iter().map(|target| lb_endpoint(target)).collect(),
        load_balancing_weight: Some(uint32(weight)),
        priority,
        ..LocalityLbEndpoints::default()
    }
}

fn lb_endpoint(target: &Target<'_>) -> LbEndpoint {
    let Target { endpoint, by_mtls, .. } = *target;
    let address = match by_mtls {
        true => SocketAddr::new(endpoint.address.ip(), MTLS_PORT),
        false => endpoint.address,
    };
    let health = match target.health {
        // The source reports no health. Envoy treats unknown as healthy, and gRPC uses both.
        Health::Unknown => HealthStatus::Unknown,
        Health::Healthy => HealthStatus::Healthy,
        Health::Unhealthy => HealthStatus::Unhealthy,
        Health::Draining => HealthStatus::Draining,
    };
    LbEndpoint {
        health_status: health.into(),
        load_balancing_weight: Some(uint32(target.weight)),
        metadata: by_mtls.then(mtls_metadata),
        host_identifier: Some(HostIdentifier::Endpoint(EnvoyEndpoint {
            address: Some(socket_address(address)),
            hostname: endpoint.hostname.as_deref().unwrap_or_default().to_owned(),
            ..EnvoyEndpoint::default()
        })),
    }
}

/// Returns an assignment with fixed addresses: the application behind an inbound listener.
pub(crate) fn local_assignment(name: &str, addresses: &[SocketAddr]) -> ClusterLoadAssignment {
    let endpoint = |address: &SocketAddr| LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(EnvoyEndpoint {
            address: Some(socket_address(*address)),
            ..EnvoyEndpoint::default()
        })),
        ..LbEndpoint::default()
    };
    ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints: vec![LocalityLbEndpoints {
            lb_endpoints: addresses.iter().map(endpoint).collect(),
            ..LocalityLbEndpoints::default()
        }],
        ..ClusterLoadAssignment::default()
    }
}

pub(crate) fn socket_address(address: SocketAddr) -> Address {
    Address {
        address: Some(AddressKind::SocketAddress(SocketAddress {
            address: address.ip().to_string(),
            port_specifier: Some(PortSpecifier::PortValue(address.port().into())),
            ..SocketAddress::default()
        })),
    }
}
