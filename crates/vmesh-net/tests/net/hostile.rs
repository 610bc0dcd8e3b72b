//! Input that another local user controls is not trusted: control groups, program names, directories on the
//! PATH, connections.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmesh_net::client;
use vmesh_net::protocol::{Request, Response, State};
use vmesh_testkit::process::Daemon;

use crate::vm::{self, FakeAgent, MESH, RulesBackend, SOON, Vm, status};

/// A user's own subtree of control groups; it is removed when the test ends.
struct Subtree(PathBuf);

impl Subtree {
    fn new() -> Subtree {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let root = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
        let root = PathBuf::from(root.split(' ').nth(1).unwrap());
        let subtree = root.join(format!("user.slice-of-test-{}", std::process::id()));
        fs::create_dir_all(&subtree).unwrap();
        chown(&subtree, Some(vm::APP), Some(vm::APP)).unwrap();
        Subtree(subtree)
    }

    fn make(&self, below: &str) {
        let path = self.0.join(below);
        fs::create_dir_all(&path).unwrap();
        for dir in path.ancestors().take_while(|dir| *dir != self.0) {
            chown(dir, Some(vm::APP), Some(vm::APP)).unwrap();
        }
    }
}

impl Drop for Subtree {
    fn drop(&mut self) {
        fn remove(dir: &Path) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                if entry.metadata().is_ok_and(|metadata| metadata.is_dir()) {
                    remove(&entry.path());
                }
            }
            _ = fs::remove_dir(dir);
        }
        remove(&self.0);
    }
}

const EXCLUDES_A_UNIT: &str = "{outbound: {capture: addresses, addresses: {\"SERVER\": {}}, \
    exclude: {units: [backup.service]}}, dead_man: {timeout: 3s}}";

/// A user creates a directory in their own subtree whose name contains rules, and in it one with the name of
/// a unit that the agent's configuration names.
async fn hostile_folder(rules: RulesBackend) {
    let subtree = Subtree::new();
    subtree.make("user@4242.service/x\" return; tcp dport 443 redirect to :8443 #/backup.service");
    subtree.make("user@4242.service/y -j RETURN -A VMESH_OUTBOUND -p tcp --dport 443 -j REDIRECT --to-ports 8443/backup.service");
    subtree.make("user@4242.service/backup.service");
    let vm = Vm::new(rules).await;
    let mut agent = FakeAgent::new(&vm, EXCLUDES_A_UNIT).await;
    let captured = agent.capture().await;
    let ruleset = vm.ruleset();
    assert!(!ruleset.contains("8443"), "{ruleset}");
    assert!(!ruleset.contains("backup.service"), "{ruleset}");
    assert!(!ruleset.contains("4242"), "{ruleset}");
    assert!(captured.notes.iter().any(|note| note.contains("backup.service does not run")), "{captured:?}");
    assert_eq!(vm.get(8080).unwrap(), "mesh");
}

#[tokio::test]
async fn nothing_of_a_users_control_groups_reaches_the_kernel_by_nftables() {
    hostile_folder(RulesBackend::Nft).await;
}

#[tokio::test]
async fn nothing_of_a_users_control_groups_reaches_the_kernel_by_iptables() {
    hostile_folder(RulesBackend::Iptables).await;
}

/// systemd itself reports such names.
#[tokio::test]
async fn a_control_group_that_no_unit_can_have_is_refused_whoever_names_it() {
    let vm = Vm::new(RulesBackend::Nft).await;
    for path in [
        "/system.slice/x\" return; tcp dport 443 redirect to :8443 #/backup.service",
        "/system.slice/../user.slice/backup.service",
        "/system.slice/$(reboot)/backup.service",
        "/system.slice/a b/backup.service",
        "system.slice/backup.service",
    ] {
        let answer = format!("cat <<'.'\nNames=backup.service\nControlGroup={path}\nSlice=system.slice\n.");
        vm.script("systemctl", &answer);
        let mut agent = FakeAgent::new(&vm, EXCLUDES_A_UNIT).await;
        agent.want().await;
        let ruleset = vm.ruleset();
        assert!(!ruleset.contains("8443") && !ruleset.contains("backup.service"), "{path}: {ruleset}");
        agent.want.spec = Default::default();
        agent.want().await;
    }
}

