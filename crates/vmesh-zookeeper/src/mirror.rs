//! Keeps complete and current copies of ZooKeeper subtrees, across lost servers and sessions.
//!
//! One task keeps one session for all roots of a mirror. After each connection, including the first, it sets
//! new watches, then drops the old ones, lets the server catch up with its leader (`sync`), reads everything
//! and compares. From then on each event leads to one read of the affected nodes; events that arrive during a
//! read are processed together. At intervals of minutes the mirror reads all nodes even without an event.
//!
//! | event | reaction |
//! |---|---|
//! | the connection is lost | keeps the view, marks it stale, connects to another server |
//! | the session expires | the same, with a new session |
//! | no server has a quorum | reads once from a server that still answers reads, if there is no view yet; the view is stale in any case |
//! | a node may not be read | keeps the node's last content with the reason; tries again every half minute |
//! | a root does not exist | the root is absent; a watch reports its creation |
//! | credentials or certificates change | opens a new session, when a connection is lost or within half a minute |

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::future::{Future, poll_fn};
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use vmesh_backoff::{Backoff, jitter};
use zookeeper_client as zk;

use crate::bulk_read::{self, ExceededLimit, Findings, OneShots, ReadScope, ReadStart, depth};
use crate::config::{Config, Watch, check_path};
use crate::session::{
    ConnectionGauge, Error, EventSink, Secrets, SessionEvent, is_of_session, session_backoff,
};
use crate::tree::{Node, build, put};

/// The interval at which unreadable nodes are read again and the files with credentials are checked.
const RETRY_INTERVAL: Duration = Duration::from_secs(30);
/// The interval at which everything is read without an event, to correct whatever a watch has missed. A random
/// part spreads the reads of many mirrors.
const VERIFY_INTERVAL: Duration = Duration::from_secs(600);
/// The minimum time between two complete reads, even if a connection is lost again and again.
const MIN_READ_INTERVAL: Duration = Duration::from_secs(1);
/// How long a server is remembered as one without persistent watches. An upgraded server is used with
/// persistent watches after this time.
const OLD_SERVER_MEMORY: Duration = Duration::from_secs(3600);
/// How long the mirror stays with a server that only answers reads before it tries the other servers again.
const READ_ONLY_STAY: Duration = Duration::from_secs(30);

/// The default limit of the data and names of one root, in bytes: 200,000 nodes of 1 KiB fit.
const MAX_BYTES: usize = 256 << 20;

/// A subtree to mirror.
#[derive(Clone)]
pub struct Root {
    pub(crate) path: String,
    /// The limit of levels below the root. Deeper nodes are ignored.
    pub max_depth: usize,
    /// The limit of nodes. A larger subtree counts as a wrong root and is not mirrored.
    pub max_nodes: usize,
    /// The limit of the nodes' data and names together, in bytes; applied like `max_nodes`.
    pub max_bytes: usize,
    filter: NodeFilter,
}

/// A filter for nodes, called with the path relative to the root, such as `a/b`.
type NodeFilter = Arc<dyn Fn(&str) -> bool + Send + Sync>;

impl Root {
    /// Makes a root with the default limits: 16 levels, 200,000 nodes, 256 MiB. `path` is absolute, below the
    /// chroot if there is one.
    pub fn new(path: impl Into<String>) -> Result<Root, String> {
        let path = path.into();
        check_path(&path)?;
        Ok(Root { path, max_depth: 16, max_nodes: 200_000, max_bytes: MAX_BYTES, filter: Arc::new(|_| true) })
    }

