//! ZooKeeper records in every format, alone and in combination.

use vmesh_discovery::format::znode::{
    Member, RecordDirectory, RecordRules, ZnodeFormat, detect, may_be_record, read,
};

use crate::{assert_printable, parts};

/// The first byte selects the format. The parts of the rest are the nodes of one directory.
pub(crate) fn run(bytes: &[u8]) {
    let Some((choice, records)) = bytes.split_first() else { return };
    let formats = [
        ZnodeFormat::Auto,
        ZnodeFormat::ServerSet,
        ZnodeFormat::Curator,
        ZnodeFormat::Nerve,
        ZnodeFormat::Dubbo,
        ZnodeFormat::HostPort,
    ];
    let format = formats.get(usize::from(*choice) % formats.len()).copied().unwrap_or_default();
    let texts: Vec<String> =
        parts(records).take(8).map(|data| String::from_utf8_lossy(data).into_owned()).collect();
    // Dubbo stores its records in the names of nodes, the other formats in their data.
    let members: Vec<Member<'_>> = texts
        .iter()
        .zip(1..)
        .map(|(text, created)| Member {
            name: if text.is_empty() { "member_0000000001" } else { text },
            data: text.as_bytes(),
            is_ephemeral: created % 2 == 0,
            created,
            unreadable: None,
        })
        .collect();
    _ = detect(members.iter().copied());
    for member in &members {
        _ = may_be_record(format, member);
    }
    let directory = RecordDirectory { place: "zookeeper:services/orders", members };
    let found = read(format, &directory, &RecordRules::default());
    let subject = "service `orders`".into();
    for problem in found.problems(&subject) {
        assert_printable(&problem.to_string());
    }
}
