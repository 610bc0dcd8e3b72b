//! Starts the control plane: parses the command line, starts the tasks, and stops them after a signal.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use clap::Parser;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tower::ServiceExt;
use vmesh_catalog::Catalog;
use vmesh_daemon::connections::{self, Gate};
use vmesh_daemon::tasks::{ThreadError, on_own_thread};
use vmesh_daemon::{Stop, Tasks, descriptors, http, listen, logs, report, signals, sockets, systemd};
use vmesh_discovery::{Command, SourceConfig, View};
use vmesh_model::name::InvalidName;
use vmesh_model::{Place, Problem, ServiceName};
use vmesh_xds::server::{AdsService, ConnectionLimits, Hub};

use crate::api;
use crate::audit::AuditLog;
use crate::compilation::{self, Compilation};
use crate::config::Config;
use crate::control::Control;
use crate::discovery::OperatorActions;
use crate::documents::{self, DocumentsView};
use crate::fleet::{Fleet, NodeAdmission, NodeIntake};
use crate::identity::{
    IdentityConfig, IdentityError, IdentityService, IdentityStore, NodeRequests, StoreError, TlsHandshake,
};
use crate::known_nodes::KnownNodes;
use crate::metrics::MetricsCollector;
use crate::overrides::{self, Overrides, SavedOverrides};
use crate::persist::{self, Disk, LoadedPart, PersistError, WriteStatus, source_part};
use crate::worlds::{self, ConfiguredSource, NodeEvent, PublishedWorld, Sources};

/// The deadline for streams and responses to end when the process stops.
const DRAIN: Duration = Duration::from_secs(5);

/// The queue of node reports that wait to be added to a world. A client that connects while it is full is
/// told to retry.
const REPORTS: usize = 10_000;

/// How long `--check` waits for a source. Longer than a first view may wait for DNS lookups.
const FIRST_VIEW: Duration = Duration::from_secs(40);

/// The vmesh control plane.
#[derive(Debug, Parser)]
#[command(name = "vmesh-control", version)]
struct Cli {
    #[arg(long, value_name = "FILE", default_value = "/etc/vmesh/control.yaml")]
    config: PathBuf,

    /// Read the configuration, the sources and the documents, print a summary and the problems, and exit.
    #[arg(long)]
    check: bool,
}

/// The reason why the control plane could not start or ended.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("could not listen on {what}; is another vmesh-control running?")]
    Listen {
        what: String,
        #[source]
        cause: std::io::Error,
    },
    #[error("could not start the runtime")]
    Runtime(#[source] std::io::Error),
    #[error("could not wait for signals")]
    Signals(#[source] std::io::Error),
    #[error("could not open the state")]
    State(#[source] PersistError),
    #[error("could not open the identities in the state directory")]
    IdentityFiles(#[source] StoreError),
    #[error("could not start the certificate authority")]
    Identities(#[source] IdentityError),
    #[error("the task `{name}` ended, and nothing works without it: {why}")]
    Died { name: Arc<str>, why: String },
}

pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            _ = error.print();
            return if error.use_stderr() { report::USAGE.into() } else { ExitCode::SUCCESS };
        }
    };
    let config = match Config::load(&cli.config) {
        Ok(config) => config,
        Err(error) => return report::refused(&error),
    };
    if cli.check {
        return match check(&config) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => report::FAILURE.into(),
            Err(error) => report::failed(&error),
        };
    }
    if let Err(error) = logs::init(config.log.as_deref()) {
        return report::refused(&error);
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report::failed(&RunError::Runtime(error)),
    };
    match runtime.block_on(run(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", report::one_line(&error));
            report::failed(&error)
        }
    }
}

/// Reads all inputs once, and prints a summary and the problems. Returns whether there are none.
fn check(config: &Config) -> Result<bool, RunError> {
    print!("{}", config.summary());
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(RunError::Runtime)?;
    let mut problems = runtime.block_on(documents::check(config.documents.clone()));
    for source in &config.discovery {
        let mut source = source.clone();
        if let SourceConfig::File(config) = &mut source {
            // The operator who runs `--check` reads the files as their own user, so quoting private files
            // reveals nothing.
            config.quotes_private_files = true;
        }
        let view = runtime.block_on(first_view(source.clone()));
        let registrations = view.last_good.unwrap_or_default();
        let endpoints: usize = registrations
            .services
            .values()
            .map(|service_view| service_view.registration.endpoints.len())
            .sum();
        println!("{}: {} services, {endpoints} endpoints", source.name(), registrations.services.len());
        problems.extend(registrations.problems.iter().cloned());
        if let Some(because) = view.stale_because.or(view.unusable) {
            let name = source.name();
            problems.push(Problem::new(Place::file(name.clone()), name, because.to_string()));
        }
    }
    problems.iter().for_each(|problem| eprintln!("{problem}"));
    Ok(problems.is_empty())
}

