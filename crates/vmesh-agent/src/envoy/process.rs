//! One Envoy process, started by this agent or by an earlier one.
//!
//! An agent may be stopped, upgraded or killed while its Envoy serves, so Envoy is decoupled from it: no signal when its parent dies, a
//! process group of its own (Ctrl-C at a terminal reaches the agent alone), and a FIFO for its output, which neither breaks nor blocks when
//! it has no reader. A record on disk identifies the process. The next agent adopts the process if it is still the same one, was started
//! with what this agent would start, and answers.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::warn;
use vmesh_daemon::fsx;

/// The inputs that an Envoy is started with. Two Envoys with equal inputs are interchangeable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ChildLaunch {
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<String>,
    pub(crate) bootstrap: String,
}

/// Identifies a process. A pid alone may be reused; together with the boot and the start time it is unique.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessIdentity {
    pub(crate) pid: i32,
    /// Clock ticks between boot and the start of the process (field 22 of proc_pid_stat(5)).
    pub(crate) started: u64,
    pub(crate) boot: String,
}

/// The record on disk of a running Envoy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ChildRecord {
    #[serde(flatten)]
    pub(crate) identity: ProcessIdentity,
    pub(crate) launch: ChildLaunch,
    /// The Envoy that it replaces, during a handover.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) before: Option<ProcessIdentity>,
}

const MAX_RECORD: u64 = 16 << 20;

/// A running process.
pub(crate) struct Process {
    pid: Pid,
    started: u64,
    /// `None` on kernels before 5.3, where the process is polled.
    handle: Option<AsyncFd<OwnedFd>>,
    /// `None` for a process that an earlier agent started: init collects its exit status.
    child: Option<Child>,
}

impl Process {
    /// Starts `launch`, with its output redirected to `output`.
    pub(crate) fn start(launch: &ChildLaunch, output: OwnedFd) -> io::Result<Process> {
        let mut command = Command::new(&launch.program);
        command.args(&launch.arguments);
        Process::spawn(command, output)
    }

    /// Starts `command`, with its output redirected to `output`.
    pub(crate) fn spawn(mut command: Command, output: OwnedFd) -> io::Result<Process> {
        let errors = output.try_clone()?;
        command.process_group(0);
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        let child = command.spawn()?;
        let pid = Pid::from_child(&child);
        let mut process = Process { pid, started: 0, handle: None, child: Some(child) };
        // The pid of a child cannot be reused until the child is waited for.
        process.handle = handle(pid)?;
        process.started = started(pid).unwrap_or_default();
        Ok(process)
    }

