//! Capture on a host, by vmesh-net with a real agent, a real Envoy and the kernel's rules.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use rustix::process::Signal;
use vmesh_testkit::app::HttpApp;
use vmesh_testkit::netns::Host;
use vmesh_testkit::process::Daemon;
use vmesh_testkit::wait_for;
use vmesh_tests::BOUND;
use vmesh_tests::vm::{APP, Rules, Site, Traffic, Vm, get};

const WEB: &str = "service: web\nprotocol: http\nport: 80\nendpoints: [\"ADDRESS:8080\"]\n";

/// Creates a client in the mesh and a server outside of it.
async fn pair(rules: Rules, capture: &str) -> (Site, Vm, Host, HttpApp) {
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
    let config = vm.config_file();
    let dry_run = ["--config", config.to_str().unwrap(), "--dry-run"];
    vm.start_net().unwrap();
    // If no vmesh-net is running, the agent makes the plan itself, with the backend that works.
    wait_for("vmesh-net", BOUND, async || vm.socket().exists().then_some(())).await.unwrap();
    let asked = async || match vm.program("vmesh-agent", &dry_run).unwrap() {
        (plan, 3) => Ok(plan),
        other => Err(format!("{other:?}")),
    };
    let plan = wait_for("a plan", BOUND, asked).await.unwrap();
    let tool = if rules == Rules::Nft { "nft -f -" } else { "iptables-restore --noflush -w 5" };
    assert!(plan.contains(tool) && plan.contains("redirect") || plan.contains("REDIRECT"), "{plan}");
    assert_eq!(vm.ruleset().unwrap(), before, "a dry run changes nothing");
    vm.start_agent().unwrap();
    vm.captures().await.unwrap();
    assert_eq!(vm.program("vmesh-agent", &dry_run).unwrap(), ("nothing to do\n".to_owned(), 0));
    let (shown, code) = vm.program("vmeshctl", &["capture"]).unwrap();
    assert!(code == 0 && shown.contains("capture       confirmed"), "{shown}");
    assert_eq!(vm.program("vmeshctl", &["capture", "plan"]).unwrap().0, "nothing to do\n");
    assert_eq!(vm.program("vmeshctl", &["capture", "confirm"]).unwrap().1, 1, "nothing is on trial");
    let name = vm.names("web").unwrap();
    assert_eq!(name.len(), 2, "{name:?}");
    for address in &name {
        let at = SocketAddr::new(*address, 80).to_string();
        assert!(vm.get(&at, "/by-name").unwrap().contains("web"), "{at}");
    }
    let real = app.address().to_string();
    let told = vm.get(&real, "/by-address").unwrap();
    assert!(told.contains("x-forwarded-proto"), "it came through Envoy: {told}");
    let net = vm.net.take().unwrap();
    net.signal(Signal::TERM).unwrap();
    drop_when_gone(net).await;
    assert_eq!(vm.ruleset().unwrap(), before);
    assert!(vm.get(&real, "/direct").unwrap().contains("/direct"));
}

