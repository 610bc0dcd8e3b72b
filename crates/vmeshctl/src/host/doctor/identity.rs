//! D31 to D34: the certificates of this node, as its agent reports them.

use serde_json::Value;

use super::envoy::ago;
use super::facts::{Facts, HttpQuery};
use super::{RootCause, Skip, Verdict, by_hand, warning, wrong};

/// The share of the validity, in percent, below which a renewal is late: a healthy agent renews when two thirds are left.
const LATE: u64 = 50;
/// The age in seconds at which a trust bundle that no control plane has confirmed counts as old.
const OLD_BUNDLE: u64 = 3600;
/// The difference of clocks, in seconds, that certificates tolerate with room to spare.
const SKEW: i64 = 30;

/// Returns the agent's report of its identity. A node with plaintext control planes has none.
fn identity(facts: &Facts) -> Result<&Value, Skip> {
    let status = facts.answer(HttpQuery::Agent)?;
    status.get("identity").filter(|identity| !identity.is_null()).ok_or(Skip::NotApplicable)
}

fn text<'a>(identity: &'a Value, field: &str) -> Option<&'a str> {
    identity.get(field).and_then(Value::as_str)
}

/// D31: the node has certificates, and they are renewed in time.
pub(super) fn certificates(facts: &Facts) -> Verdict {
    let identity = identity(facts)?;
    let problem = text(identity, "problem").map(|problem| format!(": {problem}")).unwrap_or_default();
    let token = by_hand(
        "on a control plane: `vmeshctl token create --node NODE --service SERVICE`; write the token into the file that `join.token_file` names",
    );
    let stage = text(identity, "stage").unwrap_or_default();
    let cut_off = "no control plane serves this node, and other nodes do not accept it";
    let found = match (stage, identity.get("percent_left").and_then(Value::as_u64)) {
        ("waiting_for_token", _) => wrong(format!("this node has no identity{problem}"), cut_off, token),
        ("joining", _) => wrong(format!("this node has not joined yet{problem}"), cut_off, token),
        ("expired", _) => wrong(format!("the certificates of this node have expired{problem}"), cut_off, token),
        (_, Some(left)) if left < LATE => warning(
            format!("{left} % of the certificates' validity is left, and they were not renewed{problem}"),
            "when they expire, other nodes no longer accept this one",
            by_hand("see D9: a control plane has to answer; `vmeshctl ca status` there says whether it issues certificates"),
        )
        .follows(&[RootCause::ControlPlane]),
        _ => return Ok(Vec::new()),
    };
    Ok(vec![found])
}

/// D32: the keys are on the disk.
pub(super) fn saved(facts: &Facts) -> Verdict {
    let Some(why) = text(identity(facts)?, "why_not_saved") else { return Ok(Vec::new()) };
    Ok(vec![wrong(
        format!("the identity cannot be saved: {why}"),
        "after a restart of the agent this node has to join again, with a new token",
        by_hand("see D3: room, inodes, and that the file system may be written"),
    )])
}

/// D33: the trust bundle is fresh, and the clocks agree.
pub(super) fn trust(facts: &Facts) -> Verdict {
    let identity = identity(facts)?;
    let mut found = Vec::new();
    let confirmed = identity.get("bundle_confirmed").and_then(Value::as_u64);
    if let Some(age) = confirmed.map(|at| facts.now.saturating_sub(at)).filter(|age| *age > OLD_BUNDLE) {
        found.push(
            warning(
                format!("no control plane has confirmed the trust bundle for {}", ago(age)),
                "a rotation of the root waits for this node",
                by_hand("see D9: a control plane has to answer"),
            )
            .follows(&[RootCause::ControlPlane]),
        );
    }
    let skew = identity.get("clock_skew").and_then(Value::as_i64).unwrap_or_default();
    if skew.abs() > SKEW {
        let direction = if skew > 0 { "behind" } else { "ahead of" };
        found.push(warning(
            format!("this host's clock is {} {direction} the control plane's", ago(skew.unsigned_abs())),
            "certificates count as expired, or as not valid yet, where clocks differ by minutes",
            by_hand("`timedatectl` says whether the clock is synchronised"),
        ));
    }
    Ok(found)
}

/// D34: the node may run its workloads, and its Envoy accepts mTLS connections to them.
pub(super) fn workloads(facts: &Facts) -> Verdict {
    let identity = identity(facts)?;
    let mut found = Vec::new();
    let refused = identity.get("not_granted").and_then(Value::as_array);
    let refused: Vec<&str> = refused.into_iter().flatten().filter_map(Value::as_str).collect();
    if !refused.is_empty() {
        found.push(wrong(
            format!("this node may not run {}", refused.join(", ")),
            "no other node calls these workloads by mTLS",
            by_hand("create a token with `--service` for each service, stop the agent, delete its `identity` directory, and join again"),
        ));
    }
    let runs_any = facts.outline().is_ok_and(|outline| !outline.workloads.is_empty());
    let is_valid = text(identity, "stage") == Some("valid");
    if is_valid && runs_any && identity.get("mtls_ready") == Some(&Value::Bool(false)) {
        found.push(warning(
            "Envoy does not accept mTLS connections yet",
            "callers use plaintext while the mode is permissive",
            by_hand("see D25 and D26: Envoy has to be live, and to accept its configuration; `node.address` has to be set"),
        ));
    }
    Ok(found)
}
