//! The last good state of discovery sources. Each source has a directory of files, so that a change of one
//! service rewrites one small file.
//!
//! ```text
//! sources/source-<name>/head.json   everything that belongs to no single service; if absent, no write was ever completed
//!                       00.json ..  the services whose name has this hash, if there are any
//!                       ff.json
//! ```
//!
//! Each file has a checksum and is replaced atomically. A crash can leave any mixture of old and new files,
//! which is still a good state: each service has either its older or its newer entry. Earlier versions wrote
//! a single file per source (`source-<name>.json`). It is read until the files that replace it are complete.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vmesh_catalog::state;
use vmesh_daemon::fsx::{self, Batch, FileError, PRIVATE};
use vmesh_daemon::report::one_line;
use vmesh_discovery::{Registrations, ServiceView};
use vmesh_model::{Problem, ServiceName, join};
use xxhash_rust::xxh3::xxh3_64;

use super::{LoadedPart, MAX_BYTES, PersistError, load_file, source_part};

const HEAD: &str = "head";

/// The hash of a service name that selects its file. Part of the on-disk format.
type Bucket = u8;

fn bucket_of(name: &ServiceName) -> Bucket {
    let [bucket, ..] = xxh3_64(name.as_str().as_bytes()).to_le_bytes();
    bucket
}

fn file_of(bucket: Bucket) -> String {
    format!("{bucket:02x}.json")
}

/// The content of `head.json`: the part of a view that belongs to no single service.
#[derive(Debug, Default, Serialize, Deserialize)]
struct SourceHead {
    problems: Vec<Problem>,
}

/// The state files of all sources, with a record of what each contains.
#[derive(Debug, Default)]
pub(super) struct SourceFiles {
    /// The record of each source. A writer takes the record out and puts it back, so the lock is never held
    /// during a write.
    written: Mutex<BTreeMap<String, WrittenSource>>,
    #[cfg(test)]
    cut_off_after: Mutex<Option<usize>>,
}

/// The content of a source's files, as last written.
#[derive(Debug)]
struct WrittenSource {
    view: Arc<Registrations>,
    /// The buckets whose files may differ from `view`.
    in_doubt: BTreeSet<Bucket>,
    /// `head.json` may differ from `view` or be missing.
    is_head_in_doubt: bool,
    /// The single file of an earlier version may exist.
    has_single: bool,
}

impl WrittenSource {
    /// Returns a record that claims nothing about the files, so the next save writes them all.
    fn unknown() -> WrittenSource {
        WrittenSource {
            view: Arc::default(),
            in_doubt: (0..=Bucket::MAX).collect(),
            is_head_in_doubt: true,
            has_single: true,
        }
    }
}

/// The paths of a source's files.
struct SourcePaths {
    root: PathBuf,
    dir: PathBuf,
    /// The single file of earlier versions.
    single: PathBuf,
}

impl SourcePaths {
    fn of(state_dir: &Path, source: &str) -> SourcePaths {
        let (name, root) = (source_part(source), state_dir.join("sources"));
        SourcePaths { dir: root.join(&name), root, single: state_dir.join(format!("{name}.json")) }
    }

    /// Removes the source's files except the single file of earlier versions. The head is removed last,
    /// because while it exists the next start compares its age with that of the single file.
    fn remove_files(&self) -> Result<(), FileError> {
        let mut batch = Batch::open(&self.dir)?;
        (0..=Bucket::MAX).for_each(|bucket| batch.remove(file_of(bucket)));
        batch.remove(format!("{HEAD}.json"));
        batch.commit()
    }
}

