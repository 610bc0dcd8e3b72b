//! Network namespaces as VMs: hosts with IPv4 and IPv6 addresses on a switch, for tests with real packets.
//!
//! Nothing is created in the namespace of the test, so any number of tests run at once. Names contain the
//! process id; leftovers of a crashed test are removed by the next one.
//!
//! A socket belongs to the namespace in which it was created, wherever it is used. [`Host::within`] creates
//! sockets on a thread that enters the namespace.

mod tools;

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::{Gid, Pid, Signal, Uid, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space, set_thread_gid, set_thread_uid};
use tokio::runtime::{Builder, Handle, Runtime};

use crate::{Failed, Result, TempDir, tempdir};

pub use tools::{Iptables, Tools};

/// The directory in which iproute2 keeps the names of namespaces.
const NAMES: &str = "/run/netns";
const INSTALL: &str =
    "namespaces need root (CAP_NET_ADMIN and CAP_SYS_ADMIN) and iproute2: `apt-get install iproute2`";

/// A switch with the networks 10.88.0.0/16 and fd88::/64.
#[derive(Debug)]
pub struct Switch {
    space: Namespace,
    next: AtomicU32,
}

/// A host on a [`Switch`]. Its default route leads to the switch, which forwards nothing.
#[derive(Debug)]
pub struct Host {
    space: Namespace,
    dir: TempDir,
    runtime: Mutex<Option<Runtime>>,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

/// A namespace. Dropping it kills its processes and removes it.
#[derive(Debug)]
struct Namespace {
    name: String,
}

impl Switch {
    /// Creates a switch.
    ///
    /// # Errors
    /// If the machine supports no namespaces; the message says what is missing.
    pub fn new() -> Result<Switch> {
        static REAP: Once = Once::new();
        REAP.call_once(remove_leftover_namespaces);
        let space = Namespace::new()?;
        space.ip(&["link", "add", "br0", "type", "bridge"])?;
        // Ports forward at once, without spanning tree or multicast snooping.
        for file in ["forward_delay", "multicast_snooping"] {
            _ = space.run("sh", &["-c", &format!("echo 0 > /sys/class/net/br0/bridge/{file}")]);
        }
        space.ip(&["addr", "add", "10.88.255.254/16", "dev", "br0"])?;
        space.ip(&["-6", "addr", "add", "fd88::ffff/64", "dev", "br0", "nodad"])?;
        space.ip(&["link", "set", "br0", "up"])?;
        Ok(Switch { space, next: AtomicU32::new(1) })
    }

    /// Adds a host, which looks to the switch like a freshly booted machine.
    pub fn host(&self) -> Result<Host> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let [_, _, high, low] = number.to_be_bytes();
        let (v4, v6) = (
            Ipv4Addr::new(10, 88, high, low),
            Ipv6Addr::new(0xfd88, 0, 0, 0, 0, 0, 0, u16::from_be_bytes([high, low])),
        );
        let host = Host { space: Namespace::new()?, dir: tempdir()?, runtime: Mutex::default(), v4, v6 };
        self.wire(&host)?;
        Ok(host)
    }

    fn wire(&self, host: &Host) -> Result<()> {
        let (v4, v6) = (host.v4, host.v6);
        let (name, port) = (host.space.name.as_str(), host.port());
        let veth = ["link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", name];
        self.space.ip(&veth)?;
        self.space.ip(&["link", "set", &port, "master", "br0", "up"])?;
        host.space.ip(&["addr", "add", &format!("{v4}/16"), "dev", "eth0"])?;
        // The address is used at once, without duplicate address detection.
        host.space.ip(&["-6", "addr", "add", &format!("{v6}/64"), "dev", "eth0", "nodad"])?;
        host.space.ip(&["link", "set", "eth0", "up"])?;
        host.space.ip(&["route", "add", "default", "via", "10.88.255.254"])?;
        host.space.ip(&["-6", "route", "add", "default", "via", "fd88::ffff"])
    }

    /// Builds a command that runs on the switch, from which every host can be reached.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.space.command(program.as_ref())
    }

    /// Recreates the host's namespace with nothing but its addresses, as a reboot would. All processes of the
    /// host are killed.
    pub fn reboot(&self, host: &Host) -> Result<()> {
        host.end_runtime();
        host.space.kill_all();
        // Deleting the link cuts off the old namespace, even if an open socket keeps it alive.
        self.space.ip(&["link", "del", &host.port()])?;
        output(Command::new("ip").args(["netns", "del", &host.space.name]))?;
        output(Command::new("ip").args(["netns", "add", &host.space.name]))?;
        host.space.ip(&["link", "set", "lo", "up"])?;
        self.wire(host)
    }

    /// Disconnects the host like a pulled cable, or connects it again.
    pub fn set_link(&self, host: &Host, up: bool) -> Result<()> {
        self.space.ip(&["link", "set", &host.port(), if up { "up" } else { "down" }])
    }
}

