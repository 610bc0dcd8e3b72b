//! The `discovery:` part of `control.yaml`: a list of sources, each `kind: {..}`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer};
use vmesh_model::text::{parse_duration, show_duration};
use vmesh_model::yaml::MAX_TEXT;

use crate::consul::ConsulConfig;
use crate::format::Format;
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

/// The configuration of a file source: a directory of files, or one file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileConfig {
    /// The name of the source in messages and commands. Default: `file:` and the path.
    #[serde(default, deserialize_with = "name")]
    pub name: Option<Arc<str>>,
    /// Decides whether the control plane serves nothing before this source has answered, however long that takes. If
    /// `false`, it waits at most 30 s.
    #[serde(default = "yes")]
    pub required: bool,
    /// A directory, read recursively, or a single file.
    pub path: PathBuf,
    /// The format of the files. By default it is detected from the content of each file.
    #[serde(default)]
    pub format: Format,
    /// Decides whether the kernel reports changes (inotify). If `false`, changes are found by `poll` alone.
    #[serde(default = "yes")]
    pub watch: bool,
    /// The interval at which everything is read again, for file systems that do not report changes made
    /// elsewhere (NFS, overlay, 9p). Default: 10 s; minimum: 1 s.
    #[serde(default = "ten_seconds", deserialize_with = "seconds")]
    pub poll: Duration,
    /// The interval at which host names are resolved again. Default: 30 s; minimum: 1 s.
    #[serde(default = "half_a_minute", deserialize_with = "seconds")]
    pub resolve_interval: Duration,
    /// The size limit of a file in bytes; larger files are not read. Default: 16 MiB.
    #[serde(default = "max_bytes")]
    pub max_bytes: usize,
    /// The limit of the number of files. A directory with more files is assumed to be the wrong directory.
    /// Default: 10,000.
    #[serde(default = "max_files")]
    pub max_files: usize,
    #[serde(default)]
    pub guard: GuardConfig,
    /// Decides whether problems may quote files that are not readable by every user of the host. For tools that run
    /// as the user who reads the messages.
    #[serde(skip)]
    pub quotes_private_files: bool,
}

impl FileConfig {
    /// Returns the default configuration for `path`.
    pub fn of(path: impl Into<PathBuf>) -> FileConfig {
        FileConfig {
            name: None,
            required: true,
            path: path.into(),
            format: Format::Auto,
            watch: true,
            poll: ten_seconds(),
            resolve_interval: half_a_minute(),
            max_bytes: max_bytes(),
            max_files: max_files(),
            guard: GuardConfig::default(),
            quotes_private_files: false,
        }
    }

    pub fn name(&self) -> Arc<str> {
        self.name.clone().unwrap_or_else(|| format!("file:{}", self.path.display()).into())
    }

    /// Returns when removals in these files are believed.
    pub fn guard(&self) -> GuardConfig {
        self.guard.clone().for_files()
    }
}

/// Deserializes the name of a source: a single word, because it is an argument of commands and part of a file
/// name.
pub(crate) fn name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Arc<str>>, D::Error> {
    let name = String::deserialize(deserializer)?;
    let is_word = name.chars().all(|c| c.is_ascii_alphanumeric() || "._:-/".contains(c));
    if is_word && (1..=100).contains(&name.len()) {
        Ok(Some(name.into()))
    } else {
        Err(de::Error::custom(format!(
            "`{}` is no name of a source: 1 to 100 letters, digits, `.`, `_`, `:`, `-` or `/`",
            vmesh_model::yaml::short(&name)
        )))
    }
}

pub(crate) fn yes() -> bool {
    true
}

fn ten_seconds() -> Duration {
    Duration::from_secs(10)
}

pub(crate) fn half_a_minute() -> Duration {
    Duration::from_secs(30)
}

fn max_bytes() -> usize {
    MAX_TEXT
}

fn max_files() -> usize {
    10_000
}

/// Deserializes an interval of at least 1 s. Shorter intervals would add load and no benefit.
pub(crate) fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let interval = parse_duration(&String::deserialize(deserializer)?).map_err(de::Error::custom)?;
    if interval >= Duration::from_secs(1) {
        Ok(interval)
    } else {
        Err(de::Error::custom(format!("{} is too short: 1s at least", show_duration(interval))))
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
