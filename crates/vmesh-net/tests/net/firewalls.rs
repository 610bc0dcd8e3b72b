//! The host's own filter: what it keeps closed stays closed, and what it does to captured connections is said with the rule.

use std::fs;

use vmesh_net::client;
use vmesh_net::protocol::{Answer, Ask, State, Status};

use crate::vm::{self, Agent, OPEN, Rules, Vm, is_well, status};

const INBOUND: &str =
    "{inbound: {capture: redirect, on_loss: closed, ports: [8081, 8083]}, dead_man: {timeout: 3s}}";

/// As firewalld does: what was translated is let in, and else what is listed.
fn firewalld(vm: &Vm) {
    vm.nft(&["add table inet fw; add chain inet fw in { type filter hook input priority 10; policy accept; }; \
         add rule inet fw in ct state { established, related } accept; add rule inet fw in ct status dnat accept; \
         add rule inet fw in iifname lo accept; add rule inet fw in tcp dport { 22, 8083 } accept; add rule inet fw in reject"]);
}

/// As ufw does: what is listed is let in.
fn ufw(vm: &Vm, ports: &str) {
    vm.nft(&[&format!(
        "add table inet fw; add chain inet fw in {{ type filter hook input priority 0; policy drop; }}; \
         add rule inet fw in ct state {{ established, related }} accept; add rule inet fw in iifname lo accept; \
         add rule inet fw in tcp dport {{ {ports} }} accept"
    )]);
}

/// A host whose state has `spec` confirmed.
async fn confirmed(spec: &str) -> (Vm, Agent) {
    let mut vm = Vm::new(Rules::Nft).await;
    vm.net.take().unwrap().kill().unwrap();
    let state = serde_json::json!({"commit": {"confirmed": vm::want(&vm, spec).spec}});
    fs::write(vm.state_dir().join("state.json"), state.to_string()).unwrap();
    vm.start_net().await;
    let mut agent = Agent::new(&vm, spec).await;
    assert_eq!(status(agent.want().await).state, State::Confirmed);
    (vm, agent)
}

/// The inbound ports that are redirected by now.
fn redirected(vm: &Vm) -> String {
    // Without a port to redirect there is no table.
    let rules = vm.ruleset();
    let set = rules.split("set inbound_closed {").nth(1).and_then(|rest| rest.split('}').next());
    set.and_then(|set| set.split("elements = {").nth(1)).unwrap_or_default().trim().to_owned()
}

fn has_note(status: &Status, words: &[&str]) -> bool {
    status.notes.iter().any(|note| words.iter().all(|word| note.contains(word)))
}

#[tokio::test]
async fn a_port_that_the_hosts_filter_keeps_closed_is_not_opened_by_a_redirect_unless_it_is_asked_for() {
    let (vm, mut agent) = confirmed(INBOUND).await;
    assert_eq!(redirected(&vm), "8081, 8083");
    firewalld(&vm);
    let words = ["8081 is not captured", "inet fw in: reject", "bypass_filter: true"];
    vm.until("the port to be left out", |status| has_note(status, &words)).await;
    assert_eq!(redirected(&vm), "8083");
    // After a restart, too.
    agent.want.ports.insert(15_999);
    agent.want().await;
    assert_eq!(redirected(&vm), "8083");
    vm.nft(&["delete", "table", "inet", "fw"]);
    vm.until("the port to be captured again", |status| !has_note(status, &["8081"])).await;
    assert_eq!(redirected(&vm), "8081, 8083");

    let (vm, _agent) = confirmed(&INBOUND.replace("on_loss", "bypass_filter: true, on_loss")).await;
    firewalld(&vm);
    vm.nft(&["add", "table", "inet", "another"]);
    vm.until("the change to be seen", |status| status.state == State::Confirmed).await;
    assert_eq!(redirected(&vm), "8081, 8083");
}

/// This `nft` lists the table of vmesh as ever, and hangs when it is to list all tables.
#[tokio::test]
async fn a_filter_that_cannot_be_read_is_not_taken_for_none() {
    let mut vm = Vm::new(Rules::Nft).await;
    firewalld(&vm);
    let hangs = vm.state_dir().join("hangs");
    let real = vm.tools.nft.display();
    let script = format!(
        "[ \"$*\" = '-j list ruleset' ] && [ -e {} ] && exec sleep 600\nexec {real} \"$@\"",
        hangs.display()
    );
    vm.script("nft", &script);
    fs::write(&hangs, "").unwrap();
    vm.net.take().unwrap().kill().unwrap();
    let state = serde_json::json!({"commit": {"confirmed": vm::want(&vm, INBOUND).spec}});
    fs::write(vm.state_dir().join("state.json"), state.to_string()).unwrap();
    vm.start_net().await;
    let unread = ["8081 is not captured", "list ruleset", "bypass_filter: true"];
    vm.until("the ports to be left out", |status| has_note(status, &unread)).await;
    assert_eq!(redirected(&vm), "");

    fs::remove_file(&hangs).unwrap();
    vm.nft(&["add", "table", "inet", "another"]);
    vm.until("the rules to be read", |status| !has_note(status, &["list ruleset"])).await;
    assert_eq!(redirected(&vm), "8083");
    // The last complete reading counts for five minutes.
    fs::write(&hangs, "").unwrap();
    vm.nft(&["delete", "table", "inet", "another"]);
    let kept = ["counts as it was last read", "list ruleset"];
    vm.until("the gap to be told", |status| has_note(status, &kept)).await;
    assert_eq!(redirected(&vm), "8083");
}

