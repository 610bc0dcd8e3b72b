//! The mesh documents: from a directory, or from a registry where there is no configuration management.
//!
//! | module | where they are |
//! |---|---|
//! | [`dir`] | a directory of files |
//! | [`consul`] | a prefix of Consul's key-value store |
//! | [`zookeeper`] | a subtree of ZooKeeper |
//!
//! What counts is the content, compared by its hash; each document stays in its last good version while it has a
//! problem. A place that cannot be read is no reason to forget what it said.

mod consul;
mod dir;
mod zookeeper;

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use vmesh_discovery::SourceConfig;
use vmesh_discovery::file::privacy::redacted;
use vmesh_model::load::{DocumentFile, Kept, Library, NOT_IN_FORCE};
use vmesh_model::{Documents, Place, Problem};
use xxhash_rust::xxh3::Xxh3Default;

use crate::worlds::until;
pub(crate) use consul::KvConfig;
pub(crate) use zookeeper::TreeConfig;

/// How long the first reading of a registry may take before the last good documents are served instead.
const FIRST: Duration = Duration::from_secs(10);
/// How long documents stay that vanished from a registry together with most of the others.
const HOLD: Duration = Duration::from_secs(60);
/// Fewer documents come and go as they like.
const FEW: usize = 5;

/// Where the documents are.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum DocumentsConfig {
    /// A directory; every `.yaml`, `.yml` and `.json` file in it, in the order of their names.
    Dir(PathBuf),
    /// The keys of Consul that begin with a prefix.
    ConsulKv(KvConfig),
    /// The nodes of ZooKeeper below a path.
    Zookeeper(TreeConfig),
}

impl DocumentsConfig {
    /// Where the registry of the documents is, if that was not said: where the services are registered.
    pub(crate) fn complete(&mut self, discovery: &[SourceConfig]) -> Result<(), String> {
        match self {
            DocumentsConfig::Dir(_) => {}
            DocumentsConfig::ConsulKv(config) => {
                let first = discovery.iter().find_map(|source| match source {
                    SourceConfig::Consul(consul) => Some(consul.client()),
                    _ => None,
                });
                config.consul = Some(config.consul.take().or(first).unwrap_or_default());
            }
            DocumentsConfig::Zookeeper(config) => {
                let first = discovery.iter().find_map(|source| match source {
                    SourceConfig::Zookeeper(zookeeper) => Some(zookeeper.client()),
                    _ => None,
                });
                config.zookeeper = config.zookeeper.take().or(first);
                if config.zookeeper.is_none() {
                    return Err("`documents.zookeeper` does not say where ZooKeeper is, and no source of `discovery` \
                                does: write `zookeeper: {connect: \"zk1:2181\"}` in it"
                        .to_owned());
                }
                vmesh_zookeeper::Root::new(config.path.clone())
                    .map_err(|wrong| format!("`documents.zookeeper.path`: {wrong}"))?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for DocumentsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DocumentsConfig::Dir(dir) => dir.display().fmt(f),
            DocumentsConfig::ConsulKv(config) => write!(f, "consul-kv:{}", config.prefix),
            DocumentsConfig::Zookeeper(config) => write!(f, "zookeeper:{}", config.path),
        }
    }
}

/// The documents in force, and what is wrong with the others.
#[derive(Debug, Clone, Default)]
pub(crate) struct DocumentsView {
    pub(crate) documents: Arc<Documents>,
    /// Of the texts in force: equal on every replica that has the same.
    pub(crate) hash: u64,
    pub(crate) problems: Arc<[Problem]>,
    /// What is in force, for the next start.
    pub(crate) kept: Arc<[Kept]>,
    /// Why nothing may be served yet: a registry has never answered, and nothing is known from before.
    pub(crate) waiting: Option<Arc<str>>,
}

/// A text as it was read.
#[derive(Debug)]
struct Raw {
    /// For places, and the same for as long as it is the same text: `/etc/vmesh/mesh.d/orders.yaml`.
    path: String,
    content: Result<Vec<u8>, String>,
    /// What it says may be quoted to everybody who reads problems and logs.
    is_public: bool,
}

/// The place that is read.
enum Shelf {
    Nothing,
    Dir(dir::Dir),
    Consul(consul::Keys),
    Zookeeper(zookeeper::Tree),
}

impl Shelf {
    fn new(config: Option<DocumentsConfig>, known: BTreeSet<String>) -> Shelf {
        match config {
            None => Shelf::Nothing,
            Some(DocumentsConfig::Dir(path)) => Shelf::Dir(dir::Dir::new(path)),
            Some(DocumentsConfig::ConsulKv(config)) => Shelf::Consul(consul::Keys::new(config)),
            Some(DocumentsConfig::Zookeeper(config)) => Shelf::Zookeeper(zookeeper::Tree::new(config, known)),
        }
    }

