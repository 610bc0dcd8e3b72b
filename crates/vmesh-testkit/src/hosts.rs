//! Booted hosts, each with a real systemd as PID 1, units, a journal, resolved, SSH and a firewall. They
//! serve for tests of what only a whole machine can show: installation, boot, power cuts, upgrades, removal.
//!
//! Each host is a container of systemd-nspawn on the [`Switch`] of its fleet. Hosts that are only namespaces
//! ([`netns`](crate::netns)) may be on the same switch. Nothing is created in the namespace of the test, and
//! nothing is installed on the machine. Names contain the process id; leftovers of a killed test are removed
//! by the next one.
//!
//! ```text
//! $XDG_CACHE_HOME/vmesh/host-bookworm-…   the root, built once by the machine's own apt, mounted read-only
//! /run/vmesh-hosts/PID-N                  a tmpfs with the writable layers of one fleet, removed with it
//! CGROUP/vmesh-hosts/PID-N/NAME           the processes of a host
//! ```
//!
//! Differences from a real VM: all hosts share one kernel and one clock (no `kernel.*` and `vm.*` sysctls, no
//! modules), there is no udev, and [`Host::power_cut`] loses no data that was written. Limits of memory and
//! CPU apply if the machine has those controllers in cgroup2.

mod machine;
mod root;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use machine::{BootSettings, Machine};

use crate::netns::{self, Switch};
use crate::{Failed, Result, cache};

pub use root::{Root, Suite};

/// The directory with the disks of running hosts.
const RUN: &str = "/run/vmesh-hosts";
/// The time limit of a boot, which takes a second on an idle machine.
const BOOTS_WITHIN: Duration = Duration::from_secs(120);
const INSTALL: &str = "booted hosts need root, cgroup2, overlay and tmpfs file systems, and util-linux";

/// Hosts on one switch.
#[derive(Debug, Clone)]
pub struct Fleet {
    inner: Arc<FleetShared>,
}

#[derive(Debug)]
struct FleetShared {
    // The fields are dropped in this order.
    switch: Switch,
    disk: Disk,
    root: Root,
    /// The names of all hosts, which each host can resolve.
    names: Mutex<BTreeMap<String, [IpAddr; 2]>>,
}

/// A booted host. Dropping it switches it off and removes its disk.
#[derive(Debug)]
pub struct Host {
    name: String,
    machine: Machine,
    fleet: Arc<FleetShared>,
    /// The network of the host. Sockets can be created in it: see [`netns::Host::within`].
    pub net: Arc<netns::Host>,
    dir: PathBuf,
}

impl Fleet {
    /// Creates a fleet of hosts with Debian 12.
    ///
    /// # Errors
    /// If the machine cannot run them; the message says what is missing.
    pub fn new() -> Result<Fleet> {
        Fleet::of(Suite::Bookworm, &[])
    }

    /// Creates a fleet of hosts with this release, and with these additional files (path on the host, file
    /// here).
    pub fn of(suite: Suite, files: &[(&str, &Path)]) -> Result<Fleet> {
        static REAP: Once = Once::new();
        machine::able()?;
        REAP.call_once(remove_leftover_fleets);
        let root = Root::get(suite)?;
        let disk = Disk::new()?;
        let layer = disk.dir.join("layer");
        fs::create_dir_all(&layer).map_err(Failed::to(format!("could not create {}", layer.display())))?;
        for (to, from) in files {
            copy(from, &below(&layer, Path::new(to)))?;
        }
        let mut keygen = root.command("ssh-keygen");
        keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", "vmesh-hosts", "-f"]).arg(disk.dir.join("key"));
        cache::run(&mut keygen, INSTALL)?;
        let switch = Switch::new()?;
        Ok(Fleet { inner: Arc::new(FleetShared { switch, disk, root, names: Mutex::default() }) })
    }

    /// Boots a new host.
    pub fn host(&self, name: &str) -> Result<Host> {
        let host = self.start(name)?;
        host.wait_booted()?;
        Ok(host)
    }

    /// Boots several new hosts concurrently.
    pub fn hosts<const N: usize>(&self, names: [&str; N]) -> Result<[Host; N]> {
        let started = names.iter().map(|name| self.start(name)).collect::<Result<Vec<_>>>()?;
        started.iter().try_for_each(Host::wait_booted)?;
        started.try_into().map_err(|_| Failed::new("as many hosts as names"))
    }

    /// Returns the switch that connects the hosts. [`Switch::host`] adds clients that need no systemd.
    pub fn switch(&self) -> &Switch {
        &self.inner.switch
    }

