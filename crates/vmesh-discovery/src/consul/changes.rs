//! Finds the services that changed by comparing the checks and the service lists of a whole datacenter. Pure.
//!
//! When connections are scarce, services have no blocking query of their own. Instead each new
//! [`CheckDigest`] is compared with the previous one, and a [`Sweep`] reads all services in turn to find
//! changes that neither answer shows. A difference only causes a read of the service; it never adds or
//! removes an instance by itself.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::ops::Bound;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};
use tokio::time::Instant;
use vmesh_model::ServiceName;

use super::plan::{ROUND, ServiceKey};

/// The interval within which every service is read even without a sign of a change: a node's address may
/// change unnoticed.
const IDLE_ROUND: Duration = Duration::from_secs(60);
/// The minimum interval of the sweep, so that it reads at most 500 services per second and costs Consul
/// little.
const LEAST_INTERVAL: Duration = Duration::from_millis(2);

/// One check of `/v1/health/state/any`, without its output, which does not affect the health of an instance.
#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct CheckRow {
    node: Option<String>,
    #[serde(rename = "CheckID")]
    check_id: Option<String>,
    status: Option<String>,
    #[serde(rename = "ServiceID")]
    service_id: Option<String>,
    service_name: Option<String>,
    create_index: Option<u64>,
}

/// A summary of all checks of a datacenter that takes a few bytes per service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct CheckDigest {
    services: BTreeMap<String, ServiceDigest>,
    /// The sum of the hashes of checks that belong to nodes rather than services.
    nodes: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct ServiceDigest {
    /// The sum of the hashes of the service's checks and of its nodes' checks. A sum does not depend on their
    /// order.
    sum: u64,
    /// The number of instances with a check of their own.
    instances: usize,
}

/// The difference between two lists of services.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ListDifference {
    /// Services in both lists whose tags differ.
    pub(super) retagged: Vec<ServiceName>,
    /// The lists differ in some way: other tags, or a service that only one list has.
    pub(super) is_visible: bool,
}

impl ListDifference {
    /// Compares the hashes of the tags of all services.
    pub(super) fn between(
        before: &BTreeMap<ServiceName, u64>,
        now: &BTreeMap<ServiceName, u64>,
    ) -> ListDifference {
        let differs = |(name, tags): &(&ServiceName, &u64)| before.get(*name).is_some_and(|old| old != *tags);
        ListDifference {
            retagged: now.iter().filter(differs).map(|(name, _)| name.clone()).collect(),
            is_visible: before != now,
        }
    }
}

/// The difference between two digests.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct CheckChanges {
    /// The lower-case names of services whose checks, or whose nodes' checks, differ.
    pub(super) services: Vec<String>,
    /// A check of a node differs, which affects instances without checks too.
    pub(super) nodes: bool,
}

impl CheckChanges {
    pub(super) fn is_empty(&self) -> bool {
        self.services.is_empty() && !self.nodes
    }
}

impl CheckDigest {
    /// Parses the body of `/v1/health/state/any`. Only digests with the same hash `keys` are comparable.
    pub(super) fn parse(body: &[u8], keys: &RandomState) -> Result<CheckDigest, serde_json::Error> {
        let mut rows = CheckRows {
            keys,
            names: HashMap::new(),
            checks: Vec::new(),
            instances: HashSet::new(),
            nodes: HashMap::new(),
        };
        let mut json = serde_json::Deserializer::from_slice(body);
        json.deserialize_option(&mut rows)?;
        json.end()?;
        Ok(rows.digest())
    }

    /// Returns the differences from the digest `before`.
    pub(super) fn changes_since(&self, before: &CheckDigest) -> CheckChanges {
        let differs = |name: &&String| self.services.get(*name) != before.services.get(*name);
        let mut services: Vec<String> = self.services.keys().filter(differs).cloned().collect();
        services.extend(before.services.keys().filter(|name| !self.services.contains_key(*name)).cloned());
        CheckChanges { services, nodes: self.nodes != before.nodes }
    }

    /// Returns the number of instances of a service that have a check of their own.
    pub(super) fn checked_instances(&self, service: &str) -> usize {
        self.services.get(service).map_or(0, |service| service.instances)
    }
}

/// Folds the rows while they are parsed, since an answer may have 32 MiB.
struct CheckRows<'a> {
    keys: &'a RandomState,
    /// The lower-case names of the services, and their numbers.
    names: HashMap<String, u32>,
    /// The checks of services: number of the service, hash of the node's name, and hash of the check.
    checks: Vec<(u32, u64, u64)>,
    /// The instances: number of the service, and hash of node and service ID.
    instances: HashSet<(u32, u64)>,
    /// The sum of the hashes of each node's checks, by the hash of the node's name.
    nodes: HashMap<u64, u64>,
}

