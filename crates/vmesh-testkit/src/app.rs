//! An HTTP application like those in a mesh.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use serde_json::{Map, Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

use crate::{Failed, Result, background};

/// An HTTP server that answers each request with JSON: its name, its version and the request.
///
/// It speaks HTTP/1.1, and HTTP/2 with prior knowledge. Dropping it acts like a crash: every socket is closed
/// at once.
pub struct HttpApp {
    address: SocketAddr,
    state: Arc<AppState>,
    task: AbortHandle,
    ended: mpsc::Receiver<Infallible>,
}

/// The behaviour that a test chooses for an application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Answers with 200.
    Well,
    /// Answers with 200 after a delay.
    Slow(Duration),
    /// Answers with this status.
    Status(u16),
    /// Resets the connection instead of answering.
    Reset,
}

struct AppState {
    name: String,
    version: String,
    behaviour: Mutex<Behaviour>,
    requests: AtomicU64,
    connections: AtomicU64,
}

impl HttpApp {
    /// Listens on `address`; port 0 chooses a free port.
    pub fn start(name: &str, version: &str, address: impl Into<SocketAddr>) -> Result<HttpApp> {
        let address = address.into();
        // The standard listener sets SO_REUSEADDR, so a crashed application can be started again on its port.
        let listener = std::net::TcpListener::bind(address)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .map_err(Failed::to(format!("application {name} could not listen on {address}")))?;
        let address = listener.local_addr().map_err(Failed::to("a listener without an address"))?;
        let state = Arc::new(AppState {
            name: name.to_owned(),
            version: version.to_owned(),
            behaviour: Mutex::new(Behaviour::Well),
            requests: AtomicU64::new(0),
            connections: AtomicU64::new(0),
        });
        let (running, ended) = mpsc::channel();
        let serving = state.clone();
        let task = background()?.spawn(async move {
            // This is dropped after the sockets below, also if the task is aborted.
            let _running: mpsc::Sender<Infallible> = running;
            let Ok(listener) = TcpListener::from_std(listener) else { return };
            serve(listener, serving).await;
        });
        Ok(HttpApp { address, state, task: task.abort_handle(), ended })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn name(&self) -> &str {
        &self.state.name
    }

    pub fn behave(&self, behaviour: Behaviour) {
        *self.state.behaviour.lock().unwrap_or_else(PoisonError::into_inner) = behaviour;
    }

    /// Returns how many requests have arrived, answered or not.
    pub fn requests(&self) -> u64 {
        self.state.requests.load(Ordering::Relaxed)
    }

    /// Returns how many connections were accepted.
    pub fn connections(&self) -> u64 {
        self.state.connections.load(Ordering::Relaxed)
    }

    /// Crashes the application. On return the port and all connections are closed.
    pub fn kill(self) {}
}

impl Drop for HttpApp {
    fn drop(&mut self) {
        self.task.abort();
        // The channel reports an error once the task and all its sockets are dropped.
        _ = self.ended.recv_timeout(Duration::from_secs(10));
    }
}

async fn serve(listener: TcpListener, state: Arc<AppState>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => if let Ok((stream, _)) = accepted {
                state.connections.fetch_add(1, Ordering::Relaxed);
                connections.spawn(connection(stream, state.clone()));
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection(stream: TcpStream, state: Arc<AppState>) {
    _ = stream.set_nodelay(true);
    // The preface of HTTP/2 begins with PRI, and no method does.
    let mut preface = [0; 3];
    let is_http2 = stream.peek(&mut preface).await.is_ok() && preface == *b"PRI";
    let Ok(socket) = stream.as_fd().try_clone_to_owned() else { return };
    let socket = Arc::new(socket);
    let service = service_fn(move |request| {
        let (state, socket) = (state.clone(), socket.clone());
        async move {
            let answer = answer(request, &state).await;
            if answer.is_none() {
                // With this option the close below sends a reset.
                _ = rustix::net::sockopt::set_socket_linger(&socket, Some(Duration::ZERO));
            }
            answer.ok_or_else(|| std::io::Error::other("told to reset"))
        }
    });
    let io = TokioIo::new(stream);
    if is_http2 {
        _ = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .serve_connection(io, service)
            .await;
    } else {
        _ = http1::Builder::new().timer(TokioTimer::new()).serve_connection(io, service).await;
    }
}

async fn answer(request: Request<Incoming>, state: &AppState) -> Option<Response<Full<Bytes>>> {
    let count = 1 + state.requests.fetch_add(1, Ordering::Relaxed);
    let (head, body) = request.into_parts();
    let received = body.collect().await.ok()?.to_bytes().len();
    let behaviour = *state.behaviour.lock().unwrap_or_else(PoisonError::into_inner);
    let status = match behaviour {
        Behaviour::Well => StatusCode::OK,
        Behaviour::Slow(time) => {
            tokio::time::sleep(time).await;
            StatusCode::OK
        }
        Behaviour::Status(status) => {
            StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
        }
        Behaviour::Reset => return None,
    };
    let text = |value: &HeaderValue| Value::from(String::from_utf8_lossy(value.as_bytes()).into_owned());
    let headers: Map<String, Value> =
        head.headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect();
    let answer = json!({
        "app": state.name,
        "version": state.version,
        "method": head.method.as_str(),
        "path": head.uri.path_and_query().map_or("/", |path| path.as_str()),
        "host": head.headers.get("host").map(text).or_else(|| head.uri.authority().map(|host| host.as_str().into())),
        "protocol": format!("{:?}", head.version),
        "headers": headers,
        "body_bytes": received,
        "count": count,
    });
    let mut response = Response::new(Full::from(format!("{answer}\n")));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Some(response)
}
