//! CDS: one cluster per service, and one per subset.

use std::collections::BTreeMap;
use std::time::Duration;

use vmesh_model::Protocol;
use vmesh_model::document::{OutlierDetection, Policy};
use vmesh_proto::envoy::config::cluster::v3::circuit_breakers::Thresholds;
use vmesh_proto::envoy::config::cluster::v3::circuit_breakers::thresholds::RetryBudget;
use vmesh_proto::envoy::config::cluster::v3::cluster::{
    ClusterDiscoveryType, CommonLbConfig, DiscoveryType, EdsClusterConfig, LbPolicy,
};
use vmesh_proto::envoy::config::cluster::v3::load_balancing_policy;
use vmesh_proto::envoy::config::cluster::v3::{
    CircuitBreakers, Cluster, LoadBalancingPolicy, UpstreamConnectionOptions,
};
use vmesh_proto::envoy::config::core::v3::{
    AggregatedConfigSource, ApiVersion, ConfigSource, Http1ProtocolOptions, Http2ProtocolOptions,
    HttpProtocolOptions as CommonHttpOptions, TcpKeepalive, TypedExtensionConfig,
    config_source::ConfigSourceSpecifier,
};
use vmesh_proto::envoy::config::endpoint::v3::ClusterLoadAssignment;
use vmesh_proto::envoy::extensions::load_balancing_policies::least_request::v3::LeastRequest;
use vmesh_proto::envoy::extensions::load_balancing_policies::maglev::v3::Maglev;
use vmesh_proto::envoy::extensions::load_balancing_policies::random::v3::Random;
use vmesh_proto::envoy::extensions::load_balancing_policies::ring_hash::v3::RingHash;
use vmesh_proto::envoy::extensions::load_balancing_policies::round_robin::v3::RoundRobin;
use vmesh_proto::envoy::extensions::upstreams::http::v3::HttpProtocolOptions;
use vmesh_proto::envoy::extensions::upstreams::http::v3::http_protocol_options::explicit_http_config::ProtocolConfig;
use vmesh_proto::envoy::extensions::upstreams::http::v3::http_protocol_options::{
    ExplicitHttpConfig, UpstreamProtocolOptions,
};
use vmesh_proto::envoy::r#type::v3::Percent;
use vmesh_proto::google::protobuf::Any;
use vmesh_proto::{any, duration, uint32};
use vmesh_xds::second_assignment;

use crate::effective::EffectiveSettings;
use crate::tls::{CallerTls, upstream_sockets};

/// Returns the config source of all discovery requests: the ADS stream.
pub(crate) fn ads() -> ConfigSource {
    ConfigSource {
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..ConfigSource::default()
    }
}

/// Returns a cluster for Envoy. Its endpoints come by EDS under the same name; with `tls`, under the
/// [second name](second_assignment), and the cluster calls those of them that are marked for it by mTLS.
pub(crate) fn eds_cluster(name: &str, effective: &EffectiveSettings, tls: Option<&CallerTls>) -> Cluster {
    Cluster {
        name: name.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
        eds_cluster_config: Some(EdsClusterConfig {
            eds_config: Some(ads()),
            service_name: tls.map(|_| second_assignment(name)).unwrap_or_default(),
        }),
        connect_timeout: Some(duration(effective.connect)),
        load_balancing_policy: Some(policy(effective.load_balancing.policy)),
        common_lb_config: Some(CommonLbConfig {
            // Envoy's default of 1 s would be most of the delay between draining an endpoint and its last
            // request.
            update_merge_window: Some(duration(Duration::from_millis(50))),
            ..CommonLbConfig::default()
        }),
        circuit_breakers: Some(circuit_breakers(effective)),
        outlier_detection: Some(outlier_detection(&effective.outlier_detection)),
        typed_extension_protocol_options: protocol_options(effective),
        transport_socket_matches: tls
            .map(|tls| upstream_sockets(tls, effective.protocol))
            .unwrap_or_default(),
        ..Cluster::default()
    }
}

