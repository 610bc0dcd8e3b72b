//! Why a request had no answer that can be used.

use std::time::Duration;

use crate::config::Address;

/// A request that failed: what was asked, whom, and why.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{method} {path} at {address} failed")]
pub struct ConsulError {
    pub method: &'static str,
    /// Without the query.
    pub path: String,
    pub address: Address,
    #[source]
    pub kind: ErrorKind,
}

/// What went wrong, as far as it makes a difference to whoever asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ErrorKind {
    /// Nobody answers there, or the connection broke.
    #[error("Consul cannot be reached: {0}")]
    Unreachable(String),
    #[error("no answer within {} s", .0.as_secs_f64())]
    Timeout(Duration),
    /// Elections take seconds; without a quorum it stays so.
    #[error("Consul has no leader: {0:?}; if that lasts, see `consul operator raft list-peers`")]
    NoLeader(String),
    /// The token is not known, has expired, or lacks the right.
    #[error("Consul refused the token (HTTP 403): {0:?}; see `token_file` and `consul acl token read -self`")]
    Forbidden(String),
    #[error("Consul knows no such thing (HTTP 404): {0:?}")]
    NotFound(String),
    /// This server has enough to do: another may answer.
    #[error("Consul limits its clients (HTTP 429): {0:?}; see `limits` of its configuration")]
    Limited(String),
    #[error("Consul answered HTTP {status}: {said:?}")]
    Server { status: u16, said: String },
    #[error("the answer is not what Consul is documented to say: {0}")]
    BadBody(String),
    /// A file that the client itself needs.
    #[error("{0}")]
    Credentials(String),
}

impl ErrorKind {
    /// Whether another server may do better.
    pub(crate) fn is_the_servers(&self) -> bool {
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

    /// What an answer with this status and text means; `None` if it is a good one.
    pub(crate) fn of(status: u16, body: &[u8]) -> Option<ErrorKind> {
        if (200..300).contains(&status) {
            return None;
        }
        let said: String = String::from_utf8_lossy(body).trim().chars().take(300).collect();
        Some(match status {
            403 => ErrorKind::Forbidden(said),
            404 => ErrorKind::NotFound(said),
            429 => ErrorKind::Limited(said),
            // Newer servers say 503 or 500, and the words are the same.
            _ if said.to_ascii_lowercase().contains("no cluster leader") => ErrorKind::NoLeader(said),
            // Some paths of older servers pass on a refusal as a failure of their own.
            500.. if said.contains("ACL not found") || said.contains("Permission denied") => {
                ErrorKind::Forbidden(said)
            }
            _ => ErrorKind::Server { status, said },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_told_by_its_status_and_its_words() {
        let kind = |status, body: &str| ErrorKind::of(status, body.as_bytes());
        assert_eq!(kind(200, "[]"), None);
        assert_eq!(kind(403, "ACL not found\n"), Some(ErrorKind::Forbidden("ACL not found".into())));
        assert_eq!(kind(500, "No cluster leader"), Some(ErrorKind::NoLeader("No cluster leader".into())));
        assert_eq!(
            kind(500, "rpc error: ACL not found"),
            Some(ErrorKind::Forbidden("rpc error: ACL not found".into()))
        );
        assert_eq!(kind(429, ""), Some(ErrorKind::Limited(String::new())));
        let no_path = kind(500, "No path to datacenter").unwrap();
        assert_eq!(no_path, ErrorKind::Server { status: 500, said: "No path to datacenter".into() });
        assert!(no_path.is_the_servers());
        assert_eq!(no_path.to_string(), "Consul answered HTTP 500: \"No path to datacenter\"");
    }
}
