//! The host's own filter: ports that it keeps closed stay closed, and the effects of its rules on captured
//! connections are reported together with the rule.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use vmesh_capture::spec::INBOUND_PORT;
use vmesh_net::client;
use vmesh_net::protocol::{Request, Response, State, Status, would_change};

use crate::vm::{self, FakeAgent, OPEN, RulesBackend, Vm, is_well, status};

const INBOUND: &str =
    "{inbound: {capture: redirect, on_loss: closed, ports: [8081, 8083]}, dead_man: {timeout: 3s}}";

/// Adds a filter like that of firewalld: it accepts translated connections and the listed ports.
fn firewalld(vm: &Vm) {
    vm.nft(&["add table inet fw; add chain inet fw in { type filter hook input priority 10; policy accept; }; \
         add rule inet fw in ct state { established, related } accept; add rule inet fw in ct status dnat accept; \
         add rule inet fw in iifname lo accept; add rule inet fw in tcp dport { 22, 8083 } accept; add rule inet fw in reject"]);
}

/// Adds a filter like that of ufw: it accepts the listed ports.
fn ufw(vm: &Vm, ports: &str) {
    vm.nft(&[&format!(
        "add table inet fw; add chain inet fw in {{ type filter hook input priority 0; policy drop; }}; \
         add rule inet fw in ct state {{ established, related }} accept; add rule inet fw in iifname lo accept; \
         add rule inet fw in tcp dport {{ {ports} }} accept"
    )]);
}

/// Starts a host whose saved state has `spec` confirmed.
async fn confirmed(spec: &str) -> (Vm, FakeAgent) {
    let mut vm = Vm::new(RulesBackend::Nft).await;
    vm.net.take().unwrap().kill().unwrap();
    let state = serde_json::json!({"commit": {"confirmed": vm::want(&vm, spec).spec}});
    fs::write(vm.state_dir().join("state.json"), state.to_string()).unwrap();
    vm.start_net().await;
    let mut agent = FakeAgent::new(&vm, spec).await;
    assert_eq!(status(agent.want().await).state, State::Confirmed);
    (vm, agent)
}

/// Returns the inbound ports that are redirected.
fn redirected(vm: &Vm) -> String {
    // If no port is redirected, there is no table.
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
    let words = ["8081 is not captured", "inet fw in: reject", "bypass_filter: [8081]"];
    vm.until("the port to be left out", |status| has_note(status, &words)).await;
    assert_eq!(redirected(&vm), "8083");
    // The dry run leaves the port out as well, and shows the reason.
    let Response::Plan(plan) = client::ask(&vm.socket(), &Request::Plan { want: None }).await.unwrap() else {
        panic!()
    };
    assert!(words.iter().all(|word| plan.contains(word)) && !would_change(&plan), "{plan}");
    // The port stays uncaptured after another request.
    agent.want.ports.insert(15_999);
    agent.want().await;
    assert_eq!(redirected(&vm), "8083");
    vm.nft(&["delete", "table", "inet", "fw"]);
    vm.until("the port to be captured again", |status| !has_note(status, &["8081"])).await;
    assert_eq!(redirected(&vm), "8081, 8083");

    for bypass in ["true", "[\"8080-8082\"]"] {
        let (vm, _agent) =
            confirmed(&INBOUND.replace("on_loss", &format!("bypass_filter: {bypass}, on_loss"))).await;
        firewalld(&vm);
        // This rule closes port 8083 for redirected connections, and the spec does not allow that.
        vm.nft(&["insert rule inet fw in tcp dport 15006 ct state new drop"]);
        let is_left_out = |status: &Status| has_note(status, &["8083 is not captured"]);
        if bypass == "true" {
            vm.nft(&["add", "table", "inet", "another"]);
            vm.until("the change to be seen", |status| status.state == State::Confirmed).await;
            assert_eq!(redirected(&vm), "8081, 8083");
        } else {
            vm.until("the other port to be left out", is_left_out).await;
            assert_eq!(redirected(&vm), "8081");
        }
    }
}

