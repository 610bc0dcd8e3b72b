//! Conflicts: the inbound ports that a redirect would open or close against the host's own filter.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::packet::Packet;
use super::ruleset::{ForeignRule, Outcome, Ruleset};
use super::{MAX_JUDGED_RANGES, MAX_STEPS_OF_ALL};
use crate::spec::{INBOUND_PORT, Ports, Spec};

/// The time for which the last complete verdict stays valid while the rules cannot be read. With a longer
/// time, a redirect could bypass a firewall that was installed meanwhile. With none, a single slow listing
/// would switch capture off.
pub(super) const VERDICT_VALID_FOR: Duration = Duration::from_secs(300);

/// A disagreement between the host's own filter and an inbound redirect of some ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Conflict {
    /// The redirect would let in connections that the filter refuses.
    Opens { ports: Ports, refused_by: ForeignRule },
    /// The filter would refuse redirected connections although it accepts the original ones.
    Closes { ports: Ports, refused_by: ForeignRule },
    /// The effect is unknown, because rules could not be read or exceed the limits.
    Unjudged { ports: Ports, why: String },
}

impl Conflict {
    pub fn ports(&self) -> Ports {
        match self {
            Conflict::Opens { ports, .. }
            | Conflict::Closes { ports, .. }
            | Conflict::Unjudged { ports, .. } => *ports,
        }
    }

    fn ports_mut(&mut self) -> &mut Ports {
        match self {
            Conflict::Opens { ports, .. }
            | Conflict::Closes { ports, .. }
            | Conflict::Unjudged { ports, .. } => ports,
        }
    }

    /// Extends this conflict by `next` if `next` is the same conflict for the adjacent ports.
    fn absorb(&mut self, next: &Conflict) -> bool {
        let (mine, theirs) = (self.ports(), next.ports());
        let follows = mine.last().checked_add(1) == Some(theirs.first());
        let Some(both) = Ports::range(mine.first(), theirs.last()).filter(|_| follows) else { return false };
        let widened = |conflict: &Conflict| {
            let mut conflict = conflict.clone();
            *conflict.ports_mut() = both;
            conflict
        };
        let is_same = widened(self) == widened(next);
        if is_same {
            *self = widened(self);
        }
        is_same
    }
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Conflict::Opens { ports, refused_by } => write!(
                f,
                "this host's own filter keeps port {ports} closed ({refused_by}) and accepts translated connections, so a redirect would \
                 open the port to the network. Use `capture.inbound: {{capture: tproxy}}`, open the port in the filter, or allow the \
                 redirect with `capture.inbound: {{capture: redirect, bypass_filter: {}}}`",
                bypass(*ports)
            ),
            Conflict::Closes { ports, refused_by } => write!(
                f,
                "this host's own filter accepts connections to port {ports}, and refuses them once they are redirected to Envoy's port \
                 {INBOUND_PORT} ({refused_by}). Accept TCP port {INBOUND_PORT} in the filter, or use `capture.inbound: {{capture: tproxy}}`"
            ),
            Conflict::Unjudged { ports, why } => write!(
                f,
                "vmesh cannot tell whether this host's own filter keeps port {ports} closed ({why}), and a redirect could open the port to \
                 the network. Use `capture.inbound: {{capture: tproxy}}`, or allow the redirect with `capture.inbound: {{capture: redirect, \
                 bypass_filter: {}}}`",
                bypass(*ports)
            ),
        }
    }
}

/// Formats `bypass_filter` for these ports as YAML.
fn bypass(ports: Ports) -> String {
    if ports.first() == ports.last() { format!("[{ports}]") } else { format!("[\"{ports}\"]") }
}

/// Finds the ports that an inbound redirect would certainly open or close, and those that cannot be judged.
pub fn inbound_conflicts(rules: &Ruleset, ports: &BTreeSet<Ports>) -> Vec<Conflict> {
    let packet = Packet::from_outside;
    if let Some(why) = rules.gaps() {
        return ports.iter().map(|ports| Conflict::Unjudged { ports: *ports, why: why.clone() }).collect();
    }
    let mut left = MAX_STEPS_OF_ALL;
    let redirected =
        [true, false].map(|is_ipv4| (is_ipv4, rules.judge(&packet(is_ipv4, INBOUND_PORT, true), &mut left)));
    let mut conflicts: Vec<Conflict> = Vec::new();
    for (number, range) in rules.split_by_rules(ports).enumerate() {
        let conflict = if number < MAX_JUDGED_RANGES {
            let of_family = |(is_ipv4, redirected): &(bool, Outcome)| {
                let direct = rules.judge(&packet(*is_ipv4, range.first(), false), &mut left);
                conflict(range, &direct, redirected)
            };
            redirected.iter().find_map(of_family)
        } else {
            let why = format!("its rules split the captured ports into more than {MAX_JUDGED_RANGES} ranges");
            Some(Conflict::Unjudged { ports: range, why })
        };
        let Some(conflict) = conflict else { continue };
        if !conflicts.last_mut().is_some_and(|last| last.absorb(&conflict)) {
            conflicts.push(conflict);
        }
    }
    conflicts
}

