//! The agent's status, and the HTTP API that serves it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use http::StatusCode;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::json;
use tokio::sync::watch;
use tower::ServiceExt;
use vmesh_daemon::connections::Gate;
use vmesh_daemon::http::Listener;
use vmesh_daemon::{Stop, metrics};

use vmesh_dns::Zone;
use vmesh_dns::server::Counts;

use crate::capture;
use crate::credentials;
use crate::credentials::status::IdentityStatus;
use crate::destinations::Destinations;
use crate::dns;
use crate::envoy;
use crate::listen::ListenStatus;
use crate::register::{self, RegistrationStatus};

/// The state of the streams to the control planes.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ControlPlaneStatus {
    /// URL of the replica that sends the configuration.
    pub in_use: Option<String>,
    /// Timestamp of the last change of `in_use`.
    #[serde(serialize_with = "optional_epoch_seconds")]
    pub since: Option<SystemTime>,
    /// The reason why no replica is in use.
    pub reason: Option<String>,
    /// Replicas not in use, and whether each one has received this node's report.
    pub reported_to: BTreeMap<String, bool>,
}

/// The configuration that Envoy has accepted.
#[derive(Debug, Clone, Default, Serialize)]
pub struct AcceptedStatus {
    /// Number of resources by type.
    pub resources: BTreeMap<String, usize>,
    pub rejections: u64,
    pub last_rejection: Option<String>,
    /// The resources that Envoy rejects now, with reasons. At most 100.
    pub refused: Vec<String>,
    #[serde(serialize_with = "optional_epoch_seconds")]
    pub last_rejected: Option<SystemTime>,
    /// Time at which the configuration on disk was written. A restart without a control plane serves that one.
    #[serde(serialize_with = "optional_epoch_seconds")]
    pub saved: Option<SystemTime>,
    /// Time at which a control plane last confirmed the configuration.
    #[serde(serialize_with = "optional_epoch_seconds")]
    pub confirmed: Option<SystemTime>,
    /// The configuration comes from the disk, and no control plane has confirmed it since the agent started.
    pub from_disk: bool,
    pub why_not_saved: Option<String>,
}

/// The sources of `/status`. Each channel is published by the task that owns the state.
#[derive(Debug, Clone)]
pub struct StatusSources {
    pub node: Arc<str>,
    /// Status of the listener at `listen.api`.
    pub api: watch::Receiver<ListenStatus>,
    /// Status of the listener at `listen.dns`, if names are answered.
    pub dns: Option<watch::Receiver<ListenStatus>>,
    pub control_plane: watch::Receiver<ControlPlaneStatus>,
    pub accepted: watch::Receiver<AcceptedStatus>,
    pub envoy: watch::Receiver<envoy::EnvoyStatus>,
    pub capture: watch::Receiver<capture::CaptureStatus>,
    pub destinations: watch::Receiver<Arc<Destinations>>,
    pub zone: Zone,
    /// Number of DNS queries by outcome.
    pub queries: Arc<Counts>,
    /// One channel for each workload and registry.
    pub registered: Arc<[watch::Receiver<RegistrationStatus>]>,
    /// The identity of this node, if its configuration needs one.
    pub identity: Option<watch::Receiver<IdentityStatus>>,
}

impl StatusSources {
    /// Returns what Envoy has accepted. While the control plane that confirmed it is connected, the time of confirmation is now, since the
    /// control plane would send any difference.
    fn accepted_now(&self) -> AcceptedStatus {
        let mut accepted = self.accepted.borrow().clone();
        if self.control_plane.borrow().in_use.is_some() && accepted.confirmed.is_some() && !accepted.from_disk
        {
            accepted.confirmed = Some(SystemTime::now());
        }
        accepted
    }

    fn identity_now(&self) -> Option<IdentityStatus> {
        self.identity.as_ref().map(|identity| identity.borrow().clone().at(SystemTime::now()))
    }

