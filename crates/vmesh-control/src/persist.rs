//! Saves and loads the last good state on disk. [`vmesh_catalog::state`] defines the encoding.

mod sources;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;
use vmesh_catalog::{Names, World, state};
use vmesh_daemon::Stop;
use vmesh_daemon::fsx::{self, FileError, LockError};
use vmesh_discovery::Registrations;
use vmesh_model::load::SavedDocument;
use vmesh_model::{NodeName, NodeReport, Place, Problem};
use xxhash_rust::xxh3::xxh3_64;

use crate::control::Control;
use crate::documents::DocumentsView;
use crate::time::wait_until;
use crate::worlds::{PublishedWorld, Sources};
use sources::SourceFiles;

/// The size limit of a state file, far above the state of any real fleet.
const MAX_BYTES: u64 = 1 << 30;

/// The reason why a part of the state could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PersistError {
    #[error(
        "the state directory {0} cannot be used: it has to exist and belong to the user of vmesh-control"
    )]
    Directory(PathBuf, #[source] FileError),
    #[error("the state directory {0} (`state_dir`) cannot be used: each vmesh-control needs one of its own")]
    Lock(PathBuf, #[source] LockError),
    #[error(
        "the last good state could not be saved: a restart now would serve the state that was saved before"
    )]
    File(#[source] FileError),
    #[error("{0} could not be encoded")]
    Encode(String, #[source] serde_json::Error),
    #[error("{path} is damaged and was set aside as {aside}; this part of the state starts empty")]
    Damaged {
        path: PathBuf,
        aside: PathBuf,
        #[source]
        cause: state::DamagedState,
    },
}

/// The state directory, accessible only to the user of `vmesh-control`: a file per part, and a directory per
/// source.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    dir: PathBuf,
    sources: Arc<SourceFiles>,
    /// The lock that keeps other processes from using the directory.
    _lock: Arc<File>,
}

/// A loaded part of the state, with the modification time of its file.
#[derive(Debug)]
pub(crate) struct LoadedPart<T> {
    pub value: T,
    pub written: SystemTime,
}

impl Disk {
    /// Opens the state directory: creates it if necessary, locks it, removes leftovers of crashed writers,
    /// and checks that it is writable.
    pub(crate) fn open(dir: &Path) -> Result<Disk, PersistError> {
        let unusable = |cause| PersistError::Directory(dir.to_owned(), cause);
        fsx::make_private_dir(dir).map_err(unusable)?;
        let lock = fsx::lock(&dir.join("lock")).map_err(|cause| PersistError::Lock(dir.to_owned(), cause))?;
        fsx::sweep(dir).map_err(unusable)?;
        SourceFiles::sweep(dir).map_err(unusable)?;
        let disk = Disk { dir: dir.to_owned(), sources: Arc::default(), _lock: Arc::new(lock) };
        if let Err(error) = fsx::write_atomically(&dir.join("writable"), b"", fsx::PRIVATE) {
            if !error.is_disk_full() {
                return Err(PersistError::File(error));
            }
            // A full disk must not stop the control plane: the saved state can still be read and served.
            tracing::error!("{}", vmesh_daemon::report::one_line(&error));
        }
        Ok(disk)
    }

    pub(crate) fn save<T: Serialize>(&self, part: &str, value: &T) -> Result<(), PersistError> {
        let text = state::encode(value).map_err(|cause| PersistError::Encode(part.to_owned(), cause))?;
        fsx::write_atomically(&self.file(part), &text, fsx::PRIVATE).map_err(PersistError::File)
    }

    /// Loads a part of the state; `None` if it was never saved.
    pub(crate) fn load<T: DeserializeOwned>(
        &self,
        part: &str,
    ) -> Result<Option<LoadedPart<T>>, PersistError> {
        load_file(&self.file(part), MAX_BYTES)
    }

    /// Writes the files of the source whose content differs from `view`.
    pub(crate) fn save_source(&self, source: &str, view: &Arc<Registrations>) -> Result<(), PersistError> {
        self.sources.save(&self.dir, source, view)
    }

    /// Returns the saved view of a source; `None` if it was never saved. The services in a damaged file are
    /// lost, and the damage is logged.
    pub(crate) fn load_source(
        &self,
        source: &str,
    ) -> Result<Option<LoadedPart<Arc<Registrations>>>, PersistError> {
        self.sources.load(&self.dir, source)
    }

