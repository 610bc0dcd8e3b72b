//! Requests on `net.sock`, and the compilation of a spec to rules by either backend.

use vmesh_capture::{Host, Program, Stage, iptables, nft};
use vmesh_net::protocol::{CaptureRequest, Request};

pub(crate) fn run(bytes: &[u8]) {
    let Ok(ask) = serde_json::from_slice::<Request>(bytes) else { return };
    let text = serde_json::to_vec(&ask).expect("what was read can be written");
    let again: Request = serde_json::from_slice(&text).expect("what was written can be read");
    assert_eq!(ask, again, "a question changes when it is written and read");
    if let Request::Want(want) | Request::Plan { want: Some(want) } = ask {
        rules(&want);
    }
}

/// Checks that every spec that can be parsed compiles to rules or is rejected.
fn rules(want: &CaptureRequest) {
    let host = Host { ipv6: true, ..Host::default() };
    for stage in [Stage::Trial, Stage::Confirmed] {
        let Ok((program, _)) = Program::new(&want.spec, &host, stage) else { continue };
        let plan = nft::plan(&program, &nft::NftRules::absent(), true);
        assert!(program.is_absent() || !plan.is_empty(), "a program that has rules plans none");
        _ = iptables::plan(&program, &iptables::IptablesRules::absent(true));
    }
}
