//! What is asked and answered on the socket: one line of JSON each, an answer for each question, in order.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use vmesh_capture::Spec;

/// A line beyond this is refused: far above the spec of a host with ten thousand destinations.
pub const MAX_LINE: usize = 4 << 20;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ask", deny_unknown_fields)]
pub enum Ask {
    /// What there is. Whoever gets to the socket may ask.
    Status,
    /// Envoy may have ended: is it there? Whoever gets to the socket may ask, and nobody is believed.
    Look,
    /// What would be done for a spec, or for what is wanted now. It changes nothing, and runs the tools that change rules.
    Plan { want: Option<Want> },
    /// This is to be on the host. Said at each change and after each connect.
    Want(Want),
    /// The agent is well. Said every second: its silence lets redirects lapse.
    Well,
    /// What is on trial works, as far as whoever asks can see.
    Confirm { trial: u64 },
    /// It does not.
    Revert { trial: u64, why: String },
    /// What was taken back may be tried again.
    Retry,
}

impl Ask {
    /// Whether anybody may ask it who gets to the socket.
    pub fn is_for_anybody(&self) -> bool {
        matches!(self, Ask::Status | Ask::Look)
    }
}

/// What an agent wants.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Want {
    pub spec: Spec,
    /// Where Envoy and the agent listen.
    pub ports: BTreeSet<u16>,
    pub control_planes: BTreeSet<SocketAddr>,
    /// Seconds that a trial may take before it is taken back.
    pub confirm_within: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Status(Box<Status>),
    /// For people.
    Plan(String),
    Refused(String),
}

/// Reports whether a plan ([`Answer::Plan`]) would change anything. Notes stand before it in any case, and change nothing.
pub fn would_change(plan: &str) -> bool {
    plan.lines().any(|line| is_step(line.trim()))
}

/// Reports whether a line of a plan says that something is to be done.
pub fn is_step(line: &str) -> bool {
    !line.is_empty() && line != "nothing to do" && !line.starts_with("note: ")
}

/// What is on the host, and why. Whoever asks may be older than who answers, for a moment in each upgrade: what it does not know,
/// it leaves out, since an agent that understood nothing would let redirects lapse.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    pub version: String,
    /// What changes the rules here: `nft` or `iptables`.
    pub backend: Option<String>,
    pub state: State,
    /// What is wanted now, without its endpoints. To be shown; nothing else goes by it.
    #[serde(deserialize_with = "known")]
    pub spec: Spec,
    pub virtual_addresses: usize,
    pub real_addresses: usize,
    /// The number of the trial that is under way.
    pub trial: Option<u64>,
    /// Seconds that it has left.
    pub trial_ends_in: Option<u64>,
    /// Why the last trial is not in force.
    pub reverted: Option<String>,
    pub envoy: Envoy,
    pub redirects: Redirects,
    /// Seconds since the agent last said that it is well.
    pub agent_silent_for: Option<u64>,
    pub drift: Drift,
    /// What of the spec has no effect on this host.
    pub notes: Vec<String>,
    /// Which captured connections do not arrive at Envoy. It is among `notes`, too.
    pub path_fault: Option<String>,
    /// Why the host is not as it is wanted.
    pub error: Option<String>,
    /// Open connections through a redirect, counted when this is asked for by [`Ask::Status`].
    pub connections: usize,
}

impl Status {
    /// Whether new connections go through Envoy now, of those that are meant to.
    pub fn captures(&self) -> bool {
        matches!(self.state, State::Trial | State::Confirmed)
            && self.error.is_none()
            && self.redirects != Redirects::Lapsed
            && self.envoy == Envoy::Well
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Nothing is wanted, and nothing is there.
    #[default]
    Off,
    /// Nothing new is captured; what was is left to end.
    Leaving,
    Trial,
    Confirmed,
    /// The flag of the bypass is there.
    Bypassed,
    /// One of a newer version.
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

/// Whether Envoy takes the connections that are redirected to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Envoy {
    /// Nobody looked: nothing is captured.
    #[default]
    Unknown,
    Well,
    /// Nobody listens.
    Gone,
    /// Somebody listens, and it is another user's program.
    Stranger,
    /// The kernel takes connections, and nobody serves them.
    Hangs,
    /// Something of a newer version.
    #[serde(other)]
    Other,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Redirects {
    /// There are none that could lapse.
    #[default]
    None,
    Hold,
    Lapsed,
    /// Something of a newer version.
    #[serde(other)]
    Other,
}

/// Changes of our rules by others, mended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Drift {
    pub count: u64,
    pub seconds_ago: Option<u64>,
    pub what: Vec<String>,
    /// `firewalld (pid 812)`, where the kernel said who.
    pub by: Option<String>,
}

/// What is understood of a value, or its default.
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
        let Answer::Status(status) = serde_json::from_str(newer).unwrap() else { panic!("no status") };
        assert_eq!((status.version.as_str(), status.trial), ("9", Some(7)));
        assert_eq!(
            (status.state, status.envoy, status.redirects),
            (State::Other, Envoy::Other, Redirects::Other)
        );
        assert_eq!(status.spec, Spec::default());
    }
}
