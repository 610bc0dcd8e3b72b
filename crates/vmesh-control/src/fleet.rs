//! The fleet owns the connections, admits nodes, and tracks known nodes and the state of each stream.
//!
//! One lock guards the connections. No code compiles, encodes, writes or waits while it holds the lock.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};
use vmesh_api::{NodeCounts, NodeState};
use vmesh_compile::NodeId;
use vmesh_model::node::NodeIdentity;
use vmesh_model::{NodeName, NodeReport, Place, Problem};
use vmesh_proto::envoy::config::core::v3::Node as XdsNode;
use vmesh_xds::server::{Admission, Admitted, FeedControl, Hub, Observer, PeerInfo, Refusal};
use vmesh_xds::{Scope, SessionStatus, State};

use crate::claim;
use crate::compilation::Compilation;
use crate::explain::NodeStatus;
use crate::identity::{IdentityService, node_of};
use crate::known_nodes::{KnownNodes, MAX_FORGOTTEN_PER_ADMISSION};
use crate::metrics::Propagation;
use crate::time::unix_now;
use crate::worlds::{NodeEvent, PublishedWorld};

/// The connections and the known nodes.
pub(crate) struct Fleet {
    hub: Hub,
    worlds: watch::Receiver<PublishedWorld>,
    compiled: watch::Receiver<Arc<Compilation>>,
    reports: mpsc::Sender<NodeEvent>,
    /// Notified when [`FleetState::changes`] gets an entry.
    nodes_changed: Notify,
    went_offline: Notify,
    propagation: Propagation,
    inner: Mutex<FleetState>,
}

struct FleetState {
    connections: BTreeMap<NodeId, Connection>,
    next: NodeId,
    known: KnownNodes,
    /// The names that two hosts share. Each was logged when the conflict began.
    shared_names: BTreeSet<NodeName>,
    changes: NodeChanges,
}

/// The nodes that connected and disconnected since the compiler task last took the changes. A node that did both appears in neither list.
#[derive(Default)]
pub(crate) struct NodeChanges {
    pub(crate) joined: BTreeMap<NodeId, JoinedNode>,
    pub(crate) left: Vec<NodeId>,
}

/// A connected node that is not compiled yet, so its feed has no store.
pub(crate) struct JoinedNode {
    pub(crate) report: Arc<NodeReport>,
    pub(crate) feed: FeedControl,
}

/// The class key of a feed until its node is compiled. No real class has this key.
const NOT_COMPILED: &str = "";

/// One xDS stream.
struct Connection {
    report: Arc<NodeReport>,
    /// The remote address.
    from: Option<IpAddr>,
    feed: FeedControl,
    state: State,
    acked: u64,
}

/// The inputs of a [`Fleet`] that concern nodes: the channel for their reports, and the nodes restored from
/// disk.
pub(crate) struct NodeIntake {
    pub(crate) reports: mpsc::Sender<NodeEvent>,
    pub(crate) known: KnownNodes,
}

impl Fleet {
    pub(crate) fn new(
        hub: Hub,
        worlds: watch::Receiver<PublishedWorld>,
        compiled: watch::Receiver<Arc<Compilation>>,
        nodes: NodeIntake,
    ) -> Fleet {
        let NodeIntake { reports, known } = nodes;
        let inner = FleetState {
            connections: BTreeMap::new(),
            next: 0,
            known,
            shared_names: BTreeSet::new(),
            changes: NodeChanges::default(),
        };
        Fleet {
            hub,
            worlds,
            compiled,
            reports,
            nodes_changed: Notify::new(),
            went_offline: Notify::new(),
            propagation: Propagation::default(),
            inner: Mutex::new(inner),
        }
    }

