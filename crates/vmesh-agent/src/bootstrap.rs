//! Envoy's bootstrap. JSON and not YAML: Envoy reads YAML 1.1, where a cluster named `y` is a boolean.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::config::{Config, Manage};
use crate::identity;

/// Statistics that are kept. All of them would be most of Envoy's memory on a node with many upstreams: 107,000 for
/// 1,000 clusters, against 4,000 of these.
const STATS: &[(&str, &str)] = &[
    ("prefix", "server."),
    ("prefix", "control_plane."),
    ("prefix", "cluster_manager."),
    ("prefix", "listener_manager."),
    ("prefix", "overload."),
    ("prefix", "main_thread."),
    ("suffix", "downstream_rq_total"),
    ("suffix", "downstream_rq_active"),
    ("suffix", "downstream_rq_time"),
    ("suffix", "downstream_rq_5xx"),
    ("suffix", "downstream_rq_4xx"),
    ("suffix", "downstream_rq_2xx"),
    ("suffix", "downstream_cx_active"),
    ("suffix", "downstream_cx_total"),
    ("suffix", "downstream_cx_overflow"),
    ("suffix", "upstream_rq_total"),
    ("suffix", "upstream_rq_active"),
    ("suffix", "upstream_rq_time"),
    ("suffix", "upstream_rq_2xx"),
    ("suffix", "upstream_rq_4xx"),
    ("suffix", "upstream_rq_5xx"),
    ("suffix", "upstream_rq_retry"),
    ("suffix", "upstream_rq_retry_success"),
    ("suffix", "upstream_rq_retry_overflow"),
    ("suffix", "upstream_rq_timeout"),
    ("suffix", "upstream_rq_per_try_timeout"),
    ("suffix", "upstream_rq_pending_overflow"),
    ("suffix", "upstream_rq_pending_failure_eject"),
    ("suffix", "upstream_cx_active"),
    ("suffix", "upstream_cx_total"),
    ("suffix", "upstream_cx_connect_fail"),
    ("suffix", "upstream_cx_connect_timeout"),
    ("suffix", "upstream_cx_overflow"),
    ("suffix", "membership_total"),
    ("suffix", "membership_healthy"),
    ("suffix", "lb_healthy_panic"),
    ("suffix", "ejections_active"),
    ("suffix", "ejections_enforced_total"),
    ("suffix", "ssl.handshake"),
    ("suffix", "ssl.connection_error"),
    ("suffix", "update_rejected"),
    ("suffix", "update_success"),
    ("suffix", "init_fetch_timeout"),
];

/// The bootstrap of this node's Envoy. Nothing is in it that the agent knows anyway: what changes in here is another
/// Envoy, and neither a new upstream nor a new agent is a reason for one.
pub fn bootstrap(config: &Config) -> Value {
    // Beside the agent's own user only the group of the run directory: under systemd that is how the two meet.
    let admin_mode = match config.envoy.manage {
        Manage::Child => 0o600,
        Manage::Systemd => 0o660,
    };
    let stats: Vec<Value> = STATS.iter().map(|(how, what)| json!({ *how: what })).collect();
    let ads = json!({"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "10s"});
    let mut node = json!({
        "id": config.name,
        "cluster": identity::cluster(config),
    });
    if let (Some(zone), Some(node)) = (&config.zone, node.as_object_mut()) {
        node.insert("locality".to_owned(), json!({"zone": zone}));
    }
    json!({
        "node": node,
        "admin": {"address": {"pipe": {"path": path(config.admin_socket()), "mode": admin_mode}}},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": true,
                "grpc_services": [{"envoy_grpc": {
                    "cluster_name": "xds",
                    // The agent is on this host: an Envoy that waits 30 s for it, as by default, only wastes them.
                    "retry_policy": {"retry_back_off": {"base_interval": "0.2s", "max_interval": "2s"}},
                }}],
            },
            "cds_config": ads,
            "lds_config": ads,
        },
        "static_resources": {"clusters": [{
            "name": "xds",
            "type": "STATIC",
            "connect_timeout": "1s",
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                    "explicit_http_config": {"http2_protocol_options": {
                        // An agent that hangs is found out, and one that was frozen is not given up at once.
                        "connection_keepalive": {"interval": "30s", "timeout": "10s"},
                    }},
                },
            },
            "load_assignment": {
                "cluster_name": "xds",
                "endpoints": [{"lb_endpoints": [
                    {"endpoint": {"address": {"pipe": {"path": path(config.xds_socket())}}}},
                ]}],
            },
        }]},
        "stats_config": {"stats_matcher": {"inclusion_list": {"patterns": stats}}},
        "deferred_stat_options": {"enable_deferred_creation_stats": true},
        "overload_manager": {
            "refresh_interval": "0.25s",
            "resource_monitors": [{
                "name": "envoy.resource_monitors.global_downstream_max_connections",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.\
                              DownstreamConnectionsConfig",
                    "max_active_downstream_connections": config.envoy.max_connections,
                },
            }],
        },
    })
}

