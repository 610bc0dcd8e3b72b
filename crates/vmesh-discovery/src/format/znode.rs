//! The formats of registrations in ZooKeeper: a directory of nodes per service, and an instance in each node.
//!
//! | module | written by | an instance is |
//! |---|---|---|
//! | [`serverset`] | Twitter's and Aurora's ServerSets, Finagle | the JSON in `member_..`; weights in `vector_..` |
//! | [`curator`] | Apache Curator's x-discovery, Spring Cloud, Dubbo 3 by application | the JSON in a node |
//! | [`nerve`] | Airbnb's nerve, Yelp's SmartStack | the JSON in a node, or in its name |
//! | [`dubbo`] | Dubbo 2 by interface | the name of a node below `providers`, a URL |
//! | [`hostport`] | leader elections, Pinterest's kingpin | `host:port`, in a node or in its name |
//!
//! The parsers are lenient: unknown fields are ignored, since other projects define these formats. An invalid
//! record is left out alone; if too many records are invalid, the directory keeps its last good state.

pub mod curator;
pub mod dubbo;
pub mod hostport;
pub mod nerve;
pub mod serverset;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use vmesh_model::endpoint::parse_port;
use vmesh_model::yaml::short;
use vmesh_model::{Address, Health, Host, Labels, Place, Problem, Protocol, ServiceName};

use super::{ParsedService, RawWeight, Record, partial_reason, subject_of, to_endpoints, too_many_bad};

/// The format of the nodes below a root.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ZnodeFormat {
    /// The format is detected: the one that most nodes look like.
    #[default]
    Auto,
    ServerSet,
    Curator,
    Nerve,
    Dubbo,
    HostPort,
}

impl fmt::Display for ZnodeFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ZnodeFormat::Auto => "auto",
            ZnodeFormat::ServerSet => "serverset",
            ZnodeFormat::Curator => "curator",
            ZnodeFormat::Nerve => "nerve",
            ZnodeFormat::Dubbo => "dubbo",
            ZnodeFormat::HostPort => "hostport",
        })
    }
}

/// The unit that forms a service in Dubbo 2.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupBy {
    /// Each application is one service, with all its interfaces.
    #[default]
    Application,
    /// Each interface is one service, separate by group and version.
    Interface,
}

/// The port to use of Curator's two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PreferredPort {
    #[default]
    Port,
    SslPort,
}

/// The dotted paths of fields in a record; the first path that is present counts. Configured paths take
/// precedence over built-in paths.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FieldPaths {
    pub zone: Vec<String>,
    pub version: Vec<String>,
    pub protocol: Vec<String>,
    pub weight: Vec<String>,
}

/// The part of a root's configuration that tells how records are read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RecordRules {
    /// Selects one of several endpoints: a name in ServerSets, a protocol in Dubbo.
    pub endpoint: Option<String>,
    pub group_by: GroupBy,
    pub prefer: PreferredPort,
    pub map: FieldPaths,
}

/// A directory of records.
#[derive(Debug)]
pub struct RecordDirectory<'a> {
    /// The place of the directory in messages, for example `zookeeper:prod/services/pay`.
    pub place: &'a str,
    pub members: Vec<Member<'a>>,
}

/// A node in a directory.
#[derive(Debug, Clone, Copy)]
pub struct Member<'a> {
    pub name: &'a str,
    pub data: &'a [u8],
    /// The node is removed with the session that created it, so its presence shows that the instance is
    /// alive.
    pub is_ephemeral: bool,
    /// The transaction ID of the creation; a greater one is later.
    pub created: i64,
    /// The reason if the node has never been readable.
    pub unreadable: Option<&'a str>,
}

/// The parsed content of a directory.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DirectoryContent {
    offers: Vec<Offer>,
    /// The problems of invalid records, which are left out.
    bad: Vec<Problem>,
    /// Other problems.
    notes: Vec<Problem>,
}