    /// Ignores each node for which `filter` returns `false`, with all nodes below it. The filter gets paths
    /// relative to the root.
    pub fn with_filter(mut self, filter: impl Fn(&str) -> bool + Send + Sync + 'static) -> Root {
        self.filter = Arc::new(filter);
        self
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    /// Returns the path relative to the root, which is empty for the root itself.
    fn relative<'a>(&self, path: &'a str) -> &'a str {
        let rest = if self.path == "/" { path } else { path.strip_prefix(&*self.path).unwrap_or(path) };
        rest.trim_start_matches('/')
    }

    pub(crate) fn is_deepest(&self, path: &str) -> bool {
        depth(&self.path, path) >= self.max_depth
    }

    pub(crate) fn accepts(&self, path: &str) -> bool {
        (self.filter)(self.relative(path))
    }

    /// Reports whether the mirror reads the node at `path`.
    fn reads(&self, path: &str) -> bool {
        let relative = self.relative(path);
        let mut above = relative.match_indices('/').map(|(at, _)| relative.get(..at).unwrap_or_default());
        depth(&self.path, path) <= self.max_depth
            && above.all(|above| (self.filter)(above))
            && (relative.is_empty() || (self.filter)(relative))
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

/// A mirror's copy of all its roots.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View {
    /// One entry per root, in the order of [`Mirror::new`]; empty until everything was read once.
    pub roots: Vec<RootView>,
    /// The reason why the copy may be out of date.
    pub stale_because: Option<Arc<str>>,
}

/// A mirror's copy of one root.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RootView {
    /// `None` if the root node does not exist or was never readable.
    pub tree: Option<Arc<Node>>,
    /// The reason why the root cannot be read now; `tree` is then its last known content.
    pub failed: Option<Arc<str>>,
}

type ConfirmReply = oneshot::Sender<Result<View, Error>>;

/// Mirrors some roots. Dropping the mirror ends its task and its session.
pub struct Mirror {
    shared: Arc<MirrorShared>,
    views: watch::Receiver<View>,
    confirms: mpsc::Sender<ConfirmReply>,
    driver: JoinSet<()>,
    backoff: Backoff,
}

struct MirrorShared {
    config: Config,
    roots: Vec<Root>,
    count: EventSink,
    views: watch::Sender<View>,
}

impl Mirror {
    /// Makes a mirror. It connects when [`Mirror::changed`] or [`Mirror::confirm`] is first polled, which needs
    /// a tokio runtime.
    pub fn new(
        config: Config,
        roots: Vec<Root>,
        count: impl Fn(SessionEvent) + Send + Sync + 'static,
    ) -> Mirror {
        let (publish, views) = watch::channel(View::default());
        let shared = Arc::new(MirrorShared { config, roots, count: Arc::new(count), views: publish });
        let (confirms, _) = mpsc::channel(1);
        Mirror { shared, views, confirms, driver: JoinSet::new(), backoff: session_backoff() }
    }

    /// Waits for a view that differs from the last one that this returned. Dropping the future loses no change.
    pub async fn changed(&mut self) -> View {
        loop {
            self.drive(Duration::ZERO);
            tokio::select! {
                changed = self.views.changed() => {
                    if changed.is_ok() {
                        return self.views.borrow_and_update().clone();
                    }
                }
                _ = self.driver.join_next() => self.restart(),
            }
        }
    }

    /// Returns the current view.
    pub fn view(&self) -> View {
        self.views.borrow().clone()
    }

    /// Reads everything again, after the server has caught up with its leader, and returns the resulting view.
    pub async fn confirm(&mut self) -> Result<View, Error> {
        self.drive(Duration::ZERO);
        let (reply, answer) = oneshot::channel();
        self.confirms.send(reply).await.map_err(|_| Error::Ended)?;
        answer.await.map_err(|_| Error::Ended)?
    }

    fn drive(&mut self, wait: Duration) {
        if !self.driver.is_empty() {
            return;
        }
        let (confirms, asked) = mpsc::channel(1);
        self.confirms = confirms;
        let driver = Driver::new(self.shared.clone(), asked);
        self.driver.spawn(async move {
            sleep(wait).await;
            driver.run().await;
        });
    }

    /// Starts a new driver. A driver ends only by a panic, its own or the client's.
    fn restart(&mut self) {
        let because: Arc<str> = Error::Ended.line().into();
        self.shared.views.send_modify(|view| view.stale_because = Some(because));
        let wait = self.backoff.next_pause();
        self.drive(wait);
    }
}

