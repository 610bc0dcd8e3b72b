use expect_test::{Expect, expect};

use super::*;

fn parse(text: &str) -> Result<Config, String> {
    Config::parse("agent.yaml", text.as_bytes(), "web-17").map_err(|error| error.to_string())
}

fn refused(text: &str, expected: Expect) {
    expected.assert_eq(&parse(text).unwrap_err());
}

const SMALL: &str = "control_plane: [\"http://127.0.0.1:15010\"]\n";

#[test]
fn the_small_configuration_has_a_default_for_everything_else() {
    let config = parse(SMALL).unwrap();
    assert_eq!(config.name.as_str(), "web-17");
    assert_eq!(config.api.to_string(), "127.0.0.1:15020");
    assert_eq!(config.state_dir, Path::new("/var/lib/vmesh-agent"));
    assert_eq!(config.xds_socket(), Path::new("/run/vmesh/xds.sock"));
    assert_eq!(config.envoy.manage, EnvoyManager::Systemd);
    assert_eq!(config.upstreams, Upstreams::Declared(Vec::new()));
}

#[test]
fn the_full_configuration_is_read_as_it_is_written() {
    let config = parse(
        r#"
control_plane:
  - "http://127.0.0.1:15010"
  - {address: "http://mesh2.example:15010", insecure: true}
state_dir: /s
run_dir: /r
envoy: {path: /opt/envoy, manage: child, concurrency: 1, drain: 3s, keep_on_stop: true, extra_args: [--log-format-escaped]}
listen: {api: "127.0.0.1:16020", dns: "127.0.0.1:16053"}
node: {name: web-18, address: 10.0.1.17, zone: eu-1a, labels: {role: web}}
workloads:
  - {service: orders, port: 8080, protocol: http, health: {http: /healthz}}
  - {service: cache, port: 6379, listen: "0.0.0.0:7379"}
upstreams:
  - {service: payments, listen: "127.0.0.1:9001"}
capture: {outbound: explicit, inbound: explicit}
log: debug
"#,
    )
    .unwrap();
    assert_eq!(config.control_planes[1].to_string(), "http://mesh2.example:15010");
    assert_eq!(config.workloads[0].listen.unwrap().to_string(), "127.0.0.1:15008");
    assert_eq!(config.workloads[1].listen.unwrap().to_string(), "0.0.0.0:7379");
    assert_eq!(config.envoy.drain.0, Duration::from_secs(3));
    assert!(matches!(&config.upstreams, Upstreams::Declared(all) if all.len() == 1));
}