/// Returns the first view of a source, or the reason why it does not answer.
async fn first_view(source: SourceConfig) -> View {
    let (handle, task) = vmesh_discovery::open(source, None, None);
    let mut views = handle.views;
    let answered = |view: &View| view.last_good.is_some() || view.stale_because.is_some();
    tokio::select! {
        () = task => View::default(),
        view = views.wait_for(answered) => view.map(|view| view.clone()).unwrap_or_default(),
        () = tokio::time::sleep(FIRST_VIEW) => {
            let because = format!("no answer within {} s", FIRST_VIEW.as_secs());
            View { stale_because: Some(because.into()), ..View::default() }
        }
    }
}

/// The sockets on which the control plane serves clients.
struct Sockets {
    xds: TcpListener,
    mtls_xds: Option<TcpListener>,
    api_tcp: std::net::TcpListener,
    api_socket: std::os::unix::net::UnixListener,
}

impl Sockets {
    /// Binds all sockets. Other runtimes serve the API sockets, so those are not registered with this one.
    fn bind(config: &Config) -> Result<Sockets, RunError> {
        let xds = listen_tcp(config.listen.xds_plaintext)?;
        let address = config.listen.api;
        let api_tcp = into_std_listener(listen_tcp(address)?.into_std(), || address.to_string())?;
        let api_socket = listen_unix(&config.api_socket())?;
        let mtls_xds = config.listen.xds.map(listen_tcp).transpose()?;
        Ok(Sockets { xds, mtls_xds, api_tcp, api_socket })
    }
}

/// Starts all tasks, and runs until a signal arrives or a task ends.
async fn run(config: Config) -> Result<(), RunError> {
    let files = descriptors::raise_limit();
    // Signal handlers are installed first: until then such a signal would kill the process.
    let hangups = signal(SignalKind::hangup()).map_err(RunError::Signals)?;
    let ignored = [signals::SIGUSR1, signals::SIGUSR2];
    let ignored = signals::ignored(&ignored, "SIGHUP makes every discovery source read again")
        .map_err(RunError::Signals)?;
    let disk = Disk::open(&config.state_dir).map_err(RunError::State)?;
    // Sockets are bound before any task is started, so that an address in use is reported as a start-up
    // error.
    let Sockets { xds, mtls_xds, api_tcp, api_socket } = Sockets::bind(&config)?;
    let signal = signals::terminated().map_err(RunError::Signals)?;

    let mut tasks = Tasks::new();
    let (audit, audit_writer) = AuditLog::new(&config.state_dir);
    tasks.spawn_draining("audit", |stop| audit_writer.run(stop));
    let identities = open_identities(&config, audit)?;
    tasks.spawn("own certificate", identities.clone().renew_own_certificate());
    tasks.spawn("signals", ignored);
    let saved: SavedOverrides = load_part(&disk, overrides::PART).unwrap_or_default();
    let start = |source| start_source(source, &disk, &saved, &mut tasks);
    let sources = Sources::new(config.discovery.iter().map(start).collect());
    tasks.spawn("reload", reread_on_hangup(hangups, sources.clone()));
    let overrides = Overrides::new(saved, disk.clone());
    let actions = OperatorActions::new(sources.clone(), overrides.clone(), &config.api_socket());
    let limits = config.limits.xds(config.listen.xds_plaintext, files);
    let (catalog, known_nodes) = load_catalog(&config, &disk, limits);
    let saved = load_part(&disk, "documents").unwrap_or_default();
    let (documents_in, documents) = watch::channel(DocumentsView::default());
    let follower = documents::DocumentsFollower::new(config.documents.clone(), saved);
    let follower = follower.read_once(&documents_in).await;
    tasks.spawn("documents", follower.follow(documents_in));

    let waiting: Arc<[String]> = Arc::from(["discovery".to_owned()]);
    let (published_in, published) =
        watch::channel(PublishedWorld { world: catalog.world().clone(), waiting });
    let (reports_in, reports) = mpsc::channel::<NodeEvent>(REPORTS);
    let (written, write_status) = watch::channel(WriteStatus::default());
    let hub = Hub::new();
    let (compiled_in, compiled) = watch::channel(Arc::new(Compilation::new(catalog.world().clone())));
    let nodes = NodeIntake { reports: reports_in, known: known_nodes };
    let fleet = Arc::new(Fleet::new(hub.clone(), published.clone(), compiled.clone(), nodes));
    let control = Arc::new(Control::new(
        identities.clone(),
        published.clone(),
        compiled,
        fleet.clone(),
        sources.clone(),
        actions,
        write_status,
    ));
    let name = format!("vmesh-control/{} {}", env!("CARGO_PKG_VERSION"), host_name());
    let service = AdsService::new(
        hub.clone(),
        NodeAdmission { fleet: fleet.clone(), identities: identities.clone() },
        name,
    );
    let counters = service.counters().clone();
    let mut registry = vmesh_daemon::metrics::registry();
    registry.register_collector(Box::new(MetricsCollector { control: Arc::downgrade(&control), counters }));
    tasks.spawn(
        "worlds",
        worlds::publish(catalog, sources.clone(), overrides, documents.clone(), reports, published_in),
    );
    tasks.spawn("compiler", compilation::run(fleet.clone(), published.clone(), compiled_in, hub));
    let of_state = control.clone();
    tasks.spawn_draining("state", |stop| {
        persist::run(disk, sources, documents, published, of_state, written, stop)
    });
    tasks.spawn("forget nodes", fleet.clone().forget_offline());

    tasks.spawn("bans", fleet.end_banned(identities.bans()));
    let max_age = Some(config.limits.connection_age.0);
    if let (Some(listener), Some(address)) = (mtls_xds, config.listen.xds) {
        let gate = Gate::new(config.limits.xds(address, files));
        spawn_mtls(&mut tasks, listener, &service, &identities, ConnectionLimits { gate, max_age });
    }
    let bounded = ConnectionLimits { gate: Gate::new(limits), max_age };
    tasks.spawn_draining("xds", |stop| {
        vmesh_xds::server::serve_connections(xds, service, bounded, stopped(stop))
    });
    spawn_api(&mut tasks, control, registry, api_tcp, api_socket);
    tasks.spawn("watchdog", systemd::watchdog());
    systemd::ready("serving");
    tracing::info!(xds = %config.listen.xds_plaintext, api = %config.listen.api, "vmesh-control has started");

    run_until_stopped(tasks, signal).await
}

