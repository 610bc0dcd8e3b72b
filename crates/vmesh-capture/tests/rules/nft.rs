//! The rules of nftables.

use expect_test::{ExpectFile, expect_file};
use vmesh_capture::nft;
use vmesh_capture::{Program, Stage};

use crate::{host, spec, without_hashes};

fn check_nft(yaml: &str, expected: ExpectFile) {
    let (program, notes) = Program::new(&spec(yaml), &host(), Stage::Confirmed).unwrap();
    let plan = nft::plan(&program, &nft::NftRules::absent(), true);
    let notes: String = notes.iter().map(|note| format!("{note}\n")).collect();
    expected.assert_eq(&without_hashes(&format!("{notes}{plan}")));
}

#[test]
fn virtual_addresses_by_nftables() {
    check_nft(
        "outbound: {capture: vip, vips: ['240.240.0.10:80', '[fdfe::10]:80']}",
        expect_file!["golden/virtual_addresses_by_nftables.txt"],
    );
}

#[test]
fn everything_by_nftables() {
    check_nft(
        "outbound:\n  capture: all\n  percent: 50\n  addresses: {'10.1.0.1:80': {percent: 5, on_loss: closed}}\n  \
         include: {units: [app.service], users: [app], ports: [80, 81, 8080-8090]}\n  \
         exclude: {cidrs: [10.9.0.0/16, 10.9.1.0/24]}\n  dial: {users: {app: 1}}\n\
         inbound: {capture: redirect, ports: [8080, 3306], strict: [3306, 9000], exclude: {cidrs: [10.8.0.1]}}",
        expect_file!["golden/everything_by_nftables.txt"],
    );
}

#[test]
fn tproxy_by_nftables() {
    check_nft(
        "inbound: {capture: tproxy, ports: [8080, 3306], strict: [3306]}",
        expect_file!["golden/tproxy_by_nftables.txt"],
    );
}
