//! The mesh documents on the disk: a directory of YAML and JSON files, read again when it changes.
//!
//! What the kernel says of changes is a hint; what counts is the content, compared by its hash. A directory that cannot
//! be read is no reason to forget what it said.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{Notify, watch};
use vmesh_daemon::fsx;
use vmesh_model::load::{DocumentFile, Kept, Library};
use vmesh_model::yaml::MAX_TEXT;
use vmesh_model::{Documents, Place, Problem};
use xxhash_rust::xxh3::Xxh3Default;

use crate::config::{Config, DocumentsConfig};

/// Several files that are written by one tool are one change.
const QUIET: Duration = Duration::from_millis(30);
/// Where the kernel tells nothing (network file systems), this is how late a change is seen.
const POLL: Duration = Duration::from_secs(2);

/// The documents in force, and what is wrong with the others.
#[derive(Debug, Clone, Default)]
pub(crate) struct DocumentsView {
    pub(crate) documents: Arc<Documents>,
    /// Of the texts in force: equal on every replica that has the same.
    pub(crate) hash: u64,
    pub(crate) problems: Arc<[Problem]>,
    /// What is in force, for the next start.
    pub(crate) kept: Arc<[Kept]>,
}

/// Reads the directory for as long as it is polled.
pub(crate) struct Follower {
    dir: Option<PathBuf>,
    library: Library,
    seen: Option<u64>,
}

/// A file as it was read.
struct Raw {
    path: String,
    content: Result<Vec<u8>, String>,
}

impl Follower {
    pub(crate) fn new(config: Option<DocumentsConfig>, kept: Vec<Kept>) -> Follower {
        // Without a directory there are no documents, whatever there was.
        let kept = if config.is_some() { kept } else { Vec::new() };
        Follower { dir: config.map(|config| config.dir), library: Library::restored(kept), seen: None }
    }

    /// The first reading, so that no world is published without the documents.
    pub(crate) async fn read_once(mut self, views: &watch::Sender<DocumentsView>) -> Follower {
        self.read(views).await;
        self
    }

    pub(crate) async fn follow(mut self, views: watch::Sender<DocumentsView>) {
        let Some(dir) = self.dir.clone() else { return std::future::pending().await };
        let news = Arc::new(Notify::new());
        let mut watching = watch_directory(&dir, &news);
        loop {
            tokio::select! {
                () = news.notified() => tokio::time::sleep(QUIET).await,
                () = tokio::time::sleep(POLL) => {
                    // A directory that was replaced is watched no more, and says nothing of it.
                    if watching.as_ref().is_none_or(|(_, of)| *of != identity(&dir)) {
                        watching = watch_directory(&dir, &news);
                    }
                }
            }
            self.read(&views).await;
        }
    }

    async fn read(&mut self, views: &watch::Sender<DocumentsView>) {
        let Some(dir) = self.dir.clone() else { return };
        let files = tokio::task::spawn_blocking(move || read_directory(&dir)).await;
        let files = files.unwrap_or_else(|panic| Err(format!("reading them panicked: {panic}")));
        let hash = hash(&files);
        if self.seen == Some(hash) {
            return;
        }
        self.seen = Some(hash);
        views.send_replace(self.take(files));
    }

    fn take(&mut self, files: Result<Vec<Raw>, String>) -> DocumentsView {
        let (documents, problems) = match &files {
            Ok(files) => {
                let files: Vec<_> = files
                    .iter()
                    .map(|file| DocumentFile {
                        path: &file.path,
                        content: file.content.as_deref().map_err(String::as_str),
                    })
                    .collect();
                self.library.update(&files)
            }
            Err(why) => {
                let dir = self.dir.as_deref().unwrap_or(Path::new(".")).display().to_string();
                let message =
                    format!("the documents could not be read: {why}; what was last read stays in force");
                (self.library.documents(), vec![Problem::new(Place::file(dir), "documents", message)])
            }
        };
        for problem in &problems {
            tracing::warn!("{problem}");
        }
        let kept: Arc<[Kept]> = self.library.last_good().into();
        let mut hash = Xxh3Default::new();
        for kept in kept.iter() {
            hash.update(&(kept.text.len() as u64).to_le_bytes());
            hash.update(kept.text.as_bytes());
        }
        let hash = if kept.is_empty() { 0 } else { hash.digest() };
        DocumentsView { documents, hash, problems: problems.into(), kept }
    }
}

/// The problems of the documents that `config` names, for `--check`.
pub(crate) fn check(config: &Config) -> Vec<Problem> {
    let Some(documents) = &config.documents else { return Vec::new() };
    let mut follower = Follower::new(Some(documents.clone()), Vec::new());
    follower.take(read_directory(&documents.dir)).problems.to_vec()
}

type Identity = Option<(u64, u64)>;

fn identity(dir: &Path) -> Identity {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(dir).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// `None` where the kernel will not tell: then there is the poll.
fn watch_directory(dir: &Path, news: &Arc<Notify>) -> Option<(RecommendedWatcher, Identity)> {
    let news = news.clone();
    let heard = move |event: notify::Result<notify::Event>| {
        // Reading is an event too: heeding it would be a loop.
        if !event.is_ok_and(|event| matches!(event.kind, EventKind::Access(_)) && !is_closed(&event.kind)) {
            news.notify_one();
        }
    };
    let identity = identity(dir);
    let mut watcher = notify::recommended_watcher(heard).ok()?;
    watcher.watch(dir, RecursiveMode::NonRecursive).ok()?;
    Some((watcher, identity))
}

/// Closed after writing: what was written is whole.
fn is_closed(kind: &EventKind) -> bool {
    use notify::event::{AccessKind, AccessMode};
    matches!(kind, EventKind::Access(AccessKind::Close(AccessMode::Write)))
}

/// Every `.yaml`, `.yml` and `.json` file, by name.
fn read_directory(dir: &Path) -> Result<Vec<Raw>, String> {
    let entries = fs::read_dir(dir).map_err(|error| error.to_string())?;
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| error.to_string())?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let wanted = path
            .extension()
            .is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|wanted| extension == *wanted));
        if wanted && !name.starts_with(['.', '#']) {
            // One byte more than the reader takes, so that it is the one to say that it is too much.
            let content = fsx::read_capped(&path, MAX_TEXT as u64 + 1);
            let content = content.map_err(|error| match error.source() {
                Some(cause) => cause.to_string(),
                None => error.to_string(),
            });
            files.push(Raw { path: path.display().to_string(), content });
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

fn hash(files: &Result<Vec<Raw>, String>) -> u64 {
    let mut hash = Xxh3Default::new();
    let mut part = |bytes: &[u8]| {
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    match files {
        Err(why) => part(why.as_bytes()),
        Ok(files) => {
            for file in files {
                part(file.path.as_bytes());
                match &file.content {
                    Ok(bytes) => part(bytes),
                    Err(why) => part(why.as_bytes()),
                }
            }
        }
    }
    hash.digest()
}
