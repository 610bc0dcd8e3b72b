//! Real servers and programs that the tests, the demo and the benchmarks run against, and the means to
//! disturb them.
//!
//! | module | contents |
//! |---|---|
//! | [`api`] | a client of the HTTP API of a control plane under test |
//! | [`envoy`] | the pinned Envoy, found or fetched; `--mode validate`; a client of the admin interface |
//! | [`cargo_tool`] | cargo's own tools: nextest, cargo-deny |
//! | [`debian`](mod@debian) | programs from Debian packages, identified by their hash |
//! | [`consul`] | real Consul servers: one or three, with ACLs and TLS |
//! | [`python`] | a Python with pinned packages, for gRPC's own xDS client |
//! | [`app`] | [`app::HttpApp`]: an HTTP application that can be made slow, failing or dead |
//! | [`hosts`] | booted hosts: a real systemd as PID 1, packages, power cuts |
//! | [`load`] | [`load::Load`]: requests at a given rate, and their results |
//! | [`process`] | [`process::Daemon`]: a program under test with its output, signals and exit status |
//! | [`servers`] | the servers of a registry, which can be killed, stopped and restarted |
//! | [`registry`] | a registry of either kind, for tests that must pass with both |
//! | [`netns`] | network namespaces as hosts on a switch, and the tools for their rules |
//! | [`place`] | addresses, ports and directories that no other test uses |
//! | [`zookeeper`] | real ZooKeeper servers, current and old; a client for tests |
//! | [`wait`] | [`wait_for`]: waits for a value with a time limit, and reports the last value |
//!
//! A missing tool is fetched, or causes an error with the command that installs it. Nothing is ever skipped.
//!
//! Applications and load run on threads of their own ([`background`]), so a test that blocks does not delay
//! them.

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

/// Returns the runtime that applications and load run on.
pub fn background() -> Result<Handle> {
    static RUNTIME: OnceLock<std::io::Result<Runtime>> = OnceLock::new();
    let start = || Builder::new_multi_thread().worker_threads(2).thread_name("testkit").enable_all().build();
    match RUNTIME.get_or_init(start) {
        Ok(runtime) => Ok(runtime.handle().clone()),
        Err(error) => Err(Failed::new(format!("could not start the runtime of the test kit: {error}"))),
    }
}
