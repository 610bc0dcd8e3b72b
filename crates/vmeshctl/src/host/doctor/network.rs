//! D11 to D15: ports, connection tracking, routes.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::facts::{Facts, HostCommand, HttpQuery, Outline, last_line};
use super::{RootCause, Skip, Verdict, by_hand, run, warning, wrong};

/// The capture ports of Envoy.
const OUTBOUND: u16 = vmesh_capture::spec::OUTBOUND_PORT;
const INBOUND: u16 = vmesh_capture::spec::INBOUND_PORT;

/// Returns the addresses that must be listened on, with their purpose, and whether the agent (rather than Envoy) listens there.
fn expected_listeners(outline: &Outline) -> Vec<(SocketAddr, String, bool)> {
    let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut wanted = vec![(outline.api, "the agent's API".to_owned(), true)];
    wanted.extend(outline.dns.map(|dns| (dns, "names".to_owned(), true)));
    if outline.captures_outbound() {
        wanted.push((local(OUTBOUND), "captured outbound connections".to_owned(), false));
    }
    if outline.captures_inbound() {
        wanted.push((local(INBOUND), "captured inbound connections".to_owned(), false));
    }
    let listens = outline.workloads.iter().filter_map(|workload| Some((workload.listen?, &workload.service)));
    // A captured workload has an explicit listener only if `listen` is set.
    wanted.extend(listens.map(|(listen, service)| (listen, format!("workload `{service}`"), false)));
    let listens = outline.upstreams.iter().filter_map(|upstream| Some((upstream.listen?, &upstream.service)));
    wanted.extend(listens.map(|(listen, service)| (listen, format!("upstream `{service}`"), false)));
    wanted
}

/// D11: vmesh's ports belong to vmesh.
pub(super) fn ports(facts: &Facts) -> Verdict {
    let outline = facts.outline()?;
    let listening = facts.listening()?;
    let (agent, envoy) = (facts.user("vmesh-agent"), facts.user("vmesh-envoy"));
    let has_config = facts
        .answer(HttpQuery::Agent)
        .is_ok_and(|status| status.pointer("/envoy/state").and_then(|state| state.as_str()) == Some("live"));
    let mut found = Vec::new();
    for (at, what, agents) in expected_listeners(outline) {
        let who = if agents { "the agent" } else { "Envoy" };
        let here: Vec<_> = listening.iter().filter(|listener| listener.takes(at)).collect();
        let expected = if agents { agent } else { envoy };
        if here.is_empty() {
            let lost = wrong(
                format!("nobody listens on {at}, for {what}"),
                "connections to it are refused",
                by_hand(if agents {
                    "`journalctl -u vmesh-agent -n 50` says why"
                } else {
                    "the control plane has to know the service (`vmeshctl problems`), and Envoy to accept it (D26)"
                }),
            );
            let finding = match agents {
                true => lost.follows(&[RootCause::Agent]),
                false => lost.follows(&[RootCause::Envoy, RootCause::Agent, RootCause::ControlPlane]),
            };
            // Without a configuration, Envoy has no listeners: D25 reports that.
            if agents || has_config {
                found.push(finding);
            }
        } else if let (true, Some(expected)) = (outline.by_systemd(), expected)
            && let Some(other) = here.iter().find(|listener| listener.user != expected)
        {
            found.push(wrong(
                format!("{at} is taken by a program of user {}, and is for {what}", other.user),
                format!("{who} cannot listen there, or another program gets a share of its connections"),
                by_hand(format!(
                    "`ss -lntp 'sport = :{}'` shows it: stop it, or give it another port",
                    at.port()
                )),
            ));
        }
    }
    Ok(found)
}

/// D12: the kernel's connection tracking table has room.
pub(super) fn conntrack(facts: &Facts) -> Verdict {
    let number =
        |name: &str| facts.file(&format!("/proc/sys/net/netfilter/{name}")).ok()?.trim().parse::<u64>().ok();
    let (Some(count), Some(max)) = (number("nf_conntrack_count"), number("nf_conntrack_max")) else {
        return Err(Skip::NotApplicable);
    };
    if max == 0 || count * 10 < max * 7 {
        return Ok(Vec::new());
    }
    let what = format!("the kernel tracks {count} connections, and has room for {max}");
    let effect = "when it is full, packets of new connections of every program are dropped";
    let fix = run(format!("sysctl -w net.netfilter.nf_conntrack_max={}", (max * 2).max(65_536)));
    Ok(vec![if count * 10 >= max * 9 { wrong(what, effect, fix) } else { warning(what, effect, fix) }])
}

