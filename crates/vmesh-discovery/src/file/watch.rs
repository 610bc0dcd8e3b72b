//! Change events of the kernel (inotify). Events only serve as hints: a scan of the disk decides what
//! changed.
//!
//! Only directories are watched, never files, because a file that is replaced by a rename is a new inode. The
//! directories of all links on the path to a file are watched too: swapping a link (`current -> releases/42`)
//! changes nothing in the directory that it points to.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, CreateKind, ModifyKind};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;

use super::disk::is_skipped;

/// A change counts as complete this long after its last event. A rename or a close is complete at once; the
/// delay waits for the rest of the same job, such as a tool that writes several files or an editor that moves
/// its backup.
const QUIET: Duration = Duration::from_millis(20);
/// The limit of that delay: a process that writes all the time must not delay the changes of others.
const BURST: Duration = Duration::from_millis(100);
/// A file that was written and not closed counts as half written until it has been quiet for this long.
const QUIET_OPEN: Duration = Duration::from_millis(500);
/// The limit of that delay, for a writer that never closes its files.
const BURST_OPEN: Duration = Duration::from_secs(5);
/// The limit of remembered paths; beyond it a scan of everything is cheaper.
const MAX_PATHS: usize = 10_000;

/// The events since the last scan. Shared with the thread that receives them.
#[derive(Debug, Default)]
pub(super) struct Hints {
    events: Mutex<PendingEvents>,
    notify: Notify,
    /// The prefix of the kernel's absolute paths if the configured path is relative: files are known by the
    /// path under which the walk found them.
    working_directory: Option<PathBuf>,
}

#[derive(Debug, Default)]
struct PendingEvents {
    paths: BTreeMap<PathBuf, PathActivity>,
    /// When a full scan is due, because events were lost or too many paths changed.
    everything: Option<Instant>,
    /// The watched directories in which only some names matter.
    only: BTreeMap<PathBuf, BTreeSet<OsString>>,
}

#[derive(Debug, Clone, Copy)]
struct PathActivity {
    first: Instant,
    last: Instant,
    /// The file was written and has not been closed yet.
    is_open: bool,
}

impl PathActivity {
    /// Returns when the file may be read if no further event arrives.
    fn due(&self) -> Instant {
        match self.is_open {
            true => (self.last + QUIET_OPEN).min(self.first + BURST_OPEN),
            false => (self.last + QUIET).min(self.first + BURST),
        }
    }
}

/// The paths to scan.
#[derive(Debug, Default)]
pub(super) struct ScanRequest {
    /// Files that were closed, renamed or removed: their content is complete.
    pub(super) whole: BTreeSet<PathBuf>,
    /// Files that are being written.
    pub(super) busy: BTreeSet<PathBuf>,
    /// Events were lost or too many: anything may have changed.
    pub(super) everything: bool,
}

impl Hints {
    /// Creates the hints for files below `path`.
    pub(super) fn below(path: &Path) -> Hints {
        let working_directory = if path.is_relative() { std::env::current_dir().ok() } else { None };
        Hints { working_directory, ..Hints::default() }
    }

    fn as_configured(&self, path: PathBuf) -> PathBuf {
        match self.working_directory.as_ref().and_then(|dir| path.strip_prefix(dir).ok()) {
            Some(relative) => relative.to_owned(),
            None => path,
        }
    }

    fn events(&self) -> MutexGuard<'_, PendingEvents> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when the next scan is due, as far as known now.
    pub(super) fn due(&self) -> Option<Instant> {
        let events = self.events();
        let over = events.paths.values().filter(|activity| !activity.is_open);
        // One scan covers all pending changes: its due time follows the latest change, within `BURST` of the
        // earliest.
        let last = over.clone().map(PathActivity::due).max();
        let burst = over.map(|activity| activity.first + BURST).min();
        let over = last.zip(burst).map(|(last, burst)| last.min(burst));
        let open = events.paths.values().filter(|activity| activity.is_open).map(PathActivity::due).min();
        [over, open, events.everything].into_iter().flatten().min()
    }

    /// Takes the paths to scan now.
    pub(super) fn take(&self, now: Instant) -> ScanRequest {
        let mut events = self.events();
        let mut request =
            ScanRequest { everything: events.everything.take().is_some(), ..ScanRequest::default() };
        events.paths.retain(|path, activity| {
            let is_busy = activity.is_open && activity.due() > now;
            let paths = if is_busy { &mut request.busy } else { &mut request.whole };
            paths.insert(path.clone());
            is_busy
        });
        request
    }

    /// Waits for a new event.
    pub(super) async fn event(&self) {
        self.notify.notified().await;
    }

    fn record(&self, event: notify::Result<Event>) {
        let now = Instant::now();
        let mut events = self.events();
        match event {
            Ok(event) if !event.need_rescan() => {
                let Some(is_open) = leaves_open(event.kind) else { return };
                let mut is_news = false;
                for path in event.paths {
                    is_news |= events.record_path(self.as_configured(path), is_open, now);
                }
                if !is_news {
                    return;
                }
            }
            // Events were lost, or a watch failed.
            _ => events.everything = Some(now + QUIET),
        }
        drop(events);
        self.notify.notify_one();
    }
}

