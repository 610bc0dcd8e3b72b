//! Envoy's bootstrap and command line. The bootstrap is JSON, because Envoy reads YAML 1.1, in which a cluster named `y` is a boolean.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::config::{Config, EnvoyManager};
use crate::identity;

/// The statistics that Envoy keeps. Envoy's full set would use most of its memory on a node with many upstreams: 107,000 statistics for
/// 1,000 clusters, against 4,000 in this list.
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
    ("suffix", "rbac.denied"),
    ("suffix", "rbac.shadow_denied"),
    ("suffix", "update_rejected"),
    ("suffix", "update_success"),
    ("suffix", "init_fetch_timeout"),
];

/// Minimum number of files reserved for Envoy's other needs: listeners on each worker, event loops, logs, the stream to the agent, the
/// admin interface, health checks.
const LEAST_RESERVE: u64 = 64;
/// The reserve is one part in this many of the limit, since the number of listeners grows with the number of services.
const RESERVED_PART: u64 = 8;
/// Maximum number of reserved files.
const MOST_RESERVE: u64 = 8192;

/// Returns the number of client connections, at most `configured`, that Envoy can hold when its process may have `open_files` files
/// open. Each client costs up to two: its own connection, and one to an endpoint. An Envoy that runs out of
/// files can neither take the next client nor be asked how it is, so it must refuse clients before that.
pub fn most_connections(configured: u64, open_files: u64) -> u64 {
    let reserve = (open_files / RESERVED_PART).clamp(LEAST_RESERVE, MOST_RESERVE);
    configured.min((open_files.saturating_sub(reserve) / 2).max(1))
}

/// Lowers the connection limit in `bootstrap` to the number that fits into `open_files`. Returns the limits before and after if
/// they differ.
pub fn fit_to_open_files(bootstrap: &mut Value, open_files: u64) -> Option<(u64, u64)> {
    let monitors = bootstrap.pointer_mut("/overload_manager/resource_monitors")?.as_array_mut()?;
    let mut lowered = None;
    for monitor in monitors {
        let Some(limit) = monitor.pointer_mut("/typed_config/max_active_downstream_connections") else {
            continue;
        };
        let Some(configured) = limit.as_u64() else { continue };
        let fits = most_connections(configured, open_files);
        if fits < configured {
            *limit = fits.into();
            lowered = Some((configured, fits));
        }
    }
    lowered
}

/// Returns how many files a process started by this one may have open.
pub fn open_files() -> u64 {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Returns the bootstrap of this node's Envoy. It omits everything that the agent can send by xDS: a changed bootstrap means another Envoy,
/// and neither a new upstream nor an upgrade of the agent should cost one.
pub fn bootstrap(config: &Config) -> Value {
    // Besides the owner, only the group of the run directory gets access: with `manage: systemd`, agent and Envoy share that group.
    let admin_mode = match config.envoy.manage {
        EnvoyManager::Child => 0o600,
        EnvoyManager::Systemd => 0o660,
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
        "admin": {
            "address": {"pipe": {"path": path(config.admin_socket()), "mode": admin_mode}},
            // The admin interface answers even if Envoy has reached its connection limit.
            "ignore_global_conn_limit": true,
        },
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": true,
                "grpc_services": [{"envoy_grpc": {
                    "cluster_name": "xds",
                    // Envoy's default pause of 30 s is too long here, since the agent is on this host.
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
                        // Detects an agent that hangs, and tolerates one that is frozen for a moment.
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

/// The options for Envoy's hot restart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HotRestart {
    /// Hot restart is off. Several Envoys may then run on one host without a `base_id`, and may hand over by binding the same ports.
    Disabled,
    /// Hot restart is on. `base_id` distinguishes the Envoys of one line from all others on this host; `socket` is the prefix of the
    /// sockets on which the old and the new Envoy communicate.
    Enabled { base_id: u32, epoch: u32, socket: PathBuf, parent_shutdown_s: u64 },
}

/// Returns Envoy's command line for a bootstrap at `file`.
pub fn arguments(config: &Config, file: &Path, hot_restart: HotRestart) -> Vec<String> {
    let mut arguments = path_and_hot_restart(file, hot_restart);
    arguments.extend(settings_arguments(config));
    arguments
}

/// Returns the arguments for the bootstrap's path and the hot restart.
pub(crate) fn path_and_hot_restart(file: &Path, hot_restart: HotRestart) -> Vec<String> {
    let mut arguments = vec!["--config-path".to_owned(), file.display().to_string()];
    match hot_restart {
        HotRestart::Disabled => arguments.push("--disable-hot-restart".to_owned()),
        HotRestart::Enabled { base_id, epoch, socket, parent_shutdown_s } => arguments.extend([
            "--base-id".to_owned(),
            base_id.to_string(),
            "--restart-epoch".to_owned(),
            epoch.to_string(),
            "--socket-path".to_owned(),
            path(socket),
            // A process that can send to the socket could take over Envoy's listeners, or terminate Envoy.
            "--socket-mode".to_owned(),
            "600".to_owned(),
            // Without this flag, an Envoy whose parent has crashed would retry for ever.
            "--skip-hot-restart-on-no-parent".to_owned(),
            // Without this flag, Envoy queries its parent every five seconds, and aborts if the parent has crashed (1.36 to 1.40).
            "--skip-hot-restart-parent-stats".to_owned(),
            "--parent-shutdown-time-s".to_owned(),
            parent_shutdown_s.to_string(),
        ]),
    }
    arguments
}

/// Returns the arguments that come from the settings.
pub(crate) fn settings_arguments(config: &Config) -> Vec<String> {
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
        // The level comes first, for [`crate::envoy::output`]. The log adds its own time.
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
    fn connections_leave_room_for_those_to_endpoints_and_for_being_asked() {
        for (configured, open_files, expected) in [
            (50_000, 1_048_576, 50_000),
            (50_000, 65_536, 28_672),
            (50_000, 1024, 448),
            (50_000, 256, 96),
            (50, 256, 50),
            (50_000, 64, 1),
            (50_000, 0, 1),
            (u64::MAX, u64::MAX, (u64::MAX - 8192) / 2),
        ] {
            assert_eq!(most_connections(configured, open_files), expected, "{configured} {open_files}");
        }
        let config =
            Config::parse("agent.yaml", br#"control_plane: ["http://127.0.0.1:15010"]"#, "web-17").unwrap();
        let mut bootstrap = bootstrap(&config);
        assert_eq!(fit_to_open_files(&mut bootstrap, 1_048_576), None);
        assert_eq!(fit_to_open_files(&mut bootstrap, 256), Some((50_000, 96)));
        assert_eq!(fit_to_open_files(&mut bootstrap, 256), None);
        assert_eq!(fit_to_open_files(&mut json!({}), 256), None);
    }

    #[test]
    fn the_envoy_that_tests_run_is_the_one_that_the_messages_come_from() {
        assert_eq!(vmesh_testkit::envoy::VERSION, vmesh_proto::ENVOY_VERSION);
    }
}
