//! The real things that tests, the demo and the benches run against, and what they do to them.
//!
//! | module | what is in it |
//! |---|---|
//! | [`api`] | the HTTP API of a control plane under test |
//! | [`envoy`] | the pinned Envoy, found or fetched; `--mode validate`; an admin client |
//! | [`cargo_tool`] | cargo's own tools: nextest, cargo-deny |
//! | [`debian`](mod@debian) | servers from Debian's packages, by their hash |
//! | [`consul`] | real Consul servers: one or three, with ACLs and TLS |
//! | [`python`] | a Python with pinned packages, for gRPC's own xDS client |
//! | [`app`] | [`app::HttpApp`]: an HTTP application that can be slow, ill or killed |
//! | [`hosts`] | hosts that are booted: a real systemd as PID 1, packages, power cuts |
//! | [`load`] | [`load::Load`]: requests at a rate, and what became of each |
//! | [`process`] | [`process::Daemon`]: a binary under test, its output, its signals, its end |
//! | [`servers`] | the servers of a registry, and what tests do to them |
//! | [`registry`] | a registry of either kind, for what is to work alike with both |
//! | [`netns`] | network namespaces as hosts on a switch, and the tools for their rules |
//! | [`place`] | addresses, ports and directories that no other test uses |
//! | [`zookeeper`] | real ZooKeepers, of today and of long ago; a client for tests |
//! | [`wait`] | [`wait_for`]: waits for a value, with a bound, and says what it saw last |
//!
//! A tool that is missing is fetched or is an error that says which command installs it; nothing here skips.
//!
//! Applications and load run on threads of their own ([`background`]), so a test that blocks cannot make them fail.

pub mod api;
pub mod app;
mod cache;
pub mod cargo_tool;
pub mod consul;
pub mod debian;
pub mod envoy;
mod failed;
pub mod hosts;
pub mod load;
pub mod netns;
pub mod place;
pub mod process;
pub mod python;
pub mod registry;
pub mod servers;
pub mod wait;
pub mod zookeeper;

use std::sync::OnceLock;

use tokio::runtime::{Builder, Handle, Runtime};

pub use failed::{Failed, Result};
pub use place::{Loopback, TempDir, free_port, tempdir};
pub use wait::wait_for;

/// The runtime of applications and load.
pub fn background() -> Result<Handle> {
    static RUNTIME: OnceLock<std::io::Result<Runtime>> = OnceLock::new();
    let start = || Builder::new_multi_thread().worker_threads(2).thread_name("testkit").enable_all().build();
    match RUNTIME.get_or_init(start) {
        Ok(runtime) => Ok(runtime.handle().clone()),
        Err(error) => Err(Failed::new(format!("could not start the runtime of the test kit: {error}"))),
    }
}