/// A directory that another user can write to comes first on the PATH of vmesh-net, with programs of that
/// user.
#[tokio::test]
async fn a_program_that_another_user_could_have_put_there_is_not_run() {
    let mut vm = Vm::new(RulesBackend::Nft).await;
    let ran = vm.state_dir().join("ran");
    for name in ["nft", "getent", "systemctl", "iptables-save"] {
        vm.script(name, &format!("echo {name} >>{}", ran.display()));
    }
    chown(vm.programs(), Some(vm::APP), Some(vm::APP)).unwrap();
    vm.net.take().unwrap().kill().unwrap();
    fs::remove_file(&ran).ok();
    vm.start_net().await;
    let mut agent = FakeAgent::new(&vm, OPEN_TO_A_NAMED_USER).await;
    agent.capture().await;
    assert_eq!(vm.get(8080).unwrap(), "mesh");
    assert!(!ran.exists(), "{:?}", fs::read_to_string(&ran));

    // A program of another user in a directory of root, and programs that everybody may write to.
    chown(vm.programs(), Some(0), Some(0)).unwrap();
    chown(vm.programs().join("nft"), Some(vm::APP), Some(0)).unwrap();
    for name in ["getent", "systemctl", "iptables-save"] {
        fs::set_permissions(vm.programs().join(name), Permissions::from_mode(0o777)).unwrap();
    }
    vm.net.take().unwrap().kill().unwrap();
    vm.start_net().await;
    FakeAgent::new(&vm, OPEN_TO_A_NAMED_USER).await.want().await;
    assert!(!ran.exists(), "{:?}", fs::read_to_string(&ran));
}

const OPEN_TO_A_NAMED_USER: &str = "{outbound: {capture: addresses, addresses: {\"SERVER\": {}}, \
    exclude: {users: [nobody]}}, dead_man: {timeout: 3s}}";

/// A user's program calls itself `sshd` and listens on the port of a workload.
#[tokio::test]
async fn a_users_program_called_sshd_lifts_nothing_from_its_port() {
    const LISTENS: &str = "import socket, sys\nopen('/proc/self/comm', 'w').write('sshd')\n\
        server = socket.create_server(('0.0.0.0', 8080))\nprint('up', flush=True)\nserver.accept()\n";
    let vm = Vm::new(RulesBackend::Nft).await;
    let mut command = vm.a.command_as(vm::APP, "/usr/bin/python3");
    command.args(["-c", LISTENS]);
    let mut impostor = Daemon::spawn("sshd", command).unwrap();
    impostor.wait_line("up", SOON).await.unwrap();
    let mut agent = FakeAgent::new(&vm, "{inbound: {strict: [8080]}, dead_man: {timeout: 3s}}").await;
    let captured = agent.capture().await;
    assert!(captured.notes.iter().all(|note| !note.contains("SSH")), "{captured:?}");
    assert!(!strict_ssh(&vm).contains("8080"), "{}", strict_ssh(&vm));

    // A program of root with the same name, in a directory of root.
    let mut command = vm.a.command("/usr/bin/python3");
    command.args(["-c", &LISTENS.replace("8080", "8081")]);
    let mut roots = Daemon::spawn("sshd", command).unwrap();
    roots.wait_line("up", SOON).await.unwrap();
    agent.want.spec.inbound.strict.insert("8081".parse().unwrap());
    agent.capture().await;
    assert!(strict_ssh(&vm).contains("8081"), "{}", strict_ssh(&vm));

    // A program with the same name that root runs and another user can replace.
    let users = vm.state_dir().parent().unwrap().join("users");
    fs::create_dir(&users).unwrap();
    fs::copy("/usr/bin/python3", users.join("python3")).unwrap();
    for path in [users.clone(), users.join("python3")] {
        chown(path, Some(vm::APP), Some(vm::APP)).unwrap();
    }
    let mut command = vm.a.command(users.join("python3"));
    command.args(["-c", &LISTENS.replace("8080", "8082")]);
    let mut replaceable = Daemon::spawn("sshd", command).unwrap();
    replaceable.wait_line("up", SOON).await.unwrap();
    agent.want.spec.inbound.strict.insert("8082".parse().unwrap());
    agent.capture().await;
    let ssh = strict_ssh(&vm);
    assert!(ssh.contains("8081") && !ssh.contains("8082"), "{ssh}");
}

