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
        let failed = |cause| FileError::Failed { what: "list", path: root.clone(), cause };
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
                    return Err(PersistError::File(FileError::Failed { what: "remove", path, cause }));
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
        let encoded =
            |what: Result<Vec<u8>, _>| what.map_err(|cause| PersistError::Encode(source_part(source), cause));
        let mut buckets: BTreeMap<Bucket, BTreeMap<&ServiceName, &ServiceView>> =
            written.in_doubt.iter().map(|bucket| (*bucket, BTreeMap::new())).collect();
        for (name, seen) in &view.services {
            if let Some(services) = buckets.get_mut(&bucket_of(name)) {
                services.insert(name, seen);
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
                Err(FileError::Failed { what: "write", path: PathBuf::new(), cause })
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
        let mut view = Registrations::default();
        let mut in_doubt = BTreeSet::new();
        let mut found = BTreeSet::new();
        for bucket in 0..=Bucket::MAX {
            match reader.read::<BTreeMap<ServiceName, ServiceView>>(&paths.dir.join(file_of(bucket))) {
                Ok(None) => {}
                Ok(Some(services)) => {
                    found.insert(bucket);
                    let before = services.len();
                    let own = services.into_iter().filter(|(name, _)| bucket_of(name) == bucket);
                    let own: BTreeMap<_, _> = own.collect();
                    if own.len() < before {
                        in_doubt.insert(bucket);
                        tracing::error!(
                            "{} holds services that belong into other files: they are left out",
                            paths.dir.join(file_of(bucket)).display()
                        );
                    }
                    view.services.extend(own);
                }
                Err(error) => {
                    in_doubt.insert(bucket);
                    tracing::error!("{}", one_line(&error));
                }
            }
        }
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

/// Reads the files of one source. Their total size is limited like that of a single file.
struct StateReader {
    left: u64,
    newest: Option<SystemTime>,
}

impl StateReader {
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
mod tests {
    use std::os::unix::fs::MetadataExt;

    use proptest::prelude::*;
    use vmesh_model::{Endpoint, Health, Labels, Place, Registration, State, Weight};
    use vmesh_testkit::place::{TempDir, tempdir};

    use super::*;
    use crate::persist::Disk;

    const SOURCE: &str = "file:/etc/vmesh/services.d";

    fn seen(name: &ServiceName, port: u16) -> ServiceView {
        let endpoint = Endpoint {
            address: ([10, 0, 0, 1], port).into(),
            hostname: None,
            weight: Weight::ONE,
            health: Health::Unknown,
            zone: None,
            version: None,
            labels: Labels::new(),
            source: SOURCE.into(),
        };
        ServiceView::fresh(Arc::new(Registration {
            service: name.clone(),
            protocol: None,
            port: None,
            endpoints: [endpoint].into(),
            place: Place::file("services.d"),
        }))
    }

    fn view(services: impl IntoIterator<Item = (ServiceName, u16)>) -> Arc<Registrations> {
        let services = services.into_iter().map(|(name, port)| (name.clone(), seen(&name, port))).collect();
        Arc::new(Registrations { services, ..Registrations::default() })
    }

    fn names(count: usize) -> Vec<ServiceName> {
        (0..count).map(|number| format!("service-{number}").parse().unwrap()).collect()
    }

    fn open(dir: &TempDir) -> Disk {
        Disk::open(&dir.join("state")).unwrap()
    }

    fn load(disk: &Disk) -> Option<Arc<Registrations>> {
        disk.load_source(SOURCE).unwrap().map(|loaded| loaded.value)
    }

    fn files(dir: &TempDir) -> BTreeMap<String, u64> {
        let entries = std::fs::read_dir(SourcePaths::of(&dir.join("state"), SOURCE).dir).unwrap();
        let file = |entry: std::fs::DirEntry| {
            (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().ino())
        };
        entries.map(|entry| file(entry.unwrap())).collect()
    }

    fn single(dir: &TempDir) -> PathBuf {
        SourcePaths::of(&dir.join("state"), SOURCE).single
    }

    #[test]
    fn a_changed_service_writes_one_file_also_after_a_restart() {
        let dir = tempdir().unwrap();
        let names = names(1_000);
        let mut ports: BTreeMap<ServiceName, u16> = names.iter().map(|name| (name.clone(), 80)).collect();
        let disk = open(&dir);
        disk.save_source(SOURCE, &view(ports.clone())).unwrap();
        let first = files(&dir);
        assert!(first.len() > 240, "{first:?}");
        let replaced = |before: &BTreeMap<String, u64>| -> Vec<String> {
            files(&dir)
                .into_iter()
                .filter(|(name, inode)| before.get(name) != Some(inode))
                .map(|f| f.0)
                .collect()
        };
        // Equal content at another address in memory causes no write.
        disk.save_source(SOURCE, &view(ports.clone())).unwrap();
        assert_eq!(replaced(&first), [""; 0]);
        ports.insert(names[7].clone(), 81);
        disk.save_source(SOURCE, &view(ports.clone())).unwrap();
        let own = file_of(bucket_of(&names[7]));
        assert_eq!(replaced(&first), [own]);

        drop(disk);
        let disk = open(&dir);
        assert_eq!(load(&disk), Some(view(ports.clone())));
        let second = files(&dir);
        ports.insert(names[8].clone(), 81);
        disk.save_source(SOURCE, &view(ports.clone())).unwrap();
        assert_eq!(replaced(&second), [file_of(bucket_of(&names[8]))]);
        // A bucket without services leaves no file.
        disk.save_source(SOURCE, &Arc::default()).unwrap();
        assert_eq!(files(&dir).into_keys().collect::<Vec<_>>(), ["head.json"]);
        assert_eq!(load(&disk), Some(Arc::default()));
    }

    #[test]
    fn all_that_is_known_of_a_service_comes_back() {
        let dir = tempdir().unwrap();
        let name = names(1).remove(0);
        let because = Some("`file` names no endpoint of it".into());
        let held = ServiceView { state: State::Held, because, empty_on_purpose: true, ..seen(&name, 80) };
        let problem = Problem::new(Place::at("a.yaml", 1, 2), "orders", "no such port");
        let problems = vec![problem];
        let known = Registrations { services: [(name, held)].into(), problems, ..Registrations::default() };
        open(&dir).save_source(SOURCE, &Arc::new(known.clone())).unwrap();
        assert_eq!(load(&open(&dir)).as_deref(), Some(&known));
        let solved = Registrations { problems: Vec::new(), ..known };
        let disk = open(&dir);
        load(&disk);
        disk.save_source(SOURCE, &Arc::new(solved.clone())).unwrap();
        assert_eq!(load(&disk).as_deref(), Some(&solved));
    }

    #[test]
    fn a_damaged_file_costs_the_services_in_it_and_is_written_again() {
        let dir = tempdir().unwrap();
        let all = view(names(500).into_iter().map(|name| (name, 80)));
        open(&dir).save_source(SOURCE, &all).unwrap();
        let lost = bucket_of(all.services.keys().next().unwrap());
        let path = SourcePaths::of(&dir.join("state"), SOURCE).dir.join(file_of(lost));
        std::fs::write(&path, "garbage").unwrap();
        let disk = open(&dir);
        let left = load(&disk).unwrap();
        assert!(left.services.len() > 480);
        assert!(
            all.services.keys().all(|name| left.services.contains_key(name) == (bucket_of(name) != lost))
        );
        assert!(path.with_extension("damaged").is_file());
        disk.save_source(SOURCE, &left).unwrap();
        disk.save_source(SOURCE, &all).unwrap();
        assert_eq!(load(&open_again(disk, &dir)), Some(all.clone()));

        // The head contains no service, so all services survive its damage.
        std::fs::write(path.with_file_name("head.json"), "garbage").unwrap();
        let disk = open(&dir);
        assert_eq!(load(&disk), Some(all.clone()));
        disk.save_source(SOURCE, &all).unwrap();
        assert!(path.with_file_name("head.json").is_file());
    }

    fn open_again(disk: Disk, dir: &TempDir) -> Disk {
        drop(disk);
        open(dir)
    }

    #[test]
    fn a_service_in_the_file_of_others_is_left_out() {
        let dir = tempdir().unwrap();
        let names = names(2);
        let disk = open(&dir);
        disk.save_source(SOURCE, &view([(names[0].clone(), 80), (names[1].clone(), 80)])).unwrap();
        let place = |name| SourcePaths::of(&dir.join("state"), SOURCE).dir.join(file_of(bucket_of(name)));
        std::fs::copy(place(&names[0]), place(&names[1])).unwrap();
        assert_eq!(load(&disk), Some(view([(names[0].clone(), 80)])));
    }

    #[test]
    fn large_files_and_no_files_are_not_read() {
        let dir = tempdir().unwrap();
        let names = names(1);
        let disk = open(&dir);
        disk.save_source(SOURCE, &view([(names[0].clone(), 80)])).unwrap();
        let path = SourcePaths::of(&dir.join("state"), SOURCE).dir;
        std::fs::File::create(path.join("00.json")).unwrap().set_len(MAX_BYTES + 1).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, path.join("01.json"), rustix::fs::Mode::RWXU).unwrap();
        assert_eq!(load(&disk), Some(view([(names[0].clone(), 80)])));
    }

    #[test]
    fn what_a_killed_writer_left_beside_a_source_is_swept() {
        let dir = tempdir().unwrap();
        open(&dir).save_source(SOURCE, &Arc::default()).unwrap();
        let left = SourcePaths::of(&dir.join("state"), SOURCE).dir.join(".00.json.1-0.vmesh-tmp");
        std::fs::write(&left, "half").unwrap();
        open(&dir);
        assert!(!left.exists());
    }

    #[test]
    fn a_source_is_kept_in_a_directory_of_its_own_whatever_its_name() {
        for source in ["..", "a/b", "file:/etc/../x", "head.json"] {
            let paths = SourcePaths::of(Path::new("/state"), source);
            assert_eq!(paths.dir.parent(), Some(Path::new("/state/sources")), "{source}");
            assert_eq!(paths.dir.file_name().unwrap().to_str().unwrap(), source_part(source));
        }
    }

    /// A file written by the previous version from real service files.
    const OF_ONE_FILE: &[u8] = include_bytes!("../../testdata/source-of-one-file.json");

    #[test]
    fn the_one_file_of_earlier_versions_is_read_and_replaced() {
        let dir = tempdir().unwrap();
        let disk = open(&dir);
        std::fs::write(single(&dir), OF_ONE_FILE).unwrap();
        let before: Registrations = state::decode(OF_ONE_FILE).unwrap();
        assert!(before.services.len() > 3 && !before.problems.is_empty(), "{before:?}");
        let restored = load(&disk).unwrap();
        assert_eq!(*restored, before);
        // The single file stays until the source has answered.
        assert_eq!(load(&open_again(disk, &dir)).as_deref(), Some(&before));
        let disk = open(&dir);
        load(&disk);
        disk.save_source(SOURCE, &restored).unwrap();
        assert!(!single(&dir).exists());
        assert_eq!(load(&open_again(disk, &dir)).as_deref(), Some(&before));
    }

    #[test]
    fn what_an_earlier_version_wrote_in_between_is_newer() {
        let dir = tempdir().unwrap();
        let names = names(2);
        let disk = open(&dir);
        disk.save_source(SOURCE, &view([(names[0].clone(), 80), (names[1].clone(), 80)])).unwrap();
        let between = view([(names[0].clone(), 81)]);
        std::fs::write(single(&dir), state::encode(&between).unwrap()).unwrap();
        let later = SystemTime::now() + std::time::Duration::from_secs(5);
        std::fs::File::options().write(true).open(single(&dir)).unwrap().set_modified(later).unwrap();
        let disk = open_again(disk, &dir);
        assert_eq!(load(&disk), Some(between.clone()));
        disk.save_source(SOURCE, &between).unwrap();
        assert_eq!(load(&open_again(disk, &dir)), Some(between));
        assert!(!single(&dir).exists());
    }

    /// A step of the property test.
    #[derive(Debug, Clone)]
    enum Step {
        /// Saves a view with these ports, `None` for an absent service. The write is cut off after `cut` file
        /// names.
        Save {
            ports: Vec<Option<u16>>,
            cut: Option<usize>,
        },
        Restart,
    }

    const SERVICES: usize = 12;

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let ports = || proptest::collection::vec(proptest::option::weighted(0.7, 1..4u16), SERVICES);
        // The first save writes or removes 256 bucket files, and then the head.
        let cut = proptest::option::weighted(0.4, prop_oneof![0..8usize, 0..260usize]);
        let save = (ports(), cut).prop_map(|(ports, cut)| Step::Save { ports, cut });
        proptest::collection::vec(prop_oneof![3 => save, 2 => Just(Step::Restart)], 1..12)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

        /// Some cases begin with a single file of an earlier version.
        #[test]
        fn after_any_crash_each_service_is_as_it_was_or_as_it_was_to_be(
            steps in steps(),
            before in proptest::option::of(proptest::collection::vec(proptest::option::of(1..4u16), SERVICES)),
        ) {
            let dir = tempdir().unwrap();
            // Several services share a file.
            let names: Vec<ServiceName> =
                names(4_000).into_iter().filter(|name| bucket_of(name) < 4).take(SERVICES).collect();
            let of = |ports: &[Option<u16>]| -> BTreeMap<ServiceName, u16> {
                names.iter().cloned().zip(ports).filter_map(|(name, port)| Some((name, (*port)?))).collect()
            };
            let mut disk = open(&dir);
            if let Some(before) = &before {
                std::fs::write(single(&dir), state::encode(&view(of(before))).unwrap()).unwrap();
            }
            // For each service, the entries that may be on disk.
            let first = |at: usize| before.as_ref().and_then(|before| before[at]);
            let mut may_be: Vec<BTreeSet<Option<u16>>> = (0..SERVICES).map(|at| [first(at)].into()).collect();
            for step in steps.into_iter().chain([Step::Restart]) {
                match step {
                    Step::Save { ports, cut } => {
                        *disk.sources.cut_off_after.lock().unwrap() = cut;
                        let saved = disk.save_source(SOURCE, &view(of(&ports)));
                        for (may_be, port) in may_be.iter_mut().zip(ports) {
                            if saved.is_ok() {
                                may_be.clear();
                            }
                            may_be.insert(port);
                        }
                    }
                    Step::Restart => {
                        disk = open_again(disk, &dir);
                        let known = load(&disk).unwrap_or_default();
                        for (name, may_be) in names.iter().zip(&mut may_be) {
                            let seen = known.services.get(name);
                            let port = seen.map(|seen| seen.registration.endpoints[0].address.port());
                            prop_assert!(may_be.contains(&port), "{name} is {port:?} and not one of {may_be:?}");
                            *may_be = [port].into();
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_saved_after_two_saves_at_once_is_what_is_there() {
        let dir = tempdir().unwrap();
        let disk = open(&dir);
        let names = names(40);
        let of_port = |port: u16| view(names.iter().map(|name| (name.clone(), port)));
        disk.save_source(SOURCE, &of_port(1)).unwrap();
        // The first save is in progress while the second begins and ends.
        let mut taken = disk.sources.written().remove(SOURCE).unwrap();
        disk.save_source(SOURCE, &of_port(2)).unwrap();
        let last = view(names.iter().map(|name| (name.clone(), if *name == names[0] { 3 } else { 1 })));
        disk.sources.save_known(&disk.dir, SOURCE, &last, &mut taken).unwrap();
        disk.sources.put_back(SOURCE, taken);
        disk.save_source(SOURCE, &last).unwrap();
        drop(disk);
        assert_eq!(load(&open(&dir)).unwrap(), last);
    }
}
