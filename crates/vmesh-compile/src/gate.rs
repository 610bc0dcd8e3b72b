//! Where the rules of a host bring captured connections: two listeners of a node, and what they let pass.
//!
//! `virtual_outbound` hands a connection to the listener of the address that it was on its way to
//! ([`crate::transparent`]). What no listener is for goes on to where it was going, or is closed, by policy.
//!
//! `virtual_inbound` does not hand over: Envoy takes a listener on `0.0.0.0:P` or `[::]:P` for that of every address with
//! that port, and a call to somebody else's port would end in an application of this host. So it has a chain for each
//! workload, by the port that was called. This is where permissive and strict will act: a chain of its own for TLS, and
//! none for the rest.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use vmesh_dns::Ranges;
use vmesh_model::document::Outbound;
use vmesh_model::node::{Capture, INBOUND_PORT, Inward, OUTBOUND_PORT};
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

/// No service is called so: names begin with a letter or a digit.
const PASSTHROUGH: &str = "_passthrough";
const BLACKHOLE: &str = "_blackhole";

/// Connections that are none of ours are not closed for being quiet: keep-alive finds the dead ones.
const QUIET: Duration = Duration::from_secs(24 * 3600);

/// The clusters that both listeners lead to.
pub(crate) fn clusters() -> [Cluster; 2] {
    [passthrough_cluster(PASSTHROUGH), blackhole_cluster(BLACKHOLE)]
}

/// Where captured connections that programs of the host open arrive. Rules rewrite them to loopback, so that nobody from
/// outside reaches it.
pub(crate) fn outbound(capture: Capture, policy: Outbound) -> Listener {
    let ranges = Ranges::default();
    let v6 = (!capture.without_ipv6).then(|| ranges.v6.to_string());
    let virtual_addresses = std::iter::once(ranges.v4.to_string()).chain(v6);
    let virtual_addresses = virtual_addresses.filter_map(|range| cidr(&range)).collect();
    Listener {
        use_original_dst: Some(boolean(true)),
        filter_chains: vec![
            loop_guard(outbound_addresses(capture)),
            // The virtual address of no service: nowhere to go on to, and better told at once than after a time-out.
            closing(
                "no service",
                FilterChainMatch { prefix_ranges: virtual_addresses, ..FilterChainMatch::default() },
            ),
        ],
        default_filter_chain: Some(match policy {
            Outbound::AllowAny => chain("anything else", None, pass("outbound_passthrough")),
            Outbound::RegistryOnly => chain("anything else", None, close()),
        }),
        ..gate("virtual_outbound", outbound_addresses(capture), Direction::Outbound)
    }
}

/// Where captured connections that programs of the host are to accept arrive: the chains of its workloads, and for ports
/// that are no workload's the application that was called.
pub(crate) fn inbound(capture: Capture, inward: Inward, workloads: Vec<FilterChain>) -> Listener {
    Listener {
        transparent: (inward == Inward::Tproxy).then(|| boolean(true)),
        filter_chains: std::iter::once(loop_guard(inbound_addresses(capture))).chain(workloads).collect(),
        default_filter_chain: Some(chain("anything else", None, pass("inbound_passthrough"))),
        ..gate("virtual_inbound", inbound_addresses(capture), Direction::Inbound)
    }
}

pub(crate) fn outbound_addresses(capture: Capture) -> Vec<SocketAddr> {
    addresses(Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST, OUTBOUND_PORT, capture)
}

/// The rules of a host turn a connection to the address of the interface that it came in by.
pub(crate) fn inbound_addresses(capture: Capture) -> Vec<SocketAddr> {
    addresses(Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED, INBOUND_PORT, capture)
}

fn addresses(v4: Ipv4Addr, v6: Ipv6Addr, port: u16, capture: Capture) -> Vec<SocketAddr> {
    let v6 = (!capture.without_ipv6).then_some(IpAddr::V6(v6));
    std::iter::once(IpAddr::V4(v4)).chain(v6).map(|ip| SocketAddr::new(ip, port)).collect()
}

/// Connections to `port` of `host`, or of any address.
pub(crate) fn called(host: Option<IpAddr>, port: u16) -> FilterChainMatch {
    FilterChainMatch {
        destination_port: Some(uint32(port.into())),
        prefix_ranges: host.map(one).into_iter().collect(),
        ..FilterChainMatch::default()
    }
}

fn gate(name: &str, addresses: Vec<SocketAddr>, direction: Direction) -> Listener {
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

/// Who calls the listener itself would be sent on to it, and on, until nothing is left to connect with.
fn loop_guard(own: Vec<SocketAddr>) -> FilterChain {
    let port = own.first().map_or(0, SocketAddr::port);
    // A wildcard's own address is any that the host has.
    let own = own.into_iter().map(|own| own.ip()).filter(|ip| !ip.is_unspecified());
    let matching = FilterChainMatch { prefix_ranges: own.map(one).collect(), ..called(None, port) };
    closing("loop guard", matching)
}

fn closing(name: &str, matching: FilterChainMatch) -> FilterChain {
    chain(name, Some(matching), close())
}

fn close() -> crate::listener::Handling {
    tcp("blackhole", &[Share { cluster: BLACKHOLE.to_owned(), weight: 1 }], QUIET, false)
}

fn pass(stat: &str) -> crate::listener::Handling {
    tcp(stat, &[Share { cluster: PASSTHROUGH.to_owned(), weight: 1 }], QUIET, false)
}

fn one(ip: IpAddr) -> CidrRange {
    let len = if ip.is_ipv4() { 32 } else { 128 };
    CidrRange { address_prefix: ip.to_string(), prefix_len: Some(uint32(len)) }
}

/// Of a range in its usual spelling, `240.0.0.0/5`.
fn cidr(range: &str) -> Option<CidrRange> {
    let (address, len) = range.split_once('/')?;
    Some(CidrRange { address_prefix: address.to_owned(), prefix_len: Some(uint32(len.parse().ok()?)) })
}
