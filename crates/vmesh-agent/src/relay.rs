//! Relays xDS between a control plane and Envoy.
//!
//! One task owns the [`Relay`]: it keeps a stream to one control plane, receives Envoy's requests, ACKs and NACKs, and publishes the
//! resources that Envoy is served. [`vmesh_xds::server`] serves Envoy on `xds.sock` from what was published last, whether or not a control
//! plane answers.

mod admission;
mod identity;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, info, warn};
use vmesh_daemon::fsx;
use vmesh_daemon::report::one_line;
use vmesh_daemon::{Stop, Tasks, sockets};
use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_xds::client::{AdsStream, Code};
use vmesh_xds::server::{AdsService, Hub, serve};
use vmesh_xds::{ClientId, Event, Kind, Relay, Resource, Scope, Store};

use crate::cache;
use crate::config::{Config, ControlPlane};
use crate::credentials::client::connect_ads;
use crate::credentials::secrets::SecretReaders;
use crate::destinations::{self, DestinationTracker, Destinations};
use crate::ipv4_only::ipv4_only;
use crate::reports;
use crate::status::{AcceptedStatus, ControlPlaneStatus};
use admission::{DownstreamEvent, EnvoyAdmission};
pub use identity::RelayIdentity;
use identity::SecretServer;
use vmesh_backoff::{Backoff, jitter, shuffle};

/// Timeout for sending a request. A control plane that takes longer is given up.
const SENDS_WITHIN: Duration = Duration::from_secs(5);
/// A stream that lasted this long resets the back-off, whatever ended it.
const LASTING: Duration = Duration::from_secs(5);
/// Delay between an accepted resource and the write to disk, so that a burst is written once.
const SAVES_AFTER: Duration = Duration::from_millis(200);
/// The writer sleeps this many times as long as the last write took, so that writing takes a small share of the time.
const SAVES_AT_MOST: u32 = 20;
/// Upper limit of that sleep.
const SAVES_AT_LAST: Duration = Duration::from_secs(30);
/// If a requested resource is neither on disk nor available from a control plane, Envoy is told after this time that it does not exist.
/// While Envoy waits for one resource, it does not become live.
const STOPS_WAITING_AFTER: Duration = Duration::from_secs(5);
/// An xDS answer comes in several messages without an end mark. An answer counts as complete when no further message has arrived for this
/// duration.
const COMPLETE_AFTER: Duration = Duration::from_secs(1);
/// Upper limit for that, since endpoints may change all the time.
const COMPLETE_AT_LAST: Duration = Duration::from_secs(60);

/// Reason for the end of a stream that the control plane closed because of its age.
const CLOSED_FOR_AGE: &str = "it closed the connection because of its age, as it does with every connection";

/// Largest number of rejected resources that `/status` lists.
const REFUSED_SHOWN: usize = 100;
/// Reason for closing a stream on which the control plane was told of a rejection that is over.
const RECOVERED: &str = "Envoy has accepted what it had rejected, which only a new stream can report";

/// Reason for closing a stream on which the control plane was told otherwise.
const READINESS: &str = "the node's readiness for mTLS has changed, which only a new stream can report";

/// The class of the only node of this hub.
const CLASS: &str = "";

#[derive(Debug, thiserror::Error)]
#[error("could not listen on {} for Envoy", .path.display())]
pub struct RelayError {
    path: PathBuf,
    #[source]
    cause: io::Error,
}

/// The channels on which the relay publishes its state.
pub struct RelayOutputs {
    pub control_plane: watch::Sender<ControlPlaneStatus>,
    pub accepted: watch::Sender<AcceptedStatus>,
    /// True once the relay has a configuration to serve.
    pub has_config: watch::Sender<bool>,
    /// The destinations for which Envoy has listeners.
    pub destinations: watch::Sender<Arc<Destinations>>,
    /// True if all destinations are known. No captured address is given up before that.
    pub has_all: watch::Sender<bool>,
}

/// The node as it is reported to control planes.
#[derive(Debug, Clone)]
pub struct ReportedNode {
    pub unready: Node,
    /// The node as it is reported while its Envoy accepts mTLS connections.
    pub ready: Node,
}

impl ReportedNode {
    fn node(&self, is_mtls_ready: bool) -> Node {
        if is_mtls_ready { self.ready.clone() } else { self.unready.clone() }
    }
}

