//! Captured connections: what programs on a host get when they call services by virtual and by real
//! addresses. The agents, Envoys and kernel rules are real; each host is a network namespace.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use vmesh_testkit::app::HttpApp;
use vmesh_testkit::netns::Host;
use vmesh_testkit::{Result, wait_for};
use vmesh_tests::BOUND;
use vmesh_tests::vm::{APP, Greeter, Rules, Site, Vm, get};

fn at(ip: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(ip.into(), port)
}

fn http_app(host: &Host, name: &str, address: SocketAddr) -> HttpApp {
    host.within(|| HttpApp::start(name, "v1", address)).unwrap().unwrap()
}

fn greeter(host: &Host, address: SocketAddr, greeting: &'static str) -> Greeter {
    host.within(|| Greeter::start(address, greeting)).unwrap().unwrap()
}

/// Opens a connection of an application on this host. The socket belongs to the host wherever it is used.
fn connect(host: &Host, to: SocketAddr) -> std::io::Result<TcpStream> {
    host.within_as(APP, || {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(stream)
    })
    .unwrap()
}

/// Returns what the server says first.
fn greeting(host: &Host, to: SocketAddr) -> std::io::Result<String> {
    let mut buffer = [0; 64];
    let read = connect(host, to)?.read(&mut buffer)?;
    Ok(String::from_utf8_lossy(buffer.get(..read).unwrap_or_default()).into_owned())
}

/// Reports whether the server sends back what it gets.
fn echoes(stream: &mut TcpStream, what: &str) -> bool {
    let mut back = vec![0; what.len()];
    stream.write_all(what.as_bytes()).is_ok()
        && stream.read_exact(&mut back).is_ok()
        && back == what.as_bytes()
}

/// Returns the virtual addresses of a service, one of each family.
fn virtual_addresses(vm: &Vm, service: &str, port: u16) -> Vec<SocketAddr> {
    let addresses: Vec<_> = vm.names(service).unwrap().into_iter().map(|ip| at(ip, port)).collect();
    assert!(addresses.len() == 2 && addresses.iter().any(SocketAddr::is_ipv6), "{service}: {addresses:?}");
    addresses
}

/// Waits until the service has a name on the host, and connections to its addresses are captured.
async fn named(vm: &Vm, service: &str) {
    let look = async || {
        let (names, rules) = (vm.names(service)?, vm.ruleset()?);
        let captured = names.iter().filter(|ip| rules.contains(&ip.to_string())).count();
        match captured {
            2 => Ok(()),
            n => Err(vmesh_testkit::Failed::new(format!("{n} of {names:?} are captured"))),
        }
    };
    wait_for(&format!("{service} to have a name on {}", vm.name), BOUND, look).await.unwrap();
}

#[tokio::test]
async fn a_service_is_reached_by_its_virtual_and_by_its_real_addresses_whatever_it_speaks() {
    let site = Site::start(&[]).await.unwrap();
    let server = site.outsider().unwrap();
    let (v4, v6) = (server.v4, server.v6);
    let _web = [http_app(&server, "web", at(v4, 8080)), http_app(&server, "web", at(v6, 8080))];
    greeter(&server, at(v4, 3306), "hello from db");
    greeter(&server, at(v6, 3306), "hello from db");
    // This endpoint is draining, so balanced connections never reach it.
    greeter(&server, at(v4, 3307), "hello from the old one");
    greeter(&server, at(v4, 6380), "");
    let services = format!(
        "- {{service: web, protocol: http, port: 80, endpoints: [\"{v4}:8080\", \"[{v6}]:8080\"]}}\n\
         - {{service: db, protocol: mysql, port: 3306, endpoints: [\"{v4}:3306\", \"[{v6}]:3306\", \
         {{address: \"{v4}:3307\", health: draining}}]}}\n\
         - {{service: cache, port: 6379, endpoints: [\"{v4}:6380\"]}}\n"
    );
    site.write("services.d/all.yaml", &services).unwrap();
    let capture = "upstreams: [web, db, cache]\ncapture: {outbound: {capture: addresses}}";
    let mut vm = site.vm("client", Rules::Nft, capture).await.unwrap();
    vm.start().await.unwrap();
    for service in ["web", "db", "cache"] {
        named(&vm, service).await;
    }

    let real = [at(v4, 8080), at(v6, 8080)];
    for address in virtual_addresses(&vm, "web", 80).into_iter().chain(real) {
        let told = vm.get(&address.to_string(), "/").unwrap();
        assert!(told.contains("x-forwarded-proto"), "{address}: it did not come through Envoy: {told}");
    }
    // The client does not speak before the server does.
    let real = [at(v4, 3306), at(v6, 3306), at(v4, 3307)];
    for address in virtual_addresses(&vm, "db", 3306).into_iter().chain(real) {
        assert_eq!(greeting(&vm.host, address).unwrap(), "hello from db", "{address}");
    }
    for address in virtual_addresses(&vm, "cache", 6379).into_iter().chain([at(v4, 6380)]) {
        assert!(echoes(&mut connect(&vm.host, address).unwrap(), "ping"), "{address}");
    }
    // The control plane gives the same explanation.
    let told = site.control_api("/api/v1/explain?service=web&from=client").unwrap();
    let explained: serde_json::Value = serde_json::from_str(&told).unwrap();
    let listeners: Vec<_> = virtual_addresses(&vm, "web", 80).iter().map(SocketAddr::to_string).collect();
    assert_eq!(explained["listeners"], serde_json::json!(listeners), "{told}");
    assert_eq!(explained["reachable"], true, "{told}");
    // Only connections to services are captured.
    assert_eq!(greeting(&server, at(v4, 3307)).unwrap(), "hello from the old one");
}

