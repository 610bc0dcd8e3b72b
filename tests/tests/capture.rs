//! Capture on a host, by vmesh-net with a real agent, a real Envoy and the kernel's rules.

#![expect(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]

use std::time::Duration;

use vmesh_net::client;
use vmesh_net::protocol::{Answer, Ask, Status};
use vmesh_testkit::wait_for;
use vmesh_tests::BOUND;
use vmesh_tests::vm::{Rules, Site, Vm};

const WEB: &str = "service: web\nprotocol: http\nport: 80\nendpoints: [\"ADDRESS:8080\"]\n";

async fn status(vm: &Vm) -> Status {
    match client::ask(&vm.socket(), &Ask::Status).await.unwrap() {
        Answer::Status(status) => *status,
        other => panic!("{other:?}"),
    }
}

async fn until(vm: &Vm, what: &str, mut holds: impl FnMut(&Status) -> bool) {
    wait_for(what, BOUND, async || {
        let status = status(vm).await;
        if holds(&status) { Ok(()) } else { Err(format!("{status:?}")) }
    })
    .await
    .unwrap();
}

/// A client and a server on hosts of their own; the server is in no mesh.
async fn pair(
    rules: Rules,
    capture: &str,
) -> (Site, Vm, vmesh_testkit::netns::Host, vmesh_testkit::app::HttpApp) {
    let site = Site::start(&[]).await.unwrap();
    let server = site.outsider().unwrap();
    let address = format!("{}:8080", server.v4);
    let app = server
        .within(|| {
            vmesh_testkit::app::HttpApp::start("web", "v1", address.parse::<std::net::SocketAddr>().unwrap())
        })
        .unwrap()
        .unwrap();
    site.write("services.d/web.yaml", &WEB.replace("ADDRESS", &server.v4.to_string())).unwrap();
    let vm = site.vm("client", rules, &format!("upstreams: [web]\n{capture}")).await.unwrap();
    (site, vm, server, app)
}

async fn from_nothing_to_nothing(rules: Rules) {
    let (_site, mut vm, _server, app) = pair(rules, "capture: {outbound: {capture: addresses}}").await;
    let before = vm.ruleset().unwrap();
    vm.start().await.unwrap();
    let name = vm.names("web").unwrap();
    assert_eq!(name.len(), 2, "{name:?}");
    for address in &name {
        let at = std::net::SocketAddr::new(*address, 80).to_string();
        assert!(vm.get(&at, "/by-name").unwrap().contains("web"), "{at}");
    }
    let real = app.address().to_string();
    let told = vm.get(&real, "/by-address").unwrap();
    assert!(told.contains("x-request-id"), "it came through Envoy: {told}");
    let net = vm.net.take().unwrap();
    net.signal(rustix::process::Signal::TERM).unwrap();
    drop_when_gone(net).await;
    assert_eq!(vm.ruleset().unwrap(), before);
    assert!(vm.get(&real, "/direct").unwrap().contains("/direct"));
}

async fn drop_when_gone(mut net: vmesh_testkit::process::Daemon) {
    wait_for("vmesh-net to end", BOUND, async || net.has_exited()).await.unwrap();
}

#[tokio::test]
async fn a_host_captures_and_is_as_before_by_nftables() {
    from_nothing_to_nothing(Rules::Nft).await;
}

#[tokio::test]
async fn a_host_captures_and_is_as_before_by_iptables() {
    from_nothing_to_nothing(Rules::Iptables).await;
}
