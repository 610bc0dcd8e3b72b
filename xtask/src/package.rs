//! Builds packages for Debian and its derivatives with dpkg-deb. The same sources and date give the same
//! bytes.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::{Args, ValueEnum};
use vmesh_testkit::{Failed, Result, tempdir};

use crate::build;

#[derive(Debug, Args)]
pub(crate) struct PackageOptions {
    /// The output directory of the packages.
    #[arg(long, value_name = "DIR", default_value = "target/package")]
    out: PathBuf,
    /// Use programs that are already built, instead of building them.
    #[arg(long, value_name = "DIR")]
    binaries: Option<PathBuf>,
    /// A version other than the workspace's.
    #[arg(long, value_name = "VERSION", default_value = env!("CARGO_PKG_VERSION"))]
    version: String,
    #[arg(long, value_enum, default_value = "xz")]
    compression: Compression,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Compression {
    /// Small, for distribution.
    Xz,
    /// Fast, for tests.
    Gzip,
}

/// The content of one package.
struct Package {
    name: &'static str,
    /// Programs, with their target directories.
    programs: &'static [(&'static str, &'static str)],
    /// Files of the repository, with their target paths and modes.
    files: &'static [(&'static str, &'static str, u32)],
    /// The files that the administrator may edit.
    conffiles: &'static [&'static str],
}

const PACKAGES: &[Package] = &[
    Package {
        name: "vmesh-agent",
        programs: &[("vmesh-agent", "usr/bin"), ("vmeshctl", "usr/bin"), ("vmesh-net", "usr/sbin")],
        files: &[
            ("systemd/vmesh-agent.service", "lib/systemd/system/vmesh-agent.service", 0o644),
            ("systemd/vmesh-envoy.service", "lib/systemd/system/vmesh-envoy.service", 0o644),
            ("systemd/vmesh-net.service", "lib/systemd/system/vmesh-net.service", 0o644),
            ("systemd/vmesh-net-failed.service", "lib/systemd/system/vmesh-net-failed.service", 0o644),
            ("systemd/vmesh-hosts.service", "lib/systemd/system/vmesh-hosts.service", 0o644),
            ("systemd/vmesh.target", "lib/systemd/system/vmesh.target", 0o644),
            ("systemd/vmesh.slice", "lib/systemd/system/vmesh.slice", 0o644),
            ("systemd/sysusers.d/vmesh.conf", "usr/lib/sysusers.d/vmesh.conf", 0o644),
            ("systemd/tmpfiles.d/vmesh.conf", "usr/lib/tmpfiles.d/vmesh.conf", 0o644),
            (
                "systemd/examples/vmesh-envoy-tproxy.conf",
                "usr/share/doc/vmesh-agent/examples/vmesh-envoy-tproxy.conf",
                0o644,
            ),
            (
                "systemd/examples/vmesh-net-iptables-legacy.conf",
                "usr/share/doc/vmesh-agent/examples/vmesh-net-iptables-legacy.conf",
                0o644,
            ),
            ("crates/vmesh-capture/bypass.sh", "usr/lib/vmesh/bypass", 0o755),
            ("packaging/net-stopped", "usr/lib/vmesh/net-stopped", 0o755),
            ("packaging/vmesh-agent/default", "etc/default/vmesh-agent", 0o644),
            ("packaging/vmesh-agent/agent.yaml", "usr/share/doc/vmesh-agent/examples/agent.yaml", 0o644),
            ("docs/hosts.md", "usr/share/doc/vmesh-agent/hosts.md", 0o644),
            ("docs/capture.md", "usr/share/doc/vmesh-agent/capture.md", 0o644),
            ("docs/doctor.md", "usr/share/doc/vmesh-agent/doctor.md", 0o644),
            ("docs/configuration.md", "usr/share/doc/vmesh-agent/configuration.md", 0o644),
            ("docs/operations.md", "usr/share/doc/vmesh-agent/operations.md", 0o644),
            ("docs/vmeshctl.md", "usr/share/doc/vmesh-agent/vmeshctl.md", 0o644),
        ],
        conffiles: &["/etc/default/vmesh-agent"],
    },
    Package {
        name: "vmesh-control",
        programs: &[("vmesh-control", "usr/bin")],
        files: &[
            ("systemd/vmesh-control.service", "lib/systemd/system/vmesh-control.service", 0o644),
            ("systemd/sysusers.d/vmesh-control.conf", "usr/lib/sysusers.d/vmesh-control.conf", 0o644),
            ("packaging/vmesh-control/default", "etc/default/vmesh-control", 0o644),
            (
                "packaging/vmesh-control/control.yaml",
                "usr/share/doc/vmesh-control/examples/control.yaml",
                0o644,
            ),
            ("docs/hosts.md", "usr/share/doc/vmesh-control/hosts.md", 0o644),
            ("docs/configuration.md", "usr/share/doc/vmesh-control/configuration.md", 0o644),
            ("docs/operations.md", "usr/share/doc/vmesh-control/operations.md", 0o644),
        ],
        conffiles: &["/etc/default/vmesh-control"],
    },
];

