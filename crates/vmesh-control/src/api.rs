//! The HTTP API. Over TCP it is read-only. Requests that change something are served only on the Unix socket,
//! whose file permissions decide who may connect.

mod identity;

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, Query, Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use prometheus_client::registry::Registry;
use serde::de::DeserializeOwned;
use vmesh_api::{
    AcceptRequest, ActionResult, Discovery, EndpointRequest, Events, Failure, ListedProblem, Revision,
    Service, ServiceEndpoint, SourceSelector, Status,
};
use vmesh_catalog::World;
use vmesh_daemon::connections::Origin;
use vmesh_model::{NodeName, ServiceName};

use crate::audit::{AuditEvent, Outcome};
use crate::control::{self, Control};
use crate::discovery::ActionError;
use crate::streamed;

type ControlState = State<Arc<Control>>;

/// Returns the routes that any local user may request.
pub(crate) fn read_only(control: Arc<Control>, registry: Arc<Registry>) -> Router {
    let mut routes = routes(registry)
        .route("/api/v1/nodes", get(nodes).delete(async || read_only_error()))
        .route("/api/v1/nodes/{name}", delete(async || read_only_error()));
    for action in ["accept", "evict", "admit", "freeze", "thaw"] {
        routes = routes.route(&format!("/api/v1/discovery/{action}"), post(async || read_only_error()));
    }
    audited(routes.merge(identity::read_only()), &control).with_state(control)
}

/// Records the requests that change something, and those that are refused.
fn audited(routes: Router<Arc<Control>>, control: &Arc<Control>) -> Router<Arc<Control>> {
    routes.layer(middleware::from_fn_with_state(control.clone(), audit))
}

async fn audit(State(control): ControlState, request: Request, next: Next) -> Response {
    if matches!(*request.method(), Method::GET | Method::HEAD) {
        return next.run(request).await;
    }
    let origin = request.extensions().get::<Origin>().copied();
    let action = format!("{} {}", request.method(), request.uri().path());
    let response = next.run(request).await;
    let status = response.status();
    let outcome = match status {
        _ if status.is_success() => Outcome::Done,
        StatusCode::METHOD_NOT_ALLOWED | StatusCode::FORBIDDEN => Outcome::Denied,
        _ => Outcome::Failed,
    };
    let detail =
        response.extensions().get::<AuditDetail>().map(|detail| detail.0.clone()).unwrap_or_default();
    control.identities.audit.record(AuditEvent::of_request(origin, &action, outcome, &detail));
    response
}

/// The part of a response that the audit log shows.
#[derive(Debug, Clone)]
struct AuditDetail(String);

/// Returns all routes, including those that change something.
pub(crate) fn full(control: Arc<Control>, registry: Arc<Registry>) -> Router {
    let routes = routes(registry)
        .route("/api/v1/nodes", get(nodes).delete(forget_offline))
        .route("/api/v1/nodes/{name}", delete(forget))
        .route("/api/v1/discovery/accept", post(accept))
        .route("/api/v1/discovery/evict", post(evict))
        .route("/api/v1/discovery/admit", post(admit))
        .route("/api/v1/discovery/freeze", post(freeze))
        .route("/api/v1/discovery/thaw", post(thaw))
        .merge(identity::full());
    audited(routes, &control).with_state(control)
}

fn routes(registry: Arc<Registry>) -> Router<Arc<Control>> {
    let scrape = async move || vmesh_daemon::metrics::response(&registry).map(axum::body::Body::from);
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(scrape))
        .route("/api/v1/services", get(services))
        .route("/api/v1/nodes/{name}/config", get(config))
        .route("/api/v1/problems", get(problems))
        .route("/api/v1/revision", get(revision))
        .route("/api/v1/status", get(status))
        .route("/api/v1/explain", get(explain))
        .route("/api/v1/discovery", get(discovery))
        .route("/api/v1/discovery/events", get(events))
        .fallback(async || failure(StatusCode::NOT_FOUND, "there is nothing at this path; see docs/api.md"))
        .method_not_allowed_fallback(async || read_only_error())
}

fn read_only_error() -> Response {
    let why = "this cannot be done here: the API over TCP only reads, the Unix socket (`listen.api_socket`) also changes";
    failure(StatusCode::METHOD_NOT_ALLOWED, why)
}

fn failure(status: StatusCode, error: impl Into<String>) -> Response {
    let error = error.into();
    let detail = AuditDetail(error.clone());
    let mut response = (status, Json(Failure { error })).into_response();
    response.extensions_mut().insert(detail);
    response
}

/// Answers that an action was done.
fn done(text: impl Into<String>) -> Response {
    let text = text.into();
    let detail = AuditDetail(text.clone());
    let mut response = Json(ActionResult { done: text }).into_response();
    response.extensions_mut().insert(detail);
    response
}

