//! Parses the subtrees below the roots and merges them into the statement of the source. Pure: the trees are
//! arguments.
//!
//! Only changes are parsed again: a directory whose node keeps its pointer is skipped, and a service without
//! a changed directory keeps its pointer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use vmesh_model::{Place, Problem, Registration, ServiceName};
use vmesh_zookeeper::mirror::RootView;
use vmesh_zookeeper::{Node, Owner};

use super::config::RootConfig;
use crate::assemble::{ServiceContent, ServiceStatement, Statement};
use crate::format::znode::{
    DirectoryContent, FormatVotes, Member, RecordDirectory, RecordRules, ZnodeFormat, combine, decide,
    default_weight, may_be_record, read, votes,
};
use crate::format::{ParsedService, subject_of};
use crate::source::Registrations;

/// The content of all roots.
///
/// Call [`ZookeeperState::take`] for each view of the mirror, then [`ZookeeperState::unknown_root`] and
/// [`ZookeeperState::statement`].
pub(super) struct ZookeeperState {
    source: Arc<str>,
    roots: Vec<RootState>,
    /// The directories that describe each service, as the index of a root and the path below it.
    described_by: BTreeMap<Arc<str>, BTreeSet<(usize, Arc<str>)>>,
    services: BTreeMap<ServiceName, MergedService>,
    /// Invalid service names, with their problems.
    misnamed: BTreeMap<Arc<str>, Problem>,
    /// The services from before a restart, and the places where they were registered.
    restored: BTreeMap<ServiceName, Arc<Registration>>,
    restored_at: BTreeSet<Arc<str>>,
    /// The number of invalid records since it was last taken.
    bad_records: u64,
}

struct MergedService {
    parsed: Arc<ParsedService>,
    stale_because: Option<Arc<str>>,
    partial_because: Option<Arc<str>>,
    problems: Vec<Problem>,
}

struct RootState {
    config: RootConfig,
    rules: RecordRules,
    /// The configured format, or else the format of most nodes.
    format: Option<ZnodeFormat>,
    /// The number of nodes that look like each format, if none is configured.
    format_votes: FormatVotes,
    tree: Option<Arc<Node>>,
    failed: Option<Arc<str>>,
    /// The root was read successfully at least once; a missing root counts as read.
    was_read: bool,
    directories: BTreeMap<Arc<str>, DirectoryState>,
    /// Nodes that could not be read, by path, with the reason: what is below them is unknown.
    unread: BTreeMap<Arc<str>, Arc<str>>,
}

/// The parsed content of a directory.
struct DirectoryState {
    /// The name of its service if the records do not state one.
    path_name: Arc<str>,
    /// The last usable content.
    good: Option<Arc<DirectoryContent>>,
    /// The reason why the present content is unusable.
    failed: Option<Arc<str>>,
    /// Some records could not be read, as opposed to being read and left out.
    is_unread: bool,
    /// The reason why the directory may have records that could not be read.
    partial_because: Option<Arc<str>>,
    problems: Vec<Problem>,
}

impl ZookeeperState {
    pub(super) fn new(
        source: Arc<str>,
        roots: Vec<RootConfig>,
        last_good: Option<&Registrations>,
    ) -> ZookeeperState {
        let root = |config: RootConfig| RootState {
            rules: config.rules(),
            format: Some(config.format).filter(|format| *format != ZnodeFormat::Auto),
            format_votes: FormatVotes::new(),
            config,
            tree: None,
            failed: None,
            was_read: false,
            directories: BTreeMap::new(),
            unread: BTreeMap::new(),
        };
        let known = last_good.into_iter().flat_map(|last_good| &last_good.services);
        let restored: BTreeMap<_, _> =
            known.map(|(name, service_view)| (name.clone(), service_view.registration.clone())).collect();
        ZookeeperState {
            restored_at: restored.values().map(|known| known.place.file.clone()).collect(),
            restored,
            source,
            roots: roots.into_iter().map(root).collect(),
            described_by: BTreeMap::new(),
            services: BTreeMap::new(),
            misnamed: BTreeMap::new(),
            bad_records: 0,
        }
    }

