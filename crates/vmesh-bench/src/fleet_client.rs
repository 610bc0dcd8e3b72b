//! The clients of a fleet, with common counters.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use vmesh_proto::envoy::config::core::v3::{Locality, Node};
use vmesh_proto::google::protobuf::{ListValue, Struct, Value, value};
use vmesh_testkit::{Failed, Result};
use vmesh_xds::Kind;
use vmesh_xds::client::{AdsStream, BenchClient, Versions};

use crate::identities::{FleetIdentities, node_name};

/// The limit of concurrent handshakes. More would only wait in the listener's queue.
const CONNECTING: usize = 64;

pub struct Fleet {
    clients: JoinSet<String>,
    nodes: usize,
    shared: Arc<FleetShared>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Connected,
    Away,
}

#[derive(Default)]
struct FleetShared {
    phase: watch::Sender<Phase>,
    /// The responses with endpoints that were ACKed since the counter was reset.
    acked: AtomicUsize,
    /// The assignments received since the start.
    received: AtomicUsize,
    /// When the last client sent its ACK.
    last_ack: Mutex<Option<SystemTime>>,
    moved: Notify,
}

impl Fleet {
    /// Connects `nodes` clients. Client number `n` declares what `declared(n)` returns.
    pub async fn connect(
        to: impl Into<Target>,
        nodes: usize,
        declared: impl Fn(usize) -> DeclaredNode,
    ) -> Result<Fleet> {
        let to = to.into();
        let shared = Arc::new(FleetShared::default());
        let connecting = Arc::new(Semaphore::new(CONNECTING));
        let mut clients = JoinSet::new();
        for number in 0..nodes {
            let node = node(number, &declared(number));
            let numbered = NumberedNode { to: to.clone(), number, node };
            clients.spawn(client(numbered, nodes, shared.clone(), connecting.clone()));
        }
        Ok(Fleet { clients, nodes, shared })
    }

    /// Waits until each client has received the endpoints of `services` services.
    pub async fn wait_until_received(&mut self, services: usize, bound: Duration) -> Result<()> {
        let wanted = services * self.nodes;
        let shared = self.shared.clone();
        self.wait_until("every client to have its endpoints", bound, || {
            let received = shared.received.load(Ordering::Acquire);
            if received >= wanted {
                Ok(())
            } else {
                Err(format!("{received} of {wanted} assignments are there"))
            }
        })
        .await
    }

    /// Closes the connections of all clients.
    pub fn disconnect_all(&self) {
        self.shared.phase.send_replace(Phase::Away);
    }

    /// Reconnects all clients, which report the versions that they have.
    pub fn reconnect_all(&self) {
        self.shared.phase.send_replace(Phase::Connected);
    }

    /// Resets the counter of ACKs for [`Fleet::wait_until_all_acked`].
    pub fn reset_acks(&self) {
        *self.shared.last_ack.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.shared.acked.store(0, Ordering::Release);
    }

    /// Waits until every client has ACKed one response. Returns when the last client sent its ACK.
    pub async fn wait_until_all_acked(&mut self, bound: Duration) -> Result<SystemTime> {
        let (shared, nodes) = (self.shared.clone(), self.nodes);
        let last = || *shared.last_ack.lock().unwrap_or_else(PoisonError::into_inner);
        // The time is checked rather than the count, because it is set a moment later.
        self.wait_until("every client to ACK", bound, || match last() {
            Some(_) => Ok(()),
            None => Err(format!("{} of {nodes} have", shared.acked.load(Ordering::Acquire))),
        })
        .await?;
        last().ok_or_else(|| Failed::new("no client ACKed"))
    }