/// The reason why a connection ended.
enum ConnectionEnd {
    State(zk::SessionState),
    Error(Error),
}

/// The source of events: watches of either kind.
enum Watches {
    Persistent(Vec<zk::PersistentWatcher>),
    OneShot(OneShots),
}

struct Driver {
    shared: Arc<MirrorShared>,
    confirms: mpsc::Receiver<ConfirmReply>,
    seen: Vec<RootView>,
    /// Whether everything was read once.
    has_read: bool,
    /// The nodes that could not be read, by root.
    unreadable: BTreeSet<(usize, String)>,
    backoff: Backoff,
    last_complete_read: Option<Instant>,
    /// The last time at which a server rejected persistent watches; it closes the connection too.
    refused_persistent: Option<Instant>,
}

impl Driver {
    /// Makes a driver that continues with the published view of an earlier one.
    fn new(shared: Arc<MirrorShared>, confirms: mpsc::Receiver<ConfirmReply>) -> Driver {
        let mut seen = shared.views.borrow().roots.clone();
        let has_read = !seen.is_empty();
        seen.resize_with(shared.roots.len(), RootView::default);
        Driver {
            shared,
            confirms,
            seen,
            has_read,
            unreadable: BTreeSet::new(),
            backoff: session_backoff(),
            last_complete_read: None,
            refused_persistent: None,
        }
    }

    async fn run(mut self) {
        loop {
            let error = self.session().await;
            let because = self.mark_stale(&error);
            let wait = self.backoff.next_pause();
            tracing::debug!("{because}; next attempt in {wait:?}");
            self.reject_confirms_until(sleep(wait)).await;
        }
    }

    /// Waits for `future` without a connection, and rejects requests for confirmation meanwhile.
    async fn reject_confirms_until<T>(&mut self, future: impl Future<Output = T>) -> T {
        let mut future = pin!(future);
        loop {
            tokio::select! {
                done = &mut future => return done,
                Some(reply) = self.confirms.recv() => {
                    let servers = self.shared.config.connect.to_string();
                    _ = reply.send(Err(Error::Lost { servers, why: "is not connected" }));
                }
            }
        }
    }

    fn mark_stale(&self, error: &Error) -> Arc<str> {
        let because: Arc<str> = error.line().into();
        self.shared.views.send_if_modified(|view| {
            let is_news = view.stale_because.as_ref() != Some(&because);
            view.stale_because = Some(because.clone());
            is_news
        });
        because
    }

    fn publish(&self, stale_because: Option<Arc<str>>) {
        self.shared.views.send_if_modified(|view| {
            let is_news = view.stale_because != stale_because || !is_unchanged(&view.roots, &self.seen);
            if is_news {
                *view = View { roots: self.seen.clone(), stale_because };
            }
            is_news
        });
    }

    fn lost(&self, why: &'static str) -> Error {
        Error::Lost { servers: self.shared.config.connect.to_string(), why }
    }

