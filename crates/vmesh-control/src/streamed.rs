//! Streams large API responses chunk by chunk, so that a slow client costs one chunk of memory.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use vmesh_proto::json::bytes_to_json;
use vmesh_xds::{Kind, Resource, Snapshot};

/// A piece is written when it is so large, in bytes.
const PIECE: usize = 32 << 10;

/// Answers with `{"NAME":[ITEM,...]}`. Each item is serialised when the client reads it.
pub(crate) fn list<T: Serialize>(name: &str, items: impl Iterator<Item = T> + Send + 'static) -> Response {
    let head = format!("{{\"{name}\":[");
    let mut is_first = true;
    let items = items.map(move |item| {
        let mut text = if std::mem::take(&mut is_first) { Vec::new() } else { vec![b','] };
        // Serialisation fails only for maps with keys that are no strings; the API has none.
        _ = serde_json::to_writer(&mut text, &item);
        text
    });
    pieces(std::iter::once(head.into_bytes()).chain(items).chain(std::iter::once(b"]}".to_vec())))
}

/// Answers with the resources of a node by their types, as Envoy's `/config_dump` would print them.
pub(crate) fn config(snapshot: &Snapshot) -> Response {
    let mut parts: Vec<Part> = Vec::new();
    for kind in Kind::ALL {
        let before = parts.len();
        parts.extend(snapshot.of_kind(kind).map(|resource| Part::Resource(resource.clone())));
        if parts.len() > before {
            parts.insert(before, Part::Begin(kind));
        }
    }
    let (mut is_first_kind, mut is_first) = (true, true);
    let items = parts.into_iter().map(move |part| match part {
        Part::Begin(kind) => {
            is_first = true;
            let before = if std::mem::take(&mut is_first_kind) { "{" } else { "]," };
            format!("{before}{}:[", Value::from(kind.type_url())).into_bytes()
        }
        Part::Resource(resource) => {
            let comma = if std::mem::take(&mut is_first) { "" } else { "," };
            format!("{comma}{}", shown(&resource)).into_bytes()
        }
    });
    let mut items = items.peekable();
    let end: &[u8] = if items.peek().is_some() { b"]}" } else { b"{}" };
    pieces(items.chain(std::iter::once(end.to_vec())))
}

enum Part {
    Begin(Kind),
    Resource(Arc<Resource>),
}

fn shown(resource: &Resource) -> Value {
    let kind = resource.kind();
    let mut value = match kind {
        Kind::Secret => json!(REDACTED),
        _ => bytes_to_json(kind.type_url(), &resource.value())
            .unwrap_or_else(|error| Value::String(error.to_string())),
    };
    redact(&mut value);
    json!({"name": **resource.name(), "version": resource.version(), "resource": value})
}

const REDACTED: &str = "[redacted]";

/// Fields of Envoy's messages that are secret wherever they stand.
const SECRETS: [&str; 6] =
    ["private_key", "pkcs12", "password", "session_ticket_keys", "generic_secret", "inline_bytes"];

fn redact(value: &mut Value) {
    match value {
        Value::Object(fields) => fields.iter_mut().for_each(|(name, value)| {
            if SECRETS.contains(&name.as_str()) {
                *value = json!(REDACTED);
            } else {
                redact(value);
            }
        }),
        Value::Array(items) => items.iter_mut().for_each(redact),
        _ => {}
    }
}

fn pieces(texts: impl Iterator<Item = Vec<u8>> + Send + 'static) -> Response {
    let mut texts = texts.fuse();
    let pieces = std::iter::from_fn(move || {
        let mut piece = texts.next()?;
        while piece.len() < PIECE {
            let Some(more) = texts.next() else { break };
            piece.extend(more);
        }
        Some(Ok::<_, Infallible>(Bytes::from(piece)))
    });
    let body = Body::from_stream(tokio_stream::iter(pieces));
    ([(CONTENT_TYPE, "application/json")], body).into_response()
}

#[cfg(test)]
mod tests {
    use vmesh_xds::{Group, Scope, Store};

    use super::*;

    async fn text(response: Response) -> String {
        let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn a_list_is_json_whatever_its_length() {
        assert_eq!(text(list("nodes", std::iter::empty::<u8>())).await, r#"{"nodes":[]}"#);
        let long: Vec<_> = (0..50_000).collect();
        let shown: Value = serde_json::from_str(&text(list("n", long.clone().into_iter())).await).unwrap();
        assert_eq!(shown, json!({ "n": long }));
    }

    #[tokio::test]
    async fn a_configuration_is_shown_without_its_secrets() {
        use vmesh_proto::envoy::config::cluster::v3::Cluster;
        let cluster = Cluster { name: "orders".into(), ..Cluster::default() };
        let resources = [
            Resource::new(Kind::Cluster, "orders", &cluster),
            Resource::from_bytes(Kind::Secret, "key", b"\x0a\x06hidden"),
        ];
        let store = Store::default().apply([("orders".into(), Some(Group::new("orders", resources)))]);
        let all = Snapshot { store: Arc::new(store), scope: Arc::new(Scope::all()) };
        let shown: Value = serde_json::from_str(&text(config(&all)).await).unwrap();
        let of = |kind: Kind| &shown[kind.type_url()][0];
        assert_eq!(of(Kind::Cluster)["resource"]["name"], "orders");
        assert_eq!(
            (&of(Kind::Secret)["name"], &of(Kind::Secret)["resource"]),
            (&json!("key"), &json!(REDACTED))
        );
        let none = Snapshot { store: Arc::default(), scope: Arc::new(Scope::all()) };
        assert_eq!(text(config(&none)).await, "{}");
    }

    #[test]
    fn what_is_secret_is_redacted_wherever_it_stands() {
        let mut value = json!({"a": [{"private_key": {"inline_string": "x"}, "name": "n"}], "password": "p"});
        redact(&mut value);
        assert_eq!(value, json!({"a": [{"private_key": REDACTED, "name": "n"}], "password": REDACTED}));
    }
}
