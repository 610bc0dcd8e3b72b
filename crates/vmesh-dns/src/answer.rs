//! Answers one query, as an authoritative server of one small zone (RFC 1034, 1035, 2308, 6891, 8482, 9619).
//!
//! | the query | the response |
//! |---|---|
//! | is a response, or has no complete header | none: two servers that answer each other would never stop (RFC 5625 section 6.2) |
//! | cannot be parsed, does not have exactly one question, has two OPT records or one whose owner is not the root | FORMERR |
//! | is an UPDATE, a NOTIFY or another operation | NOTIMP |
//! | has an EDNS version other than 0 | BADVERS |
//! | is for another zone or class, or a zone transfer | REFUSED |
//! | is for a name that does not exist | NXDOMAIN, with the SOA, which limits how long to cache that |
//! | is for a record type that the name does not have | NOERROR, with the SOA |
//! | is for A or AAAA | the addresses, rotated by the query's id |
//! | is for ANY | the addresses of one family (RFC 8482 section 4.1) |
//!
//! The response repeats the question with its upper and lower case letters: resolvers that vary the case to detect forgeries require that.

use domain::base::iana::{Class, Opcode, OptRcode, Rtype};
use domain::base::message_builder::{AnswerBuilder, PushError};
use domain::base::opt::{Opt, OptRecord};
use domain::base::wire::ParseError;
use domain::base::{Message, MessageBuilder, Name, ParsedName, Question, Serial, StaticCompressor, Ttl};
use domain::rdata::{A, Aaaa, Ns, Soa};

use crate::table::{Addresses, MAX_NAME, Table};

/// The transport of a query, which limits the size of the response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Udp,
    Tcp,
}

/// Maximum size of a response over UDP in bytes, also announced by EDNS. Messages of this size are not fragmented on any link (RFC 9715).
pub const MAX_UDP: usize = 1232;
/// Maximum size of a response over UDP to a query without EDNS (RFC 1035 section 4.2.1).
const PLAIN_UDP: usize = 512;
/// Size of an OPT record without options: the root, type, class, TTL and length.
const OPT_LEN: usize = 11;
/// Size of the header, which precedes the question (RFC 1035 section 4.1.1).
const HEADER_LEN: usize = 12;

/// Returns the response to `query`, or `None` if it must not be answered. Over UDP the response has at most [`MAX_UDP`] bytes. Over TCP it
/// comes without the length prefix, and its size is bounded by [`crate::table::MAX_ADDRESSES`].
pub fn answer(table: &Table, query: &[u8], transport: Transport) -> Option<Vec<u8>> {
    let message = Message::from_slice(query).ok()?;
    if message.header().qr() {
        return None;
    }
    let (query_parts, verdict) = match ParsedQuery::parse(message) {
        Ok(query_parts) => {
            let verdict = resolve(table, message, &query_parts);
            (Some(query_parts), verdict)
        }
        Err(MalformedQuery) if message.header().opcode() != Opcode::QUERY => {
            (None, Verdict::Error(OptRcode::NOTIMP))
        }
        Err(MalformedQuery) => (None, Verdict::Error(OptRcode::FORMERR)),
    };
    // If the response cannot be built, send none: resolvers handle a timeout better than a broken message.
    respond(table, message, query_parts.as_ref(), &verdict, transport).ok()
}

struct ParsedQuery<'a> {
    question: Question<ParsedName<&'a [u8]>>,
    /// The name in lower case on the wire, as the table's key.
    wire: Vec<u8>,
    edns: Option<Edns>,
}

#[derive(Clone, Copy)]
struct Edns {
    version: u8,
    size: usize,
    dnssec_ok: bool,
}

struct MalformedQuery;

/// The response could not be built. The size limits of names and tables exclude this.
struct BuildError;

enum PushFailure {
    TooLong,
    Other,
}

impl From<PushError> for BuildError {
    fn from(_: PushError) -> BuildError {
        BuildError
    }
}

impl From<PushError> for PushFailure {
    fn from(error: PushError) -> PushFailure {
        if matches!(error, PushError::LimitExceeded) { PushFailure::TooLong } else { PushFailure::Other }
    }
}

impl From<BuildError> for PushFailure {
    fn from(_: BuildError) -> PushFailure {
        PushFailure::Other
    }
}

