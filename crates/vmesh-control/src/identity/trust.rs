//! The trust of each node, as nodes report it when they ask for certificates or for the trust bundle.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmesh_api::identity::RenewRequest;
use vmesh_identity::rotation::{Generation, NodeTrust};
use vmesh_model::NodeName;

use super::Authority;

/// The most nodes whose trust is remembered. Only nodes with a certificate of the mesh report.
const MAX_NODES: usize = 100_000;
/// The shortest pause after which a node asks for the trust bundle again.
const ASK_AGAIN: Duration = Duration::from_secs(30);
/// The shortest pause while the root is being replaced.
const ASK_AGAIN_IN_ROTATION: Duration = Duration::from_secs(5);
/// The most requests for the trust bundle in a second, from all nodes together.
const REQUESTS_PER_SECOND: u64 = 50;
/// The most roots that a node may report.
const MAX_ROOTS: usize = 8;

/// A node that has joined, connected or offline.
#[derive(Debug, Clone)]
pub(crate) struct KnownNode {
    pub(crate) name: NodeName,
    /// The Unix time since which it is offline; `None` while it is connected.
    pub(crate) offline_since: Option<u64>,
}

/// The last report of each node.
#[derive(Debug, Default)]
pub(crate) struct TrustReports(Mutex<BTreeMap<NodeName, TrustReport>>);

#[derive(Debug)]
struct TrustReport {
    bundle: Option<String>,
    roots: BTreeSet<String>,
    /// Unix seconds.
    expires: u64,
}

impl TrustReports {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeName, TrustReport>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn record(&self, node: &NodeName, asked: &RenewRequest) {
        let report = TrustReport {
            bundle: asked.bundle.clone(),
            roots: asked.roots.iter().take(MAX_ROOTS).cloned().collect(),
            expires: asked.expires,
        };
        let mut reports = self.lock();
        if reports.len() < MAX_NODES || reports.contains_key(node) {
            reports.insert(node.clone(), report);
        }
    }

    /// Reports whether a node is to renew its certificates now, because the root that signed them is being replaced.
    pub(crate) fn should_renew(&self, node: &NodeName, authority: &Authority) -> bool {
        let issues_new = authority.rotation().is_some_and(|rotation| rotation.issuer() == Generation::New);
        let Some(next) = authority.next_root_key().filter(|_| issues_new) else { return false };
        self.lock().get(node).is_some_and(|report| report.roots.iter().any(|root| *root != next))
    }

    /// Returns the pause after which a node asks again, which grows with the fleet.
    pub(crate) fn ask_again_in(&self, authority: &Authority) -> Duration {
        let shortest = if authority.rotation().is_some() { ASK_AGAIN_IN_ROTATION } else { ASK_AGAIN };
        shortest.max(Duration::from_secs(self.lock().len() as u64 / REQUESTS_PER_SECOND))
    }

    /// Returns the trust of each known node. A node that has reported nothing since this process started has neither the bundle nor new
    /// certificates.
    pub(crate) fn of(&self, known: &[KnownNode], authority: &Authority, now: SystemTime) -> Vec<NodeTrust> {
        let (bundle, next) = (authority.bundle().version(), authority.next_root_key());
        let reports = self.lock();
        let trust = known.iter().map(|KnownNode { name, offline_since }| {
            let report = reports.get(name);
            let has_new = |report: &TrustReport| {
                !report.roots.is_empty() && report.roots.iter().all(|root| Some(root) == next.as_ref())
            };
            let last_seen = offline_since.map_or(now, |since| UNIX_EPOCH + Duration::from_secs(since));
            let reported = report.map(|report| report.expires).filter(|expires| *expires > 0);
            NodeTrust {
                node: name.clone(),
                is_connected: offline_since.is_none(),
                has_bundle: report.is_some_and(|report| report.bundle.as_ref() == Some(&bundle)),
                leaf: if report.is_some_and(has_new) { Generation::New } else { Generation::Old },
                leaf_expires: match reported {
                    Some(expires) => UNIX_EPOCH + Duration::from_secs(expires),
                    None => last_seen + authority.leaf_lifetime(),
                },
            }
        });
        trust.collect()
    }
}
