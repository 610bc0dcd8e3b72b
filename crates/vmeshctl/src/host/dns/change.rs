//! Changes the configuration of the host's resolver, and rolls the change back if the resolver no longer finds other names.
//!
//! ```text
//! look up other names --> write files, restart --> the resolver runs and finds the same names --> done
//!                                       └──────> not within 10 s --> restore the files, restart --> error
//! ```

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use vmesh_daemon::fsx;
use vmesh_daemon::report::one_line;

use super::super::capture::run;
use super::super::{HostError, host_program};
use super::MAX_FILE;

/// Time in which a restarted resolver must find the same names again.
const FOUND_WITHIN: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// Timeout of one look-up. A slower name is not suitable for the check.
const LOOKS_UP_WITHIN: Duration = Duration::from_secs(2);
/// Maximum number of names that are looked up before and after a change.
const MOST_NAMES: usize = 12;
/// The last line of a file whose directory vmesh created. When the file is removed, so is the directory.
const MADE_DIRECTORY: &str = "The directory was made by vmesh, too.";
/// Readable for all, since resolvers run as users of their own.
const MODE: u32 = 0o644;

/// The desired content of a file, or its removal.
pub(super) enum DesiredFile {
    Text(String),
    Absent,
}

/// The changed files of one resolver, and the unit that reads them.
pub(super) struct ResolverChange<'a> {
    pub(super) files: Vec<(PathBuf, DesiredFile)>,
    pub(super) unit: &'static str,
    /// The names to check. `None` if the root is not `/`: nothing is restarted then.
    pub(super) names: Option<&'a BTreeSet<String>>,
}

/// The state of a file before the change, for the rollback.
struct OriginalFile {
    path: PathBuf,
    /// The content and the mode; `None` if there was no file.
    was: Option<(Vec<u8>, u32)>,
    /// The directory that was created, or removed, together with the file.
    made: Option<PathBuf>,
}

impl ResolverChange<'_> {
    /// Applies the change and returns a line for each file. Restores all files and returns an error if the resolver does not run
    /// afterwards, or no longer finds a name that it found before.
    pub(super) fn apply(self) -> Result<String, HostError> {
        let found = self.names.map(resolvable_among).unwrap_or_default();
        let live = self.names.is_some();
        let ran = live && is_active(self.unit);
        let mut done = Vec::new();
        let mut report = String::new();
        let mut changed = Ok(());
        for (path, wanted) in &self.files {
            match apply_file(path, wanted) {
                Ok(None) => {}
                Ok(Some((before, what))) => {
                    done.push(before);
                    report += &format!("{what} {}\n", path.display());
                }
                Err(error) => {
                    changed = Err(error);
                    break;
                }
            }
        }
        if let Err(error) = changed {
            roll_back(&done);
            return Err(error);
        }
        if done.is_empty() || !live {
            return Ok(report);
        }
        // A stopped resolver reads the files when it is started.
        if !ran {
            return Ok(report);
        }
        let restarted = restart(self.unit);
        let verdict = match restarted {
            Err(error) => Err(one_line(&error)),
            Ok(_) => wait_until_resolved(self.unit, &found),
        };
        let Err(why) = verdict else {
            report += &format!("restarted {}\n", self.unit);
            return Ok(report);
        };
        roll_back(&done);
        let again = match restart(self.unit) {
            Ok(_) => String::new(),
            Err(error) => format!("; and as it was it does not start, either: {}", one_line(&error)),
        };
        Err(HostError::TakenBack { unit: self.unit, why: format!("{why}{again}") })
    }
}

