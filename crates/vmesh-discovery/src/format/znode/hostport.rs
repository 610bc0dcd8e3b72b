//! Nodes with `host:port` and nothing else.
//!
//! In the data of a node it is written by candidates of an election (Linkerd's `io.l5d.zkLeader`): the
//! candidate with the lowest number leads and is the only endpoint. Without sequence numbers, every node is
//! an endpoint. In the name of a node without data, after some digits, it is written by Pinterest's kingpin:
//! `8a7f-10.1.0.4:8080`.

use vmesh_model::{Address, Labels};

use super::{DirectoryContent, Member, Offer, Record, RecordDirectory, check_readable, health_of_presence};

pub(super) fn read(directory: &RecordDirectory<'_>, read: &mut DirectoryContent) {
    let is_election = |member: &&Member<'_>| !member.data.is_empty() && sequence(member.name).is_some();
    let (candidates, others): (Vec<&Member<'_>>, Vec<&Member<'_>>) =
        directory.members.iter().partition(is_election);
    for member in others {
        take(directory, member, read);
    }
    // An unreadable candidate may lead as well; it would be wrong to choose another.
    let leader = candidates.iter().copied().reduce(|first, other| {
        let (a, b) = (sequence(first.name).unwrap_or_default(), sequence(other.name).unwrap_or_default());
        if is_before(b, a) { other } else { first }
    });
    if let Some(leader) = leader {
        take(directory, leader, read);
    }
}

fn take(directory: &RecordDirectory<'_>, member: &Member<'_>, read: &mut DirectoryContent) {
    let place = directory.place_of(member);
    let addresses = match check_readable(member).and_then(|()| addresses(member)) {
        Ok(addresses) => addresses,
        Err(why) => return read.bad_record(place, why),
    };
    for address in addresses {
        let mut labels = Labels::new();
        let health = health_of_presence(member, &mut labels);
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
            // The node is a directory.
            None if !member.is_ephemeral => Ok(Vec::new()),
            None => Err("there is no `host:port` in it, nor in its name".to_owned()),
        };
    }
    data.trim().split(',').map(|address| address.trim().parse()).collect()
}

/// Parses the address in a name such as `8a7f-10.1.0.4:8080`; the part up to the `-` is optional.
fn in_name(name: &str) -> Option<Address> {
    let after = name.split_once('-').filter(|(id, _)| id.bytes().all(|b| b.is_ascii_hexdigit()));
    after.and_then(|(_, address)| address.parse().ok()).or_else(|| name.parse().ok())
}

pub(super) fn may_be_record(member: &Member<'_>) -> bool {
    addresses(member).is_ok_and(|addresses| !addresses.is_empty())
}

/// Returns the number at the end of a sequential node's name. The number has ten characters; after 2^31 nodes
/// it is negative, with the sign before or within the ten characters. A hyphen may also end the requested
/// name (`latch-0000000003`) and is no sign then.
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

/// Reports whether `a` comes before `b`. The numbers wrap around from the greatest to the least.
fn is_before(a: i32, b: i32) -> bool {
    b.wrapping_sub(a) > 0
}
