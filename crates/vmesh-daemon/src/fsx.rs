//! Atomic writes of files, and reads of limited size.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

/// The mode of files with secrets or state: for the daemon's own user alone.
pub const PRIVATE: u32 = 0o600;

const TEMPORARY: &str = ".vmesh-tmp";

#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("could not {action} {}", .path.display())]
    Failed {
        action: &'static str,
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("{} is larger than {limit} bytes and was not read", .path.display())]
    TooLarge { path: PathBuf, limit: u64 },
}

/// The reason why locking a file failed.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("{} is locked by {by}", .path.display())]
    Taken { path: PathBuf, by: String },
    #[error("could not lock {}", .path.display())]
    Failed {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
}

impl FileError {
    /// Reports whether the disk or the quota is full, which may be temporary.
    pub fn is_disk_full(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self, FileError::Failed { cause, .. } if matches!(cause.kind(), StorageFull | QuotaExceeded))
    }

    pub fn is_not_found(&self) -> bool {
        matches!(self, FileError::Failed { cause, .. } if cause.kind() == io::ErrorKind::NotFound)
    }
}

/// Creates the directory `path` for the daemon's own user alone, regardless of the umask, with missing parents. An existing directory keeps
/// its mode, since an operator may have given its group access.
pub fn make_private_dir(path: &Path) -> Result<(), FileError> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    let failed = |action, cause| FileError::Failed { action, path: path.to_owned(), cause };
    if let Ok(metadata) = std::fs::metadata(path)
        && metadata.is_dir()
    {
        if metadata.permissions().mode() & 0o022 != 0 {
            tracing::warn!(
                "{} can be written by others than its owner: `chmod go-w {0}`, or they can change what is kept there",
                path.display()
            );
        }
        return Ok(());
    }
    let mut builder = std::fs::DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|cause| failed("create the directory", cause))?;
    // The umask can only have removed permissions that the owner needs.
    let mode = std::fs::Permissions::from_mode(0o700);
    std::fs::set_permissions(path, mode).map_err(|cause| failed("set the mode of", cause))
}

/// Locks the file `path` until the returned file is closed, and writes the pid of this process into it. Fails at once if another process
/// holds the lock.
pub fn lock(path: &Path) -> Result<File, LockError> {
    let failed = |cause: io::Error| LockError::Failed { path: path.to_owned(), cause };
    // NOFOLLOW: the file behind a symbolic link must not be written to.
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file =
        rustix::fs::open(path, flags, Mode::from_raw_mode(PRIVATE)).map_err(|errno| failed(errno.into()))?;
    let mut file = File::from(file);
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            let mut owner = String::new();
            _ = (&file).take(100).read_to_string(&mut owner);
            let by = match owner.trim() {
                "" => "another process".to_owned(),
                owner => vmesh_text::escaped(owner, 100),
            };
            return Err(LockError::Taken { path: path.to_owned(), by });
        }
        Err(std::fs::TryLockError::Error(cause)) => return Err(failed(cause)),
    }
    // The umask must not lock the owner out, and an earlier version may have left the file open to all.
    _ = rustix::fs::fchmod(&file, Mode::from_raw_mode(PRIVATE));
    let name =
        std::env::current_exe().ok().and_then(|exe| Some(exe.file_name()?.to_string_lossy().into_owned()));
    let owner = format!("{} (pid {})", name.as_deref().unwrap_or("process"), std::process::id());
    // The pid in the file is for error messages alone, so a full disk is no reason to fail.
    _ = file.set_len(0).and_then(|()| file.write_all(owner.as_bytes()));
    Ok(file)
}

/// Replaces the content of `path` by `bytes` atomically: a reader, also after a crash, sees either the old file or the new one. Blocks:
/// call it through `spawn_blocking` from a task.
pub fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> Result<(), FileError> {
    let Some(name) = path.file_name() else {
        return Err(FileError::Failed { action: "write", path: path.to_owned(), cause: Errno::ISDIR.into() });
    };
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut batch = Batch::open(parent).map_err(|error| match error {
        FileError::Failed { cause, .. } => {
            FileError::Failed { action: "open the directory of", path: path.to_owned(), cause }
        }
        error @ FileError::TooLarge { .. } => error,
    })?;
    batch.write(name, bytes, mode)?;
    batch.commit()
}

