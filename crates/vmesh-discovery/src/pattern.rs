//! [`Pattern`]: selects services, tags and metadata in the configurations of several sources.

use std::sync::Arc;

use serde::Deserialize;

/// A text in which each `*` stands for any text, including an empty one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(transparent)]
pub struct Pattern(pub Arc<str>);

impl Pattern {
    /// Reports whether the whole of `text` matches.
    pub fn matches(&self, text: &str) -> bool {
        matches(self.0.as_bytes(), text.as_bytes())
    }

    /// Reports whether `text` matches, where lower case and capitals are equal.
    pub(crate) fn matches_ignoring_case(&self, text: &str) -> bool {
        matches(self.0.to_ascii_lowercase().as_bytes(), text.to_ascii_lowercase().as_bytes())
    }
}

/// Matches in linear time for one star and quadratic time at worst: a star first matches as little as
/// possible, and more only if the rest does not match.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t, mut star) = (0, 0, None);
    while let Some(byte) = text.get(t) {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(expected) if expected == byte => {
                p += 1;
                t += 1;
            }
            _ => {
                let Some((at, taken)) = star else { return false };
                star = Some((at, taken + 1));
                p = at + 1;
                t = taken + 1;
            }
        }
    }
    pattern.get(p..).unwrap_or_default().iter().all(|byte| *byte == b'*')
}
