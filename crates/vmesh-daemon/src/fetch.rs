//! Sends one HTTP request to a server on this host: Envoy's admin socket, or a daemon's own API.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::{HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::client::conn::http1;
use hyper::rt::{Read, Write};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

/// Maximum size of an answer. `/config_dump` of the largest node is well below it.
const MAX_ANSWER: usize = 256 << 20;

/// The address of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Tcp(address) => address.fmt(f),
            Peer::Unix(path) => path.display().fmt(f),
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{method} {path} at {peer} failed")]
pub struct FetchError {
    method: Method,
    path: String,
    peer: Peer,
    #[source]
    cause: Cause,
}

#[derive(Debug, thiserror::Error)]
enum Cause {
    #[error("nothing listens there that lets this user in: {0}")]
    Connect(#[source] std::io::Error),
    #[error("a program of user {user} listens there, who is not believed: {}", believed(.users))]
    Stranger { user: u32, users: Vec<u32> },
    #[error(
        "no answer within {} s{}",
        .within.as_secs_f32(),
        if *.has_effect { "; it may have been done all the same" } else { "" }
    )]
    Timeout { within: Duration, has_effect: bool },
    #[error("the answer is larger than {MAX_ANSWER} bytes")]
    TooLarge,
    #[error("{0}")]
    Http(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl FetchError {
    /// Reports whether this user has no permission to connect.
    pub fn is_denied(&self) -> bool {
        matches!(&self.cause, Cause::Connect(error) if error.kind() == std::io::ErrorKind::PermissionDenied)
    }

    /// Reports whether nothing listens at the address, as opposed to a server that answers badly.
    pub fn is_connect(&self) -> bool {
        matches!(self.cause, Cause::Connect(_))
    }
}

/// Sends one request without a body on a new connection, and reads the whole answer.
pub async fn fetch(
    peer: &Peer,
    method: Method,
    path: &str,
    within: Duration,
) -> Result<(StatusCode, Bytes), FetchError> {
    send(peer, method, path, None, within).await
}

/// Does what [`fetch`] does on a Unix socket, if its server runs as one of `users` (ids). Otherwise no request is sent. The kernel reports
/// the user of the listening process (`SO_PEERCRED`), regardless of the owner of the file.
pub async fn fetch_from_users(
    socket: &Path,
    users: &[u32],
    path: &str,
    within: Duration,
) -> Result<(StatusCode, Bytes), FetchError> {
    let exchange = async {
        let io = UnixStream::connect(socket).await.map_err(Cause::Connect)?;
        let user = io.peer_cred().map_err(Cause::Connect)?.uid();
        if !users.contains(&user) {
            return Err(Cause::Stranger { user, users: users.to_vec() });
        }
        exchange_on(io, &Method::GET, path, None, "localhost").await
    };
    let answer = timeout(within, exchange).await;
    let answer = answer.unwrap_or(Err(Cause::Timeout { within, has_effect: false }));
    answer.map_err(|cause| FetchError {
        method: Method::GET,
        path: path.to_owned(),
        peer: Peer::Unix(socket.to_owned()),
        cause,
    })
}

fn believed(users: &[u32]) -> String {
    let users: Vec<String> = users.iter().map(u32::to_string).collect();
    format!("only users {} are", users.join(", "))
}

/// Does what [`fetch`] does, with `POST` and a JSON body.
pub async fn post(
    peer: &Peer,
    path: &str,
    json: Bytes,
    within: Duration,
) -> Result<(StatusCode, Bytes), FetchError> {
    send(peer, Method::POST, path, Some(json), within).await
}

async fn send(
    peer: &Peer,
    method: Method,
    path: &str,
    json: Option<Bytes>,
    within: Duration,
) -> Result<(StatusCode, Bytes), FetchError> {
    let has_effect = json.is_some();
    let exchange = async {
        match peer {
            Peer::Tcp(address) => {
                let io = TcpStream::connect(address).await.map_err(Cause::Connect)?;
                exchange_on(io, &method, path, json, &address.to_string()).await
            }
            Peer::Unix(socket) => {
                let io = UnixStream::connect(socket).await.map_err(Cause::Connect)?;
                exchange_on(io, &method, path, json, "localhost").await
            }
        }
    };
    let answer = timeout(within, exchange).await.unwrap_or(Err(Cause::Timeout { within, has_effect }));
    answer.map_err(|cause| FetchError { method, path: path.to_owned(), peer: peer.clone(), cause })
}

async fn exchange_on<T>(
    io: T,
    method: &Method,
    path: &str,
    json: Option<Bytes>,
    host: &str,
) -> Result<(StatusCode, Bytes), Cause>
where
    TokioIo<T>: Read + Write + Unpin,
{
    fn http(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Cause {
        Cause::Http(error.into())
    }
    let (mut requests, connection) = http1::handshake(TokioIo::new(io)).await.map_err(http)?;
    let is_json = json.is_some();
    let mut request = Request::new(Full::new(json.unwrap_or_default()));
    *request.method_mut() = method.clone();
    *request.uri_mut() = path.parse::<Uri>().map_err(http)?;
    if is_json {
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    request.headers_mut().insert(HOST, HeaderValue::from_str(host).map_err(http)?);
    let exchange = async {
        let response = requests.send_request(request).await.map_err(http)?;
        let status = response.status();
        match Limited::new(response.into_body(), MAX_ANSWER).collect().await {
            Ok(body) => Ok((status, body.to_bytes())),
            Err(error) if error.is::<LengthLimitError>() => Err(Cause::TooLarge),
            Err(error) => Err(http(error)),
        }
    };
    // The connection is driven here rather than in a task, so that it ends with the exchange.
    tokio::pin!(exchange, connection);
    tokio::select! {
        biased;
        answer = &mut exchange => answer,
        ended = &mut connection => match ended {
            Ok(()) => exchange.await,
            Err(error) => Err(http(error)),
        },
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_server_that_closes_after_its_answer_is_heard() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = Peer::Tcp(listener.local_addr().unwrap());
        let server = crate::tasks::spawn_handle(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let count = stream.read(&mut request).await.unwrap();
            stream.write_all(b"HTTP/1.1 503 Busy\r\nconnection: close\r\n\r\nlater").await.unwrap();
            String::from_utf8_lossy(&request[..count]).into_owned()
        });
        let answer = fetch(&peer, Method::POST, "/drain?x=1", Duration::from_secs(5)).await.unwrap();
        assert_eq!(answer, (StatusCode::SERVICE_UNAVAILABLE, Bytes::from("later")));
        assert!(server.await.unwrap().starts_with("POST /drain?x=1 HTTP/1.1\r\nhost: 127.0.0.1:"));
    }

    #[tokio::test]
    async fn json_is_posted_and_what_may_have_been_done_is_said() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = Peer::Tcp(listener.local_addr().unwrap());
        let within = Duration::from_millis(300);
        let server = crate::tasks::spawn_handle(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = String::new();
            stream.read_to_string(&mut request).await.unwrap();
            request
        });
        let unanswered = post(&peer, "/evict", "{\"a\":1}".into(), within).await.unwrap_err();
        assert_eq!(
            crate::report::one_line(&unanswered),
            format!(
                "POST /evict at {peer} failed; because: no answer within 0.3 s; it may have been done all the same"
            )
        );
        let request = server.await.unwrap();
        assert!(request.contains("content-type: application/json\r\n"), "{request}");
        assert!(request.ends_with("\r\n\r\n{\"a\":1}"), "{request}");
    }

    #[tokio::test]
    async fn a_server_of_another_user_is_not_asked() {
        let path = std::env::temp_dir().join(format!("vmesh-fetch-{}.sock", std::process::id()));
        _ = std::fs::remove_file(&path);
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let me = rustix::process::geteuid().as_raw();
        let server = crate::tasks::spawn_handle(async move {
            let mut asked = Vec::new();
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = [0; 1024];
                asked.push(stream.read(&mut request).await.unwrap());
                _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
            }
            asked
        });
        let within = Duration::from_secs(5);
        let refused = fetch_from_users(&path, &[me + 1], "/names", within).await.unwrap_err();
        let message = crate::report::one_line(&refused);
        assert!(message.contains(&format!("a program of user {me} listens there")), "{message}");
        let answer = fetch_from_users(&path, &[me + 1, me], "/names", within).await.unwrap();
        assert_eq!(answer, (StatusCode::OK, Bytes::from("ok")));
        // No request was sent to the server of another user.
        assert_eq!(server.await.unwrap()[0], 0);
        std::fs::remove_file(path).unwrap();
    }

    #[tokio::test]
    async fn nobody_there_and_no_answer_are_told_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = Peer::Tcp(listener.local_addr().unwrap());
        let silent = fetch(&peer, Method::GET, "/", Duration::from_millis(30)).await.unwrap_err();
        assert!(!silent.is_connect());
        assert_eq!(
            crate::report::one_line(&silent),
            format!("GET / at {peer} failed; because: no answer within 0.03 s")
        );
        let nobody =
            fetch(&Peer::Unix("/no/such.sock".into()), Method::GET, "/", Duration::from_secs(5)).await;
        assert!(nobody.unwrap_err().is_connect());
    }
}
