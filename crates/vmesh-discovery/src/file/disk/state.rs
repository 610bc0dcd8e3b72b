//! The state of each file, and how new content changes it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use vmesh_model::{Problem, ServiceName};

use super::Disk;
use super::merge::is_same;
use super::walk::FileStat;
use crate::assemble::{ServiceContent, ServiceStatement};
use crate::format::{FileFailure, Format, ParseResult, subject_of};

/// The state of one file.
#[derive(Debug, Default)]
pub(super) struct FileState {
    /// The metadata when the file was last read.
    pub(super) stat: Option<FileStat>,
    /// The hash of the bytes that were parsed last; `None` if they could not be read.
    pub(super) hash: Option<u64>,
    /// The content of the file may be quoted in problems.
    pub(super) is_shown: bool,
    /// The detected format.
    pub(super) format: Option<Format>,
    pub(super) services: BTreeMap<ServiceName, ServiceStatement>,
    pub(super) problems: Vec<Problem>,
    /// The services that the file named before it stated that there are none.
    pub(super) emptied: BTreeSet<ServiceName>,
    /// Unreadable parts of the file without a last good state, each with the reason.
    pub(super) unusable: Vec<Arc<str>>,
    /// Records of the file that are left out and have no last good state, each with the reason.
    pub(super) left_out: Vec<Arc<str>>,
    /// The time at which the file was first found missing.
    pub(super) missing_since: Option<Instant>,
}

impl FileState {
    /// Replaces the services of the file, which were `before`, by those of `parsed`.
    fn replace_services(
        &mut self,
        parsed: &mut ParseResult,
        mut before: BTreeMap<ServiceName, ServiceStatement>,
    ) {
        if parsed.has_failed() {
            let because = reason(parsed, None);
            before.values_mut().for_each(|statement| statement.stale_because = Some(because.clone()));
            self.services = before;
            return;
        }
        if parsed.says_nothing {
            self.emptied.extend(before.keys().cloned());
        } else {
            self.emptied.clear();
        }
        for name in &parsed.unreadable {
            if let Some((name, mut statement)) = before.remove_entry(name) {
                statement.stale_because = Some(reason(parsed, Some(&name)));
                self.services.insert(name, statement);
            }
        }
        for service in std::mem::take(&mut parsed.services) {
            // An unchanged service keeps its pointer, by which later stages see that nothing changed.
            let known = match before.remove(&service.name) {
                Some(ServiceStatement { content: ServiceContent::Parsed(same), .. }) if *same == service => {
                    same
                }
                _ => Arc::new(service),
            };
            self.services.insert(known.name.clone(), ServiceStatement::fresh(known));
        }
        if parsed.has_unnamed {
            // A service that is no longer named may be one of the records without a readable name.
            let because = reason(parsed, None);
            for (name, mut statement) in before {
                statement.stale_because = Some(because.clone());
                self.services.insert(name, statement);
            }
        }
    }

    /// Records the parts of `parsed` that are not in force because they have no last good state.
    fn record_unusable(&mut self, parsed: &ParseResult) {
        let mut left_out: BTreeSet<Arc<str>> = BTreeSet::new();
        self.unusable.clear();
        match parsed.failure {
            Some(_) if !self.services.is_empty() => {}
            // A file with such a name never had a service.
            Some(FileFailure::MisnamedFile) => {}
            Some(FileFailure::NotRead) => self.unusable.push(reason(parsed, None)),
            Some(FileFailure::Misnamed) => _ = left_out.insert(reason(parsed, None)),
            None if parsed.has_unnamed => _ = left_out.insert(reason(parsed, None)),
            None => {}
        }
        let is_unknown = |name: &&ServiceName| !self.services.contains_key(*name);
        let unknown = parsed.unreadable.iter().filter(is_unknown);
        left_out.extend(unknown.map(|name| reason(parsed, Some(name))));
        self.left_out = left_out.into_iter().collect();
    }

    /// Returns `problem` of `parsed` with what is in force instead.
    fn with_outcome(&self, parsed: &ParseResult, problem: Problem) -> Problem {
        let unreadable = parsed.unreadable.iter().find(|name| subject_of(name) == problem.subject);
        let outcome = match (parsed.has_failed(), unreadable) {
            (true, _) if self.services.is_empty() => "nothing of this file is in force",
            (true, _) => "the last good content of this file stays in force",
            (false, Some(name)) if self.services.contains_key(name) => {
                "the last good state of this service stays in force"
            }
            (false, Some(_)) => "this service is not in force",
            (false, None) => return problem,
        };
        problem.with_outcome(outcome)
    }
}

/// Returns the first problem of `parsed` about this service, or else the first problem.
fn reason(parsed: &ParseResult, about: Option<&ServiceName>) -> Arc<str> {
    let subject = about.map(subject_of);
    let is_about = |problem: &&Problem| subject.as_ref().is_none_or(|subject| problem.subject == *subject);
    let first = parsed.problems.iter().find(is_about).or(parsed.problems.first());
    first.map_or_else(|| "it cannot be read".into(), |problem| problem.to_string().into())
}

impl Disk {
    /// Applies the parsed content of a file to its state.
    pub(super) fn update_file(&mut self, path: &Path, file: &Arc<str>, mut parsed: ParseResult) {
        let state = self.files.entry(path.to_owned()).or_default();
        let mut before = std::mem::take(&mut state.services);
        let previous = before.clone();
        // Before a file is first read, its last good services are those from before the restart.
        for (name, registration) in self.restored.extract_if(.., |_, known| known.place.file == *file) {
            let statement = ServiceStatement {
                content: ServiceContent::Restored(registration),
                stale_because: None,
                partial_because: None,
            };
            before.entry(name).or_insert(statement);
        }
        state.replace_services(&mut parsed, before);
        state.record_unusable(&parsed);
        let problems = parsed.problems.iter().map(|problem| state.with_outcome(&parsed, problem.clone()));
        state.problems = problems.collect();
        self.record_changes(path, previous);
    }

    /// Records the services of a file that differ from `previous`.
    fn record_changes(&mut self, path: &Path, mut previous: BTreeMap<ServiceName, ServiceStatement>) {
        if self.tree.is_none() {
            // The next merge covers every service anyway.
            return;
        }
        let Some(state) = self.files.get(path) else { return };
        for (name, statement) in &state.services {
            match previous.remove(name) {
                Some(before) if is_same(&before, statement) => {}
                Some(_) => _ = self.changed.insert(name.clone()),
                None => {
                    let claims = self.claims.entry(name.clone()).or_default();
                    if let Err(at) = claims.binary_search_by(|claim| claim.as_path().cmp(path)) {
                        claims.insert(at, path.to_owned());
                    }
                    self.changed.insert(name.clone());
                }
            }
        }
        self.record_removed(path, previous.into_keys());
    }

    /// Records that a file no longer names these services.
    pub(super) fn record_removed(&mut self, path: &Path, services: impl IntoIterator<Item = ServiceName>) {
        for name in services {
            if let Some(claims) = self.claims.get_mut(&name) {
                claims.retain(|claim| claim != path);
                if claims.is_empty() {
                    self.claims.remove(&name);
                }
            }
            self.changed.insert(name);
        }
    }
}
