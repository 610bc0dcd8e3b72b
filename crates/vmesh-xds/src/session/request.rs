use crate::Kind;
use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};

/// What a client sends, in either variant of the protocol.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    Delta(DeltaDiscoveryRequest),
    Sotw(DiscoveryRequest),
}

impl Request {
    pub fn type_url(&self) -> &str {
        match self {
            Request::Delta(request) => &request.type_url,
            Request::Sotw(request) => &request.type_url,
        }
    }

    /// Who the client is: it must say so in its first request, and need not again (R01, R02).
    pub fn introduction(&self) -> Result<&Node, SessionError> {
        let node = match self {
            Request::Delta(request) => request.node.as_ref(),
            Request::Sotw(request) => request.node.as_ref(),
        };
        node.filter(|node| !node.id.is_empty()).ok_or(SessionError::NoNode)
    }
}

impl From<DeltaDiscoveryRequest> for Request {
    fn from(request: DeltaDiscoveryRequest) -> Request {
        Request::Delta(request)
    }
}

impl From<DiscoveryRequest> for Request {
    fn from(request: DiscoveryRequest) -> Request {
        Request::Sotw(request)
    }
}

/// Why a stream must end. All else that a client may send wrong costs it that request alone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    #[error("the first request of a stream must have `node.id`")]
    NoNode,
    #[error("an aggregated stream needs `type_url` in every request")]
    NoTypeUrl,
    #[error("a request of the other variant of the protocol")]
    OtherVariant,
    #[error("more than {limit} names of kind `{kind}` on one stream")]
    TooManyNames { kind: Kind, limit: usize },
    #[error("the names of kind `{kind}` on one stream take more than {limit} bytes")]
    NamesTooLong { kind: Kind, limit: usize },
}

impl SessionError {
    /// The number of the gRPC status.
    pub fn code(&self) -> u16 {
        match self {
            SessionError::NoNode | SessionError::NoTypeUrl | SessionError::OtherVariant => 3,
            SessionError::TooManyNames { .. } | SessionError::NamesTooLong { .. } => 8,
        }
    }
}