/// `nft` lists the table of vmesh as usual, and hangs when it lists the whole ruleset.
#[tokio::test]
async fn a_filter_that_cannot_be_read_is_not_taken_for_none() {
    let mut vm = Vm::new(RulesBackend::Nft).await;
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
    let unread = ["8081 is not captured", "list ruleset", "bypass_filter: [8081]"];
    vm.until("the ports to be left out", |status| has_note(status, &unread)).await;
    assert_eq!(redirected(&vm), "");

    fs::remove_file(&hangs).unwrap();
    vm.nft(&["add", "table", "inet", "another"]);
    vm.until("the rules to be read", |status| !has_note(status, &["list ruleset"])).await;
    assert_eq!(redirected(&vm), "8083");
    // The last complete reading stays valid for five minutes.
    fs::write(&hangs, "").unwrap();
    vm.nft(&["delete", "table", "inet", "another"]);
    let kept = ["their last reading is used", "list ruleset"];
    vm.until("the gap to be told", |status| has_note(status, &kept)).await;
    assert_eq!(redirected(&vm), "8083");
}

/// A filter in a table with the name of an iptables table, with chain names that iptables does not have and a
/// verdict map.
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
    // Now the filter accepts all redirected connections, even those to ports that it does not list.
    vm.until("the other port to be left out", |status| has_note(status, &["8083 is not captured"])).await;
    assert_eq!(redirected(&vm), "8081");
}

#[tokio::test]
async fn a_rule_that_loses_captured_connections_is_named_by_the_status_and_by_a_trial() {
    let vm = Vm::new(RulesBackend::Nft).await;
    let mut agent = FakeAgent::new(&vm, OPEN).await;
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
    let Response::Refused(why) = agent.confirm(trial).await else { panic!("it was confirmed") };
    assert!(why.contains("inet eg out: policy drop"), "{why}");
    // The rule that the documentation asks firewalls to have.
    vm.nft(&["add rule inet eg out tcp dport 15001 accept"]);
    assert_eq!(status(agent.confirm(trial).await).state, State::Confirmed);
    agent.well_until("nothing to be said", |status| !has_note(status, &["240.0.0.0:1"])).await;
}

#[tokio::test]
async fn a_rule_that_keeps_connections_from_being_tracked_is_named() {
    let vm = Vm::new(RulesBackend::Nft).await;
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    agent.want.spec.outbound.vips.insert("240.1.2.3:80".parse().unwrap());
    let raw = "add table inet nt; add chain inet nt out { type filter hook output priority -300; }; \
        add rule inet nt out tcp dport { 80, 8443 } notrack";
    vm.nft(&[raw]);
    let trial = status(agent.want().await).trial.unwrap();
    let Response::Refused(why) = agent.confirm(trial).await else { panic!("it was confirmed") };
    assert!(why.contains("inet nt out: tcp dport") && why.contains("notrack"), "{why}");
    vm.nft(&["delete", "table", "inet", "nt"]);
    assert_eq!(status(agent.confirm(trial).await).state, State::Confirmed);
    vm.nft(&[raw]);
    agent.well_until("the rule to be named", |status| has_note(status, &["port 80", "notrack"])).await;
    let Response::Status(now) = client::ask(&vm.socket(), &Request::Status).await.unwrap() else { panic!() };
    assert_eq!(now.state, State::Confirmed);
}

#[tokio::test]
async fn a_rule_that_loses_captured_connections_of_ipv6_alone_is_named_by_a_trial_and_by_the_status() {
    let vm = Vm::new(RulesBackend::Nft).await;
    let drops = "add table ip6 eg; add chain ip6 eg out { type filter hook output priority 0; policy accept; }; \
        add rule ip6 eg out tcp dport 15001 drop";
    vm.nft(&[drops]);
    let mut agent = FakeAgent::new(&vm, OPEN).await;
    agent.want.spec.outbound.vips.insert("[fd76:6d65:7368::7]:80".parse().unwrap());
    let trial = status(agent.want().await).trial.unwrap();
    let Response::Refused(why) = agent.confirm(trial).await else { panic!("it was confirmed") };
    assert!(why.contains("[fd76:6d65:7368::]:1") && why.contains("ip6 eg out: tcp dport 15001"), "{why}");
    assert!(!why.contains("240.0.0.0"), "{why}");
    vm.nft(&["delete", "table", "ip6", "eg"]);
    assert_eq!(status(agent.confirm(trial).await).state, State::Confirmed);
    vm.nft(&[drops]);
    let is_named = |status: &Status| has_note(status, &["[fd76:6d65:7368::]:1", "ip6 eg out"]);
    agent.well_until("the rule to be named", is_named).await;
    assert_eq!(vm.get(8080).unwrap(), "mesh");
}

