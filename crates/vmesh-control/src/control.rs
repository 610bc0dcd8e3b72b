//! The read side of the API: functions of published values. None waits for a compilation or a connection.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use tokio::sync::watch;
use vmesh_api::{Explanation, Node, NodeCounts, NodeState, PastRevision, Revision, Source, Status};
use vmesh_catalog::World;
use vmesh_compile::{ALONE, compile, compile_alone};
use vmesh_model::node::{Upstream, Upstreams};
use vmesh_model::{NodeName, NodeReport, Problem, ServiceName};
use vmesh_xds::{Snapshot, State};

use crate::compilation::Compilation;
use crate::discovery::OperatorActions;
use crate::explain::{self, NodeStatus};
use crate::fleet::{Fleet, node_status};
use crate::identity::{IdentityService, KnownNode};
use crate::metrics::Propagation;
use crate::persist::WriteStatus;
use crate::time::unix_now;
use crate::worlds::{PublishedWorld, Sources};

/// The published values that the API shows, and the actions that it offers.
pub(crate) struct Control {
    pub(crate) identities: Arc<IdentityService>,
    started: Instant,
    published: watch::Receiver<PublishedWorld>,
    compiled: watch::Receiver<Arc<Compilation>>,
    fleet: Arc<Fleet>,
    sources: Sources,
    pub(crate) actions: OperatorActions,
    /// The result of the last write of the state directory.
    written: watch::Receiver<WriteStatus>,
}

impl Control {
    pub(crate) fn new(
        identities: Arc<IdentityService>,
        published: watch::Receiver<PublishedWorld>,
        compiled: watch::Receiver<Arc<Compilation>>,
        fleet: Arc<Fleet>,
        sources: Sources,
        actions: OperatorActions,
        written: watch::Receiver<WriteStatus>,
    ) -> Control {
        let started = Instant::now();
        Control { identities, started, published, compiled, fleet, sources, actions, written }
    }

    /// Returns the latest compilation.
    fn compiled(&self) -> Arc<Compilation> {
        self.compiled.borrow().clone()
    }

    pub(crate) fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    pub(crate) fn world(&self) -> Arc<World> {
        self.published.borrow().world.clone()
    }

    /// Returns the inputs that the control plane waits for before it is ready; empty once it is ready.
    pub(crate) fn waiting_for(&self) -> Vec<String> {
        if self.compiled.borrow().is_ready {
            return Vec::new();
        }
        let waiting = self.published.borrow().waiting.clone();
        if waiting.is_empty() { vec!["the first compilation".to_owned()] } else { waiting.to_vec() }
    }

    /// Returns every known node with its state.
    pub(crate) fn nodes(&self) -> Vec<(Arc<NodeReport>, NodeStatus)> {
        let world = self.world();
        let mut known: BTreeMap<&NodeName, (Arc<NodeReport>, Vec<State>)> =
            world.nodes.iter().map(|(name, report)| (name, (report.clone(), Vec::new()))).collect();
        let connections = self.fleet.connections();
        for (_, report, state) in &connections {
            let (known, states) = known.entry(&report.name).or_insert_with(|| (report.clone(), Vec::new()));
            *known = report.clone();
            states.push(state.clone());
        }
        let offline = self.fleet.offline_since();
        let now = unix_now();
        let nodes = known.into_values().map(|(report, states)| {
            let mut status = node_status(&states);
            status.offline_since = offline.get(&report.name).copied();
            status.offline_for = status.offline_since.map(|since| now.saturating_sub(since));
            (report, status)
        });
        nodes.collect()
    }

    /// Returns the nodes that have joined, connected or not.
    pub(crate) fn enrolled_nodes(&self) -> Vec<KnownNode> {
        let (world, offline) = (self.world(), self.fleet.offline_since());
        let enrolled = world.nodes.values().filter(|report| report.identity.is_some());
        let known = enrolled.map(|report| KnownNode {
            name: report.name.clone(),
            offline_since: offline.get(&report.name).copied(),
        });
        known.collect()
    }

    /// Returns the number of node names that two hosts share.
    pub(crate) fn shared_names(&self) -> usize {
        self.fleet.shared_names()
    }

    pub(crate) fn node_counts(&self) -> NodeCounts {
        self.fleet.counts()
    }

    /// Returns all problems, sorted by place and without duplicates.
    pub(crate) fn problems(&self) -> Vec<Problem> {
        let mut all: BTreeSet<Problem> = self.world().problems.iter().cloned().collect();
        all.extend(self.compiled().configuration.problems());
        all.extend(self.fleet.problems());
        all.extend(self.identities.problems());
        all.extend(self.written.borrow().problem());
        all.into_iter().collect()
    }