impl SourceFiles {
    /// Removes leftovers of crashed writers from the sources' directories.
    pub(super) fn sweep(state_dir: &Path) -> Result<(), FileError> {
        let root = state_dir.join("sources");
        let failed = |cause| FileError::Failed { action: "list", path: root.clone(), cause };
        let entries = match std::fs::read_dir(&root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(failed(error)),
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                fsx::sweep(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Writes each file whose content differs from `view`.
    pub(super) fn save(
        &self,
        state_dir: &Path,
        source: &str,
        view: &Arc<Registrations>,
    ) -> Result<(), PersistError> {
        let known = self.written().remove(source);
        let mut written = known.unwrap_or_else(WrittenSource::unknown);
        let saved = self.save_known(state_dir, source, view, &mut written);
        self.put_back(source, written);
        saved
    }

    fn put_back(&self, source: &str, written: WrittenSource) {
        let mut all = self.written();
        let is_alone = !all.contains_key(source);
        // Two concurrent writers may each have replaced some of the files, so the next save writes them all.
        all.insert(source.to_owned(), if is_alone { written } else { WrittenSource::unknown() });
    }

    fn written(&self) -> MutexGuard<'_, BTreeMap<String, WrittenSource>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save_known(
        &self,
        state_dir: &Path,
        source: &str,
        view: &Arc<Registrations>,
        written: &mut WrittenSource,
    ) -> Result<(), PersistError> {
        let mut changed = written.in_doubt.clone();
        if !Arc::ptr_eq(&written.view, view) {
            changed.extend(changed_services(&written.view, view).map(bucket_of));
        }
        let is_head_changed = written.is_head_in_doubt || written.view.problems != view.problems;
        if changed.is_empty() && !is_head_changed && !written.has_single {
            written.view = view.clone();
            return Ok(());
        }
        let paths = SourcePaths::of(state_dir, source);
        // A write that fails may still have replaced any of these files.
        written.in_doubt = changed;
        written.is_head_in_doubt = is_head_changed;
        self.replace(&paths, source, view, written)?;
        written.in_doubt = BTreeSet::new();
        written.is_head_in_doubt = false;
        written.view = view.clone();
        if written.has_single {
            match std::fs::remove_file(&paths.single) {
                Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => {
                    let path = paths.single;
                    return Err(PersistError::File(FileError::Failed { action: "remove", path, cause }));
                }
                _ => written.has_single = false,
            }
        }
        Ok(())
    }

    /// Replaces the files of the buckets in doubt, and the head if it is in doubt.
    fn replace(
        &self,
        paths: &SourcePaths,
        source: &str,
        view: &Registrations,
        written: &WrittenSource,
    ) -> Result<(), PersistError> {
        for dir in [&paths.root, &paths.dir] {
            fsx::make_private_dir(dir).map_err(PersistError::File)?;
        }
        let encoded = |result: Result<Vec<u8>, _>| {
            result.map_err(|cause| PersistError::Encode(source_part(source), cause))
        };
        let mut buckets: BTreeMap<Bucket, BTreeMap<&ServiceName, &ServiceView>> =
            written.in_doubt.iter().map(|bucket| (*bucket, BTreeMap::new())).collect();
        for (name, service_view) in &view.services {
            if let Some(services) = buckets.get_mut(&bucket_of(name)) {
                services.insert(name, service_view);
            }
        }
        let mut batch = Batch::open(&paths.dir).map_err(PersistError::File)?;
        // While the single file of an earlier version is still read, it provides the services of each bucket
        // without a file.
        let is_replacing = written.has_single && paths.single.exists();
        for (bucket, services) in buckets {
            let says_empty = is_replacing && paths.dir.join(file_of(bucket)).exists();
            if services.is_empty() && !says_empty {
                batch.remove(file_of(bucket));
                continue;
            }
            let bytes = encoded(state::encode(&services))?;
            batch.write(file_of(bucket), &bytes, PRIVATE).map_err(PersistError::File)?;
        }
        // The head is written last: a reader that finds a head relies on the buckets being complete.
        if written.is_head_in_doubt {
            let head = SourceHead { problems: view.problems.clone() };
            let bytes = encoded(state::encode(&head))?;
            batch.write(format!("{HEAD}.json"), &bytes, PRIVATE).map_err(PersistError::File)?;
        }
        self.commit(batch).map_err(PersistError::File)?;
        if written.is_head_in_doubt {
            // Newly created directories must be synced in their parent directories too.
            for dir in [&paths.root, paths.root.parent().unwrap_or(&paths.root)] {
                Batch::open(dir).and_then(Batch::commit).map_err(PersistError::File)?;
            }
        }
        Ok(())
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, reason = "tests cut a commit off")]
    fn commit(&self, batch: Batch) -> Result<(), FileError> {
        batch.commit()
    }

    /// Commits the batch, but stops with an error after as many names as [`SourceFiles::cut_off_after`] says,
    /// to simulate a crash or a full disk.
    #[cfg(test)]
    fn commit(&self, batch: Batch) -> Result<(), FileError> {
        match self.cut_off_after.lock().unwrap().take() {
            None => batch.commit(),
            Some(names) => {
                batch.commit_first(names)?;
                let cause = std::io::Error::other("cut off by the test");
                Err(FileError::Failed { action: "write", path: PathBuf::new(), cause })
            }
        }
    }

    /// Returns the saved view of a source; `None` if no save was ever completed. The services in an
    /// unreadable file are lost, and the error is logged.
    pub(super) fn load(
        &self,
        state_dir: &Path,
        source: &str,
    ) -> Result<Option<LoadedPart<Arc<Registrations>>>, PersistError> {
        let paths = SourcePaths::of(state_dir, source);
        let mut reader = StateReader { left: MAX_BYTES, newest: None };
        let mut known = WrittenSource::unknown();
        let head: Option<SourceHead> = match reader.read(&paths.dir.join(format!("{HEAD}.json"))) {
            Ok(head) => {
                known.is_head_in_doubt = head.is_none();
                head
            }
            // The head is written after the buckets, so the buckets are complete even if the head is damaged.
            Err(error) => {
                tracing::error!("{}", one_line(&error));
                Some(SourceHead::default())
            }
        };
        let LoadedBuckets { services, mut found, in_doubt } = reader.read_buckets(&paths);
        let mut view = Registrations { services, ..Registrations::default() };
        let newest = reader.newest;
        let single = match &head {
            None => Some(load_file::<Registrations>(&paths.single, MAX_BYTES)?),
            // An earlier version ran in the meantime and wrote a single file that is newer than all buckets.
            Some(_) if is_newer(&paths.single, newest) => {
                found.clear();
                view.services.clear();
                known.is_head_in_doubt = true;
                paths.remove_files().map_err(PersistError::File)?;
                Some(load_file::<Registrations>(&paths.single, MAX_BYTES)?)
            }
            Some(_) => None,
        };
        match (head, single) {
            (_, Some(Some(single))) => {
                // A bucket that has a file is newer than the single file.
                let LoadedPart { value, written } = single;
                let older = value.services.into_iter().filter(|(name, _)| !found.contains(&bucket_of(name)));
                view.services.extend(older);
                view.problems = value.problems;
                Ok(Some(LoadedPart { value: Arc::new(view), written }))
            }
            (Some(head), _) => {
                view.problems = head.problems;
                let view = Arc::new(view);
                let has_single = paths.single.exists();
                let known = WrittenSource { view: view.clone(), in_doubt, has_single, ..known };
                self.written().insert(source.to_owned(), known);
                let written = newest.unwrap_or(SystemTime::UNIX_EPOCH);
                Ok(Some(LoadedPart { value: view, written }))
            }
            (None, _) => Ok(None),
        }
    }
}

/// The services in the bucket files of a source.
#[derive(Default)]
struct LoadedBuckets {
    services: BTreeMap<ServiceName, ServiceView>,
    /// The buckets that have a readable file.
    found: BTreeSet<Bucket>,
    /// The buckets whose file is damaged or contains services of other buckets.
    in_doubt: BTreeSet<Bucket>,
}

/// Reads the files of one source. Their total size is limited like that of a single file.
struct StateReader {
    left: u64,
    newest: Option<SystemTime>,
}

impl StateReader {
    /// Reads all bucket files. A file that cannot be read is logged, and its services are lost.
    fn read_buckets(&mut self, paths: &SourcePaths) -> LoadedBuckets {
        let mut loaded = LoadedBuckets::default();
        for bucket in 0..=Bucket::MAX {
            let path = paths.dir.join(file_of(bucket));
            match self.read::<BTreeMap<ServiceName, ServiceView>>(&path) {
                Ok(None) => {}
                Ok(Some(services)) => {
                    loaded.found.insert(bucket);
                    let before = services.len();
                    let own = services.into_iter().filter(|(name, _)| bucket_of(name) == bucket);
                    let own: BTreeMap<_, _> = own.collect();
                    if own.len() < before {
                        loaded.in_doubt.insert(bucket);
                        tracing::error!(
                            "{} holds services that belong into other files: they are left out",
                            path.display()
                        );
                    }
                    loaded.services.extend(own);
                }
                Err(error) => {
                    loaded.in_doubt.insert(bucket);
                    tracing::error!("{}", one_line(&error));
                }
            }
        }
        loaded
    }

