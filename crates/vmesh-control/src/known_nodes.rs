//! Tracks the names of connected and offline nodes. Clients choose their names, so the number of names is
//! limited: in total, and per origin. At the limit, the origin with the most offline names loses the oldest
//! of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use vmesh_daemon::connections::Origin;
use vmesh_model::node::Upstreams;
use vmesh_model::{NodeName, NodeReport};

/// The limits of node names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NodeLimits {
    /// The limit of connected and offline names together.
    pub(crate) names: usize,
    /// The limit of names connected from one origin.
    pub(crate) names_per_origin: usize,
    /// The limit, in estimated bytes, of the memory for reports of offline nodes.
    pub(crate) offline_bytes: usize,
    pub(crate) forget_offline_after: Duration,
}

/// The names of connected and offline nodes. [`connect`](KnownNodes::connect) is called for each new stream
/// after [`check_limits`](KnownNodes::check_limits) allowed it, and [`disconnect`](KnownNodes::disconnect) when
/// the stream ends.
#[derive(Debug)]
pub(crate) struct KnownNodes {
    limits: NodeLimits,
    connected: BTreeMap<NodeName, ConnectedNode>,
    /// The number of connected names per origin.
    connected_from: HashMap<Origin, usize>,
    offline: BTreeMap<NodeName, OfflineNode>,
    /// Offline names, the longest offline first.
    by_time: BTreeSet<(u64, NodeName)>,
    /// Offline names by the origin from which they were connected, the longest offline first.
    by_origin: HashMap<Origin, BTreeSet<(u64, NodeName)>>,
    /// The number of offline names per origin, the size of each set in `by_origin`.
    by_size: BTreeSet<(usize, Origin)>,
    offline_bytes: usize,
}

#[derive(Debug)]
struct ConnectedNode {
    connections: BTreeSet<u64>,
    /// The origin of the node's first connection.
    origin: Origin,
}

#[derive(Debug, Clone, Copy)]
struct OfflineNode {
    /// Unix time, in seconds.
    since: u64,
    bytes: usize,
    origin: Origin,
}

/// The limit that prevents a node from being admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NodeLimitReached {
    #[error(
        "this control plane knows {0} nodes and no more: forget some (`vmeshctl forget`), or raise `limits.nodes`"
    )]
    Names(usize),
    #[error(
        "{1} nodes are connected from {0}, and no more are taken from there: if that is a proxy, or a router that many hosts \
         share, raise `limits.connections_per_address`"
    )]
    Origin(Origin, usize),
}

impl KnownNodes {
    /// Restores the nodes known before a restart, each with the Unix time since which it is offline.
    pub(crate) fn new<'a>(
        limits: NodeLimits,
        restored: impl IntoIterator<Item = (&'a NodeReport, u64)>,
    ) -> KnownNodes {
        let mut known = KnownNodes {
            limits,
            connected: BTreeMap::new(),
            connected_from: HashMap::new(),
            offline: BTreeMap::new(),
            by_time: BTreeSet::new(),
            by_origin: HashMap::new(),
            by_size: BTreeSet::new(),
            offline_bytes: 0,
        };
        restored.into_iter().for_each(|(report, since)| known.set_offline(report, since, Origin::Unknown));
        known
    }

    pub(crate) fn limits(&self) -> &NodeLimits {
        &self.limits
    }

    fn set_offline(&mut self, report: &NodeReport, since: u64, origin: Origin) {
        let name = &report.name;
        self.forget(name);
        let bytes = estimated_bytes(report);
        self.offline_bytes += bytes;
        self.offline.insert(name.clone(), OfflineNode { since, bytes, origin });
        self.by_time.insert((since, name.clone()));
        self.change_names_of(origin, |names| names.insert((since, name.clone())));
    }

    /// Changes the offline names of `origin`, and updates their number in `by_size`.
    fn change_names_of(
        &mut self,
        origin: Origin,
        change: impl FnOnce(&mut BTreeSet<(u64, NodeName)>) -> bool,
    ) {
        let names = self.by_origin.entry(origin).or_default();
        self.by_size.remove(&(names.len(), origin));
        change(names);
        match names.len() {
            0 => _ = self.by_origin.remove(&origin),
            size => _ = self.by_size.insert((size, origin)),
        }
    }

    pub(crate) fn connect(&mut self, report: &NodeReport, connection: u64, origin: Origin) {
        self.forget(&report.name);
        let connected = self.connected.entry(report.name.clone()).or_insert_with(|| {
            *self.connected_from.entry(origin).or_default() += 1;
            ConnectedNode { connections: BTreeSet::new(), origin }
        });
        connected.connections.insert(connection);
    }

    pub(crate) fn disconnect(&mut self, report: &NodeReport, connection: u64, now: u64) {
        let Some(connected) = self.connected.get_mut(&report.name) else { return };
        connected.connections.remove(&connection);
        if !connected.connections.is_empty() {
            return;
        }
        let origin = connected.origin;
        self.connected.remove(&report.name);
        if let Some(names) = self.connected_from.get_mut(&origin) {
            *names = names.saturating_sub(1);
            if *names == 0 {
                self.connected_from.remove(&origin);
            }
        }
        self.set_offline(report, now, origin);
    }