    /// Opens one session and keeps it until it ends.
    async fn session(&mut self) -> Error {
        let shared = self.shared.clone();
        let opened = async {
            let secrets = Secrets::read(&shared.config).await?;
            let client =
                crate::session::open(&shared.config, &secrets, shared.config.read_only, false).await?;
            Ok::<_, Error>((secrets, client))
        };
        let (secrets, client) = match self.reject_confirms_until(opened).await {
            Ok(opened) => opened,
            Err(error) => return error,
        };
        let mut states = client.state_watcher();
        let mut watches = None;
        loop {
            let connection = ConnectionGauge::new(&shared.count);
            let ended = self.connection(&client, &mut states, &mut watches, &secrets).await;
            drop(connection);
            let mut state = match ended {
                ConnectionEnd::State(state) => state,
                ConnectionEnd::Error(error) => return error,
            };
            if state == zk::SessionState::Disconnected {
                self.mark_stale(&self.lost("has lost its connection; another is being made"));
                // After a reconnect the client would restore its one-shot watches, 128 KiB of paths per
                // request, which servers reject. It also does not read changed credentials. Both cases need a
                // new session.
                let is_one_shot = matches!(watches, Some(Watches::OneShot(_)));
                if is_one_shot || Secrets::read(&shared.config).await.is_ok_and(|now| now != secrets) {
                    return self.lost("has lost its connection");
                }
            }
            while state == zk::SessionState::Disconnected {
                state = self.reject_confirms_until(states.changed()).await;
            }
            match state {
                zk::SessionState::Expired => {
                    (shared.count)(SessionEvent::Expired);
                    return self.lost("expired");
                }
                zk::SessionState::AuthFailed => {
                    return Error::Refused { servers: shared.config.connect.to_string() };
                }
                zk::SessionState::Closed => return self.lost("was closed"),
                _ => {}
            }
        }
    }

    /// Mirrors over one connection until it ends.
    async fn connection(
        &mut self,
        client: &zk::Client,
        states: &mut zk::StateWatcher,
        watches: &mut Option<Watches>,
        secrets: &Secrets,
    ) -> ConnectionEnd {
        let is_read_only = states.peek_state() == zk::SessionState::ConnectedReadOnly;
        // The result of the first read comes before the state: an old server reports what it does not support
        // and closes the connection at once.
        let begun = tokio::select! {
            biased;
            begun = self.begin(client, watches, is_read_only) => begun,
            state = states.changed() => return ConnectionEnd::State(state),
        };
        if let Err(ended) = begun {
            return self.end_of(ended, states).await;
        }
        let mut retry_at = Instant::now() + RETRY_INTERVAL;
        let mut verify_at = Instant::now() + VERIFY_INTERVAL - jitter(VERIFY_INTERVAL / 4);
        let leave_at = Instant::now() + READ_ONLY_STAY;
        loop {
            let Some(watches) = watches else { return ConnectionEnd::Error(Error::Ended) };
            let mut dirty = DirtyPaths::default();
            let (mut whole, mut reply) = (false, None);
            tokio::select! {
                biased;
                state = states.changed() => return ConnectionEnd::State(state),
                (root, event) = watches.next() => {
                    if !dirty.add_event(&self.shared.roots, root, event) {
                        return self.end_of(zk::Error::ClientClosed, states).await;
                    }
                }
                Some(asked) = self.confirms.recv() => (whole, reply) = (true, Some(asked)),
                () = sleep_until(retry_at) => {
                    retry_at = Instant::now() + RETRY_INTERVAL;
                    if Secrets::read(&self.shared.config).await.is_ok_and(|now| now != *secrets) {
                        return ConnectionEnd::Error(self.lost("ended, to begin with other credentials"));
                    }
                    for (root, path) in std::mem::take(&mut self.unreadable) {
                        dirty.add(root, path, ReadScope::Subtree);
                    }
                }
                () = sleep_until(verify_at) => {
                    verify_at = Instant::now() + VERIFY_INTERVAL - jitter(VERIFY_INTERVAL / 4);
                    whole = true;
                }
                () = sleep_until(leave_at), if is_read_only => return ConnectionEnd::Error(Error::ReadOnly),
            }
            if is_read_only {
                // Without a quorum no node changes, and this server's data is not newer than the view.
                if let Some(reply) = reply {
                    _ = reply.send(Err(Error::ReadOnly));
                }
                continue;
            }
            while let Some((root, event)) = watches.try_next() {
                if !dirty.add_event(&self.shared.roots, root, event) {
                    return self.end_of(zk::Error::ClientClosed, states).await;
                }
            }
            let is_confirming = reply.is_some();
            let done = tokio::select! {
                biased;
                // The result of the read comes before the state: the result has the reason for the lost
                // connection.
                done = async {
                    match whole {
                        true => self.read_and_publish(client, watches, is_confirming).await,
                        false => self.update(client, watches, dirty).await,
                    }
                } => done,
                state = states.changed() => {
                    if let Some(reply) = reply {
                        _ = reply.send(Err(self.lost("lost its connection while everything was read again")));
                    }
                    return ConnectionEnd::State(state);
                }
            };
            match (done, reply) {
                (Ok(()), Some(reply)) => _ = reply.send(Ok(self.shared.views.borrow().clone())),
                (Ok(()), None) => {}
                (Err(error), reply) => {
                    if let Some(reply) = reply {
                        _ = reply.send(Err(Error::request("read again", "everything", &error)));
                    }
                    return self.end_of(error, states).await;
                }
            }
        }
    }

