//! Runs cargo from within cargo.

use std::path::{Path, PathBuf};
use std::process::Command;

use vmesh_testkit::{Failed, Result};

/// Returns the root directory of the workspace.
pub(crate) fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_owned()
}

/// Prints and runs a cargo command in the workspace.
pub(crate) fn cargo(what: &str, args: &[&str]) -> Result<()> {
    cargo_with(what, args, &[])
}

/// Prints and runs a cargo command in the workspace, with these environment variables.
pub(crate) fn cargo_with(what: &str, args: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    run_with(Path::new(&cargo), what, args, environment)
}

/// Prints and runs a program in the workspace.
pub(crate) fn run(program: &Path, what: &str, args: &[&str]) -> Result<()> {
    run_with(program, what, args, &[])
}

fn run_with(program: &Path, what: &str, args: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    let name = program.file_name().unwrap_or_default().display().to_string();
    eprintln!("> {name} {}", args.join(" "));
    // The variables that the outer cargo set for this process would make the inner one rebuild everything.
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name
            .to_str()
            .is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST"))
        {
            command.env_remove(name);
        }
    }
    command.envs(environment.iter().copied());
    let status = command.current_dir(root()).args(args).status();
    let status = status.map_err(Failed::to(format!("could not start {name} to {what}")))?;
    if status.success() {
        Ok(())
    } else {
        Err(Failed::new(format!("could not {what}: {name} ended with {status}")))
    }
}

/// Returns the target directory of the cargo that built this xtask.
pub(crate) fn target() -> Result<PathBuf> {
    let xtask = std::env::current_exe().map_err(Failed::to("could not find the running xtask"))?;
    let target = xtask.ancestors().nth(2).map(Path::to_owned);
    target.ok_or_else(|| Failed::new(format!("{} is not in a target directory", xtask.display())))
}

/// Builds the bench and the programs that it starts, optimised, and runs it.
pub(crate) fn run_bench(name: &str, rest: &[String]) -> Result<()> {
    let mut build = vec!["build", "--profile", "fast"];
    for package in ["vmesh-control", "vmesh-agent", "vmesh-net", "vmesh-bench"] {
        build.extend(["--package", package]);
    }
    cargo("build the bench", &build)?;
    let bench = target()?.join("fast").join(format!("bench-{name}"));
    let status = Command::new(&bench).args(rest).current_dir(root()).status();
    let status = status.map_err(Failed::to(format!("could not start {}", bench.display())))?;
    if status.success() {
        Ok(())
    } else {
        Err(Failed::new(format!("the bench `{name}` ended with {status}")))
    }
}
