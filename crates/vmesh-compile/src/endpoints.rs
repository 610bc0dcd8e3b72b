//! EDS: the endpoints of a cluster, grouped by zone.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use vmesh_model::document::Locality;
use vmesh_model::{Endpoint, Health};
use vmesh_proto::envoy::config::core::v3::address::Address as AddressKind;
use vmesh_proto::envoy::config::core::v3::socket_address::PortSpecifier;
use vmesh_proto::envoy::config::core::v3::{Address, HealthStatus, Locality as EnvoyLocality, SocketAddress};
use vmesh_proto::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use vmesh_proto::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint as EnvoyEndpoint, LbEndpoint, LocalityLbEndpoints,
};
use vmesh_proto::uint32;

/// Where a caller stands, as far as it matters to whom it calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Nearness<'a> {
    pub(crate) locality: Locality,
    pub(crate) zone: Option<&'a str>,
}

/// The assignment `name` of `endpoints`. With no endpoint it is empty, and not missing: Envoy keeps its last
/// assignment when one is removed, and answers 503 when one is empty.
///
/// Every locality has a weight, the sum of its endpoints': gRPC skips a locality without one (gRFC A27), and Envoy
/// looks at it only under a locality-weighted policy, which vmesh does not use.
pub(crate) fn assignment<'a>(
    name: &str,
    endpoints: impl Iterator<Item = &'a Endpoint>,
    near: Nearness<'_>,
) -> ClusterLoadAssignment {
    let mut zones: BTreeMap<&str, Vec<&Endpoint>> = BTreeMap::new();
    for endpoint in endpoints {
        zones.entry(endpoint.zone.as_deref().unwrap_or_default()).or_default().push(endpoint);
    }
    // Priorities must have no gap, so without an endpoint of the caller's own zone all zones are the first.
    let own = near.zone.filter(|zone| near.locality == Locality::PreferLocal && zones.contains_key(zone));
    let mut localities: Vec<_> = zones
        .into_iter()
        .map(|(zone, endpoints)| {
            let priority = u32::from(own.is_some_and(|own| own != zone));
            locality(zone, priority, &endpoints)
        })
        .collect();
    localities.sort_by_key(|locality| locality.priority);
    ClusterLoadAssignment { cluster_name: name.to_owned(), endpoints: localities, ..Default::default() }
}

fn locality(zone: &str, priority: u32, endpoints: &[&Endpoint]) -> LocalityLbEndpoints {
    let weight = endpoints.iter().map(|e| e.weight.get()).fold(0, u32::saturating_add);
    LocalityLbEndpoints {
        locality: Some(EnvoyLocality { zone: zone.to_owned(), ..EnvoyLocality::default() }),
        lb_endpoints: endpoints.iter().map(|endpoint| lb_endpoint(endpoint)).collect(),
        load_balancing_weight: Some(uint32(weight)),
        priority,
        ..LocalityLbEndpoints::default()
    }
}

fn lb_endpoint(endpoint: &Endpoint) -> LbEndpoint {
    let health = match endpoint.health {
        // The source knows no health: Envoy treats both alike, and gRPC uses both.
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

/// The assignment of one fixed address: the application behind an inbound listener.
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
