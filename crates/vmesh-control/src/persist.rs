//! The last good state on disk. What is encoded is [`vmesh_catalog::state`]'s; here is the disk.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use vmesh_catalog::{World, state};
use vmesh_daemon::Stop;
use vmesh_daemon::fsx::{self, FileError};
use vmesh_discovery::Registrations;
use vmesh_model::load::Kept;

use crate::documents::DocumentsView;
use crate::worlds::{Published, Sources};

/// Far above any real fleet's state; a file beyond it is not one of ours.
const MAX_BYTES: u64 = 1 << 30;

/// Why a part of the state could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PersistError {
    #[error(
        "the state directory {0} cannot be used: it has to exist and belong to the user of vmesh-control"
    )]
    Directory(PathBuf, #[source] std::io::Error),
    #[error("the last good state could not be kept: a restart now would serve what was kept before")]
    File(#[source] FileError),
    #[error("{0} could not be encoded")]
    Encode(String, #[source] serde_json::Error),
    #[error("{path} is damaged and was set aside as {aside}; this part of the state starts empty")]
    Damaged {
        path: PathBuf,
        aside: PathBuf,
        #[source]
        cause: state::Damaged,
    },
}

/// The directory of the state: one file per part, for this user alone.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    dir: PathBuf,
}

/// A part of the state, and when it was written.
#[derive(Debug)]
pub(crate) struct Loaded<T> {
    pub value: T,
    pub written: SystemTime,
}

impl Disk {
    /// Makes `dir` if there is none, and finds out now whether it can be written.
    pub(crate) fn open(dir: &Path) -> Result<Disk, PersistError> {
        std::fs::create_dir_all(dir).map_err(|cause| PersistError::Directory(dir.to_owned(), cause))?;
        fsx::write_atomically(&dir.join("writable"), b"", fsx::PRIVATE).map_err(PersistError::File)?;
        Ok(Disk { dir: dir.to_owned() })
    }

    pub(crate) fn save<T: Serialize>(&self, part: &str, value: &T) -> Result<(), PersistError> {
        let text = state::encode(value).map_err(|cause| PersistError::Encode(part.to_owned(), cause))?;
        fsx::write_atomically(&self.file(part), &text, fsx::PRIVATE).map_err(PersistError::File)
    }

    /// `None` if it was never saved.
    pub(crate) fn load<T: DeserializeOwned>(&self, part: &str) -> Result<Option<Loaded<T>>, PersistError> {
        let path = self.file(part);
        let text = match fsx::read_capped(&path, MAX_BYTES) {
            Ok(text) => text,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(PersistError::File(error)),
        };
        let written =
            std::fs::metadata(&path).and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        match state::decode(&text) {
            Ok(value) => Ok(Some(Loaded { value, written })),
            Err(cause) => {
                let aside = path.with_extension("damaged");
                _ = std::fs::rename(&path, &aside);
                Err(PersistError::Damaged { path, aside, cause })
            }
        }
    }

    fn file(&self, part: &str) -> PathBuf {
        self.dir.join(format!("{part}.json"))
    }
}

/// Changes within so long are written once.
const DEBOUNCE: Duration = Duration::from_millis(300);

/// What was written last of each part, by pointer: what did not change is not written again.
#[derive(Default)]
struct Written {
    sources: BTreeMap<Arc<str>, Arc<Registrations>>,
    documents: Option<Arc<[Kept]>>,
    nodes: Option<u64>,
}

/// Keeps the last good state on the disk, and once more at the end.
pub(crate) async fn keep(
    disk: Disk,
    sources: Sources,
    documents: watch::Receiver<DocumentsView>,
    mut published: watch::Receiver<Published>,
    mut stop: Stop,
) {
    let mut written = Written::default();
    loop {
        let stopping = tokio::select! {
            changed = published.changed() => changed.is_err(),
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
        let to = disk.clone();
        let saved = tokio::task::spawn_blocking(move || {
            save(&to, &good, &documents, &world, &mut written);
            written
        });
        written = saved.await.unwrap_or_default();
        if stopping {
            return;
        }
    }
}

fn save(
    disk: &Disk,
    good: &[(Arc<str>, Arc<Registrations>)],
    documents: &DocumentsView,
    world: &World,
    written: &mut Written,
) {
    let note = |result: Result<(), PersistError>| match result {
        Ok(()) => true,
        Err(error) => {
            tracing::error!("{}", vmesh_daemon::report::one_line(&error));
            false
        }
    };
    for (name, last_good) in good {
        let known = written.sources.get(name).is_some_and(|known| Arc::ptr_eq(known, last_good));
        if !known && note(disk.save(&part(name), last_good)) {
            written.sources.insert(name.clone(), last_good.clone());
        }
    }
    let known = written.documents.as_ref().is_some_and(|known| Arc::ptr_eq(known, &documents.kept));
    if !known && note(disk.save("documents", &documents.kept)) {
        written.documents = Some(documents.kept.clone());
    }
    if written.nodes != Some(world.nodes_generation) {
        let nodes: Vec<_> = world.nodes.values().collect();
        if note(disk.save("nodes", &nodes)) {
            written.nodes = Some(world.nodes_generation);
        }
    }
}

/// The name of the state file of a source: its own name may have `/` in it.
pub(crate) fn part(source: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || c == '.' || c == '-' { c } else { '_' };
    format!("source-{}", source.chars().map(safe).collect::<String>())
}
