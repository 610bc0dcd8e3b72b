//! Strict loading of configuration files and of mesh documents.
//!
//! [`strict`] is for a file that is either valid or rejected (`control.yaml`, `agent.yaml`). [`Library`] is
//! for documents that are edited while the mesh runs: a bad document affects only itself, and if an earlier
//! version was good, that version stays in force.

mod keys;

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use self::keys::{KeySets, is_key_set};
use crate::check::{self, DocumentChecker, Reference};
use crate::document::{
    AccessDocument, Documents, MeshDocument, NodeDocument, PlacedDocument, RouteDocument, ServiceDocument,
    selector,
};
use crate::strict::{did_you_mean, one_of, read};
use crate::yaml::{self, MAX_TEXT};
use crate::{Labels, Place, Problem, ServiceName};

/// Parses one value of YAML or JSON, or returns all problems of the text.
pub fn strict<T: DeserializeOwned>(file: &str, text: &str) -> Result<T, Vec<Problem>> {
    strict_bytes(file, text.as_bytes())
}

/// Parses bytes like [`strict`], after decoding them as UTF-8.
pub fn strict_bytes<T: DeserializeOwned>(file: &str, bytes: &[u8]) -> Result<T, Vec<Problem>> {
    let file: Arc<str> = file.into();
    let text = yaml::decode_text(&file, &file, bytes, MAX_TEXT).map_err(|problem| vec![problem])?;
    let mut documents = yaml::parse(&file, &file, text).into_iter();
    let (root, mut problems) = match documents.next() {
        // A text of only comments is an empty mapping, in which every field has its default.
        None => (Some(Arc::new(yaml::Node::empty_mapping())), Vec::new()),
        Some(first) => (first.root, first.problems),
    };
    for more in documents {
        problems.extend(more.problems);
        if let Some(root) = more.root {
            let message = "a second document (after `---`): one is read here";
            problems.push(Problem::new(root.place(&file), file.clone(), message));
        }
    }
    let value = match root {
        None => None,
        Some(root) => read(&file, &file, &root, None).map_err(|more| problems.extend(more)).ok(),
    };
    match value {
        Some(value) if problems.is_empty() => Ok(value),
        _ => {
            problems.sort();
            Err(problems)
        }
    }
}

/// A file of documents, read by the caller.
#[derive(Debug, Clone, Copy)]
pub struct DocumentFile<'a> {
    pub path: &'a str,
    /// The file's bytes, or the message of the error that prevented reading them.
    pub content: Result<&'a [u8], &'a str>,
}

/// A good version of a document, in the form saved for a restart: [`Library::last_good`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDocument {
    pub file: Arc<str>,
    pub line: u32,
    pub column: u32,
    /// The text of this document only.
    pub text: Arc<str>,
}

/// The documents of all files, each in its last good version. The owner calls [`Library::update`] with all
/// files after each change of any.
#[derive(Debug, Default)]
pub struct Library {
    files: BTreeMap<Arc<str>, FileContents>,
    good: BTreeMap<DocumentId, Arc<DocumentVersion>>,
    key_sets: KeySets,
    current: Arc<Documents>,
}

/// The content of a file as last read.
#[derive(Debug, Default)]
struct FileContents {
    /// `None` if the file could not be read.
    bytes: Option<Box<[u8]>>,
    documents: Vec<DocumentCandidate>,
    /// Problems in text that cannot be attributed to a document. While the list is not
    /// empty, all documents last read from the file stay in force.
    unidentified: Vec<Problem>,
    /// Problems of documents whose kind only a later version supports.
    unsupported: Vec<Problem>,
}

/// A document as its file contains it now.
#[derive(Debug)]
struct DocumentCandidate {
    id: DocumentId,
    place: Place,
    /// The version, or its problems.
    version: Result<Arc<DocumentVersion>, Vec<Problem>>,
}

#[derive(Debug)]
struct DocumentVersion {
    kept: SavedDocument,
    parsed: ParsedDocument,
    references: Vec<Reference>,
}

