//! Dubbo 2, with interfaces as services. The name of a node is a URL per instance and interface:
//! `/dubbo/com.acme.Pay/providers/dubbo%3A%2F%2F10.1.0.17%3A20880%2F..`. One host may have hundreds of them,
//! so by default all interfaces of an application form one service.
//!
//! Parameters that change with each start (`timestamp`, `pid`) are ignored: after a restart the old node and
//! the new one exist until the old session ends.

use std::sync::Arc;

use serde_json::{Map, Value};
use vmesh_model::endpoint::parse_port;
use vmesh_model::{Address, Health, Host, Labels, Place, Protocol};

use super::{
    GroupBy, Member, Offer, Record, RecordResult, RecordRules, health_of_presence, text_at, weight_at,
};

pub(super) const DEFAULT_WEIGHT: f64 = 100.0;

/// Schemes that are not providers: endpoints within one process, other roles, and rules.
const NOT_OFFERED: &[&str] =
    &["injvm", "consumer", "admin", "override", "route", "script", "condition", "empty", "absent"];

/// Returns the rank in which one of several schemes is chosen; schemes with a longer tradition among callers
/// come first.
pub(super) fn rank(scheme: &str) -> usize {
    const RANKS: &[&str] = &["dubbo", "tri", "rest", "http", "grpc", "thrift"];
    RANKS.iter().position(|known| *known == scheme).unwrap_or(RANKS.len())
}

pub(super) fn protocol(scheme: &str) -> Protocol {
    match scheme {
        "dubbo" => Protocol::Dubbo,
        "tri" | "grpc" => Protocol::Grpc,
        "rest" | "http" => Protocol::Http,
        "thrift" => Protocol::Thrift,
        _ => Protocol::Tcp,
    }
}

/// Reports whether the name of a node is an encoded URL.
pub(super) fn is_url(name: &str) -> bool {
    let at = name.find("%3A%2F%2F").or_else(|| name.find("%3a%2f%2f"));
    at.is_some_and(|at| {
        at > 0 && name.bytes().take(at).all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
    })
}

pub(super) fn record(member: &Member<'_>, place: Place, rules: &RecordRules) -> RecordResult {
    let url = decoded(member.name);
    let (scheme, rest) = url.split_once("://").ok_or("its name is not a URL")?;
    if NOT_OFFERED.contains(&scheme) || rules.endpoint.as_deref().is_some_and(|wanted| wanted != scheme) {
        return Ok(None);
    }
    let (before, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = before.split_once('/').unwrap_or((before, ""));
    let params = parameters(query);
    let given = |name: &str| params.get(name).and_then(Value::as_str).filter(|value| !value.is_empty());
    // A default that a provider sets for all of its services appears as `default.<name>` in the URL of each.
    let param = |name: &str| given(name).or_else(|| given(&format!("default.{name}")));
    if param("category").is_some_and(|category| category != "providers")
        || param("side").is_some_and(|side| side != "provider")
    {
        return Ok(None);
    }
    let address = address(authority)?;
    let interface = param("interface").unwrap_or(path);
    if interface.is_empty() || interface == "*" {
        return Err("its URL names no interface".to_owned());
    }
    let version = param("version").filter(|version| *version != "0.0.0" && *version != "*");
    let group = param("group").filter(|group| *group != "*");
    let service = match rules.group_by {
        GroupBy::Application => param("application").ok_or("its URL names no `application`")?.to_owned(),
        GroupBy::Interface => key(group, interface, version),
    };
    let mut labels = Labels::new();
    let mut health = health_of_presence(member, &mut labels);
    if param("enabled") == Some("false") || param("disabled") == Some("true") {
        health = Health::Draining;
    }
    for (label, value) in [("group", group), ("release", param("release"))] {
        if let Some(value) = value {
            labels.insert(label.into(), value.into());
        }
    }
    let map = &rules.map;
    let mut value = params.clone();
    for (name, default) in
        params.iter().filter_map(|(name, value)| Some((name.strip_prefix("default.")?, value)))
    {
        if given(name).is_none() {
            value.insert(name.to_owned(), default.clone());
        }
    }
    let value = Value::Object(value);
    let version_text = text_at(&value, &map.version, &[]).or_else(|| version.map(str::to_owned));
    let (weight, note) = weight_at(&value, &map.weight, &["weight"]);
    let record = Record {
        weight,
        note,
        health,
        zone: text_at(&value, &map.zone, &["zone", "region"]).map(Into::into),
        version: version_text.map(Into::into),
        labels,
        ..Record::new(address, place)
    };
    let is_application = rules.group_by == GroupBy::Application;
    Ok(Some(Offer {
        service: Some(service.into()),
        interface: is_application.then(|| Arc::from(interface)),
        scheme: Some(scheme.into()),
        protocol: Some(protocol(scheme)),
        created: member.created,
        record,
    }))
}

/// Returns `group/interface:version` in the characters of a service name: `group.interface-version`.
fn key(group: Option<&str>, interface: &str, version: Option<&str>) -> String {
    let group = group.map(|group| format!("{group}.")).unwrap_or_default();
    let version = version.map(|version| format!("-{version}")).unwrap_or_default();
    format!("{group}{interface}{version}").replace('/', ".")
}

fn address(authority: &str) -> Result<Address, String> {
    let authority = authority.rsplit_once('@').map_or(authority, |(_, address)| address);
    let wrong = || format!("`{authority}` has no port");
    let (host, port) = match authority.rsplit_once(']') {
        Some((host, port)) => (host.trim_start_matches('['), port.strip_prefix(':').ok_or_else(wrong)?),
        None => authority.rsplit_once(':').ok_or_else(wrong)?,
    };
    Ok(Address { host: Host::parse(host)?, port: parse_port(port)? })
}

/// Returns the parameters by name. Their values may be encoded twice.
fn parameters(query: &str) -> Map<String, Value> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (decoded(name), Value::from(decoded(value)))).collect()
}

/// Decodes a text as Java's `URLDecoder` does; a text without escapes stays as it is.
pub(super) fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        let digit = |at: usize| after.get(at).and_then(|b| char::from(*b).to_digit(16));
        match (byte, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                bytes.push(u8::try_from(16 * high + low).unwrap_or_default());
                rest = after.get(2..).unwrap_or_default();
            }
            (b'+', ..) => bytes.push(b' '),
            _ => bytes.push(*byte),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
