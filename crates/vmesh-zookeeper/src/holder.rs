//! Keeps one ephemeral node in existence until it is withdrawn: this is how a process announces that it is
//! alive.
//!
//! The holder checks the node after every reconnect and whenever it changes, creates it again if it has been
//! deleted, and creates it in a new session if the old one expires. A node of an older session of this process
//! (for example, of one that crashed) would disappear when that session expires, so the holder replaces it in
//! one transaction: no reader ever sees the node missing.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use vmesh_backoff::Backoff;
use zookeeper_client as zk;

use crate::config::{Config, check_path};
use crate::session::{
    ConnectionGauge, Error, EventSink, Secrets, SessionEvent, is_of_session, open, session_backoff,
};
use crate::tree::{Owner, join};

/// The node to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSpec {
    /// The absolute path, below the chroot if there is one. For a sequential node, the prefix before its
    /// number.
    pub path: String,
    pub data: Bytes,
    pub sequential: bool,
}

/// The state of the held node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HolderStatus {
    /// The node does not exist, or its state is unknown; with the reason.
    Waiting(Arc<str>),
    /// The node exists under this path.
    Held(Arc<str>),
    /// The node was withdrawn.
    Withdrawn,
}

enum HolderCommand {
    Update(Bytes),
    Withdraw(oneshot::Sender<Result<(), Error>>),
}

/// Holds one ephemeral node. Dropping the holder ends the session, and with it the node, but does not wait for
/// that.
pub struct Holder {
    commands: mpsc::UnboundedSender<HolderCommand>,
    status: watch::Receiver<HolderStatus>,
    task: JoinSet<()>,
    session_timeout: Duration,
}

impl Holder {
    /// Starts to hold the node `spec`. Needs a tokio runtime. The error describes a path that no node can have.
    pub fn start(
        config: Config,
        spec: NodeSpec,
        count: impl Fn(SessionEvent) + Send + Sync + 'static,
    ) -> Result<Holder, String> {
        check_path(&spec.path)?;
        if spec.path == "/" || (spec.sequential && spec.path.ends_with('/')) {
            return Err(format!("`{}` is not the path of a node that can be created", spec.path));
        }
        let (commands, received) = mpsc::unbounded_channel();
        let (publish, status) =
            watch::channel(HolderStatus::Waiting("the first attempt to create it has not ended yet".into()));
        let session_timeout = config.session_timeout;
        let task = HolderTask {
            config,
            spec,
            count: Arc::new(count),
            publish,
            commands: received,
            backoff: session_backoff(),
            exists_since: None,
            held: None,
            withdraw: None,
            is_old: false,
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(task.run());
        Ok(Holder { commands, status, task: tasks, session_timeout })
    }

    pub fn status(&self) -> HolderStatus {
        self.status.borrow().clone()
    }

    /// Waits until the status differs from the one that was last returned. Dropping the future loses no change.
    pub async fn changed(&mut self) -> HolderStatus {
        match self.status.changed().await {
            Ok(()) => self.status.borrow_and_update().clone(),
            Err(_) => std::future::pending().await,
        }
    }

    /// Replaces the data of the node.
    pub fn update(&self, data: Bytes) {
        // Sending fails only if the task has ended, and then no node is held.
        _ = self.commands.send(HolderCommand::Update(data));
    }

    /// Deletes the node and returns once its absence is confirmed. After an error or the timeout `within`, the
    /// node disappears when its session expires.
    pub async fn withdraw(mut self, within: Duration) -> Result<(), Error> {
        let (reply, done) = oneshot::channel();
        let timed_out = |why: String| Error::Request {
            action: "withdraw the node",
            path: match self.status() {
                HolderStatus::Held(path) => path.to_string(),
                _ => "that is held".to_owned(),
            },
            why: format!("{why}; the node disappears with its session, within {:?}", self.session_timeout),
        };
        if self.commands.send(HolderCommand::Withdraw(reply)).is_err() {
            return Err(Error::Ended);
        }
        let result = match timeout(within, done).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Error::Ended),
            Err(_) => Err(timed_out(format!("it took longer than {within:?}"))),
        };
        self.task.shutdown().await;
        result
    }
}

