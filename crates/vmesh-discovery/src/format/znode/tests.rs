mod dubbo;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use expect_test::{Expect, expect};

use super::*;

/// Parses nodes, one per line: the name, with the prefix `!` for a persistent node, then a blank and the
/// data.
fn members(text: &str) -> Vec<Member<'_>> {
    let lines = text.trim().lines().map(str::trim);
    lines.zip(0..).map(|(line, created)| member_of(line, created)).collect()
}

fn member_of(line: &str, created: i64) -> Member<'_> {
    let (name, data) = line.split_once(' ').unwrap_or((line, ""));
    let bare = name.strip_prefix('!');
    Member {
        name: bare.unwrap_or(name),
        data: data.trim().as_bytes(),
        is_ephemeral: bare.is_none(),
        created,
        unreadable: None,
    }
}

fn show(service: &ParsedService) -> String {
    let mut shown = format!("{}", service.name);
    shown += &service.protocol.map(|protocol| format!(" {protocol}")).unwrap_or_default();
    shown += "\n";
    for endpoint in &service.endpoints {
        shown += &format!("  {} weight {} {}", endpoint.address, endpoint.weight.get(), endpoint.health);
        shown += &endpoint.zone.as_ref().map(|zone| format!(" zone {zone}")).unwrap_or_default();
        shown += &endpoint.version.as_ref().map(|version| format!(" version {version}")).unwrap_or_default();
        if !endpoint.labels.is_empty() {
            shown += &format!(" {:?}", endpoint.labels);
        }
        shown += "\n";
    }
    shown
}

fn shown(format: ZnodeFormat, rules: &RecordRules, text: &str) -> String {
    let directory = RecordDirectory { place: "zk/pay", members: members(text) };
    let read = read(format, &directory, rules);
    let mut problems = Vec::new();
    let mut shown = String::new();
    for service in read.services() {
        let name: ServiceName = match service.as_deref().unwrap_or("pay").parse() {
            Ok(name) => name,
            Err(wrong) => {
                shown += &format!("{wrong}\n");
                continue;
            }
        };
        let place = Place::file("zk/pay");
        let combined = combine(&name, place, &[("pay", &read)], default_weight(format), &mut problems);
        shown += &combined.as_ref().map(show).unwrap_or_default();
    }
    if let Some(why) = read.partial_reason() {
        shown += &format!("FAILED {why}\n");
    }
    problems.extend(read.problems(&"it".into()));
    for problem in problems {
        shown += &format!("{problem}\n");
    }
    shown
}

fn check(format: ZnodeFormat, text: &str, expected: Expect) {
    expected.assert_eq(&shown(format, &RecordRules::default(), text));
}

fn check_with(rules: RecordRules, format: ZnodeFormat, text: &str, expected: Expect) {
    expected.assert_eq(&shown(format, &rules, text));
}

fn by_endpoint(name: &str) -> RecordRules {
    RecordRules { endpoint: Some(name.to_owned()), ..RecordRules::default() }
}

