//! Prometheus `file_sd`: groups of targets with labels. Many fleets generate such files already.
//!
//! ```yaml
//! - targets: ['10.1.0.4:8080', '10.1.0.5:8080']
//!   labels: {service: pay, zone: dc1-a, version: v3}
//! ```
//!
//! Prometheus does not define a meaning of labels. vmesh interprets `service` or `job`, `zone` or `az`,
//! `version`, `weight`, and `protocol` or `__scheme__`. Other labels become labels of the endpoint, except
//! those that begin with `__`.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;
use vmesh_model::strict::read;
use vmesh_model::yaml::{Node, short};
use vmesh_model::{Labels, Place, Problem, ServiceName};

use super::consul::protocol as protocol_of;
use super::{FileFailure, Input, ParseResult, ParsedService, RawWeight, Record, named_by_file, subject_of};

/// A group with the fields that Prometheus itself accepts.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TargetGroup {
    /// A `null` value is ignored, as Prometheus does.
    targets: Option<Vec<Option<String>>>,
    labels: Option<BTreeMap<Arc<str>, Option<Arc<str>>>>,
}

/// A service that is merged from several groups.
struct ServiceBuilder {
    service: ParsedService,
    records: Vec<Record>,
    bad: usize,
}

pub fn parse(input: &Input<'_>) -> ParseResult {
    let roots = match input.roots() {
        Ok(roots) => roots,
        Err(parsed) => return parsed,
    };
    let mut parsed = ParseResult::default();
    let mut services: BTreeMap<ServiceName, ServiceBuilder> = BTreeMap::new();
    let mut is_misnamed = true;
    for root in &roots {
        let Some(groups) = root.items() else {
            let message = match root.entries() {
                Some(_) => "a file of Prometheus is a list of groups: write `- targets: ..`, or \
                            `[{\"targets\": ..}]`"
                    .to_owned(),
                None => format!("expected a list of groups (`targets`, `labels`), found {}", root.describe()),
            };
            return ParseResult::unusable(vec![Problem::new(
                root.place(input.file),
                input.file.clone(),
                message,
            )]);
        };
        for group in groups {
            if let Err((why, problems)) = read_group(group, input, &mut services, &mut parsed) {
                // The service of this group is as uncertain as the rest of the group.
                parsed.problems.extend(problems);
                parsed.has_unnamed = true;
                is_misnamed &= why == FileFailure::MisnamedFile;
            }
        }
    }
    for ServiceBuilder { service, records, bad } in services.into_values() {
        parsed.add_service(service, records, bad, 1.0);
    }
    if parsed.has_unnamed && parsed.services.is_empty() && parsed.unreadable.is_empty() {
        // No entry is a group.
        parsed.failure = Some(if is_misnamed { FileFailure::MisnamedFile } else { FileFailure::NotRead });
    }
    parsed.finish()
}

fn read_group(
    node: &Node,
    input: &Input<'_>,
    services: &mut BTreeMap<ServiceName, ServiceBuilder>,
    parsed: &mut ParseResult,
) -> Result<(), (FileFailure, Vec<Problem>)> {
    if node.is_null() {
        return Ok(());
    }
    let TargetGroup { targets, labels } =
        read(input.file, input.file, node, None).map_err(|problems| (FileFailure::NotRead, problems))?;
    let given = labels.unwrap_or_default().into_iter();
    let mut labels: Labels = given.filter_map(|(name, value)| Some((name, value?))).collect();
    let Some(service) = group_service(node, input, &mut labels, parsed)? else { return Ok(()) };
    let subject = subject_of(&service.name);
    let building = services.entry(service.name.clone()).or_insert_with(|| ServiceBuilder {
        service,
        records: Vec::new(),
        bad: 0,
    });
    read_protocol(node, input, &mut labels, &mut building.service, parsed);
    let zone = take(&mut labels, &["zone", "az"]).map(|(_, zone)| zone);
    let version = take(&mut labels, &["version"]).map(|(_, version)| version);
    let mut weight = None;
    if let Some((key, text)) = take(&mut labels, &["weight"]) {
        match RawWeight::parse(&text) {
            Ok(share) => weight = Some(share),
            Err(wrong) => {
                let place = place_of_label(node, input, key);
                parsed.add_problem(place, subject.clone(), format!("{wrong}; it is ignored"));
            }
        }
    }
    labels.retain(|name, _| !name.starts_with("__"));

    for (index, target) in targets.iter().flatten().enumerate() {
        let Some(target) = target else { continue };
        let place = node.find(input.file, &["targets".into(), index.into()]);
        match target.parse() {
            Ok(address) => building.records.push(Record {
                weight,
                zone: zone.clone(),
                version: version.clone(),
                labels: labels.clone(),
                ..Record::new(address, place)
            }),
            Err(wrong) => {
                building.bad += 1;
                parsed.add_bad_record(place, &subject, wrong);
            }
        }
    }
    Ok(())
}

fn place_of_label(node: &Node, input: &Input<'_>, name: &str) -> Place {
    node.find(input.file, &["labels".into(), name.into()])
}

/// Returns the service of a group, or `None` if its name is invalid.
fn group_service(
    node: &Node,
    input: &Input<'_>,
    labels: &mut Labels,
    parsed: &mut ParseResult,
) -> Result<Option<ParsedService>, (FileFailure, Vec<Problem>)> {
    let place = node.place(input.file);
    let service = match take(labels, &["service", "job"]) {
        Some((key, name)) => match name.parse() {
            Ok(name) => ParsedService::new(name, place),
            Err(wrong) => {
                // An invalid name was never that of a service, so no other service is in doubt.
                let message =
                    format!("the label `{key}` names the service, and {wrong}; this group is left out");
                parsed.add_problem(place_of_label(node, input, key), input.file.clone(), message);
                return Ok(None);
            }
        },
        None => {
            let named = named_by_file(input).map_err(|problem| (FileFailure::MisnamedFile, vec![problem]))?;
            ParsedService { place, ..named }
        }
    };
    Ok(Some(ParsedService { is_shared: true, ..service }))
}

/// Takes the protocol of a group for its service. The first group with a protocol decides.
fn read_protocol(
    node: &Node,
    input: &Input<'_>,
    labels: &mut Labels,
    service: &mut ParsedService,
    parsed: &mut ParseResult,
) {
    // An instance that is scraped by https speaks TLS to every caller.
    let Some((key, text)) = take(labels, &["protocol", "__scheme__"]) else { return };
    let protocol = protocol_of(&text);
    let subject = subject_of(&service.name);
    match (service.protocol, protocol) {
        (_, None) => {
            let message = format!("`{}` is not a protocol that vmesh knows; it is ignored", short(&text));
            parsed.add_problem(place_of_label(node, input, key), subject, message);
        }
        (None, given) => service.protocol = given,
        (Some(first), Some(other)) if first != other => {
            let line = service.place.line;
            let message = format!("{other} here and {first} in line {line}: the first is used");
            parsed.add_problem(node.place(input.file), subject, message);
        }
        _ => {}
    }
}

/// Removes all of `names` from `labels`, since they mean the same, and returns the first one that is present.
fn take<'a>(labels: &mut Labels, names: &[&'a str]) -> Option<(&'a str, Arc<str>)> {
    let mut found = None;
    for name in names {
        if let Some(value) = labels.remove(*name)
            && found.is_none()
            && !value.is_empty()
        {
            found = Some((*name, value));
        }
    }
    found
}
