//! One xDS stream: a client that says anything, while the world changes and time passes.

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

/// Responses to one request, or to one change, without any answer of the client: one for each kind and some that are
/// split. More is a loop.
const RESPONSES_TO_ONE_STEP: usize = 64;

/// Responses to a client that refuses whatever it is sent. The session may take a refusal of several resources apart,
/// for which it has 64 responses of each kind.
const RESPONSES_TO_REFUSALS: usize = 64 * 6 + RESPONSES_TO_ONE_STEP;

struct Stream {
    protocol: Protocol,
    session: Session,
    store: Store,
    now: Instant,
    is_introduced: bool,
    /// The last nonce of each kind.
    nonces: BTreeMap<Kind, String>,
    /// What the client asks for, for the protocol in which each request repeats all of it.
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

    /// Each step is a byte that chooses what happens, and a byte or more of arguments. Then the client refuses all.
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
            // A session that ends its stream says why, and is not used any more.
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

    /// Accepts the last response of `kind`, or refuses it for `reason`.
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

    /// Content 0 is that there is none.
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

    /// Time passes until the session's next timer, or for a second.
    fn wait(&mut self) {
        let timeout = self.session.poll_timeout().filter(|timeout| *timeout > self.now);
        self.now = timeout.unwrap_or(self.now + Duration::from_secs(1));
    }

    /// Takes what the session has to send now, and returns the kinds of the responses.
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

    /// Whatever a client refuses, and as often as it does: at some point there is nothing left to send.
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
