//! Registers workloads in Consul or ZooKeeper, on hosts where nothing else does. (Airbnb's nerve did the same.)
//!
//! A workload is registered only if it has `register`, and once its application is known to be healthy. The agent keeps the health in the
//! registry up to date. A workload drains while `drain_dir` contains a file with its service's name, or a file `all`. At a stop that
//! includes Envoy, the workload is withdrawn first, and Envoy drains after the fleet has had time to learn of that.
//!
//! | task | wakes on | does |
//! |---|---|---|
//! | `health <service>` | a timer | checks the application |
//! | `drain files` | a timer | lists the services that must drain |
//! | `registration of <service> in <registry>` | health, drain files, a timer | keeps the registry's record up to date |

mod consul;
pub(crate) mod record;
mod zookeeper;

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::warn;
use vmesh_daemon::Tasks;
use vmesh_model::text::Time;
use vmesh_model::{Labels, ServiceName};

use crate::health::{self, Health, HealthCheck};
pub use record::Format;
pub(crate) use record::Instance;

/// Interval at which `drain_dir` is read.
const DRAIN_POLL: Duration = Duration::from_millis(500);

/// `registry:` of `agent.yaml`: the registries that workloads can register in.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RegistrySettings {
    pub consul: Option<vmesh_consul::Config>,
    pub zookeeper: Option<vmesh_zookeeper::Config>,
    /// The directory of drain files: a service drains while it contains a file of its name, and all services drain while it contains `all`.
    /// Default: `drain` in `run_dir`.
    pub drain_dir: Option<PathBuf>,
    /// Time that the fleet has to learn of a withdrawal before Envoy drains.
    pub settle: Time,
    /// Decides whether registrations are withdrawn when the agent stops. Default: `withdraw` if Envoy stops with the agent, else `keep`.
    pub on_stop: Option<OnStop>,
}

impl Default for RegistrySettings {
    fn default() -> Self {
        let settle = Time(Duration::from_secs(3));
        RegistrySettings { consul: None, zookeeper: None, drain_dir: None, settle, on_stop: None }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnStop {
    Withdraw,
    /// The registration stays, for an upgrade of the agent: the application goes on, and the next agent takes over.
    Keep,
}

/// `workloads[].register`: how a workload is registered. At least one of `consul` and `zookeeper` is required.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RegisterSettings {
    pub consul: Option<ConsulSettings>,
    pub zookeeper: Option<ZookeeperSettings>,
    /// The registered address. Default: `node.address`.
    pub address: Option<IpAddr>,
    /// The registered port. Default: the workload's port. Set it to the inbound listener's port to have clients call through Envoy.
    pub port: Option<u16>,
    pub weight: Option<u16>,
    pub version: Option<Arc<str>>,
    pub labels: Labels,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConsulSettings {
    pub tags: Vec<String>,
    /// Consul's TTL: an instance becomes critical if the agent does not report for this long.
    pub ttl: Time,
    /// Time after which Consul deregisters a critical instance. Default: never.
    pub gone_after: Option<Time>,
}

impl Default for ConsulSettings {
    fn default() -> Self {
        ConsulSettings { tags: Vec::new(), ttl: Time(Duration::from_secs(30)), gone_after: None }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ZookeeperSettings {
    /// The path of the service, such as `/services/orders`. Missing nodes on it are created.
    pub path: String,
    pub format: Format,
}

/// A workload that registers, with all defaults resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistrationPlan {
    pub(crate) instance: Instance,
    pub(crate) consul: Option<ConsulSettings>,
    pub(crate) zookeeper: Option<ZookeeperSettings>,
    /// The address of the application, and its health check. Without a check, the application counts as healthy.
    pub(crate) application: SocketAddr,
    pub(crate) check: Option<HealthCheck>,
}

/// Writes a line for `--check`, such as `orders as web-17-orders-8080 at 10.0.1.17:8080 in Consul`.
impl fmt::Display for RegistrationPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Instance { service, id, address, port, .. } = &self.instance;
        write!(f, "{service} as {id} at {}", SocketAddr::new(*address, *port))?;
        if self.consul.is_some() {
            f.write_str(" in Consul")?;
        }
        match &self.zookeeper {
            Some(there) => write!(f, " in ZooKeeper, {} ({})", there.path, there.format),
            None => Ok(()),
        }
    }
}

/// The status of one registration, for `/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RegistrationStatus {
    pub service: ServiceName,
    pub registry: &'static str,
    pub state: RegistrationState,
    /// The reason why the registration differs from the configured one.
    pub reason: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RegistrationState {
    /// The application has not been found healthy yet.
    Waiting,
    Registered,
    /// The application is unhealthy. In ZooKeeper, whose records have no health, it is withdrawn.
    #[serde(rename = "ill")]
    Unhealthy,
    Draining,
    Withdrawn,
    /// The registry fails or rejects the request.
    Failing,
}

impl fmt::Display for RegistrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RegistrationState::Waiting => "waiting for the application to be well",
            RegistrationState::Registered => "registered",
            RegistrationState::Unhealthy => "known to be ill",
            RegistrationState::Draining => "draining",
            RegistrationState::Withdrawn => "withdrawn",
            RegistrationState::Failing => "failing",
        })
    }
}

