//! The field `bypass_filter` of a spec, which is a boolean or a list of ports.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize, Serializer};

use super::values::Ports;

/// The ports that may be redirected against the host's own filter: `true`, `false` or a list such as
/// `[8081, "9000-9010"]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BypassFilter {
    All,
    Ports(BTreeSet<Ports>),
}

impl BypassFilter {
    pub(super) fn is_nothing(&self) -> bool {
        *self == BypassFilter::default()
    }
}

impl Default for BypassFilter {
    fn default() -> Self {
        BypassFilter::Ports(BTreeSet::new())
    }
}

impl Serialize for BypassFilter {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            BypassFilter::All => serializer.serialize_bool(true),
            BypassFilter::Ports(ports) => ports.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for BypassFilter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> de::Visitor<'de> for Visitor {
            type Value = BypassFilter;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`true`, `false` or a list of ports and ranges of ports")
            }

            fn visit_bool<E: de::Error>(self, all: bool) -> Result<BypassFilter, E> {
                Ok(if all { BypassFilter::All } else { BypassFilter::default() })
            }

            /// YAML passes an unquoted scalar as text.
            fn visit_str<E: de::Error>(self, text: &str) -> Result<BypassFilter, E> {
                match text {
                    "true" => self.visit_bool(true),
                    "false" => self.visit_bool(false),
                    other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
                }
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, ports: A) -> Result<BypassFilter, A::Error> {
                BTreeSet::deserialize(de::value::SeqAccessDeserializer::new(ports)).map(BypassFilter::Ports)
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}
