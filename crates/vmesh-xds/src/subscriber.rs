use crate::{Kind, PerKind, Resource};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use vmesh_proto::agent;
use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use vmesh_proto::google::rpc;

/// The protocol state of a client: one delta ADS stream, and the streams that replace it when it breaks. It
/// does no I/O.
///
/// Call [`on_connected`](Subscriber::on_connected) when a stream opens, then send what
/// [`poll_request`](Subscriber::poll_request) returns until it returns `None`, and again after each other call.
/// Pass each response to [`on_response`](Subscriber::on_response) and answer it with
/// [`accept`](Subscriber::accept), [`acknowledge`](Subscriber::acknowledge) or [`reject`](Subscriber::reject);
/// the owner may do so much later, when it knows whether the resources are good. Call
/// [`on_disconnected`](Subscriber::on_disconnected) when the stream ends.
///
/// Resources that the owner [holds](Subscriber::hold) are listed with their versions after a reconnect, and the
/// server does not send them again.
pub struct Subscriber {
    node: Node,
    /// The number of the stream, so that a late answer to an older stream is not sent on a newer one.
    stream: u64,
    connected: bool,
    introduced: bool,
    interests: PerKind<Interest>,
    answers: VecDeque<DeltaDiscoveryRequest>,
    /// The names whose held resource changed since the last [`Subscriber::take_changes`].
    changes: BTreeSet<(Kind, Arc<str>)>,
}

#[derive(Default)]
struct Interest {
    wildcard: bool,
    names: BTreeSet<Arc<str>>,
    /// Whether a request of this kind was sent on the current stream.
    asked: bool,
    /// Names to subscribe to with the next request of this stream, `*` included.
    subscribe: BTreeSet<Arc<str>>,
    unsubscribe: BTreeSet<Arc<str>>,
    /// The resources that the owner holds, tombstones included.
    held: BTreeMap<Arc<str>, Arc<Resource>>,
    /// Names of received resources that the owner does not hold in the received version.
    not_held: BTreeSet<Arc<str>>,
}

/// One response of the server.
#[derive(Debug)]
pub struct Update {
    pub ticket: Ticket,
    pub resources: Vec<Arc<Resource>>,
    pub removed: Vec<Arc<str>>,
}

/// The right to answer one response, once.
#[derive(Debug)]
pub struct Ticket {
    kind: Kind,
    nonce: String,
    stream: u64,
}

impl Ticket {
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

/// The type of a request that only names the node. No resource has this type: a server counts the request and
/// keeps the stream.
const NODE_TYPE_URL: &str = "type.googleapis.com/vmesh.NodeReport";
/// A first request may list this many names with their versions. Above this number the node is sent in a
/// request of its own.
const NODE_ALONE_ABOVE: usize = 1000;

impl Subscriber {
    fn held_names(&self) -> usize {
        self.interests.iter().map(|(_, interest)| interest.held.len() + interest.names.len()).sum()
    }

    pub fn new(node: Node) -> Subscriber {
        Subscriber {
            node,
            stream: 0,
            connected: false,
            introduced: false,
            interests: PerKind::default(),
            answers: VecDeque::new(),
            changes: BTreeSet::new(),
        }
    }

    /// Sets the node that is sent at the beginning of the next stream.
    pub fn set_node(&mut self, node: Node) {
        self.node = node;
    }

    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// Starts a new stream: all subscriptions are sent again.
    pub fn on_connected(&mut self) {
        self.on_disconnected();
        self.stream += 1;
        self.connected = true;
    }

    pub fn on_disconnected(&mut self) {
        self.connected = false;
        self.introduced = false;
        self.answers.clear();
        for (_, interest) in self.interests.iter_mut() {
            interest.asked = false;
            interest.subscribe.clear();
            interest.unsubscribe.clear();
        }
    }

    pub fn subscribe(&mut self, kind: Kind, name: impl Into<Arc<str>>) {
        let name = name.into();
        let interest = &mut self.interests[kind];
        if interest.names.insert(name.clone()) && interest.asked {
            interest.unsubscribe.remove(&name);
            interest.subscribe.insert(name);
        }
    }

