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
use zookeeper_client as zk;

use crate::config::{Config, check_path};
use crate::session::{Backoff, Connection, Count, Counted, Error, Secrets, is_of_session, open};
use crate::tree::{Owner, join};

/// The node to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The absolute path, below the chroot if there is one. For a sequential node, the prefix before its
    /// number.
    pub path: String,
    pub data: Bytes,
    pub sequential: bool,
}

/// The state of the held node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// The node does not exist, or its state is unknown; with the reason.
    Waiting(Arc<str>),
    /// The node exists under this path.
    Held(Arc<str>),
    /// The node was withdrawn.
    Withdrawn,
}

enum Order {
    Update(Bytes),
    Withdraw(oneshot::Sender<Result<(), Error>>),
}

/// Holds one ephemeral node. Dropping the holder ends the session, and with it the node, but does not wait for
/// that.
pub struct Holder {
    orders: mpsc::UnboundedSender<Order>,
    standing: watch::Receiver<Standing>,
    keeper: JoinSet<()>,
    session_timeout: Duration,
}

impl Holder {
    /// Starts to hold the node `spec`. Needs a tokio runtime. The error describes a path that no node can have.
    pub fn start(
        config: Config,
        wanted: Wanted,
        count: impl Fn(Counted) + Send + Sync + 'static,
    ) -> Result<Holder, String> {
        check_path(&wanted.path)?;
        if wanted.path == "/" || (wanted.sequential && wanted.path.ends_with('/')) {
            return Err(format!("`{}` is not the path of a node that can be made", wanted.path));
        }
        let (orders, ordered) = mpsc::unbounded_channel();
        let (tell, standing) = watch::channel(Standing::Waiting("it has just been asked for".into()));
        let session_timeout = config.session_timeout;
        let keeper = Keeper {
            config,
            wanted,
            count: Arc::new(count),
            tell,
            orders: ordered,
            backoff: Backoff::new(),
            stands_since: None,
            held: None,
            withdraw: None,
            is_old: false,
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(keeper.run());
        Ok(Holder { orders, standing, keeper: tasks, session_timeout })
    }

    pub fn standing(&self) -> Standing {
        self.standing.borrow().clone()
    }

    /// Waits until the status differs from the one that was last returned. Dropping the future loses no change.
    pub async fn changed(&mut self) -> Standing {
        match self.standing.changed().await {
            Ok(()) => self.standing.borrow_and_update().clone(),
            Err(_) => std::future::pending().await,
        }
    }

    /// Replaces the data of the node.
    pub fn update(&self, data: Bytes) {
        // Sending fails only if the task has ended, and then no node is held.
        _ = self.orders.send(Order::Update(data));
    }

    /// Deletes the node and returns once its absence is confirmed. After an error or the timeout `within`, the
    /// node disappears when its session expires.
    pub async fn withdraw(mut self, within: Duration) -> Result<(), Error> {
        let (reply, done) = oneshot::channel();
        let given_up = |why: String| Error::Request {
            what: "withdraw the node",
            path: match self.standing() {
                Standing::Held(path) => path.to_string(),
                _ => "that is held".to_owned(),
            },
            why: format!("{why}; it goes with its session, within {:?}", self.session_timeout),
        };
        if self.orders.send(Order::Withdraw(reply)).is_err() {
            return Err(Error::Ended);
        }
        let result = match timeout(within, done).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Error::Ended),
            Err(_) => Err(given_up(format!("it took longer than {within:?}"))),
        };
        self.keeper.shutdown().await;
        result
    }
}

struct Keeper {
    config: Config,
    wanted: Wanted,
    count: Count,
    tell: watch::Sender<Standing>,
    orders: mpsc::UnboundedReceiver<Order>,
    backoff: Backoff,
    /// The time since when the node has existed without interruption.
    stands_since: Option<Instant>,
    /// The path under which the node last existed.
    held: Option<String>,
    /// The caller that waits for the withdrawal.
    withdraw: Option<oneshot::Sender<Result<(), Error>>>,
    /// Whether the servers are older than 3.5, without container nodes and `create2`.
    is_old: bool,
}

/// The reason why a session ended.
enum Over {
    Because(Error),
    Withdrawn,
}