/// One endpoint of one service, from one record.
#[derive(Debug, Clone, PartialEq)]
struct Offer {
    /// The service that the record names; `None` for the service of the directory.
    service: Option<Arc<str>>,
    /// Dubbo only: the interface, and the scheme, which is Dubbo's name of the protocol.
    interface: Option<Arc<str>>,
    scheme: Option<Arc<str>>,
    protocol: Option<Protocol>,
    created: i64,
    record: Record,
}

impl DirectoryContent {
    /// Returns the names of the services; `None` stands for the service of the directory.
    pub fn services(&self) -> BTreeSet<Option<Arc<str>>> {
        self.offers.iter().map(|offer| offer.service.clone()).collect()
    }

    pub fn is_empty(&self) -> bool {
        self.offers.is_empty() && self.bad.is_empty()
    }

    /// Returns the number of invalid records.
    pub fn bad(&self) -> usize {
        self.bad.len()
    }

    /// Returns the reason why the directory may have more endpoints than could be read, if too many records
    /// are invalid.
    pub fn partial_reason(&self) -> Option<String> {
        let (bad, records) = (self.bad.len(), self.bad.len() + self.offers.len());
        too_many_bad(bad, records).then(|| partial_reason(bad, records))
    }

    /// Reports whether the directory has records but no usable one.
    pub fn is_unusable(&self) -> bool {
        self.offers.is_empty() && !self.bad.is_empty()
    }

    /// Reports whether the directory has a usable record.
    pub fn has_offers(&self) -> bool {
        !self.offers.is_empty()
    }

    /// Returns the problems of the records, with `subject` as their subject.
    pub fn problems(&self, subject: &Arc<str>) -> impl Iterator<Item = Problem> {
        let costs_more = self.is_unusable();
        let bad = self.bad.iter().cloned().map(move |problem| {
            if costs_more { problem } else { problem.with_outcome("this endpoint is left out") }
        });
        bad.chain(self.notes.iter().cloned()).map(|problem| Problem { subject: subject.clone(), ..problem })
    }

    fn bad_record(&mut self, place: Place, why: impl Into<String>) {
        self.bad.push(Problem::new(place, "", why));
    }

    fn note(&mut self, place: Place, message: impl Into<String>) {
        self.notes.push(Problem::new(place, "", message));
    }
}

/// Parses a directory.
pub fn read(format: ZnodeFormat, directory: &RecordDirectory<'_>, rules: &RecordRules) -> DirectoryContent {
    let mut read = DirectoryContent::default();
    match format {
        ZnodeFormat::Auto => {}
        ZnodeFormat::ServerSet => serverset::read(directory, rules, &mut read),
        ZnodeFormat::Curator => read_each(directory, rules, &mut read, curator::record),
        ZnodeFormat::Nerve => read_each(directory, rules, &mut read, nerve::record),
        ZnodeFormat::Dubbo => read_each(directory, rules, &mut read, dubbo::record),
        ZnodeFormat::HostPort => hostport::read(directory, &mut read),
    }
    read
}

/// The result of parsing a record. `Ok(None)` stands for a node that is legitimately no record.
type RecordResult = Result<Option<Offer>, String>;

fn read_each(
    directory: &RecordDirectory<'_>,
    rules: &RecordRules,
    read: &mut DirectoryContent,
    record: impl Fn(&Member<'_>, Place, &RecordRules) -> RecordResult,
) {
    for member in &directory.members {
        let place = directory.place_of(member);
        match check_readable(member).and_then(|()| record(member, place.clone(), rules)) {
            Ok(Some(mut offer)) => {
                if let Some(note) = offer.record.note.take() {
                    read.note(place, note);
                }
                read.offers.push(offer);
            }
            Ok(None) => {}
            Err(why) => read.bad_record(place, why),
        }
    }
}

impl RecordDirectory<'_> {
    fn place_of(&self, member: &Member<'_>) -> Place {
        // Names may be as long as URLs.
        Place::file(format!("{}/{}", self.place, short(member.name)))
    }
}

fn check_readable(member: &Member<'_>) -> Result<(), String> {
    match member.unreadable {
        Some(why) => Err(why.to_owned()),
        None => Ok(()),
    }
}

