//! Merges the instances of all datacenters into one service.

use std::collections::BTreeMap;
use std::num::NonZeroU16;

use vmesh_model::{Address, Health, Host, Labels, Protocol, Registration, ServiceName, Weight};

use super::{ConsulInstance, ServiceInstances, place};
use crate::format::{ParseResult, ParsedService, RawWeight, Record, subject_of};

/// Returns the instances of one datacenter from a persisted registration, in the form of a parsed answer.
pub fn restored_instances(registration: &Registration, datacenter: &str) -> ServiceInstances {
    let of_it = |labels: &Labels| labels.get("datacenter").is_some_and(|name| **name == *datacenter);
    let instances =
        registration.endpoints.iter().filter(|endpoint| of_it(&endpoint.labels)).filter_map(|endpoint| {
            let host = match &endpoint.hostname {
                Some(name) => Host::Name(name.clone()),
                None => Host::Ip(endpoint.address.ip()),
            };
            let address = Address { host, port: NonZeroU16::new(endpoint.address.port())? };
            let record = Record {
                weight: Some(RawWeight(f64::from(endpoint.weight.get()))),
                health: endpoint.health,
                zone: endpoint.zone.clone(),
                version: endpoint.version.clone(),
                labels: endpoint.labels.clone(),
                ..Record::new(address, registration.place.clone())
            };
            Some(ConsulInstance { record, protocol: registration.protocol, fraction: None, created: 0 })
        });
    let instances: Vec<_> = instances.collect();
    ServiceInstances { listed: instances.len(), instances, ..ServiceInstances::default() }
}

/// Merges the instances of all datacenters into one service.
pub fn combine(source: &str, service: &ServiceName, reads: &[&ServiceInstances]) -> ParseResult {
    let place = place(source, service);
    let mut parsed = ParseResult::default();
    let mut instances: BTreeMap<&Address, ConsulInstance> = BTreeMap::new();
    for instance in reads.iter().flat_map(|read| &read.instances) {
        // An endpoint stays while any record of it exists, with the health of its healthiest record: an
        // instance that registers anew after a failure is listed twice for a while. Of two records with equal
        // health the younger one counts.
        let rank = |instance: &ConsulInstance| (health_rank(instance.record.health), instance.created);
        match instances.get_mut(&instance.record.address) {
            Some(known) if rank(known) >= rank(instance) => {}
            Some(known) => *known = instance.clone(),
            None => _ = instances.insert(&instance.record.address, instance.clone()),
        }
    }
    let mut instances: Vec<ConsulInstance> = instances.into_values().collect();
    distribute_shares(&mut instances);
    let (protocol, disagreement) = agreed_protocol(&instances);
    if let Some(disagreement) = disagreement {
        parsed.add_problem(place.clone(), subject_of(service), disagreement);
    }
    let mut bad = 0;
    for read in reads {
        bad += read.bad.len();
        parsed.problems.extend(read.notes.iter().cloned());
        for problem in &read.bad {
            parsed.add_bad_record(problem.place.clone(), &problem.subject, problem.message.clone());
        }
    }
    let head = ParsedService { protocol, ..ParsedService::new(service.clone(), place) };
    let records = instances.into_iter().map(|instance| instance.record).collect();
    parsed.add_service(head, records, bad, 1.0);
    parsed.finish()
}

fn health_rank(health: Health) -> u8 {
    match health {
        Health::Healthy => 3,
        Health::Unknown => 2,
        Health::Draining => 1,
        Health::Unhealthy => 0,
    }
}

/// The limit below which a remaining share is a rounding error.
const NO_SHARE: f64 = 1e-9;

/// Converts Fabio's weights, which are shares of all requests; instances without one get equal parts of the
/// rest.
fn distribute_shares(instances: &mut [ConsulInstance]) {
    let given: f64 = instances.iter().filter_map(|instance| instance.fraction).sum();
    let others = instances.iter().filter(|instance| instance.fraction.is_none()).count();
    if given == 0.0 {
        return;
    }
    #[expect(clippy::cast_precision_loss, reason = "no service has 2^52 endpoints")]
    let rest = (1.0 - given).max(0.0) / others.max(1) as f64;
    for instance in instances {
        let draining = instance.record.weight.is_some_and(|weight| weight.0 == 0.0);
        if !draining {
            let share = instance.fraction.unwrap_or(rest);
            // Whole numbers are not scaled again; a positive share must not become zero.
            let millionths = (share * f64::from(Weight::MAX)).round();
            let is_nothing = share < NO_SHARE;
            instance.record.weight = Some(RawWeight(if is_nothing { 0.0 } else { millionths.max(1.0) }));
        }
    }
}

/// Returns the protocol that most instances state, and a message if others state another one.
fn agreed_protocol(instances: &[ConsulInstance]) -> (Option<Protocol>, Option<String>) {
    let mut counts: BTreeMap<&str, (usize, Protocol)> = BTreeMap::new();
    for protocol in instances.iter().filter_map(|instance| instance.protocol) {
        counts.entry(protocol.as_str()).or_insert((0, protocol)).0 += 1;
    }
    let most = counts.values().max_by_key(|(count, _)| *count).map(|(_, protocol)| *protocol);
    let disagreement = (counts.len() > 1).then(|| {
        let each: Vec<_> = counts.iter().map(|(name, (count, _))| format!("{count} say `{name}`")).collect();
        format!(
            "its instances differ in protocol ({}): `{}` is used; set `protocol` in a `Service` document \
             to choose another",
            each.join(", "),
            most.unwrap_or_default()
        )
    });
    (most, disagreement)
}