impl CheckRows<'_> {
    fn add(&mut self, row: CheckRow) {
        let (Some(node), Some(check)) = (row.node, row.check_id) else { return };
        let node_hash = self.keys.hash_one(&node);
        let service_id = row.service_id.unwrap_or_default();
        let hash = self.keys.hash_one((&node, &check, &row.status, &service_id, row.create_index));
        let Some(name) = row.service_name.filter(|name| !name.is_empty()) else {
            let sum = self.nodes.entry(node_hash).or_default();
            *sum = sum.wrapping_add(hash);
            return;
        };
        let next = u32::try_from(self.names.len()).unwrap_or(u32::MAX);
        let service = *self.names.entry(name.to_lowercase()).or_insert(next);
        self.checks.push((service, node_hash, hash));
        self.instances.insert((service, self.keys.hash_one((&node, &service_id))));
    }

    fn digest(self) -> CheckDigest {
        let mut digests = vec![ServiceDigest::default(); self.names.len()];
        for (service, node, hash) in &self.checks {
            let of_node = self.nodes.get(node).copied().unwrap_or_default();
            if let Some(digest) = digests.get_mut(*service as usize) {
                digest.sum = digest.sum.wrapping_add(self.keys.hash_one((hash, of_node)));
            }
        }
        for (service, _) in &self.instances {
            if let Some(digest) = digests.get_mut(*service as usize) {
                digest.instances += 1;
            }
        }
        let named =
            |(name, number): (String, u32)| (name, digests.get(number as usize).copied().unwrap_or_default());
        CheckDigest {
            services: self.names.into_iter().map(named).collect(),
            nodes: self.nodes.values().fold(0, |sum, hash| sum.wrapping_add(*hash)),
        }
    }
}

impl<'de> Visitor<'de> for &mut CheckRows<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of checks")
    }

    fn visit_none<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> Result<(), A::Error> {
        while let Some(row) = rows.next_element::<Option<CheckRow>>()? {
            self.add(row.unwrap_or_default());
        }
        Ok(())
    }
}

/// Reads all services in turn: quickly after an unexplained change, within [`ROUND`] after any change of the
/// list of services, and within a minute otherwise.
#[derive(Debug)]
pub(super) struct Sweep {
    /// The service that was read last.
    after: Option<ServiceKey>,
    /// The number of services that this round has not read yet.
    owed: usize,
    /// The number of services that this round may read without a pause.
    hurried: usize,
    /// The earliest time of the next hurried round.
    hurry_again: Instant,
    read_at: Instant,
}

impl Sweep {
    pub(super) fn new(now: Instant) -> Sweep {
        Sweep { after: None, owed: 0, hurried: 0, hurry_again: now, read_at: now }
    }

    /// Starts a round over `services` services, one of which may have changed.
    pub(super) fn start_round(&mut self, services: usize) {
        self.owed = services;
    }

    /// Starts a round without pauses, at most once per [`ROUND`].
    pub(super) fn start_hurried_round(&mut self, services: usize, now: Instant) {
        self.owed = services;
        if now >= self.hurry_again {
            self.hurried = services;
            self.hurry_again = now + ROUND;
        }
    }

    /// Returns when the next read is due, if there are `services` services.
    pub(super) fn due(&self, services: usize) -> Instant {
        if self.hurried > 0 {
            return self.read_at;
        }
        let round = if self.owed > 0 { ROUND } else { IDLE_ROUND };
        let interval = round / u32::try_from(services.max(1)).unwrap_or(u32::MAX);
        self.read_at + interval.max(LEAST_INTERVAL)
    }

    /// Returns the longest time before the sweep finds a change, in a round that is not hurried.
    pub(super) fn lateness(services: usize) -> Duration {
        ROUND.max(LEAST_INTERVAL * u32::try_from(services).unwrap_or(u32::MAX))
    }

