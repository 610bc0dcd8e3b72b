//! The commands for developers of vmesh.
//!
//! | command | what it does |
//! |---|---|
//! | `cargo xtask demo` | runs the main scenario on this machine, without root: see [`demo`] |
//! | `cargo xtask test` | builds everything and runs every test: see [`test`] |
//! | `cargo xtask bench nodes` | measures the cost of `Node` documents for a control plane |
//! | `cargo xtask bench catalogue` | measures the cost of one changed endpoint for a control plane, by the number of services |
//! | `cargo xtask bench fleet` | measures a fleet of xDS clients against a real control plane, compared with a baseline |
//! | `cargo xtask bench capture` | compares explicit ports, redirects and TPROXY with no Envoy at all, on hosts that are namespaces |
//! | `cargo xtask bench discovery` | measures the time from a registration in a real registry to an xDS client's ACK |
//! | `cargo xtask deny` | checks the dependencies against `deny.toml`: see [`deny`] |
//! | `cargo xtask fuzz` | runs libFuzzer on every parser of untrusted bytes: see [`fuzz`] |
//! | `cargo xtask hosts up 3` | boots hosts for experiments: see [`hosts`] |
//! | `cargo xtask package` | builds Debian packages of the node and of the control plane |
//! | `cargo xtask codegen` | regenerates `vmesh-proto` from the pinned Envoy |

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
    command: XtaskCommand,
}

#[derive(Debug, Subcommand)]
enum XtaskCommand {
    /// Runs the tour: a control plane, three agents with real Envoys, traffic, changes, a crash.
    Demo(demo::DemoOptions),
    /// Builds everything and runs every test; arguments after `--` are passed to nextest.
    Test {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Runs a benchmark, and prints the ratio to a baseline of the same run.
    Bench {
        #[command(subcommand)]
        bench: Bench,
    },
    /// Checks the dependencies: licences, bans, sources, and advisories if `VMESH_ADVISORY_DB` names a
    /// database.
    Deny,
    /// Runs libFuzzer on every parser of untrusted bytes; needs a C++ compiler.
    Fuzz(fuzz::FuzzOptions),
    /// Builds Debian packages.
    Package(package::PackageOptions),
    /// Boots hosts with their own systemd, for experiments.
    #[command(subcommand)]
    Hosts(hosts::HostsCommand),
    /// Regenerates vmesh-proto's types from the pinned Envoy binary.
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
    /// The cost of one changed endpoint in files for a control plane: CPU, bytes written, write to ACK.
    #[command(disable_help_flag = true)]
    Catalogue {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// The cost of `Node` documents for a control plane, and how long an edit delays other changes.
    #[command(disable_help_flag = true)]
    Nodes {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Requests to Envoy by explicit ports, redirects and TPROXY, compared with requests that bypass Envoy;
    /// as root.
    #[command(disable_help_flag = true)]
    Capture {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
    /// Measures the time from a registration in a real Consul or ZooKeeper to an xDS client's ACK, and the load on the
    /// registry.
    #[command(disable_help_flag = true)]
    Discovery {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        rest: Vec<String>,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        XtaskCommand::Demo(options) => demo::run(&options),
        XtaskCommand::Test { rest } => test::run(&rest),
        XtaskCommand::Bench { bench: Bench::Catalogue { rest } } => build::run_bench("catalogue", &rest),
        XtaskCommand::Bench { bench: Bench::Fleet { rest } } => build::run_bench("fleet", &rest),
        XtaskCommand::Bench { bench: Bench::Nodes { rest } } => build::run_bench("nodes", &rest),
        XtaskCommand::Bench { bench: Bench::Discovery { rest } } => build::run_bench("discovery", &rest),
        XtaskCommand::Bench { bench: Bench::Capture { rest } } => build::run_bench("capture", &rest),
        XtaskCommand::Deny => deny::run(),
        XtaskCommand::Fuzz(options) => fuzz::run(&options),
        XtaskCommand::Package(options) => package::run(&options),
        XtaskCommand::Hosts(command) => hosts::run(command),
        XtaskCommand::Codegen => codegen(),
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
