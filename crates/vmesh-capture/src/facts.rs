//! Reads the facts of a [`Host`]: account ids, control groups of units, SSH ports and sessions.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use crate::host::{AccountNumber, Cgroup, Host, HostMemory, NeverCaptured};
use crate::programs;
use crate::sockets::{self, Socket};
use crate::spec::{Account, INBOUND_PORT, OUTBOUND_PORT, Spec, Unit};
use crate::units::{self, CgroupPath, MAX_UNITS, UnitCgroups};

/// The time limit of one query. A directory server that does not answer must not delay the rules or the
/// heartbeat.
pub const ANSWERS_WITHIN: Duration = Duration::from_secs(1);
/// The time limit of all name queries together.
const ALL_ANSWER_WITHIN: Duration = Duration::from_secs(4);
/// The number of `getent` processes that run at a time.
const LOOK_UPS: usize = 16;
/// The number of files in `sshd_config.d` that are read, and the bytes read of each.
const MAX_FILES: usize = 64;
const MAX_FILE: u64 = 256 << 10;

/// The users, slices, ports and control planes of vmesh itself, which are never captured.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OwnTraffic {
    /// The users of Envoy, and of an agent with a separate user.
    pub users: BTreeSet<u32>,
    /// Slices of vmesh that are never empty: `vmesh.slice`.
    pub slices: BTreeSet<Unit>,
    /// The ports on which Envoy and the agent listen.
    pub ports: BTreeSet<u16>,
    pub control_planes: BTreeSet<SocketAddr>,
}

/// The directories and programs that the facts of a host are read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPaths {
    /// The directory of processes, normally `/proc`.
    pub proc: PathBuf,
    /// The directory that contains `net/tcp`, normally `/proc/self`.
    pub net: PathBuf,
    /// The mount point of control groups of version 2; `None` if these are not mounted.
    pub cgroup: Option<PathBuf>,
    pub getent: PathBuf,
    /// The directory of `sshd_config`.
    pub ssh: PathBuf,
    /// The `systemctl` to run. It reports control groups and the ports that systemd holds for SSH.
    pub systemctl: PathBuf,
}

impl Default for HostPaths {
    fn default() -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        HostPaths {
            proc: "/proc".into(),
            net: "/proc/self".into(),
            cgroup: cgroup_mount(&mounts),
            getent: "getent".into(),
            ssh: "/etc/ssh".into(),
            systemctl: "systemctl".into(),
        }
    }
}

/// Returns the mount point of control groups of version 2 that a `mounts` file lists.
fn cgroup_mount(mounts: &str) -> Option<PathBuf> {
    let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mount = mounts.find(|mount| mount.get(2) == Some(&"cgroup2"))?;
    mount.get(1).map(PathBuf::from)
}

impl HostPaths {
    /// Reads the facts that `spec` needs. A name or unit that does not exist is left out, and becomes a note
    /// of the program. A query without an answer takes its result from `memory`. All queries run at the same
    /// time and none takes longer than [`ANSWERS_WITHIN`], because the caller has to keep up its heartbeat.
    pub async fn read_host(&self, spec: &Spec, own: &OwnTraffic, memory: &HostMemory) -> Host {
        let out = &spec.outbound;
        let users = out.include.users.iter().chain(&out.exclude.users).chain(out.dial.users.keys());
        let groups = out.include.groups.iter().chain(&out.exclude.groups).chain(out.dial.groups.keys());
        let units = out.include.units.iter().chain(&out.exclude.units).chain(out.dial.units.keys());
        let wanted: BTreeSet<&Unit> = units.chain(&own.slices).collect();
        let (users, groups, ssh, (mut units, parents)) = tokio::join!(
            self.look_up("passwd", users, &memory.users),
            self.look_up("group", groups, &memory.groups),
            self.ssh_ports(&memory.ssh),
            self.unit_cgroups(&wanted, &memory.units),
        );
        let left_out = out.exclude.units.iter().chain(out.dial.units.keys());
        let parents: Vec<_> = left_out.filter_map(|unit| parents.get(unit)).collect();
        let mut parent_cgroups = match &self.cgroup {
            Some(root) => units::parent_cgroups(root, parents),
            None => Vec::new(),
        };
        if !parent_cgroups.is_empty() {
            // A unit may have started after its control group was listed, and before this second query. The
            // new unit must stay uncaptured. So its control group is dropped from the known ones, unless the
            // second query reports it too.
            (units, _) = self.unit_cgroups(&wanted, &memory.units).await;
            let is_left_out = |unit: &str| {
                out.exclude.units.iter().chain(out.dial.units.keys()).any(|left| left.as_str() == unit)
            };
            for parent in &mut parent_cgroups {
                parent.children.retain(|child| {
                    !is_left_out(child.path.name()) || units.values().any(|unit| unit == child)
                });
            }
        }
        let mut slices = BTreeSet::new();
        for slice in &own.slices {
            slices.extend(units.get(slice).cloned());
        }
        units.retain(|unit, _| !own.slices.contains(unit) || is_named_in_spec(spec, unit));
        Host {
            users,
            groups,
            units,
            parent_cgroups,
            ipv6: self.net.join("net/if_inet6").exists(),
            never: NeverCaptured {
                users: own.users.clone(),
                slices,
                ssh,
                own: own.ports.clone(),
                control_planes: own.control_planes.clone(),
            },
        }
    }

