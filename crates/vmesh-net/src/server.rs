//! The server side of the socket. The kernel reports the user of each client (SO_PEERCRED, unix(7)), and the
//! user decides which requests are allowed.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tracing::{debug, warn};
use vmesh_daemon::sockets;

use crate::keeper::{KeeperReply, KeeperRequest, ask_keeper};
use crate::protocol::{MAX_LINE, Request, Response, Status};
use crate::status::StatusSource;

/// The limit of connections that may change something: the agent's, and a few of operators.
const TRUSTED_LIMIT: usize = 16;
/// The limit of all read-only connections together. Idle ones must not block the agent.
const READ_ONLY_LIMIT: usize = 64;
/// The limit of read-only connections of one user. Beyond it, the user's oldest connection is closed, so idle
/// connections block nobody.
const READ_ONLY_PER_USER: usize = 8;
/// The limit of a request line on a read-only connection, in bytes.
const READ_ONLY_LINE: usize = 4096;
/// The time limit for each request and each response on a read-only connection.
const READ_ONLY_TIMEOUT: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(30);
/// The limit of a check of Envoy. Each port takes half a second at most.
const LOOKS_WITHIN: Duration = Duration::from_secs(5);

/// The socket could not be created.
#[derive(Debug, thiserror::Error)]
#[error("could not create the socket {} for the agent", .path.display())]
pub struct ListenError {
    path: PathBuf,
    #[source]
    cause: io::Error,
}

/// Creates the socket. It is open to the group of its directory; permissions are checked for each request.
pub fn listen(path: &Path) -> Result<UnixListener, ListenError> {
    sockets::listen(path).map_err(|cause| ListenError { path: path.to_owned(), cause })
}

/// Limits how often misuse of the socket is logged, so that a local user cannot fill the log.
struct LogLimiter(Mutex<Option<Instant>>);

impl LogLimiter {
    const PAUSE: Duration = Duration::from_secs(10);

    fn is_due(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.is_none_or(|last| last.elapsed() >= Self::PAUSE);
        if due {
            *last = Some(Instant::now());
        }
        due
    }
}

/// The resources that requests are answered from.
#[derive(Clone)]
pub struct RequestHandler {
    /// The agent's user.
    pub agent: u32,
    pub keeper: mpsc::Sender<KeeperRequest>,
    pub looks: mpsc::Sender<oneshot::Sender<()>>,
    pub source: StatusSource,
}

/// The read-only connections with their users, the oldest first.
#[derive(Default)]
struct ReadOnlyConnections(VecDeque<(u32, AbortHandle)>);

impl ReadOnlyConnections {
    /// Makes room for one more connection of `uid`. Returns `true` if another connection was closed for it.
    fn make_room(&mut self, uid: u32) -> bool {
        self.0.retain(|(_, connection)| !connection.is_finished());
        let of = |uid: u32| self.0.iter().filter(|(user, _)| *user == uid).count();
        let whose = if of(uid) >= READ_ONLY_PER_USER {
            uid
        } else if self.0.len() >= READ_ONLY_LIMIT {
            // The user with the most connections loses one.
            self.0.iter().map(|(user, _)| *user).max_by_key(|user| of(*user)).unwrap_or(uid)
        } else {
            return false;
        };
        let oldest = self.0.iter().position(|(user, _)| *user == whose);
        if let Some((_, connection)) = oldest.and_then(|at| self.0.remove(at)) {
            connection.abort();
        }
        true
    }
}

/// Accepts connections until the future is dropped.
pub async fn serve(listener: UnixListener, answers: RequestHandler) {
    let mut connections = JoinSet::new();
    let (trusted, mut read_only) = (Arc::new(()), ReadOnlyConnections::default());
    let log_limiter = Arc::new(LogLimiter(Mutex::new(None)));
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!("could not accept a connection, and tries again: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            Some(_) = connections.join_next() => continue,
        };
        let (uid, pid) = match stream.peer_cred() {
            Ok(peer) => (peer.uid(), peer.pid()),
            Err(error) => {
                warn!("could not determine the user of a connection, so it is closed: {error}");
                continue;
            }
        };
        let peer = Peer { uid, pid, may_change: uid == 0 || uid == answers.agent };
        if !peer.may_change {
            if read_only.make_room(uid) && log_limiter.is_due() {
                warn!(uid, "this user has too many connections, so the oldest one is closed");
            }
            let handle =
                connections.spawn(serve_connection(stream, peer, log_limiter.clone(), answers.clone(), None));
            read_only.0.push_back((uid, handle));
            continue;
        }
        // Each conversation holds a clone.
        if Arc::strong_count(&trusted) > TRUSTED_LIMIT {
            warn!(uid, "the agent and root have too many connections, so a new one is closed");
            continue;
        }
        let held = Some(Arc::clone(&trusted));
        connections.spawn(serve_connection(stream, peer, log_limiter.clone(), answers.clone(), held));
    }
}