/// A batch of files in one directory that are replaced or removed together, with few waits for the disk. After a crash, each name has
/// either its previous or its updated content, and different names may differ in this.
///
/// Call [`Batch::write`] and [`Batch::remove`] for each name, then [`Batch::commit`]. Readers see no change before the commit, and dropping
/// the batch discards it. All methods block.
#[derive(Debug)]
pub struct Batch {
    path: PathBuf,
    /// Kept open, so that temporary files and targets stay together if the directory is replaced meanwhile.
    dir: OwnedFd,
    steps: Vec<Step>,
    /// Temporary files that may not be on disk yet.
    unsynced: Vec<File>,
    /// Whether the number of files exceeds [`Batch::SYNCED_ONE_BY_ONE`].
    is_large: bool,
}

/// The action for one name at the commit.
#[derive(Debug)]
enum Step {
    Replace { name: OsString, temporary: OsString },
    Remove { name: OsString },
}

impl Batch {
    /// Larger batches are synced by one call for the whole file system, which also waits for the writes of others.
    const SYNCED_ONE_BY_ONE: usize = 16;

    /// Opens a batch in the directory `path`.
    pub fn open(path: &Path) -> Result<Batch, FileError> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty()).map_err(|cause| FileError::Failed {
            action: "open the directory",
            path: path.to_owned(),
            cause: cause.into(),
        })?;
        Ok(Batch { path: path.to_owned(), dir, steps: Vec::new(), unsynced: Vec::new(), is_large: false })
    }

    fn failed(&self, action: &'static str, name: &OsStr, cause: io::Error) -> FileError {
        FileError::Failed { action, path: self.path.join(name), cause }
    }

    /// Stages the new content of the file `name`.
    pub fn write(&mut self, name: impl AsRef<OsStr>, bytes: &[u8], mode: u32) -> Result<(), FileError> {
        let name = name.as_ref();
        let temporary = temporary_name(name);
        // EXCL and NOFOLLOW: a symbolic link under this name is never followed.
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.dir, &temporary, flags, Mode::from_raw_mode(PRIVATE))
            .map_err(|cause| self.failed("write beside", name, cause.into()))?;
        self.steps.push(Step::Replace { name: name.to_owned(), temporary });
        let mut file = File::from(file);
        let written = (|| {
            file.write_all(bytes)?;
            // Set after writing, so that the umask does not apply and nobody reads a partial file.
            rustix::fs::fchmod(&file, Mode::from_raw_mode(mode))?;
            Ok(())
        })();
        written.map_err(|cause: io::Error| self.failed("write", name, cause))?;
        if self.unsynced.len() < Self::SYNCED_ONE_BY_ONE {
            self.unsynced.push(file);
        } else {
            self.is_large = true;
        }
        Ok(())
    }

    /// Stages the removal of the file `name`, if it exists.
    pub fn remove(&mut self, name: impl AsRef<OsStr>) {
        self.steps.push(Step::Remove { name: name.as_ref().to_owned() });
    }

    /// Applies the staged changes in order, and waits until they are on disk. After an error, any number of the first changes may have been
    /// applied.
    pub fn commit(self) -> Result<(), FileError> {
        self.commit_first(usize::MAX)
    }

    /// Commits at most the first `most` changes, as a crash would leave them. For tests of callers.
    pub fn commit_first(mut self, most: usize) -> Result<(), FileError> {
        self.sync()?;
        let mut steps = std::mem::take(&mut self.steps).into_iter();
        let mut outcome = Ok(());
        for step in steps.by_ref().take(most) {
            outcome = self.put_in_place(&step);
            if outcome.is_err() {
                self.steps.push(step);
                break;
            }
        }
        // Dropping the batch removes the temporary files of the remaining steps.
        self.steps.extend(steps);
        outcome?;
        rustix::fs::fsync(&self.dir).map_err(|cause| FileError::Failed {
            action: "sync the directory",
            path: self.path.clone(),
            cause: cause.into(),
        })
    }

    /// Waits until all temporary files are on disk: a name must not survive a crash with incomplete content.
    fn sync(&mut self) -> Result<(), FileError> {
        let synced = if self.is_large {
            rustix::fs::syncfs(&self.dir).map_err(io::Error::from)
        } else {
            self.unsynced.iter().try_for_each(File::sync_all)
        };
        synced.map_err(|cause| self.failed("write", self.first_name(), cause))
    }

    fn first_name(&self) -> &OsStr {
        match self.steps.first() {
            Some(Step::Replace { name, .. } | Step::Remove { name }) => name,
            None => OsStr::new(""),
        }
    }

    fn put_in_place(&self, step: &Step) -> Result<(), FileError> {
        match step {
            Step::Replace { name, temporary } => rustix::fs::renameat(&self.dir, temporary, &self.dir, name)
                .map_err(|cause| self.failed("write", name, cause.into())),
            Step::Remove { name } => match rustix::fs::unlinkat(&self.dir, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                Err(cause) => Err(self.failed("remove", name, cause.into())),
            },
        }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        for step in &self.steps {
            if let Step::Replace { temporary, .. } = step {
                _ = rustix::fs::unlinkat(&self.dir, temporary, AtFlags::empty());
            }
        }
    }
}

