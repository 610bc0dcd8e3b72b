//! Services merged from the files that name them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use vmesh_model::{Address, Endpoint, Host, Place, Problem, ServiceName};

use super::{Disk, Scan};
use crate::assemble::{ServiceContent, ServiceStatement};
use crate::format::{ParsedEndpoint, ParsedService, subject_of};

impl Disk {
    /// Keeps the endpoints of shared services from before a restart.
    ///
    /// A service that several files share is complete only once all files have been usable since the start.
    /// Before that, an unusable file may list a previous endpoint, so no previous endpoint counts as removed.
    fn keep_restored_parts(&mut self, scan: &mut Scan) {
        let never_used =
            self.files.values().find_map(|state| state.unusable.first().or(state.left_out.first()));
        let Some(because) = never_used.or(scan.statement.unusable.first()) else {
            if scan.again.is_none() {
                self.restored_parts.clear();
            }
            return;
        };
        self.restored_parts.retain(|name, known| {
            let Some(statement) = scan.statement.services.get_mut(name) else { return false };
            let ServiceContent::Parsed(service) = &statement.content else { return true };
            let is_there = |known: &Endpoint| {
                service.endpoints.iter().any(|endpoint| comes_from(&endpoint.address, known))
            };
            let is_missing = service.is_shared && !known.endpoints.iter().all(is_there);
            if is_missing && statement.partial_because.is_none() {
                statement.partial_because = Some(because.clone());
            }
            is_missing
        });
    }

    /// Merges all files. If two files name one service, the file that counted before counts, or else the
    /// first in path order.
    pub(in crate::file) fn merge(&mut self, scan: &mut Scan) {
        let mut claims: BTreeMap<&ServiceName, Vec<(&PathBuf, &ServiceStatement)>> = BTreeMap::new();
        for (path, state) in &self.files {
            for (name, statement) in &state.services {
                claims.entry(name).or_default().push((path, statement));
            }
        }
        let mut merged = MergedServices::default();
        for (name, claims) in &claims {
            let statements: Vec<&ServiceStatement> = claims.iter().map(|(_, statement)| *statement).collect();
            merged.add(name, &statements, self.incumbents.get(*name), self.joined.get(*name));
        }
        let paths = |claims: Vec<(&PathBuf, &ServiceStatement)>| {
            claims.into_iter().map(|(path, _)| path.clone()).collect()
        };
        self.claims = claims.into_iter().map(|(name, claims)| (name.clone(), paths(claims))).collect();
        self.changed.clear();
        let MergedServices { services, incumbents, joined, conflicts } = merged;
        scan.statement.services = services;
        self.incumbents = incumbents;
        self.joined = joined;
        self.conflicts = conflicts;
        self.add_general_parts(scan);
    }

    /// Merges the services whose files changed.
    pub(super) fn merge_changed(&mut self, scan: &mut Scan) {
        let changed = std::mem::take(&mut self.changed);
        let mut merged = MergedServices::default();
        for name in &changed {
            let files = self.claims.get(name).into_iter().flatten();
            let statements: Vec<&ServiceStatement> =
                files.filter_map(|path| self.files.get(path)?.services.get(name)).collect();
            merged.add(name, &statements, self.incumbents.get(name), self.joined.get(name));
            self.incumbents.remove(name);
            self.joined.remove(name);
            self.conflicts.remove(name);
        }
        let MergedServices { services, incumbents, joined, conflicts } = merged;
        scan.statement.services = services;
        self.incumbents.extend(incumbents);
        self.joined.extend(joined);
        self.conflicts.extend(conflicts);
        scan.only = Some(changed);
        self.add_general_parts(scan);
    }

    /// Adds the parts of the statement that do not belong to one service.
    fn add_general_parts(&mut self, scan: &mut Scan) {
        let statement = &mut scan.statement;
        for state in self.files.values() {
            statement.problems.extend(state.problems.iter().cloned());
            statement.unusable.extend(state.unusable.iter().cloned());
            statement.left_out.extend(state.left_out.iter().cloned());
            statement
                .emptied
                .extend(state.emptied.iter().filter(|name| !self.claims.contains_key(*name)).cloned());
        }
        statement.problems.extend(self.conflicts.values().flatten().cloned());
        statement.problems.sort();
        statement.problems.dedup();
        self.keep_restored_parts(scan);
    }
}

