//! The mesh documents: read from a directory, or from a registry in fleets without configuration management.
//!
//! | module | location of the documents |
//! |---|---|
//! | [`dir`] | a directory of files |
//! | [`consul`] | a prefix of Consul's key-value store |
//! | [`zookeeper`] | a subtree of ZooKeeper |
//!
//! Documents are compared by a hash of their content. A document with a problem stays in force in its last
//! good version. If the location cannot be read, the last documents stay in force.

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
use vmesh_model::load::{DocumentFile, Library, NOT_IN_FORCE, SavedDocument};
use vmesh_model::{Documents, Place, Problem};
use xxhash_rust::xxh3::Xxh3Default;

use crate::time::wait_until;
pub(crate) use consul::KvConfig;
pub(crate) use zookeeper::TreeConfig;

/// The timeout of the first read of a registry, after which the last good documents are served instead.
const FIRST_READ_TIMEOUT: Duration = Duration::from_secs(10);
/// The delay before documents are dropped if most of them vanished from a registry.
const LOSS_HOLD: Duration = Duration::from_secs(60);
/// Below this number of documents, removing most of them is not considered an accident.
const MIN_DOCUMENTS_FOR_LOSS: usize = 5;

/// The location of the documents.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum DocumentsConfig {
    /// A directory: every `.yaml`, `.yml` and `.json` file in it, in alphabetical order.
    Dir(PathBuf),
    /// The keys of Consul that begin with a prefix.
    ConsulKv(KvConfig),
    /// The nodes of ZooKeeper below a path.
    Zookeeper(TreeConfig),
}

impl DocumentsConfig {
    /// Fills in the registry's address from the first discovery source of its kind, if none is configured.
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

/// The documents in force, and the problems of the others.
#[derive(Debug, Clone, Default)]
pub(crate) struct DocumentsView {
    pub(crate) documents: Arc<Documents>,
    /// A hash of the texts in force, equal on every replica that has the same ones.
    pub(crate) hash: u64,
    pub(crate) problems: Arc<[Problem]>,
    /// The texts in force, saved for the next start.
    pub(crate) kept: Arc<[SavedDocument]>,
    /// The reason why the control plane is not ready: the documents were never read, and none were restored.
    pub(crate) waiting: Option<Arc<str>>,
}

/// The text of one document file or registry entry.
#[derive(Debug)]
struct DocumentText {
    /// The path shown in problems, and the key that identifies the text across reads:
    /// `/etc/vmesh/mesh.d/orders.yaml`.
    path: String,
    content: Result<Vec<u8>, String>,
    /// Its content may be quoted in problems and logs, which every user can read.
    is_public: bool,
}

/// The location that is read.
enum DocumentSource {
    Nothing,
    Dir(dir::DirectorySource),
    Consul(consul::ConsulSource),
    Zookeeper(zookeeper::ZookeeperSource),
}

impl DocumentSource {
    fn new(config: Option<DocumentsConfig>, known: BTreeSet<String>) -> DocumentSource {
        match config {
            None => DocumentSource::Nothing,
            Some(DocumentsConfig::Dir(path)) => DocumentSource::Dir(dir::DirectorySource::new(path)),
            Some(DocumentsConfig::ConsulKv(config)) => {
                DocumentSource::Consul(consul::ConsulSource::new(config))
            }
            Some(DocumentsConfig::Zookeeper(config)) => {
                DocumentSource::Zookeeper(zookeeper::ZookeeperSource::new(config, known))
            }
        }
    }

    /// Returns all texts when they may have changed; the first call returns at once. After an error the next
    /// call waits before it retries.
    async fn next(&mut self) -> Result<Vec<DocumentText>, String> {
        match self {
            DocumentSource::Nothing => std::future::pending().await,
            DocumentSource::Dir(dir) => dir.next().await,
            DocumentSource::Consul(keys) => keys.next().await,
            DocumentSource::Zookeeper(tree) => tree.next().await,
        }
    }

