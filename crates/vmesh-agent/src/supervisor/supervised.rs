//! One Envoy that this supervisor or an earlier one started, and its record on disk.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use tracing::warn;
use vmesh_daemon::fsx;
use vmesh_daemon::report::one_line;

use super::trial::{BinaryVersions, FileStamp};
use super::{orphan, plan};
use crate::envoy::output;
use crate::envoy::process::{Process, ProcessIdentity};

const MAX_RECORD: u64 = 1 << 20;

/// The inputs that an Envoy is started with.
#[derive(Debug, Clone)]
pub(super) struct Launch {
    pub(super) program: PathBuf,
    /// The open executable that the last start used; it survives an upgrade of the package. `None` before the first start.
    pub(super) file: Option<Arc<File>>,
    pub(super) stamp: Option<FileStamp>,
    /// The command line, without the bootstrap path and the hot restart options.
    pub(super) arguments: Vec<String>,
    /// The bootstrap as the agent wrote it.
    pub(super) bootstrap: Arc<str>,
}

/// Identifies a launch: the digest of its bootstrap, and the stamp of its binary.
pub(super) type LaunchId = (String, Option<FileStamp>);

impl Launch {
    pub(super) fn id(&self) -> LaunchId {
        (plan::digest(&self.bootstrap), self.stamp.clone())
    }

    /// Reports whether both launches would start the same Envoy.
    pub(super) fn is_same(&self, other: &Launch) -> bool {
        self.stamp == other.stamp && self.arguments == other.arguments && self.bootstrap == other.bootstrap
    }

    /// Reports whether an Envoy can be started from the open `file`. A script cannot: the kernel passes its path to the interpreter, and
    /// the path may name another file by now.
    pub(super) fn is_startable(&self) -> bool {
        use std::os::unix::fs::FileExt;
        let mut magic = [0; 2];
        self.file.as_ref().is_some_and(|file| file.read_exact_at(&mut magic, 0).is_ok() && magic != *b"#!")
    }

    /// Returns the path to execute. With `again`, this is the open file of the last start, even if `program` names another file by now.
    pub(super) fn executable(&self, again: bool) -> PathBuf {
        match &self.file {
            Some(file) if again => format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into(),
            _ => self.program.clone(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Role {
    Serving,
    /// Envoy starts while another Envoy serves.
    Candidate,
    /// Envoy drains.
    Leaving,
}

/// The record of one Envoy, for the next supervisor.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct EnvoyRecord {
    /// `None` while the process is being started. It can then be found by its bootstrap's path on its command line.
    pub(super) identity: Option<ProcessIdentity>,
    /// Serial number among the Envoys of this run directory. Names the Envoy's files.
    pub(super) number: u64,
    pub(super) role: Role,
    pub(super) base_id: u32,
    pub(super) epoch: u32,
    pub(super) version: Option<String>,
    pub(super) hot_restart: Option<String>,
    /// Reports whether the hot restart sockets are in the supervisor's directory. An Envoy that an old version of vmesh started uses
    /// abstract sockets, on which any local user may answer, so nothing takes over from it by hot restart.
    #[serde(default)]
    pub(super) has_own_sockets: bool,
    pub(super) program: PathBuf,
    pub(super) stamp: Option<FileStamp>,
    pub(super) arguments: Vec<String>,
    /// Its admin interface no longer listens, because a younger Envoy of its line has started.
    pub(super) admin_closed: bool,
    /// The number of its parent (the Envoy that handed over to it by hot restart) while the parent drains.
    #[serde(default)]
    pub(super) parent: Option<u64>,
    /// The parent crashed. This Envoy does not know, and will abort when it next sends a message to its parent.
    #[serde(default)]
    pub(super) parent_lost: bool,
    /// The deadline of the drain: the Envoy is then killed, with any connections it has. Set for draining Envoys only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) until: Option<SystemTime>,
}

impl EnvoyRecord {
    /// Returns the record of an Envoy that is about to be started.
    pub(super) fn new(
        launch: &Launch,
        number: u64,
        line: HotRestartId,
        binary: Option<&BinaryVersions>,
    ) -> EnvoyRecord {
        EnvoyRecord {
            identity: None,
            number,
            role: Role::Candidate,
            base_id: line.base_id,
            epoch: line.epoch,
            version: binary.map(|binary| binary.version.clone()),
            hot_restart: binary.and_then(|binary| binary.hot_restart.clone()),
            has_own_sockets: true,
            program: launch.program.clone(),
            stamp: launch.stamp.clone(),
            arguments: launch.arguments.clone(),
            admin_closed: false,
            parent: None,
            parent_lost: false,
            until: None,
        }
    }

    pub(super) fn pid(&self) -> i32 {
        self.identity.as_ref().map_or(0, |identity| identity.pid)
    }

    /// Returns the process if it still runs.
    pub(super) fn process(&self) -> Option<Process> {
        Process::identified(self.identity.as_ref()?)
    }

    pub(super) fn admin_socket(&self, dir: &Path) -> PathBuf {
        admin_socket(dir, self.number)
    }
}

pub(super) fn admin_socket(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("admin.{number}.sock"))
}

/// Returns the path of the bootstrap that Envoy reads, with the supervisor's changes.
pub(super) fn bootstrap_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("bootstrap.{number}.json"))
}

/// Returns the path of the bootstrap as the agent wrote it.
pub(super) fn source_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("bootstrap.{number}.source.json"))
}

pub(super) struct SupervisedEnvoy {
    pub(super) process: Process,
    pub(super) record: EnvoyRecord,
    pub(super) launch: Launch,
}