    /// Unsubscribes from a name and forgets the resource that was held under it.
    pub fn unsubscribe(&mut self, kind: Kind, name: &str) {
        let interest = &mut self.interests[kind];
        let Some(name) = interest.names.take(name) else { return };
        if !interest.wildcard {
            interest.held.remove(&name);
            interest.not_held.remove(&name);
            self.changes.insert((kind, name.clone()));
        }
        if interest.asked && !interest.subscribe.remove(&name) {
            interest.unsubscribe.insert(name);
        }
    }

    pub fn subscribe_all(&mut self, kind: Kind) {
        let interest = &mut self.interests[kind];
        if kind.has_wildcard() && !std::mem::replace(&mut interest.wildcard, true) && interest.asked {
            interest.subscribe.insert("*".into());
        }
    }

    pub fn is_subscribed(&self, kind: Kind, name: &str) -> bool {
        self.interests[kind].names.contains(name)
    }

    pub fn is_subscribed_to_all(&self, kind: Kind) -> bool {
        self.interests[kind].wildcard
    }

    /// Iterates over the names with a subscription by name.
    pub fn subscriptions(&self, kind: Kind) -> impl Iterator<Item = &Arc<str>> {
        self.interests[kind].names.iter()
    }

    /// Returns the next request to send, or `None` if there is none for now.
    pub fn poll_request(&mut self) -> Option<DeltaDiscoveryRequest> {
        if !self.connected {
            return None;
        }
        if !self.introduced && self.held_names() > NODE_ALONE_ABOVE {
            // A server limits the requests of clients that it has not admitted, so a client with a long list of
            // versions first sends only its node.
            self.introduced = true;
            return Some(DeltaDiscoveryRequest {
                node: Some(self.node.clone()),
                type_url: NODE_TYPE_URL.to_owned(),
                ..DeltaDiscoveryRequest::default()
            });
        }
        let asked = Kind::ALL.into_iter().find_map(|kind| self.interests[kind].next_request(kind));
        let mut request = asked.or_else(|| self.answers.pop_front())?;
        if !std::mem::replace(&mut self.introduced, true) {
            request.node = Some(self.node.clone());
        }
        Some(request)
    }

    /// Decodes a response. Returns `None` after rejecting a response of an unknown type or with a malformed
    /// resource.
    pub fn on_response(&mut self, response: DeltaDiscoveryResponse) -> Option<Update> {
        let DeltaDiscoveryResponse { type_url, nonce, resources, removed_resources, .. } = response;
        let Some(kind) = Kind::from_type_url(&type_url) else {
            self.answers.push_back(nack(type_url, nonce, "the client has no subscription to this type"));
            return None;
        };
        let mut update = Update {
            ticket: Ticket { kind, nonce, stream: self.stream },
            resources: Vec::with_capacity(resources.len()),
            removed: removed_resources.into_iter().map(Arc::from).collect(),
        };
        for resource in resources {
            let Some(any) = resource.resource.filter(|any| any.type_url == type_url) else {
                self.reject(update.ticket, &format!("{}: not a resource of this type", resource.name));
                return None;
            };
            update.resources.push(Resource::with_version(kind, resource.name, &resource.version, &any.value));
        }
        let interest = &mut self.interests[kind];
        for resource in &update.resources {
            if interest.held.get(resource.name()).is_none_or(|held| held != resource) {
                interest.not_held.insert(resource.name().clone());
            }
        }
        update.removed.iter().for_each(|name| _ = interest.not_held.remove(name));
        Some(update)
    }

    /// Holds all resources of the response, forgets the removed ones, and ACKs the response.
    pub fn accept(&mut self, update: Update) {
        update.resources.into_iter().for_each(|resource| self.hold(resource));
        update.removed.iter().for_each(|name| self.forget(update.ticket.kind, name));
        self.acknowledge(update.ticket);
    }

    /// ACKs a response, unless its stream has ended.
    pub fn acknowledge(&mut self, ticket: Ticket) {
        if ticket.stream == self.stream && self.connected {
            self.answers.push_back(ack(ticket.kind.type_url().to_owned(), ticket.nonce));
        }
    }

