//! Computes an address for each name without communication: all hosts that know the same names compute the same addresses.
//!
//! **The algorithm must never change**, since hosts of different versions must agree, and since applications and firewalls remember
//! addresses (the test `the_addresses_of_names_never_change` pins it):
//!
//! - IPv4: `h = XXH3_64(name, seed "vmesh v4")`, both as bytes, the seed big-endian. A range `/p` has `2^(24-p)` blocks of 256 addresses.
//!   254 addresses of each block are used, without `.0` and `.255`, which some stacks still treat as network or broadcast addresses. With
//!   `i = h mod (254 * blocks)`, the address is `1 + i mod 254` in block `i / 254`.
//! - IPv6: the prefix, followed by `XXH3_64(name, seed "vmesh v6")`. These addresses are on no interface, so the reserved interface
//!   identifiers of RFC 5453 do not matter.
//!
//! XXH3 is frozen since release 0.8.0. It does not resist an attacker who searches for collisions, and with 27 bits no hash could. Whoever
//! may add names can therefore take away another name's address: see [`Collision`].
//!
//! **Collisions.** If two names want the same address, the earlier name gets that address, and the later name gets none. The caller gives
//! names in the order in which they appeared, so a new name never takes an address that hosts and applications remember. In the default
//! IPv4 range, two of 1,000 names collide with a probability of 0.4 %, and two of 10,000 with 31 %; in IPv6 practically never.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::net::{AddrParseError, IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::ParseIntError;
use std::str::FromStr;
use std::sync::Arc;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::table::Addresses;

const V4_SEED: u64 = u64::from_be_bytes(*b"vmesh v4");
const V6_SEED: u64 = u64::from_be_bytes(*b"vmesh v6");
/// Number of addresses used in each block of 256.
const USED: u64 = 254;

/// The ranges of virtual addresses. Changing a range moves every name, so all hosts must change together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ranges {
    pub v4: V4Range,
    pub v6: V6Prefix,
}

/// A part of 240.0.0.0/4 ("class E", RFC 1112 section 4), which no host on the internet uses and which Linux routes normally.
///
/// Default: 240.0.0.0/5, which has 134 million addresses and keeps clear of 255.255.255.255.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct V4Range {
    base: Ipv4Addr,
    bits: u8,
}

/// A /64 of unique local addresses (RFC 4193).
///
/// Default: fd76:6d65:7368::/64. A site that already uses the same 40 bits configures another prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct V6Prefix(Ipv6Addr);

impl Default for V4Range {
    fn default() -> V4Range {
        V4Range { base: Ipv4Addr::new(240, 0, 0, 0), bits: 5 }
    }
}

impl Default for V6Prefix {
    fn default() -> V6Prefix {
        V6Prefix(Ipv6Addr::new(0xfd76, 0x6d65, 0x7368, 0, 0, 0, 0, 0))
    }
}

/// The reason why a text is not a range of virtual addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` cannot be a range of virtual {family} addresses: {why}; built in is {built_in}")]
pub struct RangeError {
    text: String,
    family: &'static str,
    built_in: String,
    why: RangeProblem,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum RangeProblem {
    #[error("it is not an address, `/` and a length")]
    NoLength,
    #[error("{0}")]
    Address(AddrParseError),
    #[error("the length is not a number ({0})")]
    Length(ParseIntError),
    #[error("the length has to be from 4 to 24")]
    V4Length,
    #[error("the length has to be 64")]
    V6Length,
    #[error("it is not in 240.0.0.0/4, where no host has its address")]
    NotClassE,
    #[error("it is not in fd00::/8, the unique local addresses")]
    NotLocal,
    #[error("it has bits beyond its length, did you mean {0}?")]
    Beyond(String),
}

fn split<A: FromStr<Err = AddrParseError>>(text: &str) -> Result<(A, u8), RangeProblem> {
    let (address, bits) = text.split_once('/').ok_or(RangeProblem::NoLength)?;
    Ok((address.parse().map_err(RangeProblem::Address)?, bits.parse().map_err(RangeProblem::Length)?))
}

impl FromStr for V4Range {
    type Err = RangeError;

