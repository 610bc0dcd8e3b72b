//! Decides whether the content of a file may be quoted in problems, events and logs, which everybody can
//! read.
//!
//! The control plane can read files that other users of the host cannot, and a symbolic link may point to any
//! of them, for example to a token. A file that is not readable by every user is used like any other, but its
//! problems name only the place.

use std::fs::{File, Metadata};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use vmesh_model::Problem;

/// The permission bits that let every user read a file, and search a directory.
const ALL_READ: u32 = 0o004;
const ALL_SEARCH: u32 = 0o001;

/// Reports whether every user of the host may read the open `file`, which was found at `path`. If symbolic
/// links lead out of the directory of `path`, every user must also be able to search the directories of the
/// target.
pub fn is_public(file: &File, metadata: &Metadata, path: &Path) -> bool {
    if metadata.mode() & ALL_READ == 0 {
        return false;
    }
    // `/proc/self/fd` names the file that was opened, even if the links point elsewhere by now.
    let Ok(opened) = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())) else { return false };
    let directory = path.parent().and_then(|parent| std::fs::canonicalize(parent).ok());
    if directory.is_some_and(|directory| opened.parent() == Some(&directory)) {
        return true;
    }
    let all_search = |above: &Path| std::fs::metadata(above).is_ok_and(|of| of.mode() & ALL_SEARCH != 0);
    opened.ancestors().skip(1).all(all_search)
}

/// Removes quoted content from `problem`; its place stays.
pub fn redacted(problem: Problem) -> Problem {
    let message = "this part of the file is unusable; the reason is hidden because not every user of this \
                   host may read the file: run `vmesh-control --check` as a user who may";
    Problem::new(problem.place.clone(), problem.place.file, message)
}
