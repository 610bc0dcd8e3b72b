//! The compiler turns a world and a node's report into the node's Envoy configuration.
//!
//! [`compile`] is the whole function. [`Compiler`] computes the same result for a fleet: it keeps what the
//! connected nodes need, and compiles only what a [`Change`] affects.
//!
//! | part              | what it is                                                                          |
//! |-------------------|-------------------------------------------------------------------------------------|
//! | [`NodeClass`]     | the properties of a node that decide how services are compiled for it; nodes of one class share a store |
//! | variant           | a service compiled under one set of effective settings, shared by all classes in which these are equal |
//! | [`NodeConfig`]    | a node's class, the services in its scope, and the resources that this node alone receives |
//! | [`Configuration`] | the compiler's immutable output: all classes, nodes and problems at one moment        |
//!
//! A service that no node calls is not compiled. When the last node of a class disconnects, the class and the
//! variants that only it used are dropped.
//!
//! **Invariant:** the compiler never fails, never waits, and reads no clock. A bad service becomes a
//! `Problem` instead of an error, and only that service is affected, never the rest of a node's
//! configuration. `cargo tree -p vmesh-compile -e normal` lists no `tokio`. A property test
//! (`tests/memory.rs`) proves that the compiler's memory never changes the result: after any sequence of
//! worlds and nodes, each node has exactly what [`compile`] gives it alone, and nothing remains of nodes that
//! left.

mod access;
mod class;
mod cluster;
mod compiler;
mod configuration;
pub mod effective;
mod endpoints;
mod explain;
mod gate;
mod listener;
mod node;
mod owners;
mod peers;
mod refusals;
mod route;
mod service;
mod tls;
mod transparent;
mod zones;

use std::sync::Arc;

use vmesh_catalog::World;
use vmesh_model::{NodeReport, Problem};
use vmesh_xds::Snapshot;

pub use class::{CapturedDestinations, NodeClass};
pub use compiler::Compiler;
pub use configuration::{Change, CompiledClass, Configuration, Counts, NodeId, Update};
pub use endpoints::priorities;
pub use explain::{ConnectionSecurity, EndpointTls, tls};
pub use node::NodeConfig;
pub use route::cluster_name;
pub use service::{CompiledVariant, Shape};

/// Returns every resource that the proxy of `report`'s node needs, and the problems found in the services and
/// documents that they were compiled from.
pub fn compile(world: &Arc<World>, report: &NodeReport) -> (Snapshot, Vec<Problem>) {
    let configuration = compile_alone(world, report);
    let nothing = || Snapshot { store: Arc::default(), scope: Arc::new(vmesh_xds::Scope::named([""; 0])) };
    (configuration.snapshot(ALONE).unwrap_or_else(nothing), configuration.problems())
}

/// The id of the single node in the output of [`compile_alone`].
pub const ALONE: NodeId = 0;

/// Returns the configuration of `world` with one connected node, [`ALONE`].
pub fn compile_alone(world: &Arc<World>, report: &NodeReport) -> Configuration {
    let mut compiler = Compiler::new(world.clone());
    compiler.apply(Change { joined: vec![(ALONE, Arc::new(report.clone()))], ..Change::default() });
    compiler.configuration()
}