    /// Returns the number of invalid records since the previous call.
    pub(super) fn take_bad_records(&mut self) -> u64 {
        std::mem::take(&mut self.bad_records)
    }

    /// Returns a root that has neither been read nor was known before a restart, with the reason.
    pub(super) fn unknown_root(&self) -> Option<(&str, &Arc<str>)> {
        let unknown = |root: &&RootState| !root.was_read && root.failed.is_some();
        let root = self.roots.iter().filter(unknown).find(|root| {
            let place = self.place(&root.config.path);
            !self.restored.values().any(|known| is_at_or_below(&known.place.file, &place))
        })?;
        Some((&root.config.path, root.failed.as_ref()?))
    }

    fn place(&self, path: &str) -> String {
        place_of(&self.source, path)
    }

    /// Takes a view of the mirror, with one entry per root in their order.
    pub(super) fn take(&mut self, root_views: &[RootView]) {
        let mut affected = BTreeSet::new();
        for (index, root_view) in root_views.iter().enumerate() {
            self.take_root(index, root_view, &mut affected);
        }
        for name in affected {
            self.merge_service(&name);
        }
        // Where a place is readable, its present content counts: otherwise a service removed long ago would
        // return with the next failure.
        let unknown = self.unknown_places();
        self.restored.retain(|_, known| reason_unknown(&unknown, known).is_some());
    }

    fn take_root(&mut self, index: usize, root_view: &RootView, affected: &mut BTreeSet<Arc<str>>) {
        let Some(root) = self.roots.get_mut(index) else { return };
        if root.failed != root_view.failed {
            root.failed.clone_from(&root_view.failed);
            let names = self.described_by.iter().filter(|(_, by)| by.iter().any(|(root, _)| *root == index));
            affected.extend(names.map(|(name, _)| name.clone()));
        }
        root.was_read |= root_view.failed.is_none() || root_view.tree.is_some();
        let before = std::mem::replace(&mut root.tree, root_view.tree.clone());
        let mut changed = Vec::new();
        let was_format = root.format;
        if root.config.format == ZnodeFormat::Auto
            && let Some(tree) = &root_view.tree
            && before.as_ref().is_none_or(|before| !Arc::ptr_eq(before, tree))
        {
            root.format_votes = count_formats(tree);
            root.format = decide(&root.format_votes, root.format).or(root.format);
        }
        if root.format == was_format && was_format.is_some() {
            differences(&mut String::new(), before.as_ref(), root_view.tree.as_ref(), &mut changed);
        } else {
            // Nodes parsed before the format was known or as another format are parsed again.
            differences(&mut String::new(), before.as_ref(), None, &mut changed);
            differences(&mut String::new(), None, root_view.tree.as_ref(), &mut changed);
        }
        for (path, node) in changed {
            self.take_directory(index, &path, node.as_deref(), affected);
        }
    }

    fn take_directory(
        &mut self,
        index: usize,
        path: &str,
        node: Option<&Node>,
        affected: &mut BTreeSet<Arc<str>>,
    ) {
        let Some(root) = self.roots.get_mut(index) else { return };
        match node.filter(|node| !node.was_read()).and_then(|node| node.unreadable.clone()) {
            Some(why) => _ = root.unread.insert(path.into(), why),
            None => _ = root.unread.remove(path),
        }
        let before = root.directories.remove(path);
        // A directory with only invalid records still counts as a directory of records if it had valid
        // records before a restart.
        let place = format!("{}{}", place_of(&self.source, &root.config.path), below(path));
        let was_one = before.is_some() || self.restored_at.contains(place.as_str());
        let named = |known: &DirectoryState| {
            let read = known.good.iter().flat_map(|read| read.services());
            read.map(|name| name.unwrap_or_else(|| known.path_name.clone())).collect::<BTreeSet<_>>()
        };
        let before_names = before.as_ref().map(named).unwrap_or_default();
        let now = node.and_then(|node| root.read_directory(&self.source, path, node, before, was_one));
        let mut now_names = BTreeSet::new();
        if let Some((now, bad)) = now {
            self.bad_records += bad;
            now_names = named(&now);
            root.directories.insert(path.into(), now);
        }
        for name in before_names.difference(&now_names) {
            if let Some(by) = self.described_by.get_mut(name) {
                by.remove(&(index, path.into()));
            }
        }
        for name in &now_names {
            self.described_by.entry(name.clone()).or_default().insert((index, path.into()));
        }
        affected.extend(before_names);
        affected.extend(now_names);
    }