    /// Removes a node that is offline.
    pub(crate) fn forget(&mut self, name: &NodeName) {
        if let Some(OfflineNode { since, bytes, origin }) = self.offline.remove(name) {
            let entry = (since, name.clone());
            self.by_time.remove(&entry);
            self.change_names_of(origin, |names| names.remove(&entry));
            self.offline_bytes -= bytes;
        }
    }

    pub(crate) fn is_connected(&self, name: &NodeName) -> bool {
        self.connected.contains_key(name)
    }

    /// Returns the connections of each connected node.
    pub(crate) fn connected(&self) -> impl Iterator<Item = &BTreeSet<u64>> {
        self.connected.values().map(|connected| &connected.connections)
    }

    /// Returns the connections of the node `name`.
    pub(crate) fn connections(&self, name: &NodeName) -> impl Iterator<Item = u64> {
        self.connected.get(name).into_iter().flat_map(|connected| &connected.connections).copied()
    }

    /// Returns the number of offline nodes.
    pub(crate) fn offline(&self) -> usize {
        self.offline.len()
    }

    pub(crate) fn all_offline(&self) -> BTreeMap<NodeName, u64> {
        self.offline.iter().map(|(name, offline)| (name.clone(), offline.since)).collect()
    }

    /// Returns the nodes that have been offline for at least `longer`.
    pub(crate) fn offline_for(&self, longer: Duration, now: u64) -> Vec<NodeName> {
        let longer = longer.as_secs();
        let gone = self.by_time.iter().take_while(|(since, _)| now.saturating_sub(*since) >= longer);
        gone.map(|(_, name)| name.clone()).collect()
    }

    /// Returns the offline node to forget before `report` is added, or `None` if no limit is exceeded. It is
    /// the longest offline node of the origin with the most offline nodes.
    pub(crate) fn node_to_forget(&self, report: &NodeReport) -> Option<NodeName> {
        let is_new = !self.is_connected(&report.name) && !self.offline.contains_key(&report.name);
        let names = self.connected.len() + self.offline.len() + usize::from(is_new);
        if names <= self.limits.names && self.offline_bytes <= self.limits.offline_bytes {
            return None;
        }
        let largest_first = self.by_size.iter().rev().filter_map(|(_, origin)| self.by_origin.get(origin));
        let mut longest_offline_first = largest_first.flatten().map(|(_, name)| name);
        longest_offline_first.find(|name| **name != report.name).cloned()
    }

    /// Reports whether a node with this name may connect from `origin`.
    pub(crate) fn check_limits(&self, name: &NodeName, origin: Origin) -> Result<(), NodeLimitReached> {
        if self.is_connected(name) {
            return Ok(());
        }
        let NodeLimits { names, names_per_origin, .. } = self.limits;
        if self.connected_from.get(&origin).is_some_and(|connected| *connected >= names_per_origin) {
            return Err(NodeLimitReached::Origin(origin, names_per_origin));
        }
        if self.offline.contains_key(name) || self.connected.len() + self.offline.len() < names {
            return Ok(());
        }
        Err(NodeLimitReached::Names(names))
    }
}

/// The most nodes that one admission may forget. Bounds its work after a restart with a smaller limit.
pub(crate) const MAX_FORGOTTEN_PER_ADMISSION: usize = 64;

/// Estimates the memory of a report, in bytes.
fn estimated_bytes(report: &NodeReport) -> usize {
    let labels: usize = report.labels.iter().map(|(key, value)| key.len() + value.len() + 96).sum();
    let upstreams = match &report.upstreams {
        Upstreams::All => 0,
        Upstreams::Declared(upstreams) => upstreams.len() * 128,
    };
    512 + labels + upstreams + report.workloads.len() * 192 + report.build.len()
}

#[cfg(test)]
mod tests {
    use vmesh_model::node::{Client, NodeCapture};

    use super::*;

    fn report(name: &str) -> NodeReport {
        NodeReport {
            name: name.parse().unwrap(),
            client: Client::Envoy,
            address: None,
            zone: None,
            labels: Default::default(),
            workloads: Vec::new(),
            upstreams: Upstreams::All,
            capture: NodeCapture::default(),
            build: "".into(),
            identity: None,
            mtls_ready: false,
        }
    }

    fn names(all: Vec<NodeName>) -> Vec<String> {
        all.iter().map(ToString::to_string).collect()
    }

    /// Forgets nodes as the admission of `report` does, and returns their names.
    fn make_room(known: &mut KnownNodes, report: &NodeReport) -> Vec<String> {
        let mut forgotten = Vec::new();
        while let Some(name) = known.node_to_forget(report) {
            known.forget(&name);
            forgotten.push(name.to_string());
        }
        forgotten
    }

