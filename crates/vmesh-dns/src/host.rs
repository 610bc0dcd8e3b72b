//! Configuration texts that make a host's resolver forward one DNS zone, and nothing else, to our server. This module does no I/O.
//!
//! | the host has | function | note |
//! |---|---|---|
//! | systemd-resolved 258 or later | [`resolved_delegate`] | preferred: no other name is affected |
//! | an earlier systemd-resolved, with its servers from DHCP or `.network` files | [`resolved_drop_in`] | has side effects, see there |
//! | dnsmasq | [`dnsmasq`] | |
//! | a plain `/etc/resolv.conf` | [`with_hosts_block`] | see [`PLAIN_RESOLV_CONF`] |

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use crate::table::{Suffix, Table};

/// Path of [`resolved_drop_in`]. Needs `systemctl restart systemd-resolved` afterwards.
pub const RESOLVED_DROP_IN: &str = "/etc/systemd/resolved.conf.d/vmesh.conf";
/// Path of [`resolved_delegate`]. Needs `systemctl restart systemd-resolved` afterwards.
pub const RESOLVED_DELEGATE: &str = "/etc/systemd/dns-delegate.d/vmesh.dns-delegate";
/// Path of [`resolved_negative_anchor`], for hosts that validate DNSSEC (`DNSSEC=yes` in resolved.conf).
pub const RESOLVED_NEGATIVE_ANCHOR: &str = "/etc/dnssec-trust-anchors.d/vmesh.negative";
/// Path of [`dnsmasq`] on Debian. Needs `systemctl restart dnsmasq` afterwards.
pub const DNSMASQ: &str = "/etc/dnsmasq.d/vmesh.conf";

/// Returns a drop-in for systemd-resolved that forwards names below the suffix to `server`, as a routing domain.
///
/// **Only for hosts whose other servers belong to links** (DHCP, `.network` files, NetworkManager). All `DNS=` lines of resolved.conf and
/// its drop-ins form one list, and systemd-resolved uses a single server of it for all queries. If the list has another server, that one
/// receives the queries for our names too, and answers NXDOMAIN. Such a host needs [`resolved_delegate`], or dnsmasq, or its servers moved
/// to a link. Servers in `FallbackDNS=` are no longer used once the list has an entry.
///
/// For names outside all domains, systemd-resolved queries the servers of resolved.conf beside those of the links. So our server receives
/// queries for foreign names and refuses them; the answers of the links' servers count, including NXDOMAIN. With `DNSSEC=yes`, see also
/// [`resolved_negative_anchor`].
pub fn resolved_drop_in(server: SocketAddr, suffix: &Suffix) -> String {
    format!(
        "# Written by vmesh: names below {suffix} are answered on this host.\n[Resolve]\nDNS={server}\nDomains=~{suffix}\n"
    )
}

/// Returns a delegate for systemd-resolved 258 or later (systemd.dns-delegate(5)). It forwards this zone alone, independently of other
/// servers.
pub fn resolved_delegate(server: SocketAddr, suffix: &Suffix) -> String {
    format!(
        "# Written by vmesh: names below {suffix} are answered on this host.\n[Delegate]\nDNS={server}\nDomains=~{suffix}\n"
    )
}

/// Returns a negative trust anchor for validating resolvers (dnssec-trust-anchors.d(5)): the zone is not signed, and the root zone cannot
/// prove that it does not exist.
pub fn resolved_negative_anchor(suffix: &Suffix) -> String {
    format!("; Written by vmesh: the zone is of this host, and not signed.\n{suffix}\n")
}

/// Returns lines for dnsmasq. The second line exempts the zone from `stop-dns-rebind`, which would drop unique local addresses from
/// answers.
pub fn dnsmasq(server: SocketAddr, suffix: &Suffix) -> String {
    let (ip, port) = (server.ip(), server.port());
    format!(
        "# Written by vmesh: names below {suffix} are answered on this host.\nserver=/{suffix}/{ip}#{port}\n\
         rebind-domain-ok=/{suffix}/\n"
    )
}

/// Explanation for the operator of a host that has only a `/etc/resolv.conf`.
pub const PLAIN_RESOLV_CONF: &str = "\
This host asks the servers in /etc/resolv.conf itself. The C library can neither ask one server for some names only, nor ask \
a server at a port other than 53 (resolv.conf(5)), and it believes the first server that says that a name does not exist. So no \
line there makes it ask vmesh for some names.
Either install systemd-resolved or dnsmasq on this host, or have the network's own resolver forward the zone, or let vmesh keep \
a block of names in /etc/hosts. With the block: only names that are known when it is written, no wildcards, found by who reads \
/etc/hosts (not by dig, and by some runtimes only at their start), and read through for each lookup: good for hundreds of names, \
slow for tens of thousands.
";

