//! Attacks of a local user on a booted host: the user occupies shared resources (`/dev/shm`, ports), and must
//! not be trusted.

use vmesh_testkit::hosts::Host;
use vmesh_testkit::{Result, wait_for};
use vmesh_tests::BOUND;
use vmesh_tests::hosts::BootedMesh;

/// A server that answers every request with a name of its own.
const FAKE_AGENT: &str = "import http.server
class Fake(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{\"orders.mesh\": [\"203.0.113.66\"]}'
        self.send_response(200)
        self.send_header('content-length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(('127.0.0.1', 15020), Fake).serve_forever()
";

async fn serves(host: &Host) -> Result<()> {
    wait_for("orders through Envoy", 2 * BOUND, async || {
        let said =
            host.sh("curl -sS --max-time 5 http://127.0.0.1:9001/").map_err(|failed| failed.to_string())?;
        if said.contains("x-forwarded-proto") { Ok(()) } else { Err(said) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_user_keeps_no_envoy_from_starting_and_tells_root_no_names() -> Result<()> {
    let (vms, _orders, _) = BootedMesh::with_orders().await?;
    let more =
        "upstreams: [{service: orders, listen: \"127.0.0.1:9001\"}]\ncapture: {outbound: transparent}\n";
    let vm = vms.node("web", more).await?;
    let host = &vm.host;
    serves(host).await?;

    // The user fills the host's shared memory, and can neither see nor reach anything of a hot restart.
    host.sh("mount -o remount,size=1M /dev/shm")?;
    host.sh("runuser -u nobody -- sh -c 'head -c 4M /dev/zero > /dev/shm/full || :'; ! : > /dev/shm/more || ! head -c 8192 /dev/zero > /dev/shm/more")?;
    assert_eq!(host.sh("ls /dev/shm | grep -c envoy_ || :")?.trim(), "0");
    assert_eq!(host.sh("grep -c @envoy_domain /proc/net/unix || :")?.trim(), "0");
    host.sh("! runuser -u nobody -- ls /run/vmesh-envoy")?;
    host.sh("pkill -KILL -x envoy")?;
    serves(host).await?;
    // The memory and the sockets of a hot restart are private to the unit.
    host.systemctl(&["reload", "vmesh-envoy"])?;
    wait_for("another epoch", 2 * BOUND, async || {
        let said = host.sh("curl -s --unix-socket /run/vmesh-envoy/status.sock http://x/status");
        let said = said.map_err(|failed| failed.to_string())?;
        if said.contains("\"epoch\":1") { Ok(()) } else { Err(said) }
    })
    .await?;
    // A supervisor that crashed finds both again.
    host.sh("systemctl kill --kill-who=main -s KILL vmesh-envoy")?;
    vm.wait_up()?;
    serves(host).await?;

    // Any user can take the agent's port while the agent is down.
    host.systemctl(&["stop", "vmesh-agent"])?;
    host.write("/usr/local/lib/fake.py", FAKE_AGENT)?;
    host.sh("systemd-run --unit fake -p User=nobody python3 /usr/local/lib/fake.py")?;
    wait_for("the port to be taken", BOUND, async || {
        host.sh("curl -s 127.0.0.1:15020/names | grep -q 203.0.113.66").map_err(|failed| failed.to_string())
    })
    .await?;
    let tcp = host.output(&["vmeshctl", "dns", "sync", "--agent", "127.0.0.1:15020"])?;
    let said = String::from_utf8_lossy(&tcp.stderr).into_owned();
    assert!(tcp.status.code() == Some(1) && said.contains("who is not believed"), "{said}");
    assert_eq!(host.output(&["vmeshctl", "dns", "sync"])?.status.code(), Some(1));
    // The agent starts without the port, and answers root.
    host.systemctl(&["start", "vmesh-agent"])?;
    host.exec(&["vmeshctl", "dns", "sync"])?;
    let hosts = host.read("/etc/hosts")?;
    assert!(hosts.contains("orders.mesh") && !hosts.contains("203.0.113.66"), "{hosts}");
    host.exec(&["vmeshctl", "dns", "disable"])?;
    Ok(())
}

/// Asks for a name every few milliseconds until a file appears. Prints how many queries were refused or not
/// answered.
const ASKS: &str = "import os, socket, time
question = b'vm\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\6orders\\4mesh\\0\\0\\1\\0\\1'
asked = lost = 0
end = time.monotonic() + 120
while not os.path.exists('/run/enough') and time.monotonic() < end:
    asked += 1
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(10)
    try:
        s.connect(('127.0.0.1', 15053))
        s.send(question)
        answer = s.recv(512)
        # The last record is the answer, whose last four bytes are the address: a virtual one, also while the agent starts.
        if answer[3] & 15 or not answer[7] or answer[-4] < 240:
            lost += 1
    except OSError:
        lost += 1
    s.close()
    time.sleep(0.005)
print('asked', asked, 'lost', lost, flush=True)
";

#[tokio::test(flavor = "multi_thread")]
async fn no_question_for_a_name_is_lost_while_the_agent_restarts_or_is_killed() -> Result<()> {
    let (vms, _orders, _) = BootedMesh::with_orders().await?;
    let vm = vms.node("web", "upstreams: [orders]\ncapture: {outbound: transparent}\n").await?;
    let host = &vm.host;
    wait_for("the name", 2 * BOUND, async || {
        // The host captures by then; before that, the name resolves to the endpoint itself.
        host.sh("vmeshctl capture | grep -q '^capture *confirmed'\ncurl -s 127.0.0.1:15020/names | grep -q 'orders.mesh\":.\"24'")
            .map_err(|failed| failed.to_string())
    })
    .await?;
    host.write("/usr/local/lib/asks.py", ASKS)?;
    host.sh(
        "systemd-run --unit asks --property=StandardOutput=file:/run/asked python3 /usr/local/lib/asks.py",
    )?;
    for _ in 0..3 {
        host.systemctl(&["restart", "vmesh-agent"])?;
        host.sh("systemctl kill -s KILL --kill-who=main vmesh-agent")?;
        host.wait_unit("vmesh-agent.service", "active", 2 * BOUND)?;
        wait_for("the next agent to answer", 2 * BOUND, async || {
            let said = host
                .sh("curl -s --max-time 2 127.0.0.1:15020/status")
                .map_err(|failed| failed.to_string())?;
            if said.contains("\"bound\":true") { Ok(()) } else { Err(said) }
        })
        .await?;
    }
    host.sh(": > /run/enough")?;
    let said = wait_for("what was lost", 2 * BOUND, async || {
        let said = host.sh("cat /run/asked").map_err(|failed| failed.to_string())?;
        if said.contains("lost") { Ok(said) } else { Err(said) }
    })
    .await?;
    assert!(said.trim().ends_with(" lost 0"), "{said}");
    Ok(())
}
