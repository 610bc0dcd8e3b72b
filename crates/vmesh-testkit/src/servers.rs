//! The servers of a registry, each with its own address and directory, which tests can kill, stop and
//! restart.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::place::Loopback;
use crate::process::Daemon;
use crate::{Failed, Result, wait_for};

/// The files of a certificate authority that signed the servers' certificates, and of a client certificate.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    pub ca: PathBuf,
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// The time limit of a start on a busy machine. It includes an election, and for ZooKeeper the start of a
/// JVM.
const SERVING: Duration = Duration::from_secs(60);

/// A set of servers of one kind.
pub struct Servers {
    /// The kind for messages, such as `Consul`.
    kind: &'static str,
    all: Vec<Server>,
}

/// A single server.
pub(crate) struct Server {
    pub(crate) place: Loopback,
    pub(crate) dir: PathBuf,
    daemon: Option<Daemon>,
}

impl Servers {
    /// Chooses addresses, and creates directories below `dir`. Starts nothing.
    pub(crate) fn new(kind: &'static str, count: usize, dir: &Path) -> Result<Servers> {
        let server = |number: usize| {
            let dir = dir.join(number.to_string());
            fs::create_dir_all(&dir).map_err(Failed::to(format!("could not make {}", dir.display())))?;
            Ok(Server { place: Loopback::unique()?, dir, daemon: None })
        };
        Ok(Servers { kind, all: (1..=count).map(server).collect::<Result<_>>()? })
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Server> {
        self.all.iter()
    }

    pub(crate) fn server(&self, index: usize) -> Result<&Server> {
        self.all.get(index).ok_or_else(|| Failed::new(format!("there is no {} {index}", self.kind)))
    }

    pub(crate) fn started(&mut self, index: usize, daemon: Daemon) {
        if let Some(server) = self.all.get_mut(index) {
            server.daemon = Some(daemon);
        }
    }

    fn daemon(&mut self, index: usize) -> Result<&mut Daemon> {
        let kind = self.kind;
        let daemon = self.all.get_mut(index).and_then(|server| server.daemon.as_mut());
        daemon.ok_or_else(|| Failed::new(format!("{kind} {index} was not started")))
    }

    /// Waits until server `index` serves, that is, until `asked` returns `Ok`.
    pub(crate) async fn wait(
        &mut self,
        index: usize,
        asked: impl AsyncFn() -> std::result::Result<(), String>,
    ) -> Result<()> {
        let what = format!("{} {index} ({}) to serve", self.kind, self.server(index)?.place);
        let daemon = self.daemon(index)?;
        wait_for(what, SERVING, async || match daemon.has_exited() {
            Some(status) => Err(format!("it ended ({status}): {}", daemon.output())),
            None => asked().await,
        })
        .await
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Sends SIGKILL to a server.
    pub fn kill(&mut self, index: usize) -> Result<()> {
        self.daemon(index)?.kill()
    }

    /// Sends SIGSTOP: the server keeps its connections and stops answering.
    pub fn freeze(&mut self, index: usize) -> Result<()> {
        self.daemon(index)?.freeze()
    }

    pub fn thaw(&mut self, index: usize) -> Result<()> {
        self.daemon(index)?.thaw()
    }

    pub fn kill_all(&mut self) -> Result<()> {
        (0..self.len()).try_for_each(|index| self.kill(index))
    }

    pub fn freeze_all(&mut self) -> Result<()> {
        (0..self.len()).try_for_each(|index| self.freeze(index))
    }

    pub fn thaw_all(&mut self) -> Result<()> {
        (0..self.len()).try_for_each(|index| self.thaw(index))
    }

    /// Kills a server and deletes its data.
    pub(crate) fn wipe(&mut self, index: usize) -> Result<()> {
        self.kill(index)?;
        let data = self.server(index)?.dir.join("data");
        fs::remove_dir_all(&data).map_err(Failed::to(format!("could not remove {}", data.display())))
    }
}
