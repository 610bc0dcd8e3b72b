//! Tests of the whole agent between a control plane and the real Envoy.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use vmesh_daemon::fetch::{Peer, fetch};
use vmesh_proto::google::protobuf::value::Kind as ValueKind;
use vmesh_testkit::app::HttpApp;
use vmesh_testkit::load::{Load, Plan};
use vmesh_testkit::process::Daemon;
use vmesh_testkit::wait_for;
use vmesh_xds::{Kind, Resource, State};

use crate::fixture::{Place, SOON, TestControlPlane, cluster, listener, orders};

struct AgentProcess {
    daemon: Daemon,
    api: Peer,
}

impl AgentProcess {
    fn start(place: &Place, control_planes: &[SocketAddr]) -> AgentProcess {
        let path = place.dir.join("agent.yaml");
        std::fs::write(&path, place.text(control_planes, "")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmesh-agent"));
        command.arg("--config").arg(path).env("VMESH_LOG", "debug");
        let daemon = Daemon::spawn("vmesh-agent", command).unwrap();
        AgentProcess { daemon, api: Peer::Tcp(place.api()) }
    }

    async fn ready(&mut self) {
        self.daemon.wait_http(&self.api, "/readyz", SOON).await.unwrap();
    }

    async fn status(&mut self, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let seen = wait_for(what, SOON, async || {
            let (_, body) =
                fetch(&self.api, http::Method::GET, "/status", SOON).await.map_err(|e| e.to_string())?;
            let status: Value = serde_json::from_slice(&body).unwrap();
            if is(&status) { Ok(status) } else { Err(status.to_string()) }
        });
        seen.await.map_err(|failed| panic!("{failed}\n{}", self.daemon.output())).unwrap()
    }
}

fn saved(status: &Value) -> bool {
    status["accepted"]["saved"].is_u64() && status["accepted"]["resources"]["listener"] == 1
}

fn app(place: &Place, name: &str, port: u16) -> HttpApp {
    HttpApp::start(name, "v1", place.at(port)).unwrap()
}

async fn control_plane(place: &Place, port: u16, app: &HttpApp) -> (TestControlPlane, SocketAddr) {
    let address = place.at(port);
    let control_plane = TestControlPlane::on(address).await;
    control_plane.publish(orders(place.upstream(), app.address()));
    (control_plane, address)
}

async fn served(load: &Load, instance: &str) {
    let before = load.so_far().by_instance.get(instance).copied().unwrap_or(0);
    wait_for(format!("answers of {instance}"), SOON, async || {
        let report = load.so_far();
        let more = report.by_instance.get(instance).copied().unwrap_or(0) >= before + 20;
        if more { Ok(()) } else { Err(report.to_string()) }
    })
    .await
    .unwrap();
}

fn load(place: &Place) -> Load {
    Load::start(Plan::to(place.upstream()).rate(400.0)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn envoy_serves_what_the_control_plane_says_and_its_acks_go_up() {
    let place = Place::new();
    let (one, two) = (app(&place, "one", 8081), app(&place, "two", 8082));
    let (control, address) = control_plane(&place, 15010, &one).await;
    let mut agent = AgentProcess::start(&place, &[address]);
    agent.ready().await;
    let load = load(&place);
    served(&load, "one").await;
    control.publish(orders(place.upstream(), two.address()));
    served(&load, "two").await;
    let report = load.stop().await;
    assert_eq!(report.failures, 0, "{report}");
    let mut seen = control.seen.clone();
    seen.wait_for(|seen| seen.status.state == State::Synced && seen.status.kinds[Kind::Cluster].acks >= 2)
        .await
        .unwrap();

    let node = seen.borrow().nodes[0].clone();
    assert_eq!((node.id.as_str(), node.user_agent_name.as_str()), ("web-1", "vmesh-agent"));
    assert_eq!(node.locality.unwrap().zone, "eu-1a");
    let Some(ValueKind::StructValue(vmesh)) = &node.metadata.unwrap().fields["vmesh"].kind else { panic!() };
    let Some(ValueKind::StringValue(build)) = &vmesh.fields["build"].kind else { panic!() };
    assert!(build.ends_with(&format!("envoy/{}", vmesh_proto::ENVOY_VERSION)), "{build}");

    let status = agent.status("a saved configuration", saved).await;
    assert_eq!(status["control_plane"]["in_use"], format!("http://{address}"));
    assert_eq!(status["accepted"]["resources"]["listener"], 1);
    let metrics = agent.daemon.wait_http(&agent.api, "/metrics", SOON).await.unwrap();
    assert!(metrics.contains("vmesh_agent_control_plane_connected 1.0\n"), "{metrics}");
    assert!(agent.daemon.terminate(SOON).await.unwrap().success());
    assert!(vmesh_testkit::process::naming(&place.run_dir()).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_envoy_rejects_goes_up_in_its_own_words_and_the_last_good_configuration_stays() {
    let place = Place::new();
    let app = app(&place, "one", 8081);
    let (control, address) = control_plane(&place, 15010, &app).await;
    let mut agent = AgentProcess::start(&place, &[address]);
    agent.ready().await;
    let load = load(&place);
    served(&load, "one").await;
    // This listener is invalid: its port is taken by another listener.
    let mut bad = orders(place.upstream(), app.address());
    bad.push(Resource::new(Kind::Listener, "bad", &listener("bad", place.upstream(), "orders")));
    control.publish(bad);
    let mut seen = control.seen.clone();
    seen.wait_for(|seen| matches!(seen.status.state, State::Rejected { .. })).await.unwrap();
    let State::Rejected { reason } = seen.borrow().status.state.clone() else { panic!() };
    assert!(reason.contains("bad") && reason.contains("duplicate address"), "{reason}");
    let status = agent.status("a rejection", |status| status["accepted"]["rejections"] != 0).await;
    assert!(status["accepted"]["last_rejection"].as_str().unwrap().starts_with("listener bad: "));
    served(&load, "one").await;
    assert_eq!(load.stop().await.failures, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_somebody_else_had_is_served_when_it_is_free() {
    let place = Place::new();
    let app = app(&place, "one", 8081);
    let taken = std::net::TcpListener::bind(place.upstream()).unwrap();
    let (control, address) = control_plane(&place, 15010, &app).await;
    let mut agent = AgentProcess::start(&place, &[address]);
    let mut seen = control.seen.clone();
    seen.wait_for(|seen| matches!(seen.status.state, State::Rejected { .. })).await.unwrap();
    let State::Rejected { reason } = seen.borrow().status.state.clone() else { panic!() };
    assert!(reason.contains("Address already in use"), "{reason}");
    drop(taken);
    let load = load(&place);
    served(&load, "one").await;
    // To report that an earlier rejection is over, the agent needs a new stream.
    let synced = seen.wait_for(|seen| seen.status.state == State::Synced);
    tokio::time::timeout(SOON, synced).await.unwrap().unwrap();
    agent.status("the listener to be kept", saved).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_starts_without_a_control_plane_serves_the_last_good_configuration_within_two_seconds() {
    let place = Place::new();
    let app = app(&place, "one", 8081);
    let (control, address) = control_plane(&place, 15010, &app).await;
    let mut agent = AgentProcess::start(&place, &[address]);
    agent.ready().await;
    agent.status("a saved configuration", saved).await;
    agent.daemon.terminate(SOON).await.unwrap();
    control.crash().await;

    let began = std::time::Instant::now();
    let mut agent = AgentProcess::start(&place, &[address]);
    let answer = wait_for("an answer", SOON, async || {
        fetch(&Peer::Tcp(place.upstream()), http::Method::GET, "/", SOON)
            .await
            .map_err(|error| error.to_string())
    });
    answer.await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    agent.ready().await;
    let status = agent.status("a reason", |status| status["control_plane"]["reason"].is_string()).await;
    assert_eq!(status["accepted"]["from_disk"], true, "{status}");

    // When the control plane is back, the agent uses its configuration again.
    let two = HttpApp::start("two", "v1", place.at(8082)).unwrap();
    let (_control, _) = control_plane(&place, 15010, &two).await;
    served(&load(&place), "two").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_that_has_nothing_new_for_a_restarted_agent_confirms_what_it_has() {
    let place = Place::new();
    let app = app(&place, "one", 8080);
    let (_control_plane, at) = control_plane(&place, 15010, &app).await;
    let mut agent = AgentProcess::start(&place, &[at]);
    agent.ready().await;
    agent.status("a saved configuration", saved).await;
    assert!(agent.daemon.terminate(SOON).await.unwrap().success());
    let restarted = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let mut agent = AgentProcess::start(&place, &[at]);
    let confirmed = |status: &Value| {
        status["control_plane"]["in_use"].is_string()
            && status["accepted"]["from_disk"] == false
            && status["accepted"]["confirmed"].as_u64().is_some_and(|at| at >= restarted)
    };
    agent.status("a configuration that is confirmed", confirmed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_crash_of_agent_or_control_plane_costs_a_request() {
    let place = Place::new();
    let (one, two) = (app(&place, "one", 8081), app(&place, "two", 8082));
    let (control, address) = control_plane(&place, 15010, &one).await;
    let mut agent = AgentProcess::start(&place, &[address]);
    agent.ready().await;
    let load = load(&place);
    served(&load, "one").await;
    control.crash().await;
    agent.status("no control plane", |status| status["control_plane"]["in_use"].is_null()).await;
    served(&load, "one").await;
    agent.daemon.kill().unwrap();
    served(&load, "one").await;
    let mut agent = AgentProcess::start(&place, &[address]);
    agent.ready().await;
    let status = agent.status("an adopted Envoy", |status| status["envoy"]["adopted"] == true).await;
    assert_eq!(status["envoy"]["restarts"], 0);
    served(&load, "one").await;
    let (control, _) = control_plane(&place, 15010, &two).await;
    served(&load, "two").await;
    // A frozen agent keeps its sockets open and does not answer.
    agent.daemon.freeze().unwrap();
    served(&load, "two").await;
    agent.daemon.thaw().unwrap();
    control.publish(orders(place.upstream(), one.address()));
    served(&load, "one").await;
    let report = load.stop().await;
    assert_eq!((report.failures, report.raced), (0, 0), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn configuration_comes_from_one_control_plane_and_the_others_get_the_report() {
    let place = Place::new();
    let app = app(&place, "one", 8081);
    let (a, at_a) = control_plane(&place, 15010, &app).await;
    let (b, at_b) = control_plane(&place, 15110, &app).await;
    let mut agent = AgentProcess::start(&place, &[at_a, at_b]);
    agent.ready().await;
    let reported = |status: &Value| {
        let others = status["control_plane"]["reported_to"].as_object().unwrap().clone();
        others.len() == 1 && others.values().all(|reported| *reported == true)
    };
    let status = agent.status("a report to the other", reported).await;
    let in_use = status["control_plane"]["in_use"].as_str().unwrap().to_owned();
    assert!(!status["control_plane"]["reported_to"].as_object().unwrap().contains_key(&in_use));
    let (used, other, name) = if in_use.ends_with("15010") { (a, b, at_b) } else { (b, a, at_a) };
    let mut seen = other.seen.clone();
    seen.wait_for(|seen| seen.streams == 1 && seen.status.unknown_types == 1).await.unwrap();
    assert_eq!(seen.borrow().nodes.last().unwrap().id, "web-1");

    let load = load(&place);
    served(&load, "one").await;
    used.crash().await;
    agent
        .status("the other in use", |status| status["control_plane"]["in_use"] == format!("http://{name}"))
        .await;
    served(&load, "one").await;
    assert_eq!(load.stop().await.failures, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_control_plane_that_hangs_is_passed_over() {
    let place = Place::new();
    let app = app(&place, "one", 8081);
    // The kernel completes the TCP handshake, and no process accepts the connection.
    let hung = std::net::TcpListener::bind(place.at(15110)).unwrap();
    let (_control, address) = control_plane(&place, 15010, &app).await;
    let mut agent = AgentProcess::start(&place, &[hung.local_addr().unwrap(), address]);
    agent.ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_start_without_a_control_plane_says_what_it_waits_for() {
    let place = Place::new();
    let app = app(&place, "one", 8081);
    let mut agent = AgentProcess::start(&place, &[place.at(15010)]);
    let status = agent.status("a reason", |status| status["control_plane"]["reason"].is_string()).await;
    assert_eq!(status["envoy"]["state"], "waiting");
    let why = status["why_not_ready"].as_str().unwrap();
    assert!(
        why.starts_with(
            "Envoy is waiting: there is no configuration to serve yet; no control plane answers: "
        ),
        "{why}"
    );
    let (_control, _) = control_plane(&place, 15010, &app).await;
    agent.ready().await;
    // Of the resident memory, 18 MiB are pages of the executable file in an unoptimised build.
    let (anonymous, resident) =
        (agent.daemon.anonymous_bytes().unwrap(), agent.daemon.resident_bytes().unwrap());
    assert!(anonymous < 4 << 20 && resident < 24 << 20, "{} KiB, {} KiB", anonymous >> 10, resident >> 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_services_fit_into_twenty_mebibytes() {
    let place = Place::new();
    let app = app(&place, "one", 8081);
    let (control, address) = control_plane(&place, 15010, &app).await;
    let mut all = orders(place.upstream(), app.address());
    for number in 0..1000 {
        let name = format!("service-{number}");
        let instances: Vec<_> = (1..=10).map(|instance| place.at(20_000 + instance)).collect();
        all.push(Resource::new(Kind::Cluster, name.clone(), &cluster(&name, &instances)));
    }
    control.publish(all);
    let mut agent = AgentProcess::start(&place, &[address]);
    agent.ready().await;
    agent.status("a saved configuration", |status| status["accepted"]["resources"]["cluster"] == 1001).await;
    // In addition, the optimised executable has about 9 MiB of its file resident, an unoptimised one twice as much.
    let anonymous = agent.daemon.anonymous_bytes().unwrap();
    assert!(anonymous < 8 << 20, "{} KiB", anonymous >> 10);
    if std::env::var_os("VMESH_ECHO").is_some() {
        let resident = agent.daemon.resident_bytes().unwrap();
        eprintln!("anonymous: {} KiB, resident: {} KiB", anonymous >> 10, resident >> 10);
    }
}