/// Connects to the host's port from the other host, `times` times. Returns how many connections were
/// accepted.
fn called_from_outside(vm: &Vm, to: IpAddr, times: usize) -> usize {
    let call = || TcpStream::connect_timeout(&SocketAddr::new(to, 8081), Duration::from_millis(300)).is_ok();
    (0..times).filter(|_| vm.b.within(call).unwrap()).count()
}

/// Closes all connections to the inbound capture port, as Envoy does.
fn inbound_listener(vm: &Vm) {
    let listen = || TcpListener::bind(("::", INBOUND_PORT));
    let listener = vm.a.within_as(vm::MESH, listen).unwrap().unwrap();
    std::thread::spawn(move || listener.incoming().for_each(drop));
}

async fn connections_from_outside_are_counted(rules: RulesBackend) {
    let vm = Vm::new(rules).await;
    inbound_listener(&vm);
    let before = vm.ruleset();
    let mut agent =
        FakeAgent::new(&vm, "{inbound: {capture: redirect, bypass_filter: true, ports: [8081]}}").await;
    // The filter accepts the called port, but for IPv6 not the port to which it is redirected.
    vm.nft(&["add table ip6 fw; add chain ip6 fw in { type filter hook input priority 0; policy drop; }; \
        add rule ip6 fw in meta l4proto ipv6-icmp accept; add rule ip6 fw in ct state established accept; \
        add rule ip6 fw in iifname lo accept; add rule ip6 fw in tcp dport { 22, 8081 } accept"]);
    let trial = status(agent.want().await).trial.unwrap();
    agent.well_until("the redirects to hold", is_well).await;
    assert_eq!(called_from_outside(&vm, vm.a.v4.into(), 3), 3);
    // Some of these connections come before vmesh-net has noticed the filter and starts counting anew.
    assert_eq!(called_from_outside(&vm, vm.a.v6.into(), 8), 0);
    let Response::Refused(why) = agent.confirm(trial).await else { panic!("it was confirmed") };
    for words in ["IPv6 from outside", "ip6 fw in: policy drop", "15006"] {
        assert!(why.contains(words), "{why}");
    }
    assert!(!why.contains("IPv4"), "{why}");

    vm.nft(&["add rule ip6 fw in tcp dport 15006 accept"]);
    agent.well_until("the change to be seen", |status| status.state == State::Trial).await;
    assert_eq!(called_from_outside(&vm, vm.a.v6.into(), 3), 3);
    assert_eq!(status(agent.confirm(trial).await).state, State::Confirmed);

    // A later loss is reported too, and the report ends with the loss. With iptables, vmesh-net checks every
    // 10 s.
    if rules == RulesBackend::Iptables {
        let is_named = |status: &Status| has_note(status, &["IPv6 from outside", "policy drop"]);
        vm.nft(&["flush chain ip6 fw in; add rule ip6 fw in meta l4proto ipv6-icmp accept; \
            add rule ip6 fw in tcp dport 8081 accept"]);
        let lost = |status: &Status| called_from_outside(&vm, vm.a.v6.into(), 3) == 0 && is_named(status);
        agent.well_until("the loss to be told", lost).await;
        vm.nft(&["add rule ip6 fw in tcp dport 15006 accept"]);
        let arrive = |status: &Status| called_from_outside(&vm, vm.a.v6.into(), 3) == 3 && !is_named(status);
        agent.well_until("no loss to be told", arrive).await;
    }

    agent.want.spec.inbound.capture = vmesh_capture::spec::InboundCapture::Off;
    agent.want().await;
    vm.until("the rules to go", |status| status.state == State::Off).await;
    vm.nft(&["delete", "table", "ip6", "fw"]);
    assert_eq!(vm.ruleset(), before);
}

#[tokio::test]
async fn connections_from_outside_that_the_filter_drops_once_they_are_redirected_are_told_by_nftables() {
    connections_from_outside_are_counted(RulesBackend::Nft).await;
}

#[tokio::test]
async fn connections_from_outside_that_the_filter_drops_once_they_are_redirected_are_told_by_iptables() {
    connections_from_outside_are_counted(RulesBackend::Iptables).await;
}
