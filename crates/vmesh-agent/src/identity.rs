//! The identity of this node and its needs, as reported to control planes and to its Envoy.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use vmesh_model::node::Upstreams;
use vmesh_proto::envoy::config::core::v3::{Locality, Node, node};
use vmesh_proto::google::protobuf::{ListValue, NullValue, Struct, Value as ProtoValue, value::Kind};

use crate::config::Config;

pub const USER_AGENT: &str = "vmesh-agent";
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Returns the versions of the agent and of Envoy, for `vmeshctl nodes`.
pub fn build(envoy_version: Option<&str>) -> String {
    match envoy_version {
        Some(envoy) => format!("{USER_AGENT}/{VERSION} envoy/{envoy}"),
        None => format!("{USER_AGENT}/{VERSION}"),
    }
}

/// Returns the version of the Envoy at `path`; `None` if the binary does not print one within 3 s.
pub async fn envoy_version(path: &Path) -> Option<String> {
    let mut command = tokio::process::Command::new(path);
    command.arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(Duration::from_secs(3), command.output()).await.ok()?.ok()?;
    // Such as `envoy  version: <commit>/1.40.0/Clean/RELEASE/BoringSSL`.
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    Some(said.split_once("version: ")?.1.split('/').nth(1)?.to_owned())
}

/// Returns vmesh's part of the node's metadata. The field names are those of `vmesh_model::node`. `mtls_ready`: Envoy accepts mTLS
/// connections of other nodes.
pub fn metadata(config: &Config, build: &str, mtls_ready: bool) -> Value {
    let upstreams = match &config.upstreams {
        Upstreams::All => json!("*"),
        Upstreams::Declared(declared) => json!(declared),
    };
    json!({
        "address": config.address,
        "labels": config.labels,
        "workloads": config.workloads,
        "upstreams": upstreams,
        "capture": config.capture.report(),
        "build": build,
        "mtls_ready": mtls_ready.then_some(true),
    })
}

/// Returns the `node` of the first request on every stream to a control plane.
pub fn node(config: &Config, build: &str, mtls_ready: bool) -> Node {
    let metadata = BTreeMap::from([("vmesh".to_owned(), proto_value(metadata(config, build, mtls_ready)))]);
    Node {
        id: config.name.to_string(),
        cluster: cluster(config),
        metadata: Some(Struct { fields: metadata.into_iter().collect() }),
        locality: config.zone.as_ref().map(|zone| Locality { zone: zone.to_string(), ..Locality::default() }),
        user_agent_name: USER_AGENT.to_owned(),
        user_agent_version_type: Some(node::UserAgentVersionType::UserAgentVersion(VERSION.to_owned())),
        ..Node::default()
    }
}

/// Returns `node.cluster`, which Envoy requires: the service of the node's first workload, or else `vmesh`.
pub fn cluster(config: &Config) -> String {
    config.workloads.first().map_or_else(|| "vmesh".to_owned(), |workload| workload.service.to_string())
}

fn proto_value(value: Value) -> ProtoValue {
    let kind = match value {
        Value::Null => Kind::NullValue(NullValue::NullValue.into()),
        Value::Bool(value) => Kind::BoolValue(value),
        Value::Number(value) => Kind::NumberValue(value.as_f64().unwrap_or_default()),
        Value::String(value) => Kind::StringValue(value),
        Value::Array(values) => {
            Kind::ListValue(ListValue { values: values.into_iter().map(proto_value).collect() })
        }
        Value::Object(fields) => {
            let fields = fields.into_iter().filter(|(_, value)| !value.is_null());
            Kind::StructValue(Struct {
                fields: fields.map(|(name, value)| (name, proto_value(value))).collect(),
            })
        }
    };
    ProtoValue { kind: Some(kind) }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn the_first_request_says_everything_a_control_plane_needs() {
        let config = Config::parse(
            "agent.yaml",
            br#"
control_plane: ["http://127.0.0.1:15010"]
node: {name: web-17, address: 10.0.1.17, zone: eu-1a, labels: {role: web}}
workloads: [{service: orders, port: 8080, protocol: http}]
upstreams: [{service: payments, listen: "127.0.0.1:9001"}]
"#,
            "",
        )
        .unwrap();
        let build = "vmesh-agent/0 envoy/1";
        let shown = serde_json::to_string_pretty(&metadata(&config, build, false)).unwrap();
        expect![[r#"
            {
              "address": "10.0.1.17",
              "labels": {
                "role": "web"
              },
              "workloads": [
                {
                  "service": "orders",
                  "port": 8080,
                  "protocol": "http",
                  "listen": "127.0.0.1:15008"
                }
              ],
              "upstreams": [
                {
                  "service": "payments",
                  "listen": "127.0.0.1:9001"
                }
              ],
              "capture": {},
              "build": "vmesh-agent/0 envoy/1",
              "mtls_ready": null
            }"#]]
        .assert_eq(&shown);

        let node = node(&config, build, true);
        assert_eq!((node.id.as_str(), node.cluster.as_str()), ("web-17", "orders"));
        assert_eq!(node.locality.unwrap().zone, "eu-1a");
        let fields = node.metadata.unwrap().fields;
        let Some(Kind::StructValue(vmesh)) = &fields["vmesh"].kind else { panic!("{fields:?}") };
        assert_eq!(vmesh.fields["address"].kind, Some(Kind::StringValue("10.0.1.17".into())));
        let Some(Kind::ListValue(workloads)) = &vmesh.fields["workloads"].kind else { panic!("{vmesh:?}") };
        let Some(Kind::StructValue(orders)) = &workloads.values[0].kind else { panic!("{workloads:?}") };
        assert_eq!(orders.fields["port"].kind, Some(Kind::NumberValue(8080.0)));
        assert_eq!(vmesh.fields["mtls_ready"].kind, Some(Kind::BoolValue(true)));
    }

    #[test]
    fn all_upstreams_are_a_star_and_what_is_unknown_is_left_out() {
        let text = b"control_plane: [\"http://127.0.0.1:1\"]\nupstreams: [\"*\"]";
        let config = Config::parse("agent.yaml", text, "web-1").unwrap();
        let fields = node(&config, "b", false).metadata.unwrap().fields;
        let Some(Kind::StructValue(vmesh)) = &fields["vmesh"].kind else { panic!("{fields:?}") };
        assert_eq!(vmesh.fields["upstreams"].kind, Some(Kind::StringValue("*".into())));
        assert!(!vmesh.fields.contains_key("address") && !vmesh.fields.contains_key("mtls_ready"));
    }
}
