//! The part of the API that concerns identities: the certificate authority, join tokens, bans.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use vmesh_api::identity::{
    IdentityStatus, InitRequest, RotationRequest, RotationStatus, TokenRequest, Tokens,
};
use vmesh_daemon::report::one_line;
use vmesh_model::NodeName;

use super::{AuditDetail, ControlState, done, failure, parse_body, read_only_error};
use crate::control::Control;
use crate::identity::IdentityError;

/// Returns the routes that any local user may request.
pub(super) fn read_only() -> Router<Arc<Control>> {
    let refuse = || post(async || read_only_error());
    Router::new()
        .route("/api/v1/identity", get(status))
        .route("/api/v1/identity/bundle", get(bundle))
        .route("/api/v1/identity/init", refuse())
        .route("/api/v1/identity/rotation", refuse().get(rotation))
        .route("/api/v1/tokens", refuse().get(async || read_only_error()))
        .route("/api/v1/tokens/{id}", delete(async || read_only_error()))
        .route("/api/v1/nodes/{name}/ban", refuse())
        .route("/api/v1/nodes/{name}/unban", refuse())
}

/// Returns all routes, including those that change something.
pub(super) fn full() -> Router<Arc<Control>> {
    Router::new()
        .route("/api/v1/identity", get(status))
        .route("/api/v1/identity/bundle", get(bundle))
        .route("/api/v1/identity/init", post(init))
        .route("/api/v1/identity/rotation", get(rotation).post(rotate))
        .route("/api/v1/tokens", get(tokens).post(create_token))
        .route("/api/v1/tokens/{id}", delete(revoke_token))
        .route("/api/v1/nodes/{name}/ban", post(ban))
        .route("/api/v1/nodes/{name}/unban", post(unban))
}

async fn status(State(control): ControlState) -> Json<IdentityStatus> {
    Json(control.identities.status())
}

async fn bundle(State(control): ControlState) -> Response {
    match control.identities.bundle() {
        Ok(bundle) => Json(bundle).into_response(),
        Err(error) => refusal(&error),
    }
}

async fn init(State(control): ControlState, body: Bytes) -> Response {
    let request = match body.is_empty() {
        true => InitRequest::default(),
        false => match parse_body(&body) {
            Ok(request) => request,
            Err(wrong) => return *wrong,
        },
    };
    match control.identities.init(request).await {
        Ok(status) => Json(status).into_response(),
        Err(error) => refusal(&error),
    }
}

async fn rotation(State(control): ControlState) -> Json<RotationStatus> {
    Json(control.identities.rotation_status(&control.enrolled_nodes()))
}

async fn rotate(State(control): ControlState, body: Bytes) -> Response {
    let request: RotationRequest = match parse_body(&body) {
        Ok(request) => request,
        Err(wrong) => return *wrong,
    };
    match control.identities.rotate(request, &control.enrolled_nodes()).await {
        Ok(status) => {
            let detail = AuditDetail(status.summary.clone());
            let mut response = Json(status).into_response();
            response.extensions_mut().insert(detail);
            response
        }
        Err(error) => refusal(&error),
    }
}

async fn tokens(State(control): ControlState) -> Json<Tokens> {
    Json(control.identities.tokens())
}

async fn create_token(State(control): ControlState, body: Bytes) -> Response {
    let request: TokenRequest = match parse_body(&body) {
        Ok(request) => request,
        Err(wrong) => return *wrong,
    };
    let node = request.node.clone();
    match control.identities.create_token(request).await {
        Ok(token) => {
            let detail = AuditDetail(format!("token {} for node `{node}`", token.id));
            let mut response = Json(token).into_response();
            response.extensions_mut().insert(detail);
            response
        }
        Err(error) => refusal(&error),
    }
}

async fn revoke_token(State(control): ControlState, Path(id): Path<String>) -> Response {
    match control.identities.revoke_token(&id).await {
        Ok(text) => done(text),
        Err(error) => refusal(&error),
    }
}

async fn ban(control: ControlState, name: Path<String>) -> Response {
    set_ban(control, name, true).await
}

async fn unban(control: ControlState, name: Path<String>) -> Response {
    set_ban(control, name, false).await
}

async fn set_ban(State(control): ControlState, Path(name): Path<String>, is_banned: bool) -> Response {
    let name: NodeName = match name.parse() {
        Ok(name) => name,
        Err(invalid) => return failure(StatusCode::BAD_REQUEST, invalid.to_string()),
    };
    match (control.identities.set_ban(&name, is_banned).await, is_banned) {
        (Ok(true), true) => done(format!(
            "node `{name}` is banned at this control plane: it gets no configuration and no certificates; ban it at each replica"
        )),
        (Ok(true), false) => done(format!("node `{name}` is no longer banned at this control plane")),
        (Ok(false), true) => done(format!("node `{name}` was banned before")),
        (Ok(false), false) => done(format!("node `{name}` was not banned")),
        (Err(error), _) => refusal(&error),
    }
}

fn refusal(error: &IdentityError) -> Response {
    let status = match error {
        IdentityError::NoAuthority
        | IdentityError::HasAuthority(_)
        | IdentityError::NoRotation
        | IdentityError::Rotating(_)
        | IdentityError::NoRootKey
        | IdentityError::Blocked(_) => StatusCode::CONFLICT,
        IdentityError::UnknownToken(_) => StatusCode::NOT_FOUND,
        IdentityError::Wrong(_) | IdentityError::Create(_) | IdentityError::Authority(_) => {
            StatusCode::BAD_REQUEST
        }
        IdentityError::Store(_) => StatusCode::INTERNAL_SERVER_ERROR,
    };
    failure(status, one_line(error))
}
