//! The facts about an instance that its tags and metadata state.

use std::collections::BTreeMap;

use vmesh_model::{Labels, Protocol};

use super::rules::InstanceRules;
use crate::format::RawWeight;

/// The facts about an instance in its tags and metadata.
#[derive(Default)]
pub(super) struct InstanceFacts<'a> {
    pub(super) version: Option<&'a str>,
    pub(super) zone: Option<&'a str>,
    pub(super) protocol: Option<&'a str>,
    pub(super) weight: Option<&'a str>,
    pub(super) secure: bool,
    pub(super) fraction: Option<f64>,
    pub(super) port: Option<&'a str>,
    pub(super) labels: Labels,
}

impl<'a> InstanceFacts<'a> {
    /// Collects the facts: metadata precedes tags, and the service precedes its node.
    pub(super) fn of(
        tags: &'a [String],
        meta: &'a BTreeMap<String, String>,
        node_meta: &'a BTreeMap<String, String>,
        rules: &InstanceRules,
    ) -> InstanceFacts<'a> {
        let map = &rules.map;
        let mut facts = InstanceFacts::default();
        let found = |keys: &[String]| {
            let of = |meta: &'a BTreeMap<String, String>| {
                keys.iter()
                    .find_map(|key| meta.get(key))
                    .map(String::as_str)
                    .filter(|value| !value.is_empty())
            };
            of(meta).or_else(|| of(node_meta))
        };
        facts.version = found(&map.version);
        facts.zone = found(&map.zone);
        facts.protocol = found(&map.protocol);
        facts.weight = found(&map.weight);
        facts.secure = found(&map.secure).is_some_and(|value| value.eq_ignore_ascii_case("true"));
        let mapped = [&map.version, &map.zone, &map.protocol, &map.weight, &map.secure];
        for (key, value) in meta {
            if !mapped.iter().any(|keys| keys.contains(key)) {
                facts.labels.insert(key.as_str().into(), value.as_str().into());
            }
        }
        for tag in tags {
            facts.tag(tag, rules);
        }
        facts
    }

    fn tag(&mut self, tag: &'a str, rules: &InstanceRules) {
        if let Some(route) = tag.strip_prefix("urlprefix-") {
            self.fabio(route);
            return;
        }
        if let Some(label) = tag.strip_prefix("traefik.") {
            self.traefik(label);
            return;
        }
        for pattern in &rules.tag_patterns {
            if let Some(value) = pattern.value(tag) {
                self.set(&pattern.key, value);
                return;
            }
        }
        if let Some((key, value)) = tag.split_once(['=', ':'])
            && !value.is_empty()
            && ["version", "zone", "az", "protocol", "proto", "weight"].contains(&key)
        {
            let key = match key {
                "az" => "zone",
                "proto" => "protocol",
                key => key,
            };
            self.set(key, value);
            return;
        }
        if tag.len() > 1 && tag.starts_with('v') && tag.as_bytes().get(1).is_some_and(u8::is_ascii_digit) {
            self.set("version", tag);
        }
        // Labels have values and tags do not, so the value is `true`.
        self.labels.insert(format!("tag.{tag}").into(), "true".into());
    }

    /// Sets a field unless it is set: metadata and earlier tags take precedence.
    fn set(&mut self, key: &str, value: &'a str) {
        let field = match key {
            "version" => &mut self.version,
            "zone" => &mut self.zone,
            "protocol" => &mut self.protocol,
            "weight" => &mut self.weight,
            label => {
                self.labels.entry(label.into()).or_insert_with(|| value.into());
                return;
            }
        };
        field.get_or_insert(value);
    }

    /// Parses a tag such as `urlprefix-host/path proto=grpc weight=0.3`. The host and path belong to routes
    /// and are ignored here.
    fn fabio(&mut self, route: &'a str) {
        for option in route.split_whitespace().skip(1) {
            match option.split_once('=') {
                Some(("proto", value)) => self.set("protocol", value),
                Some(("weight", value)) => {
                    let fraction = RawWeight::parse(value).ok().map(|share| share.0);
                    self.fraction = self.fraction.or(fraction.filter(|f| *f > 0.0 && *f <= 1.0));
                }
                _ => {}
            }
        }
    }

    /// Parses `traefik.http.services.<name>.loadbalancer.server.scheme=h2c`, and the same with `.port`.
    fn traefik(&mut self, label: &'a str) {
        let Some((key, value)) = label.split_once('=') else { return };
        let key = key.to_ascii_lowercase();
        if !key.contains(".services.") {
            return;
        }
        if key.ends_with(".loadbalancer.server.scheme") {
            self.set("protocol", value);
        } else if key.ends_with(".loadbalancer.server.port") {
            self.port.get_or_insert(value);
        }
    }
}

/// Parses the name of a protocol as fleets write it. HTTP over TLS is passed through as TLS, since its
/// requests are not visible.
pub(in crate::format) fn protocol(text: &str) -> Option<Protocol> {
    let text = text.to_ascii_lowercase();
    Some(match text.as_str() {
        "http1" | "http/1.1" | "http1.1" | "ws" => Protocol::Http,
        "h2" | "h2c" | "http/2" => Protocol::Http2,
        "https" | "grpcs" | "ssl" | "wss" => Protocol::Tls,
        "postgresql" => Protocol::Postgres,
        "mongodb" => Protocol::Mongo,
        other => return other.parse().ok(),
    })
}
