//! The listener for mTLS connections to the workloads of an enrolled node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use vmesh_model::document::MtlsMode;
use vmesh_model::node::{MTLS_PORT, Workload};
use vmesh_model::{Protocol, ServiceName};
use vmesh_proto::any;
use vmesh_proto::envoy::config::listener::v3::listener_filter::ConfigType;
use vmesh_proto::envoy::config::listener::v3::{FilterChain, FilterChainMatch, Listener, ListenerFilter};
use vmesh_proto::envoy::extensions::filters::listener::tls_inspector::v3::TlsInspector;
use vmesh_xds::{Kind, Resource};

use super::NodeBuilder;
use crate::cluster::local_cluster;
use crate::endpoints::{local_assignment, socket_address};
use crate::listener::{Direction, chain, forward_to_application, traffic_direction};
use crate::peers::is_granted;
use crate::tls::{downstream_socket, server_name};

/// Adds the listener on [`MTLS_PORT`] of the node's address, whatever the modes of its services are, so that a change of
/// mode touches only callers. It has one filter chain for each service, which the server name selects. A change of the
/// workloads touches only their chains.
pub(super) fn add_listener(node: &mut NodeBuilder<'_>) {
    let report = node.report;
    if report.identity.is_none() {
        let strict: BTreeSet<_> = report.workloads.iter().map(|workload| &workload.service).collect();
        for service in
            strict.into_iter().filter(|service| node.mode(service) == MtlsMode::Strict).collect::<Vec<_>>()
        {
            node.report(format!(
                "workload `{service}` accepts only mTLS, and this node is not enrolled: nobody can call it; give its agent a \
                 join token"
            ));
        }
        return;
    }
    let mut services: BTreeMap<&ServiceName, Vec<&Workload>> = BTreeMap::new();
    let mut refused: BTreeSet<&ServiceName> = BTreeSet::new();
    for workload in &report.workloads {
        match is_granted(report, &workload.service) {
            true => services.entry(&workload.service).or_default().push(workload),
            false => _ = refused.insert(&workload.service),
        }
    }
    for service in refused {
        node.report(format!(
            "workload `{service}` is not among the services of this node's certificate: nobody calls it by mTLS; create a join \
             token with `--service {service}`, and join again"
        ));
    }
    if services.is_empty() {
        return;
    }
    let Some(ip) = report.address.map(|ip| ip.to_canonical()) else {
        node.report(
            "is enrolled, and its agent says no `address`: nobody calls its workloads by mTLS".to_owned(),
        );
        return;
    };
    let address = SocketAddr::new(ip, MTLS_PORT);
    if !node.claim_address(address, "mTLS".to_owned()) {
        return;
    }
    let mut names = ServerNames::new(services.keys().copied());
    let mut chains = Vec::new();
    for (service, workloads) in services {
        match names.take(service) {
            Some(names) => chains.push(add_chain(node, service, &workloads, ip, names)),
            None => node.report(format!(
                "workload `{service}` has the name of another workload but for upper and lower case, which TLS does not tell \
                 apart: nobody calls it by mTLS"
            )),
        }
    }
    let listener = Listener {
        name: format!("mtls|{address}"),
        address: Some(socket_address(address)),
        traffic_direction: traffic_direction(Direction::Inbound).into(),
        listener_filters: vec![ListenerFilter {
            name: "envoy.filters.listener.tls_inspector".to_owned(),
            config_type: Some(ConfigType::TypedConfig(any(&TlsInspector::default()))),
            ..ListenerFilter::default()
        }],
        filter_chains: chains,
        ..Listener::default()
    };
    node.add_bound(&listener, address);
}

/// Adds the cluster of a service's workloads, and returns the filter chain that forwards to it.
fn add_chain<'a>(
    node: &mut NodeBuilder<'a>,
    service: &'a ServiceName,
    workloads: &[&'a Workload],
    ip: IpAddr,
    server_names: Vec<String>,
) -> FilterChain {
    let of = |workload: &Workload| workload.protocol.unwrap_or_else(|| node.world.protocol(service));
    let protocol: Protocol = workloads.first().map(|first| of(first)).unwrap_or_default();
    let (alike, others): (Vec<&Workload>, Vec<&Workload>) =
        workloads.iter().copied().partition(|workload| of(workload) == protocol);
    for workload in others {
        node.report(format!(
            "workload `{service}` on port {} speaks another protocol than the first one of that service: it is called by mTLS only \
             under another service name",
            workload.port
        ));
    }
    let addresses: Vec<SocketAddr> = alike.into_iter().map(|workload| application(workload, ip)).collect();
    let name = format!("mtls|{service}");
    let cluster = local_cluster(&name, protocol, local_assignment(&name, &addresses));
    node.resources.push(Resource::new(Kind::Cluster, name.as_str(), &cluster));
    let matching = FilterChainMatch {
        server_names,
        transport_protocol: "tls".to_owned(),
        ..FilterChainMatch::default()
    };
    let checks = node.checks(service, protocol, true);
    let filter = forward_to_application(&name, &format!("inbound|{service}|mtls"), protocol, &checks);
    FilterChain {
        transport_socket: Some(downstream_socket(service, &node.world.trust_domain, protocol)),
        ..chain(&name, Some(matching), filter)
    }
}

/// Returns the address at which Envoy reaches the application of `workload`. An application that is called by captured
/// connections listens at the node's address, and not always on loopback.
fn application(workload: &Workload, ip: IpAddr) -> SocketAddr {
    let default = match workload.listen {
        Some(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        None => ip,
    };
    SocketAddr::new(workload.host.unwrap_or(default), workload.port)
}

/// The server names of a listener. Envoy rejects a listener in which two filter chains have one name.
struct ServerNames {
    taken: BTreeSet<String>,
    plain: BTreeMap<String, ServiceName>,
}

impl ServerNames {
    fn new<'a>(services: impl Iterator<Item = &'a ServiceName>) -> ServerNames {
        let mut plain = BTreeMap::new();
        for service in services {
            plain.entry(server_name(service)).or_insert_with(|| service.clone());
        }
        ServerNames { taken: BTreeSet::new(), plain }
    }

    /// Returns the names of `service`: its own, and with `.mesh` unless that is the name of another service. `None` if
    /// another service has its name.
    fn take(&mut self, service: &ServiceName) -> Option<Vec<String>> {
        let name = server_name(service);
        if self.plain.get(&name) != Some(service) || !self.taken.insert(name.clone()) {
            return None;
        }
        let alias = format!("{name}.mesh");
        let is_free = !self.plain.contains_key(&alias) && self.taken.insert(alias.clone());
        Some(std::iter::once(name).chain(is_free.then_some(alias)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_server_name_is_given_to_two_services() {
        let services: Vec<ServiceName> =
            ["Orders", "a", "a.mesh", "orders"].iter().map(|name| name.parse().unwrap()).collect();
        let mut names = ServerNames::new(services.iter());
        let taken: Vec<_> = services.iter().map(|service| names.take(service)).collect();
        let of = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        assert_eq!(taken, [of(&["orders", "orders.mesh"]), of(&["a"]), of(&["a.mesh", "a.mesh.mesh"]), None]);
    }
}