fn conflict(ports: Ports, direct: &Outcome, redirected: &Outcome) -> Option<Conflict> {
    if let Some(bound) = direct.gave_up.or(redirected.gave_up) {
        return Some(Conflict::Unjudged { ports, why: bound.to_owned() });
    }
    match (direct.drops.first(), &direct.accepts, redirected.drops.first(), &redirected.accepts) {
        // The filter refuses some or all sources today. A redirect would make it accept all sources.
        (Some(refused_by), _, None, _) => Some(Conflict::Opens { ports, refused_by: refused_by.clone() }),
        (_, Some(_), Some(refused_by), None) => {
            Some(Conflict::Closes { ports, refused_by: refused_by.clone() })
        }
        _ => None,
    }
}

/// Judges inbound ports against the foreign rules, once for each reading of the rules, however often
/// endpoints change.
///
/// Call [`InboundJudge::forget`] when another program has changed rules. If [`InboundJudge::rules`] then
/// returns `None`, read the rules and pass them to [`InboundJudge::set_rules`]. Then call [`InboundJudge::judge`].
#[derive(Debug, Default)]
pub struct InboundJudge {
    rules: Option<Ruleset>,
    verdict: Option<(BTreeSet<Ports>, Arc<Judgement>)>,
    /// The last verdict on a complete reading of the rules, and the time of that reading.
    last_complete: Option<(BTreeSet<Ports>, Arc<Judgement>, Instant)>,
}

/// The result of one judgement.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    pub conflicts: Vec<Conflict>,
    /// The reason why the verdict is based on an earlier reading, if it is.
    pub outdated: Option<String>,
}

impl Judgement {
    /// Removes the conflicting ports from `spec`. Returns a note for each conflict.
    pub fn remove_conflicts(&self, spec: &mut Spec) -> Vec<String> {
        let outdated = self.outdated.iter().map(|why| {
            format!("inbound.ports: the rules of this host's own filter could not be read, so their last reading is used for up to 5 minutes: {why}")
        });
        let mut notes: Vec<String> = outdated.collect();
        for conflict in &self.conflicts {
            spec.inbound.remove_ports(conflict.ports());
            notes.push(format!("inbound.ports: {} is not captured: {conflict}", conflict.ports()));
        }
        notes
    }
}

impl InboundJudge {
    /// Judges `ports` by another reading of the rules, as this judge would, without recording that reading.
    pub fn judge_with(&self, rules: Ruleset, ports: &BTreeSet<Ports>, now: Instant) -> Arc<Judgement> {
        let mut other = InboundJudge { last_complete: self.last_complete.clone(), ..InboundJudge::default() };
        other.set_rules(rules);
        other.judge(ports, now)
    }

    /// Forgets the rules, because they have changed or may have.
    pub fn forget(&mut self) {
        self.rules = None;
        self.verdict = None;
    }

    /// Returns the rules, if they were read since the last change.
    pub fn rules(&self) -> Option<&Ruleset> {
        self.rules.as_ref()
    }

    /// Records the current rules.
    pub fn set_rules(&mut self, rules: Ruleset) {
        self.verdict = None;
        self.rules = Some(rules);
    }

    /// Judges `ports`. If the current reading has gaps, the last complete verdict on the same ports stays
    /// valid for five minutes. Without such a verdict, the ports are [`Conflict::Unjudged`].
    pub fn judge(&mut self, ports: &BTreeSet<Ports>, now: Instant) -> Arc<Judgement> {
        let Some(rules) = &self.rules else {
            let why = "its rules were not read yet";
            let unjudged = |ports: &Ports| Conflict::Unjudged { ports: *ports, why: why.to_owned() };
            return Arc::new(Judgement { conflicts: ports.iter().map(unjudged).collect(), outdated: None });
        };
        if let Some((judged, verdict)) = &self.verdict
            && judged == ports
        {
            return Arc::clone(verdict);
        }
        let last = self.last_complete.as_ref().filter(|(judged, _, read)| {
            judged == ports && now.saturating_duration_since(*read) < VERDICT_VALID_FOR
        });
        let verdict = match (rules.gaps(), last) {
            (None, _) => {
                let verdict =
                    Arc::new(Judgement { conflicts: inbound_conflicts(rules, ports), outdated: None });
                self.last_complete = Some((ports.clone(), Arc::clone(&verdict), now));
                verdict
            }
            // This verdict is not cached, because it expires.
            (Some(why), Some((_, verdict, _))) => {
                return Arc::new(Judgement { conflicts: verdict.conflicts.clone(), outdated: Some(why) });
            }
            (Some(_), None) => {
                Arc::new(Judgement { conflicts: inbound_conflicts(rules, ports), outdated: None })
            }
        };
        self.verdict = Some((ports.clone(), Arc::clone(&verdict)));
        verdict
    }
}
