//! The two listeners of a node to which the host's rules redirect captured connections.
//!
//! `virtual_outbound` hands a connection to the listener of its original destination
//! ([`crate::transparent`]). A connection that has no such listener is passed through to its destination or
//! closed, depending on the policy.
//!
//! `virtual_inbound` does not hand connections over: Envoy would match a listener on `0.0.0.0:P` or `[::]:P`
//! to every address with that port, so a call to a foreign port would reach an application of this host.
//! Instead it has one filter chain per workload, matched by the destination port. The chain of a workload that accepts only mTLS
//! closes the connection: mTLS connections come to another port.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use vmesh_dns::Ranges;
use vmesh_model::document::Outbound;
use vmesh_model::node::{INBOUND_PORT, InboundCapture, NodeCapture, OUTBOUND_PORT};
use vmesh_proto::envoy::config::cluster::v3::Cluster;
use vmesh_proto::envoy::config::core::v3::CidrRange;
use vmesh_proto::envoy::config::listener::v3::listener_filter::ConfigType;
use vmesh_proto::envoy::config::listener::v3::{FilterChain, FilterChainMatch, Listener, ListenerFilter};
use vmesh_proto::envoy::extensions::filters::listener::original_dst::v3::OriginalDst;
use vmesh_proto::{any, boolean, uint32};

use crate::cluster::{blackhole_cluster, passthrough_cluster};
use crate::endpoints::socket_address;
use crate::listener::{Direction, additional_address, chain, tcp, traffic_direction};
use crate::route::Share;

/// Cluster names that cannot collide with a service: service names begin with a letter or a digit.
const PASSTHROUGH: &str = "_passthrough";
const BLACKHOLE: &str = "_blackhole";

/// The idle timeout of connections that belong to no service. It is long, because TCP keep-alive already
/// closes dead ones.
const IDLE_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// Returns the clusters that both listeners refer to.
pub(crate) fn clusters() -> [Cluster; 2] {
    [passthrough_cluster(PASSTHROUGH), blackhole_cluster(BLACKHOLE)]
}

/// Returns the listener for captured connections that programs of the host open. The rules redirect them to
/// loopback, so that this listener is unreachable from outside the host.
pub(crate) fn outbound(capture: NodeCapture, policy: Outbound) -> Listener {
    let ranges = Ranges::default();
    let v6 = (!capture.without_ipv6).then(|| ranges.v6.to_string());
    let virtual_addresses = std::iter::once(ranges.v4.to_string()).chain(v6);
    let virtual_addresses = virtual_addresses.filter_map(|range| parse_cidr(&range)).collect();
    Listener {
        use_original_dst: Some(boolean(true)),
        filter_chains: vec![
            loop_guard(outbound_addresses(capture)),
            // A virtual address without a service leads nowhere. Closing at once is better than letting the
            // caller time out.
            closing_chain(
                "no service",
                FilterChainMatch { prefix_ranges: virtual_addresses, ..FilterChainMatch::default() },
            ),
        ],
        default_filter_chain: Some(match policy {
            Outbound::AllowAny => chain("anything else", None, pass_through("outbound_passthrough")),
            Outbound::RegistryOnly => chain("anything else", None, close_connection()),
        }),
        ..gate_listener("virtual_outbound", outbound_addresses(capture), Direction::Outbound)
    }
}

/// Returns the listener for captured connections to programs of the host: one chain per workload, and for
/// other ports a pass-through to the original destination.
pub(crate) fn inbound(capture: NodeCapture, inward: InboundCapture, workloads: Vec<FilterChain>) -> Listener {
    Listener {
        transparent: (inward == InboundCapture::Tproxy).then(|| boolean(true)),
        filter_chains: std::iter::once(loop_guard(inbound_addresses(capture))).chain(workloads).collect(),
        default_filter_chain: Some(chain("anything else", None, pass_through("inbound_passthrough"))),
        ..gate_listener("virtual_inbound", inbound_addresses(capture), Direction::Inbound)
    }
}

pub(crate) fn outbound_addresses(capture: NodeCapture) -> Vec<SocketAddr> {
    addresses(Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST, OUTBOUND_PORT, capture)
}

/// Returns the wildcard addresses: the rules redirect an inbound connection to the address of the interface
/// on which it arrived.
pub(crate) fn inbound_addresses(capture: NodeCapture) -> Vec<SocketAddr> {
    addresses(Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED, INBOUND_PORT, capture)
}

fn addresses(v4: Ipv4Addr, v6: Ipv6Addr, port: u16, capture: NodeCapture) -> Vec<SocketAddr> {
    let v6 = (!capture.without_ipv6).then_some(IpAddr::V6(v6));
    std::iter::once(IpAddr::V4(v4)).chain(v6).map(|ip| SocketAddr::new(ip, port)).collect()
}

/// Matches connections to `port` of `host`, or of any address if `host` is `None`.
pub(crate) fn match_destination(host: Option<IpAddr>, port: u16) -> FilterChainMatch {
    FilterChainMatch {
        destination_port: Some(uint32(port.into())),
        prefix_ranges: host.map(host_range).into_iter().collect(),
        ..FilterChainMatch::default()
    }
}

fn gate_listener(name: &str, addresses: Vec<SocketAddr>, direction: Direction) -> Listener {
    let mut addresses = addresses.into_iter();
    Listener {
        name: name.to_owned(),
        address: addresses.next().map(socket_address),
        additional_addresses: addresses.map(additional_address).collect(),
        traffic_direction: traffic_direction(direction).into(),
        listener_filters: vec![ListenerFilter {
            name: "envoy.filters.listener.original_dst".to_owned(),
            config_type: Some(ConfigType::TypedConfig(any(&OriginalDst {}))),
            ..ListenerFilter::default()
        }],
        ..Listener::default()
    }
}

/// Closes connections addressed to the listener itself. A pass-through would be redirected to this
/// listener repeatedly, until the local ports are exhausted.
fn loop_guard(own: Vec<SocketAddr>) -> FilterChain {
    let port = own.first().map_or(0, SocketAddr::port);
    // A wildcard listener can be called at every address of the host.
    let own = own.into_iter().map(|own| own.ip()).filter(|ip| !ip.is_unspecified());
    let matching =
        FilterChainMatch { prefix_ranges: own.map(host_range).collect(), ..match_destination(None, port) };
    closing_chain("loop guard", matching)
}

pub(crate) fn closing_chain(name: &str, matching: FilterChainMatch) -> FilterChain {
    chain(name, Some(matching), close_connection())
}

fn close_connection() -> crate::listener::NetworkFilters {
    tcp("blackhole", &[Share { cluster: BLACKHOLE.to_owned(), weight: 1 }], IDLE_TIMEOUT, false)
}

fn pass_through(stat: &str) -> crate::listener::NetworkFilters {
    tcp(stat, &[Share { cluster: PASSTHROUGH.to_owned(), weight: 1 }], IDLE_TIMEOUT, false)
}

fn host_range(ip: IpAddr) -> CidrRange {
    let len = if ip.is_ipv4() { 32 } else { 128 };
    CidrRange { address_prefix: ip.to_string(), prefix_len: Some(uint32(len)) }
}

/// Parses a range such as `240.0.0.0/5`.
fn parse_cidr(range: &str) -> Option<CidrRange> {
    let (address, len) = range.split_once('/')?;
    Some(CidrRange { address_prefix: address.to_owned(), prefix_len: Some(uint32(len.parse().ok()?)) })
}
