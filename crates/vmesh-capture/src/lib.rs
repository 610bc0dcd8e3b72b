//! Traffic capture: decides which connections of a host go through its Envoy, and plans, applies, watches and
//! removes the nftables or iptables rules that send them there.
//!
//! ```text
//! Spec + Host -> Program -> plan(Program, Actual) -> Plan -> Applier -> the kernel -> Actual
//! ```
//!
//! | module | contents |
//! |---|---|
//! | [`spec`] | [`Spec`]: the captured traffic that operators and the control plane ask for; parsed strictly |
//! | [`host`] | [`Host`]: the facts of this host that rules depend on, and the traffic that is never captured |
//! | [`program`] | [`Program`]: chains of rules for neither tool in particular; the parts of a spec that have no effect here |
//! | [`nft`] | the nftables backend: one table of vmesh's own, replaced in one transaction |
//! | [`iptables`] | the iptables and ip6tables backend: chains of vmesh's own |
//! | [`mod@plan`] | [`Plan`]: the differences by name, and the transactions that remove them; the output of `--dry-run` |
//! | [`confirm`] | trials that must be confirmed, the dead-man timer, and draining; takes the time as an argument |
//! | [`machine`] | [`machine::Machine`]: the state machine that turns events into actions on the host |
//! | [`apply`] | [`apply::Applier`]: runs the tools; with [`facts`], the only I/O of this crate |
//! | [`arrivals`] | counts redirected connections from outside before and after the host's own filter |
//! | [`foreign`] | foreign rules: what they do with captured connections, and which of them drops these |
//! | [`generations`] | the generation number of the kernel's nftables state, and the process that made the last one |
//! | [`facts`] | reads a [`Host`] from `/proc`, systemd and `getent` |
//! | [`units`] | the control groups of systemd units, as systemd reports them |
//! | [`programs`] | finds a program by name in trusted directories, and runs it with a clean environment |
//!
//! `bypass.sh` removes all rules of vmesh without the help of any of this.
//!
//! These properties hold; each is shown by a test in `tests/packets` with real packets:
//!
//! - Rules match new connections only (pure SYNs; TPROXY ignores packets that have a socket). A connection
//!   that was open when rules were added, changed or removed stays open. The exception is the removal of the
//!   last redirect: it resets the connections through it, so [`Program::drained`] is applied first.
//! - SSH, the control planes, and the ports and users of Envoy and the agent are never captured, whatever is
//!   configured.
//! - A redirect that may fail open lapses by the kernel's own clock.
//! - After `off`, the ruleset is byte for byte the one from before the first apply.
//!
//! **Where permissive and strict mTLS act**: connections to [`spec::Inbound::ports`] reach Envoy's listener
//! at 15006 in plaintext or TLS, and that listener decides. [`spec::Inbound::strict`] makes the kernel refuse
//! connections that would bypass Envoy.
//!
//! According to the kernel's changelogs, nftables needs Linux 5.2 (redirects in `inet` tables), and rules by
//! control group need 5.7. The crate was tested on one kernel (6.18), with nft 1.0.6 and iptables 1.8.9.

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
