//! Removes IPv6 from a saved configuration, for a host that has lost IPv6 since the configuration was saved.
//!
//! Envoy rejects a listener if the kernel refuses one of its addresses, and rejects all endpoints of a cluster if the kernel does not
//! support the address family of one of them. A control plane that knows of the host's state sends only what fits. While none answers, the
//! agent serves what fits of the saved configuration. The file is not changed, so an agent that starts with IPv6 restored serves the full
//! configuration.

use std::net::IpAddr;
use std::sync::Arc;

use prost::Message;
use vmesh_proto::envoy::config::cluster::v3::Cluster;
use vmesh_proto::envoy::config::core::v3::{Address, address};
use vmesh_proto::envoy::config::endpoint::v3::{ClusterLoadAssignment, LbEndpoint, lb_endpoint};
use vmesh_proto::envoy::config::listener::v3::{FilterChain, Listener};
use vmesh_xds::{Kind, Resource};

/// Returns the resources that an Envoy without IPv6 accepts. A resource that contained no IPv6 keeps its version. Any other gets the
/// version of its new content, so that a control plane replaces it.
pub(crate) fn ipv4_only(accepted: Vec<Arc<Resource>>) -> Vec<Arc<Resource>> {
    accepted.into_iter().filter_map(|resource| without_ipv6(&resource)).collect()
}

/// Returns `None` for a listener without any IPv4 address.
fn without_ipv6(resource: &Arc<Resource>) -> Option<Arc<Resource>> {
    if resource.is_absent() {
        return Some(resource.clone());
    }
    match resource.kind() {
        Kind::Listener => edit_message(resource, listener),
        Kind::Endpoint => edit_message(resource, |assignment| {
            endpoints(assignment);
            true
        }),
        Kind::Cluster => edit_message(resource, |cluster: &mut Cluster| {
            cluster.load_assignment.iter_mut().for_each(endpoints);
            true
        }),
        _ => Some(resource.clone()),
    }
}

/// Returns the resource with its message changed by `edit`, or `None` if `edit` returns `false`. A message that does not decode is left as
/// it is, and Envoy reports the error.
fn edit_message<M: Message + Default + Clone + PartialEq>(
    resource: &Arc<Resource>,
    edit: impl FnOnce(&mut M) -> bool,
) -> Option<Arc<Resource>> {
    let Ok(before) = M::decode(resource.value()) else { return Some(resource.clone()) };
    let mut message = before.clone();
    match edit(&mut message) {
        false => None,
        true if message == before => Some(resource.clone()),
        true => Some(Resource::new(resource.kind(), resource.name().clone(), &message)),
    }
}

/// Removes IPv6 from a listener. Returns whether an address is left.
fn listener(listener: &mut Listener) -> bool {
    listener.additional_addresses.retain(|more| !more.address.as_ref().is_some_and(is_ipv6));
    if listener.address.as_ref().is_some_and(is_ipv6) {
        if listener.additional_addresses.is_empty() {
            return false;
        }
        listener.address = listener.additional_addresses.remove(0).address;
    }
    listener.filter_chains.retain_mut(keep_ipv4_match);
    true
}

/// Removes IPv6 ranges from the match of a filter chain. Returns `false` if no IPv4 connection can match the chain any more.
fn keep_ipv4_match(chain: &mut FilterChain) -> bool {
    let Some(matching) = &mut chain.filter_chain_match else { return true };
    let lists = [
        &mut matching.prefix_ranges,
        &mut matching.source_prefix_ranges,
        &mut matching.direct_source_prefix_ranges,
    ];
    lists.into_iter().all(|ranges| {
        let had = !ranges.is_empty();
        ranges.retain(|range| !range.address_prefix.contains(':'));
        // With no range left, the chain would match every connection.
        !had || !ranges.is_empty()
    })
}

fn endpoints(assignment: &mut ClusterLoadAssignment) {
    for locality in &mut assignment.endpoints {
        // An empty locality stays, because the priorities must have no gaps.
        locality.lb_endpoints.retain(|endpoint| !is_ipv6_endpoint(endpoint));
    }
}

fn is_ipv6_endpoint(endpoint: &LbEndpoint) -> bool {
    match &endpoint.host_identifier {
        Some(lb_endpoint::HostIdentifier::Endpoint(endpoint)) => {
            endpoint.address.as_ref().is_some_and(is_ipv6)
        }
        _ => false,
    }
}