    fn read<T: DeserializeOwned>(&mut self, path: &Path) -> Result<Option<T>, PersistError> {
        let Some(LoadedPart { value, written }) = load_file(path, self.left)? else { return Ok(None) };
        let size = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
        self.left = self.left.saturating_sub(size);
        self.newest = self.newest.max(Some(written));
        Ok(Some(value))
    }
}

fn is_newer(path: &Path, than: Option<SystemTime>) -> bool {
    let modified = std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    modified.is_some() && modified > than
}

/// Returns the services whose entries differ between the two views.
fn changed_services<'a>(
    before: &'a Registrations,
    now: &'a Registrations,
) -> impl Iterator<Item = &'a ServiceName> {
    let differs = |before: Option<&ServiceView>, now: Option<&ServiceView>| match (before, now) {
        (Some(before), Some(now)) => !is_same(before, now),
        _ => true,
    };
    let both = join(&before.services, &now.services);
    both.filter_map(move |(name, before, now)| differs(before, now).then_some(name))
}

/// Reports whether both entries are written alike. An unchanged entry keeps its pointer, whereas a loaded
/// entry has a new one and is compared by content.
fn is_same(before: &ServiceView, now: &ServiceView) -> bool {
    (Arc::ptr_eq(&before.registration, &now.registration) || before.registration == now.registration)
        && before.state == now.state
        && before.because == now.because
        && before.empty_on_purpose == now.empty_on_purpose
}

#[cfg(test)]
mod tests;
