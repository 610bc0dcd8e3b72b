//! LDS: one listener per declared upstream, one per workload, and for gRPC clients one per service. Those for captured
//! connections are put together in [`crate::transparent`] and [`crate::gate`].

use std::net::SocketAddr;
use std::time::Duration;

use vmesh_model::ServiceName;
use vmesh_model::document::Policy;
use vmesh_proto::envoy::config::core::v3::{
    Http1ProtocolOptions, HttpProtocolOptions, TrafficDirection,
};
use vmesh_proto::envoy::config::listener::v3::filter::ConfigType;
use vmesh_proto::envoy::config::listener::v3::{
    AdditionalAddress, ApiListener, Filter, FilterChain, FilterChainMatch, Listener,
};
use vmesh_proto::envoy::config::route::v3::RouteConfiguration;
use vmesh_proto::envoy::extensions::filters::http::router::v3::Router;
use vmesh_proto::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{
    CodecType, RouteSpecifier, ServerHeaderTransformation, UpgradeConfig,
};
use vmesh_proto::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, HttpFilter, Rds, http_filter,
};
use vmesh_proto::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use vmesh_proto::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::weighted_cluster::ClusterWeight;
use vmesh_proto::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::{
    ClusterSpecifier, WeightedCluster,
};
use vmesh_proto::envoy::r#type::v3::HashPolicy;
use vmesh_proto::envoy::r#type::v3::hash_policy::{PolicySpecifier, SourceIp};
use vmesh_proto::google::protobuf::Any;
use vmesh_proto::{any, boolean, duration};

use crate::cluster::ads;
use crate::effective::Effective;
use crate::endpoints::socket_address;
use crate::route::Share;

/// Which way a listener's traffic goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Outbound,
    Inbound,
}

/// Where an HTTP listener has its routes from.
pub(crate) enum Routes {
    /// RDS, under the service's name.
    Named(String),
    Inline(Box<RouteConfiguration>),
}

/// What Envoy does with the connections of a listener.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Handling(Filter);

/// HTTP. `stat` is the name under which it is counted.
pub(crate) fn http(stat: &str, routes: Routes, idle: Duration) -> Handling {
    let manager = HttpConnectionManager {
        codec_type: CodecType::Auto.into(),
        stat_prefix: stat_prefix(stat),
        // What the application says of itself, the proxy does not overwrite.
        server_header_transformation: ServerHeaderTransformation::PassThrough.into(),
        http_protocol_options: Some(Http1ProtocolOptions {
            accept_http_10: true,
            ..Http1ProtocolOptions::default()
        }),
        common_http_protocol_options: Some(HttpProtocolOptions {
            idle_timeout: Some(duration(Duration::from_secs(3600))),
            ..HttpProtocolOptions::default()
        }),
        stream_idle_timeout: Some(duration(idle)),
        // Nothing reads the id of a request that is not traced; one that the client sends is passed on.
        generate_request_id: Some(boolean(false)),
        upgrade_configs: vec![UpgradeConfig {
            upgrade_type: "websocket".to_owned(),
            ..UpgradeConfig::default()
        }],
        ..connection_manager(routes)
    };
    handling("envoy.filters.network.http_connection_manager", any(&manager))
}

/// Anything else: bytes in, bytes out.
pub(crate) fn tcp(stat: &str, shares: &[Share], idle: Duration, by_source: bool) -> Handling {
    let specifier = match shares {
        [only] => ClusterSpecifier::Cluster(only.cluster.clone()),
        several => ClusterSpecifier::WeightedClusters(WeightedCluster {
            clusters: several
                .iter()
                .map(|share| ClusterWeight {
                    name: share.cluster.clone(),
                    weight: share.weight,
                    ..ClusterWeight::default()
                })
                .collect(),
        }),
    };
    let by_source =
        by_source.then_some(HashPolicy { policy_specifier: Some(PolicySpecifier::SourceIp(SourceIp {})) });
    let proxy = TcpProxy {
        stat_prefix: stat_prefix(stat),
        cluster_specifier: Some(specifier),
        idle_timeout: Some(duration(idle)),
        hash_policy: by_source.into_iter().collect(),
        ..TcpProxy::default()
    };
    handling("envoy.filters.network.tcp_proxy", any(&proxy))
}

