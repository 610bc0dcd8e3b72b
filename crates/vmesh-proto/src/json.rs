//! Any generated message as JSON, nested `Any`s expanded, as Envoy's `/config_dump` prints it.

use std::sync::OnceLock;

use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use serde_json::{Map, Value, json};

use crate::agent::{Destination, destination};

/// The reason why a message could not be printed or read.
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
    if name == Destination::full_name() {
        let malformed =
            |e: prost::DecodeError| JsonError::Malformed { type_name: name.to_owned(), cause: e.to_string() };
        return Destination::decode(bytes).map(|destination| own(&destination)).map_err(malformed);
    }
    let descriptor =
        pool()?.get_message_by_name(name).ok_or_else(|| JsonError::UnknownType(name.to_owned()))?;
    let malformed = |cause: String| JsonError::Malformed { type_name: name.to_owned(), cause };
    let message = DynamicMessage::decode(descriptor, bytes).map_err(|e| malformed(e.to_string()))?;
    let options = SerializeOptions::new().use_proto_field_name(true);
    message
        .serialize_with_options(serde_json::value::Serializer, &options)
        .map_err(|e| malformed(e.to_string()))
}

/// vmesh's own message, which is not in the descriptors of Envoy.
fn own(destination: &Destination) -> Value {
    let endpoint = |endpoint: &destination::Endpoint| {
        let mut fields = Map::from_iter([("address".to_owned(), json!(endpoint.address))]);
        for (name, value) in [("capture", endpoint.capture), ("out_of_service", endpoint.out_of_service)] {
            if value {
                fields.insert(name.to_owned(), json!(true));
            }
        }
        Value::Object(fields)
    };
    let on_loss = match destination.on_loss() {
        destination::OnLoss::Unspecified => Value::Null,
        destination::OnLoss::Open => json!("OPEN"),
        destination::OnLoss::Closed => json!("CLOSED"),
    };
    let fields = [
        ("service", json!(destination.service)),
        ("port", json!(destination.port)),
        ("virtual_v4", json!(destination.virtual_v4)),
        ("virtual_v6", json!(destination.virtual_v6)),
        ("endpoints", destination.endpoints.iter().map(endpoint).collect()),
        ("endpoints_on_port", json!(destination.endpoints_on_port)),
        ("percent", json!(destination.percent)),
        ("on_loss", on_loss),
    ];
    // Fields with default values are left out, as in Envoy's JSON. A share of 0 % differs from the default of that field.
    let is_said = |(name, value): &(&str, Value)| match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => *name == "percent" || number.as_u64() != Some(0),
        Value::String(text) => !text.is_empty(),
        Value::Array(values) => !values.is_empty(),
        Value::Object(_) => true,
    };
    Value::Object(fields.into_iter().filter(is_said).map(|(name, value)| (name.to_owned(), value)).collect())
}
