//! The formats of discovery files: one module per format, each a pure function from text to services.
//!
//! | module | written by | content of a file |
//! |---|---|---|
//! | [`native`] | people, Ansible | one service, a list of services, or several YAML documents |
//! | [`prometheus`] | generators for `file_sd_configs` | groups of targets, named by a label |
//! | [`linkerd`] | Linkerd 1.x `io.l5d.fs`, Pinterest's kingpin | one service: a line for each endpoint |
//! | [`smartstack`] | Airbnb's synapse (`file_output`) | one service: a JSON list |
//!
//! A bad record is left out alone. If too many records of a service are bad, its good records are used but no
//! endpoint is removed, because the missing endpoints are probably among the bad records. Only a text that
//! violates the syntax of its format (half written, for example) makes the whole file unusable.

pub mod consul;
pub mod linkerd;
pub mod native;
pub mod prometheus;
pub mod smartstack;
pub mod znode;

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU16;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{self, Deserializer};
use vmesh_model::yaml::{self, Node};
use vmesh_model::{Address, Health, Labels, Place, Problem, Protocol, ServiceName, Weight};

/// The format of the files of a source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The format is detected from the content of each file.
    #[default]
    Auto,
    Native,
    Prometheus,
    Linkerd,
    SmartStack,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Auto => "auto",
            Format::Native => "native",
            Format::Prometheus => "prometheus",
            Format::Linkerd => "linkerd",
            Format::SmartStack => "smartstack",
        })
    }
}

/// A file to be parsed.
#[derive(Debug)]
pub struct Input<'a> {
    /// The name of the file, for places.
    pub file: &'a Arc<str>,
    /// The name of the service if the text does not state one: the name of the file.
    pub name: &'a str,
    pub text: &'a str,
    /// The extension of the file is one of YAML or JSON, so it is no list of lines.
    pub is_yaml: bool,
    /// The text parsed as YAML, at most once.
    documents: OnceCell<Vec<yaml::Document>>,
}

impl<'a> Input<'a> {
    pub fn new(file: &'a Arc<str>, name: &'a str, text: &'a str, is_yaml: bool) -> Self {
        Input { file, name, text, is_yaml, documents: OnceCell::new() }
    }

    fn documents(&self) -> &[yaml::Document] {
        self.documents.get_or_init(|| yaml::parse(self.file, self.file, self.text))
    }

    /// Returns a problem if the text has several JSON values, one per line. The YAML parser would report a
    /// misleading one.
    fn second_json_value(&self) -> Option<Problem> {
        let mut lines = (1..).zip(self.text.lines()).filter(|(_, line)| !line.trim().is_empty());
        let is_value =
            |line: &str| line.starts_with('{') && serde_json::from_str::<de::IgnoredAny>(line).is_ok();
        let (_, first) = lines.next()?;
        let (number, second) = lines.next()?;
        (is_value(first) && is_value(second)).then(|| {
            let message = "a second JSON value: a file has one, so put them in a list, `[{..}, {..}]`";
            Problem::new(Place::at(self.file.clone(), number, 1), self.file.clone(), message)
        })
    }

    /// Returns the values of the text, or the failure if it has no usable one.
    fn roots(&self) -> Result<Vec<Arc<Node>>, ParseResult> {
        let problems: Vec<_> = self.documents().iter().flat_map(|d| d.problems.iter().cloned()).collect();
        if !problems.is_empty() {
            return Err(ParseResult::unusable(match self.second_json_value() {
                Some(problem) => vec![problem],
                None => problems,
            }));
        }
        let roots: Vec<_> = self.documents().iter().filter_map(|document| document.root.clone()).collect();
        if roots.iter().all(|root| root.items().is_some_and(<[_]>::is_empty)) {
            return Err(empty_file(self));
        }
        Ok(roots)
    }
}

/// The reason why a file is unusable as a whole. In each case the last good state of the file stays. They
/// differ for a control plane that has never read the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileFailure {
    /// The text violates the syntax of its format, for example because it is half written: its content is
    /// unknown.
    NotRead,
    /// The text is readable, but it contains only invalid service names.
    Misnamed,
    /// The text is readable, but the name of the file, which names its service, is no valid service name: the
    /// file never had a service.
    MisnamedFile,
}