    /// Looks up the ids of names with the host's name service switch, which includes LDAP and sssd.
    async fn look_up(
        &self,
        database: &'static str,
        named: impl Iterator<Item = &Account>,
        before: &BTreeMap<String, AccountNumber>,
    ) -> BTreeMap<String, AccountNumber> {
        let names: BTreeSet<&str> =
            named.filter(|account| account.number().is_none()).map(Account::as_str).collect();
        let mut names = names.into_iter();
        let mut asked = JoinSet::new();
        let mut found = BTreeMap::new();
        let deadline = Instant::now() + ALL_ANSWER_WITHIN;
        loop {
            while asked.len() < LOOK_UPS
                && let Some(name) = names.next()
            {
                let (name, getent) = (name.to_owned(), self.getent.clone());
                asked.spawn(async move {
                    let answer = timeout_at(deadline, query(&getent, &[database, &name])).await;
                    (name, answer.unwrap_or_default())
                });
            }
            let Some(answered) = asked.join_next().await else { break };
            let Ok((name, answer)) = answered else { continue };
            let last = match before.get(&name) {
                Some(AccountNumber::Now(number) | AccountNumber::Last(number)) => {
                    Some(AccountNumber::Last(*number))
                }
                Some(AccountNumber::Unanswered) | None => None,
            };
            let number = match answer {
                Some(QueryOutput { found: true, text }) => id_of(&text).map(AccountNumber::Now),
                Some(QueryOutput { found: false, .. }) => last,
                None => last.or(Some(AccountNumber::Unanswered)),
            };
            found.extend(number.map(|number| (name, number)));
        }
        found
    }

    /// Returns the control groups of the units that run, and for each unit the control group in which it is
    /// started, as systemd reports them. If systemd does not answer, returns the control groups of `before`
    /// that still exist.
    async fn unit_cgroups(
        &self,
        wanted: &BTreeSet<&Unit>,
        before: &BTreeMap<Unit, CgroupPath>,
    ) -> (BTreeMap<Unit, Cgroup>, BTreeMap<Unit, Option<CgroupPath>>) {
        let (Some(root), false) = (&self.cgroup, wanted.is_empty()) else { return Default::default() };
        // `Spec::limits` allows no more units than these; the slices of vmesh are few.
        let wanted: BTreeSet<&Unit> = wanted.iter().copied().take(2 * MAX_UNITS).collect();
        let UnitCgroups { running, parents } =
            match query(&self.systemctl, &units::show_arguments(&wanted)).await {
                Some(QueryOutput { found: true, text }) => units::parse_show(&text, &wanted),
                Some(QueryOutput { found: false, .. }) | None => {
                    let known = before.iter().filter(|(unit, _)| wanted.contains(unit));
                    let running: BTreeMap<_, _> =
                        known.map(|(unit, path)| (unit.clone(), path.clone())).collect();
                    let parents = running.iter().map(|(unit, path)| (unit.clone(), path.parent())).collect();
                    UnitCgroups { running, parents }
                }
            };
        let there = |(unit, path): (Unit, CgroupPath)| Some((unit, units::cgroup(root, &path)?));
        (running.into_iter().filter_map(there).collect(), parents)
    }

