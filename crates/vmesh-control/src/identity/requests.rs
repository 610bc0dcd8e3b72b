//! Answers the requests of nodes that join and renew, at `listen.xds`.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime};

use axum::body::Bytes;
use axum::http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde::Serialize;
use serde::de::DeserializeOwned;
use vmesh_api::Failure;
use vmesh_api::identity::{JOIN_PATH, JoinAnswer, JoinRequest, RENEW_PATH, RenewAnswer, RenewRequest};
use vmesh_daemon::report::one_line;
use vmesh_identity::authority::{AuthorityError, check_request};
use vmesh_identity::token::{JoinRefusal, NotAToken};
use vmesh_identity::{Identity, JoinToken, NodeGrant, Subject};
use vmesh_model::{NodeName, ServiceName};
use vmesh_xds::server::{OtherRequests, PeerInfo};

use vmesh_daemon::tasks::blocking;

use super::{Authority, IdentityService, RedeemError, node_of, unix};
use crate::audit::{AuditEvent, Outcome};

/// The most bytes of a request. A request for 100 certificates has 50 KiB.
const BODY_MAX: usize = 64 << 10;
const BODY_WITHIN: Duration = Duration::from_secs(5);
/// The most certificates that one request asks for.
const CERTIFICATES_MAX: usize = 100;

/// The answers to nodes that join and renew.
pub(crate) struct NodeRequests(pub(crate) Arc<IdentityService>);

/// A request that is not granted.
enum RefusedRequest {
    /// There is no authority, or it cannot work now. The node tries again.
    NotReady(String),
    /// Policy refuses the node's request.
    Denied {
        /// The text for the node. It helps no attacker.
        public: String,
        /// The text for the operator.
        reason: String,
    },
    Malformed(String),
}

impl RefusedRequest {
    fn same(text: impl Into<String>) -> RefusedRequest {
        let text = text.into();
        RefusedRequest::Denied { public: text.clone(), reason: text }
    }
}

impl OtherRequests for NodeRequests {
    fn has(&self, path: &str) -> bool {
        matches!(path, JOIN_PATH | RENEW_PATH)
    }

    fn answer(
        &self,
        request: Request<Incoming>,
        peer: PeerInfo,
    ) -> Pin<Box<dyn Future<Output = Response<Bytes>> + Send>> {
        let identities = self.0.clone();
        Box::pin(async move {
            let answer = match request.uri().path() {
                JOIN_PATH => join(&identities, request, &peer).await,
                _ => renew(&identities, request, &peer).await,
            };
            answer.unwrap_or_else(|refused| match refused {
                RefusedRequest::NotReady(why) => failure(StatusCode::SERVICE_UNAVAILABLE, why),
                RefusedRequest::Denied { public, .. } => failure(StatusCode::FORBIDDEN, public),
                RefusedRequest::Malformed(why) => failure(StatusCode::BAD_REQUEST, why),
            })
        })
    }
}

/// Lets a node in that presents a join token.
async fn join(
    identities: &Arc<IdentityService>,
    request: Request<Incoming>,
    peer: &PeerInfo,
) -> Result<Response<Bytes>, RefusedRequest> {
    let authority = authority(identities)?;
    let from = from(peer)?;
    let asked: JoinRequest = read(request).await?;
    let node = asked.node.clone();
    match admit(identities, &authority, asked, from).await {
        Ok(answer) => {
            identities.counters.joined.fetch_add(1, Relaxed);
            let event =
                AuditEvent::of_node(&node, Some(from), "node.join", Outcome::Done, "with a join token");
            identities.audit.record(event);
            tracing::info!(%node, %from, "a node has joined");
            Ok(json(&answer))
        }
        Err(refused) => {
            if let RefusedRequest::Denied { reason, .. } = &refused {
                identities.counters.join_refused.fetch_add(1, Relaxed);
                record_refusal(identities, &node, from, "node.join", reason);
            }
            Err(refused)
        }
    }
}

