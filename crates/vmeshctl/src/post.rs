//! One request that changes something: its body is JSON.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper::rt::{Read, Write};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use vmesh_daemon::fetch::{MAX_ANSWER, Peer};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PostError {
    #[error("nothing listens there that lets this user in: {0}")]
    Connect(#[source] std::io::Error),
    #[error("no answer within {} s; it may have been done all the same", .0.as_secs())]
    Timeout(Duration),
    #[error("{0}")]
    Http(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl PostError {
    fn http(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> PostError {
        PostError::Http(error.into())
    }
}

/// Sends `body` and reads the whole answer, on a connection of its own.
pub(crate) async fn post(
    peer: &Peer,
    path: &str,
    body: Bytes,
    within: Duration,
) -> Result<(StatusCode, Bytes), PostError> {
    let exchange = async {
        match peer {
            Peer::Tcp(address) => {
                let io = TcpStream::connect(address).await.map_err(PostError::Connect)?;
                say(io, path, body, &address.to_string()).await
            }
            Peer::Unix(socket) => {
                let io = UnixStream::connect(socket).await.map_err(PostError::Connect)?;
                say(io, path, body, "localhost").await
            }
        }
    };
    timeout(within, exchange).await.unwrap_or(Err(PostError::Timeout(within)))
}

async fn say<T>(io: T, path: &str, body: Bytes, host: &str) -> Result<(StatusCode, Bytes), PostError>
where
    TokioIo<T>: Read + Write + Unpin,
{
    let (mut requests, connection) = http1::handshake(TokioIo::new(io)).await.map_err(PostError::http)?;
    let request = Request::builder()
        .method(Method::POST)
        .uri(path)
        .header(HOST, host)
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(body))
        .map_err(PostError::http)?;
    let exchange = async {
        let response = requests.send_request(request).await.map_err(PostError::http)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        Ok((status, body.map_err(PostError::Http)?.to_bytes()))
    };
    // The connection is driven here and not by a task: it ends with the exchange, however that ends.
    tokio::pin!(exchange, connection);
    tokio::select! {
        biased;
        answer = &mut exchange => answer,
        ended = &mut connection => match ended {
            Ok(()) => exchange.await,
            Err(error) => Err(PostError::http(error)),
        },
    }
}
