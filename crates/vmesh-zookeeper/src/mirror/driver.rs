//! The task of a mirror: keeps a session, watches the roots and reads what changes.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use vmesh_backoff::{Backoff, jitter};
use zookeeper_client as zk;

use super::dirty_paths::DirtyPaths;
use super::watches::Watches;
use super::{ConfirmReply, MirrorShared, Root, RootView, View, child};
use crate::bulk_read::{self, ExceededLimit, Findings, OneShots, ReadScope, ReadStart};
use crate::config::Watch;
use crate::session::{ConnectionGauge, Error, Secrets, SessionEvent, is_of_session, session_backoff};
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

/// The reason why a connection ended.
enum ConnectionEnd {
    State(zk::SessionState),
    Error(Error),
}

/// The task of a mirror: one session, its watches, and the trees read so far.
pub(super) struct Driver {
    shared: Arc<MirrorShared>,
    confirms: mpsc::Receiver<ConfirmReply>,
    /// The copy of each root, as read so far.
    copies: Vec<RootView>,
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
    pub(super) fn new(shared: Arc<MirrorShared>, confirms: mpsc::Receiver<ConfirmReply>) -> Driver {
        let mut copies = shared.views.borrow().roots.clone();
        let has_read = !copies.is_empty();
        copies.resize_with(shared.roots.len(), RootView::default);
        Driver {
            shared,
            confirms,
            copies,
            has_read,
            unreadable: BTreeSet::new(),
            backoff: session_backoff(),
            last_complete_read: None,
            refused_persistent: None,
        }
    }

    pub(super) async fn run(mut self) {
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
            let is_news = view.stale_because != stale_because || !is_unchanged(&view.roots, &self.copies);
            if is_news {
                *view = View { roots: self.copies.clone(), stale_because };
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
                self.mark_stale(&self.lost("has lost its connection and is reconnecting"));
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
            if let Some(end) = self.read_again(client, states, watches, dirty, whole, reply).await {
                return end;
            }
        }
    }

    /// Reads all roots if `whole`, else the `dirty` nodes, and sends the view to `reply`. Returns the end of the connection,
    /// if it ended.
    async fn read_again(
        &mut self,
        client: &zk::Client,
        states: &mut zk::StateWatcher,
        watches: &mut Watches,
        dirty: DirtyPaths,
        whole: bool,
        reply: Option<ConfirmReply>,
    ) -> Option<ConnectionEnd> {
        let is_confirming = reply.is_some();
        let done = tokio::select! {
            biased;
            // The result of the read comes before the state: the result has the reason for the lost connection.
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
                return Some(ConnectionEnd::State(state));
            }
        };
        match (done, reply) {
            (Ok(()), Some(reply)) => _ = reply.send(Ok(self.shared.views.borrow().clone())),
            (Ok(()), None) => {}
            (Err(error), reply) => {
                if let Some(reply) = reply {
                    _ = reply.send(Err(Error::request("read again", "everything", &error)));
                }
                return Some(self.end_of(error, states).await);
            }
        }
        None
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
                    self.lost(
                        "ended: its server is older than 3.6, from now on each node is watched on its own",
                    ),
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
        let start = |(root, subtree): (usize, &Root)| ReadStart {
            root,
            path: subtree.path.clone(),
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
        let all_absent = self.copies.iter().all(|copy| copy.tree.is_none() && copy.failed.is_none());
        if all_absent && !shared.config.connect.chroot().is_empty() && client.check_stat("/").await?.is_none()
        {
            let chroot = shared.config.connect.chroot();
            let why: Arc<str> = format!("the chroot {chroot} does not exist: see `connect`").into();
            for (root, copy) in self.copies.iter_mut().enumerate() {
                copy.failed = Some(why.clone());
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
        let starts = dirty.starts(&self.shared.roots, &self.copies);
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
            let (Some(root), Some(copy)) = (self.shared.roots.get(*index), self.copies.get_mut(*index))
            else {
                continue;
            };
            if let Some(excess) = findings.exceeded.get(index) {
                copy.failed = Some(excess.message(root));
                self.unreadable.insert((*index, root.path.clone()));
                continue;
            }
            let found = findings.found.get(index).unwrap_or(&nothing);
            let relative = root.relative(path);
            let before = copy.tree.as_ref().and_then(|tree| child(tree, relative));
            let now = build(path, found, before);
            // The limits apply before the merge: otherwise events could grow a tree beyond them, one node at a
            // time.
            if let Some(excess) =
                excess_of(root, copy.tree.as_deref(), before.map(|node| &**node), now.as_deref())
            {
                copy.failed = Some(excess.message(root));
                self.unreadable.insert((*index, root.path.clone()));
                continue;
            }
            if relative.is_empty() {
                // An unreadable root keeps its last content.
                copy.failed = now.as_ref().and_then(|tree| tree.unreadable.clone());
                if copy.failed.is_some() {
                    continue;
                }
            }
            put(&mut copy.tree, relative, now);
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
        format!("there are {more}: this is probably not the intended path ({hint})").into()
    }
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
