//! D9, D22, D23, D27 and D36 to D39: control planes, workloads, names, registrations, endpoints.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde_json::Value;

use super::envoy::{ago, clusters};
use super::facts::{Facts, HostCommand, HttpQuery};
use super::{RootCause, Skip, Verdict, by_hand, run, warning, wrong};

/// Age at which a configuration that no control plane has confirmed counts as old, in seconds.
const OLD: u64 = 300;

/// D9: control planes are reachable, and one is in use.
pub(super) fn control_planes(facts: &Facts) -> Verdict {
    facts.outline()?;
    let mut lost = Vec::new();
    for reach in &facts.control_planes {
        let address = &reach.address;
        let why = match (&reach.resolved, &reach.connected) {
            (Err(why), _) => format!("its name is not found: {why}"),
            (Ok(_), Err(why)) => format!("no TCP connection: {why}"),
            (Ok(name), Ok(tcp)) if name + tcp > 500 => {
                lost.push((
                    address,
                    format!("it takes {name} ms for its name and {tcp} ms for a connection"),
                    false,
                ));
                continue;
            }
            _ => continue,
        };
        lost.push((address, why, true));
    }
    let gone = lost.iter().filter(|(.., gone)| *gone).count();
    let all_gone = gone > 0 && gone == facts.control_planes.len();
    let mut found = Vec::new();
    for (address, why, is_gone) in lost {
        let (host, port) = address.rsplit_once(':').unwrap_or((address, "15010"));
        let host = host.trim_matches(['[', ']']);
        let what = format!("control plane {address} cannot be reached: {why}");
        found.push(if !is_gone {
            let fix = by_hand(format!("`ping {host}`; look at the network, or at that control plane's load"));
            warning(format!("control plane {address} is slow: {why}"), "changes arrive later", fix)
        } else if all_gone {
            let fix = by_hand(format!(
                "on {host}: `systemctl status vmesh-control`; from here: `curl -v telnet://{host}:{port}`"
            ));
            wrong(what, "Envoy goes on with the last configuration; no change arrives", fix)
                .marked_as(RootCause::ControlPlane)
        } else {
            let fix = by_hand(format!("on {host}: `systemctl status vmesh-control`"));
            warning(what, "the others serve this node; there is less to fall back to", fix)
        });
    }
    if let Ok(status) = facts.answer(HttpQuery::Agent)
        && status.pointer("/control_plane/in_use").is_none_or(Value::is_null)
        && !all_gone
    {
        let why =
            status.pointer("/control_plane/reason").and_then(Value::as_str).unwrap_or("it has not said why");
        found.push(
            wrong(
                format!("a control plane can be reached, and the agent uses none: {why}"),
                "Envoy goes on with the last configuration; no change arrives",
                by_hand("`journalctl -u vmesh-agent -n 50` says what it is told there"),
            )
            .marked_as(RootCause::ControlPlane),
        );
    }
    Ok(found)
}

/// D22: applications listen where agent.yaml says.
pub(super) fn workloads(facts: &Facts) -> Verdict {
    let outline = facts.outline()?;
    if outline.workloads.is_empty() {
        return Err(Skip::NotApplicable);
    }
    let listening = facts.listening()?;
    let mut found = Vec::new();
    for workload in &outline.workloads {
        let (service, port) = (&workload.service, workload.port);
        let at = SocketAddr::new(workload.host.unwrap_or(Ipv4Addr::LOCALHOST.into()), port);
        let elsewhere: Vec<SocketAddr> =
            listening.iter().map(|listener| listener.at).filter(|at| at.port() == port).collect();
        let list = elsewhere.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        // A captured connection to a workload without `host` keeps its original destination address.
        if outline.captures_inbound() && workload.host.is_none() && !elsewhere.is_empty() {
            if elsewhere.iter().all(|at| at.ip().is_loopback()) {
                found.push(wrong(
                    format!("the application of `{service}` listens on {list} only"),
                    "captured connections are passed on to the address that they were made to, and refused there",
                    by_hand(format!("give the workload `host: {}` in /etc/vmesh/agent.yaml, or let the application listen on the host's address",
                        elsewhere.first().map_or_else(String::new, |at| at.ip().to_string()))),
                ));
            }
        } else if !listening.iter().any(|listener| listener.takes(at)) {
            let what = match elsewhere.is_empty() {
                true => format!("nobody listens on {at}, for workload `{service}`"),
                false => {
                    format!("workload `{service}` is to be on {at}, and port {port} is taken on {list} only")
                }
            };
            let fix = match elsewhere.is_empty() {
                true => by_hand(
                    "start the application, or mend `port` of the workload: `ss -lntp` shows what listens",
                ),
                false => by_hand(format!(
                    "set `host: {}` of the workload in /etc/vmesh/agent.yaml, then `systemctl restart vmesh-agent`",
                    elsewhere.first().map_or_else(String::new, |at| at.ip().to_string())
                )),
            };
            found.push(wrong(what, "calls to it through the mesh are refused (503)", fix));
        }
    }
    Ok(found)
}

