//! Tests of the agent with the real Envoy.

#[cfg(test)]
mod cli;
#[cfg(test)]
mod envoy;
#[cfg(test)]
mod fixture;
#[cfg(test)]
mod identity;
#[cfg(test)]
mod relay;
#[cfg(test)]
mod supervisor;
