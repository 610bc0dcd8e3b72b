//! The names in use: which of several names that differ only by case owns the DNS name, and in which order
//! names came into use.
//!
//! | question | decided by | state |
//! |---|---|---|
//! | who owns a DNS name | a registered service before a name that only documents have, lower case before capitals, then the order of bytes | none: every replica with the same services and documents decides alike, also a new one |
//! | who keeps a virtual address that two names hash to | the name that came into use first | a state file, [`Names::in_order`] |

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use vmesh_model::document::{RouteDocument, Rule};
use vmesh_model::strict::did_you_mean;
use vmesh_model::{Documents, Place, Problem, ServiceName};

/// The limit of document names for which a similar service name is searched; each search is linear in all
/// names.
const MAX_GUESSES: usize = 50;
/// The limit of unused names from before a restart that are saved again.
const MAX_UNUSED: usize = 4096;

/// The names in use, ordered by first use, and the owner of each DNS name that several of them fold to. Names restored
/// from disk precede all others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    ranks: BTreeMap<ServiceName, u64>,
    next: u64,
    /// The names in use that differ only by case, by their lower-case form.
    folded: BTreeMap<String, BTreeSet<ServiceName>>,
    /// The owner of each DNS name that several names in use fold to, by its lower-case form.
    owners: BTreeMap<String, ServiceName>,
}

fn fold(name: &ServiceName) -> String {
    name.as_str().to_ascii_lowercase()
}

fn has_capitals(name: &ServiceName) -> bool {
    name.as_str().bytes().any(|byte| byte.is_ascii_uppercase())
}

impl Names {
    /// Restores the names that were saved before a restart, the earliest first.
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

    /// Adds names that came into use. Among names added together, lower-case names come first, so that
    /// replicas that start with the same names order them alike.
    pub(crate) fn add(&mut self, names: impl IntoIterator<Item = ServiceName>) {
        let mut new: Vec<_> = names.into_iter().collect();
        new.sort_by(|a, b| (has_capitals(a), a).cmp(&(has_capitals(b), b)));
        for name in new {
            self.folded.entry(fold(&name)).or_default().insert(name.clone());
            self.rank(name);
        }
    }

    pub(crate) fn remove(&mut self, name: &ServiceName) {
        self.ranks.remove(name);
        let folded = fold(name);
        if let Some(same) = self.folded.get_mut(&folded) {
            same.remove(name);
            if same.len() < 2 {
                self.owners.remove(&folded);
            }
            if same.is_empty() {
                self.folded.remove(&folded);
            }
        }
    }

    /// Returns the owner of the DNS name of `name` if several names fold to it and the recorded owner is
    /// another one.
    pub(crate) fn new_owner(
        &self,
        name: &ServiceName,
        is_registered: impl Fn(&ServiceName) -> bool,
    ) -> Option<ServiceName> {
        let folded = fold(name);
        let same = self.folded.get(&folded).filter(|same| same.len() > 1)?;
        let owner = same.iter().min_by_key(|name| (!is_registered(name), has_capitals(name), *name))?;
        (self.owners.get(&folded) != Some(owner)).then(|| owner.clone())
    }

    /// Records `owner` as the owner of the DNS name that it folds to.
    pub(crate) fn set_owner(&mut self, owner: ServiceName) {
        self.owners.insert(fold(&owner), owner);
    }

    fn rank_of(&self, name: &ServiceName) -> u64 {
        self.ranks.get(name).copied().unwrap_or(u64::MAX)
    }

    /// Returns the owner of the DNS name of `name`, if that is another name.
    pub fn shadowed_by(&self, name: &ServiceName) -> Option<&ServiceName> {
        self.owners.get(&fold(name)).filter(|owner| *owner != name)
    }

    /// Returns the names to save, the earliest first: all names in use, and the earliest 4,096 unused ones,
    /// because a source that is unreachable now may list them again.
    pub fn in_order(&self) -> Vec<ServiceName> {
        let mut names: Vec<_> = self.ranks.iter().collect();
        names.sort_by_key(|(_, rank)| **rank);
        let is_used =
            |name: &ServiceName| self.folded.get(&fold(name)).is_some_and(|same| same.contains(name));
        let mut unused = 0;
        names.retain(|(name, _)| {
            unused += usize::from(!is_used(name));
            unused <= MAX_UNUSED || is_used(name)
        });
        names.into_iter().map(|(name, _)| name.clone()).collect()
    }

