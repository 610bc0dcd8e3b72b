//! One test per rule, with a scripted client and a clock that only the test advances.

mod delta;
mod model;
mod order;
mod refusal;
mod sotw;

use super::error_text::blames;
use super::*;
use crate::{Group, Resource, Scope, Store};
use bytes::Bytes;
use prost::Message;
use std::collections::BTreeMap;
use std::time::Duration;
use vmesh_proto::agent;
use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_proto::envoy::config::endpoint::v3::ClusterLoadAssignment;
use vmesh_proto::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use vmesh_proto::google::rpc;

/// A client at the end of a stream, together with the session and the store of its server.
///
/// A resource is written `cluster orders=1`, where `1` stands for its content; a response is written `cluster
/// orders=1 payments=1 -users`.
struct Envoy {
    session: Session,
    now: Instant,
    store: Store,
    scope: Scope,
    introduced: bool,
    /// The nonce of the last response of each kind.
    nonces: BTreeMap<Kind, String>,
    versions: BTreeMap<Kind, String>,
    system_version: String,
}

impl Envoy {
    /// Makes a delta client of a server that has these resources, before its first request.
    fn connected_to(world: &str) -> Envoy {
        Envoy::new(Session::delta("vmesh test"), world)
    }

    fn sotw_connected_to(world: &str) -> Envoy {
        Envoy::new(Session::sotw("vmesh test"), world)
    }

    fn new(session: Session, world: &str) -> Envoy {
        let mut envoy = Envoy {
            session,
            now: Instant::now(),
            store: Store::default(),
            scope: Scope::all(),
            introduced: false,
            nonces: BTreeMap::new(),
            versions: BTreeMap::new(),
            system_version: String::new(),
        };
        envoy.server_has(world);
        envoy
    }

    /// Breaks the stream and opens another one.
    fn reconnect(&mut self) {
        self.session = match self.session.protocol {
            Protocol::Delta => Session::delta("vmesh test"),
            Protocol::Sotw => Session::sotw("vmesh test"),
        };
        self.introduced = false;
        self.nonces.clear();
        self.show();
    }

    /// Replaces all resources of the server.
    fn server_has(&mut self, world: &str) {
        let groups = groups(world);
        let gone = self.store.groups().filter(|group| !groups.contains_key(group.key()));
        let gone: Vec<_> = gone.map(|group| (group.key().clone(), None)).collect();
        let there = groups.into_iter().map(|(key, group)| (key, Some(group)));
        self.store = self.store.apply(gone.into_iter().chain(there));
        self.show();
    }

    fn server_lets_see(&mut self, scope: Scope) {
        self.scope = scope;
        self.show();
    }

    fn show(&mut self) {
        let snapshot = Snapshot { store: Arc::new(self.store.clone()), scope: Arc::new(self.scope.clone()) };
        self.session.on_snapshot(self.now, snapshot);
    }

    fn passes(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
    }

    fn try_send(&mut self, request: impl Into<Request>) -> Result<(), SessionError> {
        let mut request = request.into();
        if !std::mem::replace(&mut self.introduced, true) {
            let node = Some(Node { id: "web-1".into(), ..Node::default() });
            match &mut request {
                Request::Delta(request) => request.node = node,
                Request::Sotw(request) => request.node = node,
            }
        }
        self.session.on_request(self.now, request)
    }

    fn send(&mut self, request: impl Into<Request>) {
        self.try_send(request).unwrap();
    }

    /// Delta: subscribes to names, and unsubscribes from names with a leading `-`. The first request of a kind
    /// without names subscribes to all resources.
    fn subscribe(&mut self, kind: Kind, names: &[&str]) {
        self.send(delta(kind, names));
    }

    /// Delta: sends the first request of a kind on a stream that follows an earlier one.
    fn resume(&mut self, kind: Kind, names: &[&str], versions: &[(&str, String)]) {
        let held = versions.iter().map(|(name, version)| (name.to_string(), version.clone())).collect();
        self.send(DeltaDiscoveryRequest { initial_resource_versions: held, ..delta(kind, names) });
    }

