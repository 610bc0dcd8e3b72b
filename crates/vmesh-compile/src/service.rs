//! Compiles one variant of a service to its group of resources.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use vmesh_catalog::World;
use vmesh_model::document::{Documents, MtlsMode, PlacedDocument, RouteDocument, ServiceDocument, Subset};
use vmesh_model::node::Client;
use vmesh_model::{Endpoint, Place, Problem, ServiceName, Settings};
use vmesh_xds::{Group, Kind, Resource, second_assignment};

use crate::access;
use crate::class::Variant;
use crate::cluster::{eds_cluster, grpc_cluster};
use crate::effective::EffectiveSettings;
use crate::endpoints::{CalledEndpoints, assignment};
use crate::listener::api_listener;
use crate::peers::Peers;
use crate::route::{RouteCompiler, Share, cluster_name};
use crate::tls::CallerTls;
use crate::transparent::{CaptureIndex, CaptureInput, CaptureResources};

/// One compiled variant of a service, and the inputs it was compiled from.
#[derive(Debug, Clone)]
pub struct CompiledVariant {
    /// The key of the [`Variant`].
    pub(crate) variant: Arc<str>,
    pub group: Arc<Group>,
    pub shape: Arc<Shape>,
    assignments: Vec<Assignment>,
    transparent: Option<CaptureResources>,
    pub problems: Vec<Problem>,
}

impl CompiledVariant {
    /// Returns the service's virtual addresses at which connections are captured. Empty if its callers
    /// capture none or the service has no port yet.
    pub fn virtual_addresses(&self) -> &[SocketAddr] {
        self.transparent.as_ref().map(|transparent| transparent.at.as_slice()).unwrap_or_default()
    }
}

/// The compiled parts of a service that do not depend on its endpoints. Endpoints change far more often.
#[derive(Debug)]
pub struct Shape {
    inputs: ShapeInputs,
    pub settings: Settings,
    pub effective: EffectiveSettings,
    /// The other services that receive requests addressed to this service.
    pub references: BTreeSet<ServiceName>,
    /// The services that the route mentions, and whether each existed; and the documents at that time.
    mentioned_services: BTreeMap<ServiceName, bool>,
    documents: Arc<Documents>,
    /// The split of connections among clusters, for listeners that do not inspect requests.
    pub shares: Vec<Share>,
    resources: Vec<Arc<Resource>>,
    /// The cluster of the whole service, followed by those of its subsets.
    clusters: Vec<(String, Option<Subset>)>,
    problems: Vec<Problem>,
}

/// The inputs of a [`Shape`], except the other services that its route mentions ([`Shape::mentioned_services`]).
#[derive(Debug, PartialEq)]
struct ShapeInputs {
    effective: EffectiveSettings,
    tls: Option<CallerTls>,
    service: Option<Arc<PlacedDocument<ServiceDocument>>>,
    route: Option<Arc<PlacedDocument<RouteDocument>>>,
}

/// The endpoints of one cluster, and the EDS resource built from them.
#[derive(Debug, Clone)]
struct Assignment {
    called: CalledEndpoints,
    resource: Arc<Resource>,
}

/// Earlier results whose equal resources a compilation reuses.
#[derive(Clone, Copy)]
pub(crate) struct Reuse<'a> {
    /// The previous result for the service in the same class.
    pub(crate) earlier: Option<&'a CompiledVariant>,
    /// Another variant of the service, with which equal resources are shared.
    pub(crate) sibling: Option<&'a CompiledVariant>,
}

impl Reuse<'_> {
    fn share(&self, new: Arc<Resource>) -> Arc<Resource> {
        let same = self.sibling.and_then(|sibling| sibling.group.get(new.kind(), new.name()));
        same.filter(|same| same.version() == new.version()).cloned().unwrap_or(new)
    }
}

