//! The control groups of systemd's system units, as systemd reports them. The hierarchy itself is not
//! searched for names, because users own subtrees of it and name the directories in them as they like.
//!
//! `systemctl show` is used instead of D-Bus: it talks to systemd directly where no bus runs, and a D-Bus
//! client would add some forty crates to a privileged process. The size of its output and its run time are
//! limited.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::host::{Cgroup, ParentCgroup};
use crate::spec::Unit;

/// The limit of units in one spec. Each unit costs rules and a query to systemd.
pub const MAX_UNITS: usize = 256;
/// The limit of a path's length, in bytes. systemd limits the name of a unit to 255, and the kernel a path to
/// 4095.
const MAX_PATH: usize = 2048;
/// The limit of nested directories, which is more than slices are ever nested.
const MAX_DEPTH: usize = 32;

/// The path of a control group below the root of the hierarchy, without a leading `/`:
/// `system.slice/app.service`.
///
/// It contains only characters that systemd uses in the control group of a unit. None of them has a meaning
/// for nft or iptables, so the path can be written into a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CgroupPath(String);

impl CgroupPath {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the control group above this one; `None` if that is the root.
    pub fn parent(&self) -> Option<CgroupPath> {
        self.0.rsplit_once('/').map(|(parent, _)| CgroupPath(parent.to_owned()))
    }

    /// Returns the last component, which is the name of a unit.
    pub fn name(&self) -> &str {
        self.0.rsplit_once('/').map_or(&*self.0, |(_, name)| name)
    }

    /// Returns the number of components; nftables calls this the level.
    pub fn level(&self) -> usize {
        self.0.split('/').count()
    }
}

impl fmt::Display for CgroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A path that cannot be the control group of a unit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not the control group of a unit", .0.escape_debug())]
pub struct InvalidCgroupPath(String);

impl FromStr for CgroupPath {
    type Err = InvalidCgroupPath;

    fn from_str(text: &str) -> Result<Self, InvalidCgroupPath> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '@' | ':' | '\\');
        let is_folder = |folder: &str| {
            (1..=255).contains(&folder.len()) && folder != "." && folder != ".." && folder.chars().all(plain)
        };
        if text.len() <= MAX_PATH && text.split('/').count() <= MAX_DEPTH && text.split('/').all(is_folder) {
            Ok(CgroupPath(text.to_owned()))
        } else {
            Err(InvalidCgroupPath(text.chars().take(200).collect()))
        }
    }
}

impl Serialize for CgroupPath {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for CgroupPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Returns the arguments of `systemctl` that query the control groups of `units`.
pub(crate) fn show_arguments<'a>(units: &BTreeSet<&'a Unit>) -> Vec<&'a str> {
    let mut arguments = vec!["--system", "--no-pager", "show", "--property=Names,ControlGroup,Slice", "--"];
    arguments.extend(units.iter().map(|unit| unit.as_str()));
    arguments
}

/// The control groups of units that run, and those in which units are started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct UnitCgroups {
    /// The control groups of the units that run.
    pub(crate) running: BTreeMap<Unit, CgroupPath>,
    /// The control group in which each unit is started; `None` for the root.
    pub(crate) parents: BTreeMap<Unit, Option<CgroupPath>>,
}

/// Parses the output of `systemctl`: one paragraph for each unit. A unit that does not run has no control
/// group.
pub(crate) fn parse_show(text: &str, wanted: &BTreeSet<&Unit>) -> UnitCgroups {
    let mut found = UnitCgroups::default();
    for paragraph in text.split("\n\n") {
        let value = |key: &str| paragraph.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let group = value("ControlGroup").and_then(|path| path.strip_prefix('/')?.parse::<CgroupPath>().ok());
        let Some(names) = value("Names") else { continue };
        for unit in wanted.iter().filter(|unit| names.split(' ').any(|name| name == unit.as_str())) {
            // systemd reports no slice for a unit without a unit file.
            let slice = value("Slice").filter(|slice| !slice.is_empty()).unwrap_or("system.slice");
            let parent = match &group {
                Some(group) => group.parent(),
                None => slice_path(slice),
            };
            found.parents.entry((**unit).clone()).or_insert(parent);
            if let Some(group) = &group {
                found.running.entry((**unit).clone()).or_insert_with(|| group.clone());
            }
        }
    }
    found
}

/// Returns the control group of a slice: `a-b.slice` is in `a.slice`, and `-.slice` is the root
/// (systemd.slice(5)).
fn slice_path(slice: &str) -> Option<CgroupPath> {
    let name = slice.strip_suffix(".slice")?;
    let ends = name.match_indices('-').map(|(at, _)| at).chain([name.len()]);
    let folders: Vec<String> =
        ends.map(|end| format!("{}.slice", name.get(..end).unwrap_or_default())).collect();
    folders.join("/").parse().ok().filter(|_| name != "-")
}