impl Keeper {
    async fn run(mut self) {
        loop {
            match self.session().await {
                Over::Withdrawn => {
                    self.tell.send_replace(Standing::Withdrawn);
                    return;
                }
                Over::Because(error) => {
                    self.waiting(&error);
                    let wait = self.pause();
                    if self.obeying(sleep(wait)).await.is_none() {
                        self.tell.send_replace(Standing::Withdrawn);
                        return;
                    }
                }
            }
        }
    }

    /// Returns the pause before the next attempt. The back-off starts anew if the node has existed for longer
    /// than that: a session that expires now and then must not delay the node.
    fn pause(&mut self) -> Duration {
        let pause = self.backoff.draw();
        if self.stands_since.take().is_some_and(|since| since.elapsed() > pause) {
            self.backoff.reset();
            return self.backoff.draw();
        }
        pause
    }

    fn waiting(&self, error: &Error) {
        let because: Arc<str> = error.line().into();
        self.tell.send_if_modified(|standing| {
            let now = Standing::Waiting(because);
            std::mem::replace(standing, now.clone()) != now
        });
    }

    fn lost(&self, why: &'static str) -> Error {
        Error::Lost { servers: self.config.connect.to_string(), why }
    }

    /// Waits for `future` without a session, and processes commands meanwhile. Returns `None` if the holder was
    /// dropped, or if a node was withdrawn that never existed.
    async fn obeying<T>(&mut self, what: impl Future<Output = T>) -> Option<T> {
        let mut what = pin!(what);
        loop {
            tokio::select! {
                done = &mut what => return Some(done),
                order = self.orders.recv(), if self.withdraw.is_none() => match order {
                    Some(Order::Update(data)) => self.wanted.data = data,
                    Some(Order::Withdraw(reply)) if self.held.is_none() => {
                        _ = reply.send(Ok(()));
                        return None;
                    }
                    // The caller waits until the node is withdrawn in a later session, or its timeout passes.
                    Some(Order::Withdraw(reply)) => self.withdraw = Some(reply),
                    None => return None,
                },
            }
        }
    }

    async fn session(&mut self) -> Over {
        let (config, is_old) = (self.config.clone(), self.is_old);
        let opened = async {
            let secrets = Secrets::read(&config).await?;
            let client = open(&config, &secrets, false, is_old).await?;
            Ok::<_, Error>((secrets, client))
        };
        let (secrets, client) = match self.obeying(opened).await {
            Some(Ok(opened)) => opened,
            Some(Err(error)) => return Over::Because(error),
            None => return Over::Withdrawn,
        };
        let mut states = client.state_watcher();
        let mut connection = Some(Connection::new(&self.count));
        loop {
            let stood = tokio::select! {
                state = states.changed() => Err(state),
                stood = self.stand(&client, secrets.name_somebody()) => Ok(stood),
            };
            let state = match stood {
                Ok(Ok(Some(over))) => return over,
                // The node was deleted or replaced.
                Ok(Ok(None)) => {
                    sleep(self.pause()).await;
                    continue;
                }
                Ok(Err(error)) if is_of_session(&error) && error != zk::Error::Throttled => {
                    match timeout(2 * self.config.session_timeout, states.changed()).await {
                        Ok(state) => state,
                        Err(_) => return Over::Because(Error::request("hold", &self.wanted.path, &error)),
                    }
                }
                Ok(Err(zk::Error::Unimplemented)) => {
                    self.is_old = true;
                    return Over::Because(self.lost("ended: its server is older than 3.5"));
                }
                Ok(Err(error)) => {
                    // The session is alive, but the server rejects the request.
                    self.waiting(&Error::request("hold", &self.wanted.path, &error));
                    let wait = self.pause();
                    if self.obeying(sleep(wait)).await.is_none() {
                        return Over::Withdrawn;
                    }
                    if Secrets::read(&self.config).await.is_ok_and(|now| now != secrets) {
                        return Over::Because(self.lost("ended, to begin with other credentials"));
                    }
                    continue;
                }
                Err(state) => state,
            };
            match state {
                zk::SessionState::Disconnected => {
                    connection = None;
                    self.waiting(&self.lost("has lost its connection; the node stands until it expires"));
                }
                zk::SessionState::Expired => {
                    (self.count)(Counted::Expired);
                    return Over::Because(self.lost("expired"));
                }
                zk::SessionState::AuthFailed => {
                    return Over::Because(Error::Refused { servers: self.config.connect.to_string() });
                }
                zk::SessionState::Closed => return Over::Because(self.lost("was closed")),
                _ => {
                    if connection.is_none() {
                        connection = Some(Connection::new(&self.count));
                    }
                }
            }
        }
    }

