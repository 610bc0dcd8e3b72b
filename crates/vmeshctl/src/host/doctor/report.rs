//! What is printed: red first, what follows from something below it, what was not looked at last.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::facts::{Config, Facts, Question, Socket};
use super::{Finding, Fix, Level};

pub(crate) struct Report {
    who: String,
    took: Duration,
    looked: Vec<&'static str>,
    findings: Vec<Finding>,
    unseen: Vec<(&'static str, String)>,
}

impl Report {
    pub(super) fn new(facts: &Facts, took: Duration) -> Report {
        Report { who: who(facts), took, looked: Vec::new(), findings: Vec::new(), unseen: Vec::new() }
    }

    pub(super) fn looked(&mut self, id: &'static str, findings: Vec<Finding>) {
        self.looked.push(id);
        self.findings.extend(findings.into_iter().map(|finding| Finding { id, ..finding }));
    }

    pub(super) fn unseen(&mut self, id: &'static str, why: String) {
        self.unseen.push((id, why));
    }

    pub(crate) fn wants_attention(&self) -> bool {
        !self.findings.is_empty()
    }

    /// Each finding that follows from no other, with those that follow from it; red first.
    fn folded(&self) -> Vec<(&Finding, Vec<&Finding>)> {
        let cause = |finding: &Finding| {
            // Nothing follows from itself.
            let others =
                |root| self.findings.iter().position(|other| other.is == Some(root) && other != finding);
            finding.follows.iter().find_map(|root| others(*root))
        };
        // What follows from something that follows stands below the first cause. Roots are few and form no circle; the bound
        // is for one that would be made by mistake.
        let first = |finding: &Finding| {
            let mut found = None;
            let mut of = cause(finding);
            for _ in 0..self.findings.len() {
                let Some(index) = of else { break };
                found = Some(index);
                of = self.findings.get(index).and_then(cause);
            }
            found
        };
        let mut folded: Vec<(usize, &Finding, Vec<&Finding>)> = Vec::new();
        for (index, finding) in self.findings.iter().enumerate() {
            if first(finding).is_none() {
                folded.push((index, finding, Vec::new()));
            }
        }
        for finding in &self.findings {
            let of = first(finding);
            if let Some((_, _, below)) = folded.iter_mut().find(|(index, ..)| Some(*index) == of) {
                below.push(finding);
            }
        }
        folded.sort_by_key(|(_, finding, _)| finding.level);
        folded.into_iter().map(|(_, finding, below)| (finding, below)).collect()
    }

    /// The checks that were not made, by why.
    fn unseen_by_reason(&self) -> BTreeMap<&str, Vec<&'static str>> {
        let mut reasons: BTreeMap<&str, Vec<&'static str>> = BTreeMap::new();
        for (id, why) in &self.unseen {
            reasons.entry(why).or_default().push(id);
        }
        reasons
    }

    pub(crate) fn text(&self) -> String {
        let folded = self.folded();
        let count = |number: usize, noun: &str| match number {
            1 => format!("1 {noun}"),
            more => format!("{more} {noun}s"),
        };
        let mut text = format!(
            "{}, {}, {:.1} s   {}\n",
            count(self.looked.len(), "check"),
            count(folded.len(), "problem"),
            self.took.as_secs_f64(),
            self.who
        );
        for (finding, below) in folded {
            let mark = if finding.level == Level::Wrong { 'x' } else { '!' };
            let Finding { id, what, effect, .. } = finding;
            let fix = match &finding.fix {
                Fix::Run(command) | Fix::Do(command) => command,
            };
            text += &format!("{mark} {id} {what} | {effect} | fix: {fix}\n");
            for Finding { id, what, .. } in below {
                text += &format!("    and so {id} {what}\n");
            }
        }
        for (why, checks) in self.unseen_by_reason() {
            text += &format!("- not looked at: {}: {why}\n", checks.join(", "));
        }
        text
    }

    pub(crate) fn json(&self) -> Value {
        let show = |finding: &Finding| {
            let (kind, fix) = match &finding.fix {
                Fix::Run(command) => ("run", command),
                Fix::Do(what) => ("do", what),
            };
            json!({
                "check": finding.id,
                "level": if finding.level == Level::Wrong { "wrong" } else { "warning" },
                "what": finding.what,
                "effect": finding.effect,
                "fix": {kind: fix},
            })
        };
        let problems = self.folded().into_iter().map(|(finding, below)| {
            let mut one = show(finding);
            if let Some(fields) = one.as_object_mut() {
                fields.insert("and_so".into(), below.into_iter().map(show).collect());
            }
            one
        });
        json!({
            "host": self.who,
            "seconds": (self.took.as_secs_f64() * 10.0).round() / 10.0,
            "looked_at": self.looked,
            "problems": problems.collect::<Vec<_>>(),
            "not_looked_at": self.unseen_by_reason().into_iter()
                .map(|(why, checks)| json!({"checks": checks, "why": why})).collect::<Vec<_>>(),
        })
    }
}

/// `node web-17 (agent 0.1.0, envoy 1.40.0)`
fn who(facts: &Facts) -> String {
    let agent = facts.answer(Socket::Agent).ok().and_then(|status| status.get("version")?.as_str());
    let installed = facts.out(Question::Version).ok().and_then(|said| said.split_whitespace().nth(1));
    let envoy = super::envoy::version_of(facts);
    let mut parts = Vec::new();
    parts.extend(agent.or(installed).map(|version| format!("agent {version}")));
    parts.extend(envoy.map(|version| format!("envoy {version}")));
    let node = match &facts.config {
        Config::Read(outline) => format!("node {}", outline.node),
        _ => "this host".to_owned(),
    };
    if parts.is_empty() { node } else { format!("{node} ({})", parts.join(", ")) }
}
