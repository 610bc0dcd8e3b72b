//! The `consul:` of `discovery:`.

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer};
use vmesh_consul::{Addresses, Config, Consistency, MaxConnections, Pace, Tls};
use vmesh_model::text::show_duration;

use crate::config::{name, seconds, yes};
use crate::guard::{GuardConfig, duration};

/// A Consul cluster: all of its services, or some.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConsulConfig {
    /// What it is called in messages and commands. Built in: `consul:` and the datacenters, or the first address.
    #[serde(deserialize_with = "name")]
    pub name: Option<Arc<str>>,
    /// Whether nothing is served before it has answered, however long that takes. Without, 30 s are enough.
    pub required: bool,
    /// One URL or a list: see [`vmesh_consul::Config::address`]. Built in: the local agent.
    pub address: Addresses,
    /// A file with the ACL token. It needs `service_prefix "" { policy = "read" }` and the same for `node_prefix`.
    pub token_file: Option<PathBuf>,
    pub tls: Tls,
    pub namespace: Option<String>,
    pub partition: Option<String>,
    pub max_connections: MaxConnections,

    /// Built in: the one that the agent is in. Of several, a service has the instances of all.
    pub datacenters: Vec<Arc<str>>,
    pub services: Chosen,
    /// Instances without all of these tags are left out.
    pub require_tags: Vec<Pattern>,
    /// Instances with one of these tags are left out.
    pub exclude_tags: Vec<Pattern>,
    /// Instances on nodes without these metadata are left out: `{rack: r7}`, `{rack: "r*"}`.
    pub node_meta: BTreeMap<String, Pattern>,
    /// Instances without these metadata are left out.
    pub service_meta: BTreeMap<String, Pattern>,
    /// What else is taken for an instance besides ordinary services: `connect-proxy`, `mesh-gateway`, ..
    pub kinds: Vec<String>,

    /// Which of its addresses an instance is dialled at.
    pub endpoint_address: AddressKind,
    /// The port of this name, where instances have several (Consul 1.22). Built in: the default one, or the only one.
    pub port_name: Option<String>,
    /// For instances that are registered without a port. Built in: they are left out.
    pub default_port: Option<NonZeroU16>,
    /// Which metadata of services and nodes say what; the first that is there counts.
    pub map: Mapping,
    /// Which tags say what, before those that are built in.
    pub tag_patterns: Vec<TagPattern>,
    /// For instances whose weight is not said by metadata or a tag, in place of Consul's own.
    pub default_weight: Option<u32>,
    pub health: HealthRules,

    /// Who may answer. Confirmations are always `consistent`.
    pub consistency: Reading,
    /// A stale answer that may be older is asked for again, of the leader.
    #[serde(deserialize_with = "duration")]
    pub max_stale: Duration,
    /// How long Consul holds back an answer if there is no news. Built in: 60 s; from 1 s to 10 min.
    #[serde(deserialize_with = "wait")]
    pub wait: Duration,
    /// How often host names are resolved again. Built in: 30 s; 1 s at least.
    #[serde(deserialize_with = "seconds")]
    pub resolve_interval: Duration,
    pub guard: GuardConfig,
}

impl Default for ConsulConfig {
    fn default() -> Self {
        ConsulConfig {
            name: None,
            required: yes(),
            address: Addresses::default(),
            token_file: None,
            tls: Tls::default(),
            namespace: None,
            partition: None,
            max_connections: MaxConnections::default(),
            datacenters: Vec::new(),
            services: Chosen::default(),
            require_tags: Vec::new(),
            exclude_tags: Vec::new(),
            node_meta: BTreeMap::new(),
            service_meta: BTreeMap::new(),
            kinds: Vec::new(),
            endpoint_address: AddressKind::default(),
            port_name: None,
            default_port: None,
            map: Mapping::default(),
            tag_patterns: Vec::new(),
            default_weight: None,
            health: HealthRules::default(),
            consistency: Reading::default(),
            max_stale: Duration::from_secs(10),
            wait: Duration::from_secs(60),
            resolve_interval: Duration::from_secs(30),
            guard: GuardConfig::default(),
        }
    }
}

impl ConsulConfig {
    pub fn name(&self) -> Arc<str> {
        match (&self.name, self.datacenters.is_empty()) {
            (Some(name), _) => name.clone(),
            (None, false) => format!("consul:{}", self.datacenters.join("/")).into(),
            (None, true) => {
                let address = self.address.first().map(vmesh_consul::Address::authority).unwrap_or_default();
                format!("consul:{address}").into()
            }
        }
    }

    /// What the client needs of it.
    pub fn client(&self) -> Config {
        Config {
            address: self.address.clone(),
            token_file: self.token_file.clone(),
            tls: self.tls.clone(),
            namespace: self.namespace.clone(),
            partition: self.partition.clone(),
            max_connections: self.max_connections,
        }
    }