fn is_ipv6(address: &Address) -> bool {
    match &address.address {
        Some(address::Address::SocketAddress(at)) => at.address.parse().is_ok_and(|ip: IpAddr| ip.is_ipv6()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use vmesh_proto::envoy::config::core::v3::{CidrRange, SocketAddress};
    use vmesh_proto::envoy::config::endpoint::v3::{Endpoint, LocalityLbEndpoints};
    use vmesh_proto::envoy::config::listener::v3::{AdditionalAddress, FilterChainMatch};

    use super::*;

    fn address(ip: &str) -> Address {
        let at = SocketAddress { address: ip.to_owned(), ..SocketAddress::default() };
        Address { address: Some(address::Address::SocketAddress(at)) }
    }

    fn listener(ips: &[&str], chains: &[&[&str]]) -> Listener {
        let more = ips.iter().skip(1);
        let range = |ip: &&str| CidrRange { address_prefix: (*ip).to_owned(), ..CidrRange::default() };
        let chain = |ranges: &&[&str]| FilterChain {
            filter_chain_match: Some(FilterChainMatch {
                prefix_ranges: ranges.iter().map(range).collect(),
                ..FilterChainMatch::default()
            }),
            ..FilterChain::default()
        };
        Listener {
            address: ips.first().map(|ip| address(ip)),
            additional_addresses: more
                .map(|ip| AdditionalAddress { address: Some(address(ip)), ..AdditionalAddress::default() })
                .collect(),
            filter_chains: chains.iter().map(chain).collect(),
            ..Listener::default()
        }
    }

    fn assignment(localities: &[&[&str]]) -> ClusterLoadAssignment {
        let endpoint = |ip: &&str| LbEndpoint {
            host_identifier: Some(lb_endpoint::HostIdentifier::Endpoint(Endpoint {
                address: Some(address(ip)),
                ..Endpoint::default()
            })),
            ..LbEndpoint::default()
        };
        let locality = |ips: &&[&str]| LocalityLbEndpoints {
            lb_endpoints: ips.iter().map(endpoint).collect(),
            ..LocalityLbEndpoints::default()
        };
        ClusterLoadAssignment {
            endpoints: localities.iter().map(locality).collect(),
            ..ClusterLoadAssignment::default()
        }
    }

    #[test]
    fn what_has_ipv6_loses_it_and_what_has_nothing_else_goes() {
        let of = |kind, message: &dyn Fn() -> Vec<u8>| Resource::from_bytes(kind, "one", &message());
        let check = |kind, before: Vec<u8>, after: Option<Vec<u8>>| {
            let before = of(kind, &|| before.clone());
            let now = ipv4_only(vec![before.clone()]);
            assert_eq!(now.first().map(|one| one.value().to_vec()), after);
            let is_same = now.first().is_some_and(|now| now.value() == before.value());
            assert_eq!(now.first().is_some_and(|now| now.version() == before.version()), is_same);
        };
        let bytes = |message: Listener| message.encode_to_vec();
        let check_listener =
            |before, after: Option<Listener>| check(Kind::Listener, bytes(before), after.map(bytes));
        let (v4, v6) = ("127.0.0.1", "::1");
        check_listener(listener(&[v4], &[&["240.0.0.0"]]), Some(listener(&[v4], &[&["240.0.0.0"]])));
        check_listener(
            listener(&[v4, v6], &[&["240.0.0.0", "fd76::"]]),
            Some(listener(&[v4], &[&["240.0.0.0"]])),
        );
        check_listener(listener(&[v6, v4], &[&[], &["fd76::"]]), Some(listener(&[v4], &[&[]])));
        check_listener(listener(&[v6], &[&[]]), None);
        let both = assignment(&[&["10.0.0.1", "fd00::1"], &["fd00::2"]]);
        check(Kind::Endpoint, both.encode_to_vec(), Some(assignment(&[&["10.0.0.1"], &[]]).encode_to_vec()));
        let cluster =
            |load_assignment| Cluster { load_assignment: Some(load_assignment), ..Cluster::default() };
        let of_v4 = cluster(assignment(&[&["10.0.0.1"], &[]]));
        check(Kind::Cluster, cluster(both).encode_to_vec(), Some(of_v4.encode_to_vec()));
        check(Kind::Route, vec![1, 2, 3], Some(vec![1, 2, 3]));
        check(Kind::Listener, vec![255], Some(vec![255]));
        let absent = Resource::absent(Kind::Listener, "gone");
        assert!(ipv4_only(vec![absent]).iter().all(|one| one.is_absent()));
    }
}
