use std::net::IpAddr;

use domain::base::iana::{Class, Rtype};
use domain::base::{Message, MessageBuilder, Name};
use domain::rdata::AllRecordData;
use expect_test::{Expect, expect};
use proptest::prelude::*;

use super::*;
use crate::table::Zone;

fn table() -> Table {
    let addresses = |texts: &[&str]| texts.iter().map(|text| text.parse::<IpAddr>().unwrap()).collect();
    let many: Addresses = (0..40_u8).map(|n| IpAddr::from([240, 0, 1, n])).collect();
    let huge: Addresses = (0..512_u16).map(|n| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, n])).collect();
    let entries = [
        ("orders", addresses(&["240.0.0.1", "fd00::1"])),
        ("Payments", addresses(&["240.0.0.2"])),
        ("v6only", addresses(&["fd00::3"])),
        ("nothing", Addresses::default()),
        ("deep.below", addresses(&["240.0.0.4", "240.0.0.5", "240.0.0.6"])),
        ("many", many),
        ("huge", huge),
    ];
    let (table, problems) = Table::new(Zone { ttl: 30, ..Zone::default() }, entries);
    assert_eq!(problems, []);
    table
}

/// Builds a query from `name type [class] [edns=SIZE] [version=N] [do] [tcp] [id=N]`.
fn query(text: &str) -> (Vec<u8>, Transport) {
    let mut words = text.split(' ');
    let name: Name<Vec<u8>> = words.next().unwrap().parse().unwrap();
    let rtype: Rtype = words.next().unwrap().parse().unwrap();
    let mut class = Class::IN;
    let mut transport = Transport::Udp;
    let (mut size, mut version, mut dnssec_ok, mut id) = (None, 0, false, 0);
    for word in words {
        match word.split_once('=') {
            Some(("edns", value)) => size = Some(value.parse().unwrap()),
            Some(("version", value)) => version = value.parse().unwrap(),
            Some(("id", value)) => id = value.parse().unwrap(),
            _ if word == "tcp" => transport = Transport::Tcp,
            _ if word == "do" => dnssec_ok = true,
            _ => class = word.parse().unwrap(),
        }
    }
    let mut builder = MessageBuilder::new_vec();
    builder.header_mut().set_id(id);
    builder.header_mut().set_rd(true);
    let mut question = builder.question();
    question.push((name, rtype, class)).unwrap();
    let mut additional = question.additional();
    if let Some(size) = size {
        additional
            .opt(|opt| {
                opt.set_udp_payload_size(size);
                opt.set_version(version);
                opt.set_dnssec_ok(dnssec_ok);
                Ok(())
            })
            .unwrap();
    }
    (additional.finish(), transport)
}

fn show(response: &[u8]) -> String {
    let message = Message::from_slice(response).unwrap();
    let header = message.header();
    let flags = [("aa", header.aa()), ("tc", header.tc()), ("rd", header.rd()), ("ra", header.ra())];
    let flags: String = flags.into_iter().filter(|flag| flag.1).map(|flag| format!(" {}", flag.0)).collect();
    let mut shown = format!("{}{flags}, {} bytes", message.opt_rcode(), response.len());
    for question in message.question() {
        let question = question.unwrap();
        shown.push_str(&format!("\n  ? {} {} {}", question.qname(), question.qclass(), question.qtype()));
    }
    let (_, answer, authority, additional) = message.sections().unwrap();
    let mut records = 0;
    for (mark, section) in [("=", answer), ("!", authority), ("+", additional)] {
        for record in section.limit_to::<AllRecordData<_, _>>() {
            let record = record.unwrap();
            records += 1;
            if records > 4 {
                continue;
            }
            if record.rtype() == Rtype::OPT {
                let opt = message.opt().unwrap();
                let dnssec_ok = if opt.dnssec_ok() { " do" } else { "" };
                shown.push_str(&format!(
                    "\n  + EDNS {} {}{dnssec_ok}",
                    opt.version(),
                    opt.udp_payload_size()
                ));
                continue;
            }
            let (owner, ttl) = (record.owner(), record.ttl().as_secs());
            shown.push_str(&format!("\n  {mark} {owner} {ttl} {} {}", record.rtype(), record.data()));
        }
    }
    if records > 4 {
        shown.push_str(&format!("\n  {records} records"));
    }
    shown
}

