//! When a removal is believed: the `guard:` part of a source's configuration.

use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer};
use vmesh_model::ServiceName;
use vmesh_model::text::parse_duration;

/// When a removal is believed.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuardConfig {
    /// An endpoint that is gone stays for so long. Built in: 10 s for registries, whose clients lose their sessions
    /// and come back; nothing for files, since an edit is deliberate.
    #[serde(deserialize_with = "some_duration")]
    pub removal_hold: Option<Duration>,
    /// A service that is gone, or has no endpoints left, stays as it was for so long. Nothing believes it at once.
    #[serde(deserialize_with = "duration")]
    pub confirm_empty: Duration,
    /// A service that shrinks below `shrink_ratio` keeps its endpoints for so long. Nothing believes it at once.
    #[serde(deserialize_with = "duration")]
    pub confirm_shrink: Duration,
    /// How many more readings, as strong as the source can, have to say the same before either is believed.
    pub confirmations: u32,
    /// What share of its endpoints has to be left.
    #[serde(deserialize_with = "ratio")]
    pub shrink_ratio: f64,
    /// Services with fewer endpoints shrink as they like: one of two is half of them.
    pub shrink_min: usize,
    /// A service whose endpoints all become unhealthy within so long keeps the health that was known of them for as
    /// long. Nothing believes it at once.
    #[serde(deserialize_with = "duration")]
    pub confirm_unhealthy: Duration,
    /// What a source may lose at once as a whole.
    pub fleet: FleetConfig,
    /// What is known of a source that does not answer is given up after so long. Built in: never.
    #[serde(deserialize_with = "some_duration")]
    pub max_stale: Option<Duration>,
    /// Services that may lose everything at once.
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

    /// The defaults of a source that is edited on purpose.
    pub fn for_files(mut self) -> GuardConfig {
        self.removal_hold.get_or_insert(Duration::ZERO);
        self
    }

    /// How long an endpoint that is gone stays.
    pub fn removal_hold(&self) -> Duration {
        self.removal_hold.unwrap_or(Self::REMOVAL_HOLD)
    }
}

/// When so much is gone at once that it is the source that is doubted, and not each service.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FleetConfig {
    /// More than this share of the endpoints; 1 is never.
    #[serde(deserialize_with = "ratio")]
    pub endpoints: f64,
    /// More than this share of the services, and not one alone, which is judged by itself; 1 is never.
    #[serde(deserialize_with = "ratio")]
    pub services: f64,
    /// A source that knew fewer endpoints may lose what it likes, but not all endpoints of several services.
    pub min: usize,
    /// How long is at once.
    #[serde(deserialize_with = "duration")]
    pub window: Duration,
}

impl Default for FleetConfig {
    fn default() -> Self {
        FleetConfig { endpoints: 0.3, services: 0.2, min: 20, window: Duration::from_secs(60) }
    }
}

pub(crate) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    parse_duration(&String::deserialize(deserializer)?).map_err(de::Error::custom)
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
