//! D1 to D7: the machine, its units, disks, memory and clock.

use super::facts::{AgentConfig, Facts, HostCommand, HttpQuery, Outline, Unit, last_line};
use super::{Finding, RootCause, Skip, Verdict, by_hand, run, warning, wrong};

/// The kernel of Ubuntu 22.04, the oldest system that the packages support.
const OLDEST_KERNEL: (u32, u32) = (5, 15);
const OLDEST_SYSTEMD: u32 = 247;

/// D1: the kernel is recent enough, and the programs run.
pub(super) fn system(facts: &Facts) -> Verdict {
    let mut found = Vec::new();
    let kernel = facts.file("/proc/sys/kernel/osrelease")?.trim();
    let number = |text: &str| text.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u32>().ok();
    let mut parts = kernel.splitn(3, '.').filter_map(number);
    if let (Some(major), Some(minor)) = (parts.next(), parts.next())
        && (major, minor) < OLDEST_KERNEL
    {
        found.push(warning(
            format!("the kernel is {kernel}, older than {}.{}", OLDEST_KERNEL.0, OLDEST_KERNEL.1),
            "vmesh is not tested on it; capture by systemd unit cannot be had before 5.13",
            by_hand("upgrade the host to Debian 12 or Ubuntu 22.04, or later"),
        ));
    }
    if let Ok(ran) = facts.ran(HostCommand::Version)
        && ran.code != Some(0)
    {
        found.push(wrong(
            format!("vmesh-agent does not run here: {}", last_line(&ran.err)),
            "nothing of vmesh starts on this host",
            by_hand("install the package that was built for this distribution (its glibc, its processor)"),
        ));
    }
    Ok(found)
}

/// The units, with the condition and the effect of their failure.
const UNITS: [(&str, RootCause, &str); 3] = [
    (
        "vmesh-agent.service",
        RootCause::Agent,
        "Envoy goes on with what it has, no change reaches it, names of the mesh are not answered; redirects that may lapse do",
    ),
    ("vmesh-envoy.service", RootCause::Envoy, "no request of this host goes through the mesh"),
    ("vmesh-net.service", RootCause::Net, "nobody keeps the rules of capture, or refreshes those that lapse"),
];

/// Returns the configuration, or the finding that there is no valid one.
fn configuration(facts: &Facts) -> Result<Result<&Outline, Finding>, Skip> {
    match &facts.config {
        AgentConfig::Missing(path) => {
            let found = wrong(
                format!("this host is not configured: there is no {}", path.display()),
                "nothing of vmesh runs here; applications are as they would be without it",
                by_hand(format!(
                    "write {} (an example: /usr/share/doc/vmesh-agent/examples/agent.yaml), then `systemctl start vmesh.target`",
                    path.display()
                )),
            );
            Ok(Err(found.marked_as(RootCause::AgentConfig)))
        }
        AgentConfig::Refused(why) => {
            let found = wrong(
                format!("the configuration is refused: {}", why.replace('\n', "; ")),
                "what runs goes on with what it has read, and does not start again",
                by_hand("mend it; `vmesh-agent --check` says whether it is sound"),
            );
            Ok(Err(found.marked_as(RootCause::AgentConfig)))
        }
        AgentConfig::Unreadable(why) => Err(Skip::Unavailable(why.clone())),
        AgentConfig::Read(outline) => Ok(Ok(outline)),
    }
}

