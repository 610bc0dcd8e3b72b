//! `vmesh-agent --config /etc/vmesh/agent.yaml`, and `vmesh-agent envoy` where Envoy has a unit of its own.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use rustix::process::{Resource, Rlimit, setrlimit};
use tracing::{error, info, warn};
use vmesh_agent::config::{Config, EnvoyManager};
use vmesh_agent::credentials::command::{self, TokenSource};
use vmesh_agent::{Agent, hostcheck, identity, supervisor};
use vmesh_daemon::report::{self, one_line};
use vmesh_daemon::{Tasks, descriptors, logs, signals, systemd};

/// The node daemon of vmesh: it feeds the local Envoy from a control plane, and from disk when none answers.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// The configuration.
    #[arg(long, value_name = "FILE", default_value = "/etc/vmesh/agent.yaml", env = "VMESH_AGENT_CONFIG")]
    config: PathBuf,
    /// Read the configuration, print what the agent would do, and exit.
    #[arg(long)]
    check: bool,
    /// With `--check`: print JSON.
    #[arg(long, requires = "check")]
    json: bool,
    /// Print how the host's capture rules would change, and exit. Exit code 3: they would change.
    #[arg(long)]
    dry_run: bool,
}

/// The exit code of `--dry-run` if the host's rules would change.
const DIFFERS: u8 = 3;

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Join the mesh with a token, write the identity of this node, and exit. The agent finds it at its start, or within seconds.
    Join {
        /// The configuration of the agent.
        #[arg(
            long,
            value_name = "FILE",
            default_value = "/etc/vmesh/agent.yaml",
            env = "VMESH_AGENT_CONFIG"
        )]
        config: PathBuf,
        /// The file with the token. Default: `join.token_file` of the configuration.
        #[arg(long, value_name = "FILE", conflicts_with = "stdin")]
        token_file: Option<PathBuf>,
        /// Read the token from standard input.
        #[arg(long)]
        stdin: bool,
    },
    /// Supervise Envoy: start it, restart it after a crash, and replace it without a dropped request (SIGHUP).
    Envoy {
        /// The configuration of the agent.
        #[arg(
            long,
            value_name = "FILE",
            default_value = "/etc/vmesh/agent.yaml",
            env = "VMESH_AGENT_CONFIG"
        )]
        config: PathBuf,
    },
}

fn main() -> ExitCode {
    if let Some(code) = supervisor::step() {
        return code;
    }
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            _ = error.print();
            // `--help` and `--version` are not errors.
            return if error.use_stderr() { report::USAGE.into() } else { ExitCode::SUCCESS };
        }
    };
    let file = match &arguments.command {
        Some(Command::Envoy { config } | Command::Join { config, .. }) => config,
        None => &arguments.config,
    };
    let config = match Config::load(file) {
        Ok(config) => config,
        Err(error) => return report::refused(&error),
    };
    if arguments.check {
        return check(file, &config, arguments.json);
    }
    if arguments.dry_run {
        return dry_run(&config);
    }
    if let Err(error) = logs::init(config.log.as_deref()) {
        return report::refused(&error);
    }
    if config.needs_identity() {
        forbid_core_dumps();
    }
    // Each connection through Envoy takes two file descriptors, and Envoy as a child inherits the limit.
    descriptors::raise_limit();
    // One thread suffices: the agent only passes messages on, and each further thread costs memory on every host of the fleet.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match (runtime, arguments.command) {
        (Ok(runtime), None) => {
            let code = runtime.block_on(run(config));
            // All tasks that must end have ended. Dropping the runtime would also close the ZooKeeper session of a workload that stays
            // registered.
            std::mem::forget(runtime);
            code
        }
        (Ok(runtime), Some(Command::Join { token_file, stdin, .. })) => {
            let source = match (token_file, stdin) {
                (Some(file), _) => TokenSource::File(file),
                (None, true) => TokenSource::StandardInput,
                (None, false) => TokenSource::Configured,
            };
            join(&runtime, &config, &source)
        }
        (Ok(runtime), Some(Command::Envoy { config: file })) => runtime.block_on(run_envoy(&file, config)),
        (Err(error), _) => report::failed(&error),
    }
}

/// Keeps keys out of core dumps: those of this process, and those of an Envoy that this process starts.
fn forbid_core_dumps() {
    // With a limit of 1 the kernel starts no program for core dumps either (core(5)).
    let limit = Rlimit { current: Some(1), maximum: Some(1) };
    if let Err(error) = setrlimit(Resource::Core, limit) {
        warn!("could not turn off core dumps, which may contain keys: {error}");
    }
}

