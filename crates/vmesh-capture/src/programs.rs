//! Which program is run under a name, and with what environment.
//!
//! These programs run as root or with capabilities. So vmesh looks them up only in directories that nobody but root can write to, and
//! passes on none of its own environment: no `LD_*`, no `XTABLES_LIBDIR`, no `NOTIFY_SOCKET`.

use std::ffi::OsStr;
use std::fs::Metadata;
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

/// Looked at after the PATH, and all that a program which is run may use itself.
pub const DIRECTORIES: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const OTHERS_MAY_WRITE: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// Builds a command that runs `program` with an empty environment but for `PATH` and `LC_ALL=C`. A name is looked up by [`find`]; a
/// path is taken as it is.
///
/// # Errors
/// If there is no program of that name in a trusted directory.
pub fn command(program: &Path) -> Result<Command> {
    let program = if program.components().count() > 1 { program.to_owned() } else { find(program)? };
    let mut command = Command::new(program);
    // Messages are parsed.
    command.env_clear().env("PATH", DIRECTORIES).env("LC_ALL", "C").kill_on_drop(true);
    Ok(command)
}

/// Finds the program `name` in the directories of the PATH and in [`DIRECTORIES`], as far as [`is_trusted`] holds for it.
///
/// # Errors
/// [`ErrorKind::NotFound`] if there is none; [`ErrorKind::PermissionDenied`], with the path, if there is one that is not trusted.
pub fn find(name: &Path) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(std::env::split_paths(OsStr::new(DIRECTORIES)));
    let mut passed_over = None;
    for candidate in directories.filter(|dir| dir.is_absolute()).map(|dir| dir.join(name)) {
        match candidate.canonicalize() {
            // Run by the name under which it was found: some programs are several, and go by their name.
            Ok(real) if is_trusted(&candidate) && is_trusted(&real) => return Ok(candidate),
            Ok(_) => _ = passed_over.get_or_insert(candidate),
            Err(_) => {}
        }
    }
    Err(match passed_over {
        Some(path) => {
            let why =
                format!("{} is not run, since others than root may write to it or above it", path.display());
            Error::new(ErrorKind::PermissionDenied, why)
        }
        None => {
            let name = name.display();
            let why = format!("no `{name}` in the directories of the PATH or in {DIRECTORIES}");
            Error::new(ErrorKind::NotFound, why)
        }
    })
}

/// Reports whether only root can decide what is at `path`: it and each directory above it is root's, and writable by nobody else.
/// A directory in which nobody can replace what is another's (`/tmp`) may be above, and not contain it directly.
pub fn is_trusted(path: &Path) -> bool {
    let Ok(file) = path.metadata() else { return false };
    let is_roots = |metadata: &Metadata| metadata.uid() == 0;
    let mut above = path.ancestors().skip(1);
    let Some(Ok(parent)) = above.next().map(Path::metadata) else { return false };
    let only_root_writes = |metadata: &Metadata| metadata.mode() & OTHERS_MAY_WRITE == 0;
    let nobody_replaces = |metadata: &Metadata| only_root_writes(metadata) || metadata.mode() & STICKY != 0;
    file.is_file()
        && [&file, &parent].into_iter().all(|metadata| is_roots(metadata) && only_root_writes(metadata))
        && above.all(|dir| dir.metadata().is_ok_and(|dir| is_roots(&dir) && nobody_replaces(&dir)))
}

/// What a program printed, and how it ended.
pub(crate) struct Output {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

/// What a program may print to its standard error; the rest is not read.
const MAX_STDERR: u64 = 64 << 10;

/// Starts `command`, gives it `input`, and waits until it has ended. `started` is told its process. Dropped, it kills the program.
///
/// # Errors
/// If it cannot be started, or prints more than `limit` bytes.
pub(crate) async fn run(
    mut command: Command,
    input: Option<&str>,
    limit: u64,
    started: impl FnOnce(Option<u32>),
) -> Result<Output> {
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let mut child = command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    started(child.id());
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let write = async {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            // A program that ends before it has read all of it says why itself.
            _ = stdin.write_all(input.as_bytes()).await;
        }
    };
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let read_out = async {
        match stdout {
            Some(stdout) => stdout.take(limit.saturating_add(1)).read_to_end(&mut out).await.map(drop),
            None => Ok(()),
        }
    };
    let read_err = async {
        match stderr {
            Some(stderr) => stderr.take(MAX_STDERR).read_to_end(&mut err).await.map(drop),
            None => Ok(()),
        }
    };
    let ((), read, read_err) = tokio::join!(write, read_out, read_err);
    read.and(read_err)?;
    if out.len() as u64 > limit {
        return Err(Error::other(format!("it printed more than {limit} bytes")));
    }
    Ok(Output { status: child.wait().await?, stdout: out, stderr: err })
}
