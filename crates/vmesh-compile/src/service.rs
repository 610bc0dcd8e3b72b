//! Compiles one variant of a service to its group of resources.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use vmesh_catalog::World;
use vmesh_model::document::{Documents, Placed, Route, Service, Subset};
use vmesh_model::node::Client;
use vmesh_model::{Endpoint, Place, Problem, ServiceName, Settings};
use vmesh_xds::{Group, Kind, Resource};

use crate::cluster::{eds_cluster, grpc_cluster};
use crate::effective::Effective;
use crate::endpoints::assignment;
use crate::listener::api_listener;
use crate::route::{Router, Share, cluster_name};
use crate::transparent::{Index, Subject, Transparent};
use crate::view::Variant;

/// One compiled variant of a service, and the inputs it was compiled from.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// The key of the [`Variant`].
    pub(crate) variant: Arc<str>,
    pub group: Arc<Group>,
    pub shape: Arc<Shape>,
    assignments: Vec<Assignment>,
    transparent: Option<Transparent>,
    pub problems: Vec<Problem>,
}

impl Compiled {
    /// Returns the service's virtual addresses at which connections are captured. Empty if its callers
    /// capture none or the service has no port yet.
    pub fn virtual_addresses(&self) -> &[SocketAddr] {
        self.transparent.as_ref().map(|transparent| transparent.at.as_slice()).unwrap_or_default()
    }
}

/// The compiled parts of a service that do not depend on its endpoints. Endpoints change far more often.
#[derive(Debug)]
pub struct Shape {
    inputs: Inputs,
    pub settings: Settings,
    pub effective: Effective,
    /// The other services that receive requests addressed to this service.
    pub references: BTreeSet<ServiceName>,
    /// The services that the route mentions, and whether each existed; and the documents at that time.
    spoken_of: BTreeMap<ServiceName, bool>,
    documents: Arc<Documents>,
    /// The split of connections among clusters, for listeners that do not inspect requests.
    pub shares: Vec<Share>,
    resources: Vec<Arc<Resource>>,
    /// The cluster of the whole service, followed by those of its subsets.
    parts: Vec<(String, Option<Subset>)>,
    problems: Vec<Problem>,
}

/// The inputs of a [`Shape`], except the other services that its route mentions ([`Shape::spoken_of`]).
#[derive(Debug, PartialEq)]
struct Inputs {
    effective: Effective,
    service: Option<Arc<Placed<Service>>>,
    route: Option<Arc<Placed<Route>>>,
}

/// The endpoints of one cluster, and the EDS resource built from them.
#[derive(Debug, Clone)]
struct Assignment {
    of: Arc<[Endpoint]>,
    resource: Arc<Resource>,
}

/// Earlier results whose equal resources a compilation reuses.
#[derive(Clone, Copy)]
pub(crate) struct Like<'a> {
    /// The previous result for the service in the same view.
    pub(crate) earlier: Option<&'a Compiled>,
    /// Another variant of the service, with which equal resources are shared.
    pub(crate) sibling: Option<&'a Compiled>,
}

impl Like<'_> {
    fn share(&self, new: Arc<Resource>) -> Arc<Resource> {
        let same = self.sibling.and_then(|sibling| sibling.group.get(new.kind(), new.name()));
        same.filter(|same| same.version() == new.version()).cloned().unwrap_or(new)
    }
}

/// Compiles the variant of `name` that has this key.
pub(crate) fn compile(
    world: &World,
    index: &Index,
    name: &ServiceName,
    (key, variant): (&Arc<str>, &Variant),
    like: Like<'_>,
) -> Compiled {
    let before = like.earlier;
    let capture = variant.settings.capture;
    let shape = shape(world, name, variant, like);
    let (balancing, zone) = (&shape.effective.load_balancing, variant.zone.as_deref());
    let mut problems = shape.problems.clone();
    let all = world.services.get(name).map(|service| service.endpoints.clone()).unwrap_or_default();
    let mut usable = all.clone();
    if variant.without_ipv6 && all.iter().any(|endpoint| endpoint.address.is_ipv6()) {
        // Without IPv6, Envoy rejects the whole assignment if it contains an IPv6 address.
        usable = all.iter().filter(|endpoint| endpoint.address.is_ipv4()).cloned().collect();
    }
    let reshaped = before.is_none_or(|before| !Arc::ptr_eq(&before.shape, &shape));
    let mut assignments = Vec::with_capacity(shape.parts.len());
    for (at, (cluster, subset)) in shape.parts.iter().enumerate() {
        let of: Arc<[Endpoint]> = match subset {
            None => usable.clone(),
            Some(subset) => usable.iter().filter(|endpoint| subset.contains(endpoint)).cloned().collect(),
        };
        if subset.is_some() && of.is_empty() && !all.is_empty() {
            problems.push(empty_subset(shape.inputs.service.as_ref(), cluster, all.len()));
        }
        let same =
            before.filter(|_| !reshaped).and_then(|before| before.assignments.get(at)).filter(|a| a.of == of);
        assignments.push(match same {
            Some(same) => same.clone(),
            None => {
                let message = assignment(cluster, &of, balancing, zone);
                let resource = like.share(Resource::new(Kind::Endpoint, cluster.as_str(), &message));
                Assignment { of, resource }
            }
        });
    }
    let transparent = variant.captured.map(|captured| {
        let ipv6 = !variant.without_ipv6;
        let subject = Subject { world, index, name, shape: &shape, endpoints: &all, capture, ipv6 };
        let before = before.and_then(|before| before.transparent.as_ref()).map(|before| (before, !reshaped));
        Transparent::of(&subject, captured, before, &mut problems)
    });
    let endpoints = assignments.iter().map(|assignment| &assignment.resource);
    let captured = transparent.iter().flat_map(Transparent::resources);
    let resources: Vec<_> = shape.resources.iter().chain(endpoints).chain(captured).cloned().collect();
    let group = Group::new(name.shared(), resources);
    Compiled { variant: key.clone(), group, shape, assignments, transparent, problems }
}

