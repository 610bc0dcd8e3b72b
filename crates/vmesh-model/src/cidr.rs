//! Networks in CIDR notation.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// A network, such as `10.0.0.0/8`, or a single address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    address: IpAddr,
    length: u8,
}

impl Cidr {
    /// Returns an IPv4 network: its address and the number of bits that count.
    pub const fn v4(a: u8, b: u8, c: u8, d: u8, length: u8) -> Cidr {
        Cidr { address: IpAddr::V4(Ipv4Addr::new(a, b, c, d)), length }
    }

    /// Returns the IPv6 network whose address has only the first 16 bits set.
    pub const fn v6(first: u16, length: u8) -> Cidr {
        Cidr { address: IpAddr::V6(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0)), length }
    }

    /// Returns the first address of the network.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Returns the number of bits of an address that count.
    pub fn length(&self) -> u8 {
        self.length
    }

    pub fn is_ipv4(&self) -> bool {
        self.address.is_ipv4()
    }

    /// Returns the first and the last address, as numbers.
    pub fn span(&self) -> (u128, u128) {
        let (number, width) = number(self.address);
        let hosts = host_bits(width - u32::from(self.length));
        (number & !hosts, number | hosts)
    }

    /// Reports whether `address` is in the network. An IPv4 address is in no IPv6 network.
    pub fn contains(&self, address: IpAddr) -> bool {
        let (first, last) = self.span();
        let (number, _) = number(address);
        self.is_ipv4() == address.is_ipv4() && first <= number && number <= last
    }
}

fn number(address: IpAddr) -> (u128, u32) {
    match address {
        IpAddr::V4(address) => (u32::from(address).into(), 32),
        IpAddr::V6(address) => (u128::from(address), 128),
    }
}

/// Returns a number with the lowest `count` bits set.
fn host_bits(count: u32) -> u128 {
    1_u128.checked_shl(count).map_or(u128::MAX, |above| above - 1)
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = if self.is_ipv4() { 32 } else { 128 };
        if self.length == whole {
            write!(f, "{}", self.address)
        } else {
            write!(f, "{}/{}", self.address, self.length)
        }
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("`{text}` is not an address or a network, such as 10.1.2.3, 10.0.0.0/8 or fd00::/8");
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let (number, width) = number(address);
        let length = match length {
            Some(length) => {
                length.parse::<u8>().ok().filter(|length| u32::from(*length) <= width).ok_or_else(wrong)?
            }
            None => u8::try_from(width).map_err(|_| wrong())?,
        };
        let kept = number & !host_bits(width - u32::from(length));
        if kept != number {
            let network = match address {
                IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::from(u32::try_from(kept).map_err(|_| wrong())?)),
                IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from(kept)),
            };
            return Err(format!(
                "`{text}` has bits beyond its length: did you mean {network}/{length}, or {address}?"
            ));
        }
        Ok(Cidr { address, length })
    }
}

impl Serialize for Cidr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;

        impl Visitor<'_> for Text {
            type Value = Cidr;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an address or a network")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Cidr, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(Text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_contains_what_is_in_it() {
        let cidr = |text: &str| text.parse::<Cidr>().unwrap();
        assert!(cidr("10.0.0.0/8").contains("10.255.0.1".parse().unwrap()));
        assert!(!cidr("10.0.0.0/8").contains("11.0.0.0".parse().unwrap()));
        assert!(cidr("::/0").contains("fd00::1".parse().unwrap()));
        assert!(!cidr("::/0").contains("10.0.0.1".parse().unwrap()));
        assert!(cidr("fd00::1").contains("fd00::1".parse().unwrap()));
    }
}
