//! The way in which a node calls each endpoint of a service, and the reason, for an operator.

use std::net::SocketAddr;

use vmesh_catalog::World;
use vmesh_model::document::MtlsMode;
use vmesh_model::node::Client;
use vmesh_model::{NodeReport, ServiceName};

use crate::peers::{is_granted, registered_addresses};

/// The way in which a caller reaches one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointTls {
    pub address: SocketAddr,
    pub connection: ConnectionSecurity,
    /// The reason, as a clause without a full stop.
    pub reason: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionSecurity {
    Mtls,
    Plaintext,
    /// The endpoint is not called: the mode is strict, and mTLS is not possible.
    LeftOut,
}

impl ConnectionSecurity {
    pub fn as_str(self) -> &'static str {
        match self {
            ConnectionSecurity::Mtls => "mtls",
            ConnectionSecurity::Plaintext => "plaintext",
            ConnectionSecurity::LeftOut => "left out",
        }
    }
}

/// Returns the way in which the node of `from` calls each endpoint of `service`, as the compiler decides it. This function
/// visits every node of the world, so it is for answers to operators.
pub fn tls(world: &World, service: &ServiceName, from: &NodeReport) -> Vec<EndpointTls> {
    let documents = world.documents.nodes_for(from);
    let mode = world.documents.settings(service, &documents).mtls_mode();
    let caller = &from.name;
    let impossible = match (from.client, from.identity.is_some()) {
        (Client::Grpc, _) => Some(format!("`{caller}` is a gRPC client without an Envoy")),
        (_, false) => Some(format!("`{caller}` is not enrolled: its agent has no certificate")),
        _ => None,
    };
    let endpoints = world.endpoints(service).iter().map(|endpoint| endpoint.address);
    let of = |address: SocketAddr| {
        if let Some(reason) = &impossible {
            return (ConnectionSecurity::Plaintext, reason.clone());
        }
        let node = match peer_of(world, service, address) {
            Ok(node) => node,
            Err(reason) if mode == MtlsMode::Strict => return (ConnectionSecurity::LeftOut, reason),
            Err(_) if mode == MtlsMode::Off => {
                return (ConnectionSecurity::Plaintext, "its mode is off".to_owned());
            }
            Err(reason) => return (ConnectionSecurity::Plaintext, reason),
        };
        let of_node = world.documents.nodes_for(node);
        let of_node = of_node.iter().rev().find_map(|document| document.mtls).map(|mtls| mtls.mode);
        let (mode, name) = (mode.max(of_node.unwrap_or_default()), &node.name);
        let unready =
            format!("node `{name}` is not ready: its Envoy has not accepted its listener for mTLS yet");
        match (mode, node.mtls_ready) {
            (MtlsMode::Off, _) => (ConnectionSecurity::Plaintext, "its mode is off".to_owned()),
            (MtlsMode::Permissive, false) => (ConnectionSecurity::Plaintext, unready),
            (MtlsMode::Strict, false) => {
                (ConnectionSecurity::Mtls, format!("its mode is strict, but {unready}"))
            }
            (on, true) => (
                ConnectionSecurity::Mtls,
                format!("its mode is {}, and node `{name}` is ready for it", on.as_str()),
            ),
        }
    };
    endpoints
        .map(|address| {
            let (connection, reason) = of(address);
            EndpointTls { address, connection, reason }
        })
        .collect()
}

/// Returns the enrolled node that runs the endpoint, one that is ready first, or the reason why there is none.
fn peer_of<'a>(
    world: &'a World,
    service: &ServiceName,
    address: SocketAddr,
) -> Result<&'a NodeReport, String> {
    let at_address =
        world.nodes.values().filter(|node| node.address.map(|ip| ip.to_canonical()) == Some(address.ip()));
    let mut found = Err(format!("no node has the address {}", address.ip()));
    for node in at_address {
        let name = &node.name;
        let runs_it = node.workloads.iter().filter(|workload| workload.service == *service);
        let runs_it = runs_it.flat_map(|workload| registered_addresses(workload, address.ip()));
        let reason = if node.client == Client::Grpc || node.identity.is_none() {
            format!("node `{name}` is not enrolled: its agent has no certificate")
        } else if !runs_it.into_iter().any(|at| at == address) {
            format!("node `{name}` has no workload of `{service}` on port {}", address.port())
        } else if !is_granted(node, service) {
            format!("the certificate of node `{name}` does not grant `{service}`")
        } else if node.mtls_ready {
            return Ok(node);
        } else {
            found = Ok(&**node);
            continue;
        };
        if found.is_err() {
            found = Err(reason);
        }
    }
    found
}
