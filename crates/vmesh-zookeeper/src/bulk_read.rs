//! Reads many nodes over one connection, with a window of requests. ZooKeeper answers the requests of a session
//! in their order.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use tokio::task::JoinSet;
use zookeeper_client as zk;

use crate::root::Root;
use crate::session::{describe, is_of_session};
use crate::tree::{ChildrenUpdate, NodeContent, Owner, PathContent, Stat, join};

/// The limit of requests in flight. A server queues 1,000 requests before it stops reading from all clients,
/// and up to this many replies, which the client bounds one by one (8 MiB), are in memory together.
const WINDOW: usize = 64;

/// Which part of a node to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReadScope {
    /// The data of the node.
    Data,
    /// The list of children, and each new child with its subtree.
    Children,
    /// The node and its whole subtree.
    Subtree,
}

impl ReadScope {
    pub(crate) fn and(self, other: ReadScope) -> ReadScope {
        if self == other { self } else { ReadScope::Subtree }
    }
}

/// A node at which a read starts.
#[derive(Debug, Clone)]
pub(crate) struct ReadStart {
    pub(crate) root: usize,
    pub(crate) path: String,
    pub(crate) scope: ReadScope,
    /// The children that are already known, for [`ReadScope::Children`].
    pub(crate) known: BTreeSet<String>,
}

/// The one-shot watches that are set; each task ends with the event of its watch.
pub(crate) type OneShots = JoinSet<(usize, zk::WatchedEvent)>;

/// The result of a read, by the index of the root.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) found: BTreeMap<usize, BTreeMap<String, PathContent>>,
    /// Roots with a subtree that exceeds a limit.
    pub(crate) exceeded: BTreeMap<usize, ExceededLimit>,
    /// Nodes that could not be read.
    pub(crate) unreadable: BTreeSet<(usize, String)>,
    pub(crate) reads: u64,
    pub(crate) failed: u64,
    /// The number of nodes found below each root.
    queued: BTreeMap<usize, usize>,
    /// The bytes of data and names read below each root.
    bytes: BTreeMap<usize, usize>,
}

/// A limit of a root that its subtree exceeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExceededLimit {
    Nodes,
    Bytes,
}

type ReplyFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, zk::Error>> + Send + 'a>>;