    /// Returns the root of the hosts' release, whose programs can be run on this machine.
    pub fn root(&self) -> &Root {
        &self.inner.root
    }

    fn start(&self, name: &str) -> Result<Host> {
        let fleet = self.inner.clone();
        let valid = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if name.is_empty() || name.len() > 40 || !name.bytes().all(valid) || name.starts_with('-') {
            return Err(Failed::new(format!("`{name}` is no name for a host: a to z, 0 to 9 and -")));
        }
        let dir = fleet.disk.dir.join(name);
        let made = fs::create_dir(&dir);
        made.map_err(Failed::to(format!("could not create {} (is there a host `{name}`?)", dir.display())))?;
        let net = Arc::new(fleet.switch.host()?);
        let root = fleet.overlay(&dir)?;
        let key =
            fs::read(fleet.disk.dir.join("key.pub")).map_err(Failed::to("could not read the SSH key"))?;
        write(&root, "/etc/hostname", name, 0o644)?;
        write(&root, "/root/.ssh/authorized_keys", key, 0o600)?;
        {
            let mut names = lock(&fleet.names);
            names.insert(name.to_owned(), net.addresses());
            let mut text = "127.0.0.1 localhost\n::1 localhost ip6-localhost\n".to_owned();
            for (name, addresses) in &*names {
                addresses.iter().for_each(|ip| text.push_str(&format!("{ip} {name}\n")));
            }
            for name in names.keys() {
                write(&fleet.disk.dir.join(name).join("root"), "/etc/hosts", &text, 0o644)?;
            }
        }
        let boot = BootSettings {
            name: name.to_owned(),
            root,
            network: net.path(),
            console: dir.join("console.log"),
            pid_file: dir.join("nspawn.pid"),
            groups: machine::groups(&format!("{}/{name}", fleet.disk.name))?,
            program: fleet.root.command("systemd-nspawn"),
        };
        let (switch, to) = (fleet.clone(), net.clone());
        let machine = Machine::new(boot, move || switch.switch.reboot(&to));
        let host = Host { name: name.to_owned(), machine, fleet, net, dir };
        host.machine.power_on()?;
        Ok(host)
    }
}

impl FleetShared {
    fn overlay(&self, dir: &Path) -> Result<PathBuf> {
        let [upper, work, root] = ["upper", "work", "root"].map(|name| dir.join(name));
        for made in [&upper, &work, &root] {
            fs::create_dir(made).map_err(Failed::to(format!("could not create {}", made.display())))?;
        }
        let options = format!(
            "lowerdir={}:{},upperdir={},workdir={}",
            self.disk.dir.join("layer").display(),
            self.root.path().display(),
            upper.display(),
            work.display()
        );
        let mut mount = Command::new("mount");
        mount.args(["-t", "overlay", "-o", &options, "vmesh-host"]).arg(&root);
        cache::run(&mut mount, INSTALL)?;
        Ok(root)
    }
}

impl Host {
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn v4(&self) -> Ipv4Addr {
        self.net.v4
    }

    pub fn v6(&self) -> Ipv6Addr {
        self.net.v6
    }

