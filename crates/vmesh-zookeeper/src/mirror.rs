//! Subtrees of ZooKeeper, whole and up to date, whatever happens to servers and sessions.
//!
//! One task keeps one session for all of a mirror's roots. After each connection, the first and every later one, it
//! watches anew, drops the watches of before after that, asks the server to catch up with its leader (`sync`), reads
//! everything and compares. Then each event leads to one reading of what it is about, and events that come while that
//! is under way are taken together. Once in a while everything is read although nothing was heard.
//!
//! | what happens | what it does |
//! |---|---|
//! | the connection is lost | keeps what it has, says that it is stale, connects to another server |
//! | the session expires | the same, with a new session |
//! | no server has a quorum | reads once from one that answers reads, if it has nothing yet; stale in any case |
//! | a node may not be read | that node is as it was, and says why; tried again every half minute |
//! | a root is not there | it is absent, and heard of when it comes |
//! | credentials or certificates change | a new session, at the next loss of a connection or within half a minute |

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
use zookeeper_client as zk;

use crate::config::{Config, Watch, check_path};
use crate::pass::{self, Excess, Findings, OneShots, Start, Want, depth};
use crate::session::{Backoff, Connection, Count, Counted, Error, Secrets, is_of_session, jitter};
use crate::tree::{Node, build, put};

/// What could not be read is tried again so often, and the files with credentials are looked at.
const RETRY: Duration = Duration::from_secs(30);
/// Everything is read so often although nothing was heard: what a watch misses for whatever reason is not missed for
/// longer. Some of it is drawn, so that mirrors do not do it together.
const VERIFY: Duration = Duration::from_secs(600);
/// Between two readings of everything; a connection that comes and goes must not cause more.
const PACE: Duration = Duration::from_secs(1);
/// For how long a server is taken for one without persistent watches that said so: it may be upgraded.
const OLD: Duration = Duration::from_secs(3600);
/// How long to stay with a server that only answers reads, before others are asked again.
const READ_ONLY: Duration = Duration::from_secs(30);

/// Bytes of data and names below one root that are kept in memory, if nothing else is set: 200,000 nodes of 1 KiB fit.
const MAX_BYTES: usize = 256 << 20;

/// A subtree to be mirrored.
#[derive(Clone)]
pub struct Root {
    pub(crate) path: String,
    /// How many levels below the root are looked at.
    pub max_depth: usize,
    /// A root with more nodes than this is taken for the wrong one.
    pub max_nodes: usize,
    /// The same for the bytes of its nodes' data and names together.
    pub max_bytes: usize,
    keep: Keep,
}

/// Which nodes are wanted: told their path relative to the root, `a/b`.
type Keep = Arc<dyn Fn(&str) -> bool + Send + Sync>;

impl Root {
    /// `path` is absolute, below the chroot if there is one. Built in: 16 levels, 200,000 nodes, 256 MiB.
    pub fn new(path: impl Into<String>) -> Result<Root, String> {
        let path = path.into();
        check_path(&path)?;
        Ok(Root { path, max_depth: 16, max_nodes: 200_000, max_bytes: MAX_BYTES, keep: Arc::new(|_| true) })
    }

    /// Leaves out nodes, with all below them, of which `keep` says no. It is told paths relative to the root.
    pub fn keeping(mut self, keep: impl Fn(&str) -> bool + Send + Sync + 'static) -> Root {
        self.keep = Arc::new(keep);
        self
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    /// The path relative to the root: empty for the root itself.
    fn relative<'a>(&self, path: &'a str) -> &'a str {
        let rest = if self.path == "/" { path } else { path.strip_prefix(&*self.path).unwrap_or(path) };
        rest.trim_start_matches('/')
    }

    pub(crate) fn is_deepest(&self, path: &str) -> bool {
        depth(&self.path, path) >= self.max_depth
    }

    pub(crate) fn wants(&self, path: &str) -> bool {
        (self.keep)(self.relative(path))
    }

    /// Whether an event at `path` is about a node that is looked at.
    fn covers(&self, path: &str) -> bool {
        let relative = self.relative(path);
        let mut above = relative.match_indices('/').map(|(at, _)| relative.get(..at).unwrap_or_default());
        depth(&self.path, path) <= self.max_depth
            && above.all(|above| (self.keep)(above))
            && (relative.is_empty() || (self.keep)(relative))
    }
}

