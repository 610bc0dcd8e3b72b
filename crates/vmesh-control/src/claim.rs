//! Reads the report of an xDS client from the `node` of its first request.
//!
//! The agent, and any plain client, puts its report under `node.metadata.vmesh`. A client whose report cannot
//! be read is rejected with the name of the wrong field. If it were served without that field, the node would
//! receive less than it asked for and still look healthy.

use std::net::IpAddr;
use std::sync::Arc;

use serde_json::{Map, Number, Value};
use vmesh_model::node::{Client, NodeCapture, Upstream, Upstreams, Workload};
use vmesh_model::{Labels, NodeName, NodeReport, ServiceName};
use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_proto::google::protobuf::{Struct, Value as ProtoValue, value::Kind};
use vmesh_text as text;

/// The reason why a client's `node` was rejected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidClaim {
    #[error("the xDS request's node.id: {0}")]
    Name(vmesh_model::name::InvalidName),
    #[error("node `{node}`: node.metadata.vmesh.{field}: {why}")]
    Field { node: NodeName, field: &'static str, why: String },
}

/// The limit of upstreams, more than any node calls.
const UPSTREAMS_MAX: usize = 2000;
/// The limit of workloads, more than any host runs.
const WORKLOADS_MAX: usize = 256;
const LABELS_MAX: usize = 64;
/// The limit, in bytes, of a zone and of a label's name and value.
const TEXT_MAX: usize = 256;

/// Checks the length and the characters of a text that will be displayed and compared.
fn check_text(text: &str) -> Result<(), String> {
    if text.len() > TEXT_MAX {
        return Err(format!("`{}` is longer than {TEXT_MAX} bytes", text::escaped(text, 32)));
    }
    match text.chars().any(text::is_unsafe) {
        true => Err(format!(
            "`{}` contains control or other unprintable characters",
            text::escaped(text, TEXT_MAX)
        )),
        false => Ok(()),
    }
}

/// Checks the number of items in a list.
fn check_number(number: usize, most: usize) -> Result<(), String> {
    if number <= most { Ok(()) } else { Err(format!("there are {number}, and at most {most} are taken")) }
}

/// Reads and checks the report of a client.
pub(crate) fn read(node: &Node) -> Result<NodeReport, InvalidClaim> {
    let name: NodeName = node.id.parse().map_err(InvalidClaim::Name)?;
    let wrong = |field, why| InvalidClaim::Field { node: name.clone(), field, why };
    let metadata = node.metadata.as_ref().and_then(|metadata| metadata.fields.get("vmesh")).map(json);
    let mut claim = match metadata {
        None => Map::new(),
        Some(Value::Object(claim)) => claim,
        Some(_) => return Err(wrong("", "it is not a map".to_owned())),
    };
    let mut take = |field: &str| claim.remove(field).filter(|value| !value.is_null());
    let zone = node.locality.as_ref().map(|locality| locality.zone.as_str()).filter(|zone| !zone.is_empty());
    zone.map_or(Ok(()), check_text).map_err(|why| wrong("locality.zone", why))?;
    let shown = |text: &str| Arc::<str>::from(text::escaped(text, TEXT_MAX));
    let address: Option<IpAddr> = parse(take("address")).map_err(|why| wrong("address", why))?;
    let labels: Option<Labels> = parse(take("labels")).map_err(|why| wrong("labels", why))?;
    let workloads: Option<Vec<Workload>> = parse(take("workloads")).map_err(|why| wrong("workloads", why))?;
    let capture: Option<NodeCapture> = parse(take("capture")).map_err(|why| wrong("capture", why))?;
    let mtls_ready: Option<bool> = parse(take("mtls_ready")).map_err(|why| wrong("mtls_ready", why))?;
    let upstreams = upstreams(take("upstreams")).map_err(|why| wrong("upstreams", why))?;
    check_number(labels.as_ref().map_or(0, Labels::len), LABELS_MAX).map_err(|why| wrong("labels", why))?;
    for (name, value) in labels.iter().flatten() {
        check_text(name).and_then(|()| check_text(value)).map_err(|why| wrong("labels", why))?;
    }
    check_number(workloads.as_ref().map_or(0, Vec::len), WORKLOADS_MAX)
        .map_err(|why| wrong("workloads", why))?;
    if let Upstreams::Declared(declared) = &upstreams {
        check_number(declared.len(), UPSTREAMS_MAX).map_err(|why| wrong("upstreams", why))?;
    }
    let build = take("build").and_then(|build| build.as_str().map(shown));
    let build = build.unwrap_or_else(|| shown(&node.user_agent_name));
    let client = if node.user_agent_name.starts_with("gRPC") { Client::Grpc } else { Client::Envoy };
    Ok(NodeReport {
        name,
        client,
        address,
        zone: zone.map(Arc::from),
        labels: labels.unwrap_or_default(),
        workloads: workloads.unwrap_or_default(),
        upstreams,
        capture: capture.unwrap_or_default(),
        build,
        // The claim cannot say this: only a certificate does.
        identity: None,
        mtls_ready: mtls_ready.unwrap_or_default(),
    })
}

