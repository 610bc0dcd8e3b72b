//! The root file system that hosts are booted from, built from Debian packages that the machine's own apt
//! fetches and verifies.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Failed, Result, cache, debian};

/// A release of Debian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Suite {
    /// Debian 12.
    Bookworm,
    /// Debian 13.
    Trixie,
}

/// The packages of a host without vmesh. They include nspawn, which is run from this root because the machine
/// may lack it.
const PACKAGES: &[&str] = &[
    "ca-certificates",
    "conntrack",
    "curl",
    "dbus",
    "firewalld",
    "iproute2",
    "iptables",
    "iputils-ping",
    "kmod",
    "libpam-systemd",
    "netcat-openbsd",
    "nftables",
    "openssh-server",
    "procps",
    "python3-minimal",
    "systemd",
    "systemd-container",
    "systemd-resolved",
    "systemd-sysv",
];

/// Units that would disturb an idle host, or a host whose network is configured from outside.
const MASKED: &[&str] = &[
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "console-getty.service",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@.service",
    "systemd-networkd-wait-online.service",
    "systemd-networkd.service",
    "systemd-timesyncd.service",
];

const SSHD: &str = "PermitRootLogin prohibit-password\nUseDNS no\n";

/// A drop-in that creates a new host key for each host. An RSA key would take seconds.
const SSHD_UNIT: &str = "[Service]\nExecStartPre=\n\
    ExecStartPre=/bin/sh -c \"[ -s /etc/ssh/ssh_host_ed25519_key ] || ssh-keygen -q -t ed25519 -N '' -f \
    /etc/ssh/ssh_host_ed25519_key\"\nExecStartPre=/usr/sbin/sshd -t\n";

const INSTALL: &str = "the root of test hosts is built by the machine's own apt, dpkg and perl (Debian or Ubuntu), as root, \
                       from the mirrors that its apt sources name";

/// A root file system that is ready to be booted from, mounted read-only.
#[derive(Debug, Clone)]
pub struct Root {
    path: PathBuf,
}

impl Suite {
    pub fn name(self) -> &'static str {
        match self {
            Suite::Bookworm => "bookworm",
            Suite::Trixie => "trixie",
        }
    }
}

impl Root {
    /// Returns the root from the cache, and builds it on first use.
    pub fn get(suite: Suite) -> Result<Root> {
        // Another recipe gets another name in the cache.
        let mut recipe = DefaultHasher::new();
        (suite, PACKAGES, MASKED, SSHD, SSHD_UNIT).hash(&mut recipe);
        let name = format!("host-{}-{:08x}", suite.name(), recipe.finish() & 0xffff_ffff);
        let path = cache::get(&name, |work| {
            eprintln!("building the root of test hosts, {} (about 120 MB to fetch, once)", suite.name());
            build(work, suite)
        })?;
        Ok(Root { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Builds a command that runs a program of the root on this machine, with the libraries of the root.
    pub fn command(&self, program: &str) -> Command {
        let libraries = format!("{}/usr/lib/{}-linux-gnu", self.path.display(), std::env::consts::ARCH);
        let loader = match std::env::consts::ARCH {
            "aarch64" => "ld-linux-aarch64.so.1",
            _ => "ld-linux-x86-64.so.2",
        };
        let mut command = Command::new(format!("{libraries}/{loader}"));
        command.args(["--library-path", &format!("{libraries}:{libraries}/systemd")]);
        command.arg(self.path.join("usr/bin").join(program));
        command
    }
}

fn build(work: &Path, suite: Suite) -> Result<PathBuf> {
    let root = work.join("root");
    let apt = Apt::new(work, suite)?;
    let tools = apt.mmdebstrap()?;
    // The build runs in its own mount namespace, so no mount is left below a directory that is removed.
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "slave", "--", "perl"]).arg(tools.join("mmdebstrap"));
    command.args([
        "--mode=root",
        "--variant=apt",
        "--format=directory",
        "--aptopt=Acquire::Languages \"none\"",
    ]);
    command.arg(format!("--include={}", PACKAGES.join(","))).arg(suite.name()).arg(&root).arg(&apt.sources);
    // mmdebstrap finds its helpers on the PATH.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let paths = std::iter::once(tools).chain(std::env::split_paths(&path));
    let path = std::env::join_paths(paths).map_err(Failed::to("could not extend the PATH"))?;
    command.env("PATH", path).env_remove("APT_CONFIG").env("TMPDIR", work);
    cache::run(&mut command, INSTALL)?;
    settle(&root).map_err(Failed::to(format!("could not prepare {}", root.display())))?;
    let mut disable = Command::new("chroot");
    disable.arg(&root).args(["systemctl", "--quiet", "disable", "firewalld.service"]);
    cache::run(&mut disable, INSTALL)?;
    Ok(root)
}

/// Prepares the root file system for any host, with the disturbing units masked.
fn settle(root: &Path) -> std::io::Result<()> {
    // Each host creates its own id.
    fs::write(root.join("etc/machine-id"), "")?;
    _ = fs::remove_file(root.join("var/lib/dbus/machine-id"));
    for entry in fs::read_dir(root.join("etc/ssh"))?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("ssh_host_") {
            fs::remove_file(entry.path())?;
        }
    }
    fs::write(root.join("etc/ssh/sshd_config.d/vmesh-hosts.conf"), SSHD)?;
    let units = root.join("etc/systemd/system");
    fs::create_dir_all(units.join("ssh.service.d"))?;
    fs::write(units.join("ssh.service.d/key.conf"), SSHD_UNIT)?;
    for unit in MASKED {
        let link = units.join(unit);
        _ = fs::remove_file(&link);
        symlink("/dev/null", link)?;
    }
    // With this directory, the journal survives a reboot.
    fs::create_dir_all(root.join("var/log/journal"))
}