    /// Merges the directories that describe a service.
    fn merge_service(&mut self, name: &Arc<str>) {
        let by = self.described_by.get(name).cloned().unwrap_or_default();
        if by.is_empty() {
            self.described_by.remove(name);
        }
        let directories: Vec<(&RootState, &Arc<str>, &DirectoryState)> = by
            .iter()
            .filter_map(|(index, path)| {
                let root = self.roots.get(*index)?;
                root.config.wants(name).then_some((root, path, root.directories.get(path)?))
            })
            .collect();
        self.misnamed.remove(name);
        let Some((first, path, _)) = directories.first() else {
            self.services.remove(&**name);
            return;
        };
        // Records that name their services may describe several services in a directory, and a service in
        // several directories.
        let path = if first.format == Some(ZnodeFormat::Dubbo) { "" } else { path };
        let place = Place::file(format!("{}{}", self.place(&first.config.path), below(path)));
        let service: ServiceName = match name.parse() {
            Ok(service) => service,
            Err(wrong) => {
                let message =
                    format!("{wrong}; this service is left out; add it to `exclude` to hide this problem");
                self.misnamed.insert(name.clone(), Problem::new(place, self.source.clone(), message));
                return;
            }
        };
        let subject = subject_of(&service);
        let reads: Vec<(&str, &DirectoryContent)> = directories
            .iter()
            .filter_map(|(_, _, known)| Some((&*known.path_name, known.good.as_deref()?)))
            .collect();
        let weight = default_weight(first.format.unwrap_or_default());
        let mut problems = Vec::new();
        let parsed = combine(&service, place, &reads, weight, &mut problems);
        let stale_because =
            directories.iter().find_map(|(root, _, known)| known.failed.as_ref().or(root.failed.as_ref()));
        let stale_because = stale_because.cloned();
        let partial_because = directories.iter().find_map(|(_, _, known)| known.partial_because.clone());
        for (_, _, known) in &directories {
            let about = known.problems.iter().cloned();
            problems.extend(about.map(|problem| Problem { subject: subject.clone(), ..problem }));
        }
        match parsed {
            None => _ = self.services.remove(&service),
            Some(parsed) => {
                let parsed = match self.services.get(&service) {
                    Some(before) if *before.parsed == parsed => before.parsed.clone(),
                    _ => Arc::new(parsed),
                };
                self.services
                    .insert(service, MergedService { parsed, stale_because, partial_because, problems });
            }
        }
    }

