//! LDS: one listener per declared upstream, one per workload, and for gRPC clients one per service. The
//! listeners for captured connections are assembled in [`crate::transparent`] and [`crate::gate`].

use std::net::SocketAddr;
use std::time::Duration;

use vmesh_model::{Protocol, ServiceName};
use vmesh_model::document::Policy;
use vmesh_proto::envoy::config::core::v3::{
    ExtensionConfigSource, Http1ProtocolOptions, HttpProtocolOptions, TrafficDirection,
};
use vmesh_proto::envoy::config::listener::v3::filter::ConfigType;
use vmesh_proto::envoy::config::listener::v3::{
    AdditionalAddress, ApiListener, Filter, FilterChain, FilterChainMatch, Listener,
};
use vmesh_proto::envoy::config::route::v3::route::Action;
use vmesh_proto::envoy::config::route::v3::route_action::ClusterSpecifier as RouteCluster;
use vmesh_proto::envoy::config::route::v3::route_match::PathSpecifier;
use vmesh_proto::envoy::config::route::v3::{
    Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost,
};
use vmesh_proto::envoy::extensions::filters::http::router::v3::Router;
use vmesh_proto::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{
    CodecType, ForwardClientCertDetails, RouteSpecifier, ServerHeaderTransformation, SetCurrentClientCertDetails, UpgradeConfig,
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
use crate::effective::EffectiveSettings;
use crate::endpoints::socket_address;
use crate::refusals;
use crate::route::Share;

/// The name of the filter that handles HTTP.
const HTTP_MANAGER: &str = "envoy.filters.network.http_connection_manager";

/// The direction of a listener's traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Outbound,
    Inbound,
}

/// The source of an HTTP listener's routes.
pub(crate) enum Routes {
    /// RDS, with a service name as the name of the route configuration.
    Named(String),
    Inline(Box<RouteConfiguration>),
}

/// The network filters with which Envoy handles the connections of a listener.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NetworkFilters(Vec<Filter>);

/// The checks that inbound connections pass before they reach an application.
#[derive(Debug, Clone, Default)]
pub(crate) struct InboundChecks {
    /// Filters whose configuration comes by ECDS: its name, and the type URL of its content.
    pub(crate) filters: Vec<(String, String)>,
    /// The service whose refused requests are logged.
    pub(crate) service: Option<ServiceName>,
    /// HTTP requests tell the application the caller's SPIFFE id, in `x-forwarded-client-cert`.
    pub(crate) tells_caller: bool,
}

impl InboundChecks {
    fn http_filters(&self) -> impl Iterator<Item = HttpFilter> {
        self.filters.iter().map(|(name, type_url)| HttpFilter {
            name: name.clone(),
            config_type: Some(http_filter::ConfigType::ConfigDiscovery(discovery(type_url))),
            ..HttpFilter::default()
        })
    }

    fn network_filters(&self) -> impl Iterator<Item = Filter> {
        self.filters.iter().map(|(name, type_url)| Filter {
            name: name.clone(),
            config_type: Some(ConfigType::ConfigDiscovery(discovery(type_url))),
        })
    }
}

fn discovery(type_url: &str) -> ExtensionConfigSource {
    ExtensionConfigSource {
        config_source: Some(ads()),
        type_urls: vec![type_url.to_owned()],
        ..ExtensionConfigSource::default()
    }
}

/// Returns the filters that check inbound connections and forward them to the application behind `cluster`. Its
/// statistics are named `stat`.
pub(crate) fn forward_to_application(
    cluster: &str,
    stat: &str,
    protocol: Protocol,
    checks: &InboundChecks,
) -> NetworkFilters {
    let idle = Duration::from_secs(3600);
    if protocol.is_http() {
        let mut manager = http_manager(stat, Routes::Inline(Box::new(route_all_to(cluster))), idle);
        manager.http_filters = checks.http_filters().chain(manager.http_filters).collect();
        manager.access_log = checks.service.iter().map(|service| refusals::log(service.as_str())).collect();
        if checks.tells_caller {
            manager.forward_client_cert_details = ForwardClientCertDetails::SanitizeSet.into();
            manager.set_current_client_cert_details =
                Some(SetCurrentClientCertDetails { uri: true, ..SetCurrentClientCertDetails::default() });
        }
        return network_filter(HTTP_MANAGER, any(&manager));
    }
    let NetworkFilters(forward) = tcp(stat, &[Share { cluster: cluster.to_owned(), weight: 1 }], idle, false);
    NetworkFilters(checks.network_filters().chain(forward).collect())
}

/// Returns an HTTP connection manager. Its statistics are named `stat`.
pub(crate) fn http(stat: &str, routes: Routes, idle: Duration) -> NetworkFilters {
    network_filter(HTTP_MANAGER, any(&http_manager(stat, routes, idle)))
}

