//! Tests of the reports of changed rules, with the kernel of a namespace.

use std::process::Command;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use vmesh_net::rules;
use vmesh_testkit::netns::{Iptables, Switch};

/// The keeper ignores transactions of vmesh itself, so such a transaction must not hide a later one.
#[test]
fn each_transaction_is_reported_although_others_wait() {
    let switch = Switch::new().unwrap();
    let host = switch.host().unwrap();
    let nft = host.tools(Iptables::Nft).unwrap().nft;
    let add_tables = || {
        for table in ["one", "two", "three"] {
            let status = Command::new(&nft).args(["add", "table", "inet", table]).status().unwrap();
            assert!(status.success());
        }
    };
    let reported = host.within(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (sender, mut changes) = mpsc::channel(1);
            let mut watching = JoinSet::new();
            watching.spawn(rules::watch(sender));
            // The watch opens its socket when it first runs.
            tokio::task::yield_now().await;
            add_tables();
            let mut reported = 0;
            while timeout(Duration::from_secs(5), changes.recv()).await.is_ok_and(|change| change.is_some()) {
                reported += 1;
                if reported == 3 {
                    break;
                }
            }
            reported
        })
    });
    assert_eq!(reported.unwrap(), 3);
}