const BEGIN: &str = "# vmesh begin: written by vmesh, replaced whole";
/// Marks a block that had to end the preceding line first, so that removing the block restores the file exactly.
const BEGIN_WITHOUT_NEWLINE: &str =
    "# vmesh begin: written by vmesh, replaced whole (the line before had no end)";
const END: &str = "# vmesh end";

/// The reason why a hosts file cannot be edited.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostsBlockError {
    #[error(
        "line {line} of the hosts file begins a block of vmesh that nothing ends; write `{END}` below it, or remove the line"
    )]
    NoEnd { line: usize },
    #[error("line {line} of the hosts file ends a block of vmesh that nothing begins; remove the line")]
    NoBegin { line: usize },
    #[error("line {line} of the hosts file begins a second block of vmesh; remove one of them")]
    Second { line: usize },
}

/// Returns the hosts file `hosts` with one block for `table`. The block replaces an existing one, or is appended; all other bytes stay. It
/// contains the first address of each family for each name: the C library returns all addresses in the same order to everybody, so more
/// addresses would not balance the load.
pub fn with_hosts_block(hosts: &[u8], table: &Table) -> Result<Vec<u8>, HostsBlockError> {
    let found = find(hosts)?;
    let before = hosts.get(..found.start).unwrap_or_default();
    let after = hosts.get(found.end..).unwrap_or_default();
    let mut all = before.to_vec();
    if found.lacks_newline {
        all.push(b'\n');
    }
    all.extend_from_slice(block(table, found.lacks_newline).as_bytes());
    all.extend_from_slice(after);
    Ok(all)
}

/// Returns the hosts file without our block, as it was before the block was added.
pub fn without_hosts_block(hosts: &[u8]) -> Result<Vec<u8>, HostsBlockError> {
    let found = find(hosts)?;
    let before = hosts.get(..found.start).unwrap_or_default();
    let after = hosts.get(found.end..).unwrap_or_default();
    // Lines that were added below the block since then start on a line of their own.
    let newline: &[u8] = if found.lacks_newline && !after.is_empty() { b"\n" } else { b"" };
    Ok([before, newline, after].concat())
}

fn block(table: &Table, lacks_newline: bool) -> String {
    let suffix = &table.zone().suffix;
    let mut text = format!("{}\n", if lacks_newline { BEGIN_WITHOUT_NEWLINE } else { BEGIN });
    for (name, addresses) in table.iter() {
        let v4 = addresses.v4.first().copied().map(IpAddr::from);
        let v6 = addresses.v6.first().copied().map(IpAddr::from);
        for address in v4.into_iter().chain(v6) {
            // Writing into a string never fails.
            _ = writeln!(text, "{address} {name}.{suffix}");
        }
    }
    text.push_str(END);
    text.push('\n');
    text
}

/// The byte range of the block in the file, including the newline added before it. Empty, at the end of the file, if there is no block.
struct BlockPosition {
    start: usize,
    end: usize,
    lacks_newline: bool,
}

