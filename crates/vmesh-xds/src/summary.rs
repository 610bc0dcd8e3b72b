use crate::Kind;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// The names and versions in a delta response, without the content of its resources.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResponseSummary {
    pub kind: Option<Kind>,
    pub nonce: String,
    /// The names of the resources in the response.
    pub resources: Vec<String>,
    /// The version of each name in `resources`, in the same order.
    pub versions: Vec<String>,
    pub removed: Vec<String>,
}

impl ResponseSummary {
    /// Parses an encoded `DeltaDiscoveryResponse`. Returns `None` if the bytes are not a protobuf message.
    pub fn parse(message: &[u8]) -> Option<ResponseSummary> {
        let mut summary = ResponseSummary::default();
        fields(message, |tag, content| {
            match tag {
                2 => {
                    let (name, version) = name_and_version(content)?;
                    summary.resources.push(name);
                    summary.versions.push(version);
                }
                4 => summary.kind = Kind::from_type_url(std::str::from_utf8(content).ok()?),
                5 => summary.nonce = text(content)?,
                6 => summary.removed.push(text(content)?),
                _ => {}
            }
            Some(())
        })?;
        Some(summary)
    }
}

fn name_and_version(resource: &[u8]) -> Option<(String, String)> {
    let (mut name, mut version) = (String::new(), String::new());
    fields(resource, |tag, content| {
        match tag {
            1 => version = text(content)?,
            3 => name = text(content)?,
            _ => {}
        }
        Some(())
    })?;
    Some((name, version))
}

fn text(content: &[u8]) -> Option<String> {
    std::str::from_utf8(content).ok().map(str::to_owned)
}

/// Calls `field` with the tag and the content of each length-delimited field. Returns `None` if the message is
/// malformed or `field` returns `None`.
pub(crate) fn fields<'a>(
    mut message: &'a [u8],
    mut field: impl FnMut(u32, &'a [u8]) -> Option<()>,
) -> Option<()> {
    while !message.is_empty() {
        let (tag, wire_type) = decode_key(&mut message).ok()?;
        if wire_type == WireType::LengthDelimited {
            let len = usize::try_from(decode_varint(&mut message).ok()?).ok()?;
            let (content, rest) = message.split_at_checked(len)?;
            field(tag, content)?;
            message = rest;
        } else {
            skip_field(wire_type, tag, &mut message, DecodeContext::default()).ok()?;
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;
    use vmesh_proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};

    #[test]
    fn a_summary_has_names_and_versions() {
        let resource =
            |name: &str| Resource { name: name.into(), version: "1".into(), ..Resource::default() };
        let response = DeltaDiscoveryResponse {
            type_url: Kind::Endpoint.type_url().into(),
            nonce: "7".into(),
            resources: vec![resource("a"), resource("b")],
            removed_resources: vec!["c".into()],
            ..DeltaDiscoveryResponse::default()
        };
        let summary = ResponseSummary::parse(&response.encode_to_vec()).unwrap();
        assert_eq!(
            summary,
            ResponseSummary {
                kind: Some(Kind::Endpoint),
                nonce: "7".into(),
                resources: vec!["a".into(), "b".into()],
                versions: vec!["1".into(), "1".into()],
                removed: vec!["c".into()],
            }
        );
        assert_eq!(ResponseSummary::parse(b"\xff\xff\xff"), None);
        assert_eq!(ResponseSummary::parse(b"\x12\x7f"), None);
    }
}
