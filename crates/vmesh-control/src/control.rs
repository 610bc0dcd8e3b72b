//! What the control plane is at any moment: the compiled world, and who is connected to it.
//!
//! One lock holds the compiler and the connections together, so that a node is never admitted to a world that it then
//! misses a change of. Nobody waits for I/O under it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{Notify, mpsc, watch};
use vmesh_api::{Explanation, Node, NodeCounts, NodeState, Source, Status};
use vmesh_catalog::World;
use vmesh_compile::{ClassUpdate, Compiler, NodeConfig, compile};
use vmesh_model::{NodeName, NodeReport, Place, Problem, ServiceName};
use vmesh_proto::envoy::config::core::v3::Node as XdsNode;
use vmesh_xds::server::{Admission, Admitted, FeedControl, Hub, Observer, PeerInfo, Publication, Refusal};
use vmesh_xds::{SessionStatus, Snapshot, State};

use crate::claim;
use crate::discovery::Desk;
use crate::explain::{self, Standing};
use crate::known_nodes::{KnownNodes, MAKES_ROOM_FOR};
use crate::metrics::Propagation;
use crate::overrides::unix_now;
use crate::persist::WriteStatus;
use crate::worlds::{NodeEvent, Published, Sources};

/// Everything that the API and the xDS streams share.
pub(crate) struct Control {
    pub(crate) trust_domain: String,
    started: Instant,
    hub: Hub,
    published: watch::Receiver<Published>,
    sources: Sources,
    pub(crate) desk: Desk,
    reports: mpsc::Sender<NodeEvent>,
    /// Whether the last good state is on the disk.
    written: watch::Receiver<WriteStatus>,
    went_offline: Notify,
    inner: Mutex<Inner>,
    propagation: Propagation,
    /// When the last world was taken up that changed what nodes are sent; nanoseconds of Unix time.
    changed_at: AtomicU64,
}

struct Inner {
    /// Set once: from then on there is something to serve, whatever becomes of the sources.
    ready: bool,
    compiler: Compiler,
    connections: BTreeMap<u64, Connection>,
    next: u64,
    known: KnownNodes,
    /// How many connections are in each class, and the classes that were left last, the latest at the end.
    users: BTreeMap<Arc<str>, usize>,
    unused: VecDeque<Arc<str>>,
    /// The names of which it was logged that two hosts have them.
    told: BTreeSet<NodeName>,
    /// When the last store was published, for the time until it is ACKed.
    published_at: BTreeMap<Arc<str>, (u64, Instant)>,
}

/// Classes that are kept though no node is in them: a node that comes back is not worth a compilation, and whoever
/// invents classes costs no more than these.
const UNUSED_CLASSES: usize = 4;

/// One xDS stream.
struct Connection {
    report: Arc<NodeReport>,
    /// The address that it comes from.
    from: Option<IpAddr>,
    feed: FeedControl,
    config: NodeConfig,
    state: State,
    acked: u64,
}

/// Where reports of nodes go, and what is known of nodes at the start.
pub(crate) struct NodeIntake {
    pub(crate) reports: mpsc::Sender<NodeEvent>,
    pub(crate) known: KnownNodes,
}