/// D2: the configuration is valid, systemd works, and the units run.
pub(super) fn units(facts: &Facts) -> Verdict {
    let outline = match configuration(facts)? {
        Ok(outline) => outline,
        Err(finding) => return Ok(vec![finding]),
    };
    if !outline.by_systemd() {
        return child(facts);
    }
    let mut found = Vec::new();
    for problem in outline.problems.iter().filter(|problem| problem.concerns == "file") {
        let effect = "vmesh-agent or vmesh-envoy does not start again";
        let unit = if problem.what.contains("vmesh-envoy") { "vmesh-envoy" } else { "vmesh-agent" };
        // `reset-failed` makes systemd start the unit although it failed too often.
        let fix = run(format!("{} && systemctl reset-failed {unit} && systemctl start {unit}", problem.fix));
        found.push(wrong(problem.what.clone(), effect, fix).marked_as(RootCause::AgentConfig));
    }
    let systemd = facts.out(HostCommand::Systemd).ok();
    let version = systemd.and_then(|printed| printed.split_whitespace().nth(1)?.parse::<u32>().ok());
    if let Some(version) = version.filter(|version| *version < OLDEST_SYSTEMD) {
        found.push(warning(
            format!("systemd is {version}, older than {OLDEST_SYSTEMD}"),
            "the units' limits and protections do not all work",
            by_hand("upgrade the host"),
        ));
    }
    if let Err(why) = facts.out(HostCommand::Units) {
        if facts.answer(HttpQuery::Agent).is_ok() {
            return Err(Skip::Unavailable(why));
        }
        let finding = wrong(
            format!("agent.yaml says that systemd starts vmesh, and it does not answer: {why}"),
            "nothing of vmesh runs on this host, or nobody starts it again",
            by_hand(
                "on a host without systemd set `envoy: {manage: child}` in /etc/vmesh/agent.yaml, and start vmesh-agent",
            ),
        );
        return Ok(vec![finding.marked_as(RootCause::Agent)]);
    }
    for (name, root, effect) in UNITS {
        if root != RootCause::Net || outline.captures() {
            check_unit(facts, name, root, effect, &mut found)?;
        }
    }
    if let Some(target) = facts.unit("vmesh.target")?
        && !["enabled", "enabled-runtime"].contains(&target.get("UnitFileState"))
    {
        found.push(warning(
            "vmesh.target is not enabled",
            "after the next boot nothing of vmesh runs here",
            run("systemctl enable vmesh.target"),
        ));
    }
    Ok(found)
}

/// Adds the findings about one unit. `root` is the condition that its failure stands for, and `effect` the effect of that.
fn check_unit(
    facts: &Facts,
    name: &str,
    root: RootCause,
    effect: &str,
    found: &mut Vec<Finding>,
) -> Result<(), Skip> {
    let Some(unit) = facts.unit(name)?.filter(|unit| unit.get("LoadState") == "loaded") else {
        found.push(
            wrong(
                format!("{name} is not installed"),
                effect,
                by_hand("install the package vmesh-agent; without systemd, set `envoy: {manage: child}`"),
            )
            .marked_as(root),
        );
        return Ok(());
    };
    let (state, result) = (unit.get("ActiveState"), unit.get("Result"));
    let restarts = unit.number("NRestarts").unwrap_or_default();
    let since = unit.number("ActiveEnterTimestampMonotonic").unwrap_or_default() / 1_000_000;
    let young = uptime(facts).is_some_and(|uptime| uptime.saturating_sub(since) < 120);
    let short = name.trim_end_matches(".service");
    let log = format!("journalctl -u {short} -n 50");
    if restarts >= 3 && (state == "activating" || (state == "active" && young)) {
        let what =
            format!("{name} ends and is started again: {restarts} times by now (last result: {result})");
        let finding = wrong(what, effect, by_hand(format!("`{log}` says why it ends")));
        found.push(if state == "active" { finding } else { finding.marked_as(root) });
        return Ok(());
    }
    check_unit_state(facts, unit, name, root, effect, found);
    Ok(())
}