fn temporary_name(name: &OsStr) -> OsString {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut temporary = OsString::from(".");
    temporary.push(name);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    temporary.push(format!(".{}-{count}{TEMPORARY}", std::process::id()));
    temporary
}

/// Removes the temporary files that a killed process left in `dir`. Call it at the start, on a directory that belongs to this daemon alone.
pub fn sweep(dir: &Path) -> Result<(), FileError> {
    let fail = |cause| FileError::Failed { action: "list", path: dir.to_owned(), cause };
    for entry in std::fs::read_dir(dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(b".")
            && name.as_encoded_bytes().ends_with(TEMPORARY.as_bytes())
        {
            // A file that cannot be removed only takes space.
            _ = std::fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// Reads the file `path`. A file with more than `limit` bytes is an error. Never blocks on a FIFO without a writer.
pub fn read_capped(path: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
    let fail = |cause| FileError::Failed { action: "read", path: path.to_owned(), cause };
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| fail(errno.into()))?);
    if !file.metadata().map_err(fail)?.is_file() {
        return Err(fail(io::Error::other("it is not a file")));
    }
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() as u64 > limit {
        return Err(FileError::TooLarge { path: path.to_owned(), limit });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Dir {
            let path = std::env::temp_dir().join(format!("vmesh-fsx-{name}-{}", std::process::id()));
            _ = std::fs::remove_dir_all(&path);
            std::fs::create_dir(&path).unwrap();
            Dir(path)
        }

        fn names(&self) -> Vec<String> {
            let names = std::fs::read_dir(&self.0).unwrap();
            names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_file_is_replaced_whole_with_the_mode_asked_for() {
        let dir = Dir::new("replace");
        let path = dir.0.join("state.bin");
        write_atomically(&path, b"one", PRIVATE).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        write_atomically(&path, b"two", 0o644).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o644);
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(dir.names(), ["state.bin"]);
    }

    #[test]
    fn a_link_in_the_place_of_the_file_is_replaced_and_not_followed() {
        let dir = Dir::new("link");
        let victim = dir.0.join("victim");
        std::fs::write(&victim, "precious").unwrap();
        symlink(&victim, dir.0.join("state.bin")).unwrap();
        write_atomically(&dir.0.join("state.bin"), b"new", PRIVATE).unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
        assert_eq!(std::fs::read(dir.0.join("state.bin")).unwrap(), b"new");
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_rubbish() {
        let dir = Dir::new("fail");
        let path = dir.0.join("taken");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("inside"), "").unwrap();
        let error = write_atomically(&path, b"x", PRIVATE).unwrap_err();
        assert_eq!(error.to_string(), format!("could not write {}", path.display()));
        assert_eq!(dir.names(), ["taken"]);
        let missing = write_atomically(&dir.0.join("no/such"), b"x", PRIVATE).unwrap_err();
        assert!(missing.is_not_found());
    }

    #[test]
    fn a_lock_names_who_has_it_and_ends_with_its_file() {
        let dir = Dir::new("lock");
        let path = dir.0.join("lock");
        let lock = super::lock(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let refused = super::lock(&path).unwrap_err().to_string();
        let pid = std::process::id();
        assert!(refused.contains("is locked by ") && refused.ends_with(&format!("(pid {pid})")), "{refused}");
        drop(lock);
        drop(super::lock(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        symlink("/etc/hostname", &path).unwrap();
        assert!(matches!(super::lock(&path).unwrap_err(), LockError::Failed { .. }));
    }

    #[test]
    fn a_directory_is_made_for_its_owner_alone() {
        let dir = Dir::new("private");
        let made = dir.0.join("a/b");
        make_private_dir(&made).unwrap();
        assert_eq!(std::fs::metadata(&made).unwrap().mode() & 0o777, 0o700);
        std::fs::set_permissions(&made, std::os::unix::fs::PermissionsExt::from_mode(0o750)).unwrap();
        make_private_dir(&made).unwrap();
        assert_eq!(std::fs::metadata(&made).unwrap().mode() & 0o777, 0o750, "its mode is the operator's");
        std::fs::write(dir.0.join("file"), "").unwrap();
        assert!(make_private_dir(&dir.0.join("file")).is_err());
    }

    #[test]
    fn a_batch_that_is_cut_off_leaves_each_name_old_or_new_and_one_that_is_dropped_leaves_all_old() {
        let dir = Dir::new("batch");
        let read = |name: &str| std::fs::read_to_string(dir.0.join(name)).ok();
        // The number of files exceeds [`Batch::SYNCED_ONE_BY_ONE`].
        let names: Vec<String> = (0..40).map(|n| format!("{n:02}")).collect();
        let batch_of = |text: &str| {
            let mut batch = Batch::open(&dir.0).unwrap();
            names.iter().for_each(|name| batch.write(name, text.as_bytes(), PRIVATE).unwrap());
            batch.remove("no-such");
            batch
        };
        batch_of("old").commit().unwrap();
        drop(batch_of("never"));
        assert!(names.iter().all(|name| read(name).as_deref() == Some("old")));
        batch_of("new").commit_first(7).unwrap();
        let new = names.iter().filter(|name| read(name).as_deref() == Some("new")).count();
        let old = names.iter().filter(|name| read(name).as_deref() == Some("old")).count();
        assert_eq!((new, old, dir.names().len()), (7, 33, 40), "no temporary file is left");
        let mut batch = Batch::open(&dir.0).unwrap();
        names.iter().for_each(|name| batch.remove(name));
        batch.commit().unwrap();
        assert!(dir.names().is_empty());
    }

    #[test]
    fn a_batch_that_fails_leaves_no_rubbish() {
        let dir = Dir::new("batch-fails");
        std::fs::create_dir_all(dir.0.join("01/inside")).unwrap();
        let mut batch = Batch::open(&dir.0).unwrap();
        ["00", "01", "02"].iter().for_each(|name| batch.write(name, b"new", PRIVATE).unwrap());
        let error = batch.commit().unwrap_err();
        assert_eq!(error.to_string(), format!("could not write {}", dir.0.join("01").display()));
        let mut left = dir.names();
        left.sort();
        assert_eq!(left, ["00", "01"]);
    }

    #[test]
    fn what_a_killed_writer_left_is_swept() {
        let dir = Dir::new("sweep");
        std::fs::write(dir.0.join(".state.bin.77-0.vmesh-tmp"), "half").unwrap();
        std::fs::write(dir.0.join("state.bin"), "whole").unwrap();
        sweep(&dir.0).unwrap();
        assert_eq!(dir.names(), ["state.bin"]);
    }

    #[test]
    fn what_is_no_file_is_not_waited_for() {
        let dir = Dir::new("fifo");
        let path = dir.0.join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
        let error = read_capped(&path, 10).unwrap_err();
        assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "it is not a file");
    }

    #[test]
    fn a_file_beyond_the_limit_is_an_error() {
        let dir = Dir::new("cap");
        let path = dir.0.join("large");
        std::fs::write(&path, [0; 11]).unwrap();
        assert_eq!(read_capped(&path, 11).unwrap().len(), 11);
        let error = read_capped(&path, 10).unwrap_err().to_string();
        assert_eq!(error, format!("{} is larger than 10 bytes and was not read", path.display()));
    }
}
