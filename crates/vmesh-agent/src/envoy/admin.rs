//! Queries of Envoy's admin interface and of its supervisor's status API.

use std::path::Path;
use std::time::Duration;

use http::{Method, StatusCode};
use serde::Deserialize;
use tokio::net::UnixStream;
use vmesh_daemon::fetch::{FetchError, Peer, fetch};

const ANSWERS_WITHIN: Duration = Duration::from_secs(2);
/// Timeout of `/config_dump`: for a node with thousands of services, it takes Envoy a second or two.
const DUMPS_WITHIN: Duration = Duration::from_secs(20);

/// The part of `/server_info` that the agent uses.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct ServerInfo {
    /// Such as `<commit>/1.40.0/Clean/RELEASE/BoringSSL`.
    version: String,
    pub(crate) state: String,
}

impl ServerInfo {
    pub(crate) fn version(&self) -> &str {
        self.version.split('/').nth(1).unwrap_or(&self.version)
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum AdminError {
    #[error("Envoy's supervisor does not answer")]
    ChildSupervisor(#[source] FetchError),
    #[error("Envoy's admin interface does not answer")]
    Fetch(#[source] FetchError),
    #[error("Envoy refused `{path}` with {status}: {said}")]
    Refused { path: String, status: StatusCode, said: String },
    #[error("Envoy's answer is not what it was")]
    Malformed(#[source] serde_json::Error),
}

impl AdminError {
    /// Reports whether nothing listens on the socket, as opposed to a listener that does not answer.
    pub(crate) fn is_connect(&self) -> bool {
        matches!(self, AdminError::Fetch(error) | AdminError::ChildSupervisor(error) if error.is_connect())
    }
}

pub(crate) async fn server_info(socket: &Path) -> Result<ServerInfo, AdminError> {
    let body = query(socket, Method::GET, "/server_info").await?;
    serde_json::from_slice(&body).map_err(AdminError::Malformed)
}

/// Returns the status of Envoy from its supervisor on `socket`.
pub(crate) async fn supervisor_status(socket: &Path) -> Result<super::EnvoyStatus, AdminError> {
    let peer = Peer::Unix(socket.to_owned());
    let answer = fetch(&peer, Method::GET, "/status", ANSWERS_WITHIN).await;
    let (_, body) = answer.map_err(AdminError::ChildSupervisor)?;
    serde_json::from_slice(&body).map_err(AdminError::Malformed)
}

pub(crate) async fn post(socket: &Path, path: &str) -> Result<(), AdminError> {
    query(socket, Method::POST, path).await.map(|_| ())
}

/// Returns the number of open downstream connections, without those to the admin interface.
pub(crate) async fn connections(socket: &Path) -> Result<u64, AdminError> {
    let body = query(socket, Method::GET, "/stats?filter=^listener\\..*downstream_cx_active$").await?;
    let text = String::from_utf8_lossy(&body);
    let counts = text.lines().filter(|line| !line.starts_with("listener.admin."));
    Ok(counts.filter_map(|line| line.rsplit_once(": ")?.1.trim().parse::<u64>().ok()).sum())
}

/// Returns Envoy's complete configuration.
pub(crate) async fn config_dump(socket: &Path) -> Result<serde_json::Value, AdminError> {
    let body = query(socket, Method::GET, "/config_dump").await?;
    serde_json::from_slice(&body).map_err(AdminError::Malformed)
}

/// Returns the number of cluster and listener updates that Envoy rejected.
pub(crate) async fn rejected(socket: &Path) -> Result<u64, AdminError> {
    let body = query(
        socket,
        Method::GET,
        "/stats?filter=^(cluster_manager.cds|listener_manager.lds).update_rejected$",
    )
    .await?;
    let text = String::from_utf8_lossy(&body);
    Ok(text.lines().filter_map(|line| line.rsplit_once(": ")?.1.trim().parse::<u64>().ok()).sum())
}

async fn query(socket: &Path, method: Method, path: &str) -> Result<Vec<u8>, AdminError> {
    let peer = Peer::Unix(socket.to_owned());
    let within = if path == "/config_dump" { DUMPS_WITHIN } else { ANSWERS_WITHIN };
    match fetch(&peer, method, path, within).await.map_err(AdminError::Fetch)? {
        (StatusCode::OK, body) => Ok(body.to_vec()),
        (status, body) => Err(AdminError::Refused {
            path: path.to_owned(),
            status,
            said: String::from_utf8_lossy(&body).trim().chars().take(200).collect(),
        }),
    }
}

/// Returns the pid of the process that listens on the socket.
pub(crate) async fn listening_pid(socket: &Path) -> Option<i32> {
    let stream = tokio::time::timeout(ANSWERS_WITHIN, UnixStream::connect(socket)).await.ok()?.ok()?;
    stream.peer_cred().ok()?.pid()
}
