//! Consul: the answer of `/v1/health/service/<name>` for one service, from one datacenter or several.
//!
//! The parser is lenient: `null` is ignored, unknown fields are ignored, and both spellings of
//! `TaggedAddresses` are accepted. An invalid entry is left out alone. vmesh judges health itself instead of
//! asking Consul for healthy instances only (`?passing`), since an unhealthy instance has to stay visible to
//! Envoy.

mod combine;
mod facts;
pub mod rules;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use vmesh_model::{Address, Health, Host, Place, Problem, Protocol, ServiceName, Weight};

use super::{RawWeight, Record, subject_of};
use crate::pattern::Pattern;

pub use combine::{combine, restored_instances};
use facts::InstanceFacts;
pub(super) use facts::protocol;
pub use rules::InstanceRules;
use rules::{AddressKind, CriticalAction, WarningAction};

/// The instances of one service in one datacenter.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ServiceInstances {
    /// The number of listed instances, usable or not.
    pub listed: usize,
    /// The size of the answer in bytes.
    pub bytes: usize,
    instances: Vec<ConsulInstance>,
    bad: Vec<Problem>,
    notes: Vec<Problem>,
}

impl ServiceInstances {
    /// Returns the number of invalid entries.
    pub fn bad(&self) -> u64 {
        self.bad.len() as u64
    }
}

#[derive(Debug, Clone, PartialEq)]
struct ConsulInstance {
    record: Record,
    protocol: Option<Protocol>,
    /// The share of all requests in Fabio's terms, from 0 to 1.
    fraction: Option<f64>,
    /// Consul's index of the registration; a greater index is later.
    created: u64,
}

// `expecting` keeps the text of problems independent of the names of these types.
#[derive(Deserialize)]
#[serde(expecting = "struct Entry", rename_all = "PascalCase")]
struct HealthEntry {
    node: Option<NodeEntry>,
    service: Option<ServiceEntry>,
    checks: Option<Vec<HealthCheck>>,
}

#[derive(Default, Deserialize)]
#[serde(expecting = "struct Node", rename_all = "PascalCase")]
struct NodeEntry {
    node: Option<String>,
    address: Option<String>,
    datacenter: Option<String>,
    tagged_addresses: Option<BTreeMap<String, String>>,
    meta: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(expecting = "struct Service", rename_all = "PascalCase")]
struct ServiceEntry {
    #[serde(rename = "ID")]
    id: Option<String>,
    service: Option<String>,
    tags: Option<Vec<String>>,
    address: Option<String>,
    port: Option<i64>,
    #[serde(alias = "ports")]
    ports: Option<Vec<NamedPort>>,
    socket_path: Option<String>,
    tagged_addresses: Option<BTreeMap<String, TaggedAddress>>,
    meta: Option<BTreeMap<String, String>>,
    weights: Option<CheckWeights>,
    kind: Option<String>,
    create_index: Option<u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct NamedPort {
    #[serde(alias = "name")]
    name: Option<String>,
    #[serde(alias = "port")]
    port: Option<i64>,
    #[serde(alias = "default")]
    default: Option<bool>,
}

#[derive(Deserialize)]
#[serde(expecting = "struct Tagged", rename_all = "PascalCase")]
struct TaggedAddress {
    #[serde(alias = "address")]
    address: Option<String>,
    #[serde(alias = "port")]
    port: Option<i64>,
}

#[derive(Deserialize)]
#[serde(expecting = "struct Weights", rename_all = "PascalCase")]
struct CheckWeights {
    passing: Option<u32>,
    warning: Option<u32>,
}

#[derive(Deserialize)]
#[serde(expecting = "struct Check", rename_all = "PascalCase")]
struct HealthCheck {
    #[serde(rename = "CheckID")]
    id: Option<String>,
    name: Option<String>,
    status: Option<String>,
}

/// Parses the answer for `service`. `source` is the name of the source, for messages. `translated` is set if
/// the answer states that its addresses are those of the wide area network already.
///
/// # Errors
///
/// Returns the reason if the answer is not a JSON list.
pub fn read(
    body: &[u8],
    source: &str,
    service: &ServiceName,
    translated: bool,
    rules: &InstanceRules,
) -> Result<ServiceInstances, String> {
    let mut read = ServiceInstances { bytes: body.len(), ..ServiceInstances::default() };
    let reader =
        EntryReader { place: place(source, service), subject: subject_of(service), translated, rules };
    // The whole answer is parsed at once. Only if that fails, which is rare, is it parsed entry by entry.
    if let Ok(entries) = serde_json::from_slice::<Vec<HealthEntry>>(body) {
        read.listed = entries.len();
        for (index, entry) in entries.into_iter().enumerate() {
            reader.read_entry(entry, index, &mut read);
        }
        return Ok(read);
    }
    let values: Option<Vec<Value>> = serde_json::from_slice(body).map_err(|wrong| wrong.to_string())?;
    let values = values.unwrap_or_default();
    read.listed = values.len();
    for (index, value) in values.into_iter().enumerate() {
        match serde_json::from_value(value) {
            Ok(entry) => reader.read_entry(entry, index, &mut read),
            Err(wrong) => reader.add_bad(&mut read, &format!("entry {}", index + 1), &wrong.to_string()),
        }
    }
    Ok(read)
}

/// Returns the place of a service in messages.
fn place(source: &str, service: &ServiceName) -> Place {
    Place::file(format!("{source}/{service}"))
}

struct EntryReader<'a> {
    place: Place,
    subject: Arc<str>,
    translated: bool,
    rules: &'a InstanceRules,
}