fn parse<T: serde::de::DeserializeOwned>(value: Option<Value>) -> Result<Option<T>, String> {
    // The error message quotes text of the client, so it is escaped.
    let shown = |error: serde_json::Error| text::escaped(&error.to_string(), text::MAX);
    value.map(|value| serde_json::from_value(value).map_err(shown)).transpose()
}

/// Parses upstreams: `"*"`, or a list of names and of `{service, listen}`. All services if the field is
/// absent.
fn upstreams(value: Option<Value>) -> Result<Upstreams, String> {
    let list = match value {
        None => return Ok(Upstreams::All),
        Some(Value::String(all)) if all == "*" => return Ok(Upstreams::All),
        Some(Value::Array(list)) => list,
        Some(_) => return Err("neither a list nor \"*\"".to_owned()),
    };
    if list.iter().any(|one| one.as_str() == Some("*")) {
        return Ok(Upstreams::All);
    }
    let one = |value: Value| match value {
        Value::String(name) => match name.parse::<ServiceName>() {
            Ok(service) => Ok(Upstream { service, listen: None, as_: None }),
            Err(invalid) => Err(invalid.to_string()),
        },
        other => serde_json::from_value(other).map_err(|error| error.to_string()),
    };
    list.into_iter().map(one).collect::<Result<_, _>>().map(Upstreams::Declared)
}

fn json(value: &ProtoValue) -> Value {
    match &value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(value)) => Value::Bool(*value),
        Some(Kind::StringValue(value)) => Value::String(value.clone()),
        // Protobuf has only floating-point numbers, but a port must be an integer again.
        Some(Kind::NumberValue(value)) if value.fract() == 0.0 && value.abs() < 9e15 => {
            Value::Number(Number::from(*value as i64))
        }
        Some(Kind::NumberValue(value)) => Number::from_f64(*value).map_or(Value::Null, Value::Number),
        Some(Kind::StructValue(value)) => object(value),
        Some(Kind::ListValue(list)) => Value::Array(list.values.iter().map(json).collect()),
    }
}

