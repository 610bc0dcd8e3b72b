//! Consul: the answer of `/v1/health/service/<name>` for one service, from one datacenter or several.
//!
//! The parser is lenient: `null` is ignored, unknown fields are ignored, and both spellings of
//! `TaggedAddresses` are accepted. An invalid entry is left out alone. vmesh judges health itself instead of
//! asking Consul for healthy instances only (`?passing`), since an unhealthy instance has to stay visible to
//! Envoy.

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use vmesh_model::{
    Address, Health, Host, Labels, Place, Problem, Protocol, Registration, ServiceName, Weight,
};

use super::{ParseResult, ParsedService, RawWeight, Record, subject_of};
use crate::consul::config::{
    AddressKind, ConsulConfig, CriticalAction, HealthRules, MetadataKeys, Pattern, TagPattern, WarningAction,
};

/// The part of the configuration that tells how instances are read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct InstanceRules {
    require_tags: Vec<Pattern>,
    exclude_tags: Vec<Pattern>,
    node_meta: BTreeMap<String, Pattern>,
    service_meta: BTreeMap<String, Pattern>,
    kinds: Vec<String>,
    endpoint_address: AddressKind,
    port_name: Option<String>,
    default_port: Option<NonZeroU16>,
    map: MetadataKeys,
    tag_patterns: Vec<TagPattern>,
    default_weight: Option<u32>,
    health: HealthRules,
}

impl InstanceRules {
    pub fn of(config: &ConsulConfig) -> InstanceRules {
        InstanceRules {
            require_tags: config.require_tags.clone(),
            exclude_tags: config.exclude_tags.clone(),
            node_meta: config.node_meta.clone(),
            service_meta: config.service_meta.clone(),
            kinds: config.kinds.clone(),
            endpoint_address: config.endpoint_address,
            port_name: config.port_name.clone(),
            default_port: config.default_port,
            map: config.map.clone(),
            tag_patterns: config.tag_patterns.clone(),
            default_weight: config.default_weight,
            health: config.health.clone(),
        }
    }