    /// Sorts `names` by the order in which they came into use.
    pub fn sort<'a>(&self, names: impl IntoIterator<Item = &'a ServiceName>) -> Vec<&'a ServiceName> {
        let mut names: Vec<_> = names.into_iter().collect();
        names.sort_by_key(|name| (self.rank_of(name), *name));
        names
    }

    /// Returns a problem for each name whose DNS name belongs to another name, and for each document of a
    /// service that no source lists.
    pub(crate) fn problems(
        &self,
        documents: &Documents,
        place_of: impl Fn(&ServiceName) -> Option<Place>,
        is_registered: impl Fn(&ServiceName) -> bool,
        registered: &[&str],
    ) -> Vec<Problem> {
        let mut problems = Vec::new();
        for name in self.folded.values().filter(|same| same.len() > 1).flatten() {
            if let Some(owner) = self.shadowed_by(name) {
                let why = match (is_registered(owner), is_registered(name)) {
                    (true, false) => "since a source names it",
                    _ if has_capitals(owner) => "since it comes first in the order of names",
                    _ => "since it is in lower case",
                };
                let message = format!(
                    "`{name}` and `{owner}` differ in upper and lower case only, which DNS does not tell apart: `{owner}` has the DNS \
                     name and a virtual address, {why}; `{name}` is reached by upstreams, or under another name"
                );
                let place = place_of(name).unwrap_or_else(|| Place::file(""));
                problems.push(Problem::new(place, format!("service `{name}`"), message));
            }
        }
        let services = documents.services.iter().map(|(name, document)| (name, &document.place, "Service"));
        let routes = documents.routes.iter().map(|(name, document)| (name, &document.place, "Route"));
        let access = documents.access.iter();
        let access = access.flat_map(|(name, all)| all.iter().map(move |one| (name, &one.place, "Access")));
        let named = services
            .chain(routes)
            .chain(access)
            .map(|(name, place, kind)| (name, place, format!("{kind} `{name}`")));
        let nodes = documents.nodes.iter().flat_map(|node| {
            node.upstreams.iter().map(|upstream| (&upstream.service, &node.place, "Node".to_owned()))
        });
        let needs_no_endpoints = |name: &ServiceName| {
            is_registered(name) || documents.routes.get(name).is_some_and(|route| leads_elsewhere(route))
        };
        let unknown = named.chain(nodes).filter(|(name, ..)| !needs_no_endpoints(name));
        for (number, (name, place, subject)) in unknown.enumerate() {
            let same = self.folded.get(&fold(name));
            let same = same.into_iter().flatten().find(|other| is_registered(other));
            let guess = || {
                let is_affordable = number < MAX_GUESSES;
                is_affordable.then(|| did_you_mean(name.as_str(), registered.iter().copied())).flatten()
            };
            let message = match (same, guess()) {
                (Some(same), _) => format!(
                    "no source names `{name}`, and `{same}` is there: names are told apart by upper and lower case, and Consul's \
                     are in lower case. Did you mean `{same}`?"
                ),
                (None, Some(meant)) => format!("no source names `{name}`: did you mean `{meant}`?"),
                (None, None) => {
                    format!("no source names `{name}`, so it has no endpoints: register it, or remove this")
                }
            };
            problems.push(Problem::new(place.clone(), subject, message));
        }
        problems
    }
}

/// Reports whether `route` sends every request to other services, so that its own service needs no endpoints.
fn leads_elsewhere(route: &RouteDocument) -> bool {
    let goes_elsewhere = |rule: &Rule| {
        rule.redirect.is_some()
            || (!rule.split.is_empty()
                && rule
                    .split
                    .iter()
                    .all(|target| target.service.as_ref().is_some_and(|service| *service != route.service)))
    };
    !route.rules.is_empty() && route.rules.iter().all(goes_elsewhere)
}

/// Names, shared by consecutive worlds until a name is added or removed.
pub type SharedNames = Arc<Names>;

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ServiceName {
        text.parse().unwrap()
    }

    #[test]
    fn the_owner_of_a_dns_name_is_the_same_in_whatever_order_names_come_and_their_order_outlives_a_restart() {
        let arrivals =
            [["Orders", "orders", "ORDERS"], ["orders", "ORDERS", "Orders"], ["ORDERS", "Orders", "orders"]];
        for arrival in arrivals {
            let mut names = Names::default();
            for arrived in arrival {
                names.add([name(arrived)]);
                if let Some(owner) = names.new_owner(&name(arrived), |_| true) {
                    names.set_owner(owner);
                }
            }
            assert_eq!(names.shadowed_by(&name("Orders")), Some(&name("orders")));
            assert_eq!(names.shadowed_by(&name("orders")), None);
            assert_eq!(names.in_order(), arrival.map(name));
            names.remove(&name("orders"));
            names.set_owner(names.new_owner(&name("orders"), |_| true).unwrap());
            assert_eq!(names.shadowed_by(&name("Orders")), Some(&name("ORDERS")));
            // `orders` and `ORDERS` are now defined by documents only.
            names.set_owner(
                names.new_owner(&name("orders"), |registered| *registered == name("Orders")).unwrap(),
            );
            assert_eq!(names.shadowed_by(&name("ORDERS")), Some(&name("Orders")));
            names.remove(&name("ORDERS"));
            assert_eq!(names.shadowed_by(&name("Orders")), None);
            assert_eq!(names.owners.len(), 0);
        }
        let mut restored = Names::restored([name("b"), name("a")]);
        restored.add([name("a"), name("b"), name("A")]);
        assert_eq!(restored.in_order(), ["b", "a", "A"].map(name));
    }

    #[test]
    fn what_is_saved_is_bounded_however_many_names_went_while_the_control_plane_was_down() {
        let gone = |number: usize| name(&format!("gone-{number}"));
        let mut names = Names::restored((0..10 * MAX_UNUSED).map(gone).chain([name("orders")]));
        names.add([name("orders"), name("pay"), gone(9 * MAX_UNUSED)]);
        let saved = names.in_order();
        assert_eq!(saved.len(), MAX_UNUSED + 3);
        assert_eq!(saved[MAX_UNUSED..], [gone(9 * MAX_UNUSED), name("orders"), name("pay")]);
    }
}
