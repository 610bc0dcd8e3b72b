//! Whether what a file says may be shown to everybody who reads problems, events and logs.
//!
//! The control plane reads files that others may not, and a link may lead to any of them: to a token, say. A file that not every
//! user of the host may read is read like any other, and what is wrong with it is told by its place alone.

use std::fs::{File, Metadata};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use vmesh_model::Problem;

/// The permission bits by which everybody may read a file, and look up names in a directory.
const ALL_READ: u32 = 0o004;
const ALL_SEARCH: u32 = 0o001;

/// Reports whether every user of the host may read the open file, which was found at `path`. Where a link leads out of its
/// directory, every user also has to be able to reach the target through its directories.
pub fn is_public(file: &File, metadata: &Metadata, path: &Path) -> bool {
    if metadata.mode() & ALL_READ == 0 {
        return false;
    }
    // The kernel names the file that was opened, whatever the links point to by now.
    let Ok(opened) = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())) else { return false };
    let directory = path.parent().and_then(|parent| std::fs::canonicalize(parent).ok());
    if directory.is_some_and(|directory| opened.parent() == Some(&directory)) {
        return true;
    }
    let all_search = |above: &Path| std::fs::metadata(above).is_ok_and(|of| of.mode() & ALL_SEARCH != 0);
    opened.ancestors().skip(1).all(all_search)
}

/// Takes what `problem` quotes out of it: its place stays.
pub fn redacted(problem: Problem) -> Problem {
    let message = "this cannot be used; why is not shown, since not every user of this host may read the file: \
                   `vmesh-control --check` shows it to one who may";
    Problem::new(problem.place.clone(), problem.place.file, message)
}
