//! The walk through the configured directory: the files that exist, and the directories to watch.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{FileType, Metadata};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use vmesh_model::{Place, Problem};

use super::{Disk, MAX_DEPTH};
use crate::file::watch::{WatchedDirectories, WatchedDirectory, links};
use crate::format::Format;
use crate::source::SourceError;

/// The metadata that show whether a file was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileStat {
    pub(super) id: (u64, u64),
    pub(super) size: u64,
    pub(super) modified: (i64, i64),
    pub(super) changed: (i64, i64),
}

impl FileStat {
    pub(super) fn of(metadata: &Metadata) -> FileStat {
        FileStat {
            id: (metadata.dev(), metadata.ino()),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// A file that a walk found.
pub(super) struct FoundFile {
    pub(super) path: PathBuf,
    /// The name of its service if the file does not state one.
    pub(super) name: String,
    pub(super) is_yaml: bool,
    /// The metadata and the modification time of the file, or the reason why they are unknown.
    pub(super) stat: Result<(FileStat, Option<SystemTime>), String>,
}

/// The result of walking a directory.
#[derive(Default)]
pub(super) struct DirectoryWalk {
    pub(super) files: Vec<FoundFile>,
    pub(super) directories: WatchedDirectories,
    /// The prefix of the service names of the files in each directory.
    pub(super) prefixes: BTreeMap<PathBuf, String>,
    /// The components of link paths, each as its directory and its name there.
    pub(super) link_components: BTreeSet<(PathBuf, OsString)>,
    /// The device and inode numbers of the directories that were read, against loops of links.
    pub(super) visited: BTreeSet<(u64, u64)>,
    /// Directories whose content is unknown, with the reason.
    pub(super) unreadable: Vec<(PathBuf, String)>,
    pub(super) problems: Vec<Problem>,
}

/// The part of a walk that stays valid while the kernel reports every change.
#[derive(Debug)]
pub(super) struct WatchedTree {
    pub(super) directories: WatchedDirectories,
    pub(super) prefixes: BTreeMap<PathBuf, String>,
    pub(super) link_components: BTreeSet<(PathBuf, OsString)>,
    pub(super) problems: Vec<Problem>,
}

impl Disk {
    /// Reads the configured directory and the directories below it.
    pub(super) fn walk(&self) -> Result<DirectoryWalk, SourceError> {
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
            let suspicion = format!("{} is a {kind}, neither a directory nor a file", root.display());
            return Err(self.suspect(suspicion));
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
            self.walk_entry(directory.join(&name), &name, file_type, prefix, depth, walk);
        }
        Ok(())
    }

    /// Adds the entry `name` of a directory to the walk, with what is below it.
    fn walk_entry(
        &self,
        path: PathBuf,
        name: &OsStr,
        file_type: FileType,
        prefix: &mut String,
        depth: usize,
        walk: &mut DirectoryWalk,
    ) {
        if file_type.is_symlink() {
            walk.watch_path(&path);
        }
        let metadata = std::fs::metadata(&path);
        let text = name.to_string_lossy();
        let is_directory = metadata.as_ref().map_or(file_type.is_dir(), Metadata::is_dir);
        if !is_directory && self.config.format == Format::Auto && !is_read(&text) {
            let message =
                "not read: the name of a discovery file ends in `.yaml`, `.yml`, `.json` or in nothing";
            return walk.problem(&path, message);
        }
        match metadata {
            Ok(metadata) if metadata.is_dir() => {
                if walk.visited.contains(&(metadata.dev(), metadata.ino())) {
                    return;
                }
                if depth + 1 >= MAX_DEPTH {
                    let message = format!("not read: nested deeper than {MAX_DEPTH} directories");
                    return walk.problem(&path, &message);
                }
                let length = prefix.len();
                prefix.push_str(&text);
                prefix.push('.');
                if let Err(error) = self.walk_into(&path, &metadata, prefix, depth + 1, walk) {
                    walk.unreadable.push((path, explain_error(&error)));
                }
                prefix.truncate(length);
            }
            // Opening a FIFO would block until somebody writes to it, and opening a device can have any effect.
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
                        Err("a symbolic link to a path that does not exist".to_owned())
                    }
                    Err(error) => Err(explain_error(&error)),
                };
                walk.files.push(FoundFile { path, name, is_yaml, stat });
            }
        }
    }

    /// Checks whether the walk as a whole looks plausible.
    pub(super) fn check_plausible(&self, walk: &DirectoryWalk) -> Result<(), SourceError> {
        let path = self.config.path.display();
        if walk.files.len() > self.config.max_files {
            let most = self.config.max_files;
            return Err(
                self.suspect(format!("{path} holds more than {most} files: is it the right directory?"))
            );
        }
        let before = self.files.len().max(usize::from(!self.restored.is_empty()));
        if walk.files.is_empty() && walk.unreadable.is_empty() && before > 0 {
            let suspicion = format!(
                "{path} is empty and was not before: is something not mounted? \
                 If that is meant, leave one file in it that holds `[]`"
            );
            return Err(self.suspect(suspicion));
        }
        Ok(())
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

/// Reports whether a file is hidden or is one that editors, package managers and atomic writers leave behind.
pub(in crate::file) fn is_skipped(name: &OsStr) -> bool {
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
pub(super) fn stem(name: &str) -> (&str, bool) {
    let endings = [".yaml", ".yml", ".json"];
    match endings.iter().find_map(|ending| name.strip_suffix(ending)) {
        Some(stem) => (stem, true),
        None => (name, false),
    }
}

/// Reports whether a file of this name is read when formats are detected.
pub(super) fn is_read(name: &str) -> bool {
    stem(name).1 || !name.contains('.')
}

pub(super) fn kind_name(file_type: FileType) -> &'static str {
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
pub(in crate::file) fn explain_error(error: &io::Error) -> String {
    use rustix::io::Errno;
    let number = error.raw_os_error();
    let is = |errno: Errno| number == Some(errno.raw_os_error());
    if is(Errno::LOOP) {
        "a symbolic link that leads back to itself".to_owned()
    } else if is(Errno::ACCESS) || is(Errno::PERM) {
        "permission denied: the control plane's user has to be able to read it".to_owned()
    } else if is(Errno::NOENT) {
        "it does not exist".to_owned()
    } else if is(Errno::STALE) || is(Errno::NOTCONN) {
        "its file system is no longer mounted or reachable".to_owned()
    } else {
        // The standard library appends the error number.
        let text = error.to_string();
        text.split(" (os error").next().unwrap_or(&text).to_lowercase()
    }
}