#[tokio::test]
async fn what_is_no_service_is_let_through_or_refused_by_policy() {
    let site = Site::start(&[]).await.unwrap();
    let server = site.outsider().unwrap();
    let _web = http_app(&server, "web", at(server.v4, 8080));
    let _other =
        [http_app(&server, "other", at(server.v4, 9999)), http_app(&server, "other", at(server.v6, 9999))];
    let web = format!("service: web\nprotocol: http\nport: 80\nendpoints: [\"{}:8080\"]\n", server.v4);
    site.write("services.d/web.yaml", &web).unwrap();
    let capture = "upstreams: [web]\ncapture: {outbound: {capture: all}}";
    let mut vm = site.vm("client", Rules::Nft, capture).await.unwrap();
    vm.start().await.unwrap();
    named(&vm, "web").await;
    let others = [at(server.v4, 9999).to_string(), at(server.v6, 9999).to_string()];
    let web: Vec<_> = virtual_addresses(&vm, "web", 80).iter().map(SocketAddr::to_string).collect();
    for other in &others {
        assert!(vm.get(other, "/").unwrap().contains("other"), "{other}");
    }
    // A connection to a virtual address without a service is closed at once.
    assert!(matches!(greeting(&vm.host, "247.9.9.9:80".parse().unwrap()).as_deref(), Ok("") | Err(_)));

    let policy = async |text: &str, other_is_reached: bool| {
        site.write("mesh.d/mesh.yaml", text).unwrap();
        let look = async || match vm.get(&others[0], "/").is_ok() {
            reached if reached == other_is_reached => Ok(()),
            _ => Err(vmesh_testkit::Failed::new("it is not so")),
        };
        wait_for("the policy to be in force", BOUND, look).await.unwrap();
        for other in &others {
            assert_eq!(vm.get(other, "/").is_ok(), other_is_reached, "{other}");
        }
        for address in &web {
            assert!(vm.get(address, "/").unwrap().contains("web"), "{address}");
        }
    };
    policy("kind: Mesh\noutbound: registry-only\n", false).await;
    policy("kind: Mesh\noutbound: registry-only\n---\nkind: Node\nname: client\noutbound: allow-any\n", true)
        .await;
}

