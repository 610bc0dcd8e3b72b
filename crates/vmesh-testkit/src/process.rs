//! Programs under test.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use http::{Method, StatusCode};
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use vmesh_daemon::fetch::{Peer, fetch};

use crate::{Failed, Result, cache, wait_for};

/// Returns the binary `name` of this workspace. Cargo has put it beside the running test.
pub fn binary(name: &str) -> Result<PathBuf> {
    let test = std::env::current_exe().map_err(Failed::to("could not find the running test"))?;
    let mut tried = Vec::new();
    // target/debug/deps/test-1234, target/debug/demo
    for dir in test.ancestors().skip(1).take(3) {
        let path = dir.join(name);
        if path.is_file() {
            return Ok(path);
        }
        tried.push(path.display().to_string());
    }
    Err(Failed::new(format!(
        "{name} is not built (looked for {}): `cargo build -p {name}`, with the same --profile",
        tried.join(", ")
    )))
}

/// A running program. It is killed when the value is dropped, also by a panicking test, and by the kernel if
/// the test process dies.
pub struct Daemon {
    name: String,
    child: Child,
    output: Arc<Mutex<Vec<String>>>,
    readers: Vec<JoinHandle<()>>,
    exited: Option<ExitStatus>,
}

impl Daemon {
    /// Starts `command` and collects its output. `name` is used in messages.
    pub fn spawn(name: impl Into<String>, mut command: Command) -> Result<Daemon> {
        let name = name.into();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        die_with_parent(&mut command);
        let shown = cache::show(&command);
        let mut child = command.spawn().map_err(Failed::to(format!("could not start {name}: `{shown}`")))?;
        let output = Arc::new(Mutex::new(Vec::new()));
        let readers = [
            child.stdout.take().map(|from| keep_lines(&name, from, output.clone())),
            child.stderr.take().map(|from| keep_lines(&name, from, output.clone())),
        ];
        let readers = readers.into_iter().flatten().collect();
        Ok(Daemon { name, child, output, readers, exited: None })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the output so far, with stdout and stderr in order of arrival.
    pub fn output(&self) -> String {
        self.output.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
    }

    /// Returns the resident memory, in bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        self.status_bytes("VmRSS:")
    }

    /// Returns the resident memory without pages of files, in bytes. In unoptimised programs the latter are
    /// mostly code.
    pub fn anonymous_bytes(&self) -> Result<u64> {
        self.status_bytes("RssAnon:")
    }

    fn status_bytes(&self, field: &str) -> Result<u64> {
        let path = format!("/proc/{}/status", self.pid());
        let status = std::fs::read_to_string(&path).map_err(Failed::to(format!("could not read {path}")))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.trim().strip_suffix("kB"));
        let kib = line.and_then(|kib| kib.trim().parse::<u64>().ok());
        Ok(1024 * kib.ok_or_else(|| Failed::new(format!("{path} has no {field} {} has ended", self.name)))?)
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        if self.exited.is_some() {
            return Err(Failed::new(format!("{} has ended already", self.name)));
        }
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).map_err(Failed::to(format!("could not signal {}", self.name)))
    }

    /// Sends SIGKILL, and waits for the end of the program.
    pub fn kill(&mut self) -> Result<()> {
        if self.exited.is_none() {
            _ = self.child.kill();
            let status =
                self.child.wait().map_err(Failed::to(format!("could not wait for {}", self.name)))?;
            self.exited = Some(status);
        }
        Ok(())
    }

    /// Sends SIGSTOP: the program keeps its sockets and stops answering.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Sends SIGTERM, and waits for an orderly end.
    pub async fn terminate(&mut self, bound: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait_exit(bound).await
    }

    pub async fn wait_exit(&mut self, bound: Duration) -> Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        let ended = wait_for(what, bound, async || self.has_exited().ok_or("it runs")).await;
        ended.map_err(|failed| self.with_output(&failed))
    }

    /// Returns the exit status, if the program has ended.
    pub fn has_exited(&mut self) -> Option<ExitStatus> {
        if self.exited.is_none() {
            self.exited = self.child.try_wait().ok().flatten();
        }
        self.exited
    }

    /// Waits for a line of output that contains `text`, which may already have been printed.
    pub async fn wait_line(&mut self, text: &str, bound: Duration) -> Result<String> {
        let what = format!("{} to print `{text}`", self.name);
        let waiting =
            wait_for(what, bound, async || {
                // The exit status is read first, so the last lines before an exit are not missed.
                let exited = self.has_exited();
                let lines = self.output.lock().unwrap_or_else(PoisonError::into_inner);
                match lines.iter().find(|line| line.contains(text)) {
                    Some(line) => Ok(line.clone()),
                    None => Err(exited
                        .map_or_else(|| "no such line".to_owned(), |status| format!("it ended: {status}"))),
                }
            });
        waiting.await.map_err(|failed| self.with_output(&failed))
    }

    /// Waits until `peer` answers `GET path` with 200, and returns the body.
    pub async fn wait_http(&mut self, peer: &Peer, path: &str, bound: Duration) -> Result<String> {
        let what = format!("{} to answer GET {path} at {peer} with 200", self.name);
        let waiting = wait_for(what, bound, async || {
            if let Some(status) = self.has_exited() {
                return Err(format!("it ended: {status}"));
            }
            match fetch(peer, Method::GET, path, Duration::from_secs(5)).await {
                Ok((StatusCode::OK, body)) => Ok(String::from_utf8_lossy(&body).into_owned()),
                Ok((status, body)) => Err(format!("{status}: {}", String::from_utf8_lossy(&body))),
                Err(error) => Err(vmesh_daemon::report::one_line(&error)),
            }
        });
        waiting.await.map_err(|failed| self.with_output(&failed))
    }

    fn with_output(&self, failed: &Failed) -> Failed {
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let tail: Vec<&str> = output.iter().rev().take(40).map(String::as_str).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        Failed::new(format!("{failed}\nthe last lines of {}:\n  {}", self.name, tail.join("\n  ")))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        _ = self.kill();
        if std::thread::panicking() {
            eprintln!(
                "{}",
                self.with_output(&Failed::new(format!("the test failed while {} ran", self.name)))
            );
        }
        // The readers are not joined, because a grandchild may keep the pipe open.
        self.readers.clear();
    }
}