fn path(path: PathBuf) -> String {
    path.display().to_string()
}

/// How an Envoy takes over from the one before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Takeover {
    /// Not at all, or by binding the same ports: then several Envoys run on one host without a number that tells them
    /// apart.
    None,
    /// Envoy's hot restart. `base_id` is the number that tells those of one line from all others on this machine; `socket`
    /// is what the names of the sockets begin with by which they speak to each other.
    Hot { base_id: u32, epoch: u32, socket: PathBuf, parent_shutdown_s: u64 },
}

/// How Envoy is started with its bootstrap at `file`.
pub fn arguments(config: &Config, file: &Path, takeover: Takeover) -> Vec<String> {
    let mut arguments = started_with(file, takeover);
    arguments.extend(settings(config));
    arguments
}

/// Those arguments that say which bootstrap it is, and how the one before it is taken over from.
pub(crate) fn started_with(file: &Path, takeover: Takeover) -> Vec<String> {
    let mut arguments = vec!["--config-path".to_owned(), file.display().to_string()];
    match takeover {
        Takeover::None => arguments.push("--disable-hot-restart".to_owned()),
        Takeover::Hot { base_id, epoch, socket, parent_shutdown_s } => arguments.extend([
            "--base-id".to_owned(),
            base_id.to_string(),
            "--restart-epoch".to_owned(),
            epoch.to_string(),
            "--socket-path".to_owned(),
            path(socket),
            // Whoever can send to it can have Envoy hand over its listeners, or end.
            "--socket-mode".to_owned(),
            "600".to_owned(),
            // One whose parent dies meanwhile would otherwise ask for it for ever.
            "--skip-hot-restart-on-no-parent".to_owned(),
            // Asked for every five seconds: a parent that has died meanwhile makes its child abort (1.36 to 1.40).
            "--skip-hot-restart-parent-stats".to_owned(),
            "--parent-shutdown-time-s".to_owned(),
            parent_shutdown_s.to_string(),
        ]),
    }
    arguments
}

/// Those that are settings.
pub(crate) fn settings(config: &Config) -> Vec<String> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let concurrency = config.envoy.concurrency.map_or(cores.min(2), usize::from);
    let drain = config.envoy.drain.0.as_secs().max(1);
    let mut arguments: Vec<String> = [
        "--concurrency",
        &concurrency.to_string(),
        "--drain-time-s",
        &drain.to_string(),
        "--log-level",
        config.envoy.log_level.as_str(),
        "--log-format",
        // The level comes first, for `envoy::log`; the time is ours.
        "%l %n: %v",
        "--log-format-escaped",
    ]
    .map(str::to_owned)
    .into();
    arguments.extend_from_slice(&config.envoy.extra_args);
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_real_envoy_takes_the_bootstrap() {
        for text in [
            r#"control_plane: ["http://127.0.0.1:15010"]"#,
            r#"
control_plane: ["http://127.0.0.1:15010"]
run_dir: /tmp
envoy: {manage: child, max_connections: 7}
node: {name: y, address: 10.0.1.17, zone: "no", labels: {role: web}}
workloads: [{service: on, port: 8080, protocol: http}]
upstreams: [{service: off, listen: "127.0.0.1:9001"}]
"#,
        ] {
            let config = Config::parse("agent.yaml", text.as_bytes(), "web-17").unwrap();
            let bootstrap = bootstrap(&config).to_string();
            vmesh_testkit::envoy::validate(&bootstrap).unwrap_or_else(|said| panic!("{said}\n{bootstrap}"));
        }
    }

    #[test]
    fn the_envoy_that_tests_run_is_the_one_that_the_messages_come_from() {
        assert_eq!(vmesh_testkit::envoy::VERSION, vmesh_proto::ENVOY_VERSION);
    }
}