/// Protocols in which the server sends first, by port.
const SERVER_FIRST: [(u16, &str); 9] = [
    (21, "FTP"),
    (22, "SSH"),
    (25, "SMTP"),
    (110, "POP3"),
    (119, "NNTP"),
    (143, "IMAP"),
    (587, "SMTP"),
    (3306, "MySQL"),
    (5900, "VNC"),
];

/// D23: a workload with a protocol in which the server sends first is not declared as HTTP.
pub(super) fn server_first(facts: &Facts) -> Verdict {
    let outline = facts.outline()?;
    if outline.workloads.is_empty() {
        return Err(Skip::NotApplicable);
    }
    let mut found = Vec::new();
    for workload in &outline.workloads {
        let Some((port, name)) = SERVER_FIRST.iter().find(|(port, _)| *port == workload.port) else {
            continue;
        };
        if let Some(protocol) = workload.protocol.as_deref().filter(|protocol| *protocol != "tcp") {
            found.push(warning(
                format!("workload `{}` is declared `{protocol}`, on {name}'s port {port}", workload.service),
                "where the server speaks first, Envoy and the client wait for each other, until a time-out",
                by_hand("`protocol: tcp` of the workload in /etc/vmesh/agent.yaml, and of the service in discovery"),
            ));
        }
    }
    Ok(found)
}

fn accepted(facts: &Facts) -> Result<&Value, Skip> {
    let status = facts.answer(HttpQuery::Agent)?;
    status.get("accepted").ok_or_else(|| Skip::Unavailable("the agent is of another version".into()))
}

fn connected(facts: &Facts) -> bool {
    let agent = facts.answer(HttpQuery::Agent).ok();
    agent.and_then(|status| status.pointer("/control_plane/in_use")).is_some_and(|name| !name.is_null())
}

/// D27: a control plane has confirmed the configuration since the agent started.
pub(super) fn from_disk(facts: &Facts) -> Verdict {
    let accepted = accepted(facts)?;
    let mut found = Vec::new();
    if let Some(why) = accepted.get("why_not_saved").and_then(Value::as_str) {
        found.push(wrong(
            format!("the configuration cannot be saved: {why}"),
            "a restart without a control plane serves an older one",
            by_hand("see D3: room, inodes, and that the file system may be written"),
        ));
    }
    if accepted.get("from_disk") == Some(&Value::Bool(true)) {
        found.push(
            warning(
                "what is served comes from the disk, and no control plane has confirmed it",
                "it is as old as the last connection to one",
                by_hand("see D9: a control plane has to answer"),
            )
            .follows(&[RootCause::ControlPlane]),
        );
    }
    Ok(found)
}

/// D38: the configuration is not old.
pub(super) fn age(facts: &Facts) -> Verdict {
    let accepted = accepted(facts)?;
    if connected(facts) {
        return Ok(Vec::new());
    }
    match accepted.get("confirmed").and_then(Value::as_u64).map(|at| facts.now.saturating_sub(at)) {
        Some(age) if age > OLD => Ok(vec![
            warning(
                format!("the configuration is {} old", ago(age)),
                "endpoints that have come since are not used; those that are gone are still tried",
                by_hand("see D9: a control plane has to answer"),
            )
            .follows(&[RootCause::ControlPlane]),
        ]),
        None => Ok(vec![
            wrong(
                "there is no configuration, and there never was one here",
                "no request of this host goes through the mesh",
                by_hand("see D9: a control plane has to answer once"),
            )
            .follows(&[RootCause::ControlPlane]),
        ]),
        _ => Ok(Vec::new()),
    }
}

/// The effect of names that the host's resolver does not find.
const NAMES_LOST: &str = "applications that dial names of the mesh do not find them";

/// D36: the host's programs find the names of the mesh.
pub(super) fn names(facts: &Facts) -> Verdict {
    let outline = facts.outline()?;
    let Some(server) = outline.dns else { return Err(Skip::NotApplicable) };
    let names = &facts.names;
    let suffix = &outline.suffix;
    let mut found = Vec::new();
    if let Some(Err(why)) = &names.answered {
        let finding = wrong(
            format!("the agent does not answer names at {server}: {why}"),
            NAMES_LOST,
            run("systemctl restart vmesh-agent"),
        );
        found.push(finding.follows(&[RootCause::Agent]));
    }
    let resolv = facts.file("/etc/resolv.conf").unwrap_or_default();
    let searched = resolv
        .lines()
        .filter(|line| line.starts_with("search ") || line.starts_with("domain "))
        .flat_map(|line| line.split_whitespace().skip(1))
        .any(|domain| domain.trim_matches('.').eq_ignore_ascii_case(suffix));
    if searched {
        found.push(warning(
            format!("/etc/resolv.conf searches `{suffix}`"),
            format!("any bare name `x` that is a service is found as `x.{suffix}`, whatever was meant"),
            by_hand(format!("take `{suffix}` out of `search`, where the network or DHCP sets it")),
        ));
    }
    let Some(asked) = &names.asked else {
        // Without any names, the resolver cannot be tested.
        return Ok(found);
    };
    if names.wired.is_none() {
        found.push(warning(
            format!(
                "the host's resolver ({}) is not told to ask the agent for names below {suffix}",
                names.resolver
            ),
            NAMES_LOST,
            run("vmeshctl dns enable"),
        ));
        return Ok(found);
    }
    if !names.is_wired_as_configured {
        found.push(wrong(
            format!(
                "the host's resolver ({}) is told to ask for another zone, or at another address, than {suffix} at {server}",
                names.resolver
            ),
            NAMES_LOST,
            run("vmeshctl dns enable"),
        ));
        return Ok(found);
    }
    found.extend(resolver_answer(facts, asked)?);
    Ok(found)
}

