//! Opens sessions: credentials, errors in plain words, and events to count.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::timeout;
use vmesh_backoff::Backoff;
use zookeeper_client as zk;

use crate::config::{Config, Mechanism};

/// An event for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionEvent {
    /// Requests for data or children, with their number.
    Reads(u64),
    /// Requests of those that failed, with their number. A missing node is no failure.
    FailedReads(u64),
    /// The client connected or reconnected to a server.
    Connected,
    /// A connection ended.
    Disconnected,
    /// A session expired: reconnecting took longer than the servers keep a session.
    Expired,
}

/// Receives events for metrics, from the task where they happen: it must not block.
pub type EventSink = Arc<dyn Fn(SessionEvent) + Send + Sync>;

/// The reason why a session could not be opened, was lost, or did not process a request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("could not read {}", file.display())]
    File {
        file: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("{} has to hold `user:password` in one line", .0.display())]
    Credentials(PathBuf),
    #[error("cannot use the certificates in {files}: {why}")]
    Certificates { files: String, why: String },
    #[error("`tls` sets only one of `cert_file` and `key_file`: set both")]
    CertificateWithoutKey,
    #[error("could not open a session with ZooKeeper: {0}")]
    Unreachable(String),
    #[error(
        "ZooKeeper ({servers}) refused the credentials, or requires another kind: see `sasl` and `auth`, and \
         `enforce.auth.schemes` of the servers"
    )]
    Refused { servers: String },
    /// A request for a node failed: `could not read /services: ..`.
    #[error("could not {action} {path}: {why}")]
    Request { action: &'static str, path: String, why: String },
    #[error(
        "ZooKeeper ({0}) is older than 3.6 and has no persistent watches: set `watch` to auto or one-shot"
    )]
    NoPersistentWatches(String),
    #[error("the session with ZooKeeper ({servers}) {why}")]
    Lost { servers: String, why: &'static str },
    #[error(
        "ZooKeeper has lost its quorum, and the connected server only answers reads: its data may be out of date"
    )]
    ReadOnly,
    #[error("the task that keeps the session ended unexpectedly and is restarted")]
    Ended,
}

impl Error {
    pub(crate) fn request(action: &'static str, path: &str, cause: &zk::Error) -> Error {
        Error::Request { action, path: path.to_owned(), why: describe(cause) }
    }

    /// Returns the error and its cause in one line.
    pub fn line(&self) -> String {
        match std::error::Error::source(self) {
            Some(cause) => format!("{self}: {cause}"),
            None => self.to_string(),
        }
    }
}

/// Describes a protocol error for the person who has to fix its cause.
pub(crate) fn describe(error: &zk::Error) -> String {
    let fixed = match error {
        zk::Error::NoAuth => {
            "not allowed; the node's ACL has to give READ (to read it) or WRITE, CREATE or DELETE (to change \
             it) to these credentials"
        }
        zk::Error::NoNode => "there is no such node",
        zk::Error::ConnectionLoss => "the connection was lost",
        zk::Error::Throttled => "the server is overloaded and refuses requests",
        zk::Error::NotReadOnly => "the server has lost its quorum and only answers reads",
        zk::Error::QuotaExceeded => "the quota of a node above it is used up",
        zk::Error::SessionExpired => "the session expired",
        zk::Error::ReplyTooLarge { announced, limit } => {
            return format!(
                "the server announces a reply of {announced} bytes, and at most {limit} are read: is it a \
                 ZooKeeper, and does a node hold that much or have so many children?"
            );
        }
        zk::Error::NoChildrenForEphemerals => {
            "the node above it is ephemeral, and such nodes have no children"
        }
        other => return other.to_string(),
    };
    fixed.to_owned()
}

/// Reports whether an error concerns the connection or the session rather than the requested node.
pub(crate) fn is_of_session(error: &zk::Error) -> bool {
    matches!(
        error,
        zk::Error::ConnectionLoss
            | zk::Error::SessionExpired
            | zk::Error::SessionMoved
            | zk::Error::ClientClosed
            | zk::Error::AuthFailed
            | zk::Error::NoHosts
            | zk::Error::Timeout
            | zk::Error::Throttled
            | zk::Error::ReplyTooLarge { .. }
            // The client returns these if its own session task has ended.
            | zk::Error::UnexpectedError(_)
            | zk::Error::RuntimeInconsistent
            | zk::Error::Custom(_)
    )
}