/// Returns whether an event leaves a file open for writing; `None` if it is irrelevant, like the events of
/// our own reads.
fn leaves_open(kind: EventKind) -> Option<bool> {
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => Some(false),
        EventKind::Access(_) => None,
        EventKind::Modify(ModifyKind::Data(_)) | EventKind::Create(CreateKind::File) => Some(true),
        _ => Some(false),
    }
}

impl PendingEvents {
    fn record_path(&mut self, path: PathBuf, is_open: bool, now: Instant) -> bool {
        let name = path.file_name().unwrap_or_default();
        if let Some(only) = path.parent().and_then(|parent| self.only.get(parent))
            && !only.contains(name)
        {
            return false;
        }
        // Writes to temporary files are ignored. Their creation and removal matter: `..data` (Kubernetes)
        // looks like one.
        if is_open && is_skipped(name) {
            return false;
        }
        if self.paths.len() >= MAX_PATHS {
            self.paths.clear();
            self.everything = Some(now + QUIET);
        }
        let activity = self.paths.entry(path).or_insert(PathActivity { first: now, last: now, is_open });
        activity.last = now;
        activity.is_open = is_open;
        true
    }
}

/// Directories to watch, by path: the device and inode number of each, and the names that matter in it unless
/// all do.
pub(super) type WatchedDirectories = BTreeMap<PathBuf, WatchedDirectory>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WatchedDirectory {
    pub(super) id: (u64, u64),
    pub(super) only: Option<BTreeSet<OsString>>,
}

/// The watches of the process.
#[derive(Debug)]
pub(super) struct DirectoryWatches {
    watcher: RecommendedWatcher,
    hints: Arc<Hints>,
    watched: BTreeMap<PathBuf, (u64, u64)>,
}

impl DirectoryWatches {
    pub(super) fn new(hints: Arc<Hints>) -> Result<DirectoryWatches, String> {
        let events = hints.clone();
        let watcher =
            notify::recommended_watcher(move |event| events.record(event)).map_err(|e| explain_error(&e))?;
        Ok(DirectoryWatches { watcher, hints, watched: BTreeMap::new() })
    }

    /// Removes the watches of directories that the kernel reported: such a directory and its watch may have
    /// been removed, and a new directory of the same name may have the same inode number. After lost events,
    /// removes all watches.
    pub(super) fn unwatch_reported(&mut self, request: &ScanRequest) {
        let ScanRequest { whole, busy, everything } = request;
        let is_doubtful = |path: &Path| *everything || whole.contains(path) || busy.contains(path);
        for (path, _) in self.watched.extract_if(.., |path, _| is_doubtful(path)) {
            _ = self.watcher.unwatch(&path);
        }
    }

    /// Watches these directories and no others, replacing the watch of a directory that was replaced. Returns
    /// whether a watch was added: changes before that were not reported and have to be found by a scan.
    pub(super) fn watch_only(&mut self, wanted: &WatchedDirectories) -> (bool, Result<(), String>) {
        let outdated: Vec<_> = self
            .watched
            .iter()
            .filter(|(path, id)| wanted.get(*path).is_none_or(|wanted| wanted.id != **id))
            .map(|(path, _)| path.clone())
            .collect();
        for path in outdated {
            self.watched.remove(&path);
            // Errors are ignored: a removed directory has lost its watch already.
            _ = self.watcher.unwatch(&path);
        }
        let only = wanted.iter().filter_map(|(path, d)| Some((path.clone(), d.only.clone()?))).collect();
        self.hints.events().only = only;
        let (mut is_new, mut failure) = (false, Ok(()));
        for (path, directory) in wanted {
            if self.watched.contains_key(path) {
                continue;
            }
            match self.watcher.watch(path, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    is_new = true;
                    self.watched.insert(path.clone(), directory.id);
                }
                // The directory is gone again; the next scan finds out.
                Err(error) if matches!(error.kind, notify::ErrorKind::PathNotFound) => {}
                Err(error) => failure = Err(explain_error(&error)),
            }
        }
        (is_new, failure)
    }
}

fn explain_error(error: &notify::Error) -> String {
    match &error.kind {
        notify::ErrorKind::MaxFilesWatch => {
            "the host has no watches left: raise fs.inotify.max_user_watches".to_owned()
        }
        notify::ErrorKind::Io(error)
            if error.raw_os_error() == Some(rustix::io::Errno::MFILE.raw_os_error()) =>
        {
            "the host has no watchers left: raise fs.inotify.max_user_instances".to_owned()
        }
        notify::ErrorKind::Io(error) => error.to_string(),
        _ => error.to_string(),
    }
}

