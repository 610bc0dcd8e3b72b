//! One xDS stream with an arbitrary client, while the snapshot changes and time passes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message;
use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use vmesh_proto::google::rpc::Status;
use vmesh_xds::{Group, Kind, Protocol, Request, Resource, Scope, Session, Snapshot, Store};

pub(crate) fn run_delta(bytes: &[u8]) {
    Stream::new(Protocol::Delta).play(bytes);
}

pub(crate) fn run_sotw(bytes: &[u8]) {
    Stream::new(Protocol::Sotw).play(bytes);
}

const NAMES: [&str; 4] = ["orders", "payments", "cluster", "*"];

/// The limit of responses to one request or one change without an answer of the client: one per kind, and
/// some are split. More would be a loop.
const RESPONSES_TO_ONE_STEP: usize = 64;

/// The limit of responses to a client that rejects everything. The session may bisect a rejected response of
/// several resources, for which it may use 64 responses of each kind.
const RESPONSES_TO_REFUSALS: usize = 64 * 6 + RESPONSES_TO_ONE_STEP;

struct Stream {
    protocol: Protocol,
    session: Session,
    store: Store,
    now: Instant,
    is_introduced: bool,
    /// The last nonce of each kind.
    nonces: BTreeMap<Kind, String>,
    /// The subscribed names. In SotW each request repeats all of them.
    names: BTreeMap<Kind, Vec<String>>,
}

impl Stream {
    fn new(protocol: Protocol) -> Stream {
        let session = match protocol {
            Protocol::Delta => Session::delta("vmesh fuzz"),
            Protocol::Sotw => Session::sotw("vmesh fuzz"),
        };
        Stream {
            protocol,
            session,
            store: Store::default(),
            now: Instant::now(),
            is_introduced: false,
            nonces: BTreeMap::new(),
            names: BTreeMap::new(),
        }
    }

    /// Interprets the input: each step is a byte that selects an action, and at least one byte of arguments.
    /// At the end the client rejects everything.
    fn play(&mut self, mut bytes: &[u8]) {
        self.publish();
        while let [step, argument, rest @ ..] = bytes {
            bytes = rest;
            let kind =
                Kind::ALL.get(usize::from(argument & 7) % Kind::ALL.len()).copied().unwrap_or(Kind::Cluster);
            let name = NAMES.get(usize::from(argument >> 3 & 3)).copied().unwrap_or_default();
            let alive = match step % 6 {
                0 => {
                    let (request, rest) = bytes.split_at(usize::from(*argument).min(bytes.len()));
                    bytes = rest;
                    self.decode_and_send(request)
                }
                1 => self.subscribe(kind, name),
                2 => self.answer(kind, None),
                3 => self.answer(kind, Some(&format!("{name}: {argument}"))),
                4 => {
                    self.change(kind, name, argument >> 5);
                    true
                }
                _ => {
                    self.wait();
                    true
                }
            };
            // The session ended the stream with an error and is not used any more.
            if !alive {
                return;
            }
            let kinds = self.receive();
            assert!(kinds.len() <= RESPONSES_TO_ONE_STEP, "{} responses to one step", kinds.len());
        }
        self.refuse_everything();
    }

    fn send(&mut self, mut request: Request) -> bool {
        if !std::mem::replace(&mut self.is_introduced, true) {
            let node = Some(Node { id: "web-1".into(), ..Node::default() });
            match &mut request {
                Request::Delta(request) => request.node = node,
                Request::Sotw(request) => request.node = node,
            }
        }
        self.session.on_request(self.now, request).is_ok()
    }

    fn decode_and_send(&mut self, bytes: &[u8]) -> bool {
        match self.protocol {
            Protocol::Delta => {
                DeltaDiscoveryRequest::decode(bytes).is_ok_and(|request| self.send(request.into()))
            }
            Protocol::Sotw => DiscoveryRequest::decode(bytes).is_ok_and(|request| self.send(request.into())),
        }
    }

    fn subscribe(&mut self, kind: Kind, name: &str) -> bool {
        let names = self.names.entry(kind).or_default();
        let known = names.iter().position(|known| known == name);
        match known {
            Some(index) => _ = names.remove(index),
            None => names.push(name.to_owned()),
        }
        match self.protocol {
            Protocol::Delta => {
                let (subscribe, unsubscribe) = match known {
                    None => (vec![name.to_owned()], Vec::new()),
                    Some(_) => (Vec::new(), vec![name.to_owned()]),
                };
                self.send(Request::Delta(DeltaDiscoveryRequest {
                    type_url: kind.type_url().to_owned(),
                    resource_names_subscribe: subscribe,
                    resource_names_unsubscribe: unsubscribe,
                    ..DeltaDiscoveryRequest::default()
                }))
            }
            Protocol::Sotw => self.answer(kind, None),
        }
    }

    /// ACKs the last response of `kind`, or rejects it with `reason`.
    fn answer(&mut self, kind: Kind, reason: Option<&str>) -> bool {
        let (type_url, response_nonce) =
            (kind.type_url().to_owned(), self.nonces.get(&kind).cloned().unwrap_or_default());
        let error_detail =
            reason.map(|reason| Status { code: 13, message: reason.to_owned(), ..Status::default() });
        self.send(match self.protocol {
            Protocol::Delta => Request::Delta(DeltaDiscoveryRequest {
                type_url,
                response_nonce,
                error_detail,
                ..DeltaDiscoveryRequest::default()
            }),
            Protocol::Sotw => Request::Sotw(DiscoveryRequest {
                type_url,
                response_nonce,
                error_detail,
                resource_names: self.names.get(&kind).cloned().unwrap_or_default(),
                ..DiscoveryRequest::default()
            }),
        })
    }

    /// Changes a resource; `content` 0 removes it.
    fn change(&mut self, kind: Kind, name: &str, content: u8) {
        let resource = Resource::from_bytes(kind, name, &[content]);
        let group = (content > 0).then(|| Group::new(format!("{kind} {name}"), [resource]));
        self.store = self.store.apply([(Arc::from(format!("{kind} {name}")), group)]);
        self.publish();
    }

    fn publish(&mut self) {
        let snapshot = Snapshot { store: Arc::new(self.store.clone()), scope: Arc::new(Scope::all()) };
        self.session.on_snapshot(self.now, snapshot);
    }

    /// Advances the clock to the session's next timer, or by a second.
    fn wait(&mut self) {
        let timeout = self.session.poll_timeout().filter(|timeout| *timeout > self.now);
        self.now = timeout.unwrap_or(self.now + Duration::from_secs(1));
    }

    /// Takes the pending responses of the session, and returns their kinds.
    fn receive(&mut self) -> Vec<Kind> {
        let mut kinds = Vec::new();
        while let Some(response) = self.session.poll_response(self.now) {
            self.nonces.insert(response.kind, response.nonce.to_string());
            kinds.push(response.kind);
            if kinds.len() > RESPONSES_TO_ONE_STEP {
                break;
            }
        }
        kinds
    }

    /// Rejects every response. The session must eventually stop sending.
    fn refuse_everything(&mut self) {
        let mut responses = 0;
        let mut unanswered: Vec<Kind> = self.nonces.keys().copied().collect();
        while !unanswered.is_empty() {
            for kind in unanswered {
                if !self.answer(kind, Some("no")) {
                    return;
                }
            }
            unanswered = self.receive();
            responses += unanswered.len();
            assert!(responses <= RESPONSES_TO_REFUSALS, "{unanswered:?} is sent and refused again and again");
        }
    }
}
