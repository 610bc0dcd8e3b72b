//! Being told of changes: what the kernel says is only a hint of where to look, and when.
//!
//! Directories are watched and never files: a file that is replaced by renaming is another one afterwards. So are the
//! directories of all links on the way to a file, because swapping a link (`current -> releases/42`) changes nothing
//! in the directory that it points into.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode, CreateKind, ModifyKind};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;

use super::disk::is_skipped;

/// So long after its last event a change is taken to be over. Renaming and closing are over at once; this is for the
/// rest of the same job: a tool that writes several files, an editor that juggles with its backup.
const QUIET: Duration = Duration::from_millis(20);
/// Somebody who writes all the time must not keep the others from being seen.
const BURST: Duration = Duration::from_millis(100);
/// A file that was written to and not closed is half written until it has been quiet for so long.
const QUIET_OPEN: Duration = Duration::from_millis(500);
/// Then it is somebody who does not close their files.
const BURST_OPEN: Duration = Duration::from_secs(5);
/// With more paths than this a look at everything is cheaper.
const MAX_PATHS: usize = 10_000;

/// What was heard and not looked at yet. Shared with the thread that hears it.
#[derive(Debug, Default)]
pub(super) struct Hints {
    heard: Mutex<Heard>,
    news: Notify,
    /// What the kernel's absolute paths begin with where the configured path is relative: files are known by the path
    /// under which they were found.
    working_directory: Option<PathBuf>,
}

#[derive(Debug, Default)]
struct Heard {
    touched: BTreeMap<PathBuf, Touch>,
    /// Events were lost, or there are too many to tell apart.
    everything: Option<Instant>,
    /// Of watched directories those in which only some names matter.
    only: BTreeMap<PathBuf, BTreeSet<OsString>>,
}

#[derive(Debug, Clone, Copy)]
struct Touch {
    first: Instant,
    last: Instant,
    /// Written to and not closed yet.
    is_open: bool,
}

impl Touch {
    /// When it may be read, if nothing more is heard.
    fn due(&self) -> Instant {
        match self.is_open {
            true => (self.last + QUIET_OPEN).min(self.first + BURST_OPEN),
            false => (self.last + QUIET).min(self.first + BURST),
        }
    }
}

/// What to look at now.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// Files that were closed, renamed, removed: what they say is whole.
    pub(super) whole: BTreeSet<PathBuf>,
    /// Files that are being written.
    pub(super) busy: BTreeSet<PathBuf>,
    /// Events were lost, or there were too many: anything may have changed.
    pub(super) everything: bool,
}

impl Hints {
    /// For files below `path`.
    pub(super) fn below(path: &Path) -> Hints {
        let working_directory = if path.is_relative() { std::env::current_dir().ok() } else { None };
        Hints { working_directory, ..Hints::default() }
    }

    fn as_found(&self, path: PathBuf) -> PathBuf {
        match self.working_directory.as_ref().and_then(|dir| path.strip_prefix(dir).ok()) {
            Some(relative) => relative.to_owned(),
            None => path,
        }
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When to look, as far as is known now.
    pub(super) fn due(&self) -> Option<Instant> {
        let heard = self.heard();
        let over = heard.touched.values().filter(|touch| !touch.is_open);
        // The last of them, so that one look sees them all, but not later than the first of them can wait.
        let last = over.clone().map(Touch::due).max();
        let burst = over.map(|touch| touch.first + BURST).min();
        let over = last.zip(burst).map(|(last, burst)| last.min(burst));
        let open = heard.touched.values().filter(|touch| touch.is_open).map(Touch::due).min();
        [over, open, heard.everything].into_iter().flatten().min()
    }

    /// Takes what is to be looked at now.
    pub(super) fn take(&self, now: Instant) -> Look {
        let mut heard = self.heard();
        let mut look = Look { everything: heard.everything.take().is_some(), ..Look::default() };
        heard.touched.retain(|path, touch| {
            let is_busy = touch.is_open && touch.due() > now;
            let paths = if is_busy { &mut look.busy } else { &mut look.whole };
            paths.insert(path.clone());
            is_busy
        });
        look
    }

    /// Waits for something new to be heard.
    pub(super) async fn news(&self) {
        self.news.notified().await;
    }

    fn hear(&self, event: notify::Result<Event>) {
        let now = Instant::now();
        let mut heard = self.heard();
        match event {
            Ok(event) if !event.need_rescan() => {
                let Some(is_open) = meaning(event.kind) else { return };
                let mut is_news = false;
                for path in event.paths {
                    is_news |= heard.touch(self.as_found(path), is_open, now);
                }
                if !is_news {
                    return;
                }
            }
            // Lost events, or a watch that broke.
            _ => heard.everything = Some(now + QUIET),
        }
        drop(heard);
        self.news.notify_one();
    }
}

/// Whether an event leaves a file open for writing; `None` if it means nothing. Our own reading is heard too.
fn meaning(kind: EventKind) -> Option<bool> {
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => Some(false),
        EventKind::Access(_) => None,
        EventKind::Modify(ModifyKind::Data(_)) | EventKind::Create(CreateKind::File) => Some(true),
        _ => Some(false),
    }
}

impl Heard {
    fn touch(&mut self, path: PathBuf, is_open: bool, now: Instant) -> bool {
        let name = path.file_name().unwrap_or_default();
        if let Some(only) = path.parent().and_then(|parent| self.only.get(parent))
            && !only.contains(name)
        {
            return false;
        }
        // Temporary files are written at length. That they come and go matters: `..data` is one by its name.
        if is_open && is_skipped(name) {
            return false;
        }
        if self.touched.len() >= MAX_PATHS {
            self.touched.clear();
            self.everything = Some(now + QUIET);
        }
        let touch = self.touched.entry(path).or_insert(Touch { first: now, last: now, is_open });
        touch.last = now;
        touch.is_open = is_open;
        true
    }
}