impl Control {
    pub(crate) fn new(
        trust_domain: String,
        hub: Hub,
        published: watch::Receiver<Published>,
        sources: Sources,
        desk: Desk,
        nodes: NodeIntake,
        written: watch::Receiver<WriteStatus>,
    ) -> Control {
        let NodeIntake { reports, known } = nodes;
        let world = published.borrow().world.clone();
        let inner = Inner {
            ready: false,
            compiler: Compiler::new(world),
            connections: BTreeMap::new(),
            next: 0,
            known,
            users: BTreeMap::new(),
            unused: VecDeque::new(),
            told: BTreeSet::new(),
            published_at: BTreeMap::new(),
        };
        Control {
            trust_domain,
            started: Instant::now(),
            hub,
            published,
            sources,
            desk,
            reports,
            written,
            went_offline: Notify::new(),
            inner: Mutex::new(inner),
            propagation: Propagation::default(),
            changed_at: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A panic under the lock ends its task, which ends the process; until then the last state serves.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Compiles every world that is published, for as long as it is polled.
    pub(crate) async fn compile_on_change(self: Arc<Control>) {
        let mut published = self.published.clone();
        loop {
            let Published { world, waiting } = published.borrow_and_update().clone();
            self.on_world(world, waiting.is_empty());
            if published.changed().await.is_err() {
                return;
            }
        }
    }

    fn on_world(&self, world: Arc<World>, complete: bool) {
        let seen = SystemTime::now();
        let mut inner = self.lock();
        let inner = &mut *inner;
        let update = inner.compiler.update(world);
        if !update.classes.is_empty() || update.regroups() {
            let since = seen.duration_since(UNIX_EPOCH).unwrap_or_default();
            self.changed_at.store(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX), Relaxed);
        }
        inner.ready |= complete;
        let now = Instant::now();
        let mut publication = Publication::new();
        let mut classes: BTreeSet<Arc<str>> =
            update.classes.iter().map(|class| class.class.clone()).collect();
        if update.regroups() || update.classes.iter().any(|class| !class.reshaped.is_empty()) {
            for connection in inner.connections.values_mut() {
                let reshaped = |class: &ClassUpdate| {
                    class.class == connection.config.class
                        && class.reshaped.iter().any(|service| concerns(connection, service))
                };
                if !update.regroups() && !update.classes.iter().any(reshaped) {
                    continue;
                }
                let config = inner.compiler.node(&connection.report);
                if config.class != connection.config.class || config.scope != connection.config.scope {
                    let (class, scope) = (config.class.clone(), config.scope.clone());
                    classes.insert(class.clone());
                    publication = publication.scope(&connection.feed, class, scope);
                }
                connection.config = config;
            }
        }
        let mut left = Vec::new();
        if update.regroups() {
            let mut users: BTreeMap<Arc<str>, usize> = BTreeMap::new();
            for connection in inner.connections.values() {
                *users.entry(connection.config.class.clone()).or_default() += 1;
            }
            left.extend(std::mem::take(&mut inner.users).into_keys().chain(inner.unused.drain(..)));
            left.retain(|class| !users.contains_key(class));
            inner.compiler.retain(&users.keys().cloned().collect());
            inner.users = users;
        }
        for class in classes {
            let Some(store) = inner.compiler.store(&class) else { continue };
            let (generation, at) = (store.generation(), now);
            if inner.published_at.get(&class).is_none_or(|(last, _)| *last != generation) {
                inner.published_at.insert(class.clone(), (generation, at));
            }
            publication = publication.store(class, store);
        }
        // One step for all of it: no stream sees a new route without the cluster that came into its scope with it.
        self.hub.publish_all(publication);
        for class in left {
            inner.published_at.remove(&class);
            self.hub.forget(&class);
        }
    }

    /// After the last connection of a class has gone, or moved to another.
    fn forget_unused(&self, inner: &mut Inner) {
        while inner.unused.len() > UNUSED_CLASSES {
            let Some(class) = inner.unused.pop_front() else { return };
            inner.compiler.forget(&class);
            inner.published_at.remove(&class);
            self.hub.forget(&class);
        }
    }

    pub(crate) fn world(&self) -> Arc<World> {
        self.published.borrow().world.clone()
    }

    /// What keeps it from being ready; empty when it is.
    pub(crate) fn waiting_for(&self) -> Vec<String> {
        if self.lock().ready {
            return Vec::new();
        }
        let waiting = self.published.borrow().waiting.clone();
        if waiting.is_empty() { vec!["the first compilation".to_owned()] } else { waiting.to_vec() }
    }

    /// Every node that is known, and how it stands. The rest of an answer is made of it without the lock.
    pub(crate) fn nodes(&self) -> Vec<(Arc<NodeReport>, Standing)> {
        let world = self.world();
        let inner = self.lock();
        let reports = world.nodes.iter().map(|(name, report)| (name.clone(), report.clone()));
        let mut reports: BTreeMap<NodeName, Arc<NodeReport>> = reports.collect();
        for connection in inner.connections.values() {
            reports.insert(connection.report.name.clone(), connection.report.clone());
        }
        let mut standings = inner.standings();
        let now = unix_now();
        reports
            .into_values()
            .map(|report| {
                let mut standing = standings.remove(&report.name).unwrap_or_default();
                standing.offline_since = inner.known.offline_since(&report.name);
                standing.offline_for = standing.offline_since.map(|since| now.saturating_sub(since));
                (report, standing)
            })
            .collect()
    }

    /// How many names two hosts go by.
    pub(crate) fn shared_names(&self) -> usize {
        self.lock().shared_names().len()
    }

    pub(crate) fn node_counts(&self) -> NodeCounts {
        let mut counts = NodeCounts::default();
        let (standings, offline) = {
            let inner = self.lock();
            (inner.standings(), inner.known.offline())
        };
        for standing in standings.into_values() {
            match standing.state {
                NodeState::Synced => counts.synced += 1,
                NodeState::Pushing => counts.pushing += 1,
                NodeState::Rejected => counts.rejected += 1,
                NodeState::Offline => counts.offline += 1,
            }
        }
        counts.offline += offline;
        counts
    }

    /// Everything that wants mending, each once, sorted by place.
    pub(crate) fn problems(&self) -> Vec<Problem> {
        let world = self.world();
        let inner = self.lock();
        let mut all: BTreeSet<Problem> = world.problems.iter().cloned().collect();
        all.extend(inner.compiler.problems());
        all.extend(
            inner.connections.values().flat_map(|connection| connection.config.problems.iter().cloned()),
        );
        all.extend(inner.clones());
        drop(inner);
        all.extend(self.written.borrow().problem());
        all.into_iter().collect()
    }

    pub(crate) fn status(&self) -> Status {
        let world = self.world();
        let waiting_for = self.waiting_for();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            trust_domain: self.trust_domain.clone(),
            revision: world.revision.to_string(),
            uptime_seconds: self.started.elapsed().as_secs(),
            ready: waiting_for.is_empty(),
            waiting_for,
            sources: self.sources(),
            services: world.known().count(),
            endpoints: world.services.values().map(|service| service.endpoints.len()).sum(),
            documents: world.documents.len(),
            nodes: self.node_counts(),
            problems: self.problems().len(),
        }
    }

