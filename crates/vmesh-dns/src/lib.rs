//! The names of one zone on one host, answered from memory.
//!
//! ```text
//! names -> VirtualIps -> Table -> answer(Table, query) -> response
//! ```
//!
//! | module | what is in it |
//! |---|---|
//! | [`virtual_ips`] | [`VirtualIps`]: an address for a name, the same everywhere, with nothing shared |
//! | [`table`] | [`Zone`] and [`Table`]: which names there are, and their addresses; immutable, replaced whole |
//! | [`mod@answer`] | [`answer()`]: one query to one response, as an authoritative server gives it |
//! | [`server`] | [`server::serve`]: UDP and TCP, with limits; the only I/O |
//! | [`host`] | texts that make systemd-resolved, dnsmasq or a hosts file know the zone |
//!
//! All but [`server`] are functions of their arguments. The crate knows names and addresses, and not what they are for.
//!
//! What holds, each shown by a test:
//!
//! - A virtual address depends on its name alone; other names matter only where two want the same address.
//! - Nothing is forwarded, and what is outside of the zone is refused.
//! - Any bytes are answered or dropped; none cost more than a bounded answer.

pub mod answer;
#[cfg(feature = "server")]
pub mod ask;
pub mod host;
#[cfg(feature = "server")]
pub mod server;
pub mod table;
pub mod virtual_ips;

pub use answer::{Transport, answer};
pub use table::{Addresses, Table, Zone};
pub use virtual_ips::{Ranges, VirtualIps};