    /// Reads all texts now, with the strongest consistency of the registry.
    async fn confirm(&mut self) -> Result<Vec<DocumentText>, String> {
        match self {
            DocumentSource::Nothing => std::future::pending().await,
            DocumentSource::Dir(dir) => dir.next().await,
            DocumentSource::Consul(keys) => keys.confirm().await,
            DocumentSource::Zookeeper(tree) => tree.confirm().await,
        }
    }

    /// Reports whether the location is a registry, which can lose its content. Files are edited on purpose.
    fn is_registry(&self) -> bool {
        matches!(self, DocumentSource::Consul(_) | DocumentSource::Zookeeper(_))
    }
}

/// Reads the documents for as long as it is polled. The owner calls [`read_once`](DocumentsFollower::read_once) first,
/// and then [`follow`](DocumentsFollower::follow).
pub(crate) struct DocumentsFollower {
    /// The name of the location in messages: the directory, or `consul-kv:vmesh/`.
    place: Arc<str>,
    source: DocumentSource,
    library: Library,
    last_hash: Option<u64>,
    /// The paths of the texts in the last read that was accepted.
    paths: BTreeSet<String>,
    /// The time when the registry lost most documents.
    missing_since: Option<Instant>,
    /// The earliest time of the next read to confirm that they are missing.
    confirm_after: Option<Instant>,
    /// Problems may quote files that not every user of the host can read.
    quotes_private_files: bool,
    has_answered: bool,
}

impl DocumentsFollower {
    pub(crate) fn new(config: Option<DocumentsConfig>, kept: Vec<SavedDocument>) -> DocumentsFollower {
        // Without a configured location there are no documents, even if some were saved.
        let kept = if config.is_some() { kept } else { Vec::new() };
        let place = config.as_ref().map_or_else(String::new, DocumentsConfig::to_string);
        let paths: BTreeSet<String> = kept.iter().map(|kept| kept.file.to_string()).collect();
        let source = DocumentSource::new(config, paths.clone());
        DocumentsFollower {
            place: place.into(),
            has_answered: matches!(source, DocumentSource::Nothing) || !kept.is_empty(),
            paths,
            source,
            library: Library::restored(kept),
            last_hash: None,
            missing_since: None,
            confirm_after: None,
            quotes_private_files: false,
        }
    }

    /// Performs the initial read, so that the first published world contains the documents. If a registry does
    /// not answer in time, the restored documents are served, or nothing.
    pub(crate) async fn read_once(mut self, views: &watch::Sender<DocumentsView>) -> DocumentsFollower {
        if let DocumentSource::Nothing = self.source {
            return self;
        }
        let read = timeout(FIRST_READ_TIMEOUT, self.source.next()).await;
        let read =
            read.unwrap_or_else(|_| Err(format!("no answer within {} s", FIRST_READ_TIMEOUT.as_secs())));
        self.publish(read, views);
        self
    }

    pub(crate) async fn follow(mut self, views: watch::Sender<DocumentsView>) {
        loop {
            // A confirming read happens at most once per interval, whatever it returns.
            let confirm_at =
                self.missing_since.map(|since| (since + LOSS_HOLD).max(self.confirm_after.unwrap_or(since)));
            let read = tokio::select! {
                read = self.source.next() => read,
                () = wait_until(confirm_at) => self.confirm().await,
            };
            self.publish(read, &views);
        }
    }

    /// Reads the documents again with strong consistency, after most of them have been missing for [`LOSS_HOLD`].
    async fn confirm(&mut self) -> Result<Vec<DocumentText>, String> {
        self.confirm_after = Some(Instant::now() + LOSS_HOLD);
        match timeout(LOSS_HOLD, self.source.confirm()).await {
            Ok(Ok(files)) => {
                self.accept(&files);
                Ok(files)
            }
            not_confirmed => {
                // The documents must be missing for the whole interval again.
                self.missing_since = Some(Instant::now());
                let slow =
                    || Err(format!("no answer within {} s when they were read again", LOSS_HOLD.as_secs()));
                not_confirmed.unwrap_or_else(|_| slow())
            }
        }
    }