/// Adds the finding about the state of an installed unit that does not restart again and again.
fn check_unit_state(
    facts: &Facts,
    unit: Unit<'_>,
    name: &str,
    root: RootCause,
    effect: &str,
    found: &mut Vec<Finding>,
) {
    let (state, result) = (unit.get("ActiveState"), unit.get("Result"));
    let short = name.trim_end_matches(".service");
    match (state, root) {
            ("active" | "reloading", RootCause::Agent) => {
                if let Err(why) = facts.answer(HttpQuery::Agent) {
                    let what = format!("the agent runs, and does not answer: {why}");
                    found.push(wrong(what, effect, run("systemctl restart vmesh-agent")).marked_as(root));
                }
            }
            ("active" | "reloading", _) => {}
            ("activating", RootCause::Envoy) if is_down(facts) => found.push(
                wrong(
                    "vmesh-envoy.service waits for Envoy to start",
                    effect,
                    by_hand("see D25, which says why it does not"),
                )
                .follows(&[RootCause::AgentConfig, RootCause::Envoy]),
            ),
            ("activating", RootCause::Envoy) => found.push(
                wrong(
                    "vmesh-envoy.service waits for something to serve",
                    "no request of this host goes through the mesh",
                    by_hand("a control plane has to answer once (D9), and Envoy has to run: `systemctl status vmesh-envoy`"),
                )
                .marked_as(RootCause::Envoy)
                .follows(&[RootCause::Agent, RootCause::ControlPlane]),
            ),
            ("failed", _) => {
                let what = format!("{name} has failed: {result}");
                let fix = run(format!("systemctl reset-failed {short}; systemctl restart {short}"));
                found.push(wrong(what, effect, fix).marked_as(root));
            }
            (other, _) => {
                let finding = wrong(format!("{name} is {other}"), effect, run(format!("systemctl start {short}")));
                // Stopping Envoy stops vmesh-net, and starting Envoy starts it.
                let finding = finding.marked_as(root);
                found.push(match root {
                    RootCause::Net => finding.follows(&[RootCause::Envoy]),
                    _ => finding.follows(&[RootCause::AgentConfig]),
                });
            }
        }
}

/// Reports whether Envoy fails to start according to its supervisor, rather than waiting for a configuration.
fn is_down(facts: &Facts) -> bool {
    let status = facts.answer(HttpQuery::Supervisor).ok();
    status.and_then(|status| status.get("state")?.as_str()).is_some_and(|state| state == "down")
}

/// With `manage: child`, only the agent knows about Envoy.
fn child(facts: &Facts) -> Verdict {
    match facts.answer(HttpQuery::Agent) {
        Ok(_) => Ok(Vec::new()),
        Err(why) => {
            let what = format!("the agent does not answer: {why}");
            let effect = "Envoy goes on with what it has, if it runs; no change reaches it";
            let fix = by_hand(
                "start vmesh-agent (`envoy: {manage: child}`: what started it on this host is not known here)",
            );
            Ok(vec![wrong(what, effect, fix).marked_as(RootCause::Agent)])
        }
    }
}

/// Seconds since the boot.
fn uptime(facts: &Facts) -> Option<u64> {
    facts.file("/proc/uptime").ok()?.split('.').next()?.parse().ok()
}

/// A small host's /run has some 50 MiB in all.
const LITTLE_SPACE: u64 = 16 << 20;
const FEW_FILES: u64 = 256;

/// D3: the directories of vmesh have free space and inodes, and are mounted writable.
pub(super) fn disks(facts: &Facts) -> Verdict {
    if facts.disks.is_empty() {
        return Err(Skip::NotApplicable);
    }
    let mut found = Vec::new();
    for disk in &facts.disks {
        let path = &disk.path;
        let effect = "the next start has no newer configuration than what is saved, and a bypass or a trial may not be remembered";
        if disk.read_only {
            let fix = by_hand("`dmesg` says whether the disk has failed; mount it writable again");
            found.push(wrong(format!("{path} is on a file system that is mounted read-only"), effect, fix));
        } else if disk.free < LITTLE_SPACE {
            let what = format!("{path} has {} MiB left to write", disk.free >> 20);
            let fix = by_hand(format!(
                "make room: `du -xh --max-depth=2 \"$(df --output=target {path} | tail -1)\" | sort -h | tail`"
            ));
            found.push(wrong(what, effect, fix));
        } else if disk.files > 0 && disk.files_free < FEW_FILES {
            let what = format!("{path} has {} inodes left", disk.files_free);
            found.push(wrong(
                what,
                effect,
                by_hand("remove files that nobody needs: `df -i` shows the file system"),
            ));
        }
    }
    Ok(found)
}