    /// Returns the SSH ports of this host: those on which an SSH daemon listens or has sessions, those in its
    /// configuration, and those that systemd holds for it. The kernel shows the sockets of other processes
    /// only to root and with CAP_SYS_PTRACE.
    async fn ssh_ports(&self, before: &BTreeSet<u16>) -> BTreeSet<u16> {
        let inodes = self.ssh_inodes();
        let sockets = self.sockets();
        // A socket that another user created does not belong to a daemon, even if a daemon has it open.
        let sockets = sockets.iter().filter(|socket| socket.user == 0 && inodes.contains(&socket.inode));
        // With socket activation only systemd listens before the first SSH connection.
        let arguments = ["show", "--property=Listen", "ssh.socket", "sshd.socket", "dropbear.socket"];
        let held = match query(&self.systemctl, &arguments).await {
            Some(QueryOutput { found: true, text }) => listening_ports(&text),
            Some(QueryOutput { found: false, .. }) | None => before.clone(),
        };
        sockets.map(|socket| socket.local.port()).chain(self.configured_ssh_ports()).chain(held).collect()
    }

    fn configured_ssh_ports(&self) -> BTreeSet<u16> {
        let more = fs::read_dir(self.ssh.join("sshd_config.d")).into_iter().flatten().flatten();
        let more = more.map(|entry| entry.path()).take(MAX_FILES);
        let files = more.chain([self.ssh.join("sshd_config")]);
        files.flat_map(|file| sshd_ports(&read_of_root(&file).unwrap_or_default())).collect()
    }

    /// Returns the id of a user, given by name or number.
    pub async fn user_id(&self, user: &Account) -> Option<u32> {
        if let Some(number) = user.number() {
            return Some(number);
        }
        // A boot is slow, and this function is called once per process, so the query is repeated.
        for _ in 0..10 {
            let found = self.look_up("passwd", [user].into_iter(), &BTreeMap::new()).await;
            match found.into_values().next() {
                Some(AccountNumber::Now(number)) => return Some(number),
                Some(AccountNumber::Unanswered) => {}
                Some(AccountNumber::Last(_)) | None => return None,
            }
        }
        None
    }

    /// Lists the SSH sessions of this host: the established connections to the given SSH ports.
    pub fn ssh_sessions(&self, ports: &BTreeSet<u16>) -> Vec<Session> {
        let sessions = self.sockets().into_iter().filter(|socket| {
            socket.is_established() && socket.inode != 0 && ports.contains(&socket.local.port())
        });
        sessions.map(|socket| Session { inode: socket.inode, stuck: socket.is_stuck() }).collect()
    }

    /// Counts the open connections that came through a redirect: see [`crate::confirm::draining_program`].
    pub fn count_redirected(&self) -> usize {
        let ours = |socket: &&Socket| {
            socket.is_open() && [OUTBOUND_PORT, INBOUND_PORT].contains(&socket.local.port())
        };
        self.sockets().iter().filter(ours).count()
    }

    fn sockets(&self) -> Vec<Socket> {
        let read = |name| fs::read_to_string(self.net.join(name)).unwrap_or_default();
        ["net/tcp", "net/tcp6"]
            .into_iter()
            .flat_map(|name| sockets::parse(&read(name)).collect::<Vec<_>>())
            .collect()
    }

    /// Returns the sockets of SSH daemons. A process counts as one if it runs as root and both its name and
    /// its executable say so, because any process can choose a name (`prctl`, `/proc/self/comm`) but only
    /// root can install a trusted executable. A listener that systemd holds for a daemon is not included; the
    /// daemon's sessions are.
    fn ssh_inodes(&self) -> BTreeSet<u64> {
        const NAMES: [&str; 4] = ["sshd", "sshd-session", "sshd-auth", "dropbear"];
        let mut inodes = BTreeSet::new();
        for process in fs::read_dir(&self.proc).into_iter().flatten().flatten() {
            let path = process.path();
            let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
            if !NAMES.contains(&name.trim()) || !is_roots_program(&path) {
                continue;
            }
            for file in fs::read_dir(path.join("fd")).into_iter().flatten().flatten() {
                let target = fs::read_link(file.path()).unwrap_or_default();
                inodes.extend(target.to_str().and_then(sockets::inode));
            }
        }
        inodes
    }
}

/// Reports whether the process in this directory of `/proc` runs as root, from an executable that only root
/// can replace.
fn is_roots_program(process: &Path) -> bool {
    let status = fs::read_to_string(process.join("status")).unwrap_or_default();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
    // The real, effective, saved and file system uid: a set-uid program of another user has some of them.
    let is_roots = uids.split_whitespace().count() == 4 && uids.split_whitespace().all(|uid| uid == "0");
    let program = fs::read_link(process.join("exe")).unwrap_or_default();
    // An upgrade replaces the executable of a running daemon.
    let program = program.to_str().map(|path| path.strip_suffix(" (deleted)").unwrap_or(path));
    is_roots && program.is_some_and(|path| programs::is_trusted(Path::new(path)))
}

