//! The native format: one service, a list of services, or several YAML documents of either.
//!
//! ```yaml
//! service: orders           # default: the file's name
//! protocol: http
//! port: 80
//! endpoints:
//!   - 10.0.1.11:8080
//!   - {address: "10.0.1.12:8080", zone: eu-1a, version: v2, weight: 2, health: draining, labels: {rack: r7}}
//! ```
//!
//! The parser is strict: these files are written for vmesh, so an unknown field is a spelling mistake.

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny};
use vmesh_model::strict::read;
use vmesh_model::yaml::Node;
use vmesh_model::{Address, Health, Labels, Place, Problem, Protocol, ServiceName};

use super::{FileFailure, Input, ParseResult, ParsedService, RawWeight, Record, subject_of};

/// The fields of a service except its endpoints, which are parsed one by one.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServiceHead {
    service: Option<ServiceName>,
    protocol: Option<Protocol>,
    #[serde(default, deserialize_with = "port")]
    port: Option<NonZeroU16>,
    #[serde(rename = "endpoints")]
    _endpoints: IgnoredAny,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NativeEndpoint {
    address: NativeAddress,
    zone: Option<Arc<str>>,
    version: Option<Arc<str>>,
    weight: Option<RawWeight>,
    #[serde(default)]
    health: Health,
    #[serde(default)]
    labels: Labels,
}

/// Deserializes a port such as `8080`; the error names the valid range.
fn port<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<NonZeroU16>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    text.map(|text| vmesh_model::endpoint::parse_port(&text).map_err(de::Error::custom)).transpose()
}

struct NativeAddress(Address);

impl<'de> Deserialize<'de> for NativeAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map(NativeAddress).map_err(de::Error::custom)
    }
}

pub fn parse(input: &Input<'_>) -> ParseResult {
    let roots = match input.roots() {
        Ok(roots) => roots,
        Err(parsed) => return parsed,
    };
    let services: Vec<&Node> = roots
        .iter()
        .flat_map(|root| root.items().unwrap_or(std::slice::from_ref(root)))
        .map(|node| &**node)
        .collect();
    parse_nodes(input, &services, services.len() > 1)
}

/// Parses the services in `nodes`. If `several` is set, each has to state its name.
pub(crate) fn parse_nodes(input: &Input<'_>, nodes: &[&Node], several: bool) -> ParseResult {
    let mut parsed = ParseResult::default();
    let mut first_places: BTreeMap<ServiceName, Place> = BTreeMap::new();
    let mut unnamed = Vec::new();
    for node in nodes {
        let place = node.place(input.file);
        let name = match name_of(node, input, several) {
            Ok(name) => name,
            Err((why, problem)) => {
                // The name of this service is unknown, so it may be any service that the file does not list.
                parsed.problems.push(problem);
                parsed.has_unnamed = true;
                unnamed.push(why);
                continue;
            }
        };
        if let Some(first) = first_places.get(&name) {
            let message =
                format!("a second service `{name}`: only the first one counts, in line {}", first.line);
            parsed.add_problem(place, subject_of(&name), message);
            continue;
        }
        first_places.insert(name.clone(), place.clone());
        if let Err(problems) = service(node, &name, input, &mut parsed) {
            parsed.problems.extend(problems);
            parsed.unreadable.push(name);
        }
    }
    if parsed.has_unnamed && parsed.services.is_empty() && parsed.unreadable.is_empty() {
        // No entry is a service.
        let is_misnamed = unnamed.iter().all(|why| *why != FileFailure::NotRead);
        parsed.failure = if is_misnamed { unnamed.pop() } else { Some(FileFailure::NotRead) };
    }
    parsed.finish()
}

/// Returns the name of a service. It is parsed leniently, so that a service with mistakes is still known by
/// its name.
fn name_of(node: &Node, input: &Input<'_>, several: bool) -> Result<ServiceName, (FileFailure, Problem)> {
    let refuse = |why, place, message: String| (why, Problem::new(place, input.file.clone(), message));
    let place = node.place(input.file);
    if node.entries().is_none() {
        let message = format!("expected a service, a mapping with `endpoints`, found {}", node.describe());
        return Err(refuse(FileFailure::NotRead, place, message));
    }
    match node.get("service") {
        Some(given) => given.text().unwrap_or_default().parse().map_err(|wrong| {
            refuse(FileFailure::Misnamed, given.place(input.file), format!("`service`: {wrong}"))
        }),
        None if several => {
            let message = "`service` is missing: in a file of several services each needs its name";
            Err(refuse(FileFailure::Misnamed, place, message.to_owned()))
        }
        None => input.name.parse().map_err(|wrong| {
            let message =
                format!("`service` is missing, and the name of the file cannot replace it: {wrong}");
            refuse(FileFailure::MisnamedFile, place, message)
        }),
    }
}

fn service(
    node: &Node,
    name: &ServiceName,
    input: &Input<'_>,
    parsed: &mut ParseResult,
) -> Result<(), Vec<Problem>> {
    let subject = subject_of(name);
    let head: ServiceHead = read(input.file, &subject, node, None)?;
    let place = node.place(input.file);
    let list = node.get("endpoints");
    let Some(items) = list.and_then(|list| list.items()) else {
        let (place, found) =
            list.map_or((place, "nothing".to_owned()), |n| (n.place(input.file), n.describe()));
        let message =
            format!("`endpoints`: expected a list, found {found}; a service without endpoints has `[]`");
        return Err(vec![Problem::new(place, subject, message)]);
    };
    let (mut records, mut bad) = (Vec::new(), 0);
    for item in items {
        match endpoint(item, &subject, input.file) {
            Ok(record) => records.push(record),
            Err(problems) => {
                bad += 1;
                // A record with several problems still counts as one bad record.
                let mut problems = problems.into_iter();
                if let Some(first) = problems.next() {
                    parsed.add_bad_record(first.place, &subject, first.message);
                }
                parsed.problems.extend(problems);
            }
        }
    }
    let name = head.service.unwrap_or_else(|| name.clone());
    let service =
        ParsedService { protocol: head.protocol, port: head.port, ..ParsedService::new(name, place) };
    parsed.add_service(service, records, bad, 1.0);
    Ok(())
}

fn endpoint(node: &Node, subject: &Arc<str>, file: &Arc<str>) -> Result<Record, Vec<Problem>> {
    let place = node.place(file);
    let wrong = |message: String| vec![Problem::new(place.clone(), subject.clone(), message)];
    if let Some(text) = node.text().filter(|_| !node.is_null()) {
        let address = text.parse().map_err(wrong)?;
        return Ok(Record::new(address, place));
    }
    if node.entries().is_none() {
        let found = node.describe();
        return Err(wrong(format!(
            "expected an endpoint, `host:port` or a mapping with `address`, found {found}"
        )));
    }
    let NativeEndpoint { address, zone, version, weight, health, labels } = read(file, subject, node, None)?;
    Ok(Record { weight, health, zone, version, labels, ..Record::new(address.0, place) })
}