    pub(crate) fn status(&self) -> Status {
        let world = self.world();
        let waiting_for = self.waiting_for();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            trust_domain: self.identities.trust_domain().to_string(),
            revision: world.revision.to_string(),
            uptime_seconds: self.started.elapsed().as_secs(),
            ready: waiting_for.is_empty(),
            waiting_for,
            sources: self.sources(),
            services: world.service_names().count(),
            endpoints: world.services.values().map(|service| service.endpoints.len()).sum(),
            documents: world.documents.len(),
            nodes: self.node_counts(),
            problems: self.problems().len(),
            insecure: self.identities.insecure().iter().map(ToString::to_string).collect(),
        }
    }

    pub(crate) fn revision(&self) -> Revision {
        let world = self.world();
        let compiled = self.compiled();
        let past = compiled.past.worlds().map(|past| PastRevision {
            revision: past.world.revision.to_string(),
            generation: past.world.generation,
            until: past.replaced_at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            services: past.world.service_names().count(),
            documents: past.world.documents.len(),
        });
        Revision { revision: world.revision.to_string(), generation: world.generation, past: past.collect() }
    }

    pub(crate) fn sources(&self) -> Vec<Source> {
        self.sources.status()
    }

    pub(crate) fn explain(&self, service: &ServiceName, from: &NodeName) -> Result<Explanation, String> {
        let compiled = self.compiled();
        let connections = self.fleet.connections_of(from);
        let report = connections.first().map(|(_, report, _)| report.clone());
        let Some(report) = report.or_else(|| self.world().nodes.get(from).cloned()) else {
            return Err(format!(
                "there is no node `{from}`: no node of this name has connected; `vmeshctl nodes` lists those that have"
            ));
        };
        let world = compiled.world();
        let configuration = &compiled.configuration;
        let now = connections.first().and_then(|(id, _, _)| {
            let config = configuration.node(*id)?;
            Some((config.clone(), configuration.class(&config.class)?.clone()))
        });
        let alone = || {
            let configuration = compile_alone(world, &report);
            let config = configuration.node(ALONE)?.clone();
            let class = configuration.class(&config.class)?.clone();
            Some((config, class))
        };
        let Some((config, mut class)) = now.or_else(alone) else {
            return Err(format!("node `{from}` could not be compiled"));
        };
        if !class.services.contains_key(service)
            && let Upstreams::Declared(declared) = &report.upstreams
        {
            // No node of this class calls the service, so it is compiled for this answer only.
            let asked = Upstream { service: service.clone(), listen: None, as_: None };
            let upstreams = Upstreams::Declared(declared.iter().cloned().chain([asked]).collect());
            let configuration = compile_alone(world, &NodeReport { upstreams, ..(*report).clone() });
            let of_caller = configuration.node(ALONE).and_then(|config| configuration.class(&config.class));
            class = of_caller.cloned().unwrap_or(class);
        }
        let states: Vec<_> = connections.into_iter().map(|(_, _, state)| state).collect();
        explain::explain(world, &class, &config, &report, service, node_status(&states))
    }

    /// Returns the resources that the node `name` receives; a node that is not connected is compiled for this
    /// answer.
    pub(crate) fn snapshot(&self, name: &NodeName) -> Option<Snapshot> {
        let compiled = self.compiled();
        let connections = self.fleet.connections_of(name);
        let mut now = connections.iter().filter_map(|(id, _, _)| compiled.configuration.snapshot(*id));
        if let Some(snapshot) = now.next() {
            return Some(snapshot);
        }
        let report = self.world().nodes.get(name)?.clone();
        Some(compile(compiled.world(), &report).0)
    }

    pub(crate) fn forget(&self, name: &NodeName) -> Result<(), String> {
        if self.fleet.is_connected(name) {
            return Err(format!(
                "node `{name}` is connected: stop its agent first, or it is known again at once"
            ));
        }
        if !self.world().nodes.contains_key(name) {
            return Err(format!("there is no node `{name}`"));
        }
        match self.fleet.forget([name.clone()]) {
            0 => Err(format!("node `{name}` cannot be forgotten just now: too much is going on; try again")),
            _ => Ok(()),
        }
    }

    pub(crate) fn write_status(&self) -> WriteStatus {
        self.written.borrow().clone()
    }

    /// Returns the number of compiled classes.
    pub(crate) fn classes(&self) -> usize {
        self.compiled().configuration.classes()
    }

    /// Returns the Unix time when the compiler last began with a change of the configuration.
    pub(crate) fn changed_at(&self) -> Duration {
        self.compiled().changed_at.duration_since(UNIX_EPOCH).unwrap_or_default()
    }

    pub(crate) fn propagation(&self) -> &Propagation {
        self.fleet.propagation()
    }
}

/// Returns the node as the API shows it.
pub(crate) fn node(report: &NodeReport, status: NodeStatus) -> Node {
    Node {
        offline_seconds: status.offline_for,
        name: report.name.clone(),
        connected: status.state != NodeState::Offline,
        state: status.state,
        reason: status.reason,
        client: report.client,
        address: report.address,
        zone: report.zone.clone(),
        labels: report.labels.clone(),
        workloads: report.workloads.clone(),
        upstreams: report.upstreams.clone(),
        build: report.build.clone(),
    }
}
