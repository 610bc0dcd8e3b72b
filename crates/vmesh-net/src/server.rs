//! The socket: who may ask what is told by the kernel (SO_PEERCRED, unix(7)), not by whoever asks.

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

use crate::board::StatusSource;
use crate::keeper::{Question, Reply, asked};
use crate::protocol::{Answer, Ask, MAX_LINE, Status};

/// Connections at a time of those who may change something: the agent's, and a few of operators.
const CONNECTIONS: usize = 16;
/// Of all others together, who must not be in their way.
const STRANGERS: usize = 64;
/// Of one user among these. Beyond it the user's oldest connection is closed, so that who says nothing is in no one's way.
const OF_ONE_STRANGER: usize = 8;
/// What these may send in one line.
const STRANGERS_LINE: usize = 4096;
/// How long one of these may say nothing, or not take its answer.
const STRANGERS_WITHIN: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(30);
/// A look at Envoy takes half a second for each port at most.
const LOOKS_WITHIN: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
#[error("could not listen on {} for the agent", .path.display())]
pub struct ListenError {
    path: PathBuf,
    #[source]
    cause: io::Error,
}

/// Binds the socket, which lets in the group of its directory; what each may ask is told apart later.
pub fn listen(path: &Path) -> Result<UnixListener, ListenError> {
    sockets::listen(path).map_err(|cause| ListenError { path: path.to_owned(), cause })
}

/// What strangers do is told, and not as often as they do it: the log is not theirs to fill.
struct Seldom(Mutex<Option<Instant>>);

impl Seldom {
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

/// What connections are answered with.
#[derive(Clone)]
pub struct Answers {
    /// The agent's user.
    pub agent: u32,
    pub keeper: mpsc::Sender<Question>,
    pub looks: mpsc::Sender<oneshot::Sender<()>>,
    pub source: StatusSource,
}

/// The connections of those who may only look, the oldest first.
#[derive(Default)]
struct Strangers(VecDeque<(u32, AbortHandle)>);

impl Strangers {
    /// Makes room for one more connection of `uid`. Returns whether one had to be closed for that.
    fn make_room(&mut self, uid: u32) -> bool {
        self.0.retain(|(_, connection)| !connection.is_finished());
        let of = |uid: u32| self.0.iter().filter(|(user, _)| *user == uid).count();
        let whose = if of(uid) >= OF_ONE_STRANGER {
            uid
        } else if self.0.len() >= STRANGERS {
            // Whoever has most can spare one.
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

/// Serves until it is dropped.
pub async fn serve(listener: UnixListener, answers: Answers) {
    let mut connections = JoinSet::new();
    let (trusted, mut strangers) = (Arc::new(()), Strangers::default());
    let seldom = Arc::new(Seldom(Mutex::new(None)));
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    warn!("could not accept a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            Some(_) = connections.join_next() => continue,
        };
        let (uid, pid) = match stream.peer_cred() {
            Ok(peer) => (peer.uid(), peer.pid()),
            Err(error) => {
                warn!("a connection without a user is closed: {error}");
                continue;
            }
        };
        let peer = Peer { uid, pid, may_change: uid == 0 || uid == answers.agent };
        if !peer.may_change {
            if strangers.make_room(uid) && seldom.is_due() {
                warn!(uid, "too many connections: the oldest is closed");
            }
            let handle = connections.spawn(converse(stream, peer, seldom.clone(), answers.clone(), None));
            strangers.0.push_back((uid, handle));
            continue;
        }
        // Each conversation holds one.
        if Arc::strong_count(&trusted) > CONNECTIONS {
            warn!(uid, "too many connections: one is closed");
            continue;
        }
        let held = Some(Arc::clone(&trusted));
        connections.spawn(converse(stream, peer, seldom.clone(), answers.clone(), held));
    }
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy)]
struct Peer {
    uid: u32,
    pid: Option<i32>,
    may_change: bool,
}

async fn converse(
    stream: UnixStream,
    peer: Peer,
    seldom: Arc<Seldom>,
    answers: Answers,
    _held: Option<Arc<()>>,
) {
    let Peer { uid, may_change, .. } = peer;
    let (limit, within) = match may_change {
        true => (MAX_LINE, None),
        false => (STRANGERS_LINE, Some(STRANGERS_WITHIN)),
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
                if may_change || seldom.is_due() {
                    warn!(
                        uid,
                        "a question without an end, or longer than {limit} bytes: the connection is closed"
                    );
                }
                return;
            }
            Err(error) => return debug!(uid, "a connection broke: {error}"),
        }
        let answer = match serde_json::from_slice::<Ask>(&line) {
            Err(error) => Answer::Refused(format!("not a question of this version: {error}")),
            Ok(ask) if !may_change && !ask.is_for_anybody() => {
                if seldom.is_due() {
                    warn!(uid, "a change was asked for by a user that may not");
                }
                Answer::Refused(format!("user {uid} may look, and change nothing"))
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

impl Answers {
    /// What needs no change of rules is answered here: that the agent is well is heard whatever the keeper waits for.
    async fn answer(&self, ask: Ask, pid: Option<i32>) -> Answer {
        let status = |status: Status| Answer::Status(Box::new(status));
        let agent = &self.source.agent;
        let _waits = match &ask {
            Ask::Status => return status(self.source.counted().await),
            Ask::Look => {
                let (answer, looked) = oneshot::channel();
                // Where so many ask already, they are answered by one look.
                if self.looks.try_send(answer).is_ok() {
                    _ = timeout(LOOKS_WITHIN, looked).await;
                }
                return status(self.source.status().await);
            }
            Ask::Well => {
                return match agent.accept(pid) {
                    Ok(()) => status(self.source.status().await),
                    Err(why) => Answer::Refused(why),
                };
            }
            Ask::Want(_) => match agent.accept(pid) {
                Ok(()) => Some(agent.waits()),
                Err(why) => return Answer::Refused(why),
            },
            Ask::Confirm { .. } | Ask::Revert { .. } if agent.is(pid) => Some(agent.waits()),
            Ask::Confirm { .. } | Ask::Revert { .. } | Ask::Plan { .. } | Ask::Retry => None,
        };
        match asked(&self.keeper, ask, PATIENCE).await {
            Reply::Done => status(self.source.status().await),
            Reply::Plan(text) => Answer::Plan(text),
            Reply::Refused(why) => Answer::Refused(why),
        }
    }
}
