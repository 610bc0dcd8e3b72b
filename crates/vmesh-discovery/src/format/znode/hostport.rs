//! `host:port`, and nothing else.
//!
//! In a node's data it is what candidates of an election leave (Linkerd's `io.l5d.zkLeader`): the one with the lowest
//! number leads, and is the service. Where nodes have no numbers all of them are instances. In a node's name, after some
//! digits, it is Pinterest's kingpin: `8a7f-10.1.0.4:8080`, without data.

use vmesh_model::{Address, Labels};

use super::{Directory, Member, Offer, Read, Record, presence, readable};

pub(super) fn read(directory: &Directory<'_>, read: &mut Read) {
    let is_election = |member: &&Member<'_>| !member.data.is_empty() && sequence(member.name).is_some();
    let (candidates, others): (Vec<&Member<'_>>, Vec<&Member<'_>>) =
        directory.members.iter().partition(is_election);
    for member in others {
        take(directory, member, read);
    }
    // One that cannot be read leads all the same: to call another the leader would be wrong.
    let leader = candidates.iter().copied().reduce(|first, other| {
        let (a, b) = (sequence(first.name).unwrap_or_default(), sequence(other.name).unwrap_or_default());
        if is_before(b, a) { other } else { first }
    });
    if let Some(leader) = leader {
        take(directory, leader, read);
    }
}

fn take(directory: &Directory<'_>, member: &Member<'_>, read: &mut Read) {
    let place = directory.place_of(member);
    let addresses = match readable(member).and_then(|()| addresses(member)) {
        Ok(addresses) => addresses,
        Err(why) => return read.bad_record(place, why),
    };
    for address in addresses {
        let mut labels = Labels::new();
        let health = presence(member, &mut labels);
        let record = Record { health, labels, ..Record::new(address, place.clone()) };
        let (service, interface, scheme, protocol) = (None, None, None, None);
        read.offers.push(Offer { service, interface, scheme, protocol, created: member.created, record });
    }
}

fn addresses(member: &Member<'_>) -> Result<Vec<Address>, String> {
    let data = std::str::from_utf8(member.data).map_err(|_| "its data is not text".to_owned())?;
    if data.trim().is_empty() {
        return match in_name(member.name) {
            Some(address) => Ok(vec![address]),
            // A directory.
            None if !member.is_ephemeral => Ok(Vec::new()),
            None => Err("there is no `host:port` in it, nor in its name".to_owned()),
        };
    }
    data.trim().split(',').map(|address| address.trim().parse()).collect()
}

/// `8a7f-10.1.0.4:8080`, or without what is before the `-`.
fn in_name(name: &str) -> Option<Address> {
    let after = name.split_once('-').filter(|(id, _)| id.bytes().all(|b| b.is_ascii_hexdigit()));
    after.and_then(|(_, address)| address.parse().ok()).or_else(|| name.parse().ok())
}

pub(super) fn may_be_record(member: &Member<'_>) -> bool {
    addresses(member).is_ok_and(|addresses| !addresses.is_empty())
}

/// The number at the end of a sequential node's name: ten characters, and after 2^31 such nodes a sign before or in
/// them. A sign may also end the name that was asked for (`latch-0000000003`), and then it is none.
fn sequence(name: &str) -> Option<i32> {
    let (before, last) = name.split_at_checked(name.len().checked_sub(10)?)?;
    let digits = last.strip_prefix('-').unwrap_or(last);
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let negative = || format!("-{last}").parse().ok();
    match before.strip_suffix('-') {
        Some(before) if !before.ends_with(|c: char| c.is_alphanumeric()) => negative(),
        Some(_) => last.parse().ok().or_else(negative),
        None => last.parse().ok(),
    }
}

/// Numbers go on from the least when they have reached the greatest.
fn is_before(a: i32, b: i32) -> bool {
    b.wrapping_sub(a) > 0
}
