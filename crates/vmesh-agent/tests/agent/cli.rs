//! The command.

use std::process::{Command, Output};

use expect_test::{Expect, expect};
use vmesh_testkit::tempdir;

fn agent(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmesh-agent")).args(arguments).output().unwrap()
}

/// Runs the agent on a configuration; its directory is `DIR` in what is expected.
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

#[test]
fn a_port_that_is_taken_is_an_error_at_start() {
    let place = vmesh_testkit::Loopback::unique().unwrap();
    let _taken = std::net::TcpListener::bind((place.ip(), 15020)).unwrap();
    let dir = tempdir().unwrap();
    let path = dir.join("agent.yaml");
    let (dir_text, ip) = (dir.display(), place.ip());
    let config = format!(
        "control_plane: [\"http://127.0.0.1:1\"]\nstate_dir: {dir_text}/s\nrun_dir: {dir_text}/r\nlisten: {{api: \"{ip}:15020\"}}\n"
    );
    std::fs::write(&path, config).unwrap();
    let output = agent(&["--config", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).replace(&ip.to_string(), "IP");
    expect![[r#"
        could not listen on IP:15020 for the API (`listen.api`)
          because: Address already in use (os error 98)
    "#]]
    .assert_eq(&said);
}
