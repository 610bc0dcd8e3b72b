//! Tests of the command line.

use std::net::SocketAddr;
use std::process::{Command, Output};
use std::time::Duration;

use expect_test::{Expect, expect};
use serde_json::Value;
use vmesh_daemon::fetch::{Peer, fetch};
use vmesh_daemon::report::one_line;
use vmesh_testkit::process::Daemon;
use vmesh_testkit::{tempdir, wait_for};

const SOON: Duration = Duration::from_secs(30);

fn agent(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmesh-agent")).args(arguments).output().unwrap()
}

/// Runs the agent on a configuration. `DIR` in the expected output stands for its directory.
fn check(config: &str, arguments: &[&str], expected: Expect) {
    let dir = tempdir().unwrap();
    let path = dir.join("agent.yaml");
    std::fs::write(&path, config.replace("DIR", &dir.display().to_string())).unwrap();
    let output = agent(&[&["--config", path.to_str().unwrap()], arguments].concat());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace(&dir.display().to_string(), "DIR");
    let code = output.status.code().unwrap();
    expected.assert_eq(&format!("{}{}exit {code}\n", text(&output.stdout), text(&output.stderr)));
}

#[test]
fn a_check_says_what_the_agent_would_do_and_touches_nothing() {
    check(
        r#"
control_plane: ["http://127.0.0.1:15010", {address: "http://10.0.0.5:15010", insecure: true}]
run_dir: DIR/run
envoy: {path: /opt/envoy, manage: child}
node: {name: web-17, address: 10.0.1.17}
workloads:
  - {service: orders, port: 8080}
  - {service: cache, port: 6379, listen: "10.0.1.17:7379"}
upstreams: [{service: payments, listen: "127.0.0.1:9001"}]
"#,
        &["--check"],
        expect![[r#"
            node           web-17
            control plane  http://127.0.0.1:15010
                           http://10.0.0.5:15010
            envoy          /opt/envoy, started by the agent
            api            127.0.0.1:15020
            workloads      orders on port 8080, reached at 127.0.0.1:15008
                           cache on port 6379, reached at 10.0.1.17:7379, PLAINTEXT beyond this host
            upstreams      payments at 127.0.0.1:9001
            reports as     vmesh-agent/0.1.0
            exit 0
        "#]],
    );
}

#[test]
fn a_wrong_configuration_is_refused_with_every_mistake_and_exit_code_64() {
    check(
        "control_plan: []\nlisten: {api: here}\n",
        &[],
        expect![[r#"
        DIR/agent.yaml:1:1: unknown field `control_plan`, did you mean `control_plane`?
        DIR/agent.yaml:2:15: `api`: `here` is not an IP address and a port, as "127.0.0.1:9001"
        exit 64
    "#]],
    );
    let output = agent(&["--config", "/no/such.yaml"]);
    assert_eq!(output.status.code(), Some(64));
    expect![[r#"
        could not read /no/such.yaml
          because: No such file or directory (os error 2)
    "#]]
    .assert_eq(&String::from_utf8_lossy(&output.stderr));
    assert_eq!(agent(&["--confg"]).status.code(), Some(64));
    assert_eq!(agent(&["--version"]).status.code(), Some(0));
}

#[tokio::test]
async fn ports_that_somebody_else_took_cost_the_agent_those_ports_until_they_are_free() {
    let place = vmesh_testkit::Loopback::unique().unwrap();
    let taken = std::net::TcpListener::bind((place.ip(), 15020)).unwrap();
    let taken_names = std::net::UdpSocket::bind((place.ip(), 15053)).unwrap();
    let dir = tempdir().unwrap();
    let path = dir.join("agent.yaml");
    let (dir_text, ip) = (dir.display(), place.ip());
    let config = format!(
        "control_plane: [\"http://127.0.0.1:1\"]\nstate_dir: {dir_text}/s\nrun_dir: {dir_text}/r\n\
         listen: {{api: \"{ip}:15020\", dns: \"{ip}:15053\"}}\n"
    );
    std::fs::write(&path, config).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmesh-agent"));
    command.arg("--config").arg(&path);
    let mut daemon = Daemon::spawn("vmesh-agent", command).unwrap();
    let socket = Peer::Unix(dir.join("r/agent.sock"));
    let mut listens = async |bound: bool| {
        let status = wait_for(format!("both to be bound: {bound}"), SOON, async || {
            if let Some(status) = daemon.has_exited() {
                return Err(format!("it ended: {status}"));
            }
            let (_, body) =
                fetch(&socket, http::Method::GET, "/status", SOON).await.map_err(|error| one_line(&error))?;
            let status: Value = serde_json::from_slice(&body).unwrap();
            let is = |what: &str| {
                let one = &status["listen"][what];
                one["bound"] == bound && (bound || one["reason"].is_string())
            };
            if is("api") && is("dns") { Ok(status) } else { Err(status.to_string()) }
        });
        status.await.unwrap_or_else(|failed| panic!("{failed}\n{}", daemon.output()))
    };
    let status = listens(false).await;
    assert_eq!(status["listen"]["api"]["reason"], "Address already in use (os error 98)");
    drop((taken, taken_names));
    listens(true).await;
    let api = Peer::Tcp(SocketAddr::new(ip, 15020));
    assert_eq!(fetch(&api, http::Method::GET, "/healthz", SOON).await.unwrap().0, 200);
}
