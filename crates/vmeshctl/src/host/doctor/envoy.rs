//! D5 and D24 to D30: Envoy, according to its supervisor and its admin interface.

use std::net::{IpAddr, SocketAddr};

use serde_json::Value;

use super::facts::{Facts, HttpQuery};
use super::{Finding, RootCause, Skip, Verdict, by_hand, run, warning, wrong};

const OLDEST: (u32, u32) = (1, 36);
const NEWEST: (u32, u32) = (1, 40);
const DAY: u64 = 24 * 3600;

/// Returns the version of the serving Envoy.
pub(super) fn version_of(facts: &Facts) -> Option<&str> {
    let of = |socket, path| facts.answer(socket).ok()?.pointer(path)?.as_str();
    of(HttpQuery::Supervisor, "/version").or_else(|| of(HttpQuery::Agent, "/envoy/version")).or_else(|| {
        // Such as `2c1b3a…/1.40.0/Clean/RELEASE/BoringSSL`.
        of(HttpQuery::Server, "/version")?.split('/').nth(1)
    })
}

/// D5: Envoy's limit of open files is not nearly exhausted.
pub(super) fn open_files(facts: &Facts) -> Verdict {
    let open = facts.envoy_files.clone()?;
    let limits = facts.file("limits of Envoy")?;
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap_or_default();
    let Some(limit) = line.split_whitespace().nth(3).and_then(|limit| limit.parse::<usize>().ok()) else {
        return Ok(Vec::new()); // Unlimited.
    };
    if open * 10 < limit * 7 {
        return Ok(Vec::new());
    }
    Ok(vec![warning(
        format!("Envoy has {open} files open, and may have {limit}"),
        "a connection is two of them; beyond the limit Envoy takes none",
        by_hand("raise LimitNOFILE= (`systemctl edit vmesh-envoy`), then `systemctl restart vmesh-envoy`"),
    )])
}

/// D24: Envoy's version is among the tested ones, and equals the installed one.
pub(super) fn version(facts: &Facts) -> Verdict {
    let mut found = Vec::new();
    let Some(version) = version_of(facts) else {
        facts.outline()?;
        facts.answer(HttpQuery::Server)?;
        return Err(Skip::Unavailable("Envoy does not say its version".into()));
    };
    let mut parts = version.split('.').map(|part| part.parse::<u32>().ok());
    if let (Some(Some(major)), Some(Some(minor))) = (parts.next(), parts.next())
        && !(OLDEST..=NEWEST).contains(&(major, minor))
    {
        found.push(warning(
            format!(
                "Envoy is {version}; vmesh is tested with {}.{} to {}.{}",
                OLDEST.0, OLDEST.1, NEWEST.0, NEWEST.1
            ),
            "it may refuse what the control plane says, or do something else with it",
            by_hand("put one of these at `envoy.path`, then `systemctl reload vmesh-envoy`"),
        ));
    }
    if let Ok(supervisor) = facts.answer(HttpQuery::Supervisor) {
        if let Some(waiting) = supervisor.get("waiting_binary").and_then(Value::as_str) {
            found.push(warning(
                format!("another Envoy is on disk than the one that runs: {waiting}"),
                "its fixes are not in force yet",
                run("systemctl reload vmesh-envoy"),
            ));
        }
        let failure = supervisor.get("last_failure").filter(|failure| !failure.is_null());
        let at = failure.and_then(|failure| failure.get("at")?.as_u64());
        if let (Some(what), Some(at)) = (failure.and_then(|failure| failure.get("what")?.as_str()), at)
            && facts.now.saturating_sub(at) < DAY
        {
            found.push(warning(
                format!("{} ago: {what}", ago(facts.now.saturating_sub(at))),
                "the Envoy that serves may not be the one that was meant, or connections were cut",
                by_hand("`journalctl -u vmesh-envoy` says more; the finding goes away after a day"),
            ));
        }
    }
    Ok(found)
}

