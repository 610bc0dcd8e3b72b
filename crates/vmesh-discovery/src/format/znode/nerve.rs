//! Airbnb's nerve, and Yelp's SmartStack on top of it.
//!
//! ```json
//! {"host": "10.1.0.17", "port": 31002, "name": "vm-17", "weight": 10,
//!  "labels": {"az": "us-east-1a", "region:uswest1-prod": "", "deploy_group": "prod.canary"}}
//! ```
//!
//! With `use_path_encoding` the same is in the node's name: `base64_<length>_<base64>_<sequence>`. Ports and
//! weights may be texts; a weight of 0 is a drain. A node without data is a leftover, and a node without host
//! and port is the configuration of a load balancer: neither is an instance.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use serde_json::Value;
use vmesh_model::{Health, Labels, Place};

use crate::format::smartstack::is_disabled;

use super::{
    Member, Offer, Record, RecordResult, RecordRules, add_labels, address, first_byte, health_of_presence,
    json, protocol_of, scalar, text_at, weight_at,
};

/// The weight that Yelp's writer sets, and that synapse assumes if none is given.
pub(super) const DEFAULT_WEIGHT: f64 = 10.0;

pub(super) fn record(member: &Member<'_>, place: Place, rules: &RecordRules) -> RecordResult {
    let value = match in_name(member.name) {
        Some(value) => value,
        None if first_byte(member.data).is_none() => return Ok(None),
        None => json(member)?,
    };
    if !member.is_ephemeral && value.get("host").is_none() && value.get("port").is_none() {
        return Ok(None);
    }
    let address = address(value.get("host"), value.get("port"))?;
    let mut labels = Labels::new();
    let mut health = health_of_presence(member, &mut labels);
    if let Some(options) = value.get("haproxy_server_options").and_then(Value::as_str)
        && is_disabled(options)
    {
        health = Health::Draining;
    }
    if let Some(given) = value.get("labels").and_then(Value::as_object) {
        add_labels(&mut labels, given, &["az", "zone", "version"]);
    }
    let places = places(&value);
    for (kind, names) in &places {
        labels.insert(kind.as_str().into(), names.as_str().into());
    }
    if let Some(name) = value.get("name").and_then(scalar) {
        labels.insert("name".into(), name.into());
    }
    let map = &rules.map;
    let zone = text_at(&value, &map.zone, &["labels.az", "labels.zone"]);
    let (weight, note) = weight_at(&value, &map.weight, &["weight"]);
    let record = Record {
        weight,
        note,
        health,
        zone: zone.or_else(|| places.get("habitat").cloned()).map(Into::into),
        version: text_at(&value, &map.version, &["labels.version"]).map(Into::into),
        labels,
        ..Record::new(address, place)
    };
    let protocol = text_at(&value, &map.protocol, &["labels.protocol"]).and_then(|name| protocol_of(&name));
    Ok(Some(Offer {
        service: None,
        interface: None,
        scheme: None,
        protocol,
        created: member.created,
        record,
    }))
}

/// Returns Yelp's labels `<kind>:<name>` without a value (`region:uswest1-prod`), as names by kind.
fn places(value: &Value) -> BTreeMap<String, String> {
    let mut places: BTreeMap<String, String> = BTreeMap::new();
    let labels = value.get("labels").and_then(Value::as_object).into_iter().flatten();
    for (label, _) in labels.filter(|(_, value)| value.as_str() == Some("")) {
        if let Some((kind, name)) = label.split_once(':') {
            let names = places.entry(kind.to_owned()).or_default();
            if !names.is_empty() {
                names.push(',');
            }
            names.push_str(name);
        }
    }
    places
}

/// Decodes the JSON in a node's name; `None` if there is none or it is invalid.
fn in_name(name: &str) -> Option<Value> {
    let (length, rest) = name.strip_prefix("base64_")?.split_once('_')?;
    let encoded = rest.get(..length.parse().ok()?)?;
    let bytes = URL_SAFE.decode(encoded).or_else(|_| URL_SAFE_NO_PAD.decode(encoded)).ok()?;
    serde_json::from_slice(&bytes).ok().filter(Value::is_object)
}
