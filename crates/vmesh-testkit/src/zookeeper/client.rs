//! A ZooKeeper client for tests, with the few requests that tests need. Tests must not depend on the library
//! under test, so this code is written by hand. It has one connection, no watches and no pings; its session
//! lasts as long as the test.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::{Failed, Result};

const ANSWER: Duration = Duration::from_secs(15);
const NO_NODE: i32 = -101;
const NODE_EXISTS: i32 = -110;

mod op {
    pub(super) const CREATE: i32 = 1;
    pub(super) const DELETE: i32 = 2;
    pub(super) const GET_DATA: i32 = 4;
    pub(super) const SET_DATA: i32 = 5;
    pub(super) const GET_CHILDREN: i32 = 8;
    pub(super) const AUTH: i32 = 100;
    pub(super) const CLOSE: i32 = -11;
}

/// The kind of a new node. The numbers come from ZooKeeper's protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Persistent = 0,
    Ephemeral = 1,
    PersistentSequential = 2,
    EphemeralSequential = 3,
}

/// A session with one server.
pub struct Client {
    server: SocketAddr,
    stream: TcpStream,
    session: i64,
    xid: i32,
    /// Restricts new nodes to clients with the same credentials.
    private: bool,
}

enum ServerReply {
    Body(Vec<u8>),
    Refused(i32),
}

impl Client {
    /// Opens a session, which ends `lasts` after the last request.
    pub async fn connect(server: SocketAddr, lasts: Duration) -> Result<Client> {
        let what = format!("could not open a session with ZooKeeper {server}");
        let stream = TcpStream::connect(server).await.map_err(Failed::to(what.clone()))?;
        let mut client = Client { server, stream, session: 0, xid: 0, private: false };
        let mut request = Vec::new();
        request.extend(0i32.to_be_bytes());
        request.extend(0i64.to_be_bytes());
        request.extend(i32::try_from(lasts.as_millis()).unwrap_or(i32::MAX).to_be_bytes());
        request.extend(0i64.to_be_bytes());
        request.extend(text(&[0; 16]));
        client.send(&request).await?;
        let answer = client.receive().await?;
        let session = answer.get(8..16).and_then(|bytes| bytes.try_into().ok()).map(i64::from_be_bytes);
        client.session = session.filter(|session| *session != 0).ok_or_else(|| Failed::new(what))?;
        Ok(client)
    }

    /// Adds credentials (`user:password`). New nodes will be accessible with these credentials only.
    pub async fn authenticate(&mut self, credentials: &str) -> Result<()> {
        let body = [&0i32.to_be_bytes()[..], &text(b"digest"), &text(credentials.as_bytes())].concat();
        self.ask(-4, op::AUTH, &body).await?.body("authenticate")?;
        self.private = true;
        Ok(())
    }

    pub fn session(&self) -> i64 {
        self.session
    }

    /// Creates a node and returns its path, which is longer than `path` if the node is sequential.
    pub async fn create(&mut self, path: &str, data: &[u8], kind: Kind) -> Result<String> {
        let answer = self.try_create(path, data, kind).await?.body(&format!("create {path}"))?;
        Ok(String::from_utf8_lossy(answer.get(4..).unwrap_or_default()).into_owned())
    }

    async fn try_create(&mut self, path: &str, data: &[u8], kind: Kind) -> Result<ServerReply> {
        let (scheme, id): (&[u8], &[u8]) = if self.private { (b"auth", b"") } else { (b"world", b"anyone") };
        let everything = 31i32.to_be_bytes();
        let acl = [&1i32.to_be_bytes()[..], &everything, &text(scheme), &text(id)].concat();
        let body = [&text(path.as_bytes())[..], &text(data), &acl, &(kind as i32).to_be_bytes()].concat();
        self.ask_next(op::CREATE, &body).await
    }

    /// Creates a node and its missing parents. If the node exists, sets its data.
    pub async fn make(&mut self, path: &str, data: &[u8], kind: Kind) -> Result<String> {
        for (end, _) in path.match_indices('/').filter(|(end, _)| *end > 0) {
            let above = path.get(..end).unwrap_or_default();
            match self.try_create(above, b"", Kind::Persistent).await? {
                ServerReply::Body(_) | ServerReply::Refused(NODE_EXISTS) => {}
                refused => _ = refused.body(&format!("create {above}"))?,
            }
        }
        match self.try_create(path, data, kind).await? {
            ServerReply::Refused(NODE_EXISTS) => self.set(path, data).await.map(|()| path.to_owned()),
            answer => {
                let answer = answer.body(&format!("create {path}"))?;
                Ok(String::from_utf8_lossy(answer.get(4..).unwrap_or_default()).into_owned())
            }
        }
    }

    pub async fn set(&mut self, path: &str, data: &[u8]) -> Result<()> {
        let body = [&text(path.as_bytes())[..], &text(data), &(-1i32).to_be_bytes()].concat();
        self.ask_next(op::SET_DATA, &body).await?.body(&format!("set {path}")).map(drop)
    }

