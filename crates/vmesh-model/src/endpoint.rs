//! One instance of a service.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::{NonZeroU16, NonZeroU32};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Free-form labels of an endpoint or a node, sorted so that equal labels have equal text.
pub type Labels = BTreeMap<Arc<str>, Arc<str>>;

/// One instance of a service, with an IP address to which Envoy can connect. A discovery source resolves
/// hostnames.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Endpoint {
    pub address: SocketAddr,
    /// The hostname that resolved to `address`, if the source lists a hostname.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<Arc<str>>,
    pub weight: Weight,
    pub health: Health,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<Arc<str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<Arc<str>>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: Labels,
    /// The discovery source that lists the endpoint, such as `file:/etc/vmesh/services.d`.
    pub source: Arc<str>,
}

/// An endpoint's share of traffic, relative to the other endpoints of the service.
///
/// Envoy rejects a weight of 0, and the whole assignment with it, so 0 in a source means
/// [`Health::Draining`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Weight(NonZeroU32);

impl Weight {
    pub const ONE: Weight = Weight(NonZeroU32::MIN);
    /// The largest weight. Envoy adds the weights of a locality in 32 bits, which leaves room for 4,000
    /// endpoints of this weight.
    pub const MAX: u32 = 1_000_000;

    /// Returns `None` for 0 and for more than [`Weight::MAX`].
    pub fn new(weight: u32) -> Option<Weight> {
        NonZeroU32::new(weight).filter(|w| w.get() <= Self::MAX).map(Weight)
    }

    pub fn get(self) -> u32 {
        self.0.get()
    }
}

impl Default for Weight {
    fn default() -> Self {
        Weight::ONE
    }
}

/// The health of an endpoint according to discovery. An unhealthy endpoint is listed rather than removed,
/// because Envoy's panic threshold depends on the share of unhealthy endpoints.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    #[default]
    Unknown,
    Healthy,
    Unhealthy,
    /// The endpoint receives no new requests, and finishes those in flight.
    Draining,
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Health::Unknown => "unknown",
            Health::Healthy => "healthy",
            Health::Unhealthy => "unhealthy",
            Health::Draining => "draining",
        })
    }
}

/// The address of an instance as a source lists it, with an unresolved host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    pub host: Host,
    pub port: NonZeroU16,
}

/// The host part of an [`Address`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Host {
    Ip(IpAddr),
    /// A hostname. It is resolved repeatedly, because a restarted container has another address.
    Name(Arc<str>),
}

const LINK_LOCAL: &str = "a link-local address means another host on every link, and says not on which";

/// Returns `ip` in canonical form, with IPv4-mapped IPv6 (`::ffff:10.0.0.1`) as IPv4. The error states why no
/// other host can connect to it.
///
/// Parsing accepts such an address, because its record is well-formed. Discovery calls this function when it
/// turns records into endpoints, both for listed addresses and for addresses that a hostname resolves to.
pub fn dialable(ip: IpAddr) -> Result<IpAddr, String> {
    let ip = ip.to_canonical();
    let why = match ip {
        IpAddr::V4(v4) if v4.octets()[0] == 0 => "it stands for no host, or for all addresses of one",
        IpAddr::V4(v4) if v4.is_broadcast() => "it is the broadcast address",
        IpAddr::V6(v6) if v6.is_unspecified() => "it stands for all addresses of a host",
        IpAddr::V4(v4) if v4.is_link_local() => LINK_LOCAL,
        IpAddr::V6(v6) if v6.is_unicast_link_local() => LINK_LOCAL,
        ip if ip.is_multicast() => "it is a multicast address",
        ip => return Ok(ip),
    };
    Err(format!("`{ip}` is not an address that can be dialled: {why}"))
}

