//! Prints the report: errors first, findings that follow from another one below it, checks that were not made last.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::facts::{AgentConfig, Facts, HostCommand, HttpQuery};
use super::{Finding, Fix, Level};
use crate::print::printable;

pub(crate) struct Report {
    who: String,
    took: Duration,
    looked: Vec<&'static str>,
    findings: Vec<Finding>,
    unseen: Vec<(&'static str, String)>,
}

impl Report {
    pub(super) fn new(facts: &Facts, took: Duration) -> Report {
        Report { who: subject(facts), took, looked: Vec::new(), findings: Vec::new(), unseen: Vec::new() }
    }

    pub(super) fn looked(&mut self, id: &'static str, findings: Vec<Finding>) {
        self.looked.push(id);
        // Findings quote Envoy, control planes and resolvers, so they are sanitised.
        let shown = findings.into_iter().map(|finding| Finding {
            id,
            what: printable_lines(&finding.what),
            effect: printable_lines(&finding.effect),
            fix: match finding.fix {
                Fix::Run(command) => Fix::Run(printable_lines(&command)),
                Fix::Do(what) => Fix::Do(printable_lines(&what)),
            },
            ..finding
        });
        self.findings.extend(shown);
    }

    pub(super) fn unseen(&mut self, id: &'static str, why: String) {
        self.unseen.push((id, printable_lines(&why)));
    }

    pub(crate) fn wants_attention(&self) -> bool {
        !self.findings.is_empty()
    }

    /// Returns every finding exactly once: first the findings that follow from no other, errors first, each with the findings that follow
    /// from it.
    fn folded(&self) -> Vec<(&Finding, Vec<&Finding>)> {
        let heads = self.heads();
        let mut folded: Vec<(usize, &Finding, Vec<&Finding>)> = Vec::new();
        for (index, finding) in self.findings.iter().enumerate() {
            if heads.get(index) == Some(&index) {
                folded.push((index, finding, Vec::new()));
            }
        }
        for (index, (finding, head)) in self.findings.iter().zip(&heads).enumerate() {
            if index == *head {
                continue;
            }
            match folded.iter_mut().find(|(of, ..)| of == head) {
                Some((_, _, below)) => below.push(finding),
                // Every head heads itself, so this is never reached; a finding would rather be printed alone than be lost.
                None => folded.push((index, finding, Vec::new())),
            }
        }
        folded.sort_by_key(|(_, finding, _)| finding.level);
        folded.into_iter().map(|(_, finding, below)| (finding, below)).collect()
    }

    /// Returns, for each finding, the index of the finding that it is printed below; a finding that heads its own entry has its own index.
    /// Two findings may name each other as their cause, as a hanging Envoy and its silent ports do. Of such a cycle, the gravest finding
    /// heads the others; of equally grave ones, the first.
    fn heads(&self) -> Vec<usize> {
        let causes: Vec<Option<usize>> = (0..self.findings.len()).map(|index| self.cause(index)).collect();
        let cause_of = |index: usize| causes.get(index).copied().flatten();
        let level_of = |index: usize| self.findings.get(index).map(|finding| finding.level);
        (0..self.findings.len())
            .map(|index| {
                let mut path = vec![index];
                let mut last = index;
                loop {
                    let Some(next) = cause_of(last) else { return last };
                    if let Some(at) = path.iter().position(|passed| *passed == next) {
                        let circle = path.iter().skip(at).copied();
                        return circle.min_by_key(|one| (level_of(*one), *one)).unwrap_or(index);
                    }
                    path.push(next);
                    last = next;
                }
            })
            .collect()
    }

    /// Returns the index of the finding that this one follows from. Never its own index.
    fn cause(&self, index: usize) -> Option<usize> {
        let finding = self.findings.get(index)?;
        let others = |root| {
            let mut others = self.findings.iter().enumerate();
            others.find(|(at, other)| *at != index && other.is == Some(root)).map(|(at, _)| at)
        };
        finding.follows.iter().find_map(|root| others(*root))
    }