/// The parsed content of a file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ParseResult {
    /// The services; each name occurs once.
    pub services: Vec<ParsedService>,
    /// Services that the file names without anything usable about them; they keep their last good state.
    pub unreadable: Vec<ServiceName>,
    pub problems: Vec<Problem>,
    /// The reason why the file is unusable as a whole; `problems` has details.
    pub failure: Option<FileFailure>,
    /// The file states explicitly that there is nothing: `[]`, or only comments.
    pub says_nothing: bool,
    /// The file has an entry that may be a service but has no readable name. This entry may describe any
    /// service that the file does not list otherwise.
    pub has_unnamed: bool,
    /// The number of bad records.
    bad: usize,
    /// The problems of the bad records.
    left_out: Vec<Problem>,
}

/// A service as its format describes it, before host names are resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedService {
    pub name: ServiceName,
    pub protocol: Option<Protocol>,
    pub port: Option<NonZeroU16>,
    /// The endpoints; each address occurs once.
    pub endpoints: Vec<ParsedEndpoint>,
    pub place: Place,
    /// The reason why the service may have endpoints that could not be read.
    pub partial_because: Option<Arc<str>>,
    /// Other files may have further endpoints of the service, as with a job of Prometheus.
    pub is_shared: bool,
}

impl ParsedService {
    fn new(name: ServiceName, place: Place) -> ParsedService {
        ParsedService {
            name,
            protocol: None,
            port: None,
            endpoints: Vec::new(),
            place,
            partial_because: None,
            is_shared: false,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedEndpoint {
    pub address: Address,
    pub weight: Weight,
    pub health: Health,
    pub zone: Option<Arc<str>>,
    pub version: Option<Arc<str>>,
    pub labels: Labels,
    pub place: Place,
}

/// An endpoint as it is written: its weight is still on the scale of the format.
#[derive(Debug, Clone, PartialEq)]
struct Record {
    address: Address,
    weight: Option<RawWeight>,
    health: Health,
    zone: Option<Arc<str>>,
    version: Option<Arc<str>>,
    labels: Labels,
    place: Place,
    /// A problem of a field that is ignored, while the record is used.
    note: Option<String>,
}

impl Record {
    fn new(address: Address, place: Place) -> Record {
        Record {
            address,
            weight: None,
            health: Health::Unknown,
            zone: None,
            version: None,
            labels: Labels::new(),
            place,
            note: None,
        }
    }
}

/// A weight on the scale of its format, such as `2`, `0.5`, or `0` for a drain.
#[derive(Debug, Clone, Copy, PartialEq)]
struct RawWeight(f64);

impl RawWeight {
    fn parse(text: &str) -> Result<RawWeight, String> {
        let wrong = || format!("`{}` is not a weight: a number from 0 to {}", yaml::short(text), Weight::MAX);
        // The standard library also parses `inf`, `nan` and `1e3`, which are hardly meant as weights.
        if !text.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
            return Err(wrong());
        }
        let share = text.parse::<f64>().map_err(|_| wrong())?;
        if share <= f64::from(Weight::MAX) { Ok(RawWeight(share)) } else { Err(wrong()) }
    }
}

impl<'de> Deserialize<'de> for RawWeight {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        RawWeight::parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

/// Converts the weights of one service. Weights are relative within a service, so each service has its own
/// scale: whole numbers stay as they are, and otherwise all are multiplied by a power of ten, at least 100,
/// that makes them whole. `default` is the weight of records without one. A positive weight never becomes
/// zero.
fn convert_weights(records: &[Record], default: f64) -> impl Iterator<Item = (Weight, Health)> {
    let share = move |record: &Record| record.weight.map_or(default, |share| share.0);
    let scale = scale(records.iter().map(share));
    records.iter().map(move |record| {
        let share = share(record);
        if share == 0.0 {
            return (Weight::ONE, Health::Draining);
        }
        (whole_weight(share * scale), record.health)
    })
}

/// Returns the factor that makes `shares` whole numbers, as far as the largest weight allows.
fn scale(shares: impl Iterator<Item = f64> + Clone) -> f64 {
    const SCALES: [f64; 5] = [100.0, 1_000.0, 10_000.0, 100_000.0, 1_000_000.0];
    let largest = shares.clone().fold(0.0, f64::max);
    if shares.clone().all(|share| share.fract() == 0.0) {
        return 1.0;
    }
    let is_whole = |scaled: f64| (scaled - scaled.round()).abs() < 1e-6 && scaled.round() >= 1.0;
    let mut fits = SCALES.into_iter().filter(|scale| largest * scale <= f64::from(Weight::MAX));
    let exact =
        fits.clone().find(|scale| shares.clone().all(|share| share == 0.0 || is_whole(share * scale)));
    exact.or(fits.next_back()).unwrap_or(1.0)
}

fn whole_weight(scaled: f64) -> Weight {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 1..=1,000,000")]
    let weight = Weight::new(scaled.round().clamp(1.0, f64::from(Weight::MAX)) as u32);
    weight.unwrap_or_default()
}

/// Converts the records of one service to endpoints, with weights on one scale.
fn to_endpoints(records: Vec<Record>, default: f64) -> Vec<ParsedEndpoint> {
    let weights: Vec<_> = convert_weights(&records, default).collect();
    let endpoint = |(record, (weight, health)): (Record, _)| ParsedEndpoint {
        address: record.address,
        weight,
        health,
        zone: record.zone,
        version: record.version,
        labels: record.labels,
        place: record.place,
    };
    records.into_iter().zip(weights).map(endpoint).collect()
}

impl ParseResult {
    /// Returns the result for a file whose text violates its format.
    pub(crate) fn unusable(problems: Vec<Problem>) -> ParseResult {
        ParseResult::failed(FileFailure::NotRead, problems)
    }

    fn failed(failure: FileFailure, problems: Vec<Problem>) -> ParseResult {
        ParseResult { problems, failure: Some(failure), ..ParseResult::default() }
    }

    /// Reports whether the file is unusable as a whole.
    pub fn has_failed(&self) -> bool {
        self.failure.is_some()
    }

    /// Replaces each problem by the result of `redacted`.
    pub(crate) fn redact(&mut self, redacted: fn(Problem) -> Problem) {
        self.problems = std::mem::take(&mut self.problems).into_iter().map(redacted).collect();
        self.problems.sort();
        self.problems.dedup();
    }

    /// Returns the number of records that were left out.
    pub(crate) fn bad_records(&self) -> u64 {
        self.bad as u64
    }

    fn add_problem(&mut self, place: Place, subject: impl Into<Arc<str>>, message: impl Into<String>) {
        self.problems.push(Problem::new(place, subject, message));
    }

    /// Records that a record is left out, with the reason.
    fn add_bad_record(&mut self, place: Place, subject: &Arc<str>, why: impl Into<String>) {
        self.left_out.push(Problem::new(place, subject.clone(), why));
    }

    /// Adds a service with its good records. `bad` is the number of records that were left out. If all
    /// records are bad, the service is unreadable rather than empty.
    fn add_service(
        &mut self,
        mut service: ParsedService,
        mut records: Vec<Record>,
        bad: usize,
        default_weight: f64,
    ) {
        self.bad += bad;
        if records.is_empty() && bad > 0 {
            self.unreadable.push(service.name);
            return;
        }
        let count = records.len() + bad;
        if too_many_bad(bad, count) {
            service.partial_because = Some(partial_reason(bad, count).into());
        }
        let subject = subject_of(&service.name);
        let mut last: BTreeMap<Address, usize> = BTreeMap::new();
        for (index, record) in records.iter().enumerate() {
            if let Some(earlier) = last.insert(record.address.clone(), index)
                && let Some(earlier) = records.get(earlier)
            {
                let line = earlier.place.line;
                let message =
                    format!("`{}` is also in line {line}: this one, the last, counts", record.address);
                self.add_problem(record.place.clone(), subject.clone(), message);
            }
        }
        let mut index = 0;
        records.retain(|record| {
            index += 1;
            last.get(&record.address) == Some(&(index - 1))
        });
        service.endpoints = to_endpoints(records, default_weight);
        self.services.push(service);
    }

    /// Completes the problem of each bad record with its effect.
    fn finish(mut self) -> ParseResult {
        if self.has_failed() {
            self.services.clear();
            self.unreadable.clear();
        }
        let has_failed = self.has_failed();
        let unreadable: Vec<_> = self.unreadable.iter().map(subject_of).collect();
        for problem in std::mem::take(&mut self.left_out) {
            let costs_more = has_failed || unreadable.contains(&problem.subject);
            let outcome = "this endpoint is left out";
            self.problems.push(if costs_more { problem } else { problem.with_outcome(outcome) });
        }
        self.problems.sort();
        self.problems.dedup();
        self
    }
}

/// Reports whether so many records of a service are bad that its missing endpoints are probably among them.
pub(crate) fn too_many_bad(bad: usize, records: usize) -> bool {
    bad > 0 && (bad == records || (records >= 5 && bad * 4 > records))
}

/// Returns the reason for a service with too many bad records.
fn partial_reason(bad: usize, records: usize) -> String {
    format!("{bad} of {records} records are bad, which is more than single mistakes")
}

pub(crate) fn subject_of(service: &ServiceName) -> Arc<str> {
    format!("service `{service}`").into()
}

/// Returns an empty service named after its file.
fn named_by_file(input: &Input<'_>) -> Result<ParsedService, Problem> {
    let place = Place::file(input.file.clone());
    match input.name.parse() {
        Ok(name) => Ok(ParsedService::new(name, place)),
        Err(wrong) => Err(Problem::new(
            place,
            input.file.clone(),
            format!("the file's name names its service, and {wrong}"),
        )),
    }
}

/// Parses `bytes` as `format`. `sticky` is the format that [`Format::Auto`] detected in this file before. A
/// truncated text can look like another format, so the format changes only if the text is free of problems in
/// the new one.
pub fn parse(
    file: &Arc<str>,
    name: &str,
    is_yaml: bool,
    bytes: &[u8],
    limit: usize,
    format: Format,
    sticky: Option<Format>,
) -> (ParseResult, Option<Format>) {
    let text = match yaml::decode_text(file, file, bytes, limit) {
        Ok(text) => text,
        Err(problem) => return (ParseResult::unusable(vec![problem]), sticky),
    };
    let input = Input::new(file, name, text, is_yaml);
    if format != Format::Auto {
        return (parse_as(format, &input), Some(format));
    }
    let Some(detected) = detect(&input) else {
        return (empty_file(&input), sticky);
    };
    let parsed = parse_as(sticky.unwrap_or(detected), &input);
    match sticky {
        Some(before) if before != detected && parsed.has_failed() => {
            let other = parse_as(detected, &input);
            if other.problems.is_empty() { (other, Some(detected)) } else { (parsed, sticky) }
        }
        Some(_) => (parsed, sticky),
        None => (parsed, Some(detected)),
    }
}

fn parse_as(format: Format, input: &Input<'_>) -> ParseResult {
    match format {
        Format::Auto | Format::Native => native::parse(input),
        Format::Prometheus => prometheus::parse(input),
        Format::Linkerd => linkerd::parse(input),
        Format::SmartStack => smartstack::parse(input),
    }
}

/// Detects the format from the content; `None` if the file is empty.
fn detect(input: &Input<'_>) -> Option<Format> {
    if !input.is_yaml && linkerd::looks_like(input.text) {
        return Some(Format::Linkerd);
    }
    let Some(first) = input.documents().first() else {
        // A list of lines without an endpoint is a service without endpoints: no other format has no file
        // extension.
        return (!input.is_yaml && has_comment(input.text)).then_some(Format::Linkerd);
    };
    let Some(root) = &first.root else { return Some(Format::Native) };
    // A Prometheus group without the list around it, or with a mistake, is still parsed as one, for a better
    // message.
    let is_group = |node: &Node| {
        let has = |key: &str| node.get(key).is_some();
        let is_native = ["endpoints", "service", "address"].iter().any(|key| has(key));
        has("targets") || (has("labels") && !is_native && !has("host"))
    };
    let Some(items) = root.items() else {
        return Some(if is_group(root) { Format::Prometheus } else { Format::Native });
    };
    let item = items.first()?;
    let has = |key: &str| item.get(key).is_some();
    Some(if is_group(item) {
        Format::Prometheus
    } else if has("host") && has("port") && !has("endpoints") {
        Format::SmartStack
    } else {
        Format::Native
    })
}

fn has_comment(text: &str) -> bool {
    text.lines().any(|line| line.trim_start().starts_with('#'))
}

/// Returns the result for a file without a value. `[]` or a comment states explicitly that there is nothing;
/// an empty file is an error.
fn empty_file(input: &Input<'_>) -> ParseResult {
    if has_comment(input.text) || input.text.contains('[') {
        return ParseResult { says_nothing: true, ..ParseResult::default() };
    }
    let place = Place::file(input.file.clone());
    let message = "the file is empty: if it has no service on purpose, write `[]` or a comment";
    ParseResult::unusable(vec![Problem::new(place, input.file.clone(), message)])
}

#[cfg(test)]
mod tests;