/// Returns a cluster for a gRPC client, which supports few fields and rejects unknown policies (gRFC A27,
/// A42).
pub(crate) fn grpc_cluster(name: &str, effective: &EffectiveSettings) -> Cluster {
    let lb_policy = match effective.load_balancing.policy {
        Policy::RingHash | Policy::Maglev if effective.load_balancing.hash_on.is_some() => LbPolicy::RingHash,
        _ => LbPolicy::RoundRobin,
    };
    Cluster {
        name: name.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
        eds_cluster_config: Some(EdsClusterConfig { eds_config: Some(ads()), ..EdsClusterConfig::default() }),
        lb_policy: lb_policy.into(),
        ..Cluster::default()
    }
}

/// Returns a cluster with fixed addresses: the application behind an inbound listener.
pub(crate) fn local_cluster(name: &str, protocol: Protocol, assignment: ClusterLoadAssignment) -> Cluster {
    let local = EffectiveSettings::of(&vmesh_model::Settings::default(), protocol);
    Cluster {
        name: name.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Static.into())),
        connect_timeout: Some(duration(local.connect)),
        load_assignment: Some(assignment),
        circuit_breakers: Some(circuit_breakers(&local)),
        typed_extension_protocol_options: protocol_options(&local),
        ..Cluster::default()
    }
}

/// Returns a cluster that forwards captured connections to their original destination on this host, so that
/// it does not matter on which of the host's addresses the application listens.
pub(crate) fn captured_application_cluster(name: &str, protocol: Protocol) -> Cluster {
    let local = EffectiveSettings::of(&vmesh_model::Settings::default(), protocol);
    Cluster {
        connect_timeout: Some(duration(local.connect)),
        circuit_breakers: Some(circuit_breakers(&local)),
        typed_extension_protocol_options: protocol_options(&local),
        ..original_destination(name)
    }
}

/// Returns a cluster that passes captured connections that belong to no service to their original
/// destination.
pub(crate) fn passthrough_cluster(name: &str) -> Cluster {
    let any = EffectiveSettings::of(&vmesh_model::Settings::default(), Protocol::Tcp);
    Cluster {
        connect_timeout: Some(duration(any.connect)),
        circuit_breakers: Some(circuit_breakers(&any)),
        // Envoy terminates both connections, so the keep-alive of neither the program nor its peer reaches
        // the other side.
        upstream_connection_options: Some(UpstreamConnectionOptions {
            tcp_keepalive: Some(TcpKeepalive {
                keepalive_time: Some(uint32(300)),
                keepalive_interval: Some(uint32(30)),
                keepalive_probes: Some(uint32(5)),
            }),
            ..UpstreamConnectionOptions::default()
        }),
        ..original_destination(name)
    }
}

fn original_destination(name: &str) -> Cluster {
    Cluster {
        name: name.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst.into())),
        lb_policy: LbPolicy::ClusterProvided.into(),
        // Envoy forgets an address that received no connection for this long.
        cleanup_interval: Some(duration(Duration::from_secs(60))),
        ..Cluster::default()
    }
}

/// Returns a cluster without endpoints: Envoy closes connections to it at once.
pub(crate) fn blackhole_cluster(name: &str) -> Cluster {
    Cluster {
        name: name.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Static.into())),
        connect_timeout: Some(duration(Duration::from_secs(1))),
        ..Cluster::default()
    }
}

