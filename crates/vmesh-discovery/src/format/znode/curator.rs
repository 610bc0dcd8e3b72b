//! Apache Curator's x-discovery, and formats built on it: Spring Cloud, and Dubbo 3 with applications as
//! services.
//!
//! ```json
//! {"name": "pay", "id": "0f3c", "address": "10.1.0.17", "port": 8080, "sslPort": null,
//!  "payload": {"@class": "com.acme.Meta", "version": "v3"}, "serviceType": "DYNAMIC",
//!  "uriSpec": {"parts": [{"value": "scheme", "variable": true}, {"value": "://", "variable": false}]}}
//! ```
//!
//! A node with JSON is an instance; a node without is a directory, as names may be nested. A payload is an
//! object, a text, a number, nothing, or a list of the name of its class and one of those.

use serde_json::Value;
use vmesh_model::{Health, Host, Labels, Place, Protocol};

use super::dubbo;
use super::{
    Member, Offer, PreferredPort, Record, RecordResult, RecordRules, add_labels, address, health_of_presence,
    json, protocol_of, text_at, weight_at,
};

/// Keys of Spring's and Dubbo's metadata that only their own clients need or that become other fields.
const NOT_LABELS: &[&str] = &["@class", "instance_status", "timestamp", "weight", "zone", "version"];

pub(super) fn record(member: &Member<'_>, place: Place, rules: &RecordRules) -> RecordResult {
    if !member.is_ephemeral && is_directory(member.data) {
        return Ok(None);
    }
    let mut value = json(member)?;
    unwrap(&mut value);
    let payload = value.get("payload").unwrap_or(&Value::Null);
    let metadata = payload.get("metadata").filter(|metadata| metadata.is_object());
    let is_dubbo = metadata.is_some_and(|metadata| metadata.get("dubbo.metadata.revision").is_some());
    if is_dubbo && metadata.and_then(|m| m.get("dubbo.metadata.revision")) == Some(&Value::from("0")) {
        // The instance has started but does not offer anything yet.
        return Ok(None);
    }
    let (port, is_tls) = port(&value, rules.prefer)?;
    let mut address = address(value.get("address"), Some(&port))?;
    let map = &rules.map;
    let named = text_at(&value, &map.protocol, &["payload.metadata.protocol", "payload.protocol"]);
    let named = named.and_then(|name| protocol_of(&name));
    let mut protocol = if is_tls { Some(Protocol::Tls) } else { named.or_else(|| spoken(&value)) };
    let mut scheme = None;
    if let (true, Some(metadata)) = (is_dubbo, metadata) {
        let chosen = endpoint(metadata, address.port.get(), rules)?;
        address.port = chosen.0.unwrap_or(address.port);
        scheme = chosen.1;
        protocol = scheme.as_deref().map(dubbo::protocol).or(protocol);
    }
    let mut labels = Labels::new();
    match metadata.or(Some(payload)).and_then(Value::as_object) {
        Some(facts) => {
            let own = facts.iter().filter(|(name, _)| !name.starts_with("dubbo."));
            add_labels(&mut labels, own, NOT_LABELS);
        }
        None => add_labels(&mut labels, [(&"payload".to_owned(), payload)], &[]),
    }
    let present = health_of_presence(member, &mut labels);
    let (weight, note) = weight_at(&value, &map.weight, &["payload.metadata.weight", "payload.weight"]);
    let record = Record {
        weight,
        note,
        health: health(&value, metadata, present),
        zone: text_at(&value, &map.zone, &["payload.metadata.zone", "payload.zone"]).map(Into::into),
        version: text_at(&value, &map.version, &["payload.metadata.version", "payload.version"])
            .map(Into::into),
        labels,
        ..Record::new(address, place)
    };
    let scheme = scheme.map(Into::into);
    Ok(Some(Offer { service: None, interface: None, scheme, protocol, created: member.created, record }))
}

/// Reports whether a node is a parent node of Curator: such a node is empty, or holds the address of its
/// creator, which is Curator's default content.
fn is_directory(data: &[u8]) -> bool {
    let text = std::str::from_utf8(data).map(str::trim);
    text.is_ok_and(|text| text.is_empty() || matches!(Host::parse(text), Ok(Host::Ip(_))))
}

/// Unwraps a payload that Jackson wrote as a list of its class and its value.
fn unwrap(value: &mut Value) {
    if let Some(payload) = value.get_mut("payload")
        && let Some(last) = payload.as_array_mut().and_then(Vec::pop)
    {
        *payload = last;
    }
}

/// Returns the port, and whether it speaks TLS.
fn port(value: &Value, prefer: PreferredPort) -> Result<(Value, bool), String> {
    let given = |name: &str| {
        let port = value.get(name).filter(|port| !port.is_null() && port.as_u64() != Some(0));
        port.cloned()
    };
    match (given("port"), given("sslPort"), prefer) {
        (_, Some(ssl), PreferredPort::SslPort) | (None, Some(ssl), PreferredPort::Port) => Ok((ssl, true)),
        (Some(port), _, _) => Ok((port, false)),
        (None, None, _) => Err("there is neither a `port` nor an `sslPort` in it".to_owned()),
    }
}

/// Returns the protocol from the URL template, which starts with a variable that stands for `http`, or with a
/// scheme.
fn spoken(value: &Value) -> Option<Protocol> {
    let part = value.get("uriSpec")?.get("parts")?.get(0)?;
    let text = part.get("value")?.as_str()?;
    if part.get("variable") == Some(&Value::Bool(true)) {
        return (text == "scheme").then_some(Protocol::Http);
    }
    protocol_of(text.split("://").next().unwrap_or(text))
}

/// Returns the health from Curator's `enabled` and Spring's status, or else from the presence of the node.
fn health(value: &Value, metadata: Option<&Value>, present: Health) -> Health {
    if value.get("enabled") == Some(&Value::Bool(false)) {
        return Health::Draining;
    }
    let status = metadata.and_then(|metadata| metadata.get("instance_status")).and_then(Value::as_str);
    match status.map(str::to_ascii_uppercase).as_deref() {
        None | Some("") => present,
        Some("UP") => Health::Healthy,
        Some("OUT_OF_SERVICE") => Health::Draining,
        Some(_) => Health::Unhealthy,
    }
}

/// Returns port and protocol of the configured endpoint of a Dubbo instance, or else of the endpoint with its
/// port.
fn endpoint(
    metadata: &Value,
    port: u16,
    rules: &RecordRules,
) -> Result<(Option<std::num::NonZeroU16>, Option<String>), String> {
    let Some(text) = metadata.get("dubbo.endpoints").and_then(Value::as_str) else { return Ok((None, None)) };
    let all: Vec<Value> =
        serde_json::from_str(text).map_err(|wrong| format!("`dubbo.endpoints` is not JSON: {wrong}"))?;
    let scheme = |endpoint: &Value| endpoint.get("protocol").and_then(Value::as_str).map(str::to_owned);
    let number = |endpoint: &Value| endpoint.get("port").and_then(Value::as_u64);
    let found = match &rules.endpoint {
        Some(wanted) => {
            let found = all.iter().find(|endpoint| scheme(endpoint).as_deref() == Some(wanted));
            Some(found.ok_or_else(|| format!("there is no endpoint `{wanted}` in `dubbo.endpoints`"))?)
        }
        None => all.iter().find(|endpoint| number(endpoint) == Some(port.into())).or(all.first()),
    };
    let port = found.and_then(number).and_then(|port| u16::try_from(port).ok());
    Ok((port.and_then(std::num::NonZeroU16::new), found.and_then(scheme)))
}