    /// Reports whether a service may have a wanted instance. `tags` are the tags of all its instances.
    pub fn may_want(&self, tags: &[String]) -> bool {
        self.require_tags.iter().all(|pattern| tags.iter().any(|tag| pattern.matches(tag)))
    }
}

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

    fn add_note(&self, read: &mut ServiceInstances, who: &str, what: &str) {
        read.notes.push(Problem::new(self.place.clone(), self.subject.clone(), format!("{who}: {what}")));
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
                Err(wrong) => notes.push(format!("{wrong}; Consul's own weight counts")),
            }
        }
        if let (false, Some(default), true) = (has_own_weight, rules.default_weight, weight.0 > 0.0) {
            record.weight = Some(RawWeight(f64::from(default.min(Weight::MAX))));
        }
        let protocol = match facts.protocol {
            Some(text) => {
                let protocol = protocol(text);
                if protocol.is_none() {
                    notes.push(format!("`{text}` is not a protocol that is known here; it is ignored"));
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
                "it has several ports and none of them is the default: `port_name` says which".to_owned(),
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

/// The facts about an instance in its tags and metadata.
#[derive(Default)]
struct InstanceFacts<'a> {
    version: Option<&'a str>,
    zone: Option<&'a str>,
    protocol: Option<&'a str>,
    weight: Option<&'a str>,
    secure: bool,
    fraction: Option<f64>,
    port: Option<&'a str>,
    labels: Labels,
}

impl<'a> InstanceFacts<'a> {
    fn of(
        tags: &'a [String],
        meta: &'a BTreeMap<String, String>,
        node_meta: &'a BTreeMap<String, String>,
        rules: &InstanceRules,
    ) -> InstanceFacts<'a> {
        let map = &rules.map;
        let mut facts = InstanceFacts::default();
        let found = |keys: &[String]| {
            let of = |meta: &'a BTreeMap<String, String>| {
                keys.iter()
                    .find_map(|key| meta.get(key))
                    .map(String::as_str)
                    .filter(|value| !value.is_empty())
            };
            of(meta).or_else(|| of(node_meta))
        };
        facts.version = found(&map.version);
        facts.zone = found(&map.zone);
        facts.protocol = found(&map.protocol);
        facts.weight = found(&map.weight);
        facts.secure = found(&map.secure).is_some_and(|value| value.eq_ignore_ascii_case("true"));
        let mapped = [&map.version, &map.zone, &map.protocol, &map.weight, &map.secure];
        for (key, value) in meta {
            if !mapped.iter().any(|keys| keys.contains(key)) {
                facts.labels.insert(key.as_str().into(), value.as_str().into());
            }
        }
        for tag in tags {
            facts.tag(tag, rules);
        }
        facts
    }

    fn tag(&mut self, tag: &'a str, rules: &InstanceRules) {
        if let Some(route) = tag.strip_prefix("urlprefix-") {
            self.fabio(route);
            return;
        }
        if let Some(label) = tag.strip_prefix("traefik.") {
            self.traefik(label);
            return;
        }
        for pattern in &rules.tag_patterns {
            if let Some(value) = pattern.value(tag) {
                self.set(&pattern.key, value);
                return;
            }
        }
        if let Some((key, value)) = tag.split_once(['=', ':'])
            && !value.is_empty()
            && ["version", "zone", "az", "protocol", "proto", "weight"].contains(&key)
        {
            let key = match key {
                "az" => "zone",
                "proto" => "protocol",
                key => key,
            };
            self.set(key, value);
            return;
        }
        if tag.len() > 1 && tag.starts_with('v') && tag.as_bytes().get(1).is_some_and(u8::is_ascii_digit) {
            self.set("version", tag);
        }
        // Labels have values and tags do not, so the value is `true`.
        self.labels.insert(format!("tag.{tag}").into(), "true".into());
    }

    /// Sets a field unless it is set: metadata and earlier tags take precedence.
    fn set(&mut self, key: &str, value: &'a str) {
        let field = match key {
            "version" => &mut self.version,
            "zone" => &mut self.zone,
            "protocol" => &mut self.protocol,
            "weight" => &mut self.weight,
            label => {
                self.labels.entry(label.into()).or_insert_with(|| value.into());
                return;
            }
        };
        field.get_or_insert(value);
    }

    /// Parses a tag such as `urlprefix-host/path proto=grpc weight=0.3`. The host and path belong to routes
    /// and are ignored here.
    fn fabio(&mut self, route: &'a str) {
        for option in route.split_whitespace().skip(1) {
            match option.split_once('=') {
                Some(("proto", value)) => self.set("protocol", value),
                Some(("weight", value)) => {
                    let fraction = RawWeight::parse(value).ok().map(|share| share.0);
                    self.fraction = self.fraction.or(fraction.filter(|f| *f > 0.0 && *f <= 1.0));
                }
                _ => {}
            }
        }
    }

    /// Parses `traefik.http.services.<name>.loadbalancer.server.scheme=h2c`, and the same with `.port`.
    fn traefik(&mut self, label: &'a str) {
        let Some((key, value)) = label.split_once('=') else { return };
        let key = key.to_ascii_lowercase();
        if !key.contains(".services.") {
            return;
        }
        if key.ends_with(".loadbalancer.server.scheme") {
            self.set("protocol", value);
        } else if key.ends_with(".loadbalancer.server.port") {
            self.port.get_or_insert(value);
        }
    }
}

/// Parses the name of a protocol as fleets write it. HTTP over TLS is passed through as TLS, since its
/// requests are not visible.
pub(super) fn protocol(text: &str) -> Option<Protocol> {
    let text = text.to_ascii_lowercase();
    Some(match text.as_str() {
        "http1" | "http/1.1" | "http1.1" | "ws" => Protocol::Http,
        "h2" | "h2c" | "http/2" => Protocol::Http2,
        "https" | "grpcs" | "ssl" | "wss" => Protocol::Tls,
        "postgresql" => Protocol::Postgres,
        "mongodb" => Protocol::Mongo,
        other => return other.parse().ok(),
    })
}

/// Returns the instances of one datacenter from a persisted registration, in the form of a parsed answer.
pub fn restored_instances(registration: &Registration, datacenter: &str) -> ServiceInstances {
    let of_it = |labels: &Labels| labels.get("datacenter").is_some_and(|name| **name == *datacenter);
    let instances =
        registration.endpoints.iter().filter(|endpoint| of_it(&endpoint.labels)).filter_map(|endpoint| {
            let host = match &endpoint.hostname {
                Some(name) => Host::Name(name.clone()),
                None => Host::Ip(endpoint.address.ip()),
            };
            let address = Address { host, port: NonZeroU16::new(endpoint.address.port())? };
            let record = Record {
                weight: Some(RawWeight(f64::from(endpoint.weight.get()))),
                health: endpoint.health,
                zone: endpoint.zone.clone(),
                version: endpoint.version.clone(),
                labels: endpoint.labels.clone(),
                ..Record::new(address, registration.place.clone())
            };
            Some(ConsulInstance { record, protocol: registration.protocol, fraction: None, created: 0 })
        });
    let instances: Vec<_> = instances.collect();
    ServiceInstances { listed: instances.len(), instances, ..ServiceInstances::default() }
}