/// A filter that is called as iptables' own is, and has chains of names that iptables does not know, and a map of verdicts.
#[tokio::test]
async fn a_filter_of_nftables_in_a_table_with_a_name_of_iptables_is_seen() {
    let (vm, _agent) = confirmed(INBOUND).await;
    vm.nft(&[
        "add table ip filter; add chain ip filter in { type filter hook input priority 10; policy accept; }; \
         add chain ip filter world; add rule ip filter in ct status dnat accept; \
         add rule ip filter in iifname vmap { lo : accept, eth0 : jump world }; \
         add rule ip filter world tcp dport vmap { 8083 : accept, * : drop }",
    ]);
    let words = ["8081 is not captured", "ip filter world: tcp dport vmap"];
    vm.until("the port to be left out", |status| has_note(status, &words)).await;
    assert_eq!(redirected(&vm), "8083");
}

#[tokio::test]
async fn a_port_that_the_hosts_filter_lets_in_is_not_closed_by_a_redirect() {
    let (vm, _agent) = confirmed(INBOUND).await;
    ufw(&vm, "22, 8081");
    let words = ["8081 is not captured", "15006", "inet fw in: policy drop"];
    vm.until("the port to be left out", |status| has_note(status, &words)).await;
    vm.nft(&["add rule inet fw in tcp dport 15006 accept"]);
    // Now everything that is redirected comes in, also what the filter does not list.
    vm.until("the other port to be left out", |status| has_note(status, &["8083 is not captured"])).await;
    assert_eq!(redirected(&vm), "8081");
}

#[tokio::test]
async fn a_rule_that_loses_captured_connections_is_named_by_the_status_and_by_a_trial() {
    let vm = Vm::new(Rules::Nft).await;
    let mut agent = Agent::new(&vm, OPEN).await;
    agent.capture().await;
    agent.well_until("the redirects to hold", is_well).await;
    let drops = "add table inet eg; add chain inet eg out { type filter hook output priority 0; policy drop; }; \
        add rule inet eg out oifname lo accept; add rule inet eg out ct state established accept; \
        add rule inet eg out tcp dport { 8080, 9999 } accept";
    vm.nft(&[drops]);
    let words = ["240.0.0.0:1", "inet eg out: policy drop"];
    agent.well_until("the rule to be named", |status| has_note(status, &words)).await;
    agent.want.spec.outbound.percent = vmesh_capture::spec::Percent::new(99).unwrap();
    let trial = status(agent.want().await).trial.unwrap();
    let Answer::Refused(why) = agent.confirm(trial).await else { panic!("it was confirmed") };
    assert!(why.contains("inet eg out: policy drop"), "{why}");
    // What the page says that a firewall has to let through.
    vm.nft(&["add rule inet eg out tcp dport 15001 accept"]);
    assert_eq!(status(agent.confirm(trial).await).state, State::Confirmed);
    agent.well_until("nothing to be said", |status| !has_note(status, &["240.0.0.0:1"])).await;
}

#[tokio::test]
async fn a_rule_that_keeps_connections_from_being_tracked_is_named() {
    let vm = Vm::new(Rules::Nft).await;
    let mut agent = Agent::new(&vm, OPEN).await;
    agent.want.spec.outbound.vips.insert("240.1.2.3:80".parse().unwrap());
    let raw = "add table inet nt; add chain inet nt out { type filter hook output priority -300; }; \
        add rule inet nt out tcp dport { 80, 8443 } notrack";
    vm.nft(&[raw]);
    let trial = status(agent.want().await).trial.unwrap();
    let Answer::Refused(why) = agent.confirm(trial).await else { panic!("it was confirmed") };
    assert!(why.contains("inet nt out: tcp dport") && why.contains("notrack"), "{why}");
    vm.nft(&["delete", "table", "inet", "nt"]);
    assert_eq!(status(agent.confirm(trial).await).state, State::Confirmed);
    vm.nft(&[raw]);
    agent.well_until("the rule to be named", |status| has_note(status, &["port 80", "notrack"])).await;
    let Answer::Status(now) = client::ask(&vm.socket(), &Ask::Status).await.unwrap() else { panic!() };
    assert_eq!(now.state, State::Confirmed);
}
