//! Tests of the checks: facts of a healthy host, and the findings after one change.

mod checks;

use std::time::Duration;

use expect_test::{Expect, expect};
use serde_json::{Value, json};
use vmesh_net::protocol::{self, RedirectState, State, Status};

use super::facts::{
    AgentConfig, CommandOutput, Disk, Facts, HostCommand, HttpQuery, NameFacts, Ownership, Reachability,
};
use super::{CHECKS, Report, examine};

const NOW: u64 = 1_800_000_000;

fn unit(id: &str, more: &str) -> String {
    format!(
        "Id={id}\nLoadState=loaded\nActiveState=active\nSubState=running\nResult=success\nNRestarts=0\nUnitFileState=enabled\n\
         ControlGroup=/vmesh.slice/{id}\nMemoryCurrent=50000000\nMemoryHigh=400000000\nMemoryMax=infinity\n\
         ActiveEnterTimestampMonotonic=9000000\n{more}"
    )
}

fn ran(out: impl Into<String>) -> Result<CommandOutput, String> {
    Ok(CommandOutput { code: Some(0), out: out.into(), err: String::new() })
}

fn failed(err: &str) -> Result<CommandOutput, String> {
    Ok(CommandOutput { code: Some(2), out: String::new(), err: err.to_owned() })
}

/// Returns the text of `/proc/net/tcp` for sockets that listen on 127.0.0.1.
fn listening(sockets: &[(u16, u32)]) -> String {
    let mut text = "  sl  local_address rem_address   st\n".to_owned();
    for (port, user) in sockets {
        text += &format!(
            "   0: 0100007F:{port:04X} 00000000:0000 0A 00000000:00000000 00:00000000 00000000 {user:5} 0 1 1 0\n"
        );
    }
    text
}

const AGENT: u32 = 998;
const ENVOY: u32 = 997;