/// Reads a file that belongs to root, up to `MAX_FILE` bytes.
fn read_of_root(path: &Path) -> Option<String> {
    let file = fs::File::open(path).ok()?;
    let metadata = file.metadata().ok()?;
    if !metadata.is_file() || metadata.uid() != 0 {
        return None;
    }
    let mut text = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

/// The limit of the output of `getent` and `systemctl`, in bytes.
const MAX_ANSWER: u64 = 1 << 20;

/// The answer of a program that was run as a query.
struct QueryOutput {
    /// The program exited with 0.
    found: bool,
    text: String,
}

/// Runs a query. `None` if the program cannot be run, or does not end within [`ANSWERS_WITHIN`].
async fn query(program: &Path, arguments: &[&str]) -> Option<QueryOutput> {
    let mut command = programs::command(program).ok()?;
    command.args(arguments);
    let output =
        timeout(ANSWERS_WITHIN, programs::run(command, None, MAX_ANSWER, |_| ())).await.ok()?.ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Some(QueryOutput { found: output.status.success(), text })
}

fn is_named_in_spec(spec: &Spec, unit: &Unit) -> bool {
    let out = &spec.outbound;
    out.include.units.contains(unit) || out.exclude.units.contains(unit) || out.dial.units.contains_key(unit)
}

/// Returns the ports in an `sshd_config` (see sshd_config(5)). Excluding a port that is no longer in force
/// does no harm.
fn sshd_ports(text: &str) -> BTreeSet<u16> {
    let port = |line: &str| {
        let line = line.trim().replacen('=', " ", 1);
        let mut words = line.split_whitespace();
        let keyword = words.next()?.to_ascii_lowercase();
        let value = words.next()?;
        match keyword.as_str() {
            "port" => value.parse().ok(),
            // An IPv6 address without a port also contains colons.
            "listenaddress" if value.starts_with('[') || value.matches(':').count() == 1 => {
                value.rsplit_once(':')?.1.parse().ok()
            }
            _ => None,
        }
    };
    text.lines().filter_map(port).collect()
}

/// Returns the ports in lines like `Listen=[::]:22 (Stream)`, as `systemctl show` prints them.
fn listening_ports(text: &str) -> BTreeSet<u16> {
    let port = |line: &str| {
        line.strip_prefix("Listen=")?.strip_suffix(" (Stream)")?.rsplit_once(':')?.1.parse().ok()
    };
    text.lines().filter_map(port).collect()
}

/// Returns the id in a line like `name:x:1000:...`.
fn id_of(line: &str) -> Option<u32> {
    line.trim().split(':').nth(2)?.parse().ok()
}

/// An SSH session on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Session {
    /// The inode of the socket, which identifies the session.
    pub inode: u64,
    /// Sent data is unacknowledged and was retransmitted.
    pub stuck: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ports_of_sshd_are_read_from_its_configuration() {
        let text = "# Port 1\nPort 2222\n port=2223\nListenAddress 10.0.0.1\nListenAddress 10.0.0.1:2224\n\
            ListenAddress [fd00::1]:2225\nListenAddress fd00::2226\nPort many\nPermitRootLogin no\nPort\n";
        assert_eq!(sshd_ports(text), [2222, 2223, 2224, 2225].into());
    }

    #[test]
    fn the_ports_that_systemd_holds_for_ssh_are_read() {
        let text = "Listen=[::]:2222 (Stream)\nListen=0.0.0.0:2223 (Stream)\n\nListen=/run/x (Stream)\nListen=53 (Datagram)\n";
        assert_eq!(listening_ports(text), [2222, 2223].into());
        assert_eq!(listening_ports(""), [].into());
    }

    #[test]
    fn small_things_are_read_or_left_out() {
        assert_eq!(id_of("app:x:1001:1001::/:/bin/sh\n"), Some(1001));
        assert_eq!(id_of(""), None);
        let mounts = "sysfs /sys sysfs rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n";
        assert_eq!(cgroup_mount(mounts), Some("/sys/fs/cgroup".into()));
        assert_eq!(cgroup_mount("tmpfs /sys/fs/cgroup tmpfs rw 0 0\n"), None);
    }
}
