//! TLS connections to control planes, and the requests of a node that joins or renews its certificates.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ClientConfig;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use vmesh_api::Failure;
use vmesh_identity::tls::{self, TlsError};
use vmesh_xds::client::AdsStream;
use zeroize::Zeroizing;

use super::CredentialsReceiver;
use crate::config::ControlPlane;

/// The timeout of a connection with its TLS handshake.
pub(crate) const CONNECTS_WITHIN: Duration = Duration::from_secs(5);
/// The timeout of a request on an open connection.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);
/// The most bytes of a request, which control planes accept.
pub const MAX_REQUEST: usize = 64 << 10;
/// The most bytes of an answer: a hundred chains of three certificates take a quarter of it.
const MAX_ANSWER: usize = 1 << 20;
/// The most characters of a control plane's reason that are repeated.
const MAX_REASON: usize = 500;
/// The application protocol of the mTLS port.
const HTTP2: &[u8] = b"h2";

/// A request that has no usable answer.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("could not connect to the control plane {replica}")]
    Connect {
        replica: ControlPlane,
        #[source]
        cause: io::Error,
    },
    #[error("could not use this node's certificate")]
    Tls(#[source] TlsError),
    #[error("the control plane {replica} does not answer within {} s", within.as_secs())]
    Late { replica: ControlPlane, within: Duration },
    #[error(
        "the request for the control plane {replica} has more than {MAX_REQUEST} bytes: configure fewer services"
    )]
    TooLarge { replica: ControlPlane },
    #[error("the control plane {replica} ended the connection")]
    Broken {
        replica: ControlPlane,
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// HTTP 403: asking again changes nothing.
    #[error("the control plane {replica} refuses: {reason}")]
    Refused { replica: ControlPlane, reason: String },
    #[error("the control plane {replica} cannot answer now (HTTP {status}): {reason}")]
    Failed { replica: ControlPlane, status: u16, reason: String },
    #[error("the answer of the control plane {replica} makes no sense")]
    Answer {
        replica: ControlPlane,
        #[source]
        cause: serde_json::Error,
    },
}

/// An answer, and the moment at which the control plane's clock was read, by this host's clock.
#[derive(Debug)]
pub struct TimedAnswer<A> {
    pub answer: A,
    pub asked_at: SystemTime,
    pub answered_at: SystemTime,
}

impl<A> TimedAnswer<A> {
    /// Returns the seconds by which the control plane's clock, which showed `theirs` (Unix seconds), is ahead of this host's.
    pub fn clock_skew(&self, theirs: u64) -> i64 {
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let signed = |seconds: u64| i64::try_from(seconds).unwrap_or(i64::MAX);
        let (from, to) = (signed(seconds(self.asked_at)), signed(seconds(self.answered_at)));
        // A clock that shows a time within the request may be right.
        let theirs = signed(theirs);
        if theirs < from { theirs.saturating_sub(from) } else { theirs.saturating_sub(to).max(0) }
    }
}

/// Opens a TLS connection to `replica` that agreed on HTTP/2.
pub(crate) async fn connect_tls(
    replica: &ControlPlane,
    config: ClientConfig,
) -> io::Result<TlsStream<TcpStream>> {
    let connecting = async {
        let tcp = TcpStream::connect(replica.address.to_string()).await?;
        tcp.set_nodelay(true)?;
        TlsConnector::from(Arc::new(config)).connect(tls::any_server_name(), tcp).await
    };
    let late = || {
        let text = format!("no connection within {} s", CONNECTS_WITHIN.as_secs());
        io::Error::new(io::ErrorKind::TimedOut, text)
    };
    let stream = timeout(CONNECTS_WITHIN, connecting).await.map_err(|_| late())??;
    match stream.get_ref().1.alpn_protocol() {
        Some(HTTP2) => Ok(stream),
        _ => {
            Err(io::Error::other("it does not speak HTTP/2 there: is this the mTLS port of a control plane?"))
        }
    }
}

