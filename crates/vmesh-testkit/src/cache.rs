//! The cache of fetched tools, which is kept between runs and shared by concurrent processes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Failed, Result};

/// Returns the cache directory: `$XDG_CACHE_HOME/vmesh`, else `~/.cache/vmesh`.
fn dir() -> Result<PathBuf> {
    let dir = from("XDG_CACHE_HOME")
        .map(|dir| dir.join("vmesh"))
        .or_else(|| from("HOME").map(|dir| dir.join(".cache/vmesh")))
        .ok_or_else(|| Failed::new("no place to keep fetched tools: set XDG_CACHE_HOME to a directory"))?;
    std::fs::create_dir_all(&dir).map_err(Failed::to(format!("could not create {}", dir.display())))?;
    Ok(dir)
}

fn from(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Returns `name` in the directory `$VMESH_TOOLS_CACHE`, if it exists there. The user provides that
/// directory: the testkit searches it first, and never writes to it.
pub(crate) fn provided(name: &str) -> Option<PathBuf> {
    from("VMESH_TOOLS_CACHE").map(|dir| dir.join(name)).filter(|path| path.exists())
}

/// Returns the path of `name` in the cache. On a miss, `make` gets an empty directory and returns the path in
/// it that is to be cached. The entry appears atomically; other processes wait for it.
pub(crate) fn get(name: &str, make: impl FnOnce(&Path) -> Result<PathBuf>) -> Result<PathBuf> {
    if let Some(provided) = provided(name) {
        return Ok(provided);
    }
    let dir = dir()?;
    let kept = dir.join(name);
    if kept.exists() {
        return Ok(kept);
    }
    let lock_path = dir.join(format!(".{name}.lock"));
    let lock = File::create(&lock_path)
        .and_then(|lock| lock.lock().map(|()| lock))
        .map_err(Failed::to(format!("could not lock {}", lock_path.display())))?;
    if kept.exists() {
        return Ok(kept);
    }
    // A leftover of a process that died with the lock.
    let work = dir.join(format!(".{name}.new"));
    _ = std::fs::remove_dir_all(&work);
    std::fs::create_dir_all(&work).map_err(Failed::to(format!("could not create {}", work.display())))?;
    let made = make(&work).and_then(|made| {
        std::fs::rename(&made, &kept).map_err(Failed::to(format!(
            "could not move {} to {}",
            made.display(),
            kept.display()
        )))
    });
    _ = std::fs::remove_dir_all(&work);
    drop(lock);
    made.map(|()| kept)
}

/// Runs a command. Its output is shown only if it fails.
pub(crate) fn run(command: &mut Command, install: &str) -> Result<()> {
    let shown = show(command);
    let output = command.output().map_err(|error| {
        Failed::to::<std::io::Error>(format!("could not run `{shown}`; {install}"))(error)
    })?;
    if output.status.success() {
        return Ok(());
    }
    let printed = [output.stdout, output.stderr].concat();
    let printed = String::from_utf8_lossy(&printed);
    let tail: Vec<&str> = printed.trim_end().lines().rev().take(12).collect();
    let tail: Vec<&str> = tail.into_iter().rev().collect();
    Err(Failed::new(format!(
        "`{shown}` failed ({}); {install}. It said:\n{}",
        output.status,
        tail.join("\n")
    )))
}

pub(crate) fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_fails_is_shown_with_what_it_said_and_what_to_install() {
        let error =
            run(Command::new("sh").args(["-c", "echo no pip >&2; exit 3"]), "install pip").unwrap_err();
        assert_eq!(
            error.to_string(),
            "`sh -c echo no pip >&2; exit 3` failed (exit status: 3); install pip. It said:\nno pip"
        );
        let error = run(&mut Command::new("/no/such"), "install it").unwrap_err();
        assert_eq!(error.to_string(), "could not run `/no/such`; install it");
    }
}
