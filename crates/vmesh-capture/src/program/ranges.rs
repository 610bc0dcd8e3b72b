//! Sets of port ranges and of networks.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::spec::{Cidr, Ports};

pub(super) fn singles(ports: &BTreeSet<u16>) -> BTreeSet<Ports> {
    ports.iter().filter_map(|port| Ports::range(*port, *port)).collect()
}

/// Returns the ports that both sets contain.
pub(crate) fn common_ports(one: &BTreeSet<Ports>, other: &BTreeSet<Ports>) -> BTreeSet<Ports> {
    let pairs = one.iter().flat_map(|a| other.iter().map(move |b| (a, b)));
    pairs.filter_map(|(a, b)| Ports::range(a.first().max(b.first()), a.last().min(b.last()))).collect()
}

/// Returns the ports of `these` that are not in `those`.
pub(crate) fn ports_without(these: &BTreeSet<Ports>, those: &BTreeSet<Ports>) -> BTreeSet<Ports> {
    let mut left: Vec<Ports> = these.iter().copied().collect();
    for cut in those {
        let parts = |ports: Ports| {
            if cut.last() < ports.first() || ports.last() < cut.first() {
                return [Some(ports), None];
            }
            [
                Ports::range(ports.first(), cut.first().saturating_sub(1))
                    .filter(|_| ports.first() < cut.first()),
                cut.last().checked_add(1).and_then(|first| Ports::range(first, ports.last())),
            ]
        };
        left = left.into_iter().flat_map(parts).flatten().collect();
    }
    left.into_iter().collect()
}

/// Returns the same ports in as few ranges as possible. nftables refuses sets with overlapping elements.
pub(crate) fn merged_ports(ports: &BTreeSet<Ports>) -> BTreeSet<Ports> {
    let mut merged: Vec<Ports> = Vec::new();
    for ports in ports {
        match merged.last_mut() {
            Some(last) if ports.first() <= last.last().saturating_add(1) => {
                let end = last.last().max(ports.last());
                *last = Ports::range(last.first(), end).unwrap_or(*last);
            }
            _ => merged.push(*ports),
        }
    }
    merged.into_iter().collect()
}

/// Returns the networks that are not inside another one of the set.
pub(crate) fn outermost(cidrs: &BTreeSet<Cidr>) -> BTreeSet<Cidr> {
    let inside = |inner: &Cidr, outer: &Cidr| {
        let ((a, b), (c, d)) = (inner.span(), outer.span());
        inner != outer && inner.is_ipv4() == outer.is_ipv4() && c <= a && b <= d
    };
    cidrs.iter().filter(|cidr| !cidrs.iter().any(|other| inside(cidr, other))).copied().collect()
}

pub(crate) fn is_family(ip: IpAddr, v4: bool) -> bool {
    ip.is_ipv4() == v4
}