    async fn wait_until(
        &mut self,
        what: &str,
        bound: Duration,
        reached: impl Fn() -> std::result::Result<(), String>,
    ) -> Result<()> {
        let shared = self.shared.clone();
        let waiting = async {
            loop {
                let moved = shared.moved.notified();
                match reached() {
                    Ok(()) => return Ok(()),
                    Err(_) => tokio::select! {
                        () = moved => {}
                        () = tokio::time::sleep(Duration::from_millis(100)) => {}
                        Some(ended) = self.clients.join_next() => {
                            let why = ended.unwrap_or_else(|panic| panic.to_string());
                            return Err(Failed::new(format!("a client ended: {why}")));
                        }
                    },
                }
            }
        };
        match timeout(bound, waiting).await {
            Ok(done) => done,
            Err(_) => {
                let so_far = reached().err().unwrap_or_default();
                Err(Failed::new(format!("waited {} s for {what}: {so_far}", bound.as_secs())))
            }
        }
    }
}

/// The server that the clients connect to.
#[derive(Clone)]
pub struct Target {
    pub address: SocketAddr,
    /// The certificates of the nodes. `None`: they connect in plaintext.
    pub identities: Option<Arc<FleetIdentities>>,
}

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Target {
        Target { address, identities: None }
    }
}

impl Target {
    async fn connect(&self, number: usize) -> std::io::Result<AdsStream> {
        match &self.identities {
            Some(identities) => identities.connect(number, self.address).await,
            None => AdsStream::connect(&format!("http://{}", self.address)).await,
        }
    }
}

/// The parts of a client that belong to its node.
struct NumberedNode {
    to: Target,
    number: usize,
    node: Node,
}

/// Runs one client until its stream ends unexpectedly. Returns the reason. The client keeps its versions
/// between two streams.
async fn client(
    NumberedNode { to, number, node }: NumberedNode,
    nodes: usize,
    shared: Arc<FleetShared>,
    connecting: Arc<Semaphore>,
) -> String {
    let mut phase = shared.phase.subscribe();
    let mut has = Versions::new();
    loop {
        let permit = connecting.acquire().await;
        let stream = to.connect(number).await;
        let connected = stream.map(|stream| BenchClient::over(stream, node.clone(), has));
        drop(permit);
        let mut client = match connected {
            Ok(client) => client,
            Err(error) => return format!("could not connect to {}: {error}", to.address),
        };
        loop {
            let response = tokio::select! {
                response = client.next() => response,
                _ = phase.wait_for(|phase| *phase == Phase::Away) => break,
            };
            let response = match response {
                Ok(response) => response,
                Err(failure) => return failure.to_string(),
            };
            if response.kind == Some(Kind::Endpoint) && !response.resources.is_empty() {
                shared.received.fetch_add(response.resources.len(), Ordering::AcqRel);
                if shared.acked.fetch_add(1, Ordering::AcqRel) + 1 == nodes {
                    *shared.last_ack.lock().unwrap_or_else(PoisonError::into_inner) = Some(SystemTime::now());
                }
                shared.moved.notify_one();
            }
        }
        has = client.into_versions();
        if phase.wait_for(|phase| *phase == Phase::Connected).await.is_err() {
            return "the bench is over".to_owned();
        }
    }
}

/// The report of a simulated node.
#[derive(Default)]
pub struct DeclaredNode {
    /// The declared services; empty means all services.
    pub upstreams: Vec<String>,
    pub zone: Option<&'static str>,
}

fn node(number: usize, declared: &DeclaredNode) -> Node {
    let text = |text: &str| Value { kind: Some(value::Kind::StringValue(text.to_owned())) };
    let mut metadata = BTreeMap::new();
    if !declared.upstreams.is_empty() {
        let values = declared.upstreams.iter().map(|service| text(service)).collect();
        let list = Value { kind: Some(value::Kind::ListValue(ListValue { values })) };
        let vmesh = Struct { fields: [("upstreams".to_owned(), list)].into() };
        metadata.insert("vmesh".to_owned(), Value { kind: Some(value::Kind::StructValue(vmesh)) });
    }
    Node {
        id: node_name(number),
        locality: declared.zone.map(|zone| Locality { zone: zone.to_owned(), ..Locality::default() }),
        user_agent_name: "bench".to_owned(),
        metadata: Some(Struct { fields: metadata }),
        ..Node::default()
    }
}
