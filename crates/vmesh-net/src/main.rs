//! The `vmesh-net` program: parses its arguments, starts the tasks, and waits for a signal.
//!
//! Usage: `vmesh-net --agent-user vmesh-agent --envoy-user vmesh-envoy`

use std::future::Future;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{error, info, warn};
use vmesh_capture::apply::{Backend, Tools};
use vmesh_capture::facts::HostPaths;
use vmesh_capture::spec::{Account, Unit};
use vmesh_daemon::report::{self, one_line};
use vmesh_daemon::{Tasks, logs, signals, systemd};
use vmesh_model::text::parse_duration;
use vmesh_net::heartbeat::{AgentWatch, HeartbeatTask, TimerStates};
use vmesh_net::keeper::{Keeper, KeeperChannels, Options};
use vmesh_net::probe::{self, ProbeResults, ProbedDirections};
use vmesh_net::server::RequestHandler;
use vmesh_net::status::{KeeperReport, StatusSource};
use vmesh_net::{SOCKET, STATE_DIR, cgroups, rules, server};

/// The time limit of one turn of the keeper. A keeper that takes longer hangs; systemd's watchdog then
/// restarts the process, and the rules stay.
const TURNS_WITHIN: Duration = Duration::from_secs(180);

/// The privileged part of a vmesh node: installs the capture rules that the agent wants, and keeps the host
/// reachable.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The user, by name or number, that may decide what is captured. Its own connections are never captured.
    #[arg(long, value_name = "USER", default_value = "vmesh-agent")]
    agent_user: Account,
    /// Envoy's user, by name or number. Its own connections are excluded from capture, or they would go in
    /// circles.
    #[arg(long, value_name = "USER", default_value = "vmesh-envoy")]
    envoy_user: Account,
    /// A systemd slice whose connections are never captured. The slice must contain a process whenever
    /// something is captured.
    #[arg(long, value_name = "SLICE")]
    slice: Vec<Unit>,
    /// The tool that changes the rules.
    #[arg(long, value_enum, default_value = "auto")]
    backend: BackendChoice,
    /// The socket on which the agent and operators connect.
    #[arg(long, value_name = "PATH", default_value = SOCKET)]
    socket: PathBuf,
    /// The directory of the state and of the bypass flag.
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    state_dir: PathBuf,
    /// How long redirected connections may drain before the redirects are removed.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    drain: Duration,
    /// The log level: error, warn, info, debug or trace.
    #[arg(long, value_name = "LEVEL")]
    log: Option<String>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum BackendChoice {
    /// nftables if it works here, else iptables.
    Auto,
    Nft,
    Iptables,
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            _ = error.print();
            return if error.use_stderr() { report::USAGE.into() } else { ExitCode::SUCCESS };
        }
    };
    if let Err(error) = logs::init(arguments.log.as_deref()) {
        return report::refused(&error);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return report::failed(&error),
    };
    match runtime.block_on(run(arguments)) {
        LastStep::Exit(code) => code,
        LastStep::ExecSuccessor => {
            drop(runtime);
            exec_successor()
        }
    }
}

/// The last step of the process, once all tasks have ended.
enum LastStep {
    Exit(ExitCode),
    /// Executes the program file again, which an upgrade may have replaced. The rules stay.
    ExecSuccessor,
}

/// Runs the future that `make` returns on a thread of its own, where it may block, and waits for its end.
async fn run_on_own_thread<F: Future<Output = ()>>(
    name: &'static str,
    make: impl FnOnce() -> F + Send + 'static,
) -> io::Result<()> {
    let (ended, end) = oneshot::channel();
    let work = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        // The receiver is gone if the process is ending.
        _ = ended.send(runtime.map(|runtime| runtime.block_on(make())));
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(work)?;
    end.await.unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
}

fn exec_successor() -> ExitCode {
    let mut arguments = std::env::args_os();
    // systemd gives the program by its absolute path. A mere name would be looked up on the PATH.
    let program = arguments.next().filter(|program| Path::new(program).is_absolute());
    let program = program.unwrap_or_else(|| "/usr/sbin/vmesh-net".into());
    report::failed(&std::process::Command::new(program).args(arguments).exec())
}

