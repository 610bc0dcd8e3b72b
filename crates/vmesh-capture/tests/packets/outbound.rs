//! Outbound connections: which of them reach Envoy.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use vmesh_capture::host::Cgroup;
use vmesh_capture::{Program, Stage};
use vmesh_testkit::wait_for;

use crate::cgroup::TestCgroup;
use crate::vm::{BackendKind, Connection, ENVOY, SOON, Server, VIPS, Vm, vips};

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
        assert!(mended.changes.iter().any(|change| change.place.contains("include_unit_0")), "{mended}");
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
}
