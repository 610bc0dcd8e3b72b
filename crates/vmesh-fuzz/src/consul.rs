//! Consul's responses to `/v1/health/service/NAME`, one per datacenter.

use vmesh_discovery::format::consul::{InstanceRules, combine, read};
use vmesh_model::ServiceName;

use crate::{files, parts};

/// The parts of the input are the responses of the datacenters.
pub(crate) fn run(bytes: &[u8]) {
    let Ok(service) = "orders".parse::<ServiceName>() else { return };
    let rules = InstanceRules::default();
    let answers: Vec<_> = parts(bytes)
        .take(3)
        .filter_map(|body| read(body, "consul:dc1", &service, false, &rules).ok())
        .collect();
    let parsed = combine("consul", &service, &answers.iter().collect::<Vec<_>>());
    files::check(&parsed, bytes.len());
}
