//! Tests of `manage: child`, in which the agent starts Envoy. The test's control plane serves Envoy in place of the relay.

use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::watch;
use vmesh_agent::envoy::{self, EnvoyState, EnvoyStatus};
use vmesh_daemon::Tasks;
use vmesh_testkit::app::{Behaviour, HttpApp};
use vmesh_testkit::load::{Load, Plan};
use vmesh_testkit::wait_for;

use crate::fixture::{Place, SOON, TestControlPlane, orders};

/// The agent's tasks that look after Envoy.
struct ChildTasks {
    tasks: Tasks,
    status: watch::Receiver<EnvoyStatus>,
    has_config: watch::Sender<bool>,
}

impl ChildTasks {
    fn start(place: &Place, settings: &str) -> ChildTasks {
        let config = Arc::new(place.config(&["127.0.0.1:1".parse().unwrap()], settings));
        let mut tasks = Tasks::new();
        let (sender, status) = watch::channel(EnvoyStatus::default());
        let (has_config, given) = watch::channel(true);
        std::fs::create_dir_all(&config.run_dir).unwrap();
        envoy::spawn(&mut tasks, &config, sender, given).unwrap();
        ChildTasks { tasks, status, has_config }
    }

    async fn wait_for_status(&mut self, what: &str, is: impl Fn(&EnvoyStatus) -> bool) -> EnvoyStatus {
        let seen = wait_for(what, SOON, async || {
            let status = self.status.borrow().clone();
            if is(&status) { Ok(status) } else { Err(format!("{status:?}")) }
        });
        seen.await.unwrap()
    }

    async fn is_live(&mut self) -> EnvoyStatus {
        self.wait_for_status("a live Envoy", |status| status.state == EnvoyState::Live).await
    }

    async fn stop(self) {
        assert!(self.tasks.stop_within(SOON).await.is_empty());
    }
}

async fn serving(place: &Place) -> (TestControlPlane, HttpApp) {
    std::fs::create_dir_all(place.run_dir()).unwrap();
    let app = HttpApp::start("orders-1", "v1", place.at(8080)).unwrap();
    let control_plane = TestControlPlane::on_socket(place.run_dir().join("xds.sock")).await;
    control_plane.publish(orders(place.upstream(), app.address()));
    (control_plane, app)
}

async fn load(place: &Place) -> Load {
    let load = Load::start(Plan::to(place.upstream()).rate(500.0)).unwrap();
    served(&load, 50).await;
    load
}

async fn served(load: &Load, more: u64) {
    let before = load.so_far().ok;
    wait_for("answers", SOON, async || {
        let report = load.so_far();
        if report.ok >= before + more { Ok(()) } else { Err(report.to_string()) }
    })
    .await
    .unwrap();
}

/// Aborts the tasks without stopping them first, as SIGKILL does.
fn crash(agent: ChildTasks) {
    drop(agent);
}