    /// Builds a command that runs as root in all namespaces of the host, with a clean environment. Killing it
    /// does not kill the processes that it has started on the host.
    ///
    /// # Errors
    /// If the host is switched off.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let Some(leader) = self.machine.leader() else {
            return Err(self.with_console(&Failed::new(format!("host {} is not running", self.name))));
        };
        Ok(machine::enter(leader, program.as_ref()))
    }

    /// Runs a command, and returns its standard output.
    pub fn exec(&self, words: &[&str]) -> Result<String> {
        let output = self.output(words)?;
        let [out, err] =
            [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        if output.status.success() {
            return Ok(out);
        }
        let shown = words.join(" ");
        let status = output.status;
        Err(Failed::new(format!(
            "`{shown}` on {} failed ({status}): {}{}",
            self.name,
            tail(&out),
            tail(&err)
        )))
    }

    /// Runs a command, and returns its output whatever its exit status is.
    pub fn output(&self, words: &[&str]) -> Result<Output> {
        let (program, arguments) =
            words.split_first().ok_or_else(|| Failed::new("no command was given to run on a host"))?;
        let mut command = self.command(program)?;
        let output = command.args(arguments).stdin(std::process::Stdio::null()).output();
        output.map_err(Failed::to(format!("could not run `{}` on {}", words.join(" "), self.name)))
    }

    /// Runs a script of sh, which ends at its first failure.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.exec(&["sh", "-euc", script])
    }

    pub fn systemctl(&self, words: &[&str]) -> Result<String> {
        self.exec(&[&["systemctl", "--no-pager"], words].concat())
    }

    /// Returns a property of a unit, as `systemctl show` prints it.
    pub fn show(&self, unit: &str, property: &str) -> Result<String> {
        let value = self.systemctl(&["show", "--property", property, "--value", unit])?;
        Ok(value.trim_end().to_owned())
    }

    /// Returns the main process of a unit by its process id on the host, if it has one.
    pub fn main_pid(&self, unit: &str) -> Result<Option<u32>> {
        Ok(self.show(unit, "MainPID")?.parse().ok().filter(|pid| *pid != 0))
    }

    /// Waits for a main process that is accepted.
    pub fn wait_main_pid(
        &self,
        unit: &str,
        bound: Duration,
        wanted: impl Fn(Option<u32>) -> bool,
    ) -> Result<Option<u32>> {
        until(&format!("the main process of {unit} on {}", self.name), bound, || {
            let now = self.main_pid(unit)?;
            Ok(if wanted(now) { Ok(now) } else { Err(format!("{now:?}")) })
        })
    }

    /// Waits until a unit is in this state: `active`, `inactive`, `failed`.
    pub fn wait_unit(&self, unit: &str, state: &str, bound: Duration) -> Result<()> {
        let waited = until(&format!("{unit} on {} to be {state}", self.name), bound, || {
            let state_seen = self.show(unit, "ActiveState")?;
            if state_seen == state { Ok(Ok(())) } else { Ok(Err(state_seen)) }
        });
        waited.map_err(|failed| {
            let status = self.output(&["systemctl", "--no-pager", "status", "-n", "0", unit]);
            let status = status.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
            let journal = self.journal(unit).unwrap_or_default();
            let (status, journal) = (status.unwrap_or_default(), tail(&journal));
            Failed::new(format!("{failed}\n{status}\n{journal}"))
        })
    }

    /// Returns the journal of a unit since the first boot of the host.
    pub fn journal(&self, unit: &str) -> Result<String> {
        self.exec(&["journalctl", "--no-pager", "--output", "short-monotonic", "--unit", unit])
    }

    /// Returns the root directory of the host on this machine. The directory exists even while the host is
    /// switched off.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// Returns where a path of the host is on this machine. Links are not followed.
    pub fn path(&self, path: &str) -> PathBuf {
        below(&self.root(), Path::new(path))
    }

    pub fn read(&self, path: &str) -> Result<String> {
        let place = self.path(path);
        fs::read_to_string(&place).map_err(Failed::to(format!("could not read {path} of {}", self.name)))
    }

    pub fn write(&self, path: &str, text: impl AsRef<[u8]>) -> Result<()> {
        write(&self.root(), path, text, 0o644)
    }

    /// Copies a file of this machine to the host, with its mode.
    pub fn copy_in(&self, from: &Path, to: &str) -> Result<()> {
        copy(from, &self.path(to))
    }

    pub fn copy_out(&self, from: &str, to: &Path) -> Result<()> {
        copy(&self.path(from), to)
    }

    /// Installs package files in one run of apt: without a network, without questions, keeping changed
    /// configuration files. Returns apt's output.
    pub fn install(&self, debs: &[&Path]) -> Result<String> {
        let mut words = vec!["env".to_owned(), "DEBIAN_FRONTEND=noninteractive".to_owned()];
        words.extend(["apt-get", "install", "-y", "-q", "--allow-downgrades"].map(str::to_owned));
        words.extend(["-o", "Dpkg::Options::=--force-confold"].map(str::to_owned));
        for deb in debs {
            let name = deb.file_name().unwrap_or_default().to_string_lossy();
            let to = format!("/root/{name}");
            self.copy_in(deb, &to)?;
            words.push(to);
        }
        self.exec(&words.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Runs `apt-get remove` or `apt-get purge`.
    pub fn remove(&self, how: &str, packages: &[&str]) -> Result<String> {
        let words = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", how, "-y", "-q"];
        self.exec(&[&words, packages].concat())
    }

    /// Runs `systemctl reboot` on the host, and waits until it has booted again.
    pub fn reboot(&self) -> Result<()> {
        let boots = self.machine.boots();
        // The connection may be cut before the command returns.
        _ = self.output(&["systemctl", "reboot"])?;
        until(&format!("{} to go down and boot", self.name), BOOTS_WITHIN, || {
            Ok(if self.machine.boots() > boots { Ok(()) } else { Err("it is still the old boot") })
        })?;
        self.wait_booted()
    }

    /// Runs `systemctl poweroff` on the host, and waits until it is off.
    pub fn power_off(&self) -> Result<()> {
        _ = self.output(&["systemctl", "poweroff"])?;
        until(&format!("{} to power off", self.name), BOOTS_WITHIN, || {
            Ok(if self.machine.is_on() { Err("it is on") } else { Ok(()) })
        })?;
        self.machine.power_cut();
        Ok(())
    }

    /// Kills all processes of the host at once, and cuts its connections. Written data stays.
    pub fn power_cut(&self) {
        self.machine.power_cut();
    }

    /// Boots a host that is switched off.
    pub fn power_on(&self) -> Result<()> {
        self.fleet.switch.reboot(&self.net)?;
        self.machine.power_on()?;
        self.wait_booted()
    }

    /// Builds a command that runs a script over SSH, from the switch with a key. It uses the network, and
    /// fails with it.
    pub fn ssh(&self, script: &str) -> Command {
        let mut command = self.fleet.switch.command("setsid");
        let ssh = self.fleet.root.command("ssh");
        command.arg(ssh.get_program()).args(ssh.get_args());
        command.arg("-i").arg(self.fleet.disk.dir.join("key"));
        for option in [
            "BatchMode=yes",
            "ConnectTimeout=10",
            "LogLevel=ERROR",
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
        ] {
            command.args(["-o", option]);
        }
        command.args(["-F", "none"]).arg(format!("root@{}", self.v4())).arg(script);
        command
    }

    /// Mounts a disk of this size (`64k`, `8m`) over a directory, and copies the content. Units with a file
    /// system view of their own see it from their next start on.
    pub fn small_disk(&self, path: &str, size: &str) -> Result<()> {
        self.sh(&format!(
            "t=$(mktemp -d); mount -t tmpfs -o size={size} vmesh-small $t; cp -a {path}/. $t/\n\
             chown --reference={path} $t; chmod --reference={path} $t\n\
             mount --bind $t {path}; umount $t; rmdir $t"
        ))
        .map(drop)
    }

    /// Fills the disk under a directory to its last byte.
    pub fn fill_disk(&self, path: &str) -> Result<()> {
        self.sh(&format!("cat /dev/zero > {path}/.full 2>/dev/null || :")).map(drop)
    }

    /// Returns the failed units and the end of the journal, for the message of a failed test.
    pub fn dump(&self) -> String {
        let failed = self.exec(&["systemctl", "--no-pager", "--failed"]).unwrap_or_default();
        let journal = self.exec(&["journalctl", "--no-pager", "--boot", "--lines", "80"]).unwrap_or_default();
        format!("host {}:\n{failed}\n{journal}", self.name)
    }

    fn wait_booted(&self) -> Result<()> {
        let booted = until(&format!("{} to boot", self.name), BOOTS_WITHIN, || {
            if !self.machine.is_on() {
                return Err(Failed::new(format!("host {} ended while it booted", self.name)));
            }
            if self.machine.leader().is_none() {
                return Ok(Err("no init yet".to_owned()));
            }
            let output = self.output(&["systemctl", "is-system-running"])?;
            let printed = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            Ok(if printed == "running" || printed == "degraded" { Ok(()) } else { Err(printed) })
        });
        booted.map_err(|failed| self.with_console(&failed))
    }

    fn with_console(&self, failed: &Failed) -> Failed {
        let console = fs::read(self.dir.join("console.log")).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        Failed::new(format!("{failed}\nthe last lines of its console:\n{}", tail(&console)))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.dump());
        }
        self.machine.power_cut();
        lock(&self.fleet.names).remove(&self.name);
        unmount(&self.root());
        _ = fs::remove_dir_all(&self.dir);
    }
}

