//! libFuzzer's loop around the target that the environment variable `VMESH_FUZZ_TARGET` names.

#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use vmesh_fuzz::Target;

fuzz_target!(|bytes: &[u8]| {
    static TARGET: OnceLock<&Target> = OnceLock::new();
    (TARGET.get_or_init(|| Target::from_environment()).run)(bytes);
});