/// Returns the SSH ports in the rules for strict ports.
fn strict_ssh(vm: &Vm) -> String {
    let table = vm.nft(&["list", "table", "inet", "vmesh"]);
    table
        .split("set strict_ssh")
        .nth(1)
        .and_then(|rest| rest.split('}').next())
        .unwrap_or_default()
        .to_owned()
}

/// Idle connections of one local user do not keep Envoy's supervisor or another user from being answered.
#[tokio::test]
async fn idle_strangers_shut_nobody_out() {
    let vm = Vm::new(RulesBackend::Nft).await;
    fs::set_permissions(vm.socket(), Permissions::from_mode(0o666)).unwrap();
    let socket = vm.socket();
    let connect = |user: u32| {
        let socket = socket.clone();
        vm.a.within_as(user, move || UnixStream::connect(socket)).unwrap().unwrap()
    };
    let idle: Vec<_> = (0..64).map(|_| connect(vm::APP)).collect();
    let look = |user: u32| {
        let socket = socket.clone();
        vm.a.within_as(user, move || {
            use std::io::{Read, Write};
            let mut stream = UnixStream::connect(socket).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            _ = stream.write_all(b"{\"ask\":\"look\"}\n");
            let mut answer = [0; 4096];
            let len = stream.read(&mut answer).unwrap_or(0);
            String::from_utf8_lossy(answer.get(..len).unwrap()).into_owned()
        })
        .unwrap()
    };
    assert!(look(MESH).contains("status"), "Envoy's user");
    assert!(look(vm::APP + 1).contains("status"), "another stranger");
    assert!(look(vm::APP).contains("status"), "the same stranger");
    drop(idle);
}

/// A configuration with too many names starts a limited number of lookups, and is refused with a reason.
#[tokio::test]
async fn more_names_than_are_looked_up_are_refused() {
    let vm = Vm::new(RulesBackend::Nft).await;
    let ran = vm.state_dir().join("ran");
    vm.script("getent", &format!("echo x >>{}\nexit 2", ran.display()));
    let mut agent = FakeAgent::new(&vm, vm::OPEN).await;
    for number in 0..20_000 {
        agent.want.spec.outbound.exclude.users.insert(format!("app{number}").parse().unwrap());
    }
    let Response::Refused(why) = agent.want().await else { panic!("20,000 names were looked up") };
    assert!(why.contains("it names 20000 users and groups") && why.contains("numbers"), "{why}");
    let started = fs::read_to_string(&ran).unwrap_or_default().lines().count();
    assert!(started <= 256, "{started}");
    let Response::Status(now) = client::ask(&vm.socket(), &Request::Status).await.unwrap() else { panic!() };
    assert_eq!(now.state, State::Off);
    // Numbers need no lookup.
    agent.want.spec.outbound.exclude.users =
        (0..3_000).map(|number: u32| number.to_string().parse().unwrap()).collect();
    assert_eq!(status(agent.want().await).state, State::Trial);
}

/// The checksum detects a damaged state file.
#[tokio::test]
async fn a_state_that_was_damaged_is_noticed_by_its_checksum() {
    let mut vm = Vm::new(RulesBackend::Nft).await;
    let mut agent = FakeAgent::new(&vm, vm::CLOSED).await;
    agent.capture().await;
    let path = vm.state_dir().join("state.json");
    vm.net.take().unwrap().kill().unwrap();
    let text = fs::read_to_string(&path).unwrap();
    let damaged = text.replacen("\"closed\"", "\"open\"", 1);
    assert_ne!(damaged, text);
    fs::write(&path, damaged).unwrap();
    vm.start_net().await;
    vm.says("the checksum of ").await;
    assert_eq!(vm.get(8080).unwrap(), "mesh", "the rules stay until the agent speaks");
    FakeAgent::new(&vm, vm::CLOSED).await.capture().await;
}