/// Tests a host with two applications, which are called from outside, by each other and by themselves.
async fn several_workloads(rules: Rules) {
    let site = Site::start(&[]).await.unwrap();
    let outsider = site.outsider().unwrap();
    let more = "upstreams: [\"*\"]\nworkloads:\n  - {service: shop, port: 8081, protocol: http}\n  - {service: db, port: 3306}\n\
                capture: {outbound: {capture: addresses}, inbound: {capture: redirect}}";
    let mut vm = site.vm("both", rules, more).await.unwrap();
    let (v4, v6) = (vm.host.v4, vm.host.v6);
    // The first application listens on all addresses, the second only on that of the network card.
    let _shop = http_app(&vm.host, "shop", "[::]:8081".parse().unwrap());
    greeter(&vm.host, at(v4, 3306), "hello from db");
    let services = format!(
        "- {{service: shop, protocol: http, port: 80, endpoints: [\"{v4}:8081\"]}}\n\
         - {{service: db, port: 3306, endpoints: [\"{v4}:3306\"]}}\n"
    );
    site.write("services.d/all.yaml", &services).unwrap();
    vm.start().await.unwrap();
    named(&vm, "shop").await;
    named(&vm, "db").await;

    // Calls from outside to the applications' own ports go through Envoy, each with its own protocol.
    for address in [at(v4, 8081), at(v6, 8081)] {
        let told = outsider.within(|| get(&address.to_string(), "/")).unwrap().unwrap();
        assert!(told.contains("x-forwarded-proto"), "{address}: it did not come through Envoy: {told}");
    }
    assert_eq!(greeting(&outsider, at(v4, 3306)).unwrap(), "hello from db");
    // An application that calls its own service gets an answer, by name and by address. Calls to localhost
    // are answered as well.
    for address in virtual_addresses(&vm, "shop", 80).into_iter().chain([at(v4, 8081)]) {
        assert!(vm.get(&address.to_string(), "/").unwrap().contains("shop"), "{address}");
    }
    assert!(vm.get("127.0.0.1:8081", "/").unwrap().contains("shop"));
    for address in virtual_addresses(&vm, "db", 3306).into_iter().chain([at(v4, 3306)]) {
        assert_eq!(greeting(&vm.host, address).unwrap(), "hello from db", "{address}");
    }
}

#[tokio::test]
async fn a_host_with_several_workloads_is_called_from_outside_and_calls_itself_by_nftables() {
    several_workloads(Rules::Nft).await;
}

#[tokio::test]
async fn a_host_with_several_workloads_is_called_from_outside_and_calls_itself_by_iptables() {
    several_workloads(Rules::Iptables).await;
}

#[tokio::test]
async fn a_change_to_one_service_cuts_no_connection_of_another_and_the_dial_cuts_none() {
    let site = Site::start(&[]).await.unwrap();
    let server = site.outsider().unwrap();
    greeter(&server, at(server.v4, 7001), "");
    greeter(&server, at(server.v4, 7002), "");
    let services = |more: &str| {
        format!(
            "- {{service: first, endpoints: [\"{v4}:7001\"]}}\n- {{service: second, endpoints: [\"{v4}:7002\"]}}\n{more}",
            v4 = server.v4
        )
    };
    site.write("services.d/all.yaml", &services("")).unwrap();
    let capture = "upstreams: [\"*\"]\ncapture: {outbound: {capture: addresses}}";
    let mut vm = site.vm("client", Rules::Nft, capture).await.unwrap();
    vm.start().await.unwrap();
    named(&vm, "first").await;
    named(&vm, "second").await;
    let firsts = virtual_addresses(&vm, "first", 7001).into_iter().chain([at(server.v4, 7001)]);
    let mut open: Vec<_> = firsts.map(|address| connect(&vm.host, address).unwrap()).collect();
    let mut changed = connect(&vm.host, at(server.v4, 7002)).unwrap();
    assert!(open.iter_mut().all(|stream| echoes(stream, "before")) && echoes(&mut changed, "before"));

    // A setting of the second service changes, so the connections of its listeners end after their drain
    // time.
    site.write("mesh.d/second.yaml", "kind: Service\nname: second\ntimeouts: {idle: 30m}\n").unwrap();
    let cut = async || match echoes(&mut changed, "still there?") {
        true => Err(vmesh_testkit::Failed::new("it is open")),
        false => Ok(()),
    };
    wait_for("the connection of the changed listener to end", BOUND, cut).await.unwrap();
    assert!(open.iter_mut().all(|stream| echoes(stream, "another one has changed")));

    // A service is added with an endpoint on the first one's port, and an endpoint of the second is removed.
    site.write("services.d/all.yaml", &services("- {service: third, endpoints: [\"10.88.250.1:7001\"]}\n"))
        .unwrap();
    named(&vm, "third").await;
    assert!(open.iter_mut().all(|stream| echoes(stream, "another one has come")));

    // The share of captured connections changes in the host's rules.
    site.write("mesh.d/mesh.yaml", "kind: Mesh\ncapture: {percent: 10}\n").unwrap();
    let turned = async || -> Result<()> {
        match vm.ruleset()?.contains("numgen") {
            true => Ok(()),
            false => Err(vmesh_testkit::Failed::new("the rules draw no lots")),
        }
    };
    wait_for("the dial to be turned", BOUND, turned).await.unwrap();
    assert!(open.iter_mut().all(|stream| echoes(stream, "the dial was turned")));
    if virtual_addresses(&vm, "first", 7001).iter().any(|address| connect(&vm.host, *address).is_err()) {
        panic!("a virtual address is captured whatever the dial says");
    }
}