/// Reports whether a node may be a record of this format. A directory of records has at least one such node.
pub fn may_be_record(format: ZnodeFormat, member: &Member<'_>) -> bool {
    let is_json = || first_byte(member.data) == Some(b'{');
    match format {
        ZnodeFormat::Auto => false,
        ZnodeFormat::ServerSet => member.name.starts_with("member_"),
        ZnodeFormat::Curator => member.is_ephemeral || is_json(),
        ZnodeFormat::Nerve => member.is_ephemeral || member.name.starts_with("base64_") || is_json(),
        ZnodeFormat::Dubbo => dubbo::is_url(member.name),
        ZnodeFormat::HostPort => hostport::may_be_record(member),
    }
}

fn first_byte(data: &[u8]) -> Option<u8> {
    data.iter().copied().find(|byte| !byte.is_ascii_whitespace())
}

/// Returns the format that a single node looks like; `None` if it looks like none.
pub fn looks_like(member: &Member<'_>) -> Option<ZnodeFormat> {
    if dubbo::is_url(member.name) {
        return Some(ZnodeFormat::Dubbo);
    }
    if member.name.starts_with("base64_") {
        return Some(ZnodeFormat::Nerve);
    }
    if first_byte(member.data) == Some(b'{') {
        let value: Value = serde_json::from_slice(member.data).ok()?;
        let has = |key: &str| value.get(key).is_some();
        return if has("serviceEndpoint") || has("additionalEndpoints") {
            Some(ZnodeFormat::ServerSet)
        } else if has("serviceType") || has("registrationTimeUTC") || has("uriSpec") {
            Some(ZnodeFormat::Curator)
        } else if has("host") && has("port") {
            Some(ZnodeFormat::Nerve)
        } else {
            None
        };
    }
    hostport::may_be_record(member).then_some(ZnodeFormat::HostPort)
}

/// The number of nodes that look like each format.
pub type FormatVotes = BTreeMap<ZnodeFormat, usize>;

pub fn votes<'a>(members: impl IntoIterator<Item = Member<'a>>) -> FormatVotes {
    let mut votes = FormatVotes::new();
    for format in members.into_iter().filter_map(|member| looks_like(&member)) {
        *votes.entry(format).or_default() += 1;
    }
    votes
}

/// Returns the format that most nodes look like; of two with as many, the more distinctive one. A format
/// decided `before` stays until another has twice as many nodes, so that it does not change with every node
/// where two are mixed.
pub fn decide(votes: &FormatVotes, before: Option<ZnodeFormat>) -> Option<ZnodeFormat> {
    let most = votes.values().max().copied()?;
    let chosen = votes.iter().find(|(_, count)| **count == most).map(|(format, _)| *format);
    match before {
        Some(before) if most < 2 * votes.get(&before).copied().unwrap_or_default() => Some(before),
        _ => chosen,
    }
}

/// Returns the format that most of `members` look like.
pub fn detect<'a>(members: impl IntoIterator<Item = Member<'a>>) -> Option<ZnodeFormat> {
    decide(&votes(members), None)
}

