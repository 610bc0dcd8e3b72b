//! What a stream costs: `cargo run --profile fast -p vmesh-xds --all-features --example streams -- 10000`.
//!
//! One process serves, another holds the clients, each of which sees 20 of 1,000 services. Printed are the server's
//! memory per stream, and the time from a publication to the last ACK.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a measurement that cannot be made ends")]

use prost::Message;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use vmesh_proto::envoy::config::cluster::v3::Cluster;
use vmesh_proto::envoy::config::core::v3::{Address, Node, SocketAddress, address};
use vmesh_proto::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint,
};
use vmesh_xds::client::BenchClient;
use vmesh_xds::server::{Admission, Admitted, AdsService, Hub, Observer, PeerInfo, Refusal, serve};
use vmesh_xds::{Group, Kind, Resource, Scope, SessionStatus, State, Store};

const SERVICES: usize = 1000;
const SEEN: usize = 20;

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let clients: usize = arguments.next().and_then(|count| count.parse().ok()).unwrap_or(1000);
    match arguments.next() {
        None => server(clients).await,
        Some(address) => connect(clients, address).await,
    }
}

async fn server(clients: usize) {
    let hub = Hub::new();
    let mut store = Store::default().apply((0..SERVICES).map(|i| service(i, 0)));
    hub.publish("class", Arc::new(store.clone()));
    let progress = Arc::new(Progress::default());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let admission = All { hub: hub.clone(), progress: progress.clone() };
    let service_ = AdsService::new(hub.clone(), admission, "vmesh measurement");
    let mut tasks = JoinSet::new();
    tasks.spawn(serve(listener, service_, std::future::pending()));

    let before = resident();
    let started = Instant::now();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([clients.to_string(), address])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    progress.wait(clients).await;
    println!("{clients} clients connected and in sync after {:.2} s", started.elapsed().as_secs_f64());
    tokio::time::sleep(Duration::from_secs(2)).await;
    println!("{} KiB a stream", (resident() - before) / clients);

    for round in 1..=5 {
        progress.synced.store(0, Ordering::SeqCst);
        progress.goal.store(store.generation() as usize + 1, Ordering::SeqCst);
        let (encodings, cpu) = (vmesh_xds::encodings(), cpu_ms());
        let started = Instant::now();
        store = store.apply([service(0, round)]);
        hub.publish("class", Arc::new(store.clone()));
        let published = started.elapsed();
        progress.wait(clients).await;
        println!(
            "a change was published in {:.1} ms and ACKed by all after {:.1} ms; {} ms of CPU here, {} encoding(s)",
            published.as_secs_f64() * 1e3,
            started.elapsed().as_secs_f64() * 1e3,
            cpu_ms() - cpu,
            vmesh_xds::encodings() - encodings - 1,
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    println!("{} KiB a stream", (resident() - before) / clients);
    child.kill().unwrap();
    _ = child.wait();
}

async fn connect(clients: usize, address: String) {
    let gate = Arc::new(Semaphore::new(64));
    let mut tasks = JoinSet::new();
    for i in 0..clients {
        let (uri, gate) = (format!("http://{address}"), gate.clone());
        tasks.spawn(async move {
            let node = Node { id: format!("web-{i}"), ..Node::default() };
            let permit = gate.acquire().await.unwrap();
            let mut client = BenchClient::connect(&uri, node).await.unwrap();
            client.next().await.unwrap();
            drop(permit);
            while client.next().await.is_ok() {}
        });
    }
    while tasks.join_next().await.is_some() {}
}

/// Cluster and endpoints: of one endpoint the weight is `version`.
fn service(i: usize, version: usize) -> (Arc<str>, Option<Arc<Group>>) {
    let name: Arc<str> = format!("service-{i}").into();
    let cluster = Cluster { name: name.to_string(), alt_stat_name: "x".repeat(200), ..Cluster::default() };
    let endpoint = |port: usize| LbEndpoint {
        host_identifier: Some(lb_endpoint::HostIdentifier::Endpoint(Endpoint {
            address: Some(Address {
                address: Some(address::Address::SocketAddress(SocketAddress {
                    address: "10.0.0.1".to_owned(),
                    port_specifier: u32::try_from(port)
                        .ok()
                        .map(vmesh_proto::envoy::config::core::v3::socket_address::PortSpecifier::PortValue),
                    ..SocketAddress::default()
                })),
            }),
            ..Endpoint::default()
        })),
        ..LbEndpoint::default()
    };
    let assignment = ClusterLoadAssignment {
        cluster_name: name.to_string(),
        endpoints: vec![LocalityLbEndpoints {
            lb_endpoints: (8000 + version..8010 + version).map(endpoint).collect(),
            ..LocalityLbEndpoints::default()
        }],
        ..ClusterLoadAssignment::default()
    };
    assert!(assignment.encoded_len() > 100);
    let cluster = Resource::new(Kind::Cluster, name.clone(), &cluster);
    (
        name.clone(),
        Some(Group::new(name.clone(), [cluster, Resource::new(Kind::Endpoint, name, &assignment)])),
    )
}

#[derive(Default)]
struct Progress {
    goal: AtomicUsize,
    synced: AtomicUsize,
    moved: Notify,
}

impl Progress {
    async fn wait(&self, clients: usize) {
        while self.synced.load(Ordering::SeqCst) < clients {
            self.moved.notified().await;
        }
    }
}

struct All {
    hub: Hub,
    progress: Arc<Progress>,
}

impl Admission for All {
    fn admit(&self, node: &Node, _: &PeerInfo) -> Result<Admitted, Refusal> {
        let number: usize =
            node.id.trim_start_matches("web-").parse().map_err(|_| Refusal::Invalid(node.id.clone()))?;
        // All see the first service.
        let seen =
            (0..SEEN).map(|i| format!("service-{}", if i == 0 { 0 } else { (number * 7 + i) % SERVICES }));
        let feed = self.hub.subscribe("class", Arc::new(Scope::named(seen)));
        Ok(Admitted { feed, observer: Box::new(Watch { progress: self.progress.clone(), reached: 0 }) })
    }
}

struct Watch {
    progress: Arc<Progress>,
    reached: usize,
}

impl Observer for Watch {
    fn on_status(&mut self, status: &SessionStatus) {
        let goal = self.progress.goal.load(Ordering::SeqCst).max(1);
        let listening = status.kinds[Kind::Listener].acks > 0;
        if listening
            && status.state == State::Synced
            && status.generation_acked >= goal as u64
            && self.reached < goal
        {
            self.reached = goal;
            self.progress.synced.fetch_add(1, Ordering::SeqCst);
            self.progress.moved.notify_one();
        }
    }
}

fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).expect("a number").parse().unwrap()
}

/// Of user and system time, as ticks of 10 ms.
fn cpu_ms() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
    (ticks(11) + ticks(12)) * 10
}