    /// Returns the checks that were not made, by reason.
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

/// Sanitises `text` line by line. Lines after the first are indented, so that none of them looks like a finding.
fn printable_lines(text: &str) -> String {
    let lines: Vec<String> = text.lines().map(printable).collect();
    lines.join("\n      ")
}

/// Returns the subject of the report, such as `node web-17 (agent 0.1.0, envoy 1.40.0)`.
fn subject(facts: &Facts) -> String {
    let agent = facts.answer(HttpQuery::Agent).ok().and_then(|status| status.get("version")?.as_str());
    let installed =
        facts.out(HostCommand::Version).ok().and_then(|printed| printed.split_whitespace().nth(1));
    let envoy = super::envoy::version_of(facts);
    let mut parts = Vec::new();
    parts.extend(agent.or(installed).map(|version| format!("agent {version}")));
    parts.extend(envoy.map(|version| format!("envoy {version}")));
    let node = match &facts.config {
        AgentConfig::Read(outline) => format!("node {}", outline.node),
        _ => "this host".to_owned(),
    };
    printable(&if parts.is_empty() { node } else { format!("{node} ({})", parts.join(", ")) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::host::doctor::{RootCause, by_hand};

    const ROOTS: [RootCause; 6] = [
        RootCause::AgentConfig,
        RootCause::Agent,
        RootCause::Envoy,
        RootCause::Net,
        RootCause::Bypass,
        RootCause::ControlPlane,
    ];
    /// Ways in which a finding names its causes, including all six conditions at once.
    const FOLLOWS: [&[RootCause]; 9] = [
        &[],
        &[RootCause::AgentConfig],
        &[RootCause::Agent],
        &[RootCause::Envoy],
        &[RootCause::Net, RootCause::Envoy],
        &[RootCause::Envoy, RootCause::Agent, RootCause::ControlPlane],
        &[RootCause::Bypass, RootCause::Net],
        &[RootCause::ControlPlane],
        &ROOTS,
    ];

    fn report(findings: Vec<Finding>) -> Report {
        Report {
            who: "this host".into(),
            took: Duration::ZERO,
            looked: Vec::new(),
            findings,
            unseen: Vec::new(),
        }
    }

    fn finding(number: usize, level: Level, is: Option<usize>, follows: usize) -> Finding {
        Finding {
            id: "D1",
            level,
            // Not the number alone: findings may well be equal to each other.
            what: format!("finding {}", number % 3),
            effect: "effect".into(),
            fix: by_hand("fix"),
            is: is.map(|root| ROOTS[root % ROOTS.len()]),
            follows: FOLLOWS[follows % FOLLOWS.len()],
        }
    }

    proptest! {
        #[test]
        fn no_finding_is_dropped_and_none_is_printed_twice(
            all in prop::collection::vec((any::<bool>(), prop::option::of(0..6usize), 0..9usize), 0..12)
        ) {
            let findings: Vec<Finding> = all
                .iter()
                .enumerate()
                .map(|(number, (wrong, is, follows))| {
                    finding(number, if *wrong { Level::Wrong } else { Level::Warning }, *is, *follows)
                })
                .collect();
            let report = report(findings);
            let folded = report.folded();
            let mut printed: Vec<*const Finding> = folded
                .iter()
                .flat_map(|(head, below)| std::iter::once(*head).chain(below.iter().copied()))
                .map(|finding| finding as *const Finding)
                .collect();
            printed.sort_unstable();
            printed.dedup();
            prop_assert_eq!(printed.len(), all.len());
            prop_assert_eq!(folded.iter().map(|(_, below)| 1 + below.len()).sum::<usize>(), all.len());
            let lines = report.text().lines().filter(|line| line.contains("finding ")).count();
            prop_assert_eq!(lines, all.len());
            // A report without problems is a report without findings.
            prop_assert_eq!(report.text().contains(" 0 problems"), all.is_empty());
        }
    }

    #[test]
    fn of_findings_that_name_each_other_the_gravest_and_first_is_the_head() {
        let envoy = Some(2);
        let of = |levels: [Level; 2]| {
            let findings = levels.into_iter().enumerate().map(|(n, level)| finding(n, level, envoy, 3));
            let report = report(findings.collect());
            let folded = report.folded();
            assert_eq!(folded.len(), 1);
            folded[0].0.what.clone()
        };
        assert_eq!(of([Level::Wrong, Level::Wrong]), "finding 0");
        assert_eq!(of([Level::Warning, Level::Wrong]), "finding 1");
    }
}