pub fn spawn(
    tasks: &mut Tasks,
    config: &Config,
    node: ReportedNode,
    identity: RelayIdentity,
    published: RelayOutputs,
) -> Result<(), RelayError> {
    // The lock on the run directory excludes another agent. Envoy may run as another user, and gets access by the directory's group.
    let path = config.xds_socket();
    let listener = sockets::listen(&path).map_err(|cause| RelayError { path, cause })?;
    let ipv6 = !config.capture.report().without_ipv6;
    let mut relay = restore(config, ipv6, node.unready.clone(), &published.accepted);
    if config.capture.outbound() {
        relay.subscribe_local(|resource| destinations::decode(resource).map(drop));
    }
    let mut tracker = config.capture.outbound().then(|| DestinationTracker::new(ipv6));
    if let Some(tracker) = &mut tracker {
        let changed = relay.take_changes();
        tracker.update(changed, |kind, name| relay.in_force(kind, name));
        published.destinations.send_replace(Arc::new(tracker.now().clone()));
    }
    published.has_all.send_replace(is_complete(&relay));
    let hub = Hub::new();
    let (events, downstream) = mpsc::unbounded_channel();
    let (with_secrets, seen_with_secrets) = watch::channel(Arc::new(Scope::all()));
    let secrets = SecretServer::new(identity, with_secrets, &relay);
    let (reported, to_report) = watch::channel(node.node(secrets.is_ready()));
    relay.set_node(node.node(secrets.is_ready()));
    let admission = EnvoyAdmission {
        hub: hub.clone(),
        events,
        streams: AtomicU64::new(0),
        readers: SecretReaders::of(config),
        with_secrets: seen_with_secrets,
    };
    let service = AdsService::new(hub.clone(), admission, crate::identity::build(None));
    // Dropped at the stop, after Envoy has drained.
    tasks.spawn("xds", serve(listener, service, std::future::pending()));

    let (to_save, saves) = watch::channel(Vec::new());
    let (path, name) = (config.cache(), config.name.to_string());
    let saved = published.accepted.clone();
    tasks.spawn_draining("cache", |_| save(path, name, saves, saved));

    if config.control_planes.len() > 1 {
        spawn_reports(tasks, config, &to_report, &secrets, &published);
    }
    let mut replicas = config.control_planes.clone();
    shuffle(&mut replicas);
    tasks.spawn_draining("control plane", |stop| {
        let revision = relay.accepted_revision();
        let driver = RelayDriver {
            relay,
            hub,
            store: None,
            downstream,
            clients: BTreeMap::new(),
            published,
            to_save,
            ipv4_only: !ipv6,
            revision,
            save_at: None,
            stop_waiting_at: None,
            retry_at: None,
            completeness: CompletenessTimer::default(),
            complete_at: None,
            confirm_at: None,
            tracker,
            secrets,
            node,
            reported,
            must_report: false,
            stop,
        };
        driver.run(replicas)
    });
    Ok(())
}

/// Starts a task for each replica, which reports this node to it.
fn spawn_reports(
    tasks: &mut Tasks,
    config: &Config,
    to_report: &watch::Receiver<Node>,
    secrets: &SecretServer,
    published: &RelayOutputs,
) {
    for replica in &config.control_planes {
        let report = reports::report(
            replica.clone(),
            to_report.clone(),
            secrets.credentials().clone(),
            published.control_plane.clone(),
        );
        tasks.spawn(format!("report to {replica}"), report);
    }
}

fn restore(config: &Config, ipv6: bool, node: Node, status: &watch::Sender<AcceptedStatus>) -> Relay {
    let path = config.cache();
    match cache::load(config.name.as_str(), &path) {
        Ok(Some(mut accepted)) => {
            if !config.capture.outbound() {
                // Destinations from a time when this host captured. The agent no longer subscribes to them, so the control plane would
                // never remove them.
                accepted.retain(|resource| resource.kind() != Kind::Local);
            }
            if !ipv6 {
                accepted = ipv4_only(accepted);
            }
            info!(
                resources = count(&accepted).values().sum::<usize>(),
                "serving from {} until a control plane answers",
                path.display()
            );
            let saved = std::fs::metadata(&path).and_then(|metadata| metadata.modified()).ok();
            status.send_modify(|status| {
                status.resources = count(&accepted);
                status.saved = saved;
                status.confirmed = saved;
                status.from_disk = true;
            });
            Relay::restore(node, accepted)
        }
        Ok(None) => Relay::new(node),
        Err(error) => {
            warn!("could not load the saved configuration {}: {}", path.display(), one_line(&error));
            Relay::new(node)
        }
    }
}

