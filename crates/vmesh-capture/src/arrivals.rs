//! Detects whether redirected connections from outside pass the host's own filter.
//!
//! A host cannot send itself a packet that arrives like one from the network. So the connections of other
//! hosts are counted instead, by two chains of vmesh at the kernel's `input` hook: one before all filters,
//! one after them. A connection that only the first chain counts was dropped in between. Call
//! [`ArrivalLosses::observe`] with each reading of the counters.

use std::fmt;

use serde_json::Value;

use crate::iptables;
use crate::program::{ARRIVED, ARRIVING};

/// The number of consecutive lost connections from which a loss is reported. Fewer may come from a scanner,
/// whose packets a filter drops for other reasons.
const TOLD_FROM: u64 = 3;

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum IpFamily {
    V4,
    V6,
}

impl IpFamily {
    pub const BOTH: [IpFamily; 2] = [IpFamily::V4, IpFamily::V6];

    fn digit(self) -> char {
        match self {
            IpFamily::V4 => '4',
            IpFamily::V6 => '6',
        }
    }
}

impl fmt::Display for IpFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IPv{}", self.digit())
    }
}

/// The redirected connections of one address family since the rules were installed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FamilyArrivals {
    /// Connections counted before the filters.
    pub arriving: u64,
    /// Connections counted after the filters.
    pub arrived: u64,
}

/// The counters of both address families.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ArrivalCounts {
    pub v4: FamilyArrivals,
    pub v6: FamilyArrivals,
}

impl ArrivalCounts {
    pub fn of(&self, family: IpFamily) -> FamilyArrivals {
        match family {
            IpFamily::V4 => self.v4,
            IpFamily::V6 => self.v6,
        }
    }

    fn of_mut(&mut self, family: IpFamily) -> &mut FamilyArrivals {
        match family {
            IpFamily::V4 => &mut self.v4,
            IpFamily::V6 => &mut self.v6,
        }
    }

    /// Adds the counters that `nft -j list chain inet vmesh arriving` (or `arrived`) prints. Rules of any
    /// other form count as nothing.
    pub(crate) fn add_nft(&mut self, json: &str) {
        let Ok(value) = serde_json::from_str::<Value>(json) else { return };
        let items = value.get("nftables").and_then(Value::as_array);
        for rule in items.into_iter().flatten().filter_map(|item| item.get("rule")) {
            let text = |key| rule.get(key).and_then(Value::as_str).unwrap_or_default();
            let expressions = rule.get("expr").and_then(Value::as_array).into_iter().flatten();
            let counted = expressions.filter_map(|part| part.pointer("/counter/packets")?.as_u64()).sum();
            let is_of =
                |family: &IpFamily| text("comment").starts_with(&format!("vmesh new{} ", family.digit()));
            if let Some(family) = IpFamily::BOTH.into_iter().find(is_of) {
                self.add(family, text("chain"), counted);
            }
        }
    }

    /// Adds the counters of one address family that `iptables-save -c` prints.
    pub(crate) fn add_iptables(&mut self, family: IpFamily, saved: &str) {
        for line in saved.lines() {
            let Some((counts, rule)) = line.strip_prefix('[').and_then(|rest| rest.split_once("] -A "))
            else {
                continue;
            };
            let packets =
                counts.split(':').next().and_then(|packets| packets.parse().ok()).unwrap_or_default();
            let chain = rule.split(' ').next().unwrap_or_default();
            for name in [ARRIVING, ARRIVED] {
                if chain == iptables::chain_name(name) {
                    self.add(family, name, packets);
                }
            }
        }
    }

    fn add(&mut self, family: IpFamily, chain: &str, packets: u64) {
        let passage = self.of_mut(family);
        match chain {
            ARRIVING => passage.arriving = passage.arriving.saturating_add(packets),
            ARRIVED => passage.arrived = passage.arrived.saturating_add(packets),
            _ => {}
        }
    }
}

/// The connections from outside that were lost since the last one that arrived.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ArrivalLosses {
    last: ArrivalCounts,
    lost: [u64; 2],
}