impl Host {
    /// Returns the name of the namespace for `ip netns`.
    pub fn name(&self) -> &str {
        &self.space.name
    }

    /// Returns the IPv4 and the IPv6 address.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// Returns the name of its port on the switch.
    fn port(&self) -> String {
        let [.., high, low] = self.v4.octets();
        format!("p{}", u16::from_be_bytes([high, low]))
    }

    /// Returns the file that represents its namespace.
    pub fn path(&self) -> PathBuf {
        self.space.path()
    }

    /// Builds a command that runs on this host. [`crate::process::Daemon::spawn`] can run it, since `nsenter`
    /// replaces itself with the program.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        self.space.command(program.as_ref())
    }

    /// Does the same as [`Host::command`], as a user and group with this id, which need no name.
    pub fn command_as(&self, id: u32, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = self.space.command("setpriv".as_ref());
        command
            .args(["--reuid", &id.to_string(), "--regid", &id.to_string(), "--clear-groups", "--"])
            .arg(program);
        command
    }

    /// Runs a command and returns its output.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        self.space.run(program, arguments)
    }

    /// Runs `ip` with these arguments.
    pub fn ip(&self, arguments: &[&str]) -> Result<()> {
        self.space.ip(arguments)
    }

    /// Runs `work` on a thread in this host's namespace, and returns its result. Child processes inherit the
    /// namespace.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.space.within(None, work)
    }

    /// Does the same as [`Host::within`], as another user and group.
    pub fn within_as<T: Send>(&self, id: u32, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.space.within(Some(id), work)
    }

    /// Returns a function that moves its calling thread to this host permanently, as the given user and
    /// group. The function fails after the host is removed.
    pub fn entrance(&self) -> impl Fn(u32) -> Result<()> + Send + 'static {
        let path = self.space.path();
        move |id| enter(&path, Some(id))
    }

    /// Returns a runtime whose threads run on this host, so that all sockets of its tasks belong to the host.
    /// It ends when the host reboots.
    pub fn runtime(&self) -> Result<Handle> {
        let mut kept = self.runtime.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(runtime) = &*kept {
            return Ok(runtime.handle().clone());
        }
        // The threads of the runtime inherit the namespace of the thread that creates it.
        let made = self.within(|| {
            let mut builder = Builder::new_multi_thread();
            builder.worker_threads(2).thread_name("testkit-host").enable_all().build()
        });
        let runtime = made?.map_err(Failed::to("could not start a runtime on a host"))?;
        Ok(kept.insert(runtime).handle().clone())
    }

    fn end_runtime(&self) {
        let runtime = self.runtime.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(runtime) = runtime {
            // Dropping the runtime would block, which is not allowed in a task.
            runtime.shutdown_background();
        }
    }

    /// Returns the tools for rules, as scripts that act on this host wherever they are started.
    pub fn tools(&self, iptables: Iptables) -> Result<Tools> {
        Tools::new(&self.space.path(), &self.dir, iptables)
    }

    /// Kills all processes of this host, as a power cut does.
    pub fn kill_all(&self) {
        self.space.kill_all();
    }
}

/// Moves the calling thread to the namespace at `path`, permanently.
fn enter(path: &Path, id: Option<u32>) -> Result<()> {
    let space = File::open(path).map_err(Failed::to(format!("could not open {}", path.display())))?;
    let go = || -> rustix::io::Result<()> {
        move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network))?;
        if let Some(id) = id {
            set_thread_gid(Gid::from_raw(id))?;
            set_thread_uid(Uid::from_raw(id))?;
        }
        Ok(())
    };
    go().map_err(Failed::to(format!("could not enter {}; {INSTALL}", path.display())))
}

impl Drop for Host {
    fn drop(&mut self) {
        self.end_runtime();
    }
}

impl Namespace {
    fn new() -> Result<Namespace> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("vmesh-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        // A leftover of an earlier process with the same id.
        if Path::new(NAMES).join(&name).exists() {
            drop(Namespace { name: name.clone() });
        }
        output(Command::new("ip").args(["netns", "add", &name]))?;
        let space = Namespace { name };
        space.ip(&["link", "set", "lo", "up"])?;
        Ok(space)
    }

    fn path(&self) -> PathBuf {
        Path::new(NAMES).join(&self.name)
    }

    /// Uses nsenter, because `ip netns exec` would hide the control groups.
    fn command(&self, program: &std::ffi::OsStr) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let output = output(self.command(program.as_ref()).args(arguments))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn ip(&self, arguments: &[&str]) -> Result<()> {
        output(Command::new("ip").args(["-n", &self.name]).args(arguments)).map(drop)
    }

