//! A booted machine: systemd-nspawn, started again at each reboot of the guest, and the control groups with
//! its processes.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};

use super::{INSTALL, lock};
use crate::process::die_with_parent;
use crate::{Failed, Result, debian};

/// The exit status of nspawn after the guest has asked for a reboot (`--keep-unit`).
const REBOOT: i32 = 133;

/// The settings with which a machine is booted.
pub(super) struct BootSettings {
    pub(super) name: String,
    pub(super) root: PathBuf,
    /// The file that represents its network namespace.
    pub(super) network: PathBuf,
    pub(super) console: PathBuf,
    /// Written for other processes.
    pub(super) pid_file: PathBuf,
    /// The control groups of the machine, one for each hierarchy that systemd uses.
    pub(super) groups: Vec<PathBuf>,
    /// The nspawn program, without arguments.
    pub(super) program: Command,
}

pub(super) struct Machine {
    shared: Arc<MachineShared>,
    /// Owns the processes: the kernel kills them when this thread ends.
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct MachineShared {
    boot: BootSettings,
    /// Recreates the network, as a reboot does.
    rewire: Box<dyn Fn() -> Result<()> + Send + Sync>,
    state: Mutex<MachineState>,
}

#[derive(Default)]
struct MachineState {
    /// The `unshare` process, the parent of nspawn.
    above: Option<Pid>,
    boots: u32,
    /// True if a test switched the machine off for good.
    off: bool,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("name", &self.shared.boot.name).finish_non_exhaustive()
    }
}

impl Machine {
    /// Creates a machine that is switched off.
    pub(super) fn new(
        boot: BootSettings,
        rewire: impl Fn() -> Result<()> + Send + Sync + 'static,
    ) -> Machine {
        let state = Mutex::new(MachineState { off: true, ..MachineState::default() });
        let shared = Arc::new(MachineShared { boot, rewire: Box::new(rewire), state });
        Machine { shared, thread: Mutex::default() }
    }

    pub(super) fn power_on(&self) -> Result<()> {
        let mut thread = lock(&self.thread);
        if thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return Err(Failed::new(format!("host {} is on already", self.shared.boot.name)));
        }
        lock(&self.shared.state).off = false;
        let (shared, started) = (self.shared.clone(), std::sync::mpsc::channel());
        let run = move || shared.run(&started.0);
        let named = std::thread::Builder::new().name(format!("host {}", self.shared.boot.name)).spawn(run);
        *thread = Some(named.map_err(Failed::to("could not start a thread for a host"))?);
        started.1.recv().unwrap_or_else(|_| Err(Failed::new("the thread of a host ended")))
    }

    /// Kills all processes of the machine, and waits until none is left.
    pub(super) fn power_cut(&self) {
        let mut thread = lock(&self.thread);
        {
            let mut state = lock(&self.shared.state);
            state.off = true;
            self.shared.boot.groups.iter().for_each(|group| kill_all(group));
            if let Some(above) = state.above {
                _ = kill_process(above, Signal::KILL);
            }
        }
        if let Some(thread) = thread.take() {
            _ = thread.join();
        }
    }

    pub(super) fn is_on(&self) -> bool {
        lock(&self.shared.state).above.is_some()
    }

    /// Returns how often the machine was booted.
    pub(super) fn boots(&self) -> u32 {
        lock(&self.shared.state).boots
    }

    /// Returns the guest's PID 1 by its process id on this machine, once it is systemd.
    pub(super) fn leader(&self) -> Option<u32> {
        let above = lock(&self.shared.state).above?;
        leader_of(above.as_raw_nonzero().get().unsigned_abs())
    }
}