    /// Decides how a connection ended. For errors of the connection or the session, the session's state is the
    /// better description.
    async fn end_of(&mut self, error: zk::Error, states: &mut zk::StateWatcher) -> ConnectionEnd {
        let servers = self.shared.config.connect.to_string();
        let limit = 2 * self.shared.config.session_timeout;
        match error {
            zk::Error::Unimplemented if self.shared.config.watch == Watch::Auto => {
                self.backoff.reset();
                ConnectionEnd::Error(
                    self.lost("ended: its server is older than 3.6, and is watched node by node from now on"),
                )
            }
            zk::Error::Unimplemented => ConnectionEnd::Error(Error::NoPersistentWatches(servers)),
            // The next attempt waits for the back-off, since the same server would send the same reply again.
            error @ zk::Error::ReplyTooLarge { .. } => {
                ConnectionEnd::Error(Error::request("read from", &servers, &error))
            }
            error if is_of_session(&error) && error != zk::Error::Throttled => {
                match self.reject_confirms_until(timeout(limit, states.changed())).await {
                    Ok(state) => ConnectionEnd::State(state),
                    Err(_) => ConnectionEnd::Error(Error::request("read from", &servers, &error)),
                }
            }
            error => ConnectionEnd::Error(Error::request("read from", &servers, &error)),
        }
    }

    /// Sets new watches and reads everything.
    async fn begin(
        &mut self,
        client: &zk::Client,
        watches: &mut Option<Watches>,
        is_read_only: bool,
    ) -> Result<(), zk::Error> {
        if let Some(last) = self.last_complete_read {
            sleep_until(last + MIN_READ_INTERVAL).await;
        }
        // Setting the new watches before dropping the old ones leaves no gap.
        let armed = self.set_watches(client).await?;
        let watches = watches.insert(armed);
        if is_read_only {
            if !self.has_read {
                self.read_roots(client, watches).await?;
            }
            self.mark_stale(&Error::ReadOnly);
            if self.has_read {
                self.publish(Some(Error::ReadOnly.line().into()));
            }
            return Ok(());
        }
        self.read_and_publish(client, watches, true).await?;
        self.backoff.reset();
        Ok(())
    }

    async fn set_watches(&mut self, client: &zk::Client) -> Result<Watches, zk::Error> {
        let is_old = self.refused_persistent.is_some_and(|at| at.elapsed() < OLD_SERVER_MEMORY);
        if is_old || self.shared.config.watch == Watch::OneShot {
            return Ok(Watches::OneShot(OneShots::new()));
        }
        let mut armed = Vec::new();
        for root in &self.shared.roots {
            match client.watch(&root.path, zk::AddWatchMode::PersistentRecursive).await {
                Ok(watcher) => armed.push(watcher),
                Err(error) => {
                    if error == zk::Error::Unimplemented && self.shared.config.watch == Watch::Auto {
                        self.refused_persistent = Some(Instant::now());
                    }
                    return Err(error);
                }
            }
        }
        Ok(Watches::Persistent(armed))
    }