    pub(crate) fn sources(&self) -> Vec<Source> {
        self.sources.status()
    }

    pub(crate) fn explain(&self, service: &ServiceName, from: &NodeName) -> Result<Explanation, String> {
        let world = self.world();
        let (report, standing) = {
            let inner = self.lock();
            let connected = inner.connections.values().find(|connection| connection.report.name == *from);
            let report = connected.map(|connection| &connection.report).or_else(|| world.nodes.get(from));
            let Some(report) = report.cloned() else {
                return Err(format!(
                    "there is no node `{from}`: no node of this name has connected; `vmeshctl nodes` lists those that have"
                ));
            };
            let standing = inner.standings().remove(from).unwrap_or_default();
            if let Some(config) = inner.compiler.known_node(&report) {
                return explain::explain(&inner.compiler, config, &report, service, standing);
            }
            (report, standing)
        };
        // A class that no connected node is in is compiled for this answer alone.
        let mut compiler = Compiler::new(world);
        let config = compiler.node(&report);
        explain::explain(&compiler, config, &report, service, standing)
    }

    /// What the node `name` is to have.
    pub(crate) fn snapshot(&self, name: &NodeName) -> Option<Snapshot> {
        let world = self.world();
        let report = {
            let inner = self.lock();
            let connected = inner.connections.values().find(|connection| connection.report.name == *name);
            match connected {
                Some(connection) => {
                    let NodeConfig { class, scope, .. } = &connection.config;
                    return Some(Snapshot { store: inner.compiler.store(class)?, scope: scope.clone() });
                }
                None => world.nodes.get(name)?.clone(),
            }
        };
        Some(compile(&world, &report).0)
    }

    pub(crate) fn forget(&self, name: &NodeName) -> Result<(), String> {
        if self.lock().connections.values().any(|connection| connection.report.name == *name) {
            return Err(format!(
                "node `{name}` is connected: stop its agent first, or it is known again at once"
            ));
        }
        if !self.world().nodes.contains_key(name) {
            return Err(format!("there is no node `{name}`"));
        }
        match self.forget_all([name.clone()]) {
            0 => Err(format!("node `{name}` cannot be forgotten just now: too much is going on; try again")),
            _ => Ok(()),
        }
    }

    /// Forgets the nodes that have been offline for `longer`, and returns how many.
    pub(crate) fn forget_offline_for(&self, longer: Duration) -> usize {
        let gone = self.lock().known.offline_for(longer, unix_now());
        self.forget_all(gone)
    }