/// Makes the kernel kill the child when the thread that started it ends, so no daemon outlives its test.
#[expect(unsafe_code, reason = "the closure runs between fork and exec and makes one system call")]
pub(crate) fn die_with_parent(command: &mut Command) {
    let parent = rustix::process::getpid();
    let hook = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before the system call took effect.
        if rustix::process::getppid() == Some(parent) {
            Ok(())
        } else {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
    };
    // SAFETY: only async-signal-safe calls, no allocation and no lock.
    unsafe { command.pre_exec(hook) };
}

fn keep_lines(
    name: &str,
    from: impl Read + Send + 'static,
    output: Arc<Mutex<Vec<String>>>,
) -> JoinHandle<()> {
    let echo = std::env::var_os("VMESH_ECHO").map(|_| name.to_owned());
    std::thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            if let Some(name) = &echo {
                eprintln!("{name}: {line}");
            }
            output.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        }
    })
}

/// Kills each process that has `dir`, or a path below it, on its command line.
pub(crate) fn kill_those_naming(dir: &Path) {
    for pid in naming(dir) {
        _ = kill_process(pid, Signal::KILL);
    }
}

/// Returns the processes that have `dir`, or a path below it, on their command line.
pub fn naming(dir: &Path) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let named = |pid: &i32| {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words =
            words.split(|byte| *byte == 0).map(|word| Path::new(std::ffi::OsStr::from_bytes(word)));
        words.any(|word| word.starts_with(dir))
    };
    let me = rustix::process::getpid();
    pids.filter(named).filter_map(Pid::from_raw).filter(|pid| *pid != me).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    fn shell(script: &str) -> Daemon {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Daemon::spawn("shell", command).unwrap()
    }

    #[tokio::test]
    async fn a_daemon_is_heard_signalled_and_waited_for() {
        let mut daemon = shell("trap 'echo bye; exit 7' TERM; echo hello; while :; do sleep 0.02; done");
        assert_eq!(daemon.wait_line("hel", SOON).await.unwrap(), "hello");
        assert_eq!(daemon.terminate(SOON).await.unwrap().code(), Some(7));
        daemon.wait_line("bye", SOON).await.unwrap();
        assert!(daemon.signal(Signal::TERM).is_err());
    }

    #[tokio::test]
    async fn a_line_that_never_comes_is_an_error_that_shows_the_others() {
        let mut daemon = shell("echo one >&2; exec tail -f /dev/null");
        daemon.wait_line("one", SOON).await.unwrap();
        let error = daemon.wait_line("two", Duration::from_millis(50)).await.unwrap_err().to_string();
        assert!(
            error.contains("shell to print `two`; last seen: no such line") && error.contains("\n  one"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_process_that_outlives_its_parent_is_found_by_the_directory_that_it_names() {
        let dir = crate::tempdir().unwrap();
        let (path, log) = (dir.to_owned(), dir.join("log"));
        std::fs::write(&log, "").unwrap();
        let mut daemon = shell(&format!("tail -f {} & echo up; wait", log.display()));
        daemon.wait_line("up", SOON).await.unwrap();
        daemon.kill().unwrap();
        wait_for("tail", SOON, async || (!naming(&path).is_empty()).then_some(())).await.unwrap();
        drop(dir);
        wait_for("nobody", SOON, async || naming(&path).is_empty().then_some(())).await.unwrap();
    }
}