struct HolderTask {
    config: Config,
    spec: NodeSpec,
    count: EventSink,
    publish: watch::Sender<HolderStatus>,
    commands: mpsc::UnboundedReceiver<HolderCommand>,
    backoff: Backoff,
    /// The time since when the node has existed without interruption.
    exists_since: Option<Instant>,
    /// The path under which the node last existed.
    held: Option<String>,
    /// The caller that waits for the withdrawal.
    withdraw: Option<oneshot::Sender<Result<(), Error>>>,
    /// Whether the servers are older than 3.5, without container nodes and `create2`.
    is_old: bool,
}

/// The reason why a session ended.
enum SessionEnd {
    Because(Error),
    Withdrawn,
}

impl HolderTask {
    async fn run(mut self) {
        loop {
            match self.session().await {
                SessionEnd::Withdrawn => {
                    self.publish.send_replace(HolderStatus::Withdrawn);
                    return;
                }
                SessionEnd::Because(error) => {
                    self.publish_waiting(&error);
                    let wait = self.pause();
                    if self.process_commands_until(sleep(wait)).await.is_none() {
                        self.publish.send_replace(HolderStatus::Withdrawn);
                        return;
                    }
                }
            }
        }
    }

    /// Returns the pause before the next attempt. The back-off starts anew if the node has existed for longer
    /// than that: a session that expires now and then must not delay the node.
    fn pause(&mut self) -> Duration {
        let pause = self.backoff.next_pause();
        if self.exists_since.take().is_some_and(|since| since.elapsed() > pause) {
            self.backoff.reset();
            return self.backoff.next_pause();
        }
        pause
    }

    fn publish_waiting(&self, error: &Error) {
        let because: Arc<str> = error.line().into();
        self.publish.send_if_modified(|status| {
            let now = HolderStatus::Waiting(because);
            std::mem::replace(status, now.clone()) != now
        });
    }

    fn lost(&self, why: &'static str) -> Error {
        Error::Lost { servers: self.config.connect.to_string(), why }
    }

    /// Waits for `future` without a session, and processes commands meanwhile. Returns `None` if the holder was
    /// dropped, or if a node was withdrawn that never existed.
    async fn process_commands_until<T>(&mut self, future: impl Future<Output = T>) -> Option<T> {
        let mut future = pin!(future);
        loop {
            tokio::select! {
                done = &mut future => return Some(done),
                command = self.commands.recv(), if self.withdraw.is_none() => match command {
                    Some(HolderCommand::Update(data)) => self.spec.data = data,
                    Some(HolderCommand::Withdraw(reply)) if self.held.is_none() => {
                        _ = reply.send(Ok(()));
                        return None;
                    }
                    // The caller waits until the node is withdrawn in a later session, or its timeout passes.
                    Some(HolderCommand::Withdraw(reply)) => self.withdraw = Some(reply),
                    None => return None,
                },
            }
        }
    }

    async fn session(&mut self) -> SessionEnd {
        let (config, is_old) = (self.config.clone(), self.is_old);
        let opened = async {
            let secrets = Secrets::read(&config).await?;
            let client = open(&config, &secrets, false, is_old).await?;
            Ok::<_, Error>((secrets, client))
        };
        let (secrets, client) = match self.process_commands_until(opened).await {
            Some(Ok(opened)) => opened,
            Some(Err(error)) => return SessionEnd::Because(error),
            None => return SessionEnd::Withdrawn,
        };
        let mut states = client.state_watcher();
        let mut connection = Some(ConnectionGauge::new(&self.count));
        loop {
            let outcome = tokio::select! {
                state = states.changed() => Err(state),
                outcome = self.hold_until_change(&client, secrets.has_identity()) => Ok(outcome),
            };
            let state = match outcome {
                Ok(Ok(Some(over))) => return over,
                // The node was deleted or replaced.
                Ok(Ok(None)) => {
                    sleep(self.pause()).await;
                    continue;
                }
                Ok(Err(error)) if is_of_session(&error) && error != zk::Error::Throttled => {
                    match timeout(2 * self.config.session_timeout, states.changed()).await {
                        Ok(state) => state,
                        Err(_) => {
                            return SessionEnd::Because(Error::request("hold", &self.spec.path, &error));
                        }
                    }
                }
                Ok(Err(zk::Error::Unimplemented)) => {
                    self.is_old = true;
                    return SessionEnd::Because(self.lost("ended: its server is older than 3.5"));
                }
                Ok(Err(error)) => match self.wait_after_rejection(&error, &secrets).await {
                    Some(end) => return end,
                    None => continue,
                },
                Err(state) => state,
            };
            match state {
                zk::SessionState::Disconnected => {
                    connection = None;
                    self.publish_waiting(
                        &self.lost("has lost its connection; the node exists until the session expires"),
                    );
                }
                zk::SessionState::Expired => {
                    (self.count)(SessionEvent::Expired);
                    return SessionEnd::Because(self.lost("expired"));
                }
                zk::SessionState::AuthFailed => {
                    return SessionEnd::Because(Error::Refused { servers: self.config.connect.to_string() });
                }
                zk::SessionState::Closed => return SessionEnd::Because(self.lost("was closed")),
                _ => {
                    if connection.is_none() {
                        connection = Some(ConnectionGauge::new(&self.count));
                    }
                }
            }
        }
    }