/// The identity of an Envoy for hot restart: its line and its epoch in that line.
#[derive(Debug, Clone, Copy)]
pub(super) struct HotRestartId {
    pub(super) base_id: u32,
    pub(super) epoch: u32,
}

impl SupervisedEnvoy {
    /// Starts an Envoy with the complete command line `arguments`. With `again`, it is started from the open file of `launch`, even if the
    /// program's path names another file by now.
    pub(super) async fn start(
        launch: &Launch,
        arguments: &[String],
        again: bool,
        output: &Path,
        record: EnvoyRecord,
    ) -> io::Result<SupervisedEnvoy> {
        let file = match (&launch.file, again) {
            (Some(file), true) => file.clone(),
            _ => Arc::new(File::open(&launch.program)?),
        };
        let program = launch.executable(again);
        let process = orphan::start(&program, &launch.program, arguments, output::writer(output)?).await?;
        let launch = Launch { file: Some(file), ..launch.clone() };
        let record = EnvoyRecord { identity: Some(process.identity()), ..record };
        Ok(SupervisedEnvoy { process, record, launch })
    }

    /// Returns the Envoy that an earlier supervisor started, if it still runs.
    pub(super) fn find(record: EnvoyRecord, dir: &Path) -> Option<SupervisedEnvoy> {
        let process = record.process()?;
        let text = fsx::read_capped(&source_path(dir, record.number), MAX_RECORD).unwrap_or_default();
        let launch = Launch {
            program: record.program.clone(),
            file: File::open(format!("/proc/{}/exe", process.pid())).ok().map(Arc::new),
            stamp: record.stamp.clone(),
            arguments: record.arguments.clone(),
            bootstrap: String::from_utf8_lossy(&text).into(),
        };
        Some(SupervisedEnvoy { process, record, launch })
    }

    pub(super) fn pid(&self) -> i32 {
        self.process.pid()
    }
}

/// Returns this user's processes that have `path` on their command line.
pub(super) fn processes_naming(path: &Path) -> Vec<Process> {
    let names = |words: &[String]| words.iter().any(|word| Path::new(word) == path);
    processes().into_iter().filter(|(_, words)| names(words)).map(|(process, _)| process).collect()
}

/// Returns this user's Envoys whose bootstrap is in `dir`.
pub(super) fn envoys_started_in(dir: &Path) -> Vec<SupervisedEnvoy> {
    processes().into_iter().filter_map(|(process, words)| describe_stray(process, &words, dir)).collect()
}

fn processes() -> Vec<(Process, Vec<String>)> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let user = rustix::process::geteuid().as_raw();
    let known = |pid: i32| {
        // Any user can start a program with any command line, so only this user's processes count.
        let owner = std::fs::metadata(format!("/proc/{pid}")).ok()?.uid();
        if owner != user {
            return None;
        }
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
        Some((pid, words.collect::<Vec<_>>()))
    };
    // Filtered before opening pidfds, since most processes are not Envoys.
    let with_handle = |(pid, words): (i32, Vec<String>)| Some((Process::find(pid)?, words));
    pids.filter_map(known)
        .filter(|(_, words)| words.iter().any(|word| word.ends_with(".json")))
        .filter_map(with_handle)
        .collect()
}

/// Describes an Envoy of which only the command line is known.
fn describe_stray(process: Process, words: &[String], dir: &Path) -> Option<SupervisedEnvoy> {
    let after = |name: &str| words.iter().skip_while(|word| *word != name).nth(1);
    let config = Path::new(after("--config-path")?);
    let number =
        config.file_name()?.to_str()?.strip_prefix("bootstrap.")?.strip_suffix(".json")?.parse().ok()?;
    if config.parent() != Some(dir) {
        return None;
    }
    let number_of = |name: &str| after(name).and_then(|word| word.parse().ok()).unwrap_or_default();
    let launch = Launch {
        program: words.first()?.into(),
        file: None,
        stamp: None,
        arguments: Vec::new(),
        bootstrap: "".into(),
    };
    let line = HotRestartId { base_id: number_of("--base-id"), epoch: number_of("--restart-epoch") };
    let record =
        EnvoyRecord { identity: Some(process.identity()), ..EnvoyRecord::new(&launch, number, line, None) };
    Some(SupervisedEnvoy { process, record, launch })
}

/// The record of all Envoys of a supervisor (`envoys.json`).
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct SupervisorRecord {
    pub(super) last_number: u64,
    pub(super) envoys: Vec<EnvoyRecord>,
}

impl SupervisorRecord {
    pub(super) fn load(path: &Path) -> SupervisorRecord {
        let bytes = match fsx::read_capped(path, MAX_RECORD) {
            Ok(bytes) => bytes,
            Err(error) if error.is_not_found() => return SupervisorRecord::default(),
            Err(error) => {
                warn!(
                    "could not read the record of an earlier supervisor, whose Envoys are not adopted: {}",
                    one_line(&error)
                );
                return SupervisorRecord::default();
            }
        };
        let mut record: SupervisorRecord = serde_json::from_slice(&bytes).unwrap_or_else(|error| {
            warn!("{} is not a record of Envoys, so none are adopted: {error}", path.display());
            SupervisorRecord::default()
        });
        for record in record.envoys.iter_mut().filter(|record| !record.has_own_sockets) {
            record.hot_restart = None;
        }
        record
    }

    pub(super) fn save(&self, path: &Path) {
        let text = serde_json::to_vec_pretty(self).unwrap_or_default();
        if let Err(error) = fsx::write_atomically(path, &text, fsx::PRIVATE) {
            warn!(
                "could not write the record of Envoys, so the next supervisor will not adopt them: {}",
                one_line(&error)
            );
        }
    }
}