    /// Creates the node if needed and waits until it may no longer exist as specified, or until it is
    /// withdrawn.
    async fn stand(&mut self, client: &zk::Client, is_somebody: bool) -> Result<Option<Over>, zk::Error> {
        if let Some(path) = self.held.clone().filter(|_| self.withdraw.is_some()) {
            return self.take_away(client, &path).await;
        }
        let path = self.ensure(client, is_somebody).await?;
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
            if data != self.wanted.data {
                client.set_data(&path, &self.wanted.data, None).await?;
                continue;
            }
            self.stands_since.get_or_insert_with(Instant::now);
            let now = Standing::Held(path.as_str().into());
            self.tell.send_if_modified(|standing| std::mem::replace(standing, now.clone()) != now);
            let order = tokio::select! {
                event = watcher.changed() => {
                    if event.event_type != zk::EventType::NodeDataChanged {
                        return Ok(None);
                    }
                    // Another client writes to the node. The pause prevents a tight loop of corrections.
                    sleep(self.pause()).await;
                    continue;
                }
                order = self.orders.recv() => order,
            };
            match order {
                Some(Order::Update(data)) => {
                    self.wanted.data = data;
                    self.backoff.reset();
                }
                Some(Order::Withdraw(reply)) => {
                    self.withdraw = Some(reply);
                    return self.take_away(client, &path).await;
                }
                None => return Ok(Some(Over::Withdrawn)),
            }
        }
    }

    async fn take_away(&mut self, client: &zk::Client, path: &str) -> Result<Option<Over>, zk::Error> {
        let result = match withdrawn(client, path).await {
            Ok(()) => Ok(()),
            Err(error) if is_of_session(&error) => return Err(error),
            Err(error) => Err(Error::request("withdraw", path, &error)),
        };
        if let Some(reply) = self.withdraw.take() {
            _ = reply.send(result);
        }
        Ok(Some(Over::Withdrawn))
    }

    /// Creates the node, or finds it, and returns its path.
    async fn ensure(&mut self, client: &zk::Client, is_somebody: bool) -> Result<String, zk::Error> {
        let wanted = self.wanted.path.clone();
        let (parent, name) = match wanted.rsplit_once('/') {
            Some(("", name)) => ("/", name),
            Some((parent, name)) => (parent, name),
            None => ("/", wanted.as_str()),
        };
        if parent != "/" {
            self.make_parents(client, parent).await?;
        }
        // Clients with other credentials may read the node but not change it.
        let mine = [
            zk::Acl::new(zk::Permission::ALL, zk::AuthId::new("auth", "")),
            zk::Acl::new(zk::Permission::READ, zk::AuthId::anyone()),
        ];
        let acls = if is_somebody { zk::Acls::new(&mine) } else { zk::Acls::anyone_all() };
        if self.wanted.sequential {
            return self.ensure_sequential(client, parent, name, acls).await;
        }
        let path = wanted;
        let ephemeral = zk::CreateMode::Ephemeral.with_acls(acls);
        match client.create(&path, &self.wanted.data, &ephemeral).await {
            Ok(_) => return Ok(path),
            Err(zk::Error::NodeExists) => {}
            Err(error) => return Err(error),
        }
        match client.check_stat(&path).await? {
            Some(stat) if !is_mine(client, stat.ephemeral_owner) => {
                tracing::info!(
                    "{path} stands from session {:#x}, and is replaced by one of this session",
                    stat.ephemeral_owner
                );
                let mut both = client.new_multi_writer();
                both.add_delete(&path, Some(stat.version))?;
                both.add_create(&path, &self.wanted.data, &ephemeral)?;
                both.commit().await?;
                Ok(path)
            }
            _ => Ok(path),
        }
    }

    /// A new sequential node has a new name, and the holder creates it before it deletes its older nodes.
    async fn ensure_sequential(
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
                Owner::Session(_) if was_held || data == self.wanted.data => older.push(path),
                _ => {}
            }
        }
        let path = match mine {
            Some(path) => path,
            None => {
                let ephemeral = zk::CreateMode::EphemeralSequential.with_acls(acls);
                let (_, sequence) = client.create(&self.wanted.path, &self.wanted.data, &ephemeral).await?;
                format!("{}{sequence}", self.wanted.path)
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

async fn withdrawn(client: &zk::Client, path: &str) -> Result<(), zk::Error> {
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
