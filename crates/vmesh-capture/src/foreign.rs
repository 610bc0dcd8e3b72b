//! Judges foreign rules: how the host's own filter treats captured connections, from the listings of nft and
//! iptables.
//!
//! A redirected packet reaches the host's filter in another form: its destination is Envoy's port, and its
//! connection has been translated. So a filter may refuse it although it accepts the original packet (ufw
//! does not know port 15006), or accept it although it refuses the original packet (firewalld accepts
//! whatever was translated). [`inbound_conflicts`] finds both cases before a packet is lost. Once packets are lost,
//! [`inbound_suspects`] and [`outbound_suspects`] name the rules that may have dropped them.
//!
//! The rules are evaluated for imagined packets. This module is pure: it works on text, and limits how many
//! rules it follows. An unknown condition may hold or not. Rules that could not be read, and rules beyond the
//! limits, are never treated as "no filter": a port that cannot be judged is reported as
//! [`Conflict::Unjudged`].

mod conflicts;
mod iptables_listing;
mod nft_listing;
mod packet;
mod ruleset;
mod suspects;
#[cfg(test)]
mod tests;

pub use conflicts::{Conflict, InboundJudge, Judgement, inbound_conflicts};
pub(crate) use iptables_listing::is_iptables_over_nft;
pub use packet::{Packet, PacketHook};
pub use ruleset::{ForeignRule, Ruleset};
pub use suspects::{InboundSuspects, inbound_suspects, outbound_suspects, untracking_rule};

/// The limit of rules that are followed for all packets of one judgement together.
const MAX_STEPS_OF_ALL: usize = 4_000_000;
/// The limit of inbound port ranges that are judged. Ports that all rules treat alike form one range.
const MAX_JUDGED_RANGES: usize = 256;