    /// Returns why the node is not ready, or `None` if it is.
    fn unready(&self) -> Option<String> {
        let envoy = self.envoy.borrow();
        if envoy.state == envoy::EnvoyState::Live {
            return None;
        }
        let mut why = format!("Envoy is {}", name_of(envoy.state));
        if let Some(reason) = &envoy.reason {
            why += &format!(": {reason}");
        }
        if envoy.state == envoy::EnvoyState::Waiting {
            let control_plane = self.control_plane.borrow();
            match (&control_plane.in_use, &control_plane.reason) {
                (Some(name), _) => why += &format!("; {name} is connected and has sent none"),
                (None, Some(reason)) => why += &format!("; no control plane answers: {reason}"),
                (None, None) => why += "; no control plane has answered",
            }
        }
        Some(why)
    }
}

pub(crate) fn name_of(state: envoy::EnvoyState) -> String {
    // The JSON API uses the same names.
    json!(state).as_str().unwrap_or_default().to_owned()
}

/// Returns the routes of `listen.api`.
pub fn router(sources: StatusSources) -> Router {
    let mut registry = metrics::registry();
    registry.register_collector(Box::new(sources.clone()));
    let registry: Arc<Registry> = Arc::new(registry);
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/status", get(status))
        .route("/names", get(names))
        .route("/metrics", get(async move || metrics::response(&registry)))
        .with_state(sources)
}

/// Serves the API until the daemon stops. Requests in progress are completed.
pub async fn serve(listener: impl Listener, sources: StatusSources, stop: Stop) -> std::io::Result<()> {
    let routes = router(sources);
    let answer = move |request: http::Request<_>| {
        let routes = routes.clone();
        async move {
            match routes.oneshot(request.map(axum::body::Body::new)).await {
                Ok(response) => response,
                Err(never) => match never {},
            }
        }
    };
    let gate = Gate::new(listener.limits());
    vmesh_daemon::http::serve(listener, gate, answer, stop).await
}

