mod content;
mod disk;

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
    for (name, observed) in view.services() {
        let endpoints = observed.registration.endpoints.iter();
        let endpoints: Vec<_> = endpoints.map(|e| format!(" {}", e.address)).collect();
        let because = observed.because.as_ref().map(|because| format!(" ({because})")).unwrap_or_default();
        shown += &format!("{name} {}{}{because}\n", observed.state, endpoints.concat());
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
    let observed = live.views_until(|shown| shown.contains("10.0.0.9")).await;
    writer.join().unwrap();
    expect![[r#"
        orders fresh 10.0.0.1:80 10.0.0.2:80
        orders fresh 10.0.0.8:80 10.0.0.9:80
    "#]]
    .assert_eq(&observed.concat());
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
    let observed = live.views_until(|shown| shown.contains("10.0.0.3")).await;
    writer.join().unwrap();
    expect![[r#"
        orders fresh 10.0.0.1:80 10.0.0.2:80
        web fresh 10.0.1.1:80
        orders fresh 10.0.0.3:80
        web fresh 10.0.1.1:80
    "#]]
    .assert_eq(&observed.concat());
}

#[tokio::test]
async fn a_deleted_file_is_held() {
    let mut live = LiveSource::start(&[("orders.yaml", ORDERS), ("web", "10.0.1.1 80")]);
    live.until("orders fresh 10.0.0.1:80 10.0.0.2:80\nweb fresh 10.0.1.1:80").await;
    fs::remove_file(live.dir.join("orders.yaml")).unwrap();
    let observed = live.views_until(|shown| shown.contains("held")).await;
    expect![[r#"
        orders held 10.0.0.1:80 10.0.0.2:80 (`file` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 5m, in case the removal is a mistake)
        web fresh 10.0.1.1:80
        orders.yaml:1:1: `file` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 5m, in case the removal is a mistake
    "#]].assert_eq(observed.last().unwrap());
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
    let observed = live.views_until(|shown| shown.contains("STALE")).await;
    expect![[r#"
        orders stale 10.0.0.1:80 10.0.0.2:80 (discovery source `file:d` could not read d: it does not exist)
        STALE discovery source `file:d` could not read d: it does not exist
    "#]]
    .assert_eq(observed.last().unwrap());
    fs::create_dir(live.dir.join("d")).unwrap();
    let observed = live.views_until(|shown| shown.contains("mounted")).await;
    expect![[r#"
        orders stale 10.0.0.1:80 10.0.0.2:80 (discovery source `file:d`: d is empty and was not before: is something not mounted? If that is meant, leave one file in it that holds `[]`)
        STALE discovery source `file:d`: d is empty and was not before: is something not mounted? If that is meant, leave one file in it that holds `[]`
    "#]].assert_eq(observed.last().unwrap());
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
        DIR: the host has no watches left: raise fs.inotify.max_user_watches; until then the files are only read every 1s
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
        -.yaml:1:1: `service` is missing, and the name of the file cannot replace it: `-` is not a service name: 1 to 253 letters, digits, `.`, `_` or `-`, the first and the last a letter or a digit; nothing of this file is in force
        a/b/c/d/e/f/g/h: not read: nested deeper than 8 directories
        cut.json:1:49: the quote that begins here never ends; nothing of this file is in force
        dangling.yaml: a symbolic link to a path that does not exist; nothing of this file is in force
        huge.yaml: larger than 16 MiB, the most that is read; nothing of this file is in force
        latin1.yaml:1:17: the text is not UTF-8: byte 0xe4 belongs to no character; nothing of this file is in force
        loop: a symbolic link that leads back to itself; nothing of this file is in force
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