    /// Returns the next service of the round if its read is due.
    pub(super) fn take<T>(&mut self, services: &BTreeMap<ServiceKey, T>, now: Instant) -> Option<ServiceKey> {
        if self.due(services.len()) > now {
            return None;
        }
        let after = self.after.take();
        let from = after.as_ref().map_or(Bound::Unbounded, Bound::Excluded);
        let next = services
            .range::<ServiceKey, _>((from, Bound::Unbounded))
            .next()
            .or_else(|| services.first_key_value());
        self.read_at = now;
        self.owed = self.owed.saturating_sub(1);
        self.hurried = self.hurried.saturating_sub(1);
        self.after = next.map(|(key, _)| key.clone());
        self.after.clone()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn check(node: &str, id: &str, service: &str, status: &str) -> Value {
        json!({"Node": node, "CheckID": id, "ServiceID": service, "ServiceName": service, "Status": status,
               "Output": "", "CreateIndex": 7})
    }

    struct Answers(RandomState, CheckDigest);

    impl Answers {
        fn changes(&mut self, body: &Value) -> String {
            let digest = CheckDigest::parse(body.to_string().as_bytes(), &self.0).unwrap();
            let changes = digest.changes_since(&self.1);
            self.1 = digest;
            format!("{}{}", changes.services.join(" "), if changes.nodes { " +nodes" } else { "" })
        }
    }

    #[test]
    fn services_are_named_whose_checks_or_nodes_differ_and_no_others() {
        let mut answers = Answers(RandomState::new(), CheckDigest::default());
        let serf = |status| check("n1", "serfHealth", "", status);
        let (pay, orders) = (check("n1", "c1", "Pay", "passing"), check("n2", "c2", "orders", "passing"));
        assert_eq!(answers.changes(&json!([serf("passing"), pay, orders])), "orders pay +nodes");
        // Another order, and another output.
        let mut noisy = pay.clone();
        noisy["Output"] = json!("HTTP GET: 200 OK");
        assert_eq!(answers.changes(&json!([orders, noisy, serf("passing")])), "");
        // A changed status, a removed check, an added instance, and an instance that was registered anew.
        assert_eq!(
            answers.changes(&json!([check("n1", "c1", "Pay", "critical"), orders, serf("passing")])),
            "pay"
        );
        assert_eq!(answers.changes(&json!([orders, serf("passing")])), "pay");
        let more = check("n3", "c3", "orders", "passing");
        assert_eq!(answers.changes(&json!([orders, more, serf("passing")])), "orders");
        let mut anew = more.clone();
        anew["CreateIndex"] = json!(9);
        assert_eq!(answers.changes(&json!([orders, anew, pay, serf("passing")])), "orders pay");
        assert_eq!(answers.1.checked_instances("orders"), 2);
        // The check of a node affects the services on that node.
        assert_eq!(answers.changes(&json!([orders, anew, pay, serf("critical")])), "pay +nodes");
        // A token that lost its rights gets an empty answer, so every service is read again.
        assert_eq!(answers.changes(&Value::Null), "orders pay +nodes");
    }

    #[test]
    fn a_service_with_other_tags_is_named_and_one_that_is_new_or_gone_is_visible() {
        let list = |services: &[(&str, u64)]| -> BTreeMap<ServiceName, u64> {
            services.iter().map(|(name, tags)| (name.parse().unwrap(), *tags)).collect()
        };
        let before = list(&[("orders", 1), ("pay", 1)]);
        for (now, retagged, is_visible) in [
            (list(&[("orders", 1), ("pay", 1)]), 0, false),
            (list(&[("orders", 2), ("pay", 1)]), 1, true),
            (list(&[("orders", 1)]), 0, true),
            (list(&[("cart", 1), ("orders", 1), ("pay", 1)]), 0, true),
        ] {
            let difference = ListDifference::between(&before, &now);
            assert_eq!((difference.retagged.len(), difference.is_visible), (retagged, is_visible), "{now:?}");
        }
    }

    #[test]
    fn nonsense_is_an_error_or_nothing() {
        let parse = |body: &str| CheckDigest::parse(body.as_bytes(), &RandomState::new());
        for body in ["", "{}", "[", "[{\"Node\": 1}]", "[] x", "<html>"] {
            assert!(parse(body).is_err(), "{body}");
        }
        for body in ["null", "[]", "[null, {}]", "[{\"Node\": \"n\", \"ServiceName\": \"pay\"}]"] {
            assert_eq!(parse(body).unwrap(), CheckDigest::default(), "{body}");
        }
    }

    #[tokio::test]
    async fn a_sweep_reads_each_service_in_turn_and_hurries_once_in_a_round() {
        let now = Instant::now();
        let services: BTreeMap<ServiceKey, ()> =
            (0..10).map(|n| ((0, format!("s{n}").parse().unwrap()), ())).collect();
        let mut sweep = Sweep::new(now);
        assert_eq!(sweep.take(&services, now), None);
        assert_eq!(sweep.due(10), now + IDLE_ROUND / 10);
        sweep.start_hurried_round(10, now);
        let read: Vec<ServiceKey> = std::iter::from_fn(|| sweep.take(&services, now)).collect();
        assert!(read.iter().eq(services.keys()), "{read:?}");
        // A second hurried round is refused; the sweep continues at its usual pace from the first service.
        sweep.start_hurried_round(10, now);
        assert_eq!(sweep.due(10), now + ROUND / 10);
        assert_eq!(sweep.take(&services, now), None);
        assert_eq!(sweep.take(&services, now + ROUND / 10).as_ref(), services.keys().next());
        sweep.start_hurried_round(10, now + ROUND);
        assert_eq!(sweep.take(&services, now + ROUND).as_ref(), services.keys().nth(1));
        assert_eq!(sweep.take(&BTreeMap::<ServiceKey, ()>::new(), now + ROUND), None);
        assert_eq!(Sweep::lateness(50_000), Duration::from_secs(100));
    }
}
