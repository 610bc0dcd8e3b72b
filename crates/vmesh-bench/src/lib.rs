//! The parts that all benches share: options and `main`, a control plane whose services are in files, xDS
//! clients, and the resource usage of a process.

pub mod common;
pub mod fleet_client;
pub mod identities;
pub mod mesh;
pub mod usage;