async fn drop_when_gone(mut net: Daemon) {
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

/// Reports whether this response came through Envoy.
fn through_envoy(answer: &str) -> bool {
    answer.contains("x-forwarded-proto")
}

/// A persistent connection for several requests.
struct PersistentConnection(TcpStream);

impl PersistentConnection {
    fn open(from: &Host, to: SocketAddr) -> PersistentConnection {
        let stream = from.within_as(APP, || TcpStream::connect(to)).unwrap().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        PersistentConnection(stream)
    }

    fn get(&mut self) -> std::io::Result<String> {
        self.0.write_all(b"GET / HTTP/1.1\r\nHost: kept\r\n\r\n")?;
        let mut text = String::new();
        let mut byte = [0];
        while !text.ends_with("}\n") && !text.ends_with('}') {
            self.0.read_exact(&mut byte)?;
            text.push(char::from(byte[0]));
        }
        Ok(text)
    }
}

/// Adds a container like Docker's, behind a bridge of this host: its own network, masqueraded, with a
/// published port.
fn container(site: &Site, vm: &Vm, published: u16) -> (Host, HttpApp) {
    let container = site.outsider().unwrap();
    let host = &vm.host;
    for arguments in [
        &["link", "add", "docker0", "type", "bridge"][..],
        &["addr", "add", "172.30.0.1/24", "dev", "docker0"],
        &["link", "set", "docker0", "up"],
        &["link", "add", "vc", "type", "veth", "peer", "name", "eth1", "netns", container.name()],
        &["link", "set", "vc", "master", "docker0", "up"],
    ] {
        host.ip(arguments).unwrap();
    }
    for arguments in [
        &["link", "set", "eth0", "down"][..],
        &["addr", "add", "172.30.0.2/24", "dev", "eth1"],
        &["link", "set", "eth1", "up"],
        &["route", "replace", "default", "via", "172.30.0.1"],
    ] {
        container.ip(arguments).unwrap();
    }
    host.run("sh", &["-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]).unwrap();
    let rules = format!(
        "*nat\n:DOCKER - [0:0]\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
         -A POSTROUTING -s 172.30.0.0/24 ! -o docker0 -j MASQUERADE\n\
         -A DOCKER ! -i docker0 -p tcp --dport {published} -j DNAT --to-destination 172.30.0.2:80\nCOMMIT\n"
    );
    let path = host.tools(vmesh_testkit::netns::Iptables::Nft).unwrap().iptables_restore;
    let script = format!("printf %s \"$1\" | {}", path.display());
    host.run("sh", &["-c", &script, "sh", &rules]).unwrap();
    let app = container.within(|| HttpApp::start("contained", "v1", SocketAddr::from(([172, 30, 0, 2], 80))));
    (container, app.unwrap().unwrap())
}

async fn everything_that_arrives(rules: Rules, how: &str) {
    let site = Site::start(&[]).await.unwrap();
    let (caller, balancer) = (site.outsider().unwrap(), site.outsider().unwrap());
    let capture = format!(
        "workloads: [{{service: web, port: 8080, protocol: http}}, {{service: api, port: 8081, protocol: http}}]\n\
         capture: {{inbound: {{capture: {how}, strict: [9090], exclude: {{cidrs: [\"{}/32\"]}}}}}}",
        balancer.v4
    );
    let mut vm = site.vm("server", rules, &capture).await.unwrap();
    let apps = ["web 8080", "api 8081", "hidden 9090"].map(|app| {
        let (name, port) = app.split_once(' ').unwrap();
        let v6 = format!("[::]:{port}");
        vm.app(name, &v6).unwrap()
    });
    let (container, contained) = container(&site, &vm, 8088);
    let before = vm.ruleset().unwrap();
    let own = vm.host.v4;
    let to = move |port| SocketAddr::from((own, port));
    let mut old = PersistentConnection::open(&caller, to(8080));
    assert!(!through_envoy(&old.get().unwrap()));
    for (service, port) in [("web", 8080), ("api", 8081)] {
        let text = format!("service: {service}\nprotocol: http\nendpoints: [\"{}\"]\n", to(port));
        site.write(&format!("services.d/{service}.yaml"), &text).unwrap();
    }
    vm.start().await.unwrap();

    let from = |host: &Host, to: String| host.within_as(APP, || get(&to, "/")).unwrap();
    for address in vm.host.addresses() {
        for port in [8080, 8081] {
            let answer = from(&caller, SocketAddr::new(address, port).to_string()).unwrap();
            assert!(through_envoy(&answer), "{address}:{port}: {answer}");
            let name = if port == 8080 { "web" } else { "api" };
            assert!(answer.contains(&format!("\"{name}\"")), "each workload has its own: {answer}");
        }
    }
    assert!(
        !through_envoy(&from(&balancer, to(8080).to_string()).unwrap()),
        "a health check comes past Envoy"
    );
    assert!(!through_envoy(&vm.get("127.0.0.1:8080", "/").unwrap()), "localhost is nobody else's business");
    assert!(!through_envoy(&vm.get(&to(8080).to_string(), "/").unwrap()), "nor is a host's call to itself");
    assert!(!through_envoy(&old.get().unwrap()), "what was open is left alone");
    assert!(from(&caller, to(9090).to_string()).is_err(), "a strict port is closed to the outside");
    assert!(from(&balancer, to(9090).to_string()).is_ok(), "but for who is excluded");
    assert!(vm.get("127.0.0.1:9090", "/").is_ok(), "and open to the host itself");
    // The connections that containers open, and the ports that they publish.
    let answer = from(&container, to(8080).to_string()).unwrap();
    assert!(answer.contains("\"web\""), "a container calls its host: {answer}");
    let published = from(&caller, to(8088).to_string()).unwrap();
    assert!(published.contains("contained") && !through_envoy(&published), "{published}");

    drop_when_gone_by_term(&mut vm).await;
    assert_eq!(vm.ruleset().unwrap(), before, "the rules of others are as they were");
    assert!(!through_envoy(&from(&caller, to(8080).to_string()).unwrap()));
    assert!(!through_envoy(&old.get().unwrap()));
    drop((apps, contained));
}

async fn drop_when_gone_by_term(vm: &mut Vm) {
    let net = vm.net.take().unwrap();
    net.signal(Signal::TERM).unwrap();
    drop_when_gone(net).await;
}

#[tokio::test]
async fn what_arrives_at_a_host_comes_through_envoy_or_past_it_as_it_should_by_nft_redirect() {
    everything_that_arrives(Rules::Nft, "redirect").await;
}

#[tokio::test]
async fn what_arrives_at_a_host_comes_through_envoy_or_past_it_as_it_should_by_nft_tproxy() {
    everything_that_arrives(Rules::Nft, "tproxy").await;
}

#[tokio::test]
async fn what_arrives_at_a_host_comes_through_envoy_or_past_it_as_it_should_by_iptables() {
    everything_that_arrives(Rules::Iptables, "redirect").await;
}

/// Twenty requests a second go to a real address during the whole test.
#[tokio::test]
async fn the_agent_and_vmesh_net_come_and_go_without_a_failed_request_and_envoy_with_few() {
    let capture = "capture: {outbound: {capture: addresses}, dead_man: {timeout: 5s}}";
    let (site, mut vm, _server, app) = pair(Rules::Nft, capture).await;
    vm.start().await.unwrap();
    let to = app.address().to_string();
    let traffic = Traffic::start(&vm.host, &to);
    // The agent hangs, so redirects that may fail open lapse.
    vm.agent.as_ref().unwrap().freeze().unwrap();
    let look = async || match vm.get(&to, "/") {
        Ok(answer) if !through_envoy(&answer) => Ok(()),
        other => Err(format!("{other:?}")),
    };
    wait_for("the redirects to lapse", BOUND, look).await.unwrap();
    vm.agent.as_ref().unwrap().thaw().unwrap();
    vm.captures().await.unwrap();

    // The agent is killed. Its child process Envoy keeps running.
    vm.agent.take().unwrap().kill().unwrap();
    vm.start_agent().unwrap();
    vm.captures().await.unwrap();

    vm.net.take().unwrap().kill().unwrap();
    vm.start_net().unwrap();
    vm.captures().await.unwrap();
    assert!(through_envoy(&vm.get(&to, "/").unwrap()));

    let so_far = traffic.so_far();
    assert_eq!(so_far.failed.len(), 0, "{so_far:?}");

    let pid = vm.status().unwrap().pointer("/envoy/pid").unwrap().as_i64().unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, Signal::KILL).unwrap();
    vm.captures().await.unwrap();
    let seen = traffic.stop();
    // Failures are allowed for the requests in Envoy, and for 2 s of twenty requests a second.
    assert!(seen.failed.len() <= 45, "{seen:?}");
    drop(site);
}

/// The agent loses its state while no control plane can replace it.
#[tokio::test]
async fn an_agent_that_has_lost_its_state_takes_nothing_away_that_is_captured() {
    let (mut site, mut vm, _server, _app) = pair(Rules::Nft, "capture: {outbound: transparent}").await;
    vm.start().await.unwrap();
    let name = vm.names("web").unwrap().into_iter().find(std::net::IpAddr::is_ipv4).unwrap();
    let to = SocketAddr::new(name, 80).to_string();
    let traffic = Traffic::start(&vm.host, &to);
    site.kill_control();
    vm.agent.take().unwrap().kill().unwrap();
    std::fs::remove_file(vm.config_file().with_file_name("state").join("accepted.bin")).unwrap();
    vm.start_agent().unwrap();
    let spoken = async || {
        let status = vm.status()?;
        let silent = status.pointer("/capture/net/agent_silent_for").and_then(serde_json::Value::as_u64);
        silent.filter(|seconds| *seconds < 2).ok_or_else(|| vmesh_testkit::Failed::new(status.to_string()))
    };
    wait_for("the agent to speak again", BOUND, spoken).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let seen = traffic.so_far();
    assert!(seen.requests > 20 && seen.failed.is_empty(), "{seen:?}");
    // With a control plane, the agent continues.
    site.start_control().await.unwrap();
    wait_for("the names", BOUND, async || {
        (vm.names("web").is_ok_and(|names| names.len() == 2)).then_some(())
    })
    .await
    .unwrap();
    let seen = traffic.stop();
    assert!(seen.failed.is_empty(), "{seen:?}");
}