    pub(crate) fn pace(&self) -> Pace {
        let consistency = match self.consistency {
            Reading::Stale => Consistency::Stale,
            Reading::Default => Consistency::Leader,
            Reading::Consistent => Consistency::Consistent,
        };
        Pace { wait: self.wait, consistency, max_stale: self.max_stale }
    }
}

/// Services by their names, in lower case.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Chosen {
    /// Built in: all but Consul itself.
    pub include: Vec<Pattern>,
    pub exclude: Vec<Pattern>,
}

impl Default for Chosen {
    fn default() -> Self {
        Chosen { include: vec![Pattern("*".into())], exclude: Vec::new() }
    }
}

impl Chosen {
    /// `consul` is chosen only by its very name.
    pub fn has(&self, name: &str) -> bool {
        let included = |pattern: &Pattern| match name {
            "consul" => pattern.0.eq_ignore_ascii_case(name),
            _ => pattern.matches_ignoring_case(name),
        };
        self.include.iter().any(included) && !self.exclude.iter().any(|p| p.matches_ignoring_case(name))
    }
}

/// A text in which each `*` stands for any text, also none.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(transparent)]
pub struct Pattern(pub Arc<str>);

impl Pattern {
    pub fn matches(&self, text: &str) -> bool {
        matches(self.0.as_bytes(), text.as_bytes())
    }

    fn matches_ignoring_case(&self, text: &str) -> bool {
        matches(self.0.to_ascii_lowercase().as_bytes(), text.to_ascii_lowercase().as_bytes())
    }
}

/// Linear for one star, quadratic at worst: a star takes as little as it can, and more only if what follows asks for it.
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

/// Which of its addresses an instance is dialled at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AddressKind {
    /// That of the service, or else that of its node: what Consul's own DNS says.
    #[default]
    Service,
    Node,
    Lan,
    Wan,
    LanIpv4,
    LanIpv6,
    WanIpv4,
    WanIpv6,
    /// What Consul's own mesh would intercept.
    Virtual,
}

impl AddressKind {
    /// Its key in `TaggedAddresses`.
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

/// Keys of metadata: those of the service are looked at first, then those of its node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mapping {
    pub version: Vec<String>,
    pub zone: Vec<String>,
    pub protocol: Vec<String>,
    pub weight: Vec<String>,
    /// `true` means TLS where no protocol is said: Spring Cloud's `secure`.
    pub secure: Vec<String>,
}

impl Default for Mapping {
    fn default() -> Self {
        let keys = |keys: &[&str]| keys.iter().map(|key| (*key).to_owned()).collect();
        Mapping {
            version: keys(&["version"]),
            zone: keys(&["zone", "az", "availability_zone"]),
            protocol: keys(&["protocol"]),
            weight: keys(&["weight"]),
            secure: keys(&["secure"]),
        }
    }
}

/// `{tag: "release-*", key: version}`: what the `*` stands for is the value.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TagPattern {
    #[serde(deserialize_with = "one_star")]
    pub tag: String,
    /// `version`, `zone`, `protocol`, `weight`, or the name of a label.
    pub key: String,
}

impl TagPattern {
    pub(crate) fn value<'a>(&self, tag: &'a str) -> Option<&'a str> {
        let (before, after) = self.tag.split_once('*')?;
        tag.strip_prefix(before)?.strip_suffix(after).filter(|value| !value.is_empty())
    }
}

/// What checks mean.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HealthRules {
    pub warning: Warning,
    pub critical: Critical,
    /// Checks that do not count, by ID or name: `serfHealth`, where gossip says more about the network than about
    /// the application.
    pub ignore_checks: Vec<Pattern>,
}

/// What becomes of an instance with a warning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Warning {
    /// It is served, with its `Weights.Warning`; 0 is `drain`.
    #[default]
    Serve,
    Drain,
}

/// What becomes of an instance that is critical.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Critical {
    /// It stays, as unhealthy: Envoy has to see how many of all are ill.
    #[default]
    Unhealthy,
    /// It is not there.
    Drop,
}

/// Who may answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reading {
    /// Any server, also while there is no leader; no older than `max_stale`.
    #[default]
    Stale,
    /// The leader.
    Default,
    /// The leader, confirmed by a majority each time.
    Consistent,
}

fn one_star<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.matches('*').count() == 1 {
        Ok(text)
    } else {
        Err(de::Error::custom(format!("`{text}` has to have one `*`, which stands for the value")))
    }
}

