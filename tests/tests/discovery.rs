//! The operator's commands for discovery, with the real daemons and file sources.

#![expect(clippy::expect_used, reason = "a test that cannot go on ends")]

use std::fs;
use std::net::SocketAddr;
use std::process::Output;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use vmesh_testkit::api::{Api, field};
use vmesh_testkit::app::HttpApp;
use vmesh_testkit::load::{Load, Plan};
use vmesh_testkit::place::Loopback;

use vmesh_testkit::{Result, wait_for};
use vmesh_tests::{BOUND, Mesh};

/// A source whose held removals last until an operator decides.
const PATIENT: &str =
    "  - file: {path: services.d, name: files, guard: {confirm_empty: 1h, confirm_shrink: 1h}}\n";

async fn mesh(discovery: &str, files: &[(&str, &str)]) -> Result<Mesh> {
    let mut mesh = Mesh::prepare_on(discovery, "", files)?;
    mesh.start_control().await?;
    Ok(mesh)
}

fn orders(addresses: &[String]) -> String {
    format!("service: orders\nprotocol: http\nendpoints: {addresses:?}\n")
}

/// Runs `vmeshctl` on the Unix socket, where changes are allowed.
fn say(mesh: &Mesh, words: &[&str]) -> Result<Output> {
    let socket = format!("unix:{}", mesh.path("state/control/api.sock").display());
    mesh.ctl(&[&["--api", &socket, "discovery"], words].concat())
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until `vmeshctl discovery` prints all of `parts`. Returns its output and its exit code.
async fn until_shown(mesh: &Mesh, parts: &[&str]) -> Result<(String, Option<i32>)> {
    wait_for(format!("`vmeshctl discovery` to say {parts:?}"), BOUND, async || {
        let output = mesh.ctl(&["discovery"]).map_err(|failed| failed.to_string())?;
        let text = out(&output);
        match parts.iter().all(|part| text.contains(part)) {
            true => Ok((text, output.status.code())),
            false => Err(text),
        }
    })
    .await
}

/// Runs the command that is printed after `label`, split into words.
fn run_printed(mesh: &Mesh, text: &str, label: &str) -> Result<Output> {
    let command =
        text.lines().find_map(|line| line.trim().strip_prefix(label)).expect("a command is printed");
    let words: Vec<_> = command.split_whitespace().collect();
    let (program, words) = words.split_first().expect("a command has words");
    assert_eq!(*program, "vmeshctl", "{command}");
    mesh.ctl(words)
}

async fn happened(mesh: &Mesh) -> Result<Vec<String>> {
    let events = mesh.get("/api/v1/discovery/events").await?;
    let events = events.get("events").and_then(Value::as_array).cloned().unwrap_or_default();
    Ok(events.iter().map(|event| format!("{} {}", field(event, "what"), field(event, "service"))).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_is_released_by_the_very_command_that_is_printed_with_the_reason() -> Result<()> {
    let files = [
        ("services.d/orders.yaml", "service: orders\nendpoints: [\"10.0.0.1:80\", \"10.0.0.2:80\"]\n"),
        ("services.d/web.yaml", "service: web\nendpoints: [\"10.0.0.3:80\"]\n"),
    ];
    let mesh = mesh(PATIENT, &files).await?;
    let (_, code) = until_shown(&mesh, &["files   fresh"]).await?;
    assert_eq!(code, Some(0));
    mesh.remove("services.d/orders.yaml")?;
    let (text, code) = until_shown(&mesh, &["orders of files has been HELD (absent)"]).await?;
    assert_eq!(code, Some(3), "{text}");
    assert!(text.contains("`files` no longer lists this service, which had 2 endpoints"), "{text}");
    assert!(text.contains("2 more readings have to say the same"), "{text}");
    // Nothing was removed, and the other commands show the held removal as well.
    assert_eq!(mesh.endpoints("orders").await?, ["10.0.0.1:80", "10.0.0.2:80"]);
    let services = mesh.ctl(&["services"])?;
    assert_eq!(services.status.code(), Some(3));
    assert!(
        out(&services).contains("HELD") && out(&services).contains("no longer lists this service"),
        "{services:?}"
    );
    assert_eq!(mesh.metric("vmesh_discovery_held{source=\"files\"}").await?, 1.0);
    assert_eq!(mesh.metric("vmesh_discovery_held_removals{source=\"files\"}").await?, 2.0);
    assert_eq!(mesh.metric("vmesh_discovery_holds_total{source=\"files\",reason=\"absent\"}").await?, 1.0);
    assert_eq!(mesh.metric("vmesh_discovery_source_state{source=\"files\",state=\"held\"}").await?, 1.0);

    let accepted = run_printed(&mesh, &text, "to believe it now: ")?;
    assert!(accepted.status.success(), "{accepted:?}");
    assert_eq!(out(&accepted), "accepted what `files` lists now for `orders`\n");
    mesh.until_endpoints("orders", &[]).await?;
    let (text, code) = until_shown(&mesh, &["files   fresh"]).await?;
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(happened(&mesh).await?, ["held orders", "accepted orders"]);
    let events = mesh.ctl(&["discovery", "events"])?;
    assert!(events.status.success() && out(&events).contains("held (absent)"), "{events:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_gone_for_long_enough_and_is_read_again_is_believed() -> Result<()> {
    let discovery = "  - file: {path: services.d, name: files, guard: {confirm_empty: 2s}}\n";
    let files = [
        ("services.d/orders.yaml", "service: orders\nendpoints: [\"10.0.0.1:80\"]\n"),
        ("services.d/web.yaml", "service: web\nendpoints: [\"10.0.0.3:80\"]\n"),
    ];
    let mesh = mesh(discovery, &files).await?;
    mesh.remove("services.d/orders.yaml")?;
    until_shown(&mesh, &["orders of files has been HELD (absent)"]).await?;
    mesh.until_endpoints("orders", &[]).await?;
    let expected = ["held orders", "confirmed orders", "confirmed orders", "believed orders"];
    assert_eq!(happened(&mesh).await?, expected);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_loses_half_of_all_at_once_takes_nothing_away_until_that_is_accepted() -> Result<()> {
    let mut files = Vec::new();
    for service in 0..10 {
        let text = format!(
            "service: s{service}\nendpoints: [\"10.0.{service}.1:80\", \"10.0.{service}.2:80\", \"10.0.{service}.3:80\"]\n"
        );
        files.push((format!("services.d/s{service}.yaml"), text));
    }
    let files: Vec<_> = files.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
    // A failing generator removes many services at once. Each alone would be removed after five seconds.
    let discovery = "  - file: {path: services.d, name: files, guard: {confirm_empty: 5s}}\n";
    let mut mesh = mesh(discovery, &files).await?;
    for service in 0..5 {
        mesh.remove(&format!("services.d/s{service}.yaml"))?;
    }
    let shown = ["all that is gone of files has been HELD (fleet)", "15 of the 30 endpoints", "s0 of files"];
    let (text, code) = until_shown(&mesh, &shown).await?;
    assert_eq!(code, Some(3), "{text}");
    // The removal stays held for longer than that of a single service, and over a restart.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(mesh.endpoints("s0").await?.len(), 3);
    mesh.control()?.kill()?;
    mesh.start_control().await?;
    let (text, _) = until_shown(&mesh, &shown).await?;
    assert_eq!(mesh.endpoints("s4").await?.len(), 3);
    let accepted = run_printed(&mesh, &text, "to believe it now: ")?;
    assert!(accepted.status.success(), "{accepted:?}");
    for service in 0..5 {
        mesh.until_endpoints(&format!("s{service}"), &[]).await?;
    }
    assert_eq!(mesh.endpoints("s5").await?.len(), 3);
    let (text, code) = until_shown(&mesh, &["files   fresh"]).await?;
    assert_eq!(code, Some(0), "{text}");
    Ok(())
}

/// Waits until `app` has had no request for a second.
async fn until_left_alone(app: &HttpApp) -> Result<()> {
    let mut last = (u64::MAX, Instant::now());
    wait_for("no more requests", BOUND, async || {
        let now = app.requests();
        if now != last.0 {
            last = (now, Instant::now());
        }
        if last.1.elapsed() > Duration::from_secs(1) { Ok(()) } else { Err(format!("{now} so far")) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_evicted_endpoint_gets_no_request_and_none_fails_also_after_a_restart() -> Result<()> {
    let place = Loopback::unique()?;
    let start = |name| HttpApp::start(name, "v1", SocketAddr::new(place.ip(), place.port()?));
    let (a, b) = (start("a")?, start("b")?);
    let (at_a, at_b) = (a.address().to_string(), b.address().to_string());
    let text = orders(&[at_a.clone(), at_b.clone()]);
    let mut mesh = mesh(PATIENT, &[("services.d/orders.yaml", &text)]).await?;
    mesh.agent("web-1", &["orders"], "").await?;
    let target = mesh.upstream("web-1", 0)?;
    mesh.answers(target).await?;
    let load = Load::start(Plan::to(target).rate(300.0))?;
    let gets_traffic = async |name: &str| {
        let before = load.so_far().by_instance.get(name).copied().unwrap_or(0);
        wait_for(format!("traffic at {name}"), BOUND, async || {
            match load.so_far().by_instance.get(name).copied().unwrap_or(0) {
                now if now > before => Ok(()),
                now => Err(format!("{now}")),
            }
        })
        .await
    };
    gets_traffic("a").await?;

    let evicted = say(&mesh, &["evict", "orders", &at_a])?;
    assert!(evicted.status.success(), "{evicted:?}");
    mesh.until_endpoints("orders", &[&at_b]).await?;
    until_left_alone(&a).await?;
    let reported = a.requests();
    let (text, code) = until_shown(&mesh, &[&format!("{at_a} of orders is evicted")]).await?;
    assert_eq!(code, Some(3), "{text}");
    assert_eq!(mesh.metric("vmesh_discovery_evicted").await?, 1.0);

    mesh.control()?.kill()?;
    mesh.start_control().await?;
    mesh.synced("web-1").await?;
    mesh.until_endpoints("orders", &[&at_b]).await?;
    let again = say(&mesh, &["evict", "orders", &at_a])?;
    assert!(out(&again).contains("was evicted already"), "{again:?}");
    gets_traffic("b").await?;
    assert_eq!(a.requests(), reported, "an evicted endpoint had requests");

    let (text, _) = until_shown(&mesh, &["is evicted"]).await?;
    let admitted = run_printed(&mesh, &text, "to use it again: ")?;
    assert!(admitted.status.success(), "{admitted:?}");
    gets_traffic("a").await?;
    assert_eq!(mesh.ctl(&["discovery"])?.status.code(), Some(0));
    let report = load.stop().await;
    assert_eq!(report.failures, 0, "{:?}", report.failed.first());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_eviction_ends_when_no_source_has_named_the_endpoint_for_a_while() -> Result<()> {
    let text = orders(&["10.0.0.1:80".to_owned(), "10.0.0.2:80".to_owned()]);
    let mesh = mesh(PATIENT, &[("services.d/orders.yaml", &text)]).await?;
    assert!(say(&mesh, &["evict", "orders", "10.0.0.1:80"])?.status.success());
    mesh.until_endpoints("orders", &["10.0.0.2:80"]).await?;
    mesh.write("services.d/orders.yaml", &orders(&["10.0.0.2:80".to_owned()]))?;
    wait_for("the eviction to end", BOUND, async || {
        let discovery = mesh.get("/api/v1/discovery").await.map_err(|failed| failed.to_string())?;
        match discovery["evicted"].as_array() {
            Some(evicted) if evicted.is_empty() => Ok(()),
            _ => Err(discovery["evicted"].to_string()),
        }
    })
    .await?;
    mesh.write("services.d/orders.yaml", &text)?;
    mesh.until_endpoints("orders", &["10.0.0.1:80", "10.0.0.2:80"]).await?;
    assert_eq!(happened(&mesh).await?, ["evicted orders", "admitted orders"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_source_takes_no_change_also_after_a_restart_until_it_is_thawed() -> Result<()> {
    let before = orders(&["10.0.0.1:80".to_owned()]);
    let mut mesh = mesh(PATIENT, &[("services.d/orders.yaml", &before)]).await?;
    let frozen = say(&mesh, &["freeze"])?;
    assert_eq!(out(&frozen), "`files` is frozen: its changes are not applied\n", "{frozen:?}");
    let after = orders(&["10.0.0.1:80".to_owned(), "10.0.0.2:80".to_owned()]);
    mesh.write("services.d/orders.yaml", &after)?;
    mesh.write("services.d/web.yaml", "service: web\nendpoints: [\"10.0.0.3:80\"]\n")?;
    let differs = ["FROZEN", "it now reports changes of 1 services in use"];
    let (text, code) = until_shown(&mesh, &differs).await?;
    assert_eq!(code, Some(3), "{text}");
    assert_eq!(mesh.endpoints("orders").await?, ["10.0.0.1:80"]);
    assert_eq!(mesh.endpoints("web").await?, Vec::<String>::new());
    let refused = say(&mesh, &["accept", "files"])?;
    assert_eq!(refused.status.code(), Some(1));
    assert!(err(&refused).contains("`files` is frozen"), "{refused:?}");

    mesh.control()?.kill()?;
    mesh.start_control().await?;
    let (text, _) = until_shown(&mesh, &differs).await?;
    assert_eq!(mesh.endpoints("orders").await?, ["10.0.0.1:80"]);
    let thawed = run_printed(&mesh, &text, "to take its changes again: ")?;
    assert!(thawed.status.success(), "{thawed:?}");
    mesh.until_endpoints("orders", &["10.0.0.1:80", "10.0.0.2:80"]).await?;
    mesh.until_endpoints("web", &["10.0.0.3:80"]).await?;
    let (text, code) = until_shown(&mesh, &["files   fresh"]).await?;
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(happened(&mesh).await?, ["frozen ", "thawed "]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_done_says_why_and_what_was_meant() -> Result<()> {
    let mut mesh = mesh(PATIENT, &[("services.d/orders.yaml", &orders(&["10.0.0.1:80".to_owned()]))]).await?;
    let check = |mesh: &Mesh, words: &[&str], code: i32, part: &str| -> Result<()> {
        let output = say(mesh, words)?;
        let message = err(&output);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {message}");
        assert!(message.contains(part), "{words:?}: {message}");
        Ok(())
    };
    check(&mesh, &["accept", "file"], 4, "there is no discovery source `file`: did you mean `files`?")?;
    check(&mesh, &["freeze", "zookeeper"], 4, "there is no discovery source `zookeeper`: there is `files`")?;
    check(&mesh, &["accept", "files"], 4, "nothing of `files` is held")?;
    check(&mesh, &["accept", "files", "orders"], 4, "nothing of `orders` is held of `files`")?;
    check(&mesh, &["evict", "ordres", "10.0.0.1:80"], 4, "did you mean `orders`?")?;
    check(&mesh, &["evict", "orders", "10.0.0.9:80"], 4, "`vmeshctl services orders` lists its endpoints")?;
    check(&mesh, &["admit", "orders", "10.0.0.1:80"], 4, "is not evicted")?;
    check(&mesh, &["evict", "orders", "10.0.0.1"], 64, "invalid socket address")?;
    let over_tcp = mesh.ctl(&["discovery", "freeze"])?;
    assert_eq!(over_tcp.status.code(), Some(1));
    assert!(err(&over_tcp).contains("the API over TCP only reads"), "{over_tcp:?}");
    let json = mesh.ctl(&["discovery", "--json"])?;
    let json: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(json["sources"][0]["name"], "files");
    assert_eq!(json["sources"][0]["counters"]["failed_reads"], 0);

    // A damaged record is set aside, and only its own content is lost.
    assert!(say(&mesh, &["freeze"])?.status.success());
    mesh.control()?.kill()?;
    fs::write(mesh.path("state/control/overrides.json"), "garbage").expect("written");
    mesh.start_control().await?;
    until_shown(&mesh, &["files   fresh"]).await?;
    assert!(mesh.path("state/control/overrides.damaged").is_file());
    mesh.control()?.kill()?;
    let output = mesh.ctl(&["discovery"])?;
    assert_eq!(output.status.code(), Some(1));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_is_not_required_is_waited_for_half_a_minute() -> Result<()> {
    let discovery =
        "  - file: {path: services.d}\n  - file: {path: elsewhere, name: other, required: false}\n";
    let mesh =
        Mesh::prepare_on(discovery, "", &[("services.d/orders.yaml", &orders(&["10.0.0.1:80".to_owned()]))])?;
    let _control = mesh.spawn_control()?;
    let api = Api(mesh.api);
    let ready = async || api.text("/readyz").await.map(|_| ()).map_err(|failed| failed.to_string());
    let waiting = wait_for("a word on what it waits for", BOUND, async || match ready().await {
        Err(why) if why.contains("other") => Ok(why),
        other => Err(format!("{other:?}")),
    })
    .await?;
    assert!(waiting.contains("503"), "{waiting}");
    wait_for("it to be ready", BOUND * 3, ready).await?;
    mesh.problem("`other` has not answered within 30 s of the start, and is not `required`").await?;
    assert_eq!(mesh.endpoints("orders").await?, ["10.0.0.1:80"]);
    // The source is used once it appears.
    fs::create_dir(mesh.path("elsewhere")).expect("made");
    mesh.write("elsewhere/web.yaml", "service: web\nendpoints: [\"10.0.0.3:80\"]\n")?;
    wait_for("web", BOUND * 2, async || {
        let now = mesh.endpoints("web").await.map_err(|failed| failed.to_string())?;
        if now == ["10.0.0.3:80"] { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sighup_has_what_nobody_told_of_read_at_once() -> Result<()> {
    let file = |last: u8| format!("service: orders\nendpoints: [\"10.0.0.{last}:80\"]\n");
    let sources = "  - file: {path: services.d, watch: false, poll: 1h}\n";
    let mut mesh = Mesh::prepare_on(sources, "", &[("services.d/orders.yaml", &file(1))])?;
    mesh.start_control().await?;
    mesh.until_endpoints("orders", &["10.0.0.1:80"]).await?;
    mesh.write("services.d/orders.yaml", &file(2))?;
    mesh.control()?.signal(Signal::HUP)?;
    mesh.until_endpoints("orders", &["10.0.0.2:80"]).await?;
    Ok(())
}
