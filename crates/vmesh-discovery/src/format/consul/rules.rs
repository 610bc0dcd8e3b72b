//! The part of a Consul source's configuration that decides how instances are read. It knows no parser.

use std::collections::BTreeMap;
use std::num::NonZeroU16;

use serde::Deserialize;
use serde::de::{self, Deserializer};

use crate::pattern::Pattern;

/// The part of the configuration that tells how instances are read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct InstanceRules {
    pub(crate) require_tags: Vec<Pattern>,
    pub(crate) exclude_tags: Vec<Pattern>,
    pub(crate) node_meta: BTreeMap<String, Pattern>,
    pub(crate) service_meta: BTreeMap<String, Pattern>,
    pub(crate) kinds: Vec<String>,
    pub(crate) endpoint_address: AddressKind,
    pub(crate) port_name: Option<String>,
    pub(crate) default_port: Option<NonZeroU16>,
    pub(crate) map: MetadataKeys,
    pub(crate) tag_patterns: Vec<TagPattern>,
    pub(crate) default_weight: Option<u32>,
    pub(crate) health: HealthRules,
}

impl InstanceRules {
    /// Reports whether a service may have a wanted instance. `tags` are the tags of all its instances.
    pub fn may_want(&self, tags: &[String]) -> bool {
        self.require_tags.iter().all(|pattern| tags.iter().any(|tag| pattern.matches(tag)))
    }
}

/// The address at which an instance is dialled.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AddressKind {
    /// The address of the service, or else of its node, as in Consul's own DNS.
    #[default]
    Service,
    Node,
    Lan,
    Wan,
    LanIpv4,
    LanIpv6,
    WanIpv4,
    WanIpv6,
    /// The virtual address that Consul's own mesh intercepts.
    Virtual,
}

impl AddressKind {
    /// Returns the key in `TaggedAddresses`.
    pub(crate) fn tag(self) -> Option<&'static str> {
        match self {
            AddressKind::Service | AddressKind::Node => None,
            AddressKind::Lan => Some("lan"),
            AddressKind::Wan => Some("wan"),
            AddressKind::LanIpv4 => Some("lan_ipv4"),
            AddressKind::LanIpv6 => Some("lan_ipv6"),
            AddressKind::WanIpv4 => Some("wan_ipv4"),
            AddressKind::WanIpv6 => Some("wan_ipv6"),
            AddressKind::Virtual => Some("virtual"),
        }
    }

    pub(crate) fn is_wan(self) -> bool {
        matches!(self, AddressKind::Wan | AddressKind::WanIpv4 | AddressKind::WanIpv6)
    }
}

/// Metadata keys: those of the service take precedence over those of its node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetadataKeys {
    pub version: Vec<String>,
    pub zone: Vec<String>,
    pub protocol: Vec<String>,
    pub weight: Vec<String>,
    /// Keys for which `true` means TLS if no protocol is given, like Spring Cloud's `secure`.
    pub secure: Vec<String>,
}

impl Default for MetadataKeys {
    fn default() -> Self {
        let keys = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect();
        MetadataKeys {
            version: keys(&["version"]),
            zone: keys(&["zone", "az", "availability_zone"]),
            protocol: keys(&["protocol"]),
            weight: keys(&["weight"]),
            secure: keys(&["secure"]),
        }
    }
}

/// A pattern such as `{tag: "release-*", key: version}`: the text that matches `*` is the value.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TagPattern {
    #[serde(deserialize_with = "one_star")]
    pub tag: String,
    /// The meaning of the value: `version`, `zone`, `protocol`, `weight`, or the name of a label.
    pub key: String,
}

impl TagPattern {
    pub(crate) fn value<'a>(&self, tag: &'a str) -> Option<&'a str> {
        let (before, after) = self.tag.split_once('*')?;
        tag.strip_prefix(before)?.strip_suffix(after).filter(|value| !value.is_empty())
    }
}

/// The meaning of health checks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HealthRules {
    pub warning: WarningAction,
    pub critical: CriticalAction,
    /// Checks that do not count, by ID or name. An example is `serfHealth`, where gossip depends more on the
    /// network than on the application.
    pub ignore_checks: Vec<Pattern>,
}

/// The treatment of an instance with a warning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WarningAction {
    /// Serve the instance with its `Weights.Warning`; a weight of 0 means `drain`.
    #[default]
    Serve,
    Drain,
}

/// The treatment of a critical instance.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CriticalAction {
    /// Keep the instance as unhealthy, so that Envoy sees the share of unhealthy endpoints.
    #[default]
    Unhealthy,
    /// Leave the instance out.
    Drop,
}

fn one_star<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.matches('*').count() == 1 {
        Ok(text)
    } else {
        Err(de::Error::custom(format!("`{text}` needs exactly one `*`, which stands for the value")))
    }
}
