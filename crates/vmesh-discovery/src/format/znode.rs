//! What services leave in ZooKeeper: one directory of nodes per service, and in each node one instance.
//!
//! | module | written by | an instance is |
//! |---|---|---|
//! | [`serverset`] | Twitter's and Aurora's serversets, Finagle | the JSON in `member_..`; weights in `vector_..` |
//! | [`curator`] | Apache Curator's x-discovery, Spring Cloud, Dubbo 3 by application | the JSON in a node |
//! | [`nerve`] | Airbnb's nerve, Yelp's SmartStack | the JSON in a node, or in its name |
//! | [`dubbo`] | Dubbo 2 by interface | the name of a node below `providers`, a URL |
//! | [`hostport`] | leader elections, Pinterest's kingpin | `host:port`, in a node or in its name |
//!
//! Lenient: what is not known is ignored, since it is somebody else's format. A record that makes no sense costs that
//! record; too many of them cost the directory, of which then stands what was read last.

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

use super::{ParsedService, Record, Share, partial, subject_of, too_many, weighed};

/// How the nodes below a root are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ZnodeFormat {
    /// Told by what most of the nodes that are there look like.
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

/// What is one service in Dubbo 2.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupBy {
    /// One application, with all of its interfaces.
    #[default]
    Application,
    /// One interface, in one group and version.
    Interface,
}

/// Which port of Curator's two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prefer {
    #[default]
    Port,
    SslPort,
}

/// Where in a record something is said, by dotted paths; the first that is there counts. They go before those that a
/// format knows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mapping {
    pub zone: Vec<String>,
    pub version: Vec<String>,
    pub protocol: Vec<String>,
    pub weight: Vec<String>,
}

/// How records are read: the part of a root's configuration that concerns them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// Which of several endpoints: a name in serversets, a protocol in Dubbo.
    pub endpoint: Option<String>,
    pub group_by: GroupBy,
    pub prefer: Prefer,
    pub map: Mapping,
}

/// A directory of records.
#[derive(Debug)]
pub struct Directory<'a> {
    /// Where it is, for messages: `zookeeper:prod/services/pay`.
    pub place: &'a str,
    pub members: Vec<Member<'a>>,
}

/// A node in it.
#[derive(Debug, Clone, Copy)]
pub struct Member<'a> {
    pub name: &'a str,
    pub data: &'a [u8],
    /// It goes with the session that made it, so it says that somebody is alive.
    pub is_ephemeral: bool,
    /// Greater is later.
    pub created: i64,
    /// Nothing was ever read of it, and why.
    pub unreadable: Option<&'a str>,
}

/// What a directory says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Read {
    offers: Vec<Offer>,
    /// What is wrong with the records that are left out.
    bad: Vec<Problem>,
    /// What else there is to say.
    notes: Vec<Problem>,
}

/// One endpoint of one service, as one record offers it.
#[derive(Debug, Clone, PartialEq)]
struct Offer {
    /// `None`: the service is that of the directory.
    service: Option<Arc<str>>,
    /// Of Dubbo: what is offered, and how it is spoken to in Dubbo's words.
    interface: Option<Arc<str>>,
    scheme: Option<Arc<str>>,
    protocol: Option<Protocol>,
    created: i64,
    record: Record,
}

impl Read {
    /// The names of the services, where records name them.
    pub fn services(&self) -> BTreeSet<Option<Arc<str>>> {
        self.offers.iter().map(|offer| offer.service.clone()).collect()
    }

    pub fn is_empty(&self) -> bool {
        self.offers.is_empty() && self.bad.is_empty()
    }

    /// How many records make no sense.
    pub fn bad(&self) -> usize {
        self.bad.len()
    }

    /// Returns why more may be there than could be read, if more is wrong with it than single records.
    pub fn partial(&self) -> Option<String> {
        let (bad, records) = (self.bad.len(), self.bad.len() + self.offers.len());
        too_many(bad, records).then(|| partial(bad, records))
    }

    /// Reports whether nothing of it can be used, although something is there.
    pub fn is_unusable(&self) -> bool {
        self.offers.is_empty() && !self.bad.is_empty()
    }

    /// Reports whether it offers anything.
    pub fn has_offers(&self) -> bool {
        !self.offers.is_empty()
    }

    /// What there is to say about its records, each about `subject`.
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

    fn note(&mut self, place: Place, what: impl Into<String>) {
        self.notes.push(Problem::new(place, "", what));
    }
}