/// Answers whether the control plane is ready: every source has answered, or has failed and its last good
/// state was on disk.
async fn readyz(State(control): ControlState) -> Response {
    let waiting = control.waiting_for();
    if waiting.is_empty() {
        return "ready\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, format!("waiting for {}\n", waiting.join(", "))).into_response()
}

async fn services(State(control): ControlState) -> Response {
    let world = control.world();
    let names: Vec<ServiceName> = world.service_names().cloned().collect();
    streamed::list("services", names.into_iter().map(move |name| service(&world, &name)))
}

fn service(world: &World, name: &ServiceName) -> Service {
    let registered = world.services.get(name);
    Service {
        name: name.clone(),
        protocol: world.protocol(name),
        state: registered.map(|service| service.state).unwrap_or_default(),
        because: registered.and_then(|service| service.because.clone()),
        endpoints: world.endpoints(name).iter().map(ServiceEndpoint::from).collect(),
    }
}

async fn nodes(State(control): ControlState) -> Response {
    let nodes = control.nodes().into_iter();
    streamed::list("nodes", nodes.map(|(report, status)| control::node(&report, status)))
}

async fn problems(State(control): ControlState) -> Response {
    let problems = control.problems().into_iter();
    streamed::list("problems", problems.map(|problem| ListedProblem::from(&problem)))
}

async fn revision(State(control): ControlState) -> Json<Revision> {
    Json(control.revision())
}

async fn status(State(control): ControlState) -> Json<Status> {
    Json(control.status())
}

async fn explain(State(control): ControlState, Query(asked): Query<BTreeMap<String, String>>) -> Response {
    let (Some(service), Some(from)) = (asked.get("service"), asked.get("from")) else {
        return failure(StatusCode::BAD_REQUEST, "ask with `?service=SERVICE&from=NODE`");
    };
    let service: ServiceName = match service.parse() {
        Ok(service) => service,
        Err(invalid) => return failure(StatusCode::BAD_REQUEST, format!("service: {invalid}")),
    };
    let from: NodeName = match from.parse() {
        Ok(from) => from,
        Err(invalid) => return failure(StatusCode::BAD_REQUEST, format!("from: {invalid}")),
    };
    match control.explain(&service, &from) {
        Ok(explanation) => Json(explanation).into_response(),
        Err(unknown) => failure(StatusCode::NOT_FOUND, unknown),
    }
}

/// Answers with the resources of a node, in the notation of Envoy's `/config_dump`.
async fn config(State(control): ControlState, Path(name): Path<String>) -> Response {
    let Some(snapshot) = name.parse().ok().and_then(|name: NodeName| control.snapshot(&name)) else {
        return failure(
            StatusCode::NOT_FOUND,
            format!("there is no node `{name}`: `vmeshctl nodes` lists them"),
        );
    };
    streamed::config(snapshot)
}

async fn discovery(State(control): ControlState) -> Json<Discovery> {
    Json(control.actions.show())
}

async fn events(State(control): ControlState) -> Json<Events> {
    Json(Events { events: control.actions.events() })
}

async fn accept(State(control): ControlState, body: Bytes) -> Response {
    match parse_body::<AcceptRequest>(&body) {
        Ok(AcceptRequest { source, service }) => {
            answer_action(control.actions.accept(&source, service).await)
        }
        Err(wrong) => *wrong,
    }
}

async fn evict(State(control): ControlState, body: Bytes) -> Response {
    match parse_body::<EndpointRequest>(&body) {
        Ok(EndpointRequest { service, address }) => {
            answer_action(control.actions.evict(&service, address).await)
        }
        Err(wrong) => *wrong,
    }
}

async fn admit(State(control): ControlState, body: Bytes) -> Response {
    match parse_body::<EndpointRequest>(&body) {
        Ok(EndpointRequest { service, address }) => {
            answer_action(control.actions.admit(&service, address).await)
        }
        Err(wrong) => *wrong,
    }
}

async fn freeze(State(control): ControlState, body: Bytes) -> Response {
    match parse_body::<SourceSelector>(&body) {
        Ok(SourceSelector { source }) => answer_action(control.actions.freeze(source.as_deref()).await),
        Err(wrong) => *wrong,
    }
}

async fn thaw(State(control): ControlState, body: Bytes) -> Response {
    match parse_body::<SourceSelector>(&body) {
        Ok(SourceSelector { source }) => answer_action(control.actions.thaw(source.as_deref()).await),
        Err(wrong) => *wrong,
    }
}

/// Parses the body of a request, or returns the response that describes its error.
fn parse_body<T: DeserializeOwned>(body: &[u8]) -> Result<T, Box<Response>> {
    serde_json::from_slice(body).map_err(|error| {
        let why = format!("the body is not what is asked for here: {error}; see docs/api.md");
        Box::new(failure(StatusCode::BAD_REQUEST, why))
    })
}

fn answer_action(outcome: Result<String, ActionError>) -> Response {
    match outcome {
        Ok(text) => done(text),
        Err(error @ ActionError::Unknown(_)) => failure(StatusCode::NOT_FOUND, error.to_string()),
        Err(error @ ActionError::Conflict(_)) => failure(StatusCode::CONFLICT, error.to_string()),
    }
}

async fn forget(State(control): ControlState, Path(name): Path<String>) -> Response {
    let Ok(name) = name.parse::<NodeName>() else {
        return failure(
            StatusCode::NOT_FOUND,
            format!("there is no node `{name}`: `vmeshctl nodes` lists them"),
        );
    };
    match control.forget(&name) {
        Ok(()) => done(format!("node `{name}` is forgotten")),
        Err(why) => failure(StatusCode::CONFLICT, why),
    }
}

async fn forget_offline(
    State(control): ControlState,
    Query(asked): Query<BTreeMap<String, String>>,
) -> Response {
    let Some(longer) = asked.get("offline_for") else {
        return failure(StatusCode::BAD_REQUEST, "say which nodes: `?offline_for=1h`");
    };
    match vmesh_model::text::parse_duration(longer) {
        Ok(longer) => {
            let forgotten = control.fleet().forget_offline_for(longer);
            let nodes = if forgotten == 1 { "node is" } else { "nodes are" };
            done(format!("{forgotten} {nodes} forgotten"))
        }
        Err(wrong) => failure(StatusCode::BAD_REQUEST, format!("offline_for: {wrong}")),
    }
}