    fn within<T: Send>(&self, id: Option<u32>, work: impl FnOnce() -> T + Send) -> Result<T> {
        let path = self.path();
        let there = thread::scope(|scope| {
            let thread = scope.spawn(move || {
                enter(&path, id)?;
                Ok(work())
            });
            thread.join()
        });
        there.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn kill_all(&self) {
        for _ in 0..50 {
            let pids = Command::new("ip").args(["netns", "pids", &self.name]).output();
            let pids =
                pids.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
            let me = rustix::process::getpid();
            let pids = pids.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?));
            let pids: Vec<Pid> = pids.filter(|pid| *pid != me).collect();
            if pids.is_empty() {
                return;
            }
            for pid in pids {
                _ = kill_process(pid, Signal::KILL);
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.kill_all();
        _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}

/// Removes the namespaces of test processes that have ended.
fn remove_leftover_namespaces() {
    for entry in fs::read_dir(NAMES).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some(pid) = owner(&name)
            && !Path::new("/proc").join(pid.to_string()).exists()
        {
            drop(Namespace { name });
        }
    }
}

/// Returns the process that created a namespace, by the name of the namespace.
fn owner(name: &str) -> Option<u32> {
    let (pid, number) = name.strip_prefix("vmesh-")?.split_once('-')?;
    number.parse::<u32>().ok()?;
    pid.parse().ok()
}

fn output(command: &mut Command) -> Result<Output> {
    let shown = crate::cache::show(command);
    let output = command.output().map_err(Failed::to(format!("could not run `{shown}`; {INSTALL}")))?;
    if output.status.success() {
        return Ok(output);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(Failed::new(format!("`{shown}` failed ({}): {}; {INSTALL}", output.status, errors.trim())))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn two_hosts_reach_each_other_by_both_families_and_the_test_is_not_among_them() {
        let switch = Switch::new().unwrap();
        let (a, b) = (switch.host().unwrap(), switch.host().unwrap());
        for ip in b.addresses() {
            let server = b.within(|| TcpListener::bind((ip, 8080))).unwrap().unwrap();
            let mut client = a.within(|| TcpStream::connect((ip, 8080))).unwrap().unwrap();
            let (mut served, from) = server.accept().unwrap();
            assert!(a.addresses().contains(&from.ip()), "{from}");
            // This thread stays in the test's namespace; only its sockets belong to the hosts.
            client.write_all(b"x").unwrap();
            served.read_exact(&mut [0]).unwrap();
        }
        switch.set_link(&b, false).unwrap();
        let cut = TcpStream::connect_timeout;
        let to = (b.v4, 8080).into();
        assert!(a.within(|| cut(&to, Duration::from_millis(300))).unwrap().is_err());
        let path = a.space.path();
        drop(a);
        assert!(!path.exists());
    }

    #[test]
    fn who_is_sent_to_a_host_as_another_user_is_that_user_and_nobody_else_becomes_it() {
        let switch = Switch::new().unwrap();
        let host = switch.host().unwrap();
        let id = host.within_as(4242, || rustix::process::geteuid().as_raw()).unwrap();
        assert_eq!((id, rustix::process::geteuid().as_raw()), (4242, 0));
        let output = output(host.command_as(4243, "id").arg("-u")).unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "4243");
    }

    #[test]
    fn what_a_dead_process_left_is_known_by_its_name() {
        assert_eq!(owner("vmesh-123-4"), Some(123));
        assert_eq!(owner("vmesh-prod"), None);
        assert_eq!(owner("th-sw"), None);
        // No process has this id, since the kernel's largest is 4194304.
        let name = "vmesh-4194999-0".to_owned();
        output(Command::new("ip").args(["netns", "add", &name])).unwrap();
        remove_leftover_namespaces();
        assert!(!Path::new(NAMES).join(name).exists());
    }

    #[test]
    fn the_tools_act_on_their_host_and_not_on_another() {
        let switch = Switch::new().unwrap();
        let (a, b) = (switch.host().unwrap(), switch.host().unwrap());
        let (on_a, on_b) = (a.tools(Iptables::Nft).unwrap(), b.tools(Iptables::Nft).unwrap());
        output(Command::new(&on_a.nft).args(["add", "table", "inet", "x"])).unwrap();
        let listed = |nft: &Path| {
            let output = output(Command::new(nft).args(["list", "ruleset"])).unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        assert!(listed(&on_a.nft).contains("table inet x"));
        assert_eq!(listed(&on_b.nft), "");
        for kind in [Iptables::Nft, Iptables::Legacy] {
            let tools = b.tools(kind).unwrap();
            for tool in [&tools.iptables_save, &tools.ip6tables_save] {
                output(&mut Command::new(tool)).unwrap();
            }
        }
    }
}