/// Returns the catalog with the names and nodes that were known before a restart.
fn load_catalog(config: &Config, disk: &Disk, limits: connections::Limits) -> (Catalog, KnownNodes) {
    let names: Vec<ServiceName> = load_part(disk, persist::NAMES).unwrap_or_default();
    let mut catalog = Catalog::new(config.discovery.len())
        .with_names(names)
        .with_trust_domain(config.trust_domain.as_str());
    let nodes = disk.load_nodes();
    let known =
        KnownNodes::new(config.limits.nodes(limits), nodes.iter().map(|(report, since)| (report, *since)));
    for (report, _) in nodes {
        catalog.on_node(report);
    }
    (catalog, known)
}

/// Serves xDS, joins and renewals with TLS.
fn spawn_mtls(
    tasks: &mut Tasks,
    listener: TcpListener,
    service: &AdsService,
    identities: &Arc<IdentityService>,
    limits: ConnectionLimits,
) {
    let service = service.with_other_requests(Arc::new(NodeRequests(identities.clone())));
    let handshake = TlsHandshake(identities.clone());
    tasks.spawn_draining("mtls xds", |stop| {
        vmesh_xds::server::serve_after_handshake(listener, handshake, service, limits, stopped(stop))
    });
}

/// Opens the identities of this replica.
fn open_identities(config: &Config, audit: AuditLog) -> Result<Arc<IdentityService>, RunError> {
    let store = IdentityStore::open(&config.state_dir).map_err(RunError::IdentityFiles)?;
    let host = host_name();
    let replica = host.parse().or_else(|_| "control-plane".parse());
    let replica = replica
        .map_err(|error: InvalidName| RunError::Identities(IdentityError::Wrong(error.to_string())))?;
    let identity = IdentityConfig {
        trust_domain: config.trust_domain.clone(),
        replica,
        listen: config.listen.xds,
        insecure: config.listen.insecure_addresses(),
        settings: config.identity.clone(),
    };
    IdentityService::open(identity, store, audit).map_err(RunError::Identities)
}

/// Serves the API over TCP and on the Unix socket.
fn spawn_api(
    tasks: &mut Tasks,
    control: Arc<Control>,
    registry: prometheus_client::registry::Registry,
    api_tcp: std::net::TcpListener,
    api_socket: std::os::unix::net::UnixListener,
) {
    let registry = Arc::new(registry);
    let (reads, all) = (api::read_only(control.clone(), registry.clone()), api::full(control, registry));
    // The API runs on its own threads, so that expensive API requests do not delay xDS.
    tasks.spawn_draining("api", |stop| async move {
        on_own_thread(
            "api",
            move || async move { serve_http(TcpListener::from_std(api_tcp)?, reads, stop).await },
        )
        .await
        .map_err(ServeError::Thread)?
        .map_err(ServeError::Serve)
    });
    tasks.spawn_draining("api socket", |stop| async move {
        on_own_thread("api socket", move || async move {
            serve_http(tokio::net::UnixListener::from_std(api_socket)?, all, stop).await
        })
        .await
        .map_err(ServeError::Thread)?
        .map_err(ServeError::Serve)
    });
}