/// Writes or removes one file. Returns its state before, and the verb for the message; `None` if nothing had to change.
fn apply_file(path: &Path, wanted: &DesiredFile) -> Result<Option<(OriginalFile, &'static str)>, HostError> {
    let was = match fsx::read_capped(path, MAX_FILE) {
        Ok(bytes) => {
            let mode =
                std::fs::metadata(path).map_or(MODE, |metadata| metadata.permissions().mode() & 0o7777);
            Some((bytes, mode))
        }
        Err(error) if error.is_not_found() => None,
        Err(error) => return Err(error.into()),
    };
    let text_before = was.as_ref().map(|(bytes, _)| String::from_utf8_lossy(bytes).into_owned());
    let is_foreign = text_before.as_ref().is_some_and(|text| !super::resolver::is_ours(text));
    match wanted {
        DesiredFile::Absent => {
            let Some(text) = text_before else { return Ok(None) };
            if is_foreign {
                // A file of that name that vmesh did not write is not removed.
                return Ok(None);
            }
            std::fs::remove_file(path).map_err(|cause| HostError::Remove { path: path.to_owned(), cause })?;
            let dir = path.parent().filter(|_| text.trim_end().ends_with(MADE_DIRECTORY));
            // `remove_dir` fails for a directory with other files, which therefore stays.
            let removed = dir.filter(|dir| std::fs::remove_dir(dir).is_ok());
            let made = removed.map(Path::to_owned);
            Ok(Some((OriginalFile { path: path.to_owned(), was, made }, "removed")))
        }
        DesiredFile::Text(text) => {
            if is_foreign {
                return Err(HostError::Cannot(format!(
                    "{} is not of vmesh, which would have written it: move it away, then do this again",
                    path.display()
                )));
            }
            let dir = path.parent().filter(|dir| !dir.exists()).map(Path::to_owned);
            let had_mark = text_before.as_ref().is_some_and(|text| text.trim_end().ends_with(MADE_DIRECTORY));
            let text = match dir.is_some() || had_mark {
                true => marked(text),
                false => text.clone(),
            };
            if text_before.as_ref() == Some(&text) {
                return Ok(None);
            }
            if let Some(dir) = &dir {
                std::fs::create_dir_all(dir)
                    .map_err(|cause| HostError::Run { command: format!("mkdir {}", dir.display()), cause })?;
            }
            if let Err(error) = fsx::write_atomically(path, text.as_bytes(), MODE) {
                if let Some(dir) = &dir {
                    _ = std::fs::remove_dir(dir);
                }
                return Err(error.into());
            }
            Ok(Some((OriginalFile { path: path.to_owned(), was, made: dir }, "wrote")))
        }
    }
}

/// Appends the line about the directory to `text`, as a comment in the syntax of the file.
fn marked(text: &str) -> String {
    let comment = if text.starts_with(';') { ';' } else { '#' };
    format!("{text}{comment} {MADE_DIRECTORY}\n")
}

/// Restores the files in reverse order. Prints the files that could not be restored.
fn roll_back(done: &[OriginalFile]) {
    for before in done.iter().rev() {
        let back = match &before.was {
            Some((bytes, mode)) => {
                if let Some(dir) = &before.made {
                    _ = std::fs::create_dir_all(dir);
                }
                fsx::write_atomically(&before.path, bytes, *mode).map_err(|error| one_line(&error))
            }
            None => {
                let removed = std::fs::remove_file(&before.path).map_err(|error| error.to_string());
                if let Some(dir) = &before.made {
                    _ = std::fs::remove_dir(dir);
                }
                removed
            }
        };
        if let Err(why) = back {
            eprintln!("could not put {} back as it was: {why}", before.path.display());
        }
    }
}

/// Restarts a resolver. Its failure count is reset first: systemd does not restart a unit that failed several times within seconds, and the
/// host would have no resolver.
fn restart(unit: &str) -> Result<String, HostError> {
    // Fails harmlessly for a unit that is not loaded.
    _ = run(host_program("systemctl").args(["reset-failed", unit]));
    run(host_program("systemctl").args(["restart", unit]))
}

fn is_active(unit: &str) -> bool {
    let status = host_program("systemctl").args(["is-active", "--quiet", unit]).status();
    status.is_ok_and(|status| status.success())
}