enum PendingReply<'a> {
    Data(ReplyFuture<'a, (Vec<u8>, zk::Stat, Option<zk::OneshotWatcher>)>),
    Children(ReplyFuture<'a, (Vec<String>, Option<zk::OneshotWatcher>)>),
    /// Checks whether a missing root exists by now, and watches for its creation.
    Exists(ReplyFuture<'a, (Option<zk::Stat>, zk::OneshotWatcher)>),
}

struct Job {
    root: usize,
    path: String,
    scope: ReadScope,
    known: BTreeSet<String>,
    request: RequestKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RequestKind {
    Data,
    Children,
    Exists,
}

impl Job {
    fn new(root: usize, path: String, scope: ReadScope) -> Job {
        let request = if scope == ReadScope::Children { RequestKind::Children } else { RequestKind::Data };
        Job { root, path, scope, known: BTreeSet::new(), request }
    }
}

/// Reads the nodes `starts` and what their scopes include. An error concerns the whole session, and the nodes
/// read so far are then unusable. Dropping the future discards the read.
pub(crate) async fn read(
    client: &zk::Client,
    roots: &[Root],
    starts: Vec<ReadStart>,
    mut watch: Option<&mut OneShots>,
) -> Result<Findings, (Findings, zk::Error)> {
    let mut findings = Findings::default();
    let mut todo: VecDeque<Job> = starts
        .into_iter()
        .map(|start| Job { known: start.known, ..Job::new(start.root, start.path, start.scope) })
        .collect();
    let mut in_flight: VecDeque<(Job, PendingReply<'_>)> = VecDeque::new();
    loop {
        while in_flight.len() < WINDOW
            && let Some(job) = todo.pop_front()
        {
            let reply = send(client, &job, watch.is_some());
            findings.reads += 1;
            in_flight.push_back((job, reply));
        }
        let Some((job, reply)) = in_flight.pop_front() else { return Ok(findings) };
        let error = match reply {
            PendingReply::Data(answer) => match answer.await {
                Ok((data, stat, watcher)) => {
                    arm(watch.as_deref_mut(), job.root, watcher);
                    findings.add_data(job, data, &stat, watch.is_some(), roots, &mut todo);
                    continue;
                }
                Err(error) => error,
            },
            PendingReply::Children(answer) => match answer.await {
                Ok((names, watcher)) => {
                    arm(watch.as_deref_mut(), job.root, watcher);
                    findings.add_children(&job, names, roots, &mut todo);
                    continue;
                }
                Err(error) => error,
            },
            PendingReply::Exists(answer) => match answer.await {
                Ok((stat, watcher)) => {
                    arm(watch.as_deref_mut(), job.root, Some(watcher));
                    match stat {
                        Some(_) => todo.push_back(Job { request: RequestKind::Data, ..job }),
                        None => findings.put(&job, PathContent::Absent),
                    }
                    continue;
                }
                Err(error) => error,
            },
        };
        if is_of_session(&error) {
            findings.failed += 1;
            return Err((findings, error));
        }
        let is_root = roots.get(job.root).is_some_and(|root| root.path == job.path);
        match error {
            // Watching a missing root needs a request of its own: reading it sets no watch.
            zk::Error::NoNode if is_root && watch.is_some() && job.request != RequestKind::Exists => {
                todo.push_back(Job { request: RequestKind::Exists, scope: ReadScope::Subtree, ..job });
            }
            zk::Error::NoNode => findings.put(&job, PathContent::Absent),
            error => findings.add_unreadable(job, &error),
        }
    }
}

fn send<'a>(client: &'a zk::Client, job: &Job, watch: bool) -> PendingReply<'a> {
    match (job.request, watch) {
        (RequestKind::Data, false) => {
            let answer = client.get_data(&job.path);
            PendingReply::Data(Box::pin(async move { answer.await.map(|(data, stat)| (data, stat, None)) }))
        }
        (RequestKind::Data, true) => {
            let answer = client.get_and_watch_data(&job.path);
            PendingReply::Data(Box::pin(
                async move { answer.await.map(|(data, stat, w)| (data, stat, Some(w))) },
            ))
        }
        (RequestKind::Children, false) => {
            let answer = client.list_children(&job.path);
            PendingReply::Children(Box::pin(async move { answer.await.map(|names| (names, None)) }))
        }
        (RequestKind::Children, true) => {
            let answer = client.list_and_watch_children(&job.path);
            PendingReply::Children(Box::pin(async move { answer.await.map(|(names, w)| (names, Some(w))) }))
        }
        (RequestKind::Exists, _) => PendingReply::Exists(Box::pin(client.check_and_watch_stat(&job.path))),
    }
}

fn arm(watch: Option<&mut OneShots>, root: usize, watcher: Option<zk::OneshotWatcher>) {
    if let (Some(watch), Some(watcher)) = (watch, watcher) {
        watch.spawn(async move { (root, watcher.changed().await) });
    }
}

impl Findings {
    fn put(&mut self, job: &Job, found: PathContent) {
        self.found.entry(job.root).or_default().insert(job.path.clone(), found);
    }

    /// Updates the content of an existing node.
    fn update_content(&mut self, job: &Job, note: impl FnOnce(&mut NodeContent)) {
        let found = self.found.entry(job.root).or_default();
        match found.get_mut(&job.path) {
            Some(PathContent::Present(content)) => note(content),
            _ => {
                let mut content = NodeContent { data: None, children: ChildrenUpdate::Unchanged };
                note(&mut content);
                found.insert(job.path.clone(), PathContent::Present(content));
            }
        }
    }

    fn add_data(
        &mut self,
        job: Job,
        data: Vec<u8>,
        stat: &zk::Stat,
        watch: bool,
        roots: &[Root],
        todo: &mut VecDeque<Job>,
    ) {
        let owner = Owner::of(stat.ephemeral_owner);
        let kept = Stat { created: stat.czxid, modified: stat.mzxid, modified_at: stat.mtime, owner };
        let deep = roots.get(job.root).is_some_and(|root| root.is_deepest(&job.path));
        // One-shot watches report a first child only if the parent's children were listed, even an empty list.
        let may_have_children = !owner.is_session() && !deep && (watch || stat.num_children > 0);
        let all = job.scope == ReadScope::Subtree;
        if !self.has_room(&job, data.len() + job.path.len(), roots, todo) {
            return;
        }
        self.update_content(&job, |content| {
            content.data = Some(Ok((Bytes::from(data), kept)));
            if all {
                content.children = ChildrenUpdate::None;
            }
        });
        if all && may_have_children {
            todo.push_back(Job { request: RequestKind::Children, ..job });
        }
    }

    fn add_children(&mut self, job: &Job, mut names: Vec<String>, roots: &[Root], todo: &mut VecDeque<Job>) {
        let Some(root) = roots.get(job.root) else { return };
        names.retain(|name| root.accepts(&join(&job.path, name)));
        if !self.has_room(job, names.iter().map(String::len).sum(), roots, todo) {
            return;
        }
        let new: Vec<_> = names.iter().filter(|name| !job.known.contains(name.as_str())).collect();
        let queued = self.queued.entry(job.root).or_default();
        *queued += new.len();
        if *queued > root.max_nodes {
            self.abandon_root(job.root, ExceededLimit::Nodes, todo);
        } else {
            todo.extend(
                new.into_iter().map(|name| Job::new(job.root, join(&job.path, name), ReadScope::Subtree)),
            );
        }
        self.update_content(job, |content| content.children = ChildrenUpdate::List(names));
    }

    /// Adds `more` bytes to the root of `job`. Returns `false` if the root then exceeds its limit.
    fn has_room(&mut self, job: &Job, more: usize, roots: &[Root], todo: &mut VecDeque<Job>) -> bool {
        if self.exceeded.contains_key(&job.root) {
            return false;
        }
        let bytes = self.bytes.entry(job.root).or_default();
        *bytes = bytes.saturating_add(more);
        let has_room = roots.get(job.root).is_some_and(|root| *bytes <= root.max_bytes);
        if !has_room {
            self.abandon_root(job.root, ExceededLimit::Bytes, todo);
        }
        has_room
    }

    /// Stops reading below a root and discards what was read of it.
    fn abandon_root(&mut self, root: usize, excess: ExceededLimit, todo: &mut VecDeque<Job>) {
        self.exceeded.insert(root, excess);
        self.found.remove(&root);
        todo.retain(|waiting| waiting.root != root);
    }

    fn add_unreadable(&mut self, job: Job, error: &zk::Error) {
        self.failed += 1;
        self.unreadable.insert((job.root, job.path.clone()));
        let why: Arc<str> = format!("could not read {}: {}", job.path, describe(error)).into();
        self.update_content(&job, |content| {
            content.data = Some(Err(why));
            content.children = ChildrenUpdate::Unchanged;
        });
    }
}