    pub async fn delete(&mut self, path: &str) -> Result<()> {
        let body = [&text(path.as_bytes())[..], &(-1i32).to_be_bytes()].concat();
        self.ask_next(op::DELETE, &body).await?.body(&format!("delete {path}")).map(drop)
    }

    /// Deletes a node and all nodes below it. A missing node is no error.
    pub async fn delete_all(&mut self, path: &str) -> Result<()> {
        let mut found = vec![path.to_owned()];
        let mut next = 0;
        while let Some(parent) = found.get(next).cloned() {
            next += 1;
            let children = self.children(&parent).await.unwrap_or_default();
            found.extend(children.into_iter().map(|child| format!("{parent}/{child}")));
        }
        for path in found.iter().rev() {
            let body = [&text(path.as_bytes())[..], &(-1i32).to_be_bytes()].concat();
            match self.ask_next(op::DELETE, &body).await? {
                ServerReply::Refused(NO_NODE) => {}
                answer => _ = answer.body(&format!("delete {path}"))?,
            }
        }
        Ok(())
    }

    pub async fn get(&mut self, path: &str) -> Result<Vec<u8>> {
        let body = [&text(path.as_bytes())[..], &[0]].concat();
        let answer = self.ask_next(op::GET_DATA, &body).await?.body(&format!("get {path}"))?;
        let length = answer.get(..4).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_be_bytes);
        let length = usize::try_from(length).unwrap_or_default();
        Ok(answer.get(4..4 + length).unwrap_or_default().to_vec())
    }

    /// Returns the names of a node's children, sorted.
    pub async fn children(&mut self, path: &str) -> Result<Vec<String>> {
        let body = [&text(path.as_bytes())[..], &[0]].concat();
        let answer = self.ask_next(op::GET_CHILDREN, &body).await?.body(&format!("list {path}"))?;
        let mut rest = answer.get(4..).unwrap_or_default();
        let mut names = Vec::new();
        while let Some((length, after)) = rest.split_first_chunk::<4>() {
            let length = usize::try_from(i32::from_be_bytes(*length)).unwrap_or_default();
            let (name, after) = after.split_at_checked(length).unwrap_or((after, &[]));
            names.push(String::from_utf8_lossy(name).into_owned());
            rest = after;
        }
        names.sort();
        Ok(names)
    }

    /// Ends the session, and with it all ephemeral nodes that it created.
    pub async fn close(mut self) -> Result<()> {
        self.ask_next(op::CLOSE, &[]).await.map(drop)
    }

    async fn ask_next(&mut self, op: i32, body: &[u8]) -> Result<ServerReply> {
        self.xid += 1;
        self.ask(self.xid, op, body).await
    }

    async fn ask(&mut self, xid: i32, op: i32, body: &[u8]) -> Result<ServerReply> {
        let request = [&xid.to_be_bytes()[..], &op.to_be_bytes(), body].concat();
        self.send(&request).await?;
        loop {
            let answer = self.receive().await?;
            let number = |at: usize| {
                answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_be_bytes)
            };
            if number(0) != xid {
                continue;
            }
            let body = answer.get(16..).unwrap_or_default().to_vec();
            return Ok(if number(12) == 0 {
                ServerReply::Body(body)
            } else {
                ServerReply::Refused(number(12))
            });
        }
    }

    async fn send(&mut self, frame: &[u8]) -> Result<()> {
        let failed = Failed::to::<std::io::Error>(format!("could not write to ZooKeeper {}", self.server));
        self.stream.write_all(&text(frame)).await.map_err(failed)
    }

    async fn receive(&mut self) -> Result<Vec<u8>> {
        let read = async {
            let length = self.stream.read_i32().await?;
            let mut frame = vec![0; usize::try_from(length).unwrap_or_default()];
            self.stream.read_exact(&mut frame).await?;
            Ok::<_, std::io::Error>(frame)
        };
        match timeout(ANSWER, read).await {
            Ok(frame) => {
                frame.map_err(Failed::to(format!("ZooKeeper {} closed the connection", self.server)))
            }
            Err(_) => Err(Failed::new(format!("ZooKeeper {} did not answer within {ANSWER:?}", self.server))),
        }
    }
}

impl ServerReply {
    fn body(self, what: &str) -> Result<Vec<u8>> {
        match self {
            ServerReply::Body(body) => Ok(body),
            ServerReply::Refused(code) => {
                Err(Failed::new(format!("ZooKeeper refused to {what}: error {code}")))
            }
        }
    }
}

/// Encodes a text or a buffer in the format of jute: its length, then its bytes.
fn text(bytes: &[u8]) -> Vec<u8> {
    let length = i32::try_from(bytes.len()).unwrap_or(i32::MAX);
    [&length.to_be_bytes()[..], bytes].concat()
}
