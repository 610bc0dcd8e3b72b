//! The names below one suffix, and their addresses.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Maximum size of a name on the wire, with the lengths of its labels and the root (RFC 1035 section 3.1).
pub(crate) const MAX_NAME: usize = 255;
const MAX_LABEL: usize = 63;

/// Maximum number of addresses per name and family. 512 addresses take 14 KiB of a response, far below the limit of TCP messages.
pub const MAX_ADDRESSES: usize = 512;

/// The settings that all names of a table share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Zone {
    pub suffix: Suffix,
    /// TTL of addresses, in seconds.
    pub ttl: u32,
    /// TTL of negative answers, in seconds (RFC 2308). A resolver that asked for a new name too early does not see the name for this long.
    pub negative_ttl: u32,
}

impl Default for Zone {
    /// Returns `mesh` with both TTLs at 5 s: urgent changes must arrive quickly, and an answer costs microseconds.
    fn default() -> Zone {
        Zone { suffix: Suffix::default(), ttl: 5, negative_ttl: 5 }
    }
}

/// A domain in lower case, such as `mesh` or `mesh.example.com`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suffix {
    text: String,
    wire: Vec<u8>,
}

impl Suffix {
    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub(crate) fn wire(&self) -> &[u8] {
        &self.wire
    }
}

impl Default for Suffix {
    fn default() -> Suffix {
        Suffix { text: "mesh".to_owned(), wire: b"\x04mesh\x00".to_vec() }
    }
}

