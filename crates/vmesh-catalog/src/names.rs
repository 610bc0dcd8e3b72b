//! The order in which service names came into use. Of two names that DNS cannot tell apart, or that want one virtual address, the
//! earlier name keeps the DNS name and the address.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use vmesh_model::strict::did_you_mean;
use vmesh_model::{Documents, Place, Problem, ServiceName};

/// Names of documents for which a similar name is looked for; looking is linear in all names.
const MAX_GUESSES: usize = 50;

/// Orders the names in use by when each was first seen. Names that were saved before a restart come before all others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    ranks: BTreeMap<ServiceName, u64>,
    next: u64,
    /// The names in use that are equal but for upper and lower case, by the lower case.
    folded: BTreeMap<String, BTreeSet<ServiceName>>,
}

impl Names {
    /// Begins with the names that were saved before a restart, the earliest first.
    pub fn restored(names: impl IntoIterator<Item = ServiceName>) -> Names {
        let mut restored = Names::default();
        for name in names {
            restored.rank(name);
        }
        restored
    }

    fn rank(&mut self, name: ServiceName) {
        let next = self.next;
        let rank = *self.ranks.entry(name).or_insert(next);
        self.next = self.next.max(rank + 1);
    }

    /// Takes note of names that are in use now. Of those that come together, a name in lower case comes first: so every replica that
    /// begins with the same names decides alike.
    pub(crate) fn add(&mut self, names: impl IntoIterator<Item = ServiceName>) {
        let mut new: Vec<_> = names.into_iter().collect();
        let has_capitals = |name: &ServiceName| name.as_str().bytes().any(|byte| byte.is_ascii_uppercase());
        new.sort_by(|a, b| (has_capitals(a), a).cmp(&(has_capitals(b), b)));
        for name in new {
            self.folded.entry(name.as_str().to_ascii_lowercase()).or_default().insert(name.clone());
            self.rank(name);
        }
    }

    pub(crate) fn remove(&mut self, name: &ServiceName) {
        self.ranks.remove(name);
        let folded = name.as_str().to_ascii_lowercase();
        if let Some(same) = self.folded.get_mut(&folded) {
            same.remove(name);
            if same.is_empty() {
                self.folded.remove(&folded);
            }
        }
    }

    /// Reports whether there is another name that DNS cannot tell from `name`.
    pub(crate) fn is_ambiguous(&self, name: &ServiceName) -> bool {
        self.folded.get(&name.as_str().to_ascii_lowercase()).is_some_and(|same| same.len() > 1)
    }

    /// Of the names that DNS cannot tell from `name`, puts the earliest that a source registers before those that only documents
    /// have: a document with a mistake in its name must not take the DNS name away from the service that it means.
    pub(crate) fn prefer_registered(
        &mut self,
        name: &ServiceName,
        is_registered: impl Fn(&ServiceName) -> bool,
    ) {
        let Some(same) = self.folded.get(&name.as_str().to_ascii_lowercase()).filter(|same| same.len() > 1)
        else {
            return;
        };
        let Some(first) = same.iter().min_by_key(|name| self.rank_of(name)).cloned() else { return };
        let registered = same.iter().filter(|name| is_registered(name)).min_by_key(|name| self.rank_of(name));
        let Some(registered) = registered.filter(|registered| **registered != first).cloned() else { return };
        if !is_registered(&first) {
            let (rank, first_rank) = (self.rank_of(&registered), self.rank_of(&first));
            self.ranks.insert(registered, first_rank);
            self.ranks.insert(first, rank);
        }
    }

    fn rank_of(&self, name: &ServiceName) -> u64 {
        self.ranks.get(name).copied().unwrap_or(u64::MAX)
    }

    /// Returns the name that has the DNS name of `name`, if it is another one.
    pub fn shadowed_by(&self, name: &ServiceName) -> Option<&ServiceName> {
        let same = self.folded.get(&name.as_str().to_ascii_lowercase()).filter(|same| same.len() > 1)?;
        same.iter().min_by_key(|name| self.rank_of(name)).filter(|first| *first != name)
    }

