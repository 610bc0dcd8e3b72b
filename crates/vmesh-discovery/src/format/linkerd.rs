//! Lists of lines: Linkerd 1.x `io.l5d.fs`, and the `host:port` lines of Pinterest's kingpin.
//!
//! ```text
//! # payment pool
//! 10.1.0.4 8080
//! 10.1.0.5 8080 * 2.5     # new box
//! pay-old.internal:8080
//! ```
//!
//! Each file is one service. Unlike in Linkerd, a bad line does not make the file unusable. A file of zero
//! bytes is an error, because writers that are not atomic leave one behind for a moment; a file with only
//! comments is a service without endpoints.

use vmesh_model::{Address, Host, Place};

use super::{
    FileFailure, Input, ParseResult, RawWeight, Record, empty_file, has_comment, named_by_file, subject_of,
};

/// Reports whether the first line with content is an endpoint.
pub(super) fn looks_like(text: &str) -> bool {
    lines(text).map(|line| without_comment(line).trim()).find(|line| !line.is_empty()).is_some_and(|line| {
        let is_port = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next()) {
            (Some(host), Some(port)) if is_port(port) => !host.ends_with(':'),
            (Some(word), None | Some("*")) => word.rsplit_once(':').is_some_and(|(_, port)| is_port(port)),
            _ => false,
        }
    })
}

/// Returns the lines, which end with a line feed, a carriage return, or both, depending on the system that
/// wrote the list.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.split('\n').flat_map(|line| line.strip_suffix('\r').unwrap_or(line).split('\r'))
}

fn without_comment(line: &str) -> &str {
    line.split_once('#').map_or(line, |(before, _)| before)
}

pub fn parse(input: &Input<'_>) -> ParseResult {
    let service = match named_by_file(input) {
        Ok(service) => service,
        Err(problem) => return ParseResult::failed(FileFailure::MisnamedFile, vec![problem]),
    };
    let subject = subject_of(&service.name);
    let mut parsed = ParseResult::default();
    let (mut records, mut bad) = (Vec::new(), 0);
    for (number, line) in (1..).zip(lines(input.text)) {
        let content = without_comment(line);
        let words: Vec<&str> = content.split_ascii_whitespace().collect();
        if words.is_empty() {
            continue;
        }
        let at = |word: &str| {
            // A word is a slice of its line, so its column follows from the two pointers.
            let bytes = word.as_ptr().addr().saturating_sub(content.as_ptr().addr());
            let column = content.get(..bytes).unwrap_or_default().chars().count() + 1;
            Place::at(input.file.clone(), number, u32::try_from(column).unwrap_or(u32::MAX))
        };
        match record(&words, at(words.first().copied().unwrap_or_default())) {
            Ok(record) => records.push(record),
            Err((word, wrong)) => {
                bad += 1;
                parsed.add_bad_record(at(word), &subject, wrong);
            }
        }
    }
    if records.is_empty() && parsed.problems.is_empty() && !has_comment(input.text) {
        return empty_file(input);
    }
    parsed.add_service(service, records, bad, 1.0);
    parsed.finish()
}

/// Parses an endpoint. The error holds the word that is wrong, and the reason.
fn record<'a>(words: &[&'a str], place: Place) -> Result<Record, (&'a str, String)> {
    let (first, address, rest) = match words {
        [] => return Err(("", "an empty line".to_owned())),
        // A single word is `host:port`. Two words such as `::1 8080` are not.
        [first, rest @ ..] if rest.first().is_none_or(|word| *word == "*") => {
            (*first, first.parse::<Address>(), rest)
        }
        [host, port, rest @ ..] => {
            let port = vmesh_model::endpoint::parse_port(port).map_err(|wrong| (*port, wrong))?;
            (*host, Host::parse(host).map(|host| Address { host, port }), rest)
        }
        [first] => (*first, first.parse::<Address>(), &[][..]),
    };
    let address = address.map_err(|wrong| (first, wrong))?;
    let weight = match rest {
        [] => None,
        ["*", weight] => Some(RawWeight::parse(weight).map_err(|wrong| (*weight, wrong))?),
        [word, ..] => {
            return Err((*word, format!("`{word}` after the endpoint: expected `host port * weight`")));
        }
    };
    Ok(Record { weight, ..Record::new(address, place) })
}
