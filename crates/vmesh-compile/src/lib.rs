//! The compiler: a world and a node in, the node's Envoy configuration out.
//!
//! [`compile`] is the whole of it. [`Compiler`] is the same function for a fleet: it keeps what connected nodes need, and compiles
//! only what a [`Change`] concerns.
//!
//! | part              | what it is                                                                          |
//! |-------------------|-------------------------------------------------------------------------------------|
//! | [`View`]          | what of a node decides how services are compiled for it; nodes with equal ones share a store |
//! | variant           | a service, compiled once for all views in which the settings in force for it are equal |
//! | [`NodeConfig`]    | a node's view, the services in its scope, and the resources of that node alone       |
//! | [`Configuration`] | all of it at one moment, immutable                                                  |
//!
//! A service that no node calls is not compiled, and what the last node of a view leaves behind is dropped.
//!
//! **Invariant:** it never fails, waits, or reads a clock. A bad service becomes a `Problem`, not an error, and
//! costs that service, never the rest of a node's configuration. `cargo tree -p vmesh-compile -e normal` lists no
//! `tokio`. That the memory changes nothing is a property test: any sequence of worlds and nodes gives each node what
//! [`compile`] gives it alone, and leaves nothing behind (`tests/memory.rs`).

mod cluster;
mod compiler;
pub mod effective;
mod endpoints;
mod gate;
mod listener;
mod node;
mod owners;
mod route;
mod service;
mod transparent;
mod view;

use std::sync::Arc;

use vmesh_catalog::World;
use vmesh_model::{NodeReport, Problem};
use vmesh_xds::Snapshot;

pub use compiler::{Change, CompiledView, Compiler, Configuration, Counts, NodeId, Update};
pub use endpoints::priorities;
pub use node::NodeConfig;
pub use route::cluster_name;
pub use service::{Compiled, Shape};
pub use view::{Captured, View};

/// Everything that `report`'s proxy needs, and what is wrong with what it was made from.
pub fn compile(world: &Arc<World>, report: &NodeReport) -> (Snapshot, Vec<Problem>) {
    let configuration = compile_alone(world, report);
    let nothing = || Snapshot { store: Arc::default(), scope: Arc::new(vmesh_xds::Scope::named([""; 0])) };
    (configuration.snapshot(ALONE).unwrap_or_else(nothing), configuration.problems())
}

/// The id of the node of [`compile_alone`].
pub const ALONE: NodeId = 0;

/// The configuration of `world` with one node, [`ALONE`].
pub fn compile_alone(world: &Arc<World>, report: &NodeReport) -> Configuration {
    let mut compiler = Compiler::new(world.clone());
    compiler.apply(Change { joined: vec![(ALONE, Arc::new(report.clone()))], ..Change::default() });
    compiler.configuration()
}
