//! Reads documents from a directory: every `.yaml`, `.yml` and `.json` file, in alphabetical order, and key sets (`.jwks`).
//!
//! Change notifications of the kernel only trigger a read; the content decides. If the directory cannot be
//! read, the last documents stay in force.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use rustix::fs::{Mode, OFlags};
use tokio::sync::Notify;
use vmesh_discovery::file::privacy::is_public;
use vmesh_model::yaml::MAX_TEXT;

use super::DocumentText;

/// The delay after a notification, so that several files written by one tool are read as one change.
const QUIET: Duration = Duration::from_millis(30);
/// The interval of reads without a notification, for file systems that send none, such as network file
/// systems.
const POLL: Duration = Duration::from_secs(2);

/// A directory, and the watch that reports its changes.
pub(super) struct DirectorySource {
    path: PathBuf,
    changes: Arc<Notify>,
    watcher: Option<(RecommendedWatcher, DirectoryId)>,
    has_been_read: bool,
}

impl DirectorySource {
    pub(super) fn new(path: PathBuf) -> DirectorySource {
        DirectorySource { path, changes: Arc::default(), watcher: None, has_been_read: false }
    }

    /// Returns the files: at once in the first call, later when they may have changed.
    pub(super) async fn next(&mut self) -> Result<Vec<DocumentText>, String> {
        if self.has_been_read {
            tokio::select! {
                () = self.changes.notified() => tokio::time::sleep(QUIET).await,
                () = tokio::time::sleep(POLL) => {}
            }
        }
        // The watch is set up before the read, so that no change is missed. A watch on a directory that was
        // replaced reports nothing, so it is renewed.
        if self.watcher.as_ref().is_none_or(|(_, of)| *of != directory_id(&self.path)) {
            self.watcher = watch_directory(&self.path, &self.changes);
        }
        self.has_been_read = true;
        let path = self.path.clone();
        let files = tokio::task::spawn_blocking(move || read(&path)).await;
        files.unwrap_or_else(|panic| Err(format!("reading them panicked: {panic}")))
    }
}

type DirectoryId = Option<(u64, u64)>;

fn directory_id(dir: &Path) -> DirectoryId {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(dir).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Watches a directory; `None` if the kernel cannot, in which case only the poll remains.
fn watch_directory(dir: &Path, changes: &Arc<Notify>) -> Option<(RecommendedWatcher, DirectoryId)> {
    let changes = changes.clone();
    let on_event = move |event: notify::Result<notify::Event>| {
        // Our own read also causes events, which must not trigger another read.
        if !event.is_ok_and(|event| matches!(event.kind, EventKind::Access(_)) && !is_closed(&event.kind)) {
            changes.notify_one();
        }
    };
    let id = directory_id(dir);
    let mut watcher = notify::recommended_watcher(on_event).ok()?;
    watcher.watch(dir, RecursiveMode::NonRecursive).ok()?;
    Some((watcher, id))
}

/// Reports whether the event closes a file after writing, when its content is complete.
fn is_closed(kind: &EventKind) -> bool {
    use notify::event::{AccessKind, AccessMode};
    matches!(kind, EventKind::Access(AccessKind::Close(AccessMode::Write)))
}

/// Reads at most `limit` bytes of a file, and reports whether every user of the host may read it. The open is
/// non-blocking, because opening a FIFO without a writer would wait forever.
fn read_file(path: &Path, limit: u64) -> std::io::Result<(Vec<u8>, bool)> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(std::io::Error::other("it is not a file"));
    }
    let is_public = is_public(&file, &metadata, path);
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok((bytes, is_public))
}

/// Returns every `.yaml`, `.yml`, `.json` and `.jwks` file, sorted by name.
pub(super) fn read(dir: &Path) -> Result<Vec<DocumentText>, String> {
    let entries = fs::read_dir(dir).map_err(|error| error.to_string())?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| error.to_string())?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let wanted = path.extension().is_some_and(|extension| {
            ["yaml", "yml", "json", "jwks"].iter().any(|wanted| extension == *wanted)
        });
        if wanted && !name.starts_with(['.', '#']) {
            // One byte more than the parser accepts, so that the parser reports the excess.
            let (content, is_public) = match read_file(&path, MAX_TEXT as u64 + 1) {
                Ok((content, is_public)) => (Ok(content), is_public),
                Err(error) => (Err(error.to_string()), true),
            };
            files.push(DocumentText { path: path.display().to_string(), content, is_public });
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}