#[tokio::test]
async fn a_host_that_calls_by_real_addresses_and_is_itself_one_of_them_serves_and_calls() {
    let site = Site::start(&[]).await.unwrap();
    let outsider = site.outsider().unwrap();
    let _peer = http_app(&outsider, "peer", at(outsider.v4, 15008));
    let mut vm = site.vm("shop", Rules::Nft, "").await.unwrap();
    let v4 = vm.host.v4;
    // As in production, Envoy listens for other hosts at the address of the network card, which is
    // registered.
    let more = format!(
        "upstreams: [\"*\"]\nworkloads: [{{service: shop, port: 8081, protocol: http, listen: \"{v4}:15008\"}}]\n\
         capture: {{outbound: {{capture: addresses}}}}"
    );
    site.configure(&vm, &more).unwrap();
    let _shop = http_app(&vm.host, "shop", "127.0.0.1:8081".parse().unwrap());
    let both = format!(
        "service: shop\nprotocol: http\nport: 80\nendpoints: [\"{v4}:15008\", \"{}:15008\"]\n",
        outsider.v4
    );
    site.write("services.d/shop.yaml", &both).unwrap();
    vm.start().await.unwrap();
    named(&vm, "shop").await;
    let refused = |vm: &Vm| vm.status().unwrap()["accepted"]["rejections"].clone();
    assert_eq!(refused(&vm), 0, "{}", vm.status().unwrap()["accepted"]);
    let told = outsider.within(|| get(&format!("{v4}:15008"), "/")).unwrap().unwrap();
    assert!(told.contains("shop"), "{told}");
    let told = vm.get(&format!("{}:15008", outsider.v4), "/").unwrap();
    assert!(told.contains("x-forwarded-proto"), "it did not come through Envoy: {told}");

    // Removing and adding an endpoint makes no difference.
    let other = format!("service: shop\nprotocol: http\nport: 80\nendpoints: [\"{}:15008\"]\n", outsider.v4);
    for text in [&other, &both] {
        site.write("services.d/shop.yaml", text).unwrap();
        let seen = async || match site.control_api("/api/v1/services")? {
            told if told.contains(&format!("{v4}:15008")) == (text == &both) => Ok(()),
            told => Err(vmesh_testkit::Failed::new(told)),
        };
        wait_for("the endpoint to come or go", BOUND, seen).await.unwrap();
        let told = outsider.within(|| get(&format!("{v4}:15008"), "/")).unwrap().unwrap();
        assert!(told.contains("shop"), "{told}");
        assert_eq!(refused(&vm), 0, "{}", vm.status().unwrap()["accepted"]);
    }
}

#[tokio::test]
async fn what_was_refused_since_a_disk_had_no_room_is_asked_for_again() {
    let site = Site::start(&[]).await.unwrap();
    site.write("services.d/web.yaml", "service: web\nport: 80\nendpoints: [\"10.88.250.1:8080\"]\n").unwrap();
    let mut vm =
        site.vm("client", Rules::Nft, "upstreams: [web]\ncapture: {outbound: transparent}").await.unwrap();
    // The directory blocks the state file, so no state can be written.
    let blocked = vm.state_file();
    std::fs::create_dir_all(blocked.join("in the way")).unwrap();
    vm.start_net().unwrap();
    vm.start_agent().unwrap();
    let refused = async || {
        let said = vm.net.as_ref().unwrap().output() + &vm.agent.as_ref().unwrap().output();
        if said.contains("the trial is not begun") { Ok(()) } else { Err(vmesh_testkit::Failed::new(said)) }
    };
    wait_for("the change to be refused", BOUND, refused).await.unwrap();
    std::fs::remove_dir_all(&blocked).unwrap();
    vm.captures().await.unwrap();
}