    /// Returns the nodes known before a restart, each with the Unix time when it was last connected.
    pub(crate) fn load_nodes(&self) -> Vec<(NodeReport, u64)> {
        let unix = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut nodes: BTreeMap<NodeName, (NodeReport, u64)> = BTreeMap::new();
        if let Some(LoadedPart { value, written }) = self.load_or_log::<Vec<NodeReport>>(ALL_NODES) {
            nodes.extend(value.into_iter().map(|report| (report.name.clone(), (report, unix(written)))));
        }
        for file in 0..NODE_FILES {
            let Some(LoadedPart { value, written }) = self.load_or_log::<Vec<SavedNode>>(&node_part(file))
            else {
                continue;
            };
            for SavedNode { report, offline_since } in value {
                let since = offline_since.unwrap_or_else(|| unix(written));
                nodes.insert(report.name.clone(), (Arc::unwrap_or_clone(report), since));
            }
        }
        nodes.into_values().collect()
    }

    fn load_or_log<T: DeserializeOwned>(&self, part: &str) -> Option<LoadedPart<T>> {
        self.load(part).unwrap_or_else(|error| {
            tracing::error!("{}", vmesh_daemon::report::one_line(&error));
            None
        })
    }

    fn file(&self, part: &str) -> PathBuf {
        self.dir.join(format!("{part}.json"))
    }
}

/// Reads a part of at most `limit` bytes; `None` if it does not exist. A damaged file is renamed to
/// `.damaged`.
fn load_file<T: DeserializeOwned>(path: &Path, limit: u64) -> Result<Option<LoadedPart<T>>, PersistError> {
    let text = match fsx::read_capped(path, limit) {
        Ok(text) => text,
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(PersistError::File(error)),
    };
    let written = std::fs::metadata(path).and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    match state::decode(&text) {
        Ok(value) => Ok(Some(LoadedPart { value, written })),
        Err(cause) => {
            let path = path.to_owned();
            let aside = path.with_extension("damaged");
            _ = std::fs::rename(&path, &aside);
            Err(PersistError::Damaged { path, aside, cause })
        }
    }
}

/// The delay before a write, during which further changes are collected.
const DEBOUNCE: Duration = Duration::from_millis(300);
/// The pause before the first retry of a failed write. It doubles with each retry, up to [`RETRY_LAST`].
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// The longest pause between retries.
const RETRY_LAST: Duration = Duration::from_secs(15);

/// The result of the last write of the state.
#[derive(Debug, Clone, Default)]
pub(crate) struct WriteStatus {
    /// The error of the last write, if it failed.
    pub(crate) failing: Option<Arc<str>>,
    /// The number of failed writes since the process started.
    pub(crate) failures: u64,
    /// The state directory.
    pub(crate) dir: Arc<str>,
}

impl WriteStatus {
    pub(crate) fn problem(&self) -> Option<Problem> {
        let why = self.failing.as_ref()?;
        let message = format!("{why}; it is tried again every few seconds");
        Some(Problem::new(Place::file(&*self.dir), "the last good state", message))
    }
}

/// One node in a state file.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct SavedNode {
    pub(crate) report: Arc<NodeReport>,
    /// The Unix time, in seconds, since which the node is offline; `None` while it is connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) offline_since: Option<u64>,
}

impl PartialEq for SavedNode {
    /// Compares reports by pointer: an unchanged report keeps its pointer, so it is not written again.
    fn eq(&self, other: &SavedNode) -> bool {
        Arc::ptr_eq(&self.report, &other.report) && self.offline_since == other.offline_since
    }
}

/// The number of files over which nodes are spread, so that a change of one node rewrites one small file.
const NODE_FILES: u64 = 64;
/// The single file of nodes that earlier versions wrote.
const ALL_NODES: &str = "nodes";

fn node_part(file: u64) -> String {
    format!("nodes-{file:02}")
}

fn node_file(name: &NodeName) -> u64 {
    xxh3_64(name.as_str().as_bytes()) % NODE_FILES
}

/// The state file of the service names in use, the earliest first.
pub(crate) const NAMES: &str = "names";

/// The content last written for each part. Parts with an equal pointer are not written again.
#[derive(Default)]
struct WrittenState {
    documents: Option<Arc<[SavedDocument]>>,
    names: Option<Arc<Names>>,
    nodes: BTreeMap<u64, Vec<SavedNode>>,
    /// The single file of earlier versions was removed.
    has_no_old_nodes: bool,
}

/// The pause after a write, as a multiple of the write's duration. While thousands of nodes connect, each
/// write finds more changes, and without the pause the task would write continuously.
const REST_FACTOR: u32 = 9;
const MAX_REST: Duration = Duration::from_secs(10);

