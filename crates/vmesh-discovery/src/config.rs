//! The `discovery:` part of `control.yaml`: a list of sources, each `kind: {..}`.

use std::sync::Arc;

use serde::Deserialize;

use crate::consul::ConsulConfig;
use crate::file::FileConfig;
use crate::guard::GuardConfig;
use crate::plugin::PluginConfig;
use crate::zookeeper::ZookeeperConfig;

/// The configuration of one source, for example `file: {path: /etc/vmesh/services.d}`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceConfig {
    File(Box<FileConfig>),
    Consul(Box<ConsulConfig>),
    Zookeeper(Box<ZookeeperConfig>),
    Plugin(Box<PluginConfig>),
}

impl SourceConfig {
    /// Returns the name of the source in messages and in the API.
    pub fn name(&self) -> Arc<str> {
        match self {
            SourceConfig::File(config) => config.name(),
            SourceConfig::Consul(config) => config.name(),
            SourceConfig::Zookeeper(config) => config.name(),
            SourceConfig::Plugin(config) => config.name(),
        }
    }

    pub fn guard(&self) -> GuardConfig {
        match self {
            SourceConfig::File(config) => config.guard(),
            SourceConfig::Consul(config) => config.guard.clone(),
            SourceConfig::Zookeeper(config) => config.guard.clone(),
            SourceConfig::Plugin(config) => config.guard.clone(),
        }
    }

    /// Reports whether the control plane serves nothing before this source has answered, however long that
    /// takes.
    pub fn required(&self) -> bool {
        match self {
            SourceConfig::File(config) => config.required,
            SourceConfig::Consul(config) => config.required,
            SourceConfig::Zookeeper(config) => config.required,
            SourceConfig::Plugin(config) => config.required,
        }
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use vmesh_model::load::strict;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Control {
        discovery: Vec<SourceConfig>,
    }

    fn read(text: &str) -> String {
        match strict::<Control>("control.yaml", text) {
            Ok(control) => control
                .discovery
                .iter()
                .map(|source| format!("{} {source:?} {:?}\n", source.name(), source.guard().removal_hold))
                .collect(),
            Err(problems) => problems.iter().map(|problem| format!("{problem}\n")).collect(),
        }
    }

    #[test]
    fn a_source_is_a_kind_and_what_it_needs() {
        expect![[r#"
            file:/etc/vmesh/services.d File(FileConfig { name: None, required: true, path: "/etc/vmesh/services.d", format: Auto, watch: true, poll: 10s, resolve_interval: 30s, max_bytes: 16777216, max_files: 10000, guard: GuardConfig { removal_hold: None, confirm_empty: 30s, confirm_shrink: 60s, confirmations: 2, shrink_ratio: 0.5, shrink_min: 5, confirm_unhealthy: 30s, fleet: FleetConfig { endpoints: 0.3, services: 0.2, min: 20, window: 60s }, max_stale: None, allow_empty: [] }, quotes_private_files: false }) Some(0ns)
        "#]].assert_eq(&read("discovery:\n  - file: {path: /etc/vmesh/services.d}\n"));
        expect![[r#"
            file:a File(FileConfig { name: None, required: true, path: "a", format: Linkerd, watch: false, poll: 1s, resolve_interval: 300s, max_bytes: 100, max_files: 5, guard: GuardConfig { removal_hold: Some(5s), confirm_empty: 30s, confirm_shrink: 60s, confirmations: 2, shrink_ratio: 0.5, shrink_min: 5, confirm_unhealthy: 30s, fleet: FleetConfig { endpoints: 0.3, services: 0.2, min: 20, window: 60s }, max_stale: None, allow_empty: [] }, quotes_private_files: false }) Some(5s)
        "#]].assert_eq(&read(
            "discovery:\n  - file: {path: a, format: linkerd, watch: false, poll: 1s, resolve_interval: 5m, max_bytes: 100, max_files: 5, guard: {removal_hold: 5s}}\n",
        ));
    }

    #[test]
    fn what_is_wrong_with_a_source_is_said_at_its_place() {
        expect![[r#"
            control.yaml:2:12: unknown field `pat`, did you mean `path`?
        "#]]
        .assert_eq(&read("discovery:\n  - file: {pat: /etc}\n"));
        expect![[r#"
            control.yaml:2:27: `poll`: 100ms is too short: 1s at least
            control.yaml:2:42: `format`: expected one of `auto`, `native`, `prometheus`, `linkerd` or `smartstack`, found `yaml`
            control.yaml:2:56: unknown field `remove`, did you mean `removal_hold`?
            control.yaml:3:5: `discovery`: expected one of `file`, `consul`, `zookeeper` or `plugin`, found `etcd`
            control.yaml:4:11: `file`: expected a mapping of `name`, `required`, `path`, `format`, `watch`, `poll`, `resolve_interval`, `max_bytes`, `max_files`, `guard`, found the text `a`
        "#]].assert_eq(&read(
            "discovery:\n  - file: {path: a, poll: 100ms, format: yaml, guard: {remove: 1s}}\n  - etcd: {}\n  - file: a\n",
        ));
    }
}
