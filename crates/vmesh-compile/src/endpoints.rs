//! EDS: the endpoints of a cluster, grouped by locality zone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use vmesh_model::document::{LoadBalancing, Locality};
use vmesh_model::{Endpoint, Health};
use vmesh_proto::envoy::config::core::v3::address::Address as AddressKind;
use vmesh_proto::envoy::config::core::v3::socket_address::PortSpecifier;
use vmesh_proto::envoy::config::core::v3::{Address, HealthStatus, Locality as EnvoyLocality, SocketAddress};
use vmesh_proto::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use vmesh_proto::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint as EnvoyEndpoint, LbEndpoint, LocalityLbEndpoints,
};
use vmesh_proto::uint32;

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
    endpoints: &[Endpoint],
    balancing: &LoadBalancing,
    zone: Option<&str>,
) -> ClusterLoadAssignment {
    let endpoints: Vec<&Endpoint> = endpoints.iter().collect();
    let mut groups: BTreeMap<(u32, &str, &str), Vec<&Endpoint>> = BTreeMap::new();
    for (endpoint, priority) in endpoints.iter().zip(priorities(&endpoints, balancing, zone)) {
        let zone = endpoint.zone.as_deref().unwrap_or_default();
        groups.entry((priority, region(endpoint), zone)).or_default().push(endpoint);
    }
    let localities = groups
        .into_iter()
        .map(|((priority, region, zone), endpoints)| locality(region, zone, priority, &endpoints));
    ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints: localities.collect(),
        ..Default::default()
    }
}

fn locality(region: &str, zone: &str, priority: u32, endpoints: &[&Endpoint]) -> LocalityLbEndpoints {
    let weight = endpoints.iter().map(|e| e.weight.get()).fold(0, u32::saturating_add);
    LocalityLbEndpoints {
        locality: Some(EnvoyLocality {
            region: region.to_owned(),
            zone: zone.to_owned(),
            ..EnvoyLocality::default()
        }),
        lb_endpoints: endpoints.iter().map(|endpoint| lb_endpoint(endpoint)).collect(),
        load_balancing_weight: Some(uint32(weight)),
        priority,
        ..LocalityLbEndpoints::default()
    }
}

fn lb_endpoint(endpoint: &Endpoint) -> LbEndpoint {
    let health = match endpoint.health {
        // The source reports no health. Envoy treats unknown as healthy, and gRPC uses both.
        Health::Unknown => HealthStatus::Unknown,
        Health::Healthy => HealthStatus::Healthy,
        Health::Unhealthy => HealthStatus::Unhealthy,
        Health::Draining => HealthStatus::Draining,
    };
    LbEndpoint {
        health_status: health.into(),
        load_balancing_weight: Some(uint32(endpoint.weight.get())),
        host_identifier: Some(HostIdentifier::Endpoint(EnvoyEndpoint {
            address: Some(socket_address(endpoint.address)),
            hostname: endpoint.hostname.as_deref().unwrap_or_default().to_owned(),
            ..EnvoyEndpoint::default()
        })),
        ..LbEndpoint::default()
    }
}

/// Returns an assignment with one fixed address: the application behind an inbound listener.
pub(crate) fn local_assignment(name: &str, address: SocketAddr) -> ClusterLoadAssignment {
    let endpoint = LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(EnvoyEndpoint {
            address: Some(socket_address(address)),
            ..EnvoyEndpoint::default()
        })),
        ..LbEndpoint::default()
    };
    ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints: vec![LocalityLbEndpoints {
            lb_endpoints: vec![endpoint],
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