/// Returns the facts of a healthy host that captures in both directions, serves `web` and calls `orders`.
fn well() -> Facts {
    let outline = json!({
        "node": "web-17", "control_planes": ["10.0.0.5:15010"], "state_dir": "/var/lib/vmesh-agent", "run_dir": "/run/vmesh",
        "api": "127.0.0.1:15020", "dns": "127.0.0.1:15053", "suffix": "mesh",
        "envoy": {"manage": "systemd", "run_dir": "/run/vmesh-envoy"},
        "workloads": [{"service": "web", "port": 8080, "host": "127.0.0.1", "protocol": "http", "listen": null}],
        "upstreams": [{"service": "orders", "listen": null}],
        "capture": {"outbound": "vip", "inbound": "redirect", "socket": "/run/vmesh-net/net.sock"},
    });
    let files = [
        ("/proc/sys/kernel/osrelease", "6.1.0-28-amd64\n".to_owned()),
        ("/proc/sys/kernel/hostname", "web-17\n".to_owned()),
        ("/proc/sys/net/netfilter/nf_conntrack_count", "900\n".to_owned()),
        ("/proc/sys/net/netfilter/nf_conntrack_max", "262144\n".to_owned()),
        ("/proc/sys/net/ipv4/ip_local_port_range", "32768\t60999\n".to_owned()),
        ("/proc/sys/net/ipv4/ip_local_reserved_ports", "\n".to_owned()),
        ("/proc/net/if_inet6", "00000000000000000000000000000001 01 80 10 80       lo\n".to_owned()),
        ("/proc/net/sockstat", "sockets: used 16\nTCP: inuse 1 orphan 0 tw 12 alloc 1 mem 171\n".to_owned()),
        (
            "/proc/net/tcp",
            listening(&[(15020, AGENT), (15053, AGENT), (15001, ENVOY), (15006, ENVOY), (8080, 1000)]),
        ),
        (
            "/proc/net/tcp6",
            "   0: 00000000000000000000000001000000:3A99 00000000000000000000000000000000:0000 0A 0:0 0:0 0   997 0 1 1 0\n"
                .to_owned(),
        ),
        ("/proc/meminfo", "MemTotal:       4000000 kB\nMemAvailable:   2000000 kB\n".to_owned()),
        ("/proc/uptime", "90000.12 1.0\n".to_owned()),
        ("/etc/machine-id", "0123456789abcdef0123456789abcdef\n".to_owned()),
        ("/etc/resolv.conf", "nameserver 127.0.0.53\nsearch example.com\n".to_owned()),
        ("limits of Envoy", "Limit Soft Hard\nMax open files            1048576              1048576  files\n".to_owned()),
        ("vmesh-envoy.service", "oom 0\noom_kill 0\n".to_owned()),
    ];
    let units = [
        unit("vmesh-agent.service", ""),
        unit("vmesh-envoy.service", ""),
        unit("vmesh-net.service", ""),
        unit("vmesh.target", ""),
        unit("vmesh.slice", ""),
    ];
    let commands = [
        (HostCommand::Version, ran("vmesh-agent 0.1.0\n")),
        (HostCommand::Systemd, ran("systemd 252 (252.38-1~deb12u1)\n")),
        (HostCommand::Units, ran(units.join("\n\n").replace("\n\n\n", "\n\n"))),
        (HostCommand::Clock, ran("NTPSynchronized=yes\n")),
        (HostCommand::Route4, ran("240.0.0.1 via 10.0.0.1 dev eth0\n")),
        (HostCommand::Route6, failed("RTNETLINK answers: Network is unreachable")),
        (HostCommand::Rules, ran("table inet vmesh {\n\tchain outbound {\n\t}\n}\n")),
        (HostCommand::LegacyRules, ran("")),
        (HostCommand::BypassSyntax, ran("")),
        (
            HostCommand::Users,
            ran(format!("vmesh-agent:x:{AGENT}:997::/:/\nvmesh-envoy:x:{ENVOY}:997::/:/\n")),
        ),
        (HostCommand::Resolve, ran("246.94.83.229   STREAM orders.mesh\n")),
    ];
    let endpoint = |ip: &str| {
        json!({"address": {"socket_address": {"address": ip, "port_value": 8080}}, "stats": [{"name": "cx_total", "value": "3"}],
            "health_status": {"eds_health_status": "HEALTHY"}})
    };
    let answers = [
        (
            HttpQuery::Agent,
            json!({"version": "0.1.0", "control_plane": {"in_use": "http://10.0.0.5:15010"}, "envoy": {"state": "live", "pid": 7},
                "accepted": {"confirmed": NOW, "from_disk": false, "rejections": 0, "last_rejection": null, "last_rejected": null,
                    "why_not_saved": null},
                "identity": {
                "stage": "valid", "percent_left": 80, "bundle_confirmed": NOW - 20, "clock_skew": 0,
                "mtls_ready": true, "not_granted": [], "problem": null, "why_not_saved": null,
            },
            "registered": [{"service": "web", "registry": "consul", "state": "registered", "reason": null}]}),
        ),
        (
            HttpQuery::Supervisor,
            json!({"state": "live", "pid": 7, "version": "1.40.0", "since": NOW - 400_000, "restarts": 0, "reason": null,
                "last_failure": null, "waiting_binary": null}),
        ),
        (
            HttpQuery::Server,
            json!({"version": "c0ffee/1.40.0/Clean/RELEASE/BoringSSL", "command_line_options": {"concurrency": 2}}),
        ),
        (
            HttpQuery::Clusters,
            json!({"cluster_statuses": [
                {"name": "orders", "added_via_api": true, "eds_service_name": "orders",
                    "host_statuses": [endpoint("10.0.1.11"), endpoint("10.0.1.12")]},
                {"name": "inbound|web|127.0.0.1:8080|captured", "added_via_api": true},
                {"name": "xds"},
            ]}),
        ),
        (HttpQuery::Unready, json!({})),
        (HttpQuery::Memory, json!({"heap_size": "60000000"})),
        (HttpQuery::Warming, json!([0])),
    ];
    let at = |address: &str| address.parse().unwrap();
    Facts {
        now: NOW,
        config: AgentConfig::Read(Box::new(serde_json::from_value(outline).unwrap())),
        files: files.into_iter().map(|(path, text)| (path.to_owned(), Ok(text))).collect(),
        commands: commands.into(),
        answers: answers.into_iter().map(|(socket, answer)| (socket, Ok(answer))).collect(),
        net: Ok(Status {
            state: State::Confirmed,
            envoy: protocol::EnvoyHealth::Well,
            redirects: RedirectState::Hold,
            agent_silent_for: Some(0),
            ..Status::default()
        }),
        plan: Ok("nothing to do\n".to_owned()),
        disks: vec![Disk {
            path: "/var/lib/vmesh-agent".into(),
            free: 5 << 30,
            files_free: 90_000,
            files: 100_000,
            read_only: false,
        }],
        modes: [
            ("/usr/lib/vmesh/bypass".to_owned(), Ok(Some(Ownership { user: 0, mode: 0o755 }))),
            ("/run/vmesh-envoy/admin.sock".to_owned(), Ok(Some(Ownership { user: ENVOY, mode: 0o600 }))),
        ]
        .into(),
        control_planes: vec![Reachability {
            address: "10.0.0.5:15010".into(),
            resolved: Ok(0),
            connected: Ok(1),
        }],
        envoy_files: Ok(90),
        cores: 2,
        names: NameFacts {
            all: [("orders.mesh".to_owned(), vec!["246.94.83.229".parse().unwrap()])].into(),
            asked: Some("orders.mesh".into()),
            answered: Some(Ok(())),
            resolver: "systemd-resolved".into(),
            wired: Some("/etc/systemd/resolved.conf.d/vmesh.conf".into()),
            is_wired_as_configured: true,
        },
        dialed: Ok(vec![("orders".into(), at("10.0.1.11:8080"), Ok(()))]),
        captured: Ok(vec![(at("240.0.0.0:1"), Ok(())), (at("[fd76:6d65:7368::1]:80"), Ok(()))]),
    }
}