    /// SotW: sends the complete list of names, with the last nonce and version.
    fn names(&mut self, kind: Kind, names: &[&str]) {
        self.send(self.sotw(kind, names));
    }

    fn sotw(&self, kind: Kind, names: &[&str]) -> DiscoveryRequest {
        DiscoveryRequest {
            type_url: kind.type_url().into(),
            resource_names: names.iter().map(|name| name.to_string()).collect(),
            response_nonce: self.nonces.get(&kind).cloned().unwrap_or_default(),
            version_info: self.versions.get(&kind).cloned().unwrap_or_default(),
            ..DiscoveryRequest::default()
        }
    }

    fn ack(&mut self, kind: Kind) {
        let response_nonce = self.nonces[&kind].clone();
        self.send(DeltaDiscoveryRequest { response_nonce, ..delta(kind, &["-never"]) });
    }

    fn nack(&mut self, kind: Kind, message: &str) {
        let response_nonce = self.nonces[&kind].clone();
        self.send(DeltaDiscoveryRequest {
            response_nonce,
            error_detail: error(message),
            ..delta(kind, &["-never"])
        });
    }

    fn sotw_nack(&mut self, kind: Kind, names: &[&str], message: &str) {
        self.send(DiscoveryRequest { error_detail: error(message), ..self.sotw(kind, names) });
    }

    fn receive(&mut self) -> Option<String> {
        let response = self.session.poll_response(self.now)?;
        Some(self.read(response))
    }

    fn read(&mut self, response: Response) -> String {
        let (kind, nonce) = (response.kind, response.nonce.to_string());
        let resources = response.resources;
        let message = unframed(response);
        let (items, removed): (Vec<(String, Bytes)>, Vec<String>) = match self.session.protocol {
            Protocol::Delta => {
                let message = DeltaDiscoveryResponse::decode(message).unwrap();
                assert_eq!(message.type_url, kind.type_url());
                assert_eq!(message.nonce, nonce);
                assert_eq!(message.control_plane.unwrap().identifier, "vmesh test", "R64");
                self.system_version = message.system_version_info;
                let items = message.resources.into_iter().map(|resource| {
                    let any = resource.resource.unwrap();
                    assert_eq!(any.type_url, kind.type_url(), "R42");
                    assert!(!resource.version.is_empty(), "R40");
                    (resource.name, any.value)
                });
                (items.collect(), message.removed_resources)
            }
            Protocol::Sotw => {
                let message = DiscoveryResponse::decode(message).unwrap();
                assert_eq!(message.type_url, kind.type_url());
                assert_eq!(message.nonce, nonce);
                assert_eq!(message.control_plane.unwrap().identifier, "vmesh test", "R64");
                assert!(!message.version_info.is_empty());
                self.versions.insert(kind, message.version_info);
                let items = message.resources.into_iter().map(|any| {
                    assert_eq!(any.type_url, kind.type_url(), "R42");
                    (name_of(kind, &any.value), any.value)
                });
                (items.collect(), Vec::new())
            }
        };
        assert_eq!(items.len(), resources);
        self.nonces.insert(kind, nonce);
        let mut words = vec![kind.to_string()];
        words.extend(items.iter().map(|(name, value)| format!("{name}={}", content(value))));
        words.extend(removed.iter().map(|name| format!("-{name}")));
        words.join(" ")
    }

    #[track_caller]
    fn expect(&mut self, response: &str) {
        assert_eq!(self.receive().as_deref(), Some(response));
    }

    #[track_caller]
    fn expect_silence(&mut self) {
        assert_eq!(self.receive(), None);
    }

    /// Asserts that the session sends no response for this many seconds, also at its timeouts.
    #[track_caller]
    fn expect_silence_for(&mut self, seconds: u64) {
        let end = self.now + Duration::from_secs(seconds);
        self.expect_silence();
        while let Some(timeout) = self.session.poll_timeout().filter(|timeout| *timeout <= end) {
            assert!(timeout > self.now, "a timer that fires at once");
            self.now = timeout;
            self.expect_silence();
        }
        self.now = end;
        self.expect_silence();
    }

