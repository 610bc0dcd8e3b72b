//! `nft` and the iptables tools, for a host that is a namespace.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::debian::{self, Deb};
use crate::{Failed, Result};

/// The two implementations of iptables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Iptables {
    /// iptables over nftables, the default of distributions since 2019.
    Nft,
    /// iptables with the legacy kernel interface.
    Legacy,
}

/// Programs that act on one host.
#[derive(Debug, Clone)]
pub struct Tools {
    /// The directory with all tools under their usual names, to be prepended to a PATH.
    pub dir: PathBuf,
    pub nft: PathBuf,
    pub iptables_save: PathBuf,
    pub iptables_restore: PathBuf,
    pub ip6tables_save: PathBuf,
    pub ip6tables_restore: PathBuf,
    pub conntrack: PathBuf,
}

/// The packages of Debian 12, and the libraries that a minimal system lacks.
const DEBS: &[Deb] = &[
    deb(
        "pool/main/n/nftables/nftables_1.0.6-2+deb12u2_amd64.deb",
        "966ff20ce58c17163a771c02ddbca264291408f94c512bd85dd18da0ebdbe88c",
    ),
    deb(
        "pool/main/n/nftables/libnftables1_1.0.6-2+deb12u2_amd64.deb",
        "3a8223f9bfba99d97bf25296ac83de307ab036e1df63e5965f88809266851947",
    ),
    deb(
        "pool/main/libn/libnftnl/libnftnl11_1.2.4-2_amd64.deb",
        "9e619e1470a1915264e906020f3bfc046fd8458043b1342686d997b5078213af",
    ),
    deb(
        "pool/main/libm/libmnl/libmnl0_1.0.4-3_amd64.deb",
        "4581f42e3373cb72f9ea4e88163b17873afca614a6c6f54637e95aa75983ea7c",
    ),
    deb(
        "pool/main/j/jansson/libjansson4_2.14-2_amd64.deb",
        "3fc9742f9f1a37bcb9931df6074b4d1483419ef832ad5349f47323e75fc27864",
    ),
    deb(
        "pool/main/g/gmp/libgmp10_6.2.1+dfsg1-1.1_amd64.deb",
        "187aedef2ed763f425c1e523753b9719677633c7eede660401739e9c893482bd",
    ),
    deb(
        "pool/main/libe/libedit/libedit2_3.1-20221030-2_amd64.deb",
        "1cf14abf2716d3279db12d0657a5737cf70074a1e71d3bdf73206625e3c89ce6",
    ),
    deb(
        "pool/main/libb/libbsd/libbsd0_0.11.7-2_amd64.deb",
        "bb31cc8b40f962a85b2cec970f7f79cc704a1ae4bad24257a822055404b2c60b",
    ),
    deb(
        "pool/main/libm/libmd/libmd0_1.0.4-2_amd64.deb",
        "03539fd30c509e27101d13a56e52eda9062bdf1aefe337c07ab56def25a13eab",
    ),
    deb(
        "pool/main/n/ncurses/libtinfo6_6.4-4_amd64.deb",
        "072d908f38f51090ca28ca5afa3b46b2957dc61fe35094c0b851426859a49a51",
    ),
    deb(
        "pool/main/i/iptables/iptables_1.8.9-2_amd64.deb",
        "2928d3ca6ca8a3dc3f423f6752822b1f3614a5ba609ff7806bcba4449ffe90e1",
    ),
    deb(
        "pool/main/i/iptables/libxtables12_1.8.9-2_amd64.deb",
        "cb841d66950a43af4a398625313d2f3da9065299c9738538de6c2c3495857040",
    ),
    deb(
        "pool/main/i/iptables/libip4tc2_1.8.9-2_amd64.deb",
        "f2c48b367f9ec13f9aa577e7ccf81b371ce5d5fe22dddf9d7aa99f1e0bb7cfc4",
    ),
    deb(
        "pool/main/i/iptables/libip6tc2_1.8.9-2_amd64.deb",
        "be88db3dfa2fe3345ea343207f7c75345602686121e579023d021c348b9b4f4d",
    ),
    deb(
        "pool/main/libn/libnetfilter-conntrack/libnetfilter-conntrack3_1.0.9-3_amd64.deb",
        "65f1539238f60fcc85d115acd640474f45c77bfddcf402eb7d75965a783c2bc8",
    ),
    deb(
        "pool/main/libn/libnfnetlink/libnfnetlink0_1.0.2-2_amd64.deb",
        "ae5cbba417ea48f34c1f72c27e8146a81f20614c1296bca2cd7234c8215fddcc",
    ),
    deb(
        "pool/main/c/conntrack-tools/conntrack_1.4.7-1+b2_amd64.deb",
        "9827d60b60c1b5673e97f34db48d9db79e9f9ef807ee998320f6dafc80711e82",
    ),
];

/// The name in the cache.
const NAME: &str = "nftables-1.0.6-iptables-1.8.9";
const INSTALL: &str = "`apt-get install nftables iptables conntrack`";

