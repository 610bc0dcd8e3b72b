//! Starts Envoys that survive the death of their supervisor.
//!
//! An Envoy with hot restart enabled asks the kernel for a SIGTERM when its parent process dies (`PR_SET_PDEATHSIG`, in
//! `source/server/hot_restart_impl.cc`), so a crash of the supervisor would take Envoy down. Envoy is therefore started through an
//! intermediate process that exits before Envoy begins. Both steps run this same program:
//!
//! ```text
//!   supervisor ── intermediate parent ── child: waits until its parent is gone, then execs Envoy
//!                   └─ prints the child's pid, and exits
//! ```
//!
//! Envoy's exit status is then collected by init and is unknown to the supervisor, which still notices the exit.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, getpid, getppid};
use tokio::time::timeout;

use crate::envoy::process::Process;

/// The executable of this process, even if its path names another file by now.
const SELF: &str = "/proc/self/exe";
const PARENT: &str = "envoy-parent";
const CHILD: &str = "envoy-child";
const PARENT_ENDS_WITHIN: Duration = Duration::from_secs(10);

/// Starts `program` as a process without a parent of ours, with `name` as its `argv[0]`; its output goes to `output`.
pub(super) async fn start(
    program: &Path,
    name: &Path,
    arguments: &[String],
    output: OwnedFd,
) -> io::Result<Process> {
    rustix::fs::access(program, rustix::fs::Access::EXEC_OK)?;
    let mut parent = tokio::process::Command::new(SELF);
    parent.arg(PARENT).arg(program).arg(name).args(arguments).process_group(0).kill_on_drop(true);
    parent.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(output);
    let parent = timeout(PARENT_ENDS_WITHIN, parent.spawn()?.wait_with_output()).await;
    let parent = parent.unwrap_or_else(|_| Err(io::Error::other("its first parent does not end")))?;
    let pid = String::from_utf8_lossy(&parent.stdout).trim().parse::<i32>();
    let (true, Ok(pid)) = (parent.status.success(), pid) else {
        return Err(io::Error::other(format!("its first parent failed: {}", parent.status)));
    };
    Process::find(pid).ok_or_else(|| io::Error::other("it ended at once"))
}

/// Runs this process's part if it was started by [`start`], and returns the exit code for `main`. Returns `None` in any other process.
pub fn step() -> Option<ExitCode> {
    let mut words = std::env::args_os().skip(1);
    let done = match words.next()?.to_str()? {
        PARENT => be_parent(words),
        CHILD => be_child(words),
        _ => return None,
    };
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Written to Envoy's output, which ends up in the log.
            _ = writeln!(io::stderr(), "error supervisor: could not start Envoy: {error}");
            vmesh_daemon::report::FAILURE.into()
        }
    })
}

fn be_parent(words: impl Iterator<Item = OsString>) -> io::Result<()> {
    let output = || io::stderr().as_fd().try_clone_to_owned().map(File::from);
    let mut child = Command::new(SELF);
    child.arg(CHILD).arg(getpid().as_raw_nonzero().to_string()).args(words).process_group(0);
    // Not waited for: init adopts it.
    let child = child.stdin(Stdio::null()).stdout(output()?).stderr(output()?).spawn()?;
    writeln!(io::stdout(), "{}", child.id())
}

fn be_child(mut words: impl Iterator<Item = OsString>) -> io::Result<()> {
    let mut word = || words.next().ok_or_else(|| io::Error::other("a word is missing"));
    let parent = word()?.to_str().and_then(|pid| Pid::from_raw(pid.parse().ok()?));
    let (program, name) = (word()?, word()?);
    let deadline = Instant::now() + PARENT_ENDS_WITHIN;
    while getppid() == parent {
        if Instant::now() > deadline {
            return Err(io::Error::other("its first parent does not end"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(Command::new(program).arg0(name).args(words).exec())
}
