use expect_test::{Expect, expect};
use serde_json::json;

use super::*;
use crate::consul::ConsulConfig;

fn rules(config: &str) -> InstanceRules {
    vmesh_model::load::strict::<ConsulConfig>("control.yaml", config).unwrap().instance_rules()
}

fn shown(bodies: &[&str], rules: &InstanceRules) -> String {
    let name: ServiceName = "pay".parse().unwrap();
    let reads: Vec<ServiceInstances> =
        bodies.iter().map(|body| read(body.as_bytes(), "consul:dc1", &name, false, rules).unwrap()).collect();
    let parsed = combine("consul:dc1", &name, &reads.iter().collect::<Vec<_>>());
    let mut shown = String::new();
    if parsed.has_failed() {
        shown += "FAILED\n";
    }
    for service in &parsed.services {
        shown += &service.protocol.map(|protocol| format!("{protocol}\n")).unwrap_or_default();
        for endpoint in &service.endpoints {
            shown += &format!("{} weight {} {}", endpoint.address, endpoint.weight.get(), endpoint.health);
            shown += &endpoint.zone.as_ref().map(|zone| format!(" zone {zone}")).unwrap_or_default();
            shown +=
                &endpoint.version.as_ref().map(|version| format!(" version {version}")).unwrap_or_default();
            shown += &format!(" {:?}\n", endpoint.labels);
        }
    }
    for problem in &parsed.problems {
        shown += &format!("{problem}\n");
    }
    shown
}

fn check(config: &str, body: &str, expected: Expect) {
    expected.assert_eq(&shown(&[body], &rules(config)));
}

/// An entry as Consul writes it, with the usual fields overridden by `service` and `node`.
fn entry(service: &Value, node: &Value, checks: &[(&str, &str)]) -> Value {
    let over = |mut base: Value, more: &Value| {
        base.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        base
    };
    let checks: Vec<_> =
        checks.iter().map(|(id, status)| json!({"CheckID": id, "Name": id, "Status": status})).collect();
    json!({
        "Node": over(json!({"Node": "vm-1", "Address": "10.1.0.1", "Datacenter": "dc1", "Meta": null}), node),
        "Service": over(
            json!({"ID": "pay-1", "Service": "pay", "Tags": null, "Address": "", "Port": 8080, "Meta": null,
                   "TaggedAddresses": null, "Weights": {"Passing": 1, "Warning": 1}}),
            service
        ),
        "Checks": checks,
    })
}

fn one(service: Value) -> String {
    json!([entry(&service, &json!({}), &[("serfHealth", "passing")])]).to_string()
}

#[test]
fn an_instance_is_read_with_all_that_is_said_of_it() {
    check(
        "{}",
        r#"[{"Node":{"ID":"6c0e","Node":"vm-17","Address":"10.1.0.17","Datacenter":"dc1",
             "TaggedAddresses":{"lan":"10.1.0.17","wan":"198.51.100.17"},"Meta":{"az":"a1"}},
            "Service":{"ID":"pay-1","Service":"pay","Tags":["v3","canary"],"Address":"","Port":8080,
             "TaggedAddresses":{"lan_ipv4":{"Address":"10.1.0.17","Port":8080}},
             "Meta":{"version":"3.1","protocol":"grpc","team":"money"},"Weights":{"Passing":5,"Warning":1},
             "Kind":"","Namespace":"default","Partition":"default"},
            "Checks":[{"CheckID":"serfHealth","Status":"passing"}]}]"#,
        expect![[r#"
            grpc
            10.1.0.17:8080 weight 5 healthy zone a1 version 3.1 {"datacenter": "dc1", "node": "vm-17", "tag.canary": "true", "tag.v3": "true", "team": "money"}
        "#]],
    );
}

