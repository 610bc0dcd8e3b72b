//! The control groups of systemd's system units, asked of systemd itself. Folders are not searched for names: users own subtrees of
//! control groups and give the folders in them any name they like.
//!
//! `systemctl show` is asked, and not D-Bus: it speaks with systemd's own socket where there is no bus, and a client of D-Bus would
//! add some forty crates to a process with capabilities. Its output and its time are bounded.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::host::Cgroup;
use crate::spec::Unit;

/// More units than this in one spec are refused: each costs rules, and an answer of systemd's.
pub const MAX_UNITS: usize = 256;
/// systemd's own limit on the length of a unit's name is 255; the kernel's on a path is 4095.
const MAX_PATH: usize = 2048;
/// Deeper than slices are nested.
const MAX_DEPTH: usize = 32;

/// The path of a control group below the root of the hierarchy, without the first `/`: `system.slice/app.service`.
///
/// It consists of characters that systemd gives to a control group of a unit, none of which means anything to nft or iptables: a
/// value of this type can stand in a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CgroupPath(String);

impl CgroupPath {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// How many folders deep it is; nftables calls this the level.
    pub fn level(&self) -> usize {
        self.0.split('/').count()
    }
}

impl fmt::Display for CgroupPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A path that no unit's control group has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not the control group of a unit", .0.escape_debug())]
pub struct NoCgroupPath(String);

impl FromStr for CgroupPath {
    type Err = NoCgroupPath;

    fn from_str(text: &str) -> Result<Self, NoCgroupPath> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '@' | ':' | '\\');
        let is_folder = |folder: &str| {
            (1..=255).contains(&folder.len()) && folder != "." && folder != ".." && folder.chars().all(plain)
        };
        if text.len() <= MAX_PATH && text.split('/').count() <= MAX_DEPTH && text.split('/').all(is_folder) {
            Ok(CgroupPath(text.to_owned()))
        } else {
            Err(NoCgroupPath(text.chars().take(200).collect()))
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

/// The arguments of `systemctl` that ask for the control groups of `units`.
pub(crate) fn question<'a>(units: &BTreeSet<&'a Unit>) -> Vec<&'a str> {
    let mut arguments = vec!["--system", "--no-pager", "show", "--property=Names,ControlGroup", "--"];
    arguments.extend(units.iter().map(|unit| unit.as_str()));
    arguments
}

/// Reads what `systemctl` answers: a paragraph for each unit. A unit that does not run has no control group.
pub(crate) fn answer(text: &str, wanted: &BTreeSet<&Unit>) -> BTreeMap<Unit, CgroupPath> {
    let mut found = BTreeMap::new();
    for paragraph in text.split("\n\n") {
        let value = |key: &str| paragraph.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let group = value("ControlGroup").and_then(|path| path.strip_prefix('/')?.parse::<CgroupPath>().ok());
        let (Some(names), Some(group)) = (value("Names"), group) else { continue };
        for unit in wanted.iter().filter(|unit| names.split(' ').any(|name| name == unit.as_str())) {
            found.entry((**unit).clone()).or_insert_with(|| group.clone());
        }
    }
    found
}

/// The control group at `path` below the mount `root`, if it is there now.
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
            Names=off.service\nControlGroup=\n\nNames=bad.service\nControlGroup=/system.slice/x\" return #/bad.service\n\n\
            Names=other.service\nControlGroup=/system.slice/other.service\n";
        let found = answer(text, &wanted.iter().collect());
        let found: Vec<String> = found.iter().map(|(unit, path)| format!("{unit} {path}")).collect();
        assert_eq!(
            found,
            ["alias.service system.slice/real.service", "app.service system.slice/app.service"]
        );
        assert_eq!(answer("", &wanted.iter().collect()), BTreeMap::new());
    }
}
