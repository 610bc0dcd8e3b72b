//! What the benches share: their options and `main`, a control plane on services in files, xDS clients, and what a process costs.

pub mod common;
pub mod fleet_client;
pub mod mesh;
pub mod usage;