    /// All texts, whenever they may have changed; at once the first time. After an error the next call takes its time.
    async fn next(&mut self) -> Result<Vec<Raw>, String> {
        match self {
            Shelf::Nothing => std::future::pending().await,
            Shelf::Dir(dir) => dir.next().await,
            Shelf::Consul(keys) => keys.next().await,
            Shelf::Zookeeper(tree) => tree.next().await,
        }
    }

    /// All texts as of now, read as strongly as the registry can.
    async fn confirm(&mut self) -> Result<Vec<Raw>, String> {
        match self {
            Shelf::Nothing => std::future::pending().await,
            Shelf::Dir(dir) => dir.next().await,
            Shelf::Consul(keys) => keys.confirm().await,
            Shelf::Zookeeper(tree) => tree.confirm().await,
        }
    }

    /// An edit of files is somebody's decision; a registry may have lost its content.
    fn is_registry(&self) -> bool {
        matches!(self, Shelf::Consul(_) | Shelf::Zookeeper(_))
    }
}

/// Reads the documents for as long as it is polled.
pub(crate) struct Follower {
    /// What it is called: the directory, `consul-kv:vmesh/`.
    place: Arc<str>,
    shelf: Shelf,
    library: Library,
    seen: Option<u64>,
    /// The texts of the last reading that was believed, by their places.
    paths: BTreeSet<String>,
    /// Since when most of them are gone.
    few_since: Option<Instant>,
    /// When they were last read to confirm that, at the earliest next.
    confirm_after: Option<Instant>,
    /// Whether problems quote files that not every user of the host may read.
    quotes_private_files: bool,
    has_answered: bool,
}

impl Follower {
    pub(crate) fn new(config: Option<DocumentsConfig>, kept: Vec<Kept>) -> Follower {
        // Without a place there are no documents, whatever there was.
        let kept = if config.is_some() { kept } else { Vec::new() };
        let place = config.as_ref().map_or_else(String::new, DocumentsConfig::to_string);
        let paths: BTreeSet<String> = kept.iter().map(|kept| kept.file.to_string()).collect();
        let shelf = Shelf::new(config, paths.clone());
        Follower {
            place: place.into(),
            has_answered: matches!(shelf, Shelf::Nothing) || !kept.is_empty(),
            paths,
            shelf,
            library: Library::restored(kept),
            seen: None,
            few_since: None,
            confirm_after: None,
            quotes_private_files: false,
        }
    }

    /// The first reading, so that no world is published without the documents. A registry that does not answer is not
    /// waited for for ever: what was known from before is served, or nothing at all.
    pub(crate) async fn read_once(mut self, views: &watch::Sender<DocumentsView>) -> Follower {
        if let Shelf::Nothing = self.shelf {
            return self;
        }
        let read = timeout(FIRST, self.shelf.next()).await;
        let read = read.unwrap_or_else(|_| Err(format!("no answer within {} s", FIRST.as_secs())));
        self.publish(read, views);
        self
    }

    pub(crate) async fn follow(mut self, views: watch::Sender<DocumentsView>) {
        loop {
            // However the judgement of what is read turns out, it is read to be sure once in a while and no more often.
            let confirm_at =
                self.few_since.map(|since| (since + HOLD).max(self.confirm_after.unwrap_or(since)));
            let read = tokio::select! {
                read = self.shelf.next() => read,
                () = until(confirm_at) => self.confirm().await,
            };
            self.publish(read, &views);
        }
    }

    /// Reads the documents again, of which most were gone for [`HOLD`], as strongly as their registry can.
    async fn confirm(&mut self) -> Result<Vec<Raw>, String> {
        self.confirm_after = Some(Instant::now() + HOLD);
        match timeout(HOLD, self.shelf.confirm()).await {
            Ok(Ok(files)) => {
                self.believe(&files);
                Ok(files)
            }
            not_confirmed => {
                // It has to be so for the whole time again.
                self.few_since = Some(Instant::now());
                let slow = || Err(format!("no answer within {} s when they were read again", HOLD.as_secs()));
                not_confirmed.unwrap_or_else(|_| slow())
            }
        }
    }

    /// Most documents are gone, and that is confirmed.
    fn believe(&mut self, files: &[Raw]) {
        if !files.is_empty() {
            self.paths = files.iter().map(|file| file.path.clone()).collect();
            self.few_since = None;
        }
    }

    fn publish(&mut self, read: Result<Vec<Raw>, String>, views: &watch::Sender<DocumentsView>) {
        let read = read.and_then(|files| self.judge(files, Instant::now()));
        let hash = hash(&read);
        if self.seen == Some(hash) {
            return;
        }
        self.seen = Some(hash);
        views.send_replace(self.take(read));
    }

