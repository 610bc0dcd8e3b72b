//! Tracks the names of connected and offline nodes. Clients choose their names, so the number of known names is limited.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use vmesh_model::node::Upstreams;
use vmesh_model::{NodeName, NodeReport};

/// Limits for the names of nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NodeLimits {
    /// Connected and offline together.
    pub(crate) names: usize,
    /// Bytes that the reports of offline nodes take, by estimate.
    pub(crate) offline_bytes: usize,
    pub(crate) forget_offline_after: Duration,
}

/// What is known of nodes beside their reports.
#[derive(Debug)]
pub(crate) struct KnownNodes {
    limits: NodeLimits,
    /// Connection ids by node.
    connected: BTreeMap<NodeName, BTreeSet<u64>>,
    offline: BTreeMap<NodeName, Offline>,
    /// The same, by time.
    order: BTreeSet<(u64, NodeName)>,
    offline_bytes: usize,
}

#[derive(Debug, Clone, Copy)]
struct Offline {
    /// In Unix time.
    since: u64,
    bytes: usize,
}

impl KnownNodes {
    /// Begins with the nodes that were known before a restart, and since when they are offline.
    pub(crate) fn new<'a>(
        limits: NodeLimits,
        restored: impl IntoIterator<Item = (&'a NodeReport, u64)>,
    ) -> KnownNodes {
        let mut known = KnownNodes {
            limits,
            connected: BTreeMap::new(),
            offline: BTreeMap::new(),
            order: BTreeSet::new(),
            offline_bytes: 0,
        };
        restored.into_iter().for_each(|(report, since)| known.set_offline(report, since));
        known
    }

    pub(crate) fn limits(&self) -> &NodeLimits {
        &self.limits
    }

    fn set_offline(&mut self, report: &NodeReport, since: u64) {
        self.forget(&report.name);
        let bytes = estimated_bytes(report);
        self.offline_bytes += bytes;
        self.offline.insert(report.name.clone(), Offline { since, bytes });
        self.order.insert((since, report.name.clone()));
    }

    pub(crate) fn connect(&mut self, report: &NodeReport, connection: u64) {
        self.forget(&report.name);
        self.connected.entry(report.name.clone()).or_default().insert(connection);
    }

    pub(crate) fn disconnect(&mut self, report: &NodeReport, connection: u64, now: u64) {
        let Some(connections) = self.connected.get_mut(&report.name) else { return };
        connections.remove(&connection);
        if connections.is_empty() {
            self.connected.remove(&report.name);
            self.set_offline(report, now);
        }
    }

    /// Forgets a node that is offline.
    pub(crate) fn forget(&mut self, name: &NodeName) {
        if let Some(Offline { since, bytes }) = self.offline.remove(name) {
            self.order.remove(&(since, name.clone()));
            self.offline_bytes -= bytes;
        }
    }

    pub(crate) fn is_connected(&self, name: &NodeName) -> bool {
        self.connected.contains_key(name)
    }

    /// The connections of a node.
    pub(crate) fn connections(&self, name: &NodeName) -> impl Iterator<Item = u64> {
        self.connected.get(name).into_iter().flatten().copied()
    }

    /// Returns the number of offline nodes.
    pub(crate) fn offline(&self) -> usize {
        self.offline.len()
    }

    pub(crate) fn offline_since(&self, name: &NodeName) -> Option<u64> {
        self.offline.get(name).map(|offline| offline.since)
    }

    pub(crate) fn all_offline(&self) -> BTreeMap<NodeName, u64> {
        self.offline.iter().map(|(name, offline)| (name.clone(), offline.since)).collect()
    }

    /// Returns the nodes that have been offline for at least `longer`.
    pub(crate) fn offline_for(&self, longer: Duration, now: u64) -> Vec<NodeName> {
        let longer = longer.as_secs();
        let gone = self.order.iter().take_while(|(since, _)| now.saturating_sub(*since) >= longer);
        gone.map(|(_, name)| name.clone()).collect()
    }