impl Host {
    /// Parses an IP address, a short form of `inet_aton` (`127.1`), or a DNS name. IPv4-mapped IPv6 becomes
    /// IPv4, so that two spellings of an address are equal. [`dialable`] checks whether other hosts can
    /// connect to the address.
    pub fn parse(text: &str) -> Result<Host, String> {
        let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
        if let Ok(ip) = bare.parse::<IpAddr>() {
            return Ok(Host::Ip(ip.to_canonical()));
        }
        let neither = || format!("`{}` is neither an IP address nor a host name", crate::yaml::short(text));
        // A name whose last label is a number is an IPv4 address or an error, but never a DNS name (RFC 1123,
        // 2.1).
        let last = text.trim_end_matches('.').rsplit('.').next().unwrap_or_default();
        let is_hexadecimal = last.strip_prefix("0x").or(last.strip_prefix("0X"));
        let is_hexadecimal =
            is_hexadecimal.is_some_and(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
        if is_hexadecimal || (!last.is_empty() && last.bytes().all(|b| b.is_ascii_digit())) {
            if text.split('.').any(|part| part.len() > 1 && part.starts_with('0')) {
                return Err(format!(
                    "`{}`: a number that begins with 0 is octal, or hexadecimal, to some and decimal to others: write it without",
                    crate::yaml::short(text)
                ));
            }
            return Ok(Host::Ip(short_ipv4(text).ok_or_else(neither)?.into()));
        }
        let label = |l: &str| {
            (1..=63).contains(&l.len())
                && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
                && !l.starts_with('-')
                && !l.ends_with('-')
        };
        let name = text.strip_suffix('.').unwrap_or(text);
        if name.len() <= 253 && name.split('.').all(label) {
            Ok(Host::Name(name.to_ascii_lowercase().into()))
        } else {
            Err(neither())
        }
    }
}

/// Parses `127.1` or `10.1.2`: the last number fills the remaining bytes (inet_aton(3)). Decimal only.
fn short_ipv4(text: &str) -> Option<Ipv4Addr> {
    let parts: Vec<u32> = text.split('.').map(|p| p.parse().ok()).collect::<Option<_>>()?;
    let (last, heads) = parts.split_last()?;
    if heads.is_empty() || heads.len() > 3 || heads.iter().any(|h| *h > 255) {
        return None;
    }
    let free = 8 * (4 - u32::try_from(heads.len()).ok()?);
    if u64::from(*last) >= 1u64 << free {
        return None;
    }
    let head = heads.iter().fold(0u32, |sum, h| (sum << 8) | h);
    Some(Ipv4Addr::from((u64::from(head) << free) as u32 | last))
}

impl FromStr for Address {
    type Err = String;

    /// Parses `host:port` or `[::1]:8080`.
    fn from_str(text: &str) -> Result<Address, String> {
        if text.contains('/') {
            return Err(format!(
                "`{}`: only a host and a port, without scheme and path",
                crate::yaml::short(text)
            ));
        }
        let shown = crate::yaml::short(text);
        if text.contains([',', ';']) || text.trim().contains(char::is_whitespace) {
            return Err(format!("`{shown}`: one address each, `host:port`: make a list of several"));
        }
        let (host, port) = text
            .rsplit_once(':')
            .ok_or_else(|| format!("`{shown}` has no port: write `{shown}:8080`, an address and a port"))?;
        if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) {
            let (host, port) = (crate::yaml::short(host), crate::yaml::short(port));
            return Err(format!("`{shown}`: an IPv6 address with a port is written `[{host}]:{port}`"));
        }
        if host.is_empty() {
            return Err(format!("`{shown}` has no host before the port"));
        }
        Ok(Address { host: Host::parse(host)?, port: parse_port(port)? })
    }
}