fn is_complete(relay: &Relay) -> bool {
    relay.has_all(Kind::Local) && relay.has_all(Kind::Listener)
}

fn count<'a>(accepted: impl IntoIterator<Item = &'a Arc<Resource>>) -> BTreeMap<String, usize> {
    let mut counts: BTreeMap<Kind, usize> = BTreeMap::new();
    for resource in accepted.into_iter().filter(|resource| !resource.is_absent()) {
        *counts.entry(resource.kind()).or_default() += 1;
    }
    counts.into_iter().map(|(kind, count)| (kind.to_string(), count)).collect()
}

/// Writes the latest set of accepted resources to disk, until the sender is dropped.
async fn save(
    path: PathBuf,
    node: String,
    mut saves: watch::Receiver<Vec<Arc<Resource>>>,
    status: watch::Sender<AcceptedStatus>,
) {
    while saves.changed().await.is_ok() {
        let began = Instant::now();
        let accepted = saves.borrow_and_update().clone();
        let (path, node) = (path.clone(), node.clone());
        let written = tokio::task::spawn_blocking(move || {
            fsx::write_atomically(&path, &cache::encode(&node, &accepted), fsx::PRIVATE)
        });
        let why_not = match written.await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(one_line(&error)),
            Err(error) => Some(error.to_string()),
        };
        if let Some(why) = &why_not {
            warn!(
                "could not save the configuration, so a restart without a control plane would serve an older one: {why}"
            );
        }
        status.send_modify(|status| {
            if why_not.is_none() {
                status.saved = Some(SystemTime::now());
            }
            status.why_not_saved = why_not;
        });
        // Each write contains all resources. The rate is limited, because a write may be large and endpoints may change continuously.
        let rest = (began.elapsed() * SAVES_AT_MOST).min(SAVES_AT_LAST);
        let mut differs = false;
        let changes = async {
            while saves.changed().await.is_ok() {
                differs = true;
            }
        };
        _ = timeout(rest, changes).await;
        if differs {
            saves.mark_changed();
        }
    }
}

/// The daemon was told to stop.
struct StopRequested;

/// Determines when all resources that Envoy subscribes to have arrived.
#[derive(Debug, Default)]
struct CompletenessTimer {
    revision: u64,
    quiet_since: Option<Instant>,
    began: Option<Instant>,
}

impl CompletenessTimer {
    /// Returns the time at which the answer will count as complete if nothing more arrives after `now`. `answered` says whether every
    /// subscription has an answer so far; `revision` changes with each accepted resource.
    fn complete_at(&mut self, answered: bool, revision: u64, now: Instant) -> Option<Instant> {
        if !answered {
            self.quiet_since = None;
            return None;
        }
        if std::mem::replace(&mut self.revision, revision) != revision {
            self.quiet_since = None;
        }
        let quiet_since = *self.quiet_since.get_or_insert(now);
        let began = *self.began.get_or_insert(now);
        Some((quiet_since + COMPLETE_AFTER).min(began + COMPLETE_AT_LAST))
    }
}

struct RelayDriver {
    relay: Relay,
    hub: Hub,
    /// The store that was published last.
    store: Option<Arc<Store>>,
    downstream: mpsc::UnboundedReceiver<DownstreamEvent>,
    clients: BTreeMap<u64, ClientId>,
    published: RelayOutputs,
    to_save: watch::Sender<Vec<Arc<Resource>>>,
    /// The host has no IPv6, so the served configuration may omit addresses that the file contains.
    ipv4_only: bool,
    /// The revision of [`Relay::accepted`] that is saved or about to be saved.
    revision: u64,
    save_at: Option<Instant>,
    stop_waiting_at: Option<Instant>,
    /// Time at which a rejected resource is sent to Envoy again.
    retry_at: Option<std::time::Instant>,
    completeness: CompletenessTimer,
    /// Time at which the answer counts as complete, if nothing more arrives.
    complete_at: Option<Instant>,
    /// Time at which the configuration counts as confirmed although the control plane has sent nothing: it knows the node's versions and
    /// sends only differences.
    confirm_at: Option<Instant>,
    /// Set if outbound connections are captured; otherwise nothing uses destinations.
    tracker: Option<DestinationTracker>,
    secrets: SecretServer,
    node: ReportedNode,
    /// Publishes the node for the replicas that are not in use.
    reported: watch::Sender<Node>,
    /// True if the replica in use does not know of a change of the node, which only a new stream can report.
    must_report: bool,
    stop: Stop,
}

