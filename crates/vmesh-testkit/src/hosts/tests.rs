use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;

use super::*;

const SOON: Duration = Duration::from_secs(30);

#[test]
fn hosts_boot_reach_each_other_by_name_and_leave_nothing_behind() {
    let fleet = Fleet::new().unwrap();
    let started = Instant::now();
    let [a, b] = fleet.hosts(["web-1", "web-2"]).unwrap();
    eprintln!("two hosts booted in {:?}", started.elapsed());
    assert_eq!(a.exec(&["cat", "/proc/1/comm"]).unwrap().trim(), "systemd");
    assert_eq!(a.exec(&["hostname"]).unwrap().trim(), "web-1");
    assert_ne!(a.read("/etc/machine-id").unwrap(), b.read("/etc/machine-id").unwrap());
    assert_eq!(a.systemctl(&["list-units", "--failed", "--no-legend"]).unwrap(), "");
    a.exec(&["ping", "-c1", "-W5", "web-2"]).unwrap();
    a.exec(&["ping", "-6", "-c1", "-W5", &b.v6().to_string()]).unwrap();
    // A socket of the test on a host.
    let server = b.net.within(|| TcpListener::bind((b.v4(), 7000))).unwrap().unwrap();
    a.net.within(|| TcpStream::connect((b.v4(), 7000))).unwrap().unwrap();
    server.accept().unwrap();
    // The tools are on the PATH, as on any VM.
    a.sh("sysctl -w net.ipv4.ip_forward=1; nft add table inet x; nft list ruleset | grep -q 'table inet x'")
        .unwrap();
    a.sh("iptables -t nat -A OUTPUT -p tcp --dport 9 -j REDIRECT --to-ports 10; ip6tables-save >/dev/null")
        .unwrap();
    a.sh("test -f /sys/fs/cgroup/cgroup.controllers; systemd-run --wait --pipe -p DynamicUser=yes true")
        .unwrap();
    assert!(b.exec(&["nft", "list", "ruleset"]).unwrap().is_empty());
    let message = a.output(&["sh", "-c", "echo out; echo err >&2; exit 3"]).unwrap();
    assert_eq!(message.status.code(), Some(3));
    let error = a.exec(&["sh", "-c", "echo why >&2; exit 3"]).unwrap_err().to_string();
    assert!(error.contains("on web-1 failed (exit status: 3)") && error.contains("why"), "{error}");

    let output = a.ssh("hostname; echo $SSH_CONNECTION").output().unwrap();
    let message = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        message.starts_with("web-1\n10.88.255.254 "),
        "{message} {}",
        String::from_utf8_lossy(&output.stderr)
    );

    let (dir, name) = (fleet.inner.disk.dir.clone(), fleet.inner.disk.name.clone());
    drop((a, b, fleet));
    assert!(!dir.exists(), "{} is still there", dir.display());
    for group in machine::groups(&name).unwrap() {
        assert!(!group.exists(), "{} is still there", group.display());
    }
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&*dir.to_string_lossy()), "{mounts}");
}

#[test]
fn a_host_reboots_by_itself_and_after_a_power_cut_with_its_disk_and_without_its_rules() {
    let fleet = Fleet::new().unwrap();
    let host = fleet.host("db").unwrap();
    let boots =
        || host.sh("journalctl --list-boots --no-pager | grep -c '^ *-*[0-9]'").unwrap().trim().to_owned();
    assert_eq!(boots(), "1");
    let begin = || host.sh("nft add table inet x; echo kept >>/etc/kept; sync").unwrap();
    begin();
    host.reboot().unwrap();
    assert_eq!((boots(), host.exec(&["nft", "list", "ruleset"]).unwrap().as_str()), ("2".to_owned(), ""));
    begin();
    host.power_cut();
    assert!(host.exec(&["true"]).unwrap_err().to_string().starts_with("host db is not running"));
    assert_eq!(host.read("/etc/kept").unwrap(), "kept\nkept\n");
    host.power_on().unwrap();
    assert_eq!((boots(), host.exec(&["nft", "list", "ruleset"]).unwrap().as_str()), ("3".to_owned(), ""));
    assert_eq!(host.exec(&["cat", "/etc/kept"]).unwrap(), "kept\nkept\n");
    host.exec(&["ping", "-c1", "-W5", "10.88.255.254"]).unwrap();
    host.power_off().unwrap();
    host.power_on().unwrap();

    host.sh("mkdir /srv/small; echo old >/srv/small/old").unwrap();
    host.small_disk("/srv/small", "64k").unwrap();
    assert_eq!(host.exec(&["cat", "/srv/small/old"]).unwrap(), "old\n");
    host.fill_disk("/srv/small").unwrap();
    let full = host.sh("cp /etc/hostname /srv/small/new").unwrap_err().to_string();
    assert!(full.contains("No space left"), "{full}");
}

#[test]
fn a_unit_that_hangs_or_fails_is_shown_with_its_journal() {
    let fleet = Fleet::new().unwrap();
    let host = fleet.host("u").unwrap();
    host.write(
        "/etc/systemd/system/x.service",
        "[Service]\nExecStart=/bin/sh -c 'echo I am; exec sleep 99'\n",
    )
    .unwrap();
    host.systemctl(&["daemon-reload"]).unwrap();
    host.systemctl(&["start", "x"]).unwrap();
    host.wait_unit("x", "active", SOON).unwrap();
    assert!(host.main_pid("x").unwrap().is_some());
    let failed = host.wait_unit("x", "failed", Duration::from_millis(50)).unwrap_err().to_string();
    assert!(failed.contains("last seen: active") && failed.contains("I am"), "{failed}");
}

/// Marks the child process that is killed in [`what_a_killed_test_left_is_taken_away_by_the_next`].
const CHILD: &str = "VMESH_HOSTS_CHILD";

#[test]
fn what_a_killed_test_left_is_taken_away_by_the_next() {
    if std::env::var_os(CHILD).is_some() {
        let fleet = Fleet::new().unwrap();
        let _host = fleet.host("left").unwrap();
        println!("booted {}", fleet.inner.disk.name);
        sleep(Duration::from_secs(600));
        return;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([
        "--exact",
        "--nocapture",
        "hosts::tests::what_a_killed_test_left_is_taken_away_by_the_next",
    ]);
    command.env(CHILD, "1").stdout(std::process::Stdio::piped()).process_group(0);
    let mut child = command.spawn().unwrap();
    let out = std::io::BufReader::new(child.stdout.take().unwrap());
    let line = std::io::BufRead::lines(out).map_while(std::io::Result::ok).find_map(|line| {
        let at = line.find("booted ")?;
        line.get(at + "booted ".len()..).map(str::to_owned)
    });
    let name = line.expect("the other process booted a host");
    let dir = Path::new(RUN).join(&name);
    let running = RunningHost::all().into_iter().find(|running| running.owner == child.id()).unwrap();
    assert_eq!(running.host, "left");
    let output = running.command("hostname").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "left");
    child.kill().unwrap();
    child.wait().unwrap();
    // The kernel kills the host together with the process that started it.
    until("the host to be gone", SOON, || {
        let gone = !Path::new("/proc").join(running.leader.to_string()).exists();
        Ok(if gone { Ok(()) } else { Err("it runs") })
    })
    .unwrap();
    assert!(dir.exists());
    remove_leftover_fleets();
    assert!(!dir.exists() && !lock_path(&dir).exists());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&*dir.to_string_lossy()), "{mounts}");
    for group in machine::groups(&name).unwrap() {
        assert!(!group.exists(), "{} is still there", group.display());
    }
}