impl fmt::Display for Suffix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The reason why a text cannot be the suffix of a zone.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` cannot be the suffix of names: {why}; built in is `mesh`")]
pub struct SuffixError {
    text: String,
    why: &'static str,
}

impl FromStr for Suffix {
    type Err = SuffixError;

    fn from_str(text: &str) -> Result<Suffix, SuffixError> {
        let lower = text.to_ascii_lowercase();
        let last = lower.rsplit('.').next().unwrap_or_default();
        let why = match last {
            "local" => Err("resolvers ask the local network for `local`, by multicast (RFC 6762)"),
            "localhost" => Err("it is always the host itself (RFC 6761)"),
            // Names of only digits and dots would be parsed as addresses.
            _ if last.bytes().all(|byte| byte.is_ascii_digit()) => Err("its last part is empty or a number"),
            _ => wire(&lower, &[0]),
        };
        match why {
            Ok(wire) => Ok(Suffix { text: lower, wire }),
            Err(why) => Err(SuffixError { text: text.to_owned(), why }),
        }
    }
}

/// Returns `name` in lower case on the wire, below `parent`.
fn wire(name: &str, parent: &[u8]) -> Result<Vec<u8>, &'static str> {
    let mut wire = Vec::with_capacity(name.len() + 1 + parent.len());
    for label in name.split('.') {
        let len = u8::try_from(label.len()).ok().filter(|len| usize::from(*len) <= MAX_LABEL);
        let len = len.ok_or("a part between dots has more than 63 characters")?;
        if len == 0 {
            return Err("a part between dots is empty");
        }
        if !label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte)) {
            return Err("it has characters other than letters, digits, `-`, `_` and dots");
        }
        wire.push(len);
        wire.extend(label.bytes().map(|byte| byte.to_ascii_lowercase()));
    }
    wire.extend_from_slice(parent);
    if wire.len() > MAX_NAME {
        return Err("with the suffix, it has more than 253 characters");
    }
    Ok(wire)
}

/// The addresses of one name. A name may exist without addresses.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Addresses {
    pub v4: Vec<Ipv4Addr>,
    pub v6: Vec<Ipv6Addr>,
}

impl FromIterator<IpAddr> for Addresses {
    fn from_iter<I: IntoIterator<Item = IpAddr>>(addresses: I) -> Addresses {
        let mut all = Addresses::default();
        for address in addresses {
            match address {
                IpAddr::V4(v4) => all.v4.push(v4),
                IpAddr::V6(v6) => all.v6.push(v6),
            }
        }
        all
    }
}

/// An entry that the table omits or shortens.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("`{name}` has no name in DNS: {why}")]
    NotAName { name: String, why: &'static str },
    #[error(
        "`{name}` has no name in DNS, where upper and lower case are one: `{kept_by}` has it and comes first in the order of names"
    )]
    SameName { name: String, kept_by: String },
    #[error("`{name}` has {count} {family} addresses, of which the lowest {MAX_ADDRESSES} are answered")]
    TooMany { name: String, family: &'static str, count: usize },
}

/// All names that are answered. Immutable: a change makes a new table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Table {
    zone: Zone,
    names: BTreeMap<Box<[u8]>, NameEntry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct NameEntry {
    /// The name as given. `None` if the name exists only because a name below it does: `payments` because of `v2.payments` (RFC 8020).
    name: Option<String>,
    addresses: Addresses,
}

impl Table {
    /// Builds a table from `entries`, which are names without the suffix and their addresses, in any order. A name that is given twice gets
    /// the addresses of both entries. The problems are sorted by name.
    pub fn new<N: Into<String>>(
        zone: Zone,
        entries: impl IntoIterator<Item = (N, Addresses)>,
    ) -> (Table, Vec<Problem>) {
        let mut by_name = BTreeMap::<String, Addresses>::new();
        for (name, addresses) in entries {
            let all = by_name.entry(name.into()).or_default();
            all.v4.extend(addresses.v4);
            all.v6.extend(addresses.v6);
        }
        let mut table = Table { zone, names: BTreeMap::new() };
        let mut problems = Vec::new();
        // Of names that differ in case only, one with addresses comes first: the control plane gives addresses to at most one of them.
        let mut in_order: Vec<_> = by_name.into_iter().collect();
        in_order.sort_by_key(|(_, addresses)| addresses.v4.is_empty() && addresses.v6.is_empty());
        for (name, mut addresses) in in_order {
            let too_many = [
                limit(&mut addresses.v4).map(|count| ("IPv4", count)),
                limit(&mut addresses.v6).map(|count| ("IPv6", count)),
            ];
            match table.insert(&name, addresses) {
                Err(problem) => problems.push(problem),
                Ok(()) => {
                    problems.extend(too_many.into_iter().flatten().map(|(family, count)| Problem::TooMany {
                        name: name.clone(),
                        family,
                        count,
                    }))
                }
            }
        }
        (table, problems)
    }

    fn insert(&mut self, name: &str, addresses: Addresses) -> Result<(), Problem> {
        let suffix = self.zone.suffix.wire();
        let wire = wire(name, suffix).map_err(|why| Problem::NotAName { name: name.to_owned(), why })?;
        // Every parent of the name below the suffix exists too.
        let mut above = wire.as_slice();
        while let Some((len, rest)) = above.split_first() {
            above = rest.get(usize::from(*len)..).unwrap_or_default();
            if above.len() <= suffix.len() {
                break;
            }
            self.names.entry(above.into()).or_default();
        }
        let entry = match self.names.entry(wire.into()) {
            Entry::Vacant(free) => free.insert(NameEntry::default()),
            Entry::Occupied(there) => there.into_mut(),
        };
        if let Some(kept_by) = &entry.name {
            return Err(Problem::SameName { name: name.to_owned(), kept_by: kept_by.clone() });
        }
        *entry = NameEntry { name: Some(name.to_owned()), addresses };
        Ok(())
    }

    pub fn zone(&self) -> &Zone {
        &self.zone
    }

    /// Iterates over the names as given, without the suffix, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Addresses)> {
        let mut all: Vec<_> = self
            .names
            .values()
            .filter_map(|entry| Some((entry.name.as_deref()?, &entry.addresses)))
            .collect();
        all.sort_by_key(|(name, _)| *name);
        all.into_iter()
    }

    /// Returns the addresses of a name in lower case on the wire.
    pub(crate) fn get(&self, wire: &[u8]) -> Option<&Addresses> {
        self.names.get(wire).map(|entry| &entry.addresses)
    }
}

/// Sorts and deduplicates addresses, and truncates them to the limit. Returns their number if it exceeded the limit.
fn limit<A: Ord>(addresses: &mut Vec<A>) -> Option<usize> {
    addresses.sort();
    addresses.dedup();
    let count = addresses.len();
    addresses.truncate(MAX_ADDRESSES);
    (count > MAX_ADDRESSES).then_some(count)
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use proptest::prelude::*;

    use super::*;

    fn of(address: &str) -> Addresses {
        [address.parse::<IpAddr>().unwrap()].into_iter().collect()
    }

    #[test]
    fn what_cannot_be_a_name_is_reported_and_costs_nobody_else() {
        let long = "a".repeat(64);
        let longer = vec!["a".repeat(49); 5].join(".");
        let names = [
            "orders",
            "Orders",
            "ORDERS",
            "a..b",
            &long,
            &longer,
            "v2.payments",
            "payments",
            "a b",
            "",
            "x_1",
        ];
        let many = (0..600_u32).map(|n| IpAddr::V4(Ipv4Addr::from_bits(n))).collect();
        let entries = names.map(|name| (name, of("240.0.0.1"))).into_iter().chain([("many", many)]);
        let (table, problems) = Table::new(Zone::default(), entries);
        let mut shown: Vec<String> = table
            .iter()
            .map(|(name, addresses)| format!("{name}: {}", addresses.v4.len() + addresses.v6.len()))
            .collect();
        shown.extend(problems.iter().map(|problem| problem.to_string().replace(&"a".repeat(49), "a*49")));
        expect![[r#"
            ORDERS: 1
            many: 512
            payments: 1
            v2.payments: 1
            x_1: 1
            `` has no name in DNS: a part between dots is empty
            `Orders` has no name in DNS, where upper and lower case are one: `ORDERS` has it and comes first in the order of names
            `a b` has no name in DNS: it has characters other than letters, digits, `-`, `_` and dots
            `a..b` has no name in DNS: a part between dots is empty
            `a*49.a*49.a*49.a*49.a*49` has no name in DNS: with the suffix, it has more than 253 characters
            `a*49aaaaaaaaaaaaaaa` has no name in DNS: a part between dots has more than 63 characters
            `many` has 600 IPv4 addresses, of which the lowest 512 are answered
            `orders` has no name in DNS, where upper and lower case are one: `ORDERS` has it and comes first in the order of names"#]].assert_eq(&shown.join("\n"));
    }

    #[test]
    fn a_name_that_is_there_for_one_below_it_can_be_given_too() {
        let entries = [("b", of("240.0.0.2")), ("a.b", of("240.0.0.1"))];
        let (table, problems) = Table::new(Zone::default(), entries.clone());
        assert_eq!(problems, []);
        assert_eq!(table.get(b"\x01b\x04mesh\x00"), Some(&of("240.0.0.2")));
        let (table, _) = Table::new(Zone::default(), entries.into_iter().skip(1));
        assert_eq!(table.get(b"\x01b\x04mesh\x00"), Some(&Addresses::default()));
        assert_eq!(table.get(b"\x04mesh\x00"), None);
        assert_eq!(table.iter().count(), 1);
    }

    #[test]
    fn a_suffix_that_resolvers_would_not_ask_for_is_refused() {
        let texts = [
            "mesh",
            "Mesh.Example.com",
            "",
            ".",
            "mesh.",
            "local",
            "x.LOCAL",
            "localhost",
            "a b",
            "10",
            "m.10",
        ];
        let shown = texts.map(|text| match text.parse::<Suffix>() {
            Ok(suffix) => format!("{suffix} {}", suffix.wire().escape_ascii()),
            Err(bad) => bad.to_string(),
        });
        expect![[r#"
            mesh \x04mesh\x00
            mesh.example.com \x04mesh\x07example\x03com\x00
            `` cannot be the suffix of names: its last part is empty or a number; built in is `mesh`
            `.` cannot be the suffix of names: its last part is empty or a number; built in is `mesh`
            `mesh.` cannot be the suffix of names: its last part is empty or a number; built in is `mesh`
            `local` cannot be the suffix of names: resolvers ask the local network for `local`, by multicast (RFC 6762); built in is `mesh`
            `x.LOCAL` cannot be the suffix of names: resolvers ask the local network for `local`, by multicast (RFC 6762); built in is `mesh`
            `localhost` cannot be the suffix of names: it is always the host itself (RFC 6761); built in is `mesh`
            `a b` cannot be the suffix of names: it has characters other than letters, digits, `-`, `_` and dots; built in is `mesh`
            `10` cannot be the suffix of names: its last part is empty or a number; built in is `mesh`
            `m.10` cannot be the suffix of names: its last part is empty or a number; built in is `mesh`"#]].assert_eq(&shown.join("\n"));
        assert_eq!("mesh".parse::<Suffix>().unwrap(), Suffix::default());
    }

    proptest! {
        #[test]
        fn the_order_of_what_is_given_does_not_matter(
            entries in prop::collection::vec(("[aAbB]{1,2}(\\.[aA])?", any::<u32>()), 0..20),
        ) {
            let given = entries.iter().map(|(name, v4)| {
                (name.as_str(), Addresses { v4: vec![Ipv4Addr::from_bits(*v4)], v6: Vec::new() })
            });
            let one = Table::new(Zone::default(), given.clone());
            let other = Table::new(Zone::default(), given.rev());
            prop_assert_eq!(one, other);
        }
    }
}