fn join(runtime: &tokio::runtime::Runtime, config: &Config, source: &TokenSource) -> ExitCode {
    match runtime.block_on(command::join(config, source)) {
        Ok(text) => {
            _ = writeln!(std::io::stdout(), "{text}");
            ExitCode::SUCCESS
        }
        Err(error) => report::failed(&error),
    }
}

async fn run(config: Config) -> ExitCode {
    let (withdraws_within, stops_within) = (Agent::withdraws_within(&config), Agent::stops_within(&config));
    // Install these handlers first, since each of these signals kills a process without a handler.
    let ignored = [signals::SIGHUP, signals::SIGUSR1, signals::SIGUSR2];
    let ignored = match signals::ignored(
        &ignored,
        "agent.yaml is read at the start only, and secrets when their files change (SIGHUP is for vmesh-envoy)",
    ) {
        Ok(ignored) => ignored,
        Err(error) => return report::failed(&error),
    };
    let (terminated, agent) = match (signals::terminated(), Agent::start(config).await) {
        (Ok(terminated), Ok(agent)) => (terminated, agent),
        (Err(error), _) => return report::failed(&error),
        (_, Err(error)) => return report::failed(&error),
    };
    let Agent { mut tasks, registrations, status_sources, lock: _lock, state_lock: _state_lock } = agent;
    tasks.spawn("signals", ignored);
    info!(node = &*status_sources.node, "serving");
    systemd::ready("serving");
    let code = match wait_for_exit(terminated, &mut tasks).await {
        DaemonExit::Stop(code) => code,
        // Workloads stay registered, and an Envoy with a unit of its own keeps running: systemd starts the next agent at once.
        DaemonExit::Restart(code) => return code,
    };
    systemd::stopping_within(withdraws_within + stops_within);
    let mut late = registrations.stop_within(withdraws_within).await;
    late.extend(tasks.stop_within(stops_within).await);
    if !late.is_empty() {
        warn!("these tasks did not stop in time: {}", late.join(", "));
    }
    code
}

/// Waits for a signal that ends the daemon, or for the end of a task that should run for ever.
async fn wait_for_exit(terminated: impl Future<Output = signals::Signal>, tasks: &mut Tasks) -> DaemonExit {
    tokio::select! {
        signal = terminated => {
            info!("{signal}: stopping");
            DaemonExit::Stop(ExitCode::SUCCESS)
        }
        (name, result) = tasks.first_exit() => {
            match result {
                Ok(()) if *name == *vmesh_agent::IPV6 => {
                    warn!("this host has gained or lost IPv6: beginning anew, to tell the control planes");
                    return DaemonExit::Restart(report::FAILURE.into());
                }
                Ok(()) => error!("task `{name}` ended, which it never should: stopping"),
                Err(died) => error!("task `{name}` failed: stopping: {}", one_line(&died)),
            }
            DaemonExit::Stop(report::FAILURE.into())
        }
    }
}

/// The two ways in which the daemon ends.
enum DaemonExit {
    Stop(ExitCode),
    /// End as after a crash: the next process takes over what this one leaves.
    Restart(ExitCode),
}

async fn run_envoy(file: &Path, config: Config) -> ExitCode {
    let mut stops_within = supervisor::RunningSupervisor::stops_within(&config);
    // SIGHUP is not among them: it requests a reload.
    let ignored = signals::ignored(&[signals::SIGUSR1, signals::SIGUSR2], "SIGHUP is what reloads");
    let ignored = match ignored {
        Ok(ignored) => ignored,
        Err(error) => return report::failed(&error),
    };
    let (terminated, running) =
        match (signals::terminated(), supervisor::RunningSupervisor::start(file, config)) {
            (Ok(terminated), Ok(running)) => (terminated, running),
            (Err(error), _) => return report::failed(&error),
            (_, Err(error)) => return report::failed(&error),
        };
    let supervisor::RunningSupervisor { mut tasks, status: _status, lock: _lock } = running;
    tasks.spawn("signals", ignored);
    let (DaemonExit::Stop(code) | DaemonExit::Restart(code)) = wait_for_exit(terminated, &mut tasks).await;
    if code != ExitCode::SUCCESS {
        // After an error of our own, Envoy keeps running, and the next supervisor adopts it.
        return code;
    }
    // Each reload reads the settings again, so the drain time may have changed.
    if let Ok(config) = Config::load(file) {
        stops_within = stops_within.max(supervisor::RunningSupervisor::stops_within(&config));
    }
    systemd::stopping_within(stops_within);
    let late = tasks.stop_within(stops_within).await;
    if !late.is_empty() {
        warn!("these tasks did not stop in time: {}", late.join(", "));
    }
    code
}

