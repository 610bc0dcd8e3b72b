//! Airbnb SmartStack: the output of synapse's `file_output`, one JSON list per service.
//!
//! ```json
//! [{"name": "web1", "host": "10.1.0.4", "port": 8080, "id": 3, "weight": 10, "labels": {"az": "a1"}}]
//! ```
//!
//! Unknown fields are ignored, since other projects define the format and may extend it.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;
use vmesh_model::strict::read;
use vmesh_model::yaml::Node;
use vmesh_model::{Address, Health, Host, Labels, Problem};

use super::{FileFailure, Input, ParseResult, RawWeight, Record, named_by_file, subject_of};

/// The default weight in a list in which other instances have weights; readers of synapse use the same.
const DEFAULT_WEIGHT: f64 = 10.0;

#[derive(Deserialize)]
struct SynapseInstance {
    host: String,
    /// A number or a text: nerve copies the port from its configuration.
    port: String,
    weight: Option<String>,
    labels: Option<BTreeMap<Arc<str>, Option<String>>>,
    disabled: Option<bool>,
    haproxy_server_options: Option<String>,
}

/// Reports whether an instance is registered with HAProxy's option `disabled`, so that it gets no traffic.
pub(super) fn is_disabled(haproxy_server_options: &str) -> bool {
    haproxy_server_options.split_whitespace().any(|option| option == "disabled")
}

pub fn parse(input: &Input<'_>) -> ParseResult {
    let service = match named_by_file(input) {
        Ok(service) => service,
        Err(problem) => return ParseResult::failed(FileFailure::MisnamedFile, vec![problem]),
    };
    let subject = subject_of(&service.name);
    let mut parsed = ParseResult::default();
    let roots = match input.roots() {
        Ok(roots) => roots,
        Err(nothing) if nothing.says_nothing => {
            parsed.add_service(service, Vec::new(), 0, DEFAULT_WEIGHT);
            return parsed;
        }
        Err(failed) => return failed,
    };
    let (mut records, mut bad) = (Vec::new(), 0);
    for root in &roots {
        let Some(items) = root.items() else {
            let message = format!("expected a list of instances (`host`, `port`), found {}", root.describe());
            return ParseResult::unusable(vec![Problem::new(
                root.place(input.file),
                input.file.clone(),
                message,
            )]);
        };
        for item in items {
            match read_instance(item, input, &subject, &mut parsed) {
                Some(record) => records.push(record),
                None => bad += 1,
            }
        }
    }
    let default = if records.iter().any(|record| record.weight.is_some()) { DEFAULT_WEIGHT } else { 1.0 };
    parsed.add_service(service, records, bad, default);
    parsed.finish()
}

/// Reads one instance. Records the problems and returns `None` if the instance is a bad record.
fn read_instance(
    item: &Node,
    input: &Input<'_>,
    subject: &Arc<str>,
    parsed: &mut ParseResult,
) -> Option<Record> {
    let instance = match read(input.file, subject, item, None) {
        Ok(instance) => instance,
        Err(problems) => {
            let mut problems = problems.into_iter();
            if let Some(first) = problems.next() {
                parsed.add_bad_record(first.place, subject, first.message);
            }
            parsed.problems.extend(problems);
            return None;
        }
    };
    let SynapseInstance { host, port, weight, labels, disabled, haproxy_server_options } = instance;
    // A `null` value is ignored, since synapse itself writes it.
    let given = labels.unwrap_or_default().into_iter();
    let mut labels: Labels = given.filter_map(|(name, value)| Some((name, value?.into()))).collect();
    let weight = weight.and_then(|text| match RawWeight::parse(&text) {
        Ok(share) => Some(share),
        Err(wrong) => {
            let place = item.find(input.file, &["weight".into()]);
            parsed.add_problem(place, subject.clone(), format!("{wrong}; it is ignored"));
            None
        }
    });
    let is_disabled = disabled == Some(true) || haproxy_server_options.as_deref().is_some_and(is_disabled);
    let address = vmesh_model::endpoint::parse_port(&port)
        .map_err(|wrong| ("port", wrong))
        .and_then(|port| Ok(Address { host: Host::parse(&host).map_err(|wrong| ("host", wrong))?, port }));
    match address {
        Ok(address) => Some(Record {
            weight,
            health: if is_disabled { Health::Draining } else { Health::Unknown },
            zone: labels.remove("az").or_else(|| labels.remove("zone")),
            version: labels.remove("version"),
            labels,
            ..Record::new(address, item.place(input.file))
        }),
        Err((field, wrong)) => {
            parsed.add_bad_record(item.find(input.file, &[field.into()]), subject, wrong);
            None
        }
    }
}
