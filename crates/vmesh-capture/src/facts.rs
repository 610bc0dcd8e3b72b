//! The other edge: what [`Host`] has to say, read from the host.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use crate::host::{Cgroup, Host, Memory, Never, Number};
use crate::programs;
use crate::sockets::{self, Socket};
use crate::spec::{Account, INBOUND_PORT, OUTBOUND_PORT, Spec, Unit};
use crate::units::{self, CgroupPath, MAX_UNITS, UnitPlaces};

/// A directory server that does not answer must not keep rules from being applied, nor the dead-man from being held off.
pub const ANSWERS_WITHIN: Duration = Duration::from_secs(1);
/// The same for all names together.
const ALL_ANSWER_WITHIN: Duration = Duration::from_secs(4);
/// Programs that look up names at a time: the host has more to do.
const LOOK_UPS: usize = 16;
/// Files of `sshd_config.d` that are read, and bytes of each.
const MAX_FILES: usize = 64;
const MAX_FILE: u64 = 256 << 10;

/// What is known of vmesh itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Own {
    /// Envoy's user, and the agent's where it has one.
    pub users: BTreeSet<u32>,
    /// Slices of ours that always have something in them: `vmesh.slice`.
    pub slices: BTreeSet<Unit>,
    /// Where Envoy and the agent listen.
    pub ports: BTreeSet<u16>,
    pub control_planes: BTreeSet<SocketAddr>,
}

/// Where things are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// `/proc`.
    pub proc: PathBuf,
    /// Below which `net/tcp` is: `/proc/self`.
    pub net: PathBuf,
    /// Control groups of version 2; `None` where there are none.
    pub cgroup: Option<PathBuf>,
    pub getent: PathBuf,
    /// The directory of `sshd_config`.
    pub ssh: PathBuf,
    /// Asked for the ports that systemd holds for SSH.
    pub systemctl: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        Places {
            proc: "/proc".into(),
            net: "/proc/self".into(),
            cgroup: cgroup_mount(&mounts),
            getent: "getent".into(),
            ssh: "/etc/ssh".into(),
            systemctl: "systemctl".into(),
        }
    }
}

/// Where a `mounts` file says that control groups of version 2 are.
fn cgroup_mount(mounts: &str) -> Option<PathBuf> {
    let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mount = mounts.find(|mount| mount.get(2) == Some(&"cgroup2"))?;
    mount.get(1).map(PathBuf::from)
}

impl Places {
    /// The host as far as `spec` needs it. What cannot be found is missing, and becomes a note of the program. What gives no answer
    /// is as it is in `memory`; nothing is waited for longer than [`ANSWERS_WITHIN`], and everything at once: whoever calls this has a
    /// dead-man to hold off.
    pub async fn host(&self, spec: &Spec, own: &Own, memory: &Memory) -> Host {
        let out = &spec.outbound;
        let users = out.include.users.iter().chain(&out.exclude.users).chain(out.dial.users.keys());
        let groups = out.include.groups.iter().chain(&out.exclude.groups).chain(out.dial.groups.keys());
        let units = out.include.units.iter().chain(&out.exclude.units).chain(out.dial.units.keys());
        let wanted: BTreeSet<&Unit> = units.chain(&own.slices).collect();
        let (users, groups, ssh, (mut units, parents)) = tokio::join!(
            self.look_up("passwd", users, &memory.users),
            self.look_up("group", groups, &memory.groups),
            self.ssh_ports(&memory.ssh),
            self.units(&wanted, &memory.units),
        );
        let left_out = out.exclude.units.iter().chain(out.dial.units.keys());
        let parents: Vec<_> = left_out.filter_map(|unit| parents.get(unit)).collect();
        let mut nurseries = match &self.cgroup {
            Some(root) => units::nurseries(root, parents),
            None => Vec::new(),
        };
        if !nurseries.is_empty() {
            // A unit that starts meanwhile must not be taken for one that is not left out: what was listed is older than this answer.
            (units, _) = self.units(&wanted, &memory.units).await;
            let is_left_out = |unit: &str| {
                out.exclude.units.iter().chain(out.dial.units.keys()).any(|left| left.as_str() == unit)
            };
            for nursery in &mut nurseries {
                nursery.children.retain(|child| {
                    !is_left_out(child.path.name()) || units.values().any(|unit| unit == child)
                });
            }
        }
        let mut slices = BTreeSet::new();
        for slice in &own.slices {
            slices.extend(units.get(slice).cloned());
        }
        units.retain(|unit, _| !own.slices.contains(unit) || spec_names(spec, unit));
        Host {
            users,
            groups,
            units,
            nurseries,
            ipv6: self.net.join("net/if_inet6").exists(),
            never: Never {
                users: own.users.clone(),
                slices,
                ssh,
                own: own.ports.clone(),
                control_planes: own.control_planes.clone(),
            },
        }
    }

