//! The rules of iptables and ip6tables.

use expect_test::{Expect, expect};
use vmesh_capture::iptables;
use vmesh_capture::{Program, Stage};

use crate::{host, spec, without_hashes};

fn check_iptables(yaml: &str, expected: Expect) {
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
