//! The protocol of the socket: one line of JSON for each request and for its response, in order.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use vmesh_capture::Spec;

/// The limit of a line, in bytes. It is far above the spec of a host with ten thousand destinations.
pub const MAX_LINE: usize = 4 << 20;

/// A request to vmesh-net.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ask", deny_unknown_fields)]
pub enum Request {
    /// Asks for the status. Every client may send this.
    Status,
    /// Reports that Envoy may have ended. Every client may send this: vmesh-net believes only its own check.
    Look,
    /// Asks for the changes that a spec, or the current one, would cause. Nothing is changed, but the tools
    /// are run.
    Plan { want: Option<CaptureRequest> },
    /// Requests a capture. The agent sends this at each change and after each connect.
    Want(CaptureRequest),
    /// Reports that the agent is well. The agent sends this each second; without it, redirects lapse.
    Well,
    /// Confirms that the trial works, as far as the client can tell.
    Confirm { trial: u64 },
    /// Reports that the trial does not work.
    Revert { trial: u64, why: String },
    /// Allows the rolled-back spec to be tried again.
    Retry,
}

impl Request {
    /// Reports whether every client that can reach the socket may send this request.
    pub fn is_for_anybody(&self) -> bool {
        matches!(self, Request::Status | Request::Look)
    }
}

/// The capture that an agent asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CaptureRequest {
    pub spec: Spec,
    /// The ports on which Envoy and the agent listen.
    pub ports: BTreeSet<u16>,
    pub control_planes: BTreeSet<SocketAddr>,
    /// The time in seconds after which an unconfirmed trial is rolled back.
    pub confirm_within: u32,
}

/// A response of vmesh-net.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    Status(Box<Status>),
    /// The plan, as text for people.
    Plan(String),
    /// The reason why the request was refused.
    Refused(String),
}

/// Reports whether a plan ([`Response::Plan`]) would change anything. The notes at its beginning change
/// nothing.
pub fn would_change(plan: &str) -> bool {
    plan.lines().any(|line| is_step(line.trim()))
}

/// Reports whether a line of a plan names something to be done.
pub fn is_step(line: &str) -> bool {
    !line.is_empty() && line != "nothing to do" && !line.starts_with("note: ")
}

/// The state of capture on this host, and the reasons for it.
///
/// During an upgrade the client may be older than vmesh-net. It ignores what it does not know: an agent that
/// rejected the whole status would let redirects lapse.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    pub version: String,
    /// The tool that changes the rules: `nft` or `iptables`.
    pub backend: Option<String>,
    pub state: State,
    /// The wanted spec without its endpoints. For display only.
    #[serde(deserialize_with = "known")]
    pub spec: Spec,
    pub virtual_addresses: usize,
    pub real_addresses: usize,
    /// The number of the current trial.
    pub trial: Option<u64>,
    /// The time in seconds until the trial is rolled back.
    pub trial_ends_in: Option<u64>,
    /// The reason why the last trial is not in force.
    pub reverted: Option<String>,
    pub envoy: EnvoyHealth,
    pub redirects: RedirectState,
    /// The time in seconds since the agent last reported that it is well.
    pub agent_silent_for: Option<u64>,
    pub drift: Drift,
    /// The parts of the spec that have no effect on this host.
    pub notes: Vec<String>,
    /// The captured connections that do not arrive at Envoy, and why. `notes` includes this text.
    pub path_fault: Option<String>,
    /// The reason why the host's rules are not the wanted ones.
    pub error: Option<String>,
    /// The number of open connections through a redirect, counted for [`Request::Status`] only.
    pub connections: usize,
}

impl Status {
    /// Reports whether new connections go through Envoy now, as far as they should.
    pub fn captures(&self) -> bool {
        matches!(self.state, State::Trial | State::Confirmed)
            && self.error.is_none()
            && self.redirects != RedirectState::Lapsed
            && self.envoy == EnvoyHealth::Well
    }
}

/// The state of capture.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Nothing is captured, and no rule is left.
    #[default]
    Off,
    /// Nothing new is captured, and redirected connections drain.
    Leaving,
    /// A spec is in force on trial.
    Trial,
    /// A confirmed spec is in force.
    Confirmed,
    /// The operator's bypass is set.
    Bypassed,
    /// A state of a newer version.
    #[serde(other)]
    Other,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Off => "off",
            State::Leaving => "leaving",
            State::Trial => "on trial",
            State::Confirmed => "confirmed",
            State::Bypassed => "bypassed",
            State::Other => "in a state that this version does not know",
        })
    }
}

/// The health of Envoy's listener for captured connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EnvoyHealth {
    /// The listener is not checked, because nothing is captured.
    #[default]
    Unknown,
    /// The listener serves connections.
    Well,
    /// The port is closed.
    Gone,
    /// The port is held by a process of another user.
    #[serde(rename = "stranger")]
    WrongUser,
    /// The kernel accepts connections, but no process serves them.
    Hangs,
    /// A value of a newer version.
    #[serde(other)]
    Other,
}

/// The state of the redirects that can lapse.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RedirectState {
    /// No redirect can lapse.
    #[default]
    None,
    /// The redirects are in force.
    Hold,
    /// The redirects have lapsed, so connections go past Envoy.
    Lapsed,
    /// A value of a newer version.
    #[serde(other)]
    Other,
}

/// Changes of vmesh's rules by other programs, which vmesh-net has repaired.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Drift {
    pub count: u64,
    pub seconds_ago: Option<u64>,
    pub what: Vec<String>,
    /// The program that changed them, such as `firewalld (pid 812)`, if the kernel reported it.
    pub by: Option<String>,
}

/// Deserializes a value, or returns the default if this version does not understand it.
fn known<'de, D: Deserializer<'de>, T: DeserializeOwned + Default>(deserializer: D) -> Result<T, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    Ok(serde_json::from_value(value).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_of_notes_alone_changes_nothing() {
        for (plan, changes) in [
            ("nothing to do\n", false),
            ("note: outbound.dial: cron.service does not run\nnothing to do\n", false),
            ("note: a\nnote: b\n\nnothing to do\n", false),
            ("note: a\nadd table inet vmesh\n\nnft -f - <<'.'\n.\n", true),
            ("", false),
        ] {
            assert_eq!(would_change(plan), changes, "{plan}");
        }
    }

    #[test]
    fn an_older_agent_understands_what_it_knows_of_a_newer_answer() {
        let newer = r#"{"status": {"version": "9", "state": "hibernates", "envoy": "winks", "redirects": "bend",
            "spec": {"outbound": {"capture": "everything"}, "udp": {}}, "trial": 7, "moon": "full"}}"#;
        let Response::Status(status) = serde_json::from_str(newer).unwrap() else { panic!("no status") };
        assert_eq!((status.version.as_str(), status.trial), ("9", Some(7)));
        assert_eq!(
            (status.state, status.envoy, status.redirects),
            (State::Other, EnvoyHealth::Other, RedirectState::Other)
        );
        assert_eq!(status.spec, Spec::default());
    }
}
