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
pub struct SupervisorStatus {
    /// State, pid and version of the Envoy that serves.
    #[serde(flatten)]
    pub envoy: envoy::EnvoyStatus,
    pub epoch: Option<u32>,
    pub base_id: Option<u32>,
    /// Number of completed reloads.
    pub reloads: u64,
    /// The current step of a reload, or the reason why it waits.
    pub reload: Option<String>,
    /// The reason why the last reload failed, or why the serving Envoy exited.
    pub last_failure: Option<SupervisorFailure>,
    /// Set if the binary at `envoy.path` differs from the running one. A reload would start it.
    pub waiting_binary: Option<String>,
    /// The old Envoys that drain.
    pub leaving: Vec<DrainingEnvoyStatus>,
}

#[derive(Debug, Clone, Serialize)]
pub struct SupervisorFailure {
    #[serde(serialize_with = "crate::status::epoch_seconds")]
    pub at: SystemTime,
    pub what: String,
}

#[derive(Debug, Clone, Serialize)]
pub struct DrainingEnvoyStatus {
    pub pid: i32,
    pub epoch: u32,
    pub version: Option<String>,
    /// The deadline, at which Envoy is killed with any connections it still has.
    #[serde(serialize_with = "crate::status::epoch_seconds")]
    pub until: SystemTime,
}

impl SupervisorStatus {
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
            1 => line += "; an old Envoy drains",
            more => line += &format!("; {more} old Envoys drain"),
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
pub(super) struct StatusContext {
    pub(super) status: watch::Receiver<SupervisorStatus>,
    /// The admin socket of the Envoy that serves.
    pub(super) admin: PathBuf,
}

/// Serves the API. Never returns unless the listener fails.
pub(super) async fn serve(listener: UnixListener, context: StatusContext) -> io::Result<()> {
    axum::serve(listener, router(context)).await
}

fn router(context: StatusContext) -> Router {
    Router::new()
        .route("/status", get(status))
        .route("/ready", get(ready))
        .route("/stats", get(forward))
        .route("/stats/prometheus", get(forward))
        .route("/clusters", get(forward))
        .route("/listeners", get(forward))
        .route("/server_info", get(forward))
        .route("/init_dump", get(forward))
        .route("/memory", get(forward))
        .route("/config_dump", get(config_dump))
        .with_state(context)
}

async fn status(Shared(context): Shared<StatusContext>) -> Json<SupervisorStatus> {
    Json(context.status.borrow().clone())
}

async fn ready(Shared(context): Shared<StatusContext>) -> Response {
    let status = context.status.borrow().clone();
    match status.envoy.state {
        envoy::EnvoyState::Live => "LIVE\n".into_response(),
        _ => (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", status.line())).into_response(),
    }
}

/// Forwards a GET request to Envoy's admin interface. GET requests change nothing in Envoy.
async fn forward(Shared(context): Shared<StatusContext>, uri: Uri) -> Response {
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    match query_envoy(&context, path).await {
        Ok((status, body)) => {
            let kind =
                if body.first() == Some(&b'{') { "application/json" } else { "text/plain; charset=UTF-8" };
            (status, [(CONTENT_TYPE, kind)], body).into_response()
        }
        Err(refusal) => refusal,
    }
}

async fn query_envoy(context: &StatusContext, path: &str) -> Result<(StatusCode, Vec<u8>), Response> {
    match fetch(&Peer::Unix(context.admin.clone()), Method::GET, path, ANSWERS_WITHIN).await {
        Ok((status, body)) => Ok((status, body.to_vec())),
        Err(error) => Err((StatusCode::BAD_GATEWAY, format!("{}\n", one_line(&error))).into_response()),
    }
}

/// Returns Envoy's configuration without secrets, and with endpoints on request.
async fn config_dump(Shared(context): Shared<StatusContext>, uri: Uri) -> Response {
    let path = match uri.query() {
        None => "/config_dump",
        Some("include_eds") => "/config_dump?include_eds",
        Some(_) => {
            let message = "only /config_dump and /config_dump?include_eds are answered here\n";
            return (StatusCode::BAD_REQUEST, message).into_response();
        }
    };
    match query_envoy(&context, path).await {
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
        let mut status = SupervisorStatus {
            envoy: envoy::EnvoyStatus {
                state: envoy::EnvoyState::Live,
                pid: Some(7),
                version: Some("1.40.0".into()),
                ..envoy::EnvoyStatus::default()
            },
            epoch: Some(2),
            ..SupervisorStatus::default()
        };
        assert_eq!(status.line(), "Envoy 1.40.0 is live (pid 7, epoch 2)");
        status.leaving =
            vec![DrainingEnvoyStatus { pid: 6, epoch: 1, version: None, until: SystemTime::UNIX_EPOCH }];
        status.last_failure = Some(SupervisorFailure { at: SystemTime::UNIX_EPOCH, what: "it hung".into() });
        assert_eq!(
            status.line(),
            "Envoy 1.40.0 is live (pid 7, epoch 2); an old Envoy drains; \
             last failure: it hung"
        );
    }
}