/// Compares the resolver's answer for the mesh's name `name` with the addresses that the agent answers.
fn resolver_answer(facts: &Facts, name: &str) -> Verdict {
    let mut found = Vec::new();
    let ran = facts.ran(HostCommand::Resolve)?;
    let resolved: Vec<IpAddr> =
        ran.out.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect();
    let known = facts.names.all.get(name).map(Vec::as_slice).unwrap_or_default();
    if resolved.is_empty() {
        found.push(
            wrong(
                format!("{name} is not found by the host's resolver ({})", facts.names.resolver),
                NAMES_LOST,
                // Restart the resolver that the wiring belongs to. `names.resolver` may be another one.
                run(match facts.names.wired.as_deref().unwrap_or_default() {
                    wired if wired.contains("dnsmasq") => "systemctl restart dnsmasq",
                    wired if wired.contains("resolved") || wired.contains("dns-delegate") => {
                        "systemctl restart systemd-resolved"
                    }
                    _ => "systemctl enable --now vmesh-hosts && systemctl restart vmesh-hosts",
                }),
            )
            .follows(&[RootCause::Agent]),
        );
    } else if !known.is_empty() && !resolved.iter().any(|address| known.contains(address)) {
        let list = |all: &[IpAddr]| all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        found.push(warning(
            format!("{name} is found as {}, and is {}", list(&resolved), list(known)),
            "somebody else answers for it, or an old answer is kept; connections go there",
            by_hand(
                "`resolvectl flush-caches`; then `getent ahosts`, /etc/hosts, and who else answers for it",
            ),
        ));
    }
    Ok(found)
}

/// D37: workloads are registered.
pub(super) fn registrations(facts: &Facts) -> Verdict {
    let status = facts.answer(HttpQuery::Agent)?;
    let all = status.get("registered").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    if all.is_empty() {
        return Err(Skip::NotApplicable);
    }
    let mut found = Vec::new();
    for one in all {
        let word = |name: &str| one.get(name).and_then(Value::as_str).unwrap_or_default();
        let (service, registry) = (word("service"), word("registry"));
        let reason = word("reason");
        let reason = if reason.is_empty() { String::new() } else { format!(": {reason}") };
        let effect = "other hosts do not send it calls by this host";
        match word("state") {
            "failing" => found.push(wrong(
                format!("`{service}` is not registered in {registry}{reason}"),
                effect,
                by_hand(format!("{registry} has to be there and to let the agent in: `journalctl -u vmesh-agent | grep -i {registry}`")),
            )),
            "waiting" | "ill" => found.push(warning(
                format!("`{service}` is not well, by its health check{reason}"),
                effect,
                by_hand("look at the application; `health` of the workload in /etc/vmesh/agent.yaml says what is asked"),
            )),
            _ => {}
        }
    }
    Ok(found)
}

/// D39: the endpoints that discovery lists accept connections.
pub(super) fn endpoints(facts: &Facts) -> Verdict {
    let mut found = Vec::new();
    let effect = "calls that are sent there are tried again elsewhere, or fail";
    match &facts.dialed {
        Ok(dialed) => {
            for (service, at, result) in dialed {
                if let Err(why) = result {
                    found.push(warning(
                        format!("endpoint {at} of `{service}` takes no connection from here: {why}"),
                        effect,
                        by_hand(format!("start it, or take it out of use: `vmeshctl discovery evict {service} {at}`; else look at firewalls between")),
                    ));
                }
            }
        }
        // Connections to real addresses are captured, so Envoy's own counters are used instead.
        Err(_) => {
            for (name, endpoints) in clusters(facts.answer(HttpQuery::Clusters)?) {
                for endpoint in endpoints
                    .iter()
                    .filter(|endpoint| endpoint.failed > 0 && endpoint.failed >= endpoint.tried)
                {
                    let Some(at) = endpoint.at else { continue };
                    let service = name.split('|').next().unwrap_or(name);
                    found.push(warning(
                        format!("endpoint {at} of `{name}` has taken none of Envoy's {} connections", endpoint.tried),
                        effect,
                        by_hand(format!("start it, or take it out of use: `vmeshctl discovery evict {service} {at}`; else look at firewalls between")),
                    ));
                }
            }
        }
    }
    Ok(found)
}