    fn lock(&self) -> MutexGuard<'_, FleetState> {
        // A panic while the lock is held ends its task, which ends the process. Until then streams continue with their last configuration.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn take_changes(&self) -> NodeChanges {
        std::mem::take(&mut self.lock().changes)
    }

    /// Waits until [`Fleet::take_changes`] has something to return. Cancel-safe.
    pub(crate) async fn nodes_changed(&self) {
        self.nodes_changed.notified().await;
    }

    /// Returns every connection: its id, its node's report, and its state.
    pub(crate) fn connections(&self) -> Vec<(NodeId, Arc<NodeReport>, State)> {
        let inner = self.lock();
        let all = inner.connections.iter();
        all.map(|(id, connection)| (*id, connection.report.clone(), connection.state.clone())).collect()
    }

    /// Returns the connections of the node `name`.
    pub(crate) fn connections_of(&self, name: &NodeName) -> Vec<(NodeId, Arc<NodeReport>, State)> {
        let inner = self.lock();
        let all = inner.known.connections(name).filter_map(|id| Some((id, inner.connections.get(&id)?)));
        all.map(|(id, connection)| (id, connection.report.clone(), connection.state.clone())).collect()
    }

    /// Returns the number of node names that two hosts share.
    pub(crate) fn shared_names(&self) -> usize {
        self.lock().shared_names.len()
    }

    /// Returns a problem for each node name that two hosts share.
    pub(crate) fn problems(&self) -> Vec<Problem> {
        let inner = self.lock();
        let clashes = inner.shared_names.iter().filter_map(|name| Some((name, inner.name_clash(name)?)));
        clashes
            .map(|(name, clash)| {
                Problem::new(Place::file(format!("node {name}")), format!("Node `{name}`"), clash)
            })
            .collect()
    }

    pub(crate) fn counts(&self) -> NodeCounts {
        let inner = self.lock();
        let mut counts = NodeCounts { offline: inner.known.offline(), ..NodeCounts::default() };
        for connections in inner.known.connected() {
            let states = connections.iter().filter_map(|id| inner.connections.get(id));
            match states.map(|connection| node_state(&connection.state)).max() {
                Some(NodeState::Synced) => counts.synced += 1,
                Some(NodeState::Pushing) => counts.pushing += 1,
                Some(NodeState::Rejected) => counts.rejected += 1,
                Some(NodeState::Offline) | None => counts.offline += 1,
            }
        }
        counts
    }

    pub(crate) fn is_connected(&self, name: &NodeName) -> bool {
        self.lock().known.is_connected(name)
    }

    /// Reports whether the node last connected with a certificate.
    fn is_enrolled(&self, name: &NodeName) -> bool {
        let worlds = self.worlds.borrow();
        worlds.world.nodes.get(name).is_some_and(|report| report.identity.is_some())
            || self.connections_of(name).iter().any(|(_, report, _)| report.identity.is_some())
    }

    /// Ends the streams of nodes that are banned, for as long as the future is polled.
    pub(crate) async fn end_banned(self: Arc<Fleet>, mut bans: watch::Receiver<BTreeSet<NodeName>>) {
        while bans.changed().await.is_ok() {
            let banned = bans.borrow_and_update().clone();
            let inner = self.lock();
            let streams = inner.connections.values();
            let feeds: Vec<FeedControl> = streams
                .filter(|connection| banned.contains(&connection.report.name))
                .map(|connection| connection.feed.clone())
                .collect();
            drop(inner);
            feeds.iter().for_each(FeedControl::end);
        }
        std::future::pending().await
    }

    /// Forgets the nodes that have been offline for at least `longer`. Returns their number.
    pub(crate) fn forget_offline_for(&self, longer: Duration) -> usize {
        let gone = self.lock().known.offline_for(longer, unix_now());
        self.forget(gone)
    }

    /// Forgets offline nodes until the queue to the catalog is full. Returns the number of forgotten nodes.
    pub(crate) fn forget(&self, names: impl IntoIterator<Item = NodeName>) -> usize {
        let mut forgotten = 0;
        for name in names {
            let mut inner = self.lock();
            if inner.known.is_connected(&name)
                || self.reports.try_send(NodeEvent::Forget(name.clone())).is_err()
            {
                continue;
            }
            inner.known.forget(&name);
            forgotten += 1;
        }
        forgotten
    }

    /// Forgets nodes that have been offline for longer than the limit, for as long as the future is polled.
    pub(crate) async fn forget_offline(self: Arc<Fleet>) {
        let longest = self.lock().known.limits().forget_offline_after;
        loop {
            tokio::time::sleep(FORGET_INTERVAL.min(longest)).await;
            let forgotten = self.forget_offline_for(longest);
            if forgotten > 0 {
                tracing::info!(
                    "forgot {forgotten} nodes that have been offline for more than {} (`limits.forget_offline_after`)",
                    vmesh_model::text::show_duration(longest)
                );
            }
        }
    }

    /// Waits until a node goes offline. Cancel-safe.
    pub(crate) async fn nodes_went_offline(&self) {
        self.went_offline.notified().await;
    }

    /// Returns the offline nodes, each with the Unix time since which it is offline.
    pub(crate) fn offline_since(&self) -> BTreeMap<NodeName, u64> {
        self.lock().known.all_offline()
    }

    pub(crate) fn propagation(&self) -> &Propagation {
        &self.propagation
    }
}