    /// Reads everything and publishes it. With `sync`, the server first catches up with its leader.
    async fn read_and_publish(
        &mut self,
        client: &zk::Client,
        watches: &mut Watches,
        sync: bool,
    ) -> Result<(), zk::Error> {
        if sync {
            client.sync("/").await?;
        }
        self.read_roots(client, watches).await?;
        self.publish(None);
        Ok(())
    }

    async fn read_roots(&mut self, client: &zk::Client, watches: &mut Watches) -> Result<(), zk::Error> {
        let shared = self.shared.clone();
        let start = |(root, what): (usize, &Root)| ReadStart {
            root,
            path: what.path.clone(),
            scope: ReadScope::Subtree,
            known: BTreeSet::new(),
        };
        let starts: Vec<_> = shared.roots.iter().enumerate().map(start).collect();
        self.unreadable.clear();
        match watches {
            Watches::Persistent(_) => self.read(client, starts, None).await?,
            Watches::OneShot(armed) => {
                // New watches are set on every node before the old ones are dropped.
                let mut fresh = OneShots::new();
                self.read(client, starts, Some(&mut fresh)).await?;
                *armed = fresh;
            }
        }
        let all_absent = self.seen.iter().all(|seen| seen.tree.is_none() && seen.failed.is_none());
        if all_absent && !shared.config.connect.chroot().is_empty() && client.check_stat("/").await?.is_none()
        {
            let chroot = shared.config.connect.chroot();
            let why: Arc<str> = format!("the chroot {chroot} does not exist: see `connect`").into();
            for (root, seen) in self.seen.iter_mut().enumerate() {
                seen.failed = Some(why.clone());
                self.unreadable
                    .insert((root, shared.roots.get(root).map(|r| r.path.clone()).unwrap_or_default()));
            }
        }
        self.last_complete_read = Some(Instant::now());
        self.has_read = true;
        Ok(())
    }

    /// Reads the nodes that events named.
    async fn update(
        &mut self,
        client: &zk::Client,
        watches: &mut Watches,
        dirty: DirtyPaths,
    ) -> Result<(), zk::Error> {
        let starts = dirty.starts(&self.shared.roots, &self.seen);
        if starts.is_empty() {
            return Ok(());
        }
        match watches {
            Watches::Persistent(_) => self.read(client, starts, None).await?,
            Watches::OneShot(armed) => self.read(client, starts, Some(armed)).await?,
        }
        self.publish(None);
        Ok(())
    }

    async fn read(
        &mut self,
        client: &zk::Client,
        starts: Vec<ReadStart>,
        watch: Option<&mut OneShots>,
    ) -> Result<(), zk::Error> {
        let shared = self.shared.clone();
        let began: Vec<_> = starts.iter().map(|start| (start.root, start.path.clone())).collect();
        let read = bulk_read::read(client, &shared.roots, starts, watch).await;
        let (findings, error) = match read {
            Ok(findings) => (findings, None),
            Err((findings, error)) => (findings, Some(error)),
        };
        (shared.count)(SessionEvent::Reads(findings.reads));
        if findings.failed > 0 {
            (shared.count)(SessionEvent::FailedReads(findings.failed));
        }
        match error {
            Some(error) => Err(error),
            None => {
                self.merge(&findings, &began);
                Ok(())
            }
        }
    }

    /// Merges the read nodes into the trees.
    fn merge(&mut self, findings: &Findings, began: &[(usize, String)]) {
        let nothing = BTreeMap::new();
        for (index, path) in began {
            let (Some(root), Some(seen)) = (self.shared.roots.get(*index), self.seen.get_mut(*index)) else {
                continue;
            };
            if let Some(excess) = findings.exceeded.get(index) {
                seen.failed = Some(excess.message(root));
                self.unreadable.insert((*index, root.path.clone()));
                continue;
            }
            let found = findings.found.get(index).unwrap_or(&nothing);
            let relative = root.relative(path);
            let before = seen.tree.as_ref().and_then(|tree| child(tree, relative));
            let now = build(path, found, before);
            // The limits apply before the merge: otherwise events could grow a tree beyond them, one node at a
            // time.
            if let Some(excess) =
                excess_of(root, seen.tree.as_deref(), before.map(|node| &**node), now.as_deref())
            {
                seen.failed = Some(excess.message(root));
                self.unreadable.insert((*index, root.path.clone()));
                continue;
            }
            if relative.is_empty() {
                // An unreadable root keeps its last content.
                seen.failed = now.as_ref().and_then(|tree| tree.unreadable.clone());
                if seen.failed.is_some() {
                    continue;
                }
            }
            put(&mut seen.tree, relative, now);
        }
        self.unreadable.extend(findings.unreadable.iter().cloned());
    }
}