    /// Returns the names in use and those that were saved before a restart, the earliest first.
    pub fn in_order(&self) -> Vec<ServiceName> {
        let mut names: Vec<_> = self.ranks.iter().collect();
        names.sort_by_key(|(_, rank)| **rank);
        names.into_iter().map(|(name, _)| name.clone()).collect()
    }

    /// Sorts `names`, the first one first.
    pub fn sort<'a>(&self, names: impl IntoIterator<Item = &'a ServiceName>) -> Vec<&'a ServiceName> {
        let mut names: Vec<_> = names.into_iter().collect();
        names.sort_by_key(|name| (self.rank_of(name), *name));
        names
    }

    /// Returns a problem for each name that DNS cannot tell from an earlier one, and for each document of a service that no source
    /// names.
    pub(crate) fn problems(
        &self,
        documents: &Documents,
        place_of: impl Fn(&ServiceName) -> Option<Place>,
        is_registered: impl Fn(&ServiceName) -> bool,
        registered: &[&str],
    ) -> Vec<Problem> {
        let mut problems = Vec::new();
        for name in self.folded.values().filter(|same| same.len() > 1).flatten() {
            if let Some(first) = self.shadowed_by(name) {
                let message = format!(
                    "`{name}` and `{first}` differ in upper and lower case only, which DNS does not tell apart: `{first}` was there \
                     first and has the name and a virtual address; `{name}` is reached by upstreams, or under another name"
                );
                let place = place_of(name).unwrap_or_else(|| Place::file(""));
                problems.push(Problem::new(place, format!("service `{name}`"), message));
            }
        }
        let services = documents.services.iter().map(|(name, document)| (name, &document.place, "Service"));
        let routes = documents.routes.iter().map(|(name, document)| (name, &document.place, "Route"));
        let named =
            services.chain(routes).map(|(name, place, kind)| (name, place, format!("{kind} `{name}`")));
        let nodes = documents.nodes.iter().flat_map(|node| {
            node.upstreams.iter().map(|upstream| (&upstream.service, &node.place, "Node".to_owned()))
        });
        let unknown = named.chain(nodes).filter(|(name, ..)| !is_registered(name));
        for (name, place, subject) in unknown.take(MAX_GUESSES) {
            let same = self.folded.get(&name.as_str().to_ascii_lowercase());
            let same = same.into_iter().flatten().find(|other| is_registered(other));
            let message = match (same, did_you_mean(name.as_str(), registered.iter().copied())) {
                (Some(same), _) => format!(
                    "no source names `{name}`, and `{same}` is there: names are told apart by upper and lower case, and Consul's \
                     are in lower case. Did you mean `{same}`?"
                ),
                (None, Some(meant)) => format!("no source names `{name}`: did you mean `{meant}`?"),
                (None, None) => continue,
            };
            problems.push(Problem::new(place.clone(), subject, message));
        }
        problems
    }
}

/// Shares one order of names between all worlds that have it.
pub type SharedNames = Arc<Names>;

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ServiceName {
        text.parse().unwrap()
    }

    #[test]
    fn who_was_there_first_keeps_a_name_also_over_a_restart_and_lower_case_comes_first_of_two_at_once() {
        let mut names = Names::default();
        names.add([name("Orders"), name("orders"), name("Pay")]);
        assert_eq!(names.shadowed_by(&name("Orders")), Some(&name("orders")));
        names.add([name("pay")]);
        assert_eq!(names.shadowed_by(&name("pay")), Some(&name("Pay")));
        assert_eq!(names.shadowed_by(&name("Pay")), None);
        let mut restored = Names::restored(names.in_order());
        restored.add([name("pay"), name("Pay"), name("orders")]);
        assert_eq!(restored.shadowed_by(&name("pay")), Some(&name("Pay")));
        assert_eq!(restored.shadowed_by(&name("orders")), None);
        restored.remove(&name("Pay"));
        assert_eq!(restored.shadowed_by(&name("pay")), None);
    }
}