fn find(hosts: &[u8]) -> Result<BlockPosition, HostsBlockError> {
    let mut at = 0_usize;
    let mut begun = None;
    let mut whole = None;
    for (index, line) in hosts.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let number = index + 1;
        let text = line.trim_ascii_end();
        let begins = [BEGIN, BEGIN_WITHOUT_NEWLINE].iter().position(|mark| text == mark.as_bytes());
        if let Some(which) = begins {
            if begun.is_some() || whole.is_some() {
                return Err(HostsBlockError::Second { line: number });
            }
            begun = Some((number, at, which == 1));
        } else if text == END.as_bytes() {
            let (_, start, lacks_newline) = begun.take().ok_or(HostsBlockError::NoBegin { line: number })?;
            let start = if lacks_newline { start.saturating_sub(1) } else { start };
            whole = Some(BlockPosition { start, end: at + line.len(), lacks_newline });
        }
        at += line.len();
    }
    if let Some((line, ..)) = begun {
        return Err(HostsBlockError::NoEnd { line });
    }
    let lacks_newline = hosts.last().is_some_and(|byte| *byte != b'\n');
    Ok(whole.unwrap_or(BlockPosition { start: hosts.len(), end: hosts.len(), lacks_newline }))
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use proptest::prelude::*;

    use super::*;
    use crate::table::{Addresses, Zone};

    fn table(names: &[&str]) -> Table {
        let entries = names.iter().map(|name| {
            let addresses: Addresses = ["240.0.0.2", "240.0.0.1", "fd00::1"]
                .map(|text| text.parse::<IpAddr>().unwrap())
                .into_iter()
                .collect();
            (*name, addresses)
        });
        Table::new(Zone::default(), entries).0
    }

    #[test]
    fn resolvers_are_told_of_one_zone() {
        let suffix = Suffix::default();
        let mut shown = String::new();
        for server in ["127.0.0.1:15053", "[::1]:15053"] {
            let server = server.parse().unwrap();
            shown.push_str(&resolved_drop_in(server, &suffix));
            shown.push_str(&resolved_delegate(server, &suffix));
            shown.push_str(&dnsmasq(server, &suffix));
        }
        shown.push_str(&resolved_negative_anchor(&suffix));
        expect![[r#"
            # Written by vmesh: names below mesh are answered on this host.
            [Resolve]
            DNS=127.0.0.1:15053
            Domains=~mesh
            # Written by vmesh: names below mesh are answered on this host.
            [Delegate]
            DNS=127.0.0.1:15053
            Domains=~mesh
            # Written by vmesh: names below mesh are answered on this host.
            server=/mesh/127.0.0.1#15053
            rebind-domain-ok=/mesh/
            # Written by vmesh: names below mesh are answered on this host.
            [Resolve]
            DNS=[::1]:15053
            Domains=~mesh
            # Written by vmesh: names below mesh are answered on this host.
            [Delegate]
            DNS=[::1]:15053
            Domains=~mesh
            # Written by vmesh: names below mesh are answered on this host.
            server=/mesh/::1#15053
            rebind-domain-ok=/mesh/
            ; Written by vmesh: the zone is of this host, and not signed.
            mesh
        "#]]
        .assert_eq(&shown);
    }

    #[test]
    fn the_block_is_replaced_and_the_rest_stays() {
        let hosts = b"127.0.0.1\tlocalhost\n\xff odd bytes\n";
        let one = with_hosts_block(hosts, &table(&["orders", "Payments"])).unwrap();
        expect![[r#"
            127.0.0.1	localhost
            � odd bytes
            # vmesh begin: written by vmesh, replaced whole
            240.0.0.1 Payments.mesh
            fd00::1 Payments.mesh
            240.0.0.1 orders.mesh
            fd00::1 orders.mesh
            # vmesh end
        "#]]
        .assert_eq(&String::from_utf8_lossy(&one));
        let edited = [one.as_slice(), b"10.0.0.1 mine\n"].concat();
        let two = with_hosts_block(&edited, &table(&["orders"])).unwrap();
        expect![[r#"
            127.0.0.1	localhost
            � odd bytes
            # vmesh begin: written by vmesh, replaced whole
            240.0.0.1 orders.mesh
            fd00::1 orders.mesh
            # vmesh end
            10.0.0.1 mine
        "#]]
        .assert_eq(&String::from_utf8_lossy(&two));
        assert_eq!(without_hosts_block(&two).unwrap(), [hosts.as_slice(), b"10.0.0.1 mine\n"].concat());
    }

    #[test]
    fn marks_that_do_not_match_leave_the_file_alone() {
        let shown = [
            format!("a\n{BEGIN}\nb\n"),
            format!("a\n{END}\nb\n"),
            format!("{BEGIN}\n{END}\n{BEGIN}\n{END}\n"),
            format!("{BEGIN}\n{BEGIN}\n{END}\n"),
        ]
        .map(|hosts| with_hosts_block(hosts.as_bytes(), &table(&[])).unwrap_err().to_string());
        expect![[r#"
            line 2 of the hosts file begins a block of vmesh that nothing ends; write `# vmesh end` below it, or remove the line
            line 2 of the hosts file ends a block of vmesh that nothing begins; remove the line
            line 3 of the hosts file begins a second block of vmesh; remove one of them
            line 2 of the hosts file begins a second block of vmesh; remove one of them"#]].assert_eq(&shown.join("\n"));
    }

    proptest! {
        #[test]
        fn after_the_block_is_gone_the_file_is_what_it_was(
            hosts in prop::collection::vec(prop_oneof![any::<u8>(), Just(b'\n'), Just(b'\r')], 0..40),
            names in prop::collection::vec("[a-z]{1,4}", 0..4),
        ) {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let one = with_hosts_block(&hosts, &table(&names)).unwrap();
            // Writing the block again changes nothing, and another table replaces it completely.
            prop_assert_eq!(&with_hosts_block(&one, &table(&names)).unwrap(), &one);
            let other = with_hosts_block(&one, &table(&["other"])).unwrap();
            prop_assert_eq!(&other, &with_hosts_block(&hosts, &table(&["other"])).unwrap());
            prop_assert_eq!(without_hosts_block(&other).unwrap(), hosts.clone());
            prop_assert_eq!(without_hosts_block(&hosts).unwrap(), hosts);
        }
    }
}