/// Returns the limit of `root` that its `tree` would exceed with `now` in the place of `before`.
fn excess_of(
    root: &Root,
    tree: Option<&Node>,
    before: Option<&Node>,
    now: Option<&Node>,
) -> Option<ExceededLimit> {
    let with = |of: fn(&Node) -> usize| {
        let of = |node: Option<&Node>| node.map_or(0, of);
        (of(tree) + of(now)).saturating_sub(of(before))
    };
    if with(Node::size) > root.max_nodes {
        Some(ExceededLimit::Nodes)
    } else if with(Node::bytes) > root.max_bytes {
        Some(ExceededLimit::Bytes)
    } else {
        None
    }
}

impl ExceededLimit {
    fn message(self, root: &Root) -> Arc<str> {
        let more = match self {
            ExceededLimit::Nodes => format!("more than {} nodes below {}", root.max_nodes, root.path),
            ExceededLimit::Bytes => {
                format!("more than {} bytes in the nodes below {}", root.max_bytes, root.path)
            }
        };
        let hint = match self {
            ExceededLimit::Nodes => "see `max_nodes`",
            ExceededLimit::Bytes => "no registry of services is that large",
        };
        format!("there are {more}: this is not taken for what is meant ({hint})").into()
    }
}

fn child<'a>(tree: &'a Arc<Node>, relative: &str) -> Option<&'a Arc<Node>> {
    crate::tree::segments(relative).try_fold(tree, |node, segment| node.children.get(segment))
}

fn is_unchanged(before: &[RootView], now: &[RootView]) -> bool {
    let tree = |a: &Option<Arc<Node>>, b: &Option<Arc<Node>>| match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    };
    before.len() == now.len()
        && before.iter().zip(now).all(|(a, b)| a.failed == b.failed && tree(&a.tree, &b.tree))
}

impl Watches {
    /// Waits for the next event and returns it with the index of its root. Dropping the future loses no event.
    async fn next(&mut self) -> (usize, zk::WatchedEvent) {
        match self {
            Watches::Persistent(watchers) => next_event(watchers).await,
            Watches::OneShot(armed) => match armed.join_next().await {
                Some(Ok(event)) => event,
                // The watch ended without an event because the client's own task has ended.
                Some(Err(_)) => (0, zk::WatchedEvent::new_session(zk::SessionState::Closed)),
                None => std::future::pending().await,
            },
        }
    }

    /// Returns an event that has already arrived.
    fn try_next(&mut self) -> Option<(usize, zk::WatchedEvent)> {
        match self {
            Watches::Persistent(watchers) => poll_now(next_event(watchers)),
            Watches::OneShot(armed) => match armed.try_join_next()? {
                Ok(event) => Some(event),
                Err(_) => Some((0, zk::WatchedEvent::new_session(zk::SessionState::Closed))),
            },
        }
    }
}

async fn next_event(watchers: &mut [zk::PersistentWatcher]) -> (usize, zk::WatchedEvent) {
    let mut waiting: Vec<_> = watchers.iter_mut().map(|watcher| Box::pin(watcher.changed())).collect();
    poll_fn(|context| {
        for (root, waiting) in waiting.iter_mut().enumerate() {
            // The client panics if its own task has ended. Here this counts as the end of the session.
            let polled = std::panic::catch_unwind(AssertUnwindSafe(|| waiting.as_mut().poll(context)));
            match polled {
                Ok(Poll::Ready(event)) => return Poll::Ready((root, event)),
                Ok(Poll::Pending) => {}
                Err(_) => {
                    let closed = zk::WatchedEvent::new_session(zk::SessionState::Closed);
                    return Poll::Ready((root, closed));
                }
            }
        }
        Poll::Pending
    })
    .await
}