/// Opens an xDS stream to `replica`: with mTLS and this node's certificate, or in plaintext if the configuration says so.
pub(crate) async fn connect_ads(
    replica: &ControlPlane,
    credentials: &CredentialsReceiver,
) -> io::Result<AdsStream> {
    if !replica.is_tls {
        let url = replica.to_string();
        return match timeout(CONNECTS_WITHIN, AdsStream::connect(&url)).await {
            Ok(connected) => connected,
            Err(_) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no connection within {} s", CONNECTS_WITHIN.as_secs()),
            )),
        };
    }
    // Each connection shows the certificate and trusts the roots of the moment.
    let credentials = credentials.borrow().clone();
    let credentials = credentials.ok_or_else(|| io::Error::other("this node has no identity yet"))?;
    let config = credentials.client_config().map_err(io::Error::other)?;
    AdsStream::over(connect_tls(replica, config).await?).await
}

/// Sends `request` to `path` of `replica`, on a connection of its own, and returns the answer.
pub(crate) async fn post<Q: Serialize, A: DeserializeOwned>(
    replica: &ControlPlane,
    config: ClientConfig,
    path: &str,
    request: &Q,
) -> Result<TimedAnswer<A>, RequestError> {
    let name = || replica.clone();
    let encoded = serde_json::to_vec(request).map(Zeroizing::new);
    let encoded = encoded.map_err(|cause| RequestError::Answer { replica: name(), cause })?;
    if encoded.len() > MAX_REQUEST {
        return Err(RequestError::TooLarge { replica: name() });
    }
    let stream = connect_tls(replica, config).await;
    let stream = stream.map_err(|cause| RequestError::Connect { replica: name(), cause })?;
    let asked_at = SystemTime::now();
    let exchange = exchange(stream, path, Bytes::copy_from_slice(&encoded));
    let (status, body) = match timeout(ANSWERS_WITHIN, exchange).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(cause)) => return Err(RequestError::Broken { replica: name(), cause }),
        Err(_) => return Err(RequestError::Late { replica: name(), within: ANSWERS_WITHIN }),
    };
    if status != StatusCode::OK {
        let reason = serde_json::from_slice(&body).map(|failure: Failure| failure.error);
        let reason = vmesh_text::escaped(&reason.unwrap_or_default(), MAX_REASON);
        return Err(match status {
            StatusCode::FORBIDDEN => RequestError::Refused { replica: name(), reason },
            status => RequestError::Failed { replica: name(), status: status.as_u16(), reason },
        });
    }
    let answer =
        serde_json::from_slice(&body).map_err(|cause| RequestError::Answer { replica: name(), cause })?;
    Ok(TimedAnswer { answer, asked_at, answered_at: SystemTime::now() })
}

async fn exchange(
    stream: TlsStream<TcpStream>,
    path: &str,
    body: Bytes,
) -> Result<(StatusCode, Bytes), Box<dyn std::error::Error + Send + Sync>> {
    let (mut sender, connection) =
        http2::Builder::new(TokioExecutor::new()).handshake(TokioIo::new(stream)).await?;
    let request = Request::builder()
        .method(Method::POST)
        .uri(format!("https://vmesh{path}"))
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(body))?;
    let answer = async move {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await?;
        Ok((status, body.to_bytes()))
    };
    tokio::pin!(answer, connection);
    tokio::select! {
        answer = &mut answer => return answer,
        // A server may close the connection right after its answer.
        _ = &mut connection => {}
    }
    answer.await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_wrong_if_it_shows_a_time_outside_of_the_request() {
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(seconds);
        let timed = TimedAnswer { answer: (), asked_at: at(1000), answered_at: at(1004) };
        assert_eq!(timed.clock_skew(1000), 0);
        assert_eq!(timed.clock_skew(1004), 0);
        assert_eq!(timed.clock_skew(1044), 40);
        assert_eq!(timed.clock_skew(900), -100);
    }
}