/// Formats an age: `41 s`, `7 min`, `3 h`, `2 d`.
pub(super) fn ago(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// D25: Envoy serves, and no other user can terminate it.
pub(super) fn live(facts: &Facts) -> Verdict {
    let outline = facts.outline()?;
    let mut found = Vec::new();
    let admin = outline.admin_socket();
    if let Some(Ok(Some(owned))) = facts.modes.get(&admin.display().to_string())
        && owned.mode & 0o077 != 0
    {
        found.push(wrong(
            format!(
                "{} may be used by others than Envoy's user (mode {:o})",
                admin.display(),
                owned.mode & 0o7777
            ),
            "whoever gets to it can end Envoy, or read what it knows",
            run(format!("chmod 600 {}", admin.display())),
        ));
    }
    let status = match (outline.by_systemd(), facts.answer(HttpQuery::Supervisor)) {
        (true, Ok(status)) => status,
        (true, Err(why)) => {
            let finding = wrong(
                format!("Envoy's supervisor does not say how Envoy is: {why}"),
                "whether requests go through the mesh is not known",
                by_hand("`systemctl status vmesh-envoy`; to look, be root or in the group vmesh"),
            );
            // For a user without access to the supervisor this is not a finding.
            return if found.is_empty()
                && facts
                    .unit("vmesh-envoy.service")
                    .ok()
                    .flatten()
                    .is_none_or(|unit| unit.get("ActiveState") == "active")
                && why.contains("ermission denied")
            {
                Err(Skip::Unavailable(why))
            } else {
                found.push(finding.follows(&[RootCause::Envoy, RootCause::AgentConfig]));
                Ok(found)
            };
        }
        (false, _) => facts.answer(HttpQuery::Agent)?.get("envoy").unwrap_or(&Value::Null),
    };
    let state = status.get("state").and_then(Value::as_str).unwrap_or("unknown");
    if state != "live" {
        found.push(not_live(status, state));
    }
    let restarts = status.get("restarts").and_then(Value::as_u64).unwrap_or_default();
    let since = status.get("since").and_then(Value::as_u64).unwrap_or_default();
    if restarts > 0 && state == "live" && facts.now.saturating_sub(since) < DAY {
        found.push(warning(
            format!(
                "Envoy has ended by itself {restarts} times, and serves again since {} ago",
                ago(facts.now.saturating_sub(since))
            ),
            "connections through it were cut each time",
            by_hand("`journalctl -u vmesh-envoy` says how it ended; the finding goes away after a day"),
        ));
    }
    Ok(found)
}

/// Returns the finding about an Envoy in a state other than `live`.
fn not_live(status: &Value, state: &str) -> Finding {
    let why = status.get("reason").and_then(Value::as_str).map(|why| format!(": {why}")).unwrap_or_default();
    let (effect, fix) = match state {
        "waiting" => (
            "Envoy has not been told what to serve yet: no request of this host goes through the mesh",
            by_hand("a control plane has to answer once: see D9"),
        ),
        "silent" => (
            "Envoy may serve nothing; it is killed and started again after `envoy.hung_after`",
            run("systemctl restart vmesh-envoy"),
        ),
        _ if ["cannot be run on this machine", "is no Envoy"]
            .iter()
            .any(|unusable| why.contains(unusable)) =>
        {
            (
                "no request of this host goes through the mesh",
                by_hand(
                    "put an Envoy for this machine (`uname -m`) at `envoy.path`; it is started within seconds",
                ),
            )
        }
        _ => (
            "no request of this host goes through the mesh",
            by_hand("`journalctl -u vmesh-envoy -n 50` says why"),
        ),
    };
    let finding = wrong(format!("Envoy is {state}{why}"), effect, fix);
    finding.marked_as(RootCause::Envoy).follows(&[
        RootCause::Envoy,
        RootCause::Agent,
        RootCause::ControlPlane,
    ])
}

/// D26: Envoy has rejected nothing.
pub(super) fn rejections(facts: &Facts) -> Verdict {
    let accepted = facts.answer(HttpQuery::Agent)?.get("accepted").cloned().unwrap_or_default();
    let Some(rejection) = accepted.get("last_rejection").and_then(Value::as_str) else {
        return Ok(Vec::new());
    };
    let when = accepted.get("last_rejected").and_then(Value::as_u64);
    let when = when.map(|when| format!(" {} ago", ago(facts.now.saturating_sub(when)))).unwrap_or_default();
    Ok(vec![warning(
        format!("Envoy rejected a part of the configuration{when}: {rejection}"),
        "it goes on with what it had of that before",
        by_hand(
            "`vmeshctl problems` and `vmeshctl nodes` say which document it comes from; once mended, `systemctl restart vmesh-agent` forgets it",
        ),
    )])
}

/// D28: no accepted resource stays in warming.
pub(super) fn warming(facts: &Facts) -> Verdict {
    let readings = facts.answer(HttpQuery::Warming)?;
    let warming: Vec<u64> = readings.as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
    let unready =
        facts.answer(HttpQuery::Unready).ok().and_then(|dump| dump.get("unready_targets_dumps")?.as_array());
    let names: Vec<&str> =
        unready.into_iter().flatten().filter_map(|dump| dump.get("name")?.as_str()).collect();
    match warming.iter().min() {
        Some(number) if *number > 0 => {
            let what = if names.is_empty() { String::new() } else { format!(": {}", names.join(", ")) };
            Ok(vec![warning(
                format!("{number} clusters or listeners of Envoy wait for endpoints or routes{what}"),
                "what they replace goes on; what is new is not served",
                by_hand("the control plane owes it: D9, and `vmeshctl nodes` says whether this node is in sync"),
            )
            .follows(&[RootCause::ControlPlane, RootCause::Agent])])
        }
        _ => Ok(Vec::new()),
    }
}

/// An endpoint of a cluster, from `/clusters`.
pub(super) struct EndpointStats {
    pub(super) at: Option<SocketAddr>,
    healthy: bool,
    /// Number of failed connection attempts, and of all attempts.
    pub(super) failed: u64,
    pub(super) tried: u64,
}

/// Returns the clusters of the services that this host calls, with their endpoints. Subsets are separate clusters.
pub(super) fn clusters(answer: &Value) -> Vec<(&str, Vec<EndpointStats>)> {
    let statuses = answer.get("cluster_statuses").and_then(Value::as_array);
    let mut clusters = Vec::new();
    for status in statuses.into_iter().flatten() {
        let Some(name) = status.get("name").and_then(Value::as_str) else { continue };
        let api = status.get("added_via_api").and_then(Value::as_bool).unwrap_or_default();
        // Skip the clusters for local applications, and those through which captured connections pass.
        if !api || name.starts_with("inbound|") || name.starts_with('_') {
            continue;
        }
        let hosts = status.get("host_statuses").and_then(Value::as_array);
        clusters.push((name, hosts.into_iter().flatten().map(endpoint).collect()));
    }
    clusters
}

fn endpoint(host: &Value) -> EndpointStats {
    let health = host.get("health_status").unwrap_or(&Value::Null);
    let flag = |(name, value): (&String, &Value)| name.starts_with("failed_") && value == &Value::Bool(true);
    let ejected = health.as_object().is_some_and(|health| health.iter().any(flag));
    let eds = health.get("eds_health_status").and_then(Value::as_str).unwrap_or("UNKNOWN");
    let counter = |name: &str| {
        let stats = host.get("stats").and_then(Value::as_array)?;
        let stat = stats.iter().find(|stat| stat.get("name").and_then(Value::as_str) == Some(name))?;
        match stat.get("value")? {
            Value::String(text) => text.parse().ok(),
            number => number.as_u64(),
        }
    };
    let at = host.pointer("/address/socket_address").and_then(|at| {
        let ip: IpAddr = at.get("address")?.as_str()?.parse().ok()?;
        Some(SocketAddr::new(ip, u16::try_from(at.get("port_value")?.as_u64()?).ok()?))
    });
    EndpointStats {
        at,
        healthy: !ejected && ["HEALTHY", "UNKNOWN", "DEGRADED"].contains(&eds),
        failed: counter("cx_connect_fail").unwrap_or_default(),
        tried: counter("cx_total").unwrap_or_default(),
    }
}

/// D29: every upstream has a healthy endpoint.
pub(super) fn upstreams(facts: &Facts) -> Verdict {
    let outline = facts.outline()?;
    let answer = facts.answer(HttpQuery::Clusters)?;
    let clusters = clusters(answer);
    let mut found = Vec::new();
    for upstream in &outline.upstreams {
        let service = upstream.service.as_str();
        if !clusters.iter().any(|(name, _)| name.split('|').next() == Some(service)) {
            found.push(
                wrong(
                    format!("upstream `{service}` is not known to Envoy"),
                    "calls to it are refused",
                    by_hand(format!(
                        "no source names it, or it has a problem: `vmeshctl explain {service} --from {}`",
                        outline.node
                    )),
                )
                .follows(&[RootCause::Envoy, RootCause::ControlPlane]),
            );
        }
    }
    for (name, endpoints) in &clusters {
        let healthy = endpoints.iter().filter(|endpoint| endpoint.healthy).count();
        let service = name.split('|').next().unwrap_or(name);
        if endpoints.is_empty() {
            found.push(warning(
                format!("service `{name}` has no endpoint"),
                "requests to it are answered 503, and connections closed",
                by_hand(format!("`vmeshctl services {service}` says what discovery has of it")),
            ));
        } else if healthy == 0 {
            found.push(wrong(
                format!("none of the {} endpoints of service `{name}` is healthy", endpoints.len()),
                "requests go to endpoints that are known to be ill, or are answered 503",
                by_hand(format!(
                    "`vmeshctl services {service}` says why each is; look at the instances themselves"
                )),
            ));
        }
    }
    Ok(found)
}

/// D30: Envoy's memory fits the host.
pub(super) fn size(facts: &Facts) -> Verdict {
    let server = facts.answer(HttpQuery::Server)?;
    let mut found = Vec::new();
    let workers =
        server.pointer("/command_line_options/concurrency").and_then(Value::as_u64).unwrap_or_default();
    if workers > facts.cores as u64 {
        found.push(warning(
            format!("Envoy has {workers} worker threads, and {} processors are there", facts.cores),
            "each costs memory and connections of its own, and none of them helps",
            by_hand("set `envoy.concurrency` in /etc/vmesh/agent.yaml, then `systemctl reload vmesh-envoy`"),
        ));
    }
    let heap = facts
        .answer(HttpQuery::Memory)
        .ok()
        .and_then(|memory| memory.get("heap_size")?.as_str()?.parse::<u64>().ok());
    let total = facts.file("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
        Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
    });
    if let (Some(heap), Some(total)) = (heap, total)
        && heap > total / 2
    {
        found.push(warning(
            format!("Envoy has {} MiB of the host's {} MiB of memory", heap >> 20, total >> 20),
            "the kernel may kill applications for want of memory",
            by_hand("name the `upstreams` that are called instead of \"*\"; set MemoryMax= (`systemctl edit vmesh-envoy`)"),
        ));
    }
    Ok(found)
}
