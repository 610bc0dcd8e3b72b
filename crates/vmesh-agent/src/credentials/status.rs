//! The state of this node's identity, for `/status` and the metrics. It holds names and times, and no keys.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, SystemTime};

use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;
use serde::Serialize;
use vmesh_model::ServiceName;

use super::{ConfiguredServices, Credential, NodeCredentials};
use crate::status::{epoch_seconds, optional_epoch_seconds};

/// The stages of an identity.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum IdentityStage {
    /// The node has neither an identity nor a token.
    #[default]
    WaitingForToken,
    Joining,
    Valid,
    /// A certificate of the node has expired.
    Expired,
}

/// The identity of this node.
#[derive(Debug, Clone, Default, Serialize)]
pub struct IdentityStatus {
    pub stage: IdentityStage,
    pub node: Option<CertificateStatus>,
    pub services: BTreeMap<ServiceName, CertificateStatus>,
    /// Services of the configuration that the control plane does not let this node run or call as.
    pub not_granted: BTreeSet<ServiceName>,
    /// The version of the trust bundle, and the number of its roots.
    pub bundle: Option<String>,
    pub roots: usize,
    /// Time at which a control plane last confirmed the trust bundle.
    #[serde(serialize_with = "optional_epoch_seconds")]
    pub bundle_confirmed: Option<SystemTime>,
    /// The percentage of the certificates' validity that is left.
    pub percent_left: Option<u8>,
    /// Seconds by which the control plane's clock is ahead of this host's.
    pub clock_skew: Option<i64>,
    /// True if the node's Envoy accepts mTLS connections, as reported to the control planes.
    pub mtls_ready: bool,
    /// The last failure, until the next success.
    pub problem: Option<String>,
    /// A failure to save the identity: after a restart the node would have to join again.
    pub why_not_saved: Option<String>,
    pub renewals: u64,
    pub failures: u64,
    /// The validity of the certificates, from which [`IdentityStatus::at`] computes.
    #[serde(skip)]
    validity: Option<Validity>,
}

/// The validity of all certificates of a node together.
#[derive(Debug, Clone, Copy)]
struct Validity {
    not_after: SystemTime,
    lifetime: Duration,
}

/// One certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CertificateStatus {
    /// The SPIFFE id.
    pub id: String,
    #[serde(serialize_with = "epoch_seconds")]
    pub expires: SystemTime,
}

impl CertificateStatus {
    fn of(credential: &Credential) -> CertificateStatus {
        CertificateStatus { id: credential.id.to_string(), expires: credential.not_after }
    }
}

impl IdentityStatus {
    /// Sets all fields that follow from the credentials.
    pub fn show(&mut self, credentials: &NodeCredentials, configured: &ConfiguredServices) {
        self.node = Some(CertificateStatus::of(&credentials.node));
        let services = credentials.services.iter();
        self.services = services.map(|(name, one)| (name.clone(), CertificateStatus::of(one))).collect();
        self.not_granted = configured.not_granted(&credentials.granted);
        self.bundle = Some(credentials.bundle.version());
        self.roots = credentials.bundle.roots().len();
        self.stage = IdentityStage::Valid;
        self.validity =
            Some(Validity { not_after: credentials.not_after(), lifetime: credentials.lifetime() });
    }

    /// Returns the status at the time `now`: some fields change with time alone.
    pub fn at(mut self, now: SystemTime) -> IdentityStatus {
        if let Some(Validity { not_after, lifetime }) = self.validity {
            let share = share_left(not_after, lifetime, now);
            self.percent_left = Some((share.min(1.0) * 100.0) as u8);
            if not_after <= now {
                self.stage = IdentityStage::Expired;
            }
        }
        self
    }
}

/// Returns the rest of a validity that ends at `not_after` as a share of all of it: 1 when it begins, 0 when it has ended.
pub(super) fn share_left(not_after: SystemTime, lifetime: Duration, now: SystemTime) -> f64 {
    let left = not_after.duration_since(now).unwrap_or_default();
    if lifetime.is_zero() { 0.0 } else { left.as_secs_f64() / lifetime.as_secs_f64() }
}