/// The interval at which the fleet looks for nodes that have been offline for too long.
const FORGET_INTERVAL: Duration = Duration::from_secs(60);

/// Returns the state of a node with one stream in `state`.
fn node_state(state: &State) -> NodeState {
    match state {
        State::Synced => NodeState::Synced,
        State::Pushing => NodeState::Pushing,
        State::Rejected { .. } => NodeState::Rejected,
    }
}

/// Returns the state of a node: the worst of the states of its streams.
pub(crate) fn node_status<'a>(states: impl IntoIterator<Item = &'a State>) -> NodeStatus {
    let mut worst = NodeStatus::default();
    for stream in states {
        let state = node_state(stream);
        if worst.state == NodeState::Offline || state > worst.state {
            let reason = match stream {
                State::Rejected { reason } => Some(reason.to_string()),
                State::Synced | State::Pushing => None,
            };
            worst = NodeStatus { state, reason, ..NodeStatus::default() };
        }
    }
    worst
}

impl FleetState {
    /// Describes the two hosts that share `name`, or returns `None` if they are not two.
    fn name_clash(&self, name: &NodeName) -> Option<String> {
        let ids = self.known.connections(name);
        let mut of_this_name = ids.filter_map(|id| self.connections.get(&id));
        let first = of_this_name.next()?;
        let other = of_this_name.find(|other| first.is_on_another_host(other))?;
        Some(describe_clash(name, first, other))
    }

    /// Describes a live connection from another host with the name of `report`, or returns `None`. Of two hosts with one identity the
    /// newer waits, since one of them has a copy of the other's key.
    fn clash_with(&self, report: &NodeReport, from: Option<IpAddr>) -> Option<String> {
        let ids = self.known.connections(&report.name);
        let others = ids.filter_map(|id| self.connections.get(&id));
        let elsewhere = |other: &&Connection| {
            other.report.identity.is_some()
                && (other.report.address != report.address || is_another_host(other.from, from))
        };
        let other = others.into_iter().find(elsewhere)?;
        let shown = |declared: Option<IpAddr>, from: Option<IpAddr>| match (declared, from) {
            (Some(declared), Some(from)) => format!("{declared} (from {from})"),
            (Some(one), None) | (None, Some(one)) => one.to_string(),
            (None, None) => "an unnamed address".to_owned(),
        };
        Some(format!(
            "two hosts show the certificate of node `{}`: {} is connected, so {} waits; if the key was copied, ban the node and join it again",
            report.name,
            shown(other.report.address, other.from),
            shown(report.address, from)
        ))
    }

