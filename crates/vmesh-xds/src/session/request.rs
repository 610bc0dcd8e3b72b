//! Requests: decoding within limits, and the errors that end a stream.

use super::Protocol;
use crate::Kind;
use crate::summary::fields;
use prost::Message;
use vmesh_proto::envoy::config::core::v3::Node;
use vmesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};

/// A request of a client, in either variant of the protocol.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    Delta(DeltaDiscoveryRequest),
    Sotw(DiscoveryRequest),
}

/// Limits of one request. A request with many empty strings is small on the wire and large in memory, so its
/// fields are counted before it is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The limit of the encoded request, in bytes.
    pub bytes: usize,
    /// The limit of names, versions and locators in one request, counted together.
    pub names: usize,
}

impl Bounds {
    /// The limits before admission: enough for a client that reconnects with 15,000 resources.
    pub const BEFORE_ADMISSION: Bounds = Bounds { bytes: 1 << 20, names: 50_000 };
    /// The limits after admission. Each SotW request of Envoy repeats every name that it subscribes to (R59).
    pub const ADMITTED: Bounds = Bounds { bytes: 16 << 20, names: 250_000 };
}

/// The limit of the field `node`, in bytes. The node of an agent with a thousand upstreams takes a third of it.
const NODE_BYTES: usize = 256 << 10;
/// The limit of the error in a NACK, in bytes. Envoy's errors can quote whole resources.
const ERROR_BYTES: usize = 1 << 20;
/// The limit of structured details in an error. An agent sends one.
const ERROR_DETAILS: usize = 16;

/// The field numbers of `DeltaDiscoveryRequest` and `DiscoveryRequest`.
struct Tags {
    node: u32,
    error: u32,
    names: &'static [u32],
}

const DELTA: Tags = Tags { node: 1, error: 7, names: &[3, 4, 5, 8, 9] };
const SOTW: Tags = Tags { node: 2, error: 6, names: &[3, 7] };

impl Request {
    /// Decodes a client's message. A message that exceeds `bounds` is not decoded.
    pub fn decode(
        protocol: Protocol,
        message: bytes::Bytes,
        bounds: &Bounds,
    ) -> Result<Request, SessionError> {
        let tags = match protocol {
            Protocol::Delta => &DELTA,
            Protocol::Sotw => &SOTW,
        };
        tags.check(&message, bounds)?;
        let malformed = |error: prost::DecodeError| SessionError::Malformed(error.to_string());
        Ok(match protocol {
            Protocol::Delta => DeltaDiscoveryRequest::decode(message).map_err(malformed)?.into(),
            Protocol::Sotw => DiscoveryRequest::decode(message).map_err(malformed)?.into(),
        })
    }
    pub fn type_url(&self) -> &str {
        match self {
            Request::Delta(request) => &request.type_url,
            Request::Sotw(request) => &request.type_url,
        }
    }

    /// Returns the node of the client, which the first request of a stream must name and later ones may omit
    /// (R01, R02).
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

impl Tags {
    fn check(&self, message: &[u8], bounds: &Bounds) -> Result<(), SessionError> {
        let too_large = |items, limit| Err(SessionError::TooLarge { items, limit });
        if message.len() > bounds.bytes {
            return too_large("bytes", bounds.bytes);
        }
        let (mut names, mut node, mut error, mut details) = (0, 0, 0, 0);
        let counted = fields(message, |tag, content| {
            // Protobuf merges repeated occurrences of a field, so their lengths add up.
            if tag == self.node {
                node += content.len();
            } else if tag == self.error {
                error += content.len();
                // `google.rpc.Status.details`
                fields(content, |tag, _| {
                    details += usize::from(tag == 3);
                    Some(())
                })?;
            } else if self.names.contains(&tag) {
                names += 1;
            }
            Some(())
        });
        match counted {
            None => Err(SessionError::Malformed("it is not a message".to_owned())),
            Some(()) if names > bounds.names => too_large("names and versions", bounds.names),
            Some(()) if node > NODE_BYTES => too_large("bytes in `node`", NODE_BYTES),
            Some(()) if error > ERROR_BYTES => too_large("bytes in `error_detail`", ERROR_BYTES),
            Some(()) if details > ERROR_DETAILS => too_large("`error_detail.details`", ERROR_DETAILS),
            Some(()) => Ok(()),
        }
    }
}

/// The errors that end a stream. Any other mistake of a client affects only the request that contains it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    #[error("the first request of a stream must have `node.id`")]
    NoNode,
    #[error("an aggregated stream needs `type_url` in every request")]
    NoTypeUrl,
    #[error("a request of the other variant of the protocol")]
    OtherVariant,
    #[error("not a request: {0}")]
    Malformed(String),
    #[error("a request of more than {limit} {items}")]
    TooLarge { items: &'static str, limit: usize },
    #[error("more than {limit} names of kind `{kind}` on one stream")]
    TooManyNames { kind: Kind, limit: usize },
    #[error("the names of kind `{kind}` on one stream take more than {limit} bytes")]
    NamesTooLong { kind: Kind, limit: usize },
}

impl SessionError {
    /// Returns the gRPC status code with which the stream ends.
    pub fn code(&self) -> u16 {
        match self {
            SessionError::NoNode
            | SessionError::NoTypeUrl
            | SessionError::OtherVariant
            | SessionError::Malformed(_) => 3,
            SessionError::TooLarge { .. }
            | SessionError::TooManyNames { .. }
            | SessionError::NamesTooLong { .. } => 8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    const BOUNDS: Bounds = Bounds { bytes: 1 << 20, names: 10 };

    fn refused(protocol: Protocol, message: impl Into<Bytes>) -> String {
        Request::decode(protocol, message.into(), &BOUNDS).unwrap_err().to_string()
    }

    #[test]
    fn a_request_is_counted_before_it_is_decoded() {
        let empty = |tag: u8, count: usize| [tag << 3 | 2, 0].repeat(count);
        for (protocol, tags) in [(Protocol::Delta, &[3, 4, 5, 8, 9][..]), (Protocol::Sotw, &[3, 7])] {
            for tag in tags {
                assert_eq!(
                    refused(protocol, empty(*tag, 11)),
                    "a request of more than 10 names and versions",
                    "{protocol:?} {tag}"
                );
                assert!(Request::decode(protocol, empty(*tag, 10).into(), &BOUNDS).is_ok());
            }
        }
        let long = |tag: u8, len: usize| {
            let mut field = vec![tag << 3 | 2];
            prost::encoding::encode_varint(len as u64, &mut field);
            field.extend(vec![0; len]);
            field
        };
        assert_eq!(
            refused(Protocol::Delta, long(1, NODE_BYTES + 1)),
            "a request of more than 262144 bytes in `node`"
        );
        let half = long(2, NODE_BYTES / 2 + 1);
        assert!(refused(Protocol::Sotw, half.repeat(2)).contains("`node`"), "two of them are merged");
        assert_eq!(refused(Protocol::Delta, vec![0; 2 << 20]), "a request of more than 1048576 bytes");
        let details = [&[7 << 3 | 2, 40][..], &empty(3, 20)].concat();
        assert_eq!(refused(Protocol::Delta, details), "a request of more than 16 `error_detail.details`");
        assert!(refused(Protocol::Delta, &b"\xff\xff"[..]).starts_with("not a request"));
    }
}
