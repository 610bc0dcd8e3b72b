use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use expect_test::{Expect, expect};
use proptest::prelude::*;
use rustix::fs::{FileType, Mode};
use tokio::sync::watch as channel;
use vmesh_testkit::TempDir;

use super::watch::ScanRequest;
use vmesh_model::{Endpoint, ServiceName};

use super::*;
use crate::ServiceView;
use crate::assemble::ServiceContent;
use crate::format::Format;
use crate::source::link;
use crate::{Guard, GuardConfig, View, follow};

/// Longer than any step of these tests takes on any machine.
const BOUND: Duration = Duration::from_secs(20);

/// A file source over a directory of its own, with the task that follows it.
struct LiveSource {
    dir: TempDir,
    views: channel::Receiver<View>,
    _task: tokio::task::JoinSet<()>,
}

/// Resolves the names in the map, and never answers for `slow`.
#[derive(Clone, Default)]
struct TestDns(Arc<Mutex<BTreeMap<String, IpAddr>>>);

impl TestDns {
    fn set(&self, host: &str, ip: &str) {
        self.0.lock().unwrap().insert(host.to_owned(), ip.parse().unwrap());
    }
}

impl Resolve for TestDns {
    fn resolve(&self, host: &str) -> io::Result<Vec<IpAddr>> {
        let deadline = std::time::Instant::now() + BOUND;
        loop {
            match self.0.lock().unwrap().get(host) {
                Some(ip) => return Ok(vec![*ip]),
                None if host == "slow" && std::time::Instant::now() < deadline => {}
                None => return Err(io::Error::other("no such host")),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn write(dir: &Path, files: &[(&str, &str)]) {
    for (path, text) in files {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

/// Replaces a file by writing a temporary file and renaming it.
fn replace(dir: &Path, path: &str, text: &str) {
    fs::write(dir.join(".tmp"), text).unwrap();
    fs::rename(dir.join(".tmp"), dir.join(path)).unwrap();
}

fn config(path: &Path) -> FileConfig {
    // The poll interval is long, so changes are seen only through events of the kernel.
    FileConfig { poll: Duration::from_secs(600), ..FileConfig::of(path) }
}

impl LiveSource {
    fn of(dir: TempDir, config: FileConfig, last_good: Option<Registrations>, dns: TestDns) -> LiveSource {
        let guard =
            GuardConfig { confirm_empty: Duration::from_secs(300), ..config.guard.clone() }.for_files();
        let last_good = last_good.map(Arc::new);
        let (guard, view) = match &last_good {
            Some(last_good) => (Guard::restored("file", guard, last_good), View::restored(last_good.clone())),
            None => (Guard::new("file", guard), View::default()),
        };
        let (handle, link) = link("file".into(), view);
        let counters = handle.counters.clone();
        let source = FileSource::with_resolver(config, last_good.as_deref(), counters, dns);
        let mut task = tokio::task::JoinSet::new();
        task.spawn(follow(source, guard, link));
        LiveSource { dir, views: handle.views, _task: task }
    }

    fn start(files: &[(&str, &str)]) -> LiveSource {
        let dir = vmesh_testkit::tempdir().unwrap();
        write(&dir, files);
        let config = config(&dir);
        LiveSource::of(dir, config, None, TestDns::default())
    }

    fn show(&self, view: &View) -> String {
        show(view, &self.dir)
    }

    /// Waits until the view is `expected`.
    async fn until(&mut self, expected: &str) {
        let changed = async {
            while show(&self.views.borrow_and_update(), &self.dir).trim() != expected.trim() {
                self.views.changed().await.unwrap();
            }
        };
        if tokio::time::timeout(BOUND, changed).await.is_err() {
            panic!("expected\n{expected}\nfound\n{}", self.show(&self.views.borrow()));
        }
    }

    /// Waits until a view satisfies `enough`, and returns all views up to that one.
    async fn views_until(&mut self, enough: impl Fn(&str) -> bool) -> Vec<String> {
        let mut all = Vec::new();
        let changed = async {
            loop {
                let shown = show(&self.views.borrow_and_update(), &self.dir);
                all.push(shown.clone());
                if enough(&shown) {
                    return;
                }
                self.views.changed().await.unwrap();
            }
        };
        let outcome = tokio::time::timeout(BOUND, changed).await;
        assert!(outcome.is_ok(), "not within {BOUND:?}: {all:#?}");
        all
    }

    /// Waits for the first view and compares it with `expected`.
    async fn first(&mut self, expected: Expect) {
        let shown = self.views_until(|shown| !shown.is_empty()).await;
        expected.assert_eq(shown.last().unwrap());
    }
}

fn show(view: &View, dir: &Path) -> String {
    let mut shown = String::new();
    for (name, seen) in view.services() {
        let endpoints = seen.registration.endpoints.iter();
        let endpoints: Vec<_> = endpoints.map(|e| format!(" {}", e.address)).collect();
        let because = seen.because.as_ref().map(|because| format!(" ({because})")).unwrap_or_default();
        shown += &format!("{name} {}{}{because}\n", seen.state, endpoints.concat());
    }
    for problem in view.last_good.iter().flat_map(|last_good| &last_good.problems) {
        shown += &format!("{problem}\n");
    }
    if let Some(because) = &view.stale_because {
        shown += &format!("STALE {because}\n");
    }
    shown.replace(&format!("{}/", dir.display()), "").replace(&dir.display().to_string(), "DIR")
}

const ORDERS: &str = "endpoints: [10.0.0.1:80, 10.0.0.2:80]\n";

#[tokio::test]
async fn a_directory_holds_files_of_all_formats() {
    let mut live = LiveSource::start(&[
        ("orders.yaml", ORDERS),
        ("targets.json", r#"[{"targets": ["10.1.0.1:80"], "labels": {"job": "web"}}]"#),
        ("pay", "10.2.0.1 8080\n10.2.0.2 8080 * 2\n"),
        ("users/v2", "127.1 80\n"),
        ("users/v3/canary.yml", "endpoints: ['10.3.0.1:80']\n"),
        ("nerve.json", r#"[{"host": "10.4.0.1", "port": 80}]"#),
        // Files that editors and tools leave behind.
        (".orders.yaml.swp", "x"),
        ("orders.yaml~", "x"),
        ("#orders.yaml#", "x"),
        ("4913", "x"),
        ("orders.yaml.rpmsave", "x"),
        ("orders.yaml.dpkg-old", "x"),
        ("orders.tmp", "x"),
        (".git/config", "x"),
        // Files that somebody may have meant to be read.
        ("README.md", "x"),
        ("orders.ymal", ORDERS),
    ]);
    live.first(expect![[r#"
        nerve fresh 10.4.0.1:80
        orders fresh 10.0.0.1:80 10.0.0.2:80
        pay fresh 10.2.0.1:8080 10.2.0.2:8080
        users.v2 fresh 127.0.0.1:80
        users.v3.canary fresh 10.3.0.1:80
        web fresh 10.1.0.1:80
        README.md: not read: the name of a discovery file ends in `.yaml`, `.yml`, `.json` or in nothing
        orders.ymal: not read: the name of a discovery file ends in `.yaml`, `.yml`, `.json` or in nothing
    "#]])
        .await;
}

#[tokio::test]
async fn a_single_file_is_a_source_too() {
    let dir = vmesh_testkit::tempdir().unwrap();
    write(&dir, &[("all.yaml", "[{service: a, endpoints: [10.0.0.1:80]}]"), ("other", "x")]);
    let config = config(&dir.join("all.yaml"));
    let mut live = LiveSource::of(dir, config, None, TestDns::default());
    live.until("a fresh 10.0.0.1:80").await;
    replace(
        &live.dir,
        "all.yaml",
        "[{service: b, endpoints: [10.0.0.2:80]}, {service: a, endpoints: [10.0.0.3:80]}]",
    );
    live.until("a fresh 10.0.0.3:80\nb fresh 10.0.0.2:80").await;
}

#[tokio::test]
async fn a_file_that_is_renamed_into_place_is_seen() {
    let mut live = LiveSource::start(&[("orders.yaml", ORDERS)]);
    live.until("orders fresh 10.0.0.1:80 10.0.0.2:80").await;
    for i in 3..20 {
        replace(&live.dir, "orders.yaml", &format!("endpoints: [10.0.0.{i}:80, 10.0.0.1:80]\n"));
        live.until(&format!("orders fresh 10.0.0.1:80 10.0.0.{i}:80")).await;
    }
    replace(&live.dir, "web", "10.0.1.1 80\n");
    live.until("orders fresh 10.0.0.1:80 10.0.0.19:80\nweb fresh 10.0.1.1:80").await;
    fs::create_dir(live.dir.join("team")).unwrap();
    replace(&live.dir, "team/api", "10.0.2.1 80\n");
    live.until("orders fresh 10.0.0.1:80 10.0.0.19:80\nteam.api fresh 10.0.2.1:80\nweb fresh 10.0.1.1:80")
        .await;
}

#[tokio::test]
async fn a_file_that_is_half_written_is_not_read() {
    let mut live = LiveSource::start(&[("orders.yaml", "endpoints: [10.0.0.1:80, 10.0.0.2:80]\n")]);
    live.until("orders fresh 10.0.0.1:80 10.0.0.2:80").await;
    let path = live.dir.join("orders.yaml");
    let writer = std::thread::spawn(move || {
        // Truncates the file and writes it slowly: each pause is longer than every quiet period except that
        // of an open file.
        let mut file = fs::File::create(path).unwrap();
        for part in ["", "endpoints:\n- 10.0.0.8:80\n", "- 10.0.0.9:80\n"] {
            file.write_all(part.as_bytes()).unwrap();
            std::thread::sleep(Duration::from_millis(200));
        }
    });
    let seen = live.views_until(|shown| shown.contains("10.0.0.9")).await;
    writer.join().unwrap();
    expect![[r#"
        orders fresh 10.0.0.1:80 10.0.0.2:80
        orders fresh 10.0.0.8:80 10.0.0.9:80
    "#]]
    .assert_eq(&seen.concat());
}

#[tokio::test]
async fn a_file_that_is_deleted_and_written_again_was_never_gone() {
    let mut live = LiveSource::start(&[("orders.yaml", ORDERS), ("web", "10.0.1.1 80")]);
    live.until("orders fresh 10.0.0.1:80 10.0.0.2:80\nweb fresh 10.0.1.1:80").await;
    let path = live.dir.join("orders.yaml");
    let writer = std::thread::spawn(move || {
        fs::remove_file(&path).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        fs::write(&path, "endpoints: [10.0.0.3:80]\n").unwrap();
    });
    let seen = live.views_until(|shown| shown.contains("10.0.0.3")).await;
    writer.join().unwrap();
    expect![[r#"
        orders fresh 10.0.0.1:80 10.0.0.2:80
        web fresh 10.0.1.1:80
        orders fresh 10.0.0.3:80
        web fresh 10.0.1.1:80
    "#]]
    .assert_eq(&seen.concat());
}

#[tokio::test]
async fn a_deleted_file_is_held() {
    let mut live = LiveSource::start(&[("orders.yaml", ORDERS), ("web", "10.0.1.1 80")]);
    live.until("orders fresh 10.0.0.1:80 10.0.0.2:80\nweb fresh 10.0.1.1:80").await;
    fs::remove_file(live.dir.join("orders.yaml")).unwrap();
    let seen = live.views_until(|shown| shown.contains("held")).await;
    expect![[r#"
        orders held 10.0.0.1:80 10.0.0.2:80 (`file` no longer names it, and it had 2 endpoints: what was known stays for 5m at least, in case that is a mistake)
        web fresh 10.0.1.1:80
        orders.yaml:1:1: `file` no longer names it, and it had 2 endpoints: what was known stays for 5m at least, in case that is a mistake
    "#]].assert_eq(seen.last().unwrap());
}

#[tokio::test]
async fn a_link_that_is_swapped_is_seen() {
    // Kubernetes swaps links like this for its volumes, and deployment tools for their releases.
    let dir = vmesh_testkit::tempdir().unwrap();
    write(
        &dir,
        &[("d/..1/orders.yaml", ORDERS), ("d/..1/web", "10.0.1.1 80\n"), ("releases/1/pay", "10.0.2.1 80\n")],
    );
    symlink("..1", dir.join("d/..data")).unwrap();
    symlink("..data/orders.yaml", dir.join("d/orders.yaml")).unwrap();
    symlink("..data/web", dir.join("d/web")).unwrap();
    symlink("releases/1", dir.join("current")).unwrap();
    symlink("../current", dir.join("d/live")).unwrap();
    let config = config(&dir.join("d"));
    let mut live = LiveSource::of(dir, config, None, TestDns::default());
    live.until("live.pay fresh 10.0.2.1:80\norders fresh 10.0.0.1:80 10.0.0.2:80\nweb fresh 10.0.1.1:80")
        .await;

    write(&live.dir, &[("d/..2/orders.yaml", "endpoints: [10.0.0.3:80]\n"), ("d/..2/web", "10.0.1.2 80\n")]);
    symlink("..2", live.dir.join("d/..data_tmp")).unwrap();
    fs::rename(live.dir.join("d/..data_tmp"), live.dir.join("d/..data")).unwrap();
    fs::remove_dir_all(live.dir.join("d/..1")).unwrap();
    live.until("live.pay fresh 10.0.2.1:80\norders fresh 10.0.0.3:80\nweb fresh 10.0.1.2:80").await;

    // The swap is repeated, because the links are new inodes after the first swap.
    for n in 2..4 {
        write(&live.dir, &[(&format!("releases/{n}/pay"), &format!("10.0.2.{n} 80\n"))]);
        symlink(format!("releases/{n}"), live.dir.join("next")).unwrap();
        fs::rename(live.dir.join("next"), live.dir.join("current")).unwrap();
        live.until(&format!("live.pay fresh 10.0.2.{n}:80\norders fresh 10.0.0.3:80\nweb fresh 10.0.1.2:80"))
            .await;
    }
    // A change in place is seen too, in a directory that contains no link.
    fs::write(live.dir.join("releases/3/pay"), "10.0.2.9 80\n").unwrap();
    live.until("live.pay fresh 10.0.2.9:80\norders fresh 10.0.0.3:80\nweb fresh 10.0.1.2:80").await;
}

#[tokio::test]
async fn a_directory_that_is_replaced_is_watched_again() {
    let dir = vmesh_testkit::tempdir().unwrap();
    write(&dir, &[("d/orders.yaml", ORDERS), ("new/orders.yaml", "endpoints: [10.0.0.3:80]\n")]);
    let config = config(&dir.join("d"));
    let mut live = LiveSource::of(dir, config, None, TestDns::default());
    live.until("orders fresh 10.0.0.1:80 10.0.0.2:80").await;
    fs::rename(live.dir.join("d"), live.dir.join("old")).unwrap();
    fs::rename(live.dir.join("new"), live.dir.join("d")).unwrap();
    live.until("orders fresh 10.0.0.3:80").await;
    replace(&live.dir, "d/orders.yaml", "endpoints: [10.0.0.4:80]\n");
    live.until("orders fresh 10.0.0.4:80").await;
}

/// File systems may give a new directory the inode number of a removed one, whose watch is gone.
#[tokio::test]
async fn a_directory_that_is_removed_and_made_again_is_watched_again() {
    let mut live = LiveSource::start(&[("web", "10.0.1.1 80\n"), ("team/orders", "10.0.0.1 80\n")]);
    live.until("team.orders fresh 10.0.0.1:80\nweb fresh 10.0.1.1:80").await;
    for n in 2..8 {
        fs::remove_dir_all(live.dir.join("team")).unwrap();
        write(&live.dir, &[("team/orders", &format!("10.0.0.{n} 80\n"))]);
        live.until(&format!("team.orders fresh 10.0.0.{n}:80\nweb fresh 10.0.1.1:80")).await;
        replace(&live.dir, "team/orders", "10.0.0.1 80\n");
        live.until("team.orders fresh 10.0.0.1:80\nweb fresh 10.0.1.1:80").await;
    }
}

#[tokio::test]
async fn a_directory_that_is_gone_or_empty_is_an_accident() {
    let dir = vmesh_testkit::tempdir().unwrap();
    write(&dir, &[("d/orders.yaml", ORDERS)]);
    let config = config(&dir.join("d"));
    let mut live = LiveSource::of(dir, config, None, TestDns::default());
    live.until("orders fresh 10.0.0.1:80 10.0.0.2:80").await;
    fs::rename(live.dir.join("d"), live.dir.join("away")).unwrap();
    let seen = live.views_until(|shown| shown.contains("STALE")).await;
    expect![[r#"
        orders stale 10.0.0.1:80 10.0.0.2:80 (discovery source `file:d` could not read d: it does not exist)
        STALE discovery source `file:d` could not read d: it does not exist
    "#]]
    .assert_eq(seen.last().unwrap());
    fs::create_dir(live.dir.join("d")).unwrap();
    let seen = live.views_until(|shown| shown.contains("mounted")).await;
    expect![[r#"
        orders stale 10.0.0.1:80 10.0.0.2:80 (discovery source `file:d`: d is empty and was not before: is something not mounted? If that is meant, leave one file in it that holds `[]`)
        STALE discovery source `file:d`: d is empty and was not before: is something not mounted? If that is meant, leave one file in it that holds `[]`
    "#]].assert_eq(seen.last().unwrap());
    write(&live.dir, &[("d/orders.yaml", ORDERS)]);
    live.until("orders fresh 10.0.0.1:80 10.0.0.2:80").await;
    // A file with an empty list makes the emptiness explicit.
    replace(&live.dir, "d/orders.yaml", "[]\n");
    live.until("").await;
}

#[tokio::test]
async fn without_being_told_everything_is_seen_at_the_next_poll() {
    let dir = vmesh_testkit::tempdir().unwrap();
    write(&dir, &[("orders.yaml", ORDERS)]);
    let config = FileConfig { watch: false, poll: Duration::from_secs(1), ..FileConfig::of(&*dir) };
    let mut live = LiveSource::of(dir, config, None, TestDns::default());
    live.until("orders fresh 10.0.0.1:80 10.0.0.2:80").await;
    // A poll also finds a change that the metadata hide.
    let path = live.dir.join("orders.yaml");
    let before = fs::metadata(&path).unwrap().modified().unwrap();
    fs::write(&path, ORDERS.replace("10.0.0.2", "10.0.0.9")).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_modified(before).unwrap();
    live.until("orders fresh 10.0.0.1:80 10.0.0.9:80").await;
}

#[tokio::test]
async fn a_host_without_watches_is_polled_and_says_so() {
    let dir = vmesh_testkit::tempdir().unwrap();
    write(&dir, &[("orders.yaml", ORDERS)]);
    let config = FileConfig { poll: Duration::from_secs(1), ..FileConfig::of(&*dir) };
    let source = FileSource::with_resolver(config, None, Arc::default(), TestDns::default());
    source.disk.lock().unwrap().no_watches = true;
    let (handle, link) = link("file".into(), View::default());
    let mut task = tokio::task::JoinSet::new();
    task.spawn(follow(source, Guard::new("file", GuardConfig::default().for_files()), link));
    let mut live = LiveSource { dir, views: handle.views, _task: task };
    live.first(expect![[r#"
        orders fresh 10.0.0.1:80 10.0.0.2:80
        DIR: the host has no watches left: raise fs.inotify.max_user_watches; until then changes are seen only every 1s
    "#]]).await;
    replace(&live.dir, "orders.yaml", "endpoints: [10.0.0.3:80]\n");
    live.views_until(|shown| shown.contains("orders fresh 10.0.0.3:80\n")).await;
}

#[tokio::test]
async fn a_change_during_a_storm_of_others_is_seen() {
    let mut live = LiveSource::start(&[("orders.yaml", ORDERS), ("noise", "10.0.1.1 80\n")]);
    live.until("noise fresh 10.0.1.1:80\norders fresh 10.0.0.1:80 10.0.0.2:80").await;
    let (stop, dir) = (Arc::new(std::sync::atomic::AtomicBool::new(false)), live.dir.to_path_buf());
    let noise = std::thread::spawn({
        let stop = stop.clone();
        move || {
            for i in 0.. {
                if stop.load(std::sync::atomic::Ordering::Relaxed) {
                    return;
                }
                fs::write(dir.join(".other"), i.to_string()).unwrap();
                fs::rename(dir.join(".other"), dir.join("noise.yaml.tmp")).unwrap();
            }
        }
    });
    replace(&live.dir, "orders.yaml", "endpoints: [10.0.0.3:80]\n");
    let started = Instant::now();
    live.until("noise fresh 10.0.1.1:80\norders fresh 10.0.0.3:80").await;
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    noise.join().unwrap();
    assert!(started.elapsed() < BOUND);
}

#[tokio::test]
async fn what_is_no_file_is_not_opened_and_what_is_no_text_is_not_read() {
    let dir = vmesh_testkit::tempdir().unwrap();
    write(
        &dir,
        &[
            ("good.yaml", ORDERS),
            ("zero.yaml", ""),
            ("cut.json", r#"{"service": "cut", "endpoints": ["10.0.0.1:80", "10.0"#),
            ("unknown.yaml", "endpoint: [10.0.0.1:80]\nendpoints: []\n"),
            ("number.yaml", "endpoints: [{address: 10.0.0.1:80, weight: many}]\n"),
            ("port.yaml", "endpoints: [10.0.0.1:0, 10.0.0.1:70000, 10.0.0.2:80]\n"),
            ("a/b/c/d/e/f/g/h/deep.yaml", ORDERS),
        ],
    );
    fs::write(dir.join("latin1.yaml"), b"endpoints: [] # \xe4\n").unwrap();
    fs::File::create(dir.join("huge.yaml")).unwrap().set_len(50 << 20).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, dir.join("pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(dir.join("socket")).unwrap();
    symlink("/dev/zero", dir.join("zeros")).unwrap();
    symlink("nowhere", dir.join("dangling.yaml")).unwrap();
    symlink("loop", dir.join("loop")).unwrap();
    symlink(".", dir.join("round")).unwrap();
    fs::write(dir.join("-.yaml"), ORDERS).unwrap();
    let config = config(&dir);
    let mut live = LiveSource::of(dir, config, None, TestDns::default());
    live.first(expect![[r#"
        good fresh 10.0.0.1:80 10.0.0.2:80
        port fresh 10.0.0.2:80
        -.yaml:1:1: `service` is missing, and the file's name cannot stand in for it: `-` is not a service name: 1 to 253 letters, digits, `.`, `_` or `-`, the first and the last a letter or a digit; nothing of this file is in force
        a/b/c/d/e/f/g/h: not read: nested deeper than 8 directories
        cut.json:1:49: the quote that begins here never ends; nothing of this file is in force
        dangling.yaml: a link to something that does not exist; nothing of this file is in force
        huge.yaml: larger than 16 MiB, the most that is read; nothing of this file is in force
        latin1.yaml:1:17: the text is not UTF-8: byte 0xe4 belongs to no character; nothing of this file is in force
        loop: a link that leads back to itself; nothing of this file is in force
        number.yaml:1:44: `weight`: `many` is not a weight: a number from 0 to 1000000; this service is not in force
        pipe: not read: it is a FIFO
        port.yaml:1:13: port 0 is not a port: 1 to 65535; this endpoint is left out
        port.yaml:1:25: port 70000 is out of range: 1 to 65535; this endpoint is left out
        socket: not read: it is a socket
        unknown.yaml:1:1: unknown field `endpoint`, did you mean `endpoints`? This service is not in force
        zero.yaml: the file is empty; nothing of this file is in force
        zeros: not read: it is a device
    "#]]).await;
}

#[tokio::test]
async fn a_bad_file_keeps_what_was_last_good_of_it() {
    let mut live = LiveSource::start(&[
        ("all.yaml", "- {service: a, endpoints: [10.0.0.1:80]}\n- {service: b, endpoints: [10.0.0.2:80]}\n"),
        ("orders.yaml", ORDERS),
    ]);
    let good = "a fresh 10.0.0.1:80\nb fresh 10.0.0.2:80\norders fresh 10.0.0.1:80 10.0.0.2:80";
    live.until(good).await;
    for (bad, expected) in [
        (
            "",
            expect![[r#"
            a stale 10.0.0.1:80 (all.yaml: the file is empty)
            b stale 10.0.0.2:80 (all.yaml: the file is empty)
            orders fresh 10.0.0.1:80 10.0.0.2:80
            all.yaml: the file is empty; what was last read of this file stays in force
        "#]],
        ),
        (
            "- {service: a, endpoints: [10.0.0.9:80]}\n- {service: b, endpoints: [10.0.0",
            expect![[r#"
            a stale 10.0.0.1:80 (all.yaml:2:27: this `[` is never closed)
            b stale 10.0.0.2:80 (all.yaml:2:27: this `[` is never closed)
            orders fresh 10.0.0.1:80 10.0.0.2:80
            all.yaml:2:27: this `[` is never closed; what was last read of this file stays in force
        "#]],
        ),
        (
            "- {service: a, endpoints: [10.0.0.9:80]}\n- {service: b, endpoint: []}\n",
            expect![[r#"
                a fresh 10.0.0.9:80
                b stale 10.0.0.2:80 (all.yaml:2:16: unknown field `endpoint`, did you mean `endpoints`?)
                orders fresh 10.0.0.1:80 10.0.0.2:80
                all.yaml:2:16: unknown field `endpoint`, did you mean `endpoints`? What was last read of this service stays in force
            "#]],
        ),
        (
            "- {service: a, endpoints: [10.0.0.9:80]}\n- {service: b, endpoints: [bad]}\n",
            expect![[r#"
            a fresh 10.0.0.9:80
            b stale 10.0.0.2:80 (all.yaml:2:28: `bad` has no port: write `bad:8080`, an address and a port)
            orders fresh 10.0.0.1:80 10.0.0.2:80
            all.yaml:2:28: `bad` has no port: write `bad:8080`, an address and a port; what was last read of this service stays in force
        "#]],
        ),
        (
            "- {service: a, endpoints: [x]}\n- {service: b, endpoints: [y]}\n",
            expect![[r#"
                a stale 10.0.0.1:80 (all.yaml:1:28: `x` has no port: write `x:8080`, an address and a port)
                b stale 10.0.0.2:80 (all.yaml:2:28: `y` has no port: write `y:8080`, an address and a port)
                orders fresh 10.0.0.1:80 10.0.0.2:80
                all.yaml:1:28: `x` has no port: write `x:8080`, an address and a port; what was last read of this service stays in force
                all.yaml:2:28: `y` has no port: write `y:8080`, an address and a port; what was last read of this service stays in force
            "#]],
        ),
    ] {
        replace(&live.dir, "all.yaml", bad);
        let seen = live.views_until(|shown| shown.contains("all.yaml")).await;
        expected.assert_eq(seen.last().unwrap());
        replace(
            &live.dir,
            "all.yaml",
            "- {service: a, endpoints: [10.0.0.1:80]}\n- {service: b, endpoints: [10.0.0.2:80]}\n",
        );
        live.until(good).await;
    }
    fs::remove_file(live.dir.join("all.yaml")).unwrap();
    symlink("all.yaml", live.dir.join("all.yaml")).unwrap();
    let seen = live.views_until(|shown| shown.contains("all.yaml:") && !shown.contains("held")).await;
    expect![[r#"
        a stale 10.0.0.1:80 (all.yaml: a link that leads back to itself)
        b stale 10.0.0.2:80 (all.yaml: a link that leads back to itself)
        orders fresh 10.0.0.1:80 10.0.0.2:80
        all.yaml: a link that leads back to itself; what was last read of this file stays in force
    "#]]
    .assert_eq(seen.last().unwrap());
}

#[tokio::test]
async fn a_bad_file_keeps_what_was_known_of_it_before_a_restart() {
    let mut live =
        LiveSource::start(&[("orders.yaml", "endpoints: [10.0.0.1:80, db:80]\n"), ("web", "10.0.1.1 80\n")]);
    let shown = live.views_until(|shown| shown.contains("web")).await;
    expect![[r#"
        orders stale 10.0.0.1:80 (`db` cannot be resolved: no such host; this endpoint is left out)
        web fresh 10.0.1.1:80
        orders.yaml:1:26: `db` cannot be resolved: no such host; this endpoint is left out
    "#]]
    .assert_eq(shown.last().unwrap());
    let mut last_good = (**live.views.borrow().last_good.as_ref().unwrap()).clone();
    let LiveSource { dir, .. } = live;
    // The name resolved before the restart.
    let known = last_good.services.get_mut("orders").unwrap();
    let mut registration = (*known.registration).clone();
    let mut endpoints = registration.endpoints.to_vec();
    endpoints.push(Endpoint {
        address: "10.0.0.7:80".parse().unwrap(),
        hostname: Some("db".into()),
        ..endpoints[0].clone()
    });
    registration.endpoints = endpoints.into();
    *known = ServiceView::fresh(registration.into());

    fs::write(dir.join("orders.yaml"), "endpoints: [10.0.0.1:80, db:80\n").unwrap();
    let config = config(&dir);
    let mut live = LiveSource::of(dir, config, Some(last_good), TestDns::default());
    live.first(expect![[r#"
        orders stale 10.0.0.1:80 10.0.0.7:80 (the source has not answered since the start; this is from before)
        web stale 10.0.1.1:80 (the source has not answered since the start; this is from before)
        orders.yaml:1:26: `db` cannot be resolved: no such host; this endpoint is left out
        STALE the source has not answered since the start; this is from before
    "#]]).await;
    let seen = live.views_until(|shown| !shown.contains("STALE")).await;
    expect![[r#"
        orders stale 10.0.0.1:80 10.0.0.7:80 (orders.yaml:1:12: this `[` is never closed)
        web fresh 10.0.1.1:80
        orders.yaml:1:12: this `[` is never closed; what was last read of this file stays in force
    "#]]
    .assert_eq(seen.last().unwrap());
    replace(&live.dir, "orders.yaml", "endpoints: [10.0.0.1:80, db:80]\n");
    let seen = live.views_until(|shown| shown.contains("resolved")).await;
    expect![[r#"
        orders stale 10.0.0.1:80 10.0.0.7:80 (`db` cannot be resolved: no such host; its last addresses stay in force)
        web fresh 10.0.1.1:80
        orders.yaml:1:26: `db` cannot be resolved: no such host; its last addresses stay in force
    "#]]
    .assert_eq(seen.last().unwrap());
}

#[tokio::test]
async fn a_service_in_two_files_is_that_of_the_first() {
    let mut live = LiveSource::start(&[
        ("b.yaml", "service: orders\nendpoints: [10.0.0.2:80]\n"),
        ("a.yaml", "---\nservice: orders\nendpoints: [10.0.0.1:80]\n"),
        ("orders", "10.0.0.3 80\n"),
    ]);
    live.first(expect![[r#"
        orders fresh 10.0.0.1:80
        b.yaml:1:1: `orders` is also in a.yaml:2:1, which counts, since it is the first
        orders: `orders` is also in a.yaml:2:1, which counts, since it is the first
    "#]])
        .await;
}

/// A job is spread over several files, one of which cannot be read after a restart.
#[tokio::test]
async fn a_job_is_put_together_from_several_files_and_loses_no_part_to_a_file_that_breaks() {
    let group =
        |address: &str| format!("[{{\"targets\": [\"{address}\"], \"labels\": {{\"job\": \"node\"}}}}]");
    let mut live = LiveSource::start(&[
        ("a.json", &group("10.0.0.1:80")),
        ("b.json", &group("10.0.0.2:80")),
        ("c.json", &group("10.0.0.3:80")),
    ]);
    live.first(expect![[r#"
        node fresh 10.0.0.1:80 10.0.0.2:80 10.0.0.3:80
    "#]])
        .await;
    let last_good = (**live.views.borrow().last_good.as_ref().unwrap()).clone();
    let LiveSource { dir, .. } = live;
    fs::write(dir.join("b.json"), "[{\"targets\": [").unwrap();
    let config = FileConfig { watch: false, ..config(&dir) };
    let mut disk = Disk::new(config, Arc::default(), Some(&last_good));
    let all = ["a.json", "b.json", "c.json"].map(|file| dir.join(file));
    let whole = |told: &crate::assemble::ServiceStatement| match &told.content {
        ServiceContent::Parsed(service) => service.endpoints.len(),
        ServiceContent::Restored(known) => known.endpoints.len(),
    };
    let restarted = scan(&mut disk, &all, true);
    let told = &restarted.statement.services["node"];
    assert_eq!(whole(told), 2);
    let because = told.partial_because.as_deref().expect("what is missing may be in the file that is broken");
    assert!(because.contains("b.json"), "{because}");
    // Once the file is readable again, endpoints that it does not list are removed.
    fs::write(dir.join("b.json"), "[]").unwrap();
    let mended = scan(&mut disk, &all, true);
    assert_eq!(
        (whole(&mended.statement.services["node"]), &mended.statement.services["node"].partial_because),
        (2, &None)
    );
}

#[tokio::test]
async fn a_name_that_stands_for_loopback_on_this_host_only_is_no_endpoint() {
    let dir = vmesh_testkit::tempdir().unwrap();
    let dns = TestDns::default();
    for (host, ip) in
        [("vm-17", "127.0.1.1"), ("vm-18", "::1"), ("vm-19", "::ffff:127.0.0.1"), ("vm-20", "10.0.0.20")]
    {
        dns.set(host, ip);
    }
    for (host, ip) in [("localhost", "127.0.0.1"), ("pay.localhost", "127.0.0.9")] {
        dns.set(host, ip);
    }
    write(
        &dir,
        &[
            ("web", "vm-17 80\nvm-18 80\nvm-19 80\nvm-20 80\n"),
            ("own", "localhost 80\npay.localhost 80\n127.0.0.5 80\n"),
        ],
    );
    let config = config(&dir);
    let mut live = LiveSource::of(dir, config, None, dns);
    live.first(expect![[r#"
        own fresh 127.0.0.1:80 127.0.0.5:80 127.0.0.9:80
        web fresh 10.0.0.20:80
        web:1:1: `vm-17`: it stands for 127.0.1.1 on this host only, see its /etc/hosts; this endpoint is left out
        web:2:1: `vm-18`: it stands for ::1 on this host only, see its /etc/hosts; this endpoint is left out
        web:3:1: `vm-19`: it stands for 127.0.0.1 on this host only, see its /etc/hosts; this endpoint is left out
    "#]]).await;
}

#[tokio::test]
async fn an_address_that_nobody_can_dial_is_left_out_of_every_format_and_is_no_bad_record() {
    let addresses = [
        "0.0.0.0",
        "0.1.2.3",
        "0.1",
        "224.0.0.1",
        "255.255.255.255",
        "::",
        "ff02::1",
        "fe80::1",
        "::ffff:0.0.0.0",
        "169.254.169.254",
    ];
    let dir = vmesh_testkit::tempdir().unwrap();
    for (number, address) in addresses.iter().enumerate() {
        let bracketed = if address.contains(':') { format!("[{address}]") } else { (*address).to_owned() };
        let pair = |target: &str| format!("[\"{target}:80\", \"10.9.9.9:80\"]");
        let host = |host: &str| format!("{{\"host\":\"{host}\",\"port\":80}}");
        for (name, text) in [
            (format!("native{number}.yaml"), format!("endpoints: {}\n", pair(&bracketed))),
            (format!("lines{number}"), format!("10.9.9.9 80\n{address} 80\n")),
            (format!("smart{number}.json"), format!("[{},{}]", host(address), host("10.9.9.9"))),
            (format!("prom{number}.yml"), format!("- targets: {}\n", pair(&bracketed))),
            // The file has no other endpoint: the service is known and has no endpoints.
            (format!("only{number}.yaml"), format!("endpoints: [\"{bracketed}:80\"]\n")),
        ] {
            fs::write(dir.join(name), text).unwrap();
        }
    }
    let config = config(&dir);
    let mut live = LiveSource::of(dir, config, None, TestDns::default());
    live.views_until(|shown| !shown.is_empty()).await;
    let view = live.views.borrow().clone();
    assert_eq!(view.unusable, None);
    let last_good = view.last_good.clone().unwrap();
    for (name, seen) in &last_good.services {
        let endpoints: Vec<_> = seen.registration.endpoints.iter().map(|e| e.address.to_string()).collect();
        let expected: &[&str] = if name.as_str().starts_with("only") { &[] } else { &["10.9.9.9:80"] };
        assert_eq!(endpoints, expected, "{name}");
    }
    assert_eq!(last_good.services.len(), 5 * addresses.len());
    let said = last_good.problems.iter().filter(|problem| {
        problem.message.contains("is not an address that can be dialled")
            && problem.message.ends_with("this endpoint is left out")
    });
    assert_eq!(said.count(), 5 * addresses.len(), "{:#?}", last_good.problems);

    // The last good endpoints stay when none of the new addresses can be dialled, and the guard holds the
    // removal.
    replace(&live.dir, "lines0", "0.0.0.0 80\n");
    let held = live
        .views_until(|shown| shown.contains("lines0 stale 10.9.9.9:80 (1 of 1 records have no address"))
        .await;
    assert!(!held.iter().any(|shown| shown.contains("lines0 fresh\n")), "{held:#?}");
}

#[tokio::test]
async fn a_directory_of_far_too_many_files_is_the_wrong_one() {
    let dir = vmesh_testkit::tempdir().unwrap();
    write(&dir, &[("a", "10.0.0.1 80"), ("b", "10.0.0.1 80"), ("c", "10.0.0.1 80")]);
    let config = FileConfig { max_files: 2, ..config(&dir) };
    let mut live = LiveSource::of(dir, config, None, TestDns::default());
    live.first(expect![[r#"
        STALE discovery source `file:DIR`: DIR holds more than 2 files: is it the right directory?
    "#]])
        .await;
}

#[tokio::test]
async fn a_source_whose_path_does_not_exist_says_so() {
    let dir = vmesh_testkit::tempdir().unwrap();
    let config = config(&dir.join("services.d"));
    let mut live = LiveSource::of(dir, config, None, TestDns::default());
    live.first(expect![[r#"
        STALE discovery source `file:services.d` could not read services.d: it does not exist
    "#]])
        .await;
    write(&live.dir, &[("services.d/orders.yaml", ORDERS)]);
    live.until("orders fresh 10.0.0.1:80 10.0.0.2:80").await;
}

#[tokio::test]
async fn names_are_resolved_and_a_slow_one_holds_up_only_its_service() {
    let dir = vmesh_testkit::tempdir().unwrap();
    let dns = TestDns::default();
    dns.set("db", "10.1.0.1");
    write(
        &dir,
        &[("orders.yaml", "endpoints: [db:80, db:81, 10.1.0.1:82]\n"), ("pay", "nowhere 80\n10.2.0.1 80\n")],
    );
    let config = FileConfig { resolve_interval: Duration::from_secs(1), ..config(&dir) };
    let mut live = LiveSource::of(dir, config, None, dns.clone());
    live.first(expect![[r#"
        orders fresh 10.1.0.1:80 10.1.0.1:81 10.1.0.1:82
        pay stale 10.2.0.1:80 (`nowhere` cannot be resolved: no such host; this endpoint is left out)
        pay:1:1: `nowhere` cannot be resolved: no such host; this endpoint is left out
    "#]])
        .await;
    let pay = "pay stale 10.2.0.1:80 (`nowhere` cannot be resolved: no such host; this endpoint is left out)";
    let problem = "pay:1:1: `nowhere` cannot be resolved: no such host; this endpoint is left out";
    let unresolved = live.views.borrow().unresolved.clone();
    assert_eq!((unresolved.count, &*unresolved.first[0].name), (1, "nowhere"));
    // The host moves to another address and is found there.
    dns.set("db", "10.1.0.2");
    live.until(&format!("orders fresh 10.1.0.1:82 10.1.0.2:80 10.1.0.2:81\n{pay}\n{problem}")).await;
    // A slow name delays only its own service.
    replace(&live.dir, "orders.yaml", "endpoints: [slow:80]\n");
    replace(&live.dir, "web", "10.3.0.1 80\n");
    live.until(&format!(
        "orders stale 10.1.0.1:82 10.1.0.2:80 10.1.0.2:81 (`slow` is being looked up)\n{pay}\nweb fresh 10.3.0.1:80\n{problem}"
    ))
    .await;
    dns.set("slow", "10.1.0.3");
    dns.set("nowhere", "10.2.0.2");
    live.until("orders fresh 10.1.0.3:80\npay fresh 10.2.0.1:80 10.2.0.2:80\nweb fresh 10.3.0.1:80").await;
}

/// Scans the disk as if all files had been closed long ago.
fn scan(disk: &mut Disk, whole: &[PathBuf], verify: bool) -> Scan {
    let look = ScanRequest { whole: whole.iter().cloned().collect(), ..ScanRequest::default() };
    disk.scan(&look, verify).unwrap()
}

fn age(path: &Path) {
    let long_ago = SystemTime::now() - Duration::from_secs(60);
    fs::File::options().write(true).open(path).unwrap().set_modified(long_ago).unwrap();
}

fn age_all(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match fs::symlink_metadata(&path).unwrap().file_type() {
            kind if kind.is_dir() => age_all(&path),
            kind if kind.is_file() => age(&path),
            _ => {}
        }
    }
}

#[test]
fn of_a_thousand_files_the_one_that_changed_is_parsed() {
    let dir = vmesh_testkit::tempdir().unwrap();
    let text = |service: usize, first: usize| {
        let endpoints = (first..first + 10).map(|i| {
            format!("  - {{address: \"10.{}.{}.{i}:80\", zone: a}}\n", service / 250, service % 250)
        });
        format!("service: s{service}\nprotocol: http\nendpoints:\n{}", endpoints.collect::<String>())
    };
    for service in 0..1000 {
        let path = dir.join(format!("s{service}.yaml"));
        fs::write(&path, text(service, 1)).unwrap();
        age(&path);
    }
    let mut disk = Disk::new(FileConfig { watch: false, ..FileConfig::of(&*dir) }, Arc::default(), None);
    let first = scan(&mut disk, &[], true);
    assert_eq!((first.parsed, first.statement.services.len()), (1000, 1000));
    let same = scan(&mut disk, &[], true);
    assert_eq!(same.parsed, 0);
    let path = dir.join("s500.yaml");
    fs::write(&path, text(500, 2)).unwrap();
    let changed = scan(&mut disk, &[path], false);
    assert_eq!(changed.parsed, 1);
    for (name, told) in &changed.statement.services {
        let (ServiceContent::Parsed(before), ServiceContent::Parsed(now)) =
            (&first.statement.services[name].content, &told.content)
        else {
            panic!()
        };
        assert_eq!(Arc::ptr_eq(before, now), name.as_str() != "s500", "{name}");
    }
}

#[test]
fn only_the_files_are_looked_at_of_which_the_kernel_told() {
    let dir = vmesh_testkit::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        write(&dir, &[(name, text)]);
        age(&dir.join(name));
    };
    (0..100).for_each(|service| file(&format!("s{service}"), "10.0.0.1 80\n"));
    let mut disk = Disk::new(config(&dir), Arc::default(), None);
    assert_eq!(scan(&mut disk, &[], false).statement.services.len(), 100);
    file("s7", "10.0.0.2 80\n");
    // The kernel does not report this change.
    file("s8", "10.0.0.2 80\n");
    let names = |scan: &Scan| -> Vec<String> {
        scan.only.iter().flatten().map(|name| name.as_str().to_owned()).collect()
    };
    let one = scan(&mut disk, &[dir.join("s7")], false);
    assert_eq!((one.read, names(&one), one.statement.services.len()), (1, vec!["s7".to_owned()], 1));
    // Writing the same content again is no change.
    assert_eq!(names(&scan(&mut disk, &[dir.join("s7")], false)), [""; 0]);
    file("new", "10.0.0.1 80\n");
    file("ignored.tmp", "10.0.0.1 80\n");
    let new = scan(&mut disk, &[dir.join("new"), dir.join("ignored.tmp")], false);
    assert_eq!((names(&new), new.statement.services.len()), (vec!["new".to_owned()], 1));
    // A removed file is looked at again, since it may be being replaced.
    fs::remove_file(dir.join("new")).unwrap();
    assert!(scan(&mut disk, &[dir.join("new")], false).again.is_some());
    let until = std::time::Instant::now() + BOUND;
    let gone = loop {
        let gone = scan(&mut disk, &[], false);
        if gone.again.is_none() {
            break gone;
        }
        assert!(std::time::Instant::now() < until);
    };
    assert_eq!((names(&gone), gone.statement.services.len()), (vec!["new".to_owned()], 0));
    // A directory, lost events and the poll timer each lead to a scan of everything.
    fs::create_dir(dir.join("team")).unwrap();
    for (whole, everything, verify) in
        [(vec![dir.join("team")], false, false), (vec![], true, false), (vec![], false, true)]
    {
        let look = ScanRequest { whole: whole.into_iter().collect(), everything, ..ScanRequest::default() };
        let all = disk.scan(&look, verify).unwrap();
        assert_eq!((&all.only, all.statement.services.len()), (&None, 100));
        let ServiceContent::Parsed(service) = &all.statement.services["s8"].content else { panic!() };
        assert_eq!(service.endpoints[0].address.to_string(), "10.0.0.2:80");
    }
}

/// A change of the files.
#[derive(Debug, Clone, Copy)]
enum FileChange {
    Write {
        file: usize,
        text: usize,
    },
    Replace {
        file: usize,
        text: usize,
    },
    Remove {
        file: usize,
    },
    Rename {
        from: usize,
        to: usize,
    },
    RemoveDirectory,
    MoveDirectory,
    /// Replaces the linked directory or the linked file.
    Swap {
        link: usize,
        to: usize,
    },
    /// Writes into a possible target of a link.
    WriteBehind {
        link: usize,
        to: usize,
        text: usize,
    },
}

/// Files in the directory, below it, with the same service name, of an ignored extension, and of a skipped
/// kind.
const FILES: [&str; 9] = ["a", "b.yaml", "b.json", "x/a", "x/b.yaml", "x.a", "readme.txt", "c.tmp", "x/y/a"];
/// The contents are of one format and valid, so that earlier contents make no difference.
const TEXTS: [&str; 4] = [
    "endpoints: [10.0.0.1:80]\n",
    "endpoints: [10.0.0.2:80]\n",
    "service: named\nendpoints: [10.0.0.3:80]\n",
    "[]\n",
];

impl FileChange {
    fn make(self, dir: &Path) {
        let path = |file: usize| dir.join("d").join(FILES[file]);
        // Errors of the file system are ignored, for example if the path is a directory.
        match self {
            FileChange::Write { file, text } => {
                _ = fs::create_dir_all(path(file).parent().unwrap());
                _ = fs::write(path(file), TEXTS[text]);
            }
            FileChange::Replace { file, text } => {
                _ = fs::create_dir_all(path(file).parent().unwrap());
                let temporary = path(file).with_file_name(".tmp");
                fs::write(&temporary, TEXTS[text]).unwrap();
                _ = fs::rename(&temporary, path(file));
            }
            FileChange::Remove { file } => _ = fs::remove_file(path(file)),
            FileChange::Rename { from, to } => _ = fs::rename(path(from), path(to)),
            FileChange::RemoveDirectory => _ = fs::remove_dir_all(dir.join("d/x")),
            FileChange::MoveDirectory => {
                _ = fs::rename(dir.join("d/x"), dir.join("d/z"));
            }
            FileChange::Swap { link, to } => {
                let (name, target) = [("team", "dirs"), ("linked", "files")][link];
                _ = fs::remove_file(dir.join("next"));
                symlink(dir.join(target).join(to.to_string()), dir.join("next")).unwrap();
                fs::rename(dir.join("next"), dir.join("d").join(name)).unwrap();
            }
            FileChange::WriteBehind { link, to, text } => {
                let behind = [format!("dirs/{to}/w"), format!("files/{to}")];
                fs::write(dir.join(&behind[link]), TEXTS[text]).unwrap();
            }
        }
    }
}

fn any_change() -> impl Strategy<Value = FileChange> {
    let (file, text, to, link) = (0..FILES.len(), 0..TEXTS.len(), 0..2usize, 0..2usize);
    prop_oneof![
        3 => (file.clone(), text.clone()).prop_map(|(file, text)| FileChange::Write { file, text }),
        3 => (file.clone(), text.clone()).prop_map(|(file, text)| FileChange::Replace { file, text }),
        2 => file.clone().prop_map(|file| FileChange::Remove { file }),
        2 => (file.clone(), file).prop_map(|(from, to)| FileChange::Rename { from, to }),
        1 => Just(FileChange::RemoveDirectory),
        1 => Just(FileChange::MoveDirectory),
        2 => (link.clone(), to.clone()).prop_map(|(link, to)| FileChange::Swap { link, to }),
        2 => (link, to, text).prop_map(|(link, to, text)| FileChange::WriteBehind { link, to, text }),
    ]
}

/// Returns the statement about each service, and the subjects that have problems.
fn said(statement: &Statement) -> (Vec<String>, BTreeSet<String>) {
    let service = |(name, told): (&ServiceName, &crate::assemble::ServiceStatement)| match &told.content {
        ServiceContent::Parsed(service) => {
            let addresses: Vec<_> = service.endpoints.iter().map(|e| e.address.to_string()).collect();
            format!("{name} {addresses:?} of {} stale {}", service.place.file, told.stale_because.is_some())
        }
        ServiceContent::Restored(_) => format!("{name} restored"),
    };
    let problems = statement.problems.iter().map(|p| format!("{} {}", p.place.file, p.subject));
    (statement.services.iter().map(service).collect(), problems.collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// With real events of the kernel: incremental scans of the reported files give the same result as a
    /// final scan of everything.
    #[test]
    fn looks_at_what_the_kernel_told_of_find_what_there_is(
        steps in proptest::collection::vec(proptest::collection::vec(any_change(), 1..4), 1..8),
    ) {
        let dir = vmesh_testkit::tempdir().unwrap();
        let dir = fs::canonicalize(&dir).unwrap();
        write(&dir, &[("dirs/0/w", TEXTS[0]), ("dirs/1/w", TEXTS[1]), ("files/0", TEXTS[0])]);
        write(&dir, &[("files/1", TEXTS[1]), ("d/last", TEXTS[0]), ("d/a", TEXTS[0]), ("d/x/a", TEXTS[1])]);
        [0, 1].into_iter().for_each(|link| FileChange::Swap { link, to: 0 }.make(&dir));
        let hints = Arc::new(Hints::below(&dir.join("d")));
        let mut disk = Disk::new(config(&dir.join("d")), hints.clone(), None);
        let last = dir.join("d/last");
        // Events arrive in order: once the event of the last file is there, all are.
        let heard = || {
            fs::write(&last, TEXTS[0]).unwrap();
            let until = std::time::Instant::now() + BOUND;
            let mut all = ScanRequest::default();
            while !all.whole.contains(&last) {
                assert!(std::time::Instant::now() < until, "no event comes");
                let look = hints.take(std::time::Instant::now());
                all.whole.extend(look.whole);
                all.busy = look.busy;
                all.everything |= look.everything;
            }
            all
        };
        let mut statement = Statement::default();
        let mut take = |scan: Scan| match scan.only {
            Some(only) => statement.replace(only, scan.statement),
            None => statement = scan.statement,
        };
        take(disk.scan(&ScanRequest::default(), true).unwrap());
        for changes in steps {
            changes.into_iter().for_each(|change| change.make(&dir));
            take(disk.scan(&heard(), false).unwrap());
        }
        let until = std::time::Instant::now() + BOUND;
        loop {
            let scan = disk.scan(&heard(), false).unwrap();
            let is_settled = scan.again.is_none();
            take(scan);
            if is_settled {
                break;
            }
            assert!(std::time::Instant::now() < until);
        }
        // A disk state that has read nothing and only knows which file counts for each service.
        age_all(&dir);
        let all = disk.fresh_copy().scan(&ScanRequest::default(), true).unwrap();
        prop_assert_eq!(all.again, None);
        let all = all.statement;
        prop_assert_eq!(said(&statement), said(&all));
    }
}

#[test]
fn a_directory_that_cannot_be_read_keeps_all_that_is_below_it() {
    let dir = vmesh_testkit::tempdir().unwrap();
    write(&dir, &[("team/orders", "10.0.0.1 80\n"), ("web", "10.0.1.1 80\n")]);
    age(&dir.join("team/orders"));
    age(&dir.join("web"));
    let mut disk = Disk::new(config(&dir), Arc::default(), None);
    let first = scan(&mut disk, &[], true);
    assert_eq!(first.statement.services.len(), 2);
    // Permissions do not restrict root, so the directory is moved away instead, which has the same effect on
    // the code under test.
    fs::rename(dir.join("team"), dir.join(".team")).unwrap();
    disk.keep_unreadable(&[(dir.join("team"), "permission denied".to_owned())]);
    let mut kept = Scan::default();
    disk.forget_missing(
        &BTreeSet::from([dir.join("web")]),
        &[(dir.join("team"), String::new())],
        std::time::Instant::now(),
        &mut kept,
    );
    disk.merge(&mut kept);
    assert_eq!(kept.statement.services.len(), 2);
    assert!(
        kept.statement.services["team.orders"]
            .stale_because
            .as_ref()
            .unwrap()
            .ends_with("team: permission denied")
    );
    // The directory is read again once it is readable.
    fs::rename(dir.join(".team"), dir.join("team")).unwrap();
    let again = disk.scan(&ScanRequest { everything: true, ..ScanRequest::default() }, false).unwrap();
    assert!(again.statement.services["team.orders"].stale_because.is_none());
}

#[test]
fn a_format_that_is_given_is_not_guessed() {
    let dir = vmesh_testkit::tempdir().unwrap();
    write(&dir, &[("web.example.com", "10.0.0.1 80\n"), ("pay.txt", "10.0.0.2:80\n")]);
    fs::read_dir(&dir).unwrap().for_each(|entry| age(&entry.unwrap().path()));
    let linkerd = FileConfig { format: Format::Linkerd, ..config(&dir) };
    let found = scan(&mut Disk::new(linkerd, Arc::default(), None), &[], true);
    assert_eq!(
        found.statement.services.keys().map(ServiceName::as_str).collect::<Vec<_>>(),
        ["pay.txt", "web.example.com"]
    );
}

#[test]
fn errors_of_the_file_system_are_said_in_plain_words() {
    use rustix::io::Errno;
    let errors = [Errno::ACCESS, Errno::LOOP, Errno::NOENT, Errno::STALE, Errno::IO, Errno::MFILE];
    let said: String =
        errors.into_iter().map(|errno| format!("{}\n", super::disk::explain_error(&errno.into()))).collect();
    expect![[r#"
        permission denied: the control plane's user has to be able to read it
        a link that leads back to itself
        it does not exist
        its file system is gone
        input/output error
        too many open files
    "#]]
    .assert_eq(&said);
}

#[test]
fn what_a_file_says_that_not_everybody_may_read_is_not_shown_to_everybody() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    const SECRET: &str = "s3cr3t-t0k3n";
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let (dir, elsewhere) = (vmesh_testkit::tempdir().unwrap(), vmesh_testkit::tempdir().unwrap());
    fs::write(elsewhere.join("token"), SECRET).unwrap();
    mode(&elsewhere.join("token"), 0o600);
    // Every user may read this file but cannot reach it.
    fs::create_dir(elsewhere.join("private")).unwrap();
    for (name, text) in [("list", format!("10.0.0.1 {SECRET}")), ("yaml", format!("endpoints: [{SECRET}]"))] {
        fs::write(elsewhere.join("private").join(name), text).unwrap();
        mode(&elsewhere.join("private").join(name), 0o644);
    }
    mode(&elsewhere.join("private"), 0o700);
    symlink(elsewhere.join("token"), dir.join("a.yaml")).unwrap();
    symlink(elsewhere.join("private/list"), dir.join("b")).unwrap();
    symlink(elsewhere.join("private/yaml"), dir.join("c.yaml")).unwrap();
    write(&dir, &[("d.yaml", &format!("service: \"{SECRET} \"\nendpoints: [{SECRET}:x]\n"))]);
    mode(&dir.join("d.yaml"), 0o640);
    write(&dir, &[("open.yaml", "endpoints: [everybody-may-see-this]\n")]);
    mode(&dir.join("open.yaml"), 0o644);
    for quotes in [false, true] {
        let config = FileConfig { quotes_private_files: quotes, ..config(&dir) };
        let mut disk = Disk::new(config, Arc::default(), None);
        let all = ["a.yaml", "b", "c.yaml", "d.yaml", "open.yaml"].map(|file| dir.join(file));
        let scan = scan(&mut disk, &all, true);
        let said = format!("{:?} {:?}", scan.statement.problems, scan.statement.unusable);
        assert_eq!(said.contains(SECRET), quotes, "{said}");
        assert!(said.contains("everybody-may-see-this"), "{said}");
        for file in ["a.yaml", "b", "c.yaml", "d.yaml"] {
            let place = dir.join(file).display().to_string();
            assert!(
                scan.statement.problems.iter().any(|problem| *problem.place.file == *place),
                "{file}: {said}"
            );
        }
    }
}
