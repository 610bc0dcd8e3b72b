//! The state of the disk: the files that exist, the content of each, and the last usable content of each.
//!
//! All functions here block and are called on a thread for blocking work. A file is read again if the kernel
//! reports a change, if its metadata changed, and at every `poll`; it is parsed again if its bytes changed.
//!
//! While every directory is watched, a scan covers only the files that the kernel reported, and costs as much
//! as they do. Any other change than a plain file that was created, changed or removed (a directory, a link,
//! a component of a link's path, lost events) leads to a scan of the whole directory, as do a failure and
//! every `poll`.

mod content;
mod merge;
mod state;
mod walk;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use vmesh_model::yaml::too_large;
use vmesh_model::{Place, Problem, Registration, ServiceName};
use xxhash_rust::xxh3::xxh3_64;

use super::config::FileConfig;
use super::privacy::redacted;
use super::watch::{DirectoryWatches, Hints, ScanRequest, WatchedDirectories};
use crate::assemble::{ServiceContent, ServiceStatement, Statement};
use crate::format::{self, Format, ParseResult, ParsedService};
use crate::source::{Registrations, SourceError};

use content::{FileContent, read_bytes};
use state::FileState;
use walk::{DirectoryWalk, FileStat, FoundFile, WatchedTree, is_read, stem};
pub(super) use walk::{explain_error, is_skipped};

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
    /// The services that `statement` covers, after a scan of changed files only; a service that is not in `statement`
    /// is removed. `None`: `statement` covers everything.
    pub(super) only: Option<BTreeSet<ServiceName>>,
    /// The number of files that were parsed, for tests.
    pub(super) parsed: usize,
    /// The number of files that were read, and the number of those that were unusable as a whole.
    pub(super) read: u64,
    pub(super) refused: u64,
    /// The number of records that were left out.
    pub(super) bad_records: u64,
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
                .map(|(name, service_view)| (name.clone(), file(&service_view.registration)))
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
                .map(|(name, service_view)| (name.clone(), service_view.registration.clone()))
                .collect(),
            restored_parts: restored
                .map(|(name, service_view)| (name.clone(), service_view.registration.clone()))
                .collect(),
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
            let outcome = "the last good content of the files below it stays in force";
            scan.statement.problems.push(problem.with_outcome(outcome));
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
            action: format!("read {}", path.display()),
            cause: explain_error(&cause).into(),
        }
    }

    fn suspect(&self, suspicion: String) -> SourceError {
        SourceError::Suspect { source_name: self.source.clone(), suspicion }
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
            let message = format!("{why}; until then the files are only read every {every}");
            if !self.has_warned {
                tracing::warn!(
                    "discovery source `{}` cannot watch its files for changes: {message}",
                    self.source
                );
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

    /// Keeps everything below unreadable directories as it was, including services from before a restart.
    pub(super) fn keep_unreadable(&mut self, unreadable: &[(PathBuf, String)]) {
        for (directory, why) in unreadable {
            let because: Arc<str> = format!("{}: {why}", directory.display()).into();
            for (path, state) in &mut self.files {
                if path.starts_with(directory) {
                    state.stat = None;
                    state.hash = None;
                    state
                        .services
                        .values_mut()
                        .for_each(|statement| statement.stale_because = Some(because.clone()));
                }
            }
            let below = |known: &Registration| Path::new(&*known.place.file).starts_with(directory);
            for (name, known) in self.restored.extract_if(.., |_, known| below(known)) {
                let state = self.files.entry(PathBuf::from(&*known.place.file)).or_default();
                let statement = ServiceStatement::stale(ServiceContent::Restored(known), because.clone());
                state.services.insert(name, statement);
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