/// D4: memory limits are not exhausted, and no process was killed for lack of memory.
pub(super) fn memory(facts: &Facts) -> Verdict {
    let mut found = Vec::new();
    let kib = |name: &str| {
        let line = facts.file("/proc/meminfo").ok()?.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    if let (Some(total), Some(left)) = (kib("MemTotal:"), kib("MemAvailable:"))
        && left * 20 < total
    {
        found.push(wrong(
            format!("{} MiB of {} MiB of memory are available", left >> 10, total >> 10),
            "the kernel may kill applications, then the agent, then Envoy",
            by_hand("`ps aux --sort -rss | head` shows who has it; give the host more, or run less on it"),
        ));
    }
    for (name, ..) in UNITS {
        let Ok(Some(unit)) = facts.unit(name) else { continue };
        let short = name.trim_end_matches(".service");
        let used = unit.number("MemoryCurrent");
        let limit = [unit.number("MemoryHigh"), unit.number("MemoryMax")].into_iter().flatten().min();
        if let (Some(used), Some(limit)) = (used, limit)
            && used > limit / 10 * 9
        {
            found.push(warning(
                format!("{name} uses {} MiB of the {} MiB that it may", used >> 20, limit >> 20),
                "above that it is slowed down, and then killed",
                by_hand(format!("raise it: `systemctl edit {short}`, [Service], MemoryHigh= and MemoryMax=")),
            ));
        }
        let events = facts.file(name).unwrap_or_default();
        let killed = events
            .lines()
            .filter_map(|line| line.strip_prefix("oom_kill ")?.trim().parse::<u64>().ok())
            .sum::<u64>();
        if killed > 0 {
            found.push(warning(
                format!("the kernel has killed {killed} processes of {name} for want of memory"),
                "what was under way through it is lost each time",
                by_hand(format!("`journalctl -k -g oom` says when; raise MemoryMax= (`systemctl edit {short}`), or give the host more")),
            ));
        }
    }
    Ok(found)
}

/// D6: the clock is synchronised.
pub(super) fn clock(facts: &Facts) -> Verdict {
    if facts.file("/run/host/container-manager").is_ok() || facts.file("/run/systemd/container").is_ok() {
        // A container uses the clock of its host.
        return Err(Skip::NotApplicable);
    }
    let printed = facts.out(HostCommand::Clock)?;
    if printed.lines().any(|line| line.trim() == "NTPSynchronized=no") {
        return Ok(vec![warning(
            "the clock is not synchronized",
            "times in logs and ages are not to be relied on; certificates of a later version will be refused",
            run("timedatectl set-ntp true"),
        )]);
    }
    Ok(Vec::new())
}

/// D7: this host is distinguishable from others.
pub(super) fn identity(facts: &Facts) -> Verdict {
    let mut found = Vec::new();
    let id = facts.file("/etc/machine-id")?.trim();
    if id.len() != 32 || id.bytes().all(|byte| byte == b'0') {
        found.push(warning(
            format!("/etc/machine-id is `{id}`, which is none"),
            "hosts made of one image are not told apart, in the journal and by DHCP",
            run("rm -f /etc/machine-id; systemd-machine-id-setup"),
        ));
    }
    if let AgentConfig::Read(outline) = &facts.config {
        let node = outline.node.as_str();
        let host = facts.file("/proc/sys/kernel/hostname")?.trim();
        let common = ["localhost", "debian", "ubuntu", "vm", "template"];
        if common.contains(&node.split('.').next().unwrap_or(node)) {
            found.push(wrong(
                format!("the node is called `{node}`, as other hosts may be (this host: `{host}`)"),
                "two nodes of one name are one to the control plane: what it shows and says of them is mixed up",
                by_hand(
                    "give the host a name of its own (`hostnamectl hostname NAME`), or set `node.name`; `vmeshctl problems` \
                     says whether another has it",
                ),
            ));
        }
    }
    Ok(found)
}
