//! Inbound connections: which of them reach Envoy, and which are refused.

use vmesh_capture::{Program, Spec, Stage};

use crate::vm::{BackendKind, Connection, Server, Vm, transparent_envoy};

with_every_backend! {
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
}
