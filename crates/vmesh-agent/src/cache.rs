//! The last configuration that Envoy accepted, on disk. A node that starts while no control plane answers serves it.
//!
//! The configuration never expires: an outdated configuration serves traffic, a missing one does not. Its age is in the status and the
//! metrics.

use std::path::Path;
use std::sync::Arc;

use prost::Message;
use vmesh_daemon::fsx::{self, FileError};
use vmesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource as ProtoResource};
use vmesh_proto::google::protobuf::Any;
use vmesh_xds::{Kind, Resource};
use xxhash_rust::xxh3::xxh3_64;

/// The first line of the file, for people who look at it. A checksum of the rest follows.
const HEAD: &[u8] = b"vmesh-agent: accepted configuration, format 1\n";

const LIMIT: u64 = 512 << 20;

#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("it is not a configuration of this version of vmesh, or it is damaged: {0}")]
    Damaged(&'static str),
    #[error("it is the configuration of node `{0}`")]
    Another(String),
}

/// Encodes the accepted resources. Absent resources are included: that a name does not exist was accepted too.
pub fn encode<'a>(node: &str, accepted: impl IntoIterator<Item = &'a Arc<Resource>>) -> Vec<u8> {
    let mut by_kind = Kind::ALL.map(|kind| DeltaDiscoveryResponse {
        type_url: kind.type_url().to_owned(),
        ..DeltaDiscoveryResponse::default()
    });
    for resource in accepted {
        let Some(message) = by_kind.get_mut(resource.kind() as usize) else { continue };
        if resource.is_absent() {
            message.removed_resources.push(resource.name().to_string());
        } else {
            message.resources.push(ProtoResource {
                name: resource.name().to_string(),
                version: resource.version().to_owned(),
                resource: Some(Any { type_url: message.type_url.clone(), value: resource.value() }),
                ..ProtoResource::default()
            });
        }
    }
    let mut bytes = [HEAD, &[0; 8]].concat();
    let owner =
        DeltaDiscoveryResponse { system_version_info: node.to_owned(), ..DeltaDiscoveryResponse::default() };
    for message in std::iter::once(&owner).chain(&by_kind) {
        bytes.extend_from_slice(&message.encode_length_delimited_to_vec());
    }
    let checksum = bytes.get(HEAD.len() + 8..).map(xxh3_64).unwrap_or_default();
    if let Some(place) = bytes.get_mut(HEAD.len()..HEAD.len() + 8) {
        place.copy_from_slice(&checksum.to_le_bytes());
    }
    bytes
}

pub fn decode(node: &str, bytes: &[u8]) -> Result<Vec<Arc<Resource>>, CacheError> {
    let rest = bytes.strip_prefix(HEAD).ok_or(CacheError::Damaged("its first line is another one"))?;
    let (checksum, mut rest) =
        rest.split_first_chunk::<8>().ok_or(CacheError::Damaged("it ends in the middle"))?;
    if xxh3_64(rest) != u64::from_le_bytes(*checksum) {
        return Err(CacheError::Damaged("the checksum does not fit"));
    }
    let mut message = || {
        let decoded = DeltaDiscoveryResponse::decode_length_delimited(&mut rest);
        decoded
            .map(|message| (message, rest.is_empty()))
            .map_err(|_| CacheError::Damaged("a message in it is none"))
    };
    let (owner, _) = message()?;
    if owner.system_version_info != node {
        return Err(CacheError::Another(owner.system_version_info));
    }
    let mut accepted = Vec::new();
    loop {
        let (message, last) = message()?;
        // A resource type that this version does not know was not served by it either.
        if let Some(kind) = Kind::from_type_url(&message.type_url) {
            for resource in message.resources {
                let value = resource.resource.map(|any| any.value).unwrap_or_default();
                accepted.push(Resource::with_version(kind, resource.name, &resource.version, &value));
            }
            accepted.extend(message.removed_resources.into_iter().map(|name| Resource::absent(kind, name)));
        }
        if last {
            return Ok(accepted);
        }
    }
}

/// Loads the file. Returns `None` if it does not exist, as on a node's first start.
pub fn load(node: &str, path: &Path) -> Result<Option<Vec<Arc<Resource>>>, CacheError> {
    match fsx::read_capped(path, LIMIT) {
        Ok(bytes) => decode(node, &bytes).map(Some),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepted() -> Vec<Arc<Resource>> {
        vec![
            Resource::with_version(Kind::Cluster, "orders", "17", b"cluster"),
            Resource::absent(Kind::Cluster, "*"),
            Resource::from_bytes(Kind::Endpoint, "orders", b"endpoints"),
            Resource::absent(Kind::Route, "gone"),
        ]
    }

    #[test]
    fn what_was_accepted_comes_back_with_the_versions_of_its_control_plane() {
        let decoded = decode("web-1", &encode("web-1", &accepted())).unwrap();
        let shown = |all: &[Arc<Resource>]| {
            let mut shown: Vec<_> = all
                .iter()
                .map(|one| format!("{one:?} {:?} {}", one.is_absent(), one.value().len()))
                .collect();
            shown.sort();
            shown
        };
        assert_eq!(shown(&decoded), shown(&accepted()));
        assert_eq!(decode("web-1", &encode("web-1", &[])).unwrap().len(), 0);
    }

    #[test]
    fn no_damage_goes_unseen() {
        let whole = encode("web-1", &accepted());
        for cut in 0..whole.len() {
            assert!(decode("web-1", &whole[..cut]).is_err(), "cut at {cut}");
            let mut flipped = whole.clone();
            flipped[cut] ^= 0x10;
            assert!(decode("web-1", &flipped).is_err(), "flipped at {cut}");
        }
    }

    #[test]
    fn another_version_s_kinds_are_passed_over() {
        let mut newer = encode("web-1", &accepted());
        let unknown = DeltaDiscoveryResponse {
            type_url: "type.googleapis.com/vmesh.agent.v2.Something".to_owned(),
            resources: vec![ProtoResource { name: "new".to_owned(), ..ProtoResource::default() }],
            ..DeltaDiscoveryResponse::default()
        };
        newer.extend(unknown.encode_length_delimited_to_vec());
        let checksum = xxh3_64(&newer[HEAD.len() + 8..]).to_le_bytes();
        newer[HEAD.len()..HEAD.len() + 8].copy_from_slice(&checksum);
        assert_eq!(decode("web-1", &newer).unwrap().len(), accepted().len());
    }

    #[test]
    fn the_configuration_of_another_node_is_not_served() {
        let error = decode("web-2", &encode("web-1", &accepted())).unwrap_err();
        assert_eq!(error.to_string(), "it is the configuration of node `web-1`");
    }
}
