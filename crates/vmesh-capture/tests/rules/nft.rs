//! The rules of nftables.

use expect_test::{Expect, expect};
use vmesh_capture::nft;
use vmesh_capture::{Program, Stage};

use crate::{host, spec, without_hashes};

fn check_nft(yaml: &str, expected: Expect) {
    let (program, notes) = Program::new(&spec(yaml), &host(), Stage::Confirmed).unwrap();
    let plan = nft::plan(&program, &nft::NftRules::absent(), true);
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
