//! Golden tests of the compiler: a spec as input; the rules of both backends as text, or the notes, as
//! output.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use expect_test::{Expect, expect};
use vmesh_capture::host::{AccountNumber, Cgroup, NeverCaptured};
use vmesh_capture::program::UnsafeCapture;
use vmesh_capture::{Host, Program, Spec, Stage, iptables, nft};
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

fn check_nft(yaml: &str, expected: Expect) {
    let (program, notes) = Program::new(&spec(yaml), &host(), Stage::Confirmed).unwrap();
    let plan = nft::plan(&program, &nft::NftRules::absent(), true);
    let notes: String = notes.iter().map(|note| format!("{note}\n")).collect();
    expected.assert_eq(&without_hashes(&format!("{notes}{plan}")));
}

fn check_iptables(yaml: &str, expected: Expect) {
    let (program, notes) = Program::new(&spec(yaml), &host(), Stage::Confirmed).unwrap();
    let plan = iptables::plan(&program, &iptables::IptablesRules::absent(true));
    let notes: String = notes.iter().map(|note| format!("{note}\n")).collect();
    expected.assert_eq(&without_hashes(&format!("{notes}{plan}")));
}

#[test]
fn virtual_addresses_by_nftables() {
    check_nft(
        "outbound: {capture: vip, vips: ['240.240.0.10:80', '[fdfe::10]:80']}",
        expect![[r#"
        + table inet vmesh

        nft -f - <<'.'
        add table inet vmesh
        delete table inet vmesh
        table inet vmesh {
        	set captured_vips4 {
        		type ipv4_addr . inet_service
        		elements = { 240.240.0.10 . 80 }
        	}
        	set captured_vips6 {
        		type ipv6_addr . inet_service
        		elements = { fdfe::10 . 80 }
        	}
        	set outbound_control_planes4 {
        		type ipv4_addr . inet_service
        		elements = { 10.0.0.5 . 15012 }
        	}
        	set outbound_control_planes6 {
        		type ipv6_addr . inet_service
        	}
        	set outbound_envoy {
        		type uid
        		elements = { 999 }
        	}
        	set outbound_ssh {
        		type inet_service
        		flags interval
        		elements = { 22 }
        	}
        	chain hold {
        		type filter hook output priority 0; policy accept;
        		ct state invalid continue comment "vmesh hold"
        	}
        	chain captured {
        		ip daddr . tcp dport @captured_vips4 counter redirect to :15001 comment "vmesh vips4"
        		ip6 daddr . tcp dport @captured_vips6 counter redirect to :15001 comment "vmesh vips6"
        	}
        	chain outbound {
        		type nat hook output priority -101; policy accept;
        		meta l4proto != tcp return comment "vmesh not_tcp"
        		tcp flags & (fin|syn|rst|ack) != syn return comment "vmesh not_syn"
        		meta skuid @outbound_envoy return comment "vmesh envoy"
        		tcp dport @outbound_ssh return comment "vmesh ssh"
        		ip daddr . tcp dport @outbound_control_planes4 return comment "vmesh control_planes4"
        		ip6 daddr . tcp dport @outbound_control_planes6 return comment "vmesh control_planes6"
        		goto captured comment "vmesh all"
        	}
        }
        .
    "#]],
    );
}

#[test]
fn everything_by_nftables() {
    check_nft(
        "outbound:\n  capture: all\n  percent: 50\n  addresses: {'10.1.0.1:80': {percent: 5, on_loss: closed}}\n  \
         include: {units: [app.service], users: [app], ports: [80, 81, 8080-8090]}\n  \
         exclude: {cidrs: [10.9.0.0/16, 10.9.1.0/24]}\n  dial: {users: {app: 1}}\n\
         inbound: {capture: redirect, ports: [8080, 3306], strict: [3306, 9000], exclude: {cidrs: [10.8.0.1]}}",
        expect![[r#"
            + table inet vmesh

            nft -f - <<'.'
            add table inet vmesh
            delete table inet vmesh
            table inet vmesh {
            	set alive {
            		type inet_proto
            		flags timeout
            		elements = { tcp timeout 30s }
            	}
            	set alive_inbound {
            		type inet_proto
            		flags timeout
            		elements = { tcp timeout 30s }
            	}
            	set captured_dns {
            		type inet_service
            		flags interval
            		elements = { 53 }
            	}
            	set captured_exclude_cidrs4 {
            		type ipv4_addr
            		flags interval
            		elements = { 10.9.0.0/16 }
            	}
            	set captured_exclude_cidrs6 {
            		type ipv6_addr
            		flags interval
            	}
            	set captured_include_ports {
            		type inet_service
            		flags interval
            		elements = { 80-81, 8080-8090 }
            	}
            	set captured_link_local4 {
            		type ipv4_addr
            		flags interval
            		elements = { 169.254.0.0/16 }
            	}
            	set captured_link_local6 {
            		type ipv6_addr
            		flags interval
            		elements = { fe80::/10 }
            	}
            	set inbound_closed {
            		type inet_service
            		flags interval
            		elements = { 3306 }
            	}
            	set inbound_exclude_cidrs4 {
            		type ipv4_addr
            		flags interval
            		elements = { 10.8.0.1 }
            	}
            	set inbound_exclude_cidrs6 {
            		type ipv6_addr
            		flags interval
            	}
            	set inbound_open {
            		type inet_service
            		flags interval
            		elements = { 8080 }
            	}
            	set inbound_own {
            		type inet_service
            		flags interval
            		elements = { 15001, 15006, 15020 }
            	}
            	set inbound_ssh {
            		type inet_service
            		flags interval
            		elements = { 22 }
            	}
            	set included_ports_dial_1_users {
            		type uid
            		elements = { 1001 }
            	}
            	set outbound_control_planes4 {
            		type ipv4_addr . inet_service
            		elements = { 10.0.0.5 . 15012 }
            	}
            	set outbound_control_planes6 {
            		type ipv6_addr . inet_service
            	}
            	set outbound_envoy {
            		type uid
            		elements = { 999 }
            	}
            	set outbound_include_users {
            		type uid
            		elements = { 1001 }
            	}
            	set outbound_ssh {
            		type inet_service
            		flags interval
            		elements = { 22 }
            	}
            	set strict_exclude_cidrs4 {
            		type ipv4_addr
            		flags interval
            		elements = { 10.8.0.1 }
            	}
            	set strict_exclude_cidrs6 {
            		type ipv6_addr
            		flags interval
            	}
            	set strict_own {
            		type inet_service
            		flags interval
            		elements = { 15001, 15006, 15020 }
            	}
            	set strict_ssh {
            		type inet_service
            		flags interval
            		elements = { 22 }
            	}
            	set strict_strict {
            		type inet_service
            		flags interval
            		elements = { 3306, 9000 }
            	}
            	set to_100_5_closed4 {
            		type ipv4_addr . inet_service
            		elements = { 10.1.0.1 . 80 }
            	}
            	set to_100_5_closed6 {
            		type ipv6_addr . inet_service
            	}
            	set to_100_5_closed_rest4 {
            		type ipv4_addr . inet_service
            		elements = { 10.1.0.1 . 80 }
            	}
            	set to_100_5_closed_rest6 {
            		type ipv6_addr . inet_service
            	}
            	set to_1_1_closed4 {
            		type ipv4_addr . inet_service
            		elements = { 10.1.0.1 . 80 }
            	}
            	set to_1_1_closed6 {
            		type ipv6_addr . inet_service
            	}
            	set to_1_1_closed_rest4 {
            		type ipv4_addr . inet_service
            		elements = { 10.1.0.1 . 80 }
            	}
            	set to_1_1_closed_rest6 {
            		type ipv6_addr . inet_service
            	}
            	chain hold {
            		type filter hook output priority 0; policy accept;
            		ct state invalid continue comment "vmesh hold"
            	}
            	chain strict {
            		type filter hook input priority 0; policy accept;
            		meta l4proto != tcp return comment "vmesh not_tcp"
            		tcp flags & (fin|syn|rst|ack) != syn return comment "vmesh not_syn"
            		iifname "lo" return comment "vmesh loopback"
            		tcp dport @strict_ssh return comment "vmesh ssh"
            		tcp dport @strict_own return comment "vmesh own"
            		ip saddr @strict_exclude_cidrs4 return comment "vmesh exclude_cidrs4"
            		ip6 saddr @strict_exclude_cidrs6 return comment "vmesh exclude_cidrs6"
            		fib daddr type local tcp flags & (fin|syn|rst|ack) == syn tcp dport @strict_strict counter reject with tcp reset comment "vmesh strict"
            	}
            	chain arrived {
            		type filter hook input priority 30000; policy accept;
            		meta l4proto != tcp return comment "vmesh not_tcp"
            		tcp flags & (fin|syn|rst|ack) != syn return comment "vmesh not_syn"
            		meta nfproto ipv4 tcp dport 15006 ct state new ct status dnat counter comment "vmesh new4"
            		meta nfproto ipv6 tcp dport 15006 ct state new ct status dnat counter comment "vmesh new6"
            	}
            	chain arriving {
            		type filter hook input priority -400; policy accept;
            		meta l4proto != tcp return comment "vmesh not_tcp"
            		tcp flags & (fin|syn|rst|ack) != syn return comment "vmesh not_syn"
            		meta nfproto ipv4 tcp dport 15006 ct state new ct status dnat counter comment "vmesh new4"
            		meta nfproto ipv6 tcp dport 15006 ct state new ct status dnat counter comment "vmesh new6"
            	}
            	chain inbound {
            		type nat hook prerouting priority -101; policy accept;
            		meta l4proto != tcp return comment "vmesh not_tcp"
            		tcp flags & (fin|syn|rst|ack) != syn return comment "vmesh not_syn"
            		iifname "lo" return comment "vmesh loopback"
            		tcp dport @inbound_ssh return comment "vmesh ssh"
            		tcp dport @inbound_own return comment "vmesh own"
            		ip saddr @inbound_exclude_cidrs4 return comment "vmesh exclude_cidrs4"
            		ip6 saddr @inbound_exclude_cidrs6 return comment "vmesh exclude_cidrs6"
            		fib daddr type local tcp dport @inbound_open meta l4proto tcp meta l4proto @alive_inbound counter redirect to :15006 comment "vmesh open"
            		fib daddr type local tcp dport @inbound_closed counter redirect to :15006 comment "vmesh closed"
            	}
            	chain to_100 {
            		ip daddr . tcp dport @to_100_5_closed4 numgen random mod 100 < 5 counter redirect to :15001 comment "vmesh 5_closed4"
            		ip6 daddr . tcp dport @to_100_5_closed6 numgen random mod 100 < 5 counter redirect to :15001 comment "vmesh 5_closed6"
            		ip daddr . tcp dport @to_100_5_closed_rest4 return comment "vmesh 5_closed_rest4"
            		ip6 daddr . tcp dport @to_100_5_closed_rest6 return comment "vmesh 5_closed_rest6"
            		numgen random mod 100 < 50 meta l4proto tcp meta l4proto @alive counter redirect to :15001 comment "vmesh everything"
            	}
            	chain to_1 {
            		ip daddr . tcp dport @to_1_1_closed4 numgen random mod 100 < 1 counter redirect to :15001 comment "vmesh 1_closed4"
            		ip6 daddr . tcp dport @to_1_1_closed6 numgen random mod 100 < 1 counter redirect to :15001 comment "vmesh 1_closed6"
            		ip daddr . tcp dport @to_1_1_closed_rest4 return comment "vmesh 1_closed_rest4"
            		ip6 daddr . tcp dport @to_1_1_closed_rest6 return comment "vmesh 1_closed_rest6"
            		numgen random mod 100 < 1 meta l4proto tcp meta l4proto @alive counter redirect to :15001 comment "vmesh everything"
            	}
            	chain included_ports {
            		meta skuid @included_ports_dial_1_users goto to_1 comment "vmesh dial_1_users"
            		goto to_100 comment "vmesh dial"
            	}
            	chain captured {
            		oifname "lo" return comment "vmesh loopback"
            		fib daddr type local return comment "vmesh this_host"
            		ip daddr @captured_link_local4 return comment "vmesh link_local4"
            		ip6 daddr @captured_link_local6 return comment "vmesh link_local6"
            		tcp dport @captured_dns return comment "vmesh dns"
            		ip daddr @captured_exclude_cidrs4 return comment "vmesh exclude_cidrs4"
            		ip6 daddr @captured_exclude_cidrs6 return comment "vmesh exclude_cidrs6"
            		tcp dport @captured_include_ports goto included_ports comment "vmesh include_ports"
            	}
            	chain outbound {
            		type nat hook output priority -101; policy accept;
            		meta l4proto != tcp return comment "vmesh not_tcp"
            		tcp flags & (fin|syn|rst|ack) != syn return comment "vmesh not_syn"
            		meta skuid @outbound_envoy return comment "vmesh envoy"
            		tcp dport @outbound_ssh return comment "vmesh ssh"
            		ip daddr . tcp dport @outbound_control_planes4 return comment "vmesh control_planes4"
            		ip6 daddr . tcp dport @outbound_control_planes6 return comment "vmesh control_planes6"
            		meta skuid @outbound_include_users goto captured comment "vmesh include_users"
            		socket cgroupv2 level 2 "system.slice/app.service" goto captured comment "vmesh include_unit_0"
            	}
            }
            .
        "#]],
    );
}

#[test]
fn tproxy_by_nftables() {
    check_nft(
        "inbound: {capture: tproxy, ports: [8080, 3306], strict: [3306]}",
        expect![[r#"
            + table inet vmesh

            nft -f - <<'.'
            add table inet vmesh
            delete table inet vmesh
            table inet vmesh {
            	set alive_inbound {
            		type inet_proto
            		flags timeout
            		elements = { tcp timeout 30s }
            	}
            	set inbound_closed {
            		type inet_service
            		flags interval
            		elements = { 3306 }
            	}
            	set inbound_open {
            		type inet_service
            		flags interval
            		elements = { 8080 }
            	}
            	set inbound_own {
            		type inet_service
            		flags interval
            		elements = { 15001, 15006, 15020 }
            	}
            	set inbound_ssh {
            		type inet_service
            		flags interval
            		elements = { 22 }
            	}
            	set inbound_strict {
            		type inet_service
            		flags interval
            		elements = { 3306 }
            	}
            	chain inbound {
            		type filter hook prerouting priority -150; policy accept;
            		iifname "lo" return comment "vmesh loopback"
            		tcp dport @inbound_ssh return comment "vmesh ssh"
            		tcp dport @inbound_own return comment "vmesh own"
            		fib daddr type local tcp dport @inbound_open meta l4proto tcp meta l4proto @alive_inbound tproxy to :15006 counter accept comment "vmesh open"
            		fib daddr type local tcp dport @inbound_closed tproxy to :15006 counter accept comment "vmesh closed"
            		fib daddr type local tcp flags & (fin|syn|rst|ack) == syn tcp dport @inbound_strict counter drop comment "vmesh strict"
            	}
            }
            .
        "#]],
    );
}

#[test]
fn everything_by_iptables() {
    check_iptables(
        "outbound:\n  capture: all\n  percent: 50\n  vips: ['240.240.0.10:80', '[fdfe::10]:80']\n  \
         addresses: {'10.1.0.1:80': {percent: 5, on_loss: closed}}\n  \
         include: {units: [app.service], users: [app], ports: [80, 81, 8080-8090]}\n  \
         dial: {users: {app: 1}}\n\
         inbound: {capture: tproxy, ports: [8080, 3306], strict: [3306]}",
        expect![[r#"
            + ip nat VMESH_OUTBOUND
            + ip nat VMESH_CAPTURED
            + ip nat VMESH_INCLUDED_PORTS
            + ip nat VMESH_TO_1
            + ip nat VMESH_TO_100
            + ip nat VMESH_HOLD
            + ip nat OUTPUT: the jump to us is not there
            + ip mangle VMESH_INBOUND
            + ip mangle PREROUTING: the jump to us is not there
            + ip6 nat VMESH_OUTBOUND
            + ip6 nat VMESH_CAPTURED
            + ip6 nat VMESH_INCLUDED_PORTS
            + ip6 nat VMESH_TO_1
            + ip6 nat VMESH_TO_100
            + ip6 nat VMESH_HOLD
            + ip6 nat OUTPUT: the jump to us is not there
            + ip6 mangle VMESH_INBOUND
            + ip6 mangle PREROUTING: the jump to us is not there

            iptables-restore --noflush -w 5 <<'.'
            *nat
            :VMESH_OUTBOUND - [0:0]
            :VMESH_CAPTURED - [0:0]
            :VMESH_INCLUDED_PORTS - [0:0]
            :VMESH_TO_1 - [0:0]
            :VMESH_TO_100 - [0:0]
            :VMESH_HOLD - [0:0]
            -A VMESH_OUTBOUND -m comment --comment "vmesh envoy" -p tcp -m owner --uid-owner 999 -j RETURN
            -A VMESH_OUTBOUND -m comment --comment "vmesh ssh" -p tcp -m multiport --dports 22 -j RETURN
            -A VMESH_OUTBOUND -m comment --comment "vmesh control_planes" -p tcp -d 10.0.0.5 -m tcp --dport 15012 -j RETURN
            -A VMESH_OUTBOUND -m comment --comment "vmesh include_users" -p tcp -m owner --uid-owner 1001 -g VMESH_CAPTURED
            -A VMESH_OUTBOUND -m comment --comment "vmesh include_unit_0" -p tcp -m cgroup --path system.slice/app.service -g VMESH_CAPTURED
            -A VMESH_CAPTURED -m comment --comment "vmesh vips" -p tcp -d 240.240.0.10 -m tcp --dport 80 -j REDIRECT --to-ports 15001
            -A VMESH_CAPTURED -m comment --comment "vmesh loopback" -p tcp -o lo -j RETURN
            -A VMESH_CAPTURED -m comment --comment "vmesh this_host" -p tcp -m addrtype --dst-type LOCAL -j RETURN
            -A VMESH_CAPTURED -m comment --comment "vmesh link_local" -p tcp -d 169.254.0.0/16 -j RETURN
            -A VMESH_CAPTURED -m comment --comment "vmesh dns" -p tcp -m multiport --dports 53 -j RETURN
            -A VMESH_CAPTURED -m comment --comment "vmesh include_ports" -p tcp -m multiport --dports 80:81,8080:8090 -g VMESH_INCLUDED_PORTS
            -A VMESH_INCLUDED_PORTS -m comment --comment "vmesh dial_1_users" -p tcp -m owner --uid-owner 1001 -g VMESH_TO_1
            -A VMESH_INCLUDED_PORTS -m comment --comment "vmesh dial" -p tcp -g VMESH_TO_100
            -A VMESH_TO_1 -m comment --comment "vmesh 1_closed" -p tcp -d 10.1.0.1 -m tcp --dport 80 -m statistic --mode random --probability 0.01 -j REDIRECT --to-ports 15001
            -A VMESH_TO_1 -m comment --comment "vmesh 1_closed_rest" -p tcp -d 10.1.0.1 -m tcp --dport 80 -j RETURN
            -A VMESH_TO_1 -m comment --comment "vmesh everything" -p tcp -m statistic --mode random --probability 0.01 -m recent --name vmesh4 --mask 0.0.0.0 --rcheck --seconds 30 -j REDIRECT --to-ports 15001
            -A VMESH_TO_100 -m comment --comment "vmesh 5_closed" -p tcp -d 10.1.0.1 -m tcp --dport 80 -m statistic --mode random --probability 0.05 -j REDIRECT --to-ports 15001
            -A VMESH_TO_100 -m comment --comment "vmesh 5_closed_rest" -p tcp -d 10.1.0.1 -m tcp --dport 80 -j RETURN
            -A VMESH_TO_100 -m comment --comment "vmesh everything" -p tcp -m statistic --mode random --probability 0.50 -m recent --name vmesh4 --mask 0.0.0.0 --rcheck --seconds 30 -j REDIRECT --to-ports 15001
            -A VMESH_HOLD -m comment --comment "vmesh hold" -m conntrack --ctstate INVALID -j RETURN
            -I OUTPUT 1 -m comment --comment "vmesh jump" -p tcp --syn -j VMESH_OUTBOUND
            COMMIT
            *mangle
            :VMESH_INBOUND - [0:0]
            -A VMESH_INBOUND -m comment --comment "vmesh loopback" -p tcp -i lo -j RETURN
            -A VMESH_INBOUND -m comment --comment "vmesh ssh" -p tcp -m multiport --dports 22 -j RETURN
            -A VMESH_INBOUND -m comment --comment "vmesh own" -p tcp -m multiport --dports 15001,15006,15020 -j RETURN
            -A VMESH_INBOUND -m comment --comment "vmesh open" -p tcp -m addrtype --dst-type LOCAL -m multiport --dports 8080 -m recent --name vmesh_inbound4 --mask 0.0.0.0 --rcheck --seconds 30 -j TPROXY --on-port 15006
            -A VMESH_INBOUND -m comment --comment "vmesh closed" -p tcp -m addrtype --dst-type LOCAL -m multiport --dports 3306 -j TPROXY --on-port 15006
            -A VMESH_INBOUND -m comment --comment "vmesh strict" -p tcp -m addrtype --dst-type LOCAL -m multiport --dports 3306 -j DROP
            -I PREROUTING 1 -m comment --comment "vmesh jump" -p tcp --syn -j VMESH_INBOUND
            COMMIT
            .

            ip6tables-restore --noflush -w 5 <<'.'
            *nat
            :VMESH_OUTBOUND - [0:0]
            :VMESH_CAPTURED - [0:0]
            :VMESH_INCLUDED_PORTS - [0:0]
            :VMESH_TO_1 - [0:0]
            :VMESH_TO_100 - [0:0]
            :VMESH_HOLD - [0:0]
            -A VMESH_OUTBOUND -m comment --comment "vmesh envoy" -p tcp -m owner --uid-owner 999 -j RETURN
            -A VMESH_OUTBOUND -m comment --comment "vmesh ssh" -p tcp -m multiport --dports 22 -j RETURN
            -A VMESH_OUTBOUND -m comment --comment "vmesh include_users" -p tcp -m owner --uid-owner 1001 -g VMESH_CAPTURED
            -A VMESH_OUTBOUND -m comment --comment "vmesh include_unit_0" -p tcp -m cgroup --path system.slice/app.service -g VMESH_CAPTURED
            -A VMESH_CAPTURED -m comment --comment "vmesh vips" -p tcp -d fdfe::10 -m tcp --dport 80 -j REDIRECT --to-ports 15001
            -A VMESH_CAPTURED -m comment --comment "vmesh loopback" -p tcp -o lo -j RETURN
            -A VMESH_CAPTURED -m comment --comment "vmesh this_host" -p tcp -m addrtype --dst-type LOCAL -j RETURN
            -A VMESH_CAPTURED -m comment --comment "vmesh link_local" -p tcp -d fe80::/10 -j RETURN
            -A VMESH_CAPTURED -m comment --comment "vmesh dns" -p tcp -m multiport --dports 53 -j RETURN
            -A VMESH_CAPTURED -m comment --comment "vmesh include_ports" -p tcp -m multiport --dports 80:81,8080:8090 -g VMESH_INCLUDED_PORTS
            -A VMESH_INCLUDED_PORTS -m comment --comment "vmesh dial_1_users" -p tcp -m owner --uid-owner 1001 -g VMESH_TO_1
            -A VMESH_INCLUDED_PORTS -m comment --comment "vmesh dial" -p tcp -g VMESH_TO_100
            -A VMESH_TO_1 -m comment --comment "vmesh everything" -p tcp -m statistic --mode random --probability 0.01 -m recent --name vmesh6 --mask :: --rcheck --seconds 30 -j REDIRECT --to-ports 15001
            -A VMESH_TO_100 -m comment --comment "vmesh everything" -p tcp -m statistic --mode random --probability 0.50 -m recent --name vmesh6 --mask :: --rcheck --seconds 30 -j REDIRECT --to-ports 15001
            -A VMESH_HOLD -m comment --comment "vmesh hold" -m conntrack --ctstate INVALID -j RETURN
            -I OUTPUT 1 -m comment --comment "vmesh jump" -p tcp --syn -j VMESH_OUTBOUND
            COMMIT
            *mangle
            :VMESH_INBOUND - [0:0]
            -A VMESH_INBOUND -m comment --comment "vmesh loopback" -p tcp -i lo -j RETURN
            -A VMESH_INBOUND -m comment --comment "vmesh ssh" -p tcp -m multiport --dports 22 -j RETURN
            -A VMESH_INBOUND -m comment --comment "vmesh own" -p tcp -m multiport --dports 15001,15006,15020 -j RETURN
            -A VMESH_INBOUND -m comment --comment "vmesh open" -p tcp -m addrtype --dst-type LOCAL -m multiport --dports 8080 -m recent --name vmesh_inbound6 --mask :: --rcheck --seconds 30 -j TPROXY --on-port 15006
            -A VMESH_INBOUND -m comment --comment "vmesh closed" -p tcp -m addrtype --dst-type LOCAL -m multiport --dports 3306 -j TPROXY --on-port 15006
            -A VMESH_INBOUND -m comment --comment "vmesh strict" -p tcp -m addrtype --dst-type LOCAL -m multiport --dports 3306 -j DROP
            -I PREROUTING 1 -m comment --comment "vmesh jump" -p tcp --syn -j VMESH_INBOUND
            COMMIT
            .
        "#]],
    );
}

#[test]
fn redirect_by_iptables() {
    check_iptables(
        "inbound: {capture: redirect, ports: [8080, 3306], strict: [3306, 9000]}",
        expect![[r#"
            + ip nat VMESH_INBOUND
            + ip nat VMESH_ARRIVED
            + ip nat VMESH_HOLD
            + ip nat PREROUTING: the jump to us is not there
            + ip nat INPUT: the jump to us is not there
            + ip mangle VMESH_ARRIVING
            + ip mangle INPUT: the jump to us is not there
            + ip filter VMESH_STRICT
            + ip filter INPUT: the jump to us is not there
            + ip6 nat VMESH_INBOUND
            + ip6 nat VMESH_ARRIVED
            + ip6 nat VMESH_HOLD
            + ip6 nat PREROUTING: the jump to us is not there
            + ip6 nat INPUT: the jump to us is not there
            + ip6 mangle VMESH_ARRIVING
            + ip6 mangle INPUT: the jump to us is not there
            + ip6 filter VMESH_STRICT
            + ip6 filter INPUT: the jump to us is not there

            iptables-restore --noflush -w 5 <<'.'
            *nat
            :VMESH_INBOUND - [0:0]
            :VMESH_ARRIVED - [0:0]
            :VMESH_HOLD - [0:0]
            -A VMESH_INBOUND -m comment --comment "vmesh loopback" -p tcp -i lo -j RETURN
            -A VMESH_INBOUND -m comment --comment "vmesh ssh" -p tcp -m multiport --dports 22 -j RETURN
            -A VMESH_INBOUND -m comment --comment "vmesh own" -p tcp -m multiport --dports 15001,15006,15020 -j RETURN
            -A VMESH_INBOUND -m comment --comment "vmesh open" -p tcp -m addrtype --dst-type LOCAL -m multiport --dports 8080 -m recent --name vmesh_inbound4 --mask 0.0.0.0 --rcheck --seconds 30 -j REDIRECT --to-ports 15006
            -A VMESH_INBOUND -m comment --comment "vmesh closed" -p tcp -m addrtype --dst-type LOCAL -m multiport --dports 3306 -j REDIRECT --to-ports 15006
            -A VMESH_ARRIVED -m comment --comment "vmesh new" -p tcp -m tcp --dport 15006 -m conntrack --ctstate NEW -m conntrack --ctstate DNAT -j RETURN
            -A VMESH_HOLD -m comment --comment "vmesh hold" -m conntrack --ctstate INVALID -j RETURN
            -I PREROUTING 1 -m comment --comment "vmesh jump" -p tcp --syn -j VMESH_INBOUND
            -I INPUT 1 -m comment --comment "vmesh jump" -p tcp --syn -j VMESH_ARRIVED
            COMMIT
            *mangle
            :VMESH_ARRIVING - [0:0]
            -A VMESH_ARRIVING -m comment --comment "vmesh new" -p tcp -m tcp --dport 15006 -m conntrack --ctstate NEW -m conntrack --ctstate DNAT -j RETURN
            -I INPUT 1 -m comment --comment "vmesh jump" -p tcp --syn -j VMESH_ARRIVING
            COMMIT
            *filter
            :VMESH_STRICT - [0:0]
            -A VMESH_STRICT -m comment --comment "vmesh loopback" -p tcp -i lo -j RETURN
            -A VMESH_STRICT -m comment --comment "vmesh ssh" -p tcp -m multiport --dports 22 -j RETURN
            -A VMESH_STRICT -m comment --comment "vmesh own" -p tcp -m multiport --dports 15001,15006,15020 -j RETURN
            -A VMESH_STRICT -m comment --comment "vmesh strict" -p tcp -m addrtype --dst-type LOCAL -m multiport --dports 3306,9000 -j REJECT --reject-with tcp-reset
            -I INPUT 1 -m comment --comment "vmesh jump" -p tcp --syn -j VMESH_STRICT
            COMMIT
            .

            ip6tables-restore --noflush -w 5 <<'.'
            *nat
            :VMESH_INBOUND - [0:0]
            :VMESH_ARRIVED - [0:0]
            :VMESH_HOLD - [0:0]
            -A VMESH_INBOUND -m comment --comment "vmesh loopback" -p tcp -i lo -j RETURN
            -A VMESH_INBOUND -m comment --comment "vmesh ssh" -p tcp -m multiport --dports 22 -j RETURN
            -A VMESH_INBOUND -m comment --comment "vmesh own" -p tcp -m multiport --dports 15001,15006,15020 -j RETURN
            -A VMESH_INBOUND -m comment --comment "vmesh open" -p tcp -m addrtype --dst-type LOCAL -m multiport --dports 8080 -m recent --name vmesh_inbound6 --mask :: --rcheck --seconds 30 -j REDIRECT --to-ports 15006
            -A VMESH_INBOUND -m comment --comment "vmesh closed" -p tcp -m addrtype --dst-type LOCAL -m multiport --dports 3306 -j REDIRECT --to-ports 15006
            -A VMESH_ARRIVED -m comment --comment "vmesh new" -p tcp -m tcp --dport 15006 -m conntrack --ctstate NEW -m conntrack --ctstate DNAT -j RETURN
            -A VMESH_HOLD -m comment --comment "vmesh hold" -m conntrack --ctstate INVALID -j RETURN
            -I PREROUTING 1 -m comment --comment "vmesh jump" -p tcp --syn -j VMESH_INBOUND
            -I INPUT 1 -m comment --comment "vmesh jump" -p tcp --syn -j VMESH_ARRIVED
            COMMIT
            *mangle
            :VMESH_ARRIVING - [0:0]
            -A VMESH_ARRIVING -m comment --comment "vmesh new" -p tcp -m tcp --dport 15006 -m conntrack --ctstate NEW -m conntrack --ctstate DNAT -j RETURN
            -I INPUT 1 -m comment --comment "vmesh jump" -p tcp --syn -j VMESH_ARRIVING
            COMMIT
            *filter
            :VMESH_STRICT - [0:0]
            -A VMESH_STRICT -m comment --comment "vmesh loopback" -p tcp -i lo -j RETURN
            -A VMESH_STRICT -m comment --comment "vmesh ssh" -p tcp -m multiport --dports 22 -j RETURN
            -A VMESH_STRICT -m comment --comment "vmesh own" -p tcp -m multiport --dports 15001,15006,15020 -j RETURN
            -A VMESH_STRICT -m comment --comment "vmesh strict" -p tcp -m addrtype --dst-type LOCAL -m multiport --dports 3306,9000 -j REJECT --reject-with tcp-reset
            -I INPUT 1 -m comment --comment "vmesh jump" -p tcp --syn -j VMESH_STRICT
            COMMIT
            .
        "#]],
    );
}

#[test]
fn what_has_no_effect_on_this_host_is_said_and_costs_nothing_else() {
    let yaml = "outbound:\n  capture: all\n  vips: ['240.0.0.1:22', '127.0.0.1:80', '240.0.0.2:80']\n  \
        addresses: {'10.0.0.1:22': {}}\n  include: {users: [nobody-knows]}\n  exclude: {units: [gone.service], groups: [none]}\n\
        inbound: {capture: redirect, ports: [22, 80, 15000-15010], strict: [15020]}";
    let (program, notes) = Program::new(&spec(yaml), &host(), Stage::Confirmed).unwrap();
    let notes: String = notes.iter().map(|note| format!("{note}\n")).collect();
    expect![[r#"
        inbound.ports: 15001 is left out: it is Envoy's or the agent's own
        inbound.ports: 15006 is left out: it is Envoy's or the agent's own
        inbound.ports: 22 is left out: it is SSH
        inbound.strict: 15020 is left out: it is Envoy's or the agent's own
        outbound.addresses: 10.0.0.1:22 is not captured: port 22 is SSH, which never is
        outbound.exclude: gone.service does not run: it selects nothing until it does
        outbound.exclude: there is no group `none`: it selects nothing until there is
        outbound.include: there is no user `nobody-knows`: it selects nothing until there is
        outbound.vips: 127.0.0.1:80 is not captured: no other host could have it
        outbound.vips: 240.0.0.1:22 is not captured: port 22 is SSH, which never is
    "#]]
    .assert_eq(&notes);
    // A user that does not exist in `include` selects nothing; it does not make the selection empty, which
    // would mean all.
    let plan = nft::plan(&program, &nft::NftRules::absent(), true).to_string();
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
        outbound.exclude: the host does not know the user `app` any more, or not now: its last number, 7, counts
    "#]]
    .assert_eq(&notes);
    for yaml in [excluded, "outbound: {capture: all, dial: {users: {app: 1}}}"] {
        let refused = of(yaml, AccountNumber::Unanswered).unwrap_err();
        assert!(refused.to_string().contains("does `getent passwd app` answer?"), "{refused}");
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
        assert!(nft::plan(&program, &nft::NftRules::absent(), true).is_empty());
        assert!(iptables::plan(&program, &iptables::IptablesRules::absent(true)).is_empty());
    }
}

#[test]
fn what_nft_prints_is_read_or_refused_and_never_panics() {
    for wrong in
        ["", "[]", "{\"nftables\": [{\"rule\": {\"chain\": \"x\"}}]}", "{\"nftables\": [{\"set\": {}}]}"]
    {
        assert!(nft::NftRules::parse(wrong).is_err(), "{wrong}");
    }
    let odd = "{\"nftables\": [{\"metainfo\": {}}, {\"table\": {}}, {\"set\": {\"name\": \"a\", \"type\": [\"x\"], \"elem\": [1]}}]}";
    assert!(nft::NftRules::parse(odd).unwrap().exists());
    for odd in
        ["*nat\n:\n-A\n-A x\n:VMESH_\n-A VMESH_ \n", "-A before any table", "*\n*\n", "*nat\n-A O -j\n"]
    {
        iptables::FamilyRules::parse(odd);
    }
}