#[test]
fn an_inbound_listener_is_on_the_node_s_address_only_where_that_is_loopback() {
    let workloads = "workloads: [{service: a, port: 80}, {service: b, port: 81}]\n";
    let on = |address: &str| {
        let config = parse(&format!("{SMALL}node: {{address: {address}}}\n{workloads}")).unwrap();
        config.workloads.iter().map(|workload| workload.listen.unwrap().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(on("127.0.3.7"), ["127.0.3.7:15008", "127.0.3.7:15009"]);
    assert_eq!(on("10.0.3.7"), ["127.0.0.1:15008", "127.0.0.1:15009"]);
}

#[test]
fn all_upstreams_are_a_star() {
    assert_eq!(parse(&format!("{SMALL}upstreams: [\"*\"]")).unwrap().upstreams, Upstreams::All);
}

#[test]
fn capture_that_is_off_reports_nothing() {
    let text = format!(
        "{SMALL}capture: {{outbound: off, inbound: off}}\nupstreams: [\"*\"]\nworkloads: [{{service: a, port: 80}}]"
    );
    let config = parse(&text).unwrap();
    assert_eq!(config.upstreams, Upstreams::Declared(Vec::new()));
    assert!(config.workloads.is_empty());
}

#[test]
fn a_control_plane_without_a_scheme_is_reached_by_mtls_and_a_node_with_mtls_has_no_plaintext_listener() {
    let config = parse(
        "control_plane: [\"mesh1.example:15012\", \"[::1]:15012\"]\njoin: {token_file: /etc/vmesh/token}\n\
         node: {address: 10.0.1.17}\nworkloads: [{service: web, port: 80}, {service: api, port: 81, listen: \"10.0.1.17:82\"}]\n\
         upstreams: [{service: payments, listen: \"127.0.0.1:9001\", as: web}]",
    )
    .unwrap();
    assert_eq!(config.control_planes[0].to_string(), "mesh1.example:15012");
    assert!(config.control_planes.iter().all(|control_plane| control_plane.is_tls));
    assert_eq!(config.join.as_ref().unwrap().token_file.as_deref(), Some(Path::new("/etc/vmesh/token")));
    assert_eq!(config.token_path().unwrap(), Path::new("/etc/vmesh/token"));
    assert_eq!(config.workloads[0].listen, None);
    assert_eq!(config.workloads[1].listen.unwrap().to_string(), "10.0.1.17:82");
    assert_eq!(config.mtls_address().unwrap().to_string(), "10.0.1.17:15008");
    let Upstreams::Declared(upstreams) = &config.upstreams else { panic!() };
    assert_eq!(upstreams[0].as_.as_ref().unwrap().as_str(), "web");
    assert_eq!(parse(SMALL).unwrap().mtls_address(), None);
}

#[test]
fn what_contradicts_mtls_is_refused() {
    refused(
        &format!("{SMALL}join: {{}}"),
        expect![[
            r#"agent.yaml: `join` needs control planes with mTLS: write `control_plane` without http://, as "mesh1.example:15012""#
        ]],
    );
    refused(
        "control_plane: [\"mesh1:15012\", \"http://127.0.0.1:15010\"]\nnode: {address: 10.0.1.17}\n\
         workloads: [{service: web, port: 80, listen: \"10.0.1.17:15008\"}]",
        expect![[r#"
            agent.yaml: `control_plane` has entries with mTLS and entries with http://: this node has an identity at all replicas, or at none
            agent.yaml: the port for mTLS and workload `web` both listen on 10.0.1.17:15008"#]],
    );
    refused(
        "control_plane: [\"https://mesh1:15012\", {address: \"mesh1:15012\", insecure: true}]",
        expect![[r#"
            agent.yaml:1:17: `control_plane`: `https://mesh1:15012`: write a host and a port for mTLS, as "mesh1.example:15012", or http:// for plaintext
            agent.yaml:1:40: `control_plane`: `mesh1:15012` is reached by mTLS: `insecure` is for http://"#]],
    );
}

#[test]
fn plaintext_beyond_this_host_is_refused_with_the_way_to_have_it() {
    refused(
        "control_plane: [\"http://10.0.0.5:15010\"]",
        expect![[
            r#"agent.yaml:1:17: `control_plane`: `http://10.0.0.5:15010` is plaintext and leaves this host: anybody on the way can read and change the configuration. If that is acceptable, write {address: "http://10.0.0.5:15010", insecure: true}"#
        ]],
    );
}

#[test]
fn transparent_alone_is_what_changes_least() {
    let config = parse(&format!(
        "{SMALL}capture: {{outbound: transparent, inbound: transparent}}\nupstreams: [payments]\n\
         workloads: [{{service: web, port: 8080}}]"
    ))
    .unwrap();
    assert_eq!(config.capture.spec.outbound.capture, vmesh_capture::spec::OutboundCapture::Vip);
    assert_eq!(config.capture.spec.inbound.capture, vmesh_capture::spec::InboundCapture::Redirect);
    assert!(config.capture.spec.inbound.ports.iter().all(|ports| ports.contains(8080)));
    assert_eq!(config.workloads[0].listen, None);
    assert_eq!(config.dns.unwrap().to_string(), "127.0.0.1:15053");
    let config = parse(&format!(
        "{SMALL}capture: {{outbound: {{capture: addresses, percent: 5, dial: {{units: {{app.service: 50}}}}}}, \
         dead_man: {{timeout: 5s}}, confirm: {{by: operator, within: 2m}}}}\ndns: {{suffix: Mesh.Example, ttl: 2s}}"
    ))
    .unwrap();
    assert_eq!(config.capture.confirm.by, settings::Confirmer::Operator);
    assert_eq!(config.capture.spec.outbound.percent.get(), 5);
    assert_eq!(config.zone_of_names.suffix.as_str(), "mesh.example");
}

#[test]
fn what_cannot_be_captured_is_refused_with_the_place() {
    refused(
        &format!(
            "{SMALL}capture: {{outbound: all, inbound: {{capture: tproxi}}, dead_man: {{timeout: 1s}}}}"
        ),
        expect![[r#"
                agent.yaml:2:21: `outbound`: `all` is not a capture mode: `off`, `explicit`, `transparent`, or a map as {capture: addresses, percent: 5}
                agent.yaml:2:45: `capture`: `tproxi` is not known here, did you mean `tproxy`?
                agent.yaml:2:74: `timeout`: 1s is not a duration from 3s to 10m in whole seconds"#]],
    );
    refused(
        &format!(
            "{SMALL}capture: {{outbound: {{percent: 5, vips: [\"240.0.0.1:80\"]}}, inbound: {{capture: redirect, ports: [80]}}, \
             confirm: {{within: 1s}}}}\ndns: {{suffix: local, ttl: 2h}}"
        ),
        expect![[r#"
                agent.yaml: `capture.outbound` says neither `vip`, `addresses` nor `all`: what is to be captured?
                agent.yaml: `capture.outbound` has `vips` or `addresses`: these come from the control plane
                agent.yaml: `capture.inbound` has `ports`: these are the workloads'
                agent.yaml: `capture.confirm` is `within` less than 5s or more than 1h
                agent.yaml: `capture.inbound` captures what workloads accept: there are no `workloads`
                agent.yaml: `dns.suffix`: `local` cannot be the suffix of names: resolvers ask the local network for `local`, by multicast (RFC 6762); built in is `mesh`
                agent.yaml: `dns.ttl` is from 1s to 1h, in whole seconds"#]],
    );
}

#[test]
fn every_mistake_is_shown_where_it_is() {
    refused(
        "control_plane: []\nnode: {nme: web-1, labels: {a: b}}\nlisten: {api: localhost}\nenvoy: {manage: docker, drain: 5}\n\
         upstreams: [payments]\nworkloads: [{service: a b, port: 0}]",
        expect![[r#"
                agent.yaml:2:8: unknown field `nme`, did you mean `name`?
                agent.yaml:3:15: `api`: `localhost` is not an IP address and a port, as "127.0.0.1:9001"
                agent.yaml:4:17: `manage`: expected one of `systemd` or `child`, found `docker`
                agent.yaml:4:32: `drain`: `5` is not a duration: a number and a unit, such as 250ms, 2s, 1m30s or 1h
                agent.yaml:6:23: `service`: `a b` is not a service name: 1 to 253 letters, digits, `.`, `_` or `-`, the first and the last a letter or a digit
                agent.yaml:6:34: `port`: port 0 is not a port: 1 to 65535"#]],
    );
}

#[test]
fn two_listeners_on_one_address_are_refused() {
    refused(
        &format!("{SMALL}upstreams: [{{service: a, listen: \"127.0.0.1:15020\"}}]"),
        expect!["agent.yaml: `listen.api` and upstream `a` both listen on 127.0.0.1:15020"],
    );
    refused(
        &format!("{SMALL}workloads: [{{service: b, port: 15008}}]"),
        expect!["agent.yaml: workload `b` listens on 127.0.0.1:15008 itself: give Envoy another `listen`"],
    );
}

#[test]
fn contradictions_are_refused() {
    refused(
        &format!("{SMALL}upstreams: [{{service: a}}, \"*\"]\nenvoy: {{keep_on_stop: true, concurrency: 0}}"),
        expect![[r#"
                agent.yaml: `upstreams`: "*" stands alone: it is every service, and a local port for none
                agent.yaml: `envoy.keep_on_stop` is for `manage: child`: under systemd Envoy's unit is its own
                agent.yaml: `envoy.concurrency` is 0: Envoy needs at least one worker"#]],
    );
}