/// Merges directories, each with the name of its service, into the service `name`; `None` if they have no
/// record of it. `place` is the place of the service in messages.
///
/// Of several records with one address the youngest counts: when an instance comes back, its old record stays
/// until its old session ends. An endpoint therefore stays while one of its records exists.
pub fn combine(
    name: &ServiceName,
    place: Place,
    reads: &[(&str, &DirectoryContent)],
    format_weight: f64,
    problems: &mut Vec<Problem>,
) -> Option<ParsedService> {
    let subject = subject_of(name);
    let is_ours = |own: &str, offer: &Offer| offer.service.as_deref().unwrap_or(own) == name.as_str();
    let offers = reads.iter().flat_map(|(own, read)| read.offers.iter().filter(|offer| is_ours(own, offer)));
    let mut offers: Vec<&Offer> = offers.collect();
    let protocol = agreed_protocol(&mut offers, &place, &subject, problems);
    // Later records win. Sorting all of them makes the result independent of the order of directories.
    offers.sort_by(|a, b| (a.created, &a.record.place).cmp(&(b.created, &b.record.place)));
    let mut records: BTreeMap<&Address, Record> = BTreeMap::new();
    let mut interfaces: BTreeMap<&Address, BTreeSet<&Arc<str>>> = BTreeMap::new();
    for offer in offers {
        let address = &offer.record.address;
        let mut record = offer.record.clone();
        if let Some(interface) = &offer.interface {
            interfaces.entry(address).or_default().insert(interface);
            // An instance that no longer offers one interface may still offer others.
            if let Some(before) = records.get(address)
                && record.health == Health::Draining
            {
                record = before.clone();
            }
        }
        records.insert(address, record);
    }
    for (address, interfaces) in interfaces {
        if let Some(record) = records.get_mut(address) {
            record.labels.insert("dubbo.interfaces".into(), format_interfaces(&interfaces).into());
        }
    }
    let records: Vec<Record> = records.into_values().collect();
    if records.is_empty() {
        return None;
    }
    let has_weights = records.iter().any(|record| record.weight.is_some());
    let endpoints = to_endpoints(records, if has_weights { format_weight } else { 1.0 });
    Some(ParsedService { protocol, endpoints, ..ParsedService::new(name.clone(), place) })
}

/// Returns the default weight of a record in a service whose other records have weights.
pub fn default_weight(format: ZnodeFormat) -> f64 {
    match format {
        ZnodeFormat::Nerve => nerve::DEFAULT_WEIGHT,
        ZnodeFormat::Dubbo => dubbo::DEFAULT_WEIGHT,
        _ => 1.0,
    }
}

/// Formats the interfaces for a label, with a limit that keeps it readable.
fn format_interfaces(interfaces: &BTreeSet<&Arc<str>>) -> String {
    const AT_MOST: usize = 20;
    let mut shown: Vec<&str> = interfaces.iter().take(AT_MOST).map(|name| &***name).collect();
    let more = format!("and {} more", interfaces.len().saturating_sub(AT_MOST));
    if interfaces.len() > AT_MOST {
        shown.push(&more);
    }
    shown.join(",")
}

/// Returns the protocol of a service. A Dubbo server may offer a service by several protocols, each on its
/// own port; then only the offers of one protocol are kept.
fn agreed_protocol(
    offers: &mut Vec<&Offer>,
    place: &Place,
    subject: &Arc<str>,
    problems: &mut Vec<Problem>,
) -> Option<Protocol> {
    let schemes: BTreeSet<&Arc<str>> = offers.iter().filter_map(|offer| offer.scheme.as_ref()).collect();
    if schemes.len() > 1 {
        let chosen = schemes.iter().copied().min_by_key(|scheme| (dubbo::rank(scheme), *scheme)).cloned();
        let all: Vec<&str> = schemes.iter().map(|scheme| &***scheme).collect();
        let message = format!(
            "it is offered by {}, and the endpoints of `{}` are used: set `endpoint` to choose others",
            all.join(", "),
            chosen.as_deref().unwrap_or_default()
        );
        problems.push(Problem::new(place.clone(), subject.clone(), message));
        offers.retain(|offer| offer.scheme == chosen);
    }
    let mut votes: Vec<(Protocol, usize)> = Vec::new();
    for protocol in offers.iter().filter_map(|offer| offer.protocol) {
        match votes.iter_mut().find(|(voted, _)| *voted == protocol) {
            Some((_, count)) => *count += 1,
            None => votes.push((protocol, 1)),
        }
    }
    let most = votes.iter().map(|(_, count)| *count).max()?;
    // Of two protocols with as many endpoints, the one that sorts first is chosen, so that a restart chooses
    // it again.
    let mut most: Vec<Protocol> = votes.iter().filter(|(_, c)| *c == most).map(|(p, _)| *p).collect();
    most.sort_by_key(|protocol| protocol.as_str());
    let chosen = most.first().copied();
    if let (true, Some(chosen)) = (votes.len() > 1, chosen) {
        let mut protocols: Vec<_> =
            votes.iter().map(|(protocol, count)| format!("{count} of {protocol}")).collect();
        protocols.sort();
        let message = format!(
            "its endpoints differ in protocol ({}): {chosen} is used for all; to choose another, set \
             `protocol` in a `Service` document, or set `map`",
            protocols.join(", ")
        );
        problems.push(Problem::new(place.clone(), subject.clone(), message));
    }
    chosen
}