    /// Returns the present statement of the source.
    pub(super) fn statement(&self) -> Statement {
        let mut statement = Statement::default();
        for (name, service) in &self.services {
            let known = ServiceContent::Parsed(service.parsed.clone());
            let (stale_because, partial_because) =
                (service.stale_because.clone(), service.partial_because.clone());
            statement
                .services
                .insert(name.clone(), ServiceStatement { content: known, stale_because, partial_because });
            statement.problems.extend(service.problems.iter().cloned());
        }
        statement.problems.extend(self.misnamed.values().cloned());
        for root in &self.roots {
            let place = self.place(&root.config.path);
            let says =
                |message: String| Problem::new(Place::file(place.as_str()), self.source.clone(), message);
            if let Some(why) = &root.failed {
                statement.problems.push(says(format!("{why}; the last good state stays in force")));
                continue;
            }
            if root.tree.is_none() {
                let message = "there is no such node; vmesh reads it as soon as it is created";
                statement.problems.push(says(message.to_owned()));
            }
            if root.is_of_no_format() {
                statement.problems.push(says(NO_FORMAT.to_owned()));
            }
            statement.problems.extend(root.format_doubt().map(says));
            for (path, why) in &root.unread {
                let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
                // An unreadable node that is a record of a directory is already a problem of that directory's
                // service.
                if !root.directories.contains_key(parent) {
                    let at = Place::file(format!("{place}{}", below(path)));
                    let message =
                        format!("{why}; the last good state of the services below it stays in force");
                    statement.problems.push(Problem::new(at, self.source.clone(), message));
                }
            }
            for known in root.directories.values().filter(|known| known.missing_reason().is_some()) {
                let subject: Arc<str> = format!("service `{}`", known.path_name).into();
                let about = known.problems.iter().cloned();
                let about = about.map(|problem| Problem { subject: subject.clone(), ..problem });
                statement.problems.extend(about);
            }
        }
        let unknown = self.unknown_places();
        // A place that cannot be read and was not known before a restart.
        for (place, why, is_unread) in self.unknown_record_places() {
            let covers = |known: &Arc<Registration>| {
                is_at_or_below(&known.place.file, &place) || is_at_or_below(&place, &known.place.file)
            };
            if !self.restored.values().any(covers) {
                let list = if is_unread { &mut statement.unusable } else { &mut statement.left_out };
                list.push(format!("{place}: {why}").into());
            }
        }
        for (name, registration) in &self.restored {
            let why = reason_unknown(&unknown, registration);
            if let (false, Some(why)) = (statement.services.contains_key(name), why) {
                let known = ServiceContent::Restored(registration.clone());
                statement.services.insert(name.clone(), ServiceStatement::stale(known, why.clone()));
            }
        }
        statement
    }

    /// Returns the directories of records, and the unreadable nodes with children, of which nothing was ever
    /// usable. Each has the reason, and whether the reason is a failed read.
    fn unknown_record_places(&self) -> Vec<(String, Arc<str>, bool)> {
        let of = |root: &RootState| {
            let place = self.place(&root.config.path);
            let unread = root.unread.iter().filter(|(path, _)| {
                let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
                !root.directories.contains_key(parent)
            });
            let unread = unread.map(|(path, why)| (path, why, true));
            let unusable = root.directories.iter();
            let unusable =
                unusable.filter_map(|(path, known)| Some((path, known.missing_reason()?, known.is_unread)));
            let at = |(path, why, is_unread): (&Arc<str>, &Arc<str>, bool)| {
                (format!("{place}{}", below(path)), why.clone(), is_unread)
            };
            unread.chain(unusable).map(at).collect::<Vec<_>>()
        };
        self.roots.iter().filter(|root| root.failed.is_none()).flat_map(of).collect()
    }

    /// Returns the places of which nothing is known, with the reasons.
    fn unknown_places(&self) -> Vec<(String, Arc<str>)> {
        let mut unknown = Vec::new();
        for root in &self.roots {
            let place = self.place(&root.config.path);
            if let Some(why) = &root.failed {
                unknown.push((place, why.clone()));
                continue;
            }
            if root.is_of_no_format() {
                unknown.push((place.clone(), NO_FORMAT.into()));
            }
            let unread = root.unread.iter();
            let unusable =
                root.directories.iter().filter_map(|(path, known)| Some((path, known.missing_reason()?)));
            let below =
                |(path, why): (&Arc<str>, &Arc<str>)| (format!("{place}{}", below(path)), why.clone());
            unknown.extend(unread.chain(unusable).map(below));
        }
        unknown
    }
}

