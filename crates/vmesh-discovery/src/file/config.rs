//! The `file:` part of `discovery:`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use vmesh_model::yaml::MAX_TEXT;

use crate::config_values::{half_a_minute, name, seconds, yes};
use crate::format::Format;
use crate::guard::GuardConfig;

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

fn ten_seconds() -> Duration {
    Duration::from_secs(10)
}

fn max_bytes() -> usize {
    MAX_TEXT
}

fn max_files() -> usize {
    10_000
}
