//! Envoys that outlive their supervisor.
//!
//! An Envoy that can be restarted hot asks the kernel for a SIGTERM when its parent dies (`PR_SET_PDEATHSIG`, in
//! `source/server/hot_restart_impl.cc`): a supervisor that crashes would take it along. So Envoy gets a parent that is
//! gone before it begins, in two steps of this very program:
//!
//! ```text
//!   supervisor ── parent ── child, which waits until its parent is gone, and then becomes Envoy
//!                   └─ says who the child is, and ends
//! ```
//!
//! Its exit status goes to init, then; that it ended is seen all the same.

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

/// The file that this process runs, also when another one has its name by now.
const SELF: &str = "/proc/self/exe";
const PARENT: &str = "envoy-parent";
const CHILD: &str = "envoy-child";
const PARENT_ENDS_WITHIN: Duration = Duration::from_secs(10);

/// Starts `program` so that it is nobody's child. It sees itself as `name`; its output goes to `output`.
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

/// If this process was started by [`start`] it does its part here, and `main` ends with the code.
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
            // To Envoy's output, and from there to the log.
            _ = writeln!(io::stderr(), "error supervisor: could not start Envoy: {error}");
            vmesh_daemon::report::FAILURE.into()
        }
    })
}

fn be_parent(words: impl Iterator<Item = OsString>) -> io::Result<()> {
    let output = || io::stderr().as_fd().try_clone_to_owned().map(File::from);
    let mut child = Command::new(SELF);
    child.arg(CHILD).arg(getpid().as_raw_nonzero().to_string()).args(words).process_group(0);
    // Not waited for: it goes to init.
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
