//! The facts of a host, and the tools that work on it.

use std::process::Command;
use std::time::Duration;

use vmesh_capture::apply::{Applier, Backend};
use vmesh_capture::facts::{HostPaths, OwnTraffic};
use vmesh_capture::host::{AccountNumber, Cgroup, HostMemory};
use vmesh_testkit::wait_for;

use crate::cgroup::TestCgroup;
use crate::vm::{BackendKind, Connection, ENVOY, SOON, Vm, printed};

#[tokio::test]
async fn a_host_knows_its_ssh_daemon_its_units_and_what_goes_through_redirects() {
    let vm = Vm::new(BackendKind::Nft);
    let group = TestCgroup::new();
    let dir = vmesh_testkit::tempdir().unwrap();
    let sshd = dir.join("sshd");
    // The kernel names the process after this file, as it does for the real sshd.
    let python = printed(Command::new("python3").args(["-c", "import sys; print(sys.executable)"]));
    let script = format!(
        "#!{}\nimport socket\nserver = socket.create_server(('10.88.0.1', 2222))\nprint('up', flush=True)\n\
         conn, _ = server.accept()\nconn.recv(1)\n",
        python.trim()
    );
    std::fs::write(&sshd, script).unwrap();
    std::fs::set_permissions(&sshd, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut daemon = vmesh_testkit::process::Daemon::spawn("sshd", vm.a.command(&sshd)).unwrap();
    daemon.wait_line("up", SOON).await.unwrap();

    // No systemd runs here, so a script takes the place of `systemctl`.
    let systemctl = dir.join("systemctl");
    let text = format!(
        "#!/bin/sh\ncase \"$*\" in *Listen*) exit 0;; esac\ncat <<'.'\nNames=app.service\nControlGroup=/{0}/app.service\n\n\
         Names={0}\nControlGroup=/{0}\n\nNames=no-such.service\nControlGroup=\n.\n",
        group.slice()
    );
    std::fs::write(&systemctl, text).unwrap();
    std::fs::set_permissions(&systemctl, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let host_paths = HostPaths {
        net: format!("/proc/{}", daemon.pid()).into(),
        ssh: dir.join("none"),
        systemctl,
        ..HostPaths::default()
    };
    let spec = vmesh_model::load::strict(
        "spec.yaml",
        "outbound: {capture: all, include: {users: [root, no-such-user], units: [app.service, no-such.service]}}",
    );
    let own = OwnTraffic {
        users: [ENVOY].into(),
        slices: [group.slice().parse().unwrap()].into(),
        ..OwnTraffic::default()
    };
    let host = host_paths.read_host(&spec.unwrap(), &own, &HostMemory::default()).await;
    assert_eq!(host.never.ssh, [2222].into());
    assert_eq!(
        host.never.slices,
        [Cgroup { path: group.slice().parse().unwrap(), id: group.slice_id() }].into()
    );
    assert_eq!(host.users, [("root".to_owned(), AccountNumber::Now(0))].into());
    assert!(host.ipv6);
    assert_eq!(host.units, [("app.service".parse().unwrap(), group.cgroup())].into());

    assert_eq!(host_paths.count_redirected(), 0);
    let (_app, _envoy) = (vm.app_at_b(8080), vm.outbound_envoy());
    vm.capture("outbound: {capture: all}").await;
    let call = Connection::open(&vm.a, vm.at_b(8080)[1]);
    assert_eq!((call.who.as_str(), host_paths.count_redirected()), ("envoy", 1));
    drop(call);
    wait_for("nobody", SOON, async || (host_paths.count_redirected() == 0).then_some(())).await.unwrap();
}

#[tokio::test]
async fn the_backend_that_works_is_found_and_asking_changes_nothing() {
    let vm = Vm::new(BackendKind::IptablesNft);
    let before = vm.ruleset();
    let mut tools = vm.applier.tools.clone();
    assert_eq!(Applier::detect(tools.clone(), true).await.unwrap().backend, Backend::Nft);
    tools.nft = "/no/such/nft".into();
    assert_eq!(Applier::detect(tools.clone(), true).await.unwrap().backend, Backend::Iptables);
    assert_eq!(vm.ruleset(), before);
    tools.ip6tables_save = "/no/such/save".into();
    assert_eq!(Applier::detect(tools.clone(), false).await.unwrap().backend, Backend::Iptables);
    let error = Applier::detect(tools, true).await.unwrap_err().to_string();
    assert!(error.starts_with("could not run `/no/such/nft"), "{error}");
}

#[tokio::test]
async fn a_tool_that_is_missing_or_hangs_is_named_with_what_was_attempted() {
    let mut vm = Vm::new(BackendKind::Nft);
    vm.applier.tools.nft = "/no/such/nft".into();
    let error = vm.applier.read().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "could not run `/no/such/nft -j list table inet vmesh` to list the rules; check that it is installed and that this process may run it"
    );
    let dir = vmesh_testkit::tempdir().unwrap();
    let slow = dir.join("nft");
    std::fs::write(&slow, "#!/bin/sh\nexec sleep 1000\n").unwrap();
    std::fs::set_permissions(&slow, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    vm.applier.tools.nft = slow;
    vm.applier.tools.timeout = Duration::from_millis(100);
    let error = vm.applier.read().await.unwrap_err().to_string();
    assert!(error.contains("did not end within 100ms and was killed"), "{error}");
    assert_eq!(vm.applier.backend, Backend::Nft);
}
