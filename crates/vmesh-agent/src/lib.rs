//! x
pub mod bootstrap;
pub mod config;
pub mod envoy;
pub mod identity;
pub mod status;