#[derive(Debug, Clone)]
enum ParsedDocument {
    Mesh(Arc<PlacedDocument<MeshDocument>>),
    Service(Arc<PlacedDocument<ServiceDocument>>),
    Route(Arc<PlacedDocument<RouteDocument>>),
    Node(Arc<PlacedDocument<NodeDocument>>),
    Access(Arc<PlacedDocument<AccessDocument>>),
}

/// The id of a document across versions and files.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct DocumentId {
    kind: DocumentKind,
    name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum DocumentKind {
    Mesh,
    Service,
    Route,
    Node,
    Access,
}

impl DocumentKind {
    const ALL: [DocumentKind; 5] = [
        DocumentKind::Mesh,
        DocumentKind::Service,
        DocumentKind::Route,
        DocumentKind::Node,
        DocumentKind::Access,
    ];
    /// The kinds of documents that are designed but not implemented. Their message differs from that of an
    /// unknown kind.
    const UNSUPPORTED: [&str; 2] = ["Gateway", "External"];

    fn as_str(self) -> &'static str {
        match self {
            DocumentKind::Mesh => "Mesh",
            DocumentKind::Service => "Service",
            DocumentKind::Route => "Route",
            DocumentKind::Node => "Node",
            DocumentKind::Access => "Access",
        }
    }

    fn parse(text: &str) -> Result<DocumentKind, String> {
        if let Some(kind) = DocumentKind::ALL.into_iter().find(|kind| kind.as_str() == text) {
            return Ok(kind);
        }
        let shown = yaml::short(text);
        if DocumentKind::UNSUPPORTED.contains(&text) {
            return Err(format!("`{shown}` documents are not supported by this version"));
        }
        let known = || DocumentKind::ALL.into_iter().map(DocumentKind::as_str);
        Err(match did_you_mean(text, known()) {
            Some(meant) => format!("unknown kind `{shown}`, did you mean `{meant}`?"),
            None => format!("unknown kind `{shown}`: expected {}", one_of(known())),
        })
    }
}

impl fmt::Display for DocumentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            DocumentKind::Mesh => f.write_str("Mesh"),
            kind => write!(f, "{} `{}`", kind.as_str(), self.name),
        }
    }
}

impl Library {
    /// Restores the versions that were in force before a restart. Versions that this release cannot read are
    /// left out.
    pub fn restored(kept: impl IntoIterator<Item = SavedDocument>) -> Library {
        let mut library = Library::default();
        for kept in kept {
            if is_key_set(&kept.file) {
                library.key_sets.restore(&kept);
                continue;
            }
            // The text is placed at its line and indentation in the file, so that problems name the same
            // place.
            let indent = usize::try_from(kept.column.saturating_sub(1)).unwrap_or_default().min(MAX_TEXT);
            // `repeat`, because a width in a format string panics above 65,535.
            let text = " ".repeat(indent) + &kept.text;
            let contents = FileContents::parse(&kept.file, text.as_bytes(), kept.line);
            for candidate in contents.documents {
                if let Ok(version) = candidate.version {
                    library.good.insert(candidate.id, version);
                }
            }
        }
        let mut chosen = library.good.clone();
        settle_references(&mut chosen, &library.good);
        library.current = Arc::new(assemble(&chosen, &library.key_sets));
        library.good = chosen;
        library
    }

    /// Returns the good versions, to be saved.
    pub fn last_good(&self) -> Vec<SavedDocument> {
        self.good.values().map(|version| version.kept.clone()).chain(self.key_sets.saved()).collect()
    }

    /// Returns the documents in force: the last result of [`Library::update`], or the restored ones.
    pub fn documents(&self) -> Arc<Documents> {
        self.current.clone()
    }

