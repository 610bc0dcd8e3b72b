//! `vmeshctl doctor` on a booted host: it reports nothing while all is well, finds what is broken, and prints
//! a fix that works.

use std::time::Duration;

use serde_json::Value;
use vmesh_testkit::app::HttpApp;
use vmesh_testkit::hosts::Host;
use vmesh_testkit::{Failed, Result, wait_for};
use vmesh_tests::BOUND;
use vmesh_tests::hosts::BootedMesh;

/// Runs the doctor. Returns the exit code, the text, and the problems of the JSON output.
fn doctor(host: &Host) -> Result<(Option<i32>, String, Vec<Value>)> {
    let text = host.output(&["vmeshctl", "doctor"])?;
    let json = host.output(&["vmeshctl", "doctor", "--json"])?;
    let said = String::from_utf8_lossy(&json.stdout).into_owned();
    let json: Value = serde_json::from_str(&said).map_err(Failed::to(format!("doctor said `{said}`")))?;
    let problems = json.get("problems").and_then(Value::as_array).cloned().unwrap_or_default();
    Ok((text.status.code(), String::from_utf8_lossy(&text.stdout).into_owned(), problems))
}

async fn is_well(host: &Host) -> Result<String> {
    wait_for("the host to be well", 2 * BOUND, async || match doctor(host) {
        Ok((Some(0), text, problems)) if problems.is_empty() => Ok(text),
        Ok((_, text, _)) => Err(text),
        Err(failed) => Err(failed.to_string()),
    })
    .await
}

