use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;

use vmesh_testkit::{TempDir, tempdir, wait_for};

use super::*;
use crate::source::chain;

const SOON: Duration = Duration::from_secs(20);

/// A plug-in as a shell script that runs in the directory `dir`.
fn plugin(dir: &Path, script: &str) -> PluginConfig {
    let path = dir.join("plugin.sh");
    fs::write(&path, format!("#!/bin/sh\ncd {}\n{script}\n", dir.display())).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let yaml = format!("{{command: [{:?}], silence: 1s}}", path.display().to_string());
    vmesh_model::load::strict("control.yaml", &yaml).unwrap()
}

fn source(config: PluginConfig) -> (PluginSource, Arc<Counters>) {
    let counters = Arc::new(Counters::default());
    (PluginSource::new(config, None, counters.clone()), counters)
}

fn show(view: &Registrations) -> String {
    let services = view.services.iter().map(|(name, observed)| {
        let addresses: Vec<_> =
            observed.registration.endpoints.iter().map(|e| e.address.to_string()).collect();
        format!("{name} {} {addresses:?}", observed.state)
    });
    services.collect::<Vec<_>>().join("; ")
}

async fn next_outcome(source: &mut PluginSource) -> String {
    match tokio::time::timeout(SOON, source.next()).await.unwrap() {
        Ok(view) => show(&view),
        Err(error) => chain(&error),
    }
}

fn place() -> TempDir {
    tempdir().unwrap()
}