/// Whatever the service speaks: by its routes, or by the shares of its connections.
pub(crate) fn to_service(
    stat: &str,
    service: &ServiceName,
    effective: &Effective,
    shares: &[Share],
) -> Handling {
    if effective.protocol.is_http() {
        return http(stat, Routes::Named(service.to_string()), effective.idle);
    }
    let by_source = matches!(effective.load_balancing.policy, Policy::RingHash | Policy::Maglev);
    tcp(stat, shares, effective.idle, by_source)
}

fn handling(filter: &str, config: Any) -> Handling {
    Handling(Filter { name: filter.to_owned(), config_type: Some(ConfigType::TypedConfig(config)) })
}

/// What a gRPC client asks for to reach a service: no address, only routes (gRFC A27).
pub(crate) fn api_listener(name: &str, route_name: &str) -> Listener {
    let manager = connection_manager(Routes::Named(route_name.to_owned()));
    Listener {
        name: name.to_owned(),
        api_listener: Some(ApiListener { api_listener: Some(any(&manager)) }),
        ..Listener::default()
    }
}

fn connection_manager(routes: Routes) -> HttpConnectionManager {
    let specifier = match routes {
        Routes::Named(route_config_name) => {
            RouteSpecifier::Rds(Rds { config_source: Some(ads()), route_config_name })
        }
        Routes::Inline(routes) => RouteSpecifier::RouteConfig(*routes),
    };
    // The counters by response code (`dynamic_stats`, on by default) are among those that the agent's bootstrap keeps.
    let router = Router { suppress_envoy_headers: true, ..Router::default() };
    HttpConnectionManager {
        http_filters: vec![HttpFilter {
            name: "envoy.filters.http.router".to_owned(),
            config_type: Some(http_filter::ConfigType::TypedConfig(any(&router))),
            ..HttpFilter::default()
        }],
        route_specifier: Some(specifier),
        ..HttpConnectionManager::default()
    }
}

/// A listener that does the same with every connection.
pub(crate) fn listener(
    name: &str,
    address: SocketAddr,
    direction: Direction,
    handling: Handling,
) -> Listener {
    Listener {
        name: name.to_owned(),
        address: Some(socket_address(address)),
        traffic_direction: traffic_direction(direction).into(),
        filter_chains: vec![chain("", None, handling)],
        ..Listener::default()
    }
}

/// A listener that no socket is bound for: what was captured on its way to one of `addresses` is handed to it. It looks
/// at nothing before its filters do, so that whoever waits for the other side to speak first does not wait for Envoy.
///
/// It is named by the first of the addresses; without any there is none. All listeners of a service are counted under one
/// name, which takes off a third of what each costs Envoy.
pub(crate) fn handed_to(addresses: &[SocketAddr], stat: &str, handling: Handling) -> Option<Listener> {
    let (first, others) = addresses.split_first()?;
    Some(Listener {
        bind_to_port: Some(boolean(false)),
        stat_prefix: stat_prefix(stat),
        additional_addresses: others.iter().map(|address| additional_address(*address)).collect(),
        ..listener(&outbound_name(*first), *first, Direction::Outbound, handling)
    })
}

pub(crate) fn additional_address(address: SocketAddr) -> AdditionalAddress {
    AdditionalAddress { address: Some(socket_address(address)), ..AdditionalAddress::default() }
}

/// What is done with the connections that `matching` picks.
pub(crate) fn chain(
    name: &str,
    matching: Option<FilterChainMatch>,
    Handling(filter): Handling,
) -> FilterChain {
    FilterChain {
        name: name.to_owned(),
        filter_chain_match: matching,
        filters: vec![filter],
        ..FilterChain::default()
    }
}

pub(crate) fn traffic_direction(direction: Direction) -> TrafficDirection {
    match direction {
        Direction::Outbound => TrafficDirection::Outbound,
        Direction::Inbound => TrafficDirection::Inbound,
    }
}

/// `|` and `:` would split Envoy's statistics names.
fn stat_prefix(name: &str) -> String {
    name.replace(['|', ':'], "_")
}

/// The name of the listener on `address`: a contract for every client of the control plane.
pub(crate) fn outbound_name(address: SocketAddr) -> String {
    format!("outbound|{address}")
}