/// The inputs of a compilation that all services share.
#[derive(Clone, Copy)]
pub(crate) struct CompilerInput<'a> {
    pub(crate) world: &'a World,
    pub(crate) index: &'a CaptureIndex,
    pub(crate) peers: &'a Peers,
}

/// Compiles the variant of `name` that has this key.
pub(crate) fn compile(
    CompilerInput { world, index, peers }: CompilerInput<'_>,
    name: &ServiceName,
    (key, variant): (&Arc<str>, &Variant),
    like: Reuse<'_>,
) -> CompiledVariant {
    let before = like.earlier;
    let capture = variant.settings.capture;
    let shape = compile_shape(world, name, variant, like);
    let (balancing, zone) = (&shape.effective.load_balancing, variant.zone.as_deref());
    let mut problems = shape.problems.clone();
    let all = world.services.get(name).map(|service| service.endpoints.clone()).unwrap_or_default();
    let mut usable = all.clone();
    if variant.without_ipv6 && all.iter().any(|endpoint| endpoint.address.is_ipv6()) {
        // Without IPv6, Envoy rejects the whole assignment if it contains an IPv6 address.
        usable = all.iter().filter(|endpoint| endpoint.address.is_ipv4()).cloned().collect();
    }
    let plain = CalledEndpoints { endpoints: usable.clone(), by_mtls: BTreeSet::new() };
    let mut called = plain.clone();
    if variant.mtls.is_some() {
        let calls = split_by_tls(name, &usable, variant.settings.mtls_mode(), peers);
        called.by_mtls = calls.by_mtls;
        if !calls.left_out.is_empty() {
            called.endpoints =
                usable.iter().filter(|one| !calls.left_out.contains(&one.address)).cloned().collect();
            problems.push(left_out(world, name, &calls.left_out, all.len()));
        }
    }
    let reshaped = before.is_none_or(|before| !Arc::ptr_eq(&before.shape, &shape));
    let mut assignments: Vec<Assignment> = Vec::with_capacity(shape.clusters.len());
    let mut add = |assignment_name: String, called: CalledEndpoints| {
        let same = before
            .filter(|_| !reshaped)
            .and_then(|before| before.assignments.get(assignments.len()))
            .filter(|a| a.called == called);
        assignments.push(match same {
            Some(same) => same.clone(),
            None => {
                let message = assignment(&assignment_name, &called, balancing, zone);
                let resource = like.share(Resource::new(Kind::Endpoint, assignment_name, &message));
                Assignment { called, resource }
            }
        });
    };
    for (cluster, subset) in &shape.clusters {
        let of_subset = called.of_subset(subset.as_ref());
        if subset.is_some() && of_subset.endpoints.is_empty() && !all.is_empty() {
            problems.push(empty_subset(shape.inputs.service.as_ref(), cluster, all.len()));
        }
        if variant.mtls.is_some() {
            // The plaintext cluster that this one replaces keeps its endpoints until this one is warm.
            add(cluster.clone(), plain.of_subset(subset.as_ref()));
            add(second_assignment(cluster), of_subset);
        } else {
            add(cluster.clone(), of_subset);
        }
    }
    let transparent = variant.captured.map(|captured| {
        let ipv6 = !variant.without_ipv6;
        let subject = CaptureInput { world, index, name, shape: &shape, endpoints: &all, capture, ipv6 };
        let before = before.and_then(|before| before.transparent.as_ref()).map(|before| (before, !reshaped));
        CaptureResources::of(&subject, captured, before, &mut problems)
    });
    let endpoints = assignments.iter().map(|assignment| &assignment.resource);
    let captured = transparent.iter().flat_map(CaptureResources::resources);
    let resources: Vec<_> = shape.resources.iter().chain(endpoints).chain(captured).cloned().collect();
    let group = Group::new(name.shared(), resources);
    CompiledVariant { variant: key.clone(), group, shape, assignments, transparent, problems }
}