/// Directories to be watched, by their path: which one it is (device, inode), and the names that matter in it if not
/// all do.
pub(super) type Directories = BTreeMap<PathBuf, Directory>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Directory {
    pub(super) id: (u64, u64),
    pub(super) only: Option<BTreeSet<OsString>>,
}

/// The watches that there are.
#[derive(Debug)]
pub(super) struct Watch {
    watcher: RecommendedWatcher,
    hints: Arc<Hints>,
    armed: BTreeMap<PathBuf, (u64, u64)>,
}

impl Watch {
    pub(super) fn new(hints: Arc<Hints>) -> Result<Watch, String> {
        let heard = hints.clone();
        let watcher = notify::recommended_watcher(move |event| heard.hear(event)).map_err(|e| plain(&e))?;
        Ok(Watch { watcher, hints, armed: BTreeMap::new() })
    }

    /// Takes no directory for watched that the kernel told of: it may have been removed, and its watch with it, and a new one of
    /// the same name may have got the same number. After lost events that may be any.
    pub(super) fn distrust(&mut self, look: &Look) {
        let Look { whole, busy, everything } = look;
        let is_doubtful = |path: &Path| *everything || whole.contains(path) || busy.contains(path);
        for (path, _) in self.armed.extract_if(.., |path, _| is_doubtful(path)) {
            _ = self.watcher.unwatch(&path);
        }
    }

    /// Watches these directories and no others, anew where one was replaced by another. Returns whether a watch was
    /// added: what happened before it was is not heard, so it has to be looked for.
    pub(super) fn arm(&mut self, wanted: &Directories) -> (bool, Result<(), String>) {
        let outdated: Vec<_> = self
            .armed
            .iter()
            .filter(|(path, id)| wanted.get(*path).is_none_or(|wanted| wanted.id != **id))
            .map(|(path, _)| path.clone())
            .collect();
        for path in outdated {
            self.armed.remove(&path);
            // It may be gone, and the watch with it.
            _ = self.watcher.unwatch(&path);
        }
        let only = wanted.iter().filter_map(|(path, d)| Some((path.clone(), d.only.clone()?))).collect();
        self.hints.heard().only = only;
        let (mut is_new, mut failure) = (false, Ok(()));
        for (path, directory) in wanted {
            if self.armed.contains_key(path) {
                continue;
            }
            match self.watcher.watch(path, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    is_new = true;
                    self.armed.insert(path.clone(), directory.id);
                }
                // Gone again: the next look tells.
                Err(error) if matches!(error.kind, notify::ErrorKind::PathNotFound) => {}
                Err(error) => failure = Err(plain(&error)),
            }
        }
        (is_new, failure)
    }
}

fn plain(error: &notify::Error) -> String {
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

/// The links on the way to `path`, as the directory that each is in and its name there; and where the way ends.
pub(super) fn links(path: &Path) -> (Vec<(PathBuf, OsString)>, PathBuf) {
    use std::path::Component;
    /// As many as the kernel follows.
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
        hints.hear(event(READ, "/d/a"));
        assert!(hints.due().is_none());
        hints.hear(event(WRITE, "/d/a"));
        let now = Instant::now();
        assert!(hints.due().unwrap() > now + Duration::from_millis(300));
        let look = hints.take(now);
        assert!(look.busy.contains(Path::new("/d/a")) && look.whole.is_empty());
        hints.hear(event(CLOSE, "/d/a"));
        assert!(hints.due().unwrap() < Instant::now() + Duration::from_millis(25));
        let look = hints.take(Instant::now());
        assert!(look.whole.contains(Path::new("/d/a")) && look.busy.is_empty());
        assert!(hints.due().is_none());
    }

    #[test]
    fn who_never_closes_a_file_is_not_waited_for_for_ever() {
        let hints = Hints::default();
        hints.hear(event(WRITE, "/d/a"));
        let look = hints.take(Instant::now() + Duration::from_secs(1));
        assert!(look.whole.contains(Path::new("/d/a")));
    }

    #[test]
    fn one_who_writes_all_the_time_does_not_hide_the_others() {
        let hints = Hints::default();
        hints.hear(event(RENAME, "/d/b"));
        let first = Instant::now();
        for _ in 0..100 {
            hints.hear(event(CLOSE, "/d/a"));
        }
        assert!(hints.due().unwrap() <= first + BURST);
    }

    #[test]
    fn temporary_files_and_strangers_are_not_heard() {
        let hints = Hints::default();
        hints.hear(event(WRITE, "/d/.a.swp"));
        hints.heard().only.insert("/etc".into(), std::iter::once("vmesh".into()).collect());
        hints.hear(event(RENAME, "/etc/passwd"));
        assert!(hints.due().is_none());
        hints.hear(event(RENAME, "/etc/vmesh"));
        assert!(hints.due().is_some());
    }

    #[test]
    fn lost_events_are_a_reason_to_look_at_everything() {
        let hints = Hints::default();
        hints.hear(Ok(Event::new(EventKind::Other).set_flag(notify::event::Flag::Rescan)));
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
            Hints::below(Path::new("services.d")).as_found(absolute.clone()),
            Path::new("services.d/a.yaml")
        );
        assert_eq!(Hints::below(Path::new("/etc/vmesh")).as_found(absolute.clone()), absolute);
    }
}
