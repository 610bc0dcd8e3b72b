//! `discovery: - plugin: {..}`.

use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer};
use vmesh_model::yaml::MAX_TEXT;

use crate::config::{half_a_minute, seconds};
use crate::guard::GuardConfig;

use super::run::NEVER_PASSED;

/// A program that reads a registry of another kind.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PluginConfig {
    /// The program and its arguments. It runs as the user of the control plane, without a shell.
    #[serde(deserialize_with = "command")]
    pub command: Vec<String>,
    /// What it is called in messages and in the API. Built in: `plugin:` and the program's file name.
    pub name: Option<Arc<str>>,
    /// Without a line for so long it is taken for dead, ended and started again. Built in: 90 s; 1 s at least.
    #[serde(default = "minute_and_a_half", deserialize_with = "seconds")]
    pub silence: Duration,
    /// How often host names are resolved again. Built in: 30 s; 1 s at least.
    #[serde(default = "half_a_minute", deserialize_with = "seconds")]
    pub resolve_interval: Duration,
    /// Longer lines are not read. Built in: 16 MiB.
    #[serde(default = "max_bytes")]
    pub max_bytes: usize,
    /// Variables of the control plane's environment that the program gets besides the usual few (`PATH`, `HOME`, `LANG`, `TZ`,
    /// proxies and certificates). Built in: none.
    #[serde(default, deserialize_with = "pass_env")]
    pub pass_env: Vec<String>,
    #[serde(default)]
    pub guard: GuardConfig,
    /// Whether to wait for it before the first configuration is served. Built in: true.
    #[serde(default = "crate::config::yes")]
    pub required: bool,
}

impl PluginConfig {
    pub fn name(&self) -> Arc<str> {
        let program = self.command.first().map_or("", String::as_str);
        let file = program.rsplit('/').next().unwrap_or(program);
        self.name.clone().unwrap_or_else(|| format!("plugin:{file}").into())
    }

    /// The program, for messages; without its arguments, which may be secrets.
    pub(super) fn program(&self) -> &str {
        self.command.first().map_or("", String::as_str)
    }
}

fn minute_and_a_half() -> Duration {
    Duration::from_secs(90)
}

fn max_bytes() -> usize {
    MAX_TEXT
}

/// Not one text: how a shell would split it is nobody's guess.
fn command<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let words = Vec::<String>::deserialize(deserializer)?;
    if words.first().is_none_or(String::is_empty) {
        return Err(de::Error::custom(
            "a program is missing: write `[/usr/lib/vmesh/plugins/dns-srv, --zone, x]`",
        ));
    }
    Ok(words)
}

/// Names of variables; not those by which systemd and the control plane speak with each other.
fn pass_env<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let names = Vec::<String>::deserialize(deserializer)?;
    for name in &names {
        if NEVER_PASSED.contains(&name.as_str()) {
            return Err(de::Error::custom(format!(
                "`{name}` is how the control plane speaks with systemd: no other program gets it"
            )));
        }
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(de::Error::custom(format!(
                "`{}` is not the name of a variable",
                name.escape_debug()
            )));
        }
    }
    Ok(names)
}
