//! The HTTP status API of the supervisor, on a Unix socket that its group may use.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use axum::extract::State as Shared;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use http::header::CONTENT_TYPE;
use http::{Method, StatusCode, Uri};
use serde::Serialize;
use serde_json::Value;
use tokio::net::UnixListener;
use tokio::sync::watch;
use vmesh_daemon::fetch::{Peer, fetch};
use vmesh_daemon::report::one_line;

use crate::envoy;

/// Timeout for Envoy's answer. `/config_dump` of the largest node takes Envoy a second or two.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);

/// The content of `/status`.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Status {
    /// State, pid and version of the Envoy that serves.
    #[serde(flatten)]
    pub envoy: envoy::Status,
    pub epoch: Option<u32>,
    pub base_id: Option<u32>,
    /// Number of completed reloads.
    pub reloads: u64,
    /// The current step of a reload, or the reason why it waits.
    pub reload: Option<String>,
    /// Why the last reload failed, or why the serving Envoy exited.
    pub last_failure: Option<Failure>,
    /// Set if the binary at `envoy.path` differs from the running one. A reload would start it.
    pub waiting_binary: Option<String>,
    /// The old Envoys that drain.
    pub leaving: Vec<Leaving>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Failure {
    #[serde(serialize_with = "crate::status::epoch_seconds")]
    pub at: SystemTime,
    pub what: String,
}

#[derive(Debug, Clone, Serialize)]
pub struct Leaving {
    pub pid: i32,
    pub epoch: u32,
    pub version: Option<String>,
    /// The deadline, at which Envoy is killed with any connections it still has.
    #[serde(serialize_with = "crate::status::epoch_seconds")]
    pub until: SystemTime,
}

impl Status {
    /// Returns one line, for `systemctl status`.
    pub fn line(&self) -> String {
        let version = self.envoy.version.as_ref().map(|version| format!(" {version}")).unwrap_or_default();
        let mut line = format!("Envoy{version} is {}", crate::status::name_of(self.envoy.state));
        if let (Some(pid), Some(epoch)) = (self.envoy.pid, self.epoch) {
            line += &format!(" (pid {pid}, epoch {epoch})");
        }
        if let Some(reason) = &self.envoy.reason {
            line += &format!(": {reason}");
        }
        match self.leaving.len() {
            0 => {}
            1 => line += "; the one before it takes leave of its clients",
            more => line += &format!("; {more} before it take leave of their clients"),
        }
        for more in [&self.reload, &self.waiting_binary].into_iter().flatten() {
            line += &format!("; {more}");
        }
        if let Some(failure) = &self.last_failure {
            line += &format!("; last failure: {}", failure.what);
        }
        line
    }
}

/// The data that the request handlers read.
#[derive(Clone)]
pub(super) struct Known {
    pub(super) status: watch::Receiver<Status>,
    /// The admin socket of the Envoy that serves.
    pub(super) admin: PathBuf,
}

/// Serves the API. Never returns unless the listener fails.
pub(super) async fn serve(listener: UnixListener, known: Known) -> io::Result<()> {
    axum::serve(listener, router(known)).await
}

fn router(known: Known) -> Router {
    Router::new()
        .route("/status", get(status))
        .route("/ready", get(ready))
        .route("/stats", get(passage))
        .route("/stats/prometheus", get(passage))
        .route("/clusters", get(passage))
        .route("/listeners", get(passage))
        .route("/server_info", get(passage))
        .route("/init_dump", get(passage))
        .route("/memory", get(passage))
        .route("/config_dump", get(config_dump))
        .with_state(known)
}

async fn status(Shared(known): Shared<Known>) -> Json<Status> {
    Json(known.status.borrow().clone())
}

async fn ready(Shared(known): Shared<Known>) -> Response {
    let status = known.status.borrow().clone();
    match status.envoy.state {
        envoy::State::Live => "LIVE\n".into_response(),
        _ => (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", status.line())).into_response(),
    }
}

/// Forwards a GET request to Envoy's admin interface. GET requests change nothing in Envoy.
async fn passage(Shared(known): Shared<Known>, uri: Uri) -> Response {
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    match ask(&known, path).await {
        Ok((status, body)) => {
            let kind =
                if body.first() == Some(&b'{') { "application/json" } else { "text/plain; charset=UTF-8" };
            (status, [(CONTENT_TYPE, kind)], body).into_response()
        }
        Err(refusal) => refusal,
    }
}

async fn ask(known: &Known, path: &str) -> Result<(StatusCode, Vec<u8>), Response> {
    match fetch(&Peer::Unix(known.admin.clone()), Method::GET, path, ANSWERS_WITHIN).await {
        Ok((status, body)) => Ok((status, body.to_vec())),
        Err(error) => Err((StatusCode::BAD_GATEWAY, format!("{}\n", one_line(&error))).into_response()),
    }
}

/// Returns Envoy's configuration without secrets, and with endpoints on request.
async fn config_dump(Shared(known): Shared<Known>, uri: Uri) -> Response {
    let path = match uri.query() {
        None => "/config_dump",
        Some("include_eds") => "/config_dump?include_eds",
        Some(_) => {
            let said = "only /config_dump and /config_dump?include_eds are answered here\n";
            return (StatusCode::BAD_REQUEST, said).into_response();
        }
    };
    match ask(&known, path).await {
        Ok((StatusCode::OK, body)) => match serde_json::from_slice::<Value>(&body) {
            Ok(mut dump) => {
                remove_secrets(&mut dump);
                Json(dump).into_response()
            }
            Err(error) => {
                (StatusCode::BAD_GATEWAY, format!("Envoy's dump is no JSON: {error}\n")).into_response()
            }
        },
        Ok((status, body)) => (status, body).into_response(),
        Err(refusal) => refusal,
    }
}

/// Envoy redacts the secrets that it recognizes. Removing them altogether does not depend on that.
fn remove_secrets(dump: &mut Value) {
    if let Some(configs) = dump.get_mut("configs").and_then(Value::as_array_mut) {
        let is_secret = |config: &Value| {
            config.get("@type").and_then(Value::as_str).is_none_or(|name| name.ends_with("SecretsConfigDump"))
        };
        configs.retain(|config| !is_secret(config));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_dump_goes_out_without_its_secrets() {
        let mut dump = json!({"configs": [
            {"@type": "type.googleapis.com/envoy.admin.v3.ClustersConfigDump"},
            {"@type": "type.googleapis.com/envoy.admin.v3.SecretsConfigDump", "dynamic_active_secrets": []},
        ]});
        remove_secrets(&mut dump);
        assert_eq!(dump["configs"].as_array().unwrap().len(), 1);
    }

    #[test]
    fn a_line_says_what_serves_what_leaves_and_what_went_wrong() {
        let mut status = Status {
            envoy: envoy::Status {
                state: envoy::State::Live,
                pid: Some(7),
                version: Some("1.40.0".into()),
                ..envoy::Status::default()
            },
            epoch: Some(2),
            ..Status::default()
        };
        assert_eq!(status.line(), "Envoy 1.40.0 is live (pid 7, epoch 2)");
        status.leaving = vec![Leaving { pid: 6, epoch: 1, version: None, until: SystemTime::UNIX_EPOCH }];
        status.last_failure = Some(Failure { at: SystemTime::UNIX_EPOCH, what: "it hung".into() });
        assert_eq!(
            status.line(),
            "Envoy 1.40.0 is live (pid 7, epoch 2); the one before it takes leave of its clients; \
             last failure: it hung"
        );
    }
}
