//! The libFuzzer process for the target in the environment variable `VMESH_FUZZ_TARGET`.

#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use vmesh_fuzz::Target;

fuzz_target!(|bytes: &[u8]| {
    static TARGET: OnceLock<&Target> = OnceLock::new();
    (TARGET.get_or_init(|| Target::from_environment()).run)(bytes);
});