    fn from(last: u8) -> Origin {
        Origin::of_address([10, 0, 0, last].into())
    }

    fn limits(names: usize, offline_bytes: usize) -> NodeLimits {
        let forget_offline_after = Duration::from_secs(100);
        NodeLimits { names, names_per_origin: 100, offline_bytes, forget_offline_after }
    }

    #[test]
    fn names_that_are_not_in_use_give_way_and_those_that_are_do_not() {
        let (a, b, c, d) = (report("a"), report("b"), report("c"), report("d"));
        let mut known = KnownNodes::new(limits(3, 1 << 20), [(&a, 20), (&b, 10)]);
        known.connect(&c, 1, from(1));
        assert_eq!(known.node_to_forget(&a), None, "it is known");
        assert_eq!(known.check_limits(&d.name, from(1)), Err(NodeLimitReached::Names(3)));
        assert_eq!(make_room(&mut known, &d), ["b"]);
        assert_eq!(known.check_limits(&d.name, from(1)), Ok(()));
        known.connect(&d, 2, from(1));
        known.connect(&a, 3, from(1));
        assert_eq!(make_room(&mut known, &b), [""; 0], "all are connected");
        assert_eq!(known.check_limits(&b.name, from(1)), Err(NodeLimitReached::Names(3)));
        assert_eq!(known.check_limits(&a.name, from(1)), Ok(()));
        known.disconnect(&a, 3, 30);
        assert_eq!(make_room(&mut known, &b), ["a"]);
        assert_eq!(known.connections(&d.name).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn one_origin_cannot_take_all_names() {
        let per_origin = NodeLimits { names_per_origin: 2, ..limits(100, 1 << 20) };
        let mut known = KnownNodes::new(per_origin, []);
        known.connect(&report("a"), 1, from(1));
        known.connect(&report("a"), 2, from(1));
        known.connect(&report("b"), 3, from(1));
        let (a, c) = (report("a"), report("c"));
        assert_eq!(known.check_limits(&c.name, from(1)), Err(NodeLimitReached::Origin(from(1), 2)));
        assert_eq!(known.check_limits(&a.name, from(1)), Ok(()), "it is connected");
        assert_eq!(known.check_limits(&c.name, from(2)), Ok(()));
        known.disconnect(&a, 1, 10);
        assert_eq!(known.check_limits(&c.name, from(1)), Err(NodeLimitReached::Origin(from(1), 2)));
        known.disconnect(&a, 2, 10);
        assert_eq!(known.check_limits(&c.name, from(1)), Ok(()));
        known.connect(&c, 4, from(1));
        assert_eq!(
            known.check_limits(&a.name, from(1)),
            Err(NodeLimitReached::Origin(from(1), 2)),
            "also not if it is known"
        );
    }

    #[test]
    fn names_that_one_origin_invents_give_way_before_those_of_others() {
        let mut known = KnownNodes::new(limits(5, 1 << 20), [(&report("restored"), 1)]);
        known.connect(&report("honest"), 1, from(1));
        known.disconnect(&report("honest"), 1, 10);
        for (at, name) in ["w", "x", "y", "z"].into_iter().enumerate() {
            let at = at as u64 + 20;
            make_room(&mut known, &report(name));
            known.connect(&report(name), at, from(9));
            known.disconnect(&report(name), at, at);
        }
        let all: Vec<_> = known.all_offline().into_keys().collect();
        assert_eq!(names(all), ["honest", "restored", "x", "y", "z"]);
    }

    #[test]
    fn the_memory_of_offline_nodes_is_bounded() {
        let mut known = KnownNodes::new(limits(1000, 2000), []);
        for (at, name) in ["a", "b", "c", "d", "e"].into_iter().enumerate() {
            known.connect(&report(name), at as u64, from(1));
            known.disconnect(&report(name), at as u64, at as u64);
        }
        assert_eq!(make_room(&mut known, &report("f")), ["a", "b"]);
    }

    #[test]
    fn a_node_is_offline_when_its_last_connection_has_gone() {
        let a = report("a");
        let mut known = KnownNodes::new(limits(10, 1 << 20), []);
        known.connect(&a, 1, from(1));
        known.connect(&a, 2, from(1));
        known.disconnect(&a, 1, 50);
        assert_eq!(known.all_offline().get(&a.name).copied(), None);
        known.disconnect(&a, 2, 60);
        assert_eq!(known.all_offline().get(&a.name).copied(), Some(60));
        assert_eq!(names(known.offline_for(Duration::from_secs(11), 70)), [""; 0]);
        assert_eq!(names(known.offline_for(Duration::from_secs(10), 70)), ["a"]);
        known.connect(&a, 3, from(1));
        assert_eq!(known.offline(), 0);
        known.disconnect(&a, 3, 80);
        known.forget(&a.name);
        assert!(known.connected_from.is_empty() && known.by_origin.is_empty() && known.by_size.is_empty());
        assert_eq!((known.offline_bytes, known.by_time.len()), (0, 0));
    }
}