fn http_manager(stat: &str, routes: Routes, idle: Duration) -> HttpConnectionManager {
    HttpConnectionManager {
        codec_type: CodecType::Auto.into(),
        stat_prefix: stat_prefix(stat),
        // The proxy passes the application's `server` header through unchanged.
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
        // Without tracing nothing reads a generated request id. An id that the client sends is passed on.
        generate_request_id: Some(boolean(false)),
        upgrade_configs: vec![UpgradeConfig {
            upgrade_type: "websocket".to_owned(),
            ..UpgradeConfig::default()
        }],
        ..connection_manager(routes)
    }
}

/// Returns a TCP proxy, for every protocol that is not HTTP.
pub(crate) fn tcp(stat: &str, shares: &[Share], idle: Duration, by_source: bool) -> NetworkFilters {
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
    network_filter("envoy.filters.network.tcp_proxy", any(&proxy))
}

/// Returns the filter that forwards connections to `service`: by its routes if it speaks HTTP, otherwise
/// split by `shares`.
pub(crate) fn forward_to_service(
    stat: &str,
    service: &ServiceName,
    effective: &EffectiveSettings,
    shares: &[Share],
) -> NetworkFilters {
    if effective.protocol.is_http() {
        return http(stat, Routes::Named(service.to_string()), effective.idle);
    }
    let by_source = matches!(effective.load_balancing.policy, Policy::RingHash | Policy::Maglev);
    tcp(stat, shares, effective.idle, by_source)
}

fn network_filter(filter: &str, config: Any) -> NetworkFilters {
    NetworkFilters(vec![Filter {
        name: filter.to_owned(),
        config_type: Some(ConfigType::TypedConfig(config)),
    }])
}

/// Returns the listener that a gRPC client subscribes to in order to reach a service. It has routes but no
/// address (gRFC A27).
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
    // The counters by response code (`dynamic_stats`, on by default) are among those that the agent's
    // bootstrap keeps.
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

/// Returns a listener with one filter chain for all connections.
pub(crate) fn listener(
    name: &str,
    address: SocketAddr,
    direction: Direction,
    filters: NetworkFilters,
) -> Listener {
    Listener {
        name: name.to_owned(),
        address: Some(socket_address(address)),
        traffic_direction: traffic_direction(direction).into(),
        filter_chains: vec![chain("", None, filters)],
        ..Listener::default()
    }
}

/// Returns a listener that binds no socket and receives the captured connections to `addresses`. Without
/// listener filters it does not wait for the client's first bytes, so protocols in which the server speaks
/// first work.
///
/// The listener is named after the first address; `None` if `addresses` is empty. All listeners of a service
/// share one statistics prefix, which reduces the memory that each costs Envoy by a third.
pub(crate) fn capture_listener(
    addresses: &[SocketAddr],
    stat: &str,
    filters: NetworkFilters,
) -> Option<Listener> {
    let (first, others) = addresses.split_first()?;
    Some(Listener {
        bind_to_port: Some(boolean(false)),
        stat_prefix: stat_prefix(stat),
        additional_addresses: others.iter().map(|address| additional_address(*address)).collect(),
        ..listener(&outbound_name(*first), *first, Direction::Outbound, filters)
    })
}

pub(crate) fn additional_address(address: SocketAddr) -> AdditionalAddress {
    AdditionalAddress { address: Some(socket_address(address)), ..AdditionalAddress::default() }
}

/// Returns a filter chain that applies `filters` to the connections that `matching` selects.
pub(crate) fn chain(
    name: &str,
    matching: Option<FilterChainMatch>,
    NetworkFilters(filters): NetworkFilters,
) -> FilterChain {
    FilterChain { name: name.to_owned(), filter_chain_match: matching, filters, ..FilterChain::default() }
}

pub(crate) fn traffic_direction(direction: Direction) -> TrafficDirection {
    match direction {
        Direction::Outbound => TrafficDirection::Outbound,
        Direction::Inbound => TrafficDirection::Inbound,
    }
}

/// Returns `name` without the characters `|` and `:`, at which Envoy would split a statistics name.
fn stat_prefix(name: &str) -> String {
    name.replace(['|', ':'], "_")
}

/// Returns the name of the outbound listener on `address`. All clients of the control plane rely on this
/// format.
pub(crate) fn outbound_name(address: SocketAddr) -> String {
    format!("outbound|{address}")
}

/// Returns a route configuration that sends every request to `cluster`, without timeout and retries. Those
/// are applied by the caller's Envoy, and a second set here would multiply them.
fn route_all_to(cluster: &str) -> RouteConfiguration {
    let action = RouteAction {
        cluster_specifier: Some(RouteCluster::Cluster(cluster.to_owned())),
        timeout: Some(duration(Duration::ZERO)),
        ..RouteAction::default()
    };
    let route = Route {
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
            ..RouteMatch::default()
        }),
        action: Some(Action::Route(action)),
        ..Route::default()
    };
    RouteConfiguration {
        name: cluster.to_owned(),
        virtual_hosts: vec![VirtualHost {
            name: cluster.to_owned(),
            domains: vec!["*".to_owned()],
            routes: vec![route],
            ..VirtualHost::default()
        }],
        ..RouteConfiguration::default()
    }
}
