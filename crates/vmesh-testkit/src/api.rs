//! A client of the HTTP API of a control plane under test, or of any other HTTP server.

use std::net::SocketAddr;
use std::time::Duration;

use http::Method;
use serde_json::Value;
use vmesh_daemon::fetch::{Peer, fetch};

use crate::{Failed, Result};

const WITHIN: Duration = Duration::from_secs(10);

/// An HTTP server that is queried with `GET`.
#[derive(Debug, Clone, Copy)]
pub struct Api(pub SocketAddr);

impl Api {
    /// Returns the body of a response. A status other than 2xx is an error.
    pub async fn text(&self, path: &str) -> Result<String> {
        let answer = fetch(&Peer::Tcp(self.0), Method::GET, path, WITHIN).await;
        let (status, body) = answer.map_err(Failed::to(format!("could not ask {} for {path}", self.0)))?;
        let body = String::from_utf8_lossy(&body).into_owned();
        match status.is_success() {
            true => Ok(body),
            false => Err(Failed::new(format!("{} answered {status} for {path}: {body}", self.0))),
        }
    }

    /// Returns the status of a GET request, whatever it is.
    pub async fn status(&self, path: &str) -> Result<u16> {
        let answer = fetch(&Peer::Tcp(self.0), Method::GET, path, WITHIN).await;
        let (status, _) = answer.map_err(Failed::to(format!("no answer to {path} at {}", self.0)))?;
        Ok(status.as_u16())
    }

    pub async fn json(&self, path: &str) -> Result<Value> {
        let body = self.text(path).await?;
        serde_json::from_str(&body).map_err(Failed::to(format!("{path} is not JSON: {body}")))
    }

    /// Returns the sum of a metric over its labels; if `name` has labels, the value of that series.
    pub async fn metric(&self, name: &str) -> Result<f64> {
        let text = self.text("/metrics").await?;
        let values: Vec<f64> = text
            .lines()
            .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])))
            .filter_map(|line| line.rsplit(' ').next()?.parse().ok())
            .collect();
        match values.is_empty() {
            true => Err(Failed::new(format!("there is no metric {name} in\n{text}"))),
            false => Ok(values.iter().sum()),
        }
    }

    /// Returns `Ok` once the node `name` has accepted all of its resources; else its state.
    pub async fn is_synced(&self, name: &str) -> std::result::Result<(), String> {
        let nodes = self.json("/api/v1/nodes").await.map_err(|failed| failed.to_string())?;
        let all = nodes.get("nodes").and_then(Value::as_array).cloned().unwrap_or_default();
        match all.iter().find(|node| field(node, "name") == name) {
            Some(node) if field(node, "state") == "synced" => Ok(()),
            Some(node) => Err(format!("{} {}", field(node, "state"), field(node, "reason"))),
            None => Err("not connected".to_owned()),
        }
    }
}

/// Returns a text field; an empty string if it is missing or not a text.
pub fn field(value: &Value, name: &str) -> String {
    value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
}