fn report(facts: &Facts, only: &[&str]) -> Report {
    let only: Vec<String> = only.iter().map(|only| (*only).to_owned()).collect();
    examine(facts, &only, Duration::from_millis(400))
}

/// Applies each change alone to the healthy host, and makes one check.
fn check(id: &str, changes: &[&dyn Fn(&mut Facts)], expected: Expect) {
    let green = report(&well(), &[id]);
    assert!(!green.wants_attention() && green.text().starts_with("1 check, 0 problems"), "{}", green.text());
    let mut text = String::new();
    for change in changes {
        let mut facts = well();
        change(&mut facts);
        let shown = report(&facts, &[id]);
        text += shown.text().split_once('\n').unwrap().1;
    }
    expected.assert_eq(&text);
}

fn outline(facts: &mut Facts) -> &mut super::facts::Outline {
    match &mut facts.config {
        AgentConfig::Read(outline) => outline,
        _ => panic!("it is not read"),
    }
}

fn set(facts: &mut Facts, socket: HttpQuery, path: &str, value: Value) {
    let answer = facts.answers.get_mut(&socket).unwrap().as_mut().unwrap();
    *answer.pointer_mut(path).unwrap_or_else(|| panic!("{path}")) = value;
}

fn file(facts: &mut Facts, path: &str, text: &str) {
    facts.files.insert(path.to_owned(), Ok(text.to_owned()));
}

fn status(facts: &mut Facts) -> &mut Status {
    facts.net.as_mut().unwrap()
}

/// Replaces one property of one unit.
fn change_unit(facts: &mut Facts, unit: &str, from: &str, to: &str) {
    let Ok(ran) = facts.commands.get_mut(&HostCommand::Units).unwrap() else { return };
    let (before, rest) = ran.out.split_once(&format!("Id={unit}\n")).unwrap();
    assert!(rest.contains(from), "{from}");
    ran.out = format!("{before}Id={unit}\n{}", rest.replacen(from, to, 1));
}

