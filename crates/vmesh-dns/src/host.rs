//! Texts that make a host's resolver ask our server for one zone, and for nothing else. Pure: who writes them is not known here.
//!
//! | the host has | what it needs | what to know |
//! |---|---|---|
//! | systemd-resolved 258 or later | [`resolved_delegate`] | nothing else changes; the best there is |
//! | systemd-resolved before that, its servers from DHCP or `.network` files | [`resolved_drop_in`] | see there |
//! | dnsmasq | [`dnsmasq`] | |
//! | a plain `/etc/resolv.conf` | [`with_hosts_block`] | see [`PLAIN_RESOLV_CONF`] |

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use crate::table::{Suffix, Table};

/// Where [`resolved_drop_in`] goes; then `systemctl restart systemd-resolved`.
pub const RESOLVED_DROP_IN: &str = "/etc/systemd/resolved.conf.d/vmesh.conf";
/// Where [`resolved_delegate`] goes; then `systemctl restart systemd-resolved`.
pub const RESOLVED_DELEGATE: &str = "/etc/systemd/dns-delegate.d/vmesh.dns-delegate";
/// Where [`resolved_negative_anchor`] goes, on a host that validates (`DNSSEC=yes` in resolved.conf).
pub const RESOLVED_NEGATIVE_ANCHOR: &str = "/etc/dnssec-trust-anchors.d/vmesh.negative";
/// Where [`dnsmasq`] goes, on Debian; then `systemctl restart dnsmasq`.
pub const DNSMASQ: &str = "/etc/dnsmasq.d/vmesh.conf";

/// A drop-in for systemd-resolved: names below the suffix go to `server`, as a routing domain.
///
/// **Only for hosts whose other servers belong to links** (DHCP, `.network` files, NetworkManager). All `DNS=` of resolved.conf
/// and its drop-ins are one list, of which one server is used for everything: where there is another, it is asked for our names,
/// and says that they do not exist. Such a host needs [`resolved_delegate`], or its servers moved to a link, or dnsmasq. Servers
/// in `FallbackDNS=` are not used any more once there is one.
///
/// Servers of resolved.conf are always asked beside those of links for names that no domain claims. So ours is asked for foreign
/// names, too, and refuses; what the links' servers say stands, also that a name does not exist. With `DNSSEC=yes`, see
/// [`resolved_negative_anchor`].
pub fn resolved_drop_in(server: SocketAddr, suffix: &Suffix) -> String {
    format!(
        "# Written by vmesh: names below {suffix} are answered on this host.\n[Resolve]\nDNS={server}\nDomains=~{suffix}\n"
    )
}

/// A delegate for systemd-resolved 258 or later (systemd.dns-delegate(5)): the zone alone, whatever other servers there are.
pub fn resolved_delegate(server: SocketAddr, suffix: &Suffix) -> String {
    format!(
        "# Written by vmesh: names below {suffix} are answered on this host.\n[Delegate]\nDNS={server}\nDomains=~{suffix}\n"
    )
}

/// For resolvers that validate: the zone is not signed, and its absence from the root is no proof (dnssec-trust-anchors.d(5)).
pub fn resolved_negative_anchor(suffix: &Suffix) -> String {
    format!("; Written by vmesh: the zone is of this host, and not signed.\n{suffix}\n")
}

/// Lines for dnsmasq. The second, since `stop-dns-rebind` would drop unique local addresses of an answer.
pub fn dnsmasq(server: SocketAddr, suffix: &Suffix) -> String {
    let (ip, port) = (server.ip(), server.port());
    format!(
        "# Written by vmesh: names below {suffix} are answered on this host.\nserver=/{suffix}/{ip}#{port}\n\
         rebind-domain-ok=/{suffix}/\n"
    )
}

/// What to tell the operator of a host with nothing but a `/etc/resolv.conf`.
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
/// So that without the block the file is what it was.
const BEGIN_WITHOUT_NEWLINE: &str =
    "# vmesh begin: written by vmesh, replaced whole (the line before had no end)";
const END: &str = "# vmesh end";

/// Why a hosts file is left as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadMarks {
    #[error(
        "line {line} of the hosts file begins a block of vmesh that nothing ends; write `{END}` below it, or remove the line"
    )]
    NoEnd { line: usize },
    #[error("line {line} of the hosts file ends a block of vmesh that nothing begins; remove the line")]
    NoBegin { line: usize },
    #[error("line {line} of the hosts file begins a second block of vmesh; remove one of them")]
    Second { line: usize },
}

/// `hosts`, the bytes of a hosts file, with one block for `table` between marks: in place of the block that is there, or at the
/// end. All other bytes stay. Of a name's addresses, the first of each family: the C library gives them all to everybody in the
/// same order, so that more would balance nothing.
pub fn with_hosts_block(hosts: &[u8], table: &Table) -> Result<Vec<u8>, BadMarks> {
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

/// `hosts` without our block, as it was before there was one.
pub fn without_hosts_block(hosts: &[u8]) -> Result<Vec<u8>, BadMarks> {
    let found = find(hosts)?;
    let before = hosts.get(..found.start).unwrap_or_default();
    let after = hosts.get(found.end..).unwrap_or_default();
    // What was added below the block since begins its own line.
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
            // Into a string, which does not fail.
            _ = writeln!(text, "{address} {name}.{suffix}");
        }
    }
    text.push_str(END);
    text.push('\n');
    text
}

/// The block and what it has put before itself, as bytes of the file; an empty range at its end if there is none.
struct Found {
    start: usize,
    end: usize,
    lacks_newline: bool,
}

fn find(hosts: &[u8]) -> Result<Found, BadMarks> {
    let mut at = 0_usize;
    let mut begun = None;
    let mut whole = None;
    for (index, line) in hosts.split_inclusive(|byte| *byte == b'\n').enumerate() {
        let number = index + 1;
        let text = line.trim_ascii_end();
        let begins = [BEGIN, BEGIN_WITHOUT_NEWLINE].iter().position(|mark| text == mark.as_bytes());
        if let Some(which) = begins {
            if begun.is_some() || whole.is_some() {
                return Err(BadMarks::Second { line: number });
            }
            begun = Some((number, at, which == 1));
        } else if text == END.as_bytes() {
            let (_, start, lacks_newline) = begun.take().ok_or(BadMarks::NoBegin { line: number })?;
            let start = if lacks_newline { start.saturating_sub(1) } else { start };
            whole = Some(Found { start, end: at + line.len(), lacks_newline });
        }
        at += line.len();
    }
    if let Some((line, ..)) = begun {
        return Err(BadMarks::NoEnd { line });
    }
    let lacks_newline = hosts.last().is_some_and(|byte| *byte != b'\n');
    Ok(whole.unwrap_or(Found { start: hosts.len(), end: hosts.len(), lacks_newline }))
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
            // Again is no change, and another table leaves nothing of the first.
            prop_assert_eq!(&with_hosts_block(&one, &table(&names)).unwrap(), &one);
            let other = with_hosts_block(&one, &table(&["other"])).unwrap();
            prop_assert_eq!(&other, &with_hosts_block(&hosts, &table(&["other"])).unwrap());
            prop_assert_eq!(without_hosts_block(&other).unwrap(), hosts.clone());
            prop_assert_eq!(without_hosts_block(&hosts).unwrap(), hosts);
        }
    }
}