#[test]
fn the_address_is_the_services_or_else_the_nodes() {
    let shown_at = |address: &str| shown(&[&one(json!({"Address": address}))], &InstanceRules::default());
    expect![[r#"
        10.1.0.1:8080 weight 1 healthy zone dc1 {"datacenter": "dc1", "node": "vm-1"}
        10.9.9.9:8080 weight 1 healthy zone dc1 {"datacenter": "dc1", "node": "vm-1"}
        pay.internal:8080 weight 1 healthy zone dc1 {"datacenter": "dc1", "node": "vm-1"}
        127.0.0.1:8080 weight 1 healthy zone dc1 {"datacenter": "dc1", "node": "vm-1"}
        [fd00::7]:8080 weight 1 healthy zone dc1 {"datacenter": "dc1", "node": "vm-1"}
        0.0.0.0:8080 weight 1 healthy zone dc1 {"datacenter": "dc1", "node": "vm-1"}
        consul:dc1/pay: instance `pay-1` on node `vm-1`: `a b` is neither an IP address nor a host name
    "#]]
    .assert_eq(
        &["", "10.9.9.9", "Pay.internal", "127.1", "fd00::7", "0.0.0.0", "a b"].map(shown_at).concat(),
    );
}

#[test]
fn another_address_can_be_asked_for_in_either_spelling() {
    let body = json!([
        entry(
            &json!({"ID": "own", "Address": "10.1.0.7", "TaggedAddresses": {
                "wan": {"Address": "198.51.100.7", "Port": 80},
                "lan_ipv6": {"address": "fd00::7", "port": 8080},
                "virtual": {"Address": "240.0.0.1", "Port": 8080}}}),
            &json!({"TaggedAddresses": {"lan": "10.2.0.7", "wan": "198.51.100.9"}}),
            &[]
        ),
        entry(
            &json!({"ID": "nodes"}),
            &json!({"Address": "10.1.0.8", "TaggedAddresses": {"lan": "10.2.0.8", "wan": "198.51.100.8"}}),
            &[]
        ),
    ])
    .to_string();
    let addresses = |kind: &str| {
        let shown = shown(&[&body], &rules(&format!("{{endpoint_address: {kind}}}")));
        let words: Vec<_> = shown.lines().map(|line| line.split(" weight").next().unwrap()).collect();
        format!("{kind}: {}\n", words.join(", "))
    };
    let kinds = ["service", "node", "lan", "wan", "lan_ipv6", "wan_ipv4", "virtual"];
    expect![[r#"
        service: 10.1.0.7:8080, 10.1.0.8:8080
        node: 10.1.0.1:8080, 10.1.0.8:8080
        lan: 10.1.0.7:8080, 10.2.0.8:8080
        wan: 198.51.100.7:80, 198.51.100.8:8080
        lan_ipv6: 10.1.0.8:8080, [fd00::7]:8080
        wan_ipv4: 10.1.0.7:8080, 10.1.0.8:8080
        virtual: 240.0.0.1:8080, consul:dc1/pay: instance `nodes` on node `vm-1`: it has no virtual address; this endpoint is left out
    "#]]
    .assert_eq(&kinds.map(addresses).concat());

    // Addresses that Consul has translated already are used as they are.
    let name = "pay".parse().unwrap();
    let read = read(body.as_bytes(), "c", &name, true, &rules("{endpoint_address: wan}")).unwrap();
    let parsed = combine("c", &name, &[&read]);
    assert_eq!(parsed.services[0].endpoints[0].address.to_string(), "10.1.0.7:8080");
}

#[test]
fn the_port_is_the_one_that_there_is_or_the_one_that_was_asked_for() {
    let ports = json!({"Port": 0, "Ports": [{"Name": "http", "Port": 80, "Default": true}, {"Name": "admin", "Port": 81}]});
    let lower = json!({"Port": null, "ports": [{"name": "http", "port": 80}]});
    let none_default = json!({"Port": 0, "Ports": [{"Name": "a", "Port": 80}, {"Name": "b", "Port": 81}]});
    let shown_with = |(config, service): (&str, &Value)| shown(&[&one(service.clone())], &rules(config));
    expect![[r#"
        10.1.0.1:80 weight 1 healthy zone dc1 {"datacenter": "dc1", "node": "vm-1"}
        10.1.0.1:81 weight 1 healthy zone dc1 {"datacenter": "dc1", "node": "vm-1"}
        consul:dc1/pay: instance `pay-1` on node `vm-1`: it has no port named `other`; this endpoint is left out
        10.1.0.1:80 weight 1 healthy zone dc1 {"datacenter": "dc1", "node": "vm-1"}
        consul:dc1/pay: instance `pay-1` on node `vm-1`: it has several ports and no default port: set `port_name` to choose one; this endpoint is left out
        consul:dc1/pay: instance `pay-1` on node `vm-1`: it is registered without a port, and `default_port` is not set; this endpoint is left out
        consul:dc1/pay: instance `pay-1` on node `vm-1`: it is registered without a port, and `default_port` is not set; this endpoint is left out
        10.1.0.1:9000 weight 1 healthy zone dc1 {"datacenter": "dc1", "node": "vm-1"}
        consul:dc1/pay: instance `pay-1` on node `vm-1`: it listens on a Unix socket, which only its own host can reach; this endpoint is left out
        consul:dc1/pay: instance `pay-1` on node `vm-1`: port 70000 is out of range: 1 to 65535
    "#]]
    .assert_eq(
        &[
            ("{}", &ports),
            ("{port_name: admin}", &ports),
            ("{port_name: other}", &ports),
            ("{port_name: http}", &lower),
            ("{}", &none_default),
            ("{}", &json!({"Port": null})),
            ("{}", &json!({"Port": 0})),
            ("{default_port: 9000}", &json!({"Port": null})),
            ("{default_port: 9000}", &json!({"Port": 0, "SocketPath": "/run/pay"})),
            ("{}", &json!({"Port": 70000})),
        ]
        .map(shown_with)
        .concat(),
    );
}

#[test]
fn the_worst_check_that_counts_says_how_an_instance_is() {
    let health = |(config, warning, checks): (&str, u32, &[(&str, &str)])| {
        let service = json!({"Weights": {"Passing": 5, "Warning": warning}});
        let shown = shown(&[&json!([entry(&service, &json!({}), checks)]).to_string()], &rules(config));
        let words: Vec<_> = shown.split_whitespace().skip(1).take(3).collect();
        format!("{checks:?} {config}: {}\n", words.join(" "))
    };
    let critical: &[_] = &[("serfHealth", "critical"), ("service:pay-1", "passing")];
    let warning: &[_] = &[("serfHealth", "passing"), ("service:pay-1", "warning")];
    expect![[r#"
        [] {}: weight 5 unknown
        [("serfHealth", "passing")] {}: weight 5 healthy
        [("serfHealth", "passing"), ("service:pay-1", "warning")] {}: weight 2 healthy
        [("serfHealth", "passing"), ("service:pay-1", "warning")] {}: weight 1 draining
        [("serfHealth", "passing"), ("service:pay-1", "warning")] {health: {warning: drain}}: weight 5 draining
        [("serfHealth", "critical"), ("service:pay-1", "passing")] {}: weight 5 unhealthy
        [("serfHealth", "critical"), ("service:pay-1", "passing")] {health: {critical: drop}}: 
        [("serfHealth", "critical"), ("service:pay-1", "passing")] {health: {ignore_checks: [serf*]}}: weight 5 healthy
        [("serfHealth", "critical"), ("_node_maintenance", "critical")] {}: weight 5 draining
        [("_service_maintenance:pay-1", "critical")] {health: {critical: drop}}: weight 5 draining
        [("x", "?")] {}: weight 5 unhealthy
    "#]]
    .assert_eq(
        &[
            ("{}", 1, &[] as &[_]),
            ("{}", 1, &[("serfHealth", "passing")]),
            ("{}", 2, warning),
            ("{}", 0, warning),
            ("{health: {warning: drain}}", 2, warning),
            ("{}", 1, critical),
            ("{health: {critical: drop}}", 1, critical),
            ("{health: {ignore_checks: [serf*]}}", 1, critical),
            ("{}", 1, &[("serfHealth", "critical"), ("_node_maintenance", "critical")]),
            ("{health: {critical: drop}}", 1, &[("_service_maintenance:pay-1", "critical")]),
            ("{}", 1, &[("x", "?")]),
        ]
        .map(health)
        .concat(),
    );
}

#[test]
fn one_id_on_two_nodes_is_two_instances_and_one_address_is_one_endpoint() {
    let on = |node: &str, address: &str, status: &str| {
        entry(&json!({"ID": "web"}), &json!({"Node": node, "Address": address}), &[("c", status)])
    };
    let body = json!([
        on("a", "10.1.0.1", "critical"),
        on("b", "10.1.0.2", "passing"),
        on("c", "10.1.0.1", "passing")
    ]);
    check(
        "{}",
        &body.to_string(),
        expect![[r#"
            10.1.0.1:8080 weight 1 healthy zone dc1 {"datacenter": "dc1", "node": "c"}
            10.1.0.2:8080 weight 1 healthy zone dc1 {"datacenter": "dc1", "node": "b"}
        "#]],
    );
    // The same holds for two datacenters.
    let other = |status: &str| {
        let node = json!({"Node": "a", "Datacenter": "dc2"});
        json!([entry(&json!({}), &node, &[("c", status)])]).to_string()
    };
    expect![[r#"
        10.1.0.1:8080 weight 1 healthy zone dc2 {"datacenter": "dc2", "node": "a"}
        10.1.0.2:8080 weight 1 healthy zone dc1 {"datacenter": "dc1", "node": "b"}
    "#]]
    .assert_eq(&shown(
        &[
            &json!([on("x", "10.1.0.1", "critical"), on("b", "10.1.0.2", "passing")]).to_string(),
            &other("passing"),
        ],
        &InstanceRules::default(),
    ));
}

/// A reinstalled agent registers its services with new IDs, and the old ones stay until Consul reaps them.
#[test]
fn of_two_ids_at_one_address_the_healthiest_and_then_the_youngest_decides() {
    let of = |id: &str, created: u64, status: &str| {
        entry(
            &json!({"ID": id, "CreateIndex": created, "Tags": [format!("version={id}")]}),
            &json!({}),
            &[("c", status)],
        )
    };
    let cases = [
        // The younger record is critical, but the older one states the health of the instance.
        [("old", 10, "passing"), ("new", 20, "critical")],
        [("old", 10, "critical"), ("new", 20, "passing")],
        // With equal health the younger record counts, whatever the IDs are.
        [("z", 10, "passing"), ("a", 20, "passing")],
        [("a", 10, "critical"), ("z", 20, "critical")],
    ];
    let mut all = String::new();
    for ids in cases {
        let mut both: Vec<String> = Vec::new();
        for order in [[0, 1], [1, 0]] {
            let body: Vec<Value> =
                order.iter().map(|at: &usize| of(ids[*at].0, ids[*at].1, ids[*at].2)).collect();
            both.push(shown(&[&Value::from(body).to_string()], &InstanceRules::default()));
        }
        assert_eq!(both[0], both[1], "the order of the answer decides nothing");
        all += &both[0];
    }
    expect![[r#"
        10.1.0.1:8080 weight 1 healthy zone dc1 version old {"datacenter": "dc1", "node": "vm-1"}
        10.1.0.1:8080 weight 1 healthy zone dc1 version new {"datacenter": "dc1", "node": "vm-1"}
        10.1.0.1:8080 weight 1 healthy zone dc1 version a {"datacenter": "dc1", "node": "vm-1"}
        10.1.0.1:8080 weight 1 unhealthy zone dc1 version z {"datacenter": "dc1", "node": "vm-1"}
    "#]]
    .assert_eq(&all);
}

#[test]
fn one_entry_that_makes_no_sense_costs_itself_and_too_many_leave_the_rest_in_doubt() {
    let good = |n: u8| entry(&json!({"ID": n.to_string()}), &json!({"Address": format!("10.1.0.{n}")}), &[]);
    let mut entries: Vec<_> = (1..=8).map(good).collect();
    entries.push(json!({"Node": {"Node": "vm-9", "Address": "10.1.0.9"}, "Checks": []}));
    entries.push(json!("garbage"));
    let body = json!(entries).to_string();
    let text = shown(&[&body], &InstanceRules::default());
    assert_eq!(text.lines().filter(|line| line.starts_with("10.1.0.")).count(), 8, "{text}");
    let problems: Vec<_> = text.lines().filter(|line| line.starts_with("consul")).collect();
    expect![[r#"
        consul:dc1/pay: entry 10: invalid type: string "garbage", expected struct Entry; this endpoint is left out
        consul:dc1/pay: entry 9: there is no `Service` in it; this endpoint is left out"#]]
    .assert_eq(&problems.join("\n"));

    entries.drain(..4);
    entries.push(json!({"Node": 7, "Service": {}}));
    let text = shown(&[&json!(entries).to_string()], &InstanceRules::default());
    assert_eq!(text.lines().filter(|line| line.starts_with("10.1.0.")).count(), 4, "{text}");
    let answer = read(
        json!(entries).to_string().as_bytes(),
        "c",
        &"pay".parse().unwrap(),
        false,
        &InstanceRules::default(),
    );
    let parsed = combine("c", &"pay".parse().unwrap(), &[&answer.unwrap()]);
    let partial = parsed.services[0].partial_because.as_deref();
    assert_eq!(partial, Some("3 of 7 records are bad, which is more than single mistakes"));
    let name = "pay".parse().unwrap();
    assert!(
        read(b"{}", "c", &name, false, &InstanceRules::default())
            .unwrap_err()
            .starts_with("invalid type: map")
    );
    assert_eq!(read(b"null", "c", &name, false, &InstanceRules::default()).unwrap().listed, 0);
    assert!(read(b"[{\"Node\":", "c", &name, false, &InstanceRules::default()).is_err());
}

#[test]
fn what_is_not_wanted_is_left_out_without_a_word() {
    let body = json!([
        entry(
            &json!({"ID": "1", "Address": "10.0.0.1", "Tags": ["prod", "v1"], "Meta": {"team": "money"}}),
            &json!({"Meta": {"rack": "r7"}}),
            &[]
        ),
        entry(
            &json!({"ID": "2", "Address": "10.0.0.2", "Tags": ["prod", "old"], "Meta": {"team": "music"}}),
            &json!({"Meta": {"rack": "r8"}}),
            &[]
        ),
        entry(
            &json!({"ID": "3", "Address": "10.0.0.3", "Kind": "connect-proxy", "Tags": ["prod"]}),
            &json!({}),
            &[]
        ),
        entry(&json!({"ID": "4", "Address": "10.0.0.4", "Kind": "typical", "Tags": null}), &json!({}), &[]),
    ])
    .to_string();
    let left = |config: &str| {
        let shown = shown(&[&body], &rules(config));
        let last: Vec<_> =
            shown.lines().map(|line| line.split(':').next().unwrap().rsplit('.').next().unwrap()).collect();
        format!("{config}: {}\n", last.join(" "))
    };
    expect![[r#"
        {}: 1 2 4
        {kinds: [connect-proxy]}: 1 2 3 4
        {require_tags: [prod]}: 1 2
        {require_tags: [prod, "v*"]}: 1
        {exclude_tags: [old]}: 1 4
        {node_meta: {rack: "r*"}}: 1 2
        {node_meta: {rack: r7}}: 1
        {service_meta: {team: music}}: 2
    "#]]
    .assert_eq(
        &[
            "{}",
            "{kinds: [connect-proxy]}",
            "{require_tags: [prod]}",
            "{require_tags: [prod, \"v*\"]}",
            "{exclude_tags: [old]}",
            "{node_meta: {rack: \"r*\"}}",
            "{node_meta: {rack: r7}}",
            "{service_meta: {team: music}}",
        ]
        .map(left)
        .concat(),
    );
}

#[test]
fn tags_and_metadata_say_version_zone_protocol_and_weight() {
    let message = |(config, service): (&str, Value)| shown(&[&one(service)], &rules(config)) + "\n";
    expect![[r#"
        http2
        10.1.0.1:8080 weight 7 healthy zone a1 version v3 {"datacenter": "dc1", "node": "vm-1", "tag.v2": "true", "tag.v3": "true", "tag.x": "true"}

        grpc
        10.1.0.1:8080 weight 50 healthy zone dc1 version 9 {"datacenter": "dc1", "node": "vm-1", "ring": "blue"}

        tls
        10.1.0.1:8080 weight 1 healthy zone b2 {"az": "b1", "datacenter": "dc1", "node": "vm-1"}

        10.1.0.1:8080 weight 4 healthy zone dc1 {"datacenter": "dc1", "node": "vm-1"}
        consul:dc1/pay: instance `pay-1` on node `vm-1`: `heavy` is not a weight: a number from 0 to 1000000; Consul's own weight is used
        consul:dc1/pay: instance `pay-1` on node `vm-1`: `quic` is not a protocol that vmesh knows; it is ignored

        10.1.0.1:8080 weight 1 draining zone dc1 {"datacenter": "dc1", "node": "vm-1"}

    "#]]
    .assert_eq(
        &[
            ("{}", json!({"Tags": ["v3", "az=a1", "proto=h2c", "weight:7", "x", "v2"]})),
            (
                "{tag_patterns: [{tag: \"release-*\", key: version}, {tag: \"ring/*\", key: ring}], default_weight: 50}",
                json!({"Tags": ["release-9", "ring/blue"], "Meta": {"protocol": "gRPC"}}),
            ),
            ("{map: {zone: [rack]}}", json!({"Meta": {"secure": "true", "rack": "b2", "az": "b1"}})),
            (
                "{}",
                json!({"Meta": {"weight": "heavy", "protocol": "quic"}, "Weights": {"Passing": 4, "Warning": 1}}),
            ),
            ("{}", json!({"Meta": {"weight": "0"}})),
        ]
        .map(message)
        .concat(),
    );
}

#[test]
fn fabio_and_traefik_tags_are_understood() {
    let body = json!([
        entry(
            &json!({"ID": "1", "Address": "10.0.0.1", "Tags": ["urlprefix-pay.example/ proto=grpc weight=0.1"]}),
            &json!({}),
            &[]
        ),
        entry(
            &json!({"ID": "2", "Address": "10.0.0.2", "Tags": ["urlprefix-pay.example/ proto=grpc"]}),
            &json!({}),
            &[]
        ),
        entry(&json!({"ID": "3", "Address": "10.0.0.3", "Tags": ["urlprefix-:9000"]}), &json!({}), &[]),
    ]);
    check(
        "{}",
        &body.to_string(),
        expect![[r#"
            grpc
            10.0.0.1:8080 weight 100000 unknown zone dc1 {"datacenter": "dc1", "node": "vm-1"}
            10.0.0.2:8080 weight 450000 unknown zone dc1 {"datacenter": "dc1", "node": "vm-1"}
            10.0.0.3:8080 weight 450000 unknown zone dc1 {"datacenter": "dc1", "node": "vm-1"}
        "#]],
    );
    let tags = json!([
        "traefik.enable=true",
        "traefik.http.routers.pay.rule=Host(`pay`)",
        "traefik.http.services.pay.loadbalancer.server.scheme=h2c",
        "traefik.http.services.pay.loadbalancer.server.port=9090"
    ]);
    check(
        "{}",
        &one(json!({"Tags": tags})),
        expect![[r#"
            http2
            10.1.0.1:9090 weight 1 healthy zone dc1 {"datacenter": "dc1", "node": "vm-1"}
        "#]],
    );
}

#[test]
fn instances_that_disagree_on_the_protocol_are_outvoted() {
    let with = |n: u8, protocol: &str| {
        let address = format!("10.0.0.{n}");
        entry(&json!({"ID": address, "Address": address, "Meta": {"protocol": protocol}}), &json!({}), &[])
    };
    let body = json!([with(1, "grpc"), with(2, "http"), with(3, "http")]).to_string();
    let shown = shown(&[&body], &InstanceRules::default());
    assert!(shown.starts_with("http\n"), "{shown}");
    let problem = shown.lines().last().unwrap();
    expect!["consul:dc1/pay: its instances differ in protocol (1 say `grpc`, 2 say `http`): `http` is used; set `protocol` in a `Service` document to choose another"].assert_eq(problem);
}
