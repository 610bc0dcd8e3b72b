//! The `plugin:` part of `discovery:`.

use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer};
use vmesh_model::yaml::MAX_TEXT;

use crate::config_values::{half_a_minute, seconds, yes};
use crate::guard::GuardConfig;

use super::run::NEVER_PASSED;

/// The configuration of a plug-in source: a program that reads another kind of registry.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PluginConfig {
    /// The program and its arguments. It runs as the user of the control plane, without a shell.
    #[serde(deserialize_with = "command")]
    pub command: Vec<String>,
    /// The name of the source in messages and in the API. Default: `plugin:` and the file name of the
    /// program.
    pub name: Option<Arc<str>>,
    /// The longest time without a line of the program, after which vmesh kills and restarts the program. Default: 90 s; minimum:
    /// 1 s.
    #[serde(default = "minute_and_a_half", deserialize_with = "seconds")]
    pub silence: Duration,
    /// The interval at which host names are resolved again. Default: 30 s; minimum: 1 s.
    #[serde(default = "half_a_minute", deserialize_with = "seconds")]
    pub resolve_interval: Duration,
    /// The length limit of a line in bytes. Default: 16 MiB.
    #[serde(default = "max_bytes")]
    pub max_bytes: usize,
    /// Variables of the control plane's environment that are passed to the program, besides the usual few
    /// (`PATH`, `HOME`, `LANG`, `TZ`, proxies and certificates). Default: none.
    #[serde(default, deserialize_with = "pass_env")]
    pub pass_env: Vec<String>,
    #[serde(default)]
    pub guard: GuardConfig,
    /// Decides whether the control plane serves nothing before this source has answered. Default: `true`.
    #[serde(default = "yes")]
    pub required: bool,
}

impl PluginConfig {
    pub fn name(&self) -> Arc<str> {
        let program = self.command.first().map_or("", String::as_str);
        let file = program.rsplit('/').next().unwrap_or(program);
        self.name.clone().unwrap_or_else(|| format!("plugin:{file}").into())
    }

    /// Returns the program for messages, without its arguments, which may be secrets.
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

/// Deserializes a command as a list of words. A single text is rejected, because it would have to be split as
/// a shell does.
fn command<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let words = Vec::<String>::deserialize(deserializer)?;
    if words.first().is_none_or(String::is_empty) {
        return Err(de::Error::custom(
            "a program is missing: write `[/usr/lib/vmesh/plugins/dns-srv, --zone, x]`",
        ));
    }
    Ok(words)
}

/// Deserializes names of variables. Variables by which systemd and the control plane communicate are
/// rejected.
fn pass_env<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let names = Vec::<String>::deserialize(deserializer)?;
    for name in &names {
        if NEVER_PASSED.contains(&name.as_str()) {
            return Err(de::Error::custom(format!(
                "`{name}` belongs to the control plane's protocol with systemd: it is not passed to a program"
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
