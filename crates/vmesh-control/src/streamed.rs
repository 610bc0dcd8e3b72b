//! Streams large API responses chunk by chunk, so that a slow client costs one chunk of memory.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use vmesh_proto::json::bytes_to_json;
use vmesh_xds::{Group, Groups, Kind, Resource, Snapshot};

/// The size, in bytes, at which a chunk is written.
const PIECE: usize = 32 << 10;

/// Answers with `{"NAME":[ITEM,...]}`. Each item is serialised when the client reads it.
pub(crate) fn list<T: Serialize>(name: &str, items: impl Iterator<Item = T> + Send + 'static) -> Response {
    let head = format!("{{\"{name}\":[");
    let mut is_first = true;
    let items = items.map(move |item| {
        let mut text = if std::mem::take(&mut is_first) { Vec::new() } else { vec![b','] };
        // Serialisation fails only for maps whose keys are not strings; the API has none.
        _ = serde_json::to_writer(&mut text, &item);
        text
    });
    pieces(std::iter::once(head.into_bytes()).chain(items).chain(std::iter::once(b"]}".to_vec())))
}

/// Answers with the resources of a node, grouped by type, in the notation of Envoy's `/config_dump`.
pub(crate) fn config(snapshot: Snapshot) -> Response {
    let scope = &snapshot.scope;
    let shared: Vec<Arc<Group>> = match &scope.groups {
        Groups::All => snapshot.store.groups().cloned().collect(),
        Groups::Named(keys) => keys.iter().filter_map(|key| snapshot.store.group(key)).cloned().collect(),
    };
    let groups: Arc<[Arc<Group>]> = std::iter::once(scope.own.clone()).chain(shared).collect();
    // Each resource is looked up when the client reads it, so a response that nobody reads costs only the
    // list of groups.
    let resources = Kind::ALL.into_iter().flat_map(move |kind| {
        let (groups, snapshot) = (groups.clone(), snapshot.clone());
        let of_kind = (0..groups.len()).flat_map(move |at| {
            let resources = groups.get(at).map(|group| group.of_kind(kind).to_vec()).unwrap_or_default();
            let snapshot = snapshot.clone();
            resources.into_iter().filter(move |resource| {
                let visible = snapshot.get(kind, resource.name());
                visible.is_some_and(|visible| Arc::ptr_eq(visible, resource))
            })
        });
        of_kind.enumerate().map(move |(at, resource)| (kind, at == 0, resource))
    });
    let mut is_first_kind = true;
    let items = resources.map(move |(kind, is_first, resource)| {
        let text = shown(&resource);
        match is_first {
            true => {
                let before = if std::mem::take(&mut is_first_kind) { "{" } else { "]," };
                format!("{before}{}:[{text}", Value::from(kind.type_url())).into_bytes()
            }
            false => format!(",{text}").into_bytes(),
        }
    });
    let mut items = items.peekable();
    let end: &[u8] = if items.peek().is_some() { b"]}" } else { b"{}" };
    pieces(items.chain(std::iter::once(end.to_vec())))
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

/// The fields of Envoy's messages that contain secrets, in whatever message they occur.
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
        let shown: Value = serde_json::from_str(&text(config(all)).await).unwrap();
        let of = |kind: Kind| &shown[kind.type_url()][0];
        assert_eq!(of(Kind::Cluster)["resource"]["name"], "orders");
        assert_eq!(
            (&of(Kind::Secret)["name"], &of(Kind::Secret)["resource"]),
            (&json!("key"), &json!(REDACTED))
        );
        let none = Snapshot { store: Arc::default(), scope: Arc::new(Scope::all()) };
        assert_eq!(text(config(none)).await, "{}");
    }

    #[test]
    fn what_is_secret_is_redacted_wherever_it_stands() {
        let mut value = json!({"a": [{"private_key": {"inline_string": "x"}, "name": "n"}], "password": "p"});
        redact(&mut value);
        assert_eq!(value, json!({"a": [{"private_key": REDACTED, "name": "n"}], "password": REDACTED}));
    }
}