async fn ready(State(sources): State<StatusSources>) -> Response {
    match sources.unready() {
        None => "ready\n".into_response(),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn status(State(sources): State<StatusSources>) -> Json<serde_json::Value> {
    Json(json!({
        "node": *sources.node,
        "version": env!("CARGO_PKG_VERSION"),
        "ready": sources.unready().is_none(),
        "why_not_ready": sources.unready(),
        "control_plane": *sources.control_plane.borrow(),
        "accepted": sources.accepted_now(),
        "envoy": *sources.envoy.borrow(),
        "capture": *sources.capture.borrow(),
        "identity": sources.identity_now(),
        "listen": {
            "api": *sources.api.borrow(),
            "dns": sources.dns.as_ref().map(|dns| dns.borrow().clone()),
        },
        "registered": sources.registered.iter().map(|one| one.borrow().clone()).collect::<Vec<_>>(),
    }))
}

/// Returns the addresses of each name: `{"orders.mesh": ["240.17.3.9"]}`.
async fn names(State(sources): State<StatusSources>) -> Json<BTreeMap<String, Vec<IpAddr>>> {
    let (destinations, captures) =
        (sources.destinations.borrow().clone(), dns::is_virtual(&sources.capture.borrow()));
    // Services without a name are logged by the `names` task.
    let (table, _) = dns::table(&sources.zone, &destinations, captures);
    let named = table.iter().map(|(name, addresses)| {
        let v4 = addresses.v4.iter().copied().map(IpAddr::from);
        let all = v4.chain(addresses.v6.iter().copied().map(IpAddr::from));
        (format!("{name}.{}", sources.zone.suffix), all.collect())
    });
    Json(named.collect())
}

/// Collects the metrics at each scrape from the published state, so that the two cannot differ.
impl Collector for StatusSources {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let control_plane = self.control_plane.borrow().clone();
        let accepted = self.accepted_now();
        let envoy = self.envoy.borrow().clone();
        let mut gauge = |name: &str, help: &str, value: f64| {
            ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)
        };
        gauge(
            "vmesh_agent_control_plane_connected",
            "Whether configuration comes from a control plane",
            f64::from(u8::from(control_plane.in_use.is_some())),
        )?;
        let reports = control_plane.reported_to.values().filter(|reported| **reported).count();
        gauge("vmesh_agent_reports", "Other control planes that have this node's report", reports as f64)?;
        if let Some(age) = accepted.confirmed.and_then(age) {
            let help = "How long ago a control plane last confirmed the configuration";
            gauge("vmesh_agent_config_age_seconds", help, age.as_secs_f64())?;
        }
        if let Some(age) = accepted.saved.and_then(age) {
            gauge("vmesh_agent_cache_age_seconds", "Age of the configuration on disk", age.as_secs_f64())?;
        }
        let failing = count_failing(&self.registered);
        gauge("vmesh_agent_registrations_failing", "Registrations that a registry does not take", failing)?;
        let live = f64::from(u8::from(envoy.state == envoy::EnvoyState::Live));
        gauge("vmesh_agent_envoy_live", "Whether Envoy is live", live)?;
        let capture = self.capture.borrow().clone();
        let flag = |is: bool| f64::from(u8::from(is));
        gauge("vmesh_agent_capture_wanted", "Whether connections are to be captured", flag(capture.wanted))?;
        gauge("vmesh_agent_capture_active", "Whether they are captured now", flag(capture.captures))?;
        let net = capture.net.unwrap_or_default();
        let trial = flag(net.trial.is_some());
        gauge("vmesh_agent_capture_on_trial", "Whether a change of capture waits to be confirmed", trial)?;
        let reverted = flag(net.reverted.is_some());
        gauge("vmesh_agent_capture_reverted", "Whether a change of capture was taken back", reverted)?;
        let bypassed = flag(net.state == vmesh_net::protocol::State::Bypassed);
        gauge("vmesh_agent_capture_bypassed", "Whether the host is out of the mesh by its bypass", bypassed)?;
        let help = "Changes of vmesh's rules by others, mended since vmesh-net began";
        gauge("vmesh_agent_capture_drift", help, net.drift.count as f64)?;
        let mut counter = |name: &str, help: &str, value: u64| {
            ConstCounter::new(value).encode(encoder.encode_descriptor(
                name,
                help,
                None::<&Unit>,
                MetricType::Counter,
            )?)
        };
        counter("vmesh_agent_rejections", "Configurations that Envoy rejected", accepted.rejections)?;
        counter("vmesh_agent_envoy_restarts", "How often Envoy ended by itself", envoy.restarts)?;
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let queries = count(&self.queries.udp) + count(&self.queries.tcp);
        counter("vmesh_agent_dns_queries", "Questions for names", queries)?;
        counter("vmesh_agent_dns_dropped", "Questions that got no answer", count(&self.queries.dropped))?;
        credentials::status::encode(self.identity_now().as_ref(), &mut encoder)?;
        let help = "Resources that Envoy accepted";
        let mut family =
            encoder.encode_descriptor("vmesh_agent_accepted_resources", help, None, MetricType::Gauge)?;
        for (kind, count) in &accepted.resources {
            let labels = [("kind", kind.as_str())];
            ConstGauge::new(*count as f64).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

fn count_failing(registered: &[watch::Receiver<RegistrationStatus>]) -> f64 {
    registered.iter().filter(|one| one.borrow().state == register::RegistrationState::Failing).count() as f64
}

fn age(since: SystemTime) -> Option<Duration> {
    SystemTime::now().duration_since(since).ok()
}

pub(crate) fn epoch_seconds<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())
}

pub(crate) fn from_epoch_seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SystemTime, D::Error> {
    let seconds = u64::deserialize(deserializer)?;
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).ok_or_else(|| serde::de::Error::custom("not a time"))
}

pub(crate) fn optional_epoch_seconds<S: Serializer>(
    time: &Option<SystemTime>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => epoch_seconds(time, serializer),
        None => serializer.serialize_none(),
    }
}