    /// Accepts that most documents were removed, after a confirming read.
    fn accept(&mut self, files: &[DocumentText]) {
        if !files.is_empty() {
            self.paths = files.iter().map(|file| file.path.clone()).collect();
            self.missing_since = None;
        }
    }

    fn publish(&mut self, read: Result<Vec<DocumentText>, String>, views: &watch::Sender<DocumentsView>) {
        let read = read.and_then(|files| self.check_for_loss(files, Instant::now()));
        let hash = hash(&read);
        if self.last_hash == Some(hash) {
            return;
        }
        self.last_hash = Some(hash);
        views.send_replace(self.apply(read));
    }

    /// Decides whether to accept a read in which a registry has fewer documents than before.
    fn check_for_loss(
        &mut self,
        files: Vec<DocumentText>,
        now: Instant,
    ) -> Result<Vec<DocumentText>, String> {
        if self.source.is_registry() {
            let left = files.iter().filter(|file| self.paths.contains(&file.path)).count();
            let had = self.paths.len();
            if files.is_empty() && had > 0 {
                // Only a document ends this state; no timeout does.
                self.missing_since = None;
                return Err(format!(
                    "all {had} documents are gone, which looks like an accident; to remove them on purpose, leave one \
                     that contains only a comment"
                ));
            }
            if had >= MIN_DOCUMENTS_FOR_LOSS && left * 2 < had {
                self.missing_since.get_or_insert(now);
                return Err(format!(
                    "{left} of {had} documents are left, which looks like an accident; it is accepted if it is still \
                     so after {} s",
                    LOSS_HOLD.as_secs()
                ));
            }
        }
        self.missing_since = None;
        self.paths = files.iter().map(|file| file.path.clone()).collect();
        Ok(files)
    }

    fn apply(&mut self, files: Result<Vec<DocumentText>, String>) -> DocumentsView {
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
                    // The outcome states the consequence for the document. It is our own text, so it need not
                    // be redacted.
                    true if is_lost(&problem) => redacted(problem).with_outcome(NOT_IN_FORCE),
                    true => redacted(problem),
                    false => problem,
                };
                let problems: Vec<_> = problems.into_iter().map(shown).collect();
                // The first documents that are served must be complete: a missing route would send requests
                // to the wrong endpoints. Later, a bad document affects only itself.
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
        let kept: Arc<[SavedDocument]> = self.library.last_good().into();
        let mut hash = Xxh3Default::new();
        for kept in kept.iter() {
            hash.update(&(kept.text.len() as u64).to_le_bytes());
            hash.update(kept.text.as_bytes());
        }
        let hash = if kept.is_empty() { 0 } else { hash.digest() };
        DocumentsView { documents, hash, problems: problems.into(), kept, waiting }
    }
}

/// Reports whether the problem means that no version of the document is in force.
fn is_lost(problem: &Problem) -> bool {
    // After a question mark the message begins with a capital letter.
    problem.message.to_lowercase().ends_with(NOT_IN_FORCE)
}

/// Returns the problems of the documents at `config`, for `--check`.
pub(crate) async fn check(config: Option<DocumentsConfig>) -> Vec<Problem> {
    let (views, view) = watch::channel(DocumentsView::default());
    let mut follower = DocumentsFollower::new(config, Vec::new());
    // The operator who runs `--check` reads the files as their own user, so quoting private files reveals
    // nothing.
    follower.quotes_private_files = true;
    follower.read_once(&views).await;
    view.borrow().problems.to_vec()
}

fn hash(files: &Result<Vec<DocumentText>, String>) -> u64 {
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

/// Rejects an empty value, which may be left by a failed write.
fn reject_empty(text: Vec<u8>) -> Result<Vec<u8>, String> {
    if text.is_empty() {
        Err("it is empty: if no document is meant, say so by a comment".to_owned())
    } else {
        Ok(text)
    }
}

#[cfg(test)]
mod tests;
