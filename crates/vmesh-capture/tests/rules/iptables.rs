//! The rules of iptables and ip6tables.

use expect_test::{ExpectFile, expect_file};
use vmesh_capture::iptables;
use vmesh_capture::{Program, Stage};

use crate::{host, spec, without_hashes};

fn check_iptables(yaml: &str, expected: ExpectFile) {
    let (program, notes) = Program::new(&spec(yaml), &host(), Stage::Confirmed).unwrap();
    let plan = iptables::plan(&program, &iptables::IptablesRules::absent(true));
    let notes: String = notes.iter().map(|note| format!("{note}\n")).collect();
    expected.assert_eq(&without_hashes(&format!("{notes}{plan}")));
}

#[test]
fn everything_by_iptables() {
    check_iptables(
        "outbound:\n  capture: all\n  percent: 50\n  vips: ['240.240.0.10:80', '[fdfe::10]:80']\n  \
         addresses: {'10.1.0.1:80': {percent: 5, on_loss: closed}}\n  \
         include: {units: [app.service], users: [app], ports: [80, 81, 8080-8090]}\n  \
         dial: {users: {app: 1}}\n\
         inbound: {capture: tproxy, ports: [8080, 3306], strict: [3306]}",
        expect_file!["golden/everything_by_iptables.txt"],
    );
}

#[test]
fn redirect_by_iptables() {
    check_iptables(
        "inbound: {capture: redirect, ports: [8080, 3306], strict: [3306, 9000]}",
        expect_file!["golden/redirect_by_iptables.txt"],
    );
}
