//! Imagined packets, and the conditions of rules that they are tested against.

use crate::spec::Ports;

/// The kernel hook at which a chain sees a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PacketHook {
    Prerouting,
    Input,
    Output,
}

/// An imagined TCP packet, and what is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    pub is_ipv4: bool,
    pub hook: PacketHook,
    /// True if the destination was translated before this hook. If not, the packet has its original
    /// addresses.
    pub is_translated: bool,
    pub to_port: Option<u16>,
    pub from_port: Option<u16>,
    /// True if this packet opens its connection.
    pub is_new: bool,
    /// True if the packet arrives or leaves over the loopback interface.
    pub over_loopback: bool,
    /// True if the source address belongs to no interface of this host.
    pub from_elsewhere: bool,
}

impl Packet {
    /// The first packet of a connection from another host, at the filter's `input` hook.
    pub(super) fn from_outside(is_ipv4: bool, port: u16, is_translated: bool) -> Packet {
        Packet {
            is_ipv4,
            hook: PacketHook::Input,
            is_translated,
            to_port: Some(port),
            from_port: None,
            is_new: true,
            over_loopback: false,
            from_elsewhere: true,
        }
    }
}

/// The result of a condition, in three-valued logic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tristate {
    Yes,
    No,
    Maybe,
}

impl Tristate {
    pub(super) fn of(known: bool) -> Tristate {
        if known { Tristate::Yes } else { Tristate::No }
    }

    pub(super) fn not(self) -> Tristate {
        match self {
            Tristate::Yes => Tristate::No,
            Tristate::No => Tristate::Yes,
            Tristate::Maybe => Tristate::Maybe,
        }
    }

    pub(super) fn and(self, other: Tristate) -> Tristate {
        match (self, other) {
            (Tristate::No, _) | (_, Tristate::No) => Tristate::No,
            (Tristate::Yes, Tristate::Yes) => Tristate::Yes,
            _ => Tristate::Maybe,
        }
    }
}

/// A condition of a foreign rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Condition {
    /// Tests whether the protocol is TCP.
    Tcp(bool),
    ToPorts(Vec<Ports>),
    FromPorts(Vec<Ports>),
    /// The packet's interface has this name.
    Interface {
        incoming: bool,
        name: String,
    },
    /// The conntrack state is one of these: `new`, `established`.
    State(Vec<String>),
    /// The destination was translated (DNAT).
    Translated,
    /// The source is an address of this host.
    FromThisHost,
    /// Tests whether the destination address belongs to this host.
    ToThisHost(bool),
    Not(Box<Condition>),
    Unknown,
}

impl Condition {
    pub(super) fn holds(&self, packet: &Packet) -> Tristate {
        let among = |ports: &[Ports], port: Option<u16>| match port {
            Some(port) => Tristate::of(ports.iter().any(|ports| ports.contains(port))),
            None => Tristate::Maybe,
        };
        match self {
            Condition::Tcp(tcp) => Tristate::of(*tcp),
            Condition::ToPorts(ports) => among(ports, packet.to_port),
            Condition::FromPorts(ports) => among(ports, packet.from_port),
            Condition::Interface { incoming, name } => {
                let incoming_hook = packet.hook != PacketHook::Output;
                match (*incoming == incoming_hook, name == "lo") {
                    (false, _) => Tristate::Maybe,
                    (true, true) => Tristate::of(packet.over_loopback),
                    (true, false) if packet.over_loopback => Tristate::No,
                    (true, false) => Tristate::Maybe,
                }
            }
            Condition::State(states) => {
                let now = if packet.is_new { "new" } else { "established" };
                Tristate::of(states.iter().any(|state| state == now))
            }
            Condition::Translated => Tristate::of(packet.is_translated),
            Condition::FromThisHost => match packet.from_elsewhere {
                true => Tristate::No,
                false => Tristate::Maybe,
            },
            Condition::ToThisHost(is) if packet.hook == PacketHook::Input => Tristate::of(*is),
            Condition::ToThisHost(_) => Tristate::Maybe,
            Condition::Not(condition) => condition.holds(packet).not(),
            Condition::Unknown => Tristate::Maybe,
        }
    }
}
