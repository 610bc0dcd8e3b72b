//! The `guard:` part of a source's configuration: when a removal is believed.

use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer};
use vmesh_model::ServiceName;

use crate::config_values::duration;

/// The configuration of a [`Guard`](super::Guard): when a removal is believed.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuardConfig {
    /// The time for which a removed endpoint stays in use. Default: 10 s for registries, whose clients lose their
    /// sessions and come back; zero for files, because an edit is deliberate.
    #[serde(deserialize_with = "some_duration")]
    pub removal_hold: Option<Duration>,
    /// The time for which an absent service, or a service listed without endpoints, keeps its previous endpoints. Zero:
    /// it is believed at once.
    #[serde(deserialize_with = "duration")]
    pub confirm_empty: Duration,
    /// The time for which a service that shrinks below `shrink_ratio` keeps its endpoints. Zero: it is believed at
    /// once.
    #[serde(deserialize_with = "duration")]
    pub confirm_shrink: Duration,
    /// The number of further reads, with the strongest consistency of the source, that must report the same before
    /// either is believed.
    pub confirmations: u32,
    /// The minimum share of endpoints that a service must keep, from 0 to 1.
    #[serde(deserialize_with = "ratio")]
    pub shrink_ratio: f64,
    /// The number of endpoints from which `shrink_ratio` applies. A smaller service may shrink freely: one of
    /// two endpoints is already half.
    pub shrink_min: usize,
    /// The window for failing health: if all endpoints of a service become unhealthy within it, their previous health is kept for the
    /// same time. Zero: it is believed at once.
    #[serde(deserialize_with = "duration")]
    pub confirm_unhealthy: Duration,
    /// The limits of a simultaneous loss over the whole source.
    pub fleet: FleetConfig,
    /// The time for which a source may fail before its last good view is dropped. Default: never.
    #[serde(deserialize_with = "some_duration")]
    pub max_stale: Option<Duration>,
    /// Services that may lose all endpoints at once.
    pub allow_empty: Vec<ServiceName>,
}

impl Default for GuardConfig {
    fn default() -> Self {
        GuardConfig {
            removal_hold: None,
            confirm_empty: Duration::from_secs(30),
            confirm_shrink: Duration::from_secs(60),
            confirmations: 2,
            shrink_ratio: 0.5,
            shrink_min: 5,
            confirm_unhealthy: Duration::from_secs(30),
            fleet: FleetConfig::default(),
            max_stale: None,
            allow_empty: Vec::new(),
        }
    }
}

impl GuardConfig {
    const REMOVAL_HOLD: Duration = Duration::from_secs(10);

    /// Applies the defaults of a source that is edited on purpose.
    pub fn for_files(mut self) -> GuardConfig {
        self.removal_hold.get_or_insert(Duration::ZERO);
        self
    }

    /// Returns how long an endpoint that is no longer listed stays in use.
    pub fn removal_hold(&self) -> Duration {
        self.removal_hold.unwrap_or(Self::REMOVAL_HOLD)
    }
}

/// The loss from which the source as a whole is held, rather than each service.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FleetConfig {
    /// The share of all endpoints above which the loss is too much; 1 means never.
    #[serde(deserialize_with = "ratio")]
    pub endpoints: f64,
    /// The share of all services above which the loss is too much, if more than one is lost: a single service
    /// is judged by its own rules. 1 means never.
    #[serde(deserialize_with = "ratio")]
    pub services: f64,
    /// The number of endpoints from which the shares apply. A smaller source may lose any share, but not all
    /// endpoints of several services.
    pub min: usize,
    /// The window within which losses count as simultaneous.
    #[serde(deserialize_with = "duration")]
    pub window: Duration,
}

impl Default for FleetConfig {
    fn default() -> Self {
        FleetConfig { endpoints: 0.3, services: 0.2, min: 20, window: Duration::from_secs(60) }
    }
}

fn some_duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    duration(deserializer).map(Some)
}

fn ratio<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let ratio = f64::deserialize(deserializer)?;
    if (0.0..=1.0).contains(&ratio) {
        Ok(ratio)
    } else {
        Err(de::Error::custom(format!("{ratio} is not a share: from 0 to 1")))
    }
}
