//! The last good state on disk. What is encoded is [`vmesh_catalog::state`]'s; here is the disk.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;
use serde::de::DeserializeOwned;
use vmesh_catalog::state;
use vmesh_daemon::fsx::{self, FileError};

/// Far above any real fleet's state; a file beyond it is not one of ours.
const MAX_BYTES: u64 = 1 << 30;

/// Why a part of the state could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    #[error("the state directory {0} cannot be used: it has to exist and belong to the user of vmesh-control")]
    Directory(PathBuf, #[source] std::io::Error),
    #[error("the last good state could not be kept: a restart now would serve what was kept before")]
    File(#[source] FileError),
    #[error("{0} could not be encoded")]
    Encode(&'static str, #[source] serde_json::Error),
    #[error("{path} is damaged and was set aside as {aside}; this part of the state starts empty")]
    Damaged {
        path: PathBuf,
        aside: PathBuf,
        #[source]
        cause: state::Damaged,
    },
}

/// The directory of the state: one file per part, for this user alone.
#[derive(Debug, Clone)]
pub struct Disk {
    dir: PathBuf,
}

/// A part of the state, and when it was written.
#[derive(Debug)]
pub struct Loaded<T> {
    pub value: T,
    pub written: SystemTime,
}

impl Disk {
    /// Makes `dir` if there is none, and finds out now whether it can be written.
    pub fn open(dir: &Path) -> Result<Disk, PersistError> {
        std::fs::create_dir_all(dir).map_err(|cause| PersistError::Directory(dir.to_owned(), cause))?;
        fsx::write_atomically(&dir.join("writable"), b"", fsx::PRIVATE).map_err(PersistError::File)?;
        Ok(Disk { dir: dir.to_owned() })
    }

    pub fn save<T: Serialize>(&self, part: &'static str, value: &T) -> Result<(), PersistError> {
        let text = state::encode(value).map_err(|cause| PersistError::Encode(part, cause))?;
        fsx::write_atomically(&self.file(part), &text, fsx::PRIVATE).map_err(PersistError::File)
    }

    /// `None` if it was never saved.
    pub fn load<T: DeserializeOwned>(&self, part: &str) -> Result<Option<Loaded<T>>, PersistError> {
        let path = self.file(part);
        let text = match fsx::read_capped(&path, MAX_BYTES) {
            Ok(text) => text,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(PersistError::File(error)),
        };
        let written = std::fs::metadata(&path).and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        match state::decode(&text) {
            Ok(value) => Ok(Some(Loaded { value, written })),
            Err(cause) => {
                let aside = path.with_extension("damaged");
                _ = std::fs::rename(&path, &aside);
                Err(PersistError::Damaged { path, aside, cause })
            }
        }
    }

    fn file(&self, part: &str) -> PathBuf {
        self.dir.join(format!("{part}.json"))
    }
}
