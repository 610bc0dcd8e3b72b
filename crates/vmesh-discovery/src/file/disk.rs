//! The state of the disk: the files that exist, the content of each, and the last usable content of each.
//!
//! All functions here block and are called on a thread for blocking work. A file is read again if the kernel
//! reports a change, if its metadata changed, and at every `poll`; it is parsed again if its bytes changed.
//!
//! While every directory is watched, a scan covers only the files that the kernel reported, and costs as much
//! as they do. Any other change than a plain file that was created, changed or removed (a directory, a link,
//! a component of a link's path, lost events) leads to a scan of the whole directory, as do a failure and
//! every `poll`.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{File, FileType, Metadata};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{Mode, OFlags};
use vmesh_model::yaml::too_large;
use vmesh_model::{Address, Endpoint, Host, Place, Problem, Registration, ServiceName};
use xxhash_rust::xxh3::xxh3_64;

use super::privacy::{is_public, redacted};
use super::watch::{DirectoryWatches, Hints, ScanRequest, WatchedDirectories, WatchedDirectory, links};
use crate::assemble::{ServiceContent, ServiceStatement, Statement};
use crate::config::FileConfig;
use crate::format::{self, FileFailure, Format, ParseResult, ParsedEndpoint, ParsedService, subject_of};
use crate::source::{Registrations, SourceError};

/// A file that changed less than this ago may be half written, unless the kernel reported that it was closed.
const SETTLED: Duration = Duration::from_millis(100);
/// The limit of the directory depth. Deeper directories are assumed to be a loop or a backup.
const MAX_DEPTH: usize = 8;

/// The result of a scan.
#[derive(Debug, Default)]
pub(super) struct Scan {
    pub(super) statement: Statement,
    /// Some files are being changed: scan again after this time.
    pub(super) again: Option<Duration>,
    /// The services that `told` covers, after a scan of changed files only; a service that is not in `told`
    /// is removed. `None`: `told` covers everything.
    pub(super) only: Option<BTreeSet<ServiceName>>,
    /// The number of files that were parsed, for tests.
    pub(super) parsed: usize,
    /// The number of files that were read, and the number of those that were unusable as a whole.
    pub(super) read: u64,
    pub(super) refused: u64,
    /// The number of records that were left out.
    pub(super) bad_records: u64,
}

/// The state of one file.
#[derive(Debug, Default)]
struct FileState {
    /// The metadata when the file was last read.
    stat: Option<FileStat>,
    /// The hash of the bytes that were parsed last; `None` if they could not be read.
    hash: Option<u64>,
    /// The content of the file may be quoted in problems.
    is_shown: bool,
    /// The detected format.
    format: Option<Format>,
    services: BTreeMap<ServiceName, ServiceStatement>,
    problems: Vec<Problem>,
    /// The services that the file named before it stated that there are none.
    emptied: BTreeSet<ServiceName>,
    /// Unreadable parts of the file without a last good state, each with the reason.
    unusable: Vec<Arc<str>>,
    /// Records of the file that are left out and have no last good state, each with the reason.
    left_out: Vec<Arc<str>>,
    /// The time at which the file was first found missing.
    missing_since: Option<Instant>,
}