    /// Returns the process with this pid, or `None` if there is none.
    pub(crate) fn find(pid: i32) -> Option<Process> {
        let pid = Pid::from_raw(pid)?;
        // Open the pidfd first: if the process is replaced in between, the start time that is read belongs to no process that the pidfd can
        // signal.
        let handle = handle(pid).ok()?;
        Some(Process { pid, started: started(pid)?, handle, child: None })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    pub(crate) fn record(&self, launch: &ChildLaunch) -> ChildRecord {
        ChildRecord { identity: self.identity(), launch: launch.clone(), before: None }
    }

    pub(crate) fn identity(&self) -> ProcessIdentity {
        ProcessIdentity { pid: self.pid(), started: self.started, boot: boot() }
    }

    /// Returns the process that `identity` describes, if it still runs.
    pub(crate) fn identified(identity: &ProcessIdentity) -> Option<Process> {
        let process = Process::find(identity.pid)?;
        (process.started == identity.started && boot() == identity.boot && !process.is_zombie())
            .then_some(process)
    }

    /// Returns the process that `record` describes, if it still runs.
    pub(crate) fn recorded(record: &ChildRecord) -> Option<Process> {
        Process::identified(&record.identity)
    }

    fn is_zombie(&self) -> bool {
        stat(self.pid).is_none_or(|stat| stat.state == "Z" || stat.state == "X")
    }

    /// Waits until the process exits, and returns how it exited. Cancel-safe.
    pub(crate) async fn exited(&mut self) -> String {
        match &self.handle {
            // A pidfd becomes readable when the process exits. An error means that it cannot be polled, so the process is gone.
            Some(handle) => _ = handle.ready(Interest::READABLE).await,
            None => {
                while started(self.pid) == Some(self.started) && !self.is_zombie() {
                    tokio::time::sleep(Duration::from_millis(250)).await;
                }
            }
        }
        let status = self.child.as_mut().and_then(|child| child.wait().ok());
        status.map_or_else(|| "it ended".to_owned(), |status| status.to_string())
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let sent = match &self.handle {
            Some(handle) => pidfd_send_signal(handle.as_fd(), signal),
            None => kill_process(self.pid, signal),
        };
        match sent {
            // The process has exited already.
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => warn!(pid = self.pid(), "could not send {signal:?} to Envoy: {error}"),
        }
    }
}

#[expect(unsafe_code, reason = "tokio asks for a promise that an owned descriptor keeps by itself")]
fn handle(pid: Pid) -> io::Result<Option<AsyncFd<OwnedFd>>> {
    match pidfd_open(pid, PidfdFlags::empty()) {
        // SAFETY: an `OwnedFd` is the same open descriptor for as long as it lives, and the `AsyncFd` owns it.
        Ok(handle) => Ok(Some(unsafe { AsyncFd::register_with_interest(handle, Interest::READABLE) }?)),
        Err(Errno::NOSYS) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

struct ProcStat {
    state: String,
    started: u64,
}

/// Reads proc_pid_stat(5). The command name in parentheses may itself contain spaces and parentheses.
fn stat(pid: Pid) -> Option<ProcStat> {
    let text = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    let (_, fields) = text.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    let state = fields.next()?.to_owned();
    // The state is field 3, the start time is field 22.
    Some(ProcStat { state, started: fields.nth(18)?.parse().ok()? })
}

fn started(pid: Pid) -> Option<u64> {
    stat(pid).map(|stat| stat.started)
}

fn boot() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

impl ChildRecord {
    pub(crate) fn load(path: &Path) -> Option<ChildRecord> {
        let bytes = match fsx::read_capped(path, MAX_RECORD) {
            Ok(bytes) => bytes,
            Err(error) if error.is_not_found() => return None,
            Err(error) => {
                warn!(
                    "an Envoy left by an earlier agent is not looked for: {}",
                    vmesh_daemon::report::one_line(&error)
                );
                return None;
            }
        };
        serde_json::from_slice(&bytes)
            .inspect_err(|error| warn!("{} is not a record of an Envoy: {error}", path.display()))
            .ok()
    }

    pub(crate) fn save(&self, path: &Path) -> Result<(), fsx::FileError> {
        let text = serde_json::to_vec_pretty(self).unwrap_or_default();
        fsx::write_atomically(path, &text, fsx::PRIVATE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper() -> (ChildLaunch, Process) {
        let launch = ChildLaunch {
            program: "/bin/sleep".into(),
            arguments: vec!["60".into()],
            bootstrap: String::new(),
        };
        let null = std::fs::File::create("/dev/null").unwrap();
        let process = Process::start(&launch, null.into()).unwrap();
        (launch, process)
    }

    #[tokio::test]
    async fn a_process_is_found_again_by_its_record_and_its_end_is_seen_by_both() {
        let (launch, mut process) = sleeper();
        let record = process.record(&launch);
        let mut found = Process::recorded(&record).unwrap();
        found.signal(Signal::KILL);
        assert_eq!(process.exited().await, "signal: 9 (SIGKILL)");
        assert_eq!(found.exited().await, "it ended");
        assert!(Process::recorded(&record).is_none());
    }

    #[tokio::test]
    async fn another_process_under_the_same_pid_is_not_taken_over() {
        let (launch, mut process) = sleeper();
        let record = process.record(&launch);
        let identity = record.identity;
        assert!(
            Process::identified(&ProcessIdentity { started: identity.started + 1, ..identity.clone() })
                .is_none()
        );
        assert!(Process::identified(&ProcessIdentity { boot: "another".into(), ..identity }).is_none());
        process.signal(Signal::KILL);
        process.exited().await;
    }
}