impl ArrivalLosses {
    /// Forgets the losses because rules have changed, and starts counting at the current counters.
    pub fn begin_at(&mut self, counts: ArrivalCounts) {
        *self = ArrivalLosses { last: counts, lost: [0; 2] };
    }

    /// Takes a reading of the counters. Returns the number of consecutive lost connections for each family
    /// that lost three or more.
    pub fn observe(&mut self, counts: ArrivalCounts) -> Vec<(IpFamily, u64)> {
        for (lost, family) in self.lost.iter_mut().zip(IpFamily::BOTH) {
            let (now, before) = (counts.of(family), self.last.of(family));
            // New rules count from zero.
            let is_anew = now.arriving < before.arriving || now.arrived < before.arrived;
            let before = if is_anew { FamilyArrivals::default() } else { before };
            if is_anew {
                *lost = 0;
            }
            *lost = match now.arrived.saturating_sub(before.arrived) {
                0 => lost.saturating_add(now.arriving.saturating_sub(before.arriving)),
                _ => 0,
            };
        }
        self.last = counts;
        let lost = IpFamily::BOTH.into_iter().zip(self.lost);
        lost.filter(|(_, lost)| *lost >= TOLD_FROM).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_v4(arriving: u64, arrived: u64) -> ArrivalCounts {
        ArrivalCounts { v4: FamilyArrivals { arriving, arrived }, ..ArrivalCounts::default() }
    }

    #[test]
    fn connections_are_lost_when_three_in_a_row_do_not_arrive_and_one_that_arrives_ends_it() {
        let mut losses = ArrivalLosses::default();
        assert_eq!(losses.observe(of_v4(2, 0)), []);
        assert_eq!(losses.observe(of_v4(3, 0)), [(IpFamily::V4, 3)]);
        assert_eq!(losses.observe(of_v4(3, 0)), [(IpFamily::V4, 3)], "nothing new shows nothing new");
        assert_eq!(losses.observe(of_v4(9, 1)), []);
        assert_eq!(losses.observe(of_v4(13, 1)), [(IpFamily::V4, 4)]);
        losses.begin_at(of_v4(15, 1));
        assert_eq!(losses.observe(of_v4(15, 1)), []);
        // The rules were replaced, and count from zero.
        assert_eq!(losses.observe(of_v4(4, 0)), [(IpFamily::V4, 4)]);
        let v6 = ArrivalCounts { v6: FamilyArrivals { arriving: 3, arrived: 0 }, ..of_v4(9, 5) };
        assert_eq!(losses.observe(v6), [(IpFamily::V6, 3)], "one family says nothing of the other");
    }

    #[test]
    fn counters_are_read_from_what_both_tools_print() {
        let rule = |chain: &str, name: &str, packets: u64| {
            format!(
                r#"{{"rule": {{"chain": "{chain}", "comment": "vmesh {name} 0", "expr": [{{"match": 1}}, {{"counter": {{"packets": {packets}}}}}]}}}}"#
            )
        };
        let mut counts = ArrivalCounts::default();
        let rules =
            [rule("arriving", "not_tcp", 100), rule("arriving", "new4", 5), rule("arriving", "new6", 7)];
        counts.add_nft(&format!(r#"{{"nftables": [{}]}}"#, rules.join(", ")));
        counts.add_nft(&format!(r#"{{"nftables": [{}]}}"#, rule("arrived", "new4", 4)));
        counts.add_nft("nonsense");
        let expected = ArrivalCounts {
            v4: FamilyArrivals { arriving: 5, arrived: 4 },
            v6: FamilyArrivals { arriving: 7, arrived: 0 },
        };
        assert_eq!(counts, expected);
        let saved = "*mangle\n:INPUT ACCEPT [9:9]\n[8:480] -A INPUT -p tcp -j VMESH_ARRIVING\n\
                     [3:180] -A VMESH_ARRIVING -p tcp -j RETURN\nCOMMIT\n*nat\n[2:120] -A VMESH_ARRIVED -j RETURN\n[x] -A\n";
        let mut counts = ArrivalCounts::default();
        counts.add_iptables(IpFamily::V6, saved);
        assert_eq!(counts.v6, FamilyArrivals { arriving: 3, arrived: 2 });
    }
}
