//! Key sets of token issuers: files beside the documents, which `jwks_file` names.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{DocumentFile, SavedDocument};
use crate::check::access::check_key_set;
use crate::{Place, Problem};

/// The end of the name of a file that holds a key set, and no documents.
const EXTENSION: &str = ".jwks";

/// Reports whether the file holds a key set.
pub(super) fn is_key_set(path: &str) -> bool {
    path.ends_with(EXTENSION)
}

/// Returns the name by which documents refer to the file at `path`.
fn file_name(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, name)| name)
}

/// The key sets of all files, each in its last good version, by path.
#[derive(Debug, Default)]
pub(super) struct KeySets(BTreeMap<Arc<str>, Arc<str>>);

impl KeySets {
    /// Restores a key set that was saved before a restart.
    pub(super) fn restore(&mut self, saved: &SavedDocument) {
        self.0.insert(saved.file.clone(), saved.text.clone());
    }

    /// Returns the key sets in the form saved for a restart.
    pub(super) fn saved(&self) -> impl Iterator<Item = SavedDocument> {
        let saved = |(file, text): (&Arc<str>, &Arc<str>)| SavedDocument {
            file: file.clone(),
            line: 1,
            column: 1,
            text: text.clone(),
        };
        self.0.iter().map(saved)
    }

    /// Updates the key sets to the content of all files. A file with a problem keeps its last good version.
    pub(super) fn update(&mut self, files: &[DocumentFile<'_>]) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut before = std::mem::take(&mut self.0);
        for file in files.iter().filter(|file| is_key_set(file.path)) {
            let path: Arc<str> = file.path.into();
            let text = file.content.map_err(str::to_owned).and_then(|bytes| {
                let text = std::str::from_utf8(bytes).map_err(|error| format!("it is not UTF-8: {error}"))?;
                check_key_set(text).map(|()| text)
            });
            match (text, before.remove(&path)) {
                (Ok(text), _) => _ = self.0.insert(path, text.into()),
                (Err(why), known) => {
                    let outcome = match known.is_some() {
                        true => "its last good version stays in force",
                        false => super::NOT_IN_FORCE,
                    };
                    let problem = Problem::new(Place::file(path.clone()), path.clone(), why);
                    problems.push(problem.with_outcome(outcome));
                    self.0.extend(known.map(|known| (path, known)));
                }
            }
        }
        problems
    }

    /// Returns the key sets by the name of their file. Of two files with one name, the first by path counts.
    pub(super) fn by_name(&self) -> BTreeMap<Arc<str>, Arc<str>> {
        let mut by_name = BTreeMap::new();
        for (path, text) in &self.0 {
            by_name.entry(file_name(path).into()).or_insert_with(|| text.clone());
        }
        by_name
    }
}
