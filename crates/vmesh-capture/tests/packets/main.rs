//! Tests with real packets: where connections end up under the rules of nftables and of both kinds of
//! iptables. The hosts are network namespaces; the tools and the kernel are real.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod any;
mod vm;

use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use vm::{BackendKind, Connection, ENVOY, SOON, Server, Vm, printed, transparent_envoy};
use vmesh_capture::apply::{Applier, Backend};
use vmesh_capture::confirm::{Commit, CommitRecord, ProposalOutcome};
use vmesh_capture::facts::{HostPaths, OwnTraffic};
use vmesh_capture::host::{AccountNumber, Cgroup, HostMemory};
use vmesh_capture::{Program, Spec, Stage};
use vmesh_testkit::wait_for;

/// Defines one test for each backend.
macro_rules! with_every_backend {
    ($($(#[$attribute:meta])* async fn $name:ident($vm:ident: Vm) $body:block)+) => {$(
        mod $name {
            use super::*;

            async fn check($vm: Vm) $body

            #[tokio::test]
            async fn by_nftables() {
                check(Vm::new(BackendKind::Nft)).await;
            }

            #[tokio::test]
            async fn by_iptables() {
                check(Vm::new(BackendKind::IptablesNft)).await;
            }

            #[tokio::test]
            async fn by_legacy_iptables() {
                check(Vm::new(BackendKind::IptablesLegacy)).await;
            }
        }
    )+};
}

const VIPS: [&str; 2] = ["240.240.0.10:80", "[fdfe::10]:80"];

fn vips() -> [SocketAddr; 2] {
    VIPS.map(|vip| vip.parse().unwrap())
}

/// Formats an `addresses: {...}` map with both addresses of `b`.
fn addresses(vm: &Vm, port: u16, of: &str) -> String {
    let list: Vec<String> = vm.at_b(port).iter().map(|to| format!("'{to}': {of}")).collect();
    format!("{{{}}}", list.join(", "))
}

with_every_backend! {
    async fn virtual_addresses_reach_envoy_and_nothing_else_does(vm: Vm) {
        let (_app, _envoy) = (vm.app_at_b(80), vm.outbound_envoy());
        assert_ne!(vm.call(vips()[0]), "envoy");
        vm.capture(&format!("outbound: {{capture: vip, vips: {VIPS:?}}}")).await;
        for vip in vips() {
            assert_eq!(vm.call(vip), "envoy");
            let mut other_port = vip;
            other_port.set_port(81);
            assert_ne!(vm.call(other_port), "envoy");
            // Envoy itself connects to a virtual address if that is all it resolves.
            assert_ne!(vm.call_as(ENVOY, vip), "envoy");
        }
        for to in vm.at_b(80) {
            assert_eq!(vm.call(to), "app");
        }
    }

    async fn real_addresses_reach_envoy_and_their_other_ports_do_not(vm: Vm) {
        let _servers = (vm.app_at_b(8080), vm.app_at_b(8081), vm.outbound_envoy());
        vm.capture(&format!("outbound: {{capture: addresses, addresses: {}}}", addresses(&vm, 8080, "{}"))).await;
        for (captured, direct) in vm.at_b(8080).into_iter().zip(vm.at_b(8081)) {
            assert_eq!(vm.call(captured), "envoy");
            assert_eq!(vm.call(direct), "app");
            assert_eq!(vm.call_as(ENVOY, captured), "app");
        }
    }

    async fn everything_reaches_envoy_but_what_is_excluded_and_what_never_may(vm: Vm) {
        let mut vm = vm;
        let ports = [22, 2222, 53, 8080, 8081, 9000, 15012];
        let _apps = (ports.map(|port| vm.app_at_b(port)), vm.app_at_a(7000), vm.outbound_envoy());
        vm.facts.never.ssh.insert(2222);
        vm.facts.never.control_planes.extend(vm.at_b(15012));
        vm.capture("outbound: {capture: all, exclude: {ports: [8081, 9000-9100], users: [4001], groups: [4002]}}").await;
        for ip in vm.b.addresses() {
            let at = |port| SocketAddr::new(ip, port);
            assert_eq!(vm.call(at(8080)), "envoy");
            assert_eq!(vm.call_as(4003, at(8080)), "envoy");
            for never in [22, 2222, 53, 15012] {
                assert_eq!(vm.call(at(never)), "app", "{}", at(never));
            }
            for excluded in [8081, 9000] {
                assert_eq!(vm.call(at(excluded)), "app");
            }
            for excluded in [4001, 4002, ENVOY] {
                assert_eq!(vm.call_as(excluded, at(8080)), "app");
            }
        }
        // The host itself, under each of its addresses.
        let mut own: Vec<SocketAddr> = vm.at_a(7000).into();
        own.extend(["127.0.0.1:7000", "127.9.9.9:7000", "[::1]:7000"].map(|to| to.parse::<SocketAddr>().unwrap()));
        for to in own {
            assert_eq!(vm.call(to), "app", "{to}");
        }
    }

    async fn what_is_excluded_by_network_or_interface_is_left_alone(vm: Vm) {
        let _servers = (vm.app_at_b(8080), vm.outbound_envoy());
        let [v4, v6] = vm.at_b(8080);
        vm.capture("outbound: {capture: all, exclude: {cidrs: [10.88.0.0/16, 10.88.0.0/24, fd99::/16]}}").await;
        assert_eq!((vm.call(v4), vm.call(v6)), ("app".to_owned(), "envoy".to_owned()));
        vm.capture("outbound: {capture: all, exclude: {interfaces: [eth0, docker0]}}").await;
        assert_eq!((vm.call(v4), vm.call(v6)), ("app".to_owned(), "app".to_owned()));
        vm.capture("outbound: {capture: all, exclude: {interfaces: [docker0]}}").await;
        assert_eq!((vm.call(v4), vm.call(v6)), ("envoy".to_owned(), "envoy".to_owned()));
    }

    async fn what_is_included_is_all_that_is_captured(vm: Vm) {
        let _servers = (vm.app_at_b(8080), vm.app_at_b(8081), vm.outbound_envoy());
        let b = &vm.b;
        vm.capture(&format!(
            "outbound: {{capture: all, include: {{ports: [8080], cidrs: [{}, {}], users: [4001], groups: [4002]}}}}", b.v4, b.v6,
        )).await;
        for (included, other) in vm.at_b(8080).into_iter().zip(vm.at_b(8081)) {
            assert_eq!(vm.call_as(4001, included), "envoy");
            assert_eq!(vm.call_as(4002, included), "envoy");
            assert_eq!(vm.call_as(4003, included), "app");
            assert_eq!(vm.call_as(4001, other), "app");
        }
        vm.capture("outbound: {capture: all, include: {ports: [8080], cidrs: [10.1.0.0/16], interfaces: [eth0]}}").await;
        assert_eq!(vm.call(vm.at_b(8080)[0]), "app");
        vm.capture("outbound: {capture: all, include: {ports: [8080], cidrs: [10.88.0.0/16], interfaces: [eth0]}}").await;
        assert_eq!(vm.call(vm.at_b(8080)[0]), "envoy");
        assert_eq!(vm.call(vm.at_b(8080)[1]), "app");
    }

    async fn units_are_told_apart_also_after_one_is_made_anew(vm: Vm) {
        let mut vm = vm;
        let _servers = (vm.app_at_b(8080), vm.outbound_envoy());
        let group = TestCgroup::new();
        let yaml = "outbound: {capture: all, include: {units: [app.service]}}";
        let unit = "app.service".parse().unwrap();
        vm.facts.units.insert(unit, group.cgroup());
        let address = vm.at_b(8080)[0];
        vm.capture(yaml).await;
        assert_eq!((group.call(&vm, address), vm.call(address)), ("envoy".to_owned(), "app".to_owned()));
        assert!(vm.capture(yaml).await.is_empty());

        group.make_anew();
        vm.facts.units.insert("app.service".parse().unwrap(), group.cgroup());
        let mended = vm.capture(yaml).await;
        assert!(mended.changes.iter().any(|change| change.what.contains("include_unit_0")), "{mended}");
        assert_eq!((group.call(&vm, address), vm.call(address)), ("envoy".to_owned(), "app".to_owned()));

        // A slice that is never captured, and a control group below it.
        vm.facts.never.slices.insert(Cgroup { path: group.slice().parse().unwrap(), id: group.slice_id() });
        vm.capture("outbound: {capture: all}").await;
        assert_eq!((group.call(&vm, address), vm.call(address)), ("app".to_owned(), "envoy".to_owned()));
    }

    async fn a_unit_that_is_left_out_is_so_from_its_first_connection(vm: Vm) {
        let mut vm = vm;
        let _servers = (vm.app_at_b(8080), vm.outbound_envoy());
        let group = TestCgroup::new();
        let other = group.child("other.service");
        let yaml = format!("outbound: {{capture: all, vips: {VIPS:?}, exclude: {{units: [app.service]}}}}");
        let slice = Cgroup { path: group.slice().parse().unwrap(), id: group.slice_id() };
        let parent_cgroup = |group: &TestCgroup| vmesh_capture::host::ParentCgroup {
            cgroup: Some(slice.clone()),
            children: [other.clone(), group.cgroup()].into(),
        };
        vm.facts.units.insert("app.service".parse().unwrap(), group.cgroup());
        vm.facts.parent_cgroups = vec![parent_cgroup(&group)];
        let address = vm.at_b(8080)[0];
        vm.capture(&yaml).await;
        assert_eq!(group.call(&vm, address), "app");
        assert_eq!(group.call_in("other.service", &vm, address), "envoy", "who is not left out");
        assert_eq!(vm.call(address), "envoy", "who is elsewhere");
        // The unit restarts, and the rules do not know its new control group yet.
        group.make_anew();
        assert_eq!(group.call(&vm, address), "app");
        assert_eq!(group.call(&vm, vips()[0]), "envoy", "a virtual address leads nowhere else");
        // The rules learn the new control group.
        vm.facts.units.insert("app.service".parse().unwrap(), group.cgroup());
        vm.facts.parent_cgroups = vec![parent_cgroup(&group)];
        vm.capture(&yaml).await;
        assert!(vm.capture(&yaml).await.is_empty());
        assert_eq!(group.call(&vm, address), "app");
        let newcomer = group.child("new.service");
        assert_eq!(group.call_in("new.service", &vm, address), "app");
        vm.facts.parent_cgroups.first_mut().unwrap().children.insert(newcomer);
        vm.capture(&yaml).await;
        assert_eq!(group.call_in("new.service", &vm, address), "envoy");
    }

    async fn a_share_of_connections_is_captured(vm: Vm) {
        let _servers = (vm.app_at_b(8080), vm.app_at_b(8081), vm.outbound_envoy());
        // The count is binomially distributed. For 500 calls and 20 % the mean is 100 and the standard
        // deviation 9, so these limits fail less than once in 10^7 runs.
        vm.capture(&format!(
            "outbound: {{capture: all, percent: 20, addresses: {}, dial: {{users: {{4001: 0}}}}}}",
            addresses(&vm, 8081, "{percent: 80}")
        )).await;
        for (few, most) in vm.at_b(8080).into_iter().zip(vm.at_b(8081)) {
            assert!((50..=160).contains(&vm.share(500, few)));
            assert!((340..=450).contains(&vm.share(500, most)));
            assert_eq!(vm.call_as(4001, most), "app");
        }
        vm.capture("outbound: {capture: all, dial: {users: {4001: 20}}}").await;
        let mine = vm.a.within_as(4001, || ()).map(|()| (0..300).filter(|_| vm.call_as(4001, vm.at_b(8080)[0]) == "envoy").count());
        assert!((15..=120).contains(&mine.unwrap()));
        assert_eq!(vm.share(50, vm.at_b(8080)[0]), 50);
    }

    async fn open_connections_survive_on_change_and_off(vm: Vm) {
        let _servers = (vm.app_at_b(8080), vm.outbound_envoy());
        for to in vm.at_b(8080) {
            let mut older = Connection::open(&vm.a, to);
            vm.capture("outbound: {capture: all}").await;
            assert!(older.works() && older.who == "app");
            let mut redirected = Connection::open(&vm.a, to);
            assert_eq!(redirected.who, "envoy");
            // The first change affects set elements only, the next ones affect rules.
            vm.capture(&format!("outbound: {{capture: all, vips: ['{}']}}", vips()[0])).await;
            vm.capture(&format!("outbound: {{capture: all, vips: {VIPS:?}}}")).await;
            vm.capture("outbound: {capture: all, exclude: {ports: [8080]}}").await;
            let mut direct = Connection::open(&vm.a, to);
            assert!(redirected.works() && older.works() && direct.works() && direct.who == "app");
            vm.capture("outbound: {capture: all}").await;
            assert!(redirected.works() && older.works() && direct.works());
            vm.bring(&Program::drained(true)).await;
            assert_eq!(vm.call(to), "app");
            assert!(redirected.works() && older.works() && direct.works());
            vm.applier.off(None).await.unwrap();
            assert!(older.works() && direct.works());
            assert_eq!(vm.call(to), "app");
        }
    }

    async fn a_dead_man_that_nobody_refreshes_lets_connections_go_past_envoy(vm: Vm) {
        let (_app, envoy) = (vm.app_at_b(8080), vm.outbound_envoy());
        let yaml = format!(
            "outbound: {{capture: all, addresses: {}}}\ndead_man: {{timeout: 3s}}",
            addresses(&vm, 8081, "{on_loss: closed}")
        );
        let _other = vm.app_at_b(8081);
        let program = vm.program(&yaml, Stage::Confirmed);
        let timeout = "3s".parse().unwrap();
        vm.applier.reconcile(&program, Some(timeout)).await.unwrap();
        let [to, to6] = vm.at_b(8080);
        assert_eq!((vm.call(to), vm.call(to6)), ("envoy".to_owned(), "envoy".to_owned()));
        drop(envoy);
        wait_for("the dead-man", SOON, async || (vm.call(to) == "app" && vm.call(to6) == "app").then_some(())).await.unwrap();
        for closed in vm.at_b(8081) {
            assert_eq!(vm.call(closed), "refused");
        }
        let envoy = vm.outbound_envoy();
        // The loop lasts longer than one timeout.
        for _ in 0..8 {
            vm.applier.renew_all_timers(timeout).await.unwrap();
            assert_eq!((vm.call(to), vm.call(to6)), ("envoy".to_owned(), "envoy".to_owned()));
            tokio::time::sleep(Duration::from_millis(600)).await;
        }
        vm.applier.renew_all_timers("10m".parse().unwrap()).await.unwrap();
        vm.applier.expire_timers(vmesh_capture::Directions::BOTH).await.unwrap();
        assert_eq!((vm.call(to), vm.call(to6)), ("app".to_owned(), "app".to_owned()));
        drop(envoy);
    }

    async fn in_a_trial_everything_lapses(vm: Vm) {
        let _apps = (vm.app_at_b(8080), vm.app_at_a(3306), vm.app_at_a(3307));
        let yaml = "outbound: {capture: all, on_loss: closed}\n\
                    inbound: {capture: redirect, ports: [3306], strict: [3306, 3307], on_loss: closed}";
        vm.bring(&vm.program(yaml, Stage::Trial)).await;
        assert_eq!(vm.call(vm.at_b(8080)[0]), "refused");
        vm.applier.expire_timers(vmesh_capture::Directions::BOTH).await.unwrap();
        assert_eq!(vm.call(vm.at_b(8080)[0]), "app");
        for to in [vm.at_a(3306), vm.at_a(3307)].concat() {
            assert_eq!(vm.call_from_b(to), "app");
        }
        vm.capture(yaml).await;
        assert_eq!(vm.call(vm.at_b(8080)[0]), "refused");
        for to in [vm.at_a(3306), vm.at_a(3307)].concat() {
            assert_eq!(vm.call_from_b(to), "refused");
            assert_eq!(vm.call(to), "app");
        }
    }

    async fn inbound_connections_are_redirected_but_for_ssh_and_excluded_sources(vm: Vm) {
        let mut vm = vm;
        let c = vm.switch.host().unwrap();
        let _apps = ([22, 2222, 8080, 8081, 15020].map(|port| vm.app_at_a(port)), Server::new(&vm.a, "[::]:15006".parse().unwrap(), "envoy"));
        vm.facts.never.ssh.insert(2222);
        let spec = "ports: [8080], exclude: {cidrs: [10.88.0.3, fd88::3]}";
        vm.capture(&format!("inbound: {{capture: redirect, {spec}}}")).await;
        for (captured, ssh) in vm.at_a(8080).into_iter().zip(vm.at_a(22)) {
            assert_eq!(vm.call_from_b(captured), "envoy");
            assert_eq!(Connection::open(&c, captured).who, "app");
            assert_eq!(vm.call_from_b(ssh), "app");
            // The host itself is not captured.
            assert_eq!(vm.call(captured), "app");
        }
        for direct in vm.at_a(8081) {
            assert_eq!(vm.call_from_b(direct), "app");
        }
        // SSH and the own ports stay excluded even if a spec names all ports.
        let everything: Spec =
            vmesh_model::load::strict("spec.yaml", "inbound: {capture: redirect, ports: [1-65535], strict: [1-65535]}").unwrap();
        let (program, notes) = Program::new(&everything, &vm.facts, Stage::Confirmed).unwrap();
        assert_eq!(notes.len(), 10, "{notes:?}");
        vm.bring(&program).await;
        for never in [22, 2222, 15020] {
            for to in vm.at_a(never) {
                assert_eq!(vm.call_from_b(to), "app");
            }
        }
        for to in vm.at_a(8081) {
            assert_eq!(vm.call_from_b(to), "envoy");
        }
    }

    async fn a_strict_port_is_closed_to_others_when_envoy_is_gone_and_an_open_one_is_not(vm: Vm) {
        let _apps = [3306, 8080, 9090].map(|port| vm.app_at_a(port));
        let envoy = Server::new(&vm.a, "[::]:15006".parse().unwrap(), "envoy");
        vm.capture("inbound: {capture: redirect, ports: [3306, 8080], strict: [3306, 9090]}").await;
        for (strict, open) in vm.at_a(3306).into_iter().zip(vm.at_a(8080)) {
            assert_eq!((vm.call_from_b(strict), vm.call_from_b(open)), ("envoy".to_owned(), "envoy".to_owned()));
        }
        drop(envoy);
        vm.applier.expire_timers(vmesh_capture::Directions::BOTH).await.unwrap();
        for (strict, open) in vm.at_a(3306).into_iter().zip(vm.at_a(8080)) {
            assert_eq!((vm.call_from_b(strict), vm.call_from_b(open)), ("refused".to_owned(), "app".to_owned()));
            assert_eq!(vm.call(strict), "app");
        }
        // A strict port that is not captured is closed to other hosts as well.
        for to in vm.at_a(9090) {
            assert_eq!((vm.call_from_b(to), vm.call(to)), ("refused".to_owned(), "app".to_owned()));
        }
    }

    async fn tproxy_keeps_the_callers_address_and_is_passed_by_when_envoy_is_gone(vm: Vm) {
        let _apps = [22, 8080].map(|port| vm.app_at_a(port));
        let mut older = Connection::open(&vm.b, vm.at_a(8080)[0]);
        let mut envoy = transparent_envoy(&vm.a).await;
        vm.capture("inbound: {capture: tproxy, ports: [8080]}").await;
        assert!(older.works());
        let mut captured = Vec::new();
        for (to, ip) in vm.at_a(8080).into_iter().zip(vm.b.addresses()) {
            let call = Connection::open(&vm.b, to);
            assert_eq!((call.who.as_str(), call.from, call.to), ("envoy", ip, to));
            assert_eq!(vm.call(to), "app");
            captured.push(call);
        }
        for to in vm.at_a(22) {
            assert_eq!(vm.call_from_b(to), "app");
        }
        // Captured connections survive the removal of the rules and the end of the dead-man timer.
        vm.applier.expire_timers(vmesh_capture::Directions::BOTH).await.unwrap();
        for to in vm.at_a(8080) {
            assert_eq!(vm.call_from_b(to), "app");
        }
        assert!(captured.iter_mut().all(Connection::works) && older.works());
        vm.applier.renew_all_timers("10m".parse().unwrap()).await.unwrap();
        vm.capture("inbound: {capture: tproxy, ports: [8080, 8081]}").await;
        assert!(captured.iter_mut().all(Connection::works) && older.works());
        vm.applier.off(None).await.unwrap();
        assert!(captured.iter_mut().all(Connection::works) && older.works());

        vm.capture("inbound: {capture: tproxy, ports: [8080]}").await;
        envoy.kill().unwrap();
        for to in vm.at_a(8080) {
            // With iptables, packets are lost until the dead-man timer lapses.
            let passed_by = if vm.kind == BackendKind::Nft { "app" } else { "nobody" };
            assert_eq!(vm.call_from_b(to), passed_by);
        }
        vm.applier.expire_timers(vmesh_capture::Directions::BOTH).await.unwrap();
        for to in vm.at_a(8080) {
            assert_eq!(vm.call_from_b(to), "app");
        }
    }

    async fn strict_tproxy_fails_closed(vm: Vm) {
        let _app = vm.app_at_a(3306);
        let mut envoy = transparent_envoy(&vm.a).await;
        vm.capture("inbound: {capture: tproxy, ports: [3306], strict: [3306]}").await;
        for to in vm.at_a(3306) {
            assert_eq!(vm.call_from_b(to), "envoy");
        }
        envoy.kill().unwrap();
        for to in vm.at_a(3306) {
            assert_eq!((vm.call_from_b(to), vm.call(to)), ("nobody".to_owned(), "app".to_owned()));
        }
        vm.applier.expire_timers(vmesh_capture::Directions::BOTH).await.unwrap();
        assert_eq!(vm.call_from_b(vm.at_a(3306)[0]), "nobody");
    }

    async fn a_host_is_after_off_byte_by_byte_what_it_was_before(vm: Vm) {
        let everything = "outbound: {capture: all, vips: ['240.0.0.1:80', '[fd00::1]:80'], percent: 50, dial: {users: {7: 1}}, \
            exclude: {ports: [1-9], cidrs: [10.9.0.0/16, fd00::/8], interfaces: [docker0], users: [9], groups: [9]}}\n\
            inbound: {capture: MODE, ports: [8080], strict: [3306]}";
        let all = || ["redirect", "tproxy"].map(|mode| everything.replace("MODE", mode));
        // The first round begins with the ruleset of a fresh boot, the second one with rules of other
        // programs, iptables included.
        for others in [false, true] {
            if others {
                have_other_rules(&vm);
            }
            let before = vm.ruleset();
            let footprint = vm.applier.footprint().await.unwrap();
            for yaml in all() {
                vm.capture(&yaml).await;
                assert_ne!(vm.ruleset(), before);
            }
            vm.bring(&Program::drained(true)).await;
            vm.applier.off(footprint.as_ref()).await.unwrap();
            if vm.kind == BackendKind::IptablesLegacy && !others {
                // A legacy table that was used stays behind, empty, until the kernel restarts.
                let after = vm.ruleset();
                assert!(after.lines().all(|line| line.starts_with(['*', ':']) || line.trim() == "COMMIT"), "{after}");
            } else {
                assert_eq!(vm.ruleset(), before);
            }
            assert!(vm.applier.off(footprint.as_ref()).await.unwrap().is_empty());
        }
    }

    async fn drift_is_named_and_mended(vm: Vm) {
        let _servers = (vm.app_at_b(8080), vm.outbound_envoy());
        let [to, _] = vm.at_b(8080);
        let yaml = format!("outbound: {{capture: all, vips: {VIPS:?}}}\ninbound: {{capture: redirect, ports: [8080]}}");
        vm.capture(&yaml).await;
        assert!(vm.capture(&yaml).await.is_empty());
        let damages: &[(&str, &str)] = match vm.kind {
            BackendKind::Nft => &[
                ("nft delete table inet vmesh", "+ table inet vmesh"),
                ("nft flush ruleset", "+ table inet vmesh"),
                ("nft insert rule inet vmesh outbound accept", "! outbound: a rule that is not ours"),
                ("nft flush chain inet vmesh to_100", "+ to_100/everything"),
                ("nft flush set inet vmesh captured_vips4", "~ set captured_vips4: its elements (IPv4)"),
                ("nft add element inet vmesh outbound_ssh '{ 8000-9000 }'", "~ set outbound_ssh: its elements"),
                ("nft add chain inet vmesh mine", "- chain mine"),
                ("nft add set inet vmesh mine '{ type mark; }'; nft add set inet vmesh yours '{ type uid; }'", "- set mine"),
            ],
            _ => &[
                ("iptables-restore </dev/null; F=$(iptables-save | grep -- '-j VMESH_OUTBOUND' | sed 's/^-A/-D/'); \
                  printf '*nat\n%s\nCOMMIT\n' \"$F\" | iptables-restore --noflush", "+ ip nat OUTPUT: the jump to us is not there"),
                ("printf '*nat\n-I OUTPUT 1 -p udp -j ACCEPT\nCOMMIT\n' | iptables-restore --noflush", "~ ip nat OUTPUT: the jump to us is not first"),
                ("printf '*nat\n-I VMESH_OUTBOUND 1 -j ACCEPT\nCOMMIT\n' | ip6tables-restore --noflush", "! ip6 nat VMESH_OUTBOUND: a rule that is not ours"),
                ("printf '*nat\n-F VMESH_TO_100\nCOMMIT\n' | iptables-restore --noflush", "+ ip nat VMESH_TO_100/everything"),
                ("printf '*nat\n:VMESH_OLD - [0:0]\n-A PREROUTING -j VMESH_OLD\nCOMMIT\n' | iptables-restore --noflush", "- ip nat VMESH_OLD"),
                ("printf '*nat\nCOMMIT\n' | iptables-restore", "+ ip nat VMESH_OUTBOUND"),
            ],
        };
        for (damage, named) in damages {
            vm.damage(damage);
            let mended = vm.capture(&yaml).await;
            assert!(mended.changes.iter().any(|change| change.to_string() == *named), "{damage}: {named}: {mended}");
            assert_eq!((vm.call(to), vm.call(vips()[0]), vm.call(vips()[1])), ("envoy".to_owned(), "envoy".to_owned(), "envoy".to_owned()), "{damage}");
            assert!(vm.capture(&yaml).await.is_empty());
        }
    }

    async fn containers_of_the_host_are_left_alone_and_so_are_the_ports_that_they_publish(vm: Vm) {
        let container = vm.switch.host().unwrap();
        vm.a.ip(&["link", "add", "docker0", "type", "bridge"]).unwrap();
        vm.a.ip(&["addr", "add", "172.30.0.1/24", "dev", "docker0"]).unwrap();
        vm.a.ip(&["link", "set", "docker0", "up"]).unwrap();
        vm.a.ip(&["link", "add", "vc", "type", "veth", "peer", "name", "eth1", "netns", container.name()]).unwrap();
        vm.a.ip(&["link", "set", "vc", "master", "docker0", "up"]).unwrap();
        container.ip(&["addr", "add", "172.30.0.2/24", "dev", "eth1"]).unwrap();
        container.ip(&["link", "set", "eth1", "up"]).unwrap();
        container.ip(&["route", "replace", "default", "via", "172.30.0.1"]).unwrap();
        container.ip(&["link", "set", "eth0", "down"]).unwrap();
        vm.a.within(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")).unwrap().unwrap();
        vm.damage(
            "printf '*nat\n:DOCKER - [0:0]\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
             -A POSTROUTING -s 172.30.0.0/24 ! -o docker0 -j MASQUERADE\n\
             -A DOCKER ! -i docker0 -p tcp --dport 8088 -j DNAT --to-destination 172.30.0.2:80\nCOMMIT\n' | iptables-restore --noflush",
        );
        let _apps = (vm.app_at_b(8080), vm.app_at_a(8080), vm.outbound_envoy());
        let _envoy = Server::new(&vm.a, "[::]:15006".parse().unwrap(), "envoy");
        let _inside = Server::new(&container, "0.0.0.0:80".parse().unwrap(), "container");
        vm.capture("outbound: {capture: all}\ninbound: {capture: redirect, ports: [8080]}").await;
        let [to, _] = vm.at_b(8080);
        assert_eq!(vm.call(to), "envoy");
        let out = Connection::open(&container, to);
        assert_eq!((out.who.as_str(), out.from), ("app", vm.a.v4.into()));
        assert_eq!(vm.call_from_b(vm.at_a(8088)[0]), "container");
        assert_eq!(vm.call_from_b(vm.at_a(8080)[0]), "envoy");
        // A connection of the host itself to its container.
        assert_eq!(vm.call("172.30.0.2:80".parse().unwrap()), "envoy");
        vm.capture("outbound: {capture: all, exclude: {interfaces: [docker0]}}").await;
        assert_eq!(vm.call("172.30.0.2:80".parse().unwrap()), "container");
    }

    async fn many_addresses_are_captured_and_one_more_disturbs_nobody(vm: Vm) {
        let _envoy = vm.outbound_envoy();
        let count = if vm.kind == BackendKind::Nft { 5000 } else { 500 };
        let vip = |number: u16| {
            let [high, low] = number.to_be_bytes();
            [format!("'240.0.{high}.{low}:80'"), format!("'[fdfe::{number:x}]:80'")]
        };
        let yaml = |count: u16| format!("outbound: {{capture: vip, vips: [{}]}}", (1..=count).flat_map(vip).collect::<Vec<_>>().join(", "));
        let started = Instant::now();
        vm.capture(&yaml(count)).await;
        eprintln!("{count} addresses of each family in {:?}", started.elapsed());
        let mut last = Connection::open(&vm.a, vip(count)[0].trim_matches('\'').parse().unwrap());
        let mut last6 = Connection::open(&vm.a, vip(count)[1].trim_matches('\'').parse().unwrap());
        let started = Instant::now();
        let plan = vm.capture(&yaml(count + 1)).await;
        eprintln!("one more in {:?}", started.elapsed());
        assert!(last.works() && last6.works() && last.who == "envoy");
        assert_eq!(vm.call(vip(count + 1)[0].trim_matches('\'').parse().unwrap()), "envoy");
        if vm.kind == BackendKind::Nft {
            let [step] = plan.steps.as_slice() else { panic!("{plan}") };
            assert_eq!(step.input.lines().count(), 2, "{plan}");
        }
    }

    async fn a_wrong_spec_is_taken_back_and_ssh_works_meanwhile(vm: Vm) {
        let _apps = (vm.app_at_a(22), vm.app_at_a(8080), vm.app_at_b(22), vm.app_at_b(8080));
        let before = vm.ruleset();
        let mut session = Connection::open(&vm.b, vm.at_a(22)[0]);
        // No Envoy listens, so every captured connection fails.
        let wrong: Spec = vmesh_model::load::strict(
            "spec.yaml",
            "outbound: {capture: all, on_loss: closed}\ninbound: {capture: redirect, ports: [1-65535], strict: [1-65535], on_loss: closed}",
        ).unwrap();
        for agent_dies in [false, true] {
            let now = Instant::now();
            let (mut commit, _) = Commit::start(CommitRecord::default(), false);
            assert_eq!(commit.propose(wrong.clone(), now, Duration::from_secs(60)), ProposalOutcome::Trial);
            commit.set_footprint(vm.applier.footprint().await.unwrap());
            let on_disk = serde_json::to_string(commit.state()).unwrap();
            let (spec, stage) = commit.wanted();
            vm.bring(&Program::new(spec, &vm.facts, stage).unwrap().0).await;
            assert_eq!((vm.call_from_b(vm.at_a(8080)[0]), vm.call(vm.at_b(8080)[0])), ("refused".to_owned(), "refused".to_owned()));
            // An open session, a new session, and a session from this host to another one.
            assert!(session.works());
            assert_eq!((vm.call_from_b(vm.at_a(22)[1]), vm.call(vm.at_b(22)[0])), ("app".to_owned(), "app".to_owned()));
            if agent_dies {
                let (again, reverted) = Commit::start(serde_json::from_str(&on_disk).unwrap(), false);
                assert_eq!(reverted, Some(wrong.clone()));
                commit = again;
            } else {
                assert_eq!(commit.tick(now + Duration::from_secs(60)), Some(wrong.clone()));
            }
            let (spec, stage) = commit.wanted();
            assert!(Program::new(spec, &vm.facts, stage).unwrap().0.is_absent());
            vm.applier.off(commit.state().footprint.as_ref()).await.unwrap();
            assert_eq!((vm.call_from_b(vm.at_a(8080)[0]), vm.call(vm.at_b(8080)[0])), ("app".to_owned(), "app".to_owned()));
            if vm.kind != BackendKind::IptablesLegacy {
                assert_eq!(vm.ruleset(), before);
            }
            assert!(session.works());
        }
    }

    async fn the_bypass_takes_everything_away_with_nothing_else_working(vm: Vm) {
        let _servers = (vm.app_at_b(8080), vm.app_at_a(3306), vm.outbound_envoy());
        have_other_rules(&vm);
        let before = vm.ruleset();
        let footprint = vm.applier.footprint().await.unwrap();
        let [to, to6] = vm.at_b(8080);
        let dir = vmesh_testkit::tempdir().unwrap();
        let flag = dir.join("state/bypass");
        let bypass = |arguments: &[&str]| {
            let script = concat!(env!("CARGO_MANIFEST_DIR"), "/bypass.sh");
            let mut command = Command::new("sh");
            command.arg(script).args(arguments).env_clear().env("VMESH_BYPASS_FLAG", &flag);
            command.env("PATH", format!("{}:/usr/bin:/bin", vm.tools.dir.display()));
            let started = Instant::now();
            let said = printed(&mut command);
            (said, started.elapsed())
        };
        let yaml = "outbound: {capture: all, on_loss: closed}\ninbound: {capture: redirect, ports: [3306], strict: [3306]}";
        vm.capture(yaml).await;
        assert_eq!((vm.call(to), vm.call(to6)), ("envoy".to_owned(), "envoy".to_owned()));
        let mut redirected = Connection::open(&vm.a, to);
        bypass(&["--keep-connections"]);
        assert_eq!((vm.call(to), vm.call(to6)), ("app".to_owned(), "app".to_owned()));
        assert!(redirected.works() && flag.exists());
        let (said, took) = bypass(&[]);
        eprintln!("{said} in {took:?}");
        assert!(!vm.ruleset().to_lowercase().contains("vmesh"));
        // Empty chains that iptables created for vmesh's rules are removed by the agent. The script cannot
        // know who created them.
        vm.applier.off(footprint.as_ref()).await.unwrap();
        assert_eq!(vm.ruleset(), before);
        assert_eq!((vm.call(to), vm.call(to6)), ("app".to_owned(), "app".to_owned()));
        bypass(&[]);
        bypass(&["--lift"]);
        assert!(!flag.exists());
        vm.capture(yaml).await;
        let (_, took) = bypass(&[]);
        eprintln!("in {took:?}");
        assert!(!vm.ruleset().to_lowercase().contains("vmesh"));

        // A full disk has room for the flag (an empty file), but not for data.
        let script = "mount -t tmpfs -o size=4k none $D && head -c 4096 /dev/zero >$D/full && ! echo >$D/more && \
            VMESH_BYPASS_FLAG=$D/state/bypass sh $SCRIPT && test -e $D/state/bypass";
        let mut full = Command::new("unshare");
        full.args(["--mount", "sh", "-ec", script]).env("D", dir.join("state"));
        full.env("SCRIPT", concat!(env!("CARGO_MANIFEST_DIR"), "/bypass.sh"));
        full.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", vm.tools.dir.display()));
        let said = printed(&mut full);
        assert!(said.contains("nothing is captured any more"), "{said}");
    }
}

impl Vm {
    /// Runs a shell script that changes rules like another program would.
    fn damage(&self, script: &str) {
        let path = format!("{}:/usr/bin:/bin", self.tools.dir.display());
        printed(Command::new("sh").args(["-ec", script]).env("PATH", path));
    }
}

/// Adds rules like those of Docker, a firewall and an administrator.
fn have_other_rules(vm: &Vm) {
    vm.damage(
        "printf '*nat\n:DOCKER - [0:0]\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
         -A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER\n\
         -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\nCOMMIT\n\
         *filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp --dport 25 -j DROP\nCOMMIT\n' | iptables-restore --noflush\n\
         printf '*nat\n-A OUTPUT -p udp -j ACCEPT\nCOMMIT\n*mangle\n-A PREROUTING -p udp -j ACCEPT\nCOMMIT\n' | ip6tables-restore --noflush\n\
         printf '*mangle\nCOMMIT\n' | iptables-restore --noflush\n\
         printf '*filter\n-A FORWARD -j ACCEPT\nCOMMIT\n' | ip6tables-restore --noflush\n\
         nft add table inet firewall\n\
         nft add chain inet firewall in '{ type filter hook input priority 10; policy accept; }'\n\
         nft add rule inet firewall in tcp dport 25 counter drop",
    );
}

/// A control group like that of a unit in a slice.
struct TestCgroup {
    slice: std::path::PathBuf,
    root: std::path::PathBuf,
}

impl TestCgroup {
    fn new() -> TestCgroup {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let root = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")).unwrap();
        let root = std::path::PathBuf::from(root.split(' ').nth(1).unwrap());
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let slice = root.join(format!("vmeshtest{}x{number}.slice", std::process::id()));
        std::fs::create_dir_all(slice.join("app.service")).unwrap();
        TestCgroup { slice, root }
    }

    fn id(path: &std::path::Path) -> u64 {
        std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap())
    }

    fn slice(&self) -> String {
        self.slice.strip_prefix(&self.root).unwrap().to_str().unwrap().to_owned()
    }

    fn slice_id(&self) -> u64 {
        TestCgroup::id(&self.slice)
    }

    fn cgroup(&self) -> Cgroup {
        Cgroup {
            path: format!("{}/app.service", self.slice()).parse().unwrap(),
            id: TestCgroup::id(&self.slice.join("app.service")),
        }
    }

    /// Removes and creates the control group, as a restart of the unit does.
    fn make_anew(&self) {
        let path = self.slice.join("app.service");
        std::fs::remove_dir(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
    }

    fn child(&self, name: &str) -> Cgroup {
        let path = self.slice.join(name);
        std::fs::create_dir_all(&path).unwrap();
        Cgroup { path: format!("{}/{name}", self.slice()).parse().unwrap(), id: TestCgroup::id(&path) }
    }

    /// Returns the name of the server that answers a caller in the control group.
    fn call(&self, vm: &Vm, to: SocketAddr) -> String {
        self.call_in("app.service", vm, to)
    }

    fn call_in(&self, name: &str, vm: &Vm, to: SocketAddr) -> String {
        let script = format!(
            "echo $$ >{}/{name}/cgroup.procs && exec 3<>/dev/tcp/{}/{} && read -r who rest <&3 && echo $who; \
             echo $$ >{}/cgroup.procs",
            self.slice.display(),
            to.ip(),
            to.port(),
            self.root.display(),
        );
        printed(vm.a.command("bash").args(["-c", &script])).trim().to_owned()
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        for name in ["app.service", "other.service", "new.service"] {
            _ = std::fs::remove_dir(self.slice.join(name));
        }
        _ = std::fs::remove_dir(&self.slice);
    }
}

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
        "could not run `/no/such/nft -j list table inet vmesh` to list the rules; is it installed, and allowed to this process?"
    );
    let dir = vmesh_testkit::tempdir().unwrap();
    let slow = dir.join("nft");
    std::fs::write(&slow, "#!/bin/sh\nexec sleep 1000\n").unwrap();
    std::fs::set_permissions(&slow, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    vm.applier.tools.nft = slow;
    vm.applier.tools.timeout = Duration::from_millis(100);
    let error = vm.applier.read().await.unwrap_err().to_string();
    assert!(error.contains("had not ended after 100ms, so it was killed"), "{error}");
    assert_eq!(vm.applier.backend, Backend::Nft);
}