#[test]
fn a_serverset_is_its_members_with_their_status() {
    check(
        ZnodeFormat::ServerSet,
        r#"
        member_0000000001 {"serviceEndpoint":{"host":"vm-17.dc1","port":31002},"additionalEndpoints":{"http":{"host":"vm-17.dc1","port":31003}},"status":"ALIVE","shard":7,"metadata":{"version":"v3","zone":"a1","rack":"r7"}}
        member_0000000002 {"serviceEndpoint":{"host":"10.0.0.2","port":31002},"additionalEndpoints":{}}
        member_0000000003 {"serviceEndpoint":{"host":"10.0.0.3","port":"31002"},"status":"STOPPING"}
        member_0000000004 {"serviceEndpoint":{"host":"10.0.0.4","port":31002},"status":"STARTING"}
        !member_0000000005 {"serviceEndpoint":{"host":"10.0.0.5","port":31002},"status":"UNKNOWN"}
        lock_0000000006 {"serviceEndpoint":{"host":"10.0.0.6","port":31002}}
        "#,
        expect![[r#"
            pay
              10.0.0.2:31002 weight 1 healthy
              10.0.0.3:31002 weight 1 draining
              10.0.0.4:31002 weight 1 unhealthy
              10.0.0.5:31002 weight 1 unhealthy {"liveness": "none"}
              vm-17.dc1:31002 weight 1 healthy zone a1 version v3 {"rack": "r7", "shard": "7"}
        "#]],
    );
}

#[test]
fn a_serverset_offers_the_endpoint_that_is_asked_for() {
    check_with(
        by_endpoint("http"),
        ZnodeFormat::ServerSet,
        r#"
        member_0000000001 {"serviceEndpoint":{"host":"10.0.0.1","port":1},"additionalEndpoints":{"http":{"host":"10.0.0.1","port":8080},"admin":{"host":"10.0.0.1","port":9990}}}
        member_0000000002 {"serviceEndpoint":{"host":"10.0.0.2","port":1},"additionalEndpoints":{"admin":{"host":"10.0.0.2","port":9990}}}
        member_0000000003 {"additionalEndpoints":{"http":{"host":"10.0.0.3","port":8080}}}
        "#,
        expect![[r#"
            pay http
              10.0.0.1:8080 weight 1 healthy
              10.0.0.3:8080 weight 1 healthy
            zk/pay/member_0000000002: there is no endpoint `http` in `additionalEndpoints`; this endpoint is left out
        "#]],
    );
    check(
        ZnodeFormat::ServerSet,
        r#"
        member_0000000001 {"additionalEndpoints":{"http":{"host":"10.0.0.3","port":8080}}}
        member_0000000002 {"serviceEndpoint":{"host":"10.0.0.2"}}
        "#,
        expect![[r#"
            FAILED 2 of 2 records are bad, which is more than single mistakes
            zk/pay/member_0000000001: there is no `serviceEndpoint` in it
            zk/pay/member_0000000002: there is no port in it
        "#]],
    );
}

#[test]
fn vectors_weigh_the_members_that_they_select() {
    check(
        ZnodeFormat::ServerSet,
        r#"
        member_0000000001 {"serviceEndpoint":{"host":"10.0.0.1","port":80},"shard":1}
        member_0000000002 {"serviceEndpoint":{"host":"10.0.0.2","port":80},"shard":2}
        member_0000000003 {"serviceEndpoint":{"host":"10.0.0.3","port":80},"shard":3}
        member_0000000004 {"serviceEndpoint":{"host":"10.0.0.4","port":80},"shard":4}
        member_0000000005 {"serviceEndpoint":{"host":"10.0.0.5","port":80},"shard":5}
        vector_0000000006 {"vector":[{"select":"shard=1","weight":0.5,"priority":1},{"select":"member=member_0000000002","weight":2}]}
        vector_0000000007 {"vector":[{"select":"inet=10.0.0.1:80","weight":0.5},{"select":"shard=3","weight":0.0},{"select":"shard=4","weight":-1.0}]}
        vector_0000000008 {"vector":[{"weight":9},{"select":"rack=r7","weight":9},{"select":7}]}
        vector_0000000009 garbage
        "#,
        expect![[r#"
            pay
              10.0.0.1:80 weight 25 healthy {"shard": "1"}
              10.0.0.2:80 weight 200 healthy {"shard": "2"}
              10.0.0.3:80 weight 1 draining {"shard": "3"}
              10.0.0.5:80 weight 100 healthy {"shard": "5"}
            zk/pay/vector_0000000009: its data is not JSON (Thrift's binary form is not read): expected value at line 1 column 1; its weights are ignored
        "#]],
    );
}

#[test]
fn a_record_that_makes_no_sense_costs_that_record() {
    check(
        ZnodeFormat::ServerSet,
        r#"
        member_0000000001 {"serviceEndpoint":{"host":"10.0.0.1","port":80}}
        member_0000000002 {"serviceEndpoint":{"host":"10.0.0.2","port":80}}
        member_0000000003 {"serviceEndpoint":{"host":"10.0.0.3","port":80}}
        member_0000000004 thrift
        member_0000000005 []
        "#,
        expect![[r#"
            pay
              10.0.0.1:80 weight 1 healthy
              10.0.0.2:80 weight 1 healthy
              10.0.0.3:80 weight 1 healthy
            FAILED 2 of 5 records are bad, which is more than single mistakes
            zk/pay/member_0000000004: its data is not JSON (Thrift's binary form is not read): expected ident at line 1 column 2; this endpoint is left out
            zk/pay/member_0000000005: its data is not an object in JSON; this endpoint is left out
        "#]],
    );
    check(
        ZnodeFormat::ServerSet,
        r#"
        member_0000000001 {"serviceEndpoint":{"host":"10.0.0.1","port":80}}
        member_0000000002 {"serviceEndpoint":{"host":"10.0.0.2","port":80}}
        member_0000000003 {"serviceEndpoint":{"host":"10.0.0.3","port":80}}
        member_0000000004 {"serviceEndpoint":{"host":"10.0.0.4","port":80}}
        member_0000000005 {"serviceEndpoint":{"host":"10.1.2.310.4.5.6","port":80}}
        "#,
        expect![[r#"
            pay
              10.0.0.1:80 weight 1 healthy
              10.0.0.2:80 weight 1 healthy
              10.0.0.3:80 weight 1 healthy
              10.0.0.4:80 weight 1 healthy
            zk/pay/member_0000000005: `10.1.2.310.4.5.6` is neither an IP address nor a host name; this endpoint is left out
        "#]],
    );
}

#[test]
fn nerve_writes_ports_and_weights_as_numbers_or_texts() {
    check(
        ZnodeFormat::Nerve,
        r#"
        i-1_0000000001 {"host":"10.1.0.17","port":31002,"name":"vm-17","weight":10,"haproxy_server_options":"backup","labels":{"az":"us-east-1a","deploy_group":"prod.canary"}}
        i-2_0000000002 {"host":"10.1.0.18","port":"31002","name":"vm-18","weight":"5"}
        i-3_0000000003 {"host":"10.1.0.19","port":31002,"weight":0}
        i-4_0000000004 {"host":"10.1.0.20","port":31002,"haproxy_server_options":"check disabled"}
        !i-5 {"host":"10.1.0.21","port":31002}
        !left-over_0000000006
        empty_0000000007
        !config {"haproxy":{"listen":["mode http"]}}
        "#,
        expect![[r#"
            pay
              10.1.0.17:31002 weight 10 healthy zone us-east-1a {"deploy_group": "prod.canary", "name": "vm-17"}
              10.1.0.18:31002 weight 5 healthy {"name": "vm-18"}
              10.1.0.19:31002 weight 1 draining
              10.1.0.20:31002 weight 10 draining
              10.1.0.21:31002 weight 10 unknown {"liveness": "none"}
        "#]],
    );
    check(
        ZnodeFormat::Nerve,
        r#"
        i-1_0000000001 {"host":"10.1.0.17","port":31002}
        i-2_0000000002 {"name":"vm-18"}
        i-3_0000000003 {"host":"10.1.0.19","port":31002,"weight":-1}
        "#,
        expect![[r#"
            pay
              10.1.0.17:31002 weight 1 healthy
              10.1.0.19:31002 weight 1 healthy
            zk/pay/i-2_0000000002: there is no host in it; this endpoint is left out
            zk/pay/i-3_0000000003: `-1` is not a weight: a number from 0 to 1000000; it is ignored
        "#]],
    );
}

#[test]
fn yelps_places_are_labels_without_a_value() {
    check(
        ZnodeFormat::Nerve,
        r#"
        i_0000000001 {"host":"10.1.0.17","port":31002,"labels":{"habitat:uswest1aprod":"","region:uswest1-prod":"","superregion:norcal-prod":"","paasta_instance":"main"}}
        "#,
        expect![[r#"
            pay
              10.1.0.17:31002 weight 1 healthy zone uswest1aprod {"habitat": "uswest1aprod", "paasta_instance": "main", "region": "uswest1-prod", "superregion": "norcal-prod"}
        "#]],
    );
}

#[test]
fn nerve_may_write_everything_into_the_name() {
    let json = r#"{"host":"10.1.0.17","port":8080,"name":"vm-17","weight":3}"#;
    let encoded = URL_SAFE.encode(json);
    let text = format!("base64_{}_{encoded}_0000000012\nbase64_99_AAAA_0000000013 {json}\n", encoded.len());
    check(
        ZnodeFormat::Nerve,
        &text,
        expect![[r#"
        pay
          10.1.0.17:8080 weight 3 healthy {"name": "vm-17"}
    "#]],
    );
}

#[test]
fn a_curator_instance_has_either_port_and_any_payload() {
    check(
        ZnodeFormat::Curator,
        r#"
        0f3c {"name":"pay","id":"0f3c","address":"10.1.0.17","port":8080,"sslPort":null,"payload":{"@class":"com.acme.Meta","version":"v3","zone":"a1","owner":"team-a"},"registrationTimeUTC":1719830000000,"serviceType":"DYNAMIC","uriSpec":{"parts":[{"value":"scheme","variable":true},{"value":"://","variable":false}]}}
        1 {"name":"pay","id":"1","address":"10.1.0.18","port":8080,"sslPort":8443,"payload":"text","serviceType":"DYNAMIC_SEQUENTIAL"}
        2 {"name":"pay","id":"2","address":"10.1.0.19","port":8080,"payload":7,"enabled":false}
        3 {"name":"pay","id":"3","address":"10.1.0.20","port":8080,"payload":["com.acme.Meta",{"version":"v4"}],"enabled":true}
        !4 {"name":"pay","id":"4","address":"10.1.0.21","port":8080,"payload":null,"serviceType":"PERMANENT"}
        !nested
        !made-by-curator 10.1.0.99
        "#,
        expect![[r#"
            pay http
              10.1.0.17:8080 weight 1 healthy zone a1 version v3 {"owner": "team-a"}
              10.1.0.18:8080 weight 1 healthy {"payload": "text"}
              10.1.0.19:8080 weight 1 draining {"payload": "7"}
              10.1.0.20:8080 weight 1 healthy version v4
              10.1.0.21:8080 weight 1 unknown {"liveness": "none"}
        "#]],
    );
    check(
        ZnodeFormat::Curator,
        r#"
        1 {"address":"10.1.0.18","port":null,"sslPort":8443}
        2 {"address":"10.1.0.19","port":0,"sslPort":8443,"uriSpec":{"parts":[{"value":"scheme","variable":true}]}}
        3 {"address":"10.1.0.20","sslPort":null}
        4 {"address":null,"port":80}
        "#,
        expect![[r#"
            pay tls
              10.1.0.18:8443 weight 1 healthy
              10.1.0.19:8443 weight 1 healthy
            zk/pay/3: there is neither a `port` nor an `sslPort` in it; this endpoint is left out
            zk/pay/4: there is no host in it; this endpoint is left out
        "#]],
    );
    check_with(
        RecordRules { prefer: PreferredPort::SslPort, ..RecordRules::default() },
        ZnodeFormat::Curator,
        r#"
        1 {"address":"10.1.0.18","port":8080,"sslPort":8443}
        2 {"address":"10.1.0.19","port":8080,"sslPort":null}
        "#,
        expect![[r#"
            pay tls
              10.1.0.18:8443 weight 1 healthy
              10.1.0.19:8080 weight 1 healthy
        "#]],
    );
    check(
        ZnodeFormat::Curator,
        r#"1 {"address":"10.1.0.18","port":8080,"uriSpec":{"parts":[{"value":"grpc://","variable":false},{"value":"address","variable":true}]}}"#,
        expect![[r#"
            pay grpc
              10.1.0.18:8080 weight 1 healthy
        "#]],
    );
}

#[test]
fn springs_status_is_health() {
    check(
        ZnodeFormat::Curator,
        r#"
        1 {"address":"10.1.0.1","port":80,"payload":{"@class":"org.springframework.cloud.zookeeper.discovery.ZookeeperInstance","id":"pay","name":"pay","metadata":{"instance_status":"UP","zone":"a1","version":"v1","team":"a","weight":"3"}}}
        2 {"address":"10.1.0.2","port":80,"payload":{"metadata":{"instance_status":"out_of_service"}}}
        3 {"address":"10.1.0.3","port":80,"payload":{"metadata":{"instance_status":"DOWN"}}}
        4 {"address":"10.1.0.4","port":80,"payload":{"metadata":{"instance_status":""}}}
        5 {"address":"10.1.0.5","port":80,"payload":{"metadata":null}}
        "#,
        expect![[r#"
            pay
              10.1.0.1:80 weight 3 healthy zone a1 version v1 {"team": "a"}
              10.1.0.2:80 weight 1 draining
              10.1.0.3:80 weight 1 unhealthy
              10.1.0.4:80 weight 1 healthy
              10.1.0.5:80 weight 1 healthy
        "#]],
    );
}

#[test]
fn the_candidate_with_the_lowest_number_leads() {
    check(
        ZnodeFormat::HostPort,
        "
        singleton_candidate_0000000004 10.0.0.4:80
        singleton_candidate_0000000003 10.0.0.3:80,10.0.0.3:81
        ",
        expect![[r#"
            pay
              10.0.0.3:80 weight 1 healthy
              10.0.0.3:81 weight 1 healthy
        "#]],
    );
    // The number has wrapped around: the oldest node still has a positive one.
    check(
        ZnodeFormat::HostPort,
        "
        candidate_-2147483648 10.0.0.5:80
        candidate_2147483647 10.0.0.4:80
        ",
        expect![[r#"
            pay
              10.0.0.4:80 weight 1 healthy
        "#]],
    );
    check(
        ZnodeFormat::HostPort,
        "
        latch-0000000004 10.0.0.4:80
        latch-0000000003 nonsense
        ",
        expect![[r#"
            FAILED 1 of 1 records are bad, which is more than single mistakes
            zk/pay/latch-0000000003: `nonsense` has no port: write `nonsense:8080`, an address and a port
        "#]],
    );
}

#[test]
fn kingpin_writes_the_address_into_the_name() {
    check(
        ZnodeFormat::HostPort,
        "
        8a7f-10.0.0.3:9000
        8a80-web-1.internal:9000
        10.0.0.5:9000
        x-10.1.2.310.4.5.6:9000
        ",
        expect![[r#"
            pay
              10.0.0.3:9000 weight 1 healthy
              10.0.0.5:9000 weight 1 healthy
              web-1.internal:9000 weight 1 healthy
            zk/pay/x-10.1.2.310.4.5.6:9000: there is no `host:port` in it, nor in its name; this endpoint is left out
        "#]],
    );
    check(
        ZnodeFormat::HostPort,
        "
        web-1 10.0.0.3:9000
        web-2 10.0.0.4:9000
        ",
        expect![[r#"
            pay
              10.0.0.3:9000 weight 1 healthy
              10.0.0.4:9000 weight 1 healthy
        "#]],
    );
}

#[test]
fn of_two_records_of_one_address_the_younger_counts() {
    check(
        ZnodeFormat::Nerve,
        r#"
        z_0000000001 {"host":"10.1.0.17","port":80,"weight":1,"labels":{"version":"old"}}
        a_0000000002 {"host":"10.1.0.17","port":80,"weight":2,"labels":{"version":"new"}}
        "#,
        expect![[r#"
            pay
              10.1.0.17:80 weight 2 healthy version new
        "#]],
    );
}

#[test]
fn paths_of_ones_own_go_before_those_that_a_format_knows() {
    let map = FieldPaths {
        zone: vec!["labels.dc.room".to_owned(), "labels.rack".to_owned()],
        version: vec!["labels.rev".to_owned()],
        protocol: vec!["labels.speaks".to_owned()],
        weight: vec!["labels.share".to_owned()],
    };
    check_with(
        RecordRules { map, ..RecordRules::default() },
        ZnodeFormat::Nerve,
        r#"
        a_0000000001 {"host":"10.1.0.17","port":80,"weight":1,"labels":{"az":"no","dc.room":"r1","rev":7,"speaks":"http","share":"4"}}
        b_0000000002 {"host":"10.1.0.18","port":80,"labels":{"az":"yes","speaks":"nonsense"}}
        "#,
        expect![[r#"
            pay http
              10.1.0.17:80 weight 4 healthy zone r1 version 7 {"dc.room": "r1", "rev": "7", "share": "4", "speaks": "http"}
              10.1.0.18:80 weight 10 healthy zone yes {"speaks": "nonsense"}
        "#]],
    );
}

#[test]
fn endpoints_that_differ_in_protocol_are_said() {
    check(
        ZnodeFormat::Curator,
        r#"
        1 {"address":"10.1.0.1","port":80,"uriSpec":{"parts":[{"value":"scheme","variable":true}]}}
        2 {"address":"10.1.0.2","port":80,"uriSpec":{"parts":[{"value":"scheme","variable":true}]}}
        3 {"address":"10.1.0.3","sslPort":443}
        "#,
        expect![[r#"
            pay http
              10.1.0.1:80 weight 1 healthy
              10.1.0.2:80 weight 1 healthy
              10.1.0.3:443 weight 1 healthy
            zk/pay: its endpoints differ in protocol (1 of tls, 2 of http): http is used for all; to choose another, set `protocol` in a `Service` document, or set `map`
        "#]],
    );
}

#[test]
fn the_format_is_told_by_what_most_nodes_look_like() {
    let detected =
        |text: &str| decide(&votes(members(text)), None).map_or("?".to_owned(), |format| format.to_string());
    assert_eq!(detected(r#"member_1 {"serviceEndpoint":{"host":"a","port":1}}"#), "serverset");
    assert_eq!(detected(r#"1 {"address":"a","port":1,"serviceType":"DYNAMIC"}"#), "curator");
    assert_eq!(detected(r#"1 {"host":"a","port":1}"#), "nerve");
    assert_eq!(detected("base64_4_AAAA_0000000001"), "nerve");
    assert_eq!(detected(dubbo::DUBBO), "dubbo");
    assert_eq!(detected("c_0000000001 10.0.0.1:80"), "hostport");
    assert_eq!(detected("8a7f-10.0.0.3:9000"), "hostport");
    assert_eq!(detected("1 {}\n2 garbage\n!3"), "?");
    assert_eq!(
        detected("1 {\"host\":\"a\",\"port\":1}\n2 {\"host\":\"b\",\"port\":1}\n3 10.0.0.1:80"),
        "nerve"
    );
}

#[test]
fn a_node_that_may_not_be_read_is_a_bad_record() {
    let member = Member {
        name: "member_1",
        data: b"",
        is_ephemeral: true,
        created: 0,
        unreadable: Some("could not read /pay/member_1: not allowed"),
    };
    let good = members(r#"member_2 {"serviceEndpoint":{"host":"10.0.0.2","port":80}}"#);
    let directory = RecordDirectory { place: "zk/pay", members: [good, vec![member]].concat() };
    let read = read(ZnodeFormat::ServerSet, &directory, &RecordRules::default());
    assert!(read.partial_reason().is_none());
    let problems: Vec<_> = read.problems(&"it".into()).map(|problem| problem.to_string()).collect();
    assert_eq!(
        problems,
        ["zk/pay/member_1: could not read /pay/member_1: not allowed; this endpoint is left out"]
    );
}