    fn from_str(text: &str) -> Result<V4Range, RangeError> {
        let parse = || {
            let (base, bits): (Ipv4Addr, u8) = split(text)?;
            if !(4..=24).contains(&bits) {
                return Err(RangeProblem::V4Length);
            }
            if base.to_bits() >> 28 != 0xf {
                return Err(RangeProblem::NotClassE);
            }
            let masked = Ipv4Addr::from_bits(base.to_bits() & (u32::MAX << (32 - bits)));
            if masked != base {
                return Err(RangeProblem::Beyond(format!("{masked}/{bits}")));
            }
            Ok(V4Range { base, bits })
        };
        parse().map_err(|why| RangeError {
            text: text.to_owned(),
            family: "IPv4",
            built_in: V4Range::default().to_string(),
            why,
        })
    }
}

impl FromStr for V6Prefix {
    type Err = RangeError;

    fn from_str(text: &str) -> Result<V6Prefix, RangeError> {
        let parse = || {
            let (base, bits): (Ipv6Addr, u8) = split(text)?;
            if bits != 64 {
                return Err(RangeProblem::V6Length);
            }
            if base.to_bits() >> 120 != 0xfd {
                return Err(RangeProblem::NotLocal);
            }
            let masked = Ipv6Addr::from_bits(base.to_bits() >> 64 << 64);
            if masked != base {
                return Err(RangeProblem::Beyond(format!("{masked}/64")));
            }
            Ok(V6Prefix(base))
        };
        parse().map_err(|why| RangeError {
            text: text.to_owned(),
            family: "IPv6",
            built_in: V6Prefix::default().to_string(),
            why,
        })
    }
}

impl fmt::Display for V4Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.bits)
    }
}

impl fmt::Display for V6Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/64", self.0)
    }
}

impl V4Range {
    /// Returns the address that `name` wants, regardless of collisions.
    pub fn preferred_address(&self, name: &str) -> Ipv4Addr {
        let blocks = 1_u64 << (24 - self.bits);
        let index = xxh3_64_with_seed(name.as_bytes(), V4_SEED) % (USED * blocks);
        let offset = (index / USED) * 256 + 1 + index % USED;
        // The offset is below 2^(32 - bits), where the base has zeros.
        Ipv4Addr::from_bits(self.base.to_bits() | u32::try_from(offset).unwrap_or_default())
    }

    pub fn contains(&self, address: Ipv4Addr) -> bool {
        (address.to_bits() ^ self.base.to_bits()) >> (32 - self.bits) == 0
    }
}

impl V6Prefix {
    /// Returns the address that `name` wants, regardless of collisions.
    pub fn preferred_address(&self, name: &str) -> Ipv6Addr {
        Ipv6Addr::from_bits(self.0.to_bits() | u128::from(xxh3_64_with_seed(name.as_bytes(), V6_SEED)))
    }

    pub fn contains(&self, address: Ipv6Addr) -> bool {
        (address.to_bits() ^ self.0.to_bits()) >> 64 == 0
    }
}

/// The virtual addresses of one name. An address lost to a collision is `None`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtualAddresses {
    pub v4: Option<Ipv4Addr>,
    pub v6: Option<Ipv6Addr>,
}

impl From<VirtualAddresses> for Addresses {
    fn from(of: VirtualAddresses) -> Addresses {
        Addresses { v4: of.v4.into_iter().collect(), v6: of.v6.into_iter().collect() }
    }
}

/// Two names want the same address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{name}` has no virtual address {address}, since `{kept_by}` had it first; it is reached by its other address, or has one \
     again under another name"
)]
pub struct Collision {
    pub name: Arc<str>,
    pub kept_by: Arc<str>,
    pub address: IpAddr,
}

/// The virtual addresses of a set of names, with an index from address to name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VirtualIps {
    of: BTreeMap<Arc<str>, VirtualAddresses>,
    v4: BTreeMap<Ipv4Addr, Arc<str>>,
    v6: BTreeMap<Ipv6Addr, Arc<str>>,
}

impl VirtualIps {
    /// Computes the addresses of `names`, and the collisions sorted by name. If two names want one address, the earlier one in `names` gets
    /// it.
    pub fn new<N>(ranges: &Ranges, names: impl IntoIterator<Item = N>) -> (VirtualIps, Vec<Collision>)
    where
        N: Into<Arc<str>>,
    {
        let (mut all, mut collisions) = (VirtualIps::default(), Vec::new());
        for name in names {
            let name: Arc<str> = name.into();
            if all.of.contains_key(&name) {
                continue;
            }
            let v4 = claim(&mut all.v4, ranges.v4.preferred_address(&name), &name, &mut collisions);
            let v6 = claim(&mut all.v6, ranges.v6.preferred_address(&name), &name, &mut collisions);
            all.of.insert(name, VirtualAddresses { v4, v6 });
        }
        collisions.sort_by(|a, b| (&a.name, a.address).cmp(&(&b.name, b.address)));
        (all, collisions)
    }

