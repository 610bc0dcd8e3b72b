//! Fuzz targets: functions of bytes that come from another program, a peer or another user.
//!
//! A target panics if the code under test breaks a promise: it must terminate, stay within its limits, keep
//! the guarantees of its output, and never panic itself. `corpus/NAME/` contains the seeds of the target
//! NAME, and every input that ever broke it. `cargo test -p vmesh-fuzz` runs all of them without a fuzzer.
//!
//! ```text
//! cargo xtask fuzz                    every target for a minute, from the corpus
//! cargo xtask fuzz --seconds 3600     for an hour each
//! cargo xtask fuzz dns                one target
//! ```

#![expect(clippy::expect_used, reason = "a target ends by panicking where a promise is broken")]

mod capture;
mod consul;
mod dns;
mod documents;
mod files;
mod plugin;
mod state;
mod xds;
mod znodes;

use std::path::PathBuf;

/// A parser of untrusted bytes under test.
#[derive(Debug)]
pub struct Target {
    /// The name on the command line, and of the corpus directory.
    pub name: &'static str,
    /// Runs the code under test once. Panics if it breaks a promise.
    pub run: fn(&[u8]),
}

/// All targets, sorted by name.
pub const TARGETS: &[Target] = &[
    Target { name: "consul", run: consul::run },
    Target { name: "dns", run: dns::run },
    Target { name: "documents", run: documents::run },
    Target { name: "files", run: files::run },
    Target { name: "net_socket", run: capture::run },
    Target { name: "plugin", run: plugin::run },
    Target { name: "state", run: state::run },
    Target { name: "xds_delta", run: xds::run_delta },
    Target { name: "xds_sotw", run: xds::run_sotw },
    Target { name: "znodes", run: znodes::run },
];

/// The environment variable that selects the target in libFuzzer's process.
pub const ENVIRONMENT: &str = "VMESH_FUZZ_TARGET";

impl Target {
    /// Returns the target of that name.
    pub fn find(name: &str) -> Option<&'static Target> {
        TARGETS.iter().find(|target| target.name == name)
    }

    /// Returns the target that the environment variable names. Prints an error and exits if there is none.
    pub fn from_environment() -> &'static Target {
        let name = std::env::var(ENVIRONMENT).unwrap_or_default();
        Target::find(&name).unwrap_or_else(|| {
            let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            eprintln!("{ENVIRONMENT} is `{name}`, which is no target: set it to one of {}", names.join(", "));
            std::process::exit(2)
        })
    }

    /// Returns the directory of the seeds.
    pub fn corpus(&self) -> PathBuf {
        PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus")).join(self.name)
    }
}

/// Splits bytes at each `0xFF`, which no UTF-8 text contains, so that one input can contain several texts.
fn parts(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split(|byte| *byte == 0xff)
}

/// Checks that a text for terminals and logs contains no control character except the line feed.
fn assert_printable(text: &str) {
    let control = text.chars().find(|character| character.is_control() && *character != '\n');
    assert!(control.is_none(), "a message holds the control character {control:?}: {text:?}");
}