    #[track_caller]
    fn expect_acked(&mut self, response: &str) {
        self.expect(response);
        let kind = kind_of(response.split(' ').next().unwrap());
        match self.session.protocol {
            Protocol::Delta => self.ack(kind),
            Protocol::Sotw => {
                let named = self.session.subscriptions[kind].entries.iter().filter(|(_, entry)| entry.named);
                let mut names: Vec<String> = named.map(|(name, _)| name.to_string()).collect();
                if self.session.subscriptions[kind].wildcard && self.session.subscriptions[kind].ever_named {
                    names.push("*".into());
                }
                self.names(kind, &names.iter().map(String::as_str).collect::<Vec<_>>());
            }
        }
    }

    fn state(&self) -> &State {
        &self.session.status().state
    }

    fn version(&self, kind: Kind, name: &str) -> String {
        self.store.get(kind, name).unwrap().version().into()
    }
}

fn delta(kind: Kind, names: &[&str]) -> DeltaDiscoveryRequest {
    let (minus, plus): (Vec<&str>, Vec<&str>) = names.iter().partition(|name| name.starts_with('-'));
    DeltaDiscoveryRequest {
        type_url: kind.type_url().into(),
        resource_names_subscribe: plus.iter().map(|name| name.to_string()).collect(),
        resource_names_unsubscribe: minus.iter().map(|name| name[1..].to_string()).collect(),
        ..DeltaDiscoveryRequest::default()
    }
}

fn error(message: &str) -> Option<rpc::Status> {
    Some(rpc::Status { code: 13, message: message.into(), ..rpc::Status::default() })
}

/// Parses `cluster a=1 b=1 endpoints a=1`. Resources with the same name form one group.
fn groups(world: &str) -> BTreeMap<Arc<str>, Arc<Group>> {
    let mut kind = Kind::Cluster;
    let mut resources: BTreeMap<Arc<str>, Vec<Arc<Resource>>> = BTreeMap::new();
    for word in world.split_whitespace() {
        match word.split_once('=') {
            None => kind = kind_of(word),
            Some((name, content)) => {
                resources.entry(name.into()).or_default().push(resource(kind, name, content))
            }
        }
    }
    resources.into_iter().map(|(key, resources)| (key.clone(), Group::new(key, resources))).collect()
}

/// Makes a resource whose content is text that begins with the name, since every message of Envoy contains its
/// name.
fn resource(kind: Kind, name: &str, content: &str) -> Arc<Resource> {
    Resource::from_bytes(kind, name, format!("{name}={content}").as_bytes())
}

fn name_of(kind: Kind, value: &Bytes) -> String {
    match std::str::from_utf8(value).ok().and_then(|text| text.split_once('=')) {
        Some((name, _)) => name.into(),
        None if kind == Kind::Endpoint => ClusterLoadAssignment::decode(value.clone()).unwrap().cluster_name,
        None => panic!("{value:?}"),
    }
}

fn content(value: &Bytes) -> String {
    match std::str::from_utf8(value).ok().and_then(|text| text.split_once('=')) {
        Some((_, content)) if content.len() > 20 => "long".into(),
        Some((_, content)) => content.into(),
        None => {
            assert!(ClusterLoadAssignment::decode(value.clone()).unwrap().endpoints.is_empty());
            "empty".into()
        }
    }
}

fn kind_of(word: &str) -> Kind {
    Kind::ALL.into_iter().find(|kind| kind.to_string() == word).unwrap()
}

/// Removes gRPC's framing from a response.
fn unframed(response: Response) -> Bytes {
    let len = response.len();
    let framed = response.into_frames().concat();
    assert_eq!(framed.len(), len);
    assert_eq!(framed[0], 0);
    assert_eq!(u32::from_be_bytes(framed[1..5].try_into().unwrap()) as usize, len - 5);
    Bytes::from(framed).slice(5..)
}