/// Reads a directory.
pub fn read(format: ZnodeFormat, directory: &Directory<'_>, rules: &Rules) -> Read {
    let mut read = Read::default();
    match format {
        ZnodeFormat::Auto => {}
        ZnodeFormat::ServerSet => serverset::read(directory, rules, &mut read),
        ZnodeFormat::Curator => each(directory, rules, &mut read, curator::record),
        ZnodeFormat::Nerve => each(directory, rules, &mut read, nerve::record),
        ZnodeFormat::Dubbo => each(directory, rules, &mut read, dubbo::record),
        ZnodeFormat::HostPort => hostport::read(directory, &mut read),
    }
    read
}

/// `Ok(None)`: it is no record, which is as it should be.
type Recorded = Result<Option<Offer>, String>;

fn each(
    directory: &Directory<'_>,
    rules: &Rules,
    read: &mut Read,
    record: impl Fn(&Member<'_>, Place, &Rules) -> Recorded,
) {
    for member in &directory.members {
        let place = directory.place_of(member);
        match readable(member).and_then(|()| record(member, place.clone(), rules)) {
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

impl Directory<'_> {
    fn place_of(&self, member: &Member<'_>) -> Place {
        // Names may be as long as URLs.
        Place::file(format!("{}/{}", self.place, short(member.name)))
    }
}

fn readable(member: &Member<'_>) -> Result<(), String> {
    match member.unreadable {
        Some(why) => Err(why.to_owned()),
        None => Ok(()),
    }
}

/// Whether a node of this format may be a record: what a directory has to have to be one of records.
pub fn may_be_record(format: ZnodeFormat, member: &Member<'_>) -> bool {
    let is_json = || first(member.data) == Some(b'{');
    match format {
        ZnodeFormat::Auto => false,
        ZnodeFormat::ServerSet => member.name.starts_with("member_"),
        ZnodeFormat::Curator => member.is_ephemeral || is_json(),
        ZnodeFormat::Nerve => member.is_ephemeral || member.name.starts_with("base64_") || is_json(),
        ZnodeFormat::Dubbo => dubbo::is_url(member.name),
        ZnodeFormat::HostPort => hostport::may_be_record(member),
    }
}

fn first(data: &[u8]) -> Option<u8> {
    data.iter().copied().find(|byte| !byte.is_ascii_whitespace())
}

/// What a single node looks like; `None` if it looks like nothing that is known.
pub fn looks_like(member: &Member<'_>) -> Option<ZnodeFormat> {
    if dubbo::is_url(member.name) {
        return Some(ZnodeFormat::Dubbo);
    }
    if member.name.starts_with("base64_") {
        return Some(ZnodeFormat::Nerve);
    }
    if first(member.data) == Some(b'{') {
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

/// How many of some nodes look like each format.
pub type Votes = BTreeMap<ZnodeFormat, usize>;

pub fn votes<'a>(members: impl IntoIterator<Item = Member<'a>>) -> Votes {
    let mut votes = Votes::new();
    for format in members.into_iter().filter_map(|member| looks_like(&member)) {
        *votes.entry(format).or_default() += 1;
    }
    votes
}

/// Returns the format that most nodes look like; of two with as many, the one that leaves less to chance. One that was
/// decided on stays until another has twice as many: where two mix, it must not change with every node.
pub fn decide(votes: &Votes, before: Option<ZnodeFormat>) -> Option<ZnodeFormat> {
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

/// Puts together what directories, each with the name of its service, say of the service `name`; `None` if that is
/// nothing. `place` is where the service is, in messages.
///
/// Of several records for one address the youngest counts: where an instance comes back, its old record stands until
/// its old session ends. So an endpoint stays while any record of it does.
pub fn combine(
    name: &ServiceName,
    place: Place,
    reads: &[(&str, &Read)],
    format_weight: f64,
    problems: &mut Vec<Problem>,
) -> Option<ParsedService> {
    let subject = subject_of(name);
    let is_ours = |own: &str, offer: &Offer| offer.service.as_deref().unwrap_or(own) == name.as_str();
    let offers = reads.iter().flat_map(|(own, read)| read.offers.iter().filter(|offer| is_ours(own, offer)));
    let mut offers: Vec<&Offer> = offers.collect();
    let protocol = agreed(&mut offers, &place, &subject, problems);
    // The later ones win; sorted as a whole so that the order of directories makes no difference.
    offers.sort_by(|a, b| (a.created, &a.record.place).cmp(&(b.created, &b.record.place)));
    let mut records: BTreeMap<&Address, Record> = BTreeMap::new();
    let mut interfaces: BTreeMap<&Address, BTreeSet<&Arc<str>>> = BTreeMap::new();
    for offer in offers {
        let address = &offer.record.address;
        let mut record = offer.record.clone();
        if let Some(interface) = &offer.interface {
            interfaces.entry(address).or_default().insert(interface);
            // Who no longer offers one interface goes on offering the others.
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
            record.labels.insert("dubbo.interfaces".into(), listed(&interfaces).into());
        }
    }
    let records: Vec<Record> = records.into_values().collect();
    if records.is_empty() {
        return None;
    }
    let has_weights = records.iter().any(|record| record.weight.is_some());
    let endpoints = weighed(records, if has_weights { format_weight } else { 1.0 });
    Some(ParsedService { protocol, endpoints, ..ParsedService::new(name.clone(), place) })
}

/// What a weight is that is not given, where others are.
pub fn default_weight(format: ZnodeFormat) -> f64 {
    match format {
        ZnodeFormat::Nerve => nerve::DEFAULT_WEIGHT,
        ZnodeFormat::Dubbo => dubbo::DEFAULT_WEIGHT,
        _ => 1.0,
    }
}

/// As many as help whoever reads it.
fn listed(interfaces: &BTreeSet<&Arc<str>>) -> String {
    const AT_MOST: usize = 20;
    let mut shown: Vec<&str> = interfaces.iter().take(AT_MOST).map(|name| &***name).collect();
    let more = format!("and {} more", interfaces.len().saturating_sub(AT_MOST));
    if interfaces.len() > AT_MOST {
        shown.push(&more);
    }
    shown.join(",")
}

/// The protocol of a service. Dubbo's servers offer the same by several, each on a port of its own: then only those of
/// one are endpoints.
fn agreed(
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
    // Of two with as many the one that sorts first, so that a restart decides alike.
    let mut most: Vec<Protocol> = votes.iter().filter(|(_, c)| *c == most).map(|(p, _)| *p).collect();
    most.sort_by_key(|protocol| protocol.as_str());
    let chosen = most.first().copied();
    if let (true, Some(chosen)) = (votes.len() > 1, chosen) {
        let mut said: Vec<_> =
            votes.iter().map(|(protocol, count)| format!("{count} of {protocol}")).collect();
        said.sort();
        let message = format!(
            "its endpoints differ in protocol ({}): {chosen} is used for all; say it in a `Service` document, or by `map`",
            said.join(", ")
        );
        problems.push(Problem::new(place.clone(), subject.clone(), message));
    }
    chosen
}

/// The JSON in a node.
fn json(member: &Member<'_>) -> Result<Value, String> {
    let value: Value = serde_json::from_slice(member.data).map_err(|wrong| {
        // Binary data would be noise, and its first bytes say nothing to anybody.
        let binary =
            if first(member.data) == Some(b'{') { "" } else { " (Thrift's binary form is not read)" };
        format!("its data is not JSON{binary}: {wrong}")
    })?;
    match value {
        Value::Object(_) => Ok(value),
        _ => Err("its data is not an object in JSON".to_owned()),
    }
}

/// A value by its dotted path. Keys may have dots themselves: the longest counts.
fn find<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    if let Some(found) = value.get(path) {
        return Some(found);
    }
    let mut splits: Vec<usize> = path.match_indices('.').map(|(at, _)| at).collect();
    splits.reverse();
    splits.into_iter().find_map(|at| {
        let (head, rest) = path.split_at_checked(at)?;
        find(value.get(head)?, rest.get(1..)?)
    })
}

/// A text or a number at one of some paths; what is empty is not there.
fn text_at(value: &Value, own: &[String], built_in: &[&str]) -> Option<String> {
    let paths = own.iter().map(String::as_str).chain(built_in.iter().copied());
    paths.filter_map(|path| find(value, path)).find_map(scalar)
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) if !text.is_empty() => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(yes) => Some(yes.to_string()),
        _ => None,
    }
}

/// A weight at one of some paths; and what to say of one that cannot be used, which is ignored.
fn weight_at(value: &Value, own: &[String], built_in: &[&str]) -> (Option<Share>, Option<String>) {
    match text_at(value, own, built_in).map(|text| Share::parse(&text)) {
        None => (None, None),
        Some(Ok(share)) => (Some(share), None),
        Some(Err(wrong)) => (None, Some(format!("{wrong}; it is ignored"))),
    }
}

/// What a protocol is called, also by other names than ours; what is not known is not said.
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

/// A host and a port, each as a value of its own; a port may be a text.
fn address(host: Option<&Value>, port: Option<&Value>) -> Result<Address, String> {
    let host = host.and_then(scalar).ok_or("there is no host in it")?;
    let port = port.and_then(scalar).ok_or("there is no port in it")?;
    Ok(Address { host: Host::parse(&host)?, port: parse_port(&port)? })
}

/// What a node says by being there: of one that stays when its maker is gone, that nobody knows.
fn presence(member: &Member<'_>, labels: &mut Labels) -> Health {
    if member.is_ephemeral {
        return Health::Healthy;
    }
    labels.insert("liveness".into(), "none".into());
    Health::Unknown
}

/// Facts that people may want to select by; not whole documents.
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
