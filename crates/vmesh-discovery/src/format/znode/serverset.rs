//! Twitter's ServerSets, also used by Aurora and Finagle.
//!
//! ```json
//! {"serviceEndpoint": {"host": "vm-17.dc1", "port": 31002},
//!  "additionalEndpoints": {"http": {"host": "vm-17.dc1", "port": 31002}},
//!  "status": "ALIVE", "shard": 7, "metadata": {"version": "v3"}}
//! ```
//!
//! The nodes of members are named `member_0000000042`. A node `vector_..` may hold weights, each with a
//! selector of members. The weights of all selectors that match a member are multiplied; -1 takes the member
//! out.

use serde_json::Value;
use vmesh_model::{Address, Health, Labels, Place, Protocol};

use super::{
    DirectoryContent, Member, Offer, RawWeight, Record, RecordDirectory, RecordResult, RecordRules,
    add_labels, address, check_readable, json, protocol_of, scalar, text_at, value_at,
};

/// An entry of a `vector_..` node.
struct VectorEntry {
    selects: MemberSelector,
    weight: f64,
}

enum MemberSelector {
    Member(String),
    Address(String),
    Shard(String),
}

pub(super) fn read(directory: &RecordDirectory<'_>, rules: &RecordRules, read: &mut DirectoryContent) {
    let mut weighings = Vec::new();
    for member in directory.members.iter().filter(|member| member.name.starts_with("vector_")) {
        match check_readable(member).and_then(|()| vector(member)) {
            Ok(more) => weighings.extend(more),
            Err(why) => {
                let message = format!("{why}; its weights are ignored");
                read.note(directory.place_of(member), message);
            }
        }
    }
    for member in directory.members.iter().filter(|member| member.name.starts_with("member_")) {
        let place = directory.place_of(member);
        match check_readable(member).and_then(|()| record(member, place.clone(), rules, &weighings)) {
            Ok(Some(offer)) => read.offers.push(offer),
            Ok(None) => {}
            Err(why) => read.bad_record(place, why),
        }
    }
}

fn vector(member: &Member<'_>) -> Result<Vec<VectorEntry>, String> {
    let value = json(member)?;
    let entries = value.get("vector").and_then(Value::as_array).ok_or("there is no list `vector` in it")?;
    let weighing = |entry: &Value| {
        let (what, which) = entry.get("select")?.as_str()?.split_once('=')?;
        let selects = match what {
            "member" => MemberSelector::Member(which.to_owned()),
            "inet" => MemberSelector::Address(which.to_owned()),
            "shard" => MemberSelector::Shard(which.to_owned()),
            _ => return None,
        };
        Some(VectorEntry { selects, weight: entry.get("weight").and_then(Value::as_f64).unwrap_or(1.0) })
    };
    Ok(entries.iter().filter_map(weighing).collect())
}

fn record(member: &Member<'_>, place: Place, rules: &RecordRules, weighings: &[VectorEntry]) -> RecordResult {
    let value = json(member)?;
    let (address, protocol) = endpoint(&value, rules)?;
    let shard = value.get("shard").and_then(scalar);
    let shown = address.to_string();
    let selected = weighings.iter().filter(|weighing| match &weighing.selects {
        MemberSelector::Member(name) => name == member.name,
        MemberSelector::Address(inet) => *inet == shown,
        MemberSelector::Shard(of) => Some(of) == shard.as_ref(),
    });
    let weight = selected.fold(None, |weight, weighing| Some(weight.unwrap_or(1.0) * weighing.weight));
    // Writers use exactly this weight to take a member out.
    if weight == Some(-1.0) {
        return Ok(None);
    }
    let mut labels = Labels::new();
    if let Some(shard) = shard {
        labels.insert("shard".into(), shard.into());
    }
    if let Some(metadata) = value.get("metadata").and_then(Value::as_object) {
        add_labels(&mut labels, metadata, &["zone", "az", "version"]);
    }
    if !member.is_ephemeral {
        labels.insert("liveness".into(), "none".into());
    }
    let map = &rules.map;
    let text = |own: &[String], built_in: &[&str]| text_at(&value, own, built_in).map(Into::into);
    let mapped = text_at(&value, &map.protocol, &["metadata.protocol"]).and_then(|name| protocol_of(&name));
    let record = Record {
        weight: weight.map(|weight| RawWeight(weight.clamp(0.0, 1_000_000.0))),
        health: health(&value),
        zone: text(&map.zone, &["metadata.zone", "metadata.az"]),
        version: text(&map.version, &["metadata.version"]),
        labels,
        ..Record::new(address, place)
    };
    let protocol = mapped.or(protocol);
    Ok(Some(Offer {
        service: None,
        interface: None,
        scheme: None,
        protocol,
        created: member.created,
        record,
    }))
}

/// Returns the configured endpoint, and its protocol if the endpoint's name is one.
fn endpoint(value: &Value, rules: &RecordRules) -> Result<(Address, Option<Protocol>), String> {
    let Some(name) = &rules.endpoint else {
        let endpoint = value.get("serviceEndpoint").ok_or("there is no `serviceEndpoint` in it")?;
        return Ok((address(endpoint.get("host"), endpoint.get("port"))?, None));
    };
    let endpoint = value_at(value, "additionalEndpoints").and_then(|all| all.get(name));
    let endpoint =
        endpoint.ok_or_else(|| format!("there is no endpoint `{name}` in `additionalEndpoints`"))?;
    Ok((address(endpoint.get("host"), endpoint.get("port"))?, protocol_of(name)))
}

/// Returns the health from `status`, which is deprecated but common; a member without it is alive.
fn health(value: &Value) -> Health {
    match value.get("status").and_then(Value::as_str) {
        None | Some("ALIVE") => Health::Healthy,
        Some("STOPPING") => Health::Draining,
        Some(_) => Health::Unhealthy,
    }
}