impl MachineShared {
    fn run(&self, started: &std::sync::mpsc::Sender<Result<()>>) {
        loop {
            let child = {
                let mut state = lock(&self.state);
                if state.off {
                    return;
                }
                let child = match self.spawn() {
                    Ok(child) => child,
                    Err(failed) => {
                        _ = started.send(Err(failed));
                        return;
                    }
                };
                state.above = Some(Pid::from_child(&child));
                state.boots += 1;
                _ = fs::write(&self.boot.pid_file, child.id().to_string());
                _ = started.send(Ok(()));
                child
            };
            let code = self.wait(child);
            self.boot.groups.iter().for_each(|group| clear(group));
            if code != Some(REBOOT) || lock(&self.state).off {
                return;
            }
            if let Err(failed) = (self.rewire)() {
                eprintln!("host {} does not boot again: {failed:?}", self.boot.name);
                return;
            }
        }
    }

    /// Waits for the process, and returns its exit status. Forgets its id before the kernel can reuse it.
    fn wait(&self, mut child: Child) -> Option<i32> {
        _ = waitid(WaitId::Pid(Pid::from_child(&child)), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
        let mut state = lock(&self.state);
        state.above = None;
        _ = fs::remove_file(&self.boot.pid_file);
        child.wait().ok()?.code()
    }

    fn spawn(&self) -> Result<Child> {
        let BootSettings { name, root, network, console, groups, program, .. } = &self.boot;
        for group in groups {
            make(group)?;
        }
        let log = File::options().create(true).append(true).open(console);
        let log = log.map_err(Failed::to(format!("could not open {}", console.display())))?;
        let errors = log.try_clone().map_err(Failed::to("could not open a file twice"))?;
        // nspawn writes to a directory that it refuses to have on a disk. The mount namespace gives each
        // machine its own. With `--keep-unit`, nspawn creates control groups below that of its parent.
        let script = "set -e; while [ \"$1\" != -- ]; do echo 0 >\"$1/cgroup.procs\"; shift; done; shift\n\
             mkdir -p /run/systemd/nspawn; mount -t tmpfs -o mode=755 vmesh-nspawn /run/systemd/nspawn\n\
             exec \"$@\"";
        let mut command = Command::new("unshare");
        // A chain of parents: nspawn dies with unshare, and the guest dies with nspawn, in whose pid
        // namespace it is.
        command.args([
            "--mount",
            "--propagation",
            "slave",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]);
        command.args(["--", "sh", "-c", script, "sh"]).args(groups);
        command.arg("--").arg(program.get_program()).args(program.get_args());
        command.args(["--quiet", "--register=no", "--keep-unit", "--boot", "--directory"]).arg(root);
        command.arg(format!("--machine={name}")).arg(format!("--hostname={name}"));
        command.arg(format!("--network-namespace-path={}", network.display()));
        command.args(["--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=read-only"]);
        command.args([
            "--capability=CAP_NET_ADMIN,CAP_NET_RAW,CAP_BPF,CAP_PERFMON,CAP_SYSLOG,CAP_IPC_LOCK",
            "--system-call-filter=bpf perf_event_open @memlock",
            "--kill-signal=SIGRTMIN+3",
        ]);
        // As on a VM, only cgroup2 is mounted, and the sysctls of the network are writable.
        command.env("UNIFIED_CGROUP_HIERARCHY", "1").env("SYSTEMD_NSPAWN_API_VFS_WRITABLE", "network");
        command.stdin(Stdio::null()).stdout(log).stderr(errors);
        die_with_parent(&mut command);
        command.spawn().map_err(Failed::to(format!("could not start nspawn for host {name}; {INSTALL}")))
    }
}

/// Checks that this machine can boot hosts.
pub(super) fn able() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(Failed::new(format!("this is not root; {INSTALL}")));
    }
    for tool in ["unshare", "nsenter", "mount", "umount", "ip"] {
        if debian::on_path(tool).is_none() {
            return Err(Failed::new(format!(
                "there is no `{tool}`; {INSTALL}: `apt-get install util-linux mount iproute2`"
            )));
        }
    }
    let systems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    for system in ["overlay", "tmpfs", "cgroup2"] {
        if !systems.lines().any(|line| line.trim_start_matches("nodev").trim() == system) {
            return Err(Failed::new(format!("the kernel has no file system `{system}`; {INSTALL}")));
        }
    }
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = lock(&ONE_AT_A_TIME);
    let probe = groups(&format!("probe-{}", std::process::id()))?;
    let made = probe.iter().try_for_each(|group| make(group));
    probe.iter().for_each(|group| clear(group));
    made
}