/// Merges the instances of all datacenters into one service.
pub fn combine(source: &str, service: &ServiceName, reads: &[&ServiceInstances]) -> ParseResult {
    let place = place(source, service);
    let mut parsed = ParseResult::default();
    let mut instances: BTreeMap<&Address, ConsulInstance> = BTreeMap::new();
    for instance in reads.iter().flat_map(|read| &read.instances) {
        // An endpoint stays while any record of it exists, with the health of its healthiest record: an
        // instance that registers anew after a failure is listed twice for a while. Of two records with equal
        // health the younger one counts.
        let rank = |instance: &ConsulInstance| (health_rank(instance.record.health), instance.created);
        match instances.get_mut(&instance.record.address) {
            Some(known) if rank(known) >= rank(instance) => {}
            Some(known) => *known = instance.clone(),
            None => _ = instances.insert(&instance.record.address, instance.clone()),
        }
    }
    let mut instances: Vec<ConsulInstance> = instances.into_values().collect();
    distribute_shares(&mut instances);
    let (protocol, disagreement) = agreed_protocol(&instances);
    if let Some(disagreement) = disagreement {
        parsed.add_problem(place.clone(), subject_of(service), disagreement);
    }
    let mut bad = 0;
    for read in reads {
        bad += read.bad.len();
        parsed.problems.extend(read.notes.iter().cloned());
        for problem in &read.bad {
            parsed.add_bad_record(problem.place.clone(), &problem.subject, problem.message.clone());
        }
    }
    let head = ParsedService { protocol, ..ParsedService::new(service.clone(), place) };
    let records = instances.into_iter().map(|instance| instance.record).collect();
    parsed.add_service(head, records, bad, 1.0);
    parsed.finish()
}

fn health_rank(health: Health) -> u8 {
    match health {
        Health::Healthy => 3,
        Health::Unknown => 2,
        Health::Draining => 1,
        Health::Unhealthy => 0,
    }
}

/// The limit below which a remaining share is a rounding error.
const NO_SHARE: f64 = 1e-9;

/// Converts Fabio's weights, which are shares of all requests; instances without one get equal parts of the
/// rest.
fn distribute_shares(instances: &mut [ConsulInstance]) {
    let given: f64 = instances.iter().filter_map(|instance| instance.fraction).sum();
    let others = instances.iter().filter(|instance| instance.fraction.is_none()).count();
    if given == 0.0 {
        return;
    }
    #[expect(clippy::cast_precision_loss, reason = "no service has 2^52 endpoints")]
    let rest = (1.0 - given).max(0.0) / others.max(1) as f64;
    for instance in instances {
        let draining = instance.record.weight.is_some_and(|weight| weight.0 == 0.0);
        if !draining {
            let share = instance.fraction.unwrap_or(rest);
            // Whole numbers are not scaled again; a positive share must not become zero.
            let millionths = (share * f64::from(Weight::MAX)).round();
            let is_nothing = share < NO_SHARE;
            instance.record.weight = Some(RawWeight(if is_nothing { 0.0 } else { millionths.max(1.0) }));
        }
    }
}

/// Returns the protocol that most instances state, and a message if others state another one.
fn agreed_protocol(instances: &[ConsulInstance]) -> (Option<Protocol>, Option<String>) {
    let mut counts: BTreeMap<&str, (usize, Protocol)> = BTreeMap::new();
    for protocol in instances.iter().filter_map(|instance| instance.protocol) {
        counts.entry(protocol.as_str()).or_insert((0, protocol)).0 += 1;
    }
    let most = counts.values().max_by_key(|(count, _)| *count).map(|(_, protocol)| *protocol);
    let disagreement = (counts.len() > 1).then(|| {
        let each: Vec<_> = counts.iter().map(|(name, (count, _))| format!("{count} say `{name}`")).collect();
        format!(
            "its instances do not agree on the protocol ({}): `{}` is taken; a `Service` document can say it",
            each.join(", "),
            most.unwrap_or_default()
        )
    });
    (most, disagreement)
}

#[cfg(test)]
mod tests;