    /// Logs a new conflict over a name. Called after each connection of `name` is added or removed.
    fn log_name_clash(&mut self, name: &NodeName) {
        match self.name_clash(name) {
            Some(clash) if self.shared_names.insert(name.clone()) => {
                tracing::warn!(node = %name, "{clash}");
            }
            Some(_) => {}
            None => _ = self.shared_names.remove(name),
        }
    }
}

fn describe_clash(name: &NodeName, one: &Connection, other: &Connection) -> String {
    let shown = |connection: &Connection| {
        let declared = connection.report.address.map(|address| address.to_string());
        let from = connection.from.map(|from| format!("from {from}"));
        match (declared, from) {
            (Some(declared), Some(from)) if from != format!("from {declared}") => {
                format!("{declared} ({from})")
            }
            (Some(declared), _) => declared,
            (None, Some(from)) => format!("one {from}"),
            (None, None) => "an unnamed address".to_owned(),
        }
    };
    format!(
        "two hosts go by the name `{name}`, {} and {}: give each its own `node.name`; until then each is served what it \
         declares",
        shown(one),
        shown(other)
    )
}

impl Connection {
    /// Compares declared and remote addresses, because copies of one host declare the same address. One host
    /// may connect by both IPv4 and IPv6, so remote addresses of different families are not compared.
    fn is_on_another_host(&self, other: &Connection) -> bool {
        self.report.address != other.report.address || is_another_host(self.from, other.from)
    }
}

/// Reports whether two remote addresses are those of two hosts. One host may connect by both IPv4 and IPv6.
fn is_another_host(one: Option<IpAddr>, other: Option<IpAddr>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => one.is_ipv4() == other.is_ipv4() && one != other,
        _ => false,
    }
}

/// The admission of nodes to a [`Fleet`], for the xDS server.
pub(crate) struct NodeAdmission {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) identities: Arc<IdentityService>,
}

impl NodeAdmission {
    /// Returns the rights of the node, as its certificate says. A client without a certificate has none, and may not use the name of a node that has joined.
    fn identity(&self, report: &NodeReport, peer: &PeerInfo) -> Result<Option<NodeIdentity>, Refusal> {
        let node = &report.name;
        let from = peer.address.map(|address| address.ip().to_canonical());
        let denied = |public: String, why: &str| {
            self.identities.deny_admission(node, from, why);
            Err(Refusal::Denied(public))
        };
        let Some(certificate) = &peer.certificate else {
            if peer.is_tls {
                let why = "a node shows its certificate at listen.xds: join with a token first";
                return denied(why.to_owned(), why);
            }
            if self.fleet.is_enrolled(node) {
                let public = format!(
                    "node `{node}` has joined: it connects with its certificate; to end that, stop its agent and run `vmeshctl forget {node}`"
                );
                return denied(public.clone(), &public);
            }
            return Ok(None);
        };
        let (proved, grant) = match node_of(certificate) {
            Ok(identity) => identity,
            Err(why) => return denied("the certificate is not that of a node".to_owned(), &why),
        };
        if proved != *node {
            let why = format!("the certificate is that of node `{proved}`, and the request says `{node}`");
            return denied("node.id is not the node of the certificate".to_owned(), &why);
        }
        if self.identities.is_banned(node) {
            return denied(format!("node `{node}` is banned"), "the node is banned");
        }
        // A grant without labels leaves them to the node's own configuration.
        let labels = if grant.labels.is_empty() { report.labels.clone() } else { grant.labels };
        Ok(Some(NodeIdentity { services: grant.services, labels }))
    }
}