/// Writes the metrics of an identity. A node that needs none has the metrics without values.
pub(crate) fn encode(
    status: Option<&IdentityStatus>,
    encoder: &mut DescriptorEncoder<'_>,
) -> Result<(), fmt::Error> {
    let now = SystemTime::now();
    let left = |expires: SystemTime| match expires.duration_since(now) {
        Ok(left) => left.as_secs_f64(),
        Err(passed) => -passed.duration().as_secs_f64(),
    };
    let help = "Time until the certificate expires; negative after that";
    let name = "vmesh_agent_certificate_expires_seconds";
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    let certificates =
        status.into_iter().flat_map(|status| status.node.iter().chain(status.services.values()));
    for certificate in certificates {
        let labels = [("id", certificate.id.as_str())];
        ConstGauge::new(left(certificate.expires)).encode(family.encode_family(&labels)?)?;
    }
    let mut gauge = |name: &str, help: &str, value: Option<f64>| {
        let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        value.map_or(Ok(()), |value| ConstGauge::new(value).encode(metric))
    };
    let flag = |is: bool| f64::from(u8::from(is));
    let valid = status.map(|status| flag(status.stage == IdentityStage::Valid));
    gauge("vmesh_agent_identity_valid", "Whether this node has certificates that are valid", valid)?;
    let ready = status.map(|status| flag(status.mtls_ready));
    gauge("vmesh_agent_mtls_ready", "Whether Envoy accepts mTLS connections of other nodes", ready)?;
    let confirmed = status.and_then(|status| now.duration_since(status.bundle_confirmed?).ok());
    let help = "How long ago a control plane last confirmed the trust bundle";
    gauge("vmesh_agent_trust_bundle_age_seconds", help, confirmed.map(|age| age.as_secs_f64()))?;
    let skew = status.and_then(|status| status.clock_skew).map(|skew| skew as f64);
    let help = "How far the clock of the control plane is ahead of this host's";
    gauge("vmesh_agent_clock_skew_seconds", help, skew)?;
    let mut counter = |name: &str, help: &str, value: Option<u64>| {
        let metric = encoder.encode_descriptor(name, help, None::<&Unit>, MetricType::Counter)?;
        value.map_or(Ok(()), |value| ConstCounter::new(value).encode(metric))
    };
    let renewals = status.map(|status| status.renewals);
    counter("vmesh_agent_renewals", "Renewals of the certificates", renewals)?;
    let failures = status.map(|status| status.failures);
    counter("vmesh_agent_renewal_failures", "Joins and renewals that failed", failures)
}

/// The shares of the validity at which an expiring certificate raises an alarm, in percent.
const ALARMS: [u8; 3] = [50, 25, 10];
/// A clock that differs by more than this raises a warning. Certificates are valid from five minutes before they are issued.
pub const SKEW_TOLERATED: Duration = Duration::from_secs(30);

/// Decides when an expiring certificate is worth a line in the log.
#[derive(Debug, Default)]
pub struct ExpiryAlarm {
    /// The last alarm for the present certificates, in percent.
    raised: Option<u8>,
}

impl ExpiryAlarm {
    /// Returns the percentage to warn of, once for each of 50, 25 and 10 percent. `share_left` is the rest of the validity, from 0 to 1.
    pub fn check(&mut self, share_left: f64) -> Option<u8> {
        let reached = ALARMS.into_iter().rfind(|percent| share_left * 100.0 <= f64::from(*percent))?;
        let is_news = self.raised.is_none_or(|raised| reached < raised);
        self.raised = Some(reached.min(self.raised.unwrap_or(reached)));
        is_news.then_some(reached)
    }

    /// Begins anew for renewed certificates.
    pub fn reset(&mut self) {
        self.raised = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alarm_is_raised_once_at_half_at_a_quarter_and_at_a_tenth() {
        let mut alarm = ExpiryAlarm::default();
        let shares = [1.0, 0.51, 0.5, 0.4, 0.25, 0.2, 0.1, 0.05, 0.0];
        let raised: Vec<_> = shares.into_iter().map(|share| alarm.check(share)).collect();
        assert_eq!(raised, [None, None, Some(50), None, Some(25), None, Some(10), None, None]);
        alarm.reset();
        assert_eq!(alarm.check(0.05), Some(10), "a host that was switched off for long");
    }
}