    /// Names to numbers, by all that the host's name service switch knows: files, LDAP, sssd.
    async fn look_up(
        &self,
        database: &'static str,
        named: impl Iterator<Item = &Account>,
        before: &BTreeMap<String, Number>,
    ) -> BTreeMap<String, Number> {
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
                    let answer = timeout_at(deadline, said(&getent, &[database, &name])).await;
                    (name, answer.unwrap_or_default())
                });
            }
            let Some(answered) = asked.join_next().await else { break };
            let Ok((name, said)) = answered else { continue };
            let last = match before.get(&name) {
                Some(Number::Now(number) | Number::Last(number)) => Some(Number::Last(*number)),
                Some(Number::Unanswered) | None => None,
            };
            let number = match said {
                Some(Said { found: true, text }) => id_of(&text).map(Number::Now),
                Some(Said { found: false, .. }) => last,
                None => last.or(Some(Number::Unanswered)),
            };
            found.extend(number.map(|number| (name, number)));
        }
        found
    }

    /// The control groups that these units have now, and those in which they get one, as systemd says. Where it gives no answer, those in `before` that are there still.
    async fn units(
        &self,
        wanted: &BTreeSet<&Unit>,
        before: &BTreeMap<Unit, CgroupPath>,
    ) -> (BTreeMap<Unit, Cgroup>, BTreeMap<Unit, Option<CgroupPath>>) {
        let (Some(root), false) = (&self.cgroup, wanted.is_empty()) else { return Default::default() };
        // The spec has no more, see `Spec::limits`; the slices of vmesh are few.
        let wanted: BTreeSet<&Unit> = wanted.iter().copied().take(2 * MAX_UNITS).collect();
        let UnitPlaces { running, parents } = match said(&self.systemctl, &units::question(&wanted)).await {
            Some(Said { found: true, text }) => units::answer(&text, &wanted),
            Some(Said { found: false, .. }) | None => {
                let known = before.iter().filter(|(unit, _)| wanted.contains(unit));
                let running: BTreeMap<_, _> =
                    known.map(|(unit, path)| (unit.clone(), path.clone())).collect();
                let parents = running.iter().map(|(unit, path)| (unit.clone(), path.parent())).collect();
                UnitPlaces { running, parents }
            }
        };
        let there = |(unit, path): (Unit, CgroupPath)| Some((unit, units::cgroup(root, &path)?));
        (running.into_iter().filter_map(there).collect(), parents)
    }

    /// The ports on which something that takes SSH listens, those of its open sessions, those of its configuration, and those that
    /// systemd holds for it: other processes' sockets are shown to root and to CAP_SYS_PTRACE only.
    async fn ssh_ports(&self, before: &BTreeSet<u16>) -> BTreeSet<u16> {
        let inodes = self.ssh_inodes();
        let sockets = self.sockets();
        // A socket that another user made is no daemon's, whoever has it now.
        let sockets = sockets.iter().filter(|socket| socket.user == 0 && inodes.contains(&socket.inode));
        // Where SSH is started by a connection, nobody but systemd listens before the first.
        let arguments = ["show", "--property=Listen", "ssh.socket", "sshd.socket", "dropbear.socket"];
        let held = match said(&self.systemctl, &arguments).await {
            Some(Said { found: true, text }) => listened(&text),
            Some(Said { found: false, .. }) | None => before.clone(),
        };
        sockets.map(|socket| socket.local.port()).chain(self.configured_ssh_ports()).chain(held).collect()
    }

    fn configured_ssh_ports(&self) -> BTreeSet<u16> {
        let more = fs::read_dir(self.ssh.join("sshd_config.d")).into_iter().flatten().flatten();
        let more = more.map(|entry| entry.path()).take(MAX_FILES);
        let files = more.chain([self.ssh.join("sshd_config")]);
        files.flat_map(|file| sshd_ports(&read_of_root(&file).unwrap_or_default())).collect()
    }

    /// The number of a user, given by name or by number.
    pub async fn user_id(&self, user: &Account) -> Option<u32> {
        if let Some(number) = user.number() {
            return Some(number);
        }
        // At a boot everything is slow, and this is asked once.
        for _ in 0..10 {
            let found = self.look_up("passwd", [user].into_iter(), &BTreeMap::new()).await;
            match found.into_values().next() {
                Some(Number::Now(number)) => return Some(number),
                Some(Number::Unanswered) => {}
                Some(Number::Last(_)) | None => return None,
            }
        }
        None
    }

    /// The SSH sessions that others have with this host: the connections to ports on which it takes SSH.
    pub fn ssh_sessions(&self, ports: &BTreeSet<u16>) -> Vec<Session> {
        let sessions = self.sockets().into_iter().filter(|socket| {
            socket.is_established() && socket.inode != 0 && ports.contains(&socket.local.port())
        });
        sessions.map(|socket| Session { inode: socket.inode, stuck: socket.is_stuck() }).collect()
    }

    /// How many open connections have come through a redirect: see [`crate::confirm::leaving`].
    pub fn redirected(&self) -> usize {
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

    /// The sockets of root's processes that are SSH daemons by their name and by their executable, which only root can have put
    /// there. A name alone is anybody's to have (`prctl`, `/proc/self/comm`). A listener that systemd holds for a daemon is not
    /// among them, and its sessions are.
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

/// Reports whether the process in this folder of `/proc` is root's, and its program in directories that are root's.
fn is_roots_program(process: &Path) -> bool {
    let status = fs::read_to_string(process.join("status")).unwrap_or_default();
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap_or_default();
    // Real, effective, saved and file system: those that a program of another user may have set.
    let is_roots = uids.split_whitespace().count() == 4 && uids.split_whitespace().all(|uid| uid == "0");
    let program = fs::read_link(process.join("exe")).unwrap_or_default();
    // An upgrade replaces the program of a daemon that runs.
    let program = program.to_str().map(|path| path.strip_suffix(" (deleted)").unwrap_or(path));
    is_roots && program.is_some_and(|path| programs::is_trusted(Path::new(path)))
}

/// The text of a file that is root's and not too long.
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

/// What `getent` or `systemctl` may print.
const MAX_ANSWER: u64 = 1 << 20;

/// What a program said that was asked for something.
struct Said {
    /// It ended with 0.
    found: bool,
    text: String,
}

/// `None` if it does not answer: it cannot be run, or hangs.
async fn said(program: &Path, arguments: &[&str]) -> Option<Said> {
    let mut command = programs::command(program).ok()?;
    command.args(arguments);
    let output =
        timeout(ANSWERS_WITHIN, programs::run(command, None, MAX_ANSWER, |_| ())).await.ok()?.ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Some(Said { found: output.status.success(), text })
}

fn spec_names(spec: &Spec, unit: &Unit) -> bool {
    let out = &spec.outbound;
    out.include.units.contains(unit) || out.exclude.units.contains(unit) || out.dial.units.contains_key(unit)
}

/// The ports in an `sshd_config`: see sshd_config(5). One that is not in force any more does no harm.
fn sshd_ports(text: &str) -> BTreeSet<u16> {
    let port = |line: &str| {
        let line = line.trim().replacen('=', " ", 1);
        let mut words = line.split_whitespace();
        let keyword = words.next()?.to_ascii_lowercase();
        let value = words.next()?;
        match keyword.as_str() {
            "port" => value.parse().ok(),
            // An IPv6 address without a port has colons too.
            "listenaddress" if value.starts_with('[') || value.matches(':').count() == 1 => {
                value.rsplit_once(':')?.1.parse().ok()
            }
            _ => None,
        }
    };
    text.lines().filter_map(port).collect()
}

/// The ports in `Listen=[::]:22 (Stream)`, as `systemctl show` prints it.
fn listened(text: &str) -> BTreeSet<u16> {
    let port = |line: &str| {
        line.strip_prefix("Listen=")?.strip_suffix(" (Stream)")?.rsplit_once(':')?.1.parse().ok()
    };
    text.lines().filter_map(port).collect()
}

/// `name:x:1000:...`
fn id_of(line: &str) -> Option<u32> {
    line.trim().split(':').nth(2)?.parse().ok()
}

/// A connection of somebody's who works on this host from elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Session {
    /// The kernel's number of the socket: the same session has the same.
    pub inode: u64,
    /// What was sent is not acknowledged and has been sent again.
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
        assert_eq!(listened(text), [2222, 2223].into());
        assert_eq!(listened(""), [].into());
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