#[tokio::test]
async fn what_was_taken_back_is_tried_again_when_an_operator_says_so() {
    let site = Site::start(&[]).await.unwrap();
    let capture = "upstreams: [\"*\"]\ncapture: {outbound: transparent, confirm: {by: operator, within: 5s}}";
    let mut vm = site.vm("client", Rules::Nft, capture).await.unwrap();
    vm.start_net().unwrap();
    vm.start_agent().unwrap();
    let state = async |state: &str, reverted: bool| {
        let look = async || {
            let status = vm.status()?;
            let net = &status["capture"]["net"];
            match net["state"] == state && net["reverted"].is_null() != reverted {
                true => Ok(()),
                false => Err(vmesh_testkit::Failed::new(net.to_string())),
            }
        };
        wait_for(&format!("capture to be {state}"), BOUND, look).await.unwrap();
    };
    state("trial", false).await;
    state("off", true).await;
    let (said, _) = vm.program("vmeshctl", &["capture", "retry"]).unwrap();
    assert!(!said.contains("TAKEN BACK"), "{said}");
    state("trial", false).await;
    vm.program("vmeshctl", &["capture", "confirm"]).unwrap();
    state("confirmed", false).await;
}

/// A host boots with IPv6 switched off and finds no control plane. The agent's configuration on the disk is
/// from when the host had IPv6.
#[tokio::test]
async fn a_host_that_boots_without_ipv6_and_without_control_planes_goes_on_with_ipv4() {
    let mut site = Site::start(&[]).await.unwrap();
    let server = site.outsider().unwrap();
    let (v4, v6) = (server.v4, server.v6);
    let _web = [http_app(&server, "web", at(v4, 8080)), http_app(&server, "web", at(v6, 8080))];
    let services = format!(
        "- {{service: web, protocol: http, port: 80, endpoints: [\"{v4}:8080\", \"[{v6}]:8080\"]}}\n\
         - {{service: shop, protocol: http, port: 80, endpoints: [\"{v4}:9999\"]}}\n"
    );
    site.write("services.d/all.yaml", &services).unwrap();
    let capture = "upstreams: [web, shop]\nworkloads: [{service: shop, port: 8081, protocol: http}]\n\
                   capture: {outbound: {capture: addresses}, inbound: {capture: redirect}}";
    let mut vm = site.vm("client", Rules::Nft, capture).await.unwrap();
    let shop = http_app(&vm.host, "shop", at(vm.host.v4, 8081));
    vm.start().await.unwrap();
    named(&vm, "web").await;
    let virtual_v4 = vm.names("web").unwrap().into_iter().find(IpAddr::is_ipv4).unwrap();

    site.kill_control();
    (vm.agent, vm.net) = (None, None);
    drop(shop);
    site.switch().reboot(&vm.host).unwrap();
    vm.host.run("sysctl", &["-qw", "net.ipv6.conf.all.disable_ipv6=1"]).unwrap();
    let _shop = http_app(&vm.host, "shop", at(vm.host.v4, 8081));
    vm.start().await.unwrap();
    for address in [at(virtual_v4, 80), at(v4, 8080)] {
        // The IPv6 endpoint is never tried; otherwise half of these requests would need a retry.
        for _ in 0..10 {
            let told = vm.get(&address.to_string(), "/").unwrap();
            assert!(told.contains("x-forwarded-proto"), "{address}: it did not come through Envoy: {told}");
        }
    }
    let told = server.within(|| get(&at(vm.host.v4, 8081).to_string(), "/")).unwrap().unwrap();
    assert!(told.contains("x-forwarded-proto"), "inbound: it did not come through Envoy: {told}");
    assert_eq!(vm.names("web").unwrap(), [virtual_v4]);
    let status = vm.status().unwrap();
    assert_eq!(status.pointer("/accepted/rejections").and_then(|n| n.as_u64()), Some(0), "{status}");

    // With IPv6 again, and still no control plane, the host works as before.
    (vm.agent, vm.net) = (None, None);
    site.switch().reboot(&vm.host).unwrap();
    vm.start().await.unwrap();
    named(&vm, "web").await;
    for address in virtual_addresses(&vm, "web", 80) {
        assert!(vm.get(&address.to_string(), "/").unwrap().contains("x-forwarded-proto"), "{address}");
    }
}