/// The metadata that show whether a file was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileStat {
    id: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileStat {
    fn of(metadata: &Metadata) -> FileStat {
        FileStat {
            id: (metadata.dev(), metadata.ino()),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// A file that a walk found.
struct FoundFile {
    path: PathBuf,
    /// The name of its service if the file does not state one.
    name: String,
    is_yaml: bool,
    /// The metadata and the modification time of the file, or the reason why they are unknown.
    stat: Result<(FileStat, Option<SystemTime>), String>,
}

/// The result of walking a directory.
#[derive(Default)]
struct DirectoryWalk {
    files: Vec<FoundFile>,
    directories: WatchedDirectories,
    /// The prefix of the service names of the files in each directory.
    prefixes: BTreeMap<PathBuf, String>,
    /// The components of link paths, each as its directory and its name there.
    link_components: BTreeSet<(PathBuf, OsString)>,
    /// The device and inode numbers of the directories that were read, against loops of links.
    visited: BTreeSet<(u64, u64)>,
    /// Directories whose content is unknown, with the reason.
    unreadable: Vec<(PathBuf, String)>,
    problems: Vec<Problem>,
}

/// The part of a walk that stays valid while the kernel reports every change.
#[derive(Debug)]
struct WatchedTree {
    directories: WatchedDirectories,
    prefixes: BTreeMap<PathBuf, String>,
    link_components: BTreeSet<(PathBuf, OsString)>,
    problems: Vec<Problem>,
}

/// The state of a path that the kernel reported.
enum ReportedPath {
    File(FoundFile),
    Gone(PathBuf),
}

#[derive(Debug)]
pub(super) struct Disk {
    config: FileConfig,
    source: Arc<str>,
    hints: Arc<Hints>,
    watch: Option<DirectoryWatches>,
    files: BTreeMap<PathBuf, FileState>,
    /// The last walk. Set while every directory is watched, so that only reported changes have to be scanned.
    tree: Option<WatchedTree>,
    /// Files to read again, because they were being changed during the last scan.
    unsettled: BTreeSet<PathBuf>,
    /// The files that name each service, in path order.
    claims: BTreeMap<ServiceName, Vec<PathBuf>>,
    /// Services whose files changed since they were last merged.
    changed: BTreeSet<ServiceName>,
    /// Problems of services that several files name.
    conflicts: BTreeMap<ServiceName, Vec<Problem>>,
    /// The services from before a restart whose file has not been read yet.
    restored: BTreeMap<ServiceName, Arc<Registration>>,
    /// The services from before a restart whose endpoints may be in files that are still unusable.
    restored_parts: BTreeMap<ServiceName, Arc<Registration>>,
    /// The file that counts for each service. A file that later names the same service does not replace it.
    incumbents: BTreeMap<ServiceName, Arc<str>>,
    /// Services whose endpoints are spread over several files, as last merged.
    joined: BTreeMap<ServiceName, Arc<ParsedService>>,
    /// The failure to watch directories has been logged.
    has_warned: bool,
    #[cfg(test)]
    pub(super) no_watches: bool,
}

impl Disk {
    pub(super) fn new(config: FileConfig, hints: Arc<Hints>, last_good: Option<&Registrations>) -> Disk {
        let restored = last_good.into_iter().flat_map(|last_good| &last_good.services);
        let file = |registration: &Registration| registration.place.file.clone();
        Disk {
            incumbents: restored
                .clone()
                .map(|(name, seen)| (name.clone(), file(&seen.registration)))
                .collect(),
            source: config.name(),
            config,
            hints,
            watch: None,
            files: BTreeMap::new(),
            tree: None,
            unsettled: BTreeSet::new(),
            claims: BTreeMap::new(),
            changed: BTreeSet::new(),
            conflicts: BTreeMap::new(),
            restored: restored
                .clone()
                .map(|(name, seen)| (name.clone(), seen.registration.clone()))
                .collect(),
            restored_parts: restored.map(|(name, seen)| (name.clone(), seen.registration.clone())).collect(),
            joined: BTreeMap::new(),
            has_warned: false,
            #[cfg(test)]
            no_watches: false,
        }
    }

    /// Returns a disk state that has read nothing and only knows which file counts for each service.
    #[cfg(test)]
    pub(super) fn fresh_copy(&self) -> Disk {
        let incumbents = self.incumbents.clone();
        Disk { incumbents, ..Disk::new(self.config.clone(), Arc::default(), None) }
    }

    /// Scans the disk. If `verify` is set, every file is read even if its metadata did not change.
    pub(super) fn scan(&mut self, request: &ScanRequest, verify: bool) -> Result<Scan, SourceError> {
        let touched = if verify { None } else { self.reported_paths(request) };
        match touched {
            Some(touched) => Ok(self.scan_reported(touched, request)),
            None => self.scan_all(request, verify),
        }
    }

    /// Returns the state of the paths that the kernel reported; `None` if more than plain files may have
    /// changed.
    fn reported_paths(&self, request: &ScanRequest) -> Option<Vec<ReportedPath>> {
        let tree = self.tree.as_ref().filter(|_| !request.everything)?;
        let paths: BTreeSet<&PathBuf> =
            request.whole.iter().chain(&request.busy).chain(&self.unsettled).collect();
        let mut touched = Vec::with_capacity(paths.len());
        let (mut came, mut gone) = (0, 0);
        for path in paths {
            let (parent, name) = (path.parent()?, path.file_name()?);
            let is_on_a_way = tree.link_components.contains(&(parent.to_owned(), name.to_owned()));
            if is_on_a_way || tree.directories.contains_key(path) {
                return None;
            }
            if is_skipped(name) {
                continue;
            }
            let prefix = tree.prefixes.get(parent)?;
            let text = name.to_string_lossy();
            let is_read = self.config.format != Format::Auto || is_read(&text);
            let is_listed = || {
                let file = path.to_string_lossy();
                tree.problems.iter().any(|problem| *problem.place.file == *file)
            };
            match std::fs::symlink_metadata(path) {
                Ok(metadata) if metadata.is_file() && is_read && !is_listed() => {
                    came += usize::from(!self.files.contains_key(path));
                    let (stem, is_yaml) = stem(&text);
                    let stat = Ok((FileStat::of(&metadata), metadata.modified().ok()));
                    let name = format!("{prefix}{stem}");
                    touched.push(ReportedPath::File(FoundFile { path: path.clone(), name, is_yaml, stat }));
                }
                Err(error) if error.kind() == ErrorKind::NotFound && !is_listed() => {
                    if let Some(state) = self.files.get(path) {
                        gone += usize::from(state.missing_since.is_none());
                        touched.push(ReportedPath::Gone(path.clone()));
                    }
                }
                _ => return None,
            }
        }
        // `judge` has to examine the whole directory if it holds too many files or none.
        let is_bounded = self.files.len() + came <= self.config.max_files;
        let is_left =
            gone == 0 || self.files.values().filter(|state| state.missing_since.is_none()).count() > gone;
        (is_bounded && is_left).then_some(touched)
    }

    /// Reads the reported files; everything else stays as the last walk found it.
    fn scan_reported(&mut self, touched: Vec<ReportedPath>, request: &ScanRequest) -> Scan {
        let mut scan = Scan::default();
        let now = Instant::now();
        self.unsettled.clear();
        for touched in touched {
            match touched {
                ReportedPath::File(found) => self.read_file(&found, request, false, &mut scan),
                ReportedPath::Gone(path) => self.forget_file(&path, now, &mut scan),
            }
        }
        if let Some(tree) = &self.tree {
            scan.statement.problems.extend(tree.problems.iter().cloned());
        }
        // The state from before a restart is merged in until every file was read once, so a partial merge
        // would miss it.
        let is_settled = self.restored.is_empty() && self.restored_parts.is_empty();
        match is_settled {
            true => self.merge_changed(&mut scan),
            false => {
                self.drop_restored(&scan);
                self.merge(&mut scan);
            }
        }
        scan
    }

    /// Scans everything.
    fn scan_all(&mut self, request: &ScanRequest, verify: bool) -> Result<Scan, SourceError> {
        self.tree = None;
        let mut scan = Scan::default();
        let mut is_watched = self.config.watch;
        let mut walk = self.walk()?;
        if self.config.watch {
            if let Some(watch) = &mut self.watch {
                watch.unwatch_reported(request);
            }
            // Changes made before a watch was added have to be found by another walk, which may find further
            // directories.
            for _ in 0..MAX_DEPTH {
                let (is_new, problem) = self.watch_directories(&walk.directories);
                is_watched = !is_new && problem.is_none();
                if !is_new {
                    scan.statement.problems.extend(problem);
                    break;
                }
                walk = self.walk()?;
            }
        }
        self.check_plausible(&walk)?;
        let problems = std::mem::take(&mut walk.problems);
        scan.statement.problems.extend(problems.iter().cloned());
        for (directory, why) in &walk.unreadable {
            let file: Arc<str> = directory.display().to_string().into();
            let problem = Problem::new(Place::file(file.clone()), file, &**why);
            scan.statement.problems.push(problem.with_outcome("what was last read below it stays in force"));
        }

        let now = Instant::now();
        self.unsettled.clear();
        let mut present = BTreeSet::new();
        for found in &walk.files {
            present.insert(found.path.clone());
            self.read_file(found, request, verify, &mut scan);
        }
        self.keep_unreadable(&walk.unreadable);
        for (directory, why) in &walk.unreadable {
            if !self.files.keys().any(|path| path.starts_with(directory)) {
                scan.statement.unusable.push(format!("{}: {why}", directory.display()).into());
            }
        }
        self.forget_missing(&present, &walk.unreadable, now, &mut scan);
        if is_watched && walk.unreadable.is_empty() {
            let DirectoryWalk { directories, prefixes, link_components, .. } = walk;
            self.tree = Some(WatchedTree { directories, prefixes, link_components, problems });
        }
        self.merge(&mut scan);
        Ok(scan)
    }

    fn failed(&self, path: &Path, cause: io::Error) -> SourceError {
        SourceError::Failed {
            source_name: self.source.clone(),
            what: format!("read {}", path.display()),
            cause: explain_error(&cause).into(),
        }
    }

    fn suspect(&self, what: String) -> SourceError {
        SourceError::Suspect { source_name: self.source.clone(), what }
    }

    fn walk(&self) -> Result<DirectoryWalk, SourceError> {
        let root = &self.config.path;
        let metadata = std::fs::metadata(root).map_err(|error| self.failed(root, error))?;
        let mut walk = DirectoryWalk::default();
        walk.watch_path(root);
        if metadata.is_dir() {
            let mut prefix = String::new();
            self.walk_into(root, &metadata, &mut prefix, 0, &mut walk).map_err(|e| self.failed(root, e))?;
            walk.files.sort_by(|a, b| a.path.cmp(&b.path));
        } else if metadata.is_file() {
            let name = root.file_name().unwrap_or_default().to_string_lossy();
            let (name, is_yaml) = stem(&name);
            let stat = Ok((FileStat::of(&metadata), metadata.modified().ok()));
            walk.files.push(FoundFile { path: root.clone(), name: name.to_owned(), is_yaml, stat });
        } else {
            let kind = kind_name(metadata.file_type());
            let what = format!("{} is a {kind}, neither a directory nor a file", root.display());
            return Err(self.suspect(what));
        }
        Ok(walk)
    }

    fn walk_into(
        &self,
        directory: &Path,
        metadata: &Metadata,
        prefix: &mut String,
        depth: usize,
        walk: &mut DirectoryWalk,
    ) -> io::Result<()> {
        let id = (metadata.dev(), metadata.ino());
        let entries = std::fs::read_dir(directory)?;
        walk.visited.insert(id);
        walk.directories.insert(directory.to_owned(), WatchedDirectory { id, only: None });
        walk.prefixes.insert(directory.to_owned(), prefix.clone());
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            if !is_skipped(&entry.file_name()) {
                names.push((entry.file_name(), entry.file_type()?));
            }
        }
        // The entries are sorted, so that of two links to one directory the same one always counts.
        names.sort_by(|a, b| a.0.cmp(&b.0));
        for (name, file_type) in names {
            let path = directory.join(&name);
            if file_type.is_symlink() {
                walk.watch_path(&path);
            }
            let metadata = std::fs::metadata(&path);
            let text = name.to_string_lossy();
            let is_directory = metadata.as_ref().map_or(file_type.is_dir(), Metadata::is_dir);
            if !is_directory && self.config.format == Format::Auto && !is_read(&text) {
                let message =
                    "not read: the name of a discovery file ends in `.yaml`, `.yml`, `.json` or in nothing";
                walk.problem(&path, message);
                continue;
            }
            match metadata {
                Ok(metadata) if metadata.is_dir() => {
                    if walk.visited.contains(&(metadata.dev(), metadata.ino())) {
                        continue;
                    }
                    if depth + 1 >= MAX_DEPTH {
                        walk.problem(&path, &format!("not read: nested deeper than {MAX_DEPTH} directories"));
                        continue;
                    }
                    let length = prefix.len();
                    prefix.push_str(&text);
                    prefix.push('.');
                    if let Err(error) = self.walk_into(&path, &metadata, prefix, depth + 1, walk) {
                        walk.unreadable.push((path, explain_error(&error)));
                    }
                    prefix.truncate(length);
                }
                // Opening a FIFO would block until somebody writes to it, and opening a device can have any
                // effect.
                Ok(metadata) if !metadata.is_file() => {
                    walk.problem(&path, &format!("not read: it is a {}", kind_name(metadata.file_type())));
                }
                // The file was removed after its directory was read.
                Err(error) if error.kind() == ErrorKind::NotFound && !file_type.is_symlink() => {}
                // The content below this directory is unknown.
                Err(error) if is_directory => walk.unreadable.push((path, explain_error(&error))),
                metadata => {
                    let (stem, is_yaml) = stem(&text);
                    let name = format!("{prefix}{stem}");
                    let stat = match metadata {
                        Ok(metadata) => Ok((FileStat::of(&metadata), metadata.modified().ok())),
                        Err(error) if error.kind() == ErrorKind::NotFound => {
                            Err("a link to something that does not exist".to_owned())
                        }
                        Err(error) => Err(explain_error(&error)),
                    };
                    walk.files.push(FoundFile { path, name, is_yaml, stat });
                }
            }
        }
        Ok(())
    }

    /// Checks whether the walk as a whole looks plausible.
    fn check_plausible(&self, walk: &DirectoryWalk) -> Result<(), SourceError> {
        let path = self.config.path.display();
        if walk.files.len() > self.config.max_files {
            let most = self.config.max_files;
            return Err(
                self.suspect(format!("{path} holds more than {most} files: is it the right directory?"))
            );
        }
        let before = self.files.len().max(usize::from(!self.restored.is_empty()));
        if walk.files.is_empty() && walk.unreadable.is_empty() && before > 0 {
            let what = format!(
                "{path} is empty and was not before: is something not mounted? \
                 If that is meant, leave one file in it that holds `[]`"
            );
            return Err(self.suspect(what));
        }
        Ok(())
    }

    /// Watches these directories. Returns whether a watch was added, and a problem if some directories are
    /// not watched.
    fn watch_directories(&mut self, directories: &WatchedDirectories) -> (bool, Option<Problem>) {
        let (is_new, result) = match self.watcher() {
            Ok(watch) => watch.watch_only(directories),
            Err(why) => (false, Err(why)),
        };
        let problem = result.err().map(|why| {
            let every = vmesh_model::text::show_duration(self.config.poll);
            let message = format!("{why}; until then changes are seen only every {every}");
            if !self.has_warned {
                tracing::warn!("discovery source `{}` is not told of changes: {message}", self.source);
            }
            let place = Place::file(self.config.path.display().to_string());
            Problem::new(place, self.source.clone(), message)
        });
        self.has_warned = problem.is_some();
        (is_new, problem)
    }

    fn watcher(&mut self) -> Result<&mut DirectoryWatches, String> {
        #[cfg(test)]
        if self.no_watches {
            return Err("the host has no watches left: raise fs.inotify.max_user_watches".to_owned());
        }
        match &mut self.watch {
            Some(watch) => Ok(watch),
            none => Ok(none.insert(DirectoryWatches::new(self.hints.clone())?)),
        }
    }

    /// Reads a file if it may have changed.
    fn read_file(&mut self, found: &FoundFile, request: &ScanRequest, verify: bool, scan: &mut Scan) {
        let unsettled = &mut self.unsettled;
        let mut again = |scan: &mut Scan, wait: Duration| {
            unsettled.insert(found.path.clone());
            scan.again = Some(scan.again.map_or(wait, |sooner| sooner.min(wait)));
        };
        let known = self.files.get(&found.path);
        let (stat, modified) = match &found.stat {
            Ok(stat) => *stat,
            Err(why) => {
                let why = why.clone();
                self.record_unreadable(found, why, scan);
                return;
            }
        };
        let is_unchanged = known.is_some_and(|known| known.stat == Some(stat));
        let is_whole = request.whole.contains(&found.path);
        if is_unchanged && !is_whole && !verify {
            self.mark_present(&found.path);
            return;
        }
        if request.busy.contains(&found.path) {
            // The kernel reports when the file is closed; until then its content is incomplete.
            again(scan, SETTLED);
            return;
        }
        if !is_unchanged
            && !is_whole
            && let Some(age) = modified.and_then(|modified| SystemTime::now().duration_since(modified).ok())
            && age < SETTLED
        {
            again(scan, SETTLED - age);
            return;
        }
        scan.read += 1;
        match read_bytes(&found.path, self.config.max_bytes) {
            Ok(FileContent::Whole { bytes, stat, is_public }) => {
                let is_shown = is_public || self.config.quotes_private_files;
                self.take_content(found, &bytes, stat, is_shown, scan);
            }
            Ok(FileContent::Changing) => again(scan, SETTLED),
            Ok(FileContent::TooLarge) => {
                self.record_unreadable(found, too_large(self.config.max_bytes), scan)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => again(scan, SETTLED),
            Err(error) => self.record_unreadable(found, explain_error(&error), scan),
        }
    }

    fn mark_present(&mut self, path: &Path) {
        if let Some(state) = self.files.get_mut(path) {
            state.missing_since = None;
        }
    }

    /// Takes the content of a file.
    fn take_content(
        &mut self,
        found: &FoundFile,
        bytes: &[u8],
        stat: FileStat,
        is_shown: bool,
        scan: &mut Scan,
    ) {
        let state = self.files.entry(found.path.clone()).or_default();
        state.stat = Some(stat);
        state.missing_since = None;
        let hash = xxh3_64(bytes);
        if state.hash == Some(hash) && state.is_shown == is_shown {
            return;
        }
        state.hash = Some(hash);
        state.is_shown = is_shown;
        scan.parsed += 1;
        let file: Arc<str> = found.path.display().to_string().into();
        let (limit, format) = (self.config.max_bytes, self.config.format);
        let (mut parsed, detected) =
            format::parse(&file, &found.name, found.is_yaml, bytes, limit, format, state.format);
        state.format = detected;
        if !is_shown {
            parsed.redact(redacted);
        }
        match parsed.has_failed() {
            true => scan.refused += 1,
            false => scan.bad_records += parsed.problems.len() as u64,
        }
        self.update_file(&found.path, &file, parsed);
    }

    /// Records that a file cannot be read; its last good services stay.
    fn record_unreadable(&mut self, found: &FoundFile, why: String, scan: &mut Scan) {
        scan.refused += 1;
        let file: Arc<str> = found.path.display().to_string().into();
        let state = self.files.entry(found.path.clone()).or_default();
        state.stat = None;
        state.hash = None;
        state.missing_since = None;
        let problem = Problem::new(Place::file(file.clone()), file.clone(), why);
        self.update_file(&found.path, &file, ParseResult::unusable(vec![problem]));
    }

    fn update_file(&mut self, path: &Path, file: &Arc<str>, parsed: ParseResult) {
        let restored = &mut self.restored;
        let state = self.files.entry(path.to_owned()).or_default();
        let mut before = std::mem::take(&mut state.services);
        let previous = before.clone();
        let because = |about: Option<&ServiceName>| -> Arc<str> {
            let subject = about.map(subject_of);
            let about_it = |p: &&Problem| subject.as_ref().is_none_or(|subject| p.subject == *subject);
            let first = parsed.problems.iter().find(about_it).or(parsed.problems.first());
            first.map_or_else(|| "it cannot be read".into(), |problem| problem.to_string().into())
        };
        // Before a file is first read, its last good services are those from before the restart.
        for (name, registration) in restored.extract_if(.., |_, known| known.place.file == *file) {
            let told = ServiceStatement {
                content: ServiceContent::Restored(registration),
                stale_because: None,
                partial_because: None,
            };
            before.entry(name).or_insert(told);
        }
        let has_failed = parsed.has_failed();
        if has_failed {
            let because = because(None);
            before.values_mut().for_each(|told| told.stale_because = Some(because.clone()));
            state.services = before;
        } else {
            if parsed.says_nothing {
                state.emptied.extend(before.keys().cloned());
            } else {
                state.emptied.clear();
            }
            for name in &parsed.unreadable {
                if let Some((name, mut told)) = before.remove_entry(name) {
                    told.stale_because = Some(because(Some(&name)));
                    state.services.insert(name, told);
                }
            }
            for service in parsed.services {
                // An unchanged service keeps its pointer, by which later stages see that nothing changed.
                let known = match before.remove(&service.name) {
                    Some(ServiceStatement { content: ServiceContent::Parsed(same), .. })
                        if *same == service =>
                    {
                        same
                    }
                    _ => Arc::new(service),
                };
                state.services.insert(known.name.clone(), ServiceStatement::fresh(known));
            }
            if parsed.has_unnamed {
                // A service that is no longer named may be one of the records without a readable name.
                let because = because(None);
                for (name, mut told) in before {
                    told.stale_because = Some(because.clone());
                    state.services.insert(name, told);
                }
            }
        }
        let is_known = |name: &ServiceName| state.services.contains_key(name);
        let mut left_out: BTreeSet<Arc<str>> = BTreeSet::new();
        state.unusable.clear();
        match parsed.failure {
            Some(_) if !state.services.is_empty() => {}
            // A file with such a name never had a service.
            Some(FileFailure::MisnamedFile) => {}
            Some(FileFailure::NotRead) => state.unusable.push(because(None)),
            Some(FileFailure::Misnamed) => _ = left_out.insert(because(None)),
            None if parsed.has_unnamed => _ = left_out.insert(because(None)),
            None => {}
        }
        left_out
            .extend(parsed.unreadable.iter().filter(|name| !is_known(name)).map(|name| because(Some(name))));
        state.left_out = left_out.into_iter().collect();
        let with_outcome = |problem: Problem| {
            let known = |name: &ServiceName| state.services.contains_key(name);
            let unreadable = parsed.unreadable.iter().find(|name| subject_of(name) == problem.subject);
            let outcome = match (has_failed, unreadable) {
                (true, _) if state.services.is_empty() => "nothing of this file is in force",
                (true, _) => "what was last read of this file stays in force",
                (false, Some(name)) if known(name) => "what was last read of this service stays in force",
                (false, Some(_)) => "this service is not in force",
                (false, None) => return problem,
            };
            problem.with_outcome(outcome)
        };
        state.problems = parsed.problems.into_iter().map(with_outcome).collect();
        self.record_changes(path, previous);
    }

    /// Records the services of a file that differ from `previous`.
    fn record_changes(&mut self, path: &Path, mut previous: BTreeMap<ServiceName, ServiceStatement>) {
        if self.tree.is_none() {
            // The next merge covers every service anyway.
            return;
        }
        let Some(state) = self.files.get(path) else { return };
        for (name, told) in &state.services {
            match previous.remove(name) {
                Some(before) if is_same(&before, told) => {}
                Some(_) => _ = self.changed.insert(name.clone()),
                None => {
                    let claims = self.claims.entry(name.clone()).or_default();
                    if let Err(at) = claims.binary_search_by(|claim| claim.as_path().cmp(path)) {
                        claims.insert(at, path.to_owned());
                    }
                    self.changed.insert(name.clone());
                }
            }
        }
        self.record_removed(path, previous.into_keys());
    }

    /// Records that a file no longer names these services.
    fn record_removed(&mut self, path: &Path, services: impl IntoIterator<Item = ServiceName>) {
        for name in services {
            if let Some(claims) = self.claims.get_mut(&name) {
                claims.retain(|claim| claim != path);
                if claims.is_empty() {
                    self.claims.remove(&name);
                }
            }
            self.changed.insert(name);
        }
    }

    /// Keeps everything below unreadable directories as it was, including services from before a restart.
    pub(super) fn keep_unreadable(&mut self, unreadable: &[(PathBuf, String)]) {
        for (directory, why) in unreadable {
            let because: Arc<str> = format!("{}: {why}", directory.display()).into();
            for (path, state) in &mut self.files {
                if path.starts_with(directory) {
                    state.stat = None;
                    state.hash = None;
                    state.services.values_mut().for_each(|told| told.stale_because = Some(because.clone()));
                }
            }
            let below = |known: &Registration| Path::new(&*known.place.file).starts_with(directory);
            for (name, known) in self.restored.extract_if(.., |_, known| below(known)) {
                let state = self.files.entry(PathBuf::from(&*known.place.file)).or_default();
                let told = ServiceStatement::stale(ServiceContent::Restored(known), because.clone());
                state.services.insert(name, told);
            }
        }
    }

    /// Forgets files that were removed, unless they may be being replaced.
    pub(super) fn forget_missing(
        &mut self,
        present: &BTreeSet<PathBuf>,
        unreadable: &[(PathBuf, String)],
        now: Instant,
        scan: &mut Scan,
    ) {
        let unsettled = &mut self.unsettled;
        self.files.retain(|path, state| {
            if present.contains(path) || unreadable.iter().any(|(directory, _)| path.starts_with(directory)) {
                return true;
            }
            is_kept_for_now(path, state, now, unsettled, scan)
        });
        self.drop_restored(scan);
    }

    /// Forgets one file that was removed, unless it may be being replaced.
    fn forget_file(&mut self, path: &Path, now: Instant, scan: &mut Scan) {
        let Some(state) = self.files.get_mut(path) else { return };
        if !is_kept_for_now(path, state, now, &mut self.unsettled, scan)
            && let Some(state) = self.files.remove(path)
        {
            self.record_removed(path, state.services.into_keys());
        }
    }

    /// Drops the services from before a restart that no file names any more: they become absent, which the
    /// guard judges.
    fn drop_restored(&mut self, scan: &Scan) {
        if scan.again.is_none() {
            self.restored.clear();
        }
    }

    /// Keeps the endpoints of shared services from before a restart.
    ///
    /// A service that several files share is complete only once all files have been usable since the start.
    /// Before that, an unusable file may list a previous endpoint, so no previous endpoint counts as removed.
    fn keep_restored_parts(&mut self, scan: &mut Scan) {
        let never_used =
            self.files.values().find_map(|state| state.unusable.first().or(state.left_out.first()));
        let Some(because) = never_used.or(scan.statement.unusable.first()) else {
            if scan.again.is_none() {
                self.restored_parts.clear();
            }
            return;
        };
        self.restored_parts.retain(|name, known| {
            let Some(told) = scan.statement.services.get_mut(name) else { return false };
            let ServiceContent::Parsed(service) = &told.content else { return true };
            let is_there = |known: &Endpoint| {
                service.endpoints.iter().any(|endpoint| comes_from(&endpoint.address, known))
            };
            let is_missing = service.is_shared && !known.endpoints.iter().all(is_there);
            if is_missing && told.partial_because.is_none() {
                told.partial_because = Some(because.clone());
            }
            is_missing
        });
    }

    /// Merges all files. If two files name one service, the file that counted before counts, or else the
    /// first in path order.
    pub(super) fn merge(&mut self, scan: &mut Scan) {
        let mut claims: BTreeMap<&ServiceName, Vec<(&PathBuf, &ServiceStatement)>> = BTreeMap::new();
        for (path, state) in &self.files {
            for (name, told) in &state.services {
                claims.entry(name).or_default().push((path, told));
            }
        }
        let mut merged = MergedServices::default();
        for (name, claims) in &claims {
            let told: Vec<&ServiceStatement> = claims.iter().map(|(_, told)| *told).collect();
            merged.add(name, &told, self.incumbents.get(*name), self.joined.get(*name));
        }
        let paths = |claims: Vec<(&PathBuf, &ServiceStatement)>| {
            claims.into_iter().map(|(path, _)| path.clone()).collect()
        };
        self.claims = claims.into_iter().map(|(name, claims)| (name.clone(), paths(claims))).collect();
        self.changed.clear();
        let MergedServices { services, incumbents, joined, conflicts } = merged;
        scan.statement.services = services;
        self.incumbents = incumbents;
        self.joined = joined;
        self.conflicts = conflicts;
        self.add_general_parts(scan);
    }

    /// Merges the services whose files changed.
    fn merge_changed(&mut self, scan: &mut Scan) {
        let changed = std::mem::take(&mut self.changed);
        let mut merged = MergedServices::default();
        for name in &changed {
            let files = self.claims.get(name).into_iter().flatten();
            let told: Vec<&ServiceStatement> =
                files.filter_map(|path| self.files.get(path)?.services.get(name)).collect();
            merged.add(name, &told, self.incumbents.get(name), self.joined.get(name));
            self.incumbents.remove(name);
            self.joined.remove(name);
            self.conflicts.remove(name);
        }
        let MergedServices { services, incumbents, joined, conflicts } = merged;
        scan.statement.services = services;
        self.incumbents.extend(incumbents);
        self.joined.extend(joined);
        self.conflicts.extend(conflicts);
        scan.only = Some(changed);
        self.add_general_parts(scan);
    }

    /// Adds the parts of the statement that do not belong to one service.
    fn add_general_parts(&mut self, scan: &mut Scan) {
        let told = &mut scan.statement;
        for state in self.files.values() {
            told.problems.extend(state.problems.iter().cloned());
            told.unusable.extend(state.unusable.iter().cloned());
            told.left_out.extend(state.left_out.iter().cloned());
            told.emptied
                .extend(state.emptied.iter().filter(|name| !self.claims.contains_key(*name)).cloned());
        }
        told.problems.extend(self.conflicts.values().flatten().cloned());
        told.problems.sort();
        told.problems.dedup();
        self.keep_restored_parts(scan);
    }
}

/// Services merged from the files that name them.
#[derive(Default)]
struct MergedServices {
    services: BTreeMap<ServiceName, ServiceStatement>,
    incumbents: BTreeMap<ServiceName, Arc<str>>,
    joined: BTreeMap<ServiceName, Arc<ParsedService>>,
    conflicts: BTreeMap<ServiceName, Vec<Problem>>,
}

impl MergedServices {
    /// Adds a service from the statements of the files that name it, in path order. `incumbent` is the file
    /// that counted before; `joined` is the previous result for a shared service.
    fn add(
        &mut self,
        name: &ServiceName,
        claims: &[&ServiceStatement],
        incumbent: Option<&Arc<str>>,
        joined: Option<&Arc<ParsedService>>,
    ) {
        if claims.len() > 1
            && let Some(told) = join_shared(name, claims, joined)
        {
            if let ServiceContent::Parsed(service) = &told.content {
                self.joined.insert(name.clone(), service.clone());
            }
            self.incumbents.insert(name.clone(), place_of(&told).file);
            self.services.insert(name.clone(), told);
            return;
        }
        let stayed = claims.iter().find(|told| Some(&place_of(told).file) == incumbent);
        let Some(counts) = stayed.or(claims.first()) else { return };
        let why = if stayed.is_some() { "since it was there before" } else { "since it is the first" };
        for other in claims.iter().filter(|other| !std::ptr::eq(**other, *counts)) {
            let message = format!("`{name}` is also in {}, which counts, {why}", place_of(counts));
            let problem = Problem::new(place_of(other), subject_of(name), message);
            self.conflicts.entry(name.clone()).or_default().push(problem);
        }
        self.incumbents.insert(name.clone(), place_of(counts).file);
        self.services.insert(name.clone(), ServiceStatement::clone(counts));
    }
}

/// Reports whether both are equal by pointer.
fn is_same(before: &ServiceStatement, now: &ServiceStatement) -> bool {
    let is_known = match (&before.content, &now.content) {
        (ServiceContent::Parsed(before), ServiceContent::Parsed(now)) => Arc::ptr_eq(before, now),
        (ServiceContent::Restored(before), ServiceContent::Restored(now)) => Arc::ptr_eq(before, now),
        _ => false,
    };
    is_known && before.stale_because == now.stale_because && before.partial_because == now.partial_because
}

/// Reports whether a missing file is kept for the moment, because a writer may be replacing it. If so,
/// schedules another scan.
fn is_kept_for_now(
    path: &Path,
    state: &mut FileState,
    now: Instant,
    unsettled: &mut BTreeSet<PathBuf>,
    scan: &mut Scan,
) -> bool {
    let gone = now.saturating_duration_since(*state.missing_since.get_or_insert(now));
    let is_kept = gone < SETTLED;
    if is_kept {
        let wait = SETTLED - gone;
        unsettled.insert(path.to_owned());
        scan.again = Some(scan.again.map_or(wait, |sooner| sooner.min(wait)));
    }
    is_kept
}

/// Joins a service that several files share, as Prometheus does with a job. Returns `None` if the files do
/// not share it on purpose. A result equal to `before` keeps its pointer.
fn join_shared(
    name: &ServiceName,
    claims: &[&ServiceStatement],
    before: Option<&Arc<ParsedService>>,
) -> Option<ServiceStatement> {
    let parts: Vec<&Arc<ParsedService>> = claims
        .iter()
        .map(|told| match &told.content {
            ServiceContent::Parsed(service) if service.is_shared => Some(service),
            ServiceContent::Parsed(_) | ServiceContent::Restored(_) => None,
        })
        .collect::<Option<_>>()?;
    let mut whole = ParsedService::clone(parts.first()?);
    let mut endpoints: BTreeMap<&Address, &ParsedEndpoint> = BTreeMap::new();
    for endpoint in parts.iter().flat_map(|part| &part.endpoints) {
        endpoints.entry(&endpoint.address).or_insert(endpoint);
    }
    whole.name = name.clone();
    whole.endpoints = endpoints.into_values().cloned().collect();
    whole.protocol = parts.iter().find_map(|part| part.protocol);
    // A file that is unreadable now contributes its last good part, so the service may be incomplete.
    let stale = claims.iter().find_map(|told| told.stale_because.clone());
    whole.partial_because = parts.iter().find_map(|part| part.partial_because.clone()).or(stale);
    let whole = match before {
        Some(before) if **before == whole => before.clone(),
        _ => Arc::new(whole),
    };
    Some(ServiceStatement::fresh(whole))
}

/// Reports whether the endpoint `known` may come from a record with `address`.
fn comes_from(address: &Address, known: &Endpoint) -> bool {
    address.port.get() == known.address.port()
        && match &address.host {
            Host::Ip(ip) => *ip == known.address.ip(),
            Host::Name(name) => known.hostname.as_ref() == Some(name),
        }
}

fn place_of(told: &ServiceStatement) -> Place {
    match &told.content {
        ServiceContent::Parsed(service) => service.place.clone(),
        ServiceContent::Restored(registration) => registration.place.clone(),
    }
}

impl DirectoryWalk {
    fn problem(&mut self, path: &Path, message: &str) {
        let file: Arc<str> = path.display().to_string().into();
        self.problems.push(Problem::new(Place::file(file.clone()), file, message));
    }

    /// Watches every link on the path to `path`, and the directory in which the path ends.
    fn watch_path(&mut self, path: &Path) {
        let (mut way, end) = links(path);
        if let (Some(parent), Some(name)) = (end.parent(), end.file_name()) {
            way.push((parent.to_owned(), name.to_owned()));
        }
        for (directory, name) in way {
            self.link_components.insert((directory.clone(), name.clone()));
            match self.directories.get_mut(&directory) {
                Some(WatchedDirectory { only: Some(names), .. }) => _ = names.insert(name),
                Some(WatchedDirectory { only: None, .. }) => {}
                None => {
                    if let Ok(metadata) = std::fs::metadata(&directory) {
                        let id = (metadata.dev(), metadata.ino());
                        let only = Some(BTreeSet::from([name]));
                        self.directories.insert(directory, WatchedDirectory { id, only });
                    }
                }
            }
        }
    }
}

/// The bytes of a file, if they are consistent.
enum FileContent {
    Whole {
        bytes: Vec<u8>,
        stat: FileStat,
        /// Every user of the host may read the file.
        is_public: bool,
    },
    /// The file was changed while it was being read.
    Changing,
    TooLarge,
}

fn read_bytes(path: &Path, limit: usize) -> io::Result<FileContent> {
    // If the regular file has been replaced by a FIFO since, `NONBLOCK` keeps the open from blocking, and the
    // FIFO is not read.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let before = file.metadata()?;
    if !before.is_file() {
        return Ok(FileContent::Changing);
    }
    let limit = u64::try_from(limit).unwrap_or(u64::MAX);
    if before.size() > limit {
        return Ok(FileContent::TooLarge);
    }
    let mut bytes = Vec::with_capacity(usize::try_from(before.size()).unwrap_or_default());
    (&mut file).take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    let after = FileStat::of(&file.metadata()?);
    if after != FileStat::of(&before) || u64::try_from(bytes.len()).ok() != Some(after.size) {
        return Ok(FileContent::Changing);
    }
    let is_public = is_public(&file, &before, path);
    Ok(FileContent::Whole { bytes, stat: after, is_public })
}

/// Reports whether a file is hidden or is one that editors, package managers and atomic writers leave behind.
pub(super) fn is_skipped(name: &OsStr) -> bool {
    const ENDINGS: [&str; 9] =
        ["~", ".swp", ".swo", ".swx", ".tmp", ".bak", ".rpmsave", ".rpmnew", ".rpmorig"];
    let name = name.to_string_lossy();
    name.starts_with('.')
        || name == "4913"
        || (name.starts_with('#') && name.ends_with('#'))
        || name.contains(".dpkg-")
        || ENDINGS.iter().any(|ending| name.ends_with(ending))
}

/// Returns the name of a file without its extension, and whether the extension is one of YAML or JSON.
fn stem(name: &str) -> (&str, bool) {
    let endings = [".yaml", ".yml", ".json"];
    match endings.iter().find_map(|ending| name.strip_suffix(ending)) {
        Some(stem) => (stem, true),
        None => (name, false),
    }
}

/// Reports whether a file of this name is read when formats are detected.
fn is_read(name: &str) -> bool {
    stem(name).1 || !name.contains('.')
}

fn kind_name(file_type: FileType) -> &'static str {
    if file_type.is_fifo() {
        "FIFO"
    } else if file_type.is_socket() {
        "socket"
    } else if file_type.is_dir() {
        "directory"
    } else {
        "device"
    }
}

/// Returns the meaning of a file system error for the operator who has to fix it.
pub(super) fn explain_error(error: &io::Error) -> String {
    use rustix::io::Errno;
    let number = error.raw_os_error();
    let is = |errno: Errno| number == Some(errno.raw_os_error());
    if is(Errno::LOOP) {
        "a link that leads back to itself".to_owned()
    } else if is(Errno::ACCESS) || is(Errno::PERM) {
        "permission denied: the control plane's user has to be able to read it".to_owned()
    } else if is(Errno::NOENT) {
        "it does not exist".to_owned()
    } else if is(Errno::STALE) || is(Errno::NOTCONN) {
        "its file system is gone".to_owned()
    } else {
        // The standard library appends the error number.
        let text = error.to_string();
        text.split(" (os error").next().unwrap_or(&text).to_lowercase()
    }
}
