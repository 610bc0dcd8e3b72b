//! The socket: who may ask what is told by the kernel (SO_PEERCRED, unix(7)), not by whoever asks.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{debug, warn};
use vmesh_daemon::sockets;

use crate::keeper::{Question, asked};
use crate::protocol::{Answer, Ask, MAX_LINE};

/// Connections at a time of those who may change something: the agent's, and a few of operators.
const CONNECTIONS: usize = 16;
/// Of all others, who must not be in their way.
const STRANGERS: usize = 8;
/// What these may send in one line.
const STRANGERS_LINE: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(30);

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

/// Serves until it is dropped.
pub async fn serve(listener: UnixListener, agent: u32, to: mpsc::Sender<Question>) {
    let (mut trusted, mut strangers) = (JoinSet::new(), JoinSet::new());
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
            Some(_) = trusted.join_next() => continue,
            Some(_) = strangers.join_next() => continue,
        };
        let (uid, pid) = match stream.peer_cred() {
            Ok(peer) => (peer.uid(), peer.pid()),
            Err(error) => {
                warn!("a connection without a user is closed: {error}");
                continue;
            }
        };
        let may_change = uid == 0 || uid == agent;
        let (of, limit) = if may_change { (&mut trusted, CONNECTIONS) } else { (&mut strangers, STRANGERS) };
        if of.len() >= limit {
            if may_change || seldom.is_due() {
                warn!(uid, "too many connections: one is closed");
            }
            continue;
        }
        of.spawn(converse(stream, (uid, pid), may_change, seldom.clone(), to.clone()));
    }
}

async fn converse(
    stream: UnixStream,
    (uid, pid): (u32, Option<i32>),
    may_change: bool,
    seldom: Arc<Seldom>,
    to: mpsc::Sender<Question>,
) {
    let limit = if may_change { MAX_LINE } else { STRANGERS_LINE };
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = Vec::new();
        match (&mut reader).take(limit as u64).read_until(b'\n', &mut line).await {
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
            Ok(ask) => asked(&to, ask, pid, PATIENCE).await,
        };
        let Ok(mut line) = serde_json::to_vec(&answer) else { return };
        line.push(b'\n');
        if writer.write_all(&line).await.is_err() {
            return;
        }
    }
}
