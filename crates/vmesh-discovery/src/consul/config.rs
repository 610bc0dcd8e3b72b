//! The `consul:` part of `discovery:`.

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer};
use vmesh_consul::{Addresses, Config, Consistency, MaxConnections, Tls, WatchOptions};
use vmesh_model::text::show_duration;

use crate::config_values::{duration, name, seconds, yes};
use crate::format::consul::rules::{AddressKind, HealthRules, InstanceRules, MetadataKeys, TagPattern};
use crate::guard::GuardConfig;
use crate::pattern::Pattern;

/// The configuration of a Consul source: all services of a cluster, or some.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConsulConfig {
    /// The name of the source in messages and commands. Default: `consul:` and the datacenters, or the first
    /// address.
    #[serde(deserialize_with = "name")]
    pub name: Option<Arc<str>>,
    /// Decides whether the control plane serves nothing before this source has answered, however long that takes. If
    /// `false`, it waits at most 30 s.
    pub required: bool,
    /// One URL or a list: see [`vmesh_consul::Config::address`]. Default: the local agent.
    pub address: Addresses,
    /// A file with the ACL token. The token needs `service_prefix "" { policy = "read" }` and the same for
    /// `node_prefix`.
    pub token_file: Option<PathBuf>,
    pub tls: Tls,
    pub namespace: Option<String>,
    pub partition: Option<String>,
    pub max_connections: MaxConnections,

    /// The datacenters to read. Default: the datacenter of the agent. With several, a service has the
    /// instances of all.
    pub datacenters: Vec<Arc<str>>,
    pub services: ServiceFilter,
    /// Required tags: an instance that lacks one of these tags is left out.
    pub require_tags: Vec<Pattern>,
    /// Excluded tags: an instance with one of these tags is left out.
    pub exclude_tags: Vec<Pattern>,
    /// Metadata that the node of an instance must have, for example `{rack: r7}` or `{rack: "r*"}`.
    pub node_meta: BTreeMap<String, Pattern>,
    /// Metadata that an instance must have.
    pub service_meta: BTreeMap<String, Pattern>,
    /// Kinds of services to read besides ordinary ones, for example `connect-proxy` or `mesh-gateway`.
    pub kinds: Vec<String>,

    /// The address at which instances are dialled.
    pub endpoint_address: AddressKind,
    /// The name of the port to use, for instances with several (Consul 1.22). Default: the default port, or
    /// the only one.
    pub port_name: Option<String>,
    /// The port of instances that are registered without one. By default they are left out.
    pub default_port: Option<NonZeroU16>,
    /// The metadata keys with a meaning; the first key that is present counts.
    pub map: MetadataKeys,
    /// The tag patterns with a meaning, which take precedence over the built-in ones.
    pub tag_patterns: Vec<TagPattern>,
    /// The weight of instances without a weight in metadata or tags, instead of Consul's own weight.
    pub default_weight: Option<u32>,
    pub health: HealthRules,

    /// The consistency of queries. Confirming reads always use `consistent`.
    pub consistency: ConsistencyMode,
    /// The age above which a stale answer is requested again from the leader.
    #[serde(deserialize_with = "duration")]
    pub max_stale: Duration,
    /// The longest time for which Consul may hold back an answer without changes. Default: 60 s; from 1 s to 10 min.
    #[serde(deserialize_with = "wait")]
    pub wait: Duration,
    /// The interval at which host names are resolved again. Default: 30 s; minimum: 1 s.
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
            services: ServiceFilter::default(),
            require_tags: Vec::new(),
            exclude_tags: Vec::new(),
            node_meta: BTreeMap::new(),
            service_meta: BTreeMap::new(),
            kinds: Vec::new(),
            endpoint_address: AddressKind::default(),
            port_name: None,
            default_port: None,
            map: MetadataKeys::default(),
            tag_patterns: Vec::new(),
            default_weight: None,
            health: HealthRules::default(),
            consistency: ConsistencyMode::default(),
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

    /// Returns the configuration of the HTTP client.
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

    /// Returns the rules by which the answers of Consul are read.
    pub fn instance_rules(&self) -> InstanceRules {
        InstanceRules {
            require_tags: self.require_tags.clone(),
            exclude_tags: self.exclude_tags.clone(),
            node_meta: self.node_meta.clone(),
            service_meta: self.service_meta.clone(),
            kinds: self.kinds.clone(),
            endpoint_address: self.endpoint_address,
            port_name: self.port_name.clone(),
            default_port: self.default_port,
            map: self.map.clone(),
            tag_patterns: self.tag_patterns.clone(),
            default_weight: self.default_weight,
            health: self.health.clone(),
        }
    }

    pub(crate) fn pace(&self) -> WatchOptions {
        let consistency = match self.consistency {
            ConsistencyMode::Stale => Consistency::Stale,
            ConsistencyMode::Default => Consistency::Leader,
            ConsistencyMode::Consistent => Consistency::Consistent,
        };
        WatchOptions { wait: self.wait, consistency, max_stale: self.max_stale }
    }
}

/// A filter of services by their lower-case names.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServiceFilter {
    /// The services to read. Default: all but Consul itself.
    pub include: Vec<Pattern>,
    pub exclude: Vec<Pattern>,
}

impl Default for ServiceFilter {
    fn default() -> Self {
        ServiceFilter { include: vec![Pattern("*".into())], exclude: Vec::new() }
    }
}

impl ServiceFilter {
    /// Reports whether the service `name` is read. `consul` matches only a pattern that is equal to it.
    pub fn has(&self, name: &str) -> bool {
        let included = |pattern: &Pattern| match name {
            "consul" => pattern.0.eq_ignore_ascii_case(name),
            _ => pattern.matches_ignoring_case(name),
        };
        self.include.iter().any(included) && !self.exclude.iter().any(|p| p.matches_ignoring_case(name))
    }
}

/// The consistency of queries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsistencyMode {
    /// Any server may answer, even while there is no leader, if its data is no older than `max_stale`.
    #[default]
    Stale,
    /// The leader answers.
    Default,
    /// The leader answers, after a majority has confirmed its leadership.
    Consistent,
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
            consul:dc1 Config { address: Addresses([Http { host: "127.0.0.1", port: 8500 }]), token_file: Some("/etc/vmesh/consul.token"), tls: Tls { ca_file: None, cert_file: None, key_file: None, server_name: None }, namespace: None, partition: None, max_connections: MaxConnections(160) } ServiceFilter { include: [Pattern("*")], exclude: [] }
        "#]]
        .assert_eq(&read(
            "{address: \"http://127.0.0.1:8500\", token_file: /etc/vmesh/consul.token, datacenters: [dc1]}",
        ));
        expect![[r#"
            prod Config { address: Addresses([Https { host: "a", port: 8501 }, Unix("/run/c")]), token_file: None, tls: Tls { ca_file: Some("ca"), cert_file: None, key_file: None, server_name: None }, namespace: None, partition: None, max_connections: MaxConnections(10) } ServiceFilter { include: [Pattern("pay*")], exclude: [Pattern("*-management")] }
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
            control.yaml:1:45: `tag`: `a` needs exactly one `*`, which stands for the value
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
        let chosen = ServiceFilter::default();
        assert!(chosen.has("consul-exporter") && !chosen.has("consul"));
        let chosen =
            ServiceFilter { include: vec![Pattern("Pay*".into()), Pattern("consul".into())], ..chosen };
        assert!(chosen.has("pay") && chosen.has("consul") && !chosen.has("orders"));
    }
}