#[test]
fn a_host_that_is_well_is_two_lines() {
    let report = report(&well(), &[]);
    expect![[r#"
        36 checks, 0 problems, 0.4 s   node web-17 (agent 0.1.0, envoy 1.40.0)
    "#]]
    .assert_eq(&report.text());
    assert!(!report.wants_attention());
}

#[test]
fn every_check_is_in_the_page_and_every_one_of_the_page_is_made_or_said_not_to_be() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/doctor.md")).unwrap();
    for check in CHECKS {
        assert!(page.contains(&format!("| {} | ", check.id)), "{} is not in docs/doctor.md", check.id);
    }
    let rows = page.lines().filter_map(|line| line.strip_prefix("| D")?.split(" | ").next());
    for row in rows.filter(|row| !row.contains(':') && !row.contains(" to ") && *row != "8") {
        assert!(CHECKS.iter().any(|check| check.id == format!("D{row}")), "D{row} is not a check");
    }
}

#[test]
fn what_follows_from_something_is_below_it() {
    let mut facts = well();
    change_unit(&mut facts, "vmesh-agent.service", "ActiveState=active", "ActiveState=inactive");
    file(&mut facts, "/proc/net/tcp", &listening(&[(15001, ENVOY), (15006, ENVOY), (8080, 1000)]));
    let gone = || Err("127.0.0.1:15020: nothing listens there".to_owned());
    facts.answers.insert(HttpQuery::Agent, gone());
    facts.names = NameFacts { answered: Some(Err("Connection refused".into())), ..facts.names };
    status(&mut facts).redirects = RedirectState::Lapsed;
    status(&mut facts).agent_silent_for = Some(40);
    facts.disks[0].free = 0;
    expect![[r#"
        28 checks, 2 problems, 0.4 s   node web-17 (agent 0.1.0, envoy 1.40.0)
        x D2 vmesh-agent.service is inactive | Envoy goes on with what it has, no change reaches it, names of the mesh are not answered; redirects that may lapse do | fix: systemctl start vmesh-agent
            and so D11 nobody listens on 127.0.0.1:15020, for the agent's API
            and so D11 nobody listens on 127.0.0.1:15053, for names
            and so D20 the agent has said nothing to vmesh-net for 40 s
            and so D20 redirects have lapsed
            and so D36 the agent does not answer names at 127.0.0.1:15053: Connection refused
        x D3 /var/lib/vmesh-agent has 0 MiB left to write | the next start has no newer configuration than what is saved, and a bypass or a trial may not be remembered | fix: make room: `du -xh --max-depth=2 "$(df --output=target /var/lib/vmesh-agent | tail -1)" | sort -h | tail`
        - not looked at: D26, D27, D31, D32, D33, D34, D37, D38: 127.0.0.1:15020: nothing listens there
    "#]].assert_eq(&report(&facts, &[]).text());
    expect![[r#"{"host":"node web-17 (agent 0.1.0, envoy 1.40.0)","seconds":0.4,"looked_at":["D2","D20"],"problems":[{"check":"D2","level":"wrong","what":"vmesh-agent.service is inactive","effect":"Envoy goes on with what it has, no change reaches it, names of the mesh are not answered; redirects that may lapse do","fix":{"run":"systemctl start vmesh-agent"},"and_so":[{"check":"D20","level":"wrong","what":"the agent has said nothing to vmesh-net for 40 s","effect":"redirects that may lapse do so when the dead-man runs out","fix":{"run":"systemctl restart vmesh-agent"}},{"check":"D20","level":"wrong","what":"redirects have lapsed","effect":"new connections go past Envoy where that is allowed (`on_loss: open`), and fail where it is not","fix":{"do":"they hold again by themselves once the agent speaks and Envoy serves"}}]}],"not_looked_at":[]}"#]].assert_eq(&report(&facts, &["D2", "D20"]).json().to_string());
}

#[test]
fn a_host_that_nobody_configured_has_one_problem() {
    let mut facts = well();
    facts.config = AgentConfig::Missing("/etc/vmesh/agent.yaml".into());
    facts.answers.clear();
    facts.control_planes.clear();
    facts.disks.clear();
    facts.envoy_files = Err("there is no configuration".into());
    expect![[r#"
        8 checks, 1 problem, 0.4 s   this host (agent 0.1.0)
        x D2 this host is not configured: there is no /etc/vmesh/agent.yaml | nothing of vmesh runs here; applications are as they would be without it | fix: write /etc/vmesh/agent.yaml (an example: /usr/share/doc/vmesh-agent/examples/agent.yaml), then `systemctl start vmesh.target`
        - not looked at: D5, D9, D11, D14, D15, D16, D17, D19, D20, D21, D22, D23, D24, D25, D26, D27, D28, D29, D30, D31, D32, D33, D34, D36, D37, D38, D40: there is no configuration
    "#]].assert_eq(&report(&facts, &[]).text());
}

#[test]
fn a_plan_that_has_notes_and_nothing_to_do_is_no_finding() {
    let mut facts = well();
    facts.plan = Ok("note: outbound.dial: cron.service does not run\nnothing to do\n".into());
    assert!(!report(&facts, &["D16"]).wants_attention());
    facts.plan = Ok("note: outbound.dial: cron.service does not run\nadd table inet vmesh\n".into());
    let text = report(&facts, &["D16"]).text();
    assert!(text.contains("to do: add table inet vmesh |"), "{text}");
}

#[test]
fn an_envoy_that_hangs_is_shown_by_whichever_checks_see_it() {
    let mut facts = well();
    set(&mut facts, HttpQuery::Supervisor, "/state", json!("silent"));
    status(&mut facts).envoy = protocol::EnvoyHealth::Hangs;
    status(&mut facts).redirects = RedirectState::Lapsed;
    let report = report(&facts, &[]);
    let text = report.text();
    assert!(report.wants_attention() && text.contains(", 1 problem, "), "{text}");
    for message in [
        "x D20 Envoy's capture ports are open",
        "and so D25 Envoy is silent",
        "and so D20 redirects have lapsed",
    ] {
        assert!(text.contains(message), "{message}: {text}");
    }
}

#[test]
fn a_file_that_the_agents_user_cannot_read_is_above_the_unit_that_does_not_start_for_it() {
    let mut facts = well();
    outline(&mut facts).problems = vec![super::facts::HostProblem {
        concerns: "file".into(),
        what: "the user vmesh-agent cannot read /etc/vmesh/agent.yaml".into(),
        fix: "chmod 644 /etc/vmesh/agent.yaml".into(),
    }];
    change_unit(&mut facts, "vmesh-agent.service", "ActiveState=active", "ActiveState=activating");
    let text = report(&facts, &["D2"]).text();
    assert!(
        text.contains("x D2 the user vmesh-agent cannot read /etc/vmesh/agent.yaml | ")
            && text.contains(
                "| fix: chmod 644 /etc/vmesh/agent.yaml && systemctl reset-failed vmesh-agent && systemctl start vmesh-agent\n    and so D2 vmesh-agent.service is activating\n"
            ),
        "{text}"
    );
}

#[test]
fn a_binary_that_is_no_envoy_comes_first_and_the_unit_that_waits_for_it_below() {
    let mut facts = well();
    change_unit(&mut facts, "vmesh-envoy.service", "ActiveState=active", "ActiveState=activating");
    set(&mut facts, HttpQuery::Supervisor, "/state", json!("down"));
    let why = "/usr/bin/envoy cannot be run on this machine: could not start /usr/bin/envoy: Exec format error (os error 8)";
    set(&mut facts, HttpQuery::Supervisor, "/reason", json!(why));
    let text = report(&facts, &["D2", "D25"]).text();
    assert!(text.contains(&format!("x D25 Envoy is down: {why} | ")), "{text}");
    assert!(text.contains("fix: put an Envoy for this machine (`uname -m`) at `envoy.path`"), "{text}");
    assert!(text.contains("\n    and so D2 vmesh-envoy.service waits for Envoy to start\n"), "{text}");
}

#[test]
fn what_envoy_or_a_control_plane_said_begins_no_line_and_moves_no_cursor() {
    let mut facts = well();
    let message = "bad\u{1b}[2J\n0 checks, 0 problems\u{202e}";
    set(&mut facts, HttpQuery::Agent, "/accepted/last_rejection", json!(message));
    let text = report(&facts, &["D26"]).text();
    assert!(!text.contains(['\u{1b}', '\u{202e}']) && !text.contains("\n0 checks"), "{text}");
    assert!(text.contains("bad\\u{1b}[2J"), "{text}");
}

#[test]
fn a_capture_that_a_foreign_rule_breaks_names_the_rule() {
    let broken = |index: usize, why: &str| {
        let why = why.to_owned();
        move |facts: &mut Facts| facts.captured.as_mut().unwrap()[index].1 = Err(why.clone())
    };
    let hangs = broken(0, "no answer in 1 s");
    let with = |rules: &str, change: &dyn Fn(&mut Facts)| {
        let mut facts = well();
        facts.commands.insert(HostCommand::Rules, ran(rules));
        change(&mut facts);
        report(&facts, &["D40"]).text().split_once('\n').unwrap().1.to_owned()
    };
    let drop = "table inet vmesh {\n\tchain outbound {\n\t}\n}\ntable inet eg {\n\tchain o {\n\
                \t\ttype filter hook output priority filter; policy drop;\n\t\toifname \"lo\" accept\n\t}\n}\n";
    let notrack = "table inet nt {\n\tchain o {\n\t\ttype filter hook output priority -300; policy accept;\n\
                   \t\ttcp dport { 80, 8080 } notrack\n\t}\n}\n";
    let shown = [
        with(drop, &hangs),
        with(notrack, &hangs),
        with("", &broken(1, "Connection refused (os error 111)")),
        with(drop, &|_| {}),
        with("", &|facts| {
            facts.net.as_mut().unwrap().path_fault = Some("3 connections of IPv6 from outside".into())
        }),
        with(notrack, &|facts| {
            hangs(facts);
            facts.net.as_mut().unwrap().path_fault =
                Some("a connection to 240.0.0.0:1 was not captured".into());
        }),
    ];
    expect![[r#"
        x D40 captured connections of IPv4 do not arrive at Envoy: 240.0.0.0:1 cannot be reached: no answer in 1 s (1 of 1 addresses); `policy drop` in chain o of table inet eg is in the way | connections to names of the mesh hang or fail, and captured ones to real addresses may, too | fix: let captured connections through, there and in the firewall's own configuration: `nft insert rule inet eg o tcp dport 15001 accept`
        x D40 captured connections of IPv4 do not arrive at Envoy: 240.0.0.0:1 cannot be reached: no answer in 1 s (1 of 1 addresses); `tcp dport { 80, 8080 } notrack` in chain o of table inet nt is in the way | connections to names of the mesh hang or fail, and captured ones to real addresses may, too | fix: what is not tracked cannot be redirected: have `notrack` leave out what is captured (`nft list chain inet nt o`)
        x D40 captured connections of IPv6 do not arrive at Envoy: [fd76:6d65:7368::1]:80 cannot be reached: Connection refused (os error 111) (1 of 1 addresses) | connections to names of the mesh hang or fail, and captured ones to real addresses may, too | fix: a firewall has to let tcp to port 15001 out (by the interface of the original route) and back: `nft list ruleset`, `ip rule`
        x D40 vmesh-net sees captured connections that do not arrive at Envoy: 3 connections of IPv6 from outside | these connections hang or fail | fix: have the owner of the rule that is named let them through; `vmesh-net` looks again at each change of rules
        x D40 captured connections of IPv4 do not arrive at Envoy: 240.0.0.0:1 cannot be reached: no answer in 1 s (1 of 1 addresses); `tcp dport { 80, 8080 } notrack` in chain o of table inet nt is in the way | connections to names of the mesh hang or fail, and captured ones to real addresses may, too | fix: what is not tracked cannot be redirected: have `notrack` leave out what is captured (`nft list chain inet nt o`)
    "#]]
    .assert_eq(&shown.concat());
}