/// The contents of the credential and certificate files that the configuration names.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secrets {
    digest: Option<Vec<u8>>,
    sasl: Option<(String, String)>,
    tls: Option<Pem>,
}

#[derive(Clone, PartialEq, Eq)]
struct Pem {
    ca: String,
    identity: Option<(String, String)>,
}

/// Prints only the type's name, to keep secrets out of logs.
impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secrets")
    }
}

impl Secrets {
    pub(crate) async fn read(config: &Config) -> Result<Secrets, Error> {
        let digest = match &config.auth {
            Some(auth) => {
                let (user, password) = credentials(&auth.digest_file).await?;
                Some(format!("{user}:{password}").into_bytes())
            }
            None => None,
        };
        let sasl = match &config.sasl {
            Some(sasl) => Some(credentials(&sasl.credentials_file).await?),
            None => None,
        };
        let tls = match &config.tls {
            Some(tls) => {
                let identity = match (&tls.cert_file, &tls.key_file) {
                    (Some(cert), Some(key)) => Some((text(cert).await?, text(key).await?)),
                    (None, None) => None,
                    _ => return Err(Error::CertificateWithoutKey),
                };
                Some(Pem { ca: text(&tls.ca_file).await?, identity })
            }
            None => None,
        };
        Ok(Secrets { digest, sasl, tls })
    }

    /// Reports whether the client authenticates, so that an ACL can name it.
    pub(crate) fn has_identity(&self) -> bool {
        self.digest.is_some()
            || self.sasl.is_some()
            || self.tls.as_ref().is_some_and(|tls| tls.identity.is_some())
    }
}

async fn text(file: &Path) -> Result<String, Error> {
    tokio::fs::read_to_string(file).await.map_err(|cause| Error::File { file: file.to_owned(), cause })
}

async fn credentials(file: &Path) -> Result<(String, String), Error> {
    let text = text(file).await?;
    let line = text.trim();
    match line.split_once(':') {
        Some((user, password)) if !user.is_empty() && !line.contains('\n') => {
            Ok((user.to_owned(), password.to_owned()))
        }
        _ => Err(Error::Credentials(file.to_owned())),
    }
}

/// Opens a new session. Servers are tried once each, in random order. `read_only` also allows a server that has
/// lost its quorum; `is_old` avoids requests that servers before 3.5 reject.
pub(crate) async fn open(
    config: &Config,
    secrets: &Secrets,
    read_only: bool,
    is_old: bool,
) -> Result<zk::Client, Error> {
    let mut connector = zk::Client::connector()
        .with_session_timeout(config.session_timeout)
        .with_readonly(read_only)
        .with_fail_eagerly();
    if let Some(digest) = &secrets.digest {
        connector = connector.with_auth("digest", digest);
    }
    if let (Some(sasl), Some((user, password))) = (&config.sasl, &secrets.sasl) {
        let Mechanism::DigestMd5 = sasl.mechanism;
        connector = connector.with_sasl(zk::SaslOptions::digest_md5(user.clone(), password.clone()));
    }
    if let (Some(tls), Some(pem)) = (&config.tls, &secrets.tls) {
        connector = connector.with_tls(tls_options(pem).map_err(|why| {
            let files = [Some(&tls.ca_file), tls.cert_file.as_ref(), tls.key_file.as_ref()];
            let files: Vec<_> = files.into_iter().flatten().map(|file| file.display().to_string()).collect();
            Error::Certificates { files: files.join(", "), why: why.to_string() }
        })?);
    }
    if is_old {
        connector = connector.with_server_version(3, 4, 0);
    }
    let cluster = config.connect.to_string();
    let opened = if config.tls.is_some() {
        connector.secure_connect(&cluster).await
    } else {
        connector.connect(&cluster).await
    };
    match opened {
        Ok(client) => Ok(client),
        Err(zk::Error::AuthFailed) => Err(Error::Refused { servers: config.connect.to_string() }),
        Err(zk::Error::NoHosts | zk::Error::Timeout | zk::Error::ConnectionLoss) => {
            Err(Error::Unreachable(diagnosis(config).await))
        }
        Err(other) => Err(Error::Unreachable(format!("{}: {}", config.connect, describe(&other)))),
    }
}

