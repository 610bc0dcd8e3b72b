//! The facts of a host that rules depend on. [`crate::facts`] or a test fills them in.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::spec::{Account, MAX_NAMES, Unit};
use crate::units::CgroupPath;

/// The facts of a host at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// The user ids by name. A name that is missing here does not exist. Accounts that are given by number
    /// need no entry.
    pub users: BTreeMap<String, AccountNumber>,
    pub groups: BTreeMap<String, AccountNumber>,
    /// The control groups of the units that have one now.
    pub units: BTreeMap<Unit, Cgroup>,
    /// The control groups in which units with an exclusion or a share of their own are started. A process in
    /// a new control group there is not captured yet.
    pub parent_cgroups: Vec<ParentCgroup>,
    /// True if the host has IPv6. Without it, ip6tables is never called.
    pub ipv6: bool,
    pub never: NeverCaptured,
}

/// The user or group id of an account name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AccountNumber {
    Now(u32),
    /// The last known id. The name service does not answer, or reports that the name does not exist, as it
    /// also does when its directory server is unreachable. Keeping the id keeps an excluded user excluded.
    Last(u32),
    /// The name service does not answer, and never answered for this name.
    Unanswered,
}

/// The remembered facts of a host, used while its name service or systemd does not answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HostMemory {
    pub users: BTreeMap<String, AccountNumber>,
    pub groups: BTreeMap<String, AccountNumber>,
    /// The SSH ports.
    pub ssh: BTreeSet<u16>,
    /// The control groups of units that ran.
    pub units: BTreeMap<Unit, CgroupPath>,
}

/// The traffic that is never captured, whatever is configured. Capturing it would cut off the operator who
/// could correct a mistake, or send connections in circles.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NeverCaptured {
    /// The users of Envoy, and of an agent with a separate user.
    pub users: BTreeSet<u32>,
    /// Slices that are never empty. The control group of a service would be outdated after its next start,
    /// and Envoy's own connections would be sent back to Envoy.
    pub slices: BTreeSet<Cgroup>,
    /// The ports on which this host accepts SSH, and those of open SSH sessions. Port 22 is always included.
    pub ssh: BTreeSet<u16>,
    /// The ports on which Envoy and the agent listen. 15001 and 15006 always are among them.
    pub own: BTreeSet<u16>,
    pub control_planes: BTreeSet<SocketAddr>,
}

/// A control group in which systemd creates the control groups of units.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParentCgroup {
    /// The control group itself; `None` for the root of the hierarchy.
    pub cgroup: Option<Cgroup>,
    /// The control groups in it that are known now.
    pub children: BTreeSet<Cgroup>,
}

/// A control group of version 2.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cgroup {
    pub path: CgroupPath,
    /// The kernel's id, which is the inode of its directory. Rules match this id, even if another control
    /// group has the same path by now.
    pub id: u64,
}

/// The number of entries of each kind that are remembered, including those of specs that are no longer in
/// force.
const MAX_REMEMBERED: usize = 4 * MAX_NAMES;

fn bound<K: Ord, V>(map: &mut BTreeMap<K, V>) {
    while map.len() > MAX_REMEMBERED && map.pop_last().is_some() {}
}

impl HostMemory {
    /// Remembers the facts of `host`. Facts that are no longer needed stay: after a rollback they are needed
    /// again.
    pub fn remember(&mut self, host: &Host) {
        self.users.extend(host.users.clone());
        self.groups.extend(host.groups.clone());
        self.ssh.clone_from(&host.never.ssh);
        let units = host.units.iter().map(|(unit, cgroup)| (unit.clone(), cgroup.path.clone()));
        self.units.extend(units);
        let slices = host
            .never
            .slices
            .iter()
            .filter_map(|slice| Some((slice.path.name().parse().ok()?, slice.path.clone())));
        self.units.extend(slices);
        bound(&mut self.users);
        bound(&mut self.groups);
        bound(&mut self.units);
    }
}

impl Host {
    /// Returns the id of a user; `None` if there is no such user.
    pub(crate) fn user(&self, account: &Account) -> Option<AccountNumber> {
        account.number().map(AccountNumber::Now).or_else(|| self.users.get(account.as_str()).copied())
    }

    pub(crate) fn group(&self, account: &Account) -> Option<AccountNumber> {
        account.number().map(AccountNumber::Now).or_else(|| self.groups.get(account.as_str()).copied())
    }
}