impl From<ParseError> for MalformedQuery {
    fn from(_: ParseError) -> MalformedQuery {
        MalformedQuery
    }
}

impl<'a> ParsedQuery<'a> {
    fn parse(message: &'a Message<[u8]>) -> Result<ParsedQuery<'a>, MalformedQuery> {
        let question = message.sole_question()?;
        let mut wire = Vec::with_capacity(MAX_NAME);
        for label in question.qname().iter() {
            wire.push(u8::try_from(label.len()).map_err(|_| MalformedQuery)?);
            wire.extend(label.as_slice().iter().map(u8::to_ascii_lowercase));
        }
        // The name contains a compression pointer, which is invalid here: no earlier name exists.
        let sent = message.as_slice().get(HEADER_LEN..).and_then(|rest| rest.get(..wire.len()));
        if !sent.is_some_and(|sent| sent.eq_ignore_ascii_case(&wire)) {
            return Err(MalformedQuery);
        }
        let mut edns = None;
        for record in message.additional()? {
            let record = record?;
            if record.rtype() != Rtype::OPT {
                continue;
            }
            if edns.is_some() || !record.owner().is_root() {
                return Err(MalformedQuery);
            }
            let record = record.into_record::<Opt<_>>()?.ok_or(MalformedQuery)?;
            let opt = OptRecord::from_record(record);
            edns = Some(Edns {
                version: opt.version(),
                size: usize::from(opt.udp_payload_size()),
                dnssec_ok: opt.dnssec_ok(),
            });
        }
        Ok(ParsedQuery { question, wire, edns })
    }
}

/// The kind of response.
enum Verdict<'t> {
    Error(OptRcode),
    /// The name of the zone itself.
    Apex,
    Exists(&'t Addresses),
    NoSuchName,
}

fn resolve<'t>(table: &'t Table, message: &Message<[u8]>, query_parts: &ParsedQuery<'_>) -> Verdict<'t> {
    if message.header().opcode() != Opcode::QUERY {
        return Verdict::Error(OptRcode::NOTIMP);
    }
    if query_parts.edns.is_some_and(|edns| edns.version > 0) {
        return Verdict::Error(OptRcode::BADVERS);
    }
    let suffix = table.zone().suffix.wire();
    let transfer = matches!(query_parts.question.qtype(), Rtype::AXFR | Rtype::IXFR);
    if query_parts.question.qclass() != Class::IN || transfer || !is_below(&query_parts.wire, suffix) {
        return Verdict::Error(OptRcode::REFUSED);
    }
    if query_parts.wire == suffix {
        return Verdict::Apex;
    }
    table.get(&query_parts.wire).map_or(Verdict::NoSuchName, Verdict::Exists)
}

/// Reports whether `name` is `suffix` or below it. Both end with the root label, which ends the comparison at a label boundary.
fn is_below(name: &[u8], suffix: &[u8]) -> bool {
    let mut rest = name;
    while rest.len() > suffix.len() {
        let Some((len, after)) = rest.split_first() else { return false };
        rest = after.get(usize::from(*len)..).unwrap_or_default();
    }
    rest == suffix
}

type Answer = AnswerBuilder<StaticCompressor<Vec<u8>>>;

fn respond(
    table: &Table,
    query: &Message<[u8]>,
    query_parts: Option<&ParsedQuery<'_>>,
    verdict: &Verdict<'_>,
    transport: Transport,
) -> Result<Vec<u8>, BuildError> {
    let edns = query_parts.and_then(|query_parts| query_parts.edns);
    let most = match (transport, edns) {
        (Transport::Tcp, _) => usize::from(u16::MAX),
        (Transport::Udp, None) => PLAIN_UDP,
        (Transport::Udp, Some(edns)) => edns.size.clamp(PLAIN_UDP, MAX_UDP),
    };
    let mut builder = MessageBuilder::from_target(StaticCompressor::new(Vec::with_capacity(PLAIN_UDP)))
        .map_err(|_| BuildError)?;
    let header = builder.header_mut();
    header.set_id(query.header().id());
    header.set_qr(true);
    header.set_opcode(query.header().opcode());
    header.set_rd(query.header().rd());
    header.set_aa(!matches!(verdict, Verdict::Error(_)));
    let rcode = match verdict {
        Verdict::Error(rcode) => *rcode,
        Verdict::NoSuchName => OptRcode::NXDOMAIN,
        Verdict::Apex | Verdict::Exists(_) => OptRcode::NOERROR,
    };
    header.set_rcode(rcode.rcode());
    // The push limit of `domain` is exclusive.
    builder.set_push_limit(most + 1 - edns.map_or(0, |_| OPT_LEN));

    let mut question = builder.question();
    if let Some(query_parts) = query_parts {
        question.push(query_parts.question)?;
    }
    let mut answers = question.answer();
    if let (Some(query_parts), false) = (query_parts, matches!(verdict, Verdict::Error(_))) {
        match push_records(table, query.header().id(), query_parts, verdict, &mut answers) {
            Ok(()) => {}
            // Truncate to no records at all: a resolver might take a part for the complete set (RFC 2181 section 9).
            Err(PushFailure::TooLong) => answers = answers.tc_rewind_into(),
            Err(PushFailure::Other) => return Err(BuildError),
        }
    }
    let mut authority = answers.authority();
    let counts = authority.counts();
    let says_anything =
        counts.ancount() > 0 || authority.header().tc() || matches!(verdict, Verdict::Error(_));
    if !says_anything {
        let ttl = Ttl::from_secs(table.zone().negative_ttl);
        authority.push((apex(table)?, Class::IN, ttl, soa(table)?))?;
    }
    let mut additional = authority.additional();
    if let Some(edns) = edns {
        additional.set_push_limit(most + 1);
        additional.opt(|opt| {
            opt.set_rcode(rcode);
            opt.set_udp_payload_size(u16::try_from(MAX_UDP).unwrap_or(u16::MAX));
            opt.set_dnssec_ok(edns.dnssec_ok);
            Ok(())
        })?;
    }
    Ok(additional.finish().into_target())
}

/// Adds the requested records, if there are any.
fn push_records(
    table: &Table,
    id: u16,
    query_parts: &ParsedQuery<'_>,
    verdict: &Verdict<'_>,
    answers: &mut Answer,
) -> Result<(), PushFailure> {
    let ttl = Ttl::from_secs(table.zone().ttl);
    let name = query_parts.question.qname();
    match (verdict, query_parts.question.qtype()) {
        (Verdict::Apex, Rtype::SOA | Rtype::ANY) => answers.push((name, Class::IN, ttl, soa(table)?))?,
        (Verdict::Apex, Rtype::NS) => answers.push((name, Class::IN, ttl, Ns::new(apex(table)?)))?,
        (Verdict::Exists(addresses), qtype) => {
            let any_v4 = qtype == Rtype::ANY && !addresses.v4.is_empty();
            if qtype == Rtype::A || any_v4 {
                for v4 in rotated(&addresses.v4, id) {
                    answers.push((name, Class::IN, ttl, A::new(v4)))?;
                }
            } else if matches!(qtype, Rtype::AAAA | Rtype::ANY) {
                for v6 in rotated(&addresses.v6, id) {
                    answers.push((name, Class::IN, ttl, Aaaa::new(v6)))?;
                }
            }
        }
        _ => {}
    }
    Ok(())
}

/// Returns all addresses, starting at a position that depends on `by`: many clients use the first address.
fn rotated<A: Copy>(addresses: &[A], by: u16) -> impl Iterator<Item = A> {
    let by = usize::from(by) % addresses.len().max(1);
    addresses.iter().cycle().skip(by).take(addresses.len()).copied()
}

type Domain<'a> = &'a Name<[u8]>;

fn apex(table: &Table) -> Result<Domain<'_>, BuildError> {
    Name::from_slice(table.zone().suffix.wire()).map_err(|_| BuildError)
}

/// Returns the SOA record that RFC 6303 section 3 recommends for locally served zones. The serial is constant, since zone transfers are
/// refused.
fn soa(table: &Table) -> Result<Soa<Domain<'_>>, BuildError> {
    let nobody = Name::from_slice(b"\x06nobody\x07invalid\x00").map_err(|_| BuildError)?;
    Ok(Soa::new(
        apex(table)?,
        nobody,
        Serial(1),
        Ttl::from_secs(3600),
        Ttl::from_secs(1200),
        Ttl::from_secs(604_800),
        Ttl::from_secs(table.zone().negative_ttl),
    ))
}

#[cfg(test)]
mod tests;