/// Parses a port, 1 to 65535.
pub fn parse_port(text: &str) -> Result<NonZeroU16, String> {
    match text.parse::<u64>() {
        Ok(0) => Err("port 0 is not a port: 1 to 65535".to_owned()),
        Ok(n) => u16::try_from(n)
            .ok()
            .and_then(NonZeroU16::new)
            .ok_or_else(|| format!("port {n} is out of range: 1 to 65535")),
        Err(_) => Err(format!("`{}` is not a port: 1 to 65535", crate::yaml::short(text))),
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(ip) => SocketAddr::new(*ip, self.port.get()).fmt(f),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

/// The protocol on a service's port. It is declared rather than detected: detection would wait for the
/// client's first bytes, which deadlocks protocols in which the server speaks first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    #[default]
    Tcp,
    /// HTTP/1.1 to the instances.
    Http,
    /// HTTP/2 with prior knowledge to the instances.
    Http2,
    Grpc,
    Tls,
    Mysql,
    Postgres,
    Redis,
    Mongo,
    Kafka,
    Thrift,
    Dubbo,
}

impl Protocol {
    /// Every protocol, for messages and completion.
    pub const ALL: &[Protocol] = &[
        Protocol::Tcp,
        Protocol::Http,
        Protocol::Http2,
        Protocol::Grpc,
        Protocol::Tls,
        Protocol::Mysql,
        Protocol::Postgres,
        Protocol::Redis,
        Protocol::Mongo,
        Protocol::Kafka,
        Protocol::Thrift,
        Protocol::Dubbo,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Http => "http",
            Protocol::Http2 => "http2",
            Protocol::Grpc => "grpc",
            Protocol::Tls => "tls",
            Protocol::Mysql => "mysql",
            Protocol::Postgres => "postgres",
            Protocol::Redis => "redis",
            Protocol::Mongo => "mongo",
            Protocol::Kafka => "kafka",
            Protocol::Thrift => "thrift",
            Protocol::Dubbo => "dubbo",
        }
    }

    /// Reports whether requests can be routed individually.
    pub fn is_http(self) -> bool {
        matches!(self, Protocol::Http | Protocol::Http2 | Protocol::Grpc)
    }

    /// Reports whether the instances speak HTTP/2.
    pub fn is_http2(self) -> bool {
        matches!(self, Protocol::Http2 | Protocol::Grpc)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Protocol, String> {
        Self::ALL.iter().copied().find(|p| p.as_str() == text).ok_or_else(|| {
            let all: Vec<_> = Self::ALL.iter().map(|p| p.as_str()).collect();
            format!("`{text}` is not a protocol: one of {}", all.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_an_ip_or_a_name_with_a_port() {
        let shown = |text: &str| text.parse::<Address>().map(|a| a.to_string()).unwrap_or_else(|e| e);
        assert_eq!(shown("10.0.1.11:8080"), "10.0.1.11:8080");
        assert_eq!(shown("127.1:80"), "127.0.0.1:80");
        assert_eq!(shown("[::1]:80"), "[::1]:80");
        assert_eq!(shown("[::ffff:10.0.0.1]:80"), "10.0.0.1:80");
        // The address is well-formed, although no host can connect to it.
        assert_eq!(shown("0.0.0.0:80"), "0.0.0.0:80");
        assert_eq!(shown("0:80"), "`0` is neither an IP address nor a host name");
        assert_eq!(shown("DB-1.internal:5432"), "db-1.internal:5432");
        assert_eq!(shown("a:0"), "port 0 is not a port: 1 to 65535");
        assert_eq!(shown("a:70000"), "port 70000 is out of range: 1 to 65535");
        assert_eq!(shown("10.0.0.256:80"), "`10.0.0.256` is neither an IP address nor a host name");
        assert_eq!(shown("::1:80"), "`::1:80`: an IPv6 address with a port is written `[::1]:80`");
        assert_eq!(shown("web"), "`web` has no port: write `web:8080`, an address and a port");
        // Two records concatenated by a non-atomic writer, as seen in production (kingpin).
        assert_eq!(
            shown("10.1.2.310.4.5.6:9000"),
            "`10.1.2.310.4.5.6` is neither an IP address nor a host name"
        );
    }

    #[test]
    fn every_protocol_parses_as_it_prints() {
        for protocol in Protocol::ALL {
            assert_eq!(protocol.to_string().parse(), Ok(*protocol));
        }
    }
}
