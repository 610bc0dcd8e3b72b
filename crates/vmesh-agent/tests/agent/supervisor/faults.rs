//! Tests of the supervisor under faults: killed processes, lost files, hostile users, full limits.

use std::os::unix::net::UnixDatagram;

use super::*;

impl Host {
    fn record(&self) -> PathBuf {
        self.dir().join("envoys.json")
    }

    async fn admin_says(&self, what: &str) {
        self.says(&self.dir().join("admin.sock"), what).await;
    }

    async fn says(&self, admin: &Path, what: &str) {
        let admin = Peer::Unix(admin.to_owned());
        wait_for(format!("Envoy to say {what}"), SOON, async || {
            let (_, body) =
                fetch(&admin, http::Method::GET, "/server_info", SOON).await.map_err(|_| String::new())?;
            let body = String::from_utf8_lossy(&body).into_owned();
            if body.contains(what) { Ok(()) } else { Err(body) }
        })
        .await
        .unwrap();
    }

    fn files(&self, prefix: &str) -> Vec<String> {
        let names = std::fs::read_dir(self.dir()).unwrap();
        let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        names.filter(|name| name.starts_with(prefix)).collect()
    }

    fn shared_memory(&self, status: &Value) -> PathBuf {
        let number = status["base_id"].as_u64().unwrap() * 10;
        PathBuf::from(format!("/dev/shm/envoy_shared_memory_{number}"))
    }
}