/// Waits until the resolver runs and finds all `names` again.
fn wait_until_resolved(unit: &str, names: &BTreeSet<String>) -> Result<(), String> {
    let deadline = Instant::now() + FOUND_WITHIN;
    loop {
        let lost: Vec<&String> = {
            let found = resolvable_among(names);
            names.iter().filter(|name| !found.contains(*name)).collect()
        };
        let why = match (is_active(unit), lost.first()) {
            (true, None) => return Ok(()),
            (false, _) => format!("{unit} does not run with it (`journalctl -u {unit} -n 20`)"),
            (true, Some(lost)) => format!("{lost}, which was found before, is not found any more"),
        };
        if Instant::now() >= deadline {
            return Err(why);
        }
        sleep(LOOK_AGAIN);
    }
}

/// Returns the names that the host's programs find now, through the C library. All look-ups run in parallel.
pub(super) fn resolvable_among(names: &BTreeSet<String>) -> BTreeSet<String> {
    let within = format!("{}", LOOKS_UP_WITHIN.as_secs());
    let look_up = |name: &String| {
        let mut command = host_program("timeout");
        command.args([&within, "getent", "ahosts", "--", name]);
        command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped());
        command.stderr(std::process::Stdio::null());
        command.spawn().ok()
    };
    let children: Vec<_> = names.iter().map(|name| (name, look_up(name))).collect();
    let finds = |child: Option<std::process::Child>| {
        child
            .and_then(|child| child.wait_with_output().ok())
            .is_some_and(|output| output.status.success() && !output.stdout.is_empty())
    };
    children.into_iter().filter_map(|(name, child)| finds(child).then(|| name.clone())).collect()
}

/// Returns the names outside the mesh that are checked around a change: first `named`, then those of control planes, package sources and
/// time servers of this host. Names in `/etc/hosts` are left out, since finding them proves nothing.
pub(super) fn foreign_names(root: &Path, named: &[String], control_planes: &[String]) -> BTreeSet<String> {
    let read = |path: &str| super::read(root, path).unwrap_or_default();
    let mut names: Vec<String> = named.to_vec();
    names.extend(control_planes.iter().filter_map(|address| host_of(address)));
    let resolv = read("/etc/resolv.conf");
    let domains = resolv.lines().filter(|line| line.starts_with("search ") || line.starts_with("domain "));
    names.extend(domains.flat_map(|line| line.split_whitespace().skip(1)).map(str::to_owned));
    let mut sources = read("/etc/apt/sources.list");
    for entry in
        std::fs::read_dir(super::path_below(root, "/etc/apt/sources.list.d")).into_iter().flatten().flatten()
    {
        let text = fsx::read_capped(&entry.path(), MAX_FILE).unwrap_or_default();
        sources.push('\n');
        sources += &String::from_utf8_lossy(&text);
    }
    let uncommented = sources.lines().filter(|line| !line.trim_start().starts_with('#'));
    let urls = uncommented.flat_map(str::split_whitespace).filter(|word| word.contains("://"));
    names.extend(urls.filter_map(|url| host_of(url.split_once("://")?.1)));
    for file in ["/etc/chrony/chrony.conf", "/etc/chrony.conf", "/etc/ntp.conf", "/etc/ntpsec/ntp.conf"] {
        let text = read(file);
        let servers = text.lines().filter_map(|line| {
            let mut words = line.split_whitespace();
            ["server", "pool", "peer"].contains(&words.next()?).then(|| words.next())?
        });
        names.extend(servers.map(str::to_owned));
    }
    let hosts = read("/etc/hosts");
    let in_hosts: BTreeSet<String> = hosts
        .lines()
        .flat_map(|line| line.split('#').next().unwrap_or_default().split_whitespace().skip(1))
        .map(str::to_ascii_lowercase)
        .collect();
    let mut kept = BTreeSet::new();
    for name in names {
        let name = name.trim_matches('.').to_ascii_lowercase();
        let is_name = name.contains('.')
            && name.parse::<std::net::IpAddr>().is_err()
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
        if is_name && !in_hosts.contains(&name) && kept.len() < MOST_NAMES {
            kept.insert(name);
        }
    }
    kept
}

