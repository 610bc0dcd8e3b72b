//! Checks of the host for `vmesh-agent --check`: whether the users of the units can read the files that the configuration names, and
//! whether the binary at `envoy.path` is an Envoy. Root can read everything, so checking the text alone would succeed for root where the
//! units fail.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::Serialize;
use tokio::time::timeout;
use vmesh_capture::programs;

use crate::config::{Config, EnvoyManager};
use crate::supervisor;

/// The users of the units, and their group.
const AGENT: &str = "vmesh-agent";
const ENVOY: &str = "vmesh-envoy";
const GROUP: &str = "vmesh";
/// Timeout for the version of the binary at `envoy.path`. The doctor and the DNS tool wait 1.5 s for the whole check.
const ANSWERS_WITHIN: Duration = Duration::from_secs(1);

/// A reason why vmesh would not run on this host with a valid configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HostProblem {
    pub concerns: Concern,
    pub what: String,
    /// The command that fixes the problem, or an instruction if there is no such command.
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

/// Checks what `config`, read from `file`, needs on this host. Runs the binary at `envoy.path` for its version. As root, also checks the
/// access of the units' users.
pub async fn check_host(file: &Path, config: &Config) -> Vec<HostProblem> {
    let mut problems = Vec::new();
    let by_units = config.envoy.manage == EnvoyManager::Systemd && rustix::process::geteuid().is_root();
    let agent = by_units && user_exists(AGENT);
    let envoy = by_units && user_exists(ENVOY);
    if agent {
        let mut files = vec![file.to_owned()];
        files.extend(named_files(config));
        problems.extend(files.iter().filter_map(|file| unreadable(AGENT, file)));
    }
    if envoy && problems.is_empty() {
        problems.extend(unreadable(ENVOY, file));
    }
    // A missing binary is not a problem here: operators also check configurations on machines without Envoy.
    let path = &config.envoy.path;
    // Root must not run a program that another user can replace.
    let is_safe_to_run = !rustix::process::geteuid().is_root()
        || path.canonicalize().is_ok_and(|real| programs::is_trusted(&real));
    if path.exists() && is_safe_to_run {
        // A timeout is not a problem: the binary may just be slow.
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
            Ok(()) if envoy => problems.extend(is_denied(ENVOY, "-x", path).then(|| HostProblem {
                concerns: Concern::Envoy,
                what: format!("the user {ENVOY} may not run {}", path.display()),
                fix: fix_for_access(ENVOY, path, 0o755),
            })),
            Ok(()) => {}
        }
    }
    problems
}

/// Returns the files that the agent reads besides its configuration.
fn named_files(config: &Config) -> Vec<PathBuf> {
    let consul = config.registry.consul.iter().flat_map(|consul| {
        [&consul.token_file, &consul.tls.ca_file, &consul.tls.cert_file, &consul.tls.key_file]
    });
    let token = config.join.iter().filter_map(|join| join.token_file.as_ref());
    consul.flatten().chain(token).cloned().collect()
}

fn unreadable(user: &str, file: &Path) -> Option<HostProblem> {
    // A missing file is reported by the agent itself when it reads the file.
    if !file.exists() || !is_denied(user, "-r", file) {
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
            false => fix_for_access(user, file, 0o644),
        },
    })
}

/// Returns the command that gives `user` access to `file`: it opens the first directory on the path that denies access, or else the file
/// itself.
fn fix_for_access(user: &str, file: &Path, mode: u32) -> String {
    let mut dirs: Vec<&Path> = file.ancestors().skip(1).collect();
    dirs.reverse();
    match dirs.into_iter().find(|dir| is_denied(user, "-x", dir)) {
        Some(dir) => format!("chmod 755 {}", dir.display()),
        None => format!("chmod {mode:o} {}", file.display()),
    }
}

/// Reports whether the kernel denies `user` the access that the shell's `test` checks with the flag `access`. Returns `false` if `setpriv`
/// cannot run.
fn is_denied(user: &str, access: &str, path: &Path) -> bool {
    // Root may run `--check`, and another user may be able to write to directories in root's `PATH`.
    let Ok(mut command) = programs::command(Path::new("setpriv")).map(|command| command.into_std()) else {
        return false;
    };
    command.args(["--reuid", user, "--regid", GROUP, "--init-groups", "--", "test", access]).arg(path);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // `test` itself exits with 1; other codes are errors of `setpriv`.
    command.status().is_ok_and(|status| status.code() == Some(1)) && group_exists()
}

fn user_exists(user: &str) -> bool {
    has_entry("/etc/passwd", user)
}

fn group_exists() -> bool {
    has_entry("/etc/group", GROUP)
}

fn has_entry(file: &str, name: &str) -> bool {
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
        check_host(Path::new("/no/such.yaml"), &config).await
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
