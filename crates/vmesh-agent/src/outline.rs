//! The configuration as JSON, which `vmesh-agent --check --json` prints. Tools such as `vmeshctl doctor` read this instead of `agent.yaml`.

use serde_json::{Value, json};
use vmesh_model::node::Upstreams;

use crate::config::{Config, EnvoyManager};
use crate::hostcheck::HostProblem;

/// Returns the configuration with all defaults filled in. `problems` are those of this host.
pub fn outline(config: &Config, problems: &[HostProblem]) -> Value {
    let workloads = config.workloads.iter().map(|workload| {
        json!({
            "service": workload.service.as_str(),
            "port": workload.port,
            "host": workload.host,
            "protocol": workload.protocol.map(|protocol| protocol.as_str()),
            "listen": workload.listen,
        })
    });
    let upstreams = match &config.upstreams {
        Upstreams::All => Vec::new(),
        Upstreams::Declared(declared) => declared
            .iter()
            .map(|upstream| json!({"service": upstream.service.as_str(), "listen": upstream.listen}))
            .collect(),
    };
    let capture = &config.capture;
    json!({
        "node": config.name.to_string(),
        "control_planes": config.control_planes.iter().map(|one| one.address.to_string()).collect::<Vec<_>>(),
        "state_dir": config.state_dir,
        "run_dir": config.run_dir,
        "api": config.api,
        "api_socket": config.api_socket(),
        "dns": config.dns,
        "suffix": config.zone_of_names.suffix.to_string(),
        "envoy": {
            "path": config.envoy.path,
            "manage": match config.envoy.manage { EnvoyManager::Systemd => "systemd", EnvoyManager::Child => "child" },
            "run_dir": config.envoy.run_dir,
            "concurrency": config.envoy.concurrency,
        },
        "workloads": workloads.collect::<Vec<_>>(),
        "every_service": config.upstreams == Upstreams::All,
        "upstreams": upstreams,
        "capture": {
            "outbound": capture.spec.outbound.capture,
            "inbound": capture.spec.inbound.capture,
            "socket": capture.socket,
        },
        "problems": problems,
    })
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn a_configuration_in_short_says_what_is_built_in_as_well() {
        let text = b"control_plane: [\"http://127.0.0.1:15010\"]\nupstreams: [orders]\n\
            workloads: [{service: web, port: 8080, protocol: http}]\ncapture: {outbound: transparent, inbound: transparent}\n";
        let config = Config::parse("agent.yaml", text, "web-17").unwrap();
        expect![[r#"{"node":"web-17","control_planes":["127.0.0.1:15010"],"state_dir":"/var/lib/vmesh-agent","run_dir":"/run/vmesh","api":"127.0.0.1:15020","api_socket":"/run/vmesh/agent.sock","dns":"127.0.0.1:15053","suffix":"mesh","envoy":{"path":"/usr/bin/envoy","manage":"systemd","run_dir":"/run/vmesh-envoy","concurrency":null},"workloads":[{"service":"web","port":8080,"host":null,"protocol":"http","listen":null}],"every_service":false,"upstreams":[{"service":"orders","listen":null}],"capture":{"outbound":"vip","inbound":"redirect","socket":"/run/vmesh-net/net.sock"},"problems":[]}"#]]
        .assert_eq(&outline(&config, &[]).to_string());
    }
}