    /// Returns offline nodes to forget before `report` is added, longest offline first, while a limit is exceeded. Returns at most
    /// [`MAKES_ROOM_FOR`] names.
    pub(crate) fn to_make_room(&self, report: &NodeReport) -> Vec<NodeName> {
        let is_new = !self.is_connected(&report.name) && !self.offline.contains_key(&report.name);
        let names = self.connected.len() + self.offline.len() + usize::from(is_new);
        let mut too_many = names.saturating_sub(self.limits.names);
        let mut too_large = self.offline_bytes.saturating_sub(self.limits.offline_bytes);
        let mut giving_way = Vec::new();
        for (_, name) in self.order.iter().filter(|(_, name)| *name != report.name).take(MAKES_ROOM_FOR) {
            if too_many == 0 && too_large == 0 {
                break;
            }
            too_many = too_many.saturating_sub(1);
            too_large = too_large.saturating_sub(self.offline.get(name).map_or(0, |offline| offline.bytes));
            giving_way.push(name.clone());
        }
        giving_way
    }

    /// Reports whether a node of this name may connect.
    pub(crate) fn has_room(&self, name: &NodeName) -> bool {
        self.is_connected(name)
            || self.offline.contains_key(name)
            || self.connected.len() + self.offline.len() < self.limits.names
    }
}

/// Bounds the work of one admission, also after a restart with a smaller limit.
const MAKES_ROOM_FOR: usize = 64;

/// Estimates the memory of a report.
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
    use vmesh_model::node::{Capture, Client};

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
            capture: Capture::default(),
            build: "".into(),
        }
    }

    fn names(all: Vec<NodeName>) -> Vec<String> {
        all.iter().map(ToString::to_string).collect()
    }

    fn limits(names: usize, offline_bytes: usize) -> NodeLimits {
        NodeLimits { names, offline_bytes, forget_offline_after: Duration::from_secs(100) }
    }

    #[test]
    fn names_that_are_not_in_use_give_way_and_those_that_are_do_not() {
        let (a, b, c, d) = (report("a"), report("b"), report("c"), report("d"));
        let mut known = KnownNodes::new(limits(3, 1 << 20), [(&a, 20), (&b, 10)]);
        known.connect(&c, 1);
        assert_eq!(names(known.to_make_room(&a)), [""; 0], "it is known");
        assert_eq!(names(known.to_make_room(&d)), ["b"]);
        assert!(!known.has_room(&d.name));
        known.forget(&b.name);
        assert!(known.has_room(&d.name));
        known.connect(&d, 2);
        known.connect(&a, 3);
        assert!(known.to_make_room(&b).is_empty() && !known.has_room(&b.name), "all are connected");
        assert!(known.has_room(&a.name));
        known.disconnect(&a, 3, 30);
        assert_eq!(names(known.to_make_room(&b)), ["a"]);
        assert_eq!(known.connections(&d.name).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn the_memory_of_offline_nodes_is_bounded() {
        let mut known = KnownNodes::new(limits(1000, 2000), []);
        for (at, name) in ["a", "b", "c", "d", "e"].into_iter().enumerate() {
            known.connect(&report(name), at as u64);
            known.disconnect(&report(name), at as u64, at as u64);
        }
        assert_eq!(names(known.to_make_room(&report("f"))), ["a", "b"]);
    }

    #[test]
    fn a_node_is_offline_when_its_last_connection_has_gone() {
        let a = report("a");
        let mut known = KnownNodes::new(limits(10, 1 << 20), []);
        known.connect(&a, 1);
        known.connect(&a, 2);
        known.disconnect(&a, 1, 50);
        assert_eq!(known.offline_since(&a.name), None);
        known.disconnect(&a, 2, 60);
        assert_eq!(known.offline_since(&a.name), Some(60));
        assert_eq!(names(known.offline_for(Duration::from_secs(11), 70)), [""; 0]);
        assert_eq!(names(known.offline_for(Duration::from_secs(10), 70)), ["a"]);
        known.connect(&a, 3);
        assert_eq!(known.offline(), 0);
    }
}