    /// Waits after the server rejected a request, while the session is alive. Returns the end of the session if the
    /// node is withdrawn meanwhile, or if the credentials changed.
    async fn wait_after_rejection(&mut self, error: &zk::Error, secrets: &Secrets) -> Option<SessionEnd> {
        self.publish_waiting(&Error::request("hold", &self.spec.path, error));
        let wait = self.pause();
        if self.process_commands_until(sleep(wait)).await.is_none() {
            return Some(SessionEnd::Withdrawn);
        }
        let has_changed = Secrets::read(&self.config).await.is_ok_and(|now| now != *secrets);
        has_changed.then(|| SessionEnd::Because(self.lost("ended, to begin with other credentials")))
    }

    /// Creates the node if needed and waits until it may no longer exist as specified, or until it is
    /// withdrawn.
    async fn hold_until_change(
        &mut self,
        client: &zk::Client,
        has_identity: bool,
    ) -> Result<Option<SessionEnd>, zk::Error> {
        if let Some(path) = self.held.clone().filter(|_| self.withdraw.is_some()) {
            return self.withdraw_node(client, &path).await;
        }
        let path = self.find_or_create(client, has_identity).await?;
        self.held = Some(path.clone());
        loop {
            let (data, stat, watcher) = match client.get_and_watch_data(&path).await {
                Ok(read) => read,
                Err(zk::Error::NoNode) => return Ok(None),
                Err(error) => return Err(error),
            };
            if !is_mine(client, stat.ephemeral_owner) {
                return Ok(None);
            }
            if data != self.spec.data {
                client.set_data(&path, &self.spec.data, None).await?;
                continue;
            }
            self.exists_since.get_or_insert_with(Instant::now);
            let now = HolderStatus::Held(path.as_str().into());
            self.publish.send_if_modified(|status| std::mem::replace(status, now.clone()) != now);
            let command = tokio::select! {
                event = watcher.changed() => {
                    if event.event_type != zk::EventType::NodeDataChanged {
                        return Ok(None);
                    }
                    // Another client writes to the node. The pause prevents a tight loop of corrections.
                    sleep(self.pause()).await;
                    continue;
                }
                command = self.commands.recv() => command,
            };
            match command {
                Some(HolderCommand::Update(data)) => {
                    self.spec.data = data;
                    self.backoff.reset();
                }
                Some(HolderCommand::Withdraw(reply)) => {
                    self.withdraw = Some(reply);
                    return self.withdraw_node(client, &path).await;
                }
                None => return Ok(Some(SessionEnd::Withdrawn)),
            }
        }
    }

    async fn withdraw_node(
        &mut self,
        client: &zk::Client,
        path: &str,
    ) -> Result<Option<SessionEnd>, zk::Error> {
        let result = match delete_and_confirm(client, path).await {
            Ok(()) => Ok(()),
            Err(error) if is_of_session(&error) => return Err(error),
            Err(error) => Err(Error::request("withdraw", path, &error)),
        };
        if let Some(reply) = self.withdraw.take() {
            _ = reply.send(result);
        }
        Ok(Some(SessionEnd::Withdrawn))
    }

