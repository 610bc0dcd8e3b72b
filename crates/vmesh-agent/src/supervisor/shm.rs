//! The resources that the Envoys of one line share: the number of the line (`--base-id`), a file in `/dev/shm`, and the sockets on which
//! the old and the new Envoy communicate.
//!
//! Every local user can write to `/dev/shm`. Envoy does not start if another user's file has the name of its shared memory, so the name
//! must be unpredictable: the number is random, and is kept in the record. The sockets are files in the supervisor's own directory. By
//! default Envoy uses abstract sockets instead, which any local user may bind first, and send to: a process that sends to an Envoy as its
//! child can take over the listeners, or terminate Envoy.
//!
//! A new Envoy sets a flag in the shared memory when it starts, and clears it when its parent is told to drain. While the flag is set,
//! every other new Envoy of the line exits at once. If the new Envoy crashes in between, the flag stays set for ever, and no further
//! handover by hot restart is possible. So the supervisor clears the flag when it kills a candidate.
//!
//! The layout is that of `source/server/hot_restart_impl.h`: a size, a version, two mutexes, the flags. Envoy's `--hot-restart-version`
//! consists of that version and that size, so the flag is cleared only where the version is the known one.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::process::geteuid;

/// The `--hot-restart-version` of Envoy 1.36 to 1.40.
const KNOWN: &str = "11.104";
const VERSION: u64 = 11;
const SIZE: u64 = 104;
/// Offset of the flags: after two words and two mutexes of 40 bytes.
const FLAGS_AT: u64 = 96;
const INITIALIZING: u64 = 1;

/// The directory of POSIX shared memory.
const SHARED_MEMORY: &str = "/dev/shm";
/// Prefix of the names of a line's sockets; Envoy appends a role and a number. `Config` checks that the paths are not too long.
const SOCKET: &str = "hr";
/// Smaller numbers are left to the Envoys that people run by hand.
const LEAST_BASE_ID: u32 = 1000;
/// Size of the range of numbers. Envoy multiplies the number by ten as a signed 32-bit integer, and adds the epoch's digit.
const BASE_IDS: u32 = 200_000_000;
/// Number of attempts to find a free number. A random number collides once in millions of attempts, so 32 collisions are an error.
const TRIES: usize = 32;
/// Number of socket numbers that belong to one line. Envoy uses the epoch modulo three.
const NUMBERS: u64 = 10;

/// Returns an unpredictable number for a new line, for which no file exists in shared memory.
pub(super) fn new_base_id() -> Result<u32, String> {
    base_id_from(random, Path::new(SHARED_MEMORY))
}

fn random() -> Result<u32, String> {
    getrandom::u32().map_err(|error| format!("the kernel gives no random numbers: {error}"))
}

fn base_id_from(mut random: impl FnMut() -> Result<u32, String>, dir: &Path) -> Result<u32, String> {
    for _ in 0..TRIES {
        let base_id = LEAST_BASE_ID + random()? % BASE_IDS;
        // Links are not followed: a dangling link also occupies the name.
        match std::fs::symlink_metadata(file_in(dir, base_id)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(base_id),
            Ok(_) => {}
            Err(error) => return Err(format!("could not look into {}: {error}", dir.display())),
        }
    }
    Err(format!("no name is free in {} after {TRIES} tries", dir.display()))
}

/// Returns the value of `--socket-path`. Only the supervisor's user can enter `dir`.
pub(super) fn socket(dir: &Path) -> PathBuf {
    dir.join(SOCKET)
}

/// Clears the flag that a dead candidate left in the shared memory, so that the next one can start.
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
    file_in(Path::new(SHARED_MEMORY), base_id)
}

fn file_in(dir: &Path, base_id: u32) -> PathBuf {
    // Envoy multiplies the number by ten, to make room for its epochs.
    dir.join(format!("envoy_shared_memory_{}", u64::from(base_id) * 10))
}

fn clear(path: &Path) -> io::Result<()> {
    // Every user can create files in this directory, so the path may be a link or another user's file.
    let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::options().read(true).write(true).custom_flags(flags.bits().cast_signed()).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.uid() != geteuid().as_raw() {
        return Err(io::Error::other(format!("it is another user's: user {}", metadata.uid())));
    }
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

/// Removes the shared memory of the line, and its sockets in `dir`. An Envoy that is killed leaves both behind.
pub(super) fn remove(base_id: u32, dir: &Path) {
    _ = std::fs::remove_file(path(base_id));
    let first = u64::from(base_id) * NUMBERS;
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name.to_str().filter(|name| name.starts_with(SOCKET)).and_then(|name| {
            let (_, number) = name.rsplit_once('_')?;
            number.parse::<u64>().ok()
        });
        if number.is_some_and(|number| (first..first + NUMBERS).contains(&number)) {
            _ = std::fs::remove_file(entry.path());
        }
    }
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
        // `clear` follows no symbolic link.
        let link = dir.join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(clear(&link).is_err());
        bytes[8] = 12;
        std::fs::write(&path, &bytes).unwrap();
        assert!(clear(&path).is_err());
        assert!(forget_child(1, "12.104").unwrap_err().contains("not known"));
    }

    #[test]
    fn a_number_whose_file_is_there_is_not_used_whatever_it_is() {
        let dir = vmesh_testkit::tempdir().unwrap();
        std::fs::write(file_in(&dir, 1000), "").unwrap();
        std::os::unix::fs::symlink("/no/such", file_in(&dir, 1001)).unwrap();
        std::fs::create_dir(file_in(&dir, 1002)).unwrap();
        let mut next = 0..;
        let mut in_order = || Ok(next.next().unwrap());
        assert_eq!(base_id_from(&mut in_order, &dir), Ok(1003));
        let stuck = base_id_from(|| Ok(1), &dir).unwrap_err();
        assert!(stuck.ends_with("after 32 tries"), "{stuck}");
        // The largest possible number, multiplied by ten plus an epoch's digit, must fit into 32 bits.
        let largest = base_id_from(|| Ok(BASE_IDS - 1), &dir).unwrap();
        assert!(largest.checked_mul(10).is_some_and(|number| i32::try_from(number + 9).is_ok()));
        let two = [new_base_id().unwrap(), new_base_id().unwrap()];
        assert_ne!(two[0], two[1]);
    }

    #[test]
    fn the_sockets_of_one_line_are_removed_and_those_of_another_stay() {
        let dir = vmesh_testkit::tempdir().unwrap();
        let names = ["hr_parent_10000", "hr_child_10002", "hr_parent_10010", "admin.1.sock", "hr_x"];
        for name in names {
            std::fs::write(dir.join(name), "").unwrap();
        }
        remove(1000, &dir);
        let left: Vec<_> = names.into_iter().filter(|name| dir.join(name).exists()).collect();
        assert_eq!(left, ["hr_parent_10010", "admin.1.sock", "hr_x"]);
    }
}
