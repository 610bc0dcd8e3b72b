//! The metrics of the control plane. Each scrape reads the current state, so that no value is tracked twice.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use vmesh_api::identity::IdentityStatus;
use vmesh_api::{Discovery, DiscoverySource, SourceCounters, SourceState};
use vmesh_xds::server::Counters;

use crate::control::Control;

/// The histogram of the time from a store's publication until a node acknowledged all of it.
#[derive(Debug, Clone)]
pub(crate) struct Propagation(Histogram);

impl Default for Propagation {
    fn default() -> Self {
        let bounds = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
        Propagation(Histogram::new(bounds))
    }
}

impl Propagation {
    pub(crate) fn observe(&self, took: Duration) {
        self.0.observe(took.as_secs_f64());
    }
}

/// Collects the metrics from [`Control`] and the xDS counters at each scrape.
pub(crate) struct MetricsCollector {
    pub(crate) control: std::sync::Weak<Control>,
    pub(crate) counters: Arc<Counters>,
}

impl fmt::Debug for MetricsCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MetricsCollector")
    }
}

impl Collector for MetricsCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        encode_xds(&mut encoder, &self.counters)?;
        let Some(control) = self.control.upgrade() else { return Ok(()) };
        encode_state(&mut encoder, &control)?;
        encode_nodes(&mut encoder, &control)?;
        encode_identities(&mut encoder, &control.identities.status())?;
        encode_discovery(&mut encoder, &control.actions.show())?;
        let histogram = &control.propagation().0;
        let help = "From the publication of a change to its acknowledgement by a node";
        let metric =
            encoder.encode_descriptor("vmesh_propagation_seconds", help, None, histogram.metric_type())?;
        histogram.encode(metric)
    }
}

/// Encodes the counters of the xDS server.
fn encode_xds(encoder: &mut DescriptorEncoder<'_>, counters: &Counters) -> fmt::Result {
    for (name, help, counter) in [
        (
            "vmesh_xds_connections_refused",
            "xDS connections that were closed because there were too many",
            &counters.connections_refused,
        ),
        (
            "vmesh_xds_connections_silent",
            "xDS connections that were closed because they sent no request",
            &counters.connections_silent,
        ),
        ("vmesh_xds_streams_opened", "xDS streams since the start", &counters.streams_opened),
        ("vmesh_xds_streams_refused", "xDS streams that were not served", &counters.streams_refused),
        ("vmesh_xds_requests", "Requests of xDS clients", &counters.requests),
        ("vmesh_xds_responses", "Responses to xDS clients", &counters.responses),
        ("vmesh_xds_resources_sent", "Resources in those responses", &counters.resources),
        ("vmesh_xds_bytes_sent", "Bytes of those responses", &counters.bytes),
        ("vmesh_xds_acks", "Responses that were accepted", &counters.acks),
        ("vmesh_xds_nacks", "Responses that were rejected", &counters.nacks),
        ("vmesh_xds_unknown_types", "Requests for types that are not served", &counters.unknown_types),
    ] {
        encode_counter(encoder, name, help, counter.load(Relaxed))?;
    }
    let encodings = "Resources encoded, each once for all streams";
    encode_counter(encoder, "vmesh_xds_encodings", encodings, vmesh_xds::encodings())?;
    encode_gauge(encoder, "vmesh_xds_streams", "xDS streams now", counters.streams.load(Relaxed) as f64)?;

    let connections = counters.connections.load(Relaxed) as f64;
    encode_gauge(encoder, "vmesh_xds_connections", "xDS connections now", connections)
}

