//! `vmeshctl doctor`: finds the problems of this host, with their effects and fixes.
//!
//! ```text
//! gather (all I/O, at most 5 s) --> Facts --> one pure function for each check --> Report --> text or JSON
//! ```
//!
//! The doctor changes nothing and needs no control plane. The report lists checks that were skipped, with the reason. A finding that
//! follows from another one is shown below it.

mod capture;
mod envoy;
mod facts;
mod gather;
mod identity;
mod machine;
mod mesh;
mod network;
mod report;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::HostError;
pub(crate) use facts::AgentConfig;
use facts::Facts;
pub(crate) use gather::read_configuration;
pub(crate) use report::Report;

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Make these checks only: `D16,D36`.
    #[arg(long, value_name = "CHECKS", value_delimiter = ',')]
    only: Vec<String>,
    /// The configuration of the agent.
    #[arg(long, value_name = "FILE", default_value = "/etc/vmesh/agent.yaml", env = "VMESH_AGENT_CONFIG")]
    config: PathBuf,
}

/// Returns the report as text and as JSON, and whether something needs attention.
pub(crate) async fn doctor(args: &DoctorArgs) -> Result<(String, serde_json::Value, bool), HostError> {
    if let Some(unknown) = args.only.iter().find(|only| !CHECKS.iter().any(|check| is_named(check, only))) {
        let all: Vec<_> = CHECKS.iter().map(|check| check.id).collect();
        return Err(HostError::Cannot(format!(
            "there is no check `{unknown}`; there are {}",
            all.join(", ")
        )));
    }
    let began = Instant::now();
    let facts = gather::facts(&args.config).await;
    let report = examine(&facts, &args.only, began.elapsed());
    Ok((report.text(), report.json(), report.wants_attention()))
}

fn is_named(check: &Check, name: &str) -> bool {
    check.id.eq_ignore_ascii_case(name.trim())
}

/// The findings of one check; none if all is well.
type Verdict = Result<Vec<Finding>, Skip>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Skip {
    /// The check was impossible, for this reason.
    Unavailable(String),
    /// The check does not apply to this host.
    NotApplicable,
}

impl From<String> for Skip {
    fn from(why: String) -> Skip {
        Skip::Unavailable(why)
    }
}

struct Check {
    id: &'static str,
    look: fn(&Facts) -> Verdict,
}

/// All checks. Their ids are documented in `docs/doctor.md`, and never change.
const CHECKS: &[Check] = &[
    Check { id: "D1", look: machine::system },
    Check { id: "D2", look: machine::units },
    Check { id: "D3", look: machine::disks },
    Check { id: "D4", look: machine::memory },
    Check { id: "D5", look: envoy::open_files },
    Check { id: "D6", look: machine::clock },
    Check { id: "D7", look: machine::identity },
    Check { id: "D9", look: mesh::control_planes },
    Check { id: "D11", look: network::ports },
    Check { id: "D12", look: network::conntrack },
    Check { id: "D13", look: network::ephemeral_ports },
    Check { id: "D14", look: network::routes },
    Check { id: "D15", look: network::ipv6 },
    Check { id: "D16", look: capture::rules },
    Check { id: "D17", look: capture::foreign_rules },
    Check { id: "D19", look: capture::loop_guard },
    Check { id: "D20", look: capture::dead_man },
    Check { id: "D21", look: capture::bypass },
    Check { id: "D22", look: mesh::workloads },
    Check { id: "D23", look: mesh::server_first },
    Check { id: "D24", look: envoy::version },
    Check { id: "D25", look: envoy::live },
    Check { id: "D26", look: envoy::rejections },
    Check { id: "D27", look: mesh::from_disk },
    Check { id: "D28", look: envoy::warming },
    Check { id: "D29", look: envoy::upstreams },
    Check { id: "D30", look: envoy::size },
    Check { id: "D31", look: identity::certificates },
    Check { id: "D32", look: identity::saved },
    Check { id: "D33", look: identity::trust },
    Check { id: "D34", look: identity::workloads },
    Check { id: "D36", look: mesh::names },
    Check { id: "D37", look: mesh::registrations },
    Check { id: "D38", look: mesh::age },
    Check { id: "D39", look: mesh::endpoints },
    Check { id: "D40", look: capture::end_to_end },
];

/// A condition that other findings may follow from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RootCause {
    /// No valid configuration exists.
    AgentConfig,
    Agent,
    Envoy,
    Net,
    Bypass,
    ControlPlane,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// Something does not work.
    Wrong,
    /// The problem has no effect yet, or degrades a function without breaking it.
    Warning,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fix {
    /// A command for root.
    Run(String),
    /// An instruction, where no single command suffices.
    Do(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    id: &'static str,
    level: Level,
    what: String,
    effect: String,
    fix: Fix,
    is: Option<RootCause>,
    follows: &'static [RootCause],
}

/// Returns a finding that something does not work.
fn wrong(what: impl Into<String>, effect: impl Into<String>, fix: Fix) -> Finding {
    let (what, effect) = (what.into(), effect.into());
    Finding { id: "", level: Level::Wrong, what, effect, fix, is: None, follows: &[] }
}

fn warning(what: impl Into<String>, effect: impl Into<String>, fix: Fix) -> Finding {
    Finding { level: Level::Warning, ..wrong(what, effect, fix) }
}

fn run(command: impl Into<String>) -> Fix {
    Fix::Run(command.into())
}

fn by_hand(what: impl Into<String>) -> Fix {
    Fix::Do(what.into())
}

impl Finding {
    /// Marks this finding as the condition `root`, which other findings may follow from.
    fn marked_as(self, root: RootCause) -> Finding {
        Finding { is: Some(root), ..self }
    }

    /// Lists the conditions that this finding may follow from. The report shows it below the first of these conditions that holds.
    fn follows(self, roots: &'static [RootCause]) -> Finding {
        Finding { follows: roots, ..self }
    }
}

fn examine(facts: &Facts, only: &[String], took: std::time::Duration) -> Report {
    let mut report = Report::new(facts, took);
    for check in CHECKS {
        if !only.is_empty() && !only.iter().any(|only| is_named(check, only)) {
            continue;
        }
        match (check.look)(facts) {
            Ok(findings) => report.looked(check.id, findings),
            Err(Skip::Unavailable(why)) => report.unseen(check.id, why),
            Err(Skip::NotApplicable) => {}
        }
    }
    report
}
