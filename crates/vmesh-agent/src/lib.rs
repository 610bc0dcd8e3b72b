//! The node daemon: it serves xDS to the local Envoy from a control plane, or from its disk when no control plane answers.
//!
//! Start reading at [`Agent::start`].
//!
//! | task              | wakes on                                        | publishes                            |
//! |-------------------|-------------------------------------------------|--------------------------------------|
//! | `control plane`   | its xDS stream, Envoy's requests, a timer       | `watch<ControlPlaneStatus>`, the hub |
//! | `report to <url>` | a change of the control plane in use            | which replicas have the report       |
//! | `xds`             | Envoy's connections to `xds.sock`               | Envoy's requests, to `control plane` |
//! | `cache`           | newly accepted resources, after 200 ms          | `accepted.bin`                       |
//! | `identity`        | the age of the certificates, a 30 s timer       | `watch<NodeCredentials>`, `identity.json` |
//! | `envoy`           | the first configuration, Envoy's exit, a timer  | `watch<EnvoyStatus>`                 |
//! | `envoy output`    | a line that Envoy writes                        | our log                              |
//! | `capture`         | destinations, answers of vmesh-net, a 1 s timer | `watch<CaptureStatus>`, to vmesh-net |
//! | `names`           | destinations, whether they are captured         | the name table that `dns` answers from |
//! | `dns`             | DNS queries                                     | answers                              |
//! | `api`             | HTTP requests                                   | `/status`, `/metrics`, `/readyz`     |
//! | `api socket`      | HTTP requests on `agent.sock`                   | as `api`                             |
//!
//! Workloads that register themselves have tasks of their own, which end before all others: see [`register`].
//!
//! **Invariant:** the agent contains no discovery backend: `cargo tree -p vmesh-agent -e normal` lists neither `vmesh-discovery` nor
//! `vmesh-control`.

pub mod bootstrap;
pub mod cache;
pub mod capture;
pub mod config;
pub mod credentials;
pub mod destinations;
pub mod dns;
pub mod envoy;
pub mod health;
pub mod hostcheck;
pub mod identity;
mod ipv4_only;
pub mod listen;
pub mod outline;
pub mod register;
pub mod relay;
mod reports;
pub mod status;
pub mod supervisor;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use vmesh_daemon::fsx::{self, FileError, LockError};
use vmesh_daemon::{Tasks, sockets, systemd};

pub use config::Config;
use listen::ListenStatus;

/// The name of the task that ends when the host gains or loses IPv6. The agent then exits as after a crash, without draining Envoy, and is
/// started again.
pub const IPV6: &str = "ipv6";

