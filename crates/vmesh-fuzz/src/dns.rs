//! DNS queries to the agent, which any process on the host can send.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::OnceLock;

use domain::base::Message;
use vmesh_dns::answer::MAX_UDP;
use vmesh_dns::{Addresses, Table, Transport, Zone, answer};

pub(crate) fn run(bytes: &[u8]) {
    for transport in [Transport::Udp, Transport::Tcp] {
        let Some(response) = answer(table(), bytes, transport) else { continue };
        assert!(
            transport == Transport::Tcp || response.len() <= MAX_UDP,
            "{} bytes over UDP",
            response.len()
        );
        assert!(response.len() <= usize::from(u16::MAX), "{} bytes over TCP", response.len());
        let message = Message::from_octets(response.as_slice()).expect("the response has a header");
        assert!(message.header().qr(), "the response does not say that it is one");
        assert_eq!(bytes.get(..2), response.get(..2), "the response has another id than the query");
        assert!(message.question().all(|question| question.is_ok()), "the question cannot be read back");
        let sections = message.sections().expect("the response can be read back");
        for records in [sections.1, sections.2, sections.3] {
            assert!(records.limit_to::<domain::rdata::AllRecordData<_, _>>().all(|record| record.is_ok()));
        }
    }
}

/// Returns a table with a name with one address, a name with many, and a name with two labels.
fn table() -> &'static Table {
    static TABLE: OnceLock<Table> = OnceLock::new();
    TABLE.get_or_init(|| {
        let one = |last: u8| IpAddr::from(Ipv4Addr::new(240, 0, 0, last));
        let many = (0..600u16).map(|last| IpAddr::from(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last)));
        let entries = [
            ("orders", Addresses::from_iter([one(1)])),
            ("many", many.chain((0..=255).map(one)).collect()),
            ("v2.payments", Addresses::from_iter([one(2)])),
        ];
        Table::new(Zone::default(), entries).0
    })
}
