//! The consistent content of one file.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use super::walk::FileStat;
use crate::file::privacy::is_public;

/// The bytes of a file, if they are consistent.
pub(super) enum FileContent {
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

/// Reads a file of at most `limit` bytes without waiting for anybody who writes it.
pub(super) fn read_bytes(path: &Path, limit: usize) -> io::Result<FileContent> {
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
