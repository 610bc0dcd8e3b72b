//! One run of the program: its environment, and how all processes it started are killed.

use std::ffi::OsString;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::process::{ExitStatus, Stdio};

use rustix::fs::{Dir, Mode, OFlags};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::process::{Child, Command};

/// The variables of the control plane's environment that a plug-in gets. Others have to be listed in
/// `pass_env`, because the environment holds secrets of the control plane and the sockets by which it talks
/// to systemd.
pub(super) const ENVIRONMENT: [&str; 19] = [
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LANGUAGE",
    "LC_ALL",
    "LC_CTYPE",
    "LC_MESSAGES",
    "TZ",
    "TMPDIR",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTPS_PROXY",
    "NO_PROXY",
];
/// The variables that no plug-in gets, even if `pass_env` lists them: with these it could talk to systemd as
/// the control plane.
pub(super) const NEVER_PASSED: [&str; 6] =
    ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"];
/// The variable that identifies the processes of one run; every process that the program starts inherits it.
const RUN: &str = "VMESH_PLUGIN_RUN";
/// The limit of processes that are inspected to find those of a run.
const MAX_PROCESSES: usize = 100_000;

/// The processes of one run. Dropping it kills them.
pub(super) struct PluginRun {
    /// The program itself.
    pub(super) child: Child,
    /// The process group of the program, which is its leader.
    group: Option<Pid>,
    /// The environment variable that identifies the processes of this run: `VMESH_PLUGIN_RUN=..`.
    mark: Vec<u8>,
}

impl PluginRun {
    pub(super) fn start(command: &[String], pass_env: &[String]) -> io::Result<PluginRun> {
        let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        // The standard library keys each hash map at random.
        let run = format!("{}-{:016x}", std::process::id(), RandomState::new().hash_one(program));
        let child = Command::new(program)
            .args(arguments)
            .env_clear()
            .envs(environment(pass_env))
            .env(RUN, &run)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        Ok(PluginRun { child, group, mark: format!("{RUN}={run}").into_bytes() })
    }

    /// Kills all processes of the run. Returns the exit status of the program if it had already ended.
    pub(super) fn end(&mut self) -> Option<ExitStatus> {
        let group = self.group.take()?;
        // The program stays a zombie while its group is killed, so that its process ID cannot be reused yet.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let has_exited = waitid(WaitId::Pid(group), options).is_ok_and(|status| status.is_some());
        _ = kill_process_group(group, Signal::KILL);
        let mark = std::mem::take(&mut self.mark);
        match tokio::runtime::Handle::try_current() {
            // Reading `/proc` takes a while on a large host.
            Ok(runtime) => drop(runtime.spawn_blocking(move || kill_marked(&mark))),
            Err(_) => kill_marked(&mark),
        }
        if has_exited { self.child.try_wait().ok().flatten() } else { None }
    }
}

impl Drop for PluginRun {
    fn drop(&mut self) {
        self.end();
    }
}

fn environment(pass_env: &[String]) -> impl Iterator<Item = (OsString, OsString)> {
    let passed = ENVIRONMENT.into_iter().chain(pass_env.iter().map(String::as_str));
    let passed = passed.filter(|name| !NEVER_PASSED.contains(name));
    passed.filter_map(|name| Some((name.into(), std::env::var_os(name)?)))
}

/// Kills every process whose environment contains `mark`, including processes outside the program's process
/// group.
fn kill_marked(mark: &[u8]) {
    let Ok(proc) =
        rustix::fs::open("/proc", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
    else {
        return;
    };
    let Ok(entries) = Dir::new(proc) else { return };
    for entry in entries.take(MAX_PROCESSES).flatten() {
        let pid = entry.file_name().to_str().ok().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        let Some(pid) = pid else { continue };
        // The handle is opened first: it refers to the process whose environment is read, not to a later one
        // with the same ID.
        let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        let environment = fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).unwrap_or_default();
        if environment.split(|byte| *byte == 0).any(|variable| variable == mark) {
            _ = pidfd_send_signal(&handle, Signal::KILL);
        }
    }
}