/// Saves the last good state after each change, and once more when the process stops.
pub(crate) async fn run(
    disk: Disk,
    sources: Sources,
    documents: watch::Receiver<DocumentsView>,
    mut published: watch::Receiver<PublishedWorld>,
    control: Arc<Control>,
    status: watch::Sender<WriteStatus>,
    mut stop: Stop,
) {
    let mut written = WrittenState::default();
    let mut retry: Option<(Instant, Duration)> = None;
    status.send_modify(|status| status.dir = disk.dir.display().to_string().into());
    loop {
        let stopping = tokio::select! {
            changed = published.changed() => changed.is_err(),
            () = wait_until(retry.map(|(at, _)| at)) => false,
            () = control.fleet().nodes_went_offline() => false,
            () = stop.requested() => true,
        };
        if !stopping {
            tokio::select! {
                () = tokio::time::sleep(DEBOUNCE) => {}
                () = stop.requested() => {}
            }
        }
        let world = published.borrow_and_update().world.clone();
        let documents = documents.borrow().clone();
        let good = sources.last_good();
        let offline = control.fleet().offline_since();
        let to = disk.clone();
        let began = Instant::now();
        let saved = tokio::task::spawn_blocking(move || {
            let failed = save(&to, &good, &documents, &world, &offline, &mut written);
            (written, failed)
        });
        let failed;
        // After a panic `written` is empty, so everything is written again.
        (written, failed) = saved.await.unwrap_or_default();
        retry = failed.as_ref().map(|_| {
            let pause = retry.map_or(RETRY_FIRST, |(_, pause)| (pause * 2).min(RETRY_LAST));
            (Instant::now() + pause, pause)
        });
        publish_status(&status, failed);
        if stopping {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep((began.elapsed() * REST_FACTOR).min(MAX_REST)) => {}
            () = stop.requested() => {}
        }
    }
}

/// Publishes the result of a write, and logs when it changes between success and failure.
fn publish_status(status: &watch::Sender<WriteStatus>, failed: Option<String>) {
    let before = status.borrow().failing.clone();
    match (&before, &failed) {
        (None, Some(why)) => tracing::error!("{why}; it is tried again"),
        (Some(_), None) => tracing::info!("the last good state is on the disk again"),
        _ => {}
    }
    status.send_modify(|status| {
        status.failures += u64::from(failed.is_some());
        status.failing = failed.map(Arc::from);
    });
}

/// Writes the parts that changed. Returns the first error, if any part could not be written.
fn save(
    disk: &Disk,
    good: &[(Arc<str>, Arc<Registrations>)],
    documents: &DocumentsView,
    world: &World,
    offline: &BTreeMap<NodeName, u64>,
    written: &mut WrittenState,
) -> Option<String> {
    let mut failed = None;
    let mut note = |result: Result<(), PersistError>| match result {
        Ok(()) => true,
        Err(error) => {
            failed.get_or_insert_with(|| vmesh_daemon::report::one_line(&error));
            false
        }
    };
    for (name, last_good) in good {
        note(disk.save_source(name, last_good));
    }
    let known = written.documents.as_ref().is_some_and(|known| Arc::ptr_eq(known, &documents.kept));
    if !known && note(disk.save("documents", &documents.kept)) {
        written.documents = Some(documents.kept.clone());
    }
    // The order in which names came into use must survive a restart.
    let known = written.names.as_ref().is_some_and(|known| Arc::ptr_eq(known, &world.names));
    if !known && note(disk.save(NAMES, &world.names.in_order())) {
        written.names = Some(world.names.clone());
    }
    let mut nodes: BTreeMap<u64, Vec<SavedNode>> = (0..NODE_FILES).map(|file| (file, Vec::new())).collect();
    for (name, report) in world.nodes.iter() {
        let kept = SavedNode { report: report.clone(), offline_since: offline.get(name).copied() };
        nodes.entry(node_file(name)).or_default().push(kept);
    }
    let mut has_all = true;
    for (file, nodes) in nodes {
        // An empty list does not need a file.
        let is_same = match written.nodes.get(&file) {
            Some(written) => *written == nodes,
            None => nodes.is_empty() && !disk.file(&node_part(file)).exists(),
        };
        if is_same || note(disk.save(&node_part(file), &nodes)) {
            written.nodes.insert(file, nodes);
        } else {
            has_all = false;
        }
    }
    if has_all && !written.has_no_old_nodes {
        _ = std::fs::remove_file(disk.file(ALL_NODES));
        written.has_no_old_nodes = true;
    }
    failed
}

/// Returns the file name for a source. The name of a source may contain `/` or be `..`.
pub(crate) fn source_part(source: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || c == '.' || c == '-' { c } else { '_' };
    format!("source-{}", source.chars().map(safe).collect::<String>())
}
