//! Boots hosts for experiments: `up` keeps them running in the foreground; `exec` and `down` are for another
//! terminal.

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, Subcommand, ValueEnum};
use vmesh_daemon::signals;
use vmesh_testkit::hosts::{Fleet, RunningHost, Suite};
use vmesh_testkit::{Failed, Result, envoy};

#[derive(Debug, Subcommand)]
pub(crate) enum HostsCommand {
    /// Boots hosts h1, h2, .. on a switch of their own, and keeps them until Ctrl-C or `down`.
    Up(UpOptions),
    /// Runs a command on a host, as root.
    Exec {
        host: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
    /// Stops the hosts of every `up`, in any terminal.
    Down,
}

#[derive(Debug, Args)]
pub(crate) struct UpOptions {
    #[arg(default_value_t = 1)]
    count: usize,
    #[arg(long, value_enum, default_value = "bookworm")]
    suite: Release,
    /// Packages to install on each host, made by `cargo xtask package`.
    #[arg(long, value_name = "FILE")]
    deb: Vec<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Release {
    /// Debian 12.
    Bookworm,
    /// Debian 13.
    Trixie,
}

pub(crate) fn run(command: HostsCommand) -> Result<()> {
    match command {
        HostsCommand::Up(up) => run_hosts(&up),
        HostsCommand::Exec { host, command } => exec(&host, &command),
        HostsCommand::Down => stop_hosts(),
    }
}

fn run_hosts(up: &UpOptions) -> Result<()> {
    let suite = match up.suite {
        Release::Bookworm => Suite::Bookworm,
        Release::Trixie => Suite::Trixie,
    };
    let envoy = envoy::find()?;
    let fleet = Fleet::of(suite, &[("/usr/bin/envoy", &envoy)])?;
    let started = Instant::now();
    let mut hosts = Vec::new();
    for number in 1..=up.count {
        let host = fleet.host(&format!("h{number}"))?;
        if !up.deb.is_empty() {
            host.install(&up.deb.iter().map(PathBuf::as_path).collect::<Vec<_>>())?;
        }
        println!("{} {} {} {}", host.name(), host.v4(), host.v6(), host.root().display());
        hosts.push(host);
    }
    println!(
        "up after {:.1} s; `cargo xtask hosts exec h1 COMMAND`; Ctrl-C ends them",
        started.elapsed().as_secs_f64()
    );
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(Failed::to("could not start a runtime"))?;
    runtime.block_on(async {
        let terminated = signals::terminated().map_err(Failed::to("could not listen for signals"))?;
        terminated.await;
        Ok(())
    })
}

fn exec(host: &str, words: &[String]) -> Result<()> {
    let all = RunningHost::all();
    let Some(found) = all.iter().find(|running| running.host == host) else {
        let names: Vec<&str> = all.iter().map(|running| running.host.as_str()).collect();
        return Err(Failed::new(format!(
            "no host `{host}` runs ({}): `cargo xtask hosts up`",
            if names.is_empty() { "none does".to_owned() } else { names.join(", ") }
        )));
    };
    let (program, arguments) = words.split_first().ok_or_else(|| Failed::new("no command"))?;
    let status = found.command(program).args(arguments).status();
    let status = status.map_err(Failed::to(format!("could not run {program} on {host}")))?;
    match status.success() {
        true => Ok(()),
        false => Err(Failed::new(format!("`{}` on {host} ended with {status}", words.join(" ")))),
    }
}

/// Stops only hosts of `up`, because tests run hosts too.
fn stop_hosts() -> Result<()> {
    let mut owners: Vec<u32> = RunningHost::all().into_iter().map(|running| running.owner).collect();
    owners.dedup();
    for owner in owners {
        let name = std::fs::read_to_string(format!("/proc/{owner}/comm")).unwrap_or_default();
        if name.trim() == "xtask" {
            let status = std::process::Command::new("kill").arg(owner.to_string()).status();
            status.map_err(Failed::to(format!("could not signal process {owner}")))?;
        }
    }
    Ok(())
}