impl fmt::Debug for Root {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

/// What is known, whole.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View {
    /// One for each root, in their order; none until everything was read once.
    pub roots: Vec<Seen>,
    /// Why it may not be what is there now.
    pub stale_because: Option<Arc<str>>,
}

/// What is known of a root.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Seen {
    /// `None` if it is not there, or if it has failed ever since.
    pub tree: Option<Arc<Node>>,
    /// Why it cannot be read now; the tree is then the last that was.
    pub failed: Option<Arc<str>>,
}

type Confirm = oneshot::Sender<Result<View, Error>>;

/// Keeps a view of some roots. What it does ends when it is dropped.
pub struct Mirror {
    shared: Arc<Shared>,
    views: watch::Receiver<View>,
    confirms: mpsc::Sender<Confirm>,
    driver: JoinSet<()>,
    backoff: Backoff,
}

struct Shared {
    config: Config,
    roots: Vec<Root>,
    count: Count,
    views: watch::Sender<View>,
}

impl Mirror {
    /// Nothing happens before [`Mirror::changed`] or [`Mirror::confirm`] is polled, which needs a tokio runtime.
    pub fn new(config: Config, roots: Vec<Root>, count: impl Fn(Counted) + Send + Sync + 'static) -> Mirror {
        let (publish, views) = watch::channel(View::default());
        let shared = Arc::new(Shared { config, roots, count: Arc::new(count), views: publish });
        let (confirms, _) = mpsc::channel(1);
        Mirror { shared, views, confirms, driver: JoinSet::new(), backoff: Backoff::new() }
    }

    /// Waits for a view that differs from the last that was returned. Dropping the future loses nothing.
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

    /// What is known now.
    pub fn view(&self) -> View {
        self.views.borrow().clone()
    }

    /// Reads everything again, after the server has caught up with its leader, and returns what there is then.
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

    /// The driver only ends by a panic, its own or one of the client's.
    fn restart(&mut self) {
        let because: Arc<str> = Error::Ended.line().into();
        self.shared.views.send_modify(|view| view.stale_because = Some(because));
        let wait = self.backoff.draw();
        self.drive(wait);
    }
}

/// How a connection ended.
enum Ended {
    State(zk::SessionState),
    Error(Error),
}

/// What is heard from.
enum Watches {
    Persistent(Vec<zk::PersistentWatcher>),
    OneShot(OneShots),
}

struct Driver {
    shared: Arc<Shared>,
    confirms: mpsc::Receiver<Confirm>,
    seen: Vec<Seen>,
    /// Everything was read once.
    has_read: bool,
    /// What could not be read, by root.
    refused: BTreeSet<(usize, String)>,
    backoff: Backoff,
    last_whole: Option<Instant>,
    /// When a server last said that it knows no persistent watches, and then hung up: it does both.
    refused_persistent: Option<Instant>,
}

impl Driver {
    /// Begins with what an earlier driver has published.
    fn new(shared: Arc<Shared>, confirms: mpsc::Receiver<Confirm>) -> Driver {
        let mut seen = shared.views.borrow().roots.clone();
        let has_read = !seen.is_empty();
        seen.resize_with(shared.roots.len(), Seen::default);
        Driver {
            shared,
            confirms,
            seen,
            has_read,
            refused: BTreeSet::new(),
            backoff: Backoff::new(),
            last_whole: None,
            refused_persistent: None,
        }
    }

    async fn run(mut self) {
        loop {
            let error = self.session().await;
            let because = self.stale(&error);
            let wait = self.backoff.draw();
            tracing::debug!("{because}; next attempt in {wait:?}");
            self.refusing(sleep(wait)).await;
        }
    }

    /// Waits for `what`, and tells those who want something confirmed that it cannot be.
    async fn refusing<T>(&mut self, what: impl Future<Output = T>) -> T {
        let mut what = pin!(what);
        loop {
            tokio::select! {
                done = &mut what => return done,
                Some(reply) = self.confirms.recv() => {
                    let servers = self.shared.config.connect.to_string();
                    _ = reply.send(Err(Error::Lost { servers, why: "is not connected" }));
                }
            }
        }
    }