/// Prints what the agent would do, and the problems of this host that would prevent it. Any problem makes the exit code a failure.
fn check(file: &Path, config: &Config, json: bool) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report::failed(&error),
    };
    let problems = runtime.block_on(hostcheck::check_host(file, config));
    let text = match json {
        true => format!("{}\n", vmesh_agent::outline::outline(config, &problems)),
        false => summary(config),
    };
    // A closed pipe (`| head`) is not an error.
    _ = std::io::stdout().write_all(text.as_bytes());
    for hostcheck::HostProblem { what, fix, .. } in &problems {
        _ = writeln!(std::io::stderr(), "{what}: {fix}");
    }
    if problems.is_empty() { ExitCode::SUCCESS } else { report::FAILURE.into() }
}

fn dry_run(config: &Config) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report::failed(&error),
    };
    match runtime.block_on(vmesh_agent::capture::dry_run(config)) {
        Ok(plan) => {
            _ = std::io::stdout().write_all(plan.as_bytes());
            if vmesh_net::protocol::would_change(&plan) { DIFFERS.into() } else { ExitCode::SUCCESS }
        }
        Err(why) => {
            _ = writeln!(std::io::stderr(), "no plan could be made: {why}");
            report::FAILURE.into()
        }
    }
}

/// Returns the text that `--check` prints.
fn summary(config: &Config) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    let mut line = |name: &str, value: String| _ = writeln!(text, "{name:<14} {value}");
    line("node", config.name.to_string());
    for (index, control_plane) in config.control_planes.iter().enumerate() {
        let kind = if control_plane.is_tls { ", by mTLS" } else { "" };
        line(if index == 0 { "control plane" } else { "" }, format!("{control_plane}{kind}"));
    }
    let manage = match config.envoy.manage {
        EnvoyManager::Child => "started by the agent",
        EnvoyManager::Systemd => "started by systemd",
    };
    line("envoy", format!("{}, {manage}", config.envoy.path.display()));
    line("api", config.api.to_string());
    for (index, workload) in config.workloads.iter().enumerate() {
        let (service, port) = (&workload.service, workload.port);
        let name = if index == 0 { "workloads" } else { "" };
        let Some(listen) = workload.listen else {
            let mtls = config.mtls_address().map(|address| format!(", reached by mTLS at {address}"));
            line(name, format!("{service} on port {port}{}", mtls.unwrap_or_default()));
            continue;
        };
        let beyond = if listen.ip().is_loopback() { "" } else { ", PLAINTEXT beyond this host" };
        line(name, format!("{service} on port {port}, reached at {listen}{beyond}"));
    }
    for plan in &config.registrations {
        line("registered", plan.to_string());
    }
    match &config.upstreams {
        vmesh_model::node::Upstreams::All => {
            line("upstreams", "every service, and a local port for none".to_owned())
        }
        vmesh_model::node::Upstreams::Declared(upstreams) => {
            for (index, upstream) in upstreams.iter().enumerate() {
                let how = match upstream.listen {
                    Some(listen) => format!(" at {listen}"),
                    None if config.capture.outbound() => ", captured".to_owned(),
                    None => " at no local port".to_owned(),
                };
                line(if index == 0 { "upstreams" } else { "" }, format!("{}{how}", upstream.service));
            }
        }
    }
    let capture = &config.capture;
    if capture.outbound() || capture.inbound() {
        line("captured", format!("{capture}, by vmesh-net at {}", capture.socket.display()));
        if config.upstreams == vmesh_model::node::Upstreams::Declared(Vec::new()) && capture.outbound() {
            line("", "no upstreams: nothing is captured but what `Node` documents add; `upstreams: [\"*\"]` is all".to_owned());
        }
    }
    if let Some(dns) = config.dns {
        line("names", format!("below {}, answered at {dns}", config.zone_of_names.suffix));
    }
    line("reports as", identity::build(None));
    text
}