/// The limit of child control groups that are listed for one control group. A host has a few hundred.
const MAX_CHILDREN: usize = 4096;

/// Lists the control groups in which the units of `parents` are started, with their current children, the
/// deepest first. A parent that does not exist yet is replaced by its nearest ancestor that does.
pub(crate) fn parent_cgroups<'a>(
    root: &Path,
    parents: impl IntoIterator<Item = &'a Option<CgroupPath>>,
) -> Vec<ParentCgroup> {
    let mut there: BTreeSet<Option<CgroupPath>> = BTreeSet::new();
    for parent in parents {
        let mut parent = parent.clone();
        while let Some(path) = parent.clone().filter(|path| cgroup(root, path).is_none()) {
            parent = path.parent();
        }
        there.insert(parent);
    }
    let mut parent_cgroups: Vec<ParentCgroup> = there
        .into_iter()
        .filter_map(|path| {
            let own = match &path {
                Some(path) => Some(cgroup(root, path)?),
                None => None,
            };
            let dir = path.as_ref().map_or_else(|| root.to_owned(), |path| root.join(path.as_str()));
            let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
            let names = names.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            let children = names.take(MAX_CHILDREN).filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let whole = path.as_ref().map_or_else(|| name.clone(), |path| format!("{path}/{name}"));
                cgroup(root, &whole.parse().ok()?)
            });
            Some(ParentCgroup { cgroup: own, children: children.collect() })
        })
        .collect();
    let level = |parent: &ParentCgroup| parent.cgroup.as_ref().map_or(0, |cgroup| cgroup.path.level());
    parent_cgroups.sort_by_key(|parent| std::cmp::Reverse(level(parent)));
    parent_cgroups
}

/// Returns the control group at `path` below the mount point `root`, if it exists.
pub(crate) fn cgroup(root: &Path, path: &CgroupPath) -> Option<Cgroup> {
    let metadata = root.join(path.as_str()).symlink_metadata().ok()?;
    metadata.is_dir().then(|| Cgroup { path: path.clone(), id: metadata.ino() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn units(names: &[&str]) -> Vec<Unit> {
        names.iter().map(|name| name.parse().unwrap()).collect()
    }

    #[test]
    fn only_what_systemd_names_a_control_group_is_the_path_of_one() {
        for right in [
            "vmesh.slice",
            "system.slice/app.service",
            r"a.slice/dev\x2dsda.service",
            "a.slice/b@c:1_2.scope",
        ] {
            assert_eq!(right.parse::<CgroupPath>().unwrap().as_str(), right);
        }
        let long = "a/".repeat(40) + "b";
        for wrong in [
            "",
            "/",
            "/a",
            "a/",
            "a//b",
            ".",
            "a/../b",
            "a b",
            "a\"b",
            "a;b",
            "a\nb",
            "a#b",
            "a{b",
            "a$b",
            "a'b",
            "a`b",
            "a,b",
            "a*b",
            "a\0b",
            "ä",
            &long,
            &"a".repeat(256),
        ] {
            assert!(wrong.parse::<CgroupPath>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn control_groups_are_read_from_what_systemctl_prints() {
        let wanted = units(&["app.service", "alias.service", "off.service", "bad.service"]);
        let text = "Names=app.service\nControlGroup=/system.slice/app.service\n\n\
            ControlGroup=/system.slice/real.service\nNames=real.service alias.service\n\n\
            Names=off.service\nControlGroup=\nSlice=a-b.slice\n\nNames=bad.service\nControlGroup=/system.slice/x\" return #/bad.service\n\n\
            Names=other.service\nControlGroup=/system.slice/other.service\n";
        let found = parse_show(text, &wanted.iter().collect());
        let running: Vec<String> =
            found.running.iter().map(|(unit, path)| format!("{unit} {path}")).collect();
        assert_eq!(
            running,
            ["alias.service system.slice/real.service", "app.service system.slice/app.service"]
        );
        let shown =
            |path: &Option<CgroupPath>| path.as_ref().map_or("the root".to_owned(), ToString::to_string);
        let parents: Vec<String> =
            found.parents.iter().map(|(unit, path)| format!("{unit} in {}", shown(path))).collect();
        assert_eq!(
            parents,
            [
                "alias.service in system.slice",
                "app.service in system.slice",
                "bad.service in system.slice",
                "off.service in a.slice/a-b.slice",
            ]
        );
        assert_eq!(parse_show("", &wanted.iter().collect()), UnitCgroups::default());
        assert_eq!(slice_path("-.slice"), None);
    }
}
