//! Golden tests of the compiler: a spec as input; the rules of both backends as text, or the notes, as
//! output.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod iptables;
mod nft;

use expect_test::expect;
use vmesh_capture::host::{AccountNumber, Cgroup, NeverCaptured};
use vmesh_capture::program::UnsafeCapture;
use vmesh_capture::{Host, Program, Spec, Stage};
use vmesh_model::load::strict;

fn host() -> Host {
    Host {
        users: [("app".to_owned(), AccountNumber::Now(1001))].into(),
        units: [(
            "app.service".parse().unwrap(),
            Cgroup { path: "system.slice/app.service".parse().unwrap(), id: 4711 },
        )]
        .into(),
        ipv6: true,
        never: NeverCaptured {
            users: [999].into(),
            own: [15020].into(),
            control_planes: ["10.0.0.5:15012".parse().unwrap()].into(),
            ..NeverCaptured::default()
        },
        ..Host::default()
    }
}

fn spec(yaml: &str) -> Spec {
    strict("spec.yaml", yaml).unwrap()
}

/// Removes the hashes from the labels of rules, which mean nothing to a reader.
fn without_hashes(text: &str) -> String {
    let comments = text.split("\"vmesh ").enumerate().map(|(number, part)| match part.split_once('"') {
        Some((label, rest)) if number > 0 => {
            format!("\"vmesh {}\"{rest}", label.split(' ').next().unwrap_or_default())
        }
        _ => part.to_owned(),
    });
    comments.collect()
}

#[test]
fn what_has_no_effect_on_this_host_is_said_and_costs_nothing_else() {
    let yaml = "outbound:\n  capture: all\n  vips: ['240.0.0.1:22', '127.0.0.1:80', '240.0.0.2:80']\n  \
        addresses: {'10.0.0.1:22': {}}\n  include: {users: [nobody-knows]}\n  exclude: {units: [gone.service], groups: [none]}\n\
        inbound: {capture: redirect, ports: [22, 80, 15000-15010], strict: [15020]}";
    let (program, notes) = Program::new(&spec(yaml), &host(), Stage::Confirmed).unwrap();
    let notes: String = notes.iter().map(|note| format!("{note}\n")).collect();
    expect![[r#"
        inbound.ports: 15001 is not captured: it is a port of Envoy or of the agent
        inbound.ports: 15006 is not captured: it is a port of Envoy or of the agent
        inbound.ports: 22 is not captured: it is SSH
        inbound.strict: 15020 is not captured: it is a port of Envoy or of the agent
        outbound.addresses: 10.0.0.1:22 is not captured: port 22 is SSH, which never is
        outbound.exclude: gone.service does not run: it selects nothing until it runs
        outbound.exclude: there is no group `none`: the name selects nothing until it exists
        outbound.include: there is no user `nobody-knows`: the name selects nothing until it exists
        outbound.vips: 127.0.0.1:80 is not captured: a virtual address must be one that another host could have
        outbound.vips: 240.0.0.1:22 is not captured: port 22 is SSH, which never is
    "#]]
    .assert_eq(&notes);
    // A user that does not exist in `include` selects nothing; it does not make the selection empty, which
    // would mean all.
    let plan = vmesh_capture::nft::plan(&program, &vmesh_capture::nft::NftRules::absent(), true).to_string();
    assert!(!plan.contains("goto captured"), "{plan}");
}

#[test]
fn who_is_left_out_is_never_captured_because_nobody_says_who_it_is() {
    let named = |number| Host { users: [("app".to_owned(), number)].into(), ..host() };
    let of = |yaml: &str, number| Program::new(&spec(yaml), &named(number), Stage::Confirmed);
    let excluded = "outbound: {capture: all, exclude: {users: [app]}}";
    let (now, notes) = of(excluded, AccountNumber::Now(7)).unwrap();
    assert_eq!(notes, []);
    let (last, notes) = of(excluded, AccountNumber::Last(7)).unwrap();
    assert_eq!(last, now);
    let notes: String = notes.iter().map(|note| format!("{note}\n")).collect();
    expect![[r#"
        outbound.exclude: the host no longer knows the user `app`, or its name service does not answer: its last number, 7, is used
    "#]]
    .assert_eq(&notes);
    for yaml in [excluded, "outbound: {capture: all, dial: {users: {app: 1}}}"] {
        let refused = of(yaml, AccountNumber::Unanswered).unwrap_err();
        assert!(refused.to_string().contains("check that `getent passwd app` answers"), "{refused}");
    }
    // An unknown user in `include` does no harm: it captures too little.
    let (_, notes) =
        of("outbound: {capture: all, include: {users: [app]}}", AccountNumber::Unanswered).unwrap();
    assert!(notes.iter().any(|note| note.message.contains("does not answer")), "{notes:?}");
}

#[test]
fn nothing_outbound_is_captured_where_envoys_own_connections_would_be() {
    let host = Host { never: NeverCaptured::default(), ..host() };
    let refused = Program::new(&spec("outbound: {capture: vip}"), &host, Stage::Confirmed);
    assert_eq!(refused, Err(UnsafeCapture::NoLoopGuard));
    assert!(
        Program::new(&spec("inbound: {capture: redirect, ports: [80]}"), &host, Stage::Confirmed).is_ok()
    );
}

#[test]
fn a_spec_that_captures_nothing_is_nothing() {
    for yaml in
        ["{}", "outbound: {vips: ['240.0.0.1:80']}", "inbound: {ports: [80]}", "inbound: {capture: tproxy}"]
    {
        let (program, _) = Program::new(&spec(yaml), &host(), Stage::Confirmed).unwrap();
        assert!(program.is_absent(), "{yaml}");
        assert!(vmesh_capture::nft::plan(&program, &vmesh_capture::nft::NftRules::absent(), true).is_empty());
        assert!(
            vmesh_capture::iptables::plan(&program, &vmesh_capture::iptables::IptablesRules::absent(true))
                .is_empty()
        );
    }
}

#[test]
fn what_nft_prints_is_read_or_refused_and_never_panics() {
    for wrong in
        ["", "[]", "{\"nftables\": [{\"rule\": {\"chain\": \"x\"}}]}", "{\"nftables\": [{\"set\": {}}]}"]
    {
        assert!(vmesh_capture::nft::NftRules::parse(wrong).is_err(), "{wrong}");
    }
    let odd = "{\"nftables\": [{\"metainfo\": {}}, {\"table\": {}}, {\"set\": {\"name\": \"a\", \"type\": [\"x\"], \"elem\": [1]}}]}";
    assert!(vmesh_capture::nft::NftRules::parse(odd).unwrap().exists());
    for odd in
        ["*nat\n:\n-A\n-A x\n:VMESH_\n-A VMESH_ \n", "-A before any table", "*\n*\n", "*nat\n-A O -j\n"]
    {
        vmesh_capture::iptables::FamilyRules::parse(odd);
    }
}