/// The registration that a workload should have at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DesiredState {
    Unknown,
    Healthy,
    Unhealthy,
    Draining,
}

/// The inputs that determine the desired registration.
pub(crate) struct RegistrationInputs {
    service: ServiceName,
    health: watch::Receiver<Health>,
    drained: watch::Receiver<DrainedServices>,
}

impl RegistrationInputs {
    pub(crate) fn desired(&mut self) -> DesiredState {
        let is_drained = self.drained.borrow_and_update().contains(&self.service);
        match *self.health.borrow_and_update() {
            Health::Unknown => DesiredState::Unknown,
            _ if is_drained => DesiredState::Draining,
            Health::Healthy => DesiredState::Healthy,
            Health::Unhealthy => DesiredState::Unhealthy,
        }
    }

    pub(crate) async fn changed(&mut self) {
        tokio::select! {
            _ = self.health.changed() => {}
            _ = self.drained.changed() => {}
        }
    }
}

/// The services that must drain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct DrainedServices(BTreeSet<String>);

impl DrainedServices {
    fn contains(&self, service: &ServiceName) -> bool {
        self.0.contains("all") || self.0.contains(service.as_str())
    }

    fn read(dir: &Path) -> DrainedServices {
        let entries = fs::read_dir(dir).into_iter().flatten();
        DrainedServices(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
    }
}

async fn watch_drain_files(dir: PathBuf, drained: watch::Sender<DrainedServices>) {
    loop {
        let now = DrainedServices::read(&dir);
        drained.send_if_modified(|drained| std::mem::replace(drained, now) != *drained);
        sleep(DRAIN_POLL).await;
    }
}

/// Publishes the status of a registration, and logs its changes.
pub(crate) struct StatusPublisher(watch::Sender<RegistrationStatus>);

impl StatusPublisher {
    pub(crate) fn set(&self, state: RegistrationState, reason: Option<String>) {
        self.0.send_if_modified(|now| {
            let is_news = now.state != state || now.reason != reason;
            if is_news && let Some(why) = &reason {
                warn!("registration of {} in {}: {why}", now.service, now.registry);
            } else if is_news {
                tracing::info!("registration of {} in {}: it is {state}", now.service, now.registry);
            }
            (now.state, now.reason) = (state, reason);
            is_news
        });
    }
}

/// Starts the tasks that maintain the registrations of `plans`. They must be stopped before Envoy is drained.
pub(crate) fn spawn(
    plans: &[RegistrationPlan],
    registry: &RegistrySettings,
    run_dir: &Path,
    withdraw: bool,
) -> (Tasks, Vec<watch::Receiver<RegistrationStatus>>) {
    let (mut tasks, mut known) = (Tasks::new(), Vec::new());
    if plans.is_empty() {
        return (tasks, known);
    }
    let (drained_in, drained) = watch::channel(DrainedServices::default());
    let dir = registry.drain_dir.clone().unwrap_or_else(|| run_dir.join("drain"));
    tasks.spawn("drain files", watch_drain_files(dir, drained_in));
    let settle = registry.settle.0;
    for plan in plans {
        let service = plan.instance.service.clone();
        let (health_in, health) = watch::channel(Health::Healthy);
        if let Some(check) = &plan.check {
            health_in.send_replace(Health::Unknown);
            let name = format!("workload `{service}`");
            let watched = health::watch(name, check.clone(), plan.application, health_in);
            tasks.spawn(format!("health {service}"), watched);
        } else {
            // Kept open, so that receivers wait for ever rather than see a closed channel.
            tasks.spawn(format!("health {service}"), async move {
                health_in.closed().await;
                std::future::pending::<()>().await;
            });
        }
        let mut start = |registry| {
            let registered = RegistrationStatus {
                service: service.clone(),
                registry,
                state: RegistrationState::Waiting,
                reason: None,
            };
            let (report, status) = watch::channel(registered);
            known.push(status);
            let inputs = RegistrationInputs {
                service: service.clone(),
                health: health.clone(),
                drained: drained.clone(),
            };
            (format!("registration of {service} in {registry}"), inputs, StatusPublisher(report))
        };
        if let Some(settings) = &plan.consul {
            let (name, inputs, report) = start("consul");
            let client = vmesh_consul::Client::new(&registry.consul.clone().unwrap_or_default());
            let (instance, settings) = (plan.instance.clone(), settings.clone());
            let leave = withdraw.then_some(settle);
            tasks.spawn_draining(name, move |stop| {
                consul::maintain(client, instance, settings, inputs, report, leave, stop)
            });
        }
        if let (Some(settings), Some(config)) = (&plan.zookeeper, &registry.zookeeper) {
            let (name, inputs, report) = start("zookeeper");
            let (instance, settings, config) = (plan.instance.clone(), settings.clone(), config.clone());
            let leave = withdraw.then_some(settle);
            tasks.spawn_draining(name, move |stop| {
                zookeeper::maintain(config, instance, settings, inputs, report, leave, stop)
            });
        }
    }
    (tasks, known)
}