impl RelayDriver {
    /// Keeps a stream to one replica while that replica answers, and switches to the next replica when it fails.
    async fn run(mut self, replicas: Vec<ControlPlane>) {
        self.publish();
        let mut backoff = Backoff::decorrelated(Duration::from_millis(200), Duration::from_secs(5));
        let mut failures = 0;
        for replica in replicas.iter().cycle() {
            if replica.is_tls && self.wait_for_identity(replica).await.is_err() {
                break;
            }
            let began = Instant::now();
            let Ok(why) = self.run_stream(replica).await else { break };
            if began.elapsed() >= LASTING {
                failures = 0;
                backoff.reset();
            }
            failures += 1;
            self.report_disconnect(replica, why, failures == 1);
            // A replica that has not been tried yet is tried almost at once, with some jitter to spread the fleet.
            let pause = if failures < replicas.len() {
                jitter(Duration::from_millis(200))
            } else {
                backoff.next_pause()
            };
            if self.while_serving(sleep(pause)).await.is_err() {
                break;
            }
        }
        // Saves what Envoy accepted just before the stop.
        if self.save_at.is_some() {
            self.save();
        }
    }

    /// Waits until this node has a certificate to show to a control plane.
    async fn wait_for_identity(&mut self, replica: &ControlPlane) -> Result<(), StopRequested> {
        let mut credentials = self.secrets.credentials().clone();
        if credentials.borrow().is_some() {
            return Ok(());
        }
        self.published.control_plane.send_modify(|status| {
            status.since.get_or_insert_with(SystemTime::now);
            status.reason = Some(format!("{replica}: this node has no identity yet, see `identity`"));
        });
        self.while_serving(async move { _ = credentials.wait_for(Option::is_some).await }).await
    }

    fn report_disconnect(&self, replica: &ControlPlane, why: String, news: bool) {
        if why == CLOSED_FOR_AGE || why == RECOVERED || why == READINESS {
            debug!(control_plane = %replica, "opening a new stream: {why}");
        } else if news {
            warn!(control_plane = %replica, "lost the configuration stream: {why}");
        } else {
            debug!(control_plane = %replica, "lost the configuration stream: {why}");
        }
        self.published.control_plane.send_modify(|status| {
            if status.in_use.take().is_some() || status.since.is_none() {
                status.since = Some(SystemTime::now());
            }
            status.reason = Some(format!("{replica}: {why}"));
        });
    }

    /// Takes configuration from `replica` until the stream ends, and returns why it ended.
    async fn run_stream(&mut self, replica: &ControlPlane) -> Result<String, StopRequested> {
        let credentials = self.secrets.credentials().clone();
        let mut stream = match self.while_serving(connect_ads(replica, &credentials)).await? {
            Ok(stream) => stream,
            Err(error) => return Ok(format!("could not connect: {error}")),
        };
        self.must_report = false;
        self.relay.on_connected();
        let ended = self.exchange(replica, &mut stream).await;
        self.relay.on_disconnected();
        // A control plane that did not open a stream for this node has confirmed nothing.
        let was_in_use = self.published.control_plane.borrow().in_use.is_some();
        if was_in_use && self.confirm_at.take().is_none() {
            self.mark_confirmed();
        }
        self.publish_changes();
        ended
    }

    async fn exchange(
        &mut self,
        replica: &ControlPlane,
        stream: &mut AdsStream,
    ) -> Result<String, StopRequested> {
        if let Err(why) = self.send_requests(stream).await {
            return Ok(why);
        }
        match self.while_serving(timeout(SENDS_WITHIN, stream.opened())).await? {
            Ok(Ok(())) => self.report_in_use(replica),
            Ok(Err(failure)) => return Ok(failure.to_string()),
            Err(_) => {
                return Ok(format!(
                    "it takes connections and does not answer for {} s",
                    SENDS_WITHIN.as_secs()
                ));
            }
        }
        loop {
            if let Err(why) = self.send_requests(stream).await {
                return Ok(why);
            }
            tokio::select! {
                response = stream.next() => match response {
                    Ok(response) => {
                        self.relay.on_response(response);
                        self.confirm_at = None;
                        self.mark_confirmed();
                        self.publish_changes();
                    }
                    // The control plane closed the stream without an error.
                    Err(failure) if failure.code == Code::Ok => return Ok(CLOSED_FOR_AGE.to_owned()),
                    Err(failure) => return Ok(failure.to_string()),
                },
                handled = self.handle_next_event() => handled?,
            }
            if self.relay.take_recovered() {
                // xDS has no way to withdraw the earlier NACK on the same stream.
                return Ok(RECOVERED.to_owned());
            }
            if self.must_report {
                return Ok(READINESS.to_owned());
            }
        }
    }

