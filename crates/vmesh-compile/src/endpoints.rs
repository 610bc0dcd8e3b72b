//! EDS: the endpoints of a cluster, grouped by zone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use vmesh_model::document::{Fallback, Locality};
use vmesh_model::{Endpoint, Health};
use vmesh_proto::envoy::config::core::v3::address::Address as AddressKind;
use vmesh_proto::envoy::config::core::v3::socket_address::PortSpecifier;
use vmesh_proto::envoy::config::core::v3::{Address, HealthStatus, Locality as EnvoyLocality, SocketAddress};
use vmesh_proto::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use vmesh_proto::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint as EnvoyEndpoint, LbEndpoint, LocalityLbEndpoints,
};
use vmesh_proto::uint32;

/// Which endpoints a caller wants first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Preference<'a> {
    pub(crate) locality: Locality,
    /// Of the caller.
    pub(crate) zone: Option<&'a str>,
    pub(crate) fallback: &'a [Fallback],
}

impl Preference<'_> {
    /// How many other endpoints come before this one, in steps: first what is no fallback, and in each step first what is
    /// near.
    fn rank(&self, endpoint: &Endpoint) -> (usize, bool) {
        let step =
            self.fallback.iter().position(|fallback| fallback.contains(endpoint)).map_or(0, |at| at + 1);
        let is_far = self.locality == Locality::PreferLocal
            && self.zone.is_some_and(|zone| endpoint.zone.as_deref() != Some(zone));
        (step, is_far)
    }
}

/// The region of an endpoint: the datacenter, where the source has several.
fn region(endpoint: &Endpoint) -> &str {
    endpoint.labels.get("datacenter").map(|datacenter| &**datacenter).unwrap_or_default()
}

/// The assignment `name` of `endpoints`. With no endpoint it is empty, and not missing: Envoy keeps its last
/// assignment when one is removed, and answers 503 when one is empty.
///
/// Every locality has a weight, the sum of its endpoints': gRPC skips a locality without one (gRFC A27), and Envoy
/// looks at it only under a locality-weighted policy, which vmesh does not use.
pub(crate) fn assignment<'a>(
    name: &str,
    endpoints: impl Iterator<Item = &'a Endpoint>,
    preference: Preference<'_>,
) -> ClusterLoadAssignment {
    type Group<'a> = ((usize, bool), &'a str, &'a str);
    let mut groups: BTreeMap<Group<'_>, Vec<&Endpoint>> = BTreeMap::new();
    for endpoint in endpoints {
        let zone = endpoint.zone.as_deref().unwrap_or_default();
        groups.entry((preference.rank(endpoint), region(endpoint), zone)).or_default().push(endpoint);
    }
    // Priorities must have no gap: what comes first of what is there is 0.
    let ranks: BTreeSet<_> = groups.keys().map(|(rank, _, _)| *rank).collect();
    let localities = groups.into_iter().map(|((rank, region, zone), endpoints)| {
        let priority = u32::try_from(ranks.range(..rank).count()).unwrap_or(u32::MAX);
        locality(region, zone, priority, &endpoints)
    });
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