/// The reason why an instance is no endpoint.
enum LeftOutReason {
    /// The configuration leaves the instance out.
    Silently,
    /// The entry is valid, but the instance is unusable.
    Unusable(String),
    Bad(String),
}

impl EntryReader<'_> {
    fn add_bad(&self, read: &mut ServiceInstances, who: &str, why: &str) {
        read.bad.push(Problem::new(self.place.clone(), self.subject.clone(), format!("{who}: {why}")));
    }

    fn add_note(&self, read: &mut ServiceInstances, who: &str, note: &str) {
        read.notes.push(Problem::new(self.place.clone(), self.subject.clone(), format!("{who}: {note}")));
    }

    fn read_entry(&self, entry: HealthEntry, index: usize, read: &mut ServiceInstances) {
        let node = entry.node.unwrap_or_default();
        let Some(service) = entry.service else {
            self.add_bad(read, &format!("entry {}", index + 1), "there is no `Service` in it");
            return;
        };
        let who = {
            let id = service.id.as_deref().or(service.service.as_deref()).unwrap_or("?");
            format!("instance `{id}` on node `{}`", node.node.as_deref().unwrap_or("?"))
        };
        let mut notes = Vec::new();
        match self.read_instance(&node, service, &entry.checks.unwrap_or_default(), &mut notes) {
            Ok(instance) => read.instances.push(instance),
            Err(LeftOutReason::Silently) => return,
            Err(LeftOutReason::Unusable(why)) => {
                self.add_note(read, &who, &format!("{why}; this endpoint is left out"))
            }
            Err(LeftOutReason::Bad(why)) => self.add_bad(read, &who, &why),
        }
        for note in notes {
            self.add_note(read, &who, &note);
        }
    }

    fn read_instance(
        &self,
        node: &NodeEntry,
        service: ServiceEntry,
        checks: &[HealthCheck],
        notes: &mut Vec<String>,
    ) -> Result<ConsulInstance, LeftOutReason> {
        let rules = self.rules;
        let empty = BTreeMap::new();
        let (meta, node_meta) =
            (service.meta.as_ref().unwrap_or(&empty), node.meta.as_ref().unwrap_or(&empty));
        let tags = service.tags.as_deref().unwrap_or_default();
        self.check_wanted(service.kind.as_deref().unwrap_or_default(), tags, meta, node_meta)?;

        let (health, weight) = self.health(checks, service.weights.as_ref())?;
        let facts = InstanceFacts::of(tags, meta, node_meta, rules);
        let address = self.address(node, &service, &facts)?;
        let created = service.create_index.unwrap_or_default();
        let mut record = Record::new(address, self.place.clone());
        record.health = health;
        record.weight = Some(weight);
        let mut has_own_weight = false;
        if let Some(text) = facts.weight {
            match RawWeight::parse(text) {
                Ok(share) => {
                    // A warning may set the weight to zero nevertheless.
                    record.weight = Some(if weight.0 == 0.0 { weight } else { share });
                    has_own_weight = true;
                }
                Err(wrong) => notes.push(format!("{wrong}; Consul's own weight is used")),
            }
        }
        if let (false, Some(default), true) = (has_own_weight, rules.default_weight, weight.0 > 0.0) {
            record.weight = Some(RawWeight(f64::from(default.min(Weight::MAX))));
        }
        let protocol = match facts.protocol {
            Some(text) => {
                let protocol = protocol(text);
                if protocol.is_none() {
                    notes.push(format!("`{text}` is not a protocol that vmesh knows; it is ignored"));
                }
                protocol
            }
            None => facts.secure.then_some(Protocol::Tls),
        };
        let datacenter = node.datacenter.as_deref().filter(|name| !name.is_empty());
        record.zone = facts.zone.or(datacenter).map(Into::into);
        record.version = facts.version.map(Into::into);
        record.labels = facts.labels;
        if let Some(datacenter) = datacenter {
            record.labels.insert("datacenter".into(), datacenter.into());
        }
        if let Some(name) = node.node.as_deref() {
            record.labels.insert("node".into(), name.into());
        }
        let fraction = facts.fraction.filter(|_| !has_own_weight);
        Ok(ConsulInstance { record, protocol, fraction, created })
    }

    fn check_wanted(
        &self,
        kind: &str,
        tags: &[String],
        meta: &BTreeMap<String, String>,
        node_meta: &BTreeMap<String, String>,
    ) -> Result<(), LeftOutReason> {
        let rules = self.rules;
        let is_ordinary = kind.is_empty() || kind == "typical";
        let has = |meta: &BTreeMap<String, String>, wanted: &BTreeMap<String, Pattern>| {
            wanted.iter().all(|(key, pattern)| meta.get(key).is_some_and(|value| pattern.matches(value)))
        };
        let wanted = (is_ordinary || rules.kinds.iter().any(|wanted| wanted == kind))
            && rules.may_want(tags)
            && !rules.exclude_tags.iter().any(|pattern| tags.iter().any(|tag| pattern.matches(tag)))
            && has(meta, &rules.service_meta)
            && has(node_meta, &rules.node_meta);
        if wanted { Ok(()) } else { Err(LeftOutReason::Silently) }
    }

    /// Returns the health of an instance from the checks of its node and its service. As in Consul,
    /// maintenance outweighs critical, critical outweighs a warning, and a warning outweighs passing.
    fn health(
        &self,
        checks: &[HealthCheck],
        weights: Option<&CheckWeights>,
    ) -> Result<(Health, RawWeight), LeftOutReason> {
        let rules = &self.rules.health;
        let passing = RawWeight(f64::from(weights.and_then(|weights| weights.passing).unwrap_or(1).max(1)));
        let warning = RawWeight(f64::from(weights.and_then(|weights| weights.warning).unwrap_or(1)));
        let ignored = |check: &HealthCheck| {
            let named = |name: &Option<String>, pattern: &Pattern| {
                name.as_deref().is_some_and(|name| pattern.matches(name))
            };
            rules.ignore_checks.iter().any(|p| named(&check.id, p) || named(&check.name, p))
        };
        let state = checks.iter().filter(|check| !ignored(check)).map(HealthCheck::state).max();
        Ok(match state {
            // The instance has no checks in Consul, so its health is up to Envoy's own checks.
            None => (Health::Unknown, passing),
            Some(CheckState::Passing) => (Health::Healthy, passing),
            Some(CheckState::Warning) if rules.warning == WarningAction::Drain => (Health::Draining, passing),
            // A weight of zero becomes a drain when the weights are converted.
            Some(CheckState::Warning) => (Health::Healthy, warning),
            Some(CheckState::Critical) if rules.critical == CriticalAction::Drop => {
                return Err(LeftOutReason::Silently);
            }
            Some(CheckState::Critical) => (Health::Unhealthy, passing),
            Some(CheckState::Maintenance) => (Health::Draining, passing),
        })
    }

    fn address(
        &self,
        node: &NodeEntry,
        service: &ServiceEntry,
        facts: &InstanceFacts<'_>,
    ) -> Result<Address, LeftOutReason> {
        let full = |text: Option<&String>| {
            text.map(|text| text.trim()).filter(|text| !text.is_empty()).map(str::to_owned)
        };
        let (own, nodes) = (full(service.address.as_ref()), full(node.address.as_ref()));
        let kind = self.rules.endpoint_address;
        let mut tagged_port = None;
        let host = match kind.tag().filter(|_| !(self.translated && kind.is_wan())) {
            None if kind == AddressKind::Node => nodes,
            None => own.or(nodes),
            Some(tag) => {
                let tagged = service.tagged_addresses.as_ref().and_then(|all| all.get(tag));
                let of_service = tagged.and_then(|tagged| full(tagged.address.as_ref()));
                if of_service.is_some() {
                    tagged_port = tagged.and_then(|tagged| tagged.port).filter(|port| *port != 0);
                }
                let of_node = || full(node.tagged_addresses.as_ref().and_then(|all| all.get(tag)));
                let found = of_service.or_else(|| if own.is_some() { None } else { of_node() });
                match kind {
                    AddressKind::Virtual if found.is_none() => {
                        return Err(LeftOutReason::Unusable("it has no virtual address".to_owned()));
                    }
                    _ => found.or(own).or(nodes),
                }
            }
        };
        let Some(host) = host else {
            return Err(LeftOutReason::Bad("neither the service nor its node has an address".to_owned()));
        };
        let port = match facts.port.map(ToOwned::to_owned).or(tagged_port.map(|port| port.to_string())) {
            Some(port) => Some(port),
            None => self.port(service)?.map(|port| port.to_string()),
        };
        let port = match port {
            Some(port) => vmesh_model::endpoint::parse_port(&port).map_err(LeftOutReason::Bad)?,
            None => {
                let is_socket = service.socket_path.as_deref().is_some_and(|path| !path.is_empty());
                match self.rules.default_port {
                    _ if is_socket => {
                        let why = "it listens on a Unix socket, which only its own host can reach";
                        return Err(LeftOutReason::Unusable(why.to_owned()));
                    }
                    Some(port) => port,
                    None => {
                        let why = "it is registered without a port, and `default_port` is not set";
                        return Err(LeftOutReason::Unusable(why.to_owned()));
                    }
                }
            }
        };
        let host = Host::parse(&host).map_err(LeftOutReason::Bad)?;
        Ok(Address { host, port })
    }

    /// Returns the port of the service; `None` if it has none.
    fn port(&self, service: &ServiceEntry) -> Result<Option<i64>, LeftOutReason> {
        let ports = service.ports.as_deref().unwrap_or_default();
        let given = |port: &NamedPort| port.port.filter(|port| *port != 0);
        if let Some(wanted) = &self.rules.port_name
            && !ports.is_empty()
        {
            let named = ports.iter().find(|port| port.name.as_ref() == Some(wanted));
            return match named.and_then(given) {
                Some(port) => Ok(Some(port)),
                None => Err(LeftOutReason::Unusable(format!("it has no port named `{wanted}`"))),
            };
        }
        if let Some(port) = service.port.filter(|port| *port != 0) {
            return Ok(Some(port));
        }
        let chosen = match ports {
            [] => return Ok(None),
            [only] => Some(only),
            several => several.iter().find(|port| port.default == Some(true)),
        };
        match chosen {
            Some(port) => Ok(given(port)),
            None => Err(LeftOutReason::Unusable(
                "it has several ports and no default port: set `port_name` to choose one".to_owned(),
            )),
        }
    }
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum CheckState {
    Passing,
    Warning,
    Critical,
    Maintenance,
}

impl HealthCheck {
    fn state(&self) -> CheckState {
        let id = self.id.as_deref().unwrap_or_default();
        if id == "_node_maintenance" || id.starts_with("_service_maintenance") {
            return CheckState::Maintenance;
        }
        match self.status.as_deref() {
            Some("passing") => CheckState::Passing,
            Some("warning") => CheckState::Warning,
            Some("maintenance") => CheckState::Maintenance,
            // An unknown status counts as critical.
            _ => CheckState::Critical,
        }
    }
}

#[cfg(test)]
mod tests;