/// The directory of one fleet.
#[derive(Debug)]
struct Disk {
    name: String,
    dir: PathBuf,
    /// Locked while the fleet exists, and at most as long as its process.
    _lock: File,
}

impl Disk {
    fn new() -> Result<Disk> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = Path::new(RUN).join(&name);
        let failed = |what: &str| Failed::to::<std::io::Error>(format!("could not {what} {}", dir.display()));
        fs::create_dir_all(RUN).map_err(failed("create"))?;
        let lock_path = lock_path(&dir);
        let lock = File::create(&lock_path).map_err(failed("create the lock of"))?;
        lock.try_lock().map_err(Failed::to(format!("could not lock {}", lock_path.display())))?;
        // A leftover of an earlier process with the same id.
        if dir.exists() {
            remove_fleet(&dir);
        }
        fs::create_dir(&dir).map_err(failed("create"))?;
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "mode=700,size=75%", "vmesh-hosts"]).arg(&dir);
        cache::run(&mut mount, INSTALL)?;
        Ok(Disk { name, dir, _lock: lock })
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        remove_fleet(&self.dir);
        _ = fs::remove_file(lock_path(&self.dir));
    }
}

fn lock_path(dir: &Path) -> PathBuf {
    dir.with_extension("lock")
}

/// Removes the fleets of dead processes, whose locks are free.
fn remove_leftover_fleets() {
    for entry in fs::read_dir(RUN).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "lock")
            && let Ok(lock) = File::open(&path)
            && lock.try_lock().is_ok()
        {
            remove_fleet(&path.with_extension(""));
            _ = fs::remove_file(&path);
        }
    }
}