/// Parses the JSON in a node.
fn json(member: &Member<'_>) -> Result<Value, String> {
    let value: Value = serde_json::from_slice(member.data).map_err(|wrong| {
        // Binary data is not quoted, since its first bytes would tell nothing.
        let binary =
            if first_byte(member.data) == Some(b'{') { "" } else { " (Thrift's binary form is not read)" };
        format!("its data is not JSON{binary}: {wrong}")
    })?;
    match value {
        Value::Object(_) => Ok(value),
        _ => Err("its data is not an object in JSON".to_owned()),
    }
}

/// Returns the value at a dotted path. Keys may contain dots themselves: the longest key counts.
fn value_at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    if let Some(found) = value.get(path) {
        return Some(found);
    }
    let mut splits: Vec<usize> = path.match_indices('.').map(|(at, _)| at).collect();
    splits.reverse();
    splits.into_iter().find_map(|at| {
        let (head, rest) = path.split_at_checked(at)?;
        value_at(value.get(head)?, rest.get(1..)?)
    })
}

/// Returns the text or number at the first path that is present and not empty.
fn text_at(value: &Value, own: &[String], built_in: &[&str]) -> Option<String> {
    let paths = own.iter().map(String::as_str).chain(built_in.iter().copied());
    paths.filter_map(|path| value_at(value, path)).find_map(scalar)
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(yes) => Some(yes.to_string()),
        _ => None,
    }
}

/// Returns the weight at the first path that is present. An unusable weight is ignored, with a note.
fn weight_at(value: &Value, own: &[String], built_in: &[&str]) -> (Option<RawWeight>, Option<String>) {
    match text_at(value, own, built_in).map(|text| RawWeight::parse(&text)) {
        None => (None, None),
        Some(Ok(share)) => (Some(share), None),
        Some(Err(wrong)) => (None, Some(format!("{wrong}; it is ignored"))),
    }
}

/// Returns the protocol with this name, including names of other systems; `None` if it is unknown.
fn protocol_of(name: &str) -> Option<Protocol> {
    let name = name.to_ascii_lowercase();
    match name.as_str() {
        "https" | "ssl" => Some(Protocol::Tls),
        "h2" | "h2c" => Some(Protocol::Http2),
        "tri" | "triple" => Some(Protocol::Grpc),
        "rest" => Some(Protocol::Http),
        name => name.parse().ok(),
    }
}

/// Parses an address from separate values of host and port; the port may be a text.
fn address(host: Option<&Value>, port: Option<&Value>) -> Result<Address, String> {
    let host = host.and_then(scalar).ok_or("there is no host in it")?;
    let port = port.and_then(scalar).ok_or("there is no port in it")?;
    Ok(Address { host: Host::parse(&host)?, port: parse_port(&port)? })
}

/// Returns the health that follows from the presence of a node. A persistent node outlives its creator, so
/// its health is unknown.
fn health_of_presence(member: &Member<'_>, labels: &mut Labels) -> Health {
    if member.is_ephemeral {
        return Health::Healthy;
    }
    labels.insert("liveness".into(), "none".into());
    Health::Unknown
}

/// Adds scalar facts as labels, with limits; structured values are left out.
fn add_labels<'a>(
    labels: &mut Labels,
    from: impl IntoIterator<Item = (&'a String, &'a Value)>,
    not: &[&str],
) {
    const AT_MOST: usize = 40;
    for (name, value) in from {
        if let Some(value) = scalar(value)
            && labels.len() < AT_MOST
            && value.len() <= 200
            && !not.contains(&name.as_str())
        {
            labels.insert(name.as_str().into(), value.into());
        }
    }
}

#[cfg(test)]
mod tests;