impl DirectoryState {
    /// Returns the reason if nothing of the directory was ever usable.
    fn missing_reason(&self) -> Option<&Arc<str>> {
        self.failed.as_ref().filter(|_| self.good.is_none())
    }
}

impl RootState {
    /// Returns a doubt about the detected format.
    fn format_doubt(&self) -> Option<String> {
        let format = self.format?;
        let others = self.format_votes.iter().filter(|(other, count)| **other != format && **count > 0);
        let others: Vec<_> = others.map(|(other, count)| format!("{count} like `{other}`")).collect();
        if !others.is_empty() {
            let ours = self.format_votes.get(&format).copied().unwrap_or_default();
            return Some(format!(
                "it is read as `{format}`, as {ours} of its nodes look, and those are left out that look \
                 otherwise ({}): set `format`",
                others.join(", ")
            ));
        }
        let has_offers = |known: &DirectoryState| known.good.as_ref().is_some_and(|read| read.has_offers());
        let is_silent = self.tree.as_deref().is_some_and(has_content)
            && !self.directories.values().any(|known| has_offers(known) || known.failed.is_some());
        is_silent.then(|| {
            let nodes = self.tree.as_deref().map_or(0, |tree| tree.size().saturating_sub(1));
            format!(
                "of the {nodes} nodes below it none is an instance in the format `{format}`: see `format`"
            )
        })
    }

    fn is_of_no_format(&self) -> bool {
        self.format.is_none() && self.tree.as_deref().is_some_and(has_content)
    }

    /// Parses a directory if it is one of records. Also returns the number of invalid records.
    fn read_directory(
        &self,
        source: &Arc<str>,
        path: &str,
        node: &Node,
        before: Option<DirectoryState>,
        was_one: bool,
    ) -> Option<(DirectoryState, u64)> {
        let format = self.format?;
        let (path_of_records, records) = match format {
            ZnodeFormat::Dubbo => ("/providers", &**node.children.get("providers")?),
            _ => ("", node),
        };
        if !self.config.recurse && format != ZnodeFormat::Dubbo && path.contains('/') {
            return None;
        }
        let members: Vec<Member<'_>> = records
            .children
            .iter()
            .map(|(name, node)| (member(name, node), !node.children.is_empty()))
            // Children with children of their own are directories.
            .filter(|(member, has_children)| !has_children || may_be_record(format, member))
            .map(|(member, _)| member)
            .collect();
        let is_one = was_one || members.iter().any(|member| may_be_record(format, member));
        if !is_one || members.is_empty() {
            return None;
        }
        let path_name: Arc<str> = match &before {
            Some(before) => before.path_name.clone(),
            None => self.name_of_path(path).into(),
        };
        let place = format!("{}{}{path_of_records}", place_of(source, &self.config.path), below(path));
        let read = read(format, &RecordDirectory { place: &place, members }, &self.rules);
        if read.is_empty() {
            return None;
        }
        let bad = u64::try_from(read.bad()).unwrap_or(u64::MAX);
        let known = before.and_then(|before| before.good);
        Some((directory_state(read, known, records, path_name, place), bad))
    }

    /// Returns the service name for a path below the root: `a/b` becomes `a.b`, and the root itself gives its
    /// last component.
    fn name_of_path(&self, path: &str) -> String {
        if path.is_empty() {
            return self.config.path.rsplit('/').next().unwrap_or_default().to_owned();
        }
        path.replace('/', ".")
    }
}