/// The endpoints of a service, by the way in which an enrolled node calls them.
struct TlsSplit {
    by_mtls: BTreeSet<SocketAddr>,
    /// The endpoints that are not called, because plaintext is not allowed and mTLS is not possible.
    left_out: BTreeSet<SocketAddr>,
}

/// Returns the way in which an enrolled caller with `mode` calls each endpoint.
fn split_by_tls(name: &ServiceName, endpoints: &[Endpoint], mode: MtlsMode, peers: &Peers) -> TlsSplit {
    let mut split = TlsSplit { by_mtls: BTreeSet::new(), left_out: BTreeSet::new() };
    for endpoint in endpoints {
        let address = endpoint.address;
        let Some(peer) = peers.endpoint(name, address) else {
            if mode == MtlsMode::Strict {
                split.left_out.insert(address);
            }
            continue;
        };
        let by_mtls = match mode.max(peer.mode.unwrap_or_default()) {
            MtlsMode::Off => false,
            MtlsMode::Permissive => peer.is_ready,
            // Plaintext would be refused. A node whose agent restarts is not ready for a moment, though its Envoy is.
            MtlsMode::Strict => true,
        };
        if by_mtls {
            split.by_mtls.insert(address);
        }
    }
    split
}

fn left_out(world: &World, name: &ServiceName, addresses: &BTreeSet<SocketAddr>, all: usize) -> Problem {
    let some: Vec<_> = addresses.iter().take(3).map(SocketAddr::to_string).collect();
    let more = if addresses.len() > some.len() { " and more" } else { "" };
    let message = format!(
        "{} of {all} endpoints are left out ({}{more}): its mode of mTLS is strict, and no enrolled node runs them; `vmeshctl \
         explain` says why for each",
        addresses.len(),
        some.join(", ")
    );
    let documented = world.documents.services.get(name).map(|document| document.place.clone());
    let of_mesh = || world.documents.mesh.as_ref().map(|mesh| mesh.place.clone());
    let place = documented.or_else(of_mesh).unwrap_or_else(|| Place::file("documents"));
    Problem::new(place, format!("Service `{name}`"), message)
}

/// Returns the problems in the documents of `name`, whether or not any node calls it.
pub(crate) fn find_problems(world: &World, name: &ServiceName) -> Vec<Problem> {
    let documents = &world.documents;
    let mut problems = Vec::new();
    if documents.routes.contains_key(name) {
        let effective = EffectiveSettings::of(&documents.settings(name, &[]), world.protocol(name));
        let mut router = RouteCompiler {
            world,
            service: name,
            effective: &effective,
            client: Client::Envoy,
            problems: Vec::new(),
            references: BTreeSet::new(),
            mentioned_services: BTreeMap::new(),
        };
        if effective.protocol.is_http() {
            router.compile_configuration();
        } else {
            router.compile_shares();
        }
        problems.append(&mut router.problems);
    }
    if world.is_known(name) {
        problems.extend(access::find_problems(world, name));
    }
    let all = world.endpoints(name);
    if let Some(document) = documents.services.get(name).filter(|_| !all.is_empty()) {
        let empty = document.subsets.iter().filter(|(_, subset)| !all.iter().any(|one| subset.contains(one)));
        let clusters = empty.map(|(subset, _)| cluster_name(name, Some(subset)));
        problems.extend(clusters.map(|cluster| empty_subset(Some(document), &cluster, all.len())));
    }
    problems
}

fn empty_subset(
    document: Option<&Arc<PlacedDocument<ServiceDocument>>>,
    cluster: &str,
    all: usize,
) -> Problem {
    let place = document.map_or_else(|| Place::file("documents"), |document| document.place.clone());
    let message =
        format!("none of the {all} endpoints is in the subset `{cluster}`: requests for it fail with 503");
    Problem::new(place, format!("Service `{}`", cluster.split('|').next().unwrap_or_default()), message)
}

