//! Runs other programs: finds them in trusted directories, and gives them a clean environment.
//!
//! These programs run as root or with capabilities. So a program is looked up only in directories that nobody
//! but root can write to, and it inherits nothing of vmesh's environment: no `LD_*`, no `XTABLES_LIBDIR`, no
//! `NOTIFY_SOCKET`.

use std::ffi::OsStr;
use std::fs::Metadata;
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

/// The directories that are searched after those of the PATH. A program that is run gets them as its PATH.
pub const DIRECTORIES: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const OTHERS_MAY_WRITE: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// Builds a command that runs `program` with no environment but `PATH` and `LC_ALL=C`. A name is looked up
/// with [`find`]; a path is used as it is.
///
/// # Errors
/// If no trusted directory has a program of that name.
pub fn command(program: &Path) -> Result<Command> {
    let program = if program.components().count() > 1 { program.to_owned() } else { find(program)? };
    let mut command = Command::new(program);
    // vmesh parses messages of these programs, so their language is fixed.
    command.env_clear().env("PATH", DIRECTORIES).env("LC_ALL", "C").kill_on_drop(true);
    Ok(command)
}

/// Finds the program `name` in the directories of the PATH and in [`DIRECTORIES`], and checks it with
/// [`is_trusted`].
///
/// # Errors
/// [`ErrorKind::NotFound`] if there is no such program; [`ErrorKind::PermissionDenied`], with the path, if it
/// is not trusted.
pub fn find(name: &Path) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(std::env::split_paths(OsStr::new(DIRECTORIES)));
    let mut passed_over = None;
    for candidate in directories.filter(|dir| dir.is_absolute()).map(|dir| dir.join(name)) {
        match candidate.canonicalize() {
            // The name under which a program was found is kept, because some executables behave differently
            // under each name.
            Ok(real) if is_trusted(&candidate) && is_trusted(&real) => return Ok(candidate),
            Ok(_) => _ = passed_over.get_or_insert(candidate),
            Err(_) => {}
        }
    }
    Err(match passed_over {
        Some(path) => {
            let why = format!(
                "{} is not run, because users other than root may change it or a directory above it",
                path.display()
            );
            Error::new(ErrorKind::PermissionDenied, why)
        }
        None => {
            let name = name.display();
            let why =
                format!("there is no program `{name}` in the directories of the PATH or in {DIRECTORIES}");
            Error::new(ErrorKind::NotFound, why)
        }
    })
}

/// Reports whether only root can replace the file at `path`: the file and each directory above it must belong
/// to root and be writable by nobody else. A sticky directory (`/tmp`) may be above, but must not contain the
/// file directly.
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

/// The output and the exit status of a program.
pub(crate) struct Output {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

/// The limit of what is read of a program's standard error, in bytes.
const MAX_STDERR: u64 = 64 << 10;

/// Starts `command`, writes `input` to it, and waits until it has ended. Calls `started` with its process id.
/// Dropping the future kills the program.
///
/// # Errors
/// If the program cannot be started, or prints more than `limit` bytes.
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
            // A program that ends before it has read all input reports the reason itself.
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
        return Err(Error::other(format!("the program printed more than {limit} bytes")));
    }
    Ok(Output { status: child.wait().await?, stdout: out, stderr: err })
}
