//! From the command line to the tasks, and from a signal to the end.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use clap::Parser;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, watch};
use vmesh_catalog::Catalog;
use vmesh_daemon::{Stop, Tasks, logs, metrics as scrape, report, signals, sockets, systemd};
use vmesh_discovery::{Registrations, SourceConfig, View};
use vmesh_model::{NodeReport, Place, Problem};
use vmesh_xds::server::{AdsService, Hub};

use crate::api;
use crate::config::Config;
use crate::control::{Control, Door};
use crate::discovery::Desk;
use crate::documents::{self, DocumentsView};
use crate::metrics::Scrape;
use crate::overrides::{self, Kept, Overrides};
use crate::persist::{self, Disk, PersistError, part};
use crate::worlds::{self, Known, NodeEvent, Published, Sources};

/// How long streams and answers may take to end.
const DRAIN: Duration = Duration::from_secs(5);

/// How long `--check` waits for a source: longer than a first view waits for names that are looked up.
const FIRST_VIEW: Duration = Duration::from_secs(40);

/// The vmesh control plane.
#[derive(Debug, Parser)]
#[command(name = "vmesh-control", version)]
struct Cli {
    #[arg(long, value_name = "FILE", default_value = "/etc/vmesh/control.yaml")]
    config: PathBuf,

    /// Read the configuration, the sources and the documents, say what is there, and exit.
    #[arg(long)]
    check: bool,
}

/// Why it could not start, or ended.
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

/// Reads everything once and says what is there and what is wrong with it; whether nothing is.
fn check(config: &Config) -> Result<bool, RunError> {
    print!("{}", config.summary());
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(RunError::Runtime)?;
    let mut problems = runtime.block_on(documents::check(config.documents.clone()));
    for source in &config.discovery {
        let view = runtime.block_on(first_view(source.clone()));
        let seen = view.last_good.unwrap_or_default();
        let endpoints: usize = seen.services.values().map(|seen| seen.registration.endpoints.len()).sum();
        println!("{}: {} services, {endpoints} endpoints", source.name(), seen.services.len());
        problems.extend(seen.problems.iter().cloned());
        if let Some(because) = view.stale_because {
            let name = source.name();
            problems.push(Problem::new(Place::file(name.clone()), name, because.to_string()));
        }
    }
    problems.iter().for_each(|problem| eprintln!("{problem}"));
    Ok(problems.is_empty())
}

/// What a source says first, or why it does not.
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

async fn run(config: Config) -> Result<(), RunError> {
    // Sockets first: an address that is taken is an error of the start, and of nothing else.
    let xds = listen(config.listen.xds_plaintext).await?;
    let api_tcp = listen(config.listen.api).await?;
    let disk = Disk::open(&config.state_dir).map_err(RunError::State)?;
    let api_socket = listen_unix(&config.api_socket())?;
    if config.listen.xds.is_some() {
        tracing::warn!("`listen.xds` is not served by this version: agents use `listen.xds_plaintext`");
    }
    let signal = signals::terminated().map_err(RunError::Signals)?;

    let mut tasks = Tasks::new();
    let mut known = Vec::new();
    let kept: Kept = restored(&disk, overrides::PART).unwrap_or_default();
    for source in &config.discovery {
        known.push(start_source(source, &disk, &kept, &mut tasks));
    }
    let sources = Sources::new(known);
    let overrides = Overrides::new(kept, disk.clone());
    let desk = Desk::new(sources.clone(), overrides.clone(), &config.api_socket());
    let mut catalog = Catalog::new(config.discovery.len());
    for report in restored::<Vec<NodeReport>>(&disk, "nodes").unwrap_or_default() {
        catalog.on_node(report);
    }
    let kept = restored(&disk, "documents").unwrap_or_default();
    let (documents_in, documents) = watch::channel(DocumentsView::default());
    let follower = documents::Follower::new(config.documents.clone(), kept);
    let follower = follower.read_once(&documents_in).await;
    tasks.spawn("documents", follower.follow(documents_in));

    let waiting: Arc<[String]> = Arc::from(["discovery".to_owned()]);
    let (published_in, published) = watch::channel(Published { world: catalog.world().clone(), waiting });
    let (reports_in, reports) = mpsc::unbounded_channel::<NodeEvent>();
    let hub = Hub::new();
    let control = Arc::new(Control::new(
        config.trust_domain.clone(),
        hub.clone(),
        published.clone(),
        sources.clone(),
        desk,
        reports_in,
    ));
    let name = format!("vmesh-control/{} {}", env!("CARGO_PKG_VERSION"), host_name());
    let service = AdsService::new(hub, Door(control.clone()), name);
    let mut registry = scrape::registry();
    let counters = service.counters().clone();
    registry.register_collector(Box::new(Scrape { control: Arc::downgrade(&control), counters }));
    let registry = Arc::new(registry);
    tasks.spawn(
        "worlds",
        worlds::publish(catalog, sources.clone(), overrides, documents.clone(), reports, published_in),
    );
    tasks.spawn("compiler", control.clone().compile_on_change());
    tasks.spawn_draining("state", |stop| persist::keep(disk, sources, documents, published, stop));

    tasks.spawn_draining("xds", |stop| vmesh_xds::server::serve(xds, service, stopped(stop)));
    tasks.spawn_draining("api", |stop| {
        serve_http(api_tcp, api::read_only(control.clone(), registry.clone()), stop)
    });
    tasks.spawn_draining("api socket", |stop| {
        serve_http(api_socket, api::full(control.clone(), registry), stop)
    });
    tasks.spawn("watchdog", systemd::watchdog());
    systemd::ready("serving");
    tracing::info!(xds = %config.listen.xds_plaintext, api = %config.listen.api, "vmesh-control has started");

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

/// Follows one source, from its last good state if there is one, and frozen if it was.
fn start_source(source: &SourceConfig, disk: &Disk, kept: &Kept, tasks: &mut Tasks) -> Known {
    let name = source.name();
    let last_good: Option<Registrations> = restored(disk, &part(&name));
    let last_good = last_good.map(Arc::new);
    let (handle, task) = vmesh_discovery::open(source.clone(), last_good.clone(), kept.frozen_since(&name));
    tasks.spawn(format!("discovery {name}"), task);
    Known::new(handle, last_good, source.required(), source.guard().removal_hold())
}

fn restored<T: serde::de::DeserializeOwned>(disk: &Disk, part: &str) -> Option<T> {
    match disk.load(part) {
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

async fn listen(address: std::net::SocketAddr) -> Result<TcpListener, RunError> {
    let listener = TcpListener::bind(address).await;
    listener.map_err(|cause| RunError::Listen { what: address.to_string(), cause })
}

/// A socket that a process left behind is replaced; one that somebody serves is an error.
fn listen_unix(path: &Path) -> Result<UnixListener, RunError> {
    let failed = |cause| RunError::Listen { what: path.display().to_string(), cause };
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(failed(std::io::ErrorKind::AddrInUse.into()));
    }
    sockets::listen(path).map_err(failed)
}

async fn serve_http<L>(listener: L, routes: Router, stop: Stop) -> std::io::Result<()>
where
    L: axum::serve::Listener,
    L::Addr: std::fmt::Debug,
{
    axum::serve(listener, routes).with_graceful_shutdown(stopped(stop)).await
}

async fn stopped(mut stop: Stop) {
    stop.requested().await;
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .unwrap_or_default()
}