/// Encodes what the control plane serves, and the state of its files.
fn encode_state(encoder: &mut DescriptorEncoder<'_>, control: &Control) -> fmt::Result {
    let world = control.world();
    let endpoints: usize = world.services.values().map(|service| service.endpoints.len()).sum();
    for (name, help, value) in [
        ("vmesh_services", "Services known", world.service_names().count()),
        ("vmesh_endpoints", "Endpoints of all services", endpoints),
        ("vmesh_documents", "Mesh documents in force", world.documents.len()),
        ("vmesh_problems", "Problems that `vmeshctl problems` lists", control.problems().len()),
        ("vmesh_shared_node_names", "Node names that two hosts share", control.shared_names()),
        ("vmesh_classes", "Classes of connected nodes for which services are compiled", control.classes()),
        (
            "vmesh_state_unwritten",
            "1 while a part of the last good state cannot be written",
            usize::from(control.write_status().failing.is_some()),
        ),
        ("vmesh_ready", "1 while the control plane is ready", usize::from(control.waiting_for().is_empty())),
    ] {
        encode_gauge(encoder, name, help, value as f64)?;
    }
    let help = "Writes of the last good state that failed";
    encode_counter(encoder, "vmesh_state_write_failures", help, control.write_status().failures)?;
    let help = "Unix time when the compiler last began with a change";
    encode_gauge(encoder, "vmesh_last_change_timestamp_seconds", help, control.changed_at().as_secs_f64())
}

/// Encodes security events, and the validity of the authority's certificates.
fn encode_identities(encoder: &mut DescriptorEncoder<'_>, status: &IdentityStatus) -> fmt::Result {
    let counts = &status.counts;
    for (name, help, count) in [
        ("vmesh_identity_joins", "Nodes that joined", counts.joined),
        ("vmesh_identity_join_refusals", "Joins that were refused", counts.join_refused),
        ("vmesh_identity_renewals", "Requests for certificates that were granted", counts.renewed),
        (
            "vmesh_identity_renewal_refusals",
            "Requests for certificates that were refused",
            counts.renew_refused,
        ),
        (
            "vmesh_identity_handshake_failures",
            "TLS handshakes at listen.xds that failed",
            counts.handshakes_failed,
        ),
        (
            "vmesh_identity_admission_denials",
            "xDS clients without the right identity",
            counts.admissions_denied,
        ),
    ] {
        encode_counter(encoder, name, help, count)?;
    }
    let Some(authority) = &status.authority else { return Ok(()) };
    for (name, help, expires) in [
        (
            "vmesh_identity_root_expires_timestamp_seconds",
            "Unix time when the root expires",
            authority.root_expires,
        ),
        (
            "vmesh_identity_intermediate_expires_timestamp_seconds",
            "Unix time when the intermediate of this control plane expires",
            authority.intermediate_expires,
        ),
    ] {
        encode_gauge(encoder, name, help, expires as f64)?;
    }
    Ok(())
}

/// Encodes the number of nodes in each state.
fn encode_nodes(encoder: &mut DescriptorEncoder<'_>, control: &Control) -> fmt::Result {
    let nodes = control.node_counts();
    let states = [
        ("synced", nodes.synced),
        ("pushing", nodes.pushing),
        ("rejected", nodes.rejected),
        ("offline", nodes.offline),
    ];
    encode_labelled_gauge(
        encoder,
        "vmesh_nodes",
        "Nodes by state",
        "state",
        &states.map(|(s, n)| (s.to_owned(), n as f64)),
    )
}

