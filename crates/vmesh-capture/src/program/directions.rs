//! The directions of connections.

use std::fmt;

/// The direction of a connection, as seen from this host. Each direction has its own listener in Envoy and
/// its own dead-man timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    Outbound,
    Inbound,
}

impl Direction {
    pub const BOTH: [Direction; 2] = [Direction::Outbound, Direction::Inbound];
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Direction::Outbound => "outbound",
            Direction::Inbound => "inbound",
        })
    }
}

/// A set of directions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Directions {
    pub outbound: bool,
    pub inbound: bool,
}

impl Directions {
    pub const NONE: Directions = Directions { outbound: false, inbound: false };
    pub const BOTH: Directions = Directions { outbound: true, inbound: true };

    pub fn only(direction: Direction) -> Directions {
        Directions::NONE.with(direction)
    }

    #[must_use]
    pub fn with(mut self, direction: Direction) -> Directions {
        match direction {
            Direction::Outbound => self.outbound = true,
            Direction::Inbound => self.inbound = true,
        }
        self
    }

    pub fn contains(self, direction: Direction) -> bool {
        match direction {
            Direction::Outbound => self.outbound,
            Direction::Inbound => self.inbound,
        }
    }

    pub fn is_empty(self) -> bool {
        self == Directions::NONE
    }

    /// Returns the directions that both sets contain.
    #[must_use]
    pub fn and(self, other: Directions) -> Directions {
        Directions { outbound: self.outbound && other.outbound, inbound: self.inbound && other.inbound }
    }

    pub fn iter(self) -> impl Iterator<Item = Direction> {
        Direction::BOTH.into_iter().filter(move |direction| self.contains(*direction))
    }
}

impl From<bool> for Directions {
    fn from(all: bool) -> Directions {
        if all { Directions::BOTH } else { Directions::NONE }
    }
}

impl FromIterator<Direction> for Directions {
    fn from_iter<I: IntoIterator<Item = Direction>>(directions: I) -> Directions {
        directions.into_iter().fold(Directions::NONE, Directions::with)
    }
}