/// Returns the directories of the control group `name`, one for each hierarchy that systemd uses here.
pub(super) fn groups(name: &str) -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(Failed::to("could not read the mounts"))?;
    let found = hierarchies(&mounts);
    if found.is_empty() {
        return Err(Failed::new(format!("no control groups of version 2 are mounted; {INSTALL}")));
    }
    Ok(found.into_iter().map(|mount| mount.join("vmesh-hosts").join(name)).collect())
}

/// Returns the mount point of cgroup2 and, in the hybrid layout, that of systemd's own version 1 hierarchy.
/// Empty without cgroup2.
fn hierarchies(mounts: &str) -> Vec<PathBuf> {
    let mounts: Vec<Vec<&str>> = mounts.lines().map(|line| line.split(' ').collect()).collect();
    let find = |wanted: &dyn Fn(&str, &str) -> bool| {
        mounts.iter().find_map(|mount| match mount.as_slice() {
            [_, path, kind, options, ..] if wanted(kind, options) => Some(PathBuf::from(path)),
            _ => None,
        })
    };
    let Some(second) = find(&|kind, _| kind == "cgroup2") else { return Vec::new() };
    let named = |kind: &str, options: &str| {
        kind == "cgroup" && options.split(',').any(|option| option == "name=systemd")
    };
    std::iter::once(second).chain(find(&named)).collect()
}

fn make(group: &Path) -> Result<()> {
    fs::create_dir_all(group)
        .map_err(Failed::to(format!("could not make the control group {}; {INSTALL}", group.display())))?;
    // The controllers for limits of units. Machines without these controllers can boot hosts, too.
    for dir in group.ancestors().skip(1).take(2) {
        for controller in ["+cpu", "+memory", "+pids"] {
            _ = fs::write(dir.join("cgroup.subtree_control"), controller);
        }
    }
    Ok(())
}

/// Kills all processes in the control group and below it.
fn kill_all(group: &Path) {
    _ = fs::write(group.join("cgroup.kill"), "1");
}

/// Kills all processes in the control group and removes it.
pub(super) fn clear(group: &Path) {
    // A killed process exits a moment later. Only then can its control group be removed.
    for _ in 0..100 {
        kill_all(group);
        remove(group);
        if !group.exists() {
            return;
        }
        sleep(Duration::from_millis(20));
    }
}

fn remove(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    _ = fs::remove_dir(group);
}

/// Returns the guest's PID 1, a grandchild of `unshare`, once it is systemd.
pub(super) fn leader_of(above: u32) -> Option<u32> {
    let guests = children(above).into_iter().flat_map(children);
    { guests }.find(|pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.trim() == "systemd"
    })
}

fn children(of: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

pub(super) fn enter(leader: u32, program: &OsStr) -> Command {
    let mut command = Command::new("nsenter");
    command.args(["--target", &leader.to_string(), "--all", "--", "env", "-i"]);
    command.args(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"]);
    command.args(["TERM=dumb", "LANG=C.UTF-8"]).arg(program);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchies_are_those_that_systemd_uses() {
        let hybrid = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup /sys/fs/cgroup/systemd cgroup rw,xattr,name=systemd 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let paths =
            |text| hierarchies(text).iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
        assert_eq!(paths(hybrid), ["/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"]);
        assert_eq!(paths("cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0\n"), ["/sys/fs/cgroup"]);
        assert!(paths("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n").is_empty());
    }
}
