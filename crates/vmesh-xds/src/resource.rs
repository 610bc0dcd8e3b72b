use crate::Kind;
use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use prost::encoding::{encode_varint, encoded_len_varint};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// A named xDS resource, encoded once when it is made.
///
/// A protobuf message is the concatenation of its fields, so a response is a small head of its own followed by
/// fields that all streams share. One allocation serves both variants of the protocol, because in both the
/// field number is 2 and the `Any` is written last:
///
/// ```text
///             delta()  = DeltaDiscoveryResponse.resources
///    ┌──────────────────────────────────────────────────────────┐
///    12 len  1a len name  0a len version  12 len  0a len type_url  12 len value
///                                         └───────────────────────────────────┘
///                                          sotw() = DiscoveryResponse.resources
/// ```
pub struct Resource {
    kind: Kind,
    name: Arc<str>,
    version: Box<str>,
    fingerprint: u64,
    encoded: Bytes,
    any_at: usize,
    value_at: usize,
}

static ENCODINGS: AtomicU64 = AtomicU64::new(0);

/// Returns how many messages this process has encoded. A change of one resource costs one encoding, however
/// many streams send it.
pub fn encodings() -> u64 {
    ENCODINGS.load(Ordering::Relaxed)
}

/// The length of a version. Every version has this length, so the version can be filled in after the bytes
/// behind it are written.
const VERSION_DIGITS: usize = 16;

impl Resource {
    /// Encodes `value`. The version is a hash of the content: the same on every replica and after every restart
    /// (R09).
    pub fn new(kind: Kind, name: impl Into<Arc<str>>, value: &impl Message) -> Arc<Resource> {
        ENCODINGS.fetch_add(1, Ordering::Relaxed);
        let mut layout = Layout::new(kind, name.into(), VERSION_DIGITS, value.encoded_len());
        // Encoding into a `BytesMut` cannot fail: it grows.
        _ = value.encode(&mut layout.buffer);
        layout.finish(None)
    }

    /// Makes a resource from a message that is already encoded. The version is the hash that [`Resource::new`]
    /// would compute.
    pub fn from_bytes(kind: Kind, name: impl Into<Arc<str>>, value: &[u8]) -> Arc<Resource> {
        let mut layout = Layout::new(kind, name.into(), VERSION_DIGITS, value.len());
        layout.buffer.put_slice(value);
        layout.finish(None)
    }

    /// Makes a resource that another server encoded and versioned. The version is opaque: it has a meaning only
    /// on that server.
    pub fn with_version(kind: Kind, name: impl Into<Arc<str>>, version: &str, value: &[u8]) -> Arc<Resource> {
        let mut layout = Layout::new(kind, name.into(), version.len(), value.len());
        layout.buffer.put_slice(value);
        layout.finish(Some(version))
    }

    /// Makes a tombstone: it states that the resource does not exist, in a
    /// [`Store::partial`](crate::Store::partial), where a missing name may still exist. A tombstone of the name
    /// `*` states that the store has all resources of the kind.
    pub fn absent(kind: Kind, name: impl Into<Arc<str>>) -> Arc<Resource> {
        Arc::new(Resource {
            kind,
            name: name.into(),
            version: Box::default(),
            fingerprint: 0,
            encoded: Bytes::new(),
            any_at: 0,
            value_at: 0,
        })
    }

    /// Returns a copy of this resource with a new fingerprint, to send it once more to clients that rejected
    /// it: a [`Session`](crate::Session) treats the copy as new content. `attempt` must differ for each copy.
    pub(crate) fn copy_to_retry(&self, attempt: u64) -> Arc<Resource> {
        Arc::new(Resource {
            kind: self.kind,
            name: self.name.clone(),
            version: self.version.clone(),
            fingerprint: xxh3_64_with_seed(&self.fingerprint.to_le_bytes(), attempt),
            encoded: self.encoded.clone(),
            any_at: self.any_at,
            value_at: self.value_at,
        })
    }

    /// Reports whether both have the same bytes and version, even if one of them is a [copy to
    /// retry](Resource::copy_to_retry).
    pub(crate) fn is_same_content(&self, other: &Resource) -> bool {
        self.kind == other.kind && self.encoded == other.encoded
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub fn version(&self) -> &str {
        &self.version
    }

    pub fn is_absent(&self) -> bool {
        self.encoded.is_empty()
    }

    /// The encoded message itself, which is the value of the `Any`.
    pub fn value(&self) -> Bytes {
        self.encoded.slice(self.value_at..)
    }

    /// A hash of version and content together. Sessions compare resources by it.
    pub(crate) fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// The whole field `resources` of a `DeltaDiscoveryResponse`.
    pub(crate) fn delta(&self) -> Bytes {
        self.encoded.clone()
    }

    /// The whole field `resources` of a `DiscoveryResponse`.
    pub(crate) fn sotw(&self) -> Bytes {
        self.encoded.slice(self.any_at..)
    }
}

/// Compares the content: two resources made from the same message are equal, wherever they were made.
impl PartialEq for Resource {
    fn eq(&self, other: &Resource) -> bool {
        self.kind == other.kind && self.fingerprint == other.fingerprint && self.name == other.name
    }
}

impl Eq for Resource {}

impl fmt::Debug for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}@{}", self.kind, self.name, self.version)
    }
}