async fn admit(
    identities: &Arc<IdentityService>,
    authority: &Arc<Authority>,
    asked: JoinRequest,
    from: IpAddr,
) -> Result<JoinAnswer, RefusedRequest> {
    let JoinRequest { token, node, services, request, .. } = asked;
    let Ok(token) = token.parse::<JoinToken>() else {
        let refused = identities.ledger().on_malformed(from, SystemTime::now());
        return Err(match refused {
            Ok(()) => RefusedRequest::same(NotAToken.to_string()),
            Err(refusal) => {
                RefusedRequest::Denied { public: refusal.public().to_owned(), reason: refusal.to_string() }
            }
        });
    };
    if identities.is_banned(&node) {
        let public = JoinRefusal::Unknown(token.id).public().to_owned();
        let reason = format!("node `{node}` is banned; `vmeshctl node unban {node}` ends that");
        return Err(RefusedRequest::Denied { public, reason });
    }
    // A request that cannot be signed must not use up the token.
    check_request(&request).map_err(unsigned)?;
    let grant = identities.redeem(&token, &node, &services, from).await.map_err(|error| match error {
        RedeemError::Refused(refusal) => {
            RefusedRequest::Denied { public: refusal.public().to_owned(), reason: refusal.to_string() }
        }
        RedeemError::Unsaved(error) => RefusedRequest::NotReady(format!(
            "the token is used up, and that could not be saved: create another one when the control plane's disk works ({})",
            one_line(&error)
        )),
    })?;
    let node_chain = issue_node(authority, &request, &node, grant.clone()).await?;
    Ok(JoinAnswer {
        node_chain,
        granted: grant.services,
        bundle: authority.bundle().to_pem(),
        trust_domain: identities.trust_domain().to_string(),
        now: unix(SystemTime::now()),
    })
}

/// Records a refusal in the audit log, and in the log of the process while there are not too many.
fn record_refusal(identities: &IdentityService, node: &NodeName, from: IpAddr, action: &str, reason: &str) {
    if identities.audit.record(AuditEvent::of_node(node, Some(from), action, Outcome::Denied, reason)) {
        tracing::warn!(%node, %from, "{action} was refused: {reason}");
    }
}

/// Issues certificates to a node that proved its identity in the handshake.
async fn renew(
    identities: &Arc<IdentityService>,
    request: Request<Incoming>,
    peer: &PeerInfo,
) -> Result<Response<Bytes>, RefusedRequest> {
    let authority = authority(identities)?;
    let from = from(peer)?;
    let certificate = peer.certificate.as_ref().ok_or_else(|| {
        RefusedRequest::same("certificates are renewed for nodes that show theirs: join with a token first")
    })?;
    let (node, grant) = node_of(certificate).map_err(RefusedRequest::same)?;
    let asked: RenewRequest = read(request).await?;
    let wants_any = asked.node_request.is_some() || !asked.services.is_empty();
    let outcome = match identities.is_banned(&node) {
        true => Err(RefusedRequest::same(format!(
            "node `{node}` is banned; `vmeshctl node unban {node}` ends that"
        ))),
        false => issue_all(identities, &authority, asked, &node, grant).await,
    };
    match &outcome {
        Ok(_) if wants_any => _ = identities.counters.renewed.fetch_add(1, Relaxed),
        Ok(_) => {}
        Err(RefusedRequest::Denied { reason, .. }) => {
            identities.counters.renew_refused.fetch_add(1, Relaxed);
            record_refusal(identities, &node, from, "node.renew", reason);
        }
        Err(_) => {}
    }
    outcome.map(|answer| json(&answer))
}

