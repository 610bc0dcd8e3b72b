//! The commands that inspect or change the host they run on. They need no control plane.

pub(crate) mod capture;
pub(crate) mod dns;
pub(crate) mod doctor;

use std::path::{Path, PathBuf};
use std::process::Command;

use vmesh_capture::programs;
use vmesh_daemon::fetch::FetchError;
use vmesh_daemon::fsx::FileError;
use vmesh_net::client::ClientError;

/// Builds the command for the program `name`, which may be a path. For root, only programs that no other user could have put on the `PATH`
/// are run, and with an empty environment. For other users, the `PATH` is followed by the directories of root's programs.
///
/// # Errors
/// The errors of [`programs::command`].
pub(crate) fn host_command(name: &str) -> std::io::Result<tokio::process::Command> {
    if rustix::process::geteuid().is_root() {
        return programs::command(Path::new(name));
    }
    let mut command = tokio::process::Command::new(name);
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("LC_ALL", "C").env("PATH", format!("{path}:{}", programs::DIRECTORIES));
    Ok(command)
}

/// Does what [`host_command`] does, for callers that block until the program has ended.
pub(crate) fn host_program(name: &str) -> Command {
    match host_command(name) {
        Ok(command) => command.into_std(),
        // A missing program fails to start, and that error names it.
        Err(_) => Command::new(Path::new("/usr/bin").join(name)),
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum HostError {
    #[error(transparent)]
    Net(#[from] ClientError),
    #[error("vmesh-net refused: {0}")]
    Refused(String),
    #[error(
        "could not ask the agent for its names; does it run, and has it names to answer? (`--agent` says where)"
    )]
    Agent(#[source] Box<FetchError>),
    #[error("what answers at {0} is not a vmesh-agent of this version")]
    Foreign(String),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("could not remove {}", .path.display())]
    Remove {
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },
    #[error("{} is left as it is", .path.display())]
    Marks {
        path: PathBuf,
        #[source]
        cause: vmesh_dns::host::HostsBlockError,
    },
    #[error("could not run {command}")]
    Run {
        command: String,
        #[source]
        cause: std::io::Error,
    },
    #[error("{command} failed: {output}")]
    Failed { command: String, output: String },
    #[error("{unit}'s change is taken back, and its files are as they were: {why}")]
    TakenBack { unit: &'static str, why: String },
    #[error("{0}")]
    Cannot(String),
}