/// Services merged from the files that name them.
#[derive(Default)]
struct MergedServices {
    services: BTreeMap<ServiceName, ServiceStatement>,
    incumbents: BTreeMap<ServiceName, Arc<str>>,
    joined: BTreeMap<ServiceName, Arc<ParsedService>>,
    conflicts: BTreeMap<ServiceName, Vec<Problem>>,
}

impl MergedServices {
    /// Adds a service from the statements of the files that name it, in path order. `incumbent` is the file
    /// that counted before; `joined` is the previous result for a shared service.
    fn add(
        &mut self,
        name: &ServiceName,
        claims: &[&ServiceStatement],
        incumbent: Option<&Arc<str>>,
        joined: Option<&Arc<ParsedService>>,
    ) {
        if claims.len() > 1
            && let Some(statement) = join_shared(name, claims, joined)
        {
            if let ServiceContent::Parsed(service) = &statement.content {
                self.joined.insert(name.clone(), service.clone());
            }
            self.incumbents.insert(name.clone(), place_of(&statement).file);
            self.services.insert(name.clone(), statement);
            return;
        }
        let stayed = claims.iter().find(|statement| Some(&place_of(statement).file) == incumbent);
        let Some(counts) = stayed.or(claims.first()) else { return };
        let why = match stayed.is_some() {
            true => "because it was in force before",
            false => "because it is the first in path order",
        };
        for other in claims.iter().filter(|other| !std::ptr::eq(**other, *counts)) {
            let message = format!("`{name}` is also in {}, which is used {why}", place_of(counts));
            let problem = Problem::new(place_of(other), subject_of(name), message);
            self.conflicts.entry(name.clone()).or_default().push(problem);
        }
        self.incumbents.insert(name.clone(), place_of(counts).file);
        self.services.insert(name.clone(), ServiceStatement::clone(counts));
    }
}

/// Reports whether both are equal by pointer.
pub(super) fn is_same(before: &ServiceStatement, now: &ServiceStatement) -> bool {
    let is_known = match (&before.content, &now.content) {
        (ServiceContent::Parsed(before), ServiceContent::Parsed(now)) => Arc::ptr_eq(before, now),
        (ServiceContent::Restored(before), ServiceContent::Restored(now)) => Arc::ptr_eq(before, now),
        _ => false,
    };
    is_known && before.stale_because == now.stale_because && before.partial_because == now.partial_because
}

/// Joins a service that several files share, as Prometheus does with a job. Returns `None` if the files do
/// not share it on purpose. A result equal to `before` keeps its pointer.
fn join_shared(
    name: &ServiceName,
    claims: &[&ServiceStatement],
    before: Option<&Arc<ParsedService>>,
) -> Option<ServiceStatement> {
    let parts: Vec<&Arc<ParsedService>> = claims
        .iter()
        .map(|statement| match &statement.content {
            ServiceContent::Parsed(service) if service.is_shared => Some(service),
            ServiceContent::Parsed(_) | ServiceContent::Restored(_) => None,
        })
        .collect::<Option<_>>()?;
    let mut whole = ParsedService::clone(parts.first()?);
    let mut endpoints: BTreeMap<&Address, &ParsedEndpoint> = BTreeMap::new();
    for endpoint in parts.iter().flat_map(|part| &part.endpoints) {
        endpoints.entry(&endpoint.address).or_insert(endpoint);
    }
    whole.name = name.clone();
    whole.endpoints = endpoints.into_values().cloned().collect();
    whole.protocol = parts.iter().find_map(|part| part.protocol);
    // A file that is unreadable now contributes its last good part, so the service may be incomplete.
    let stale = claims.iter().find_map(|statement| statement.stale_because.clone());
    whole.partial_because = parts.iter().find_map(|part| part.partial_because.clone()).or(stale);
    let whole = match before {
        Some(before) if **before == whole => before.clone(),
        _ => Arc::new(whole),
    };
    Some(ServiceStatement::fresh(whole))
}

/// Reports whether the endpoint `known` may come from a record with `address`.
fn comes_from(address: &Address, known: &Endpoint) -> bool {
    address.port.get() == known.address.port()
        && match &address.host {
            Host::Ip(ip) => *ip == known.address.ip(),
            Host::Name(name) => known.hostname.as_ref() == Some(name),
        }
}

fn place_of(statement: &ServiceStatement) -> Place {
    match &statement.content {
        ServiceContent::Parsed(service) => service.place.clone(),
        ServiceContent::Restored(registration) => registration.place.clone(),
    }
}