    /// Creates the node, or finds it, and returns its path.
    async fn find_or_create(&mut self, client: &zk::Client, has_identity: bool) -> Result<String, zk::Error> {
        let spec = self.spec.path.clone();
        let (parent, name) = match spec.rsplit_once('/') {
            Some(("", name)) => ("/", name),
            Some((parent, name)) => (parent, name),
            None => ("/", spec.as_str()),
        };
        if parent != "/" {
            self.make_parents(client, parent).await?;
        }
        // Clients with other credentials may read the node but not change it.
        let mine = [
            zk::Acl::new(zk::Permission::ALL, zk::AuthId::new("auth", "")),
            zk::Acl::new(zk::Permission::READ, zk::AuthId::anyone()),
        ];
        let acls = if has_identity { zk::Acls::new(&mine) } else { zk::Acls::anyone_all() };
        if self.spec.sequential {
            return self.find_or_create_sequential(client, parent, name, acls).await;
        }
        let path = spec;
        let ephemeral = zk::CreateMode::Ephemeral.with_acls(acls);
        match client.create(&path, &self.spec.data, &ephemeral).await {
            Ok(_) => return Ok(path),
            Err(zk::Error::NodeExists) => {}
            Err(error) => return Err(error),
        }
        match client.check_stat(&path).await? {
            Some(stat) if !is_mine(client, stat.ephemeral_owner) => {
                tracing::info!(
                    "{path} still exists from session {:#x} and is replaced by a node of this session",
                    stat.ephemeral_owner
                );
                let mut both = client.new_multi_writer();
                both.add_delete(&path, Some(stat.version))?;
                both.add_create(&path, &self.spec.data, &ephemeral)?;
                both.commit().await?;
                Ok(path)
            }
            _ => Ok(path),
        }
    }

    /// A new sequential node has a new name, and the holder creates it before it deletes its older nodes.
    async fn find_or_create_sequential(
        &self,
        client: &zk::Client,
        parent: &str,
        prefix: &str,
        acls: zk::Acls<'_>,
    ) -> Result<String, zk::Error> {
        let mut older = Vec::new();
        let mut mine = None;
        for name in client.list_children(parent).await? {
            // The name must be the prefix and ten digits, or a sign and ten digits after the counter's
            // overflow.
            let digits = name.strip_prefix(prefix).unwrap_or_default();
            if digits.len() < 10 || !digits.bytes().all(|b| b.is_ascii_digit() || b == b'-') {
                continue;
            }
            let path = join(parent, &name);
            let (data, stat) = match client.get_data(&path).await {
                Ok(read) => read,
                Err(zk::Error::NoNode | zk::Error::NoAuth) => continue,
                Err(error) => return Err(error),
            };
            let was_held = self.held.as_deref() == Some(&*path);
            match Owner::of(stat.ephemeral_owner) {
                // An earlier request of this session created the node, and its answer was lost.
                Owner::Session(_) if is_mine(client, stat.ephemeral_owner) => mine = Some(path),
                // The node belongs to an earlier session of this process, or to another instance with the same
                // data.
                Owner::Session(_) if was_held || data == self.spec.data => older.push(path),
                _ => {}
            }
        }
        let path = match mine {
            Some(path) => path,
            None => {
                let ephemeral = zk::CreateMode::EphemeralSequential.with_acls(acls);
                let (_, sequence) = client.create(&self.spec.path, &self.spec.data, &ephemeral).await?;
                format!("{}{sequence}", self.spec.path)
            }
        };
        for older in older {
            match client.delete(&older, None).await {
                Ok(()) | Err(zk::Error::NoNode | zk::Error::NoAuth) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(path)
    }

    /// Creates the parents as containers, which ZooKeeper deletes after their last child, if the servers
    /// support containers.
    async fn make_parents(&self, client: &zk::Client, parent: &str) -> Result<(), zk::Error> {
        if client.check_stat(parent).await?.is_some() {
            return Ok(());
        }
        let mode = if self.is_old { zk::CreateMode::Persistent } else { zk::CreateMode::Container };
        client.mkdir(parent, &mode.with_acls(zk::Acls::anyone_all())).await
    }
}

async fn delete_and_confirm(client: &zk::Client, path: &str) -> Result<(), zk::Error> {
    match client.delete(path, None).await {
        Ok(()) | Err(zk::Error::NoNode) => {}
        Err(error) => return Err(error),
    }
    // Another server may have processed the deletion; `sync` lets this one catch up.
    client.sync(path).await?;
    match client.check_stat(path).await? {
        None => Ok(()),
        Some(_) => Err(zk::Error::NodeExists),
    }
}

fn is_mine(client: &zk::Client, owner: i64) -> bool {
    client.session_id().to_string() == format!("{owner:#x}")
}