fn policy(policy: Policy) -> LoadBalancingPolicy {
    let (name, config): (&str, Any) = match policy {
        Policy::RoundRobin => ("round_robin", any(&RoundRobin::default())),
        Policy::LeastRequest => {
            ("least_request", any(&LeastRequest { choice_count: Some(uint32(2)), ..LeastRequest::default() }))
        }
        Policy::Random => ("random", any(&Random::default())),
        Policy::RingHash => ("ring_hash", any(&RingHash::default())),
        Policy::Maglev => ("maglev", any(&Maglev::default())),
    };
    LoadBalancingPolicy {
        policies: vec![load_balancing_policy::Policy {
            typed_extension_config: Some(TypedExtensionConfig {
                name: format!("envoy.load_balancing_policies.{name}"),
                typed_config: Some(config),
            }),
        }],
    }
}

/// Returns the circuit breakers. Envoy's default of 1,024 is a limit that a busy host reaches unexpectedly;
/// without any limit, one slow service could exhaust the proxy's memory.
fn circuit_breakers(effective: &EffectiveSettings) -> CircuitBreakers {
    let limits = &effective.connection_limits;
    let budget = RetryBudget {
        budget_percent: Some(Percent { value: 20.0 }),
        min_retry_concurrency: Some(uint32(10)),
        ..RetryBudget::default()
    };
    CircuitBreakers {
        thresholds: vec![Thresholds {
            max_connections: Some(uint32(limits.max_connections.unwrap_or(16_384))),
            max_pending_requests: Some(uint32(limits.max_pending_requests.unwrap_or(16_384))),
            max_requests: Some(uint32(limits.max_requests.unwrap_or(65_536))),
            max_retries: limits.max_retries.map(uint32),
            retry_budget: limits.max_retries.is_none().then_some(budget),
            ..Thresholds::default()
        }],
        ..CircuitBreakers::default()
    }
}

/// Returns the outlier detection. By default it ejects endpoints that refuse connections, but not endpoints
/// that answer 5xx, which may be intended by the application. While discovery holds removals back, ejection
/// keeps traffic off dead endpoints.
fn outlier_detection(
    settings: &OutlierDetection,
) -> vmesh_proto::envoy::config::cluster::v3::OutlierDetection {
    vmesh_proto::envoy::config::cluster::v3::OutlierDetection {
        consecutive_5xx: Some(uint32(settings.consecutive_5xx.unwrap_or(5))),
        enforcing_consecutive_5xx: Some(uint32(if settings.consecutive_5xx.is_some() { 100 } else { 0 })),
        enforcing_success_rate: Some(uint32(0)),
        split_external_local_origin_errors: true,
        consecutive_local_origin_failure: Some(uint32(5)),
        enforcing_consecutive_local_origin_failure: Some(uint32(100)),
        enforcing_local_origin_success_rate: Some(uint32(0)),
        interval: Some(duration(settings.interval.map_or(Duration::from_secs(10), |time| time.0))),
        base_ejection_time: Some(duration(
            settings.base_ejection.map_or(Duration::from_secs(30), |time| time.0),
        )),
        max_ejection_percent: Some(uint32(settings.max_ejection_percent.unwrap_or(50))),
        ..Default::default()
    }
}

fn protocol_options(effective: &EffectiveSettings) -> BTreeMap<String, Any> {
    let protocol = match effective.protocol {
        Protocol::Http => ProtocolConfig::HttpProtocolOptions(Http1ProtocolOptions::default()),
        Protocol::Http2 | Protocol::Grpc => {
            ProtocolConfig::Http2ProtocolOptions(Http2ProtocolOptions::default())
        }
        _ => return BTreeMap::new(),
    };
    let options = HttpProtocolOptions {
        common_http_protocol_options: Some(CommonHttpOptions {
            // Shorter than the keep-alive of common servers, so that Envoy closes an idle pooled connection
            // before the server does.
            idle_timeout: Some(duration(Duration::from_secs(50))),
            ..CommonHttpOptions::default()
        }),
        upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
            protocol_config: Some(protocol),
        })),
        ..HttpProtocolOptions::default()
    };
    BTreeMap::from([("envoy.extensions.upstreams.http.v3.HttpProtocolOptions".to_owned(), any(&options))])
}