fn check(queries: &[&str], expected: Expect) {
    let table = table();
    let shown = queries.iter().map(|text| {
        let (query, transport) = query(text);
        let response = answer(&table, &query, transport).unwrap();
        assert_eq!(response[..2], query[..2], "another id");
        format!("{text}\n  {}\n", show(&response))
    });
    expected.assert_eq(&shown.collect::<String>());
}

#[test]
fn a_name_has_its_addresses() {
    check(
        &[
            "orders.mesh A",
            "orders.mesh AAAA",
            "orders.mesh AAAA edns=4096 do",
            "payments.mesh A",
            "PaYmEnTs.MeSh A",
            "deep.below.mesh A id=1",
            "deep.below.mesh A id=65535",
            "orders.mesh ANY",
            "v6only.mesh ANY",
        ],
        expect![[r#"
            orders.mesh A
              NOERROR aa rd, 45 bytes
              ? orders.mesh IN A
              = orders.mesh 30 A 240.0.0.1
            orders.mesh AAAA
              NOERROR aa rd, 57 bytes
              ? orders.mesh IN AAAA
              = orders.mesh 30 AAAA fd00::1
            orders.mesh AAAA edns=4096 do
              NOERROR aa rd, 68 bytes
              ? orders.mesh IN AAAA
              = orders.mesh 30 AAAA fd00::1
              + EDNS 0 1232 do
            payments.mesh A
              NOERROR aa rd, 47 bytes
              ? payments.mesh IN A
              = payments.mesh 30 A 240.0.0.2
            PaYmEnTs.MeSh A
              NOERROR aa rd, 47 bytes
              ? PaYmEnTs.MeSh IN A
              = PaYmEnTs.MeSh 30 A 240.0.0.2
            deep.below.mesh A id=1
              NOERROR aa rd, 81 bytes
              ? deep.below.mesh IN A
              = deep.below.mesh 30 A 240.0.0.5
              = deep.below.mesh 30 A 240.0.0.6
              = deep.below.mesh 30 A 240.0.0.4
            deep.below.mesh A id=65535
              NOERROR aa rd, 81 bytes
              ? deep.below.mesh IN A
              = deep.below.mesh 30 A 240.0.0.4
              = deep.below.mesh 30 A 240.0.0.5
              = deep.below.mesh 30 A 240.0.0.6
            orders.mesh ANY
              NOERROR aa rd, 45 bytes
              ? orders.mesh IN ANY
              = orders.mesh 30 A 240.0.0.1
            v6only.mesh ANY
              NOERROR aa rd, 57 bytes
              ? v6only.mesh IN ANY
              = v6only.mesh 30 AAAA fd00::3
        "#]],
    );
}

#[test]
fn a_record_that_is_not_there_is_not_a_name_that_is_not_there() {
    check(
        &[
            "v6only.mesh A",
            "payments.mesh AAAA",
            "orders.mesh HTTPS",
            "orders.mesh SVCB",
            "orders.mesh SRV",
            "orders.MESH TXT",
            "nothing.mesh ANY",
            "below.mesh A",
            "mesh A",
        ],
        expect![[r#"
            v6only.mesh A
              NOERROR aa rd, 79 bytes
              ? v6only.mesh IN A
              ! mesh 5 SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            payments.mesh AAAA
              NOERROR aa rd, 81 bytes
              ? payments.mesh IN AAAA
              ! mesh 5 SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            orders.mesh HTTPS
              NOERROR aa rd, 79 bytes
              ? orders.mesh IN HTTPS
              ! mesh 5 SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            orders.mesh SVCB
              NOERROR aa rd, 79 bytes
              ? orders.mesh IN SVCB
              ! mesh 5 SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            orders.mesh SRV
              NOERROR aa rd, 79 bytes
              ? orders.mesh IN SRV
              ! mesh 5 SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            orders.MESH TXT
              NOERROR aa rd, 79 bytes
              ? orders.MESH IN TXT
              ! MESH 5 SOA MESH. nobody.invalid. 1 3600 1200 604800 5
            nothing.mesh ANY
              NOERROR aa rd, 80 bytes
              ? nothing.mesh IN ANY
              ! mesh 5 SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            below.mesh A
              NOERROR aa rd, 78 bytes
              ? below.mesh IN A
              ! mesh 5 SOA mesh. nobody.invalid. 1 3600 1200 604800 5
            mesh A
              NOERROR aa rd, 72 bytes
              ? mesh IN A
              ! mesh 5 SOA mesh. nobody.invalid. 1 3600 1200 604800 5
        "#]],
    );
}

#[test]
fn what_is_not_there_is_said_with_how_long_to_believe_it() {
    check(
        &["nope.mesh A", "x.orders.mesh AAAA edns=1232", "_http._tcp.Orders.Mesh SRV"],
        expect![[r#"
        nope.mesh A
          NXDOMAIN aa rd, 77 bytes
          ? nope.mesh IN A
          ! mesh 5 SOA mesh. nobody.invalid. 1 3600 1200 604800 5
        x.orders.mesh AAAA edns=1232
          NXDOMAIN aa rd, 92 bytes
          ? x.orders.mesh IN AAAA
          ! mesh 5 SOA mesh. nobody.invalid. 1 3600 1200 604800 5
          + EDNS 0 1232
        _http._tcp.Orders.Mesh SRV
          NXDOMAIN aa rd, 90 bytes
          ? _http._tcp.Orders.Mesh IN SRV
          ! Mesh 5 SOA Mesh. nobody.invalid. 1 3600 1200 604800 5
    "#]],
    );
}

#[test]
fn the_zone_says_what_it_is() {
    check(
        &["mesh SOA", "MESH NS", "mesh ANY", "orders.mesh SOA"],
        expect![[r#"
        mesh SOA
          NOERROR aa rd, 72 bytes
          ? mesh IN SOA
          = mesh 30 SOA mesh. nobody.invalid. 1 3600 1200 604800 5
        MESH NS
          NOERROR aa rd, 36 bytes
          ? MESH IN NS
          = MESH 30 NS MESH.
        mesh ANY
          NOERROR aa rd, 72 bytes
          ? mesh IN ANY
          = mesh 30 SOA mesh. nobody.invalid. 1 3600 1200 604800 5
        orders.mesh SOA
          NOERROR aa rd, 79 bytes
          ? orders.mesh IN SOA
          ! mesh 5 SOA mesh. nobody.invalid. 1 3600 1200 604800 5
    "#]],
    );
}

#[test]
fn nothing_outside_of_the_zone_is_answered() {
    check(
        &[
            "example.com A",
            "mesh.example.com A edns=1232",
            "ordersmesh A",
            "xmesh A",
            ". NS",
            "1.0.0.240.in-addr.arpa PTR",
            "orders.mesh A CH",
            "version.bind TXT CH",
            "mesh AXFR tcp",
            "mesh IXFR",
        ],
        expect![[r#"
            example.com A
              REFUSED rd, 29 bytes
              ? example.com IN A
            mesh.example.com A edns=1232
              REFUSED rd, 45 bytes
              ? mesh.example.com IN A
              + EDNS 0 1232
            ordersmesh A
              REFUSED rd, 28 bytes
              ? ordersmesh IN A
            xmesh A
              REFUSED rd, 23 bytes
              ? xmesh IN A
            . NS
              REFUSED rd, 17 bytes
              ?  IN NS
            1.0.0.240.in-addr.arpa PTR
              REFUSED rd, 40 bytes
              ? 1.0.0.240.in-addr.arpa IN PTR
            orders.mesh A CH
              REFUSED rd, 29 bytes
              ? orders.mesh CH A
            version.bind TXT CH
              REFUSED rd, 30 bytes
              ? version.bind CH TXT
            mesh AXFR tcp
              REFUSED rd, 22 bytes
              ? mesh IN AXFR
            mesh IXFR
              REFUSED rd, 22 bytes
              ? mesh IN IXFR
        "#]],
    );
}

#[test]
fn what_is_too_long_for_udp_is_asked_for_again_over_tcp() {
    check(
        &[
            "many.mesh A",
            "many.mesh A edns=0",
            "many.mesh A edns=600",
            "many.mesh A edns=699",
            "many.mesh A edns=700",
            "many.mesh A edns=4096",
            "many.mesh A tcp",
            "huge.mesh AAAA edns=65535",
            "huge.mesh AAAA edns=512 tcp",
        ],
        expect![[r#"
            many.mesh A
              NOERROR aa tc rd, 27 bytes
              ? many.mesh IN A
            many.mesh A edns=0
              NOERROR aa tc rd, 38 bytes
              ? many.mesh IN A
              + EDNS 0 1232
            many.mesh A edns=600
              NOERROR aa tc rd, 38 bytes
              ? many.mesh IN A
              + EDNS 0 1232
            many.mesh A edns=699
              NOERROR aa rd, 678 bytes
              ? many.mesh IN A
              = many.mesh 30 A 240.0.1.0
              = many.mesh 30 A 240.0.1.1
              = many.mesh 30 A 240.0.1.2
              = many.mesh 30 A 240.0.1.3
              41 records
            many.mesh A edns=700
              NOERROR aa rd, 678 bytes
              ? many.mesh IN A
              = many.mesh 30 A 240.0.1.0
              = many.mesh 30 A 240.0.1.1
              = many.mesh 30 A 240.0.1.2
              = many.mesh 30 A 240.0.1.3
              41 records
            many.mesh A edns=4096
              NOERROR aa rd, 678 bytes
              ? many.mesh IN A
              = many.mesh 30 A 240.0.1.0
              = many.mesh 30 A 240.0.1.1
              = many.mesh 30 A 240.0.1.2
              = many.mesh 30 A 240.0.1.3
              41 records
            many.mesh A tcp
              NOERROR aa rd, 667 bytes
              ? many.mesh IN A
              = many.mesh 30 A 240.0.1.0
              = many.mesh 30 A 240.0.1.1
              = many.mesh 30 A 240.0.1.2
              = many.mesh 30 A 240.0.1.3
              40 records
            huge.mesh AAAA edns=65535
              NOERROR aa tc rd, 38 bytes
              ? huge.mesh IN AAAA
              + EDNS 0 1232
            huge.mesh AAAA edns=512 tcp
              NOERROR aa rd, 14374 bytes
              ? huge.mesh IN AAAA
              = huge.mesh 30 AAAA fd00::
              = huge.mesh 30 AAAA fd00::1
              = huge.mesh 30 AAAA fd00::2
              = huge.mesh 30 AAAA fd00::3
              513 records
        "#]],
    );
}

#[test]
fn another_version_of_edns_is_told_ours() {
    check(
        &["orders.mesh A edns=1232 version=1", "example.com A edns=1232 version=255"],
        expect![[r#"
        orders.mesh A edns=1232 version=1
          BADVERS rd, 40 bytes
          ? orders.mesh IN A
          + EDNS 0 1232
        example.com A edns=1232 version=255
          BADVERS rd, 40 bytes
          ? example.com IN A
          + EDNS 0 1232
    "#]],
    );
}

/// Returns the response to a query for `orders.mesh A` after `change` has modified its bytes.
fn changed(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let (mut query, _) = query("orders.mesh A id=258");
    change(&mut query);
    answer(&table(), &query, Transport::Udp).map_or("nothing".to_owned(), |response| show(&response))
}

#[test]
fn what_is_no_query_is_answered_as_the_rfc_says_or_not_at_all() {
    let opt = [0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0];
    let add = |query: &mut Vec<u8>, records: &[&[u8]]| {
        query[11] = u8::try_from(records.len()).unwrap();
        query.extend(records.concat());
    };
    let cases = [
        ("eleven bytes", changed(|query| query.truncate(11))),
        ("a response", changed(|query| query[2] |= 0x80)),
        ("a header alone", changed(|query| query.truncate(12))),
        ("no question", changed(|query| query[5] = 0)),
        ("two questions", changed(|query| query[5] = 2)),
        ("a question cut short", changed(|query| query.truncate(20))),
        ("a question that points at itself", changed(|query| query[12..14].copy_from_slice(&[0xc0, 12]))),
        (
            "a question that points into the header",
            changed(|query| query[12..14].copy_from_slice(&[0xc0, 4])),
        ),
        ("a label of a reserved kind", changed(|query| query[12] = 0x40)),
        ("a notify", changed(|query| query[2] |= 4 << 3)),
        (
            "an update that cannot be read",
            changed(|query| {
                query[2] |= 5 << 3;
                query[5] = 9
            }),
        ),
        ("an additional record that is not there", changed(|query| query[11] = 1)),
        ("one OPT", changed(|query| add(query, &[&opt]))),
        ("two OPTs", changed(|query| add(query, &[&opt, &opt]))),
        ("an OPT of a name", changed(|query| add(query, &[&[&[1, b'x'], opt.as_slice()].concat()]))),
        (
            "an OPT with half an option",
            changed(|query| {
                add(query, &[&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 3, 0, 10, 0]]);
            }),
        ),
        (
            "an OPT with a cookie",
            changed(|query| {
                add(query, &[&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 12, 0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8]]);
            }),
        ),
        (
            "another record before the OPT",
            changed(|query| {
                add(query, &[&[0xc0, 12, 0, 16, 0, 1, 0, 0, 0, 0, 0, 0], &opt]);
            }),
        ),
        ("bytes behind the end", changed(|query| query.extend([1, 2, 3]))),
    ];
    let shown: String = cases.iter().map(|(what, became)| format!("{what}\n  {became}\n")).collect();
    expect![[r#"
        eleven bytes
          nothing
        a response
          nothing
        a header alone
          FORMERR rd, 12 bytes
        no question
          FORMERR rd, 12 bytes
        two questions
          FORMERR rd, 12 bytes
        a question cut short
          FORMERR rd, 12 bytes
        a question that points at itself
          FORMERR rd, 12 bytes
        a question that points into the header
          FORMERR rd, 12 bytes
        a label of a reserved kind
          FORMERR rd, 12 bytes
        a notify
          NOTIMP rd, 29 bytes
          ? orders.mesh IN A
        an update that cannot be read
          NOTIMP rd, 12 bytes
        an additional record that is not there
          FORMERR rd, 12 bytes
        one OPT
          NOERROR aa rd, 56 bytes
          ? orders.mesh IN A
          = orders.mesh 30 A 240.0.0.1
          + EDNS 0 1232
        two OPTs
          FORMERR rd, 12 bytes
        an OPT of a name
          FORMERR rd, 12 bytes
        an OPT with half an option
          FORMERR rd, 12 bytes
        an OPT with a cookie
          NOERROR aa rd, 56 bytes
          ? orders.mesh IN A
          = orders.mesh 30 A 240.0.0.1
          + EDNS 0 1232
        another record before the OPT
          NOERROR aa rd, 56 bytes
          ? orders.mesh IN A
          = orders.mesh 30 A 240.0.0.1
          + EDNS 0 1232
        bytes behind the end
          NOERROR aa rd, 45 bytes
          ? orders.mesh IN A
          = orders.mesh 30 A 240.0.0.1
    "#]]
    .assert_eq(&shown);
}

/// Generates bytes that resemble a query, so that parsing gets beyond the header.
fn nearly_a_query() -> impl Strategy<Value = Vec<u8>> {
    const TEXTS: &[&str] =
        &["orders.mesh A edns=1232 do", "many.mesh A", "a.b.c.d.mesh ANY edns=512", "example.com TXT"];
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    let tail = prop::collection::vec(any::<u8>(), 0..40);
    (prop::sample::select(TEXTS), changes, tail, any::<prop::sample::Index>()).prop_map(
        |(text, changes, tail, cut)| {
            let (mut bytes, _) = query(text);
            bytes.extend(tail);
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            bytes.truncate(bytes.len().saturating_sub(cut.index(30)));
            bytes
        },
    )
}

fn holds(bytes: &[u8]) {
    let table = table();
    for (transport, most) in [(Transport::Udp, MAX_UDP), (Transport::Tcp, 65_535)] {
        let Some(response) = answer(&table, bytes, transport) else {
            assert!(bytes.len() < 12 || bytes[2] & 0x80 != 0, "no response to a query");
            continue;
        };
        assert!(response.len() <= most);
        assert_eq!(response[..2], bytes[..2]);
        // The response can be parsed, and is itself not answered.
        show(&response);
        assert_eq!(answer(&table, &response, transport), None);
        let message = Message::from_slice(&response).unwrap();
        if let Some(Ok(question)) = message.question().next() {
            let end = 12 + question.qname().iter().map(|label| label.len() + 1).sum::<usize>() + 4;
            assert_eq!(response[12..end], bytes[12..end], "another question");
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_are_answered_or_dropped(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        holds(&bytes);
    }

    #[test]
    fn whatever_is_nearly_a_query_is_answered_or_dropped(bytes in nearly_a_query()) {
        holds(&bytes);
    }
}
