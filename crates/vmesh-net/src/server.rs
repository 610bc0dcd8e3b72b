//! The socket: who may ask what is told by the kernel (SO_PEERCRED, unix(7)), not by whoever asks.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::keeper::{Question, asked};
use crate::protocol::{Answer, Ask, MAX_LINE};

/// Connections at a time: the agent's, and a few of operators.
const CONNECTIONS: usize = 16;
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
#[error("could not listen on {} for the agent", .path.display())]
pub struct ListenError {
    path: PathBuf,
    #[source]
    cause: io::Error,
}

/// Binds the socket. Its mode lets in the group of its directory; what each may ask is told apart later.
pub fn listen(path: &Path) -> Result<UnixListener, ListenError> {
    let bind = || {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o660))?;
        Ok(listener)
    };
    bind().map_err(|cause| ListenError { path: path.to_owned(), cause })
}

/// Serves until it is dropped.
pub async fn serve(listener: UnixListener, agent: u32, to: mpsc::Sender<Question>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(_) if connections.len() >= CONNECTIONS => warn!("too many connections: one is closed"),
                Ok((stream, _)) => {
                    connections.spawn(converse(stream, agent, to.clone()));
                }
                Err(error) => {
                    warn!("could not accept a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn converse(stream: UnixStream, agent: u32, to: mpsc::Sender<Question>) {
    let uid = match stream.peer_cred() {
        Ok(peer) => peer.uid(),
        Err(error) => return warn!("a connection without a user is closed: {error}"),
    };
    let may_change = uid == 0 || uid == agent;
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = Vec::new();
        match (&mut reader).take(MAX_LINE as u64).read_until(b'\n', &mut line).await {
            Ok(0) => return,
            Ok(_) if line.last() == Some(&b'\n') => {}
            Ok(_) => {
                return warn!(
                    uid,
                    "a question without an end, or longer than {MAX_LINE} bytes: the connection is closed"
                );
            }
            Err(error) => return debug!(uid, "a connection broke: {error}"),
        }
        let answer = match serde_json::from_slice::<Ask>(&line) {
            Err(error) => Answer::Refused(format!("not a question of this version: {error}")),
            Ok(ask) if !may_change && !ask.only_reads() => {
                warn!(uid, "a change was asked for by a user that may not");
                Answer::Refused(format!("user {uid} may look, and change nothing"))
            }
            Ok(ask) => asked(&to, ask, PATIENCE).await,
        };
        let Ok(mut line) = serde_json::to_vec(&answer) else { return };
        line.push(b'\n');
        if writer.write_all(&line).await.is_err() {
            return;
        }
    }
}