/// The client at the other end of a connection.
#[derive(Debug, Clone, Copy)]
struct Peer {
    uid: u32,
    pid: Option<i32>,
    may_change: bool,
}

async fn serve_connection(
    stream: UnixStream,
    peer: Peer,
    log_limiter: Arc<LogLimiter>,
    answers: RequestHandler,
    _held: Option<Arc<()>>,
) {
    let Peer { uid, may_change, .. } = peer;
    let (limit, within) = match may_change {
        true => (MAX_LINE, None),
        false => (READ_ONLY_LINE, Some(READ_ONLY_TIMEOUT)),
    };
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = Vec::new();
        let mut limited = (&mut reader).take(limit as u64);
        let read = limited.read_until(b'\n', &mut line);
        match within_limit(within, read).await {
            Ok(0) => return,
            Ok(_) if line.last() == Some(&b'\n') => {}
            Ok(_) => {
                if may_change || log_limiter.is_due() {
                    warn!(
                        uid,
                        "a request has no end or is longer than {limit} bytes, so its connection is closed"
                    );
                }
                return;
            }
            Err(error) => return debug!(uid, "could not read a request: {error}"),
        }
        let answer = match serde_json::from_slice::<Request>(&line) {
            Err(error) => Response::Refused(format!(
                "could not parse the request; its sender may be of another version: {error}"
            )),
            Ok(ask) if !may_change && !ask.is_for_anybody() => {
                if log_limiter.is_due() {
                    warn!(uid, "refused a change that a user without permission requested");
                }
                Response::Refused(format!(
                    "user {uid} may read the status only; changes need the agent's user or root"
                ))
            }
            Ok(ask) => answers.answer(ask, peer.pid).await,
        };
        let Ok(mut line) = serde_json::to_vec(&answer) else { return };
        line.push(b'\n');
        if within_limit(within, writer.write_all(&line)).await.is_err() {
            return;
        }
    }
}

async fn within_limit<T>(
    limit: Option<Duration>,
    work: impl Future<Output = io::Result<T>>,
) -> io::Result<T> {
    match limit {
        None => work.await,
        Some(limit) => match timeout(limit, work).await {
            Ok(done) => done,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        },
    }
}

impl RequestHandler {
    /// Answers a request. Requests that change no rule are answered without the keeper, so the agent's
    /// heartbeat counts even while the keeper is busy.
    async fn answer(&self, ask: Request, pid: Option<i32>) -> Response {
        let status = |status: Status| Response::Status(Box::new(status));
        let agent = &self.source.agent;
        let _waits = match &ask {
            Request::Status => return status(self.source.counted().await),
            Request::Look => {
                let (answer, looked) = oneshot::channel();
                // If the queue is full, the check for the pending requests answers this one as well.
                if self.looks.try_send(answer).is_ok() {
                    _ = timeout(LOOKS_WITHIN, looked).await;
                }
                return status(self.source.status().await);
            }
            Request::Well => {
                return match agent.accept(pid) {
                    Ok(()) => status(self.source.status().await),
                    Err(why) => Response::Refused(why),
                };
            }
            Request::Want(_) => match agent.accept(pid) {
                Ok(()) => Some(agent.track_request()),
                Err(why) => return Response::Refused(why),
            },
            Request::Confirm { .. } | Request::Revert { .. } if agent.is_agent(pid) => {
                Some(agent.track_request())
            }
            Request::Confirm { .. } | Request::Revert { .. } | Request::Plan { .. } | Request::Retry => None,
        };
        match ask_keeper(&self.keeper, ask, PATIENCE).await {
            KeeperReply::Done => status(self.source.status().await),
            KeeperReply::Plan(text) => Response::Plan(text),
            KeeperReply::Refused(why) => Response::Refused(why),
        }
    }
}