#[tokio::test]
async fn a_program_is_told_who_asks_and_its_views_are_taken() {
    let dir = place();
    let script = r#"read hello; echo "$hello" > hello; echo "to the log" >&2
        echo '{"type":"view","services":[{"service":"orders","endpoints":["10.0.0.1:80"]},{"service":"pay","endpoints":["10.0.0.9:80"]}]}'
        echo '{"type":"view","services":[{"service":"orders","endpoints":["10.0.0.1:80","10.0.0.2:80"]},{"service":"pay","endpoints":["10.0.0.9:80"]}]}'
        cat > rest"#;
    let (mut source, counters) = source(plugin(&dir, script));
    let first = source.next().await.unwrap();
    assert_eq!(show(&first), r#"orders fresh ["10.0.0.1:80"]; pay fresh ["10.0.0.9:80"]"#);
    let second = source.next().await.unwrap();
    assert_eq!(show(&second), r#"orders fresh ["10.0.0.1:80", "10.0.0.2:80"]; pay fresh ["10.0.0.9:80"]"#);
    assert!(Arc::ptr_eq(&first.services["pay"].registration, &second.services["pay"].registration));
    let hello = fs::read_to_string(dir.join("hello")).unwrap();
    assert_eq!(hello, "{\"type\":\"hello\",\"protocol\":1,\"source\":\"plugin:plugin.sh\"}\n");
    assert_eq!(counters.reads.load(Relaxed), 2);
}

#[tokio::test]
async fn a_program_that_fails_ends_or_is_silent_is_a_failure_and_is_started_again() {
    let dir = place();
    let script = r#"read hello; echo run >> runs
        case $(wc -l < runs) in
        1) echo '{"type":"view","services":[{"service":"a","endpoints":["10.0.0.1:80"]}]}'; echo '{"type":"failed","message":"503"}'; exit 3;;
        2) echo 'Traceback (most recent call last):'; sleep 60;;
        *) echo '{"type":"view","services":[{"service":"a","endpoints":["10.0.0.1:80"]}]}'; cat > rest;;
        esac"#;
    let (mut source, counters) = source(plugin(&dir, script));
    assert_eq!(next_outcome(&mut source).await, r#"a fresh ["10.0.0.1:80"]"#);
    assert_eq!(
        next_outcome(&mut source).await,
        "discovery source `plugin:plugin.sh` could not read its registry: 503"
    );
    let ended = next_outcome(&mut source).await;
    assert!(
        ended.contains("could not wait for its program `/") && ended.contains("it is started again"),
        "{ended}"
    );
    let nonsense = next_outcome(&mut source).await;
    assert!(
        nonsense.ends_with(
            "could not read the output of its program: `Traceback (most recent call last):` is not a JSON object: \
             logs belong on standard error"
        ),
        "{nonsense}"
    );
    let silent = next_outcome(&mut source).await;
    assert!(silent.contains("it printed no line for 1 s and was killed"), "{silent}");
    // The view equals the first one and is returned nevertheless, because the source answers again.
    assert_eq!(next_outcome(&mut source).await, r#"a fresh ["10.0.0.1:80"]"#);
    assert_eq!(counters.connects.load(Relaxed), 3);
}

#[tokio::test]
async fn a_program_is_asked_to_confirm_and_answers_with_a_view() {
    let dir = place();
    let script = r#"read hello
        echo '{"type":"view","services":[{"service":"a","endpoints":["10.0.0.1:80"]}]}'
        read asked; echo "$asked" > asked
        echo '{"type":"view","services":[{"service":"b","endpoints":[]}]}'
        echo '{"type":"view","confirms":1,"services":[]}'; cat > rest"#;
    let (mut source, _) = source(plugin(&dir, script));
    assert_eq!(next_outcome(&mut source).await, r#"a fresh ["10.0.0.1:80"]"#);
    let services = BTreeSet::from(["a".parse().unwrap()]);
    let confirmed = tokio::time::timeout(SOON, source.confirm(&services)).await.unwrap().unwrap();
    assert_eq!(show(&confirmed), "");
    let asked = fs::read_to_string(dir.join("asked")).unwrap();
    assert_eq!(asked, "{\"type\":\"confirm\",\"id\":1,\"services\":[\"a\"]}\n");
}

#[tokio::test]
async fn what_cannot_be_read_of_a_service_leaves_it_as_it_was() {
    let dir = place();
    let script = r#"read hello
        echo '{"type":"view","services":[{"service":"a","endpoints":["10.0.0.1:80"]},{"service":"b","endpoints":["10.0.0.2:80"]}]}'
        echo '{"type":"view","services":[{"service":"a","endpoints":["10.0.0.1"]},{"service":"b","endpoints":["10.0.0.2:80","10.0.0.3:80","10.0.0.4:80","10.0.0.5:80","10.0.0.6:80"]}]}'
        cat > rest"#;
    let (mut source, counters) = source(plugin(&dir, script));
    next_outcome(&mut source).await;
    let second = next_outcome(&mut source).await;
    assert!(second.starts_with(r#"a stale ["10.0.0.1:80"]; b fresh ["10.0.0.2:80", "#), "{second}");
    assert_eq!(counters.bad_records.load(Relaxed), 1);
}

#[tokio::test]
async fn a_line_without_end_a_program_that_is_not_there_and_bytes_are_failures() {
    let dir = place();
    let mut config = plugin(&dir, "read hello; printf '\\377\\376\\n'; yes | tr -d '\\n'");
    config.max_bytes = 100_000;
    let (mut source, _) = source(config);
    let bytes = next_outcome(&mut source).await;
    assert!(bytes.ends_with("it printed bytes that are not UTF-8"), "{bytes}");
    let dir = place();
    let mut config = plugin(&dir, "read hello; yes | tr -d '\\n'");
    config.max_bytes = 100_000;
    let (mut source, _) = self::source(config);
    let long = next_outcome(&mut source).await;
    assert!(long.ends_with("it printed a line of more than 100000 bytes (`max_bytes`)"), "{long}");
    let config = PluginConfig {
        command: ["/no/such/plugin", "--token=s3cret"].map(String::from).to_vec(),
        ..plugin(&dir, "")
    };
    let (mut source, _) = self::source(config);
    assert_eq!(
        next_outcome(&mut source).await,
        "discovery source `plugin:plugin` could not start its program `/no/such/plugin`: No such file or directory \
         (os error 2)"
    );
}

#[tokio::test]
async fn a_program_goes_when_its_source_does() {
    let dir = place();
    let (mut source, _) = source(plugin(
        &dir,
        "read hello; echo '{\"type\":\"view\",\"services\":[]}'; cat > rest; echo gone > gone; sleep 60",
    ));
    assert_eq!(next_outcome(&mut source).await, "");
    let path = dir.to_path_buf();
    assert!(!vmesh_testkit::process::naming(&path).is_empty());
    drop(source);
    wait_for("the program to be gone", SOON, async || {
        vmesh_testkit::process::naming(&path).is_empty().then_some(()).ok_or("it runs")
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn what_was_said_while_nobody_listened_is_no_silence() {
    let dir = place();
    let script = r#"read hello; for i in 1 2 3 4 5 6 7 8 9 10; do echo '{"type":"failed","message":"503"}'; done; cat > rest"#;
    let (mut source, _) = source(plugin(&dir, script));
    for _ in 0..10 {
        let failed = next_outcome(&mut source).await;
        assert!(failed.ends_with("could not read its registry: 503"), "{failed}");
        // Longer than `silence`.
        tokio::time::sleep(Duration::from_millis(1100)).await;
    }
}

#[tokio::test]
async fn a_program_that_does_not_read_is_not_told_without_end() {
    let dir = place();
    let alive = r#"{"type":"alive"}"#;
    let (mut source, _) = source(plugin(&dir, &format!("while sleep 0.1; do echo '{alive}'; done")));
    let services: BTreeSet<_> = (0..4000).map(|n| format!("service-{n:04}").parse().unwrap()).collect();
    let refused = async {
        loop {
            let asked = tokio::time::timeout(Duration::from_millis(20), source.confirm(&services)).await;
            if let Ok(Err(error)) = asked {
                return chain(&error);
            }
        }
    };
    let refused = tokio::time::timeout(SOON, refused).await.unwrap();
    assert!(refused.ends_with("registry again: it does not read its standard input"), "{refused}");
}

#[tokio::test]
async fn what_a_program_has_started_goes_with_it_also_what_left_its_group() {
    let dir = place();
    let child = dir.join("child.sh");
    fs::write(&child, "#!/bin/sh\nwhile :; do sleep 1; done\n").unwrap();
    let script = format!(
        "read hello; sh {0} & setsid sh {0} & setsid -f sh {0} </dev/null >/dev/null 2>&1\n\
         echo '{{\"type\":\"view\",\"services\":[]}}'; sleep 1; exit 3",
        child.display()
    );
    let mut config = plugin(&dir, &script);
    config.silence = Duration::from_secs(30);
    let (mut source, _) = source(config);
    assert_eq!(next_outcome(&mut source).await, "");
    let path = dir.to_path_buf();
    wait_for("the program and its children to run", SOON, async || {
        let running = vmesh_testkit::process::naming(&path).len();
        if running >= 4 { Ok(()) } else { Err(running.to_string()) }
    })
    .await
    .unwrap();
    drop(source);
    wait_for("all of them to be gone", SOON, async || {
        let left = vmesh_testkit::process::naming(&path);
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?} run")) }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn a_program_has_the_environment_that_is_written_down_and_never_the_way_to_systemd() {
    let dir = place();
    let (mut source, _) = source(plugin(
        &dir,
        "read hello; env -0 | tr '\\0' '\\n' | cut -d= -f1 | sort > env; echo '{\"type\":\"view\",\"services\":[]}'; cat > rest",
    ));
    assert_eq!(next_outcome(&mut source).await, "");
    let names = fs::read_to_string(dir.join("env")).unwrap();
    // Variables that the shell itself sets do not count.
    let of_the_shell = ["PWD", "OLDPWD", "SHLVL", "_", "VMESH_PLUGIN_RUN"];
    for name in names.lines().filter(|name| !of_the_shell.contains(name)) {
        assert!(run::ENVIRONMENT.contains(&name), "`{name}` was passed on");
    }
    // Cargo sets this variable for every test, as systemd sets `NOTIFY_SOCKET` for a service.
    assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some() && !names.contains("CARGO"), "{names}");
    for name in run::NEVER_PASSED {
        let yaml = format!("{{command: [/bin/true], pass_env: [{name}]}}");
        let refused = vmesh_model::load::strict::<PluginConfig>("control.yaml", &yaml).unwrap_err();
        assert!(refused[0].message.contains("protocol with systemd"), "{}", refused[0]);
    }
    let dir = place();
    let mut config = plugin(
        &dir,
        "read hello; echo \"$CARGO_MANIFEST_DIR\" > env; echo '{\"type\":\"view\",\"services\":[]}'",
    );
    config.pass_env = vec!["CARGO_MANIFEST_DIR".to_owned()];
    let (mut source, _) = self::source(config);
    assert_eq!(next_outcome(&mut source).await, "");
    let passed = fs::read_to_string(dir.join("env")).unwrap();
    assert_eq!(passed.trim_end(), std::env::var("CARGO_MANIFEST_DIR").unwrap());
}

#[tokio::test]
async fn a_program_that_fills_its_standard_error_is_heard_all_the_same() {
    let dir = place();
    let view =
        "echo '{\"type\":\"view\",\"services\":[{\"service\":\"a\",\"endpoints\":[\"10.0.0.1:80\"]}]}'";
    let script =
        format!("read hello; head -c 50000000 /dev/zero >&2; yes | head -c 5000000 >&2; {view}; cat > rest");
    let mut config = plugin(&dir, &script);
    config.silence = Duration::from_secs(60);
    let (mut source, _) = source(config);
    let outcome = tokio::time::timeout(Duration::from_secs(60), source.next()).await.unwrap().unwrap();
    assert_eq!(show(&outcome), r#"a fresh ["10.0.0.1:80"]"#);
}
