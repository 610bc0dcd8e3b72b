//! Excluded units are left uncaptured from their first connection on. No systemd runs here: a script takes
//! the place of `systemctl`, and the test creates the control groups.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use vmesh_testkit::wait_for;

use crate::vm::{FakeAgent, RulesBackend, SOON, Vm, is_well};

/// A slice in which units are started; it is removed when the test ends.
struct Slice {
    root: PathBuf,
    name: String,
}

impl Slice {
    fn new() -> Slice {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
        let root = PathBuf::from(mount.split(' ').nth(1).unwrap());
        let slice = Slice { root, name: format!("vmeshunits{}.slice", std::process::id()) };
        fs::create_dir_all(slice.dir()).unwrap();
        slice
    }

    fn dir(&self) -> PathBuf {
        self.root.join(&self.name)
    }

    fn start(&self, unit: &str) -> PathBuf {
        let dir = self.dir().join(unit);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// Returns the name of the server that answers a program of the unit.
    fn call(&self, vm: &Vm, unit: &Path) -> String {
        let script = format!(
            "echo $$ >{}/cgroup.procs && exec 3<>/dev/tcp/{}/8080 && timeout 5 cat <&3; echo $$ >{}/cgroup.procs",
            unit.display(),
            vm.b.v4,
            self.root.display(),
        );
        let output = vm.a.command("bash").args(["-c", &script]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

impl Drop for Slice {
    fn drop(&mut self) {
        _ = Command::new("find")
            .arg(self.dir())
            .args(["-depth", "-type", "d", "-exec", "rmdir", "{}", ";"])
            .status();
    }
}

#[tokio::test]
async fn a_unit_that_is_left_out_is_so_from_its_first_connection_and_others_are_captured_soon() {
    let slice = Slice::new();
    let vm = Vm::new(RulesBackend::Nft).await;
    let says = format!("Names=backup.service\nControlGroup=\nSlice={}", slice.name);
    vm.script("systemctl", &format!("cat <<'.'\n{says}\n."));
    let spec = "{outbound: {capture: addresses, addresses: {\"SERVER\": {}}, exclude: {units: [backup.service]}}, \
        dead_man: {timeout: 3s}}";
    let mut agent = FakeAgent::new(&vm, spec).await;
    agent.capture().await;
    agent.well_until("the redirects to hold", is_well).await;
    assert_eq!(vm.get(8080).unwrap(), "mesh", "who is in no unit");

    // The unit starts and calls before vmesh-net has noticed it.
    let backup = slice.start("backup.service");
    for _ in 0..3 {
        assert_eq!(slice.call(&vm, &backup), "direct");
        agent.well().await;
    }
    // Another unit in the same slice is captured as soon as vmesh-net notices it, without waiting for a
    // timer.
    let web = slice.start("web.service");
    wait_for("the other unit to be captured", SOON, async || {
        agent.well().await;
        let who = slice.call(&vm, &web);
        if who == "mesh" { Ok(()) } else { Err(who) }
    })
    .await
    .unwrap();
    // The unit stays excluded after systemd reports its control group, and after a restart of the unit.
    let path = format!("/{}/backup.service", slice.name);
    vm.script(
        "systemctl",
        &format!("cat <<'.'\n{}\n.", says.replace("ControlGroup=", &format!("ControlGroup={path}"))),
    );
    for _ in 0..3 {
        agent.want.ports.insert(15_999);
        agent.want().await;
        assert_eq!(slice.call(&vm, &backup), "direct");
        fs::remove_dir(&backup).unwrap();
        fs::create_dir(&backup).unwrap();
        assert_eq!(slice.call(&vm, &backup), "direct", "started again");
        agent.well().await;
    }
    assert_eq!(vm.get(8080).unwrap(), "mesh");
}

/// A process that keeps creating control groups in a watched slice causes one reading of the host per second
/// at most, or two if a control group disappears between the reading and the change.
#[tokio::test]
async fn control_groups_that_come_and_go_all_the_time_do_not_keep_the_keeper_busy() {
    let slice = Slice::new();
    let vm = Vm::new(RulesBackend::Nft).await;
    let asked = vm.state_dir().join("asked");
    let says = format!("Names=backup.service\nControlGroup=\nSlice={}", slice.name);
    // Each reading of the host asks once for the SSH sockets.
    vm.script(
        "systemctl",
        &format!("case \"$*\" in *Listen*) echo x >>{};; *) cat <<'.'\n{says}\n.\n;; esac", asked.display()),
    );
    let spec = "{outbound: {capture: addresses, addresses: {\"SERVER\": {}}, exclude: {units: [backup.service]}}, \
        dead_man: {timeout: 3s}}";
    let mut agent = FakeAgent::new(&vm, spec).await;
    agent.capture().await;
    let readings = || fs::read_to_string(&asked).unwrap_or_default().lines().count();
    let before = readings();
    let begun = std::time::Instant::now();
    while begun.elapsed() < std::time::Duration::from_secs(6) {
        let unit = slice.start("web.service");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        fs::remove_dir(unit).unwrap();
    }
    let made = readings() - before;
    assert!((2..=16).contains(&made), "{made} readings in 6 s");
}
