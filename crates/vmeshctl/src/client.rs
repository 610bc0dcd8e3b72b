//! The client of the control plane's HTTP API.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use vmesh_api::identity::{
    BundleAnswer, IdentityStatus, InitRequest, RotationRequest, RotationStatus, TokenAnswer, TokenRequest,
    Tokens,
};
use vmesh_api::{
    AcceptRequest, ActionResult, Discovery, EndpointRequest, Events, Explanation, Failure, Nodes, Problems,
    Services, SourceSelector, Status,
};
use vmesh_daemon::fetch::{FetchError, Peer, fetch, post};

use vmesh_model::NodeName;

use crate::print::printable;

const WITHIN: Duration = Duration::from_secs(10);

/// The address of a control plane's API.
#[derive(Debug, Clone)]
pub(crate) struct Api(Peer);

/// Why a request to the API failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    #[error(
        "could not ask the control plane at {peer}; is vmesh-control running there? (--api or $VMESH_API says where)"
    )]
    Unreachable {
        peer: Peer,
        #[source]
        cause: Box<FetchError>,
    },
    #[error("the control plane at {peer} answered {status}: {message}")]
    Refused { peer: Peer, status: StatusCode, message: String },
    #[error("{0}")]
    Unknown(String),
    #[error("what answers at {peer} is not a vmesh control plane of this version: {cause}")]
    Foreign { peer: Peer, cause: serde_json::Error },
    #[error("could not read {path}")]
    File {
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },
    #[error("the answer could not be printed: {0}")]
    Print(serde_json::Error),
}

impl FromStr for Api {
    type Err = String;

    fn from_str(text: &str) -> Result<Api, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Api(Peer::Unix(PathBuf::from(path))));
        }
        let address = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
        let found: Result<Option<SocketAddr>, _> = address.to_socket_addrs().map(|mut all| all.next());
        match found {
            Ok(Some(address)) => Ok(Api(Peer::Tcp(address))),
            Ok(None) | Err(_) => Err(format!(
                "`{text}` is not an API address: write http://127.0.0.1:15014 or unix:/var/lib/vmesh-control/api.sock"
            )),
        }
    }
}

impl Api {
    pub(crate) async fn status(&self) -> Result<Status, ApiError> {
        self.request(Method::GET, "/api/v1/status").await
    }

    pub(crate) async fn services(&self) -> Result<Services, ApiError> {
        self.request(Method::GET, "/api/v1/services").await
    }

    pub(crate) async fn nodes(&self) -> Result<Nodes, ApiError> {
        self.request(Method::GET, "/api/v1/nodes").await
    }

    pub(crate) async fn problems(&self) -> Result<Problems, ApiError> {
        self.request(Method::GET, "/api/v1/problems").await
    }

    pub(crate) async fn explain(&self, service: &str, from: &str) -> Result<Explanation, ApiError> {
        let path = format!("/api/v1/explain?service={}&from={}", escaped(service), escaped(from));
        self.request(Method::GET, &path).await
    }

    pub(crate) async fn forget(&self, node: &str) -> Result<ActionResult, ApiError> {
        self.request(Method::DELETE, &format!("/api/v1/nodes/{}", escaped(node))).await
    }

    pub(crate) async fn forget_offline_for(&self, longer: Duration) -> Result<ActionResult, ApiError> {
        let longer = vmesh_model::text::show_duration(longer);
        self.request(Method::DELETE, &format!("/api/v1/nodes?offline_for={}", escaped(&longer))).await
    }

    pub(crate) async fn discovery(&self) -> Result<Discovery, ApiError> {
        self.request(Method::GET, "/api/v1/discovery").await
    }

    pub(crate) async fn discovery_events(&self) -> Result<Events, ApiError> {
        self.request(Method::GET, "/api/v1/discovery/events").await
    }

    pub(crate) async fn accept(&self, accept: &AcceptRequest) -> Result<ActionResult, ApiError> {
        self.post_json("/api/v1/discovery/accept", accept).await
    }