/// Returns the host in `HOST`, `HOST:PORT` or `HOST/PATH`; `None` if it is an address.
fn host_of(text: &str) -> Option<String> {
    let host = text.split('/').next()?.rsplit('@').next()?;
    let host = host.rsplit_once(':').map_or(host, |(host, _)| host);
    (!host.is_empty() && !host.starts_with('[')).then(|| host.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::tests::root;
    use super::*;

    #[test]
    fn names_that_the_host_depends_on_are_found_in_its_configuration() {
        let root = root(&[
            ("/etc/hosts", "127.0.1.1 web.corp.example web # in.comment\n"),
            ("/etc/resolv.conf", "search corp.example mesh\nnameserver 10.0.0.2\n"),
            (
                "/etc/apt/sources.list",
                "# deb http://old.example/debian x\ndeb [a=b] http://user@deb.example:80/debian x\n",
            ),
            ("/etc/apt/sources.list.d/a.sources", "URIs: https://packages.example/x\n"),
            ("/etc/chrony/chrony.conf", "pool time.example iburst\nmakestep 1 3\n"),
        ]);
        let control_planes =
            ["mesh1.example:15010", "10.0.0.5:15010", "[fd00::1]:15010", "web.corp.example:1"]
                .map(str::to_owned);
        let names =
            foreign_names(&root, &["WWW.Corp.Example.".to_owned(), "bare".to_owned()], &control_planes);
        let expected = [
            "corp.example",
            "deb.example",
            "mesh1.example",
            "packages.example",
            "time.example",
            "www.corp.example",
        ];
        assert_eq!(names.into_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_change_that_fails_half_way_leaves_nothing() {
        let root =
            root(&[("/etc/a/one.conf", "# Written by vmesh: old\n"), ("/etc/c", "a file, no directory")]);
        let of = |path: &str, text: &str| {
            (super::super::path_below(&root, path), DesiredFile::Text(text.to_owned()))
        };
        let change = ResolverChange {
            files: vec![
                of("/etc/a/one.conf", "# Written by vmesh: new\n"),
                of("/etc/b/two.conf", "# Written by vmesh: new\n"),
                of("/etc/c/three.conf", "# Written by vmesh: new\n"),
            ],
            unit: "none",
            names: None,
        };
        change.apply().unwrap_err();
        let one = std::fs::read_to_string(root.join("etc/a/one.conf")).unwrap();
        assert_eq!(one, "# Written by vmesh: old\n");
        assert!(!root.join("etc/b").exists());
    }

    #[test]
    fn a_directory_goes_with_the_file_that_it_was_made_for_and_no_other_does() {
        let root = root(&[("/etc/there/x", "")]);
        std::fs::remove_file(root.join("etc/there/x")).unwrap();
        for (dir, stays) in [("/etc/there", true), ("/etc/made", false)] {
            let path = super::super::path_below(&root, &format!("{dir}/vmesh.conf"));
            let make = |wanted| {
                ResolverChange { files: vec![(path.clone(), wanted)], unit: "none", names: None }.apply()
            };
            assert!(make(DesiredFile::Text("# Written by vmesh\n".into())).unwrap().starts_with("wrote"));
            assert_eq!(make(DesiredFile::Text("# Written by vmesh\n".into())).unwrap(), "");
            // A new text keeps the line about the directory.
            assert!(make(DesiredFile::Text("# Written by vmesh 2\n".into())).unwrap().starts_with("wrote"));
            assert!(make(DesiredFile::Absent).unwrap().starts_with("removed"));
            assert_eq!(path.parent().unwrap().is_dir(), stays, "{dir}");
            assert_eq!(make(DesiredFile::Absent).unwrap(), "");
        }
    }

    #[test]
    fn what_somebody_else_wrote_under_our_name_stays() {
        let root = root(&[("/etc/dnsmasq.d/vmesh.conf", "server=/corp/10.0.0.1\n")]);
        let path = root.join("etc/dnsmasq.d/vmesh.conf");
        let make = |wanted| {
            ResolverChange { files: vec![(path.clone(), wanted)], unit: "none", names: None }.apply()
        };
        make(DesiredFile::Text("# Written by vmesh\n".into())).unwrap_err();
        assert_eq!(make(DesiredFile::Absent).unwrap(), "");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "server=/corp/10.0.0.1\n");
    }
}