fn wait<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let wait = seconds(deserializer)?;
    if wait <= vmesh_consul::client::MAX_WAIT {
        Ok(wait)
    } else {
        Err(de::Error::custom(format!("{} is too long: 10m at most", show_duration(wait))))
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use vmesh_model::load::strict;

    use super::*;

    fn read(text: &str) -> String {
        match strict::<ConsulConfig>("control.yaml", text) {
            Ok(config) => format!("{} {:?} {:?}\n", config.name(), config.client(), config.services),
            Err(problems) => problems.iter().map(|problem| format!("{problem}\n")).collect(),
        }
    }

    #[test]
    fn a_consul_is_an_address_and_what_differs_from_what_is_built_in() {
        expect![[r#"
            consul:dc1 Config { address: Addresses([Http { host: "127.0.0.1", port: 8500 }]), token_file: Some("/etc/vmesh/consul.token"), tls: Tls { ca_file: None, cert_file: None, key_file: None, server_name: None }, namespace: None, partition: None, max_connections: MaxConnections(160) } Chosen { include: [Pattern("*")], exclude: [] }
        "#]]
        .assert_eq(&read(
            "{address: \"http://127.0.0.1:8500\", token_file: /etc/vmesh/consul.token, datacenters: [dc1]}",
        ));
        expect![[r#"
            prod Config { address: Addresses([Https { host: "a", port: 8501 }, Unix("/run/c")]), token_file: None, tls: Tls { ca_file: Some("ca"), cert_file: None, key_file: None, server_name: None }, namespace: None, partition: None, max_connections: MaxConnections(10) } Chosen { include: [Pattern("pay*")], exclude: [Pattern("*-management")] }
        "#]]
        .assert_eq(&read(
            "{name: prod, address: [\"https://a\", \"unix:/run/c\"], max_connections: 10, tls: {ca_file: ca},\n \
             services: {include: [pay*], exclude: [\"*-management\"]}, require_tags: [v1], node_meta: {rack: r7},\n \
             endpoint_address: wan_ipv4, port_name: http, default_port: 80, default_weight: 50, wait: 5m,\n \
             map: {zone: [rack]}, tag_patterns: [{tag: \"release-*\", key: version}], kinds: [connect-proxy],\n \
             health: {warning: drain, critical: drop, ignore_checks: [serfHealth]}, consistency: default,\n \
             max_stale: 2s, resolve_interval: 10s, guard: {removal_hold: 5s}}",
        ));
    }

    #[test]
    fn what_is_wrong_with_it_is_said_at_its_place() {
        expect![[r#"
            control.yaml:1:2: unknown field `adress`, did you mean `address`?
            control.yaml:1:19: `wait`: 20m is too long: 10m at most
            control.yaml:1:45: `tag`: `a` has to have one `*`, which stands for the value
            control.yaml:1:75: `max_connections`: 1 is too few: 4 at least
            control.yaml:1:96: `warning`: expected one of `serve` or `drain`, found `no`
            control.yaml:1:114: `consistency`: expected one of `stale`, `default` or `consistent`, found `strong`
            control.yaml:1:140: `endpoint_address`: expected one of `service`, `node`, `lan`, `wan`, `lan_ipv4`, `lan_ipv6`, `wan_ipv4`, `wan_ipv6` or `virtual`, found `here`
        "#]].assert_eq(&read(
            "{adress: a, wait: 20m, tag_patterns: [{tag: a, key: b}], max_connections: 1, health: {warning: no}, \
             consistency: strong, endpoint_address: here}",
        ));
        expect![[r#"
            control.yaml:1:11: `address`: `127.0.0.1:8500` is not an address of Consul: it has no scheme; write `http://host:8500`, `https://host:8501` or `unix:/path/of/socket`
        "#]].assert_eq(&read("{address: \"127.0.0.1:8500\"}"));
    }

    #[test]
    fn a_star_is_any_text() {
        let matches = |pattern: &str, text: &str| Pattern(pattern.into()).matches(text);
        for (pattern, text) in [
            ("*", ""),
            ("*", "a"),
            ("a*", "a"),
            ("*-x", "a-x-x"),
            ("a*b*c", "a1b2b3c"),
            ("ab", "ab"),
            ("**", "a"),
        ] {
            assert!(matches(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in
            [("a", ""), ("a*", "ba"), ("*-x", "a-x-"), ("a*b*c", "a1c"), ("", "a"), ("A", "a")]
        {
            assert!(!matches(pattern, text), "{pattern} {text}");
        }
        let chosen = Chosen::default();
        assert!(chosen.has("consul-exporter") && !chosen.has("consul"));
        let chosen = Chosen { include: vec![Pattern("Pay*".into()), Pattern("consul".into())], ..chosen };
        assert!(chosen.has("pay") && chosen.has("consul") && !chosen.has("orders"));
    }
}
