//! Golden tests of all checks, one test for each group.

use super::*;

#[test]
fn the_machine() {
    check(
        "D1",
        &[&|facts| file(facts, "/proc/sys/kernel/osrelease", "4.19.0-27-amd64\n"), &|facts| {
            facts.commands.insert(HostCommand::Version, failed("version `GLIBC_2.36' not found"));
        }],
        expect![[r#"
            ! D1 the kernel is 4.19.0-27-amd64, older than 5.15 | vmesh is not tested on it; capture by systemd unit cannot be had before 5.13 | fix: upgrade the host to Debian 12 or Ubuntu 22.04, or later
            x D1 vmesh-agent does not run here: version `GLIBC_2.36' not found | nothing of vmesh starts on this host | fix: install the package that was built for this distribution (its glibc, its processor)
        "#]],
    );
    check(
        "D2",
        &[
            &|facts| facts.config = AgentConfig::Missing("/etc/vmesh/agent.yaml".into()),
            &|facts| facts.config = AgentConfig::Refused("agent.yaml:2:1: unknown field `upstream`".into()),
            &|facts| change_unit(facts, "vmesh-agent.service", "ActiveState=active", "ActiveState=inactive"),
            &|facts| {
                change_unit(facts, "vmesh-envoy.service", "ActiveState=active", "ActiveState=activating")
            },
            &|facts| {
                change_unit(facts, "vmesh-net.service", "ActiveState=active", "ActiveState=failed");
                change_unit(facts, "vmesh-net.service", "Result=success", "Result=exit-code");
            },
            &|facts| {
                change_unit(facts, "vmesh-net.service", "NRestarts=0", "NRestarts=17");
                change_unit(facts, "vmesh-net.service", "ActiveState=active", "ActiveState=activating");
            },
            &|facts| change_unit(facts, "vmesh-envoy.service", "LoadState=loaded", "LoadState=not-found"),
            &|facts| change_unit(facts, "vmesh.target", "UnitFileState=enabled", "UnitFileState=disabled"),
            &|facts| {
                facts.answers.insert(HttpQuery::Agent, Err("127.0.0.1:15020: no answer within 1.5 s".into()));
            },
            &|facts| {
                facts.commands.insert(HostCommand::Units, failed("System has not been booted with systemd"));
                facts.answers.insert(HttpQuery::Agent, Err("127.0.0.1:15020: Connection refused".into()));
            },
            &|facts| {
                outline(facts).envoy.manage = super::super::facts::EnvoyManager::Child;
                facts.answers.insert(HttpQuery::Agent, Err("127.0.0.1:15020: Connection refused".into()));
            },
            &|facts| {
                facts.commands.insert(HostCommand::Systemd, ran("systemd 245 (245.4)\n"));
            },
        ],
        expect![[r#"
            x D2 this host is not configured: there is no /etc/vmesh/agent.yaml | nothing of vmesh runs here; applications are as they would be without it | fix: write /etc/vmesh/agent.yaml (an example: /usr/share/doc/vmesh-agent/examples/agent.yaml), then `systemctl start vmesh.target`
            x D2 the configuration is refused: agent.yaml:2:1: unknown field `upstream` | what runs goes on with what it has read, and does not start again | fix: mend it; `vmesh-agent --check` says whether it is sound
            x D2 vmesh-agent.service is inactive | Envoy goes on with what it has, no change reaches it, names of the mesh are not answered; redirects that may lapse do | fix: systemctl start vmesh-agent
            x D2 vmesh-envoy.service waits for something to serve | no request of this host goes through the mesh | fix: a control plane has to answer once (D9), and Envoy has to run: `systemctl status vmesh-envoy`
            x D2 vmesh-net.service has failed: exit-code | nobody keeps the rules of capture, or refreshes those that lapse | fix: systemctl reset-failed vmesh-net; systemctl restart vmesh-net
            x D2 vmesh-net.service ends and is started again: 17 times by now (last result: success) | nobody keeps the rules of capture, or refreshes those that lapse | fix: `journalctl -u vmesh-net -n 50` says why it ends
            x D2 vmesh-envoy.service is not installed | no request of this host goes through the mesh | fix: install the package vmesh-agent; without systemd, set `envoy: {manage: child}`
            ! D2 vmesh.target is not enabled | after the next boot nothing of vmesh runs here | fix: systemctl enable vmesh.target
            x D2 the agent runs, and does not answer: 127.0.0.1:15020: no answer within 1.5 s | Envoy goes on with what it has, no change reaches it, names of the mesh are not answered; redirects that may lapse do | fix: systemctl restart vmesh-agent
            x D2 agent.yaml says that systemd starts vmesh, and it does not answer: System has not been booted with systemd | nothing of vmesh runs on this host, or nobody starts it again | fix: on a host without systemd set `envoy: {manage: child}` in /etc/vmesh/agent.yaml, and start vmesh-agent
            x D2 the agent does not answer: 127.0.0.1:15020: Connection refused | Envoy goes on with what it has, if it runs; no change reaches it | fix: start vmesh-agent (`envoy: {manage: child}`: what started it on this host is not known here)
            ! D2 systemd is 245, older than 247 | the units' limits and protections do not all work | fix: upgrade the host
        "#]],
    );
    check(
        "D3",
        &[&|facts| facts.disks[0].read_only = true, &|facts| facts.disks[0].free = 3 << 20, &|facts| {
            facts.disks[0].files_free = 2
        }],
        expect![[r#"
            x D3 /var/lib/vmesh-agent is on a file system that is mounted read-only | the next start has no newer configuration than what is saved, and a bypass or a trial may not be remembered | fix: `dmesg` says whether the disk has failed; mount it writable again
            x D3 /var/lib/vmesh-agent has 3 MiB left to write | the next start has no newer configuration than what is saved, and a bypass or a trial may not be remembered | fix: make room: `du -xh --max-depth=2 "$(df --output=target /var/lib/vmesh-agent | tail -1)" | sort -h | tail`
            x D3 /var/lib/vmesh-agent has 2 inodes left | the next start has no newer configuration than what is saved, and a bypass or a trial may not be remembered | fix: remove files that nobody needs: `df -i` shows the file system
        "#]],
    );
    check(
        "D4",
        &[
            &|facts| file(facts, "/proc/meminfo", "MemTotal:       4000000 kB\nMemAvailable:   100000 kB\n"),
            &|facts| {
                change_unit(facts, "vmesh-envoy.service", "MemoryCurrent=50000000", "MemoryCurrent=390000000")
            },
            &|facts| file(facts, "vmesh-envoy.service", "oom 1\noom_kill 3\n"),
        ],
        expect![[r#"
            x D4 97 MiB of 3906 MiB of memory are available | the kernel may kill applications, then the agent, then Envoy | fix: `ps aux --sort -rss | head` shows who has it; give the host more, or run less on it
            ! D4 vmesh-envoy.service uses 371 MiB of the 381 MiB that it may | above that it is slowed down, and then killed | fix: raise it: `systemctl edit vmesh-envoy`, [Service], MemoryHigh= and MemoryMax=
            ! D4 the kernel has killed 3 processes of vmesh-envoy.service for want of memory | what was under way through it is lost each time | fix: `journalctl -k -g oom` says when; raise MemoryMax= (`systemctl edit vmesh-envoy`), or give the host more
        "#]],
    );
    check(
        "D5",
        &[&|facts| facts.envoy_files = Ok(900_000), &|facts| facts.envoy_files = Err("only root may".into())],
        expect![[r#"
            ! D5 Envoy has 900000 files open, and may have 1048576 | a connection is two of them; beyond the limit Envoy takes none | fix: raise LimitNOFILE= (`systemctl edit vmesh-envoy`), then `systemctl restart vmesh-envoy`
            - not looked at: D5: only root may
        "#]],
    );
    check(
        "D6",
        &[
            &|facts| {
                facts.commands.insert(HostCommand::Clock, ran("NTPSynchronized=no\n"));
            },
            &|facts| {
                facts
                    .commands
                    .insert(HostCommand::Clock, Err("there is no `timedatectl` on this host".into()));
            },
        ],
        expect![[r#"
            ! D6 the clock is not synchronized | times in logs and ages are not to be relied on; certificates of a later version will be refused | fix: timedatectl set-ntp true
            - not looked at: D6: there is no `timedatectl` on this host
        "#]],
    );
    check(
        "D7",
        &[&|facts| file(facts, "/etc/machine-id", "\n"), &|facts| outline(facts).node = "localhost".into()],
        expect![[r#"
            ! D7 /etc/machine-id is ``, which is none | hosts made of one image are not told apart, in the journal and by DHCP | fix: rm -f /etc/machine-id; systemd-machine-id-setup
            x D7 the node is called `localhost`, as other hosts may be (this host: `web-17`) | two nodes of one name are one to the control plane: what it shows and says of them is mixed up | fix: give the host a name of its own (`hostnamectl hostname NAME`), or set `node.name`; `vmeshctl problems` says whether another has it
        "#]],
    );
}

#[test]
fn the_network() {
    check(
        "D9",
        &[
            &|facts| facts.control_planes[0].connected = Err("Connection refused (os error 111)".into()),
            &|facts| facts.control_planes[0].resolved = Err("Name or service not known".into()),
            &|facts| facts.control_planes[0].connected = Ok(900),
            &|facts| {
                let lost = Reachability {
                    connected: Err("none in 1.5 s".into()),
                    ..facts.control_planes[0].clone()
                };
                facts.control_planes.push(Reachability { address: "10.0.0.6:15010".into(), ..lost });
            },
            &|facts| set(facts, HttpQuery::Agent, "/control_plane/in_use", Value::Null),
        ],
        expect![[r#"
            x D9 control plane 10.0.0.5:15010 cannot be reached: no TCP connection: Connection refused (os error 111) | Envoy goes on with the last configuration; no change arrives | fix: on 10.0.0.5: `systemctl status vmesh-control`; from here: `curl -v telnet://10.0.0.5:15010`
            x D9 control plane 10.0.0.5:15010 cannot be reached: its name is not found: Name or service not known | Envoy goes on with the last configuration; no change arrives | fix: on 10.0.0.5: `systemctl status vmesh-control`; from here: `curl -v telnet://10.0.0.5:15010`
            ! D9 control plane 10.0.0.5:15010 is slow: it takes 0 ms for its name and 900 ms for a connection | changes arrive later | fix: `ping 10.0.0.5`; look at the network, or at that control plane's load
            ! D9 control plane 10.0.0.6:15010 cannot be reached: no TCP connection: none in 1.5 s | the others serve this node; there is less to fall back to | fix: on 10.0.0.6: `systemctl status vmesh-control`
            x D9 a control plane can be reached, and the agent uses none: it has not said why | Envoy goes on with the last configuration; no change arrives | fix: `journalctl -u vmesh-agent -n 50` says what it is told there
        "#]],
    );
    check(
        "D11",
        &[
            &|facts| {
                let some = listening(&[(15020, AGENT), (15053, AGENT), (15006, ENVOY)]);
                file(facts, "/proc/net/tcp", &some);
            },
            &|facts| {
                let other = listening(&[(15020, AGENT), (15053, AGENT), (15001, 1000), (15006, ENVOY)]);
                file(facts, "/proc/net/tcp", &other);
            },
        ],
        expect![[r#"
            x D11 nobody listens on 127.0.0.1:15001, for captured outbound connections | connections to it are refused | fix: the control plane has to know the service (`vmeshctl problems`), and Envoy to accept it (D26)
            x D11 127.0.0.1:15001 is taken by a program of user 1000, and is for captured outbound connections | Envoy cannot listen there, or another program gets a share of its connections | fix: `ss -lntp 'sport = :15001'` shows it: stop it, or give it another port
        "#]],
    );
    check(
        "D12",
        &[&|facts| file(facts, "/proc/sys/net/netfilter/nf_conntrack_count", "200000\n"), &|facts| {
            file(facts, "/proc/sys/net/netfilter/nf_conntrack_count", "262000\n")
        }],
        expect![[r#"
            ! D12 the kernel tracks 200000 connections, and has room for 262144 | when it is full, packets of new connections of every program are dropped | fix: sysctl -w net.netfilter.nf_conntrack_max=524288
            x D12 the kernel tracks 262000 connections, and has room for 262144 | when it is full, packets of new connections of every program are dropped | fix: sysctl -w net.netfilter.nf_conntrack_max=524288
        "#]],
    );
    check(
        "D13",
        &[
            &|facts| file(facts, "/proc/net/sockstat", "TCP: inuse 1 orphan 0 tw 27000 alloc 1 mem 171\n"),
            &|facts| file(facts, "/proc/sys/net/ipv4/ip_local_port_range", "10240\t65535\n"),
        ],
        expect![[r#"
            ! D13 27000 closed connections wait (TIME_WAIT), and 28232 ports are there for outgoing ones | new connections to a busy address fail with "cannot assign requested address" | fix: sysctl -w net.ipv4.ip_local_port_range='15360 65535' net.ipv4.tcp_tw_reuse=1
            ! D13 ports 15001,15006,15020,15053 are among those that the kernel gives to outgoing connections (10240 to 65535) | after a restart Envoy or the agent may find such a port taken, and not listen | fix: sysctl -w net.ipv4.ip_local_reserved_ports=15001,15006,15020,15053
        "#]],
    );
    check(
        "D14",
        &[&|facts| {
            facts.commands.insert(HostCommand::Route4, failed("RTNETLINK answers: Network is unreachable"));
        }],
        expect![[r#"
            x D14 the kernel has no route to virtual addresses (240.0.0.0/5): RTNETLINK answers: Network is unreachable | connections to names of the mesh fail at once: "network is unreachable" | fix: ip route add 240.0.0.0/5 dev lo
        "#]],
    );
    check(
        "D15",
        &[
            &|facts| {
                file(facts, "/proc/net/if_inet6", "20010db8000000000000000000000001 02 40 00 80     eth0\n")
            },
            &|facts| file(facts, "/proc/net/tcp6", ""),
        ],
        expect![[r#"
            ! D15 this host has IPv6 addresses, and no route to virtual ones (fd76:6d65:7368::/48) | programs that try IPv6 first fail over to IPv4, or fail where they do not | fix: give the host a default route of IPv6, or one for fd76:6d65:7368::/48 by the interface of its other traffic
            x D15 Envoy takes captured connections of IPv4 only: nobody listens on [::1]:15001 | connections to names of the mesh by IPv6 are refused | fix: systemctl restart vmesh-agent
        "#]],
    );
}

#[test]
fn capture() {
    check(
        "D16",
        &[
            &|facts| status(facts).state = State::Bypassed,
            &|facts| status(facts).error = Some("could not run `nft`".into()),
            &|facts| status(facts).reverted = Some("dns: 127.0.0.1:15053 does not answer".into()),
            &|facts| {
                status(facts).state = State::Trial;
                status(facts).trial_ends_in = Some(12);
            },
            &|facts| status(facts).state = State::Off,
            &|facts| facts.plan = Ok("+ table inet vmesh\n".into()),
            &|facts| {
                let by = Some("firewalld (pid 812)".to_owned());
                status(facts).drift = protocol::Drift { count: 2, seconds_ago: Some(41), what: vec![], by };
            },
            &|facts| status(facts).notes = vec!["outbound.include.units: app.service does not run".into()],
            &|facts| {
                facts.net = Err("vmesh-net has not answered in 1.5 s".into());
                facts.commands.insert(HostCommand::Rules, ran("table inet filter {\n}\n"));
            },
            &|facts| facts.net = Err("vmesh-net has not answered in 1.5 s".into()),
            &|facts| {
                facts.net = Err("could not reach vmesh-net; because: Permission denied (os error 13)".into())
            },
        ],
        expect![[r#"
            x D16 this host is out of the mesh, by its bypass | connections go past Envoy to where they are made to; names of the mesh mean the endpoints themselves | fix: vmeshctl bypass off
            x D16 the rules are not as they are wanted: could not run `nft` | connections go past Envoy to where they are made to; names of the mesh mean the endpoints themselves | fix: `journalctl -u vmesh-net -n 50` says what was tried
            x D16 a change of what is captured was taken back: dns: 127.0.0.1:15053 does not answer | what was captured before the change still is, and nothing else | fix: vmeshctl capture retry
            ! D16 a change of what is captured is on trial, and is taken back in 12 s | unless it is confirmed, it will not hold | fix: vmeshctl capture confirm
            x D16 nothing is captured, although agent.yaml says that something is to be | connections go past Envoy to where they are made to; names of the mesh mean the endpoints themselves | fix: the agent captures what Envoy has accepted: `vmeshctl capture` and D9, D26 say what is missing
            x D16 the rules are not as they are wanted; to do: + table inet vmesh | some connections go past Envoy, or to where they should not | fix: systemctl restart vmesh-net
            ! D16 firewalld (pid 812) changed the rules 41 s ago; they were mended (2 times since vmesh-net began) | until they were mended, connections went past Envoy; those through a redirect were reset | fix: let it load its rules without `flush ruleset`, or less often; the finding goes away after an hour
            ! D16 a part of `capture` has no effect on this host: outbound.include.units: app.service does not run | the rest is captured as it is configured | fix: mend it in /etc/vmesh/agent.yaml, then `systemctl restart vmesh-agent`
            x D16 the rules of capture are not there | connections go past Envoy to where they are made to; names of the mesh mean the endpoints themselves | fix: systemctl restart vmesh-net
            x D16 vmesh-net runs, and does not answer: vmesh-net has not answered in 1.5 s | nobody mends the rules, or refreshes those that lapse | fix: systemctl restart vmesh-net
            - not looked at: D16: could not reach vmesh-net; because: Permission denied (os error 13)
        "#]],
    );
    check(
        "D17",
        &[
            &|facts| {
                let istio =
                    "table ip nat {\n\tchain ISTIO_OUTPUT {\n\t\ttcp dport 80 redirect to :15001\n\t}\n}\n";
                facts.commands.insert(HostCommand::Rules, ran(istio));
            },
            &|facts| {
                let own = "table ip mine {\n\tchain early {\n\t\ttype nat hook output priority dstnat - 10; policy accept;\n\
                           \t\ttcp dport 80 dnat to 10.0.0.9:3128\n\t}\n}\n";
                facts.commands.insert(HostCommand::Rules, ran(own));
            },
            &|facts| {
                let legacy = "*nat\n:OUTPUT ACCEPT [0:0]\n:KUMA_MESH_OUTBOUND - [0:0]\n:KUMA_MESH_INBOUND - [0:0]\n-A OUTPUT -j KUMA_MESH_OUTBOUND\n\
                              -A KUMA_MESH_OUTBOUND -p tcp -j REDIRECT --to-ports 15001\n-A KUMA_MESH_INBOUND -j RETURN\n";
                facts.commands.insert(HostCommand::LegacyRules, ran(legacy));
            },
            &|facts| {
                facts.commands.insert(HostCommand::LegacyRules, ran("*filter\n-A INPUT -p tcp -j ACCEPT\n"));
                let rules = "table inet vmesh {\n\tchain outbound {\n\t\ttype nat hook output priority -101; policy accept;\n\t}\n}\n";
                facts.commands.insert(HostCommand::Rules, ran(rules));
            },
            &|facts| {
                facts.commands.insert(HostCommand::Rules, Err("only root may".into()));
            },
        ],
        expect![[r#"
            x D17 Istio's chain ISTIO_OUTPUT is on this host | two meshes capture the same connections: which one gets them is chance | fix: nft flush chain ip nat ISTIO_OUTPUT
            x D17 chain early of table ip mine redirects connections before vmesh does | what it takes does not go through Envoy | fix: is it meant to? `nft list chain ip mine early`; else have its owner take it away
            x D17 Kuma's chain KUMA_MESH_INBOUND and 1 more is on this host | two meshes capture the same connections: which one gets them is chance | fix: remove the other mesh by its own means; rule by rule: `iptables-legacy -t nat -F KUMA_MESH_INBOUND`
            ! D17 rules of iptables-legacy are there beside those of nftables | `nft list ruleset` and `iptables-save` each show a part of what the kernel does | fix: see them with `iptables-legacy-save`; move them with `iptables-restore-translate`, or have their owner use iptables-nft
            - not looked at: D17: only root may
        "#]],
    );
    check(
        "D19",
        &[
            &|facts| {
                facts.commands.insert(HostCommand::Users, ran("vmesh-agent:x:998:997::/:/\n"));
            },
            &|facts| {
                facts
                    .commands
                    .insert(HostCommand::Users, ran("vmesh-agent:x:0:0::/:/\nvmesh-envoy:x:997:997::/:/\n"));
            },
            &|facts| file(facts, "/proc/net/tcp", &listening(&[(8080, ENVOY)])),
            &|facts| change_unit(facts, "vmesh.slice", "ActiveState=active", "ActiveState=inactive"),
        ],
        expect![[r#"
            x D19 there is no user vmesh-envoy | Envoy's own connections are captured again, and go round in circles | fix: systemd-sysusers /usr/lib/sysusers.d/vmesh.conf
            x D19 the user vmesh-agent is root | no connection of any program of root is captured | fix: give it an id of its own: `usermod -u 998 vmesh-agent`, then reinstall the package
            x D19 the application of `web` runs as vmesh-envoy | what it calls is taken for Envoy's own, and never captured | fix: run it as a user of its own (`User=` of its unit)
            x D19 vmesh.slice is not active | Envoy's own connections are captured again, and go round in circles | fix: systemctl start vmesh.slice
        "#]],
    );
    check(
        "D20",
        &[
            &|facts| status(facts).agent_silent_for = Some(9),
            &|facts| status(facts).envoy = protocol::EnvoyHealth::Gone,
            &|facts| status(facts).envoy = protocol::EnvoyHealth::Hangs,
            &|facts| status(facts).redirects = RedirectState::Lapsed,
        ],
        expect![[r#"
            x D20 the agent has said nothing to vmesh-net for 9 s | redirects that may lapse do so when the dead-man runs out | fix: systemctl restart vmesh-agent
            x D20 nobody listens at Envoy's capture ports | connections to virtual addresses fail; those to real ones too, until redirects lapse | fix: systemctl restart vmesh-envoy
            x D20 Envoy's capture ports are open, and nobody serves them | connections to virtual addresses fail; those to real ones too, until redirects lapse | fix: systemctl restart vmesh-envoy
            x D20 redirects have lapsed | new connections go past Envoy where that is allowed (`on_loss: open`), and fail where it is not | fix: they hold again by themselves once the agent speaks and Envoy serves
        "#]],
    );
    let bypass = |owned: Option<Ownership>| {
        move |facts: &mut Facts| {
            facts.modes.insert("/usr/lib/vmesh/bypass".into(), Ok(owned));
        }
    };
    check(
        "D21",
        &[
            &bypass(None),
            &bypass(Some(Ownership { user: 1000, mode: 0o755 })),
            &bypass(Some(Ownership { user: 0, mode: 0o777 })),
            &bypass(Some(Ownership { user: 0, mode: 0o644 })),
            &|facts| {
                facts
                    .commands
                    .insert(HostCommand::BypassSyntax, failed("bypass: 3: Syntax error: \"fi\" unexpected"));
            },
        ],
        expect![[r#"
            x D21 /usr/lib/vmesh/bypass is not there | in a hurry this host could not be taken out of the mesh | fix: apt-get install --reinstall vmesh-agent
            x D21 /usr/lib/vmesh/bypass belongs to user 1000, and root runs it | whoever may write it is root at the next bypass, or when vmesh-net fails | fix: chown root:root /usr/lib/vmesh/bypass
            x D21 /usr/lib/vmesh/bypass may be written by others than root (mode 777) | whoever may write it is root at the next bypass, or when vmesh-net fails | fix: chmod 755 /usr/lib/vmesh/bypass
            x D21 /usr/lib/vmesh/bypass cannot be run | in a hurry this host could not be taken out of the mesh | fix: chmod 755 /usr/lib/vmesh/bypass
            x D21 /usr/lib/vmesh/bypass is no script that sh accepts: bypass: 3: Syntax error: "fi" unexpected | in a hurry this host could not be taken out of the mesh | fix: apt-get install --reinstall vmesh-agent
        "#]],
    );
}

#[test]
fn envoy() {
    check(
        "D24",
        &[
            &|facts| set(facts, HttpQuery::Supervisor, "/version", json!("1.35.2")),
            &|facts| {
                set(
                    facts,
                    HttpQuery::Supervisor,
                    "/waiting_binary",
                    json!("/usr/bin/envoy is another binary"),
                )
            },
            &|facts| {
                set(
                    facts,
                    HttpQuery::Supervisor,
                    "/last_failure",
                    json!({"at": NOW - 600, "what": "it was not live in 30 s"}),
                )
            },
        ],
        expect![[r#"
            ! D24 Envoy is 1.35.2; vmesh is tested with 1.36 to 1.40 | it may refuse what the control plane says, or do something else with it | fix: put one of these at `envoy.path`, then `systemctl reload vmesh-envoy`
            ! D24 another Envoy is on disk than the one that runs: /usr/bin/envoy is another binary | its fixes are not in force yet | fix: systemctl reload vmesh-envoy
            ! D24 10 min ago: it was not live in 30 s | the Envoy that serves may not be the one that was meant, or connections were cut | fix: `journalctl -u vmesh-envoy` says more; the finding goes away after a day
        "#]],
    );
    check(
        "D25",
        &[
            &|facts| {
                facts.modes.insert(
                    "/run/vmesh-envoy/admin.sock".into(),
                    Ok(Some(Ownership { user: ENVOY, mode: 0o666 })),
                );
            },
            &|facts| {
                set(facts, HttpQuery::Supervisor, "/state", json!("down"));
                set(facts, HttpQuery::Supervisor, "/reason", json!("killed by signal 9"));
            },
            &|facts| set(facts, HttpQuery::Supervisor, "/state", json!("waiting")),
            &|facts| set(facts, HttpQuery::Supervisor, "/state", json!("silent")),
            &|facts| {
                set(facts, HttpQuery::Supervisor, "/restarts", json!(2));
                set(facts, HttpQuery::Supervisor, "/since", json!(NOW - 300));
            },
            &|facts| {
                facts
                    .answers
                    .insert(HttpQuery::Supervisor, Err("status.sock: no answer within 1.5 s".into()));
            },
            &|facts| {
                facts.answers.insert(
                    HttpQuery::Supervisor,
                    Err("status.sock: Permission denied (os error 13)".into()),
                );
            },
        ],
        expect![[r#"
            x D25 /run/vmesh-envoy/admin.sock may be used by others than Envoy's user (mode 666) | whoever gets to it can end Envoy, or read what it knows | fix: chmod 600 /run/vmesh-envoy/admin.sock
            x D25 Envoy is down: killed by signal 9 | no request of this host goes through the mesh | fix: `journalctl -u vmesh-envoy -n 50` says why
            x D25 Envoy is waiting | Envoy has not been told what to serve yet: no request of this host goes through the mesh | fix: a control plane has to answer once: see D9
            x D25 Envoy is silent | Envoy may serve nothing; it is killed and started again after `envoy.hung_after` | fix: systemctl restart vmesh-envoy
            ! D25 Envoy has ended by itself 2 times, and serves again since 5 min ago | connections through it were cut each time | fix: `journalctl -u vmesh-envoy` says how it ended; the finding goes away after a day
            x D25 Envoy's supervisor does not say how Envoy is: status.sock: no answer within 1.5 s | whether requests go through the mesh is not known | fix: `systemctl status vmesh-envoy`; to look, be root or in the group vmesh
            - not looked at: D25: status.sock: Permission denied (os error 13)
        "#]],
    );
    check(
        "D26",
        &[&|facts| {
            set(
                facts,
                HttpQuery::Agent,
                "/accepted/last_rejection",
                json!("cluster orders: no such extension"),
            );
            set(facts, HttpQuery::Agent, "/accepted/last_rejected", json!(NOW - 7 * 60));
        }],
        expect![[r#"
            ! D26 Envoy rejected a part of the configuration 7 min ago: cluster orders: no such extension | it goes on with what it had of that before | fix: `vmeshctl problems` and `vmeshctl nodes` say which document it comes from; once mended, `systemctl restart vmesh-agent` forgets it
        "#]],
    );
    check(
        "D28",
        &[
            &|facts| {
                facts.answers.insert(HttpQuery::Warming, Ok(json!([3, 1])));
                facts.answers.insert(
                    HttpQuery::Unready,
                    Ok(json!({"unready_targets_dumps": [{"name": "init manager orders"}]})),
                );
            },
            // Warming that has ended is no finding.
            &|facts| {
                facts.answers.insert(HttpQuery::Warming, Ok(json!([3, 0])));
            },
        ],
        expect![[r#"
            ! D28 1 clusters or listeners of Envoy wait for endpoints or routes: init manager orders | what they replace goes on; what is new is not served | fix: the control plane owes it: D9, and `vmeshctl nodes` says whether this node is in sync
        "#]],
    );
    check(
        "D29",
        &[
            &|facts| set(facts, HttpQuery::Clusters, "/cluster_statuses/0/host_statuses", json!([])),
            &|facts| {
                let ill = json!({"failed_outlier_check": true, "eds_health_status": "HEALTHY"});
                set(facts, HttpQuery::Clusters, "/cluster_statuses/0/host_statuses/0/health_status", ill);
                let ill = json!({"eds_health_status": "UNHEALTHY"});
                set(facts, HttpQuery::Clusters, "/cluster_statuses/0/host_statuses/1/health_status", ill);
            },
            &|facts| set(facts, HttpQuery::Clusters, "/cluster_statuses", json!([])),
        ],
        expect![[r#"
            ! D29 service `orders` has no endpoint | requests to it are answered 503, and connections closed | fix: `vmeshctl services orders` says what discovery has of it
            x D29 none of the 2 endpoints of service `orders` is healthy | requests go to endpoints that are known to be ill, or are answered 503 | fix: `vmeshctl services orders` says why each is; look at the instances themselves
            x D29 upstream `orders` is not known to Envoy | calls to it are refused | fix: no source names it, or it has a problem: `vmeshctl explain orders --from web-17`
        "#]],
    );
    check(
        "D30",
        &[&|facts| facts.cores = 1, &|facts| {
            set(facts, HttpQuery::Memory, "/heap_size", json!("3000000000"))
        }],
        expect![[r#"
            ! D30 Envoy has 2 worker threads, and 1 processors are there | each costs memory and connections of its own, and none of them helps | fix: set `envoy.concurrency` in /etc/vmesh/agent.yaml, then `systemctl reload vmesh-envoy`
            ! D30 Envoy has 2861 MiB of the host's 3906 MiB of memory | the kernel may kill applications for want of memory | fix: name the `upstreams` that are called instead of "*"; set MemoryMax= (`systemctl edit vmesh-envoy`)
        "#]],
    );
}

#[test]
fn services() {
    check(
        "D22",
        &[
            &|facts| file(facts, "/proc/net/tcp", &listening(&[])),
            &|facts| outline(facts).workloads[0].host = Some("10.0.1.17".parse().unwrap()),
            &|facts| outline(facts).workloads[0].host = None,
        ],
        expect![[r#"
            x D22 nobody listens on 127.0.0.1:8080, for workload `web` | calls to it through the mesh are refused (503) | fix: start the application, or mend `port` of the workload: `ss -lntp` shows what listens
            x D22 workload `web` is to be on 10.0.1.17:8080, and port 8080 is taken on 127.0.0.1:8080 only | calls to it through the mesh are refused (503) | fix: set `host: 127.0.0.1` of the workload in /etc/vmesh/agent.yaml, then `systemctl restart vmesh-agent`
            x D22 the application of `web` listens on 127.0.0.1:8080 only | captured connections are passed on to the address that they were made to, and refused there | fix: give the workload `host: 127.0.0.1` in /etc/vmesh/agent.yaml, or let the application listen on the host's address
        "#]],
    );
    check(
        "D23",
        &[&|facts| outline(facts).workloads[0].port = 3306],
        expect![[r#"
        ! D23 workload `web` is declared `http`, on MySQL's port 3306 | where the server speaks first, Envoy and the client wait for each other, until a time-out | fix: `protocol: tcp` of the workload in /etc/vmesh/agent.yaml, and of the service in discovery
    "#]],
    );
    check(
        "D27",
        &[&|facts| set(facts, HttpQuery::Agent, "/accepted/from_disk", json!(true)), &|facts| {
            set(facts, HttpQuery::Agent, "/accepted/why_not_saved", json!("No space left on device"))
        }],
        expect![[r#"
            ! D27 what is served comes from the disk, and no control plane has confirmed it | it is as old as the last connection to one | fix: see D9: a control plane has to answer
            x D27 the configuration cannot be saved: No space left on device | a restart without a control plane serves an older one | fix: see D3: room, inodes, and that the file system may be written
        "#]],
    );
    check(
        "D36",
        &[
            &|facts| facts.names.answered = Some(Err("no answer in 1.5 s".into())),
            &|facts| facts.names.wired = None,
            &|facts| facts.names.is_wired_as_configured = false,
            &|facts| {
                facts.commands.insert(HostCommand::Resolve, failed(""));
            },
            &|facts| {
                facts.names.wired = Some("the block of vmesh in /etc/hosts".into());
                facts.commands.insert(HostCommand::Resolve, failed(""));
            },
            &|facts| {
                facts.commands.insert(HostCommand::Resolve, ran("192.0.2.7   STREAM orders.mesh\n"));
            },
            &|facts| file(facts, "/etc/resolv.conf", "nameserver 10.0.0.2\nsearch example.com mesh\n"),
        ],
        expect![[r#"
            x D36 the agent does not answer names at 127.0.0.1:15053: no answer in 1.5 s | applications that dial names of the mesh do not find them | fix: systemctl restart vmesh-agent
            ! D36 the host's resolver (systemd-resolved) is not told to ask the agent for names below mesh | applications that dial names of the mesh do not find them | fix: vmeshctl dns enable
            x D36 the host's resolver (systemd-resolved) is told to ask for another zone, or at another address, than mesh at 127.0.0.1:15053 | applications that dial names of the mesh do not find them | fix: vmeshctl dns enable
            x D36 orders.mesh is not found by the host's resolver (systemd-resolved) | applications that dial names of the mesh do not find them | fix: systemctl restart systemd-resolved
            x D36 orders.mesh is not found by the host's resolver (systemd-resolved) | applications that dial names of the mesh do not find them | fix: systemctl enable --now vmesh-hosts && systemctl restart vmesh-hosts
            ! D36 orders.mesh is found as 192.0.2.7, and is 246.94.83.229 | somebody else answers for it, or an old answer is kept; connections go there | fix: `resolvectl flush-caches`; then `getent ahosts`, /etc/hosts, and who else answers for it
            ! D36 /etc/resolv.conf searches `mesh` | any bare name `x` that is a service is found as `x.mesh`, whatever was meant | fix: take `mesh` out of `search`, where the network or DHCP sets it
        "#]],
    );
    check(
        "D37",
        &[
            &|facts| {
                set(facts, HttpQuery::Agent, "/registered/0/state", json!("failing"));
                set(
                    facts,
                    HttpQuery::Agent,
                    "/registered/0/reason",
                    json!("Consul refused the token (HTTP 403)"),
                );
            },
            &|facts| set(facts, HttpQuery::Agent, "/registered/0/state", json!("ill")),
        ],
        expect![[r#"
            x D37 `web` is not registered in consul: Consul refused the token (HTTP 403) | other hosts do not send it calls by this host | fix: consul has to be there and to let the agent in: `journalctl -u vmesh-agent | grep -i consul`
            ! D37 `web` is not well, by its health check | other hosts do not send it calls by this host | fix: look at the application; `health` of the workload in /etc/vmesh/agent.yaml says what is asked
        "#]],
    );
    check(
        "D38",
        &[
            &|facts| {
                set(facts, HttpQuery::Agent, "/control_plane/in_use", Value::Null);
                set(facts, HttpQuery::Agent, "/accepted/confirmed", json!(NOW - 3 * 3600));
            },
            &|facts| {
                set(facts, HttpQuery::Agent, "/control_plane/in_use", Value::Null);
                set(facts, HttpQuery::Agent, "/accepted/confirmed", Value::Null);
            },
        ],
        expect![[r#"
            ! D38 the configuration is 3 h old | endpoints that have come since are not used; those that are gone are still tried | fix: see D9: a control plane has to answer
            x D38 there is no configuration, and there never was one here | no request of this host goes through the mesh | fix: see D9: a control plane has to answer once
        "#]],
    );
    check(
        "D39",
        &[
            &|facts| {
                facts.dialed = Ok(vec![(
                    "orders".into(),
                    "10.0.1.12:8080".parse().unwrap(),
                    Err("no answer in 500 ms".into()),
                )]);
            },
            &|facts| {
                facts.dialed = Err("connections to real addresses are captured".into());
                let stats =
                    json!([{"name": "cx_connect_fail", "value": "9"}, {"name": "cx_total", "value": "9"}]);
                set(facts, HttpQuery::Clusters, "/cluster_statuses/0/host_statuses/1/stats", stats);
            },
        ],
        expect![[r#"
            ! D39 endpoint 10.0.1.12:8080 of `orders` takes no connection from here: no answer in 500 ms | calls that are sent there are tried again elsewhere, or fail | fix: start it, or take it out of use: `vmeshctl discovery evict orders 10.0.1.12:8080`; else look at firewalls between
            ! D39 endpoint 10.0.1.12:8080 of `orders` has taken none of Envoy's 9 connections | calls that are sent there are tried again elsewhere, or fail | fix: start it, or take it out of use: `vmeshctl discovery evict orders 10.0.1.12:8080`; else look at firewalls between
        "#]],
    );
}

#[test]
fn the_identity() {
    fn identity(facts: &mut Facts, change: Value) {
        for (field, value) in change.as_object().unwrap() {
            set(facts, HttpQuery::Agent, &format!("/identity/{field}"), value.clone());
        }
    }
    check(
        "D31",
        &[
            &|facts| {
                identity(
                    facts,
                    json!({"stage": "waiting_for_token", "problem": "there is no file /etc/vmesh/token"}),
                )
            },
            &|facts| identity(facts, json!({"stage": "expired"})),
            &|facts| identity(facts, json!({"percent_left": 9, "problem": "no connection"})),
        ],
        expect![[r#"
            x D31 this node has no identity: there is no file /etc/vmesh/token | no control plane serves this node, and other nodes do not accept it | fix: on a control plane: `vmeshctl token create --node NODE --service SERVICE`; write the token into the file that `join.token_file` names
            x D31 the certificates of this node have expired | no control plane serves this node, and other nodes do not accept it | fix: on a control plane: `vmeshctl token create --node NODE --service SERVICE`; write the token into the file that `join.token_file` names
            ! D31 9 % of the certificates' validity is left, and they were not renewed: no connection | when they expire, other nodes no longer accept this one | fix: see D9: a control plane has to answer; `vmeshctl ca status` there says whether it issues certificates
        "#]],
    );
    check(
        "D32",
        &[&|facts| identity(facts, json!({"why_not_saved": "no space left"}))],
        expect![[r#"
        x D32 the identity cannot be saved: no space left | after a restart of the agent this node has to join again, with a new token | fix: see D3: room, inodes, and that the file system may be written
    "#]],
    );
    check(
        "D33",
        &[&|facts| identity(facts, json!({"bundle_confirmed": NOW - 3 * 3600})), &|facts| {
            identity(facts, json!({"clock_skew": 372}))
        }],
        expect![[r#"
            ! D33 no control plane has confirmed the trust bundle for 3 h | a rotation of the root waits for this node | fix: see D9: a control plane has to answer
            ! D33 this host's clock is 6 min behind the control plane's | certificates count as expired, or as not valid yet, where clocks differ by minutes | fix: `timedatectl` says whether the clock is synchronised
        "#]],
    );
    check(
        "D34",
        &[&|facts| identity(facts, json!({"not_granted": ["payments"]})), &|facts| {
            identity(facts, json!({"mtls_ready": false}))
        }],
        expect![[r#"
            x D34 this node may not run payments | no other node calls these workloads by mTLS | fix: create a token with `--service` for each service, stop the agent, delete its `identity` directory, and join again
            ! D34 Envoy does not accept mTLS connections yet | callers use plaintext while the mode is permissive | fix: see D25 and D26: Envoy has to be live, and to accept its configuration; `node.address` has to be set
        "#]],
    );
}