/// A running agent. Its sockets are bound and its files are written, so no start-up error is left.
pub struct Agent {
    pub tasks: Tasks,
    /// The tasks that keep workloads registered. They are stopped first, so that no client dials an Envoy that drains.
    pub registrations: Tasks,
    pub status_sources: status::StatusSources,
    /// Held until the agent exits.
    pub lock: File,
    pub state_lock: File,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("a directory of the agent cannot be used")]
    Directory(#[source] FileError),
    #[error("another vmesh-agent runs with {}: give each agent a `run_dir` of its own", .0.display())]
    InUse(PathBuf),
    #[error("{} (`state_dir`) cannot be used: each agent needs one of its own", .state_dir.display())]
    State {
        state_dir: PathBuf,
        #[source]
        cause: LockError,
    },
    #[error("could not lock {}", .path.display())]
    Lock {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("could not listen on {} for the API", .path.display())]
    Api {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error(transparent)]
    Relay(#[from] relay::RelayError),
    #[error(transparent)]
    Envoy(#[from] envoy::EnvoyError),
}

impl Agent {
    pub async fn start(config: Config) -> Result<Agent, StartError> {
        let config = Arc::new(config);
        let (lock, state_lock) = lock_directories(&config)?;
        // Must run before anything else opens a file: it takes over descriptors by number.
        let inherited = systemd::inherited_sockets();
        let path = config.api_socket();
        let api_socket = sockets::listen(&path).map_err(|cause| StartError::Api { path, cause })?;

        let mut tasks = Tasks::new();
        let (envoy, envoy_status) = watch::channel(envoy::EnvoyStatus::default());
        let (control_plane, control_plane_status) = watch::channel(status::ControlPlaneStatus::default());
        let (accepted, accepted_status) = watch::channel(status::AcceptedStatus::default());
        let withdraws = config.withdraws_on_stop();
        let (registrations, registered) =
            register::spawn(&config.registrations, &config.registry, &config.run_dir, withdraws);
        let (destinations, reached) = watch::channel(Arc::default());
        let (has_all, reached_all) = watch::channel(false);
        let (capture, captured) = watch::channel(capture::CaptureStatus::default());
        let queries = Arc::default();
        let (api, api_listening) = watch::channel(ListenStatus::at(config.api));
        let mut status_sources = status::StatusSources {
            api: api_listening,
            dns: None,
            capture: captured.clone(),
            destinations: reached.clone(),
            zone: config.zone_of_names.clone(),
            queries: Arc::clone(&queries),
            node: config.name.shared(),
            control_plane: control_plane_status,
            accepted: accepted_status,
            envoy: envoy_status,
            registered: registered.into(),
            identity: None,
        };
        let (has_config, config_is_there) = watch::channel(false);
        let build = identity::build(identity::envoy_version(&config.envoy.path).await.as_deref());
        let node = relay::ReportedNode {
            unready: identity::node(&config, &build, false),
            ready: identity::node(&config, &build, true),
        };
        let identity = credentials::task::spawn(&mut tasks, &config);
        if config.needs_identity() {
            status_sources.identity = Some(identity.status.subscribe());
        }
        relay::spawn(
            &mut tasks,
            &config,
            node,
            identity,
            relay::RelayOutputs { control_plane, accepted, has_config, destinations, has_all },
        )?;
        envoy::spawn(&mut tasks, &config, envoy, config_is_there)?;
        capture::spawn(&mut tasks, config.clone(), reached.clone(), reached_all, capture);
        if let Some(address) = config.dns {
            let zone = config.zone_of_names.clone();
            let (_, listening) = dns::spawn(&mut tasks, address, inherited, zone, reached, captured, queries);
            status_sources.dns = Some(listening);
        } else {
            dns::forget_inherited(&inherited);
        }
        let answers = status_sources.clone();
        tasks.spawn_draining("api socket", |stop| status::serve(api_socket, answers, stop));
        let answers = status_sources.clone();
        tasks.spawn_draining("api", |mut stop| async move {
            let address = answers.api.borrow().address;
            let bind = || std::future::ready(vmesh_daemon::listen::tcp(address));
            match listen::keep_trying("the API (`listen.api`)", bind, &api, &mut stop).await {
                Some(listener) => status::serve(listener, answers, stop).await,
                None => Ok(()),
            }
        });
        tasks.spawn("watchdog", vmesh_daemon::systemd::watchdog());
        tasks.spawn(IPV6, async move { config.capture.until_ipv6_changes().await });
        Ok(Agent { tasks, registrations, status_sources, lock, state_lock })
    }

    /// Returns the longest time that withdrawing the registrations may take.
    pub fn withdraws_within(config: &Config) -> Duration {
        config.registry.settle.0 + Duration::from_secs(20)
    }

    /// Returns the longest time that stopping the tasks may take: Envoy's drain, and the wait for its exit.
    pub fn stops_within(config: &Config) -> Duration {
        config.envoy.drain.0 + Duration::from_secs(15)
    }
}

/// Makes the directories of the agent, locks them, and removes leftovers of crashed writers.
fn lock_directories(config: &Config) -> Result<(File, File), StartError> {
    let directories = [&config.run_dir, &config.state_dir];
    for dir in directories {
        fsx::make_private_dir(dir).map_err(StartError::Directory)?;
    }
    let path = config.run_dir.join("agent.lock");
    let run_lock = lock(&path).map_err(|cause| StartError::Lock { path, cause })?;
    let run_lock = run_lock.ok_or_else(|| StartError::InUse(config.run_dir.clone()))?;
    let state_lock = fsx::lock(&config.state_dir.join("lock"))
        .map_err(|cause| StartError::State { state_dir: config.state_dir.clone(), cause })?;
    // Sweep only after locking: from here on, temporary files in these directories belong to this process.
    for dir in directories {
        if let Err(error) = fsx::sweep(dir) {
            tracing::warn!("{}", vmesh_daemon::report::one_line(&error));
        }
    }
    Ok((run_lock, state_lock))
}

/// Locks the file at `path` until the returned handle is dropped. Returns `None` if another process holds the lock. Only this user can open
/// the file, and so only this user can hold the lock, although the group has access to the directory.
pub(crate) fn lock(path: &Path) -> io::Result<Option<File>> {
    match fsx::lock(path) {
        Ok(file) => Ok(Some(file)),
        Err(LockError::Taken { .. }) => Ok(None),
        Err(LockError::Failed { cause, .. }) => Err(cause),
    }
}