const fn deb(path: &'static str, sha256: &'static str) -> Deb {
    Deb { path, sha256 }
}

impl Tools {
    /// Returns the PATH of this process with the tools first.
    pub fn path(&self) -> String {
        format!("{}:{}", self.dir.display(), std::env::var("PATH").unwrap_or_default())
    }

    /// Returns the output of all firewall tools, without counters and times.
    pub fn ruleset(&self) -> Result<String> {
        let show = |program: &Path, arguments: &[&str]| {
            let output = Command::new(program).args(arguments).output();
            let output = output.map_err(Failed::to(format!("could not run {}", program.display())))?;
            match output.status.success() {
                true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
                false => Err(Failed::new(format!(
                    "{} failed: {}",
                    program.display(),
                    String::from_utf8_lossy(&output.stderr)
                ))),
            }
        };
        let mut text = show(&self.nft, &["-s", "list", "ruleset"])?;
        text += &show(&self.iptables_save, &[])?;
        text += &show(&self.ip6tables_save, &[])?;
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        Ok(lines.map(|line| line.split(" [").next().unwrap_or_default()).collect::<Vec<_>>().join("\n"))
    }

    /// Creates scripts in `dir` that run the tools in the namespace at `space`.
    pub(super) fn new(space: &Path, dir: &Path, iptables: Iptables) -> Result<Tools> {
        let kind = match iptables {
            Iptables::Nft => "nft",
            Iptables::Legacy => "legacy",
        };
        let name = |tool: &str| match tool.split_once('-') {
            Some((family, what)) => format!("{family}-{kind}-{what}"),
            None => tool.to_owned(),
        };
        let find = ToolSource::new(&[
            "nft".to_owned(),
            "conntrack".to_owned(),
            name("iptables-save"),
            name("ip6tables-save"),
        ])?;
        let dir = dir.join(kind);
        fs::create_dir_all(&dir).map_err(Failed::to(format!("could not create {}", dir.display())))?;
        let script = |tool: &str| {
            let path = dir.join(tool);
            let text = find.script(space, &name(tool))?;
            fs::write(&path, text)
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
                .map_err(Failed::to(format!("could not write {}", path.display())))?;
            Ok(path)
        };
        Ok(Tools {
            nft: script("nft")?,
            iptables_save: script("iptables-save")?,
            iptables_restore: script("iptables-restore")?,
            ip6tables_save: script("ip6tables-save")?,
            ip6tables_restore: script("ip6tables-restore")?,
            conntrack: script("conntrack")?,
            dir,
        })
    }
}

/// The location of the tools: the packages in `$VMESH_TOOLS_CACHE`, else the tools on the PATH, else fetched
/// packages.
struct ToolSource {
    packages: Option<PathBuf>,
}

impl ToolSource {
    fn new(names: &[String]) -> Result<ToolSource> {
        let provided = debian::is_provided(DEBS);
        if !provided && names.iter().all(|name| debian::on_path(name).is_some()) {
            return Ok(ToolSource { packages: None });
        }
        let packages = debian::unpacked(NAME, DEBS)
            .map_err(|failed| Failed::new(format!("{failed}; or have the tools on the PATH: {INSTALL}")))?;
        Ok(ToolSource { packages: Some(packages) })
    }

    fn script(&self, space: &Path, tool: &str) -> Result<String> {
        let mut text = "#!/bin/sh\nexport LC_ALL=C\n".to_owned();
        let program = match &self.packages {
            Some(root) => {
                let root = root.display();
                let libraries = format!("{root}/usr/lib/x86_64-linux-gnu");
                text.push_str(&format!(
                    "export LD_LIBRARY_PATH={libraries}:{root}/lib/x86_64-linux-gnu\n\
                     export XTABLES_LIBDIR={libraries}/xtables\n"
                ));
                PathBuf::from(format!("{root}/usr/sbin/{tool}"))
            }
            None => debian::on_path(tool).ok_or_else(|| Failed::new(format!("no `{tool}`: {INSTALL}")))?,
        };
        let (space, program) = (space.display(), program.display());
        match cgroup2().as_deref() {
            // nft finds control groups only below this directory, so it is mounted there in a private mount
            // namespace.
            Some(mount) if mount != "/sys/fs/cgroup" => text.push_str(&format!(
                "exec nsenter --net={space} -- unshare --mount --propagation private -- sh -c \
                 'mount --bind {mount} /sys/fs/cgroup && exec {program} \"$@\"' sh \"$@\"\n"
            )),
            _ => text.push_str(&format!("exec nsenter --net={space} -- {program} \"$@\"\n")),
        }
        Ok(text)
    }
}

/// Returns the mount point of control groups of version 2.
pub(super) fn cgroup2() -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mount = mounts.find(|mount| mount.get(2) == Some(&"cgroup2"))?;
    mount.get(1).map(|path| (*path).to_owned())
}
