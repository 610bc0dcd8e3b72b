//! The client side of the socket, for the agent and for operators.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

use crate::protocol::{MAX_LINE, Request, Response};

/// The time limit of a response. Rules are changed by tools that may have to wait for a lock.
const ANSWERS_WITHIN: Duration = Duration::from_secs(40);

/// A failed request to vmesh-net.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "could not connect to vmesh-net at {}; check that it runs (`systemctl status vmesh-net`) and that this user may open the socket",
        .path.display()
    )]
    Connect {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("vmesh-net at {} closed the connection before it answered; see `journalctl -u vmesh-net`", .path.display())]
    Gone {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("vmesh-net at {} did not answer within {} s; see `journalctl -u vmesh-net`", .path.display(), ANSWERS_WITHIN.as_secs())]
    Slow { path: PathBuf },
    #[error("could not parse the answer of vmesh-net at {}; it may be of another version", .path.display())]
    Garbled {
        path: PathBuf,
        #[source]
        cause: serde_json::Error,
    },
}

/// A connection to vmesh-net.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

impl Client {
    pub async fn connect(path: &Path) -> Result<Client, ClientError> {
        let stream = UnixStream::connect(path).await;
        let stream = stream.map_err(|cause| ClientError::Connect { path: path.to_owned(), cause })?;
        let (reader, writer) = stream.into_split();
        Ok(Client { path: path.to_owned(), reader: BufReader::new(reader), writer })
    }

    /// Sends a request, and waits for its response. After an error the connection must not be used again.
    pub async fn ask(&mut self, ask: &Request) -> Result<Response, ClientError> {
        let path = || self.path.clone();
        let garbled = |cause| ClientError::Garbled { path: path(), cause };
        let mut line = serde_json::to_vec(ask).map_err(garbled)?;
        line.push(b'\n');
        let mut answer = Vec::new();
        let exchange = async {
            self.writer.write_all(&line).await?;
            let mut limited = (&mut self.reader).take(MAX_LINE as u64);
            match limited.read_until(b'\n', &mut answer).await? {
                0 => Err(io::ErrorKind::UnexpectedEof.into()),
                _ => Ok(()),
            }
        };
        match timeout(ANSWERS_WITHIN, exchange).await {
            Err(_) => Err(ClientError::Slow { path: self.path.clone() }),
            Ok(Err(cause)) => Err(ClientError::Gone { path: self.path.clone(), cause }),
            Ok(Ok(())) => serde_json::from_slice(&answer)
                .map_err(|cause| ClientError::Garbled { path: self.path.clone(), cause }),
        }
    }
}

/// Sends a single request on a new connection.
pub async fn ask(path: &Path, ask: &Request) -> Result<Response, ClientError> {
    Client::connect(path).await?.ask(ask).await
}
