//! What a developer of vmesh runs.
//!
//! | command | what it does |
//! |---|---|
//! | `cargo xtask demo` | the main job, on this machine, without root: see [`demo`] |
//! | `cargo xtask test` | builds everything and runs every test: see [`test`] |
//! | `cargo xtask bench nodes` | what `Node` documents cost a control plane |
//! | `cargo xtask bench catalogue` | what one changed endpoint costs a control plane, by how many services there are |
//! | `cargo xtask bench fleet` | a fleet of xDS clients against a real control plane, beside a baseline |
//! | `cargo xtask bench capture` | explicit ports, redirects and TPROXY beside no Envoy at all, on hosts that are namespaces |
//! | `cargo xtask bench discovery` | from a registration in a real registry to an xDS client's ACK |
//! | `cargo xtask deny` | checks the dependencies against `deny.toml`: see [`deny`] |
//! | `cargo xtask fuzz` | libFuzzer on everything that reads foreign bytes: see [`fuzz`] |
//! | `cargo xtask hosts up 3` | booted hosts to try things on: see [`hosts`] |
//! | `cargo xtask package` | Debian packages of the node and of the control plane |
//! | `cargo xtask codegen` | writes `vmesh-proto` anew from the pinned Envoy |

mod build;
mod demo;
mod deny;
mod fuzz;
mod hosts;
mod package;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use vmesh_daemon::report;
use vmesh_testkit::Result;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The tour: a control plane, three agents with real Envoys, traffic, changes, a crash.
    Demo(demo::Options),
    /// Builds everything and runs every test; what follows `--` goes to nextest.
    Test {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Measures, and quotes the ratio to a baseline of the same run.
    Bench {
        #[command(subcommand)]
        bench: Bench,
    },
    /// Checks the dependencies: licences, bans, sources, and advisories where `VMESH_ADVISORY_DB` names a database.
    Deny,
    /// Feeds every reader of foreign bytes with inputs that libFuzzer makes; needs a C++ compiler.
    Fuzz(fuzz::Options),
    /// Makes Debian packages.
    Package(package::Options),
    /// Boots hosts with a systemd of their own, to try things on.
    #[command(subcommand)]
    Hosts(hosts::Command),
    /// Writes vmesh-proto's types anew from the Envoy binary that is pinned.
    Codegen,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// N xDS clients against a real control plane over TCP: sync, change to last ACK, CPU, memory, bytes.
    #[command(disable_help_flag = true)]
    Fleet {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// What one changed endpoint in files costs a control plane: CPU, bytes written, write to ACK.
    #[command(disable_help_flag = true)]
    Catalogue {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// What `Node` documents cost a control plane, and how long an edit keeps other changes waiting.
    #[command(disable_help_flag = true)]
    Nodes {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Requests to Envoy by explicit ports, redirects and TPROXY, beside the same past all of it; as root.
    #[command(disable_help_flag = true)]
    Capture {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// From a registration in a real Consul or ZooKeeper to an xDS client's ACK, and what the registry sees.
    #[command(disable_help_flag = true)]
    Discovery {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Demo(options) => demo::run(&options),
        Command::Test { rest } => test::run(&rest),
        Command::Bench { bench: Bench::Catalogue { rest } } => build::run_bench("catalogue", &rest),
        Command::Bench { bench: Bench::Fleet { rest } } => build::run_bench("fleet", &rest),
        Command::Bench { bench: Bench::Nodes { rest } } => build::run_bench("nodes", &rest),
        Command::Bench { bench: Bench::Discovery { rest } } => build::run_bench("discovery", &rest),
        Command::Bench { bench: Bench::Capture { rest } } => build::run_bench("capture", &rest),
        Command::Deny => deny::run(),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Package(options) => package::run(&options),
        Command::Hosts(command) => hosts::run(command),
        Command::Codegen => codegen(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failed) => report::failed(&failed),
    }
}

fn codegen() -> Result<()> {
    let envoy = vmesh_testkit::envoy::find()?;
    let dir = build::root().join("crates/vmesh-proto");
    let manifest = dir.join("codegen/Cargo.toml");
    let manifest = manifest.display().to_string();
    let (envoy, dir) = (envoy.display().to_string(), dir.display().to_string());
    let args = ["run", "--release", "--quiet", "--manifest-path", &manifest, "--", &envoy, &dir];
    build::cargo("generate vmesh-proto", &args)
}
