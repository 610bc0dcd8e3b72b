//! Which connections of a host go through its Envoy, said to the kernel: planned, applied, watched, taken away.
//!
//! ```text
//! Spec + Host -> Program -> plan(Program, Actual) -> Plan -> Applier -> the kernel -> Actual
//! ```
//!
//! | module | what is in it |
//! |---|---|
//! | [`spec`] | [`Spec`]: what operators and the control plane want; parsed strictly |
//! | [`host`] | [`Host`]: what has to be known of the host; what is never captured |
//! | [`program`] | [`Program`]: chains of rules, of no particular tool; what of a spec cannot be had here |
//! | [`nft`] | nftables: our own table, in one transaction |
//! | [`iptables`] | iptables and ip6tables: our own chains |
//! | [`mod@plan`] | [`Plan`]: the differences, by name, and the transactions that end them; what `--dry-run` prints |
//! | [`confirm`] | commit-confirm, the dead-man, taking leave: told the time |
//! | [`machine`] | [`machine::Machine`]: decides when what is done to a host; told events, it answers with actions |
//! | [`apply`] | [`apply::Applier`]: the only I/O, with [`facts`] |
//! | [`arrivals`] | counts what is redirected from outside, before and after the host's own filter |
//! | [`foreign`] | rules of others: what they do with captured connections, and which of them is in the way |
//! | [`generations`] | the number of the state of nftables, and who made it what it is |
//! | [`facts`] | reads a [`Host`] from `/proc`, systemd and `getent` |
//! | [`units`] | the control groups of systemd's units, as systemd says them |
//! | [`programs`] | which program is run under a name, and with what environment |
//!
//! `bypass.sh` takes everything away with none of this working.
//!
//! What holds, each shown by a test in `tests/packets.rs` with real packets:
//!
//! - Only new connections are touched (pure SYNs; TPROXY leaves alone what has a socket). What was open when rules came, changed or
//!   went stays open. Only when the last of a redirect goes, what goes through it is reset: [`Program::drained`] comes before.
//! - SSH, the control planes, Envoy's and the agent's ports and users are never captured, whatever is configured.
//! - A redirect that may fail open does so by the kernel's own clock.
//! - After `off`, the host's rules are byte by byte what they were.
//!
//! **Where permissive and strict will act** (with mTLS): what is captured in [`spec::Inbound::ports`] reaches Envoy in plaintext
//! or TLS, and Envoy's listener at 15006 decides; [`spec::Inbound::strict`] sees to it in the kernel that nothing comes past it.
//!
//! Linux 5.2 or later for nftables (redirects in `inet` tables), 5.7 for control groups in its rules: so the changelogs of the
//! kernel say; it has been run on one kernel (6.18), with nft 1.0.6 and iptables 1.8.9.

pub mod apply;
pub mod arrivals;
pub mod confirm;
pub mod facts;
pub mod foreign;
pub mod generations;
pub mod host;
pub mod iptables;
pub mod machine;
pub mod nft;
pub mod plan;
pub mod program;
pub mod programs;
pub mod sockets;
pub mod spec;
pub mod units;

pub use host::Host;
pub use plan::Plan;
pub use program::{Direction, Directions, Note, Program, Stage};
pub use spec::Spec;