/// Runs until a signal arrives or a task ends, and then stops the remaining tasks.
async fn run_until_stopped<S: std::fmt::Debug>(
    mut tasks: Tasks,
    signal: impl Future<Output = S>,
) -> Result<(), RunError> {
    let outcome = tokio::select! {
        signal = signal => {
            tracing::info!(?signal, "stopping");
            Ok(())
        }
        (name, result) = tasks.first_exit() => {
            let why = result.err().map_or_else(|| "it returned".to_owned(), |died| died.to_string());
            Err(RunError::Died { name, why })
        }
    };
    systemd::stopping();
    let late = tasks.stop_within(DRAIN).await;
    if !late.is_empty() {
        tracing::warn!("still running after {} s and abandoned: {}", DRAIN.as_secs(), late.join(", "));
    }
    outcome
}

/// Makes every discovery source read again at each SIGHUP. Documents in a directory are read every 2 s
/// anyway, secrets at their next use, and `control.yaml` only at the start.
async fn reread_on_hangup(mut hangups: Signal, sources: Sources) {
    while hangups.recv().await.is_some() {
        tracing::info!(
            "SIGHUP: every discovery source is read again; control.yaml is read at the start only"
        );
        for known in sources.all() {
            // A full queue already contains a request to read, or commands of an operator.
            if let Err(full) = known.handle.commands.try_send(Command::ReadAgain) {
                tracing::warn!(
                    "discovery source `{}` is not read again: {full}; send SIGHUP again",
                    known.name()
                );
            }
        }
    }
    std::future::pending().await
}

/// Starts a discovery source from its last good state, frozen if it was frozen before.
fn start_source(
    source: &SourceConfig,
    disk: &Disk,
    kept: &SavedOverrides,
    tasks: &mut Tasks,
) -> ConfiguredSource {
    let name = source.name();
    let last_good = log_load(&source_part(&name), disk.load_source(&name));
    let (handle, task) = vmesh_discovery::open(source.clone(), last_good.clone(), kept.frozen_since(&name));
    tasks.spawn(format!("discovery {name}"), task);
    ConfiguredSource::new(handle, last_good, source.required(), source.guard().removal_hold())
}

fn load_part<T: serde::de::DeserializeOwned>(disk: &Disk, part: &str) -> Option<T> {
    log_load(part, disk.load(part))
}

/// Logs how a part of the state was loaded, and returns it.
fn log_load<T>(part: &str, loaded: Result<Option<LoadedPart<T>>, PersistError>) -> Option<T> {
    match loaded {
        Ok(Some(loaded)) => {
            let age = loaded.written.elapsed().unwrap_or_default();
            tracing::info!(part, age_seconds = age.as_secs(), "the last good state was loaded");
            Some(loaded.value)
        }
        Ok(None) => None,
        Err(error) => {
            tracing::error!("{}", report::one_line(&error));
            None
        }
    }
}

/// The reason why the API stopped.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("the API could not be served")]
    Thread(#[source] ThreadError),
    #[error("the API could not be served")]
    Serve(#[source] std::io::Error),
}

fn listen_tcp(address: std::net::SocketAddr) -> Result<TcpListener, RunError> {
    listen::tcp(address).map_err(|cause| RunError::Listen { what: address.to_string(), cause })
}

/// Adds the address to the error of a listener that is handed to another runtime.
fn into_std_listener<L>(listener: std::io::Result<L>, what: impl FnOnce() -> String) -> Result<L, RunError> {
    listener.map_err(|cause| RunError::Listen { what: what(), cause })
}

/// Listens on a Unix socket. A socket left by a crashed process is replaced; a socket that a process serves
/// is an error.
fn listen_unix(path: &Path) -> Result<std::os::unix::net::UnixListener, RunError> {
    let failed = |cause| RunError::Listen { what: path.display().to_string(), cause };
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(failed(std::io::ErrorKind::AddrInUse.into()));
    }
    let listener = sockets::listen(path).map_err(failed)?;
    into_std_listener(listener.into_std(), || path.display().to_string())
}

async fn serve_http(listener: impl http::Listener, routes: Router, stop: Stop) -> std::io::Result<()> {
    let answer = move |request: axum::http::Request<_>| {
        let routes = routes.clone();
        async move {
            match routes.oneshot(request.map(Body::new)).await {
                Ok(response) => response,
                Err(never) => match never {},
            }
        }
    };
    let gate = Gate::new(listener.limits());
    http::serve(listener, gate, answer, stop).await
}

async fn stopped(mut stop: Stop) {
    stop.requested().await;
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .unwrap_or_default()
}