    async fn send_requests(&mut self, stream: &mut AdsStream) -> Result<(), String> {
        while let Some(request) = self.relay.poll_request() {
            match timeout(SENDS_WITHIN, stream.send(&request)).await {
                Ok(Ok(())) => {}
                Ok(Err(failure)) => return Err(failure.to_string()),
                Err(_) => return Err(format!("it takes no request for {} s", SENDS_WITHIN.as_secs())),
            }
        }
        Ok(())
    }

    fn report_in_use(&mut self, replica: &ControlPlane) {
        self.confirm_at = Some(Instant::now() + COMPLETE_AFTER);
        info!(control_plane = %replica, "taking configuration from this control plane");
        self.published.control_plane.send_modify(|status| {
            status.in_use = Some(replica.to_string());
            status.since = Some(SystemTime::now());
            status.reason = None;
        });
    }

    fn mark_confirmed(&mut self) {
        let mut was_from_disk = false;
        self.published.accepted.send_modify(|status| {
            status.confirmed = Some(SystemTime::now());
            was_from_disk = std::mem::take(&mut status.from_disk);
        });
        if was_from_disk && self.ipv4_only {
            self.save_at.get_or_insert_with(|| Instant::now() + SAVES_AFTER);
        }
    }

    /// Runs `work`, and serves Envoy meanwhile.
    async fn while_serving<T>(&mut self, work: impl Future<Output = T>) -> Result<T, StopRequested> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                handled = self.handle_next_event() => handled?,
            }
        }
    }

    /// Waits for the next event other than one from the control plane, and handles it. Cancel-safe.
    async fn handle_next_event(&mut self) -> Result<(), StopRequested> {
        let retry_at = self.retry_at.map(Instant::from_std);
        let wake_at = [self.save_at, self.stop_waiting_at, self.complete_at, self.confirm_at, retry_at];
        let wake_at = wake_at.into_iter().flatten().min();
        let timer = async {
            match wake_at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.stop.requested() => return Err(StopRequested),
            events = self.downstream.recv() => {
                // A starting Envoy sends many events at once.
                let mut next = events;
                while let Some(events) = next {
                    self.on_downstream_event(events);
                    next = self.downstream.try_recv().ok();
                }
            }
            () = self.secrets.credentials_changed() => self.secrets.serve_credentials(&self.hub),
            () = timer => self.on_timer(Instant::now()),
        }
        self.publish_changes();
        Ok(())
    }

    fn on_downstream_event(&mut self, events: DownstreamEvent) {
        match events {
            DownstreamEvent::Connected(number, client) => {
                self.secrets.on_connected(number, client, &self.hub);
                self.clients.insert(number, self.relay.on_client_connected());
            }
            DownstreamEvent::Disconnected(number) => {
                self.secrets.on_disconnected(number);
                if let Some(client) = self.clients.remove(&number) {
                    self.relay.on_client_disconnected(client);
                }
            }
            DownstreamEvent::Event(number, event) => {
                let rejection = match &event {
                    Event::Rejected { resource, reason } => {
                        Some(format!("{} {}: {reason}", resource.kind(), resource.name()))
                    }
                    Event::RemovalRejected { kind, name, reason } => {
                        Some(format!("the removal of {kind} {name}: {reason}"))
                    }
                    _ => None,
                };
                if let Some(rejection) = rejection {
                    warn!("Envoy rejected {rejection}");
                    self.published.accepted.send_modify(|status| {
                        status.rejections += 1;
                        status.last_rejection = Some(rejection);
                        status.last_rejected = Some(SystemTime::now());
                    });
                }
                self.secrets.on_event(number, &event);
                if let Some(client) = self.clients.get(&number) {
                    self.relay.on_client_event(*client, event);
                }
            }
        }
    }

    fn on_timer(&mut self, now: Instant) {
        if self.save_at.is_some_and(|at| at <= now) {
            self.save();
        }
        if self.stop_waiting_at.is_some_and(|at| at <= now) {
            self.stop_waiting_at = None;
            self.relay.stop_waiting();
        }
        if self.confirm_at.is_some_and(|at| at <= now) {
            self.confirm_at = None;
            self.mark_confirmed();
        }
    }

    fn save(&mut self) {
        self.save_at = None;
        let accepted: Vec<_> = self.relay.accepted().cloned().collect();
        self.published.accepted.send_modify(|status| status.resources = count(&accepted));
        // The file keeps its IPv6 addresses until a control plane has confirmed the configuration: the host may have IPv6 again before
        // that.
        if !(self.ipv4_only && self.published.accepted.borrow().from_disk) {
            self.to_save.send_replace(accepted);
        }
    }

    /// Publishes every consequence of the preceding calls to the relay.
    fn publish_changes(&mut self) {
        let secrets = self.secrets.rejections().map(|(name, reason)| (Kind::Secret, name, reason));
        let refused: Vec<_> = secrets
            .chain(self.relay.rejections())
            .take(REFUSED_SHOWN)
            .map(|(kind, name, reason)| format!("{kind} {name}: {reason}"))
            .collect();
        self.published.accepted.send_if_modified(|status| {
            let is_news = status.refused != refused;
            status.refused = refused;
            is_news
        });
        self.retry_at = self.relay.on_timeout(Instant::now().into_std());
        self.publish();
        if self.secrets.update_readiness(&self.relay) {
            let node = self.node.node(self.secrets.is_ready());
            self.relay.set_node(node.clone());
            self.reported.send_replace(node);
            self.must_report = true;
        }
        if self.relay.accepted_revision() != self.revision {
            self.revision = self.relay.accepted_revision();
            self.publish_destinations();
            self.save_at.get_or_insert_with(|| Instant::now() + SAVES_AFTER);
        }
        if !*self.published.has_all.borrow() {
            let now = Instant::now();
            self.complete_at =
                self.completeness.complete_at(is_complete(&self.relay), self.relay.accepted_revision(), now);
            if self.complete_at.is_some_and(|at| at <= now) {
                self.complete_at = None;
                self.published.has_all.send_replace(true);
            }
        }
        let alone = !self.relay.is_connected() && !self.clients.is_empty();
        // Without a control plane, only a configuration that was accepted before is completed. An agent that has none must not tell Envoy
        // that resources do not exist: a running Envoy then keeps its configuration.
        let waits = alone && *self.published.has_config.borrow() && self.relay.store().is_partial();
        self.stop_waiting_at = match (waits, self.stop_waiting_at) {
            (true, None) => Some(Instant::now() + STOPS_WAITING_AFTER),
            (true, set) => set,
            (false, _) => None,
        };
    }

    fn publish_destinations(&mut self) {
        let (changed, relay) = (self.relay.take_changes(), &self.relay);
        let Some(tracker) = &mut self.tracker else { return };
        if tracker.update(changed, |kind, name| relay.in_force(kind, name)) {
            self.published.destinations.send_replace(Arc::new(tracker.now().clone()));
        }
    }

    fn publish(&mut self) {
        let store = self.relay.store();
        if self.store.as_ref().is_some_and(|published| Arc::ptr_eq(published, store)) {
            return;
        }
        self.hub.publish(CLASS, store.clone());
        self.store = Some(store.clone());
        if !*self.published.has_config.borrow() {
            // Listeners are not awaited, since a control plane sends them after Envoy has accepted the clusters.
            let clusters =
                self.relay.accepted().any(|one| one.kind() == Kind::Cluster && &**one.name() == "*");
            self.published.has_config.send_replace(clusters);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_in_parts_is_whole_when_nothing_more_comes() {
        let (mut completeness, start) = (CompletenessTimer::default(), Instant::now());
        let at = |milliseconds: u64| start + Duration::from_millis(milliseconds);
        assert_eq!(completeness.complete_at(false, 0, at(0)), None, "nothing has come");
        // All parts so far are answered; the next one may follow.
        assert_eq!(completeness.complete_at(true, 3, at(100)), Some(at(1100)));
        assert_eq!(completeness.complete_at(false, 3, at(110)), None);
        assert_eq!(completeness.complete_at(true, 7, at(5000)), Some(at(6000)));
        assert_eq!(completeness.complete_at(true, 7, at(5500)), Some(at(6000)));
        // An endpoint changes.
        assert_eq!(completeness.complete_at(true, 8, at(5900)), Some(at(6900)));
        assert_eq!(
            completeness.complete_at(true, 9, at(59_900)),
            Some(at(60_100)),
            "they never cease to come"
        );
    }
}
