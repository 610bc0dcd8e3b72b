//! The memory that the Envoys of one line share.
//!
//! A child that starts sets a flag there, and takes it away when its parent is told to drain; every other child ends at
//! once while it is set. One that dies in between leaves it set for ever, and with that its parent could never again be
//! taken over from. So whoever ended the child takes the flag away.
//!
//! The layout is that of `source/server/hot_restart_impl.h`: a size, a version, two mutexes, the flags. Envoy's
//! `--hot-restart-version` is that version and that size, so this is only done where it is the layout known here.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// `--hot-restart-version` of Envoy 1.36 to 1.40.
const KNOWN: &str = "11.104";
const VERSION: u64 = 11;
const SIZE: u64 = 104;
/// Two words, and two mutexes of 40 bytes.
const FLAGS_AT: u64 = 96;
const INITIALIZING: u64 = 1;

/// Takes away what a child that died left, so that the next can start.
pub(super) fn forget_child(base_id: u32, hot_restart: &str) -> Result<(), String> {
    let path = path(base_id);
    if hot_restart != KNOWN {
        return Err(format!(
            "the layout of {} is not known for hot restart version {hot_restart}",
            path.display()
        ));
    }
    clear(&path).map_err(|error| format!("could not take the child's mark from {}: {error}", path.display()))
}

fn path(base_id: u32) -> PathBuf {
    // Envoy multiplies the number by ten, to have numbers for its epochs.
    Path::new("/dev/shm").join(format!("envoy_shared_memory_{}", u64::from(base_id) * 10))
}

fn clear(path: &Path) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let word = |at: u64| -> io::Result<u64> {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at)?;
        Ok(u64::from_ne_bytes(bytes))
    };
    if word(0)? != SIZE || word(8)? != VERSION {
        return Err(io::Error::other("it is not what Envoy writes there"));
    }
    let flags = word(FLAGS_AT)?;
    if flags & INITIALIZING != 0 {
        file.write_all_at(&(flags & !INITIALIZING).to_ne_bytes(), FLAGS_AT)?;
    }
    Ok(())
}

/// Envoy leaves the file behind when it is killed.
pub(super) fn remove(base_id: u32) {
    _ = std::fs::remove_file(path(base_id));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_flag_is_taken_away_and_only_where_the_layout_is_known() {
        let dir = vmesh_testkit::tempdir().unwrap();
        let path = dir.join("shm");
        let mut bytes = vec![7; 104];
        bytes[..8].copy_from_slice(&SIZE.to_ne_bytes());
        bytes[8..16].copy_from_slice(&VERSION.to_ne_bytes());
        bytes[96..].copy_from_slice(&3u64.to_ne_bytes());
        std::fs::write(&path, &bytes).unwrap();
        clear(&path).unwrap();
        bytes[96..].copy_from_slice(&2u64.to_ne_bytes());
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        bytes[8] = 12;
        std::fs::write(&path, &bytes).unwrap();
        assert!(clear(&path).is_err());
        assert!(forget_child(1, "12.104").unwrap_err().contains("not known"));
    }
}