/// Returns the links on the path to `path`, each as its directory and its name there, and where the path
/// ends.
pub(super) fn links(path: &Path) -> (Vec<(PathBuf, OsString)>, PathBuf) {
    use std::path::Component;
    /// The kernel's limit of links in one path.
    const HOPS: usize = 40;

    let mut links = Vec::new();
    let mut at = PathBuf::new();
    let mut rest: Vec<OsString> = Vec::new();
    let push = |rest: &mut Vec<OsString>, path: &Path| {
        rest.extend(path.components().rev().map(|component| component.as_os_str().to_owned()));
    };
    push(&mut rest, &std::path::absolute(path).unwrap_or_else(|_| path.to_owned()));
    while let Some(name) = rest.pop() {
        match Path::new(&name).components().next() {
            Some(Component::RootDir | Component::Prefix(_)) => at = PathBuf::from("/"),
            Some(Component::ParentDir) => _ = at.pop(),
            Some(Component::CurDir) | None => {}
            Some(Component::Normal(_)) => match std::fs::read_link(at.join(&name)) {
                Ok(target) if links.len() < HOPS => {
                    links.push((at.clone(), name));
                    push(&mut rest, &target);
                }
                _ => at.push(name),
            },
        }
    }
    (links, at)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(kind: EventKind, path: &str) -> notify::Result<Event> {
        Ok(Event::new(kind).add_path(path.into()))
    }

    const WRITE: EventKind = EventKind::Modify(ModifyKind::Data(notify::event::DataChange::Any));
    const CLOSE: EventKind = EventKind::Access(AccessKind::Close(AccessMode::Write));
    const READ: EventKind = EventKind::Access(AccessKind::Open(AccessMode::Any));
    const RENAME: EventKind = EventKind::Modify(ModifyKind::Name(notify::event::RenameMode::To));

    #[test]
    fn a_file_that_is_written_is_not_read_before_it_is_closed() {
        let hints = Hints::default();
        hints.record(event(READ, "/d/a"));
        assert!(hints.due().is_none());
        hints.record(event(WRITE, "/d/a"));
        let now = Instant::now();
        assert!(hints.due().unwrap() > now + Duration::from_millis(300));
        let request = hints.take(now);
        assert!(request.busy.contains(Path::new("/d/a")) && request.whole.is_empty());
        hints.record(event(CLOSE, "/d/a"));
        assert!(hints.due().unwrap() < Instant::now() + Duration::from_millis(25));
        let request = hints.take(Instant::now());
        assert!(request.whole.contains(Path::new("/d/a")) && request.busy.is_empty());
        assert!(hints.due().is_none());
    }

    #[test]
    fn who_never_closes_a_file_is_not_waited_for_for_ever() {
        let hints = Hints::default();
        hints.record(event(WRITE, "/d/a"));
        let request = hints.take(Instant::now() + Duration::from_secs(1));
        assert!(request.whole.contains(Path::new("/d/a")));
    }

    #[test]
    fn one_who_writes_all_the_time_does_not_hide_the_others() {
        let hints = Hints::default();
        hints.record(event(RENAME, "/d/b"));
        let first = Instant::now();
        for _ in 0..100 {
            hints.record(event(CLOSE, "/d/a"));
        }
        assert!(hints.due().unwrap() <= first + BURST);
    }

    #[test]
    fn temporary_files_and_strangers_are_not_heard() {
        let hints = Hints::default();
        hints.record(event(WRITE, "/d/.a.swp"));
        hints.events().only.insert("/etc".into(), std::iter::once("vmesh".into()).collect());
        hints.record(event(RENAME, "/etc/passwd"));
        assert!(hints.due().is_none());
        hints.record(event(RENAME, "/etc/vmesh"));
        assert!(hints.due().is_some());
    }

    #[test]
    fn lost_events_are_a_reason_to_look_at_everything() {
        let hints = Hints::default();
        hints.record(Ok(Event::new(EventKind::Other).set_flag(notify::event::Flag::Rescan)));
        assert!(hints.due().is_some());
        assert!(hints.take(Instant::now()).everything);
        assert!(!hints.take(Instant::now()).everything);
    }

    #[test]
    fn the_way_to_a_file_may_lead_over_links() {
        let dir = vmesh_testkit::tempdir().unwrap();
        let dir = std::fs::canonicalize(&dir).unwrap();
        std::fs::create_dir_all(dir.join("releases/42")).unwrap();
        std::fs::write(dir.join("releases/42/a"), "").unwrap();
        std::os::unix::fs::symlink("releases/42", dir.join("current")).unwrap();
        std::os::unix::fs::symlink("../d/../current/./a", dir.join("releases/a")).unwrap();
        std::os::unix::fs::symlink("loop", dir.join("loop")).unwrap();
        let (found, end) = links(&dir.join("releases/a"));
        let expected = [(dir.join("releases"), "a".into()), (dir.clone(), "current".into())];
        assert_eq!((found.as_slice(), end), (&expected[..], dir.join("releases/42/a")));
        assert_eq!(links(&dir.join("loop")).0.len(), 40);
    }

    #[test]
    fn a_relative_path_is_heard_of_under_the_name_by_which_it_was_found() {
        let absolute = std::env::current_dir().unwrap().join("services.d/a.yaml");
        assert_eq!(
            Hints::below(Path::new("services.d")).as_configured(absolute.clone()),
            Path::new("services.d/a.yaml")
        );
        assert_eq!(Hints::below(Path::new("/etc/vmesh")).as_configured(absolute.clone()), absolute);
    }
}