    /// Whether to believe a registry that has fewer documents than it had.
    fn judge(&mut self, files: Vec<Raw>, now: Instant) -> Result<Vec<Raw>, String> {
        if self.shelf.is_registry() {
            let left = files.iter().filter(|file| self.paths.contains(&file.path)).count();
            let had = self.paths.len();
            if files.is_empty() && had > 0 {
                // Only a document ends this, and no time.
                self.few_since = None;
                return Err(format!(
                    "there is none any more, where there were {had}, which looks like an accident; to mean it, leave one \
                     that has nothing but a comment in it"
                ));
            }
            if had >= FEW && left * 2 < had {
                self.few_since.get_or_insert(now);
                return Err(format!(
                    "{left} of {had} documents are left, which looks like an accident; that is believed when it is still \
                     so after {} s",
                    HOLD.as_secs()
                ));
            }
        }
        self.few_since = None;
        self.paths = files.iter().map(|file| file.path.clone()).collect();
        Ok(files)
    }

    fn take(&mut self, files: Result<Vec<Raw>, String>) -> DocumentsView {
        let mut waiting = None;
        let (documents, problems) = match &files {
            Ok(files) => {
                let private: BTreeSet<&str> =
                    files.iter().filter(|file| !file.is_public).map(|file| file.path.as_str()).collect();
                let files: Vec<_> = files
                    .iter()
                    .map(|file| DocumentFile {
                        path: &file.path,
                        content: file.content.as_deref().map_err(String::as_str),
                    })
                    .collect();
                let (documents, problems) = self.library.update(&files);
                let is_private = |problem: &Problem| private.contains(&*problem.place.file);
                let shown = |problem: Problem| match is_private(&problem) && !self.quotes_private_files {
                    // The outcome says what the document costs, and is ours.
                    true if is_lost(&problem) => redacted(problem).with_outcome(NOT_IN_FORCE),
                    true => redacted(problem),
                    false => problem,
                };
                let problems: Vec<_> = problems.into_iter().map(shown).collect();
                // The first documents that are served have to be all that were meant: a route that is left out sends requests
                // elsewhere. Later ones cost themselves.
                match problems.iter().find(|problem| is_lost(problem)) {
                    Some(lost) if !self.has_answered => {
                        waiting = Some(format!("the documents of `{}` ({lost})", self.place).into());
                    }
                    _ => self.has_answered = true,
                }
                (documents, problems)
            }
            Err(why) => {
                if !self.has_answered {
                    waiting = Some(format!("the documents of `{}` ({why})", self.place).into());
                }
                let message =
                    format!("the documents could not be read: {why}; what was last read stays in force");
                let place = Place::file(self.place.clone());
                (self.library.documents(), vec![Problem::new(place, "documents", message)])
            }
        };
        for problem in &problems {
            tracing::warn!("{problem}");
        }
        let kept: Arc<[Kept]> = self.library.last_good().into();
        let mut hash = Xxh3Default::new();
        for kept in kept.iter() {
            hash.update(&(kept.text.len() as u64).to_le_bytes());
            hash.update(kept.text.as_bytes());
        }
        let hash = if kept.is_empty() { 0 } else { hash.digest() };
        DocumentsView { documents, hash, problems: problems.into(), kept, waiting }
    }
}

/// Reports whether a document is not in force for this problem, in any version.
fn is_lost(problem: &Problem) -> bool {
    // After a question the words begin with a capital letter.
    problem.message.to_lowercase().ends_with(NOT_IN_FORCE)
}

/// The problems of the documents that `config` names, for `--check`.
pub(crate) async fn check(config: Option<DocumentsConfig>) -> Vec<Problem> {
    let (views, view) = watch::channel(DocumentsView::default());
    let mut follower = Follower::new(config, Vec::new());
    // Who runs it reads the files as their own user.
    follower.quotes_private_files = true;
    follower.read_once(&views).await;
    view.borrow().problems.to_vec()
}

fn hash(files: &Result<Vec<Raw>, String>) -> u64 {
    let mut hash = Xxh3Default::new();
    let mut part = |bytes: &[u8]| {
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    match files {
        Err(why) => part(why.as_bytes()),
        Ok(files) => {
            for file in files {
                part(file.path.as_bytes());
                match &file.content {
                    Ok(bytes) => part(bytes),
                    Err(why) => part(why.as_bytes()),
                }
            }
        }
    }
    hash.digest()
}

/// A value of no bytes is what a write that failed leaves behind.
fn not_empty(text: Vec<u8>) -> Result<Vec<u8>, String> {
    if text.is_empty() {
        Err("it is empty: if no document is meant, say so by a comment".to_owned())
    } else {
        Ok(text)
    }
}

#[cfg(test)]
mod tests;
