//! Reads many nodes over one connection, with a window of requests. ZooKeeper answers the requests of a session
//! in their order.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use tokio::task::JoinSet;
use zookeeper_client as zk;

use crate::mirror::Root;
use crate::session::{is_of_session, words};
use crate::tree::{Children, Found, Here, Owner, Stat, join, segments};

/// The limit of requests in flight. A server queues 1,000 requests before it stops reading from all clients,
/// and up to this many replies, which the client bounds one by one (8 MiB), are in memory together.
const AT_ONCE: usize = 64;

/// Which part of a node to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// The data of the node.
    Data,
    /// The list of children, and each new child with its subtree.
    Children,
    /// The node and its whole subtree.
    All,
}

impl Want {
    pub(crate) fn and(self, other: Want) -> Want {
        if self == other { self } else { Want::All }
    }
}

/// A node at which a read starts.
#[derive(Debug, Clone)]
pub(crate) struct Start {
    pub(crate) root: usize,
    pub(crate) path: String,
    pub(crate) want: Want,
    /// The children that are already known, for [`ReadScope::Children`].
    pub(crate) known: BTreeSet<String>,
}

/// The one-shot watches that are set; each task ends with the event of its watch.
pub(crate) type OneShots = JoinSet<(usize, zk::WatchedEvent)>;

/// The result of a read, by the index of the root.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) found: BTreeMap<usize, BTreeMap<String, Found>>,
    /// Roots with a subtree that exceeds a limit.
    pub(crate) too_many: BTreeMap<usize, Excess>,
    /// Nodes that could not be read.
    pub(crate) refused: BTreeSet<(usize, String)>,
    pub(crate) reads: u64,
    pub(crate) failed: u64,
    /// The number of nodes found below each root.
    queued: BTreeMap<usize, usize>,
    /// The bytes of data and names read below each root.
    bytes: BTreeMap<usize, usize>,
}

/// A limit of a root that its subtree exceeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Excess {
    Nodes,
    Bytes,
}

type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, zk::Error>> + Send + 'a>>;