    /// Updates the library to the current content of all files. Returns the documents in force, and all problems. Documents that did
    /// not change keep their pointer. A file that is missing in `files` was deleted, and its documents with
    /// it.
    pub fn update(&mut self, files: &[DocumentFile<'_>]) -> (Arc<Documents>, Vec<Problem>) {
        let mut problems = self.key_sets.update(files);
        self.read(files);
        let (claimed, duplicates) = self.settle_claims();
        problems.extend(duplicates);
        let mut chosen: BTreeMap<DocumentId, Arc<DocumentVersion>> = BTreeMap::new();
        for (id, candidate) in &claimed {
            if let Some(version) = candidate.version.as_ref().ok().or(self.good.get(*id)) {
                chosen.insert((*id).clone(), version.clone());
            }
        }
        let mut held: BTreeSet<&Arc<str>> = BTreeSet::new();
        for (id, version) in &self.good {
            let file = &version.kept.file;
            let obscure = self.files.get(file).is_some_and(|contents| !contents.unidentified.is_empty());
            if obscure && !claimed.contains_key(id) {
                held.insert(file);
                chosen.insert(id.clone(), version.clone());
            }
        }

        let broken = settle_references(&mut chosen, &self.good);

        // The consequence of each problem is known only after all references are settled.
        let outcome = |id: &DocumentId| match chosen.contains_key(id) {
            true => "its last good version stays in force",
            false => NOT_IN_FORCE,
        };
        for (id, candidate) in &claimed {
            let wrong = candidate.version.as_ref().err().into_iter().flatten();
            problems.extend(wrong.map(|problem| problem.clone().with_outcome(outcome(id))));
        }
        for (id, place, message) in broken {
            let problem = Problem::new(place, id.to_string(), message);
            problems.push(problem.with_outcome(outcome(&id)));
        }
        for (file, contents) in &self.files {
            problems.extend(contents.unsupported.iter().cloned());
            let outcome = match held.contains(file) {
                true => "the last good content of this file stays in force",
                false => NOT_IN_FORCE,
            };
            let wrong = contents.unidentified.iter();
            problems.extend(wrong.map(|problem| problem.clone().with_outcome(outcome)));
        }
        problems.sort();
        problems.dedup();

        let still_claimed: BTreeSet<DocumentId> = claimed.into_keys().cloned().collect();
        self.good.retain(|id, _| still_claimed.contains(id));
        self.good.extend(chosen.iter().map(|(id, version)| (id.clone(), version.clone())));
        let documents = assemble(&chosen, &self.key_sets);
        if documents != *self.current {
            self.current = Arc::new(documents);
        }
        (self.current.clone(), problems)
    }

    /// Returns the document that counts for each id, and a problem for every other document of the same id.
    fn settle_claims(&self) -> (BTreeMap<&DocumentId, &DocumentCandidate>, Vec<Problem>) {
        let mut problems = Vec::new();
        let mut claims: BTreeMap<&DocumentId, Vec<&DocumentCandidate>> = BTreeMap::new();
        for candidate in self.files.values().flat_map(|contents| &contents.documents) {
            claims.entry(&candidate.id).or_default().push(candidate);
        }
        let mut claimed: BTreeMap<&DocumentId, &DocumentCandidate> = BTreeMap::new();
        for (id, candidates) in claims {
            // A later document must not replace one of the same name that is in force.
            let incumbent = self.good.get(id).map(|version| &version.kept.file);
            let stayed = candidates.iter().find(|candidate| Some(&candidate.place.file) == incumbent);
            let Some(counts) = stayed.or(candidates.first()) else { continue };
            for other in candidates.iter().filter(|other| !std::ptr::eq(**other, *counts)) {
                let message = format!("a second {id}: the one at {} counts", counts.place);
                problems.push(Problem::new(other.place.clone(), id.to_string(), message));
            }
            claimed.insert(id, counts);
        }
        (claimed, problems)
    }

    /// Parses the files that changed.
    fn read(&mut self, files: &[DocumentFile<'_>]) {
        let mut before = std::mem::take(&mut self.files);
        for file in files.iter().filter(|file| !is_key_set(file.path)) {
            let path: Arc<str> = file.path.into();
            let contents = match (file.content, before.remove(&path)) {
                (Ok(bytes), Some(same)) if same.bytes.as_deref() == Some(bytes) => same,
                (Ok(bytes), _) => FileContents::parse(&path, bytes, 1),
                (Err(why), _) => FileContents {
                    unidentified: vec![Problem::new(Place::file(path.clone()), path.clone(), why)],
                    ..FileContents::default()
                },
            };
            self.files.insert(path, contents);
        }
        // A document that parses to an equal value keeps its pointer, because later stages compare pointers.
        let good = &self.good;
        for candidate in self.files.values_mut().flat_map(|contents| &mut contents.documents) {
            if let (Ok(version), Some(known)) = (&mut candidate.version, good.get(&candidate.id))
                && !Arc::ptr_eq(version, known)
                && known.parsed == version.parsed
            {
                *version = Arc::new(DocumentVersion {
                    kept: version.kept.clone(),
                    parsed: known.parsed.clone(),
                    references: version.references.clone(),
                });
            }
        }
    }
}

/// The end of a problem's message if no version of its document is in force.
pub const NOT_IN_FORCE: &str = "it is not in force";

impl PartialEq for ParsedDocument {
    fn eq(&self, other: &ParsedDocument) -> bool {
        match (self, other) {
            (ParsedDocument::Mesh(a), ParsedDocument::Mesh(b)) => a == b,
            (ParsedDocument::Service(a), ParsedDocument::Service(b)) => a == b,
            (ParsedDocument::Route(a), ParsedDocument::Route(b)) => a == b,
            (ParsedDocument::Node(a), ParsedDocument::Node(b)) => a == b,
            (ParsedDocument::Access(a), ParsedDocument::Access(b)) => a == b,
            _ => false,
        }
    }
}

/// Replaces those of `chosen` whose references are broken by their `good` version, or removes them if there
/// is no other version. Returns the broken references.
///
/// Changed documents are replaced before unchanged ones, so that a new redirect that closes a cycle does not
/// break the routes that were there before.
fn settle_references(
    chosen: &mut BTreeMap<DocumentId, Arc<DocumentVersion>>,
    good: &BTreeMap<DocumentId, Arc<DocumentVersion>>,
) -> Vec<(DocumentId, Place, String)> {
    let mut problems = Vec::new();
    let mut touched: BTreeSet<DocumentId> = BTreeSet::new();
    // Each round replaces or removes a version, and each document has at most two versions.
    loop {
        let mut broken = broken_references(chosen);
        if broken.is_empty() {
            return problems;
        }
        let is_new = |id: &DocumentId| match (chosen.get(id), good.get(id)) {
            (Some(now), Some(before)) => !Arc::ptr_eq(now, before),
            _ => true,
        };
        if broken.iter().any(|(id, ..)| is_new(id)) {
            broken.retain(|(id, ..)| is_new(id));
        }
        let ids: BTreeSet<DocumentId> = broken.iter().map(|(id, ..)| id.clone()).collect();
        // Only problems of the file's current text are reported: the places of an earlier version are
        // outdated.
        problems.extend(broken.into_iter().filter(|(id, ..)| !touched.contains(id)));
        for id in ids {
            match good.get(&id) {
                Some(before) if touched.insert(id.clone()) => chosen.insert(id, before.clone()),
                _ => chosen.remove(&id),
            };
        }
    }
}

/// Returns the broken references.
fn broken_references(
    chosen: &BTreeMap<DocumentId, Arc<DocumentVersion>>,
) -> Vec<(DocumentId, Place, String)> {
    let mut services: BTreeMap<&ServiceName, &ServiceDocument> = BTreeMap::new();
    let mut routes: BTreeMap<&ServiceName, &[Reference]> = BTreeMap::new();
    for version in chosen.values() {
        match &version.parsed {
            ParsedDocument::Service(service) => {
                services.insert(&service.name, service);
            }
            ParsedDocument::Route(route) => {
                routes.insert(&route.service, &version.references);
            }
            ParsedDocument::Mesh(_) | ParsedDocument::Node(_) | ParsedDocument::Access(_) => {}
        }
    }
    let mut broken = Vec::new();
    let id = |service: &ServiceName| DocumentId { kind: DocumentKind::Route, name: service.to_string() };
    for (route, references) in &routes {
        for reference in *references {
            if let Some(message) = check::missing_subset(reference, &services) {
                broken.push((id(route), reference.place.clone(), message));
            }
        }
    }
    for (route, place, message) in check::redirect_cycles(&routes) {
        broken.push((id(route), place, message));
    }
    broken
}

fn assemble(chosen: &BTreeMap<DocumentId, Arc<DocumentVersion>>, key_sets: &KeySets) -> Documents {
    let mut documents = Documents { key_sets: key_sets.by_name(), ..Documents::default() };
    for version in chosen.values() {
        match &version.parsed {
            ParsedDocument::Mesh(mesh) => documents.mesh = Some(mesh.clone()),
            ParsedDocument::Service(service) => {
                documents.services.insert(service.name.clone(), service.clone());
            }
            ParsedDocument::Route(route) => {
                documents.routes.insert(route.service.clone(), route.clone());
            }
            ParsedDocument::Node(node) => documents.nodes.push(node.clone()),
            ParsedDocument::Access(access) => {
                documents.access.entry(access.service.clone()).or_default().push(access.clone());
            }
        }
    }
    documents.nodes.sort_by(|a, b| compare_precedence(a, b));
    documents
}

/// Orders documents by precedence: the more precise the selector, the higher. Equal ones are ordered by their
/// text, the same way on every replica.
fn compare_precedence(a: &NodeDocument, b: &NodeDocument) -> Ordering {
    let key = |node: &NodeDocument| (node.name.is_some(), node.labels.len());
    key(a).cmp(&key(b)).then_with(|| a.selector().cmp(&b.selector()))
}

impl FileContents {
    /// Parses the documents of a text that begins in line `first_line` of its file.
    fn parse(file: &Arc<str>, bytes: &[u8], first_line: u32) -> FileContents {
        let mut contents = FileContents { bytes: Some(bytes.into()), ..FileContents::default() };
        let text = match yaml::decode_text(file, file, bytes, MAX_TEXT) {
            Ok(text) => text,
            Err(problem) => {
                contents.unidentified.push(problem);
                return contents;
            }
        };
        for document in yaml::parse_from(file, file, text, first_line) {
            match document.root {
                None => contents.unidentified.extend(document.problems),
                // A JSON file contains several documents as a list.
                Some(root) if root.items().is_some() => {
                    contents.unidentified.extend(document.problems);
                    for item in root.items().unwrap_or_default() {
                        contents.document(file, text, item, Vec::new());
                    }
                }
                Some(root) => contents.document(file, text, &root, document.problems),
            }
        }
        contents
    }

    /// Parses one document: first its kind and name, then its content.
    fn document(&mut self, file: &Arc<str>, text: &str, root: &yaml::Node, problems: Vec<Problem>) {
        let mut unidentified = |place, message| {
            self.unidentified.extend(problems.iter().cloned());
            self.unidentified.push(Problem::new(place, file.clone(), message));
        };
        if root.entries().is_none() {
            let found = root.describe();
            let message = format!("expected a document, which begins with `kind: ..`, found {found}");
            return unidentified(root.place(file), message);
        }
        let Some(kind) = root.get("kind") else {
            let kinds = one_of(DocumentKind::ALL.into_iter().map(DocumentKind::as_str));
            return unidentified(root.place(file), format!("`kind` is missing: {kinds}"));
        };
        let Some(name) = kind.text() else {
            let kinds = one_of(DocumentKind::ALL.into_iter().map(DocumentKind::as_str));
            let message = format!("`kind`: expected {kinds}, found {}", kind.describe());
            return unidentified(kind.place(file), message);
        };
        let kind = match DocumentKind::parse(name) {
            Ok(kind) => kind,
            Err(message) => {
                let place = kind.place(file);
                if DocumentKind::UNSUPPORTED.contains(&name) {
                    self.unsupported.push(Problem::new(place, file.clone(), message));
                    return;
                }
                return unidentified(place, message);
            }
        };
        let id = DocumentId { kind, name: kind.name_of(root).unwrap_or_default() };
        let subject: Arc<str> = id.to_string().into();
        let source = DocumentText { file, subject: &subject, text, root };
        let version = match kind {
            DocumentKind::Mesh => source.version(problems, ParsedDocument::Mesh, check::mesh),
            DocumentKind::Service => source.version(problems, ParsedDocument::Service, check::service),
            DocumentKind::Route => source.version(problems, ParsedDocument::Route, check::route),
            DocumentKind::Node => source.version(problems, ParsedDocument::Node, check::node),
            DocumentKind::Access => source.version(problems, ParsedDocument::Access, check::access::access),
        };
        match version {
            Err(problems) if id.name.is_empty() && kind != DocumentKind::Mesh => {
                let about_file = |problem| Problem { subject: file.clone(), ..problem };
                self.unidentified.extend(problems.into_iter().map(about_file));
            }
            version => {
                let place = root.place(file);
                self.documents.push(DocumentCandidate { id, place, version: version.map(Arc::new) });
            }
        }
    }
}

impl DocumentKind {
    /// Returns the name of a document of this kind. Other mistakes in the document do not matter, so that a
    /// document with a problem is still identified.
    fn name_of(self, root: &yaml::Node) -> Option<String> {
        let text = |key: &str| root.get(key)?.text().filter(|text| !text.is_empty()).map(str::to_owned);
        match self {
            DocumentKind::Mesh => None,
            DocumentKind::Service => text("name"),
            DocumentKind::Route => text("service"),
            DocumentKind::Access => {
                let service = text("service")?;
                Some(text("name").map_or(service.clone(), |name| format!("{service}/{name}")))
            }
            DocumentKind::Node => text("name").or_else(|| {
                let labels = root.get("labels")?.entries().filter(|labels| !labels.is_empty())?;
                let label = |entry: &yaml::Entry| Some((entry.name().into(), entry.value.text()?.into()));
                let labels: Labels = labels.iter().map(label).collect::<Option<_>>()?;
                Some(selector(None, &labels))
            }),
        }
    }
}

/// The text of one identified document.
struct DocumentText<'a> {
    file: &'a Arc<str>,
    subject: &'a Arc<str>,
    /// The text of the whole file.
    text: &'a str,
    root: &'a yaml::Node,
}

impl DocumentText<'_> {
    fn version<T: DeserializeOwned>(
        &self,
        mut problems: Vec<Problem>,
        wrap: fn(Arc<PlacedDocument<T>>) -> ParsedDocument,
        check: fn(&T, &mut DocumentChecker<'_>),
    ) -> Result<DocumentVersion, Vec<Problem>> {
        let DocumentText { file, subject, text, root } = *self;
        problems.iter_mut().for_each(|problem| problem.subject = subject.clone());
        let document = match read::<T>(file, subject, root, Some("kind")) {
            Ok(document) => document,
            Err(more) => {
                problems.extend(more);
                return Err(problems);
            }
        };
        let mut checked = DocumentChecker::new(file, subject, root);
        check(&document, &mut checked);
        problems.extend(checked.problems);
        if !problems.is_empty() {
            return Err(problems);
        }
        let place = root.place(file);
        let kept = SavedDocument {
            file: file.clone(),
            line: place.line,
            column: place.column,
            text: text.get(root.bytes.0..root.bytes.1).unwrap_or_default().into(),
        };
        let parsed = wrap(Arc::new(PlacedDocument { place, document }));
        Ok(DocumentVersion { kept, parsed, references: checked.references })
    }
}

#[cfg(test)]
mod tests;
