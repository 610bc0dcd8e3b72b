//! The errors of requests.

use std::time::Duration;

use crate::config::Address;

/// A failed request: its path, its address, and the reason.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{method} {path} at {address} failed")]
pub struct ConsulError {
    pub method: &'static str,
    /// The path without its query parameters.
    pub path: String,
    pub address: Address,
    #[source]
    pub kind: ErrorKind,
}

/// The reason of a failure, as far as callers distinguish reasons.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ErrorKind {
    /// Connecting failed, or the connection broke.
    #[error("Consul cannot be reached: {0}")]
    Unreachable(String),
    #[error("no answer within {} s", .0.as_secs_f64())]
    Timeout(Duration),
    /// An election takes seconds; without a quorum the state lasts.
    #[error("Consul has no leader: {0:?}; if that lasts, see `consul operator raft list-peers`")]
    NoLeader(String),
    /// The token is unknown or expired, or lacks a permission.
    #[error("Consul refused the token (HTTP 403): {0:?}; see `token_file` and `consul acl token read -self`")]
    Forbidden(String),
    #[error("Consul does not know what was requested (HTTP 404): {0:?}")]
    NotFound(String),
    /// The server limits its clients; another server may answer.
    #[error("Consul limits its clients (HTTP 429): {0:?}; see `limits` of its configuration")]
    Limited(String),
    #[error("Consul answered HTTP {status}: {message:?}")]
    Server { status: u16, message: String },
    #[error("the answer is not in Consul's documented format: {0}")]
    BadBody(String),
    /// A file that the client needs cannot be used.
    #[error("{0}")]
    Credentials(String),
}

impl ErrorKind {
    /// Reports whether another server might answer the same request.
    pub(crate) fn is_server_specific(&self) -> bool {
        match self {
            ErrorKind::Unreachable(_)
            | ErrorKind::Timeout(_)
            | ErrorKind::NoLeader(_)
            | ErrorKind::Limited(_) => true,
            ErrorKind::Server { status, .. } => *status >= 500,
            ErrorKind::Forbidden(_)
            | ErrorKind::NotFound(_)
            | ErrorKind::BadBody(_)
            | ErrorKind::Credentials(_) => false,
        }
    }

    /// Returns the error that a response means, or `None` for a 2xx status.
    pub(crate) fn from_response(status: u16, body: &[u8]) -> Option<ErrorKind> {
        if (200..300).contains(&status) {
            return None;
        }
        let message: String = String::from_utf8_lossy(body).trim().chars().take(300).collect();
        Some(match status {
            403 => ErrorKind::Forbidden(message),
            404 => ErrorKind::NotFound(message),
            429 => ErrorKind::Limited(message),
            // Newer servers answer 503 or 500, with the same text.
            _ if message.to_ascii_lowercase().contains("no cluster leader") => ErrorKind::NoLeader(message),
            // Some endpoints of older servers report a rejected token as an internal error.
            500.. if message.contains("ACL not found") || message.contains("Permission denied") => {
                ErrorKind::Forbidden(message)
            }
            _ => ErrorKind::Server { status, message },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_told_by_its_status_and_its_words() {
        let kind = |status, body: &str| ErrorKind::from_response(status, body.as_bytes());
        assert_eq!(kind(200, "[]"), None);
        assert_eq!(kind(403, "ACL not found\n"), Some(ErrorKind::Forbidden("ACL not found".into())));
        assert_eq!(kind(500, "No cluster leader"), Some(ErrorKind::NoLeader("No cluster leader".into())));
        assert_eq!(
            kind(500, "rpc error: ACL not found"),
            Some(ErrorKind::Forbidden("rpc error: ACL not found".into()))
        );
        assert_eq!(kind(429, ""), Some(ErrorKind::Limited(String::new())));
        let no_path = kind(500, "No path to datacenter").unwrap();
        assert_eq!(no_path, ErrorKind::Server { status: 500, message: "No path to datacenter".into() });
        assert!(no_path.is_server_specific());
        assert_eq!(no_path.to_string(), "Consul answered HTTP 500: \"No path to datacenter\"");
    }
}