/// The machine's apt, with its own state directory: the machine's own state does not change.
struct Apt {
    work: PathBuf,
    sources: PathBuf,
    config: PathBuf,
}

impl Apt {
    fn new(work: &Path, suite: Suite) -> Result<Apt> {
        let state = work.join("apt");
        let apt = Apt {
            work: work.to_owned(),
            sources: state.join("sources.list"),
            config: state.join("apt.conf"),
        };
        let keyring = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
        let signed =
            if keyring.exists() { format!("[signed-by={}] ", keyring.display()) } else { String::new() };
        let (mut lines, mut tried) = (String::new(), Vec::new());
        for mirror in debian::mirrors() {
            let mirror = mirror.trim_end_matches('/');
            for suite in [suite.name().to_owned(), format!("{}-security", suite.name())] {
                match debian::fetched(&format!("{mirror}/dists/{suite}/InRelease"), &work.join("InRelease")) {
                    Ok(()) => lines.push_str(&format!("deb {signed}{mirror} {suite} main\n")),
                    Err(failed) => tried.push(format!("{mirror} {suite}: {failed}")),
                }
            }
        }
        if lines.is_empty() {
            let (suite, tried) = (suite.name(), tried.join("; "));
            return Err(Failed::new(format!("no mirror has Debian's {suite}; {INSTALL}. Tried: {tried}")));
        }
        let at = state.display();
        let config = format!(
            "Dir::State \"{at}/state\";\nDir::State::status \"{at}/status\";\nDir::Cache \"{at}/cache\";\n\
             Dir::Etc::sourcelist \"{at}/sources.list\";\nDir::Etc::sourceparts \"/dev/null\";\n\
             Acquire::Languages \"none\";\nAPT::Sandbox::User \"root\";\n"
        );
        let prepare = || {
            fs::create_dir_all(state.join("state/lists/partial"))?;
            fs::create_dir_all(state.join("cache/archives/partial"))?;
            fs::write(state.join("status"), "")?;
            fs::write(&apt.sources, &lines)?;
            fs::write(&apt.config, config)
        };
        prepare().map_err(Failed::to(format!("could not prepare {}", state.display())))?;
        Ok(apt)
    }

    /// Returns the directory of mmdebstrap: on the PATH, or unpacked from its package.
    fn mmdebstrap(&self) -> Result<PathBuf> {
        if let Some(dir) = debian::on_path("mmdebstrap").as_deref().and_then(Path::parent) {
            return Ok(dir.to_owned());
        }
        let run = |words: &[&str]| {
            let mut command = Command::new("apt-get");
            command.arg("-q").args(words).current_dir(&self.work).env("APT_CONFIG", &self.config);
            cache::run(&mut command, INSTALL)
        };
        run(&["update"])?;
        run(&["download", "mmdebstrap"])?;
        let files = fs::read_dir(&self.work).into_iter().flatten().flatten().map(|entry| entry.path());
        let deb = { files }.find(|path| path.extension().is_some_and(|extension| extension == "deb"));
        let deb =
            deb.ok_or_else(|| Failed::new("apt said that it fetched mmdebstrap, but there is no package"))?;
        let to = self.work.join("mmdebstrap");
        let mut unpack = Command::new("dpkg-deb");
        unpack.arg("-x").arg(deb).arg(&to);
        cache::run(&mut unpack, "unpacking needs dpkg-deb: `apt-get install dpkg`")?;
        Ok(to.join("usr/bin"))
    }
}