const SCRIPTS: &[&str] = &["preinst", "postinst", "prerm", "postrm"];
const INSTALL: &str = "packages are made with dpkg-deb, strip and gzip: `apt-get install dpkg binutils gzip`";

pub(crate) fn run(options: &PackageOptions) -> Result<()> {
    let binaries = match &options.binaries {
        Some(dir) => dir.clone(),
        None => {
            let mut words = vec!["build", "--release", "--locked"];
            for (program, _) in PACKAGES.iter().flat_map(|package| package.programs) {
                words.extend(["--package", program]);
            }
            build::cargo("build the programs of the packages", &words)?;
            build::target()?.join("release")
        }
    };
    let digit = options.version.starts_with(|first: char| first.is_ascii_digit());
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b".+~-".contains(&byte);
    if !digit || !options.version.bytes().all(known) {
        return Err(Failed::new(format!("`{}` is no version of a Debian package", options.version)));
    }
    make_dir(&options.out)?;
    let date = date();
    for package in PACKAGES {
        let file = build_package(package, options, &binaries, date)?;
        println!("{}", file.display());
    }
    Ok(())
}

/// Returns the date of every file in the packages, in seconds since 1970: `$SOURCE_DATE_EPOCH`, else that of
/// the last commit (reproducible-builds.org/specs/source-date-epoch), else a fixed date.
fn date() -> u64 {
    let date = std::env::var("SOURCE_DATE_EPOCH").ok();
    let commit = || {
        let mut git = Command::new("git");
        git.args(["log", "-1", "--format=%ct"]).current_dir(build::root());
        Some(String::from_utf8_lossy(&git.output().ok()?.stdout).into_owned())
    };
    date.or_else(commit).and_then(|text| text.trim().parse().ok()).unwrap_or(1_790_000_000)
}

fn build_package(package: &Package, options: &PackageOptions, binaries: &Path, date: u64) -> Result<PathBuf> {
    let work = tempdir()?;
    let root = work.join("root");
    // The modes are set explicitly later, whatever the umask is.
    make_dir(&root.join("DEBIAN"))?;
    for (program, dir) in package.programs {
        let to = root.join(dir).join(program);
        copy(&binaries.join(program), &to, 0o755)?;
        // Symbols that name functions in a crash report are kept.
        run_tool(Command::new("strip").args(["--strip-debug", "--remove-section=.comment"]).arg(&to))?;
    }
    for (from, to, mode) in package.files {
        let from = build::root().join(from);
        copy(&from, &root.join(to), *mode)?;
    }
    let doc = root.join("usr/share/doc").join(package.name);
    copy(&build::root().join("packaging/copyright"), &doc.join("copyright"), 0o644)?;
    copy(&build::root().join("NOTICE"), &doc.join("NOTICE"), 0o644)?;
    copy(&build::root().join("CHANGELOG.md"), &doc.join("changelog"), 0o644)?;
    run_tool(Command::new("gzip").args(["-9n"]).arg(doc.join("changelog")))?;
    write_control_files(package, options, &root)?;
    normalize_modes_and_dates(&root, date)?;

    let architecture = architecture()?;
    let file = options.out.join(format!("{}_{}_{architecture}.deb", package.name, options.version));
    let mut deb = Command::new("dpkg-deb");
    deb.args(["--root-owner-group", "--build"]).env("SOURCE_DATE_EPOCH", date.to_string());
    deb.args(match options.compression {
        Compression::Xz => ["-Zxz", "-z6"],
        Compression::Gzip => ["-Zgzip", "-z1"],
    });
    run_tool(deb.arg(&root).arg(&file))?;
    Ok(file)
}