async fn issue_all(
    identities: &Arc<IdentityService>,
    authority: &Arc<Authority>,
    asked: RenewRequest,
    node: &NodeName,
    grant: NodeGrant,
) -> Result<RenewAnswer, RefusedRequest> {
    if asked.services.len() > CERTIFICATES_MAX {
        return Err(RefusedRequest::Malformed(format!(
            "one request is for at most {CERTIFICATES_MAX} services"
        )));
    }
    if let Some(service) = asked.services.keys().find(|service| !grant.services.contains(*service)) {
        return Err(RefusedRequest::same(format!(
            "node `{node}` may not run `{service}`, only {}: create a token with `--service {service}`, and join again",
            list(&grant.services)
        )));
    }
    identities.trust.record(node, &asked);
    let node_chain = match &asked.node_request {
        Some(request) => Some(issue_node(authority, request, node, grant.clone()).await?),
        None => None,
    };
    let (signer, of, requests) = (authority.clone(), node.clone(), asked.services);
    let trust_domain = identities.trust_domain().clone();
    let services = blocking(move || {
        let issue = |(service, request): (ServiceName, String)| {
            let id = trust_domain.id(Identity::Service(service.clone()));
            let subject = Subject { id, node: Some(of.clone()), grant: None };
            let chain = signer.issue(&request, &subject, SystemTime::now())?;
            Ok((service, chain.to_pem()))
        };
        requests.into_iter().map(issue).collect::<Result<_, AuthorityError>>()
    });
    Ok(RenewAnswer {
        node_chain,
        services: services.await.map_err(unsigned)?,
        granted: grant.services,
        bundle: authority.bundle().to_pem(),
        trust_domain: identities.trust_domain().to_string(),
        renew_now: identities.trust.should_renew(node, authority),
        ask_again_in: identities.trust.ask_again_in(authority).as_secs(),
        now: unix(SystemTime::now()),
    })
}

/// Issues the certificate of a node, and returns its chain in PEM.
async fn issue_node(
    authority: &Arc<Authority>,
    request: &str,
    node: &NodeName,
    grant: NodeGrant,
) -> Result<String, RefusedRequest> {
    let id = authority.bundle().trust_domain().id(Identity::Node(node.clone()));
    let subject = Subject { id, node: Some(node.clone()), grant: Some(grant) };
    let (signer, request) = (authority.clone(), request.to_owned());
    let chain = blocking(move || signer.issue(&request, &subject, SystemTime::now())).await;
    Ok(chain.map_err(unsigned)?.to_pem())
}

fn unsigned(error: AuthorityError) -> RefusedRequest {
    match error {
        AuthorityError::Request(_) | AuthorityError::LargeRequest => {
            RefusedRequest::Malformed(one_line(&error))
        }
        other => RefusedRequest::NotReady(one_line(&other)),
    }
}

fn authority(identities: &IdentityService) -> Result<Arc<Authority>, RefusedRequest> {
    let missing = || {
        RefusedRequest::NotReady("there is no certificate authority yet: run `vmeshctl ca init`".to_owned())
    };
    identities.authority().ok_or_else(missing)
}

fn from(peer: &PeerInfo) -> Result<IpAddr, RefusedRequest> {
    let address = peer.address.map(|address| address.ip().to_canonical());
    address.ok_or_else(|| RefusedRequest::Malformed("the connection has no address".to_owned()))
}

/// Reads the body of a request.
async fn read<T: DeserializeOwned>(request: Request<Incoming>) -> Result<T, RefusedRequest> {
    if request.method() != Method::POST {
        return Err(RefusedRequest::Malformed("this path is for POST".to_owned()));
    }
    let body = Limited::new(request.into_body(), BODY_MAX).collect();
    let body = match tokio::time::timeout(BODY_WITHIN, body).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(_)) => {
            let why = format!("the body could not be read, or has more than {BODY_MAX} bytes");
            return Err(RefusedRequest::Malformed(why));
        }
        Err(_) => {
            let why = format!("the body did not come within {} s", BODY_WITHIN.as_secs());
            return Err(RefusedRequest::Malformed(why));
        }
    };
    // The error of a JSON parser may quote the body, which holds a token.
    serde_json::from_slice(&body).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        RefusedRequest::Malformed(format!(
            "the body is not what is asked for here (line {line}, column {column})"
        ))
    })
}

fn list(services: &BTreeSet<ServiceName>) -> String {
    if services.is_empty() {
        return "no service".to_owned();
    }
    services.iter().map(|service| format!("`{service}`")).collect::<Vec<_>>().join(", ")
}

fn json(value: &impl Serialize) -> Response<Bytes> {
    match serde_json::to_vec(value) {
        Ok(body) => answer(StatusCode::OK, body),
        Err(error) => {
            failure(StatusCode::INTERNAL_SERVER_ERROR, format!("the answer could not be encoded: {error}"))
        }
    }
}

fn failure(status: StatusCode, error: String) -> Response<Bytes> {
    answer(status, serde_json::to_vec(&Failure { error }).unwrap_or_default())
}

fn answer(status: StatusCode, body: Vec<u8>) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}
