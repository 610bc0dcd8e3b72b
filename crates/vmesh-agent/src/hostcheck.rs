//! Checks of the host for `vmesh-agent --check`: whether the units' users can read the files that a configuration names, and
//! whether the binary at `envoy.path` is an Envoy. Root can read everything, so a check of the text alone passes for root on a host
//! where the units fail.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::Serialize;
use tokio::time::timeout;
use vmesh_capture::programs;

use crate::config::{Config, Manage};
use crate::supervisor;

/// The users of the units, and their group.
const AGENT: &str = "vmesh-agent";
const ENVOY: &str = "vmesh-envoy";
const GROUP: &str = "vmesh";
/// The time that the binary at `envoy.path` has to say what it is. The doctor and the DNS tool wait 1.5 s for the whole check.
const ANSWERS_WITHIN: Duration = Duration::from_secs(1);

/// Why vmesh would not run here with a configuration that is sound in itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostProblem {
    pub concerns: Concern,
    pub what: String,
    /// The command that mends the problem, or words where no command does.
    pub fix: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Concern {
    /// A file that a unit's user cannot read.
    File,
    /// The binary at `envoy.path`.
    Envoy,
}

/// Looks at what `config`, read from `file`, needs on this host. It runs the binary at `envoy.path` for its version, and as root
/// asks the kernel, as the units' users, for their access.
pub async fn look(file: &Path, config: &Config) -> Vec<HostProblem> {
    let mut problems = Vec::new();
    let by_units = config.envoy.manage == Manage::Systemd && rustix::process::geteuid().is_root();
    let agent = by_units && exists(AGENT);
    let envoy = by_units && exists(ENVOY);
    if agent {
        let mut files = vec![file.to_owned()];
        files.extend(named_files(config));
        problems.extend(files.iter().filter_map(|file| unreadable(AGENT, file)));
    }
    if envoy && problems.is_empty() {
        problems.extend(unreadable(ENVOY, file));
    }
    // An operator also checks configurations on a machine without Envoy.
    let path = &config.envoy.path;
    // Root runs no program that another user can replace.
    let is_safe_to_run = !rustix::process::geteuid().is_root()
        || path.canonicalize().is_ok_and(|real| programs::is_trusted(&real));
    if path.exists() && is_safe_to_run {
        // An Envoy that takes its time is none that is known to be wrong.
        let answer = timeout(ANSWERS_WITHIN, supervisor::ask_binary(path)).await.unwrap_or(Ok(()));
        match answer {
            Err(what) => problems.push(HostProblem {
                concerns: Concern::Envoy,
                what,
                fix: format!(
                    "put an Envoy for this machine ({}) at {}",
                    std::env::consts::ARCH,
                    path.display()
                ),
            }),
            Ok(()) if envoy => problems.extend(denied(ENVOY, "-x", path).then(|| HostProblem {
                concerns: Concern::Envoy,
                what: format!("the user {ENVOY} may not run {}", path.display()),
                fix: open_way(ENVOY, path, 0o755),
            })),
            Ok(()) => {}
        }
    }
    problems
}

/// Files that the agent reads beside its configuration.
fn named_files(config: &Config) -> Vec<PathBuf> {
    let consul = config.registry.consul.iter().flat_map(|consul| {
        [&consul.token_file, &consul.tls.ca_file, &consul.tls.cert_file, &consul.tls.key_file]
    });
    consul.flatten().cloned().collect()
}

fn unreadable(user: &str, file: &Path) -> Option<HostProblem> {
    // The agent itself reports a missing file when it reads it.
    if !file.exists() || !denied(user, "-r", file) {
        return None;
    }
    let is_secret = fs::metadata(file).is_ok_and(|metadata| {
        use std::os::unix::fs::PermissionsExt;
        metadata.permissions().mode() & 0o007 == 0 && file.extension().is_none_or(|kind| kind != "yaml")
    });
    Some(HostProblem {
        concerns: Concern::File,
        what: format!("the user {user} cannot read {}", file.display()),
        fix: match is_secret {
            true => format!("chgrp {GROUP} {0} && chmod 640 {0}", file.display()),
            false => open_way(user, file, 0o644),
        },
    })
}

/// Returns the command that lets `user` get to `file`: it opens the directory that is in the way, or the file itself.
fn open_way(user: &str, file: &Path, mode: u32) -> String {
    let mut dirs: Vec<&Path> = file.ancestors().skip(1).collect();
    dirs.reverse();
    match dirs.into_iter().find(|dir| denied(user, "-x", dir)) {
        Some(dir) => format!("chmod 755 {}", dir.display()),
        None => format!("chmod {mode:o} {}", file.display()),
    }
}

/// Whether the kernel denies `user` the access that `test` of the shell asks for. Returns false where `setpriv` cannot run.
fn denied(user: &str, access: &str, path: &Path) -> bool {
    // `--check` may be run by root, whose `PATH` another user may be able to write to.
    let Ok(mut command) = programs::command(Path::new("setpriv")).map(|command| command.into_std()) else {
        return false;
    };
    command.args(["--reuid", user, "--regid", GROUP, "--init-groups", "--", "test", access]).arg(path);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // 1 is `test`'s own no.
    command.status().is_ok_and(|status| status.code() == Some(1)) && exists_group()
}

fn exists(user: &str) -> bool {
    names("/etc/passwd", user)
}

fn exists_group() -> bool {
    names("/etc/group", GROUP)
}

fn names(file: &str, name: &str) -> bool {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines().any(|line| line.split(':').next() == Some(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn problems(envoy: &Path) -> Vec<HostProblem> {
        let text = format!(
            "control_plane: [\"http://127.0.0.1:15010\"]\nenvoy: {{path: \"{}\", manage: child}}\n",
            envoy.display()
        );
        let config = Config::parse("agent.yaml", text.as_bytes(), "web-17").unwrap();
        look(Path::new("/no/such.yaml"), &config).await
    }

    #[tokio::test]
    async fn a_binary_that_is_no_envoy_of_this_machine_is_a_problem_and_one_that_is_not_there_is_none() {
        assert_eq!(problems(&vmesh_testkit::envoy::find().unwrap()).await, []);
        assert_eq!(problems(Path::new("/no/such/envoy")).await, []);
        let found = problems(Path::new("/bin/true")).await;
        assert_eq!(found[0].concerns, Concern::Envoy);
        assert!(found[0].what.contains("/bin/true is no Envoy"), "{found:?}");
        assert!(found[0].fix.starts_with("put an Envoy for this machine ("), "{found:?}");
    }
}
