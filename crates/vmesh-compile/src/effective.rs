//! The effective settings of one service as called by one node: the settings of documents, with defaults for
//! the rest.

use std::time::Duration;

use vmesh_model::document::{ConnectionLimits, LoadBalancing, OutlierDetection, Retry, RetryOn, Timeouts};
use vmesh_model::{Protocol, Settings};

/// The default timeout for establishing a connection to an endpoint.
const CONNECT: Duration = Duration::from_secs(5);
/// The default request timeout. It equals Envoy's default for a route, but is written out in the
/// configuration.
const REQUEST: Duration = Duration::from_secs(15);
const HTTP_IDLE: Duration = Duration::from_secs(300);
const TCP_IDLE: Duration = Duration::from_secs(3600);

/// [`Settings`] in which every unset field has its default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EffectiveSettings {
    pub protocol: Protocol,
    pub load_balancing: LoadBalancing,
    pub connect: Duration,
    /// The request timeout. `None`: no limit, because gRPC calls carry their own deadline and a stream may
    /// stay open indefinitely.
    pub request: Option<Duration>,
    pub idle: Duration,
    pub retry: Retry,
    pub outlier_detection: OutlierDetection,
    pub connection_limits: ConnectionLimits,
}

/// Returns the default retry policy. It retries only requests that no endpoint started to process, so it is
/// safe for every method.
fn default_retry() -> Retry {
    Retry {
        attempts: 2,
        on: vec![RetryOn::ConnectFailure, RetryOn::RefusedStream, RetryOn::ResetBeforeRequest],
        per_try_timeout: None,
    }
}

impl EffectiveSettings {
    pub fn of(settings: &Settings, protocol: Protocol) -> EffectiveSettings {
        let Timeouts { connect, request, idle } = settings.timeouts;
        let built_in_request = match protocol {
            Protocol::Http | Protocol::Http2 => Some(REQUEST),
            _ => None,
        };
        let built_in_idle = if protocol.is_http() { HTTP_IDLE } else { TCP_IDLE };
        EffectiveSettings {
            protocol,
            load_balancing: settings.load_balancing.clone().unwrap_or_default(),
            connect: connect.map_or(CONNECT, |time| time.0),
            request: request.map(|time| time.0).or(built_in_request),
            idle: idle.map_or(built_in_idle, |time| time.0),
            retry: settings.retry.as_ref().map_or_else(default_retry, with_default_conditions),
            outlier_detection: settings.outlier_detection.unwrap_or_default(),
            connection_limits: settings.connection_limits.unwrap_or_default(),
        }
    }
}

/// Returns `retry` with the default conditions if it has none of its own.
pub fn with_default_conditions(retry: &Retry) -> Retry {
    if retry.on.is_empty() { Retry { on: default_retry().on, ..retry.clone() } } else { retry.clone() }
}