    fn stale(&self, error: &Error) -> Arc<str> {
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
            let is_news = view.stale_because != stale_because || !same(&view.roots, &self.seen);
            if is_news {
                *view = View { roots: self.seen.clone(), stale_because };
            }
            is_news
        });
    }

    fn lost(&self, why: &'static str) -> Error {
        Error::Lost { servers: self.shared.config.connect.to_string(), why }
    }

    /// One session, from its beginning to its end.
    async fn session(&mut self) -> Error {
        let shared = self.shared.clone();
        let opened = async {
            let secrets = Secrets::read(&shared.config).await?;
            let client =
                crate::session::open(&shared.config, &secrets, shared.config.read_only, false).await?;
            Ok::<_, Error>((secrets, client))
        };
        let (secrets, client) = match self.refusing(opened).await {
            Ok(opened) => opened,
            Err(error) => return error,
        };
        let mut states = client.state_watcher();
        let mut watches = None;
        loop {
            let connection = Connection::new(&shared.count);
            let ended = self.connection(&client, &mut states, &mut watches, &secrets).await;
            drop(connection);
            let mut state = match ended {
                Ended::State(state) => state,
                Ended::Error(error) => return error,
            };
            if state == zk::SessionState::Disconnected {
                self.stale(&self.lost("has lost its connection; another is being made"));
                // The client would restore one-shot watches, all of them again with each 128 KiB of paths, and a server
                // refuses such a request. And it has to be told of other credentials, which it does not read again.
                let is_one_shot = matches!(watches, Some(Watches::OneShot(_)));
                if is_one_shot || Secrets::read(&shared.config).await.is_ok_and(|now| now != secrets) {
                    return self.lost("has lost its connection");
                }
            }
            while state == zk::SessionState::Disconnected {
                state = self.refusing(states.changed()).await;
            }
            match state {
                zk::SessionState::Expired => {
                    (shared.count)(Counted::Expired);
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

    /// One connection, from its beginning to its end.
    async fn connection(
        &mut self,
        client: &zk::Client,
        states: &mut zk::StateWatcher,
        watches: &mut Option<Watches>,
        secrets: &Secrets,
    ) -> Ended {
        let is_read_only = states.peek_state() == zk::SessionState::ConnectedReadOnly;
        // The answer first: an old server says what it does not know, and hangs up at once.
        let begun = tokio::select! {
            biased;
            begun = self.begin(client, watches, is_read_only) => begun,
            state = states.changed() => return Ended::State(state),
        };
        if let Err(ended) = begun {
            return self.ended(ended, states).await;
        }
        let mut retry_at = Instant::now() + RETRY;
        let mut verify_at = Instant::now() + VERIFY - jitter(VERIFY / 4);
        let leave_at = Instant::now() + READ_ONLY;
        loop {
            let Some(watches) = watches else { return Ended::Error(Error::Ended) };
            let mut dirty = Dirty::default();
            let (mut whole, mut reply) = (false, None);
            tokio::select! {
                biased;
                state = states.changed() => return Ended::State(state),
                (root, event) = watches.next() => {
                    if !dirty.note(&self.shared.roots, root, event) {
                        return self.ended(zk::Error::ClientClosed, states).await;
                    }
                }
                Some(asked) = self.confirms.recv() => (whole, reply) = (true, Some(asked)),
                () = sleep_until(retry_at) => {
                    retry_at = Instant::now() + RETRY;
                    if Secrets::read(&self.shared.config).await.is_ok_and(|now| now != *secrets) {
                        return Ended::Error(self.lost("ended, to begin with other credentials"));
                    }
                    for (root, path) in std::mem::take(&mut self.refused) {
                        dirty.add(root, path, Want::All);
                    }
                }
                () = sleep_until(verify_at) => {
                    verify_at = Instant::now() + VERIFY - jitter(VERIFY / 4);
                    whole = true;
                }
                () = sleep_until(leave_at), if is_read_only => return Ended::Error(Error::ReadOnly),
            }
            if is_read_only {
                // Nothing changes without a quorum; and what this server has is no newer than what is known.
                if let Some(reply) = reply {
                    _ = reply.send(Err(Error::ReadOnly));
                }
                continue;
            }
            while let Some((root, event)) = watches.ready() {
                if !dirty.note(&self.shared.roots, root, event) {
                    return self.ended(zk::Error::ClientClosed, states).await;
                }
            }
            let is_confirming = reply.is_some();
            let done = tokio::select! {
                biased;
                // The answer first: it says why the connection ended, and the state only that it did.
                done = async {
                    match whole {
                        true => self.whole(client, watches, is_confirming).await,
                        false => self.update(client, watches, dirty).await,
                    }
                } => done,
                state = states.changed() => {
                    if let Some(reply) = reply {
                        _ = reply.send(Err(self.lost("lost its connection while everything was read again")));
                    }
                    return Ended::State(state);
                }
            };
            match (done, reply) {
                (Ok(()), Some(reply)) => _ = reply.send(Ok(self.shared.views.borrow().clone())),
                (Ok(()), None) => {}
                (Err(error), reply) => {
                    if let Some(reply) = reply {
                        _ = reply.send(Err(Error::request("read again", "everything", &error)));
                    }
                    return self.ended(error, states).await;
                }
            }
        }
    }

    /// After an error of the connection or the session its state says more; without one something else is wrong.
    async fn ended(&mut self, error: zk::Error, states: &mut zk::StateWatcher) -> Ended {
        let servers = self.shared.config.connect.to_string();
        let patience = 2 * self.shared.config.session_timeout;
        match error {
            zk::Error::Unimplemented if self.shared.config.watch == Watch::Auto => {
                self.backoff.reset();
                Ended::Error(
                    self.lost("ended: its server is older than 3.6, and is watched node by node from now on"),
                )
            }
            zk::Error::Unimplemented => Ended::Error(Error::NoPersistentWatches(servers)),
            // The next attempt is left to the back-off: the same server would send the same again.
            error @ zk::Error::ReplyTooLarge { .. } => {
                Ended::Error(Error::request("read from", &servers, &error))
            }
            error if is_of_session(&error) && error != zk::Error::Throttled => {
                match self.refusing(timeout(patience, states.changed())).await {
                    Ok(state) => Ended::State(state),
                    Err(_) => Ended::Error(Error::request("read from", &servers, &error)),
                }
            }
            error => Ended::Error(Error::request("read from", &servers, &error)),
        }
    }

    /// Watches anew and reads everything.
    async fn begin(
        &mut self,
        client: &zk::Client,
        watches: &mut Option<Watches>,
        is_read_only: bool,
    ) -> Result<(), zk::Error> {
        if let Some(last) = self.last_whole {
            sleep_until(last + PACE).await;
        }
        // In this order: the new ones stand before those of the connection before are dropped.
        let armed = self.armed(client).await?;
        let watches = watches.insert(armed);
        if is_read_only {
            if !self.has_read {
                self.read_whole(client, watches).await?;
            }
            self.stale(&Error::ReadOnly);
            if self.has_read {
                self.publish(Some(Error::ReadOnly.line().into()));
            }
            return Ok(());
        }
        self.whole(client, watches, true).await?;
        self.backoff.reset();
        Ok(())
    }

    async fn armed(&mut self, client: &zk::Client) -> Result<Watches, zk::Error> {
        let is_old = self.refused_persistent.is_some_and(|at| at.elapsed() < OLD);
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

    /// Reads everything, from a server that has caught up with its leader if it is to `sync`.
    async fn whole(
        &mut self,
        client: &zk::Client,
        watches: &mut Watches,
        sync: bool,
    ) -> Result<(), zk::Error> {
        if sync {
            client.sync("/").await?;
        }
        self.read_whole(client, watches).await?;
        self.publish(None);
        Ok(())
    }

    async fn read_whole(&mut self, client: &zk::Client, watches: &mut Watches) -> Result<(), zk::Error> {
        let shared = self.shared.clone();
        let start = |(root, what): (usize, &Root)| Start {
            root,
            path: what.path.clone(),
            want: Want::All,
            known: BTreeSet::new(),
        };
        let starts: Vec<_> = shared.roots.iter().enumerate().map(start).collect();
        self.refused.clear();
        match watches {
            Watches::Persistent(_) => self.read(client, starts, None).await?,
            Watches::OneShot(armed) => {
                // Armed anew on every node, before those of before are dropped.
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
                self.refused
                    .insert((root, shared.roots.get(root).map(|r| r.path.clone()).unwrap_or_default()));
            }
        }
        self.last_whole = Some(Instant::now());
        self.has_read = true;
        Ok(())
    }

    /// Reads what events were about.
    async fn update(
        &mut self,
        client: &zk::Client,
        watches: &mut Watches,
        dirty: Dirty,
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
        starts: Vec<Start>,
        watch: Option<&mut OneShots>,
    ) -> Result<(), zk::Error> {
        let shared = self.shared.clone();
        let began: Vec<_> = starts.iter().map(|start| (start.root, start.path.clone())).collect();
        let read = pass::read(client, &shared.roots, starts, watch).await;
        let (findings, error) = match read {
            Ok(findings) => (findings, None),
            Err((findings, error)) => (findings, Some(error)),
        };
        (shared.count)(Counted::Reads(findings.reads));
        if findings.failed > 0 {
            (shared.count)(Counted::FailedReads(findings.failed));
        }
        match error {
            Some(error) => Err(error),
            None => {
                self.take(&findings, &began);
                Ok(())
            }
        }
    }

    /// Puts what was found into the trees.
    fn take(&mut self, findings: &Findings, began: &[(usize, String)]) {
        let nothing = BTreeMap::new();
        for (index, path) in began {
            let (Some(root), Some(seen)) = (self.shared.roots.get(*index), self.seen.get_mut(*index)) else {
                continue;
            };
            if let Some(excess) = findings.too_many.get(index) {
                seen.failed = Some(excess.message(root));
                self.refused.insert((*index, root.path.clone()));
                continue;
            }
            let found = findings.found.get(index).unwrap_or(&nothing);
            let relative = root.relative(path);
            let before = seen.tree.as_ref().and_then(|tree| child(tree, relative));
            let now = build(path, found, before);
            // Judged before it is put in: a tree that grew node by node past its limit would have none.
            if let Some(excess) =
                excess_of(root, seen.tree.as_deref(), before.map(|node| &**node), now.as_deref())
            {
                seen.failed = Some(excess.message(root));
                self.refused.insert((*index, root.path.clone()));
                continue;
            }
            if relative.is_empty() {
                // A root that cannot be read is not one without content.
                seen.failed = now.as_ref().and_then(|tree| tree.unreadable.clone());
                if seen.failed.is_some() {
                    continue;
                }
            }
            put(&mut seen.tree, relative, now);
        }
        self.refused.extend(findings.refused.iter().cloned());
    }
}

/// Returns which limit of `root` its `tree` would exceed with `now` in the place of `before`.
fn excess_of(root: &Root, tree: Option<&Node>, before: Option<&Node>, now: Option<&Node>) -> Option<Excess> {
    let with = |of: fn(&Node) -> usize| {
        let of = |node: Option<&Node>| node.map_or(0, of);
        (of(tree) + of(now)).saturating_sub(of(before))
    };
    if with(Node::size) > root.max_nodes {
        Some(Excess::Nodes)
    } else if with(Node::bytes) > root.max_bytes {
        Some(Excess::Bytes)
    } else {
        None
    }
}

impl Excess {
    fn message(self, root: &Root) -> Arc<str> {
        let more = match self {
            Excess::Nodes => format!("more than {} nodes below {}", root.max_nodes, root.path),
            Excess::Bytes => format!("more than {} bytes in the nodes below {}", root.max_bytes, root.path),
        };
        let hint = match self {
            Excess::Nodes => "see `max_nodes`",
            Excess::Bytes => "no registry of services is that large",
        };
        format!("there are {more}: this is not taken for what is meant ({hint})").into()
    }
}

fn child<'a>(tree: &'a Arc<Node>, relative: &str) -> Option<&'a Arc<Node>> {
    crate::tree::segments(relative).try_fold(tree, |node, segment| node.children.get(segment))
}

fn same(before: &[Seen], now: &[Seen]) -> bool {
    let tree = |a: &Option<Arc<Node>>, b: &Option<Arc<Node>>| match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    };
    before.len() == now.len()
        && before.iter().zip(now).all(|(a, b)| a.failed == b.failed && tree(&a.tree, &b.tree))
}

impl Watches {
    /// The next event, and the root that it is about. Dropping the future loses no event.
    async fn next(&mut self) -> (usize, zk::WatchedEvent) {
        match self {
            Watches::Persistent(watchers) => any(watchers).await,
            Watches::OneShot(armed) => match armed.join_next().await {
                Some(Ok(event)) => event,
                // It ended without an event: with the client's own task.
                Some(Err(_)) => (0, zk::WatchedEvent::new_session(zk::SessionState::Closed)),
                None => std::future::pending().await,
            },
        }
    }

    /// An event that is there already.
    fn ready(&mut self) -> Option<(usize, zk::WatchedEvent)> {
        match self {
            Watches::Persistent(watchers) => now(any(watchers)),
            Watches::OneShot(armed) => match armed.try_join_next()? {
                Ok(event) => Some(event),
                Err(_) => Some((0, zk::WatchedEvent::new_session(zk::SessionState::Closed))),
            },
        }
    }
}

async fn any(watchers: &mut [zk::PersistentWatcher]) -> (usize, zk::WatchedEvent) {
    let mut waiting: Vec<_> = watchers.iter_mut().map(|watcher| Box::pin(watcher.changed())).collect();
    poll_fn(|context| {
        for (root, waiting) in waiting.iter_mut().enumerate() {
            // The client panics when its own task has ended, which is an end like any other.
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

/// What a future has now, if anything.
fn now<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match pin!(future).poll(&mut context) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

/// What has to be read again: one reading for each path, whatever the number of events.
#[derive(Debug, Default)]
struct Dirty(BTreeMap<(usize, String), Want>);

impl Dirty {
    /// `false` if the event is the end of the session.
    fn note(&mut self, roots: &[Root], root: usize, event: zk::WatchedEvent) -> bool {
        let want = match event.event_type {
            zk::EventType::Session => return !event.session_state.is_terminated(),
            zk::EventType::NodeDataChanged => Want::Data,
            zk::EventType::NodeChildrenChanged => Want::Children,
            zk::EventType::NodeCreated | zk::EventType::NodeDeleted => Want::All,
        };
        if roots.get(root).is_some_and(|root| root.covers(&event.path)) {
            self.add(root, event.path, want);
        }
        true
    }

    fn add(&mut self, root: usize, path: String, want: Want) {
        let entry = self.0.entry((root, path)).or_insert(want);
        *entry = entry.and(want);
    }

    /// Where to begin to read: not below where everything is read, and not where nothing is known of what is above.
    fn starts(self, roots: &[Root], seen: &[Seen]) -> Vec<Start> {
        let mut wanted: BTreeMap<(usize, String), Want> = BTreeMap::new();
        for ((index, path), want) in self.0 {
            let (Some(root), Some(seen)) = (roots.get(index), seen.get(index)) else { continue };
            let (path, want) = match missing(root, seen, &path) {
                Some(missing) => (missing, Want::All),
                None => (path, want),
            };
            let entry = wanted.entry((index, path)).or_insert(want);
            *entry = entry.and(want);
        }
        let is_covered = |index: usize, path: &str| {
            path.match_indices('/').any(|(at, _)| {
                let above = if at == 0 { "/" } else { path.get(..at).unwrap_or_default() };
                above != path && wanted.get(&(index, above.to_owned())) == Some(&Want::All)
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
            .map(|((index, path), want)| Start {
                root: *index,
                path: path.clone(),
                want: *want,
                known: if *want == Want::Children { known(*index, path) } else { BTreeSet::new() },
            })
            .collect()
    }
}

/// The uppermost node above `path` that should be known and is not; `None` if all are.
fn missing(root: &Root, seen: &Seen, path: &str) -> Option<String> {
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