/// Encodes the content of `GET /api/v1/discovery` as metrics.
fn encode_discovery(encoder: &mut DescriptorEncoder<'_>, discovery: &Discovery) -> fmt::Result {
    let sources = &discovery.sources;
    let each = |value: &dyn Fn(&DiscoverySource) -> Option<f64>| -> Vec<(String, f64)> {
        sources.iter().filter_map(|source| Some((source.name.to_string(), value(source)?))).collect()
    };
    let ages = each(&|source| source.age_seconds.map(|age| age as f64));
    let help = "Seconds since a source last answered";
    encode_labelled_gauge(encoder, "vmesh_discovery_last_success_age_seconds", help, "source", &ages)?;
    let not_fresh = each(&|source| Some(f64::from(u8::from(source.state != SourceState::Fresh))));
    let help = "1 while a source is stale, held or frozen, or host names of it have no answer";
    encode_labelled_gauge(encoder, "vmesh_discovery_not_fresh", help, "source", &not_fresh)?;
    let held = each(&|source| Some(source.held.len() as f64));
    let help = "Changes of a source that are held, by service";
    encode_labelled_gauge(encoder, "vmesh_discovery_held", help, "source", &held)?;
    let missing = each(&|source| Some(source.missing as f64));
    let help = "Endpoints in use that a source does not list any more";
    encode_labelled_gauge(encoder, "vmesh_discovery_held_removals", help, "source", &missing)?;
    let unresolved = each(&|source| Some(source.unresolved as f64));
    let help = "Hostnames of a source that cannot be resolved";
    encode_labelled_gauge(encoder, "vmesh_discovery_unresolved_names", help, "source", &unresolved)?;
    let connections = each(&|source| Some(source.counters.connections as f64));
    let help = "Connections to the registry now";
    encode_labelled_gauge(encoder, "vmesh_discovery_connections", help, "source", &connections)?;
    let evicted = discovery.evicted.len() as f64;
    encode_gauge(encoder, "vmesh_discovery_evicted", "Endpoints that the operator has evicted", evicted)?;

    let states = [
        ("fresh", SourceState::Fresh),
        ("unresolved", SourceState::Unresolved),
        ("held", SourceState::Held),
        ("stale", SourceState::Stale),
        ("frozen", SourceState::Frozen),
    ];
    let kind = ConstGauge::new(0.0).metric_type();
    let help = "1 for the state in which a source is";
    let mut metric = encoder.encode_descriptor("vmesh_discovery_source_state", help, None, kind)?;
    for source in sources {
        for (name, state) in states {
            let is = f64::from(u8::from(source.state == state));
            let labels = [("source", &*source.name), ("state", name)];
            ConstGauge::new(is).encode(metric.encode_family(&labels)?)?;
        }
    }

    for (name, help, counter) in TOTALS {
        let kind = ConstCounter::new(0u64).metric_type();
        let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
        for source in sources {
            let labels = [("source", &*source.name)];
            ConstCounter::new(counter(&source.counters)).encode(metric.encode_family(&labels)?)?;
        }
    }
    for (name, help, by_reason) in REASONS {
        let kind = ConstCounter::new(0u64).metric_type();
        let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
        for source in sources {
            for (reason, number) in by_reason(&source.counters) {
                let labels = [("source", &*source.name), ("reason", &**reason)];
                ConstCounter::new(*number).encode(metric.encode_family(&labels)?)?;
            }
        }
    }
    Ok(())
}

type TotalMetric = (&'static str, &'static str, fn(&SourceCounters) -> u64);
type ReasonMetric = (&'static str, &'static str, fn(&SourceCounters) -> &BTreeMap<Arc<str>, u64>);

const TOTALS: [TotalMetric; 6] = [
    ("vmesh_discovery_reads", "Requests to a registry, reads of a file, lines of a plug-in", |c| c.reads),
    ("vmesh_discovery_failed_reads", "Reads that failed", |c| c.failed_reads),
    ("vmesh_discovery_bad_records", "Records that were left out", |c| c.bad_records),
    ("vmesh_discovery_index_resets", "Consul: the index went back or was missing", |c| c.index_resets),
    ("vmesh_discovery_sessions_expired", "ZooKeeper: sessions that expired", |c| c.sessions_expired),
    ("vmesh_discovery_connects", "Connections that were made", |c| c.connects),
];

const REASONS: [ReasonMetric; 2] = [
    ("vmesh_discovery_holds", "Changes that were held, by service", |c| &c.held),
    (
        "vmesh_discovery_rejected_updates",
        "Held changes that never took effect because the endpoints came back",
        |c| &c.rejected,
    ),
];

fn encode_counter(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    let counter = ConstCounter::new(value);
    counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)
}

fn encode_gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: f64) -> fmt::Result {
    let gauge = ConstGauge::new(value);
    gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
}

fn encode_labelled_gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    label: &str,
    values: &[(String, f64)],
) -> fmt::Result {
    let kind = ConstGauge::new(0.0).metric_type();
    let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
    for (of, value) in values {
        ConstGauge::new(*value).encode(metric.encode_family(&[(label, of.as_str())])?)?;
    }
    Ok(())
}