#[tokio::test(flavor = "multi_thread")]
async fn envoy_starts_when_there_is_something_to_serve() {
    let place = Place::new();
    let (_control_plane, _app) = serving(&place).await;
    let mut agent = ChildTasks::start(&place, "");
    agent.has_config.send_replace(false);
    let status = agent.wait_for_status("a reason", |status| status.reason.is_some()).await;
    if status.state == EnvoyState::Waiting {
        assert_eq!(status.reason.as_deref(), Some("there is no configuration to serve yet"));
    }
    agent.has_config.send_replace(true);
    let status = agent.is_live().await;
    assert_eq!(status.version.as_deref(), Some(vmesh_proto::ENVOY_VERSION));
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_is_killed_is_started_again() {
    let place = Place::new();
    let (_control_plane, _app) = serving(&place).await;
    let mut agent = ChildTasks::start(&place, "");
    let first = agent.is_live().await.pid.unwrap();
    kill_process(Pid::from_raw(first).unwrap(), Signal::KILL).unwrap();
    let status = agent
        .wait_for_status("a second Envoy", |status| status.restarts == 1 && status.state == EnvoyState::Live)
        .await;
    assert_ne!(status.pid, Some(first));
    let load = load(&place).await;
    assert_eq!(load.stop().await.failures, 0);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_crashes_costs_no_request_and_the_next_takes_its_envoy_over() {
    let place = Place::new();
    let (_control_plane, _app) = serving(&place).await;
    let mut agent = ChildTasks::start(&place, "");
    let first = agent.is_live().await.pid;
    let load = load(&place).await;
    crash(agent);
    served(&load, 50).await;
    let mut agent = ChildTasks::start(&place, "");
    let status = agent.is_live().await;
    assert!(status.adopted && status.pid == first, "{status:?}");
    served(&load, 50).await;
    let report = load.stop().await;
    assert_eq!((report.failures, report.raced), (0, 0), "{report}");

    // The agent notices the exit of an Envoy that is not its child.
    kill_process(Pid::from_raw(first.unwrap()).unwrap(), Signal::KILL).unwrap();
    let status = agent
        .wait_for_status("a second Envoy", |status| status.restarts == 1 && status.state == EnvoyState::Live)
        .await;
    assert!(!status.adopted);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_with_another_configuration_starts_beside_the_old_one_and_takes_its_requests_over() {
    let place = Place::new();
    let (_control_plane, _app) = serving(&place).await;
    let mut agent = ChildTasks::start(&place, "");
    let first = agent.is_live().await.pid;
    let load = load(&place).await;
    crash(agent);
    let mut agent = ChildTasks::start(&place, ", max_connections: 1000");
    let status = agent
        .wait_for_status("another Envoy", |status| status.state == EnvoyState::Live && status.pid != first)
        .await;
    assert!(!status.adopted);
    let gone = async || vmesh_testkit::process::naming(&place.dir).len();
    let one = wait_for("the first Envoy to leave", SOON, async || match gone().await {
        1 => Ok(()),
        more => Err(format!("{more} run")),
    });
    one.await.unwrap();
    served(&load, 50).await;
    let report = load.stop().await;
    // When a listener closes, the kernel resets the connections in its queue (`tcp_migrate_req` is 0).
    assert!(report.failures <= 1, "{report}");
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_does_not_come_up_leaves_the_old_one_serving() {
    let place = Place::new();
    let (_control_plane, _app) = serving(&place).await;
    let mut agent = ChildTasks::start(&place, "");
    let first = agent.is_live().await.pid;
    let load = load(&place).await;
    crash(agent);
    let mut agent = ChildTasks::start(&place, ", extra_args: [--no-such-option]");
    let status = agent
        .wait_for_status("the old Envoy", |status| status.adopted && status.state == EnvoyState::Live)
        .await;
    assert_eq!(status.pid, first);
    served(&load, 50).await;
    assert_eq!(load.stop().await.failures, 0);
    agent.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_ends_while_one_envoy_takes_over_from_another_leaves_neither_behind() {
    let place = Place::new();
    let (_control_plane, _app) = serving(&place).await;
    let mut agent = ChildTasks::start(&place, "");
    let first = agent.is_live().await.pid.and_then(Pid::from_raw).unwrap();
    crash(agent);
    let other = ", max_connections: 1000";
    // The first agent crashes, the second one is stopped.
    for crashes in [true, false] {
        let agent = ChildTasks::start(&place, other);
        let new = async || {
            let others = vmesh_testkit::process::naming(&place.dir);
            others
                .into_iter()
                .find(|pid| *pid != first)
                .inspect(|pid| kill_process(*pid, Signal::STOP).unwrap())
        };
        wait_for("another Envoy", SOON, new).await.unwrap();
        if crashes {
            crash(agent);
        } else {
            agent.stop().await;
        }
    }
    assert!(vmesh_testkit::process::naming(&place.dir).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_lets_requests_under_way_finish_and_leaves_no_process() {
    let place = Place::new();
    let (_control_plane, app) = serving(&place).await;
    let mut agent = ChildTasks::start(&place, "");
    agent.is_live().await;
    app.behave(Behaviour::Slow(Duration::from_millis(500)));
    let load = Load::start(Plan::to(place.upstream()).closed_loop().connections(1)).unwrap();
    wait_for("a request under way", SOON, async || (app.requests() > 0).then_some(())).await.unwrap();
    let (report, ()) = tokio::join!(load.stop(), agent.stop());
    assert_eq!((report.ok, report.failures), (1, 0), "{report}");
    assert!(vmesh_testkit::process::naming(&place.dir).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_is_to_be_kept_goes_on_when_the_agent_stops() {
    let place = Place::new();
    let (_control_plane, _app) = serving(&place).await;
    let mut agent = ChildTasks::start(&place, ", keep_on_stop: true");
    agent.is_live().await;
    let load = load(&place).await;
    agent.stop().await;
    served(&load, 50).await;
    assert_eq!(load.stop().await.failures, 0);
}
