//! Property tests with the real tools: applying any spec twice is the same as applying it once, and `off`
//! leaves nothing. The real tools are used because they may list a rule in other words than it was written.

use proptest::collection::{btree_map, btree_set};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use vmesh_capture::host::Cgroup;
use vmesh_capture::spec::{
    Account, BypassFilter, CallerShares, ClientSelection, Destination, Inbound, InboundCapture, OnLoss,
    Outbound, OutboundCapture, Percent, Ports, Selection,
};
use vmesh_capture::{Host, Program, Spec, Stage};

use crate::cgroup::TestCgroup;
use crate::vm::{BackendKind, Vm};

fn percent() -> impl Strategy<Value = Percent> {
    prop_oneof![Just(0), Just(100), 1..100_u8].prop_map(|percent| Percent::new(percent).unwrap_or_default())
}

fn ports() -> impl Strategy<Value = std::collections::BTreeSet<Ports>> {
    let one = (1..2000_u16, 0..40_u16)
        .prop_map(|(first, more)| Ports::range(first, first + more * (more % 3)).unwrap());
    btree_set(one, 0..20)
}

fn account() -> impl Strategy<Value = Account> {
    (5000..5010_u32).prop_map(|id| id.to_string().parse().unwrap())
}

fn on_loss() -> impl Strategy<Value = OnLoss> {
    prop_oneof![Just(OnLoss::Open), Just(OnLoss::Closed)]
}

fn cidr() -> impl Strategy<Value = vmesh_capture::spec::Cidr> {
    let v4 = (0..=32_u32, any::<u32>()).prop_map(|(length, number)| {
        let kept = u64::from(number) >> (32 - length) << (32 - length);
        format!("{}/{length}", std::net::Ipv4Addr::from(u32::try_from(kept).unwrap_or_default()))
    });
    let v6 = (1..=128_u32, any::<u128>()).prop_map(|(length, number)| {
        format!("{}/{length}", std::net::Ipv6Addr::from(number >> (128 - length) << (128 - length)))
    });
    prop_oneof![v4, v6].prop_map(|text| text.parse().unwrap())
}

fn address() -> impl Strategy<Value = std::net::SocketAddr> {
    let ip = prop_oneof![
        (1..250_u8).prop_map(|last| std::net::IpAddr::from([10, 1, 1, last])),
        (1..250_u16).prop_map(|last| std::net::IpAddr::from([0xfd01, 0, 0, 0, 0, 0, 0, last])),
    ];
    (ip, 1..9000_u16).prop_map(std::net::SocketAddr::from)
}

fn selection() -> impl Strategy<Value = Selection> {
    let interfaces = btree_set(prop_oneof![Just("eth0"), Just("docker0"), Just("br-12ab")], 0..3)
        .prop_map(|names| names.into_iter().map(|name| name.parse().unwrap()).collect());
    let units = btree_set(Just("any.slice".parse().unwrap()), 0..2);
    (
        ports(),
        btree_set(cidr(), 0..8),
        interfaces,
        btree_set(account(), 0..4),
        btree_set(account(), 0..4),
        units,
    )
        .prop_map(|(ports, cidrs, interfaces, users, groups, units)| Selection {
            ports,
            cidrs,
            interfaces,
            users,
            groups,
            units,
        })
}

prop_compose! {
    fn outbound()(
        capture in prop_oneof![Just(OutboundCapture::Off), Just(OutboundCapture::Vip), Just(OutboundCapture::Addresses), Just(OutboundCapture::All)],
        vips in btree_set(address(), 0..6),
        addresses in btree_map(address(), (proptest::option::of(percent()), proptest::option::of(on_loss()))
            .prop_map(|(percent, on_loss)| Destination { percent, on_loss }), 0..8),
        percent in percent(),
        on_loss in on_loss(),
        include in selection(),
        exclude in selection(),
        users in btree_map(account(), percent(), 0..3),
    ) -> Outbound {
        Outbound { capture, vips, addresses, percent, on_loss, include, exclude, dial: CallerShares { users, ..CallerShares::default() } }
    }
}

prop_compose! {
    fn inbound()(
        capture in prop_oneof![Just(InboundCapture::Off), Just(InboundCapture::Redirect), Just(InboundCapture::Tproxy)],
        ports in ports(),
        strict in ports(),
        on_loss in on_loss(),
        cidrs in btree_set(cidr(), 0..4),
    ) -> Inbound {
        Inbound {
            capture,
            ports,
            strict,
            on_loss,
            bypass_filter: BypassFilter::default(),
            exclude: ClientSelection { cidrs, ..ClientSelection::default() },
        }
    }
}

fn spec() -> impl Strategy<Value = Spec> {
    (outbound(), inbound()).prop_map(|(outbound, inbound)| Spec { outbound, inbound, ..Spec::default() })
}

/// Applies rows of specs to one host, as edits of an operator would be: each one changes the rules of the one
/// before.
fn check(kind: BackendKind, rows: u32) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let vm = Vm::new(kind);
    let group = TestCgroup::new();
    let facts = Host {
        units: [(
            "any.slice".parse().unwrap(),
            Cgroup { path: group.slice().parse().unwrap(), id: group.slice_id() },
        )]
        .into(),
        ..vm.facts.clone()
    };
    let before = vm.ruleset();
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(rows) };
    let specs = proptest::collection::vec((spec(), any::<bool>()), 1..4);
    let result = TestRunner::new(config).run(&specs, |row| {
        runtime.block_on(async {
            let footprint = vm.applier.footprint().await.unwrap();
            for (spec, trial) in row {
                let stage = if trial { Stage::Trial } else { Stage::Confirmed };
                let (program, _) = Program::new(&spec, &facts, stage).unwrap();
                let plan = vm.applier.plan(&program, &vm.applier.read().await.unwrap(), true);
                prop_assert!(
                    vm.applier.check(&plan).await.is_ok(),
                    "{plan}\n{:?}",
                    vm.applier.check(&plan).await
                );
                // `bring` reads the rules back, and fails if any differ.
                vm.bring(&program).await;
                let again = vm.applier.plan(&program, &vm.applier.read().await.unwrap(), true);
                prop_assert!(again.is_empty() && again.changes.is_empty(), "{again}");
            }
            vm.applier.off(footprint.as_ref()).await.unwrap();
            if kind == BackendKind::IptablesLegacy {
                prop_assert!(!vm.ruleset().contains("VMESH"));
            } else {
                prop_assert_eq!(vm.ruleset(), before.clone());
            }
            Ok(())
        })
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn any_specs_in_a_row_are_idempotent_and_leave_nothing_by_nftables() {
    check(BackendKind::Nft, 40);
}

#[test]
fn any_specs_in_a_row_are_idempotent_and_leave_nothing_by_iptables() {
    check(BackendKind::IptablesNft, 20);
}

#[test]
fn any_specs_in_a_row_are_idempotent_and_leave_nothing_by_legacy_iptables() {
    check(BackendKind::IptablesLegacy, 20);
}