fn tls_options(pem: &Pem) -> Result<zk::TlsOptions, zk::Error> {
    let options = zk::TlsOptions::new().with_pem_ca(&pem.ca)?;
    match &pem.identity {
        Some((cert, key)) => options.with_pem_identity(cert, key),
        None => Ok(options),
    }
}

/// Explains why no server accepted a session. The ZooKeeper client reports no reasons, so this function
/// connects to each server once more.
async fn diagnosis(config: &Config) -> String {
    const AT_MOST: usize = 7;
    let mut reasons = Vec::new();
    let servers = config.connect.servers();
    for server in servers.iter().take(AT_MOST) {
        reasons.push(match timeout(Duration::from_millis(500), TcpStream::connect(server.as_str())).await {
            Ok(Ok(_)) if config.tls.is_some() => format!(
                "{server} accepts connections but no session: it has no quorum, refuses the certificate or \
                 the credentials, shows one that `ca_file` did not sign for this name, or speaks no TLS \
                 there"
            ),
            Ok(Ok(_)) => format!(
                "{server} accepts connections but no session: it has no quorum, refuses the credentials, \
                 or is no ZooKeeper"
            ),
            Ok(Err(error)) => format!("{server}: {}", shortened(&error)),
            Err(_) => format!("{server} does not answer"),
        });
    }
    if servers.len() > AT_MOST {
        reasons.push(format!("and {} more", servers.len() - AT_MOST));
    }
    reasons.join("; ")
}

/// Shortens a system error: removes the number at its end and the prefix that std adds to errors of
/// `getaddrinfo`.
fn shortened(error: &io::Error) -> String {
    let text = error.to_string();
    let message = text.strip_prefix("failed to lookup address information: ").unwrap_or(&text);
    let message = message.split(" (os error").next().unwrap_or(message);
    message.to_lowercase()
}

/// Counts a connection, as long as the value exists.
pub(crate) struct ConnectionGauge(EventSink);

impl ConnectionGauge {
    pub(crate) fn new(count: &EventSink) -> ConnectionGauge {
        count(SessionEvent::Connected);
        ConnectionGauge(count.clone())
    }
}

impl Drop for ConnectionGauge {
    fn drop(&mut self) {
        (self.0)(SessionEvent::Disconnected);
    }
}

/// Makes the back-off between attempts to open a session: 100 ms at first, doubled after each failure up to 30 s.
pub(crate) fn session_backoff() -> Backoff {
    Backoff::doubling(Duration::from_millis(100), Duration::from_secs(30))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_for_a_session_grows_to_half_a_minute_and_begins_anew_after_success() {
        let mut backoff = session_backoff();
        let waits: Vec<_> = (0..12).map(|_| backoff.next_pause()).collect();
        for (index, wait) in waits.iter().enumerate() {
            let whole = Duration::from_millis(100 << index).min(Duration::from_secs(30));
            assert!(*wait >= whole / 2 && *wait <= whole, "{waits:?}");
        }
        backoff.reset();
        assert!(backoff.next_pause() <= Duration::from_millis(100));
    }

    #[tokio::test]
    async fn credentials_are_one_line_and_stay_out_of_logs() {
        let dir = vmesh_testkit::tempdir().unwrap();
        let file = dir.join("digest");
        let mut config = Config::of("zk1".parse().unwrap());
        config.auth = Some(crate::config::Auth { digest_file: file.clone() });
        let read = async |text: &str| {
            std::fs::write(&file, text).unwrap();
            Secrets::read(&config).await.map(|secrets| (secrets.digest.clone(), format!("{secrets:?}")))
        };
        let (digest, shown) = read("mesh:s3cr:et\n").await.unwrap();
        assert_eq!(digest.unwrap(), b"mesh:s3cr:et");
        assert!(!shown.contains("s3cr"));
        for wrong in ["", "mesh", ":x", "a:b\nc:d"] {
            let message = read(wrong).await.unwrap_err().to_string();
            assert!(message.ends_with("has to hold `user:password` in one line"), "{message}");
        }
        std::fs::remove_file(&file).unwrap();
        let message = Secrets::read(&config).await.unwrap_err().line();
        assert!(message.starts_with("could not read ") && message.contains("No such file"), "{message}");
    }
}
