//! The agent, with the real Envoy.

mod envoy;
mod fixture;