/// Waits for a finding of `check` with these words. Returns its fix if that is a command.
async fn finds(host: &Host, check: &str, what: &str, effect: &str) -> Result<Option<String>> {
    let found = wait_for(format!("{check} to say `{what}`"), 2 * BOUND, async || {
        let (code, text, problems) = doctor(host).map_err(|failed| failed.to_string())?;
        let word = |problem: &Value, name: &str| {
            problem.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        let is_it = |problem: &&Value| {
            word(problem, "check") == check
                && word(problem, "what").contains(what)
                && word(problem, "effect").contains(effect)
        };
        let found = problems.iter().find(is_it).ok_or_else(|| text.clone())?;
        let line = format!(" {check} ");
        if code != Some(3) || !text.lines().any(|one| one.contains(&line) && one.contains("| fix: ")) {
            return Err(format!("exit code {code:?}: {text}"));
        }
        eprintln!("{text}");
        Ok(found.pointer("/fix/run").and_then(Value::as_str).map(str::to_owned))
    })
    .await?;
    Ok(found)
}

/// Breaks something, waits for the finding, and runs the printed fix.
async fn breaks_and_mends(host: &Host, breaks: &str, check: &str, what: &str, effect: &str) -> Result<()> {
    eprintln!("-- {breaks}");
    host.sh(breaks)?;
    let fix = finds(host, check, what, effect).await?;
    let fix = fix.ok_or_else(|| Failed::new(format!("{check} prints no one command for `{breaks}`")))?;
    host.sh(&fix)?;
    is_well(host).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_broken_on_a_host_is_found_and_what_is_printed_mends_it() -> Result<()> {
    let vms = BootedMesh::new().await?;
    let server = vms.fleet.switch().host()?;
    let orders = server.within(|| HttpApp::start("orders-1", "v1", (server.v4, 80)))??;
    vms.service("orders", "http", &[orders.address()])?;
    let more = "upstreams: [orders]\nworkloads: [{service: web, port: 8080, protocol: http, host: 127.0.0.1}]\n\
                capture: {outbound: transparent, inbound: transparent, dead_man: {timeout: 5s}}\n";
    let vm = vms.node("web", more).await?;
    let host = &vm.host;
    let serve = "systemd-run --unit web-app python3 -m http.server 8080 --bind 127.0.0.1";
    host.sh(serve)?;
    host.exec(&["vmeshctl", "dns", "enable"])?;

    let text = is_well(host).await?;
    eprintln!("{text}");
    assert!(text.contains(", 0 problems, ") && text.contains("node web (agent 0.1.0, envoy 1."), "{text}");
    assert!(text.lines().count() <= 24, "more than a screen:\n{text}");
    let said = host.exec(&["vmeshctl", "doctor", "--only", "D16,d36"])?;
    assert!(said.starts_with("2 checks, 0 problems, "), "{said}");
    let unknown = host.output(&["vmeshctl", "doctor", "--only", "D99"])?;
    assert_eq!(unknown.status.code(), Some(1));
    // A user who is neither root nor in the group gets a partial report, which lists what was not checked.
    let stranger = host.sh("runuser -u nobody -- vmeshctl doctor || [ $? = 3 ]")?;
    assert!(stranger.contains("not looked at: ") && stranger.contains("only root may"), "{stranger}");
    eprintln!("{stranger}");

    let stopped = "vmesh-agent.service is inactive";
    breaks_and_mends(host, "systemctl stop vmesh-agent", "D2", stopped, "no change reaches it").await?;
    let stopped = "vmesh-envoy.service is inactive";
    breaks_and_mends(host, "systemctl stop vmesh-envoy", "D2", stopped, "through the mesh").await?;
    let stopped = "vmesh-net.service is inactive";
    breaks_and_mends(host, "systemctl stop vmesh-net", "D2", stopped, "rules of capture").await?;
    // The watchdog would end the process after half a minute. Until then, the host has lost vmesh's table.
    let hung = "systemctl kill --kill-who=main -s STOP vmesh-net; nft delete table inet vmesh";
    breaks_and_mends(host, hung, "D16", "the rules of capture are not there", "go past Envoy").await?;
    let bypassed = "out of the mesh, by its bypass";
    breaks_and_mends(host, "vmeshctl bypass on", "D16", bypassed, "go past Envoy").await?;
    let writable = "may be written by others than root";
    breaks_and_mends(host, "chmod 777 /usr/lib/vmesh/bypass", "D21", writable, "is root").await?;
    let unwired = "is not told to ask the agent";
    breaks_and_mends(host, "vmeshctl dns disable", "D36", unwired, "do not find them").await?;
    let foreign = "nft 'add table ip nat; add chain ip nat ISTIO_OUTPUT; add rule ip nat ISTIO_OUTPUT tcp dport 9 redirect to :15001'";
    breaks_and_mends(host, foreign, "D17", "Istio's chain ISTIO_OUTPUT", "two meshes").await?;
    host.sh("nft delete table ip nat")?;
    breaks_and_mends(
        host,
        "systemctl disable vmesh.target",
        "D2",
        "vmesh.target is not enabled",
        "next boot",
    )
    .await?;
    let open = "chmod 666 /run/vmesh-envoy/admin.sock";
    breaks_and_mends(host, open, "D25", "may be used by others", "can end Envoy").await?;

    // A network without a default route: the printed route is enough for the kernel to redirect.
    let lost = "no route to virtual addresses";
    let apart = "ip -4 route del default";
    breaks_and_mends(host, apart, "D14", lost, "network is unreachable").await?;
    let said = host.sh("curl -4 -sS --max-time 5 http://orders.mesh/")?;
    assert!(said.contains("x-forwarded-proto"), "{said}");

    // These faults have no single command as a fix.
    host.systemctl(&["stop", "web-app"])?;
    finds(host, "D22", "nobody listens on 127.0.0.1:8080", "are refused").await?;
    host.sh(serve)?;
    is_well(host).await?;
    vms.control.systemctl(&["stop", "vmesh-control"])?;
    finds(host, "D9", "cannot be reached", "no change arrives").await?;
    vms.control.systemctl(&["start", "vmesh-control"])?;
    is_well(host).await?;
    let yaml = host.read("/etc/vmesh/agent.yaml")?;
    host.write("/etc/vmesh/agent.yaml", format!("{yaml}surprise: 1\n"))?;
    finds(host, "D2", "unknown field `surprise`", "does not start again").await?;
    host.sh("rm /etc/vmesh/agent.yaml")?;
    finds(host, "D2", "this host is not configured", "nothing of vmesh runs").await?;
    let (_, text, problems) = doctor(host)?;
    assert_eq!(problems.len(), 1, "{text}");
    host.write("/etc/vmesh/agent.yaml", yaml)?;
    is_well(host).await?;

    // All faults at once: the doctor keeps its time limit, and shows the worst cause first.
    host.sh("systemctl kill --kill-who=main -s STOP vmesh-agent vmesh-envoy vmesh-net")?;
    let began = std::time::Instant::now();
    let text = host.output(&["vmeshctl", "doctor"])?;
    let took = began.elapsed();
    eprintln!("{took:?}: {}", String::from_utf8_lossy(&text.stdout));
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert_eq!(text.status.code(), Some(3));
    host.sh("systemctl kill --kill-who=main -s CONT vmesh-agent vmesh-envoy vmesh-net")?;
    is_well(host).await.map(drop)
}

/// An ELF file for ARM, on a machine that is not ARM.
const FOREIGN: &str = "python3 -c \"import struct; h=b'\\x7fELF\\x02\\x01\\x01'+b'\\0'*9+struct.pack('<HHIQQQIHHHHHH',2,183,1,0x400000,64,0,0,64,56,1,64,0,0)\\
+struct.pack('<IIQQQQQQ',1,5,0,0x400000,0x400000,120,120,4096); open('/usr/bin/envoy.new','wb').write(h)\"";

#[tokio::test(flavor = "multi_thread")]
async fn fixes_of_the_agent_of_envoy_and_of_names_work() -> Result<()> {
    let (vms, _orders, _) = BootedMesh::with_orders().await?;
    let more = "upstreams: [{service: orders, listen: \"127.0.0.1:9001\"}]\n\
                capture: {outbound: transparent, dead_man: {timeout: 5s}}\n";
    let vm = vms.node("web", more).await?;
    let host = &vm.host;
    host.exec(&["vmeshctl", "dns", "enable"])?;
    is_well(host).await?;

    // D27: a control plane without news confirms the node's configuration.
    host.systemctl(&["restart", "vmesh-agent", "vmesh-envoy"])?;
    is_well(host).await?;

    // D2: root can read a configuration that the agent's user cannot.
    let unreadable = "the user vmesh-agent cannot read /etc/vmesh/agent.yaml";
    let breaks = "chmod 600 /etc/vmesh/agent.yaml; systemctl restart --no-block vmesh-agent; sleep 1";
    host.sh("chmod 600 /etc/vmesh/agent.yaml")?;
    let check = host.output(&["vmesh-agent", "--check"])?;
    assert_eq!(check.status.code(), Some(1), "{check:?}");
    let said = String::from_utf8_lossy(&check.stderr).into_owned();
    assert!(said.contains(unreadable) && said.contains("chmod 644 /etc/vmesh/agent.yaml"), "{said}");
    breaks_and_mends(host, breaks, "D2", unreadable, "does not start again").await?;
    assert_eq!(host.output(&["vmesh-agent", "--check"])?.status.code(), Some(0));

    // D20 and D25: two checks find an Envoy that hangs, and neither hides the other.
    let hangs = "nobody serves them";
    let stop = "pkill -STOP -x envoy";
    breaks_and_mends(host, stop, "D20", hangs, "fail").await?;

    // D11: another program has the agent's port. The agent keeps working, and takes the port back when that
    // program stops.
    host.systemctl(&["stop", "vmesh-agent"])?;
    host.sh("systemd-run --unit squatter -p User=nobody python3 -m http.server 15020 --bind 127.0.0.1")?;
    wait_for("the port to be taken", BOUND, async || {
        host.sh("ss -lnt 'sport = :15020' | grep -q 15020").map_err(|failed| failed.to_string())
    })
    .await?;
    host.systemctl(&["start", "vmesh-agent"])?;
    finds(host, "D11", "127.0.0.1:15020 is taken by a program of user 65534", "cannot listen there").await?;
    host.sh("ss -lntp 'sport = :15020' | grep -q python3 && systemctl stop squatter")?;
    is_well(host).await?;

    // D36: the resolver is configured with another suffix than the agent.
    let yaml = host.read("/etc/vmesh/agent.yaml")?;
    host.write("/etc/vmesh/agent.yaml", format!("{yaml}dns: {{suffix: svc.corp}}\n"))?;
    let other = "is told to ask for another zone";
    breaks_and_mends(host, "systemctl restart vmesh-agent", "D36", other, "do not find them").await?;
    host.sh("getent ahosts orders.svc.corp")?;

    // D40: the host's own firewall drops redirected connections. The doctor names the rule, and its fix
    // works.
    host.sh(
        "nft 'table inet eg { chain o { type filter hook output priority 0; policy drop; meta l4proto != tcp accept; \
         oifname lo accept; ct state established accept; tcp dport { 8080, 15010 } accept; }; }'",
    )?;
    finds(host, "D40", "`policy drop` in chain o of table inet eg is in the way", "hang or fail").await?;
    host.sh("nft insert rule inet eg o tcp dport 15001 accept")?;
    is_well(host).await?;
    host.sh("nft delete table inet eg")?;

    // D25: the file at envoy.path is not an Envoy for this machine.
    host.sh(&format!("{FOREIGN}\nchmod 755 /usr/bin/envoy.new; mv /usr/bin/envoy /usr/bin/envoy.good; mv /usr/bin/envoy.new /usr/bin/envoy"))?;
    assert_eq!(host.output(&["vmesh-agent", "--check"])?.status.code(), Some(1));
    host.sh("systemctl restart --no-block vmesh-envoy")?;
    finds(host, "D25", "/usr/bin/envoy cannot be run on this machine", "no request").await?;
    let said = host.sh("systemctl status --no-pager vmesh-envoy || :")?;
    assert!(said.contains("cannot be run on this machine"), "{said}");
    host.sh("mv /usr/bin/envoy.good /usr/bin/envoy")?;
    // D24 reports this for another day.
    wait_for("an Envoy that serves", 2 * BOUND, async || {
        host.exec(&["vmeshctl", "doctor", "--only", "D2,D11,D25,D40"]).map_err(|failed| failed.to_string())
    })
    .await?;
    Ok(())
}
