//! Service files: native, Prometheus, Linkerd, SmartStack, and the detection of the format.

use std::sync::Arc;

use vmesh_discovery::format::{Format, ParseResult, parse};

use crate::assert_printable;

/// The size limit of a file, far above the inputs of the fuzzer.
const LIMIT: usize = 1 << 20;

/// The first byte selects the format, and whether the file's name ends in `.yaml`.
pub(crate) fn run(bytes: &[u8]) {
    let Some((choice, text)) = bytes.split_first() else { return };
    let formats = [Format::Auto, Format::Native, Format::Prometheus, Format::Linkerd, Format::SmartStack];
    let format = formats.get(usize::from(choice >> 1) % formats.len()).copied().unwrap_or_default();
    let (file, is_yaml) = (Arc::from("services.d/orders.yaml"), choice & 1 == 1);
    let (parsed, found) = parse(&file, "orders", is_yaml, text, LIMIT, format, None);
    check(&parsed, text.len());
    // A detected format must parse the same text in the same way again.
    let (again, kept) = parse(&file, "orders", is_yaml, text, LIMIT, format, found);
    assert_eq!((&parsed, found), (&again, kept), "the same text was read differently the second time");
}

/// Checks the properties that hold for every format, given a text of `len` bytes.
pub(crate) fn check(parsed: &ParseResult, len: usize) {
    for problem in &parsed.problems {
        assert_printable(&problem.to_string());
    }
    assert!(!parsed.has_failed() || !parsed.problems.is_empty(), "nothing says why the text cannot be used");
    assert!(parsed.services.len() <= len + 1, "{} services of {len} bytes", parsed.services.len());
    let endpoints: usize = parsed.services.iter().map(|service| service.endpoints.len()).sum();
    assert!(endpoints <= len, "{endpoints} endpoints of {len} bytes");
}