enum Question<'a> {
    Data(Answer<'a, (Vec<u8>, zk::Stat, Option<zk::OneshotWatcher>)>),
    Children(Answer<'a, (Vec<String>, Option<zk::OneshotWatcher>)>),
    /// Checks whether a missing root exists by now, and watches for its creation.
    Exists(Answer<'a, (Option<zk::Stat>, zk::OneshotWatcher)>),
}

struct Job {
    root: usize,
    path: String,
    want: Want,
    known: BTreeSet<String>,
    ask: Ask,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    Data,
    Children,
    Exists,
}

impl Job {
    fn new(root: usize, path: String, want: Want) -> Job {
        let ask = if want == Want::Children { Ask::Children } else { Ask::Data };
        Job { root, path, want, known: BTreeSet::new(), ask }
    }
}

/// Reads the nodes `starts` and what their scopes include. An error concerns the whole session, and the nodes
/// read so far are then unusable. Dropping the future discards the read.
pub(crate) async fn read(
    client: &zk::Client,
    roots: &[Root],
    starts: Vec<Start>,
    mut watch: Option<&mut OneShots>,
) -> Result<Findings, (Findings, zk::Error)> {
    let mut findings = Findings::default();
    let mut todo: VecDeque<Job> = starts
        .into_iter()
        .map(|start| Job { known: start.known, ..Job::new(start.root, start.path, start.want) })
        .collect();
    let mut asked: VecDeque<(Job, Question<'_>)> = VecDeque::new();
    loop {
        while asked.len() < AT_ONCE
            && let Some(job) = todo.pop_front()
        {
            let question = ask(client, &job, watch.is_some());
            findings.reads += 1;
            asked.push_back((job, question));
        }
        let Some((job, question)) = asked.pop_front() else { return Ok(findings) };
        let error = match question {
            Question::Data(answer) => match answer.await {
                Ok((data, stat, watcher)) => {
                    arm(watch.as_deref_mut(), job.root, watcher);
                    findings.data(job, data, &stat, watch.is_some(), roots, &mut todo);
                    continue;
                }
                Err(error) => error,
            },
            Question::Children(answer) => match answer.await {
                Ok((names, watcher)) => {
                    arm(watch.as_deref_mut(), job.root, watcher);
                    findings.children(&job, names, roots, &mut todo);
                    continue;
                }
                Err(error) => error,
            },
            Question::Exists(answer) => match answer.await {
                Ok((stat, watcher)) => {
                    arm(watch.as_deref_mut(), job.root, Some(watcher));
                    match stat {
                        Some(_) => todo.push_back(Job { ask: Ask::Data, ..job }),
                        None => findings.put(&job, Found::Gone),
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
            zk::Error::NoNode if is_root && watch.is_some() && job.ask != Ask::Exists => {
                todo.push_back(Job { ask: Ask::Exists, want: Want::All, ..job });
            }
            zk::Error::NoNode => findings.put(&job, Found::Gone),
            error => findings.refused(job, &error),
        }
    }
}

fn ask<'a>(client: &'a zk::Client, job: &Job, watch: bool) -> Question<'a> {
    match (job.ask, watch) {
        (Ask::Data, false) => {
            let answer = client.get_data(&job.path);
            Question::Data(Box::pin(async move { answer.await.map(|(data, stat)| (data, stat, None)) }))
        }
        (Ask::Data, true) => {
            let answer = client.get_and_watch_data(&job.path);
            Question::Data(Box::pin(async move { answer.await.map(|(data, stat, w)| (data, stat, Some(w))) }))
        }
        (Ask::Children, false) => {
            let answer = client.list_children(&job.path);
            Question::Children(Box::pin(async move { answer.await.map(|names| (names, None)) }))
        }
        (Ask::Children, true) => {
            let answer = client.list_and_watch_children(&job.path);
            Question::Children(Box::pin(async move { answer.await.map(|(names, w)| (names, Some(w))) }))
        }
        (Ask::Exists, _) => Question::Exists(Box::pin(client.check_and_watch_stat(&job.path))),
    }
}

fn arm(watch: Option<&mut OneShots>, root: usize, watcher: Option<zk::OneshotWatcher>) {
    if let (Some(watch), Some(watcher)) = (watch, watcher) {
        watch.spawn(async move { (root, watcher.changed().await) });
    }
}

impl Findings {
    fn put(&mut self, job: &Job, found: Found) {
        self.found.entry(job.root).or_default().insert(job.path.clone(), found);
    }

    /// Updates the content of an existing node.
    fn here(&mut self, job: &Job, note: impl FnOnce(&mut Here)) {
        let found = self.found.entry(job.root).or_default();
        match found.get_mut(&job.path) {
            Some(Found::Here(here)) => note(here),
            _ => {
                let mut here = Here { data: None, children: Children::AsKnown };
                note(&mut here);
                found.insert(job.path.clone(), Found::Here(here));
            }
        }
    }

    fn data(
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
        let all = job.want == Want::All;
        if !self.has_room(&job, data.len() + job.path.len(), roots, todo) {
            return;
        }
        self.here(&job, |here| {
            here.data = Some(Ok((Bytes::from(data), kept)));
            if all {
                here.children = Children::None;
            }
        });
        if all && may_have_children {
            todo.push_back(Job { ask: Ask::Children, ..job });
        }
    }

    fn children(&mut self, job: &Job, mut names: Vec<String>, roots: &[Root], todo: &mut VecDeque<Job>) {
        let Some(root) = roots.get(job.root) else { return };
        names.retain(|name| root.wants(&join(&job.path, name)));
        if !self.has_room(job, names.iter().map(String::len).sum(), roots, todo) {
            return;
        }
        let new: Vec<_> = names.iter().filter(|name| !job.known.contains(name.as_str())).collect();
        let queued = self.queued.entry(job.root).or_default();
        *queued += new.len();
        if *queued > root.max_nodes {
            self.give_up(job.root, Excess::Nodes, todo);
        } else {
            todo.extend(new.into_iter().map(|name| Job::new(job.root, join(&job.path, name), Want::All)));
        }
        self.here(job, |here| here.children = Children::Are(names));
    }

    /// Adds `more` bytes to the root of `job`. Returns `false` if the root then exceeds its limit.
    fn has_room(&mut self, job: &Job, more: usize, roots: &[Root], todo: &mut VecDeque<Job>) -> bool {
        if self.too_many.contains_key(&job.root) {
            return false;
        }
        let bytes = self.bytes.entry(job.root).or_default();
        *bytes = bytes.saturating_add(more);
        let has_room = roots.get(job.root).is_some_and(|root| *bytes <= root.max_bytes);
        if !has_room {
            self.give_up(job.root, Excess::Bytes, todo);
        }
        has_room
    }

    /// Stops reading below a root and discards what was read of it.
    fn give_up(&mut self, root: usize, excess: Excess, todo: &mut VecDeque<Job>) {
        self.too_many.insert(root, excess);
        self.found.remove(&root);
        todo.retain(|waiting| waiting.root != root);
    }

    fn refused(&mut self, job: Job, error: &zk::Error) {
        self.failed += 1;
        self.refused.insert((job.root, job.path.clone()));
        let why: Arc<str> = format!("could not read {}: {}", job.path, words(error)).into();
        self.here(&job, |here| {
            here.data = Some(Err(why));
            here.children = Children::AsKnown;
        });
    }
}

/// Returns how many levels `path` is below `root`; both are absolute. The root itself has depth 0.
pub(crate) fn depth(root: &str, path: &str) -> usize {
    segments(path).count().saturating_sub(segments(root).count())
}
