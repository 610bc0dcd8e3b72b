//! Any generated message as JSON, nested `Any`s expanded, as Envoy's `/config_dump` prints it.

use std::sync::OnceLock;

use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use serde_json::Value;

/// Why a message could not be printed or read.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    #[error("the built-in descriptor set could not be read: {0}")]
    Descriptors(String),
    #[error("message type `{0}` is not among the messages that vmesh was built with")]
    UnknownType(String),
    #[error("the bytes are not a message of type `{type_name}`: {cause}")]
    Malformed { type_name: String, cause: String },
}

fn pool() -> Result<&'static DescriptorPool, JsonError> {
    static POOL: OnceLock<Result<DescriptorPool, String>> = OnceLock::new();
    POOL.get_or_init(|| {
        DescriptorPool::decode(include_bytes!("descriptors.binpb").as_slice()).map_err(|e| e.to_string())
    })
    .as_ref()
    .map_err(|cause| JsonError::Descriptors(cause.clone()))
}

/// `message` as JSON with proto field names and defaults left out.
pub fn to_json<M: Message + Name>(message: &M) -> Result<Value, JsonError> {
    bytes_to_json(&M::full_name(), &message.encode_to_vec())
}

/// The encoded message `bytes` of type `type_name` (with or without `type.googleapis.com/`) as JSON.
pub fn bytes_to_json(type_name: &str, bytes: &[u8]) -> Result<Value, JsonError> {
    let name = type_name.rsplit('/').next().unwrap_or(type_name);
    let descriptor =
        pool()?.get_message_by_name(name).ok_or_else(|| JsonError::UnknownType(name.to_owned()))?;
    let malformed = |cause: String| JsonError::Malformed { type_name: name.to_owned(), cause };
    let message = DynamicMessage::decode(descriptor, bytes).map_err(|e| malformed(e.to_string()))?;
    let options = SerializeOptions::new().use_proto_field_name(true);
    message
        .serialize_with_options(serde_json::value::Serializer, &options)
        .map_err(|e| malformed(e.to_string()))
}