    /// Rejects a response (NACK), unless its stream has ended.
    pub fn reject(&mut self, ticket: Ticket, reason: &str) {
        self.reject_with_refusals(ticket, reason, None);
    }

    /// Rejects a response (NACK) and lists the refused resources in the details of the error, for a server that
    /// reads them.
    pub fn reject_with_refusals(&mut self, ticket: Ticket, reason: &str, refusals: Option<&agent::Refusals>) {
        if ticket.stream == self.stream && self.connected {
            let mut answer = nack(ticket.kind.type_url().to_owned(), ticket.nonce, reason);
            if let Some(error) = &mut answer.error_detail {
                error.details.extend(refusals.map(vmesh_proto::any));
            }
            self.answers.push_back(answer);
        }
    }

    /// Holds a resource, or a tombstone that states that the resource does not exist.
    pub fn hold(&mut self, resource: Arc<Resource>) {
        let interest = &mut self.interests[resource.kind()];
        interest.not_held.remove(resource.name());
        self.changes.insert((resource.kind(), resource.name().clone()));
        interest.held.insert(resource.name().clone(), resource);
    }

    pub fn forget(&mut self, kind: Kind, name: &str) {
        let interest = &mut self.interests[kind];
        interest.not_held.remove(name);
        if let Some((name, _)) = interest.held.remove_entry(name) {
            self.changes.insert((kind, name));
        }
    }

    /// Adds a name to [`Subscriber::take_changes`] although its held resource is the same: for an owner whose
    /// view of it changed.
    pub fn note_change(&mut self, kind: Kind, name: &Arc<str>) {
        self.changes.insert((kind, name.clone()));
    }

    /// Returns the names whose held resource may have changed since the previous call.
    pub fn take_changes(&mut self) -> BTreeSet<(Kind, Arc<str>)> {
        std::mem::take(&mut self.changes)
    }

    pub fn held(&self, kind: Kind, name: &str) -> Option<&Arc<Resource>> {
        self.interests[kind].held.get(name)
    }

    pub fn all_held(&self) -> impl Iterator<Item = &Arc<Resource>> {
        self.interests.iter().flat_map(|(_, interest)| interest.held.values())
    }
}

impl Interest {
    fn next_request(&mut self, kind: Kind) -> Option<DeltaDiscoveryRequest> {
        let mut request = DeltaDiscoveryRequest {
            type_url: kind.type_url().to_owned(),
            ..DeltaDiscoveryRequest::default()
        };
        if !self.asked {
            if !self.wildcard && self.names.is_empty() {
                return None;
            }
            self.asked = true;
            // The first request of a kind without any name subscribes to all (R21).
            let star = (self.wildcard && !self.names.is_empty()).then(|| "*".to_owned());
            request.resource_names_subscribe =
                star.into_iter().chain(self.names.iter().map(|name| name.to_string())).collect();
            let held = self.held.values().filter(|resource| !resource.is_absent());
            let held = held.map(|resource| (resource.name().to_string(), resource.version().to_owned()));
            // The server may have removed a received but never held resource meanwhile. Listing it with an
            // empty version, which no server uses, makes the server answer for it.
            let not_held = self.not_held.iter().map(|name| (name.to_string(), String::new()));
            request.initial_resource_versions = held.chain(not_held).collect();
            return Some(request);
        }
        if self.subscribe.is_empty() && self.unsubscribe.is_empty() {
            return None;
        }
        let names = |names: &mut BTreeSet<Arc<str>>| {
            std::mem::take(names).iter().map(|name| name.to_string()).collect()
        };
        request.resource_names_subscribe = names(&mut self.subscribe);
        request.resource_names_unsubscribe = names(&mut self.unsubscribe);
        Some(request)
    }
}

fn ack(type_url: String, response_nonce: String) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { type_url, response_nonce, ..DeltaDiscoveryRequest::default() }
}

fn nack(type_url: String, nonce: String, reason: &str) -> DeltaDiscoveryRequest {
    let error = rpc::Status { code: 3, message: reason.to_owned(), ..rpc::Status::default() };
    DeltaDiscoveryRequest { error_detail: Some(error), ..ack(type_url, nonce) }
}
