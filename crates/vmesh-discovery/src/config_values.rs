//! Values that the configurations of several sources share, each with its limits.

use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer};
use vmesh_model::text::{parse_duration, show_duration};

/// Deserializes the name of a source: a single word, because it is an argument of commands and part of a file
/// name.
pub(crate) fn name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Arc<str>>, D::Error> {
    let name = String::deserialize(deserializer)?;
    let is_word = name.chars().all(|c| c.is_ascii_alphanumeric() || "._:-/".contains(c));
    if is_word && (1..=100).contains(&name.len()) {
        Ok(Some(name.into()))
    } else {
        Err(de::Error::custom(format!(
            "`{}` is not a valid name of a source: 1 to 100 letters, digits, `.`, `_`, `:`, `-` or `/`",
            vmesh_model::yaml::short(&name)
        )))
    }
}

pub(crate) fn yes() -> bool {
    true
}

pub(crate) fn half_a_minute() -> Duration {
    Duration::from_secs(30)
}

/// Deserializes a duration such as `30s`.
pub(crate) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    parse_duration(&String::deserialize(deserializer)?).map_err(de::Error::custom)
}

/// Deserializes an interval of at least 1 s. Shorter intervals would add load and no benefit.
pub(crate) fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let interval = duration(deserializer)?;
    if interval >= Duration::from_secs(1) {
        Ok(interval)
    } else {
        Err(de::Error::custom(format!("{} is too short: 1s at least", show_duration(interval))))
    }
}