/// A resource under construction: everything is written to `buffer` except the value, which goes to its end.
struct Layout {
    kind: Kind,
    name: Arc<str>,
    buffer: BytesMut,
    version_at: usize,
    any_at: usize,
    value_at: usize,
}

impl Layout {
    fn new(kind: Kind, name: Arc<str>, version_len: usize, value_len: usize) -> Layout {
        let type_url = kind.type_url();
        let any_len = field_len(type_url.len()) + field_len(value_len);
        let resource_len = field_len(name.len()) + field_len(version_len) + field_len(any_len);
        let mut buffer = BytesMut::with_capacity(field_len(resource_len));
        put_field_head(&mut buffer, 2, resource_len);
        put_field(&mut buffer, 3, name.as_bytes());
        put_field_head(&mut buffer, 1, version_len);
        let version_at = buffer.len();
        buffer.put_bytes(b'0', version_len);
        let any_at = buffer.len();
        put_field_head(&mut buffer, 2, any_len);
        put_field(&mut buffer, 1, type_url.as_bytes());
        put_field_head(&mut buffer, 2, value_len);
        let value_at = buffer.len();
        Layout { kind, name, buffer, version_at, any_at, value_at }
    }

    fn finish(self, version: Option<&str>) -> Arc<Resource> {
        let Layout { kind, name, mut buffer, version_at, any_at, value_at } = self;
        let content = xxh3_64(buffer.get(value_at..).unwrap_or_default());
        let version: Box<str> = match version {
            Some(version) => version.into(),
            None => format!("{content:0VERSION_DIGITS$x}").into(),
        };
        if let Some(place) = buffer.get_mut(version_at..any_at) {
            place.copy_from_slice(version.as_bytes());
        }
        let fingerprint = xxh3_64_with_seed(version.as_bytes(), content);
        Arc::new(Resource { kind, name, version, fingerprint, encoded: buffer.freeze(), any_at, value_at })
    }
}

/// The length of a whole length-delimited field. Every tag that vmesh writes takes one byte.
pub(crate) fn field_len(content_len: usize) -> usize {
    1 + encoded_len_varint(content_len as u64) + content_len
}

pub(crate) fn put_field_head(buffer: &mut impl BufMut, tag: u8, content_len: usize) {
    buffer.put_u8(tag << 3 | 2);
    encode_varint(content_len as u64, buffer);
}

pub(crate) fn put_field(buffer: &mut impl BufMut, tag: u8, content: &[u8]) {
    put_field_head(buffer, tag, content.len());
    buffer.put_slice(content);
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmesh_proto::envoy::config::cluster::v3::Cluster;
    use vmesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, DiscoveryResponse};

    fn cluster(name: &str) -> Cluster {
        Cluster { name: name.to_owned(), alt_stat_name: "x".repeat(300), ..Cluster::default() }
    }

    #[test]
    fn the_same_bytes_are_a_field_of_a_delta_response_and_of_a_sotw_response() {
        let resource = Resource::new(Kind::Cluster, "orders", &cluster("orders"));

        let delta = DeltaDiscoveryResponse::decode(resource.delta()).unwrap();
        assert_eq!(delta.resources.len(), 1);
        assert_eq!(delta.resources[0].name, "orders");
        assert_eq!(delta.resources[0].version, resource.version());
        let sotw = DiscoveryResponse::decode(resource.sotw()).unwrap();
        assert_eq!(sotw.resources, vec![delta.resources[0].resource.clone().unwrap()]);
        assert_eq!(sotw.resources[0].type_url, Kind::Cluster.type_url());
        assert_eq!(Cluster::decode(sotw.resources[0].value.clone()).unwrap(), cluster("orders"));
        assert_eq!(resource.value(), sotw.resources[0].value);

        let end = |bytes: &Bytes| bytes.as_ptr_range().end;
        assert_eq!(end(&resource.delta()), end(&resource.sotw()), "one allocation");
    }

    #[test]
    fn a_version_is_a_function_of_the_content_alone() {
        let (one, two) = (cluster("orders"), cluster("payments"));
        let made = Resource::new(Kind::Cluster, "orders", &one);
        assert_eq!(made.version().len(), 16);
        assert_eq!(
            made.version(),
            Resource::from_bytes(Kind::Cluster, "orders", &one.encode_to_vec()).version()
        );
        assert_ne!(made.version(), Resource::new(Kind::Cluster, "orders", &two).version());

        let relayed = Resource::with_version(Kind::Cluster, "orders", made.version(), &one.encode_to_vec());
        assert_eq!(made, relayed);
        let foreign = Resource::with_version(Kind::Cluster, "orders", "banana", &one.encode_to_vec());
        assert_eq!(foreign.version(), "banana");
        assert_ne!(made, foreign, "a client that reconnects must be told the new version");
    }

    #[test]
    fn empty_messages_and_empty_names_are_resources_too() {
        let resource = Resource::from_bytes(Kind::Secret, "", b"");
        let delta = DeltaDiscoveryResponse::decode(resource.delta()).unwrap();
        assert!(delta.resources[0].resource.as_ref().unwrap().value.is_empty());
        assert!(!resource.is_absent());
    }
}