impl Admission for NodeAdmission {
    fn admit(&self, node: &XdsNode, peer: &PeerInfo) -> Result<Admitted, Refusal> {
        let fleet = &self.fleet;
        let mut report = claim::read(node).map_err(|bad| Refusal::Invalid(bad.to_string()))?;
        report.identity = self.identity(&report, peer)?;
        if let Some(identity) = &report.identity {
            report.labels.extend(identity.labels.clone());
        }
        if !fleet.compiled.borrow().is_ready {
            let waiting = fleet.worlds.borrow().waiting.join(", ");
            return Err(Refusal::NotReady(format!("this control plane is starting: it waits for {waiting}")));
        }
        let mut inner = fleet.lock();
        let inner = &mut *inner;
        let origin = peer.origin();
        let from = peer.address.map(|address| address.ip().to_canonical());
        if report.identity.is_some()
            && let Some(clash) = inner.clash_with(&report, from)
        {
            self.identities.deny_admission(&report.name, from, &clash);
            return Err(Refusal::NotReady(clash));
        }
        // At the limit, offline nodes are forgotten in favour of a connecting node.
        for _ in 0..MAX_FORGOTTEN_PER_ADMISSION {
            let Some(name) = inner.known.node_to_forget(&report) else { break };
            if fleet.reports.try_send(NodeEvent::Forget(name.clone())).is_err() {
                break;
            }
            inner.known.forget(&name);
        }
        inner.known.check_limits(&report.name, origin).map_err(|full| Refusal::NotReady(full.to_string()))?;
        if fleet.reports.try_send(NodeEvent::Report(report.clone())).is_err() {
            let why = "this control plane has more reports of nodes than it keeps up with: try again";
            return Err(Refusal::NotReady(why.to_owned()));
        }
        let report = Arc::new(report);
        let feed = fleet.hub.subscribe(NOT_COMPILED, Arc::new(Scope::named([""; 0])));
        let id = inner.next;
        inner.next += 1;
        inner.known.connect(&report, id, origin);
        inner.changes.joined.insert(id, JoinedNode { report: report.clone(), feed: feed.control() });
        let name = report.name.clone();
        let connection = Connection { report, from, feed: feed.control(), state: State::Pushing, acked: 0 };
        inner.connections.insert(id, connection);
        inner.log_name_clash(&name);
        fleet.nodes_changed.notify_one();
        Ok(Admitted { feed, observer: Box::new(ConnectionObserver { fleet: fleet.clone(), id }) })
    }
}

/// Records the state of one connection. Dropping it removes the connection from the fleet.
struct ConnectionObserver {
    fleet: Arc<Fleet>,
    id: NodeId,
}

impl Observer for ConnectionObserver {
    fn on_status(&mut self, status: &SessionStatus) {
        let published = {
            let compiled = self.fleet.compiled.borrow();
            let class = compiled.configuration.node(self.id).map(|config| &config.class);
            class.and_then(|class| compiled.published_at.get(class)).copied()
        };
        let mut inner = self.fleet.lock();
        let Some(connection) = inner.connections.get_mut(&self.id) else { return };
        let refused = match &status.state {
            State::Rejected { reason } if connection.state != status.state => {
                Some((connection.report.name.clone(), reason.clone()))
            }
            _ => None,
        };
        if connection.state != status.state {
            connection.state = status.state.clone();
        }
        let before = std::mem::replace(&mut connection.acked, status.generation_acked);
        drop(inner);
        if let Some((node, reason)) = refused {
            tracing::warn!(%node, %reason, "a node rejected its configuration");
        }
        if let Some((generation, at)) = published
            && before < generation
            && status.generation_acked >= generation
        {
            self.fleet.propagation.observe(at.elapsed());
        }
    }
}

impl Drop for ConnectionObserver {
    fn drop(&mut self) {
        let mut inner = self.fleet.lock();
        let Some(Connection { report, .. }) = inner.connections.remove(&self.id) else { return };
        inner.known.disconnect(&report, self.id, unix_now());
        if inner.changes.joined.remove(&self.id).is_none() {
            inner.changes.left.push(self.id);
        }
        if inner.shared_names.contains(&report.name) {
            inner.log_name_clash(&report.name);
        }
        drop(inner);
        self.fleet.went_offline.notify_one();
        self.fleet.nodes_changed.notify_one();
    }
}
