//! The agent, with the real Envoy.

mod cli;
mod envoy;
mod fixture;