    pub fn get(&self, name: &str) -> Option<VirtualAddresses> {
        self.of.get(name).copied()
    }

    /// Returns the name with this address.
    pub fn name_at(&self, address: IpAddr) -> Option<&Arc<str>> {
        match address {
            IpAddr::V4(address) => self.v4.get(&address),
            IpAddr::V6(address) => self.v6.get(&address),
        }
    }

    /// Iterates over all names, sorted.
    pub fn iter(&self) -> impl Iterator<Item = (&Arc<str>, VirtualAddresses)> {
        self.of.iter().map(|(name, addresses)| (name, *addresses))
    }
}

fn claim<A: Ord + Copy + Into<IpAddr>>(
    taken: &mut BTreeMap<A, Arc<str>>,
    wanted: A,
    name: &Arc<str>,
    collisions: &mut Vec<Collision>,
) -> Option<A> {
    match taken.entry(wanted) {
        Entry::Vacant(free) => {
            free.insert(name.clone());
            Some(wanted)
        }
        Entry::Occupied(by) => {
            collisions.push(Collision {
                name: name.clone(),
                kept_by: by.get().clone(),
                address: wanted.into(),
            });
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use expect_test::{Expect, expect};
    use proptest::prelude::*;

    use super::*;

    fn check(names: &[&str], ranges: &Ranges, expected: Expect) {
        let (ips, collisions) = VirtualIps::new(ranges, names.iter().copied());
        let mut shown = String::new();
        for (name, VirtualAddresses { v4, v6 }) in ips.iter() {
            let v4 = v4.map_or("-".to_owned(), |v4| v4.to_string());
            let v6 = v6.map_or("-".to_owned(), |v6| v6.to_string());
            shown.push_str(&format!("{name} {v4} {v6}\n"));
        }
        for collision in collisions {
            shown.push_str(&format!("{collision}\n"));
        }
        expected.assert_eq(&shown);
    }

    /// If this test fails, the code is wrong. Do not change the expected table: hosts of different versions share one mesh.
    #[test]
    fn the_addresses_of_names_never_change() {
        check(
            &["orders", "payments", "payments.v2", "Orders", "a", "A-1_b"],
            &Ranges::default(),
            expect![[r#"
                A-1_b 247.240.255.134 fd76:6d65:7368:0:364d:6e3e:f406:3a00
                Orders 245.252.161.51 fd76:6d65:7368:0:efe2:5115:7164:e774
                a 246.69.234.251 fd76:6d65:7368:0:8454:d9e:23a0:2543
                orders 246.94.83.229 fd76:6d65:7368:0:3d5e:f36c:1980:85b1
                payments 243.206.212.38 fd76:6d65:7368:0:f5d4:5c15:9cca:2472
                payments.v2 247.136.60.95 fd76:6d65:7368:0:5488:b827:7e61:194c
            "#]],
        );
        let ranges = Ranges { v4: "250.1.2.0/24".parse().unwrap(), v6: "fd00:1:2:3::/64".parse().unwrap() };
        check(
            &["orders", "payments"],
            &ranges,
            expect![[r#"
            orders 250.1.2.229 fd00:1:2:3:3d5e:f36c:1980:85b1
            payments 250.1.2.38 fd00:1:2:3:f5d4:5c15:9cca:2472
        "#]],
        );
        let ranges = Ranges { v4: "240.0.0.0/4".parse().unwrap(), ..Ranges::default() };
        check(
            &["orders", "payments"],
            &ranges,
            expect![[r#"
            orders 254.94.83.229 fd76:6d65:7368:0:3d5e:f36c:1980:85b1
            payments 251.206.212.38 fd76:6d65:7368:0:f5d4:5c15:9cca:2472
        "#]],
        );
    }

    #[test]
    fn of_two_names_that_want_one_address_the_smaller_has_it() {
        let ranges = Ranges { v4: "240.0.0.0/24".parse().unwrap(), ..Ranges::default() };
        let names: Vec<String> = (0..25).map(|n| format!("s{n:02}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        check(
            &names,
            &ranges,
            expect![[r#"
                s00 240.0.0.99 fd76:6d65:7368:0:1cb9:a459:e0f1:ebe5
                s01 240.0.0.87 fd76:6d65:7368:0:10a1:91b:a4dc:db81
                s02 240.0.0.117 fd76:6d65:7368:0:9781:ecee:221e:6ed7
                s03 240.0.0.218 fd76:6d65:7368:0:2aa9:f6bf:9d34:7982
                s04 240.0.0.43 fd76:6d65:7368:0:91e3:3eb1:68e7:4fe4
                s05 240.0.0.82 fd76:6d65:7368:0:8998:b56f:1ade:5006
                s06 240.0.0.210 fd76:6d65:7368:0:6887:d890:d6e9:cc71
                s07 240.0.0.182 fd76:6d65:7368:0:b280:a6ef:5a32:cdcb
                s08 240.0.0.223 fd76:6d65:7368:0:8553:e7c8:ec4b:41c2
                s09 240.0.0.75 fd76:6d65:7368:0:b17f:198a:216b:f7c6
                s10 240.0.0.211 fd76:6d65:7368:0:7aa9:6104:5b92:3ff2
                s11 240.0.0.56 fd76:6d65:7368:0:917:9fb1:b4:73a6
                s12 240.0.0.141 fd76:6d65:7368:0:c91b:908a:71b6:ad65
                s13 240.0.0.216 fd76:6d65:7368:0:8c9d:b9a7:c1a1:5f40
                s14 240.0.0.151 fd76:6d65:7368:0:483a:f9a9:24f9:9bb6
                s15 - fd76:6d65:7368:0:3481:2519:77ff:62a7
                s16 240.0.0.10 fd76:6d65:7368:0:fc12:2955:e8b0:4a31
                s17 240.0.0.59 fd76:6d65:7368:0:3a26:ae56:19d6:2218
                s18 240.0.0.220 fd76:6d65:7368:0:a8d3:2416:2317:a3db
                s19 240.0.0.48 fd76:6d65:7368:0:e604:28a1:8af8:e968
                s20 240.0.0.146 fd76:6d65:7368:0:f0b5:1d05:4fe:123c
                s21 240.0.0.121 fd76:6d65:7368:0:da84:e4f5:15ee:6608
                s22 240.0.0.63 fd76:6d65:7368:0:3d5b:ac34:ae56:8021
                s23 240.0.0.23 fd76:6d65:7368:0:20a6:fdc4:5173:3074
                s24 240.0.0.140 fd76:6d65:7368:0:66d7:ad37:141c:a62d
                `s15` has no virtual address 240.0.0.56, since `s11` had it first; it is reached by its other address, or has one again under another name
            "#]],
        );
    }

    #[test]
    fn a_range_that_is_none_says_why() {
        let shown = |text: &str| {
            let v4 =
                text.parse::<V4Range>().map_or_else(|bad| bad.to_string(), |range| format!("ok {range}"));
            let v6 =
                text.parse::<V6Prefix>().map_or_else(|bad| bad.to_string(), |range| format!("ok {range}"));
            if text.contains(':') { v6 } else { v4 }
        };
        let texts = [
            "240.0.0.0/5",
            "255.255.255.0/24",
            "240.0.0.1/8",
            "10.0.0.0/8",
            "240.0.0.0",
            "240.0.0.0/25",
            "240.0.0.0/x",
            "240.0.0/8",
            "fd12:3456:789a:1::/64",
            "fd00::1/64",
            "2001:db8::/64",
            "fd00::/48",
        ];
        let shown: Vec<_> = texts.into_iter().map(shown).collect();
        expect![[r#"
            ok 240.0.0.0/5
            ok 255.255.255.0/24
            `240.0.0.1/8` cannot be a range of virtual IPv4 addresses: it has bits beyond its length, did you mean 240.0.0.0/8?; built in is 240.0.0.0/5
            `10.0.0.0/8` cannot be a range of virtual IPv4 addresses: it is not in 240.0.0.0/4, where no host has its address; built in is 240.0.0.0/5
            `240.0.0.0` cannot be a range of virtual IPv4 addresses: it is not an address, `/` and a length; built in is 240.0.0.0/5
            `240.0.0.0/25` cannot be a range of virtual IPv4 addresses: the length has to be from 4 to 24; built in is 240.0.0.0/5
            `240.0.0.0/x` cannot be a range of virtual IPv4 addresses: the length is not a number (invalid digit found in string); built in is 240.0.0.0/5
            `240.0.0/8` cannot be a range of virtual IPv4 addresses: invalid IPv4 address syntax; built in is 240.0.0.0/5
            ok fd12:3456:789a:1::/64
            `fd00::1/64` cannot be a range of virtual IPv6 addresses: it has bits beyond its length, did you mean fd00::/64?; built in is fd76:6d65:7368::/64
            `2001:db8::/64` cannot be a range of virtual IPv6 addresses: it is not in fd00::/8, the unique local addresses; built in is fd76:6d65:7368::/64
            `fd00::/48` cannot be a range of virtual IPv6 addresses: the length has to be 64; built in is fd76:6d65:7368::/64"#]].assert_eq(&shown.join("\n"));
    }

    proptest! {
        /// Small ranges, so that collisions occur.
        #[test]
        fn an_address_depends_on_its_name_and_on_earlier_names_that_want_the_same(
            all in prop::collection::btree_set("[a-z]{1,3}", 0..80),
            leave in prop::collection::vec(any::<bool>(), 80),
        ) {
            let ranges = Ranges { v4: "240.7.7.0/24".parse().unwrap(), ..Ranges::default() };
            let some: BTreeSet<&String> =
                all.iter().zip(&leave).filter(|(_, leave)| **leave).map(|(name, _)| name).collect();
            // Sorted by a hash, so that the order is not alphabetical.
            let seed = |name: &&String| xxh3_64_with_seed(name.as_bytes(), 1);
            for names in [all.iter().collect::<BTreeSet<_>>(), some] {
                let mut names: Vec<_> = names.into_iter().collect();
                names.sort_by_key(seed);
                let (ips, collisions) = VirtualIps::new(&ranges, names.iter().map(|name| name.as_str()));
                // A later name takes no address from earlier names.
                let half: Vec<_> = names.iter().take(names.len() / 2).collect();
                let (before, _) = VirtualIps::new(&ranges, half.iter().map(|name| name.as_str()));
                for name in &half {
                    prop_assert_eq!(before.get(name), ips.get(name));
                }
                for name in &names {
                    let wanted = ranges.v4.preferred_address(name);
                    let first = names.iter().find(|other| ranges.v4.preferred_address(other) == wanted).unwrap();
                    let has = ips.get(name).unwrap().v4;
                    prop_assert_eq!(has, (first == name).then_some(wanted));
                    let reported = collisions.iter().find(|collision| &*collision.name == name.as_str());
                    prop_assert_eq!(reported.map(|collision| &*collision.kept_by), (first != name).then_some(first.as_str()));
                    prop_assert_eq!(ips.name_at(wanted.into()).map(|name| &**name), Some(first.as_str()));
                }
            }
        }

        #[test]
        fn an_address_is_in_its_range_and_looks_like_a_host(name in ".{0,40}", bits in 4_u8..=24, base in any::<u32>()) {
            let base = Ipv4Addr::from_bits((base | 0xf000_0000) & (u32::MAX << (32 - bits)));
            let range: V4Range = format!("{base}/{bits}").parse().unwrap();
            let address = range.preferred_address(&name);
            prop_assert!(range.contains(address));
            prop_assert!(![0, 255].contains(&address.octets()[3]));
            prop_assert!(!address.is_broadcast());
            let prefix = V6Prefix::default();
            prop_assert!(prefix.contains(prefix.preferred_address(&name)));
            prop_assert!(prefix.preferred_address(&name).is_unique_local());
        }
    }

    #[test]
    fn many_names_are_spread_over_the_range() {
        let (ips, collisions) =
            VirtualIps::new(&Ranges::default(), (0..10_000).map(|n| format!("service-{n}")));
        assert!(collisions.len() < 5, "{collisions:?}");
        let blocks: BTreeSet<_> = ips.iter().filter_map(|(_, of)| of.v4).map(|v4| v4.octets()[0]).collect();
        assert_eq!(blocks.len(), 8);
    }
}