async fn run(arguments: Arguments) -> LastStep {
    let failed = |error: &(dyn std::error::Error + 'static)| LastStep::Exit(report::failed(error));
    let (terminated, mut reload) = match (signals::terminated(), signal(SignalKind::hangup())) {
        (Ok(terminated), Ok(reload)) => (terminated, reload),
        (Err(error), _) | (_, Err(error)) => return failed(&error),
    };
    let (agent, options, socket) = match prepare(arguments).await {
        Ok(prepared) => prepared,
        Err(code) => return LastStep::Exit(code),
    };
    let listener = match server::listen(&socket) {
        Ok(listener) => listener,
        Err(error) => return failed(&error),
    };
    let drain = options.drain;
    let (mut tasks, handover) = start_tasks(options, agent, listener);
    let code = tokio::select! {
        signal = terminated => {
            info!("{signal}: removing the rules of vmesh, then stopping");
            ExitCode::SUCCESS
        }
        _ = reload.recv() => {
            info!("SIGHUP: starting the program again; the rules stay in force");
            handover.send_replace(true);
            // This waits for the keeper, or for another task that ends early.
            _ = tasks.first_exit().await;
            return LastStep::ExecSuccessor;
        }
        (name, result) = tasks.first_exit() => {
            match result {
                Ok(()) => error!("task `{name}` ended unexpectedly: stopping"),
                Err(died) => error!("task `{name}` failed, so vmesh-net stops: {}", one_line(&died)),
            }
            report::FAILURE.into()
        }
    };
    let late = tasks.stop_within(2 * drain + Duration::from_secs(30)).await;
    if !late.is_empty() {
        warn!("these tasks did not stop in time: {}", late.join(", "));
    }
    LastStep::Exit(code)
}

/// Looks up the users, and creates the state directory. Returns the agent's user, the settings of the keeper
/// and the path of the socket.
async fn prepare(arguments: Arguments) -> Result<(u32, Options, PathBuf), ExitCode> {
    let host_paths = HostPaths::default();
    let user = async |account: &Account| host_paths.user_id(account).await;
    let (Some(agent), Some(envoy)) = (user(&arguments.agent_user).await, user(&arguments.envoy_user).await)
    else {
        error!(
            "could not find the user `{}` or the user `{}`; create both with systemd-sysusers, or name others with --agent-user and --envoy-user",
            arguments.agent_user, arguments.envoy_user
        );
        return Err(report::USAGE.into());
    };
    if let Err(error) = std::fs::create_dir_all(&arguments.state_dir) {
        error!("could not create the state directory {}: {error}", arguments.state_dir.display());
        return Err(report::FAILURE.into());
    }
    let options = Options {
        backend: match arguments.backend {
            BackendChoice::Auto => None,
            BackendChoice::Nft => Some(Backend::Nft),
            BackendChoice::Iptables => Some(Backend::Iptables),
        },
        tools: Tools::default(),
        host_paths,
        // The user of vmesh-net is not among them: its connections are captured like any other, which tests
        // the capture.
        users: [agent, envoy].into(),
        slices: arguments.slice.into_iter().collect(),
        state_dir: arguments.state_dir,
        drain: arguments.drain,
    };
    Ok((agent, options, arguments.socket))
}

/// Starts all tasks, with the channels between them. Returns the tasks, and the sender that tells the keeper to
/// leave the rules to the next process.
fn start_tasks(options: Options, agent: u32, listener: UnixListener) -> (Tasks, watch::Sender<bool>) {
    let users = options.users.clone();
    let (probe_sender, probe_results) = watch::channel(ProbeResults::default());
    let (probed_sender, probed) = watch::channel(ProbedDirections::default());
    let (request_sender, requests) = mpsc::channel(16);
    let (check_sender, checks) = mpsc::channel(16);
    let (change_sender, rule_changes) = mpsc::channel(rules::MAX_PENDING);
    let (failure_sender, renewal_failures) = mpsc::channel(1);
    let (handover_sender, handover) = watch::channel(false);
    let (unit_sender, started_units) = mpsc::channel(1);
    let (parent_cgroups, watched_cgroups) = watch::channel(Default::default());
    let (installed, installed_timers) = watch::channel(None);
    let (timers, timer_states) = watch::channel(TimerStates::default());
    let (report, published) = watch::channel(KeeperReport::default());
    let agent_watch = AgentWatch::default();
    let source = StatusSource {
        report: published,
        timers: timer_states.clone(),
        installed: installed_timers.clone(),
        probe_results: probe_results.clone(),
        agent: agent_watch.clone(),
        host_paths: options.host_paths.clone(),
        connections: Arc::default(),
    };
    let channels = KeeperChannels {
        probe_results: probe_results.clone(),
        probed: probed_sender,
        agent: agent_watch.clone(),
        timers: timer_states,
        installed,
        report,
        parent_cgroups,
    };
    let heartbeat = HeartbeatTask {
        installed: installed_timers,
        probe_results,
        looks: checks,
        timers,
        failed: failure_sender,
        agent: agent_watch,
        users: users.clone(),
    };
    let keeper = Keeper::start(options, channels);
    let handler = RequestHandler { agent, keeper: request_sender, looks: check_sender, source };
    let mut tasks = Tasks::new();
    tasks.spawn("envoy probe", probe::watch_envoy(probed, users, probe_sender));
    tasks.spawn("rules", rules::watch(change_sender));
    tasks.spawn("control groups", cgroups::watch(watched_cgroups, unit_sender));
    tasks.spawn("dead-man", heartbeat.run());
    tasks.spawn("socket", server::serve(listener, handler));
    let last_ready = keeper.last_ready();
    // The keeper runs tools one after another, each with a time limit.
    tasks.spawn("watchdog", systemd::watchdog_while(move || last_ready.borrow().elapsed() < TURNS_WITHIN));
    tasks.spawn_draining("keeper", |stop| {
        run_on_own_thread("keeper", move || {
            keeper.run(requests, rule_changes, renewal_failures, started_units, handover, stop)
        })
    });
    (tasks, handover_sender)
}