fn object(value: &Struct) -> Value {
    Value::Object(value.fields.iter().map(|(key, value)| (key.clone(), json(value))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmesh_model::node::{InboundCapture, OutboundCapture};
    use vmesh_proto::google::protobuf::ListValue;

    fn proto(value: &Value) -> ProtoValue {
        let kind = match value {
            Value::Null => Kind::NullValue(0),
            Value::Bool(value) => Kind::BoolValue(*value),
            Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap()),
            Value::String(text) => Kind::StringValue(text.clone()),
            Value::Array(list) => Kind::ListValue(ListValue { values: list.iter().map(proto).collect() }),
            Value::Object(map) => Kind::StructValue(Struct {
                fields: map.iter().map(|(key, value)| (key.clone(), proto(value))).collect(),
            }),
        };
        ProtoValue { kind: Some(kind) }
    }

    fn claim(id: &str, vmesh: Value) -> Result<NodeReport, String> {
        let fields = [("vmesh".to_owned(), proto(&vmesh))].into();
        let node = Node { id: id.to_owned(), metadata: Some(Struct { fields }), ..Node::default() };
        read(&node).map_err(|bad| bad.to_string())
    }

    #[test]
    fn a_client_that_says_nothing_calls_everything() {
        let report = read(&Node { id: "web-1".to_owned(), ..Node::default() }).unwrap();
        assert_eq!(report.upstreams, Upstreams::All);
        assert_eq!(report.client, Client::Envoy);
    }

    #[test]
    fn an_upstream_is_a_name_or_a_name_and_a_port() {
        let upstreams = serde_json::json!(["orders", {"service": "payments", "listen": "127.0.0.1:9001"}]);
        let report = claim("web-1", serde_json::json!({ "upstreams": upstreams })).unwrap();
        let Upstreams::Declared(declared) = report.upstreams else { panic!("not declared") };
        assert_eq!(declared[0].listen, None);
        assert_eq!(declared[1].listen.unwrap().port(), 9001);
    }

    #[test]
    fn what_a_node_captures_is_read_and_what_is_left_out_is_not_captured() {
        let capture =
            |said| claim("web-1", serde_json::json!({ "capture": said })).map(|report| report.capture);
        let both = NodeCapture {
            outbound: Some(OutboundCapture::Addresses),
            inbound: Some(InboundCapture::Tproxy),
            without_ipv6: true,
        };
        assert_eq!(
            capture(serde_json::json!({"outbound": "addresses", "inbound": "tproxy", "without_ipv6": true})),
            Ok(both)
        );
        assert_eq!(
            capture(serde_json::json!({"outbound": null, "of_a_newer_agent": 1})),
            Ok(NodeCapture::default())
        );
        assert_eq!(claim("web-1", serde_json::json!({})).unwrap().capture, NodeCapture::default());
        let wrong = capture(serde_json::json!({"outbound": "everything"})).unwrap_err();
        assert!(wrong.contains("vmesh.capture: unknown variant `everything`, expected one of"), "{wrong}");
    }

    #[test]
    fn a_claim_that_cannot_be_read_names_its_field() {
        let wrong = |vmesh| claim("web-1", vmesh).unwrap_err();
        assert_eq!(
            wrong(serde_json::json!({"upstreams": 7})),
            r#"node `web-1`: node.metadata.vmesh.upstreams: neither a list nor "*""#
        );
        assert!(
            wrong(serde_json::json!({"address": "10.0.0"})).contains("vmesh.address: invalid IP address")
        );
        assert!(
            wrong(serde_json::json!({"workloads": [{"service": "a", "port": 70000}]}))
                .contains("vmesh.workloads")
        );
        assert!(claim("", serde_json::json!({})).unwrap_err().contains("node.id"));
        assert!(claim("a|b", serde_json::json!({})).unwrap_err().contains("`a|b` is not a node name"));
    }

    #[test]
    fn a_claim_has_limits_and_no_characters_that_a_terminal_would_obey() {
        let wrong = |vmesh| claim("web-1", vmesh).unwrap_err();
        assert_eq!(
            wrong(serde_json::json!({"labels": {"a": "\u{1b}[2J"}})),
            "node `web-1`: node.metadata.vmesh.labels: `\\u{1b}[2J` contains control or other unprintable characters"
        );
        assert!(
            wrong(serde_json::json!({"labels": {"x".repeat(300): ""}})).contains("longer than 256 bytes")
        );
        let many: serde_json::Map<_, _> = (0..65).map(|i| (i.to_string(), "".into())).collect();
        assert!(wrong(serde_json::json!({ "labels": many })).ends_with("at most 64 are taken"));
        let many: Vec<_> = (0..2001).map(|i| format!("s{i}")).collect();
        assert!(wrong(serde_json::json!({ "upstreams": many })).ends_with("at most 2000 are taken"));
        let many: Vec<_> = (1..258).map(|port| serde_json::json!({"service": "a", "port": port})).collect();
        assert!(wrong(serde_json::json!({ "workloads": many })).ends_with("at most 256 are taken"));
        assert!(!wrong(serde_json::json!({"capture": {"outbound": "\u{1b}[31m"}})).contains('\u{1b}'));
        let build = format!("\u{9b}31m{}", "x".repeat(300));
        let build = claim("web-1", serde_json::json!({ "build": build })).unwrap().build;
        assert!(build.starts_with("\\u{9b}31mxxx") && build.len() < 300, "{build}");
        let zone =
            vmesh_proto::envoy::config::core::v3::Locality { zone: "a\nb".into(), ..Default::default() };
        let node = Node { id: "web-1".to_owned(), locality: Some(zone), ..Node::default() };
        assert!(read(&node).unwrap_err().to_string().contains("locality.zone: `a\\nb`"));
    }
}