/// Polls a future once and returns its result if it is ready.
fn poll_now<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match pin!(future).poll(&mut context) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

/// The nodes to read again. Several events for one path lead to one read.
#[derive(Debug, Default)]
struct DirtyPaths(BTreeMap<(usize, String), ReadScope>);

impl DirtyPaths {
    /// Adds the node of an event. Returns `false` if the event is the end of the session.
    fn add_event(&mut self, roots: &[Root], root: usize, event: zk::WatchedEvent) -> bool {
        let scope = match event.event_type {
            zk::EventType::Session => return !event.session_state.is_terminated(),
            zk::EventType::NodeDataChanged => ReadScope::Data,
            zk::EventType::NodeChildrenChanged => ReadScope::Children,
            zk::EventType::NodeCreated | zk::EventType::NodeDeleted => ReadScope::Subtree,
        };
        if roots.get(root).is_some_and(|root| root.reads(&event.path)) {
            self.add(root, event.path, scope);
        }
        true
    }

    fn add(&mut self, root: usize, path: String, scope: ReadScope) {
        let entry = self.0.entry((root, path)).or_insert(scope);
        *entry = entry.and(scope);
    }

    /// Returns the reads to start. Paths inside a subtree that is read completely are dropped, and a path with
    /// unknown parents is replaced by the uppermost unknown one.
    fn starts(self, roots: &[Root], seen: &[RootView]) -> Vec<ReadStart> {
        let mut wanted: BTreeMap<(usize, String), ReadScope> = BTreeMap::new();
        for ((index, path), scope) in self.0 {
            let (Some(root), Some(seen)) = (roots.get(index), seen.get(index)) else { continue };
            let (path, scope) = match first_unknown(root, seen, &path) {
                Some(missing) => (missing, ReadScope::Subtree),
                None => (path, scope),
            };
            let entry = wanted.entry((index, path)).or_insert(scope);
            *entry = entry.and(scope);
        }
        let is_covered = |index: usize, path: &str| {
            path.match_indices('/').any(|(at, _)| {
                let above = if at == 0 { "/" } else { path.get(..at).unwrap_or_default() };
                above != path && wanted.get(&(index, above.to_owned())) == Some(&ReadScope::Subtree)
            })
        };
        let known = |index: usize, path: &str| {
            let tree = seen.get(index).and_then(|seen| seen.tree.as_ref());
            let root = roots.get(index);
            let node = tree.zip(root).and_then(|(tree, root)| child(tree, root.relative(path)));
            node.map(|node| node.children.keys().map(|name| name.to_string()).collect()).unwrap_or_default()
        };
        wanted
            .iter()
            .filter(|((index, path), _)| !is_covered(*index, path))
            .map(|((index, path), scope)| ReadStart {
                root: *index,
                path: path.clone(),
                scope: *scope,
                known: if *scope == ReadScope::Children { known(*index, path) } else { BTreeSet::new() },
            })
            .collect()
    }
}

/// Returns the uppermost unknown node above `path`, or `None` if all nodes above are known.
fn first_unknown(root: &Root, seen: &RootView, path: &str) -> Option<String> {
    let relative = root.relative(path);
    let tree = match &seen.tree {
        Some(tree) => tree,
        None => return Some(root.path.clone()),
    };
    let above = relative.match_indices('/').map(|(at, _)| relative.get(..at).unwrap_or_default());
    let missing = above.into_iter().find(|above| tree.at(above).is_none())?;
    Some(crate::tree::join(&root.path, missing))
}

#[cfg(test)]
mod tests;