    pub(crate) async fn evict(&self, endpoint: &EndpointRequest) -> Result<ActionResult, ApiError> {
        self.post_json("/api/v1/discovery/evict", endpoint).await
    }

    pub(crate) async fn admit(&self, endpoint: &EndpointRequest) -> Result<ActionResult, ApiError> {
        self.post_json("/api/v1/discovery/admit", endpoint).await
    }

    pub(crate) async fn freeze(&self, selector: &SourceSelector) -> Result<ActionResult, ApiError> {
        self.post_json("/api/v1/discovery/freeze", selector).await
    }

    pub(crate) async fn thaw(&self, selector: &SourceSelector) -> Result<ActionResult, ApiError> {
        self.post_json("/api/v1/discovery/thaw", selector).await
    }

    pub(crate) async fn identity(&self) -> Result<IdentityStatus, ApiError> {
        self.request(Method::GET, "/api/v1/identity").await
    }

    pub(crate) async fn init_authority(&self, request: &InitRequest) -> Result<IdentityStatus, ApiError> {
        self.post_json("/api/v1/identity/init", request).await
    }

    pub(crate) async fn bundle(&self) -> Result<BundleAnswer, ApiError> {
        self.request(Method::GET, "/api/v1/identity/bundle").await
    }

    pub(crate) async fn rotation(&self) -> Result<RotationStatus, ApiError> {
        self.request(Method::GET, "/api/v1/identity/rotation").await
    }

    pub(crate) async fn rotate(&self, request: &RotationRequest) -> Result<RotationStatus, ApiError> {
        self.post_json("/api/v1/identity/rotation", request).await
    }

    pub(crate) async fn tokens(&self) -> Result<Tokens, ApiError> {
        self.request(Method::GET, "/api/v1/tokens").await
    }

    pub(crate) async fn create_token(&self, request: &TokenRequest) -> Result<TokenAnswer, ApiError> {
        self.post_json("/api/v1/tokens", request).await
    }

    pub(crate) async fn revoke_token(&self, id: &str) -> Result<ActionResult, ApiError> {
        self.request(Method::DELETE, &format!("/api/v1/tokens/{}", escaped(id))).await
    }

    pub(crate) async fn set_ban(&self, node: &NodeName, is_banned: bool) -> Result<ActionResult, ApiError> {
        let action = if is_banned { "ban" } else { "unban" };
        let path = format!("/api/v1/nodes/{}/{action}", escaped(node.as_str()));
        self.answer(post(&self.0, &path, Bytes::new(), WITHIN).await)
    }

    async fn request<T: DeserializeOwned>(&self, method: Method, path: &str) -> Result<T, ApiError> {
        self.answer(fetch(&self.0, method, path, WITHIN).await)
    }

    async fn post_json<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ApiError> {
        let body = serde_json::to_vec(body).map_err(ApiError::Print)?;
        self.answer(post(&self.0, path, body.into(), WITHIN).await)
    }

    fn answer<T: DeserializeOwned>(
        &self,
        answer: Result<(StatusCode, Bytes), FetchError>,
    ) -> Result<T, ApiError> {
        let peer = self.0.clone();
        let (status, body) =
            answer.map_err(|cause| ApiError::Unreachable { peer: peer.clone(), cause: Box::new(cause) })?;
        if status.is_success() {
            return serde_json::from_slice(&body).map_err(|cause| ApiError::Foreign { peer, cause });
        }
        let answer: Option<Failure> = serde_json::from_slice(&body).ok();
        let message =
            answer.map_or_else(|| String::from_utf8_lossy(&body).into_owned(), |answer| answer.error);
        let message = printable(&message);
        match status {
            StatusCode::NOT_FOUND if !message.is_empty() => Err(ApiError::Unknown(message)),
            _ => Err(ApiError::Refused { peer, status, message }),
        }
    }
}

/// Percent-encodes `text` for a URL, except for unreserved characters (RFC 3986, 2.1).
fn escaped(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' => out.push(char::from(byte)),
            other => out.push_str(&format!("%{other:02X}")),
        }
        out
    })
}