fn compile_shape(world: &World, name: &ServiceName, variant: &Variant, like: Reuse<'_>) -> Arc<Shape> {
    let before = like.earlier.map(|compiled| &compiled.shape);
    let effective = EffectiveSettings::of(&variant.settings, world.protocol(name));
    let tls = variant.mtls.as_ref().map(|certificate| CallerTls {
        service: name.clone(),
        trust_domain: world.trust_domain.clone(),
        certificate: certificate.workload.clone(),
    });
    let inputs = ShapeInputs {
        effective: effective.clone(),
        tls,
        service: world.documents.services.get(name).cloned(),
        route: world.documents.routes.get(name).cloned(),
    };
    if let Some(before) = before
        && before.inputs == inputs
        && (inputs.route.is_none() || before.are_mentions_unchanged(world))
    {
        return before.clone();
    }
    let subsets = inputs.service.iter().flat_map(|service| &service.subsets);
    let clusters: Vec<_> = std::iter::once((name.to_string(), None))
        .chain(subsets.map(|(subset, of)| (cluster_name(name, Some(subset)), Some(of.clone()))))
        .collect();
    let mut router = RouteCompiler {
        world,
        service: name,
        effective: &effective,
        client: variant.client,
        problems: Vec::new(),
        references: BTreeSet::new(),
        mentioned_services: BTreeMap::new(),
    };
    let mut resources = Vec::new();
    for (cluster, _) in &clusters {
        let message = match variant.client {
            Client::Envoy => eds_cluster(cluster, &effective, inputs.tls.as_ref()),
            Client::Grpc => grpc_cluster(cluster, &effective),
        };
        resources.push(Resource::new(Kind::Cluster, cluster.as_str(), &message));
    }
    let mut shares = Vec::new();
    if effective.protocol.is_http() {
        let routes = router.compile_configuration();
        resources.push(Resource::new(Kind::Route, routes.name.as_str(), &routes));
        if variant.client == Client::Grpc {
            let listener = api_listener(&format!("{name}.mesh"), name.as_str());
            resources.push(Resource::new(Kind::Listener, listener.name.as_str(), &listener));
        }
    } else {
        shares = router.compile_shares();
    }
    let RouteCompiler { problems, references, mentioned_services, .. } = router;
    let documents = world.documents.clone();
    // A resource that encodes to the same bytes as an earlier one is replaced by the earlier pointer.
    let resources = match before {
        Some(before) => resources.into_iter().map(|new| reuse_equal(&before.resources, new)).collect(),
        None => resources.into_iter().map(|new| like.share(new)).collect(),
    };
    Arc::new(Shape {
        inputs,
        settings: variant.settings.clone(),
        effective,
        references,
        mentioned_services,
        documents,
        shares,
        resources,
        clusters,
        problems,
    })
}

pub(crate) fn reuse_equal(before: &[Arc<Resource>], new: Arc<Resource>) -> Arc<Resource> {
    let same = |old: &&Arc<Resource>| {
        old.kind() == new.kind() && old.name() == new.name() && old.version() == new.version()
    };
    before.iter().find(same).cloned().unwrap_or(new)
}

impl Shape {
    /// Reports whether each service that the route mentions still exists, or still does not, under the same
    /// documents.
    fn are_mentions_unchanged(&self, world: &World) -> bool {
        Arc::ptr_eq(&self.documents, &world.documents)
            && self.mentioned_services.iter().all(|(service, known)| world.is_known(service) == *known)
    }

    /// Reports whether nodes that call the service need a new scope or new listeners when this shape replaces
    /// `other`.
    pub fn needs_rescoping(&self, other: &Shape) -> bool {
        self.references != other.references
            || self.effective.protocol.is_http() != other.effective.protocol.is_http()
            || self.effective.idle != other.effective.idle
            || self.shares != other.shares
            || self.effective.load_balancing != other.effective.load_balancing
    }
}
