//! The order in which the root or an intermediate of a mesh is replaced, so that every two nodes can connect at every moment.
//!
//! ```text
//!               the new authority exists   the bundle has both roots     new leaves come from the new authority
//! (steady) ---> Prepared -----------------> Distributing ---------------> Active --------------------------------> (steady)
//!                  |                            |       every live node      |       every live node has a leaf
//!                  v                            v       has the bundle       |       of the new authority
//!               (abort)                      (abort)                         +--> Distributing (step back)
//! ```
//!
//! Call [`Rotation::prepare`], then [`Rotation::next`] for as long as there is a rotation. Write each stage to the disk before it takes
//! effect. A control plane that is interrupted goes on with the stage on its disk.
//!
//! A node is *live* while it is connected or its leaf has not expired: a node that no control plane reaches still calls others. So a
//! step waits for nodes that are cut off, until an operator exempts them.

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use vmesh_model::NodeName;

/// The most nodes that a blocked step names; the others are counted.
const MAX_NAMED: usize = 20;
/// The time for which an expired leaf still counts as valid, for hosts whose clocks are slow.
pub const CLOCK_TOLERANCE: Duration = Duration::from_secs(300);

/// The step that a rotation has reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// The new authority exists, and nobody trusts it.
    Prepared,
    /// Nodes are sent a bundle with both roots. The old authority issues.
    Distributing,
    /// The new authority issues. Both roots are trusted.
    Active,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Prepared => "prepared",
            Stage::Distributing => "distributing",
            Stage::Active => "active",
        })
    }
}

/// One of the two authorities of a rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Generation {
    Old,
    New,
}

/// The trust of one node, as it last reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeTrust {
    pub node: NodeName,
    pub is_connected: bool,
    /// True if the node has acknowledged the bundle with both roots.
    pub has_bundle: bool,
    /// The authority of each of its leaves: the oldest decides.
    pub leaf: Generation,
    pub leaf_expires: SystemTime,
}

impl NodeTrust {
    /// Reports whether other nodes may meet this one.
    pub fn is_live(&self, now: SystemTime) -> bool {
        self.is_connected || self.leaf_expires + CLOCK_TOLERANCE > now
    }
}

/// An unfinished rotation, with its stage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rotation {
    stage: Stage,
    /// The time when the stage began.
    since: SystemTime,
    /// Nodes that no step waits for, by an operator's decision.
    exempt: BTreeSet<NodeName>,
    /// The time until which leaves of the new authority may be valid although the old one issues: set by a step back.
    new_leaves_until: Option<SystemTime>,
}

/// The outcome of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// The rotation continues, and has reached this stage.
    Stage(Rotation),
    /// The rotation is complete: the old root leaves the bundle.
    Finished,
}

/// The reason why a step cannot be taken, with the nodes that it waits for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.message())]
pub struct BlockedStep {
    stage: Stage,
    pub nodes: Vec<NodeName>,
}

impl BlockedStep {
    fn message(&self) -> String {
        let named: Vec<&str> = self.nodes.iter().take(MAX_NAMED).map(NodeName::as_str).collect();
        let more = match self.nodes.len() - named.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let lack = match self.stage {
            Stage::Prepared | Stage::Distributing => "have not acknowledged the bundle with both roots",
            Stage::Active => "still use certificates of the old authority",
        };
        format!(
            "these nodes {lack}: {}{more}. Bring them back, wait until their certificates expire, or exempt them with `--exempt NODE`",
            named.join(", ")
        )
    }
}

impl Rotation {
    /// Begins a rotation. The new authority exists by now.
    pub fn prepare(now: SystemTime) -> Rotation {
        Rotation { stage: Stage::Prepared, since: now, exempt: BTreeSet::new(), new_leaves_until: None }
    }

    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Returns when the stage began.
    pub fn since(&self) -> SystemTime {
        self.since
    }

    /// Exempts a node: no step waits for it. Connections between the node and others may fail until it has joined again.
    pub fn exempt(&mut self, node: NodeName) {
        self.exempt.insert(node);
    }

    /// Returns the authority that issues leaves.
    pub fn issuer(&self) -> Generation {
        match self.stage {
            Stage::Prepared | Stage::Distributing => Generation::Old,
            Stage::Active => Generation::New,
        }
    }

    /// Reports whether nodes are to trust `generation`.
    pub fn trusts(&self, generation: Generation) -> bool {
        generation == Generation::Old || self.stage != Stage::Prepared
    }

    /// Takes the next step, unless a live node is not ready for it.
    pub fn next(&self, fleet: &[NodeTrust], now: SystemTime) -> Result<Progress, BlockedStep> {
        let stage = match self.stage {
            Stage::Prepared => Stage::Distributing,
            Stage::Distributing => {
                self.wait_for(fleet, now, |node| node.has_bundle)?;
                Stage::Active
            }
            Stage::Active => {
                self.wait_for(fleet, now, |node| node.has_bundle && node.leaf == Generation::New)?;
                return Ok(Progress::Finished);
            }
        };
        let (exempt, new_leaves_until) = (self.exempt.clone(), self.new_leaves_until);
        Ok(Progress::Stage(Rotation { stage, since: now, exempt, new_leaves_until }))
    }

    /// Returns the stage to go back to, or `None` if the rotation is aborted: the bundle loses the new root. A rotation that was active goes
    /// back to `Distributing`, and stays there until every leaf of the new authority has expired: `leaf_lifetime` is the longest
    /// that it issued.
    pub fn step_back(&self, leaf_lifetime: Duration, now: SystemTime) -> Option<Rotation> {
        match self.stage {
            Stage::Active => {
                let new_leaves_until = Some(now + leaf_lifetime + CLOCK_TOLERANCE);
                let exempt = self.exempt.clone();
                Some(Rotation { stage: Stage::Distributing, since: now, exempt, new_leaves_until })
            }
            Stage::Distributing if self.new_leaves_until.is_some_and(|until| now < until) => {
                Some(self.clone())
            }
            Stage::Prepared | Stage::Distributing => None,
        }
    }

    fn wait_for(
        &self,
        fleet: &[NodeTrust],
        now: SystemTime,
        is_ready: impl Fn(&NodeTrust) -> bool,
    ) -> Result<(), BlockedStep> {
        let waits = fleet.iter().filter(|node| node.is_live(now) && !is_ready(node));
        let nodes: Vec<NodeName> =
            waits.map(|node| node.node.clone()).filter(|node| !self.exempt.contains(node)).collect();
        if nodes.is_empty() { Ok(()) } else { Err(BlockedStep { stage: self.stage, nodes }) }
    }
}

#[cfg(test)]
mod tests;