/// Returns the state of the directory `records` after it was parsed to `read`. `known` is its last good content.
fn directory_state(
    read: DirectoryContent,
    known: Option<Arc<DirectoryContent>>,
    records: &Node,
    path_name: Arc<str>,
    place: String,
) -> DirectoryState {
    let mut problems: Vec<Problem> = read.problems(&path_name).collect();
    // A record that cannot be read now keeps its last good content.
    let unreadable_child = || records.children.values().find_map(|node| node.unreadable.clone());
    let unreadable = records.unreadable.clone().or_else(unreadable_child);
    let is_unread = unreadable.is_some();
    let partial: Option<Arc<str>> = read.partial_reason().map(Into::into);
    match partial {
        Some(why) if read.is_unusable() => {
            let message = format!("{why}; the last good state stays in force");
            problems.push(Problem::new(Place::file(place), path_name.clone(), message));
            DirectoryState {
                path_name,
                good: known,
                failed: Some(why),
                is_unread,
                partial_because: None,
                problems,
            }
        }
        partial_because => {
            let good = match known {
                Some(known) if *known == read => known,
                _ => Arc::new(read),
            };
            DirectoryState {
                path_name,
                good: Some(good),
                failed: unreadable,
                is_unread,
                partial_because,
                problems,
            }
        }
    }
}

const NO_FORMAT: &str = "its nodes are in no format that vmesh recognises: set `format`";

/// Returns the reason if nothing is known of the place where `known` was registered.
fn reason_unknown<'a>(unknown: &'a [(String, Arc<str>)], known: &Registration) -> Option<&'a Arc<str>> {
    let at = &known.place.file;
    let is_there = |(hole, _): &&(String, Arc<str>)| is_at_or_below(at, hole) || is_at_or_below(hole, at);
    unknown.iter().find(is_there).map(|(_, why)| why)
}

fn place_of(source: &str, root: &str) -> String {
    format!("{source}{}", if root == "/" { "" } else { root })
}

fn below(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!("/{path}") }
}

fn is_at_or_below(path: &str, above: &str) -> bool {
    path.strip_prefix(above).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn member<'a>(name: &'a str, node: &'a Node) -> Member<'a> {
    Member {
        name,
        data: &node.data,
        is_ephemeral: matches!(node.stat.owner, Owner::Session(_)),
        created: node.stat.created,
        unreadable: node.unreadable.as_deref().filter(|_| !node.was_read()),
    }
}

/// Counts the nodes that look like each format. A few thousand nodes are enough.
fn count_formats(tree: &Node) -> FormatVotes {
    const ENOUGH: usize = 5000;
    fn collect<'a>(node: &'a Node, into: &mut Vec<Member<'a>>) {
        for (name, child) in &node.children {
            if into.len() >= ENOUGH {
                return;
            }
            into.push(member(name, child));
            collect(child, into);
        }
    }
    let mut members = Vec::new();
    collect(tree, &mut members);
    votes(members)
}

/// Reports whether a node below has data or belongs to a session.
fn has_content(tree: &Node) -> bool {
    tree.children
        .values()
        .any(|child| !child.data.is_empty() || child.stat.owner.is_session() || has_content(child))
}

/// Collects the nodes that differ, with their paths: every node above or below a difference, and no other.
fn differences(
    path: &mut String,
    before: Option<&Arc<Node>>,
    now: Option<&Arc<Node>>,
    into: &mut Vec<(String, Option<Arc<Node>>)>,
) {
    match (before, now) {
        (None, None) => return,
        (Some(before), Some(now)) if Arc::ptr_eq(before, now) => return,
        _ => {}
    }
    into.push((path.clone(), now.cloned()));
    let names: BTreeSet<&Arc<str>> =
        children_of(before).chain(children_of(now)).map(|(name, _)| name).collect();
    for name in names {
        let length = path.len();
        if length > 0 {
            path.push('/');
        }
        path.push_str(name);
        let of = |node: Option<&Arc<Node>>| node.and_then(|node| node.children.get(name)).cloned();
        differences(path, of(before).as_ref(), of(now).as_ref(), into);
        path.truncate(length);
    }
}

fn children_of(node: Option<&Arc<Node>>) -> impl Iterator<Item = (&Arc<str>, &Arc<Node>)> {
    node.into_iter().flat_map(|node| &node.children)
}

#[cfg(test)]
mod tests;