/// Removes all parts of a fleet except its namespaces, which [`netns`] removes.
fn remove_fleet(dir: &Path) {
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    for group in machine::groups(&name).unwrap_or_default() {
        machine::clear(&group);
    }
    for host in fs::read_dir(dir).into_iter().flatten().flatten() {
        let root = host.path().join("root");
        if root.is_dir() {
            unmount(&root);
        }
    }
    unmount(dir);
    _ = fs::remove_dir(dir);
}

/// A host that runs now, started by this process or another.
#[derive(Debug)]
pub struct RunningHost {
    /// The process that has started the host.
    pub owner: u32,
    pub host: String,
    leader: u32,
}

impl RunningHost {
    /// Lists all hosts that run on this machine.
    pub fn all() -> Vec<RunningHost> {
        let mut all = Vec::new();
        for fleet in fs::read_dir(RUN).into_iter().flatten().flatten() {
            let owner =
                fleet.file_name().to_string_lossy().split('-').next().and_then(|pid| pid.parse().ok());
            for host in fs::read_dir(fleet.path()).into_iter().flatten().flatten() {
                let leader = fs::read_to_string(host.path().join("nspawn.pid")).ok();
                let leader = leader.and_then(|pid| machine::leader_of(pid.trim().parse().ok()?));
                if let (Some(owner), Some(leader)) = (owner, leader) {
                    all.push(RunningHost {
                        owner,
                        host: host.file_name().to_string_lossy().into_owned(),
                        leader,
                    });
                }
            }
        }
        all.sort_by(|a, b| (a.owner, &a.host).cmp(&(b.owner, &b.host)));
        all
    }

    /// Does the same as [`Host::command`].
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        machine::enter(self.leader, program.as_ref())
    }
}

fn unmount(path: &Path) {
    _ = Command::new("umount").args(["--lazy", "--quiet"]).arg(path).output();
}

/// Appends `path` to `root`, without any `..` that could leave it.
fn below(root: &Path, path: &Path) -> PathBuf {
    let parts = path.components().filter(|part| matches!(part, Component::Normal(_)));
    root.join(parts.collect::<PathBuf>())
}

fn write(root: &Path, path: &str, text: impl AsRef<[u8]>, mode: u32) -> Result<()> {
    let place = below(root, Path::new(path));
    let write = || {
        if let Some(dir) = place.parent()
            && !dir.exists()
        {
            fs::create_dir_all(dir)?;
            if mode == 0o600 {
                fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
            }
        }
        fs::write(&place, text)?;
        fs::set_permissions(&place, fs::Permissions::from_mode(mode))
    };
    write().map_err(Failed::to(format!("could not write {}", place.display())))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let copy = || {
        if let Some(dir) = to.parent() {
            fs::create_dir_all(dir)?;
        }
        // A running program cannot be overwritten, but it can be replaced.
        _ = fs::remove_file(to);
        fs::copy(from, to)
    };
    copy().map(drop).map_err(Failed::to(format!("could not copy {} to {}", from.display(), to.display())))
}

/// Calls the probe until it returns a value. After `bound`, fails with the last error of the probe.
fn until<T, S: std::fmt::Display>(
    what: &str,
    bound: Duration,
    mut probe: impl FnMut() -> Result<Result<T, S>>,
) -> Result<T> {
    let deadline = Instant::now() + bound;
    loop {
        match probe()? {
            Ok(value) => return Ok(value),
            Err(state_seen) if Instant::now() >= deadline => {
                return Err(Failed::new(format!("waited {bound:?} for {what}; last seen: {state_seen}")));
            }
            Err(_) => sleep(Duration::from_millis(25)),
        }
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(40)..).unwrap_or_default().join("\n")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
