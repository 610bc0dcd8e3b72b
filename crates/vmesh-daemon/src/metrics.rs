//! The text of `/metrics`, and the metrics of every process.

use std::fmt;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response, StatusCode};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

const OPENMETRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// Returns a registry that contains [`Process`].
pub fn registry() -> Registry {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Process::default()));
    registry
}

/// Returns the answer to `GET /metrics`, for hyper and axum alike.
pub fn response(registry: &Registry) -> Response<String> {
    let mut text = String::new();
    let status = match prometheus_client::encoding::text::encode(&mut text, registry) {
        Ok(()) => StatusCode::OK,
        Err(error) => {
            text = format!("the metrics could not be encoded: {error}\n");
            StatusCode::INTERNAL_SERVER_ERROR
        }
    };
    let mut response = Response::new(text);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, OPENMETRICS);
    response
}

/// The memory, open files and age of this process, read at each scrape.
#[derive(Debug)]
pub struct Process {
    started: Instant,
    started_at: f64,
}

impl Default for Process {
    fn default() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Process { started: Instant::now(), started_at: since.as_secs_f64() }
    }
}

/// Returns the resident memory in bytes; `None` without `/proc`.
pub fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

fn open_files() -> Option<u64> {
    // Subtract one for the descriptor of the directory itself.
    Some((std::fs::read_dir("/proc/self/fd").ok()?.count() as u64).saturating_sub(1))
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut gauge = |name, help, value: f64| {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
        };
        if let Some(bytes) = resident_bytes() {
            gauge("process_resident_memory_bytes", "Resident memory", bytes as f64)?;
        }
        if let Some(count) = open_files() {
            gauge("process_open_fds", "Open file descriptors", count as f64)?;
        }
        gauge(
            "process_start_time_seconds",
            "When the process started, seconds since the epoch",
            self.started_at,
        )?;
        gauge(
            "process_uptime_seconds",
            "How long the process has been running",
            self.started.elapsed().as_secs_f64(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_process_tells_its_memory_files_and_age() {
        let response = response(&registry());
        assert_eq!(response.status(), StatusCode::OK);
        let value = |name: &str| -> f64 {
            let line = response.body().lines().find(|line| line.starts_with(&format!("{name} ")));
            line.unwrap_or_else(|| panic!("no {name} in\n{}", response.body()))[name.len() + 1..]
                .parse()
                .unwrap()
        };
        assert!(value("process_resident_memory_bytes") > 500_000.0);
        assert!(value("process_open_fds") >= 3.0);
        assert!(value("process_start_time_seconds") > 1.7e9);
        assert!(value("process_uptime_seconds") >= 0.0);
        assert!(response.body().ends_with("# EOF\n"));
    }
}
