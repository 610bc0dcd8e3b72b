//! A DNS server for one zone on one host, which answers from memory.
//!
//! ```text
//! names -> VirtualIps -> Table -> answer(Table, query) -> response
//! ```
//!
//! | module | contents |
//! |---|---|
//! | [`virtual_ips`] | [`VirtualIps`]: computes an address for each name, the same on all hosts without shared state |
//! | [`table`] | [`Zone`] and [`Table`]: the names and their addresses; immutable |
//! | [`mod@answer`] | [`answer()`]: the response to one query, as an authoritative server |
//! | [`server`] | [`server::serve`]: UDP and TCP with limits; the only I/O |
//! | [`probe`] | checks whether a DNS server answers |
//! | [`host`] | configuration for systemd-resolved, dnsmasq or a hosts file that forwards the zone |
//!
//! All modules except [`server`] and [`probe`] are pure functions. The crate does not know what the names stand for.
//!
//! Invariants, each with a test:
//!
//! - A virtual address depends on its name alone. Other names matter only if two names want the same address.
//! - Nothing is forwarded; queries outside the zone are refused.
//! - Any input is answered or dropped, at bounded cost.

pub mod answer;
pub mod host;
#[cfg(feature = "server")]
pub mod probe;
#[cfg(feature = "server")]
pub mod server;
pub mod table;
pub mod virtual_ips;

pub use answer::{Transport, answer};
pub use table::{Addresses, Table, Zone};
pub use virtual_ips::{Ranges, VirtualIps};
