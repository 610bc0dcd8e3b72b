//! Removal and repair: rules that another program changed, that a trial leaves behind, or that the bypass
//! removes.

use std::process::Command;
use std::time::{Duration, Instant};

use vmesh_capture::confirm::{Commit, CommitRecord, ProposalOutcome};
use vmesh_capture::{Program, Spec};

use crate::vm::{BackendKind, Connection, VIPS, Vm, printed, vips};

with_every_backend! {
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
                ("nft insert rule inet vmesh outbound accept", "! outbound: a rule that is not vmesh's"),
                ("nft flush chain inet vmesh to_100", "+ to_100/everything"),
                ("nft flush set inet vmesh captured_vips4", "~ set captured_vips4: its elements (IPv4)"),
                ("nft add element inet vmesh outbound_ssh '{ 8000-9000 }'", "~ set outbound_ssh: its elements"),
                ("nft add chain inet vmesh mine", "- chain mine"),
                ("nft add set inet vmesh mine '{ type mark; }'; nft add set inet vmesh yours '{ type uid; }'", "- set mine"),
            ],
            _ => &[
                ("iptables-restore </dev/null; F=$(iptables-save | grep -- '-j VMESH_OUTBOUND' | sed 's/^-A/-D/'); \
                  printf '*nat\n%s\nCOMMIT\n' \"$F\" | iptables-restore --noflush", "+ ip nat OUTPUT: the jump to vmesh's chain is missing"),
                ("printf '*nat\n-I OUTPUT 1 -p udp -j ACCEPT\nCOMMIT\n' | iptables-restore --noflush", "~ ip nat OUTPUT: the jump to vmesh's chain is not the first rule"),
                ("printf '*nat\n-I VMESH_OUTBOUND 1 -j ACCEPT\nCOMMIT\n' | ip6tables-restore --noflush", "! ip6 nat VMESH_OUTBOUND: a rule that is not vmesh's"),
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
            let output = printed(&mut command);
            (output, started.elapsed())
        };
        let yaml = "outbound: {capture: all, on_loss: closed}\ninbound: {capture: redirect, ports: [3306], strict: [3306]}";
        vm.capture(yaml).await;
        assert_eq!((vm.call(to), vm.call(to6)), ("envoy".to_owned(), "envoy".to_owned()));
        let mut redirected = Connection::open(&vm.a, to);
        bypass(&["--keep-connections"]);
        assert_eq!((vm.call(to), vm.call(to6)), ("app".to_owned(), "app".to_owned()));
        assert!(redirected.works() && flag.exists());
        let (output, took) = bypass(&[]);
        eprintln!("{output} in {took:?}");
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
        let output = printed(&mut full);
        assert!(output.contains("captures no new connections"), "{output}");
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
