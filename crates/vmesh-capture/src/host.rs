//! What has to be known of a host before rules can be made for it. Gathered by [`crate::facts`], or by a test.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::spec::{Account, MAX_NAMES, Unit};
use crate::units::CgroupPath;

/// The host as it is now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// By name; one that is not here does not exist. Numbers need not be here.
    pub users: BTreeMap<String, Number>,
    pub groups: BTreeMap<String, Number>,
    /// The control groups of the units that have one now.
    pub units: BTreeMap<Unit, Cgroup>,
    /// Where units get their control groups that are left out or have a share: nobody is captured who has just begun there.
    pub nurseries: Vec<Nursery>,
    /// Where there is no IPv6, nothing is asked of ip6tables.
    pub ipv6: bool,
    pub never: Never,
}

/// The number of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Number {
    Now(u32),
    /// It was this one. Nobody answers now, or it is said not to exist, which a directory that cannot be reached says of
    /// everybody: who was left alone stays so.
    Last(u32),
    /// Nobody answers, and nobody ever did.
    Unanswered,
}

/// What is kept of a host, for when it does not answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    pub users: BTreeMap<String, Number>,
    pub groups: BTreeMap<String, Number>,
    /// The ports on which it takes SSH.
    pub ssh: BTreeSet<u16>,
    /// The control groups of units that ran.
    pub units: BTreeMap<Unit, CgroupPath>,
}

/// What is never captured, whatever is configured: without it a mistake could not be mended over the network, or
/// connections would go round in circles.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Never {
    /// Envoy's user, and the agent's where it has one of its own.
    pub users: BTreeSet<u32>,
    /// Of slices that are never empty. A service's own would be stale after its next start, and Envoy's connections would
    /// come back to it.
    pub slices: BTreeSet<Cgroup>,
    /// The ports on which this host takes SSH, those of the sessions that are open included. 22 is always one.
    pub ssh: BTreeSet<u16>,
    /// The ports on which Envoy and the agent listen. 15001 and 15006 always are.
    pub own: BTreeSet<u16>,
    pub control_planes: BTreeSet<SocketAddr>,
}

/// A control group in which units are started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nursery {
    /// `None` for the root of the hierarchy.
    pub parent: Option<Cgroup>,
    /// What is in it now, and known.
    pub children: BTreeSet<Cgroup>,
}

/// A control group of version 2.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cgroup {
    pub path: CgroupPath,
    /// The kernel's number, which is the inode of its directory. Rules mean this one, also when another has the path.
    pub id: u64,
}

/// How much is remembered of each kind, of specs that are not in force any more as well.
const MAX_REMEMBERED: usize = 4 * MAX_NAMES;

fn bound<K: Ord, V>(map: &mut BTreeMap<K, V>) {
    while map.len() > MAX_REMEMBERED && map.pop_last().is_some() {}
}

impl Memory {
    /// What is not asked for any more is kept: a change that is taken back asks for it again.
    pub fn learn(&mut self, host: &Host) {
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
    /// `None` where there is no such user.
    pub(crate) fn user(&self, account: &Account) -> Option<Number> {
        account.number().map(Number::Now).or_else(|| self.users.get(account.as_str()).copied())
    }

    pub(crate) fn group(&self, account: &Account) -> Option<Number> {
        account.number().map(Number::Now).or_else(|| self.groups.get(account.as_str()).copied())
    }
}
