//! The error of a NACK: its text made printable, and the resources that it blames.

use crate::Kind;
use prost::{Message, Name};
use vmesh_proto::agent;
use vmesh_proto::google::rpc;

/// The limit of a stored error text, in bytes. Envoy's errors can quote whole resources.
const REASON_MAX: usize = 4096;
/// The limit of the search for names in an error text, as the number of names times the bytes of the text.
const SEARCH_MAX: usize = 64 << 20;

/// Returns a client's error text, cut to a limit and without characters that would control a terminal or a log.
pub(super) fn sanitized(error: &str) -> String {
    let mut shown = String::new();
    for c in error.chars() {
        match c {
            // Envoy writes one line per error.
            '\n' => shown.push(c),
            c if c.is_control()
                || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}') =>
            {
                shown.extend(c.escape_default());
            }
            c => shown.push(c),
        }
        if shown.len() > REASON_MAX {
            break;
        }
    }
    shown.truncate(shown.floor_char_boundary(REASON_MAX));
    shown
}

/// Limits of the refusals that a NACK may list. A relay lists at most 256. Longer lists are ignored, since each
/// resource of a response is compared with each refusal.
const REFUSALS_BYTES: usize = 256 << 10;
const REFUSALS_USED: usize = 1024;

/// Decodes the list of refused resources that an agent adds to its error text.
pub(super) fn decode_refusals(error: &rpc::Status) -> Option<agent::Refusals> {
    let type_url = agent::Refusals::type_url();
    let any = error.details.iter().find(|any| any.type_url == type_url)?;
    if any.value.len() > REFUSALS_BYTES {
        return None;
    }
    agent::Refusals::decode(any.value.clone())
        .ok()
        .filter(|refusals| refusals.refusals.len() <= REFUSALS_USED)
}

/// Returns, for each name, whether the error text blames it.
pub(super) fn blamed_names<'a>(
    kind: Kind,
    text: &str,
    names: impl ExactSizeIterator<Item = &'a str>,
) -> Vec<bool> {
    if names.len().saturating_mul(text.len()) > SEARCH_MAX {
        return vec![false; names.len()];
    }
    names.map(|name| blames(kind, text, name)).collect()
}

/// Reports whether the error text blames `name`, a resource of this kind. A blamed name stands where Envoy and
/// gRPC write the name, followed by the error. Elsewhere in the text it may be a common word, a part of another
/// name, or a resource of another kind.
///
/// Envoy writes `Error adding/updating cluster(s) a: why, b: why`, and the same with `listener(s)` and one
/// resource per line. gRPC writes `[resource index 0: a: why]`. A text that is only the name blames it too.
pub(super) fn blames(kind: Kind, text: &str, name: &str) -> bool {
    let of_kind = match kind {
        Kind::Cluster => "cluster(s) ",
        Kind::Listener => "listener(s) ",
        _ => "\n",
    };
    let begins = |before: &str| {
        before.is_empty()
            || before.ends_with(['\n', '['])
            || before.ends_with(", ")
            || before.ends_with("; ")
            || before.ends_with(of_kind)
            || before.strip_suffix(": ").is_some_and(|before| {
                before.trim_end_matches(|c: char| c.is_ascii_digit()).ends_with("resource index ")
            })
    };
    !name.is_empty()
        && text.match_indices(name).any(|(at, _)| {
            let before = text.get(..at).unwrap_or_default();
            let after = text.get(at + name.len()..).unwrap_or_default();
            begins(before) && (after.starts_with(": ") || (before.is_empty() && after.is_empty()))
        })
}
