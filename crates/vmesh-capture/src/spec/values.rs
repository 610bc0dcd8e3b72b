//! The values in a spec that are written as text or as a number.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use vmesh_model::text::{parse_duration, show_duration};

/// A timeout from 3 s to 10 min, written `30s`. Whole seconds, because iptables supports nothing finer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seconds(u32);

impl Seconds {
    /// The default timeout of the dead-man timer.
    pub(super) const DEFAULT_TIMEOUT: Seconds = Seconds(30);

    pub fn get(self) -> u32 {
        self.0
    }

    pub fn duration(self) -> Duration {
        Duration::from_secs(self.0.into())
    }
}

impl TryFrom<Duration> for Seconds {
    type Error = String;

    fn try_from(duration: Duration) -> Result<Self, String> {
        match u32::try_from(duration.as_secs()) {
            Ok(seconds @ 3..=600) if duration.subsec_nanos() == 0 => Ok(Seconds(seconds)),
            _ => {
                Err(format!("{} is not a duration from 3s to 10m in whole seconds", show_duration(duration)))
            }
        }
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s", self.0)
    }
}

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse_duration(text)?.try_into()
    }
}

/// A share of new connections, from 0 to 100 percent. Whole numbers, because nftables draws from a hundred.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Percent(u8);

impl Percent {
    pub const ALL: Percent = Percent(100);

    /// Returns the share; `None` if it is above 100.
    pub fn new(percent: u8) -> Option<Percent> {
        (percent <= 100).then_some(Percent(percent))
    }

    pub fn get(self) -> u8 {
        self.0
    }
}

impl Default for Percent {
    fn default() -> Self {
        Percent::ALL
    }
}

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = u64::deserialize(deserializer)?;
        let percent = u8::try_from(number).ok().and_then(Percent::new);
        percent.ok_or_else(|| de::Error::custom(format!("{number} is not a percentage from 0 to 100")))
    }
}

/// One port or a range of ports: `8080`, `8000-8100`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ports {
    first: u16,
    last: u16,
}

impl Ports {
    /// Returns the range; `None` if it is empty or begins with port 0.
    pub fn range(first: u16, last: u16) -> Option<Ports> {
        (first > 0 && first <= last).then_some(Ports { first, last })
    }

    pub fn first(self) -> u16 {
        self.first
    }

    pub fn last(self) -> u16 {
        self.last
    }

    pub fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a port or a range of ports, such as 8080 or 8000-8100");
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let port = |text: &str| text.trim().parse::<u16>().map_err(|_| wrong());
        Ports::range(port(first)?, port(last)?).ok_or_else(wrong)
    }
}

/// The name of a network interface.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Interface(String);

impl Interface {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Interface {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // The kernel limits names to 15 bytes. `*` and `+` are wildcards for nft and iptables.
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '@' | ':');
        if (1..=15).contains(&text.len()) && text.chars().all(plain) {
            Ok(Interface(text.to_owned()))
        } else {
            Err(format!(
                "`{text}` is not the name of an interface: write the whole name, as `ip link` shows it"
            ))
        }
    }
}

/// A user or a group, by name or number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Account(String);

impl Account {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn number(&self) -> Option<u32> {
        self.0.parse().ok()
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Account {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '@' | '$');
        // A name with a leading `-` would be an option of the program that looks it up.
        let is_name = !text.starts_with('-') && text.chars().all(plain);
        if (1..=64).contains(&text.len()) && is_name {
            Ok(Account(text.to_owned()))
        } else {
            Err(format!("`{text}` is not the name or number of a user or group"))
        }
    }
}

/// A systemd unit that has a control group: a slice, a service or a scope.
///
/// Rules match a control group by an id that is lost when its unit stops. So next to a unit with an exclusion
/// or a share of its own, processes in control groups that the rules do not know yet bypass Envoy for real
/// addresses: see [`crate::host::ParentCgroup`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Unit(String);

impl Unit {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Unit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '@' | ':' | '\\');
        let kind = [".slice", ".service", ".scope"]
            .iter()
            .any(|kind| text.ends_with(kind) && text.len() > kind.len());
        if kind && text.len() <= 255 && text.chars().all(plain) {
            Ok(Unit(text.to_owned()))
        } else {
            Err(format!(
                "`{text}` is not a unit with processes: write the whole name, such as app.service or batch.slice"
            ))
        }
    }
}

/// Implements serde for types that are written as text. Values that look like numbers may be written as
/// numbers.
macro_rules! text {
    ($($name:ident: $expected:literal),+) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Text;

                impl Visitor<'_> for Text {
                    type Value = $name;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expected)
                    }

                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(E::custom)
                    }

                    fn visit_u64<E: de::Error>(self, number: u64) -> Result<$name, E> {
                        number.to_string().parse().map_err(E::custom)
                    }

                    fn visit_i64<E: de::Error>(self, number: i64) -> Result<$name, E> {
                        number.to_string().parse().map_err(E::custom)
                    }
                }

                deserializer.deserialize_any(Text)
            }
        }
    )+};
}

text!(
    Ports: "a port or a range of ports",
    Interface: "the name of an interface",
    Account: "the name or number of a user or group",
    Unit: "the name of a systemd unit",
    Seconds: "a duration, such as 30s"
);