    /// Forgets nodes for as long as that is kept up with.
    fn forget_all(&self, names: impl IntoIterator<Item = NodeName>) -> usize {
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

    /// Forgets nodes that have been offline for too long, for as long as it is polled.
    pub(crate) async fn forget_offline(self: Arc<Control>) {
        let longest = self.lock().known.limits().forget_offline_after;
        loop {
            tokio::time::sleep(FORGETS_EVERY.min(longest)).await;
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

    pub(crate) fn write_status(&self) -> WriteStatus {
        self.written.borrow().clone()
    }

    /// How many classes of nodes are compiled.
    pub(crate) fn classes(&self) -> usize {
        self.hub.classes()
    }

    /// Since when each node that is known and not connected is offline, in Unix time.
    pub(crate) fn offline_since(&self) -> BTreeMap<NodeName, u64> {
        self.lock().known.all_offline()
    }

    /// When the control plane last took up a change, in Unix time.
    pub(crate) fn changed_at(&self) -> Duration {
        Duration::from_nanos(self.changed_at.load(Relaxed))
    }

    pub(crate) fn propagation(&self) -> &Propagation {
        &self.propagation
    }
}

/// How often it is looked for nodes that have been offline for too long.
const FORGETS_EVERY: Duration = Duration::from_secs(60);

/// Whether `service` is something that the node calls, or that it serves.
fn concerns(connection: &Connection, service: &ServiceName) -> bool {
    connection.config.scope.contains(service.as_str())
        || connection.report.workloads.iter().any(|workload| workload.service == *service)
}

impl Inner {
    fn standings(&self) -> BTreeMap<NodeName, Standing> {
        let mut standings: BTreeMap<NodeName, Standing> = BTreeMap::new();
        for connection in self.connections.values() {
            let standing = standings.entry(connection.report.name.clone()).or_default();
            let (state, reason) = match &connection.state {
                State::Synced => (NodeState::Synced, None),
                State::Pushing => (NodeState::Pushing, None),
                State::Rejected { reason } => (NodeState::Rejected, Some(reason.to_string())),
            };
            // Of several streams of one node, the one that fares worst tells how the node stands.
            if standing.state == NodeState::Offline || state > standing.state {
                *standing = Standing { state, reason, ..Standing::default() };
            }
        }
        standings
    }

    /// The names that two hosts go by, with the connections of two of them.
    fn shared_names(&self) -> BTreeMap<&NodeName, (&Connection, &Connection)> {
        let mut seen: BTreeMap<&NodeName, &Connection> = BTreeMap::new();
        let mut shared = BTreeMap::new();
        for connection in self.connections.values() {
            let first = seen.entry(&connection.report.name).or_insert(connection);
            if first.is_of_another_host_than(connection) {
                shared.entry(&connection.report.name).or_insert((*first, connection));
            }
        }
        shared
    }

    /// Who looks at a node sees now the one, now the other.
    fn clones(&self) -> Vec<Problem> {
        let shared = self.shared_names();
        let problem = |(name, (one, other)): (&NodeName, (&Connection, &Connection))| {
            let place = Place::file(format!("node {name}"));
            Problem::new(place, format!("Node `{name}`"), clash(name, one, other))
        };
        shared.into_iter().map(problem).collect()
    }

    /// Two of the hosts that go by `name`, if they do.
    fn clash(&self, name: &NodeName) -> Option<String> {
        let ids = self.known.connections(name);
        let mut of_this_name = ids.filter_map(|id| self.connections.get(&id));
        let first = of_this_name.next()?;
        let other = of_this_name.find(|other| first.is_of_another_host_than(other))?;
        Some(clash(name, first, other))
    }

    /// After one of its connections has come or gone.
    fn tell_of_clones(&mut self, name: &NodeName) {
        match self.clash(name) {
            Some(clash) if self.told.insert(name.clone()) => tracing::warn!(node = %name, "{clash}"),
            Some(_) => {}
            None => _ = self.told.remove(name),
        }
    }
}

fn clash(name: &NodeName, one: &Connection, other: &Connection) -> String {
    let shown = |connection: &Connection| {
        let said = connection.report.address.map(|address| address.to_string());
        let from = connection.from.map(|from| format!("from {from}"));
        match (said, from) {
            (Some(said), Some(from)) if from != format!("from {said}") => format!("{said} ({from})"),
            (Some(said), _) => said,
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
    /// By what they say of themselves, or by where they come from: hosts that are copies say the same. One host may well come
    /// by IPv4 and by IPv6.
    fn is_of_another_host_than(&self, other: &Connection) -> bool {
        let comes_from_elsewhere = match (self.from, other.from) {
            (Some(one), Some(other)) => one.is_ipv4() == other.is_ipv4() && one != other,
            _ => false,
        };
        self.report.address != other.report.address || comes_from_elsewhere
    }
}

/// As the API shows it.
pub(crate) fn node(report: &NodeReport, standing: Standing) -> Node {
    Node {
        offline_seconds: standing.offline_for,
        name: report.name.clone(),
        connected: standing.state != NodeState::Offline,
        state: standing.state,
        reason: standing.reason,
        client: report.client,
        address: report.address,
        zone: report.zone.clone(),
        labels: report.labels.clone(),
        workloads: report.workloads.clone(),
        upstreams: report.upstreams.clone(),
        build: report.build.clone(),
    }
}

/// The xDS side of [`Control`].
pub(crate) struct Door(pub(crate) Arc<Control>);

impl Admission for Door {
    fn admit(&self, node: &XdsNode, peer: &PeerInfo) -> Result<Admitted, Refusal> {
        let control = &self.0;
        let report = claim::read(node).map_err(|bad| Refusal::Invalid(bad.to_string()))?;
        let mut inner = control.lock();
        let inner = &mut *inner;
        if !inner.ready {
            let waiting = control.published.borrow().waiting.join(", ");
            return Err(Refusal::NotReady(format!("this control plane is starting: it waits for {waiting}")));
        }
        let origin = peer.origin();
        // Nodes that are offline give way to a node that connects.
        for _ in 0..MAKES_ROOM_FOR {
            let Some(name) = inner.known.to_make_room(&report) else { break };
            if control.reports.try_send(NodeEvent::Forget(name.clone())).is_err() {
                break;
            }
            inner.known.forget(&name);
        }
        inner.known.check_room(&report.name, origin).map_err(|full| Refusal::NotReady(full.to_string()))?;
        if control.reports.try_send(NodeEvent::Report(report.clone())).is_err() {
            let why = "this control plane has more reports of nodes than it keeps up with: try again";
            return Err(Refusal::NotReady(why.to_owned()));
        }
        let report = Arc::new(report);
        let config = inner.compiler.node(&report);
        if let Some(store) = inner.compiler.store(&config.class) {
            control.hub.publish(config.class.clone(), store);
        }
        let feed = control.hub.subscribe(config.class.clone(), config.scope.clone());
        let id = inner.next;
        inner.next += 1;
        inner.known.connect(&report, id, origin);
        *inner.users.entry(config.class.clone()).or_default() += 1;
        inner.unused.retain(|class| *class != config.class);
        let name = report.name.clone();
        let from = peer.address.map(|address| address.ip().to_canonical());
        let feed_control = feed.control();
        let connection =
            Connection { report, from, feed: feed_control, config, state: State::Pushing, acked: 0 };
        inner.connections.insert(id, connection);
        inner.tell_of_clones(&name);
        Ok(Admitted { feed, observer: Box::new(Watcher { control: control.clone(), id }) })
    }
}

/// Keeps one connection's state; its drop is the end of the connection.
struct Watcher {
    control: Arc<Control>,
    id: u64,
}

impl Observer for Watcher {
    fn on_status(&mut self, status: &SessionStatus) {
        let mut inner = self.control.lock();
        let inner = &mut *inner;
        let Some(connection) = inner.connections.get_mut(&self.id) else { return };
        if connection.state != status.state {
            connection.state = status.state.clone();
            if let State::Rejected { reason } = &status.state {
                tracing::warn!(node = %connection.report.name, %reason, "a node refused its configuration");
            }
        }
        let before = std::mem::replace(&mut connection.acked, status.generation_acked);
        if let Some((generation, at)) = inner.published_at.get(&connection.config.class)
            && before < *generation
            && status.generation_acked >= *generation
        {
            self.control.propagation.observe(at.elapsed());
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let mut inner = self.control.lock();
        let inner = &mut *inner;
        let Some(connection) = inner.connections.remove(&self.id) else { return };
        let Connection { report, config, .. } = connection;
        inner.known.disconnect(&report, self.id, unix_now());
        self.control.went_offline.notify_one();
        if inner.told.contains(&report.name) {
            inner.tell_of_clones(&report.name);
        }
        if let Some(users) = inner.users.get_mut(&config.class) {
            *users -= 1;
            if *users == 0 {
                inner.users.remove(&config.class);
                inner.unused.push_back(config.class);
                self.control.forget_unused(inner);
            }
        }
    }
}
