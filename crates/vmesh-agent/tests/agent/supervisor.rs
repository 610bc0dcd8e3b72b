//! Tests of `vmesh-agent envoy`, the supervisor of Envoy, with real Envoys under load.

mod faults;
mod host;

use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use vmesh_agent::Config;
use vmesh_daemon::fetch::{Peer, fetch};
use vmesh_daemon::tasks::spawn_handle;
use vmesh_proto::any;
use vmesh_proto::envoy::config::listener::v3::filter::ConfigType;
use vmesh_proto::envoy::config::listener::v3::{Filter, FilterChain, Listener};
use vmesh_proto::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use vmesh_proto::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::ClusterSpecifier;
use vmesh_testkit::app::{Behaviour, HttpApp};
use vmesh_testkit::envoy::{self, Envoy};
use vmesh_testkit::load::{Load, Plan, Report};
use vmesh_testkit::process::Daemon;
use vmesh_testkit::wait_for;
use vmesh_xds::{Kind, Resource};

use crate::fixture::{Place, SOON, TestControlPlane, cluster, listener, orders};
use host::*;

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().mode() & 0o777
}

#[tokio::test(flavor = "multi_thread")]
async fn envoy_starts_when_the_agent_has_written_its_bootstrap_and_what_it_says_may_be_read_by_its_group() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    host.configure();
    let mut supervisor = host.supervise_as_it_is();
    let status = supervisor
        .wait_for_status("a reason", |status| status["state"] == "waiting" && status["reason"].is_string())
        .await;
    assert!(status["reason"].as_str().unwrap().ends_with("is vmesh-agent running?"), "{status}");
    assert_eq!(supervisor.get("/ready").await.0, 503);
    host.write_bootstrap();
    let status = supervisor.is_live().await;
    assert_eq!((status["version"].as_str(), status["epoch"].as_u64()), (Some(envoy::VERSION), Some(0)));
    assert_eq!(supervisor.get("/ready").await, (200, "LIVE\n".to_owned()));
    assert_eq!(mode(&host.dir().join("admin.sock")), 0o600);
    assert_eq!(mode(&host.dir().join("status.sock")), 0o660);
    for (path, has) in [
        ("/stats/prometheus", "envoy_server_live"),
        ("/clusters", "orders::"),
        ("/listeners", "outbound::"),
        ("/config_dump", "ClustersConfigDump"),
        ("/server_info", "\"LIVE\""),
    ] {
        let (code, body) = supervisor.get(path).await;
        assert!(code == 200 && body.contains(has), "{path}: {code} {body}");
    }
    assert_eq!(supervisor.get("/config_dump?resource=dynamic_active_secrets").await.0, 400);
    assert_eq!(supervisor.get("/quitquitquit").await.0, 404);
    let (code, _) = fetch(&supervisor.socket, http::Method::POST, "/clusters", SOON).await.unwrap();
    assert_eq!(code.as_u16(), 405);
    assert!(supervisor.daemon.terminate(SOON).await.unwrap().success());
    assert!(host.envoys().is_empty());
    let left =
        std::fs::read_dir(host.dir()).unwrap().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let left: Vec<String> =
        left.filter(|name| name.contains("admin") || name.contains("bootstrap")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_with_nothing_changed_costs_no_request_and_no_connection() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let mut stream = EchoStream::open(&host).await;
    let clients = Clients::start(&host).await;
    let began = Instant::now();
    supervisor.hang_up();
    let second = supervisor.reloaded(1).await;
    eprintln!("from SIGHUP to live: {:?}", began.elapsed());
    for pid in host.envoys() {
        let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).unwrap();
        let of = |name: &str| status.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
        eprintln!("{} {} {}", pid.as_raw_nonzero(), of("VmRSS:"), of("RssAnon:"));
    }
    assert_ne!(pid(&first), pid(&second));
    assert_eq!(second["epoch"], 1);
    assert_eq!(second["leaving"][0]["pid"], first["pid"]);
    clients.are_served().await;
    // By now the old Envoy has closed its listeners; the open stream stays with it.
    tokio::time::sleep(Duration::from_secs(3)).await;
    clients.are_served().await;
    stream.lives().await;
    clients.lost_nothing().await;
    assert_eq!(host.envoys().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_reload_waits_until_the_first_envoy_has_no_clients_and_costs_nothing_either() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let stream = EchoStream::open(&host).await;
    let clients = Clients::start(&host).await;
    supervisor.hang_up();
    let second = supervisor.reloaded(1).await;
    supervisor.hang_up();
    let status = supervisor.wait_for_status("a reload that waits", waits_for_the_first).await;
    assert_eq!((&status["pid"], &status["leaving"][0]["pid"]), (&second["pid"], &first["pid"]));
    clients.are_served().await;
    drop(stream);
    let third = supervisor.reloaded(2).await;
    assert_eq!((&third["epoch"], &third["restarts"]), (&2.into(), &0.into()), "{third}");
    clients.are_served().await;
    clients.lost_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_reload_waits_no_longer_than_the_first_envoy_may_stay() {
    let mut host = Host::new();
    host.settings += ", hot_restart: {parent_shutdown: 6s}";
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    supervisor.is_live().await;
    let _stream = EchoStream::open(&host).await;
    let clients = Clients::start(&host).await;
    supervisor.hang_up();
    supervisor.reloaded(1).await;
    supervisor.hang_up();
    supervisor.wait_for_status("a reload that waits", waits_for_the_first).await;
    assert_eq!(supervisor.reloaded(2).await["epoch"], 2);
    clients.are_served().await;
    host.one_is_left().await;
    clients.are_served().await;
    clients.lost_nothing().await;
}

fn waits_for_the_first(status: &Value) -> bool {
    status["reload"].as_str().is_some_and(|reload| reload.contains("still has connections"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_that_is_asked_for_twice_does_not_wait_and_keeps_the_connections_of_both() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let mut stream = EchoStream::open(&host).await;
    let clients = Clients::start_persistent(&host).await;
    supervisor.hang_up();
    supervisor.reloaded(1).await;
    supervisor.hang_up();
    supervisor.wait_for_status("a reload that waits", waits_for_the_first).await;
    supervisor.hang_up();
    let status = supervisor.reloaded(2).await;
    // A third epoch of the same line would terminate the first Envoy, so a new line was begun.
    assert_eq!(status["epoch"], 0, "{status}");
    assert_eq!(status["leaving"][0]["pid"], first["pid"]);
    clients.are_served().await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    stream.lives().await;
    clients.are_served().await;
    assert!(clients.failures() <= 1, "{}", clients.kept.so_far());
    drop(stream);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_with_other_settings_has_another_envoy_take_over_and_one_that_only_restarts_has_not() {
    let mut host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let clients = Clients::start(&host).await;
    host.write_bootstrap();
    host.settings += ", max_connections: 1000, hot_restart: {parent_shutdown: 4s}";
    host.write_bootstrap();
    let second = supervisor.reloaded(1).await;
    assert_ne!(first["pid"], second["pid"]);
    host.write_bootstrap();
    clients.are_served().await;
    host.one_is_left().await;
    clients.are_served().await;
    assert_eq!(supervisor.is_live().await["pid"], second["pid"]);
    clients.lost_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_of_envoy_and_the_way_back_cost_no_request_and_no_connection() {
    let mut host = Host::with(envoy::OLDEST);
    host.settings += ", hot_restart: {parent_shutdown: 4s}";
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    assert_eq!(supervisor.is_live().await["version"], envoy::OLDEST);
    let clients = Clients::start(&host).await;
    for (reloads, version) in [(1, envoy::VERSION), (2, envoy::OLDEST)] {
        let mut stream = EchoStream::open(&host).await;
        host.install(version);
        let status = supervisor
            .wait_for_status("the binary that waits", |status| status["waiting_binary"].is_string())
            .await;
        assert_ne!(status["version"], version);
        assert!(status["waiting_binary"].as_str().unwrap().contains(version), "{status}");
        supervisor.hang_up();
        let status = supervisor.reloaded(reloads).await;
        assert_eq!((status["version"].as_str(), &status["waiting_binary"]), (Some(version), &Value::Null));
        assert_eq!(status["epoch"], reloads);
        clients.are_served().await;
        stream.lives().await;
        host.one_is_left().await;
        clients.are_served().await;
    }
    clients.lost_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_cannot_take_over_is_not_let_to_and_the_status_says_why() {
    let mut host = Host::new();
    host.settings += ", hot_restart: {parent_shutdown: 4s}";
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await["pid"].clone();
    let real = envoy::find().unwrap();
    let real = real.display();
    let clients = Clients::start(&host).await;
    for (script, why) in [
        ("echo out of luck; exit 3".to_owned(), "exit status: 3: out of luck"),
        (format!("case \"$*\" in *--mode*) exit 9;; *) exec {real} \"$@\";; esac"), "refuses the bootstrap"),
        // This failure shows only when the new Envoy is really started.
        (
            format!("case \"$*\" in *--restart-epoch*) exit 7;; *) exec {real} \"$@\";; esac"),
            "it ended before it was live",
        ),
    ] {
        host.install_script(&script);
        supervisor.hang_up();
        let status = supervisor.failed(why).await;
        assert_eq!(status["pid"], first, "{status}");
        assert_eq!(status["version"], envoy::VERSION);
        host.envoy().wait_live(SOON).await.unwrap();
        clients.are_served().await;
    }
    host.one_is_left().await;

    // A repaired binary is accepted.
    host.install(envoy::VERSION);
    supervisor.hang_up();
    supervisor.reloaded(1).await;
    clients.are_served().await;
    clients.lost_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bootstrap_that_envoy_refuses_is_not_taken_and_is_tried_once() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await["pid"].clone();
    let clients = Clients::start(&host).await;
    let path = host.place.run_dir().join("bootstrap.json");
    let good = std::fs::read_to_string(&path).unwrap();
    for (bad, why) in [("{", "is not JSON"), ("{\"no_such_field\": 1}", "no_such_field")] {
        std::fs::write(&path, bad).unwrap();
        let status = supervisor.failed(why).await;
        assert_eq!(status["pid"], first);
        let at = status["last_failure"]["at"].clone();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(supervisor.failed(why).await["last_failure"]["at"], at);
    }
    std::fs::write(&path, good).unwrap();
    clients.are_served().await;
    assert_eq!(supervisor.is_live().await["reloads"], 0);
    clients.lost_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_envoy_that_hangs_is_ended_and_another_like_the_old_one_takes_over_instead() {
    let mut host = Host::new();
    host.settings += ", hung_after: 4s, hot_restart: {parent_shutdown: 60s}";
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let mut stream = EchoStream::open(&host).await;
    let clients = Clients::start(&host).await;
    supervisor.hang_up();
    let candidate = candidate(&host, &first).await;
    kill_process(candidate, Signal::STOP).unwrap();
    clients.are_served().await;
    supervisor.failed("it hangs: no answer for 4s").await;
    clients.are_served().await;
    host.envoy().wait_live(SOON).await.unwrap();
    assert!(!host.envoys().contains(&candidate));
    stream.lives().await;
    clients.lost_nothing().await;
}

/// Returns the pid of the Envoy that is starting beside the serving one, before it is live.
async fn candidate(host: &Host, serving: &Value) -> Pid {
    let known = [serving["pid"].clone(), serving["leaving"][0]["pid"].clone()];
    let deadline = Instant::now() + SOON;
    while Instant::now() < deadline {
        for other in host.envoys() {
            let number = other.as_raw_nonzero();
            let program = std::fs::read_link(format!("/proc/{number}/exe")).unwrap_or_default();
            let line = std::fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
            let takes_over = String::from_utf8_lossy(&line).contains("--restart-epoch");
            if program == host.binary() && takes_over && !known.contains(&number.get().into()) {
                return other;
            }
        }
    }
    panic!("no candidate");
}

#[tokio::test(flavor = "multi_thread")]
async fn while_one_takes_over_from_another_both_get_what_the_control_plane_says() {
    let host = Host::new();
    let (control_plane, _one) = serving(&host).await;
    let two = HttpApp::start("two", "v2", host.place.at(8082)).unwrap();
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let clients = Clients::start(&host).await;
    supervisor.hang_up();
    let candidate = candidate(&host, &first).await;
    kill_process(candidate, Signal::STOP).unwrap();
    // The old Envoy serves with its admin interface closed, so its configuration shows in its answers alone.
    control_plane.publish(resources(&host, two.address()));
    clients.by_instance("two").await;
    assert!(supervisor.get("/status").await.1.contains("\"reloads\":0"));
    kill_process(candidate, Signal::CONT).unwrap();
    let second = supervisor.reloaded(1).await;
    assert_eq!(pid(&second), candidate);
    clients.by_instance("two").await;
    let endpoints = host.envoy().endpoints("orders").await.unwrap().unwrap();
    assert_eq!(endpoints, [(two.address().to_string(), true)]);
    clients.lost_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_dies_is_back_at_once_and_so_is_one_whose_parent_had_just_closed_its_listeners() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let clients = Clients::start(&host).await;
    kill_process(pid(&first), Signal::KILL).unwrap();
    let second = supervisor
        .wait_for_status("a second Envoy", |status| status["restarts"] == 1 && status["state"] == "live")
        .await;
    clients.are_served().await;
    supervisor.hang_up();
    let third = supervisor.reloaded(1).await;
    assert_ne!(second["pid"], third["pid"]);
    kill_process(pid(&third), Signal::KILL).unwrap();
    supervisor
        .wait_for_status("a fourth Envoy", |status| status["restarts"] == 2 && status["state"] == "live")
        .await;
    let failures = clients.failures();
    clients.are_served().await;
    eprintln!("requests that failed around two deaths of Envoy: {failures}");
    assert_eq!(clients.failures(), failures);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_that_dies_while_it_takes_its_leave_does_not_take_its_child_along() {
    let mut host = Host::new();
    host.settings += ", hot_restart: {parent_shutdown: 20s}";
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    supervisor.hang_up();
    let second = supervisor.reloaded(1).await;
    // By now, all clients use the new Envoy.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let clients = Clients::start_persistent(&host).await;
    kill_process(pid(&first), Signal::KILL).unwrap();
    // The new Envoy would abort as soon as it sent a message to its dead parent.
    let third = supervisor.reloaded(2).await;
    assert_eq!((&third["epoch"], &third["restarts"]), (&0.into(), &0.into()), "{third}");
    clients.are_served().await;
    wait_for("the child to have left", SOON, async || (!host.envoys().contains(&pid(&second))).then_some(()))
        .await
        .unwrap();
    clients.are_served().await;
    assert!(clients.failures() <= 1, "{}", clients.kept.so_far());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_supervisor_that_is_killed_costs_no_request_and_the_next_goes_on_with_its_envoys() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    supervisor.is_live().await;
    let mut stream = EchoStream::open(&host).await;
    let clients = Clients::start(&host).await;
    supervisor.hang_up();
    let second = supervisor.reloaded(1).await;
    supervisor.daemon.kill().unwrap();
    clients.are_served().await;
    let mut supervisor = host.supervise_as_it_is();
    let adopted = supervisor.is_live().await;
    assert_eq!((&adopted["pid"], &adopted["adopted"]), (&second["pid"], &Value::Bool(true)));
    assert_eq!(adopted["leaving"], second["leaving"]);

    // Killed during a reload, with a candidate that is not live. The next supervisor kills that candidate.
    supervisor.hang_up();
    supervisor.wait_for_status("a reload that waits", waits_for_the_first).await;
    supervisor.hang_up();
    let candidate = candidate(&host, &adopted).await;
    kill_process(candidate, Signal::STOP).unwrap();
    supervisor.daemon.kill().unwrap();
    clients.are_served().await;
    let mut supervisor = host.supervise_as_it_is();
    let adopted = supervisor.is_live().await;
    assert_eq!(adopted["pid"], second["pid"]);
    assert!(!host.envoys().contains(&candidate));
    clients.are_served().await;
    stream.lives().await;
    clients.lost_nothing().await;
    assert!(supervisor.daemon.terminate(SOON).await.unwrap().success());
    assert!(host.envoys().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_answers_nobody_is_spoken_of_and_in_the_end_replaced() {
    let mut host = Host::new();
    host.settings += ", hung_after: 6s";
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    kill_process(pid(&first), Signal::STOP).unwrap();
    supervisor.wait_for_status("a silent Envoy", |status| status["state"] == "silent").await;
    // The supervisor does not kill an Envoy that was merely slow.
    kill_process(pid(&first), Signal::CONT).unwrap();
    assert_eq!(supervisor.is_live().await["pid"], first["pid"]);
    kill_process(pid(&first), Signal::STOP).unwrap();
    let status = supervisor
        .wait_for_status("another Envoy", |status| status["state"] == "live" && status["restarts"] == 1)
        .await;
    assert!(status["last_failure"]["what"].as_str().unwrap().contains("it hung and was killed"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_under_load_answers_everything_that_was_accepted() {
    let host = Host::new();
    let (_control_plane, app) = serving(&host).await;
    let mut supervisor = host.supervise();
    supervisor.is_live().await;
    app.behave(Behaviour::Slow(Duration::from_millis(300)));
    let load = Load::start(Plan::to(host.place.upstream()).closed_loop().connections(4)).unwrap();
    wait_for("requests under way", SOON, async || (app.requests() >= 4).then_some(())).await.unwrap();
    let (report, status) = tokio::join!(load.stop(), supervisor.daemon.terminate(SOON));
    assert!(status.unwrap().success());
    assert_eq!(report.failures, 0, "{report}");
    assert!(host.envoys().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_not_there_is_waited_for_and_nothing_takes_over_meanwhile() {
    let host = Host::new();
    let (control_plane, app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let clients = Clients::start(&host).await;
    control_plane.crash().await;
    _ = std::fs::remove_file(host.place.run_dir().join("xds.sock"));
    supervisor.hang_up();
    let status =
        supervisor.wait_for_status("a reload that waits", |status| status["reload"].is_string()).await;
    assert_eq!(status["pid"], first["pid"]);
    let waits = |status: &Value| {
        status["reload"].as_str().is_some_and(|reload| reload.contains("the agent does not listen"))
    };
    supervisor.wait_for_status("the reason", waits).await;
    clients.are_served().await;
    let control_plane = TestControlPlane::on_socket(host.place.run_dir().join("xds.sock")).await;
    control_plane.publish(resources(&host, app.address()));
    supervisor.reloaded(1).await;
    clients.are_served().await;
    clients.lost_nothing().await;
}

/// Starts the agent that serves the Envoy of `host`.
fn agent(host: &Host) -> Daemon {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmesh-agent"));
    command.arg("--config").arg(host.file());
    Daemon::spawn("vmesh-agent", command).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_stopped_and_started_touches_no_envoy_also_while_one_takes_over() {
    let host = Host::new();
    let app = HttpApp::start("one", "v1", host.place.at(8080)).unwrap();
    let control_plane = TestControlPlane::on(host.control_plane()).await;
    control_plane.publish(resources(&host, app.address()));
    host.configure();
    let api = Peer::Tcp(host.place.api());
    let mut supervisor = host.supervise_as_it_is();
    let mut first_agent = agent(&host);
    first_agent.wait_http(&api, "/readyz", SOON).await.unwrap();
    let first = supervisor.is_live().await;
    let clients = Clients::start(&host).await;
    // The agent reports the supervisor's status of Envoy.
    let said = first_agent.wait_http(&api, "/status", SOON).await.unwrap();
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!((&said["envoy"]["pid"], &said["envoy"]["state"]), (&first["pid"], &first["state"]));

    first_agent.kill().unwrap();
    clients.are_served().await;
    let mut second_agent = agent(&host);
    second_agent.wait_http(&api, "/readyz", SOON).await.unwrap();
    clients.are_served().await;
    assert!(second_agent.terminate(SOON).await.unwrap().success());
    clients.are_served().await;
    let mut third_agent = agent(&host);
    third_agent.wait_http(&api, "/readyz", SOON).await.unwrap();
    assert_eq!(supervisor.is_live().await["pid"], first["pid"]);

    // Killed during a reload: the candidate waits for the next agent, and does not become live without a configuration.
    supervisor.hang_up();
    let candidate = candidate(&host, &first).await;
    kill_process(candidate, Signal::STOP).unwrap();
    third_agent.kill().unwrap();
    kill_process(candidate, Signal::CONT).unwrap();
    clients.are_served().await;
    let mut fourth_agent = agent(&host);
    let second = supervisor.reloaded(1).await;
    fourth_agent.wait_http(&api, "/readyz", SOON).await.unwrap();
    assert_eq!(pid(&second), candidate);
    clients.are_served().await;
    clients.lost_nothing().await;
}