fn write_control_files(package: &Package, options: &PackageOptions, root: &Path) -> Result<()> {
    let from = build::root().join("packaging").join(package.name);
    let to = root.join("DEBIAN");
    let read = |name: &str| {
        let path = from.join(name);
        fs::read_to_string(&path).map_err(Failed::to(format!("could not read {}", path.display())))
    };
    let kib = installed_kib(root).to_string();
    let text = read("control")?
        .replace("@VERSION@", &options.version)
        .replace("@ARCHITECTURE@", architecture()?)
        .replace("@SIZE@", &kib);
    write(&to.join("control"), &text, 0o644)?;
    write(&to.join("conffiles"), &format!("{}\n", package.conffiles.join("\n")), 0o644)?;
    SCRIPTS.iter().try_for_each(|script| copy(&from.join(script), &to.join(script), 0o755))?;
    let mut files = Vec::new();
    walk(root, &mut files);
    files.retain(|path| !path.starts_with(&to) && path.is_file());
    files.sort();
    let mut sums = String::new();
    for path in files {
        let name = path.strip_prefix(root).unwrap_or(&path);
        let output = Command::new("md5sum").arg(name).current_dir(root).stderr(Stdio::inherit()).output();
        let output = output.map_err(Failed::to("could not run md5sum: `apt-get install coreutils`"))?;
        sums.push_str(&String::from_utf8_lossy(&output.stdout));
    }
    write(&to.join("md5sums"), &sums, 0o644)
}

/// Sets the same modes and dates regardless of the builder's umask and clock.
fn normalize_modes_and_dates(root: &Path, date: u64) -> Result<()> {
    let mut all = vec![root.to_owned()];
    walk(root, &mut all);
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(date);
    // The deepest paths first, because writing into a directory changes its date.
    for path in all.iter().rev() {
        let set = || {
            if path.is_dir() {
                fs::set_permissions(path, Permissions::from_mode(0o755))?;
            }
            fs::File::open(path)?.set_modified(time)
        };
        set().map_err(Failed::to(format!("could not set the date of {}", path.display())))?;
    }
    Ok(())
}

fn walk(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        into.push(entry.path());
        if entry.path().is_dir() {
            walk(&entry.path(), into);
        }
    }
}

fn installed_kib(root: &Path) -> u64 {
    let mut all = Vec::new();
    walk(root, &mut all);
    all.iter().map(|path| path.metadata().map_or(0, |metadata| metadata.len().div_ceil(1024).max(1))).sum()
}

fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => {
            Err(Failed::new(format!("Debian's name for {other} is not known here: add it to {}", file!())))
        }
    }
}

fn make_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(Failed::to(format!("could not create {}", dir.display())))
}

fn copy(from: &Path, to: &Path, mode: u32) -> Result<()> {
    if let Some(dir) = to.parent() {
        make_dir(dir)?;
    }
    let copied = fs::copy(from, to).and_then(|_| fs::set_permissions(to, Permissions::from_mode(mode)));
    copied.map_err(Failed::to(format!("could not copy {} to {}", from.display(), to.display())))
}

fn write(to: &Path, text: &str, mode: u32) -> Result<()> {
    let written = fs::write(to, text).and_then(|()| fs::set_permissions(to, Permissions::from_mode(mode)));
    written.map_err(Failed::to(format!("could not write {}", to.display())))
}

fn run_tool(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(Failed::to(format!("could not run {name}; {INSTALL}")))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Failed::new(format!("{name} failed ({}): {message}; {INSTALL}", output.status)))
}