/// D13: enough local ports are free for outgoing connections.
pub(super) fn ephemeral_ports(facts: &Facts) -> Verdict {
    let range = facts.file("/proc/sys/net/ipv4/ip_local_port_range")?;
    let mut ends = range.split_whitespace().filter_map(|end| end.parse::<u16>().ok());
    let (Some(first), Some(last)) = (ends.next(), ends.next()) else {
        return Err(Skip::Unavailable(format!("ip_local_port_range says `{}`", range.trim())));
    };
    let mut found = Vec::new();
    let there = u64::from(last.saturating_sub(first)) + 1;
    let sockets = facts.file("/proc/net/sockstat").unwrap_or_default();
    let words: Vec<&str> = sockets
        .lines()
        .find(|line| line.starts_with("TCP:"))
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let waiting = words.windows(2).find_map(|pair| match pair {
        ["tw", number] => number.parse::<u64>().ok(),
        _ => None,
    });
    if let Some(waiting) = waiting.filter(|waiting| waiting * 10 >= there * 7) {
        found.push(warning(
            format!(
                "{waiting} closed connections wait (TIME_WAIT), and {there} ports are there for outgoing ones"
            ),
            "new connections to a busy address fail with \"cannot assign requested address\"",
            run("sysctl -w net.ipv4.ip_local_port_range='15360 65535' net.ipv4.tcp_tw_reuse=1"),
        ));
    }
    if let Ok(outline) = facts.outline() {
        let reserved = facts.file("/proc/sys/net/ipv4/ip_local_reserved_ports").unwrap_or_default();
        let is_reserved = |port: u16| {
            reserved.trim().split(',').any(|range| {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                let ends = first.parse::<u16>().ok().zip(last.parse::<u16>().ok());
                ends.is_some_and(|(first, last)| (first..=last).contains(&port))
            })
        };
        let ports = expected_listeners(outline).into_iter().map(|(at, ..)| at.port());
        let mut open: Vec<u16> =
            ports.filter(|port| (first..=last).contains(port) && !is_reserved(*port)).collect();
        open.sort_unstable();
        open.dedup();
        if !open.is_empty() {
            let list = open.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
            let all = [reserved.trim(), &list]
                .into_iter()
                .filter(|part| !part.is_empty())
                .collect::<Vec<_>>()
                .join(",");
            found.push(warning(
                format!("ports {list} are among those that the kernel gives to outgoing connections ({first} to {last})"),
                "after a restart Envoy or the agent may find such a port taken, and not listen",
                run(format!("sysctl -w net.ipv4.ip_local_reserved_ports={all}")),
            ));
        }
    }
    Ok(found)
}

/// D14: virtual addresses have a route. Without one, the kernel fails a connection before it can be redirected.
pub(super) fn routes(facts: &Facts) -> Verdict {
    if !facts.outline()?.captures_outbound() {
        return Err(Skip::NotApplicable);
    }
    let ran = facts.ran(HostCommand::Route4)?;
    if ran.code == Some(0)
        && !["unreachable", "blackhole", "prohibit"].iter().any(|kind| ran.out.starts_with(kind))
    {
        return Ok(Vec::new());
    }
    Ok(vec![wrong(
        format!("the kernel has no route to virtual addresses (240.0.0.0/5): {}", last_line(&ran.err)),
        "connections to names of the mesh fail at once: \"network is unreachable\"",
        run("ip route add 240.0.0.0/5 dev lo"),
    )])
}

/// D15: IPv4 and IPv6 work alike.
pub(super) fn ipv6(facts: &Facts) -> Verdict {
    let outline = facts.outline()?;
    if !outline.captures_outbound() {
        return Err(Skip::NotApplicable);
    }
    let Ok(addresses) = facts.file("/proc/net/if_inet6") else {
        // On a host without IPv6, no program can be affected.
        return Err(Skip::NotApplicable);
    };
    // The fourth column is the scope: 00 is global.
    let global =
        |line: &&str| line.split_whitespace().nth(3) == Some("00") && !line.trim_end().ends_with(" lo");
    let has_address = addresses.lines().any(|line| global(&line));
    let route = facts.ran(HostCommand::Route6)?;
    if has_address && route.code != Some(0) {
        return Ok(vec![warning(
            "this host has IPv6 addresses, and no route to virtual ones (fd76:6d65:7368::/48)",
            "programs that try IPv6 first fail over to IPv4, or fail where they do not",
            by_hand(
                "give the host a default route of IPv6, or one for fd76:6d65:7368::/48 by the interface of its other traffic",
            ),
        )]);
    }
    let on = |listener: &super::facts::Listener| {
        listener.takes(SocketAddr::new(IpAddr::from(std::net::Ipv6Addr::LOCALHOST), OUTBOUND))
    };
    let on_v4 = |listener: &super::facts::Listener| {
        listener.takes(SocketAddr::new(IpAddr::from(Ipv4Addr::LOCALHOST), OUTBOUND))
    };
    let listening = facts.listening()?;
    let loopback = addresses.lines().any(|line| line.starts_with("00000000000000000000000000000001 "));
    if loopback && listening.iter().any(on_v4) && !listening.iter().any(on) {
        return Ok(vec![wrong(
            format!("Envoy takes captured connections of IPv4 only: nobody listens on [::1]:{OUTBOUND}"),
            "connections to names of the mesh by IPv6 are refused",
            run("systemctl restart vmesh-agent"),
        )]);
    }
    Ok(Vec::new())
}