/// Returns the path of the executable of a process, even if the file has been removed.
fn runs(pid: Pid) -> String {
    let exe = std::fs::read_link(format!("/proc/{}/exe", pid.as_raw_nonzero()));
    exe.unwrap_or_default().display().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_supervisor_that_is_killed_while_its_envoy_takes_leave_has_a_next_one_that_starts_another() {
    let mut host = Host::new();
    host.settings = "drain: 20s".to_owned();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let mut stream = EchoStream::open(&host).await;
    supervisor.daemon.signal(Signal::TERM).unwrap();
    host.admin_says("DRAINING").await;
    supervisor.daemon.kill().unwrap();
    let mut supervisor = host.supervise_as_it_is();
    let second = supervisor.is_live().await;
    assert_ne!(first["pid"], second["pid"]);
    assert_eq!(second["leaving"][0]["pid"], first["pid"]);
    let clients = Clients::start_persistent(&host).await;
    stream.lives().await;
    clients.lost_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_is_not_ended_before_its_drain_is_over_however_short_its_stay() {
    let mut host = Host::new();
    host.settings = "drain: 8s, hot_restart: {parent_shutdown: 1s}".to_owned();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    supervisor.is_live().await;
    let clients = Clients::start(&host).await;
    supervisor.hang_up();
    let second = supervisor.reloaded(1).await;
    host.one_is_left().await;
    // The serving Envoy would abort if it tried to terminate a parent that is already gone.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let status = supervisor.is_live().await;
    assert_eq!((&status["pid"], &status["restarts"]), (&second["pid"], &0.into()), "{status}");
    clients.lost_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_whose_binary_is_gone_or_useless_is_started_again_from_what_it_was_started_from() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    std::fs::remove_file(host.binary()).unwrap();
    kill_process(pid(&first), Signal::KILL).unwrap();
    let again = |status: &Value| status["state"] == "live" && status["restarts"] == 1;
    let second = supervisor.wait_for_status("the same Envoy again", again).await;

    // Install a binary that runs but does not become live.
    let real = envoy::find().unwrap();
    host.install_script(&format!(
        "case \"$*\" in *--config-path*) exit 7;; *--hot-restart-version*) echo disabled;; *) exec {} \"$@\";; esac",
        real.display()
    ));
    kill_process(pid(&second), Signal::KILL).unwrap();
    let again = |status: &Value| status["state"] == "live" && status["restarts"].as_u64() > Some(1);
    supervisor.wait_for_status("the same Envoy once more", again).await;
    let clients = Clients::start(&host).await;
    host.install(envoy::VERSION);
    supervisor.hang_up();
    let status = supervisor.reloaded(1).await;
    // The version of the running binary is on record, so the reload uses hot restart and not the versions of the replaced script.
    assert_eq!(status["epoch"], 1, "{status}");
    clients.are_served().await;
    clients.lost_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_is_live_and_dies_again_and_again_makes_room_for_the_one_before_it() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    supervisor.is_live().await;
    let real = envoy::find().unwrap();
    let real = real.display();
    host.install_script(&format!(
        "case \"$*\" in *--restart-epoch*) (sleep 3; kill -9 $$) & ;; esac\nexec {real} \"$@\""
    ));
    supervisor.hang_up();
    supervisor.reloaded(1).await;
    let back = |status: &Value| {
        status["state"] == "live" && runs(pid(status)).starts_with(&*host.binary().to_string_lossy())
    };
    let status = supervisor.wait_for_status("the Envoy from before", back).await;
    let clients = Clients::start(&host).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(supervisor.is_live().await["pid"], status["pid"]);
    clients.lost_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_cannot_be_asked_any_more_gets_a_successor_although_nobody_asks_for_one() {
    let host = Host::new();
    let (control_plane, app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let clients = Clients::start(&host).await;
    supervisor.hang_up();
    let candidate = candidate(&host, &first).await;
    kill_process(candidate, Signal::STOP).unwrap();
    control_plane.crash().await;
    _ = std::fs::remove_file(host.place.run_dir().join("xds.sock"));
    kill_process(candidate, Signal::CONT).unwrap();
    // By now the candidate has made the old Envoy close its admin interface, and cannot receive any configuration.
    host.says(&host.dir().join("admin.2.sock"), "INITIALIZING").await;
    kill_process(candidate, Signal::KILL).unwrap();
    let is_blind = |status: &Value| {
        status["reason"].as_str().is_some_and(|reason| reason.contains("its admin interface is closed"))
    };
    supervisor.wait_for_status("that it cannot be asked", is_blind).await;
    clients.are_served().await;
    let control_plane = TestControlPlane::on_socket(host.place.run_dir().join("xds.sock")).await;
    control_plane.publish(resources(&host, app.address()));
    let sees = |status: &Value| {
        status["state"] == "live" && status["reason"].is_null() && status["reload"].is_null()
    };
    let status = supervisor.wait_for_status("an Envoy that can be asked", sees).await;
    assert_ne!(status["pid"], first["pid"]);
    host.envoy().wait_live(SOON).await.unwrap();
    clients.are_served().await;
    clients.lost_nothing().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_whose_shared_memory_is_gone_is_asked_as_before_and_lets_the_next_take_over_beside_it() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let clients = Clients::start_persistent(&host).await;
    std::fs::remove_file(host.shared_memory(&first)).unwrap();
    supervisor.hang_up();
    let status = supervisor.failed("it ended before it was live").await;
    assert_eq!((&status["pid"], &status["reason"]), (&first["pid"], &Value::Null), "{status}");
    host.envoy().wait_live(SOON).await.unwrap();
    supervisor.hang_up();
    supervisor.reloaded(1).await;
    // The admin interface of the old Envoy is open, so it drains on request.
    host.one_is_left().await;
    assert!(clients.failures() <= 1, "{}", clients.kept.so_far());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_is_slow_to_answer_is_not_taken_for_one_without_clients() {
    let mut host = Host::new();
    host.settings = "drain: 20s".to_owned();
    let (_control_plane, app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    app.behave(Behaviour::Slow(Duration::from_secs(12)));
    let mut plan = Plan::to(host.place.upstream()).closed_loop().connections(2);
    plan.timeout = SOON;
    let load = Load::start(plan).unwrap();
    wait_for("requests under way", SOON, async || (app.requests() >= 2).then_some(())).await.unwrap();
    let stop = async {
        kill_process(pid(&first), Signal::STOP).unwrap();
        supervisor.daemon.signal(Signal::TERM).unwrap();
        tokio::time::sleep(Duration::from_secs(9)).await;
        kill_process(pid(&first), Signal::CONT).unwrap();
        supervisor.daemon.wait_exit(SOON).await.unwrap()
    };
    let (report, status) = tokio::join!(load.stop(), stop);
    assert!(status.success());
    assert_eq!((report.ok, report.failures), (2, 0), "{report}");
    assert!(host.envoys().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_is_slow_while_its_supervisor_is_replaced_is_not_killed_for_that() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    supervisor.daemon.kill().unwrap();
    kill_process(pid(&first), Signal::STOP).unwrap();
    let mut supervisor = host.supervise_as_it_is();
    tokio::time::sleep(Duration::from_secs(8)).await;
    kill_process(pid(&first), Signal::CONT).unwrap();
    let status = supervisor.is_live().await;
    assert_eq!((&status["pid"], &status["restarts"]), (&first["pid"], &0.into()), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_that_dies_while_there_is_no_supervisor_does_not_take_its_child_along() {
    let mut host = Host::new();
    host.settings += ", hot_restart: {parent_shutdown: 20s}";
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    supervisor.hang_up();
    let second = supervisor.reloaded(1).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let clients = Clients::start_persistent(&host).await;
    supervisor.daemon.kill().unwrap();
    kill_process(pid(&first), Signal::KILL).unwrap();
    let mut supervisor = host.supervise_as_it_is();
    let third = supervisor.reloaded(1).await;
    assert_eq!((&third["epoch"], &third["restarts"]), (&0.into(), &0.into()), "{third}");
    assert_ne!(third["pid"], second["pid"]);
    clients.are_served().await;
    assert!(clients.failures() <= 1, "{}", clients.kept.so_far());
}

#[tokio::test(flavor = "multi_thread")]
async fn attempts_to_start_an_envoy_that_is_not_there_leave_no_files() {
    let host = Host::new();
    host.write_bootstrap();
    std::fs::remove_file(host.binary()).unwrap();
    let mut supervisor = host.supervise_as_it_is();
    let enough = async || {
        let record: Value = serde_json::from_slice(&std::fs::read(host.record()).unwrap_or_default()).ok()?;
        (record["last_number"].as_u64() >= Some(4)).then_some(())
    };
    wait_for("four attempts", SOON, enough).await.unwrap();
    assert!(host.files("bootstrap.").len() <= 2, "{:?}", host.files("bootstrap."));
    assert!(supervisor.daemon.terminate(SOON).await.unwrap().success());
    assert!(host.files("bootstrap.").is_empty(), "{:?}", host.files("bootstrap."));
}

#[tokio::test(flavor = "multi_thread")]
async fn envoys_that_are_on_no_record_are_found_and_take_their_leave() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let clients = Clients::start_persistent(&host).await;
    supervisor.daemon.kill().unwrap();
    std::fs::remove_file(host.record()).unwrap();
    let mut supervisor = host.supervise_as_it_is();
    let second = supervisor.is_live().await;
    host.one_is_left().await;
    assert_ne!(first["pid"], second["pid"]);
    clients.are_served().await;
    assert!(clients.failures() <= 1, "{}", clients.kept.so_far());

    // As after a stop that took too long: the admin socket is removed as well.
    supervisor.daemon.kill().unwrap();
    std::fs::remove_dir_all(host.dir()).unwrap();
    let mut supervisor = host.supervise_as_it_is();
    let third = supervisor.is_live().await;
    host.one_is_left().await;
    assert_ne!(third["pid"], second["pid"]);
    clients.are_served().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_asks_half_a_question_does_not_hold_up_the_end_and_whoever_asks_meanwhile_is_answered() {
    let mut host = Host::new();
    host.settings = "drain: 3s".to_owned();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    supervisor.is_live().await;
    let _stream = EchoStream::open(&host).await;
    let mut half = tokio::net::UnixStream::connect(host.dir().join("status.sock")).await.unwrap();
    half.write_all(b"GET /sta").await.unwrap();
    supervisor.daemon.signal(Signal::TERM).unwrap();
    supervisor.wait_for_status("that it drains", |status| status["state"] == "draining").await;
    assert!(supervisor.daemon.wait_exit(Duration::from_secs(15)).await.unwrap().success());
    assert!(host.envoys().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_supervisor_killed_just_after_it_started_a_successor_leaves_nothing_that_keeps_the_next_from_it() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    supervisor.daemon.kill().unwrap();
    // Simulates a crash between the candidate setting the flag in the shared memory and its first message to the serving Envoy.
    let mut record: Value = serde_json::from_slice(&std::fs::read(host.record()).unwrap()).unwrap();
    record["envoys"][0]["admin_closed"] = true.into();
    std::fs::write(host.record(), record.to_string()).unwrap();
    let memory = host.shared_memory(&first);
    let mut bytes = std::fs::read(&memory).unwrap();
    bytes[96] |= 1;
    {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::options().write(true).open(&memory).unwrap();
        file.write_all_at(&bytes[96..97], 96).unwrap();
    }
    let mut supervisor = host.supervise_as_it_is();
    supervisor.is_live().await;
    supervisor.hang_up();
    let done = |status: &Value| {
        (status["reloads"] == 1 && status["state"] == "live") || status["last_failure"].is_object()
    };
    let status = supervisor.wait_for_status("an end of the reload", done).await;
    assert_eq!(status["last_failure"], Value::Null, "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_leaves_does_not_stay_for_longer_because_the_clock_was_set_back() {
    let mut host = Host::new();
    host.settings += ", hot_restart: {parent_shutdown: 60s}";
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    supervisor.is_live().await;
    supervisor.hang_up();
    supervisor.reloaded(1).await;
    supervisor.daemon.kill().unwrap();
    let mut record: Value = serde_json::from_slice(&std::fs::read(host.record()).unwrap()).unwrap();
    let until = &mut record["envoys"][1]["until"]["secs_since_epoch"];
    *until = (until.as_u64().unwrap() + 3600).into();
    std::fs::write(host.record(), record.to_string()).unwrap();
    let mut supervisor = host.supervise_as_it_is();
    let status = supervisor.is_live().await;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    let until = status["leaving"][0]["until"].as_f64().unwrap();
    assert!(until < now + 120.0, "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn systemd_is_told_how_long_the_leave_may_take() {
    let mut host = Host::new();
    host.settings = "drain: 400s".to_owned();
    let (_control_plane, _app) = serving(&host).await;
    host.write_bootstrap();
    let socket = host.place.dir.join("notify.sock");
    let told = UnixDatagram::bind(&socket).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmesh-agent"));
    command.arg("envoy").arg("--config").arg(host.file()).env("NOTIFY_SOCKET", &socket);
    let daemon = Daemon::spawn("vmesh-agent envoy", command).unwrap();
    let mut supervisor = SupervisorProcess { daemon, socket: Peer::Unix(host.dir().join("status.sock")) };
    supervisor.is_live().await;
    assert!(supervisor.daemon.terminate(SOON).await.unwrap().success());
    told.set_nonblocking(true).unwrap();
    let mut said = String::new();
    let mut buffer = [0; 4096];
    while let Ok(length) = told.recv(&mut buffer) {
        said += &String::from_utf8_lossy(&buffer[..length]);
        said.push('\n');
    }
    let extended =
        said.lines().find_map(|line| line.strip_prefix("EXTEND_TIMEOUT_USEC=")?.parse::<u64>().ok());
    assert!(extended.is_some_and(|within| within > 400_000_000), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_takes_over_and_lacks_something_is_replaced_while_it_serves_the_rest() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    supervisor.is_live().await;
    let clients = Clients::start_persistent(&host).await;
    // This Envoy passes the trial, and only when started has another listener on the address of `echo`.
    let real = envoy::find().unwrap();
    let address = echo_through_envoy(&host);
    let thief = format!(
        r#""listeners":[{{"name":"thief","address":{{"socket_address":{{"address":"{}","port_value":{}}}}},"filter_chains":[{{"filters":[{{"name":"echo","typed_config":{{"@type":"type.googleapis.com/envoy.extensions.filters.network.echo.v3.Echo"}}}}]}}]}}],"#,
        address.ip(),
        address.port()
    );
    host.install_script(&format!(
        "case \"$*\" in *--restart-epoch*) sed -i 's|\"static_resources\":{{|&{thief}|' \"$2\";; esac\nexec {} \"$@\"",
        real.display()
    ));
    supervisor.hang_up();
    supervisor.failed("it is without `echo`").await;
    clients.are_served().await;
    host.envoy().wait_live(SOON).await.unwrap();
    EchoStream::open(&host).await.lives().await;
    assert!(clients.failures() <= 1, "{}", clients.kept.so_far());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_of_an_envoy_that_is_about_to_answer_waits_for_that() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let real = envoy::find().unwrap();
    host.install_script(&format!(
        "case \"$*\" in *'--restart-epoch 0'*) sleep 3;; esac\nexec {} \"$@\"",
        real.display()
    ));
    let mut supervisor = host.supervise();
    supervisor.wait_for_status("an Envoy that starts", |status| status["state"] == "starting").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    supervisor.hang_up();
    let status = supervisor.reloaded(1).await;
    assert_eq!((&status["restarts"], &status["epoch"]), (&0.into(), &1.into()), "{status}");

    // A serving Envoy that is busy for a moment.
    let clients = Clients::start_persistent(&host).await;
    kill_process(pid(&status), Signal::STOP).unwrap();
    supervisor.wait_for_status("a silent Envoy", |status| status["state"] == "silent").await;
    supervisor.hang_up();
    supervisor.wait_for_status("that it is asked for", |status| status["state"] == "silent").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    kill_process(pid(&status), Signal::CONT).unwrap();
    let after = supervisor.wait_for_status("an answer", |status| status["state"] == "live").await;
    assert_eq!((&after["restarts"], &after["pid"]), (&0.into(), &status["pid"]), "{after}");
    clients.are_served().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_right_after_a_reload_answers_what_both_envoys_have_accepted() {
    let mut host = Host::new();
    host.settings = "drain: 10s".to_owned();
    let (_control_plane, app) = serving(&host).await;
    let mut supervisor = host.supervise();
    supervisor.is_live().await;
    app.behave(Behaviour::Slow(Duration::from_secs(5)));
    let load = Load::start(Plan::to(host.place.upstream()).closed_loop().connections(2)).unwrap();
    wait_for("requests under way", SOON, async || (app.requests() >= 2).then_some(())).await.unwrap();
    supervisor.hang_up();
    supervisor.reloaded(1).await;
    let stop = async {
        supervisor.daemon.signal(Signal::TERM).unwrap();
        supervisor.wait_for_status("that it drains", |status| status["state"] == "draining").await;
        // A second SIGTERM does not shorten the drain.
        supervisor.daemon.terminate(SOON).await.unwrap()
    };
    let (report, status) = tokio::join!(load.stop(), stop);
    assert!(status.success());
    assert_eq!((report.ok, report.failures), (2, 0), "{report}");
    assert!(host.envoys().is_empty());
}

/// Returns the abstract Unix sockets of Envoys. Any user of this network namespace may bind such names first, or send to them.
fn abstract_sockets() -> String {
    let table = std::fs::read_to_string("/proc/net/unix").unwrap();
    table.lines().filter(|line| line.contains("@envoy")).collect::<Vec<_>>().join("\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_envoys_of_one_line_share_can_be_foreseen_and_reached_by_nobody_else() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut numbers = Vec::new();
    for _ in 0..2 {
        let mut supervisor = host.supervise();
        let status = supervisor.is_live().await;
        let number = status["base_id"].as_u64().unwrap();
        assert!(host.shared_memory(&status).exists());
        let taken = abstract_sockets();
        assert!(!taken.contains(&format!("_{}", number * 10)), "{taken}");
        // The new Envoy of a hot restart finds its parent by these sockets.
        supervisor.hang_up();
        let second = supervisor.reloaded(1).await;
        assert_eq!((&second["base_id"], &second["epoch"]), (&status["base_id"], &1.into()), "{second}");
        let sockets = host.files("hr_");
        assert!(!sockets.is_empty());
        for socket in sockets {
            let mode = std::fs::metadata(host.dir().join(&socket)).unwrap().mode();
            assert_eq!(mode & 0o777, 0o600, "{socket}");
        }
        assert!(supervisor.daemon.terminate(SOON).await.unwrap().success());
        assert_eq!(host.files("hr_"), Vec::<String>::new());
        assert!(!host.shared_memory(&status).exists());
        numbers.push(number);
        // A reinstalled host: the record and its counter are gone.
        std::fs::remove_file(host.record()).unwrap();
    }
    assert_ne!(numbers[0], numbers[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_memory_that_somebody_else_made_in_advance_keeps_no_envoy_from_starting() {
    if !rustix::process::geteuid().is_root() {
        // The test needs a second user, whose file blocks a name.
        panic!("this test starts the supervisor as another user: run it as root");
    }
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    host.write_bootstrap();
    for path in [host.place.dir.to_path_buf(), host.place.run_dir(), host.place.run_dir().join("xds.sock")] {
        std::os::unix::fs::chown(&path, Some(STRANGER), None).unwrap();
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmesh-agent"));
    std::os::unix::process::CommandExt::uid(&mut command, STRANGER);
    command.arg("envoy").arg("--config").arg(host.file());
    let daemon = Daemon::spawn("vmesh-agent envoy", command).unwrap();
    let mut supervisor = SupervisorProcess { daemon, socket: Peer::Unix(host.dir().join("status.sock")) };
    let mut taken = Vec::new();
    for _ in 0..3 {
        let status = supervisor.is_live().await;
        // Every number that an earlier version of vmesh would have used for the next Envoys of this directory.
        for line in 0..40 {
            let number = foreseen(&host.dir(), line);
            let path = PathBuf::from(format!("/dev/shm/envoy_shared_memory_{number}0"));
            if std::fs::File::create_new(&path).is_ok() {
                taken.push(path);
            }
        }
        kill_process(pid(&status), Signal::KILL).unwrap();
        let restarts = status["restarts"].as_u64().unwrap() + 1;
        supervisor
            .wait_for_status("another Envoy", |now| now["restarts"] == restarts && now["state"] == "live")
            .await;
    }
    for path in taken {
        std::fs::remove_file(path).unwrap();
    }
    assert!(supervisor.daemon.terminate(SOON).await.unwrap().success());
}

/// Neither root nor the user who creates the files.
const STRANGER: u32 = 65_534;

/// Returns the number of a line as vmesh 0.1 computed it before the field test: from the directory, the network namespace and a counter.
fn foreseen(dir: &Path, line: u64) -> u32 {
    let network = std::fs::metadata("/proc/self/ns/net").unwrap().ino();
    let hash = xxhash_rust::xxh3::xxh3_64(format!("{}\0{network}\0{line}", dir.display()).as_bytes());
    1000 + u32::try_from(hash % 400_000_000).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_with_few_file_descriptors_refuses_clients_before_it_runs_out_and_is_never_taken_for_one_that_hangs()
 {
    let mut host = Host::new();
    host.settings += ", hung_after: 4s";
    let (_control_plane, _app) = serving(&host).await;
    host.write_bootstrap();
    let mut command = Command::new("prlimit");
    command
        .args(["--nofile=256:256", env!("CARGO_BIN_EXE_vmesh-agent"), "envoy", "--config"])
        .arg(host.file());
    let daemon = Daemon::spawn("vmesh-agent envoy", command).unwrap();
    let mut supervisor = SupervisorProcess { daemon, socket: Peer::Unix(host.dir().join("status.sock")) };
    let first = supervisor.is_live().await;
    let mut served = Vec::new();
    let mut refused = 0;
    for _ in 0..140 {
        let mut stream = TcpStream::connect(echo_through_envoy(&host)).await.unwrap();
        if echoes(&mut stream).await { served.push(stream) } else { refused += 1 }
    }
    assert!(served.len() >= 80 && refused >= 40, "{} are served, {refused} are refused", served.len());
    // Waits for longer than `hung_after`.
    let until = Instant::now() + Duration::from_secs(8);
    while Instant::now() < until {
        let (_, said) = supervisor.get("/server_info").await;
        assert!(said.contains("\"LIVE\""), "{said}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let status = supervisor.is_live().await;
    assert_eq!((&status["pid"], &status["restarts"]), (&first["pid"], &0.into()), "{status}");
    for stream in &mut served {
        assert!(echoes(stream).await);
    }
}

/// Reports whether the connection echoes a word.
async fn echoes(stream: &mut TcpStream) -> bool {
    let mut word = [0; 4];
    stream.write_all(b"echo").await.is_ok() && stream.read_exact(&mut word).await.is_ok() && word == *b"echo"
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envoy_that_only_cannot_be_asked_is_not_ended() {
    let mut host = Host::new();
    host.settings += ", hung_after: 2s";
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let clients = Clients::start_persistent(&host).await;
    for socket in host.files("admin.") {
        std::fs::remove_file(host.dir().join(socket)).unwrap();
    }
    let spared = |status: &Value| {
        status["reason"].as_str().is_some_and(|reason| reason.contains("still accepts connections"))
    };
    let status = supervisor.wait_for_status("an Envoy that is spared", spared).await;
    assert_eq!(status["state"], "silent");
    // Without the exemption, `hung_after` would have expired twice by now.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let status = supervisor.wait_for_status("an Envoy that is spared", spared).await;
    assert_eq!((&status["pid"], &status["restarts"]), (&first["pid"], &0.into()), "{status}");
    clients.lost_nothing().await;
    // An Envoy that serves no connections either is killed.
    kill_process(pid(&first), Signal::STOP).unwrap();
    supervisor
        .wait_for_status("another Envoy", |status| status["restarts"] == 1 && status["state"] == "live")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn however_often_a_reload_is_asked_for_no_connection_is_cut() {
    let host = Host::new();
    let (_control_plane, _app) = serving(&host).await;
    let mut supervisor = host.supervise();
    let first = supervisor.is_live().await;
    let mut streams = vec![EchoStream::open(&host).await];
    let mut seen = std::collections::BTreeSet::from([first["pid"].to_string()]);
    for _ in 0..8 {
        supervisor.hang_up();
        // The reload has either completed or waits.
        let settled = |status: &Value| {
            let reload = status["reload"].as_str();
            status["state"] == "live" && reload.is_none_or(|reload| reload.starts_with("a reload waits"))
        };
        let status = supervisor.wait_for_status("the end of a reload, or one that waits", settled).await;
        if seen.insert(status["pid"].to_string()) {
            streams.push(EchoStream::open(&host).await);
        }
        assert!(status["leaving"].as_array().unwrap().len() <= 2, "{status}");
        for stream in &mut streams {
            stream.lives().await;
        }
    }
    assert!(seen.len() >= 2, "{seen:?}");
    // Without clients, the next reload stops the old Envoys, except the parent of the serving one, which terminates its parent after
    // `parent_shutdown`.
    drop(streams);
    supervisor.hang_up();
    let two = async || match host.envoys().len() {
        0..=2 => Ok(()),
        other => Err(format!("{other} run")),
    };
    wait_for("the others to have left", SOON, two).await.unwrap();
}
