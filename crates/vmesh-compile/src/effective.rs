//! What holds for one service as one node calls it: the documents' word, or what is built in.

use std::time::Duration;

use vmesh_model::document::{ConnectionLimits, LoadBalancing, OutlierDetection, Retry, RetryOn, Timeouts};
use vmesh_model::{Protocol, Settings};

/// Until a connection to an endpoint stands.
const CONNECT: Duration = Duration::from_secs(5);
/// Envoy's own default for a route, said aloud.
const REQUEST: Duration = Duration::from_secs(15);
const HTTP_IDLE: Duration = Duration::from_secs(300);
const TCP_IDLE: Duration = Duration::from_secs(3600);

/// [`Settings`] with every gap filled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective {
    pub protocol: Protocol,
    pub load_balancing: LoadBalancing,
    pub connect: Duration,
    /// `None`: no limit. gRPC calls bring their own deadline, and a stream may be open for ever.
    pub request: Option<Duration>,
    pub idle: Duration,
    pub retry: Retry,
    pub outlier_detection: OutlierDetection,
    pub connection_limits: ConnectionLimits,
}

/// Retries only what no instance has begun to work on, so that they are safe for every method.
fn safe_retry() -> Retry {
    Retry {
        attempts: 2,
        on: vec![RetryOn::ConnectFailure, RetryOn::RefusedStream, RetryOn::ResetBeforeRequest],
        per_try_timeout: None,
    }
}

impl Effective {
    pub fn of(settings: &Settings, protocol: Protocol) -> Effective {
        let Timeouts { connect, request, idle } = settings.timeouts;
        let built_in_request = match protocol {
            Protocol::Http | Protocol::Http2 => Some(REQUEST),
            _ => None,
        };
        let built_in_idle = if protocol.is_http() { HTTP_IDLE } else { TCP_IDLE };
        Effective {
            protocol,
            load_balancing: settings.load_balancing.clone().unwrap_or_default(),
            connect: connect.map_or(CONNECT, |time| time.0),
            request: request.map(|time| time.0).or(built_in_request),
            idle: idle.map_or(built_in_idle, |time| time.0),
            retry: settings.retry.as_ref().map_or_else(safe_retry, with_conditions),
            outlier_detection: settings.outlier_detection.unwrap_or_default(),
            connection_limits: settings.connection_limits.unwrap_or_default(),
        }
    }
}

/// A `retry` that does not say on what retries what is safe.
pub fn with_conditions(retry: &Retry) -> Retry {
    if retry.on.is_empty() { Retry { on: safe_retry().on, ..retry.clone() } } else { retry.clone() }
}