/// Returns the problems in the documents of `name`, whether or not any node calls it.
pub(crate) fn problems(world: &World, name: &ServiceName) -> Vec<Problem> {
    let documents = &world.documents;
    let mut problems = Vec::new();
    if documents.routes.contains_key(name) {
        let effective = Effective::of(&documents.settings(name, &[]), world.protocol(name));
        let mut router = Router {
            world,
            service: name,
            effective: &effective,
            client: Client::Envoy,
            problems: Vec::new(),
            references: BTreeSet::new(),
            spoken_of: BTreeMap::new(),
        };
        if effective.protocol.is_http() {
            router.configuration();
        } else {
            router.shares();
        }
        problems.append(&mut router.problems);
    }
    let all = world.endpoints(name);
    if let Some(document) = documents.services.get(name).filter(|_| !all.is_empty()) {
        let empty = document.subsets.iter().filter(|(_, subset)| !all.iter().any(|one| subset.contains(one)));
        let clusters = empty.map(|(subset, _)| cluster_name(name, Some(subset)));
        problems.extend(clusters.map(|cluster| empty_subset(Some(document), &cluster, all.len())));
    }
    problems
}

fn empty_subset(document: Option<&Arc<Placed<Service>>>, cluster: &str, all: usize) -> Problem {
    let place = document.map_or_else(|| Place::file("documents"), |document| document.place.clone());
    let message =
        format!("none of the {all} endpoints is in the subset `{cluster}`: requests for it fail with 503");
    Problem::new(place, format!("Service `{}`", cluster.split('|').next().unwrap_or_default()), message)
}

fn shape(world: &World, name: &ServiceName, variant: &Variant, like: Like<'_>) -> Arc<Shape> {
    let before = like.earlier.map(|compiled| &compiled.shape);
    let effective = Effective::of(&variant.settings, world.protocol(name));
    let inputs = Inputs {
        effective: effective.clone(),
        service: world.documents.services.get(name).cloned(),
        route: world.documents.routes.get(name).cloned(),
    };
    if let Some(before) = before
        && before.inputs == inputs
        && (inputs.route.is_none() || before.spoken_of_alike(world))
    {
        return before.clone();
    }
    let subsets = inputs.service.iter().flat_map(|service| &service.subsets);
    let parts: Vec<_> = std::iter::once((name.to_string(), None))
        .chain(subsets.map(|(subset, of)| (cluster_name(name, Some(subset)), Some(of.clone()))))
        .collect();
    let mut router = Router {
        world,
        service: name,
        effective: &effective,
        client: variant.client,
        problems: Vec::new(),
        references: BTreeSet::new(),
        spoken_of: BTreeMap::new(),
    };
    let mut resources = Vec::new();
    for (cluster, _) in &parts {
        let message = match variant.client {
            Client::Envoy => eds_cluster(cluster, &effective),
            Client::Grpc => grpc_cluster(cluster, &effective),
        };
        resources.push(Resource::new(Kind::Cluster, cluster.as_str(), &message));
    }
    let mut shares = Vec::new();
    if effective.protocol.is_http() {
        let routes = router.configuration();
        resources.push(Resource::new(Kind::Route, routes.name.as_str(), &routes));
        if variant.client == Client::Grpc {
            let listener = api_listener(&format!("{name}.mesh"), name.as_str());
            resources.push(Resource::new(Kind::Listener, listener.name.as_str(), &listener));
        }
    } else {
        shares = router.shares();
    }
    let Router { problems, references, spoken_of, .. } = router;
    let documents = world.documents.clone();
    // A resource that encodes to the same bytes as an earlier one is replaced by the earlier pointer.
    let resources = match before {
        Some(before) => resources.into_iter().map(|new| known(&before.resources, new)).collect(),
        None => resources.into_iter().map(|new| like.share(new)).collect(),
    };
    Arc::new(Shape {
        inputs,
        settings: variant.settings.clone(),
        effective,
        references,
        spoken_of,
        documents,
        shares,
        resources,
        parts,
        problems,
    })
}

pub(crate) fn known(before: &[Arc<Resource>], new: Arc<Resource>) -> Arc<Resource> {
    let same = |old: &&Arc<Resource>| {
        old.kind() == new.kind() && old.name() == new.name() && old.version() == new.version()
    };
    before.iter().find(same).cloned().unwrap_or(new)
}

impl Shape {
    /// Reports whether each service that the route mentions still exists, or still does not, under the same
    /// documents.
    fn spoken_of_alike(&self, world: &World) -> bool {
        Arc::ptr_eq(&self.documents, &world.documents)
            && self.spoken_of.iter().all(|(service, known)| world.is_known(service) == *known)
    }

    /// Reports whether nodes that call the service need a new scope or new listeners when this shape replaces
    /// `other`.
    pub fn calls_for_rescoping(&self, other: &Shape) -> bool {
        self.references != other.references
            || self.effective.protocol.is_http() != other.effective.protocol.is_http()
            || self.effective.idle != other.effective.idle
            || self.shares != other.shares
            || self.effective.load_balancing != other.effective.load_balancing
    }
}
